//! Packs: the many small segments of a bronze hour in one object.
//!
//! * A pack is a Parquet object in the hour's folder with bronze's own columns, so whatever reads bronze reads it.
//!   Its rows are those of its segments, whole, by (segment, offset); its footer has the key [`SEGMENTS`] with the
//!   JSON `[["{writer}-{number}.parquet", rows], …]` in that order. So (segment path, offset), which silver and the
//!   plans name, stays an address: [`Segments`] reads a segment from its own object or from its pack.
//! * Its name is a digest of its segments' names. Segments never change, so two packers that meet write the same
//!   rows under the same name, and it does not matter who is last.
//! * Segments are deleted only once the pack has been read back and holds their rows. A run that is killed leaves
//!   a pack beside segments that it holds; the next one compares and deletes them.
//! * A segment that comes late to a packed hour goes into a further pack.
//! * One segment is in memory at a time, with [`READ_AHEAD`] more on the way, and one row group of the pack.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context;
use arrow::{array::RecordBatch, compute::concat_batches, datatypes::SchemaRef};
use bytes::Bytes;
use common::time::Timestamp;
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{ObjectStore, ObjectStoreExt, buffered::BufWriter, path::Path};
use parquet::{
    arrow::{
        ArrowWriter, ParquetRecordBatchStreamBuilder,
        arrow_reader::{
            ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder, RowSelection,
            RowSelector,
        },
    },
    file::metadata::KeyValue,
};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use crate::{
    bronze,
    lake::{PackName, SegmentName, bronze_hour, bronze_schema},
    plan::Planned,
    store::{Ranged, Store},
};

/// Key of the footer's entry that lists the segments.
pub const SEGMENTS: &str = "tailrace.segments";
/// Bytes at a pack's end that are fetched at once: most footers and page indices fit.
const TAIL: usize = 256 << 10;
/// Segments that are read at the same time.
const READ_AHEAD: usize = 4;
/// A row group is closed at this size in memory, in bytes.
const ROW_GROUP: usize = 16 << 20;
/// Bytes of one part of an upload.
const PART: usize = 8 << 20;
/// Messages of a pack that are decoded at once; one may be of 128 KiB and more.
const BATCH: usize = 256;
/// Hours whose packs are remembered.
const HOURS: usize = 4;

/// What stands in the folder of an hour.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hour {
    /// Segments with their sizes, in order.
    pub segments: BTreeMap<SegmentName, u64>,
    /// Packs with their sizes.
    pub packs: BTreeMap<PackName, u64>,
}

impl Hour {
    /// Lists the folder.
    ///
    /// # Errors
    /// The store's.
    pub async fn list(store: &Store, hour: Timestamp) -> object_store::Result<Hour> {
        let objects = store.objects();
        let mut listed = objects.list(Some(&Path::from(bronze_hour(hour))));
        let mut found = Hour::default();
        while let Some(object) = listed.try_next().await? {
            let path = object.location.as_ref();
            if let Some(name) = SegmentName::parse(path) {
                found.segments.insert(name, object.size);
            } else if let Some(name) = PackName::parse(path) {
                found.packs.insert(name, object.size);
            }
        }
        Ok(found)
    }
}

/// What packing an hour did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// Packs written.
    pub packs: usize,
    /// Segments that a pack has taken the place of.
    pub segments: usize,
}

/// Packs the segments of an hour, if all of them stand in plans that are done (`refined`).
///
/// # Errors
/// The store's, or a pack that does not hold what it says. Nothing is deleted before it is safe; the next call goes
/// on.
pub async fn pack_hour(store: &Store, hour: Timestamp, refined: &Planned) -> anyhow::Result<Packed> {
    let mut found = Hour::list(store, hour).await?;
    let mut done = Packed::default();
    if !found.segments.keys().all(|name| refined.contains(*name)) {
        return Ok(done);
    }
    // What an earlier run left.
    for (name, size) in &found.packs {
        let pack = Pack::open(store, name, *size).await?;
        let left: Vec<SegmentName> = pack
            .segments
            .iter()
            .map(|(name, _)| *name)
            .filter(|name| found.segments.contains_key(name))
            .collect();
        replace(store, &pack, &left).await?;
        found.segments.retain(|name, _| left.binary_search(name).is_err());
        done.segments += left.len();
    }
    let segments: Vec<SegmentName> = found.segments.into_keys().collect();
    if segments.is_empty() {
        return Ok(done);
    }
    let name = name_of(hour, &segments);
    let path = Path::from(name.path());
    write(store, &path, &segments).await.with_context(|| format!("writing {path}"))?;
    let size = store.objects().head(&path).await?.size;
    let pack = Pack::open(store, &name, size).await?;
    replace(store, &pack, &segments).await?;
    done.packs += 1;
    done.segments += segments.len();
    tracing::debug!(pack = path.as_ref(), segments = segments.len(), bytes = size, "packed");
    Ok(done)
}

fn name_of(hour: Timestamp, segments: &[SegmentName]) -> PackName {
    let mut hash = Sha256::new();
    for name in segments {
        hash.update(file(*name));
        hash.update("\n");
    }
    let digest = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    PackName { hour, digest }
}

/// A segment's name in its folder.
fn file(name: SegmentName) -> String {
    let path = name.path();
    path.rsplit_once('/').map_or(path.clone(), |(_, file)| file.to_owned())
}

async fn write(store: &Store, path: &Path, segments: &[SegmentName]) -> anyhow::Result<()> {
    let mut upload = BufWriter::with_capacity(store.objects(), path.clone(), PART);
    // No object appears before the upload is complete.
    match stream_into(store, &mut upload, segments).await {
        Ok(()) => Ok(upload.shutdown().await?),
        Err(e) => {
            let _ = upload.abort().await;
            Err(e)
        }
    }
}

async fn stream_into(store: &Store, upload: &mut BufWriter, segments: &[SegmentName]) -> anyhow::Result<()> {
    let mut writer = ArrowWriter::try_new(Vec::new(), bronze_schema(), Some(bronze::writer_properties()?))?;
    let mut listed: Vec<(String, usize)> = Vec::with_capacity(segments.len());
    let mut rows = read_segments(store, segments.to_vec());
    while let Some((name, batch)) = rows.try_next().await? {
        listed.push((file(name), batch.num_rows()));
        writer = tokio::task::spawn_blocking(move || {
            writer.write(&batch)?;
            if writer.in_progress_size() >= ROW_GROUP {
                writer.flush()?;
            }
            anyhow::Ok(writer)
        })
        .await??;
        let bytes = std::mem::take(writer.inner_mut());
        if !bytes.is_empty() {
            upload.put(bytes.into()).await?;
        }
    }
    writer.append_key_value_metadata(KeyValue::new(SEGMENTS.to_owned(), serde_json::to_string(&listed)?));
    let rest = tokio::task::spawn_blocking(move || writer.into_inner()).await??;
    Ok(upload.put(rest.into()).await?)
}

/// The rows of segments that have objects of their own, in order.
fn read_segments(
    store: &Store,
    segments: Vec<SegmentName>,
) -> BoxStream<'static, anyhow::Result<(SegmentName, RecordBatch)>> {
    let objects = store.objects();
    futures::stream::iter(segments)
        .map(move |name| {
            let objects = Arc::clone(&objects);
            async move {
                let path = name.path();
                let rows = object(objects.as_ref(), &path).await?;
                let rows = rows.with_context(|| format!("{path} is gone; another run packs this hour"))?;
                let schema = bronze_schema();
                anyhow::ensure!(rows.schema() == schema, "{path} does not have bronze's columns");
                Ok((name, rows))
            }
        })
        .buffered(READ_AHEAD)
        .boxed()
}

/// Deletes segments once the pack is seen to hold their rows.
async fn replace(store: &Store, pack: &Pack, segments: &[SegmentName]) -> anyhow::Result<()> {
    if segments.is_empty() {
        return Ok(());
    }
    let spans: HashMap<SegmentName, Range<usize>> = pack.segments.iter().cloned().collect();
    let spans: Vec<Range<usize>> = segments
        .iter()
        .map(|name| spans.get(name).cloned().context("a segment of the pack"))
        .collect::<Result<_, _>>()?;
    let mut packed = pack.read(store, &spans)?;
    let mut rows = read_segments(store, segments.to_vec());
    while let Some((name, segment)) = rows.try_next().await? {
        let same = packed.try_next().await?.is_some_and(|packed| packed == segment);
        anyhow::ensure!(same, "{} does not hold the rows of {}; delete it", pack.path, name.path());
    }
    let paths = segments.iter().map(|name| Ok(Path::from(name.path()))).collect::<Vec<_>>();
    let mut deleted = store.objects().delete_stream(futures::stream::iter(paths).boxed());
    while let Some(deleted) = deleted.next().await {
        match deleted {
            // Another run packs this hour too.
            Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// The rows of a segment's own object; `None` when it is not there.
async fn object(objects: &dyn ObjectStore, path: &str) -> anyhow::Result<Option<RecordBatch>> {
    let bytes: Bytes = match objects.get(&Path::from(path)).await {
        Ok(found) => found.bytes().await?,
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let read = tokio::task::spawn_blocking(move || {
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes)?;
        let schema = Arc::clone(reader.schema());
        let batches = reader.build()?.collect::<Result<Vec<RecordBatch>, _>>()?;
        anyhow::Ok(concat_batches(&schema, &batches)?)
    });
    Ok(Some(read.await?.with_context(|| format!("reading {path}"))?))
}

/// A pack's footer.
#[derive(Debug)]
pub struct Pack {
    path: Path,
    size: u64,
    metadata: ArrowReaderMetadata,
    /// With their rows, in order.
    segments: Vec<(SegmentName, Range<usize>)>,
}

impl Pack {
    /// Reads the footer.
    ///
    /// # Errors
    /// The store's, or an object that is no pack.
    pub async fn open(store: &Store, name: &PackName, size: u64) -> anyhow::Result<Pack> {
        let path = Path::from(name.path());
        Self::read_footer(store, name.hour, path.clone(), size)
            .await
            .with_context(|| format!("reading {path}"))
    }

    async fn read_footer(store: &Store, hour: Timestamp, path: Path, size: u64) -> anyhow::Result<Pack> {
        let mut object = Ranged { objects: store.objects(), path: path.clone(), size, tail: TAIL };
        let metadata = ArrowReaderMetadata::load_async(&mut object, ArrowReaderOptions::new()).await?;
        let entries = metadata.metadata().file_metadata().key_value_metadata();
        let listed = entries.into_iter().flatten().find(|entry| entry.key == SEGMENTS);
        let listed =
            listed.and_then(|entry| entry.value.as_deref()).with_context(|| format!("no {SEGMENTS}"))?;
        let listed: Vec<(String, usize)> = serde_json::from_str(listed)?;
        let mut segments = Vec::with_capacity(listed.len());
        let mut start = 0;
        for (file, rows) in listed {
            let path = format!("{}/{file}", bronze_hour(hour));
            let name = SegmentName::parse(&path).with_context(|| format!("{file} is no segment"))?;
            segments.push((name, start..start + rows));
            start += rows;
        }
        Ok(Pack { path, size, metadata, segments })
    }

    /// Its segments, in order.
    pub fn segments(&self) -> impl Iterator<Item = SegmentName> + '_ {
        self.segments.iter().map(|(name, _)| *name)
    }

    /// The rows of some spans, which ascend; one batch each.
    fn read(
        &self,
        store: &Store,
        spans: &[Range<usize>],
    ) -> anyhow::Result<BoxStream<'static, anyhow::Result<RecordBatch>>> {
        let mut selectors = Vec::with_capacity(2 * spans.len());
        let mut at = 0;
        for span in spans {
            selectors.push(RowSelector::skip(span.start - at));
            selectors.push(RowSelector::select(span.len()));
            at = span.end;
        }
        let (objects, path) = (store.objects(), self.path.clone());
        let reader = Ranged { objects, path, size: self.size, tail: TAIL };
        // Without the footer's entries, which arrow takes for the schema's own.
        let schema: SchemaRef = bronze_schema();
        let rows = ParquetRecordBatchStreamBuilder::new_with_metadata(reader, self.metadata.clone())
            .with_batch_size(BATCH)
            .with_row_selection(RowSelection::from(selectors))
            .build()?;
        let lengths: VecDeque<usize> = spans.iter().map(Range::len).collect();
        let state = (rows, lengths, Vec::<RecordBatch>::new(), schema);
        Ok(futures::stream::try_unfold(state, |(mut rows, mut lengths, mut rest, schema)| async move {
            let Some(wanted) = lengths.pop_front() else { return Ok(None) };
            let mut have: usize = rest.iter().map(RecordBatch::num_rows).sum();
            while have < wanted {
                let batch = rows.try_next().await?.context("a pack ends before its footer says")?;
                let batch = RecordBatch::try_new(Arc::clone(&schema), batch.columns().to_vec())?;
                have += batch.num_rows();
                rest.push(batch);
            }
            let all = concat_batches(&schema, &rest)?;
            let (batch, rest) = (all.slice(0, wanted), all.slice(wanted, have - wanted));
            Ok(Some((batch, (rows, lengths, vec![rest], schema))))
        })
        .boxed())
    }
}

type PacksOfHour = (Timestamp, Vec<Arc<Pack>>);
/// Rows of a pack, and which of the segments asked for they are.
type Wanted = Vec<(Range<usize>, usize)>;

/// Reads segments wherever their rows are. Clones share what is known of packs.
#[derive(Clone, Debug)]
pub struct Segments {
    store: Store,
    /// The packs of the hours that were asked for last.
    hours: Arc<Mutex<VecDeque<PacksOfHour>>>,
}

impl Segments {
    /// Of the lake in `store`.
    pub fn new(store: &Store) -> Self {
        Self { store: store.clone(), hours: Arc::default() }
    }

    /// The rows of each of these segments; `None` for those that bronze does not hold, or no longer.
    ///
    /// # Errors
    /// The store's, or an object that cannot be read.
    pub async fn read(&self, paths: &[String]) -> anyhow::Result<Vec<Option<RecordBatch>>> {
        let mut found: Vec<Option<RecordBatch>> = futures::stream::iter(paths.to_vec())
            .map(|path| async move {
                let known = SegmentName::parse(&path).is_some_and(|name| self.known(name).is_some());
                if known { Ok(None) } else { object(self.store.objects().as_ref(), &path).await }
            })
            .buffered(READ_AHEAD)
            .try_collect()
            .await?;
        let mut of_packs: BTreeMap<Path, (Arc<Pack>, Wanted)> = BTreeMap::new();
        for (at, path) in paths.iter().enumerate().filter(|(at, _)| found[*at].is_none()) {
            let name = SegmentName::parse(path).with_context(|| format!("{path} is no path of a segment"))?;
            if let Some((pack, span)) = self.locate(name).await? {
                let (_, spans) = of_packs.entry(pack.path.clone()).or_insert_with(|| (pack, Vec::new()));
                spans.push((span, at));
            }
        }
        for (pack, mut wanted) in of_packs.into_values() {
            wanted.sort_by_key(|(span, _)| span.start);
            let spans: Vec<Range<usize>> = wanted.iter().map(|(span, _)| span.clone()).collect();
            let mut rows = pack.read(&self.store, &spans)?;
            for (_, at) in wanted {
                found[at] = rows.try_next().await.with_context(|| format!("reading {}", pack.path))?;
            }
        }
        Ok(found)
    }

    /// The pack that holds a segment, and which of its rows.
    async fn locate(&self, name: SegmentName) -> anyhow::Result<Option<(Arc<Pack>, Range<usize>)>> {
        if let Some(found) = self.known(name) {
            return Ok(Some(found));
        }
        let mut packs = Vec::new();
        for (name, size) in Hour::list(&self.store, name.hour).await?.packs {
            packs.push(Arc::new(Pack::open(&self.store, &name, size).await?));
        }
        let mut hours = self.hours.lock().unwrap_or_else(PoisonError::into_inner);
        hours.retain(|(hour, _)| *hour != name.hour);
        if hours.len() == HOURS {
            hours.pop_front();
        }
        hours.push_back((name.hour, packs));
        drop(hours);
        Ok(self.known(name))
    }

    fn known(&self, name: SegmentName) -> Option<(Arc<Pack>, Range<usize>)> {
        let hours = self.hours.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, packs) = hours.iter().find(|(hour, _)| *hour == name.hour)?;
        packs.iter().find_map(|pack| {
            let at = pack.segments.binary_search_by_key(&name, |(name, _)| *name).ok()?;
            Some((Arc::clone(pack), pack.segments[at].1.clone()))
        })
    }
}
