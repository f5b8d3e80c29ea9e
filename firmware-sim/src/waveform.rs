//! **Synthetic** acceleration of a bearing housing: no machine made it.
//!
//! ```text
//! a(t) = Σ_k A_k · sin(2π k f t)  +  Σ_i I · e^(−(t − t_i)/d) · sin(2π r (t − t_i))  +  σ · noise(t)
//! t_i  = i / BPFO ≤ t,   BPFO = N/2 · f · (1 − ball/pitch · cos 0°)
//! ```
//!
//! f: shaft speed. The first sum is unbalance and misalignment at the harmonics of the shaft. The second is a defect of
//! the outer race: each rolling element that passes it strikes once, N/2 · (1 − …) times a turn (ball pass frequency,
//! outer race: Harris and Kotzalas, *Rolling Bearing Analysis*), and each strike rings at a resonance r of the
//! structure and dies away with time constant d (the model of McFadden and Smith, *Journal of Sound and Vibration*
//! 96, 1984). I grows over the loop of the plant. All is pure in t.

use std::f64::consts::TAU;

use crate::noise;

/// How many times an outer race defect is struck in one turn of the shaft; contact angle 0.
pub fn bpfo_per_turn(balls: f64, ball_mm: f64, pitch_mm: f64) -> f64 {
    balls / 2.0 * (1.0 - ball_mm / pitch_mm)
}

/// The acceleration around one instant.
#[derive(Debug, Clone, PartialEq)]
pub struct Waveform {
    /// Seconds between the instant and the time that phases are counted from.
    pub origin_s: f64,
    /// Shaft speed in Hz.
    pub shaft_hz: f64,
    /// Amplitudes at 1, 2, 3, … times the shaft speed, in m/s².
    pub harmonics: Vec<f64>,
    /// Strikes a second on the outer race.
    pub impacts_hz: f64,
    /// Amplitude of a strike in m/s².
    pub impact: f64,
    /// What a strike makes ring, in Hz.
    pub resonance_hz: f64,
    /// Time constant of the ringing in s.
    pub decay_s: f64,
    /// Standard deviation of the sensor's noise in m/s².
    pub sigma: f64,
    /// Seed of the noise.
    pub seed: u64,
}

impl Waveform {
    /// The acceleration in m/s², `offset_s` seconds after the instant.
    pub fn at(&self, offset_s: f64) -> f64 {
        let t = self.origin_s + offset_s;
        let turns = t * self.shaft_hz;
        let machine: f64 = self
            .harmonics
            .iter()
            .zip(1..)
            .map(|(a, k)| a * (TAU * (f64::from(k) * turns).fract()).sin())
            .sum();
        let last_impact = (t * self.impacts_hz).rem_euclid(1.0);
        // Of those before these two, less than one step of the chip (0.0006 m/s² at ±2 g) is left.
        let ringing: f64 =
            [last_impact, last_impact + 1.0].map(|turns| self.ringing(turns / self.impacts_hz)).iter().sum();
        let n = (t * 1e7).round() as i64;
        machine + ringing + self.sigma * noise::gaussian(self.seed, noise::stream("vibration"), n)
    }

    /// What is left of a strike after `since` seconds.
    fn ringing(&self, since: f64) -> f64 {
        self.impact * (-since / self.decay_s).exp() * (TAU * self.resonance_hz * since).sin()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waveform(impact: f64, sigma: f64) -> Waveform {
        Waveform {
            origin_s: 40_000.0,
            shaft_hz: 30.0,
            harmonics: vec![0.8, 0.35],
            impacts_hz: 107.5,
            impact,
            resonance_hz: 1_100.0,
            decay_s: 0.002,
            sigma,
            seed: 1,
        }
    }

    /// Amplitude at `hz`, by correlation over one second.
    fn amplitude(waveform: &Waveform, hz: f64) -> f64 {
        let n = 10_000;
        let (mut re, mut im) = (0.0, 0.0);
        for i in 0..n {
            let t = f64::from(i) / f64::from(n);
            let (sin, cos) = (TAU * hz * t).sin_cos();
            let a = waveform.at(t);
            re += a * cos;
            im += a * sin;
        }
        re.hypot(im) * 2.0 / f64::from(n)
    }

    #[test]
    fn lines_stand_where_the_formula_puts_them() {
        let healthy = waveform(0.0, 0.0);
        assert!((amplitude(&healthy, 30.0) - 0.8).abs() < 1e-6);
        assert!((amplitude(&healthy, 60.0) - 0.35).abs() < 1e-6);
        assert!(amplitude(&healthy, 107.0) < 1e-6);
        // Impacts 107.5 times a second: their tenth harmonic lies beside the resonance, with nothing in between.
        let worn = waveform(6.0, 0.0);
        assert!(amplitude(&worn, 1_075.0) > 0.5);
        assert!(amplitude(&worn, 1_020.0) < 0.05);
    }

    #[test]
    fn a_6205_is_struck_3_585_times_a_turn() {
        assert!((bpfo_per_turn(9.0, 7.94, 39.04) - 3.585).abs() < 1e-3);
    }

    #[test]
    fn noise_has_its_sigma_and_repeats() {
        let noisy = Waveform { harmonics: vec![], ..waveform(0.0, 0.024) };
        let samples: Vec<f64> = (0..10_000).map(|i| noisy.at(f64::from(i) / 3_333.0)).collect();
        let rms = (samples.iter().map(|a| a * a).sum::<f64>() / 10_000.0).sqrt();
        assert!((rms - 0.024).abs() < 0.001, "{rms}");
        assert_eq!(samples[77], noisy.at(77.0 / 3_333.0));
    }
}
