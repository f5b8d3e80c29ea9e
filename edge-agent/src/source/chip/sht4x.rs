//! SHT40, SHT41 and SHT45: temperature and relative humidity with a CRC. Data sheet: Sensirion SHT4x.
//!
//! Measured at high precision (command 0xFD, at most 8.3 ms). The chip answers a read with NACK while it measures,
//! and every 16-bit word carries a CRC-8 (polynomial 0x31, start 0xFF), which the crate `sht4x` checks.

use embedded_hal::{delay::DelayNs, i2c::I2c};
use sht4x::{Address, Error, Precision};

use super::ChipError;

/// The chip at one address.
#[derive(Debug, Clone)]
pub struct Sht4x {
    address: Address,
}

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Climate {
    /// Air temperature in °C.
    pub temperature_c: f64,
    /// Relative humidity in %, within 0 and 100.
    pub humidity_pct: f64,
}

impl Sht4x {
    /// The chip at `address`: 0x44 to 0x46, by its part number. None for any other.
    pub fn new(address: u8) -> Option<Self> {
        let address = match address {
            0x44 => Address::Address0x44,
            0x45 => Address::Address0x45,
            0x46 => Address::Address0x46,
            _ => return None,
        };
        Some(Self { address })
    }

    /// Measures both quantities at high precision.
    pub fn measure<I: I2c, D: DelayNs>(&self, i2c: &mut I, delay: &mut D) -> Result<Climate, ChipError> {
        let raw = self.bound(i2c).measure_raw(Precision::High, delay).map_err(from_crate)?;
        Ok(climate(raw.temperature, raw.humidity))
    }

    /// The serial number given to the chip at the factory.
    pub fn serial_number<I: I2c, D: DelayNs>(&self, i2c: &mut I, delay: &mut D) -> Result<u32, ChipError> {
        self.bound(i2c).serial_number(delay).map_err(from_crate)
    }

    /// Puts the chip back into the state it has after power-up.
    pub fn reset<I: I2c, D: DelayNs>(&self, i2c: &mut I, delay: &mut D) -> Result<(), ChipError> {
        self.bound(i2c).soft_reset(delay).map_err(from_crate)
    }

    fn bound<I: I2c, D: DelayNs>(&self, i2c: I) -> sht4x::Sht4x<I, D> {
        sht4x::Sht4x::new_with_address(i2c, self.address)
    }
}

/// By the data sheet the humidity formula leaves 0–100 % at its ends and is to be cropped.
fn climate(temperature: u16, humidity: u16) -> Climate {
    Climate {
        temperature_c: -45.0 + 175.0 * f64::from(temperature) / 65_535.0,
        humidity_pct: (-6.0 + 125.0 * f64::from(humidity) / 65_535.0).clamp(0.0, 100.0),
    }
}

fn from_crate<E: embedded_hal::i2c::Error>(error: Error<E>) -> ChipError {
    match error {
        Error::I2c(error) => ChipError::from_i2c(error),
        _ => ChipError::Crc,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::chip::scripted::{Delays, I2cScript, Step};

    const MEASURE: Step = Step::Write(&[0xfd]);

    fn check(script: &'static [Step], wanted: Result<(f64, f64), ChipError>) {
        let mut bus = I2cScript::new(0x44, script);
        let mut delays = Delays::default();
        let got = Sht4x::new(0x44).expect("a valid address").measure(&mut bus, &mut delays);
        match (got, wanted) {
            (Ok(got), Ok((temperature, humidity))) => {
                assert!((got.temperature_c - temperature).abs() < 1e-3, "{got:?}");
                assert!((got.humidity_pct - humidity).abs() < 1e-3, "{got:?}");
                assert!(delays.total_ns >= 8_300_000, "waited only {} ns", delays.total_ns);
            }
            (got, wanted) => assert_eq!(got.err(), wanted.err()),
        }
        bus.done();
    }

    #[test]
    fn converts_by_the_data_sheet() {
        // 0xBEEF has the CRC 0x92 (the example of the data sheet).
        check(&[MEASURE, Step::Read(&[0xbe, 0xef, 0x92, 0xbe, 0xef, 0x92])], Ok((85.523, 87.230)));
        // The ends of the formula: −45 °C; humidity −6 % is cropped to 0.
        check(&[MEASURE, Step::Read(&[0x00, 0x00, 0x81, 0x00, 0x00, 0x81])], Ok((-45.0, 0.0)));
        check(&[MEASURE, Step::Read(&[0xff, 0xff, 0xac, 0xff, 0xff, 0xac])], Ok((130.0, 100.0)));
    }

    #[test]
    fn a_damaged_word_is_a_crc_error() {
        check(&[MEASURE, Step::Read(&[0xbe, 0xef, 0x92, 0xbe, 0xee, 0x92])], Err(ChipError::Crc));
    }

    #[test]
    fn a_busy_or_missing_chip_is_a_nack() {
        check(&[Step::Nack], Err(ChipError::Nack));
        check(&[MEASURE, Step::Nack], Err(ChipError::Nack));
    }

    #[test]
    fn serial_number_and_reset() {
        const SCRIPT: &[Step] =
            &[Step::Write(&[0x89]), Step::Read(&[0xbe, 0xef, 0x92, 0x00, 0x00, 0x81]), Step::Write(&[0x94])];
        let mut bus = I2cScript::new(0x44, SCRIPT);
        let chip = Sht4x::new(0x44).expect("a valid address");
        assert_eq!(chip.serial_number(&mut bus, &mut Delays::default()), Ok(0xbeef_0000));
        assert_eq!(chip.reset(&mut bus, &mut Delays::default()), Ok(()));
        bus.done();
    }
}
