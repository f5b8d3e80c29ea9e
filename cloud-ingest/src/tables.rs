//! The Delta tables: rows and progress in one commit.
//!
//! A writer loads a snapshot, compares the `txn` it finds in it with the step it is about to take, computes
//! its rows from that snapshot, and commits *from* it. delta-rs refuses such a commit when another one with
//! the same app id came in between ([`TablesError::Conflict`]); it does **not** refuse one from a fresh
//! snapshot that already holds the step, so the comparison is the writer's own duty.
//!
//! * A commit is durable when it returns (see [`crate::store`]).
//! * Data files: see [`write`].
//! * A checkpoint is written every 100 commits, which is Delta's default.
//! * The cost of a commit grows with the number of active files, so whoever writes a table calls
//!   [`Tables::compact`] now and then; it changes no row (`dataChange=false`). Commits that remove files are
//!   fenced against each other (`rewrite.rs`).
//! * No commit looks for old log entries, which would list the whole log; [`Tables::tidy_log`] does.

mod columns;
mod rewrite;
mod runs;
mod splice;
mod write;

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context;
use arrow::array::RecordBatch;
use datafusion::{
    catalog::MemorySchemaProvider,
    common::TableReference as TableRef,
    datasource::empty::EmptyTable,
    execution::{
        disk_manager::{DiskManagerBuilder, DiskManagerMode},
        memory_pool::FairSpillPool,
        runtime_env::{RuntimeEnv, RuntimeEnvBuilder},
    },
    prelude::{SessionConfig, SessionContext},
};
use deltalake::{
    DeltaTable, DeltaTableError,
    delta_datafusion::{DeltaScanConfig, DeltaScanNext, DeltaSessionContext},
    kernel::{
        Action, StructType, Transaction,
        engine::arrow_conversion::TryIntoKernel,
        transaction::{CommitBuilder, CommitProperties, TableReference, TransactionError},
    },
    operations::create::CreateBuilder,
    protocol::{DeltaOperation, SaveMode},
};
use futures::{Stream, StreamExt};

pub(crate) use self::rewrite::{RETAIN, conform};
pub use self::{rewrite::TIERS, write::writer_properties};
use crate::{lake::Table, store::Store};

/// Bytes of footers of data files that sessions keep. Where each second brings a small file there were 16 MB of them after
/// eleven minutes, on their way to DataFusion's 50 MB; most such files are soon packed and never asked for again.
const FOOTERS: usize = 8 * 1024 * 1024;
/// Bytes at the end of a data file that mostly hold its footer, and where its pages are.
pub(crate) const TAIL: usize = 64 * 1024;
/// Rows that go into files together.
const FILE_ROWS: usize = 4_000_000;
/// Name of the catalog, which is the database of the PostgreSQL wire.
pub const CATALOG: &str = "tailrace";
/// A writer packs a partition in which a tier has more small files than this.
pub const SMALL_FILES: usize = 24;

/// Why a commit did not happen; grouped by what the caller does next.
#[derive(Debug, thiserror::Error)]
pub enum TablesError {
    /// Another writer committed first: load the newest snapshot and compare its progress again.
    #[error("another writer changed {table} first: {reason}")]
    Conflict {
        /// Path of the table.
        table: String,
        /// What delta-rs says.
        reason: String,
    },
    /// The store or the table failed: try again later, from the newest snapshot, since the commit may have
    /// landed all the same.
    #[error("writing {table}: {source}")]
    Failed {
        /// Path of the table.
        table: String,
        /// What failed.
        source: anyhow::Error,
    },
}

impl TablesError {
    fn of(table: Table, error: DeltaTableError) -> Self {
        let conflict = match &error {
            DeltaTableError::VersionAlreadyExists(_) | DeltaTableError::VersionMismatch(..) => true,
            DeltaTableError::Transaction { source } => {
                matches!(source, TransactionError::CommitConflict(_) | TransactionError::MaxCommitAttempts(_))
            }
            _ => false,
        };
        if conflict {
            TablesError::Conflict { table: table.path(), reason: error.to_string() }
        } else {
            TablesError::Failed { table: table.path(), source: error.into() }
        }
    }

    fn failed(table: Table, source: impl Into<anyhow::Error>) -> Self {
        TablesError::Failed { table: table.path(), source: source.into() }
    }
}

/// All tables of a lake. Clones share the cache of snapshots.
#[derive(Clone)]
pub struct Tables {
    store: Store,
    /// Those of the configured rules.
    of_rules: Arc<[Table]>,
    /// The newest snapshot seen of each table, from which newer ones are loaded incrementally.
    newest: Arc<Mutex<BTreeMap<Table, DeltaTable>>>,
    /// Knows the store for reading.
    runtime: Arc<RuntimeEnv>,
}

impl Tables {
    /// The tables of the lake in `store`; none of them needs to exist.
    ///
    /// # Errors
    /// When the store cannot be reached, or a log cannot be read.
    pub async fn open(store: &Store) -> anyhow::Result<Tables> {
        store.reach().await?;
        let tables = Tables {
            store: store.clone(),
            of_rules: Arc::default(),
            newest: Arc::default(),
            runtime: RuntimeEnvBuilder::new().with_metadata_cache_limit(FOOTERS).build_arc()?,
        };
        for table in Table::ALL {
            tables.snapshot(table).await?;
        }
        Ok(tables)
    }

    /// Makes the tables that do not exist yet, empty, so that every reader finds every table from the start.
    ///
    /// # Errors
    /// When the store cannot be written to.
    pub async fn create_missing(&self) -> anyhow::Result<()> {
        for table in Table::ALL {
            if self.snapshot(table).await?.is_none() {
                match self.create(table).await {
                    // Somebody else made it just now.
                    Ok(_) | Err(TablesError::Conflict { .. }) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        Ok(())
    }

    /// The same, and the tables of rules beside them.
    #[must_use]
    pub fn with_rules(mut self, of_rules: Vec<Table>) -> Tables {
        self.of_rules = of_rules.into();
        self
    }

    /// The same, for sessions that together hold at most `memory` bytes and spill nothing.
    ///
    /// # Errors
    /// Never, as long as there are no files to spill to.
    pub(crate) fn bounded(&self, memory: usize) -> anyhow::Result<Tables> {
        let runtime = RuntimeEnvBuilder::from_runtime_env(&self.runtime)
            .with_memory_pool(Arc::new(FairSpillPool::new(memory)))
            .with_disk_manager_builder(DiskManagerBuilder::default().with_mode(DiskManagerMode::Disabled))
            .build_arc()?;
        Ok(Tables { runtime, ..self.clone() })
    }

    /// Every table that there may be.
    pub(crate) fn all(&self) -> impl Iterator<Item = Table> + use<> {
        let of_rules = Arc::clone(&self.of_rules);
        let of_rules = (0..of_rules.len()).map(move |at| of_rules[at]);
        Table::ALL.into_iter().chain(of_rules)
    }

    /// The store that holds the tables.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The newest snapshot of a table; `None` while it does not exist.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub async fn snapshot(&self, table: Table) -> anyhow::Result<Option<DeltaTable>> {
        let known = self.lock().get(&table).cloned();
        let snapshot = match known {
            Some(mut known) => {
                known.update_state().await.with_context(|| format!("reading the log of {}", table.path()))?;
                known
            }
            None => {
                let mut found = self.store.delta(&table.path())?;
                let exists = found.verify_deltatable_existence().await;
                if !exists.with_context(|| format!("looking for {}", table.path()))? {
                    return Ok(None);
                }
                found.load().await.with_context(|| format!("reading the log of {}", table.path()))?;
                found
            }
        };
        self.remember(table, &snapshot);
        Ok(Some(snapshot))
    }

    /// The last version of `app` that was committed to the table at this snapshot; `None` also when it was taken back
    /// ([`Self::settle_columns`]). Reads the log since the last checkpoint.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub async fn progress(snapshot: &DeltaTable, app: &str) -> anyhow::Result<Option<i64>> {
        let log = snapshot.log_store();
        let version = snapshot.snapshot()?.transaction_version(log.as_ref(), app).await?;
        Ok(version.filter(|version| *version >= 0))
    }

    /// Appends rows and sets `txn` (app id and version) in one commit from `base`, which is the snapshot in
    /// which the caller found that the step is not there yet; with `None` the table is created. Without rows,
    /// only the progress is committed. Returns the table's new version.
    ///
    /// # Errors
    /// See [`TablesError`].
    pub async fn append(
        &self,
        table: Table,
        base: Option<DeltaTable>,
        rows: Vec<RecordBatch>,
        txn: (&str, i64),
    ) -> Result<i64, TablesError> {
        self.append_stream(table, base, futures::stream::iter(rows.into_iter().map(Ok)), txn).await
    }

    /// [`Self::append`] of more rows than memory may hold.
    ///
    /// # Errors
    /// See [`TablesError`]; what `rows` says when it fails.
    pub async fn append_stream(
        &self,
        table: Table,
        base: Option<DeltaTable>,
        rows: impl Stream<Item = anyhow::Result<RecordBatch>>,
        txn: (&str, i64),
    ) -> Result<i64, TablesError> {
        let base = self.base(table, base).await?;
        let (mut rows, mut files) = (pin!(rows), Vec::new());
        let (mut held, mut count) = (Vec::new(), 0);
        loop {
            let next = rows.next().await.transpose().map_err(|e| TablesError::failed(table, e))?;
            let ended = next.is_none();
            count += next.as_ref().map_or(0, RecordBatch::num_rows);
            held.extend(next);
            if ended || count >= FILE_ROWS {
                count = 0;
                let written = write::files(&self.store, table, std::mem::take(&mut held)).await;
                files.extend(written.map_err(|e| TablesError::failed(table, e))?);
            }
            if ended {
                break;
            }
        }
        let actions = files.into_iter().map(Action::Add).collect();
        let partitions = table.partitions().iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let operation = DeltaOperation::Write {
            mode: SaveMode::Append,
            partition_by: (!partitions.is_empty()).then_some(partitions),
            predicate: None,
        };
        self.commit(table, base, actions, operation, properties(txn)).await
    }

    /// Commits what was done to files, on top of `base`. Returns the table's new version.
    async fn commit(
        &self,
        table: Table,
        mut base: DeltaTable,
        actions: Vec<Action>,
        operation: DeltaOperation,
        properties: CommitProperties,
    ) -> Result<i64, TablesError> {
        let failed = |e| TablesError::of(table, e);
        let reference = base.snapshot().map_err(failed)?.snapshot();
        let committed = CommitBuilder::from(properties)
            .with_actions(actions)
            .build(Some(reference as &dyn TableReference), base.log_store(), operation)
            .await
            .map_err(failed)?;
        base.state = Some(committed.snapshot());
        self.remember(table, &base);
        Ok(version(&base))
    }

    /// Replaces the rows that match `predicate` (SQL over the table's columns; all rows with `None`) by
    /// `rows`, which must match it too, and sets `txn`, in one commit from `base`. Returns the table as it is with
    /// this commit.
    ///
    /// # Errors
    /// See [`TablesError`].
    pub async fn replace(
        &self,
        table: Table,
        base: Option<DeltaTable>,
        predicate: Option<&str>,
        rows: Vec<RecordBatch>,
        txn: (&str, i64),
    ) -> Result<DeltaTable, TablesError> {
        let failed = |e| TablesError::of(table, e);
        let base = self.base(table, base).await?;
        let rows = if rows.is_empty() { vec![RecordBatch::new_empty(table.schema())] } else { rows };
        // One partition, so that a small replacement is one small file.
        let one = [("datafusion.execution.target_partitions".to_owned(), "1".to_owned())].into();
        let session = DeltaSessionContext::new_with_session_overrides(&one).map_err(failed)?;
        base.update_datafusion_session(&session.state()).map_err(failed)?;
        let commit = rewrite::fenced(properties(txn), &base);
        let layout = write::properties_of(table, &table.schema(), &rows);
        let mut write = base
            .write(rows)
            .with_session_state(Arc::new(session.state()))
            .with_save_mode(SaveMode::Overwrite)
            .with_writer_properties(layout)
            .with_commit_properties(commit);
        if let Some(predicate) = predicate {
            write = write.with_replace_where(predicate);
        }
        let written = write.await.map_err(failed)?;
        self.remember(table, &written);
        Ok(written)
    }

    /// A session with every table at its newest snapshot as `silver.x`, `gold.x`, `ops.x`, `rules.x`; one that does not
    /// exist yet is there, empty.
    ///
    /// # Errors
    /// When a log cannot be read.
    pub async fn session(&self) -> anyhow::Result<SessionContext> {
        let mut snapshots = Vec::with_capacity(Table::ALL.len());
        for table in self.all() {
            snapshots.push((table, self.snapshot(table).await?));
        }
        self.session_of(snapshots).await
    }

    /// A session with these tables at these snapshots.
    ///
    /// # Errors
    /// When a snapshot cannot be read.
    pub async fn session_of(
        &self,
        snapshots: Vec<(Table, Option<DeltaTable>)>,
    ) -> anyhow::Result<SessionContext> {
        let mut config = SessionConfig::new()
            .with_default_catalog_and_schema(CATALOG, "public")
            .with_information_schema(true)
            .set_bool("datafusion.execution.parquet.schema_force_view_types", false)
            .set_bool("datafusion.execution.parquet.pushdown_filters", true);
        config.options_mut().execution.time_zone = Some("+00:00".into());
        let context = SessionContext::new_with_config_rt(config, Arc::clone(&self.runtime));
        let state = Arc::new(context.state());
        let catalog = context.catalog(CATALOG).context("the session's own catalog")?;
        for layer in ["silver", "gold", "ops", "rules"] {
            catalog.register_schema(layer, Arc::new(MemorySchemaProvider::new()))?;
        }
        for (table, snapshot) in snapshots {
            let name = TableRef::partial(table.layer(), table.name());
            match snapshot {
                Some(snapshot) => {
                    snapshot.update_datafusion_session(state.as_ref())?;
                    // Partition values as plain text, like every other column.
                    let scan =
                        DeltaScanConfig::new_from_session(state.as_ref()).with_wrap_partition_values(false);
                    let files = snapshot.snapshot()?.snapshot().clone();
                    let provider = DeltaScanNext::new(files, scan)?;
                    context.register_table(name, Arc::new(provider))?;
                }
                None => {
                    context.register_table(name, Arc::new(EmptyTable::new(table.schema())))?;
                }
            }
        }
        Ok(context)
    }

    async fn base(&self, table: Table, base: Option<DeltaTable>) -> Result<DeltaTable, TablesError> {
        match base {
            Some(base) => Ok(base),
            None => self.create(table).await,
        }
    }

    async fn create(&self, table: Table) -> Result<DeltaTable, TablesError> {
        let location = self.store.delta(&table.path()).map_err(|e| TablesError::failed(table, e))?;
        let schema: StructType =
            table.schema().as_ref().try_into_kernel().map_err(|e| TablesError::failed(table, e))?;
        let created = CreateBuilder::new()
            .with_log_store(location.log_store())
            .with_table_name(table.name())
            .with_columns(schema.fields().cloned())
            .with_partition_columns(table.partitions().iter().copied())
            // Otherwise delta-rs, whose version 0 stands there already (another writer's, or its own when the
            // answer was lost), sets the schema once more and returns a snapshot that nobody has compared.
            .with_commit_properties(CommitProperties::default().with_max_retries(0))
            .await;
        let created = match created {
            Ok(created) => created,
            Err(e) if location.verify_deltatable_existence().await.unwrap_or(false) => {
                return Err(TablesError::Conflict { table: table.path(), reason: e.to_string() });
            }
            Err(e) => return Err(TablesError::of(table, e)),
        };
        self.remember(table, &created);
        Ok(created)
    }

    /// Keeps a snapshot unless a newer one is there.
    fn remember(&self, table: Table, snapshot: &DeltaTable) {
        let mut newest = self.lock();
        if newest.get(&table).is_none_or(|known| known.version() < snapshot.version()) {
            newest.insert(table, snapshot.clone());
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Table, DeltaTable>> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn version(table: &DeltaTable) -> i64 {
    table.version().and_then(|v| i64::try_from(v).ok()).unwrap_or(0)
}

fn properties((app, version): (&str, i64)) -> CommitProperties {
    CommitProperties::default()
        .with_application_transaction(Transaction::new(app, version))
        .with_cleanup_expired_logs(Some(false))
}

#[cfg(test)]
mod tests {
    use arrow::{
        array::{AsArray, Int64Array, StringArray, TimestampMicrosecondArray},
        datatypes::Int64Type,
    };

    use super::*;

    const TABLE: Table = Table::QualityResults;

    fn rows(plan: i64, rules: &[&str]) -> Vec<RecordBatch> {
        let n = rules.len();
        let columns: Vec<arrow::array::ArrayRef> = vec![
            Arc::new(Int64Array::from(vec![plan; n])),
            Arc::new(StringArray::from(rules.to_vec())),
            Arc::new(Int64Array::from(vec![1; n])),
            Arc::new(Int64Array::from(vec![2; n])),
            Arc::new(StringArray::from(vec![None::<&str>; n])),
            Arc::new(TimestampMicrosecondArray::from(vec![7; n]).with_timezone("UTC")),
        ];
        vec![RecordBatch::try_new(TABLE.schema(), columns).unwrap()]
    }

    async fn count(tables: &Tables, sql: &str) -> i64 {
        let batches = tables.session().await.unwrap().sql(sql).await.unwrap().collect().await.unwrap();
        batches[0].column(0).as_primitive::<Int64Type>().value(0)
    }

    async fn check(store: &Store) {
        let tables = Tables::open(store).await.unwrap();
        assert!(tables.snapshot(TABLE).await.unwrap().is_none());
        let all = "select count(*) from ops.quality_results";
        assert_eq!(count(&tables, all).await, 0);

        tables.append(TABLE, None, rows(1, &["a", "b"]), ("refine", 1)).await.unwrap();
        let first = tables.snapshot(TABLE).await.unwrap().unwrap();
        assert_eq!(Tables::progress(&first, "refine").await.unwrap(), Some(1));
        assert_eq!(Tables::progress(&first, "other").await.unwrap(), None);

        // Progress without rows, and a writer that does not know of it.
        tables.append(TABLE, Some(first.clone()), vec![], ("refine", 2)).await.unwrap();
        let stale = tables.append(TABLE, Some(first.clone()), rows(2, &["c"]), ("refine", 2)).await;
        assert!(matches!(stale, Err(TablesError::Conflict { .. })), "{stale:?}");
        let created = tables.append(TABLE, None, rows(2, &["c"]), ("refine", 2)).await;
        assert!(matches!(created, Err(TablesError::Conflict { .. })), "{created:?}");
        assert_eq!(count(&tables, all).await, 2);

        // Replace what matches, in one commit with the progress.
        let base = tables.snapshot(TABLE).await.unwrap();
        tables.replace(TABLE, base, Some("rule = 'b'"), rows(9, &["b"]), ("refine", 3)).await.unwrap();
        assert_eq!(count(&tables, &format!("{all} where rule = 'b' and plan = 9")).await, 1);
        assert_eq!(count(&tables, all).await, 2);
        let base = tables.snapshot(TABLE).await.unwrap();
        tables.replace(TABLE, base, Some("rule = 'b'"), vec![], ("refine", 4)).await.unwrap();
        assert_eq!(count(&tables, all).await, 1);

        // Many small files become few, and nothing else changes.
        for n in 5..40 {
            let base = tables.snapshot(TABLE).await.unwrap();
            tables.append(TABLE, base, rows(n, &["x"]), ("refine", n)).await.unwrap();
        }
        assert!(tables.compact(TABLE, &TIERS, SMALL_FILES).await.unwrap());
        assert!(!tables.compact(TABLE, &TIERS, SMALL_FILES).await.unwrap());
        let compacted = tables.snapshot(TABLE).await.unwrap().unwrap();
        assert_eq!(compacted.snapshot().unwrap().log_data().num_files(), 1);
        assert_eq!(Tables::progress(&compacted, "refine").await.unwrap(), Some(39));
        assert_eq!(count(&tables, all).await, 36);
        if store.url().scheme() == "file" {
            let reopened = Tables::open(&Store::open(store.url().as_str()).unwrap()).await.unwrap();
            assert_eq!(count(&reopened, all).await, 36);
        }
    }

    #[tokio::test]
    async fn memory() {
        check(&Store::open("memory:///").unwrap()).await;
    }

    #[tokio::test]
    async fn local_files() {
        let folder = tempfile::tempdir().unwrap();
        check(&Store::open(folder.path().to_str().unwrap()).unwrap()).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    #[ignore = "needs a server that speaks S3: deploy/test.sh s3"]
    async fn tables_on_s3() {
        let settings = crate::settings::Settings::load(None).unwrap().store;
        check(&Store::configured(&settings).unwrap()).await;
    }
}
