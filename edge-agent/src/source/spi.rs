//! An accelerometer on SPI, read in bursts.

use std::{sync::Arc, time::Duration};

use common::{
    reading::{DeviceIx, Quality, Reading},
    time::Timestamp,
};

use super::{
    Hardware,
    bus::{self, Bus, Poll},
    chip::{ChipError, Ism330dhcx, ism330dhcx},
    no_value,
};

/// How long a burst lasts.
pub fn duration(burst: &ism330dhcx::Settings) -> Duration {
    Duration::from_secs_f64(burst.samples as f64 / burst.rate.hz())
}

/// A chip and the devices that it feeds.
pub struct Accelerometer<H: Hardware> {
    hardware: Arc<H>,
    path: String,
    period: Duration,
    chip: Ism330dhcx,
    rms: Option<(DeviceIx, f64)>,
    peak: Option<(DeviceIx, f64)>,
    open: Option<H::Spi>,
    failing: bool,
    delay: H::Delay,
}

impl<H: Hardware> Accelerometer<H> {
    /// A device that is opened at its first poll. `rms` and `peak` are devices and the factor from m/s² into their
    /// units.
    pub fn new(
        hardware: Arc<H>,
        path: String,
        period: Duration,
        burst: ism330dhcx::Settings,
        rms: Option<(DeviceIx, f64)>,
        peak: Option<(DeviceIx, f64)>,
    ) -> Self {
        let (delay, chip) = (hardware.delay(), Ism330dhcx::new(burst));
        Self { hardware, path, period, chip, rms, peak, open: None, failing: false, delay }
    }

    fn devices(&self) -> Vec<DeviceIx> {
        [self.rms, self.peak].into_iter().flatten().map(|(device, _)| device).collect()
    }
}

impl<H: Hardware> Bus for Accelerometer<H> {
    fn probes(&self) -> Vec<(Duration, Vec<DeviceIx>)> {
        vec![(self.period, self.devices())]
    }

    fn poll(&mut self, at: Timestamp, _due: &[usize]) -> Poll {
        let none = self.devices().into_iter().map(|device| no_value(at, device)).collect();
        let open = || self.hardware.spi(&self.path);
        let Some(spi) = bus::open(&mut self.open, &mut self.failing, &self.path, open) else {
            return Poll { readings: none, faults: vec!["open"] };
        };
        match self.chip.burst(spi, &mut self.delay) {
            Ok(burst) => {
                let targets = [(self.rms, burst.rms()), (self.peak, burst.peak())];
                let readings = targets.into_iter().filter_map(|(target, value)| {
                    let (device, scale) = target?;
                    Some(Reading { ts: at, device, quality: Quality::Good, value: value * scale })
                });
                Poll { readings: readings.collect(), faults: Vec::new() }
            }
            Err(error) => {
                tracing::debug!(path = self.path, %error, "no burst");
                if matches!(error, ChipError::Bus(_)) {
                    self.open = None;
                }
                Poll { readings: none, faults: vec![error.reason()] }
            }
        }
    }
}
