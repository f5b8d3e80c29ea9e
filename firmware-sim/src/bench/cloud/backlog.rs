//! A backlog behind live data: gateways were cut off, are back, send what they measure now, and then what they have
//! kept.
//!
//! ```text
//! event time   ──── in order ────┤├──── backlog ────┤├─ live ─▶
//! sent as            1st                  3rd          2nd, and on beside the 3rd
//! ```
//!
//! What comes in order and the backlog are of the same devices, as long and as dense, so that their costs can be
//! compared: of each, the CPU time of the cloud from the first message until it has ended, with everything in gold. With
//! `--again` the backlog begins so much earlier, and that part of it, in messages of its own, is stored already.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, ensure};
use cloud_ingest::{store::Store, tables::Tables};
use common::{
    telemetry::print_line,
    time::{Clock as _, SystemClock, Timestamp},
};
use serde::Serialize;
use tokio::time::Instant;

use super::{Bench, Options, Seen};
use crate::fleet::{self, Told};

/// Live data that the cloud has in silver before the backlog comes.
const LEAD: Duration = Duration::from_secs(10);
/// The backlog is not taken faster than this, in readings a second: so long live data goes on beside it.
const FASTEST: u64 = 1_500_000;
/// Least gateways, so that all devices together are not held up by one connection.
pub(super) const GATEWAYS: u32 = 20;

/// The last line of the output.
#[derive(Serialize)]
struct Report {
    /// Of what comes in order, and again of the backlog.
    readings: u64,
    devices: u32,
    /// Event time that it covers.
    backlog_seconds: u64,
    restarted: bool,
    in_order: Phase,
    backlog: Phase,
    /// The backlog's rates in parts of the others.
    of_in_order_per_second: f64,
    of_in_order_per_cpu_second: f64,
}

/// What the cloud has done.
#[derive(Clone, Copy, Debug, Serialize)]
struct Phase {
    /// Live ones too.
    readings: u64,
    /// From the first publish until silver had as many as came in order or were kept.
    seconds: f64,
    /// Until gold had it too, and the cloud had ended.
    seconds_to_the_end: f64,
    cpu_seconds: f64,
    readings_per_second: f64,
    readings_per_cpu_second: f64,
    peak_rss_bytes: u64,
    stored: u64,
    duplicates: u64,
    quarantined: u64,
    plans: u64,
}

/// What is sent.
struct Load {
    in_order: fleet::Options,
    backlog: fleet::Options,
    /// Both, each reading once.
    history: fleet::Options,
    duplicates: u64,
}

/// Prepares, runs, compares, and prints the report.
pub(super) async fn run(options: Options, reach: Duration) -> anyhow::Result<ExitCode> {
    let mut bench = Bench::begin(options).await?;
    let restart = bench.options.restart;
    let load = load(&bench, reach, SystemClock.now().floor(Duration::from_secs(1)))?;
    let readings = load.in_order.readings;
    eprintln!("{readings} readings in order");
    bench.begun = Instant::now();
    let sending = tokio::spawn(fleet::send(load.in_order.clone(), None));
    bench.follow(sending, readings).await?;
    bench.end_cloud().await?;
    let in_order = phase(&bench, Duration::ZERO, Seen::default());

    bench.start_cloud()?;
    bench.connected().await?;
    let lead = bench.paced(SystemClock.now(), LEAD);
    eprintln!("{} live ones", lead.readings);
    let sending = tokio::spawn(fleet::send(lead.clone(), None));
    bench.follow(sending, lead.readings).await?;
    let mut seen = bench.seen;
    if restart {
        bench.end_cloud().await?;
        seen = Seen { plans: seen.plans, ..Seen::default() };
        bench.start_cloud()?;
        bench.connected().await?;
    }
    let cpu = if restart { Duration::ZERO } else { bench.cpu()? };
    let beside = Duration::from_secs_f64(readings as f64 / FASTEST as f64).max(Duration::from_secs(1));
    let live = fleet::Options { seed: 3, ..bench.paced(SystemClock.now(), beside) };
    eprintln!("{readings} readings of the backlog, and {} live ones beside them", live.readings);
    bench.begun = Instant::now();
    let beside = tokio::spawn(fleet::send(live.clone(), None));
    let sending = tokio::spawn(fleet::send(load.backlog.clone(), None));
    // Of the first so many, less than a thousandth are live.
    bench.follow(sending, seen.all() + readings).await?;
    let to_silver = bench.to_silver;
    bench.follow(beside, seen.all() + readings + live.readings).await?;
    bench.to_silver = to_silver;
    bench.end().await?;
    let backlog = phase(&bench, cpu, seen);

    let truths = [&load.history, &lead, &live].map(|fleet| {
        let start = fleet.start.context("every fleet here has its start")?;
        fleet::truth(fleet, start)
    });
    let truth = together(truths.into_iter().collect::<Result<_, _>>()?)?;
    let right = bench.is_right(&Tables::open(&Store::open(&bench.store)?).await?, &truth).await?;
    let balanced = in_order.stored == readings
        && backlog.stored == readings + live.readings - load.duplicates
        && backlog.duplicates == load.duplicates;
    if !balanced {
        eprintln!("failed: {} duplicates were to be found: {in_order:?}, {backlog:?}", load.duplicates);
    }
    print_line(serde_json::to_string(&Report {
        readings,
        devices: load.in_order.devices * load.in_order.gateways,
        backlog_seconds: reach.as_secs(),
        restarted: restart,
        in_order,
        backlog,
        of_in_order_per_second: backlog.readings_per_second / in_order.readings_per_second,
        of_in_order_per_cpu_second: backlog.readings_per_cpu_second / in_order.readings_per_cpu_second,
    })?);
    Ok(if right && balanced { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is older than `now`.
fn load(bench: &Bench, reach: Duration, now: Timestamp) -> anyhow::Result<Load> {
    let fleet = bench.fleet();
    let devices = u64::from(fleet.devices) * u64::from(fleet.gateways);
    let of_each = bench.options.readings / devices;
    ensure!(of_each > 0, "{} readings are fewer than the devices: raise --readings", bench.options.readings);
    let again = of_each * u64::from(bench.options.again) / 100;
    let interval = Duration::from_micros((reach.as_micros() as u64 / of_each).max(1));
    let start = now - interval.mul_f64((2 * of_each - again) as f64);
    let in_order = fleet::Options { readings: of_each * devices, start: Some(start), interval, ..fleet };
    Ok(Load {
        backlog: fleet::Options { first: of_each - again, ..in_order.clone() },
        history: fleet::Options { readings: (2 * of_each - again) * devices, ..in_order.clone() },
        in_order,
        duplicates: again * devices,
    })
}

/// What the cloud has done since it had taken so much CPU time and had seen that.
fn phase(bench: &Bench, cpu: Duration, before: Seen) -> Phase {
    let (seen, cpu) = (bench.seen, (bench.usage.cpu.saturating_sub(cpu)).as_secs_f64());
    let (readings, seconds) = (seen.all() - before.all(), bench.to_silver.as_secs_f64());
    Phase {
        readings,
        seconds,
        seconds_to_the_end: bench.to_the_end.as_secs_f64(),
        cpu_seconds: cpu,
        readings_per_second: readings as f64 / seconds,
        readings_per_cpu_second: readings as f64 / cpu,
        peak_rss_bytes: bench.usage.peak_rss,
        stored: seen.stored - before.stored,
        duplicates: seen.duplicates - before.duplicates,
        quarantined: seen.quarantined - before.quarantined,
        plans: seen.plans - before.plans,
    }
}

/// Of each device what all fleets together have told of it.
fn together(truths: Vec<Vec<Told>>) -> anyhow::Result<Vec<Told>> {
    let mut truths = truths.into_iter();
    let mut all = truths.next().context("no fleet")?;
    for told in truths.flatten() {
        match all.iter_mut().find(|known| known.device == told.device) {
            Some(known) => {
                known.count += told.count;
                known.sum += told.sum;
                known.first = known.first.min(told.first);
                known.last = known.last.max(told.last);
            }
            None => all.push(told),
        }
    }
    Ok(all)
}
