//! Serving: PostgreSQL's wire, HTTP with the dashboard, and the last minutes in memory.
//!
//! ```text
//! MQTT ── live ──┐
//! Tables ── catalog ── sql ──┬── pg    psql, Grafana, psycopg, …
//!                            └── http  dashboard, JSON, metrics
//! ```
//!
//! Serving never writes the lake. It is read-only, bounded in time, rows, memory and connections, and listens on
//! loopback unless users are configured.

pub mod catalog;
pub(crate) mod functions;
mod http;
pub mod json;
pub mod layers;
pub mod live;
mod overview;
pub mod pg;
pub mod sql;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use common::{
    config::{Mistakes, SecretRef},
    telemetry,
    time::{Clock, Timestamp},
};
use futures::{FutureExt, future::BoxFuture};
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tracing::info;
use uuid::Uuid;

use self::{
    catalog::{Catalog, SessionSource},
    http::App,
    layers::{Inventory, Layer},
    live::{Keep, Live, Subscription},
    sql::{Answer, Limits, Queries},
};
use crate::{ledger::LedgerTable, tables::Tables};

/// How to serve, validated by [`ServeSettings::check`].
#[derive(Clone, Debug)]
pub struct ServeSettings {
    /// Address of the PostgreSQL wire; key `serve.pg_port`.
    pub pg: SocketAddr,
    /// Address of HTTP; key `serve.http_port`.
    pub http: SocketAddr,
    /// Who may connect, by name; nobody needs a password when this is empty.
    pub users: BTreeMap<String, SecretRef>,
    /// Certificate chain and key of the PostgreSQL wire, PEM.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Bounds of one query.
    pub limits: Limits,
    /// Bytes that all queries together may hold.
    pub memory_limit: usize,
    /// PostgreSQL connections at a time, and as many of HTTP.
    pub max_connections: usize,
    /// How the last minutes are kept.
    pub keep: Keep,
    /// Where they come from; none leaves `live` empty.
    pub live: Option<Subscription>,
}

impl ServeSettings {
    /// Loopback, default ports, no users: 60 s and a million rows a query, 512 MiB for all.
    pub fn loopback() -> Self {
        Self {
            pg: SocketAddr::from(([127, 0, 0, 1], 5433)),
            http: SocketAddr::from(([127, 0, 0, 1], 8080)),
            users: BTreeMap::new(),
            tls: None,
            limits: Limits { timeout: Duration::from_secs(60), rows: 1_000_000 },
            memory_limit: 512 * 1024 * 1024,
            max_connections: 64,
            keep: Keep::default(),
            live: None,
        }
    }

    /// Notes what must not be served like this.
    pub fn check(&self, mistakes: &mut Mistakes) {
        for (key, address) in [("serve.pg_port", self.pg), ("serve.http_port", self.http)] {
            check_listen(key, address.ip(), !self.users.is_empty(), mistakes);
        }
        check_connections(self.max_connections, mistakes);
    }
}

/// Notes an address that others reach while nobody needs a password.
pub(crate) fn check_listen(key: &str, listen: IpAddr, has_users: bool, mistakes: &mut Mistakes) {
    mistakes.require(
        listen.is_loopback() || has_users,
        key,
        format!("{listen} can be reached from other machines, and nobody needs a password"),
        "add [[serve.users]], or listen on 127.0.0.1",
    );
}

/// Notes a number of connections that nobody can serve.
pub(crate) fn check_connections(max_connections: usize, mistakes: &mut Mistakes) {
    mistakes.require(
        (1..=65_535).contains(&max_connections),
        "serve.max_connections",
        format!("{max_connections} cannot be served"),
        "write 1 to 65535",
    );
}

/// Something that was done to a machine, as a person recorded it; the payload of `{root}/_cloud/maintenance`.
#[derive(Clone, Debug, PartialEq, Serialize, serde::Deserialize)]
pub struct Maintenance {
    /// UUIDv7; the same record sent twice counts once.
    pub id: Uuid,
    /// The plant.
    pub site: String,
    /// The machine.
    pub asset_id: String,
    /// When it was done.
    pub done_at: Timestamp,
    /// What was done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// Whatever else there is to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Takes a record on; returns when it is durable.
pub type MaintenanceSink = Arc<dyn Fn(Maintenance) -> BoxFuture<'static, anyhow::Result<()>> + Send + Sync>;
type LayerSource = Arc<dyn Fn() -> BoxFuture<'static, anyhow::Result<Vec<Layer>>> + Send + Sync>;

/// The buttons of the demo: what breaks and repairs things.
#[derive(Debug)]
pub struct Control {
    /// Takes the key of the button that was pressed.
    pub keys: mpsc::Sender<char>,
    /// Keys and what they do; `q` has no button.
    pub labels: Vec<(char, String)>,
}

impl Control {
    fn buttons(&self) -> impl Iterator<Item = (char, &str)> {
        self.labels.iter().filter(|(key, _)| *key != 'q').map(|(key, label)| (*key, label.as_str()))
    }
}

/// What the servers read, beside the lake.
#[derive(Clone)]
struct Sources {
    clock: Arc<dyn Clock>,
    ledger: Arc<LedgerTable>,
    layers: LayerSource,
    metrics: Arc<dyn Fn() -> String + Send + Sync>,
    maintenance: MaintenanceSink,
}

/// What the rest of the pipeline hands to the servers.
pub struct Parts {
    /// The lake's tables.
    pub tables: Tables,
    /// What the time is.
    pub clock: Arc<dyn Clock>,
    /// What `/metrics` exposes.
    pub metrics: Arc<Registry>,
    /// Where maintenance records go.
    pub maintenance: MaintenanceSink,
    /// The demo's buttons, in the demo.
    pub control: Option<Control>,
}

/// Serves until `stop` becomes true.
///
/// # Errors
/// When a port is taken, a secret or certificate cannot be read, or the lake cannot be opened.
pub async fn run(settings: ServeSettings, parts: Parts, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let mut mistakes = Mistakes::of("the settings of serve");
    settings.check(&mut mistakes);
    mistakes.into_result(())?;
    let pg = bind(settings.pg, "serve.pg_port").await?;
    let http = bind(settings.http, "serve.http_port").await?;
    serve_on(pg, http, settings, parts, stop).await
}

async fn bind(address: SocketAddr, key: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("{key}: cannot listen on {address}; free port {} or set {key} to another", address.port())
    })
}

async fn serve_on(
    pg: TcpListener,
    http: TcpListener,
    settings: ServeSettings,
    parts: Parts,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut users = BTreeMap::new();
    for (name, secret) in &settings.users {
        let password = secret.resolve()?.with_context(|| format!("serve.users: {name} has no password"))?;
        users.insert(name.clone(), password);
    }
    let tls = settings.tls.as_ref().map(|(chain, key)| pg::read_tls(chain, key)).transpose()?;
    let live = Live::new(settings.keep, Arc::clone(&parts.clock));
    let ledger = Arc::new(LedgerTable::new(parts.tables.clone(), Arc::clone(&parts.clock)));
    let queries = Arc::new(queries(&settings, &parts.tables, &live, &ledger).await?);
    let app = App {
        queries: Arc::clone(&queries),
        live: live.clone(),
        overview: Arc::default(),
        users: Arc::new(users.iter().map(|(name, password)| http::digest(name, password)).collect()),
        loopback: settings.http.ip().is_loopback(),
        control: parts.control.map(Arc::new),
        sources: Sources {
            clock: parts.clock,
            ledger,
            layers: layer_source(parts.tables),
            metrics: Arc::new(move || telemetry::exposition(&parts.metrics)),
            maintenance: parts.maintenance,
        },
    };
    let access = pg::Access { users, tls, max_connections: settings.max_connections };
    info!(pg = %settings.pg, http = %settings.http, "serving");
    let follow = async {
        match settings.live {
            Some(subscription) => live::follow(subscription, live, stop.clone()).await,
            None => stopped(stop.clone()).await,
        }
        Ok(())
    };
    let asked_to_stop = stopped(stop.clone()).shared();
    tokio::try_join!(
        pg::serve(pg, queries, access, stop.clone()),
        common::http::serve(http, http::router(app), settings.max_connections, asked_to_stop).map(Ok),
        follow,
    )?;
    Ok(())
}

/// The guarded path of every query, over the lake, the ledger and what is in memory.
async fn queries(
    settings: &ServeSettings,
    tables: &Tables,
    live: &Live,
    ledger: &Arc<LedgerTable>,
) -> anyhow::Result<Queries> {
    let tables = tables.clone();
    let session: SessionSource = Arc::new(move || {
        let tables = tables.clone();
        Box::pin(async move { tables.session().await })
    });
    let catalog = Catalog::open(session, live, settings.memory_limit).await?;
    catalog.add("ops", "delivery_ledger", Arc::clone(ledger) as _)?;
    Ok(Queries::new(Arc::new(catalog), settings.limits))
}

/// Answers one query without serving; nothing is in `live`.
///
/// # Errors
/// When the lake cannot be opened, and as [`Queries::run`].
pub async fn query(
    settings: &ServeSettings,
    tables: &Tables,
    clock: Arc<dyn Clock>,
    sql: &str,
) -> anyhow::Result<Answer> {
    let live = Live::new(settings.keep, Arc::clone(&clock));
    let ledger = Arc::new(LedgerTable::new(tables.clone(), clock));
    let queries = queries(settings, tables, &live, &ledger).await?;
    Ok(queries.run(sql, settings.limits.rows).await?)
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

fn layer_source(tables: Tables) -> LayerSource {
    let inventory = Arc::new(Inventory::default());
    Arc::new(move || {
        let (tables, inventory) = (tables.clone(), Arc::clone(&inventory));
        Box::pin(async move { inventory.count(&tables).await })
    })
}
