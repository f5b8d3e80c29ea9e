//! READ FIRST: the stages of the cloud side, in the order in which data flows.
//!
//! ```text
//! broker ──► subscribe ──inbound──► ingest (bronze) ──progress──► refine (silver) ──► gold ──► serve
//!                ▲                        │                             └──► rules ──► alerts, broker, tables
//!                └───────durable──────────┘   acknowledgements, to the broker and to the edge
//! ```
//!
//! | channel | bound | full when | closed by |
//! |---|---|---|---|
//! | inbound | 64 reads of 64 KiB | the store is slow; then subscribe holds `mqtt.inflight` more messages, and the broker waits | subscribe, at the stop |
//! | durable | 4 segments | the broker is slow | ingest, once it has flushed |
//! | progress | the newest count | never | ingest, once it has flushed |
//! | silver | the newest plan | never | refine, once all of bronze is in silver |
//!
//! Beside refine and gold, upkeep packs and tidies what they have written, until silver ends. Rules follow silver
//! plan by plan, each in a task of its own; nothing waits for them.
//!
//! Only subscribe and serve see the stop signal. Subscribe takes no more messages; ingest flushes; subscribe
//! acknowledges what that made durable and says farewell; refine carries on until everything in bronze is in
//! silver, and gold takes a last step. Without the role `ingest`, refine follows the stop signal itself.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::Context;
use common::{config::Mistakes, telemetry, time::Clock};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use uuid::Uuid;

use crate::{
    bronze::{self, Bronze},
    decode::maintenance_topic,
    gold::{self, Calendars, GoldSettings},
    ingest,
    metrics::Metrics,
    plan,
    quality::Rules,
    refine::{self, Refiner},
    rules,
    serve::{self, Control, MaintenanceSink, ServeSettings, live},
    settings::{Role, Settings},
    store::Store,
    subscribe::{self, Inbox, Subscription},
    tables::Tables,
    upkeep,
};

/// What was read from the broker at once, on its way to bronze.
const INBOUND: usize = 64;
/// Segments between bronze and the acknowledgements.
const DURABLE: usize = 4;

/// Runs the roles of `settings` until `stop` becomes true and everything taken is durable and refined.
///
/// # Errors
/// What keeps a stage from starting; once they run, they wait out what fails.
pub async fn run(
    settings: Settings,
    clock: Arc<dyn Clock>,
    control: Option<Control>,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    // Two providers are linked; without a choice the first use of TLS would panic. A second call is refused.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let store = Store::configured(&settings.store)?;
    let tables = Tables::open(&store).await.with_context(|| format!("opening the lake {}", store.url()))?;
    if settings.has(Role::Ingest) || settings.has(Role::Refine) {
        store.prove_put_if_absent().await?;
    }
    // No rule can keep a process from ingesting that does nothing else.
    let (planned, tables) = if settings.has(Role::Refine) || settings.has(Role::Serve) {
        rules::plan(&settings, &tables).await?
    } else {
        (Vec::new(), tables)
    };
    let mut registry = telemetry::registry();
    let metrics = Metrics::new(&mut registry);
    let mut stages = JoinSet::new();

    let (inbox, progress) = if settings.has(Role::Ingest) {
        let subscription = Subscription::new(&settings.mqtt, &settings.json_filters(), Uuid::now_v7())?;
        let (inbox, progress) =
            start_ingest(&mut stages, &settings, subscription, &clock, &store, &metrics, &stop);
        (Some(inbox), progress)
    } else {
        (None, closed_at(&mut stages, &stop))
    };
    if settings.has(Role::Refine) {
        tables.settle_columns().await?;
        tables.create_missing().await.with_context(|| format!("creating tables in {}", store.url()))?;
        let refiner = Refiner::new(&store, &tables, rules(&settings), limits(&settings), metrics);
        let (refined, silver) = watch::channel(0);
        // Before anything is refined, so that new rules see all of it.
        rules::start(&mut stages, planned, &settings, &tables, &clock, &mut registry, &silver).await?;
        let (of_refine, interval) = (Arc::clone(&clock), settings.refine.interval);
        stages.spawn(async move {
            refine::run(refiner, of_refine, progress, interval, refined).await;
            Ok(())
        });
        let how = gold(&settings);
        stages.spawn(upkeep::run(
            tables.clone(),
            settings.upkeep,
            how.clone(),
            Arc::clone(&clock),
            silver.clone(),
        ));
        stages.spawn(gold::run(tables.clone(), how, Arc::clone(&clock), silver));
    }
    if settings.has(Role::Serve) {
        let parts = serve::Parts {
            tables,
            clock,
            metrics: Arc::new(registry),
            maintenance: maintenance(inbox, &settings.mqtt.root),
            control,
        };
        stages.spawn(serve::run(serve_settings(&settings)?, parts, stop));
    }
    // The first stage that cannot go on ends the program; at a stop all of them end by themselves.
    while let Some(ended) = stages.join_next().await {
        ended.context("a stage panicked")??;
    }
    Ok(())
}

/// The quality rules that new plans are made with.
pub fn rules(settings: &Settings) -> Rules {
    let quality = &settings.quality;
    let hard = Rules::new(
        &settings.mqtt.root,
        &settings.json,
        quality.future_tolerance,
        &quality.types,
        &quality.devices,
    );
    Rules { soft: quality.soft.clone(), ..hard }
}

/// How gold is made, from the validated settings.
pub fn gold(settings: &Settings) -> GoldSettings {
    let calendars = Calendars::parse(&settings.gold.sites, &mut Mistakes::default());
    GoldSettings {
        interval: settings.gold.interval,
        hold: settings.gold.hold,
        calendars: Arc::new(calendars),
    }
}

/// How much goes into one plan.
pub fn limits(settings: &Settings) -> plan::Limits {
    plan::Limits { segments: settings.refine.plan_segments, bytes: settings.refine.plan_bytes }
}

/// Subscribe and bronze, until `stop`; the count of segments closes when all that was taken is durable.
pub(crate) fn start_ingest(
    stages: &mut JoinSet<anyhow::Result<()>>,
    settings: &Settings,
    subscription: Subscription,
    clock: &Arc<dyn Clock>,
    store: &Store,
    metrics: &Metrics,
    stop: &watch::Receiver<bool>,
) -> (Inbox, watch::Receiver<u64>) {
    let inflight = usize::from(settings.mqtt.inflight);
    let (inbound, received) = mpsc::channel(INBOUND);
    let (durable, acknowledge) = mpsc::channel(DURABLE);
    let (progress, segments) = watch::channel(0);
    let inbox = Inbox::new(&inbound, Arc::clone(clock));
    let bronze = Bronze::new(
        subscription.writer,
        bronze::Limits {
            max_age: settings.bronze.max_age,
            max_bytes: settings.bronze.max_bytes,
            max_messages: inflight / 2,
        },
    );
    let (of_subscribe, of_ingest) = (metrics.clone(), metrics.clone());
    let (clock, store, stop) = (Arc::clone(clock), store.clone(), stop.clone());
    let subscribed =
        subscribe::run(subscription, Arc::clone(&clock), inbound, acknowledge, of_subscribe, stop);
    stages.spawn(async move {
        subscribed.await;
        Ok(())
    });
    stages.spawn(async move {
        ingest::run(bronze, store, clock, received, durable, progress, of_ingest).await;
        Ok(())
    });
    (inbox, segments)
}

/// Stands for bronze in a process that does not write it: closes at the stop.
fn closed_at(stages: &mut JoinSet<anyhow::Result<()>>, stop: &watch::Receiver<bool>) -> watch::Receiver<u64> {
    let (progress, segments) = watch::channel(0);
    let mut stop = stop.clone();
    stages.spawn(async move {
        let _ = stop.wait_for(|stop| *stop).await;
        drop(progress);
        Ok(())
    });
    segments
}

fn maintenance(inbox: Option<Inbox>, root: &str) -> MaintenanceSink {
    let topic = maintenance_topic(root);
    Arc::new(move |record| {
        let (inbox, topic) = (inbox.clone(), topic.clone());
        Box::pin(async move {
            let inbox = inbox.context("this process does not ingest; send it to one that does")?;
            inbox.submit(topic, serde_json::to_vec(&record)?.into()).await
        })
    })
}

/// How to serve, from the validated settings.
///
/// # Errors
/// When the broker's credentials cannot be read.
pub fn serve_settings(settings: &Settings) -> anyhow::Result<ServeSettings> {
    let section = &settings.serve;
    let users: BTreeMap<_, _> =
        section.users.iter().map(|user| (user.name.clone(), user.password.clone())).collect();
    let tls = (!section.tls_certificate.is_empty())
        .then(|| (PathBuf::from(&section.tls_certificate), PathBuf::from(&section.tls_key)));
    let mqtt = subscribe::connection(&settings.mqtt)?;
    Ok(ServeSettings {
        pg: SocketAddr::new(section.listen, section.pg_port),
        http: SocketAddr::new(section.listen, section.http_port),
        users,
        tls,
        limits: serve::sql::Limits { timeout: section.statement_timeout, rows: section.row_cap },
        memory_limit: section.memory_limit,
        max_connections: section.max_connections,
        keep: live::Keep {
            heartbeat: section.heartbeat,
            ahead: settings.quality.future_tolerance,
            ..live::Keep::default()
        },
        live: Some(live::Subscription::new(mqtt, settings)),
    })
}
