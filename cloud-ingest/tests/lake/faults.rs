//! A store that fails once, at any moment: the lake ends with the same rows.

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use futures::{StreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory, path::Path,
};

use super::*;

/// What happens to one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// An error, and nothing is done.
    Refused,
    /// It is done, and the answer is lost.
    Lost,
    /// It is done, the answer is lost, and the client's own retry finds it done.
    Repeated,
}

/// Memory behind a line that fails at call `at`.
#[derive(Debug)]
struct Faulty {
    memory: InMemory,
    calls: AtomicU64,
    at: u64,
    fault: Fault,
}

impl Faulty {
    fn new(at: u64, fault: Fault) -> Faulty {
        Faulty { memory: InMemory::new(), calls: AtomicU64::new(0), at, fault }
    }

    /// Whether the fault has come.
    fn has_failed(&self) -> bool {
        self.calls.load(Ordering::Relaxed) > self.at
    }

    /// Counts a call that changes something; what is to become of it.
    fn write(&self) -> Option<Fault> {
        (self.calls.fetch_add(1, Ordering::Relaxed) == self.at).then_some(self.fault)
    }

    /// Counts a call that only reads, if those are to fail: for them all faults are one.
    fn read(&self) -> Result<()> {
        match self.fault {
            Fault::Refused => self.write().map_or(Ok(()), |_| Err(error())),
            Fault::Lost | Fault::Repeated => Ok(()),
        }
    }
}

fn error() -> Error {
    Error::Generic { store: "Faulty", source: "the line is cut".into() }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let fault = self.write();
        let create = matches!(opts.mode, PutMode::Create);
        if fault == Some(Fault::Refused) {
            return Err(error());
        }
        let put = self.memory.put_opts(location, payload, opts).await?;
        match fault {
            Some(Fault::Lost) => Err(error()),
            Some(Fault::Repeated) if create => {
                Err(Error::AlreadyExists { path: location.to_string(), source: "by itself".into() })
            }
            _ => Ok(put),
        }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        // An upload that is not completed leaves nothing behind.
        if self.write().is_some() {
            return Err(error());
        }
        self.memory.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.read()?;
        self.memory.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<bytes::Bytes>> {
        self.read()?;
        self.memory.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.memory.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.read() {
            Ok(()) => self.memory.list(prefix),
            Err(e) => futures::stream::once(async { Err(e) }).boxed(),
        }
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.read() {
            Ok(()) => self.memory.list_with_offset(prefix, offset),
            Err(e) => futures::stream::once(async { Err(e) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.read()?;
        self.memory.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.memory.copy_opts(from, to, options).await
    }
}

/// From bronze to silver as the program does it, beginning anew after an error. Returns silver, or nothing if
/// the fault has not come by then.
async fn through(faulty: &Arc<Faulty>) -> Option<String> {
    let root: Arc<dyn ObjectStore> = Arc::clone(faulty) as _;
    let store = Store::over(root, "memory:///".parse().unwrap()).unwrap();
    for (number, messages) in (0..).zip(segments()) {
        if let Err(e) = try_put(&store, 1, number, &messages).await {
            assert!(faulty.has_failed(), "{e}");
            put(&store, number, &messages).await;
        }
    }
    let tables = match Tables::open(&store).await {
        Ok(tables) => tables,
        Err(_) => Tables::open(&store).await.unwrap(),
    };
    let mut refiner = refiner(&store, &tables);
    let mut errors = Vec::new();
    loop {
        match refiner.step(now(), true).await {
            Ok(Outcome::Idle) => break,
            Ok(Outcome::Refined(_)) => {}
            Err(e) => errors.push(format!("{e:#}")),
        }
        assert!(errors.len() <= 1, "one fault, one error: {errors:#?}");
    }
    if !faulty.has_failed() {
        return None;
    }
    Some(everything(&Tables::open(&store).await.unwrap()).await)
}

/// Every call of a run fails in turn.
async fn at_every_call(fault: Fault) {
    let straight = straight().await;
    let mut at = 0;
    loop {
        let faulty = Arc::new(Faulty::new(at, fault));
        let Some(silver) = through(&faulty).await else { break };
        assert_eq!(silver, straight, "{fault:?} at call {at}");
        at += 1;
    }
    println!("{fault:?}: {at} calls");
    // Five segments, two plans, the rules, and for each table at least a creation, a file and a commit.
    assert!(at > 30, "only {at} calls failed");
}

#[tokio::test]
async fn a_call_that_fails_anywhere_changes_nothing() {
    at_every_call(Fault::Refused).await;
}

#[tokio::test]
async fn an_answer_that_is_lost_anywhere_changes_nothing() {
    at_every_call(Fault::Lost).await;
}

#[tokio::test]
async fn a_put_that_finds_itself_done_changes_nothing() {
    at_every_call(Fault::Repeated).await;
}
