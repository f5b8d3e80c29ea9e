//! `firmware-sim bench`: what the programs that ship cost, as child processes under load.
//!
//! `bench edge` starts `edge-agent run` as it stands beside this executable (or at `--agent`) on a recorded table
//! ([`table`]) of `--devices` devices at `--hz`, eight to a machine, with the model that ships for such machines
//! (`edge-agent/examples/models/level-shift`: every machine is scored once a second), calibrated by `edge-agent
//! calibrate` on the twenty minutes before. Two ways:
//!
//! * **As fast as it goes** ([`edge`]): event times lie in the past, and nobody listens. Everything that is sealed stays
//!   in the outbox, so that afterwards the outbox can be audited and its very batches encoded once more for the bare
//!   limit. A broker would take part of the CPUs that the agent is measured on, and give nothing in return: the memory
//!   of the agent does not depend on what waits in the outbox.
//! * **Live** ([`live`]): in real time, to a mosquitto by TLS with a throw-away authority.
//!
//! `bench cloud` ([`cloud`]) starts `cloud-ingest run` behind a mosquitto, and sends it a fleet's readings.
//!
//! CPU time and memory are the kernel's figures of the child alone ([`usage`]). Each run checks its own honesty: what
//! was polled is what was sealed, held, rejected and skipped, and every window was scored. It fails when not.
//!
//! The folder `--data-dir` is left behind for whoever wants to do the same job by other means: `rows.csv` (one row an
//! instant: `time`, then a column a device), `edge-agent.toml`, and `models/level-shift/` with its calibration.

mod cloud;
mod configs;
mod counts;
mod edge;
mod live;
mod null;
mod table;
mod usage;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use common::time::Timestamp;
use tempfile::TempDir;

use self::table::Table;
use crate::program::{Program, ours};

/// Memory that looks like a file system: the recorded table is read from there.
const SHM: &str = "/dev/shm";
/// Calibrating takes a few seconds.
const PATIENCE: Duration = Duration::from_secs(300);

/// Which half.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Half {
    /// The edge agent: a recorded table, filtered, aggregated, scored and sealed
    Edge(Options),
    /// The cloud: from a broker to committed silver and gold; needs mosquitto
    Cloud(cloud::Options),
}

/// How the edge is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Columns of the recorded table; eight make a machine, which a model scores once a second
    #[arg(long, value_name = "M", default_value_t = 200, value_parser = clap::value_parser!(u32).range(8..=10_000))]
    devices: u32,
    /// Values in it, rounded up to whole rows
    #[arg(long, value_name = "TOTAL", default_value_t = 20_000_000, conflicts_with = "live")]
    readings: u64,
    /// Rows a second, by their times
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    hz: u32,
    /// In real time for so long, over TLS, instead of as fast as it goes; needs mosquitto and openssl
    #[arg(long, value_name = "DURATION", value_parser = common::time::duration::parse)]
    live: Option<Duration>,
    /// The agent that is measured; without it the one beside this program
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
    /// Where table, configuration, outbox and logs are kept; without it in folders that are removed, the table in
    /// memory
    #[arg(long, value_name = "D")]
    data_dir: Option<PathBuf>,
}

/// Measures and prints one JSON object on the last line; the exit code says whether everything is accounted for.
///
/// # Errors
/// When something is not there that is needed, or the agent fails.
pub async fn run(half: Half) -> anyhow::Result<ExitCode> {
    match half {
        Half::Edge(options) => match options.live {
            Some(lasting) => live::run(&options, lasting).await,
            None => edge::run(&options).await,
        },
        Half::Cloud(options) => cloud::run(options).await,
    }
}

/// What both ways need: the folder, the agent and the configuration.
struct Bench {
    agent: PathBuf,
    table: Table,
    dir: PathBuf,
    rows: PathBuf,
    /// Removed when this is dropped.
    _scratch: Vec<TempDir>,
}

impl Bench {
    /// Makes the folder.
    fn new(options: &Options, start: Timestamp, rows: u64) -> anyhow::Result<Bench> {
        let agent = match &options.agent {
            Some(path) => path.clone(),
            None => ours("edge-agent")?,
        };
        let table = Table { start, rows, devices: options.devices as usize, hz: options.hz };
        let scratch = |place: &Path| {
            let made = tempfile::Builder::new().prefix("tailrace-bench-").tempdir_in(place);
            made.with_context(|| format!("making a folder in {}", place.display()))
        };
        let (dir, shelf, scratch) = match &options.data_dir {
            Some(dir) => {
                let dir = std::path::absolute(dir).context("finding the data folder")?;
                let again = "give another with --data-dir, or remove it";
                ensure!(!dir.join("agent").exists(), "{} is from an earlier run; {again}", dir.display());
                (dir.clone(), dir, Vec::new())
            }
            None => {
                let memory = Path::new(SHM);
                let memory = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
                let (home, shelf) = (scratch(&std::env::temp_dir())?, scratch(&memory)?);
                (home.path().to_owned(), shelf.path().to_owned(), vec![home, shelf])
            }
        };
        for folder in [dir.join("log"), dir.join("agent"), dir.join("models/level-shift")] {
            fs::create_dir_all(&folder).with_context(|| format!("cannot write to {}", folder.display()))?;
        }
        Ok(Bench { agent, table, rows: shelf.join("rows.csv"), dir, _scratch: scratch })
    }

    /// Writes the table, the models and the configuration, and calibrates on the time before the table.
    async fn prepare(&self, config: String) -> anyhow::Result<()> {
        let write = |name: &str, bytes: &[u8]| {
            let path = self.dir.join(name);
            fs::write(&path, bytes).with_context(|| format!("writing {}", path.display()))
        };
        for (name, bytes) in configs::BUNDLE {
            write(&format!("models/level-shift/{name}"), bytes)?;
        }
        write("edge-agent.toml", config.as_bytes())?;
        let before = self.rows.with_file_name("calibration.csv");
        let count = self.table.calibration_rows();
        eprintln!("calibrating on {count} rows, as {} says", self.config().display());
        let made = self.table.write(&before, -count..0);
        made.with_context(|| format!("writing {}", before.display()))?;
        let rows = count.to_string();
        let rows = ["--input".as_ref(), before.as_path(), "--rows".as_ref(), rows.as_ref()];
        let mut calibrate = self.program("calibrate", &rows)?;
        calibrate.start()?;
        ensure!(
            calibrate.ended_within(PATIENCE).await?,
            "edge-agent calibrate takes longer than {PATIENCE:?}"
        );
        fs::remove_file(&before).with_context(|| format!("removing {}", before.display()))
    }

    fn write_rows(&self) -> anyhow::Result<()> {
        let Table { rows, devices, .. } = self.table;
        eprintln!("writing {rows} rows of {devices} devices to {}", self.rows.display());
        let written = self.table.write(&self.rows, 0..rows as i64);
        written.with_context(|| format!("writing {}", self.rows.display()))
    }

    fn config(&self) -> PathBuf {
        self.dir.join("edge-agent.toml")
    }

    /// `edge-agent COMMAND --config … args…`, not yet started.
    fn program(&self, command: &str, args: &[&Path]) -> anyhow::Result<Program> {
        let config = self.config();
        let all: Vec<&Path> = [command.as_ref(), "--config".as_ref(), config.as_path()]
            .into_iter()
            .chain(args.iter().copied())
            .collect();
        let log = self.dir.join("log").join(command).with_extension("log");
        Program::new("edge-agent", self.agent.clone(), &all, log)
    }
}
