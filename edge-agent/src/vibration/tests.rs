use proptest::prelude::*;
use serde::Deserialize;

use super::*;

/// A signal by its formula, and what SciPy makes of it: `deploy/train/vibration.py`.
#[derive(Deserialize)]
struct Golden {
    name: String,
    rate_hz: f64,
    samples: usize,
    low_hz: f64,
    bands: Vec<[f64; 2]>,
    offset: f64,
    /// Amplitude in m/s², Hz, phase.
    tones: Vec<[f64; 3]>,
    /// Strikes a second, amplitude in m/s², Hz and time constant in s of the ringing.
    strikes: Option<[f64; 4]>,
    /// Seed and amplitude in m/s².
    noise: Option<(u64, f64)>,
    rms: f64,
    peak: f64,
    crest_factor: f64,
    kurtosis: f64,
    band_rms: Vec<f64>,
    velocity: f64,
}

impl Golden {
    fn burst(&self) -> Burst {
        let mut noise = self.noise.map(|(seed, amplitude)| (Uniform(seed), amplitude));
        let samples = (0..self.samples).map(|i| {
            let t = i as f64 / self.rate_hz;
            let tones: f64 = self.tones.iter().map(|[a, hz, phase]| a * (TAU * hz * t + phase).sin()).sum();
            let strikes = self.strikes.map_or(0.0, |[hz, a, ring_hz, decay_s]| {
                let since = (t * hz).fract() / hz;
                a * (-since / decay_s).exp() * (TAU * ring_hz * since).sin()
            });
            let noise = noise.as_mut().map_or(0.0, |(uniform, amplitude)| *amplitude * uniform.next());
            self.offset + tones + strikes + noise
        });
        burst(self.rate_hz, samples.collect())
    }
}

/// Numbers in −1 … 1 by Knuth's linear congruential generator.
struct Uniform(u64);

impl Uniform {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

const FAST_HZ: f64 = 20_000.0 / 3.0;

fn burst(rate_hz: f64, samples: Vec<f64>) -> Burst {
    Burst { rate_hz, samples, clipped: false }
}

/// One second of a tone with a velocity of 1 mm/s RMS: the shortest burst for 10 Hz, and so the hardest.
fn unit_tone(hz: f64, phase: f64) -> Burst {
    let amplitude = 2f64.sqrt() * 1e-3 * TAU * hz;
    let at = |i: u32| amplitude * (TAU * hz * f64::from(i) / FAST_HZ + phase).sin();
    burst(FAST_HZ, (0..FAST_HZ as u32).map(at).collect())
}

fn one(burst: &Burst, feature: Feature) -> f64 {
    measure(burst, [feature])[0]
}

#[track_caller]
fn assert_near(what: &str, got: f64, wanted: f64, relative: f64) {
    assert!((got - wanted).abs() <= relative * wanted.abs(), "{what}: {got}, wanted {wanted}");
}

#[test]
fn features_are_those_of_scipy() {
    let all: Vec<Golden> = serde_json::from_str(include_str!("golden.json")).unwrap();
    assert_eq!(all.len(), 4);
    for golden in all {
        let bands =
            golden.bands.iter().map(|[low_hz, high_hz]| Feature::Band { low_hz: *low_hz, high_hz: *high_hz });
        let features = [
            (Feature::Rms, golden.rms),
            (Feature::Peak, golden.peak),
            (Feature::CrestFactor, golden.crest_factor),
            (Feature::Kurtosis, golden.kurtosis),
            (Feature::Velocity { low_hz: golden.low_hz }, golden.velocity),
        ];
        let features: Vec<_> =
            features.into_iter().chain(bands.zip(golden.band_rms.iter().copied())).collect();
        let got = measure(&golden.burst(), features.iter().map(|(feature, _)| *feature));
        for ((feature, wanted), got) in features.iter().zip(got) {
            assert_near(&format!("{} {feature:?}", golden.name), got, *wanted, 1e-6);
        }
    }
}

#[test]
fn one_metre_per_second_squared_at_159_155_hz_is_one_millimetre_per_second() {
    let tone = unit_tone(159.155, 0.0);
    assert_near("RMS", one(&tone, Feature::Rms), 1.0, 1e-3);
    assert_near("velocity", one(&tone, Feature::Velocity { low_hz: 10.0 }), 1.0, 5e-4);
}

/// The tolerances of ISO 2954, and the −3 dB points and slopes that the module states; whatever the phase.
#[test]
fn the_band_is_that_of_iso_2954() {
    for (hz, least, most) in [
        (4.46, 0.10, 0.15),
        (8.91, 0.69, 0.72),
        (10.0, 0.80, 1.10),
        (20.0, 0.90, 1.10),
        (40.0, 0.90, 1.10),
        (80.0, 0.99, 1.01),
        (160.0, 0.90, 1.10),
        (500.0, 0.90, 1.10),
        (1_000.0, 0.80, 1.10),
        (1_122.0, 0.70, 0.72),
        (2_244.0, 0.12, 0.13),
    ] {
        for phase in [0.0, 0.7, 1.6, 2.4] {
            let gain = one(&unit_tone(hz, phase), Feature::Velocity { low_hz: 10.0 });
            assert!((least..=most).contains(&gain), "{hz} Hz, phase {phase}: {gain}");
        }
    }
}

#[test]
fn a_slow_machine_is_heard_down_to_2_hz() {
    assert_eq!([None, Some(599.9), Some(600.0)].map(lowest_hz), [10.0, 2.0, 10.0]);
    let samples = |i: u32| 2f64.sqrt() * 1e-3 * TAU * 3.0 * (TAU * 3.0 * f64::from(i) / FAST_HZ).sin();
    let tone = burst(FAST_HZ, (0..5 * FAST_HZ as u32).map(samples).collect());
    assert_near("at 2 Hz", one(&tone, Feature::Velocity { low_hz: 2.0 }), 1.0, 0.03);
    assert!(one(&tone, Feature::Velocity { low_hz: 10.0 }) < 0.05);
}

#[test]
fn zones_are_those_of_iso_20816_3() {
    let tone = unit_tone(80.0, 0.0);
    for (group, support, velocity, wanted) in [
        (1, "rigid", 2.2, 1.0),
        (1, "rigid", 2.4, 2.0),
        (1, "rigid", 4.6, 3.0),
        (1, "rigid", 7.2, 4.0),
        (1, "flexible", 3.4, 1.0),
        (1, "flexible", 7.2, 3.0),
        (1, "flexible", 11.1, 4.0),
        (2, "rigid", 1.3, 1.0),
        (2, "rigid", 1.5, 2.0),
        (2, "rigid", 2.9, 3.0),
        (2, "rigid", 4.6, 4.0),
        (2, "flexible", 2.4, 2.0),
        (2, "flexible", 7.2, 4.0),
    ] {
        let limits = zone_limits(group, support).unwrap();
        let shaken = burst(tone.rate_hz, tone.samples.iter().map(|a| a * velocity).collect());
        let got = one(&shaken, Feature::Zone { low_hz: 10.0, limits });
        assert_eq!(got, wanted, "group {group}, {support}, {velocity} mm/s");
    }
    assert_eq!(zone(2.3, [2.3, 4.5, 7.1]), 1.0, "on the limit");
    assert_eq!([zone_limits(3, "rigid"), zone_limits(1, "soft")], [None, None]);
}

#[test]
fn what_does_not_move_has_no_shape() {
    let features = [
        Feature::Rms,
        Feature::Peak,
        Feature::CrestFactor,
        Feature::Kurtosis,
        Feature::Velocity { low_hz: 10.0 },
    ];
    let values = measure(&burst(FAST_HZ, vec![0.0; 64]), features);
    assert_eq!((values[0], values[1], values[4]), (0.0, 0.0, 0.0));
    assert!(values[2].is_nan() && values[3].is_nan(), "{values:?}");
}

fn noise() -> impl Strategy<Value = Burst> {
    let samples = prop::collection::vec(-160.0..160.0f64, 16..600);
    (samples, 800.0..7_000.0f64).prop_map(|(samples, rate_hz)| burst(rate_hz, samples))
}

proptest! {
    /// Parseval: the lines add up to the mean square of what went in, under the window.
    #[test]
    fn the_spectrum_loses_nothing(burst in noise()) {
        let n = burst.samples.len() as f64;
        let mean = burst.samples.iter().sum::<f64>() / n;
        let hann = |i: usize| (std::f64::consts::PI * i as f64 / n).sin().powi(2);
        let windowed = burst.samples.iter().enumerate().map(|(i, a)| ((a - mean) * hann(i)).powi(2));
        let wanted = (windowed.sum::<f64>() / n / 0.375).sqrt();
        let whole = one(&burst, Feature::Band { low_hz: 0.0, high_hz: burst.rate_hz });
        prop_assert!((whole - wanted).abs() <= 1e-9 * wanted, "{whole}, wanted {wanted}");
    }

    #[test]
    fn bands_add_up(burst in noise(), cut in 0.0..1.0f64) {
        let cut = cut * burst.rate_hz / 2.0;
        let bands = [(0.0, cut), (cut, burst.rate_hz), (0.0, burst.rate_hz)];
        let rms = measure(&burst, bands.map(|(low_hz, high_hz)| Feature::Band { low_hz, high_hz }));
        prop_assert!((rms[0].hypot(rms[1]) - rms[2]).abs() <= 1e-9 * rms[2], "{rms:?}");
    }

    /// A larger swing scales what is in m/s² and mm/s and leaves shapes alone; gravity and direction change nothing.
    #[test]
    fn features_scale(burst in noise(), factor in 0.01..10.0f64, mirrored: bool, offset in -10.0..10.0f64) {
        let all = [
            Feature::Rms,
            Feature::Peak,
            Feature::Band { low_hz: 50.0, high_hz: 300.0 },
            Feature::Velocity { low_hz: 10.0 },
            Feature::CrestFactor,
            Feature::Kurtosis,
        ];
        let signed = if mirrored { -factor } else { factor };
        let scaled = Burst {
            samples: burst.samples.iter().map(|a| signed * a + offset).collect(),
            ..burst.clone()
        };
        for (i, (before, after)) in measure(&burst, all).into_iter().zip(measure(&scaled, all)).enumerate() {
            let wanted = if i < 4 { before * factor } else { before };
            prop_assert!((after - wanted).abs() <= 1e-6 * wanted.abs() + 1e-9, "{:?}: {after}, wanted {wanted}", all[i]);
        }
    }
}
