//! A broker in the plant, where other people's devices publish JSON; [`super::json`] says what is read out of it.
//!
//! **Acknowledged means taken by the pipeline.** A message of QoS 1 is acknowledged to its broker once its readings
//! and rejections are in the channel to the next stage, and from there on it is as safe as a reading of our own bus:
//! a clean stop seals it, `kill -9` costs what was not yet sealed. The broker keeps our session for [`SESSION`], so
//! what is published while the agent is stopped or the cable is cut comes afterwards, as far as the broker's queue
//! reaches (1,000 messages in mosquitto unless configured), and what was under way when a connection broke comes
//! again. That is why only topics whose messages state their time are subscribed with QoS 1: what a broker kept or
//! repeats can be told apart by nothing else. The others are subscribed with QoS 0, which is neither kept nor
//! repeated, and without the retained messages.
//!
//! **Accounted for** is every message that arrives here: polled is what it held, as readings and rejections by
//! reason. What a broker does not pass on (a queue that ran over, a packet over [`LARGEST`], which it must drop by
//! MQTT 5, 3.1.2.11.4) is known to the broker alone.
//!
//! **A device that is silent is silent.** Nobody asks these devices, so nothing is due: while they or their broker
//! are away no reading is made up, of whatever quality. The cloud sees the silence by the device's `interval`; here
//! a connection that breaks or cannot be made is counted as the source fault `broker`, a filter that the broker
//! refuses as `refused`. The connection is tried for ever, with jittered pauses that double (`[mqtt] backoff`), and
//! its password and authorities are read anew each time. A broker that is down keeps nothing else from running.
//!
//! A full pipe makes this source wait, and with it the broker. A beat without readings goes down the pipe every
//! second, since time travels with the data.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::Context as _;
use common::{
    reading::{DeviceIx, Reading},
    time::Clock,
};
use rumqttc::v5::{
    AsyncClient, Event, Incoming,
    mqttbytes::{
        QoS,
        v5::{Filter, Publish, RetainForwardRule, SubAck, SubscribeReasonCode},
    },
};
use tokio::time::{Instant, MissedTickBehavior, sleep_until, timeout_at};

use super::{
    Context, Hardware, Polled,
    json::{Heard, Message, Topics},
};
use crate::{
    backoff::Backoff,
    census::{Census, Outcome, Reason},
    connection::{self, Connection, next_events},
    metrics::Metrics,
    settings::{JsonTopic, MqttSettings},
};

/// How long a broker keeps what it has for us while we are away.
pub const SESSION: Duration = Duration::from_secs(86_400);
/// Largest payload in bytes; that of a device is a few hundred.
pub const LARGEST: usize = 256 * 1024;
/// Requests that wait for the connection: acknowledgements, of which a broker leaves 64 open.
const REQUESTS: usize = 256;
/// How often time is told to the next stages when nothing arrives.
const BEAT: Duration = Duration::from_secs(1);
/// How often a reason for rejecting is logged as a warning.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// Listens until the stop signal, or until nobody listens to it.
pub(super) async fn run<H: Hardware>(
    broker: MqttSettings,
    client_id: String,
    topics: Vec<JsonTopic>,
    mut context: Context<H>,
) {
    // Gateways that lost the same broker come back at different times.
    let seed = client_id.bytes().fold(0u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    let mut listener = Listener {
        topics: Topics::new(topics),
        backoff: Backoff::new(broker.backoff, broker.max_backoff, seed),
        connection: None,
        dial_at: Instant::now(),
        failing: false,
        warned: BTreeMap::new(),
        broker,
        client_id,
        clock: Arc::clone(&context.clock),
        metrics: Arc::clone(&context.metrics),
    };
    let mut beat = tokio::time::interval(BEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut events = Vec::new();
    loop {
        let (polled, taken) = tokio::select! {
            _ = next_events(&mut listener.connection, &mut events) => {
                let (heard, taken) = listener.happened(events.drain(..));
                (listener.account(heard), taken)
            }
            () = sleep_until(listener.dial_at), if listener.connection.is_none() => {
                listener.dial();
                continue;
            }
            _ = beat.tick() => (Polled { at: context.clock.now(), ..Polled::default() }, Vec::new()),
            // A dropped sender means that the program is going down.
            _ = context.stop.wait_for(|stop| *stop) => break,
        };
        if context.out.send(polled).await.is_err() {
            break;
        }
        listener.acknowledge(&taken);
    }
    if let Some(connection) = listener.connection {
        connection.close().await;
    }
}

/// What [`listen`] heard.
#[derive(Debug, Default)]
pub struct Sample {
    /// The latest reading of each device that spoke.
    pub readings: BTreeMap<DeviceIx, Reading>,
    /// Filters that the broker refuses, each with its reason.
    pub refused: Vec<String>,
}

/// Listens until each device has spoken or `wait` is over; for `edge-agent sensors`.
///
/// # Errors
/// When the broker cannot be reached or lets us not in.
pub async fn listen(
    broker: &MqttSettings,
    client_id: &str,
    topics: &[JsonTopic],
    clock: &dyn Clock,
    wait: Duration,
) -> anyhow::Result<Sample> {
    let until = Instant::now() + wait;
    let missing = |sample: &Sample| {
        topics.iter().flat_map(JsonTopic::devices).any(|device| !sample.readings.contains_key(&device))
    };
    let mut core = Topics::new(topics.to_vec());
    let options = connection::options(broker, format!("{client_id}-sensors"), LARGEST)?;
    let mut connection = Connection::dial(&options, REQUESTS);
    let (mut sample, mut stands) = (Sample::default(), false);
    while missing(&sample) {
        let Ok(event) = timeout_at(until, connection.events.recv()).await else { break };
        match event.context("the connection ended")?? {
            Event::Incoming(Incoming::ConnAck(_)) => {
                stands = true;
                subscribe(&connection.client, &core)?;
            }
            Event::Incoming(Incoming::SubAck(ack)) => sample.refused = refused(&core, &ack),
            Event::Incoming(Incoming::Publish(publish)) => {
                let mut heard = Heard::default();
                core.read(&message(&publish), clock.now(), &mut heard);
                let readings = heard.readings.into_iter().map(|reading| (reading.device, reading));
                sample.readings.extend(readings);
                for (reason, (_, example)) in heard.rejected {
                    tracing::warn!(reason = reason.as_str(), example, "a message is rejected");
                }
            }
            _ => {}
        }
    }
    anyhow::ensure!(stands, "no answer within {} s", wait.as_secs_f64());
    connection.close().await;
    Ok(sample)
}

struct Listener {
    broker: MqttSettings,
    client_id: String,
    topics: Topics,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    connection: Option<Connection>,
    dial_at: Instant,
    backoff: Backoff,
    /// Whether it has been logged that the broker is away.
    failing: bool,
    /// When each reason was last logged as a warning.
    warned: BTreeMap<Reason, Instant>,
}

impl Listener {
    fn dial(&mut self) {
        match connection::options(&self.broker, self.client_id.clone(), LARGEST) {
            Ok(mut options) => {
                let session = u32::try_from(SESSION.as_secs()).unwrap_or(u32::MAX);
                options
                    .set_clean_start(false)
                    .set_session_expiry_interval(Some(session))
                    .set_manual_acks(true);
                self.connection = Some(Connection::dial(&options, REQUESTS));
            }
            Err(error) => self.lose(&format!("{error:#}")),
        }
    }

    /// What the messages among `events` said, and those messages.
    fn happened(
        &mut self,
        events: impl Iterator<Item = Result<Event, Arc<rumqttc::v5::ConnectionError>>>,
    ) -> (Heard, Vec<Publish>) {
        let (mut heard, mut taken) = (Heard::default(), Vec::new());
        let mut lost = Some("its task ended".to_owned());
        for event in events {
            lost = None;
            match event {
                Ok(Event::Incoming(Incoming::ConnAck(_))) => lost = self.connected(),
                Ok(Event::Incoming(Incoming::SubAck(ack))) => self.subscribed(&ack),
                Ok(Event::Incoming(Incoming::Publish(publish))) => {
                    self.topics.read(&message(&publish), self.clock.now(), &mut heard);
                    taken.push(publish);
                }
                Ok(_) => {}
                Err(error) => lost = Some(error.to_string()),
            }
            if lost.is_some() {
                break;
            }
        }
        if let Some(why) = lost {
            self.lose(&why);
        }
        (heard, taken)
    }

    /// Subscribes, also where the broker still has our session: that changes nothing.
    fn connected(&mut self) -> Option<String> {
        self.backoff.succeeded();
        self.failing = false;
        let (host, port) = (self.broker.host.as_str(), self.broker.port);
        tracing::info!(host, port, "listening to the broker");
        let connection = self.connection.as_ref()?;
        subscribe(&connection.client, &self.topics).err().map(|error| format!("{error:#}"))
    }

    fn subscribed(&self, ack: &SubAck) {
        for filter in refused(&self.topics, ack) {
            self.metrics.source_fault("refused");
            tracing::warn!(filter, host = self.broker.host, "the broker refuses a subscription; see its ACL");
        }
    }

    /// The next connection is made after a pause; a failure is logged once until one stands again.
    fn lose(&mut self, why: &str) {
        self.connection = None;
        let pause = self.backoff.pause();
        self.dial_at = Instant::now() + pause;
        self.metrics.source_fault("broker");
        let (host, port) = (self.broker.host.as_str(), self.broker.port);
        if std::mem::replace(&mut self.failing, true) {
            tracing::debug!(host, port, why, pause_ms = pause.as_millis(), "the broker is still away");
        } else {
            tracing::warn!(host, port, why, "the broker is away; trying again for ever, with growing pauses");
        }
    }

    /// Rejections count in the hour of their arrival, whatever time they claim.
    fn account(&mut self, heard: Heard) -> Polled {
        let at = self.clock.now();
        let mut census = Census::default();
        for (reason, (n, example)) in heard.rejected {
            census.add(at, Outcome::Polled, n);
            census.add(at, Outcome::Rejected(reason), n);
            let (now, host) = (Instant::now(), self.broker.host.as_str());
            if self.warned.get(&reason).is_none_or(|last| now.duration_since(*last) >= WARN_EVERY) {
                self.warned.insert(reason, now);
                tracing::warn!(host, reason = reason.as_str(), n, example, "messages are rejected");
            } else {
                tracing::debug!(host, reason = reason.as_str(), n, example, "messages are rejected");
            }
        }
        Polled::new(at, heard.readings, census)
    }

    /// They are in the pipe. An acknowledgement that a broken connection cannot take is not missed: the broker sends
    /// the message again on the next.
    fn acknowledge(&mut self, taken: &[Publish]) {
        let Some(connection) = &self.connection else { return };
        if taken.iter().any(|publish| connection.client.try_ack(publish).is_err()) {
            self.lose("it does not take our acknowledgements");
        }
    }
}

fn message(publish: &Publish) -> Message<'_> {
    Message { topic: &publish.topic, retained: publish.retain, payload: &publish.payload }
}

fn subscribe(client: &AsyncClient, topics: &Topics) -> anyhow::Result<()> {
    let filters = topics.filters().into_iter().map(|(path, timed)| {
        let (qos, rule) = match timed {
            true => (QoS::AtLeastOnce, RetainForwardRule::OnNewSubscribe),
            false => (QoS::AtMostOnce, RetainForwardRule::Never),
        };
        Filter { retain_forward_rule: rule, ..Filter::new(path, qos) }
    });
    client.try_subscribe_many(filters).context("subscribing")
}

/// The filters that the broker refuses.
fn refused(topics: &Topics, ack: &SubAck) -> Vec<String> {
    let codes = topics.filters().into_keys().zip(&ack.return_codes);
    let refused = codes.filter(|(_, code)| !matches!(code, SubscribeReasonCode::Success(_)));
    refused.map(|(filter, code)| format!("{filter} ({code:?})")).collect()
}

#[cfg(test)]
mod tests;
