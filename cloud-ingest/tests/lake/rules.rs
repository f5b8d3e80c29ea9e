//! Rules, with a real lake, a real broker (rumqttd, in this process) and real HTTP.

use std::{
    collections::HashMap,
    net::{SocketAddr, TcpListener},
    sync::Mutex,
};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::post,
};
use cloud_ingest::{
    gold::{self, GoldSettings},
    pipeline,
    rules::{
        self,
        alerts::REMEMBER,
        deliver::{Board, Target},
        engine::{Engine, Outcome, Parts},
        metrics::RuleMetrics,
        publish::Publisher,
        trial::{self, On},
    },
    serve::{
        live::{Keep, Live},
        sql::Limits as QueryLimits,
    },
    settings::Settings,
    subscribe,
};
use common::{telemetry, wire::Topic};
use futures::future::BoxFuture;
use object_store::{ObjectStore, memory::InMemory};
use prometheus_client::registry::Registry;
use rumqttc::v5::{
    AsyncClient, Event, Incoming, MqttOptions,
    mqttbytes::{QoS, v5::Publish},
};
use rumqttd::{Broker, Config, ConnectionSettings, RouterConfig, ServerSettings};
use serde_json::Value;

use super::{
    faults::{Fault, Faulty},
    *,
};

/// 50 °F are 10 °C; of [`segments`] silver holds six rows above that.
const WARM: &str = "[[rule]]\nname = \"warm\"\nsink = \"table\"\n\
    select = \"select site, device_id, ts, value from readings where value > 15\"\n";

fn settings(text: &str) -> Settings {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cloud-ingest.toml");
    std::fs::write(&path, text).unwrap();
    Settings::load(Some(&path)).unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

/// What a process holds of its rules.
struct Process {
    settings: Settings,
    tables: Tables,
    board: Board,
    live: Live,
    registry: Registry,
    metrics: RuleMetrics,
}

impl Process {
    async fn start(store: &Store, text: &str) -> Process {
        Self::try_start(store, text).await.unwrap()
    }

    async fn try_start(store: &Store, text: &str) -> anyhow::Result<Process> {
        let settings = settings(text);
        let (_, tables) = rules::plan(&settings, &Tables::open(store).await?).await?;
        let mut registry = telemetry::registry();
        let metrics = RuleMetrics::new(&mut registry);
        let live = Live::new(Keep::default(), Arc::new(SystemClock));
        Ok(Process { settings, tables, board: Board::default(), live, registry, metrics })
    }

    async fn engine(&self, name: &str) -> Engine {
        self.try_engine(name).await.unwrap()
    }

    async fn try_engine(&self, name: &str) -> anyhow::Result<Engine> {
        let rule = rules::find(&self.settings, &self.tables, name).await?;
        let options = subscribe::connection(&self.settings.mqtt).unwrap();
        let limits = QueryLimits { timeout: self.settings.rules.timeout, rows: self.settings.rules.rows };
        let parts = Parts {
            tables: self.tables.clone(),
            live: self.live.clone(),
            limits,
            publisher: Some(Publisher::new(options)),
            subscribed: rules::subscribed(&self.settings),
            board: self.board.clone(),
            told: watch::channel(0).0,
            metrics: self.metrics.clone(),
        };
        Ok(Engine::new(rule, parts))
    }

    fn metrics(&self) -> String {
        telemetry::exposition(&self.registry)
    }
}

/// Steps until there is nothing left; what each step did.
async fn steps(engine: &mut Engine, now: Timestamp) -> Vec<Outcome> {
    let mut done = Vec::new();
    loop {
        match engine.step(now).await.unwrap() {
            Outcome::Idle => return done,
            outcome => done.push(outcome),
        }
    }
}

/// A lake whose rules have seen nothing, with all of [`segments`] in silver.
async fn lake_and(text: &str, name: &str) -> (Store, Process, Engine) {
    let store = Store::open("memory:///").unwrap();
    let process = Process::start(&store, text).await;
    let mut engine = process.engine(name).await;
    assert_eq!(engine.step(now()).await.unwrap(), Outcome::Idle, "it begins here");
    fill(&store).await;
    refine_all(&mut refiner(&store, &process.tables)).await;
    (store, process, engine)
}

const IN_SILVER: &str =
    "select site, device_id, ts, value from silver.sensor_readings where value > 15 order by 2, 3, 4";
const IN_RULE: &str = "select site, device_id, ts, value from rules.warm order by 2, 3, 4";

#[tokio::test]
async fn every_reading_is_seen_once() {
    let (store, process, mut engine) = lake_and(WARM, "warm").await;
    let done = steps(&mut engine, now()).await;
    assert!(done.iter().all(|outcome| matches!(outcome, Outcome::Ran(..))), "{done:?}");
    let silver = ask(&process.tables, IN_SILVER).await;
    assert!(silver.lines().count() > 9, "{silver}");
    assert_eq!(ask(&process.tables, IN_RULE).await, silver);
    // Plans without rows are committed at the stop, so that the next process need not look through them again.
    engine.finish().await.unwrap();
    let mut next = Process::start(&store, WARM).await.engine("warm").await;
    assert_eq!(steps(&mut next, now()).await, []);
    // Everything once more, under the same names and as a new message.
    put(&store, 9, &segments().concat()).await;
    put(&store, 10, &[readings(77, &[(1, "a", 213.0)])]).await;
    refine_all(&mut refiner(&store, &process.tables)).await;
    let again = steps(&mut next, now()).await;
    assert_eq!(again.last(), Some(&Outcome::Ran(3, 0)), "{again:?}");
    assert_eq!(ask(&process.tables, IN_RULE).await, silver);
    let metrics = process.metrics();
    assert!(metrics.contains("tailrace_cloud_rule_rows_total{rule=\"warm\"} "), "{metrics}");
    assert!(metrics.contains("tailrace_cloud_rule_behind_plans{rule=\"warm\"} 0"), "{metrics}");
}

#[tokio::test]
async fn history_and_the_last_minutes_can_be_joined() {
    let text = "[[rule]]\nname = \"joined\"\nsink = \"table\"\nselect = \"select r.device_id, \
        count(distinct l.ts) as now, max(h.max) as most from readings r \
        join live.readings l on l.site = r.site and l.device_id = r.device_id \
        join gold.hourly_aggregates h on h.site = r.site and h.device_id = r.device_id group by r.device_id\"\n";
    let (_, process, mut engine) = lake_and(text, "joined").await;
    gold::step(&process.tables, &GoldSettings::default(), now()).await.unwrap();
    let message = readings(50, &[(0, "a", 212.0), (1, "a", 213.0)]);
    process.live.push(&Topic::parse(ROOT, &message.origin.topic).unwrap(), &message.payload, 2, false);
    assert_eq!(steps(&mut engine, now()).await, [Outcome::Ran(1, 1), Outcome::Ran(2, 1)]);
    let joined =
        ask(&process.tables, "select distinct device_id, now, round(most, 1) m from rules.joined").await;
    assert!(joined.contains("| a         | 2   | 101.1 |"), "{joined}");
}

#[tokio::test]
async fn a_new_rule_begins_now_and_one_that_was_away_catches_up() {
    let (store, process, mut engine) = lake_and(WARM, "warm").await;
    let text = WARM.replace("\"warm\"", "\"late\"");
    let late = Process::start(&store, &text).await;
    let mut second = late.engine("late").await;
    assert_eq!(steps(&mut second, now()).await, []);
    put(&store, 9, &[readings(90, &[(500, "z", 212.0)])]).await;
    refine_all(&mut refiner(&store, &process.tables)).await;
    assert_eq!(steps(&mut second, now()).await.len(), 1);
    assert_eq!(steps(&mut engine, now()).await.len(), 3);
    let count = ask(&late.tables, "select count(*) from rules.late").await;
    assert!(count.contains("| 1 "), "{count}");
}

/// Another process with the same rule does all there is to do.
fn overtake(store: Store) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let mut engine = Process::start(&store, WARM).await.engine("warm").await;
        steps(&mut engine, now()).await;
        engine.finish().await.unwrap();
    })
}

/// A process that looks through everything there is; it ends at the first error.
async fn live(store: &Store) -> anyhow::Result<()> {
    let mut engine = Process::try_start(store, WARM).await?.try_engine("warm").await?;
    while engine.step(now()).await? != Outcome::Idle {}
    Ok(())
}

#[tokio::test]
async fn a_fault_at_any_call_leaves_each_row_in_its_table_once() {
    let lake = Arc::new(InMemory::new());
    let store = Store::over(Arc::clone(&lake) as _, "memory:///".parse().unwrap()).unwrap();
    live(&store).await.unwrap();
    fill(&store).await;
    let tables = Tables::open(&store).await.unwrap();
    refine_all(&mut refiner(&store, &tables)).await;
    let silver = ask(&tables, IN_SILVER).await;
    for (fault, stride) in [(Fault::Refused, 1), (Fault::Lost, 1), (Fault::Overtaken, 1), (Fault::Unread, 9)]
    {
        let mut at = 0;
        loop {
            let faulty = Arc::new(Faulty::over(Arc::new(lake.fork()), at, fault, overtake));
            let root: Arc<dyn ObjectStore> = Arc::clone(&faulty) as _;
            let store = Store::over(root, "memory:///".parse().unwrap()).unwrap();
            if let Err(e) = live(&store).await {
                assert!(faulty.has_failed(), "{e:#}");
                live(&store).await.unwrap();
            }
            if !faulty.has_failed() {
                break;
            }
            let tables = Process::start(&faulty.behind(), WARM).await.tables;
            assert_eq!(ask(&tables, IN_RULE).await, silver, "{fault:?} at call {at}");
            at += stride;
        }
        assert!(at >= 4, "{fault:?}: only {at} calls could fail");
    }
}

/// A message of lane `anomalies`: (event, severity, begun at, ended at).
fn anomaly(seq: u64, event: u128, severity: &'static str, from: u64, to: Option<u64>) -> Message {
    let of = *readings(seq, &[]).identity.unwrap();
    let identity = Identity { lane: Lane::Anomalies, rows: 1, ..of };
    let schema = wire::schema(Lane::Anomalies);
    let columns = schema.fields().iter().map(|field| -> ArrayRef {
        let text: Arc<dyn Fn(&str) -> ArrayRef> = Arc::new(|word: &str| {
            let words = [word].into_iter().collect::<DictionaryArray<Int32Type>>();
            cast(&words, field.data_type()).unwrap()
        });
        let instant = |second: Option<u64>| -> ArrayRef {
            let micros = second.map(|second| at(second).as_micros());
            Arc::new(TimestampMicrosecondArray::from(vec![micros]).with_timezone("UTC"))
        };
        match field.name().as_str() {
            "event_id" => text(&Uuid::from_u128(event).to_string()),
            "state" => text(if to.is_some() { "cleared" } else { "raised" }),
            "severity" => text(severity),
            // The asset that weighs most may be another when it gets worse.
            "asset_id" => text(if severity == "critical" { "compressor" } else { "reactor" }),
            "started_at" => instant(Some(from)),
            "ended_at" => instant(to),
            "score" | "threshold" => Arc::new(Float64Array::from(vec![4.5])),
            name => text(name),
        }
    });
    let batch = RecordBatch::try_new(Arc::clone(&schema), columns.collect()).unwrap();
    message("plant/gw/anomalies", wire::encode(&batch, &identity).unwrap(), Some(identity))
}

/// What a server was sent: path, authorization, body.
type Taken = Arc<Mutex<Vec<(String, Option<String>, Value)>>>;

/// Alertmanager and a webhook in one; `refusals` requests are answered with 503.
async fn receiver(refusals: usize) -> (SocketAddr, Taken) {
    let taken = Taken::default();
    let left = Arc::new(Mutex::new(refusals));
    let take = move |State(taken): State<Taken>,
                     uri: axum::http::Uri,
                     headers: HeaderMap,
                     Json(body): Json<Value>| async move {
        let mut left = left.lock().unwrap();
        if *left > 0 {
            *left -= 1;
            return StatusCode::SERVICE_UNAVAILABLE;
        }
        let token = headers.get("authorization").map(|value| value.to_str().unwrap().to_owned());
        taken.lock().unwrap().push((uri.path().to_owned(), token, body));
        StatusCode::OK
    };
    let app = Router::new()
        .route("/api/v2/alerts", post(take.clone()))
        .route("/hook", post(take))
        .with_state(Arc::clone(&taken));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    (address, taken)
}

/// Settings that tell it, and the folder of the webhook's token.
fn receivers(address: SocketAddr) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("token");
    std::fs::write(&secret, "s3cret\n").unwrap();
    let text = format!(
        "[alerts]\nresend = \"30s\"\n[[alerts.alertmanager]]\nurl = \"http://{address}\"\n\
         [[alerts.webhook]]\nurl = \"http://{address}/hook\"\ntoken = \"file:{}\"\n",
        secret.display()
    );
    (folder, text)
}

fn later(seconds: u64) -> Timestamp {
    now() + Duration::from_secs(seconds)
}

#[tokio::test]
async fn anomalies_become_alerts_that_survive_a_restart() {
    let (address, taken) = receiver(0).await;
    let (_secret, text) = receivers(address);
    let store = Store::open("memory:///").unwrap();
    let process = Process::start(&store, &text).await;
    let mut engine = process.engine("anomalies").await;
    engine.step(now()).await.unwrap();
    let mut targets = Target::all(&process.settings.alerts).unwrap();
    let mut refiner = refiner(&store, &process.tables);

    put(&store, 0, &[anomaly(0, 1, "warning", 10, None), anomaly(1, 2, "warning", 20, None)]).await;
    refine_all(&mut refiner).await;
    assert_eq!(steps(&mut engine, later(0)).await, [Outcome::Ran(1, 2)]);
    for target in &mut targets {
        assert_eq!(target.tell(&process.board, later(0)).await.unwrap(), 2);
        assert_eq!(target.tell(&process.board, later(1)).await.unwrap(), 0);
    }
    let first = std::mem::take(&mut *taken.lock().unwrap());
    let (path, token, body) = &first[0];
    assert_eq!((path.as_str(), token), ("/api/v2/alerts", &None));
    let of_first = Value::from(Uuid::from_u128(1).to_string());
    let alert =
        body.as_array().unwrap().iter().find(|alert| alert["labels"]["event_id"] == of_first).unwrap();
    let labels = &alert["labels"];
    assert_eq!((&labels["alertname"], &labels["asset_id"]), (&"anomalies".into(), &"reactor".into()));
    assert_eq!(alert["startsAt"], at(10).to_string());
    assert_eq!(alert["endsAt"], later(120).to_string(), "four times as long as it is sent again");
    let (path, token, body) = &first[1];
    assert_eq!((path.as_str(), token.as_deref()), ("/hook", Some("Bearer s3cret")));
    assert_eq!(body["alerts"].as_array().unwrap().len(), 2);
    assert_eq!(body["alerts"][0]["status"], "firing");
    // Alertmanager is sent active alerts again; a webhook is not.
    let again =
        [targets[0].tell(&process.board, later(30)).await, targets[1].tell(&process.board, later(30)).await];
    assert_eq!(again.map(Result::unwrap), [2, 0]);

    // The process dies; meanwhile one event gets worse and the other ends, its end before its beginning.
    drop((engine, targets, process));
    taken.lock().unwrap().clear();
    let process = Process::start(&store, &text).await;
    put(&store, 1, &[anomaly(2, 1, "critical", 10, None), anomaly(3, 2, "warning", 20, Some(60))]).await;
    put(&store, 2, &[anomaly(5, 3, "warning", 30, Some(40)), anomaly(4, 3, "warning", 30, None)]).await;
    refine_all(&mut refiner).await;
    let mut engine = process.engine("anomalies").await;
    steps(&mut engine, later(60)).await;
    let mut targets = Target::all(&process.settings.alerts).unwrap();
    for target in &mut targets {
        target.tell(&process.board, later(60)).await.unwrap();
    }
    let told = std::mem::take(&mut *taken.lock().unwrap());
    let states: Vec<(&Value, &Value)> = told[1].2["alerts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|alert| (&alert["status"], &alert["labels"]["event_id"]))
        .collect();
    let ids = [1, 2].map(|event| Value::from(Uuid::from_u128(event).to_string()));
    assert_eq!(states.len(), 2, "of what ended before it was seen nobody is told: {states:?}");
    assert!(states.contains(&(&"firing".into(), &ids[0])), "{states:?}");
    assert!(states.contains(&(&"resolved".into(), &ids[1])), "{states:?}");

    let alert =
        told[1].2["alerts"].as_array().unwrap().iter().find(|alert| alert["status"] == "firing").unwrap();
    assert_eq!(
        (&alert["labels"]["asset_id"], &alert["labels"]["severity"]),
        (&"compressor".into(), &"critical".into())
    );

    // What is recorded: begun and worse, begun and ended, one that was over.
    let recorded =
        "select state, severity, count(*) n from rules.alerts group by state, severity order by 1, 2";
    let recorded = ask(&process.tables, recorded).await;
    for part in ["| firing   | critical | 1 |", "| firing   | warning  | 2 |", "| resolved | warning  | 2 |"]
    {
        assert!(recorded.contains(part), "{part}\n{recorded}");
    }
    let metrics = process.metrics();
    assert!(metrics.contains("tailrace_cloud_rule_alerts_active{rule=\"anomalies\"} 1"), "{metrics}");
    let listed = rules::list(&process.settings, &process.tables).await.unwrap();
    assert_eq!((listed[0].alerts_active, listed[0].plan, listed[0].newest), (Some(1), Some(2), 2));
}

#[tokio::test]
async fn an_alert_ends_when_nothing_confirms_it_also_after_a_restart() {
    let text = "[[rule]]\nname = \"hot\"\nsink = \"alert\"\nkey = [\"site\", \"device_id\"]\nresolve_after = \"60s\"\n\
        select = \"select site, device_id, max(value) as value from readings where value > 90 group by 1, 2\"\n";
    let (_, process, mut engine) = lake_and(text, "hot").await;
    steps(&mut engine, later(0)).await;
    engine.finish().await.unwrap();
    let states =
        "select alert_id, state, count(*) n, max(plan) p from rules.alerts group by 1, 2 order by 1, 2";
    let begun = ask(&process.tables, states).await;
    assert_eq!((begun.matches("firing").count(), begun.matches("resolved").count()), (1, 0), "{begun}");
    let mut engine = process.engine("hot").await;
    let mut other = process.engine("hot").await;
    assert_eq!(steps(&mut engine, later(100)).await, []);
    assert_eq!(steps(&mut other, later(100)).await, []);
    steps(&mut engine, later(159)).await;
    assert_eq!(ask(&process.tables, states).await, begun, "the time that a process was away does not count");
    steps(&mut engine, later(160)).await;
    let ended = ask(&process.tables, states).await;
    assert_eq!((ended.matches("firing").count(), ended.matches("resolved").count()), (1, 1), "{ended}");
    steps(&mut other, later(161)).await;
    assert_eq!(ask(&process.tables, states).await, ended, "it ends once, whoever sees it");
    // And stays ended in the next one.
    let mut engine = process.engine("hot").await;
    steps(&mut engine, later(161) + REMEMBER).await;
    assert_eq!(ask(&process.tables, states).await, ended);
}

#[tokio::test]
async fn a_receiver_that_fails_is_told_later_as_things_stand_then() {
    let (address, taken) = receiver(1).await;
    let (_secret, receivers) = receivers(address);
    let (_, process, mut engine) = lake_and(
        &format!(
            "[[rule]]\nname = \"hot\"\nsink = \"alert\"\nkey = [\"device_id\"]\nresolve_after = \"60s\"\n\
             select = \"select distinct device_id from readings where value > 90\"\n{receivers}"
        ),
        "hot",
    )
    .await;
    steps(&mut engine, later(0)).await;
    let mut targets = Target::all(&process.settings.alerts).unwrap();
    let refused = targets[0].tell(&process.board, later(0)).await.unwrap_err().to_string();
    assert!(refused.contains("503"), "{refused}");
    assert_eq!(targets[1].tell(&process.board, later(0)).await.unwrap(), 1, "the other is told");
    assert_eq!(targets[0].tell(&process.board, later(1)).await.unwrap(), 1);
    assert_eq!(taken.lock().unwrap().len(), 2);
    // Nobody is there: an error that names no address.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let secret = settings(&format!("[[alerts.webhook]]\nurl = \"http://{nobody}/T0KEN\"\n"));
    let error = Target::all(&secret.alerts).unwrap()[0].tell(&process.board, later(2)).await.unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("refused") && !error.contains("T0KEN"), "{error}");
}

fn broker_at(listen: SocketAddr) {
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
        max_segment_size: 1 << 20,
        max_segment_count: 10,
        ..RouterConfig::default()
    };
    let config = Config { router, v5: Some(HashMap::from([("1".to_owned(), server)])), ..Config::default() };
    std::thread::spawn(move || Broker::new(config).start().unwrap());
    while std::net::TcpStream::connect(listen).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whatever is published at `broker` from now on.
async fn listener(broker: SocketAddr) -> mpsc::Receiver<Publish> {
    let options = MqttOptions::new("listener", broker.ip().to_string(), broker.port());
    let (client, mut events) = AsyncClient::new(options, 10);
    client.subscribe("#", QoS::AtLeastOnce).await.unwrap();
    let (heard, messages) = mpsc::channel(100);
    let (subscribed, ready) = tokio::sync::oneshot::channel();
    let mut subscribed = Some(subscribed);
    tokio::spawn(async move {
        // As long as somebody may send.
        let _client = client;
        while let Ok(event) = events.poll().await {
            match event {
                Event::Incoming(Incoming::SubAck(_)) => drop(subscribed.take().map(|tell| tell.send(()))),
                Event::Incoming(Incoming::Publish(message)) => heard.send(message).await.unwrap(),
                _ => {}
            }
        }
    });
    ready.await.unwrap();
    messages
}

#[tokio::test]
async fn rows_are_published_and_a_broker_that_is_away_holds_up_its_own_rule_only() {
    let at = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = format!(
        "[mqtt]\nurl = \"mqtt://{at}\"\n{WARM}\
         [[rule]]\nname = \"tell\"\nsink = \"mqtt\"\ntopic = \"found/{{device_id}}\"\n\
         select = \"select device_id, ts, value from readings where value > 15 order by device_id, ts\"\n"
    );
    let (store, process, mut engine) = lake_and(&text, "tell").await;
    let mut warm = process.engine("warm").await;
    engine.step(now()).await.unwrap_err();
    assert_eq!(engine.step(now()).await.unwrap_err().to_string(), "publishing");
    // The other rule began after silver was filled, so it has nothing to see; it goes on.
    put(&store, 9, &[readings(90, &[(500, "z", 212.0)])]).await;
    refine_all(&mut refiner(&store, &process.tables)).await;
    assert_eq!(steps(&mut warm, now()).await, []);

    broker_at(at);
    let mut heard = listener(at).await;
    let done = steps(&mut engine, now()).await;
    let expected: usize =
        done.iter().map(|done| if let Outcome::Ran(_, rows) = done { *rows } else { 0 }).sum();
    let mut messages = Vec::new();
    while messages.len() < expected {
        messages.push(heard.recv().await.unwrap());
    }
    assert!(expected >= 7, "{done:?}");
    let topics: Vec<&str> = messages.iter().map(|m| std::str::from_utf8(&m.topic).unwrap()).collect();
    assert!(topics.contains(&"found/a") && topics.contains(&"found/z"), "{topics:?}");
    let payload: Value = serde_json::from_slice(&messages[0].payload).unwrap();
    assert_eq!((&payload["device_id"], &payload["value"]), (&"a".into(), &100.0.into()));
    let property = |message: &Publish, name: &str| {
        let properties = &message.properties.as_ref().unwrap().user_properties;
        properties.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()).unwrap()
    };
    assert_eq!((property(&messages[0], "rule"), property(&messages[0], "plan")), ("tell".into(), "1".into()));
    let mut ids: Vec<String> = messages.iter().map(|message| property(message, "id")).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), expected);
    let published =
        ask(&process.tables, "select sum(messages) from rules.published where rule = 'tell'").await;
    assert!(published.contains(&format!("| {expected} ")), "{published}");
    // The next process publishes nothing again.
    let mut next = Process::start(&store, &text).await.engine("tell").await;
    assert_eq!(steps(&mut next, now()).await, []);
}

/// A rule whose rows go to a table.
fn to_table(name: &str, select: &str) -> String {
    format!("[[rule]]\nname = \"{name}\"\nsink = \"table\"\nselect = \"{select}\"\n")
}

#[tokio::test]
async fn a_rule_that_fails_is_counted_and_harms_no_other() {
    let text = [
        "[rules]\nrows = 2\ntimeout = \"300ms\"\n".to_owned(),
        to_table("words", "select cast(device_id as bigint) as n from readings"),
        to_table("many", "select device_id, ts from readings"),
        to_table("slow", "select sum(g.value) as s from readings, generate_series(1, 1000000000000) g"),
        to_table("good", "select count(*) as n from readings"),
    ]
    .concat();
    let store = Store::open("memory:///").unwrap();
    let process = Process::start(&store, &text).await;
    let mut engines = Vec::new();
    for name in ["words", "many", "slow", "good"] {
        let mut engine = process.engine(name).await;
        assert_eq!(engine.step(now()).await.unwrap(), Outcome::Idle);
        engines.push(engine);
    }
    put(&store, 0, &[readings(0, &[(0, "a", 212.0), (1, "a", 213.0), (0, "b", 32.0)])]).await;
    refine_all(&mut refiner(&store, &process.tables)).await;
    let mut reasons = Vec::new();
    for engine in &mut engines {
        // What ran out of time may have waited for the store: it is tried three times in all.
        let mut done = engine.step(now()).await;
        for _ in 0..2 {
            if done.as_ref().is_err_and(|e| e.to_string().contains("statement timeout")) {
                done = engine.step(now()).await;
            }
        }
        assert_eq!(steps(engine, now()).await, []);
        // `good` may need longer than 300 ms on a loaded machine; the others must fail whatever they are given.
        match done {
            Ok(Outcome::Failed(1, failure)) => reasons.push(failure),
            Ok(Outcome::Ran(1, 1)) => {}
            other => panic!("{other:?}"),
        }
    }
    let said: Vec<(&str, bool)> = reasons.iter().map(|f| (f.reason, f.text.contains("rules."))).collect();
    assert!(said.starts_with(&[("sql", false), ("rows", true), ("timeout", true)]), "{reasons:?}");
    let metrics = process.metrics();
    for (name, reason) in [("words", "sql"), ("many", "rows"), ("slow", "timeout")] {
        let line = format!("tailrace_cloud_rule_failures_total{{rule=\"{name}\",reason=\"{reason}\"}} 1");
        assert!(metrics.contains(&line), "{line}\n{metrics}");
    }
    // Another plan that fails does not bring the first one back.
    put(&store, 1, &[readings(1, &[(2, "a", 214.0)])]).await;
    refine_all(&mut refiner(&store, &process.tables)).await;
    let mut done = engines[2].step(now()).await;
    for _ in 0..2 {
        if done.is_err() {
            done = engines[2].step(now()).await;
        }
    }
    assert!(matches!(done, Ok(Outcome::Failed(2, _))), "{done:?}");
}

#[tokio::test]
async fn a_rule_that_wants_too_much_memory_is_stopped_and_harms_no_other() {
    // A window over all rows sorts them first.
    let sums = "select max(sums.s) as m from (select sum(g.value) over (order by g.value desc) as s \
                from readings, generate_series(1, 1000000) g) sums";
    let folder = tempfile::tempdir().unwrap();
    let text = [
        format!("roles = [\"refine\"]\n[store]\nurl = \"{}\"\n", folder.path().display()),
        "[rules]\nmemory_limit = 1048576\ntimeout = \"10min\"\n".to_owned(),
        to_table("large", sums),
        to_table("good", "select count(*) as n from readings"),
    ]
    .concat();
    let settings = settings(&text);
    let store = Store::open(&settings.store.url).unwrap();
    put(&store, 0, &[readings(0, &[(0, "a", 212.0), (0, "b", 32.0)])]).await;
    let (_stop, stopped) = watch::channel(true);
    pipeline::run(settings.clone(), Arc::new(SystemClock), None, stopped).await.unwrap();
    let (_, tables) = rules::plan(&settings, &Tables::open(&store).await.unwrap()).await.unwrap();
    assert!(ask(&tables, "select count(*) as rows from rules.large").await.contains("| 0 "));
    assert!(ask(&tables, "select n from rules.good").await.contains("| 2 "));

    // What people read of it.
    let large = rules::find(&settings, &tables, "large").await.unwrap();
    let everything = trial::Options { on: On::Silver, from: at(0), to: later(60), show: 2 };
    let tried =
        trial::run(&settings, &tables, Arc::new(SystemClock), &large, &everything).await.unwrap().to_string();
    assert!(tried.contains("rules.memory_limit"), "{tried}");
}

#[tokio::test]
async fn mistakes_are_refused_at_the_start_all_together() {
    let rule = |name: &str, rest: &str, select: &str| {
        format!("[[rule]]\nname = \"{name}\"\n{rest}\nselect = \"{select}\"\n")
    };
    let table = "sink = \"table\"";
    let text = [
        rule("a", table, "select valu from batch.readings"),
        rule("b", table, "select count(*) as n from silver.sensor_readings"),
        rule("c", table, "delete from silver.sensor_readings"),
        rule("d", table, "select max(value) from readings"),
        rule("e", "sink = \"alert\"\nkey = [\"asset\"]", "select site from readings"),
        rule("f", "sink = \"mqtt\"\ntopic = \"x/{asset}\"", "select site from readings"),
        rule("g", table, "select site from reading"),
        rule("h", table, "selec site from readings"),
        rule("i", "sink = \"alert\"\nkey = [\"site\"]", "select site, 'yes' as resolved from readings"),
        rule("j", table, "select ts - received_at as age from readings"),
        rule("k", table, "select 1 as plan from readings"),
        rule("l", table, "select x.site, y.site from readings x join readings y on x.ts = y.ts"),
        rule("off", "sink = \"table\"\nenabled = false", "select nothing from nowhere"),
        rule(
            "good",
            table,
            "select time_bucket('5 minutes', ts) as t, avg(value) as v from readings group by 1",
        ),
    ]
    .concat();
    let store = Store::open("memory:///").unwrap();
    let tables = Tables::open(&store).await.unwrap();
    let settings = settings(&text);
    let mistakes = rules::plan(&settings, &tables).await.err().unwrap().to_string();
    for part in [
        "rule.a.select: Schema error: No field named valu",
        "rule.b.select: it reads nothing of the batch: none of readings, aggregates",
        "rule.c.select: it is no query",
        "rule.d.select: column \"max(readings.value)\" has no plain name; name it",
        "rule.e.key: the select has no column \"asset\"",
        "rule.f.topic: the select has no column \"asset\"",
        "rule.g.select: ",
        "rule.h.select: ",
        "rule.i.select: column resolved is Utf8, not Boolean",
        "rule.j.select: column \"age\" is ",
        "rule.k.select: a column is named \"plan\"",
        "rule.l.select: two columns are named \"site\"",
    ] {
        assert!(mistakes.contains(part), "{part:?} not in {mistakes}");
    }
    assert!(!mistakes.contains("rule.off") && !mistakes.contains("rule.good"), "{mistakes}");
    let listed = rules::list(&settings, &tables).await.unwrap();
    let off = listed.iter().find(|rule| rule.name == "off").unwrap();
    assert!(!off.enabled && off.mistake.is_some(), "{off:?}");

    // A table that is there already keeps its columns.
    let (store, _, mut engine) = lake_and(WARM, "warm").await;
    steps(&mut engine, now()).await;
    let other = WARM.replace("ts, value", "ts");
    let tables = Tables::open(&store).await.unwrap();
    let error = rules::plan(&self::settings(&other), &tables).await.err().unwrap().to_string();
    assert!(error.contains("rule.warm.table: rules.warm has the columns site"), "{error}");
}

#[tokio::test]
async fn tried_on_bronze_or_silver_a_rule_finds_what_it_finds_when_it_runs() {
    // Also what came last.
    let warm = WARM.replace("> 15", "> 5");
    let text = format!(
        "{warm}[[rule]]\nname = \"off\"\nenabled = false\nsink = \"alert\"\nkey = [\"device_id\"]\n\
         resolve_after = \"1s\"\nselect = \"select device_id from readings where value > 90\"\n\
         [[rule]]\nname = \"tell\"\nsink = \"mqtt\"\nselect = \"select device_id from readings where value > 90\"\n"
    );
    let (store, process, mut engine) = lake_and(&text, "warm").await;
    steps(&mut engine, now()).await;
    let stored = ask(&process.tables, "select count(*) n from rules.warm").await;
    let everything = trial::Options { on: On::Silver, from: at(0), to: later(60), show: 2 };
    let run = async |name: &str, options: &trial::Options| {
        let rule = rules::find(&process.settings, &process.tables, name).await.unwrap();
        let clock = Arc::new(SystemClock);
        trial::run(&process.settings, &process.tables, clock, &rule, options).await.unwrap()
    };
    let silver = run("warm", &everything).await;
    assert!(stored.contains(&format!("| {} ", silver.table_rows)), "{stored}\n{silver}");
    assert_eq!((silver.rows, silver.batches, silver.failed), (silver.table_rows, 2, 0));
    assert_eq!((silver.payloads.len(), silver.payloads[0]["table"].as_str()), (2, Some("warm")));
    let bronze = run("warm", &trial::Options { on: On::Bronze, ..everything }).await;
    assert_eq!((bronze.rows, bronze.batches), (silver.rows, 1), "five segments are one batch");
    // One message came a second after the others.
    let first = trial::Options { to: later(1), ..everything };
    let (of_silver, of_bronze) =
        (run("warm", &first).await, run("warm", &trial::Options { on: On::Bronze, ..first }).await);
    assert!(of_silver.rows < silver.rows, "{of_silver}");
    assert_eq!(of_bronze.rows, of_silver.rows);
    let before = run("warm", &trial::Options { from: at(0) - REMEMBER, to: at(0), ..everything }).await;
    assert_eq!((before.rows, before.payloads.len()), (0, 0));
    let alerts = run("off", &everything).await;
    assert_eq!((alerts.alerts, alerts.alerts_active, alerts.messages), (1, 1, 0), "{alerts}");
    let messages = run("tell", &everything).await;
    assert_eq!(messages.messages, messages.rows);
    assert_eq!(messages.payloads[0]["topic"], "tailrace/v1/_cloud/rules/tell");
    // Nothing was written.
    let tables = Tables::open(&store).await.unwrap();
    for table in [Table::alerts(), Table::published()] {
        assert!(tables.snapshot(table).await.unwrap().is_none());
    }
}

#[tokio::test]
async fn the_pipeline_runs_rules_and_tells_before_it_ends() {
    let (address, taken) = receiver(0).await;
    let folder = tempfile::tempdir().unwrap();
    let lake = folder.path().display();
    let (_secret, receivers) = receivers(address);
    let text = format!("roles = [\"refine\"]\n[store]\nurl = \"{lake}\"\n{WARM}{receivers}");
    let settings = settings(&text);
    let store = Store::open(&settings.store.url).unwrap();
    fill(&store).await;
    put(&store, 9, &[anomaly(0, 1, "warning", 10, None)]).await;
    let (_stop, stopped) = watch::channel(true);
    pipeline::run(settings.clone(), Arc::new(SystemClock), None, stopped.clone()).await.unwrap();
    let (_, tables) = rules::plan(&settings, &Tables::open(&store).await.unwrap()).await.unwrap();
    let silver = ask(&tables, IN_SILVER).await;
    assert_eq!(ask(&tables, IN_RULE).await, silver, "new rules see all that is refined after the start");
    assert_eq!(taken.lock().unwrap().len(), 2, "Alertmanager and the webhook");
    taken.lock().unwrap().clear();
    put(&store, 10, &[anomaly(1, 2, "critical", 50, None), readings(99, &[(700, "w", 212.0)])]).await;
    pipeline::run(settings, Arc::new(SystemClock), None, stopped).await.unwrap();
    let warm = ask(&tables, "select count(*) n from rules.warm where device_id = 'w'").await;
    assert!(warm.contains("| 1 |"), "{warm}");
    let told = taken.lock().unwrap();
    let event = Uuid::from_u128(2).to_string();
    let of_event = told.iter().filter(|(_, _, body)| body.to_string().contains(&event)).count();
    assert_eq!(of_event, 2, "Alertmanager and the webhook: {told:?}");
}
