//! A data file of a table, read in parts.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use futures::{FutureExt, TryFutureExt, future::BoxFuture};
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use parquet::{
    arrow::{arrow_reader::ArrowReaderOptions, async_reader::AsyncFileReader},
    errors::{ParquetError, Result},
    file::metadata::{PageIndexPolicy, ParquetMetaData, ParquetMetaDataReader},
};

/// Bytes at the end of a file that mostly hold its footer, and where its pages are.
const FOOTER: usize = 64 * 1024;

/// A data file whose size is known.
pub(crate) struct DataFile {
    store: Arc<dyn ObjectStore>,
    path: Path,
    size: u64,
}

impl DataFile {
    pub(crate) fn new(store: Arc<dyn ObjectStore>, path: Path, size: u64) -> Self {
        Self { store, path, size }
    }

    /// Its footer, with where its pages are, and what it says of each of them as asked.
    pub(super) async fn about(&mut self, of_pages: PageIndexPolicy) -> Result<ParquetMetaData> {
        let size = self.size;
        let reader = ParquetMetaDataReader::new()
            .with_prefetch_hint(Some(FOOTER))
            .with_offset_index_policy(PageIndexPolicy::Optional)
            .with_column_index_policy(of_pages);
        reader.load_and_finish(self, size).await
    }
}

impl AsyncFileReader for DataFile {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes>> {
        self.store.get_range(&self.path, range).map_err(|e| ParquetError::External(e.into())).boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>>> {
        let read = async move { self.store.get_ranges(&self.path, &ranges).await };
        read.map_err(|e| ParquetError::External(e.into())).boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        _options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>>> {
        self.about(PageIndexPolicy::Skip).map_ok(Arc::new).boxed()
    }
}
