//! The whole agent on a machine whose clocks are ours, a hundred times as fast as real ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst},
    time::Instant,
};

use arrow::{
    array::{AsArray as _, StringArray},
    datatypes::{Int32Type, Int64Type, TimestampMicrosecondType},
};
use common::wire::{self, ClockState, Lane};

use super::*;
use crate::{
    census::{Census, Outcome},
    outbox::Limits,
    source::LinuxHardware,
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

/// A bus that is not there: whatever is due makes a bad reading, and none is skipped on its account.
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
                    sent.in_windows += numbers("count").iter().chain(numbers("bad_count")).sum::<i64>();
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

/// Turns the hands as told, (seconds of ours, offset of the wall clock, synchronised) in a row, and returns what was
/// sent and how long the agent has run by the machine's time.
async fn agent(keeps_time: bool, began_at: (i64, bool), turns: &[(f64, i64, bool)]) -> (Sent, Duration) {
    let home = tempfile::tempdir().unwrap();
    let settings = settings(home.path());
    let hands = Arc::new(Hands {
        since: Instant::now(),
        offset: AtomicI64::new(began_at.0),
        synced: AtomicBool::new(began_at.1),
    });
    let shown = Arc::clone(&hands);
    let show = move || {
        let up = shown.up();
        let wall = up.shifted(shown.offset.load(SeqCst));
        Shown { up, wall, synced: shown.synced.load(SeqCst) }
    };
    let machine = Machine { boot: Uuid::from_u128(7), keeps_time, show: Arc::new(show) };
    let (stop, stopped) = watch::channel(false);
    let began = hands.up();
    let running = tokio::spawn(run(settings.clone(), LinuxHardware, machine, stopped));
    for (seconds, offset, synced) in turns {
        hands.turn(*offset, *synced);
        tokio::time::sleep(Duration::from_secs_f64(*seconds)).await;
    }
    let ran = hands.up().since(began);
    stop.send_replace(true);
    running.await.unwrap().unwrap();
    let now = hands.up().shifted(turns.last().unwrap().1);
    (sent(&settings, now), ran)
}

fn check(sent: &Sent, ran: Duration, epochs: usize) {
    assert_eq!(sent.events.len(), epochs);
    let mut keys = BTreeSet::new();
    let mut readings = 0;
    for (epoch, devices) in &sent.events {
        for (device, times) in devices {
            assert!(times.is_sorted_by(|a, b| a < b), "{device} in {epoch}: {times:?}");
            assert!(times.iter().all(|ts| !Timestamp::from_micros(*ts).is_provisional()), "{times:?}");
            assert!(times.iter().all(|ts| keys.insert((device.clone(), *ts))), "a key came twice: {times:?}");
            readings += times.len() as i64;
        }
    }
    assert_eq!(sent.in_windows, readings, "every reading is in one window");
    let total = |outcome| sent.census.total(outcome);
    assert_eq!(total(Outcome::Sealed), readings.unsigned_abs());
    assert_eq!(total(Outcome::Polled), total(Outcome::Sealed) + total(Outcome::Skipped));
    // Every tick of the machine's time is there or counted; the beat begins anew with each epoch.
    let ticks = i64::try_from(ran.as_secs() / 20).unwrap();
    let counted = i64::try_from(total(Outcome::Polled) / 2).unwrap();
    // The agent takes some of our time to start and to stop, which is ten ticks in 2 s.
    assert!((ticks - 10..=ticks + 10).contains(&counted), "{counted} ticks of {ticks}");
    // Between an epoch and the next nothing is lost either: the first may lack a beat.
    assert!(ran.as_secs() > 300);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_set_after_a_while_gives_every_reading_its_time() {
    let (sent, ran) = agent(false, (5_000_000, false), &[(2.5, 5_000_000, false), (3.5, NOW, true)]).await;
    check(&sent, ran, 2);
    let first = sent.events[0].1["p/t"][0];
    assert!((NOW + 900_000_000..NOW + 1_300_000_000).contains(&first), "{first}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_day_back_and_forth_loses_nothing_and_doubles_nothing() {
    let turns = [
        (2.0, NOW, true),
        (0.4, NOW + DAY, true),
        (2.0, NOW, true),
        (4.5, NOW - DAY, true),
        (4.5, NOW, true),
    ];
    let (sent, ran) = agent(true, (NOW, true), &turns).await;
    // The jump of 40 s was taken back in time.
    check(&sent, ran, 3);
    let day_of = |epoch: usize| (sent.events[epoch].1["p/t"][0] - NOW).div_euclid(DAY);
    assert_eq!([day_of(0), day_of(1), day_of(2)], [0, -1, 0]);
}
