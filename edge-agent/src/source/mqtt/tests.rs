//! Against a real broker (rumqttd, embedded) behind a proxy that can be cut.

use std::net::{SocketAddr, TcpListener as StdListener};

use common::{
    config::SecretRef,
    reading::Quality,
    time::{SystemClock, Timestamp},
};
use rumqttc::v5::MqttOptions;
use tokio::sync::{mpsc, watch};

use super::*;
use crate::{
    settings::{Target, Whose},
    source::LinuxHardware,
    uplink::tests::{broker, proxy},
};

const TIMED: DeviceIx = DeviceIx(0);
const PLAIN: DeviceIx = DeviceIx(1);

fn settings(at: SocketAddr) -> MqttSettings {
    MqttSettings {
        host: at.ip().to_string(),
        port: at.port(),
        tls: false,
        username: String::new(),
        password: SecretRef::default(),
        ca: None,
        keep_alive: Duration::from_secs(5),
        backoff: Duration::from_millis(20),
        max_backoff: Duration::from_millis(200),
    }
}

fn topics() -> Vec<JsonTopic> {
    let topic = |filter: &str, value: &str, time: Option<&str>, device| JsonTopic {
        filter: filter.to_owned(),
        value: value.to_owned(),
        whose: Whose::One(Target { device, scale: 1.0, shift: 0.0 }),
        time: time.map(str::to_owned),
        quality: None,
        words: BTreeMap::new(),
        max_age: Duration::from_secs(3_600),
    };
    vec![topic("shop/+/state", "/v", Some("/t"), TIMED), topic("shop/speed", "", None, PLAIN)]
}

/// A device that publishes with QoS 1 and waits until the broker has acknowledged it.
struct Device {
    client: AsyncClient,
    acknowledged: watch::Receiver<u64>,
    sent: u64,
}

impl Device {
    fn new(at: SocketAddr) -> Self {
        let options = MqttOptions::new(format!("device-{}", at.port()), at.ip().to_string(), at.port());
        let (client, mut events) = AsyncClient::new(options, 100);
        let (count, acknowledged) = watch::channel(0);
        tokio::spawn(async move {
            while let Ok(event) = events.poll().await {
                if matches!(event, Event::Incoming(Incoming::PubAck(_))) {
                    count.send_modify(|n| *n += 1);
                }
            }
        });
        Self { client, acknowledged, sent: 0 }
    }

    async fn publish(&mut self, topic: &str, retain: bool, payload: String) {
        self.client.publish(topic, QoS::AtLeastOnce, retain, payload).await.unwrap();
        self.sent += 1;
        let all = self.sent;
        self.acknowledged.wait_for(|n| *n >= all).await.unwrap();
    }

    async fn state(&mut self, seconds_ago: u64, value: f64) -> Timestamp {
        let at = SystemClock.now() - Duration::from_secs(seconds_ago);
        let payload = format!(r#"{{"v":{value},"t":{}}}"#, at.as_micros());
        self.publish("shop/7/state", false, payload).await;
        at
    }
}

/// A running source and what came of it.
struct Running {
    polled: mpsc::Receiver<Polled>,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
    readings: Vec<Reading>,
    census: Census,
}

impl Running {
    fn start(at: SocketAddr) -> Self {
        let (out, polled) = mpsc::channel(4);
        let (stop, stopped) = watch::channel(false);
        let context = Context {
            hardware: Arc::new(LinuxHardware),
            clock: Arc::new(SystemClock),
            resume_after: None,
            out,
            stop: stopped,
            metrics: Arc::new(Metrics::default()),
        };
        let task = tokio::spawn(run(settings(at), "plant.gw.source-0".into(), topics(), context));
        Self { polled, stop, task, readings: Vec::new(), census: Census::default() }
    }

    /// Takes what comes until `is_so`.
    async fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let taking = async {
            while !is_so(self) {
                self.take_one().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), taking).await.unwrap_or_else(|_| panic!("{what}"));
    }

    async fn take_one(&mut self) {
        let polled = self.polled.recv().await.unwrap();
        assert!(polled.readings.iter().all(|reading| reading.ts <= polled.at));
        self.census.merge(&polled.census);
        self.readings.extend(polled.readings);
    }

    fn rejected(&self, reason: Reason) -> u64 {
        self.census.total(Outcome::Rejected(reason))
    }

    fn values(&self, device: DeviceIx) -> Vec<f64> {
        self.readings.iter().filter(|reading| reading.device == device).map(|reading| reading.value).collect()
    }

    async fn stop(self) -> (Vec<Reading>, Census) {
        self.stop.send_replace(true);
        drop(self.polled);
        self.task.await.unwrap();
        (self.readings, self.census)
    }
}

/// The subscription stands once a message comes through.
async fn subscribed(device: &mut Device, running: &mut Running) {
    while running.values(PLAIN).is_empty() {
        device.publish("shop/speed", false, "0".into()).await;
        let _ = tokio::time::timeout(Duration::from_millis(100), running.take_one()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_message_is_a_reading_or_a_rejection() {
    let at = broker();
    let mut device = Device::new(at);
    // Of unknown age, since the topic states no time.
    device.publish("shop/speed", true, "7".into()).await;
    let mut running = Running::start(at);
    subscribed(&mut device, &mut running).await;
    let first = device.state(10, 21.5).await;
    device.state(5, 22.5).await;
    device.publish("shop/7/state", false, "what is this".into()).await;
    device.state(7_200, 1.0).await;
    device.publish("shop/speed", false, "1450".into()).await;
    let begun = SystemClock.now();
    running.until("the last one arrives", |r| r.values(PLAIN).contains(&1450.0)).await;
    running.until("those of QoS 1, too", |r| r.rejected(Reason::Past) == 1).await;
    assert_eq!(running.values(TIMED), [21.5, 22.5]);
    let timed: Vec<_> = running.readings.iter().filter(|reading| reading.device == TIMED).collect();
    assert_eq!((timed[0].ts, timed[0].quality), (first, Quality::Good));
    let arrived = running.readings.iter().rfind(|reading| reading.device == PLAIN).unwrap().ts;
    assert!(begun.since(arrived) < Duration::from_secs(10), "{arrived}");
    assert_eq!(running.rejected(Reason::Malformed), 1);
    assert!(!running.values(PLAIN).contains(&7.0), "{:?}", running.readings);
    let (readings, census) = running.stop().await;
    let rejected: u64 =
        census.iter().filter(|(_, o, _)| matches!(o, Outcome::Rejected(_))).map(|(.., n)| n).sum();
    assert_eq!(census.total(Outcome::Polled), readings.len() as u64 + rejected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_comes_late_or_goes_away_is_listened_to_again() {
    let at = broker();
    let mut device = Device::new(at);
    let (turn, target) = watch::channel(None);
    let mut running = Running::start(proxy(target).await);
    // There is none, and time goes on all the same.
    let first = running.polled.recv().await.unwrap();
    let second = running.polled.recv().await.unwrap();
    assert!(second.at > first.at && second.readings.is_empty() && second.census.is_empty());
    for round in 0..3 {
        turn.send(Some(at)).unwrap();
        let value = f64::from(round);
        // A broker without a session of ours has no subscription either.
        let arrives = async {
            while !running.values(TIMED).contains(&value) {
                device.state(0, value).await;
                let _ = tokio::time::timeout(Duration::from_millis(50), running.take_one()).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), arrives).await.unwrap();
        turn.send(None).unwrap();
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_taken_by_the_pipeline_comes_again() {
    let at = broker();
    let mut device = Device::new(at);
    let (turn, target) = watch::channel(Some(at));
    let through = proxy(target).await;
    let mut running = Running::start(through);
    subscribed(&mut device, &mut running).await;
    // Nobody takes anything out of the pipe, so at some message the source waits; none after it is acknowledged.
    for n in 0..40 {
        device.state(60 - n, n as f64).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    turn.send(None).unwrap();
    // The agent ends without having taken the rest.
    let mut readings = Vec::new();
    while let Ok(polled) = running.polled.try_recv() {
        readings.extend(polled.readings);
    }
    running.task.abort();
    turn.send(Some(at)).unwrap();
    let mut next = Running::start(through);
    next.readings = readings;
    next.until("all have come", |r| (0..40).all(|n| r.values(TIMED).contains(&f64::from(n)))).await;
    next.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sensors_waits_for_each_device() {
    let at = broker();
    let mut device = Device::new(at);
    let feeding = tokio::spawn(async move {
        for n in 0.. {
            device.state(0, f64::from(n)).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let wait = Duration::from_secs(2);
    let timed = &topics()[..1];
    let heard = listen(&settings(at), "c", timed, &SystemClock, Duration::from_secs(30)).await.unwrap();
    assert_eq!(heard.readings.into_keys().collect::<Vec<_>>(), [TIMED]);
    let heard = listen(&settings(at), "c", &topics(), &SystemClock, wait).await.unwrap();
    assert_eq!(heard.readings.into_keys().collect::<Vec<_>>(), [TIMED], "the other one is silent");
    feeding.abort();
    let nobody = StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert!(listen(&settings(nobody), "c", &topics(), &SystemClock, wait).await.is_err());
}
