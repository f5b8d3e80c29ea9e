//! Looks for what could be read, and writes a configuration of it: `edge-agent discover`.
//!
//! What is recognised stands in the file ready to run, as what it is before anybody has said what it measures: a
//! 4–20 mA loop is a current in mA. What is not recognised stands in it as a comment, and so does every Modbus unit:
//! the protocol does not say what a device is. Only `site`, `gateway` and `data_dir` are missing. How I2C addresses are
//! probed, and why that is safe, is said in [`i2c`]; a Modbus unit is asked for its first holding register.

pub mod i2c;
mod write;

use std::{ops::RangeInclusive, time::Duration};

use crate::source::{
    Hardware,
    modbus::{self, Address},
};

pub use self::{i2c::Answer, write::configuration};

/// What was found on a gateway.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Findings {
    /// Bus by bus, in the order of asking.
    pub i2c: Vec<I2cFinding>,
    /// Connection by connection and line by line.
    pub modbus: Vec<ModbusFinding>,
}

/// What was found on an I2C bus.
#[derive(Clone, Debug, PartialEq)]
pub struct I2cFinding {
    /// Such as `/dev/i2c-1`.
    pub path: String,
    /// Who answers at which address, or why the bus cannot be scanned.
    pub answers: Result<Vec<(u8, Answer)>, String>,
}

/// What was found on a Modbus connection or line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModbusFinding {
    /// Where.
    pub address: Address,
    /// The units that answer, or why nobody can be asked.
    pub units: Result<Vec<u8>, String>,
}

/// Units of slaves; a TCP device without slaves behind it is often asked as 255 (Modbus messaging on TCP/IP V1.0b,
/// 4.4.1.2).
pub const UNITS: [RangeInclusive<u8>; 2] = [1..=247, 255..=255];
/// How long a unit may take for its answer; what is not there takes as long.
pub const PATIENCE: Duration = Duration::from_millis(500);

impl Findings {
    /// Whether there was anything that could be asked.
    pub fn scanned(&self) -> bool {
        self.i2c.iter().any(|bus| bus.answers.is_ok()) || self.modbus.iter().any(|bus| bus.units.is_ok())
    }
}

/// Scans I2C buses; `progress` hears lines for a person who waits. Blocks.
pub fn scan_i2c<H: Hardware>(
    hardware: &H,
    paths: &[String],
    mut progress: impl FnMut(&str),
) -> Vec<I2cFinding> {
    let mut findings = Vec::new();
    for path in paths {
        let answers = hardware.i2c(path).map_err(|error| format!("{error:#}")).map(|mut bus| {
            i2c::scan(&mut bus, &mut hardware.delay(), |address| {
                if address % 16 == 0 || address == *i2c::ADDRESSES.start() {
                    progress(&format!(
                        "{path}: asking {address:#04x} to {:#04x}",
                        (address | 0x0f).min(0x77)
                    ));
                }
            })
        });
        match &answers {
            Ok(answers) => progress(&format!("{path}: {}", write::summary(answers))),
            Err(error) => progress(&format!("{path}: {error}")),
        }
        findings.push(I2cFinding { path: path.clone(), answers });
    }
    findings
}

/// Asks the `units` at each address; `progress` hears lines for a person who waits.
pub async fn scan_modbus(
    addresses: &[Address],
    units: &[RangeInclusive<u8>],
    patience: Duration,
    mut progress: impl FnMut(&str),
) -> Vec<ModbusFinding> {
    let mut findings = Vec::new();
    for address in addresses {
        let units = ask(address, units, patience, &mut progress).await.map_err(|error| format!("{error:#}"));
        match &units {
            Ok(units) => progress(&format!("{address}: {} units answer", units.len())),
            Err(error) => progress(error),
        }
        findings.push(ModbusFinding { address: address.clone(), units });
    }
    findings
}

async fn ask(
    address: &Address,
    units: &[RangeInclusive<u8>],
    patience: Duration,
    progress: &mut impl FnMut(&str),
) -> anyhow::Result<Vec<u8>> {
    let mut found = Vec::new();
    for range in units {
        let (first, last) = (*range.start(), *range.end());
        // No slave on a line has a unit above 247 (Modbus over serial line V1.02, 2.2).
        if matches!(address, Address::Rtu { .. }) && last > 247 {
            continue;
        }
        let at_most = (patience.as_secs_f64() * range.len() as f64).ceil();
        progress(&format!("{address}: asking units {first} to {last}; takes {at_most} s at most"));
        found.extend(modbus::probe(address, range.clone(), patience).await?);
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
