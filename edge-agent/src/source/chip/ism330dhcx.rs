//! ISM330DHCX: three-axis vibration sensor on SPI, read in bursts through its FIFO. Data sheet: ST DS13012.
//!
//! Written here because the public driver speaks I2C and pops one sample a transaction (at most 4,300/s at 400 kHz).
//! The FIFO holds 512 words of 7 bytes (a tag, then three little-endian 16-bit axes); one SPI transaction reads as
//! many as are there. At 6,667 Hz it fills in 77 ms, so a burst that resolves 10 Hz (ISO 20816-3 wants 10–1000 Hz)
//! is drained in chunks of 256 words, which leaves 38 ms to a late reader. The gyroscope stays off.
//!
//! One burst has no hole: when the chip reports an overrun, the whole burst is discarded.
//!
//! The chip's own low pass lies at half its rate, so 6,667 Hz is the rate for a velocity up to 1000 Hz. Its oscillator
//! is some percent off; how much was measured when it was made and stands in a register, and a burst has the true rate.

use embedded_hal::{
    delay::DelayNs,
    spi::{Operation, SpiDevice},
};

use super::ChipError;

/// Standard gravity in m/s², in which the data sheet's g are meant.
const G: f64 = 9.806_65;
/// Words in the FIFO.
const FIFO_WORDS: usize = 512;
/// Bytes of a FIFO word: tag, x, y, z.
const WORD: usize = 7;
/// `TAG_SENSOR` of an accelerometer word.
const TAG_ACCELEROMETER: u8 = 0x02;

/// Registers (DS13012, section 9).
mod reg {
    pub(super) const FIFO_CTRL3: u8 = 0x09;
    pub(super) const FIFO_CTRL4: u8 = 0x0a;
    pub(super) const WHO_AM_I: u8 = 0x0f;
    pub(super) const CTRL1_XL: u8 = 0x10;
    pub(super) const CTRL3_C: u8 = 0x12;
    pub(super) const FIFO_STATUS1: u8 = 0x3a;
    pub(super) const INTERNAL_FREQ_FINE: u8 = 0x63;
    pub(super) const FIFO_DATA_OUT_TAG: u8 = 0x78;
    /// Set in the first byte of a read.
    pub(super) const READ: u8 = 0x80;
}

const WHO_AM_I: u8 = 0x6b;
/// CTRL3_C: block data update, address auto-increment.
const BDU_IF_INC: u8 = 0x44;
/// CTRL3_C: reset of the registers, done within 50 µs.
const SW_RESET: u8 = 0x01;
/// FIFO_CTRL4: off and emptied.
const BYPASS: u8 = 0x00;
/// FIFO_CTRL4: the newest word replaces the oldest.
const CONTINUOUS: u8 = 0x06;
/// FIFO_STATUS2: overrun now, or since it was last read.
const OVERRUN: u8 = 0x40 | 0x08;

/// INTERNAL_FREQ_FINE: one step of the true rate, as a part of the nominal one (DS13012; AN5398).
const RATE_STEP: f64 = 0.0015;

/// How often the acceleration is sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataRate {
    /// 833 Hz.
    Hz833,
    /// 1,667 Hz.
    Hz1667,
    /// 3,333 Hz.
    Hz3333,
    /// 6,667 Hz.
    Hz6667,
}

impl DataRate {
    /// All of them, from slow to fast.
    pub const ALL: [Self; 4] = [Self::Hz833, Self::Hz1667, Self::Hz3333, Self::Hz6667];

    /// The nominal rate in Hz. The chip's oscillator may be some percent off.
    pub fn hz(self) -> f64 {
        match self {
            Self::Hz833 => 2_500.0 / 3.0,
            Self::Hz1667 => 5_000.0 / 3.0,
            Self::Hz3333 => 10_000.0 / 3.0,
            Self::Hz6667 => 20_000.0 / 3.0,
        }
    }

    /// Field `ODR_XL`, and the same in `BDR_XL`.
    fn code(self) -> u8 {
        match self {
            Self::Hz833 => 0x7,
            Self::Hz1667 => 0x8,
            Self::Hz3333 => 0x9,
            Self::Hz6667 => 0xa,
        }
    }
}

/// The largest acceleration that can be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// ±2 g, 0.061 mg a step.
    G2,
    /// ±4 g, 0.122 mg a step.
    G4,
    /// ±8 g, 0.244 mg a step.
    G8,
    /// ±16 g, 0.488 mg a step.
    G16,
}

impl Range {
    /// One step in m/s².
    fn step(self) -> f64 {
        let mg = match self {
            Self::G2 => 0.061,
            Self::G4 => 0.122,
            Self::G8 => 0.244,
            Self::G16 => 0.488,
        };
        mg * 1e-3 * G
    }

    /// Field `FS_XL`; the chip does not number the ranges in their order.
    fn code(self) -> u8 {
        match self {
            Self::G2 => 0b00,
            Self::G4 => 0b10,
            Self::G8 => 0b11,
            Self::G16 => 0b01,
        }
    }
}

/// The direction that is read: how the sensor is mounted decides which is radial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// The chip's x.
    X,
    /// The chip's y.
    Y,
    /// The chip's z.
    Z,
}

/// What to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How often the acceleration is sampled.
    pub rate: DataRate,
    /// The largest acceleration that can be shown.
    pub range: Range,
    /// The direction that is read.
    pub axis: Axis,
    /// Samples in a burst.
    pub samples: usize,
}

impl Default for Settings {
    /// 8,192 samples at 6,667 Hz: 1.23 s, so 0.8 Hz a line and 12 cycles at 10 Hz.
    fn default() -> Self {
        Self { rate: DataRate::Hz6667, range: Range::G16, axis: Axis::X, samples: 8_192 }
    }
}

/// A gapless stretch of acceleration.
#[derive(Debug, Clone, PartialEq)]
pub struct Burst {
    /// Samples a second in Hz, by the chip's own measure of its oscillator.
    pub rate_hz: f64,
    /// Acceleration in m/s², gravity included.
    pub samples: Vec<f64>,
    /// Whether it went beyond the range: then peaks are cut off.
    pub clipped: bool,
}

/// The chip behind one chip select.
#[derive(Debug, Clone)]
pub struct Ism330dhcx {
    settings: Settings,
    /// The true rate in Hz, once the chip is set up.
    rate_hz: Option<f64>,
}

impl Ism330dhcx {
    /// A chip that is set up at its first burst.
    pub fn new(settings: Settings) -> Self {
        Self { settings, rate_hz: None }
    }

    /// Samples one burst. It takes as long as the burst lasts; after any error but an overrun the chip is set up anew.
    pub fn burst<S: SpiDevice>(&mut self, spi: &mut S, delay: &mut impl DelayNs) -> Result<Burst, ChipError> {
        let result = self.try_burst(spi, delay);
        if result.as_ref().is_err_and(|error| *error != ChipError::Overrun) {
            self.rate_hz = None;
        }
        result
    }

    fn try_burst<S: SpiDevice>(&mut self, spi: &mut S, delay: &mut impl DelayNs) -> Result<Burst, ChipError> {
        let rate_hz = match self.rate_hz {
            Some(rate_hz) => rate_hz,
            None => self.set_up(spi, delay)?,
        };
        self.rate_hz = Some(rate_hz);
        // Through bypass, which empties the FIFO: a burst holds nothing older than this call.
        write(spi, reg::FIFO_CTRL4, BYPASS)?;
        write(spi, reg::FIFO_CTRL4, CONTINUOUS)?;
        let mut burst = Burst { rate_hz, samples: Vec::new(), clipped: false };
        let drained = self.drain(&mut burst, spi, delay);
        write(spi, reg::FIFO_CTRL4, BYPASS)?;
        drained.map(|()| burst)
    }

    /// Resets and configures the chip; its true rate.
    fn set_up<S: SpiDevice>(&self, spi: &mut S, delay: &mut impl DelayNs) -> Result<f64, ChipError> {
        let mut id = [0];
        read(spi, reg::WHO_AM_I, &mut id)?;
        if id[0] != WHO_AM_I {
            return Err(ChipError::Protocol { wanted: WHO_AM_I, found: id[0] });
        }
        let rate = self.settings.rate.code();
        write(spi, reg::CTRL3_C, SW_RESET)?;
        delay.delay_us(100);
        write(spi, reg::CTRL3_C, BDU_IF_INC)?;
        write(spi, reg::FIFO_CTRL3, rate)?;
        let control = rate << 4 | self.settings.range.code() << 2;
        write(spi, reg::CTRL1_XL, control)?;
        // A chip that has lost its supply reads back zeros here, and an open wire ones.
        let mut back = [0];
        read(spi, reg::CTRL1_XL, &mut back)?;
        if back[0] != control {
            return Err(ChipError::Protocol { wanted: control, found: back[0] });
        }
        let mut trim = [0];
        read(spi, reg::INTERNAL_FREQ_FINE, &mut trim)?;
        // The first samples after power-down are not settled.
        delay.delay_ms(20);
        Ok(self.settings.rate.hz() * (1.0 + RATE_STEP * f64::from(i8::from_le_bytes(trim))))
    }

    /// Reads the FIFO whenever it is about half full, until the burst is complete.
    fn drain<S: SpiDevice>(
        &self,
        burst: &mut Burst,
        spi: &mut S,
        delay: &mut impl DelayNs,
    ) -> Result<(), ChipError> {
        let wanted = self.settings.samples;
        let chunk = wanted.min(FIFO_WORDS / 2);
        let chunk_us = (chunk as f64 / burst.rate_hz * 1e6).ceil() as u32;
        let max_chunks = 2 * wanted.div_ceil(chunk.max(1)) as u32 + 2;

        burst.samples.reserve(wanted + FIFO_WORDS);
        let mut words = [0; FIFO_WORDS * WORD];
        for _ in 0..max_chunks {
            if burst.samples.len() >= wanted {
                burst.samples.truncate(wanted);
                return Ok(());
            }
            delay.delay_us(chunk_us);
            let level = fifo_level(spi)?;
            if level == 0 {
                continue;
            }
            let words = &mut words[..level * WORD];
            read(spi, reg::FIFO_DATA_OUT_TAG, words)?;
            self.decode(words, burst)?;
        }
        Err(ChipError::Timeout { waited_us: max_chunks * chunk_us })
    }

    fn decode(&self, words: &[u8], burst: &mut Burst) -> Result<(), ChipError> {
        let at = match self.settings.axis {
            Axis::X => 1,
            Axis::Y => 3,
            Axis::Z => 5,
        };
        let step = self.settings.range.step();
        for word in words.chunks_exact(WORD) {
            let tag = word[0];
            // The tag's lowest bit makes its parity even.
            if tag.count_ones() % 2 != 0 {
                return Err(ChipError::Crc);
            }
            if tag >> 3 != TAG_ACCELEROMETER {
                return Err(ChipError::Protocol { wanted: TAG_ACCELEROMETER, found: tag >> 3 });
            }
            let steps = i16::from_le_bytes([word[at], word[at + 1]]);
            burst.clipped |= steps == i16::MIN || steps == i16::MAX;
            burst.samples.push(f64::from(steps) * step);
        }
        Ok(())
    }
}

/// Words waiting in the FIFO; an error if any was lost.
fn fifo_level<S: SpiDevice>(spi: &mut S) -> Result<usize, ChipError> {
    let mut status = [0; 2];
    read(spi, reg::FIFO_STATUS1, &mut status)?;
    if status[1] & OVERRUN != 0 {
        return Err(ChipError::Overrun);
    }
    let level = usize::from(status[1] & 0x03) << 8 | usize::from(status[0]);
    Ok(level.min(FIFO_WORDS))
}

fn write<S: SpiDevice>(spi: &mut S, register: u8, value: u8) -> Result<(), ChipError> {
    spi.write(&[register, value]).map_err(ChipError::from_spi)
}

/// One transaction: the address, then as many bytes as `buffer` takes (3,584 at most; Linux allows 4,096).
fn read<S: SpiDevice>(spi: &mut S, register: u8, buffer: &mut [u8]) -> Result<(), ChipError> {
    let address = [register | reg::READ];
    spi.transaction(&mut [Operation::Write(&address), Operation::Read(buffer)]).map_err(ChipError::from_spi)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::chip::scripted::{Delays, SpiScript, Transfer};

    const SETTINGS: Settings =
        Settings { rate: DataRate::Hz3333, range: Range::G2, axis: Axis::Y, samples: 3 };

    const ID: Transfer = Transfer::Read(0x0f, &[0x6b]);
    const RESET: Transfer = Transfer::Write(&[0x12, 0x01]);
    const AUTO_INCREMENT: Transfer = Transfer::Write(&[0x12, 0x44]);
    const BATCH_3333: Transfer = Transfer::Write(&[0x09, 0x09]);
    const ON_3333_2G: Transfer = Transfer::Write(&[0x10, 0x90]);
    const BACK: Transfer = Transfer::Read(0x10, &[0x90]);
    /// Ten steps of 0.15 % slow.
    const TRIM: Transfer = Transfer::Read(0x63, &[0xf6]);
    const EMPTY: Transfer = Transfer::Write(&[0x0a, 0x00]);
    const FILL: Transfer = Transfer::Write(&[0x0a, 0x06]);
    /// Words of an accelerometer (tag 0x02): y = 0x4000 (1 g: 16384 × 0.061 mg), then −1, then 0.
    const WORDS: Transfer = Transfer::Read(
        0x78,
        &[
            0x11, 0, 0, 0x00, 0x40, 0, 0, //
            0x12, 0, 0, 0xff, 0xff, 0, 0, //
            0x14, 0, 0, 0x00, 0x00, 0, 0,
        ],
    );

    #[track_caller]
    fn check(script: &[Transfer], wanted: Result<Burst, ChipError>) {
        let set_up = [ID, RESET, AUTO_INCREMENT, BATCH_3333, ON_3333_2G, BACK, TRIM, EMPTY, FILL];
        let mut spi = SpiScript::new([&set_up, script, &[EMPTY]].concat());
        let mut chip = Ism330dhcx::new(SETTINGS);
        let got = chip.burst(&mut spi, &mut Delays::default());
        assert_eq!(got, wanted);
        spi.done();
    }

    #[test]
    fn reads_a_burst() {
        let step = 0.061e-3 * G;
        let samples = vec![16_384.0 * step, -step, 0.0];
        let rate_hz = 10_000.0 / 3.0 * (1.0 - 0.015);
        check(&[Transfer::Read(0x3a, &[3, 0x00]), WORDS], Ok(Burst { rate_hz, samples, clipped: false }));
    }

    #[test]
    fn a_burst_beyond_the_range_says_so() {
        let word = Transfer::Read(
            0x78,
            &[
                0x11, 0, 0, 0xff, 0x7f, 0, 0, //
                0x12, 0, 0, 0x01, 0x80, 0, 0, //
                0x14, 0, 0, 0x00, 0x00, 0, 0,
            ],
        );
        let set_up = vec![ID, RESET, AUTO_INCREMENT, BATCH_3333, ON_3333_2G, BACK, TRIM, EMPTY, FILL];
        let mut spi = SpiScript::new([set_up, vec![Transfer::Read(0x3a, &[3, 0]), word, EMPTY]].concat());
        let burst = Ism330dhcx::new(SETTINGS).burst(&mut spi, &mut Delays::default()).unwrap();
        assert!(burst.clipped, "{burst:?}");
    }

    #[test]
    fn a_burst_with_an_overrun_is_discarded() {
        for flag in [0x40, 0x08, 0x48] {
            let status: &'static [u8] = match flag {
                0x40 => &[0x00, 0x42],
                0x08 => &[0x03, 0x08],
                _ => &[0xff, 0x49],
            };
            check(&[Transfer::Read(0x3a, status)], Err(ChipError::Overrun));
        }
    }

    #[test]
    fn a_damaged_tag_is_refused() {
        let odd = Transfer::Read(0x78, &[0x10, 0, 0, 0, 0, 0, 0]);
        check(&[Transfer::Read(0x3a, &[1, 0]), odd], Err(ChipError::Crc));
        let gyroscope = Transfer::Read(0x78, &[0x09, 0, 0, 0, 0, 0, 0]);
        check(&[Transfer::Read(0x3a, &[1, 0]), gyroscope], Err(ChipError::Protocol { wanted: 2, found: 1 }));
    }

    #[test]
    fn a_fifo_that_never_fills_times_out() {
        let nothing = [Transfer::Read(0x3a, &[0, 0])].repeat(4);
        check(&nothing, Err(ChipError::Timeout { waited_us: 3_656 }));
    }

    #[test]
    fn another_chip_is_refused() {
        let mut spi = SpiScript::new(vec![Transfer::Read(0x0f, &[0x6c])]);
        let got = Ism330dhcx::new(SETTINGS).burst(&mut spi, &mut Delays::default());
        assert_eq!(got, Err(ChipError::Protocol { wanted: 0x6b, found: 0x6c }));
        spi.done();
    }
}
