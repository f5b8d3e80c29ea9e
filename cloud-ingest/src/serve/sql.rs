//! The one guarded path that every query takes: PostgreSQL wire, HTTP and `cloud-ingest query`.
//!
//! ```text
//! text ─ parse (PostgreSQL's dialect, catalogue rewrites) ─ allow-list ─ newest snapshots ─ plan
//!      ─ verify (no DDL, DML, COPY in the plan) ─ wire types ─ execute with deadline, row cap, memory limit
//! ```
//!
//! What may run: queries (`SELECT`, `WITH`, `VALUES`, `TABLE`), `EXPLAIN`, `DESCRIBE`, `SHOW`; on the PostgreSQL
//! wire also `SET` of the client's own variables and transaction statements, which do nothing. Everything else is
//! refused by name with SQLSTATE 25006, so a statement that a newer parser learns is refused until it is listed
//! here. The session knows no function and no URL table that reads the server's files.
//!
//! Snapshots are refreshed before each query, and all scans of one query are planned from the same ones.

use std::{sync::Arc, time::Duration};

use arrow::{
    array::RecordBatch,
    datatypes::{DataType, SchemaRef},
};
use datafusion::{
    common::ParamValues,
    error::DataFusionError,
    execution::{SendableRecordBatchStream, context::SQLOptions, session_state::SessionState},
    logical_expr::{Expr, LogicalPlan, LogicalPlanBuilder, cast, ident},
    prelude::DataFrame,
    sql::{
        parser::Statement as PlannedStatement,
        sqlparser::ast::{Set, Statement, visit_statements},
    },
};
use datafusion_postgres::datafusion_pg_catalog::sql::PostgresCompatibilityParser;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use tokio::time::Instant;

use super::catalog::Catalog;

/// Why a query has no answer; grouped by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum SqlError {
    /// It would write. SQLSTATE 25006.
    #[error("cannot execute {0}: this server is read-only")]
    ReadOnly(String),
    /// It is nothing that this server does, or not over this protocol. SQLSTATE 0A000.
    #[error("{0}")]
    Unsupported(String),
    /// The text is wrong: syntax, names or types, by SQLSTATE.
    #[error("{message}")]
    Invalid {
        /// SQLSTATE of class 22 or 42.
        sqlstate: &'static str,
        /// What is wrong.
        message: String,
    },
    /// It ran longer than allowed. SQLSTATE 57014.
    #[error(
        "canceling statement due to statement timeout after {0:?}; narrow the time range, or raise serve.statement_timeout"
    )]
    Timeout(Duration),
    /// Its answer is larger than allowed. SQLSTATE 54000.
    #[error(
        "the answer has more than {0} rows; aggregate, narrow the time range, add LIMIT, or raise serve.row_cap"
    )]
    TooManyRows(u64),
    /// It needs more memory than there is for all queries. SQLSTATE 53200.
    #[error("out of memory for queries: {0}; narrow the query, or raise serve.memory_limit")]
    OutOfMemory(String),
    /// The server failed. SQLSTATE XX000.
    #[error("{0}")]
    Failed(String),
}

impl SqlError {
    /// The five characters that PostgreSQL's clients branch on.
    pub fn sqlstate(&self) -> &'static str {
        match self {
            Self::ReadOnly(_) => "25006",
            Self::Unsupported(_) => "0A000",
            Self::Invalid { sqlstate, .. } => sqlstate,
            Self::Timeout(_) => "57014",
            Self::TooManyRows(_) => "54000",
            Self::OutOfMemory(_) => "53200",
            Self::Failed(_) => "XX000",
        }
    }

    fn syntax(message: impl ToString) -> Self {
        Self::Invalid { sqlstate: "42601", message: message.to_string() }
    }
}

impl From<DataFusionError> for SqlError {
    fn from(error: DataFusionError) -> Self {
        use datafusion::common::SchemaError;
        let message = error.strip_backtrace();
        let invalid = |sqlstate| Self::Invalid { sqlstate, message: message.clone() };
        match error.find_root() {
            DataFusionError::ResourcesExhausted(why) => {
                Self::OutOfMemory(why.lines().next().unwrap_or_default().to_owned())
            }
            DataFusionError::SQL(..) => invalid("42601"),
            DataFusionError::SchemaError(error, _) => match error.as_ref() {
                SchemaError::FieldNotFound { .. } => invalid("42703"),
                _ => invalid("42702"),
            },
            DataFusionError::Plan(why) if why.contains("table '") && why.contains("not found") => {
                invalid("42P01")
            }
            DataFusionError::Plan(why) if why.contains("Invalid function") => invalid("42883"),
            DataFusionError::Plan(_) => invalid("42804"),
            DataFusionError::NotImplemented(_) => Self::Unsupported(message),
            DataFusionError::ArrowError(error, _) => match error.as_ref() {
                arrow::error::ArrowError::DivideByZero => invalid("22012"),
                arrow::error::ArrowError::CastError(_) | arrow::error::ArrowError::ParseError(_) => {
                    invalid("22P02")
                }
                _ => Self::Failed(message),
            },
            _ => Self::Failed(message),
        }
    }
}

/// Bounds of one query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From the beginning of planning to the last row.
    pub timeout: Duration,
    /// Rows in an answer.
    pub rows: u64,
}

/// What a statement that may run is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Has a plan and an answer.
    Query,
    /// Sets or shows something of the client's own session.
    Session,
    /// Begins or ends a transaction.
    Transaction,
}

/// Whether `statement` is on the allow-list, and as what.
///
/// # Errors
/// [`SqlError::ReadOnly`] for whatever could write, [`SqlError::Unsupported`] for the rest.
pub fn allow(statement: &Statement) -> Result<Purpose, SqlError> {
    match statement {
        Statement::Query(_)
        | Statement::ExplainTable { .. }
        | Statement::ShowTables { .. }
        | Statement::ShowColumns { .. } => read_only_throughout(statement).map(|()| Purpose::Query),
        Statement::Explain { statement: inner, .. } => match inner.as_ref() {
            Statement::Query(_) => read_only_throughout(inner).map(|()| Purpose::Query),
            other => Err(SqlError::ReadOnly(format!("EXPLAIN of {}", verb(other)))),
        },
        Statement::ShowVariable { .. } | Statement::ShowCatalogs { .. } => Ok(Purpose::Session),
        // What connection pools say when they hand a connection on.
        Statement::Discard { .. } | Statement::Deallocate { .. } | Statement::Reset(_) => {
            Ok(Purpose::Session)
        }
        Statement::Set(set) => allow_set(set),
        Statement::StartTransaction { .. }
        | Statement::Commit { .. }
        | Statement::Rollback { .. }
        | Statement::Savepoint { .. }
        | Statement::ReleaseSavepoint { .. } => Ok(Purpose::Transaction),
        Statement::Declare { .. } | Statement::Fetch { .. } | Statement::Close { .. } => {
            Err(SqlError::Unsupported("cursors are not supported; rows are streamed without them".into()))
        }
        other => Err(SqlError::ReadOnly(verb(other))),
    }
}

/// PostgreSQL allows `WITH x AS (INSERT …) SELECT …`: every statement within must be a query, too.
fn read_only_throughout(statement: &Statement) -> Result<(), SqlError> {
    let found = visit_statements(statement, |inner| match inner {
        Statement::Query(_)
        | Statement::ExplainTable { .. }
        | Statement::ShowTables { .. }
        | Statement::ShowColumns { .. } => std::ops::ControlFlow::Continue(()),
        other => std::ops::ControlFlow::Break(verb(other)),
    });
    match found {
        std::ops::ControlFlow::Continue(()) => Ok(()),
        std::ops::ControlFlow::Break(verb) => Err(SqlError::ReadOnly(verb)),
    }
}

/// A client may set variables of PostgreSQL; the engine's own are the server's.
fn allow_set(set: &Set) -> Result<Purpose, SqlError> {
    let allowed = match set {
        Set::SingleAssignment { variable, .. } => {
            let name = variable.to_string().to_ascii_lowercase();
            if name.contains('.') {
                return Err(SqlError::Invalid {
                    sqlstate: "42501",
                    message: format!("permission denied to set parameter {name:?}"),
                });
            }
            true
        }
        Set::SetTimeZone { .. }
        | Set::SetNames { .. }
        | Set::SetNamesDefault { .. }
        | Set::SetTransaction { .. } => true,
        _ => false,
    };
    if allowed { Ok(Purpose::Session) } else { Err(SqlError::Unsupported(format!("{set} is not supported"))) }
}

/// The statement's leading word or words, for an error that names it: `INSERT`, `CREATE TABLE`.
fn verb(statement: &Statement) -> String {
    let text = statement.to_string();
    let words = if text.starts_with("CREATE") || text.starts_with("DROP") || text.starts_with("ALTER") {
        2
    } else {
        1
    };
    text.split_whitespace().take(words).collect::<Vec<_>>().join(" ").to_ascii_uppercase()
}

/// An answer held in memory.
#[derive(Debug)]
pub struct Answer {
    /// Its columns.
    pub schema: SchemaRef,
    /// Its rows.
    pub batches: Vec<RecordBatch>,
}

/// Runs guarded queries over the catalogue.
#[derive(Debug)]
pub struct Queries {
    catalog: Arc<Catalog>,
    limits: Limits,
    parser: PostgresCompatibilityParser,
}

impl Queries {
    /// Queries over `catalog` within `limits`.
    pub fn new(catalog: Arc<Catalog>, limits: Limits) -> Self {
        Self { catalog, limits, parser: PostgresCompatibilityParser::new() }
    }

    /// The bounds of every query.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// What is queried.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Runs one statement that has an answer, and holds the answer in memory; `rows` lowers the cap.
    ///
    /// # Errors
    /// See [`SqlError`].
    pub async fn run(&self, text: &str, rows: u64) -> Result<Answer, SqlError> {
        let statement = parse_one(&self.parser, text)?;
        if allow(&statement)? != Purpose::Query && !matches!(statement, Statement::ShowVariable { .. }) {
            return Err(SqlError::Unsupported(format!("{} needs a session; use psql", verb(&statement))));
        }
        let limits = Limits { rows: rows.min(self.limits.rows), ..self.limits };
        let deadline = Instant::now() + limits.timeout;
        let plan = self.within(limits, deadline, self.plan(statement)).await?;
        let (schema, rows) = self.execute(plan, limits, deadline).await?;
        Ok(Answer { schema, batches: rows.try_collect().await? })
    }

    /// Plans an allowed statement: verified to be read-only, with columns of types that every client reads.
    ///
    /// # Errors
    /// When names or types are wrong, or the plan would write.
    pub async fn plan(&self, statement: Statement) -> Result<LogicalPlan, SqlError> {
        plan_in(&self.catalog.context().state(), statement).await
    }

    /// Plans the scans from the newest snapshots and starts; the rows end with an error when a limit is
    /// reached.
    ///
    /// # Errors
    /// When planning fails or takes too long.
    pub async fn execute(
        &self,
        plan: LogicalPlan,
        limits: Limits,
        deadline: Instant,
    ) -> Result<(SchemaRef, impl Stream<Item = Result<RecordBatch, SqlError>> + Send + use<>), SqlError> {
        let start = async {
            self.catalog.refresh().await.map_err(|e| SqlError::Failed(format!("{e:#}")))?;
            let _one_snapshot = self.catalog.hold().await;
            let frame = DataFrame::new(self.catalog.context().state(), plan);
            Ok(frame.execute_stream().await?)
        };
        let rows = self.within(limits, deadline, start).await?;
        let schema = rows.schema();
        Ok((schema, bounded(rows, limits, deadline)))
    }

    /// Binds the parameters of a prepared statement.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn bind(plan: &LogicalPlan, params: &ParamValues) -> Result<LogicalPlan, SqlError> {
        Ok(plan.clone().replace_params_with_values(params)?)
    }

    async fn within<T>(
        &self,
        limits: Limits,
        deadline: Instant,
        work: impl Future<Output = Result<T, SqlError>>,
    ) -> Result<T, SqlError> {
        tokio::time::timeout_at(deadline, work).await.map_err(|_| SqlError::Timeout(limits.timeout))?
    }
}

/// The one statement that `text` holds.
///
/// # Errors
/// When it holds none, several, or no SQL.
pub(crate) fn parse_one(parser: &PostgresCompatibilityParser, text: &str) -> Result<Statement, SqlError> {
    let mut statements = parser.parse(text).map_err(SqlError::syntax)?;
    match (statements.pop(), statements.len()) {
        (Some(statement), 0) => Ok(statement),
        (None, _) => Err(SqlError::syntax("there is no statement")),
        (_, more) => Err(SqlError::syntax(format!("{} statements; send one at a time", more + 1))),
    }
}

/// [`Queries::plan`] in a session of one's own.
///
/// # Errors
/// When names or types are wrong, or the plan would write.
pub(crate) async fn plan_in(state: &SessionState, statement: Statement) -> Result<LogicalPlan, SqlError> {
    let plan = state.statement_to_plan(PlannedStatement::Statement(Box::new(statement))).await?;
    let read_only =
        SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
    // Only `INTO` gets as far as this.
    read_only.verify_plan(&plan).map_err(|_| SqlError::ReadOnly("SELECT INTO".into()))?;
    with_wire_types(plan)
}

/// The rows, until a limit is reached: then an error is the last of them.
pub(crate) fn bounded(
    rows: SendableRecordBatchStream,
    limits: Limits,
    deadline: Instant,
) -> impl Stream<Item = Result<RecordBatch, SqlError>> + Send + use<> {
    stream::unfold(Some((rows, 0u64)), move |state| async move {
        let (mut rows, so_far) = state?;
        match tokio::time::timeout_at(deadline, rows.next()).await {
            Err(_) => Some((Err(SqlError::Timeout(limits.timeout)), None)),
            Ok(None) => None,
            Ok(Some(Err(e))) => Some((Err(e.into()), None)),
            Ok(Some(Ok(batch))) => {
                let so_far = so_far + batch.num_rows() as u64;
                if so_far > limits.rows {
                    return Some((Err(SqlError::TooManyRows(limits.rows)), None));
                }
                Some((Ok(batch), Some((rows, so_far))))
            }
        }
    })
}

/// PostgreSQL has neither unsigned integers nor dictionaries, and drivers read the types that they stand
/// for as text: cast them away at the top of the plan.
fn with_wire_types(plan: LogicalPlan) -> Result<LogicalPlan, SqlError> {
    if matches!(plan, LogicalPlan::Explain(_) | LogicalPlan::Analyze(_) | LogicalPlan::DescribeTable(_)) {
        return Ok(plan);
    }
    let schema = Arc::clone(plan.schema());
    if schema.fields().iter().all(|f| wire_type(f.data_type()).is_none()) {
        return Ok(plan);
    }
    let columns = schema.iter().map(|(qualifier, field)| -> Expr {
        let column = match qualifier {
            Some(_) => Expr::Column((qualifier, field).into()),
            None => ident(field.name()),
        };
        match wire_type(field.data_type()) {
            Some(data_type) => cast(column, data_type).alias_qualified(qualifier.cloned(), field.name()),
            None => column,
        }
    });
    Ok(LogicalPlanBuilder::from(plan.clone()).project(columns.collect::<Vec<_>>())?.build()?)
}

fn wire_type(data_type: &DataType) -> Option<DataType> {
    match data_type {
        DataType::UInt8 | DataType::UInt16 | DataType::UInt32 | DataType::UInt64 => Some(DataType::Int64),
        DataType::Float16 => Some(DataType::Float64),
        DataType::Dictionary(_, value) => Some(wire_type(value).unwrap_or_else(|| value.as_ref().clone())),
        _ => None,
    }
}
