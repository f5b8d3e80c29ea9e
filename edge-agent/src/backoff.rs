//! The pause before something that failed is tried again (pure).

use std::time::Duration;

/// Doubles from `first` to `max`; each pause is between a half and the whole of it.
pub(crate) struct Backoff {
    first: Duration,
    max: Duration,
    failures: u32,
    seed: u64,
}

impl Backoff {
    pub(crate) fn new(first: Duration, max: Duration, seed: u64) -> Self {
        Self { first, max, failures: 0, seed }
    }

    /// The next failure is the first one again.
    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// The next pause.
    pub(crate) fn pause(&mut self) -> Duration {
        let whole = self.first.saturating_mul(1 << self.failures.min(16)).min(self.max);
        self.failures += 1;
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        whole.mul_f64(0.5 + 0.5 * ((self.seed >> 33) as f64 / (1u64 << 31) as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_within_their_limits() {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30), 3);
        for expected in [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0] {
            let pause = backoff.pause().as_secs_f64();
            assert!((0.5 * expected..=expected).contains(&pause), "{pause} of {expected}");
        }
        backoff.succeeded();
        assert!(backoff.pause() <= Duration::from_millis(200));
    }
}
