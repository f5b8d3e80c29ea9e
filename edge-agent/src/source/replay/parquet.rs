//! Parquet: the instant is a column of any timestamp type (UTC where it has no zone), values and qualities are of any
//! numeric type.
//!
//! Read batch by batch: in memory are [`CELLS`] cells, and what the file's pages of one row group hold (by default a
//! megabyte a column, before compression).

use std::{fs::File, path::Path, sync::Arc};

use anyhow::{Context as _, ensure};
use arrow::{
    array::{
        Array as _, ArrayRef, AsArray as _, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
    },
    compute::cast,
    datatypes::{DataType, Float64Type, Schema, TimeUnit, TimestampMicrosecondType},
};
use common::{
    reading::{DeviceIx, Quality, Registry},
    time::Timestamp,
};
use parquet::arrow::{
    ProjectionMask,
    arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
};

use super::{Cell, long, reading};
use crate::{census::Reason, settings::ReplayForm};

/// Cells that are decoded at a time.
const CELLS: usize = 64 * 1024;

/// An open file, at a row.
pub(super) struct Parquet {
    path: Arc<Path>,
    batches: ParquetRecordBatchReader,
    /// By name, in the order in which a batch is taken apart.
    wanted: Wanted,
    batch: Batch,
    /// Of the batch.
    row: usize,
}

enum Wanted {
    Long { devices: Vec<String>, has_quality: bool },
    Wide { time: String, columns: Vec<(String, DeviceIx)> },
}

/// The columns that are wanted of a batch.
struct Batch {
    rows: usize,
    ts: TimestampMicrosecondArray,
    readings: Readings,
}

enum Readings {
    Long {
        /// Which of the registry's devices each row names.
        devices: Vec<Option<DeviceIx>>,
        values: Float64Array,
        qualities: Option<Float64Array>,
    },
    Wide(Vec<(DeviceIx, Float64Array)>),
}

impl Parquet {
    pub(super) fn open(path: &Path, form: &ReplayForm, registry: &Registry) -> anyhow::Result<Self> {
        let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?;
        let schema = builder.schema();
        let wanted = match form {
            ReplayForm::Long => Wanted::Long {
                devices: registry.devices.iter().map(|device| device.id.clone()).collect(),
                has_quality: schema.column_with_name("quality").is_some(),
            },
            ReplayForm::Wide { time, columns, .. } => {
                Wanted::Wide { time: time.clone(), columns: columns.clone() }
            }
        };
        let names = wanted.names();
        for (name, role) in &names {
            role.check(schema, name)?;
        }
        let places = names.iter().filter_map(|(name, _)| schema.index_of(name).ok());
        let mask = ProjectionMask::roots(builder.parquet_schema(), places);
        let rows = (CELLS / names.len()).max(1);
        let batches = builder.with_projection(mask).with_batch_size(rows).build()?;
        let none = Batch { rows: 0, ts: Vec::<i64>::new().into(), readings: Readings::Wide(Vec::new()) };
        Ok(Self { path: path.into(), batches, wanted, batch: none, row: 0 })
    }

    /// Adds the cells of the next row; false at the end of the file.
    pub(super) fn next(&mut self, cells: &mut Vec<Cell>) -> anyhow::Result<bool> {
        self.row += 1;
        while self.row >= self.batch.rows {
            let Some(batch) = self.batches.next() else { return Ok(false) };
            let taken = batch.map_err(anyhow::Error::from).and_then(|batch| self.wanted.take(&batch));
            self.batch = taken.with_context(|| format!("reading {}", self.path.display()))?;
            self.row = 0;
        }
        let (row, ts) = (self.row, self.ts());
        match &self.batch.readings {
            Readings::Long { devices, values, qualities } => cells.push(match ts {
                None => Err((None, Reason::Malformed)),
                Some(ts) => {
                    let quality = qualities.as_ref().and_then(|codes| at(codes, row));
                    long(ts, devices[row], quality.map_or(Ok(Quality::Good), quality_of), Ok(at(values, row)))
                }
            }),
            Readings::Wide(columns) => cells.extend(columns.iter().map(|(device, values)| {
                let ts = ts.ok_or((None, Reason::Malformed))?;
                reading(ts, *device, Quality::Good, Ok(at(values, row)))
            })),
        }
        Ok(true)
    }

    /// The instant of the row.
    pub(super) fn time(&self) -> String {
        self.ts().map(|ts| ts.to_string()).unwrap_or_default()
    }

    fn ts(&self) -> Option<Timestamp> {
        let ts = &self.batch.ts;
        ts.is_valid(self.row).then(|| Timestamp::from_micros(ts.value(self.row)))
    }
}

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Instant,
    Name,
    Number,
}

impl Role {
    fn check(self, schema: &Schema, name: &str) -> anyhow::Result<()> {
        let names =
            || schema.fields().iter().map(|field| field.name().as_str()).collect::<Vec<_>>().join(", ");
        let field = schema.field_with_name(name).ok();
        let found = field.with_context(|| format!("no column {name:?} among its columns {}", names()))?;
        let data_type = match found.data_type() {
            DataType::Dictionary(_, of) => of.as_ref(),
            plain => plain,
        };
        let (fits, wanted) = match self {
            Self::Instant => (matches!(data_type, DataType::Timestamp(..)), "a timestamp"),
            Self::Name => {
                (matches!(data_type, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View), "text")
            }
            Self::Number => (data_type.is_numeric() || *data_type == DataType::Boolean, "a number"),
        };
        ensure!(fits, "its column {name:?} is {data_type}; write {wanted}");
        Ok(())
    }

    const fn stored_as(self) -> fn() -> DataType {
        match self {
            // What has a time zone counts from the epoch in UTC all the same, and what has none is UTC, as in CSV.
            Self::Instant => || DataType::Timestamp(TimeUnit::Microsecond, None),
            Self::Name => || DataType::Utf8,
            Self::Number => || DataType::Float64,
        }
    }
}

impl Wanted {
    fn names(&self) -> Vec<(&str, Role)> {
        match self {
            Self::Long { has_quality, .. } => {
                let quality = has_quality.then_some(("quality", Role::Number));
                let always = [("ts", Role::Instant), ("device_id", Role::Name), ("value", Role::Number)];
                always.into_iter().chain(quality).collect()
            }
            Self::Wide { time, columns } => {
                let columns = columns.iter().map(|(name, _)| (name.as_str(), Role::Number));
                std::iter::once((time.as_str(), Role::Instant)).chain(columns).collect()
            }
        }
    }

    /// Takes a batch apart.
    fn take(&self, batch: &RecordBatch) -> anyhow::Result<Batch> {
        let column = |name: &str, role: Role| -> anyhow::Result<ArrayRef> {
            let column = batch.column_by_name(name).with_context(|| format!("a batch without {name:?}"))?;
            Ok(cast(column, &role.stored_as()())?)
        };
        let instants = |name: &str| {
            column(name, Role::Instant).map(|ts| ts.as_primitive::<TimestampMicrosecondType>().clone())
        };
        let numbers = |name: &str| {
            column(name, Role::Number).map(|values| values.as_primitive::<Float64Type>().clone())
        };
        let (ts, readings) = match self {
            Self::Long { devices, has_quality } => {
                let ids = column("device_id", Role::Name)?;
                let readings = Readings::Long {
                    devices: find(devices, ids.as_string()),
                    values: numbers("value")?,
                    qualities: has_quality.then(|| numbers("quality")).transpose()?,
                };
                (instants("ts")?, readings)
            }
            Self::Wide { time, columns } => {
                let columns = columns.iter().map(|(name, device)| Ok((*device, numbers(name)?)));
                (instants(time)?, Readings::Wide(columns.collect::<anyhow::Result<_>>()?))
            }
        };
        Ok(Batch { rows: batch.num_rows(), ts, readings })
    }
}

/// The devices that these are the ids of.
fn find(devices: &[String], ids: &StringArray) -> Vec<Option<DeviceIx>> {
    let by_id: std::collections::HashMap<&str, DeviceIx> =
        devices.iter().map(String::as_str).zip((0..).map(DeviceIx)).collect();
    ids.iter().map(|id| by_id.get(id?).copied()).collect()
}

fn at(values: &Float64Array, row: usize) -> Option<f64> {
    values.is_valid(row).then(|| values.value(row))
}

/// The quality with this code.
fn quality_of(code: f64) -> Result<Quality, Reason> {
    let known = [Quality::Good, Quality::Uncertain, Quality::Bad];
    known.into_iter().find(|quality| f64::from(quality.code()) == code).ok_or(Reason::Malformed)
}
