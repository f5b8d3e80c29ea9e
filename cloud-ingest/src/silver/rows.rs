//! Candidates for `sensor_readings`, how they are settled, and the rows of each table.
//!
//! Candidates are columns, 25 bytes each and no text: a reading points at its *slot* (device, type, unit,
//! kind, asset as this sender states them) and at its message, and words are interned once a plan. The
//! columns of text are dictionaries over those words, all the way into the data files.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use arrow::{
    array::{
        Array, ArrayRef, ArrowPrimitiveType, AsArray, BooleanArray, DictionaryArray, Float64Array,
        Int32Array, Int64Array, NullBufferBuilder, PrimitiveArray, RecordBatch, StringArray,
        TimestampMicrosecondArray, new_null_array,
    },
    datatypes::{Float64Type, Int32Type, Int64Type, TimestampMicrosecondType, UInt8Type},
};
use common::{reading::Quality, time::Timestamp, wire::dict};

use super::{
    Answers, Committed, Counts, Known, News, Question, TIME_SLACK,
    messages::{Delivered, Places},
    newest,
    soft::{Last, Soft},
};
use crate::{
    decode::{MaintenanceRecord, Sample},
    lake::{Table, with_dictionaries, year_month},
    quality::{Profile, Reject, Rules},
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

/// Words that stand for text; -1 for none.
#[derive(Clone, Debug, Default)]
struct Words {
    list: Vec<String>,
    index: HashMap<String, i32>,
}

impl Words {
    fn intern(&mut self, word: &str) -> i32 {
        if let Some(known) = self.index.get(word) {
            return *known;
        }
        let new = i32::try_from(self.list.len()).expect("fewer than 2^31 words in a plan");
        self.list.push(word.to_owned());
        self.index.insert(word.to_owned(), new);
        new
    }
}

/// A device as one sender states it.
#[derive(Debug)]
struct Slot {
    /// Index of (site, device id).
    device: u32,
    profile: Profile,
    device_id: i32,
    device_type: i32,
    asset_id: i32,
    site: i32,
    unit: i32,
    kind: i32,
}

/// The keys of a row's words in its message, and the slot that they lead to.
type Resolved = ([i32; 5], Result<u32, Reject>);

/// Readings that have passed the rules, in columns.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    words: Words,
    /// (site, device id) by index.
    devices: Vec<(String, String)>,
    device_index: HashMap<(String, String), u32>,
    /// The last committed reading of each device, where soft rules apply; without a value that is not known yet.
    last: Vec<Option<(i64, Option<f64>)>>,
    slots: Vec<Slot>,
    slot_index: HashMap<String, Result<u32, Reject>>,
    ts: Vec<i64>,
    /// NaN for none.
    value: Vec<f64>,
    quality: Vec<u8>,
    slot: Vec<u32>,
    message: Vec<u32>,
    row: Vec<u32>,
}

/// How a sender states a device.
#[derive(Clone, Copy)]
struct Stated<'a> {
    site: &'a str,
    device_id: &'a str,
    device_type: &'a str,
    asset_id: &'a str,
    unit: &'a str,
    kind: &'a str,
}

impl Candidates {
    /// Takes the readings of a message with the columns of the wire.
    pub(super) fn wire(
        &mut self,
        rules: &Rules,
        at: usize,
        message: &mut Delivered,
        batch: &RecordBatch,
        quarantine: &mut Vec<Quarantined>,
    ) {
        // `wire::decode` has checked the columns and their types.
        let ts = batch.column(0).as_primitive::<TimestampMicrosecondType>().values();
        let words: [&DictionaryArray<Int32Type>; 5] =
            [1, 2, 3, 4, 5].map(|i| batch.column(i).as_dictionary());
        let keys = words.map(|column| &column.keys().values()[..]);
        let word = |i: usize, row: usize| {
            let key = usize::try_from(keys[i][row]).unwrap_or(0);
            words[i].values().as_string::<i32>().value(key)
        };
        let values = batch.column(6).as_primitive::<Float64Type>();
        let quality = batch.column(7).as_primitive::<UInt8Type>().values();
        let site = message.site.clone().unwrap_or_default();
        // By the device's key in this message: the keys of its other words, and the slot they lead to.
        let mut cache: Vec<Option<Resolved>> = vec![None; words[0].values().len()];
        for row in 0..batch.num_rows() {
            if message.only.is_some() && !message.counts(i64::try_from(row).unwrap_or(i64::MAX)) {
                continue;
            }
            let of_row = keys.map(|keys| keys[row]);
            let cached = usize::try_from(of_row[0]).ok().and_then(|key| cache.get_mut(key));
            let resolved;
            let slot = match cached {
                Some(Some((same, slot))) if *same == of_row => &*slot,
                cached => {
                    let stated = Stated {
                        site: &site,
                        device_id: word(0, row),
                        device_type: word(1, row),
                        asset_id: word(2, row),
                        unit: word(3, row),
                        kind: word(4, row),
                    };
                    resolved = self.resolve(rules, stated);
                    if let Some(cached) = cached {
                        *cached = Some((of_row, resolved.clone()));
                    }
                    &resolved
                }
            };
            let instant = Timestamp::from_micros(ts[row]);
            let value = values.is_valid(row).then(|| values.value(row));
            let passed = match slot {
                Ok(slot) => {
                    let profile = &self.slots[*slot as usize].profile;
                    let checked = rules.check(profile, instant, value, quality[row], message.received_at);
                    checked.map(|value| (*slot, value))
                }
                Err(reject) => Err(reject.clone()),
            };
            match passed {
                Ok((slot, value)) => self.push(instant, value, quality[row], slot, at, row),
                Err(reject) => {
                    message.quarantined += 1;
                    quarantine.push(Quarantined {
                        row: i64::try_from(row).ok(),
                        device_id: Some(word(0, row).to_owned()),
                        device_type: Some(word(1, row).to_owned()),
                        ts: Some(instant.to_string()),
                        value: value.map(|v| v.to_string()),
                        unit: Some(word(3, row).to_owned()),
                        ..Quarantined::message(at, 1, reject)
                    });
                }
            }
        }
    }

    /// Takes the readings of a JSON message.
    pub(super) fn json(
        &mut self,
        rules: &Rules,
        at: usize,
        message: &mut Delivered,
        samples: &[(i64, Sample)],
        quarantine: &mut Vec<Quarantined>,
    ) {
        let site = message.site.clone().unwrap_or_default();
        for (row, sample) in samples {
            if !message.counts(*row) {
                continue;
            }
            let stated = Stated {
                site: &site,
                device_id: &sample.device_id,
                device_type: &sample.device_type,
                asset_id: &sample.asset_id,
                unit: &sample.unit,
                kind: "gauge",
            };
            let passed = self.resolve(rules, stated).and_then(|slot| {
                let profile = &self.slots[slot as usize].profile;
                let checked =
                    rules.check(profile, sample.ts, sample.value, sample.quality, message.received_at);
                Ok((slot, checked?))
            });
            match passed {
                Ok((slot, value)) => {
                    let row = usize::try_from(*row).unwrap_or(usize::MAX);
                    self.push(sample.ts, value, sample.quality, slot, at, row);
                }
                Err(reject) => {
                    message.quarantined += 1;
                    quarantine.push(Quarantined {
                        row: Some(*row),
                        device_id: Some(sample.device_id.clone()),
                        device_type: Some(sample.device_type.clone()),
                        ts: Some(sample.ts.to_string()),
                        value: sample.value.map(|v| v.to_string()),
                        unit: Some(sample.unit.clone()),
                        ..Quarantined::message(at, 1, reject)
                    });
                }
            }
        }
    }

    /// Makes room for so many more.
    pub(super) fn reserve(&mut self, rows: usize) {
        self.ts.reserve(rows);
        self.value.reserve(rows);
        self.quality.reserve(rows);
        self.slot.reserve(rows);
        self.message.reserve(rows);
        self.row.reserve(rows);
    }

    #[inline]
    fn push(&mut self, ts: Timestamp, value: f64, quality: u8, slot: u32, message: usize, row: usize) {
        self.ts.push(ts.as_micros());
        self.value.push(value);
        self.quality.push(quality);
        self.slot.push(slot);
        self.message.push(u32::try_from(message).unwrap_or(u32::MAX));
        self.row.push(u32::try_from(row).unwrap_or(u32::MAX));
    }

    fn resolve(&mut self, rules: &Rules, stated: Stated<'_>) -> Result<u32, Reject> {
        let Stated { site, device_id, device_type, asset_id, unit, kind } = stated;
        let key = [site, device_id, device_type, asset_id, unit, kind].join("\u{1f}");
        if let Some(known) = self.slot_index.get(&key) {
            return known.clone();
        }
        let made = rules.profile(device_id, device_type, unit, kind).map(|profile| {
            let named = (site.to_owned(), device_id.to_owned());
            let devices = &mut self.devices;
            let device = *self.device_index.entry(named.clone()).or_insert_with(|| {
                devices.push(named);
                u32::try_from(devices.len() - 1).unwrap_or(u32::MAX)
            });
            let slot = Slot {
                device,
                device_id: self.words.intern(device_id),
                device_type: self.words.intern(&profile.device_type),
                asset_id: if asset_id.is_empty() { -1 } else { self.words.intern(asset_id) },
                site: self.words.intern(site),
                unit: self.words.intern(&profile.unit),
                kind: self.words.intern(kind),
                profile,
            };
            self.slots.push(slot);
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        self.slot_index.insert(key, made.clone());
        made
    }

    fn device(&self, i: usize) -> u32 {
        self.slots[self.slot[i] as usize].device
    }

    /// Spans of event time of each device that may hold committed readings, or its last one.
    pub(super) fn questions(&mut self, known: &Known) -> Vec<Question> {
        let devices: Vec<_> = self.devices.iter().map(|device| known.readings.get(device)).collect();
        let mut open = BTreeMap::<u32, (i64, i64)>::new();
        let mut ask = |device: u32, ts: i64| {
            let span = open.entry(device).or_insert((ts, ts));
            *span = (span.0.min(ts), span.1.max(ts));
        };
        for (i, ts) in self.ts.iter().enumerate() {
            let device = self.device(i);
            if devices[device as usize].is_some_and(|device| device.spans.contains(*ts)) {
                ask(device, *ts);
            }
        }
        self.last = vec![None; devices.len()];
        for slot in self.slots.iter().filter(|slot| slot.profile.soft.is_some_and(|soft| soft.looks_back())) {
            let Some(known) = devices[slot.device as usize] else { continue };
            self.last[slot.device as usize] = known.spans.last().map(|ts| (ts, known.value));
            if let (Some(ts), None) = (known.spans.last(), known.value) {
                ask(slot.device, ts);
            }
        }
        open.into_iter()
            .map(|(device, (from, to))| {
                let (site, device) = self.devices[device as usize].clone();
                Question { site, device, from, to }
            })
            .collect()
    }

    /// Decides on every candidate. Returns those that are stored, by device and time, and the spans that
    /// they cover.
    pub(super) fn settle(
        &self,
        answers: &Answers,
        delivered: &mut [Delivered],
        quarantine: &mut Vec<Quarantined>,
        soft: &mut Soft,
    ) -> (Vec<u32>, News) {
        let order = self.by_device_and_time();
        let mut stored = Vec::with_capacity(order.len());
        let mut news = News::default();
        let device_of = |i: &u32| self.device(*i as usize);
        for of_device in order.chunk_by(|a, b| device_of(a) == device_of(b)) {
            let number = device_of(&of_device[0]) as usize;
            let device = &self.devices[number];
            let committed = answers.get(device);
            let mut before = Last::of(self.last.get(number).copied().flatten(), committed);
            let mut span: Option<(i64, i64)> = None;
            let mut last: Option<usize> = None;
            for i in of_device.iter().map(|i| *i as usize) {
                let ts = self.ts[i];
                let message = &mut delivered[self.message[i] as usize];
                let there = committed.and_then(|rows| rows.get(&ts));
                let earlier = last.filter(|l| self.ts[*l] == ts);
                let conflict = match (there, earlier) {
                    (Some(there), _) => self.differs_from(i, there),
                    (None, Some(first)) => self.differ(i, first),
                    (None, None) => {
                        message.stored += 1;
                        stored.push(i as u32);
                        last = Some(i);
                        if let Some(rule) = &self.slots[self.slot[i] as usize].profile.soft {
                            let value = if self.quality[i] == 2 { f64::NAN } else { self.value[i] };
                            soft.judge(rule, &device.1, &mut before, ts, value);
                        }
                        match &mut span {
                            Some((_, to)) if ts - *to <= TIME_SLACK => *to = ts,
                            _ => news.readings.extend(span.replace((ts, ts)).map(|span| named(device, span))),
                        }
                        continue;
                    }
                };
                match conflict {
                    None => message.duplicates += 1,
                    Some(reason) => {
                        message.quarantined += 1;
                        quarantine.push(self.conflict(i, reason));
                    }
                }
            }
            news.readings.extend(span.map(|span| named(device, span)));
            news.values.extend(before.newest().map(|(ts, value)| (device.clone(), ts, value)));
        }
        (stored, news)
    }

    /// Indices of all candidates by device, then time, then arrival. What comes in order costs one pass.
    fn by_device_and_time(&self) -> Vec<u32> {
        let mut next = vec![0u32; self.devices.len() + 1];
        for slot in &self.slot {
            next[self.slots[*slot as usize].device as usize + 1] += 1;
        }
        let mut sum = 0;
        for count in &mut next {
            sum += *count;
            *count = sum;
        }
        let begins = next.clone();
        let mut order = vec![0u32; self.ts.len()];
        for (i, slot) in (0..).zip(&self.slot) {
            let next = &mut next[self.slots[*slot as usize].device as usize];
            order[*next as usize] = i;
            *next += 1;
        }
        for ends in begins.windows(2) {
            let of_device = &mut order[ends[0] as usize..ends[1] as usize];
            if !of_device.is_sorted_by_key(|i| self.ts[*i as usize]) {
                of_device.sort_by_key(|i| self.ts[*i as usize]);
            }
        }
        order
    }

    /// How a candidate differs from what is committed for its time.
    fn differs_from(&self, i: usize, (value, quality, unit): &Committed) -> Option<String> {
        let unit_here = &self.slots[self.slot[i] as usize].profile.unit;
        let same = same(value.unwrap_or(f64::NAN), self.value[i])
            && quality == quality_word(self.quality[i])
            && unit == unit_here;
        (!same).then(|| format!("{} {unit} {quality} is stored", shown(value.as_ref())))
    }

    /// How a candidate differs from the first one of its time.
    fn differ(&self, i: usize, first: usize) -> Option<String> {
        let unit = |i: usize| self.slots[self.slot[i] as usize].unit;
        let equal = same(self.value[first], self.value[i])
            && self.quality[first] == self.quality[i]
            && unit(first) == unit(i);
        (!equal).then(|| format!("{} came first", self.value[first]))
    }

    fn conflict(&self, i: usize, reason: String) -> Quarantined {
        let slot = &self.slots[self.slot[i] as usize];
        let (_, device_id) = &self.devices[slot.device as usize];
        Quarantined {
            row: Some(i64::from(self.row[i])),
            device_id: Some(device_id.clone()),
            device_type: Some(slot.profile.device_type.clone()),
            ts: Some(Timestamp::from_micros(self.ts[i]).to_string()),
            value: (!self.value[i].is_nan()).then(|| self.value[i].to_string()),
            unit: Some(slot.profile.unit.clone()),
            ..Quarantined::message(self.message[i] as usize, 1, Reject::new("conflict", reason))
        }
    }
}

fn named((site, device): &(String, String), (from, to): (i64, i64)) -> (String, String, i64, i64) {
    (site.clone(), device.clone(), from, to)
}

fn same(a: f64, b: f64) -> bool {
    a == b || (a.is_nan() && b.is_nan())
}

fn shown(value: Option<&f64>) -> String {
    value.map_or_else(|| "null".to_owned(), f64::to_string)
}

fn quality_word(code: u8) -> &'static str {
    Quality::from_code(code).unwrap_or(Quality::Bad).as_str()
}

/// Rows that follow one another, of one sender's words and one message.
struct Run<'a> {
    slot: &'a Slot,
    from: &'a Delivered,
    /// Index of `from`.
    message: usize,
    rows: usize,
}

/// The runs of rows; a device's readings lie together, and it sends several in a message.
fn runs<'a>(candidates: &'a Candidates, rows: &[u32], delivered: &'a [Delivered]) -> Vec<Run<'a>> {
    let of = |i: &u32| (candidates.slot[*i as usize], candidates.message[*i as usize]);
    let same = rows.chunk_by(|a, b| of(a) == of(b));
    same.map(|rows| {
        let (slot, message) = of(&rows[0]);
        let (slot, message) = (slot as usize, message as usize);
        Run { slot: &candidates.slots[slot], from: &delivered[message], message, rows: rows.len() }
    })
    .collect()
}

/// A column of what each run says, `None` being null.
fn column<T: ArrowPrimitiveType>(
    runs: &[Run<'_>],
    value: impl Fn(&Run<'_>) -> Option<T::Native>,
) -> PrimitiveArray<T> {
    let n = runs.iter().map(|run| run.rows).sum();
    let (mut values, mut nulls) = (Vec::with_capacity(n), NullBufferBuilder::new(n));
    for run in runs {
        let value = value(run);
        values.resize(values.len() + run.rows, value.unwrap_or_default());
        match value {
            Some(_) => nulls.append_n_non_nulls(run.rows),
            None => nulls.append_n_nulls(run.rows),
        }
    }
    PrimitiveArray::new(values.into(), nulls.finish())
}

/// The rows of `silver/sensor_readings`: a batch is of one partition, and ordered by device and time.
pub(super) fn sensor_readings(
    candidates: &Candidates,
    stored: &[u32],
    delivered: &[Delivered],
    places: &Places,
) -> anyhow::Result<Vec<RecordBatch>> {
    let mut words = candidates.words.clone();
    let qualities = [0u8, 1, 2].map(|code| words.intern(quality_word(code)));
    let segments: Vec<i32> = places.segments.iter().map(|path| words.intern(path)).collect();
    let messages: Vec<(i32, i32)> = delivered
        .iter()
        .map(|d| {
            let gateway = words.intern(d.gateway.as_deref().unwrap_or(""));
            (gateway, d.name.as_ref().map_or(-1, |n| words.intern(&n.epoch)))
        })
        .collect();
    let words: ArrayRef = Arc::new(StringArray::from(words.list));
    let text = |keys: Int32Array| -> anyhow::Result<ArrayRef> {
        Ok(Arc::new(DictionaryArray::<Int32Type>::try_new(keys, Arc::clone(&words))?))
    };
    // Most columns say one word throughout; they share their keys.
    let first = Int32Array::from(vec![0; stored.len().min(BATCH)]);
    let constant = |key: i32, rows: usize| -> anyhow::Result<ArrayRef> {
        let Ok(key) = usize::try_from(key) else { return Ok(new_null_array(&dict(), rows)) };
        Ok(Arc::new(DictionaryArray::<Int32Type>::try_new(first.slice(0, rows), words.slice(key, 1))?))
    };
    let schema = with_dictionaries(&Table::SensorReadings.schema());
    let mut batches = Vec::new();
    for ((device_type, year, month), rows) in partitions(candidates, stored) {
        let [years, months] = [year, month].map(|n| Int64Array::from(vec![n; rows.len().min(BATCH)]));
        for rows in rows.chunks(BATCH) {
            let n = rows.len();
            let runs = runs(candidates, rows, delivered);
            let word = |key: &dyn Fn(&Run<'_>) -> i32| {
                let mut keys = runs.iter().map(key);
                match keys.next().filter(|first| keys.all(|key| key == *first)) {
                    Some(one) => constant(one, n),
                    None => text(column(&runs, |run| Some(key(run)).filter(|key| *key >= 0))),
                }
            };
            let instant = |micros: TimestampMicrosecondArray| Arc::new(micros.with_timezone("UTC"));
            let ts: Vec<i64> = rows.iter().map(|i| candidates.ts[*i as usize]).collect();
            let value: Vec<f64> = rows.iter().map(|i| candidates.value[*i as usize]).collect();
            let valid = value.iter().any(|v| v.is_nan()).then(|| value.iter().map(|v| !v.is_nan()).collect());
            let quality = |i: &u32| qualities[usize::from(candidates.quality[*i as usize].min(2))];
            let of_first = quality(&rows[0]);
            let quality = match rows.iter().all(|i| quality(i) == of_first) {
                true => constant(of_first, n)?,
                false => text(rows.iter().map(quality).collect::<Vec<_>>().into())?,
            };
            let columns: Vec<ArrayRef> = vec![
                instant(ts.into()),
                word(&|run| run.slot.device_id)?,
                constant(device_type, n)?,
                word(&|run| run.slot.asset_id)?,
                word(&|run| run.slot.site)?,
                word(&|run| messages[run.message].0)?,
                Arc::new(Float64Array::new(value.into(), valid)),
                word(&|run| run.slot.unit)?,
                word(&|run| run.slot.kind)?,
                quality,
                instant(column(&runs, |run| Some(run.from.received_at.as_micros()))),
                word(&|run| messages[run.message].1)?,
                Arc::new(column::<Int64Type>(&runs, |run| run.from.name.as_ref().map(|n| n.seq))),
                word(&|run| segments[run.from.segment])?,
                Arc::new(years.slice(0, n)),
                Arc::new(months.slice(0, n)),
            ];
            batches.push(RecordBatch::try_new(Arc::clone(&schema), columns)?);
        }
    }
    Ok(batches)
}

/// Word of the device type, year, month.
type Partition = (i32, i64, i64);

/// Rows by partition, in the order in which they begin. The calendar is asked once a day of them.
fn partitions(candidates: &Candidates, stored: &[u32]) -> Vec<(Partition, Vec<u32>)> {
    let mut parts: Vec<(Partition, Vec<u32>)> = Vec::new();
    let (mut part, mut last) = (0, None);
    for i in stored {
        let ts = candidates.ts[*i as usize];
        let device_type = candidates.slots[candidates.slot[*i as usize] as usize].device_type;
        let day = ts.div_euclid(DAY);
        if last != Some((device_type, day)) {
            last = Some((device_type, day));
            let (year, month) = year_month(Timestamp::from_micros(ts));
            let key = (device_type, year, month);
            part = parts.iter().position(|(known, _)| *known == key).unwrap_or_else(|| {
                parts.push((key, Vec::new()));
                parts.len() - 1
            });
        }
        parts[part].1.push(*i);
    }
    parts
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
        texts(&|q| Some(from(q).topic.clone())),
        texts(&|q| from(q).site.clone()),
        texts(&|q| from(q).gateway.clone()),
        texts(&|q| q.device_id.clone()),
        texts(&|q| q.device_type.clone()),
        texts(&|q| q.ts.clone()),
        texts(&|q| q.value.clone()),
        texts(&|q| q.unit.clone()),
        texts(&|q| Some(q.reject.rule.to_owned())),
        texts(&|q| Some(q.reject.reason.clone())),
        texts(&|q| from(q).name.as_ref().map(|n| n.epoch.clone())),
        texts(&|q| from(q).name.as_ref().map(|n| n.lane.clone())),
        ints(&|q| from(q).name.as_ref().map(|n| n.seq)),
        texts(&|q| Some(places.segments[from(q).segment].clone())),
        ints(&|q| Some(from(q).offset)),
        ints(&|q| q.row),
        ints(&|q| Some(q.readings)),
        Arc::new(TimestampMicrosecondArray::from(vec![None::<i64>; quarantine.len()]).with_timezone("UTC")),
    ];
    Ok(vec![RecordBatch::try_new(Table::Quarantine.schema(), columns)?])
}

pub(super) fn messages(
    plan: i64,
    delivered: &[Delivered],
    places: &Places,
) -> anyhow::Result<Vec<RecordBatch>> {
    let rows: Vec<&Delivered> = delivered.iter().filter(|d| d.recorded).collect();
    let texts = |of: &dyn Fn(&Delivered) -> String| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(|d| of(d))))
    };
    let ints = |of: &dyn Fn(&Delivered) -> i64| -> ArrayRef {
        Arc::new(Int64Array::from_iter_values(rows.iter().map(|d| of(d))))
    };
    let columns: Vec<ArrayRef> = vec![
        texts(&|d| d.site.clone().unwrap_or_default()),
        texts(&|d| d.gateway.clone().unwrap_or_default()),
        texts(&|d| d.name.as_ref().map_or(String::new(), |n| n.epoch.clone())),
        texts(&|d| d.name.as_ref().map_or("json".to_owned(), |n| n.lane.clone())),
        ints(&|d| d.name.as_ref().map_or(d.offset, |n| n.seq)),
        ints(&|d| d.rows),
        ints(&|d| d.rows_before),
        ints(&|d| d.oldest),
        Arc::new(instants(rows.iter().map(|d| d.sealed_at))),
        texts(&|d| d.clock.clone()),
        texts(&|d| d.hash.clone()),
        ints(&|d| d.readings),
        ints(&|d| d.stored),
        ints(&|d| d.duplicates),
        ints(&|d| d.quarantined),
        Arc::new(BooleanArray::from_iter(rows.iter().map(|d| Some(d.redelivered)))),
        Arc::new(instants(rows.iter().map(|d| d.received_at))),
        texts(&|d| places.segments[d.segment].clone()),
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
