//! `cloud-ingest drain`: takes one replica away and leaves no message behind.
//!
//! A broker keeps the share of a member that is away, and gives it to nobody else. So, as that member:
//!
//! 1. Nobody else is it: its heartbeat is not heard for one and a half intervals.
//! 2. Its session is resumed and unsubscribed from everything; no new message comes to it.
//! 3. What the session holds goes the way of every message: bronze, then the acknowledgements. The end is our own
//!    heartbeat, which the broker queues behind all of it.
//! 4. The session is ended, with nothing in it.
//!
//! Whatever breaks this off leaves the session as it was, or unsubscribed and with what is not in bronze yet: to
//! drain again is always right, and a replica that is started again subscribes anew.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, bail, ensure};
use common::{documents::CloudStatus, telemetry, time::Clock, wire::cloud_status_topic};
use rumqttc::v5::{
    AsyncClient, Event, EventLoop, Incoming,
    mqttbytes::{QoS, v5::Publish},
};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout_at},
};
use uuid::Uuid;

use crate::{
    metrics::Metrics,
    pipeline,
    settings::{MqttSettings, Settings},
    store::Store,
    subscribe::{Emptying, Subscription, connection},
};

/// How long a broker may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// After the last message; a clustered broker may pass one on from another node.
const QUIET: Duration = Duration::from_secs(1);

/// What draining came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// The broker kept no session of this client.
    NoSession,
    /// Messages that were stored; the session is ended.
    Stored(u64),
}

/// Drains the session of `settings.mqtt.client_id`.
///
/// # Errors
/// When that replica runs, the broker cannot be reached, or the lake cannot be opened.
pub async fn drain(settings: &Settings, clock: Arc<dyn Clock>) -> anyhow::Result<Drained> {
    let client_id = &settings.mqtt.client_id;
    ensure!(
        !is_running(&settings.mqtt).await.context("listening for heartbeats")?,
        "{client_id} is running: its heartbeat was heard; stop it (SIGTERM), then drain again"
    );
    let store = Store::configured(&settings.store)?;
    store.prove_put_if_absent().await?;
    let metrics = Metrics::new(&mut telemetry::registry());
    let writer = Uuid::now_v7();
    let (stop, stopped) = watch::channel(false);
    let (told, mut emptying) = watch::channel(Emptying::UnderWay);
    let subscription = Subscription::emptying(&settings.mqtt, &settings.json_filters(), writer, told)?;
    let mut stages = JoinSet::new();
    pipeline::start_ingest(&mut stages, settings, subscription, &clock, &store, &metrics, &stopped);
    let state = *emptying.wait_for(|state| *state != Emptying::UnderWay).await?;
    if state == Emptying::Done {
        tokio::time::sleep(QUIET).await;
    }
    // Everything taken becomes durable before the stages end.
    stop.send_replace(true);
    while let Some(ended) = stages.join_next().await {
        ended.context("a stage panicked")??;
    }
    if state == Emptying::TakenOver {
        bail!("{client_id} is running after all: it took its session back; stop it, then drain again");
    }
    end_session(&settings.mqtt).await.context("ending the session")?;
    Ok(if state == Emptying::NoSession { Drained::NoSession } else { Drained::Stored(metrics.taken()) })
}

/// Whether the replica of this client id says that it is there.
async fn is_running(settings: &MqttSettings) -> anyhow::Result<bool> {
    let mut options = connection(settings)?;
    options.set_client_id(format!("{}-drain-{:08x}", settings.client_id, Uuid::now_v7().as_u128() as u32));
    options.set_clean_start(true);
    let (client, mut events) = AsyncClient::new(options, 8);
    client.subscribe(cloud_status_topic(&settings.root), QoS::AtMostOnce).await?;
    until(&mut events, |incoming| matches!(incoming, Incoming::SubAck(_))).await?;
    let alive = |publish: &Publish| {
        let heard = serde_json::from_slice::<CloudStatus>(&publish.payload);
        !publish.retain && heard.is_ok_and(|h| h.online && h.client_id == settings.client_id)
    };
    let deadline = Instant::now() + settings.heartbeat.mul_f64(1.5);
    loop {
        match timeout_at(deadline, events.poll()).await {
            Ok(Ok(Event::Incoming(Incoming::Publish(publish)))) if alive(&publish) => return Ok(true),
            Ok(event) => drop(event?),
            Err(_) => return Ok(false),
        }
    }
}

/// A clean start forgets the session; without an expiry interval the new one ends with its connection.
async fn end_session(settings: &MqttSettings) -> anyhow::Result<()> {
    let mut options = connection(settings)?;
    options.set_clean_start(true);
    let (client, mut events) = AsyncClient::new(options, 8);
    until(&mut events, |incoming| matches!(incoming, Incoming::ConnAck(_))).await?;
    client.disconnect().await?;
    let left = async { while events.poll().await.is_ok() {} };
    let _ = timeout_at(Instant::now() + PATIENCE, left).await;
    Ok(())
}

async fn until(events: &mut EventLoop, wanted: impl Fn(&Incoming) -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let event = timeout_at(deadline, events.poll()).await.context("the broker does not answer")??;
        if let Event::Incoming(incoming) = &event
            && wanted(incoming)
        {
            return Ok(());
        }
    }
}
