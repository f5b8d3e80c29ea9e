//! The quality rules of silver: what a reading must be to be stored, and in which unit.
//!
//! | rule | a reading is quarantined when |
//! |---|---|
//! | `device_id` | it names no device, or one with a name longer than 256 bytes or with control characters |
//! | `device_type`, `kind` | these cannot be used |
//! | `unit` | its unit cannot be converted into the canonical unit of its device type |
//! | `quality` | its quality is none of good, uncertain, bad |
//! | `null` | it has no value and is not bad |
//! | `finite` | its value is infinite or not a number |
//! | `range` | its value lies outside of its device type's range, in canonical units |
//! | `future` | its time lies more than 5 min (by default) after it was received |
//! | `past` | its time lies before 2015: among them are those of a gateway whose clock was never set |
//! | `conflict` | the same device has another value, quality or unit at the same time already |
//!
//! [`crate::decode`] has the rules by which messages and readings cannot even be read.
//!
//! [`SoftRule`]s keep a reading out of nothing: what breaks them is counted. The results of both kinds are in
//! `ops/quality_results`, those of soft rules as `soft_range`, `soft_rate` and `soft_interval`.
//!
//! Rules are data: a plan names them by the SHA-256 of their TOML, which is kept in `ops/rules`, so a plan
//! that is carried out again, or by another refiner, gives the same rows.

use std::{collections::BTreeMap, time::Duration};

use common::{
    reading::Kind,
    time::{EARLIEST, Timestamp, duration},
    units::{DEVICE_TYPES, UNKNOWN_RANGE, Unit},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::decode::JsonSource;

/// The partition of readings whose sender states no device type.
pub const UNKNOWN_TYPE: &str = "unknown";

/// What readings are checked against.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rules {
    /// Format of this document.
    pub version: u32,
    /// Root of our topics.
    pub root: String,
    /// A reading may be this far ahead of the cloud's clock, in seconds.
    pub future_tolerance_s: u64,
    /// Canonical unit and range of each device type.
    pub types: BTreeMap<String, TypeRule>,
    /// Ranges of single devices, in the canonical unit of their type, by device id.
    pub devices: BTreeMap<String, [f64; 2]>,
    /// Other people's topics, first match first.
    pub json: Vec<JsonSource>,
    /// What is counted only, by device type.
    #[serde(default)]
    pub soft: BTreeMap<String, SoftRule>,
}

/// What is expected of a device type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TypeRule {
    /// UCUM code of the canonical unit.
    pub unit: String,
    /// Inclusive limits in it.
    pub range: [f64; 2],
}

/// What is expected of a device type, and counted: readings that break it are stored all the same. Bad readings are
/// not judged, but they have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SoftRule {
    /// Inclusive limits in the canonical unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<[f64; 2]>,
    /// Most change per second from one reading of a device to its next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Longest time from one reading of a device to its next; zero for any.
    #[serde(default, with = "duration", skip_serializing_if = "Duration::is_zero")]
    pub interval: Duration,
}

impl SoftRule {
    /// Whether a reading is judged by the one before it.
    pub fn looks_back(&self) -> bool {
        self.rate.is_some() || !self.interval.is_zero()
    }
}

/// How the readings of a device are brought into canonical form.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Lower case; [`UNKNOWN_TYPE`] where none is stated.
    pub device_type: String,
    /// Canonical, or as sent where the device type has none.
    pub unit: String,
    /// `canonical = value * scale + shift`.
    pub scale: f64,
    /// See `scale`.
    pub shift: f64,
    /// Inclusive limits of the canonical value.
    pub range: [f64; 2],
    /// What is counted only.
    pub soft: Option<SoftRule>,
}

/// Why something is quarantined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reject {
    /// Name of the rule, from the tables in the docs of this module and [`crate::decode`].
    pub rule: &'static str,
    /// With the value and what was expected.
    pub reason: String,
}

impl Reject {
    /// A reject by `rule`.
    pub fn new(rule: &'static str, reason: impl Into<String>) -> Self {
        Self { rule, reason: reason.into() }
    }
}

impl Rules {
    /// The shipped device types, with ranges moved and types added by configuration.
    pub fn new(
        root: &str,
        json: &[JsonSource],
        future_tolerance: Duration,
        types: &BTreeMap<String, TypeRule>,
        devices: &BTreeMap<String, [f64; 2]>,
    ) -> Rules {
        let shipped = DEVICE_TYPES.iter().map(|t| {
            let range = [*t.range.start(), *t.range.end()];
            (t.name.to_owned(), TypeRule { unit: t.unit.to_owned(), range })
        });
        let mut all: BTreeMap<String, TypeRule> = shipped.collect();
        all.extend(types.clone());
        Rules {
            version: 1,
            root: root.to_owned(),
            json: json.to_vec(),
            future_tolerance_s: future_tolerance.as_secs(),
            types: all,
            devices: devices.clone(),
            soft: BTreeMap::new(),
        }
    }

    /// The document that is kept, in a stable order.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("numbers, texts and tables can be written")
    }

    /// Reads [`Self::to_toml`].
    ///
    /// # Errors
    /// When it is not such a document, or of a newer format.
    pub fn from_toml(text: &str) -> anyhow::Result<Rules> {
        let rules: Rules = toml::from_str(text)?;
        anyhow::ensure!(rules.version == 1, "rules of version {}; this build reads 1", rules.version);
        Ok(rules)
    }

    /// Name of the rules: SHA-256 of [`Self::to_toml`] in hex.
    pub fn hash(&self) -> String {
        hex(&Sha256::digest(self.to_toml()))
    }

    /// How readings of this device are checked and converted.
    ///
    /// # Errors
    /// The reason why none of them can be stored.
    pub fn profile(
        &self,
        device_id: &str,
        device_type: &str,
        unit: &str,
        kind: &str,
    ) -> Result<Profile, Reject> {
        if device_id.is_empty() || device_id.len() > 256 || device_id.chars().any(char::is_control) {
            let reason = format!("{:?} names no device", device_id.chars().take(64).collect::<String>());
            return Err(Reject::new("device_id", reason));
        }
        if let Err(reason) = kind.parse::<Kind>() {
            return Err(Reject::new("kind", reason));
        }
        let device_type = match device_type {
            "" => UNKNOWN_TYPE.to_owned(),
            stated => stated.to_ascii_lowercase(),
        };
        let named = device_type.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
        if device_type.len() > 64 || !named {
            let reason = format!("{device_type:?} is not a name of 1 to 64 letters, digits, _ or -");
            return Err(Reject::new("device_type", reason));
        }
        let own = self.devices.get(device_id).copied();
        let soft = self.soft.get(&device_type).copied();
        let any = [f64::NEG_INFINITY, f64::INFINITY];
        let Some(rule) = self.types.get(&device_type) else {
            let nothing_known = device_type == UNKNOWN_TYPE && unit.is_empty();
            let range = if nothing_known { [*UNKNOWN_RANGE.start(), *UNKNOWN_RANGE.end()] } else { any };
            let unit = unit.to_owned();
            let range = own.unwrap_or(range);
            return Ok(Profile { device_type, unit, scale: 1.0, shift: 0.0, range, soft });
        };
        let (scale, shift) = if unit.is_empty() || unit == rule.unit {
            (1.0, 0.0)
        } else {
            let converts = Unit::parse(unit).zip(Unit::parse(&rule.unit)).and_then(|(u, to)| u.into_unit(to));
            converts.ok_or_else(|| {
                let reason = format!("{unit:?} does not convert into {:?} of {device_type}", rule.unit);
                Reject::new("unit", reason)
            })?
        };
        let (unit, range) = (rule.unit.clone(), own.unwrap_or(rule.range));
        Ok(Profile { device_type, unit, scale, shift, range, soft })
    }

    /// Checks when something was measured.
    ///
    /// # Errors
    /// The rule that it breaks.
    #[inline]
    pub fn check_time(&self, ts: Timestamp, received_at: Timestamp) -> Result<(), Reject> {
        let tolerance = i64::try_from(self.future_tolerance_s).unwrap_or(i64::MAX).saturating_mul(1_000_000);
        if ts < EARLIEST {
            return Err(Reject::new("past", format!("{ts} lies before {EARLIEST}")));
        }
        if ts.as_micros().saturating_sub(received_at.as_micros()) > tolerance {
            return Err(Reject::new("future", format!("{ts} was received at {received_at}")));
        }
        Ok(())
    }

    /// Checks one reading and returns its value in canonical units; NaN stands for "no value".
    ///
    /// # Errors
    /// The rule that it breaks.
    #[inline]
    pub fn check(
        &self,
        profile: &Profile,
        ts: Timestamp,
        value: Option<f64>,
        quality: u8,
        received_at: Timestamp,
    ) -> Result<f64, Reject> {
        self.check_time(ts, received_at)?;
        if quality > 2 {
            return Err(Reject::new("quality", format!("{quality} is none of 0, 1, 2")));
        }
        let Some(value) = value else {
            return match quality {
                2 => Ok(f64::NAN),
                _ => Err(Reject::new("null", "no value, and the quality is not bad")),
            };
        };
        let canonical = value * profile.scale + profile.shift;
        let [low, high] = profile.range;
        if !canonical.is_finite() {
            return Err(Reject::new("finite", format!("{value} is not a finite number")));
        }
        if canonical < low || canonical > high {
            let unit = &profile.unit;
            return Err(Reject::new("range", format!("{canonical} {unit} is not within {low} … {high}")));
        }
        Ok(canonical)
    }
}

/// The line of configuration that would let a reject pass, where there is one.
pub fn mend(rule: &str, device_id: &str, device_type: &str) -> Option<String> {
    match rule {
        "range" => Some(format!("[quality.devices] {device_id:?} = [LOW, HIGH]")),
        "unit" => Some(format!("[quality.types.{device_type}] unit = \"UCUM\", range = [LOW, HIGH]")),
        "future" => Some("[quality] future_tolerance = \"…\", or set the sender's clock".to_owned()),
        "type" | "timestamp" => Some("[[json]] coerce = true, for a source of its own".to_owned()),
        "value" => Some("[[json]] value = \"/…\"".to_owned()),
        "topic" => Some("[[json]] filter = \"…\", site, gateway".to_owned()),
        _ => None,
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        let devices = [("kiln".to_owned(), [0.0, 1_500.0])].into();
        Rules::new("tailrace/v1", &[], Duration::from_secs(300), &BTreeMap::new(), &devices)
    }

    #[test]
    fn profiles() {
        let rules = rules();
        for (id, device_type, unit, kind, expected) in [
            ("t", "temperature", "[degF]", "gauge", Ok(("temperature", "Cel", [-100.0, 500.0]))),
            ("t", "Temperature", "", "gauge", Ok(("temperature", "Cel", [-100.0, 500.0]))),
            ("kiln", "temperature", "Cel", "gauge", Ok(("temperature", "Cel", [0.0, 1_500.0]))),
            ("x", "", "", "gauge", Ok(("unknown", "", [-100.0, 500.0]))),
            ("x", "smell", "ou", "gauge", Ok(("smell", "ou", [f64::NEG_INFINITY, f64::INFINITY]))),
            ("t", "temperature", "bar", "gauge", Err("unit")),
            ("t", "temperature", "parsec", "gauge", Err("unit")),
            ("", "temperature", "Cel", "gauge", Err("device_id")),
            ("t", "temperature", "Cel", "wobble", Err("kind")),
            ("t", "a/b", "Cel", "gauge", Err("device_type")),
        ] {
            let got = rules.profile(id, device_type, unit, kind);
            match (&got, expected) {
                (Ok(p), Ok((t, u, r))) => {
                    assert_eq!((p.device_type.as_str(), p.unit.as_str(), p.range), (t, u, r), "{id}");
                }
                (Err(reject), Err(rule)) => assert_eq!(reject.rule, rule),
                _ => panic!("{id} {device_type} {unit}: {got:?}"),
            }
        }
    }

    #[test]
    fn readings() {
        let rules = rules();
        let now: Timestamp = "2026-03-01T06:00:00Z".parse().unwrap();
        let profile = rules.profile("t", "temperature", "[degF]", "gauge").unwrap();
        let minute = Duration::from_secs(60);
        for (ts, value, quality, expected) in [
            (now, Some(212.0), 0, Ok(100.0)),
            (now, Some(1_000.0), 0, Err("range")),
            (now, Some(f64::INFINITY), 2, Err("finite")),
            (now, Some(f64::NAN), 0, Err("finite")),
            (now, None, 1, Err("null")),
            (now, Some(1.0), 3, Err("quality")),
            (now + minute * 5, Some(32.0), 0, Ok(0.0)),
            (now + minute * 6, Some(32.0), 0, Err("future")),
            (EARLIEST - minute, Some(32.0), 0, Err("past")),
        ] {
            let got = rules.check(&profile, ts, value, quality, now).map_err(|r| r.rule);
            match (got, expected) {
                (Ok(got), Ok(value)) => assert!(f64::abs(got - value) < 1e-9, "{got}"),
                (got, expected) => assert_eq!(got, expected),
            }
        }
        assert!(rules.check(&profile, now, None, 2, now).unwrap().is_nan());
    }

    #[test]
    fn rules_and_back() {
        let mut rules = rules();
        let text = "[t]\nrange = [0, 1]\ninterval = \"10s\"\n[u]\nrate = 0.5\n";
        rules.soft = toml::from_str(text).unwrap();
        assert_eq!(rules.soft["t"].interval, Duration::from_secs(10));
        let again = Rules::from_toml(&rules.to_toml()).unwrap();
        assert_eq!(again, rules);
        assert_eq!(again.hash(), rules.hash());
    }
}
