//! A Parquet object that is read in ranges.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use futures::{FutureExt, TryFutureExt, future::BoxFuture};
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use parquet::{
    arrow::{arrow_reader::ArrowReaderOptions, async_reader::AsyncFileReader},
    errors::{ParquetError, Result},
    file::metadata::{PageIndexPolicy, ParquetMetaData, ParquetMetaDataReader},
};

/// A Parquet object whose size is known.
pub(crate) struct Ranged {
    pub(crate) objects: Arc<dyn ObjectStore>,
    pub(crate) path: Path,
    pub(crate) size: u64,
    /// Bytes at the end that are fetched at once: they mostly hold the footer, and where the pages are.
    pub(crate) tail: usize,
}

impl Ranged {
    /// Its footer, with where its pages are, and what it says of each of them as asked.
    pub(crate) async fn footer(&mut self, of_pages: PageIndexPolicy) -> Result<ParquetMetaData> {
        let size = self.size;
        let reader = ParquetMetaDataReader::new()
            .with_prefetch_hint(Some(self.tail))
            .with_offset_index_policy(PageIndexPolicy::Optional)
            .with_column_index_policy(of_pages);
        reader.load_and_finish(self, size).await
    }
}

impl AsyncFileReader for Ranged {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes>> {
        self.objects.get_range(&self.path, range).map_err(external).boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>>> {
        async move { self.objects.get_ranges(&self.path, &ranges).await.map_err(external) }.boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        _: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>>> {
        self.footer(PageIndexPolicy::Skip).map_ok(Arc::new).boxed()
    }
}

fn external(error: object_store::Error) -> ParquetError {
    ParquetError::External(error.into())
}
