//! A bus that plays a script: every transfer must be the next one of the script, to the byte.

use embedded_hal::{
    delay::DelayNs,
    i2c::{ErrorKind, ErrorType, I2c, NoAcknowledgeSource, Operation},
    spi::{self, SpiDevice},
};

/// One expected transfer and its answer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    Write(&'static [u8]),
    Read(&'static [u8]),
    WriteRead(&'static [u8], &'static [u8]),
    /// Any transfer, not acknowledged.
    Nack,
    /// Any transfer, broken by the bus.
    BusFault,
}

/// An I2C bus with one chip on it.
pub(crate) struct I2cScript {
    address: u8,
    steps: std::slice::Iter<'static, Step>,
}

impl I2cScript {
    pub(crate) fn new(address: u8, steps: &'static [Step]) -> Self {
        Self { address, steps: steps.iter() }
    }

    /// Fails unless the whole script was played.
    pub(crate) fn done(self) {
        assert_eq!(self.steps.as_slice().len(), 0, "left of the script: {:?}", self.steps);
    }
}

impl ErrorType for I2cScript {
    type Error = ErrorKind;
}

impl I2c for I2cScript {
    fn transaction(&mut self, address: u8, operations: &mut [Operation<'_>]) -> Result<(), ErrorKind> {
        assert_eq!(address, self.address);
        let step = self.steps.next().expect("a transfer after the end of the script");
        match (step, operations) {
            (Step::Nack, _) => return Err(ErrorKind::NoAcknowledge(NoAcknowledgeSource::Address)),
            (Step::BusFault, _) => return Err(ErrorKind::Bus),
            (Step::Write(wanted), [Operation::Write(bytes)]) => assert_eq!(bytes, wanted),
            (Step::Read(answer), [Operation::Read(buffer)]) => buffer.copy_from_slice(answer),
            (Step::WriteRead(wanted, answer), [Operation::Write(bytes), Operation::Read(buffer)]) => {
                assert_eq!(bytes, wanted);
                buffer.copy_from_slice(answer);
            }
            (step, operations) => panic!("wanted {step:?}, got {operations:?}"),
        }
        Ok(())
    }
}

/// Adds up the waits and sleeps for none.
#[derive(Default)]
pub(crate) struct Delays {
    pub(crate) total_ns: u64,
}

impl DelayNs for Delays {
    fn delay_ns(&mut self, ns: u32) {
        self.total_ns += u64::from(ns);
    }
}

/// One expected SPI transaction.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Transfer {
    /// These bytes are written.
    Write(&'static [u8]),
    /// This register is read, with this answer.
    Read(u8, &'static [u8]),
}

/// An SPI device.
pub(crate) struct SpiScript {
    steps: std::vec::IntoIter<Transfer>,
}

impl SpiScript {
    pub(crate) fn new(steps: Vec<Transfer>) -> Self {
        Self { steps: steps.into_iter() }
    }

    /// Fails unless the whole script was played.
    pub(crate) fn done(self) {
        assert_eq!(self.steps.as_slice().len(), 0, "left of the script: {:?}", self.steps);
    }
}

impl spi::ErrorType for SpiScript {
    type Error = spi::ErrorKind;
}

impl SpiDevice for SpiScript {
    fn transaction(&mut self, operations: &mut [spi::Operation<'_, u8>]) -> Result<(), spi::ErrorKind> {
        let step = self.steps.next().expect("a transfer after the end of the script");
        match (step, operations) {
            (Transfer::Write(wanted), [spi::Operation::Write(bytes)]) => assert_eq!(*bytes, wanted),
            (
                Transfer::Read(register, answer),
                [spi::Operation::Write(address), spi::Operation::Read(buffer)],
            ) => {
                assert_eq!(*address, [register | 0x80]);
                buffer.copy_from_slice(answer);
            }
            (step, operations) => panic!("wanted {step:?}, got {operations:?}"),
        }
        Ok(())
    }
}
