//! From `[[rule]]` to rules that can run: their SQL is planned against the lake's tables, before anything runs.

use std::{collections::BTreeSet, fmt, sync::Arc};

use anyhow::Context;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use common::{
    config::{Mistake, Mistakes},
    time::SystemClock,
    wire::instant,
};
use datafusion::{
    common::TableReference,
    prelude::SessionContext,
    sql::{parser::Statement as PlannedStatement, sqlparser::ast::Statement},
};
use datafusion_postgres::datafusion_pg_catalog::sql::PostgresCompatibilityParser;
use serde::Serialize;

use super::{
    Rule, Sink,
    alerts::AlertSink,
    batch::{self, Batch, Needs},
    engine,
    publish::Template,
    settings::{self, RuleSettings, SinkKind},
};
use crate::{
    lake::{RuleTable, Table},
    plan::REFINE,
    serve::{
        live::{Keep, Live},
        sql::{self, SqlError},
    },
    settings::Settings,
    tables::Tables,
};

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
    let nobody = Live::new(Keep::default(), Arc::new(SystemClock));
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
            for (part, names) in [("key", &of.key), ("labels", &of.labels)] {
                if let Some(name) = names.iter().find(|name| missing(name)) {
                    return Err((part, format!("the select has no column {name:?}"), THERE));
                }
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
                labels: of.labels.clone(),
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
        let found = context.table(TableReference::partial("rules", table.name())).await?;
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
