//! In real time, to a mosquitto by TLS.
//!
//! ```text
//! rows.csv ──▶ edge-agent run ──TLS──▶ wire (counts bytes) ──TLS──▶ mosquitto ──▶ subscriber (this program)
//! ```
//!
//! The agent is in broker mode: it forgets what the broker has acknowledged, so its outbox stays small, as in the field.
//! What goes over the wire is counted between the two, encrypted: records and handshakes of TLS, but no headers of TCP
//! and IP. The file ends after the wanted time, and with it the agent, by itself: so every value of the file must have
//! reached the subscriber.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, ensure};
use common::{
    telemetry::print_line,
    time::{Clock as _, SystemClock},
    wire::{self, DEFAULT_ROOT, Identity, Lane, Stream, Topic},
};
use rumqttc::v5::{
    AsyncClient, Event, EventLoop, Incoming, MqttOptions,
    mqttbytes::{QoS, v5::Publish},
};
use serde::Serialize;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    process::Command,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use super::{
    Bench, Options, configs,
    counts::{Counted, Seen},
    usage::Usage,
};
use crate::{
    chaos::configs::broker,
    demo::loopback,
    http,
    program::{Program, quiet_ports, theirs},
};

/// As it ships.
const CERTIFICATES: &str = include_str!("../../../deploy/certificates.sh");
/// How often the agent's memory is looked at, and how often people are told.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const TELL_EVERY: Duration = Duration::from_secs(10);
/// The broker, or an agent at the end of its file, gets so long.
const PATIENCE: Duration = Duration::from_secs(30);
/// Values that are written to the table in a second, at least.
const WRITES: u64 = 200_000;

/// The last line of the output.
#[derive(Serialize)]
struct Report {
    /// Values in the table.
    readings: u64,
    devices: usize,
    hz: u32,
    /// From the agent's start to its end.
    seconds: f64,
    cpu_seconds: f64,
    /// Of one core.
    cpu_percent: f64,
    peak_rss_bytes: u64,
    peak_pss_bytes: u64,
    /// From the agent's start until the broker passed on its first message, and its first readings.
    first_publish_seconds: f64,
    first_readings_seconds: f64,
    /// Encrypted, from the agent and to it.
    wire_bytes: u64,
    wire_bytes_back: u64,
    wire_bytes_per_reading: f64,
    /// Of all lanes.
    payload_bytes_per_reading: f64,
    messages: u64,
    scores: u64,
    #[serde(flatten)]
    counted: Counted,
}

/// Prepares, runs, and prints the report.
pub(super) async fn run(options: &Options, lasting: Duration) -> anyhow::Result<ExitCode> {
    let rows = lasting.as_secs() * u64::from(options.hz);
    let mut bench = Bench::new(options, SystemClock.now().floor(Duration::from_secs(1)), rows)?;
    let [plain, encrypted, metrics] = quiet_ports()?;
    let mut mosquitto = start_broker(&bench, loopback(plain), loopback(encrypted)).await?;
    let wire = Wire::begin(loopback(encrypted)).await?;
    let ca = bench.dir.join("certs/ca.crt");
    let delivery = format!(
        "[mqtt]\nurl = \"mqtts://{}\"\nca = {}\n\n[uplink]\nmode = \"broker\"\ndrain = \"20s\"\n",
        wire.at,
        crate::demo::configs::quoted(&ca)?
    );
    let home = bench.dir.join("agent");
    bench.prepare(configs::agent(&home, &bench.rows, &bench.table, loopback(metrics), &delivery)?).await?;
    // The first row is due when the agent starts.
    let setup = Duration::from_secs(2 + bench.table.readings() / WRITES);
    bench.table.start = (SystemClock.now() + setup).floor(Duration::from_secs(1));
    bench.write_rows()?;
    let heard = Subscriber::begin(loopback(plain)).await?;
    sleep(bench.table.start.since(SystemClock.now())).await;
    let run = live(&bench, loopback(metrics), lasting).await?;
    // What the agent sent last may still be on its way through the broker.
    sleep(Duration::from_secs(1)).await;
    let heard = heard.end().await?;
    mosquitto.terminate().await?;
    ensure!(mosquitto.ended_within(PATIENCE).await?, "mosquitto did not end within {PATIENCE:?}");
    report(&bench, &run, &heard, &wire)
}

/// A mosquitto with a throw-away authority; `plain` is for the subscriber.
async fn start_broker(bench: &Bench, plain: SocketAddr, encrypted: SocketAddr) -> anyhow::Result<Program> {
    let (home, certs) = (bench.dir.join("broker"), bench.dir.join("certs"));
    fs::create_dir_all(&home).with_context(|| format!("cannot write to {}", home.display()))?;
    theirs("openssl", "openssl")?;
    let host = encrypted.ip().to_string();
    let script =
        ["-c".as_ref(), CERTIFICATES.as_ref(), "certificates.sh".as_ref(), certs.as_os_str(), host.as_ref()];
    let made = Command::new("bash").args(script).output().await.context("running bash")?;
    ensure!(made.status.success(), "certificates.sh: {}", String::from_utf8_lossy(&made.stderr));
    let mut config = broker(&home, plain);
    config += &format!(
        "listener {} {}\ncertfile {certs}/server.crt\nkeyfile {certs}/server.key\n",
        encrypted.port(),
        encrypted.ip(),
        certs = certs.display()
    );
    let path = bench.dir.join("mosquitto.conf");
    fs::write(&path, config).with_context(|| format!("writing {}", path.display()))?;
    let args = ["-c".as_ref(), path.as_path()];
    let log = bench.dir.join("log/mosquitto.log");
    let mut mosquitto = Program::new("mosquitto", theirs("mosquitto", "mosquitto")?, &args, log)?;
    mosquitto.start()?;
    mosquitto.listens(plain, PATIENCE).await?;
    Ok(mosquitto)
}

/// What the agent did.
#[derive(Debug)]
struct Run {
    began: Instant,
    lasted: Duration,
    usage: Usage,
    seen: Seen,
}

/// Runs the agent until it ends by itself.
async fn live(bench: &Bench, metrics: SocketAddr, lasting: Duration) -> anyhow::Result<Run> {
    let mut agent = bench.program("run", &[])?;
    let began = Instant::now();
    agent.start()?;
    let pid = agent.pid().context("the agent has no pid")?;
    let mut run = Run { began, lasted: Duration::ZERO, usage: Usage::default(), seen: Seen::default() };
    let mut told = began;
    loop {
        let tells = told.elapsed() >= TELL_EVERY;
        run.usage.look(pid, tells || run.lasted.is_zero())?;
        run.lasted = began.elapsed();
        if run.usage.ended {
            ensure!(agent.ended_within(PATIENCE).await?, "a zombie does not end");
            return Ok(run);
        }
        // Seldom: to answer costs the agent something.
        let near_the_end = run.lasted + Duration::from_secs(3) > lasting;
        if (tells || near_the_end)
            && let Ok(text) = http::get(metrics, "/metrics").await
        {
            run.seen = Seen::of(&text);
        }
        if tells {
            told = Instant::now();
            let (seconds, cpu) = (run.lasted.as_secs_f64(), run.usage.cpu.as_secs_f64());
            let rss = run.usage.peak_rss as f64 / 1e6;
            eprintln!("{seconds:>5.0} s  {} sealed  {cpu:.2} s of CPU  {rss:.1} MB", run.seen.counted.sealed);
        }
        ensure!(run.lasted < lasting + 2 * PATIENCE, "the agent does not end after its file");
        sleep(LOOK_EVERY).await;
    }
}

/// Bytes that passed between agent and broker.
struct Wire {
    at: SocketAddr,
    to_broker: Arc<AtomicU64>,
    to_agent: Arc<AtomicU64>,
}

impl Wire {
    async fn begin(broker: SocketAddr) -> anyhow::Result<Wire> {
        let listener = TcpListener::bind(loopback(0)).await.context("listening for the agent")?;
        let at = listener.local_addr()?;
        let wire = Wire { at, to_broker: Arc::default(), to_agent: Arc::default() };
        let (up, down) = (Arc::clone(&wire.to_broker), Arc::clone(&wire.to_agent));
        tokio::spawn(async move {
            while let Ok((agent, _)) = listener.accept().await {
                let Ok(broker) = TcpStream::connect(broker).await else { continue };
                let _ = (agent.set_nodelay(true), broker.set_nodelay(true));
                let ((from_agent, to_agent), (from_broker, to_broker)) =
                    (agent.into_split(), broker.into_split());
                tokio::spawn(pass(from_agent, to_broker, Arc::clone(&up)));
                tokio::spawn(pass(from_broker, to_agent, Arc::clone(&down)));
            }
        });
        Ok(wire)
    }
}

/// Passes on and counts, until either side ends.
async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    count: Arc<AtomicU64>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        count.fetch_add(read as u64, Ordering::Relaxed);
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

/// What came out of the broker.
#[derive(Debug, Default)]
struct Heard {
    first: Option<Instant>,
    first_readings: Option<Instant>,
    seen: BTreeSet<(Lane, u64)>,
    /// Of the readings lane.
    rows: u64,
    payload_bytes: u64,
    counted: Counted,
}

struct Subscriber {
    client: AsyncClient,
    listening: JoinHandle<anyhow::Result<Heard>>,
}

impl Subscriber {
    async fn begin(broker: SocketAddr) -> anyhow::Result<Subscriber> {
        let mut options = MqttOptions::new("bench", broker.ip().to_string(), broker.port());
        options.set_max_packet_size(Some(4 * 1024 * 1024));
        let (client, mut events) = AsyncClient::new(options, 8);
        client.subscribe(format!("{DEFAULT_ROOT}/#"), QoS::AtMostOnce).await?;
        let subscribed = async {
            while !matches!(events.poll().await?, Event::Incoming(Incoming::SubAck(_))) {}
            anyhow::Ok(())
        };
        timeout(PATIENCE, subscribed).await.context("subscribing")??;
        Ok(Subscriber { client, listening: tokio::spawn(listen(events)) })
    }

    async fn end(self) -> anyhow::Result<Heard> {
        self.client.disconnect().await?;
        timeout(PATIENCE, self.listening).await.context("saying goodbye to the broker")??
    }
}

/// Until the client says goodbye.
async fn listen(mut events: EventLoop) -> anyhow::Result<Heard> {
    let mut heard = Heard::default();
    loop {
        match events.poll().await.context("listening to the broker")? {
            Event::Incoming(Incoming::Publish(publish)) => heard.hear(&publish)?,
            Event::Outgoing(rumqttc::Outgoing::Disconnect) => return Ok(heard),
            _ => {}
        }
    }
}

impl Heard {
    fn hear(&mut self, publish: &Publish) -> anyhow::Result<()> {
        let now = Instant::now();
        let topic = String::from_utf8_lossy(&publish.topic);
        self.first.get_or_insert(now);
        let Some(Topic { stream: Stream::Lane(lane), .. }) = Topic::parse(DEFAULT_ROOT, &topic) else {
            return Ok(());
        };
        let properties = publish.properties.as_ref().context("a message without properties")?;
        let identity = Identity::from_properties(&properties.user_properties)?;
        if !self.seen.insert((lane, identity.seq)) {
            return Ok(());
        }
        self.payload_bytes += publish.payload.len() as u64;
        match lane {
            Lane::Readings => {
                self.first_readings.get_or_insert(now);
                self.rows += identity.rows;
            }
            Lane::Control => self.counted.declare(&wire::decode(lane, &publish.payload)?),
            Lane::Aggregates | Lane::Anomalies => {}
        }
        Ok(())
    }
}

/// Prints the report, after everything that is not as it must be.
fn report(bench: &Bench, run: &Run, heard: &Heard, wire: &Wire) -> anyhow::Result<ExitCode> {
    let (table, counted, Run { usage, .. }) = (&bench.table, heard.counted, run);
    let readings = table.readings();
    let accounted = counted.sealed + counted.held + counted.rejected + counted.skipped;
    // Its last answer came before its end: the windows of its last seconds may be missing.
    let seconds = (table.rows / u64::from(table.hz)).saturating_sub(20);
    let enough = run.seen.scores >= table.scored_machines() * seconds;
    let must = [
        ("readings polled, by the census", counted.polled, readings),
        ("readings sealed, held, rejected and skipped, by the census", accounted, counted.polled),
        ("rows that reached the subscriber", heard.rows, counted.sealed),
        ("windows failed, incomplete or standing", run.seen.unscored, 0),
        ("whether windows were scored to the end", u64::from(enough), 1),
    ];
    let wrong: Vec<_> = must.into_iter().filter(|(_, got, wanted)| got != wanted).collect();
    for (what, got, wanted) in &wrong {
        eprintln!("failed: {what}: {got}, should be {wanted}");
    }
    let after = |at: Option<Instant>| at.map_or(f64::NAN, |at| (at - run.began).as_secs_f64());
    let (cpu, seconds) = (usage.cpu.as_secs_f64(), run.lasted.as_secs_f64());
    let bytes = wire.to_broker.load(Ordering::Relaxed);
    print_line(serde_json::to_string(&Report {
        readings,
        devices: table.devices,
        hz: table.hz,
        seconds,
        cpu_seconds: cpu,
        cpu_percent: 100.0 * cpu / seconds,
        peak_rss_bytes: usage.peak_rss,
        peak_pss_bytes: usage.peak_pss,
        first_publish_seconds: after(heard.first),
        first_readings_seconds: after(heard.first_readings),
        wire_bytes: bytes,
        wire_bytes_back: wire.to_agent.load(Ordering::Relaxed),
        wire_bytes_per_reading: bytes as f64 / readings as f64,
        payload_bytes_per_reading: heard.payload_bytes as f64 / readings as f64,
        messages: heard.seen.len() as u64,
        scores: run.seen.scores,
        counted,
    })?);
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
