//! Event-time tumbling windows (pure).
//!
//! A device's windows have one width and are aligned to the Unix epoch: `[start, start + width)`. The **watermark** is
//! the gateway's highest time so far, as the polls carry it, less the allowed lateness; readings do not move it, so one
//! device with a fast clock closes nothing early. A window closes for all devices of its width at once when the
//! watermark reaches its end.
//!
//! | reading | what happens |
//! |---|---|
//! | in an open window | joins it |
//! | in a closed window, at most `revise_for` old | joins it; the window is emitted again with `revision` + 1 |
//! | in an older window | `late`: counted, not aggregated |
//! | more than `revise_for` ahead of the gateway | `early`: counted, not aggregated |
//!
//! The readings themselves go to the lake in every case. An aggregate states the time that it covers: a window in
//! which the agent started, or stopped, is `partial`.
//!
//! `count` to `last` are over readings that are not bad; mean and deviation by Welford's update (Technometrics 4,
//! 1962), `first` and `last` by event time. Without such readings they are none, and `bad_count` says why.

use std::{collections::BTreeMap, time::Duration};

use common::{
    reading::{DeviceIx, Quality, Reading},
    time::Timestamp,
};

use crate::settings::WindowSettings;

/// The statistics of one device in one window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Aggregate {
    /// Start of the window.
    pub start: Timestamp,
    /// End of the window, exclusive.
    pub end: Timestamp,
    /// Of which device.
    pub device: DeviceIx,
    /// What the readings were.
    pub stats: Stats,
    /// From when on the agent watched in this window.
    pub covered_from: Timestamp,
    /// Until when.
    pub covered_to: Timestamp,
    /// Whether less than the window is covered.
    pub partial: bool,
    /// 0 at first, then one more for every time that late readings changed it.
    pub revision: i32,
}

/// Statistics of readings, one reading at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Readings that are not bad.
    pub count: u64,
    /// Readings that are bad.
    pub bad_count: u64,
    min: f64,
    max: f64,
    mean: f64,
    /// Sum of squared distances from the mean.
    m2: f64,
    first: (Timestamp, f64),
    last: (Timestamp, f64),
}

impl Stats {
    /// Adds a reading.
    pub fn push(&mut self, reading: &Reading) {
        let Reading { ts, value, quality, .. } = *reading;
        if quality == Quality::Bad {
            self.bad_count += 1;
            return;
        }
        self.count += 1;
        let from_mean = value - self.mean;
        self.mean += from_mean / self.count as f64;
        self.m2 += from_mean * (value - self.mean);
        if self.count == 1 {
            (self.min, self.max, self.first, self.last) = (value, value, (ts, value), (ts, value));
            return;
        }
        self.min = self.min.min(value);
        self.max = self.max.max(value);
        if ts < self.first.0 {
            self.first = (ts, value);
        }
        if ts >= self.last.0 {
            self.last = (ts, value);
        }
    }

    /// The smallest value.
    pub fn min(&self) -> Option<f64> {
        (self.count > 0).then_some(self.min)
    }

    /// The largest value.
    pub fn max(&self) -> Option<f64> {
        (self.count > 0).then_some(self.max)
    }

    /// The arithmetic mean.
    pub fn mean(&self) -> Option<f64> {
        (self.count > 0).then_some(self.mean)
    }

    /// The sample's standard deviation; none of fewer than two values.
    pub fn stddev(&self) -> Option<f64> {
        (self.count > 1).then(|| (self.m2 / (self.count - 1) as f64).sqrt())
    }

    /// The earliest value.
    pub fn first(&self) -> Option<f64> {
        (self.count > 0).then_some(self.first.1)
    }

    /// The latest value.
    pub fn last(&self) -> Option<f64> {
        (self.count > 0).then_some(self.last.1)
    }
}

/// Readings that came for no window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missed {
    /// Their window is no longer kept.
    pub late: u64,
    /// Their time is too far ahead.
    pub early: u64,
}

/// All windows of a gateway.
#[derive(Clone, Debug)]
pub struct Windows {
    settings: WindowSettings,
    /// The gateway's first and highest time.
    seen: Option<(Timestamp, Timestamp)>,
    groups: Vec<Group>,
    /// By device index: which of the groups, and where in it.
    places: Vec<(usize, usize)>,
}

/// The devices whose windows have one width.
#[derive(Clone, Debug)]
struct Group {
    width: Duration,
    devices: Vec<DeviceIx>,
    /// By start; closed ones stay for late readings.
    windows: BTreeMap<Timestamp, Window>,
}

#[derive(Clone, Debug)]
struct Window {
    closed: bool,
    /// Some slot has changed.
    changed: bool,
    /// In the order of the group's devices.
    slots: Vec<Option<Slot>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    stats: Stats,
    /// Of the next aggregate.
    revision: i32,
    changed: bool,
}

impl Windows {
    /// Windows of these widths, by device index; that of the settings has gone into them where a device says none.
    pub fn new(settings: WindowSettings, widths: &[Duration]) -> Self {
        let mut groups: Vec<Group> = Vec::new();
        let mut places = Vec::with_capacity(widths.len());
        for (ix, width) in widths.iter().enumerate() {
            let known = groups.iter().position(|group| group.width == *width);
            let at = known.unwrap_or_else(|| {
                groups.push(Group { width: *width, devices: Vec::new(), windows: BTreeMap::new() });
                groups.len() - 1
            });
            places.push((at, groups[at].devices.len()));
            groups[at].devices.push(DeviceIx(ix as u32));
        }
        Self { settings, seen: None, groups, places }
    }

    /// Takes in what was read at the gateway's time `at`, and returns the aggregates of windows that closed, and
    /// of closed windows that changed: by width, by window, then by device.
    pub fn push(&mut self, at: Timestamp, readings: &[Reading], missed: &mut Missed) -> Vec<Aggregate> {
        let (begun, now) = self.seen.map_or((at, at), |(begun, now)| (begun, now.max(at)));
        self.seen = Some((begun, now));
        let watermark = now - self.settings.lateness;
        let oldest = watermark - self.settings.revise_for;
        self.join(readings, oldest, now + self.settings.revise_for, missed);
        let closed = self.emit(|end| end <= watermark);
        // Only now, so that a reading that came with the poll which outdates its window still counts.
        for Group { width, windows, .. } in &mut self.groups {
            let oldest = oldest.floor(*width);
            while windows.first_key_value().is_some_and(|(start, window)| window.closed && *start < oldest) {
                windows.pop_first();
            }
        }
        closed
    }

    /// End of input: everything that is open closes.
    pub fn flush(&mut self) -> Vec<Aggregate> {
        let closed = self.emit(|_| true);
        self.groups.iter_mut().for_each(|group| group.windows.clear());
        closed
    }

    /// Adds readings to their windows, unless these end before `oldest` or the readings come after `newest`.
    /// Neighbours are mostly of one window.
    fn join(&mut self, readings: &[Reading], oldest: Timestamp, newest: Timestamp, missed: &mut Missed) {
        let mut rest = readings;
        while let Some(first) = rest.first() {
            let (of, _) = self.places[first.device.index()];
            let Group { width, devices, windows } = &mut self.groups[of];
            let start = first.ts.floor(*width);
            let span = start..start + *width;
            let is_alike = |r: &&Reading| span.contains(&r.ts) && self.places[r.device.index()].0 == of;
            let alike = rest[1..].iter().take_while(is_alike).count();
            let (run, after) = rest.split_at(1 + alike);
            rest = after;
            if start < oldest.floor(*width) {
                missed.late += run.len() as u64;
                continue;
            }
            let joins = |reading: &&Reading| reading.ts <= newest;
            let joining = run.iter().filter(joins).count();
            missed.early += (run.len() - joining) as u64;
            if joining == 0 {
                continue;
            }
            let empty = || Window { closed: false, changed: false, slots: vec![None; devices.len()] };
            let window = windows.entry(start).or_insert_with(empty);
            window.changed = true;
            for reading in run.iter().filter(joins) {
                let (_, slot) = self.places[reading.device.index()];
                let slot = window.slots[slot].get_or_insert_default();
                slot.stats.push(reading);
                slot.changed = true;
            }
        }
    }

    fn emit(&mut self, closes: impl Fn(Timestamp) -> bool) -> Vec<Aggregate> {
        let Some((begun, now)) = self.seen else { return Vec::new() };
        let mut out = Vec::new();
        for Group { width, devices, windows } in &mut self.groups {
            for (start, window) in windows {
                let (start, end) = (*start, *start + *width);
                if !closes(end) {
                    break;
                }
                window.closed = true;
                if !std::mem::take(&mut window.changed) {
                    continue;
                }
                let covered_from = begun.clamp(start, end);
                let covered_to = now.clamp(start, end);
                for (device, slot) in devices.iter().zip(&mut window.slots) {
                    let Some(slot) = slot.as_mut().filter(|slot| slot.changed) else { continue };
                    out.push(Aggregate {
                        start,
                        end,
                        device: *device,
                        stats: slot.stats,
                        covered_from,
                        covered_to,
                        partial: covered_from > start || covered_to < end,
                        revision: slot.revision,
                    });
                    slot.changed = false;
                    slot.revision += 1;
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SETTINGS: WindowSettings = WindowSettings {
        width: Duration::from_secs(10),
        lateness: Duration::from_secs(2),
        revise_for: Duration::from_secs(20),
    };

    fn at(second: i64) -> Timestamp {
        Timestamp::from_micros(second * 1_000_000)
    }

    fn reading(second: i64, device: u32, value: f64) -> Reading {
        let quality = if value.is_nan() { Quality::Bad } else { Quality::Good };
        Reading { ts: at(second), device: DeviceIx(device), quality, value }
    }

    /// Start in s, device, count, mean, partial, revision.
    type Row = (i64, u32, u64, Option<f64>, bool, i32);

    /// Pushes (gateway's second, readings) and flushes.
    fn check(polls: &[(i64, &[Reading])], expected: &[Row], missed: Missed) {
        let mut windows = Windows::new(SETTINGS, &[SETTINGS.width; 2]);
        let mut counted = Missed::default();
        let mut out = Vec::new();
        for (second, readings) in polls {
            out.extend(windows.push(at(*second), readings, &mut counted));
        }
        out.extend(windows.flush());
        let got: Vec<_> = out
            .iter()
            .map(|a| {
                let start = a.start.as_micros() / 1_000_000;
                (start, a.device.0, a.stats.count, a.stats.mean(), a.partial, a.revision)
            })
            .collect();
        assert_eq!(got, expected);
        assert_eq!(counted, missed);
    }

    #[test]
    fn a_window_closes_when_the_watermark_reaches_its_end() {
        check(
            &[
                (100, &[reading(100, 0, 1.0), reading(100, 1, 5.0)]),
                (109, &[reading(109, 0, 3.0)]),
                (111, &[reading(111, 0, 7.0), reading(108, 0, 2.0)]),
                (112, &[]),
                (122, &[]),
            ],
            &[
                (100, 0, 3, Some(2.0), false, 0),
                (100, 1, 1, Some(5.0), false, 0),
                (110, 0, 1, Some(7.0), false, 0),
            ],
            Missed::default(),
        );
    }

    #[test]
    fn devices_have_windows_of_their_own_width() {
        let mut windows = Windows::new(SETTINGS, &[SETTINGS.width, Duration::from_secs(4), SETTINGS.width]);
        let mut missed = Missed::default();
        let mut out = Vec::new();
        for second in 100..=112 {
            let readings = [0, 1, 2].map(|device| reading(second, device, second as f64));
            out.extend(windows.push(at(second), &readings, &mut missed));
        }
        // 2 s late: kept for 20 s in either width.
        out.extend(windows.push(at(127), &[reading(101, 1, 0.0), reading(100, 0, 0.0)], &mut missed));
        let got: Vec<_> = out.iter().map(|a| (a.start, a.device.0, a.stats.count, a.revision)).collect();
        let expected = [
            (100, 1, 4, 0),
            (104, 1, 4, 0),
            (100, 0, 10, 0),
            (100, 2, 10, 0),
            (100, 0, 11, 1),
            (110, 0, 3, 0),
            (110, 2, 3, 0),
            (108, 1, 4, 0),
            (112, 1, 1, 0),
        ];
        assert_eq!(
            got,
            expected.map(|(start, device, count, revision)| (at(start), device, count, revision))
        );
        assert_eq!(missed, Missed { late: 1, early: 0 });
        assert!(out.iter().all(
            |a| a.end == a.start + if a.device.0 == 1 { Duration::from_secs(4) } else { SETTINGS.width }
        ));
    }

    #[test]
    fn a_late_reading_makes_a_revision_and_an_older_one_is_counted() {
        check(
            &[
                (100, &[reading(100, 0, 1.0)]),
                (112, &[]),
                (113, &[reading(101, 0, 3.0)]),
                (131, &[reading(102, 0, 5.0)]),
                (142, &[reading(103, 0, 7.0)]),
            ],
            &[
                (100, 0, 1, Some(1.0), false, 0),
                (100, 0, 2, Some(2.0), false, 1),
                (100, 0, 3, Some(3.0), false, 2),
            ],
            Missed { late: 1, early: 0 },
        );
    }

    #[test]
    fn a_fast_device_closes_nothing_early() {
        check(
            &[
                (100, &[reading(100, 0, 1.0), reading(119, 1, 9.0), reading(9_000, 1, 9.0)]),
                (105, &[reading(105, 0, 3.0)]),
                (112, &[]),
                (122, &[]),
            ],
            &[(100, 0, 2, Some(2.0), false, 0), (110, 1, 1, Some(9.0), false, 0)],
            Missed { late: 0, early: 1 },
        );
    }

    #[test]
    fn what_is_not_covered_is_partial() {
        check(
            &[(103, &[reading(103, 0, 1.0)]), (112, &[reading(112, 0, 2.0)])],
            &[(100, 0, 1, Some(1.0), true, 0), (110, 0, 1, Some(2.0), true, 0)],
            Missed::default(),
        );
        let mut windows = Windows::new(SETTINGS, &[SETTINGS.width]);
        windows.push(at(103), &[reading(103, 0, 1.0)], &mut Missed::default());
        windows.push(at(107), &[], &mut Missed::default());
        let out = windows.flush();
        assert_eq!((out[0].covered_from, out[0].covered_to), (at(103), at(107)));
    }

    #[test]
    fn bad_readings_are_counted_apart() {
        let mut stats = Stats::default();
        for (second, value) in [(5, 4.0), (1, f64::NAN), (3, 2.0), (9, 6.0), (7, 8.0)] {
            stats.push(&reading(second, 0, value));
        }
        assert_eq!((stats.count, stats.bad_count), (4, 1));
        assert_eq!((stats.min(), stats.max(), stats.mean()), (Some(2.0), Some(8.0), Some(5.0)));
        assert_eq!((stats.first(), stats.last()), (Some(2.0), Some(6.0)));
        assert!((stats.stddev().unwrap() - (20.0f64 / 3.0).sqrt()).abs() < 1e-12);

        let mut bad = Stats::default();
        bad.push(&reading(1, 0, f64::NAN));
        assert_eq!((bad.mean(), bad.stddev(), bad.first()), (None, None, None));
    }

    proptest! {
        /// Far from zero the textbook formula loses all digits; Welford's must agree with two passes.
        #[test]
        fn statistics_agree_with_two_passes(
            offset in -1e9f64..1e9,
            values in proptest::collection::vec(-10.0f64..10.0, 2..200),
        ) {
            let mut stats = Stats::default();
            for (i, value) in values.iter().enumerate() {
                stats.push(&reading(i as i64, 0, offset + value));
            }
            let n = values.len() as f64;
            let mean = values.iter().sum::<f64>() / n;
            let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
            prop_assert!((stats.mean().unwrap() - offset - mean).abs() < 1e-5);
            prop_assert!((stats.stddev().unwrap() - variance.sqrt()).abs() < 1e-5);
        }

        /// Against a model that keeps every reading: the last revision of each (window, device) holds exactly the
        /// readings that came in time, and nothing else is emitted.
        #[test]
        fn the_last_revision_is_what_the_model_says(
            polls in proptest::collection::vec(
                (0i64..8, proptest::collection::vec((-40i64..25, 0u32..2, -5i32..5), 0..4)), 1..60),
        ) {
            let mut windows = Windows::new(SETTINGS, &[SETTINGS.width; 2]);
            let mut missed = Missed::default();
            let mut emitted: BTreeMap<(Timestamp, u32), (u64, f64, i32)> = BTreeMap::new();
            let mut model: BTreeMap<(Timestamp, u32), Vec<f64>> = BTreeMap::new();
            let mut model_missed = Missed::default();
            let mut take = |out: Vec<Aggregate>| {
                for a in out {
                    let revision = emitted.get(&(a.start, a.device.0)).map_or(0, |(_, _, r)| r + 1);
                    assert_eq!(a.revision, revision);
                    emitted.insert((a.start, a.device.0), (a.stats.count, a.stats.mean().unwrap(), revision));
                }
            };
            let mut now = 1_000;
            for (step, rows) in &polls {
                now += step;
                let batch: Vec<_> =
                    rows.iter().map(|(dt, device, v)| reading(now + dt, *device, f64::from(*v))).collect();
                for r in &batch {
                    let start = r.ts.as_micros().div_euclid(10_000_000) * 10;
                    if start < (now - 22).div_euclid(10) * 10 {
                        model_missed.late += 1;
                    } else if r.ts > at(now + 20) {
                        model_missed.early += 1;
                    } else {
                        model.entry((at(start), r.device.0)).or_default().push(r.value);
                    }
                }
                take(windows.push(at(now), &batch, &mut missed));
            }
            take(windows.flush());
            prop_assert_eq!(missed, model_missed);
            prop_assert_eq!(emitted.len(), model.len());
            for (key, values) in model {
                let (count, mean, _) = emitted[&key];
                prop_assert_eq!(count, values.len() as u64);
                prop_assert!((mean - values.iter().sum::<f64>() / values.len() as f64).abs() < 1e-9);
            }
        }
    }
}
