//! One rule, plan by plan. See [`super`] for what it promises.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::Context;
use arrow::array::{
    Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use common::time::{Clock, Timestamp};
use deltalake::DeltaTable;
use tokio::sync::watch;

use super::{
    Failure, Rule, Sink, Told,
    alerts::{Alert, Alerts},
    batch::{self, Batch, Span},
    deliver::Board,
    metrics::RuleMetrics,
    once_a_minute,
    publish::{self, Publisher},
};
use crate::{
    lake::Table,
    plan::REFINE,
    serve::{
        live::Live,
        sql::{Limits, SqlError},
    },
    tables::{SMALL_FILES, TIERS, Tables},
    upkeep::read_plan,
};

/// Progress without rows is committed once it is so many plans ahead of what is committed.
pub const LAG: i64 = 64;
/// A rule's table is looked at for small files after so many commits.
const COMPACT_EVERY: u32 = 32;
/// Tries of a batch when the lake fails under the query.
const TRIES: u32 = 3;
/// Waits between two tries: the first, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// How long a sink that fails may hold up the stop.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the engine of a rule works with.
pub struct Parts {
    /// With bounded memory.
    pub tables: Tables,
    /// The last minutes.
    pub live: Live,
    /// Of one query.
    pub limits: Limits,
    /// For the sink `mqtt`.
    pub publisher: Option<Publisher>,
    /// Where nothing may be published.
    pub subscribed: Vec<String>,
    /// Where receivers look for alerts.
    pub board: Board,
    /// Tells them to look.
    pub told: watch::Sender<Told>,
    /// Of all rules.
    pub metrics: RuleMetrics,
}

/// What a step did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// There is no plan that the rule has not seen.
    Idle,
    /// Plans up to this one have nothing for the rule.
    Passed(i64),
    /// A plan was looked through; so many rows went to the sink.
    Ran(i64, usize),
    /// A plan was not looked through, and will not be.
    Failed(i64, Failure),
}

/// A rule and where it stands.
pub struct Engine {
    rule: Rule,
    parts: Parts,
    /// The last plan that was seen, and the last that the table says so of; `None` when the lake must be asked.
    at: Option<(i64, i64)>,
    alerts: Alerts,
    commits: u32,
    /// A batch on which the lake failed, and how often.
    trouble: (i64, u32),
    logged: Option<Timestamp>,
    progress: BTreeMap<(Table, String), (Option<u64>, i64)>,
}

impl Engine {
    /// A rule that knows nothing yet.
    pub fn new(rule: Rule, parts: Parts) -> Self {
        Self {
            rule,
            parts,
            at: None,
            alerts: Alerts::default(),
            commits: 0,
            trouble: (0, 0),
            logged: None,
            progress: BTreeMap::new(),
        }
    }

    /// Finds out where the rule stands. A new one begins behind the plan that is the newest now, and that is committed.
    ///
    /// # Errors
    /// When the lake cannot be read or written to; the first step does it then.
    pub async fn begin(&mut self, now: Timestamp) -> anyhow::Result<()> {
        let newest = self.committed(Table::SensorReadings, REFINE).await?.0.unwrap_or(0);
        self.at = Some(self.load(newest, now).await.context("reading where the rule stands")?);
        Ok(())
    }

    /// Looks through the next plan, if there is one, and does what follows.
    ///
    /// # Errors
    /// When the lake or the sink fails, or another process is at work: the next step begins by asking the lake.
    pub async fn step(&mut self, now: Timestamp) -> anyhow::Result<Outcome> {
        let stepped = self.advance(now).await;
        if stepped.is_err() {
            self.at = None;
        }
        stepped
    }

    async fn advance(&mut self, now: Timestamp) -> anyhow::Result<Outcome> {
        if self.at.is_none() {
            self.begin(now).await?;
        }
        self.end_alerts(now).await?;
        let newest = self.committed(Table::SensorReadings, REFINE).await?.0.unwrap_or(0);
        let at = self.at.map_or(newest, |(at, _)| at);
        self.parts.metrics.behind(&self.rule.settings.name, newest - at);
        if at >= newest {
            return Ok(Outcome::Idle);
        }
        if !self.has_input(at + 1).await? {
            self.pass(newest).await?;
            return Ok(Outcome::Passed(newest));
        }
        let n = at + 1;
        let outcome = match self.look_through(n).await? {
            Ok(found) => Outcome::Ran(n, self.hand_over(n, found, now).await?),
            Err(failure) => {
                self.failed(n, &failure, now);
                self.pass(n).await?;
                // What is given up for good need not be tried again when another plan fails.
                self.finish().await?;
                Outcome::Failed(n, failure)
            }
        };
        self.parts.metrics.behind(&self.rule.settings.name, newest - n);
        Ok(outcome)
    }

    /// The last plan that was seen.
    async fn load(&mut self, newest: i64, now: Timestamp) -> anyhow::Result<(i64, i64)> {
        let app = self.rule.app();
        let (progress, base) = self.committed(self.rule.sink.table(), &app).await?;
        if let Sink::Alert(_) = &self.rule.sink {
            self.alerts =
                Alerts::restored(recorded(&self.parts.tables, &self.rule.settings.name).await?, now);
            self.post();
        }
        match progress {
            Some(n) => Ok((n, n)),
            None => {
                self.commit(base, Vec::new(), newest).await?;
                Ok((newest, newest))
            }
        }
    }

    /// Whether any table that the rule reads of the batch may have rows of plan `n` or a later one.
    async fn has_input(&mut self, n: i64) -> anyhow::Result<bool> {
        for input in self.rule.needs.inputs.clone() {
            if self.committed(input.table(), REFINE).await?.0 >= Some(n) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The rows that the rule finds in plan `n`.
    async fn look_through(&mut self, n: i64) -> anyhow::Result<Result<Vec<RecordBatch>, Failure>> {
        let tables = &self.parts.tables;
        let plan = read_plan(tables.store(), u64::try_from(n)?).await?;
        let span = Span::of(tables, &plan, (i64::MIN, i64::MAX)).await?;
        let context = batch::session(tables, &self.rule.needs, &Batch::Plan(span), &self.parts.live).await?;
        match self.rule.run(&context, self.parts.limits).await {
            Ok(found) => Ok(Ok(found)),
            // Perhaps the store's doing, or another rule's, which is no reason to leave the batch out.
            Err(e @ (SqlError::Failed(_) | SqlError::Timeout(_) | SqlError::OutOfMemory(_)))
                if self.tries(n) < TRIES =>
            {
                anyhow::bail!("plan {n}: {e}")
            }
            Err(e) => Ok(Err(Failure::of(&e))),
        }
    }

    fn tries(&mut self, n: i64) -> u32 {
        let so_far = if self.trouble.0 == n { self.trouble.1 } else { 0 };
        self.trouble = (n, so_far + 1);
        so_far + 1
    }

    /// Gives what was found to the sink, and commits that plan `n` is done.
    async fn hand_over(&mut self, n: i64, found: Vec<RecordBatch>, now: Timestamp) -> anyhow::Result<usize> {
        let count = found.iter().map(RecordBatch::num_rows).sum();
        let name = self.rule.settings.name.clone();
        self.parts.metrics.ran(&name, count);
        let app = self.rule.app();
        if count == 0 {
            self.pass(n).await?;
            return Ok(0);
        }
        // Whoever has done this plan meanwhile has done all of it.
        let (progress, base) = self.committed(self.rule.sink.table(), &app).await?;
        anyhow::ensure!(progress < Some(n), "another process has done plan {n}");
        match self.rule.sink.clone() {
            Sink::Table(table) => {
                let rows = found.iter().map(|batch| {
                    let plan: ArrayRef = Arc::new(Int64Array::from(vec![n; batch.num_rows()]));
                    let columns = batch.columns().iter().cloned().chain([plan]).collect();
                    RecordBatch::try_new(table.schema(), columns)
                });
                self.commit(base, rows.collect::<Result<_, _>>()?, n).await?;
            }
            Sink::Alert(sink) => {
                let mut next = self.alerts.clone();
                match next.apply(&name, &sink, &super::rows(&found), now) {
                    Ok(changed) => {
                        if changed.is_empty() {
                            self.pass(n).await?;
                        } else {
                            self.commit(base, vec![record(&changed, n, now)?], n).await?;
                        }
                        self.alerts = next;
                        self.post();
                    }
                    Err(e) => {
                        self.failed(n, &Failure { reason: "alerts", text: e.to_string() }, now);
                        self.pass(n).await?;
                    }
                }
            }
            Sink::Mqtt(topic) => {
                let rows = super::rows(&found);
                let (messages, refused) = publish::outgoing(&name, &topic, &self.parts.subscribed, n, rows);
                if let Some(why) = refused.first() {
                    let failure = Failure { reason: "topic", text: why.clone() };
                    self.parts.metrics.failed(&name, "topic", refused.len() as u64 - 1);
                    self.failed(n, &failure, now);
                }
                let publisher =
                    self.parts.publisher.as_mut().context("a rule that publishes has a connection")?;
                publisher.publish(&name, n, &messages).await?;
                self.commit(base, vec![published(&name, n, messages.len(), now)?], n).await?;
            }
        }
        Ok(count)
    }

    /// Plans up to `n` left nothing behind; that is committed now and then.
    async fn pass(&mut self, n: i64) -> anyhow::Result<()> {
        let (at, committed) = self.at.unwrap_or((n, n));
        self.at = Some((at.max(n), committed));
        if n - committed >= LAG {
            self.finish().await?;
        }
        Ok(())
    }

    /// Commits where the rule stands.
    ///
    /// # Errors
    /// When the lake fails, or another process is at work.
    pub async fn finish(&mut self) -> anyhow::Result<()> {
        let Some((at, committed)) = self.at.filter(|(at, committed)| at > committed) else { return Ok(()) };
        let (progress, base) = self.committed(self.rule.sink.table(), &self.rule.app()).await?;
        if progress > Some(committed) {
            self.at = None;
            return Ok(());
        }
        self.commit(base, Vec::new(), at).await
    }

    async fn commit(
        &mut self,
        base: Option<DeltaTable>,
        rows: Vec<RecordBatch>,
        n: i64,
    ) -> anyhow::Result<()> {
        let (table, app) = (self.rule.sink.table(), self.rule.app());
        let tables = &self.parts.tables;
        tables.append(table, base, rows, (app.as_str(), n)).await?;
        self.at = Some((n, n));
        self.commits += 1;
        if self.commits.is_multiple_of(COMPACT_EVERY)
            && let Err(e) = tables.compact(table, &TIERS, SMALL_FILES).await
        {
            tracing::info!(table = table.path(), error = %e, "not compacted");
        }
        Ok(())
    }

    /// Ends alerts that nothing has confirmed for long enough.
    async fn end_alerts(&mut self, now: Timestamp) -> anyhow::Result<()> {
        let Sink::Alert(sink) = &self.rule.sink else { return Ok(()) };
        let mut next = self.alerts.clone();
        let mut ended = next.tick(sink.resolve_after, now);
        if !ended.is_empty() {
            let (at, committed) = self.at.unwrap_or_default();
            let (progress, base) = self.committed(self.rule.sink.table(), &self.rule.app()).await?;
            anyhow::ensure!(progress <= Some(committed), "another process is at work");
            // Of a plan that is done another process may still have ended alerts.
            let recorded = recorded(&self.parts.tables, &self.rule.settings.name).await?;
            ended.retain(|alert| {
                recorded.iter().any(|known| known.alert_id == alert.alert_id && known.ended_at.is_none())
            });
            if !ended.is_empty() {
                self.commit(base, vec![record(&ended, at, now)?], at).await?;
            }
        }
        if next != self.alerts {
            self.alerts = next;
            self.post();
        }
        Ok(())
    }

    fn post(&self) {
        let name = &self.rule.settings.name;
        self.parts.metrics.active(name, self.alerts.active());
        self.parts.board.post(name, self.alerts.all().cloned().collect());
        self.parts.told.send_modify(|n| *n += 1);
    }

    /// What an app has committed to a table, and the snapshot that says so.
    async fn committed(
        &mut self,
        table: Table,
        app: &str,
    ) -> anyhow::Result<(Option<i64>, Option<DeltaTable>)> {
        let Some(snapshot) = self.parts.tables.snapshot(table).await? else { return Ok((None, None)) };
        let key = (table, app.to_owned());
        let progress = match self.progress.get(&key) {
            Some((version, progress)) if *version == snapshot.version() => Some(*progress),
            _ => {
                let progress = Tables::progress(&snapshot, app).await?;
                if let Some(progress) = progress {
                    self.progress.insert(key, (snapshot.version(), progress));
                }
                progress
            }
        };
        Ok((progress, Some(snapshot)))
    }

    fn failed(&mut self, n: i64, failure: &Failure, now: Timestamp) {
        let rule = &self.rule.settings.name;
        self.parts.metrics.failed(rule, failure.reason, 1);
        if once_a_minute(&mut self.logged, now) {
            tracing::warn!(
                rule,
                plan = n,
                reason = failure.reason,
                why = failure.text,
                "the rule failed on a batch"
            );
        }
    }
}

/// Steps until `silver` closes and the rule has seen everything.
pub async fn run(
    mut engine: Engine,
    clock: Arc<dyn Clock>,
    mut silver: watch::Receiver<u64>,
    interval: Duration,
) {
    let mut retry = RETRY.0;
    let mut ended: Option<tokio::time::Instant> = None;
    loop {
        if silver.has_changed().is_err() {
            ended.get_or_insert_with(tokio::time::Instant::now);
        }
        match engine.step(clock.now()).await {
            Ok(Outcome::Idle) if ended.is_some() => break,
            Ok(Outcome::Idle) => {
                retry = RETRY.0;
                tokio::select! {
                    _ = silver.changed() => {}
                    () = tokio::time::sleep(interval) => {}
                }
            }
            Ok(_) => retry = RETRY.0,
            Err(e) => {
                let rule = engine.rule.settings.name.clone();
                engine.parts.metrics.failed(&rule, "sink", 1);
                if once_a_minute(&mut engine.logged, clock.now()) {
                    tracing::warn!(rule, error = format!("{e:#}"), retry_in = ?retry, "the rule waits");
                }
                if ended.is_some_and(|since| since.elapsed() >= PATIENCE) {
                    break;
                }
                // The stop ends the wait.
                let stopping = async {
                    match ended {
                        None => drop(silver.wait_for(|_| false).await),
                        Some(_) => tokio::time::sleep(RETRY.0).await,
                    }
                };
                let _ = tokio::time::timeout(retry, stopping).await;
                retry = (retry * 2).min(RETRY.1);
            }
        }
    }
    if let Err(e) = engine.finish().await {
        tracing::info!(
            rule = engine.rule.settings.name,
            error = format!("{e:#}"),
            "some plans are looked through again"
        );
    }
}

/// Rows of `rules/alerts`.
fn record(alerts: &[Alert], n: i64, now: Timestamp) -> anyhow::Result<RecordBatch> {
    let texts = |of: &dyn Fn(&Alert) -> String| -> ArrayRef {
        Arc::new(alerts.iter().map(|alert| Some(of(alert))).collect::<StringArray>())
    };
    let instants = |of: &dyn Fn(&Alert) -> Option<Timestamp>| -> ArrayRef {
        let times = alerts.iter().map(|alert| of(alert).map(Timestamp::as_micros));
        Arc::new(times.collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
    };
    let columns = vec![
        instants(&|_| Some(now)),
        texts(&|a| a.rule.clone()),
        texts(&|a| a.alert_id.clone()),
        texts(&|a| a.state().to_owned()),
        texts(&|a| a.severity.clone()),
        texts(&|a| serde_json::json!(a.labels).to_string()),
        texts(&|a| serde_json::json!(a.annotations).to_string()),
        instants(&|a| Some(a.started_at)),
        instants(&|a| a.ended_at),
        Arc::new(Int64Array::from(vec![n; alerts.len()])),
    ];
    Ok(RecordBatch::try_new(Table::alerts().schema(), columns)?)
}

/// A row of `rules/published`.
fn published(rule: &str, n: i64, messages: usize, now: Timestamp) -> anyhow::Result<RecordBatch> {
    let columns: Vec<ArrayRef> = vec![
        Arc::new(TimestampMicrosecondArray::from(vec![now.as_micros()]).with_timezone("UTC")),
        Arc::new(StringArray::from(vec![rule])),
        Arc::new(Int64Array::from(vec![n])),
        Arc::new(Int64Array::from(vec![i64::try_from(messages)?])),
    ];
    Ok(RecordBatch::try_new(Table::published().schema(), columns)?)
}

/// The last recorded state of each alert of a rule, whatever order clocks have given to what was recorded: plans are in
/// order, and within one an alert ends after it began.
async fn recorded(tables: &Tables, rule: &str) -> anyhow::Result<Vec<Alert>> {
    let alerts = Table::alerts();
    let Some(snapshot) = tables.snapshot(alerts).await? else { return Ok(Vec::new()) };
    let context = tables.session_of(vec![(alerts, Some(snapshot))]).await?;
    // A row an alert, whatever the length of its history.
    let last =
        |column: &str| format!("last_value({column} order by plan, state = 'resolved', at) as {column}");
    let columns = ["severity", "labels", "annotations", "started_at", "ended_at", "at"].map(last).join(", ");
    let sql = format!("select alert_id, {columns} from rules.alerts where rule = '{rule}' group by alert_id");
    let mut found = Vec::new();
    for batch in context.sql(&sql).await?.collect().await? {
        let texts = [0, 1, 2, 3].map(|i| batch.column(i).as_string::<i32>().clone());
        let times = [4, 5, 6].map(|i| arrow::compute::cast(batch.column(i), &common::wire::instant()));
        let [started, ended, at] = times;
        let (started, ended, at) = (started?, ended?, at?);
        let micros = |column: &ArrayRef, row: usize| {
            let column = column.as_primitive::<arrow::datatypes::TimestampMicrosecondType>();
            column.is_valid(row).then(|| Timestamp::from_micros(column.value(row)))
        };
        for row in 0..batch.num_rows() {
            let [alert_id, severity, labels, annotations] = [0, 1, 2, 3].map(|i: usize| texts[i].value(row));
            found.push(Alert {
                rule: rule.to_owned(),
                alert_id: alert_id.to_owned(),
                severity: severity.to_owned(),
                labels: serde_json::from_str(labels).context("labels in rules/alerts")?,
                annotations: serde_json::from_str(annotations).context("annotations in rules/alerts")?,
                started_at: micros(&started, row).context("an alert has begun")?,
                ended_at: micros(&ended, row),
                seen_at: micros(&at, row).context("an alert was recorded")?,
                restored: true,
            });
        }
    }
    Ok(found)
}

/// How many alerts of a rule are active, as far as it is recorded.
///
/// # Errors
/// When the lake cannot be read.
pub async fn active(tables: &Tables, rule: &str) -> anyhow::Result<usize> {
    Ok(recorded(tables, rule).await?.iter().filter(|alert| alert.ended_at.is_none()).count())
}
