//! The days and shifts of a site, by its IANA time zone. Pure.
//!
//! * A day begins at local midnight and ends where the next one begins, so it has 23 or 25 hours when the clocks are
//!   changed.
//! * A shift begins at its local time and ends where the next one begins, the last of a day at the first of the next.
//!   All of it belongs to the day on which it began.
//! * A local time that is skipped when the clocks are put forward is the moment at which that happens; one that comes
//!   twice is the first of the two.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    time::Duration,
};

use chrono::{
    DateTime, Days, LocalResult, NaiveDate, NaiveDateTime, NaiveTime, Offset, TimeDelta, TimeZone, Utc,
};
use chrono_tz::{IANA_TZDB_VERSION, Tz};
use common::{config::Mistakes, time::Timestamp};
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// `[gold.sites.NAME]`, as it is written.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct SiteSettings {
    #[serde(default = "utc")]
    pub time_zone: String,
    /// Local start, such as `06:00`, by name.
    #[serde(default)]
    pub shifts: BTreeMap<String, String>,
}

fn utc() -> String {
    "UTC".to_owned()
}

/// The calendar of every site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calendars {
    sites: BTreeMap<String, Calendar>,
    /// Of sites that are not named.
    other: Calendar,
}

/// The calendar of one site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calendar {
    zone: Tz,
    /// In the order of the day.
    shifts: Vec<(NaiveTime, String)>,
}

/// A day or a shift.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The local date on which it begins.
    pub day: NaiveDate,
    /// `None` for the whole day.
    pub shift: Option<String>,
    /// From its first instant to that of what follows.
    pub span: Range<Timestamp>,
}

impl Default for Calendars {
    fn default() -> Self {
        Self { sites: BTreeMap::new(), other: Calendar { zone: Tz::UTC, shifts: Vec::new() } }
    }
}

impl Calendars {
    /// Notes what cannot be used in `m`, and takes UTC without shifts for it.
    pub fn parse(sites: &BTreeMap<String, SiteSettings>, m: &mut Mistakes) -> Calendars {
        let parsed = sites.iter().map(|(name, site)| {
            let key = format!("gold.sites.{name}");
            (name.clone(), Calendar::parse(&key, site, m))
        });
        Calendars { sites: parsed.collect(), ..Calendars::default() }
    }

    /// The name of a site that is named; the others share what `None` stands for.
    pub fn named(&self, site: &str) -> Option<&str> {
        self.sites.get_key_value(site).map(|(name, _)| name.as_str())
    }

    /// The windows that overlap one of `spans`, of each site that is named, and of the others.
    pub fn windows(&self, spans: &[Range<Timestamp>]) -> Vec<(Option<&str>, Window)> {
        let sites = self.sites.iter().map(|(name, calendar)| (Some(name.as_str()), calendar));
        let mut windows = Vec::new();
        for (site, calendar) in sites.chain([(None, &self.other)]) {
            // Neighbouring spans overlap the same window.
            let mut seen = BTreeSet::new();
            for window in spans.iter().flat_map(|span| calendar.windows(span)) {
                if seen.insert((window.day, window.shift.clone())) {
                    windows.push((site, window));
                }
            }
        }
        windows
    }

    /// Another number when any window may be another one, also by new rules of time zones.
    pub fn fingerprint(&self) -> i64 {
        let hash = Sha256::digest(format!("{self:?} {IANA_TZDB_VERSION}"));
        let first = hash[..8].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
        (first >> 1).cast_signed()
    }
}

impl Calendar {
    fn parse(key: &str, site: &SiteSettings, m: &mut Mistakes) -> Calendar {
        let zone = site.time_zone.parse().unwrap_or_else(|_| {
            m.add(
                format!("{key}.time_zone"),
                format!("{:?} is no IANA time zone", site.time_zone),
                "write one such as Europe/Vienna or Asia/Kolkata",
            );
            Tz::UTC
        });
        let mut shifts: Vec<(NaiveTime, String)> = Vec::new();
        for (name, text) in &site.shifts {
            let start = NaiveTime::parse_from_str(text, "%H:%M");
            match start {
                Ok(start) if !name.is_empty() && shifts.iter().all(|(known, _)| *known != start) => {
                    shifts.push((start, name.clone()));
                }
                Ok(_) => m.add(
                    format!("{key}.shifts"),
                    format!("{name:?} at {text} has no name, or begins with another one"),
                    "give each shift a name and a start of its own",
                ),
                Err(_) => m.add(
                    format!("{key}.shifts.{name}"),
                    format!("{text:?} is no time of day"),
                    "write its local start, such as \"06:00\"",
                ),
            }
        }
        shifts.sort();
        Calendar { zone, shifts }
    }

    /// The days and shifts that overlap `span`.
    fn windows(&self, span: &Range<Timestamp>) -> Vec<Window> {
        let date = |at: Timestamp| at.to_utc().with_timezone(&self.zone).date_naive();
        // The night shift of the day before, and a day that may have been left out of the calendar.
        let first = date(span.start).checked_sub_days(Days::new(2)).unwrap_or(NaiveDate::MIN);
        let days = first.iter_days().take_while(|day| *day <= date(span.end));
        let windows = days.flat_map(|day| self.windows_of(day));
        windows.filter(|w| w.span.start < span.end && span.start < w.span.end).collect()
    }

    /// The whole day, and its shifts.
    fn windows_of(&self, day: NaiveDate) -> Vec<Window> {
        let Some(next) = day.succ_opt() else { return Vec::new() };
        let window = |shift: Option<&String>, from: NaiveDateTime, to: NaiveDateTime| Window {
            day,
            shift: shift.cloned(),
            span: self.instant(from)..self.instant(to),
        };
        let whole = window(None, day.and_time(NaiveTime::MIN), next.and_time(NaiveTime::MIN));
        let shifts = self.shifts.iter().enumerate().map(|(n, (start, name))| {
            let end = match self.shifts.get(n + 1) {
                Some((end, _)) => day.and_time(*end),
                None => next.and_time(self.shifts[0].0),
            };
            window(Some(name), day.and_time(*start), end)
        });
        // Nothing is left of one that was skipped.
        [whole].into_iter().chain(shifts).filter(|w| w.span.start < w.span.end).collect()
    }

    fn instant(&self, local: NaiveDateTime) -> Timestamp {
        let at: DateTime<Utc> = match self.zone.from_local_datetime(&local) {
            LocalResult::Single(at) | LocalResult::Ambiguous(at, _) => at.to_utc(),
            LocalResult::None => self.end_of_gap(local),
        };
        Timestamp::from_micros(at.timestamp_micros())
    }

    /// The first instant after the gap in which this local time lies.
    fn end_of_gap(&self, local: NaiveDateTime) -> DateTime<Utc> {
        let day_before = self.zone.offset_from_local_datetime(&(local - TimeDelta::days(1))).earliest();
        let before = day_before.map_or(0, |offset| offset.fix().local_minus_utc());
        let after = (local - TimeDelta::seconds(i64::from(before))).and_utc();
        let offset = |at: DateTime<Utc>| self.zone.offset_from_utc_datetime(&at.naive_utc()).fix();
        let back = (0..24 * 60).map(|minutes| after - TimeDelta::minutes(minutes));
        back.take_while(|at| offset(*at) == offset(after)).last().unwrap_or(after)
    }
}

impl Window {
    /// The full hours in it.
    pub fn hours(&self) -> impl Iterator<Item = Timestamp> + use<> {
        let end = self.span.end;
        let hours = std::iter::successors(Some(ceil(self.span.start)), |hour| Some(*hour + HOUR));
        hours.take_while(move |hour| *hour + HOUR <= end)
    }

    /// The hours of which only a part is in it, and those parts.
    pub fn part_hours(&self) -> impl Iterator<Item = (Timestamp, Range<Timestamp>)> + use<> {
        let span = self.span.clone();
        let ends = BTreeSet::from([span.start.hour(), span.end.hour()]);
        ends.into_iter().filter_map(move |hour| {
            let part = hour.max(span.start)..(hour + HOUR).min(span.end);
            (part.start < part.end && part != (hour..hour + HOUR)).then_some((hour, part))
        })
    }
}

const HOUR: Duration = Duration::from_secs(3600);

fn ceil(at: Timestamp) -> Timestamp {
    if at == at.hour() { at } else { at.hour() + HOUR }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calendar(zone: &str, shifts: &[(&str, &str)]) -> Calendar {
        let shifts = shifts.iter().map(|(n, t)| ((*n).to_owned(), (*t).to_owned())).collect();
        let mut m = Mistakes::default();
        let parsed = Calendar::parse("x", &SiteSettings { time_zone: zone.into(), shifts }, &mut m);
        assert_eq!(m.list, []);
        parsed
    }

    fn of_day(calendar: &Calendar, day: &str) -> Vec<(Option<String>, String, String)> {
        let windows = calendar.windows_of(day.parse().unwrap());
        windows.into_iter().map(|w| (w.shift, w.span.start.to_string(), w.span.end.to_string())).collect()
    }

    #[test]
    fn days_begin_at_local_midnight() {
        // Zone, day, from, to (UTC).
        for (zone, day, from, to) in [
            ("UTC", "2026-03-29", "2026-03-29T00:00:00Z", "2026-03-30T00:00:00Z"),
            // 23 and 25 hours.
            ("Europe/Vienna", "2026-03-29", "2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z"),
            ("Europe/Vienna", "2026-10-25", "2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z"),
            ("Asia/Kolkata", "2026-03-01", "2026-02-28T18:30:00Z", "2026-03-01T18:30:00Z"),
            ("Asia/Kathmandu", "2026-03-01", "2026-02-28T18:15:00Z", "2026-03-01T18:15:00Z"),
            // Clocks put forward by half an hour, at 2 o'clock.
            ("Australia/Lord_Howe", "2026-10-04", "2026-10-03T13:30:00Z", "2026-10-04T13:00:00Z"),
            // Midnight itself is skipped, or comes twice.
            ("Africa/Cairo", "2026-04-24", "2026-04-23T22:00:00Z", "2026-04-24T21:00:00Z"),
            ("Africa/Cairo", "2026-10-29", "2026-10-28T21:00:00Z", "2026-10-29T22:00:00Z"),
            ("America/Havana", "2026-11-01", "2026-11-01T04:00:00Z", "2026-11-02T05:00:00Z"),
        ] {
            let found = of_day(&calendar(zone, &[]), day);
            assert_eq!(found, [(None, from.to_owned(), to.to_owned())], "{zone} {day}");
        }
        // Samoa crossed the date line and had no such day.
        assert_eq!(of_day(&calendar("Pacific/Apia", &[]), "2011-12-30"), []);
    }

    #[test]
    fn a_shift_belongs_to_the_day_on_which_it_begins() {
        let plant = calendar("Europe/Vienna", &[("night", "22:00"), ("early", "06:00"), ("late", "14:00")]);
        let found = of_day(&plant, "2026-10-24");
        let shift =
            |name: &str, from: &str, to: &str| (Some(name.to_owned()), from.to_owned(), to.to_owned());
        assert_eq!(
            found[1..],
            [
                shift("early", "2026-10-24T04:00:00Z", "2026-10-24T12:00:00Z"),
                shift("late", "2026-10-24T12:00:00Z", "2026-10-24T20:00:00Z"),
                // Nine hours: the clocks are put back in this night.
                shift("night", "2026-10-24T20:00:00Z", "2026-10-25T05:00:00Z"),
            ]
        );
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let hour = at("2026-10-25T03:00:00Z")..at("2026-10-25T04:00:00Z");
        let overlapping: Vec<(String, Option<String>)> =
            plant.windows(&hour).into_iter().map(|w| (w.day.to_string(), w.shift)).collect();
        let named = |day: &str, shift: Option<&str>| (day.to_owned(), shift.map(str::to_owned));
        assert_eq!(overlapping, [named("2026-10-24", Some("night")), named("2026-10-25", None)]);
    }

    #[test]
    fn every_instant_is_in_one_day_and_one_shift() {
        let shifts = [("a", "00:15"), ("b", "02:00"), ("c", "02:30"), ("d", "03:15"), ("e", "23:45")];
        for zone in
            ["Europe/Vienna", "Asia/Kathmandu", "Africa/Cairo", "Australia/Lord_Howe", "America/Havana"]
        {
            let calendar = calendar(zone, &shifts);
            let year = "2026-01-01".parse::<NaiveDate>().unwrap().iter_days().take(366);
            let mut windows: Vec<Window> = year.flat_map(|day| calendar.windows_of(day)).collect();
            windows.sort_by_key(|w| (w.shift.is_some(), w.span.start));
            let ends: Vec<&[Window]> = windows.chunk_by(|a, b| a.span.end == b.span.start).collect();
            assert_eq!(ends.len(), 2, "{zone}: a gap, or an overlap");
            for window in &windows {
                let parts: i64 = window.part_hours().map(|(_, part)| length(&part)).sum();
                let hours = window.hours().count() as i64 * 3_600_000_000;
                assert_eq!(parts + hours, length(&window.span), "{zone} {window:?}");
            }
        }
    }

    fn length(span: &Range<Timestamp>) -> i64 {
        span.end.as_micros() - span.start.as_micros()
    }

    #[test]
    fn mistakes_name_the_site_and_the_value() {
        let shifts = [("early", "6 o'clock"), ("late", "14:00"), ("later", "14:00")];
        let shifts = shifts.map(|(n, t)| (n.to_owned(), t.to_owned())).into();
        let site = SiteSettings { time_zone: "Vienna".into(), shifts };
        let mut m = Mistakes::of("test");
        Calendars::parse(&BTreeMap::from([("plant-1".to_owned(), site)]), &mut m);
        let text = m.to_string();
        for part in [
            "gold.sites.plant-1.time_zone: \"Vienna\" is no IANA time zone; write one such as Europe/Vienna",
            "gold.sites.plant-1.shifts.early: \"6 o'clock\" is no time of day",
            "\"later\" at 14:00",
        ] {
            assert!(text.contains(part), "{part} not in {text}");
        }
    }
}
