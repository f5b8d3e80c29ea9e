//! Two tables that should be equal: one pass over each for fingerprints, and only what differs row by row.
//!
//! * A fingerprint is the number of rows of a (group, UTC day) and the sums of their hashes, so neither the order of
//!   rows nor of files counts, and memory is one entry a group and day, whatever the number of readings.
//! * Hashes are over exact values. In a group whose fingerprints differ, floats may be 1e-9 apart, relatively;
//!   such rows are equal. So a rounding elsewhere costs time only.
//! * `revision` and the `updated_at` beside it say how gold came to be, not what it is: they are not compared.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use anyhow::Context;
use arrow::{
    array::{Array, ArrayRef, AsArray, BooleanArray, RecordBatch},
    compute::{concat_batches, filter_record_batch, is_null},
    datatypes::{DataType, Float64Type},
    row::{RowConverter, Rows, SortField},
    util::display::array_value_to_string,
};
use common::time::Timestamp;
use datafusion::{
    common::hash_utils::{RandomState, create_hashes},
    prelude::SessionContext,
};
use futures::TryStreamExt;
use serde::Serialize;

use crate::{
    gold::{publish::is_stamp, series::micros},
    lake::Table,
    tables::conform,
};

/// How far apart floats may be, relatively.
const TOLERANCE: f64 = 1e-9;
/// Differences of one table that are listed; all are counted.
const LISTED: usize = 50;
/// Rows of groups that differ that are in memory at once, unless one group alone has more.
const ROWS_AT_ONCE: u64 = 400_000;
const DAY_MICROS: i64 = 86_400_000_000;

/// How a table is compared.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spec {
    pub(super) table: Table,
    /// The instant whose day makes a group.
    pub(super) time: Option<&'static str>,
    group: &'static [&'static str],
    /// Names a row; need not be unique.
    key: &'static [&'static str],
}

/// How each table is compared; `None` for the maintenance schedule, which hangs on when it was computed.
pub(super) fn spec(table: Table) -> Option<Spec> {
    let of_device: &'static [&'static str] = &["site", "device_id"];
    let of_gateway: &'static [&'static str] = &["site", "gateway_id"];
    let received = Some("received_at");
    let (time, group, key): (_, _, &'static [&'static str]) = match table {
        Table::SensorReadings => (Some("ts"), of_device, &["site", "device_id", "ts"]),
        Table::Quarantine => (received, of_gateway, &["segment", "offset", "row", "rule"]),
        Table::Messages => {
            (received, of_gateway, &["site", "gateway_id", "epoch", "lane", "seq", "segment", "plan"])
        }
        Table::Aggregates => {
            (Some("window_start"), of_device, &["site", "device_id", "window_start", "epoch", "seq"])
        }
        Table::Anomalies => (received, of_gateway, &["event_id", "state", "epoch", "seq"]),
        Table::Control => (
            received,
            of_gateway,
            &["site", "gateway_id", "record", "message_epoch", "message_seq", "lane", "reason"],
        ),
        Table::Status => (received, of_gateway, &["site", "gateway_id", "at", "epoch", "lane"]),
        Table::Registry => (received, of_gateway, &["site", "gateway_id", "at"]),
        Table::Maintenance => (received, &[], &["id"]),
        Table::HourlyAggregates => (Some("hour"), of_device, &["site", "device_id", "hour"]),
        Table::Timeseries1m => (Some("time"), of_device, &["site", "device_id", "time"]),
        Table::DailyAggregates => (Some("starts_at"), of_device, &["site", "device_id", "day", "shift"]),
        Table::AnomalyEvents => (Some("started_at"), &[], &["event_id"]),
        Table::AssetHealth => (Some("hour"), &["site", "asset_id"], &["site", "asset_id", "hour"]),
        Table::Assets => (None, &[], &["site", "asset_id"]),
        Table::Devices => (None, &[], &["site", "device_id"]),
        Table::QualityResults => (received, &[], &["plan", "rule"]),
        Table::MaintenanceSchedule | Table::Rule(_) => return None,
    };
    Some(Spec { table, time, group, key })
}

/// One of the two lakes.
pub(super) struct Side<'a> {
    pub(super) session: &'a SessionContext,
    /// Which rows count.
    pub(super) keep: &'a (dyn Fn(&RecordBatch) -> anyhow::Result<BooleanArray> + Send + Sync),
}

/// What came of a table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TableReport {
    /// Path of the table.
    pub table: String,
    /// Rows compared of the lake.
    pub rows: u64,
    /// Rows compared of the rebuild.
    pub rebuilt_rows: u64,
    /// Rows that only the lake has.
    pub only_in_lake: u64,
    /// Rows that only the rebuild has.
    pub only_in_rebuild: u64,
    /// Rows that both have, with other values.
    pub changed: u64,
    /// Some of the differences.
    pub differences: Vec<Difference>,
}

impl TableReport {
    /// Whether there is no difference.
    pub fn identical(&self) -> bool {
        self.only_in_lake + self.only_in_rebuild + self.changed == 0
    }
}

/// A row that is not the same in both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The columns that name it, as `site=plant, …`.
    pub key: String,
    /// `only in the lake`, `only in the rebuild`, or what differs, as `value: 1.5 (rebuilt: 2.5)`.
    pub what: String,
}

/// By group and day since 1970.
type Groups = HashMap<(u64, i64), Print>;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Print {
    rows: u64,
    sums: [u64; 2],
}

/// Compares a table of two lakes.
pub(super) async fn compare(spec: &Spec, lake: &Side<'_>, rebuilt: &Side<'_>) -> anyhow::Result<TableReport> {
    let (a, b) = (prints(spec, lake).await?, prints(spec, rebuilt).await?);
    let rows = |groups: &Groups| groups.values().map(|print| print.rows).sum();
    let mut report = TableReport {
        table: spec.table.path(),
        rows: rows(&a),
        rebuilt_rows: rows(&b),
        ..TableReport::default()
    };
    let of = |groups: &Groups, at: &(u64, i64)| groups.get(at).copied().unwrap_or_default();
    let mut differ: Vec<(i64, u64, u64)> = a
        .keys()
        .chain(b.keys())
        .filter(|at| of(&a, at) != of(&b, at))
        .map(|at| (at.1, at.0, of(&a, at).rows + of(&b, at).rows))
        .collect();
    differ.sort_unstable();
    differ.dedup();
    let mut left = differ.as_slice();
    while !left.is_empty() {
        let mut held = 0;
        let fits = left.iter().take_while(|(.., rows)| {
            held += rows;
            held <= ROWS_AT_ONCE
        });
        let (chunk, rest) = left.split_at(fits.count().max(1));
        left = rest;
        let groups: HashSet<(u64, i64)> = chunk.iter().map(|(day, group, _)| (*group, *day)).collect();
        let days = (chunk[0].0, chunk[chunk.len() - 1].0);
        let (a, b) = (gather(spec, lake, &groups, days).await?, gather(spec, rebuilt, &groups, days).await?);
        row_by_row(spec, &a, &b, &mut report)?;
    }
    Ok(report)
}

/// Columns that are compared.
fn compared(table: Table) -> Vec<usize> {
    let schema = table.schema();
    (0..schema.fields().len()).filter(|at| !is_stamp(&schema, schema.field(*at).name())).collect()
}

/// The rows that count, in the table's types.
async fn scan(
    spec: &Spec,
    side: &Side<'_>,
    days: Option<(i64, i64)>,
) -> anyhow::Result<datafusion::execution::SendableRecordBatchStream> {
    let schema = spec.table.schema();
    let names: Vec<String> = schema.fields().iter().map(|field| format!("\"{}\"", field.name())).collect();
    let within = match (spec.time, days) {
        (Some(time), Some((first, last))) => {
            let at = |day: i64| Timestamp::from_micros(day * DAY_MICROS);
            format!(" where {time} >= '{}' and {time} < '{}'", at(first), at(last + 1))
        }
        _ => String::new(),
    };
    let table = format!("{}.{}", spec.table.layer(), spec.table.name());
    let sql = format!("select {} from {table}{within}", names.join(", "));
    Ok(side.session.sql(&sql).await?.execute_stream().await?)
}

fn kept(spec: &Spec, side: &Side<'_>, batch: &RecordBatch) -> anyhow::Result<RecordBatch> {
    let batch = conform(batch, spec.table)?;
    Ok(filter_record_batch(&batch, &(side.keep)(&batch)?)?)
}

async fn prints(spec: &Spec, side: &Side<'_>) -> anyhow::Result<Groups> {
    let mut groups = Groups::new();
    let compared = compared(spec.table);
    let mut rows = scan(spec, side, None).await?;
    while let Some(batch) = rows.try_next().await? {
        let batch = kept(spec, side, &batch)?;
        let at = places(spec, &batch)?;
        for (at, hash) in at.into_iter().zip(hashes(&batch, &compared)?) {
            let print = groups.entry(at).or_default();
            print.rows += 1;
            print.sums[0] = print.sums[0].wrapping_add(hash);
            print.sums[1] = print.sums[1].wrapping_add(mixed(hash));
        }
    }
    Ok(groups)
}

/// The group and day of each row.
fn places(spec: &Spec, batch: &RecordBatch) -> anyhow::Result<Vec<(u64, i64)>> {
    let schema = batch.schema();
    let columns: Vec<usize> =
        spec.group.iter().map(|name| schema.index_of(name)).collect::<Result<_, _>>()?;
    let groups = hashes(batch, &columns)?;
    let days: Vec<i64> = match spec.time {
        Some(time) => micros(batch, time)?.values().iter().map(|ts| ts.div_euclid(DAY_MICROS)).collect(),
        None => vec![0; batch.num_rows()],
    };
    Ok(groups.into_iter().zip(days).collect())
}

/// A hash of each row. A null leaves a hash as it is, so where nulls may be, it is hashed whether there is one.
fn hashes(batch: &RecordBatch, columns: &[usize]) -> anyhow::Result<Vec<u64>> {
    let mut all: Vec<ArrayRef> = columns.iter().map(|at| ArrayRef::clone(batch.column(*at))).collect();
    let schema = batch.schema();
    for at in columns.iter().filter(|at| schema.field(**at).is_nullable()) {
        all.push(Arc::new(is_null(batch.column(*at))?));
    }
    let mut hashes = vec![0; batch.num_rows()];
    if !all.is_empty() {
        create_hashes(&all, &RandomState::with_seed(0), &mut hashes)?;
    }
    Ok(hashes)
}

/// Another function of a hash, so that two sums are as good as one of twice the width.
fn mixed(hash: u64) -> u64 {
    let hash = (hash ^ (hash >> 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (hash ^ (hash >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9)
}

/// The rows of some groups.
async fn gather(
    spec: &Spec,
    side: &Side<'_>,
    groups: &HashSet<(u64, i64)>,
    days: (i64, i64),
) -> anyhow::Result<RecordBatch> {
    let mut gathered = Vec::new();
    let mut rows = scan(spec, side, Some(days)).await?;
    while let Some(batch) = rows.try_next().await? {
        let batch = kept(spec, side, &batch)?;
        let wanted: BooleanArray =
            places(spec, &batch)?.into_iter().map(|at| Some(groups.contains(&at))).collect();
        gathered.push(filter_record_batch(&batch, &wanted)?);
    }
    Ok(concat_batches(&spec.table.schema(), &gathered)?)
}

/// Two sets of rows in forms that compare.
struct Comparable<'a> {
    batch: &'a RecordBatch,
    keys: Rows,
    /// All that is compared and no float.
    exact: Rows,
    floats: Vec<usize>,
}

impl<'a> Comparable<'a> {
    fn both(spec: &Spec, a: &'a RecordBatch, b: &'a RecordBatch) -> anyhow::Result<[Comparable<'a>; 2]> {
        let schema = spec.table.schema();
        let compared = compared(spec.table);
        let is_float = |at: &usize| schema.field(*at).data_type() == &DataType::Float64;
        let (floats, exact): (Vec<usize>, Vec<usize>) = compared.into_iter().partition(is_float);
        let key: Vec<usize> = spec.key.iter().map(|name| schema.index_of(name)).collect::<Result<_, _>>()?;
        let converter = |columns: &[usize]| {
            let fields = columns.iter().map(|at| SortField::new(schema.field(*at).data_type().clone()));
            RowConverter::new(fields.collect())
        };
        let (keys, rest) = (converter(&key)?, converter(&exact)?);
        let of = |batch: &'a RecordBatch| {
            let columns =
                |of: &[usize]| of.iter().map(|at| ArrayRef::clone(batch.column(*at))).collect::<Vec<_>>();
            anyhow::Ok(Comparable {
                batch,
                keys: keys.convert_columns(&columns(&key))?,
                exact: rest.convert_columns(&columns(&exact))?,
                floats: floats.clone(),
            })
        };
        Ok([of(a)?, of(b)?])
    }

    fn equals(&self, row: usize, other: &Comparable<'_>, other_row: usize) -> bool {
        self.exact.row(row) == other.exact.row(other_row)
            && self.floats.iter().all(|at| {
                let (a, b) = (self.batch.column(*at), other.batch.column(*at));
                same_float(float(a, row), float(b, other_row))
            })
    }
}

fn float(column: &ArrayRef, row: usize) -> Option<f64> {
    column.is_valid(row).then(|| column.as_primitive::<Float64Type>().value(row))
}

fn same_float(a: Option<f64>, b: Option<f64>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => a.to_bits() == b.to_bits() || (a - b).abs() <= TOLERANCE * a.abs().max(b.abs()),
        (a, b) => a.is_none() && b.is_none(),
    }
}

fn row_by_row(spec: &Spec, a: &RecordBatch, b: &RecordBatch, report: &mut TableReport) -> anyhow::Result<()> {
    let [lake, rebuilt] = Comparable::both(spec, a, b)?;
    let mut by_key: BTreeMap<&[u8], (Vec<usize>, Vec<usize>)> = BTreeMap::new();
    for row in 0..a.num_rows() {
        by_key.entry(lake.keys.row(row).data()).or_default().0.push(row);
    }
    for row in 0..b.num_rows() {
        by_key.entry(rebuilt.keys.row(row).data()).or_default().1.push(row);
    }
    for (mut left, mut right) in by_key.into_values() {
        left.retain(|row| match right.iter().position(|other| lake.equals(*row, &rebuilt, *other)) {
            Some(found) => {
                right.swap_remove(found);
                false
            }
            None => true,
        });
        let pairs = left.len().min(right.len());
        for (row, other) in left.iter().zip(&right) {
            report.changed += 1;
            list(spec, report, a, *row, || what_differs(spec, a, *row, b, *other))?;
        }
        for row in &left[pairs..] {
            report.only_in_lake += 1;
            list(spec, report, a, *row, || Ok("only in the lake".to_owned()))?;
        }
        for row in &right[pairs..] {
            report.only_in_rebuild += 1;
            list(spec, report, b, *row, || Ok("only in the rebuild".to_owned()))?;
        }
    }
    Ok(())
}

fn list(
    spec: &Spec,
    report: &mut TableReport,
    batch: &RecordBatch,
    row: usize,
    what: impl Fn() -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    if report.differences.len() < LISTED {
        let mut key = Vec::new();
        for name in spec.key {
            let column = batch.column_by_name(name).with_context(|| format!("column {name}"))?;
            key.push(format!("{name}={}", array_value_to_string(column, row)?));
        }
        report.differences.push(Difference { key: key.join(", "), what: what()? });
    }
    Ok(())
}

fn what_differs(
    spec: &Spec,
    a: &RecordBatch,
    row: usize,
    b: &RecordBatch,
    other: usize,
) -> anyhow::Result<String> {
    let schema = spec.table.schema();
    let mut differing = Vec::new();
    for at in compared(spec.table) {
        let (left, right) = (a.column(at), b.column(at));
        let same = match schema.field(at).data_type() {
            DataType::Float64 => same_float(float(left, row), float(right, other)),
            _ => left.slice(row, 1) == right.slice(other, 1),
        };
        if !same {
            let text = |column: &ArrayRef, row: usize| match column.is_null(row) {
                true => Ok("null".to_owned()),
                false => array_value_to_string(column, row),
            };
            let (left, right) = (text(left, row)?, text(right, other)?);
            differing.push(format!("{}: {left} (rebuilt: {right})", schema.field(at).name()));
        }
    }
    Ok(differing.join(", "))
}
