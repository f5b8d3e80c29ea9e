//! `cargo demo`: the whole pipeline in one process tree, with nothing installed.
//!
//! ```text
//! parent ─┬─ broker   rumqttd, in memory
//!         ├─ cable    a TCP relay in the parent, one a gateway: agent ── cable ── broker
//!         ├─ agent-N  simulated chips ⇒ the real edge agent
//!         └─ cloud    the real cloud ingest on a lake in {data-dir}/lake
//! ```
//!
//! The plant's time starts `--backfill` before the first start and runs as fast as the machine allows until
//! it has caught up with the present. `{data-dir}/demo.json` remembers where the plant's loop began, so a
//! later start on the same folder goes on where the replay was.

mod agent;
mod broker;
mod cable;
pub(crate) mod child;
pub(crate) mod configs;
mod screen;

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use common::{
    telemetry::print_line,
    time::{Clock as _, SystemClock, Timestamp},
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::mpsc,
    time::{Instant, interval, sleep_until},
};

use self::{
    cable::Cable,
    child::{Child, Event},
    screen::{Screen, Summary},
};
use crate::{http, plant::Layout};

use self::child::Order;

/// How the demo is run.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where the lake, the outboxes and the logs are kept; a later start goes on from there
    #[arg(long, value_name = "DIR", default_value = "./demo-data")]
    data_dir: PathBuf,
    /// How many plants, each with a gateway of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    gateways: u32,
    /// How much history the first start makes up for
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = common::time::duration::parse)]
    backfill: Duration,
    /// Stop this long after the history is there, and print the ledger; without it the demo runs until Ctrl-C
    #[arg(long = "for", value_name = "DURATION", value_parser = common::time::duration::parse)]
    run_for: Option<Duration>,
    /// Port of the MQTT broker
    #[arg(long, value_name = "PORT", default_value_t = 1883)]
    mqtt_port: u16,
    /// Port for SQL (PostgreSQL wire protocol)
    #[arg(long, value_name = "PORT", default_value_t = 5433)]
    pg_port: u16,
    /// Port of the dashboard
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    http_port: u16,
}

/// One of the demo's child processes.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Role {
    /// The MQTT broker
    Broker {
        /// Address to serve
        listen: SocketAddr,
    },
    /// A gateway
    Agent(agent::Options),
    /// The cloud side
    Cloud {
        /// Its configuration
        #[arg(long)]
        config: PathBuf,
    },
}

impl Role {
    /// What its log is filtered by, unless `TAILRACE_LOG` says otherwise.
    pub fn log_filter(&self) -> &'static str {
        match self {
            // Every connection that ends is an error to it.
            Role::Broker { .. } => "off",
            Role::Agent(_) => "info",
            Role::Cloud { .. } => cloud_ingest::cli::LOG_FILTER,
        }
    }
}

/// Runs as a child of the demo.
///
/// # Errors
/// When the child cannot do its work; the parent shows the end of its log.
pub async fn run_child(role: Role) -> anyhow::Result<()> {
    let orders = child::orders();
    match role {
        Role::Broker { listen } => tokio::task::spawn_blocking(move || broker::serve(listen)).await?,
        Role::Agent(options) => agent::run(options, orders).await,
        Role::Cloud { config } => cloud(&config, orders).await,
    }
}

/// The real cloud ingest; the buttons of its page are passed on to the parent.
async fn cloud(config: &std::path::Path, mut orders: mpsc::Receiver<Order>) -> anyhow::Result<()> {
    let settings = cloud_ingest::settings::Settings::load(Some(config))?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let (keys, mut pressed) = mpsc::channel::<char>(8);
    tokio::spawn(async move {
        while let Some(order) = orders.recv().await {
            if order == Order::Stop {
                stop.send_replace(true);
            }
        }
    });
    tokio::spawn(async move {
        while let Some(key) = pressed.recv().await {
            child::tell_parent(&Event::Key(key));
        }
    });
    let control =
        cloud_ingest::serve::Control { keys, labels: screen::KEYS.map(|(k, l)| (k, l.to_owned())).to_vec() };
    cloud_ingest::pipeline::run(settings, Arc::new(SystemClock), Some(control), stopped).await
}

/// What a data folder remembers of its demo.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Memory {
    /// Where the plant's loop began, and the history.
    anchor: Timestamp,
    /// Plants in it.
    gateways: u32,
}

/// Runs the demo until it is stopped; the exit code says whether the ledger balances.
///
/// # Errors
/// When it cannot start, or a part of it fails.
pub async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let mut demo = Demo::start(options).await?;
    let ended = demo.watch().await;
    let summary = demo.stop().await;
    ended?;
    summary
}

/// The running demo.
struct Demo {
    options: Options,
    memory: Memory,
    layout: Layout,
    /// Held so that no second demo writes to the same folder.
    _lock: fs::File,
    broker: Option<Child>,
    cables: Vec<Cable>,
    agents: Vec<Option<Child>>,
    /// Ports of the agents' metrics.
    agent_metrics: Vec<SocketAddr>,
    cloud: Option<Child>,
    broken: bool,
    events: mpsc::Receiver<(String, Event)>,
    event_sender: mpsc::Sender<(String, Event)>,
    screen: Screen,
}

impl Demo {
    async fn start(options: Options) -> anyhow::Result<Demo> {
        let logs = options.data_dir.join("log");
        fs::create_dir_all(&logs)
            .with_context(|| format!("cannot write to {}; give another with --data-dir", logs.display()))?;
        let lock = lock(&options)?;
        let memory = remember(&options)?;
        // Each is held until all have been found free: no two of them may be the same.
        let mut held = Vec::new();
        for (port, flag) in [
            (options.mqtt_port, "--mqtt-port"),
            (options.pg_port, "--pg-port"),
            (options.http_port, "--http-port"),
        ] {
            held.push(
                TcpListener::bind(loopback(port)).with_context(|| {
                    format!("port {port} of 127.0.0.1 is in use; give another with {flag}")
                })?,
            );
        }
        let agent_metrics = free_ports(memory.gateways as usize)?;
        drop(held);
        let (event_sender, events) = mpsc::channel(256);
        let gateways = memory.gateways as usize;
        let mut demo = Demo {
            screen: Screen::new(&options),
            memory,
            layout: Layout::demo()?,
            _lock: lock,
            broker: None,
            cables: Vec::with_capacity(gateways),
            agents: (0..gateways).map(|_| None).collect(),
            agent_metrics,
            cloud: None,
            broken: false,
            events,
            event_sender,
            options,
        };
        for _ in 0..gateways {
            demo.cables.push(Cable::lay(loopback(demo.options.mqtt_port)).await?);
        }
        demo.start_broker()?;
        demo.start_cloud().await?;
        for gateway in 0..gateways {
            demo.start_agent(gateway).await?;
        }
        Ok(demo)
    }

    fn spawn(&self, name: &str, args: &[String]) -> anyhow::Result<Child> {
        Child::spawn(name, args, &self.options.data_dir.join("log"), &self.event_sender)
    }

    fn start_broker(&mut self) -> anyhow::Result<()> {
        let args = ["broker".to_owned(), loopback(self.options.mqtt_port).to_string()];
        self.broker = Some(self.spawn("broker", &args)?);
        Ok(())
    }

    async fn start_cloud(&mut self) -> anyhow::Result<()> {
        let config = self.options.data_dir.join("cloud-ingest.toml");
        let o = &self.options;
        let text = configs::cloud(&o.data_dir.join("lake"), o.mqtt_port, o.pg_port, o.http_port)?;
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let args = ["cloud".to_owned(), "--config".to_owned(), config.display().to_string()];
        self.cloud = Some(self.spawn("cloud", &args)?);
        let deadline = Instant::now() + Duration::from_secs(60);
        while http::get(loopback(self.options.http_port), "/readyz").await.is_err() {
            if let Some(why) = self.cloud.as_mut().and_then(Child::exited) {
                bail!(why);
            }
            if Instant::now() > deadline {
                bail!(
                    "the cloud side was not ready after 60 s; see {}/log/cloud.log",
                    self.options.data_dir.display()
                );
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    async fn start_agent(&mut self, gateway: usize) -> anyhow::Result<()> {
        let home = self.options.data_dir.join(format!("gateway-{}", gateway + 1));
        fs::create_dir_all(&home).with_context(|| format!("cannot write to {}", home.display()))?;
        let config = home.join("edge-agent.toml");
        agent::install_model(&home)?;
        let (near, metrics) = (self.cables[gateway].near, self.agent_metrics[gateway]);
        let text = configs::agent(&self.layout, gateway, &home, near, metrics)?;
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let args = agent::Options { config, gateway, anchor: self.memory.anchor }.to_args();
        let mut agent = self.spawn(&agent_name(gateway), &args)?;
        if self.broken {
            agent.tell(&Order::Break).await;
        }
        self.agents[gateway] = Some(agent);
        Ok(())
    }

    /// Until somebody stops it, its time is over, or a part of it fails.
    async fn watch(&mut self) -> anyhow::Result<()> {
        let mut keys = screen::keys();
        let mut tick = interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut summary = Summary::default();
        // Set once the history is there.
        let mut end: Option<Instant> = None;
        let mut interrupt = std::pin::pin!(interrupted());
        loop {
            tokio::select! {
                _ = &mut interrupt => return Ok(()),
                () = sleep_until(end.unwrap_or_else(far_future)), if end.is_some() => return Ok(()),
                Some(key) = keys.recv() => if self.press(key).await? { return Ok(()) },
                Some((who, event)) = self.events.recv() => match event {
                    Event::Key(key) => if self.press(key).await? { return Ok(()) },
                    Event::Position { at, live, phase } => summary.position(&who, at, live, phase),
                },
                _ = tick.tick() => {
                    self.check_children()?;
                    let cloud = loopback(self.options.http_port);
                    summary.refresh(cloud, &self.agent_metrics).await;
                    if !summary.history_done && summary.all_live(self.agents.len()) {
                        summary.history_done = summary.silver_has_caught_up(cloud).await;
                        if summary.history_done {
                            self.screen.note("the history is there; from now on it is live");
                            end = self.options.run_for.map(|d| Instant::now() + d);
                        }
                    }
                    self.screen.show(&summary, &self.troubles());
                }
            }
        }
    }

    /// Does what a key or a button says; true when it says to stop.
    async fn press(&mut self, key: char) -> anyhow::Result<bool> {
        match key {
            'q' => return Ok(true),
            'f' if !self.broken => {
                self.broken = true;
                self.tell_agents(&Order::Break).await;
                self.screen.note("f: the reactor's A feed is lost; watch for the anomaly");
            }
            'c' => {
                self.cables.iter().for_each(|cable| cable.set_cut(true));
                self.screen.note("c: the cable is cut; the outbox keeps everything");
            }
            'b' => {
                if let Some(broker) = self.broker.take() {
                    broker.kill().await;
                    self.screen.note("b: the broker is killed, and with it all that it held");
                }
            }
            'k' => {
                for agent in &mut self.agents {
                    if let Some(agent) = agent.take() {
                        agent.kill().await;
                    }
                }
                self.screen.note("k: the agent is killed without warning");
            }
            'r' => self.repair().await?,
            _ => {}
        }
        Ok(false)
    }

    async fn repair(&mut self) -> anyhow::Result<()> {
        self.cables.iter().for_each(|cable| cable.set_cut(false));
        if self.broker.is_none() {
            self.start_broker()?;
        }
        for gateway in 0..self.agents.len() {
            if self.agents[gateway].is_none() {
                self.start_agent(gateway).await?;
            }
        }
        if std::mem::take(&mut self.broken) {
            self.tell_agents(&Order::Repair).await;
        }
        self.screen.note("r: everything is repaired");
        Ok(())
    }

    async fn tell_agents(&mut self, order: &Order) {
        for agent in self.agents.iter_mut().flatten() {
            agent.tell(order).await;
        }
    }

    /// What is broken at the moment, for people.
    fn troubles(&self) -> Vec<&'static str> {
        [
            (self.broken, "reactor broken"),
            (self.cables.iter().any(Cable::is_cut), "cable cut"),
            (self.broker.is_none(), "broker dead"),
            (self.agents.iter().any(Option::is_none), "agent dead"),
        ]
        .into_iter()
        .filter_map(|(is, what)| is.then_some(what))
        .collect()
    }

    fn check_children(&mut self) -> anyhow::Result<()> {
        let children = self.broker.iter_mut().chain(&mut self.cloud).chain(self.agents.iter_mut().flatten());
        match children.filter_map(Child::exited).next() {
            Some(why) => bail!(why),
            None => Ok(()),
        }
    }

    /// In the order in which data flows, each part finishing what it has; then the ledger.
    async fn stop(mut self) -> anyhow::Result<ExitCode> {
        self.screen.close();
        print_line("stopping: the agents hand over what they hold, the cloud refines it to the end");
        for agent in self.agents.iter_mut().filter_map(Option::take) {
            agent.stop(Duration::from_secs(60)).await?;
        }
        if let Some(cloud) = self.cloud.take() {
            cloud.stop(Duration::from_secs(180)).await?;
        }
        if let Some(broker) = self.broker.take() {
            broker.kill().await;
        }
        let lake = self.options.data_dir.join("lake");
        let audit = cloud_ingest::ledger::audit_lake(&configs::store_url(&lake)?, SystemClock.now()).await?;
        print_line(&audit);
        Ok(if audit.balances() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Takes the data folder for this process.
fn lock(options: &Options) -> anyhow::Result<fs::File> {
    let path = options.data_dir.join("demo.lock");
    let file = fs::File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            bail!(
                "another demo runs on {}; stop it, or give another with --data-dir",
                options.data_dir.display()
            )
        }
        Err(fs::TryLockError::Error(e)) => Err(e).with_context(|| format!("locking {}", path.display())),
    }
}

/// Reads `demo.json`, or writes it at the first start.
fn remember(options: &Options) -> anyhow::Result<Memory> {
    let path = options.data_dir.join("demo.json");
    match fs::read_to_string(&path) {
        Ok(text) => {
            let memory: Memory = serde_json::from_str(&text)
                .with_context(|| format!("{} is not a demo's memory", path.display()))?;
            if memory.gateways != options.gateways {
                eprintln!(
                    "{} has {} gateways; --gateways {} is ignored",
                    path.display(),
                    memory.gateways,
                    options.gateways
                );
            }
            Ok(memory)
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            // On a quarter of an hour, as the plant asks (firmware-sim/data/README.md).
            let anchor = (SystemClock.now() - options.backfill).floor(Duration::from_secs(900));
            let memory = Memory { anchor, gateways: options.gateways };
            fs::write(&path, serde_json::to_string_pretty(&memory)?)
                .with_context(|| format!("writing {}", path.display()))?;
            Ok(memory)
        }
        Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
    }
}

fn agent_name(gateway: usize) -> String {
    format!("agent-{}", gateway + 1)
}

pub(crate) fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Addresses that are free now, all different.
fn free_ports(n: usize) -> anyhow::Result<Vec<SocketAddr>> {
    let held: io::Result<Vec<_>> = (0..n).map(|_| TcpListener::bind(loopback(0))).collect();
    let addresses = held.and_then(|held| held.iter().map(TcpListener::local_addr).collect());
    addresses.context("finding free ports")
}

fn far_future() -> Instant {
    Instant::now() + Duration::from_secs(86_400)
}

/// Ends when the process is asked to end: Ctrl-C or SIGTERM.
async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let terminated = async {
        match signal(SignalKind::terminate()) {
            Ok(mut signal) => signal.recv().await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminated => {}
    }
}
