//! Seals rows into messages (pure): when a batch is cut and what is in it.
//!
//! Everything that waits is cut together, so that no aggregate and no anomaly becomes durable before the readings
//! that it was made of. A cut comes
//!
//! * when the oldest row has waited `linger` and `linger_rows` are there, or has waited `max_linger`;
//! * before the next batch would make `max_rows` rows or an estimated `max_message_bytes` of one lane;
//! * at once with an anomaly.
//!
//! Cuts fall between the batches of the sources, so the census of what was polled is cut where the readings are, and
//! `polled = sealed + held + rejected + skipped` holds after every cut, with the rows of the readings lane as
//! `sealed` (the outbox counts those). Only a batch that alone exceeds a message is divided, into drafts of one cut.

use std::{sync::Arc, time::Instant};

use arrow::{
    array::{
        ArrayRef, BooleanBuilder, Float64Builder, Int32Builder, Int64Builder, RecordBatch, StringBuilder,
        StringDictionaryBuilder, TimestampMicrosecondArray, TimestampMicrosecondBuilder, UInt8Builder,
    },
    datatypes::Int32Type,
};
use common::{
    reading::{Reading, Registry},
    time::Timestamp,
    wire::{self, Lane},
};

use self::dictionary::DeviceColumns;
use crate::{census::Census, model::episode::Event, settings::OutboxSettings, window::Aggregate};

mod dictionary;

/// Bytes of a reading before compression: ts, five keys, value and quality, with bit maps.
const READING_BYTES: usize = 8 + 5 * 4 + 8 + 1 + 1;
/// Bytes of an aggregate before compression: four instants, five keys, two counts, six values, and the rest.
const AGGREGATE_BYTES: usize = 4 * 8 + 5 * 4 + 2 * 8 + 6 * 8 + 6;
/// Bytes of a message besides its rows and its words: schema and identity.
const OVERHEAD_BYTES: usize = 4_096;

/// One message before it has a name: the outbox gives it epoch, seq and `rows_before`, encodes it, and makes it
/// durable together with its census.
#[derive(Clone, Debug)]
pub struct Draft {
    /// Its queue; never `control`, which is the outbox's own.
    pub lane: Lane,
    /// Columns as [`common::wire::schema`] has them. Without rows it makes no message and takes no seq: it only
    /// carries its census.
    pub batch: RecordBatch,
    /// Highest event time of the readings that this draft and those before it were made of.
    pub last_event: Timestamp,
    /// What was counted since the draft before: all but what is sealed, which the outbox counts.
    pub census: Census,
}

/// What one batch of a source has become, or several of them in order.
#[derive(Clone, Debug, Default)]
pub struct Processed {
    /// Marked, and without those held.
    pub readings: Vec<Reading>,
    /// Windows that closed.
    pub aggregates: Vec<Aggregate>,
    /// Anomalies raised or cleared.
    pub events: Vec<Event>,
    /// The source's counts and those held.
    pub census: Census,
    /// Highest event time among the source's readings, held ones included.
    pub last_event: Option<Timestamp>,
    /// The state of the episodes where it changed, to be durable with their events.
    pub episodes: Option<Vec<u8>>,
}

impl Processed {
    /// Adds what came after it.
    pub fn append(&mut self, later: Processed) {
        let Processed { readings, aggregates, events, census, last_event, episodes } = later;
        if self.readings.is_empty() && self.readings.capacity() < readings.len() {
            self.readings = readings;
        } else {
            self.readings.extend(readings);
        }
        self.aggregates.extend(aggregates);
        self.events.extend(events);
        self.census.merge(&census);
        self.last_event = self.last_event.max(last_event);
        self.episodes = episodes.or(self.episodes.take());
    }

    fn is_empty(&self) -> bool {
        self.readings.is_empty()
            && self.aggregates.is_empty()
            && self.events.is_empty()
            && self.census.is_empty()
    }
}

/// What is to be made durable in one go.
#[derive(Clone, Debug)]
pub struct Cut {
    /// At least one.
    pub drafts: Vec<Draft>,
    /// The latest state of the episodes, where it changed.
    pub episodes: Option<Vec<u8>>,
}

impl Cut {
    /// This and a later one.
    pub fn and(mut self, later: Cut) -> Cut {
        self.drafts.extend(later.drafts);
        Cut { drafts: self.drafts, episodes: later.episodes.or(self.episodes) }
    }

    /// Readings in it.
    pub fn readings(&self) -> usize {
        let drafts = self.drafts.iter().filter(|draft| draft.lane == Lane::Readings);
        drafts.map(|draft| draft.batch.num_rows()).sum()
    }
}

/// Rows that wait to be sealed.
pub struct Sealer {
    settings: OutboxSettings,
    waiting: Processed,
    /// Highest so far.
    last_event: Timestamp,
    /// Since when the oldest has waited.
    since: Option<Instant>,
    columns: DeviceColumns,
}

impl Sealer {
    /// A sealer for the readings of these devices.
    pub fn new(settings: OutboxSettings, registry: &Registry) -> Self {
        let readings = Vec::with_capacity(settings.max_rows);
        Self {
            columns: DeviceColumns::new(registry),
            settings,
            waiting: Processed { readings, ..Processed::default() },
            last_event: Timestamp::default(),
            since: None,
        }
    }

    /// Takes in a batch at the monotonic time `now`.
    pub fn push(&mut self, now: Instant, batch: Processed) -> Vec<Cut> {
        let mut cuts = Vec::new();
        let max = (self.max_rows(READING_BYTES), self.max_rows(AGGREGATE_BYTES));
        let rows = |part: &Processed| (part.readings.len(), part.aggregates.len());
        let (there, coming) = (rows(&self.waiting), rows(&batch));
        if there.0 + coming.0 > max.0 || there.1 + coming.1 > max.1 {
            cuts.extend(self.cut());
        }
        let urgent = !batch.events.is_empty();
        self.waiting.append(batch);
        if !self.waiting.is_empty() {
            self.since.get_or_insert(now);
        }
        let rows = rows(&self.waiting);
        let full = rows.0 >= max.0 || rows.1 >= max.1;
        if urgent || full || self.next_deadline().is_some_and(|deadline| deadline <= now) {
            cuts.extend(self.cut());
        }
        cuts
    }

    /// When to call [`Sealer::cut`] if nothing else comes.
    pub fn next_deadline(&self) -> Option<Instant> {
        let enough = self.waiting.readings.len() + self.waiting.aggregates.len() >= self.settings.linger_rows;
        let linger = if enough { self.settings.linger } else { self.settings.max_linger };
        Some(self.since? + linger)
    }

    /// Cuts everything that waits; none when nothing does. Readings come first.
    pub fn cut(&mut self) -> Option<Cut> {
        if self.waiting.is_empty() {
            return None;
        }
        self.since = None;
        let Processed { mut readings, aggregates, events, census, last_event, episodes } =
            std::mem::take(&mut self.waiting);
        self.last_event = self.last_event.max(last_event.unwrap_or(self.last_event));
        let mut drafts = Vec::new();
        let mut draft = |lane, batch| {
            let census = Census::default();
            drafts.push(Draft { lane, batch, last_event: self.last_event, census });
        };
        let max = (self.max_rows(READING_BYTES), self.max_rows(AGGREGATE_BYTES));
        for rows in readings.chunks(max.0) {
            draft(Lane::Readings, reading_batch(rows, &mut self.columns));
        }
        if readings.is_empty() && !census.is_empty() {
            draft(Lane::Readings, RecordBatch::new_empty(wire::schema(Lane::Readings)));
        }
        for rows in aggregates.chunks(max.1) {
            draft(Lane::Aggregates, aggregate_batch(rows, &mut self.columns));
        }
        for rows in events.chunks(self.settings.max_rows) {
            draft(Lane::Anomalies, event_batch(rows));
        }
        // With the last draft of readings, since the earlier ones are not yet all of them.
        if let Some(last) = drafts.iter_mut().rev().find(|draft| draft.lane == Lane::Readings) {
            last.census = census;
        }
        readings.clear();
        self.waiting.readings = readings;
        Some(Cut { drafts, episodes })
    }

    /// Rows of a message whose rows have this many bytes before compression.
    fn max_rows(&self, row_bytes: usize) -> usize {
        let room = self.settings.max_message_bytes.saturating_sub(OVERHEAD_BYTES + self.columns.text_bytes());
        self.settings.max_rows.min(room / row_bytes).max(1)
    }
}

fn reading_batch(rows: &[Reading], columns: &mut DeviceColumns) -> RecordBatch {
    let ts: Vec<i64> = rows.iter().map(|r| r.ts.as_micros()).collect();
    let mut value = Float64Builder::with_capacity(rows.len());
    let mut quality = UInt8Builder::with_capacity(rows.len());
    for row in rows {
        value.append_option(row.value.is_finite().then_some(row.value));
        quality.append_value(row.quality.code());
    }
    let mut arrays: Vec<ArrayRef> = vec![Arc::new(TimestampMicrosecondArray::from(ts).with_timezone("UTC"))];
    arrays.extend(columns.of(rows.iter().map(|r| r.device)));
    arrays.push(Arc::new(value.finish()));
    arrays.push(Arc::new(quality.finish()));
    batch(Lane::Readings, arrays)
}

fn aggregate_batch(rows: &[Aggregate], columns: &mut DeviceColumns) -> RecordBatch {
    let instants = |of: fn(&Aggregate) -> Timestamp| -> ArrayRef {
        let micros: Vec<i64> = rows.iter().map(|row| of(row).as_micros()).collect();
        Arc::new(TimestampMicrosecondArray::from(micros).with_timezone("UTC"))
    };
    let counts = |of: fn(&Aggregate) -> u64| -> ArrayRef {
        let mut column = Int64Builder::with_capacity(rows.len());
        rows.iter().for_each(|row| column.append_value(i64::try_from(of(row)).unwrap_or(i64::MAX)));
        Arc::new(column.finish())
    };
    let values = |of: fn(&Aggregate) -> Option<f64>| -> ArrayRef {
        let mut column = Float64Builder::with_capacity(rows.len());
        rows.iter().for_each(|row| column.append_option(of(row)));
        Arc::new(column.finish())
    };
    let mut partial = BooleanBuilder::with_capacity(rows.len());
    let mut revision = Int32Builder::with_capacity(rows.len());
    for row in rows {
        partial.append_value(row.partial);
        revision.append_value(row.revision);
    }
    let mut arrays = vec![instants(|a| a.start), instants(|a| a.end)];
    arrays.extend(columns.of(rows.iter().map(|a| a.device)));
    arrays.extend([counts(|a| a.stats.count), counts(|a| a.stats.bad_count)]);
    arrays.extend([values(|a| a.stats.min()), values(|a| a.stats.max()), values(|a| a.stats.mean())]);
    arrays.extend([values(|a| a.stats.stddev()), values(|a| a.stats.first()), values(|a| a.stats.last())]);
    arrays.extend([instants(|a| a.covered_from), instants(|a| a.covered_to)]);
    arrays.push(Arc::new(partial.finish()));
    arrays.push(Arc::new(revision.finish()));
    batch(Lane::Aggregates, arrays)
}

fn event_batch(rows: &[Event]) -> RecordBatch {
    let words = |of: &dyn Fn(&Event) -> String| -> ArrayRef {
        let mut column = StringDictionaryBuilder::<Int32Type>::new();
        rows.iter().for_each(|row| column.append_value(of(row)));
        Arc::new(column.finish())
    };
    let mut ids = StringBuilder::new();
    let mut reasons = StringBuilder::new();
    let (mut scores, mut thresholds) = (Float64Builder::new(), Float64Builder::new());
    let mut started = TimestampMicrosecondBuilder::new();
    let mut ended = TimestampMicrosecondBuilder::new();
    for row in rows {
        ids.append_value(row.id.to_string());
        scores.append_value(row.score);
        thresholds.append_value(row.threshold);
        started.append_value(row.started_at.as_micros());
        ended.append_option(row.ended.as_ref().map(|(at, _)| at.as_micros()));
        reasons.append_option(row.ended.as_ref().map(|(_, why)| why.as_str()));
    }
    batch(
        Lane::Anomalies,
        vec![
            Arc::new(ids.finish()),
            words(&|e| if e.ended.is_some() { "cleared".into() } else { "raised".into() }),
            words(&|e| e.place.asset.clone()),
            words(&|e| e.place.device.clone()),
            words(&|e| e.model.to_string()),
            words(&|e| e.model_sha256.to_string()),
            words(&|e| e.severity.clone()),
            Arc::new(scores.finish()),
            Arc::new(thresholds.finish()),
            Arc::new(started.finish().with_timezone("UTC")),
            Arc::new(ended.finish().with_timezone("UTC")),
            Arc::new(reasons.finish()),
        ],
    )
}

fn batch(lane: Lane, arrays: Vec<ArrayRef>) -> RecordBatch {
    RecordBatch::try_new(wire::schema(lane), arrays).expect("the columns are those of the lane (tested)")
}

#[cfg(test)]
mod tests;
