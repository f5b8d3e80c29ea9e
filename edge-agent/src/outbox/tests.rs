use std::collections::BTreeMap;
use std::sync::Arc as StdArc;

use arrow::{
    array::{
        Array, ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch, StringArray,
        StringDictionaryBuilder, TimestampMicrosecondArray as Times, UInt8Array,
    },
    compute::cast,
    datatypes::{DataType, Int32Type, Int64Type, TimestampMicrosecondType},
};
use common::{
    time::HOUR_MICROS,
    wire::{decode, schema},
};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::census::{Census, Outcome};

mod child;
mod disk;
mod faults;
mod model;
mod scale;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_micros(1_700_000_000_000_000 / HOUR_MICROS * HOUR_MICROS + seconds * 1_000_000)
}

fn limits() -> Limits {
    Limits {
        max_bytes: 1 << 30,
        max_age: Duration::from_secs(30 * 86_400),
        min_free_disk: 0,
        generation_bytes: 1 << 20,
        max_message_bytes: 128 * 1024,
        census_every: Duration::from_secs(3600),
    }
}

/// In memory where that is to be had: most tests do not ask whether the disk syncs.
fn quick_dir() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap()
}

/// A copy as a backup would make it; the lock and the reserve are not the outbox's content.
fn copy_dir(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir_all(&target).unwrap();
            copy_dir(&entry.path(), &target);
        } else if entry.file_name() != "lock" && entry.file_name() != "reserve" {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A batch of the readings lane, one row a second from `from` on; every value is different, so it is incompressible.
fn rows(from: i64, n: usize) -> RecordBatch {
    let times: Times = (0..n).map(|i| Some(at(from + i as i64).as_micros())).collect();
    let mut noise = from.unsigned_abs().wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Float64Array = (0..n)
        .map(|_| {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            Some(noise as f64)
        })
        .collect();
    let word = |text: &str| -> ArrayRef {
        let mut builder = StringDictionaryBuilder::<Int32Type>::new();
        (0..n).for_each(|_| builder.append_value(text));
        StdArc::new(builder.finish())
    };
    let quality: UInt8Array = (0..n).map(|_| Some(0)).collect();
    let columns: Vec<ArrayRef> = vec![
        StdArc::new(times.with_timezone("UTC")),
        word("pump-01/temp"),
        word("temperature"),
        word("pump-01"),
        word("Cel"),
        word("gauge"),
        StdArc::new(values),
        StdArc::new(quality),
    ];
    RecordBatch::try_new(schema(Lane::Readings), columns).unwrap()
}

/// A batch with the columns of any lane, one row a second from `from` on.
fn rows_of_lane(lane: Lane, from: i64, n: usize) -> RecordBatch {
    let schema = schema(lane);
    let column = |field: &arrow::datatypes::FieldRef| -> ArrayRef {
        let numbers = |of: &dyn Fn(i64) -> i64| -> ArrayRef {
            StdArc::new((0..n as i64).map(of).collect::<Int64Array>())
        };
        let values: ArrayRef = match field.data_type() {
            DataType::Utf8 | DataType::Dictionary(..) => StdArc::new(StringArray::from(vec!["x"; n])),
            DataType::Timestamp(..) => numbers(&|i| at(from + i).as_micros()),
            _ => numbers(&|i| i % 2),
        };
        cast(&values, field.data_type()).unwrap()
    };
    RecordBatch::try_new(StdArc::clone(&schema), schema.fields().iter().map(column).collect()).unwrap()
}

fn draft(lane: Lane, from: i64, n: usize) -> Draft {
    let mut census = Census::default();
    if lane == Lane::Readings {
        (0..n).for_each(|i| census.add(at(from + i as i64), Outcome::Polled, 1));
    }
    let batch = if lane == Lane::Readings { rows(from, n) } else { rows_of_lane(lane, from, n) };
    Draft { lane, batch, last_event: at(from + n as i64), census }
}

fn held(outbox: &Outbox, lane: Lane) -> Vec<Message> {
    let mut all: Vec<Message> = Vec::new();
    loop {
        let from = all.last().map_or(0, |m| m.index + 1);
        let page = outbox.page(lane, from, 7, 1 << 20, at(0)).unwrap();
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

/// A row of the control lane: record, epoch, lane, first_seq, last_seq, readings, reason, from.
type Row = (String, Uuid, Option<String>, Option<i64>, Option<i64>, i64, Option<String>, Option<Timestamp>);

fn control_rows(outbox: &Outbox) -> Vec<Row> {
    control_messages(outbox).flat_map(|(_, _, rows)| rows).collect()
}

/// The messages of the control lane that are held: epoch, seq and rows.
fn control_messages(outbox: &Outbox) -> impl Iterator<Item = (Uuid, u64, Vec<Row>)> {
    held(outbox, Lane::Control).into_iter().map(|m| (m.identity.epoch, m.identity.seq, rows_of(&m)))
}

fn rows_of(message: &Message) -> Vec<Row> {
    let batch = decode(Lane::Control, &message.payload).unwrap();
    let word = |column: usize, row: usize| -> Option<String> {
        let dictionary = batch.column(column).as_dictionary::<Int32Type>();
        let key = dictionary.key(row)?;
        Some(dictionary.values().as_string::<i32>().value(key).to_owned())
    };
    let number = |column: usize, row: usize| {
        let column = batch.column(column).as_primitive::<Int64Type>();
        column.is_valid(row).then(|| column.value(row))
    };
    let instant = |column: usize, row: usize| {
        let column = batch.column(column).as_primitive::<TimestampMicrosecondType>();
        column.is_valid(row).then(|| Timestamp::from_micros(column.value(row)))
    };
    let text = |column: usize, row: usize| {
        let column: &StringArray = batch.column(column).as_string::<i32>();
        column.is_valid(row).then(|| column.value(row).to_owned())
    };
    let row = |row: usize| {
        (
            word(0, row).unwrap(),
            text(2, row).unwrap().parse().unwrap(),
            word(3, row),
            number(4, row),
            number(5, row),
            number(6, row).unwrap(),
            text(9, row),
            instant(7, row),
        )
    };
    (0..batch.num_rows()).map(row).collect()
}

fn counted(rows: &[Row], outcome: &str) -> i64 {
    rows.iter().filter(|r| r.0 == "census" && r.6.as_deref() == Some(outcome)).map(|r| r.5).sum()
}

#[test]
fn what_is_appended_is_there_after_a_kill() {
    let dir = TempDir::new().unwrap();
    let outbox = Outbox::open(dir.path(), limits(), at(0)).unwrap();
    let first = outbox.epoch();
    let mut with_held = draft(Lane::Readings, 3590, 20);
    with_held.census.add(at(3599), Outcome::Polled, 5);
    with_held.census.add(at(3599), Outcome::Held, 5);
    with_held.census.add(at(3599), Outcome::Sealed, 99);
    let drafts = vec![with_held, draft(Lane::Aggregates, 3540, 1)];
    outbox.append(at(3610), drafts, &[("filter", b"one".to_vec())]).unwrap();
    outbox.append(at(3620), vec![draft(Lane::Readings, 3610, 10)], &[("filter", b"two".to_vec())]).unwrap();
    let before = held(&outbox, Lane::Readings);
    drop(outbox);

    let outbox = Outbox::open(dir.path(), limits(), at(5000)).unwrap();
    assert_ne!(outbox.epoch(), first);
    assert_eq!(outbox.last_event_time(), Some(at(3620)));
    assert_eq!(outbox.get_meta("filter").unwrap().as_deref(), Some(&b"two"[..]));
    let after = held(&outbox, Lane::Readings);
    assert_eq!(after, before);
    let names: Vec<_> =
        after.iter().map(|m| (m.identity.epoch, m.identity.seq, m.identity.rows_before)).collect();
    assert_eq!(names, [(first, 0, 0), (first, 1, 20)]);

    let rows = control_rows(&outbox);
    let lane = |lane: &str| Some(lane.to_owned());
    let closing: Vec<_> =
        rows.iter().filter(|r| r.0 == "closing").map(|r| (r.1, r.2.clone(), r.4, r.5)).collect();
    assert_eq!(
        closing,
        [
            (first, lane("control"), None, 0),
            (first, lane("anomalies"), None, 0),
            (first, lane("aggregates"), Some(0), 1),
            (first, lane("readings"), Some(1), 30)
        ]
    );
    assert_eq!(rows.iter().filter(|r| r.0 == "interruption" && r.1 == first).count(), 1);
    assert!(rows.iter().filter(|r| r.0 == "census").all(|r| r.1 == first));
    assert_eq!((counted(&rows, "polled"), counted(&rows, "sealed"), counted(&rows, "held")), (35, 30, 5));
}

/// Copies a folder with all that is in it.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_kill_between_two_lanes_makes_sources_go_on_before_what_was_not_written() {
    let dir = TempDir::new().unwrap();
    let outbox = Outbox::open(dir.path(), limits(), at(0)).unwrap();
    outbox.append(at(10), vec![draft(Lane::Readings, 0, 10)], &[]).unwrap();
    drop(outbox);
    let (readings, before) = (dir.path().join("readings"), TempDir::new().unwrap());
    copy(&readings, before.path());
    let outbox = Outbox::open(dir.path(), limits(), at(11)).unwrap();
    let drafts = vec![draft(Lane::Readings, 10, 10), draft(Lane::Aggregates, 10, 1)];
    outbox.append(at(20), drafts, &[]).unwrap();
    drop(outbox);
    // The aggregates were written first, and the readings no more.
    std::fs::remove_dir_all(&readings).unwrap();
    copy(before.path(), &readings);

    let outbox = Outbox::open(dir.path(), limits(), at(30)).unwrap();
    assert_eq!(held(&outbox, Lane::Aggregates).len(), 1);
    assert_eq!(held(&outbox, Lane::Readings).len(), 1);
    assert_eq!(outbox.last_event_time(), Some(at(10)));
}

#[test]
fn a_kill_between_two_generations_keeps_what_the_caller_kept() {
    let dir = TempDir::new().unwrap();
    let outbox = Outbox::open(dir.path(), limits(), at(0)).unwrap();
    outbox.append(at(10), vec![draft(Lane::Readings, 0, 10)], &[("episodes", b"one".to_vec())]).unwrap();
    outbox.upkeep(at(11)).unwrap();
    drop(outbox);
    // The last thing that a roll had done.
    let manifest = dir.path().join("readings/00000001/manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("\"closed\":false", "\"closed\":true")).unwrap();

    let outbox = Outbox::open(dir.path(), limits(), at(30)).unwrap();
    assert!(dir.path().join("readings/00000002").exists());
    assert_eq!(outbox.get_meta("episodes").unwrap().as_deref(), Some(&b"one"[..]));
    assert_eq!(held(&outbox, Lane::Readings).len(), 1);
}

#[test]
fn a_clean_stop_says_so_once() {
    let dir = TempDir::new().unwrap();
    let outbox = Outbox::open(dir.path(), limits(), at(0)).unwrap();
    outbox.append(at(1), vec![draft(Lane::Readings, 0, 3)], &[]).unwrap();
    outbox.close(at(2)).unwrap();
    assert!(matches!(outbox.append(at(3), vec![draft(Lane::Readings, 9, 3)], &[]), Err(OutboxError::Closed)));
    let last = held(&outbox, Lane::Control).pop().unwrap();
    let rows = control_rows(&outbox);
    let control = rows.iter().find(|r| r.0 == "closing" && r.2.as_deref() == Some("control")).unwrap();
    let id = &last.identity;
    assert_eq!((control.4, control.5), (Some(id.seq as i64), (id.rows_before + id.rows) as i64));
    drop(outbox);
    let again = Outbox::open(dir.path(), limits(), at(9)).unwrap();
    assert_eq!(control_rows(&again), rows, "nothing is declared twice");
}

#[test]
fn counts_are_declared_once_though_the_lane_forgets_that_they_were() {
    let dir = TempDir::new().unwrap();
    let often = Limits { census_every: Duration::ZERO, ..limits() };
    let outbox = Outbox::open(dir.path(), often.clone(), at(0)).unwrap();
    // Each append declares; the lane learns of it only with its next write, which never comes for the last one.
    for i in 0..5 {
        outbox.append(at(i * 10), vec![draft(Lane::Readings, i * 10, 4)], &[]).unwrap();
    }
    drop(outbox);
    let outbox = Outbox::open(dir.path(), often, at(90)).unwrap();
    let rows = control_rows(&outbox);
    assert_eq!((counted(&rows, "polled"), counted(&rows, "sealed")), (20, 20));
}

#[test]
fn disk_is_given_back() {
    let dir = TempDir::new().unwrap();
    let small = Limits { generation_bytes: 64 * 1024, ..limits() };
    let outbox = Outbox::open(dir.path(), small, at(0)).unwrap();
    for i in 0..60 {
        outbox.append(at(i), vec![draft(Lane::Readings, i * 1000, 1000)], &[]).unwrap();
    }
    let folders = || std::fs::read_dir(dir.path().join("readings")).unwrap().count();
    assert!(folders() > 5, "{}", folders());
    assert_eq!(held(&outbox, Lane::Readings).len(), 60);
    outbox.forget(Lane::Readings, 0..60).unwrap();
    assert_eq!(folders(), 1);
    let view = &outbox.lanes()[Lane::Readings as usize];
    assert_eq!((view.messages, view.epochs[0].oldest, view.epochs[0].head), (0, 60, 60));
    assert!(view.bytes < 2 << 20, "{}", view.bytes);
}

#[test]
fn when_full_the_oldest_readings_give_way_and_are_declared() {
    let dir = TempDir::new().unwrap();
    let tight = Limits { generation_bytes: 64 * 1024, max_bytes: 1 << 20, ..limits() };
    let outbox = Outbox::open(dir.path(), tight, at(0)).unwrap();
    outbox.append(at(0), vec![draft(Lane::Anomalies, 0, 3)], &[]).unwrap();
    for i in 0..400 {
        outbox.append(at(i), vec![draft(Lane::Readings, i * 1000, 1000)], &[]).unwrap();
    }
    outbox.close(at(500)).unwrap();
    let left = held(&outbox, Lane::Readings);
    assert!(!left.is_empty() && left.len() < 400);
    assert_eq!(left.last().unwrap().index, 399, "the newest stay");
    assert_eq!(held(&outbox, Lane::Anomalies).len(), 1, "other lanes give way later");
    let rows = control_rows(&outbox);
    let gaps: Vec<_> = rows.iter().filter(|r| r.0 == "gap").collect();
    assert!(gaps.iter().all(|g| g.6.as_deref() == Some("full") && g.2.as_deref() == Some("readings")));
    let declared: i64 = gaps.iter().map(|g| g.5).sum();
    assert_eq!(declared + left.iter().map(|m| m.identity.rows as i64).sum::<i64>(), 400_000);
    // Without holes and without overlap, up to the first message that is left.
    let mut next = 0;
    for gap in &gaps {
        assert_eq!(gap.3, Some(next));
        next = gap.4.unwrap() + 1;
    }
    assert_eq!(next as u64, left[0].identity.seq);
    assert_eq!(counted(&rows, "sealed"), 400_000);
}

#[test]
fn old_generations_give_way() {
    let dir = TempDir::new().unwrap();
    let short = Limits { generation_bytes: 1, max_age: Duration::from_secs(100), ..limits() };
    let outbox = Outbox::open(dir.path(), short, at(0)).unwrap();
    for i in 0..4 {
        outbox.append(at(i * 60), vec![draft(Lane::Readings, i * 60, 5)], &[]).unwrap();
    }
    assert_eq!(held(&outbox, Lane::Readings).len(), 2, "those sealed before 80 s went");
    let rows = control_rows(&outbox);
    assert!(rows.iter().any(|r| r.0 == "gap" && r.6.as_deref() == Some("age")));
}

/// Overwrites the middle of a generation's log.
fn damage(dir: &Path, lane: Lane, number: u64) {
    let path = dir.join(lane.as_str()).join(format!("{number:08}")).join("db");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 8..bytes.len() * 7 / 8;
    bytes[middle].fill(0xa5);
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn a_damaged_generation_is_set_aside_and_declared() {
    for damaged_is_last in [false, true] {
        let dir = TempDir::new().unwrap();
        let small = Limits { generation_bytes: 64 * 1024, ..limits() };
        let outbox = Outbox::open(dir.path(), small.clone(), at(0)).unwrap();
        let first = outbox.epoch();
        for i in 0..20 {
            outbox.append(at(i), vec![draft(Lane::Readings, i * 1000, 1000)], &[]).unwrap();
        }
        outbox.forget(Lane::Readings, 0..1).unwrap();
        outbox.close(at(30)).unwrap();
        drop(outbox);
        let lane_dir = dir.path().join("readings");
        let mut numbers: Vec<u64> = std::fs::read_dir(&lane_dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        numbers.sort_unstable();
        let number = if damaged_is_last { numbers[numbers.len() - 1] } else { numbers[0] };
        damage(dir.path(), Lane::Readings, number);

        let outbox = Outbox::open(dir.path(), small, at(60)).unwrap();
        outbox.append(at(61), vec![draft(Lane::Readings, 50_000, 10)], &[]).unwrap();
        let left = held(&outbox, Lane::Readings);
        assert_eq!((left.last().unwrap().identity.seq, left.last().unwrap().identity.rows), (0, 10));
        let rows = control_rows(&outbox);
        let gaps: Vec<_> = rows.iter().filter(|r| r.0 == "gap").collect();
        assert!(!gaps.is_empty(), "last: {damaged_is_last}");
        assert!(gaps.iter().all(|g| g.1 == first && g.6.as_deref() == Some("corrupt")));
        let declared: i64 = gaps.iter().map(|g| g.5).sum();
        let there: u64 = left.iter().filter(|m| m.identity.epoch == first).map(|m| m.identity.rows).sum();
        assert_eq!(declared as u64 + there, 19_000, "all but the one that was acknowledged");
        assert_eq!(std::fs::read_dir(dir.path().join("quarantine")).unwrap().count(), 1);
    }
}

#[test]
fn acknowledgements_are_matched_with_what_was_sealed() {
    let dir = TempDir::new().unwrap();
    let outbox = Outbox::open(dir.path(), limits(), at(0)).unwrap();
    let first = outbox.epoch();
    (0..3).for_each(|i| outbox.append(at(i), vec![draft(Lane::Readings, i, 2)], &[]).unwrap());
    drop(outbox);
    let outbox = Outbox::open(dir.path(), limits(), at(9)).unwrap();
    let second = outbox.epoch();
    (0..2).for_each(|i| outbox.append(at(i), vec![draft(Lane::Readings, i, 2)], &[]).unwrap());
    let lane = Lane::Readings;
    for (epoch, from, to, expected, unknown) in [
        (first, 0, 1, Some(0..2), 0),
        (first, 2, 7, Some(2..3), 1),
        (first, 3, 9, None, 1),
        (second, 0, 0, Some(3..4), 0),
        (second, 0, u64::MAX, Some(3..5), 1),
        (second, 1, 0, None, 0),
        (Uuid::nil(), 0, 3, None, 1),
    ] {
        let located = outbox.locate(&[AckRange { epoch, lane, from, to }]);
        assert_eq!(
            located.ranges,
            expected.map(|r| (lane, r)).into_iter().collect::<Vec<_>>(),
            "{from}..={to}"
        );
        assert_eq!(located.unknown, unknown, "{from}..={to}");
    }
}

#[test]
fn a_batch_that_is_too_long_becomes_several_messages() {
    let dir = TempDir::new().unwrap();
    let outbox = Outbox::open(dir.path(), Limits { max_message_bytes: 8192, ..limits() }, at(0)).unwrap();
    outbox.append(at(0), vec![draft(Lane::Readings, 0, 4000)], &[]).unwrap();
    let messages = held(&outbox, Lane::Readings);
    assert!(messages.len() > 2 && messages.iter().all(|m| m.payload.len() <= 8192));
    let mut before = 0;
    for m in &messages {
        assert_eq!(
            (m.identity.rows_before, decode(Lane::Readings, &m.payload).unwrap().num_rows() as u64),
            (before, m.identity.rows)
        );
        before += m.identity.rows;
    }
    assert_eq!(before, 4000);
}
