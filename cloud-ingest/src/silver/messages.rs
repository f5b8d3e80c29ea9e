//! The messages of a segment, one by one: who sent it, was it here before, what is in it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use anyhow::Context;
use arrow::{
    array::{
        Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray,
        TimestampMicrosecondArray,
    },
    compute::{cast, kernels::cmp::eq, max, min, nullif},
    datatypes::{Int64Type, TimestampMicrosecondType},
};
use common::{
    documents::Status,
    time::Timestamp,
    wire::{ClockState, Lane, MAX_ROWS},
};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{
    Step,
    rows::{Quarantined, instants},
};
use crate::{
    decode::{BadSample, Claim, Content, Route, Sample, Sender, decode},
    lake::{Table, bronze_schema},
    quality::{Profile, Reject, Rules, hex},
};

/// What bronze and `silver/messages` call a clock that was never set, and every other one.
const UNSYNCED: &str = ClockState::Unsynced { boot: Uuid::nil() }.as_str();
const SYNCED: &str = ClockState::Synced.as_str();

/// Lane of `silver/messages` for messages that have no name.
pub(crate) const NAMELESS: &str = "json";

/// A bronze object that was read.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Its path in the lake.
    pub path: String,
    /// With bronze's columns.
    pub rows: RecordBatch,
}

/// What names a message for ever.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "DESIGN.md section 2 has the words")]
pub struct Name {
    pub site: String,
    pub gateway: String,
    pub epoch: String,
    pub lane: String,
    pub seq: i64,
}

/// The names of all messages of a segment that have one.
///
/// # Errors
/// When the segment does not have bronze's columns.
pub fn names(segment: &Segment) -> anyhow::Result<Vec<Name>> {
    let columns = Columns::of(segment)?;
    Ok((0..segment.rows.num_rows()).filter_map(|row| columns.name(row)).collect())
}

/// The readings that the messages of a segment say they have; one that says nothing has one, most likely.
pub(super) fn rows_said(segment: &Segment) -> anyhow::Result<u64> {
    let columns = Columns::of(segment)?;
    let said = |row| match columns.lane.is_valid(row) {
        true if columns.lane.value(row) == Lane::Readings.as_str() => columns.number(1, row).unsigned_abs(),
        true => 0,
        false => 1,
    };
    Ok((0..segment.rows.num_rows()).map(said).fold(0, u64::saturating_add))
}

/// What only a message with a name says of itself.
#[derive(Debug)]
pub(super) struct Named {
    pub(super) name: Name,
    pub(super) rows_before: i64,
    pub(super) oldest: i64,
    pub(super) sealed_at: Timestamp,
    /// SHA-256 of the payload, in hex.
    pub(super) hash: String,
}

/// A message, and what became of its readings. Some come one reading each, so this is small.
#[derive(Debug)]
pub(super) struct Delivered {
    pub(super) named: Option<Box<Named>>,
    pub(super) sender: Arc<Sender>,
    pub(super) received_at: Timestamp,
    /// Index into [`Places::segments`].
    pub(super) segment: usize,
    pub(super) offset: i64,
    /// Stands in `silver/messages`.
    pub(super) recorded: bool,
    pub(super) rows: i64,
    /// Its gateway's clock was never set.
    pub(super) unsynced: bool,
    pub(super) readings: i64,
    pub(super) stored: i64,
    pub(super) duplicates: i64,
    pub(super) quarantined: i64,
    pub(super) redelivered: bool,
    /// The readings that count, by their place in the message; `None` for all.
    #[expect(clippy::box_collection, reason = "most messages have none, which takes a word so")]
    pub(super) only: Option<Box<HashSet<i64>>>,
}

impl Delivered {
    pub(super) fn name(&self) -> Option<&Name> {
        self.named.as_ref().map(|named| &named.name)
    }

    /// Empty where nobody says.
    pub(super) fn site(&self) -> &str {
        self.sender.site.as_deref().unwrap_or("")
    }

    /// Empty where nobody says.
    pub(super) fn gateway(&self) -> &str {
        self.sender.gateway.as_deref().unwrap_or("")
    }

    /// Without a name, when it came.
    pub(super) fn sealed_at(&self) -> Timestamp {
        self.named.as_ref().map_or(self.received_at, |named| named.sealed_at)
    }

    /// As the wire calls it.
    pub(super) fn clock(&self) -> &'static str {
        if self.unsynced { UNSYNCED } else { SYNCED }
    }

    /// Whether this reading counts.
    #[inline]
    pub(super) fn counts(&self, row: i64) -> bool {
        self.only.as_ref().is_none_or(|only| only.contains(&row))
    }
}

/// The plan's segments.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// Their paths.
    pub(super) segments: Vec<String>,
    /// Of their messages.
    topics: Vec<StringArray>,
}

impl Places {
    fn push(&mut self, segment: &Segment, columns: &Columns<'_>) {
        self.segments.push(segment.path.clone());
        self.topics.push(columns.topic.clone());
    }

    /// The topic that a message came on.
    pub(super) fn topic(&self, message: &Delivered) -> &str {
        self.topics[message.segment].value(usize::try_from(message.offset).unwrap_or(usize::MAX))
    }
}

/// What the topics of a plan say.
#[derive(Default)]
pub(super) struct Routes(HashMap<String, Arc<Route>>);

impl Routes {
    fn of(&mut self, rules: &Rules, topic: &str) -> Arc<Route> {
        if let Some(route) = self.0.get(topic) {
            return Arc::clone(route);
        }
        let route = Arc::new(Route::of(&rules.root, &rules.json, topic));
        self.0.insert(topic.to_owned(), Arc::clone(&route));
        route
    }
}

impl Step {
    pub(super) fn read_segment(
        &mut self,
        segment: &Segment,
        seen: &mut HashMap<Name, String>,
    ) -> anyhow::Result<()> {
        let columns = Columns::of(segment)?;
        self.places.push(segment, &columns);
        for row in 0..segment.rows.num_rows() {
            let payload = columns.payload.value(row);
            let claim = columns.claim(row);
            let topic = columns.topic.value(row);
            let route = self.routes.of(&self.rules, topic);
            let mut message = columns.delivered(row, self.places.segments.len() - 1, &route, claim);
            let earlier = match message.named.as_deref() {
                Some(Named { name, hash, .. }) => match seen.insert(name.clone(), hash.clone()) {
                    Some(earlier) if earlier == *hash => {
                        message.redelivered = true;
                        message.readings = message.rows;
                        message.duplicates = message.rows;
                        self.delivered.push(message);
                        continue;
                    }
                    earlier => earlier,
                },
                None => None,
            };
            let content = decode(&mut self.payloads, &route, &self.rules.json, claim, payload);
            let at = self.delivered.len();
            self.delivered.push(message);
            if let Some(earlier) = earlier {
                self.delivered[at].redelivered = true;
                let reason = format!("a payload with SHA-256 {earlier} came under the same name before");
                tracing::error!(topic, reason, "two messages of one name; is a gateway id in use twice?");
                self.refuse(at, 0, Reject::new("message_conflict", reason));
            }
            self.take(at, content, claim.is_some())?;
        }
        Ok(())
    }

    /// Reads these messages of a segment once more, by their place in it, whatever came under their names; of the
    /// readings of each only some, or all. Returns which of [`Step::delivered`] stands for which; a message that
    /// cannot be read at all any more stands for none, when it was read before.
    pub(super) fn read_again(
        &mut self,
        segment: &Segment,
        wanted: BTreeMap<i64, Option<HashSet<i64>>>,
    ) -> anyhow::Result<Vec<(i64, usize)>> {
        let columns = Columns::of(segment)?;
        self.places.push(segment, &columns);
        let mut read = Vec::with_capacity(wanted.len());
        for (offset, only) in wanted {
            let row = usize::try_from(offset)?;
            let has = segment.rows.num_rows();
            anyhow::ensure!(row < has, "{} has {has} messages, and none at {row}", segment.path);
            let (payload, claim) = (columns.payload.value(row), columns.claim(row));
            let route = self.routes.of(&self.rules, columns.topic.value(row));
            let content = decode(&mut self.payloads, &route, &self.rules.json, claim, payload);
            if content.is_err() && only.is_some() {
                continue;
            }
            let mut message = columns.delivered(row, self.places.segments.len() - 1, &route, claim);
            message.only = only.map(Box::new);
            let at = self.delivered.len();
            self.delivered.push(message);
            self.take(at, content, claim.is_some())?;
            read.push((offset, at));
        }
        Ok(read)
    }

    fn take(&mut self, at: usize, content: Result<Content<'_>, Reject>, named: bool) -> anyhow::Result<()> {
        let rows = self.delivered[at].rows;
        match content {
            Err(reject) => {
                // Without a name nobody says how many readings there were: the message counts as one.
                let readings = if named { rows } else { i64::from(self.delivered[at].recorded) };
                self.delivered[at].readings = readings;
                self.refuse(at, readings, reject);
            }
            Ok(Content::Lane(Lane::Readings, batch)) => {
                self.delivered[at].readings = rows;
                let message = &mut self.delivered[at];
                self.candidates.wire(&self.rules, at, message, &batch, &mut self.quarantine);
            }
            Ok(Content::Lane(lane, batch)) => {
                self.delivered[at].readings = rows;
                if let Err(reject) = self.check_times(at, lane, &batch) {
                    self.refuse(at, rows, reject);
                } else {
                    let (table, rows_of_lane) = self.lane(at, lane, &batch)?;
                    self.batches.entry(table).or_default().push(rows_of_lane);
                    self.delivered[at].stored = rows;
                }
            }
            Ok(Content::Json { samples, bad }) => self.json(at, &samples, bad),
            Ok(Content::Status(status)) => {
                let batch = self.status(at, &status)?;
                self.batches.entry(Table::Status).or_default().push(batch);
            }
            Ok(Content::Registry(written_at, document)) => {
                let message = &self.delivered[at];
                let columns: Vec<ArrayRef> = vec![
                    text(message.site(), 1),
                    text(message.gateway(), 1),
                    Arc::new(instants([written_at].into_iter())),
                    Arc::new(instants([message.received_at].into_iter())),
                    text(&document, 1),
                    text(&self.places.segments[message.segment], 1),
                ];
                let batch = RecordBatch::try_new(Table::Registry.schema(), columns)?;
                self.batches.entry(Table::Registry).or_default().push(batch);
            }
            Ok(Content::Maintenance(record)) => {
                let site = Some(record.site.clone());
                self.delivered[at].sender = Arc::new(Sender { site, gateway: None });
                self.maintenance.push((record, at));
            }
        }
        Ok(())
    }

    /// Whether aggregates and anomalies are of a time at which there may be readings. Readings are judged one by one, since
    /// the clocks of some devices are set though their gateway's is not; these are of the gateway's clock, and judged together.
    fn check_times(&self, at: usize, lane: Lane, batch: &RecordBatch) -> Result<(), Reject> {
        let message = &self.delivered[at];
        match lane {
            Lane::Control | Lane::Readings => return Ok(()),
            Lane::Aggregates | Lane::Anomalies if message.unsynced => {
                let reason =
                    format!("its times count from the start of a machine whose clock was never set ({lane})");
                return Err(Reject::new("clock", reason));
            }
            Lane::Aggregates | Lane::Anomalies => {}
        }
        let schema = batch.schema();
        // A window may end after what it covers of it.
        let columns = schema.fields().iter().zip(batch.columns()).filter(|(f, _)| f.name() != "window_end");
        for times in columns.filter_map(|(_, of)| of.as_primitive_opt::<TimestampMicrosecondType>()) {
            for ts in [min(times), max(times)].into_iter().flatten() {
                self.rules.check_time(Timestamp::from_micros(ts), message.received_at)?;
            }
        }
        Ok(())
    }

    fn json(&mut self, at: usize, samples: &[(i64, Sample<'_>)], bad: Vec<BadSample>) {
        let message = &mut self.delivered[at];
        message.readings = i64::try_from(samples.len() + bad.len()).unwrap_or(i64::MAX);
        message.rows = message.readings;
        for bad in
            bad.into_iter().filter(|bad| message.only.as_ref().is_none_or(|only| only.contains(&bad.row)))
        {
            message.quarantined += 1;
            self.quarantine.push(Quarantined {
                row: Some(bad.row),
                device_id: bad.device_id,
                ..Quarantined::message(at, 1, bad.reject)
            });
        }
        self.candidates.json(&self.rules, at, message, samples, &mut self.quarantine);
    }

    /// The rows of a lane other than readings, in the lake's columns.
    fn lane(&self, at: usize, lane: Lane, batch: &RecordBatch) -> anyhow::Result<(Table, RecordBatch)> {
        let message = &self.delivered[at];
        let n = batch.num_rows();
        let (table, epoch, seq) = match lane {
            Lane::Control => (Table::Control, "message_epoch", "message_seq"),
            Lane::Anomalies => (Table::Anomalies, "epoch", "seq"),
            Lane::Aggregates | Lane::Readings => (Table::Aggregates, "epoch", "seq"),
        };
        let name = message.name().context("a message of a lane has a name")?;
        let own: [(&str, ArrayRef); 6] = [
            ("site", text(&name.site, n)),
            ("gateway_id", text(&name.gateway, n)),
            ("received_at", Arc::new(instants(std::iter::repeat_n(message.received_at, n)))),
            (epoch, text(&name.epoch, n)),
            (seq, Arc::new(Int64Array::from(vec![name.seq; n]))),
            ("segment", text(&self.places.segments[message.segment], n)),
        ];
        let schema = table.schema();
        let mut columns = Vec::with_capacity(schema.fields().len());
        for field in schema.fields() {
            let column = match own.iter().find(|(name, _)| name == field.name()) {
                Some((_, column)) => Arc::clone(column),
                None => {
                    let sent = batch.column_by_name(field.name());
                    cast(sent.with_context(|| format!("column {}", field.name()))?, field.data_type())?
                }
            };
            // The wire writes "no asset" as empty text.
            let column = match field.name().as_str() {
                "asset_id" | "device_id" if field.is_nullable() => {
                    nullif(&column, &eq(&column, &StringArray::new_scalar(""))?)?
                }
                _ => column,
            };
            columns.push(column);
        }
        let rows = RecordBatch::try_new(schema, columns)?;
        Ok((table, if lane == Lane::Aggregates { canonical(&self.rules, rows)? } else { rows }))
    }

    /// One row for each lane that the document names; one with a null lane when it names none.
    fn status(&self, at: usize, status: &Status) -> anyhow::Result<RecordBatch> {
        let message = &self.delivered[at];
        let n = status.lanes.len().max(1);
        let lanes = || (0..n).map(|i| status.lanes.get(i));
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let columns: Vec<ArrayRef> = vec![
            text(message.site(), n),
            text(message.gateway(), n),
            Arc::new(BooleanArray::from(vec![status.online; n])),
            Arc::new(instants(std::iter::repeat_n(status.at, n))),
            Arc::new(instants(std::iter::repeat_n(message.received_at, n))),
            text(&status.version, n),
            text(&status.config_sha256, n),
            text(&status.epoch.to_string(), n),
            Arc::new(StringArray::from_iter(lanes().map(|l| l.map(|l| l.epoch.to_string())))),
            Arc::new(StringArray::from_iter(lanes().map(|l| l.map(|l| l.lane.as_str())))),
            Arc::new(Int64Array::from_iter(lanes().map(|l| l.map(|l| number(l.head))))),
            Arc::new(Int64Array::from_iter(lanes().map(|l| l.map(|l| number(l.rows))))),
            Arc::new(Int64Array::from_iter(lanes().map(|l| l.map(|l| number(l.oldest))))),
            text(&self.places.segments[message.segment], n),
        ];
        Ok(RecordBatch::try_new(Table::Status.schema(), columns)?)
    }
}

/// Aggregates in the canonical units of their device types. One whose unit does not convert stays as it was
/// sent; gold takes a device's unit from its rows.
fn canonical(rules: &Rules, rows: RecordBatch) -> anyhow::Result<RecordBatch> {
    let schema = rows.schema();
    let column = |name: &str| rows.column_by_name(name).map(|c| c.as_string::<i32>());
    let (Some(ids), Some(types), Some(units), Some(kinds)) =
        (column("device_id"), column("device_type"), column("unit"), column("kind"))
    else {
        anyhow::bail!("aggregates without the columns of a device");
    };
    let profiles: Vec<_> = (0..rows.num_rows())
        .map(|i| rules.profile(ids.value(i), types.value(i), units.value(i), kinds.value(i)).ok())
        .collect();
    let same = |(i, profile): (usize, &Option<Profile>)| {
        profile.as_ref().is_none_or(|p| p.unit == units.value(i) && p.device_type == types.value(i))
    };
    if profiles.iter().enumerate().all(same) {
        return Ok(rows);
    }
    let mut columns = rows.columns().to_vec();
    for (field, column) in schema.fields().iter().zip(&mut columns) {
        let stated = Arc::clone(column);
        match field.name().as_str() {
            name @ ("unit" | "device_type") => {
                let texts = stated.as_string::<i32>();
                let mended = profiles.iter().enumerate().map(|(i, profile)| match profile {
                    Some(p) if name == "unit" => p.unit.as_str(),
                    Some(p) => p.device_type.as_str(),
                    None => texts.value(i),
                });
                *column = Arc::new(StringArray::from_iter_values(mended));
            }
            name @ ("min" | "max" | "mean" | "stddev" | "first" | "last") => {
                let shifted = name != "stddev";
                let values = stated.as_primitive::<arrow::datatypes::Float64Type>();
                let mended = values.iter().zip(&profiles).map(|(value, profile)| match profile {
                    Some(p) if shifted => value.map(|v| v * p.scale + p.shift),
                    Some(p) => value.map(|v| v * p.scale.abs()),
                    None => value,
                });
                *column = Arc::new(Float64Array::from_iter(mended));
            }
            _ => {}
        }
    }
    Ok(RecordBatch::try_new(schema, columns)?)
}

/// The same text `n` times.
pub(super) fn text(value: &str, n: usize) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(std::iter::repeat_n(value, n)))
}

/// The columns of a segment that matter here.
struct Columns<'a> {
    received_at: &'a TimestampMicrosecondArray,
    topic: &'a StringArray,
    payload: &'a arrow::array::BinaryArray,
    gateway: &'a StringArray,
    v: &'a Int64Array,
    epoch: &'a StringArray,
    lane: &'a StringArray,
    numbers: [&'a Int64Array; 4],
    sealed_at: &'a TimestampMicrosecondArray,
    clock: &'a StringArray,
}

impl<'a> Columns<'a> {
    fn of(segment: &'a Segment) -> anyhow::Result<Columns<'a>> {
        let expected = bronze_schema();
        let rows = &segment.rows;
        for field in expected.fields() {
            let found = rows.column_by_name(field.name()).map(|column| column.data_type());
            let fits = found == Some(field.data_type());
            anyhow::ensure!(fits, "{}: column {} is {found:?}", segment.path, field.name());
        }
        let column = |name: &str| rows.column_by_name(name).with_context(|| format!("column {name}"));
        let texts = |name: &str| column(name).map(|c| c.as_string::<i32>());
        let ints = |name: &str| column(name).map(|c| c.as_primitive::<Int64Type>());
        let times = |name: &str| column(name).map(|c| c.as_primitive::<TimestampMicrosecondType>());
        Ok(Columns {
            received_at: times("received_at")?,
            topic: texts("topic")?,
            payload: column("payload")?.as_binary::<i32>(),
            gateway: texts("gateway")?,
            v: ints("v")?,
            epoch: texts("epoch")?,
            lane: texts("lane")?,
            numbers: [ints("seq")?, ints("rows")?, ints("rows_before")?, ints("oldest")?],
            sealed_at: times("sealed_at")?,
            clock: texts("clock")?,
        })
    }

    fn number(&self, which: usize, row: usize) -> i64 {
        let column = self.numbers[which];
        if column.is_valid(row) { column.value(row) } else { 0 }
    }

    fn name(&self, row: usize) -> Option<Name> {
        if self.epoch.is_null(row) || self.lane.is_null(row) || self.gateway.is_null(row) {
            return None;
        }
        let (site, gateway) = self.gateway.value(row).split_once('/')?;
        Some(Name {
            site: site.to_owned(),
            gateway: gateway.to_owned(),
            epoch: self.epoch.value(row).to_owned(),
            lane: self.lane.value(row).to_owned(),
            seq: self.number(0, row),
        })
    }

    fn claim(&self, row: usize) -> Option<Claim> {
        self.name(row)?;
        let lane = self.lane.value(row).parse().ok()?;
        let epoch = self.epoch.value(row).parse().ok()?;
        let (seq, rows) = (self.number(0, row), self.number(1, row));
        Some(Claim { v: self.v.value(row), epoch, lane, seq, rows })
    }

    /// A message of `segment` that is not decoded yet.
    fn delivered(&self, row: usize, segment: usize, route: &Route, claim: Option<Claim>) -> Delivered {
        let received_at = Timestamp::from_micros(self.received_at.value(row));
        let sealed_at = match self.sealed_at.is_valid(row) {
            true => Timestamp::from_micros(self.sealed_at.value(row)),
            false => received_at,
        };
        let named = self.name(row).map(|name| Named {
            name,
            rows_before: self.number(2, row),
            oldest: self.number(3, row),
            sealed_at,
            hash: hex(&Sha256::digest(self.payload.value(row))),
        });
        Delivered {
            sender: Arc::clone(&route.sender),
            received_at,
            segment,
            offset: i64::try_from(row).unwrap_or(i64::MAX),
            recorded: named.is_some() || route.nameless_readings(claim),
            named: named.map(Box::new),
            rows: self.number(1, row).clamp(0, MAX_ROWS),
            unsynced: self.clock.is_valid(row) && self.clock.value(row) == UNSYNCED,
            readings: 0,
            stored: 0,
            duplicates: 0,
            quarantined: 0,
            redelivered: false,
            only: None,
        }
    }
}
