//! The outbox: sealed messages on disk until their next owner has them, and what the agent counted.
//!
//! # Layout
//!
//! ```text
//! {dir}/control/ anomalies/ aggregates/ readings/    a lane each, made of generations (generation.rs)
//! {dir}/quarantine/{lane}-{number}/                   generations that could not be read
//! {dir}/trash/                                        generations on their way out; emptied at open
//! {dir}/lock  reserve                                 one process at a time; room for the control lane (room.rs)
//! {dir}/clock.json                                    what provisional times are (boots.rs)
//! ```
//!
//! Every lane numbers its messages by an index without holes over all epochs; seq is counted per epoch, and a
//! lane's state maps one to the other. Messages are never rewritten and never removed singly: a generation is
//! closed at `generation_bytes` and leaves as a directory once all of its messages are forgotten, so disk is
//! given back.
//!
//! # Invariants
//!
//! * **Durable on return.** [`Outbox::append`] makes one commit and one fsync per lane that it touches: one for
//!   readings alone. Messages count once the lane's state says so, which is written after them and together with
//!   their census; the caller's metadata and [`Outbox::last_event_time`] go into the last one, so they are never
//!   ahead of the messages.
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
//!   manifest of the generation that is written is renewed once a minute, and before its counts are declared; what
//!   was sealed after that is covered by the `interruption` of the epoch. A manifest that cannot be read is made
//!   again from its database; where both are damaged the neighbours tell what is gone.
//! * **A full disk stops nothing but the sealing** ([`OutboxError::Full`]); see room.rs.
//! * **A message waits while its machine's clock was never set**, and gets its true times as it leaves, by what
//!   `clock.json` says; what lies on the disk is not changed. [`Outbox::heads`] and [`Outbox::page`] end before what
//!   waits; what is counted and declared in the meantime waits too. Provisional times are not judged by age.
//! * **The backlog is never in memory**: per lane two open databases with small caches, and the state.

pub mod boots;
mod control;
mod core;
mod generation;
mod inspect;
mod lane;
mod lock;
mod ranges;
mod room;
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
    wire::{Lane, SENDER_BYTES},
};
use tokio::sync::Notify;
use uuid::Uuid;

use self::{
    core::Core,
    lane::{EpochState, LaneStore},
};
pub use self::{
    generation::Message,
    inspect::{Checked, Finding, GenerationView, Inspection, SpanView, Standing},
    ranges::RangeSet,
};
use crate::{seal::Draft, settings::OutboxSettings};

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
            // The uplink adds the sender's names.
            max_message_bytes: settings.max_message_bytes.saturating_sub(SENDER_BYTES),
            census_every: settings.census_every,
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
    /// The disk is full, with nothing left that could give way. Nothing was accepted; the same may be tried again.
    #[error(
        "outbox at {path}: {free} B are free on the disk, {needed} B are needed and nothing is left to give way; \
         make room on it", path = path.display()
    )]
    Full {
        /// Where.
        path: PathBuf,
        /// Free besides the reserve.
        free: u64,
        /// What an append may need.
        needed: u64,
    },
    /// Another process has this outbox open.
    #[error("the outbox at {path} is in use by another process; stop that agent first", path = .0.display())]
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
    /// Index of the next message per lane, or of the first that waits for the clock; readable without waiting for
    /// the disk.
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

    /// Index after the last message that may be sent of every lane, in the order of [`Lane::ALL`]. Does not block.
    pub fn heads(&self) -> [u64; 4] {
        std::array::from_fn(|lane| self.0.heads[lane].load(Ordering::Acquire))
    }

    fn announce(&self, core: &Core) {
        for (head, lane) in self.0.heads.iter().zip(Lane::ALL) {
            head.store(core.released(lane), Ordering::Release);
        }
        self.0.appended.notify_one();
    }

    /// Highest true event time of all drafts so far, those of earlier runs included.
    pub fn last_event_time(&self) -> Option<Timestamp> {
        let last = self.core().lanes.iter().filter_map(|lane| lane.state.last_event).max();
        last.filter(|at| !at.is_provisional())
    }

    /// An instant that the run before has kept in its metadata, as this run says it; `None` where it counts from a
    /// start of the machine of which no more is known.
    pub fn settle_kept(&self, at: Timestamp) -> Option<Timestamp> {
        self.core().times.settle_kept(at)
    }

    /// Latest true time that the newest manifests in `dir` know: about a minute before the outbox was last written
    /// to. Opens no database.
    pub fn last_noted(dir: &Path) -> Option<Timestamp> {
        let noted = Lane::ALL.into_iter().filter_map(|lane| LaneStore::last_noted(dir, lane));
        noted.filter(|at| !at.is_provisional()).max()
    }

    /// When the outbox in `dir` was last written to, by the clock of its run; `None` for a new one. For a clock that
    /// goes on from there; the outbox must not be open.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn last_sealed(dir: &Path) -> Result<Option<Timestamp>, OutboxError> {
        if dir.exists() { Ok(Inspection::open(dir)?.last_sealed()) } else { Ok(None) }
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

    /// Sets a generation aside that was found to be damaged, and declares what was held of it; nothing where there
    /// is no such generation.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn set_aside(&self, lane: Lane, number: u64, now: Timestamp) -> Result<(), OutboxError> {
        let mut core = self.core();
        core.set_aside(lane, number, now)?;
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
                messages: store.held(),
                next: state.next,
                oldest_sealed: store.oldest_sealed(),
                epochs: open.map(status).collect(),
            }
        };
        Lane::ALL.iter().zip(&core.lanes).map(view).collect()
    }

    /// Whether nobody else holds this outbox, so that dropping it closes its databases.
    pub fn is_last_handle(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        // Memory follows the disk only after a commit, so it is sound even if a holder panicked.
        self.0.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
