//! The lake afterwards: whether it holds what was sent, and what writing it costs at the least.

use std::{collections::HashMap, fs, path::Path, time::Duration};

use anyhow::Context as _;
use arrow::{
    array::{AsArray as _, RecordBatch},
    datatypes::{Float64Type, Int64Type},
};
use cloud_ingest::{
    lake::Table,
    tables::{Tables, writer_properties},
};
use object_store::ObjectStoreExt as _;
use parquet::arrow::{ArrowWriter, arrow_reader::ParquetRecordBatchReaderBuilder};
use tokio::task::spawn_blocking;

use crate::{bench::usage::thread_cpu, fleet::Told};

/// What the lake does not hold as it was sent; empty when all is well.
pub(super) async fn compare(tables: &Tables, truth: &[Told]) -> anyhow::Result<Vec<String>> {
    const SILVER: &str = "select site, device_id, count(*) n, count(distinct ts) times, sum(value) total, \
                          cast(min(ts) as bigint) first, cast(max(ts) as bigint) last \
                          from silver.sensor_readings group by site, device_id";
    const GOLD: &str = "select site, device_id, sum(count) n, sum(count) times, sum(mean * count) total, \
                        cast(null as bigint) first, cast(null as bigint) last \
                        from gold.hourly_aggregates group by site, device_id";
    let mut wrong = Vec::new();
    let session = tables.session().await?;
    for (layer, sql) in [("silver", SILVER), ("gold", GOLD)] {
        let mut awaited: HashMap<(String, String), &Told> =
            truth.iter().map(|told| ((told.site.to_owned(), told.device.clone()), told)).collect();
        for batch in session.sql(sql).await?.collect().await? {
            for row in 0..batch.num_rows() {
                let text = |i: usize| batch.column(i).as_string::<i32>().value(row);
                match awaited.remove(&(text(0).to_owned(), text(1).to_owned())) {
                    Some(told) if agrees(&batch, row, told) => {}
                    Some(told) => wrong.push(format!("{layer}: {} is not what was sent: {told:?}", text(1))),
                    None => wrong.push(format!("{layer}: nobody sent {}/{}", text(0), text(1))),
                }
            }
        }
        wrong.extend(awaited.values().map(|told| format!("{layer}: {} is missing", told.device)));
    }
    let hours = "select count(*) - count(distinct (hour, site, device_id)) from gold.hourly_aggregates";
    for batch in session.sql(hours).await?.collect().await? {
        if batch.column(0).as_primitive::<Int64Type>().value(0) != 0 {
            wrong.push("gold: an hour of a device stands there twice".to_owned());
        }
    }
    let found = wrong.len();
    wrong.truncate(10);
    if found > 10 {
        wrong.push(format!("and {} more", found - 10));
    }
    Ok(wrong)
}

fn agrees(batch: &RecordBatch, row: usize, told: &Told) -> bool {
    let number = |i: usize| {
        let column = batch.column(i).as_primitive::<Int64Type>();
        arrow::array::Array::is_valid(column, row).then(|| column.value(row))
    };
    let total = batch.column(4).as_primitive::<Float64Type>().value(row);
    let count = i64::try_from(told.count).ok();
    number(2) == count
        && number(3) == count
        && (total - told.sum).abs() <= 1e-9 * told.sum.abs()
        && number(5).is_none_or(|first| first == told.first.as_micros())
        && number(6).is_none_or(|last| last == told.last.as_micros())
}

/// How often silver's files are written once more: one time differs from the next by a fifth.
const PASSES: u64 = 3;

/// The bare writer.
#[derive(Debug, Default)]
pub(super) struct Limit {
    /// Written in all passes.
    pub(super) rows: u64,
    /// Of silver's files as they are.
    pub(super) bytes: u64,
    pub(super) cpu: Duration,
}

pub(super) async fn limit(tables: &Tables) -> anyhow::Result<Limit> {
    let table = Table::SensorReadings;
    let snapshot = tables.snapshot(table).await?.context("silver/sensor_readings is not there")?;
    let mut limit = Limit::default();
    let paths: Vec<_> = snapshot.snapshot()?.log_data().iter().map(|file| file.path().into_owned()).collect();
    for path in paths {
        let path = object_store::path::Path::from(format!("{}/{path}", table.path()));
        let bytes = tables.store().objects().get(&path).await?.bytes().await?;
        limit.bytes += bytes.len() as u64;
        let (rows, cpu) = spawn_blocking(move || {
            let reader = ParquetRecordBatchReaderBuilder::try_new(bytes)?.with_batch_size(64 * 1024);
            let schema = reader.schema().clone();
            let batches = reader.build()?.collect::<Result<Vec<_>, _>>()?;
            let before = thread_cpu()?;
            for _ in 0..PASSES {
                let properties = writer_properties(table);
                let mut writer = ArrowWriter::try_new(Vec::new(), schema.clone(), Some(properties))?;
                batches.iter().try_for_each(|batch| writer.write(batch))?;
                std::hint::black_box(writer.into_inner()?);
            }
            let rows = PASSES * batches.iter().map(|batch| batch.num_rows() as u64).sum::<u64>();
            anyhow::Ok((rows, thread_cpu()?.saturating_sub(before)))
        })
        .await??;
        limit.rows += rows;
        limit.cpu += cpu;
    }
    Ok(limit)
}

/// Bytes of all files below a folder.
pub(super) fn folder_bytes(folder: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        let about = entry.metadata()?;
        bytes += if about.is_dir() { folder_bytes(&entry.path())? } else { about.len() };
    }
    Ok(bytes)
}
