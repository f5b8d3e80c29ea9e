//! Upkeep: what keeps a lake fast and small while everything else goes on. `cloud-ingest maintain`, and the role
//! refine every `upkeep.interval`.
//!
//! | job | what | may be killed anywhere, since |
//! |---|---|---|
//! | bronze | hours that ended `pack_after` ago and are refined become packs ([`pack`](crate::pack)) | a segment goes last |
//! | compaction | silver's small files become files of up to 128 MB | it is one commit |
//! | retention | bronze objects, and data files of silver and gold, that are older than `keep_…` | each goes by itself, or in one commit |
//! | vacuum | files that no snapshot of the last `keep_versions` has | nobody needs them |
//! | sweep | files in a folder that a killed writer left half written, and that are older than `keep_versions` | nobody sees them |
//! | log | a checkpoint; entries before one that is older than `keep_versions` | nobody needs them |
//!
//! A job that fails is reported and the others go on; the next run begins anew from what stands there. Runs may
//! meet: packs are the same whoever writes them, and commits that remove files are fenced against each other.
//!
//! What retention leaves alone, and why:
//!
//! * Bronze that stands in no completed plan, whatever its age. What is gone from bronze `rebuild` takes from silver.
//! * Of silver, all but `sensor_readings` and `aggregates`: the ledger counts `messages`, `control` and `status`
//!   from the first one on, and redeliveries are known by `messages`, so they are kept and stay exact. Quarantine is
//!   never removed. Registry, maintenance and anomalies are gold's whole input, and small.
//! * Silver that gold has not computed yet. The cutoff stands in the table ([`Tables::retained`]). Gold's hours that
//!   hang on removed readings are final: gold does not take the removal for a change, and computes no hour before
//!   the cutoff again, not even when it computes everything.
//! * Readings without a message name (JSON) that were removed and come again are stored again, and removed again by
//!   the next run: their day is older than the cutoff.
//! * Of gold, all but `hourly_aggregates` and `timeseries_1m`. Days whose hours are gone are final, too. The maintenance schedule counts running hours in what
//!   is left of them.
//! * Gold's files are put together by the gold step alone, when a new hour begins: an hour that still changes
//!   must not stand in a large file.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use common::time::{Clock, HOUR_MICROS, Timestamp};
use deltalake::DeltaTable;
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use serde::Serialize;
use tokio::sync::watch;

use crate::{
    gold::{GoldSettings, windows},
    lake::{self, PackName, SegmentName, Table},
    pack::{self, Hour, Pack},
    plan::{Plan, Planned, REFINE},
    settings::UpkeepSettings,
    silver::{COMMIT_ORDER, Summary},
    store::Store,
    tables::{TIERS, Tables},
};

/// Upkeep packs a partition that has more files than this below half of the largest size.
const SMALL_FILES: usize = 4;
/// What retention of silver and of gold is about, each with the instant that counts.
const SILVER: [(Table, &str); 2] = [(Table::SensorReadings, "ts"), (Table::Aggregates, "window_start")];
const GOLD: [(Table, &str); 2] = [(Table::HourlyAggregates, "hour"), (Table::Timeseries1m, "time")];

/// What a run did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Done {
    /// Packs of bronze written.
    pub packs: usize,
    /// Segments that packs have taken the place of.
    pub packed_segments: usize,
    /// Bronze objects that retention removed.
    pub expired_objects: usize,
    /// Data files that retention removed from silver and gold.
    pub expired_files: usize,
    /// Tables whose small files were put together.
    pub compacted_tables: usize,
    /// Files that vacuum deleted.
    pub vacuumed_files: usize,
    /// Log entries deleted.
    pub log_entries: usize,
    /// Half written files of killed writers deleted.
    pub unfinished_files: usize,
    /// What could not be done, and why.
    pub failed: Vec<String>,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Done { packs, packed_segments, expired_objects, expired_files, .. } = self;
        let Done { compacted_tables, vacuumed_files, log_entries, unfinished_files, failed, .. } = self;
        writeln!(
            f,
            "bronze: {packed_segments} segments into {packs} packs, {expired_objects} objects expired"
        )?;
        writeln!(f, "tables: {compacted_tables} compacted, {expired_files} files expired")?;
        write!(
            f,
            "deleted: {vacuumed_files} files of old versions, {log_entries} log entries, {unfinished_files} unfinished \
             files"
        )?;
        failed.iter().try_for_each(|failed| write!(f, "\nnot done: {failed}"))
    }
}

impl Done {
    /// Notes a failure; otherwise hands on what came of a job.
    fn of<T, E: Into<anyhow::Error>>(&mut self, job: &str, result: Result<T, E>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(e) => {
                self.failed.push(format!("{job}: {:#}", e.into()));
                None
            }
        }
    }
}

/// When to do it: every so often, counted from the end of the last run. Pure.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    interval: Duration,
    last: Timestamp,
}

impl Schedule {
    /// The first run comes one interval after the start.
    pub const fn new(interval: Duration, started_at: Timestamp) -> Self {
        Self { interval, last: started_at }
    }

    /// How long until the next run. A clock that was set back does not put it off for longer than an interval.
    pub fn wait(&self, now: Timestamp) -> Duration {
        if now < self.last { self.interval } else { self.interval.saturating_sub(now.since(self.last)) }
    }

    /// A run has ended.
    pub const fn done(&mut self, now: Timestamp) {
        self.last = now;
    }
}

/// Does it every `upkeep.interval` until `silver` closes.
///
/// # Errors
/// None: what fails is logged and tried again by the next run.
pub async fn run(
    tables: Tables,
    settings: UpkeepSettings,
    gold: GoldSettings,
    clock: Arc<dyn Clock>,
    mut silver: watch::Receiver<u64>,
) -> anyhow::Result<()> {
    let forever = async {
        let mut schedule = Schedule::new(settings.interval, clock.now());
        loop {
            tokio::time::sleep(schedule.wait(clock.now())).await;
            let done = maintain(&tables, &settings, &gold, clock.now()).await;
            for failed in &done.failed {
                tracing::warn!(failed, "upkeep is left for the next run");
            }
            tracing::info!(?done, "upkeep");
            schedule.done(clock.now());
        }
    };
    // It may be dropped at any point.
    tokio::select! {
        _ = silver.wait_for(|_| false) => {}
        () = forever => {}
    }
    Ok(())
}

/// Does everything that is due at `now`.
pub async fn maintain(
    tables: &Tables,
    settings: &UpkeepSettings,
    gold: &GoldSettings,
    now: Timestamp,
) -> Done {
    let mut done = Done::default();
    bronze(tables, settings, now, &mut done).await;
    for table in tables.all().filter(|table| COMMIT_ORDER.contains(table) || table.layer() == "rules") {
        let compacted = tables.compact(table, &TIERS[TIERS.len() - 1..], SMALL_FILES).await;
        done.compacted_tables += usize::from(done.of("compaction", compacted) == Some(true));
    }
    let expired = expire(tables, settings, gold, now, &mut done).await;
    done.of("retention", expired);
    for table in tables.all() {
        let vacuumed = tables.vacuum(table, settings.keep_versions, now).await;
        done.vacuumed_files += done.of("vacuum", vacuumed).unwrap_or(0);
        let tidied = tables.tidy_log(table, settings.keep_versions, now).await;
        done.log_entries += done.of("log", tidied).unwrap_or(0);
    }
    let swept = tables.store().sweep(now - settings.keep_versions).await;
    done.unfinished_files = done.of("sweep", swept).unwrap_or(0);
    done
}

/// The hour before which everything of a layer has expired.
fn cutoff(keep: Duration, now: Timestamp) -> Option<Timestamp> {
    (!keep.is_zero()).then(|| (now - keep).hour())
}

/// Packs and expires hours of bronze.
async fn bronze(tables: &Tables, settings: &UpkeepSettings, now: Timestamp, done: &mut Done) {
    let store = tables.store();
    let read = async {
        let readings = tables.snapshot(Table::SensorReadings).await?;
        let Plans { planned, next, .. } =
            plans(store, readings.as_ref()).await.context("reading the plans that are done")?;
        anyhow::Ok((planned, replayed(next), hours(store).await.context("listing bronze")?))
    };
    let Some((refined, in_use, hours)) = done.of("bronze", read.await) else { return };
    let cutoff = cutoff(settings.keep_bronze, now);
    for (hour, has_segments) in hours {
        let ended = hour + Duration::from_micros(HOUR_MICROS.unsigned_abs());
        if in_use.contains(&hour) {
            continue;
        }
        if cutoff.is_some_and(|cutoff| ended <= cutoff) {
            let expired = expire_hour(tables, hour, &refined).await;
            done.expired_objects += done.of("bronze", expired).unwrap_or(0);
        } else if has_segments && ended + settings.pack_after <= now {
            let packed = pack::pack_hour(store, hour, &refined).await;
            let packed = done.of("packing", packed).unwrap_or_default();
            done.packs += packed.packs;
            done.packed_segments += packed.segments;
        }
    }
}

/// The hours of bronze that the plan after those that are done reads again.
fn replayed(next: Option<Plan>) -> BTreeSet<Timestamp> {
    let again = next.iter().filter(|next| next.replay.is_some()).flat_map(Plan::reads);
    again.map(|name| name.hour).collect()
}

/// The plans of a lake, as far as they are needed.
pub(crate) struct Plans {
    /// What those that are done name.
    pub(crate) planned: Planned,
    /// What silver has of those before the last that sums up, unless that does not say so.
    pub(crate) known: Option<Summary>,
    /// The first hour of bronze that those after them have read.
    pub(crate) since: Option<Timestamp>,
    /// The last that is done.
    pub(crate) last: Option<Plan>,
    /// The one after it. A plan is put when the one before is done, so there is no other.
    pub(crate) next: Option<Plan>,
}

/// Reads the plans back from the last that `readings` has done to one that sums up those before it.
pub(crate) async fn plans(store: &Store, readings: Option<&DeltaTable>) -> anyhow::Result<Plans> {
    let done = plans_done(readings).await?;
    let (mut planned, mut known, mut since, mut last) = (Planned::default(), None, None, None);
    for n in (1..=done).rev() {
        let plan = read_plan(store, n).await?;
        planned.note(&plan);
        known.clone_from(&plan.known);
        since = since.into_iter().chain(plan.reads().map(|segment| segment.hour)).min();
        let sums_up = plan.covered.is_some();
        last.get_or_insert(plan);
        if sums_up {
            break;
        }
    }
    let next = next_plan(store, done).await?;
    Ok(Plans { planned, known, since, last, next })
}

/// The number of the last plan that `readings` has done; 0 for none.
async fn plans_done(readings: Option<&DeltaTable>) -> anyhow::Result<u64> {
    let done = match readings {
        Some(readings) => Tables::progress(readings, REFINE).await?,
        None => None,
    };
    Ok(done.and_then(|n| u64::try_from(n).ok()).unwrap_or(0))
}

/// The plan after the `done`-th, where there is one.
async fn next_plan(store: &Store, done: u64) -> anyhow::Result<Option<Plan>> {
    match read_plan(store, done + 1).await {
        Ok(next) => Ok(Some(next)),
        Err(e) if is_not_found(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

pub(crate) fn is_not_found(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(object_store::Error::NotFound { .. }))
}

/// Plan `n`.
pub(crate) async fn read_plan(store: &Store, n: u64) -> anyhow::Result<Plan> {
    let path = Path::from(lake::plan(n));
    let bytes = store.objects().get(&path).await?.bytes().await?;
    serde_json::from_slice(&bytes).with_context(|| format!("reading {path}"))
}

/// The hours of bronze, and whether there are segments in them.
async fn hours(store: &Store) -> anyhow::Result<BTreeMap<Timestamp, bool>> {
    let objects = store.objects();
    let mut listed = objects.list(Some(&Path::from(lake::BRONZE)));
    let mut hours = BTreeMap::new();
    while let Some(object) = listed.try_next().await? {
        let path = object.location.as_ref();
        if let Some(name) = SegmentName::parse(path) {
            hours.insert(name.hour, true);
        } else if let Some(name) = PackName::parse(path) {
            hours.entry(name.hour).or_insert(false);
        }
    }
    Ok(hours)
}

/// Deletes the objects of an hour whose segments are all `refined`, unless the plan after those that are done reads them.
async fn expire_hour(tables: &Tables, hour: Timestamp, refined: &Planned) -> anyhow::Result<usize> {
    let store = tables.store();
    let found = Hour::list(store, hour).await?;
    // Packing the hours before took its time, and quarantine may be judged again since.
    let readings = tables.snapshot(Table::SensorReadings).await?;
    let next = next_plan(store, plans_done(readings.as_ref()).await?).await?;
    if replayed(next).contains(&hour) {
        return Ok(0);
    }
    let mut expired = 0;
    for name in found.segments.into_keys().filter(|name| refined.contains(*name)) {
        expired += usize::from(delete(store, &name.path()).await?);
    }
    for (name, size) in found.packs {
        if Pack::open(store, &name, size).await?.segments().all(|name| refined.contains(name)) {
            expired += usize::from(delete(store, &name.path()).await?);
        }
    }
    Ok(expired)
}

async fn delete(store: &Store, path: &str) -> anyhow::Result<bool> {
    match store.objects().delete(&Path::from(path)).await {
        Ok(()) => Ok(true),
        Err(object_store::Error::NotFound { .. }) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Removes what has expired from silver and gold.
async fn expire(
    tables: &Tables,
    settings: &UpkeepSettings,
    gold: &GoldSettings,
    now: Timestamp,
    done: &mut Done,
) -> anyhow::Result<()> {
    if let Some(cutoff) = cutoff(settings.keep_silver, now) {
        // What comes from here on stays until the next run: gold may have yet to read it.
        let mut silver = Vec::new();
        for (table, time) in SILVER {
            silver.push((table, time, tables.snapshot(table).await?));
        }
        let pending: BTreeSet<Timestamp> = windows::pending(tables, &gold.calendars, gold.hold).await?;
        // An hour after the cutoff is made of readings before it, too.
        let safe = cutoff + gold.hold;
        if pending.first().is_none_or(|hour| *hour >= safe) {
            for (table, time, judged) in silver {
                let expired = tables.remove_before(table, judged.as_ref(), time, cutoff).await;
                done.expired_files += done.of("retention", expired).unwrap_or(0);
            }
        } else {
            done.failed.push(format!("retention of silver: gold has yet to compute hours before {safe}"));
        }
    }
    if let Some(cutoff) = cutoff(settings.keep_gold, now) {
        for (table, time) in GOLD {
            let all = tables.snapshot(table).await?;
            let expired = tables.remove_before(table, all.as_ref(), time, cutoff).await;
            done.expired_files += done.of("retention", expired).unwrap_or(0);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_keep_their_interval_whatever_the_clock_does() {
        let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
        let seconds = Duration::from_secs;
        let mut schedule = Schedule::new(seconds(60), at(1_000));
        assert_eq!(schedule.wait(at(1_000)), seconds(60));
        assert_eq!(schedule.wait(at(1_050)), seconds(10));
        assert_eq!(schedule.wait(at(9_000)), seconds(0));
        schedule.done(at(1_080));
        assert_eq!(schedule.wait(at(1_080)), seconds(60));
        assert_eq!(schedule.wait(at(5)), seconds(60), "set back by a day, it waits an interval");
    }
}
