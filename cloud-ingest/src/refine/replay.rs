//! Plans that judge quarantine again: which rows, and what is written.
//!
//! `silver/quarantine` commits first. Rows that the plan resolves get its instant as `resolved_at`, which no other
//! plan has; so whoever carries the plan out once more takes these rows instead of those that it selects, and the
//! other tables get the same rows. `silver/messages` follows with the new balance of each message, then the rest, and
//! `sensor_readings` commits last, as of every plan.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use arrow::{
    array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray},
    compute::concat_batches,
    datatypes::Int64Type,
};
use common::time::Timestamp;
use datafusion::{
    common::TableReference,
    functions_aggregate::expr_fn::sum,
    logical_expr::Expr,
    prelude::{DataFrame, ident, lit},
};
use deltalake::DeltaTable;

use super::{Refiner, State, has_step};
use crate::{
    gold::series::{column, ints, micros, text},
    lake::Table,
    plan::{Plan, REFINE, Replay, Selection},
    silver::{Again, Change, Counts, Held, Name, Replayed, Segment},
    tables::conform,
    upkeep::{is_not_found, read_plan},
};

/// Readings in one plan, unless a segment alone has more: they and their rows are in memory together.
const READINGS: i64 = 200_000;
/// How often a step that fails is taken again, with a growing pause: another refiner may be at the same plan.
const TRIES: u32 = 10;
/// A rule that tells of two messages of one name; it holds back no reading.
const NO_READING: &str = "message_conflict";

/// The rows of quarantine that are not resolved and match.
pub(crate) fn selected(rows: DataFrame, of: &Selection) -> datafusion::error::Result<DataFrame> {
    let equal = |column: &str, value: &Option<String>| {
        value.as_ref().map_or_else(|| lit(true), |value| ident(column).eq(lit(value.as_str())))
    };
    let open = ident("resolved_at").is_null().and(ident("rule").not_eq(lit(NO_READING)));
    let named = equal("rule", &of.rule).and(equal("site", &of.site)).and(equal("device_id", &of.device));
    rows.filter(open.and(named))
}

/// Rows of quarantine that a plan looks at.
#[derive(Default)]
struct Looked {
    /// The snapshot that they were read from.
    base: Option<DeltaTable>,
    /// The table has the plan: these are the rows that it resolved.
    done: bool,
    /// All rows of the plan's segments.
    rows: Vec<RecordBatch>,
    /// Those to be judged, by segment; their ids are places in `rows`.
    held: BTreeMap<String, Vec<Held>>,
}

/// How far it is.
#[derive(Default)]
struct Judging {
    /// Segments of a plan each, the next one last; `None` until quarantine has been read.
    chunks: Option<Vec<Vec<String>>>,
    /// Being put; nobody knows whether it is there.
    tried: Option<Plan>,
    /// Plans that are put.
    plans: Vec<u64>,
}

impl Judging {
    /// What stands in the place of the plan that was tried: it, or another one, after which it is tried again.
    fn put(&mut self, there: &Plan) {
        if let Some(tried) = self.tried.take()
            && tried == *there
        {
            self.chunks.as_mut().and_then(Vec::pop);
            self.plans.push(tried.n);
        }
    }
}

impl Refiner {
    /// Puts plans that judge the selected rows again, by this refiner's rules, and sees to it that they are carried
    /// out, by itself or others. Returns their numbers.
    ///
    /// # Errors
    /// The store's, time and again. What was put is carried out all the same, by any refiner.
    pub async fn replay_quarantine(&mut self, of: &Selection, now: Timestamp) -> anyhow::Result<Vec<u64>> {
        let (mut judging, mut failed) = (Judging::default(), 0);
        loop {
            match self.judge_next(of, now, &mut judging).await {
                Ok(true) => failed = 0,
                Ok(false) => return Ok(judging.plans),
                Err(e) if failed < TRIES => {
                    failed += 1;
                    tracing::info!(
                        error = format!("{e:#}"),
                        "another refiner is faster, or the store fails; again"
                    );
                    tokio::time::sleep(Duration::from_millis(20) * 2u32.pow(failed)).await;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Has the newest plan carried out, then puts that of the next chunk and carries it out; false when none is left.
    async fn judge_next(
        &mut self,
        of: &Selection,
        now: Timestamp,
        judging: &mut Judging,
    ) -> anyhow::Result<bool> {
        let mut state = match self.state.take() {
            Some(state) => state,
            None => self.load().await.context("reading the plans and what silver holds")?,
        };
        if !state.done {
            self.complete(&mut state).await?;
        }
        if let Some(plan) = &judging.tried {
            match read_plan(&self.store, plan.n).await {
                Ok(there) => judging.put(&there),
                Err(e) if is_not_found(&e) => judging.tried = None,
                Err(e) => return Err(e),
            }
        }
        let left = match &judging.chunks {
            Some(left) => left,
            None => judging.chunks.insert(self.chunks(of).await.context("reading quarantine")?),
        };
        if let Some(segments) = left.last().cloned() {
            let at = self.instant(now).await.context("reading quarantine")?;
            let n = state.newest.as_ref().map_or(1, |plan| plan.n + 1);
            let replay = Replay { at, segments, of: of.clone() };
            let plan = state.planned.replay(n, &self.rules_hash, replay, &state.known);
            judging.tried = Some(plan.clone());
            let put = self.put(plan).await?;
            judging.put(&put);
            state.planned.note(&put);
            state.newest = Some(put);
            state.done = false;
            self.complete(&mut state).await?;
        }
        self.state = Some(state);
        Ok(judging.chunks.as_ref().is_some_and(|left| !left.is_empty()))
    }

    /// The segments with selected rows, in chunks of a plan each; the last one is to be taken first.
    async fn chunks(&self, of: &Selection) -> anyhow::Result<Vec<Vec<String>>> {
        let Some(quarantine) = self.tables.snapshot(Table::Quarantine).await? else { return Ok(Vec::new()) };
        let rows = selected(self.quarantine(quarantine).await?, of)?
            .aggregate(vec![ident("segment")], vec![sum(ident("readings")).alias("readings")])?
            .sort(vec![ident("segment").sort(true, false)])?
            .collect()
            .await?;
        let mut chunks: Vec<(i64, Vec<String>)> = Vec::new();
        for batch in rows {
            let (segments, readings) = (batch.column(0).as_string::<i32>(), batch.column(1));
            let readings = readings.as_primitive::<Int64Type>();
            for row in 0..batch.num_rows() {
                let (path, readings) = (segments.value(row).to_owned(), readings.value(row));
                match chunks.last_mut() {
                    Some((sum, paths))
                        if *sum + readings <= READINGS && paths.len() < self.limits.segments =>
                    {
                        *sum += readings;
                        paths.push(path);
                    }
                    _ => chunks.push((readings, vec![path])),
                }
            }
        }
        Ok(chunks.into_iter().rev().map(|(_, paths)| paths).collect())
    }

    /// An instant that no row of quarantine has as `resolved_at`.
    async fn instant(&self, now: Timestamp) -> anyhow::Result<Timestamp> {
        let Some(quarantine) = self.tables.snapshot(Table::Quarantine).await? else { return Ok(now) };
        let last = datafusion::functions_aggregate::expr_fn::max(ident("resolved_at"));
        let rows = self.quarantine(quarantine).await?.aggregate(Vec::new(), vec![last.alias("last")])?;
        let mut at = now;
        for batch in rows.collect().await? {
            let last = super::micros(&batch, 0)?;
            if batch.column(0).is_valid(0) {
                at = at.max(Timestamp::from_micros(last[0] + 1));
            }
        }
        Ok(at)
    }

    async fn quarantine(&self, snapshot: DeltaTable) -> anyhow::Result<DataFrame> {
        let session = self.tables.session_of(vec![(Table::Quarantine, Some(snapshot))]).await?;
        Ok(session.table(TableReference::partial("silver", Table::Quarantine.name())).await?)
    }

    pub(super) async fn judge_again(
        &mut self,
        state: &mut State,
        plan: &Plan,
        replay: &Replay,
    ) -> anyhow::Result<Counts> {
        let n = i64::try_from(plan.n)?;
        let rules = self.rules(&plan.rules).await?;
        let mut looked = self.look(state, n, replay).await.context("reading quarantine")?;
        let mut again = Again::new(&rules, n);
        for (path, held) in std::mem::take(&mut looked.held) {
            let rows = self.segments.read(std::slice::from_ref(&path)).await?.pop().flatten();
            let Some(rows) = rows else {
                anyhow::ensure!(
                    !looked.done,
                    "bronze does not hold {path}, whose rows the plan has resolved"
                );
                tracing::warn!(
                    segment = path,
                    "bronze does not hold it any more; its rows stay in quarantine"
                );
                continue;
            };
            let segment = Segment { path, rows };
            // Decoding is work for the processor; the other tasks of this thread go on meanwhile.
            let read = tokio::task::spawn_blocking(move || {
                again.read(&segment, held)?;
                anyhow::Ok(again)
            });
            again = read.await??;
        }
        let questions = again.questions(&state.known);
        let answers =
            self.committed_readings(state, plan, &questions).await.context("looking readings up")?;
        let replayed = tokio::task::spawn_blocking(move || again.settle(&answers)).await??;
        let Replayed { resolved, quarantine, messages, tables, news, counts } = replayed;
        if !looked.done && !resolved.is_empty() {
            self.resolve(state, looked, replay, (&resolved, quarantine), n).await?;
        }
        if !messages.is_empty() {
            self.amend(state, &messages, n).await?;
        }
        for (table, rows) in tables {
            self.commit(state, table, rows, n).await?;
        }
        state.known.extend(news);
        // Its readings have been counted, when they were quarantined.
        self.metrics.refined(plan.n, Counts::default());
        tracing::info!(plan = plan.n, ?counts, "quarantine judged again");
        Ok(counts)
    }

    /// The rows that the plan looks at.
    async fn look(&self, state: &mut State, n: i64, replay: &Replay) -> anyhow::Result<Looked> {
        let Some(base) = self.tables.snapshot(Table::Quarantine).await? else { return Ok(Looked::default()) };
        let done = has_step(state, Table::Quarantine, Some(&base), n).await?;
        let rows =
            self.quarantine(base.clone()).await?.filter(of_segments(&replay.segments))?.collect().await?;
        let rows: Vec<RecordBatch> =
            rows.iter().map(|batch| conform(batch, Table::Quarantine)).collect::<Result<_, _>>()?;
        let rows = concat_batches(&Table::Quarantine.schema(), &rows)?;
        let [segment, rule, reason, site, device] =
            ["segment", "rule", "reason", "site", "device_id"].map(|name| text(&rows, name));
        let (segment, rule, reason, site, device) = (segment?, rule?, reason?, site?, device?);
        let [offset, place, readings] = ["offset", "row", "readings"].map(|name| ints(&rows, name));
        let (offset, place, readings) = (offset?, place?, readings?);
        let resolved = micros(&rows, "resolved_at")?;
        let is = |wanted: &Option<String>, column: &StringArray, row: usize| {
            wanted.as_ref().is_none_or(|wanted| column.is_valid(row) && column.value(row) == wanted)
        };
        let Selection { rule: of_rule, site: of_site, device: of_device } = &replay.of;
        let mut held: BTreeMap<String, Vec<Held>> = BTreeMap::new();
        for row in 0..rows.num_rows() {
            let selected = match done {
                true => resolved.is_valid(row) && resolved.value(row) == replay.at.as_micros(),
                false => {
                    resolved.is_null(row)
                        && rule.value(row) != NO_READING
                        && is(of_rule, &rule, row)
                        && is(of_site, &site, row)
                        && is(of_device, &device, row)
                }
            };
            if selected {
                held.entry(segment.value(row).to_owned()).or_default().push(Held {
                    id: row,
                    offset: offset.value(row),
                    row: place.is_valid(row).then(|| place.value(row)),
                    readings: readings.value(row),
                    rule: rule.value(row).to_owned(),
                    reason: reason.value(row).to_owned(),
                });
            }
        }
        Ok(Looked { base: Some(base), done, rows: vec![rows], held })
    }

    /// Marks rows of quarantine, and adds those that follow them.
    async fn resolve(
        &self,
        state: &mut State,
        looked: Looked,
        replay: &Replay,
        (resolved, new): (&HashSet<usize>, Vec<RecordBatch>),
        n: i64,
    ) -> anyhow::Result<()> {
        if let Some(hook) = &self.before_commit {
            hook(Table::Quarantine)?;
        }
        let mut rows = looked.rows;
        if let Some(batch) = rows.first_mut() {
            let before = micros(batch, "resolved_at")?;
            let marked = before.iter().enumerate().map(|(row, before)| match resolved.contains(&row) {
                true => Some(replay.at.as_micros()),
                false => before,
            });
            let marked = marked.collect::<TimestampMicrosecondArray>().with_timezone("UTC");
            *batch = with_column(batch, "resolved_at", Arc::new(marked))?;
        }
        rows.extend(new);
        let predicate = predicate(&replay.segments);
        let replaced =
            self.tables.replace(Table::Quarantine, looked.base, Some(&predicate), rows, (REFINE, n)).await?;
        state.progress.insert(Table::Quarantine, (replaced.version(), n));
        Ok(())
    }

    /// Brings the balance of messages up to date.
    async fn amend(&self, state: &mut State, changes: &[Change], n: i64) -> anyhow::Result<()> {
        if let Some(hook) = &self.before_commit {
            hook(Table::Messages)?;
        }
        let base = self.tables.snapshot(Table::Messages).await?;
        if has_step(state, Table::Messages, base.as_ref(), n).await? {
            return Ok(());
        }
        let segments: BTreeSet<&String> = changes.iter().map(|change| &change.segment).collect();
        let segments: Vec<String> = segments.into_iter().cloned().collect();
        let session = self.tables.session_of(vec![(Table::Messages, base.clone())]).await?;
        let rows = session
            .table(TableReference::partial("silver", Table::Messages.name()))
            .await?
            .filter(of_segments(&segments))?
            .collect()
            .await?;
        let rows: Vec<RecordBatch> =
            rows.iter().map(|batch| conform(batch, Table::Messages)).collect::<Result<_, _>>()?;
        let rows = amended(&concat_batches(&Table::Messages.schema(), &rows)?, changes)?;
        let replaced = self
            .tables
            .replace(Table::Messages, base, Some(&predicate(&segments)), rows, (REFINE, n))
            .await?;
        state.progress.insert(Table::Messages, (replaced.version(), n));
        Ok(())
    }
}

/// Rows of `silver/messages` with their new balance, and those that were not there.
fn amended(rows: &RecordBatch, changes: &[Change]) -> anyhow::Result<Vec<RecordBatch>> {
    const BALANCE: [&str; 5] = ["rows", "readings", "stored", "duplicates", "quarantined"];
    let [segment, hash, site, gateway, epoch, lane] =
        ["segment", "payload_sha256", "site", "gateway_id", "epoch", "lane"].map(|name| text(rows, name));
    let (segment, hash, site) = (segment?, hash?, site?);
    let (gateway, epoch, lane) = (gateway?, epoch?, lane?);
    let (seq, again) = (ints(rows, "seq")?, column(rows, "redelivered")?.as_boolean().clone());
    let mut balance = Vec::new();
    for name in BALANCE {
        balance.push(ints(rows, name)?.values().to_vec());
    }
    // The first delivery of a payload before the others, which were skipped.
    let mut by_place: BTreeMap<(&str, Name, &str), Vec<usize>> = BTreeMap::new();
    for row in 0..rows.num_rows() {
        let name = Name {
            site: site.value(row).to_owned(),
            gateway: gateway.value(row).to_owned(),
            epoch: epoch.value(row).to_owned(),
            lane: lane.value(row).to_owned(),
            // Of the first of those that have no name.
            seq: if epoch.value(row).is_empty() { 0 } else { seq.value(row) },
        };
        by_place.entry((segment.value(row), name, hash.value(row))).or_default().push(row);
    }
    by_place.values_mut().for_each(|rows| rows.sort_by_key(|row| again.value(*row)));
    let mut all = vec![rows.clone()];
    for change in changes {
        let place = (change.segment.as_str(), change.name.clone(), change.hash.as_str());
        let of_place = by_place.entry(place).or_default();
        let held = |row: &&usize| balance[4][**row] + change.quarantined >= 0;
        match of_place.iter().find(held) {
            Some(row) => {
                let more =
                    [change.readings, change.readings, change.stored, change.duplicates, change.quarantined];
                balance.iter_mut().zip(more).for_each(|(column, more)| column[*row] += more);
            }
            None => {
                of_place.push(balance[0].len());
                for (name, column) in BALANCE.into_iter().zip(&mut balance) {
                    column.push(ints(&change.row, name)?.value(0));
                }
                all.push(change.row.clone());
            }
        }
    }
    let mut amended = concat_batches(&rows.schema(), &all)?;
    for (name, values) in BALANCE.into_iter().zip(balance) {
        amended = with_column(&amended, name, Arc::new(Int64Array::from(values)))?;
    }
    Ok(vec![amended])
}

fn with_column(rows: &RecordBatch, name: &str, values: ArrayRef) -> anyhow::Result<RecordBatch> {
    let mut columns = rows.columns().to_vec();
    columns[rows.schema().index_of(name)?] = values;
    Ok(RecordBatch::try_new(rows.schema(), columns)?)
}

fn of_segments(segments: &[String]) -> Expr {
    ident("segment").in_list(segments.iter().map(|path| lit(path.as_str())).collect(), false)
}

/// [`of_segments`] as SQL. Paths of segments have no quotes in them.
fn predicate(segments: &[String]) -> String {
    let listed: Vec<String> = segments.iter().map(|path| format!("'{path}'")).collect();
    format!("segment IN ({})", listed.join(", "))
}
