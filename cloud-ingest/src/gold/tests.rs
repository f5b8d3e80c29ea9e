//! Gold over a lake in memory: steps, late data, reruns, and the same numbers by SQL.

use std::sync::Arc;

use arrow::{
    array::{
        Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray,
        TimestampMicrosecondArray,
    },
    compute::cast,
    datatypes::{DataType, Float64Type, Int64Type},
    util::pretty::pretty_format_batches,
};
use common::{
    documents::Devices,
    reading::{Asset, Device, Quality},
    time::{HOUR_MICROS, Timestamp},
};

use super::*;
use crate::{
    lake::{Table, year_month},
    store::Store,
};

/// The hour at which the tests begin.
const START: i64 = 490_000 * HOUR_MICROS;
const SECOND: i64 = 1_000_000;

/// (device, seconds from START, value, quality)
type Row = (&'static str, i64, f64, Quality);

struct Lake {
    tables: Tables,
    plan: i64,
}

impl Lake {
    async fn new() -> Lake {
        Lake { tables: Tables::open(&Store::open("memory:///").unwrap()).await.unwrap(), plan: 0 }
    }

    async fn append(&mut self, table: Table, rows: RecordBatch) {
        let base = self.tables.snapshot(table).await.unwrap();
        self.tables.append(table, base, vec![rows], ("refine", self.plan)).await.unwrap();
    }

    /// One plan of the refiner.
    async fn readings(&mut self, rows: &[Row]) {
        self.plan += 1;
        self.append(Table::SensorReadings, readings(rows)).await;
    }

    /// One plan with aggregates (device, minute from START, count, mean), and perhaps readings.
    async fn aggregates(&mut self, windows: &[(&'static str, i64, i64, f64)], rows: &[Row]) {
        self.plan += 1;
        self.append(Table::Aggregates, aggregates(windows)).await;
        self.append(Table::SensorReadings, readings(rows)).await;
    }

    async fn step(&self, now: i64) -> StepDone {
        let settings = GoldSettings::default();
        step(&self.tables, &settings, Timestamp::from_micros(START + now * SECOND)).await.unwrap()
    }

    async fn sql(&self, sql: &str) -> Vec<RecordBatch> {
        self.tables.session().await.unwrap().sql(sql).await.unwrap().collect().await.unwrap()
    }

    async fn text(&self, sql: &str) -> String {
        pretty_format_batches(&self.sql(sql).await).unwrap().to_string()
    }

    async fn int(&self, sql: &str) -> i64 {
        let batches = self.sql(sql).await;
        cast(batches[0].column(0), &DataType::Int64).unwrap().as_primitive::<Int64Type>().value(0)
    }

    /// Everything that gold says, apart from when it was said.
    async fn gold(&self) -> String {
        let hours =
            "SELECT * EXCEPT (revision, updated_at) FROM gold.hourly_aggregates ORDER BY hour, device_id";
        let minutes = "SELECT * FROM gold.timeseries_1m ORDER BY time, device_id";
        format!("{}\n{}", self.text(hours).await, self.text(minutes).await)
    }
}

fn instants(values: impl IntoIterator<Item = i64>) -> ArrayRef {
    Arc::new(TimestampMicrosecondArray::from_iter_values(values).with_timezone("UTC"))
}

fn same(text: &str, n: usize) -> ArrayRef {
    Arc::new(StringArray::from(vec![text; n]))
}

fn readings(rows: &[Row]) -> RecordBatch {
    let n = rows.len();
    let at = |r: &Row| START + r.1 * SECOND;
    let date = |r: &Row| year_month(Timestamp::from_micros(at(r)));
    RecordBatch::try_new(
        Table::SensorReadings.schema(),
        vec![
            instants(rows.iter().map(at)),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.0))),
            same("flow", n),
            same("pump", n),
            same("s", n),
            same("g", n),
            Arc::new(rows.iter().map(|r| (r.3 != Quality::Bad).then_some(r.2)).collect::<Float64Array>()),
            same("L/min", n),
            same("gauge", n),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.3.as_str()))),
            instants(rows.iter().map(at)),
            same("e", n),
            Arc::new(Int64Array::from(vec![0; n])),
            same("x", n),
            Arc::new(Int64Array::from_iter_values(rows.iter().map(|r| date(r).0))),
            Arc::new(Int64Array::from_iter_values(rows.iter().map(|r| date(r).1))),
        ],
    )
    .unwrap()
}

fn aggregates(windows: &[(&'static str, i64, i64, f64)]) -> RecordBatch {
    let n = windows.len();
    let start = || windows.iter().map(|w| START + w.1 * 60 * SECOND);
    let end = || start().map(|start| start + 60 * SECOND);
    let means = || -> ArrayRef { Arc::new(Float64Array::from_iter_values(windows.iter().map(|w| w.3))) };
    RecordBatch::try_new(
        Table::Aggregates.schema(),
        vec![
            instants(start()),
            instants(end()),
            Arc::new(StringArray::from_iter_values(windows.iter().map(|w| w.0))),
            same("flow", n),
            same("pump", n),
            same("s", n),
            same("g", n),
            same("L/min", n),
            same("gauge", n),
            Arc::new(Int64Array::from_iter_values(windows.iter().map(|w| w.2))),
            Arc::new(Int64Array::from(vec![0; n])),
            means(),
            means(),
            means(),
            Arc::new(Float64Array::from(vec![0.0; n])),
            means(),
            means(),
            instants(start()),
            instants(end()),
            Arc::new(BooleanArray::from(vec![false; n])),
            Arc::new(Int64Array::from(vec![0; n])),
            instants(end()),
            same("e", n),
            Arc::new(Int64Array::from(vec![0; n])),
            same("x", n),
        ],
    )
    .unwrap()
}

/// Readings every `every` seconds, of values that look random and are not.
fn wave(device: &'static str, from: i64, to: i64, every: i64) -> Vec<Row> {
    (from..to)
        .step_by(usize::try_from(every).unwrap())
        .map(|s| {
            let mixed = (s.unsigned_abs() + device.len() as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 11;
            let quality = match mixed % 20 {
                0 => Quality::Bad,
                1 => Quality::Uncertain,
                _ => Quality::Good,
            };
            (device, s, mixed as f64 / 2f64.powi(50) + 1e6, quality)
        })
        .collect()
}

#[tokio::test]
async fn hours_and_minutes_equal_sql_over_silver() {
    let mut lake = Lake::new().await;
    lake.readings(&[wave("a", 10, 9_000, 3), wave("bb", 500, 12_000, 41)].concat()).await;
    lake.readings(&wave("a", 9_000, 11_000, 1)).await;
    let done = lake.step(12_000).await;
    assert_eq!((done.windows.hourly, done.windows.hours), (8, 4), "{done:?}");
    for (sql, keys) in [
        (
            "SELECT g.count, s.count, g.min, s.min, g.max, s.max, g.mean, s.mean, g.stddev, s.stddev, \
             g.p50, s.p50, g.p95, s.p95, g.first, s.first, g.last, s.last FROM gold.hourly_aggregates g \
             FULL JOIN (SELECT date_trunc('hour', ts) AS hour, device_id, count(value) AS count, \
             min(value) AS min, max(value) AS max, avg(value) AS mean, stddev(value) AS stddev, \
             percentile_cont(0.5) WITHIN GROUP (ORDER BY value) AS p50, \
             percentile_cont(0.95) WITHIN GROUP (ORDER BY value) AS p95, \
             first_value(value ORDER BY ts) AS first, last_value(value ORDER BY ts) AS last \
             FROM silver.sensor_readings WHERE quality <> 'bad' GROUP BY 1, 2) s \
             ON g.hour = s.hour AND g.device_id = s.device_id",
            8,
        ),
        (
            "SELECT g.count, s.count, g.min, s.min, g.max, s.max, g.mean, s.mean, g.last, s.last \
             FROM gold.timeseries_1m g FULL JOIN (SELECT date_trunc('minute', ts) AS time, device_id, \
             count(value) AS count, min(value) AS min, max(value) AS max, avg(value) AS mean, \
             last_value(value ORDER BY ts) AS last FROM silver.sensor_readings WHERE quality <> 'bad' \
             GROUP BY 1, 2) s ON g.time = s.time AND g.device_id = s.device_id",
            330,
        ),
    ] {
        let mut rows = 0;
        for batch in lake.sql(sql).await {
            rows += batch.num_rows();
            for pair in batch.columns().chunks(2) {
                let [gold, silver] =
                    [&pair[0], &pair[1]].map(|column| cast(column, &DataType::Float64).unwrap());
                let (gold, silver) =
                    (gold.as_primitive::<Float64Type>(), silver.as_primitive::<Float64Type>());
                for row in 0..batch.num_rows() {
                    assert!(gold.is_valid(row) && silver.is_valid(row), "row {row}: {sql}");
                    let (gold, silver) = (gold.value(row), silver.value(row));
                    assert!((gold - silver).abs() <= 1e-9 * silver.abs(), "{gold} is not {silver}: {sql}");
                }
            }
        }
        assert!(rows >= keys, "{rows} rows: {sql}");
    }
}

#[tokio::test]
async fn late_data_corrects_exactly_its_hours_and_a_rerun_changes_nothing() {
    let mut lake = Lake::new().await;
    lake.readings(&[wave("a", 0, 4 * 3600, 60), wave("b", 0, 4 * 3600, 60)].concat()).await;
    assert_eq!(lake.step(4 * 3600).await.windows.hourly, 8);
    let version = || async {
        let tables = [Table::HourlyAggregates, Table::Timeseries1m];
        let mut versions = Vec::new();
        for table in tables {
            versions.push(lake_version(&lake.tables, table).await);
        }
        versions
    };
    let before = version().await;
    assert!(lake.step(4 * 3600 + 60).await.is_nothing());
    assert_eq!(version().await, before);

    // In the middle of hour 1: that hour of that device alone.
    lake.readings(&[("a", 3600 + 1801, 2e6, Quality::Good)]).await;
    let done = lake.step(5 * 3600).await;
    assert_eq!((done.windows.hourly, done.windows.minutes), (1, 1));
    let changed = "SELECT device_id, revision, max, p50 FROM gold.hourly_aggregates WHERE revision > 0";
    let rows = lake.sql(changed).await;
    assert_eq!(rows.iter().map(RecordBatch::num_rows).sum::<usize>(), 1);
    let late = format!("updated_at = '{}'", Timestamp::from_micros(START + 5 * 3600 * SECOND));
    let count = "SELECT count(*) FROM gold.hourly_aggregates";
    assert_eq!(lake.int(&format!("{count} WHERE {late} AND device_id = 'a' AND max = 2e6")).await, 1);
    assert_eq!(lake.int(&format!("{count} WHERE {late}")).await, 1);

    // At the end of hour 1: its value holds into hour 2, whose first reading of `b` comes at once.
    lake.readings(&[("a", 2 * 3600 - 1, 3e6, Quality::Good), ("b", 7 * 3600 - 1, 1.0, Quality::Good)]).await;
    let done = lake.step(7 * 3600).await;
    assert_eq!(done.windows.hourly, 2, "{done:?}");
    assert_eq!(lake.int(&format!("{count} WHERE revision = 2")).await, 1);
    assert_eq!(lake.int(count).await, 9);

    // The open hour changes without revisions.
    lake.readings(&[("b", 7 * 3600 + 1, 1.0, Quality::Good)]).await;
    lake.step(7 * 3600 + 2).await;
    lake.readings(&[("b", 7 * 3600 + 3, 1.0, Quality::Good)]).await;
    lake.step(7 * 3600 + 4).await;
    assert_eq!(lake.int("SELECT max(revision) FROM gold.hourly_aggregates WHERE count = 2").await, 0);
    assert_eq!(
        lake.int("SELECT count(*) - count(DISTINCT concat(device_id, time)) FROM gold.timeseries_1m").await,
        0
    );
}

async fn lake_version(tables: &Tables, table: Table) -> Option<u64> {
    tables.snapshot(table).await.unwrap().and_then(|snapshot| snapshot.version())
}

#[tokio::test]
async fn step_by_step_at_once_and_again_after_a_crash_are_the_same() {
    let rows: Vec<Row> = [wave("a", 0, 30_000, 97), wave("b", 2_000, 26_000, 61)].concat();
    let (mut at_once, mut stepwise) = (Lake::new().await, Lake::new().await);
    at_once.readings(&rows).await;
    at_once.step(30_000).await;
    let expected = at_once.gold().await;
    // In an order that is not that of time.
    for (n, rows) in rows.chunks(53).rev().enumerate() {
        stepwise.readings(rows).await;
        if n % 3 == 0 {
            stepwise.step(30_000).await;
        }
    }
    stepwise.step(30_000).await;
    assert_eq!(stepwise.gold().await, expected);

    // A crash before progress was committed: the step is done again, and everything is in place.
    for table in [Table::HourlyAggregates, Table::Timeseries1m] {
        let base = stepwise.tables.snapshot(table).await.unwrap();
        stepwise.tables.append(table, base, vec![], (publish::SILVER, 1)).await.unwrap();
    }
    assert!(stepwise.step(40_000).await.is_nothing());
    // A crash between a table's first and second half, and between the tables.
    stepwise.readings(&[("a", 3_601, 5.0, Quality::Good)]).await;
    for (table, predicate) in
        [(Table::HourlyAggregates, "device_id = 'a'"), (Table::Timeseries1m, "device_id = 'b'")]
    {
        let base = stepwise.tables.snapshot(table).await.unwrap();
        stepwise.tables.replace(table, base, Some(predicate), vec![], (publish::SILVER, 1)).await.unwrap();
    }
    stepwise.step(40_000).await;
    at_once.readings(&[("a", 3_601, 5.0, Quality::Good)]).await;
    at_once.step(40_000).await;
    assert_eq!(stepwise.gold().await, at_once.gold().await);

    // Rows left silver: gold forgets what was made of them.
    let mut fresh = Lake::new().await;
    fresh.readings(&rows[..10]).await;
    fresh.step(40_000).await;
    let base = stepwise.tables.snapshot(Table::SensorReadings).await.unwrap();
    let rest = vec![readings(&rows[..10])];
    stepwise.tables.replace(Table::SensorReadings, base, None, rest, ("refine", 1_000)).await.unwrap();
    assert!(!stepwise.step(50_000).await.is_nothing());
    assert_eq!(stepwise.gold().await, fresh.gold().await);
}

#[tokio::test]
async fn where_only_aggregates_come_hours_are_made_of_them() {
    let mut lake = Lake::new().await;
    lake.aggregates(&[("a", 0, 60, 1.0), ("a", 1, 30, 4.0)], &[]).await;
    lake.step(3600).await;
    let row = "SELECT count FROM gold.hourly_aggregates WHERE source = 'aggregates' AND device_id = 'a' \
               AND p50 IS NULL AND mean = 2.0 AND time_weighted_mean = 2.5 AND min = 1.0 AND max = 4.0";
    assert_eq!(lake.int(row).await, 90);
    let minutes = "SELECT count(*) FROM gold.timeseries_1m WHERE source = ";
    assert_eq!(lake.int(&format!("{minutes} 'aggregates' AND device_id = 'a'")).await, 2);
    // Windows of a later plan, which has no readings.
    lake.aggregates(&[("a", 2, 60, 1.0)], &[]).await;
    assert_eq!(lake.step(3700).await.windows.minutes, 1);
    // A reading after all, if of another device: this gateway does send readings, so `a` has been held back.
    lake.readings(&[("b", 70, 9.0, Quality::Good)]).await;
    lake.step(3800).await;
    assert_eq!(lake.int(&format!("{minutes} 'readings' AND device_id = 'b'")).await, 1);
    assert_eq!(lake.int("SELECT count(*) FROM gold.timeseries_1m").await, 1);
    assert_eq!(lake.int("SELECT count(*) FROM gold.hourly_aggregates WHERE source <> 'readings'").await, 0);
    assert_eq!(lake.int("SELECT count(*) FROM gold.hourly_aggregates WHERE device_id = 'a'").await, 0);
}

fn anomaly(event: &str, ended: Option<i64>) -> RecordBatch {
    let ended = TimestampMicrosecondArray::from(vec![ended.map(|s| START + s * SECOND)]).with_timezone("UTC");
    RecordBatch::try_new(
        Table::Anomalies.schema(),
        vec![
            same(event, 1),
            same("raised", 1),
            same("pump", 1),
            same("a", 1),
            same("m", 1),
            same("sha", 1),
            same("warning", 1),
            Arc::new(Float64Array::from(vec![4.0])),
            Arc::new(Float64Array::from(vec![3.0])),
            instants([START]),
            Arc::new(ended),
            Arc::new(StringArray::from(vec![None::<&str>])),
            same("s", 1),
            same("g", 1),
            instants([START]),
            same("e", 1),
            Arc::new(Int64Array::from(vec![0])),
            same("x", 1),
        ],
    )
    .unwrap()
}

#[tokio::test]
async fn anomalies_registry_and_schedule_follow_silver() {
    let mut lake = Lake::new().await;
    assert!(lake.step(0).await.is_nothing());
    lake.append(Table::Anomalies, anomaly("one", None)).await;
    lake.append(Table::Anomalies, anomaly("two", Some(5))).await;
    assert_eq!(lake.step(1).await.anomaly_events, 2);
    lake.append(Table::Anomalies, anomaly("one", Some(60))).await;
    lake.append(Table::Anomalies, anomaly("two", None)).await;
    assert_eq!(lake.step(2).await.anomaly_events, 1);
    assert_eq!(lake.int("SELECT count(*) FROM gold.anomaly_events WHERE ended_at IS NOT NULL").await, 2);

    let running = Some(common::reading::RunningWhen { device: "speed".into(), above: 300.0 });
    let asset = Asset {
        id: "pump".into(),
        service_every_days: Some(30.0),
        service_every_running_hours: Some(10.0),
        running_when: running,
        ..Asset::default()
    };
    let speed =
        Device { id: "speed".into(), device_type: "speed".into(), asset: "pump".into(), ..Device::default() };
    let document =
        Devices { v: 1, at: Timestamp::from_micros(START), assets: vec![asset], devices: vec![speed] };
    let registry = RecordBatch::try_new(
        Table::Registry.schema(),
        vec![
            same("s", 1),
            same("g", 1),
            instants([START]),
            instants([START]),
            same(&serde_json::to_string(&document).unwrap(), 1),
            same("x", 1),
        ],
    )
    .unwrap();
    lake.append(Table::Registry, registry).await;
    // Two hours, in the second of which the pump ran for a half.
    let speed = |minute: i64| if minute < 90 { 1_000.0 } else { 0.0 };
    let rows: Vec<Row> = (0..120).map(|m| ("speed", m * 60, speed(m), Quality::Good)).collect();
    lake.readings(&rows).await;
    let done = lake.step(2 * 3600 + 10).await;
    assert_eq!((done.registry, done.maintenance), (2, 1));
    let schedule = lake.text("SELECT * FROM gold.maintenance_schedule").await;
    let due = "SELECT cast(running_hours * 10 AS bigint) FROM gold.maintenance_schedule WHERE basis = 'running_hours'";
    assert_eq!(lake.int(due).await, 15, "{schedule}");
    assert!(lake.step(2 * 3600 + 20).await.is_nothing());

    // A service resets both.
    let service = RecordBatch::try_new(
        Table::Maintenance.schema(),
        vec![
            same("id", 1),
            same("s", 1),
            same("pump", 1),
            instants([START + 2 * 3600 * SECOND]),
            same("oil", 1),
            same("", 1),
            instants([START + 2 * 3600 * SECOND]),
            same("x", 1),
        ],
    )
    .unwrap();
    lake.append(Table::Maintenance, service).await;
    assert_eq!(lake.step(2 * 3600 + 30).await.maintenance, 1);
    let reset =
        "SELECT count(*) FROM gold.maintenance_schedule WHERE running_hours = 0 AND basis = 'calendar'";
    assert_eq!(lake.int(reset).await, 1, "{}", lake.text("SELECT * FROM gold.maintenance_schedule").await);
}

#[tokio::test]
async fn the_loop_makes_a_last_step_when_silver_ends() {
    let mut lake = Lake::new().await;
    lake.readings(&wave("a", 0, 600, 60)).await;
    let (plans, silver) = watch::channel(0);
    let clock = Arc::new(common::time::SystemClock);
    let gold = tokio::spawn(run(lake.tables.clone(), GoldSettings::default(), clock, silver));
    drop(plans);
    gold.await.unwrap().unwrap();
    assert_eq!(lake.int("SELECT count(*) FROM gold.hourly_aggregates").await, 1);
}

/// 500,000 readings of one hour; run with `--run-ignored only` and look at the time.
#[tokio::test]
#[ignore = "measures"]
async fn half_a_million_readings() {
    const NAMES: [&str; 8] = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh"];
    let mut lake = Lake::new().await;
    let mut rows: Vec<Row> = NAMES.iter().flat_map(|name| wave(name, 0, 62_500, 1)).collect();
    rows.sort_by_key(|r| r.1);
    for rows in rows.chunks(50_000) {
        lake.readings(rows).await;
    }
    let start = tokio::time::Instant::now();
    let done = lake.step(62_500).await;
    eprintln!("{done:?} in {:?}", start.elapsed());
    lake.readings(&[("a", 62_501, 1.0, Quality::Good)]).await;
    let start = tokio::time::Instant::now();
    let done = lake.step(62_502).await;
    eprintln!("{done:?} in {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(2));
}
