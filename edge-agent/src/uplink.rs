//! The uplink: publishes what [`Delivery`] says, tells it what became of it, and forgets what is done.
//!
//! Two connections, each with packet ids of its own: this loop's carries lane messages only, so that the k-th
//! `Outgoing::Publish` is the k-th message; [`link`] carries documents. After any error a connection is dropped
//! with its client and a new one is made; the outbox is the only queue.
//!
//! Nothing here blocks the runtime: whatever waits for the outbox's disk runs on blocking threads.

mod link;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use common::{
    documents::{AckRange, ModelStatus},
    reading::Registry,
    time::Clock,
    wire::{ARROW_STREAM, Lane, Stream, Topic, with_sender},
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use rumqttc::{
    Outgoing,
    v5::{
        Event, Incoming, MqttOptions,
        mqttbytes::{
            QoS,
            v5::{PubAck, PubAckReason, PublishProperties},
        },
    },
};
use serde::Serialize;
use tokio::{
    sync::{mpsc, watch},
    task::{JoinHandle, JoinSet, spawn_blocking},
};

use self::link::{FromCloud, Link, seed};
use crate::{
    backoff::Backoff,
    connection::{self, Connection, next_events},
    delivery::{Delivery, MessageRef, Mode, Rules},
    outbox::{Message, Outbox, OutboxError, RangeSet},
    settings::{MqttSettings, UplinkMode, UplinkSettings},
};

/// The cloud is taken to be there for this long after a heartbeat; it sends one every minute or more often.
const HEARTBEAT_FOR: Duration = Duration::from_secs(180);
/// Messages, and bytes of payload, that are fetched from the outbox at a time.
const PAGE_MESSAGES: usize = 64;
const PAGE_BYTES: usize = 512 * 1024;
/// Fetched and not yet published bytes, over all lanes.
const FETCHED_BYTES: usize = 2 * 1024 * 1024;

/// How often metrics of the outbox are renewed, and how often its upkeep runs.
const REPORT_EVERY: Duration = Duration::from_secs(5);
const UPKEEP_EVERY: Duration = Duration::from_secs(60);

/// What the uplink needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The plant.
    pub site: String,
    /// This agent.
    pub gateway: String,
    /// The broker.
    pub mqtt: MqttSettings,
    /// Root of all topics.
    pub root: String,
    /// Delivery.
    pub uplink: UplinkSettings,
    /// Largest payload, in bytes.
    pub max_message_bytes: usize,
    /// Version of the agent, for `status`.
    pub version: String,
    /// SHA-256 of the effective configuration in hex, for `status`.
    pub config_sha256: String,
    /// The models' states, for `status`.
    pub models: watch::Receiver<Vec<ModelStatus>>,
}

impl Settings {
    fn topic(&self, stream: Stream) -> String {
        Topic { site: self.site.clone(), gateway: self.gateway.clone(), stream }.under(&self.root)
    }

    /// Of the connection that plays this role.
    fn options(&self, role: &str) -> anyhow::Result<MqttOptions> {
        let id = format!("{}.{}.{role}", self.site, self.gateway);
        let mut options = connection::options(&self.mqtt, id, self.max_message_bytes).context("mqtt")?;
        options.set_outgoing_inflight_upper_limit(self.uplink.inflight.max(1));
        Ok(options)
    }

    /// Requests that wait for the connection: a full window, and documents.
    fn requests(&self) -> usize {
        usize::from(self.uplink.inflight) + 16
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InLane {
    lane: &'static str,
}

/// Metrics of the outbox and of delivery.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    bytes: Family<InLane, Gauge>,
    messages: Family<InLane, Gauge>,
    published: Family<InLane, Counter>,
    connected: Gauge,
    awaiting: Gauge,
    unacknowledged: Gauge,
    unknown_acks: Counter,
}

impl Metrics {
    /// Metrics that stand in `registry`.
    pub fn register(registry: &mut prometheus_client::registry::Registry) -> Self {
        let own = Self::default();
        registry.register("edge_outbox_bytes", "Bytes on disk", own.bytes.clone());
        registry.register("edge_outbox_messages", "Messages held", own.messages.clone());
        registry.register(
            "edge_published",
            "Messages published, repetitions included",
            own.published.clone(),
        );
        registry.register("edge_connected", "1 while the data connection stands", own.connected.clone());
        registry.register("edge_awaiting_cloud", "Messages that only the broker has", own.awaiting.clone());
        registry.register(
            "edge_unacknowledged_messages",
            "Messages sealed that their next owner has not acknowledged",
            own.unacknowledged.clone(),
        );
        registry.register(
            "edge_unknown_acks",
            "Acknowledgements of what this agent does not hold",
            own.unknown_acks.clone(),
        );
        own
    }

    /// Whether the data connection stands.
    pub fn is_connected(&self) -> bool {
        self.connected.get() == 1
    }

    /// Messages that only the broker has.
    pub fn awaiting(&self) -> i64 {
        self.awaiting.get()
    }

    /// How much waits in the outbox, as of the last report.
    pub fn depths(&self) -> [Depth; 4] {
        Lane::ALL.map(|lane| {
            let of = |family: &Family<InLane, Gauge>| {
                family.get(&InLane { lane: lane.as_str() }).map_or(0, |gauge| gauge.get())
            };
            Depth { lane, messages: of(&self.messages), bytes: of(&self.bytes) }
        })
    }
}

/// How much of a lane waits in the outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Depth {
    /// The queue.
    pub lane: Lane,
    /// Messages held.
    pub messages: i64,
    /// Bytes on disk.
    pub bytes: i64,
}

/// Delivers until `stop` is true, then for at most `uplink.drain` more, and says goodbye. The outbox should be
/// closed before `stop`, so that its last records leave too.
///
/// # Errors
/// When the outbox fails, or the password or the authorities cannot be read. A broker that is not there is no
/// error.
pub async fn run(
    outbox: Outbox,
    settings: Settings,
    registry: Arc<Registry>,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let settings = Arc::new(settings);
    let (cloud, from_cloud) = mpsc::channel(64);
    let (end, ended) = watch::channel(false);
    let link = Link {
        outbox: outbox.clone(),
        settings: Arc::clone(&settings),
        registry,
        clock: Arc::clone(&clock),
        cloud,
        stop: ended,
    };
    // A set, so that the task ends with this function, however that ends.
    let mut links = JoinSet::new();
    links.spawn(link.run());
    let mut uplink = Uplink::new(outbox.clone(), settings, Arc::clone(&clock), metrics).await?;
    tokio::select! {
        delivered = uplink.deliver(from_cloud, stop) => delivered?,
        Some(failed) = links.join_next() => return failed.context("the status connection")?,
    }
    uplink.finish().await?;
    spawn_blocking(move || outbox.upkeep(clock.now())).await?.context("upkeep of the outbox")?;
    let _ = end.send(true);
    links.join_next().await.unwrap_or(Ok(Ok(())))?
}

struct Uplink {
    outbox: Outbox,
    settings: Arc<Settings>,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    delivery: Delivery,
    options: MqttOptions,
    backoff: Backoff,
    begun: Instant,
    connection: Option<Connection>,
    dial_at: Duration,
    fetched: BTreeMap<MessageRef, Message>,
    /// Done, to be told to the outbox.
    done: [RangeSet; 4],
    forgetting: Option<JoinHandle<Result<(), OutboxError>>>,
    bucket: Option<Bucket>,
    topics: [String; 4],
}

impl Uplink {
    async fn new(
        outbox: Outbox,
        settings: Arc<Settings>,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
    ) -> anyhow::Result<Self> {
        let asked = outbox.clone();
        let forgotten = spawn_blocking(move || Lane::ALL.map(|lane| asked.forgotten(lane))).await?;
        let heads = outbox.heads();
        let mut lanes = forgotten.into_iter().zip(heads);
        let lanes = std::array::from_fn(|_| lanes.next().unwrap_or_default());
        let (mqtt, uplink) = (&settings.mqtt, &settings.uplink);
        let rules = Rules {
            mode: match uplink.mode {
                UplinkMode::Cloud => Mode::Cloud,
                UplinkMode::Broker => Mode::Broker,
            },
            window: usize::from(uplink.inflight),
            unacked: uplink.unacked.max(1),
            backlog_share: uplink.backlog_share,
            resend_after: uplink.resend_after,
            max_resend_after: uplink.max_resend_after,
            heartbeat_for: HEARTBEAT_FOR,
            seed: seed(&outbox),
        };
        Ok(Self {
            delivery: Delivery::new(rules, lanes),
            options: settings.options("data")?,
            backoff: Backoff::new(mqtt.backoff, mqtt.max_backoff, seed(&outbox)),
            begun: Instant::now(),
            connection: None,
            dial_at: Duration::ZERO,
            fetched: BTreeMap::new(),
            done: Default::default(),
            forgetting: None,
            bucket: uplink.max_bytes_per_s.map(Bucket::new),
            topics: Lane::ALL.map(|lane| settings.topic(Stream::Lane(lane))),
            outbox,
            settings,
            clock,
            metrics,
        })
    }

    /// Monotonic time.
    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    async fn deliver(
        &mut self,
        mut from_cloud: mpsc::Receiver<FromCloud>,
        mut stop: watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        let mut leave_at: Option<Duration> = None;
        let (mut report_at, mut upkeep_at) = (Duration::ZERO, Duration::ZERO);
        let mut events = Vec::new();
        let outbox = self.outbox.clone();
        loop {
            let now = self.now();
            if leave_at.is_some_and(|at| now >= at || self.is_finished(now)) {
                return Ok(());
            }
            if self.connection.is_none() && now >= self.dial_at {
                self.connection = Some(Connection::dial(&self.options, self.settings.requests()));
            }
            if now >= report_at {
                report_at = now + REPORT_EVERY;
                self.report().await?;
            }
            if now >= upkeep_at {
                upkeep_at = now + UPKEEP_EVERY;
                let (outbox, at) = (self.outbox.clone(), self.clock.now());
                spawn_blocking(move || outbox.upkeep(at)).await?.context("upkeep of the outbox")?;
            }
            self.fill().await?;
            self.start_forgetting();
            let wake =
                [leave_at, self.wake_at(), Some(report_at)].into_iter().flatten().min().unwrap_or(report_at);
            tokio::select! {
                n = next_events(&mut self.connection, &mut events) => {
                    if n == 0 {
                        self.lose("the connection's task ended");
                    }
                    for event in events.drain(..) {
                        match event {
                            Ok(event) => self.happened(event),
                            Err(error) => self.lose(&error.to_string()),
                        }
                    }
                }
                Some(heard) = from_cloud.recv() => self.heard(heard).await?,
                () = outbox.appended() => {}
                forgotten = finished(&mut self.forgetting) => {
                    self.forgetting = None;
                    forgotten?.context("forgetting in the outbox")?;
                }
                () = tokio::time::sleep(wake.saturating_sub(now)) => {}
                () = stopped(&mut stop), if leave_at.is_none() => {
                    leave_at = Some(self.now() + self.settings.uplink.drain);
                }
            }
            for (lane, head) in Lane::ALL.into_iter().zip(self.outbox.heads()) {
                self.delivery.appended(lane, head);
            }
            self.metrics.unacknowledged.set(self.delivery.unacknowledged().cast_signed());
        }
    }

    /// When something is to be done though nothing happens.
    fn wake_at(&self) -> Option<Duration> {
        let now = self.now();
        let dial = self.connection.is_none().then_some(self.dial_at);
        let bucket = self.bucket.as_ref().and_then(|bucket| bucket.ready_at(now));
        // What is due while the bucket is closed waits for it.
        let due = self.delivery.next_deadline(now).map(|due| bucket.map_or(due, |open| due.max(open)));
        [dial, bucket, due].into_iter().flatten().min()
    }

    /// Everything has been delivered; in cloud mode also acknowledged, if there is a cloud that could.
    fn is_finished(&self, now: Duration) -> bool {
        self.delivery.is_drained() && (self.delivery.landed() == 0 || !self.delivery.cloud_is_there(now))
    }

    /// Publishes what the core names, until it names nothing more.
    async fn fill(&mut self) -> anyhow::Result<()> {
        loop {
            let now = self.now();
            if self.bucket.as_mut().is_some_and(|bucket| !bucket.is_open(now)) {
                return Ok(());
            }
            let Some(next) = self.delivery.next(now) else { return Ok(()) };
            if !self.fetched.contains_key(&next) {
                self.fetch(next).await?;
            }
            let Some(message) = self.fetched.remove(&next) else { continue };
            let bytes = message.payload.len();
            if !self.publish(next.lane, message) {
                self.lose("the client takes no more publishes");
                return Ok(());
            }
            self.delivery.published(next);
            self.metrics.published.get_or_create(&InLane { lane: next.lane.as_str() }).inc();
            if let Some(bucket) = &mut self.bucket {
                bucket.take(bytes);
            }
        }
    }

    /// Reads a page from the outbox; tells the core what is not there any more.
    async fn fetch(&mut self, wanted: MessageRef) -> anyhow::Result<()> {
        let MessageRef { lane, index } = wanted;
        let (outbox, now) = (self.outbox.clone(), self.clock.now());
        let page = spawn_blocking(move || outbox.page(lane, index, PAGE_MESSAGES, PAGE_BYTES, now)).await?;
        let page = page.context("reading from the outbox")?;
        let found = page.first().map_or(self.outbox.heads()[lane as usize], |message| message.index);
        if found > index {
            self.delivery.absent(lane, index..found);
        }
        let bytes: usize = self.fetched.values().map(|message| message.payload.len()).sum();
        if bytes > FETCHED_BYTES {
            self.fetched.clear();
        }
        self.fetched.extend(page.into_iter().map(|m| (MessageRef { lane, index: m.index }, m)));
        Ok(())
    }

    fn publish(&self, lane: Lane, message: Message) -> bool {
        let Some(connection) = &self.connection else { return false };
        let properties = PublishProperties {
            content_type: Some(ARROW_STREAM.to_owned()),
            user_properties: message.identity.to_properties(),
            ..Default::default()
        };
        let topic = self.topics[lane as usize].clone();
        let Settings { site, gateway, .. } = self.settings.as_ref();
        // What cannot be read here cannot be read there: the cloud keeps it, with the reason.
        let payload = with_sender(&message.payload, site, gateway).map_or(message.payload, Into::into);
        connection
            .client
            .try_publish_with_properties(topic, QoS::AtLeastOnce, false, payload, properties)
            .is_ok()
    }

    fn happened(&mut self, event: Event) {
        if self.connection.is_none() {
            return;
        }
        match event {
            Event::Incoming(Incoming::ConnAck(ack)) => {
                let properties = ack.properties;
                let largest = properties.as_ref().and_then(|p| p.max_packet_size);
                let needed = self.settings.max_message_bytes;
                if largest.is_some_and(|largest| (largest as usize) < needed) {
                    return self.lose(&format!(
                        "the broker takes packets of {} B, outbox.max_message_bytes is {needed} B; change either",
                        largest.unwrap_or_default()
                    ));
                }
                self.backoff.succeeded();
                self.metrics.connected.set(1);
                tracing::info!(host = self.settings.mqtt.host, port = self.settings.mqtt.port, "connected");
                self.delivery.connected(properties.and_then(|p| p.receive_max));
            }
            Event::Outgoing(Outgoing::Publish(pkid)) => self.delivery.sent(pkid),
            Event::Incoming(Incoming::PubAck(ack)) => self.acknowledged(&ack),
            _ => {}
        }
    }

    fn acknowledged(&mut self, ack: &PubAck) {
        // Whether anybody listens is not ours to judge.
        if !matches!(ack.reason, PubAckReason::Success | PubAckReason::NoMatchingSubscribers) {
            return self.lose(&format!(
                "the broker refused a message: {:?}; see its log and its rights",
                ack.reason
            ));
        }
        let now = self.now();
        if let Some(MessageRef { lane, index }) = self.delivery.acked(ack.pkid, now) {
            self.done[lane as usize].insert(index..index + 1);
        }
    }

    async fn heard(&mut self, heard: FromCloud) -> anyhow::Result<()> {
        match heard {
            FromCloud::Heartbeat { online } => {
                let now = self.now();
                self.delivery.heartbeat(online, now);
            }
            FromCloud::Ack(ranges) => self.durable(ranges).await?,
        }
        Ok(())
    }

    async fn durable(&mut self, ranges: Vec<AckRange>) -> anyhow::Result<()> {
        let outbox = self.outbox.clone();
        let located = spawn_blocking(move || outbox.locate(&ranges)).await?;
        self.metrics.unknown_acks.inc_by(located.unknown);
        for (lane, range) in located.ranges {
            self.delivery.durable(lane, range.clone());
            self.done[lane as usize].insert(range);
        }
        Ok(())
    }

    /// Drops the connection; the next one is made after a pause.
    fn lose(&mut self, why: &str) {
        if self.connection.take().is_none() {
            return;
        }
        let pause = self.backoff.pause();
        tracing::warn!(why, pause_ms = pause.as_millis(), "the connection to the broker is lost");
        self.metrics.connected.set(0);
        self.delivery.disconnected();
        self.dial_at = self.now() + pause;
    }

    /// One job at a time, so that acknowledgements gather while one waits for the disk.
    fn start_forgetting(&mut self) {
        let done: Vec<_> =
            Lane::ALL.into_iter().filter(|lane| self.done[*lane as usize] != RangeSet::default()).collect();
        if self.forgetting.is_some() || done.is_empty() {
            return;
        }
        let done: Vec<_> = done.into_iter().map(|lane| (lane, self.done[lane as usize].take())).collect();
        let outbox = self.outbox.clone();
        self.forgetting = Some(spawn_blocking(move || {
            let mut ranges =
                done.into_iter().flat_map(|(lane, ranges)| ranges.into_iter().map(move |r| (lane, r)));
            ranges.try_for_each(|(lane, range)| outbox.forget(lane, range))
        }));
    }

    /// Tells the outbox the last of what is done, and ends the connection in order.
    async fn finish(&mut self) -> anyhow::Result<()> {
        while self.forgetting.is_some() || self.done.iter().any(|done| *done != RangeSet::default()) {
            self.start_forgetting();
            let forgotten = finished(&mut self.forgetting).await;
            self.forgetting = None;
            forgotten?.context("forgetting in the outbox")?;
        }
        if let Some(connection) = self.connection.take() {
            connection.close().await;
        }
        self.report().await
    }

    async fn report(&self) -> anyhow::Result<()> {
        let outbox = self.outbox.clone();
        for view in spawn_blocking(move || outbox.lanes()).await? {
            let lane = InLane { lane: view.lane.as_str() };
            self.metrics.bytes.get_or_create(&lane).set(view.bytes.cast_signed());
            self.metrics.messages.get_or_create(&lane).set(view.messages.cast_signed());
        }
        self.metrics.awaiting.set(i64::try_from(self.delivery.landed()).unwrap_or(i64::MAX));
        Ok(())
    }
}

/// Ends when it is time to stop, also when whoever would say so is gone.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// The end of a job; waits for ever when there is none.
async fn finished<T>(job: &mut Option<JoinHandle<T>>) -> Result<T, tokio::task::JoinError> {
    match job {
        Some(job) => job.await,
        None => std::future::pending().await,
    }
}

/// A token bucket of one second's worth: the last message may overdraw it.
struct Bucket {
    per_second: f64,
    tokens: f64,
    at: Duration,
}

impl Bucket {
    fn new(bytes_per_second: u64) -> Self {
        let per_second = bytes_per_second.max(1) as f64;
        Self { per_second, tokens: per_second, at: Duration::ZERO }
    }

    fn is_open(&mut self, now: Duration) -> bool {
        let earned = now.saturating_sub(self.at).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + earned).min(self.per_second);
        self.at = now;
        self.tokens > 0.0
    }

    fn take(&mut self, bytes: usize) {
        self.tokens -= bytes as f64;
    }

    /// When it opens again; `None` when it is open.
    fn ready_at(&self, now: Duration) -> Option<Duration> {
        (self.tokens <= 0.0)
            .then(|| now.max(self.at + Duration::from_secs_f64((1.0 - self.tokens) / self.per_second)))
    }
}

#[cfg(test)]
pub(crate) mod tests;
