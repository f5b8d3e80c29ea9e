//! The buses of a Linux gateway.

use std::time::Duration;

use anyhow::Context as _;
use embedded_hal::delay::DelayNs;
use linux_embedded_hal::{
    I2cdev, SpidevDevice,
    spidev::{SpiModeFlags, SpidevOptions},
};

use super::Hardware;

/// Clock of SPI in Hz: half of what the accelerometer allows, for the sake of a metre of cable.
const SPI_HZ: u32 = 5_000_000;

/// `/dev/i2c-*` and `/dev/spidev*`.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinuxHardware;

/// Sleeps on the thread that reads the bus.
#[derive(Clone, Copy, Debug, Default)]
pub struct SleepDelay;

impl DelayNs for SleepDelay {
    fn delay_ns(&mut self, ns: u32) {
        std::thread::sleep(Duration::from_nanos(ns.into()));
    }
}

impl Hardware for LinuxHardware {
    type I2c = I2cdev;
    type Spi = SpidevDevice;
    type Delay = SleepDelay;

    fn i2c(&self, path: &str) -> anyhow::Result<I2cdev> {
        I2cdev::new(path).with_context(|| {
            format!("opening i2c bus {path}; is the bus enabled, and the user in group i2c?")
        })
    }

    fn spi(&self, path: &str) -> anyhow::Result<SpidevDevice> {
        let context = || format!("opening spi device {path}; is the bus enabled, and the user in group spi?");
        let mut device = SpidevDevice::open(path).with_context(context)?;
        let options =
            SpidevOptions::new().bits_per_word(8).max_speed_hz(SPI_HZ).mode(SpiModeFlags::SPI_MODE_3).build();
        device.configure(&options).with_context(context)?;
        Ok(device)
    }

    fn delay(&self) -> SleepDelay {
        SleepDelay
    }
}
