//! The commands of `edge-agent`. Exit status: 0 done, 1 failed, 2 bad usage or configuration.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use common::{
    config::Mistakes,
    telemetry,
    time::{Clock, SystemClock},
};
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{
    model::{bundle::Bundle, machine::Purpose},
    pipeline,
    settings::{Settings, Source},
    source::{self, LinuxHardware},
    trial,
};

const EXAMPLES: &str = "Examples:
  edge-agent check --config /etc/tailrace/edge-agent.toml
  edge-agent sensors --config /etc/tailrace/edge-agent.toml
  edge-agent run --config /etc/tailrace/edge-agent.toml
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
    if let Command::Model(ModelCommand::Verify { folder: Some(folder) }) = &cli.command {
        let bundle = Bundle::load(folder)?;
        let Bundle { name, version, verified, sha256, .. } = bundle;
        telemetry::print_line(format_args!(
            "{name} {version}: {verified} golden vectors agree, sha256 {sha256}"
        ));
        return Ok(ExitCode::SUCCESS);
    }
    let settings = Settings::load(cli.config.as_deref())?;
    match cli.command {
        Command::Run => run(settings).map(|()| ExitCode::SUCCESS),
        Command::Check => {
            let (devices, sources) = (settings.registry.devices.len(), settings.sources.len());
            telemetry::print_line(format_args!(
                "{}/{}: {devices} devices, {sources} sources",
                settings.site, settings.gateway
            ));
            models(&settings);
            Ok(ExitCode::SUCCESS)
        }
        Command::Sensors => Ok(sensors(&settings)),
        Command::Calibrate { model, input, rows, out } => {
            trial::calibrate(&settings, model.as_deref(), &input, rows, out.as_deref())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Try { input, out, calibrate_rows } => {
            trial::predict(&settings, &input, &out, calibrate_rows)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Model(ModelCommand::Verify { .. }) => Ok(models(&settings)),
    }
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
        pipeline::run(settings, LinuxHardware, Arc::new(SystemClock), stopped).await
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

/// Reads every bus once and prints a line a device; fails when one gave no value.
fn sensors(settings: &Settings) -> ExitCode {
    let hardware = Arc::new(LinuxHardware);
    let mut code = ExitCode::SUCCESS;
    for source in &settings.sources {
        if let Source::Replay { file, .. } = source {
            telemetry::print_line(format_args!("{}: a recorded file", file.display()));
        }
        for reading in source::read_once(source, &hardware, SystemClock.now()) {
            let device = settings.registry.device(reading.device);
            if reading.value.is_finite() {
                let quality = reading.quality.as_str();
                telemetry::print_line(format_args!(
                    "{}: {} {} ({quality})",
                    device.id, reading.value, device.unit
                ));
            } else {
                telemetry::print_line(format_args!("{}: no value ({})", device.id, source.name()));
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}
