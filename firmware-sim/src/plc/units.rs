//! What the PLC shows: one unit an asset, its instruments in registers, as a pure function of the instant.
//!
//! As in a grown plant, no two makes agree on where a value stands and how:
//!
//! | unit | table | a value is | value from registers |
//! |---|---|---|---|
//! | 1, 5, … | input | an f32, high word first | as it is |
//! | 2, 6, … | holding | an f32, low word first | as it is |
//! | 3, 7, … | input | an i16 from an analogue card, 0 at 4 mA and 27,648 at 20 mA | × span / 27,648 + value at 4 mA |
//! | 4, 8, … | holding | the same | the same |
//! | the last (press) | holding | an i16 in hundredths | × 0.01 |
//!
//! 27,648 is the full scale of the analogue cards of SIMATIC S7 (Siemens, *S7-300 module data*, representation of
//! analogue values); a card shows what the transmitter's current is, so it saturates as NAMUR NE 43 says.
//!
//! In each unit, registers 0 to 3 of its table hold the instant that all its values are of: a u64, high word first,
//! in ms since 1970-01-01 UTC. Values follow from 4 on, in the order of `data/plant.toml`. The plant is sampled on a
//! grid of 100 ms, so whoever reads instant and value in one request can compute the value again. Nothing can be
//! written.

use std::time::Duration;

use common::time::Timestamp;
use smart_node::pdu::{self, Exception, MAX_BYTES, Registers, Table};

use crate::{
    plant::{Channel, Plant, Signal},
    register_map::{Form, Row},
};

/// How fine the plant is sampled.
const GRID: Duration = Duration::from_millis(100);
/// The first register behind the instant.
const FIRST_VALUE: u16 = 4;
/// What an analogue card shows at 20 mA.
const FULL_SCALE: f64 = 27_648.0;

/// The units and the plant behind them.
pub struct Units {
    plant: Plant,
    /// Rows of one unit stand together and are all in one table.
    values: Vec<(Row, Signal)>,
}

impl Units {
    /// The units of the demo plant, whose loop began at `anchor`.
    ///
    /// # Errors
    /// When the plant's layout cannot be read.
    pub fn demo(anchor: Timestamp) -> anyhow::Result<Self> {
        let plant = Plant::demo(anchor, 0)?;
        let values = layout(&plant);
        Ok(Self { plant, values })
    }

    /// Every value that can be read.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.values.iter().map(|(row, _)| row)
    }

    /// What the instruments report at `at`, in the order of [`Self::rows`]: the registers show it to within their
    /// resolution.
    pub fn values(&self, at: Timestamp) -> impl Iterator<Item = f64> {
        self.values.iter().map(move |(_, signal)| self.shown(*signal, at.floor(GRID)))
    }

    /// The answer of unit `unit` to a request that came at `at`.
    pub fn answer<'r>(
        &self,
        unit: u8,
        request: &[u8],
        at: Timestamp,
        reply: &'r mut [u8; MAX_BYTES],
    ) -> &'r [u8] {
        let Some(&function) = request.first() else { return &[] };
        match self.image(unit, at.floor(GRID)) {
            Some(mut image) => pdu::answer(request, &mut image, reply),
            None => pdu::refuse(function, Exception::GATEWAY_TARGET_FAILED, reply),
        }
    }

    /// All registers of a unit; none where there is no such unit.
    fn image(&self, unit: u8, at: Timestamp) -> Option<Image> {
        let own: Vec<&(Row, Signal)> = self.values.iter().filter(|(row, _)| row.slave == unit).collect();
        let table = own.first()?.0.table;
        let millis = (at.as_micros() / 1_000).cast_unsigned();
        let mut words = [48, 32, 16, 0].map(|shift| (millis >> shift) as u16).to_vec();
        for (row, signal) in own {
            let raw = (self.shown(*signal, at) - row.offset) / row.scale;
            let pair = |bits: u32| [(bits >> 16) as u16, bits as u16];
            match row.form {
                // `as` saturates at both ends of the word.
                Form::I16 => words.push((raw.round() as i16).cast_unsigned()),
                Form::I32 => words.extend(pair((raw.round() as i32).cast_unsigned())),
                Form::F32 => words.extend(pair((raw as f32).to_bits())),
                Form::F32LowFirst => words.extend(pair((raw as f32).to_bits()).into_iter().rev()),
            }
        }
        Some(Image { table, words })
    }

    /// What the instrument reports: a transmitter no more than its current can say.
    fn shown(&self, signal: Signal, at: Timestamp) -> f64 {
        let value = self.plant.value(signal, at);
        let Signal::Channel(index) = signal else { return value };
        let channel = &self.plant.layout().channels[index];
        let part = (self.plant.current(channel, value) - 4e-3) / 16e-3;
        channel.at_4ma + part * (channel.at_20ma - channel.at_4ma)
    }
}

/// The registers of one unit at one instant.
struct Image {
    table: Table,
    words: Vec<u16>,
}

impl Registers for Image {
    fn read(&self, table: Table, first: u16, values: &mut [u16]) -> Result<(), Exception> {
        let first = usize::from(first);
        let shown = self.words.get(first..first + values.len()).filter(|_| table == self.table);
        values.copy_from_slice(shown.ok_or(Exception::ILLEGAL_ADDRESS)?);
        Ok(())
    }

    fn write(&mut self, _first: u16, _values: &[u16]) -> Result<(), Exception> {
        Err(Exception::ILLEGAL_FUNCTION)
    }
}

/// Where each signal of the plant stands.
fn layout(plant: &Plant) -> Vec<(Row, Signal)> {
    let layout = plant.layout();
    let channels = &layout.channels;
    let mut assets: Vec<&str> = Vec::new();
    for channel in channels {
        if !assets.contains(&channel.asset.as_str()) {
            assets.push(&channel.asset);
        }
    }
    let mut values = Vec::new();
    for (asset, slave) in assets.iter().zip(1..) {
        let mut address = FIRST_VALUE;
        for (index, channel) in channels.iter().enumerate().filter(|(_, channel)| channel.asset == *asset) {
            let row = transmitter(channel, slave, address);
            address += row.form.words();
            values.push((row, Signal::Channel(index)));
        }
    }
    let press = &layout.press;
    let (temperature, humidity) = (&press.temperature, &press.humidity);
    let row = |device: &str, device_type: &str, unit: &str, address, range| Row {
        slave: assets.len() as u8 + 1,
        table: Table::Holding,
        address,
        form: Form::I16,
        scale: 0.01,
        offset: 0.0,
        device: device.to_owned(),
        asset: press.asset.clone(),
        device_type: device_type.to_owned(),
        unit: unit.to_owned(),
        range,
        period_s: press.period_s,
    };
    let of_temperature =
        row(&temperature.device, &temperature.device_type, &temperature.unit, FIRST_VALUE, [-40.0, 125.0]);
    let of_humidity =
        row(&humidity.device, &humidity.device_type, &humidity.unit, FIRST_VALUE + 1, [0.0, 100.0]);
    values.extend([(of_temperature, Signal::PressTemperature), (of_humidity, Signal::PressHumidity)]);
    values
}

/// A transmitter as unit `slave` shows it.
fn transmitter(channel: &Channel, slave: u8, address: u16) -> Row {
    let span = channel.at_20ma - channel.at_4ma;
    let (table, form) = match slave % 4 {
        1 => (Table::Input, Form::F32),
        2 => (Table::Holding, Form::F32LowFirst),
        3 => (Table::Input, Form::I16),
        _ => (Table::Holding, Form::I16),
    };
    let (scale, offset) = if form == Form::I16 { (span / FULL_SCALE, channel.at_4ma) } else { (1.0, 0.0) };
    Row {
        slave,
        table,
        address,
        form,
        scale,
        offset,
        device: channel.device.clone(),
        asset: channel.asset.clone(),
        device_type: channel.device_type.clone(),
        unit: channel.unit.clone(),
        // A healthy transmitter shows 3.8 to 20.5 mA.
        range: [channel.at_4ma - 0.04 * span, channel.at_20ma + 0.04 * span],
        period_s: channel.period_s,
    }
}

#[cfg(test)]
mod tests;
