//! The shell around hours and minutes: which hours were touched, their readings, their rows.
//!
//! Both tables are made in one pass, then days and health, which are made of them. Progress is the version of
//! `silver/sensor_readings`; the refiner commits that table last of a plan, so what the other tables hold of the plans
//! named in its new commits is there.
//! Many touched hours are taken in blocks of [`BLOCK_HOURS`], or fewer where they have many rows: each block is
//! published by itself, the last one with the progress, so memory is bounded ([`super::parts`]) and a crash repeats work
//! only.
//!
//! Hours of which retention has removed readings or rows are final: they are neither computed again nor missed
//! ([`floor`]).

use std::{collections::BTreeSet, ops::Range, time::Duration};

use anyhow::Context;
use arrow::{array::RecordBatch, compute::concat_batches};
use common::time::{HOUR_MICROS, Timestamp};
use deltalake::DeltaTable;

use super::{
    GoldSettings,
    calendar::Calendars,
    changes::{self, Changes},
    daily, health, hourly,
    minutes::{self, floor_minute},
    parts::{self, Chosen, Part},
    publish::{self, Keyed, Progress, SILVER},
    scan::{self, Scan},
    series::{AGGREGATE_COLUMNS, READING_COLUMNS, Series, SeriesBuilder},
};
use crate::{lake::Table, tables::Tables};

/// Hours that are published together.
const BLOCK_HOURS: usize = 48;
/// Rows of minutes at which a part of a block is published by itself. Tests take all paths.
const MINUTE_ROWS: usize = if cfg!(test) { 100 } else { 500_000 };
/// Spans of hours in one commit; nearer ones are joined beyond this, so that a predicate stays short.
const MAX_SPANS: usize = 32;

const HOURLY: Keyed = Keyed {
    table: Table::HourlyAggregates,
    time: Some("hour"),
    closed: None,
    key: &["hour", "site", "device_id"],
};
pub(super) const MINUTES: Keyed = Keyed {
    table: Table::Timeseries1m,
    time: Some("time"),
    closed: None,
    key: &["time", "site", "device_id"],
};

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowsDone {
    /// Hours computed.
    pub hours: usize,
    /// Rows of `gold/hourly_aggregates` that came, changed or went.
    pub hourly: usize,
    /// Rows of `gold/timeseries_1m` that came, changed or went.
    pub minutes: usize,
    /// Rows of `gold/daily_aggregates` that came, changed or went.
    pub days: usize,
    /// Rows of `gold/asset_health` that came, changed or went.
    pub health: usize,
}

/// What hours are made of, and what health is made of beside them.
pub(super) struct Silver {
    pub(super) readings: DeltaTable,
    pub(super) aggregates: Option<DeltaTable>,
    pub(super) anomalies: Option<DeltaTable>,
}

impl Silver {
    pub(super) async fn newest(tables: &Tables) -> anyhow::Result<Option<Silver>> {
        let Some(readings) = tables.snapshot(Table::SensorReadings).await? else { return Ok(None) };
        let aggregates = tables.snapshot(Table::Aggregates).await?;
        Ok(Some(Silver { readings, aggregates, anomalies: tables.snapshot(Table::Anomalies).await? }))
    }

    /// Of the readings.
    pub(super) fn version(&self) -> i64 {
        changes::version(&self.readings)
    }

    /// Everything of a part, from `hold` before it on.
    pub(super) async fn read(&self, part: &Part, hold: Duration) -> anyhow::Result<Series> {
        let mut builder = SeriesBuilder::default();
        let scans = self.scans(&part.within, hold, part.of.clone());
        for (of, readings) in scans.iter().zip([true, false]) {
            let add = |batch: &RecordBatch| {
                if readings { builder.readings(batch) } else { builder.aggregates(batch) }
            };
            scan::scan(of, add).await?;
        }
        Ok(builder.finish())
    }

    /// The rows of parts, of minutes those of `from` and later; `None` if earlier ones may be others than before, too.
    async fn make(
        &self,
        parts: &[Part],
        from: Option<Timestamp>,
        hold: Duration,
        now: Timestamp,
    ) -> anyhow::Result<Option<Made>> {
        let mut made = Made::default();
        for part in parts {
            let series = self.read(part, hold).await?;
            if from.is_some_and(|from| !series.is_settled_before(from.as_micros())) {
                return Ok(None);
            }
            let start = from.map_or(part.within.start, |from| from.clamp(part.within.start, part.within.end));
            made.add(&part.within, &(start..part.within.end), &series, hold, now)?;
        }
        Ok(Some(made))
    }

    /// Readings, then aggregates if there are any.
    pub(super) fn scans(
        &self,
        within: &Range<Timestamp>,
        hold: Duration,
        of: Option<Chosen>,
    ) -> Vec<Scan<'_>> {
        let span = within.start - hold..within.end;
        let readings = Scan {
            snapshot: &self.readings,
            columns: &READING_COLUMNS,
            time: "ts",
            span: span.clone(),
            of: of.clone(),
        };
        let aggregates = self.aggregates.as_ref().map(|aggregates| Scan {
            snapshot: aggregates,
            columns: &AGGREGATE_COLUMNS,
            time: "window_start",
            span,
            of,
        });
        std::iter::once(readings).chain(aggregates).collect()
    }
}

/// The versions of silver that the tables have; `None` for what has to be made from the start.
struct Known {
    /// Hours and minutes.
    windows: Option<i64>,
    days: Option<i64>,
    health: Option<i64>,
}

impl Known {
    async fn of(tables: &Tables, calendars: &Calendars) -> anyhow::Result<Known> {
        let windows = match (progress(tables, HOURLY).await?, progress(tables, MINUTES).await?) {
            (Some(hours), Some(minutes)) => Some(hours.min(minutes)),
            _ => None,
        };
        let days = daily::progress(tables, calendars).await?;
        Ok(Known { windows, days, health: progress(tables, health::HEALTH).await? })
    }

    /// What all tables have that are not to be made from the start, unless hours are; computing again does no harm.
    fn least(&self) -> Option<i64> {
        Some([self.days, self.health].into_iter().flatten().fold(self.windows?, i64::min))
    }

    fn greatest(&self) -> Option<i64> {
        self.windows.max(self.days).max(self.health)
    }
}

/// What there is to compute.
#[derive(Default)]
pub(super) struct Due {
    pub(super) hours: BTreeSet<Timestamp>,
    /// Minutes before this one are as they were, unless a gateway spoke first in its hour ([`Series::is_settled_before`]).
    from: Option<Timestamp>,
    /// Events that begin in this hour or later have other records than before.
    pub(super) events_from: Option<Timestamp>,
}

pub(super) async fn step(
    tables: &Tables,
    settings: &GoldSettings,
    now: Timestamp,
) -> anyhow::Result<WindowsDone> {
    let mut done = WindowsDone::default();
    // Before silver, which then has no older version than another refiner's gold.
    let mut known = Known::of(tables, &settings.calendars).await?;
    let Some(silver) = Silver::newest(tables).await? else { return Ok(done) };
    let version = silver.version();
    if known.greatest() > Some(version) {
        take_back(tables).await.context("gold of another lake")?;
        known = Known { windows: None, days: None, health: None };
    }
    if [known.windows, known.days, known.health] == [Some(version); 3] {
        return Ok(done);
    }
    let due = due(tables, known.least(), &silver, settings.hold).await?;
    let blocks = blocks(&due.hours);
    if blocks.is_empty() {
        for keyed in [HOURLY, MINUTES] {
            publish::nothing(tables, keyed, version, now).await?;
        }
    }
    for (n, block) in blocks.iter().enumerate() {
        let chunks: Vec<_> = publish::spans(block).iter().flat_map(parts::chunks).collect();
        let mut made = Made::default();
        for (m, chunk) in chunks.iter().enumerate() {
            let parts = silver.parts(chunk, settings.hold).await?;
            let mut from = due.from;
            let of_chunk = loop {
                match silver.make(&parts, from, settings.hold, now).await? {
                    Some(made) => break made,
                    None => from = None,
                }
            };
            made.extend(of_chunk);
            let of_block = m + 1 == chunks.len();
            let last = of_block && n + 1 == blocks.len();
            if of_block || made.minute_rows() >= MINUTE_ROWS {
                let progress = Progress::of(version, last);
                let (hourly, minutes) = std::mem::take(&mut made).publish(tables, progress, now).await?;
                done.hourly += hourly;
                done.minutes += minutes;
            }
        }
        done.hours += block.len();
    }
    let touched = known.days.map(|_| &due.hours);
    done.days = daily::step(tables, &silver, settings, touched, now).await.context("days")?;
    let touched = known.health.map(|_| &due);
    done.health = health::step(tables, &silver, settings, touched, now).await.context("health")?;
    Ok(done)
}

/// Rows that are published together.
#[derive(Default)]
struct Made {
    hours: Vec<RecordBatch>,
    hour_spans: Vec<Range<Timestamp>>,
    minutes: Vec<RecordBatch>,
    minute_spans: Vec<Range<Timestamp>>,
}

impl Made {
    /// Takes the rows of a span of hours and of one of minutes, or of a part of their devices.
    fn add(
        &mut self,
        of_hours: &Range<Timestamp>,
        of_minutes: &Range<Timestamp>,
        series: &Series,
        hold: Duration,
        now: Timestamp,
    ) -> anyhow::Result<()> {
        let (mut hours, mut minutes) = (Vec::new(), Vec::new());
        for device in series.devices() {
            hours.extend(hourly::hours(&device, of_hours, hold));
            minutes.extend(minutes::minutes(&device, of_minutes));
        }
        self.hours.push(hourly::batch(hours, now)?);
        self.minutes.push(minutes::batch(&minutes, &series.metas)?);
        reach(&mut self.hour_spans, of_hours);
        reach(&mut self.minute_spans, of_minutes);
        Ok(())
    }

    fn extend(&mut self, later: Made) {
        self.hours.extend(later.hours);
        self.minutes.extend(later.minutes);
        later.hour_spans.iter().for_each(|span| reach(&mut self.hour_spans, span));
        later.minute_spans.iter().for_each(|span| reach(&mut self.minute_spans, span));
    }

    fn minute_rows(&self) -> usize {
        self.minutes.iter().map(RecordBatch::num_rows).sum()
    }

    /// Returns the changed rows of hours and minutes.
    async fn publish(
        self,
        tables: &Tables,
        progress: Progress,
        now: Timestamp,
    ) -> anyhow::Result<(usize, usize)> {
        let hours = concat_batches(&HOURLY.table.schema(), &self.hours)?;
        let hourly = publish::publish(tables, HOURLY, &self.hour_spans, hours, progress, now).await?;
        let minutes = concat_batches(&MINUTES.table.schema(), &self.minutes)?;
        drop(self.minutes);
        Ok((hourly, publish::publish(tables, MINUTES, &self.minute_spans, minutes, progress, now).await?))
    }
}

/// Adds a span that begins no earlier than the last.
fn reach(spans: &mut Vec<Range<Timestamp>>, span: &Range<Timestamp>) {
    match spans.last_mut() {
        Some(last) if last.end >= span.start => last.end = span.end,
        _ => spans.push(span.clone()),
    }
}

/// The first hour that is not final: of those before it, retention has removed what they were made of, or them.
pub(crate) async fn floor(
    tables: &Tables,
    readings: &DeltaTable,
    aggregates: Option<&DeltaTable>,
    hold: Duration,
) -> anyhow::Result<Option<Timestamp>> {
    let mut floor = None;
    for silver in [Some(readings), aggregates].into_iter().flatten() {
        // The hour after holds values from before.
        let first =
            |cutoff: Timestamp| Timestamp::from_micros((cutoff + hold).as_micros() - 1 + HOUR_MICROS).hour();
        floor = floor.max(Tables::retained(silver).await?.map(first));
    }
    for keyed in [HOURLY, MINUTES] {
        if let Some(gold) = tables.snapshot(keyed.table).await? {
            floor = floor.max(Tables::retained(&gold).await?);
        }
    }
    Ok(floor)
}

/// The hours that gold has yet to compute; all of them when it cannot tell.
pub(crate) async fn pending(
    tables: &Tables,
    calendars: &Calendars,
    hold: Duration,
) -> anyhow::Result<BTreeSet<Timestamp>> {
    let Some(silver) = Silver::newest(tables).await? else { return Ok(BTreeSet::new()) };
    let known = Known::of(tables, calendars).await?.least();
    if known == Some(silver.version()) {
        return Ok(BTreeSet::new());
    }
    let mut due = due(tables, known, &silver, hold).await?;
    if let (Some(from), Some(hours)) = (due.events_from, tables.snapshot(HOURLY.table).await?) {
        due.hours.extend(health::hours_from(&hours, from).await?);
    }
    Ok(due.hours)
}

/// What was touched and is not final.
async fn due(tables: &Tables, known: Option<i64>, silver: &Silver, hold: Duration) -> anyhow::Result<Due> {
    let mut due = touched(tables, known, silver, hold).await?;
    if let Some(floor) = floor(tables, &silver.readings, silver.aggregates.as_ref(), hold).await? {
        due.hours = due.hours.split_off(&floor);
    }
    Ok(due)
}

/// Says that no table has anything of this silver.
pub(super) async fn take_back(tables: &Tables) -> anyhow::Result<()> {
    for keyed in [HOURLY, MINUTES, daily::DAILY, health::HEALTH] {
        if let Some(gold) = tables.snapshot(keyed.table).await? {
            tables.append(keyed.table, Some(gold), Vec::new(), (SILVER, publish::NONE)).await?;
        }
    }
    Ok(())
}

/// The version of silver that a table has.
async fn progress(tables: &Tables, keyed: Keyed) -> anyhow::Result<Option<i64>> {
    match tables.snapshot(keyed.table).await? {
        Some(snapshot) => Tables::progress(&snapshot, SILVER).await,
        None => Ok(None),
    }
}

async fn touched(
    tables: &Tables,
    known: Option<i64>,
    silver: &Silver,
    hold: Duration,
) -> anyhow::Result<Due> {
    let Silver { readings, aggregates, anomalies } = silver;
    if let Some(known) = known
        && let Some(came) = changes::after(readings, known, "ts").await?
        && let Some(windows) = since_plan(aggregates.as_ref(), came.first_plan, "window_start").await?
        && let Some(records) = since_plan(anomalies.as_ref(), came.first_plan, "started_at").await?
    {
        let mut due = Due { hours: came.hours(readings, "ts", hold).await?, ..Due::default() };
        let mut first = came.first(readings, "ts")?;
        if let Some(aggregates) = aggregates {
            due.hours.extend(windows.hours(aggregates, "window_start", hold).await?);
            first = first.min(windows.first(aggregates, "window_start")?);
        }
        due.from = (first > i64::MIN).then(|| Timestamp::from_micros(floor_minute(first)));
        if let Some(anomalies) = anomalies {
            due.events_from = records.hours(anomalies, "started_at", Duration::ZERO).await?.first().copied();
        }
        return Ok(due);
    }
    // Everything, and what gold has beyond that, which has to go.
    let mut hours = changes::hours_in(readings, None, "ts", hold).await?;
    if let Some(aggregates) = aggregates {
        hours.extend(changes::hours_in(aggregates, None, "window_start", hold).await?);
    }
    for keyed in [HOURLY, MINUTES, daily::DAILY, health::HEALTH] {
        if let (Some(gold), Some(time)) = (tables.snapshot(keyed.table).await?, keyed.time) {
            hours.extend(changes::hours_in(&gold, None, time, Duration::ZERO).await?);
        }
    }
    Ok(Due { hours, ..Due::default() })
}

/// What came to a table with a plan and those after it.
async fn since_plan(
    table: Option<&DeltaTable>,
    plan: Option<i64>,
    time: &str,
) -> anyhow::Result<Option<Changes>> {
    match (table, plan) {
        (Some(table), Some(plan)) => changes::with_plan(table, plan, time).await,
        _ => Ok(Some(Changes::default())),
    }
}

/// Cuts touched hours into blocks, each of few spans.
pub(super) fn blocks(touched: &BTreeSet<Timestamp>) -> Vec<BTreeSet<Timestamp>> {
    let hours: Vec<Timestamp> = touched.iter().copied().collect();
    hours
        .chunks(BLOCK_HOURS)
        .map(|block| {
            let mut block: BTreeSet<Timestamp> = block.iter().copied().collect();
            let mut gap = 1;
            while publish::spans(&block).len() > MAX_SPANS {
                join(&mut block, gap);
                gap *= 2;
            }
            block
        })
        .collect()
}

/// Adds the hours of gaps of at most `gap` hours.
fn join(block: &mut BTreeSet<Timestamp>, gap: i64) {
    let hours: Vec<i64> = block.iter().map(|hour| hour.as_micros()).collect();
    for pair in hours.windows(2) {
        if pair[1] - pair[0] <= (gap + 1) * HOUR_MICROS {
            let between = (1..).map(|n| pair[0] + n * HOUR_MICROS).take_while(|hour| *hour < pair[1]);
            block.extend(between.map(Timestamp::from_micros));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hour(n: i64) -> Timestamp {
        Timestamp::from_micros(n * HOUR_MICROS)
    }

    #[test]
    fn blocks_have_few_spans_and_hold_every_hour() {
        let touched: BTreeSet<Timestamp> = (0..100).map(|n| hour(n * 3)).collect();
        let blocks = blocks(&touched);
        assert_eq!(blocks.len(), 3);
        for block in &blocks {
            assert!(publish::spans(block).len() <= MAX_SPANS);
        }
        let held: BTreeSet<Timestamp> = blocks.into_iter().flatten().collect();
        assert!(touched.is_subset(&held));
    }
}
