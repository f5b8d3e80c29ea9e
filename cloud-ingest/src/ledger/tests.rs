//! Cases of the ledger, each as a lane written down in a few numbers.

use std::time::Duration;

use common::time::{HOUR_MICROS, Timestamp};

use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use common::time::SystemClock;

use super::{account::*, *};
use crate::lake::Table;

/// 10:00 of some day; messages are sealed a second apart from then on.
const START: i64 = 490_000 * HOUR_MICROS;

fn second(n: i64) -> Timestamp {
    Timestamp::from_micros(START + n * 1_000_000)
}

fn key(epoch: &str, lane: &str) -> LaneKey {
    LaneKey { site: "s".into(), gateway: "g".into(), epoch: epoch.into(), lane: lane.into() }
}

/// Every message has ten rows, all stored.
fn message(seq: i64) -> Refined {
    Refined {
        seq,
        rows: 10,
        rows_before: seq * 10,
        oldest: 0,
        sealed_at: second(seq),
        readings: 10,
        stored: 10,
        ..Refined::default()
    }
}

fn messages(seqs: impl IntoIterator<Item = i64>) -> Received {
    received(&seqs.into_iter().map(message).collect::<Vec<_>>())
}

/// In whichever order they are read, it is the same.
fn received(messages: &[Refined]) -> Received {
    let mut received = Received::default();
    messages.iter().for_each(|message| received.add(message));
    for turn in 0..messages.len() {
        let (mut turned, mut backwards) = (Received::default(), Received::default());
        let (later, earlier) = messages.split_at(turn);
        earlier.iter().chain(later).for_each(|message| turned.add(message));
        earlier.iter().chain(later).rev().for_each(|message| backwards.add(message));
        assert_eq!((&turned, &backwards), (&received, &received), "from {turn}");
    }
    received
}

fn state(head: i64, oldest: i64) -> Option<LaneState> {
    Some(LaneState { head, rows: head * 10, oldest, at: second(head) })
}

fn gap(first_seq: i64, last_seq: i64) -> Gap {
    Gap { first_seq, last_seq, readings: (last_seq - first_seq + 1) * 10, ts: second(last_seq) }
}

fn inputs(lane: LaneInput, gateway: GatewayInput) -> Inputs {
    Inputs {
        lanes: [(key("e1", "readings"), lane)].into(),
        gateways: [(("s".to_owned(), "g".to_owned()), gateway)].into(),
    }
}

/// Epoch e1 runs, and the gateway was heard at second 100.
fn running() -> GatewayInput {
    GatewayInput { current_epoch: Some("e1".into()), heard_at: Some(second(100)), ..GatewayInput::default() }
}

#[test]
fn each_seq_is_accounted_for() {
    struct Case {
        name: &'static str,
        lane: LaneInput,
        /// Whether the gateway has gone on to another epoch.
        later: bool,
        /// stored, declared, pending, missing, redelivered
        expected: [i64; 5],
        missing_seqs: &'static str,
    }
    let lane = LaneInput::default;
    let case = |name, lane, expected| Case { name, lane, later: false, expected, missing_seqs: "" };
    for Case { name, lane, later, expected, missing_seqs } in [
        case(
            "all there",
            LaneInput { received: messages(0..4), status: state(4, 4), ..lane() },
            [40, 0, 0, 0, 0],
        ),
        Case {
            missing_seqs: "2",
            ..case(
                "one lost",
                LaneInput { received: messages([0, 1, 3]), status: state(4, 4), ..lane() },
                [30, 0, 0, 10, 0],
            )
        },
        Case {
            missing_seqs: "0, 2-4",
            ..case(
                "lost at start",
                LaneInput { received: messages([1, 5]), status: state(6, 6), ..lane() },
                [20, 0, 0, 40, 0],
            )
        },
        case(
            "still held",
            LaneInput { received: messages([0, 1, 3]), status: state(6, 2), ..lane() },
            [30, 0, 30, 0, 0],
        ),
        Case {
            missing_seqs: "1-2",
            ..case(
                "lost and held",
                LaneInput { received: messages([0]), status: state(5, 3), ..lane() },
                [10, 0, 20, 20, 0],
            )
        },
        case(
            "declared",
            LaneInput { received: messages([0, 3]), gaps: vec![gap(1, 2)], status: state(4, 4), ..lane() },
            [20, 20, 0, 0, 0],
        ),
        case(
            "declared, yet in part delivered",
            LaneInput { received: messages([0, 2, 4]), gaps: vec![gap(1, 3)], status: state(5, 5), ..lane() },
            [30, 20, 0, 0, 0],
        ),
        Case {
            missing_seqs: "3",
            ..case(
                "declared twice, wider the second time, and one lost beside",
                LaneInput {
                    received: messages([0, 4]),
                    gaps: vec![gap(1, 1), gap(1, 2)],
                    status: state(5, 5),
                    ..lane()
                },
                [20, 20, 0, 10, 0],
            )
        },
        Case {
            missing_seqs: "2",
            ..case(
                "declared with one that came and is larger, and one lost beside",
                LaneInput {
                    received: received(&[
                        message(0),
                        message(1),
                        Refined { rows: 100, readings: 100, stored: 100, rows_before: 72, ..message(5) },
                        Refined { rows_before: 173, ..message(7) },
                    ]),
                    gaps: vec![Gap { readings: 103, ..gap(3, 6) }],
                    status: Some(LaneState { rows: 183, ..state(8, 8).unwrap() }),
                    ..lane()
                },
                [130, 52, 0, 1, 0],
            )
        },
        Case {
            later: true,
            missing_seqs: "2-3",
            ..case(
                "closed",
                LaneInput { received: messages([0, 1]), closing: state(4, 4), ..lane() },
                [20, 0, 0, 20, 0],
            )
        },
        Case {
            later: true,
            ..case(
                "closed, but still in the outbox of the next run",
                LaneInput { received: messages([0, 1]), closing: state(4, 4), status: state(4, 2), ..lane() },
                [20, 0, 20, 0, 0],
            )
        },
        case(
            "no status yet: what messages say is held counts",
            LaneInput { received: messages([0, 3]), ..lane() },
            [20, 0, 20, 0, 0],
        ),
        Case {
            missing_seqs: "1",
            ..case(
                "no status yet: a message let go of its forerunners",
                LaneInput {
                    received: received(&[message(0), Refined { oldest: 2, ..message(2) }]),
                    ..lane()
                },
                [20, 0, 0, 10, 0],
            )
        },
        case(
            "delivered twice",
            LaneInput {
                received: received(&[
                    message(0),
                    Refined { redelivered: true, stored: 0, duplicates: 10, ..message(0) },
                    message(1),
                ]),
                status: state(2, 2),
                ..lane()
            },
            [20, 0, 0, 0, 10],
        ),
        Case {
            missing_seqs: "1",
            ..case(
                "refined, yet some rows are nowhere",
                LaneInput {
                    received: received(&[message(0), Refined { stored: 7, ..message(1) }]),
                    status: state(2, 2),
                    ..lane()
                },
                [17, 0, 0, 3, 0],
            )
        },
        case("nothing came yet", LaneInput { status: state(3, 0), ..lane() }, [0, 0, 30, 0, 0]),
        case("dropped before anything came", LaneInput { gaps: vec![gap(0, 2)], ..lane() }, [0, 30, 0, 0, 0]),
    ] {
        let gateway = GatewayInput {
            current_epoch: lane.status.or(lane.closing).map(|_| if later { "e2" } else { "e1" }.into()),
            ..running()
        };
        let audit = account(&inputs(lane, gateway), second(110));
        let sum = |of: fn(&LedgerRow) -> i64| audit.lanes.iter().map(of).sum::<i64>();
        let got = [
            sum(|r| r.stored),
            sum(|r| r.declared),
            sum(|r| r.pending),
            sum(|r| r.missing),
            sum(|r| r.redelivered),
        ];
        assert_eq!(got, expected, "{name}");
        assert_eq!(sum(|r| r.expected), expected[..4].iter().sum::<i64>(), "{name}");
        let seqs: Vec<&str> =
            audit.lanes.iter().map(|r| r.missing_seqs.as_str()).filter(|s| !s.is_empty()).collect();
        assert_eq!(seqs.join(", "), missing_seqs, "{name}");
        assert_eq!(audit.balances(), expected[3] == 0, "{name}: {audit}");
        assert_eq!(audit.gateways[0].totals.polled, expected[..4].iter().sum::<i64>(), "{name}");
    }
}

#[test]
fn lines_stand_in_the_hour_of_sealing() {
    let late = |seq: i64| Refined { sealed_at: second(3600 + seq), ..message(seq) };
    let lane =
        LaneInput { received: received(&[message(0), late(2)]), status: state(3, 3), ..LaneInput::default() };
    let audit = account(&inputs(lane, running()), second(110));
    let lines: Vec<_> = audit.lanes.iter().map(|r| (r.hour, r.stored, r.missing)).collect();
    assert_eq!(lines, [(second(0), 10, 10), (second(3600), 10, 0)]);
}

#[test]
fn the_edge_equation() {
    let lane = LaneInput { received: messages(0..10), status: state(10, 10), ..LaneInput::default() };
    let census = |sealed| Census { polled: sealed + 26, sealed, held: 20, rejected: 5, skipped: 1 };
    // Sealed by the census; then polled, pending, uncounted, and whether it balances.
    for (sealed, polled, pending, uncounted) in [(100, 126, 0, 0), (70, 126, 0, 30), (130, 156, 30, 0)] {
        let gateway = GatewayInput { census: [("e1".to_owned(), census(sealed))].into(), ..running() };
        let audit = account(&inputs(lane.clone(), gateway), second(110));
        let totals = &audit.totals;
        assert_eq!((totals.polled, totals.pending), (polled, pending), "{sealed}");
        assert_eq!(audit.gateways[0].uncounted, uncounted, "{sealed}");
        assert!(audit.balances(), "{audit}");
    }
    let gateway = GatewayInput { census: [("e1".to_owned(), census(100))].into(), ..running() };
    let audit = account(&inputs(lane.clone(), gateway), second(110));
    let equation =
        "polled 126 = stored 100 + held 20 + rejected 5 + skipped 1 + quarantined 0 + declared 0 · missing 0";
    assert_eq!(audit.to_string().lines().last(), Some(equation));
    // Sealed in a run that is over and let go of, but never heard of: lost.
    let closed = LaneInput { closing: state(10, 10), ..lane.clone() };
    let gateway = GatewayInput { census: [("e1".to_owned(), census(130))].into(), ..running() };
    let audit = account(&inputs(closed, gateway), second(110));
    assert_eq!((audit.totals.missing, audit.balances()), (30, false));
    // A census that does not add up.
    let wrong = Census { polled: 200, ..census(100) };
    let gateway = GatewayInput { census: [("e1".to_owned(), wrong)].into(), ..running() };
    assert!(!account(&inputs(lane, gateway), second(110)).balances());
}

#[test]
fn a_kill_costs_the_interval_that_it_declares() {
    let lane = LaneInput { received: messages(0..3), closing: state(3, 3), ..LaneInput::default() };
    let gateway = GatewayInput {
        current_epoch: Some("e2".into()),
        interruptions: vec![(second(3), second(4) + Duration::from_millis(200))],
        ..running()
    };
    let audit = account(&inputs(lane, gateway), second(110));
    assert!(audit.balances());
    assert_eq!((audit.gateways[0].interruptions, audit.gateways[0].interrupted_seconds), (1, 2));
    assert!(audit.to_string().contains("s/g: interrupted 1 times; readings of 2 s at most"), "{audit}");
}

#[test]
fn a_silent_gateway_is_unknown_and_one_that_said_farewell_is_not() {
    let lane = LaneInput { received: messages(0..3), status: state(3, 3), ..LaneInput::default() };
    for (stopped, now, unknown) in
        [(false, 100 + 180, None), (false, 100 + 181, Some(second(100))), (true, 100 + 181, None)]
    {
        let audit = account(&inputs(lane.clone(), GatewayInput { stopped, ..running() }), second(now));
        assert_eq!(audit.gateways[0].unknown_since, unknown);
        assert_eq!(audit.lanes[0].unknown_since, unknown);
        assert!(audit.balances());
    }
}

#[test]
fn two_epochs_that_grow_at_once_are_a_gateway_id_in_use_twice() {
    let run = |from: i64, to: i64| LaneInput {
        received: received(
            &(from..to)
                .map(|n| Refined { sealed_at: second(n * 60), ..message(n - from) })
                .collect::<Vec<_>>(),
        ),
        ..LaneInput::default()
    };
    for (first, second_run, at_once) in
        [(run(0, 10), run(10, 20), false), (run(0, 10), run(8, 20), false), (run(0, 20), run(10, 15), true)]
    {
        let lanes = [(key("e1", "readings"), first), (key("e2", "readings"), second_run)].into();
        let gateways = [(("s".to_owned(), "g".to_owned()), running())].into();
        let audit = account(&Inputs { lanes, gateways }, second(110));
        assert_eq!(audit.gateways[0].two_epochs_at_once, at_once);
    }
}

#[test]
fn other_lanes_and_senders_without_seq_are_no_part_of_the_equation() {
    let aggregates = LaneInput { received: messages([0, 2]), status: state(3, 3), ..LaneInput::default() };
    let nameless = Refined { rows: 0, readings: 5, stored: 3, duplicates: 1, quarantined: 1, ..message(0) };
    let mut json = LaneInput::default();
    json.received.add_unnumbered(&nameless);
    json.received.add_unnumbered(&nameless);
    let mut inputs = inputs(LaneInput { received: messages(0..1), ..LaneInput::default() }, running());
    inputs.lanes.insert(key("e1", "aggregates"), aggregates);
    inputs.lanes.insert(key("", "json"), json);
    let audit = account(&inputs, second(110));
    assert_eq!((audit.totals.polled, audit.totals.stored, audit.totals.missing), (10, 10, 0));
    assert_eq!(audit.totals.unnumbered, 10);
    assert!(audit.totals.balances());
    // But a lost aggregate is lost all the same.
    assert!(!audit.balances());
    let batch = delivery_ledger(&audit).unwrap();
    assert_eq!(batch.num_rows(), 3);
    let json = serde_json::to_value(&audit).unwrap();
    assert_eq!(json["totals"]["stored"], 10);
    assert_eq!(json["gateways"][0]["polled"], 10);
    assert_eq!(json["balanced"], false);
}

/// A column of the lake's tables.
#[derive(Clone)]
enum Col {
    Text(Vec<Option<&'static str>>),
    Int(Vec<Option<i64>>),
    Second(Vec<Option<i64>>),
    Bool(Vec<bool>),
}

impl Col {
    fn array(self) -> ArrayRef {
        match self {
            Col::Text(values) => Arc::new(StringArray::from(values)),
            Col::Int(values) => Arc::new(Int64Array::from(values)),
            Col::Second(values) => {
                let micros = values.into_iter().map(|s| s.map(|s| second(s).as_micros()));
                Arc::new(micros.collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
            }
            Col::Bool(values) => Arc::new(BooleanArray::from(values)),
        }
    }
}

async fn write(tables: &Tables, table: Table, columns: Vec<Col>) {
    let rows = RecordBatch::try_new(table.schema(), columns.into_iter().map(Col::array).collect()).unwrap();
    tables.append(table, None, vec![rows], ("refine", 1)).await.unwrap();
}

fn text(value: &'static str, n: usize) -> Col {
    Col::Text(vec![Some(value); n])
}

fn ints(values: &[i64]) -> Col {
    Col::Int(values.iter().copied().map(Some).collect())
}

fn seconds(values: &[i64]) -> Col {
    Col::Second(values.iter().copied().map(Some).collect())
}

/// Epoch e1 was killed after five messages, of which 1 was dropped and declared, 3 was lost; e2 runs, its last
/// will came after its birth. Message 0 came twice.
async fn lake() -> Tables {
    let tables = Tables::open(&Store::open("memory:///").unwrap()).await.unwrap();
    write(
        &tables,
        Table::Messages,
        vec![
            text("s", 5),
            text("g", 5),
            Col::Text(["e1", "e1", "e1", "e1", "e2"].map(Some).to_vec()),
            text("readings", 5),
            ints(&[0, 0, 2, 4, 0]),
            ints(&[10; 5]),
            ints(&[0, 0, 20, 40, 0]),
            ints(&[0; 5]),
            seconds(&[0, 0, 2, 4, 10]),
            text("synced", 5),
            text("sha", 5),
            ints(&[10; 5]),
            ints(&[10, 0, 9, 10, 10]),
            ints(&[0, 10, 0, 0, 0]),
            ints(&[0, 0, 1, 0, 0]),
            Col::Bool(vec![false, true, false, false, false]),
            seconds(&[1, 2, 3, 5, 11]),
            text("x", 5),
            ints(&[1; 5]),
        ],
    )
    .await;
    let records = ["gap", "gap", "closing", "interruption", "census", "census", "census", "census"];
    write(
        &tables,
        Table::Control,
        vec![
            text("s", 8),
            text("g", 8),
            Col::Text(records.map(Some).to_vec()),
            seconds(&[6; 8]),
            text("e1", 8),
            Col::Text(["readings", "readings", "readings"].map(Some).into_iter().chain([None; 5]).collect()),
            Col::Int(vec![Some(1), Some(1), None, None, None, None, None, None]),
            Col::Int(vec![Some(1), Some(1), Some(4), None, None, None, None, None]),
            ints(&[10, 10, 50, 0, 30, 30, 7, 50]),
            Col::Second(vec![None, None, None, Some(5), Some(0), Some(0), Some(0), Some(0)]),
            Col::Second(vec![Some(1), Some(1), None, Some(6), Some(9), Some(9), Some(9), Some(9)]),
            Col::Text(
                [Some("full"), Some("full"), None, None]
                    .into_iter()
                    .chain(["polled", "polled", "held", "sealed"].map(Some))
                    .collect(),
            ),
            seconds(&[7; 8]),
            text("e2", 8),
            ints(&[0; 8]),
            text("x", 8),
        ],
    )
    .await;
    write(
        &tables,
        Table::Status,
        vec![
            text("s", 6),
            text("g", 6),
            Col::Bool(vec![true, true, true, false, true, true]),
            // The clock of e1 was ahead; its retained status comes once more when the cloud connects again. The
            // newest of e2 comes again too, to a replica that was away.
            seconds(&[5_000, 10, 70, 10, 5_000, 70]),
            seconds(&[1, 11, 71, 90, 72, 240]),
            text("1", 6),
            text("sha", 6),
            Col::Text(["e1", "e2", "e2", "e2", "e1", "e2"].map(Some).to_vec()),
            Col::Text(["e1", "e2", "e2", "", "e1", "e2"].map(|e| Some(e).filter(|e| !e.is_empty())).to_vec()),
            Col::Text(
                ["readings"; 6].iter().enumerate().map(|(i, lane)| (i != 3).then_some(*lane)).collect(),
            ),
            Col::Int(vec![Some(1), Some(1), Some(2), None, Some(1), Some(2)]),
            Col::Int(vec![Some(10), Some(10), Some(20), None, Some(10), Some(20)]),
            Col::Int(vec![Some(0), Some(0), Some(1), None, Some(0), Some(1)]),
            text("x", 6),
        ],
    )
    .await;
    tables
}

#[tokio::test]
async fn a_lake_is_audited() {
    let empty = Tables::open(&Store::open("memory:///").unwrap()).await.unwrap();
    assert_eq!(audit(&empty, second(0)).await.unwrap().totals, Totals::default());

    let tables = lake().await;
    let late = audit(&tables, second(252)).await.unwrap();
    assert_eq!(late.gateways[0].unknown_since, Some(second(71)), "a copy of what it said is no sign of life");
    let audit = audit(&tables, second(100)).await.unwrap();
    let lines: Vec<_> =
        audit.lanes.iter().map(|r| (r.epoch.as_str(), r.expected, r.missing_seqs.as_str())).collect();
    assert_eq!(lines, [("e1", 50, "3"), ("e2", 20, "")], "{audit}");
    let Totals { polled, stored, held, quarantined, declared, pending, missing, redelivered, .. } =
        audit.totals;
    assert_eq!([stored, quarantined, declared, pending, missing], [39, 1, 10, 10, 10], "{audit}");
    // The census of e1, and what e2 sealed without one yet; e1's does not add up to 60 + 7.
    assert_eq!((polled, held, redelivered), (80, 7, 10));
    let gateway = &audit.gateways[0];
    assert_eq!((gateway.interruptions, gateway.interrupted_seconds, gateway.uncounted), (1, 1, 20));
    assert_eq!(gateway.unknown_since, None, "the last will is no farewell, and 71 s is not long ago");
    assert!(!audit.balances());
}

#[tokio::test]
async fn the_ledger_is_a_table() {
    let tables = lake().await;
    let context = tables.session().await.unwrap();
    let ledger = LedgerTable::new(tables, Arc::new(SystemClock));
    context.register_table("ledger", Arc::new(ledger)).unwrap();
    let sql = "SELECT missing, missing_seqs, unknown_since IS NULL AS known FROM ledger WHERE epoch = 'e1'";
    let batches = context.sql(sql).await.unwrap().collect().await.unwrap();
    let batch = arrow::compute::concat_batches(&batches[0].schema(), &batches).unwrap();
    assert_eq!(batch.num_rows(), 1);
    assert_eq!(batch.column(0).as_primitive::<arrow::datatypes::Int64Type>().value(0), 10);
    assert_eq!(batch.column(1).as_string::<i32>().value(0), "3");
}
