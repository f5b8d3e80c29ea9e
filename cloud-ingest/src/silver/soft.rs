//! Soft rules, over the readings that a plan stores: counted, never kept out.
//!
//! A reading is judged by itself (range), and against the device's reading before it (rate, interval): the later one
//! of the plan's own and of the last one that is committed. A late reading has only those of its plan before it. So
//! what is counted hangs on the plan and on what the plans before it have committed, and no reading is looked up,
//! but for the last one of each device when a refiner starts.

use std::{collections::HashMap, time::Duration};

use common::time::duration;

use super::Committed;
use crate::quality::SoftRule;

/// What came of one rule.
#[derive(Debug, Default)]
struct Tally {
    passed: i64,
    failed: i64,
    sample: Option<String>,
}

impl Tally {
    /// The sample is written for the first that fails.
    fn count(&mut self, passes: bool, sample: impl FnOnce() -> String) {
        if passes {
            self.passed += 1;
        } else {
            self.failed += 1;
            self.sample.get_or_insert_with(sample);
        }
    }
}

/// Results of a plan.
#[derive(Debug, Default)]
pub(super) struct Soft {
    range: Tally,
    rate: Tally,
    interval: Tally,
}

/// The readings that come before the next one of a device: times in µs, and values, NaN for bad ones.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Last {
    /// The last one of silver.
    committed: Option<(i64, f64)>,
    /// The last one of the plan.
    own: Option<(i64, f64)>,
}

impl Last {
    /// At the start of a plan; a value that is not known is in the answers.
    pub(super) fn of(known: Option<(i64, Option<f64>)>, answers: Option<&HashMap<i64, Committed>>) -> Last {
        let committed = known.and_then(|(ts, value)| {
            let looked_up = || {
                answers?.get(&ts).map(|(value, quality, _)| match (value, quality.as_str()) {
                    (Some(value), "good" | "uncertain") => *value,
                    _ => f64::NAN,
                })
            };
            Some((ts, value.or_else(looked_up)?))
        });
        Last { committed, own: None }
    }

    fn before(&self, ts: i64) -> Option<(i64, f64)> {
        let committed = self.committed.filter(|(at, _)| *at < ts);
        [self.own, committed].into_iter().flatten().max_by_key(|(at, _)| *at)
    }

    /// The last one once the plan is committed; `None` when it has none of this device.
    pub(super) fn newest(&self) -> Option<(i64, f64)> {
        self.own?;
        [self.own, self.committed].into_iter().flatten().max_by_key(|(at, _)| *at)
    }
}

impl Soft {
    /// Judges the device's next reading, in the order of time.
    pub(super) fn judge(&mut self, rule: &SoftRule, device: &str, last: &mut Last, ts: i64, value: f64) {
        let before = last.before(ts);
        last.own = Some((ts, value));
        if let (Some([low, high]), false) = (rule.range, value.is_nan()) {
            let sample = || format!("{device}: {value} is not within {low} … {high}");
            self.range.count((low..=high).contains(&value), sample);
        }
        let Some((at, from)) = before else { return };
        let seconds = (ts - at) as f64 / 1e6;
        if let (Some(most), false) = (rule.rate, value.is_nan() || from.is_nan()) {
            let rate = (value - from).abs() / seconds;
            let sample =
                || format!("{device}: from {from} to {value} in {seconds} s, more than {most} per second");
            self.rate.count(rate <= most, sample);
        }
        if !rule.interval.is_zero() {
            let apart = Duration::from_micros((ts - at).unsigned_abs());
            let sample =
                || format!("{device}: {seconds} s apart, more than {}", duration::format(rule.interval));
            self.interval.count(apart <= rule.interval, sample);
        }
    }

    /// Rule, passed, failed, sample; of those that something was judged by.
    pub(super) fn results(&self) -> impl Iterator<Item = (&'static str, i64, i64, Option<String>)> + '_ {
        let all = [("soft_range", &self.range), ("soft_rate", &self.rate), ("soft_interval", &self.interval)];
        let judged = all.into_iter().filter(|(_, tally)| tally.passed + tally.failed > 0);
        judged.map(|(rule, tally)| (rule, tally.passed, tally.failed, tally.sample.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000;

    fn rule() -> SoftRule {
        SoftRule { range: Some([0.0, 10.0]), rate: Some(2.0), interval: Duration::from_secs(5) }
    }

    /// (Passed, failed) of range, rate, interval.
    type Tallies = [(i64, i64); 3];

    /// Judges readings (second, value) after a committed one, and gives the newest.
    fn judged(committed: Option<(i64, f64)>, readings: &[(i64, f64)]) -> (Tallies, Option<(i64, f64)>) {
        let committed = committed.map(|(ts, value)| (ts * SECOND, Some(value)));
        let (mut soft, mut last) = (Soft::default(), Last::of(committed, None));
        for (ts, value) in readings {
            soft.judge(&rule(), "d", &mut last, ts * SECOND, *value);
        }
        let of = |tally: &Tally| (tally.passed, tally.failed);
        ([of(&soft.range), of(&soft.rate), of(&soft.interval)], last.newest().map(|(ts, v)| (ts / SECOND, v)))
    }

    #[test]
    fn readings_are_judged_by_themselves_and_by_the_one_before() {
        for (committed, readings, results, newest) in [
            (None, &[(0, 10.0)][..], [(1, 0), (0, 0), (0, 0)], (0, 10.0)),
            (Some((0, 8.0)), &[(1, 10.5)], [(0, 1), (0, 1), (1, 0)], (1, 10.5)),
            (Some((0, 8.0)), &[(1, 10.0), (7, 10.0)], [(2, 0), (2, 0), (1, 1)], (7, 10.0)),
            // Late ones have only each other.
            (Some((9, 8.0)), &[(1, 0.0), (2, 9.0)], [(2, 0), (0, 1), (1, 0)], (9, 8.0)),
            // One before and one after what is committed.
            (Some((9, 8.0)), &[(1, 0.0), (10, 9.0)], [(2, 0), (1, 0), (1, 0)], (10, 9.0)),
            // A bad one has come, and that is all.
            (Some((0, 8.0)), &[(1, f64::NAN), (2, 0.0)], [(1, 0), (0, 0), (2, 0)], (2, 0.0)),
        ] {
            let (got, last) = judged(committed, readings);
            assert_eq!((got, last), (results, Some(newest)), "{committed:?} {readings:?}");
        }
        assert_eq!(judged(Some((0, 8.0)), &[]).1, None, "nothing new is known");
    }

    #[test]
    fn the_last_committed_value_is_looked_up_when_it_is_not_known() {
        let answers = [(7, (Some(3.0), "good".to_owned(), "Cel".to_owned()))].into();
        assert_eq!(Last::of(Some((7, None)), Some(&answers)).before(8), Some((7, 3.0)));
        assert_eq!(Last::of(Some((7, Some(4.0))), Some(&answers)).before(8), Some((7, 4.0)));
        assert_eq!(Last::of(Some((6, None)), Some(&answers)).before(8), None);
        let bad = [(7, (Some(3.0), "bad".to_owned(), "Cel".to_owned()))].into();
        assert!(Last::of(Some((7, None)), Some(&bad)).before(8).is_some_and(|(_, value)| value.is_nan()));
    }
}
