//! ADS1115: four inputs, 16 bits, one converter. Data sheet: TI SBAS444.

use super::{I2cChip, Input, Nack, SimTime};

/// Configuration after power-up: AIN0 against AIN1, ±2.048 V, single shot, 128 a second, comparator off.
const RESET: u16 = 0x8583;
/// Written 1: start a conversion. Read 1: none is running.
const OS: u16 = 0x8000;
/// Single shot when 1, continuous when 0.
const MODE: u16 = 0x0100;
/// Volts of full scale by field PGA.
const FULL_SCALE_V: [f64; 8] = [6.144, 4.096, 2.048, 1.024, 0.512, 0.256, 0.256, 0.256];
/// Conversions a second by field DR.
const RATE_HZ: [i64; 8] = [8, 16, 32, 64, 128, 250, 475, 860];

/// The chip.
pub struct Ads1115 {
    time: SimTime,
    /// Volts at AIN0 to AIN3.
    inputs: [Input<f64>; 4],
    pointer: u8,
    config: u16,
    conversion: u16,
    thresholds: [u16; 2],
    /// When the running conversion ends, in chip time, and its result.
    running: Option<(i64, u16)>,
}

impl Ads1115 {
    /// A chip whose pins AIN0 to AIN3 are at these voltages to ground, in V.
    pub fn new(time: SimTime, inputs: [Input<f64>; 4]) -> Self {
        Self {
            time,
            inputs,
            pointer: 0,
            config: RESET,
            conversion: 0,
            thresholds: [0x8000, 0x7fff],
            running: None,
        }
    }

    /// Ends the conversion whose time has come.
    fn settle(&mut self) {
        if let Some((until, code)) = self.running
            && self.time.nanos() >= until
        {
            self.conversion = code;
            self.running = None;
        }
    }

    fn configure(&mut self, word: u16) {
        self.config = word & !OS;
        // A start during a conversion has no effect; the new settings count from the next one on.
        if self.running.is_none() && word & OS != 0 && word & MODE != 0 {
            let period_ns = 1_000_000_000 / RATE_HZ[usize::from(word >> 5 & 0x7)];
            self.running = Some((self.time.nanos() + period_ns, self.convert()));
        }
    }

    /// The code of what the multiplexer selects now; it saturates at the ends of the range.
    fn convert(&self) -> u16 {
        let at = self.time.instant();
        let volts = |pin: usize| (self.inputs[pin])(at);
        let input = match self.config >> 12 & 0x7 {
            0 => volts(0) - volts(1),
            1 => volts(0) - volts(3),
            2 => volts(1) - volts(3),
            3 => volts(2) - volts(3),
            pin => volts(usize::from(pin) - 4),
        };
        let full_scale = FULL_SCALE_V[usize::from(self.config >> 9 & 0x7)];
        // `as` saturates, as the chip does.
        ((input / full_scale * 32_768.0).round() as i16).cast_unsigned()
    }

    fn register(&self) -> u16 {
        match self.pointer {
            0 if self.config & MODE == 0 => self.convert(),
            0 => self.conversion,
            1 => self.config | if self.running.is_none() { OS } else { 0 },
            pointer => self.thresholds[usize::from(pointer - 2)],
        }
    }
}

impl I2cChip for Ads1115 {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Nack> {
        self.settle();
        let Some((pointer, value)) = bytes.split_first() else { return Ok(()) };
        self.pointer = pointer & 0x3;
        if let &[high, low, ..] = value {
            let word = u16::from_be_bytes([high, low]);
            match self.pointer {
                0 => {}
                1 => self.configure(word),
                pointer => self.thresholds[usize::from(pointer - 2)] = word,
            }
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<(), Nack> {
        self.settle();
        let word = self.register().to_be_bytes();
        for (byte, value) in buffer.iter_mut().zip(word.iter().cycle()) {
            *byte = *value;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use common::time::Timestamp;
    use embedded_hal::delay::DelayNs;

    use super::*;

    fn chip() -> (Ads1115, SimTime) {
        let time = SimTime::new(|| Timestamp::from_micros(0));
        let volts = [1.0, -0.5, 2.0, 9.0];
        (Ads1115::new(time.clone(), volts.map(|v| Box::new(move |_| v) as Input<f64>)), time)
    }

    fn read(chip: &mut Ads1115, register: u8) -> u16 {
        let mut word = [0; 2];
        chip.write(&[register]).unwrap();
        chip.read(&mut word).unwrap();
        u16::from_be_bytes(word)
    }

    #[test]
    fn power_up_state() {
        let (mut chip, _) = chip();
        assert_eq!([0, 1, 2, 3].map(|r| read(&mut chip, r)), [0x0000, 0x8583, 0x8000, 0x7fff]);
    }

    #[test]
    fn a_conversion_takes_its_time() {
        let (mut chip, time) = chip();
        // AIN0, ±4.096 V, single shot, 128 a second: 7.8125 ms.
        chip.write(&[1, 0xc3, 0x83]).unwrap();
        time.delay().delay_us(7_812);
        assert_eq!((read(&mut chip, 1), read(&mut chip, 0)), (0x4383, 0x0000), "busy, and the old result");
        time.delay().delay_us(1);
        assert_eq!((read(&mut chip, 1), read(&mut chip, 0)), (0xc383, 8_000));
    }

    #[test]
    fn ranges_and_inputs() {
        let table = [
            (0xc5, 16_000),              // AIN0 at ±2.048 V
            (0x85, 24_000),              // AIN0 against AIN1: 1.5 V
            (0xd5, (-8_000i16) as u16),  // AIN1
            (0xb3, (-32_768i16) as u16), // AIN2 against AIN3: −7 V saturates
            (0xf1, 0x7fff),              // AIN3: 9 V saturates at ±6.144 V
        ];
        for (high, wanted) in table {
            let (mut chip, time) = chip();
            chip.write(&[1, high, 0xe3]).unwrap();
            time.delay().delay_us(1_163);
            assert_eq!(read(&mut chip, 0), wanted, "{high:#x}");
        }
    }
}
