//! `firmware-sim fleet`: a load generator that speaks the real wire format and obeys `ack`.
//!
//! Gateway `g` (from 0) is `fleet/gw-{g}`; its device `m` is `gw-{g}/dev-{m}`. Reading `n` of each device has
//!
//! ```text
//! ts    = start + n intervals
//! value = low + (high - low) * u,   u = splitmix64(seed + g * 2^48 + m * 2^32 + n) / 2^64, of which 53 bits are kept
//! ```
//!
//! with the type, unit, low and high of `KINDS[m mod 4]`: a pure function of (seed, device, n), so that an
//! outside reader can compute the whole set. `start` is printed with the result; by default it lies so far back that
//! no reading is from the future. Readings go round the devices: reading `i` of a gateway is reading
//! `first + i / devices` of device `i mod devices`.
//!
//! A gateway keeps each Arrow message until the cloud's `ack` names it, and sends it again after a new
//! connection or a minute's silence; a JSON message has no name and is done when the broker has it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use arrow::{
    array::{ArrayRef, Float64Array, RecordBatch, TimestampMicrosecondArray, UInt8Array},
    array::{DictionaryArray, Int32Array, StringArray},
    datatypes::Int32Type,
};
use common::{
    config::SecretRef,
    documents::{Ack, Devices, LaneStatus, Signed, Status},
    reading::{Asset, Device, Kind, Registry},
    time::{Clock as _, SystemClock, Timestamp},
    wire::{self, ClockState, Identity, Lane, Stream, Topic},
};
use rumqttc::v5::{
    AsyncClient, Event, EventLoop, Incoming, MqttOptions,
    mqttbytes::{
        QoS,
        v5::{Packet, PublishProperties},
    },
};
use serde::Serialize;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use uuid::Uuid;

/// Type, unit and range of the device `m`, by `m mod 4`.
const KINDS: [(&str, &str, f64, f64); 4] = [
    ("temperature", "Cel", 20.0, 90.0),
    ("pressure", "bar", 1.0, 16.0),
    ("vibration", "m/s2", 0.0, 20.0),
    ("flow", "L/min", 0.0, 500.0),
];
/// The plant that the gateways stand in.
const SITE: &str = "fleet";
/// Messages that await the broker's acknowledgement.
const INFLIGHT: usize = 64;
/// Messages that await the cloud's.
const UNACKED: usize = 512;
/// A message without the cloud's acknowledgement is sent again after this.
const RESEND_AFTER: Duration = Duration::from_secs(60);
/// Without any progress for so long, the fleet gives up.
const PATIENCE: Duration = Duration::from_secs(300);
/// Pause before a new connection.
const BACKOFF: Duration = Duration::from_millis(500);

/// How the fleet is run.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The broker
    #[arg(long, value_name = "mqtt://HOST:PORT")]
    pub(crate) url: String,
    /// Root of all topics
    #[arg(long, default_value = wire::DEFAULT_ROOT)]
    pub(crate) root: String,
    /// How many gateways
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) gateways: u32,
    /// How many devices each has
    #[arg(long, value_name = "M", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) devices: u32,
    /// How many readings all of them send together
    #[arg(long, value_name = "TOTAL")]
    pub(crate) readings: u64,
    /// Readings in a message
    #[arg(long, value_name = "ROWS", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) batch: u32,
    /// What messages are made of
    #[arg(long, default_value = "arrow")]
    pub(crate) format: Format,
    /// Readings a second of all gateways together; without it as fast as they are taken
    #[arg(long, value_name = "PER_SECOND")]
    pub(crate) rate: Option<f64>,
    /// Seed of the values
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Event time of reading 0 of each device (RFC 3339)
    #[arg(long)]
    pub(crate) start: Option<Timestamp>,
    /// From one reading of a device to its next, by event time
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = common::time::duration::parse)]
    pub(crate) interval: Duration,
    /// Number of each device's first reading: where an earlier fleet has ended, to carry on
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) first: u64,
    /// Of every gateway, for a broker with the shipped ACL, as file:PATH or env:NAME; the user names are fleet/gw-{g}
    #[arg(long, value_name = "REFERENCE", default_value = "")]
    pub(crate) password: SecretRef,
}

/// What messages are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// Arrow IPC with an identity, acknowledged by the cloud.
    Arrow,
    /// A JSON array, or one object where a batch is one reading.
    Json,
}

/// Sends everything and prints one JSON object.
///
/// # Errors
/// When the broker cannot be used, or nothing moves any more.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let seed = options.seed;
    let Sent { readings, messages, seconds, start } = send(options, None).await?;
    let result = serde_json::json!({
        "readings": readings, "messages": messages, "seconds": seconds, "start": start.to_string(), "seed": seed,
    });
    common::telemetry::print_line(result);
    Ok(())
}

/// What a fleet has sent, and was acknowledged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sent {
    pub(crate) readings: u64,
    pub(crate) messages: u64,
    pub(crate) seconds: f64,
    /// Event time of reading 0.
    pub(crate) start: Timestamp,
}

/// The last reading of a message that was published for the first time.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    pub(crate) gateway: u64,
    pub(crate) device: String,
    pub(crate) ts: Timestamp,
    pub(crate) at: Instant,
}

/// Is told of each message, in order by device.
pub(crate) type Watch = Arc<dyn Fn(Published) + Send + Sync>;

/// Sends everything; returns once it is acknowledged.
///
/// # Errors
/// When the broker cannot be used, or nothing moves any more.
pub(crate) async fn send(options: Options, watch: Option<Watch>) -> anyhow::Result<Sent> {
    let (gateways, devices) = (u64::from(options.gateways), u64::from(options.devices));
    let per_device = options.first + options.readings.div_ceil(gateways * devices);
    let back = options.interval.mul_f64(per_device as f64) + Duration::from_secs(60);
    let start = options.start.unwrap_or_else(|| (SystemClock.now() - back).floor(Duration::from_secs(1)));
    let options = Arc::new(options);
    let began = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    for index in 0..gateways {
        let mut gateway = Gateway::new(Arc::clone(&options), index, options.share(index), start)?;
        gateway.watch.clone_from(&watch);
        running.spawn(gateway.run());
    }
    let mut messages = 0;
    while let Some(done) = running.join_next().await {
        messages += done.context("a gateway's task")??;
    }
    Ok(Sent { readings: options.readings, messages, seconds: began.elapsed().as_secs_f64(), start })
}

/// What the lake must hold of each device that has sent something.
pub(crate) fn truth(options: &Options, start: Timestamp) -> anyhow::Result<Vec<Told>> {
    let options = Arc::new(options.clone());
    let mut told = Vec::new();
    for index in 0..u64::from(options.gateways) {
        let gateway = Gateway::new(Arc::clone(&options), index, options.share(index), start)?;
        let devices = u64::from(options.devices);
        for (m, device) in (0..).zip(&gateway.registry.devices) {
            let count = (gateway.readings + devices - 1 - m) / devices;
            if count > 0 {
                let numbers = options.first..options.first + count;
                let (first, last) = (gateway.ts(numbers.start), gateway.ts(numbers.end - 1));
                let sum = numbers.map(|n| gateway.value(m, n)).sum();
                told.push(Told { site: SITE, device: device.id.clone(), count, sum, first, last });
            }
        }
    }
    Ok(told)
}

/// All readings of a device.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub(crate) site: &'static str,
    pub(crate) device: String,
    pub(crate) count: u64,
    /// In the unit that is sent, which is silver's.
    pub(crate) sum: f64,
    pub(crate) first: Timestamp,
    pub(crate) last: Timestamp,
}

impl Options {
    /// Readings of a gateway: the first ones send one more where the total does not divide.
    fn share(&self, index: u64) -> u64 {
        let gateways = u64::from(self.gateways);
        self.readings / gateways + u64::from(index < self.readings % gateways)
    }
}

/// One simulated gateway.
struct Gateway {
    options: Arc<Options>,
    index: u64,
    start: Timestamp,
    readings: u64,
    registry: Registry,
    epoch: Uuid,
    /// Readings and messages made so far.
    made: u64,
    head: u64,
    watch: Option<Watch>,
    /// Messages that nobody has answered for, by number, with the readings before each.
    open: BTreeMap<u64, Open>,
    progress: Instant,
}

struct Open {
    topic: String,
    payload: Vec<u8>,
    identity: Option<Identity>,
    /// When it was last given to the client; `None` when it has to be sent.
    sent: Option<Instant>,
    /// The broker has it.
    at_broker: bool,
}

impl Gateway {
    fn new(options: Arc<Options>, index: u64, readings: u64, start: Timestamp) -> anyhow::Result<Gateway> {
        let asset = format!("gw-{index}");
        let devices = (0..options.devices).map(|m| {
            let (device_type, unit, ..) = KINDS[m as usize % KINDS.len()];
            Device {
                id: format!("gw-{index}/dev-{m}"),
                device_type: device_type.to_owned(),
                asset: asset.clone(),
                unit: unit.to_owned(),
                interval: Some(options.interval),
                ..Device::default()
            }
        });
        let registry = Registry {
            devices: devices.collect(),
            assets: vec![Asset { id: asset.clone(), ..Asset::default() }],
        };
        Ok(Gateway {
            options,
            index,
            start,
            readings,
            registry,
            epoch: Uuid::now_v7(),
            made: 0,
            head: 0,
            watch: None,
            open: BTreeMap::new(),
            progress: Instant::now(),
        })
    }

    fn name(&self) -> String {
        format!("gw-{}", self.index)
    }

    fn topic(&self, stream: Stream) -> String {
        Topic { site: SITE.into(), gateway: self.name(), stream }.under(&self.options.root)
    }

    fn signed(&self, document: &impl Serialize) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(&Signed { site: SITE, gateway: &self.name(), document })
    }

    /// Sends all readings; the number of messages that they were in.
    async fn run(mut self) -> anyhow::Result<u64> {
        while !self.done() {
            if let Err(e) = self.connection().await {
                if self.progress.elapsed() > PATIENCE {
                    return Err(e)
                        .with_context(|| format!("gw-{}: no progress for {PATIENCE:?}", self.index));
                }
                tracing::warn!(gateway = self.index, error = %format!("{e:#}"), "connecting again");
                sleep(BACKOFF).await;
            }
        }
        Ok(self.head)
    }

    fn done(&self) -> bool {
        self.made == self.readings && self.open.is_empty()
    }

    /// One connection, until everything is done or it breaks.
    async fn connection(&mut self) -> anyhow::Result<()> {
        let (client, mut events) = self.connect()?;
        // Before any publish, so that its packet id meets none of theirs.
        client.subscribe(self.topic(Stream::Ack), QoS::AtLeastOnce).await?;
        while !matches!(
            timeout(Duration::from_secs(10), events.poll()).await??,
            Event::Incoming(Incoming::SubAck(_))
        ) {}
        self.introduce(&client).await?;
        for open in self.open.values_mut() {
            (open.sent, open.at_broker) = (None, false);
        }
        // Numbers given to the client in order, and by the packet ids that it made of them; status and
        // devices are `None`.
        let mut given = std::collections::VecDeque::from([None, None]);
        let mut by_id: HashMap<u16, Option<u64>> = HashMap::new();
        let began = (Instant::now(), self.made);
        while !self.done() {
            let pause = self.send(&client, &mut given, &by_id, began).await?;
            let event = tokio::select! {
                event = events.poll() => event?,
                () = sleep_until(pause) => continue,
            };
            match event {
                Event::Outgoing(rumqttc::Outgoing::Publish(id)) => {
                    by_id.insert(id, given.pop_front().context("a publish that nobody gave")?);
                }
                Event::Incoming(Packet::PubAck(ack)) => {
                    if let Some(Some(seq)) = by_id.remove(&ack.pkid) {
                        self.at_broker(seq);
                    }
                }
                Event::Incoming(Packet::Publish(publish)) => self.acknowledged(&publish.payload),
                _ => {}
            }
            if self.progress.elapsed() > PATIENCE {
                bail!("nothing was acknowledged for {PATIENCE:?}");
            }
        }
        self.farewell(&client, &mut events).await
    }

    fn connect(&self) -> anyhow::Result<(AsyncClient, EventLoop)> {
        let url = &self.options.url;
        let (host, port) = url
            .strip_prefix("mqtt://")
            .and_then(|rest| rest.trim_end_matches('/').rsplit_once(':'))
            .with_context(|| format!("{url} is not mqtt://HOST:PORT"))?;
        let port = port.parse().with_context(|| format!("{url} is not mqtt://HOST:PORT"))?;
        let mut mqtt = MqttOptions::new(format!("fleet-gw-{}-{}", self.index, self.epoch), host, port);
        mqtt.set_keep_alive(Duration::from_secs(30))
            .set_clean_start(true)
            .set_outgoing_inflight_upper_limit(INFLIGHT as u16)
            .set_max_packet_size(Some(4 * 1024 * 1024));
        if let Some(password) = self.options.password.resolve().context("--password")? {
            mqtt.set_credentials(format!("{SITE}/gw-{}", self.index), password);
        }
        Ok(AsyncClient::new(mqtt, 2 * INFLIGHT))
    }

    /// Publishes `status` and `devices`.
    async fn introduce(&self, client: &AsyncClient) -> anyhow::Result<()> {
        let now = SystemClock.now();
        let devices = self.signed(&Devices::new(now, &self.registry))?;
        client.publish(self.topic(Stream::Status), QoS::AtLeastOnce, true, self.status(true)?).await?;
        client.publish(self.topic(Stream::Devices), QoS::AtLeastOnce, true, devices).await?;
        Ok(())
    }

    fn status(&self, online: bool) -> anyhow::Result<Vec<u8>> {
        let oldest = self.open.keys().next().copied().unwrap_or(self.head);
        let readings =
            LaneStatus { epoch: self.epoch, lane: Lane::Readings, head: self.head, rows: self.made, oldest };
        let lanes = if self.options.format == Format::Arrow { vec![readings] } else { Vec::new() };
        Ok(self.signed(&Status {
            v: wire::VERSION,
            online,
            at: SystemClock.now(),
            epoch: self.epoch,
            version: concat!("fleet ", env!("CARGO_PKG_VERSION")).to_owned(),
            config_sha256: String::new(),
            models: Vec::new(),
            lanes,
        })?)
    }

    /// Gives the client what the windows allow; the instant at which to look again.
    async fn send(
        &mut self,
        client: &AsyncClient,
        given: &mut std::collections::VecDeque<Option<u64>>,
        by_id: &HashMap<u16, Option<u64>>,
        (began, made_before): (Instant, u64),
    ) -> anyhow::Result<Instant> {
        let now = Instant::now();
        let mut room = INFLIGHT.saturating_sub(given.len() + by_id.len());
        let silent = |open: &Open| open.sent.is_none_or(|at| open.at_broker && now - at > RESEND_AFTER);
        let due: Vec<u64> =
            self.open.iter().filter(|(_, o)| silent(o)).map(|(seq, _)| *seq).take(room).collect();
        for seq in due {
            self.publish(client, seq).await?;
            given.push_back(Some(seq));
            room -= 1;
        }
        while room > 0 && self.made < self.readings && self.open.len() < UNACKED {
            if let Some(rate) = self.options.rate {
                let share = rate / f64::from(self.options.gateways);
                // Gateways do not seal at one moment.
                let phase =
                    self.index as f64 / f64::from(self.options.gateways) * f64::from(self.options.batch);
                let made = (self.made - made_before) as f64 + phase;
                let due = began + Duration::from_secs_f64(made / share.max(1e-6));
                if due > now {
                    return Ok(due);
                }
            }
            let seq = self.make()?;
            if let Some(watch) = &self.watch {
                let (m, n) = self.place(self.made - 1);
                let device = self.registry.devices[m as usize].id.clone();
                watch(Published { gateway: self.index, device, ts: self.ts(n), at: Instant::now() });
            }
            self.publish(client, seq).await?;
            given.push_back(Some(seq));
            room -= 1;
        }
        Ok(now + Duration::from_secs(1))
    }

    async fn publish(&mut self, client: &AsyncClient, seq: u64) -> anyhow::Result<()> {
        let oldest = self.open.keys().next().copied().unwrap_or(seq);
        let open = self.open.get_mut(&seq).context("only open messages are published")?;
        let mut properties = PublishProperties::default();
        let kind = if open.identity.is_some() { wire::ARROW_STREAM } else { wire::JSON };
        properties.content_type = Some(kind.to_owned());
        if let Some(identity) = &open.identity {
            properties.user_properties = Identity { oldest, ..identity.clone() }.to_properties();
        }
        (open.sent, open.at_broker) = (Some(Instant::now()), false);
        let (topic, payload) = (open.topic.clone(), open.payload.clone());
        client.publish_with_properties(topic, QoS::AtLeastOnce, false, payload, properties).await?;
        Ok(())
    }

    /// Makes the next message; its number.
    fn make(&mut self) -> anyhow::Result<u64> {
        let rows = u64::from(self.options.batch).min(self.readings - self.made);
        let seq = self.head;
        let open = match self.options.format {
            Format::Arrow => {
                let identity = Identity {
                    v: wire::VERSION,
                    epoch: self.epoch,
                    lane: Lane::Readings,
                    seq,
                    rows,
                    rows_before: self.made,
                    oldest: seq,
                    sealed_at: SystemClock.now(),
                    clock: ClockState::Synced,
                };
                let payload = wire::encode(&self.batch(rows)?, &identity)?;
                let payload = wire::with_sender(&payload, SITE, &self.name())?;
                let topic = self.topic(Stream::Lane(Lane::Readings));
                Open { topic, payload, identity: Some(identity), sent: None, at_broker: false }
            }
            Format::Json => {
                let payload = self.json(rows).to_string().into_bytes();
                Open {
                    topic: self.topic(Stream::Json),
                    payload,
                    identity: None,
                    sent: None,
                    at_broker: false,
                }
            }
        };
        self.open.insert(seq, open);
        self.head += 1;
        self.made += rows;
        Ok(seq)
    }

    /// Device and number of the gateway's reading `i`.
    fn place(&self, i: u64) -> (u64, u64) {
        let devices = u64::from(self.options.devices);
        (i % devices, self.options.first + i / devices)
    }

    fn ts(&self, n: u64) -> Timestamp {
        let micros = i128::from(n) * self.options.interval.as_micros() as i128;
        self.start.shifted(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    fn value(&self, m: u64, n: u64) -> f64 {
        let (.., low, high) = KINDS[m as usize % KINDS.len()];
        let number = self.options.seed.wrapping_add(self.index << 48).wrapping_add(m << 32).wrapping_add(n);
        let u = (splitmix64(number) >> 11) as f64 / (1u64 << 53) as f64;
        low + (high - low) * u
    }

    fn batch(&self, rows: u64) -> anyhow::Result<RecordBatch> {
        let places: Vec<(u64, u64)> = (self.made..self.made + rows).map(|i| self.place(i)).collect();
        let ts = places.iter().map(|(_, n)| self.ts(*n).as_micros()).collect::<Vec<_>>();
        let values = places.iter().map(|(m, n)| self.value(*m, *n)).collect::<Vec<_>>();
        // Every device of the gateway is in every dictionary: keys are the devices' numbers.
        let keys = Int32Array::from(places.iter().map(|(m, _)| *m as i32).collect::<Vec<_>>());
        let dict = |text: &dyn Fn(&Device) -> String| -> anyhow::Result<ArrayRef> {
            let words: StringArray = self.registry.devices.iter().map(|d| Some(text(d))).collect();
            Ok(Arc::new(DictionaryArray::<Int32Type>::try_new(keys.clone(), Arc::new(words))?))
        };
        let columns = vec![
            Arc::new(TimestampMicrosecondArray::from(ts).with_timezone("UTC")) as ArrayRef,
            dict(&|d| d.id.clone())?,
            dict(&|d| d.device_type.clone())?,
            dict(&|d| d.asset.clone())?,
            dict(&|d| d.unit.clone())?,
            dict(&|_| Kind::Gauge.to_string())?,
            Arc::new(Float64Array::from(values)),
            Arc::new(UInt8Array::from(vec![0; places.len()])),
        ];
        Ok(RecordBatch::try_new(wire::schema(Lane::Readings), columns)?)
    }

    fn json(&self, rows: u64) -> serde_json::Value {
        let mut readings = (self.made..self.made + rows).map(|i| {
            let (m, n) = self.place(i);
            let device = &self.registry.devices[m as usize];
            serde_json::json!({
                "device_id": device.id, "device_type": device.device_type, "asset_id": device.asset,
                "unit": device.unit, "timestamp": self.ts(n).to_string(), "value": self.value(m, n),
            })
        });
        if rows == 1 { readings.next().unwrap_or_default() } else { readings.collect() }
    }

    fn at_broker(&mut self, seq: u64) {
        self.progress = Instant::now();
        match self.open.get_mut(&seq) {
            Some(open) if open.identity.is_some() => open.at_broker = true,
            _ => drop(self.open.remove(&seq)),
        }
    }

    fn acknowledged(&mut self, payload: &[u8]) {
        let Ok(ack) = serde_json::from_slice::<Ack>(payload) else { return };
        for range in ack.ranges.iter().filter(|r| r.epoch == self.epoch && r.lane == Lane::Readings) {
            let named: Vec<u64> =
                self.open.range(range.from..=range.to.max(range.from)).map(|(seq, _)| *seq).collect();
            for seq in named {
                self.open.remove(&seq);
                self.progress = Instant::now();
            }
        }
    }

    /// Says that everything was sent, and leaves once the broker has heard it.
    async fn farewell(&self, client: &AsyncClient, events: &mut EventLoop) -> anyhow::Result<()> {
        client.publish(self.topic(Stream::Status), QoS::AtLeastOnce, true, self.status(false)?).await?;
        let heard = async {
            let mut last = None;
            loop {
                match events.poll().await? {
                    Event::Outgoing(rumqttc::Outgoing::Publish(id)) => last = Some(id),
                    Event::Incoming(Packet::PubAck(ack)) if last == Some(ack.pkid) => return anyhow::Ok(()),
                    _ => {}
                }
            }
        };
        timeout(Duration::from_secs(10), heard)
            .await
            .context("the broker did not take the last status")??;
        let _ = client.disconnect().await;
        let _ = timeout(Duration::from_secs(1), events.poll()).await;
        Ok(())
    }
}

/// Steele, Lea, Flood: Fast splittable pseudorandom number generators (OOPSLA 2014); here as a hash.
fn splitmix64(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_of_the_reference() {
        // First outputs of Vigna's splitmix64.c for the seed 1234567.
        let golden = 0x9e37_79b9_7f4a_7c15_u64;
        let got: Vec<u64> =
            (0..3).map(|i: u64| splitmix64(1_234_567u64.wrapping_add(golden.wrapping_mul(i)))).collect();
        assert_eq!(got, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn readings_go_round_the_devices_and_decode() {
        let options = Options {
            url: "mqtt://127.0.0.1:1".into(),
            root: wire::DEFAULT_ROOT.into(),
            gateways: 1,
            devices: 3,
            readings: 7,
            batch: 5,
            format: Format::Arrow,
            rate: None,
            seed: 1,
            start: None,
            interval: Duration::from_millis(100),
            first: 10,
            password: SecretRef::default(),
        };
        let told = truth(&options, "2026-03-01T06:00:00Z".parse().unwrap()).unwrap();
        let start = "2026-03-01T06:00:00Z".parse().unwrap();
        let mut gateway = Gateway::new(Arc::new(options), 0, 7, start).unwrap();
        for (seq, rows, before) in [(0, 5, 0), (1, 2, 5)] {
            assert_eq!(gateway.make().unwrap(), seq);
            let open = &gateway.open[&seq];
            let identity = open.identity.as_ref().unwrap();
            assert_eq!((identity.rows, identity.rows_before), (rows, before));
            let batch = wire::decode(Lane::Readings, &open.payload).unwrap();
            assert_eq!(batch.num_rows() as u64, rows);
        }
        assert_eq!(gateway.place(6), (0, 12));
        let of_device_0 = [10, 11, 12].map(|n| gateway.value(0, n)).iter().sum::<f64>();
        assert_eq!((told[0].count, told[0].sum), (3, of_device_0));
        let times = [told[0].first, told[0].last].map(|ts| ts.to_string());
        assert_eq!(times, ["2026-03-01T06:00:01Z", "2026-03-01T06:00:01.200Z"]);
        gateway.acknowledged(br#"{"v":1,"ranges":[]}"#);
        assert_eq!(gateway.open.len(), 2);
        let ranges =
            vec![common::documents::AckRange { epoch: gateway.epoch, lane: Lane::Readings, from: 0, to: 1 }];
        gateway.acknowledged(&serde_json::to_vec(&Ack { v: 1, ranges }).unwrap());
        assert!(gateway.done());
    }
}
