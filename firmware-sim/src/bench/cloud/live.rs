//! In real time: a fleet that measures `--hz` times a second and seals every `--seal`, and somebody who asks by SQL for
//! what it has published ([`super::latency`]). Memory is looked at every second.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, ensure};
use cloud_ingest::{store::Store, tables::Tables};
use common::{
    telemetry::print_line,
    time::{Clock as _, SystemClock},
};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::{
    Bench, Options, Seen,
    compare::folder_bytes,
    latency::{self, Asker, Latency},
};
use crate::{bench::usage::Usage, demo::loopback, fleet, http};

const LOOK_EVERY: Duration = Duration::from_secs(1);
const TELL_EVERY: Duration = Duration::from_secs(10);
/// Part of the time after which memory should have stopped growing.
const WARM: f64 = 0.25;

/// The last line of the output.
#[derive(Serialize)]
struct Report {
    readings: u64,
    devices: u32,
    hz: u32,
    messages: u64,
    /// From the first publish to the last acknowledgement.
    seconds: f64,
    /// Of the cloud, from its start to its end.
    cpu_seconds: f64,
    /// Of one core, while messages came; with what the questions cost.
    cpu_percent: f64,
    /// From publish to the answer of a query.
    live: Latency,
    silver: Latency,
    #[serde(flatten)]
    memory: Memory,
    peak_rss_bytes: u64,
    peak_pss_bytes: u64,
    bronze_bytes_per_reading: f64,
    plans: u64,
    stored: u64,
    duplicates: u64,
    quarantined: u64,
}

/// Memory while messages came, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Memory {
    rss_at_10_percent: u64,
    rss_at_50_percent: u64,
    rss_at_100_percent: u64,
    pss_at_100_percent: u64,
    /// The least and the most RSS of each tenth of the time: between gold's steps, and within one.
    rss_of_tenths: [(u64, u64); 10],
    /// The same of what is no file's: without the pages of the program that come as its code is first run.
    anonymous_of_tenths: [(u64, u64); 10],
    /// By least squares over the last three quarters.
    rss_growth_per_hour: f64,
    anonymous_growth_per_hour: f64,
}

#[derive(Clone, Copy)]
struct Sample {
    /// Seconds.
    at: f64,
    rss: u64,
    pss: u64,
    anonymous: u64,
}

/// Prepares, runs, compares, and prints the report.
pub(super) async fn run(options: Options, lasting: Duration) -> anyhow::Result<ExitCode> {
    let mut bench = Bench::begin(options).await?;
    let at = loopback(bench.http);
    let askers = [Asker::begin(at, "live.readings"), Asker::begin(at, "silver.sensor_readings")];
    let fleet = bench.paced(SystemClock.now(), lasting);
    let readings = fleet.readings;
    bench.begun = Instant::now();
    let before = bench.cpu()?;
    let mut sending = tokio::spawn(fleet::send(fleet.clone(), Some(latency::told(&askers))));
    let (mut samples, mut told) = (Vec::new(), bench.begun);
    let sent = loop {
        tokio::select! {
            done = &mut sending => break done.context("the fleet's task")??,
            () = sleep(LOOK_EVERY) => {}
        }
        bench.usage.look(bench.cloud.pid().context("the cloud has no pid")?, true)?;
        bench.broker.check()?;
        ensure!(!bench.usage.ended, "cloud-ingest has ended; see its log in {}", bench.lake.display());
        let Usage { rss, pss, anonymous, .. } = bench.usage;
        samples.push(Sample { at: bench.begun.elapsed().as_secs_f64(), rss, pss, anonymous });
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            tell(&mut bench, &askers, readings).await;
        }
    };
    let cpu_percent = 100.0 * (bench.cpu()? - before).as_secs_f64() / bench.begun.elapsed().as_secs_f64();
    let everything = tokio::spawn(async move { Ok(sent) });
    bench.follow(everything, readings).await?;
    let [live, silver] = askers;
    let (live, silver) = (live.end().await?, silver.end().await?);
    bench.end().await?;
    let truth = fleet::truth(&fleet, sent.start)?;
    let right = bench.is_right(&Tables::open(&Store::open(&bench.store)?).await?, &truth).await?;
    print_line(serde_json::to_string(&Report {
        readings,
        devices: fleet.devices * fleet.gateways,
        hz: bench.options.hz,
        messages: sent.messages,
        seconds: sent.seconds,
        cpu_seconds: bench.usage.cpu.as_secs_f64(),
        cpu_percent,
        live,
        silver,
        memory: Memory::of(&samples).context("the run was too short to look at memory")?,
        peak_rss_bytes: bench.usage.peak_rss,
        peak_pss_bytes: bench.usage.peak_pss,
        bronze_bytes_per_reading: folder_bytes(&bench.lake.join("bronze"))? as f64 / readings as f64,
        plans: bench.seen.plans,
        stored: bench.seen.stored,
        duplicates: bench.seen.duplicates,
        quarantined: bench.seen.quarantined,
    })?);
    Ok(if right && bench.seen.stored == readings { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn tell(bench: &mut Bench, askers: &[Asker; 2], of: u64) {
    if let Ok(text) = http::get(loopback(bench.http), "/metrics").await {
        bench.seen = Seen::of(&text);
    }
    let [live, silver] = askers.each_ref().map(Asker::latency);
    let (seconds, cpu) = (bench.begun.elapsed().as_secs_f64(), bench.usage.cpu.as_secs_f64());
    let seen = bench.seen.all();
    let (mb, own) = (bench.usage.rss as f64 / 1e6, bench.usage.anonymous as f64 / 1e6);
    let of_both = |of: fn(&Latency) -> f64| (of(&live).round(), of(&silver).round());
    let (p50, p99, max) = (of_both(|l| l.p50_ms), of_both(|l| l.p99_ms), of_both(|l| l.max_ms));
    eprintln!(
        "{seconds:>5.0} s  {seen} of {of} in silver  {cpu:.1} s of CPU  {mb:.0} MB, {own:.0} anonymous  \
         live and silver, ms: p50 {p50:?} p99 {p99:?} max {max:?}"
    );
}

impl Memory {
    /// `None` of too few samples.
    fn of(samples: &[Sample]) -> Option<Memory> {
        let at = |part: f64| samples.get(((samples.len() as f64 * part).ceil() as usize).checked_sub(1)?);
        let warm = &samples[(samples.len() as f64 * WARM) as usize..];
        let growth = |of: fn(&Sample) -> u64| {
            slope(&warm.iter().map(|sample| (sample.at / 3600.0, of(sample) as f64)).collect::<Vec<_>>())
        };
        let tenths = |of: fn(&Sample) -> u64| {
            std::array::from_fn(|n| {
                let tenth = &samples[n * samples.len() / 10..(n + 1) * samples.len() / 10];
                let of = || tenth.iter().map(of);
                (of().min().unwrap_or(0), of().max().unwrap_or(0))
            })
        };
        Some(Memory {
            rss_at_10_percent: at(0.1)?.rss,
            rss_at_50_percent: at(0.5)?.rss,
            rss_at_100_percent: at(1.0)?.rss,
            pss_at_100_percent: at(1.0)?.pss,
            rss_of_tenths: tenths(|sample| sample.rss),
            anonymous_of_tenths: tenths(|sample| sample.anonymous),
            rss_growth_per_hour: growth(|sample| sample.rss)?,
            anonymous_growth_per_hour: growth(|sample| sample.anonymous)?,
        })
    }
}

/// Of the line by least squares; `None` where all stand at one place.
fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let n = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let (up, across) = points
        .iter()
        .fold((0.0, 0.0), |(up, across), p| (up + (p.0 - x) * (p.1 - y), across + (p.0 - x) * (p.0 - x)));
    (across > 0.0).then(|| up / across)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_it_was_at_its_time_and_grows_after_the_warm_up() {
        // 1,000 bytes a second at first, then 10; half of both is anonymous.
        let rss = |n: u64| if n < 200 { 1_000 * n } else { 200_000 + 10 * n };
        let sample = |n: u64| Sample { at: n as f64, rss: rss(n), pss: n, anonymous: rss(n) / 2 };
        let samples: Vec<Sample> = (1..=1_000).map(sample).collect();
        let memory = Memory::of(&samples).unwrap();
        assert_eq!((memory.rss_at_10_percent, memory.rss_at_50_percent), (100_000, 205_000));
        assert_eq!((memory.rss_at_100_percent, memory.pss_at_100_percent), (210_000, 1_000));
        let ends = |of: [(u64, u64); 10]| (of[0], of[9]);
        assert_eq!(ends(memory.rss_of_tenths), ((1_000, 100_000), (209_010, 210_000)));
        assert_eq!(ends(memory.anonymous_of_tenths), ((500, 50_000), (104_505, 105_000)));
        assert!((memory.rss_growth_per_hour - 36_000.0).abs() < 1e-6, "{memory:?}");
        assert!((memory.anonymous_growth_per_hour - 18_000.0).abs() < 1e-6, "{memory:?}");
        assert_eq!(Memory::of(&samples[..1]), None);
    }
}
