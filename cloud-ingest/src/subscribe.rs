//! MQTT in: messages from the broker, acknowledged only after bronze says that they are durable.
//!
//! Two tasks share a connection. The one that polls it never waits for anything else: it stamps messages
//! with the connection's number and hands them on. The other one acknowledges, to the broker and to the
//! edge, and sends the heartbeat.
//!
//! * The client id is fixed and the session persistent, so the broker keeps what comes while we are away.
//! * At most `inflight` messages are unacknowledged (MQTT 5's receive maximum). As many fit into the channel,
//!   so it is full only when QoS 0 floods it, and what is then dropped is of QoS 0, and counted.
//! * Packet ids are the connection's: an acknowledgement for an earlier one is not sent. The broker delivers
//!   the message again; silver knows it by its name.
//! * On any error client and event loop are dropped, and made anew after a jittered wait. A broker that is
//!   away ends nothing.
//! * At the stop no more messages are taken; the connection stays until bronze has flushed and the last
//!   acknowledgement is sent. The session stays, so that a restart loses nothing; [`crate::drain`] ends it.
//! * **Replicas** (`mqtt.share`) share out the messages of lanes and JSON among them. Retained documents are not
//!   sent to shared subscriptions, so `status` and `devices` come to every replica, and each stores them. The
//!   heartbeat is one for all: a replica that hears another one's farewell or last will says at once that the
//!   cloud is there; so the farewell of the last one stands.
//!
//! Other parts of the program hand in messages of their own through an [`Inbox`].

mod subscription;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use common::{
    documents::{Ack, AckRange, CloudStatus},
    time::{Clock, Timestamp},
    wire::{Identity, JSON, Stream, Topic, VERSION, cloud_status_topic},
};
use rumqttc::v5::{
    AsyncClient, ConnectionError, Event, EventLoop, Incoming, MqttOptions, StateError,
    mqttbytes::{
        QoS,
        v5::{
            DisconnectReasonCode, Filter, LastWill, Publish, PublishProperties, RetainForwardRule,
            SubscribeReasonCode,
        },
    },
};
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

pub use self::subscription::{Emptying, Subscription, connection};
pub(crate) use self::subscription::{data_filters, document_filters};
use crate::{bronze::Message, metrics::Metrics};

/// First wait before a new connection.
const FIRST_RETRY: Duration = Duration::from_millis(250);
/// How long a farewell may take.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long an acknowledgement waits for a connection.
const ACK_PATIENCE: Duration = Duration::from_secs(5);

/// A message on its way to bronze.
#[derive(Debug)]
pub struct Inbound {
    /// What came.
    pub message: Message,
    /// Who is told once it is durable.
    pub token: AckToken,
}

/// Who is told that a message is durable.
#[derive(Debug)]
pub enum AckToken {
    /// The broker, on the connection with this number.
    Broker {
        /// Connections count up from 1.
        connection: u64,
        /// Packet id in it.
        pkid: u16,
    },
    /// A part of this program.
    Local(oneshot::Sender<()>),
    /// Nobody: quality of service 0.
    Nobody,
}

/// Messages that are durable in bronze.
#[derive(Debug)]
pub struct Durable {
    /// Of the messages, in their order.
    pub tokens: Vec<AckToken>,
    /// For the edges, by site and gateway.
    pub ranges: BTreeMap<(String, String), Vec<AckRange>>,
}

/// Hands in messages as if they had come from the broker.
#[derive(Clone)]
pub struct Inbox {
    /// Weak, so that the channel closes when the subscription ends.
    inbound: mpsc::WeakSender<Inbound>,
    clock: Arc<dyn Clock>,
}

impl Inbox {
    /// An inbox of this channel.
    pub fn new(inbound: &mpsc::Sender<Inbound>, clock: Arc<dyn Clock>) -> Self {
        Self { inbound: inbound.downgrade(), clock }
    }

    /// Hands in a JSON document; returns once it is durable in bronze.
    ///
    /// # Errors
    /// When the program is stopping.
    pub async fn submit(&self, topic: String, payload: Bytes) -> anyhow::Result<()> {
        let stopping = "the program is stopping; try again when it is back";
        let (told, durable) = oneshot::channel();
        let message = Message {
            received_at: self.clock.now(),
            topic,
            payload,
            content_type: Some(JSON.to_owned()),
            qos: 1,
            dup: false,
            gateway: None,
            identity: None,
        };
        let inbound = self.inbound.upgrade().context(stopping)?;
        inbound.send(Inbound { message, token: AckToken::Local(told) }).await.context(stopping)?;
        drop(inbound);
        durable.await.context(stopping)
    }
}

/// The connection of the moment: its number and client.
type Connection = watch::Sender<Option<(u64, AsyncClient)>>;

/// Receives until `stop` becomes true, then acknowledges until `durable` closes.
pub async fn run(
    subscription: Subscription,
    clock: Arc<dyn Clock>,
    inbound: mpsc::Sender<Inbound>,
    durable: mpsc::Receiver<Durable>,
    metrics: Metrics,
    stop: watch::Receiver<bool>,
) {
    let (connection, current) = watch::channel(None);
    let acknowledger = Acknowledger {
        root: subscription.root.clone(),
        writer: subscription.writer,
        client_id: subscription.options.client_id(),
        clock: Arc::clone(&clock),
        current,
        metrics: metrics.clone(),
        stop: stop.clone(),
    };
    let topic = cloud_status_topic(&subscription.root);
    let (inbound, held) = (Some(inbound), VecDeque::new());
    let receiver = Receiver { subscription, heartbeat: topic, clock, inbound, held, metrics };
    let (done, finished) = oneshot::channel();
    let heartbeat = receiver.subscription.heartbeat;
    tokio::join!(receiver.run(connection, stop, finished), async move {
        acknowledger.run(durable, heartbeat).await;
        let _ = done.send(());
    });
}

/// Polls the connection.
struct Receiver {
    subscription: Subscription,
    /// Topic of the cloud's heartbeat.
    heartbeat: String,
    clock: Arc<dyn Clock>,
    /// `None` once the program stops.
    inbound: Option<mpsc::Sender<Inbound>>,
    /// What did not fit into the channel; never more than the in-flight window.
    held: VecDeque<Inbound>,
    metrics: Metrics,
}

impl Receiver {
    async fn run(
        mut self,
        connection: Connection,
        mut stop: watch::Receiver<bool>,
        mut finished: oneshot::Receiver<()>,
    ) {
        let mut jitter = self.subscription.writer.as_u128() as u64;
        let mut retry = FIRST_RETRY;
        for number in 1.. {
            let options = self.options();
            let requests = self.subscription.former.len() + 64;
            let capacity = options.receive_maximum().map_or(1024, usize::from) + requests;
            let (client, mut events) = AsyncClient::new(options, capacity);
            let ended = loop {
                tokio::select! {
                    event = events.poll() => match event {
                        Ok(Event::Incoming(incoming)) => {
                            if matches!(incoming, Incoming::ConnAck(_)) {
                                retry = FIRST_RETRY;
                            }
                            self.take(incoming, number, &client, &connection);
                        }
                        Ok(Event::Outgoing(_)) => {}
                        Err(e) => break e,
                    },
                    () = self.pass_on(), if !self.held.is_empty() => {}
                    () = stopped(&mut stop), if self.inbound.is_some() => self.close(),
                    _ = &mut finished => return farewell(events).await,
                }
            };
            connection.send_replace(None);
            self.metrics.connected(false);
            // Those are delivered again.
            self.held.clear();
            if taken_over(&ended) {
                let client_id = self.subscription.options.client_id();
                tracing::error!(
                    client_id,
                    "another client uses this id; give each replica its own mqtt.client_id"
                );
                if let Some(emptying) = &self.subscription.emptying {
                    emptying.send_replace(Emptying::TakenOver);
                    let _ = stop.wait_for(|stop| *stop).await;
                    self.close();
                    let _ = finished.await;
                    return;
                }
            }
            jitter = jitter.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let wait = retry.mul_f64(0.5 + (jitter >> 40) as f64 / (1u64 << 25) as f64);
            tracing::warn!(reason = %ended, retry_in = ?wait, "no connection to the broker");
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stopped(&mut stop), if self.inbound.is_some() => self.close(),
                _ = &mut finished => return,
            }
            retry = (retry * 2).min(self.subscription.max_backoff);
        }
    }

    fn options(&self) -> MqttOptions {
        let Subscription { options, root, writer, .. } = &self.subscription;
        let will = status(*writer, &options.client_id(), false, self.clock.as_ref());
        let mut options = options.clone();
        options.set_last_will(LastWill::new(cloud_status_topic(root), will, QoS::AtLeastOnce, true, None));
        options
    }

    fn take(&mut self, incoming: Incoming, number: u64, client: &AsyncClient, connection: &Connection) {
        match incoming {
            Incoming::ConnAck(ack) => {
                tracing::info!(session_present = ack.session_present, "connected to the broker");
                self.metrics.connected(true);
                // Always: a fresh session has no subscriptions, and one that the broker kept may have those
                // of an earlier configuration.
                let filters = self.subscription.filters.iter().map(|(path, qos)| Filter {
                    retain_forward_rule: RetainForwardRule::OnNewSubscribe,
                    ..Filter::new(path, *qos)
                });
                let filters = filters.collect::<Vec<_>>();
                for filter in self.subscription.former.iter().filter(|_| ack.session_present) {
                    // The queue has room for all of them.
                    let _ = client.try_unsubscribe(filter);
                }
                if let Err(e) = client.try_subscribe_many(filters) {
                    tracing::error!(error = %e, "cannot subscribe");
                }
                // Only now: the heartbeat that follows is queued behind everything that the session held.
                connection.send_replace(Some((number, client.clone())));
                if let (1, false, Some(told)) = (number, ack.session_present, &self.subscription.emptying) {
                    told.send_replace(Emptying::NoSession);
                }
            }
            Incoming::SubAck(ack) => {
                let refused = |code: &&SubscribeReasonCode| !matches!(code, SubscribeReasonCode::Success(_));
                if let Some(code) = ack.return_codes.iter().find(refused) {
                    let filters = &self.subscription.filters;
                    tracing::error!(?code, ?filters, "the broker refuses a subscription; see its ACL");
                }
            }
            Incoming::Publish(publish) => {
                if publish.topic == self.heartbeat {
                    self.hear(&publish, client);
                    let _ = client.try_ack(&publish);
                } else {
                    self.publish(publish, number);
                }
            }
            _ => {}
        }
    }

    /// A heartbeat or farewell of the cloud.
    fn hear(&self, publish: &Publish, client: &AsyncClient) {
        let Ok(heard) = serde_json::from_slice::<CloudStatus>(&publish.payload) else { return };
        let Subscription { root, writer, options, emptying, .. } = &self.subscription;
        let client_id = options.client_id();
        match emptying {
            // With something held that is not on its way to bronze yet, a later heartbeat will do.
            Some(emptying) if heard.writer == *writer && !publish.retain && self.held.is_empty() => {
                emptying.send_if_modified(|state| {
                    let done = *state == Emptying::UnderWay;
                    if done {
                        *state = Emptying::Done;
                    }
                    done
                });
            }
            None if heard.writer != *writer && !heard.online && self.inbound.is_some() => {
                let document = status(*writer, &client_id, true, self.clock.as_ref());
                // If it cannot be said now, the next heartbeat says it.
                let _ = client.try_publish(cloud_status_topic(root), QoS::AtLeastOnce, true, document);
            }
            _ => {}
        }
    }

    fn publish(&mut self, publish: Publish, connection: u64) {
        let Some(sender) = &self.inbound else { return };
        self.metrics.received();
        let token = match publish.qos {
            QoS::AtMostOnce => AckToken::Nobody,
            _ => AckToken::Broker { connection, pkid: publish.pkid },
        };
        let message = message(&self.subscription.root, publish, self.clock.now());
        let inbound = Inbound { message, token };
        let inbound = if self.held.is_empty() {
            match sender.try_send(inbound) {
                Ok(()) => return,
                Err(
                    mpsc::error::TrySendError::Full(inbound) | mpsc::error::TrySendError::Closed(inbound),
                ) => inbound,
            }
        } else {
            inbound
        };
        match inbound.token {
            AckToken::Nobody => self.metrics.dropped(),
            _ => self.held.push_back(inbound),
        }
    }

    /// Waits for room in the channel and fills it with what is held.
    async fn pass_on(&mut self) {
        let Some(sender) = &self.inbound else { return self.held.clear() };
        match sender.reserve().await {
            Ok(permit) => {
                if let Some(held) = self.held.pop_front() {
                    permit.send(held);
                }
            }
            Err(_) => self.held.clear(),
        }
    }

    fn close(&mut self) {
        self.inbound = None;
        self.held.clear();
    }
}

fn message(root: &str, publish: Publish, received_at: Timestamp) -> Message {
    let properties = publish.properties.unwrap_or_default();
    let topic = String::from_utf8_lossy(&publish.topic).into_owned();
    Message {
        received_at,
        gateway: Topic::parse(root, &topic).map(|t| (t.site, t.gateway)),
        topic,
        payload: publish.payload,
        content_type: properties.content_type,
        qos: publish.qos as u8,
        dup: publish.dup,
        identity: Identity::from_properties(&properties.user_properties).ok(),
    }
}

fn taken_over(error: &ConnectionError) -> bool {
    let code = DisconnectReasonCode::SessionTakenOver;
    matches!(
        error,
        ConnectionError::MqttState(StateError::ServerDisconnect { reason_code, .. }) if *reason_code == code
    )
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Lets what is queued, which ends with the disconnect, out onto the wire.
async fn farewell(mut events: EventLoop) {
    let _ = tokio::time::timeout(FAREWELL, async { while events.poll().await.is_ok() {} }).await;
}

/// Acknowledges and sends the heartbeat.
struct Acknowledger {
    root: String,
    writer: Uuid,
    client_id: String,
    clock: Arc<dyn Clock>,
    current: watch::Receiver<Option<(u64, AsyncClient)>>,
    metrics: Metrics,
    stop: watch::Receiver<bool>,
}

impl Acknowledger {
    async fn run(mut self, mut durable: mpsc::Receiver<Durable>, heartbeat: Duration) {
        let mut beat = tokio::time::interval(heartbeat);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut current = self.current.clone();
        loop {
            tokio::select! {
                done = durable.recv() => match done {
                    Some(done) => self.acknowledge(done).await,
                    None => break,
                },
                _ = beat.tick() => self.beat(true).await,
                changed = current.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    self.beat(true).await;
                }
            }
        }
        self.beat(false).await;
        let client = self.current.borrow().as_ref().map(|(_, client)| client.clone());
        if let Some(client) = client {
            let _ = client.disconnect().await;
        }
    }

    async fn acknowledge(&mut self, durable: Durable) {
        let stopping = *self.stop.borrow();
        let patience = if stopping { Duration::ZERO } else { ACK_PATIENCE };
        let connected = async { self.current.wait_for(Option::is_some).await.ok().and_then(|c| c.clone()) };
        let current = tokio::time::timeout(patience, connected).await.ok().flatten();
        let mut acknowledged = 0;
        for token in durable.tokens {
            match (token, &current) {
                (AckToken::Local(told), _) => drop(told.send(())),
                (AckToken::Broker { connection, pkid }, Some((number, client))) if connection == *number => {
                    let publish = Publish { pkid, qos: QoS::AtLeastOnce, ..Publish::default() };
                    acknowledged += u64::from(client.ack(&publish).await.is_ok());
                }
                (AckToken::Broker { .. }, _) => self.metrics.stale(),
                (AckToken::Nobody, _) => {}
            }
        }
        self.metrics.acknowledged(acknowledged);
        let Some((_, client)) = current else { return };
        for ((site, gateway), ranges) in durable.ranges {
            let topic = Topic { site, gateway, stream: Stream::Ack }.under(&self.root);
            let document = serde_json::to_vec(&Ack { v: VERSION, ranges }).unwrap_or_default();
            let properties =
                PublishProperties { content_type: Some(JSON.to_owned()), ..PublishProperties::default() };
            // One that is lost with the connection costs a repeated message, nothing else.
            let _ =
                client.publish_with_properties(topic, QoS::AtLeastOnce, false, document, properties).await;
        }
    }

    async fn beat(&self, online: bool) {
        let client = self.current.borrow().as_ref().map(|(_, client)| client.clone());
        if let Some(client) = client {
            let document = status(self.writer, &self.client_id, online, self.clock.as_ref());
            let _ = client.publish(cloud_status_topic(&self.root), QoS::AtLeastOnce, true, document).await;
        }
    }
}

fn status(writer: Uuid, client_id: &str, online: bool, clock: &dyn Clock) -> Vec<u8> {
    let status = CloudStatus { v: VERSION, online, at: clock.now(), writer, client_id: client_id.to_owned() };
    serde_json::to_vec(&status).unwrap_or_default()
}
