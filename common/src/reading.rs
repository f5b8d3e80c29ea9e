//! Readings and what they are readings of: the registry of assets and devices.

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

use crate::time::{Timestamp, duration};

/// A device's index in its gateway's [`Registry`]: readings carry this instead of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceIx(pub u32);

impl DeviceIx {
    /// As an index into `Registry::devices` and into every per-device table.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// One measured value. 24 bytes, no heap.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// Event time.
    pub ts: Timestamp,
    /// Of which device.
    pub device: DeviceIx,
    /// How far `value` can be trusted.
    pub quality: Quality,
    /// In the device's own unit; NaN only when the quality is [`Quality::Bad`] (null on the wire).
    pub value: f64,
}

/// How far a value can be trusted: the severities of OPC UA status codes (Part 4, 7.39).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Quality {
    /// To be used as it is.
    #[default]
    Good = 0,
    /// Usable with care.
    Uncertain = 1,
    /// Not a measurement.
    Bad = 2,
}

impl Quality {
    /// The wire's number, as OPC UA orders the severities.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// From the wire's number; `None` above 2.
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Good),
            1 => Some(Self::Uncertain),
            2 => Some(Self::Bad),
            _ => None,
        }
    }

    /// The word that silver stores.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Uncertain => "uncertain",
            Self::Bad => "bad",
        }
    }
}

/// How a device's values are to be understood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A quantity that goes up and down.
    #[default]
    Gauge,
    /// A running total; falls only by a reset or a roll-over.
    Counter,
    /// A boolean as 0 or 1, or an enumeration by its code.
    State,
}

impl Kind {
    /// The word on the wire and in silver.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gauge => "gauge",
            Self::Counter => "counter",
            Self::State => "state",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "gauge" => Ok(Self::Gauge),
            "counter" => Ok(Self::Counter),
            "state" => Ok(Self::State),
            _ => Err(format!("kind {text:?} is none of gauge, counter, state")),
        }
    }
}

/// A machine that is maintained. Unknown keys are passed over, here and in [`Device`]: a gateway may be newer than
/// its cloud.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Asset {
    /// Unique within the site, such as `pump-01`.
    pub id: String,
    /// Where it stands: area/line/unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// What kind of machine it is, such as `centrifugal-pump`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// How much depends on it: `low`, `medium` or `high`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criticality: Option<String>,
    /// Rated power in kW.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rated_power_kw: Option<f64>,
    /// Rated speed in revolutions per minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rated_speed_rpm: Option<f64>,
    /// `rigid` or `flexible` (ISO 20816-1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub support: Option<String>,
    /// Group by ISO 20816-3: 1 large (above 300 kW), 2 medium (15 to 300 kW).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_group: Option<u8>,
    /// IANA time zone of the place where it stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// Maintenance is due at the latest this many days after the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_every_days: Option<f64>,
    /// Maintenance is due after this many hours of running since the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_every_running_hours: Option<f64>,
    /// Says when the machine runs; without it, running hours are not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running_when: Option<RunningWhen>,
}

/// An asset runs while `device` reads above `above`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunningWhen {
    /// Id of one of the asset's devices.
    pub device: String,
    /// In that device's canonical unit.
    pub above: f64,
}

/// One measured quantity at one place on an asset.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// Unique within the site, such as `pump-01/bearing-temp`.
    pub id: String,
    /// A name of [`crate::units::DEVICE_TYPES`], or one of the plant's own.
    #[serde(rename = "type")]
    pub device_type: String,
    /// The asset it belongs to.
    pub asset: String,
    /// UCUM code of the unit in which it reports.
    pub unit: String,
    /// How its values are to be understood.
    #[serde(default)]
    pub kind: Kind,
    /// Inclusive limits `[low, high]` in `unit`, outside of which a reading is marked bad.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<[f64; 2]>,
    /// How often a reading is expected.
    #[serde(default, with = "optional_duration", skip_serializing_if = "Option::is_none")]
    pub interval: Option<Duration>,
    /// Words for the codes of a state, and whatever else the plant wants to say.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// Everything a gateway reads. A device's place in `devices` is its [`DeviceIx`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Registry {
    /// The machines.
    #[serde(default)]
    pub assets: Vec<Asset>,
    /// The measured quantities.
    #[serde(default)]
    pub devices: Vec<Device>,
}

impl Registry {
    /// The index of the device with this id.
    pub fn find(&self, id: &str) -> Option<DeviceIx> {
        let at = self.devices.iter().position(|d| d.id == id)?;
        Some(DeviceIx(u32::try_from(at).ok()?))
    }

    /// The device at an index that this registry handed out.
    pub fn device(&self, ix: DeviceIx) -> &Device {
        &self.devices[ix.index()]
    }
}

/// `"5s"` for `#[serde(with = …)]` on an optional duration.
mod optional_duration {
    use super::{Duration, duration};
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(value: &Option<Duration>, s: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(d) => duration::serialize(d, s),
            None => s.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Duration>, D::Error> {
        let text = Option::<String>::deserialize(d)?;
        text.map(|t| duration::parse(&t).map_err(de::Error::custom)).transpose()
    }
}
