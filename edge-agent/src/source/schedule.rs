//! When each probe of a bus is due (pure).
//!
//! A probe with period p is due at every multiple of p since the Unix epoch, so that restarts and gateways agree on
//! the ticks; all ticks of a schedule may be displaced by less than a millisecond ([`super::Start`]). A tick that is
//! still not polled when the next one comes is skipped. Time that is handed in does not jump, except over a suspend.

use std::time::Duration;

use common::time::{HOUR_MICROS, Timestamp};

use super::Start;

#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    /// (period, next tick) by probe.
    probes: Vec<(Duration, Timestamp)>,
}

impl Schedule {
    /// The first ticks come after the start. Periods are not zero.
    pub(crate) fn new(periods: impl IntoIterator<Item = Duration>, start: Start) -> Self {
        let first = |period| (start.at - start.displaced).floor(period) + period + start.displaced;
        Self { probes: periods.into_iter().map(|period| (period, first(period))).collect() }
    }

    /// The next tick; none without probes.
    pub(crate) fn next(&self) -> Option<Timestamp> {
        self.probes.iter().map(|(_, next)| *next).min()
    }

    /// The probes that are due at the tick `at`; their next tick is then a period later.
    pub(crate) fn take_due(&mut self, at: Timestamp) -> Vec<usize> {
        let mut due = Vec::new();
        for (probe, (period, next)) in self.probes.iter_mut().enumerate() {
            if *next <= at {
                *next = *next + *period;
                due.push(probe);
            }
        }
        due
    }

    /// Drops the ticks whose successor has come by `now`, and returns them by the hour as (probe, first tick, ticks).
    pub(crate) fn skip_missed(&mut self, now: Timestamp) -> Vec<(usize, Timestamp, u64)> {
        let mut missed = Vec::new();
        for (probe, (period, next)) in self.probes.iter_mut().enumerate() {
            while *next + *period <= now {
                // The ticks from `next` to the end of its hour, of which the last one before `now` stays due.
                let rest =
                    next.hour().shifted(HOUR_MICROS).since(*next).as_micros().div_ceil(period.as_micros());
                let gone = now.since(*next).as_micros() / period.as_micros();
                let ticks = u32::try_from(rest.min(gone)).unwrap_or(u32::MAX);
                missed.push((probe, *next, u64::from(ticks)));
                *next = *next + *period * ticks;
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
        let start = Start { at: at(start), displaced: Duration::ZERO };
        Schedule::new(periods.iter().map(|s| Duration::from_secs(*s)), start)
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
        assert_eq!(schedule.skip_missed(at(16)), [(0, at(5), 2)]);
        assert_eq!(schedule.next(), Some(at(15)));
    }

    #[test]
    fn what_a_suspend_cost_is_counted_by_the_hour() {
        let mut schedule = schedule(&[5, 1_000], 3_580);
        let missed = schedule.skip_missed(at(3 * 3_600 + 2));
        let of_fast = [(0, at(3_585), 3), (0, at(3_600), 720), (0, at(7_200), 720)];
        let of_slow = [(1, at(4_000), 4), (1, at(8_000), 2)];
        assert_eq!(missed, [&of_fast[..], &of_slow[..]].concat());
        assert_eq!(schedule.next(), Some(at(10_000)));
        let ticks: u64 = missed.iter().filter(|(probe, ..)| *probe == 0).map(|(.., n)| n).sum();
        assert_eq!(ticks, (10_800 - 3_585) / 5, "the tick at 10800 is still due");
    }

    #[test]
    fn displaced_ticks_meet_no_others() {
        let start = Start { at: at(10) + Duration::from_micros(400), displaced: Duration::from_micros(300) };
        let mut schedule = Schedule::new([Duration::from_secs(5)], start);
        assert_eq!(schedule.next(), Some(at(15) + Duration::from_micros(300)));
        schedule.take_due(at(16));
        assert_eq!(schedule.next(), Some(at(20) + Duration::from_micros(300)));
        let start = Start { at: at(10) + Duration::from_micros(200), ..start };
        assert_eq!(Schedule::new([Duration::from_secs(5)], start).next(), Some(at(10) + start.displaced));
    }
}
