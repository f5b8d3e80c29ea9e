//! Random numbers without state: a pure function of (seed, stream, n), so that a replay is the same to the bit.
//!
//! The bits are SplitMix64's finaliser (Steele, Lea, Flood: *Fast splittable pseudorandom number generators*, 2014)
//! over the three inputs, one after the other. Gaussian values are Box and Muller's (1958) from two such words.

use std::f64::consts::TAU;

/// The stream of a name: FNV-1a, 64 bits.
pub const fn stream(name: &str) -> u64 {
    let bytes = name.as_bytes();
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
}

/// 64 random bits, number `n` of `stream`.
pub const fn bits(seed: u64, stream: u64, n: i64) -> u64 {
    mix(mix(mix(seed) ^ stream) ^ n.cast_unsigned())
}

/// A number in 0 (included) to 1 (not).
pub fn uniform(seed: u64, stream: u64, n: i64) -> f64 {
    unit(bits(seed, stream, n))
}

/// A normally distributed number with mean 0 and standard deviation 1.
pub fn gaussian(seed: u64, stream: u64, n: i64) -> f64 {
    let first = bits(seed, stream, n);
    let radius = (-2.0 * (1.0 - unit(first)).ln()).sqrt();
    radius * (TAU * unit(mix(first))).cos()
}

const fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// The upper 53 bits as a fraction.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mix_is_splitmix64() {
        // The first outputs of SplitMix64 from state 0, as its reference implementation prints them.
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(mix(0x9e37_79b9_7f4a_7c15), 0x6e78_9e6a_a1b9_65f4);
    }

    #[test]
    fn moments_are_those_of_a_normal_distribution() {
        // Times of a poll every 5 s: the inputs that are really used.
        let values: Vec<f64> =
            (0..100_000).map(|n| gaussian(7, stream("reactor/pressure"), n * 5_000_000)).collect();
        let moment = |k| values.iter().map(|v| v.powi(k)).sum::<f64>() / values.len() as f64;
        assert!(moment(1).abs() < 0.015, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.03, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.15, "kurtosis {}", moment(4));
        let lag: f64 = values.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / values.len() as f64;
        assert!(lag.abs() < 0.015, "neighbours correlate by {lag}");
    }

    #[test]
    fn streams_and_seeds_differ() {
        assert_ne!(bits(1, stream("a"), 0), bits(1, stream("b"), 0));
        assert_ne!(bits(1, stream("a"), 0), bits(2, stream("a"), 0));
    }
}
