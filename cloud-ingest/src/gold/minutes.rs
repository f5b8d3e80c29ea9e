//! `gold/timeseries_1m`: one row for each device and minute in which it has a reading that is not bad.
//!
//! From readings, or from edge aggregates where a gateway sent only those in that hour, never
//! both: the choice is the hour's (see [`super::series`]). An edge window stands in the minute in which it
//! starts. Means are there for counters and states too: a trend of one minute shows where they stood.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use arrow::{
    array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray},
    error::ArrowError,
};
use common::time::{HOUR_MICROS, Timestamp};

use super::{
    hourly::Moments,
    series::{DeviceSeries, HourParts, Meta, Source, Window},
};
use crate::lake::Table;

const MINUTE_MICROS: i64 = 60_000_000;

/// One row.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "as the columns of gold/timeseries_1m")]
pub struct MinuteRow {
    pub time: Timestamp,
    /// Index into the metas of the series.
    pub meta: u32,
    pub count: i64,
    pub min: Option<f64>,
    pub max: Option<f64>,
    pub mean: Option<f64>,
    pub last: Option<f64>,
    pub source: Source,
}

/// The rows of a device for `within`, whole minutes, by time.
pub fn minutes(device: &DeviceSeries<'_>, within: &Range<Timestamp>) -> Vec<MinuteRow> {
    let mut rows = Vec::new();
    let (start, end) = (within.start.as_micros(), within.end.as_micros());
    for hour in device.hours(within) {
        hour_rows(device, &device.parts(&(hour.max(start)..(hour + HOUR_MICROS).min(end))), &mut rows);
    }
    rows
}

/// The minute in which an instant is, both µs.
pub(super) fn floor_minute(micros: i64) -> i64 {
    micros - micros.rem_euclid(MINUTE_MICROS)
}

fn hour_rows(device: &DeviceSeries<'_>, parts: &HourParts<'_>, rows: &mut Vec<MinuteRow>) {
    let minute = |ts: i64| ts.div_euclid(MINUTE_MICROS);
    // A mixed hour has minutes of windows and minutes of readings; a minute that has both is of the readings.
    let mut windows: BTreeMap<i64, Vec<&Window>> = BTreeMap::new();
    for window in &parts.windows {
        windows.entry(minute(window.start)).or_default().push(window);
    }
    let mut values: Vec<f64> = Vec::new();
    let first = rows.len();
    let mut rest = &device.samples[parts.samples.clone()];
    while let Some(sample) = rest.first() {
        let at = minute(sample.ts);
        let (of_minute, later) = rest.split_at(rest.partition_point(|s| s.ts < (at + 1) * MINUTE_MICROS));
        rest = later;
        values.clear();
        values.extend(of_minute.iter().filter(|s| s.usable()).map(|s| s.value));
        if let Some(last) = values.last().copied() {
            windows.remove(&at);
            let meta = of_minute[of_minute.len() - 1].meta;
            rows.push(row(at, meta, Moments::of(&values, &[]), Some(last), Source::Readings));
        }
    }
    for (at, windows) in windows {
        let moments = Moments::of(&[], &windows);
        if moments.count > 0 {
            let last = windows.iter().rev().find_map(|w| w.last);
            rows.push(row(at, windows[windows.len() - 1].meta, moments, last, Source::Aggregates));
        }
    }
    rows[first..].sort_by_key(|r| r.time);
}

fn row(minute: i64, meta: u32, moments: Moments, last: Option<f64>, source: Source) -> MinuteRow {
    let Moments { count, min, max, mean } = moments;
    let time = Timestamp::from_micros(minute * MINUTE_MICROS);
    MinuteRow { time, meta, count, min, max, mean, last, source }
}

/// The rows as the table's columns.
///
/// # Errors
/// When the columns do not fit the table's schema, which a test rules out.
pub fn batch<'a>(rows: &[MinuteRow], metas: &'a [Meta]) -> Result<RecordBatch, ArrowError> {
    let texts = |of: &dyn Fn(&'a Meta) -> Option<&'a str>| -> ArrayRef {
        Arc::new(rows.iter().map(|r| of(&metas[r.meta as usize])).collect::<StringArray>())
    };
    let floats = |of: &dyn Fn(&MinuteRow) -> Option<f64>| -> ArrayRef {
        Arc::new(rows.iter().map(of).collect::<Float64Array>())
    };
    let times = TimestampMicrosecondArray::from_iter_values(rows.iter().map(|r| r.time.as_micros()));
    RecordBatch::try_new(
        Table::Timeseries1m.schema(),
        vec![
            Arc::new(times.with_timezone("UTC")),
            texts(&|meta| Some(&meta.site)),
            texts(&|meta| Some(&meta.device)),
            texts(&|meta| Some(&meta.device_type)),
            texts(&|meta| meta.asset.as_deref()),
            texts(&|meta| Some(&meta.unit)),
            Arc::new(Int64Array::from_iter_values(rows.iter().map(|r| r.count))),
            floats(&|r| r.min),
            floats(&|r| r.max),
            floats(&|r| r.mean),
            floats(&|r| r.last),
            Arc::new(rows.iter().map(|r| Some(r.source.as_str())).collect::<StringArray>()),
        ],
    )
}
