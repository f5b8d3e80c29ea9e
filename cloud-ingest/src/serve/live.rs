//! The last minutes, in memory: what gateways send is readable by SQL and on the page before it is in the lake.
//!
//! Each serving process subscribes for itself, unshared, with a random client id and a clean session: nothing
//! is acknowledged on its behalf, and what it misses is in silver all the same.
//!
//! * `live.readings`: per device the readings of the last `keep` (15 min by default) by event time, newest
//!   [`MAX_ROWS`] in all, shared evenly by the devices; those of JSON in the units that were sent.
//! * `live.status`: per gateway when it was last heard. A gateway that was not heard for three heartbeats, or
//!   whose last will was published, is `unknown since` the time it was last heard; never "0".
//! * Readings are decoded when somebody looks: what has come since waits as it came, of each gateway the newest messages
//!   of the last `keep` and up to its share of [`MAX_ROWS`], where [`ROW_BYTES`] count as a row at least.
//! * Open anomalies: raised and not cleared, by event id; the newest [`MAX_EVENTS`].

mod table;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arrow::{
    array::{Array, ArrayRef, AsArray, RecordBatch},
    datatypes::{Float64Type, Int32Type, TimestampMicrosecondType, UInt8Type},
};
use bytes::Bytes;
use common::{
    documents::Status,
    reading::Quality,
    time::{Clock, Timestamp},
    topic_filter,
    wire::{self, Decoder, Identity, Lane, Stream, Topic},
};
use rumqttc::v5::{
    MqttOptions,
    mqttbytes::{
        QoS,
        v5::{Filter, Packet, Publish, Subscribe},
    },
};
use tokio::sync::watch;
use tracing::{info, warn};

pub(crate) use self::table::tables;
pub use self::table::{readings_schema, status_schema};
use crate::{
    decode::{self, JsonSource, Sample},
    mqtt::{Connection, Lost, check_granted},
    settings::Settings,
};

/// Readings held in memory, of all devices: about 80 MB.
const MAX_ROWS: usize = 1_000_000;
/// What one of them takes, so that messages of few rows, or that claim few, are bounded like their readings.
const ROW_BYTES: usize = 80;
/// Devices and gateways that are told apart; further ones are ignored until a restart.
const MAX_NAMES: usize = 50_000;
/// Anomalies held in memory.
const MAX_EVENTS: usize = 256;
/// Heartbeats that must be missed before a gateway's state is unknown.
const MISSED: u32 = 3;

/// How the last minutes are kept.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// Event time kept per device.
    pub keep: Duration,
    /// How often a gateway says that it is there.
    pub heartbeat: Duration,
    /// How far a device's clock may be ahead: one reading of next year would be the newest for a year.
    pub ahead: Duration,
}

impl Default for Keep {
    fn default() -> Self {
        let ahead = Duration::from_secs(300);
        Self { keep: Duration::from_secs(900), heartbeat: Duration::from_secs(60), ahead }
    }
}

/// A reading in memory.
#[derive(Clone, Copy, Debug)]
struct Point {
    ts: Timestamp,
    value: Option<f64>,
    quality: Quality,
    received_at: Timestamp,
}

/// The newest readings of one device.
#[derive(Debug)]
struct Ring {
    device_type: Arc<str>,
    asset: Arc<str>,
    unit: Arc<str>,
    points: VecDeque<Point>,
}

/// What a gateway was last known to be.
#[derive(Clone, Debug)]
struct Gateway {
    online: bool,
    last_heard: Timestamp,
    version: String,
    epoch: String,
    /// Messages sealed and still held: the depth of its outbox.
    outbox: Option<u64>,
}

/// A gateway's state as the page and `live.status` show it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct GatewayView {
    /// The plant.
    pub site: String,
    /// The edge agent.
    pub gateway_id: String,
    /// Whether it said that it is there, and was heard since.
    pub online: bool,
    /// When anything was last heard of it.
    pub last_heard: Timestamp,
    /// Set when nothing is known of it since then.
    pub unknown_since: Option<Timestamp>,
    /// Its release.
    pub version: String,
    /// Its present run.
    pub epoch: String,
    /// Messages in its outbox, as it said last.
    pub outbox: Option<u64>,
}

/// A device's newest reading and its course.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct DeviceView {
    /// The plant.
    pub site: String,
    /// Device.
    pub device_id: String,
    /// What it measures.
    pub device_type: String,
    /// The machine that it hangs on.
    pub asset_id: String,
    /// UCUM code.
    pub unit: String,
    /// Event time of the newest reading.
    pub ts: Timestamp,
    /// Its value; none when it is bad.
    pub value: Option<f64>,
    /// `good`, `uncertain` or `bad`.
    pub quality: &'static str,
    /// Means of equal stretches of the time kept, oldest first; none where nothing was measured.
    pub course: Vec<Option<f64>>,
}

/// An anomaly as it was last reported.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct EventView {
    /// UUID.
    pub event_id: String,
    /// The plant.
    pub site: String,
    /// The machine.
    pub asset_id: String,
    /// The device that weighs most.
    pub device_id: String,
    /// The model that raised it.
    pub model: String,
    /// How bad.
    pub severity: String,
    /// The model's score.
    pub score: f64,
    /// What the score was compared with.
    pub threshold: f64,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
}

/// A message that nobody has looked at.
#[derive(Debug)]
struct Unread {
    payload: Bytes,
    form: Form,
    /// Or as many as its bytes are worth.
    rows: usize,
    received_at: Timestamp,
}

/// What a message is made of.
#[derive(Clone, Debug)]
enum Form {
    /// The wire's columns.
    Arrow,
    /// Of other people's devices; without a source as on the `json` stream.
    Json(Option<Arc<JsonSource>>),
}

/// Those of a gateway, in the order of arrival.
#[derive(Debug, Default)]
struct Queue {
    messages: VecDeque<Unread>,
    /// Of all of them.
    rows: usize,
}

#[derive(Debug, Default)]
struct State {
    /// By site and gateway.
    unread: BTreeMap<(String, String), Queue>,
    devices: BTreeMap<(String, String), Ring>,
    gateways: BTreeMap<(String, String), Gateway>,
    events: BTreeMap<String, EventView>,
}

/// The last minutes. Clones share them.
#[derive(Clone)]
pub struct Live {
    keep: Keep,
    clock: Arc<dyn Clock>,
    state: Arc<Mutex<State>>,
    /// Held by whoever decodes, so that nobody else looks in between.
    reading: Arc<Mutex<Decoder>>,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live").field("keep", &self.keep).finish_non_exhaustive()
    }
}

impl Live {
    /// Nothing heard so far.
    pub fn new(keep: Keep, clock: Arc<dyn Clock>) -> Self {
        Self { keep, clock, state: Arc::default(), reading: Arc::default() }
    }

    /// Takes in one message of a gateway that says to hold `rows`. What cannot be read is left to bronze and
    /// quarantine.
    pub fn push(&self, topic: &Topic, payload: &Bytes, rows: u64, retained: bool) {
        let now = self.clock.now();
        match &topic.stream {
            Stream::Status => {
                if let Ok(status) = serde_json::from_slice::<Status>(payload) {
                    self.lock().status(topic, &status, retained, now);
                }
            }
            Stream::Lane(Lane::Readings) => {
                // A claim beyond all rows displaces no more than all rows do.
                let rows = usize::try_from(rows).unwrap_or(MAX_ROWS).min(MAX_ROWS);
                let rows = rows.max(payload.len().div_ceil(ROW_BYTES)).max(1);
                let message = Unread { payload: payload.clone(), form: Form::Arrow, rows, received_at: now };
                let mut state = self.lock();
                state.heard(topic, now);
                state.wait((topic.site.clone(), topic.gateway.clone()), message, self.keep.keep);
            }
            // It shows that a device is there; what stands for its gateway sends no heartbeat.
            Stream::Json => self.push_json(topic, None, payload),
            Stream::Lane(Lane::Anomalies) => {
                let Ok(batch) = wire::decode(Lane::Anomalies, payload) else { return };
                let mut state = self.lock();
                state.heard(topic, now);
                state.anomalies(topic, &batch);
            }
            _ => self.lock().heard(topic, now),
        }
    }

    fn push_json(&self, topic: &Topic, source: Option<Arc<JsonSource>>, payload: &Bytes) {
        let rows = payload.len().div_ceil(ROW_BYTES).max(1);
        let form = Form::Json(source);
        let message = Unread { payload: payload.clone(), form, rows, received_at: self.clock.now() };
        self.lock().wait((topic.site.clone(), topic.gateway.clone()), message, self.keep.keep);
    }

    /// Decodes what has come since somebody looked last, without keeping what comes meanwhile from coming.
    fn read(&self) -> MutexGuard<'_, State> {
        let mut decoder = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let unread = std::mem::take(&mut self.lock().unread);
        for ((site, _), Queue { messages, .. }) in unread {
            for Unread { payload, form, received_at, .. } in messages {
                let keep = self.keep;
                match form {
                    Form::Arrow => {
                        if let Ok((batch, _)) = decoder.decode(Lane::Readings, &payload) {
                            self.lock().readings(&site, &batch, received_at, keep);
                        }
                    }
                    Form::Json(source) => {
                        let samples = decode::readable(source.as_deref(), &payload);
                        self.lock().samples(&site, samples, received_at, keep);
                    }
                }
            }
        }
        self.lock()
    }

    /// Every gateway that was ever heard.
    pub fn gateways(&self) -> Vec<GatewayView> {
        let now = self.clock.now();
        let patience = self.keep.heartbeat * MISSED;
        let view = |((site, id), gateway): (&(String, String), &Gateway)| {
            let silent = now.since(gateway.last_heard) > patience;
            let online = gateway.online && !silent;
            GatewayView {
                site: site.clone(),
                gateway_id: id.clone(),
                online,
                last_heard: gateway.last_heard,
                unknown_since: (!online).then_some(gateway.last_heard),
                version: gateway.version.clone(),
                epoch: gateway.epoch.clone(),
                outbox: gateway.outbox,
            }
        };
        self.lock().gateways.iter().map(view).collect()
    }

    /// The newest reading of every device, and its course in `steps` stretches.
    pub fn devices(&self, steps: usize) -> Vec<DeviceView> {
        let view = |((site, id), ring): (&(String, String), &Ring)| {
            let newest = ring.points.back()?;
            Some(DeviceView {
                site: site.clone(),
                device_id: id.clone(),
                device_type: ring.device_type.as_ref().to_owned(),
                asset_id: ring.asset.as_ref().to_owned(),
                unit: ring.unit.as_ref().to_owned(),
                ts: newest.ts,
                value: newest.value,
                quality: newest.quality.as_str(),
                course: course(&ring.points, self.keep.keep, steps),
            })
        };
        self.read().devices.iter().filter_map(view).collect()
    }

    /// Anomalies that were reported since this process began: open ones first, then the newest.
    pub fn events(&self) -> Vec<EventView> {
        let mut events: Vec<_> = self.lock().events.values().cloned().collect();
        events.sort_by_key(|e| (e.ended_at.is_some(), std::cmp::Reverse(e.started_at)));
        events
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whatever a gateway sends shows that it is there.
    fn heard(&mut self, topic: &Topic, now: Timestamp) {
        if let Some(gateway) = self.gateway(topic) {
            gateway.last_heard = gateway.last_heard.max(now);
            gateway.online = true;
        }
    }

    fn status(&mut self, topic: &Topic, status: &Status, retained: bool, now: Timestamp) {
        let Some(gateway) = self.gateway(topic) else { return };
        gateway.online = status.online;
        if status.online {
            // A retained document tells when it was written, not that someone is there now.
            let at = if retained { status.at.min(now) } else { now };
            gateway.last_heard = gateway.last_heard.max(at);
            gateway.version.clone_from(&status.version);
            gateway.epoch = status.epoch.to_string();
            gateway.outbox = Some(status.lanes.iter().map(|l| l.head.saturating_sub(l.oldest)).sum());
        } else if gateway.last_heard == Timestamp::default() {
            // The last will: the broker sends it, so it is no sign of life.
            gateway.last_heard = status.at.min(now);
        }
    }

    fn gateway(&mut self, topic: &Topic) -> Option<&mut Gateway> {
        let key = (topic.site.clone(), topic.gateway.clone());
        if self.gateways.len() >= MAX_NAMES && !self.gateways.contains_key(&key) {
            return None;
        }
        let unheard = Gateway {
            online: false,
            last_heard: Timestamp::default(),
            version: String::new(),
            epoch: String::new(),
            outbox: None,
        };
        Some(self.gateways.entry(key).or_insert(unheard))
    }

    /// Keeps a message for whoever looks, and lets go of the gateway's oldest beyond its share.
    fn wait(&mut self, key: (String, String), message: Unread, keep: Duration) {
        let share = (MAX_ROWS / self.gateways.len().max(self.unread.len()).max(1)).max(1);
        if self.unread.len() >= MAX_NAMES && !self.unread.contains_key(&key) {
            return;
        }
        let since = message.received_at - keep;
        let Queue { messages, rows } = self.unread.entry(key).or_default();
        *rows += message.rows;
        messages.push_back(message);
        while let Some(oldest) = messages.front()
            && messages.len() > 1
            && (*rows > share || oldest.received_at < since)
        {
            *rows -= oldest.rows;
            messages.pop_front();
        }
    }

    /// Columns by position: [`wire::decode`] has checked them.
    fn readings(&mut self, site: &str, batch: &RecordBatch, now: Timestamp, keep: Keep) {
        let ts = batch.column(0).as_primitive::<TimestampMicrosecondType>();
        let value = batch.column(6).as_primitive::<Float64Type>();
        let quality = batch.column(7).as_primitive::<UInt8Type>();
        let per_device = (MAX_ROWS / self.devices.len().max(1)).max(1);
        for row in 0..batch.num_rows() {
            let device = text(batch.column(1), row);
            if device.is_empty() {
                continue;
            }
            let key = (site.to_owned(), device.to_owned());
            if self.devices.len() >= MAX_NAMES && !self.devices.contains_key(&key) {
                continue;
            }
            let what = [2, 3, 4].map(|column| text(batch.column(column), row));
            let ring = self.devices.entry(key).or_insert_with(|| Ring::of(what));
            let point = Point {
                ts: Timestamp::from_micros(ts.value(row)),
                value: value.is_valid(row).then(|| value.value(row)),
                quality: Quality::from_code(quality.value(row)).unwrap_or(Quality::Bad),
                received_at: now,
            };
            if ring.takes(what, &point, keep.ahead) {
                ring.push(point, keep.keep, per_device);
            }
        }
    }

    /// In the units and types that were sent.
    fn samples(&mut self, site: &str, samples: Vec<Sample<'_>>, now: Timestamp, keep: Keep) {
        let per_device = (MAX_ROWS / self.devices.len().max(1)).max(1);
        for sample in samples {
            let Sample { ts, device_id, device_type, asset_id, unit, value, quality } = sample;
            let key = (site.to_owned(), device_id.into_owned());
            if key.1.is_empty() || (self.devices.len() >= MAX_NAMES && !self.devices.contains_key(&key)) {
                continue;
            }
            let what = [&*device_type, &*asset_id, &*unit];
            let ring = self.devices.entry(key).or_insert_with(|| Ring::of(what));
            let quality = Quality::from_code(quality).unwrap_or(Quality::Bad);
            let point = Point { ts, value, quality, received_at: now };
            if ring.takes(what, &point, keep.ahead) {
                ring.push(point, keep.keep, per_device);
            }
        }
    }

    fn anomalies(&mut self, topic: &Topic, batch: &RecordBatch) {
        let score = batch.column(7).as_primitive::<Float64Type>();
        let threshold = batch.column(8).as_primitive::<Float64Type>();
        let started = batch.column(9).as_primitive::<TimestampMicrosecondType>();
        let ended = batch.column(10).as_primitive::<TimestampMicrosecondType>();
        for row in 0..batch.num_rows() {
            let event = EventView {
                event_id: batch.column(0).as_string::<i32>().value(row).to_owned(),
                site: topic.site.clone(),
                asset_id: text(batch.column(2), row).to_owned(),
                device_id: text(batch.column(3), row).to_owned(),
                model: text(batch.column(4), row).to_owned(),
                severity: text(batch.column(6), row).to_owned(),
                score: score.value(row),
                threshold: threshold.value(row),
                started_at: Timestamp::from_micros(started.value(row)),
                ended_at: ended.is_valid(row).then(|| Timestamp::from_micros(ended.value(row))),
            };
            // Redelivered out of order: an event that has ended stays ended.
            match self.events.get(&event.event_id) {
                Some(known) if known.ended_at.is_some() && event.ended_at.is_none() => {}
                _ => drop(self.events.insert(event.event_id.clone(), event)),
            }
        }
        while self.events.len() > MAX_EVENTS {
            let oldest = self.events.values().min_by_key(|e| e.started_at).map(|e| e.event_id.clone());
            let Some(oldest) = oldest else { break };
            self.events.remove(&oldest);
        }
    }
}

impl Ring {
    fn of([device_type, asset, unit]: [&str; 3]) -> Ring {
        let (device_type, asset, unit) = (device_type.into(), asset.into(), unit.into());
        Ring { device_type, asset, unit, points: VecDeque::new() }
    }

    /// Whether a point of such a device belongs here. What it is changes with its newest point; values in another unit than
    /// that one's cannot stand beside them.
    fn takes(&mut self, [device_type, asset, unit]: [&str; 3], point: &Point, ahead: Duration) -> bool {
        if point.ts > point.received_at + ahead {
            return false;
        }
        // Who says none means that of its device type.
        let same = *self.unit == *unit || unit.is_empty() || self.unit.is_empty();
        if self.points.back().is_some_and(|last| point.ts < last.ts) {
            return same;
        }
        if !same {
            self.points.clear();
        }
        if !unit.is_empty() && *self.unit != *unit {
            self.unit = unit.into();
        }
        if *self.device_type != *device_type {
            self.device_type = device_type.into();
        }
        if *self.asset != *asset {
            self.asset = asset.into();
        }
        true
    }

    /// Keeps the points in order of event time, one for each instant.
    fn push(&mut self, point: Point, keep: Duration, most: usize) {
        let newest = self.points.back().map_or(point.ts, |p| p.ts.max(point.ts));
        if point.ts < newest - keep {
            return;
        }
        let at = match self.points.back() {
            Some(last) if last.ts < point.ts => self.points.len(),
            _ => self.points.partition_point(|p| p.ts < point.ts),
        };
        match self.points.get_mut(at) {
            Some(same) if same.ts == point.ts => *same = point,
            _ => self.points.insert(at, point),
        }
        while self.points.len() > most || self.points.front().is_some_and(|p| p.ts < newest - keep) {
            self.points.pop_front();
        }
    }
}

/// The text of a dictionary column; null is empty.
fn text(column: &ArrayRef, row: usize) -> &str {
    let dictionary = column.as_dictionary::<Int32Type>();
    match dictionary.key(row) {
        Some(key) => dictionary.values().as_string::<i32>().value(key),
        None => "",
    }
}

/// Means of `steps` equal stretches up to the newest point; the points themselves when they are fewer.
fn course(points: &VecDeque<Point>, keep: Duration, steps: usize) -> Vec<Option<f64>> {
    let usable = |point: &Point| point.value.filter(|_| point.quality != Quality::Bad);
    let (Some(first), Some(last)) = (points.front(), points.back()) else { return Vec::new() };
    if points.len() <= steps {
        return points.iter().map(usable).collect();
    }
    let span = last.ts.since(first.ts).min(keep).as_micros().max(1);
    let mut sums = vec![(0.0, 0u32); steps.max(1)];
    for point in points {
        let at = point.ts.since(first.ts).as_micros() * (sums.len() as u128 - 1) / span;
        let slot = usize::try_from(at).unwrap_or(usize::MAX).min(sums.len() - 1);
        if let Some(value) = usable(point) {
            sums[slot] = (sums[slot].0 + value, sums[slot].1 + 1);
        }
    }
    sums.into_iter().map(|(sum, n)| (n > 0).then(|| sum / f64::from(n))).collect()
}

/// Where the live messages come from.
#[derive(Clone, Debug)]
pub struct Subscription {
    /// Address, credentials and TLS; the client id is replaced by a random one.
    pub mqtt: MqttOptions,
    /// Root of the topics.
    pub root: String,
    /// Topics of other people's devices.
    pub json: Vec<Arc<JsonSource>>,
}

impl Subscription {
    /// Everything that has readings.
    pub fn new(mqtt: MqttOptions, settings: &Settings) -> Self {
        let json = settings.json.iter().cloned().map(Arc::new).collect();
        Self { mqtt, root: settings.mqtt.root.clone(), json }
    }
}

/// Feeds `live` from the broker until `stop` becomes true. A broker that is away is tried again, every second
/// at first, then less often up to every 15 s.
pub async fn follow(subscription: Subscription, live: Live, mut stop: watch::Receiver<bool>) {
    let mut wait = Duration::from_secs(1);
    while !*stop.borrow() {
        let ended = tokio::select! {
            ended = follow_once(&subscription, &live) => ended,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        if ended.connected {
            wait = Duration::from_secs(1);
        }
        warn!(broker = %ended.why, retry_in = ?wait, "live subscription lost");
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        wait = (wait * 2).min(Duration::from_secs(15));
    }
}

struct Ended {
    connected: bool,
    why: Lost,
}

async fn follow_once(subscription: &Subscription, live: &Live) -> Ended {
    let mut options = subscription.mqtt.clone();
    options.set_client_id(format!("tailrace-live-{}", uuid::Uuid::now_v7().simple()));
    options.set_clean_start(true);
    let Connection { mut reader, writer, client, .. } = match Connection::open(&options).await {
        Ok(connection) => connection,
        Err(lost) => return Ended { connected: false, why: lost },
    };
    let streams = ["readings", "anomalies", "status", "control", "aggregates", "json"];
    let ours = streams.iter().map(|stream| format!("{}/+/+/{stream}", subscription.root));
    let others = subscription.json.iter().map(|source| source.filter.clone());
    let filters: Vec<String> = ours.chain(others).collect();
    let wanted = filters.iter().map(|path| Filter::new(path, QoS::AtMostOnce));
    client.send(Packet::Subscribe(Subscribe::new_many(wanted, None))).await;
    info!("live subscription is up");
    let reading = async {
        let mut packets = Vec::new();
        loop {
            if let Err(lost) = reader.read(&mut packets).await {
                return lost;
            }
            for packet in packets.drain(..) {
                match packet {
                    Packet::Publish(message) => take(subscription, live, &message),
                    Packet::SubAck(ack) => check_granted(&ack, &filters),
                    _ => {}
                }
            }
        }
    };
    let why = tokio::select! {
        lost = reading => lost,
        ended = writer.run() => ended.err().unwrap_or(Lost::Closed),
    };
    Ended { connected: true, why }
}

fn take(subscription: &Subscription, live: &Live, message: &Publish) {
    let Ok(path) = std::str::from_utf8(&message.topic) else { return };
    // It is kept for longer than what was read with it.
    let payload = Bytes::copy_from_slice(&message.payload);
    if let Some(topic) = Topic::parse(&subscription.root, path) {
        let identity =
            message.properties.as_ref().and_then(|p| Identity::from_properties(&p.user_properties).ok());
        let rows = identity.map_or(1, |identity| identity.rows);
        live.push(&topic, &payload, rows, message.retain);
        return;
    }
    let is_of = |source: &&Arc<JsonSource>| topic_filter::matches(&source.filter, path);
    if let Some(source) = subscription.json.iter().find(is_of) {
        let JsonSource { site, gateway, .. } = source.as_ref();
        let topic = Topic { site: site.clone(), gateway: gateway.clone(), stream: Stream::Json };
        live.push_json(&topic, Some(Arc::clone(source)), &payload);
    }
}
