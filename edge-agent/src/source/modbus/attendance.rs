//! Who answers, and whom to ask (pure).
//!
//! A slave that gave no answer is away: it is asked again after a pause that doubles from [`FIRST_PAUSE`] to
//! [`MAX_PAUSE`], and until then its devices report no value without being asked. At most one slave that is away is
//! asked in a poll, and it comes last, so that however many slaves are dead, those that live wait for one timeout at
//! most. A slave counts as away from its first missing answer: the next poll that finds it due may ask it again only
//! after the pause, by when an answer that came too late has been thrown away.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::backoff::Backoff;

/// The first pause before a slave, or the whole bus, is tried again.
pub(super) const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest one.
pub(super) const MAX_PAUSE: Duration = Duration::from_secs(30);

/// One that answers, or is tried again at a time.
struct Member {
    backoff: Backoff,
    away_until: Option<Instant>,
}

impl Member {
    fn new(seed: u64) -> Self {
        Self { backoff: Backoff::new(FIRST_PAUSE, MAX_PAUSE, seed), away_until: None }
    }

    /// Whether it was there before.
    fn failed(&mut self, now: Instant) -> bool {
        let pause = self.backoff.pause();
        self.away_until.replace(now + pause).is_none()
    }

    /// Whether it was away before.
    fn answered(&mut self) -> bool {
        self.backoff.succeeded();
        self.away_until.take().is_some()
    }
}

/// The slaves of a bus, by unit id, and the bus itself.
pub(super) struct Attendance {
    bus: Member,
    units: BTreeMap<u8, Member>,
}

impl Attendance {
    pub(super) fn new(units: impl IntoIterator<Item = u8>) -> Self {
        let units = units.into_iter().map(|unit| (unit, Member::new(u64::from(unit)))).collect();
        Self { bus: Member::new(u64::from(u8::MAX) + 1), units }
    }

    /// The units among `due` that are to be asked, in this order; the rest is away.
    pub(super) fn to_ask(&self, due: &[u8], now: Instant) -> Vec<u8> {
        if self.bus.away_until.is_some_and(|until| now < until) {
            return Vec::new();
        }
        let away_until = |unit: &u8| self.units.get(unit).and_then(|member| member.away_until);
        let mut asked: Vec<u8> = Vec::new();
        for unit in due.iter().filter(|unit| away_until(unit).is_none()) {
            if !asked.contains(unit) {
                asked.push(*unit);
            }
        }
        let tried = due.iter().filter_map(|unit| Some((away_until(unit)?, *unit)));
        asked.extend(tried.filter(|(until, _)| *until <= now).min().map(|(_, unit)| unit));
        asked
    }

    /// A unit gave no answer. True where that is news.
    pub(super) fn failed(&mut self, unit: u8, now: Instant) -> bool {
        self.units.get_mut(&unit).is_some_and(|member| member.failed(now))
    }

    /// A unit answered. True where that is news.
    pub(super) fn answered(&mut self, unit: u8) -> bool {
        self.units.get_mut(&unit).is_some_and(Member::answered)
    }

    /// The bus cannot be opened. True where that is news.
    pub(super) fn bus_failed(&mut self, now: Instant) -> bool {
        self.bus.failed(now)
    }

    /// The bus is open. True where that is news.
    pub(super) fn bus_opened(&mut self) -> bool {
        self.bus.answered()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_dead_do_not_delay_the_living() {
        let start = Instant::now();
        let mut attendance = Attendance::new([1, 2, 3, 4]);
        assert_eq!(attendance.to_ask(&[1, 2, 2, 3, 4], start), [1, 2, 3, 4]);
        assert!(attendance.failed(1, start));
        assert!(attendance.failed(3, start + SECOND / 10));
        assert_eq!(attendance.to_ask(&[1, 2, 3, 4], start + SECOND / 5), [2, 4]);
        // Both pauses are over: one of them is tried, the one that waits longer, and last.
        let later = start + 2 * SECOND;
        assert_eq!(attendance.to_ask(&[1, 2, 3, 4], later).len(), 3);
        let tried = attendance.to_ask(&[1, 2, 3, 4], later)[2];
        assert!(!attendance.failed(tried, later), "it has been away before");
        let other = attendance.to_ask(&[1, 2, 3, 4], later)[2];
        assert_eq!((tried.min(other), tried.max(other)), (1, 3));
        assert!(attendance.answered(other));
        assert!(!attendance.answered(other));
        assert!(attendance.to_ask(&[1, 2, 3, 4], later).contains(&other));
        // Only what is due is asked.
        assert_eq!(attendance.to_ask(&[4], later), [4]);
    }

    #[test]
    fn pauses_grow_and_end() {
        let mut attendance = Attendance::new([7]);
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            attendance.failed(7, now);
            let begin = now;
            while attendance.to_ask(&[7], now).is_empty() {
                now += SECOND / 10;
            }
            pauses.push(now - begin);
        }
        assert!(pauses[0] >= SECOND / 2 && pauses[0] <= 2 * SECOND, "{pauses:?}");
        assert!(pauses[7] >= MAX_PAUSE / 2 && pauses[7] <= MAX_PAUSE + SECOND, "{pauses:?}");
        attendance.answered(7);
        assert_eq!(attendance.to_ask(&[7], now), [7]);
    }

    #[test]
    fn nobody_is_asked_on_a_dead_bus() {
        let start = Instant::now();
        let mut attendance = Attendance::new([1, 2]);
        assert!(attendance.bus_failed(start));
        assert!(attendance.to_ask(&[1, 2], start + SECOND / 10).is_empty());
        assert_eq!(attendance.to_ask(&[1, 2], start + SECOND), [1, 2]);
        assert!(attendance.bus_opened());
        assert!(!attendance.bus_opened());
    }
}
