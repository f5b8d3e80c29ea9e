//! What the doctor found.

use std::fmt;

use serde::Serialize;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// Nothing is lost, but it should be changed.
    Warning,
    /// This broker would lose data, or cannot be used.
    Loses,
    /// For the reason given.
    NotTried,
}

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What about.
    pub check: &'static str,
    /// How it came out.
    pub outcome: Outcome,
    /// What was done.
    pub did: String,
    /// What was seen.
    pub saw: String,
    /// What to change; empty where nothing is.
    pub change: String,
}

impl Check {
    fn new(outcome: Outcome, did: String, saw: String, change: String) -> Check {
        Check { check: "", outcome, did, saw, change }
    }

    pub(super) fn ok(did: String, saw: String) -> Check {
        Check::new(Outcome::Ok, did, saw, String::new())
    }

    pub(super) fn warns(did: String, saw: String, change: impl Into<String>) -> Check {
        Check::new(Outcome::Warning, did, saw, change.into())
    }

    pub(super) fn loses(did: String, saw: String, change: impl Into<String>) -> Check {
        Check::new(Outcome::Loses, did, saw, change.into())
    }

    pub(super) fn not_tried(why: impl Into<String>) -> Check {
        Check::new(Outcome::NotTried, String::new(), why.into(), String::new())
    }
}

/// Everything that was tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Where.
    pub broker: String,
    /// As the broker calls itself, where it does.
    pub version: Option<String>,
    /// Whether nothing was found that would lose data.
    pub ok: bool,
    /// In the order of trying.
    pub checks: Vec<Check>,
}

impl Report {
    pub(super) fn new(broker: &str) -> Report {
        Report { broker: broker.to_owned(), version: None, ok: true, checks: Vec::new() }
    }

    pub(super) fn note(&mut self, name: &'static str, check: Check) {
        self.ok &= check.outcome != Outcome::Loses;
        self.checks.push(Check { check: name, ..check });
    }

    /// [`Self::note`]; what cannot be tried to its end is no good sign.
    pub(super) fn record(&mut self, name: &'static str, check: anyhow::Result<Check>) {
        let failed =
            |e: anyhow::Error| Check::loses("tried".into(), format!("{e:#}"), "see the broker's log");
        self.note(name, check.unwrap_or_else(failed));
    }
}

/// A table, each line followed by what was done and what to change, and a verdict.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = self.version.as_deref().map_or(String::new(), |version| format!(", {version}"));
        writeln!(f, "{}{version}\n", self.broker)?;
        let width = self.checks.iter().map(|check| check.check.len()).max().unwrap_or(0);
        for Check { check, outcome, did, saw, change } in &self.checks {
            let outcome = match outcome {
                Outcome::Ok => "ok",
                Outcome::Warning => "warning",
                Outcome::Loses => "LOSES",
                Outcome::NotTried => "not tried",
            };
            writeln!(f, "{outcome:9}  {check:width$}  {saw}")?;
            for (label, text) in [("did", did), ("change", change)] {
                if !text.is_empty() {
                    writeln!(f, "{:9}  {:width$}  {label}: {text}", "", "")?;
                }
            }
        }
        let verdict = if self.ok {
            "nothing found that would lose data"
        } else {
            "this broker would lose data, or cannot be used"
        };
        write!(f, "\n{verdict}")
    }
}
