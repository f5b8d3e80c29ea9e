//! From a broker to committed silver and gold.
//!
//! ```text
//! fleet (this program) ──▶ mosquitto ──▶ cloud-ingest run ──▶ lake: bronze, silver, gold
//! ```
//!
//! The fleet obeys `ack` and so cannot run ahead of bronze by more than its windows. Once silver has every reading the
//! cloud is asked to end, which makes gold take its last step; what it has cost until it is gone is what counts. Then
//! the lake is compared with what was sent: by device the number of readings, their times and the sum of their values,
//! in silver and in gold, and no (site, device_id, ts) twice.
//!
//! The bare limit is silver's own data files, read back into batches and written once more, by parquet's own writer as it
//! comes with the table's properties, into memory by one thread of this program: both built as `release`, it is as fast
//! as it gets.
//!
//! `--live` ([`live`]) sends in real time instead, and `--backlog` ([`backlog`]) what has piled up, behind live data.
//!
//! JSON has no `ack`, and its limit is the broker. So that sending takes nothing from taking, the broker queues
//! everything first, twice: for a subscriber that does nothing but acknowledge ([`Null`]), which goes first and
//! measures what the broker delivers, and for the cloud, which then takes the same messages.

mod backlog;
mod compare;
mod latency;
mod live;

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, ensure};
use cloud_ingest::{store::Store, tables::Tables};
use common::{config::SecretRef, telemetry::print_line, time::Timestamp};
use serde::Serialize;
use tempfile::TempDir;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep},
};

use self::compare::{Limit, compare, folder_bytes, limit};
use super::{null::Null, usage::Usage};
use crate::{
    chaos::configs::broker,
    demo::{configs::store_url, loopback},
    fleet::{self, Format, Sent, Told},
    http,
    program::{Program, ours, quiet_ports, theirs},
};

/// Devices of one gateway.
const TO_A_GATEWAY: u32 = 100;
/// How often the cloud is asked where it is, and how often people are told.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const TELL_EVERY: Duration = Duration::from_secs(2);
/// A program gets so long to begin, and the cloud to end.
const PATIENCE: Duration = Duration::from_secs(120);
/// The slowest that is waited for, in messages a second.
const SLOWEST: u64 = 20;

/// How the cloud is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Devices, a hundred to a gateway
    #[arg(long, value_name = "M", default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    devices: u32,
    /// Readings that all of them send together; with --backlog twice, in order and as a backlog
    #[arg(long, value_name = "TOTAL", conflicts_with = "live", default_value_t = 10_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    readings: u64,
    /// Readings in a message
    #[arg(long, value_name = "ROWS", conflicts_with = "live", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    batch: u32,
    /// What messages are made of
    #[arg(long, default_value = "arrow", conflicts_with_all = ["live", "backlog"])]
    format: Format,
    /// In real time for so long, instead of as fast as they are taken: how soon SQL has them, and what memory does
    #[arg(long, value_name = "DURATION", value_parser = common::time::duration::parse, conflicts_with = "backlog")]
    live: Option<Duration>,
    /// What was measured in so long before now, sent behind live data of the same devices
    #[arg(long, value_name = "DURATION", value_parser = common::time::duration::parse)]
    backlog: Option<Duration>,
    /// Readings a second of a device, of live data
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    hz: u32,
    /// How often a gateway seals a message of live data
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = common::time::duration::parse)]
    seal: Duration,
    /// So much of the backlog is stored already, sent by another message
    #[arg(long, value_name = "PERCENT", default_value_t = 0, requires = "backlog", value_parser = clap::value_parser!(u32).range(0..=100))]
    again: u32,
    /// The cloud begins anew before the backlog: then it knows of what is stored only what it finds in silver
    #[arg(long, requires = "backlog")]
    restart: bool,
    /// The cloud that is measured; without it the one beside this program
    #[arg(long, value_name = "PATH")]
    cloud: Option<PathBuf>,
    /// Where the lake, the broker's memory and the logs are kept; without it in a folder that is removed
    #[arg(long, value_name = "D")]
    data_dir: Option<PathBuf>,
}

/// The last line of the output.
#[derive(Serialize)]
struct Report {
    readings: u64,
    devices: u32,
    messages: u64,
    /// From the first publish until silver had everything.
    seconds: f64,
    /// Until gold had it too, and the cloud had ended.
    seconds_to_the_end: f64,
    /// Of the cloud, from its start to its end.
    cpu_seconds: f64,
    peak_rss_bytes: u64,
    peak_pss_bytes: u64,
    readings_per_second: f64,
    readings_per_cpu_second: f64,
    /// Writing silver's batches, and nothing else, in one thread of this program.
    limit_readings_per_cpu_second: f64,
    /// The cloud's rate in parts of the limit.
    of_limit: f64,
    /// Of JSON: messages a second that the broker delivers to whoever only acknowledges them.
    #[serde(skip_serializing_if = "Option::is_none")]
    broker_messages_per_second: Option<f64>,
    /// Of JSON: the cloud's rate in parts of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    of_broker: Option<f64>,
    bronze_bytes_per_reading: f64,
    silver_bytes_per_reading: f64,
    plans: u64,
    stored: u64,
    duplicates: u64,
    quarantined: u64,
}

/// Prepares, runs, compares, and prints the report.
pub(super) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    match (options.live, options.backlog) {
        (Some(lasting), _) => return live::run(options, lasting).await,
        (None, Some(reach)) => return backlog::run(options, reach).await,
        (None, None) => {}
    }
    let mut bench = Bench::begin(options).await?;
    let sent = bench.load().await?;
    let truth = fleet::truth(&bench.fleet(), sent.start)?;
    let tables = Tables::open(&Store::open(&bench.store)?).await?;
    let right = bench.is_right(&tables, &truth).await?;
    eprintln!("writing silver once more");
    let limit = limit(&tables).await?;
    let balanced = bench.report(&sent, &limit)?;
    Ok(if right && balanced { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The programs under load.
struct Bench {
    options: Options,
    store: String,
    lake: PathBuf,
    mqtt: u16,
    http: u16,
    broker: Program,
    cloud: Program,
    begun: Instant,
    usage: Usage,
    seen: Seen,
    to_silver: Duration,
    to_the_end: Duration,
    /// How long the broker took to deliver everything to somebody who does nothing.
    null: Option<Duration>,
    /// Removed when this is dropped.
    _scratch: Option<TempDir>,
}

/// What the cloud's metrics say, in readings.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    stored: u64,
    duplicates: u64,
    quarantined: u64,
    plans: u64,
}

impl Seen {
    fn of(metrics: &str) -> Seen {
        let readings = |label: &str| http::metric(metrics, "tailrace_cloud_readings_total", label) as u64;
        Seen {
            stored: readings("outcome=\"stored\""),
            duplicates: readings("outcome=\"duplicate\""),
            quarantined: readings("outcome=\"quarantined\""),
            plans: http::metric(metrics, "tailrace_cloud_refine_plan", "") as u64,
        }
    }

    fn all(self) -> u64 {
        self.stored + self.duplicates + self.quarantined
    }
}

impl Bench {
    /// Starts broker and cloud, and waits until the cloud has subscribed.
    async fn begin(options: Options) -> anyhow::Result<Bench> {
        let (dir, scratch) = match &options.data_dir {
            Some(dir) => {
                let dir = std::path::absolute(dir).context("finding the data folder")?;
                let again = "give another with --data-dir, or remove it";
                ensure!(!dir.join("lake").exists(), "{} is from an earlier run; {again}", dir.display());
                (dir, None)
            }
            None => {
                let made = tempfile::Builder::new().prefix("tailrace-bench-").tempdir();
                let made = made.context("making a folder for the lake")?;
                (made.path().to_owned(), Some(made))
            }
        };
        let (lake, log) = (dir.join("lake"), dir.join("log"));
        for folder in [&log, &dir.join("broker")] {
            fs::create_dir_all(folder).with_context(|| format!("cannot write to {}", folder.display()))?;
        }
        let (store, [mqtt, pg, http]) = (store_url(&lake)?, quiet_ports()?);
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            anyhow::Ok(path)
        };
        let mut broker = broker(&dir.join("broker"), loopback(mqtt));
        if options.format == Format::Json {
            // As shipped but for what may wait.
            broker += "max_queued_messages 0\nmax_queued_bytes 0\n";
        }
        let broker_conf = write("mosquitto.conf", broker)?;
        // Everything that is not named here is as shipped.
        let config = format!(
            "[store]\nurl = \"{store}\"\n\n[mqtt]\nurl = \"mqtt://127.0.0.1:{mqtt}\"\n\n\
             [serve]\npg_port = {pg}\nhttp_port = {http}\n"
        );
        let config = write("cloud-ingest.toml", config)?;
        let path = match &options.cloud {
            Some(path) => path.clone(),
            None => ours("cloud-ingest")?,
        };
        let mosquitto = theirs("mosquitto", "mosquitto")?;
        eprintln!("{}\n{}", mosquitto.display(), path.display());
        let args = ["run".as_ref(), "--config".as_ref(), config.as_path()];
        let mut bench = Bench {
            broker: Program::new(
                "mosquitto",
                mosquitto,
                &["-c".as_ref(), &broker_conf],
                log.join("mosquitto.log"),
            )?,
            cloud: Program::new("cloud-ingest", path, &args, log.join("cloud-ingest.log"))?,
            options,
            store,
            lake,
            mqtt,
            http,
            begun: Instant::now(),
            usage: Usage::default(),
            seen: Seen::default(),
            to_silver: Duration::ZERO,
            to_the_end: Duration::ZERO,
            null: None,
            _scratch: scratch,
        };
        bench.broker.start()?;
        bench.broker.listens(loopback(mqtt), PATIENCE).await?;
        bench.cloud.start()?;
        bench.connected().await?;
        // Its subscriptions follow the connection at once.
        sleep(Duration::from_secs(1)).await;
        Ok(bench)
    }

    /// Waits until the cloud has its connection.
    async fn connected(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let metrics = http::get(loopback(self.http), "/metrics").await.unwrap_or_default();
            if http::metric(&metrics, "tailrace_cloud_mqtt_connected", "") > 0.0 {
                return Ok(());
            }
            self.cloud.check()?;
            ensure!(Instant::now() < deadline, "cloud-ingest is not connected after {PATIENCE:?}");
            sleep(LOOK_EVERY).await;
        }
    }

    fn fleet(&self) -> fleet::Options {
        let Options { devices, readings, batch, format, .. } = self.options;
        let least = if self.options.backlog.is_some() { backlog::GATEWAYS.min(devices) } else { 1 };
        let gateways = devices.div_ceil(TO_A_GATEWAY).max(least);
        fleet::Options {
            url: format!("mqtt://127.0.0.1:{}", self.mqtt),
            root: common::wire::DEFAULT_ROOT.to_owned(),
            gateways,
            devices: devices.div_ceil(gateways),
            readings,
            batch,
            format,
            rate: None,
            seed: 1,
            start: None,
            interval: Duration::from_secs(1),
            first: 0,
            password: SecretRef::default(),
        }
    }

    /// Sends everything, and follows the cloud until it has ended.
    async fn load(&mut self) -> anyhow::Result<Sent> {
        match self.options.format {
            Format::Arrow => {
                self.begun = Instant::now();
                let fleet = tokio::spawn(fleet::send(self.fleet(), None));
                let sent = self.follow(fleet, self.options.readings).await?;
                self.end().await?;
                Ok(sent)
            }
            Format::Json => self.queued().await,
        }
    }

    /// Live data of all devices from `start` on, for so long, in messages as gateways seal them.
    fn paced(&self, start: Timestamp, lasting: Duration) -> fleet::Options {
        let Options { hz, seal, .. } = self.options;
        let fleet = self.fleet();
        let messages = |span: Duration| (span.as_secs_f64() * f64::from(hz)).round().max(1.0);
        let (of_gateway, all) =
            (f64::from(fleet.devices), f64::from(fleet.devices) * f64::from(fleet.gateways));
        fleet::Options {
            readings: (messages(lasting) * all) as u64,
            batch: (messages(seal) * of_gateway) as u32,
            rate: Some(f64::from(hz) * all),
            // What is sealed has been measured by then.
            start: Some(start - seal),
            interval: Duration::from_secs(1) / hz,
            ..fleet
        }
    }

    /// The same with a broker that holds everything before the cloud begins.
    async fn queued(&mut self) -> anyhow::Result<Sent> {
        let options = self.fleet();
        let null = Null::subscribe(loopback(self.mqtt), &options.root).await?;
        self.end_cloud().await?;
        eprintln!("the broker takes {} readings", self.options.readings);
        let sent = fleet::send(options, None).await?;
        let took = null.take(sent.messages).await?;
        eprintln!("it delivers them in {:.1} s to somebody who does nothing", took.as_secs_f64());
        self.null = Some(took);
        self.start_cloud()?;
        self.follow(tokio::spawn(async move { Ok(sent) }), self.options.readings).await?;
        self.end().await?;
        Ok(sent)
    }

    /// Starts the cloud, once more, and counts anew.
    fn start_cloud(&mut self) -> anyhow::Result<()> {
        (self.usage, self.seen) = (Usage::default(), Seen::default());
        self.begun = Instant::now();
        self.cloud.start()
    }

    /// Waits until the fleet has sent, and the cloud has refined so many readings.
    async fn follow(
        &mut self,
        mut fleet: JoinHandle<anyhow::Result<Sent>>,
        readings: u64,
    ) -> anyhow::Result<Sent> {
        let messages = readings.div_ceil(u64::from(self.options.batch));
        let deadline = Instant::now() + PATIENCE + Duration::from_secs(messages / SLOWEST);
        let (mut sent, mut told) = (None, self.begun);
        while sent.is_none() || self.seen.all() < readings {
            tokio::select! {
                done = &mut fleet, if sent.is_none() => sent = Some(done.context("the fleet's task")??),
                () = sleep(LOOK_EVERY) => {}
            }
            self.look(&mut told, readings).await?;
            ensure!(
                Instant::now() < deadline,
                "only {} of {readings} readings came in time",
                self.seen.all()
            );
        }
        self.to_silver = self.begun.elapsed();
        sent.context("the fleet has not sent")
    }

    /// Ends the cloud, which makes gold take its last step, and then the broker.
    async fn end(&mut self) -> anyhow::Result<()> {
        self.end_cloud().await?;
        self.broker.terminate().await?;
        ensure!(self.broker.ended_within(PATIENCE).await?, "mosquitto did not end within {PATIENCE:?}");
        Ok(())
    }

    /// Asks the cloud to end, and counts what it costs until it is gone.
    async fn end_cloud(&mut self) -> anyhow::Result<()> {
        self.cloud.terminate().await?;
        let deadline = Instant::now() + PATIENCE;
        while !self.usage.ended {
            sleep(Duration::from_millis(5)).await;
            self.usage.look(self.cloud.pid().context("the cloud has no pid")?, false)?;
            ensure!(Instant::now() < deadline, "cloud-ingest did not end within {PATIENCE:?}");
        }
        ensure!(self.cloud.ended_within(LOOK_EVERY).await?, "a zombie does not end");
        self.to_the_end = self.begun.elapsed();
        Ok(())
    }

    /// CPU time of the cloud so far.
    fn cpu(&mut self) -> anyhow::Result<Duration> {
        self.usage.look(self.cloud.pid().context("the cloud has no pid")?, false)?;
        Ok(self.usage.cpu)
    }

    async fn look(&mut self, told: &mut Instant, of: u64) -> anyhow::Result<()> {
        let tells = told.elapsed() >= TELL_EVERY;
        self.usage.look(self.cloud.pid().context("the cloud has no pid")?, tells)?;
        self.broker.check()?;
        ensure!(!self.usage.ended, "cloud-ingest has ended; see its log in {}", self.lake.display());
        if let Ok(text) = http::get(loopback(self.http), "/metrics").await {
            self.seen = Seen::of(&text);
        }
        if tells {
            *told = Instant::now();
            let (seconds, cpu) = (self.begun.elapsed().as_secs_f64(), self.usage.cpu.as_secs_f64());
            let (seen, mb) = (self.seen.all(), self.usage.peak_rss as f64 / 1e6);
            eprintln!("{seconds:>5.0} s  {seen} of {of} in silver  {cpu:.1} s of CPU  {mb:.0} MB");
        }
        Ok(())
    }

    /// Whether the lake holds what was sent, and nothing else; says what is wrong.
    async fn is_right(&self, tables: &Tables, truth: &[Told]) -> anyhow::Result<bool> {
        eprintln!("comparing the lake with what was sent");
        let wrong = compare(tables, truth).await?;
        for what in &wrong {
            eprintln!("failed: {what}");
        }
        Ok(wrong.is_empty())
    }

    /// Prints the report; whether every reading is stored.
    fn report(&self, sent: &Sent, limit: &Limit) -> anyhow::Result<bool> {
        let (readings, cpu) = (self.options.readings as f64, self.usage.cpu.as_secs_f64());
        let limit_rate = limit.rows as f64 / limit.cpu.as_secs_f64();
        let bronze = folder_bytes(&self.lake.join("bronze"))?;
        print_line(serde_json::to_string(&Report {
            readings: self.options.readings,
            devices: self.options.devices,
            messages: sent.messages,
            seconds: self.to_silver.as_secs_f64(),
            seconds_to_the_end: self.to_the_end.as_secs_f64(),
            cpu_seconds: cpu,
            peak_rss_bytes: self.usage.peak_rss,
            peak_pss_bytes: self.usage.peak_pss,
            readings_per_second: readings / self.to_silver.as_secs_f64(),
            readings_per_cpu_second: readings / cpu,
            limit_readings_per_cpu_second: limit_rate,
            of_limit: readings / cpu / limit_rate,
            broker_messages_per_second: self.null.map(|took| sent.messages as f64 / took.as_secs_f64()),
            of_broker: self.null.map(|took| took.as_secs_f64() / self.to_silver.as_secs_f64()),
            bronze_bytes_per_reading: bronze as f64 / readings,
            silver_bytes_per_reading: limit.bytes as f64 / readings,
            plans: self.seen.plans,
            stored: self.seen.stored,
            duplicates: self.seen.duplicates,
            quarantined: self.seen.quarantined,
        })?);
        Ok(self.seen.stored == self.options.readings)
    }
}
