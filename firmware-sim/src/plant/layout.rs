//! `data/plant.toml` as types: the instruments of the demo plant, where they hang and what they replay.
//!
//! Parsed strictly: an unknown or missing key is an error. The file itself documents each key.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use serde::Deserialize;

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// Version of the file's form.
    pub schema: u32,
    /// Seed of the sensor noise.
    pub seed: u64,
    /// The cycles that are replayed, one after the other.
    #[serde(rename = "loop")]
    pub cycles: Cycles,
    /// What all loop inputs have in common.
    pub adc: Adc,
    /// The 4–20 mA transmitters.
    #[serde(rename = "channel")]
    pub channels: Vec<Channel>,
    /// The temperature and humidity sensor.
    pub press: Press,
    /// The accelerometer.
    pub vibration: Vibration,
}

/// The replayed loop.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cycles {
    /// Seconds between two recorded rows.
    pub row_s: u32,
    /// Position of the loop at the plant's origin, in s.
    #[serde(default)]
    pub start_s: u32,
    /// How long one cycle fades into the next, in s.
    pub crossfade_s: u32,
    /// The cycles in their order.
    #[serde(rename = "segment")]
    pub segments: Vec<Segment>,
}

/// One cycle: normal operation, then a fault.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// Name of the fault.
    pub fault: String,
    /// The recorded run, relative to the file.
    pub file: String,
    /// First row that is replayed.
    pub first_row: u32,
    /// Last row before the fault acts.
    pub onset_row: u32,
    /// Row at which the next cycle begins.
    pub end_row: u32,
}

/// The converters that read the loops.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adc {
    /// Burden resistor of each loop in Ω.
    pub shunt_ohm: f64,
    /// Full scale of the range they are read at, in V.
    pub full_scale_v: f64,
    /// The least current of a healthy transmitter in mA.
    pub saturate_low_ma: f64,
    /// The largest current of a healthy transmitter in mA.
    pub saturate_high_ma: f64,
}

/// One transmitter.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Channel {
    /// Device id.
    pub device: String,
    /// Asset that it belongs to.
    pub asset: String,
    /// Device type.
    #[serde(rename = "type")]
    pub device_type: String,
    /// UCUM unit of value, span and sigma.
    pub unit: String,
    /// What it measures.
    pub description: String,
    /// Recorded column.
    pub column: String,
    /// Value = column × scale.
    pub scale: f64,
    /// For an analyser: how many rows it shows one analysis for.
    pub hold_rows: Option<u32>,
    /// I2C bus of its converter.
    pub bus: String,
    /// Address of its converter.
    pub address: u8,
    /// Input of its converter, 0 to 3.
    pub input: u8,
    /// Value at 4 mA.
    pub at_4ma: f64,
    /// Value at 20 mA.
    pub at_20ma: f64,
    /// Standard deviation of its noise.
    pub sigma: f64,
    /// How often it is polled, in s.
    pub period_s: u32,
}

/// The SHT4x.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Press {
    /// Asset that it belongs to.
    pub asset: String,
    /// I2C bus.
    pub bus: String,
    /// Address on it.
    pub address: u8,
    /// How often it is polled, in s.
    pub period_s: u32,
    /// Its temperature.
    pub temperature: Temperature,
    /// Its humidity.
    pub humidity: Humidity,
}

/// A recorded temperature.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Temperature {
    /// Device id.
    pub device: String,
    /// Device type.
    #[serde(rename = "type")]
    pub device_type: String,
    /// UCUM unit.
    pub unit: String,
    /// What it measures.
    pub description: String,
    /// The record, in °F, relative to the file.
    pub file: String,
    /// Row at the plant's origin.
    pub first_row: u32,
    /// Seconds between two recorded rows.
    pub row_s: u32,
    /// Standard deviation of its noise in °C.
    pub sigma: f64,
}

/// A synthetic humidity that swings once in a loop.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Humidity {
    /// Device id.
    pub device: String,
    /// Device type.
    #[serde(rename = "type")]
    pub device_type: String,
    /// UCUM unit.
    pub unit: String,
    /// What it measures.
    pub description: String,
    /// Mean over the loop.
    pub mean: f64,
    /// Amplitude over the loop.
    pub swing: f64,
    /// Standard deviation of its noise.
    pub sigma: f64,
}

/// The ISM330DHCX and the synthetic machine under it; [`crate::waveform`] has the formula.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vibration {
    /// Asset that it belongs to.
    pub asset: String,
    /// What it measures.
    pub description: String,
    /// SPI device.
    pub bus: String,
    /// How often a burst is taken, in s.
    pub period_s: u32,
    /// Shaft speed in Hz.
    pub shaft_hz: f64,
    /// Amplitudes at multiples of the shaft speed in m/s².
    pub harmonics: Vec<f64>,
    /// Rolling elements of the bearing.
    pub balls: u32,
    /// Their diameter in mm.
    pub ball_mm: f64,
    /// Pitch diameter in mm.
    pub pitch_mm: f64,
    /// Amplitude of an impact at the start of the loop, in m/s².
    pub impact_start: f64,
    /// Amplitude of an impact at the end of the loop, in m/s².
    pub impact_end: f64,
    /// What an impact makes ring, in Hz.
    pub resonance_hz: f64,
    /// Time constant of the ringing in s.
    pub decay_s: f64,
    /// Standard deviation of the sensor's noise in m/s².
    pub sigma: f64,
    /// What is made of its bursts.
    #[serde(rename = "output")]
    pub outputs: Vec<Output>,
}

/// A device that shows a feature of a burst.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// Key of the agent's `[spi.ism330dhcx]`.
    pub feature: String,
    /// Device id.
    pub device: String,
    /// Device type.
    #[serde(rename = "type")]
    pub device_type: String,
    /// UCUM unit.
    pub unit: String,
    /// Inclusive limits in it.
    pub range: [f64; 2],
    /// Words for the codes of a state; empty for what is none.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl Layout {
    /// The demo plant's.
    ///
    /// # Errors
    /// Never, as long as the embedded file is the tested one.
    pub fn demo() -> anyhow::Result<Self> {
        Self::parse(super::record::PLANT)
    }

    /// Reads the text of `plant.toml`.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let layout: Self = toml::from_str(text).context("reading data/plant.toml")?;
        ensure!(layout.schema == 1, "data/plant.toml: schema = {} is not 1", layout.schema);
        ensure!(!layout.cycles.segments.is_empty(), "data/plant.toml: no [[loop.segment]]");
        ensure!(layout.cycles.row_s > 0, "data/plant.toml: loop.row_s = 0; give the seconds of a row");
        ensure!(layout.press.temperature.row_s > 0, "data/plant.toml: press.temperature.row_s = 0");
        for Segment { fault, first_row, onset_row, end_row, .. } in &layout.cycles.segments {
            ensure!(
                first_row < onset_row && onset_row < end_row,
                "data/plant.toml: segment {fault}: rows {first_row}, {onset_row}, {end_row} are not in order"
            );
        }
        for Channel { device, input, hold_rows, .. } in &layout.channels {
            ensure!(*input < 4, "data/plant.toml: {device}: input = {input} is not 0 to 3");
            ensure!(*hold_rows != Some(0), "data/plant.toml: {device}: hold_rows = 0; leave it out");
        }
        Ok(layout)
    }
}
