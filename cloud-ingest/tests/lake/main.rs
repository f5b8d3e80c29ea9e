//! From messages to silver, in one process, without a broker: whatever happens on the way, the same rows.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

mod arrivals;
mod faults;
mod older;
mod on_s3;
mod quarantine;
mod rebuild;
mod rules;
mod slt;
mod upkeep;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arrow::{
    array::{
        ArrayRef, DictionaryArray, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
        UInt8Array,
    },
    compute::cast,
    datatypes::{DataType, Int32Type},
    util::pretty::pretty_format_batches,
};
use cloud_ingest::{
    bronze::{self, Bronze, Limits, Message, Origin},
    ingest,
    lake::{SegmentName, Table},
    metrics::Metrics,
    plan,
    quality::Rules,
    refine::{self, Outcome, Refiner},
    silver::{COMMIT_ORDER, Counts},
    store::Store,
    subscribe::{AckToken, Inbox},
    tables::Tables,
};
use common::{
    time::{Clock, SystemClock, Timestamp},
    wire::{self, ClockState, Identity, Lane},
};
use futures::TryStreamExt;
use object_store::{ObjectStoreExt, path::Path};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

const ROOT: &str = "tailrace/v1";
const LIMITS: plan::Limits = plan::Limits { segments: 4, bytes: 1 << 20 };

fn now() -> Timestamp {
    "2026-03-01T06:30:00Z".parse().unwrap()
}

fn at(seconds: u64) -> Timestamp {
    now() - Duration::from_secs(1_000) + Duration::from_secs(seconds)
}

fn message(topic: &str, payload: impl Into<bytes::Bytes>, identity: Option<Identity>) -> Message {
    Message {
        received_at: now(),
        origin: Origin::of(ROOT, format!("{ROOT}/{topic}")).into(),
        payload: payload.into(),
        content_type: None,
        qos: 1,
        dup: false,
        identity: identity.map(Box::new),
    }
}

/// A message of lane `readings`: (second, device, value in °F).
fn readings(seq: u64, rows: &[(u64, &str, f64)]) -> Message {
    let identity = Identity {
        v: 1,
        epoch: Uuid::from_u128(7),
        lane: Lane::Readings,
        seq,
        rows: rows.len() as u64,
        rows_before: 0,
        oldest: 0,
        sealed_at: now(),
        clock: ClockState::Synced,
    };
    let word = |word: &'static str| -> ArrayRef {
        Arc::new(rows.iter().map(|_| word).collect::<DictionaryArray<Int32Type>>())
    };
    let ts = rows.iter().map(|(second, ..)| at(*second).as_micros());
    let columns: Vec<ArrayRef> = vec![
        Arc::new(TimestampMicrosecondArray::from_iter_values(ts).with_timezone("UTC")),
        Arc::new(rows.iter().map(|(_, device, _)| *device).collect::<DictionaryArray<Int32Type>>()),
        word("temperature"),
        word("pump-01"),
        word("[degF]"),
        word("gauge"),
        Arc::new(Float64Array::from_iter_values(rows.iter().map(|(.., value)| *value))),
        Arc::new(UInt8Array::from(vec![0; rows.len()])),
    ];
    let batch = RecordBatch::try_new(wire::schema(Lane::Readings), columns).unwrap();
    message("plant/gw/readings", wire::encode(&batch, &identity).unwrap(), Some(identity))
}

/// Puts messages as segment `number` of one writer.
async fn put(store: &Store, number: u64, messages: &[Message]) {
    try_put(store, 1, number, messages).await.unwrap();
}

async fn try_put(store: &Store, writer: u128, number: u64, messages: &[Message]) -> object_store::Result<()> {
    put_in(store, now().hour(), writer, number, messages).await
}

async fn put_in(
    store: &Store,
    hour: Timestamp,
    writer: u128,
    number: u64,
    messages: &[Message],
) -> object_store::Result<()> {
    let name = SegmentName { hour, writer: Uuid::from_u128(writer), number };
    let bytes = bronze::encode(&bronze::rows(messages).unwrap()).unwrap();
    bronze::put(store.objects().as_ref(), &name, bytes.into()).await
}

fn refiner(store: &Store, tables: &Tables) -> Refiner {
    let rules = Rules::new(ROOT, &[], Duration::from_secs(300), &BTreeMap::new(), &BTreeMap::new());
    Refiner::new(store, tables, rules, LIMITS, Metrics::default())
}

/// Between two listings a writer that is known is followed, also into the next hour; one that is new is found by the next.
#[tokio::test]
async fn writers_are_followed_between_listings() {
    let store = Store::open("memory:///").unwrap();
    let tables = Tables::open(&store).await.unwrap();
    tables.create_missing().await.unwrap();
    let mut refiner = refiner(&store, &tables);
    let next_hour = now().hour() + Duration::from_secs(3600);
    let start = next_hour - Duration::from_secs(5);
    let after = |seconds| start + Duration::from_secs(seconds);
    let message = |seq: u64| [readings(seq, &[(seq, "a", 100.0)])];
    put(&store, 0, &message(0)).await;
    assert!(matches!(refiner.step(start, false).await.unwrap(), Outcome::Refined(_)));
    assert_eq!(refiner.step(start, false).await.unwrap(), Outcome::Idle);

    try_put(&store, 2, 0, &message(1)).await.unwrap();
    put(&store, 1, &message(2)).await;
    put(&store, 2, &message(3)).await;
    put_in(&store, next_hour, 1, 3, &message(4)).await.unwrap();
    let stored = |outcome: Outcome| match outcome {
        Outcome::Refined(counts) => counts.stored,
        Outcome::Idle => 0,
    };
    assert_eq!(stored(refiner.step(after(1), false).await.unwrap()), 2);
    assert_eq!(stored(refiner.step(after(2), false).await.unwrap()), 0, "the hour has not begun");
    assert_eq!(stored(refiner.step(after(6), false).await.unwrap()), 1);
    put_in(&store, next_hour, 1, 4, &message(5)).await.unwrap();
    assert_eq!(stored(refiner.step(after(7), false).await.unwrap()), 1);
    assert_eq!(stored(refiner.step(after(8), false).await.unwrap()), 0);
    assert_eq!(stored(refiner.step(after(12), false).await.unwrap()), 1, "another writer");
    put_in(&store, next_hour, 2, 1, &message(6)).await.unwrap();
    assert_eq!(stored(refiner.step(after(13), false).await.unwrap()), 1, "which is followed now");
    try_put(&store, 3, 0, &message(7)).await.unwrap();
    assert_eq!(stored(refiner.step(after(14), false).await.unwrap()), 0);
    refiner.expect();
    assert_eq!(
        stored(refiner.step(after(14), false).await.unwrap()),
        1,
        "a third, of which somebody has told"
    );
    put_in(&store, now().hour() - Duration::from_secs(3 * 3600), 1, 5, &message(8)).await.unwrap();
    assert_eq!(stored(refiner.step(after(16), false).await.unwrap()), 0);
    refiner.expect();
    assert_eq!(
        stored(refiner.step(after(16), false).await.unwrap()),
        1,
        "received hours before the store took it"
    );
}

async fn refine_all(refiner: &mut Refiner) -> Counts {
    let mut sum = Counts::default();
    while let Outcome::Refined(c) = refiner.step(now(), true).await.unwrap() {
        sum.messages += c.messages;
        sum.redelivered_messages += c.redelivered_messages;
        sum.readings += c.readings;
        sum.stored += c.stored;
        sum.duplicates += c.duplicates;
        sum.quarantined += c.quarantined;
    }
    sum
}

async fn ask(tables: &Tables, sql: &str) -> String {
    let session = tables.session().await.unwrap();
    let rows = session.sql(sql).await.unwrap().collect().await.unwrap();
    pretty_format_batches(&rows).unwrap().to_string()
}

/// Every row of every table that the refiner writes.
async fn everything(tables: &Tables) -> String {
    let mut all = String::new();
    for table in COMMIT_ORDER {
        let columns: Vec<String> =
            table.schema().fields().iter().map(|f| format!("\"{}\"", f.name())).collect();
        let columns = columns.join(", ");
        let sql = format!("select {columns} from {}.{} order by {columns}", table.layer(), table.name());
        all += &format!("{}\n{}\n", table.path(), ask(tables, &sql).await);
    }
    all
}

async fn fill(store: &Store) {
    for (number, messages) in (0..).zip(segments()) {
        put(store, number, &messages).await;
    }
}

/// What silver holds of [`segments`] when nothing fails on the way.
async fn straight() -> String {
    let store = Store::open("memory:///").unwrap();
    let tables = Tables::open(&store).await.unwrap();
    fill(&store).await;
    refine_all(&mut refiner(&store, &tables)).await;
    everything(&tables).await
}

/// Segments with everything that can go wrong in them.
fn segments() -> [Vec<Message>; 5] {
    let one = readings(0, &[(0, "a", 212.0), (1, "a", 213.0), (0, "b", 32.0)]);
    // Another payload under a name that was used before.
    let mut twice = readings(0, &[(0, "a", 214.0), (60, "a", 50.0)]);
    twice.received_at = now() + Duration::from_secs(1);
    let mut poison = readings(3, &[(5, "a", 1.0); 4]);
    poison.payload = poison.payload.slice(..poison.payload.len() / 2);
    let json = br#"[{"device_id":"j","timestamp":1772346000,"value":20.5,"device_type":"temperature"},
                    {"device_id":"j","timestamp":1772346000,"value":20.5,"device_type":"temperature"},
                    {"device_id":"j","timestamp":"never","value":1}]"#;
    let status = format!(
        r#"{{"v":1,"online":true,"at":"{}","epoch":"{}","version":"0.1.0","lanes":[]}}"#,
        now(),
        Uuid::from_u128(7)
    );
    let work = format!(r#"{{"id":"w1","site":"plant","asset_id":"pump-01","done_at":"{}"}}"#, now());
    [
        vec![one.clone(), readings(1, &[(2, "a", 214.0), (3, "a", 9_999.0)])],
        vec![one.clone(), message("plant/gw/json", &json[..], None)],
        vec![readings(2, &[(1, "a", 213.0), (2, "a", 215.0), (900, "a", 70.0)]), poison],
        vec![twice, message("plant/gw/status", status, None), message("elsewhere", "?", None)],
        vec![message("_cloud/maintenance", work, None), readings(4, &[(4, "a", 71.0)]), one],
    ]
}

#[tokio::test]
async fn every_reading_is_accounted_for() {
    let store = Store::open("memory:///").unwrap();
    let tables = Tables::open(&store).await.unwrap();
    fill(&store).await;
    let counts = refine_all(&mut refiner(&store, &tables)).await;
    let expected = Counts {
        messages: 12,
        redelivered_messages: 3,
        readings: 24,
        // a: 0 1 2 900 60 4, b: 0, j: 1
        stored: 8,
        // 2 × 3 redelivered, one of j, one of seq 2
        duplicates: 8,
        // out of range 1, undecodable 4, conflicts 2, j without a time 1
        quarantined: 8,
    };
    assert_eq!(counts, expected);
    let sum = "select sum(readings), sum(stored), sum(duplicates), sum(quarantined), \
               sum(cast(readings <> stored + duplicates + quarantined as bigint)) u from silver.messages";
    assert!(ask(&tables, sum).await.contains("| 24 "), "{}", ask(&tables, sum).await);
    let values = "select device_id, value, unit, quality, year, month from silver.sensor_readings \
                  where device_id in ('a', 'b') order by device_id, ts limit 2";
    let text = ask(&tables, values).await;
    assert!(text.contains("| a         | 100.0") && text.contains("| Cel  | good    | 2026 | 3 "), "{text}");
    let rules =
        ask(&tables, "select rule, sum(readings) n from silver.quarantine group by rule order by 1").await;
    for part in [
        "| conflict         | 2 |",
        "| payload          | 4 |",
        "| range            | 1 |",
        "| topic            | 0 |",
    ] {
        assert!(rules.contains(part), "{part}\n{rules}");
    }
    let doubles = "select count(*) n from (select 1 from silver.sensor_readings \
                   group by site, device_id, ts having count(*) > 1)";
    assert!(ask(&tables, doubles).await.contains("| 0 |"));
    let schema = tables.session().await.unwrap().table("silver.sensor_readings").await.unwrap();
    for (got, wanted) in schema.schema().fields().iter().zip(Table::SensorReadings.schema().fields()) {
        assert_eq!((got.name(), got.data_type()), (wanted.name(), wanted.data_type()));
    }
}

/// A refiner that finds a plan done by another one knows as much of the devices as if it had been its own.
#[tokio::test]
async fn who_was_overtaken_knows_what_the_other_stored() {
    let store = Store::open("memory:///").unwrap();
    let tables = Tables::open(&store).await.unwrap();
    let (mut ours, mut other) = (refiner(&store, &tables), refiner(&store, &tables));
    // Three stretches of time, with gaps between.
    put(&store, 0, &[readings(0, &[(0, "a", 100.0), (10, "a", 100.0)])]).await;
    refine_all(&mut ours).await;
    put(&store, 1, &[readings(1, &[(1_000, "a", 100.0), (1_010, "a", 100.0)])]).await;
    refine_all(&mut ours).await;
    refine_all(&mut other).await;
    // Known on both sides of a gap, and one within it.
    put(&store, 2, &[readings(2, &[(5, "a", 100.0), (500, "a", 100.0), (1_005, "a", 100.0)])]).await;
    assert_eq!(refine_all(&mut other).await.stored, 3);
    refine_all(&mut ours).await;
    // The same once more in a message of another name.
    put(&store, 3, &[readings(3, &[(500, "a", 100.0), (1_005, "a", 100.0)])]).await;
    let counts = refine_all(&mut ours).await;
    assert_eq!((counts.stored, counts.duplicates), (0, 2));
    assert!(ask(&tables, "select count(*) from silver.sensor_readings").await.contains("| 7 "));
}

/// A start reads what the hundredth plan says, and of silver only the hours since.
#[tokio::test]
async fn a_start_reads_little_of_silver() {
    let store = Store::open("memory:///").unwrap();
    let tables = Tables::open(&store).await.unwrap();
    let json = br#"{"device_id":"j","timestamp":1772335200,"value":20.5,"device_type":"humidity"}"#;
    let early = now() - Duration::from_secs(3 * 3600);
    let of_j = Message { received_at: early, ..message("plant/gw/json", &json[..], None) };
    put_in(&store, early.hour(), 1, 0, std::slice::from_ref(&of_j)).await.unwrap();
    let mut first = refiner(&store, &tables);
    assert_eq!(refine_all(&mut first).await.stored, 1);
    for n in 1..=102 {
        put(&store, n, &[readings(n, &[(n, "a", 100.0)])]).await;
        first.step(now(), false).await.unwrap();
    }

    let again = |seq, second| readings(seq, &[(second, "a", 100.0)]);
    put(&store, 103, &[of_j, again(103, 50), again(104, 102), readings(7, &[(7, "a", 100.0)])]).await;
    let counts = refine_all(&mut refiner(&store, &tables)).await;
    assert_eq!((counts.stored, counts.duplicates, counts.redelivered_messages), (0, 4, 1));

    let folder = Path::from("silver/sensor_readings/device_type=humidity");
    let files: Vec<_> = store.objects().list(Some(&folder)).try_collect().await.unwrap();
    for file in &files {
        store.objects().delete(&file.location).await.unwrap();
    }
    put(&store, 104, &[again(105, 200)]).await;
    assert_eq!(refine_all(&mut refiner(&store, &tables)).await.stored, 1, "what lies there is not asked for");
}

/// What a gateway sends whose clock was never set: its times count from its machine's start.
#[tokio::test]
async fn what_has_no_time_is_kept_in_quarantine() {
    let store = Store::open("memory:///").unwrap();
    let tables = Tables::open(&store).await.unwrap();
    let boot = Uuid::from_u128(3);
    let unsynced = |of: Message, lane: Lane, rows: u64| {
        let identity = Identity { lane, rows, clock: ClockState::Unsynced { boot }, ..*of.identity.unwrap() };
        let origin = Origin::of(ROOT, format!("{ROOT}/plant/gw/{lane}")).into();
        Message { origin, identity: Some(Box::new(identity)), ..of }
    };
    let in_1970 = |micros: i64| at(0).as_micros() - micros;
    // A device with a clock of its own beside one without.
    let mixed = readings(0, &[(0, "a", 212.0), (1, "a", 213.0)]);
    let batch = wire::decode(Lane::Readings, &mixed.payload).unwrap();
    let mut columns = batch.columns().to_vec();
    let ts = [at(0).as_micros(), at(1).as_micros() - in_1970(600_000_000)];
    columns[0] = Arc::new(TimestampMicrosecondArray::from_iter_values(ts).with_timezone("UTC"));
    let batch = RecordBatch::try_new(wire::schema(Lane::Readings), columns).unwrap();
    let mut mixed = unsynced(mixed, Lane::Readings, 2);
    mixed.payload = wire::encode(&batch, mixed.identity.as_ref().unwrap()).unwrap().into();
    let of_instant = |mut message: Message, micros: i64| {
        let identity = message.identity.as_ref().unwrap();
        let schema = wire::schema(identity.lane);
        let columns = schema.fields().iter().map(|field| -> ArrayRef {
            match field.data_type() {
                DataType::Timestamp(..) => {
                    // A window of an hour that an agent cut short when it stopped.
                    let later = if field.name() == "window_end" { 3_600_000_000 } else { 0 };
                    Arc::new(TimestampMicrosecondArray::from(vec![micros + later]).with_timezone("UTC"))
                }
                DataType::Dictionary(..) => {
                    Arc::new(["x"].into_iter().collect::<DictionaryArray<Int32Type>>())
                }
                DataType::Utf8 => Arc::new(StringArray::from(vec!["x"])),
                other => cast(&UInt8Array::from(vec![1]), other).unwrap(),
            }
        });
        let rows = RecordBatch::try_new(Arc::clone(&schema), columns.collect()).unwrap();
        message.payload = wire::encode(&rows, identity).unwrap().into();
        message
    };
    let aggregates = of_instant(unsynced(readings(0, &[]), Lane::Aggregates, 1), 600_000_000);
    // Set, and wrong: by seventy years ahead, and by fifty behind.
    let synced = |of: Message, lane: Lane, micros: i64| {
        let mut message = unsynced(of, lane, 1);
        message.identity.as_mut().unwrap().clock = ClockState::Synced;
        of_instant(message, micros)
    };
    let (ahead, behind) = (4_102_444_800_000_000, 200_000_000_000_000);
    let wrong = [
        synced(readings(1, &[]), Lane::Aggregates, ahead),
        synced(readings(2, &[]), Lane::Aggregates, behind),
        synced(readings(3, &[]), Lane::Anomalies, ahead),
        synced(readings(4, &[]), Lane::Aggregates, at(0).as_micros()),
    ];
    put(&store, 0, &[vec![mixed, aggregates], wrong.to_vec()].concat()).await;
    let counts = refine_all(&mut refiner(&store, &tables)).await;
    assert_eq!((counts.readings, counts.stored, counts.quarantined), (7, 2, 5));
    let rules = "select rule, sum(readings) from silver.quarantine group by rule order by rule";
    let rules = ask(&tables, rules).await;
    for part in ["| clock  | 1 ", "| future | 2 ", "| past   | 2 "] {
        assert!(rules.contains(part), "{part}\n{rules}");
    }
    let stored = "select count(*) from silver.aggregates";
    assert!(ask(&tables, stored).await.contains("| 1 "), "one window of a right clock");
    assert!(ask(&tables, "select count(*) from silver.anomalies").await.contains("| 0 "));
    let clocks = ask(&tables, "select distinct clock from silver.messages").await;
    assert!(clocks.contains("| unsynced |"), "{clocks}");
}

#[tokio::test]
async fn a_power_cut_between_any_two_commits_changes_nothing() {
    let straight = straight().await;
    for cut in COMMIT_ORDER {
        let store = Store::open("memory:///").unwrap();
        let mut tables = Tables::open(&store).await.unwrap();
        fill(&store).await;
        // Each life of the refiner ends at its first commit to `cut`, then one lives on for one plan.
        for life in 0..8 {
            let mut refiner = refiner(&store, &tables);
            if life % 2 == 0 {
                let died = Arc::new(AtomicBool::new(false));
                let dying = Arc::clone(&died);
                refiner.before_commit(Arc::new(move |table| {
                    dying.store(dying.load(Ordering::Relaxed) || table == cut, Ordering::Relaxed);
                    anyhow::ensure!(table != cut, "the power is gone");
                    Ok(())
                }));
                let step = refiner.step(now(), true).await;
                assert_eq!(step.is_err(), died.load(Ordering::Relaxed));
            } else {
                refiner.step(now(), true).await.unwrap();
            }
            tables = Tables::open(&store).await.unwrap();
        }
        assert_eq!(everything(&tables).await, straight, "cut before {}", cut.path());
    }
}

#[tokio::test]
async fn two_refiners_do_no_harm() {
    let store = Store::open("memory:///").unwrap();
    let tables = Tables::open(&store).await.unwrap();
    fill(&store).await;
    let others = Tables::open(&store).await.unwrap();
    let (mut a, mut b) = (refiner(&store, &tables), refiner(&store, &others));
    for _ in 0..6 {
        // Whoever loses begins anew from what the other has done.
        let _ = tokio::join!(a.step(now(), true), b.step(now(), true));
    }
    assert_eq!(everything(&tables).await, straight().await);
}

#[tokio::test]
async fn from_the_inbox_to_silver_and_a_clean_stop() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap()).unwrap();
    let tables = Tables::open(&store).await.unwrap();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let (inbound, received) = mpsc::channel(8);
    let (durable, mut acknowledge) = mpsc::channel::<cloud_ingest::subscribe::Durable>(4);
    let (progress, segments) = watch::channel(0);
    let (refined, _) = watch::channel(0);
    let limits = Limits { max_age: Duration::from_millis(20), max_bytes: 1 << 20, max_messages: 4 };
    let inbox = Inbox::new(&inbound, Arc::clone(&clock));
    let writing = tokio::spawn(ingest::run(
        Bronze::new(Uuid::from_u128(9), limits),
        store.clone(),
        Arc::clone(&clock),
        received,
        durable,
        progress,
        Metrics::default(),
    ));
    let refining = tokio::spawn(refine::run(
        refiner(&store, &tables),
        clock,
        segments,
        Duration::from_secs(60),
        refined,
    ));
    tokio::spawn(async move {
        while let Some(durable) = acknowledge.recv().await {
            for token in durable.tokens {
                if let AckToken::Local(told) = token {
                    told.send(()).unwrap();
                }
            }
        }
    });
    for n in 0..20 {
        let json = format!(r#"{{"device_id":"x","timestamp":{},"value":{n}}}"#, 1_772_344_800 + n);
        inbox.submit(format!("{ROOT}/plant/other/json"), json.into()).await.unwrap();
    }
    drop(inbound);
    writing.await.unwrap();
    refining.await.unwrap();
    let count = ask(&tables, "select count(*) n, count(distinct ts) d from silver.sensor_readings").await;
    assert!(count.contains("| 20 | 20 |"), "{count}");
    assert!(inbox.submit("x".into(), "{}".into()).await.is_err(), "nobody is there any more");
}
