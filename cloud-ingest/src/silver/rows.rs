//! The rows of each table.
//!
//! What a sender, a message or a partition says is laid out by runs, all the way into the data files; instants and values
//! are the candidates' own, where nothing lies between them.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    ops::Range,
    sync::Arc,
};

use arrow::{
    array::{
        ArrayRef, BooleanArray, DictionaryArray, Float64Array, Int32Array, Int64Array, RecordBatch, RunArray,
        StringArray, TimestampMicrosecondArray,
    },
    buffer::ScalarBuffer,
    datatypes::{ArrowNativeType, Int32Type, Schema, SchemaRef},
};
use common::time::Timestamp;

use super::{
    Counts,
    candidates::{Candidates, Slot, extend, quality_word},
    messages::{Delivered, NAMELESS, Places},
    newest,
    soft::Soft,
};
use crate::{
    decode::MaintenanceRecord,
    lake::{Table, year_month},
    quality::Reject,
};

/// Rows in one batch of `sensor_readings`.
const BATCH: usize = 64 * 1024;
/// Microseconds in a day.
const DAY: i64 = 86_400_000_000;

/// A row of `silver/quarantine`.
#[derive(Debug)]
pub(super) struct Quarantined {
    /// Index of its message in the plan.
    pub(super) message: usize,
    /// Of the reading in its message; `None` when the message as a whole failed.
    pub(super) row: Option<i64>,
    pub(super) readings: i64,
    pub(super) device_id: Option<String>,
    pub(super) device_type: Option<String>,
    pub(super) ts: Option<String>,
    pub(super) value: Option<String>,
    pub(super) unit: Option<String>,
    pub(super) reject: Reject,
}

impl Quarantined {
    /// A message as a whole.
    pub(super) fn message(message: usize, readings: i64, reject: Reject) -> Self {
        Self {
            message,
            row: None,
            readings,
            device_id: None,
            device_type: None,
            ts: None,
            value: None,
            unit: None,
            reject,
        }
    }
}

/// What a message says in every row, as indices of words; negative for null.
struct Said {
    gateway: i32,
    epoch: i32,
    segment: i32,
    received_at: i32,
    seq: i32,
}

/// Rows that follow one another, of one sender's words and one message.
struct Run<'a> {
    slot: &'a Slot,
    said: &'a Said,
    rows: usize,
}

/// The runs of rows; a device's readings lie together, and it sends several in a message.
fn runs<'a>(candidates: &'a Candidates, rows: &[Range<usize>], said: &'a [Said]) -> Vec<Run<'a>> {
    let Candidates { slot, message, slots, .. } = candidates;
    let mut runs = Vec::new();
    for rows in rows {
        let mut at = rows.start;
        while at < rows.end {
            let same = |i: &usize| (slot[*i], message[*i]) == (slot[at], message[at]);
            let rows = (at + 1..rows.end).take_while(same).count() + 1;
            let (slot, said) = (&slots[slot[at] as usize], &said[message[at] as usize]);
            runs.push(Run { slot, said, rows });
            at += rows;
        }
    }
    runs
}

/// A column of which of the words so many rows after one another say, a negative one being null.
fn by_runs(words: &ArrayRef, said: impl IntoIterator<Item = (i32, usize)>) -> anyhow::Result<ArrayRef> {
    let (mut keys, mut ends) = (Vec::<i32>::new(), Vec::<i32>::new());
    let mut end = 0;
    for (key, rows) in said {
        end += i32::try_from(rows)?;
        match ends.last_mut().filter(|_| keys.last() == Some(&key)) {
            Some(last) => *last = end,
            None => {
                keys.push(key);
                ends.push(end);
            }
        }
    }
    let keys: Int32Array = match keys.iter().all(|key| *key >= 0) {
        true => keys.into(),
        false => keys.into_iter().map(|key| Some(key).filter(|key| *key >= 0)).collect(),
    };
    let words = DictionaryArray::<Int32Type>::try_new(keys, Arc::clone(words))?;
    Ok(Arc::new(RunArray::<Int32Type>::try_new(&ends.into(), &words)?))
}

/// The rows of `silver/sensor_readings`: a batch is of one partition, and ordered by device and time.
pub(super) fn sensor_readings(
    mut candidates: Candidates,
    stored: &[Range<usize>],
    delivered: &[Delivered],
    places: &Places,
) -> anyhow::Result<Vec<RecordBatch>> {
    let mut words = std::mem::take(&mut candidates.words);
    let qualities = [0u8, 1, 2].map(|code| words.intern(quality_word(code)));
    let segments: Vec<i32> = places.segments.iter().map(|path| words.intern(path)).collect();
    let said = |(d, at): (&Delivered, i32)| Said {
        gateway: words.intern(d.gateway()),
        epoch: d.name().map_or(-1, |n| words.intern(&n.epoch)),
        segment: segments[d.segment],
        received_at: at,
        seq: d.name().map_or(-1, |_| at),
    };
    let said: Vec<Said> = delivered.iter().zip(0..).map(said).collect();
    let words: ArrayRef = Arc::new(StringArray::from(words.list));
    let received_at: ArrayRef = Arc::new(instants(delivered.iter().map(|d| d.received_at)));
    let seq = delivered.iter().map(|d| d.name().map_or(0, |n| n.seq));
    let seq: ArrayRef = Arc::new(Int64Array::from_iter_values(seq));
    let parts = partitions(&candidates, stored);
    let ts = ScalarBuffer::from(std::mem::take(&mut candidates.ts));
    let value = ScalarBuffer::from(std::mem::take(&mut candidates.value));
    let (mut batches, mut schema) = (Vec::new(), None);
    for ((device_type, year, month), rows) in parts {
        let [year, month]: [ArrayRef; 2] = [year, month].map(|n| Arc::new(Int64Array::from(vec![n])) as _);
        for rows in cut(&rows, BATCH) {
            let n = count(&rows);
            let runs = runs(&candidates, &rows, &said);
            let column = |words: &ArrayRef, key: &dyn Fn(&Run<'_>) -> i32| {
                by_runs(words, runs.iter().map(|run| (key(run), run.rows)))
            };
            let word = |key: &dyn Fn(&Run<'_>) -> i32| column(&words, key);
            let ts = TimestampMicrosecondArray::new(taken(&ts, &rows), None);
            let value = taken(&value, &rows);
            let valid = value.iter().any(|v| v.is_nan()).then(|| value.iter().map(|v| !v.is_nan()).collect());
            let same = rows.iter().flat_map(|rows| candidates.quality[rows.clone()].chunk_by(u8::eq));
            let quality = same.map(|same| (qualities[usize::from(same[0].min(2))], same.len()));
            let columns: Vec<ArrayRef> = vec![
                Arc::new(ts.with_timezone("UTC")),
                word(&|run| run.slot.device_id)?,
                word(&|_| device_type)?,
                word(&|run| run.slot.asset_id)?,
                word(&|run| run.slot.site)?,
                word(&|run| run.said.gateway)?,
                Arc::new(Float64Array::new(value, valid)),
                word(&|run| run.slot.unit)?,
                word(&|run| run.slot.kind)?,
                by_runs(&words, quality)?,
                column(&received_at, &|run| run.said.received_at)?,
                word(&|run| run.said.epoch)?,
                column(&seq, &|run| run.said.seq)?,
                word(&|run| run.said.segment)?,
                by_runs(&year, [(0, n)])?,
                by_runs(&month, [(0, n)])?,
            ];
            let schema = schema.get_or_insert_with(|| laid_out(&Table::SensorReadings.schema(), &columns));
            batches.push(RecordBatch::try_new(Arc::clone(schema), columns)?);
        }
    }
    Ok(batches)
}

/// The same columns as they are laid out.
fn laid_out(schema: &Schema, columns: &[ArrayRef]) -> SchemaRef {
    let fields = schema.fields().iter().zip(columns);
    let fields =
        fields.map(|(field, column)| field.as_ref().clone().with_data_type(column.data_type().clone()));
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

/// Word of the device type, year, month.
type Partition = (i32, i64, i64);

/// Rows by partition, in the order in which they begin. The calendar is asked once a day of a device.
fn partitions(candidates: &Candidates, stored: &[Range<usize>]) -> Vec<(Partition, Vec<Range<usize>>)> {
    let Candidates { ts, slot, slots, .. } = candidates;
    let mut parts: Vec<(Partition, Vec<Range<usize>>)> = Vec::new();
    for rows in stored {
        let mut at = rows.start;
        while at < rows.end {
            let day = ts[at].div_euclid(DAY) * DAY;
            let same = |i: &usize| slot[*i] == slot[at] && (day..day + DAY).contains(&ts[*i]);
            let end = at + 1 + (at + 1..rows.end).take_while(same).count();
            let (year, month) = year_month(Timestamp::from_micros(day));
            let key = (slots[slot[at] as usize].device_type, year, month);
            let part = parts.iter().position(|(known, _)| *known == key).unwrap_or_else(|| {
                parts.push((key, Vec::new()));
                parts.len() - 1
            });
            extend(&mut parts[part].1, at..end);
            at = end;
        }
    }
    parts
}

/// How many rows there are.
fn count(rows: &[Range<usize>]) -> usize {
    rows.iter().map(ExactSizeIterator::len).sum()
}

/// Rows in parts of so many.
fn cut(rows: &[Range<usize>], size: usize) -> Vec<Vec<Range<usize>>> {
    let mut parts: Vec<Vec<Range<usize>>> = Vec::new();
    let mut room = 0;
    for rows in rows {
        let mut rows = rows.clone();
        while !rows.is_empty() {
            if room == 0 {
                parts.push(Vec::new());
                room = size;
            }
            let end = rows.end.min(rows.start + room);
            room -= end - rows.start;
            parts.last_mut().expect("one was begun").push(rows.start..end);
            rows.start = end;
        }
    }
    parts
}

/// These rows of a column, as they lie there if they lie together.
fn taken<T: ArrowNativeType>(column: &ScalarBuffer<T>, rows: &[Range<usize>]) -> ScalarBuffer<T> {
    match rows {
        [rows] => column.slice(rows.start, rows.len()),
        rows => {
            let mut all = Vec::with_capacity(count(rows));
            rows.iter().for_each(|rows| all.extend_from_slice(&column[rows.clone()]));
            all.into()
        }
    }
}

pub(super) fn quarantine(
    quarantine: &[Quarantined],
    delivered: &[Delivered],
    places: &Places,
) -> anyhow::Result<Vec<RecordBatch>> {
    let from = |q: &Quarantined| &delivered[q.message];
    let texts = |of: &dyn Fn(&Quarantined) -> Option<String>| -> ArrayRef {
        Arc::new(StringArray::from_iter(quarantine.iter().map(of)))
    };
    let ints = |of: &dyn Fn(&Quarantined) -> Option<i64>| -> ArrayRef {
        Arc::new(Int64Array::from_iter(quarantine.iter().map(of)))
    };
    let columns: Vec<ArrayRef> = vec![
        Arc::new(instants(quarantine.iter().map(|q| from(q).received_at))),
        texts(&|q| Some(places.topic(from(q)).to_owned())),
        texts(&|q| from(q).sender.site.clone()),
        texts(&|q| from(q).sender.gateway.clone()),
        texts(&|q| q.device_id.clone()),
        texts(&|q| q.device_type.clone()),
        texts(&|q| q.ts.clone()),
        texts(&|q| q.value.clone()),
        texts(&|q| q.unit.clone()),
        texts(&|q| Some(q.reject.rule.to_owned())),
        texts(&|q| Some(q.reject.reason.clone())),
        texts(&|q| from(q).name().map(|n| n.epoch.clone())),
        texts(&|q| from(q).name().map(|n| n.lane.clone())),
        ints(&|q| from(q).name().map(|n| n.seq)),
        texts(&|q| Some(places.segments[from(q).segment].clone())),
        ints(&|q| Some(from(q).offset)),
        ints(&|q| q.row),
        ints(&|q| Some(q.readings)),
        Arc::new(TimestampMicrosecondArray::from(vec![None::<i64>; quarantine.len()]).with_timezone("UTC")),
    ];
    Ok(vec![RecordBatch::try_new(Table::Quarantine.schema(), columns)?])
}

/// The rows of `silver/messages`: one for each message that has a name, and one for all that a gateway has sent without
/// names in a segment, sealed when the first of them came and received when the last did.
pub(super) fn messages(
    plan: i64,
    delivered: &[Delivered],
    places: &Places,
) -> anyhow::Result<Vec<RecordBatch>> {
    let mut rows: Vec<(&Delivered, [i64; 5], Timestamp)> = Vec::new();
    let mut nameless = HashMap::new();
    for d in delivered.iter().filter(|d| d.recorded) {
        let mut counts = [d.rows, d.readings, d.stored, d.duplicates, d.quarantined];
        if d.named.is_none() {
            // Nobody said how many there are.
            counts[0] = d.readings;
            match nameless.entry((d.segment, d.site(), d.gateway())) {
                Entry::Occupied(first) => {
                    let (_, sums, last): &mut (_, [i64; 5], _) = &mut rows[*first.get()];
                    *last = d.received_at.max(*last);
                    sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
                    continue;
                }
                Entry::Vacant(first) => first.insert(rows.len()),
            };
        }
        rows.push((d, counts, d.received_at));
    }
    let texts = |of: &dyn for<'a> Fn(&'a Delivered) -> &'a str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(|(d, ..)| of(d))))
    };
    let ints = |of: &dyn Fn(&Delivered) -> i64| -> ArrayRef {
        Arc::new(Int64Array::from_iter_values(rows.iter().map(|(d, ..)| of(d))))
    };
    let counts = |which: usize| -> ArrayRef {
        Arc::new(Int64Array::from_iter_values(rows.iter().map(|(_, counts, _)| counts[which])))
    };
    let columns: Vec<ArrayRef> = vec![
        texts(&Delivered::site),
        texts(&Delivered::gateway),
        texts(&|d| d.name().map_or("", |n| &n.epoch)),
        texts(&|d| d.name().map_or(NAMELESS, |n| &n.lane)),
        ints(&|d| d.name().map_or(d.offset, |n| n.seq)),
        counts(0),
        ints(&|d| d.named.as_ref().map_or(0, |n| n.rows_before)),
        ints(&|d| d.named.as_ref().map_or(0, |n| n.oldest)),
        Arc::new(instants(rows.iter().map(|(d, ..)| d.sealed_at()))),
        texts(&|d| d.clock()),
        texts(&|d| d.named.as_ref().map_or("", |n| &n.hash)),
        counts(1),
        counts(2),
        counts(3),
        counts(4),
        Arc::new(BooleanArray::from_iter(rows.iter().map(|(d, ..)| Some(d.redelivered)))),
        Arc::new(instants(rows.iter().map(|(.., last)| *last))),
        Arc::new(StringArray::from_iter_values(rows.iter().map(|(d, ..)| &places.segments[d.segment]))),
        ints(&|_| plan),
    ];
    Ok(vec![RecordBatch::try_new(Table::Messages.schema(), columns)?])
}

pub(super) fn maintenance(
    records: &[(MaintenanceRecord, usize)],
    delivered: &[Delivered],
    places: &Places,
) -> anyhow::Result<Vec<RecordBatch>> {
    let texts = |of: &dyn Fn(&MaintenanceRecord) -> Option<String>| -> ArrayRef {
        Arc::new(StringArray::from_iter(records.iter().map(|(record, _)| of(record))))
    };
    let segments = records.iter().map(|(_, at)| places.segments[delivered[*at].segment].as_str());
    let columns: Vec<ArrayRef> = vec![
        texts(&|r| Some(r.id.clone())),
        texts(&|r| Some(r.site.clone())),
        texts(&|r| Some(r.asset_id.clone())),
        Arc::new(instants(records.iter().map(|(record, _)| record.done_at))),
        texts(&|r| r.action.clone()),
        texts(&|r| r.note.clone()),
        Arc::new(instants(records.iter().map(|(_, at)| delivered[*at].received_at))),
        Arc::new(StringArray::from_iter_values(segments)),
    ];
    Ok(vec![RecordBatch::try_new(Table::Maintenance.schema(), columns)?])
}

/// One row for all hard rules together (`all`), one for each that something broke, and one for each soft rule that
/// something was judged by.
pub(super) fn quality_results(
    plan: i64,
    counts: Counts,
    quarantine: &[Quarantined],
    soft: &Soft,
    delivered: &[Delivered],
) -> anyhow::Result<Vec<RecordBatch>> {
    if delivered.is_empty() {
        return Ok(Vec::new());
    }
    let total = i64::try_from(counts.readings).unwrap_or(i64::MAX);
    let mut failed = BTreeMap::<&str, (i64, Option<String>)>::new();
    for q in quarantine {
        let entry = failed.entry(q.reject.rule).or_insert((0, None));
        entry.0 += q.readings;
        entry.1.get_or_insert_with(|| match &q.device_id {
            Some(device) => format!("{device}: {}", q.reject.reason),
            None => q.reject.reason.clone(),
        });
    }
    let all = i64::try_from(counts.quarantined).unwrap_or(i64::MAX);
    let hard = std::iter::once(("all", (all, None))).chain(failed);
    let mut rows: Vec<(&str, i64, i64, Option<String>)> =
        hard.map(|(rule, (failed, sample))| (rule, total - failed, failed, sample)).collect();
    rows.extend(soft.results());
    let n = rows.len();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from(vec![plan; n])),
        Arc::new(StringArray::from_iter_values(rows.iter().map(|(rule, ..)| rule))),
        Arc::new(Int64Array::from_iter_values(rows.iter().map(|(_, passed, ..)| *passed))),
        Arc::new(Int64Array::from_iter_values(rows.iter().map(|(.., failed, _)| *failed))),
        Arc::new(StringArray::from_iter(rows.iter().map(|(.., sample)| sample.clone()))),
        Arc::new(instants(std::iter::repeat_n(newest(delivered), n))),
    ];
    Ok(vec![RecordBatch::try_new(Table::QualityResults.schema(), columns)?])
}

/// A column of instants.
pub(super) fn instants(values: impl Iterator<Item = Timestamp>) -> TimestampMicrosecondArray {
    TimestampMicrosecondArray::from_iter_values(values.map(Timestamp::as_micros)).with_timezone("UTC")
}
