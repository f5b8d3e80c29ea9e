//! The stages alone, each on one thread: `cargo bench -p edge-agent`. Figures are in BENCHMARKS.md.
//!
//! Items are readings (of the model windows, of the vibration samples). Where a stage has a bare limit, the benchmark named
//! `limit_…` beside it does nothing but what cannot be left out.

#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

use std::{
    fmt::Write as _,
    fs::File,
    hint::black_box,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use arrow::array::{ArrayRef, Float64Array, RecordBatch, TimestampMicrosecondArray};
use common::{
    reading::{Device, DeviceIx, Quality, Reading, Registry},
    time::Timestamp,
    wire::{self, ClockState, Identity, Lane},
};
use divan::{Bencher, counter::ItemsCount};
use edge_agent::{
    census::Census,
    filter::Filter,
    model::{bundle::Bundle, calibrate::Calibration, infer::Window},
    seal::{Draft, Processed, Sealer},
    settings::{Checks, Deadband, OutboxSettings, ReplayForm, WindowSettings},
    source::{chip::ism330dhcx::Burst, replay},
    vibration::{self, Feature},
    window::{Missed, Windows},
};
use parquet::arrow::ArrowWriter;
use uuid::Uuid;

fn main() {
    divan::main();
}

/// Machines of four inputs, at 10 Hz.
const DEVICES: usize = 200;
/// Ten seconds.
const ROWS: usize = 100;
const READINGS: usize = DEVICES * ROWS;
/// Rows of a message.
const MESSAGE: usize = 2_000;
const PERIOD: Duration = Duration::from_millis(100);

fn begin() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

/// Four to five digits, as a 12-bit converter shows them.
fn value(row: usize, device: usize) -> f64 {
    let noise = (row * 7_919 + device * 104_729) % 41;
    (2_000 + 10 * device + noise) as f64 / 100.0
}

/// Row by row.
fn table() -> Vec<(Timestamp, Vec<Reading>)> {
    let row = |row: usize| {
        let ts = begin() + PERIOD * row as u32;
        let reading = |device: usize| Reading {
            ts,
            device: DeviceIx(device as u32),
            quality: Quality::Good,
            value: value(row, device),
        };
        (ts, (0..DEVICES).map(reading).collect())
    };
    (0..ROWS).map(row).collect()
}

fn registry() -> Registry {
    let device = |n: usize| Device {
        id: format!("m{:02}/{}", n / 4, ["vibration-1", "vibration-2", "pressure", "flow"][n % 4]),
        device_type: ["vibration", "vibration", "pressure", "flow"][n % 4].into(),
        asset: format!("m{:02}", n / 4),
        unit: ["[g]", "[g]", "bar", "L/min"][n % 4].into(),
        ..Device::default()
    };
    Registry { devices: (0..DEVICES).map(device).collect(), ..Registry::default() }
}

fn form() -> ReplayForm {
    let columns = registry().devices.into_iter().zip(0..).map(|(device, ix)| (device.id, DeviceIx(ix)));
    ReplayForm::Wide { separator: ',', time: "time".into(), columns: columns.collect() }
}

fn csv() -> String {
    let mut text = "time".to_owned();
    registry().devices.iter().for_each(|device| write!(text, ",{}", device.id).unwrap());
    for (ts, readings) in table() {
        write!(text, "\n{ts}").unwrap();
        readings.iter().for_each(|reading| write!(text, ",{}", reading.value).unwrap());
    }
    text
}

fn replayed(bencher: Bencher<'_, '_>, path: &Path) {
    let (form, registry) = (form(), registry());
    bencher.counter(ItemsCount::new(READINGS)).bench_local(|| {
        let rows = replay::rows(path, &form, &registry).unwrap();
        let readings: usize = rows.map(|row| row.unwrap().polled.readings.len()).sum();
        assert_eq!(readings, READINGS);
    });
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows");
    (folder, path)
}

#[divan::bench]
fn replay_csv(bencher: Bencher<'_, '_>) {
    let (_folder, path) = folder();
    std::fs::write(&path, csv()).unwrap();
    replayed(bencher, &path);
}

#[divan::bench]
fn replay_parquet(bencher: Bencher<'_, '_>) {
    let (_folder, path) = folder();
    let path = path.with_extension("parquet");
    let table = table();
    let times: TimestampMicrosecondArray = table.iter().map(|(ts, _)| Some(ts.as_micros())).collect();
    let times: ArrayRef = Arc::new(times.with_timezone("UTC"));
    let column = |device: usize| -> ArrayRef {
        Arc::new(table.iter().map(|(_, readings)| Some(readings[device].value)).collect::<Float64Array>())
    };
    let columns = registry().devices.into_iter().zip(0..).map(|(device, n)| (device.id, column(n)));
    let all = std::iter::once(("time".to_owned(), times)).chain(columns);
    let batch = RecordBatch::try_from_iter(all).unwrap();
    let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    replayed(bencher, &path);
}

/// Splitting the text and parsing its numbers, and nothing else.
#[divan::bench]
fn limit_replay_csv(bencher: Bencher<'_, '_>) {
    let text = csv();
    bencher.counter(ItemsCount::new(READINGS)).bench_local(|| {
        let cells = text.lines().skip(1).flat_map(|line| line.split(',').skip(1));
        cells.map(|cell| cell.parse::<f64>().unwrap()).sum::<f64>()
    });
}

#[divan::bench]
fn filter(bencher: Bencher<'_, '_>) {
    let checks = Checks {
        range: Some([0.0, 100.0]),
        stuck_after: Some(Duration::from_secs(600)),
        rate_limit: Some(50.0),
        spike_limit: None,
        deadband: Some(Deadband { width: 0.01, heartbeat: Duration::from_secs(60) }),
    };
    bencher
        .counter(ItemsCount::new(READINGS))
        .with_inputs(|| (Filter::new(vec![checks; DEVICES]), table()))
        .bench_local_refs(|(filter, table)| {
            for (_, readings) in table {
                black_box(filter.mark(readings));
                black_box(filter.hold(readings));
            }
        });
}

#[divan::bench]
fn windows(bencher: Bencher<'_, '_>) {
    let settings = WindowSettings {
        width: Duration::from_secs(5),
        lateness: Duration::ZERO,
        revise_for: Duration::from_secs(900),
    };
    let table = table();
    bencher.counter(ItemsCount::new(READINGS)).bench_local(|| {
        let mut windows = Windows::new(settings, &[settings.width; DEVICES]);
        for (at, readings) in &table {
            black_box(windows.push(*at, readings, &mut Missed::default()));
        }
        windows.flush()
    });
}

/// A window of each of so many machines, in one call: four inputs, a state of five.
#[divan::bench(args = [1, 25])]
fn inference(bencher: Bencher<'_, '_>, machines: usize) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/level-shift");
    let network = Bundle::load(&folder).unwrap().network.of_machines(machines);
    let calibration = Calibration {
        location: vec![0.2, 0.3, 3.8, 124.0],
        scale: vec![0.01, 0.01, 0.05, 0.6],
        drift: vec![0.01, 0.01, 0.05, 0.6],
        threshold: 3.0,
    };
    let mut states = vec![network.first_state(); machines];
    bencher.counter(ItemsCount::new(machines)).bench_local(|| {
        let of =
            |state| Window { features: &[0.201, 0.302, 3.81, 124.3], calibration: Some(&calibration), state };
        let windows: Vec<_> = states.iter().map(|state| of(state)).collect();
        let scored = network.score_all(&windows);
        states = scored.into_iter().map(|scored| scored.unwrap().state).collect();
    });
}

fn sealer() -> Sealer {
    let settings = OutboxSettings {
        dir: PathBuf::new(),
        linger: Duration::from_secs(1),
        max_linger: Duration::from_secs(10),
        linger_rows: 200,
        max_rows: MESSAGE,
        max_message_bytes: wire::MAX_MESSAGE,
        max_bytes: 0,
        max_age: Duration::ZERO,
        min_free_disk: 0,
        generation_bytes: 0,
        census_every: Duration::ZERO,
    };
    Sealer::new(settings, &registry())
}

fn drafts(sealer: &mut Sealer, table: Vec<(Timestamp, Vec<Reading>)>) -> Vec<Draft> {
    let now = Instant::now();
    let processed = |(_, readings)| Processed { readings, census: Census::default(), ..Processed::default() };
    let cuts = table.into_iter().map(processed).flat_map(|batch| sealer.push(now, batch));
    cuts.flat_map(|cut| cut.drafts).collect()
}

/// Ten messages, as columns.
#[divan::bench]
fn seal(bencher: Bencher<'_, '_>) {
    let mut sealer = sealer();
    bencher
        .counter(ItemsCount::new(READINGS))
        .with_inputs(table)
        .bench_local_values(|table| drafts(&mut sealer, table));
}

/// The same, as bytes: Arrow IPC with zstd.
#[divan::bench]
fn encode(bencher: Bencher<'_, '_>) {
    let drafts = drafts(&mut sealer(), table());
    assert_eq!(drafts.iter().map(|draft| draft.batch.num_rows()).sum::<usize>(), READINGS);
    let identity = Identity {
        v: wire::VERSION,
        epoch: Uuid::nil(),
        lane: Lane::Readings,
        seq: 0,
        rows: MESSAGE as u64,
        rows_before: 0,
        oldest: 0,
        sealed_at: begin(),
        clock: ClockState::Synced,
    };
    bencher.counter(ItemsCount::new(READINGS)).bench_local(|| {
        drafts.iter().map(|draft| wire::encode(&draft.batch, &identity).unwrap().len()).sum::<usize>()
    });
}

/// A burst of 8,192 samples at 6,667 Hz with all features.
#[divan::bench]
fn vibration_burst(bencher: Bencher<'_, '_>) {
    let samples: Vec<f64> =
        (0..8_192).map(|n| (n as f64 * 0.15).sin() + (n as f64 * 1.7).sin() / 4.0).collect();
    let burst = Burst { rate_hz: 6_667.0, samples, clipped: false };
    let features = [
        Feature::Rms,
        Feature::Peak,
        Feature::CrestFactor,
        Feature::Kurtosis,
        Feature::Velocity { low_hz: 10.0 },
        Feature::Band { low_hz: 500.0, high_hz: 2_000.0 },
    ];
    bencher
        .counter(ItemsCount::new(burst.samples.len()))
        .bench_local(|| vibration::measure(&burst, features.iter().copied()));
}
