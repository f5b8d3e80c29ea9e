//! Looks for what could be read, and writes a configuration of it: `edge-agent discover`.
//!
//! What is recognised stands in the file ready to run, as what it is before anybody has said what it measures: a
//! 4–20 mA loop is a current in mA. What is not recognised stands in it as a comment. Only `site`, `gateway` and
//! `data_dir` are missing. How addresses are probed, and why that is safe, is said in [`i2c`].

pub mod i2c;
mod write;

use crate::source::Hardware;

pub use self::{i2c::Answer, write::configuration};

/// What was found on a gateway.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Findings {
    /// Bus by bus, in the order of asking.
    pub i2c: Vec<I2cFinding>,
}

/// What was found on an I2C bus.
#[derive(Clone, Debug, PartialEq)]
pub struct I2cFinding {
    /// Such as `/dev/i2c-1`.
    pub path: String,
    /// Who answers at which address, or why the bus cannot be scanned.
    pub answers: Result<Vec<(u8, Answer)>, String>,
}

impl Findings {
    /// Whether there was a bus that could be scanned.
    pub fn scanned(&self) -> bool {
        self.i2c.iter().any(|bus| bus.answers.is_ok())
    }
}

/// Scans the buses; `progress` hears lines for a person who waits. Blocks.
pub fn discover<H: Hardware>(hardware: &H, i2c: &[String], mut progress: impl FnMut(&str)) -> Findings {
    let mut findings = Findings::default();
    for path in i2c {
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
        findings.i2c.push(I2cFinding { path: path.clone(), answers });
    }
    findings
}

#[cfg(test)]
mod tests;
