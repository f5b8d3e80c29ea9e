//! JSON readings as most devices write them, straight into [`Sample`]s: no tree of the document is made.
//!
//! Takes only what the general way reads the same; whatever is unusual about a document, from a number in quotes to a
//! field that stands twice, is left to it. What stands in a field that nobody asks for is not looked at.

use std::{borrow::Cow, fmt};

use common::{json, reading::Quality, time::Timestamp};
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::Value;

use super::Sample;

/// The readings of a document in which nothing is unusual.
pub(super) fn samples(payload: &[u8]) -> Option<Vec<(i64, Sample<'_>)>> {
    let of = |Reading(sample)| sample;
    if payload.first() == Some(&b'{') {
        return Some(vec![(0, of(serde_json::from_slice(payload).ok()?))]);
    }
    let read: Vec<Reading<'_>> = serde_json::from_slice(payload).ok()?;
    Some((0..).zip(read.into_iter().map(of)).collect())
}

/// A JSON object; serde would take an array of the fields for it, too.
struct Reading<'a>(Sample<'a>);

#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    device_id: Cow<'a, str>,
    timestamp: Instant,
    /// Null, but not missing.
    #[serde(deserialize_with = "Option::deserialize")]
    value: Option<f64>,
    // Serde borrows no text in an option; a null is left to the general way.
    #[serde(borrow, default)]
    device_type: Cow<'a, str>,
    #[serde(borrow, default)]
    asset_id: Cow<'a, str>,
    #[serde(borrow, default)]
    unit: Cow<'a, str>,
    #[serde(default)]
    quality: Value,
}

impl<'de> Deserialize<'de> for Reading<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Object)
    }
}

struct Object;

impl<'de> Visitor<'de> for Object {
    type Value = Reading<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a reading")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Reading<'de>, A::Error> {
        let Fields { device_id, timestamp, value, device_type, asset_id, unit, quality } =
            Fields::deserialize(MapAccessDeserializer::new(map))?;
        let quality = json::quality(&quality).ok_or_else(|| A::Error::custom("no quality"))?;
        Ok(Reading(Sample {
            ts: timestamp.0,
            device_id,
            device_type,
            asset_id,
            unit,
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
