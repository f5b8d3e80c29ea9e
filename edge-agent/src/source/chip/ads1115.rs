//! ADS1115: four single-ended 16-bit inputs, read one conversion at a time. Data sheet: TI SBAS444.
//!
//! The range is ±4.096 V (125 µV a step). With the usual burden of 100 Ω a step is 1.25 µA, 0.008 % of a 4–20 mA
//! span, and the failure currents above 21 mA still fit (2.1 V), which they would not in ±2.048 V. The rate is the
//! chip's default of 128 conversions a second.
//!
//! The crate `ads1x1x` sets the range in a write that starts a conversion of its own, so a read waits for two: about
//! 17 ms.

use ads1x1x::{Ads1x1x, Error, FullScaleRange, TargetAddr, channel};
use embedded_hal::{delay::DelayNs, i2c::I2c};

use super::ChipError;

/// Full scale of the chosen range, in V.
const FULL_SCALE_V: f64 = 4.096;
/// One conversion at 128/s, and the 10 % by which the chip's oscillator may be slow.
const CONVERSION_US: u32 = 8_600;
/// Twice the conversions that a read needs, then the chip is given up.
const MAX_WAITS: u32 = 4;

/// The chip at one address.
#[derive(Debug, Clone)]
pub struct Ads1115 {
    address: TargetAddr,
}

impl Ads1115 {
    /// The chip at `address`: 0x48 to 0x4B, by where its ADDR pin is tied. None for any other.
    pub fn new(address: u8) -> Option<Self> {
        let address = match address {
            0x48 => TargetAddr::Gnd,
            0x49 => TargetAddr::Vdd,
            0x4a => TargetAddr::Sda,
            0x4b => TargetAddr::Scl,
            _ => return None,
        };
        Some(Self { address })
    }

    /// Converts input `channel` against ground and returns its voltage in V.
    pub fn read_volts<I: I2c>(
        &self,
        i2c: &mut I,
        delay: &mut impl DelayNs,
        channel: Channel,
    ) -> Result<f64, ChipError> {
        let mut adc = Ads1x1x::new_ads1115(i2c, self.address);
        adc.set_full_scale_range(FullScaleRange::Within4_096V).map_err(from_crate)?;
        for _ in 0..=MAX_WAITS {
            let step = match channel {
                Channel::A0 => adc.read(channel::SingleA0),
                Channel::A1 => adc.read(channel::SingleA1),
                Channel::A2 => adc.read(channel::SingleA2),
                Channel::A3 => adc.read(channel::SingleA3),
            };
            match step {
                Ok(code) => return Ok(f64::from(code) * FULL_SCALE_V / 32_768.0),
                Err(nb::Error::WouldBlock) => delay.delay_us(CONVERSION_US),
                Err(nb::Error::Other(error)) => return Err(from_crate(error)),
            }
        }
        Err(ChipError::Timeout { waited_us: (MAX_WAITS + 1) * CONVERSION_US })
    }
}

/// Whether the chip at `address` shows registers as this one has them after power-up and as this driver leaves them:
/// thresholds 0x8000 and 0x7FFF, comparator off (configuration bits 4 to 0). It has no register that says what it is,
/// and the ADS1113, ADS1114 and ADS1015 show the same. Nothing is written but the pointers of what is read.
pub fn looks_like_one<I: I2c>(address: u8, i2c: &mut I) -> Result<bool, ChipError> {
    let mut register = |pointer| {
        let mut word = [0; 2];
        i2c.write_read(address, &[pointer], &mut word).map_err(ChipError::from_i2c)?;
        Ok(u16::from_be_bytes(word))
    };
    Ok(register(2)? == 0x8000 && register(3)? == 0x7fff && register(1)? & 0x1f == 0x03)
}

/// An input of the chip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// Pin AIN0.
    A0,
    /// Pin AIN1.
    A1,
    /// Pin AIN2.
    A2,
    /// Pin AIN3.
    A3,
}

impl Channel {
    /// The input with this number, 0 to 3.
    pub fn new(number: u8) -> Option<Self> {
        [Self::A0, Self::A1, Self::A2, Self::A3].get(usize::from(number)).copied()
    }
}

fn from_crate<E: embedded_hal::i2c::Error>(error: Error<E>) -> ChipError {
    match error {
        Error::I2C(error) => ChipError::from_i2c(error),
        // Only thresholds are checked by the crate, and none is set here.
        Error::InvalidInputData => ChipError::Bus("ads1x1x refused its input"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::chip::scripted::{Delays, I2cScript, Step};

    /// Configuration register of SBAS444: ±4.096 V (PGA 001), single shot, 128 SPS, comparator off.
    const SET_RANGE: Step = Step::Write(&[0x01, 0x83, 0x83]);
    const START_A2: Step = Step::Write(&[0x01, 0xe3, 0x83]);
    const BUSY: Step = Step::WriteRead(&[0x01], &[0x03, 0x83]);
    const IDLE: Step = Step::WriteRead(&[0x01], &[0x83, 0x83]);
    const BUSY_A2: Step = Step::WriteRead(&[0x01], &[0x63, 0x83]);
    const DONE_A2: Step = Step::WriteRead(&[0x01], &[0xe3, 0x83]);

    fn check(script: &'static [Step], wanted: Result<f64, ChipError>) {
        let mut bus = I2cScript::new(0x48, script);
        let adc = Ads1115::new(0x48).expect("a valid address");
        let got = adc.read_volts(&mut bus, &mut Delays::default(), Channel::A2);
        assert_eq!(got, wanted);
        bus.done();
    }

    #[test]
    fn converts_by_the_data_sheet() {
        // At ±4.096 V full scale is 7FFFh, one step 125 µV, 8000h is minus full scale.
        const MIDDLE: &[Step] =
            &[SET_RANGE, BUSY, IDLE, START_A2, BUSY_A2, DONE_A2, Step::WriteRead(&[0x00], &[0x40, 0x00])];
        const STEP: &[Step] = &[SET_RANGE, IDLE, START_A2, DONE_A2, Step::WriteRead(&[0x00], &[0x00, 0x01])];
        const TOP: &[Step] = &[SET_RANGE, IDLE, START_A2, DONE_A2, Step::WriteRead(&[0x00], &[0x7f, 0xff])];
        const BOTTOM: &[Step] =
            &[SET_RANGE, IDLE, START_A2, DONE_A2, Step::WriteRead(&[0x00], &[0x80, 0x00])];
        check(MIDDLE, Ok(2.048));
        check(STEP, Ok(125e-6));
        check(TOP, Ok(4.096 - 125e-6));
        check(BOTTOM, Ok(-4.096));
    }

    #[test]
    fn a_chip_that_never_ends_its_conversion_times_out() {
        check(
            &[SET_RANGE, IDLE, START_A2, BUSY_A2, BUSY_A2, BUSY_A2, BUSY_A2],
            Err(ChipError::Timeout { waited_us: 43_000 }),
        );
    }

    #[test]
    fn a_missing_chip_is_a_nack() {
        check(&[Step::Nack], Err(ChipError::Nack));
        check(&[SET_RANGE, Step::Nack], Err(ChipError::Nack));
    }

    #[test]
    fn a_failed_bus_is_no_nack() {
        check(&[Step::BusFault], Err(ChipError::Bus("misplaced start or stop")));
    }

    #[test]
    fn only_four_addresses_and_channels() {
        assert!((0..=0x7f).filter(|&a| Ads1115::new(a).is_some()).eq(0x48..=0x4b));
        assert!((0..=255).filter(|&c| Channel::new(c).is_some()).eq(0..4));
    }
}
