//! From a message's bytes to what it says; total: whatever cannot be read is a [`Reject`] with its reason.
//!
//! | rule | a message is quarantined when |
//! |---|---|
//! | `topic` | its topic is none of ours and matches no configured JSON source |
//! | `version` | its wire version is newer than this build's |
//! | `identity` | it is of a lane and does not name itself, or its payload contradicts its properties or its topic |
//! | `payload` | its bytes are not what its stream carries |
//! | `rows` | it holds another number of rows than it says |
//! | `clock` | it holds aggregates or anomalies of a gateway whose clock was never set |
//!
//! **JSON readings** are an object or an array of objects. Other layouts are read through JSON pointers
//! ([`JsonSource`]), and what nobody asks for stays in bronze. A field of another type than it should have is a fault
//! of its sender, and no number is made of it: 1 that was `true`, or a boiler's state in the place of its temperature.
//!
//! | field | is |
//! |---|---|
//! | `device_id` | text |
//! | `timestamp` | text in RFC 3339, or a number: s, ms or µs since 1970, by its size ([`common::json`]) |
//! | `value` | a number; null with quality bad; `NaN` and `Infinity`, which are no JSON, make one reading bad and no message |
//! | `device_type`, `asset_id`, `unit` | text, or not there |
//! | `quality` | `good`, `uncertain`, `bad`, or 0, 1, 2; good when it is not there |
//!
//! | rule | a reading is quarantined when |
//! |---|---|
//! | `type` | it is no object, or a field has another JSON type than above ([`JsonSource::coerce`]) |
//! | `timestamp` | its time is missing, or neither RFC 3339 nor s, ms or µs: among these are nanoseconds |
//! | `value` | its value is missing |

mod plain;

use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{Arc, LazyLock},
};

use arrow::array::RecordBatch;
use common::{
    documents::{Devices, Status},
    json,
    reading::Quality,
    time::Timestamp,
    topic_filter,
    wire::{self, Lane, Stream, Topic, VERSION},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::quality::Reject;

/// A topic of other people's devices, and where their JSON keeps what we need.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JsonSource {
    /// MQTT topic filter.
    pub filter: String,
    /// The plant that the devices stand in.
    pub site: String,
    /// What stands for the gateway in silver.
    pub gateway: String,
    /// JSON pointers (RFC 6901); an optional one that finds nothing is as if it were not sent.
    #[serde(default = "pointer::device_id")]
    pub device_id: String,
    /// See the module's documentation.
    #[serde(default = "pointer::timestamp")]
    pub timestamp: String,
    /// See the module's documentation.
    #[serde(default = "pointer::value")]
    pub value: String,
    /// Optional.
    #[serde(default = "pointer::device_type")]
    pub device_type: String,
    /// Optional.
    #[serde(default = "pointer::asset_id")]
    pub asset_id: String,
    /// Optional.
    #[serde(default = "pointer::unit")]
    pub unit: String,
    /// Optional.
    #[serde(default = "pointer::quality")]
    pub quality: String,
    /// Take numbers that are written as text, true and false as 1 and 0, and a number as a device's name.
    #[serde(default)]
    pub coerce: bool,
}

mod pointer {
    macro_rules! pointers {
        ($($name:ident),*) => { $(pub(super) fn $name() -> String { concat!("/", stringify!($name)).into() })* };
    }
    pointers!(device_id, timestamp, value, device_type, asset_id, unit, quality);
}

/// The layout that the `json` stream has.
static STANDARD: LazyLock<JsonSource> = LazyLock::new(|| JsonSource {
    filter: String::new(),
    site: String::new(),
    gateway: String::new(),
    device_id: pointer::device_id(),
    timestamp: pointer::timestamp(),
    value: pointer::value(),
    device_type: pointer::device_type(),
    asset_id: pointer::asset_id(),
    unit: pointer::unit(),
    quality: pointer::quality(),
    coerce: false,
});

impl JsonSource {
    /// Whether it keeps everything where the `json` stream does.
    fn is_standard(&self) -> bool {
        fn layout(s: &JsonSource) -> [&str; 7] {
            [&s.device_id, &s.timestamp, &s.value, &s.device_type, &s.asset_id, &s.unit, &s.quality]
                .map(String::as_str)
        }
        layout(self) == layout(&STANDARD)
    }
}

/// A reading out of JSON, as it was sent; its text stands in the message. What was not sent is empty.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "the names are those of the JSON keys")]
pub struct Sample<'a> {
    pub ts: Timestamp,
    pub device_id: Cow<'a, str>,
    pub device_type: Cow<'a, str>,
    pub asset_id: Cow<'a, str>,
    pub unit: Cow<'a, str>,
    pub value: Option<f64>,
    /// The wire's code.
    pub quality: u8,
}

/// A reading out of JSON that cannot be understood.
#[derive(Clone, Debug, PartialEq)]
pub struct BadSample {
    /// Place in the array.
    pub row: i64,
    /// Where it was stated.
    pub device_id: Option<String>,
    /// Why.
    pub reject: Reject,
}

/// Work that was done on an asset: the document on `{root}/_cloud/maintenance`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MaintenanceRecord {
    /// Names the record for ever; the same id again changes nothing.
    pub id: String,
    /// The plant.
    pub site: String,
    /// The machine.
    pub asset_id: String,
    /// When the work was done.
    pub done_at: Timestamp,
    /// What was done.
    #[serde(default)]
    pub action: Option<String>,
    /// Anything else.
    #[serde(default)]
    pub note: Option<String>,
}

/// Topic of [`MaintenanceRecord`]s, under the root.
const MAINTENANCE: &str = "/_cloud/maintenance";

/// The topic of [`MaintenanceRecord`]s.
pub fn maintenance_topic(root: &str) -> String {
    format!("{root}{MAINTENANCE}")
}

/// What a message says.
#[derive(Debug)]
pub enum Content<'a> {
    /// With the columns of the wire.
    Lane(Lane, RecordBatch),
    /// Of other people's devices.
    Json {
        /// In order, without the bad ones.
        samples: Vec<(i64, Sample<'a>)>,
        /// In order.
        bad: Vec<BadSample>,
    },
    /// Of a gateway.
    Status(Status),
    /// The registry as text, and when it was written.
    Registry(Timestamp, String),
    /// Work done.
    Maintenance(MaintenanceRecord),
}

/// Who sends messages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sender {
    /// The plant.
    pub site: Option<String>,
    /// The edge agent, or what stands for it.
    pub gateway: Option<String>,
}

/// What a topic says of the messages on it.
#[derive(Clone, Debug)]
pub struct Route {
    /// Who sends them; of work done, the document says it.
    pub sender: Arc<Sender>,
    carries: Carries,
}

/// What the messages of a topic are.
#[derive(Clone, Debug)]
enum Carries {
    Maintenance,
    Stream(Stream),
    /// Index into the configured sources.
    Json(usize),
    /// Nothing that is known; the topic itself.
    Unknown(String),
}

impl Route {
    /// What `topic` says under this root, where these sources are configured.
    pub fn of(root: &str, sources: &[JsonSource], topic: &str) -> Route {
        let (site, gateway, carries) = if topic.strip_prefix(root) == Some(MAINTENANCE) {
            (None, None, Carries::Maintenance)
        } else if let Some(Topic { site, gateway, stream }) = Topic::parse(root, topic) {
            (Some(site), Some(gateway), Carries::Stream(stream))
        } else if let Some(at) = sources.iter().position(|s| topic_filter::matches(&s.filter, topic)) {
            let JsonSource { site, gateway, .. } = &sources[at];
            (Some(site.clone()), Some(gateway.clone()), Carries::Json(at))
        } else {
            (None, None, Carries::Unknown(topic.to_owned()))
        };
        Route { sender: Arc::new(Sender { site, gateway }), carries }
    }

    /// Whether a message is made of readings, and has no name.
    pub fn nameless_readings(&self, claim: Option<Claim>) -> bool {
        match &self.carries {
            Carries::Stream(Stream::Json) | Carries::Json(_) => true,
            Carries::Stream(Stream::Lane(Lane::Readings)) => claim.is_none(),
            _ => false,
        }
    }
}

/// What a message says of itself, outside of its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Wire version.
    pub v: i64,
    /// The run of the agent.
    pub epoch: Uuid,
    /// The lane that it names.
    pub lane: Lane,
    /// Its number.
    pub seq: i64,
    /// Rows in it.
    pub rows: i64,
}

/// Reads a message; `payloads` are those of the ones before.
///
/// # Errors
/// Why it cannot be read; it is quarantined as a whole.
pub fn decode<'a>(
    payloads: &mut wire::Decoder,
    route: &Route,
    sources: &[JsonSource],
    claim: Option<Claim>,
    payload: &'a [u8],
) -> Result<Content<'a>, Reject> {
    match &route.carries {
        Carries::Maintenance => serde_json::from_slice(payload).map(Content::Maintenance).map_err(not_json),
        Carries::Stream(Stream::Lane(lane)) => read_lane(payloads, *lane, &route.sender, claim, payload),
        Carries::Stream(Stream::Json) => samples(&STANDARD, payload),
        Carries::Stream(Stream::Status) => {
            of_sender(&route.sender, payload)?;
            serde_json::from_slice(payload).map(Content::Status).map_err(not_json)
        }
        Carries::Stream(Stream::Devices) => {
            of_sender(&route.sender, payload)?;
            registry(payload)
        }
        Carries::Stream(Stream::Ack | Stream::Cmd(_)) => {
            Err(Reject::new("topic", "acknowledgements and commands are not stored"))
        }
        Carries::Json(at) => samples(&sources[*at], payload),
        Carries::Unknown(topic) => {
            let reason = format!("{topic:?} is no topic of ours and matches no [[json]] filter");
            Err(Reject::new("topic", reason))
        }
    }
}

fn read_lane(
    payloads: &mut wire::Decoder,
    lane: Lane,
    sender: &Sender,
    claim: Option<Claim>,
    payload: &[u8],
) -> Result<Content<'static>, Reject> {
    let Some(claim) = claim else {
        return Err(Reject::new("identity", "its user properties do not name it"));
    };
    if claim.lane != lane {
        return Err(Reject::new("identity", format!("lane {} on a topic of {lane}", claim.lane)));
    }
    if claim.v > i64::from(VERSION) {
        let reason =
            format!("wire version {} is newer than {VERSION}; update the cloud, then replay", claim.v);
        return Err(Reject::new("version", reason));
    }
    let (batch, repeated) =
        payloads.decode(lane, payload).map_err(|e| Reject::new("payload", e.to_string()))?;
    same_sender(
        sender,
        repeated.get("site").map(String::as_str),
        repeated.get("gateway").map(String::as_str),
    )?;
    same_name(&claim, &repeated)?;
    if i64::try_from(batch.num_rows()) != Ok(claim.rows) {
        let reason = format!("it says {} rows and holds {}", claim.rows, batch.num_rows());
        return Err(Reject::new("rows", reason));
    }
    Ok(Content::Lane(lane, batch))
}

/// Whether a payload says nothing else of its message than the user properties do. What it does not say is not
/// asked for; `oldest` may have risen since the sealing, and `sealed_at` is the gateway's to settle.
fn same_name(claim: &Claim, repeated: &HashMap<String, String>) -> Result<(), Reject> {
    let number = |stated: &str, n: i64| stated.parse() == Ok(n);
    let says = |key: &str, stated: &str| match key {
        "epoch" => stated.parse() == Ok(claim.epoch),
        "lane" => stated == claim.lane.as_str(),
        "v" => number(stated, claim.v),
        "seq" => number(stated, claim.seq),
        _ => number(stated, claim.rows),
    };
    for key in ["v", "epoch", "lane", "seq", "rows"] {
        let Some(stated) = repeated.get(key).filter(|stated| !says(key, stated)) else { continue };
        let Claim { v, epoch, lane, seq, rows } = claim;
        let reason = format!(
            "the payload says {key} = {:?}, its user properties v = {v}, epoch = {epoch}, lane = {lane}, seq = {seq}, \
             rows = {rows}",
            cut(stated)
        );
        return Err(Reject::new("identity", reason));
    }
    Ok(())
}

/// Whether a payload that says whose it is came on that gateway's topic.
fn same_sender(sender: &Sender, site: Option<&str>, gateway: Option<&str>) -> Result<(), Reject> {
    let [true_site, true_gateway] = [&sender.site, &sender.gateway].map(|name| name.as_deref().unwrap_or(""));
    let (said_site, said_gateway) = (site.unwrap_or(true_site), gateway.unwrap_or(true_gateway));
    if (said_site, said_gateway) == (true_site, true_gateway) {
        return Ok(());
    }
    let (said_site, said_gateway) = (cut(said_site), cut(said_gateway));
    let reason =
        format!("the payload is {said_site}/{said_gateway}'s, its topic {true_site}/{true_gateway}'s");
    Err(Reject::new("identity", reason))
}

/// [`same_sender`] of a JSON document.
fn of_sender(sender: &Sender, payload: &[u8]) -> Result<(), Reject> {
    #[derive(Deserialize)]
    struct Repeated<'a> {
        #[serde(borrow, default)]
        site: Option<Cow<'a, str>>,
        #[serde(borrow, default)]
        gateway: Option<Cow<'a, str>>,
    }
    let Repeated { site, gateway } = serde_json::from_slice(payload).map_err(not_json)?;
    same_sender(sender, site.as_deref(), gateway.as_deref())
}

/// Enough of somebody's text to know it again.
fn cut(text: &str) -> String {
    text.chars().take(64).collect()
}

fn registry(payload: &[u8]) -> Result<Content<'static>, Reject> {
    let devices: Devices = serde_json::from_slice(payload).map_err(not_json)?;
    let text = std::str::from_utf8(payload).map_err(|e| Reject::new("payload", e.to_string()))?;
    Ok(Content::Registry(devices.at, text.to_owned()))
}

/// The readings of a JSON message that can be understood; without a source it is laid out as on the `json` stream.
pub fn readable<'a>(source: Option<&JsonSource>, payload: &'a [u8]) -> Vec<Sample<'a>> {
    match samples(source.unwrap_or(&STANDARD), payload) {
        Ok(Content::Json { samples, .. }) => samples.into_iter().map(|(_, sample)| sample).collect(),
        _ => Vec::new(),
    }
}

fn samples<'a>(source: &JsonSource, payload: &'a [u8]) -> Result<Content<'a>, Reject> {
    let plain = source.is_standard().then(|| plain::samples(payload)).flatten();
    match plain {
        Some(samples) => Ok(Content::Json { samples, bad: Vec::new() }),
        None => by_pointer(source, payload),
    }
}

fn by_pointer(source: &JsonSource, payload: &[u8]) -> Result<Content<'static>, Reject> {
    let document: Value = match serde_json::from_slice(payload) {
        Ok(document) => document,
        Err(e) => {
            let readable = quoted_non_finite(payload).and_then(|text| serde_json::from_slice(&text).ok());
            readable.ok_or_else(|| not_json(e))?
        }
    };
    let one = [document];
    let items = match &one[0] {
        Value::Array(items) => items.as_slice(),
        _ => &one,
    };
    let (mut samples, mut bad) = (Vec::with_capacity(items.len()), Vec::new());
    for (row, item) in (0i64..).zip(items) {
        match sample(source, item) {
            Ok(sample) => samples.push((row, sample)),
            Err(reject) => {
                let device_id = item.pointer(&source.device_id).and_then(Value::as_str).map(str::to_owned);
                bad.push(BadSample { row, device_id, reject });
            }
        }
    }
    Ok(Content::Json { samples, bad })
}

/// What several languages write for a number that is none; as text, [`common::json::number`] reads it.
const NON_FINITE: [&str; 3] = ["NaN", "Infinity", "-Infinity"];

/// The document with [`NON_FINITE`] in quotes; `None` when there are none.
fn quoted_non_finite(payload: &[u8]) -> Option<Vec<u8>> {
    let (mut text, mut found, mut in_text, mut at) = (Vec::new(), false, false, 0);
    while let Some(byte) = payload.get(at) {
        let word = NON_FINITE.iter().find(|word| !in_text && payload[at..].starts_with(word.as_bytes()));
        let taken = match (word, byte) {
            (Some(word), _) => {
                found = true;
                text.push(b'"');
                text.extend_from_slice(word.as_bytes());
                text.push(b'"');
                at += word.len();
                continue;
            }
            (None, b'\\') if in_text => 2,
            (None, b'"') => {
                in_text = !in_text;
                1
            }
            (None, _) => 1,
        };
        let end = payload.len().min(at + taken);
        text.extend_from_slice(&payload[at..end]);
        at = end;
    }
    found.then_some(text)
}

fn sample(source: &JsonSource, item: &Value) -> Result<Sample<'static>, Reject> {
    if !item.is_object() && !item.is_array() {
        return Err(mistyped("the reading", item, "an object"));
    }
    let text = |pointer: &str| match item.pointer(pointer) {
        Some(Value::String(text)) => Ok(Cow::Owned(text.clone())),
        Some(Value::Number(number)) if source.coerce => Ok(Cow::Owned(number.to_string())),
        None | Some(Value::Null) => Ok(Cow::default()),
        Some(other) => Err(mistyped(pointer, other, "text")),
    };
    // What is no quality is left to the rule of that name.
    let quality = match item.pointer(&source.quality).unwrap_or(&Value::Null) {
        stated @ (Value::Null | Value::String(_) | Value::Number(_)) => json::quality(stated),
        other => return Err(mistyped(&source.quality, other, "good, uncertain or bad")),
    };
    Ok(Sample {
        ts: time(source, item.pointer(&source.timestamp).unwrap_or(&Value::Null))?,
        device_id: text(&source.device_id)?,
        device_type: text(&source.device_type)?,
        asset_id: text(&source.asset_id)?,
        unit: text(&source.unit)?,
        value: value(source, item.pointer(&source.value))?,
        quality: quality.map_or(u8::MAX, Quality::code),
    })
}

fn time(source: &JsonSource, stated: &Value) -> Result<Timestamp, Reject> {
    let ts = match stated {
        Value::String(text) if !source.coerce => text.parse().ok(),
        Value::Bool(_) | Value::Array(_) | Value::Object(_) => {
            return Err(mistyped(&source.timestamp, stated, "RFC 3339 or a number"));
        }
        other => json::instant(other),
    };
    ts.ok_or_else(|| {
        let stated = cut(&stated.to_string());
        let reason = format!("{} = {stated} is not RFC 3339, nor s, ms or µs", source.timestamp);
        Reject::new("timestamp", reason)
    })
}

fn value(source: &JsonSource, stated: Option<&Value>) -> Result<Option<f64>, Reject> {
    let number = match stated {
        None => return Err(Reject::new("value", format!("{} is missing", source.value))),
        Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if !source.coerce && !NON_FINITE.contains(&text.as_str()) => None,
        Some(Value::Bool(_)) if !source.coerce => None,
        Some(other) => json::number(other),
    };
    match (number, stated) {
        (None, Some(other)) => Err(mistyped(&source.value, other, "a number")),
        _ => Ok(number),
    }
}

fn mistyped(what: &str, found: &Value, expected: &str) -> Reject {
    let kind = match found {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    Reject::new("type", format!("{what} = {} is {kind}, not {expected}", cut(&found.to_string())))
}

fn not_json(error: serde_json::Error) -> Reject {
    Reject::new("payload", format!("not the JSON of this stream: {error}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROOT: &str = "tailrace/v1";

    /// Of a message on `topic`.
    fn read<'a>(
        sources: &[JsonSource],
        topic: &str,
        claim: Option<Claim>,
        payload: &'a [u8],
    ) -> (Arc<Sender>, Result<Content<'a>, Reject>) {
        let route = Route::of(ROOT, sources, topic);
        let content = decode(&mut wire::Decoder::default(), &route, sources, claim, payload);
        (route.sender, content)
    }

    #[test]
    fn json_as_other_people_write_it() {
        for (text, expected) in [
            (
                r#"{"device_id":"t1","timestamp":"2026-03-01T06:00:00Z","value":21.5,"unit":"Cel"}"#,
                Ok((1_772_344_800_000_000, Some(21.5), 0)),
            ),
            (
                r#"{"device_id":"t1","timestamp":1772344800,"value":21.5,"quality":"bad"}"#,
                Ok((1_772_344_800_000_000, Some(21.5), 2)),
            ),
            (
                r#"{"device_id":"t1","timestamp":1772344800.25,"value":1}"#,
                Ok((1_772_344_800_250_000, Some(1.0), 0)),
            ),
            (
                r#"{"device_id":"7","timestamp":1772344800123,"value":null,"quality":2}"#,
                Ok((1_772_344_800_123_000, None, 2)),
            ),
            (
                r#"{"device_id":"t1","timestamp":1772344800123456,"value":-1e3,"more":{"x":[1]}}"#,
                Ok((1_772_344_800_123_456, Some(-1000.0), 0)),
            ),
            (r#"{"device_id":"t1","timestamp":"yesterday","value":1}"#, Err("timestamp")),
            (r#"{"device_id":"t1","timestamp":"1772344800123456","value":1}"#, Err("timestamp")),
            (r#"{"device_id":"t1","timestamp":1772344800123456789,"value":1}"#, Err("timestamp")),
            (r#"{"device_id":"t1","value":1}"#, Err("timestamp")),
            (r#"{"device_id":"t1","timestamp":true,"value":1}"#, Err("type")),
            (r#"{"device_id":"t1","timestamp":1,"value":"warm"}"#, Err("type")),
            (r#"{"device_id":"t1","timestamp":1,"value":"21.5"}"#, Err("type")),
            (r#"{"device_id":"t1","timestamp":1,"value":true}"#, Err("type")),
            (r#"{"device_id":"t1","timestamp":1,"value":{"c":21}}"#, Err("type")),
            (r#"{"device_id":"t1","timestamp":1}"#, Err("value")),
            (r#"{"device_id":7,"timestamp":1,"value":1}"#, Err("type")),
            (r#"{"device_id":["t1"],"timestamp":1,"value":1}"#, Err("type")),
            (r#"{"device_id":"t1","timestamp":1,"value":1,"unit":1}"#, Err("type")),
            (r#"{"device_id":"t1","timestamp":1,"value":1,"quality":{}}"#, Err("type")),
            ("7", Err("type")),
        ] {
            let (sender, content) = read(&[], "tailrace/v1/a/b/json", None, text.as_bytes());
            assert_eq!(sender.gateway.as_deref(), Some("b"));
            let Ok(Content::Json { samples, bad }) = content else { panic!("{text}: {content:?}") };
            match expected {
                Ok((micros, value, quality)) => {
                    let sample = &samples[0].1;
                    assert_eq!(
                        (sample.ts.as_micros(), sample.value, sample.quality),
                        (micros, value, quality)
                    );
                }
                Err(rule) => assert_eq!(bad[0].reject.rule, rule, "{text}"),
            }
        }
    }

    #[test]
    fn other_layouts_by_pointer() {
        let source: JsonSource = serde_json::from_value(serde_json::json!({
            "filter": "plant/+/out", "site": "s", "gateway": "g", "device_id": "/d/name", "value": "/v/0"
        }))
        .unwrap();
        let text = br#"[{"d":{"name":"x"},"timestamp":1772344800,"v":[4]}, {}]"#;
        let (sender, content) = read(&[source], "plant/7/out", None, text);
        assert_eq!(sender.site.as_deref(), Some("s"));
        let Ok(Content::Json { samples, bad }) = content else { panic!("{content:?}") };
        assert_eq!((samples[0].1.device_id.as_ref(), samples[0].1.value), ("x", Some(4.0)));
        assert_eq!(bad[0].row, 1);
    }

    /// One reading of an array that is no number, as Python and JavaScript write it, takes no other with it.
    #[test]
    fn what_is_no_json_number_is_one_bad_reading() {
        let json = |text: &'static str| read(&[], "tailrace/v1/a/b/json", None, text.as_bytes()).1;
        let text = r#"[{"device_id":"NaN \" Infinity","timestamp":1,"value":NaN},
                       {"device_id":"b","timestamp":1,"value":-Infinity}, {"device_id":"c","timestamp":1,"value":2}]"#;
        let Ok(Content::Json { samples, bad }) = json(text) else { panic!() };
        assert_eq!((samples.len(), bad.len()), (3, 0));
        assert_eq!(samples[0].1.device_id, "NaN \" Infinity");
        assert!(samples[0].1.value.is_some_and(f64::is_nan));
        assert_eq!((samples[1].1.value, samples[2].1.value), (Some(f64::NEG_INFINITY), Some(2.0)));
        for broken in ["[{\"value\":NaN]", "{\"value\":nan}", "\"NaN", "NaNa"] {
            assert_eq!(json(broken).unwrap_err().rule, "payload", "{broken}");
        }
    }

    #[test]
    fn a_source_may_take_text_for_numbers() {
        let source: JsonSource = serde_json::from_value(
            serde_json::json!({ "filter": "x", "site": "s", "gateway": "g", "coerce": true }),
        )
        .unwrap();
        let text =
            br#"[{"device_id":7,"timestamp":"1772344800","value":" 21.5"}, {"timestamp":1,"value":true},
                        {"timestamp":1,"value":"warm"}]"#;
        let Ok(Content::Json { samples, bad }) = read(&[source], "x", None, text).1 else { panic!() };
        let values: Vec<_> = samples.iter().map(|(_, s)| (s.device_id.as_ref(), s.value)).collect();
        assert_eq!(values, [("7", Some(21.5)), ("", Some(1.0))]);
        assert_eq!((samples[0].1.ts.as_micros(), bad[0].reject.rule), (1_772_344_800_000_000, "type"));
    }

    /// A true message of `plant/gw`, and what becomes of it when one thing about it is not.
    #[test]
    fn a_payload_that_is_another_messages_is_refused() {
        let claim = Claim { v: 1, epoch: Uuid::from_u128(7), lane: Lane::Control, seq: 3, rows: 0 };
        let batch = RecordBatch::new_empty(wire::schema(Lane::Control));
        let true_name = [("v", "1"), ("lane", "control"), ("seq", "3"), ("rows", "0")];
        let epoch = Uuid::from_u128(7).to_string().to_uppercase();
        let ours = true_name.iter().copied().chain([("epoch", epoch.as_str())]);
        let claimed = |changed: &[(&str, &str)]| {
            let metadata = ours.clone().chain(changed.iter().copied());
            let metadata = metadata.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
            let schema = std::sync::Arc::new(batch.schema().as_ref().clone().with_metadata(metadata));
            let mut writer = arrow::ipc::writer::StreamWriter::try_new(Vec::new(), &schema).unwrap();
            writer.write(&batch.clone().with_schema(schema).unwrap()).unwrap();
            let payload = writer.into_inner().unwrap();
            read(&[], "tailrace/v1/plant/gw/control", Some(claim), &payload).1.map(drop)
        };
        assert!(claimed(&[]).is_ok());
        assert!(claimed(&[("site", "plant"), ("gateway", "gw")]).is_ok());
        assert!(claimed(&[("oldest", "9"), ("sealed_at", "never")]).is_ok());
        for (changed, reason) in [
            (("seq", "4"), "the payload says seq = \"4\""),
            (("seq", "four"), "seq = \"four\""),
            (("rows", "1"), "rows = \"1\""),
            (("lane", "readings"), "lane = \"readings\""),
            (("v", "2"), "v = \"2\""),
            (("epoch", "00000000-0000-0000-0000-000000000008"), "000000000007, lane"),
            (("gateway", "gw-9"), "the payload is plant/gw-9's, its topic plant/gw's"),
            (("site", "other"), "the payload is other/gw's, its topic plant/gw's"),
        ] {
            let reject = claimed(&[changed]).unwrap_err();
            assert_eq!(reject.rule, "identity");
            assert!(reject.reason.contains(reason), "{}", reject.reason);
        }
        let status = |gateway: &str| {
            let text = format!(
                r#"{{"v":1,"online":true,"at":"2026-03-01T06:00:00Z","epoch":"{epoch}","version":"1","gateway":"{gateway}"}}"#
            );
            let content = read(&[], "tailrace/v1/plant/gw/status", None, text.as_bytes()).1;
            content.map(|content| matches!(content, Content::Status(_)))
        };
        assert_eq!(status("gw"), Ok(true));
        assert_eq!(status("gw-9").unwrap_err().rule, "identity");
    }

    /// Values of a field, likely and not.
    fn stated() -> impl Strategy<Value = String> {
        prop_oneof![
            4 => Just("\"t1\"".to_owned()),
            4 => (-1e12..1e12f64).prop_map(|n| n.to_string()),
            2 => (0..2_000_000_000_000_000i64).prop_map(|n| n.to_string()),
            2 => Just("\"2026-03-01T06:00:00.25+01:00\"".to_owned()),
            4 => prop::sample::select(vec![
                "null", "true", "\"\"", "\"21.5\"", "\"1772344800\"", "\"NaN\"", "\"BAD\"", "\"\\u00b5\\n\"", "0", "1",
                "2", "3", "-0.0", "1e400", "18446744073709551616", "[1]", "{\"a\":1}", " 7 ",
            ]).prop_map(str::to_owned),
        ]
    }

    fn object() -> impl Strategy<Value = String> {
        let names = ["device_id", "timestamp", "value", "device_type", "asset_id", "unit", "quality", "more"];
        let usual = (stated(), (1_700_000_000..1_800_000_000i64).prop_map(|n| n.to_string()), stated())
            .prop_map(|(id, ts, value)| {
                vec![("device_id".to_owned(), id), ("timestamp".to_owned(), ts), ("value".to_owned(), value)]
            });
        let field = (prop::sample::select(names.to_vec()).prop_map(str::to_owned), stated());
        (usual, prop::collection::vec(field, 0..4), any::<prop::sample::Index>()).prop_map(
            |(mut fields, more, left)| {
                fields.extend(more);
                if left.index(4) == 0 {
                    fields.remove(left.index(3));
                }
                let fields: Vec<String> =
                    fields.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
                format!("{{{}}}", fields.join(","))
            },
        )
    }

    proptest! {
        /// The quick way reads no field otherwise than the general one.
        #[test]
        fn plain_documents_read_the_same(objects in prop::collection::vec(object(), 1..3), form in 0..4) {
            let text = match form {
                0 | 1 => objects[0].clone(),
                2 => format!("[{}]", objects.join(", ")),
                _ => "[[\"t1\", 1772344800, 1.5]]".to_owned(),
            };
            if let Some(quick) = plain::samples(text.as_bytes()) {
                let Ok(Content::Json { samples, bad }) = by_pointer(&STANDARD, text.as_bytes()) else {
                    // No double holds it, which matters to nobody where it stands.
                    prop_assert!(text.contains("\"more\":1e400"), "{}", text);
                    return Ok(());
                };
                prop_assert_eq!(bad, vec![]);
                prop_assert_eq!(quick, samples);
            }
        }

        #[test]
        fn no_bytes_make_it_panic(topic in "(tailrace/v1/a/b/(readings|json|status|devices|control)|x)", payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let claim = Claim { v: 1, epoch: Uuid::nil(), lane: Lane::Readings, seq: 0, rows: 1 };
            let _ = read(&[], &topic, Some(claim), &payload);
        }
    }
}
