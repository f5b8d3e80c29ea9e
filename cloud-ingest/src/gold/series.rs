//! Readings and edge aggregates of silver, sorted by device and time: what hours and minutes are made of.
//!
//! * A reading takes 17 bytes, in columns as they are read; the texts that repeat (device, type, unit, …) are kept
//!   once, as a [`Meta`]. Only the device that is looked at is laid out and sorted ([`Series::devices`]).
//! * Of an edge window that was sent more than once the fullest is kept: a whole one before a partial one, then
//!   the longer cover, then the higher revision, then the one that came last. Partial windows of one minute whose
//!   covers do not overlap (before and after a restart) all count.
//! * A device's hour is made of its readings. Only where a gateway sent no reading at all in an hour, of none of its
//!   devices, its aggregates stand for them ([`Source`]): a device whose deadband held everything back has no
//!   row. Both happens only when two gateways carry one device.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    ops::Range,
};

use anyhow::Context;
use arrow::{
    array::{
        Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int32Array, Int64Array, RecordBatch,
        StringArray,
    },
    compute::cast,
    datatypes::{DataType, Int32Type, TimestampMicrosecondType},
};
use common::{
    reading::{Kind, Quality},
    time::{HOUR_MICROS, Timestamp},
};

/// One reading of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Event time in µs.
    pub ts: i64,
    /// NaN when the quality is bad.
    pub value: f64,
    /// Index into [`Series::metas`].
    pub meta: u32,
    /// As silver has it.
    pub quality: Quality,
}

impl Sample {
    /// Whether the value may be used.
    pub fn usable(&self) -> bool {
        self.quality != Quality::Bad && !self.value.is_nan()
    }
}

/// One window that the edge aggregated. Instants are µs.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "as the columns of silver/aggregates")]
pub struct Window {
    pub start: i64,
    pub covered: Range<i64>,
    pub count: i64,
    pub bad_count: i64,
    pub min: Option<f64>,
    pub max: Option<f64>,
    pub mean: Option<f64>,
    pub stddev: Option<f64>,
    pub first: Option<f64>,
    pub last: Option<f64>,
    pub partial: bool,
    pub revision: i64,
    pub received_at: i64,
    /// Index into [`Series::metas`].
    pub meta: u32,
    /// Whether its gateway sent no reading in its hour. Of one that does not count, the last value is still what the next
    /// hour goes on from: that must not hang on what else of its own hour is in memory.
    pub counts: bool,
}

/// What silver says of the device beside a value.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "as the columns of silver")]
pub struct Meta {
    pub site: String,
    pub gateway: String,
    pub device: String,
    pub device_type: String,
    pub asset: Option<String>,
    pub unit: String,
    pub kind: Kind,
}

/// What a row of gold was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Source {
    Readings,
    Aggregates,
    Mixed,
}

impl Source {
    /// The word in gold.
    pub const fn as_str(self) -> &'static str {
        match self {
            Source::Readings => "readings",
            Source::Aggregates => "aggregates",
            Source::Mixed => "mixed",
        }
    }

    /// What a word in gold says.
    pub fn of(word: &str) -> Source {
        match word {
            "readings" => Source::Readings,
            "aggregates" => Source::Aggregates,
            _ => Source::Mixed,
        }
    }
}

/// Everything of one device, sorted by time.
#[derive(Clone, Debug)]
pub struct DeviceSeries<'a> {
    /// The plant.
    pub site: &'a str,
    /// Unique by time.
    pub samples: Vec<Sample>,
    /// The chosen ones, by start; of those, [`Self::parts`] has the ones that count.
    pub windows: &'a [Window],
    /// Texts of both.
    pub metas: &'a [Meta],
}

/// What one hour of a device is made of.
pub struct HourParts<'a> {
    /// Indices into the device's samples.
    pub samples: Range<usize>,
    /// Of the gateways that sent no reading in this hour.
    pub windows: Vec<&'a Window>,
}

impl HourParts<'_> {
    /// `None` when there is nothing.
    pub fn source(&self) -> Option<Source> {
        match (self.samples.is_empty(), self.windows.is_empty()) {
            (true, true) => None,
            (false, true) => Some(Source::Readings),
            (true, false) => Some(Source::Aggregates),
            (false, false) => Some(Source::Mixed),
        }
    }
}

impl DeviceSeries<'_> {
    /// The hours in which something is, in order.
    pub fn hours(&self, within: &Range<Timestamp>) -> Vec<i64> {
        let within = within.start.as_micros()..within.end.as_micros();
        let mut hours: Vec<i64> =
            self.windows_in(&within).iter().filter(|w| w.counts).map(|w| floor_hour(w.start)).collect();
        let mut samples = self.samples_in(within);
        while let Some(sample) = self.samples[samples.clone()].first() {
            let hour = floor_hour(sample.ts);
            hours.push(hour);
            samples.start = self.samples_in(hour..hour + HOUR_MICROS).end.min(samples.end);
        }
        hours.sort_unstable();
        hours.dedup();
        hours
    }

    /// The parts of an hour, or of a part of one (µs).
    pub fn parts(&self, span: &Range<i64>) -> HourParts<'_> {
        let windows = self.windows_in(span).iter().filter(|w| w.counts).collect();
        HourParts { samples: self.samples_in(span.clone()), windows }
    }

    fn windows_in(&self, span: &Range<i64>) -> &[Window] {
        let from = self.windows.partition_point(|w| w.start < span.start);
        let to = self.windows.partition_point(|w| w.start < span.end);
        &self.windows[from..to]
    }

    /// Indices of the samples in a time range.
    pub fn samples_in(&self, range: Range<i64>) -> Range<usize> {
        let from = self.samples.partition_point(|s| s.ts < range.start);
        from..from + self.samples[from..].partition_point(|s| s.ts < range.end)
    }
}

/// Readings in the order in which they were read.
#[derive(Debug)]
struct Columns {
    ts: Vec<i64>,
    /// NaN for null.
    value: Vec<f64>,
    quality: Vec<Quality>,
}

/// Readings that columns have room for. What a file has of a group may be few, and would keep the reader's buffers.
const ROOM: usize = 128 * 1024;

impl Columns {
    fn with_room(rows: usize) -> Self {
        Self {
            ts: Vec::with_capacity(rows),
            value: Vec::with_capacity(rows),
            quality: Vec::with_capacity(rows),
        }
    }
}

/// Readings of one device that lie together in [`Columns`].
#[derive(Debug)]
struct Run {
    /// Index of the columns.
    of: usize,
    rows: Range<usize>,
    meta: u32,
}

/// What there is of a device, in any order.
#[derive(Debug, Default)]
struct Found {
    runs: Vec<Run>,
    windows: Vec<Window>,
}

/// Series of many devices.
#[derive(Debug, Default)]
pub struct Series {
    /// Texts of the samples and windows.
    pub metas: Vec<Meta>,
    columns: Vec<Columns>,
    /// By (site, device); windows are chosen.
    found: BTreeMap<(String, String), Found>,
    /// Of windows that stand for nothing: from their start to their gateway's first reading in that hour (µs).
    silenced: Vec<Range<i64>>,
}

impl Series {
    /// Whether what is made of the time before `from` (µs) was the same when nothing was there of `from` and later. It was
    /// not where a gateway spoke first in the hour then: the windows of its hour count no more.
    pub fn is_settled_before(&self, from: i64) -> bool {
        !self.silenced.iter().any(|silenced| silenced.start < from && from <= silenced.end)
    }

    /// The devices by site and id, each laid out when its turn comes.
    pub fn devices(&self) -> impl Iterator<Item = DeviceSeries<'_>> {
        self.found.iter().map(|((site, _), found)| {
            let mut samples = Vec::with_capacity(found.runs.iter().map(|run| run.rows.len()).sum());
            for Run { of, rows, meta } in &found.runs {
                let Columns { ts, value, quality } = &self.columns[*of];
                let sample = |row: usize| Sample {
                    ts: ts[row],
                    value: value[row],
                    meta: *meta,
                    quality: quality[row],
                };
                samples.extend(rows.clone().map(sample));
            }
            if !samples.is_sorted_by_key(|sample| sample.ts) {
                samples.sort_by_key(|sample| sample.ts);
            }
            DeviceSeries { site, samples, windows: &found.windows, metas: &self.metas }
        })
    }
}

/// Collects batches of silver in any order.
#[derive(Default)]
pub struct SeriesBuilder {
    metas: Vec<Meta>,
    /// Where in `devices` each meta's device is.
    device_of: Vec<usize>,
    by_text: HashMap<String, u32>,
    by_device: HashMap<(String, String), usize>,
    devices: Vec<Found>,
    columns: Vec<Columns>,
    /// Hours (µs) in which readings came, of whom, and the first of each.
    speaking: HashMap<(u32, i64), i64>,
    key: String,
}

/// The columns of silver/sensor_readings that [`SeriesBuilder::readings`] reads.
pub const READING_COLUMNS: [&str; 10] =
    ["ts", "site", "gateway_id", "device_id", "device_type", "asset_id", "unit", "kind", "value", "quality"];
/// The columns of silver/aggregates that [`SeriesBuilder::aggregates`] reads.
#[rustfmt::skip]
pub const AGGREGATE_COLUMNS: [&str; 21] = [
    "window_start", "site", "gateway_id", "device_id", "device_type", "asset_id", "unit", "kind", "count", "bad_count",
    "min", "max", "mean", "stddev", "first", "last", "covered_from", "covered_to", "partial", "revision", "received_at",
];

impl SeriesBuilder {
    /// Adds rows of silver/sensor_readings.
    ///
    /// # Errors
    /// When a column is missing or of another type, which the lake's schema rules out.
    pub fn readings(&mut self, batch: &RecordBatch) -> anyhow::Result<()> {
        let texts = MetaColumns::of(batch)?;
        let (times, values) = (micros(batch, "ts")?, floats(batch, "value")?);
        let words = Words::of(batch, "quality")?;
        let qualities: Vec<Quality> = words.values.iter().map(quality_of).collect();
        if self.columns.last().is_none_or(|last| last.ts.capacity() - last.ts.len() < batch.num_rows()) {
            self.columns.push(Columns::with_room(batch.num_rows().max(ROOM)));
        }
        let of = self.columns.len() - 1;
        let begin = self.columns[of].ts.len();
        let mut row = 0;
        // Silver lies by device: what repeats is looked up once a run.
        while row < batch.num_rows() {
            let rows = row..row + texts.run(row);
            row = rows.end;
            let meta = self.meta(&texts, rows.start);
            let mut rest = &times.values()[rows.clone()];
            while let Some(first) = rest.first() {
                let hour = floor_hour(*first);
                let since = self.speaking.entry((meta, hour)).or_insert(*first);
                *since = (*since).min(*first);
                let within = hour..hour + HOUR_MICROS;
                rest = &rest[rest.iter().take_while(|ts| within.contains(*ts)).count()..];
            }
            let rows = begin + rows.start..begin + rows.end;
            self.devices[self.device_of[meta as usize]].runs.push(Run { of, rows, meta });
        }
        let Columns { ts, value, quality } = &mut self.columns[of];
        ts.extend_from_slice(times.values());
        match values.null_count() {
            0 => value.extend_from_slice(values.values()),
            _ => value.extend(values.iter().map(|value| value.unwrap_or(f64::NAN))),
        }
        let mut row = 0;
        while row < batch.num_rows() {
            let said = words.key(row).map_or(Quality::Bad, |key| qualities[key]);
            row += words.run(row, usize::MAX);
            quality.resize(begin + row, said);
        }
        Ok(())
    }

    /// Adds rows of silver/aggregates.
    ///
    /// # Errors
    /// When a column is missing or of another type, which the lake's schema rules out.
    pub fn aggregates(&mut self, batch: &RecordBatch) -> anyhow::Result<()> {
        let texts = MetaColumns::of(batch)?;
        let [start, from, to, received] =
            ["window_start", "covered_from", "covered_to", "received_at"].map(|name| micros(batch, name));
        let (start, from, to, received) = (start?, from?, to?, received?);
        let (count, bad, revision) =
            (ints(batch, "count")?, ints(batch, "bad_count")?, ints(batch, "revision")?);
        let partial: BooleanArray = column(batch, "partial")?.as_boolean().clone();
        let [min, max, mean, stddev, first, last] =
            ["min", "max", "mean", "stddev", "first", "last"].map(|name| floats(batch, name));
        let (min, max, mean, stddev, first, last) = (min?, max?, mean?, stddev?, first?, last?);
        let at = |array: &Float64Array, row: usize| (!array.is_null(row)).then(|| array.value(row));
        for row in 0..batch.num_rows() {
            let meta = self.meta(&texts, row);
            let device = self.device_of[meta as usize];
            self.devices[device].windows.push(Window {
                start: start.value(row),
                covered: from.value(row)..to.value(row),
                count: count.value(row),
                bad_count: bad.value(row),
                min: at(&min, row),
                max: at(&max, row),
                mean: at(&mean, row),
                stddev: at(&stddev, row),
                first: at(&first, row),
                last: at(&last, row),
                partial: partial.value(row),
                revision: revision.value(row),
                received_at: received.value(row),
                meta,
                counts: true,
            });
        }
        Ok(())
    }

    /// Chooses among windows.
    pub fn finish(self) -> Series {
        let Self { metas, by_device, mut devices, columns, .. } = self;
        let gateway = |meta: u32| {
            let Meta { site, gateway, .. } = &metas[meta as usize];
            (site.as_str(), gateway.as_str())
        };
        let mut speaking: HashMap<_, i64> = HashMap::new();
        for ((meta, hour), first) in self.speaking {
            let since = speaking.entry((gateway(meta), hour)).or_insert(first);
            *since = (*since).min(first);
        }
        let (mut found, mut silenced) = (BTreeMap::new(), Vec::new());
        for (key, at) in by_device {
            let Found { mut runs, mut windows } = std::mem::take(&mut devices[at]);
            // Runs are in order within themselves, and mostly do not overlap.
            runs.sort_by_key(|run| columns[run.of].ts[run.rows.start]);
            for window in &mut windows {
                let first = speaking.get(&(gateway(window.meta), floor_hour(window.start)));
                window.counts = first.is_none();
                silenced.extend(first.map(|first| window.start..*first).filter(|before| !before.is_empty()));
            }
            found.insert(key, Found { runs, windows: choose(windows, &metas) });
        }
        Series { metas, columns, found, silenced }
    }

    fn meta(&mut self, texts: &MetaColumns, row: usize) -> u32 {
        self.key.clear();
        for column in &texts.0 {
            self.key.push_str(column.value(row).unwrap_or(""));
            self.key.push('\0');
        }
        if let Some(known) = self.by_text.get(&self.key) {
            return *known;
        }
        let at = |i: usize| texts.0[i].value(row).unwrap_or("").to_owned();
        let meta = Meta {
            site: at(0),
            gateway: at(1),
            device: at(2),
            device_type: at(3),
            asset: texts.0[4].value(row).map(str::to_owned),
            unit: at(5),
            kind: at(6).parse().unwrap_or_default(),
        };
        let device = *self.by_device.entry((meta.site.clone(), meta.device.clone())).or_insert_with(|| {
            self.devices.push(Found::default());
            self.devices.len() - 1
        });
        let ix = u32::try_from(self.metas.len()).expect("fewer than 2^32 devices");
        self.metas.push(meta);
        self.device_of.push(device);
        self.by_text.insert(self.key.clone(), ix);
        ix
    }
}

/// Of the windows of one device the best of each start, by start.
fn choose(mut windows: Vec<Window>, metas: &[Meta]) -> Vec<Window> {
    let gateway = |w: &Window| &metas[w.meta as usize].gateway;
    windows.sort_by(|a, b| {
        let preference = |w: &Window| {
            (w.start, w.partial, Reverse((w.covered.end - w.covered.start, w.revision, w.received_at)))
        };
        gateway(a).cmp(gateway(b)).then_with(|| preference(a).cmp(&preference(b)))
    });
    let mut chosen: Vec<Window> = Vec::with_capacity(windows.len());
    for window in windows {
        let of_this_start = chosen
            .iter()
            .rev()
            .take_while(|c| c.start == window.start && gateway(c) == gateway(&window))
            .any(|c| {
                let disjoint = c.covered.end <= window.covered.start || window.covered.end <= c.covered.start;
                !(c.partial && window.partial && disjoint)
            });
        if !of_this_start {
            chosen.push(window);
        }
    }
    chosen.sort_by_key(|w| (w.start, w.covered.start));
    chosen
}

struct MetaColumns([Words; 7]);

impl MetaColumns {
    fn of(batch: &RecordBatch) -> anyhow::Result<Self> {
        Ok(Self([
            Words::of(batch, "site")?,
            Words::of(batch, "gateway_id")?,
            Words::of(batch, "device_id")?,
            Words::of(batch, "device_type")?,
            Words::of(batch, "asset_id")?,
            Words::of(batch, "unit")?,
            Words::of(batch, "kind")?,
        ]))
    }

    /// How many rows from `row` on say the same.
    fn run(&self, row: usize) -> usize {
        let [site, gateway, device, rest @ ..] = &self.0;
        run([device, site, gateway].into_iter().chain(rest), row)
    }
}

/// A column of text as a dictionary.
pub(super) struct Words {
    keys: Int32Array,
    values: StringArray,
}

/// How many rows from `row` on say the same in all of these columns. The one that changes most goes first, so that the
/// others are looked at no further.
pub(super) fn run<'a>(columns: impl IntoIterator<Item = &'a Words>, row: usize) -> usize {
    columns.into_iter().fold(usize::MAX, |most, words| words.run(row, most))
}

impl Words {
    /// Whatever encoding the scan chose.
    pub(super) fn of(batch: &RecordBatch, name: &str) -> anyhow::Result<Words> {
        let column = cast(column(batch, name)?, &common::wire::dict())?;
        let column = column.as_dictionary::<Int32Type>();
        Ok(Words { keys: column.keys().clone(), values: column.values().as_string::<i32>().clone() })
    }

    #[inline]
    fn key(&self, row: usize) -> Option<usize> {
        if self.keys.is_null(row) { None } else { usize::try_from(self.keys.value(row)).ok() }
    }

    pub(super) fn value(&self, row: usize) -> Option<&str> {
        self.key(row).map(|key| self.values.value(key))
    }

    /// How many rows from `row` on have the same key, and so the same word; at most `most`.
    fn run(&self, row: usize, most: usize) -> usize {
        let end = row.saturating_add(most).min(self.keys.len());
        match self.keys.null_count() {
            0 => alike(&self.keys.values()[row..end]),
            _ => (row..end).take_while(|other| self.key(*other) == self.key(row)).count(),
        }
    }
}

/// How many keys from the first on are the same, looked at many side by side.
fn alike(keys: &[i32]) -> usize {
    let same = |key: &i32| Some(key) == keys.first();
    let (blocks, _) = keys.as_chunks::<32>();
    let whole =
        32 * blocks.iter().take_while(|keys| keys.iter().fold(true, |all, key| all & same(key))).count();
    whole + keys[whole..].iter().take_while(|key| same(key)).count()
}

fn quality_of(word: Option<&str>) -> Quality {
    match word {
        Some("good") => Quality::Good,
        Some("uncertain") => Quality::Uncertain,
        _ => Quality::Bad,
    }
}

/// A column as it is.
pub(crate) fn column<'a>(batch: &'a RecordBatch, name: &str) -> anyhow::Result<&'a ArrayRef> {
    batch.column_by_name(name).with_context(|| format!("column {name} is missing"))
}

/// A text column, whatever encoding the scan chose.
pub(crate) fn text(batch: &RecordBatch, name: &str) -> anyhow::Result<StringArray> {
    Ok(cast(column(batch, name)?, &DataType::Utf8)?.as_string::<i32>().clone())
}

/// An int64 column.
pub(crate) fn ints(batch: &RecordBatch, name: &str) -> anyhow::Result<Int64Array> {
    let array = cast(column(batch, name)?, &DataType::Int64)?;
    Ok(array.as_primitive::<arrow::datatypes::Int64Type>().clone())
}

/// A float64 column.
pub(crate) fn floats(batch: &RecordBatch, name: &str) -> anyhow::Result<Float64Array> {
    let array = cast(column(batch, name)?, &DataType::Float64)?;
    Ok(array.as_primitive::<arrow::datatypes::Float64Type>().clone())
}

/// An instant's column, in µs.
pub(crate) fn micros(
    batch: &RecordBatch,
    name: &str,
) -> anyhow::Result<arrow::array::TimestampMicrosecondArray> {
    let array = cast(column(batch, name)?, &common::wire::instant())?;
    Ok(array.as_primitive::<TimestampMicrosecondType>().clone())
}

/// The start in µs of the hour of an instant in µs.
pub(crate) fn floor_hour(micros: i64) -> i64 {
    Timestamp::from_micros(micros).hour().as_micros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fullest_window_counts_and_partial_ones_that_do_not_overlap_all_count() {
        let meta = |gateway: &str| Meta {
            site: "s".into(),
            gateway: gateway.into(),
            device: "d".into(),
            device_type: "flow".into(),
            asset: None,
            unit: "L/min".into(),
            kind: Kind::Gauge,
        };
        let metas = [meta("g"), meta("h")];
        let window = |covered: Range<i64>, partial, revision, count| Window {
            start: 0,
            covered,
            count,
            bad_count: 0,
            min: None,
            max: None,
            mean: None,
            stddev: None,
            first: None,
            last: None,
            partial,
            revision,
            received_at: 0,
            meta: 0,
            counts: true,
        };
        let check = |windows: Vec<Window>, expected: &[i64]| {
            let counts: Vec<i64> = choose(windows, &metas).iter().map(|w| w.count).collect();
            assert_eq!(counts, expected);
        };
        check(vec![window(0..60, false, 0, 1), window(0..60, false, 1, 2)], &[2]);
        check(vec![window(30..60, true, 5, 1), window(0..60, false, 0, 2)], &[2]);
        check(vec![window(30..60, true, 0, 1), window(0..20, true, 0, 2)], &[2, 1]);
        check(vec![window(30..60, true, 0, 1), window(20..60, true, 0, 2)], &[2]);
        check(vec![window(0..60, false, 0, 1), Window { meta: 1, ..window(0..60, false, 0, 2) }], &[1, 2]);
    }
}
