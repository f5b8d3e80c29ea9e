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
//! The bare limit is silver's own data files, read back into batches and written once more, with the same writer
//! properties, into memory by one thread of this program.
//!
//! JSON has no `ack`, and its limit is the broker. So that sending takes nothing from taking, the broker queues
//! everything first, twice: for a subscriber that does nothing but acknowledge ([`Null`]), which goes first and
//! measures what the broker delivers, and for the cloud, which then takes the same messages.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use arrow::{
    array::{AsArray as _, RecordBatch},
    datatypes::{Float64Type, Int64Type},
};
use cloud_ingest::{
    lake::Table,
    store::Store,
    tables::{Tables, writer_properties},
};
use common::{config::SecretRef, telemetry::print_line};
use object_store::ObjectStoreExt as _;
use parquet::arrow::{ArrowWriter, arrow_reader::ParquetRecordBatchReaderBuilder};
use serde::Serialize;
use tempfile::TempDir;
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep},
};

use super::{
    null::Null,
    usage::{Usage, thread_cpu},
};
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
    /// Readings that all of them send together
    #[arg(long, value_name = "TOTAL", default_value_t = 10_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    readings: u64,
    /// Readings in a message
    #[arg(long, value_name = "ROWS", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    batch: u32,
    /// What messages are made of
    #[arg(long, default_value = "arrow")]
    format: Format,
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
    let mut bench = Bench::begin(options).await?;
    let sent = bench.load().await?;
    let truth = fleet::truth(&bench.fleet(), sent.start)?;
    eprintln!("comparing the lake with what was sent, and writing silver once more");
    let tables = Tables::open(&Store::open(&bench.store)?).await?;
    let wrong = compare(&tables, &truth).await?;
    for what in &wrong {
        eprintln!("failed: {what}");
    }
    let limit = limit(&tables).await?;
    let balanced = bench.report(&sent, &limit)?;
    Ok(if wrong.is_empty() && balanced { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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
        let gateways = devices.div_ceil(TO_A_GATEWAY);
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
            password: SecretRef::default(),
        }
    }

    /// Sends everything, and follows the cloud until it has ended.
    async fn load(&mut self) -> anyhow::Result<Sent> {
        match self.options.format {
            Format::Arrow => {
                let fleet = tokio::spawn(fleet::send(self.fleet()));
                self.begun = Instant::now();
                self.follow(fleet).await
            }
            Format::Json => self.queued().await,
        }
    }

    /// The same with a broker that holds everything before the cloud begins.
    async fn queued(&mut self) -> anyhow::Result<Sent> {
        let options = self.fleet();
        let null = Null::subscribe(loopback(self.mqtt), &options.root).await?;
        self.end_cloud().await?;
        eprintln!("the broker takes {} readings", self.options.readings);
        let sent = fleet::send(options).await?;
        let took = null.take(sent.messages).await?;
        eprintln!("it delivers them in {:.1} s to somebody who does nothing", took.as_secs_f64());
        self.null = Some(took);
        (self.usage, self.seen) = (Usage::default(), Seen::default());
        self.begun = Instant::now();
        self.cloud.start()?;
        self.follow(tokio::spawn(async move { Ok(sent) })).await
    }

    /// Waits until silver has everything, and the cloud has ended.
    async fn follow(&mut self, mut fleet: JoinHandle<anyhow::Result<Sent>>) -> anyhow::Result<Sent> {
        let readings = self.options.readings;
        let messages = readings.div_ceil(u64::from(self.options.batch));
        let deadline = Instant::now() + PATIENCE + Duration::from_secs(messages / SLOWEST);
        let (mut sent, mut told) = (None, self.begun);
        while sent.is_none() || self.seen.all() < readings {
            tokio::select! {
                done = &mut fleet, if sent.is_none() => sent = Some(done.context("the fleet's task")??),
                () = sleep(LOOK_EVERY) => {}
            }
            self.look(&mut told).await?;
            self.broker.check()?;
            ensure!(!self.usage.ended, "cloud-ingest has ended; see its log in {}", self.lake.display());
            ensure!(
                Instant::now() < deadline,
                "only {} of {readings} readings came in time",
                self.seen.all()
            );
        }
        self.to_silver = self.begun.elapsed();
        self.end_cloud().await?;
        self.to_the_end = self.begun.elapsed();
        self.broker.terminate().await?;
        ensure!(self.broker.ended_within(PATIENCE).await?, "mosquitto did not end within {PATIENCE:?}");
        sent.context("the fleet has not sent")
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
        Ok(())
    }

    async fn look(&mut self, told: &mut Instant) -> anyhow::Result<()> {
        let tells = told.elapsed() >= TELL_EVERY;
        self.usage.look(self.cloud.pid().context("the cloud has no pid")?, tells)?;
        if let Ok(text) = http::get(loopback(self.http), "/metrics").await {
            self.seen = Seen::of(&text);
        }
        if tells {
            *told = Instant::now();
            let (seconds, cpu) = (self.begun.elapsed().as_secs_f64(), self.usage.cpu.as_secs_f64());
            let (seen, of, mb) = (self.seen.all(), self.options.readings, self.usage.peak_rss as f64 / 1e6);
            eprintln!("{seconds:>5.0} s  {seen} of {of} in silver  {cpu:.1} s of CPU  {mb:.0} MB");
        }
        Ok(())
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

/// What the lake does not hold as it was sent; empty when all is well.
async fn compare(tables: &Tables, truth: &[Told]) -> anyhow::Result<Vec<String>> {
    const SILVER: &str = "select site, device_id, count(*) n, count(distinct ts) times, sum(value) total, \
                          cast(min(ts) as bigint) first, cast(max(ts) as bigint) last \
                          from silver.sensor_readings group by site, device_id";
    const GOLD: &str = "select site, device_id, sum(count) n, sum(count) times, sum(mean * count) total, \
                        cast(null as bigint) first, cast(null as bigint) last \
                        from gold.hourly_aggregates group by site, device_id";
    let mut wrong = Vec::new();
    let session = tables.session().await?;
    for (layer, sql) in [("silver", SILVER), ("gold", GOLD)] {
        let mut awaited: HashMap<(String, String), &Told> =
            truth.iter().map(|told| ((told.site.to_owned(), told.device.clone()), told)).collect();
        for batch in session.sql(sql).await?.collect().await? {
            for row in 0..batch.num_rows() {
                let text = |i: usize| batch.column(i).as_string::<i32>().value(row);
                match awaited.remove(&(text(0).to_owned(), text(1).to_owned())) {
                    Some(told) if agrees(&batch, row, told) => {}
                    Some(told) => wrong.push(format!("{layer}: {} is not what was sent: {told:?}", text(1))),
                    None => wrong.push(format!("{layer}: nobody sent {}/{}", text(0), text(1))),
                }
            }
        }
        wrong.extend(awaited.values().map(|told| format!("{layer}: {} is missing", told.device)));
    }
    let hours = "select count(*) - count(distinct (hour, site, device_id)) from gold.hourly_aggregates";
    for batch in session.sql(hours).await?.collect().await? {
        if batch.column(0).as_primitive::<Int64Type>().value(0) != 0 {
            wrong.push("gold: an hour of a device stands there twice".to_owned());
        }
    }
    let found = wrong.len();
    wrong.truncate(10);
    if found > 10 {
        wrong.push(format!("and {} more", found - 10));
    }
    Ok(wrong)
}

fn agrees(batch: &RecordBatch, row: usize, told: &Told) -> bool {
    let number = |i: usize| {
        let column = batch.column(i).as_primitive::<Int64Type>();
        arrow::array::Array::is_valid(column, row).then(|| column.value(row))
    };
    let total = batch.column(4).as_primitive::<Float64Type>().value(row);
    let count = i64::try_from(told.count).ok();
    number(2) == count
        && number(3) == count
        && (total - told.sum).abs() <= 1e-9 * told.sum.abs()
        && number(5).is_none_or(|first| first == told.first.as_micros())
        && number(6).is_none_or(|last| last == told.last.as_micros())
}

/// The bare writer.
#[derive(Debug, Default)]
struct Limit {
    rows: u64,
    /// Of silver's files as they are.
    bytes: u64,
    cpu: Duration,
}

async fn limit(tables: &Tables) -> anyhow::Result<Limit> {
    let table = Table::SensorReadings;
    let snapshot = tables.snapshot(table).await?.context("silver/sensor_readings is not there")?;
    let mut limit = Limit::default();
    let paths: Vec<_> = snapshot.snapshot()?.log_data().iter().map(|file| file.path().into_owned()).collect();
    for path in paths {
        let path = object_store::path::Path::from(format!("{}/{path}", table.path()));
        let bytes = tables.store().objects().get(&path).await?.bytes().await?;
        limit.bytes += bytes.len() as u64;
        let (rows, cpu) = spawn_blocking(move || {
            let reader = ParquetRecordBatchReaderBuilder::try_new(bytes)?.with_batch_size(64 * 1024);
            let schema = reader.schema().clone();
            let batches = reader.build()?.collect::<Result<Vec<_>, _>>()?;
            let before = thread_cpu()?;
            let mut writer = ArrowWriter::try_new(Vec::new(), schema, Some(writer_properties(table)))?;
            batches.iter().try_for_each(|batch| writer.write(batch))?;
            std::hint::black_box(writer.into_inner()?);
            let rows = batches.iter().map(|batch| batch.num_rows() as u64).sum::<u64>();
            anyhow::Ok((rows, thread_cpu()?.saturating_sub(before)))
        })
        .await??;
        limit.rows += rows;
        limit.cpu += cpu;
    }
    Ok(limit)
}

/// Bytes of all files below a folder.
fn folder_bytes(folder: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        let about = entry.metadata()?;
        bytes += if about.is_dir() { folder_bytes(&entry.path())? } else { about.len() };
    }
    Ok(bytes)
}
