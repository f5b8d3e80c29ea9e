//! One connection to the broker: options, and the task that drives it.

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
