//! One connection to a broker: options, the task that drives it, and the pause after it broke.

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

/// The pause before connecting again: doubles from `first` to `max`; each is between a half and the whole of it.
pub(crate) struct Backoff {
    first: Duration,
    max: Duration,
    failures: u32,
    seed: u64,
}

impl Backoff {
    pub(crate) fn new(first: Duration, max: Duration, seed: u64) -> Self {
        Self { first, max, failures: 0, seed }
    }

    /// A connection came to stand.
    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// The next pause.
    pub(crate) fn pause(&mut self) -> Duration {
        let whole = self.first.saturating_mul(1 << self.failures.min(16)).min(self.max);
        self.failures += 1;
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        whole.mul_f64(0.5 + 0.5 * ((self.seed >> 33) as f64 / (1u64 << 31) as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_within_their_limits() {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30), 3);
        for expected in [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0] {
            let pause = backoff.pause().as_secs_f64();
            assert!((0.5 * expected..=expected).contains(&pause), "{pause} of {expected}");
        }
        backoff.succeeded();
        assert!(backoff.pause() <= Duration::from_millis(200));
    }
}
