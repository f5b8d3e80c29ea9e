//! The commands of `edge-agent`. Exit status: 0 done, 1 failed, 2 bad usage or configuration.

mod discover;
mod outbox;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use common::{
    config::Mistakes,
    reading::Reading,
    telemetry,
    time::{Clock, SystemClock, duration},
};
use tokio::{
    runtime::{Handle, Runtime},
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{
    clock::{self, Machine},
    model::{bundle::Bundle, machine::Purpose},
    pipeline,
    settings::{JsonTopic, MqttSettings, Settings, Source},
    source::{self, LinuxHardware, mqtt},
    trial,
};

const EXAMPLES: &str = "Examples:
  edge-agent check --config /etc/tailrace/edge-agent.toml
  edge-agent discover --i2c /dev/i2c-1 --out edge-agent.toml
  edge-agent sensors --config /etc/tailrace/edge-agent.toml
  edge-agent run --config /etc/tailrace/edge-agent.toml
  edge-agent outbox ls --config /etc/tailrace/edge-agent.toml
  edge-agent calibrate --config edge-agent.toml --input recorded.csv --rows 3600
  edge-agent try --config edge-agent.toml --input recorded.csv --out predictions.csv
  edge-agent model verify /var/lib/tailrace/models/tep-process
  TAILRACE_EDGE__MQTT__URL=mqtts://broker.example:8883 edge-agent run --config edge-agent.toml

Every key of the configuration stands in default.toml, with its unit and its reason.
Logs go to standard error; TAILRACE_LOG=edge_agent=debug says more, TAILRACE_LOG_FORMAT=json for machines.
Exit status: 0 done, 1 failed, 2 bad usage or configuration.";

/// Reads sensors, filters, aggregates and scores them, and delivers every reading over MQTT.
#[derive(Debug, Parser)]
#[command(name = "edge-agent", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Configuration file in TOML; what it leaves out is as in default.toml
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run until SIGTERM or SIGINT; then flush, drain, and end
    Run,
    /// Check the configuration and the models without reading or sending anything
    Check,
    /// List the devices and read each once
    Sensors,
    /// Look for sensors and write a configuration of what was found; stop the agent first
    Discover(discover::Where),
    /// Fit what is normal for this machine on a recording of it, and write it beside the model
    ///
    /// Refused, with exit status 1, while the machine still drifts.
    Calibrate {
        /// The model, where models.dir has several that are calibrated
        #[arg(long, value_name = "NAME")]
        model: Option<String>,
        /// Recorded file, read as the configuration's [[replay]] says of its own
        #[arg(long, value_name = "FILE")]
        input: PathBuf,
        /// How many of its rows; the machine must be in order in all of them
        #[arg(long, value_name = "N")]
        rows: usize,
        /// Without it, calibration.toml in the model's folder, where the agent looks for it
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Run a recorded file through the filter, the windows and the models
    ///
    /// Writes datetime,anomaly,score, one line a row: whether an anomaly is open after the row, and the score over
    /// its threshold.
    Try {
        /// Recorded file, read as the configuration's [[replay]] says of its own
        #[arg(long, value_name = "FILE")]
        input: PathBuf,
        /// Where the predictions go
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Calibrate on so many rows first, instead of by calibration.toml
        #[arg(long, value_name = "N")]
        calibrate_rows: Option<usize>,
    },
    /// Models
    #[command(subcommand)]
    Model(ModelCommand),
    /// The outbox of an agent that is stopped: list, check, save
    #[command(subcommand)]
    Outbox(outbox::OutboxCommand),
}

#[derive(Debug, Subcommand)]
enum ModelCommand {
    /// Check a bundle's hash and its golden vectors on this machine
    Verify {
        /// Folder with model.onnx, model.toml and golden.json; without it, all of models.dir
        folder: Option<PathBuf>,
    },
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    // Bad usage ends here with status 2.
    let cli = Cli::parse();
    common::memory::frugal();
    telemetry::init_logs("info");
    match execute(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("edge-agent: {error:#}");
            ExitCode::from(if error.is::<Mistakes>() { 2 } else { 1 })
        }
    }
}

fn execute(cli: Cli) -> anyhow::Result<ExitCode> {
    let settings = || Settings::load(cli.config.as_deref());
    match cli.command {
        Command::Run => run(settings()?).map(|()| ExitCode::SUCCESS),
        Command::Check => check(&settings()?),
        Command::Sensors => sensors(&settings()?),
        Command::Discover(places) => discover::execute(&places),
        Command::Calibrate { model, input, rows, out } => {
            trial::calibrate(&settings()?, model.as_deref(), &input, rows, out.as_deref())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Try { input, out, calibrate_rows } => {
            trial::predict(&settings()?, &input, &out, calibrate_rows)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Model(ModelCommand::Verify { folder: Some(folder) }) => verify(&folder),
        Command::Model(ModelCommand::Verify { folder: None }) => Ok(models(&settings()?)),
        Command::Outbox(command) => outbox::execute(&command, &settings()?.outbox),
    }
}

fn check(settings: &Settings) -> anyhow::Result<ExitCode> {
    settings.check_run()?;
    let (devices, sources) = (settings.registry.devices.len(), settings.sources.len());
    telemetry::print_line(format_args!(
        "{}/{}: {devices} devices, {sources} sources",
        settings.site, settings.gateway
    ));
    models(settings);
    Ok(ExitCode::SUCCESS)
}

fn verify(folder: &Path) -> anyhow::Result<ExitCode> {
    let Bundle { name, version, verified, sha256, .. } = Bundle::load(folder)?;
    telemetry::print_line(format_args!("{name} {version}: {verified} golden vectors agree, sha256 {sha256}"));
    Ok(ExitCode::SUCCESS)
}

fn run(settings: Settings) -> anyhow::Result<()> {
    // Another provider is there already only when a host program has chosen one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = Runtime::new().context("starting the runtime")?;
    runtime.block_on(async {
        let (stop, stopped) = watch::channel(false);
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        tokio::spawn(async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            tracing::info!("stopping: flushing and draining");
            stop.send_replace(true);
        });
        clock::run(settings, LinuxHardware, Machine::this(), stopped).await
    })
}

/// Prints every configured model's state; fails when one cannot be used.
fn models(settings: &Settings) -> ExitCode {
    let (models, _) = pipeline::load_models(settings, Purpose::Score);
    let mut code = ExitCode::SUCCESS;
    for status in models.status() {
        telemetry::print_line(format_args!("model {}: {}", status.name, status.state));
        if status.state != "active" {
            code = ExitCode::FAILURE;
        }
    }
    code
}

/// Reads every bus once, listens to every broker, and prints a line a device; fails when a bus or a broker did.
fn sensors(settings: &Settings) -> anyhow::Result<ExitCode> {
    let runtime = Runtime::new().context("starting the runtime")?;
    let _inside = runtime.enter();
    let hardware = Arc::new(LinuxHardware);
    let mut code = ExitCode::SUCCESS;
    for source in &settings.sources {
        if let Source::Replay { file, .. } = source {
            telemetry::print_line(format_args!("{}: a recorded file", file.display()));
        }
        if let Source::Mqtt { broker, client_id, topics, .. } = source {
            let heard = hear(broker, client_id, topics, settings);
            let problems = heard.unwrap_or_else(|error| vec![format!("{error:#}")]);
            for problem in problems {
                telemetry::print_line(format_args!("{}: {problem}", source.name()));
                code = ExitCode::FAILURE;
            }
        }
        for reading in source::read_once(source, &hardware, SystemClock.now()) {
            if !print_reading(settings, &reading, &source.name()) {
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

/// Prints what the devices of a broker say within the sources' timeout, and returns what is wrong. That one is silent
/// is not: nobody has asked it.
fn hear(
    broker: &MqttSettings,
    client_id: &str,
    topics: &[JsonTopic],
    settings: &Settings,
) -> anyhow::Result<Vec<String>> {
    let wait = settings.source_timeout;
    let heard = Handle::current().block_on(mqtt::listen(broker, client_id, topics, &SystemClock, wait))?;
    for device in topics.iter().flat_map(JsonTopic::devices) {
        if let Some(reading) = heard.readings.get(&device) {
            print_reading(settings, reading, &broker.host);
        } else {
            let id = &settings.registry.device(device).id;
            telemetry::print_line(format_args!("{id}: nothing came within {}", duration::format(wait)));
        }
    }
    Ok(heard.refused.iter().map(|filter| format!("the broker refuses {filter}; see its ACL")).collect())
}

/// Prints a line; whether there was a value.
fn print_reading(settings: &Settings, reading: &Reading, source: &str) -> bool {
    let device = settings.registry.device(reading.device);
    let there = reading.value.is_finite();
    if there {
        let quality = reading.quality.as_str();
        telemetry::print_line(format_args!("{}: {} {} ({quality})", device.id, reading.value, device.unit));
    } else {
        telemetry::print_line(format_args!("{}: no value ({source})", device.id));
    }
    there
}
