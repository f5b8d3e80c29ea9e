//! Simulated chips: the registers, timing and refusals of the data sheets, behind the traits of embedded-hal.
//!
//! A driver cannot tell them from the real ones: conversions take their time, a busy chip answers NACK, addresses
//! increment by themselves, words carry their checksums. Time is [`SimTime`]: a driver's wait moves it and nobody
//! sleeps. What a chip measures is a function of the instant, given to its constructor.
//!
//! | chip | bus | registers and commands that are simulated | left out |
//! |---|---|---|---|
//! | [`Ads1115`] | I2C 0x48–0x4B | conversion, config (OS, MUX, PGA, MODE, DR), thresholds as storage | comparator pin |
//! | [`Sht4x`] | I2C 0x44–0x46 | measure at three precisions, serial number, soft reset | heater |
//! | [`Ism330dhcx`] | SPI | identity, CTRL1_XL, CTRL3_C, FIFO_CTRL1–4, FIFO_STATUS1–2, FIFO output, OUT_A | gyroscope |

mod ads1115;
mod ism330dhcx;
mod sht4x;
mod time;

pub use self::{
    ads1115::Ads1115,
    ism330dhcx::Ism330dhcx,
    sht4x::Sht4x,
    time::{SimDelay, SimTime},
};

use common::time::Timestamp;

/// What a pin or a sensing element is exposed to, as a function of the instant.
pub type Input<T> = Box<dyn Fn(Timestamp) -> T + Send>;

/// The chip did not acknowledge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nack;

/// A chip on an I2C bus. One call is everything between two (repeated) start conditions.
pub trait I2cChip: Send {
    /// The controller writes `bytes`.
    fn write(&mut self, bytes: &[u8]) -> Result<(), Nack>;
    /// The controller reads as many bytes as `buffer` takes.
    fn read(&mut self, buffer: &mut [u8]) -> Result<(), Nack>;
}

/// A chip behind a chip select.
pub trait SpiChip: Send {
    /// Chip select becomes active: a transfer begins.
    fn select(&mut self);
    /// One byte goes out, one comes in.
    fn exchange(&mut self, out: u8) -> u8;
}
