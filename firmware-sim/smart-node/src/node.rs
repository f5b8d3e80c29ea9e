//! The node: a SHT4x read once a second, its features over a window, and the registers that show them.
//!
//! # Registers
//! Input registers (function 4); numbers of 32 bits have the high word first.
//!
//! | address | type | what |
//! |---|---|---|
//! | 0 | u32 | seconds since start |
//! | 2 | u16 | windows since start; 0 comes after 65,535 |
//! | 3 | u16 | samples in the last window |
//! | 4 | 4 × i32 | temperature in the last window: mean, min, max, RMS about the mean; 0.001 °C |
//! | 12 | 4 × i32 | relative humidity, the same; 0.001 % |
//!
//! Holding register 0 (functions 3, 6, 16): length of a window in s, 1 to 3,600; another value is refused with
//! exception 3. A write begins a new window. It is kept in RAM: after a restart it is [`DEFAULT_WINDOW_S`] again.
//!
//! Features are those of the last whole window. Until the first has ended, they are refused with exception 6 (busy);
//! when the sensor did not answer once in the whole window, with exception 4 (device failure). So no value ever
//! stands for "no value".
//!
//! # Time
//! A sample takes 8.3 ms, in which the node waits for its sensor: the UART's interrupt or DMA must keep the bytes
//! that come meanwhile, and an answer may be late by as much. Samples that fall due while the board was busy are left
//! out; the window ends by the clock all the same.

use embedded_hal::{delay::DelayNs, i2c::I2c};
use sht4x::{Precision, SensorData, Sht4x};

use crate::{
    pdu::{Exception, Registers, Table},
    rtu::Slave,
    window::{Features, Window},
};

pub use sht4x::Address;

/// Length of a window after a start, in s.
pub const DEFAULT_WINDOW_S: u16 = 10;
/// The longest window in s.
pub const MAX_WINDOW_S: u16 = 3_600;

/// Input register: seconds since start.
pub const UPTIME: u16 = 0;
/// Input register: windows since start.
pub const WINDOWS: u16 = 2;
/// Input register: samples in the last window.
pub const SAMPLES: u16 = 3;
/// First input register of the temperature's features: mean, min, max, RMS.
pub const TEMPERATURE: u16 = 4;
/// First input register of the humidity's features.
pub const HUMIDITY: u16 = 12;
/// Holding register: length of a window in s.
pub const WINDOW_S: u16 = 0;

/// One past the last input register.
const INPUT_END: usize = HUMIDITY as usize + 8;
/// The first input register that waits for a window.
const FIRST_FEATURE: usize = TEMPERATURE as usize;
const SECOND_US: u64 = 1_000_000;

/// The firmware, on any I2C bus and any delay.
pub struct Node<I, D> {
    sensor: Sht4x<I, D>,
    delay: D,
    slave: Slave,
    readings: Readings,
    started_us: u64,
    next_sample_us: u64,
}

impl<I: I2c, D: DelayNs> Node<I, D> {
    /// A node that starts at `now_us`, with its sensor at `sensor` on `i2c`, as `slave` on its line.
    pub fn new(i2c: I, delay: D, sensor: Address, slave: Slave, now_us: u64) -> Self {
        Self {
            sensor: Sht4x::new_with_address(i2c, sensor),
            delay,
            slave,
            readings: Readings::new(),
            started_us: now_us,
            next_sample_us: now_us,
        }
    }

    /// Takes bytes from the line that came at `now_us`. Poll first: what came before may be due.
    pub fn receive(&mut self, now_us: u64, bytes: &[u8]) {
        self.slave.receive(now_us, bytes);
    }

    /// When to [`poll`](Self::poll) at the latest, in µs.
    pub fn next_deadline(&self) -> u64 {
        self.slave.next_deadline().map_or(self.next_sample_us, |end| end.min(self.next_sample_us))
    }

    /// Does what is due at `now_us`; returns the bytes to send.
    pub fn poll(&mut self, now_us: u64) -> &[u8] {
        if now_us >= self.next_sample_us {
            let late_s = (now_us - self.next_sample_us) / SECOND_US;
            self.next_sample_us += (late_s + 1) * SECOND_US;
            let sample = self.sensor.measure_raw(Precision::High, &mut self.delay);
            self.readings.second(sample.ok().as_ref().map(thousandths), late_s + 1);
        }
        self.readings.uptime_s = ((now_us - self.started_us) / SECOND_US) as u32;
        self.slave.poll(now_us, &mut self.readings)
    }
}

/// Temperature in 0.001 °C and relative humidity in 0.001 %, by the formulas of the data sheet (Sensirion SHT4x, 4.6),
/// which let the humidity leave 0 to 100 % at its ends and have it cropped.
fn thousandths(raw: &SensorData) -> (i32, i32) {
    let scaled = |span: i32, word: u16| (i64::from(span) * i64::from(word) + 32_767) / 65_535;
    let temperature = scaled(175_000, raw.temperature) as i32 - 45_000;
    let humidity = scaled(125_000, raw.humidity) as i32 - 6_000;
    (temperature, humidity.clamp(0, 100_000))
}

/// What the registers show.
struct Readings {
    uptime_s: u32,
    window_s: u16,
    /// Seconds of the window under way.
    elapsed_s: u64,
    temperature: Window,
    humidity: Window,
    windows: u16,
    /// Samples, temperature and humidity of the last whole window, or why there are none.
    last: Result<(u16, Features, Features), Exception>,
}

impl Readings {
    fn new() -> Self {
        Self {
            uptime_s: 0,
            window_s: DEFAULT_WINDOW_S,
            elapsed_s: 0,
            temperature: Window::default(),
            humidity: Window::default(),
            windows: 0,
            last: Err(Exception::DEVICE_BUSY),
        }
    }

    /// `seconds` have passed, and this is the sample at their end.
    fn second(&mut self, sample: Option<(i32, i32)>, seconds: u64) {
        if let Some((temperature, humidity)) = sample {
            self.temperature.push(temperature);
            self.humidity.push(humidity);
        }
        self.elapsed_s += seconds;
        if self.elapsed_s < u64::from(self.window_s) {
            return;
        }
        // A window has at most 3,600 samples.
        let samples = self.temperature.count() as u16;
        self.last = match (self.temperature.features(), self.humidity.features()) {
            (Some(temperature), Some(humidity)) => Ok((samples, temperature, humidity)),
            _ => Err(Exception::DEVICE_FAILURE),
        };
        self.windows = self.windows.wrapping_add(1);
        self.begin();
    }

    /// Begins a new window.
    fn begin(&mut self) {
        self.elapsed_s = 0;
        self.temperature = Window::default();
        self.humidity = Window::default();
    }

    /// All input registers; what there is none of is 0.
    fn image(&self) -> [u16; INPUT_END] {
        let mut image = [0; INPUT_END];
        let mut put = |address: u16, value: u32| {
            let at = usize::from(address);
            image[at..at + 2].copy_from_slice(&[(value >> 16) as u16, value as u16]);
        };
        put(UPTIME, self.uptime_s);
        let mut samples = 0;
        if let Ok((count, temperature, humidity)) = self.last {
            samples = count;
            for (first, Features { mean, min, max, rms }) in
                [(TEMPERATURE, temperature), (HUMIDITY, humidity)]
            {
                for (address, value) in (first..).step_by(2).zip([mean, min, max, rms]) {
                    put(address, value.cast_unsigned());
                }
            }
        }
        image[usize::from(WINDOWS)] = self.windows;
        image[usize::from(SAMPLES)] = samples;
        image
    }
}

impl Registers for Readings {
    fn read(&self, table: Table, first: u16, values: &mut [u16]) -> Result<(), Exception> {
        let range = usize::from(first)..usize::from(first) + values.len();
        let image = self.image();
        let all = match table {
            Table::Holding => &[self.window_s][..],
            Table::Input => &image,
        };
        let shown = all.get(range.clone()).ok_or(Exception::ILLEGAL_ADDRESS)?;
        if table == Table::Input && range.end > FIRST_FEATURE {
            self.last?;
        }
        values.copy_from_slice(shown);
        Ok(())
    }

    fn write(&mut self, first: u16, values: &[u16]) -> Result<(), Exception> {
        let (WINDOW_S, &[window_s]) = (first, values) else { return Err(Exception::ILLEGAL_ADDRESS) };
        if !(1..=MAX_WINDOW_S).contains(&window_s) {
            return Err(Exception::ILLEGAL_VALUE);
        }
        self.window_s = window_s;
        self.begin();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
