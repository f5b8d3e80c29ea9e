//! Every path, schema and partition of the lake.
//!
//! ```text
//! bronze/sensor_data/year=YYYY/month=MM/day=DD/hour=HH/{writer}-{segment}.parquet   one row a message
//!                                                      pack-{sha-256}.parquet       segments of that hour, packed
//! silver/{sensor_readings,quarantine,messages,aggregates,anomalies,control,status,registry,maintenance}  Delta
//! gold/{hourly_aggregates,timeseries_1m,daily_aggregates,anomaly_events,asset_health,assets,devices}     Delta
//! gold/maintenance_schedule                                                                              Delta
//! ops/plan/{n}.json     the numbered steps of refinement
//! ops/rules/{hash}.toml the quality rules that a step was made with
//! ops/quality_results   Delta: passed and failed per plan and rule
//! rules/{alerts,published,…}  Delta: what rules found; see [`crate::rules`]
//! ```
//!
//! Columns hold only types that Delta, Parquet readers and the PostgreSQL wire share: timestamp(µs, UTC),
//! float64, int64, utf8, boolean, date32; bronze also has one binary column, the payload.
//!
//! Bronze and silver are appended to; the refiner alone writes silver, the gold step alone writes gold. Of quarantine
//! that is judged again, rows of `silver/quarantine` and `silver/messages` are replaced by what became of them.
//! `silver/status`, `silver/registry` and `silver/maintenance` are what the gateways said of themselves and
//! what people recorded; they enter by bronze like everything else, so the whole of silver can be rebuilt.

use std::{
    cmp::Ordering,
    sync::{Arc, LazyLock},
};

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use chrono::{Datelike, Timelike};
use common::{
    time::Timestamp,
    wire::{dict, instant},
};
use uuid::Uuid;

/// A Delta table of the lake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "the names are the tables'; DESIGN.md section 5 says what they hold")]
pub enum Table {
    SensorReadings,
    Quarantine,
    Messages,
    Aggregates,
    Anomalies,
    Control,
    Status,
    Registry,
    Maintenance,
    HourlyAggregates,
    Timeseries1m,
    DailyAggregates,
    AnomalyEvents,
    AssetHealth,
    Assets,
    Devices,
    MaintenanceSchedule,
    QualityResults,
    /// Written by a rule.
    Rule(RuleTable),
}

/// A table of the layer `rules`. Its name and columns are known once the configuration is, so they live as long as
/// the process.
#[derive(Clone, Copy, Debug)]
pub struct RuleTable {
    name: &'static str,
    schema: &'static SchemaRef,
}

impl RuleTable {
    /// What rules with the sink `alert` found: a row whenever an alert begins, changes its severity, or ends.
    pub const ALERTS: &str = "alerts";
    /// How many messages rules with the sink `mqtt` have published.
    pub const PUBLISHED: &str = "published";

    /// The table of a rule with the sink `table`.
    pub fn new(name: &str, schema: SchemaRef) -> Self {
        Self { name: Box::leak(name.into()), schema: Box::leak(Box::new(schema)) }
    }
}

// A name stands for one table, whatever its columns.
impl PartialEq for RuleTable {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}
impl Eq for RuleTable {}
impl PartialOrd for RuleTable {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for RuleTable {
    fn cmp(&self, other: &Self) -> Ordering {
        self.name.cmp(other.name)
    }
}
impl std::hash::Hash for RuleTable {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

impl Table {
    /// `rules/alerts`.
    pub fn alerts() -> Table {
        static SCHEMA: LazyLock<SchemaRef> = LazyLock::new(|| {
            let mut columns = Columns::default();
            // `labels` and `annotations` as JSON objects; `plan` is the last one that the rule had seen.
            columns.instants(&["at"]).texts(&[
                "rule",
                "alert_id",
                "state",
                "severity",
                "labels",
                "annotations",
            ]);
            columns.instants(&["started_at"]).maybe_instants(&["ended_at"]).ints(&["plan"]);
            columns.schema()
        });
        Table::Rule(RuleTable { name: RuleTable::ALERTS, schema: &SCHEMA })
    }

    /// `rules/published`.
    pub fn published() -> Table {
        static SCHEMA: LazyLock<SchemaRef> = LazyLock::new(|| {
            let mut columns = Columns::default();
            columns.instants(&["at"]).texts(&["rule"]).ints(&["plan", "messages"]);
            columns.schema()
        });
        Table::Rule(RuleTable { name: RuleTable::PUBLISHED, schema: &SCHEMA })
    }

    /// Every table that the pipeline itself writes, silver first.
    pub const ALL: [Table; 18] = [
        Table::SensorReadings,
        Table::Quarantine,
        Table::Messages,
        Table::Aggregates,
        Table::Anomalies,
        Table::Control,
        Table::Status,
        Table::Registry,
        Table::Maintenance,
        Table::HourlyAggregates,
        Table::Timeseries1m,
        Table::DailyAggregates,
        Table::AnomalyEvents,
        Table::AssetHealth,
        Table::Assets,
        Table::Devices,
        Table::MaintenanceSchedule,
        Table::QualityResults,
    ];

    /// The SQL schema and folder: `silver`, `gold`, `ops` or `rules`.
    pub const fn layer(self) -> &'static str {
        match self {
            Table::SensorReadings
            | Table::Quarantine
            | Table::Messages
            | Table::Aggregates
            | Table::Anomalies
            | Table::Control
            | Table::Status
            | Table::Registry
            | Table::Maintenance => "silver",
            Table::HourlyAggregates
            | Table::Timeseries1m
            | Table::DailyAggregates
            | Table::AnomalyEvents
            | Table::AssetHealth
            | Table::Assets
            | Table::Devices
            | Table::MaintenanceSchedule => "gold",
            Table::QualityResults => "ops",
            Table::Rule(_) => "rules",
        }
    }

    /// The table's name within its layer.
    pub const fn name(self) -> &'static str {
        match self {
            Table::SensorReadings => "sensor_readings",
            Table::Quarantine => "quarantine",
            Table::Messages => "messages",
            Table::Aggregates => "aggregates",
            Table::Anomalies => "anomalies",
            Table::Control => "control",
            Table::Status => "status",
            Table::Registry => "registry",
            Table::Maintenance => "maintenance",
            Table::HourlyAggregates => "hourly_aggregates",
            Table::Timeseries1m => "timeseries_1m",
            Table::DailyAggregates => "daily_aggregates",
            Table::AnomalyEvents => "anomaly_events",
            Table::AssetHealth => "asset_health",
            Table::Assets => "assets",
            Table::Devices => "devices",
            Table::MaintenanceSchedule => "maintenance_schedule",
            Table::QualityResults => "quality_results",
            Table::Rule(table) => table.name,
        }
    }

    /// Where the table stands, relative to the lake's root.
    pub fn path(self) -> String {
        format!("{}/{}", self.layer(), self.name())
    }

    /// Hive partition columns; `year` and `month` are those of the table's own time, in UTC, or of its local day.
    pub const fn partitions(self) -> &'static [&'static str] {
        match self {
            Table::SensorReadings => &["device_type", "year", "month"],
            Table::HourlyAggregates | Table::DailyAggregates | Table::AnomalyEvents | Table::AssetHealth => {
                &["year", "month"]
            }
            _ => &[],
        }
    }

    /// The table's columns.
    pub fn schema(self) -> SchemaRef {
        let mut columns = Columns::default();
        let c = &mut columns;
        match self {
            Table::SensorReadings => {
                c.instants(&["ts"]).texts(&["device_id", "device_type"]).maybe_texts(&["asset_id"]);
                c.texts(&["site", "gateway_id"]).maybe_floats(&["value"]).texts(&["unit", "kind", "quality"]);
                // Senders other than our edge have neither epoch nor seq.
                c.instants(&["received_at"]).maybe_texts(&["epoch"]).maybe_ints(&["seq"]);
                c.texts(&["segment"]).ints(&["year", "month"])
            }
            // `offset` is the message's row in its segment; `row` the reading's in the message, null when the
            // message as a whole failed. Times, values and units stand as they were sent, as text.
            Table::Quarantine => {
                c.instants(&["received_at"]).texts(&["topic"]).maybe_texts(&["site", "gateway_id"]);
                c.maybe_texts(&["device_id", "device_type", "ts", "value", "unit"]);
                c.texts(&["rule", "reason"]).maybe_texts(&["epoch", "lane"]).maybe_ints(&["seq"]);
                c.texts(&["segment"]).ints(&["offset"]).maybe_ints(&["row"]);
                c.ints(&["readings"]).maybe_instants(&["resolved_at"])
            }
            Table::Messages => {
                c.texts(&["site", "gateway_id", "epoch", "lane"]).ints(&[
                    "seq",
                    "rows",
                    "rows_before",
                    "oldest",
                ]);
                c.instants(&["sealed_at"]).texts(&["clock", "payload_sha256"]);
                c.ints(&["readings", "stored", "duplicates", "quarantined"]);
                // `redelivered`: this row is a further delivery of a message that was refined before.
                c.bools(&["redelivered"]).instants(&["received_at"]).texts(&["segment"]).ints(&["plan"])
            }
            Table::Aggregates => {
                c.instants(&["window_start", "window_end"]).texts(&["device_id", "device_type"]);
                c.maybe_texts(&["asset_id"]).texts(&["site", "gateway_id", "unit", "kind"]);
                c.ints(&["count", "bad_count"]);
                c.maybe_floats(&["min", "max", "mean", "stddev", "first", "last"]);
                c.instants(&["covered_from", "covered_to"]).bools(&["partial"]).ints(&["revision"]);
                c.instants(&["received_at"]).texts(&["epoch"]).ints(&["seq"]).texts(&["segment"])
            }
            Table::Anomalies => {
                c.texts(&["event_id", "state"]).maybe_texts(&["asset_id", "device_id"]);
                c.texts(&["model", "model_sha256", "severity"]).floats(&["score", "threshold"]);
                c.instants(&["started_at"]).maybe_instants(&["ended_at"]).maybe_texts(&["reason"]);
                c.texts(&["site", "gateway_id"]).instants(&["received_at"]).texts(&["epoch"]);
                c.ints(&["seq"]).texts(&["segment"])
            }
            // As on the wire (common::wire), and where it came from.
            Table::Control => {
                c.texts(&["site", "gateway_id", "record"]).instants(&["ts"]).texts(&["epoch"]);
                c.maybe_texts(&["lane"]).maybe_ints(&["first_seq", "last_seq"]).ints(&["readings"]);
                c.maybe_instants(&["from", "to"]).maybe_texts(&["reason"]);
                c.instants(&["received_at"])
                    .texts(&["message_epoch"])
                    .ints(&["message_seq"])
                    .texts(&["segment"])
            }
            // One row for each lane in a status document; one with a null lane when it names none.
            Table::Status => {
                c.texts(&["site", "gateway_id"]).bools(&["online"]).instants(&["at", "received_at"]);
                c.texts(&["version", "config_sha256", "current_epoch"]).maybe_texts(&["epoch", "lane"]);
                c.maybe_ints(&["head", "rows", "oldest"]).texts(&["segment"])
            }
            // `document` is the `devices` document as it was sent.
            Table::Registry => c
                .texts(&["site", "gateway_id"])
                .instants(&["at", "received_at"])
                .texts(&["document", "segment"]),
            Table::Maintenance => {
                c.texts(&["id", "site", "asset_id"]).instants(&["done_at"]).maybe_texts(&["action", "note"]);
                c.instants(&["received_at"]).texts(&["segment"])
            }
            Table::HourlyAggregates => {
                c.instants(&["hour"]).texts(&["device_id", "device_type"]).maybe_texts(&["asset_id"]);
                c.texts(&["site", "unit"]).ints(&["count"]);
                c.maybe_floats(&["min", "max", "mean", "time_weighted_mean", "stddev", "first", "last"]);
                c.maybe_floats(&["p50", "p95"]).ints(&["bad_count"]).floats(&["good_ratio", "covered_ratio"]);
                c.maybe_floats(&["delta"])
                    .maybe_ints(&["transitions"])
                    .texts(&["source"])
                    .ints(&["revision"]);
                c.instants(&["updated_at"]).ints(&["year", "month"])
            }
            Table::Timeseries1m => {
                c.instants(&["time"]).texts(&["site", "device_id", "device_type"]).maybe_texts(&["asset_id"]);
                c.texts(&["unit"]).ints(&["count"]).maybe_floats(&["min", "max", "mean", "last"]);
                c.texts(&["source"])
            }
            // `shift` is null for the whole day.
            Table::DailyAggregates => {
                c.add(&["day"], DataType::Date32, false).maybe_texts(&["shift"]);
                c.instants(&["starts_at", "ends_at"]).texts(&["device_id", "device_type"]);
                c.maybe_texts(&["asset_id"]).texts(&["site", "unit"]).ints(&["count"]);
                c.maybe_floats(&["min", "max", "mean", "time_weighted_mean", "stddev", "first", "last"]);
                c.ints(&["bad_count"]).floats(&["good_ratio", "covered_ratio"]).maybe_floats(&["delta"]);
                c.maybe_ints(&["transitions"]).texts(&["source"]).ints(&["revision"]);
                c.instants(&["updated_at"]).ints(&["year", "month"])
            }
            Table::AnomalyEvents => {
                c.texts(&["event_id"]).maybe_texts(&["asset_id", "device_id"]);
                c.texts(&["model", "model_sha256", "severity"]).floats(&["score", "threshold"]);
                c.instants(&["started_at"]).maybe_instants(&["ended_at"]).maybe_texts(&["reason"]);
                c.texts(&["site", "gateway_id"]).ints(&["year", "month"])
            }
            Table::AssetHealth => {
                c.instants(&["hour"]).texts(&["site", "asset_id"]).maybe_floats(&["health_index"]);
                c.floats(&["anomaly_minutes"]).maybe_texts(&["device_id"]).ints(&["revision"]);
                c.instants(&["updated_at"]).ints(&["year", "month"])
            }
            Table::Assets => {
                c.texts(&["site", "asset_id"]).maybe_texts(&["path", "class", "criticality"]);
                c.maybe_floats(&["rated_power_kw", "rated_speed_rpm"]).maybe_texts(&["support", "time_zone"]);
                c.texts(&["gateway_id"]).instants(&["updated_at"])
            }
            // `interval` in seconds; `labels` as a JSON object.
            Table::Devices => {
                c.texts(&["site", "device_id", "device_type", "asset_id", "unit", "kind"]);
                c.maybe_floats(&["range_low", "range_high", "interval"]).maybe_texts(&["labels"]);
                c.texts(&["gateway_id"]).instants(&["updated_at"])
            }
            Table::MaintenanceSchedule => {
                c.texts(&["site", "asset_id"]).maybe_instants(&["due_by"]).texts(&["basis"]);
                c.maybe_floats(&["running_hours"]).maybe_instants(&["last_done_at"]);
                c.texts(&["action", "reason"]).instants(&["computed_at"]);
                c.maybe_floats(&["rul_hours_p10", "rul_hours_p50", "rul_hours_p90"])
            }
            Table::QualityResults => {
                c.ints(&["plan"]).texts(&["rule"]).ints(&["passed", "failed"]).maybe_texts(&["sample"]);
                c.instants(&["received_at"])
            }
            Table::Rule(table) => return Arc::clone(table.schema),
        };
        columns.schema()
    }
}

/// The same columns, with dictionaries for text: how rows come out of data files, which do not know of it.
pub fn with_dictionaries(schema: &Schema) -> SchemaRef {
    let fields = schema.fields().iter().map(|field| match field.data_type() {
        DataType::Utf8 => Arc::new(field.as_ref().clone().with_data_type(dict())),
        _ => Arc::clone(field),
    });
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

/// One row a message: what was received, and the identity that travelled outside of the payload.
pub fn bronze_schema() -> SchemaRef {
    let mut columns = Columns::default();
    let c = &mut columns;
    c.instants(&["received_at"]).texts(&["topic"]).add(&["payload"], DataType::Binary, false);
    c.maybe_texts(&["content_type"]).ints(&["qos"]).bools(&["dup"]).maybe_texts(&["gateway"]);
    c.maybe_ints(&["v"]).maybe_texts(&["epoch", "lane"]).maybe_ints(&[
        "seq",
        "rows",
        "rows_before",
        "oldest",
    ]);
    c.maybe_instants(&["sealed_at"]).maybe_texts(&["clock"]);
    columns.schema()
}

/// `ops.delivery_ledger`, which is computed when it is asked for; see [`crate::ledger`].
pub fn delivery_ledger_schema() -> SchemaRef {
    let mut columns = Columns::default();
    let c = &mut columns;
    c.texts(&["site", "gateway_id", "epoch", "lane"]).instants(&["hour"]);
    c.ints(&["expected", "stored", "duplicates", "quarantined", "erased", "declared", "pending", "missing"]);
    c.ints(&["redelivered"]).maybe_texts(&["missing_seqs"]).maybe_instants(&["unknown_since"]);
    columns.schema()
}

/// Folder of all bronze segments.
pub const BRONZE: &str = "bronze/sensor_data";
/// The folders of a lake, in which everything of it lies.
pub const LAYERS: [&str; 5] = ["bronze", "silver", "gold", "ops", "rules"];

/// A bronze object: its writer, a UUIDv7 made at every start, and the number that the writer gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The hour of `received_at` of all of its rows.
    pub hour: Timestamp,
    /// Who wrote it.
    pub writer: Uuid,
    /// Number within the writer, from 0.
    pub number: u64,
}

impl SegmentName {
    /// Path relative to the lake's root. Numbers are padded, so that a listing is in order.
    pub fn path(&self) -> String {
        format!("{}/{}-{:010}.parquet", bronze_hour(self.hour), self.writer, self.number)
    }

    /// Reads [`Self::path`]; `None` for any other object, such as the leavings of a crashed writer.
    pub fn parse(path: &str) -> Option<SegmentName> {
        let (hour, file) = hour_and_file(path)?;
        let (writer, number) = file.strip_suffix(".parquet")?.rsplit_once('-')?;
        let name = SegmentName { hour, writer: writer.parse().ok()?, number: number.parse().ok()? };
        (name.path() == path).then_some(name)
    }
}

/// A bronze object that holds segments of its hour; see [`crate::pack`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackName {
    /// The hour of its segments.
    pub hour: Timestamp,
    /// Of the names of its segments, as 32 hexadecimal digits.
    pub digest: String,
}

impl PackName {
    /// Path relative to the lake's root, which no segment can have.
    pub fn path(&self) -> String {
        format!("{}/pack-{}.parquet", bronze_hour(self.hour), self.digest)
    }

    /// Reads [`Self::path`]; `None` for any other object.
    pub fn parse(path: &str) -> Option<PackName> {
        let (hour, file) = hour_and_file(path)?;
        let digest = file.strip_prefix("pack-")?.strip_suffix(".parquet")?;
        let hexadecimal =
            digest.len() == 32 && digest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let name = PackName { hour, digest: digest.to_owned() };
        (hexadecimal && name.path() == path).then_some(name)
    }
}

/// The hour of a bronze object's folder, and its name in it.
fn hour_and_file(path: &str) -> Option<(Timestamp, &str)> {
    let (folder, file) = path.strip_prefix(BRONZE)?.strip_prefix('/')?.rsplit_once('/')?;
    let mut parts = folder.split('/');
    let mut part =
        |key: &str| -> Option<u32> { parts.next()?.strip_prefix(key)?.strip_prefix('=')?.parse().ok() };
    let (year, month, day, hour) = (part("year")?, part("month")?, part("day")?, part("hour")?);
    let at =
        chrono::NaiveDate::from_ymd_opt(i32::try_from(year).ok()?, month, day)?.and_hms_opt(hour, 0, 0)?;
    Some((Timestamp::from_micros(at.and_utc().timestamp_micros()), file))
}

/// The folder of one hour of bronze.
pub fn bronze_hour(hour: Timestamp) -> String {
    let at = hour.to_utc();
    let (y, m, d, h) = (at.year(), at.month(), at.day(), at.hour());
    format!("{BRONZE}/year={y:04}/month={m:02}/day={d:02}/hour={h:02}")
}

/// An empty object, put if absent to see whether a server does so.
pub const PUT_IF_ABSENT: &str = "ops/put-if-absent";

/// Folder of the plans.
pub const PLANS: &str = "ops/plan";

/// Path of plan `n`, padded so that a listing is in order.
pub fn plan(n: u64) -> String {
    format!("{PLANS}/{n:012}.json")
}

/// Path of the quality rules with this SHA-256.
pub fn rules(hash: &str) -> String {
    format!("ops/rules/{hash}.toml")
}

/// Year and month of an instant in UTC, as the partition columns hold them.
pub fn year_month(ts: Timestamp) -> (i64, i64) {
    let at = ts.to_utc();
    (i64::from(at.year()), i64::from(at.month()))
}

/// Collects fields in order.
#[derive(Default)]
struct Columns(Vec<Field>);

impl Columns {
    fn add(&mut self, names: &[&str], data_type: DataType, nullable: bool) -> &mut Self {
        self.0.extend(names.iter().map(|name| Field::new(*name, data_type.clone(), nullable)));
        self
    }
    fn instants(&mut self, names: &[&str]) -> &mut Self {
        self.add(names, instant(), false)
    }
    fn maybe_instants(&mut self, names: &[&str]) -> &mut Self {
        self.add(names, instant(), true)
    }
    fn texts(&mut self, names: &[&str]) -> &mut Self {
        self.add(names, DataType::Utf8, false)
    }
    fn maybe_texts(&mut self, names: &[&str]) -> &mut Self {
        self.add(names, DataType::Utf8, true)
    }
    fn ints(&mut self, names: &[&str]) -> &mut Self {
        self.add(names, DataType::Int64, false)
    }
    fn maybe_ints(&mut self, names: &[&str]) -> &mut Self {
        self.add(names, DataType::Int64, true)
    }
    fn floats(&mut self, names: &[&str]) -> &mut Self {
        self.add(names, DataType::Float64, false)
    }
    fn maybe_floats(&mut self, names: &[&str]) -> &mut Self {
        self.add(names, DataType::Float64, true)
    }
    fn bools(&mut self, names: &[&str]) -> &mut Self {
        self.add(names, DataType::Boolean, false)
    }
    fn schema(self) -> SchemaRef {
        Arc::new(Schema::new(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_names_and_back() {
        let name = SegmentName {
            hour: "2026-03-01T06:00:00Z".parse().unwrap(),
            writer: Uuid::from_u128(0x0197_0000_0000_7000_8000_0000_0000_0001),
            number: 42,
        };
        let path = "bronze/sensor_data/year=2026/month=03/day=01/hour=06/\
                    01970000-0000-7000-8000-000000000001-0000000042.parquet";
        assert_eq!(name.path(), path);
        assert_eq!(SegmentName::parse(path), Some(name));
        for other in [
            "bronze/sensor_data/year=2026/month=03/day=01/hour=06/x.parquet",
            "bronze/sensor_data/year=2026/month=3/day=01/hour=06/01970000-0000-7000-8000-000000000001-0000000042.parquet",
            "bronze/sensor_data/year=2026/month=03/day=01/hour=06/01970000-0000-7000-8000-000000000001-0000000042.parquet#1",
            "silver/sensor_readings/part-0.parquet",
        ] {
            assert_eq!(SegmentName::parse(other), None, "{other}");
        }
        let pack = PackName { hour: name.hour, digest: "0123456789abcdef".repeat(2) };
        assert_eq!(PackName::parse(&pack.path()), Some(pack.clone()));
        assert_eq!((SegmentName::parse(&pack.path()), PackName::parse(path)), (None, None));
    }

    #[test]
    fn every_partition_column_is_a_column() {
        for table in Table::ALL {
            let schema = table.schema();
            for column in table.partitions() {
                assert!(schema.field_with_name(column).is_ok(), "{column} of {}", table.path());
            }
        }
    }
}
