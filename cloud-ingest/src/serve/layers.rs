//! What the lake holds: files, rows and bytes of bronze and of every table.
//!
//! Tables answer from the statistics in their logs. A bronze segment tells its rows in its footer; segments are
//! immutable, so each footer is read once.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::Context;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, path::Path};
use parquet::file::metadata::{FooterTail, ParquetMetaDataReader};
use serde::Serialize;
use tokio::sync::Mutex;

use crate::{lake, tables::Tables};

/// Footers read at a time.
const PARALLEL: usize = 8;
/// Bytes at the end of a segment that hold its footer in one read, nearly always.
const LIKELY_FOOTER: u64 = 32 * 1024;

/// One line of the inventory.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Layer {
    /// `bronze/sensor_data`, `silver/sensor_readings`, …
    pub name: String,
    /// Data files.
    pub files: u64,
    /// Rows in them: messages in bronze.
    pub rows: u64,
    /// Their size.
    pub bytes: u64,
}

/// Counts, and remembers the footers it has read.
#[derive(Debug, Default)]
pub(super) struct Inventory {
    segments: Mutex<BTreeMap<Path, (u64, u64)>>,
}

impl Inventory {
    /// Bronze first, then the tables that exist.
    pub(super) async fn count(&self, tables: &Tables) -> anyhow::Result<Vec<Layer>> {
        let mut layers = vec![self.bronze(&tables.store().objects()).await.context("counting bronze")?];
        for table in tables.all() {
            let Some(snapshot) = tables.snapshot(table).await? else { continue };
            let mut layer = Layer { name: table.path(), ..Layer::default() };
            for file in snapshot.snapshot()?.log_data().iter() {
                layer.files += 1;
                layer.rows += file.num_records().unwrap_or(0) as u64;
                layer.bytes += u64::try_from(file.size()).unwrap_or(0);
            }
            layers.push(layer);
        }
        Ok(layers)
    }

    async fn bronze(&self, objects: &Arc<dyn ObjectStore>) -> anyhow::Result<Layer> {
        let mut segments = self.segments.lock().await;
        let found: Vec<_> = objects
            .list(Some(&Path::from(lake::BRONZE)))
            .try_filter(|o| std::future::ready(lake::SegmentName::parse(o.location.as_ref()).is_some()))
            .try_collect()
            .await?;
        let here: std::collections::BTreeSet<_> = found.iter().map(|o| o.location.clone()).collect();
        segments.retain(|path, _| here.contains(path));
        let new: Vec<_> = found.into_iter().filter(|o| !segments.contains_key(&o.location)).collect();
        let mut footers = stream::iter(new)
            .map(|object| async move {
                // Unreadable is the refiner's business; here it has no rows.
                let rows = footer_rows(objects.as_ref(), &object).await.unwrap_or(0);
                (object.location, (rows, object.size))
            })
            .buffer_unordered(PARALLEL);
        while let Some((path, counts)) = footers.next().await {
            segments.insert(path, counts);
        }
        let mut layer = Layer { name: lake::BRONZE.to_owned(), ..Layer::default() };
        for (rows, bytes) in segments.values() {
            layer.files += 1;
            layer.rows += rows;
            layer.bytes += bytes;
        }
        Ok(layer)
    }
}

/// The rows that a Parquet object's footer tells.
async fn footer_rows(objects: &dyn ObjectStore, object: &ObjectMeta) -> anyhow::Result<u64> {
    let from = object.size.saturating_sub(LIKELY_FOOTER);
    let mut end = objects.get_range(&object.location, from..object.size).await?;
    let tail = end.last_chunk::<8>().context("shorter than a footer")?;
    let length = FooterTail::try_new(tail)?.metadata_length() as u64 + 8;
    if length > end.len() as u64 {
        let from = object.size.checked_sub(length).context("the footer is longer than the file")?;
        end = objects.get_range(&object.location, from..object.size).await?;
    }
    let metadata = &end[end.len() - usize::try_from(length)?..end.len() - 8];
    let metadata = ParquetMetaDataReader::decode_metadata(metadata)?;
    Ok(u64::try_from(metadata.file_metadata().num_rows())?)
}
