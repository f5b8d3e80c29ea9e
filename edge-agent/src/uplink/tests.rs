//! Against a real broker (rumqttd, embedded) behind a proxy that can be cut and turned to another broker.

use std::{
    collections::{BTreeSet, HashMap},
    net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream},
    path::Path,
    sync::Mutex,
};

use arrow::array::RecordBatch;
use common::{
    documents::{Ack, CloudStatus, Devices, Status},
    reading::{Asset, Registry},
    time::{SystemClock, Timestamp},
    wire::{Decoder, Identity, VERSION, cloud_status_topic, schema},
};
use rumqttc::v5::{AsyncClient, MqttOptions};
use rumqttd::{Broker, Config, ConnectionSettings, RouterConfig, ServerSettings};
use tempfile::TempDir;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
};
use uuid::Uuid;

use super::*;
use crate::{census::Census, outbox::Limits, seal::Draft};

const ROOT: &str = "tailrace/v1";

/// A new broker on a free port; it runs until the process ends and remembers nothing.
pub(crate) fn broker() -> SocketAddr {
    let listen = StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let connections = ConnectionSettings {
        connection_timeout_ms: 5000,
        max_payload_size: 512 * 1024,
        max_inflight_count: 200,
        auth: None,
        external_auth: None,
        dynamic_filters: true,
    };
    let server =
        ServerSettings { name: "v5".into(), listen, tls: None, next_connection_delay_ms: 1, connections };
    let router = RouterConfig {
        max_connections: 100,
        max_outgoing_packet_count: 200,
        max_segment_size: 16 << 20,
        max_segment_count: 10,
        ..RouterConfig::default()
    };
    let config = Config { router, v5: Some(HashMap::from([("1".to_owned(), server)])), ..Config::default() };
    std::thread::spawn(move || Broker::new(config).start().unwrap());
    while StdStream::connect(listen).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
    listen
}

/// Carries connections to `target`; `None` cuts all and refuses new ones.
pub(crate) async fn proxy(target: watch::Receiver<Option<SocketAddr>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut target = target.clone();
            tokio::spawn(async move {
                let to = *target.borrow_and_update();
                let Some(to) = to else { return };
                let Ok(mut server) = TcpStream::connect(to).await else { return };
                tokio::select! {
                    _ = copy_bidirectional(&mut client, &mut server) => {}
                    _ = target.changed() => {}
                }
            });
        }
    });
    address
}

/// What reached the cloud side of a broker.
#[derive(Clone, Default)]
struct Seen {
    messages: Arc<Mutex<Vec<Identity>>>,
    statuses: Arc<Mutex<Vec<Status>>>,
    devices: Arc<Mutex<Vec<Devices>>>,
}

impl Seen {
    fn names(&self) -> BTreeSet<(Uuid, Lane, u64)> {
        self.messages.lock().unwrap().iter().map(|i| (i.epoch, i.lane, i.seq)).collect()
    }
}

/// Subscribes to everything of the gateway; with `acks` it is a cloud that sends heartbeats and acknowledges.
async fn cloud(at: SocketAddr, acks: bool, seen: Seen) {
    let mut options = MqttOptions::new(format!("cloud-{}", at.port()), at.ip().to_string(), at.port());
    options.set_max_packet_size(Some(1 << 20)).set_receive_maximum(Some(100));
    let (client, mut events) = AsyncClient::new(options, 1000);
    let (ready, mut is_ready) = watch::channel(false);
    tokio::spawn(async move {
        loop {
            let event = match events.poll().await {
                Ok(event) => event,
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            };
            match event {
                Event::Incoming(Incoming::ConnAck(_)) => {
                    client.try_subscribe(format!("{ROOT}/plant/gw/#"), QoS::AtLeastOnce).unwrap();
                    if acks {
                        let at = SystemClock.now();
                        let beat = CloudStatus {
                            v: VERSION,
                            online: true,
                            at,
                            writer: Uuid::nil(),
                            client_id: String::new(),
                        };
                        let beat = serde_json::to_vec(&beat).unwrap();
                        client.try_publish(cloud_status_topic(ROOT), QoS::AtLeastOnce, true, beat).unwrap();
                    }
                }
                Event::Incoming(Incoming::SubAck(_)) => drop(ready.send(true)),
                Event::Incoming(Incoming::Publish(publish)) => {
                    let topic = std::str::from_utf8(&publish.topic).unwrap();
                    match Topic::parse(ROOT, topic).unwrap().stream {
                        Stream::Lane(lane) => {
                            let properties = publish.properties.unwrap();
                            assert_eq!(properties.content_type.as_deref(), Some(ARROW_STREAM));
                            let identity = Identity::from_properties(&properties.user_properties).unwrap();
                            let (rows, said) = Decoder::default().decode(lane, &publish.payload).unwrap();
                            assert_eq!((said["site"].as_str(), said["gateway"].as_str()), ("plant", "gw"));
                            let rows = rows.num_rows() as u64;
                            assert_eq!((identity.lane, identity.rows), (lane, rows), "{identity:?}");
                            if acks {
                                let (epoch, seq) = (identity.epoch, identity.seq);
                                let range = AckRange { epoch, lane, from: seq, to: seq };
                                let ack =
                                    serde_json::to_vec(&Ack { v: VERSION, ranges: vec![range] }).unwrap();
                                let topic = format!("{ROOT}/plant/gw/ack");
                                client.try_publish(topic, QoS::AtLeastOnce, false, ack).unwrap();
                            }
                            seen.messages.lock().unwrap().push(identity);
                        }
                        Stream::Status => {
                            seen.statuses
                                .lock()
                                .unwrap()
                                .push(serde_json::from_slice(&publish.payload).unwrap());
                        }
                        Stream::Devices => {
                            seen.devices
                                .lock()
                                .unwrap()
                                .push(serde_json::from_slice(&publish.payload).unwrap());
                        }
                        _ => {}
                    }
                }
                _ => {}
            }
        }
    });
    is_ready.wait_for(|ready| *ready).await.unwrap();
}

fn settings(at: SocketAddr, mode: UplinkMode) -> Settings {
    let mqtt = MqttSettings {
        host: at.ip().to_string(),
        port: at.port(),
        tls: false,
        username: String::new(),
        password: common::config::SecretRef::default(),
        ca: None,
        keep_alive: Duration::from_secs(5),
        backoff: Duration::from_millis(20),
        max_backoff: Duration::from_millis(200),
    };
    let uplink = UplinkSettings {
        mode,
        inflight: 16,
        unacked: 512,
        resend_after: Duration::from_millis(300),
        max_resend_after: Duration::from_secs(2),
        backlog_share: 0.5,
        max_bytes_per_s: None,
        status_every: Duration::from_secs(1),
        drain: Duration::from_secs(20),
    };
    Settings {
        site: "plant".into(),
        gateway: "gw".into(),
        root: ROOT.to_owned(),
        mqtt,
        uplink,
        max_message_bytes: 128 * 1024,
        version: "test".into(),
        config_sha256: String::new(),
        models: watch::channel(Vec::new()).1,
    }
}

fn open(dir: &Path) -> Outbox {
    let limits = Limits {
        max_bytes: 1 << 30,
        max_age: Duration::from_secs(86_400),
        min_free_disk: 0,
        generation_bytes: 256 * 1024,
        max_message_bytes: 128 * 1024,
        census_every: Duration::from_secs(60),
    };
    Outbox::open(dir, limits, SystemClock.now()).unwrap()
}

/// `n` messages of the readings lane without rows' worth of content: what matters here is their names.
async fn append(outbox: &Outbox, n: usize) {
    let batch = RecordBatch::new_empty(schema(Lane::Readings));
    let batch = one_row(&batch);
    for _ in 0..n {
        let draft = Draft {
            lane: Lane::Readings,
            batch: batch.clone(),
            last_event: Timestamp::from_micros(1),
            census: Census::default(),
        };
        let outbox = outbox.clone();
        spawn_blocking(move || outbox.append(SystemClock.now(), vec![draft], &[])).await.unwrap().unwrap();
    }
}

/// One reading with the columns of `like`.
fn one_row(like: &RecordBatch) -> RecordBatch {
    use arrow::{array::new_null_array, compute::cast};
    let schema = like.schema();
    let columns = schema.fields().iter().map(|field| {
        let text: arrow::array::ArrayRef = match field.data_type() {
            arrow::datatypes::DataType::Dictionary(..) => {
                Arc::new(arrow::array::StringArray::from(vec!["x"]))
            }
            arrow::datatypes::DataType::Float64 if field.is_nullable() => {
                new_null_array(field.data_type(), 1)
            }
            _ => Arc::new(arrow::array::Int64Array::from(vec![1])),
        };
        cast(&text, field.data_type()).unwrap()
    });
    RecordBatch::try_new(like.schema(), columns.collect()).unwrap()
}

fn registry() -> Arc<Registry> {
    let asset = Asset { id: "pump-01".into(), ..Asset::default() };
    Arc::new(Registry { assets: vec![asset], devices: Vec::new() })
}

fn start(
    outbox: &Outbox,
    settings: Settings,
) -> (watch::Sender<bool>, tokio::task::JoinHandle<anyhow::Result<()>>) {
    let (stop, stopped) = watch::channel(false);
    let clock = Arc::new(SystemClock);
    let running = run(outbox.clone(), settings, registry(), clock, Metrics::default(), stopped);
    (stop, tokio::spawn(running))
}

fn held(outbox: &Outbox) -> u64 {
    outbox.lanes().iter().map(|lane| lane.messages).sum()
}

async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..1500 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("not within 30 s: {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_dies_and_forgets_costs_nothing() {
    let dir = TempDir::new().unwrap();
    let (first, second) = (broker(), broker());
    let (turn, target) = watch::channel(Some(first));
    let at = proxy(target).await;
    let seen = Seen::default();
    cloud(first, false, seen.clone()).await;
    cloud(second, false, seen.clone()).await;
    let outbox = open(dir.path());
    append(&outbox, 150).await;
    let (stop, running) = start(&outbox, settings(at, UplinkMode::Broker));
    for round in 0..4 {
        eventually("messages arrive", || seen.names().len() > 40 * round).await;
        turn.send(None).unwrap();
        append(&outbox, 25).await;
        turn.send(Some(if round % 2 == 0 { second } else { first })).unwrap();
    }
    outbox.close(SystemClock.now()).unwrap();
    stop.send(true).unwrap();
    running.await.unwrap().unwrap();
    assert_eq!(held(&outbox), 0);
    let sealed: BTreeSet<_> = outbox
        .lanes()
        .iter()
        .flat_map(|lane| lane.epochs.clone())
        .flat_map(|e| (0..e.head).map(move |seq| (e.epoch, e.lane, seq)))
        .collect();
    assert!(sealed.len() > 250);
    eventually("the last ones arrive", || seen.names() == sealed).await;
    eventually("the farewell arrives", || seen.statuses.lock().unwrap().last().is_some_and(|s| !s.online))
        .await;
    assert_eq!(seen.devices.lock().unwrap()[0].assets[0].id, "pump-01");
    // The very first may have been cut on its way.
    let birth = seen.statuses.lock().unwrap().iter().find(|s| s.online).cloned().unwrap();
    assert!(birth.epoch == outbox.epoch() && birth.lanes.len() == 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_forgotten_before_the_cloud_has_it() {
    let dir = TempDir::new().unwrap();
    let (first, second) = (broker(), broker());
    let (turn, target) = watch::channel(Some(first));
    let at = proxy(target).await;
    let outbox = open(dir.path());
    append(&outbox, 120).await;
    let before = held(&outbox);
    // The first broker accepts everything, and nobody listens.
    let (stop, running) = start(&outbox, settings(at, UplinkMode::Cloud));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(held(&outbox), before, "the broker's word is not enough");
    // The first broker is lost with all it had; behind the second there is a cloud.
    let seen = Seen::default();
    cloud(second, true, seen.clone()).await;
    turn.send(Some(second)).unwrap();
    append(&outbox, 30).await;
    eventually("everything is acknowledged", || held(&outbox) == 0).await;
    assert!(seen.names().iter().filter(|(_, lane, _)| *lane == Lane::Readings).count() == 150);
    stop.send(true).unwrap();
    running.await.unwrap().unwrap();
    assert!(outbox.lanes().iter().all(|lane| lane.epochs.iter().all(|e| e.oldest == e.head)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_messages_a_second() {
    let dir = TempDir::new().unwrap();
    let at = broker();
    let seen = Seen::default();
    cloud(at, false, seen.clone()).await;
    let outbox = open(dir.path());
    let batch = one_row(&RecordBatch::new_empty(schema(Lane::Readings)));
    for _ in 0..50 {
        let draft = |_| Draft {
            lane: Lane::Readings,
            batch: batch.clone(),
            last_event: Timestamp::from_micros(1),
            census: Census::default(),
        };
        outbox.append(SystemClock.now(), (0..100).map(draft).collect(), &[]).unwrap();
    }
    let begun = Instant::now();
    let (stop, running) = start(&outbox, settings(at, UplinkMode::Broker));
    eventually("5,000 messages", || held(&outbox) == 0).await;
    let rate = 5000.0 / begun.elapsed().as_secs_f64();
    eprintln!("{rate:.0} messages/s");
    stop.send(true).unwrap();
    running.await.unwrap().unwrap();
    eventually("all of them arrive", || seen.names().len() == 5000).await;
    // Far below what it does, since tests share the machine; the figure stands in the output.
    assert!(rate > 300.0, "{rate:.0} messages/s");
}

#[test]
fn the_bucket_lets_no_more_through_than_its_rate() {
    for (rate, message) in [(1000u64, 100usize), (1000, 5000), (64_000, 16_000)] {
        let mut bucket = Bucket::new(rate);
        let (mut now, mut passed) = (Duration::ZERO, 0usize);
        let end = Duration::from_secs(60);
        while now < end {
            if bucket.is_open(now) {
                bucket.take(message);
                passed += message;
                assert_eq!(bucket.ready_at(now).is_none(), bucket.tokens > 0.0);
            } else {
                // Not earlier, and it is open then: nothing spins and nothing starves.
                let ready = bucket.ready_at(now).unwrap();
                assert!(ready > now && !bucket.is_open(ready.saturating_sub(Duration::from_millis(2))));
                now = ready + Duration::from_micros(1);
                assert!(bucket.is_open(now), "{rate} {message} {now:?}");
            }
        }
        let earned = (rate * 60) as usize;
        // A second's worth at the start, and the last message may overdraw.
        assert!((earned..=earned + rate as usize + 2 * message).contains(&passed), "{passed} of {earned}");
        // What is not used in a pause is not saved up beyond a second's worth.
        now += Duration::from_secs(3600);
        let mut burst = 0;
        while bucket.is_open(now) {
            bucket.take(message);
            burst += message;
        }
        assert!(burst <= rate as usize + message, "{burst}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rate_limit_holds_on_the_wire() {
    let dir = TempDir::new().unwrap();
    let at = broker();
    let seen = Seen::default();
    cloud(at, false, seen.clone()).await;
    let outbox = open(dir.path());
    append(&outbox, 60).await;
    let bytes: usize = outbox
        .page(Lane::Readings, 0, 100, usize::MAX, SystemClock.now())
        .unwrap()
        .iter()
        .map(|m| m.payload.len())
        .sum();
    // A second's worth is there at once; the rest takes two more.
    let mut settings = settings(at, UplinkMode::Broker);
    settings.uplink.max_bytes_per_s = Some(bytes as u64 / 3);
    let begun = Instant::now();
    let (stop, running) = start(&outbox, settings);
    eventually("everything is delivered", || held(&outbox) == 0).await;
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(1700), "{took:?}");
    stop.send(true).unwrap();
    running.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledgement_of_what_is_not_held_is_ignored_and_counted() {
    let dir = TempDir::new().unwrap();
    let at = broker();
    let outbox = open(dir.path());
    append(&outbox, 3).await;
    let before = held(&outbox);
    let (stop, stopped) = watch::channel(false);
    let metrics = Metrics::default();
    let running = run(
        outbox.clone(),
        settings(at, UplinkMode::Cloud),
        registry(),
        Arc::new(SystemClock),
        metrics.clone(),
        stopped,
    );
    let running = tokio::spawn(running);
    let mut options = MqttOptions::new("stranger", at.ip().to_string(), at.port());
    options.set_max_packet_size(Some(1 << 20));
    let (client, mut events) = AsyncClient::new(options, 10);
    tokio::spawn(async move { while events.poll().await.is_ok() {} });
    let lane = Lane::Readings;
    let ranges = vec![
        AckRange { epoch: Uuid::from_u128(7), lane, from: 0, to: 9 },
        AckRange { epoch: outbox.epoch(), lane, from: 3, to: 1000 },
        AckRange { epoch: outbox.epoch(), lane, from: 9, to: 2 },
    ];
    let ack = serde_json::to_vec(&Ack { v: VERSION, ranges }).unwrap();
    // Until the agent has subscribed nobody hears it.
    for _ in 0..200 {
        client.publish(format!("{ROOT}/plant/gw/ack"), QoS::AtLeastOnce, false, ack.clone()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        if metrics.unknown_acks.get() >= 2 {
            break;
        }
    }
    assert!(
        metrics.unknown_acks.get() >= 2 && metrics.unknown_acks.get() % 2 == 0,
        "two of the three name nothing"
    );
    assert_eq!(held(&outbox), before);
    // One that is held is believed, also the second time.
    let range = AckRange { epoch: outbox.epoch(), lane, from: 1, to: 1 };
    let ack = serde_json::to_vec(&Ack { v: VERSION, ranges: vec![range, range] }).unwrap();
    client.publish(format!("{ROOT}/plant/gw/ack"), QoS::AtLeastOnce, false, ack).await.unwrap();
    eventually("it is forgotten", || held(&outbox) == before - 1).await;
    let left = outbox.page(lane, 0, 10, usize::MAX, SystemClock.now()).unwrap();
    assert_eq!(left.iter().map(|m| m.index).collect::<Vec<_>>(), [0, 2]);
    stop.send(true).unwrap();
    running.await.unwrap().unwrap();
}
