//! JSON readings as most devices write them, straight into [`Sample`]s: no tree of the document is made.
//!
//! Takes only what the general way reads the same; whatever is unusual about a document, from a number in quotes to a
//! field that stands twice, is left to it. What stands in a field that nobody asks for is not looked at.

use std::fmt;

use common::{json, reading::Quality, time::Timestamp};
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::Value;

use super::Sample;

/// The readings of a document in which nothing is unusual.
pub(super) fn samples(payload: &[u8]) -> Option<Vec<(i64, Sample)>> {
    let read: Vec<Reading> = match payload.first()? {
        b'{' => vec![serde_json::from_slice(payload).ok()?],
        _ => serde_json::from_slice(payload).ok()?,
    };
    Some((0..).zip(read.into_iter().map(|Reading(sample)| sample)).collect())
}

/// A JSON object; serde would take an array of the fields for it, too.
struct Reading(Sample);

#[derive(Deserialize)]
struct Fields {
    device_id: String,
    timestamp: Instant,
    /// Null, but not missing.
    #[serde(deserialize_with = "Option::deserialize")]
    value: Option<f64>,
    #[serde(default)]
    device_type: Option<String>,
    #[serde(default)]
    asset_id: Option<String>,
    #[serde(default)]
    unit: Option<String>,
    #[serde(default)]
    quality: Value,
}

impl<'de> Deserialize<'de> for Reading {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Object)
    }
}

struct Object;

impl<'de> Visitor<'de> for Object {
    type Value = Reading;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a reading")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Reading, A::Error> {
        let Fields { device_id, timestamp, value, device_type, asset_id, unit, quality } =
            Fields::deserialize(MapAccessDeserializer::new(map))?;
        let quality = json::quality(&quality).ok_or_else(|| A::Error::custom("no quality"))?;
        Ok(Reading(Sample {
            ts: timestamp.0,
            device_id,
            device_type: device_type.unwrap_or_default(),
            asset_id: asset_id.unwrap_or_default(),
            unit: unit.unwrap_or_default(),
            value,
            quality: Quality::code(quality),
        }))
    }
}

/// RFC 3339, or a number.
struct Instant(Timestamp);

impl<'de> Deserialize<'de> for Instant {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Stated;
        impl Visitor<'_> for Stated {
            type Value = Instant;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an instant")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Instant, E> {
                text.parse().map(Instant).map_err(E::custom)
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Instant, E> {
                of_number(number.into())
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Instant, E> {
                of_number(number.into())
            }

            fn visit_f64<E: Error>(self, number: f64) -> Result<Instant, E> {
                of_number(number.into())
            }
        }
        deserializer.deserialize_any(Stated)
    }
}

fn of_number<E: Error>(number: Value) -> Result<Instant, E> {
    json::instant(&number).map(Instant).ok_or_else(|| E::custom("no instant"))
}
