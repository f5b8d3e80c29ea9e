//! The configuration as it is typed: structs that mirror `default.toml`, where the keys are documented.
#![expect(missing_docs, reason = "default.toml documents the keys of the same names")]

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use common::{
    config::SecretRef,
    reading::{Asset, Device},
    time::duration,
};
use serde::{Deserialize, de::DeserializeOwned};

use super::UplinkMode;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    pub site: String,
    pub gateway: String,
    pub data_dir: PathBuf,
    pub asset: Vec<AssetEntry>,
    pub device: Vec<DeviceEntry>,
    pub filter: Vec<FilterTable>,
    pub i2c: Vec<I2cBus>,
    pub spi: Vec<SpiDevice>,
    pub modbus: Vec<ModbusBus>,
    pub mqtt_source: Vec<MqttSource>,
    pub replay: Vec<Replay>,
    pub mqtt: Mqtt,
    pub uplink: Uplink,
    pub outbox: Outbox,
    pub window: Window,
    pub models: Models,
    pub metrics: Metrics,
    pub source: Source,
    pub clock: Clock,
}

/// An asset.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "toml::Table")]
pub struct AssetEntry(pub Asset);

/// A device and, in the same table, what the filter does with it.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "toml::Table")]
pub struct DeviceEntry {
    pub device: Device,
    pub filter: DeviceFilter,
}

/// The filter of all devices whose id matches.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "toml::Table")]
pub struct FilterTable {
    pub devices: String,
    pub filter: DeviceFilter,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceFilter {
    pub stuck_after: Option<Span>,
    pub rate_limit: Option<f64>,
    pub spike_limit: Option<f64>,
    pub deadband: Option<f64>,
    pub heartbeat: Option<Span>,
    pub window: Option<Span>,
}

/// What travels to the cloud as well, and is not strict about keys there.
fn strictly<T: DeserializeOwned>(table: toml::Table) -> Result<T, toml::de::Error> {
    let mut unknown = Vec::new();
    let value = serde_ignored::deserialize(table, |key| unknown.push(format!("`{key}`")))?;
    if unknown.is_empty() {
        return Ok(value);
    }
    Err(serde::de::Error::custom(format!("unknown field {}", unknown.join(", "))))
}

impl TryFrom<toml::Table> for AssetEntry {
    type Error = toml::de::Error;

    fn try_from(table: toml::Table) -> Result<Self, Self::Error> {
        strictly(table).map(Self)
    }
}

impl TryFrom<toml::Table> for DeviceEntry {
    type Error = toml::de::Error;

    /// The filter's keys are taken out; what remains is a [`Device`].
    fn try_from(mut table: toml::Table) -> Result<Self, Self::Error> {
        let mut filter = toml::Table::new();
        for key in ["stuck_after", "rate_limit", "spike_limit", "deadband", "heartbeat", "window"] {
            filter.extend(table.remove_entry(key));
        }
        Ok(Self { device: strictly(table)?, filter: filter.try_into()? })
    }
}

impl TryFrom<toml::Table> for FilterTable {
    type Error = toml::de::Error;

    fn try_from(mut table: toml::Table) -> Result<Self, Self::Error> {
        let missing = || <toml::de::Error as serde::de::Error>::missing_field("devices");
        let devices = table.remove("devices").ok_or_else(missing)?.try_into()?;
        Ok(Self { devices, filter: table.try_into()? })
    }
}

impl FilterTable {
    /// Whether a device is meant: `*` stands for any text.
    pub fn matches(&self, id: &str) -> bool {
        let mut parts = self.devices.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = id.strip_prefix(first) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        for part in parts {
            let Some(at) = rest.find(part) else { return false };
            rest = &rest[at + part.len()..];
        }
        rest.ends_with(last)
    }
}

impl DeviceFilter {
    /// What it leaves out is as in `other`.
    pub fn or(&self, other: &Self) -> Self {
        Self {
            stuck_after: self.stuck_after.or(other.stuck_after),
            rate_limit: self.rate_limit.or(other.rate_limit),
            spike_limit: self.spike_limit.or(other.spike_limit),
            deadband: self.deadband.or(other.deadband),
            heartbeat: self.heartbeat.or(other.heartbeat),
            window: self.window.or(other.window),
        }
    }
}

/// A duration where there may be none.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(transparent)]
pub struct Span(#[serde(with = "duration")] pub Duration);

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct I2cBus {
    pub path: String,
    #[serde(default)]
    pub ads1115: Vec<Ads1115>,
    #[serde(default)]
    pub sht4x: Vec<Sht4x>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ads1115 {
    pub address: u8,
    #[serde(with = "duration")]
    pub period: Duration,
    pub burden_ohm: f64,
    #[serde(default, rename = "loop")]
    pub loops: Vec<Loop>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Loop {
    pub channel: u8,
    pub device: String,
    pub low: f64,
    pub high: f64,
    pub period: Option<Span>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sht4x {
    pub address: u8,
    #[serde(with = "duration")]
    pub period: Duration,
    pub temperature: Option<String>,
    pub humidity: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpiDevice {
    pub path: String,
    pub ism330dhcx: Ism330dhcx,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ism330dhcx {
    #[serde(with = "duration")]
    pub period: Duration,
    pub samples: usize,
    pub rate_hz: u32,
    pub range_g: u32,
    pub axis: String,
    pub rms: Option<String>,
    pub peak: Option<String>,
    pub crest_factor: Option<String>,
    pub kurtosis: Option<String>,
    pub velocity: Option<String>,
    pub zone: Option<String>,
    #[serde(default)]
    pub band: Vec<Band>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Band {
    pub low_hz: f64,
    pub high_hz: f64,
    pub device: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModbusBus {
    pub url: String,
    pub baud: Option<u32>,
    pub parity: Option<String>,
    pub stop_bits: Option<u8>,
    pub timeout: Option<Span>,
    #[serde(default)]
    pub slave: Vec<ModbusSlave>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModbusSlave {
    pub unit: u8,
    pub period: Option<Span>,
    pub profile: Option<String>,
    #[serde(default)]
    pub devices: BTreeMap<String, String>,
    pub max_registers: Option<u16>,
    pub max_gap: Option<u16>,
    #[serde(default)]
    pub register: Vec<ModbusRegister>,
}

/// A device type's registers, in a file of its own.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModbusProfile {
    pub max_registers: Option<u16>,
    pub max_gap: Option<u16>,
    pub register: Vec<ModbusRegister>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModbusRegister {
    /// In a profile `name`, in a slave `device`.
    #[serde(alias = "device")]
    pub name: String,
    pub table: String,
    pub address: u16,
    #[serde(rename = "type")]
    pub form: Option<String>,
    pub bit: Option<u8>,
    pub word_order: Option<String>,
    pub byte_order: Option<String>,
    #[serde(default = "one")]
    pub scale: f64,
    #[serde(default)]
    pub offset: f64,
    pub unit: Option<String>,
    #[serde(default)]
    pub no_value: Vec<i64>,
    pub period: Option<Span>,
}

const fn one() -> f64 {
    1.0
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MqttSource {
    pub url: String,
    #[serde(default)]
    pub username: String,
    #[serde(default)]
    pub password: SecretRef,
    #[serde(default)]
    pub ca: PathBuf,
    #[serde(default)]
    pub topic: Vec<JsonTopic>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JsonTopic {
    pub filter: String,
    pub value: String,
    pub device: Option<String>,
    pub name: Option<String>,
    pub level: Option<usize>,
    #[serde(default)]
    pub devices: BTreeMap<String, String>,
    pub time: Option<String>,
    pub quality: Option<String>,
    #[serde(default)]
    pub words: BTreeMap<String, f64>,
    pub unit: Option<String>,
    pub scale: Option<f64>,
    pub offset: Option<f64>,
    pub max_age: Option<Span>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replay {
    pub file: PathBuf,
    #[serde(default = "comma")]
    pub separator: char,
    #[serde(default)]
    pub time: String,
    #[serde(default)]
    pub columns: BTreeMap<String, String>,
}

const fn comma() -> char {
    ','
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mqtt {
    pub url: String,
    pub root: String,
    pub username: String,
    pub password: SecretRef,
    pub ca: PathBuf,
    #[serde(with = "duration")]
    pub keep_alive: Duration,
    #[serde(with = "duration")]
    pub backoff: Duration,
    #[serde(with = "duration")]
    pub max_backoff: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Uplink {
    pub mode: UplinkMode,
    pub inflight: u16,
    pub unacked: usize,
    #[serde(with = "duration")]
    pub resend_after: Duration,
    #[serde(with = "duration")]
    pub max_resend_after: Duration,
    pub backlog_share: f64,
    pub max_bytes_per_s: u64,
    #[serde(with = "duration")]
    pub status_every: Duration,
    #[serde(with = "duration")]
    pub drain: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outbox {
    #[serde(with = "duration")]
    pub linger: Duration,
    #[serde(with = "duration")]
    pub max_linger: Duration,
    pub linger_rows: usize,
    pub max_rows: usize,
    pub max_message_bytes: usize,
    pub max_bytes: u64,
    #[serde(with = "duration")]
    pub max_age: Duration,
    pub min_free_disk: u64,
    pub generation_bytes: u64,
    #[serde(with = "duration")]
    pub census_every: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    #[serde(with = "duration")]
    pub width: Duration,
    #[serde(with = "duration")]
    pub lateness: Duration,
    #[serde(with = "duration")]
    pub revise_for: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Models {
    pub dir: PathBuf,
    #[serde(with = "duration")]
    pub poll: Duration,
    #[serde(with = "duration")]
    pub budget: Duration,
    #[serde(with = "duration")]
    pub calibrate_over: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    pub listen: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    #[serde(with = "duration")]
    pub timeout: Duration,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clock {
    pub trust: bool,
    #[serde(with = "duration")]
    pub wait: Duration,
}
