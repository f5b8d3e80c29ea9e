//! The servers as clients see them, over a lake in memory.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use arrow::{
    array::{ArrayRef, AsArray, RecordBatch, StringArray, TimestampMicrosecondArray, new_null_array},
    compute::cast,
    datatypes::{DataType, Float64Type},
};
use bytes::Bytes;
use common::{
    documents::{LaneStatus, Status},
    time::{Pacer, SystemClock},
    wire::{self, Identity, Lane, Stream, Topic},
};
use datafusion::common::ParamValues;
use futures::TryStreamExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::Instant,
};

use super::{
    catalog::{Catalog, FRESH_FOR, SessionSource},
    sql::SqlError,
    *,
};
use crate::{lake::Table, store::Store};

struct Lake {
    tables: Tables,
    live: Live,
    queries: Arc<Queries>,
}

async fn lake(limits: Limits) -> Lake {
    let tables = Tables::open(&Store::open("memory:///").unwrap()).await.unwrap();
    let settings = ServeSettings { limits, memory_limit: 64 << 20, ..ServeSettings::loopback() };
    let live = Live::new(settings.keep, Arc::new(SystemClock));
    let ledger = Arc::new(LedgerTable::new(tables.clone(), Arc::new(SystemClock)));
    let queries = Arc::new(queries(&settings, &tables, &live, &ledger).await.unwrap());
    Lake { tables, live, queries }
}

fn limits() -> Limits {
    Limits { timeout: Duration::from_secs(20), rows: 1_000 }
}

/// An asset with nulls and empty text where nothing else is needed.
async fn add_asset(tables: &Tables, id: &str, version: i64) {
    let schema = Table::Assets.schema();
    let columns = schema.fields().iter().map(|field| -> ArrayRef {
        match field.name().as_str() {
            "asset_id" => Arc::new(StringArray::from(vec![id])),
            "updated_at" => Arc::new(TimestampMicrosecondArray::from(vec![0]).with_timezone("UTC")),
            _ if field.is_nullable() => new_null_array(field.data_type(), 1),
            _ => Arc::new(StringArray::from(vec!["s"])),
        }
    });
    let batch = RecordBatch::try_new(Arc::clone(&schema), columns.collect()).unwrap();
    let base = tables.snapshot(Table::Assets).await.unwrap();
    tables.append(Table::Assets, base, vec![batch], ("test", version)).await.unwrap();
}

#[tokio::test]
async fn a_lake_that_does_not_answer_keeps_nobody_waiting() {
    let tables = Tables::open(&Store::open("memory:///").unwrap()).await.unwrap();
    let away = Arc::new(AtomicBool::new(false));
    let of_source = Arc::clone(&away);
    let source: SessionSource = Arc::new(move || {
        let (tables, away) = (tables.clone(), Arc::clone(&of_source));
        Box::pin(async move {
            if away.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
            tables.session().await
        })
    });
    let live = Live::new(ServeSettings::loopback().keep, Arc::new(SystemClock));
    let catalog = Catalog::open(source, &live, 64 << 20).await.unwrap();
    away.store(true, Ordering::Relaxed);
    tokio::time::sleep(FRESH_FOR).await;
    let error = catalog.refresh_within(Duration::from_millis(10)).await.unwrap_err().to_string();
    assert_eq!(error, "the lake has not answered for 10ms: is its store there?");
    away.store(false, Ordering::Relaxed);
    catalog.refresh().await.unwrap();
}

#[tokio::test]
async fn only_what_reads_the_lake_may_run() {
    let lake = lake(limits()).await;
    let mut wrong = Vec::new();
    for (sql, sqlstate) in [
        ("INSERT INTO gold.assets SELECT * FROM gold.assets", "25006"),
        ("UPDATE gold.assets SET path = 'x'", "25006"),
        ("DELETE FROM gold.assets", "25006"),
        ("TRUNCATE gold.assets", "25006"),
        ("CREATE TABLE x (a INT)", "25006"),
        ("CREATE TABLE x AS SELECT 1", "25006"),
        ("CREATE VIEW x AS SELECT 1", "25006"),
        ("DROP TABLE gold.assets", "25006"),
        ("ALTER TABLE gold.assets ADD COLUMN a INT", "25006"),
        ("COPY (SELECT 1) TO '/tmp/x.csv'", "25006"),
        ("COPY gold.assets FROM '/etc/passwd'", "25006"),
        ("SELECT 1 INTO x", "25006"),
        ("WITH x AS (INSERT INTO gold.assets SELECT * FROM gold.assets) SELECT 1", "25006"),
        ("EXPLAIN INSERT INTO gold.assets SELECT * FROM gold.assets", "25006"),
        ("EXPLAIN ANALYZE DELETE FROM gold.assets", "25006"),
        ("EXPLAIN EXPLAIN SELECT 1", "42601"),
        ("PREPARE x AS DELETE FROM gold.assets", "25006"),
        ("SET datafusion.execution.batch_size = 1", "42501"),
        ("SET datafusion.runtime.memory_limit = '9T'", "42501"),
        ("BEGIN", "0A000"),
        ("DECLARE c CURSOR FOR SELECT 1", "0A000"),
        ("SELECT 1; SELECT 2", "42601"),
        ("", "42601"),
        ("SELEKT", "42601"),
        ("SELECT * FROM '/etc/passwd'", "42P01"),
        ("SELECT * FROM gold.nothing", "42P01"),
        ("SELECT nothing FROM gold.assets", "42703"),
        ("SELECT read_csv('/etc/passwd')", "42883"),
        ("SELECT 1/0", "22012"),
        ("SELECT 'x'::float8", "22P02"),
        ("SELECT repeat(arrow_cast('x', 'LargeUtf8'), 1000000000000)", "42883"),
        ("SELECT levenshtein('a', 'b')", "42883"),
        ("SELECT range(1, 10000000000)", "42883"),
        ("SELECT * FROM generate_series(1, 1001)", "54000"),
    ] {
        match lake.queries.run(sql, u64::MAX).await {
            Err(error) if error.sqlstate() == sqlstate => {}
            other => wrong.push(format!("{sql}: {other:?}")),
        }
    }
    for (sql, rows) in [
        ("SELECT * FROM gold.assets", 0),
        ("WITH x AS (SELECT 1 AS a) SELECT a FROM x", 1),
        ("VALUES (1), (2)", 2),
        ("EXPLAIN SELECT 1", 2),
        ("SHOW COLUMNS FROM gold.assets", 11),
        ("SELECT * FROM generate_series(1, 1000)", 1000),
        ("SELECT * FROM silver.readings_now", 0),
        ("SELECT * FROM live.status", 0),
        ("SELECT * FROM ops.delivery_ledger", 0),
        ("SELECT version(), current_setting('server_version_num'), current_schema(), pg_is_in_recovery()", 1),
        ("SELECT quote_ident('a b'), array_upper(ARRAY[1], 1), string_to_array('a,b', ',')", 1),
    ] {
        let answer = lake.queries.run(sql, u64::MAX).await;
        let counted = answer.as_ref().map(|a| a.batches.iter().map(RecordBatch::num_rows).sum::<usize>());
        if !counted.as_ref().is_ok_and(|counted| *counted == rows) {
            wrong.push(format!("{sql}: {counted:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn a_query_ends_in_time() {
    let timeout = Duration::from_millis(200);
    let lake = lake(Limits { timeout, ..limits() }).await;
    let began = Instant::now();
    let sql = "SELECT count(*) FROM generate_series(1, 100000000000) a";
    let error = lake.queries.run(sql, u64::MAX).await.unwrap_err();
    assert!(matches!(error, SqlError::Timeout(t) if t == timeout), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_prepared_statement_sees_new_snapshots() {
    let Lake { tables, queries, .. } = lake(limits()).await;
    let text = "SELECT asset_id FROM gold.assets WHERE asset_id <> $1 ORDER BY 1";
    let parsed = datafusion::sql::sqlparser::parser::Parser::parse_sql(
        &datafusion::sql::sqlparser::dialect::PostgreSqlDialect {},
        text,
    );
    let prepared = queries.plan(parsed.unwrap().remove(0)).await.unwrap();
    let mut seen = Vec::new();
    for (version, asset) in ["pump-01", "pump-02"].into_iter().enumerate() {
        add_asset(&tables, asset, version as i64).await;
        tokio::time::sleep(catalog::FRESH_FOR).await;
        let params = ParamValues::from(vec![datafusion::scalar::ScalarValue::from("none")]);
        let bound = Queries::bind(&prepared, &params).unwrap();
        let deadline = Instant::now() + limits().timeout;
        let (_, rows) = queries.execute(bound, limits(), deadline).await.unwrap();
        let rows: Vec<RecordBatch> = rows.try_collect().await.unwrap();
        seen.push(rows.iter().map(RecordBatch::num_rows).sum::<usize>());
    }
    assert_eq!(seen, [1, 2]);
}

#[tokio::test]
async fn buckets_begin_where_timescale_has_them() {
    let lake = lake(limits()).await;
    for (width, at, expected) in [
        ("60.000s", "2026-03-01T06:00:59.9Z", "2026-03-01T06:00:00Z"),
        ("5 minutes", "2026-03-01T06:09:00Z", "2026-03-01T06:05:00Z"),
        ("1 hour", "2026-03-01T06:09:00Z", "2026-03-01T06:00:00Z"),
        ("1 day", "2026-03-01T06:09:00Z", "2026-03-01T00:00:00Z"),
        // Mondays.
        ("1 week", "2026-03-01T06:09:00Z", "2026-02-23T00:00:00Z"),
    ] {
        let sql = format!(
            "SELECT time_bucket('{width}', arrow_cast('{at}', 'Timestamp(Microsecond, Some(\"UTC\"))'))"
        );
        let answer = lake.queries.run(&sql, 1).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
        assert_eq!(json::rows(&answer.batches)[0][0], expected, "{width}");
    }
}

/// A clock that stands where it was put.
#[derive(Default)]
struct Still(AtomicI64);

impl Clock for Still {
    fn now(&self) -> Timestamp {
        Timestamp::from_micros(self.0.load(Ordering::SeqCst))
    }
    fn pacer(&self) -> Box<dyn Pacer> {
        Box::new(SystemClock)
    }
}

fn status(online: bool, at: i64) -> Vec<u8> {
    let epoch = Uuid::from_u128(7);
    let lane = LaneStatus { epoch, lane: Lane::Readings, head: 12, rows: 0, oldest: 9 };
    let status = Status {
        v: 1,
        online,
        at: Timestamp::from_micros(at),
        epoch,
        version: "1".into(),
        config_sha256: String::new(),
        models: Vec::new(),
        lanes: vec![lane],
    };
    serde_json::to_vec(&status).unwrap()
}

#[test]
fn a_silent_gateway_is_unknown_since_it_was_last_heard() {
    const S: i64 = 1_000_000;
    let clock = Arc::new(Still::default());
    let keep = Keep { heartbeat: Duration::from_secs(60), ..Keep::default() };
    let live = Live::new(keep, Arc::clone(&clock) as Arc<dyn Clock>);
    let topic = Topic { site: "s".into(), gateway: "g".into(), stream: Stream::Status };
    let check = |at: i64, message: Option<(&[u8], bool)>, unknown_since: Option<i64>| {
        clock.0.store(at, Ordering::SeqCst);
        if let Some((payload, retained)) = message {
            live.push(&topic, &Bytes::copy_from_slice(payload), 1, retained);
        }
        let seen = live.gateways()[0].clone();
        assert_eq!(seen.unknown_since, unknown_since.map(Timestamp::from_micros), "at {at}: {seen:?}");
        assert_eq!(seen.online, unknown_since.is_none());
    };
    // A retained status is as old as it says.
    check(1_000 * S, Some((&status(true, 10 * S), true)), Some(10 * S));
    check(1_001 * S, Some((&status(true, 1_001 * S), false)), None);
    check(1_181 * S, None, None);
    check(1_182 * S, None, Some(1_001 * S));
    check(1_200 * S, Some((&status(true, 1_200 * S), false)), None);
    // The last will is the broker's word, not the gateway's.
    check(1_210 * S, Some((&status(false, 10 * S), false)), Some(1_200 * S));
    assert_eq!(live.gateways()[0].outbox, Some(3));
    live.push(&topic, &Bytes::from_static(b"no JSON"), 1, false);
    let readings = Topic { stream: Stream::Lane(Lane::Readings), ..topic.clone() };
    live.push(&readings, &Bytes::from_static(b"poison"), 1, false);
    assert_eq!(in_memory(&live).num_rows(), 0);
}

/// All of `live.readings`.
fn in_memory(live: &Live) -> RecordBatch {
    let every = |devices: &RecordBatch| vec![true; devices.num_rows()].into();
    let batches = live.readings(&[0, 1, 2, 3, 4, 5, 6, 7, 8], every).unwrap();
    arrow::compute::concat_batches(&live::readings_schema(), &batches).unwrap()
}

/// So many readings of each device of a gateway, a second apart, as a message of JSON.
fn push_json(live: &Live, gateway: &str, devices: usize, readings: usize) {
    let topic = Topic { site: "s".into(), gateway: gateway.into(), stream: Stream::Json };
    let row = |m: usize, n: usize| {
        let (kind, unit) = [("flow", "L/min"), ("pressure", "bar")][m % 2];
        serde_json::json!({
            "device_id": format!("{gateway}/{m}"), "device_type": kind, "unit": unit, "asset_id": gateway,
            "timestamp": 1_700_000_000 + n, "value": m as f64,
        })
    };
    for n in 0..readings {
        let rows: serde_json::Value = (0..devices).map(|m| row(m, n)).collect();
        live.push(&topic, &rows.to_string().into(), 0, false);
    }
}

#[test]
fn a_device_is_what_it_was_last_said_to_be_and_no_reading_is_of_the_future() {
    const T: i64 = 1_700_000_000;
    let clock = Arc::new(Still::default());
    let live = Live::new(Keep::default(), Arc::clone(&clock) as Arc<dyn Clock>);
    let topic = Topic { site: "s".into(), gateway: "g".into(), stream: Stream::Json };
    let push = |received: i64, ts: i64, unit: &str, value: f64| {
        clock.0.store(received * 1_000_000, Ordering::SeqCst);
        let row = serde_json::json!({
            "device_id": "p", "device_type": "pressure", "unit": unit, "asset_id": "a", "timestamp": ts, "value": value,
        });
        live.push(&topic, &row.to_string().into(), 0, false);
        let known = in_memory(&live);
        let values = known.column_by_name("value").unwrap().as_primitive::<Float64Type>().values().to_vec();
        let unit = cast(known.column_by_name("unit").unwrap(), &DataType::Utf8).unwrap();
        (unit.as_string::<i32>().value(0).to_owned(), values)
    };
    assert_eq!(push(T, T, "bar", 1.0), ("bar".to_owned(), vec![1.0]));
    // A year ahead.
    assert_eq!(push(T + 1, T + 31_536_000, "bar", 9.0), ("bar".to_owned(), vec![1.0]));
    assert_eq!(push(T + 2, T + 2, "bar", 2.0), ("bar".to_owned(), vec![1.0, 2.0]));
    assert_eq!(push(T + 3, T + 3, "kPa", 300.0), ("kPa".to_owned(), vec![300.0]));
    // What comes late is of the device as it was.
    assert_eq!(push(T + 4, T + 1, "bar", 1.5), ("kPa".to_owned(), vec![300.0]));
    assert_eq!(push(T + 5, T + 2, "kPa", 200.0), ("kPa".to_owned(), vec![200.0, 300.0]));
}

#[tokio::test]
async fn live_readings_are_found_by_whatever_is_asked_of_devices() {
    let lake = lake(limits()).await;
    push_json(&lake.live, "a", 7, 9);
    push_json(&lake.live, "b", 4, 3);
    let answer = async |sql: String| {
        let answer = lake.queries.run(&sql, 1_000).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
        json::rows(&answer.batches)
    };
    for (filter, found) in [
        ("true", 75),
        ("device_id = 'a/3'", 9),
        ("'a/3' = r.device_id AND site = 's'", 9),
        ("device_id IN ('a/1', 'b/1', 'c/1', 'd/1', 'e/1')", 12),
        ("device_id NOT IN ('a/1', 'b/1')", 63),
        ("device_type = 'pressure' OR asset_id = 'b'", 39),
        ("device_id LIKE 'b/%' AND unit = 'bar'", 6),
        ("upper(asset_id) = 'B' AND value > 1.5", 6),
        ("device_id = 'a/0' AND ts > to_timestamp(1700000006)", 2),
        ("device_id = 'a/0' OR value = 3.0", 21),
        ("CASE WHEN asset_id = 'b' THEN NULL ELSE true END", 63),
        ("device_id = 'nobody'", 0),
    ] {
        let order = "ORDER BY device_id, ts";
        let rows = answer(format!("SELECT * FROM live.readings r WHERE {filter} {order}")).await;
        // A limit lets no filter through.
        let all = "SELECT * FROM live.readings LIMIT 1000";
        let expected = answer(format!("SELECT * FROM ({all}) r WHERE {filter} {order}")).await;
        assert_eq!((rows.len(), &rows), (found, &expected), "{filter}");
        let count = answer(format!("SELECT count(*) FROM live.readings r WHERE {filter}")).await;
        assert_eq!(count, [serde_json::json!([found])], "{filter}");
    }
    let gateways = answer("SELECT gateway_id FROM live.status WHERE site = 's'".into()).await;
    assert!(gateways.is_empty(), "what stands for other people's devices sends no heartbeat: {gateways:?}");
}

#[tokio::test]
async fn live_readings_need_no_more_memory_than_is_asked_for() {
    // All of them, as rows, are more than all queries may hold.
    let lake = lake(limits()).await;
    push_json(&lake.live, "a", 1_000, 400);
    let sql = "SELECT device_type, count(*), max(ts) FROM live.readings WHERE device_id LIKE 'a/%' GROUP BY device_type";
    let answer = lake.queries.run(sql, 10).await.unwrap();
    let rows = json::rows(&answer.batches);
    assert_eq!((rows.len(), &rows[0][1], &rows[1][1]), (2, &200_000.into(), &200_000.into()), "{rows:?}");
}

#[test]
fn readings_wait_for_whoever_looks_and_each_gateway_keeps_its_share() {
    const MILLION: u64 = 1_000_000;
    let clock = Arc::new(Still::default());
    let live = Live::new(Keep::default(), Arc::clone(&clock) as Arc<dyn Clock>);
    let push = |gateway: &str, ts: i64, claimed: u64| {
        clock.0.store(ts, Ordering::SeqCst);
        let topic = Topic { site: "s".into(), gateway: gateway.into(), stream: Stream::Lane(Lane::Readings) };
        let text = |word: &str| -> ArrayRef {
            Arc::new(
                [word].into_iter().collect::<arrow::array::DictionaryArray<arrow::datatypes::Int32Type>>(),
            )
        };
        let columns: Vec<ArrayRef> = vec![
            Arc::new(TimestampMicrosecondArray::from(vec![ts]).with_timezone("UTC")),
            text(gateway),
            text("flow"),
            text("pump"),
            text("L/min"),
            text("gauge"),
            Arc::new(arrow::array::Float64Array::from(vec![ts as f64])),
            Arc::new(arrow::array::UInt8Array::from(vec![0])),
        ];
        let batch = RecordBatch::try_new(wire::schema(Lane::Readings), columns).unwrap();
        let identity = Identity {
            v: 1,
            epoch: uuid::Uuid::nil(),
            lane: Lane::Readings,
            seq: 0,
            rows: 1,
            rows_before: 0,
            oldest: 0,
            sealed_at: Timestamp::from_micros(ts),
            clock: wire::ClockState::Synced,
        };
        live.push(&topic, &wire::encode(&batch, &identity).unwrap().into(), claimed, false);
    };
    let seen = || -> Vec<(String, i64)> {
        let rows = in_memory(&live);
        let (ts, device) = (rows.column(0), rows.column(2));
        let ts = ts.as_primitive::<arrow::datatypes::TimestampMicrosecondType>();
        (0..rows.num_rows()).map(|i| (device.as_string::<i32>().value(i).to_owned(), ts.value(i))).collect()
    };
    push("quiet", 10, 1);
    // What a gateway claims beyond its share displaces its own oldest, and nobody else's.
    for ts in [20, 30, 40] {
        push("loud", ts, MILLION / 3);
    }
    let expected = |all: &[(&str, i64)]| all.iter().map(|(d, ts)| ((*d).to_owned(), *ts)).collect::<Vec<_>>();
    assert_eq!(seen(), expected(&[("loud", 40), ("quiet", 10)]));
    push("loud", 50, 1);
    assert_eq!(seen(), expected(&[("loud", 40), ("loud", 50), ("quiet", 10)]));
    // A message that claims one row weighs what its bytes do.
    push("loud", 55, 1);
    let large = Topic { site: "s".into(), gateway: "loud".into(), stream: Stream::Lane(Lane::Readings) };
    live.push(&large, &vec![0; 41_000_000].into(), 1, false);
    assert_eq!(seen().len(), 3, "{:?}", seen());
    // Other people's devices are there too, and stand for no gateway.
    let json = Topic { site: "s".into(), gateway: "zigbee".into(), stream: Stream::Json };
    live.push(&json, &r#"{"device_id":"door","timestamp":0.00007,"value":1}"#.into(), 1, false);
    live.push(&json, &"no JSON".into(), 1, false);
    assert!(seen().contains(&("door".to_owned(), 70)), "{:?}", seen());
    assert!(live.gateways().iter().all(|gateway| gateway.gateway_id != "zigbee"));
    // Nothing older than what is kept.
    push("quiet", 60, 1);
    push("quiet", 60 + 901 * 1_000_000, 1);
    assert_eq!(seen().len(), 4, "{:?}", seen());
}

/// Sends one request and returns the status and the whole answer.
async fn exchange(address: SocketAddr, head: &str, body: &str) -> (u16, String) {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let request = format!("{head}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    (answer[9..12].parse().unwrap(), answer)
}

struct Running {
    pg: SocketAddr,
    http: SocketAddr,
    pressed: mpsc::Receiver<char>,
    recorded: mpsc::Receiver<Maintenance>,
    _stop: watch::Sender<bool>,
}

async fn running(users: BTreeMap<String, SecretRef>) -> Running {
    let tables = Tables::open(&Store::open("memory:///").unwrap()).await.unwrap();
    add_asset(&tables, "pump-01", 1).await;
    let (keys, pressed) = mpsc::channel(4);
    let (records, recorded) = mpsc::channel(4);
    let (stop, stopped) = watch::channel(false);
    let any = || TcpListener::bind("127.0.0.1:0");
    let (pg, http) = (any().await.unwrap(), any().await.unwrap());
    let addresses = [&pg, &http].map(|listener| listener.local_addr().unwrap());
    let settings = ServeSettings { users, max_connections: 1, ..ServeSettings::loopback() };
    let parts = Parts {
        tables,
        clock: Arc::new(SystemClock),
        metrics: Arc::new(telemetry::registry()),
        maintenance: Arc::new(move |record| {
            let records = records.clone();
            Box::pin(async move { Ok(records.send(record).await?) })
        }),
        control: Some(Control { keys, labels: vec![('c', "cut the cable".into()), ('q', "stop".into())] }),
    };
    tokio::spawn(serve_on(pg, http, settings, parts, stopped));
    let [pg, http] = addresses;
    Running { pg, http, pressed, recorded, _stop: stop }
}

/// For ada alone, whose password is s3cret.
async fn guarded() -> Running {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("password");
    std::fs::write(&secret, "s3cret\n").unwrap();
    let reference = serde_json::json!({ "ada": format!("file:{}", secret.display()) });
    let server = running(serde_json::from_value(reference).unwrap()).await;
    // It reads the password when it starts.
    exchange(server.http, "GET /healthz HTTP/1.1\r\nHost: localhost", "").await;
    server
}

#[tokio::test]
async fn http_answers_its_own_page_only() {
    let mut server = running(BTreeMap::new()).await;
    let json = "Content-Type: application/json";
    let local = "Host: 127.0.0.1:8080";
    let sql = r#"{"sql": "SELECT 1 AS a, 'x' AS b, NULL::float8 AS c"}"#;
    for (head, body, status, part) in [
        (format!("GET / HTTP/1.1\r\n{local}"), "", 200, "content-security-policy: default-src 'none'"),
        (format!("GET /app.js HTTP/1.1\r\n{local}"), "", 200, "text/javascript"),
        ("GET / HTTP/1.1\r\nHost: evil.example".into(), "", 421, "is not this machine"),
        (format!("GET /readyz HTTP/1.1\r\n{local}"), "", 200, "ready"),
        (format!("GET /metrics HTTP/1.1\r\n{local}"), "", 200, "# EOF"),
        (format!("GET /api/v1/audit HTTP/1.1\r\n{local}"), "", 200, r#""balanced":true"#),
        (format!("GET /api/v1/overview HTTP/1.1\r\n{local}"), "", 200, r#""problems":[]"#),
        (format!("GET /nothing HTTP/1.1\r\n{local}"), "", 404, r#""message""#),
        (format!("POST /api/v1/sql HTTP/1.1\r\n{local}\r\n{json}"), sql, 200, r#""rows":[[1,"x",null]]"#),
        (
            format!("POST /api/v1/sql HTTP/1.1\r\n{local}\r\n{json}"),
            sql,
            200,
            r#"{"name":"a","type":"int8"}"#,
        ),
        (format!("POST /api/v1/sql HTTP/1.1\r\n{local}"), sql, 415, "application/json"),
        (
            format!("POST /api/v1/sql HTTP/1.1\r\n{local}\r\n{json}\r\nOrigin: http://evil.example"),
            sql,
            403,
            "origins",
        ),
        (
            format!("POST /api/v1/sql HTTP/1.1\r\n{local}\r\n{json}\r\nOrigin: http://127.0.0.1:8080"),
            sql,
            200,
            "rows",
        ),
        (
            format!("POST /api/v1/sql HTTP/1.1\r\n{local}\r\n{json}"),
            r#"{"sql": "DROP TABLE gold.assets"}"#,
            403,
            r#""sqlstate":"25006""#,
        ),
        (format!("POST /api/v1/sql HTTP/1.1\r\n{local}\r\n{json}"), r#"{"sql": "SELEKT"}"#, 400, "42601"),
        (format!("POST /api/v1/sql HTTP/1.1\r\n{local}\r\n{json}"), r#"{"sq": ""}"#, 422, "sq"),
        (format!("POST /api/v1/sql HTTP/1.1\r\n{local}\r\n{json}"), "{", 400, "message"),
        (format!("POST /api/v1/demo HTTP/1.1\r\n{local}\r\n{json}"), r#"{"key": "c"}"#, 202, ""),
        (format!("POST /api/v1/demo HTTP/1.1\r\n{local}\r\n{json}"), r#"{"key": "q"}"#, 422, "no button"),
        (
            format!("POST /api/v1/maintenance HTTP/1.1\r\n{local}\r\n{json}"),
            r#"{"asset": "pump-01", "done_at": "2026-03-01T06:00:00Z"}"#,
            202,
            r#""site":"s""#,
        ),
        (
            format!("POST /api/v1/maintenance HTTP/1.1\r\n{local}\r\n{json}"),
            r#"{"asset": "pump-99"}"#,
            404,
            "no asset",
        ),
        (
            format!("POST /api/v1/maintenance HTTP/1.1\r\n{local}\r\n{json}"),
            r#"{"asset": "pump-01", "done_at": "2999-01-01T00:00:00Z"}"#,
            422,
            "future",
        ),
    ] {
        let (got, answer) = exchange(server.http, &head, body).await;
        assert!(got == status && answer.contains(part), "{head} {body}\n{answer}");
    }
    let large = format!(r#"{{"sql": "SELECT '{}'"}}"#, "x".repeat(70_000));
    let head = format!("POST /api/v1/sql HTTP/1.1\r\n{local}\r\n{json}");
    assert_eq!(exchange(server.http, &head, &large).await.0, 413);
    assert_eq!(server.pressed.try_recv(), Ok('c'));
    assert_eq!(server.recorded.try_recv().unwrap().asset_id, "pump-01");
}

#[tokio::test]
async fn http_asks_for_a_user_where_there_are_some() {
    let server = guarded().await;
    for (path, credentials, status) in [
        ("/", "", 401),
        ("/healthz", "", 200),
        ("/", "\r\nAuthorization: Basic YWRhOnMzY3JldA==", 200),
        ("/", "\r\nAuthorization: Basic YWRhOndyb25n", 401),
    ] {
        let head = format!("GET {path} HTTP/1.1\r\nHost: localhost{credentials}");
        assert_eq!(exchange(server.http, &head, "").await.0, status, "{path} {credentials}");
    }
}

/// Of one connection at a time, one that says nothing is not it for long.
#[tokio::test]
async fn who_asks_nothing_holds_no_connection() {
    let server = running(BTreeMap::new()).await;
    let mut silent = TcpStream::connect(server.http).await.unwrap();
    let asked = exchange(server.http, "GET /healthz HTTP/1.1\r\nHost: localhost", "");
    assert_eq!(tokio::time::timeout(Duration::from_secs(60), asked).await.unwrap().0, 200);
    assert_eq!(silent.read(&mut [0; 512]).await.unwrap(), 0, "it was closed");
}

/// Of one connection at a time, a stranger's is not it for longer than the answer takes.
#[tokio::test]
async fn who_may_not_log_in_holds_no_connection() {
    let server = guarded().await;
    // PostgreSQL's protocol 3.0: a startup message, and the kind of the first answer with the connection.
    let startup = async |database: &str| {
        let mut socket = TcpStream::connect(server.pg).await.unwrap();
        let body = format!("\0\x03\0\0user\0ada\0database\0{database}\0\0");
        let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
        socket.write_all(&[&length, body.as_bytes()].concat()).await.unwrap();
        let mut kind = [0];
        let read = socket.read(&mut kind).await.unwrap_or(0);
        (socket, (read > 0).then_some(char::from(kind[0])))
    };
    let (refused, answer) = startup("other").await;
    assert_eq!(answer, Some('E'));
    let asked_to_prove = async {
        while startup(super::catalog::DATABASE).await.1 != Some('R') {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), asked_to_prove).await.expect("the place stays taken");
    drop(refused);
}

#[tokio::test]
async fn a_port_in_use_is_named_with_its_key() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let error = bind(taken.local_addr().unwrap(), "serve.pg_port").await.unwrap_err();
    let text = format!("{error:#}");
    let port = taken.local_addr().unwrap().port().to_string();
    assert!(text.contains("serve.pg_port") && text.contains(&port), "{text}");
}

#[test]
fn listening_to_everyone_needs_users() {
    let mut mistakes = Mistakes::default();
    let open = ServeSettings { pg: SocketAddr::from(([0, 0, 0, 0], 5433)), ..ServeSettings::loopback() };
    open.check(&mut mistakes);
    assert_eq!(mistakes.list.len(), 1);
    assert!(mistakes.to_string().contains("nobody needs a password"), "{mistakes}");
}
