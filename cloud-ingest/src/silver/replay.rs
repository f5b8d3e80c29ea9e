//! Quarantine, judged again: the messages of held rows are read from bronze once more, by other rules. Pure.
//!
//! * A row whose reading is now stored, or found to be a duplicate, is resolved. So is one that is held for another
//!   reason now; it is followed by a new row. One that is held as before stays as it is.
//! * A message that could not be read as a whole may become readings, or rows of any other table.
//! * The message's own row keeps its balance: readings = stored + duplicates + quarantined.
//! * What is held as before has no effect on anything, so the rows that a plan has resolved give the same result as
//!   all the rows that it looked at: a plan that is carried out again needs only those.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use arrow::array::RecordBatch;

use super::{
    Answers, Counts, Decided, Known, Name, News, Question, Segment, Step,
    messages::{Delivered, NAMELESS},
    rows::{self, Quarantined},
};
use crate::{lake::Table, quality::Rules};

/// A row of `silver/quarantine` that is not resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The caller's number for it.
    pub id: usize,
    /// Of its message in the segment.
    pub offset: i64,
    /// Of the reading in the message; `None` for the message as a whole.
    pub row: Option<i64>,
    /// Readings that it stands for.
    pub readings: i64,
    /// Why it is held.
    pub rule: String,
    /// Why, with values.
    pub reason: String,
}

/// A plan that judges quarantine again.
pub struct Again {
    step: Step,
    /// By message of the step.
    held: Vec<Vec<Held>>,
}

/// What changes in a row of `silver/messages`.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Where the message stands.
    pub segment: String,
    /// As it stands in the row; where it has none, its sender's, lane `json` and seq 0.
    pub name: Name,
    /// SHA-256 of its payload.
    pub hash: String,
    /// More readings than were counted before.
    pub readings: i64,
    /// More stored.
    pub stored: i64,
    /// More duplicates.
    pub duplicates: i64,
    /// More in quarantine; mostly fewer.
    pub quarantined: i64,
    /// The row, where there was none before.
    pub row: RecordBatch,
}

/// The rows of a plan that judged quarantine again.
#[derive(Debug)]
pub struct Replayed {
    /// Ids of the rows that are resolved.
    pub resolved: HashSet<usize>,
    /// The rows that follow some of them.
    pub quarantine: Vec<RecordBatch>,
    /// What changes in `silver/messages`.
    pub messages: Vec<Change>,
    /// All other tables, in the order of commits; `sensor_readings` is last and always there.
    pub tables: Vec<(Table, Vec<RecordBatch>)>,
    /// What the step adds to what is committed.
    pub news: News,
    /// Of the readings that are resolved.
    pub counts: Counts,
}

impl Again {
    /// Nothing so far.
    pub fn new(rules: &Arc<Rules>, plan: i64) -> Again {
        Again { step: Step::new(rules, plan), held: Vec::new() }
    }

    /// Reads the messages of a segment's held rows.
    ///
    /// # Errors
    /// When the segment does not have bronze's columns, or not these messages.
    pub fn read(&mut self, segment: &Segment, held: Vec<Held>) -> anyhow::Result<()> {
        let mut by_message: BTreeMap<i64, Vec<Held>> = BTreeMap::new();
        held.into_iter().for_each(|held| by_message.entry(held.offset).or_default().push(held));
        let wanted = by_message.iter().map(|(offset, held)| {
            let rows: Option<HashSet<i64>> = held.iter().map(|held| held.row).collect();
            (*offset, rows)
        });
        for (offset, at) in self.step.read_again(segment, wanted.collect())? {
            self.held.resize_with(at + 1, Vec::new);
            self.held[at] = by_message.remove(&offset).unwrap_or_default();
        }
        Ok(())
    }

    /// As [`Step::questions`].
    pub fn questions(&mut self, known: &Known) -> Vec<Question> {
        self.step.questions(known)
    }

    /// Decides on every held row, and lays out what comes of it.
    ///
    /// # Errors
    /// When rows do not fit the lake's schemas, which is a fault of this program.
    pub fn settle(mut self, answers: &Answers) -> anyhow::Result<Replayed> {
        let step = &mut self.step;
        let Decided { sensor_readings, news, soft } = step.decide(answers)?;
        let as_before = as_before(&step.quarantine, &self.held);
        let delivered = &mut step.delivered;
        step.quarantine.retain(|q| {
            let stays = as_before.contains(&(q.message, q.row));
            delivered[q.message].quarantined -= if stays { q.readings } else { 0 };
            !stays
        });
        let (mut resolved, mut messages) = (HashSet::new(), Vec::new());
        for (at, held) in self.held.iter().enumerate() {
            let gone = held.iter().filter(|held| !as_before.contains(&(at, held.row)));
            let before: i64 = gone.clone().map(|held| held.readings).sum();
            resolved.extend(gone.map(|held| held.id));
            let message = &mut step.delivered[at];
            message.readings = message.stored + message.duplicates + message.quarantined;
            if message.recorded && before + message.readings > 0 {
                messages.push(change(step, at, before)?);
            }
        }
        let quarantine = rows::quarantine(&step.quarantine, &step.delivered, &step.places)?;
        let counts = step.counts();
        let tables = step.lay_out(counts, &soft, sensor_readings)?;
        Ok(Replayed { resolved, quarantine, messages, tables, news, counts })
    }
}

/// The held rows, by message and place in it, that are held for the same reason again.
fn as_before(rejected: &[Quarantined], held: &[Vec<Held>]) -> HashSet<(usize, Option<i64>)> {
    let again: HashMap<(usize, Option<i64>), &Quarantined> =
        rejected.iter().map(|q| ((q.message, q.row), q)).collect();
    let held = held.iter().enumerate().flat_map(|(at, held)| held.iter().map(move |held| (at, held)));
    held.filter(|(at, held)| {
        again
            .get(&(*at, held.row))
            .is_some_and(|q| (q.reject.rule, &q.reject.reason) == (&held.rule, &held.reason))
    })
    .map(|(at, held)| (at, held.row))
    .collect()
}

fn change(step: &Step, at: usize, before: i64) -> anyhow::Result<Change> {
    let message = &step.delivered[at];
    let Delivered { stored, duplicates, .. } = *message;
    let row = rows::messages(step.plan, std::slice::from_ref(message), &step.places)?;
    let nameless = || Name {
        site: message.site().to_owned(),
        gateway: message.gateway().to_owned(),
        epoch: String::new(),
        lane: NAMELESS.to_owned(),
        seq: 0,
    };
    Ok(Change {
        segment: step.places.segments[message.segment].clone(),
        name: message.name().cloned().unwrap_or_else(nameless),
        hash: message.named.as_ref().map_or(String::new(), |named| named.hash.clone()),
        readings: message.readings - before,
        stored,
        duplicates,
        quarantined: message.quarantined - before,
        row: row.into_iter().next().unwrap_or_else(|| RecordBatch::new_empty(Table::Messages.schema())),
    })
}
