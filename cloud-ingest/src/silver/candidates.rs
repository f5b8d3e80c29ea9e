//! Candidates for `sensor_readings`: readings that have passed the rules, and how they are settled.
//!
//! They are columns, 29 bytes each and no text: a reading points at its *slot* (device, type, unit, kind, asset as this
//! sender states them) and at its message, and words are interned once a plan. As they are read they lie in the order
//! of arrival; before anything is asked or decided they are put into that of device and time, once, so that all that
//! follows goes through them from one end to the other.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
};

use arrow::{
    array::{Array, AsArray, DictionaryArray, RecordBatch, StringArray},
    datatypes::{Float64Type, Int32Type, TimestampMicrosecondType, UInt8Type},
};
use common::{reading::Quality, time::Timestamp};

use super::{
    Answers, Committed, Device, Known, News, Question, TIME_SLACK,
    messages::Delivered,
    rows::Quarantined,
    soft::{Last, Soft},
};
use crate::{
    decode::Sample,
    quality::{Profile, Reject, Rules},
};

/// Words that stand for text; -1 for none.
#[derive(Clone, Debug, Default)]
pub(super) struct Words {
    pub(super) list: Vec<String>,
    index: HashMap<String, i32>,
}

impl Words {
    pub(super) fn intern(&mut self, word: &str) -> i32 {
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
pub(super) struct Slot {
    /// Index of (site, device id).
    device: u32,
    profile: Profile,
    pub(super) device_id: i32,
    pub(super) device_type: i32,
    pub(super) asset_id: i32,
    pub(super) site: i32,
    pub(super) unit: i32,
    pub(super) kind: i32,
}

/// The keys of a row's words in its message, and the slot that they lead to.
type Resolved = ([i32; 5], Result<u32, Reject>);

/// The dictionaries of a message, and what their keys lead to.
#[derive(Debug)]
struct Dictionaries {
    words: [StringArray; 5],
    /// By the device's key.
    slots: Vec<Option<Resolved>>,
}

impl Dictionaries {
    /// Whether they are these, at the same place in memory.
    fn are(&self, words: &[StringArray; 5]) -> bool {
        let place =
            |words: &StringArray| (words.value_offsets().as_ptr(), words.len(), words.values().as_ptr());
        self.words.iter().map(place).eq(words.iter().map(place))
    }
}

/// Readings that have passed the rules, in columns.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    pub(super) words: Words,
    /// (site, device id) by index.
    devices: Vec<(String, String)>,
    device_index: HashMap<(String, String), u32>,
    /// The last committed reading of each device, where soft rules apply; without a value that is not known yet.
    last: Vec<Option<(i64, Option<f64>)>>,
    pub(super) slots: Vec<Slot>,
    slot_index: HashMap<String, Result<u32, Reject>>,
    /// Room to put a key of `slot_index` together.
    key: String,
    /// Of the last message of each site and gateway, which mostly says the same again.
    dictionaries: HashMap<(String, String), Dictionaries>,
    pub(super) ts: Vec<i64>,
    /// NaN for none.
    pub(super) value: Vec<f64>,
    pub(super) quality: Vec<u8>,
    pub(super) slot: Vec<u32>,
    pub(super) message: Vec<u32>,
    row: Vec<u32>,
    /// Where each device's candidates begin, and the end of the last one's, once they are in order.
    begins: Vec<usize>,
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
        let columns: [&DictionaryArray<Int32Type>; 5] =
            [1, 2, 3, 4, 5].map(|i| batch.column(i).as_dictionary());
        let keys = columns.map(|column| &column.keys().values()[..]);
        let words = columns.map(|column| column.values().as_string::<i32>().clone());
        let values = batch.column(6).as_primitive::<Float64Type>();
        let quality = batch.column(7).as_primitive::<UInt8Type>().values();
        let sender = (message.site().to_owned(), message.gateway().to_owned());
        let mut known = match self.dictionaries.remove(&sender) {
            Some(known) if known.are(&words) => known,
            _ => Dictionaries { slots: vec![None; words[0].len()], words },
        };
        let Dictionaries { words, slots } = &mut known;
        let word = |i: usize, row: usize| words[i].value(usize::try_from(keys[i][row]).unwrap_or(0));
        let mut passed = Vec::new();
        for row in 0..batch.num_rows() {
            if message.only.is_some() && !message.counts(i64::try_from(row).unwrap_or(i64::MAX)) {
                continue;
            }
            let cached = usize::try_from(keys[0][row]).ok().and_then(|key| slots.get_mut(key));
            let resolved;
            let slot = match cached {
                // One by one: put together and compared at once, they would be waited for.
                Some(Some((same, slot))) if same.iter().zip(&keys).all(|(same, keys)| *same == keys[row]) => {
                    &*slot
                }
                cached => {
                    let stated = Stated {
                        site: &sender.0,
                        device_id: word(0, row),
                        device_type: word(1, row),
                        asset_id: word(2, row),
                        unit: word(3, row),
                        kind: word(4, row),
                    };
                    resolved = self.resolve(rules, stated);
                    if let Some(cached) = cached {
                        *cached = Some((keys.map(|keys| keys[row]), resolved.clone()));
                    }
                    &resolved
                }
            };
            let instant = Timestamp::from_micros(ts[row]);
            let value = values.is_valid(row).then(|| values.value(row));
            let checked = match slot {
                Ok(slot) => {
                    let profile = &self.slots[*slot as usize].profile;
                    let checked = rules.check(profile, instant, value, quality[row], message.received_at);
                    checked.map(|value| (*slot, value))
                }
                Err(reject) => Err(reject.clone()),
            };
            match checked {
                Ok((slot, value)) => {
                    self.slot.push(slot);
                    self.value.push(value);
                    extend(&mut passed, row..row + 1);
                }
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
        for rows in passed {
            self.ts.extend_from_slice(&ts[rows.clone()]);
            self.quality.extend_from_slice(&quality[rows.clone()]);
            self.row.extend(rows.map(number));
        }
        self.message.resize(self.ts.len(), number(at));
        self.dictionaries.insert(sender, known);
    }

    /// Takes the readings of a JSON message.
    pub(super) fn json(
        &mut self,
        rules: &Rules,
        at: usize,
        message: &mut Delivered,
        samples: &[(i64, Sample<'_>)],
        quarantine: &mut Vec<Quarantined>,
    ) {
        let site = message.site();
        let mut refused = 0;
        for (row, sample) in samples {
            if !message.counts(*row) {
                continue;
            }
            let stated = Stated {
                site,
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
                    refused += 1;
                    quarantine.push(Quarantined {
                        row: Some(*row),
                        device_id: Some(sample.device_id.to_string()),
                        device_type: Some(sample.device_type.to_string()),
                        ts: Some(sample.ts.to_string()),
                        value: sample.value.map(|v| v.to_string()),
                        unit: Some(sample.unit.to_string()),
                        ..Quarantined::message(at, 1, reject)
                    });
                }
            }
        }
        message.quarantined += refused;
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

    fn push(&mut self, ts: Timestamp, value: f64, quality: u8, slot: u32, message: usize, row: usize) {
        self.ts.push(ts.as_micros());
        self.value.push(value);
        self.quality.push(quality);
        self.slot.push(slot);
        self.message.push(number(message));
        self.row.push(number(row));
    }

    fn resolve(&mut self, rules: &Rules, stated: Stated<'_>) -> Result<u32, Reject> {
        let Stated { site, device_id, device_type, asset_id, unit, kind } = stated;
        self.key.clear();
        for word in [site, device_id, device_type, asset_id, unit, kind] {
            self.key.push_str(word);
            self.key.push('\u{1f}');
        }
        if let Some(known) = self.slot_index.get(&self.key) {
            return known.clone();
        }
        let made = rules.profile(device_id, device_type, unit, kind).map(|profile| {
            let named = (site.to_owned(), device_id.to_owned());
            let devices = &mut self.devices;
            let device = *self.device_index.entry(named.clone()).or_insert_with(|| {
                devices.push(named);
                number(devices.len() - 1)
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
            number(self.slots.len() - 1)
        });
        self.slot_index.insert(self.key.clone(), made.clone());
        made
    }

    /// Puts all in the order of device, then time, then arrival, unless they are. What comes in order costs one pass.
    fn sort(&mut self) {
        if self.begins.last() == Some(&self.ts.len()) {
            return;
        }
        let slots = &self.slots;
        let device = |slot: &u32| slots[*slot as usize].device as usize;
        let mut begins = vec![0; self.devices.len() + 1];
        self.slot.iter().for_each(|slot| begins[device(slot) + 1] += 1);
        let mut sum = 0;
        for begin in &mut begins {
            sum += *begin;
            *begin = sum;
        }
        let mut next = begins.clone();
        let place = |slot: &u32| {
            let next = &mut next[device(slot)];
            *next += 1;
            number(*next - 1)
        };
        let places: Vec<u32> = self.slot.iter().map(place).collect();
        self.ts = scattered(&self.ts, &places);
        self.value = scattered(&self.value, &places);
        self.quality = scattered(&self.quality, &places);
        self.slot = scattered(&self.slot, &places);
        self.message = scattered(&self.message, &places);
        self.row = scattered(&self.row, &places);
        for ends in begins.windows(2) {
            let rows = ends[0]..ends[1];
            if self.ts[rows.clone()].is_sorted() {
                continue;
            }
            let mut order: Vec<usize> = rows.clone().collect();
            order.sort_by_key(|i| self.ts[*i]);
            gather(&mut self.ts, &rows, &order);
            gather(&mut self.value, &rows, &order);
            gather(&mut self.quality, &rows, &order);
            gather(&mut self.slot, &rows, &order);
            gather(&mut self.message, &rows, &order);
            gather(&mut self.row, &rows, &order);
        }
        self.begins = begins;
    }

    /// The candidates of each device that has any, by its index.
    fn by_device(&self) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        let all = self.begins.windows(2).map(|ends| ends[0]..ends[1]).enumerate();
        all.filter(|(_, rows)| !rows.is_empty())
    }

    /// Spans of event time of each device that may hold committed readings, or its last one.
    pub(super) fn questions(&mut self, known: &Known) -> Vec<Question> {
        self.sort();
        let devices: Vec<_> = self.devices.iter().map(|device| known.readings.get(device)).collect();
        let mut open = BTreeMap::<u32, (i64, i64)>::new();
        let mut ask = |device: u32, ts: i64| {
            let span = open.entry(device).or_insert((ts, ts));
            *span = (span.0.min(ts), span.1.max(ts));
        };
        for (device, rows) in self.by_device() {
            let Some(Device { spans, .. }) = devices[device] else { continue };
            let times = &self.ts[rows];
            if spans.overlap(times[0], times[times.len() - 1]) {
                let held = |ts: &&i64| spans.contains(**ts);
                let ends = [times.iter().find(held), times.iter().rfind(held)];
                ends.into_iter().flatten().for_each(|ts| ask(number(device), *ts));
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

    /// Decides on every candidate. Returns those that are stored, by device and time, and the spans that they cover.
    pub(super) fn settle(
        &mut self,
        answers: &Answers,
        delivered: &mut [Delivered],
        quarantine: &mut Vec<Quarantined>,
        soft: &mut Soft,
    ) -> (Vec<Range<usize>>, News) {
        self.sort();
        let mut stored = Vec::new();
        let mut news = News::default();
        for (number, rows) in self.by_device() {
            let device = &self.devices[number];
            let committed = answers.get(device);
            let mut before = Last::of(self.last.get(number).copied().flatten(), committed);
            let mut span: Option<(i64, i64)> = None;
            let mut last: Option<usize> = None;
            for i in rows {
                let ts = self.ts[i];
                let message = &mut delivered[self.message[i] as usize];
                let there = committed.and_then(|rows| rows.get(&ts));
                let earlier = last.filter(|l| self.ts[*l] == ts);
                let conflict = match (there, earlier) {
                    (Some(there), _) => self.differs_from(i, there),
                    (None, Some(first)) => self.differ(i, first),
                    (None, None) => {
                        message.stored += 1;
                        extend(&mut stored, i..i + 1);
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

/// The word of a quality's code.
pub(super) fn quality_word(code: u8) -> &'static str {
    Quality::from_code(code).unwrap_or(Quality::Bad).as_str()
}

/// An index as it is kept; a plan has fewer than 2^32 of anything.
fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

/// Adds rows that come after all of these.
pub(super) fn extend(ranges: &mut Vec<Range<usize>>, rows: Range<usize>) {
    match ranges.last_mut() {
        Some(last) if last.end == rows.start => last.end = rows.end,
        _ => ranges.push(rows),
    }
}

/// The values, each at its place.
fn scattered<T: Copy + Default>(values: &[T], places: &[u32]) -> Vec<T> {
    let mut to = vec![T::default(); values.len()];
    for (value, place) in values.iter().zip(places) {
        to[*place as usize] = *value;
    }
    to
}

/// Puts some rows of a column into another order.
fn gather<T: Copy>(column: &mut [T], rows: &Range<usize>, order: &[usize]) {
    let ordered: Vec<T> = order.iter().map(|i| column[*i]).collect();
    column[rows.clone()].copy_from_slice(&ordered);
}
