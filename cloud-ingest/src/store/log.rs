//! A table's log, read with little memory.
//!
//! Delta's kernel opens up to a thousand entries of a log at once, and gives the decoder of each room for a thousand rows
//! of some sixty fields: 2 MB. Each hundredth commit reads a hundred entries for its checkpoint, so a table took 200 MB then.
//! Most entries have a few rows.

use std::{num::NonZeroUsize, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use delta_kernel::Engine;
use delta_kernel_engine::{DefaultEngineBuilder, executor::tokio::TokioMultiThreadExecutor};
use deltalake::{
    DeltaResult,
    kernel::{Version, transaction::TransactionError},
    logstore::{CommitOrBytes, LogStore, LogStoreConfig, LogStoreRef},
};
use object_store::ObjectStore;
use tokio::runtime::{Handle, RuntimeFlavor};
use uuid::Uuid;

/// Entries that are open at once; on a server each is a request.
const ENTRIES: NonZeroUsize = NonZeroUsize::new(32).unwrap();
/// Rows that are decoded together.
const ROWS: NonZeroUsize = NonZeroUsize::new(128).unwrap();

/// Another log, with an engine of its own.
pub(super) struct Log(pub(super) LogStoreRef);

#[async_trait]
impl LogStore for Log {
    fn name(&self) -> String {
        self.0.name()
    }

    async fn read_commit_entry(&self, version: Version) -> DeltaResult<Option<Bytes>> {
        self.0.read_commit_entry(version).await
    }

    async fn write_commit_entry(
        &self,
        version: Version,
        entry: CommitOrBytes,
        operation: Uuid,
    ) -> Result<(), TransactionError> {
        self.0.write_commit_entry(version, entry, operation).await
    }

    async fn abort_commit_entry(
        &self,
        version: Version,
        entry: CommitOrBytes,
        operation: Uuid,
    ) -> Result<(), TransactionError> {
        self.0.abort_commit_entry(version, entry, operation).await
    }

    async fn get_latest_version(&self, from: Version) -> DeltaResult<Version> {
        self.0.get_latest_version(from).await
    }

    fn object_store(&self, operation: Option<Uuid>) -> Arc<dyn ObjectStore> {
        self.0.object_store(operation)
    }

    fn root_object_store(&self, operation: Option<Uuid>) -> Arc<dyn ObjectStore> {
        self.0.root_object_store(operation)
    }

    fn engine(&self, operation: Option<Uuid>) -> Arc<dyn Engine> {
        let handle = Handle::current();
        if handle.runtime_flavor() != RuntimeFlavor::MultiThread {
            return self.0.engine(operation);
        }
        let engine = DefaultEngineBuilder::new(self.root_object_store(operation))
            .with_task_executor(Arc::new(TokioMultiThreadExecutor::new(handle)))
            .with_buffer_size(ENTRIES)
            .with_batch_size(ROWS);
        Arc::new(engine.build())
    }

    fn config(&self) -> &LogStoreConfig {
        self.0.config()
    }
}
