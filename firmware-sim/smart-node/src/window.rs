//! Features over a tumbling window of samples, in whole numbers: exact, and small on a core without floating point.

/// What a window says about its samples, in their unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// The mean, rounded to the nearest.
    pub mean: i32,
    /// The smallest.
    pub min: i32,
    /// The largest.
    pub max: i32,
    /// Root mean square about the mean, rounded down.
    pub rms: i32,
}

/// The samples since the window began, summed up.
#[derive(Debug, Clone, Copy, Default)]
pub struct Window {
    count: u32,
    sum: i64,
    /// At most 2^62 each, and 2^32 of them.
    squares: i128,
    min: i32,
    max: i32,
}

impl Window {
    /// Takes one sample.
    pub fn push(&mut self, sample: i32) {
        let (min, max) = if self.count == 0 { (sample, sample) } else { (self.min, self.max) };
        self.min = min.min(sample);
        self.max = max.max(sample);
        self.count += 1;
        self.sum += i64::from(sample);
        self.squares += i128::from(sample).pow(2);
    }

    /// Samples so far.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// What the samples so far say; nothing when there are none.
    pub fn features(&self) -> Option<Features> {
        let n = i64::from(self.count);
        if n == 0 {
            return None;
        }
        // n² times the mean square about the mean: Cauchy and Schwarz say that it is not negative.
        let spread = i128::from(n) * self.squares - i128::from(self.sum).pow(2);
        // Both quotients lie within the range of the samples, so they fit.
        let mean = (2 * self.sum + n).div_euclid(2 * n) as i32;
        let rms = (spread.isqrt() / i128::from(n)) as i32;
        Some(Features { mean, min: self.min, max: self.max, rms })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(samples: &[i32], wanted: Option<[i32; 4]>) {
        let mut window = Window::default();
        samples.iter().for_each(|sample| window.push(*sample));
        let wanted = wanted.map(|[mean, min, max, rms]| Features { mean, min, max, rms });
        assert_eq!(window.features(), wanted, "{samples:?}");
    }

    #[test]
    fn features_are_exact() {
        check(&[], None);
        check(&[-7], Some([-7, -7, -7, 0]));
        // The population's standard deviation of these eight is 2.
        check(&[2_000, 4_000, 4_000, 4_000, 5_000, 5_000, 7_000, 9_000], Some([5_000, 2_000, 9_000, 2_000]));
        // Means of 1.5 and −1.5 are rounded up; RMS is 0.5, rounded down.
        check(&[1, 2], Some([2, 1, 2, 0]));
        check(&[-1, -2], Some([-1, -2, -1, 0]));
        check(&[i32::MIN, i32::MAX], Some([0, i32::MIN, i32::MAX, i32::MAX]));
        check(&[i32::MIN; 9], Some([i32::MIN, i32::MIN, i32::MIN, 0]));
    }
}
