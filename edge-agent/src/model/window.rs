//! Event-time windows for models (pure): every `hop`, the mean of each input over the last `span`.
//!
//! Windows end at multiples of `hop` since the Unix epoch and are `span` long; `span` = `hop` makes them tumble. A
//! window closes when the gateway's time, as the polls carry it, has passed its end by the allowed lateness. Only
//! windows that were watched from their start count, and only those in which some input has a reading.
//!
//! A reading adds to the sum of its (hop, input), so it costs no memory of its own; a window adds up `span` / `hop`
//! sums an input. A late reading joins the windows that are still open. One that is behind all of them, or ahead
//! of the gateway's time by a hop and more, is in none: the caller is told.

use std::time::Duration;

use common::time::Timestamp;

use crate::window::Missed;

/// The windows of a group of inputs, named by their column.
#[derive(Clone, Debug)]
pub struct Hops {
    /// In µs, as is the lateness.
    hop: i64,
    /// Hops in a span.
    span: i64,
    lateness: i64,
    columns: usize,
    /// Sums of the hops from `next - span + 1` on: hop h stands at h mod `slots`, column by column.
    ring: Vec<Sum>,
    slots: i64,
    /// When the first poll was.
    begun: Option<Timestamp>,
    /// The oldest hop that has not closed.
    next: i64,
    /// The newest hop with a reading.
    last: i64,
    means: Vec<f64>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    count: u32,
    sum: f64,
}

impl Hops {
    /// Windows over `columns` inputs; `span` is a multiple of `hop`.
    pub fn new(span: Duration, hop: Duration, lateness: Duration, columns: usize) -> Self {
        let in_span = (span.as_micros() / hop.as_micros()).max(1) as i64;
        // Those that the lateness keeps open, the one under way, and one ahead.
        let slots = in_span + lateness.as_micros().div_ceil(hop.as_micros()) as i64 + 2;
        let micros = |duration: Duration| i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        Self {
            hop: micros(hop),
            span: in_span,
            lateness: micros(lateness),
            columns,
            ring: vec![Sum::default(); slots as usize * columns],
            slots,
            begun: None,
            next: 0,
            last: i64::MIN,
            means: vec![f64::NAN; columns],
        }
    }

    /// Says that watching begins at `at`, if it has not begun before.
    pub fn begin(&mut self, at: Timestamp) {
        if self.begun.is_none() {
            self.begun = Some(at);
            self.next = self.index(at);
        }
    }

    /// Whether there is room for a reading of `ts`, or windows have to be closed first.
    pub fn fits(&self, ts: Timestamp) -> bool {
        self.holds(self.index(ts))
    }

    /// Adds a value to the windows in which it lies.
    pub fn join(&mut self, ts: Timestamp, column: usize, value: f64, missed: &mut Missed) {
        let hop = self.index(ts);
        if hop <= self.next - self.span {
            missed.late += 1;
        } else if !self.holds(hop) {
            missed.early += 1;
        } else {
            let at = self.place(hop) + column;
            self.ring[at].count += 1;
            self.ring[at].sum += value;
            self.last = self.last.max(hop);
        }
    }

    /// Closes the next window that ends by `now`, less the lateness, and returns its end; see [`Hops::means`].
    pub fn close(&mut self, now: Timestamp) -> Option<Timestamp> {
        self.close_until(self.index(now.shifted(-self.lateness)))
    }

    /// As [`Hops::close`], when nothing late can come any more.
    pub fn flush(&mut self, now: Timestamp) -> Option<Timestamp> {
        self.close_until(self.index(now))
    }

    /// Of the window that closed last: NaN where an input has no reading.
    pub fn means(&self) -> &[f64] {
        &self.means
    }

    fn close_until(&mut self, until: i64) -> Option<Timestamp> {
        let begun = self.begun?;
        while self.next < until {
            if self.next.saturating_sub(self.span) >= self.last {
                // All windows up to there are empty: a gap of years is one step.
                self.next = until;
                return None;
            }
            let end = Timestamp::from_micros((self.next + 1) * self.hop);
            let start = end.shifted(-self.hop * self.span);
            let watched = start >= begun && self.add_up();
            let oldest = self.place(self.next - self.span + 1);
            self.ring[oldest..oldest + self.columns].fill(Sum::default());
            self.next += 1;
            if watched {
                return Some(end);
            }
        }
        None
    }

    /// Fills `means`; false when no input has a reading.
    fn add_up(&mut self) -> bool {
        let mut any = false;
        for column in 0..self.columns {
            let mut total = Sum::default();
            for hop in self.next - self.span + 1..=self.next {
                let Sum { count, sum } = self.ring[self.place(hop) + column];
                total.count += count;
                total.sum += sum;
            }
            any |= total.count > 0;
            self.means[column] = total.sum / f64::from(total.count);
        }
        any
    }

    fn index(&self, ts: Timestamp) -> i64 {
        ts.as_micros().div_euclid(self.hop)
    }

    fn holds(&self, hop: i64) -> bool {
        hop < self.next - self.span + 1 + self.slots
    }

    fn place(&self, hop: i64) -> usize {
        hop.rem_euclid(self.slots) as usize * self.columns
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_micros(second * 1_000_000)
    }

    /// (end in s, means), NaN as −1.
    type Closed = Vec<(i64, Vec<f64>)>;

    fn drain(hops: &mut Hops, now: i64, flush: bool, out: &mut Closed) {
        while let Some(end) = if flush { hops.flush(at(now)) } else { hops.close(at(now)) } {
            let means = hops.means().iter().map(|m| if m.is_nan() { -1.0 } else { *m });
            out.push((end.as_micros() / 1_000_000, means.collect()));
        }
    }

    /// Gateway's second, (reading's second, column, value).
    type Poll = (i64, Vec<(i64, usize, f64)>);

    /// Spans of 4 s, hops of 2 s, 1 s late.
    fn run(polls: &[Poll]) -> (Closed, Missed) {
        let mut hops = Hops::new(4 * SECOND, 2 * SECOND, SECOND, 2);
        let (mut out, mut missed, mut now) = (Vec::new(), Missed::default(), i64::MIN);
        for (second, readings) in polls {
            now = now.max(*second);
            hops.begin(at(now));
            for (ts, column, value) in readings {
                if !hops.fits(at(*ts)) {
                    drain(&mut hops, now, false, &mut out);
                }
                hops.join(at(*ts), *column, *value, &mut missed);
            }
            drain(&mut hops, now, false, &mut out);
        }
        drain(&mut hops, now, true, &mut out);
        (out, missed)
    }

    #[test]
    fn windows_slide_by_the_hop_and_close_by_the_gateways_time() {
        let poll = |second: i64| (second, vec![(second, 0, second as f64)]);
        let (closed, missed) = run(&(10..=15).map(poll).collect::<Vec<_>>());
        assert_eq!(closed, [(14, vec![11.5, -1.0])]);
        assert_eq!(missed, Missed::default());
        let (closed, _) = run(&(11..=17).map(poll).collect::<Vec<_>>());
        // Begun at 11: 8 to 12 and 10 to 14 were not watched from their start.
        assert_eq!(closed, [(16, vec![13.5, -1.0])]);
    }

    #[test]
    fn late_early_and_gaps() {
        let (closed, missed) = run(&[
            (10, vec![(10, 0, 1.0), (10, 1, 5.0)]),
            (12, vec![(12, 0, 3.0)]),
            // Closes 10 to 14: a reading of 11 comes too late, one of 13 joins 12 to 16.
            (15, vec![(15, 1, 7.0)]),
            (15, vec![(11, 0, 99.0), (13, 0, 5.0), (40, 0, 1.0)]),
            (1_000_000, vec![(16, 1, 1.0), (1_000_000, 0, 2.0)]),
            (1_000_005, vec![]),
        ]);
        assert_eq!(
            closed,
            [
                (14, vec![2.0, 5.0]),
                (16, vec![4.0, 7.0]),
                (18, vec![-1.0, 4.0]),
                (20, vec![-1.0, 1.0]),
                (1_000_002, vec![2.0, -1.0]),
                (1_000_004, vec![2.0, -1.0]),
            ]
        );
        assert_eq!(missed, Missed { late: 1, early: 1 });
    }

    proptest! {
        /// Against a model that keeps every reading, for polls in order: each window that closed has the mean of
        /// its readings, and none is left out.
        #[test]
        fn windows_hold_their_readings(
            polls in proptest::collection::vec((0i64..9, proptest::collection::vec((0usize..2, -9i32..9), 0..3)), 1..80),
        ) {
            let mut now = 1_000;
            let mut given = Vec::new();
            let mut all = Vec::new();
            for (step, rows) in polls {
                now += step;
                let readings: Vec<_> = rows.iter().map(|(c, v)| (now, *c, f64::from(*v))).collect();
                all.extend(readings.clone());
                given.push((now, readings));
            }
            let begun = given[0].0;
            let mut expected = BTreeMap::new();
            for end in (begun + 4..=now).filter(|end| end % 2 == 0) {
                let mean = |column| {
                    let values: Vec<f64> =
                        all.iter().filter(|(ts, c, _)| *c == column && (end - 4..end).contains(ts)).map(|r| r.2).collect();
                    if values.is_empty() { -1e9 } else { values.iter().sum::<f64>() / values.len() as f64 }
                };
                let means = [mean(0), mean(1)];
                if means != [-1e9, -1e9] {
                    expected.insert(end, means);
                }
            }
            let mut hops = Hops::new(4 * SECOND, 2 * SECOND, SECOND, 2);
            let mut got = BTreeMap::new();
            let mut missed = Missed::default();
            for (second, readings) in &given {
                hops.begin(at(*second));
                for (ts, column, value) in readings {
                    while !hops.fits(at(*ts)) && let Some(end) = hops.close(at(*second)) {
                        got.insert(end.as_micros() / 1_000_000, hops.means().to_vec());
                    }
                    hops.join(at(*ts), *column, *value, &mut missed);
                }
                while let Some(end) = hops.close(at(*second)) {
                    got.insert(end.as_micros() / 1_000_000, hops.means().to_vec());
                }
            }
            while let Some(end) = hops.flush(at(now)) {
                got.insert(end.as_micros() / 1_000_000, hops.means().to_vec());
            }
            prop_assert_eq!(missed, Missed::default());
            prop_assert_eq!(got.len(), expected.len());
            for (end, means) in expected {
                for (got, wanted) in got[&end].iter().zip(means) {
                    prop_assert!((got - wanted).abs() < 1e-9 || (got.is_nan() && wanted == -1e9));
                }
            }
        }
    }
}
