//! `ops.delivery_ledger`: the ledger as a table that is computed when it is asked for.

use std::{fmt, sync::Arc, time::Duration};

use arrow::{
    array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray},
    datatypes::SchemaRef,
    error::ArrowError,
};
use async_trait::async_trait;
use common::time::{Clock, Timestamp};
use datafusion::{
    catalog::{Session, TableProvider},
    datasource::{MemTable, TableType},
    error::{DataFusionError, Result as QueryResult},
    logical_expr::Expr,
    physical_plan::ExecutionPlan,
};
use tokio::{sync::Mutex, time::Instant};

use super::{Audit, LedgerRow, audit};
use crate::{lake, tables::Tables};

/// Queries within this time see the same ledger.
const FRESH_FOR: Duration = Duration::from_secs(3);

/// The lines of an audit as the columns of `ops.delivery_ledger`.
///
/// # Errors
/// When the columns do not fit the schema, which a test rules out.
pub fn delivery_ledger(audit: &Audit) -> Result<RecordBatch, ArrowError> {
    let rows = &audit.lanes;
    let texts = |of: &dyn Fn(&LedgerRow) -> &str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(of)))
    };
    let ints = |of: &dyn Fn(&LedgerRow) -> i64| -> ArrayRef {
        Arc::new(Int64Array::from_iter_values(rows.iter().map(of)))
    };
    let times = |of: &dyn Fn(&LedgerRow) -> Option<Timestamp>| -> ArrayRef {
        let times = rows.iter().map(|r| of(r).map(Timestamp::as_micros));
        Arc::new(times.collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
    };
    let seqs = rows.iter().map(|r| (!r.missing_seqs.is_empty()).then_some(r.missing_seqs.as_str()));
    RecordBatch::try_new(
        lake::delivery_ledger_schema(),
        vec![
            texts(&|r| &r.site),
            texts(&|r| &r.gateway_id),
            texts(&|r| &r.epoch),
            texts(&|r| &r.lane),
            times(&|r| Some(r.hour)),
            ints(&|r| r.expected),
            ints(&|r| r.stored),
            ints(&|r| r.duplicates),
            ints(&|r| r.quarantined),
            ints(&|r| r.erased),
            ints(&|r| r.declared),
            ints(&|r| r.pending),
            ints(&|r| r.missing),
            ints(&|r| r.redelivered),
            Arc::new(seqs.collect::<StringArray>()),
            times(&|r| r.unknown_since),
        ],
    )
}

/// The table; an audit is made at most every three seconds.
pub struct LedgerTable {
    tables: Tables,
    clock: Arc<dyn Clock>,
    last: Mutex<Option<(Instant, Arc<Audit>)>>,
}

impl LedgerTable {
    /// Over these tables, whose newest snapshots are read when a query comes.
    pub fn new(tables: Tables, clock: Arc<dyn Clock>) -> Self {
        Self { tables, clock, last: Mutex::new(None) }
    }

    /// The audit, made now or a moment ago.
    ///
    /// # Errors
    /// When silver cannot be read.
    pub async fn audit(&self) -> anyhow::Result<Arc<Audit>> {
        // The lock is held while an audit is made, so that many readers make one.
        let mut last = self.last.lock().await;
        if let Some((at, known)) = &*last
            && at.elapsed() < FRESH_FOR
        {
            return Ok(Arc::clone(known));
        }
        let made = Arc::new(audit(&self.tables, self.clock.now()).await?);
        *last = Some((Instant::now(), Arc::clone(&made)));
        Ok(made)
    }
}

impl fmt::Debug for LedgerTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LedgerTable")
    }
}

#[async_trait]
impl TableProvider for LedgerTable {
    fn schema(&self) -> SchemaRef {
        lake::delivery_ledger_schema()
    }

    fn table_type(&self) -> TableType {
        TableType::View
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> QueryResult<Arc<dyn ExecutionPlan>> {
        let audit = self.audit().await.map_err(|e| DataFusionError::External(e.into()))?;
        let table = MemTable::try_new(self.schema(), vec![vec![delivery_ledger(&audit)?]])?;
        table.scan(state, projection, filters, limit).await
    }
}
