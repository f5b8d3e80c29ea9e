//! Silver: from the segments of a plan and what is committed already to the rows of every table. Pure.
//!
//! ```text
//! Step::read      decode, check, convert     → candidates, quarantine, rows of the other tables
//! Step::questions which committed readings might collide with candidates
//! Step::settle    one row per (site, device_id, ts) over all time → Refined
//! ```
//!
//! * A message that is committed with the same payload is skipped whole and recorded as redelivered; one
//!   with another payload under the same name is refined, and reported (`message_conflict`).
//! * Of readings with the same (site, device_id, ts) the first stays. An equal one is a duplicate; one with
//!   another value, quality or unit is quarantined (`conflict`).
//! * Every message: readings = stored + duplicates + quarantined, in rows of its lane.
//! * The same segments, rules and committed rows give the same result, in the same order.
//!
//! JSON messages have no name of their own. So that what was received from them can be counted too, all of a gateway in
//! a segment are one row of `silver/messages`, with an empty epoch, lane `json` and the place of the first as seq.

mod candidates;
mod messages;
mod replay;
mod rows;
mod soft;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use arrow::array::RecordBatch;
use common::{time::Timestamp, wire::Decoder};
use serde::{Deserialize, Serialize};

pub(crate) use self::messages::NAMELESS;
use self::{
    candidates::Candidates,
    messages::{Delivered, Places, Routes},
    rows::Quarantined,
    soft::Soft,
};
pub use self::{
    messages::{Name, Segment, names},
    replay::{Again, Change, Held, Replayed},
};
use crate::{
    decode::MaintenanceRecord,
    lake::Table,
    quality::{Reject, Rules, mend},
    ranges::Ranges,
};

/// Gap in event time, in µs, below which two committed spans of a device are held as one: 5 min.
const TIME_SLACK: i64 = 300_000_000;
/// Readings that room is made for before they are read, at most: what messages say of themselves may be wrong.
const MOST_SAID: usize = 4_000_000;
/// Most spans held for a device or a lane.
const SPANS: usize = 16;

/// A reading that is committed: value (`None` for null), quality and unit.
pub type Committed = (Option<f64>, String, String);

/// What is known of a device's committed readings.
#[derive(Clone, Debug)]
struct Device {
    /// Event times in µs.
    spans: Ranges,
    /// Value of the last of them, NaN when it is bad; `None` until somebody has looked.
    value: Option<f64>,
}

/// What is committed, as coarsely as memory allows; never narrower than the truth.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// By (site, device).
    readings: HashMap<(String, String), Device>,
    /// Seqs by (site, gateway, epoch, lane).
    messages: HashMap<(String, String, String, String), Ranges>,
}

impl Known {
    /// Notes that readings of a device are committed within `from..=to`.
    pub fn readings(&mut self, site: String, device: String, from: i64, to: i64) {
        let new = || Device { spans: Ranges::coarse(TIME_SLACK, SPANS), value: None };
        let device = self.readings.entry((site, device)).or_insert_with(new);
        if device.spans.last() < Some(to) {
            device.value = None;
        }
        device.spans.insert(from, to);
    }

    /// Notes that messages of a lane are committed within `from..=to`.
    pub fn messages(&mut self, site: String, gateway: String, epoch: String, lane: String, seqs: (i64, i64)) {
        let spans = self.messages.entry((site, gateway, epoch, lane));
        spans.or_insert_with(|| Ranges::coarse(0, SPANS)).insert(seqs.0, seqs.1);
    }

    /// Whether the message may be committed.
    pub fn may_hold(&self, name: &Name) -> bool {
        let lane = (name.site.clone(), name.gateway.clone(), name.epoch.clone(), name.lane.clone());
        self.messages.get(&lane).is_some_and(|seqs| seqs.contains(name.seq))
    }

    /// Takes over what a step has committed.
    pub fn extend(&mut self, news: News) {
        for (site, device, from, to) in news.readings {
            self.readings(site, device, from, to);
        }
        for (device, ts, value) in news.values {
            if let Some(device) = self.readings.get_mut(&device)
                && device.spans.last() == Some(ts)
            {
                device.value = Some(value);
            }
        }
        for name in news.messages {
            self.messages(name.site, name.gateway, name.epoch, name.lane, (name.seq, name.seq));
        }
    }
}

/// First and last of each.
type Spans = Vec<(i64, i64)>;

/// [`Known`] as it is written down: spans by name, in the order of the names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// Site, device, spans of event time in µs.
    readings: Vec<(String, String, Spans)>,
    /// Site, gateway, epoch, lane, spans of seqs.
    messages: Vec<(String, String, String, String, Spans)>,
}

impl From<&Known> for Summary {
    fn from(known: &Known) -> Self {
        let readings = known
            .readings
            .iter()
            .map(|((site, device), held)| (site.clone(), device.clone(), held.spans.iter().collect()));
        let messages = known.messages.iter().map(|((site, gateway, epoch, lane), seqs)| {
            (site.clone(), gateway.clone(), epoch.clone(), lane.clone(), seqs.iter().collect())
        });
        let (mut readings, mut messages): (Vec<_>, Vec<_>) = (readings.collect(), messages.collect());
        readings.sort_unstable();
        messages.sort_unstable();
        Self { readings, messages }
    }
}

impl From<Summary> for Known {
    fn from(summary: Summary) -> Self {
        let mut known = Self::default();
        for (site, device, spans) in summary.readings {
            for (from, to) in spans {
                known.readings(site.clone(), device.clone(), from, to);
            }
        }
        for (site, gateway, epoch, lane, spans) in summary.messages {
            for seqs in spans {
                known.messages(site.clone(), gateway.clone(), epoch.clone(), lane.clone(), seqs);
            }
        }
        known
    }
}

/// What a step adds to [`Known`] once it is committed.
#[derive(Clone, Debug, Default)]
pub struct News {
    /// Site, device, first and last event time in µs.
    readings: Vec<(String, String, i64, i64)>,
    /// Last event time and value of devices to which soft rules apply; NaN for a bad one.
    values: Vec<((String, String), i64, f64)>,
    messages: Vec<Name>,
}

/// Committed readings of these devices, within these times in µs, must be known before a step can settle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The plant.
    pub site: String,
    /// The device.
    pub device: String,
    /// First event time.
    pub from: i64,
    /// Last event time, included.
    pub to: i64,
}

/// Answers to [`Question`]s: committed readings by site and device, then time.
pub type Answers = HashMap<(String, String), HashMap<i64, Committed>>;

/// The rows of a plan.
#[derive(Debug)]
pub struct Refined {
    /// By table, in the order of commits; `sensor_readings` is last and always there.
    pub tables: Vec<(Table, Vec<RecordBatch>)>,
    /// What the step adds to what is committed.
    pub news: News,
    /// In readings and messages.
    pub counts: Counts,
    /// Devices with quarantined readings, each with the first reason and the configuration that would mend it.
    pub offenders: BTreeMap<(String, String), String>,
}

/// What came of a plan, in readings unless stated otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the ledger's")]
pub struct Counts {
    pub messages: u64,
    pub redelivered_messages: u64,
    pub readings: u64,
    pub stored: u64,
    pub duplicates: u64,
    pub quarantined: u64,
}

/// A plan that is being carried out.
pub struct Step {
    rules: Arc<Rules>,
    plan: i64,
    payloads: Decoder,
    routes: Routes,
    places: Places,
    candidates: Candidates,
    quarantine: Vec<Quarantined>,
    delivered: Vec<Delivered>,
    batches: BTreeMap<Table, Vec<RecordBatch>>,
    maintenance: Vec<(MaintenanceRecord, usize)>,
}

/// What came of the candidates.
struct Decided {
    sensor_readings: Vec<RecordBatch>,
    /// Without messages.
    news: News,
    soft: Soft,
}

impl Step {
    /// Reads the plan's segments. `committed` holds the payload hashes of those of its messages that earlier
    /// plans have committed.
    ///
    /// # Errors
    /// When a segment does not have bronze's columns.
    pub fn read(
        rules: &Arc<Rules>,
        plan: i64,
        segments: &[Segment],
        committed: &HashMap<Name, String>,
    ) -> anyhow::Result<Step> {
        let mut step = Step::new(rules, plan);
        let said = segments.iter().map(messages::rows_said).collect::<anyhow::Result<Vec<u64>>>()?;
        let said = said.into_iter().fold(0, u64::saturating_add);
        step.candidates.reserve(usize::try_from(said)?.min(MOST_SAID));
        step.delivered.reserve(segments.iter().map(|segment| segment.rows.num_rows()).sum());
        let mut seen = committed.clone();
        for segment in segments {
            step.read_segment(segment, &mut seen)?;
        }
        Ok(step)
    }

    fn new(rules: &Arc<Rules>, plan: i64) -> Step {
        Step {
            rules: Arc::clone(rules),
            plan,
            payloads: Decoder::default(),
            routes: Routes::default(),
            places: Places::default(),
            candidates: Candidates::default(),
            quarantine: Vec::new(),
            delivered: Vec::new(),
            batches: BTreeMap::new(),
            maintenance: Vec::new(),
        }
    }

    /// What must be looked up, given what may be committed.
    pub fn questions(&mut self, known: &Known) -> Vec<Question> {
        self.candidates.questions(known)
    }

    /// Decides on every candidate and lays out the rows.
    ///
    /// # Errors
    /// When rows do not fit the lake's schemas, which is a fault of this program.
    pub fn settle(mut self, answers: &Answers) -> anyhow::Result<Refined> {
        let Decided { sensor_readings, mut news, soft } = self.decide(answers)?;
        news.messages = self.delivered.iter().filter_map(|d| d.name().cloned()).collect();
        let counts = self.counts();
        let offenders = self.offenders();
        let quarantine = rows::quarantine(&self.quarantine, &self.delivered, &self.places)?;
        self.batches.insert(Table::Quarantine, quarantine);
        self.batches.insert(Table::Messages, rows::messages(self.plan, &self.delivered, &self.places)?);
        let tables = self.lay_out(counts, &soft, sensor_readings)?;
        Ok(Refined { tables, news, counts, offenders })
    }

    /// Decides on every candidate; what is refused of them joins the quarantine.
    fn decide(&mut self, answers: &Answers) -> anyhow::Result<Decided> {
        let mut soft = Soft::default();
        let (stored, news) =
            self.candidates.settle(answers, &mut self.delivered, &mut self.quarantine, &mut soft);
        let candidates = std::mem::take(&mut self.candidates);
        let sensor_readings = rows::sensor_readings(candidates, &stored, &self.delivered, &self.places)?;
        // Candidates are settled by device; quarantine is kept in the order of arrival.
        self.quarantine.sort_by_key(|q| (q.message, q.row));
        Ok(Decided { sensor_readings, news, soft })
    }

    /// All tables, in the order of commits; `sensor_readings` is last and always there.
    fn lay_out(
        &mut self,
        counts: Counts,
        soft: &Soft,
        sensor_readings: Vec<RecordBatch>,
    ) -> anyhow::Result<Vec<(Table, Vec<RecordBatch>)>> {
        let mut batches = std::mem::take(&mut self.batches);
        let results = rows::quality_results(self.plan, counts, &self.quarantine, soft, &self.delivered)?;
        batches
            .insert(Table::Maintenance, rows::maintenance(&self.maintenance, &self.delivered, &self.places)?);
        batches.insert(Table::QualityResults, results);
        let mut tables: Vec<(Table, Vec<RecordBatch>)> = COMMIT_ORDER
            .into_iter()
            .filter_map(|table| Some((table, batches.remove(&table)?)))
            .filter(|(_, rows)| rows.iter().any(|batch| batch.num_rows() > 0))
            .collect();
        tables.push((Table::SensorReadings, sensor_readings));
        Ok(tables)
    }

    fn counts(&self) -> Counts {
        let count = |n: i64| n.unsigned_abs();
        self.delivered.iter().fold(Counts::default(), |sum, d| Counts {
            messages: sum.messages + 1,
            redelivered_messages: sum.redelivered_messages + u64::from(d.redelivered),
            readings: sum.readings + count(d.readings),
            stored: sum.stored + count(d.stored),
            duplicates: sum.duplicates + count(d.duplicates),
            quarantined: sum.quarantined + count(d.quarantined),
        })
    }

    fn offenders(&self) -> BTreeMap<(String, String), String> {
        let mut offenders = BTreeMap::new();
        for q in &self.quarantine {
            let sender = &self.delivered[q.message].sender;
            if let (Some(site), Some(device)) = (&sender.site, &q.device_id) {
                let device_type = q.device_type.as_deref().unwrap_or("");
                let fix =
                    mend(q.reject.rule, device, device_type).map_or(String::new(), |fix| format!("; {fix}"));
                offenders
                    .entry((site.clone(), device.clone()))
                    .or_insert_with(|| format!("{}: {}{fix}", q.reject.rule, q.reject.reason));
            }
        }
        offenders
    }

    /// Quarantines a whole message.
    fn refuse(&mut self, message: usize, readings: i64, reject: Reject) {
        self.delivered[message].quarantined += readings;
        self.quarantine.push(Quarantined::message(message, readings, reject));
    }
}

/// The order of commits within a plan.
pub const COMMIT_ORDER: [Table; 10] = [
    Table::Quarantine,
    Table::Messages,
    Table::Aggregates,
    Table::Anomalies,
    Table::Control,
    Table::Status,
    Table::Registry,
    Table::Maintenance,
    Table::QualityResults,
    Table::SensorReadings,
];

/// The newest `received_at` of a plan: its time, without asking a clock.
fn newest(delivered: &[Delivered]) -> Timestamp {
    delivered.iter().map(|d| d.received_at).max().unwrap_or_default()
}
