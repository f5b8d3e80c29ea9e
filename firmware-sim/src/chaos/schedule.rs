//! Who is killed when, and for how long (pure): strike `n` is a function of (seed, n).
//!
//! One strike in eight hits two programs at once, and in one of four a program is killed once more while it starts.
//! Pauses are mostly short, so that a program comes back before the others have noticed, and sometimes a second long.

use std::time::Duration;

use crate::noise::{bits, stream, uniform};

/// Who may be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(super) enum Victim {
    /// `edge-agent run`
    Agent,
    /// mosquitto
    Broker,
    /// `cloud-ingest run`, one replica of it
    Cloud,
    /// SeaweedFS, where the lake is on one
    Store,
}

impl Victim {
    /// Everybody, in the order in which data flows.
    pub(super) const ALL: [Victim; 4] = [Victim::Agent, Victim::Broker, Victim::Cloud, Victim::Store];
}

/// Longest wait for a moment to strike once it is due.
const MAX_WAIT: Duration = Duration::from_millis(600);
/// Longest time that a victim stays away.
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// A program that is killed while it starts has had so long at most.
const MAX_START: Duration = Duration::from_millis(500);

/// One strike.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Strike {
    /// How long after it is due.
    pub(super) wait: Duration,
    /// Killed at once, and started again in this order; one or two.
    pub(super) victims: Vec<Victim>,
    /// Which replica the cloud's part is, modulo how many there are.
    pub(super) replica: usize,
    /// How long they stay away, and the second one after the first.
    pub(super) pause: Duration,
    /// So long after its start, the first is killed once more.
    pub(super) again: Option<Duration>,
}

impl Strike {
    /// Strike `n` among these.
    pub(super) fn of(seed: u64, n: u32, among: &[Victim]) -> Strike {
        let u = |what| uniform(seed, stream(what), i64::from(n));
        let choice = |what, of: usize| (bits(seed, stream(what), i64::from(n)) % of.max(1) as u64) as usize;
        let first = choice("first", among.len());
        let mut victims = vec![among[first]];
        if among.len() > 1 && u("both") < 1.0 / 8.0 {
            let other = (first + 1 + choice("second", among.len() - 1)) % among.len();
            victims.push(among[other]);
        }
        Strike {
            wait: MAX_WAIT.mul_f64(u("wait")),
            victims,
            replica: choice("replica", usize::MAX),
            pause: MAX_PAUSE.mul_f64(u("pause").powi(3)),
            again: (u("again") < 1.0 / 4.0).then(|| MAX_START.mul_f64(u("start"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strikes_are_as_often_as_the_doc_says() {
        let among = Victim::ALL;
        let strikes: Vec<Strike> = (0..4000).map(|n| Strike::of(7, n, &among)).collect();
        let share = |of: &dyn Fn(&Strike) -> bool| strikes.iter().filter(|s| of(s)).count() as f64 / 4000.0;
        for victim in among {
            let first = share(&|s| s.victims[0] == victim);
            assert!((first - 1.0 / 4.0).abs() < 0.03, "{victim:?} is first in {first} of all");
            let second = share(&|s| s.victims.get(1) == Some(&victim));
            assert!((second - 1.0 / 32.0).abs() < 0.02, "{victim:?} is second in {second} of all");
        }
        assert!((share(&|s| s.again.is_some()) - 0.25).abs() < 0.03);
        for replica in 0..3 {
            let share = share(&|s| s.replica % 3 == replica);
            assert!((share - 1.0 / 3.0).abs() < 0.03, "replica {replica} is meant in {share} of all");
        }
        assert!((share(&|s| s.pause < Duration::from_millis(125)) - 0.5).abs() < 0.03);
        assert!(strikes.iter().all(|s| s.victims.len() == 1 || s.victims[0] != s.victims[1]));
    }

    #[test]
    fn a_strike_is_a_function_of_its_number_and_hits_only_those_named() {
        for n in 0..200 {
            let strike = Strike::of(1, n, &[Victim::Broker]);
            assert_eq!(strike.victims, [Victim::Broker]);
            assert_eq!(strike, Strike::of(1, n, &[Victim::Broker]));
        }
        assert_ne!(Strike::of(1, 0, &Victim::ALL), Strike::of(2, 0, &Victim::ALL));
    }
}
