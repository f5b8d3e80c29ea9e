//! Data files of one partition put together as one without looking at a row: their row groups are copied as they are.
//!
//! A row is encoded twice at most: when it comes, and when the tiny file it came in is packed with others. From then on
//! its file's row groups are large enough to stay, and the tiers above cost no more than copying.

use std::{cmp::Ordering, collections::HashMap};

use anyhow::Context;
use bytes::{Buf, Bytes, buf::Reader};
use common::time::{Clock, SystemClock, Timestamp};
use deltalake::{DeltaTable, kernel::Add};
use object_store::{buffered::BufWriter, path::Path};
use parquet::{
    arrow::async_reader::AsyncFileReader,
    column::writer::ColumnCloseResult,
    errors::ParquetError,
    file::{
        metadata::{PageIndexPolicy, ParquetMetaData, RowGroupMetaData},
        reader::{ChunkReader, Length},
        writer::SerializedFileWriter,
    },
};
use serde_json::{Map, Value, json};
use tokio::io::AsyncWriteExt;
use uuid::Uuid;

use super::{TAIL, writer_properties};
use crate::{
    lake::Table,
    store::{Ranged, Store},
};

/// Files that are smaller than this, on average, have row groups that are too small to keep.
const SMALL: u64 = 512 << 10;
/// Bytes of a part of an upload, and how many are under way.
const PART: usize = 8 << 20;
const PARTS: usize = 2;

/// Puts the files at `paths` together, in that order; `None` when that has to be done row by row. The file is no part
/// of the table until the log says so.
///
/// # Errors
/// When the store fails, or a file is not what the log says.
pub(super) async fn splice(
    store: &Store,
    table: Table,
    base: &DeltaTable,
    paths: &[String],
) -> anyhow::Result<Option<Add>> {
    let adds = adds(base, paths)?;
    let bytes = adds.iter().map(|add| u64::try_from(add.size).unwrap_or(0)).sum::<u64>();
    // Names that are encoded, and rows that are deleted within a file, are other writers' doing.
    let plain = adds.iter().all(|add| !add.path.contains('%') && add.deletion_vector.is_none());
    if bytes < SMALL * adds.len() as u64 || !plain {
        return Ok(None);
    }
    let folder = adds[0].path.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
    let path = format!("{folder}part-{}.zstd.parquet", Uuid::now_v7());
    let place = Path::from(format!("{}/{path}", table.path()));
    let mut upload =
        BufWriter::with_capacity(store.objects(), place.clone(), PART).with_max_concurrency(PARTS);
    let copied = copy(store, table, &adds, &mut upload).await.with_context(|| format!("writing {place}"));
    let Ok(Some((rows, size))) = copied else {
        let aborted = upload.abort().await.with_context(|| format!("not writing {place}"));
        copied?;
        aborted?;
        return Ok(None);
    };
    upload.shutdown().await.with_context(|| format!("writing {place}"))?;
    Ok(Some(Add {
        path,
        size: i64::try_from(size)?,
        modification_time: SystemClock.now().as_micros() / 1000,
        data_change: false,
        stats: Some(statistics(table, rows, &adds).to_string()),
        ..adds[0].clone()
    }))
}

/// What the log says of files.
fn adds(base: &DeltaTable, paths: &[String]) -> anyhow::Result<Vec<Add>> {
    let mut found: HashMap<String, Add> = HashMap::new();
    for file in
        base.snapshot()?.log_data().iter().filter(|file| paths.iter().any(|path| *path == file.path()))
    {
        let add = Add {
            path: file.path().into_owned(),
            size: file.size(),
            stats: file.stats(),
            partition_values: file.partition_values_map(),
            deletion_vector: file.deletion_vector_descriptor(),
            ..Add::default()
        };
        found.insert(add.path.clone(), add);
    }
    let add = |path| found.remove(path).with_context(|| format!("{path} is not in the table"));
    paths.iter().map(add).collect()
}

/// Rows and bytes; `None` when the files do not have the same columns. One row group is held at a time.
async fn copy(
    store: &Store,
    table: Table,
    adds: &[Add],
    upload: &mut BufWriter,
) -> anyhow::Result<Option<(i64, usize)>> {
    let mut to: Option<SerializedFileWriter<Vec<u8>>> = None;
    let (mut rows, mut size) = (0, 0);
    for add in adds {
        let reading = || format!("reading {}", add.path);
        let path = Path::from(format!("{}/{}", table.path(), add.path));
        let bytes = u64::try_from(add.size)?;
        let mut from = Ranged { objects: store.objects(), path, size: bytes, tail: TAIL };
        let about = from.footer(PageIndexPolicy::Optional).await.with_context(reading)?;
        let schema = about.file_metadata().schema_descr().root_schema_ptr();
        let writer = match &mut to {
            None => {
                let properties = writer_properties(table).into();
                to.insert(SerializedFileWriter::new(Vec::new(), schema, properties)?)
            }
            Some(writer) if *writer.schema_descr().root_schema() == *schema => writer,
            Some(_) => return Ok(None),
        };
        for n in 0..about.num_row_groups() {
            let group = Piece::of(&mut from, about.row_group(n)).await.with_context(reading)?;
            row_group(writer, &group, &about, n).with_context(|| format!("copying {}", add.path))?;
            size += drain(writer.inner_mut(), upload).await?;
        }
        rows += about.file_metadata().num_rows();
    }
    let mut writer = to.context("no file")?;
    writer.finish()?;
    size += drain(writer.inner_mut(), upload).await?;
    Ok(Some((rows, size)))
}

async fn drain(from: &mut Vec<u8>, to: &mut BufWriter) -> anyhow::Result<usize> {
    let bytes = std::mem::take(from);
    let size = bytes.len();
    if size > 0 {
        to.put(bytes.into()).await?;
    }
    Ok(size)
}

/// Copies a row group, with what its file says of its columns and pages.
fn row_group(
    to: &mut SerializedFileWriter<Vec<u8>>,
    from: &Piece,
    about: &ParquetMetaData,
    n: usize,
) -> anyhow::Result<()> {
    let group = about.row_group(n);
    let mut copy = to.next_row_group()?;
    for (i, column) in group.columns().iter().enumerate() {
        let index = about.column_index().and_then(|of| of.get(n)?.get(i)).cloned();
        let offsets = about.offset_index().and_then(|of| of.get(n)?.get(i)).cloned();
        let close = ColumnCloseResult {
            bytes_written: u64::try_from(column.compressed_size())?,
            rows_written: u64::try_from(group.num_rows())?,
            metadata: column.clone(),
            bloom_filter: None,
            column_index: index,
            offset_index: offsets,
        };
        copy.append_column(from, close)?;
    }
    copy.close()?;
    Ok(())
}

/// The bytes of a row group, at their place in its file.
struct Piece {
    at: u64,
    bytes: Bytes,
}

impl Piece {
    async fn of(file: &mut Ranged, group: &RowGroupMetaData) -> parquet::errors::Result<Piece> {
        let ranges = || group.columns().iter().map(|column| column.byte_range());
        let at = ranges().map(|(start, _)| start).min().unwrap_or(0);
        let end = ranges().map(|(start, bytes)| start + bytes).max().unwrap_or(0);
        Ok(Piece { at, bytes: file.get_bytes(at..end).await? })
    }

    /// What follows a place in the file, which is refused where it lies before the row group.
    fn from(&self, start: u64) -> parquet::errors::Result<Bytes> {
        let start = start.checked_sub(self.at).and_then(|start| usize::try_from(start).ok());
        let start = start.filter(|start| *start <= self.bytes.len());
        let outside = || ParquetError::EOF("a place outside of the row group".to_owned());
        Ok(self.bytes.slice(start.ok_or_else(outside)?..))
    }
}

impl Length for Piece {
    fn len(&self) -> u64 {
        self.at + self.bytes.len() as u64
    }
}

impl ChunkReader for Piece {
    type T = Reader<Bytes>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        Ok(self.from(start)?.reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let bytes = self.from(start)?;
        if bytes.len() < length {
            return Err(ParquetError::EOF(format!(
                "{length} bytes at {start} of a row group that ends before"
            )));
        }
        Ok(bytes.slice(..length))
    }
}

/// What the log says of the files together: only what it says of each of them.
fn statistics(table: Table, rows: i64, adds: &[Add]) -> Value {
    let parse = |add: &Add| serde_json::from_str::<Value>(add.stats.as_deref()?).ok();
    let all: Option<Vec<Value>> = adds.iter().map(parse).collect();
    let Some(all) = all else { return json!({ "numRecords": rows }) };
    let merged = |of: &str, merge: &dyn Fn(&str, &Value, &Value) -> Option<Value>| -> Map<String, Value> {
        let mut of_each = all.iter().map(|stats| stats.get(of).and_then(Value::as_object));
        let mut merged = of_each.next().flatten().cloned().unwrap_or_default();
        for other in of_each {
            let both = |(name, value): (String, Value)| {
                let value = merge(&name, &value, other?.get(&name)?)?;
                Some((name, value))
            };
            merged = merged.into_iter().filter_map(both).collect();
        }
        merged
    };
    let end = |wanted: Ordering, cut: i64| {
        move |name: &str, a: &Value, b: &Value| {
            let instant = table.schema().field_with_name(name).is_ok_and(|f| f.data_type().is_temporal());
            let order = order(instant.then_some(cut), a, b)?;
            Some(if order == wanted { a.clone() } else { b.clone() })
        }
    };
    json!({
        "numRecords": rows,
        "minValues": merged("minValues", &end(Ordering::Less, 0)),
        // Other writers cut instants down to milliseconds, and readers of the log raise what is one: it may be later.
        "maxValues": merged("maxValues", &end(Ordering::Greater, 999)),
        "nullCount": merged("nullCount", &|_, a, b| Some((a.as_i64()? + b.as_i64()?).into())),
    })
}

/// `None` where it is not known. Of instants, `cut` is how many µs a whole millisecond may stand for beside itself.
fn order(cut: Option<i64>, a: &Value, b: &Value) -> Option<Ordering> {
    match (a, b) {
        (Value::String(a), Value::String(b)) => match cut {
            None => Some(a.cmp(b)),
            Some(cut) => {
                let micros = |text: &str| text.parse::<Timestamp>().ok().map(Timestamp::as_micros);
                let reach = |at: i64| at + if at % 1000 == 0 { cut } else { 0 };
                Some(reach(micros(a)?).cmp(&reach(micros(b)?)))
            }
        },
        (Value::Number(a), Value::Number(b)) => match (a.as_i64(), b.as_i64()) {
            (Some(a), Some(b)) => Some(a.cmp(&b)),
            _ => a.as_f64()?.partial_cmp(&b.as_f64()?),
        },
        (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::{
        array::{
            ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
        },
        datatypes::{DataType, Float64Type, Int64Type},
    };

    use object_store::ObjectStoreExt;
    use parquet::file::metadata::ParquetMetaDataReader;

    use super::{super::Tables, *};

    const TABLE: Table = Table::SensorReadings;

    /// Values that cannot be compressed, of a device of its own, one every 10 ms.
    fn rows(device: &str, from: i64, count: i64) -> RecordBatch {
        let numbers = || from..from + count;
        let schema = TABLE.schema();
        let columns = schema.fields().iter().map(|field| -> ArrayRef {
            match (field.name().as_str(), field.data_type()) {
                ("device_id", _) => Arc::new(StringArray::from_iter_values(numbers().map(|_| device))),
                ("value", _) => {
                    let noise = |n: i64| (n as f64 * 12.9898).sin() * 43_758.545_3;
                    Arc::new(Float64Array::from_iter_values(numbers().map(noise)))
                }
                (_, DataType::Timestamp(..)) => {
                    let ts = numbers().map(|n| 1_700_000_000_000_123 + n * 10_000);
                    Arc::new(TimestampMicrosecondArray::from_iter_values(ts).with_timezone("UTC"))
                }
                (_, DataType::Int64) => Arc::new(Int64Array::from_iter_values(numbers().map(|_| 7))),
                _ => Arc::new(StringArray::from_iter_values(numbers().map(|_| "x"))),
            }
        });
        RecordBatch::try_new(Arc::clone(&schema), columns.collect()).unwrap()
    }

    async fn ask(tables: &Tables, of: &str, filter: &str) -> (i64, f64) {
        let sql =
            format!("select count(*), coalesce(sum({of}), 0.0) from silver.sensor_readings where {filter}");
        let batches = tables.session().await.unwrap().sql(&sql).await.unwrap().collect().await.unwrap();
        let [count, sum] = [0, 1].map(|i| batches[0].column(i));
        (count.as_primitive::<Int64Type>().value(0), sum.as_primitive::<Float64Type>().value(0))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn large_files_are_put_together_as_they_are() {
        const EACH: i64 = 80_000;
        let folder = tempfile::tempdir().unwrap();
        let tables = Tables::open(&Store::open(folder.path().to_str().unwrap()).unwrap()).await.unwrap();
        for (n, device) in (0..).zip(["c", "a", "b"]) {
            let base = tables.snapshot(TABLE).await.unwrap();
            tables.append(TABLE, base, vec![rows(device, n * EACH, EACH)], ("refine", n)).await.unwrap();
        }
        let filters = [
            ("true", 3 * EACH),
            ("device_id = 'a'", EACH),
            ("device_id < 'b' or device_id > 'b'", 2 * EACH),
            ("ts >= '2023-11-14T22:13:20.000123Z' and ts < '2023-11-14T22:13:21.000123Z'", 100),
            ("ts > '2023-11-14T23:00:00Z' and device_id = 'a'", 0),
            ("value is null", 0),
        ];
        let mut before = Vec::new();
        for (filter, count) in filters {
            let answer = ask(&tables, "value", filter).await;
            assert_eq!(answer.0, count, "{filter}");
            before.push(answer);
        }
        let base = tables.snapshot(TABLE).await.unwrap().unwrap();
        let paths: Vec<String> =
            base.snapshot().unwrap().log_data().iter().map(|file| file.path().into_owned()).collect();
        let one =
            splice(tables.store(), TABLE, &base, &paths).await.unwrap().expect("files as large as these");
        assert!(tables.compact(TABLE, &[1 << 30], 2).await.unwrap());
        let snapshot = tables.snapshot(TABLE).await.unwrap().unwrap();
        let packed: Vec<i64> =
            snapshot.snapshot().unwrap().log_data().iter().map(|file| file.size()).collect();
        assert_eq!(packed, [one.size]);
        for ((filter, _), before) in filters.into_iter().zip(&before) {
            let after = ask(&tables, "value", filter).await;
            assert_eq!(after.0, before.0, "{filter}");
            assert!((after.1 - before.1).abs() <= 1e-9 * before.1.abs(), "{filter}: {after:?}, {before:?}");
        }
        let stats: Value = serde_json::from_str(one.stats.as_deref().unwrap()).unwrap();
        assert_eq!(
            (&stats["numRecords"], &stats["nullCount"]["ts"]),
            (&json!(3 * EACH), &json!(0)),
            "{stats}"
        );
        assert_eq!(
            (&stats["minValues"]["device_id"], &stats["maxValues"]["device_id"]),
            (&json!("a"), &json!("c"))
        );
        let times = [&stats["minValues"]["ts"], &stats["maxValues"]["ts"]];
        let times = times.map(|ts| ts.as_str().unwrap().parse::<Timestamp>().unwrap().as_micros());
        assert_eq!(times, [1_700_000_000_000_123, 1_700_000_000_000_123 + (3 * EACH - 1) * 10_000]);

        let (objects, path) =
            (tables.store().objects(), Path::from(format!("{}/{}", TABLE.path(), one.path)));
        let bytes = objects.get(&path).await.unwrap().bytes().await.unwrap();
        assert_eq!(bytes.len(), usize::try_from(one.size).unwrap());
        let about = ParquetMetaDataReader::new()
            .with_page_index_policy(PageIndexPolicy::Required)
            .parse_and_finish(&bytes)
            .unwrap();
        assert_eq!(about.num_row_groups(), 3, "nothing was encoded again");

        // A file of several row groups is copied as one of one is.
        let added = rows("d", 3 * EACH, EACH);
        tables.append(TABLE, Some(snapshot), vec![added], ("refine", 3)).await.unwrap();
        assert!(tables.compact(TABLE, &[1 << 30], 1).await.unwrap());
        let snapshot = tables.snapshot(TABLE).await.unwrap().unwrap();
        assert_eq!(snapshot.snapshot().unwrap().log_data().iter().count(), 1);
        let after = ask(&tables, "value", "device_id <> 'd'").await;
        assert!(after.0 == before[0].0 && (after.1 - before[0].1).abs() <= 1e-9 * before[0].1.abs());
        assert_eq!(ask(&tables, "value", "device_id = 'd'").await.0, EACH);
    }

    #[test]
    fn what_is_said_of_one_file_only_is_not_said_of_all() {
        let add = |stats: Value| Add { stats: Some(stats.to_string()), ..Add::default() };
        let adds = [
            add(json!({ "minValues": { "ts": "2026-01-01T00:00:00.123Z", "value": 9, "epoch": "a" },
                        "maxValues": { "ts": "2026-01-01T00:00:00.123Z" }, "nullCount": { "value": 1 } })),
            add(json!({ "minValues": { "ts": "2026-01-01T00:00:00.123456Z", "value": 10.5 },
                        "maxValues": { "ts": "2026-01-01T00:00:00.123456Z" }, "nullCount": { "value": 2 } })),
        ];
        // A row at .1239 may hide behind a greatest instant that was cut down to .123.
        let expected = json!({
            "numRecords": 7, "minValues": { "ts": "2026-01-01T00:00:00.123Z", "value": 9 },
            "maxValues": { "ts": "2026-01-01T00:00:00.123Z" }, "nullCount": { "value": 3 },
        });
        assert_eq!(statistics(TABLE, 7, &adds), expected);
        let later = add(json!({ "maxValues": { "ts": "2026-01-01T00:00:00.124001Z" } }));
        let stats = statistics(TABLE, 7, &[adds[0].clone(), later]);
        assert_eq!(stats["maxValues"]["ts"], "2026-01-01T00:00:00.124001Z");
        let silent = Add { stats: None, ..Add::default() };
        assert_eq!(statistics(TABLE, 7, &[adds[0].clone(), silent]), json!({ "numRecords": 7 }));
    }
}
