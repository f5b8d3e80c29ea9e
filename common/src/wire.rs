//! The wire: topics, message identity, and the columns of every Arrow payload. Wire version 1.
//!
//! # Topics
//!
//! `{root}/{site}/{gateway}/{stream}`; root is `tailrace/v1` by default and may itself contain slashes.
//! Site and gateway are 1 to 64 characters of `A-Z a-z 0-9 - _ .`, so they are safe in topics, file
//! names and labels. The cloud's retained heartbeat is `{root}/_cloud/status`.
//!
//! | stream | payload | retained |
//! |---|---|---|
//! | `readings`, `aggregates`, `anomalies`, `control` | Arrow IPC stream, one record batch, zstd | no |
//! | `json` | one JSON object or an array of them, from devices that are not ours | no |
//! | `status`, `devices`, `ack` | JSON, see [`crate::documents`] | status and devices |
//! | `cmd/*` | desired configuration, models | yes |
//!
//! # Identity
//!
//! A message is named for ever by (site, gateway, epoch, lane, seq). Site and gateway are in the topic;
//! the rest travels as MQTT 5 user properties, and is repeated in the Arrow schema's metadata under the
//! same keys, so that neither acknowledging nor storing a message needs its payload to be understood. A sender also
//! repeats its `site` and `gateway`, in the schema's metadata ([`with_sender`]) or at the top of a JSON document
//! ([`crate::documents::Signed`]), so that a bridge or a broker that mixes up topics is noticed: the cloud quarantines
//! a payload that contradicts its topic or its user properties. What a payload does not say is not asked for.
//!
//! | key | meaning |
//! |---|---|
//! | `v` | wire version, 1 |
//! | `epoch` | UUIDv7 of the run of the agent that sealed it |
//! | `lane` | `readings`, `aggregates`, `anomalies` or `control` |
//! | `seq` | number in (epoch, lane), from 0, without holes |
//! | `rows` | rows in this message |
//! | `rows_before` | rows sealed earlier in this epoch and lane |
//! | `oldest` | lowest seq of this epoch and lane that the edge still held when it published (the schema metadata has the value at sealing) |
//! | `sealed_at` | RFC 3339 time of the sealing, by the gateway's clock |
//! | `clock` | `synced`, or `unsynced` when the gateway's clock was never set: then `sealed_at` and every instant in the payload that lies before [`EARLIEST`] count from the start of the machine |
//! | `boot` | only beside `clock` = `unsynced`: UUID of that start of the machine |
//!
//! # Columns
//!
//! `ts` and other instants are timestamp(µs, UTC); `dict` is dictionary(int32, utf8); `?` is nullable.
//!
//! * **readings**: `ts`, `device_id` dict, `device_type` dict, `asset_id` dict, `unit` dict, `kind` dict,
//!   `value` float64? (null only when quality is bad), `quality` uint8 (0 good, 1 uncertain, 2 bad)
//! * **aggregates**: `window_start`, `window_end`, `device_id` dict, `device_type` dict, `asset_id` dict,
//!   `unit` dict, `kind` dict, `count` int64 (readings that are not bad), `bad_count` int64, `min`, `max`,
//!   `mean`, `stddev` (the sample's), `first`, `last` float64?, `covered_from`, `covered_to` (the time that
//!   the aggregate covers), `partial` bool (begun in mid-window), `revision` int32 (0 first)
//! * **anomalies**: `event_id` utf8 (UUID), `state` dict (`raised`, `cleared`), `asset_id` dict, `device_id`
//!   dict, `model` dict, `model_sha256` dict, `severity` dict, `score`, `threshold` float64, `started_at`,
//!   `ended_at`?, `reason` utf8?
//! * **control**: `record` dict (`gap`, `census`, `closing`, `interruption`), `ts` (when it was written),
//!   `epoch` utf8, `lane` dict?, `first_seq`, `last_seq` int64?, `readings` int64, `from`, `to` instants?,
//!   `reason` utf8?
//!   - `gap`: seqs `first_seq..=last_seq` of (`epoch`, `lane`) with `readings` rows were dropped for `reason`
//!   - `census`: in the hour `from..to`, `readings` readings had the outcome `reason`, one of `polled`,
//!     `sealed`, `held`, `skipped`, `rejected:<why>`; counts of one hour add up over records;
//!     hours that were counted before the clock was set begin with the machine's start, and are null where nobody
//!     knows when that was
//!   - `closing`: (`epoch`, `lane`) ended before seq `last_seq` + 1 with `readings` rows in all
//!   - `interruption`: `epoch` did not stop cleanly; readings taken in `from..to` may not have been sealed
//!
//! Golden bytes of every released version are in `common/tests/golden/`.

mod payload;

use std::{
    collections::HashMap,
    fmt,
    str::FromStr,
    sync::{Arc, LazyLock},
};

use arrow::{
    array::{Array as _, ArrayRef, AsArray as _, RecordBatch, StringArray},
    compute::cast,
    datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit, TimestampMicrosecondType},
    error::ArrowError,
    ipc::{
        CompressionType,
        reader::StreamReader,
        writer::{IpcWriteOptions, StreamWriter},
    },
};
use uuid::Uuid;

pub use self::payload::Decoder;
#[cfg(doc)]
use crate::time::EARLIEST;
use crate::time::Timestamp;

/// The wire version that this build writes; it reads this and every earlier one.
pub const VERSION: u32 = 1;
/// Most rows in one message: what is constant compresses to nothing, so its bytes bound little.
pub const MAX_ROWS: i64 = 1_000_000;
/// Default root of every topic.
pub const DEFAULT_ROOT: &str = "tailrace/v1";
/// MQTT content type of an Arrow payload (registered with IANA).
pub const ARROW_STREAM: &str = "application/vnd.apache.arrow.stream";
/// MQTT content type of a JSON payload.
pub const JSON: &str = "application/json";
/// Largest payload in bytes by default: AWS IoT Core's limit for one message.
pub const MAX_MESSAGE: usize = 128 * 1024;
/// Most bytes that [`with_sender`] adds to a payload.
pub const SENDER_BYTES: usize = 320;

/// A queue of messages with its own sequence; the order of the variants is the order of sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// Gaps, censuses, closings: what the ledger needs.
    Control,
    /// Events raised by models.
    Anomalies,
    /// Windows.
    Aggregates,
    /// Readings.
    Readings,
}

impl Lane {
    /// All lanes, most urgent first.
    pub const ALL: [Lane; 4] = [Lane::Control, Lane::Anomalies, Lane::Aggregates, Lane::Readings];

    /// The lane's word, which is also its stream's.
    pub const fn as_str(self) -> &'static str {
        match self {
            Lane::Control => "control",
            Lane::Anomalies => "anomalies",
            Lane::Aggregates => "aggregates",
            Lane::Readings => "readings",
        }
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Lane {
    type Err = WireError;
    fn from_str(text: &str) -> Result<Self, WireError> {
        Lane::ALL
            .into_iter()
            .find(|lane| lane.as_str() == text)
            .ok_or_else(|| WireError::property("lane", text, "readings, aggregates, anomalies or control"))
    }
}

impl serde::Serialize for Lane {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> serde::Deserialize<'de> for Lane {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The last part of a topic.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// An Arrow stream of this lane.
    Lane(Lane),
    /// Other people's devices.
    Json,
    /// Birth, last will, heartbeat.
    Status,
    /// The registry.
    Devices,
    /// Cloud to edge: what has become durable.
    Ack,
    /// Cloud to edge: desired state by name.
    Cmd(String),
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stream::Lane(lane) => lane.fmt(f),
            Stream::Json => f.write_str("json"),
            Stream::Status => f.write_str("status"),
            Stream::Devices => f.write_str("devices"),
            Stream::Ack => f.write_str("ack"),
            Stream::Cmd(name) => write!(f, "cmd/{name}"),
        }
    }
}

/// A topic under a root.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Topic {
    /// The plant.
    pub site: String,
    /// The edge agent.
    pub gateway: String,
    /// What is sent.
    pub stream: Stream,
}

impl Topic {
    /// The topic's text under `root`.
    pub fn under(&self, root: &str) -> String {
        format!("{root}/{}/{}/{}", self.site, self.gateway, self.stream)
    }

    /// Reads a topic under `root`; `None` for whatever is not one of ours.
    pub fn parse(root: &str, topic: &str) -> Option<Topic> {
        let mut parts = topic.strip_prefix(root)?.strip_prefix('/')?.splitn(3, '/');
        let (site, gateway, stream) = (parts.next()?, parts.next()?, parts.next()?);
        if !is_name(site) || !is_name(gateway) {
            return None;
        }
        let stream = match stream {
            "json" => Stream::Json,
            "status" => Stream::Status,
            "devices" => Stream::Devices,
            "ack" => Stream::Ack,
            other => match other.strip_prefix("cmd/") {
                Some(name) if !name.is_empty() => Stream::Cmd(name.to_owned()),
                _ => Stream::Lane(other.parse().ok()?),
            },
        };
        Some(Topic { site: site.to_owned(), gateway: gateway.to_owned(), stream })
    }
}

/// The topic of the cloud's retained heartbeat.
pub fn cloud_status_topic(root: &str) -> String {
    format!("{root}/_cloud/status")
}

/// Whether `text` may name a site or a gateway: 1 to 64 of `A-Z a-z 0-9 - _ .`, not starting with `_`.
pub fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && !text.starts_with(['_', '.'])
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// Whether the gateway's clock could be trusted when a message was sealed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockState {
    /// It had been set.
    #[default]
    Synced,
    /// It was never set; provisional times count from this start of the machine.
    Unsynced {
        /// Names the start; nil where the sender does not say.
        boot: Uuid,
    },
}

impl ClockState {
    /// The word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            ClockState::Synced => "synced",
            ClockState::Unsynced { .. } => "unsynced",
        }
    }
}

/// What a message says of itself outside of its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Wire version.
    pub v: u32,
    /// The run of the agent.
    pub epoch: Uuid,
    /// The queue.
    pub lane: Lane,
    /// Number in (epoch, lane).
    pub seq: u64,
    /// Rows in the payload.
    pub rows: u64,
    /// Rows sealed earlier in this epoch and lane.
    pub rows_before: u64,
    /// Lowest seq of this epoch and lane that the edge still holds.
    pub oldest: u64,
    /// When it was sealed.
    pub sealed_at: Timestamp,
    /// Whether to believe `sealed_at`.
    pub clock: ClockState,
}

impl Identity {
    /// The user properties, in the order of the table above.
    pub fn to_properties(&self) -> Vec<(String, String)> {
        let boot = match self.clock {
            ClockState::Synced => None,
            ClockState::Unsynced { boot } => Some(("boot", boot.to_string())),
        };
        let properties = [
            ("v", self.v.to_string()),
            ("epoch", self.epoch.to_string()),
            ("lane", self.lane.to_string()),
            ("seq", self.seq.to_string()),
            ("rows", self.rows.to_string()),
            ("rows_before", self.rows_before.to_string()),
            ("oldest", self.oldest.to_string()),
            ("sealed_at", self.sealed_at.to_string()),
            ("clock", self.clock.as_str().to_owned()),
        ];
        properties.into_iter().chain(boot).map(|(key, value)| (key.to_owned(), value)).collect()
    }

    /// Reads user properties; unknown keys are ignored, so that a newer version can still be named.
    ///
    /// # Errors
    /// Names the first property that is missing or cannot be read.
    pub fn from_properties(properties: &[(String, String)]) -> Result<Identity, WireError> {
        let get = |key: &'static str| {
            let found = properties.iter().find(|(k, _)| k == key);
            found.map(|(_, v)| v.as_str()).ok_or(WireError::Missing(key))
        };
        let number = |key: &'static str| {
            let text = get(key)?;
            // Deltas and SQL count in int64, so a larger number is no number of ours.
            match text.parse::<u64>() {
                Ok(n) if i64::try_from(n).is_ok() => Ok(n),
                _ => Err(WireError::property(key, text, "an integer from 0 to 2^63 - 1")),
            }
        };
        Ok(Identity {
            v: number("v").and_then(|v| {
                u32::try_from(v).map_err(|_| WireError::property("v", &v.to_string(), "a small integer"))
            })?,
            epoch: get("epoch")?
                .parse()
                .map_err(|_| WireError::property("epoch", get("epoch").unwrap_or(""), "a UUID"))?,
            lane: get("lane")?.parse()?,
            seq: number("seq")?,
            rows: number("rows")?,
            rows_before: number("rows_before")?,
            oldest: number("oldest")?,
            sealed_at: get("sealed_at")?.parse().map_err(|_| {
                WireError::property("sealed_at", get("sealed_at").unwrap_or(""), "an RFC 3339 time")
            })?,
            clock: match get("clock")? {
                "synced" => ClockState::Synced,
                "unsynced" => ClockState::Unsynced {
                    boot: match get("boot") {
                        Ok(boot) => boot.parse().map_err(|_| WireError::property("boot", boot, "a UUID"))?,
                        Err(_) => Uuid::nil(),
                    },
                },
                other => return Err(WireError::property("clock", other, "synced or unsynced")),
            },
        })
    }
}

/// Why bytes or properties are not a message of this wire. The caller keeps the bytes and quarantines them.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// A user property is absent.
    #[error("user property {0} is missing")]
    Missing(&'static str),
    /// A user property cannot be read.
    #[error("user property {key} = {value:?} is not {expected}")]
    Property {
        /// Which one.
        key: &'static str,
        /// What stood there, cut to 64 characters.
        value: String,
        /// What is expected.
        expected: &'static str,
    },
    /// The payload is not an Arrow IPC stream of one batch.
    #[error("payload is not an Arrow IPC stream of one batch: {0}")]
    Payload(String),
    /// The payload's columns are not those of its stream.
    #[error("column {column}: {problem}")]
    Column {
        /// Which one.
        column: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl WireError {
    fn property(key: &'static str, value: &str, expected: &'static str) -> Self {
        Self::Property { key, value: value.chars().take(64).collect(), expected }
    }
}

/// The type of every instant on the wire and in the lake.
pub fn instant() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
}

/// The type of text that repeats, on the wire and on its way through the lake.
pub fn dict() -> DataType {
    DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8))
}

/// The columns of an Arrow stream, as the module's table lists them.
pub fn schema(lane: Lane) -> SchemaRef {
    static SCHEMAS: LazyLock<[SchemaRef; 4]> =
        LazyLock::new(|| Lane::ALL.map(|lane| Arc::new(Schema::new(columns(lane)))));
    Arc::clone(&SCHEMAS[lane as usize])
}

fn columns(lane: Lane) -> Vec<Field> {
    let required = |names: &[&str], data_type: DataType| -> Vec<Field> {
        names.iter().map(|name| Field::new(*name, data_type.clone(), false)).collect()
    };
    let nullable = |names: &[&str], data_type: DataType| -> Vec<Field> {
        names.iter().map(|name| Field::new(*name, data_type.clone(), true)).collect()
    };
    let device = ["device_id", "device_type", "asset_id", "unit", "kind"];
    match lane {
        Lane::Readings => [
            required(&["ts"], instant()),
            required(&device, dict()),
            nullable(&["value"], DataType::Float64),
            required(&["quality"], DataType::UInt8),
        ]
        .concat(),
        Lane::Aggregates => [
            required(&["window_start", "window_end"], instant()),
            required(&device, dict()),
            required(&["count", "bad_count"], DataType::Int64),
            nullable(&["min", "max", "mean", "stddev", "first", "last"], DataType::Float64),
            required(&["covered_from", "covered_to"], instant()),
            required(&["partial"], DataType::Boolean),
            required(&["revision"], DataType::Int32),
        ]
        .concat(),
        Lane::Anomalies => [
            required(&["event_id"], DataType::Utf8),
            required(&["state", "asset_id", "device_id", "model", "model_sha256", "severity"], dict()),
            required(&["score", "threshold"], DataType::Float64),
            required(&["started_at"], instant()),
            nullable(&["ended_at"], instant()),
            nullable(&["reason"], DataType::Utf8),
        ]
        .concat(),
        Lane::Control => [
            required(&["record"], dict()),
            required(&["ts"], instant()),
            required(&["epoch"], DataType::Utf8),
            nullable(&["lane"], dict()),
            nullable(&["first_seq", "last_seq"], DataType::Int64),
            required(&["readings"], DataType::Int64),
            nullable(&["from", "to"], instant()),
            nullable(&["reason"], DataType::Utf8),
        ]
        .concat(),
    }
}

/// Encodes one batch as an Arrow IPC stream with zstd, the identity in the schema's metadata.
///
/// # Errors
/// When the batch's columns cannot be written, which its schema rules out.
pub fn encode(batch: &RecordBatch, identity: &Identity) -> Result<Vec<u8>, ArrowError> {
    let metadata: HashMap<String, String> = identity.to_properties().into_iter().collect();
    let schema = Arc::new(batch.schema().as_ref().clone().with_metadata(metadata));
    let batch = batch.clone().with_schema(Arc::clone(&schema))?;
    let options = IpcWriteOptions::default().try_with_compression(Some(CompressionType::ZSTD))?;
    let mut writer = StreamWriter::try_new_with_options(Vec::with_capacity(4096), &schema, options)?;
    writer.write(&batch)?;
    writer.into_inner()
}

/// A payload that [`encode`] has made, with its sender in the schema's metadata, beside the identity; what follows the
/// schema stays as it is. The same payload and sender give the same bytes.
///
/// # Errors
/// When the payload does not begin with a schema.
pub fn with_sender(payload: &[u8], site: &str, gateway: &str) -> Result<Vec<u8>, WireError> {
    let malformed = |e: ArrowError| WireError::Payload(e.to_string());
    let cut_short = || WireError::Payload("it ends within its schema".into());
    // A marker, the length of the message, the message: a schema has no body.
    let length = payload.get(4..8).and_then(|bytes| bytes.try_into().ok()).ok_or_else(cut_short)?;
    let length = u32::from_le_bytes(length) as usize;
    let rest = payload.get(8..).and_then(|behind| behind.get(length..)).ok_or_else(cut_short)?;
    // As for [`Decoder::decode`].
    let read = std::panic::catch_unwind(|| StreamReader::try_new(payload, None).map(|r| r.schema()));
    let read = read.map_err(|_| WireError::Payload("malformed metadata".into()))?.map_err(malformed)?;
    let mut schema = read.as_ref().clone();
    schema.metadata.insert("site".to_owned(), site.to_owned());
    schema.metadata.insert("gateway".to_owned(), gateway.to_owned());
    let signed = Vec::with_capacity(payload.len() + SENDER_BYTES);
    let mut writer = StreamWriter::try_new(signed, &schema).map_err(malformed)?;
    // The schema is written at once, the end of the stream only by `finish`.
    let mut signed = std::mem::take(writer.get_mut());
    signed.extend_from_slice(rest);
    Ok(signed)
}

/// Decodes a payload of `lane` and checks that its columns are the stream's, so that callers may index
/// them by position. Additional columns at the end, of a newer minor version, are dropped.
///
/// No bytes make it panic, and none make it allocate more than 256 MiB.
///
/// # Errors
/// Says what is wrong; the caller keeps the bytes.
pub fn decode(lane: Lane, payload: &[u8]) -> Result<RecordBatch, WireError> {
    Decoder::default().decode(lane, payload).map(|(batch, _)| batch)
}

/// The columns of the lane, of a batch that was read.
fn conform(lane: Lane, batch: &RecordBatch) -> Result<RecordBatch, WireError> {
    let expected = schema(lane);
    let mut columns = Vec::with_capacity(expected.fields().len());
    for field in expected.fields() {
        let column = batch.column_by_name(field.name()).ok_or_else(|| WireError::Column {
            column: field.name().clone(),
            problem: "is missing".into(),
        })?;
        let word = lane == Lane::Readings && *field.data_type() == dict();
        let problem = if column.data_type() != field.data_type() {
            Some(format!("is {} instead of {}", column.data_type(), field.data_type()))
        } else if word && column.logical_null_count() > 0 {
            columns.push(without_nulls(column)?);
            continue;
        } else if !field.is_nullable() && column.is_nullable() && column.logical_null_count() > 0 {
            Some("contains nulls".into())
        } else {
            None
        };
        if let Some(problem) = problem {
            return Err(WireError::Column { column: field.name().clone(), problem });
        }
        columns.push(Arc::clone(column));
    }
    RecordBatch::try_new(expected, columns).map_err(|e| WireError::Payload(e.to_string()))
}

/// A reading that does not say its device must not take the others of its message with it: no word is an empty one,
/// which names no device.
fn without_nulls(column: &ArrayRef) -> Result<ArrayRef, WireError> {
    let failed = |e: ArrowError| WireError::Payload(e.to_string());
    let words = cast(column, &DataType::Utf8).map_err(failed)?;
    let words: StringArray = words.as_string::<i32>().iter().map(|word| Some(word.unwrap_or(""))).collect();
    cast(&words, &dict()).map_err(failed)
}

/// A message that was sealed before its gateway's clock was set, as it is now known to be: provisional instants in
/// its columns and `sealed_at` moved by `offset` µs, the clock synced. The same message and offset give the same
/// bytes, whenever and wherever that is done by the same build.
///
/// # Errors
/// When the payload is none that this build could have sealed.
pub fn set_clock(lane: Lane, payload: &[u8], offset: i64) -> Result<Vec<u8>, WireError> {
    let read = Decoder::default().read(payload)?;
    let metadata: Vec<_> = read.schema().metadata().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    let sealed = Identity::from_properties(&metadata)?;
    let settled = |micros: i64| match Timestamp::from_micros(micros) {
        at if at.is_provisional() => at.shifted(offset).as_micros(),
        at => at.as_micros(),
    };
    let rows = conform(lane, &read)?;
    let columns = rows.columns().iter().map(|column| -> ArrayRef {
        match column.as_primitive_opt::<TimestampMicrosecondType>() {
            Some(instants) => {
                Arc::new(instants.unary::<_, TimestampMicrosecondType>(settled).with_timezone("UTC"))
            }
            None => Arc::clone(column),
        }
    });
    let rows = RecordBatch::try_new(rows.schema(), columns.collect())
        .map_err(|e| WireError::Payload(e.to_string()))?;
    let sealed_at = Timestamp::from_micros(settled(sealed.sealed_at.as_micros()));
    let identity = Identity { sealed_at, clock: ClockState::Synced, ..sealed };
    encode(&rows, &identity).map_err(|e| WireError::Payload(e.to_string()))
}
