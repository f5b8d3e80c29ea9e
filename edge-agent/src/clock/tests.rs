//! The whole agent on a machine whose clocks are ours, a hundred times as fast as real ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst},
    time::Instant,
};

use arrow::{
    array::{AsArray as _, StringArray},
    datatypes::{Int32Type, Int64Type, TimestampMicrosecondType},
};
use common::wire::{self, ClockState, Lane};
use proptest::prelude::*;
use tokio::task::JoinHandle;

use super::*;
use crate::{
    census::{Census, Outcome},
    outbox::Limits,
    source::{LinuxHardware, Start, schedule::Schedule},
};

/// 2026-11-21T00:00:00Z.
const NOW: i64 = 1_795_219_200_000_000;
const DAY: i64 = 86_400_000_000;
/// Seconds of the machine in a second.
const SPEED: i64 = 100;

/// A machine that was started a quarter of an hour ago.
struct Hands {
    since: Instant,
    offset: AtomicI64,
    synced: AtomicBool,
}

impl Hands {
    fn up(&self) -> Timestamp {
        Timestamp::from_micros(900_000_000 + SPEED * self.since.elapsed().as_micros() as i64)
    }

    fn turn(&self, offset: i64, synced: bool) {
        self.offset.store(offset, SeqCst);
        self.synced.store(synced, SeqCst);
    }
}

/// Buses that are not there: whatever is due makes a bad reading. Counts how often one was asked for.
#[derive(Clone, Default)]
struct Missing(Arc<AtomicU64>);

impl Hardware for Missing {
    type I2c = <LinuxHardware as Hardware>::I2c;
    type Spi = <LinuxHardware as Hardware>::Spi;
    type Delay = <LinuxHardware as Hardware>::Delay;

    fn i2c(&self, path: &str) -> anyhow::Result<Self::I2c> {
        self.0.fetch_add(1, SeqCst);
        anyhow::bail!("there is no {path}")
    }

    fn spi(&self, path: &str) -> anyhow::Result<Self::Spi> {
        anyhow::bail!("there is no {path}")
    }

    fn delay(&self) -> Self::Delay {
        LinuxHardware.delay()
    }
}

fn settings(home: &Path) -> Settings {
    let config = format!(
        r#"
        site = "plant"
        gateway = "gw-1"
        data_dir = "{home}/data"
        [[asset]]
        id = "p"
        [[device]]
        id = "p/t"
        type = "temperature"
        asset = "p"
        unit = "Cel"
        [[device]]
        id = "p/h"
        type = "humidity"
        asset = "p"
        unit = "%"
        [[i2c]]
        path = "{home}/i2c"
        [[i2c.sht4x]]
        address = 0x44
        period = "20s"
        temperature = "p/t"
        humidity = "p/h"
        [mqtt]
        url = "mqtt://127.0.0.1:9"
        [uplink]
        drain = "0s"
        [metrics]
        listen = ""
        "#,
        home = home.display()
    );
    let path = home.join("edge-agent.toml");
    std::fs::write(&path, config).unwrap();
    Settings::load(Some(&path)).unwrap()
}

/// What the outbox may send.
#[derive(Default)]
struct Sent {
    /// Event times by epoch, in the order of the epochs, and device.
    events: Vec<(Uuid, BTreeMap<String, Vec<i64>>)>,
    /// Readings in aggregates.
    in_windows: i64,
    census: Census,
}

fn sent(settings: &Settings, now: Timestamp) -> Sent {
    let limits = Limits { min_free_disk: 0, ..Limits::from(&settings.outbox) };
    let outbox = Outbox::open(&settings.outbox.dir, limits, now).unwrap();
    let mut sent = Sent::default();
    for lane in Lane::ALL {
        for message in outbox.page(lane, 0, 10_000, usize::MAX, now).unwrap() {
            assert_eq!(message.identity.clock, ClockState::Synced);
            let batch = wire::decode(lane, &message.payload).unwrap();
            let words = |name: &str| {
                let column = batch.column_by_name(name).unwrap().as_dictionary::<Int32Type>();
                let words = column.downcast_dict::<StringArray>().unwrap();
                words.into_iter().map(|word| word.unwrap_or_default().to_owned()).collect::<Vec<_>>()
            };
            let numbers =
                |name: &str| batch.column_by_name(name).unwrap().as_primitive::<Int64Type>().values();
            let instants =
                |name: &str| batch.column_by_name(name).unwrap().as_primitive::<TimestampMicrosecondType>();
            match lane {
                Lane::Readings => {
                    if sent.events.last().is_none_or(|(epoch, _)| *epoch != message.identity.epoch) {
                        sent.events.push((message.identity.epoch, BTreeMap::new()));
                    }
                    let devices = &mut sent.events.last_mut().unwrap().1;
                    for (device, ts) in words("device_id").into_iter().zip(instants("ts").values()) {
                        devices.entry(device).or_default().push(*ts);
                    }
                }
                Lane::Aggregates => {
                    sent.in_windows +=
                        numbers("count").iter().chain(numbers("bad_count").iter()).sum::<i64>();
                    assert!(numbers("count").len() == batch.num_rows());
                }
                Lane::Control => {
                    let reasons = batch.column_by_name("reason").unwrap().as_string::<i32>();
                    for (row, record) in words("record").iter().enumerate() {
                        if record == "census" {
                            let hour = Timestamp::from_micros(instants("from").value(row));
                            let n = numbers("readings")[row].unsigned_abs();
                            sent.census.add(hour, reasons.value(row).parse().unwrap(), n);
                        }
                    }
                }
                Lane::Anomalies => {}
            }
        }
    }
    sent
}

/// The running agent and the hands of its machine's clocks.
struct Agent {
    home: tempfile::TempDir,
    settings: Settings,
    hands: Arc<Hands>,
    bus: Missing,
    stop: watch::Sender<bool>,
    running: JoinHandle<anyhow::Result<()>>,
}

impl Agent {
    fn start(keeps_time: bool, offset: i64, synced: bool) -> Self {
        let home = tempfile::tempdir().unwrap();
        let settings = settings(home.path());
        let hands = Arc::new(Hands {
            since: Instant::now(),
            offset: AtomicI64::new(offset),
            synced: AtomicBool::new(synced),
        });
        let shown = Arc::clone(&hands);
        let show = move || {
            let up = shown.up();
            let wall = up.shifted(shown.offset.load(SeqCst));
            Shown { up, wall, synced: shown.synced.load(SeqCst) }
        };
        let nap = Duration::from_millis(5);
        let machine = Machine { boot: Uuid::from_u128(7), keeps_time, nap, show: Arc::new(show) };
        let (stop, stopped) = watch::channel(false);
        let bus = Missing::default();
        let running = tokio::spawn(run(settings.clone(), bus.clone(), machine, stopped));
        Self { home, settings, hands, bus, stop, running }
    }

    async fn until(&self, done: impl Fn() -> bool) {
        let patience = Instant::now();
        while !done() {
            assert!(patience.elapsed() < Duration::from_secs(60) && !self.running.is_finished());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Some polls by whatever time it is.
    async fn polls(&self) {
        let before = self.bus.0.load(SeqCst);
        self.until(|| self.bus.0.load(SeqCst) > before + 4).await;
    }

    /// The wall clock is turned, the agent begins anew with it, and polls.
    async fn follows(&self, offset: i64) {
        self.hands.turn(offset, true);
        let dir = self.home.path().join("data/outbox");
        let near = |known: i64| (known - offset).abs() < 1_000_000;
        self.until(|| Boots::load(&dir).unwrap().offset.is_some_and(near)).await;
        self.polls().await;
    }

    async fn end(self) -> Sent {
        self.stop.send_replace(true);
        self.running.await.unwrap().unwrap();
        sent(&self.settings, self.hands.up().shifted(self.hands.offset.load(SeqCst)))
    }
}

/// One epoch after the other, each with its offset.
fn check(sent: &Sent, offsets: &[i64]) {
    assert_eq!(sent.events.len(), offsets.len());
    let mut keys = BTreeSet::new();
    let (mut readings, mut ups) = (0, Vec::new());
    for ((epoch, devices), offset) in sent.events.iter().zip(offsets) {
        for (device, times) in devices {
            assert!(times.is_sorted_by(|a, b| a < b), "{device} in {epoch}: {times:?}");
            assert!(times.iter().all(|ts| keys.insert((device.clone(), *ts))), "a key came twice: {times:?}");
            readings += times.len() as i64;
            ups.extend(times.iter().map(|ts| ts - offset));
        }
    }
    assert_eq!(sent.in_windows, readings, "every reading is in one window");
    let total = |outcome| i64::try_from(sent.census.total(outcome)).unwrap();
    assert_eq!(total(Outcome::Sealed), readings);
    assert_eq!(total(Outcome::Polled), readings + total(Outcome::Skipped));
    // Every tick from the first to the last, by the machine's own time, is there or counted; the beat begins anew
    // with each epoch.
    let (first, last) = (ups.iter().min().unwrap(), ups.iter().max().unwrap());
    let (ticks, counted) = ((last - first) / 20_000_000 + 1, total(Outcome::Polled) / 2);
    let breaks = offsets.len() as i64 - 1;
    assert!(
        (ticks - breaks..=ticks + breaks).contains(&counted),
        "{counted} of {ticks} ticks are accounted for"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_set_after_a_while_gives_every_reading_its_time() {
    let agent = Agent::start(false, 5_000_000, false);
    agent.polls().await;
    agent.follows(NOW).await;
    let sent = agent.end().await;
    check(&sent, &[NOW, NOW]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_day_forth_and_back_loses_nothing_and_doubles_nothing() {
    let agent = Agent::start(true, NOW, true);
    agent.polls().await;
    // By hand, and taken back before ten minutes are over.
    agent.hands.turn(NOW + DAY, false);
    agent.polls().await;
    agent.hands.turn(NOW, true);
    agent.polls().await;
    for offset in [NOW + DAY, NOW - DAY, NOW] {
        agent.follows(offset).await;
    }
    check(&agent.end().await, &[NOW, NOW + DAY, NOW - DAY, NOW]);
}

/// A probe with a period of 10 s, over all the timelines of one start of a machine.
#[derive(Default)]
struct Probe {
    /// (displaced, schedule, last tick) of the present epoch.
    epoch: Option<(Duration, Schedule, Option<Timestamp>)>,
    /// Latest true event time.
    sealed: Option<Timestamp>,
    /// True event times, and how they were displaced.
    keys: BTreeMap<Timestamp, Duration>,
    polled: u64,
    skipped: u64,
}

const PERIOD: Duration = Duration::from_secs(10);

impl Probe {
    fn begin(&mut self, began: Timestamp) {
        let start = Start::of(began, self.sealed);
        self.epoch = Some((start.displaced, Schedule::new([PERIOD], start), None));
    }

    fn until(&mut self, now: Timestamp) {
        let (displaced, schedule, last) = self.epoch.as_mut().unwrap();
        while let Some(tick) = schedule.next().filter(|tick| *tick <= now) {
            for (_, _, ticks) in schedule.skip_missed(now) {
                self.skipped += ticks;
            }
            let tick = schedule.next().unwrap().max(tick);
            schedule.take_due(tick);
            assert!(tick <= now && last.is_none_or(|last| last < tick), "{tick} after {last:?} at {now}");
            *last = Some(tick);
            self.polled += 1;
            if !tick.is_provisional() {
                self.sealed = self.sealed.max(Some(tick));
                // Two runs in a thousand are displaced alike.
                let other = self.keys.insert(tick, *displaced);
                assert!(
                    other.is_none_or(|other| other == *displaced && !other.is_zero()),
                    "{tick} came twice"
                );
            }
        }
    }
}

proptest! {
    /// Whatever is done to the wall clock: in an epoch event times ascend, no key comes twice, and every tick of the
    /// machine's time is polled or counted, but for the minute that a run waits at most until what it would repeat
    /// is over.
    #[test]
    fn no_jump_loses_a_tick_or_repeats_one(
        keeps_time in any::<bool>(),
        phases in proptest::collection::vec(
            (1i64..2_000, prop_oneof![Just(0), Just(DAY), Just(-DAY), Just(-NOW), -100_000_000i64..100_000_000],
             any::<bool>()),
            1..10,
        ),
    ) {
        let known = Known { keeps_time, ..Known::default() };
        let mut up = Timestamp::from_micros(40_123_456);
        let mut shown = Shown { up, wall: up.shifted(NOW), synced: false };
        let (mut timeline, mut probe, mut epochs) = (Timeline::begin(&shown, known), Probe::default(), 1);
        probe.begin(timeline.at(up));
        let begun = up;
        for (seconds, by, synced) in phases {
            for _ in 0..seconds {
                up = up.shifted(1_000_000);
                shown = Shown { up, wall: up.shifted(NOW + by), synced };
                if timeline.observe(&shown).is_some() {
                    probe.until(timeline.at(up));
                    // What it takes to begin anew.
                    let ended = up;
                    up = up.shifted(1_700_000);
                    shown = Shown { up, wall: up.shifted(NOW + by), synced };
                    timeline = Timeline::begin(&shown, known);
                    probe.begin(timeline.at(ended));
                    epochs += 1;
                }
                probe.until(timeline.at(up));
            }
        }
        let ticks = up.since(begun).as_micros() as i64 / PERIOD.as_micros() as i64;
        let counted = (probe.polled + probe.skipped) as i64;
        // Within a hundredth that time is moved by, and a beat for each epoch.
        let slack = ticks / 100 + 1 + epochs;
        prop_assert!((ticks - slack - 6 * epochs..=ticks + slack).contains(&counted), "{} of {}", counted, ticks);
    }
}
