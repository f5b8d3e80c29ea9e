//! Gold over a lake in memory: steps, late data, reruns, and the same numbers by SQL.

use std::{collections::BTreeSet, sync::Arc};

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
    settings: GoldSettings,
}

/// (event, device, severity, seconds from START to its start and its end)
type Record = (&'static str, &'static str, &'static str, i64, Option<i64>);

impl Lake {
    /// Its days begin and end within hours.
    async fn new() -> Lake {
        let shifts = [("early", "06:00"), ("late", "14:00"), ("night", "22:00")];
        Lake::of(calendar("Asia/Kathmandu", &shifts)).await
    }

    async fn of(calendars: Calendars) -> Lake {
        let tables = Tables::open(&Store::open("memory:///").unwrap()).await.unwrap();
        let settings = GoldSettings { calendars: Arc::new(calendars), ..GoldSettings::default() };
        Lake { tables, plan: 0, settings }
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

    /// One plan with records of anomalies.
    async fn records(&mut self, records: &[Record]) {
        self.plan += 1;
        self.append(Table::Anomalies, anomalies(records)).await;
        self.append(Table::SensorReadings, readings(&[])).await;
    }

    async fn step(&self, now: i64) -> StepDone {
        step(&self.tables, &self.settings, Timestamp::from_micros(START + now * SECOND)).await.unwrap()
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

    /// The rows of a table and its progress.
    async fn rows(&self, table: Table) -> Option<(Vec<RecordBatch>, i64)> {
        let snapshot = self.tables.snapshot(table).await.unwrap()?;
        let progress = Tables::progress(&snapshot, publish::SILVER).await.unwrap()?;
        let rows = self.sql(&format!("SELECT * FROM {}.{}", table.layer(), table.name())).await;
        let rows = rows.iter().map(|batch| crate::tables::conform(batch, table).unwrap()).collect();
        Some((rows, progress))
    }

    /// Everything that gold says, apart from when it was said.
    async fn gold(&self) -> String {
        let hours =
            "SELECT * EXCEPT (revision, updated_at) FROM gold.hourly_aggregates ORDER BY hour, device_id";
        let minutes = "SELECT * FROM gold.timeseries_1m ORDER BY time, device_id";
        let days = "SELECT * EXCEPT (revision, updated_at) FROM gold.daily_aggregates \
                    ORDER BY starts_at, shift, device_id";
        let health = "SELECT * EXCEPT (revision, updated_at) FROM gold.asset_health ORDER BY hour, asset_id";
        let mut all = String::new();
        for sql in [hours, minutes, days, health] {
            all += &self.text(sql).await;
            all.push('\n');
        }
        all
    }
}

/// Of the one site.
fn calendar(zone: &str, shifts: &[(&str, &str)]) -> Calendars {
    let shifts = shifts.iter().map(|(name, start)| ((*name).to_owned(), (*start).to_owned())).collect();
    let site = calendar::SiteSettings { time_zone: zone.to_owned(), shifts };
    let mut mistakes = common::config::Mistakes::default();
    let calendars = Calendars::parse(&[("s".to_owned(), site)].into(), &mut mistakes);
    assert_eq!(mistakes.list, []);
    calendars
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
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| gateway(r.0)))),
            Arc::new(rows.iter().map(|r| (r.3 != Quality::Bad).then_some(r.2)).collect::<Float64Array>()),
            same("L/min", n),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| kind(r.0)))),
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

fn kind(device: &str) -> &str {
    if matches!(device, "counter" | "state") { device } else { "gauge" }
}

/// Devices are named after theirs; most hang on `g`.
fn gateway(device: &str) -> &str {
    device.split_once('/').map_or("g", |(gateway, _)| gateway)
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
            Arc::new(StringArray::from_iter_values(windows.iter().map(|w| gateway(w.0)))),
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
    // Its day, which is over, and its night shift, which is not.
    assert_eq!((done.windows.days, done.windows.health), (2, 0));
    let days = "SELECT shift, revision FROM gold.daily_aggregates WHERE max = 2e6 ORDER BY shift";
    assert_eq!(
        lake.text(days).await.lines().skip(3).take(2).collect::<Vec<_>>(),
        ["| night | 0        |", "|       | 1        |"],
        "{}",
        lake.text("SELECT * FROM gold.daily_aggregates").await
    );
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

/// The tables that are made by the hour, in the order in which a step makes them.
const BY_HOUR: [Table; 4] =
    [Table::HourlyAggregates, Table::Timeseries1m, Table::DailyAggregates, Table::AssetHealth];

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
    for table in BY_HOUR {
        let base = stepwise.tables.snapshot(table).await.unwrap();
        stepwise.tables.append(table, base, vec![], (publish::SILVER, 1)).await.unwrap();
    }
    assert!(stepwise.step(40_000).await.is_nothing());
    // A crash between a table's first and second half, and between the tables.
    stepwise.readings(&[("a", 3_601, 5.0, Quality::Good)]).await;
    for (table, predicate) in [
        (Table::HourlyAggregates, "device_id = 'a'"),
        (Table::Timeseries1m, "device_id = 'b'"),
        (Table::DailyAggregates, "device_id = 'b' OR shift = 'night'"),
        (Table::AssetHealth, "asset_id = 'pump'"),
    ] {
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
async fn a_minute_that_begins_leaves_those_before_it_where_they_are() {
    let (mut live, mut at_once) = (Lake::new().await, Lake::new().await);
    let files = async |lake: &Lake| {
        let table = lake.tables.snapshot(Table::Timeseries1m).await.unwrap().unwrap();
        let state = table.snapshot().unwrap();
        state.log_data().iter().map(|file| file.path().into_owned()).collect::<BTreeSet<String>>()
    };
    // Each step ends in the midst of a minute, across the hour.
    let steps = || (3_500..3_800).step_by(30).map(|from| wave("a", from, from + 30, 1));
    let mut stood = BTreeSet::new();
    for (n, rows) in steps().enumerate() {
        live.readings(&rows).await;
        live.step(3_800).await;
        let stands = files(&live).await;
        // Only the minute that goes on is written again.
        assert!(stood.difference(&stands).count() <= 1, "step {n}: {stood:?}, then {stands:?}");
        stood = stands;
    }
    assert_eq!(stood.len(), 6, "{stood:?}");
    at_once.readings(&steps().collect::<Vec<_>>().concat()).await;
    at_once.step(3_800).await;
    assert_eq!(live.gold().await, at_once.gold().await);

    // A reading that is late by minutes, and one by an hour.
    for second in [3_605, 20] {
        for lake in [&mut live, &mut at_once] {
            lake.readings(&[("b", second, 1e6, Quality::Good)]).await;
            assert_eq!(lake.step(3_900).await.windows.minutes, 1);
        }
        assert_eq!(live.gold().await, at_once.gold().await);
    }
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

#[test]
fn a_counter_goes_on_from_the_window_before_whatever_hours_are_in_memory() {
    let counts = |windows: &[(&'static str, i64, i64, f64)]| {
        let batch = aggregates(windows);
        let mut columns = batch.columns().to_vec();
        columns[batch.schema().index_of("kind").unwrap()] = same("counter", batch.num_rows());
        RecordBatch::try_new(batch.schema(), columns).unwrap()
    };
    let delta = |rows: &[Row], windows: &[(&'static str, i64, i64, f64)]| {
        let mut builder = series::SeriesBuilder::default();
        builder.readings(&readings(rows)).unwrap();
        builder.aggregates(&counts(windows)).unwrap();
        let (series, hour) = (builder.finish(), Timestamp::from_micros(START + HOUR_MICROS));
        let device = series.devices().find(|device| !device.windows.is_empty()).unwrap();
        let within = hour..hour + Duration::from_secs(3600);
        hourly::hours(&device, &within, Duration::from_secs(15 * 60))[0].delta
    };
    let windows = [("a", 10, 1, 1.0), ("a", 59, 1, 10.0), ("a", 60, 1, 13.0), ("a", 61, 1, 15.0)];
    // The hour alone is read from 15 minutes before it on. The gateway sent readings in the hour before, and no longer.
    let alone = delta(&[], &windows[1..]);
    assert_eq!(alone, Some(5.0));
    assert_eq!(delta(&[("b", 20 * 60, 0.0, Quality::Good)], &windows), alone);
    // Of a window that began too long ago nobody reads the last value.
    assert_eq!(delta(&[], &[windows[0], windows[2], windows[3]]), delta(&[], &windows[2..]));
}

#[tokio::test]
async fn gateway_by_gateway_hours_are_the_same() {
    let mut lake = Lake::new().await;
    // Several pages of rows.
    let [a, d] = ["a", "d"].map(|device| wave(device, 0, 9_000, 1));
    let [ha, he] = ["h/a", "h/e"].map(|device| wave(device, 900, 8_000, 1));
    let [ia, f] = ["i/a", "i/f"].map(|device| wave(device, 4_000, 9_000, 1));
    lake.readings(&[a, d, ha, he, ia, f].concat()).await;
    // Of gateways that send readings too, in some hours, and of one that does not.
    let windows = [("b", 3, 60, 1.0), ("h/b", 121, 60, 2.0), ("i/b", 1, 60, 3.0), ("j/b", 1, 60, 4.0)];
    lake.aggregates(&windows, &wave("h/c", 0, 9_000, 11)).await;
    let silver = windows::Silver::newest(&lake.tables).await.unwrap().unwrap();
    let within = Timestamp::from_micros(START)..Timestamp::from_micros(START + 3 * HOUR_MICROS);
    let hold = lake.settings.hold;
    let mut made = Vec::new();
    // All together; in two groups; four gateways by themselves, hour by hour.
    for (most, number) in [(u64::MAX, 1), (30_000, 2), (1, 12)] {
        let parts = silver.parts_of(&within, hold, most).await.unwrap();
        assert_eq!(parts.len(), number, "{parts:?}");
        let mut rows = Vec::new();
        for part in parts {
            let within = part.within.clone();
            let series = silver.read(&part, hold).await.unwrap();
            let hours = series.devices().flat_map(|device| hourly::hours(&device, &within, hold));
            rows.extend(hours.map(|row| format!("{row:?}")));
            let minutes: Vec<_> =
                series.devices().flat_map(|device| minutes::minutes(&device, &within)).collect();
            let minutes = minutes::batch(&minutes, &series.metas).unwrap();
            let minutes = pretty_format_batches(&[minutes]).unwrap().to_string();
            // Columns are as wide as what is in them.
            let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
            rows.extend(minutes.lines().filter(|line| line.starts_with("| 2")).map(words));
        }
        rows.sort();
        made.push(rows);
    }
    // 2 (3 + 3 + 2) + 3 hours of readings, and what only aggregates tell: an hour of `i` and one of `j`.
    assert_eq!(made[0].iter().filter(|row| !row.starts_with('|')).count(), 21, "{:?}", made[0]);
    assert_eq!(made[0], made[1]);
    assert_eq!(made[0], made[2]);
}

#[tokio::test]
async fn the_log_and_the_rows_tell_the_same_hours() {
    // One hour; up to the hold, and beyond; two hours; three, of which the one between has a row, or none.
    for seconds in [&[5, 10][..], &[0, 2_699], &[0, 2_700], &[-1, 0], &[0, 4_000, 8_000], &[0, 8_000]] {
        let mut lake = Lake::new().await;
        let rows: Vec<_> = seconds.iter().map(|at| ("a", *at, 1.0, Quality::Good)).collect();
        lake.readings(&rows).await;
        let silver = windows::Silver::newest(&lake.tables).await.unwrap().unwrap();
        let hold = lake.settings.hold;
        let hours = changes::hours_in(&silver.readings, None, "ts", hold).await.unwrap();
        let times = seconds.iter().map(|at| START + at * SECOND);
        assert_eq!(hours, hourly::touched(times, hold), "{seconds:?}");
    }
}

fn anomalies(records: &[Record]) -> RecordBatch {
    let n = records.len();
    let texts = |of: &dyn Fn(&Record) -> &'static str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(records.iter().map(of)))
    };
    let started = || instants(records.iter().map(|r| START + r.3 * SECOND));
    let score = |r: &Record| if r.2 == "critical" { 9.0 } else { 4.0 };
    let ended: TimestampMicrosecondArray =
        records.iter().map(|r| r.4.map(|end| START + end * SECOND)).collect();
    RecordBatch::try_new(
        Table::Anomalies.schema(),
        vec![
            texts(&|r| r.0),
            texts(&|r| if r.4.is_some() { "cleared" } else { "raised" }),
            same("pump", n),
            texts(&|r| r.1),
            same("m", n),
            same("sha", n),
            texts(&|r| r.2),
            Arc::new(Float64Array::from_iter_values(records.iter().map(score))),
            Arc::new(Float64Array::from(vec![3.0; n])),
            started(),
            Arc::new(ended.with_timezone("UTC")),
            Arc::new(StringArray::from(vec![None::<&str>; n])),
            same("s", n),
            same("g", n),
            instants(records.iter().map(|r| START + r.4.unwrap_or(r.3) * SECOND)),
            same("e", n),
            Arc::new(Int64Array::from(vec![0; n])),
            same("x", n),
        ],
    )
    .unwrap()
}

/// What `f64` columns may differ by, relatively.
fn close(a: Option<f64>, b: Option<f64>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => (a - b).abs() <= 1e-9 * a.abs().max(b.abs()),
        (a, b) => a == b,
    }
}

#[tokio::test]
async fn days_and_shifts_equal_what_their_readings_give() {
    // Three days each, of which the second has the given length in hours.
    for (zone, shifts, noon, length) in [
        ("UTC", [("a", "06:00"), ("b", "18:00")], "2026-03-29T12:00:00Z", 24),
        ("Europe/Vienna", [("a", "06:30"), ("b", "22:00")], "2026-03-29T12:00:00Z", 23),
        ("Europe/Vienna", [("a", "02:30"), ("b", "14:20")], "2026-10-25T12:00:00Z", 25),
        ("Asia/Kolkata", [("a", "06:00"), ("b", "18:00")], "2026-03-29T06:00:00Z", 24),
        ("Asia/Kathmandu", [("a", "05:45"), ("b", "05:50")], "2026-03-29T06:00:00Z", 24),
    ] {
        let calendars = calendar(zone, &shifts);
        let mut lake = Lake::of(calendars.clone()).await;
        let from = (noon.parse::<Timestamp>().unwrap().as_micros() - START) / SECOND - 36 * 3600;
        let mut rows = [
            wave("gauge", from, from + 72 * 3600, 311),
            // Ends what would hold into hours without a reading, which count in none.
            vec![("gauge", from + 72 * 3600 - 1, 0.0, Quality::Bad)],
            // With a gap of some hours.
            wave("rare", from + 5_000, from + 20_000, 900),
            wave("rare", from + 40_000, from + 200_000, 1_201),
        ]
        .concat();
        for n in 0..600 {
            let (at, good) = (from + n * 431, Quality::Good);
            rows.push(("counter", at, (n % 97) as f64, good));
            rows.push(("state", at, (n * n % 3) as f64, good));
        }
        for rows in rows.chunks(500) {
            lake.readings(rows).await;
        }
        lake.step(from + 80 * 3600).await;

        let mut builder = series::SeriesBuilder::default();
        builder.readings(&readings(&rows)).unwrap();
        let series = builder.finish();
        let all = Timestamp::from_micros(START + from * SECOND);
        let all = all..all + Duration::from_secs(72 * 3600);
        let hold = i64::try_from(lake.settings.hold.as_micros()).unwrap();
        let mut expected = Vec::new();
        for (site, window) in calendars.windows(std::slice::from_ref(&all)) {
            let span = window.span.start.as_micros()..window.span.end.as_micros();
            for device in series.devices().filter(|_| site.is_some()) {
                let row = hourly::row(&device, &span, hold);
                expected.extend(row.map(|row| (window.clone(), row)));
            }
        }
        expected.sort_by_key(|(w, row)| (w.span.start, w.shift.clone(), row.meta.device.clone()));

        let sql = "SELECT * FROM gold.daily_aggregates ORDER BY starts_at, shift NULLS FIRST, device_id";
        let batches = lake.sql(sql).await;
        let found = arrow::compute::concat_batches(&batches[0].schema(), &batches).unwrap();
        assert_eq!(found.num_rows(), expected.len(), "{zone}");
        let floats = |name: &str| series::floats(&found, name).unwrap();
        let ints = |name: &str| series::ints(&found, name).unwrap();
        let at = |name: &str, row: usize| {
            let column = floats(name);
            column.is_valid(row).then(|| column.value(row))
        };
        for (n, (window, row)) in expected.iter().enumerate() {
            let what = format!("{zone} {window:?} {row:?}");
            let ends = [("starts_at", window.span.start), ("ends_at", window.span.end)];
            for (name, instant) in ends {
                assert_eq!(series::micros(&found, name).unwrap().value(n), instant.as_micros(), "{what}");
            }
            let transitions = ints("transitions");
            let transitions = transitions.is_valid(n).then(|| transitions.value(n));
            assert_eq!(
                (ints("count").value(n), ints("bad_count").value(n), transitions),
                (row.count, row.bad_count, row.transitions),
                "{what}"
            );
            for (name, value) in [
                ("min", row.min),
                ("max", row.max),
                ("mean", row.mean),
                ("time_weighted_mean", row.time_weighted_mean),
                ("stddev", row.stddev),
                ("first", row.first),
                ("last", row.last),
                ("good_ratio", Some(row.good_ratio)),
                ("covered_ratio", Some(row.covered_ratio)),
                ("delta", row.delta),
            ] {
                // Its values hold into such hours.
                let by_time = ["time_weighted_mean", "good_ratio", "covered_ratio"].contains(&name);
                if by_time && row.meta.device == "rare" {
                    continue;
                }
                assert!(close(at(name, n), value), "{name}: {:?} is not {value:?}: {what}", at(name, n));
            }
        }
        let day = noon.split_once('T').unwrap().0;
        let hours = format!(
            "SELECT DISTINCT (cast(ends_at AS bigint) - cast(starts_at AS bigint)) / {HOUR_MICROS} \
             FROM gold.daily_aggregates WHERE day = '{day}' AND shift IS NULL"
        );
        assert_eq!(lake.int(&hours).await, length, "{zone}");
    }
}

#[tokio::test]
async fn other_time_zones_and_shifts_make_other_days() {
    let rows = wave("a", 0, 3 * 86_400, 1_800);
    let mut lake = Lake::of(Calendars::default()).await;
    lake.readings(&rows).await;
    lake.step(4 * 86_400).await;
    assert_eq!(lake.int("SELECT count(*) FROM gold.daily_aggregates WHERE shift IS NULL").await, 4);
    let kolkata = calendar("Asia/Kolkata", &[("day", "06:00"), ("night", "18:00")]);
    let mut fresh = Lake::of(kolkata.clone()).await;
    fresh.readings(&rows).await;
    fresh.step(4 * 86_400).await;
    lake.settings.calendars = Arc::new(kolkata);
    let done = lake.step(4 * 86_400).await;
    assert_eq!((done.windows.hourly, done.windows.hours), (0, 0), "{done:?}");
    assert_eq!(lake.gold().await, fresh.gold().await);
    assert!(lake.step(4 * 86_400).await.is_nothing());
    // Back again, and a crash after the old days were removed.
    lake.settings.calendars = Arc::default();
    let base = lake.tables.snapshot(Table::DailyAggregates).await.unwrap();
    let gone = lake.tables.replace(Table::DailyAggregates, base, None, vec![], (publish::SILVER, -1));
    gone.await.unwrap();
    lake.step(4 * 86_400).await;
    assert_eq!(lake.int("SELECT count(*) FROM gold.daily_aggregates").await, 4);
}

/// Whatever comes in whatever order, with steps and crashes between: the same gold as straight through.
#[tokio::test]
async fn any_order_and_any_crash_make_the_same_gold() {
    let rows: Vec<Row> = [wave("a", 0, 30 * 3600, 500), wave("counter", 7_000, 27 * 3600, 901)].concat();
    let records: [Record; 7] = [
        ("one", "a", "warning", 4_000, None),
        ("one", "a", "critical", 4_000, Some(9_000)),
        ("two", "counter", "warning", 8_000, None),
        ("two", "counter", "warning", 8_000, Some(70_000)),
        ("lasts", "a", "critical", 90_000, None),
        ("gone", "a", "critical", 110_000, Some(111_000)),
        ("before", "a", "critical", -50_000, Some(1_000)),
    ];
    let mut straight = Lake::new().await;
    straight.readings(&rows).await;
    straight.records(&records).await;
    straight.step(40 * 3600).await;
    let expected = straight.gold().await;
    assert!(straight.int("SELECT count(*) FROM gold.asset_health WHERE health_index < 100").await > 20);
    for seed in 0..6_u64 {
        let mut state = seed;
        let mut random = move |below: usize| {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            usize::try_from((mixed >> 33) % below as u64).unwrap()
        };
        let mut lake = Lake::new().await;
        let mut parts: Vec<(&[Row], &[Record])> = rows.chunks(37).map(|rows| (rows, &[][..])).collect();
        parts.extend(records.chunks(1).map(|records| (&[][..], records)));
        while !parts.is_empty() {
            let (rows, records) = parts.swap_remove(random(parts.len()));
            if rows.is_empty() {
                lake.records(records).await;
            } else {
                lake.readings(rows).await;
            }
            if random(3) > 0 {
                continue;
            }
            // A crash after so many tables: the others stand as they stood before.
            let whole = random(6);
            let mut before = Vec::new();
            for table in BY_HOUR.into_iter().skip(whole) {
                before.push((table, lake.rows(table).await));
            }
            lake.step(40 * 3600).await;
            for (table, rows) in before {
                let base = lake.tables.snapshot(table).await.unwrap();
                if let Some((rows, progress)) = rows {
                    let txn = (publish::SILVER, progress);
                    lake.tables.replace(table, base, None, rows, txn).await.unwrap();
                }
            }
        }
        lake.step(40 * 3600).await;
        assert_eq!(lake.gold().await, expected, "seed {seed}");
        assert!(lake.step(40 * 3600).await.is_nothing(), "seed {seed}");
    }
}

#[tokio::test]
async fn health_follows_readings_and_events() {
    let mut lake = Lake::new().await;
    lake.readings(&wave("a", 0, 3 * 3600, 60)).await;
    assert_eq!(lake.step(3 * 3600).await.windows.health, 3);
    assert_eq!(lake.int("SELECT count(*) FROM gold.asset_health WHERE health_index = 100").await, 3);
    // Raised in hour 1 and still lasting: this hour and the next one.
    lake.records(&[("e", "a", "critical", 3_600 + 1_800, None)]).await;
    assert_eq!(lake.step(3 * 3600).await.windows.health, 2);
    let text = lake.text(
        "SELECT health_index, anomaly_minutes, device_id, revision FROM gold.asset_health ORDER BY hour",
    );
    assert_eq!(
        text.await.lines().skip(3).take(3).collect::<Vec<_>>(),
        [
            "| 100.0        | 0.0             |           | 0        |",
            "| 50.0         | 30.0            | a         | 1        |",
            "| 0.0          | 60.0            | a         | 1        |",
        ]
    );
    // More readings, in an hour that is young: it lasts for as long as they are known to.
    lake.readings(&[("a", 3 * 3600 + 59, 1.0, Quality::Good)]).await;
    assert_eq!(lake.step(3 * 3600 + 100).await.windows.health, 1);
    assert_eq!(
        lake.int(
            "SELECT cast(max(health_index) AS bigint) FROM gold.asset_health WHERE anomaly_minutes = 16"
        )
        .await,
        73
    );
    // It had ended long ago: the hours since are well.
    lake.records(&[("e", "a", "critical", 3_600 + 1_800, Some(3_600 + 2_400))]).await;
    assert_eq!(lake.step(4 * 3600).await.windows.health, 3);
    assert_eq!(lake.int("SELECT count(*) FROM gold.asset_health WHERE health_index = 100").await, 3);
    assert_eq!(lake.int("SELECT cast(sum(anomaly_minutes) AS bigint) FROM gold.asset_health").await, 10);
    // Nothing but bad readings: nothing is known.
    lake.readings(&[("a", 6 * 3600, 0.0, Quality::Bad)]).await;
    lake.step(6 * 3600).await;
    assert_eq!(lake.int("SELECT count(*) FROM gold.asset_health WHERE health_index IS NULL").await, 1);
}

#[tokio::test]
async fn anomalies_registry_and_schedule_follow_silver() {
    let mut lake = Lake::new().await;
    assert!(lake.step(0).await.is_nothing());
    lake.append(Table::Anomalies, anomalies(&[("one", "a", "warning", 0, None)])).await;
    lake.append(Table::Anomalies, anomalies(&[("two", "a", "warning", 0, Some(5))])).await;
    assert_eq!(lake.step(1).await.anomaly_events, 2);
    lake.append(Table::Anomalies, anomalies(&[("one", "a", "warning", 0, Some(60))])).await;
    lake.append(Table::Anomalies, anomalies(&[("two", "a", "warning", 0, None)])).await;
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
    let document = serde_json::to_string(&document).unwrap();
    let registry = |at| {
        let columns = vec![
            same("s", 1),
            same("g", 1),
            instants([at]),
            instants([at]),
            same(&document, 1),
            same("x", 1),
        ];
        RecordBatch::try_new(Table::Registry.schema(), columns).unwrap()
    };
    lake.append(Table::Registry, registry(START)).await;
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
    // The same once more, as at every start: gold says when, whatever steps came between.
    lake.append(Table::Registry, registry(START + 3600 * SECOND)).await;
    assert_eq!(lake.step(2 * 3600 + 25).await.registry, 2);
    let said = "SELECT cast(updated_at AS bigint) FROM gold.assets";
    assert_eq!(lake.int(said).await, START + 3600 * SECOND);

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

#[tokio::test]
async fn the_loop_takes_what_was_there_what_comes_while_it_rests_and_what_others_refined() {
    let mut lake = Lake::new().await;
    lake.readings(&wave("a", 0, 600, 60)).await;
    let (plans, silver) = watch::channel(0);
    let settings = GoldSettings { interval: Duration::from_millis(300), ..GoldSettings::default() };
    let clock = Arc::new(common::time::SystemClock);
    let gold = tokio::spawn(run(lake.tables.clone(), settings, clock, silver));
    for (hour, announced) in [(1, true), (2, false), (3, true)] {
        let arrives = async {
            while lake.int("SELECT count(*) FROM gold.hourly_aggregates").await < hour {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), arrives).await.expect("gold stays behind");
        lake.readings(&wave("a", hour * 3600, hour * 3600 + 600, 60)).await;
        if announced {
            plans.send_replace(lake.plan.unsigned_abs());
        }
    }
    drop(plans);
    gold.await.unwrap().unwrap();
    assert_eq!(lake.int("SELECT count(*) FROM gold.hourly_aggregates").await, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_refiners_at_once_each_row_comes_once() {
    let (mut lake, mut alone) = (Lake::new().await, Lake::new().await);
    let other = Tables::open(lake.tables.store()).await.unwrap();
    for hour in 0..10 {
        // Rows of an hour that stands, and of one that does not.
        let rows = wave("a", hour * 3600 - 1800, hour * 3600 + 1800, 60);
        lake.readings(&rows).await;
        alone.readings(&rows).await;
        let now = Timestamp::from_micros(START + (hour * 3600 + 1800) * SECOND);
        // One of two may be too late, and fails.
        let ours = step(&lake.tables, &lake.settings, now);
        let _ = tokio::join!(ours, step(&other, &lake.settings, now));
    }
    lake.step(10 * 3600).await;
    alone.step(10 * 3600).await;
    assert_eq!(lake.gold().await, alone.gold().await);
}

/// A step that began long ago does not undo what another one has made since of more.
#[tokio::test]
async fn what_was_made_of_an_older_silver_is_not_published() {
    let mut lake = Lake::new().await;
    lake.readings(&wave("a", 0, 3600, 60)).await;
    lake.readings(&wave("a", 3600, 7200, 60)).await;
    lake.step(7200).await;
    let (none, now) = (RecordBatch::new_empty(Table::AssetHealth.schema()), Timestamp::from_micros(START));
    let publish = async |version: i64| {
        let progress = publish::Progress::Complete(version);
        publish::publish(&lake.tables, health::HEALTH, &[], none.clone(), progress, now).await
    };
    assert_eq!(publish(2).await.unwrap(), 0);
    let refused = publish(1).await.unwrap_err().to_string();
    assert!(refused.contains("has version 2 of silver by another refiner, not 1"), "{refused}");
}

/// As a compaction does, or a property. Its entry of the log may be gone when gold would ask for it again.
#[tokio::test]
async fn a_commit_of_silver_without_rows_is_noted_at_once() {
    let mut lake = Lake::new().await;
    lake.readings(&wave("a", 0, 3600, 60)).await;
    lake.step(3600).await;
    let silver = lake.tables.snapshot(Table::SensorReadings).await.unwrap();
    let version = lake.tables.append(Table::SensorReadings, silver, Vec::new(), ("x", 1)).await.unwrap();
    assert!(lake.step(3660).await.windows == WindowsDone::default());
    for table in BY_HOUR {
        let gold = lake.tables.snapshot(table).await.unwrap().unwrap();
        assert_eq!(Tables::progress(&gold, SILVER).await.unwrap(), Some(version), "{}", table.path());
    }
}

#[tokio::test]
async fn gold_of_another_lake_is_made_again_also_when_that_is_interrupted() {
    let rows = wave("a", 0, 3 * 3600, 60);
    let mut lake = Lake::new().await;
    lake.readings(&rows).await;
    lake.step(3 * 3600).await;
    // Its silver was further than this one is.
    for table in BY_HOUR {
        let base = lake.tables.snapshot(table).await.unwrap();
        let (old, _) = lake.rows(table).await.unwrap();
        let (old, txn) = ([old[0].slice(0, 1)], (publish::SILVER, 1_000));
        lake.tables.replace(table, base, None, old.to_vec(), txn).await.unwrap();
    }
    // The first commit of a step that ends there.
    windows::take_back(&lake.tables).await.unwrap();
    let snapshot = lake.tables.snapshot(Table::HourlyAggregates).await.unwrap().unwrap();
    assert_eq!(Tables::progress(&snapshot, publish::SILVER).await.unwrap(), None);
    lake.step(3 * 3600).await;
    let mut fresh = Lake::new().await;
    fresh.readings(&rows).await;
    fresh.step(3 * 3600).await;
    assert_eq!(lake.gold().await, fresh.gold().await);
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
