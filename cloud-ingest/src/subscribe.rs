//! MQTT in: messages from the broker, acknowledged only after bronze says that they are durable.
//!
//! One task reads the connection ([`crate::mqtt`]): it stamps messages with the connection's number and hands them on.
//! Another one acknowledges, to the broker and to the edge, and sends the heartbeat.
//!
//! * The client id is fixed and the session persistent, so the broker keeps what comes while we are away.
//! * At most `inflight` messages are unacknowledged (MQTT 5's receive maximum). While bronze has no room they are
//!   held here, and no more than as many: what QoS 0 brings beyond is dropped, and counted. Reading never stops, for
//!   among what comes are the answers that our acknowledgements to the edges wait for.
//! * Packet ids are the connection's: an acknowledgement for an earlier one is not sent. The broker delivers
//!   the message again; silver knows it by its name.
//! * On any error the connection is dropped, and made anew after a jittered wait. A broker that is away ends
//!   nothing.
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
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
    vec,
};

use anyhow::Context;
use bytes::Bytes;
use common::{
    documents::{Ack, AckRange, CloudStatus},
    time::{Clock, Timestamp},
    wire::{Identity, JSON, Stream, Topic, VERSION, cloud_status_topic},
};
use rumqttc::v5::{
    MqttOptions,
    mqttbytes::{
        QoS,
        v5::{
            DisconnectReasonCode, Filter, LastWill, Packet, Publish, PublishProperties, RetainForwardRule,
            Subscribe, Unsubscribe,
        },
    },
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};
use uuid::Uuid;

pub use self::subscription::{Emptying, Subscription, connection};
pub(crate) use self::subscription::{data_filters, document_filters};
use crate::{
    bronze::{Message, Origin},
    metrics::Metrics,
    mqtt::{Client, Connection, Lost, check_granted},
};

/// First wait before a new connection.
const FIRST_RETRY: Duration = Duration::from_millis(250);
/// How long a farewell may take.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long an acknowledgement waits for a connection.
const ACK_PATIENCE: Duration = Duration::from_secs(5);
/// Topics that are remembered.
const ORIGINS: usize = 65_536;

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
    inbound: mpsc::WeakSender<Vec<Inbound>>,
    clock: Arc<dyn Clock>,
}

impl Inbox {
    /// An inbox of this channel.
    pub fn new(inbound: &mpsc::Sender<Vec<Inbound>>, clock: Arc<dyn Clock>) -> Self {
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
            origin: Arc::new(Origin { topic, gateway: None }),
            payload,
            content_type: Some(JSON.to_owned()),
            qos: 1,
            dup: false,
            identity: None,
        };
        let inbound = self.inbound.upgrade().context(stopping)?;
        inbound.send(vec![Inbound { message, token: AckToken::Local(told) }]).await.context(stopping)?;
        drop(inbound);
        durable.await.context(stopping)
    }
}

/// The connection of the moment: its number and client.
type Current = watch::Sender<Option<(u64, Client)>>;

/// Receives until `stop` becomes true, then acknowledges until `durable` closes.
pub async fn run(
    subscription: Subscription,
    clock: Arc<dyn Clock>,
    inbound: mpsc::Sender<Vec<Inbound>>,
    durable: mpsc::Receiver<Durable>,
    metrics: Metrics,
    stop: watch::Receiver<bool>,
) {
    let (current, of_acknowledger) = watch::channel(None);
    let acknowledger = Acknowledger {
        root: subscription.root.clone(),
        writer: subscription.writer,
        client_id: subscription.options.client_id(),
        clock: Arc::clone(&clock),
        current: of_acknowledger,
        metrics: metrics.clone(),
        stop: stop.clone(),
    };
    let topic = cloud_status_topic(&subscription.root);
    let receiver = Receiver {
        subscription,
        heartbeat: topic,
        clock,
        inbound: Some(inbound),
        held: Vec::new(),
        origins: Origins::default(),
        heard_oneself: false,
        metrics,
    };
    let (done, finished) = oneshot::channel();
    let heartbeat = receiver.subscription.heartbeat;
    tokio::join!(receiver.run(current, stop, finished), async move {
        acknowledger.run(durable, heartbeat).await;
        let _ = done.send(());
    });
}

/// Reads the connection.
struct Receiver {
    subscription: Subscription,
    /// Topic of the cloud's heartbeat.
    heartbeat: String,
    clock: Arc<dyn Clock>,
    /// `None` once the program stops.
    inbound: Option<mpsc::Sender<Vec<Inbound>>>,
    /// What was read and is not handed on yet.
    held: Vec<Inbound>,
    origins: Origins,
    /// Our own heartbeat has come, and so has everything before it.
    heard_oneself: bool,
    metrics: Metrics,
}

impl Receiver {
    async fn run(
        mut self,
        current: Current,
        mut stop: watch::Receiver<bool>,
        mut finished: oneshot::Receiver<()>,
    ) {
        let mut jitter = self.subscription.writer.as_u128() as u64;
        let mut retry = FIRST_RETRY;
        for number in 1.. {
            let options = self.options();
            let opened = tokio::select! {
                opened = Connection::open(&options) => opened,
                () = stopped(&mut stop), if self.inbound.is_some() => {
                    self.close();
                    continue;
                }
                _ = &mut finished => return,
            };
            let lost = match opened {
                Ok(connection) => {
                    retry = FIRST_RETRY;
                    match self.receive(connection, number, &current, &mut stop, &mut finished).await {
                        Some(lost) => lost,
                        None => return,
                    }
                }
                Err(lost) => lost,
            };
            current.send_replace(None);
            self.metrics.connected(false);
            // It is delivered again.
            self.held.clear();
            self.heard_oneself = false;
            if matches!(lost, Lost::Ended(DisconnectReasonCode::SessionTakenOver)) {
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
            tracing::warn!(reason = %lost, retry_in = ?wait, "no connection to the broker");
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stopped(&mut stop), if self.inbound.is_some() => self.close(),
                _ = &mut finished => return,
            }
            retry = (retry * 2).min(self.subscription.max_backoff);
        }
    }

    /// Takes what comes on one connection; returns why it was lost, or nothing once all is said.
    async fn receive(
        &mut self,
        connection: Connection,
        number: u64,
        current: &Current,
        stop: &mut watch::Receiver<bool>,
        finished: &mut oneshot::Receiver<()>,
    ) -> Option<Lost> {
        let Connection { session_present, mut reader, writer, client } = connection;
        let mut writing = JoinSet::new();
        writing.spawn(writer.run());
        self.subscribe(session_present, &client).await;
        // Only now: the heartbeat that follows is queued behind everything that the session held.
        current.send_replace(Some((number, client.clone())));
        if let (1, false, Some(told)) = (number, session_present, &self.subscription.emptying) {
            told.send_replace(Emptying::NoSession);
        }
        let mut packets = Vec::new();
        loop {
            tokio::select! {
                biased;
                _ = &mut *finished => {
                    // What is asked for, which ends with the farewell, goes out onto the wire. The broker closes the
                    // connection: were we the first, with an answer of its own unread, it might not read ours.
                    let _ = tokio::time::timeout(FAREWELL, async {
                        writing.join_next().await;
                        while reader.read(&mut packets).await.is_ok() {}
                    })
                    .await;
                    return None;
                }
                () = stopped(stop), if self.inbound.is_some() => self.close(),
                // After a farewell everything is finished in a moment.
                Some(ended) = writing.join_next() => match ended {
                    Ok(Ok(())) => {}
                    Ok(Err(lost)) => return Some(lost),
                    Err(_) => return Some(Lost::Closed),
                },
                () = self.pass_on(), if !self.held.is_empty() => {}
                read = reader.read(&mut packets) => match read {
                    Ok(()) => self.take(packets.drain(..), number, &client),
                    Err(lost) => return Some(lost),
                },
            }
            self.tell_if_emptied();
        }
    }

    fn options(&self) -> MqttOptions {
        let Subscription { options, root, writer, .. } = &self.subscription;
        let will = status(*writer, &options.client_id(), false, self.clock.as_ref());
        let mut options = options.clone();
        options.set_last_will(LastWill::new(cloud_status_topic(root), will, QoS::AtLeastOnce, true, None));
        options
    }

    /// Always: a fresh session has no subscriptions, and one that the broker kept may have those of an earlier
    /// configuration.
    async fn subscribe(&self, session_present: bool, client: &Client) {
        tracing::info!(session_present, "connected to the broker");
        self.metrics.connected(true);
        for filter in self.subscription.former.iter().filter(|_| session_present) {
            client.send(Packet::Unsubscribe(Unsubscribe::new(filter, None))).await;
        }
        let filters = self.subscription.filters.iter().map(|(path, qos)| Filter {
            retain_forward_rule: RetainForwardRule::OnNewSubscribe,
            ..Filter::new(path, *qos)
        });
        client.send(Packet::Subscribe(Subscribe::new_many(filters, None))).await;
    }

    fn take(&mut self, packets: vec::Drain<'_, Packet>, number: u64, client: &Client) {
        let now = self.clock.now();
        self.held.reserve(packets.len());
        for packet in packets {
            match packet {
                Packet::Publish(publish) if publish.topic == self.heartbeat => self.hear(publish, client),
                Packet::Publish(publish) if self.inbound.is_some() => self.publish(publish, number, now),
                Packet::SubAck(ack) => check_granted(&ack, &self.subscription.filters),
                _ => {}
            }
        }
    }

    /// A heartbeat or farewell of the cloud.
    fn hear(&mut self, publish: Publish, client: &Client) {
        if publish.qos != QoS::AtMostOnce {
            client.try_acknowledge(publish.pkid);
        }
        let Ok(heard) = serde_json::from_slice::<CloudStatus>(&publish.payload) else { return };
        let Subscription { root, writer, options, emptying, .. } = &self.subscription;
        if emptying.is_some() {
            self.heard_oneself |= heard.writer == *writer && !publish.retain;
        } else if heard.writer != *writer && !heard.online && self.inbound.is_some() {
            let document = status(*writer, &options.client_id(), true, self.clock.as_ref());
            // If it cannot be said now, the next heartbeat says it.
            client.try_publish(heartbeat(root, document));
        }
    }

    /// Once what came before our own heartbeat is on its way to bronze.
    fn tell_if_emptied(&self) {
        if let Some(emptying) = &self.subscription.emptying
            && self.heard_oneself
            && self.held.is_empty()
        {
            emptying.send_if_modified(|state| {
                let under_way = *state == Emptying::UnderWay;
                if under_way {
                    *state = Emptying::Done;
                }
                under_way
            });
        }
    }

    fn publish(&mut self, publish: Publish, connection: u64, now: Timestamp) {
        self.metrics.received();
        let window = self.subscription.options.receive_maximum().map_or(usize::MAX, usize::from);
        let token = match publish.qos {
            QoS::AtMostOnce if self.held.len() >= window => return self.metrics.dropped(),
            QoS::AtMostOnce => AckToken::Nobody,
            _ => AckToken::Broker { connection, pkid: publish.pkid },
        };
        let origin = self.origins.of(&self.subscription.root, &publish.topic);
        let properties = publish.properties.unwrap_or_default();
        let message = Message {
            received_at: now,
            origin,
            payload: publish.payload,
            content_type: properties.content_type,
            qos: publish.qos as u8,
            dup: publish.dup,
            identity: Identity::from_properties(&properties.user_properties).ok().map(Box::new),
        };
        self.held.push(Inbound { message, token });
    }

    /// Waits for room in the channel and hands on what is held.
    async fn pass_on(&mut self) {
        let Some(sender) = &self.inbound else { return self.held.clear() };
        match sender.reserve().await {
            Ok(permit) => permit.send(std::mem::take(&mut self.held)),
            Err(_) => self.held.clear(),
        }
    }

    fn close(&mut self) {
        self.inbound = None;
        self.held.clear();
    }
}

/// Of the topics that messages came on.
#[derive(Default)]
struct Origins(HashMap<Box<[u8]>, Arc<Origin>>);

impl Origins {
    fn of(&mut self, root: &str, topic: &[u8]) -> Arc<Origin> {
        if let Some(known) = self.0.get(topic) {
            return Arc::clone(known);
        }
        if self.0.len() >= ORIGINS {
            self.0.clear();
        }
        let origin = Arc::new(Origin::of(root, String::from_utf8_lossy(topic).into_owned()));
        self.0.insert(topic.into(), Arc::clone(&origin));
        origin
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Acknowledges and sends the heartbeat.
struct Acknowledger {
    root: String,
    writer: Uuid,
    client_id: String,
    clock: Arc<dyn Clock>,
    current: watch::Receiver<Option<(u64, Client)>>,
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
            client.disconnect().await;
        }
    }

    async fn acknowledge(&mut self, durable: Durable) {
        let stopping = *self.stop.borrow();
        let patience = if stopping { Duration::ZERO } else { ACK_PATIENCE };
        let connected = async { self.current.wait_for(Option::is_some).await.ok().and_then(|c| c.clone()) };
        let current = tokio::time::timeout(patience, connected).await.ok().flatten();
        let mut pkids = Vec::with_capacity(durable.tokens.len());
        for token in durable.tokens {
            match (token, &current) {
                (AckToken::Local(told), _) => drop(told.send(())),
                (AckToken::Broker { connection, pkid }, Some((number, _))) if connection == *number => {
                    pkids.push(pkid);
                }
                (AckToken::Broker { .. }, _) => self.metrics.stale(),
                (AckToken::Nobody, _) => {}
            }
        }
        let Some((_, client)) = current else { return };
        let acknowledged = pkids.len();
        if acknowledged > 0 && client.acknowledge(pkids).await {
            self.metrics.acknowledged(acknowledged);
        }
        for ((site, gateway), ranges) in durable.ranges {
            let topic = Topic { site, gateway, stream: Stream::Ack }.under(&self.root);
            let document = serde_json::to_vec(&Ack { v: VERSION, ranges }).unwrap_or_default();
            let properties =
                PublishProperties { content_type: Some(JSON.to_owned()), ..PublishProperties::default() };
            // One that is lost with the connection costs a repeated message, nothing else.
            client.publish(Publish::new(topic, QoS::AtLeastOnce, document, Some(properties))).await;
        }
    }

    async fn beat(&self, online: bool) {
        let client = self.current.borrow().as_ref().map(|(_, client)| client.clone());
        if let Some(client) = client {
            let document = status(self.writer, &self.client_id, online, self.clock.as_ref());
            client.publish(heartbeat(&self.root, document)).await;
        }
    }
}

fn heartbeat(root: &str, document: Vec<u8>) -> Publish {
    Publish { retain: true, ..Publish::new(cloud_status_topic(root), QoS::AtLeastOnce, document, None) }
}

fn status(writer: Uuid, client_id: &str, online: bool, clock: &dyn Clock) -> Vec<u8> {
    let status = CloudStatus { v: VERSION, online, at: clock.now(), writer, client_id: client_id.to_owned() };
    serde_json::to_vec(&status).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bytes::BytesMut;
    use common::{time::SystemClock, wire::Lane};
    use rumqttc::v5::mqttbytes::v5::{ConnAck, ConnectReturnCode, PubAck};
    use tokio::net::TcpListener;

    use super::*;
    use crate::mqtt::tests::{Broker, properties};

    /// Bronze stands still, the broker has sent what it may, and takes one publish at a time: every gateway is told all
    /// the same what is durable, for the broker's answers come behind the messages for which there is no room.
    #[tokio::test]
    async fn gateways_are_told_while_bronze_has_no_room() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut options = MqttOptions::new("cloud", "127.0.0.1", listener.local_addr().unwrap().port());
        options.set_receive_maximum(Some(40)).set_max_packet_size(Some(1 << 20));
        let subscription = Subscription {
            options,
            root: "tailrace/v1".to_owned(),
            filters: vec![("tailrace/v1/+/+/readings".to_owned(), QoS::AtLeastOnce)],
            former: Vec::new(),
            heartbeat: Duration::from_secs(60),
            max_backoff: Duration::from_secs(1),
            writer: Uuid::nil(),
            emptying: None,
        };
        let (inbound, mut received) = mpsc::channel(1);
        let (durable, acknowledge) = mpsc::channel(4);
        let (stop, stopped) = watch::channel(false);
        let clock = Arc::new(SystemClock);
        let running =
            tokio::spawn(run(subscription, clock, inbound, acknowledge, Metrics::default(), stopped));

        let (socket, _) = listener.accept().await.unwrap();
        let mut broker = Broker { socket, buffer: BytesMut::new() };
        assert!(matches!(broker.hear().await, Packet::Connect(..)));
        let properties = Some(properties(|p| p.receive_max = Some(1)));
        let code = ConnectReturnCode::Success;
        broker.say(Packet::ConnAck(ConnAck { session_present: false, code, properties })).await;
        let message = |qos, pkid| Publish { pkid, ..Publish::new("tailrace/v1/a/b/json", qos, "1", None) };
        for pkid in 1..=40 {
            broker.say(Packet::Publish(message(QoS::AtLeastOnce, pkid))).await;
            broker.say(Packet::Publish(message(QoS::AtMostOnce, 0))).await;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let range = AckRange { epoch: Uuid::nil(), lane: Lane::Readings, from: 0, to: 0 };
        let gateways: BTreeSet<String> = (0..5).map(|n| format!("gw-{n}")).collect();
        let ranges = gateways.iter().map(|g| (("a".to_owned(), g.clone()), vec![range])).collect();
        let tokens = vec![AckToken::Broker { connection: 1, pkid: 1 }];
        durable.send(Durable { tokens, ranges }).await.unwrap();
        let told = async {
            let (mut told, mut acknowledged) = (BTreeSet::new(), Vec::new());
            while told.len() < gateways.len() {
                match broker.hear().await {
                    Packet::Publish(publish) => {
                        let topic = String::from_utf8(publish.topic.to_vec()).unwrap();
                        if let Some(Topic { gateway, stream: Stream::Ack, .. }) =
                            Topic::parse("tailrace/v1", &topic)
                        {
                            told.insert(gateway);
                        }
                        broker.say(Packet::PubAck(PubAck::new(publish.pkid, None))).await;
                    }
                    Packet::PubAck(ack) => acknowledged.push(ack.pkid),
                    _ => {}
                }
            }
            (told, acknowledged)
        };
        let told = tokio::time::timeout(Duration::from_secs(10), told).await;
        assert_eq!(told.expect("every gateway is told"), (gateways, vec![1]));

        // Of what was to be acknowledged nothing is lost.
        let mut numbers = Vec::new();
        while numbers.len() < 40 {
            for inbound in received.recv().await.unwrap() {
                if let AckToken::Broker { pkid, .. } = inbound.token {
                    numbers.push(pkid);
                }
            }
        }
        assert_eq!(numbers, (1..=40).collect::<Vec<u16>>());
        stop.send_replace(true);
        drop((durable, broker));
        running.await.unwrap();
    }
}
