use std::time::Duration;

use arrow::{
    array::{Array, AsArray},
    datatypes::TimestampMicrosecondType,
};
use common::{
    reading::{Device, DeviceIx, Quality},
    wire::{ClockState, Identity},
};
use uuid::Uuid;

use super::*;
use crate::{
    census::Outcome,
    model::episode::{Ended, Place},
    window::Stats,
};

fn settings() -> OutboxSettings {
    OutboxSettings {
        dir: "/nowhere".into(),
        linger: Duration::from_secs(1),
        max_linger: Duration::from_secs(10),
        linger_rows: 4,
        max_rows: 10,
        max_message_bytes: 128 << 10,
        max_bytes: 1 << 30,
        max_age: Duration::from_secs(3_600),
        min_free_disk: 0,
        generation_bytes: 1 << 20,
        census_every: Duration::from_secs(60),
    }
}

fn registry() -> Registry {
    let device = |id: &str, device_type: &str| Device {
        id: id.into(),
        device_type: device_type.into(),
        asset: "p".into(),
        unit: "1".into(),
        ..Device::default()
    };
    Registry {
        assets: Vec::new(),
        devices: vec![device("p/a", "temperature"), device("p/b", "flow"), device("p/c", "flow")],
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_micros(second * 1_000_000)
}

fn readings(seconds: std::ops::Range<i64>) -> Processed {
    let reading = |second| {
        let (quality, value) = if second % 3 == 0 { (Quality::Bad, f64::NAN) } else { (Quality::Good, 0.5) };
        Reading { ts: at(second), device: DeviceIx(second as u32 % 2 + 1), quality, value }
    };
    let readings: Vec<_> = seconds.clone().map(reading).collect();
    let mut census = Census::default();
    readings.iter().for_each(|r| census.add(r.ts, Outcome::Polled, 1));
    Processed { readings, census, last_event: seconds.last().map(at), ..Processed::default() }
}

fn event(ended: Option<(Timestamp, Ended)>) -> Event {
    Event {
        id: Uuid::now_v7(),
        ended,
        place: Place { asset: "p".into(), device: "p/a".into() },
        model: "m".into(),
        model_sha256: "abc".into(),
        severity: "warning".into(),
        score: 1.5,
        threshold: 1.0,
        started_at: at(3),
    }
}

fn aggregate() -> Aggregate {
    Aggregate {
        start: at(0),
        end: at(60),
        device: DeviceIx(0),
        stats: Stats::default(),
        covered_from: at(0),
        covered_to: at(60),
        partial: false,
        revision: 0,
    }
}

fn rows(cuts: &[Cut]) -> Vec<Vec<(Lane, usize)>> {
    cuts.iter().map(|cut| cut.drafts.iter().map(|d| (d.lane, d.batch.num_rows())).collect()).collect()
}

#[test]
fn few_rows_wait_longer_than_many() {
    let start = Instant::now();
    let after = |ms| start + Duration::from_millis(ms);
    let mut sealer = Sealer::new(settings(), &registry());
    assert!(sealer.push(start, Processed::default()).is_empty());
    assert_eq!(sealer.next_deadline(), None);
    assert!(sealer.push(start, readings(0..3)).is_empty());
    assert_eq!(sealer.next_deadline(), Some(after(10_000)));
    assert!(sealer.push(after(500), readings(3..4)).is_empty());
    assert_eq!(sealer.next_deadline(), Some(after(1_000)));
    let cuts = sealer.push(after(1_000), readings(4..5));
    assert_eq!(rows(&cuts), [[(Lane::Readings, 5)]]);
    assert_eq!(sealer.next_deadline(), None);
    assert!(sealer.cut().is_none());
}

#[test]
fn a_full_message_is_cut_between_batches_and_each_cut_balances() {
    let now = Instant::now();
    let mut sealer = Sealer::new(settings(), &registry());
    let mut cuts = Vec::new();
    for n in 0..5 {
        cuts.extend(sealer.push(now, readings(n * 4..n * 4 + 4)));
    }
    cuts.extend(sealer.push(now, readings(20..45)));
    cuts.extend(sealer.cut());
    let readings = |n| (Lane::Readings, n);
    assert_eq!(
        rows(&cuts),
        [
            vec![readings(8)],
            vec![readings(8)],
            vec![readings(4)],
            vec![readings(10), readings(10), readings(5)]
        ]
    );
    let mut total = Census::default();
    for cut in &cuts {
        for draft in &cut.drafts {
            total.merge(&draft.census);
            let ts = draft.batch.column(0).as_primitive::<TimestampMicrosecondType>();
            ts.values().iter().for_each(|ts| total.add(Timestamp::from_micros(*ts), Outcome::Sealed, 1));
        }
        assert!(total.balances(), "{total:?}");
    }
    assert_eq!(total.total(Outcome::Sealed), 45);
    assert_eq!(cuts[0].drafts[0].last_event, at(7));
    assert_eq!(cuts[3].drafts[0].last_event, at(44));
}

#[test]
fn an_anomaly_is_cut_at_once_with_the_readings_before_it() {
    let mut sealer = Sealer::new(settings(), &registry());
    let now = Instant::now();
    let aggregates = Processed { aggregates: vec![aggregate()], ..readings(0..2) };
    assert!(sealer.push(now, aggregates).is_empty());
    let events = vec![event(None), event(Some((at(9), Ended::Cleared)))];
    let cuts = sealer.push(now, Processed { events, episodes: Some(b"x".to_vec()), ..readings(2..3) });
    assert_eq!(rows(&cuts), [[(Lane::Readings, 3), (Lane::Aggregates, 1), (Lane::Anomalies, 2)]]);
    assert_eq!(cuts[0].episodes.as_deref(), Some(&b"x"[..]));
}

#[test]
fn a_census_without_readings_is_carried_too() {
    let mut sealer = Sealer::new(settings(), &registry());
    let mut census = Census::default();
    census.add(at(0), Outcome::Polled, 2);
    census.add(at(0), Outcome::Held, 2);
    let held = Processed { census: census.clone(), last_event: Some(at(5)), ..Processed::default() };
    assert!(sealer.push(Instant::now(), held).is_empty());
    let cut = sealer.cut().unwrap();
    assert_eq!(rows(std::slice::from_ref(&cut)), [[(Lane::Readings, 0)]]);
    assert_eq!((&cut.drafts[0].census, cut.drafts[0].last_event), (&census, at(5)));
}

#[test]
fn batches_pass_the_wire() {
    let mut sealer = Sealer::new(settings(), &registry());
    let events = vec![event(None), event(Some((at(9), Ended::Stop)))];
    let cuts =
        sealer.push(Instant::now(), Processed { aggregates: vec![aggregate()], events, ..readings(0..4) });
    for draft in &cuts[0].drafts {
        let identity = Identity {
            v: wire::VERSION,
            epoch: Uuid::now_v7(),
            lane: draft.lane,
            seq: 0,
            rows: draft.batch.num_rows() as u64,
            rows_before: 0,
            oldest: 0,
            sealed_at: at(10),
            clock: ClockState::Synced,
        };
        let bytes = wire::encode(&draft.batch, &identity).unwrap();
        let decoded = wire::decode(draft.lane, &bytes).unwrap();
        assert_eq!(decoded.columns(), draft.batch.columns());
    }
    let readings = &cuts[0].drafts[0].batch;
    let ids = readings.column(1).as_dictionary::<Int32Type>();
    // Only what occurs is in the dictionary.
    assert_eq!(ids.values().as_string::<i32>().iter().flatten().collect::<Vec<_>>(), ["p/b", "p/c"]);
    assert_eq!(ids.keys().values(), &[0, 1, 0, 1]);
    assert_eq!(readings.column(6).null_count(), 2);
}

#[test]
fn an_estimated_message_never_exceeds_the_limit() {
    let settings = OutboxSettings { max_rows: 1 << 20, max_message_bytes: 64 << 10, ..settings() };
    let mut sealer = Sealer::new(settings, &registry());
    let mut batch = readings(0..100_000);
    // Values without any pattern, which zstd cannot shrink.
    let mut state = 1u64;
    for reading in &mut batch.readings {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        reading.value = f64::from_bits(state >> 2);
        reading.ts = Timestamp::from_micros((state >> 20) as i64);
    }
    for draft in &sealer.push(Instant::now(), batch)[0].drafts {
        let identity = Identity {
            v: wire::VERSION,
            epoch: Uuid::now_v7(),
            lane: Lane::Readings,
            seq: u64::from(u32::MAX),
            rows: draft.batch.num_rows() as u64,
            rows_before: 0,
            oldest: 0,
            sealed_at: at(10),
            clock: ClockState::Synced,
        };
        let bytes = wire::encode(&draft.batch, &identity).unwrap();
        assert!(bytes.len() <= 64 << 10, "{}", bytes.len());
    }
}
