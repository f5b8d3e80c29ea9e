//! ISM330DHCX: the accelerometer and its FIFO. Data sheet: ST DS13012.
//!
//! The FIFO is not a buffer here but two counters: words produced since it was started, which is time times rate, and
//! words read or lost. A word is computed when it is read.

use super::{Input, SimTime, SpiChip};
use crate::waveform::Waveform;

/// Standard gravity in m/s².
const G: f64 = 9.806_65;
/// Words that the FIFO holds.
const FIFO_WORDS: u64 = 512;
/// What of the radial acceleration each axis sees; the third one sees gravity besides.
const AXES: [f64; 3] = [1.0, 0.6, 0.3];
/// Hz by the fields ODR_XL and BDR_XL.
const RATE_HZ: [f64; 11] = [
    0.0,
    12.5,
    26.0,
    52.0,
    104.0,
    208.0,
    416.0,
    2_500.0 / 3.0,
    5_000.0 / 3.0,
    10_000.0 / 3.0,
    20_000.0 / 3.0,
];
/// mg a step by field FS_XL: ±2, 16, 4, 8 g.
const STEP_MG: [f64; 4] = [0.061, 0.488, 0.122, 0.244];

mod reg {
    pub(super) const FIFO_CTRL1: usize = 0x07;
    pub(super) const FIFO_CTRL2: usize = 0x08;
    pub(super) const FIFO_CTRL3: usize = 0x09;
    pub(super) const FIFO_CTRL4: usize = 0x0a;
    pub(super) const WHO_AM_I: usize = 0x0f;
    pub(super) const CTRL1_XL: usize = 0x10;
    pub(super) const CTRL3_C: usize = 0x12;
    pub(super) const STATUS: usize = 0x1e;
    pub(super) const OUTX_L_A: usize = 0x28;
    pub(super) const OUTZ_H_A: usize = 0x2d;
    pub(super) const FIFO_STATUS1: usize = 0x3a;
    pub(super) const FIFO_STATUS2: usize = 0x3b;
    pub(super) const FIFO_DATA_OUT_TAG: usize = 0x78;
    pub(super) const FIFO_DATA_OUT_Z_H: usize = 0x7e;
}

/// Tag of an accelerometer word.
const TAG_ACCELEROMETER: u8 = 0x02;
/// FIFO_CTRL4: stop when full.
const MODE_FIFO: u8 = 1;
/// FIFO_CTRL4: the newest word replaces the oldest.
const MODE_CONTINUOUS: u8 = 6;

/// The chip.
pub struct Ism330dhcx {
    time: SimTime,
    radial: Input<Waveform>,
    registers: [u8; 128],
    /// Chip time at the beginning of the transfer.
    now: i64,
    transfer: Transfer,
    fifo: Option<Fifo>,
    /// The word that is being read from the FIFO, and the sample at OUTX_L_A to OUTZ_H_A.
    word: [u8; 7],
    sample: [u8; 6],
}

enum Transfer {
    Address,
    Read(usize),
    Write(usize),
}

/// A running FIFO.
struct Fifo {
    started: i64,
    waveform: Waveform,
    rate_hz: f64,
    overwrites: bool,
    /// Words read or lost since the start.
    gone: u64,
    overran: bool,
    overran_latched: bool,
}

impl Ism330dhcx {
    /// A chip that feels this radial acceleration.
    pub fn new(time: SimTime, radial: Input<Waveform>) -> Self {
        let mut chip = Self {
            time,
            radial,
            registers: [0; 128],
            now: 0,
            transfer: Transfer::Address,
            fifo: None,
            word: [0; 7],
            sample: [0; 6],
        };
        chip.reset();
        chip
    }

    fn reset(&mut self) {
        self.registers = [0; 128];
        self.registers[reg::WHO_AM_I] = 0x6b;
        self.registers[reg::CTRL3_C] = 0x04;
        self.fifo = None;
    }

    fn write(&mut self, address: usize, value: u8) {
        match address {
            reg::CTRL3_C if value & 0x01 != 0 => self.reset(),
            reg::FIFO_CTRL1..=0x0e | 0x10..=0x19 | 0x56..=0x5f => {
                self.registers[address] = value;
                if matches!(address, reg::FIFO_CTRL3 | reg::FIFO_CTRL4 | reg::CTRL1_XL) {
                    self.start_fifo();
                }
            }
            // The rest is read only.
            _ => {}
        }
    }

    /// A change of mode or rate empties the FIFO. Modes that wait for an event are off: there is none here.
    fn start_fifo(&mut self) {
        let mode = self.registers[reg::FIFO_CTRL4] & 0x7;
        let on = self.registers[reg::CTRL1_XL] >> 4 != 0;
        let rate_hz = RATE_HZ.get(usize::from(self.registers[reg::FIFO_CTRL3] & 0xf)).copied().unwrap_or(0.0);
        let runs = on && rate_hz > 0.0 && matches!(mode, MODE_FIFO | MODE_CONTINUOUS);
        self.fifo = runs.then(|| Fifo {
            started: self.now,
            waveform: (self.radial)(self.time.instant()),
            rate_hz,
            overwrites: mode == MODE_CONTINUOUS,
            gone: 0,
            overran: false,
            overran_latched: false,
        });
    }

    fn read(&mut self, address: usize) -> u8 {
        match address {
            reg::STATUS => u8::from(self.registers[reg::CTRL1_XL] >> 4 != 0),
            reg::OUTX_L_A..=reg::OUTZ_H_A => {
                if address == reg::OUTX_L_A {
                    self.sample = self.axes(&(self.radial)(self.time.instant()), 0.0);
                }
                self.sample[address - reg::OUTX_L_A]
            }
            reg::FIFO_STATUS1 => self.level() as u8,
            reg::FIFO_STATUS2 => self.fifo_status2(),
            reg::FIFO_DATA_OUT_TAG => {
                self.word = self.next_word();
                self.word[0]
            }
            0x79..=reg::FIFO_DATA_OUT_Z_H => self.word[address - reg::FIFO_DATA_OUT_TAG],
            _ => self.registers[address],
        }
    }

    /// Words that wait. Those that the newest have overwritten are gone.
    fn level(&mut self) -> u64 {
        let now = self.now;
        self.fifo.as_mut().map_or(0, |fifo| {
            let produced = ((now - fifo.started).max(0) as f64 * 1e-9 * fifo.rate_hz) as u64;
            if !fifo.overwrites {
                return produced.min(FIFO_WORDS).saturating_sub(fifo.gone);
            }
            let oldest = produced.saturating_sub(FIFO_WORDS);
            if oldest > fifo.gone {
                fifo.gone = oldest;
                fifo.overran = true;
                fifo.overran_latched = true;
            }
            produced - fifo.gone
        })
    }

    fn fifo_status2(&mut self) -> u8 {
        let level = self.level();
        let threshold = u64::from(self.registers[reg::FIFO_CTRL2] & 0x1) << 8
            | u64::from(self.registers[reg::FIFO_CTRL1]);
        let Some(fifo) = &mut self.fifo else { return 0 };
        let status = u8::from(threshold > 0 && level >= threshold) << 7
            | u8::from(fifo.overran) << 6
            | u8::from(level == FIFO_WORDS) << 5
            | u8::from(fifo.overran_latched) << 3
            | (level >> 8) as u8;
        fifo.overran_latched = false;
        status
    }

    /// Takes the oldest word; an empty FIFO gives zeros.
    fn next_word(&mut self) -> [u8; 7] {
        if self.level() == 0 {
            return [0; 7];
        }
        let Some(fifo) = &mut self.fifo else { return [0; 7] };
        let number = fifo.gone;
        fifo.gone += 1;
        fifo.overran = false;
        let Some(fifo) = &self.fifo else { return [0; 7] };
        let [a, b, c, d, e, f] = self.axes(&fifo.waveform, (number + 1) as f64 / fifo.rate_hz);
        // Sensor, a counter of two bits, and a bit that makes the parity of all even.
        let tag = TAG_ACCELEROMETER << 3 | ((number & 0x3) as u8) << 1;
        [tag | (tag.count_ones() % 2) as u8, a, b, c, d, e, f]
    }

    fn axes(&self, waveform: &Waveform, offset_s: f64) -> [u8; 6] {
        let step = STEP_MG[usize::from(self.registers[reg::CTRL1_XL] >> 2 & 0x3)] * 1e-3 * G;
        let radial = waveform.at(offset_s);
        let gravity = [0.0, 0.0, G];
        // `as` saturates at the ends of the range, as the chip does.
        let word =
            |axis: usize| (((AXES[axis] * radial + gravity[axis]) / step).round() as i16).to_le_bytes();
        let [[a, b], [c, d], [e, f]] = [word(0), word(1), word(2)];
        [a, b, c, d, e, f]
    }

    /// The address after `address`: the FIFO's output goes round, so that one read takes many words.
    fn after(&self, address: usize) -> usize {
        match address {
            reg::FIFO_DATA_OUT_Z_H => reg::FIFO_DATA_OUT_TAG,
            _ if self.registers[reg::CTRL3_C] & 0x04 == 0 => address,
            _ => (address + 1) & 0x7f,
        }
    }
}

impl SpiChip for Ism330dhcx {
    fn select(&mut self) {
        self.now = self.time.nanos();
        self.transfer = Transfer::Address;
    }

    fn exchange(&mut self, out: u8) -> u8 {
        match self.transfer {
            Transfer::Address => {
                let address = usize::from(out & 0x7f);
                self.transfer =
                    if out & 0x80 != 0 { Transfer::Read(address) } else { Transfer::Write(address) };
                0xff
            }
            Transfer::Read(address) => {
                self.transfer = Transfer::Read(self.after(address));
                self.read(address)
            }
            Transfer::Write(address) => {
                self.write(address, out);
                self.transfer = Transfer::Write(self.after(address));
                0xff
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use common::time::Timestamp;
    use embedded_hal::delay::DelayNs;

    use super::*;

    /// A chip at 1 m/s² radial: a shaft that stands at the crest of its first harmonic.
    fn chip() -> (Ism330dhcx, SimTime) {
        let time = SimTime::new(|| Timestamp::from_micros(0));
        let waveform = Waveform {
            origin_s: 0.25,
            shaft_hz: 1.0,
            harmonics: vec![1.0],
            impacts_hz: 1.0,
            impact: 0.0,
            resonance_hz: 1.0,
            decay_s: 1.0,
            sigma: 0.0,
            seed: 0,
        };
        (Ism330dhcx::new(time.clone(), Box::new(move |_| waveform.clone())), time)
    }

    fn read<const N: usize>(chip: &mut Ism330dhcx, register: u8) -> [u8; N] {
        chip.select();
        chip.exchange(register | 0x80);
        [0; N].map(|_: u8| chip.exchange(0))
    }

    fn write(chip: &mut Ism330dhcx, register: u8, value: u8) {
        chip.select();
        chip.exchange(register);
        chip.exchange(value);
    }

    /// 1,667 Hz, ±2 g, FIFO in this mode.
    fn start(chip: &mut Ism330dhcx, mode: u8) {
        write(chip, 0x10, 0x80);
        write(chip, 0x09, 0x08);
        write(chip, 0x0a, mode);
    }

    #[test]
    fn identity_and_reset() {
        let (mut chip, _) = chip();
        assert_eq!(read(&mut chip, 0x0f), [0x6b]);
        write(&mut chip, 0x0f, 0);
        assert_eq!(read(&mut chip, 0x0f), [0x6b], "read only");
        write(&mut chip, 0x10, 0x90);
        assert_eq!(read(&mut chip, 0x10), [0x90]);
        write(&mut chip, 0x12, 0x01);
        assert_eq!(read(&mut chip, 0x10), [0x00, 0x00, 0x04], "addresses increment");
    }

    #[test]
    fn fills_by_the_rate_and_is_read_in_one_transfer() {
        let (mut chip, time) = chip();
        start(&mut chip, MODE_CONTINUOUS);
        assert_eq!(read(&mut chip, 0x3a), [0, 0]);
        time.delay().delay_us(6_100);
        assert_eq!(read(&mut chip, 0x3a), [10, 0]);
        let words: [u8; 21] = read(&mut chip, 0x78);
        // Tags 0x02 with counters 0, 1, 2 and even parity; z is 1 g and a little: (9.807 + 0.3) / (0.061e-3 g).
        assert_eq!([words[0], words[7], words[14]], [0x11, 0x12, 0x14]);
        assert_eq!(i16::from_le_bytes([words[5], words[6]]), 16_895);
        assert_eq!(read(&mut chip, 0x3a), [7, 0]);
        write(&mut chip, 0x0a, 0);
        assert_eq!(read(&mut chip, 0x3a), [0, 0], "bypass empties it");
    }

    #[test]
    fn overrun_is_flagged_and_latched() {
        let (mut chip, time) = chip();
        start(&mut chip, MODE_CONTINUOUS);
        time.delay().delay_ms(307);
        assert_eq!(read(&mut chip, 0x3a), [0xff, 0x01], "511 words");
        time.delay().delay_ms(1);
        assert_eq!(read(&mut chip, 0x3a), [0x00, 0x6a], "full, overrun now and since");
        let _: [u8; 7] = read(&mut chip, 0x78);
        assert_eq!(read(&mut chip, 0x3a), [0xff, 0x01], "there is room again, and the latch was read");
    }

    #[test]
    fn fifo_mode_stops_when_full() {
        let (mut chip, time) = chip();
        start(&mut chip, MODE_FIFO);
        time.delay().delay_ms(1_000);
        assert_eq!(read(&mut chip, 0x3a), [0x00, 0x22]);
        let _: [u8; 14] = read(&mut chip, 0x78);
        time.delay().delay_ms(1_000);
        assert_eq!(read(&mut chip, 0x3a), [0xfe, 0x01]);
    }
}
