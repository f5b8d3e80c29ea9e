//! Bronze: every message as it was received, in immutable Parquet objects, one row a message.
//!
//! * A segment is cut when it is old enough, big enough, or when half of the in-flight window waits in it.
//! * Its path has the UTC hour of `received_at`. Within a writer (one start of a program) the hour never
//!   goes back: a clock that is set back does not take `received_at` with it. A segment never spans hours.
//! * Numbers count up from 0 without holes, so (writer, number) names a segment for ever.
//! * A message is acknowledged, to the broker and to the edge, only after its segment's put returned.
//! * `AlreadyExists` under our own name means that an earlier try landed: the bytes are compared.

use std::{collections::BTreeMap, fmt::Write, sync::Arc, time::Duration};

use arrow::{
    array::{
        ArrayRef, BinaryBuilder, BooleanBuilder, Int64Builder, RecordBatch, StringBuilder,
        TimestampMicrosecondBuilder,
    },
    error::ArrowError,
};
use bytes::Bytes;
use common::{
    documents::AckRange,
    time::Timestamp,
    wire::{Identity, Lane, Topic},
};
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, path::Path};
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, Encoding, ZstdLevel},
    file::properties::{EnabledStatistics, WriterProperties},
    schema::types::ColumnPath,
};
use uuid::Uuid;

use crate::lake::{SegmentName, bronze_schema};

/// Where messages come from.
#[derive(Clone, Debug, PartialEq)]
pub struct Origin {
    /// Full topic.
    pub topic: String,
    /// Site and gateway of the topic, where it has them.
    pub gateway: Option<(String, String)>,
}

impl Origin {
    /// What `topic` says under this root.
    pub fn of(root: &str, topic: String) -> Origin {
        Origin { gateway: Topic::parse(root, &topic).map(|t| (t.site, t.gateway)), topic }
    }
}

/// A message as it came in.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// By the cloud's clock.
    pub received_at: Timestamp,
    /// One for all messages of a topic.
    pub origin: Arc<Origin>,
    /// The exact bytes.
    pub payload: Bytes,
    /// As the sender states it.
    pub content_type: Option<String>,
    /// MQTT quality of service.
    pub qos: u8,
    /// The broker says that it may have delivered this before.
    pub dup: bool,
    /// What the message says of itself outside of its payload.
    pub identity: Option<Box<Identity>>,
}

/// When to cut a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Since its first message.
    pub max_age: Duration,
    /// Of payloads.
    pub max_bytes: usize,
    /// Half of the in-flight window.
    pub max_messages: usize,
}

/// A segment that is to be put, and what may be said once it is durable.
#[derive(Debug)]
pub struct Sealed<T> {
    /// Its name for ever.
    pub name: SegmentName,
    /// In the order of arrival; never empty.
    pub messages: Vec<Message>,
    /// One for each message.
    pub tokens: Vec<T>,
}

/// Gathers messages into segments. `T` is whatever acknowledges a message.
#[derive(Debug)]
pub struct Bronze<T> {
    writer: Uuid,
    limits: Limits,
    next: u64,
    last_received: Timestamp,
    opened_at: Timestamp,
    bytes: usize,
    messages: Vec<Message>,
    tokens: Vec<T>,
}

impl<T> Bronze<T> {
    /// A writer that has written nothing yet.
    pub fn new(writer: Uuid, limits: Limits) -> Self {
        Self {
            writer,
            limits,
            next: 0,
            last_received: Timestamp::from_micros(i64::MIN),
            opened_at: Timestamp::from_micros(i64::MIN),
            bytes: 0,
            messages: Vec::new(),
            tokens: Vec::new(),
        }
    }

    /// Takes a message; returns the segments that this completes: the one of the hour before, and the one
    /// that is full now.
    pub fn push(&mut self, now: Timestamp, mut message: Message, token: T) -> Vec<Sealed<T>> {
        let mut sealed = Vec::new();
        message.received_at = message.received_at.max(self.last_received);
        if !self.messages.is_empty() && message.received_at.hour() != self.last_received.hour() {
            sealed.extend(self.flush());
        }
        if self.messages.is_empty() {
            self.opened_at = now;
        }
        self.last_received = message.received_at;
        self.bytes += message.payload.len();
        self.messages.push(message);
        self.tokens.push(token);
        if self.bytes >= self.limits.max_bytes || self.messages.len() >= self.limits.max_messages {
            sealed.extend(self.flush());
        }
        sealed
    }

    /// When [`Self::tick`] must be called.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        (!self.messages.is_empty()).then(|| self.opened_at + self.limits.max_age)
    }

    /// The segment, if it is old enough. A clock that was set back cuts it at once.
    pub fn tick(&mut self, now: Timestamp) -> Option<Sealed<T>> {
        let deadline = self.next_deadline()?;
        if now >= deadline || now < self.opened_at { self.flush() } else { None }
    }

    /// What is there.
    pub fn flush(&mut self) -> Option<Sealed<T>> {
        if self.messages.is_empty() {
            return None;
        }
        let name = SegmentName { hour: self.last_received.hour(), writer: self.writer, number: self.next };
        self.next += 1;
        self.bytes = 0;
        Some(Sealed {
            name,
            messages: std::mem::take(&mut self.messages),
            tokens: std::mem::take(&mut self.tokens),
        })
    }
}

/// The acknowledgements for messages with an identity, as merged ranges by (site, gateway).
pub fn ack_ranges(messages: &[Message]) -> BTreeMap<(String, String), Vec<AckRange>> {
    let mut seqs = BTreeMap::<(String, String), BTreeMap<(Uuid, Lane), Vec<u64>>>::new();
    for message in messages {
        if let (Some(gateway), Some(id)) = (&message.origin.gateway, &message.identity) {
            let lanes = seqs.entry(gateway.clone()).or_default();
            lanes.entry((id.epoch, id.lane)).or_default().push(id.seq);
        }
    }
    let merged = |lanes: BTreeMap<(Uuid, Lane), Vec<u64>>| {
        let mut ranges = Vec::<AckRange>::new();
        for ((epoch, lane), mut seqs) in lanes {
            seqs.sort_unstable();
            for seq in seqs {
                match ranges.last_mut() {
                    Some(last) if (last.epoch, last.lane) == (epoch, lane) && seq <= last.to + 1 => {
                        last.to = seq;
                    }
                    _ => ranges.push(AckRange { epoch, lane, from: seq, to: seq }),
                }
            }
        }
        ranges
    };
    seqs.into_iter().map(|(gateway, lanes)| (gateway, merged(lanes))).collect()
}

/// The rows of a segment.
///
/// # Errors
/// When a segment is larger than arrow's arrays, which the limits rule out.
pub fn rows(messages: &[Message]) -> Result<RecordBatch, ArrowError> {
    let n = messages.len();
    let mut received_at = TimestampMicrosecondBuilder::with_capacity(n).with_timezone("UTC");
    let mut topic = StringBuilder::with_capacity(n, messages.iter().map(|m| m.origin.topic.len()).sum());
    let mut payload = BinaryBuilder::with_capacity(n, messages.iter().map(|m| m.payload.len()).sum());
    let mut content_type = StringBuilder::new();
    let mut qos = Int64Builder::new();
    let mut dup = BooleanBuilder::new();
    let mut gateway = StringBuilder::new();
    let mut texts: [StringBuilder; 3] = Default::default();
    let mut numbers: [Int64Builder; 5] = Default::default();
    let mut sealed_at = TimestampMicrosecondBuilder::new().with_timezone("UTC");
    for message in messages {
        received_at.append_value(message.received_at.as_micros());
        topic.append_value(&message.origin.topic);
        payload.append_value(&message.payload);
        content_type.append_option(message.content_type.as_deref());
        qos.append_value(i64::from(message.qos));
        dup.append_value(message.dup);
        match &message.origin.gateway {
            Some((site, name)) => {
                // Text that is written goes before what is appended.
                let _ = [site, "/", name].iter().try_for_each(|part| gateway.write_str(part));
                gateway.append_value("");
            }
            None => gateway.append_null(),
        }
        let id = message.identity.as_ref();
        let [epoch, lane, clock] = &mut texts;
        epoch.append_option(id.map(|id| id.epoch.to_string()));
        lane.append_option(id.map(|id| id.lane.as_str()));
        clock.append_option(id.map(|id| id.clock.as_str()));
        let [v, seq, rows, rows_before, oldest] = &mut numbers;
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        v.append_option(id.map(|id| i64::from(id.v)));
        seq.append_option(id.map(|id| number(id.seq)));
        rows.append_option(id.map(|id| number(id.rows)));
        rows_before.append_option(id.map(|id| number(id.rows_before)));
        oldest.append_option(id.map(|id| number(id.oldest)));
        sealed_at.append_option(id.map(|id| id.sealed_at.as_micros()));
    }
    let [mut epoch, mut lane, mut clock] = texts;
    let [mut v, mut seq, mut count, mut rows_before, mut oldest] = numbers;
    let columns: Vec<ArrayRef> = vec![
        Arc::new(received_at.finish()),
        Arc::new(topic.finish()),
        Arc::new(payload.finish()),
        Arc::new(content_type.finish()),
        Arc::new(qos.finish()),
        Arc::new(dup.finish()),
        Arc::new(gateway.finish()),
        Arc::new(v.finish()),
        Arc::new(epoch.finish()),
        Arc::new(lane.finish()),
        Arc::new(seq.finish()),
        Arc::new(count.finish()),
        Arc::new(rows_before.finish()),
        Arc::new(oldest.finish()),
        Arc::new(sealed_at.finish()),
        Arc::new(clock.finish()),
    ];
    RecordBatch::try_new(bronze_schema(), columns)
}

/// The bytes of a segment; the same rows give the same bytes.
///
/// # Errors
/// When Parquet cannot be written, which the schema rules out.
pub fn encode(rows: &RecordBatch) -> parquet::errors::Result<Vec<u8>> {
    let mut writer = ArrowWriter::try_new(Vec::new(), rows.schema(), Some(writer_properties()?))?;
    writer.write(rows)?;
    writer.into_inner()
}

/// Columns of numbers that are mostly the one before and a little more.
const RISING: [&str; 5] = ["received_at", "seq", "rows_before", "oldest", "sealed_at"];
/// Columns in which there may be much to compress: to set up zstd for one takes longer than to write ten others.
const LARGE: [&str; 4] = ["topic", "payload", "gateway", "epoch"];

/// How bronze is written.
pub(crate) fn writer_properties() -> parquet::errors::Result<WriterProperties> {
    let payload = ColumnPath::from("payload");
    let mut properties = WriterProperties::builder()
        .set_column_dictionary_enabled(payload.clone(), false)
        .set_column_statistics_enabled(payload, EnabledStatistics::None);
    for name in RISING.map(ColumnPath::from) {
        properties = properties
            .set_column_dictionary_enabled(name.clone(), false)
            .set_column_encoding(name, Encoding::DELTA_BINARY_PACKED);
    }
    let zstd = Compression::ZSTD(ZstdLevel::try_new(1)?);
    for name in LARGE.map(ColumnPath::from) {
        properties = properties.set_column_compression(name, zstd);
    }
    Ok(properties.build())
}

/// Puts a segment unless it is there already with the same bytes.
///
/// # Errors
/// The store's, to be tried again; `AlreadyExists` when other bytes stand there.
pub async fn put(store: &dyn ObjectStore, name: &SegmentName, bytes: Bytes) -> object_store::Result<()> {
    let path = Path::from(name.path());
    let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    match store.put_opts(&path, bytes.clone().into(), create).await {
        Err(exists @ object_store::Error::AlreadyExists { .. }) => {
            let there = store.get(&path).await?.bytes().await?;
            if there == bytes { Ok(()) } else { Err(exists) }
        }
        other => other.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn message(received_at: i64, bytes: usize) -> Message {
        Message {
            received_at: Timestamp::from_micros(received_at),
            origin: Arc::new(Origin::of("tailrace/v1", "tailrace/v1/a/b/json".into())),
            payload: vec![7; bytes].into(),
            content_type: None,
            qos: 1,
            dup: false,
            identity: None,
        }
    }

    const MINUTE: i64 = 60_000_000;

    proptest! {
        /// Whatever comes in goes out once, in order, in segments that keep every rule, at any pace and with
        /// a clock that jumps both ways.
        #[test]
        fn segments_keep_their_rules(steps in prop::collection::vec((-90i64..90, 0usize..900, any::<bool>()), 1..200)) {
            let limits = Limits { max_age: Duration::from_secs(30), max_bytes: 4_000, max_messages: 16 };
            let mut bronze = Bronze::new(Uuid::nil(), limits);
            let mut sealed = Vec::new();
            let mut now = 1_000 * MINUTE;
            for (n, (minutes, bytes, tick)) in steps.iter().enumerate() {
                now += minutes * MINUTE / 10;
                let at = Timestamp::from_micros(now);
                if *tick {
                    sealed.extend(bronze.tick(at));
                    if let Some(deadline) = bronze.next_deadline() {
                        prop_assert!(deadline > at, "a tick leaves nothing overdue");
                    }
                }
                sealed.extend(bronze.push(at, message(now, *bytes), n));
            }
            sealed.extend(bronze.flush());
            prop_assert!(bronze.flush().is_none() && bronze.next_deadline().is_none());
            let tokens: Vec<usize> = sealed.iter().flat_map(|s| s.tokens.clone()).collect();
            prop_assert_eq!(tokens, (0..steps.len()).collect::<Vec<_>>());
            let mut hour = Timestamp::from_micros(i64::MIN);
            for (n, segment) in sealed.iter().enumerate() {
                prop_assert_eq!(segment.name.number, n as u64);
                prop_assert!(segment.name.hour >= hour);
                hour = segment.name.hour;
                prop_assert!(segment.messages.iter().all(|m| m.received_at.hour() == hour));
                prop_assert!((1..=limits.max_messages).contains(&segment.messages.len()));
                let but_last: usize = segment.messages.iter().rev().skip(1).map(|m| m.payload.len()).sum();
                prop_assert!(but_last < limits.max_bytes);
            }
        }
    }

    #[test]
    fn acknowledgements_merge() {
        let epoch = Uuid::from_u128(1);
        let messages: Vec<Message> = [3u64, 1, 2, 7, 2]
            .iter()
            .map(|seq| {
                let identity = Identity {
                    v: 1,
                    epoch,
                    lane: Lane::Readings,
                    seq: *seq,
                    rows: 1,
                    rows_before: 0,
                    oldest: 0,
                    sealed_at: Timestamp::from_micros(0),
                    clock: common::wire::ClockState::Synced,
                };
                Message { identity: Some(Box::new(identity)), ..message(0, 1) }
            })
            .collect();
        let ranges = ack_ranges(&messages);
        let expected = [(1, 3), (7, 7)].map(|(from, to)| AckRange { epoch, lane: Lane::Readings, from, to });
        assert_eq!(ranges[&("a".to_owned(), "b".to_owned())], expected);
    }

    #[tokio::test]
    async fn a_put_that_landed_before_is_no_error() {
        let store = InMemory::new();
        let mut bronze = Bronze::new(
            Uuid::nil(),
            Limits { max_age: Duration::from_secs(1), max_bytes: 1, max_messages: 1 },
        );
        let sealed = bronze.push(Timestamp::from_micros(0), message(0, 10), ()).remove(0);
        let bytes: Bytes = encode(&rows(&sealed.messages).unwrap()).unwrap().into();
        put(&store, &sealed.name, bytes.clone()).await.unwrap();
        put(&store, &sealed.name, bytes).await.unwrap();
        let other = put(&store, &sealed.name, "something else".into()).await;
        assert!(matches!(other, Err(object_store::Error::AlreadyExists { .. })), "{other:?}");
    }
}
