//! What a burst of acceleration says about a machine (pure).
//!
//! With x the samples less their mean, so that gravity and the sensor's offset are gone:
//!
//! | feature | what it is | unit |
//! |---|---|---|
//! | rms | √(mean of x²) | m/s² |
//! | peak | the largest \|x\| | m/s² |
//! | crest factor | peak ÷ rms: √2 for a sine, more where something strikes | 1 |
//! | kurtosis | Pearson's, mean of x⁴ ÷ (mean of x²)², not corrected for the number of samples: 1.5 for a sine, 3 for normal noise, more where something strikes | 1 |
//! | band | RMS of what lies in low ≤ f < high, from the spectrum; the squares of neighbouring bands add up | m/s² |
//! | velocity | RMS of the vibration velocity, 10 (or 2) to 1000 Hz | mm/s |
//! | zone | of ISO 20816-3 by that velocity: 1, 2, 3, 4 for A, B, C, D | 1 |
//!
//! # The spectrum
//! One FFT over the whole burst under a Hann window. A line is the mean square at its frequency, corrected for the
//! window's own (3/8), so that the lines add up to the mean square of x. A tone is spread over four lines.
//!
//! # Velocity
//! a = ω · v, so each line is divided by (2πf)² and weighted by the band of ISO 2954: a third-order Butterworth high
//! pass and low pass, 18 dB an octave. The −3 dB points lie half a third of an octave outside of the nominal band
//! (8.91 and 1122 Hz; 1.78 Hz for the slow machines): that keeps the gain at 10 and at 1000 Hz at 0.82, where the
//! standard allows 0.8 to 1.1. The lowest frequency is 2 Hz where the machine turns at less than 600 r/min (ISO
//! 20816-3). A burst holds ten cycles of the lowest frequency at least, and its rate shows 1000 Hz: see
//! [`Feature::needs`].
//!
//! # Zones
//! ISO 20816-3:2022, Tables A.1 and A.2 (as ISO 10816-3:2009), by velocity alone; displacement, which the standard
//! judges besides where the machine is slow, is not. A velocity on a limit is still in the better zone.

use std::{cell::LazyCell, f64::consts::TAU};

use rustfft::{FftPlanner, num_complex::Complex};

use crate::source::chip::ism330dhcx::Burst;

/// Upper end of the velocity's band in Hz.
const HIGH_HZ: f64 = 1_000.0;
/// Half a third of an octave, base ten (IEC 61260-1): from the end of the band to its −3 dB point.
const EDGE: f64 = 1.122_018_454_301_963_4;
/// Cycles of the lowest frequency that a burst holds at least.
const CYCLES: f64 = 10.0;
/// Lines of the spectrum that a tone is spread over, and the least that a band is wide.
const LOBE_LINES: f64 = 4.0;

/// Codes of the zones and their letters.
pub const ZONES: [(&str, &str); 4] = [("1", "A"), ("2", "B"), ("3", "C"), ("4", "D")];

/// Something that is made of a burst; the table is in the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Feature {
    /// Root mean square about the mean.
    Rms,
    /// The largest distance from the mean.
    Peak,
    /// Peak by RMS.
    CrestFactor,
    /// Pearson's.
    Kurtosis,
    /// RMS of what lies in a band.
    Band {
        /// From this frequency in Hz, included …
        low_hz: f64,
        /// … to this one, excluded.
        high_hz: f64,
    },
    /// RMS of the vibration velocity.
    Velocity {
        /// Lower end of the band in Hz: see [`lowest_hz`].
        low_hz: f64,
    },
    /// Zone of ISO 20816-3.
    Zone {
        /// Lower end of the velocity's band in Hz.
        low_hz: f64,
        /// Upper limits of zones A, B, C in mm/s: see [`zone_limits`].
        limits: [f64; 3],
    },
}

/// What a burst must show for a feature to be true.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Needs {
    /// Acceleration up to this frequency in Hz: half the sampling rate, or less.
    pub reach_hz: f64,
    /// A burst at least this long, in s.
    pub duration_s: f64,
}

impl Feature {
    /// UCUM code of the unit in which [`measure`] gives it.
    pub const fn unit(self) -> &'static str {
        match self {
            Self::Rms | Self::Peak | Self::Band { .. } => "m/s2",
            Self::CrestFactor | Self::Kurtosis | Self::Zone { .. } => "1",
            Self::Velocity { .. } => "mm/s",
        }
    }

    /// What a burst must show for it.
    pub fn needs(self) -> Needs {
        match self {
            Self::Rms | Self::Peak | Self::CrestFactor | Self::Kurtosis => Needs::default(),
            Self::Band { low_hz, high_hz } => {
                Needs { reach_hz: high_hz, duration_s: LOBE_LINES / (high_hz - low_hz) }
            }
            Self::Velocity { low_hz } | Self::Zone { low_hz, .. } => {
                Needs { reach_hz: HIGH_HZ, duration_s: CYCLES / low_hz }
            }
        }
    }
}

/// Lower end in Hz of the velocity's band for a machine of this rated speed in r/min.
pub fn lowest_hz(rated_speed_rpm: Option<f64>) -> f64 {
    if rated_speed_rpm.is_some_and(|rpm| rpm < 600.0) { 2.0 } else { 10.0 }
}

/// Upper limits of zones A, B, C in mm/s, for machines of group 1 (large: above 300 kW, or with a shaft height of
/// 315 mm and more) and group 2 (medium: 15 to 300 kW, or 160 to 315 mm) on a `rigid` or `flexible` support.
pub fn zone_limits(group: u8, support: &str) -> Option<[f64; 3]> {
    match (group, support) {
        (1, "rigid") => Some([2.3, 4.5, 7.1]),
        (1, "flexible") => Some([3.5, 7.1, 11.0]),
        (2, "rigid") => Some([1.4, 2.8, 4.5]),
        (2, "flexible") => Some([2.3, 4.5, 7.1]),
        _ => None,
    }
}

/// The features of a burst, in their order; not a number where the burst does not define one (the crest factor and
/// the kurtosis of a burst that does not move). The burst has samples, and they are finite.
pub fn measure(burst: &Burst, features: impl IntoIterator<Item = Feature>) -> Vec<f64> {
    let n = burst.samples.len() as f64;
    let mean = burst.samples.iter().sum::<f64>() / n;
    let swing: Vec<f64> = burst.samples.iter().map(|a| a - mean).collect();
    let moment = |order| swing.iter().map(|x| x.powi(order)).sum::<f64>() / n;
    let mean_square = moment(2);
    let peak = swing.iter().fold(0.0, |peak: f64, x| peak.max(x.abs()));
    let spectrum = LazyCell::new(|| Spectrum::of(&swing, burst.rate_hz));
    let measure = |feature| match feature {
        Feature::Rms => mean_square.sqrt(),
        Feature::Peak => peak,
        Feature::CrestFactor => peak / mean_square.sqrt(),
        Feature::Kurtosis => moment(4) / mean_square.powi(2),
        Feature::Band { low_hz, high_hz } => spectrum.band_rms(low_hz, high_hz),
        Feature::Velocity { low_hz } => spectrum.velocity_rms(low_hz),
        Feature::Zone { low_hz, limits } => zone(spectrum.velocity_rms(low_hz), limits),
    };
    features.into_iter().map(measure).collect()
}

/// 1 to 4 for A to D.
fn zone(velocity: f64, limits: [f64; 3]) -> f64 {
    let passed = limits.into_iter().filter(|limit| velocity > *limit).count();
    1.0 + passed as f64
}

/// Mean squares of the acceleration by frequency.
struct Spectrum {
    /// Hz from line to line; the first one is at 0.
    line_hz: f64,
    /// In (m/s²)².
    lines: Vec<f64>,
}

impl Spectrum {
    fn of(swing: &[f64], rate_hz: f64) -> Self {
        let n = swing.len();
        let windowed = swing.iter().enumerate().map(|(i, x)| {
            let hann = 0.5 - 0.5 * (TAU * i as f64 / n as f64).cos();
            Complex::from(x * hann)
        });
        let mut bins: Vec<Complex<f64>> = windowed.collect();
        FftPlanner::new().plan_fft_forward(n).process(&mut bins);
        // The bins above n/2 mirror those below: their energy is counted with them.
        let window_square = 3.0 / 8.0 * n as f64;
        let lines = bins[..=n / 2].iter().enumerate().map(|(k, bin)| {
            let mirrored = if k == 0 || 2 * k == n { 1.0 } else { 2.0 };
            mirrored * bin.norm_sqr() / (window_square * n as f64)
        });
        Self { line_hz: rate_hz / n as f64, lines: lines.collect() }
    }

    /// Root of the sum of all lines, each times its weight.
    fn weighted_rms(&self, weight: impl Fn(f64) -> f64) -> f64 {
        let weighted = self.lines.iter().enumerate().map(|(k, line)| line * weight(k as f64 * self.line_hz));
        weighted.sum::<f64>().sqrt()
    }

    /// In m/s².
    fn band_rms(&self, low_hz: f64, high_hz: f64) -> f64 {
        self.weighted_rms(|hz| f64::from((low_hz..high_hz).contains(&hz)))
    }

    /// In mm/s.
    fn velocity_rms(&self, low_hz: f64) -> f64 {
        let (low_hz, high_hz) = (low_hz / EDGE, HIGH_HZ * EDGE);
        // (low/f)⁶ ÷ (2πf)² written so that the line at 0 has the weight 0.
        1e3 * self.weighted_rms(|hz| {
            let high_pass = hz.powi(4) / (hz.powi(6) + low_hz.powi(6));
            let low_pass = 1.0 / (1.0 + (hz / high_hz).powi(6));
            high_pass * low_pass / TAU.powi(2)
        })
    }
}

#[cfg(test)]
mod tests;
