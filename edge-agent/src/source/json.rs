//! JSON of other people's devices to readings (pure): every message is accounted for, no bytes make it fail.
//!
//! A message is one JSON value; an array stands for its elements. What follows is done for each of those, by every
//! [`JsonTopic`] whose filter matches:
//!
//! | found | becomes |
//! |---|---|
//! | nothing at the value's pointer | nothing of this topic: devices send what has changed |
//! | a number, such a number as text, a boolean, one of the topic's words | a reading |
//! | null | a bad reading without a value |
//! | anything else, or a time or quality that is none | rejected: `malformed` |
//! | a device that the topic does not list | rejected: `unknown_device` |
//! | a value that is infinite or not a number, as sent or in the device's unit | rejected: `not_finite` |
//! | a time more than 5 min ahead (as the cloud has it), or older than `max_age` | rejected: `future`, `past` |
//! | no time of its own in a message that the broker kept | rejected: `retained` |
//! | the device's latest reading, to the bit | rejected: `repeated`, as after a connection that broke |
//!
//! While the gateway's own clock was never set, its time counts from its start and a sender's can be compared with
//! nothing: then the time of arrival is taken for all.
//!
//! Where no topic finds a value, or the array is empty, that is rejected as `no_value`; what is no JSON at all is
//! `malformed`. So a message makes at least one reading or rejection, and `polled` is their sum.

use std::{collections::BTreeMap, time::Duration};

use common::{
    json,
    reading::{DeviceIx, Quality, Reading},
    time::Timestamp,
    topic_filter,
};
use serde_json::Value;

use super::no_value;
use crate::{
    census::Reason,
    settings::{JsonTopic, NameAt, Target, Whose},
};

/// The gateway's time lies before 2015 only where its clock was never set.
const SET: Timestamp = Timestamp::from_micros(1_420_070_400_000_000);
/// How far ahead of the gateway's clock a sender's may be: what the cloud tolerates by default.
const AHEAD: Duration = Duration::from_secs(300);
/// Characters of a payload that a log shows.
const SHOWN: usize = 80;

/// What came from a broker.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// Where it was published; UTF-8 if the broker keeps to the standard.
    pub topic: &'a [u8],
    /// Whether the broker had kept it.
    pub retained: bool,
    /// The bytes.
    pub payload: &'a [u8],
}

/// What messages said.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// In the order of arrival.
    pub readings: Vec<Reading>,
    /// How many were rejected for each reason, and of which the first was an example.
    pub rejected: BTreeMap<Reason, (u64, String)>,
}

impl Heard {
    fn reject(&mut self, reason: Reason, why: impl FnOnce() -> String) {
        self.rejected.entry(reason).or_insert_with(|| (0, why())).0 += 1;
    }
}

/// The topics of one broker.
#[derive(Clone, Debug)]
pub struct Topics {
    topics: Vec<JsonTopic>,
    /// The latest of each device, by arrival.
    last: BTreeMap<DeviceIx, Reading>,
}

impl Topics {
    /// Nothing has been heard yet.
    pub fn new(topics: Vec<JsonTopic>) -> Self {
        Self { topics, last: BTreeMap::new() }
    }

    /// The filters to subscribe, each once, and whether all that is read by it states its time.
    pub fn filters(&self) -> BTreeMap<&str, bool> {
        let mut filters = BTreeMap::new();
        for topic in &self.topics {
            *filters.entry(topic.filter.as_str()).or_insert(true) &= topic.time.is_some();
        }
        filters
    }

    /// Adds to `heard` what a message says that arrived at `now`.
    pub fn read(&mut self, message: &Message<'_>, now: Timestamp, heard: &mut Heard) {
        let shown = || format!("{}: {}", shown(message.topic), shown(message.payload));
        let Ok(topic) = str::from_utf8(message.topic) else {
            return heard.reject(Reason::Malformed, || format!("its topic is not UTF-8: {}", shown()));
        };
        let document = match serde_json::from_slice::<Value>(message.payload) {
            Ok(document) => document,
            Err(error) => return heard.reject(Reason::Malformed, || format!("{error}: {}", shown())),
        };
        let items = match &document {
            Value::Array(items) => items.as_slice(),
            one => std::slice::from_ref(one),
        };
        if items.is_empty() {
            heard.reject(Reason::NoValue, || format!("an empty array: {}", shown()));
        }
        for item in items {
            let mut says_nothing = true;
            for by in self.topics.iter().filter(|by| topic_filter::matches(&by.filter, topic)) {
                let Some(value) = item.pointer(&by.value) else { continue };
                says_nothing = false;
                match reading(by, topic, message.retained, item, value, now) {
                    Ok(new) if self.last.insert(new.device, new).is_some_and(|last| same(&last, &new)) => {
                        heard.reject(Reason::Repeated, || format!("of {}: {}", new.ts, shown()));
                    }
                    Ok(new) => heard.readings.push(new),
                    Err((reason, why)) => heard.reject(reason, || format!("{why}: {}", shown())),
                }
            }
            if says_nothing {
                heard.reject(Reason::NoValue, || format!("nothing at any value's pointer: {}", shown()));
            }
        }
    }
}

/// One value in the device's unit and with its time, or why not.
fn reading(
    by: &JsonTopic,
    topic: &str,
    retained: bool,
    item: &Value,
    value: &Value,
    now: Timestamp,
) -> Result<Reading, (Reason, String)> {
    let at = |pointer: &str| item.pointer(pointer).unwrap_or(&Value::Null);
    let Target { device, scale, shift } = target(&by.whose, topic, item)?;
    let ts = match by.time.as_ref().filter(|_| now >= SET) {
        Some(pointer) => {
            let none = || (Reason::Malformed, format!("time {pointer} is neither RFC 3339 nor s, ms or us"));
            json::instant(at(pointer)).ok_or_else(none)?
        }
        None if retained => {
            let why = "the broker kept it, and it has no time that could be used".to_owned();
            return Err((Reason::Retained, why));
        }
        None => now,
    };
    if ts > now + AHEAD {
        return Err((Reason::Future, format!("its time {ts} lies ahead; set the device's clock")));
    }
    if now.since(ts) > by.max_age {
        return Err((Reason::Past, format!("its time {ts} is too old; set the device's clock, or max_age")));
    }
    let quality = by.quality.as_ref().map_or(Some(Quality::Good), |pointer| json::quality(at(pointer)));
    let quality = quality.ok_or_else(|| {
        (Reason::Malformed, "its quality is none of good, uncertain, bad, 0, 1, 2".to_owned())
    })?;
    let sent = match value {
        Value::Null => return Ok(no_value(ts, device)),
        Value::String(word) if by.words.contains_key(word) => by.words.get(word).copied(),
        other => json::number(other),
    };
    let sent = sent.ok_or_else(|| {
        (Reason::Malformed, format!("value {} is neither a number nor one of its words", by.value))
    })?;
    let value = sent * scale + shift;
    if !value.is_finite() {
        return Err((Reason::NotFinite, format!("value {} is {sent}", by.value)));
    }
    Ok(Reading { ts, device, quality, value })
}

fn target(whose: &Whose, topic: &str, item: &Value) -> Result<Target, (Reason, String)> {
    let (at, names) = match whose {
        Whose::One(target) => return Ok(*target),
        Whose::Named { at, names } => (at, names),
    };
    let name = match at {
        NameAt::Level(level) => topic.split('/').nth(*level).map(str::to_owned),
        NameAt::Pointer(pointer) => match item.pointer(pointer) {
            Some(Value::String(name)) => Some(name.clone()),
            Some(Value::Number(number)) => Some(number.to_string()),
            _ => None,
        },
    };
    let unknown = |why| (Reason::UnknownDevice, why);
    let name = name.ok_or_else(|| unknown("it names no device".to_owned()))?;
    let known = names.get(&name).copied();
    known.ok_or_else(|| {
        let name: String = name.chars().take(SHOWN).collect();
        unknown(format!("no device is listed for {name:?}; add it to devices"))
    })
}

fn same(a: &Reading, b: &Reading) -> bool {
    (a.ts, a.quality, a.value.to_bits()) == (b.ts, b.quality, b.value.to_bits())
}

/// The beginning of some bytes, fit for a log.
fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * SHOWN)]);
    let mut short: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if bytes.len() > short.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests;
