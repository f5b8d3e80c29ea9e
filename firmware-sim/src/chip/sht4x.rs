//! SHT4x: temperature and relative humidity. Data sheet: Sensirion SHT4x.

use super::{I2cChip, Input, Nack, SimTime};

const SOFT_RESET: u8 = 0x94;
const SERIAL_NUMBER: u8 = 0x89;
/// Commands that measure, and how long they take at most, in µs.
const MEASURE_US: [(u8, i64); 3] = [(0xfd, 8_300), (0xf6, 4_500), (0xe0, 1_600)];
/// From a command that is no measurement to its answer, in µs.
const COMMAND_US: i64 = 1_000;

/// The chip.
pub struct Sht4x {
    time: SimTime,
    serial: u32,
    /// °C and % relative humidity.
    climate: Input<(f64, f64)>,
    /// Until when the chip is busy, in chip time.
    busy_until: i64,
    /// What the next read returns.
    answer: Option<[u8; 6]>,
}

impl Sht4x {
    /// A chip with this serial number in air of this temperature in °C and relative humidity in %.
    pub fn new(time: SimTime, serial: u32, climate: Input<(f64, f64)>) -> Self {
        Self { time, serial, climate, busy_until: i64::MIN, answer: None }
    }

    fn busy(&self) -> bool {
        self.time.nanos() < self.busy_until
    }

    fn measure(&self) -> [u8; 6] {
        let (temperature, humidity) = (self.climate)(self.time.instant());
        // `as` saturates at both ends of the word, as the chip does.
        answer(
            ((temperature + 45.0) / 175.0 * 65_535.0).round() as u16,
            ((humidity + 6.0) / 125.0 * 65_535.0).round() as u16,
        )
    }
}

impl I2cChip for Sht4x {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Nack> {
        let &[command] = bytes else { return Err(Nack) };
        // While it measures, the chip listens to a soft reset alone.
        if self.busy() && command != SOFT_RESET {
            return Err(Nack);
        }
        let (takes_us, answer) = match command {
            SOFT_RESET => (COMMAND_US, None),
            SERIAL_NUMBER => {
                let [high, low] = [(self.serial >> 16) as u16, self.serial as u16];
                (COMMAND_US, Some(answer(high, low)))
            }
            _ => {
                let (_, takes) = MEASURE_US.iter().find(|(code, _)| *code == command).ok_or(Nack)?;
                (*takes, Some(self.measure()))
            }
        };
        self.busy_until = self.time.nanos() + takes_us * 1_000;
        self.answer = answer;
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<(), Nack> {
        if self.busy() {
            return Err(Nack);
        }
        let answer = self.answer.take().ok_or(Nack)?;
        for (byte, value) in buffer.iter_mut().zip(answer.into_iter().chain(std::iter::repeat(0xff))) {
            *byte = value;
        }
        Ok(())
    }
}

/// Two words, each with its checksum.
fn answer(first: u16, second: u16) -> [u8; 6] {
    let [[a, b], [c, d]] = [first.to_be_bytes(), second.to_be_bytes()];
    [a, b, crc8([a, b]), c, d, crc8([c, d])]
}

/// CRC-8 with polynomial 0x31, start 0xFF.
fn crc8(word: [u8; 2]) -> u8 {
    word.iter().fold(0xff, |crc, byte| {
        (0..8).fold(crc ^ byte, |crc, _| crc << 1 ^ if crc & 0x80 != 0 { 0x31 } else { 0 })
    })
}

#[cfg(test)]
mod tests {
    use common::time::Timestamp;
    use embedded_hal::delay::DelayNs;

    use super::*;

    fn chip() -> (Sht4x, SimTime) {
        let time = SimTime::new(|| Timestamp::from_micros(0));
        (Sht4x::new(time.clone(), 0xbeef_0000, Box::new(|_| (25.0, 50.0))), time)
    }

    #[test]
    fn checksum_of_the_data_sheet() {
        assert_eq!(crc8([0xbe, 0xef]), 0x92);
    }

    #[test]
    fn refuses_until_measured_and_answers_once() {
        let (mut chip, time) = chip();
        let mut buffer = [0; 6];
        assert_eq!(chip.read(&mut buffer), Err(Nack), "nothing was asked");
        chip.write(&[0xfd]).unwrap();
        time.delay().delay_us(8_299);
        assert_eq!(chip.read(&mut buffer), Err(Nack), "measuring");
        assert_eq!(chip.write(&[0xfd]), Err(Nack), "measuring");
        time.delay().delay_us(1);
        assert_eq!(chip.read(&mut buffer), Ok(()));
        // 25 °C is 70/175, 50 % is 56/125 of the word.
        assert_eq!(buffer, answer(26_214, 29_360));
        assert_eq!(chip.read(&mut buffer), Err(Nack), "read already");
    }

    #[test]
    fn soft_reset_ends_a_measurement() {
        let (mut chip, time) = chip();
        chip.write(&[0xfd]).unwrap();
        chip.write(&[0x94]).unwrap();
        time.delay().delay_ms(1);
        assert_eq!(chip.read(&mut [0; 6]), Err(Nack));
        assert_eq!(chip.write(&[0x00]), Err(Nack), "no such command");
        assert_eq!(chip.write(&[0x89]), Ok(()));
    }
}
