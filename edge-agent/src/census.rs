//! What became of every reading, counted by the hour of its event time.
//!
//! `polled = sealed + held + rejected + skipped`, for every hour, at every durable point: counts travel with the
//! batches that they count ([`crate::pipeline`]) and are written in the transaction that makes those batches
//! durable, so a crash loses a batch and its counts together. A reading that was due and never read counts as
//! `polled` and as `skipped`.
//!
//! Serialised as a list of `[hour in µs, outcome, count]`, sorted.

use std::{collections::BTreeMap, fmt, str::FromStr};

use common::time::{HOUR_MICROS, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// What became of a reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// It was due at a source, or came to it unasked.
    Polled,
    /// It is in a sealed message of the readings lane.
    Sealed,
    /// The deadband kept it back; windows and models saw it.
    Held,
    /// It was due and not read: the pipe was full or the bus too slow.
    Skipped,
    /// It was read and cannot be a reading.
    Rejected(Reason),
}

/// Why a reading was rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// It names no device of this gateway.
    UnknownDevice,
    /// It cannot be parsed.
    Malformed,
    /// A message of another device holds no value where one should stand.
    NoValue,
    /// Its value is infinite or not a number.
    NotFinite,
    /// Its time lies ahead of the gateway's.
    Future,
    /// Its time lies too long ago.
    Past,
    /// It is the device's latest reading once more.
    Repeated,
    /// A broker kept it for an unknown time, and it has none of its own.
    Retained,
}

impl Reason {
    /// The word on the wire and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UnknownDevice => "unknown_device",
            Self::Malformed => "malformed",
            Self::NoValue => "no_value",
            Self::NotFinite => "not_finite",
            Self::Future => "future",
            Self::Past => "past",
            Self::Repeated => "repeated",
            Self::Retained => "retained",
        }
    }
}

impl Outcome {
    /// Every outcome, as metrics list them.
    pub const ALL: [Outcome; 12] = [
        Self::Polled,
        Self::Sealed,
        Self::Held,
        Self::Skipped,
        Self::Rejected(Reason::UnknownDevice),
        Self::Rejected(Reason::Malformed),
        Self::Rejected(Reason::NoValue),
        Self::Rejected(Reason::NotFinite),
        Self::Rejected(Reason::Future),
        Self::Rejected(Reason::Past),
        Self::Rejected(Reason::Repeated),
        Self::Rejected(Reason::Retained),
    ];

    /// The word on the wire: `polled`, `sealed`, `held`, `skipped`, `rejected:<why>`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Polled => "polled",
            Self::Sealed => "sealed",
            Self::Held => "held",
            Self::Skipped => "skipped",
            Self::Rejected(Reason::UnknownDevice) => "rejected:unknown_device",
            Self::Rejected(Reason::Malformed) => "rejected:malformed",
            Self::Rejected(Reason::NoValue) => "rejected:no_value",
            Self::Rejected(Reason::NotFinite) => "rejected:not_finite",
            Self::Rejected(Reason::Future) => "rejected:future",
            Self::Rejected(Reason::Past) => "rejected:past",
            Self::Rejected(Reason::Repeated) => "rejected:repeated",
            Self::Rejected(Reason::Retained) => "rejected:retained",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Outcome {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|outcome| outcome.as_str() == text);
        found.ok_or_else(|| format!("{text:?} is no outcome of a reading"))
    }
}

/// Counts of readings by hour and outcome. Sorted, and short: mostly of one hour.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census(Vec<((Timestamp, Outcome), u64)>);

impl Census {
    /// Counts `n` readings of the hour that contains `at`.
    pub fn add(&mut self, at: Timestamp, outcome: Outcome, n: u64) {
        if n == 0 {
            return;
        }
        let key = (at.hour(), outcome);
        match self.0.binary_search_by_key(&key, |(key, _)| *key) {
            Ok(found) => self.0[found].1 += n,
            Err(place) => self.0.insert(place, (key, n)),
        }
    }

    /// Counts a reading for each instant; cheap where neighbours are of one hour.
    pub fn count(&mut self, outcome: Outcome, instants: impl IntoIterator<Item = Timestamp>) {
        let (mut hour, mut n) = (Timestamp::default(), 0);
        let mut next_hour = hour;
        for at in instants {
            if at < hour || at >= next_hour {
                self.add(hour, outcome, n);
                (hour, n) = (at.hour(), 0);
                next_hour = hour.shifted(HOUR_MICROS);
            }
            n += 1;
        }
        self.add(hour, outcome, n);
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Census) {
        for (hour, outcome, n) in other.iter() {
            self.add(hour, outcome, n);
        }
    }

    /// (start of the hour, outcome, count), sorted; counts are above 0.
    pub fn iter(&self) -> impl Iterator<Item = (Timestamp, Outcome, u64)> + '_ {
        self.0.iter().map(|((hour, outcome), n)| (*hour, *outcome, *n))
    }

    /// Hours and outcomes that were counted.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The count of an outcome over all hours.
    pub fn total(&self, wanted: Outcome) -> u64 {
        self.iter().filter(|(_, outcome, _)| *outcome == wanted).map(|(_, _, n)| n).sum()
    }

    /// Whether every hour's polled readings are accounted for.
    pub fn balances(&self) -> bool {
        let mut open: BTreeMap<Timestamp, i128> = BTreeMap::new();
        for (hour, outcome, n) in self.iter() {
            *open.entry(hour).or_default() +=
                if outcome == Outcome::Polled { i128::from(n) } else { -i128::from(n) };
        }
        open.values().all(|rest| *rest == 0)
    }
}

impl Serialize for Census {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter().map(|(hour, outcome, n)| (hour.as_micros(), outcome.as_str(), n)))
    }
}

impl<'de> Deserialize<'de> for Census {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut census = Census::default();
        for (hour, outcome, n) in Vec::<(i64, String, u64)>::deserialize(deserializer)? {
            census.add(Timestamp::from_micros(hour), outcome.parse().map_err(de::Error::custom)?, n);
        }
        Ok(census)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(hours: i64) -> Timestamp {
        Timestamp::from_micros(hours * HOUR_MICROS + 1)
    }

    #[test]
    fn counts_merge_by_hour_and_survive_json() {
        let mut census = Census::default();
        census.add(at(1), Outcome::Polled, 3);
        census.add(at(2), Outcome::Polled, 1);
        census.add(at(1), Outcome::Sealed, 0);
        let mut other = Census::default();
        other.add(at(1), Outcome::Sealed, 2);
        other.add(at(1), Outcome::Held, 1);
        other.add(at(2), Outcome::Rejected(Reason::Malformed), 1);
        assert!(!census.balances());
        census.merge(&other);
        assert!(census.balances());
        assert_eq!((census.total(Outcome::Polled), census.total(Outcome::Held)), (4, 1));

        let json = serde_json::to_string(&census).unwrap();
        assert_eq!(serde_json::from_str::<Census>(&json).unwrap(), census);
        assert!(json.starts_with(r#"[[3600000000,"polled",3],"#), "{json}");
        assert!(serde_json::from_str::<Census>(r#"[[0,"eaten",1]]"#).is_err());
    }

    #[test]
    fn instants_are_counted_one_by_one() {
        for hours in [vec![], vec![0], vec![3, 3, 3], vec![5, 5, 4, 5, 6, 6, -2, -2, 0]] {
            let mut expected = Census::default();
            hours.iter().for_each(|hour| expected.add(at(*hour), Outcome::Polled, 1));
            let mut census = Census::default();
            census.count(Outcome::Polled, hours.iter().map(|hour| at(*hour)));
            assert_eq!(census, expected, "{hours:?}");
        }
    }

    #[test]
    fn one_hour_does_not_pay_for_another() {
        let mut census = Census::default();
        census.add(at(1), Outcome::Polled, 1);
        census.add(at(2), Outcome::Sealed, 1);
        assert!(!census.balances());
    }

    #[test]
    fn words() {
        for outcome in Outcome::ALL {
            assert_eq!(outcome.as_str().parse::<Outcome>(), Ok(outcome));
        }
    }
}
