//! `cloud-ingest rebuild`: silver and gold from bronze, and whether they are what stands there.
//!
//! The plans are replayed in their order, each with the rules that it names, into the tables of another lake, by the
//! refiner's own code; then gold takes its step on that. A rebuild that was interrupted goes on where it was.
//!
//! * What a plan names and bronze no longer holds (retention, loss) is listed, and its rows are **taken over** from
//!   silver as it stands, before anything is replayed: a reading that stands in silver is the first of its key, so
//!   what is replayed around it is told apart from it as it was then. With `from`, so are the rows of all plans before.
//! * Up to the newest plan that is done when it begins, or to the last one before `to`: rows of later plans are left
//!   out of the comparison, and so are the hours of gold that they touch or that gold has yet to compute. So it may
//!   run beside a refiner.
//! * Plans that judge quarantine again are replayed in their turn. Of what was taken over nothing is judged again: its
//!   rows stand as they came out in the end.
//! * Rows, hours and days from before retention's cutoff are left out; a new lake takes gold's over as they stand.
//! * `gold/maintenance_schedule` is not compared: it says what was due at the hour in which it was computed, and is
//!   computed anew every hour from tables that are compared.
//! * Values are compared as [`compare`] says; memory hangs on devices and days, not on readings.

mod compare;
mod standing;

use std::{
    collections::BTreeSet,
    fmt,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use anyhow::Context;
use arrow::{
    array::{Array, ArrayRef, AsArray, BooleanArray, RecordBatch},
    compute::{filter_record_batch, not, or},
    datatypes::Int64Type,
};
use common::time::Timestamp;
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, path::Path};
use serde::Serialize;
use uuid::Uuid;

pub use self::compare::{Difference, TableReport};
use self::{
    compare::{Side, compare, spec},
    standing::{Chosen, Standing, plans},
};
use crate::{
    gold::{self, GoldSettings, changes, daily, hourly, series::micros},
    lake::{self, SegmentName, Table},
    metrics::Metrics,
    pack::Segments,
    plan::{Limits, Plan, REFINE},
    quality::Rules,
    refine::Refiner,
    silver::COMMIT_ORDER,
    store::Store,
    tables::{RETAIN, Tables},
    upkeep::read_plan,
};

/// App id of what was taken over from the lake.
const TAKEN: &str = "taken-over";

/// What to rebuild.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Compare with what stands.
    pub verify: bool,
    /// The first hour of bronze whose plans are replayed; those before are taken over.
    pub from: Option<Timestamp>,
    /// Plans from the first one on that names a segment of this hour or a later one are left out.
    pub to: Option<Timestamp>,
    /// The lake to write; without it a temporary one.
    pub into: Option<Store>,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Whether everything that was compared is equal; `None` when nothing was.
    pub identical: Option<bool>,
    /// The last plan.
    pub plans: u64,
    /// Plans carried out.
    pub replayed: u64,
    /// Readings in their messages.
    pub readings: u64,
    /// Segments that plans name and bronze does not hold.
    pub missing: u64,
    /// Some of them.
    pub missing_segments: Vec<String>,
    /// Each table.
    pub tables: Vec<TableReport>,
    /// What was not compared, and why.
    pub left_out: Vec<String>,
    /// Seconds that the replay took.
    pub replay_seconds: f64,
    /// Seconds that it took in all.
    pub seconds: f64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for table in &self.tables {
            let TableReport { table: name, rows, only_in_lake, only_in_rebuild, changed, .. } = table;
            if table.identical() {
                writeln!(f, "{name}: {rows} rows, identical")?;
            } else {
                writeln!(
                    f,
                    "{name}: {rows} rows; {only_in_lake} only in the lake, {only_in_rebuild} only in the rebuild, \
                     {changed} changed"
                )?;
            }
            table.differences.iter().try_for_each(|d| writeln!(f, "  {}: {}", d.key, d.what))?;
        }
        self.left_out.iter().try_for_each(|what| writeln!(f, "not compared: {what}"))?;
        if self.missing > 0 {
            writeln!(f, "{} segments are no longer in bronze and were taken from silver:", self.missing)?;
            self.missing_segments.iter().try_for_each(|path| writeln!(f, "  {path}"))?;
        }
        let Report { plans, replayed, readings, seconds, .. } = self;
        write!(f, "{replayed} of {plans} plans replayed, {readings} readings, {seconds:.1} s")?;
        match self.identical {
            Some(true) => write!(f, ": identical"),
            Some(false) => write!(f, ": not identical"),
            None => Ok(()),
        }
    }
}

/// Rebuilds `lake`. `progress` is told now and then how far it is.
///
/// # Errors
/// When a lake cannot be read or written, or `into` holds another one. Differences are no error.
pub async fn rebuild(
    lake: &Store,
    options: &Options,
    gold: &GoldSettings,
    now: Timestamp,
    progress: impl Fn(&str),
) -> anyhow::Result<Report> {
    let began = Instant::now();
    anyhow::ensure!(options.verify || options.into.is_some(), "give --verify, --into or both");
    let part = options.from.is_some() || options.to.is_some();
    anyhow::ensure!(
        options.verify || !part,
        "--from and --to need --verify: a part of the plans makes no lake"
    );
    let scratch = Scratch::open(options.into.clone())?;
    anyhow::ensure!(scratch.store.url() != lake.url(), "--into is the lake itself; name another folder");
    let standing = Standing::pin(lake, gold).await.context("reading the lake")?;
    progress("reading the plans");
    let chosen = Chosen::of(lake, &standing, options).await.context("reading the plans")?;
    let tables = Tables::open(&scratch.store).await.context("opening the lake to write")?;
    scratch.store.prove_put_if_absent().await?;
    tables.create_missing().await.context("creating tables")?;
    let mut report = Report {
        plans: chosen.last,
        missing: chosen.missing,
        missing_segments: chosen.listed.clone(),
        ..Report::default()
    };
    take_over(&standing, &chosen, &tables).await.context("taking over what bronze does not hold")?;
    replay(lake, &tables, &chosen, &mut report, &progress).await?;
    report.replay_seconds = began.elapsed().as_secs_f64();
    progress("computing gold");
    gold::step(&tables, gold, now).await.context("computing gold")?;
    take_over_gold(&standing, &tables).await.context("taking over gold's final hours")?;
    if options.verify {
        verify(&standing, &chosen, &tables, gold, &mut report, &progress).await.context("comparing")?;
    }
    report.seconds = began.elapsed().as_secs_f64();
    Ok(report)
}

/// The lake that is written; a temporary one goes away with it.
struct Scratch {
    store: Store,
    temporary: Option<PathBuf>,
}

impl Scratch {
    fn open(into: Option<Store>) -> anyhow::Result<Scratch> {
        if let Some(store) = into {
            return Ok(Scratch { store, temporary: None });
        }
        let folder = std::env::temp_dir().join(format!("tailrace-rebuild-{}", Uuid::now_v7()));
        let url = folder.to_str().with_context(|| format!("{} is no text", folder.display()))?;
        Ok(Scratch { store: Store::open(url)?, temporary: Some(folder) })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(folder) = &self.temporary {
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}

/// Copies the rows of what is not replayed, each table in one commit.
async fn take_over(standing: &Standing, chosen: &Chosen, tables: &Tables) -> anyhow::Result<()> {
    for table in [Table::SensorReadings, Table::Aggregates, Table::HourlyAggregates, Table::Timeseries1m] {
        if let Some(cutoff) = standing.retained(table).await? {
            let base = tables.snapshot(table).await?;
            tables.append(table, base, Vec::new(), (RETAIN, cutoff.as_micros())).await?;
        }
    }
    if chosen.touched.iter().next().is_none() {
        return Ok(());
    }
    for table in COMMIT_ORDER {
        let base = tables.snapshot(table).await?;
        let there = match &base {
            Some(base) => Tables::progress(base, TAKEN).await?.is_some(),
            None => false,
        };
        if there || !standing.snapshots.contains_key(&table) {
            continue;
        }
        let rows = standing.rows(table, "true").await?;
        let taken = rows.map(|batch| {
            let batch = batch?;
            let mask = match table {
                Table::QualityResults => of_plan(&batch, |n| chosen.whole.contains(n))?,
                _ => of_segment(&batch, |name| chosen.taken.contains(name))?,
            };
            Ok(filter_record_batch(&batch, &mask)?)
        });
        tables.append_stream(table, base, taken, (TAKEN, 1)).await?;
    }
    Ok(())
}

/// Gold's tables that are made by the hour, and the instant by which retention counts.
const BY_HOUR: [(Table, &str); 4] = [
    (Table::HourlyAggregates, "hour"),
    (Table::Timeseries1m, "time"),
    (Table::DailyAggregates, "starts_at"),
    (Table::AssetHealth, "hour"),
];

/// Gold's hours and days that are final are not computed: they are what stands.
async fn take_over_gold(standing: &Standing, tables: &Tables) -> anyhow::Result<()> {
    let Some(floor) = standing.floor else { return Ok(()) };
    for (table, time) in BY_HOUR {
        let base = tables.snapshot(table).await?;
        let there = match &base {
            Some(base) => Tables::progress(base, TAKEN).await?.is_some(),
            None => false,
        };
        if !there && standing.snapshots.contains_key(&table) {
            let rows = standing.rows(table, &format!("{time} < '{floor}'")).await?;
            tables.append_stream(table, base, rows, (TAKEN, 1)).await?;
        }
    }
    Ok(())
}

/// Which rows are of segments of a kind.
fn of_segment(batch: &RecordBatch, wanted: impl Fn(SegmentName) -> bool) -> anyhow::Result<BooleanArray> {
    let segments = batch.column_by_name("segment").context("no column segment")?.as_string::<i32>();
    // Rows of a segment stand together.
    let mut last: Option<(&str, bool)> = None;
    let mask = (0..segments.len()).map(|row| {
        let path = segments.value(row);
        let known = last.filter(|(known, _)| *known == path).map(|(_, wanted)| wanted);
        let is = known.unwrap_or_else(|| SegmentName::parse(path).is_some_and(&wanted));
        last = Some((path, is));
        Some(is)
    });
    Ok(mask.collect())
}

/// Which rows are of soft rules that judge a reading by the one before it.
fn looks_back(batch: &RecordBatch) -> anyhow::Result<BooleanArray> {
    let rules = batch.column_by_name("rule").context("no column rule")?.as_string::<i32>();
    Ok(rules.iter().map(|rule| Some(matches!(rule, Some("soft_rate" | "soft_interval")))).collect())
}

/// Which rows are of plans of a kind.
fn of_plan(batch: &RecordBatch, wanted: impl Fn(i64) -> bool) -> anyhow::Result<BooleanArray> {
    let plans: &ArrayRef = batch.column_by_name("plan").context("no column plan")?;
    Ok(plans.as_primitive::<Int64Type>().values().iter().map(|n| Some(wanted(*n))).collect())
}

async fn replay(
    lake: &Store,
    tables: &Tables,
    chosen: &Chosen,
    report: &mut Report,
    progress: &impl Fn(&str),
) -> anyhow::Result<()> {
    let done = match tables.snapshot(Table::SensorReadings).await? {
        Some(readings) => Tables::progress(&readings, REFINE).await?.and_then(|n| u64::try_from(n).ok()),
        None => None,
    };
    let done = done.unwrap_or(0);
    let mut rules: Option<(String, Refiner)> = None;
    let mut told = 0;
    let mut plans = std::pin::pin!(plans(lake, 1, chosen.last));
    while let Some(mut plan) = plans.try_next().await? {
        if rules.as_ref().is_none_or(|(hash, _)| *hash != plan.rules) {
            copy_rules(lake, tables.store(), &plan.rules).await?;
        }
        keep_plan(tables.store(), &plan).await?;
        if plan.n <= done {
            continue;
        }
        if chosen.is_taken(plan.n) {
            if plan.n == chosen.last {
                let base = tables.snapshot(Table::SensorReadings).await?;
                let n = i64::try_from(plan.n)?;
                tables.append(Table::SensorReadings, base, Vec::new(), (REFINE, n)).await?;
            }
            continue;
        }
        let refiner = match &mut rules {
            Some((hash, refiner)) => {
                hash.clone_from(&plan.rules);
                refiner
            }
            None => {
                let made_with = read_rules(lake, &plan.rules).await?;
                let limits = Limits { segments: usize::MAX, bytes: u64::MAX };
                let mut refiner = Refiner::new(tables.store(), tables, made_with, limits, Metrics::default());
                refiner.read_from(Segments::new(lake));
                &mut rules.insert((plan.rules.clone(), refiner)).1
            }
        };
        let replayed =
            |path: &String| SegmentName::parse(path).is_none_or(|name| !chosen.taken.contains(name));
        plan.segments.retain(replayed);
        plan.replay.iter_mut().for_each(|replay| replay.segments.retain(replayed));
        let counts = refiner.replay(&plan).await?;
        report.replayed += 1;
        report.readings += counts.readings;
        let percent = plan.n * 100 / chosen.last;
        if percent > told {
            told = percent;
            progress(&format!("plan {} of {}, {} readings", plan.n, chosen.last, report.readings));
        }
    }
    Ok(())
}

async fn read_rules(lake: &Store, hash: &str) -> anyhow::Result<Rules> {
    let path = Path::from(lake::rules(hash));
    let bytes = lake.objects().get(&path).await?.bytes().await?;
    let text = std::str::from_utf8(&bytes).with_context(|| format!("reading {path}"))?;
    Rules::from_toml(text).with_context(|| format!("reading {path}"))
}

async fn copy_rules(lake: &Store, into: &Store, hash: &str) -> anyhow::Result<()> {
    let path = Path::from(lake::rules(hash));
    let bytes = lake.objects().get(&path).await?.bytes().await?;
    into.objects().put(&path, bytes.into()).await?;
    Ok(())
}

/// Puts a plan, which must be the one that is there if there is one.
async fn keep_plan(into: &Store, plan: &Plan) -> anyhow::Result<()> {
    let path = Path::from(lake::plan(plan.n));
    let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    match into.objects().put_opts(&path, serde_json::to_vec(plan)?.into(), create).await {
        Err(object_store::Error::AlreadyExists { .. }) => {
            let there = read_plan(into, plan.n).await?;
            anyhow::ensure!(
                there == *plan,
                "{} holds another lake, with another plan {}",
                into.url(),
                plan.n
            );
            Ok(())
        }
        other => Ok(other.map(drop)?),
    }
}

async fn verify(
    standing: &Standing,
    chosen: &Chosen,
    tables: &Tables,
    gold: &GoldSettings,
    report: &mut Report,
    progress: &impl Fn(&str),
) -> anyhow::Result<()> {
    let rebuilt = tables.session().await?;
    let later = Mutex::new(Later { hours: standing.pending.clone(), tables: BTreeSet::new() });
    // Silver before gold, which hangs on what is left out there.
    for table in Table::ALL {
        let Some(spec) = spec(table) else {
            report.left_out.push(format!("{}, which hangs on when it was computed", table.path()));
            continue;
        };
        if let Some(why) = why_not(standing, table, gold, &later).await? {
            report.left_out.push(format!("{}, {why}", table.path()));
            continue;
        }
        progress(&format!("comparing {}", table.path()));
        let by_hour = BY_HOUR.iter().any(|(of, _)| *of == table);
        let retained = match table {
            Table::SensorReadings | Table::Aggregates => standing.retained(table).await?,
            _ if by_hour => standing.floor,
            _ => None,
        };
        if let Some(cutoff) = retained {
            report.left_out.push(format!("{} before {cutoff}, where retention has removed", table.path()));
        }
        let keep = |batch: &RecordBatch| -> anyhow::Result<BooleanArray> {
            let of_later = match table {
                Table::QualityResults => {
                    let last = i64::try_from(chosen.last)?;
                    let left_out = of_plan(batch, |n| n > last || chosen.touched.contains(n))?;
                    // What was taken over counts as a device's last reading before its time.
                    match chosen.touched.iter().next() {
                        Some(_) => or(&left_out, &looks_back(batch)?)?,
                        None => left_out,
                    }
                }
                _ if table.layer() == "silver" => of_segment(batch, |name| chosen.later.contains(name))?,
                _ => BooleanArray::from(vec![false; batch.num_rows()]),
            };
            let mut later = later.lock().unwrap_or_else(PoisonError::into_inner);
            if of_later.true_count() > 0 {
                later.tables.insert(table);
            }
            let Some(time) = spec.time else { return Ok(not(&of_later)?) };
            let times = micros(batch, time)?;
            let rows = || times.values().iter().zip(of_later.values().iter());
            if matches!(table, Table::SensorReadings | Table::Aggregates) {
                let touched = rows().filter(|(_, of_later)| *of_later).map(|(at, _)| *at);
                later.hours.extend(hourly::touched(touched, gold.hold));
            }
            let ends = if table == Table::DailyAggregates { Some(micros(batch, "ends_at")?) } else { None };
            let keep = rows().enumerate().map(|(row, (at, of_later))| {
                let at = Timestamp::from_micros(*at);
                let expired = retained.is_some_and(|cutoff| at < cutoff);
                let last = ends.as_ref().map_or(at, |ends| Timestamp::from_micros(ends.value(row) - 1));
                let touched = by_hour && later.hours.range(at.hour()..=last).next().is_some();
                Some(!(of_later || expired || touched))
            });
            Ok(keep.collect())
        };
        let lake = Side { session: &standing.session, keep: &keep };
        let compared = compare(&spec, &lake, &Side { session: &rebuilt, keep: &keep }).await;
        report.tables.push(compared.with_context(|| format!("comparing {}", table.path()))?);
    }
    let later = later.lock().unwrap_or_else(PoisonError::into_inner);
    if let (Some(first), Some(last)) = (later.hours.first(), later.hours.last()) {
        let n = later.hours.len();
        report.left_out.push(format!("{n} hours of gold from {first} to {last}, which later plans touch"));
    }
    report.identical = Some(report.tables.iter().all(TableReport::identical));
    Ok(())
}

/// What plans that are not replayed have to do with what stands.
struct Later {
    /// Hours of gold that hang on them, or that gold has yet to compute.
    hours: BTreeSet<Timestamp>,
    /// Tables with rows of them.
    tables: BTreeSet<Table>,
}

/// Why a table of gold cannot be compared now.
async fn why_not(
    standing: &Standing,
    table: Table,
    settings: &GoldSettings,
    later: &Mutex<Later>,
) -> anyhow::Result<Option<String>> {
    if table.layer() != "gold" {
        return Ok(None);
    }
    let Some(gold) = standing.snapshots.get(&table) else {
        return Ok(Some("which is not there yet".to_owned()));
    };
    let source = match table {
        Table::AnomalyEvents => Table::Anomalies,
        Table::Assets | Table::Devices => Table::Registry,
        Table::DailyAggregates if !daily::made_by(gold, &settings.calendars).await? => {
            return Ok(Some("which other time zones or shifts made".to_owned()));
        }
        Table::AssetHealth => {
            let later = later.lock().unwrap_or_else(PoisonError::into_inner);
            let touched = later.tables.contains(&Table::Anomalies);
            return Ok(touched.then(|| "which later rows of silver/anomalies touch".to_owned()));
        }
        _ => return Ok(None),
    };
    let Some(silver) = standing.snapshots.get(&source) else { return Ok(None) };
    let touched = later.lock().unwrap_or_else(PoisonError::into_inner).tables.contains(&source);
    let behind = touched || changes::is_behind(gold, silver, "received_at").await?;
    Ok(behind.then(|| format!("which later rows of {} touch", source.path())))
}
