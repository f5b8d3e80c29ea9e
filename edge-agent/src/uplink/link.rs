//! The second connection: status, registry, last will; acknowledgements and heartbeats of the cloud.
//!
//! It is apart from the data so that its subscribes and publishes use packet ids of their own.

use std::{sync::Arc, time::Duration};

use common::{
    documents::{Ack, AckRange, CloudStatus, Devices, Signed, Status},
    reading::Registry,
    time::Clock,
    wire::{JSON, Stream, VERSION, cloud_status_topic},
};
use rumqttc::v5::{
    AsyncClient, Event, Incoming,
    mqttbytes::{
        QoS,
        v5::{Filter, LastWill, Publish, PublishProperties},
    },
};
use serde::Serialize;
use tokio::{
    sync::{mpsc, watch},
    task::spawn_blocking,
    time::{Instant, sleep_until, timeout},
};

use super::{Settings, stopped};
use crate::{backoff::Backoff, connection::Connection, outbox::Outbox};

/// How long the farewell may take.
const FAREWELL: Duration = Duration::from_secs(2);

/// What the cloud says.
#[derive(Debug)]
pub(super) enum FromCloud {
    /// These are durable.
    Ack(Vec<AckRange>),
    /// It is there, or says goodbye.
    Heartbeat { online: bool },
}

/// Keeps the connection up until `stop`, then says goodbye.
pub(super) struct Link {
    pub(super) outbox: Outbox,
    pub(super) settings: Arc<Settings>,
    pub(super) registry: Arc<Registry>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) cloud: mpsc::Sender<FromCloud>,
    pub(super) stop: watch::Receiver<bool>,
}

impl Link {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        // Without the lanes: it may have 65,535 bytes (MQTT 5, 3.1.3.4), and whoever restarts often holds many epochs.
        let will = Status { lanes: Vec::new(), ..self.status(false).await? };
        let will = self.signed(&will)?;
        let will = LastWill::new(self.topic(Stream::Status), will, QoS::AtLeastOnce, true, None);
        let mut options = self.settings.options("link")?;
        options.set_last_will(will);
        let mqtt = &self.settings.mqtt;
        let mut backoff = Backoff::new(mqtt.backoff, mqtt.max_backoff, seed(&self.outbox) ^ 1);
        let mut stop = self.stop.clone();
        loop {
            let mut connection = Connection::dial(&options, self.settings.requests());
            if self.serve(&mut connection, &mut backoff).await? {
                return self.farewell(connection).await;
            }
            drop(connection);
            tokio::select! {
                () = tokio::time::sleep(backoff.pause()) => {}
                () = stopped(&mut stop) => return Ok(()),
            }
        }
    }

    /// Until the connection breaks (false) or it is time to stop (true).
    async fn serve(&self, connection: &mut Connection, backoff: &mut Backoff) -> anyhow::Result<bool> {
        let mut next_status = Instant::now() + self.settings.uplink.status_every;
        let mut stands = false;
        let mut stop = self.stop.clone();
        loop {
            tokio::select! {
                event = connection.events.recv() => match event {
                    Some(Ok(Event::Incoming(Incoming::ConnAck(_)))) => {
                        backoff.succeeded();
                        stands = true;
                        self.introduce(&connection.client).await?;
                    }
                    Some(Ok(Event::Incoming(Incoming::Publish(publish)))) => self.hear(&publish).await,
                    Some(Ok(_)) => {}
                    Some(Err(error)) => {
                        tracing::debug!(%error, "the status connection broke");
                        return Ok(false);
                    }
                    None => return Ok(false),
                },
                () = sleep_until(next_status) => {
                    next_status += self.settings.uplink.status_every;
                    if stands {
                        let status = self.status(true).await?;
                        self.publish(&connection.client, Stream::Status, &status)?;
                    }
                }
                // The farewell of a connection that does not stand waits for nothing but its time.
                () = stopped(&mut stop) => return Ok(true),
            }
        }
    }

    /// Birth: registry, status, subscriptions.
    async fn introduce(&self, client: &AsyncClient) -> anyhow::Result<()> {
        let filter = |topic: String| Filter::new(topic, QoS::AtLeastOnce);
        let topics = [self.topic(Stream::Ack), cloud_status_topic(&self.settings.root)];
        if client.try_subscribe_many(topics.map(filter)).is_err() {
            tracing::warn!(
                "the status connection takes no subscription; it is made again after its next error"
            );
        }
        self.publish(client, Stream::Devices, &Devices::new(self.clock.now(), &self.registry))?;
        let status = self.status(true).await?;
        self.publish(client, Stream::Status, &status)
    }

    async fn hear(&self, publish: &Publish) {
        let heard = if publish.topic == self.topic(Stream::Ack).as_bytes() {
            serde_json::from_slice::<Ack>(&publish.payload).map(|ack| FromCloud::Ack(ack.ranges))
        } else {
            serde_json::from_slice::<CloudStatus>(&publish.payload)
                .map(|status| FromCloud::Heartbeat { online: status.online })
        };
        match heard {
            // The uplink's loop ends after this one.
            Ok(heard) => drop(self.cloud.send(heard).await),
            Err(error) => tracing::warn!(%error, "a document of the cloud cannot be read; it is ignored"),
        }
    }

    /// Retained status offline, and an orderly end, so that the broker does not publish the last will.
    async fn farewell(&self, mut connection: Connection) -> anyhow::Result<()> {
        let status = self.status(false).await?;
        self.publish(&connection.client, Stream::Status, &status)?;
        // What was published last is acknowledged last.
        let mut awaited = 0i64;
        let said = async {
            // A publish that was queued before may still be on its way.
            while let Some(Ok(event)) = connection.events.recv().await {
                match event {
                    Event::Outgoing(rumqttc::Outgoing::Publish(_)) => awaited += 1,
                    Event::Incoming(Incoming::PubAck(_)) => {
                        awaited -= 1;
                        if awaited <= 0 {
                            break;
                        }
                    }
                    _ => {}
                }
            }
            let _ = connection.client.try_disconnect();
            while let Some(Ok(event)) = connection.events.recv().await {
                if matches!(event, Event::Outgoing(rumqttc::Outgoing::Disconnect)) {
                    break;
                }
            }
        };
        if timeout(FAREWELL, said).await.is_err() {
            tracing::debug!("the broker did not acknowledge the farewell in time");
        }
        Ok(())
    }

    async fn status(&self, online: bool) -> anyhow::Result<Status> {
        let outbox = self.outbox.clone();
        let lanes = spawn_blocking(move || outbox.lanes()).await?;
        Ok(Status {
            v: VERSION,
            online,
            at: self.clock.now(),
            epoch: self.outbox.epoch(),
            version: self.settings.version.clone(),
            config_sha256: self.settings.config_sha256.clone(),
            models: self.settings.models.borrow().clone(),
            lanes: lanes.into_iter().flat_map(|lane| lane.epochs).collect(),
        })
    }

    fn publish(&self, client: &AsyncClient, stream: Stream, document: &impl Serialize) -> anyhow::Result<()> {
        let properties = PublishProperties { content_type: Some(JSON.to_owned()), ..Default::default() };
        let (topic, payload) = (self.topic(stream), self.signed(document)?);
        // A full queue means a broker that stands still: its connection ends by keep-alive, the next one is told.
        if client.try_publish_with_properties(topic, QoS::AtLeastOnce, true, payload, properties).is_err() {
            tracing::debug!("the status connection is stuck");
        }
        Ok(())
    }

    fn signed(&self, document: &impl Serialize) -> anyhow::Result<Vec<u8>> {
        let super::Settings { site, gateway, .. } = self.settings.as_ref();
        Ok(serde_json::to_vec(&Signed { site, gateway, document })?)
    }

    fn topic(&self, stream: Stream) -> String {
        self.settings.topic(stream)
    }
}

/// A different one for every run of every agent.
pub(super) fn seed(outbox: &Outbox) -> u64 {
    outbox.epoch().as_u64_pair().1
}
