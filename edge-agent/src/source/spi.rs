//! An accelerometer on SPI, read in bursts; each of its devices shows a feature of the burst.

use std::{sync::Arc, time::Duration};

use common::{
    reading::{DeviceIx, Quality, Reading},
    time::Timestamp,
};

use super::{
    Hardware,
    bus::{self, Bus, Poll},
    chip::{
        ChipError, Ism330dhcx,
        ism330dhcx::{self, Burst},
    },
    no_value,
};
use crate::{settings::BurstOutput, vibration};

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
    outputs: Vec<BurstOutput>,
    open: Option<H::Spi>,
    failing: bool,
    delay: H::Delay,
}

impl<H: Hardware> Accelerometer<H> {
    /// A device that is opened at its first poll.
    pub fn new(
        hardware: Arc<H>,
        path: String,
        period: Duration,
        burst: ism330dhcx::Settings,
        outputs: Vec<BurstOutput>,
    ) -> Self {
        let (delay, chip) = (hardware.delay(), Ism330dhcx::new(burst));
        Self { hardware, path, period, chip, outputs, open: None, failing: false, delay }
    }
}

impl<H: Hardware> Bus for Accelerometer<H> {
    fn probes(&self) -> Vec<(Duration, Vec<DeviceIx>)> {
        vec![(self.period, self.outputs.iter().map(|output| output.device).collect())]
    }

    fn poll(&mut self, at: Timestamp, _due: &[usize]) -> Poll {
        let none = || self.outputs.iter().map(|output| no_value(at, output.device)).collect();
        let open = || self.hardware.spi(&self.path);
        let Some(spi) = bus::open(&mut self.open, &mut self.failing, &self.path, open) else {
            return Poll { readings: none(), faults: vec!["open"] };
        };
        match self.chip.burst(spi, &mut self.delay) {
            Ok(burst) => Poll { readings: readings(at, &burst, &self.outputs), faults: Vec::new() },
            Err(error) => {
                tracing::debug!(path = self.path, %error, "no burst");
                if matches!(error, ChipError::Bus(_)) {
                    self.open = None;
                }
                Poll { readings: none(), faults: vec![error.reason()] }
            }
        }
    }
}

/// Uncertain where the acceleration went beyond the chip's range; bad where the burst does not define the feature.
fn readings(at: Timestamp, burst: &Burst, outputs: &[BurstOutput]) -> Vec<Reading> {
    let quality = if burst.clipped { Quality::Uncertain } else { Quality::Good };
    let values = vibration::measure(burst, outputs.iter().map(|output| output.feature));
    let reading = |(output, value): (&BurstOutput, f64)| {
        if value.is_nan() {
            return no_value(at, output.device);
        }
        Reading { ts: at, device: output.device, quality, value: value * output.scale }
    };
    outputs.iter().zip(values).map(reading).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vibration::Feature;

    #[test]
    fn a_feature_is_a_reading_with_its_quality() {
        let output = |ix, feature, scale| BurstOutput { feature, device: DeviceIx(ix), scale };
        let outputs = [output(4, Feature::Peak, 1e3), output(2, Feature::CrestFactor, 1.0)];
        let at = Timestamp::from_micros(7);
        let check = |samples: [f64; 4], clipped, wanted: [(Quality, Option<f64>); 2]| {
            let burst = Burst { rate_hz: 1e3, samples: samples.to_vec(), clipped };
            for ((reading, output), (quality, value)) in
                readings(at, &burst, &outputs).iter().zip(&outputs).zip(wanted)
            {
                let got = (reading.ts, reading.device, reading.quality);
                assert_eq!(got, (at, output.device, quality));
                assert_eq!(Some(reading.value).filter(|value| !value.is_nan()), value);
            }
        };
        let (good, uncertain) = (Quality::Good, Quality::Uncertain);
        check([9.0, 11.0, 9.0, 11.0], false, [(good, Some(1e3)), (good, Some(1.0))]);
        check([9.0, 11.0, 9.0, 11.0], true, [(uncertain, Some(1e3)), (uncertain, Some(1.0))]);
        check([9.0; 4], false, [(good, Some(0.0)), (Quality::Bad, None)]);
    }
}
