//! What a gateway is configured to do: `default.toml` is the manual.
//!
//! Parsed twice. [`file`] mirrors the TOML; [`Settings`] is what the stages use: devices are indices, chips are
//! drivers, every value has been checked. All mistakes of a file are reported together.

mod check;
pub mod file;
pub(crate) mod modbus;
mod mqtt_source;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use common::{
    config::{self, Layers, Mistakes, SecretRef},
    reading::{DeviceIx, Registry},
};
use sha2::{Digest, Sha256};

use crate::{
    source::{
        chip::{Ads1115, Sht4x, ads1115, ism330dhcx},
        modbus as modbus_source,
    },
    vibration::Feature,
};

/// `default.toml`, compiled in.
pub const DEFAULTS: &str = include_str!("../default.toml");

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The plant.
    pub site: String,
    /// This agent.
    pub gateway: String,
    /// Where the outbox lives.
    pub data_dir: PathBuf,
    /// SHA-256 of the effective configuration in hex; it holds references to secrets only.
    pub sha256: String,
    /// Assets and devices.
    pub registry: Arc<Registry>,
    /// What the filter does with each device, by [`DeviceIx`].
    pub checks: Vec<Checks>,
    /// What is read.
    pub sources: Vec<Source>,
    /// What to make of the machine's clock.
    pub clock: ClockSettings,
    /// A bus whose transfers take longer is given up and opened again.
    pub source_timeout: Duration,
    /// The broker that the readings go to.
    pub mqtt: MqttSettings,
    /// Root of all topics there.
    pub root: String,
    /// Delivery.
    pub uplink: UplinkSettings,
    /// The disk buffer, and when batches are sealed for it.
    pub outbox: OutboxSettings,
    /// Tumbling windows.
    pub window: WindowSettings,
    /// Their width by device index.
    pub widths: Vec<Duration>,
    /// Models.
    pub models: ModelSettings,
    /// Where `/metrics`, `/healthz` and the gateway's page answer.
    pub listen: Option<SocketAddr>,
}

impl Settings {
    /// Whether these sources can be run together; a recorded file's table alone says how others are read.
    ///
    /// # Errors
    /// What cannot, why, and what to do.
    pub fn check_run(&self) -> anyhow::Result<()> {
        let recorded = self.sources.iter().any(|source| matches!(source, Source::Replay { .. }));
        anyhow::ensure!(
            !recorded || self.sources.len() == 1,
            "[[replay]]: a recorded file beside other sources; an agent that begins again goes on after the last time that it \
             has sealed, and would leave out what the file still holds. Give each file an agent of its own, with a gateway \
             and a data_dir of its own"
        );
        Ok(())
    }

    /// Reads the defaults, the file and the environment.
    ///
    /// # Errors
    /// Everything that is wrong, each with its fix.
    pub fn load(path: Option<&Path>) -> Result<Self, Mistakes> {
        Self::read(&Layers { defaults: DEFAULTS, file: path, env_prefix: "TAILRACE_EDGE" }, std::env::vars())
    }

    fn read(layers: &Layers<'_>, env: impl IntoIterator<Item = (String, String)>) -> Result<Self, Mistakes> {
        let table: toml::Table = config::load_with_env(layers, env)?;
        let folder = layers.file.and_then(Path::parent).unwrap_or(Path::new(""));
        let origin = layers.file.map_or_else(|| "the environment".to_owned(), |p| p.display().to_string());
        let sha256 = format!("{:x}", Sha256::digest(table.to_string()));
        match table.try_into::<file::File>() {
            Ok(file) => check::check(file, sha256, origin, folder),
            Err(e) => {
                let mut mistakes = Mistakes::of(origin);
                mistakes.add("value", e.to_string().trim_end().replace('\n', " "), "see default.toml");
                Err(mistakes)
            }
        }
    }
}

/// What the filter does with the readings of a device. All off by default, except for the device's range.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Checks {
    /// Inclusive limits in the device's unit; a reading outside is bad.
    pub range: Option<[f64; 2]>,
    /// Unchanged for this long is uncertain.
    pub stuck_after: Option<Duration>,
    /// Unit per second; a faster change is uncertain.
    pub rate_limit: Option<f64>,
    /// Robust standard deviations; a reading further from those before it is uncertain.
    pub spike_limit: Option<f64>,
    /// Report by exception on the readings lane.
    pub deadband: Option<Deadband>,
}

/// Report by exception.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Deadband {
    /// Changes up to this much are held, in the device's unit.
    pub width: f64,
    /// One reading at least this often.
    pub heartbeat: Duration,
}

/// Something that is read by one task.
#[derive(Clone, Debug)]
pub enum Source {
    /// An I2C bus with its chips.
    I2c {
        /// Such as `/dev/i2c-1`.
        path: String,
        /// What is read on it, in this order.
        probes: Vec<I2cProbe>,
    },
    /// An accelerometer on SPI.
    Spi {
        /// Such as `/dev/spidev0.0`.
        path: String,
        /// How often a burst is taken.
        period: Duration,
        /// What a burst is.
        burst: ism330dhcx::Settings,
        /// What is made of it.
        outputs: Vec<BurstOutput>,
    },
    /// A Modbus connection or line with its slaves.
    Modbus(modbus_source::Settings),
    /// A broker in the plant, where other people's devices publish JSON.
    Mqtt {
        /// Its address as it was typed.
        url: String,
        /// How it is reached.
        broker: MqttSettings,
        /// The agent's name there, which its session goes by.
        client_id: String,
        /// What is read there.
        topics: Vec<JsonTopic>,
    },
    /// A recorded file.
    Replay {
        /// The file.
        file: PathBuf,
        /// What its columns mean.
        form: ReplayForm,
    },
}

/// How the readings of one quantity are found in the messages of a topic filter. Pointers are JSON pointers
/// (RFC 6901) into the message or, where it is an array, into each of its elements.
#[derive(Clone, Debug, PartialEq)]
pub struct JsonTopic {
    /// MQTT topic filter.
    pub filter: String,
    /// Pointer to the value.
    pub value: String,
    /// Whose value it is.
    pub whose: Whose,
    /// Pointer to the event time; without it, the time of arrival is taken.
    pub time: Option<String>,
    /// Pointer to the quality; without it, all are good.
    pub quality: Option<String>,
    /// Numbers of the texts that stand for one, such as `RUNNING`.
    pub words: BTreeMap<String, f64>,
    /// A reading that is older is rejected.
    pub max_age: Duration,
}

/// Whose value is read.
#[derive(Clone, Debug, PartialEq)]
pub enum Whose {
    /// Always this device's.
    One(Target),
    /// The device's whose name stands at `at`.
    Named {
        /// Where the name stands.
        at: NameAt,
        /// The names that are known.
        names: BTreeMap<String, Target>,
    },
}

/// Where a message names its device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NameAt {
    /// At this JSON pointer.
    Pointer(String),
    /// In this level of the topic, from 0.
    Level(usize),
}

/// A device, and the affine map from what is sent into its unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// The device.
    pub device: DeviceIx,
    /// `value in its unit = what is sent * scale + shift`.
    pub scale: f64,
    /// See `scale`.
    pub shift: f64,
}

impl JsonTopic {
    /// The devices that it feeds.
    pub fn devices(&self) -> impl Iterator<Item = DeviceIx> {
        let (one, named) = match &self.whose {
            Whose::One(target) => (Some(target), None),
            Whose::Named { names, .. } => (None, Some(names.values())),
        };
        one.into_iter().chain(named.into_iter().flatten()).map(|target| target.device)
    }
}

/// What the columns of a recorded file mean.
#[derive(Clone, Debug, PartialEq)]
pub enum ReplayForm {
    /// A row is a reading: `ts,device_id,value[,quality]`.
    Long,
    /// A row is an instant, with a column for each device.
    Wide {
        /// Between two cells.
        separator: char,
        /// Header of the column with the instant.
        time: String,
        /// Headers of the columns that are read, and whose values they are.
        columns: Vec<(String, DeviceIx)>,
    },
}

impl Source {
    /// The path of the bus or file, or the address of the bus or broker.
    pub fn name(&self) -> String {
        match self {
            Self::I2c { path, .. } | Self::Spi { path, .. } => path.clone(),
            Self::Modbus(bus) => bus.address.to_string(),
            Self::Mqtt { url, .. } => url.clone(),
            Self::Replay { file, .. } => file.display().to_string(),
        }
    }
}

/// One thing that is read on an I2C bus, by its own period.
#[derive(Clone, Debug)]
pub struct I2cProbe {
    /// How often.
    pub period: Duration,
    /// What.
    pub chip: I2cChip,
}

/// A device that shows a feature of a burst.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BurstOutput {
    /// What it shows.
    pub feature: Feature,
    /// The device.
    pub device: DeviceIx,
    /// From the feature's unit into the device's.
    pub scale: f64,
}

/// A chip, or one input of it.
#[derive(Clone, Debug)]
pub enum I2cChip {
    /// A 4–20 mA loop.
    Loop {
        /// The converter.
        adc: Ads1115,
        /// Its input.
        channel: ads1115::Channel,
        /// Burden in Ω.
        burden_ohm: f64,
        /// The device.
        device: DeviceIx,
        /// The device's unit at 4 mA.
        low: f64,
        /// The device's unit at 20 mA.
        high: f64,
    },
    /// Air temperature and humidity, each as (device, scale, shift) from °C and % into the device's unit.
    Climate {
        /// The chip.
        chip: Sht4x,
        /// Device of the temperature.
        temperature: Option<(DeviceIx, f64, f64)>,
        /// Device of the humidity.
        humidity: Option<(DeviceIx, f64, f64)>,
    },
}

/// A broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MqttSettings {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Whether to speak TLS (`mqtts://`).
    pub tls: bool,
    /// Empty for none.
    pub username: String,
    /// Reference to the password.
    pub password: SecretRef,
    /// PEM file of the authorities.
    pub ca: Option<PathBuf>,
    /// A dead connection is noticed after one and a half of these.
    pub keep_alive: Duration,
    /// First pause before connecting again.
    pub backoff: Duration,
    /// Longest pause before connecting again.
    pub max_backoff: Duration,
}

/// When a message may be forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UplinkMode {
    /// On the cloud's acknowledgement.
    Cloud,
    /// On the broker's.
    Broker,
}

/// Delivery; the units and reasons stand in `default.toml`.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "default.toml documents the keys of the same names")]
pub struct UplinkSettings {
    pub mode: UplinkMode,
    pub inflight: u16,
    pub unacked: usize,
    pub resend_after: Duration,
    pub max_resend_after: Duration,
    pub backlog_share: f64,
    pub max_bytes_per_s: Option<u64>,
    pub status_every: Duration,
    pub drain: Duration,
}

/// The disk buffer, and when batches are sealed for it; the units and reasons stand in `default.toml`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "default.toml documents the keys of the same names")]
pub struct OutboxSettings {
    pub dir: PathBuf,
    pub linger: Duration,
    pub max_linger: Duration,
    pub linger_rows: usize,
    pub max_rows: usize,
    pub max_message_bytes: usize,
    pub max_bytes: u64,
    pub max_age: Duration,
    pub min_free_disk: u64,
    pub generation_bytes: u64,
    pub census_every: Duration,
}

/// What to make of the machine's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockSettings {
    /// It is right whatever the kernel says.
    pub trust: bool,
    /// For how long after the machine's start messages wait for it to be set.
    pub wait: Duration,
}

/// Models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSettings {
    /// Folder with one bundle a sub-folder.
    pub dir: Option<PathBuf>,
    /// How often it is looked at for changes; none for never.
    pub poll: Option<Duration>,
    /// Most time that a model may take for a window.
    pub budget: Duration,
    /// On how much of what it reads the agent calibrates a model itself; none for not at all.
    pub calibrate_over: Option<Duration>,
}

/// Tumbling windows in event time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSettings {
    /// Width where the device says none; windows are aligned to the Unix epoch.
    pub width: Duration,
    /// A window closes when the gateway's time has passed its end by this.
    pub lateness: Duration,
    /// How long a closed window is kept for late readings.
    pub revise_for: Duration,
}

#[cfg(test)]
pub(crate) mod tests;
