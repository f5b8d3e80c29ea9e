//! The agent's time, and when it must begin anew (pure). The rules are in the documentation of [`super`].

use std::time::Duration;

use common::time::{Timestamp, machine::Shown};

/// Before this software was written, 2025-01-01T00:00:00Z: a clock that shows less was not set.
pub(super) const WRITTEN: Timestamp = Timestamp::from_micros(1_735_689_600_000_000);
/// A wall clock may lie this far behind what the outbox holds: an earlier run's clock may have been ahead.
const BEHIND: Duration = Duration::from_secs(7 * 86_400);
/// The largest difference that is followed without a jump.
const SLEWED: Duration = Duration::from_secs(10);
/// Part of the time that a difference is made up with: 10 s take 1,000 s.
const SLEW_PART: i64 = 100;
/// Differences below are the reading of two clocks one after the other.
const NOISE_MICROS: i64 = 1_000;
/// Two observations show the same step when they differ by less.
const SAME_STEP_MICROS: i64 = 1_000_000;
/// How long a step must stay before it is believed while the kernel says that the clock is synchronised …
const CONFIRM_SYNCED: Duration = Duration::from_secs(60);
/// … and while it does not, as after a step by hand.
const CONFIRM: Duration = Duration::from_secs(600);

/// What is known besides the clocks themselves.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Known {
    /// The configuration says that the wall clock is right.
    pub(super) trust: bool,
    /// The wall clock goes on while the machine has no power.
    pub(super) keeps_time: bool,
    /// Latest true time that the outbox was written at.
    pub(super) last: Option<Timestamp>,
    /// From the time since this start of the machine to true time, in µs, as an earlier run knew it.
    pub(super) offset: Option<i64>,
    /// When messages stop waiting for the clock to be set; none once they do no longer.
    pub(super) wait_until: Option<Timestamp>,
}

/// Why a timeline ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The clock was set.
    Set,
    /// It was not set in time.
    GaveUp,
    /// It was moved by so many µs.
    Stepped(i64),
}

/// One stretch of the agent's time, on which it never jumps and never goes back.
#[derive(Clone, Debug)]
pub(super) struct Timeline {
    known: Known,
    mode: Mode,
    /// A step that was seen: the offset after it, and since when.
    step: Option<(i64, Timestamp)>,
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    /// Time is the time since the machine's start.
    Unset,
    /// Time is that plus an offset in µs, which moves from `from` to `to` since `since`.
    Set { from: i64, to: i64, since: Timestamp },
}

impl Timeline {
    /// The timeline that begins now. At the start the wall clock is taken as it is, if it can be believed at all.
    pub(super) fn begin(shown: &Shown, known: Known) -> Self {
        let offset = if known.believes(shown) { Some(shown.offset()) } else { known.offset };
        let mode = offset.map_or(Mode::Unset, |to| Mode::Set { from: to, to, since: shown.up });
        Self { known, mode, step: None }
    }

    /// The agent's time when the machine has been up for `up`.
    pub(super) fn at(&self, up: Timestamp) -> Timestamp {
        up.shifted(self.offset_at(up).unwrap_or(0))
    }

    /// From the time since the machine's start to true time, in µs; none while that is not known.
    pub(super) fn offset(&self) -> Option<i64> {
        match self.mode {
            Mode::Unset => None,
            Mode::Set { to, .. } => Some(to),
        }
    }

    fn offset_at(&self, up: Timestamp) -> Option<i64> {
        match self.mode {
            Mode::Unset => None,
            Mode::Set { from, to, since } => {
                let most = micros(up.since(since)) / SLEW_PART;
                Some(from + (to - from).clamp(-most, most))
            }
        }
    }

    /// Takes in what the clocks show; to be called about once a second until the timeline ends.
    pub(super) fn observe(&mut self, shown: &Shown) -> Option<End> {
        let Some(offset) = self.offset_at(shown.up) else {
            if self.known.believes(shown) {
                return Some(End::Set);
            }
            return self.known.wait_until.is_some_and(|until| shown.up >= until).then_some(End::GaveUp);
        };
        let by = shown.offset() - offset;
        if by.unsigned_abs() <= SLEWED.as_micros() as u64 {
            self.step = None;
            if by.abs() >= NOISE_MICROS {
                self.mode = Mode::Set { from: offset, to: shown.offset(), since: shown.up };
            }
            return None;
        }
        if !self.known.believes(shown) {
            self.step = None;
            return None;
        }
        let same = self.step.filter(|(to, _)| (shown.offset() - to).abs() < SAME_STEP_MICROS);
        if same.is_none() {
            tracing::warn!(
                seconds = by / 1_000_000,
                synced = shown.synced,
                "the machine's clock was moved; its time is used once it has stayed there for a while"
            );
        }
        let (_, since) = *self.step.insert(same.unwrap_or((shown.offset(), shown.up)));
        let confirm = if shown.synced { CONFIRM_SYNCED } else { CONFIRM };
        (shown.up.since(since) >= confirm).then_some(End::Stepped(by))
    }
}

impl Known {
    /// Whether the wall clock can be right.
    fn believes(&self, shown: &Shown) -> bool {
        let plausible = |last: Timestamp| shown.wall + BEHIND >= last;
        shown.wall >= WRITTEN
            && (shown.synced || self.trust || self.keeps_time && self.last.is_none_or(plausible))
    }
}

fn micros(of: Duration) -> i64 {
    i64::try_from(of.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY: i64 = 86_400;
    const NOW: i64 = 1_795_249_000;

    fn seconds(s: i64) -> Timestamp {
        Timestamp::from_micros(s * 1_000_000)
    }

    /// What clocks show that began with the machine's start `NOW` seconds after 1970, `by` seconds beside that.
    fn shown(up: i64, by: i64, synced: bool) -> Shown {
        Shown { up: seconds(up), wall: seconds(NOW + up + by), synced }
    }

    fn at_1970(up: i64) -> Shown {
        Shown { up: seconds(up), wall: seconds(up + 5), synced: false }
    }

    const RTC: Known = Known { trust: false, keeps_time: true, last: None, offset: None, wait_until: None };
    const NO_RTC: Known = Known { keeps_time: false, ..RTC };

    /// (until second, moved by, synchronised) once a second; when the timeline ends and why.
    fn ends(known: Known, start: Shown, phases: &[(i64, i64, bool)]) -> Option<(i64, End)> {
        let mut timeline = Timeline::begin(&start, known);
        let mut up = start.up.as_micros() / 1_000_000;
        let mut last = timeline.at(start.up);
        for &(until, by, synced) in phases {
            while up < until {
                up += 1;
                let shown = shown(up, by, synced);
                if let Some(end) = timeline.observe(&shown) {
                    return Some((up, end));
                }
                let now = timeline.at(shown.up);
                let passed = now.as_micros() - last.as_micros();
                assert!((990_000..=1_010_000).contains(&passed), "{passed} µs in a second at {up} s");
                last = now;
            }
        }
        None
    }

    #[test]
    fn steps_are_followed_once_they_have_stayed() {
        let minute = 60;
        for (by, synced, stays, expected) in [
            // By hand, or by a daemon that does not tell the kernel.
            (DAY, false, 10 * minute, None),
            (DAY, false, 11 * minute, Some(700)),
            (-DAY, false, 11 * minute, Some(700)),
            // By NTP.
            (DAY, true, minute, None),
            (DAY, true, 2 * minute, Some(160)),
            (-DAY, true, 2 * minute, Some(160)),
            (-3_600, true, 2 * minute, Some(160)),
            // Made up without a jump: timesyncd's small steps, a leap second.
            (10, true, DAY, None),
            (-1, true, DAY, None),
            // The week of GPS rolled over: before this software was written.
            (-1024 * 7 * DAY, true, DAY, None),
        ] {
            let end = expected.map(|at| (at + 1, End::Stepped(by * 1_000_000)));
            let phases = [(100, 0, synced), (100 + stays, by, synced), (100 + 2 * stays, 0, synced)];
            assert_eq!(ends(RTC, shown(0, 0, synced), &phases), end, "{by} s, synchronised {synced}");
        }
    }

    #[test]
    fn a_step_to_another_place_waits_anew() {
        let phases = [(100, 0, true), (150, DAY, true), (200, -DAY, true), (300, DAY, true)];
        let end = Some((261, End::Stepped(DAY * 1_000_000)));
        assert_eq!(ends(RTC, shown(0, 0, true), &phases), end);
        // NTP confirms a step that was made by hand.
        let phases = [(100, 0, false), (150, DAY, false), (300, DAY, true)];
        assert_eq!(ends(RTC, shown(0, 0, false), &phases), Some((161, End::Stepped(DAY * 1_000_000))));
    }

    #[test]
    fn small_differences_are_made_up_within_a_hundred_times_their_length() {
        let mut timeline = Timeline::begin(&shown(0, 0, true), RTC);
        for (up, by, ahead) in
            [(1, 4, 0), (201, 4, 2), (402, 4, 4), (403, -1, 4), (500, -1, 3), (1_000, -1, -1)]
        {
            assert_eq!(timeline.observe(&shown(up, by, true)), None);
            let beside = timeline.at(seconds(up)).as_micros() - seconds(NOW + up).as_micros();
            assert!((beside - ahead * 1_000_000).abs() <= 40_000, "{beside} µs at {up} s");
        }
    }

    #[test]
    fn suspend_is_no_step() {
        let mut timeline = Timeline::begin(&shown(10, 0, false), RTC);
        assert_eq!(timeline.observe(&shown(10 + 3 * DAY, 0, false)), None);
        assert_eq!(timeline.at(seconds(10 + 3 * DAY)), seconds(NOW + 10 + 3 * DAY));
    }

    #[test]
    fn what_counts_as_set_at_the_start() {
        let wall = |text: &str, synced| Shown { up: seconds(30), wall: text.parse().unwrap(), synced };
        let held = |text: &str| Some(text.parse().unwrap());
        let trusted = Known { trust: true, ..NO_RTC };
        let earlier = Known { offset: Some(NOW * 1_000_000), ..NO_RTC };
        for (shown, known, set) in [
            (wall("1970-01-01T00:00:40Z", false), RTC, false),
            // Nothing makes such a time right.
            (wall("1970-01-01T00:00:40Z", true), trusted, false),
            // The time of the image, or fake-hwclock's.
            (wall("2026-11-20T00:00:00Z", false), NO_RTC, false),
            (wall("2026-11-20T00:00:00Z", true), NO_RTC, true),
            (wall("2026-11-20T00:00:00Z", false), trusted, true),
            (wall("2026-11-20T00:00:00Z", false), RTC, true),
            // An RTC that lost its battery, and one that was a day ahead before.
            (wall("2026-01-01T00:00:00Z", false), Known { last: held("2026-11-20T00:00:00Z"), ..RTC }, false),
            (wall("2026-01-01T00:00:00Z", true), Known { last: held("2026-11-20T00:00:00Z"), ..RTC }, true),
            (wall("2026-11-19T00:00:00Z", false), Known { last: held("2026-11-20T00:00:00Z"), ..RTC }, true),
            // Set since this start of the machine; the daemon is silent now.
            (wall("2026-11-20T00:00:00Z", false), earlier, true),
        ] {
            let timeline = Timeline::begin(&shown, known);
            assert_eq!(timeline.offset().is_some(), set, "{shown:?} {known:?}");
            assert_eq!(timeline.at(shown.up).is_provisional(), !set);
        }
    }

    #[test]
    fn a_clock_that_is_not_set_ends_when_it_is_or_when_the_wait_is_over() {
        let waits = Known { wait_until: Some(seconds(DAY)), ..NO_RTC };
        let start = || Timeline::begin(&at_1970(0), waits);
        let mut set = start();
        assert_eq!(set.observe(&at_1970(599)), None);
        assert_eq!(set.at(seconds(599)), seconds(599));
        assert_eq!(set.observe(&shown(600, 0, true)), Some(End::Set));

        let mut never = start();
        assert_eq!(never.observe(&at_1970(DAY - 1)), None);
        assert_eq!(never.observe(&at_1970(DAY)), Some(End::GaveUp));
        let mut then = Timeline::begin(&at_1970(DAY), NO_RTC);
        assert_eq!(then.observe(&at_1970(25 * 3_600)), None);
        assert_eq!(then.observe(&shown(26 * 3_600, 0, true)), Some(End::Set));
    }

    proptest! {
        /// Whatever is done to the wall clock: within a timeline time goes on by what passed, give or take a
        /// hundredth, and a timeline ends only where the wall clock has been elsewhere for its time.
        #[test]
        fn time_goes_on_whatever_is_done_to_the_wall_clock(
            known in prop_oneof![Just(RTC), Just(NO_RTC)],
            phases in proptest::collection::vec(
                (1i64..900, prop_oneof![-2 * DAY..2 * DAY, -20i64..20, Just(0), Just(-NOW)], any::<bool>()), 1..12),
        ) {
            let mut up = 0;
            let mut timeline = Timeline::begin(&shown(0, 0, false), known);
            let mut began = 0;
            for (lasts, by, synced) in phases {
                for _ in 0..lasts {
                    let before = timeline.at(seconds(up));
                    up += 1;
                    let now = shown(up, by, synced);
                    let passed = timeline.at(now.up).as_micros() - before.as_micros();
                    prop_assert!((989_999..=1_010_001).contains(&passed), "{} µs", passed);
                    let was = timeline.at(now.up);
                    match timeline.observe(&now) {
                        None => prop_assert_eq!(timeline.at(now.up), was, "to observe moves nothing"),
                        Some(end) => {
                            if let End::Stepped(by) = end {
                                prop_assert!(up - began > 60 && by.abs() > 10_000_000);
                            }
                            timeline = Timeline::begin(&now, known);
                            began = up;
                            prop_assert_eq!(timeline.at(now.up), now.wall);
                        }
                    }
                }
            }
        }
    }
}
