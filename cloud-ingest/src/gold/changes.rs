//! What is new in silver: the hours that data files touch which were added since a version of a table.
//!
//! The Delta log says which files came (`dataChange=true` only, so compaction touches nothing). Of those that are still
//! there the hours are exact: by their statistics where they reach from an hour no further than into the next, else by
//! their rows. Of those that were compacted away since, the statistics give the range. What retention removed is gone
//! for good and touches nothing. When other rows were removed, when the log no longer reaches back, or when the table is
//! another one than before, everything counts as touched.

use std::{
    collections::{BTreeSet, HashSet},
    time::Duration,
};

use anyhow::Context;
use common::time::{HOUR_MICROS, Timestamp};
use datafusion::prelude::{SessionConfig, SessionContext};
use deltalake::{
    DeltaTable,
    kernel::{Action, Add},
    logstore::get_actions,
};

use super::{
    hourly,
    series::{floor_hour, ints, micros},
};
use crate::{
    plan::REFINE,
    tables::{RETAIN, Tables},
};

/// Files that came.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Changes {
    /// Paths that are still active.
    active: Vec<String>,
    /// Time ranges (µs, both ends included) of those that are not.
    gone: Vec<(i64, i64)>,
    /// The first plan among the commits.
    pub(super) first_plan: Option<i64>,
}

/// What came to `table` after version `since`; `None` when that cannot be told, so everything counts.
pub(super) async fn after(table: &DeltaTable, since: i64, time: &str) -> anyhow::Result<Option<Changes>> {
    let newest = version(table);
    if since > newest {
        return Ok(None);
    }
    let mut walk = Walk::new(time);
    for at in since + 1..=newest {
        let Some(actions) = commit(table, at).await? else { return Ok(None) };
        walk.forwards(actions);
    }
    Ok(walk.finish())
}

/// Whether rows came to `silver` that `gold` has not taken.
pub(crate) async fn is_behind(gold: &DeltaTable, silver: &DeltaTable, time: &str) -> anyhow::Result<bool> {
    let Some(known) = Tables::progress(gold, super::publish::SILVER).await? else { return Ok(true) };
    let came = after(silver, known, time).await?;
    Ok(came.is_none_or(|came| !came.active.is_empty() || !came.gone.is_empty()))
}

/// What came to `table` with plan `plan` and later ones.
pub(super) async fn with_plan(table: &DeltaTable, plan: i64, time: &str) -> anyhow::Result<Option<Changes>> {
    // Of a table that has been quiet for long the log may no longer tell.
    if Tables::progress(table, REFINE).await?.is_none_or(|newest| newest < plan) {
        return Ok(Some(Changes::default()));
    }
    let mut commits = Vec::new();
    for at in (0..=version(table)).rev() {
        let Some(actions) = commit(table, at).await? else { return Ok(None) };
        if plan_of(&actions).is_some_and(|earlier| earlier < plan) {
            break;
        }
        commits.push(actions);
    }
    let mut walk = Walk::new(time);
    commits.into_iter().rev().for_each(|actions| walk.forwards(actions));
    Ok(walk.finish())
}

/// The version of a loaded table.
pub(super) fn version(table: &DeltaTable) -> i64 {
    table.version().and_then(|v| i64::try_from(v).ok()).unwrap_or(0)
}

async fn commit(table: &DeltaTable, version: i64) -> anyhow::Result<Option<Vec<Action>>> {
    let version = u64::try_from(version).context("a version is not negative")?;
    let bytes = table.log_store().read_commit_entry(version).await?;
    bytes.map(|bytes| Ok(get_actions(version, &bytes)?)).transpose()
}

fn plan_of(actions: &[Action]) -> Option<i64> {
    txn_of(actions, REFINE)
}

fn txn_of(actions: &[Action], app: &str) -> Option<i64> {
    actions.iter().find_map(|action| match action {
        Action::Txn(txn) if txn.app_id == app => Some(txn.version),
        _ => None,
    })
}

/// Reads commits in order.
struct Walk<'a> {
    time: &'a str,
    added: Vec<Add>,
    removed: BTreeSet<String>,
    rows_removed: bool,
    first_plan: Option<i64>,
}

impl<'a> Walk<'a> {
    fn new(time: &'a str) -> Self {
        Self { time, added: Vec::new(), removed: BTreeSet::new(), rows_removed: false, first_plan: None }
    }

    fn forwards(&mut self, actions: Vec<Action>) {
        self.first_plan = self.first_plan.or(plan_of(&actions));
        let retention = txn_of(&actions, RETAIN).is_some();
        for action in actions {
            match action {
                Action::Add(add) if add.data_change => self.added.push(add),
                Action::Remove(remove) => {
                    self.rows_removed |= remove.data_change && !retention;
                    self.removed.insert(remove.path);
                }
                _ => {}
            }
        }
    }

    fn finish(self) -> Option<Changes> {
        if self.rows_removed {
            return None;
        }
        let mut changes = Changes { first_plan: self.first_plan, ..Changes::default() };
        for add in self.added {
            if self.removed.contains(&add.path) {
                changes.gone.push(limits(add.stats.as_deref()?, self.time)?);
            } else {
                changes.active.push(add.path);
            }
        }
        Some(changes)
    }
}

/// The least and the greatest instant (µs) of a column in a file's statistics; those of other writers are cut down to
/// milliseconds, and no hour ends within one.
pub(super) fn limits(stats: &str, time: &str) -> Option<(i64, i64)> {
    let stats: serde_json::Value = serde_json::from_str(stats).ok()?;
    let at = |bound: &str| {
        let text = stats.get(bound)?.get(time)?.as_str()?;
        text.parse::<Timestamp>().ok().map(Timestamp::as_micros)
    };
    Some((at("minValues")?, at("maxValues")?))
}

impl Changes {
    /// The hours that the files touch; a value may hold for `hold` into the next.
    pub(super) async fn hours(
        &self,
        table: &DeltaTable,
        time: &str,
        hold: Duration,
    ) -> anyhow::Result<BTreeSet<Timestamp>> {
        let mut hours = BTreeSet::new();
        for (from, to) in &self.gone {
            let from = floor_hour(*from);
            let every = (0..).map(|n| from + n * HOUR_MICROS).take_while(|hour| hour <= to);
            hours.extend(hourly::touched(every.chain([*to]), hold));
        }
        if !self.active.is_empty() {
            hours.extend(hours_in(table, Some(&self.active), time, hold).await?);
        }
        Ok(hours)
    }

    /// Before this (µs) the files have no row; [`i64::MIN`] where they do not say.
    pub(super) fn first(&self, table: &DeltaTable, time: &str) -> anyhow::Result<i64> {
        let mut first = self.gone.iter().map(|(from, _)| *from).min().unwrap_or(i64::MAX);
        if self.active.is_empty() {
            return Ok(first);
        }
        let active: HashSet<&str> = self.active.iter().map(String::as_str).collect();
        for file in table.snapshot()?.log_data().iter().filter(|file| active.contains(file.path().as_ref())) {
            let from = file.stats().and_then(|stats| limits(&stats, time)).map_or(i64::MIN, |(from, _)| from);
            first = first.min(from);
        }
        Ok(first)
    }
}

/// The hours in which `table`, or only these of its files, has rows, and those into which their values hold.
pub(super) async fn hours_in(
    table: &DeltaTable,
    files: Option<&[String]>,
    time: &str,
    hold: Duration,
) -> anyhow::Result<BTreeSet<Timestamp>> {
    let mut hours = BTreeSet::new();
    let mut left: BTreeSet<String> = files.into_iter().flatten().cloned().collect();
    for file in table.snapshot()?.log_data().iter() {
        let path = file.path().into_owned();
        if files.is_some() && !left.remove(&path) {
            continue;
        }
        match file.stats().and_then(|stats| limits(&stats, time)) {
            // The first and the last row are there, and between their hours is none.
            Some((from, to)) if floor_hour(to) - floor_hour(from) <= HOUR_MICROS => {
                hours.extend(hourly::touched([from, to], hold));
            }
            _ => _ = left.insert(path),
        }
    }
    if left.is_empty() {
        return Ok(hours);
    }
    let left: Vec<String> = left.into_iter().collect();
    let context = context(&[("t", Some(table), Some(&left))]).await?;
    let sql = format!(
        "SELECT cast({time} AS bigint) / {HOUR_MICROS} AS hour, max({time}) AS last FROM t GROUP BY 1"
    );
    for batch in context.sql(&sql).await?.collect().await? {
        let starts = ints(&batch, "hour")?;
        let lasts = micros(&batch, "last")?;
        let times =
            starts.values().iter().map(|hour| hour * HOUR_MICROS).chain(lasts.values().iter().copied());
        hours.extend(hourly::touched(times, hold));
    }
    Ok(hours)
}

/// A snapshot by the name under which it is asked, and the files of it that are read; `None` for all.
pub(crate) type Scanned<'a> = (&'a str, Option<&'a DeltaTable>, Option<&'a [String]>);

/// A session over these snapshots, or some files of them. A table that does not exist is not registered.
pub(crate) async fn context(tables: &[Scanned<'_>]) -> anyhow::Result<SessionContext> {
    let mut config = SessionConfig::new()
        .set_bool("datafusion.execution.parquet.schema_force_view_types", false)
        .set_bool("datafusion.execution.parquet.pushdown_filters", true);
    config.options_mut().execution.time_zone = Some("+00:00".into());
    let context = SessionContext::new_with_config(config);
    let state = std::sync::Arc::new(context.state());
    for (name, table, files) in tables {
        let Some(table) = table else { continue };
        table.update_datafusion_session(state.as_ref())?;
        let mut provider = table.table_provider().with_session(std::sync::Arc::clone(&state));
        if let Some(files) = files {
            provider = provider.with_file_paths(files.iter().cloned());
        }
        context.register_table(*name, provider.await?)?;
    }
    Ok(context)
}
