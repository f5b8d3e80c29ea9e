//! One connection to a broker: options, and the task that drives it.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use rumqttc::{
    Transport,
    v5::{AsyncClient, ConnectionError, Event, MqttOptions},
};
use tokio::{sync::mpsc, task::JoinHandle};

use crate::settings::MqttSettings;

/// Bytes that a packet may have beyond its payload: topic, properties, header.
const PACKET_OVERHEAD: usize = 16 * 1024;
/// Publishes that the broker may send us before we have acknowledged one.
const RECEIVE_MAXIMUM: u16 = 64;
/// Events between the task that drives the connection and the loop that acts on them.
const EVENTS: usize = 256;
/// How long an orderly end may take.
const FAREWELL: Duration = Duration::from_millis(200);

/// What all connections to a broker share, a session of its own for each included. Checks everything that can be
/// wrong before the first connection: the password, the authorities.
pub(crate) fn options(
    mqtt: &MqttSettings,
    client_id: String,
    largest_payload: usize,
) -> anyhow::Result<MqttOptions> {
    let mut options = MqttOptions::new(client_id, mqtt.host.clone(), mqtt.port);
    let packet = u32::try_from(largest_payload + PACKET_OVERHEAD).unwrap_or(u32::MAX);
    options
        .set_keep_alive(mqtt.keep_alive.max(Duration::from_secs(5)))
        .set_clean_start(true)
        .set_connection_timeout(5)
        .set_max_packet_size(Some(packet))
        .set_receive_maximum(Some(RECEIVE_MAXIMUM));
    if !mqtt.username.is_empty() {
        let password = mqtt.password.resolve().context("its password")?.unwrap_or_default();
        options.set_credentials(mqtt.username.clone(), password);
    }
    if mqtt.tls {
        // Both ring and aws-lc-rs may be linked; a second call finds a provider there already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let path = mqtt.ca.as_ref().context("ca is empty; mqtts:// needs the PEM file of the authorities")?;
        let ca = std::fs::read(path).with_context(|| format!("ca = {}", path.display()))?;
        options.set_transport(Transport::tls(ca, None, None));
    }
    Ok(options)
}

/// A client and what happens on it; ends with the first error.
pub(crate) struct Connection {
    pub(crate) client: AsyncClient,
    pub(crate) events: mpsc::Receiver<Result<Event, Arc<ConnectionError>>>,
    task: JoinHandle<()>,
}

impl Connection {
    /// A new client with room for `capacity` requests, which begins to connect at once. Nothing of an earlier one is
    /// reused: rumqttc keeps a list of pending publishes that the outbox makes superfluous, and drops it on its own
    /// terms.
    pub(crate) fn dial(options: &MqttOptions, capacity: usize) -> Self {
        let (client, mut events) = AsyncClient::new(options.clone(), capacity);
        let (tx, rx) = mpsc::channel(EVENTS);
        // `poll` is not safe to be cancelled in the middle of a write, so it has a task of its own.
        let task = tokio::spawn(async move {
            loop {
                let event = events.poll().await.map_err(Arc::new);
                let ended = event.is_err();
                if tx.send(event).await.is_err() || ended {
                    return;
                }
            }
        });
        Self { client, events: rx, task }
    }

    /// Says goodbye, so that the broker knows that this is no accident.
    pub(crate) async fn close(mut self) {
        let _ = self.client.try_disconnect();
        let gone = async { while let Some(Ok(_)) = self.events.recv().await {} };
        // A broker that stands still finds out by itself.
        let _ = tokio::time::timeout(FAREWELL, gone).await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Everything that has happened on the connection; waits for ever when there is none.
pub(crate) async fn next_events(
    connection: &mut Option<Connection>,
    events: &mut Vec<Result<Event, Arc<ConnectionError>>>,
) -> usize {
    match connection {
        Some(connection) => connection.events.recv_many(events, EVENTS).await,
        None => std::future::pending().await,
    }
}
