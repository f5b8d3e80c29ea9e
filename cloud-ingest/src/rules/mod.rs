//! Rules: SQL over what comes, and what is done with the rows it finds. Rules observe; none can keep data out of the
//! lake, slow it down or stop it.
//!
//! ```text
//! bronze ─ plan n ─► silver ─┬─► rule A ─► rules/alerts ── board ──► Alertmanager, webhooks
//!                            ├─► rule B ─► broker, then rules/published
//!                            └─► rule C ─► rules/{table}
//! ```
//!
//! **Where.** The role `refine` runs them, each rule a task of its own, behind silver: a rule follows the numbered
//! plans of refinement, one after the other, once `silver/sensor_readings` has them. The lake is the queue: a rule
//! that is slow, fails or was away is behind by so many plans (`tailrace_cloud_rule_behind_plans`), and nothing is
//! dropped.
//!
//! **What it sees.** Schema `batch`, in which names without a schema are looked up: `readings` (the columns of
//! `silver.sensor_readings`: `ts`, `site`, `gateway_id`, `device_id`, `device_type`, `asset_id`, `value`, `unit`,
//! `kind`, `quality`, `received_at`, …), `aggregates`, `anomalies`, `control`, `status`, `quarantine`: the rows of plan
//! n's segments in these tables of silver. So readings are in canonical units and come once, whatever was redelivered;
//! what was refused is in `quarantine`. What quarantine gives back when it is judged again is seen by those rules only
//! that come to its plan after that. History is `silver.…`, `gold.…`, `ops.quality_results` and `rules.alerts`, as they
//! are when the rule runs; `live.readings` and `live.status` are the last minutes. Functions are those of the PostgreSQL
//! wire. A rule whose tables have nothing of a plan is not run.
//!
//! **What it leaves.** Every sink has a Delta table, and the commit with `txn("rule:NAME", n)` is the rule's progress:
//!
//! | sink | table | each row |
//! |---|---|---|
//! | `table` | `rules/{table}`: the select's columns and `plan` | exactly once: rows and progress are one commit |
//! | `alert` | `rules/alerts`: its course ([`alerts`]) | recorded exactly once, told at least once ([`deliver`]) |
//! | `mqtt` | `rules/published`: how many messages of which plan | at least once, with the same `id` ([`publish`]) |
//!
//! A crash repeats at most one plan in which a rule found something. Two processes do no harm: whoever commits second
//! finds a conflict, forgets what it believed, and begins anew from the lake; messages, and what receivers are told,
//! may then come twice, rows do not. Plans without rows are committed now and then ([`LAG`](engine::LAG)) and at the
//! stop. A new rule begins with the plan after the newest, one that was switched off where it stopped; `cloud-ingest
//! rule try` shows what it would have found before.
//!
//! **Alerts** that are active, and those that ended within the last hour, are read from `rules/alerts` at the start,
//! and every receiver is told of them again.
//!
//! **Failures.** SQL that does not plan is refused at the start ([`plan`]). What fails when it runs (SQL, time, rows,
//! memory) is counted, logged once a minute, and the rule goes on with the next plan, after three tries where the store
//! or another rule may have been the reason; a sink that fails is tried again, and only its own rule waits. A query may
//! take `rules.timeout`, give `rules.rows` rows, and all of them together hold `rules.memory_limit` bytes.
//!
//! Aggregates of the edge need no rule to become a time series: `gold/timeseries_1m` is made of them where a gateway
//! sends no readings, as a pure function of silver. What ships enabled is in `shipped.toml`.

pub mod alerts;
pub mod batch;
pub mod deliver;
pub mod engine;
pub mod metrics;
pub mod planning;
pub mod publish;
pub mod settings;
pub mod trial;

use std::sync::Arc;

use anyhow::Context;
use arrow::{array::RecordBatch, compute::cast, datatypes::SchemaRef};
use common::{
    time::{Clock, Timestamp},
    wire::cloud_status_topic,
};
use datafusion::{
    prelude::{DataFrame, SessionContext},
    sql::sqlparser::ast::Statement,
};
use futures::TryStreamExt;
use prometheus_client::registry::Registry;
use serde_json::Value;
use tokio::{sync::watch, task::JoinSet, time::Instant};

pub use self::planning::{find, known, list, plan};
use self::{
    alerts::AlertSink,
    batch::Needs,
    deliver::{Board, Target},
    engine::Engine,
    metrics::RuleMetrics,
    publish::{Publisher, Row, Template},
    settings::RuleSettings,
};
use crate::{
    lake::Table,
    serve::{
        json,
        live::{self, Live},
        sql::{self, Limits, SqlError},
    },
    settings::Settings,
    subscribe,
    tables::Tables,
};

/// Sent to whoever tells receivers when the board has changed.
pub(crate) type Told = u64;

/// A rule that is planned.
#[derive(Clone, Debug)]
pub struct Rule {
    /// As it is configured.
    pub settings: RuleSettings,
    /// What it reads.
    pub needs: Needs,
    /// Where its rows go.
    pub sink: Sink,
    /// Its columns, in types of the lake.
    pub columns: SchemaRef,
    statement: Statement,
}

/// Where the rows of a rule go.
#[derive(Clone, Debug)]
pub enum Sink {
    /// Alertmanager and webhooks.
    Alert(AlertSink),
    /// The broker.
    Mqtt(Template),
    /// This table.
    Table(Table),
}

impl Sink {
    /// The table whose commits are the rule's progress.
    pub fn table(&self) -> Table {
        match self {
            Sink::Alert(_) => Table::alerts(),
            Sink::Mqtt(_) => Table::published(),
            Sink::Table(table) => *table,
        }
    }
}

impl Rule {
    /// App id of its transactions.
    pub fn app(&self) -> String {
        format!("rule:{}", self.settings.name)
    }

    /// Runs the select in a session with its batch; in types of the lake.
    ///
    /// # Errors
    /// See [`SqlError`]; [`Failure::of`] says it in the words of rules.
    pub async fn run(&self, context: &SessionContext, limits: Limits) -> Result<Vec<RecordBatch>, SqlError> {
        let deadline = Instant::now() + limits.timeout;
        let start = async {
            let state = context.state();
            let plan = sql::plan_in(&state, self.statement.clone()).await?;
            Ok::<_, SqlError>(DataFrame::new(state, plan).execute_stream().await?)
        };
        let started = tokio::time::timeout_at(deadline, start).await;
        let rows = started.map_err(|_| SqlError::Timeout(limits.timeout))??;
        let batches: Vec<RecordBatch> = sql::bounded(rows, limits, deadline).try_collect().await?;
        let conform = |batch: RecordBatch| {
            let columns = batch.columns().iter().zip(self.columns.fields());
            let columns = columns.map(|(column, field)| cast(column, field.data_type()));
            RecordBatch::try_new(Arc::clone(&self.columns), columns.collect::<Result<_, _>>()?)
        };
        let conformed: Result<Vec<_>, arrow::error::ArrowError> = batches.into_iter().map(conform).collect();
        conformed.map_err(|e| SqlError::Failed(e.to_string()))
    }
}

/// Why a rule found nothing in a batch that it should have looked through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// As it stands in metrics.
    pub reason: &'static str,
    /// What happened, and the fix.
    pub text: String,
}

impl Failure {
    fn of(error: &SqlError) -> Failure {
        let (reason, text) = match error {
            SqlError::Timeout(after) => (
                "timeout",
                format!("it took longer than {after:?}; let it read less, or raise rules.timeout"),
            ),
            SqlError::TooManyRows(rows) => {
                ("rows", format!("it found more than {rows} rows; group them, or raise rules.rows"))
            }
            SqlError::OutOfMemory(why) => {
                ("memory", format!("{why}; let it read less, or raise rules.memory_limit"))
            }
            other => ("sql", other.to_string()),
        };
        Failure { reason, text }
    }
}

/// What the pipeline itself subscribes to: no rule may publish there.
pub fn subscribed(settings: &Settings) -> Vec<String> {
    let data = subscribe::data_filters(&settings.mqtt, &settings.json_filters());
    let documents = subscribe::document_filters(&settings.mqtt);
    [data, documents, vec![cloud_status_topic(&settings.mqtt.root)]].concat()
}

/// A value as text: labels, annotations, topics.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The rows of a query as JSON objects.
pub(crate) fn rows(batches: &[RecordBatch]) -> Vec<Row> {
    json::objects(batches)
}

/// Whether to log again what was logged at `last`.
pub(crate) fn once_a_minute(last: &mut Option<Timestamp>, now: Timestamp) -> bool {
    let due = last.is_none_or(|last| now < last || now.since(last).as_secs() >= 60);
    if due {
        *last = Some(now);
    }
    due
}

/// Starts a task for each rule and each receiver of alerts, which end when `silver` does. Rules that are new begin
/// here.
///
/// # Errors
/// When a secret or a certificate cannot be read.
pub async fn start(
    stages: &mut JoinSet<anyhow::Result<()>>,
    rules: Vec<Rule>,
    settings: &Settings,
    tables: &Tables,
    clock: &Arc<dyn Clock>,
    registry: &mut Registry,
    silver: &watch::Receiver<u64>,
) -> anyhow::Result<()> {
    let metrics = RuleMetrics::new(registry);
    let bounded = tables.bounded(settings.rules.memory_limit)?;
    let live = Live::new(live::Keep::default(), Arc::clone(clock));
    let (board, (told, heard)) = (Board::default(), watch::channel(0));
    let mqtt = subscribe::connection(&settings.mqtt)?;
    for target in Target::all(&settings.alerts)? {
        let telling = deliver::run(target, board.clone(), Arc::clone(clock), heard.clone(), metrics.clone());
        stages.spawn(async move {
            telling.await;
            Ok(())
        });
    }
    if rules.iter().any(|rule| rule.needs.live) {
        let subscription = live::Subscription::new(mqtt.clone(), settings);
        let (live, mut silver) = (live.clone(), silver.clone());
        stages.spawn(async move {
            let (_never, stop) = watch::channel(false);
            tokio::select! {
                () = live::follow(subscription, live, stop) => {}
                _ = silver.wait_for(|_| false) => {}
            }
            Ok(())
        });
    }
    for rule in rules {
        let parts = engine::Parts {
            tables: bounded.clone(),
            live: live.clone(),
            limits: Limits { timeout: settings.rules.timeout, rows: settings.rules.rows },
            publisher: matches!(rule.sink, Sink::Mqtt(_)).then(|| Publisher::new(mqtt.clone())),
            subscribed: subscribed(settings),
            board: board.clone(),
            told: told.clone(),
            metrics: metrics.clone(),
        };
        let name = rule.settings.name.clone();
        let mut engine = Engine::new(rule, parts);
        if let Err(e) = engine.begin(clock.now()).await {
            tracing::warn!(rule = name, error = format!("{e:#}"), "the rule begins later");
        }
        let (clock, silver, interval) = (Arc::clone(clock), silver.clone(), settings.refine.interval);
        stages.spawn(async move {
            // A rule that panics is a fault of this program, and still no reason to stop refining.
            let ran = tokio::spawn(engine::run(engine, clock, silver, interval)).await;
            if let Err(e) = ran.context("a rule panicked") {
                tracing::error!(rule = name, error = format!("{e:#}"), "the rule stands still");
            }
            Ok(())
        });
    }
    Ok(())
}
