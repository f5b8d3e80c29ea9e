//! An I2C bus with its converters and climate sensors.

use std::{sync::Arc, time::Duration};

use common::{
    reading::{DeviceIx, Quality, Reading},
    time::Timestamp,
};

use super::{
    Hardware,
    bus::{self, Bus, Poll},
    chip::{self, ChipError, Ne43},
    no_value,
};
use crate::settings::{I2cChip, I2cProbe};

/// Currents of a loop at the ends of its span, in A.
const SPAN_A: [f64; 2] = [0.004, 0.020];

/// A bus and what is read on it.
pub struct I2cBus<H: Hardware> {
    hardware: Arc<H>,
    path: String,
    probes: Vec<I2cProbe>,
    open: Option<H::I2c>,
    failing: bool,
    delay: H::Delay,
}

impl<H: Hardware> I2cBus<H> {
    /// A bus that is opened at its first poll.
    pub fn new(hardware: Arc<H>, path: String, probes: Vec<I2cProbe>) -> Self {
        Self { delay: hardware.delay(), hardware, path, probes, open: None, failing: false }
    }
}

impl<H: Hardware> Bus for I2cBus<H> {
    fn probes(&self) -> Vec<(Duration, Vec<DeviceIx>)> {
        self.probes.iter().map(|probe| (probe.period, devices(&probe.chip))).collect()
    }

    fn poll(&mut self, at: Timestamp, due: &[usize]) -> Poll {
        let mut poll = Poll::default();
        for probe in due {
            let chip = &self.probes[*probe].chip;
            let open = || self.hardware.i2c(&self.path);
            let Some(i2c) = bus::open(&mut self.open, &mut self.failing, &self.path, open) else {
                poll.faults.push("open");
                poll.readings.extend(devices(chip).into_iter().map(|device| no_value(at, device)));
                continue;
            };
            if let Err(error) = read(chip, i2c, &mut self.delay, at, &mut poll.readings) {
                tracing::debug!(path = self.path, %error, "no value");
                poll.faults.push(error.reason());
                poll.readings.extend(devices(chip).into_iter().map(|device| no_value(at, device)));
                match (error, chip) {
                    (ChipError::Bus(_), _) => self.open = None,
                    (ChipError::Timeout { .. }, I2cChip::Climate { chip, .. }) => {
                        // If it fails too, the next poll says so.
                        let _ = chip.reset(i2c, &mut self.delay);
                    }
                    _ => {}
                }
            }
        }
        poll
    }
}

fn devices(chip: &I2cChip) -> Vec<DeviceIx> {
    match chip {
        I2cChip::Loop { device, .. } => vec![*device],
        I2cChip::Climate { temperature, humidity, .. } => {
            [temperature, humidity].into_iter().flatten().map(|(device, ..)| *device).collect()
        }
    }
}

/// Adds one reading for each device of the chip, or fails and adds none.
fn read<I: embedded_hal::i2c::I2c>(
    chip: &I2cChip,
    i2c: &mut I,
    delay: &mut impl embedded_hal::delay::DelayNs,
    at: Timestamp,
    out: &mut Vec<Reading>,
) -> Result<(), ChipError> {
    match chip {
        I2cChip::Loop { adc, channel, burden_ohm, device, low, high } => {
            let volts = adc.read_volts(i2c, delay, *channel)?;
            out.push(loop_reading(at, *device, chip::loop_current(volts, *burden_ohm), *low, *high));
        }
        I2cChip::Climate { chip, temperature, humidity } => {
            let climate = chip.measure(i2c, delay)?;
            for (target, value) in [(temperature, climate.temperature_c), (humidity, climate.humidity_pct)] {
                if let Some((device, scale, shift)) = *target {
                    let value = value * scale + shift;
                    out.push(Reading { ts: at, device, quality: Quality::Good, value });
                }
            }
        }
    }
    Ok(())
}

/// What a loop current means: `low` at 4 mA, `high` at 20 mA, judged by NAMUR NE 43.
fn loop_reading(ts: Timestamp, device: DeviceIx, current_a: f64, low: f64, high: f64) -> Reading {
    let quality = match chip::ne43(current_a) {
        Ne43::Good => Quality::Good,
        Ne43::Uncertain => Quality::Uncertain,
        Ne43::Bad => return no_value(ts, device),
    };
    let value = low + (current_a - SPAN_A[0]) / (SPAN_A[1] - SPAN_A[0]) * (high - low);
    Reading { ts, device, quality, value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_follow_namur() {
        for (ma, value, quality) in [
            (4.0, Some(-10.0), Quality::Good),
            (12.0, Some(20.0), Quality::Good),
            (20.0, Some(50.0), Quality::Good),
            (20.8, Some(53.0), Quality::Uncertain),
            (3.7, Some(-11.125), Quality::Uncertain),
            (3.5, None, Quality::Bad),
            (21.5, None, Quality::Bad),
            (0.0, None, Quality::Bad),
        ] {
            let reading = loop_reading(Timestamp::from_micros(1), DeviceIx(3), ma / 1e3, -10.0, 50.0);
            assert_eq!(reading.quality, quality, "{ma} mA");
            match value {
                Some(value) => assert!((reading.value - value).abs() < 1e-9, "{ma} mA: {}", reading.value),
                None => assert!(reading.value.is_nan(), "{ma} mA"),
            }
        }
    }
}
