//! The batch that a rule sees: what one plan put into silver, as tables of the schema `batch`.
//!
//! In silver they are found by the plan's segments; the times of its messages keep the search short. So a batch is the
//! same whenever it is asked for, whatever was compacted meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use anyhow::Context;
use arrow::{
    array::{Array, AsArray, RecordBatch},
    compute::cast,
    datatypes::TimestampMicrosecondType,
};
use common::time::{HOUR_MICROS, Timestamp};
use datafusion::{
    catalog::{MemTable, MemorySchemaProvider, TableProvider},
    common::TableReference,
    config::Dialect,
    datasource::{ViewTable, empty::EmptyTable},
    logical_expr::Expr,
    prelude::{SessionContext, ident, lit},
    scalar::ScalarValue,
};

use crate::{
    lake::{SegmentName, Table},
    plan::Plan,
    serve::{
        functions,
        live::{self, Live},
    },
    tables::{CATALOG, Tables},
};

/// The schema of the batch, in which a name without one is looked up.
pub const SCHEMA: &str = "batch";

/// A table of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names are the tables'")]
pub enum Input {
    Readings,
    Aggregates,
    Anomalies,
    Control,
    Status,
    Quarantine,
}

impl Input {
    /// All of them.
    pub const ALL: [Input; 6] = [
        Input::Readings,
        Input::Aggregates,
        Input::Anomalies,
        Input::Control,
        Input::Status,
        Input::Quarantine,
    ];

    /// Its name in SQL.
    pub const fn name(self) -> &'static str {
        match self {
            Input::Readings => "readings",
            Input::Aggregates => "aggregates",
            Input::Anomalies => "anomalies",
            Input::Control => "control",
            Input::Status => "status",
            Input::Quarantine => "quarantine",
        }
    }

    /// The table of silver whose columns it has.
    pub const fn table(self) -> Table {
        match self {
            Input::Readings => Table::SensorReadings,
            Input::Aggregates => Table::Aggregates,
            Input::Anomalies => Table::Anomalies,
            Input::Control => Table::Control,
            Input::Status => Table::Status,
            Input::Quarantine => Table::Quarantine,
        }
    }

    /// Whether all of its rows come from messages that stand in `silver/messages`.
    const fn of_messages(self) -> bool {
        !matches!(self, Input::Status | Input::Quarantine)
    }
}

/// What a rule reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Of the batch; never empty in a rule that is planned.
    pub inputs: BTreeSet<Input>,
    /// Of the lake.
    pub tables: BTreeSet<Table>,
    /// Whether it reads the last minutes from memory.
    pub live: bool,
}

impl Needs {
    /// Takes note of the tables that a statement names. What is none of ours shows when it is planned.
    pub fn of(references: &[TableReference], lake: &Tables) -> Needs {
        let mut needs = Needs::default();
        for reference in references {
            match (reference.schema().unwrap_or(SCHEMA), reference.table()) {
                (SCHEMA, name) => needs.inputs.extend(Input::ALL.into_iter().find(|i| i.name() == name)),
                ("live", _) => needs.live = true,
                (layer, name) => {
                    let named = |table: &Table| table.layer() == layer && table.name() == name;
                    needs.tables.extend(lake.all().find(named));
                }
            }
        }
        needs
    }

    /// All that there is: for looking at a statement that nobody knows yet.
    pub fn everything(lake: &Tables) -> Needs {
        Needs { inputs: Input::ALL.into(), tables: lake.all().collect(), live: true }
    }
}

/// Where the rows of a batch are.
pub enum Batch {
    /// Nowhere: for planning.
    Empty,
    /// In silver.
    Plan(Span),
    /// In memory.
    Rows(BTreeMap<Table, Vec<RecordBatch>>),
}

/// The rows of a plan in silver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    segments: Vec<String>,
    /// First and last `received_at`, in µs: of everything, and of what has a message name.
    hours: (i64, i64),
    named: (i64, i64),
    /// The time to give to what the batch causes: when the last of it came.
    pub at: Timestamp,
}

impl Span {
    /// Finds out when the messages of a plan came; `within` leaves out what came before or after (µs).
    ///
    /// # Errors
    /// When `silver/messages` cannot be read.
    pub async fn of(tables: &Tables, plan: &Plan, within: (i64, i64)) -> anyhow::Result<Span> {
        let hours = plan.segments.iter().filter_map(|path| SegmentName::parse(path));
        let hours: Vec<i64> = hours.map(|name| name.hour.as_micros()).collect();
        let (first, last) = (hours.iter().min(), hours.iter().max());
        let (first, last) = (first.copied().unwrap_or(0), last.copied().unwrap_or(0) + HOUR_MICROS - 1);
        let hours = (first.max(within.0), last.min(within.1));
        let messages = tables.snapshot(Table::Messages).await?;
        let context = tables.session_of(vec![(Table::Messages, messages)]).await?;
        // What has no name came from `sealed_at` on.
        let sql = format!(
            "select min(case when epoch = '' then sealed_at else received_at end), max(received_at) \
             from silver.messages where plan = {}",
            plan.n
        );
        let rows = context.sql(&sql).await?.collect().await.context("when the messages of a plan came")?;
        let at = |column: usize| {
            let column = cast(rows.first()?.column(column), &common::wire::instant()).ok()?;
            let column = column.as_primitive::<TimestampMicrosecondType>();
            (column.len() == 1 && column.is_valid(0)).then(|| column.value(0))
        };
        let named = match (at(0), at(1)) {
            (Some(from), Some(to)) => (from.max(hours.0), to.min(hours.1)),
            _ => hours,
        };
        let at = Timestamp::from_micros(named.1);
        Ok(Span { segments: plan.segments.clone(), hours, named, at })
    }

    fn predicate(&self, input: Input) -> Expr {
        let (from, to) = if input.of_messages() { self.named } else { self.hours };
        let instant = |micros| lit(ScalarValue::TimestampMicrosecond(Some(micros), Some("UTC".into())));
        let segments = self.segments.iter().map(|path| lit(path.as_str())).collect();
        ident("received_at")
            .between(instant(from), instant(to))
            .and(ident("segment").in_list(segments, false))
    }
}

/// A session with what a rule needs, and the batch. The lake's tables are as new as can be.
///
/// # Errors
/// When the lake cannot be read.
pub async fn session(
    tables: &Tables,
    needs: &Needs,
    batch: &Batch,
    live: &Live,
) -> anyhow::Result<SessionContext> {
    let of_batch = matches!(batch, Batch::Plan(_));
    let inputs = needs.inputs.iter().filter(|_| of_batch).map(|input| input.table());
    let wanted: BTreeSet<Table> = needs.tables.iter().copied().chain(inputs).collect();
    let mut snapshots = Vec::new();
    for table in wanted {
        snapshots.push((table, tables.snapshot(table).await?));
    }
    let context = tables.session_of(snapshots).await?;
    {
        let state = context.state_ref();
        let mut state = state.write();
        let options = state.config_mut().options_mut();
        options.catalog.default_schema = SCHEMA.to_owned();
        options.sql_parser.dialect = Dialect::PostgreSQL;
        options.sql_parser.map_string_types_to_utf8view = false;
        // Rules leave the processors to those who must keep up.
        options.execution.target_partitions = 1;
    }
    functions::register(&context);
    let catalog = context.catalog(CATALOG).context("the session's own catalog")?;
    for schema in [SCHEMA, "live"] {
        catalog.register_schema(schema, Arc::new(MemorySchemaProvider::new()))?;
    }
    if needs.live {
        for (name, table) in live::tables(live) {
            context.register_table(TableReference::partial("live", name), table)?;
        }
    }
    for input in &needs.inputs {
        let table = provider(&context, *input, batch).await?;
        context.register_table(TableReference::partial(SCHEMA, input.name()), table)?;
    }
    Ok(context)
}

async fn provider(
    context: &SessionContext,
    input: Input,
    batch: &Batch,
) -> anyhow::Result<Arc<dyn TableProvider>> {
    let schema = input.table().schema();
    Ok(match batch {
        Batch::Empty => Arc::new(EmptyTable::new(schema)),
        Batch::Plan(span) => {
            let silver = context.table(TableReference::partial("silver", input.table().name())).await?;
            let rows = silver.filter(span.predicate(input))?;
            Arc::new(ViewTable::new(rows.logical_plan().clone(), None))
        }
        Batch::Rows(rows) => {
            let rows = rows.get(&input.table()).into_iter().flatten();
            // Text may come as dictionaries.
            let plain = |batch: &RecordBatch| {
                let columns = schema.fields().iter().map(|field| {
                    let column = batch.column_by_name(field.name()).context("a column of silver")?;
                    Ok(cast(column, field.data_type())?)
                });
                let columns = columns.collect::<anyhow::Result<Vec<_>>>()?;
                anyhow::Ok(RecordBatch::try_new(Arc::clone(&schema), columns)?)
            };
            let rows = rows.map(plain).collect::<anyhow::Result<Vec<_>>>()?;
            Arc::new(MemTable::try_new(schema, vec![rows])?)
        }
    })
}
