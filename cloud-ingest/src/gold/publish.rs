//! Puts computed rows into a gold table: only what differs from what stands there, and the progress with it.
//!
//! * A row whose values did not change stays as it is, with its `revision` and `updated_at`. A step that changes
//!   no row commits its progress alone, and not even that if silver is as it was.
//! * Minutes that the table does not have yet are appended, so they become files of their own; what changes in the
//!   others replaces the narrowest time range of its hour that holds it. A live table thus rewrites its last minute, or
//!   its last hour where a row is one, not its history. When a step does both, the progress goes with the second commit:
//!   after a crash between the two the next step finds the first half in place and unchanged.
//! * At every version there is one row a key, also where several refiners make gold: each commit is from the snapshot
//!   that was compared, or from the commit before it, and all have the same app id, so one of two fails. A step that
//!   has read an older silver than another that is done fails, too.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    sync::Arc,
};

use arrow::{
    array::{ArrayRef, BooleanArray, Int64Array, RecordBatch, TimestampMicrosecondArray, UInt64Array},
    compute::{
        and, cast, concat_batches, filter_record_batch, is_not_null, kernels::cmp::not_distinct, take,
    },
    datatypes::Schema,
    row::{RowConverter, Rows, SortField},
};
use common::time::{HOUR_MICROS, Timestamp};
use deltalake::DeltaTable;

use super::{
    changes,
    minutes::floor_minute,
    series::{column, floor_hour, ints, micros},
};
use crate::{
    lake::Table,
    tables::{SMALL_FILES, TIERS, Tables},
};

/// App id of all commits to gold, and its progress: the version of the silver table that was read.
pub(crate) const SILVER: &str = "silver";
/// Progress of a table that has nothing of silver yet, as far as anybody can tell.
pub(crate) const NONE: i64 = -1;
/// Tables whose progress is a version of `silver/sensor_readings` that never goes back, unless all is made anew.
const BY_SILVER: [Table; 4] =
    [Table::HourlyAggregates, Table::Timeseries1m, Table::DailyAggregates, Table::AssetHealth];

/// How a gold table is keyed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keyed {
    pub(super) table: Table,
    /// The instant that names a row's hour; `None` for a table that is replaced as a whole.
    pub(super) time: Option<&'static str>,
    /// The instant from which on a row is closed, and a change of it a revision; an hour after `time` with `None`.
    pub(super) closed: Option<&'static str>,
    /// Unique.
    pub(super) key: &'static [&'static str],
}

/// The progress that goes with a commit.
#[derive(Clone, Copy, Debug)]
pub(super) enum Progress {
    /// The step is complete with this version of silver.
    Complete(i64),
    /// Another part of the step follows.
    Partly(i64),
}

impl Progress {
    /// Of the last part of a step, or of one before it.
    pub(super) fn of(version: i64, is_last: bool) -> Progress {
        if is_last { Progress::Complete(version) } else { Progress::Partly(version) }
    }

    fn version(self) -> i64 {
        match self {
            Progress::Complete(version) | Progress::Partly(version) => version,
        }
    }
}

/// Makes the rows of `spans` (of the whole table for one without a time) equal to `computed`. Returns how many
/// rows changed, came or went.
pub(super) async fn publish(
    tables: &Tables,
    keyed: Keyed,
    spans: &[Range<Timestamp>],
    computed: RecordBatch,
    progress: Progress,
    now: Timestamp,
) -> anyhow::Result<usize> {
    let base = tables.snapshot(keyed.table).await?;
    let version = progress.version();
    let known = match &base {
        Some(base) => Tables::progress(base, SILVER).await?,
        None => None,
    };
    if BY_SILVER.contains(&keyed.table)
        && let Some(known) = known
    {
        let table = keyed.table.path();
        anyhow::ensure!(
            known <= version,
            "{table} has version {known} of silver by another refiner, not {version}"
        );
    }
    let existing = existing(base.as_ref(), keyed, spans).await?;
    let difference = Difference::between(&existing, computed, keyed, now)?;
    if difference.changed == 0 {
        mark(tables, keyed.table, base, known, progress).await?;
        return Ok(0);
    }
    // Of a commit after which more of the same step follows: no further than it was, nor than what this step has read.
    let partly = (SILVER, known.map_or(NONE, |known| known.min(version)));
    let txn = if matches!(progress, Progress::Partly(_)) { partly } else { (SILVER, version) };
    let Some(time) = keyed.time else {
        tables.replace(keyed.table, base, None, vec![difference.rows], txn).await?;
        return Ok(difference.changed);
    };
    let parts = Parts::of(&difference, &existing, time, spans)?;
    let mut base = base;
    if !parts.replaced.is_empty() {
        let rows = parts.select(&difference.rows, time, |parts, at| parts.is_replaced(at))?;
        let txn = if parts.appended.is_empty() { txn } else { partly };
        let predicate = predicate(time, &parts.replaced);
        base = Some(tables.replace(keyed.table, base, Some(&predicate), vec![rows], txn).await?);
    }
    if !parts.appended.is_empty() {
        // Packing now leaves the hours that still change out of the big files. It changes no row, so what was compared
        // still stands.
        if parts.begins_an_hour
            && let Err(error) = tables.compact(keyed.table, &TIERS, SMALL_FILES).await
        {
            tracing::warn!(table = keyed.table.path(), %error, "compaction is left for later");
        }
        let rows = parts.select(&difference.rows, time, Parts::is_appended)?;
        tables.append(keyed.table, base, vec![rows], txn).await?;
    }
    Ok(difference.changed)
}

/// Notes that a step with this version of silver had nothing to compute for a table.
pub(super) async fn nothing(
    tables: &Tables,
    keyed: Keyed,
    version: i64,
    now: Timestamp,
) -> anyhow::Result<()> {
    let none = RecordBatch::new_empty(keyed.table.schema());
    publish(tables, keyed, &[], none, Progress::Complete(version), now).await?;
    Ok(())
}

/// Commits the progress alone, at once: what was compacted or written into silver's log without a row must not be asked
/// for again when upkeep has cut that log, since then everything counts as touched.
async fn mark(
    tables: &Tables,
    table: Table,
    base: Option<DeltaTable>,
    known: Option<i64>,
    progress: Progress,
) -> anyhow::Result<()> {
    let (Some(base), false) = (base, matches!(progress, Progress::Partly(_))) else { return Ok(()) };
    let version = progress.version();
    if known != Some(version) {
        tables.append(table, Some(base), Vec::new(), (SILVER, version)).await?;
    }
    Ok(())
}

/// The rows that stand in the spans.
async fn existing(
    base: Option<&DeltaTable>,
    keyed: Keyed,
    spans: &[Range<Timestamp>],
) -> anyhow::Result<RecordBatch> {
    let schema = keyed.table.schema();
    let Some(base) = base else { return Ok(RecordBatch::new_empty(schema)) };
    let names = schema.fields().iter().map(|f| format!("\"{}\"", f.name())).collect::<Vec<_>>().join(", ");
    let within = keyed.time.map_or_else(String::new, |time| format!(" WHERE {}", predicate(time, spans)));
    let context = changes::context(&[("t", Some(base), None)]).await?;
    let batches = context.sql(&format!("SELECT {names} FROM t{within}")).await?.collect().await?;
    let conformed: Result<Vec<RecordBatch>, arrow::error::ArrowError> = batches
        .into_iter()
        .map(|batch| {
            let columns = batch.columns().iter().zip(schema.fields());
            let columns: Result<Vec<ArrayRef>, _> = columns.map(|(c, f)| cast(c, f.data_type())).collect();
            RecordBatch::try_new(Arc::clone(&schema), columns?)
        })
        .collect();
    Ok(concat_batches(&schema, &conformed?)?)
}

/// SQL that is true in the spans.
pub(super) fn predicate(time: &str, spans: &[Range<Timestamp>]) -> String {
    let one = |span: &Range<Timestamp>| format!("({time} >= '{}' AND {time} < '{}')", span.start, span.end);
    if spans.is_empty() { "false".to_owned() } else { spans.iter().map(one).collect::<Vec<_>>().join(" OR ") }
}

/// Hours as the fewest ranges.
pub(super) fn spans(hours: &BTreeSet<Timestamp>) -> Vec<Range<Timestamp>> {
    let mut spans: Vec<Range<Timestamp>> = Vec::new();
    for hour in hours {
        let end = Timestamp::from_micros(hour.as_micros() + HOUR_MICROS);
        match spans.last_mut() {
            Some(last) if last.end == *hour => last.end = end,
            _ => spans.push(*hour..end),
        }
    }
    spans
}

/// Computed rows, with what is kept of the existing ones, and which of them differ.
#[derive(Debug)]
struct Difference {
    rows: RecordBatch,
    /// By row.
    differs: Vec<bool>,
    /// Existing rows whose key is no longer computed.
    vanished: Vec<usize>,
    changed: usize,
}

impl Difference {
    fn between(
        existing: &RecordBatch,
        computed: RecordBatch,
        keyed: Keyed,
        now: Timestamp,
    ) -> anyhow::Result<Difference> {
        let (old_keys, new_keys) = keys(existing, &computed, keyed.key)?;
        let mut known: HashMap<&[u8], usize> =
            (0..existing.num_rows()).map(|row| (old_keys.row(row).data(), row)).collect();
        // By computed row: the existing one of its key.
        let before: Vec<Option<usize>> =
            (0..computed.num_rows()).map(|row| known.remove(new_keys.row(row).data())).collect();
        let differs = differs(existing, &computed, &before, keyed)?;
        let mut vanished: Vec<usize> = known.into_values().collect();
        vanished.sort_unstable();
        let changed = differs.iter().filter(|d| **d).count() + vanished.len();
        let rows = stamp(existing, computed, &before, &differs, keyed, now)?;
        Ok(Difference { rows, differs, vanished, changed })
    }
}

/// Both batches' keys in a form that compares bytewise.
fn keys(a: &RecordBatch, b: &RecordBatch, names: &[&str]) -> anyhow::Result<(Rows, Rows)> {
    let columns = |batch: &RecordBatch| -> anyhow::Result<Vec<ArrayRef>> {
        names.iter().map(|name| column(batch, name).cloned()).collect()
    };
    let (a, b) = (columns(a)?, columns(b)?);
    let fields = b.iter().map(|column| SortField::new(column.data_type().clone())).collect();
    let converter = RowConverter::new(fields)?;
    Ok((converter.convert_columns(&a)?, converter.convert_columns(&b)?))
}

/// By computed row, whether it says anything else than the existing one of its key.
fn differs(
    existing: &RecordBatch,
    computed: &RecordBatch,
    before: &[Option<usize>],
    keyed: Keyed,
) -> anyhow::Result<Vec<bool>> {
    let schema = computed.schema();
    let places: UInt64Array = before.iter().map(|old| old.map(|old| old as u64)).collect();
    let mut same = is_not_null(&places)?;
    for (field, new) in schema.fields().iter().zip(computed.columns()) {
        let name = field.name().as_str();
        if !keyed.key.contains(&name) && !is_stamp(&schema, name) {
            let old = take(column(existing, name)?, &places, None)?;
            same = and(&same, &not_distinct(&old, new)?)?;
        }
    }
    Ok(same.values().iter().map(|same| !same).collect())
}

/// Whether a column says how its row came to be, and not what it is. The `updated_at` of a table without `revision`
/// is silver's own (the registry's).
pub(crate) fn is_stamp(schema: &Schema, name: &str) -> bool {
    match name {
        "revision" | "computed_at" => true,
        "updated_at" => schema.index_of("revision").is_ok(),
        _ => false,
    }
}

/// Sets the stamps that the table has.
fn stamp(
    existing: &RecordBatch,
    computed: RecordBatch,
    before: &[Option<usize>],
    differs: &[bool],
    keyed: Keyed,
    now: Timestamp,
) -> anyhow::Result<RecordBatch> {
    let schema = computed.schema();
    let mut columns = computed.columns().to_vec();
    for name in ["updated_at", "computed_at"] {
        let (true, Ok(ix)) = (is_stamp(&schema, name), schema.index_of(name)) else { continue };
        let old = micros(existing, name)?;
        let stamped = before.iter().zip(differs).map(|(old_row, differs)| match old_row {
            Some(row) if !differs => old.value(*row),
            _ => now.as_micros(),
        });
        let stamped = TimestampMicrosecondArray::from_iter_values(stamped);
        columns[ix] = Arc::new(stamped.with_timezone("UTC"));
    }
    if let (Ok(ix), Some(time)) = (schema.index_of("revision"), keyed.time) {
        let old = ints(existing, "revision")?;
        let (ends, after) = match keyed.closed {
            Some(end) => (micros(&computed, end)?, 0),
            None => (micros(&computed, time)?, HOUR_MICROS),
        };
        let revisions = before.iter().zip(differs).enumerate().map(|(row, (old_row, differs))| {
            let closed = now.as_micros() >= ends.value(row) + after;
            old_row.map_or(0, |old_row| old.value(old_row) + i64::from(*differs && closed))
        });
        columns[ix] = Arc::new(Int64Array::from_iter_values(revisions));
    }
    Ok(RecordBatch::try_new(schema, columns)?)
}

/// Which minutes are new to the table, and which ranges of the others are to be replaced. A minute that has begun goes into
/// a file of its own, so that the ones before it, which hardly change, are not written again with it.
#[derive(Debug)]
struct Parts {
    appended: BTreeSet<i64>,
    replaced: Vec<Range<Timestamp>>,
    /// Of an hour there is something for the first time.
    begins_an_hour: bool,
}

impl Parts {
    fn of(
        difference: &Difference,
        existing: &RecordBatch,
        time: &str,
        spans: &[Range<Timestamp>],
    ) -> anyhow::Result<Parts> {
        let (old, new) = (micros(existing, time)?, micros(&difference.rows, time)?);
        let known: BTreeSet<i64> = old.values().iter().copied().map(floor_minute).collect();
        let known_hours: BTreeSet<i64> = known.iter().copied().map(floor_hour).collect();
        let changed = difference.differs.iter().zip(new.values()).filter(|(d, _)| **d).map(|(_, ts)| *ts);
        let vanished = difference.vanished.iter().map(|row| old.value(*row));
        let mut appended = BTreeSet::new();
        // By hour: the first and the last change.
        let mut ranges: BTreeMap<i64, (i64, i64)> = BTreeMap::new();
        for ts in changed.chain(vanished) {
            let minute = floor_minute(ts);
            if known.contains(&minute) {
                let range = ranges.entry(floor_hour(ts)).or_insert((ts, ts));
                *range = (range.0.min(ts), range.1.max(ts));
            } else {
                appended.insert(minute);
            }
        }
        // Neighbouring hours join, so that a predicate stays short.
        let mut replaced: Vec<Range<Timestamp>> = Vec::new();
        let mut last_hour = None;
        for (hour, (first, last)) in ranges {
            let end = Timestamp::from_micros(last + 1);
            match replaced.last_mut() {
                Some(range) if last_hour == Some(hour - HOUR_MICROS) => range.end = end,
                _ => replaced.push(Timestamp::from_micros(first)..end),
            }
            last_hour = Some(hour);
        }
        // What stands of an hour before the spans nobody has looked for.
        let is_whole = |hour: i64| spans.iter().any(|span| span.contains(&Timestamp::from_micros(hour)));
        let begins_an_hour = appended.iter().any(|minute| {
            let hour = floor_hour(*minute);
            !known_hours.contains(&hour) && is_whole(hour)
        });
        let mut parts = Parts { appended, replaced, begins_an_hour };
        // New minutes between replaced ones go with these.
        let appended = new.values().iter().filter(|ts| parts.is_appended(**ts)).map(|ts| floor_minute(*ts));
        parts.appended = appended.collect();
        Ok(parts)
    }

    fn is_appended(&self, ts: i64) -> bool {
        self.appended.contains(&floor_minute(ts)) && !self.is_replaced(ts)
    }

    fn is_replaced(&self, ts: i64) -> bool {
        let ts = Timestamp::from_micros(ts);
        self.replaced.iter().any(|range| range.contains(&ts))
    }

    fn select(
        &self,
        rows: &RecordBatch,
        time: &str,
        wanted: impl Fn(&Parts, i64) -> bool,
    ) -> anyhow::Result<RecordBatch> {
        let times = micros(rows, time)?;
        let mask: BooleanArray = times.values().iter().map(|ts| Some(wanted(self, *ts))).collect();
        Ok(filter_record_batch(rows, &mask)?)
    }
}

#[cfg(test)]
mod tests {
    use common::reading::Kind;

    use super::{
        super::{
            minutes::{MinuteRow, batch},
            series::{Meta, Source},
            windows::MINUTES,
        },
        *,
    };

    /// A device, its minute, its minimum, and its last value.
    type Row = (&'static str, i64, Option<f64>, Option<f64>);

    fn minutes(rows: &[Row]) -> RecordBatch {
        let meta = |device: &str| Meta {
            site: "s".to_owned(),
            gateway: "g".to_owned(),
            device: device.to_owned(),
            device_type: "t".to_owned(),
            asset: None,
            unit: "Cel".to_owned(),
            kind: Kind::Gauge,
        };
        let metas: Vec<_> = rows.iter().map(|row| meta(row.0)).collect();
        let row = |(meta, (_, minute, min, last)): (u32, &Row)| MinuteRow {
            time: at(*minute),
            meta,
            count: 1,
            min: *min,
            max: None,
            mean: None,
            last: *last,
            source: Source::Readings,
        };
        let rows: Vec<_> = (0..).zip(rows).map(row).collect();
        batch(&rows, &metas).unwrap()
    }

    fn at(minute: i64) -> Timestamp {
        Timestamp::from_micros(minute * 60_000_000)
    }

    #[test]
    fn minutes_that_are_new_are_appended_unless_they_lie_between_others() {
        let parts = |stood: &[i64], computed: &[i64], span: Range<i64>| {
            let rows = |of: &[i64], value| {
                let rows: Vec<_> = of.iter().map(|minute| ("a", *minute, Some(value), None)).collect();
                minutes(&rows)
            };
            let (stood, computed) = (rows(stood, 1.0), rows(computed, 2.0));
            let difference = Difference::between(&stood, computed, MINUTES, Timestamp::default()).unwrap();
            let parts = Parts::of(&difference, &stood, "time", &[at(span.start)..at(span.end)]).unwrap();
            let minute = |at: &i64| at / 60_000_000;
            let rows =
                |is: fn(&Parts, i64) -> bool| parts.select(&difference.rows, "time", is).unwrap().num_rows();
            let (appended, replaced) = (rows(Parts::is_appended), rows(|parts, at| parts.is_replaced(at)));
            assert_eq!(appended + replaced, difference.rows.num_rows(), "each row once");
            (parts.appended.iter().map(minute).collect::<Vec<_>>(), replaced, parts.begins_an_hour)
        };
        assert_eq!(parts(&[3], &[3, 4], 3..60), (vec![4], 1, false));
        assert_eq!(parts(&[3, 5], &[3, 4, 5, 6], 0..60), (vec![6], 3, false));
        // Of an hour that has begun, and of one that begins.
        assert_eq!(parts(&[], &[4], 4..60), (vec![4], 0, false));
        assert_eq!(parts(&[59], &[59, 60, 61], 59..120), (vec![60, 61], 1, true));
        // Two hours in one range, and a minute that vanished at the end of it.
        assert_eq!(parts(&[58, 60, 61], &[58, 59, 60], 0..120), (vec![], 3, false));
    }

    #[test]
    fn rows_differ_in_a_value_or_in_whether_there_is_one() {
        let one = Some(1.0);
        let stood = minutes(&[
            ("gone", 0, one, one),
            ("same", 0, one, None),
            ("risen", 0, one, one),
            ("lost", 0, one, one),
            ("found", 0, None, one),
        ]);
        let computed = minutes(&[
            ("found", 0, Some(0.0), one),
            ("lost", 0, one, None),
            ("new", 0, one, one),
            ("same", 0, one, None),
            ("risen", 0, one, Some(1.5)),
        ]);
        let difference = Difference::between(&stood, computed, MINUTES, Timestamp::default()).unwrap();
        assert_eq!(difference.differs, [true, true, true, false, true]);
        assert_eq!((difference.vanished, difference.changed), (vec![0], 5));
        assert_eq!(difference.rows.num_rows(), 5);
    }
}
