//! Messages with provisional times, through the whole outbox.

use std::{sync::Arc, time::Duration};

use arrow::{
    array::{
        Array, ArrayRef, AsArray, Float64Array, RecordBatch, StringArray, StringDictionaryBuilder,
        TimestampMicrosecondArray, UInt8Array,
    },
    datatypes::{Int32Type, Int64Type, TimestampMicrosecondType},
};
use common::{
    time::HOUR_MICROS,
    wire::{self, Lane},
};

use super::*;
use crate::{
    census::{Census, Outcome},
    outbox::{Limits, Outbox},
    seal::Draft,
};

/// From the machine's start to 2026-11-21T08:16:40.25Z less 1,000 s, in µs.
const OFFSET: i64 = 1_795_248_000_250_000;

const A: Uuid = Uuid::from_u128(0xa);
const B: Uuid = Uuid::from_u128(0xb);

/// Provisional: so many seconds after the machine's start.
fn up(seconds: i64) -> Timestamp {
    Timestamp::from_micros(seconds * 1_000_000)
}

fn set(seconds: i64) -> Timestamp {
    up(seconds).shifted(OFFSET)
}

fn in_boot(dir: &Path, boot: Uuid, offset: Option<i64>) {
    let mut boots = Boots::load(dir).unwrap();
    boots.run_in(boot, offset);
    boots.store(dir).unwrap();
}

fn open(dir: &Path, now: Timestamp) -> Outbox {
    let limits = Limits {
        max_bytes: 1 << 30,
        max_age: Duration::from_secs(30 * 86_400),
        min_free_disk: 0,
        generation_bytes: 1 << 20,
        max_message_bytes: 128 * 1024,
        census_every: Duration::from_secs(3_600),
    };
    Outbox::open(dir, limits, now).unwrap()
}

/// Seals a reading a second of each of these times.
fn seal(outbox: &Outbox, times: &[Timestamp]) {
    let n = times.len();
    let word = |text: &str| -> ArrayRef {
        let mut builder = StringDictionaryBuilder::<Int32Type>::new();
        (0..n).for_each(|_| builder.append_value(text));
        Arc::new(builder.finish())
    };
    let ts: TimestampMicrosecondArray = times.iter().map(|at| Some(at.as_micros())).collect();
    let mut columns: Vec<ArrayRef> = vec![Arc::new(ts.with_timezone("UTC"))];
    columns.extend(["p/t", "temperature", "p", "Cel", "gauge"].map(word));
    columns.push(Arc::new(Float64Array::from(vec![1.0; n])));
    columns.push(Arc::new(UInt8Array::from(vec![0; n])));
    let batch = RecordBatch::try_new(wire::schema(Lane::Readings), columns).unwrap();
    let mut census = Census::default();
    times.iter().for_each(|at| census.add(*at, Outcome::Polled, 1));
    let (now, last_event) = (*times.last().unwrap(), times.iter().copied().max().unwrap());
    let draft = Draft { lane: Lane::Readings, batch, last_event, census };
    outbox.append(now + Duration::from_secs(1), vec![draft], &[]).unwrap();
}

fn page(outbox: &Outbox, lane: Lane) -> Vec<Message> {
    outbox.page(lane, 0, 100, usize::MAX, set(0)).unwrap()
}

fn times(message: &Message) -> Vec<Timestamp> {
    let batch = wire::decode(message.identity.lane, &message.payload).unwrap();
    let times = batch.column_by_name("ts").unwrap().as_primitive::<TimestampMicrosecondType>();
    times.values().iter().map(|micros| Timestamp::from_micros(*micros)).collect()
}

/// A row of the control lane, instants in µs.
struct Declared {
    record: String,
    reason: String,
    readings: i64,
    from: Option<i64>,
    to: Option<i64>,
}

/// What the control lane may send.
fn declared(outbox: &Outbox) -> Vec<Declared> {
    let mut records = Vec::new();
    for message in page(outbox, Lane::Control) {
        let batch = wire::decode(Lane::Control, &message.payload).unwrap();
        let records_of = batch.column(0).as_dictionary::<Int32Type>().downcast_dict::<StringArray>().unwrap();
        let instant = |name: &str, row: usize| {
            let column = batch.column_by_name(name).unwrap().as_primitive::<TimestampMicrosecondType>();
            column.is_valid(row).then(|| column.value(row))
        };
        for (row, record) in records_of.into_iter().enumerate() {
            let reason = batch.column(9).as_string::<i32>();
            records.push(Declared {
                record: record.unwrap().to_owned(),
                reason: if reason.is_valid(row) { reason.value(row).to_owned() } else { String::new() },
                readings: batch.column(6).as_primitive::<Int64Type>().value(row),
                from: instant("from", row),
                to: instant("to", row),
            });
        }
    }
    records
}

#[test]
fn what_was_sealed_before_the_clock_was_set_waits_and_leaves_with_its_time() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path();
    in_boot(dir, A, None);
    let unset = open(dir, up(60));
    // A device with a clock of its own stands beside one that has none.
    seal(&unset, &[up(61), set(62), up(63)]);
    unset.close(up(70)).unwrap();
    assert_eq!(unset.heads(), [0; 4]);
    assert!(Lane::ALL.iter().all(|lane| page(&unset, *lane).is_empty()), "they wait");
    let held: u64 = unset.lanes().iter().map(|lane| lane.messages).sum();
    assert_eq!(held, 3, "a batch, its census, the closing");
    assert_eq!(unset.last_event_time(), Some(set(62)));
    drop(unset);

    in_boot(dir, A, Some(OFFSET));
    let outbox = open(dir, set(71));
    let sent = page(&outbox, Lane::Readings);
    assert_eq!(times(&sent[0]), [set(61), set(62), set(63)]);
    assert_eq!((sent[0].identity.sealed_at, sent[0].identity.clock), (set(64), ClockState::Synced));
    // The counted hours count from the machine's start too: the first of them begins with it.
    let hour = (Some(OFFSET), Some(OFFSET + HOUR_MICROS));
    let records = declared(&outbox);
    let of = |reason: &str| {
        let found = records.iter().filter(|r| r.reason == reason).map(|r| (r.readings, (r.from, r.to)));
        found.collect::<Vec<_>>()
    };
    let true_hour = set(62).hour().as_micros();
    let true_hour = (Some(true_hour), Some(true_hour + HOUR_MICROS));
    assert_eq!(of("polled"), [(2, hour), (1, true_hour)]);
    assert_eq!(of("sealed"), [(2, hour), (1, true_hour)]);
    outbox.close(set(80)).unwrap();
    drop(outbox);
    // The same bytes after a restart, and whatever becomes of the clock.
    in_boot(dir, A, Some(OFFSET + 86_400_000_000));
    assert_eq!(page(&open(dir, set(86_400)), Lane::Readings), sent);
}

#[test]
fn an_epoch_that_was_killed_before_the_clock_was_set_is_declared_in_true_time() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path();
    in_boot(dir, A, None);
    seal(&open(dir, up(60)), &[up(61), up(3_700)]);
    in_boot(dir, A, Some(OFFSET));
    let outbox = open(dir, set(3_720));
    let records = declared(&outbox);
    let interrupted = records.iter().find(|r| r.record == "interruption").unwrap();
    assert_eq!(
        (interrupted.from, interrupted.to),
        (Some(set(3_700).as_micros()), Some(set(3_720).as_micros()))
    );
    let hours: Vec<_> = records.iter().filter(|r| r.reason == "polled").map(|r| r.from).collect();
    assert_eq!(hours, [Some(OFFSET), Some(OFFSET + HOUR_MICROS)]);
}

#[test]
fn a_start_of_the_machine_before_its_clock_was_set_lets_the_messages_go_as_they_are() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path();
    in_boot(dir, A, None);
    seal(&open(dir, up(600)), &[up(601)]);
    in_boot(dir, B, None);
    let outbox = open(dir, up(30));
    seal(&outbox, &[up(31), up(32)]);
    let sent = page(&outbox, Lane::Readings);
    assert_eq!(sent.len(), 1, "those of this start wait");
    assert_eq!(sent[0].identity.clock, ClockState::Unsynced { boot: A });
    assert_eq!(times(&sent[0]), [up(601)]);
    drop(outbox);

    // Killed too, then set: B's messages get their times, nothing is dropped for its age, and hours that nobody
    // can know are not stated.
    in_boot(dir, B, Some(OFFSET));
    let outbox = open(dir, set(100));
    outbox.upkeep(set(100)).unwrap();
    let all = page(&outbox, Lane::Readings);
    assert_eq!(all.iter().map(times).collect::<Vec<_>>(), [vec![up(601)], vec![set(31), set(32)]]);
    assert_eq!(all[0], sent[0]);
    let polled = declared(&outbox).into_iter().filter(|r| r.reason == "polled").map(|r| (r.readings, r.from));
    assert_eq!(polled.collect::<Vec<_>>(), [(1, None), (2, Some(OFFSET))]);
}

#[test]
fn what_has_waited_long_enough_goes_as_unsynced_for_ever() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path();
    in_boot(dir, A, None);
    let outbox = open(dir, up(60));
    seal(&outbox, &[up(61)]);
    drop(outbox);
    let mut boots = Boots::load(dir).unwrap();
    boots.give_up();
    boots.store(dir).unwrap();
    let outbox = open(dir, up(86_400));
    seal(&outbox, &[up(86_401)]);
    let sent = page(&outbox, Lane::Readings);
    assert_eq!(sent.iter().map(times).collect::<Vec<_>>(), [[up(61)], [up(86_401)]]);
    drop(outbox);
    in_boot(dir, A, Some(OFFSET));
    assert_eq!(page(&open(dir, set(90_000)), Lane::Readings), sent);
}

#[test]
fn a_fate_is_for_ever() {
    let [first, second, third] = [1, 2, 3].map(Uuid::from_u128);
    let mut boots = Boots::default();
    boots.run_in(first, None);
    assert!(boots.waits(first));
    // Another start of the machine: the first is never known.
    boots.run_in(second, None);
    assert!(!boots.waits(first) && boots.waits(second));
    assert_eq!(boots.offset_of(first), None);
    boots.run_in(second, Some(7));
    // A step of the clock later on changes the present, not what was sent.
    boots.run_in(second, Some(9));
    assert_eq!((boots.offset, boots.offset_of(second)), (Some(9), Some(7)));
    // Given up, then set.
    boots.run_in(third, None);
    boots.give_up();
    boots.run_in(third, Some(5));
    assert_eq!((boots.offset_of(third), boots.waits(third)), (None, false));

    let dir = tempfile::tempdir().unwrap();
    assert_eq!(Boots::load(dir.path()).unwrap(), Boots::default());
    fs::write(dir.path().join("clock.json"), b"{\"v\":1").unwrap();
    assert_eq!(Boots::load(dir.path()).unwrap(), Boots::default());
    boots.store(dir.path()).unwrap();
    assert_eq!(Boots::load(dir.path()).unwrap(), boots);
    assert!(!boots.keep(&BTreeSet::from([second])));
    assert!(boots.keep(&BTreeSet::new()));
    assert_eq!(boots.offset_of(second), None);
}
