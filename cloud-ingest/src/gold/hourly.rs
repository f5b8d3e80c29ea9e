//! `gold/hourly_aggregates`: one row for each device and hour in which it has readings.
//!
//! From readings, over those that are not bad: `count`, `min`, `max`, `first`, `last`; `mean` by a compensated
//! (Neumaier) sum; `stddev` of the sample, in a second pass around that mean; `p50` and `p95` as
//! `percentile_cont`: the value at rank `p * (n - 1)` of the sorted values, interpolated linearly. `mean`,
//! `stddev` and the quantiles are null for counters and states.
//!
//! By time, looking back before the hour by `hold` (15 min by default):
//! * a value holds until the device's next reading, at most for `hold`; a bad reading ends it;
//! * `time_weighted_mean` weighs each value by the time that it holds within the hour; time that nothing covers
//!   does not weigh;
//! * `good_ratio` is the part of the whole hour in which a value of good quality holds, so it also falls when
//!   nothing comes; an hour that is still open has a low one. `covered_ratio` is the part in which any value does: what
//!   the time-weighted mean is over, so that hours add up to days;
//! * `delta` of a counter adds up the rises from reading to reading, including the one from the last reading
//!   before the hour if it is not older than `hold`, so hours add up to days. A fall is a reset: the counter
//!   began again at zero. It is a roll-over when it falls from the last 64th of 16 or 32 bits into the first;
//! * `transitions` of a state are the changes from reading to reading, counted in the same way.
//!
//! From edge aggregates, where a gateway sends only those: counts add up, means weigh by count, deviations are
//! pooled, quantiles are null; a window's mean holds for the time that it covers; `transitions` are null. In an
//! hour made of both, `delta` and `transitions` are null too.

use std::{collections::BTreeSet, ops::Range, sync::Arc, time::Duration};

use arrow::{
    array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray},
    error::ArrowError,
};
use common::{
    reading::{Kind, Quality},
    time::{HOUR_MICROS, Timestamp},
};

use super::series::{DeviceSeries, HourParts, Meta, Sample, Source, Window};
use crate::lake::{Table, year_month};

/// One row, without `revision` and `updated_at`, which depend on what stood there before.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "as the columns of gold/hourly_aggregates")]
pub struct HourRow {
    pub hour: Timestamp,
    pub meta: Meta,
    pub count: i64,
    pub min: Option<f64>,
    pub max: Option<f64>,
    pub mean: Option<f64>,
    pub time_weighted_mean: Option<f64>,
    pub stddev: Option<f64>,
    pub first: Option<f64>,
    pub last: Option<f64>,
    pub p50: Option<f64>,
    pub p95: Option<f64>,
    pub bad_count: i64,
    pub good_ratio: f64,
    pub covered_ratio: f64,
    pub delta: Option<f64>,
    pub transitions: Option<i64>,
    pub source: Source,
}

/// The rows of a device for the hours in `within`. `device` must hold everything from `hold` before `within` on.
pub fn hours(device: &DeviceSeries<'_>, within: &Range<Timestamp>, hold: Duration) -> Vec<HourRow> {
    let hold = i64::try_from(hold.as_micros()).unwrap_or(HOUR_MICROS);
    let hours = device.hours(within).into_iter();
    hours.filter_map(|hour| row(device, &(hour..hour + HOUR_MICROS), hold)).collect()
}

/// What the row of one device says of `span` (µs), which is an hour or a part of one.
pub(super) fn row(device: &DeviceSeries<'_>, span: &Range<i64>, hold: i64) -> Option<HourRow> {
    let (parts, hour) = (&device.parts(span), span.start);
    let source = parts.source()?;
    let samples = &device.samples[parts.samples.clone()];
    let meta = samples.last().map_or_else(|| parts.windows.last().map(|w| w.meta), |s| Some(s.meta))?;
    let meta = device.metas[meta as usize].clone();
    let kind = meta.kind;
    let mut values = Vec::with_capacity(samples.len());
    values.extend(samples.iter().filter(|s| s.usable()).map(|s| s.value));
    let (first, last) = ends(samples, &parts.windows);
    let whole = (span.end - span.start) as f64;
    let moments = Moments::of(&values, &parts.windows);
    let held = Held::of(device, parts, span, hold);
    let (delta, transitions) = match (kind, source) {
        (Kind::Counter, Source::Readings) => (Some(rise(steps(device, parts, hour, hold))), None),
        (Kind::Counter, Source::Aggregates) => (Some(rise(window_steps(device, parts, hour, hold))), None),
        (Kind::State, Source::Readings) => {
            let changes = steps(device, parts, hour, hold).filter(|(from, to)| from != to).count();
            (None, i64::try_from(changes).ok())
        }
        _ => (None, None),
    };
    let gauge = kind == Kind::Gauge;
    let exact = gauge && source == Source::Readings;
    let stddev = if gauge { moments.stddev(&values, &parts.windows) } else { None };
    let [p50, p95] = if exact { quantiles(&mut values, [0.50, 0.95]) } else { [None; 2] };
    Some(HourRow {
        hour: Timestamp::from_micros(hour),
        meta,
        count: moments.count,
        min: moments.min,
        max: moments.max,
        mean: moments.mean.filter(|_| gauge),
        time_weighted_mean: held.mean(),
        stddev,
        first,
        last,
        p50,
        p95,
        bad_count: moments_bad(samples, &parts.windows),
        good_ratio: held.good.min(whole) / whole,
        covered_ratio: held.covered.min(whole) / whole,
        delta,
        transitions,
        source,
    })
}

fn moments_bad(samples: &[Sample], windows: &[&Window]) -> i64 {
    let of_samples = samples.iter().filter(|s| !s.usable()).count();
    i64::try_from(of_samples).unwrap_or(i64::MAX) + windows.iter().map(|w| w.bad_count).sum::<i64>()
}

/// The first and the last value that is not bad, of readings and windows together.
fn ends(samples: &[Sample], windows: &[&Window]) -> (Option<f64>, Option<f64>) {
    let mut values = samples.iter().filter(|s| s.usable()).map(|s| (s.ts, s.value));
    let firsts = windows.iter().filter_map(|w| Some((w.covered.start, w.first?)));
    let lasts = windows.iter().filter_map(|w| Some((w.covered.end, w.last?)));
    let first = values.clone().next().into_iter().chain(firsts).min_by_key(|(ts, _)| *ts);
    let last = values.next_back().into_iter().chain(lasts).max_by_key(|(ts, _)| *ts);
    (first.map(|(_, v)| v), last.map(|(_, v)| v))
}

/// A sum whose error does not grow with the number of terms (Neumaier's variant of Kahan's). What an addition loses is
/// exact, by Knuth's TwoSum (The Art of Computer Programming 2, 4.2.2, theorem B): it needs no comparison.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum {
    sum: f64,
    lost: f64,
}

impl Sum {
    pub(super) fn add(&mut self, value: f64) {
        let sum = self.sum + value;
        let added = sum - self.sum;
        self.lost += (self.sum - (sum - added)) + (value - added);
        self.sum = sum;
    }

    pub(super) fn total(self) -> f64 {
        self.sum + self.lost
    }

    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> f64 {
        let mut sum = Sum::default();
        values.into_iter().for_each(|value| sum.add(value));
        sum.total()
    }

    /// Of a term for each value, in lanes.
    fn of_each(values: &[f64], term: impl Fn(f64) -> f64) -> Sum {
        let mut lanes = [Sum::default(); LANES];
        let (blocks, rest) = values.as_chunks::<LANES>();
        for block in blocks {
            lanes.iter_mut().zip(block).for_each(|(lane, value)| lane.add(term(*value)));
        }
        let mut sum = Sum::default();
        for Sum { sum: of_lane, lost } in lanes {
            sum.add(of_lane);
            sum.lost += lost;
        }
        rest.iter().for_each(|value| sum.add(term(*value)));
        sum
    }
}

/// Values that are looked at side by side: one addition need not wait for the one before.
const LANES: usize = 4;

/// The value that nothing goes before, in lanes; none is NaN.
fn foremost(values: &[f64], before: impl Fn(f64, f64) -> bool) -> Option<f64> {
    let mut lanes = [*values.first()?; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    let keep = |held: &mut f64, value: f64| *held = if before(value, *held) { value } else { *held };
    for block in blocks {
        lanes.iter_mut().zip(block).for_each(|(lane, value)| keep(lane, *value));
    }
    let mut first = lanes[0];
    lanes.iter().chain(rest).for_each(|value| keep(&mut first, *value));
    Some(first)
}

/// Statistics that combine over readings and windows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Moments {
    pub(super) count: i64,
    pub(super) min: Option<f64>,
    pub(super) max: Option<f64>,
    pub(super) mean: Option<f64>,
}

impl Moments {
    pub(super) fn of(values: &[f64], windows: &[&Window]) -> Moments {
        let windows = || windows.iter().filter(|w| w.count > 0);
        let count = i64::try_from(values.len()).unwrap_or(i64::MAX) + windows().map(|w| w.count).sum::<i64>();
        let (mut weight, mut sum) = (values.len() as f64, Sum::of_each(values, |value| value));
        for (n, mean) in windows().filter_map(|w| Some((w.count as f64, w.mean?))) {
            weight += n;
            sum.add(n * mean);
        }
        let lows = foremost(values, |a, b| a < b).into_iter().chain(windows().filter_map(|w| w.min));
        let highs = foremost(values, |a, b| a > b).into_iter().chain(windows().filter_map(|w| w.max));
        let mean = (weight > 0.0).then(|| sum.total() / weight);
        Moments { count, min: lows.reduce(f64::min), max: highs.reduce(f64::max), mean }
    }

    /// Of the sample, in a second pass around the mean.
    fn stddev(&self, values: &[f64], windows: &[&Window]) -> Option<f64> {
        let mean = self.mean?;
        let (mut weight, mut squares) =
            (values.len() as f64, Sum::of_each(values, |v| (v - mean) * (v - mean)));
        for (w, of_window) in windows.iter().filter(|w| w.count > 0).filter_map(|w| Some((w, w.mean?))) {
            let (n, s) = (w.count as f64, w.stddev.unwrap_or(0.0));
            weight += n;
            squares.add((n - 1.0) * s * s + n * (of_window - mean) * (of_window - mean));
        }
        (weight > 1.0).then(|| (squares.total() / (weight - 1.0)).sqrt())
    }
}

/// `percentile_cont` at each `p`, which rise: linear interpolation at rank `p * (n - 1)`. Leaves the values in another
/// order.
fn quantiles<const N: usize>(values: &mut [f64], of: [f64; N]) -> [Option<f64>; N] {
    let Some(last) = values.len().checked_sub(1) else { return [None; N] };
    // What lies before is no greater than what follows.
    let mut before = 0;
    of.map(|p| {
        let rank = p * last as f64;
        let at = rank.floor() as usize;
        let (_, low, above) = values[before..].select_nth_unstable_by(at - before, f64::total_cmp);
        let high = foremost(above, |a, b| a < b).unwrap_or(*low);
        before = at;
        Some(*low + (high - *low) * (rank - rank.floor()))
    })
}

/// Values by the time that they hold.
struct Held {
    weighted: Sum,
    covered: f64,
    good: f64,
}

impl Held {
    fn of(device: &DeviceSeries<'_>, parts: &HourParts<'_>, span: &Range<i64>, hold: i64) -> Held {
        let (hour, end) = (span.start, span.end);
        // The reading before the hour may still hold at its start, whatever the hour itself is made of.
        let from = parts.samples.start.saturating_sub(1);
        let (mut covered, mut good) = (0, 0);
        let mut weighted = Vec::with_capacity(parts.samples.end - from);
        for ix in from..parts.samples.end {
            let sample = &device.samples[ix];
            let next = device.samples.get(ix + 1).map_or(i64::MAX, |next| next.ts);
            let (start, stop) = (sample.ts.max(hour), next.min(sample.ts.saturating_add(hold)).min(end));
            if sample.usable() && start < stop {
                let time = stop - start;
                weighted.push(sample.value * time as f64);
                covered += time;
                good += if sample.quality == Quality::Good { time } else { 0 };
            }
        }
        let weighted = Sum::of_each(&weighted, |value| value);
        let mut held = Held { weighted, covered: covered as f64, good: good as f64 };
        for window in &parts.windows {
            let time = (window.covered.end.min(end) - window.covered.start.max(hour)) as f64;
            if let Some(mean) = window.mean.filter(|_| window.count > 0 && time > 0.0) {
                let usable = window.count as f64 / (window.count + window.bad_count) as f64;
                held.weighted.add(mean * time);
                held.covered += time;
                held.good += time * usable;
            }
        }
        held
    }

    fn mean(&self) -> Option<f64> {
        (self.covered > 0.0).then(|| self.weighted.total() / self.covered)
    }
}

/// Pairs of neighbouring values that are not bad, of which the second lies in the hour.
fn steps<'a>(
    device: &'a DeviceSeries<'_>,
    parts: &HourParts<'_>,
    hour: i64,
    hold: i64,
) -> impl Iterator<Item = (f64, f64)> + 'a {
    let range = parts.samples.clone();
    let before = device.samples[..range.start].iter().rev().take_while(move |s| s.ts >= hour - hold);
    let mut previous = before.filter(|s| s.usable()).map(|s| s.value).next();
    device.samples[range]
        .iter()
        .filter(|s| s.usable())
        .filter_map(move |s| previous.replace(s.value).map(|from| (from, s.value)))
}

/// The same from windows: within each, and from one to the next.
fn window_steps<'a>(
    device: &'a DeviceSeries<'_>,
    parts: &'a HourParts<'_>,
    hour: i64,
    hold: i64,
) -> impl Iterator<Item = (f64, f64)> + 'a {
    let before = device.windows.iter().rev().skip_while(move |w| w.start >= hour);
    let mut previous = before.take_while(move |w| w.start >= hour - hold).find_map(|w| w.last);
    let values = parts.windows.iter().flat_map(|w| [w.first, w.last]).flatten();
    values.filter_map(move |value| previous.replace(value).map(|from| (from, value)))
}

/// How far a counter went.
fn rise(steps: impl Iterator<Item = (f64, f64)>) -> f64 {
    let modulus = |from: f64, to: f64| {
        let wraps = |m: &f64| from < *m && from >= m - m / 64.0 && to < m / 64.0;
        [65_536.0, 4_294_967_296.0].into_iter().find(wraps)
    };
    Sum::of(steps.map(|(from, to)| match modulus(from, to) {
        _ if to >= from => to - from,
        Some(modulus) => modulus - from + to,
        None => to,
    }))
}

/// The rows as the table's columns, by hour, site and device; `revision` 0 and `updated_at` `now`, which publishing sets
/// right.
///
/// # Errors
/// When the columns do not fit the table's schema, which a test rules out.
pub fn batch(mut rows: Vec<HourRow>, now: Timestamp) -> Result<RecordBatch, ArrowError> {
    fn key(row: &HourRow) -> (Timestamp, &str, &str) {
        (row.hour, &row.meta.site, &row.meta.device)
    }
    rows.sort_by(|a, b| key(a).cmp(&key(b)));
    let instants = |of: &dyn Fn(&HourRow) -> i64| -> ArrayRef {
        Arc::new(TimestampMicrosecondArray::from_iter_values(rows.iter().map(of)).with_timezone("UTC"))
    };
    let texts = |of: &dyn Fn(&HourRow) -> Option<String>| -> ArrayRef {
        Arc::new(rows.iter().map(of).collect::<StringArray>())
    };
    let floats = |of: &dyn Fn(&HourRow) -> Option<f64>| -> ArrayRef {
        Arc::new(rows.iter().map(of).collect::<Float64Array>())
    };
    let ints = |of: &dyn Fn(&HourRow) -> Option<i64>| -> ArrayRef {
        Arc::new(rows.iter().map(of).collect::<Int64Array>())
    };
    RecordBatch::try_new(
        Table::HourlyAggregates.schema(),
        vec![
            instants(&|r| r.hour.as_micros()),
            texts(&|r| Some(r.meta.device.clone())),
            texts(&|r| Some(r.meta.device_type.clone())),
            texts(&|r| r.meta.asset.clone()),
            texts(&|r| Some(r.meta.site.clone())),
            texts(&|r| Some(r.meta.unit.clone())),
            ints(&|r| Some(r.count)),
            floats(&|r| r.min),
            floats(&|r| r.max),
            floats(&|r| r.mean),
            floats(&|r| r.time_weighted_mean),
            floats(&|r| r.stddev),
            floats(&|r| r.first),
            floats(&|r| r.last),
            floats(&|r| r.p50),
            floats(&|r| r.p95),
            ints(&|r| Some(r.bad_count)),
            floats(&|r| Some(r.good_ratio)),
            floats(&|r| Some(r.covered_ratio)),
            floats(&|r| r.delta),
            ints(&|r| r.transitions),
            texts(&|r| Some(r.source.as_str().to_owned())),
            ints(&|_| Some(0)),
            instants(&|_| now.as_micros()),
            ints(&|r| Some(year_month(r.hour).0)),
            ints(&|r| Some(year_month(r.hour).1)),
        ],
    )
}

/// The hours that change with readings at `times` (µs): their own, and the next when a value holds into it.
pub fn touched(times: impl IntoIterator<Item = i64>, hold: Duration) -> BTreeSet<Timestamp> {
    times.into_iter().map(Timestamp::from_micros).flat_map(|ts| [ts.hour(), (ts + hold).hour()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: i64 = 60_000_000;
    const HOLD: Duration = Duration::from_secs(15 * 60);

    /// Of one device; hour 1 is the one looked at, and minutes count from its start.
    fn hour_of(kind: Kind, readings: &[(i64, f64, Quality)]) -> Option<HourRow> {
        let meta = Meta {
            site: "s".into(),
            gateway: "g".into(),
            device: "d".into(),
            device_type: "flow".into(),
            asset: None,
            unit: "L/min".into(),
            kind,
        };
        let samples = readings.iter().map(|(minute, value, quality)| Sample {
            ts: HOUR_MICROS + minute * MINUTE,
            value: *value,
            meta: 0,
            quality: *quality,
        });
        let device = DeviceSeries { site: "s", samples: samples.collect(), windows: &[], metas: &[meta] };
        let start = Timestamp::from_micros(HOUR_MICROS);
        let within = start..start + Duration::from_secs(3600);
        let mut rows = hours(&device, &within, HOLD);
        assert!(rows.len() <= 1);
        rows.pop()
    }

    use Quality::{Bad, Good, Uncertain};

    #[test]
    fn values_weigh_by_the_time_that_they_hold() {
        // Readings (minute, value, quality); time-weighted mean; minutes of good value in the hour.
        for (readings, mean, good) in [
            // One value to the end of the hour, and one cut off by the hold.
            (vec![(50, 4.0, Good)], Some(4.0), 10),
            (vec![(10, 4.0, Good)], Some(4.0), 15),
            // A value until the next one: 10 min of 1, 15 min of 3.
            (vec![(0, 1.0, Good), (10, 3.0, Good)], Some(55.0 / 25.0), 25),
            // Uncovered time between does not weigh.
            (vec![(0, 1.0, Good), (30, 3.0, Good)], Some(2.0), 30),
            // A bad reading ends what held before it, and holds nothing itself.
            (vec![(0, 1.0, Good), (5, f64::NAN, Bad), (50, 2.0, Good)], Some(25.0 / 15.0), 15),
            // Uncertain values weigh, but are not good.
            (vec![(0, 1.0, Uncertain), (15, 2.0, Good)], Some(1.5), 15),
            // What came before the hour holds into it, for what is left of its 15 min.
            (vec![(-5, 6.0, Good), (10, 3.0, Good)], Some((60.0 + 45.0) / 25.0), 25),
            (vec![(-5, 6.0, Good), (20, 3.0, Good)], Some((60.0 + 45.0) / 25.0), 25),
            (vec![(-15, 6.0, Good), (50, 3.0, Good)], Some(3.0), 10),
            (vec![(-5, f64::NAN, Bad), (50, 3.0, Good)], Some(3.0), 10),
            // A reading of the next hour ends nothing in this one.
            (vec![(50, 3.0, Good), (61, 9.0, Good)], Some(3.0), 10),
            // Two at the ends of a minute of the hour.
            (vec![(59, 3.0, Good)], Some(3.0), 1),
            (vec![(5, f64::NAN, Bad)], None, 0),
        ] {
            let row = hour_of(Kind::Gauge, &readings).unwrap();
            match (row.time_weighted_mean, mean) {
                (Some(got), Some(mean)) => assert!((got - mean).abs() < 1e-12, "{readings:?}: {got} {mean}"),
                (got, mean) => assert_eq!(got, mean, "{readings:?}"),
            }
            assert!((row.good_ratio - good as f64 / 60.0).abs() < 1e-12, "{readings:?}: {}", row.good_ratio);
            let uncertain = if readings.iter().any(|r| r.2 == Uncertain) { 15 } else { 0 };
            let covered = (good + uncertain) as f64 / 60.0;
            assert!((row.covered_ratio - covered).abs() < 1e-12, "{readings:?}: {}", row.covered_ratio);
        }
    }

    #[test]
    fn counts_are_of_what_is_not_bad() {
        let row = hour_of(
            Kind::Gauge,
            &[
                (-1, 100.0, Good),
                (0, 4.0, Good),
                (1, f64::NAN, Bad),
                (2, 1.0, Uncertain),
                (3, 2.0, Good),
                (4, 9.0, Good),
                (60, 100.0, Good),
            ],
        )
        .unwrap();
        assert_eq!((row.count, row.bad_count), (4, 1));
        assert_eq!((row.min, row.max, row.mean), (Some(1.0), Some(9.0), Some(4.0)));
        assert_eq!((row.first, row.last), (Some(4.0), Some(9.0)));
        assert_eq!(row.p50, Some(3.0));
        assert!((row.p95.unwrap() - 8.25).abs() < 1e-12, "{:?}", row.p95);
        assert!((row.stddev.unwrap() - (38.0_f64 / 3.0).sqrt()).abs() < 1e-12);
        let one = hour_of(Kind::Gauge, &[(0, 4.0, Good)]).unwrap();
        assert_eq!((one.stddev, one.p50, one.p95), (None, Some(4.0), Some(4.0)));
        let bad = hour_of(Kind::Gauge, &[(0, f64::NAN, Bad)]).unwrap();
        assert_eq!((bad.count, bad.bad_count, bad.min, bad.mean, bad.last), (0, 1, None, None, None));
        assert_eq!(hour_of(Kind::Gauge, &[(-1, 1.0, Good), (60, 1.0, Good)]), None);
    }

    #[test]
    fn side_by_side_is_as_one_by_one() {
        for n in 0..40_u8 {
            // Whole numbers of up to 66 bits, of which a plain sum of floats loses the small ones.
            let whole = |at: u8| (i128::from(at) * 7_919 % 101 - 50) << (u32::from(at) * 11 % 60);
            let values: Vec<f64> = (0..n).map(|at| whole(at) as f64).collect();
            let exact: i128 = (0..n).map(whole).sum();
            assert_eq!(Sum::of_each(&values, |value| value).total(), exact as f64, "{n}");
            let mut sorted = values.clone();
            sorted.sort_by(f64::total_cmp);
            assert_eq!(foremost(&values, |a, b| a < b), sorted.first().copied(), "{n}");
            assert_eq!(foremost(&values, |a, b| a > b), sorted.last().copied(), "{n}");
            let rank = |p: f64| {
                let rank = p * sorted.len().checked_sub(1)? as f64;
                let [low, high] = [rank.floor(), rank.ceil()].map(|at| sorted[at as usize]);
                Some(low + (high - low) * rank.fract())
            };
            assert_eq!(
                quantiles(&mut values.clone(), [0.0, 0.5, 0.95, 1.0]),
                [0.0, 0.5, 0.95, 1.0].map(rank),
                "{n}"
            );
        }
    }

    #[test]
    fn counters_rise_and_states_change() {
        // Readings (minute, value); how far a counter went; how often a state changed.
        for (readings, delta, transitions) in [
            (vec![(0, 5.0)], 0.0, 0),
            (vec![(0, 5.0), (1, 7.0), (2, 7.0), (3, 10.0)], 5.0, 2),
            // From before the hour, unless that is too long ago.
            (vec![(-10, 1.0), (0, 5.0)], 4.0, 1),
            (vec![(-16, 1.0), (0, 5.0)], 0.0, 0),
            // A reset begins at zero; 16 and 32 bits roll over.
            (vec![(0, 90.0), (1, 3.0), (2, 5.0)], 5.0, 2),
            (vec![(0, 65_530.0), (1, 4.0)], 10.0, 1),
            (vec![(0, 4_294_967_290.0), (1, 4.0)], 10.0, 1),
            (vec![(0, 60_000.0), (1, 4.0)], 4.0, 1),
        ] {
            let readings: Vec<_> =
                readings.into_iter().map(|(minute, value)| (minute, value, Good)).collect();
            let counter = hour_of(Kind::Counter, &readings).unwrap();
            assert_eq!((counter.delta, counter.transitions), (Some(delta), None), "{readings:?}");
            assert_eq!((counter.mean, counter.stddev, counter.p50, counter.p95), (None, None, None, None));
            let state = hour_of(Kind::State, &readings).unwrap();
            assert_eq!((state.delta, state.transitions), (None, Some(transitions)), "{readings:?}");
            assert_eq!((state.mean, state.stddev, state.p50, state.p95), (None, None, None, None));
            assert_eq!(state.last, readings.last().map(|r| r.1));
        }
        let with_bad = [(0, 5.0, Good), (1, f64::NAN, Bad), (2, 7.0, Good)];
        assert_eq!(hour_of(Kind::Counter, &with_bad).unwrap().delta, Some(2.0));
    }

    #[test]
    fn a_reading_touches_its_hour_and_that_into_which_it_holds() {
        let touched = |minute: i64| {
            let hours = touched([HOUR_MICROS + minute * MINUTE], HOLD);
            hours.into_iter().map(|hour| hour.as_micros() / HOUR_MICROS).collect::<Vec<_>>()
        };
        assert_eq!(touched(0), [1]);
        assert_eq!(touched(44), [1]);
        assert_eq!(touched(45), [1, 2]);
        assert_eq!(touched(59), [1, 2]);
        assert_eq!(touched(-1), [0, 1]);
    }

    #[test]
    fn rows_fit_the_table() {
        let row = hour_of(Kind::Gauge, &[(0, 4.0, Good)]).unwrap();
        let batch = batch(vec![row], Timestamp::from_micros(7)).unwrap();
        assert_eq!(batch.num_rows(), 1);
    }
}
