//! Simulated buses with chips on them, opened by the same paths as the ones of a real gateway.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::Context;
use common::time::Timestamp;
use edge_agent::source::Hardware;
use embedded_hal::{
    delay::DelayNs,
    i2c::{self, I2c, NoAcknowledgeSource},
    spi::{self, SpiDevice},
};

use crate::{
    chip::{Ads1115, I2cChip, Input, Ism330dhcx, Sht4x, SimDelay, SimTime, SpiChip},
    faults::Faults,
    plant::{Channel, Plant, Signal},
};

/// The hardware of one gateway. Buses may be opened again and again; the chips on them stay as they are.
pub struct SimHardware {
    time: SimTime,
    faults: Faults,
    i2c: BTreeMap<String, Arc<Mutex<Chips>>>,
    spi: BTreeMap<String, Arc<Mutex<Box<dyn SpiChip>>>>,
}

/// The chips on one I2C bus by address, each with the name that its faults go by.
type Chips = BTreeMap<u8, (String, Box<dyn I2cChip>)>;

impl SimHardware {
    /// A gateway without chips. Faults of the bus (NACK) are those of `faults`.
    pub fn new(time: SimTime, faults: Faults) -> Self {
        Self { time, faults, i2c: BTreeMap::new(), spi: BTreeMap::new() }
    }

    /// The gateway of the demo plant: every chip of its layout, showing what the plant shows.
    pub fn of_plant(plant: &Arc<Plant>, faults: Faults, time: SimTime) -> Self {
        let mut hardware = Self::new(time.clone(), faults);
        let layout = plant.layout();
        let mut converters: BTreeMap<(&str, u8), [Input<f64>; 4]> = BTreeMap::new();
        for (index, channel) in layout.channels.iter().enumerate() {
            let inputs = converters
                .entry((&channel.bus, channel.address))
                .or_insert_with(|| std::array::from_fn(|_| Box::new(|_| 0.0) as Input<f64>));
            inputs[usize::from(channel.input)] = burden_volts(plant, faults, index, channel.clone());
        }
        for ((bus, address), inputs) in converters {
            hardware.attach(bus, address, Ads1115::new(time.clone(), inputs));
        }
        let press = &layout.press;
        let serial = 0x5a17_0000 | u32::from(press.address);
        hardware.attach(&press.bus, press.address, Sht4x::new(time.clone(), serial, climate(plant, faults)));
        let machine = Arc::clone(plant);
        let vibration = Ism330dhcx::new(time, Box::new(move |t| machine.vibration(t)));
        hardware.attach_spi(&layout.vibration.bus, vibration);
        hardware
    }

    /// Solders `chip` to the bus named `bus` (`i2c-1` is opened as `/dev/i2c-1`).
    pub fn attach(&mut self, bus: &str, address: u8, chip: impl I2cChip + 'static) {
        let name = format!("{bus}@{address:#04x}");
        let chips = self.i2c.entry(device_path(bus)).or_default();
        lock(chips).insert(address, (name, Box::new(chip)));
    }

    /// Solders `chip` to the chip select named `device` (`spidev0.0` is opened as `/dev/spidev0.0`).
    pub fn attach_spi(&mut self, device: &str, chip: impl SpiChip + 'static) {
        self.spi.insert(device_path(device), Arc::new(Mutex::new(Box::new(chip))));
    }
}

impl Hardware for SimHardware {
    type I2c = SimI2c;
    type Spi = SimSpi;
    type Delay = SimDelay;

    fn i2c(&self, path: &str) -> anyhow::Result<SimI2c> {
        let chips = find(&self.i2c, path, "i2c bus")?;
        Ok(SimI2c { chips, time: self.time.clone(), faults: self.faults })
    }

    fn spi(&self, path: &str) -> anyhow::Result<SimSpi> {
        let chip = find(&self.spi, path, "spi device")?;
        Ok(SimSpi { chip, time: self.time.clone() })
    }

    fn delay(&self) -> SimDelay {
        self.time.delay()
    }
}

/// An I2C bus. Whoever has no chip answers NACK.
pub struct SimI2c {
    chips: Arc<Mutex<Chips>>,
    time: SimTime,
    faults: Faults,
}

impl i2c::ErrorType for SimI2c {
    type Error = i2c::ErrorKind;
}

impl I2c for SimI2c {
    fn transaction(
        &mut self,
        address: u8,
        operations: &mut [i2c::Operation<'_>],
    ) -> Result<(), i2c::ErrorKind> {
        let nack = |source| i2c::ErrorKind::NoAcknowledge(source);
        let mut chips = lock(&self.chips);
        let (name, chip) = chips.get_mut(&address).ok_or(nack(NoAcknowledgeSource::Address))?;
        if self.faults.nack(name, self.time.instant()) {
            return Err(nack(NoAcknowledgeSource::Address));
        }
        for operation in operations {
            match operation {
                i2c::Operation::Write(bytes) => chip.write(bytes),
                i2c::Operation::Read(buffer) => chip.read(buffer),
            }
            .map_err(|_| nack(NoAcknowledgeSource::Unknown))?;
        }
        Ok(())
    }
}

/// A device behind its chip select.
pub struct SimSpi {
    chip: Arc<Mutex<Box<dyn SpiChip>>>,
    time: SimTime,
}

impl spi::ErrorType for SimSpi {
    type Error = spi::ErrorKind;
}

impl SpiDevice for SimSpi {
    fn transaction(&mut self, operations: &mut [spi::Operation<'_, u8>]) -> Result<(), spi::ErrorKind> {
        let mut chip = lock(&self.chip);
        chip.select();
        for operation in operations {
            match operation {
                spi::Operation::Read(buffer) => buffer.iter_mut().for_each(|byte| *byte = chip.exchange(0)),
                spi::Operation::Write(bytes) => bytes.iter().for_each(|byte| {
                    chip.exchange(*byte);
                }),
                spi::Operation::Transfer(buffer, bytes) => {
                    // The shorter one is filled up: zeros out, and what comes in is dropped.
                    for at in 0..buffer.len().max(bytes.len()) {
                        let byte = chip.exchange(bytes.get(at).copied().unwrap_or(0));
                        if let Some(place) = buffer.get_mut(at) {
                            *place = byte;
                        }
                    }
                }
                spi::Operation::TransferInPlace(buffer) => {
                    buffer.iter_mut().for_each(|byte| *byte = chip.exchange(*byte));
                }
                spi::Operation::DelayNs(ns) => self.time.delay().delay_ns(*ns),
            }
        }
        Ok(())
    }
}

/// What the loop of a transmitter drops over its burden. An open loop drops nothing.
fn burden_volts(plant: &Arc<Plant>, faults: Faults, index: usize, channel: Channel) -> Input<f64> {
    let plant = Arc::clone(plant);
    let span = channel.at_20ma - channel.at_4ma;
    Box::new(move |t| {
        let value = |t| plant.value(Signal::Channel(index), t);
        let shown = faults.shown(&channel.device, span, t, value);
        shown.map_or(0.0, |value| plant.current(&channel, value)) * plant.layout().adc.shunt_ohm
    })
}

/// The air around the press. There is no loop that could open: a drop-out is left to NACK.
fn climate(plant: &Arc<Plant>, faults: Faults) -> Input<(f64, f64)> {
    let plant = Arc::clone(plant);
    Box::new(move |t: Timestamp| {
        let shown = |signal, device: &str| {
            let value = |t| plant.value(signal, t);
            faults.shown(device, 100.0, t, value).unwrap_or_else(|| value(t))
        };
        let press = &plant.layout().press;
        (
            shown(Signal::PressTemperature, &press.temperature.device),
            shown(Signal::PressHumidity, &press.humidity.device),
        )
    })
}

fn device_path(name: &str) -> String {
    if name.starts_with('/') { name.to_owned() } else { format!("/dev/{name}") }
}

fn find<T>(all: &BTreeMap<String, Arc<T>>, path: &str, what: &str) -> anyhow::Result<Arc<T>> {
    all.get(&device_path(path)).cloned().with_context(|| {
        let known = all.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        format!("no simulated {what} at {path}; there are: {known}")
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
