//! Marks readings and holds back what says nothing new (pure).
//!
//! Checks **mark**: they lower a reading's quality and delete nothing. In this order, each at most once a reading:
//!
//! | check | quality | when |
//! |---|---|---|
//! | not a number | bad | the value is not finite |
//! | range | bad | outside the device's limits |
//! | rate | uncertain | it changed faster, in unit per second, than the device can, since its last reading that is not bad |
//! | spike | uncertain | it is further than `spike_limit` robust standard deviations from the median of the [`SPIKE_OVER`] before it |
//! | stuck | uncertain | it has not changed for `stuck_after` |
//!
//! The spike check is the identifier of Hampel (The influence curve and its role in robust estimation, JASA 69, 1974),
//! one-sided, since nothing waits for what comes next: 1.4826 times the median distance from the median is a normal
//! distribution's standard deviation. Where that is 0, as for a signal that mostly stands still, nothing is a spike.
//! After a step of the level the first readings, half of [`SPIKE_OVER`], are marked too.
//!
//! Windows and models see every reading. The **deadband** is the last step and concerns the readings lane only: a good
//! reading is held when it differs by no more than the deadband from the last one that was sent, unless the
//! heartbeat is due. A reading that is not good, and the first good one after it, are always sent.
//!
//! Invariant: marked = given, one for one; given = sent + held.

use common::{
    reading::{Quality, Reading},
    time::Timestamp,
};

use crate::settings::Checks;

/// Why a reading was marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mark {
    /// Not finite.
    NotANumber,
    /// Outside of the device's limits.
    Range,
    /// Changed too fast.
    Rate,
    /// Far away from its neighbours.
    Spike,
    /// Did not change for too long.
    Stuck,
}

impl Mark {
    /// All of them.
    pub const ALL: [Mark; 5] = [Mark::NotANumber, Mark::Range, Mark::Rate, Mark::Spike, Mark::Stuck];

    /// The word in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Mark::NotANumber => "not_a_number",
            Mark::Range => "range",
            Mark::Rate => "rate",
            Mark::Spike => "spike",
            Mark::Stuck => "stuck",
        }
    }
}

/// Readings to which the spike check compares.
pub const SPIKE_OVER: usize = 11;

/// The filter's state for every device.
#[derive(Clone, Debug)]
pub struct Filter {
    checks: Vec<Checks>,
    devices: Vec<Device>,
    /// Whether some device has a deadband.
    holds: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Device {
    /// The last reading that was not bad.
    last: Option<(Timestamp, f64)>,
    /// Since when it has had the value of `last`.
    unchanged_since: Timestamp,
    /// The last readings that were not bad, in any order, and how many there have been; for the spike check.
    recent: [f64; SPIKE_OVER],
    seen: usize,
    /// The last good reading that was sent, if none that is not good was sent since.
    sent: Option<(Timestamp, f64)>,
}

impl Filter {
    /// A filter for devices with these checks, by their index.
    pub fn new(checks: Vec<Checks>) -> Self {
        let holds = checks.iter().any(|checks| checks.deadband.is_some());
        Self { devices: vec![Device::default(); checks.len()], checks, holds }
    }

    /// Marks `readings` in place and returns how often each of [`Mark::ALL`] was given.
    pub fn mark(&mut self, readings: &mut [Reading]) -> [u64; Mark::ALL.len()] {
        let mut marks = [0; Mark::ALL.len()];
        for reading in readings {
            let at = reading.device.index();
            for mark in self.devices[at].judge(&self.checks[at], reading).into_iter().flatten() {
                marks[mark as usize] += 1;
            }
        }
        marks
    }

    /// Removes what the deadband holds back, and returns it: to be counted. `readings` have been marked.
    pub fn hold(&mut self, readings: &mut Vec<Reading>) -> Vec<Reading> {
        let mut held = Vec::new();
        if !self.holds {
            return held;
        }
        readings.retain(|reading| {
            let at = reading.device.index();
            let send = self.devices[at].sends(&self.checks[at], reading);
            if !send {
                held.push(*reading);
            }
            send
        });
        held
    }
}

impl Device {
    fn judge(&mut self, checks: &Checks, reading: &mut Reading) -> [Option<Mark>; 3] {
        let Reading { ts, value, .. } = *reading;
        if !value.is_finite() {
            // The source itself says bad with NaN; that is no finding of the filter.
            let marked = reading.quality != Quality::Bad;
            reading.quality = Quality::Bad;
            reading.value = f64::NAN;
            return [marked.then_some(Mark::NotANumber), None, None];
        }
        if checks.range.is_some_and(|[low, high]| value < low || value > high) {
            reading.quality = Quality::Bad;
            return [Some(Mark::Range), None, None];
        }
        if reading.quality == Quality::Bad {
            return [None; 3];
        }
        let (mut rate, mut stuck) = (None, None);
        match self.last {
            // A late reading is judged by what came before it in time only, which is no longer known.
            Some((last_ts, _)) if ts <= last_ts => return [None; 3],
            Some((last_ts, last)) => {
                let too_fast = |limit: f64| (value - last).abs() > limit * ts.since(last_ts).as_secs_f64();
                rate = checks.rate_limit.is_some_and(too_fast).then_some(Mark::Rate);
                if value.to_bits() != last.to_bits() {
                    self.unchanged_since = ts;
                }
                let too_long = |after| ts.since(self.unchanged_since) >= after;
                stuck = checks.stuck_after.is_some_and(too_long).then_some(Mark::Stuck);
            }
            None => self.unchanged_since = ts,
        }
        self.last = Some((ts, value));
        let spike = checks.spike_limit.and_then(|limit| self.leaps(value, limit).then_some(Mark::Spike));
        let marks = [rate, spike, stuck];
        if marks.iter().any(Option::is_some) {
            reading.quality = reading.quality.max(Quality::Uncertain);
        }
        marks
    }

    /// Whether a value is far away from those before it, which it joins.
    fn leaps(&mut self, value: f64, limit: f64) -> bool {
        let is_spike = self.seen >= SPIKE_OVER && {
            let center = median(self.recent);
            let spread = 1.4826 * median(self.recent.map(|recent| (recent - center).abs()));
            spread > 0.0 && (value - center).abs() > limit * spread
        };
        self.recent[self.seen % SPIKE_OVER] = value;
        self.seen += 1;
        is_spike
    }

    fn sends(&mut self, checks: &Checks, reading: &Reading) -> bool {
        let Some(deadband) = checks.deadband else { return true };
        if reading.quality != Quality::Good {
            self.sent = None;
            return true;
        }
        let silent = self.sent.is_some_and(|(ts, value)| {
            (reading.value - value).abs() <= deadband.width && reading.ts.since(ts) < deadband.heartbeat
        });
        if !silent {
            self.sent = Some((reading.ts, reading.value));
        }
        !silent
    }
}

fn median(mut values: [f64; SPIKE_OVER]) -> f64 {
    *values.select_nth_unstable_by(SPIKE_OVER / 2, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use common::reading::DeviceIx;

    use super::*;
    use crate::settings::Deadband;

    fn reading(second: i64, value: f64) -> Reading {
        let quality = if value.is_nan() { Quality::Bad } else { Quality::Good };
        Reading { ts: Timestamp::from_micros(second * 1_000_000), device: DeviceIx(0), quality, value }
    }

    /// (second, value) in; quality, and whether it was sent.
    fn check(checks: Checks, rows: &[(i64, f64, Quality, bool)]) -> [u64; 5] {
        let mut filter = Filter::new(vec![checks]);
        let mut marks = [0; 5];
        for &(second, value, quality, sent) in rows {
            let mut batch = vec![reading(second, value)];
            for (sum, n) in marks.iter_mut().zip(filter.mark(&mut batch)) {
                *sum += n;
            }
            assert_eq!(batch[0].quality, quality, "at {second} s");
            let held = filter.hold(&mut batch);
            assert_eq!((batch.len(), held.len()), (usize::from(sent), usize::from(!sent)), "at {second} s");
        }
        marks
    }

    #[test]
    fn range_is_bad_and_keeps_the_value() {
        use Quality::{Bad, Good};
        let checks = Checks { range: Some([0.0, 10.0]), ..Checks::default() };
        let rows = [
            (0, 0.0, Good, true),
            (1, 10.0, Good, true),
            (2, 10.1, Bad, true),
            (3, f64::NAN, Bad, true),
            (4, f64::INFINITY, Bad, true),
        ];
        assert_eq!(check(checks, &rows), [1, 1, 0, 0, 0]);
    }

    #[test]
    fn rate_counts_from_the_last_reading_that_is_not_bad() {
        use Quality::{Bad, Good, Uncertain};
        let checks = Checks { rate_limit: Some(1.0), range: Some([-9.0, 9.0]), ..Checks::default() };
        let rows = [
            (0, 0.0, Good, true),
            (1, 1.0, Good, true),
            (2, 3.0, Uncertain, true),
            (3, 99.0, Bad, true),
            (4, 5.0, Good, true),
            // Late: not judged.
            (2, 9.0, Good, true),
        ];
        assert_eq!(check(checks, &rows), [0, 1, 1, 0, 0]);
    }

    #[test]
    fn stuck_begins_with_the_value_and_ends_with_a_change() {
        use Quality::{Good, Uncertain};
        let checks = Checks { stuck_after: Some(Duration::from_secs(2)), ..Checks::default() };
        let rows = [
            (0, 1.0, Good, true),
            (1, 1.0, Good, true),
            (2, 1.0, Uncertain, true),
            (3, 1.0, Uncertain, true),
            (4, 1.5, Good, true),
            (5, 1.5, Good, true),
        ];
        assert_eq!(check(checks, &rows), [0, 0, 0, 0, 2]);
        // Off unless configured.
        check(Checks::default(), &[(0, 1.0, Good, true), (9_000, 1.0, Good, true)]);
    }

    #[test]
    fn a_spike_is_far_from_the_median_of_those_before_it() {
        use Quality::{Bad, Good, Uncertain};
        let checks = Checks { spike_limit: Some(3.0), range: Some([-99.0, 99.0]), ..Checks::default() };
        // The median of 0 to 10 is 5, the median distance from it 3: 3 x 1.4826 x 3 = 13.34.
        let quiet = (0..11).map(|i| (i, (i * 7 % 11) as f64, Good, true));
        let rows: Vec<_> = quiet.chain([(11, 18.3, Good, true)]).collect();
        assert_eq!(check(checks, &rows), [0; 5]);
        let mut rows = rows;
        (rows[11].1, rows[11].2) = (18.4, Uncertain);
        // What is bad is neither judged nor remembered; a spike is remembered, and the median bears it.
        rows.extend([(12, 500.0, Bad, true), (13, -90.0, Uncertain, true), (14, 7.0, Good, true)]);
        assert_eq!(check(checks, &rows), [0, 1, 0, 2, 0]);
        // No spread, no judgement.
        let still = (0..20).map(|i| (i, if i == 15 { 9.0 } else { 1.0 }, Good, true)).collect::<Vec<_>>();
        assert_eq!(check(checks, &still), [0; 5]);
    }

    #[test]
    fn deadband_holds_small_changes_between_heartbeats() {
        use Quality::{Bad, Good};
        let deadband = Deadband { width: 0.5, heartbeat: Duration::from_secs(10) };
        let checks = Checks { deadband: Some(deadband), range: Some([0.0, 5.0]), ..Checks::default() };
        let rows = [
            (0, 1.0, Good, true),
            (1, 1.5, Good, false),
            // Against the last one sent, not the last one read.
            (2, 1.6, Good, true),
            (3, 1.2, Good, false),
            (11, 1.2, Good, false),
            (12, 1.2, Good, true),
            (13, 9.0, Bad, true),
            (14, 1.2, Good, true),
            (15, 1.2, Good, false),
        ];
        check(checks, &rows);
    }

    proptest::proptest! {
        #[test]
        fn given_is_sent_plus_held(rows in proptest::collection::vec((0i64..50, -3.0f64..3.0), 0..60)) {
            let deadband = Deadband { width: 0.5, heartbeat: Duration::from_secs(7) };
            let mut filter = Filter::new(vec![Checks { deadband: Some(deadband), ..Checks::default() }]);
            let mut batch: Vec<_> = rows.iter().map(|&(second, value)| reading(second, value)).collect();
            let given = batch.clone();
            filter.mark(&mut batch);
            proptest::prop_assert_eq!(batch.len(), given.len());
            let held = filter.hold(&mut batch);
            let mut all = [batch, held].concat();
            let mut given = given;
            let key = |r: &Reading| (r.ts, r.value.to_bits());
            all.sort_by_key(key);
            given.sort_by_key(key);
            proptest::prop_assert_eq!(all, given);
        }
    }
}
