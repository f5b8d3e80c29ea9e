//! One connection to the broker: options, the task that drives it, and the pause after it broke.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use rumqttc::{
    Transport,
    v5::{AsyncClient, ConnectionError, Event, MqttOptions, mqttbytes::v5::LastWill},
};
use tokio::{sync::mpsc, task::JoinHandle};

use super::Settings;

/// Bytes that a packet may have beyond its payload: topic, properties, header.
const PACKET_OVERHEAD: usize = 16 * 1024;
/// Publishes that the broker may send us before we have acknowledged one.
const RECEIVE_MAXIMUM: u16 = 64;
/// Events between the task that drives the connection and the loop that obeys the core.
const EVENTS: usize = 256;

/// What does not change from connection to connection.
pub(super) struct Dialer {
    options: MqttOptions,
    capacity: usize,
}

impl Dialer {
    /// Checks everything that can be wrong before the first connection: the password, the authorities.
    pub(super) fn new(settings: &Settings, role: &str, will: Option<LastWill>) -> anyhow::Result<Self> {
        let mqtt = &settings.mqtt;
        let id = format!("{}.{}.{role}", settings.site, settings.gateway);
        let mut options = MqttOptions::new(id, mqtt.host.clone(), mqtt.port);
        let packet = u32::try_from(settings.max_message_bytes + PACKET_OVERHEAD).unwrap_or(u32::MAX);
        options
            .set_keep_alive(mqtt.keep_alive.max(Duration::from_secs(5)))
            .set_clean_start(true)
            .set_connection_timeout(5)
            .set_max_packet_size(Some(packet))
            .set_receive_maximum(Some(RECEIVE_MAXIMUM))
            .set_outgoing_inflight_upper_limit(settings.uplink.inflight.max(1));
        if !mqtt.username.is_empty() {
            let password = mqtt.password.resolve().context("mqtt.password")?.unwrap_or_default();
            options.set_credentials(mqtt.username.clone(), password);
        }
        if mqtt.tls {
            // Both ring and aws-lc-rs may be linked; a second call finds a provider there already.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let path = mqtt
                .ca
                .as_ref()
                .context("mqtt.ca is empty; mqtts:// needs the PEM file of the authorities")?;
            let ca = std::fs::read(path).with_context(|| format!("mqtt.ca = {}", path.display()))?;
            options.set_transport(Transport::tls(ca, None, None));
        }
        if let Some(will) = will {
            options.set_last_will(will);
        }
        Ok(Self { options, capacity: usize::from(settings.uplink.inflight) + 16 })
    }

    /// A new client, which begins to connect at once. Nothing of an earlier one is reused: rumqttc keeps a list
    /// of pending publishes that the outbox makes superfluous, and drops it on its own terms.
    pub(super) fn dial(&self) -> Connection {
        let (client, mut events) = AsyncClient::new(self.options.clone(), self.capacity);
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
        Connection { client, events: rx, task }
    }
}

/// A client and what happens on it; ends with the first error.
pub(super) struct Connection {
    pub(super) client: AsyncClient,
    pub(super) events: mpsc::Receiver<Result<Event, Arc<ConnectionError>>>,
    task: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The pause before connecting again: doubles from `first` to `max`; each is between a half and the whole of it.
pub(super) struct Backoff {
    first: Duration,
    max: Duration,
    failures: u32,
    seed: u64,
}

impl Backoff {
    pub(super) fn new(first: Duration, max: Duration, seed: u64) -> Self {
        Self { first, max, failures: 0, seed }
    }

    /// A connection came to stand.
    pub(super) fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// The next pause.
    pub(super) fn pause(&mut self) -> Duration {
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
