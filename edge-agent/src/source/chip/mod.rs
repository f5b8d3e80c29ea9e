//! Drivers of the chips a gateway reads, and the pure conversions from what a chip shows to what a loop carries.
//!
//! A driver borrows its bus for one call, so one bus serves any number of drivers without a lock, and a bus that
//! was dropped and opened again needs nothing from them. It returns physical quantities in SI units; engineering
//! units and quality are the source stage's. Nothing here retries: [`ChipError`] says what the caller does next.
//!
//! | chip | bus | shows | read by |
//! |---|---|---|---|
//! | [`ads1115`] | I2C | volts over the burden of a 4–20 mA loop | crate `ads1x1x` |
//! | [`sht4x`] | I2C | temperature in °C, relative humidity in % | crate `sht4x` |
//! | [`ism330dhcx`] | SPI | acceleration bursts in m/s² | this crate |

pub mod ads1115;
pub mod ism330dhcx;
pub mod sht4x;

pub use self::{ads1115::Ads1115, ism330dhcx::Ism330dhcx, sht4x::Sht4x};

/// Why a chip gave no value, grouped by what the caller does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChipError {
    /// Nobody answered: skip this poll and ask again at the next.
    #[error("no acknowledge from the chip; check its address, its supply and its wiring")]
    Nack,
    /// The bus itself failed: drop it and open it again. (Some Linux adapters report a missing chip so, too.)
    #[error("bus failed: {0}; it is opened again")]
    Bus(&'static str),
    /// The chip answers, but was not ready in time: reset it before the next poll.
    #[error("chip was not ready after {waited_us} µs; it is reset")]
    Timeout {
        /// How long the driver waited, in µs.
        waited_us: u32,
    },
    /// The value was damaged on its way: reject it, poll on.
    #[error("checksum of the answer is wrong; check the length of the cable and its pull-ups")]
    Crc,
    /// The chip's buffer ran over and the burst has a hole: reject it, poll on.
    #[error("fifo overran, the burst has a hole; poll the bus more often or choose a lower data rate")]
    Overrun,
    /// Another chip, or one in another state than the driver put it in: set it up again, and say so.
    #[error("unexpected answer {found:#04x}, wanted {wanted:#04x}; is it the right chip at this address?")]
    Protocol {
        /// What the chip should have answered.
        wanted: u8,
        /// What it answered.
        found: u8,
    },
}

impl ChipError {
    /// A short label, for the census and for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Nack => "nack",
            Self::Bus(_) => "bus",
            Self::Timeout { .. } => "timeout",
            Self::Crc => "crc",
            Self::Overrun => "overrun",
            Self::Protocol { .. } => "protocol",
        }
    }

    fn from_i2c(error: impl embedded_hal::i2c::Error) -> Self {
        use embedded_hal::i2c::ErrorKind;
        match error.kind() {
            ErrorKind::NoAcknowledge(_) => Self::Nack,
            ErrorKind::Bus => Self::Bus("misplaced start or stop"),
            ErrorKind::ArbitrationLoss => Self::Bus("arbitration lost"),
            ErrorKind::Overrun => Self::Bus("receive buffer overrun"),
            _ => Self::Bus("i2c transfer refused"),
        }
    }

    fn from_spi(error: impl embedded_hal::spi::Error) -> Self {
        use embedded_hal::spi::ErrorKind;
        match error.kind() {
            ErrorKind::Overrun => Self::Bus("receive buffer overrun"),
            ErrorKind::ModeFault => Self::Bus("spi mode fault"),
            ErrorKind::ChipSelectFault => Self::Bus("chip select failed"),
            _ => Self::Bus("spi transfer refused"),
        }
    }
}

/// The current in A of a loop that drops `volts` over a burden of `burden_ohm`.
pub fn loop_current(volts: f64, burden_ohm: f64) -> f64 {
    volts / burden_ohm
}

/// What NAMUR NE 43 says of a loop current.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ne43 {
    /// 3.8–20.5 mA: a measured value.
    Good,
    /// 3.6–3.8 or 20.5–21 mA: beyond the measuring range, the value is the range's end at best.
    Uncertain,
    /// Below 3.6 or above 21 mA: the transmitter reports a failure, or the loop is open or shorted.
    Bad,
}

/// Judges a loop current in A by NAMUR NE 43. A current that is not a number is bad.
pub fn ne43(current_a: f64) -> Ne43 {
    match current_a * 1e3 {
        ma if (3.8..=20.5).contains(&ma) => Ne43::Good,
        ma if (3.6..=21.0).contains(&ma) => Ne43::Uncertain,
        _ => Ne43::Bad,
    }
}

#[cfg(test)]
pub(crate) mod scripted;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namur_ne_43_limits() {
        let table = [
            (0.0, Ne43::Bad),
            (3.599, Ne43::Bad),
            (3.601, Ne43::Uncertain),
            (3.799, Ne43::Uncertain),
            (3.801, Ne43::Good),
            (4.0, Ne43::Good),
            (20.0, Ne43::Good),
            (20.499, Ne43::Good),
            (20.501, Ne43::Uncertain),
            (20.999, Ne43::Uncertain),
            (21.001, Ne43::Bad),
            (22.0, Ne43::Bad),
            (-4.0, Ne43::Bad),
            (f64::NAN, Ne43::Bad),
            (f64::INFINITY, Ne43::Bad),
        ];
        for (ma, wanted) in table {
            assert_eq!(ne43(ma / 1e3), wanted, "{ma} mA");
        }
    }

    #[test]
    fn burden_gives_the_current() {
        for (volts, ohm, ma) in [(0.4, 100.0, 4.0), (2.0, 100.0, 20.0), (5.0, 250.0, 20.0), (0.0, 100.0, 0.0)]
        {
            assert!((loop_current(volts, ohm) * 1e3 - ma).abs() < 1e-12, "{volts} V over {ohm} Ω");
        }
    }
}
