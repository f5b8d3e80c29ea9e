//! Figures, not run by default; recipes and results stand in BENCHMARKS.md. What is measured for itself alone runs
//! in a process of its own: this test binary again.

use std::{fs, time::Instant};

use common::reading::{Device, DeviceIx, Quality, Reading, Registry};

use super::{child::again, *};
use crate::{
    seal::{Processed, Sealer},
    settings::{self, OutboxSettings},
};

const GIGABYTE: u64 = 1_000_000_000;

/// As default.toml has it.
fn shipped(dir: &Path) -> OutboxSettings {
    let text = format!("site = \"s\"\ngateway = \"g\"\ndata_dir = {dir:?}\n");
    settings::tests::load(&text, &[]).unwrap().outbox
}

fn ample() -> Limits {
    let max_age = Duration::from_secs(100 * 365 * 86_400);
    let generation_bytes = shipped(TempDir::new().unwrap().path()).generation_bytes;
    Limits { max_bytes: 4 * GIGABYTE, generation_bytes, max_age, ..limits() }
}

/// kB of `/proc/self/status`.
fn status_kb(key: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Bytes that this process has caused to be written to disks.
fn written() -> u64 {
    let io = fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).unwrap().parse().unwrap()
}

fn disk_usage(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    entries.map(|p| if p.is_dir() { disk_usage(&p) } else { p.metadata().unwrap().blocks() * 512 }).sum()
}

#[test]
#[ignore = "fills a gigabyte"]
fn a_full_outbox_of_a_gigabyte() {
    let dir = TempDir::new_in(std::env::var("TAILRACE_SCALE_DIR").unwrap_or_else(|_| "/tmp".into())).unwrap();
    let (full, empty) = (dir.path().join("full"), dir.path().join("empty"));
    let outbox = Outbox::open(&full, ample(), at(0)).unwrap();
    let mut n = 0;
    let cut: Vec<Draft> = (0..64).map(|i| draft(Lane::Readings, i * 2000, 2000)).collect();
    let begun = Instant::now();
    while outbox.lanes().iter().map(|lane| lane.bytes).sum::<u64>() < GIGABYTE {
        outbox.append(at(n * 2000), cut.clone(), &[]).unwrap();
        n += 64;
    }
    outbox.close(at(n * 2000)).unwrap();
    drop(outbox);
    eprintln!(
        "filled: {n} messages, {} MB on disk, {:.0} s",
        disk_usage(&full) / 1_000_000,
        begun.elapsed().as_secs_f64()
    );
    drop(Outbox::open(&empty, ample(), at(0)).unwrap());
    let figures = |dir: &Path| -> serde_json::Value {
        let output = again("outbox::tests::scale::opens_and_drains", dir).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
        let line = text.lines().find_map(|line| line.find('{').map(|at| &line[at..])).unwrap();
        serde_json::from_str(line).unwrap()
    };
    let (of_empty, of_full) = (figures(&empty), figures(&full));
    eprintln!("empty: {of_empty}\nfull:  {of_full}");
    let number = |of: &serde_json::Value, key: &str| of[key].as_f64().unwrap();
    assert_eq!(number(&of_full, "readings"), (n * 2000) as f64);
    assert!(number(&of_full, "open_ms") < 2000.0);
    let more_kb = number(&of_full, "rss_open_kb") - number(&of_empty, "rss_open_kb");
    assert!(more_kb < 8192.0, "{more_kb} kB more than with an empty one");
    assert!(number(&of_full, "left_mb") < 8.0);
}

#[test]
#[ignore = "is started by a_full_outbox_of_a_gigabyte"]
fn opens_and_drains() {
    let Some(dir) = super::child::dir() else { return };
    let rss_before = status_kb("VmRSS");
    let begun = Instant::now();
    let outbox = Outbox::open(&dir, ample(), at(1 << 28)).unwrap();
    let open_ms = begun.elapsed().as_secs_f64() * 1e3;
    let (rss_open, peak_open) = (status_kb("VmRSS"), status_kb("VmHWM"));
    let begun = Instant::now();
    let mut readings = 0;
    for lane in Lane::ALL {
        let mut from = 0;
        loop {
            let page = outbox.page(lane, from, 64, 512 * 1024, at(0)).unwrap();
            let (Some(first), Some(last)) = (page.first(), page.last()) else { break };
            from = last.index + 1;
            if lane == Lane::Readings {
                readings += page.iter().map(|m| m.identity.rows).sum::<u64>();
            }
            outbox.forget(lane, first.index..from).unwrap();
        }
    }
    let drain_s = begun.elapsed().as_secs_f64();
    outbox.upkeep(at((1 << 28) + 3600)).unwrap();
    let figures = serde_json::json!({
        "open_ms": open_ms.round(), "rss_before_kb": rss_before, "rss_open_kb": rss_open, "peak_open_kb": peak_open,
        "peak_drain_kb": status_kb("VmHWM"), "readings": readings, "drain_s": drain_s,
        "left_mb": disk_usage(&dir) as f64 / 1e6,
    });
    println!("{figures}");
}

/// 200 devices at 10 Hz for 20 minutes, acknowledged a few seconds later; the disk is told by its own counter too
/// where `TAILRACE_SCALE_STAT` names one (`/sys/block/loop0/stat`).
#[test]
#[ignore = "writes for a minute"]
fn flash_wear() {
    const SECONDS: i64 = 1200;
    let dir = TempDir::new_in(std::env::var("TAILRACE_SCALE_DIR").unwrap_or_else(|_| "/tmp".into())).unwrap();
    let sectors = || {
        let stat = fs::read_to_string(std::env::var("TAILRACE_SCALE_STAT").ok()?).unwrap();
        Some(512 * stat.split_whitespace().nth(6).unwrap().parse::<u64>().unwrap())
    };
    let device = |i: u32| Device {
        id: format!("pump-{:02}/sensor-{i:03}", i / 10),
        device_type: "temperature".into(),
        asset: format!("pump-{:02}", i / 10),
        unit: "Cel".into(),
        ..Device::default()
    };
    let registry = Registry { assets: Vec::new(), devices: (0..200).map(device).collect() };
    let settings = shipped(dir.path());
    let mut sealer = Sealer::new(settings.clone(), &registry);
    let outbox = Outbox::open(&settings.dir, Limits::from(&settings), at(0)).unwrap();
    let (before, sectors_before) = (written(), sectors());
    let mut noise = 1u64;
    let mut sealed = 0;
    let mut index = 0;
    for second in 0..SECONDS {
        let mut readings = Vec::with_capacity(2000);
        let mut census = Census::default();
        for tenth in 0..10 {
            let ts = at(second) + Duration::from_millis(100 * tenth);
            for device in 0..200u32 {
                noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let value = 20.0 + f64::from(device) + (noise >> 56) as f64 / 100.0;
                readings.push(Reading { ts, device: DeviceIx(device), quality: Quality::Good, value });
            }
        }
        census.add(at(second), Outcome::Polled, 2000);
        let batch = Processed { readings, census, last_event: Some(at(second)), ..Processed::default() };
        let mut cuts = sealer.push(Instant::now(), batch);
        cuts.extend(sealer.cut());
        for cut in cuts {
            outbox.append(at(second), cut.drafts, &[]).unwrap();
        }
        let page = outbox.page(Lane::Readings, index, 64, 1 << 20, at(second)).unwrap();
        sealed += page.iter().map(|m| m.payload.len() as u64).sum::<u64>();
        index += page.len() as u64;
        outbox.forget(Lane::Readings, 0..index.saturating_sub(3)).unwrap();
        if second % 60 == 59 {
            outbox.upkeep(at(second)).unwrap();
        }
    }
    drop(outbox);
    let per_day = |bytes: u64| bytes as f64 / SECONDS as f64 * 86_400.0 / 1e9;
    let line = |what: &str, bytes: u64| {
        eprintln!(
            "{what}: {:.1} MB, {:.2} times what was sealed, {:.2} GB a day",
            bytes as f64 / 1e6,
            bytes as f64 / sealed as f64,
            per_day(bytes)
        );
    };
    line("sealed", sealed);
    line("written by the process", written() - before);
    if let (Some(before), Some(after)) = (sectors_before, sectors()) {
        line("written to the device", after - before);
    }
    eprintln!("{:.2} B a reading sealed, {index} messages", sealed as f64 / (SECONDS * 2000) as f64);
}
