//! The gateway's own page, for the day the WAN is down: `/`, and what it shows as JSON, `/values`.
//!
//! One file without outside parts ([`HTML`]), which asks for `/values` every two seconds. It stands beside `/metrics`
//! on loopback, for few connections at a time, and asks for no password: from afar it is read through
//! `ssh -L 9464:127.0.0.1:9464 gateway`.
//!
//! The pipeline leaves the latest reading of every device in [`Latest`], a batch at a time: one slot a device, so its
//! size is that of the configuration, and its lock is held for the copying of slots alone. Ages are by the gateway's
//! clock. Depths of the outbox are those of the metrics, renewed every five seconds: nothing here waits for the disk.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{
    Json, Router,
    http::header,
    response::{Html, IntoResponse},
    routing::get,
};
use common::{
    documents::ModelStatus,
    reading::{Quality, Reading},
    time::{Clock, Timestamp},
};
use serde::Serialize;
use tokio::sync::watch;
use uuid::Uuid;

use crate::{
    settings::Settings,
    uplink::{self, Depth},
};

/// The page.
const HTML: &str = include_str!("page.html");
/// It runs its own script and asks its own server, nobody else.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
                      connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The latest reading of every device.
#[derive(Debug)]
pub struct Latest(Mutex<Vec<Option<Reading>>>);

impl Latest {
    /// For as many devices.
    pub fn new(devices: usize) -> Self {
        Self(Mutex::new(vec![None; devices]))
    }

    /// Takes over what is newer than what is there.
    pub fn update(&self, readings: &[Reading]) {
        let mut slots = self.slots();
        for reading in readings {
            let slot = &mut slots[reading.device.index()];
            if slot.is_none_or(|known| known.ts <= reading.ts) {
                *slot = Some(*reading);
            }
        }
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Option<Reading>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the page finds what it shows.
pub struct Page {
    /// Names and devices.
    pub settings: Arc<Settings>,
    /// The present run.
    pub epoch: Uuid,
    /// When it began.
    pub started_at: Timestamp,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// Filled by the pipeline.
    pub latest: Arc<Latest>,
    /// The models' states.
    pub models: watch::Receiver<Vec<ModelStatus>>,
    /// Connection and outbox.
    pub delivery: uplink::Metrics,
}

/// What `/values` answers.
#[derive(Debug, Serialize)]
struct Values<'a> {
    site: &'a str,
    gateway: &'a str,
    version: &'static str,
    epoch: Uuid,
    at: Timestamp,
    up_s: f64,
    broker: String,
    connected: bool,
    awaiting_cloud: i64,
    outbox: [Depth; 4],
    models: Vec<ModelStatus>,
    devices: Vec<Value<'a>>,
}

/// A device with its latest reading, if there is one.
#[derive(Debug, Serialize)]
struct Value<'a> {
    id: &'a str,
    asset: &'a str,
    #[serde(rename = "type")]
    device_type: &'a str,
    unit: &'a str,
    labels: &'a BTreeMap<String, String>,
    interval_s: Option<f64>,
    value: Option<f64>,
    quality: Option<Quality>,
    at: Option<Timestamp>,
    age_s: Option<f64>,
}

impl Page {
    /// The routes `/` and `/values`.
    pub fn routes(self) -> Router {
        let page = Arc::new(self);
        let html = || async { ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(HTML)) };
        let values = move || {
            let page = Arc::clone(&page);
            async move { ([(header::CACHE_CONTROL, "no-store")], Json(page.values())).into_response() }
        };
        Router::new().route("/", get(html)).route("/values", get(values))
    }

    fn values(&self) -> Values<'_> {
        let (settings, at) = (&self.settings, self.clock.now());
        let latest = self.latest.slots().clone();
        let devices = settings.registry.devices.iter().zip(latest).map(|(device, reading)| Value {
            id: &device.id,
            asset: &device.asset,
            device_type: &device.device_type,
            unit: &device.unit,
            labels: &device.labels,
            interval_s: device.interval.map(|interval| interval.as_secs_f64()),
            value: reading.map(|reading| reading.value).filter(|value| value.is_finite()),
            quality: reading.map(|reading| reading.quality),
            at: reading.map(|reading| reading.ts),
            age_s: reading.map(|reading| at.since(reading.ts).as_secs_f64()),
        });
        Values {
            site: &settings.site,
            gateway: &settings.gateway,
            version: env!("CARGO_PKG_VERSION"),
            epoch: self.epoch,
            at,
            up_s: at.since(self.started_at).as_secs_f64(),
            broker: format!("{}:{}", settings.mqtt.host, settings.mqtt.port),
            connected: self.delivery.is_connected(),
            awaiting_cloud: self.delivery.awaiting(),
            outbox: self.delivery.depths(),
            models: self.models.borrow().clone(),
            devices: devices.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use common::{
        reading::DeviceIx,
        telemetry,
        time::{Pacer, SystemClock},
    };
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::metrics;

    const CONFIG: &str = r#"
        site = "plant"
        gateway = "gw-1"
        data_dir = "/nowhere"
        asset = [{ id = "pump" }]
        [[device]]
        id = "pump/pressure"
        type = "pressure"
        asset = "pump"
        unit = "bar"
        interval = "5s"
        [[device]]
        id = "pump/zone"
        type = "state"
        asset = "pump"
        unit = "1"
        labels = { 2 = "B" }
        "#;

    struct At(i64);

    impl Clock for At {
        fn now(&self) -> Timestamp {
            at(self.0)
        }

        fn pacer(&self) -> Box<dyn Pacer> {
            SystemClock.pacer()
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_micros(1_780_000_000_000_000 + second * 1_000_000)
    }

    fn reading(second: i64, device: u32, value: f64) -> Reading {
        let quality = if value.is_nan() { Quality::Bad } else { Quality::Good };
        Reading { ts: at(second), device: DeviceIx(device), quality, value }
    }

    #[test]
    fn the_latest_reading_stays() {
        let latest = Latest::new(2);
        latest.update(&[reading(5, 1, 1.0), reading(6, 1, 2.0)]);
        latest.update(&[reading(4, 1, 3.0)]);
        assert_eq!(latest.slots()[..], [None, Some(reading(6, 1, 2.0))]);
        latest.update(&[reading(6, 1, 4.0)]);
        assert_eq!(latest.slots()[1], Some(reading(6, 1, 4.0)));
    }

    async fn get(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        answer
    }

    #[tokio::test]
    async fn the_page_asks_nobody_but_the_agent() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("edge-agent.toml");
        std::fs::write(&file, CONFIG).unwrap();
        let (latest, mut registry) = (Arc::new(Latest::new(2)), telemetry::registry());
        let (sha256, calibration_sha256) = (String::new(), String::new());
        let bad =
            ModelStatus { name: "m".into(), sha256, calibration_sha256, state: "no golden.json".into() };
        let page = Page {
            settings: Arc::new(Settings::load(Some(&file)).unwrap()),
            epoch: Uuid::nil(),
            started_at: at(0),
            clock: Arc::new(At(70)),
            latest: Arc::clone(&latest),
            models: watch::channel(vec![bad]).1,
            delivery: uplink::Metrics::register(&mut registry),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(metrics::serve(listener, Arc::new(Mutex::new(registry)), page.routes()));

        let html = get(address, "/").await;
        assert!(html.contains("content-security-policy: default-src 'none'"), "{html}");
        assert!(html.contains("fetch(\"/values\"") && !html.contains("://"), "it stands alone");
        assert!(get(address, "/healthz").await.ends_with("ok\n"));
        assert!(get(address, "/metrics").await.contains("tailrace_edge_connected 0"));

        latest.update(&[reading(62, 0, 4.25), reading(10, 1, f64::NAN)]);
        let answer = get(address, "/values").await;
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let values: serde_json::Value = serde_json::from_str(body).unwrap();
        for (path, wanted) in [
            ("/site", serde_json::json!("plant")),
            ("/up_s", 70.0.into()),
            ("/connected", false.into()),
            ("/broker", "127.0.0.1:1883".into()),
            ("/outbox/3/lane", "readings".into()),
            ("/models/0/state", "no golden.json".into()),
            ("/devices/0/value", 4.25.into()),
            ("/devices/0/quality", "good".into()),
            ("/devices/0/age_s", 8.0.into()),
            ("/devices/0/interval_s", 5.0.into()),
            ("/devices/1/value", serde_json::Value::Null),
            ("/devices/1/quality", "bad".into()),
            ("/devices/1/labels/2", "B".into()),
        ] {
            assert_eq!(values.pointer(path), Some(&wanted), "{path} of {values}");
        }

        // A connection that asks nothing is not held for long.
        let mut silent = Vec::new();
        for _ in 0..metrics::MAX_CONNECTIONS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        assert!(get(address, "/healthz").await.ends_with("ok\n"));
        server.abort();
    }
}
