//! Faults of the instruments (not of the plant), as pure functions of (seed, signal, time).
//!
//! Time is cut into slots, each kind of fault with its own length. In a slot of length L a fault that comes `rate`
//! times a day begins with probability `rate · L / 24 h`, at a random instant that lets it end within the slot. So
//! faults of one kind never overlap, and a replay meets the same ones.
//!
//! | kind | what the gateway sees | lasts | slot |
//! |---|---|---|---|
//! | spike | the value jumps by 10–40 % of the span, either way | 5 s | 10 min |
//! | stuck | the value of the beginning, without its noise moving | 30 min | 2 h |
//! | drift | the value runs away, to 5–15 % of the span at the end, then it is recalibrated | 6 h | 12 h |
//! | drop-out | the loop is open: 0 mA | 30 s | 1 h |
//! | NACK | the chip does not answer on the bus | 10 s | 1 h |
//!
//! All rates are 0 by default.

use std::time::Duration;

use common::time::Timestamp;

use crate::noise;

/// How often each kind of fault begins, in events a day for one signal (for NACK: one chip). 0 is never.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rates {
    /// Single values far off.
    pub spike: f64,
    /// Values that do not move.
    pub stuck: f64,
    /// Values that run away slowly.
    pub drift: f64,
    /// Open loops.
    pub drop_out: f64,
    /// Chips that do not answer.
    pub nack: f64,
}

impl Rates {
    /// What `cargo demo` runs with: rare drop-outs and NACKs, which arrive with bad quality or not at all. Kinds that
    /// look like good values stay off, so that every anomaly in the demo is the plant's.
    pub const DEMO: Self = Self { spike: 0.0, stuck: 0.0, drift: 0.0, drop_out: 0.2, nack: 0.5 };
}

/// What happens to an instrument at one instant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// The value is off by this part of the span.
    Offset(f64),
    /// The value is that of the earlier instant.
    Stuck {
        /// When it stopped moving.
        since: Timestamp,
    },
    /// There is no value: the loop is open.
    DropOut,
}

/// The faults of all instruments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Faults {
    seed: u64,
    rates: Rates,
}

/// One kind of fault and its slots.
struct Kind {
    name: &'static str,
    lasts: Duration,
    slot: Duration,
}

const SPIKE: Kind = Kind { name: "spike", lasts: Duration::from_secs(5), slot: Duration::from_secs(600) };
const STUCK: Kind =
    Kind { name: "stuck", lasts: Duration::from_secs(1_800), slot: Duration::from_secs(7_200) };
const DRIFT: Kind =
    Kind { name: "drift", lasts: Duration::from_secs(21_600), slot: Duration::from_secs(43_200) };
const DROP_OUT: Kind =
    Kind { name: "drop-out", lasts: Duration::from_secs(30), slot: Duration::from_secs(3_600) };
const NACK: Kind = Kind { name: "nack", lasts: Duration::from_secs(10), slot: Duration::from_secs(3_600) };

/// An occurrence that covers the asked instant.
struct Occurrence {
    since: Timestamp,
    /// How much of it has passed, 0 to 1.
    part: f64,
    /// A random number of its own, 0 to 1.
    draw: f64,
}

impl Faults {
    /// Faults at these rates.
    pub const fn new(seed: u64, rates: Rates) -> Self {
        Self { seed, rates }
    }

    /// No faults.
    pub fn none() -> Self {
        Self::new(0, Rates::default())
    }

    /// What is wrong with `signal` at `t`; the graver kind where two meet.
    pub fn at(&self, signal: &str, t: Timestamp) -> Option<Fault> {
        if self.occurrence(&DROP_OUT, self.rates.drop_out, signal, t).is_some() {
            return Some(Fault::DropOut);
        }
        if let Some(stuck) = self.occurrence(&STUCK, self.rates.stuck, signal, t) {
            return Some(Fault::Stuck { since: stuck.since });
        }
        if let Some(spike) = self.occurrence(&SPIKE, self.rates.spike, signal, t) {
            return Some(Fault::Offset(signed(spike.draw, 0.1, 0.4)));
        }
        let drift = self.occurrence(&DRIFT, self.rates.drift, signal, t)?;
        Some(Fault::Offset(signed(drift.draw, 0.05, 0.15) * drift.part))
    }

    /// Whether the chip named `chip` leaves the bus unanswered at `t`.
    pub fn nack(&self, chip: &str, t: Timestamp) -> bool {
        self.occurrence(&NACK, self.rates.nack, chip, t).is_some()
    }

    /// What an instrument for `signal` shows of `value`, whose range is `span` wide. None: its loop is open.
    pub fn shown(
        &self,
        signal: &str,
        span: f64,
        t: Timestamp,
        value: impl Fn(Timestamp) -> f64,
    ) -> Option<f64> {
        match self.at(signal, t) {
            None => Some(value(t)),
            Some(Fault::Offset(part)) => Some(value(t) + part * span),
            Some(Fault::Stuck { since }) => Some(value(since)),
            Some(Fault::DropOut) => None,
        }
    }

    fn occurrence(&self, kind: &Kind, per_day: f64, signal: &str, t: Timestamp) -> Option<Occurrence> {
        if per_day <= 0.0 {
            return None;
        }
        let stream = noise::stream(signal) ^ noise::stream(kind.name);
        let slot = t.floor(kind.slot);
        let draw = |purpose: i64| noise::uniform(self.seed, stream, slot.as_micros() ^ purpose);
        if draw(1) >= per_day * kind.slot.as_secs_f64() / 86_400.0 {
            return None;
        }
        let since = slot + (kind.slot - kind.lasts).mul_f64(draw(2));
        let covered = (since..since + kind.lasts).contains(&t);
        covered.then(|| Occurrence {
            since,
            part: t.since(since).as_secs_f64() / kind.lasts.as_secs_f64(),
            draw: draw(3),
        })
    }
}

/// A size between `low` and `high`, either way, from a number between 0 and 1.
fn signed(draw: f64, low: f64, high: f64) -> f64 {
    let swing = 2.0 * draw - 1.0;
    (low + (high - low) * swing.abs()).copysign(swing)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIGNALS: u32 = 20;
    const DAYS: u32 = 10;

    fn instants() -> impl Iterator<Item = Timestamp> {
        let start: Timestamp = "2026-03-01T00:00:00Z".parse().unwrap();
        (0..DAYS * 86_400 / 5).map(move |n| start + Duration::from_secs(5) * n)
    }

    /// Episodes begun in ten days of twenty signals.
    fn episodes(active: impl Fn(&str, Timestamp) -> bool) -> f64 {
        let mut begun = 0;
        for n in 0..SIGNALS {
            let signal = format!("signal-{n}");
            let mut before = false;
            for t in instants() {
                let now = active(&signal, t);
                begun += u32::from(now && !before);
                before = now;
            }
        }
        f64::from(begun) / f64::from(SIGNALS * DAYS)
    }

    #[test]
    fn off_by_default() {
        assert!(instants().all(|t| Faults::none().at("any", t).is_none() && !Faults::none().nack("any", t)));
    }

    #[test]
    fn each_kind_comes_at_its_rate() {
        let rate = 4.0;
        let none = Rates::default();
        let near = |name: &str, got: f64| assert!((got - rate).abs() < 0.15 * rate, "{name}: {got} a day");

        let faults = Faults::new(1, Rates { drop_out: rate, ..none });
        near("drop-out", episodes(|s, t| faults.at(s, t) == Some(Fault::DropOut)));
        let faults = Faults::new(1, Rates { spike: rate, ..none });
        near("spike", episodes(|s, t| matches!(faults.at(s, t), Some(Fault::Offset(_)))));
        let faults = Faults::new(1, Rates { stuck: rate, ..none });
        near("stuck", episodes(|s, t| matches!(faults.at(s, t), Some(Fault::Stuck { .. }))));
        let faults = Faults::new(1, Rates { nack: rate, ..none });
        near("nack", episodes(|s, t| faults.nack(s, t)));
    }

    #[test]
    fn shows_what_the_kind_says() {
        let always = |rates| Faults::new(3, rates);
        let ramp = |t: Timestamp| t.as_micros() as f64;
        let none = Rates::default();

        let stuck = always(Rates { stuck: 1e9, ..none });
        let ticks: Vec<_> = instants().take(14_400).collect();
        for slot in ticks.chunks(1_440) {
            let covered = slot.iter().filter(|t| stuck.at("a", **t).is_some());
            let values: Vec<_> = covered.map(|t| stuck.shown("a", 1.0, *t, ramp).unwrap()).collect();
            assert!((359..=361).contains(&values.len()), "30 min, whole, in each slot: {}", values.len());
            assert!(values.iter().all(|value| *value == values[0]));
        }

        let open = always(Rates { drop_out: 1e9, ..none });
        assert!(instants().take(720).any(|t| open.shown("a", 1.0, t, ramp).is_none()));

        let spike = always(Rates { spike: 1e9, ..none });
        let jump = instants().find_map(|t| match spike.at("a", t) {
            Some(Fault::Offset(part)) => Some((t, part)),
            _ => None,
        });
        let (t, part) = jump.unwrap();
        assert!((0.1..=0.4).contains(&part.abs()));
        assert_eq!(spike.shown("a", 100.0, t, |_| 7.0), Some(7.0 + 100.0 * part));

        let drift = always(Rates { drift: 1e9, ..none });
        let offsets: Vec<_> = instants()
            .take(8_640)
            .filter_map(|t| match drift.at("a", t) {
                Some(Fault::Offset(part)) => Some(part.abs()),
                _ => None,
            })
            .collect();
        assert!(offsets.is_sorted() && offsets.len() > 4_000);
        assert!((0.049..=0.15).contains(offsets.last().unwrap()));
    }
}
