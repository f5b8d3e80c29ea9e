//! Rows of a silver table within a span of time, straight from its data files.
//!
//! Text stays what it is in the files, dictionaries: whoever reads millions of rows of a few devices then compares
//! numbers. Files whose statistics lie outside of the span are left out; of the others only the rows within are decoded
//! further than their time.

use std::{ops::Range, sync::Arc};

use anyhow::Context;
use arrow::{
    array::{
        ArrayRef, AsArray, BooleanArray, BooleanBufferBuilder, DictionaryArray, Int32Array, RecordBatch,
        StringArray,
    },
    datatypes::{Field, Int32Type, Schema, TimestampMicrosecondType},
    error::ArrowError,
};
use bytes::Bytes;
use common::{time::Timestamp, wire::dict};
use deltalake::{DeltaTable, kernel::scalars::ScalarExt};
use futures::{FutureExt, TryFutureExt, TryStreamExt, future::BoxFuture};
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use parquet::{
    arrow::{
        ParquetRecordBatchStreamBuilder, ProjectionMask,
        arrow_reader::{
            ArrowPredicate, ArrowPredicateFn, ArrowReaderMetadata, ArrowReaderOptions, RowFilter,
        },
        async_reader::{AsyncFileReader, ParquetRecordBatchStream},
    },
    errors::ParquetError,
    file::metadata::{ParquetMetaData, ParquetMetaDataReader},
};

use super::{
    changes::limits,
    parts::Gateways,
    series::{Words, run},
};
use crate::lake::with_dictionaries;

/// Rows decoded at a time.
const BATCH: usize = 16 * 1024;
/// Bytes at the end of a file that mostly hold its footer.
const FOOTER: usize = 32 * 1024;

/// What is read of which rows.
#[derive(Clone, Debug)]
pub(super) struct Scan<'a> {
    pub(super) snapshot: &'a DeltaTable,
    pub(super) columns: &'a [&'a str],
    /// Name of the column of instants that the span is about.
    pub(super) time: &'a str,
    pub(super) span: Range<Timestamp>,
    /// Whose rows; `None` for everybody's.
    pub(super) of: Option<Gateways>,
}

/// Rows within the scan's span, by what the log says of its files: as if they lay evenly in their times. Gateways do not
/// count.
pub(super) fn rows(scan: &Scan<'_>) -> anyhow::Result<u64> {
    let span = scan.span.start.as_micros()..scan.span.end.as_micros();
    let mut rows = 0.0;
    for file in scan.snapshot.snapshot()?.log_data().iter() {
        let count = file.num_records().unwrap_or(0) as f64;
        let known = file.stats().and_then(|stats| limits(&stats, scan.time));
        let (from, to) = known.unwrap_or((span.start, span.end - 1));
        let inside = (to.min(span.end - 1) - from.max(span.start) + 1).max(0);
        rows += count * inside as f64 / (to - from + 1).max(1) as f64;
    }
    Ok(rows.ceil() as u64)
}

/// Gives every batch of the scan's columns to `take`; text comes as dictionaries.
pub(super) async fn scan(
    scan: &Scan<'_>,
    mut take: impl FnMut(&RecordBatch) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let store = scan.snapshot.log_store().object_store(None);
    let span = scan.span.start.as_micros()..scan.span.end.as_micros();
    for file in scan.snapshot.snapshot()?.log_data().iter() {
        // Statistics may be cut down to milliseconds.
        let known =
            file.stats().and_then(|stats| limits(&stats, scan.time)).map(|(from, to)| (from, to + 999));
        if known.is_some_and(|(from, to)| to < span.start || from >= span.end) {
            continue;
        }
        let inside = known.is_some_and(|(from, to)| from >= span.start && to < span.end);
        let values = file.partition_values();
        let named = values.iter().flat_map(|values| values.fields().iter().zip(values.values()));
        let partition: Vec<(String, String)> = named
            .filter(|(field, _)| scan.columns.contains(&field.name().as_str()))
            .map(|(field, value)| (field.name().clone(), value.serialize()))
            .collect();
        let path = file.object_store_path();
        let size = u64::try_from(file.size()).unwrap_or(0);
        let read =
            read(Arc::clone(&store), &path, size, scan, if inside { None } else { Some(span.clone()) });
        let mut rows = read.await.with_context(|| format!("reading {path}"))?;
        while let Some(batch) = rows.try_next().await.with_context(|| format!("reading {path}"))? {
            take(&with_partition(batch, &partition)?)?;
        }
    }
    Ok(())
}

type Rows = ParquetRecordBatchStream<DataFile>;

/// A data file, read in parts.
struct DataFile {
    store: Arc<dyn ObjectStore>,
    path: Path,
    size: u64,
}

impl AsyncFileReader for DataFile {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, parquet::errors::Result<Bytes>> {
        self.store.get_range(&self.path, range).map_err(|e| ParquetError::External(e.into())).boxed()
    }

    fn get_byte_ranges(
        &mut self,
        ranges: Vec<Range<u64>>,
    ) -> BoxFuture<'_, parquet::errors::Result<Vec<Bytes>>> {
        let read = async move { self.store.get_ranges(&self.path, &ranges).await };
        read.map_err(|e| ParquetError::External(e.into())).boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        _options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, parquet::errors::Result<Arc<ParquetMetaData>>> {
        let size = self.size;
        let reader = ParquetMetaDataReader::new().with_prefetch_hint(Some(FOOTER));
        reader.load_and_finish(self, size).map_ok(Arc::new).boxed()
    }
}

async fn read(
    store: Arc<dyn ObjectStore>,
    path: &Path,
    size: u64,
    scan: &Scan<'_>,
    span: Option<Range<i64>>,
) -> anyhow::Result<Rows> {
    let mut reader = DataFile { store, path: path.clone(), size };
    let found = ArrowReaderMetadata::load_async(&mut reader, ArrowReaderOptions::new()).await?;
    let options = ArrowReaderOptions::new().with_schema(with_dictionaries(found.schema()));
    let metadata = ArrowReaderMetadata::try_new(Arc::clone(found.metadata()), options)?;
    let parquet = metadata.parquet_schema();
    let wanted = ProjectionMask::columns(parquet, scan.columns.iter().copied());
    let time = ProjectionMask::columns(parquet, [scan.time]);
    let builder = ParquetRecordBatchStreamBuilder::new_with_metadata(reader, metadata.clone());
    let builder = builder.with_projection(wanted).with_batch_size(BATCH);
    let mut filters: Vec<Box<dyn ArrowPredicate>> = Vec::new();
    if let Some(span) = span {
        filters.push(Box::new(ArrowPredicateFn::new(time, move |batch: RecordBatch| {
            let times = batch.column(0).as_primitive::<TimestampMicrosecondType>();
            Ok(times.values().iter().map(|ts| Some(span.contains(ts))).collect::<BooleanArray>())
        })));
    }
    if let Some(gateways) = scan.of.clone() {
        let who = ProjectionMask::columns(parquet, ["site", "gateway_id"]);
        filters.push(Box::new(ArrowPredicateFn::new(who, move |batch| sent_by(&batch, &gateways))));
    }
    let builder = if filters.is_empty() { builder } else { builder.with_row_filter(RowFilter::new(filters)) };
    Ok(builder.build()?)
}

/// Which rows are of these gateways. What repeats is looked up once a run.
fn sent_by(batch: &RecordBatch, gateways: &Gateways) -> Result<BooleanArray, ArrowError> {
    let column = |name| Words::of(batch, name).map_err(|e| ArrowError::SchemaError(format!("{e:#}")));
    let columns = [column("gateway_id")?, column("site")?];
    let mut sent = BooleanBufferBuilder::new(batch.num_rows());
    while sent.len() < batch.num_rows() {
        let row = sent.len();
        let [gateway, site] = columns.each_ref().map(|of| of.value(row).unwrap_or("").to_owned());
        sent.append_n(run(&columns, row), gateways.contains(&(site, gateway)));
    }
    Ok(BooleanArray::new(sent.finish(), None))
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
