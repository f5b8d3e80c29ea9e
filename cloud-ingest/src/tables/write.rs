//! Data files of a table: rows by partition, each partition one Parquet file, and what the log says of it.
//!
//! * zstd level 1; DELTA_BINARY_PACKED for instants and sequence numbers, dictionaries for the rest, where they pay.
//! * A column of text may come as a dictionary array, and any column as runs of one: the file does not say so, and nobody
//!   widens it. Long runs are written as they are ([`runs`]).
//! * The log has the minimum and maximum of the columns that queries filter by; instants to the microsecond, so that a
//!   reader that takes them for exact is right, too.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::Context;
use arrow::{
    array::{Array, ArrayRef, AsArray, BooleanArray, RecordBatch},
    compute::{cast, filter_record_batch},
    datatypes::{DataType, Field, Float64Type, Int32Type, Int64Type, Schema, SchemaRef},
    row::{RowConverter, SortField},
};
use common::time::{Clock, SystemClock, Timestamp};
use deltalake::kernel::Add;
use object_store::{ObjectStoreExt, path::Path};
use parquet::{
    arrow::arrow_writer::{ArrowWriter, ArrowWriterOptions, compute_leaves},
    basic::{Compression, Encoding, ZstdLevel},
    file::{
        metadata::ParquetMetaData,
        properties::{EnabledStatistics, WriterProperties},
        statistics::Statistics,
    },
    schema::types::ColumnPath,
};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::runs;
use crate::{lake::Table, store::Store};

/// So many numbers of a column are looked at, to see whether they repeat.
const SAMPLE: usize = 4096;
/// Numbers that parquet's writer lets a dictionary hold: 1 MiB of them.
const DICTIONARY: usize = 128 * 1024;
/// Most rows of a row group, unless a batch has more.
const ROW_GROUP: usize = 1024 * 1024;

/// Values of the partition columns, in their order.
type Partition = Vec<String>;

/// Writes `rows` as new data files of `table`, which are no part of it until the log says so.
///
/// # Errors
/// When the store cannot be written to, or a row does not fit the table.
pub(super) async fn files(store: &Store, table: Table, rows: Vec<RecordBatch>) -> anyhow::Result<Vec<Add>> {
    let mut added = Vec::new();
    for (partition, batches) in by_partition(table, rows)? {
        let (bytes, stats) = tokio::task::spawn_blocking(move || encode(table, &batches)).await??;
        let columns = || table.partitions().iter().zip(&partition);
        let folder: String = columns().map(|(name, value)| format!("{name}={value}/")).collect();
        let path = format!("{folder}part-{}.zstd.parquet", Uuid::now_v7());
        let size = i64::try_from(bytes.len())?;
        let place = Path::from(format!("{}/{path}", table.path()));
        store.objects().put(&place, bytes.into()).await.with_context(|| format!("writing {place}"))?;
        added.push(Add {
            path,
            size,
            partition_values: columns().map(|(k, v)| ((*k).to_owned(), Some(v.clone()))).collect(),
            modification_time: SystemClock.now().as_micros() / 1000,
            data_change: true,
            stats: Some(stats.to_string()),
            // Nothing of what Delta calls features.
            tags: None,
            deletion_vector: None,
            base_row_id: None,
            default_row_commit_version: None,
            clustering_provider: None,
        });
    }
    Ok(added)
}

/// How the data files of a table are written.
pub fn writer_properties(table: Table) -> WriterProperties {
    let level = ZstdLevel::try_new(1).expect("1 is a level of zstd");
    let mut builder = WriterProperties::builder().set_compression(Compression::ZSTD(level));
    for field in table.schema().fields() {
        let column = ColumnPath::from(field.name().as_str());
        if matches!(field.data_type(), DataType::Timestamp(..)) || field.name() == "seq" {
            builder = builder
                .set_column_dictionary_enabled(column.clone(), false)
                .set_column_encoding(column.clone(), Encoding::DELTA_BINARY_PACKED);
        }
        // Finding the least and greatest text costs as much as writing it.
        if is_unfiltered(table, field.name()) {
            builder = builder.set_column_statistics_enabled(column, EnabledStatistics::None);
        }
    }
    builder.build()
}

/// Columns of `sensor_readings` by whose limits no file is left out: a plan has something of every gateway.
const UNFILTERED: [&str; 8] =
    ["asset_id", "site", "gateway_id", "unit", "kind", "quality", "epoch", "segment"];

fn is_unfiltered(table: Table, column: &str) -> bool {
    table == Table::SensorReadings && UNFILTERED.contains(&column)
}

/// The rows of each partition, without its columns.
fn by_partition(
    table: Table,
    rows: Vec<RecordBatch>,
) -> anyhow::Result<BTreeMap<Partition, Vec<RecordBatch>>> {
    let mut partitions = BTreeMap::<Partition, Vec<RecordBatch>>::new();
    for batch in rows.into_iter().filter(|batch| batch.num_rows() > 0) {
        for part in split(table, batch)? {
            let value = |name: &&str| {
                let column = cast(
                    &part.column_by_name(name).context("a partition column")?.slice(0, 1),
                    &DataType::Utf8,
                )?;
                let text = column.as_string::<i32>().value(0).to_owned();
                // So that it can stand in a path and a URL as it is.
                let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
                anyhow::ensure!(
                    !text.is_empty() && text.bytes().all(plain),
                    "{name} = {text:?} cannot name a partition"
                );
                Ok(text)
            };
            let partition = table.partitions().iter().map(value).collect::<anyhow::Result<Partition>>()?;
            partitions.entry(partition).or_default().push(without_partitions(table, &part)?);
        }
    }
    Ok(partitions)
}

/// Cuts a batch into parts of one partition each, in the order in which they begin. Mostly it is one already.
fn split(table: Table, batch: RecordBatch) -> anyhow::Result<Vec<RecordBatch>> {
    let columns: Vec<ArrayRef> =
        table.partitions().iter().filter_map(|name| batch.column_by_name(name).cloned()).collect();
    let one = columns.iter().all(is_constant);
    if one {
        return Ok(vec![batch]);
    }
    let fields = columns.iter().map(|column| SortField::new(column.data_type().clone())).collect();
    let keys = RowConverter::new(fields)?.convert_columns(&columns)?;
    let mut known = Vec::new();
    for key in &keys {
        if !known.contains(&key) {
            known.push(key);
        }
    }
    let part = |wanted: &arrow::row::Row<'_>| {
        let mask: BooleanArray = keys.iter().map(|key| Some(key == *wanted)).collect();
        Ok(filter_record_batch(&batch, &mask)?)
    };
    known.iter().map(part).collect()
}

/// Whether all values are one.
fn is_constant(column: &ArrayRef) -> bool {
    let n = column.len();
    match column.data_type() {
        DataType::Int64 => {
            let values = column.as_primitive::<Int64Type>().values();
            values.iter().all(|value| *value == values[0])
        }
        DataType::Dictionary(..) => {
            let keys = column.as_dictionary::<Int32Type>().keys().values();
            keys.iter().all(|key| *key == keys[0])
        }
        _ => n == 1 || runs::of_runs(column).is_some_and(|(_, words)| words.len() == 1),
    }
}

/// In the order of the table's columns, whatever is a dictionary staying one.
fn without_partitions(table: Table, batch: &RecordBatch) -> anyhow::Result<RecordBatch> {
    let schema = table.schema();
    let kept = schema.fields().iter().filter(|field| !table.partitions().contains(&field.name().as_str()));
    let (mut fields, mut columns) = (Vec::new(), Vec::new());
    for field in kept {
        let column =
            batch.column_by_name(field.name()).with_context(|| format!("column {}", field.name()))?;
        let same = said(column.data_type()) == field.data_type();
        anyhow::ensure!(same, "column {} of {} is {}", field.name(), table.path(), column.data_type());
        fields.push(Field::new(field.name(), column.data_type().clone(), field.is_nullable()));
        columns.push(Arc::clone(column));
    }
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
}

/// What a column says, however it is laid out.
fn said(layout: &DataType) -> &DataType {
    match layout {
        DataType::RunEndEncoded(_, values) => said(values.data_type()),
        DataType::Dictionary(_, words) => words,
        plain => plain,
    }
}

/// Whether a dictionary of these numbers pays. Of `k` out of so many different ones as it can hold, about k² / 2n are
/// there twice; are it fewer, then there are more, and the writer would begin with a dictionary only to give it up.
fn repeats(parts: &[&ArrayRef]) -> bool {
    let rows: usize = parts.iter().map(|part| part.len()).sum();
    let step = rows.div_ceil(SAMPLE).max(1);
    // One of each `step` rows, and not always the same, which might follow the numbers' own period.
    let any = |n: usize| (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) % step;
    let mut places = (0..SAMPLE).map(|n| n * step + any(n)).peekable();
    let (mut sample, mut before) = (Vec::with_capacity(SAMPLE), 0);
    for part in parts {
        let values = part.as_primitive::<Float64Type>().values();
        while let Some(place) = places.next_if(|place| *place < before + values.len()) {
            sample.push(values[place - before].to_bits());
        }
        before += values.len();
    }
    let looked_at = sample.len();
    sample.sort_unstable();
    sample.dedup();
    (looked_at - sample.len()) * 2 * DICTIONARY >= looked_at * looked_at
}

/// How a file with these rows is written.
pub(super) fn properties_of(table: Table, schema: &Schema, batches: &[RecordBatch]) -> WriterProperties {
    let mut builder = writer_properties(table).into_builder();
    for (ix, field) in schema.fields().iter().enumerate() {
        let parts: Vec<&ArrayRef> = batches.iter().map(|batch| batch.column(ix)).collect();
        if *field.data_type() == DataType::Float64 && !repeats(&parts) {
            builder = builder.set_column_dictionary_enabled(ColumnPath::from(field.name().as_str()), false);
        }
    }
    builder.build()
}

/// The bytes of a data file, and its statistics for the log.
fn encode(table: Table, batches: &[RecordBatch]) -> anyhow::Result<(Vec<u8>, Value)> {
    // What the library is given.
    let fields = batches.first().context("a file has rows")?.schema_ref().fields().iter();
    let fields =
        fields.map(|field| field.as_ref().clone().with_data_type(runs::by_rows(field.data_type()).clone()));
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    // Without arrow's own schema every reader takes text for text.
    let options = ArrowWriterOptions::new()
        .with_properties(properties_of(table, &schema, batches))
        .with_skip_arrow_metadata(true);
    let mut bytes = Vec::new();
    let writer = ArrowWriter::try_new_with_options(&mut bytes, Arc::clone(&schema), options)?;
    let (mut writer, columns) = writer.into_serialized_writer()?;
    let leaves = writer.schema_descr().columns().to_vec();
    for (n, group) in row_groups(batches).enumerate() {
        let mut to = writer.next_row_group()?;
        for (ix, mut column) in columns.create_column_writers(n)?.into_iter().enumerate() {
            let parts: Vec<&ArrayRef> = group.iter().map(|batch| batch.column(ix)).collect();
            let wanted = !is_unfiltered(table, leaves[ix].name());
            if let Some((bytes, chunk)) = runs::chunk(&leaves[ix], &parts, wanted)? {
                to.append_column(&bytes, chunk)?;
                continue;
            }
            for part in parts {
                for leaf in compute_leaves(schema.field(ix), &runs::unrolled(part)?)? {
                    column.write(&leaf)?;
                }
            }
            column.close()?.append_to_row_group(&mut to)?;
        }
        to.close()?;
    }
    let metadata = writer.close()?;
    let stats = statistics(&schema, &metadata);
    Ok((bytes, stats))
}

/// Batches that make a row group together.
fn row_groups(mut batches: &[RecordBatch]) -> impl Iterator<Item = &[RecordBatch]> {
    std::iter::from_fn(move || {
        let mut rows = 0;
        let over = |batch: &RecordBatch| {
            rows += batch.num_rows();
            rows > ROW_GROUP
        };
        let end = batches.iter().position(over).unwrap_or(batches.len());
        let group;
        (group, batches) = batches.split_at(end.max(1).min(batches.len()));
        (!group.is_empty()).then_some(group)
    })
}

/// `numRecords`, `minValues`, `maxValues` and `nullCount` (Delta's protocol, per-file statistics).
fn statistics(schema: &SchemaRef, metadata: &ParquetMetaData) -> Value {
    let (mut least, mut greatest, mut nulls) = (Map::new(), Map::new(), Map::new());
    for (ix, field) in schema.fields().iter().enumerate() {
        let groups: Option<Vec<&Statistics>> =
            metadata.row_groups().iter().map(|group| group.column(ix).statistics()).collect();
        let Some(groups) = groups else { continue };
        let name = field.name().clone();
        if let Some(n) = groups.iter().map(|s| s.null_count_opt()).sum::<Option<u64>>() {
            nulls.insert(name.clone(), n.into());
        }
        if let Some((low, high)) = limits(field.data_type(), &groups) {
            least.insert(name.clone(), low);
            greatest.insert(name, high);
        }
    }
    let rows = metadata.file_metadata().num_rows();
    json!({ "numRecords": rows, "minValues": least, "maxValues": greatest, "nullCount": nulls })
}

/// The least and the greatest value of a column, where all of its row groups say them.
fn limits(data_type: &DataType, groups: &[&Statistics]) -> Option<(Value, Value)> {
    fn ends<T: PartialOrd + Copy>(each: impl Iterator<Item = Option<(T, T)>>) -> Option<(T, T)> {
        let wider =
            |a: (T, T), b: (T, T)| (if b.0 < a.0 { b.0 } else { a.0 }, if b.1 > a.1 { b.1 } else { a.1 });
        each.collect::<Option<Vec<_>>>()?.into_iter().reduce(wider)
    }
    let integers = || {
        ends(groups.iter().map(|s| match s {
            Statistics::Int64(s) => Some((*s.min_opt()?, *s.max_opt()?)),
            _ => None,
        }))
    };
    match data_type {
        DataType::Timestamp(..) => {
            let text = |micros| json!(Timestamp::from_micros(micros).to_string());
            integers().map(|(low, high)| (text(low), text(high)))
        }
        DataType::Int64 => integers().map(|(low, high)| (low.into(), high.into())),
        DataType::Float64 => {
            let ends = ends(groups.iter().map(|s| match s {
                Statistics::Double(s) => Some((*s.min_opt()?, *s.max_opt()?)),
                _ => None,
            }));
            ends.filter(|(low, high)| low.is_finite() && high.is_finite()).map(|(l, h)| (l.into(), h.into()))
        }
        DataType::Utf8 | DataType::Dictionary(..) => {
            let ends = ends(groups.iter().map(|s| match s {
                Statistics::ByteArray(s) => {
                    Some((s.min_opt()?.as_utf8().ok()?, s.max_opt()?.as_utf8().ok()?))
                }
                _ => None,
            }));
            ends.map(|(low, high)| (low.into(), high.into()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{
        DictionaryArray, Float64Array, Int64Array, RunArray, StringArray, TimestampMicrosecondArray,
        new_null_array,
    };
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
    use proptest::prelude::*;

    use super::*;

    const TABLE: Table = Table::SensorReadings;

    /// Rows of (device type, device, ts in µs, value), everything else the same.
    fn rows(rows: &[(&str, &str, i64, Option<f64>)]) -> RecordBatch {
        let schema = TABLE.schema();
        let text = |of: &dyn Fn(usize) -> String| -> ArrayRef {
            let words: Vec<String> = (0..rows.len()).map(of).collect();
            Arc::new(words.iter().map(String::as_str).collect::<DictionaryArray<Int32Type>>())
        };
        let columns: Vec<ArrayRef> = schema
            .fields()
            .iter()
            .map(|field| -> ArrayRef {
                match (field.name().as_str(), field.data_type()) {
                    ("ts", _) => Arc::new(
                        TimestampMicrosecondArray::from_iter_values(rows.iter().map(|r| r.2))
                            .with_timezone("UTC"),
                    ),
                    ("value", _) => Arc::new(rows.iter().map(|r| r.3).collect::<Float64Array>()),
                    ("device_id", _) => text(&|i| rows[i].1.to_owned()),
                    ("device_type", _) => text(&|i| rows[i].0.to_owned()),
                    ("year", _) => Arc::new(Int64Array::from(vec![2026; rows.len()])),
                    ("month", _) => Arc::new(Int64Array::from(vec![3; rows.len()])),
                    ("asset_id" | "epoch", _) => new_null_array(&DataType::Utf8, rows.len()),
                    (_, DataType::Utf8) => text(&|_| "x".to_owned()),
                    (_, DataType::Int64) => Arc::new(Int64Array::from(vec![7; rows.len()])),
                    _ => Arc::new(TimestampMicrosecondArray::from(vec![0; rows.len()]).with_timezone("UTC")),
                }
            })
            .collect();
        let fields = schema.fields().iter().zip(&columns);
        let fields: Vec<Field> =
            fields.map(|(f, c)| f.as_ref().clone().with_data_type(c.data_type().clone())).collect();
        RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
    }

    #[test]
    fn a_batch_of_two_partitions_becomes_two_files() {
        let mixed =
            rows(&[("flow", "a", 1, None), ("level", "b", 2, Some(1.5)), ("flow", "c", 3, Some(2.5))]);
        let parts = by_partition(TABLE, vec![mixed, rows(&[("flow", "d", 4, None)])]).unwrap();
        let sizes: Vec<(String, usize)> =
            parts.iter().map(|(p, b)| (p.join("/"), b.iter().map(RecordBatch::num_rows).sum())).collect();
        assert_eq!(sizes, [("flow/2026/3".to_owned(), 3), ("level/2026/3".to_owned(), 1)]);
        let parted = by_partition(TABLE, vec![rows(&[("a/../b", "a", 1, None)])]).unwrap_err().to_string();
        assert_eq!(parted, "device_type = \"a/../b\" cannot name a partition");
    }

    /// Each row as a run of its own, but for those that say what the row before them said.
    fn runs_of(rows: &DictionaryArray<Int32Type>) -> ArrayRef {
        let keys: Vec<Option<i32>> = rows.keys().iter().collect();
        let (mut ends, mut said) = (Vec::new(), Vec::new());
        for run in keys.chunk_by(|a, b| a == b) {
            ends.push(ends.last().copied().unwrap_or(0) + i32::try_from(run.len()).unwrap());
            said.push(run[0]);
        }
        let said = DictionaryArray::<Int32Type>::new(said.into(), Arc::clone(rows.values()));
        Arc::new(RunArray::<Int32Type>::try_new(&ends.into(), &said).unwrap())
    }

    #[test]
    fn only_numbers_that_repeat_get_a_dictionary() {
        let encodings = |of: &dyn Fn(usize) -> f64, n: usize| {
            let all: Vec<_> = (0..n).map(|i| ("flow", "a", i as i64, Some(of(i)))).collect();
            let parts = by_partition(TABLE, vec![rows(&all)]).unwrap();
            let (bytes, _) = encode(TABLE, parts.values().next().unwrap()).unwrap();
            let size = bytes.len();
            let reader = ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(bytes)).unwrap();
            let columns = reader.metadata().row_group(0).columns();
            let value = columns.iter().find(|c| c.column_path().string() == "value").unwrap();
            (value.dictionary_page_offset().is_some(), size)
        };
        // A converter of 12 bits, and a measurement to the last bit.
        assert!(encodings(&|i| (i * 7919 % 4096) as f64 * 0.01, 200_000).0);
        let (dictionary, plain) = encodings(&|i| (i as f64).sqrt(), 200_000);
        assert!(!dictionary && plain < 200_000 * 8, "{plain} B");
        assert!(encodings(&|_| 1.5, 20).0);
        assert!(!encodings(&|i| i as f64, 20).0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Whatever the runs, nulls and dictionaries of a column, and though one of its parts comes by rows: what is read
        /// is what was written, as parquet's own writer has it.
        #[test]
        fn runs_are_read_as_they_were_written(
            parts in prop::collection::vec(prop::collection::vec((0i32..40, 1usize..60), 0..30), 1..4),
            (numbers, nullable, words, by_rows) in (any::<bool>(), any::<bool>(), 1i32..300, 0usize..8),
        ) {
            let (name, layout) =
                if numbers { ("seq", DataType::Int64) } else { ("segment", common::wire::dict()) };
            let schema = Arc::new(Schema::new(vec![Field::new(name, layout.clone(), nullable)]));
            let mut said = Vec::new();
            let batches: Vec<RecordBatch> = parts
                .iter()
                .enumerate()
                .map(|(n, runs)| {
                    // Other dictionaries in each part; more words than any row says.
                    let list: Vec<i64> = (0..words).map(|word| i64::from(word - 9) * 3 + n as i64).collect();
                    let keys = runs.iter().flat_map(|(word, rows)| {
                        let key = (!nullable || word % 5 > 0).then_some(word % words);
                        std::iter::repeat_n(key, *rows)
                    });
                    let words: ArrayRef = match numbers {
                        true => Arc::new(Int64Array::from(list)),
                        false => Arc::new(StringArray::from_iter_values(list.iter().map(i64::to_string))),
                    };
                    let column = DictionaryArray::<Int32Type>::try_new(keys.collect(), words).unwrap();
                    said.push(runs_of(&column));
                    let rows = cast(&column, &layout).unwrap();
                    RecordBatch::try_new(Arc::clone(&schema), vec![rows]).unwrap()
                })
                .collect();
            let laid_out = batches.iter().zip(&said).enumerate().map(|(n, (batch, runs))| {
                let rows = batch.column(0);
                prop_assert_eq!(&runs::unrolled(runs).unwrap(), rows);
                let column = if n == by_rows { rows } else { runs };
                let field = Field::new(name, column.data_type().clone(), nullable);
                let schema = Arc::new(Schema::new(vec![field]));
                Ok(RecordBatch::try_new(schema, vec![Arc::clone(column)]).unwrap())
            });
            let laid_out = laid_out.collect::<Result<Vec<_>, TestCaseError>>()?;
            let (bytes, stats) = encode(TABLE, &laid_out).unwrap();
            let mut plain = Vec::new();
            let properties = Some(writer_properties(TABLE));
            let mut writer = ArrowWriter::try_new(&mut plain, Arc::clone(&schema), properties).unwrap();
            batches.iter().for_each(|batch| writer.write(batch).unwrap());
            writer.close().unwrap();
            let read = |bytes: Vec<u8>, size: usize| {
                let reader = ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(bytes)).unwrap();
                let batches = reader.with_batch_size(size).build().unwrap();
                let texts = batches.flat_map(|batch| {
                    let column = cast(batch.unwrap().column(0), &DataType::Utf8).unwrap();
                    column.as_string::<i32>().iter().map(|t| t.map(str::to_owned)).collect::<Vec<_>>()
                });
                texts.collect::<Vec<_>>()
            };
            let written = read(plain, 1024);
            prop_assert_eq!(stats["numRecords"].as_u64(), Some(written.len() as u64));
            if numbers {
                let all: Vec<i64> = written.iter().flatten().map(|number| number.parse().unwrap()).collect();
                prop_assert_eq!(stats["minValues"]["seq"].as_i64(), all.iter().min().copied());
                prop_assert_eq!(stats["maxValues"]["seq"].as_i64(), all.iter().max().copied());
                let nulls = written.len() - all.len();
                prop_assert_eq!(stats["nullCount"]["seq"].as_u64(), Some(nulls as u64));
            }
            prop_assert_eq!(&read(bytes.clone(), 1024), &written);
            prop_assert_eq!(&read(bytes, 7), &written);
        }
    }

    #[test]
    fn row_groups_are_whole_batches() {
        let batch = |n: usize| rows(&vec![("flow", "a", 1, None); n]);
        let sizes = |batches: &[usize]| -> Vec<usize> {
            let batches: Vec<RecordBatch> = batches.iter().map(|n| batch(*n)).collect();
            row_groups(&batches).map(<[RecordBatch]>::len).collect()
        };
        assert_eq!(sizes(&[]), [0usize; 0]);
        assert_eq!(sizes(&[3]), [1]);
        assert_eq!(sizes(&[ROW_GROUP + 1, 1, ROW_GROUP - 1, 1]), [1, 2, 1]);
    }

    #[test]
    fn a_file_is_plain_parquet_and_the_log_has_its_limits() {
        let parts = by_partition(
            TABLE,
            vec![rows(&[("flow", "b", 1_500, None), ("flow", "a", 2_345_678, Some(0.5))])],
        );
        let (bytes, stats) =
            encode(TABLE, &parts.unwrap()[&["flow", "2026", "3"].map(str::to_owned).to_vec()]).unwrap();
        assert_eq!(stats["numRecords"], 2);
        assert_eq!(stats["minValues"]["ts"], "1970-01-01T00:00:00.001500Z");
        assert_eq!(stats["maxValues"]["ts"], "1970-01-01T00:00:02.345678Z");
        assert_eq!(
            (&stats["minValues"]["device_id"], &stats["maxValues"]["device_id"]),
            (&json!("a"), &json!("b"))
        );
        assert_eq!((&stats["minValues"]["value"], &stats["nullCount"]["value"]), (&json!(0.5), &json!(1)));
        assert!(stats["minValues"].get("segment").is_none());
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(bytes)).unwrap();
        let device = reader.schema().field_with_name("device_id").unwrap();
        assert_eq!(device.data_type(), &DataType::Utf8, "no reader hears of dictionaries");
        assert!(reader.schema().field_with_name("device_type").is_err(), "it stands in the path");
    }
}
