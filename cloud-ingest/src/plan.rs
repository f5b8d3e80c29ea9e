//! The numbered steps of refinement: which segments make the next one, and who has done what.
//!
//! `ops/plan/{n}.json`, put-if-absent, n from 1 without holes:
//!
//! ```json
//! {"n":7,"rules":"<sha-256>","segments":["bronze/sensor_data/year=…/….parquet"],"covered":{"<writer>":[[0,41]]}}
//! ```
//!
//! Every hundredth plan also says in `covered` which segments all plans before it named, and in `known` what silver has
//! of them ([`Summary`]), so that a start reads at most a hundred plans, and of silver only the hours that they are of.
//! Plan n + 1 is put only after `silver/sensor_readings` has `txn("refine", n)`. A segment that is listed and in no plan
//! is new. Plans take segments in the order in which they were put, whoever put them: what an edge says of having been
//! acknowledged is not refined before that which was.
//!
//! A plan may also look again at what earlier plans put into quarantine, by the rules that it names ([`Replay`]); then
//! it names no segments of its own:
//!
//! ```json
//! {"n":8,"rules":"<sha-256>","segments":[],"replay":{"at":"2026-03-01T06:30:00Z","segments":["bronze/…"],"rule":"range"}}
//! ```

use std::collections::BTreeMap;

use common::time::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    lake::SegmentName,
    ranges::Ranges,
    silver::{Known, Summary},
};

/// App id of the refiner's transactions.
pub const REFINE: &str = "refine";
/// Every so many plans one sums up those before it.
const SUMMARY: u64 = 100;

/// One step. A refiner that does not know all that a plan says must not carry it out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Number of the step, from 1.
    pub n: u64,
    /// SHA-256 of the quality rules to use.
    pub rules: String,
    /// Paths of the segments, in the order in which they are refined.
    pub segments: Vec<String>,
    /// Segment numbers by writer that all plans before this one named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub covered: Option<BTreeMap<Uuid, Vec<(i64, i64)>>>,
    /// What they have committed to silver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known: Option<Summary>,
    /// What of quarantine to look at again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
}

impl Plan {
    /// The segments that it reads.
    pub fn reads(&self) -> impl Iterator<Item = SegmentName> + '_ {
        let again = self.replay.iter().flat_map(|replay| &replay.segments);
        self.segments.iter().chain(again).filter_map(|path| SegmentName::parse(path))
    }
}

/// Rows of `silver/quarantine` to be judged again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replay {
    /// Stands as `resolved_at` in the rows that this plan takes out of quarantine, and in those of no other.
    pub at: Timestamp,
    /// The segments that they are of.
    pub segments: Vec<String>,
    /// Which of them.
    #[serde(flatten)]
    pub of: Selection,
}

/// Rows of `silver/quarantine` that are not resolved; what is `None` does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selection {
    /// Of this rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Of this plant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<String>,
    /// Of this device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

/// A segment that a listing found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    /// When it was put, by the store's clock.
    pub put_at: Timestamp,
    /// Which one.
    pub name: SegmentName,
    /// Its size in bytes.
    pub bytes: u64,
}

/// How much goes into one plan, which bounds the memory of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// At most so many segments.
    pub segments: usize,
    /// At most so many bytes of segments, unless the first alone is larger.
    pub bytes: u64,
}

/// Which segments are in a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Planned {
    /// Exact, by writer.
    writers: BTreeMap<Uuid, Ranges>,
}

impl Planned {
    /// Notes the segments of a plan, and those that it says were named before.
    pub fn note(&mut self, plan: &Plan) {
        for (writer, spans) in plan.covered.iter().flatten() {
            let numbers = self.writers.entry(*writer).or_insert_with(Ranges::exact);
            spans.iter().for_each(|(from, to)| numbers.insert(*from, *to));
        }
        plan.segments.iter().filter_map(|path| SegmentName::parse(path)).for_each(|name| self.insert(name));
    }

    /// Notes one segment.
    pub fn insert(&mut self, name: SegmentName) {
        let numbers = self.writers.entry(name.writer).or_insert_with(Ranges::exact);
        numbers.insert(number(name), number(name));
    }

    /// Whether a plan names this segment.
    pub fn contains(&self, name: SegmentName) -> bool {
        self.writers.get(&name.writer).is_some_and(|numbers| numbers.contains(number(name)))
    }

    /// The next plan over what is listed and not planned, in the order in which it was put; `None` when there is nothing
    /// new. The same listing gives the same plan. `known` is what silver has of the plans before.
    pub fn next(
        &self,
        n: u64,
        rules: &str,
        listed: &[Listed],
        limits: Limits,
        known: &Known,
    ) -> Option<Plan> {
        let mut new: Vec<&Listed> = listed.iter().filter(|segment| !self.contains(segment.name)).collect();
        new.sort_unstable();
        new.dedup();
        let mut bytes = 0u64;
        let fits = |segment: &&&Listed| {
            let first = bytes == 0;
            bytes = bytes.saturating_add(segment.bytes.max(1));
            first || bytes <= limits.bytes
        };
        let segments: Vec<String> =
            new.iter().take(limits.segments).take_while(fits).map(|s| s.name.path()).collect();
        if segments.is_empty() {
            return None;
        }
        Some(self.plan(n, rules, segments, None, known))
    }

    /// The plan that looks at quarantine again; `known` as in [`Self::next`].
    pub fn replay(&self, n: u64, rules: &str, replay: Replay, known: &Known) -> Plan {
        self.plan(n, rules, Vec::new(), Some(replay), known)
    }

    fn plan(
        &self,
        n: u64,
        rules: &str,
        segments: Vec<String>,
        replay: Option<Replay>,
        known: &Known,
    ) -> Plan {
        let sums_up = n.is_multiple_of(SUMMARY);
        let spans = |numbers: &Ranges| numbers.iter().collect::<Vec<_>>();
        let covered = || self.writers.iter().map(|(writer, numbers)| (*writer, spans(numbers))).collect();
        Plan {
            n,
            rules: rules.to_owned(),
            segments,
            covered: sums_up.then(covered),
            known: sums_up.then(|| known.into()),
            replay,
        }
    }
}

fn number(name: SegmentName) -> i64 {
    i64::try_from(name.number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use common::time::{HOUR_MICROS, Timestamp};

    use super::*;

    fn segment(writer: u128, number: u64, bytes: u64) -> Listed {
        let hour = Timestamp::from_micros(493_000 * HOUR_MICROS);
        let put_at = Timestamp::from_micros(hour.as_micros() + i64::try_from(number).unwrap());
        Listed { put_at, name: SegmentName { hour, writer: Uuid::from_u128(writer), number }, bytes }
    }

    #[test]
    fn plans_take_everything_once_within_their_limits() {
        let listed: Vec<Listed> =
            (0..250).flat_map(|n| [segment(1, n, 10), segment(2, n, 10)]).rev().collect();
        let limits = Limits { segments: 3, bytes: 25 };
        let mut planned = Planned::default();
        let (mut seen, mut plans) = (Vec::new(), Vec::new());
        while let Some(plan) = planned.next(plans.len() as u64 + 1, "r", &listed, limits, &Known::default()) {
            let number = plans.len() as u64;
            let put_together = [1, 2].map(|writer| segment(writer, number, 10).name.path());
            assert_eq!(plan.segments, put_together, "25 bytes are two segments");
            planned.note(&plan);
            seen.extend(plan.segments.clone());
            plans.push(plan);
        }
        seen.sort();
        seen.dedup();
        assert_eq!((seen.len(), plans.len()), (500, 250));

        // A start needs the newest plans only, back to one that sums up.
        let mut resumed = Planned::default();
        for plan in plans.iter().rev() {
            resumed.note(plan);
            if plan.covered.is_some() {
                break;
            }
        }
        assert_eq!(resumed, planned);
    }

    #[test]
    fn a_replay_names_no_segment_of_its_own_and_sums_up_too() {
        let mut planned = Planned::default();
        planned.insert(segment(1, 0, 1).name);
        let of = Selection { rule: Some("range".into()), ..Selection::default() };
        let replay =
            Replay { at: Timestamp::from_micros(7), segments: vec![segment(1, 0, 1).name.path()], of };
        let plan = planned.replay(SUMMARY, "r", replay, &Known::default());
        assert_eq!(plan.reads().collect::<Vec<_>>(), [segment(1, 0, 1).name]);
        let mut resumed = Planned::default();
        resumed.note(&plan);
        assert_eq!(resumed, planned);
        let text = serde_json::to_string(&plan).unwrap();
        assert!(
            text.contains(r#""replay":{"at":"1970-01-01T00:00:00.000007Z","segments":["bronze/"#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
        let newer = text.replacen("\"n\"", "\"erase\":1,\"n\"", 1);
        assert!(serde_json::from_str::<Plan>(&newer).is_err(), "what it does not know it does not carry out");
    }

    #[test]
    fn a_segment_above_the_limit_goes_alone() {
        let listed = [segment(1, 0, 99), segment(1, 1, 1)];
        let limits = Limits { segments: 9, bytes: 10 };
        let plan = Planned::default().next(1, "r", &listed, limits, &Known::default()).unwrap();
        assert_eq!(plan.segments, [listed[0].name.path()]);
    }
}
