//! `gold/daily_aggregates`: one row for each device and local day, and one for each shift of it, in which the device
//! has readings.
//!
//! Days and shifts are those of the site's [`Calendars`]: `shift` is null for the whole day, `starts_at` and `ends_at`
//! are instants, so `ends_at - starts_at` is 23, 24 or 25 hours. Columns mean what they mean in
//! [`gold/hourly_aggregates`](super::hourly), over `[starts_at, ends_at)` in the place of the hour:
//!
//! * `count`, `bad_count`, `delta` and `transitions` are sums of the hours', `min` and `max` their extremes, `first`
//!   and `last` the first and last that there is. `delta` and `transitions` are null when those of any hour are;
//! * `mean` weighs by count, `stddev` of the sample is pooled around it; both are over the hours that have a mean,
//!   which for gauges are those that count anything;
//! * `time_weighted_mean` weighs the hours' by `covered_ratio`; `good_ratio` and `covered_ratio` are parts of the
//!   whole day or shift, so an open one has low ones. What holds into an hour without a reading, which has no row,
//!   does not count here either;
//! * quantiles do not add up, so there are none;
//! * `source` is `mixed` unless all hours are of one kind; texts are those of the last hour.
//!
//! So counts, extremes, means and deviations equal what the readings of the day themselves give. Full hours are taken
//! from `gold/hourly_aggregates`; where a day or a shift begins or ends within an hour (half-hour and 45-minute zones,
//! shifts at 6:30), its part of that hour is computed from silver in the way in which hours are.
//!
//! The txn `calendars` says by which calendars the table was made; when they change, all of it is made again. Days
//! that begin before the first hour that is not final ([`super::windows`]) are final, too.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use arrow::{
    array::{
        Array, ArrayRef, Date32Array, Float64Array, Int64Array, RecordBatch, StringArray,
        TimestampMicrosecondArray,
    },
    error::ArrowError,
};
use chrono::Datelike;
use common::time::{HOUR_MICROS, Timestamp};
use deltalake::DeltaTable;

use super::{
    GoldSettings,
    calendar::{Calendars, Window},
    changes,
    hourly::{self, HourRow, Sum},
    publish::{self, Keyed, Progress, SILVER},
    series::{Source, floats, ints, micros, text},
    windows::{self, Silver},
};
use crate::{lake::Table, tables::Tables};

pub(super) const DAILY: Keyed = Keyed {
    table: Table::DailyAggregates,
    time: Some("starts_at"),
    closed: Some("ends_at"),
    key: &["day", "shift", "site", "device_id"],
};
/// App id of the calendars by which the table was made.
const CALENDARS: &str = "calendars";
/// Hours in which days or shifts begin that are published together.
const BLOCK_STARTS: usize = 4;

/// What is known of a device in an hour, or in a part of one. Times are µs.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Part {
    at: i64,
    count: i64,
    min: Option<f64>,
    max: Option<f64>,
    mean: Option<f64>,
    time_weighted_mean: Option<f64>,
    stddev: Option<f64>,
    first: Option<f64>,
    last: Option<f64>,
    bad_count: i64,
    good: f64,
    covered: f64,
    delta: Option<f64>,
    transitions: Option<i64>,
    source: Source,
}

impl Part {
    fn of(row: &HourRow, length: f64) -> Part {
        Part {
            at: row.hour.as_micros(),
            count: row.count,
            min: row.min,
            max: row.max,
            mean: row.mean,
            time_weighted_mean: row.time_weighted_mean,
            stddev: row.stddev,
            first: row.first,
            last: row.last,
            bad_count: row.bad_count,
            good: row.good_ratio * length,
            covered: row.covered_ratio * length,
            delta: row.delta,
            transitions: row.transitions,
            source: row.source,
        }
    }
}

/// One part of the parts of a day or shift, which are in the order of time.
fn together(parts: &[Part]) -> Option<Part> {
    let first = parts.first()?;
    let gauged = || parts.iter().filter_map(|p| Some((p.count as f64, p.mean?, p.stddev.unwrap_or(0.0))));
    let n: f64 = gauged().map(|(n, ..)| n).sum();
    let mean = (n > 0.0).then(|| Sum::of(gauged().map(|(n, mean, _)| n * mean)) / n);
    let stddev = mean.filter(|_| n > 1.0).map(|mean| {
        let squares = gauged().map(|(n, m, s)| (n - 1.0) * s * s + n * (m - mean) * (m - mean));
        (Sum::of(squares) / (n - 1.0)).sqrt()
    });
    let held = || parts.iter().filter_map(|p| Some((p.covered, p.time_weighted_mean?)));
    let weight = Sum::of(held().map(|(time, _)| time));
    let weighted = Sum::of(held().map(|(time, mean)| time * mean));
    let deltas: Option<Vec<f64>> = parts.iter().map(|p| p.delta).collect();
    Some(Part {
        at: first.at,
        count: parts.iter().map(|p| p.count).sum(),
        min: parts.iter().filter_map(|p| p.min).reduce(f64::min),
        max: parts.iter().filter_map(|p| p.max).reduce(f64::max),
        mean,
        time_weighted_mean: (weight > 0.0).then(|| weighted / weight),
        stddev,
        first: parts.iter().find_map(|p| p.first),
        last: parts.iter().rev().find_map(|p| p.last),
        bad_count: parts.iter().map(|p| p.bad_count).sum(),
        good: Sum::of(parts.iter().map(|p| p.good)),
        covered: Sum::of(parts.iter().map(|p| p.covered)),
        delta: deltas.map(Sum::of),
        transitions: parts.iter().map(|p| p.transitions).sum(),
        source: if parts.iter().all(|p| p.source == first.source) { first.source } else { Source::Mixed },
    })
}

/// The version of silver that the table has; `None` when it has to be made from the start.
pub(super) async fn progress(tables: &Tables, calendars: &Calendars) -> anyhow::Result<Option<i64>> {
    let Some(gold) = tables.snapshot(DAILY.table).await? else { return Ok(None) };
    if made_by(&gold, calendars).await? { Tables::progress(&gold, SILVER).await } else { Ok(None) }
}

/// Whether a table was made by these calendars.
pub(crate) async fn made_by(gold: &DeltaTable, calendars: &Calendars) -> anyhow::Result<bool> {
    Ok(Tables::progress(gold, CALENDARS).await? == Some(calendars.fingerprint()))
}

/// Makes the days and shifts that overlap the hours in `touched`; all of them with `None`. Hours must be up to date
/// with `silver`. Returns how many rows came, changed or went.
pub(super) async fn step(
    tables: &Tables,
    silver: &Silver,
    settings: &GoldSettings,
    touched: Option<&BTreeSet<Timestamp>>,
    now: Timestamp,
) -> anyhow::Result<usize> {
    let Some(hours) = tables.snapshot(Table::HourlyAggregates).await? else { return Ok(0) };
    let (calendars, version) = (&settings.calendars, silver.version());
    let floor = windows::floor(tables, &silver.readings, silver.aggregates.as_ref(), settings.hold).await?;
    let all;
    let touched = if let Some(touched) = touched {
        touched
    } else {
        clear(tables, calendars, floor).await?;
        all = changes::hours_in(&hours, None, "hour", Duration::ZERO).await?;
        &all
    };
    let touched = publish::spans(touched);
    let starts: BTreeSet<Timestamp> =
        calendars.windows(&touched).into_iter().map(|(_, w)| w.span.start).collect();
    let starts: BTreeSet<Timestamp> =
        starts.into_iter().filter(|at| floor.is_none_or(|floor| *at >= floor)).map(Timestamp::hour).collect();
    let starts: Vec<Timestamp> = starts.into_iter().collect();
    let mut changed = 0;
    for block in starts.chunks(BLOCK_STARTS) {
        let spans = publish::spans(&block.iter().copied().collect());
        let days = days(&hours, silver, settings, &spans, now).await?;
        let progress = Progress::of(version, block.last() == starts.last());
        changed += publish::publish(tables, DAILY, &spans, days, progress, now).await?;
    }
    if starts.is_empty() {
        publish::nothing(tables, DAILY, version, now).await?;
    }
    let gold = tables.snapshot(DAILY.table).await?;
    if let Some(gold) = gold
        && !made_by(&gold, calendars).await?
    {
        tables.append(DAILY.table, Some(gold), Vec::new(), (CALENDARS, calendars.fingerprint())).await?;
    }
    Ok(changed)
}

/// Removes what other calendars made, so that no day stands there twice; what is final stays.
async fn clear(tables: &Tables, calendars: &Calendars, floor: Option<Timestamp>) -> anyhow::Result<()> {
    let Some(gold) = tables.snapshot(DAILY.table).await? else { return Ok(()) };
    if made_by(&gold, calendars).await? || Tables::progress(&gold, SILVER).await?.is_none() {
        return Ok(());
    }
    let predicate = floor.map(|floor| format!("starts_at >= '{floor}'"));
    // Until everything is made again the table has nothing of silver.
    tables
        .replace(DAILY.table, Some(gold), predicate.as_deref(), Vec::new(), (SILVER, publish::NONE))
        .await?;
    Ok(())
}

/// Of a site: a window, and what of an hour lies in it.
type PartOfHour<'a> = (Option<&'a str>, usize, Range<Timestamp>);

/// The rows of all days and shifts that begin within `spans`, which are of full hours.
async fn days(
    hours: &DeltaTable,
    silver: &Silver,
    settings: &GoldSettings,
    spans: &[Range<Timestamp>],
    now: Timestamp,
) -> anyhow::Result<RecordBatch> {
    let mut days = Collected::default();
    let mut windows: Vec<Window> = Vec::new();
    // By site and hour: the windows that have all of it. By hour: those that have a part of it.
    let mut whole: HashMap<(Option<&str>, Timestamp), Vec<usize>> = HashMap::new();
    let mut parts: BTreeMap<Timestamp, Vec<PartOfHour<'_>>> = BTreeMap::new();
    for (site, window) in settings.calendars.windows(spans) {
        if spans.iter().any(|span| span.contains(&window.span.start)) {
            let at = windows.len();
            window.hours().for_each(|hour| whole.entry((site, hour)).or_default().push(at));
            for (hour, part) in window.part_hours() {
                parts.entry(hour).or_default().push((site, at, part));
            }
            windows.push(window);
        }
    }
    let named = |site: &str| settings.calendars.named(site);
    let full = publish::spans(&whole.keys().map(|(_, hour)| *hour).collect());
    let context = changes::context(&[("t", Some(hours), None)]).await?;
    let sql = format!("SELECT * FROM t WHERE {}", publish::predicate("hour", &full));
    for batch in context.sql(&sql).await?.collect().await? {
        days.hours(&batch, |site, hour| whole.get(&(named(site), hour)).map_or(&[][..], Vec::as_slice))?;
    }
    let hold = i64::try_from(settings.hold.as_micros()).unwrap_or(HOUR_MICROS);
    for (hour, parts) in parts {
        let within = hour..Timestamp::from_micros(hour.as_micros() + HOUR_MICROS);
        for part in silver.parts(&within, settings.hold).await? {
            let series = silver.read(&part, settings.hold).await?;
            for device in series.devices() {
                for (_, at, part) in parts.iter().filter(|(site, ..)| *site == named(device.site)) {
                    let span = part.start.as_micros()..part.end.as_micros();
                    if let Some(row) = hourly::row(&device, &span, hold) {
                        days.part(*at, &row, (span.end - span.start) as f64);
                    }
                }
            }
        }
    }
    Ok(days.batch(&windows, now)?)
}

/// Parts of days and shifts, by site, device, and the window's place in a list.
#[derive(Default)]
struct Collected(BTreeMap<(String, String), Days>);

type Days = BTreeMap<usize, (Texts, Vec<Part>)>;

/// As of an instant (µs): of all that there are, the last ones count.
#[derive(Clone, Debug)]
struct Texts {
    at: i64,
    device_type: String,
    asset: Option<String>,
    unit: String,
}

impl Collected {
    fn add(&mut self, site: &str, device: &str, window: usize, part: Part, texts: impl Fn() -> Texts) {
        let days = self.0.entry((site.to_owned(), device.to_owned())).or_default();
        let (known, parts) = days.entry(window).or_insert_with(|| (texts(), Vec::new()));
        if known.at < part.at {
            *known = texts();
        }
        parts.push(part);
    }

    fn part(&mut self, window: usize, row: &HourRow, length: f64) {
        let meta = &row.meta;
        let texts = || Texts {
            at: row.hour.as_micros(),
            device_type: meta.device_type.clone(),
            asset: meta.asset.clone(),
            unit: meta.unit.clone(),
        };
        self.add(&meta.site, &meta.device, window, Part::of(row, length), texts);
    }

    /// Rows of gold/hourly_aggregates, each for the windows that `windows` says for its site and hour.
    fn hours<'a>(
        &mut self,
        batch: &RecordBatch,
        windows: impl Fn(&str, Timestamp) -> &'a [usize],
    ) -> anyhow::Result<()> {
        let hours = micros(batch, "hour")?;
        let texts = |name: &str| text(batch, name);
        let (site, device, device_type) = (texts("site")?, texts("device_id")?, texts("device_type")?);
        let (asset, unit, source) = (texts("asset_id")?, texts("unit")?, texts("source")?);
        let number = |name: &str| floats(batch, name);
        let (min, max, mean, stddev) = (number("min")?, number("max")?, number("mean")?, number("stddev")?);
        let (first, last, by_time) = (number("first")?, number("last")?, number("time_weighted_mean")?);
        let (good, covered, delta) = (number("good_ratio")?, number("covered_ratio")?, number("delta")?);
        let (count, bad) = (ints(batch, "count")?, ints(batch, "bad_count")?);
        let transitions = ints(batch, "transitions")?;
        let at = |array: &Float64Array, row: usize| (!array.is_null(row)).then(|| array.value(row));
        for row in 0..batch.num_rows() {
            let hour = hours.value(row);
            let part = Part {
                at: hour,
                count: count.value(row),
                min: at(&min, row),
                max: at(&max, row),
                mean: at(&mean, row),
                time_weighted_mean: at(&by_time, row),
                stddev: at(&stddev, row),
                first: at(&first, row),
                last: at(&last, row),
                bad_count: bad.value(row),
                good: good.value(row) * HOUR_MICROS as f64,
                covered: covered.value(row) * HOUR_MICROS as f64,
                delta: at(&delta, row),
                transitions: (!transitions.is_null(row)).then(|| transitions.value(row)),
                source: Source::of(source.value(row)),
            };
            let texts = || Texts {
                at: hour,
                device_type: device_type.value(row).to_owned(),
                asset: (!asset.is_null(row)).then(|| asset.value(row).to_owned()),
                unit: unit.value(row).to_owned(),
            };
            for window in windows(site.value(row), Timestamp::from_micros(hour)) {
                self.add(site.value(row), device.value(row), *window, part, texts);
            }
        }
        Ok(())
    }

    /// The table's rows; `revision` 0 and `updated_at` `now`, which publishing sets right.
    fn batch(self, windows: &[Window], now: Timestamp) -> Result<RecordBatch, ArrowError> {
        let mut rows: Vec<Row<'_>> = Vec::new();
        for ((site, device), days) in self.0 {
            for (window, (texts, mut parts)) in days {
                parts.sort_unstable_by_key(|p| p.at);
                let Some(all) = together(&parts) else { continue };
                let (site, device) = (site.clone(), device.clone());
                rows.push(Row { window: &windows[window], site, device, texts, all });
            }
        }
        rows.sort_by(|a, b| {
            let key = |r: &'_ Row<'_>| r.window.span.start;
            key(a).cmp(&key(b)).then_with(|| (&a.site, &a.device).cmp(&(&b.site, &b.device)))
        });
        columns(&rows, now)
    }
}

struct Row<'a> {
    window: &'a Window,
    site: String,
    device: String,
    texts: Texts,
    all: Part,
}

impl Row<'_> {
    /// A part of the whole day or shift.
    fn ratio(&self, time: f64) -> f64 {
        time / (self.window.span.end.as_micros() - self.window.span.start.as_micros()) as f64
    }
}

fn columns(rows: &[Row<'_>], now: Timestamp) -> Result<RecordBatch, ArrowError> {
    let instants = |of: &dyn Fn(&Row<'_>) -> Timestamp| -> ArrayRef {
        let instants = rows.iter().map(|r| of(r).as_micros());
        Arc::new(TimestampMicrosecondArray::from_iter_values(instants).with_timezone("UTC"))
    };
    let texts = |of: &dyn Fn(&Row<'_>) -> Option<String>| -> ArrayRef {
        Arc::new(rows.iter().map(of).collect::<StringArray>())
    };
    let floats = |of: &dyn Fn(&Row<'_>) -> Option<f64>| -> ArrayRef {
        Arc::new(rows.iter().map(of).collect::<Float64Array>())
    };
    let ints = |of: &dyn Fn(&Row<'_>) -> Option<i64>| -> ArrayRef {
        Arc::new(rows.iter().map(of).collect::<Int64Array>())
    };
    let since_1970 = |r: &Row<'_>| r.window.day.to_epoch_days();
    RecordBatch::try_new(
        DAILY.table.schema(),
        vec![
            Arc::new(Date32Array::from_iter_values(rows.iter().map(since_1970))),
            texts(&|r| r.window.shift.clone()),
            instants(&|r| r.window.span.start),
            instants(&|r| r.window.span.end),
            texts(&|r| Some(r.device.clone())),
            texts(&|r| Some(r.texts.device_type.clone())),
            texts(&|r| r.texts.asset.clone()),
            texts(&|r| Some(r.site.clone())),
            texts(&|r| Some(r.texts.unit.clone())),
            ints(&|r| Some(r.all.count)),
            floats(&|r| r.all.min),
            floats(&|r| r.all.max),
            floats(&|r| r.all.mean),
            floats(&|r| r.all.time_weighted_mean),
            floats(&|r| r.all.stddev),
            floats(&|r| r.all.first),
            floats(&|r| r.all.last),
            ints(&|r| Some(r.all.bad_count)),
            floats(&|r| Some(r.ratio(r.all.good))),
            floats(&|r| Some(r.ratio(r.all.covered))),
            floats(&|r| r.all.delta),
            ints(&|r| r.all.transitions),
            texts(&|r| Some(r.all.source.as_str().to_owned())),
            ints(&|_| Some(0)),
            instants(&|_| now),
            ints(&|r| Some(r.window.day.year().into())),
            ints(&|r| Some(r.window.day.month().into())),
        ],
    )
}
