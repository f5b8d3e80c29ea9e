//! What SQL sees: database `tailrace` with schemas `silver`, `gold`, `ops` (Delta tables, newest snapshot),
//! `live` (the last minutes from memory), and PostgreSQL's own catalogues.
//!
//! One long-lived session serves every query. The tables in it are [`Current`]: names that stay, and stand for
//! the newest snapshot at the time a query is planned. So a prepared statement sees new data as well, and
//! refreshing costs no more than asking the tables for their versions, at most once in [`FRESH_FOR`].

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use anyhow::{Context, anyhow};
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::{
    catalog::{
        CatalogProvider, MemoryCatalogProvider, MemorySchemaProvider, ScanArgs, ScanResult, SchemaProvider,
        Session, TableProvider,
    },
    common::Statistics,
    datasource::{TableType, ViewTable},
    error::Result as PlanResult,
    execution::{
        disk_manager::{DiskManagerBuilder, DiskManagerMode},
        memory_pool::FairSpillPool,
        runtime_env::RuntimeEnvBuilder,
    },
    logical_expr::{Expr, LogicalPlan, TableProviderFilterPushDown},
    physical_plan::ExecutionPlan,
    prelude::{SessionConfig, SessionContext},
};
use datafusion_postgres::datafusion_pg_catalog::pg_catalog::{
    context::EmptyContextProvider, setup_pg_catalog,
};
use futures::future::BoxFuture;
use tokio::{
    sync::{Mutex as AsyncMutex, RwLock as AsyncRwLock, RwLockReadGuard},
    time::{Instant, timeout},
};

use super::{
    functions,
    live::{self, Live},
};

/// The database that clients connect to.
pub const DATABASE: &str = "tailrace";
/// The schema that names without one are looked up in.
pub const DEFAULT_SCHEMA: &str = "gold";
/// A snapshot is asked for again when it is older.
pub const FRESH_FOR: Duration = Duration::from_millis(300);

/// Opens a session with the newest snapshots of silver, gold and ops.
pub type SessionSource = Arc<dyn Fn() -> BoxFuture<'static, anyhow::Result<SessionContext>> + Send + Sync>;

/// Rows of silver that are not in it yet come from memory; a row that is in both is silver's.
const READINGS_NOW: &str = "\
SELECT ts, site, device_id, device_type, asset_id, value, unit, quality, received_at FROM silver.sensor_readings \
UNION ALL \
SELECT l.ts, l.site, l.device_id, l.device_type, l.asset_id, l.value, l.unit, l.quality, l.received_at \
FROM live.readings l LEFT ANTI JOIN silver.sensor_readings s \
ON s.site = l.site AND s.device_id = l.device_id AND s.ts = l.ts";

/// The session of every query, and what keeps its tables new.
pub struct Catalog {
    context: SessionContext,
    catalog: Arc<MemoryCatalogProvider>,
    source: SessionSource,
    tables: Mutex<BTreeMap<(String, String), Arc<Current>>>,
    /// When the tables were last asked for their snapshots; whoever holds it is asking.
    refreshed: AsyncMutex<Instant>,
    /// Held for reading while a query plans its scans, for writing while snapshots are exchanged.
    snapshot: AsyncRwLock<()>,
}

impl std::fmt::Debug for Catalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Catalog").finish_non_exhaustive()
    }
}

impl Catalog {
    /// Builds the session. `memory_limit` in bytes bounds all queries together.
    ///
    /// # Errors
    /// When the tables cannot be opened.
    pub async fn open(source: SessionSource, live: &Live, memory_limit: usize) -> anyhow::Result<Catalog> {
        let lake = source().await.context("opening the lake's tables")?;
        let config = SessionConfig::new()
            .with_default_catalog_and_schema(DATABASE, DEFAULT_SCHEMA)
            .with_create_default_catalog_and_schema(false)
            .with_information_schema(true)
            .set_str("datafusion.sql_parser.dialect", "PostgreSQL")
            .set_bool("datafusion.sql_parser.map_string_types_to_utf8view", false);
        // The lake's stores and caches, but a memory limit of our own, and nothing spilled to this disk.
        let runtime = RuntimeEnvBuilder::from_runtime_env(&lake.runtime_env())
            .with_memory_pool(Arc::new(FairSpillPool::new(memory_limit)))
            .with_disk_manager_builder(DiskManagerBuilder::default().with_mode(DiskManagerMode::Disabled))
            .build_arc()?;
        let context = SessionContext::new_with_config_rt(config, runtime);
        let catalog = Arc::new(MemoryCatalogProvider::new());
        context.register_catalog(DATABASE, Arc::clone(&catalog) as Arc<dyn CatalogProvider>);
        for schema in ["silver", "gold", "ops", "live"] {
            catalog.register_schema(schema, Arc::new(MemorySchemaProvider::new()))?;
        }
        setup_pg_catalog(&context, DATABASE, EmptyContextProvider).map_err(|e| *e)?;
        functions::register(&context);
        // What makes much of little, in one call that neither the memory limit nor the statement's time sees.
        for name in [
            "repeat",
            "lpad",
            "rpad",
            "levenshtein",
            "range",
            "generate_series",
            "array_repeat",
            "list_repeat",
            "array_resize",
            "list_resize",
        ] {
            context.deregister_udf(name);
        }
        let this = Catalog {
            context,
            catalog,
            source,
            tables: Mutex::default(),
            refreshed: AsyncMutex::new(Instant::now()),
            snapshot: AsyncRwLock::default(),
        };
        this.adopt(&lake).await?;
        for (name, table) in live::tables(live) {
            this.schema("live")?.register_table(name.into(), table)?;
        }
        if this.schema("silver")?.table_exist("sensor_readings") {
            let plan = this.context.state().create_logical_plan(READINGS_NOW).await?;
            let view = ViewTable::new(plan, Some(READINGS_NOW.to_owned()));
            this.schema("silver")?.register_table("readings_now".into(), Arc::new(view))?;
        }
        Ok(this)
    }

    /// The session to plan and run in.
    pub fn context(&self) -> &SessionContext {
        &self.context
    }

    /// Takes over the newest snapshots, unless that was done within [`FRESH_FOR`].
    ///
    /// # Errors
    /// When the tables cannot be read.
    pub async fn refresh(&self) -> anyhow::Result<()> {
        self.refresh_within(Duration::MAX).await
    }

    /// [`Self::refresh`] of a lake that answers within `patience`: a store that is away is asked again and again for
    /// longer than who wants to know will wait.
    ///
    /// # Errors
    /// When the tables cannot be read, or not in time.
    pub async fn refresh_within(&self, patience: Duration) -> anyhow::Result<()> {
        let read = async {
            let refreshed = self.refreshed.lock().await;
            if refreshed.elapsed() < FRESH_FOR {
                return anyhow::Ok(None);
            }
            let asked_at = Instant::now();
            let lake = (self.source)().await.context("reading the newest snapshots")?;
            Ok(Some((refreshed, asked_at, lake)))
        };
        // What follows is not cut short, since all tables change together.
        let read = timeout(patience, read)
            .await
            .map_err(|_| anyhow!("the lake has not answered for {patience:?}: is its store there?"))??;
        if let Some((mut refreshed, asked_at, lake)) = read {
            self.adopt(&lake).await?;
            *refreshed = asked_at;
        }
        Ok(())
    }

    /// While this is held, every table stands for one snapshot.
    pub async fn hold(&self) -> RwLockReadGuard<'_, ()> {
        self.snapshot.read().await
    }

    /// Adds a table that takes care of its own freshness.
    ///
    /// # Errors
    /// When there is no such schema, or the table is there already.
    pub fn add(&self, schema: &str, name: &str, table: Arc<dyn TableProvider>) -> anyhow::Result<()> {
        self.schema(schema)?.register_table(name.to_owned(), table)?;
        Ok(())
    }

    fn schema(&self, name: &str) -> anyhow::Result<Arc<dyn SchemaProvider>> {
        self.catalog.schema(name).ok_or_else(|| anyhow!("schema {name} is not registered"))
    }

    async fn adopt(&self, lake: &SessionContext) -> anyhow::Result<()> {
        let providers = providers(lake).await?;
        let _exchanging = self.snapshot.write().await;
        for (schema, name, provider) in providers {
            let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
            match tables.get(&(schema.clone(), name.clone())) {
                Some(known) if known.schema() == provider.schema() => known.replace(provider),
                _ => {
                    let current = Arc::new(Current::new(provider));
                    if self.catalog.schema(&schema).is_none() {
                        self.catalog.register_schema(&schema, Arc::new(MemorySchemaProvider::new()))?;
                    }
                    let place = self.schema(&schema)?;
                    place.deregister_table(&name)?;
                    place.register_table(name.clone(), Arc::clone(&current) as Arc<dyn TableProvider>)?;
                    tables.insert((schema, name), current);
                }
            }
        }
        Ok(())
    }
}

/// Every table of a session but its information schema.
async fn providers(
    context: &SessionContext,
) -> anyhow::Result<Vec<(String, String, Arc<dyn TableProvider>)>> {
    let mut found = Vec::new();
    for catalog in context.catalog_names() {
        let Some(catalog) = context.catalog(&catalog) else { continue };
        for schema_name in catalog.schema_names() {
            let Some(schema) = catalog.schema(&schema_name) else { continue };
            if schema_name == "information_schema" {
                continue;
            }
            for name in schema.table_names() {
                if let Some(provider) = schema.table(&name).await? {
                    found.push((schema_name.clone(), name, provider));
                }
            }
        }
    }
    Ok(found)
}

/// A name that stands for the newest snapshot of a table.
#[derive(Debug)]
struct Current {
    schema: SchemaRef,
    snapshot: RwLock<Arc<dyn TableProvider>>,
}

impl Current {
    fn new(provider: Arc<dyn TableProvider>) -> Self {
        Self { schema: provider.schema(), snapshot: RwLock::new(provider) }
    }

    fn now(&self) -> Arc<dyn TableProvider> {
        Arc::clone(&self.snapshot.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn replace(&self, provider: Arc<dyn TableProvider>) {
        *self.snapshot.write().unwrap_or_else(PoisonError::into_inner) = provider;
    }
}

#[async_trait]
impl TableProvider for Current {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        self.now().table_type()
    }

    fn get_logical_plan(&self) -> Option<Cow<'_, LogicalPlan>> {
        self.now().get_logical_plan().map(|plan| Cow::Owned(plan.into_owned()))
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> PlanResult<Arc<dyn ExecutionPlan>> {
        self.now().scan(state, projection, filters, limit).await
    }

    async fn scan_with_args<'a>(&self, state: &dyn Session, args: ScanArgs<'a>) -> PlanResult<ScanResult> {
        self.now().scan_with_args(state, args).await
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> PlanResult<Vec<TableProviderFilterPushDown>> {
        self.now().supports_filters_pushdown(filters)
    }

    fn statistics(&self) -> Option<Statistics> {
        self.now().statistics()
    }
}
