//! Episodes: when a score becomes an anomaly with a start and an end (pure).
//!
//! An episode is raised after `raise_after` scored windows in a row above `threshold`, and cleared after
//! `clear_after` in a row below `clear_threshold`. It starts and ends at the ends of the windows at which this was
//! seen. Windows that could not be scored count for neither. The record that clears an episode carries its highest
//! score, the device that weighed most in that window, and the severity that it reached.

use std::sync::Arc;

use common::time::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// When to raise and to clear.
#[derive(Clone, Debug, PartialEq)]
pub struct Hysteresis {
    /// Scores above it raise.
    pub threshold: f64,
    /// Scores below it clear; at most `threshold`.
    pub clear_threshold: f64,
    /// Windows in a row.
    pub raise_after: u32,
    /// Windows in a row.
    pub clear_after: u32,
    /// (from this score on, name), ascending.
    pub severities: Vec<(f64, String)>,
}

/// A device and its asset, by their ids: they outlive the registry of one run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Id of the asset.
    pub asset: String,
    /// Id of the device.
    pub device: String,
}

/// One row of the anomalies lane.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The episode.
    pub id: Uuid,
    /// When it ended and why; none when this raises it.
    pub ended: Option<(Timestamp, Ended)>,
    /// The device that weighs most.
    pub place: Place,
    /// Name of the model.
    pub model: Arc<str>,
    /// SHA-256 of its `model.onnx` in hex.
    pub model_sha256: Arc<str>,
    /// By the highest score.
    pub severity: String,
    /// The highest score so far.
    pub score: f64,
    /// The threshold that it exceeded.
    pub threshold: f64,
    /// When it was raised.
    pub started_at: Timestamp,
}

/// Why an episode ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The score came down.
    Cleared,
    /// The agent stopped.
    Stop,
    /// The agent was restarted and cannot go on with it: its model or device is another one.
    Restart,
    /// Another model has taken over, or none.
    Replaced,
    /// The machine stands.
    Standing,
}

impl Ended {
    /// The word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cleared => "cleared",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Replaced => "replaced",
            Self::Standing => "standing",
        }
    }
}

/// An open episode, as it is kept over a restart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Open {
    /// Its name for ever.
    pub id: Uuid,
    /// When it was raised.
    pub started_at: Timestamp,
    /// Highest score so far.
    pub score: f64,
    /// The device that weighed most at that score.
    pub place: Place,
    /// What it exceeded.
    pub threshold: f64,
    /// By the highest score.
    pub severity: String,
}

/// The score of one window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score<'a> {
    /// End of the window.
    pub at: Timestamp,
    /// The model's score.
    pub score: f64,
    /// The device that weighs most.
    pub place: &'a Place,
}

/// The episodes of one model.
#[derive(Clone, Debug)]
pub struct Episodes {
    model: Arc<str>,
    model_sha256: Arc<str>,
    rules: Hysteresis,
    above: u32,
    below: u32,
    open: Option<Open>,
}

impl Episodes {
    /// None open.
    pub fn new(model: Arc<str>, model_sha256: Arc<str>, rules: Hysteresis) -> Self {
        Self { model, model_sha256, rules, above: 0, below: 0, open: None }
    }

    /// Goes on with an episode of an earlier run.
    pub fn resume(&mut self, open: Open) {
        self.open = Some(open);
    }

    /// Gives the open episode another time.
    pub fn settle(&mut self, settle: impl Fn(Timestamp) -> Timestamp) {
        if let Some(open) = &mut self.open {
            open.started_at = settle(open.started_at);
        }
    }

    /// When to raise and to clear.
    pub fn rules(&self) -> &Hysteresis {
        &self.rules
    }

    /// Changes them.
    pub fn set_rules(&mut self, rules: Hysteresis) {
        self.rules = rules;
    }

    /// The open episode.
    pub fn open(&self) -> Option<&Open> {
        self.open.as_ref()
    }

    /// Takes in the next score; `new_id` names an episode if one is raised.
    pub fn push(&mut self, score: Score<'_>, new_id: impl FnOnce() -> Uuid) -> Option<Event> {
        self.above = if score.score > self.rules.threshold { self.above + 1 } else { 0 };
        self.below = if score.score < self.rules.clear_threshold { self.below + 1 } else { 0 };
        let Some(open) = &mut self.open else {
            if self.above < self.rules.raise_after {
                return None;
            }
            let open = Open {
                id: new_id(),
                started_at: score.at,
                score: score.score,
                place: score.place.clone(),
                threshold: self.rules.threshold,
                severity: self.rules.severity(score.score),
            };
            let event = self.event(&open, None);
            self.open = Some(open);
            return Some(event);
        };
        if score.score > open.score {
            open.score = score.score;
            open.place = score.place.clone();
            open.severity = self.rules.severity(score.score);
        }
        if self.below >= self.rules.clear_after { self.end(score.at, Ended::Cleared) } else { None }
    }

    /// Ends the open episode, if there is one.
    pub fn end(&mut self, at: Timestamp, why: Ended) -> Option<Event> {
        let open = self.open.take()?;
        (self.above, self.below) = (0, 0);
        Some(self.event(&open, Some((at.max(open.started_at), why))))
    }

    fn event(&self, open: &Open, ended: Option<(Timestamp, Ended)>) -> Event {
        event(open, Arc::clone(&self.model), Arc::clone(&self.model_sha256), ended)
    }
}

/// The row of an episode.
pub fn event(
    open: &Open,
    model: Arc<str>,
    model_sha256: Arc<str>,
    ended: Option<(Timestamp, Ended)>,
) -> Event {
    Event {
        id: open.id,
        ended,
        place: open.place.clone(),
        model,
        model_sha256,
        severity: open.severity.clone(),
        score: open.score,
        threshold: open.threshold,
        started_at: open.started_at,
    }
}

impl Hysteresis {
    /// The same with another threshold; that for clearing moves in proportion.
    pub fn at(&self, threshold: f64) -> Self {
        let clear_threshold = self.clear_threshold * (threshold / self.threshold);
        Self { threshold, clear_threshold, ..self.clone() }
    }

    fn severity(&self, score: f64) -> String {
        let reached = self.severities.iter().rev().find(|(from, _)| score >= *from);
        reached.map_or_else(|| "warning".to_owned(), |(_, name)| name.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn episodes() -> Episodes {
        let rules = Hysteresis {
            threshold: 1.0,
            clear_threshold: 0.9,
            raise_after: 2,
            clear_after: 3,
            severities: vec![(1.0, "warning".into()), (3.0, "critical".into())],
        };
        Episodes::new("m".into(), "abc".into(), rules)
    }

    fn place() -> Place {
        Place { asset: "p".into(), device: "p/t".into() }
    }

    fn at(minute: i64) -> Timestamp {
        Timestamp::from_micros(minute * 60_000_000)
    }

    /// Scores by the minute in; (minute, raised or cleared, severity, highest score) out.
    fn check(scores: &[f64], expected: &[(i64, bool, &str, f64)]) {
        let mut episodes = episodes();
        let mut got = Vec::new();
        for (minute, score) in scores.iter().enumerate() {
            let score = Score { at: at(minute as i64), score: *score, place: &place() };
            if let Some(event) = episodes.push(score, Uuid::now_v7) {
                let raised = event.ended.is_none();
                got.push((minute as i64, raised, event.severity, event.score));
            }
        }
        let expected: Vec<_> = expected.iter().map(|(m, r, s, h)| (*m, *r, (*s).to_owned(), *h)).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn raises_after_enough_in_a_row_and_clears_likewise() {
        check(
            &[2.0, 0.5, 2.0, 1.0, 1.5, 1.6, 4.0, 0.8, 0.8, 0.95, 0.8, 0.8, 0.8, 0.8],
            &[(5, true, "warning", 1.6), (12, false, "critical", 4.0)],
        );
        check(&[1.0, 1.0, 1.0], &[]);
        check(&[2.0, 2.0, 0.8, 0.8], &[(1, true, "warning", 2.0)]);
        // A new one needs its windows again.
        check(
            &[2.0, 2.0, 0.1, 0.1, 0.1, 2.0, 2.0],
            &[(1, true, "warning", 2.0), (4, false, "warning", 2.0), (6, true, "warning", 2.0)],
        );
    }

    #[test]
    fn an_episode_survives_a_restart_under_its_name() {
        let mut before = episodes();
        let place = place();
        let score = |minute, score| Score { at: at(minute), score, place: &place };
        before.push(score(0, 2.0), Uuid::now_v7);
        let raised = before.push(score(1, 2.0), Uuid::now_v7).unwrap();
        let kept = serde_json::to_vec(before.open().unwrap()).unwrap();

        let mut after = episodes();
        after.resume(serde_json::from_slice(&kept).unwrap());
        assert_eq!(after.push(score(2, 2.0), Uuid::now_v7), None);
        let ended = after.end(at(5), Ended::Stop).unwrap();
        assert_eq!((ended.id, ended.started_at), (raised.id, raised.started_at));
        assert_eq!(ended.ended, Some((at(5), Ended::Stop)));
        assert_eq!(after.end(at(6), Ended::Stop), None);
    }
}
