//! Rows of a silver table within a span of time, straight from its data files.
//!
//! Text stays what it is in the files, dictionaries: whoever reads millions of rows of a few devices then compares
//! numbers. Files whose statistics lie outside of the span are left out. Of the others, what is read of a row that is not
//! wanted is at most its time, and of a page without one that is wanted nothing.

use std::{ops::Range, sync::Arc};

use anyhow::Context;
use arrow::{
    array::{ArrayRef, AsArray, BooleanArray, DictionaryArray, Int32Array, RecordBatch, StringArray},
    datatypes::{Field, Int32Type, Schema, TimestampMicrosecondType},
};
use common::{time::Timestamp, wire::dict};
use deltalake::{DeltaTable, kernel::scalars::ScalarExt};
use futures::TryStreamExt;
use object_store::path::Path;
use parquet::arrow::{
    ParquetRecordBatchStreamBuilder, ProjectionMask,
    arrow_reader::{ArrowPredicateFn, ArrowReaderMetadata, ArrowReaderOptions, RowFilter, RowSelection},
    async_reader::ParquetRecordBatchStream,
};

use super::{changes::limits, parts::Chosen};
use crate::{lake::with_dictionaries, store::Ranged, tables::TAIL};

/// Rows decoded at a time.
const BATCH: usize = 16 * 1024;

/// What is read of which rows.
#[derive(Clone, Debug)]
pub(super) struct Scan<'a> {
    pub(super) snapshot: &'a DeltaTable,
    pub(super) columns: &'a [&'a str],
    /// Name of the column of instants that the span is about.
    pub(super) time: &'a str,
    pub(super) span: Range<Timestamp>,
    /// Which rows; `None` for all.
    pub(super) of: Option<Chosen>,
}

/// A data file that may have rows within a scan's span.
pub(super) struct File {
    pub(super) path: Path,
    size: u64,
    /// How many rows lie within the span, and in parts of all: as if they lay evenly in their times.
    rows: f64,
    pub(super) share: f64,
    /// No row lies outside of the span.
    inside: bool,
    /// The partition's columns that are asked for, which are not in the file.
    partition: Vec<(String, String)>,
}

impl Scan<'_> {
    /// Those with rows that are chosen, by what the log says of them.
    fn files(&self) -> anyhow::Result<Vec<File>> {
        let span = self.span.start.as_micros()..self.span.end.as_micros();
        let mut files = Vec::new();
        for file in self.snapshot.snapshot()?.log_data().iter() {
            let path = file.object_store_path();
            if self.of.as_ref().is_some_and(|chosen| !chosen.contains_key(&path)) {
                continue;
            }
            // Statistics may be cut down to milliseconds.
            let known = file.stats().and_then(|stats| limits(&stats, self.time));
            let (from, to) = known.map_or((span.start, span.end - 1), |(from, to)| (from, to + 999));
            if to < span.start || from >= span.end {
                continue;
            }
            let within = to.min(span.end - 1) - from.max(span.start) + 1;
            let share = within as f64 / (to - from + 1) as f64;
            let values = file.partition_values();
            let named = values.iter().flat_map(|values| values.fields().iter().zip(values.values()));
            files.push(File {
                path,
                size: u64::try_from(file.size()).unwrap_or(0),
                rows: share * file.num_records().unwrap_or(0) as f64,
                share,
                inside: known.is_some() && from >= span.start && to < span.end,
                partition: named
                    .filter(|(field, _)| self.columns.contains(&field.name().as_str()))
                    .map(|(field, value)| (field.name().clone(), value.serialize()))
                    .collect(),
            });
        }
        Ok(files)
    }

    /// Of the chosen rows those within `span`; `None` for all.
    async fn read(
        &self,
        file: &File,
        chosen: Option<RowSelection>,
        span: Option<Range<i64>>,
        mut take: impl FnMut(&RecordBatch) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let reading = || format!("reading {}", file.path);
        let mut rows = self.open(file, chosen, span).await.with_context(reading)?;
        while let Some(batch) = rows.try_next().await.with_context(reading)? {
            take(&with_partition(batch, &file.partition)?)?;
        }
        Ok(())
    }

    async fn open(
        &self,
        file: &File,
        chosen: Option<RowSelection>,
        span: Option<Range<i64>>,
    ) -> anyhow::Result<ParquetRecordBatchStream<Ranged>> {
        let objects = self.snapshot.log_store().object_store(None);
        let mut reader = Ranged { objects, path: file.path.clone(), size: file.size, tail: TAIL };
        let found = ArrowReaderMetadata::load_async(&mut reader, ArrowReaderOptions::new()).await?;
        let options = ArrowReaderOptions::new().with_schema(with_dictionaries(found.schema()));
        let metadata = ArrowReaderMetadata::try_new(Arc::clone(found.metadata()), options)?;
        let parquet = metadata.parquet_schema();
        let wanted = ProjectionMask::columns(parquet, self.columns.iter().copied());
        let time = ProjectionMask::columns(parquet, [self.time]);
        let builder = ParquetRecordBatchStreamBuilder::new_with_metadata(reader, metadata.clone());
        let mut builder = builder.with_projection(wanted).with_batch_size(BATCH);
        if let Some(chosen) = chosen {
            builder = builder.with_row_selection(chosen);
        }
        if let Some(span) = span {
            let within = ArrowPredicateFn::new(time, move |batch: RecordBatch| {
                let times = batch.column(0).as_primitive::<TimestampMicrosecondType>();
                Ok(times.values().iter().map(|ts| Some(span.contains(ts))).collect::<BooleanArray>())
            });
            builder = builder.with_row_filter(RowFilter::new(vec![Box::new(within)]));
        }
        Ok(builder.build()?)
    }
}

/// Rows within the scan's span, by what the log says of its files.
pub(super) fn rows(scan: &Scan<'_>) -> anyhow::Result<u64> {
    Ok(scan.files()?.iter().map(|file| file.rows).sum::<f64>().ceil() as u64)
}

/// Gives every batch of the scan's columns to `take`; text comes as dictionaries.
pub(super) async fn scan(
    scan: &Scan<'_>,
    mut take: impl FnMut(&RecordBatch) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let span = scan.span.start.as_micros()..scan.span.end.as_micros();
    for file in scan.files()? {
        let chosen = scan.of.as_ref().and_then(|chosen| chosen.get(&file.path).cloned());
        let span = (!file.inside).then(|| span.clone());
        scan.read(&file, chosen, span, &mut take).await?;
    }
    Ok(())
}

/// The same of all rows of its files, in their order, whether they lie within the span or not.
pub(super) async fn whole(
    scan: &Scan<'_>,
    mut take: impl FnMut(&File, &RecordBatch) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for file in scan.files()? {
        scan.read(&file, None, None, |batch| take(&file, batch)).await?;
    }
    Ok(())
}

/// Adds the partition's columns, which are not in the file, as text.
fn with_partition(batch: RecordBatch, partition: &[(String, String)]) -> anyhow::Result<RecordBatch> {
    if partition.is_empty() {
        return Ok(batch);
    }
    let rows = batch.num_rows();
    let (mut fields, mut columns): (Vec<_>, Vec<ArrayRef>) =
        (batch.schema().fields().to_vec(), batch.columns().to_vec());
    for (name, value) in partition {
        let words = Arc::new(StringArray::from(vec![value.as_str()]));
        fields.push(Arc::new(Field::new(name, dict(), false)));
        columns
            .push(Arc::new(DictionaryArray::<Int32Type>::try_new(Int32Array::from(vec![0; rows]), words)?));
    }
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
}
