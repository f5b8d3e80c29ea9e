//! Rules: SQL over what comes, and what is done with the rows it finds. Rules observe; none can keep data out of the
//! lake, slow it down or stop it.
//!
//! ```text
//! bronze ─ plan n ─► silver ─┬─► rule A ─► rules/alerts ── board ──► Alertmanager, webhooks
//!                            ├─► rule B ─► broker, then rules/published
//!                            └─► rule C ─► rules/{table}
//! ```
//!
//! **Where.** The role `refine` runs them, each rule a task of its own, behind silver: a rule follows the numbered plans
//! of refinement, one after the other, once `silver/sensor_readings` has them. The lake is the queue: a rule that is
//! slow, fails or was away is behind by so many plans (`tailrace_cloud_rule_behind_plans`), and nothing is dropped.
//!
//! **What it sees.** Schema `batch`, in which names without a schema are looked up: `readings` (the columns of
//! `silver.sensor_readings`: `ts`, `site`, `gateway_id`, `device_id`, `device_type`, `asset_id`, `value`, `unit`,
//! `kind`, `quality`, `received_at`, …), `aggregates`, `anomalies`, `control`, `status`, `quarantine`: exactly the
//! rows that plan n put into these tables of silver. So readings are in canonical units and come once, whatever was
//! redelivered; what was refused is in `quarantine`. History is `silver.…`, `gold.…`, `ops.quality_results` and
//! `rules.alerts`, as they are when the rule runs; `live.readings` and `live.status` are the last minutes. Functions
//! are those of the PostgreSQL wire. A rule whose tables have nothing of a plan is not run.
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
//! finds a conflict, forgets what it believed, and begins anew from the lake; messages, and what receivers are told, may
//! then come twice, rows do not. Plans without rows are committed now and then ([`LAG`](engine::LAG)) and at the stop. A
//! new rule begins with the plan after the newest, one that was switched off where it stopped; `cloud-ingest rule try`
//! shows what it would have found before.
//!
//! **Alerts** that are active, and those that ended within the last hour, are read from `rules/alerts` at the start, and
//! every receiver is told of them again.
//!
//! **Failures.** SQL that does not plan is refused at the start ([`plan`]). What fails when it runs (SQL, time, rows, memory)
//! is counted, logged once a minute, and the rule goes on with the next plan; a sink that fails is tried again, and
//! only its own rule waits. A query may take `rules.timeout`, give `rules.rows` rows, and all of them together hold
//! `rules.memory_limit` bytes.
//!
//! Aggregates of the edge need no rule to become a time series: `gold/timeseries_1m` is made of them where a gateway
//! sends no readings, as a pure function of silver. What ships enabled is in `shipped.toml`.

pub mod alerts;
pub mod batch;
pub mod deliver;
pub mod engine;
pub mod metrics;
pub mod publish;
pub mod settings;
pub mod trial;

use std::{collections::BTreeSet, fmt, sync::Arc};

use anyhow::Context;
use arrow::{
    array::RecordBatch,
    compute::cast,
    datatypes::{DataType, Field, Schema, SchemaRef},
};
use common::{
    config::{Mistake, Mistakes},
    time::{Clock, Timestamp},
    wire::{cloud_status_topic, instant},
};
use datafusion::{
    prelude::{DataFrame, SessionContext},
    sql::{parser::Statement as PlannedStatement, sqlparser::ast::Statement},
};
use datafusion_postgres::datafusion_pg_catalog::sql::PostgresCompatibilityParser;
use futures::TryStreamExt;
use prometheus_client::registry::Registry;
use serde::Serialize;
use serde_json::Value;
use tokio::{sync::watch, task::JoinSet, time::Instant};

use self::{
    alerts::AlertSink,
    batch::{Batch, Needs},
    deliver::{Board, Target},
    engine::Engine,
    metrics::RuleMetrics,
    publish::{Publisher, Row, Template},
    settings::{RuleSettings, SinkKind},
};
use crate::{
    lake::{RuleTable, Table},
    plan::REFINE,
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

/// Plans every enabled rule; and the lake's tables with those of rules beside them.
///
/// # Errors
/// The mistakes in their SQL, each with the rule's name and its fix.
pub async fn plan(settings: &Settings, tables: &Tables) -> anyhow::Result<(Vec<Rule>, Tables)> {
    let mut mistakes = Mistakes::of("the rules");
    let (mut all, mut enabled) = (Vec::new(), Vec::new());
    for (of, rule) in try_plan(settings, tables).await? {
        match rule {
            Ok(rule) => {
                all.push(rule.sink.table());
                enabled.extend(of.enabled.then_some(rule));
            }
            Err(mistake) if of.enabled => mistakes.list.push(mistake),
            Err(_) => {}
        }
    }
    let enabled = mistakes.into_result(enabled)?;
    Ok((enabled, tables.clone().with_rules(with_shared(all))))
}

/// The lake's tables with those of rules beside them, whatever is wrong with some rules.
///
/// # Errors
/// When the lake cannot be read.
pub async fn known(settings: &Settings, tables: &Tables) -> anyhow::Result<Tables> {
    let planned = try_plan(settings, tables).await?.into_iter();
    let all = planned.filter_map(|(_, rule)| Some(rule.ok()?.sink.table()));
    Ok(tables.clone().with_rules(with_shared(all.collect())))
}

fn with_shared(own: Vec<Table>) -> Vec<Table> {
    let all: BTreeSet<Table> = own.into_iter().chain([Table::alerts(), Table::published()]).collect();
    all.into_iter().collect()
}

/// One rule by its name, whether it is enabled or not.
///
/// # Errors
/// When there is none, or it cannot run.
pub async fn find(settings: &Settings, tables: &Tables, name: &str) -> anyhow::Result<Rule> {
    let planned = try_plan(settings, tables).await?;
    let names = planned.iter().map(|(of, _)| of.name.as_str()).collect::<Vec<_>>().join(", ");
    let unknown = format!("there is no rule {name:?}; there are: {names}");
    let (_, rule) = planned.into_iter().find(|(of, _)| of.name == name).context(unknown)?;
    rule.map_err(|Mistake { key, problem, fix }| anyhow::anyhow!("{key}: {problem}; {fix}"))
}

/// A rule as `cloud-ingest rule ls` shows it.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the names are those of the JSON")]
pub struct Listed {
    pub name: String,
    pub enabled: bool,
    pub sink: Option<SinkKind>,
    /// Table or topic.
    pub target: Option<String>,
    pub mistake: Option<String>,
    /// The last plan of which it is committed that the rule has seen it; `None` before its first run.
    pub plan: Option<i64>,
    /// The newest plan in silver.
    pub newest: i64,
    pub alerts_active: Option<usize>,
}

impl fmt::Display for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.enabled { "enabled" } else { "disabled" };
        write!(f, "{:<24} {state:<8} → {}", self.name, self.target.as_deref().unwrap_or("?"))?;
        match self.plan {
            Some(n) => write!(f, ", plan {n} of {}", self.newest)?,
            None => write!(f, ", has not run")?,
        }
        if let Some(active) = self.alerts_active {
            write!(f, ", {active} alerts active")?;
        }
        match &self.mistake {
            Some(mistake) => write!(f, "\n  {mistake}"),
            None => Ok(()),
        }
    }
}

/// All rules and where they stand.
///
/// # Errors
/// When the lake cannot be read.
pub async fn list(settings: &Settings, tables: &Tables) -> anyhow::Result<Vec<Listed>> {
    let progress = async |table: Table, app: &str| match tables.snapshot(table).await? {
        Some(snapshot) => Tables::progress(&snapshot, app).await,
        None => Ok(None),
    };
    let newest = progress(Table::SensorReadings, REFINE).await?.unwrap_or(0);
    let mut listed = Vec::new();
    for (of, rule) in try_plan(settings, tables).await? {
        let (mut target, mut plan, mut alerts_active, mut mistake) = (None, None, None, None);
        match rule {
            Ok(rule) => {
                plan = progress(rule.sink.table(), &rule.app()).await?;
                target = Some(match &rule.sink {
                    Sink::Mqtt(topic) => format!("mqtt {topic}"),
                    Sink::Alert(_) => "alerts".to_owned(),
                    Sink::Table(table) => format!("rules.{}", table.name()),
                });
                if let Sink::Alert(_) = rule.sink {
                    alerts_active = Some(engine::active(tables, &of.name).await?);
                }
            }
            Err(Mistake { key, problem, fix }) => mistake = Some(format!("{key}: {problem}; {fix}")),
        }
        let RuleSettings { name, enabled, sink, .. } = of;
        listed.push(Listed { name, enabled, sink, target, mistake, plan, newest, alerts_active });
    }
    Ok(listed)
}

/// Plans every rule, also those that are switched off.
///
/// # Errors
/// When the lake cannot be read.
pub async fn try_plan(
    settings: &Settings,
    tables: &Tables,
) -> anyhow::Result<Vec<(RuleSettings, Result<Rule, Mistake>)>> {
    let tables = tables.clone().with_rules(vec![Table::alerts(), Table::published()]);
    let nobody = Live::new(live::Keep::default(), Arc::new(common::time::SystemClock));
    let context = batch::session(&tables, &Needs::everything(&tables), &Batch::Empty, &nobody).await?;
    let parser = PostgresCompatibilityParser::new();
    let mut planned = Vec::new();
    for of in settings::effective(&settings.rule) {
        let found = plan_one(&of, settings, &tables, &context, &parser).await;
        let found = found.map_err(|(part, problem, fix)| Mistake {
            key: format!("rule.{}.{part}", of.name),
            problem,
            fix: fix.to_owned(),
        });
        planned.push((of, found));
    }
    Ok(planned)
}

type Wrong = (&'static str, String, &'static str);

async fn plan_one(
    of: &RuleSettings,
    settings: &Settings,
    tables: &Tables,
    context: &SessionContext,
    parser: &PostgresCompatibilityParser,
) -> Result<Rule, Wrong> {
    const COLUMNS: &str = "see default.toml for the tables and columns that there are";
    let wrong = |problem: String| ("select", problem, COLUMNS);
    let statement =
        sql::parse_one(parser, &of.select).map_err(|e| ("select", e.to_string(), "correct the SQL"))?;
    if !matches!(statement, Statement::Query(_)) {
        return Err(("select", "it is no query".to_owned(), "write SELECT … FROM batch.readings …"));
    }
    sql::allow(&statement).map_err(|e| ("select", e.to_string(), "write a query"))?;
    let state = context.state();
    let references = state
        .resolve_table_references(&PlannedStatement::Statement(Box::new(statement.clone())))
        .map_err(|e| wrong(SqlError::from(e).to_string()))?;
    let plan = sql::plan_in(&state, statement.clone()).await.map_err(|e| wrong(e.to_string()))?;
    let needs = Needs::of(&references, tables);
    if needs.inputs.is_empty() {
        let inputs = batch::Input::ALL.map(batch::Input::name).join(", ");
        let problem = format!("it reads nothing of the batch: none of {inputs}");
        return Err(("select", problem, "read from batch.readings or one of the others"));
    }
    let columns = columns(plan.schema().as_arrow())?;
    let sink = sink(of, settings, &columns)?;
    if let Sink::Table(table) = sink {
        matches_what_stands(tables, table).await?;
    }
    Ok(Rule { settings: of.clone(), needs, sink, columns, statement })
}

/// The columns of a plan in types of the lake.
fn columns(planned: &Schema) -> Result<SchemaRef, Wrong> {
    let mut names = BTreeSet::new();
    let mut fields = Vec::new();
    for field in planned.fields() {
        let name = field.name();
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.starts_with(|c: char| c.is_ascii_digit()) || !name.chars().all(plain) || name.is_empty() {
            return Err(("select", format!("column {name:?} has no plain name"), "name it: … AS max_value"));
        }
        if !names.insert(name.to_ascii_lowercase()) {
            return Err((
                "select",
                format!("two columns are named {name:?}"),
                "name one of them: … AS other",
            ));
        }
        let Some(data_type) = lake_type(field.data_type()) else {
            let problem = format!("column {name:?} is {}", field.data_type());
            return Err(("select", problem, "cast it: CAST(… AS TEXT), or DOUBLE, BIGINT, TIMESTAMPTZ"));
        };
        fields.push(Field::new(name, data_type, true));
    }
    Ok(Arc::new(Schema::new(fields)))
}

fn lake_type(data_type: &DataType) -> Option<DataType> {
    Some(match data_type {
        DataType::Timestamp(..) => instant(),
        DataType::Date32 | DataType::Date64 => DataType::Date32,
        DataType::Boolean => DataType::Boolean,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null => DataType::Utf8,
        integer if integer.is_integer() => DataType::Int64,
        number if number.is_numeric() => DataType::Float64,
        _ => return None,
    })
}

fn sink(of: &RuleSettings, settings: &Settings, columns: &SchemaRef) -> Result<Sink, Wrong> {
    const THERE: &str = "name a column of the select";
    let missing = |name: &str| columns.field_with_name(name).is_err();
    match of.sink {
        None => Err(("sink", "not given".to_owned(), "write \"alert\", \"mqtt\" or \"table\"")),
        Some(SinkKind::Alert) => {
            if let Some(name) = of.key.iter().find(|name| missing(name)) {
                return Err(("key", format!("the select has no column {name:?}"), THERE));
            }
            for (name, wanted) in [
                ("resolved", DataType::Boolean),
                ("severity", DataType::Utf8),
                ("started_at", instant()),
                ("ended_at", instant()),
            ] {
                if let Ok(field) = columns.field_with_name(name)
                    && *field.data_type() != wanted
                {
                    let problem = format!("column {name} is {}, not {wanted}", field.data_type());
                    return Err(("select", problem, "give it another name, or cast it"));
                }
            }
            let severity = if of.severity.is_empty() { "warning" } else { &of.severity };
            Ok(Sink::Alert(AlertSink {
                key: of.key.clone(),
                severity: severity.to_owned(),
                resolve_after: of.resolve_after,
            }))
        }
        Some(SinkKind::Mqtt) => {
            let topic =
                Template::of(of, &settings.mqtt.root).map_err(|e| ("topic", e, "correct the topic"))?;
            if let Some(name) = topic.columns().find(|name| missing(name)) {
                return Err(("topic", format!("the select has no column {name:?}"), THERE));
            }
            Ok(Sink::Mqtt(topic))
        }
        Some(SinkKind::Table) => {
            if !missing("plan") {
                let problem = "a column is named \"plan\", which the table has anyway".to_owned();
                return Err(("select", problem, "give it another name"));
            }
            let plan = Arc::new(Field::new("plan", DataType::Int64, false));
            let fields = columns.fields().iter().cloned().chain([plan]);
            let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
            Ok(Sink::Table(Table::Rule(RuleTable::new(&settings::table_name(of), schema))))
        }
    }
}

/// A table that is there already must have the select's columns.
async fn matches_what_stands(tables: &Tables, table: Table) -> Result<(), Wrong> {
    let standing = async {
        let Some(snapshot) = tables.snapshot(table).await? else { return anyhow::Ok(None) };
        let context = tables.session_of(vec![(table, Some(snapshot))]).await?;
        let found = context.table(datafusion::common::TableReference::partial("rules", table.name())).await?;
        Ok(Some(Arc::clone(found.schema().inner())))
    };
    let found = standing.await.map_err(|e| ("table", format!("{e:#}"), "look at the lake"))?;
    let list = |schema: &Schema| {
        let each = schema.fields().iter().map(|field| format!("{} {}", field.name(), field.data_type()));
        each.collect::<Vec<_>>().join(", ")
    };
    match found {
        Some(found) if list(&found) != list(&table.schema()) => {
            let problem = format!(
                "rules.{} has the columns {}, the select gives {}",
                table.name(),
                list(&found),
                list(&table.schema())
            );
            Err(("table", problem, "give the rule another table, or select those columns"))
        }
        _ => Ok(()),
    }
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
        let subscription = live::Subscription { mqtt: mqtt.clone(), root: settings.mqtt.root.clone() };
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
