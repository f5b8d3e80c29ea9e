//! Who is on an I2C bus (pure, but for the bus).
//!
//! **Probing reads; no register of any chip is written.** One byte is read from every address from 0x08 to 0x77: a
//! chip acknowledges its address or nobody does. (The other way, an empty write, is what i2cdetect does by default;
//! there are EEPROMs that it damages: see its manual page on the AT24RF08.) The addresses below and above are reserved
//! by the standard (NXP UM10204, 3.1.12). 0x69 is left out: a read there can hang the bus where a write-only clock
//! generator sits (i2cdetect's manual page again).
//!
//! A read moves the read position of chips that have one, and can take a word out of a FIFO, so nothing else should
//! read the bus meanwhile: stop the agent.
//!
//! Where a driver of ours has its chip, a few bytes select what is read, and no more:
//!
//! | address | bytes written | what else may sit there |
//! |---|---|---|
//! | 0x44–0x46 | 0x89, the SHT4x's "read serial number"; idle, it acknowledges no read, so it is always asked | INA219, INA226, ISL29125: 0x89 is the number of a register that they do not have |
//! | 0x48–0x4B, if one answers | 1, 2, 3: pointers of three registers of the ADS1115 | LM75, TMP102, TMP117: pointers of theirs, too. A PCF8591 takes them for its control byte and switches its analogue output off |

use embedded_hal::{
    delay::DelayNs,
    i2c::{Error as _, ErrorKind, I2c},
};

use crate::source::chip::{Sht4x, ads1115};

/// Addresses that are asked, in order.
pub const ADDRESSES: std::ops::RangeInclusive<u8> = 0x08..=0x77;
/// See the module's documentation.
pub const LEFT_OUT: u8 = 0x69;

/// Who answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Registers look like an ADS1115's.
    Ads1115,
    /// Its serial number came with two right checksums.
    Sht4x {
        /// The number.
        serial: u32,
    },
    /// Somebody.
    Unknown,
    /// The bus failed otherwise than by silence. Linux says so where one of its own drivers holds the chip (EBUSY),
    /// and some adapters say so of absent chips (EIO).
    Fault,
}

/// Asks every address; `next` hears each before it is asked. Silence is no answer.
pub fn scan<I: I2c>(i2c: &mut I, delay: &mut impl DelayNs, mut next: impl FnMut(u8)) -> Vec<(u8, Answer)> {
    let mut answers = Vec::new();
    for address in ADDRESSES.filter(|address| *address != LEFT_OUT) {
        next(address);
        answers.extend(ask(i2c, delay, address).map(|answer| (address, answer)));
    }
    answers
}

fn ask<I: I2c>(i2c: &mut I, delay: &mut impl DelayNs, address: u8) -> Option<Answer> {
    let serial = Sht4x::new(address).and_then(|chip| chip.serial_number(i2c, delay).ok());
    if let Some(serial) = serial {
        return Some(Answer::Sht4x { serial });
    }
    match i2c.read(address, &mut [0]) {
        Ok(()) => {
            let ours = ads1115::Ads1115::new(address).is_some();
            let looks_like_one = ours && ads1115::looks_like_one(address, i2c) == Ok(true);
            Some(if looks_like_one { Answer::Ads1115 } else { Answer::Unknown })
        }
        Err(error) => (error.kind() == ErrorKind::Bus).then_some(Answer::Fault),
    }
}

/// What often sits at an address, to go and look for.
pub fn usual(address: u8) -> Option<&'static str> {
    let what = match address {
        0x18..=0x1f => "an accelerometer or an MCP9808",
        0x20..=0x27 => "a port expander (PCF8574, MCP23017)",
        0x38..=0x3f => "a port expander (PCF8574A) or a display",
        0x40..=0x4f => "a power meter (INA219, INA226), a thermometer (LM75, TMP102) or a converter",
        0x50..=0x57 => "an EEPROM",
        0x60..=0x67 => "a thermocouple converter (MCP9600) or a DAC (MCP4725)",
        0x68 => "a clock (DS3231) or an inertial sensor",
        0x76 | 0x77 => "a barometer (BME280, BMP280, MS5611)",
        _ => return None,
    };
    Some(what)
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, collections::BTreeMap};

    use embedded_hal::i2c::{ErrorType, NoAcknowledgeSource, Operation};

    use super::*;
    use crate::source::chip::scripted::Delays;

    /// What a chip answers: to a read alone, and to a read after these bytes.
    #[derive(Default)]
    struct Chip {
        alone: Option<Vec<u8>>,
        after: BTreeMap<Vec<u8>, Vec<u8>>,
        fault: Option<ErrorKind>,
    }

    /// A bus that notes everything that is written.
    #[derive(Default)]
    struct Bus {
        chips: BTreeMap<u8, Chip>,
        selected: Vec<u8>,
        written: RefCell<Vec<(u8, Vec<u8>)>>,
        asked: Vec<u8>,
    }

    impl ErrorType for Bus {
        type Error = ErrorKind;
    }

    impl I2c for Bus {
        fn transaction(&mut self, address: u8, operations: &mut [Operation<'_>]) -> Result<(), ErrorKind> {
            let nack = ErrorKind::NoAcknowledge(NoAcknowledgeSource::Address);
            self.asked.push(address);
            for operation in operations {
                if let Operation::Write(bytes) = operation {
                    self.written.borrow_mut().push((address, bytes.to_vec()));
                }
                let chip = self.chips.get(&address).ok_or(nack)?;
                if let Some(fault) = chip.fault {
                    return Err(fault);
                }
                match operation {
                    Operation::Write(bytes) => self.selected = bytes.to_vec(),
                    Operation::Read(buffer) => {
                        let selected = chip.after.get(&std::mem::take(&mut self.selected));
                        let answer = selected.or(chip.alone.as_ref()).ok_or(nack)?;
                        buffer.iter_mut().zip(answer.iter().cycle()).for_each(|(to, from)| *to = *from);
                    }
                }
            }
            Ok(())
        }
    }

    fn registers(words: [u16; 3]) -> Chip {
        let after = (1u8..).zip(words).map(|(pointer, word)| (vec![pointer], word.to_be_bytes().to_vec()));
        Chip { alone: Some(vec![0, 0]), after: after.collect(), fault: None }
    }

    fn serial(answer: [u8; 6]) -> Chip {
        Chip { after: BTreeMap::from([(vec![0x89], answer.to_vec())]), ..Chip::default() }
    }

    #[test]
    fn recognises_our_chips_and_writes_only_what_selects() {
        let somebody = || Chip { alone: Some(vec![0x58]), ..Chip::default() };
        let held = || Chip { fault: Some(ErrorKind::Bus), ..Chip::default() };
        let mut bus = Bus {
            chips: BTreeMap::from([
                (0x07, somebody()),
                (0x08, somebody()),
                // The example of Sensirion's data sheet: 0xBEEF has the CRC 0x92.
                (0x44, serial([0xbe, 0xef, 0x92, 0x00, 0x00, 0x81])),
                (0x45, serial([0xbe, 0xef, 0x93, 0x00, 0x00, 0x81])),
                (0x46, somebody()),
                // After power-up; while it converts at another rate; a TMP102; a comparator in use.
                (0x48, registers([0x8583, 0x8000, 0x7fff])),
                (0x49, registers([0x42e3, 0x8000, 0x7fff])),
                (0x4a, registers([0x60a0, 0x4b00, 0x5000])),
                (0x4b, registers([0x8580, 0x8000, 0x7fff])),
                (0x68, held()),
                (0x69, somebody()),
                (0x70, Chip { fault: Some(ErrorKind::Other), ..Chip::default() }),
                (0x77, somebody()),
                (0x78, somebody()),
            ]),
            ..Bus::default()
        };
        let mut heard = Vec::new();
        let answers = scan(&mut bus, &mut Delays::default(), |address| heard.push(address));
        let wanted = [
            (0x08, Answer::Unknown),
            (0x44, Answer::Sht4x { serial: 0xbeef_0000 }),
            (0x46, Answer::Unknown),
            (0x48, Answer::Ads1115),
            (0x49, Answer::Ads1115),
            (0x4a, Answer::Unknown),
            (0x4b, Answer::Unknown),
            (0x68, Answer::Fault),
            (0x77, Answer::Unknown),
        ];
        assert_eq!(answers, wanted);
        assert_eq!((heard.len(), heard[0], heard[heard.len() - 1]), (0x77 - 0x08, 0x08, 0x77));
        assert!(bus.asked.iter().all(|address| ADDRESSES.contains(address) && *address != LEFT_OUT));
        for (address, bytes) in bus.written.take() {
            let selects = match address {
                0x44..=0x46 => bytes == [0x89],
                0x48..=0x4b => bytes.len() == 1 && (1..=3).contains(&bytes[0]),
                _ => false,
            };
            assert!(selects, "{bytes:02x?} was written to {address:#04x}");
        }
    }

    #[test]
    fn an_empty_bus_is_silent() {
        assert_eq!(scan(&mut Bus::default(), &mut Delays::default(), |_| {}), []);
    }
}
