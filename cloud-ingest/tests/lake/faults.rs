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
use futures::{StreamExt, future::BoxFuture, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory, path::Path,
};

use super::{
    quarantine::{ALL, held_lake, judge, judged_straight},
    *,
};

/// What happens to one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// An error, and nothing is done.
    Refused,
    /// It is done, and the answer is lost.
    Lost,
    /// It is done, the answer is lost, and the client's own retry finds it done.
    Repeated,
    /// It is done, but just before it another refiner has done all there is to do.
    Overtaken,
    /// The process ends before it: nothing after it is done either, and another process goes on.
    Killed,
    /// Something cannot be read. The faults above befall what writes.
    Unread,
}

/// What fails on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// From bronze to silver.
    Refine,
    /// Quarantine is judged again.
    Judge,
}

/// Memory behind a line that fails at call `at` of those that can meet the fault.
#[derive(Debug)]
pub(super) struct Faulty {
    memory: Arc<InMemory>,
    calls: AtomicU64,
    at: u64,
    fault: Fault,
    /// What the others do who overtake.
    others: fn(Store) -> BoxFuture<'static, ()>,
}

impl Faulty {
    pub(super) fn new(at: u64, fault: Fault) -> Faulty {
        Faulty { memory: Arc::default(), calls: AtomicU64::new(0), at, fault, others: refine_it }
    }

    /// Over what is there already.
    pub(super) fn over(
        memory: Arc<InMemory>,
        at: u64,
        fault: Fault,
        others: fn(Store) -> BoxFuture<'static, ()>,
    ) -> Faulty {
        Faulty { memory, others, ..Faulty::new(at, fault) }
    }

    /// Whether the fault has come.
    pub(super) fn has_failed(&self) -> bool {
        self.calls.load(Ordering::Relaxed) > self.at
    }

    /// Counts a call that writes; what is to become of it.
    fn write(&self) -> Option<Fault> {
        (self.fault != Fault::Unread && self.is_next()).then_some(self.fault)
    }

    /// Counts a call that reads.
    fn read(&self) -> Result<()> {
        if self.is_dead() {
            return Err(error());
        }
        if self.fault == Fault::Unread && self.is_next() { Err(error()) } else { Ok(()) }
    }

    fn is_dead(&self) -> bool {
        self.fault == Fault::Killed && self.has_failed()
    }

    fn is_next(&self) -> bool {
        self.calls.fetch_add(1, Ordering::Relaxed) == self.at
    }

    /// The lake without the line.
    pub(super) fn behind(&self) -> Store {
        Store::over(Arc::clone(&self.memory) as _, "memory:///".parse().unwrap()).unwrap()
    }
}

fn refine_it(store: Store) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let tables = Tables::open(&store).await.unwrap();
        refine_all(&mut refiner(&store, &tables)).await;
    })
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
        match fault {
            Some(Fault::Refused) => return Err(error()),
            _ if self.is_dead() => return Err(error()),
            Some(Fault::Overtaken) => (self.others)(self.behind()).await,
            _ => {}
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
        // Nothing here writes files so large that an error could fall into the middle of them.
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
    let whole = matches!(faulty.fault, Fault::Overtaken | Fault::Killed);
    if whole {
        // All of it, so that both refiners make the same plans.
        fill(&faulty.behind()).await;
    }
    for (number, messages) in (0..).zip(segments()).filter(|_| !whole) {
        if let Err(e) = try_put(&store, 1, number, &messages).await {
            assert!(faulty.has_failed(), "{e}");
            put(&store, number, &messages).await;
        }
    }
    let mut errors = Vec::new();
    'life: for store in [store, faulty.behind()] {
        let tables = match Tables::open(&store).await {
            Ok(tables) => tables,
            Err(_) if faulty.is_dead() => continue,
            Err(_) => Tables::open(&store).await.unwrap(),
        };
        let mut refiner = refiner(&store, &tables);
        loop {
            match refiner.step(now(), true).await {
                Ok(Outcome::Idle) => break 'life,
                Ok(Outcome::Refined(_)) => {}
                Err(_) if faulty.is_dead() => break,
                Err(e) => errors.push(format!("{e:#}")),
            }
            assert!(errors.len() <= 1, "one fault, one error: {errors:#?}");
        }
    }
    if !faulty.has_failed() {
        return None;
    }
    Some(everything(&Tables::open(&faulty.behind()).await.unwrap()).await)
}

/// The same of a lake whose quarantine is judged again.
async fn judged(faulty: &Arc<Faulty>) -> Option<String> {
    let behind = faulty.behind();
    held_lake(&behind).await;
    let root: Arc<dyn ObjectStore> = Arc::clone(faulty) as _;
    let store = Store::over(root, "memory:///".parse().unwrap()).unwrap();
    let mut opened = Tables::open(&store).await;
    if opened.is_err() && !faulty.is_dead() {
        opened = Tables::open(&store).await;
    }
    if let Ok(tables) = opened {
        let mut judge = judge(&store, &tables);
        let died = async {
            while !faulty.is_dead() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            done = judge.replay_quarantine(&ALL, now()) => drop(done.unwrap()),
            () = died => {}
        }
    }
    // A refiner with the old rules finishes what was put. If nothing was, it is judged now.
    let tables = Tables::open(&behind).await.unwrap();
    let mut old = refiner(&behind, &tables);
    refine_all(&mut old).await;
    if faulty.is_dead() && old.newest() == 3 {
        judge(&behind, &tables).replay_quarantine(&ALL, now()).await.unwrap();
    }
    faulty.has_failed().then_some(())?;
    Some(everything(&tables).await)
}

/// Every `stride`-th call of a run fails in turn.
async fn at_any_call(work: Work, fault: Fault, stride: u64) {
    let straight = match work {
        Work::Refine => straight().await,
        Work::Judge => judged_straight().await,
    };
    let mut at = 0;
    loop {
        let faulty = Arc::new(Faulty::new(at, fault));
        let silver = match work {
            Work::Refine => through(&faulty).await,
            Work::Judge => judged(&faulty).await,
        };
        let Some(silver) = silver else { break };
        assert_eq!(silver, straight, "{fault:?} at call {at}");
        at += stride;
    }
    // Two plans, and for most tables a creation, files and commits; or one plan, and few tables.
    let least = if work == Work::Refine { 20 } else { 6 };
    assert!(at > least, "only {at} calls could fail");
}

#[tokio::test]
async fn a_write_that_fails_changes_nothing() {
    at_any_call(Work::Refine, Fault::Refused, 1).await;
}

#[tokio::test]
async fn an_answer_that_is_lost_changes_nothing() {
    at_any_call(Work::Refine, Fault::Lost, 1).await;
}

#[tokio::test]
async fn a_put_that_finds_itself_done_changes_nothing() {
    at_any_call(Work::Refine, Fault::Repeated, 1).await;
}

#[tokio::test]
async fn a_refiner_that_is_overtaken_changes_nothing() {
    at_any_call(Work::Refine, Fault::Overtaken, 1).await;
}

#[tokio::test]
async fn a_read_that_fails_changes_nothing() {
    at_any_call(Work::Refine, Fault::Unread, 11).await;
}

#[tokio::test]
async fn a_refiner_that_is_killed_changes_nothing() {
    at_any_call(Work::Refine, Fault::Killed, 1).await;
}

#[tokio::test]
async fn quarantine_is_judged_once_whatever_cannot_be_written() {
    at_any_call(Work::Judge, Fault::Refused, 1).await;
    at_any_call(Work::Judge, Fault::Repeated, 1).await;
}

#[tokio::test]
async fn quarantine_is_judged_once_whatever_is_not_known() {
    at_any_call(Work::Judge, Fault::Lost, 1).await;
    at_any_call(Work::Judge, Fault::Overtaken, 1).await;
}

#[tokio::test]
async fn quarantine_is_judged_once_by_whoever_lives() {
    at_any_call(Work::Judge, Fault::Killed, 1).await;
    at_any_call(Work::Judge, Fault::Unread, 7).await;
}

/// The process ends between a put and its acknowledgements: the broker gives everything to another replica, which
/// cuts it into other segments.
#[tokio::test]
async fn what_was_put_and_not_acknowledged_comes_again_and_changes_nothing() {
    let readings = "select site, device_id, ts, value, unit, quality, segment from silver.sensor_readings \
                    order by site, device_id, ts";
    let mut silver = Vec::new();
    for (again, refined_between) in [(false, false), (true, false), (true, true)] {
        let store = Store::open("memory:///").unwrap();
        let tables = Tables::open(&store).await.unwrap();
        fill(&store).await;
        if refined_between {
            refine_all(&mut refiner(&store, &tables)).await;
        }
        let before = ask(&tables, "select 1 from silver.messages where not redelivered").await;
        if again {
            let all = segments().into_iter().flatten().map(|message| Message { dup: true, ..message });
            let (first, second): (Vec<_>, Vec<_>) = all.enumerate().partition(|(n, _)| n % 2 == 0);
            for (number, messages) in [(0, first), (1, second)] {
                let messages: Vec<Message> = messages.into_iter().map(|(_, message)| message).collect();
                try_put(&store, 2, number, &messages).await.unwrap();
            }
        }
        let counts = refine_all(&mut refiner(&store, &tables)).await;
        assert_eq!(counts.readings, counts.stored + counts.duplicates + counts.quarantined);
        if refined_between {
            assert_eq!(counts.stored, 0);
            // The message of JSON has no name: it is another one, of duplicates.
            let after = ask(&tables, "select 1 from silver.messages where not redelivered").await;
            assert_eq!(after.lines().count(), before.lines().count() + 1);
        }
        silver.push(ask(&tables, readings).await);
        let audit = cloud_ingest::ledger::audit(&tables, now()).await.unwrap();
        assert!(audit.balances(), "{audit}");
    }
    assert_eq!(silver[1], silver[0]);
    assert_eq!(silver[2], silver[0]);
}
