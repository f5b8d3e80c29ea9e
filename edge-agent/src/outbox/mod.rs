//! The outbox: sealed messages on disk until their next owner has them, and what the agent counted.
//!
//! # Layout
//!
//! ```text
//! {dir}/control/ anomalies/ aggregates/ readings/    a lane each, made of generations (generation.rs)
//! {dir}/quarantine/{lane}-{number}/                   generations that could not be read
//! {dir}/trash/                                        generations on their way out; emptied at open
//! ```
//!
//! Every lane numbers its messages by an index without holes over all epochs; seq is counted per epoch, and a
//! lane's state maps one to the other. Messages are never rewritten and never removed singly: a generation is
//! closed at `generation_bytes` and leaves as a directory once all of its messages are forgotten, so disk is
//! given back.
//!
//! # Invariants
//!
//! * **Durable on return.** [`Outbox::append`] makes one sled transaction and one fsync per lane that it touches:
//!   one for readings alone. Messages, their census, and the lane's state are one transaction; the caller's
//!   metadata and [`Outbox::last_event_time`] go into the last one, so they are never ahead of the messages.
//! * **Declared once.** Counts wait in the state of the lane that they came with, under a number. The control
//!   message that declares them and the number that it declares are one transaction in the control lane; after a
//!   crash, counts with a declared number are not declared again. Counts are declared every `census_every` of
//!   real time, at [`Outbox::close`], and for the epoch before at [`Outbox::open`].
//! * **`sealed` is counted here**, per hour of event time, from the rows of the readings lane.
//! * **Forgetting is lazy.** It is noted in memory at once and on the disk with the lane's next write or once a
//!   minute. A crash may send a message again, never lose one.
//! * **Dropped means declared.** A gap is durable in the control lane before the data of its messages goes. The
//!   control lane itself does not count towards `max_bytes` and is never dropped.
//! * **A damaged generation costs only itself**: it is set aside and declared as a gap from its manifest. The
//!   manifest of the generation that is written is renewed once a minute; what was sealed after that is covered
//!   by the `interruption` of the epoch.
//! * **The backlog is never in memory**: per lane two open databases with small caches, and the state.

mod control;
mod core;
mod generation;
mod lane;
mod ranges;
#[cfg(test)]
mod tests;

use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arrow::error::ArrowError;
use common::{
    documents::{AckRange, LaneStatus},
    time::Timestamp,
    wire::Lane,
};
use tokio::sync::Notify;
use uuid::Uuid;

use self::{
    core::Core,
    lane::{EpochState, LaneStore},
};
pub use self::{generation::Message, ranges::RangeSet};
use crate::{seal::Draft, settings::OutboxSettings};

/// Counts are declared this often, so that the ledger compares totals that are a minute old at most.
const CENSUS_EVERY: Duration = Duration::from_secs(60);

/// How much the outbox may hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes on disk, control lane not counted.
    pub max_bytes: u64,
    /// Generations whose newest message is older give way.
    pub max_age: Duration,
    /// Bytes that stay free on the disk.
    pub min_free_disk: u64,
    /// A generation is closed at so many bytes of messages.
    pub generation_bytes: u64,
    /// A batch that encodes to more is cut into several messages.
    pub max_message_bytes: usize,
    /// Counts are declared this often, in real time.
    pub census_every: Duration,
}

impl From<&OutboxSettings> for Limits {
    fn from(settings: &OutboxSettings) -> Self {
        Self {
            max_bytes: settings.max_bytes,
            max_age: settings.max_age,
            min_free_disk: settings.min_free_disk,
            generation_bytes: settings.generation_bytes,
            max_message_bytes: settings.max_message_bytes,
            census_every: CENSUS_EVERY,
        }
    }
}

/// Why the outbox cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum OutboxError {
    /// The disk or the file system refuses. Nothing that was accepted is lost; stop and start again.
    #[error("outbox at {path}: {source}; see that the disk is mounted, writable and not full", path = path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A generation cannot be read. [`Outbox::open`] sets it aside and declares what was in it.
    #[error("outbox generation {path}: {problem}; start the agent again to set it aside", path = path.display())]
    Corrupt {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Another process has this outbox open.
    #[error("outbox at {path} is in use by another process; stop that agent first", path = .0.display())]
    Locked(PathBuf),
    /// A batch has columns that cannot be written.
    #[error("encoding a message: {0}")]
    Encode(#[from] ArrowError),
    /// It was closed; a new epoch needs a new [`Outbox::open`].
    #[error("the outbox is closed; nothing can be appended to an epoch that has ended")]
    Closed,
}

impl OutboxError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }

    fn corrupt(path: &Path, problem: &str) -> Self {
        Self::Corrupt { path: path.to_owned(), problem: problem.to_owned() }
    }
}

/// Where a lane stands, for `status`, metrics and people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneView {
    /// The queue.
    pub lane: Lane,
    /// Bytes on disk.
    pub bytes: u64,
    /// Messages held.
    pub messages: u64,
    /// Index of the next message.
    pub next: u64,
    /// When the oldest generation that still holds something was begun.
    pub oldest_sealed: Option<Timestamp>,
    /// The present epoch and those of which something is held.
    pub epochs: Vec<LaneStatus>,
}

/// What an `ack` document means here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Located {
    /// Indices by lane that this outbox sealed.
    pub ranges: Vec<(Lane, Range<u64>)>,
    /// Ranges, or parts of them, that it never sealed or knows no more.
    pub unknown: u64,
}

/// A cheap handle; all methods block on the disk or on each other, so async code calls them from
/// `spawn_blocking`.
#[derive(Clone, Debug)]
pub struct Outbox(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    epoch: Uuid,
    core: Mutex<Core>,
    appended: Notify,
    /// Index of the next message per lane, readable without waiting for the disk.
    heads: [AtomicU64; 4],
}

impl Outbox {
    /// Opens the outbox in `dir`, begins a new epoch and closes the one before: counts that were not declared,
    /// its `closing` records and, when it did not stop cleanly, an `interruption`. Generations that cannot be
    /// opened are set aside and declared.
    ///
    /// # Errors
    /// When the directory cannot be written or another process has it.
    pub fn open(dir: &Path, limits: Limits, now: Timestamp) -> Result<Outbox, OutboxError> {
        let core = Core::open(dir, limits, now)?;
        let (epoch, appended, heads) = (core.epoch, Notify::new(), Default::default());
        let outbox = Outbox(Arc::new(Shared { epoch, core: Mutex::new(core), appended, heads }));
        outbox.announce(&outbox.core());
        Ok(outbox)
    }

    /// The present run of the agent.
    pub fn epoch(&self) -> Uuid {
        self.0.epoch
    }

    /// Seals the drafts into messages, with their census and the caller's metadata. Durable on return. A draft
    /// without rows only brings its census.
    ///
    /// # Errors
    /// Nothing, or a part that is whole in itself (drafts of some lanes with their census), was accepted; the
    /// caller stops and starts again.
    pub fn append(
        &self,
        now: Timestamp,
        drafts: Vec<Draft>,
        meta: &[(&str, Vec<u8>)],
    ) -> Result<(), OutboxError> {
        let mut core = self.core();
        core.append(now, &drafts, meta)?;
        self.announce(&core);
        Ok(())
    }

    /// Ends once something was appended or declared since the last call; one waiter.
    pub async fn appended(&self) {
        self.0.appended.notified().await;
    }

    /// Index of the next message of every lane, in the order of [`Lane::ALL`]. Does not block.
    pub fn heads(&self) -> [u64; 4] {
        std::array::from_fn(|lane| self.0.heads[lane].load(Ordering::Acquire))
    }

    fn announce(&self, core: &Core) {
        for (head, lane) in self.0.heads.iter().zip(&core.lanes) {
            head.store(lane.state.next, Ordering::Release);
        }
        self.0.appended.notify_one();
    }

    /// Highest event time of all drafts so far, those of earlier runs included.
    pub fn last_event_time(&self) -> Option<Timestamp> {
        self.core().lanes.iter().filter_map(|lane| lane.state.last_event).max()
    }

    /// When the outbox in `dir` was last written to, by the clock of its run; `None` for a new one. For a clock that
    /// goes on from there; the outbox must not be open.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn last_sealed(dir: &Path) -> Result<Option<Timestamp>, OutboxError> {
        if !dir.exists() {
            return Ok(None);
        }
        let mut last = None;
        for lane in Lane::ALL {
            last = last.max(LaneStore::open(dir, lane)?.0.state.at);
        }
        Ok(last)
    }

    /// What was last appended under `key`.
    ///
    /// # Errors
    /// None at present; the caller treats one as it treats those of [`Self::append`].
    pub fn get_meta(&self, key: &str) -> Result<Option<Vec<u8>>, OutboxError> {
        Ok(self.core().meta.get(key).map(|(_, value)| value.clone()))
    }

    /// Ends the epoch: declares its last counts and its `closing` records. Delivery may go on; a second call
    /// does nothing.
    ///
    /// # Errors
    /// When the disk refuses; the next open then closes the epoch.
    pub fn close(&self, now: Timestamp) -> Result<(), OutboxError> {
        let mut core = self.core();
        core.close(now)?;
        self.announce(&core);
        Ok(())
    }

    /// What is due with time: declares counts, drops what is too old, renews manifests, notes what was
    /// forgotten. To be called about once a minute, and after the last [`Self::forget`].
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn upkeep(&self, now: Timestamp) -> Result<(), OutboxError> {
        let mut core = self.core();
        core.upkeep(now)?;
        self.announce(&core);
        Ok(())
    }

    /// Held messages of a lane from index `from` on, ascending: at most `max`, and about `max_bytes` of payload.
    /// Empty when none is held from there on.
    ///
    /// # Errors
    /// When the disk refuses. A damaged generation is set aside, declared, and skipped.
    pub fn page(
        &self,
        lane: Lane,
        from: u64,
        max: usize,
        max_bytes: usize,
        now: Timestamp,
    ) -> Result<Vec<Message>, OutboxError> {
        self.core().page(lane, from, max, max_bytes, now)
    }

    /// Forgets messages that are durable elsewhere.
    ///
    /// # Errors
    /// When a generation that is no longer needed cannot be removed.
    pub fn forget(&self, lane: Lane, range: Range<u64>) -> Result<(), OutboxError> {
        self.core().lane(lane).forget(range)
    }

    /// The indices that are held no more.
    pub fn forgotten(&self, lane: Lane) -> RangeSet {
        self.core().lane(lane).state.forgotten.clone()
    }

    /// Finds what an acknowledgement names.
    pub fn locate(&self, ranges: &[AckRange]) -> Located {
        let mut core = self.core();
        let mut located = Located::default();
        for range in ranges {
            let state = &core.lane(range.lane).state;
            let known = state.epochs.iter().find(|e| e.epoch == range.epoch).map(EpochState::range);
            let indices = known.as_ref().map_or(0..0, |known| {
                let at = |seq: u64| known.start.saturating_add(seq).min(known.end);
                at(range.from)..at(range.to.saturating_add(1))
            });
            let asked = range.to.saturating_add(1).saturating_sub(range.from);
            if indices.end.saturating_sub(indices.start) < asked {
                located.unknown += 1;
            }
            if !indices.is_empty() {
                located.ranges.push((range.lane, indices));
            }
        }
        located
    }

    /// Every lane, in the order of [`Lane::ALL`].
    pub fn lanes(&self) -> Vec<LaneView> {
        let core = self.core();
        let view = |(lane, store): (&Lane, &LaneStore)| {
            let state = &store.state;
            let status = |e: &EpochState| LaneStatus {
                epoch: e.epoch,
                lane: *lane,
                head: e.head,
                rows: e.rows,
                oldest: store.oldest(e),
            };
            let present = store.present().epoch;
            let open = state.epochs.iter().filter(|e| e.epoch == present || store.oldest(e) < e.head);
            LaneView {
                lane: *lane,
                bytes: store.disk_bytes(),
                messages: state.forgotten.absent(0..state.next).iter().map(|r| r.end - r.start).sum(),
                next: state.next,
                oldest_sealed: store.oldest_sealed(),
                epochs: open.map(status).collect(),
            }
        };
        Lane::ALL.iter().zip(&core.lanes).map(view).collect()
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        // Memory follows the disk only after a commit, so it is sound even if a holder panicked.
        self.0.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
