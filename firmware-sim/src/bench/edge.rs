//! As fast as it goes: the agent on a table whose times lie in the past, and then what it has left in its outbox.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, bail, ensure};
use common::{
    telemetry::print_line,
    time::{Clock as _, SystemClock},
    wire::{self, Lane},
};
use edge_agent::{outbox::Outbox, settings::Settings};
use serde::Serialize;
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};

use super::{
    Bench, Options, configs,
    counts::{Counted, Seen},
    usage::{Usage, thread_cpu},
};
use crate::{demo::loopback, http, program::quiet_ports};

/// Event time of the first row.
const START: &str = "2026-01-01T00:00:00Z";
/// The agent's windows and the model's, by default.toml and model.toml: 60 s; 10 s, every second.
const WINDOW: Duration = Duration::from_secs(60);
const SPAN_S: u64 = 10;
/// Nobody listens. The agent still takes its time at the end, in which its last figures can be read.
const DELIVERY: &str =
    "[mqtt]\nurl = \"mqtt://127.0.0.1:9\"\nmax_backoff = \"5s\"\n\n[uplink]\ndrain = \"2s\"\n";
/// How often the agent is asked where it is, and how often people are told.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const TELL_EVERY: Duration = Duration::from_secs(2);
/// The slowest that is waited for, in readings a second.
const PATIENCE: u64 = 10_000;

/// The last line of the output.
#[derive(Serialize)]
struct Report {
    /// Values in the table.
    readings: u64,
    /// Columns.
    devices: usize,
    /// From the agent's start until everything was sealed.
    seconds: f64,
    /// Of the agent, from its start to its end.
    cpu_seconds: f64,
    peak_rss_bytes: u64,
    peak_pss_bytes: u64,
    readings_per_second: f64,
    readings_per_cpu_second: f64,
    /// Encoding the sealed batches of readings, and nothing else, in one thread of this program.
    limit_readings_per_cpu_second: f64,
    /// All lanes.
    sealed_bytes_per_reading: f64,
    /// Of the readings lane.
    messages: u64,
    /// Windows scored by the model.
    scores: u64,
    aggregates: u64,
    #[serde(flatten)]
    counted: Counted,
}

/// Prepares, runs, audits, and prints the report.
pub(super) async fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let devices = u64::from(options.devices);
    let bench = Bench::new(options, START.parse()?, options.readings.div_ceil(devices).max(1))?;
    let [metrics] = quiet_ports()?;
    let metrics = loopback(metrics);
    // Everything stays, and takes about a tenth of this.
    let max_bytes = (bench.table.readings() * 100).max(1 << 31);
    let delivery = format!("{DELIVERY}\n[outbox]\nmax_bytes = {max_bytes}\n");
    let home = bench.dir.join("agent");
    bench.prepare(configs::agent(&home, &bench.rows, &bench.table, metrics, &delivery)?).await?;
    bench.write_rows()?;
    eprintln!("{}", bench.agent.display());
    let run = replay(&bench, metrics).await?;
    eprintln!("auditing the outbox, and encoding its batches once more");
    let config = bench.config();
    let sealed = spawn_blocking(move || audit(&config)).await??;
    report(&bench, &run, &sealed)
}

/// What the agent did, by its own metrics and the kernel's.
#[derive(Debug, Default)]
struct Run {
    usage: Usage,
    sealed_after: Duration,
    seen: Seen,
}

/// Runs the agent to the end of the table.
async fn replay(bench: &Bench, metrics: std::net::SocketAddr) -> anyhow::Result<Run> {
    let total = bench.table.readings();
    let deadline = Instant::now() + Duration::from_secs(60 + total / PATIENCE);
    let mut agent = bench.program("run", &[])?;
    let begun = Instant::now();
    agent.start()?;
    let pid = agent.pid().context("the agent has no pid")?;
    let (mut run, mut told) = (Run::default(), begun);
    loop {
        run.usage.look(pid, told.elapsed() >= TELL_EVERY)?;
        if run.usage.ended {
            ensure!(agent.ended_within(LOOK_EVERY).await?, "a zombie does not end");
            return Ok(run);
        }
        if let Ok(text) = http::get(metrics, "/metrics").await {
            run.seen = Seen::of(&text);
        }
        let Counted { polled, sealed, .. } = run.seen.counted;
        if run.sealed_after.is_zero() && polled == total && run.seen.counted.balances() {
            run.sealed_after = begun.elapsed();
        }
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            let (seconds, cpu) = (begun.elapsed().as_secs_f64(), run.usage.cpu.as_secs_f64());
            eprintln!("{seconds:>5.0} s  {sealed} of {total} sealed  {cpu:.1} s of CPU");
        }
        if Instant::now() > deadline {
            agent.kill().await?;
            bail!("only {sealed} of {total} readings were sealed in {:?}", begun.elapsed());
        }
        sleep(LOOK_EVERY).await;
    }
}

/// What the outbox holds.
#[derive(Debug, Default)]
struct Sealed {
    /// By the census that the agent declares.
    counted: Counted,
    /// Rows of the readings lane.
    rows: u64,
    messages: u64,
    aggregates: u64,
    /// Payload of all lanes.
    bytes: u64,
    /// To encode the readings lane again.
    limit: Duration,
}

/// Reads everything back, and encodes the readings as the seal does. Blocks.
fn audit(config: &std::path::Path) -> anyhow::Result<Sealed> {
    let settings = Settings::load(Some(config))?;
    let now = SystemClock.now();
    let outbox = Outbox::open(&settings.outbox.dir, (&settings.outbox).into(), now)?;
    let mut sealed = Sealed::default();
    for lane in Lane::ALL {
        let mut at = 0;
        loop {
            let page = outbox.page(lane, at, 64, 1 << 20, now)?;
            let Some(last) = page.last() else { break };
            at = last.index + 1;
            let decode = |message: &edge_agent::outbox::Message| wire::decode(lane, &message.payload);
            let batches = page.iter().map(decode).collect::<Result<Vec<_>, _>>()?;
            sealed.bytes += page.iter().map(|message| message.payload.len() as u64).sum::<u64>();
            let rows = batches.iter().map(|batch| batch.num_rows() as u64).sum::<u64>();
            match lane {
                Lane::Readings => {
                    sealed.rows += rows;
                    sealed.messages += page.len() as u64;
                    let before = thread_cpu()?;
                    for (batch, message) in batches.iter().zip(&page) {
                        std::hint::black_box(wire::encode(batch, &message.identity)?);
                    }
                    sealed.limit += thread_cpu()?.saturating_sub(before);
                }
                Lane::Aggregates => sealed.aggregates += rows,
                Lane::Control => batches.iter().for_each(|batch| sealed.counted.declare(batch)),
                Lane::Anomalies => {}
            }
        }
    }
    Ok(sealed)
}

/// Prints the report, after everything that is not as it must be.
fn report(bench: &Bench, run: &Run, sealed: &Sealed) -> anyhow::Result<ExitCode> {
    let table = &bench.table;
    let readings = table.readings();
    let (first, last) = (table.ts(0), table.ts(table.rows as i64 - 1));
    // Windows that end at whole seconds after the first whole span.
    let windows = (last.since(first).as_secs() + 1).saturating_sub(SPAN_S);
    let minutes = last.floor(WINDOW).since(first.floor(WINDOW)).as_secs() / WINDOW.as_secs() + 1;
    let Run { usage, seen: Seen { counted, scores, unscored }, .. } = run;
    let must = [
        ("readings polled", counted.polled, readings),
        (
            "readings sealed, held, rejected and skipped",
            counted.sealed + counted.held + counted.rejected + counted.skipped,
            counted.polled,
        ),
        ("readings polled, by the census", sealed.counted.polled, counted.polled),
        ("readings sealed, by the census", sealed.counted.sealed, counted.sealed),
        ("readings held, by the census", sealed.counted.held, counted.held),
        ("rows in the outbox", sealed.rows, counted.sealed),
        ("windows scored", *scores, table.scored_machines() * windows),
        ("windows failed, incomplete or standing", *unscored, 0),
        ("aggregates", sealed.aggregates, minutes * table.devices as u64),
    ];
    let wrong: Vec<_> = must.into_iter().filter(|(_, got, wanted)| got != wanted).collect();
    for (what, got, wanted) in &wrong {
        eprintln!("failed: {what}: {got}, should be {wanted}");
    }
    let (cpu, seconds) = (usage.cpu.as_secs_f64(), run.sealed_after.as_secs_f64());
    print_line(serde_json::to_string(&Report {
        readings,
        devices: table.devices,
        seconds,
        cpu_seconds: cpu,
        peak_rss_bytes: usage.peak_rss,
        peak_pss_bytes: usage.peak_pss,
        readings_per_second: readings as f64 / seconds,
        readings_per_cpu_second: readings as f64 / cpu,
        limit_readings_per_cpu_second: sealed.rows as f64 / sealed.limit.as_secs_f64(),
        sealed_bytes_per_reading: sealed.bytes as f64 / readings as f64,
        messages: sealed.messages,
        scores: *scores,
        aggregates: sealed.aggregates,
        counted: *counted,
    })?);
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
