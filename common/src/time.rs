//! Time: the instant that travels with every reading, and the only module that may read a clock.
//!
//! Cores are handed a [`Timestamp`]; shells ask a [`Clock`]. `clippy.toml` bans every other wall clock.
//! Intervals that guard retries and timeouts are monotonic and belong to the runtime (`tokio::time`).
//!
//! An instant before [`EARLIEST`] is **provisional**: it counts from the start of a machine whose clock was not set,
//! and which machine start that was is told by whoever hands it on. So no flag has to travel beside an instant, and
//! the two kinds cannot be confused by accident.

#[cfg(target_os = "linux")]
pub mod machine;

use std::{fmt, future::Future, ops, pin::Pin, str::FromStr, time::Duration};

use chrono::{DateTime, SecondsFormat, TimeZone, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// An instant: microseconds since 1970-01-01T00:00:00Z, without leap seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

/// Microseconds in one hour, the grain of censuses, of bronze paths and of gold.
pub const HOUR_MICROS: i64 = 3_600_000_000;
/// No reading of ours is older, 2015-01-01T00:00:00Z: an instant before it is provisional.
pub const EARLIEST: Timestamp = Timestamp::from_micros(1_420_070_400_000_000);

impl Timestamp {
    /// The instant `micros` µs after the Unix epoch.
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since the Unix epoch.
    pub const fn as_micros(self) -> i64 {
        self.0
    }

    /// The start of the UTC hour that contains this instant.
    pub const fn hour(self) -> Self {
        self.floor_micros(HOUR_MICROS)
    }

    /// The start of the tumbling window of `width` that contains this instant; windows are aligned to the
    /// Unix epoch.
    ///
    /// # Panics
    /// When `width` is shorter than a microsecond.
    pub const fn floor(self, width: Duration) -> Self {
        self.floor_micros(width.as_micros() as i64)
    }

    const fn floor_micros(self, width: i64) -> Self {
        Self(self.0.div_euclid(width) * width)
    }

    /// How long after `earlier` this instant lies; zero when it lies before.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0).max(0).unsigned_abs())
    }

    /// Whether this instant counts from the start of a machine, because its clock was not set.
    pub const fn is_provisional(self) -> bool {
        self.0 < EARLIEST.0
    }

    /// This instant moved by `micros` µs, in either direction.
    pub const fn shifted(self, micros: i64) -> Self {
        Self(self.0.saturating_add(micros))
    }

    /// The calendar view in UTC; instants beyond chrono's years are clamped to its limits.
    pub fn to_utc(self) -> DateTime<Utc> {
        match Utc.timestamp_micros(self.0) {
            chrono::LocalResult::Single(at) => at,
            _ if self.0 < 0 => DateTime::<Utc>::MIN_UTC,
            _ => DateTime::<Utc>::MAX_UTC,
        }
    }
}

impl ops::Add<Duration> for Timestamp {
    type Output = Self;
    fn add(self, by: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(by.as_micros()).unwrap_or(i64::MAX)))
    }
}

impl ops::Sub<Duration> for Timestamp {
    type Output = Self;
    fn sub(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(by.as_micros()).unwrap_or(i64::MAX)))
    }
}

/// RFC 3339 in UTC with microseconds where they are not zero: `2026-03-01T06:00:00Z`.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_utc().to_rfc3339_opts(SecondsFormat::AutoSi, true))
    }
}

impl FromStr for Timestamp {
    type Err = chrono::ParseError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(DateTime::parse_from_rfc3339(text)?.timestamp_micros()))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|e| de::Error::custom(format!("{text:?} is not an RFC 3339 time: {e}")))
    }
}

/// A future that a [`Pacer`] returns.
pub type Sleep<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// Where shells get the time from: the machine's clock in the field, a discrete-event clock in the demo.
pub trait Clock: Send + Sync + 'static {
    /// The present.
    fn now(&self) -> Timestamp;

    /// A new participant that sleeps by this clock. A discrete-event clock moves only when all of its
    /// pacers sleep, so a source holds one for as long as it runs and drops it when it ends.
    fn pacer(&self) -> Box<dyn Pacer>;

    /// From when on whoever lives by this clock answers for what is due: the present, unless it goes on for a clock
    /// that has ended.
    fn began(&self) -> Timestamp {
        self.now()
    }

    /// Ends when time can only go on with a jump: then whoever lives by this clock stops, and begins anew with
    /// another one. It never jumps itself; most clocks never end.
    fn ended(&self) -> Sleep<'_> {
        Box::pin(std::future::pending())
    }
}

/// One sleeper of a [`Clock`].
pub trait Pacer: Send {
    /// Ends once the clock shows `until` or later. Dropping the future before that is allowed.
    fn sleep_until(&mut self, until: Timestamp) -> Sleep<'_>;
}

/// The machine's wall clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
    fn now(&self) -> Timestamp {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Timestamp(match since {
            Ok(after) => i64::try_from(after.as_micros()).unwrap_or(i64::MAX),
            Err(before) => -i64::try_from(before.duration().as_micros()).unwrap_or(i64::MAX),
        })
    }

    fn pacer(&self) -> Box<dyn Pacer> {
        Box::new(*self)
    }
}

impl Pacer for SystemClock {
    fn sleep_until(&mut self, until: Timestamp) -> Sleep<'_> {
        Box::pin(async move {
            // In pieces: the runtime's timers are monotonic, and the wall clock may be set meanwhile.
            loop {
                let left = until.since(self.now());
                if left.is_zero() {
                    return;
                }
                tokio::time::sleep(left.min(Duration::from_secs(10))).await;
            }
        })
    }
}

/// Durations in configuration: a number and a unit, `ms`, `s`, `min`, `h` or `d`, such as `"250ms"`.
pub mod duration {
    use super::{Deserialize, Deserializer, Duration, Serializer, de};

    /// Reads `"10s"`; an error names the text and the form that is expected.
    pub fn parse(text: &str) -> Result<Duration, String> {
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let scale_ms = match text[split..].trim() {
            "ms" => 1,
            "s" => 1_000,
            "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(format!("{text:?} is not a duration; write a number and ms, s, min, h or d")),
        };
        text[..split]
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(scale_ms))
            .map(Duration::from_millis)
            .ok_or_else(|| format!("{text:?} is not a duration; write a number and ms, s, min, h or d"))
    }

    /// Writes the largest unit that divides the duration: `90s`, `2h`.
    pub fn format(duration: Duration) -> String {
        let ms = duration.as_millis();
        [(86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s")]
            .into_iter()
            .find(|(scale, _)| ms != 0 && ms.is_multiple_of(*scale))
            .map_or_else(|| format!("{ms}ms"), |(scale, unit)| format!("{}{unit}", ms / scale))
    }

    /// For `#[serde(with = "common::time::duration")]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }

    /// For `#[serde(with = "common::time::duration")]`.
    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format(*duration))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_align_to_the_epoch_on_both_sides_of_it() {
        for (at, width, expected) in [(0, 10, 0), (9, 10, 0), (10, 10, 10), (-1, 10, -10), (-10, 10, -10)] {
            let floor = Timestamp::from_micros(at).floor(Duration::from_micros(width));
            assert_eq!(floor.as_micros(), expected, "{at} by {width}");
        }
    }

    #[test]
    fn provisional_is_what_no_reading_can_be() {
        for (text, provisional) in [
            ("1970-01-01T00:10:00Z", true),
            ("2014-12-31T23:59:59.999999Z", true),
            ("2015-01-01T00:00:00Z", false),
        ] {
            assert_eq!(text.parse::<Timestamp>().unwrap().is_provisional(), provisional, "{text}");
        }
    }

    #[test]
    fn text_and_back() {
        for text in ["2026-03-01T06:00:00Z", "2026-03-01T06:00:00.250Z", "1969-12-31T23:59:59.000001Z"] {
            let at: Timestamp = text.parse().unwrap();
            assert_eq!(at.to_string(), text);
        }
        let offset: Timestamp = "2026-03-01T07:00:00+01:00".parse().unwrap();
        assert_eq!(offset.to_string(), "2026-03-01T06:00:00Z");
    }

    #[test]
    fn durations() {
        for (text, ms) in [("250ms", 250), ("10s", 10_000), ("2min", 120_000), ("24h", 86_400_000)] {
            let parsed = duration::parse(text).unwrap();
            assert_eq!(parsed, Duration::from_millis(ms));
            assert_eq!(duration::parse(&duration::format(parsed)).unwrap(), parsed);
        }
        for wrong in ["", "10", "s", "1.5s", "-1s", "99999999999999999999d", "10 parsecs"] {
            assert!(duration::parse(wrong).unwrap_err().contains("write a number"), "{wrong:?}");
        }
    }
}
