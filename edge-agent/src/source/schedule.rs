//! When each probe of a bus is due (pure).
//!
//! A probe with period p is due at every multiple of p since the Unix epoch, so that restarts and gateways agree on
//! the ticks. A tick that is still not polled when the next one comes is skipped.

use std::time::Duration;

use common::time::Timestamp;

/// Ticks missed by more than this were not missed under load: the clock was set, or the machine slept.
const CLOCK_STEP: Duration = Duration::from_secs(3_600);

#[derive(Clone, Debug)]
pub(super) struct Schedule {
    /// (period, next tick) by probe.
    probes: Vec<(Duration, Timestamp)>,
}

impl Schedule {
    /// The first ticks come after `start`. Periods are not zero.
    pub(super) fn new(periods: impl IntoIterator<Item = Duration>, start: Timestamp) -> Self {
        Self { probes: periods.into_iter().map(|period| (period, start.floor(period) + period)).collect() }
    }

    /// The next tick; none without probes.
    pub(super) fn next(&self) -> Option<Timestamp> {
        self.probes.iter().map(|(_, next)| *next).min()
    }

    /// The probes that are due at the tick `at`; their next tick is then a period later.
    pub(super) fn take_due(&mut self, at: Timestamp) -> Vec<usize> {
        let mut due = Vec::new();
        for (probe, (period, next)) in self.probes.iter_mut().enumerate() {
            if *next <= at {
                *next = *next + *period;
                due.push(probe);
            }
        }
        due
    }

    /// Drops the ticks whose successor has come by `now`, and returns them as (probe, tick).
    pub(super) fn skip_missed(&mut self, now: Timestamp) -> Vec<(usize, Timestamp)> {
        let mut missed = Vec::new();
        for (probe, (period, next)) in self.probes.iter_mut().enumerate() {
            if now.since(*next) > CLOCK_STEP {
                *next = now.floor(*period) + *period;
            }
            while *next + *period <= now {
                missed.push((probe, *next));
                *next = *next + *period;
            }
        }
        missed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_micros(second * 1_000_000)
    }

    fn schedule(periods: &[u64], start: i64) -> Schedule {
        Schedule::new(periods.iter().map(|s| Duration::from_secs(*s)), at(start))
    }

    #[test]
    fn probes_are_due_at_multiples_of_their_periods() {
        let mut schedule = schedule(&[5, 15], 7);
        let mut ticks = Vec::new();
        for _ in 0..4 {
            let tick = schedule.next().unwrap();
            ticks.push((tick.as_micros() / 1_000_000, schedule.take_due(tick)));
        }
        assert_eq!(ticks, [(10, vec![0]), (15, vec![0, 1]), (20, vec![0]), (25, vec![0])]);
    }

    #[test]
    fn a_start_on_a_tick_does_not_repeat_it() {
        assert_eq!(schedule(&[5], 10).next(), Some(at(15)));
    }

    #[test]
    fn a_late_tick_is_polled_until_the_next_one_comes() {
        let mut schedule = schedule(&[5, 60], 0);
        assert_eq!(schedule.skip_missed(at(9)), []);
        assert_eq!(schedule.skip_missed(at(16)), [(0, at(5)), (0, at(10))]);
        assert_eq!(schedule.next(), Some(at(15)));
    }

    #[test]
    fn a_step_of_the_clock_is_not_a_million_missed_ticks() {
        let mut schedule = schedule(&[5], 0);
        assert_eq!(schedule.skip_missed(at(1_000_000_001)), []);
        assert_eq!(schedule.next(), Some(at(1_000_000_005)));
    }
}
