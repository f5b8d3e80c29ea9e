//! What the outbox declares about itself: the rows of the control lane (pure). Their meaning is in
//! `common::wire`.

use std::sync::Arc;

use arrow::{
    array::{
        ArrayRef, Int64Array, RecordBatch, StringArray, StringDictionaryBuilder, TimestampMicrosecondArray,
    },
    datatypes::Int32Type,
    error::ArrowError,
};
use common::{
    time::{HOUR_MICROS, Timestamp},
    wire::{Lane, schema},
};
use uuid::Uuid;

use crate::census::Census;

/// One row of the control lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) record: &'static str,
    pub(super) epoch: Uuid,
    pub(super) lane: Option<Lane>,
    pub(super) first_seq: Option<u64>,
    pub(super) last_seq: Option<u64>,
    pub(super) readings: u64,
    pub(super) from: Option<Timestamp>,
    pub(super) to: Option<Timestamp>,
    pub(super) reason: Option<String>,
}

/// Messages of one epoch and lane that are gone for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gap {
    pub(super) epoch: Uuid,
    pub(super) lane: Lane,
    pub(super) first_seq: u64,
    pub(super) last_seq: u64,
    pub(super) readings: u64,
    /// Earliest and latest event time, where they are known.
    pub(super) from: Option<Timestamp>,
    pub(super) to: Option<Timestamp>,
    pub(super) reason: &'static str,
}

/// Joins gaps whose seqs are neighbours, whose lane and reason are the same.
pub(super) fn merge_gaps(gaps: Vec<Gap>) -> Vec<Gap> {
    let mut merged: Vec<Gap> = Vec::new();
    for gap in gaps {
        match merged.last_mut() {
            Some(last)
                if (last.epoch, last.lane, last.reason) == (gap.epoch, gap.lane, gap.reason)
                    && last.last_seq + 1 == gap.first_seq =>
            {
                last.last_seq = gap.last_seq;
                last.readings += gap.readings;
                last.from = last.from.zip(gap.from).map(|(a, b)| a.min(b));
                last.to = last.to.zip(gap.to).map(|(a, b)| a.max(b));
            }
            _ => merged.push(gap),
        }
    }
    merged
}

impl From<Gap> for Record {
    fn from(gap: Gap) -> Self {
        Record {
            record: "gap",
            epoch: gap.epoch,
            lane: Some(gap.lane),
            first_seq: Some(gap.first_seq),
            last_seq: Some(gap.last_seq),
            readings: gap.readings,
            from: gap.from,
            to: gap.to,
            reason: Some(gap.reason.to_owned()),
        }
    }
}

/// A row per hour and outcome; `settle` says which hour that is, if it is known.
pub(super) fn census_records(
    epoch: Uuid,
    census: &Census,
    settle: impl Fn(Timestamp) -> Option<Timestamp>,
) -> impl Iterator<Item = Record> {
    census.iter().map(move |(hour, outcome, readings)| {
        let from = settle(hour);
        Record {
            record: "census",
            epoch,
            lane: None,
            first_seq: None,
            last_seq: None,
            readings,
            from,
            to: from.map(|from| from.shifted(HOUR_MICROS)),
            reason: Some(outcome.to_string()),
        }
    })
}

/// (epoch, lane) ended with `head` messages and `rows` rows.
pub(super) fn closing_record(epoch: Uuid, lane: Lane, head: u64, rows: u64) -> Record {
    Record {
        record: "closing",
        epoch,
        lane: Some(lane),
        first_seq: None,
        // A lane without messages ended before seq 0.
        last_seq: head.checked_sub(1),
        readings: rows,
        from: None,
        to: None,
        reason: None,
    }
}

/// `epoch` did not stop cleanly: readings taken in `from..to` may not have been sealed.
pub(super) fn interruption_record(epoch: Uuid, from: Timestamp, to: Timestamp) -> Record {
    Record {
        record: "interruption",
        epoch,
        lane: None,
        first_seq: None,
        last_seq: None,
        readings: 0,
        from: Some(from),
        to: Some(to),
        reason: None,
    }
}

/// The rows as a batch of the control lane.
pub(super) fn batch(records: &[Record], now: Timestamp) -> Result<RecordBatch, ArrowError> {
    let words = |get: &dyn Fn(&Record) -> Option<String>| -> ArrayRef {
        let mut builder = StringDictionaryBuilder::<Int32Type>::new();
        records.iter().for_each(|r| builder.append_option(get(r)));
        Arc::new(builder.finish())
    };
    let numbers = |get: &dyn Fn(&Record) -> Option<u64>| -> ArrayRef {
        Arc::new(records.iter().map(|r| get(r).and_then(|n| i64::try_from(n).ok())).collect::<Int64Array>())
    };
    let instants = |get: &dyn Fn(&Record) -> Option<Timestamp>| -> ArrayRef {
        let values = records.iter().map(|r| get(r).map(Timestamp::as_micros));
        Arc::new(values.collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
    };
    let reasons: StringArray = records.iter().map(|r| r.reason.as_deref()).collect();
    let epochs: StringArray = records.iter().map(|r| Some(r.epoch.to_string())).collect();
    RecordBatch::try_new(
        schema(Lane::Control),
        vec![
            words(&|r| Some(r.record.to_owned())),
            instants(&|_| Some(now)),
            Arc::new(epochs),
            words(&|r| r.lane.map(|lane| lane.to_string())),
            numbers(&|r| r.first_seq),
            numbers(&|r| r.last_seq),
            numbers(&|r| Some(r.readings)),
            instants(&|r| r.from),
            instants(&|r| r.to),
            Arc::new(reasons),
        ],
    )
}
