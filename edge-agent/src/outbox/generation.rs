//! One generation: a sled database in a directory of its own, with a manifest beside it.
//!
//! ```text
//! {lane}/{number}/            number: 8 decimal digits, ascending
//!   manifest.json             written by tmp + fsync + rename + fsync of the directory
//!   db, conf, snap.*, blobs/  sled's
//! ```
//!
//! | tree | key | value |
//! |---|---|---|
//! | `m` index of its first message (u64 BE) | index (u64 BE) | a message, see [`encode_message`] |
//! | default | `k` name | stamp (u64 BE) and the caller's bytes; over all lanes the highest stamp counts |
//! | default | `s` | the lane's [`State`] as JSON, rewritten by every batch |
//!
//! **Why many trees.** sled appends a change to its log, but writes a whole leaf again after ten changes to it, when
//! it splits, past 16 keys, and when it cleans a segment of its log. A leaf of more than a quarter of a segment goes to
//! a file in `blobs/`, which sled never syncs: a power cut would take messages that were accepted. Larger segments are
//! no way out, since sled fills the last one with zeroes whenever a database is opened. So a tree, of one leaf, takes at
//! most [`TREE_MESSAGES`] messages and [`LEAF_BYTES`].
//!
//! **Commit.** sled's log is recovered as a prefix, and the state is written after the messages that it counts, so
//! a crash between the two leaves messages that do not count; their trees are dropped when their places are taken.
//! sled's `flush` ends in `sync_file_range`, which does not reach the disk's platter, so every commit is followed by
//! `fdatasync` through a second handle on `db`.
//!
//! **Damage.** sled has a checksum on every entry of its log and repairs a damaged log by cutting it: a hole in the
//! indices is therefore taken for corruption, just like an error or a panic of sled.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write},
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use bytes::Bytes;
use common::{
    time::Timestamp,
    wire::{ClockState, Identity, Lane, VERSION},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::{OutboxError, lane::State};

/// sled's page cache for one generation, in bytes; at most two a lane are open.
const CACHE_BYTES: u64 = 2 * 1024 * 1024;
/// Bytes of a segment of sled's log.
const SEGMENT_BYTES: usize = 512 * 1024;
/// Bytes of the messages in a tree: with sled's own they stay below a quarter of a segment.
const LEAF_BYTES: usize = SEGMENT_BYTES / 4 - 1024;
/// Longest payload of a message.
pub(super) const MAX_PAYLOAD: usize = LEAF_BYTES - HEAD;
/// Messages in a tree.
const TREE_MESSAGES: usize = 8;
/// How often a generation that another handle still holds is tried again, 20 ms apart.
const LOCK_TRIES: u32 = 100;
/// Version of the record format and of the manifest.
const FORMAT: u8 = 1;
/// Length of a record's fixed head: format, epoch, seq, rows, rows_before, sealed_at, clock.
const HEAD: usize = 1 + 16 + 4 * 8 + 1;

/// What is known of a generation without its database.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// Format, 1.
    pub(super) v: u8,
    /// Whether nothing is added any more.
    pub(super) closed: bool,
    /// Its messages, in order of index; one entry per epoch.
    pub(super) spans: Vec<Span>,
    /// Bytes of its messages.
    pub(super) bytes: u64,
    /// The lane when this was written.
    pub(super) state: State,
}

/// Messages of one epoch in a generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Span {
    pub(super) epoch: Uuid,
    /// Index of the first one.
    pub(super) first: u64,
    /// Seq of the first one.
    pub(super) first_seq: u64,
    /// Rows of each.
    pub(super) rows: Vec<u32>,
    /// Earliest and latest event time in them.
    pub(super) from: Timestamp,
    pub(super) to: Timestamp,
    /// When the first and the last one were sealed.
    pub(super) sealed_from: Timestamp,
    pub(super) sealed_to: Timestamp,
}

impl Span {
    /// The indices.
    pub(super) fn range(&self) -> Range<u64> {
        self.first..self.first + self.rows.len() as u64
    }
}

impl Manifest {
    /// The manifest of a generation without messages.
    pub(super) fn empty(state: State) -> Self {
        Self { v: FORMAT, closed: false, spans: Vec::new(), bytes: 0, state }
    }

    /// The indices of its messages.
    pub(super) fn range(&self) -> Range<u64> {
        match (self.spans.first(), self.spans.last()) {
            (Some(first), Some(last)) => first.first..last.range().end,
            _ => self.state.next..self.state.next,
        }
    }

    pub(super) fn load(dir: &Path) -> io::Result<Self> {
        let bytes = fs::read(dir.join("manifest.json"))?;
        serde_json::from_slice(&bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    }

    pub(super) fn store(&self, dir: &Path) -> io::Result<()> {
        let (tmp, path) = (dir.join("manifest.tmp"), dir.join("manifest.json"));
        let mut file = File::create(&tmp)?;
        file.write_all(&serde_json::to_vec(self).map_err(io::Error::other)?)?;
        file.sync_all()?;
        fs::rename(&tmp, &path)?;
        sync_dir(dir)
    }
}

/// Makes created, renamed and removed entries of a directory durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Removes what spares sled the reading of its whole log; whether there was any.
fn forget_snapshots(dir: &Path) -> Result<bool, OutboxError> {
    let mut any = false;
    for entry in fs::read_dir(dir).map_err(OutboxError::io(dir))? {
        let entry = entry.map_err(OutboxError::io(dir))?;
        if entry.file_name().as_encoded_bytes().starts_with(b"snap.") {
            fs::remove_file(entry.path()).map_err(OutboxError::io(dir))?;
            any = true;
        }
    }
    Ok(any)
}

/// Makes files of `blobs/` durable; there are none but for a state of unusual size.
fn sync_blobs(dir: &Path) -> io::Result<()> {
    let dir = dir.join("blobs");
    let mut entries = fs::read_dir(&dir)?.peekable();
    if entries.peek().is_none() {
        return Ok(());
    }
    for entry in entries {
        match File::open(entry?.path()) {
            // sled has removed it since.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            file => file?.sync_all()?,
        }
    }
    sync_dir(&dir)
}

/// A message as it lies in the outbox.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Place in its lane; goes up by one from message to message, over all epochs.
    pub index: u64,
    /// Its name; `oldest` is that of now.
    pub identity: Identity,
    /// What was sealed.
    pub payload: Bytes,
}

/// What one commit writes.
#[derive(Default)]
pub(super) struct Batch {
    /// By index, ascending.
    messages: Vec<(u64, Vec<u8>)>,
    /// State and the caller's entries; after the messages.
    rest: sled::Batch,
}

/// An open generation.
#[derive(Debug)]
pub(super) struct Generation {
    db: sled::Db,
    log: File,
    /// Indices at which trees begin.
    trees: BTreeSet<u64>,
    filling: Option<Filling>,
}

/// The tree that takes the next messages.
#[derive(Debug)]
struct Filling {
    tree: sled::Tree,
    next: u64,
    messages: usize,
    bytes: usize,
}

impl Generation {
    /// Opens the database in `dir`, creating it when it is not there.
    pub(super) fn open(dir: &Path) -> Result<Self, OutboxError> {
        fs::create_dir_all(dir).map_err(OutboxError::io(dir))?;
        let config = sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE_BYTES)
            .segment_size(SEGMENT_BYTES)
            .flush_every_ms(None);
        let (mut tries, mut whole) = (0, false);
        let db = loop {
            match guard(dir, || config.open()) {
                // sled lets go of its lock a little after the last handle is dropped.
                Err(OutboxError::Corrupt { problem, .. })
                    if problem.contains("acquire lock") && tries < LOCK_TRIES =>
                {
                    tries += 1;
                    thread::sleep(Duration::from_millis(20));
                }
                Err(OutboxError::Corrupt { problem, .. }) if problem.contains("acquire lock") => {
                    return Err(OutboxError::Locked(dir.to_owned()));
                }
                // On a full disk sled may leave a snapshot that is ahead of its log. The log alone says as much.
                Err(OutboxError::Corrupt { problem, .. }) if !whole && forget_snapshots(dir)? => {
                    tracing::warn!(dir = %dir.display(), problem, "reading the whole log of a generation");
                    whole = true;
                }
                other => break other?,
            }
        };
        let log = File::open(dir.join("db")).map_err(OutboxError::io(dir))?;
        let first = |name: sled::IVec| {
            name.strip_prefix(MESSAGES)?.first_chunk::<8>().copied().map(u64::from_be_bytes)
        };
        let trees = db.tree_names().into_iter().filter_map(first).collect();
        Ok(Self { db, log, trees, filling: None })
    }

    /// Opens a database that must be there.
    pub(super) fn existing(dir: &Path) -> Result<Self, OutboxError> {
        if dir.join("db").exists() {
            Self::open(dir)
        } else {
            Err(OutboxError::corrupt(dir, "its database is not there"))
        }
    }

    /// Writes a batch; it is on the disk when this returns.
    pub(super) fn commit(&mut self, dir: &Path, batch: Batch) -> Result<(), OutboxError> {
        for (index, value) in batch.messages {
            self.put(dir, index, value)?;
        }
        guard(dir, || self.db.apply_batch(batch.rest))?;
        self.sync(dir)
    }

    fn put(&mut self, dir: &Path, index: u64, value: Vec<u8>) -> Result<(), OutboxError> {
        let bytes = value.len();
        let fits =
            |f: &Filling| f.next == index && f.messages < TREE_MESSAGES && f.bytes + bytes <= LEAF_BYTES;
        let mut filling = match self.filling.take().filter(fits) {
            Some(filling) => filling,
            None => {
                for stale in self.trees.split_off(&index) {
                    guard(dir, || self.db.drop_tree(tree_name(stale)))?;
                }
                let tree = guard(dir, || self.db.open_tree(tree_name(index)))?;
                self.trees.insert(index);
                Filling { tree, next: index, messages: 0, bytes: 0 }
            }
        };
        guard(dir, || filling.tree.insert(index.to_be_bytes(), value))?;
        (filling.next, filling.messages) = (index + 1, filling.messages + 1);
        filling.bytes += bytes;
        self.filling = Some(filling);
        Ok(())
    }

    /// Replaces the state without waiting for the disk: it becomes durable with the next commit.
    pub(super) fn note_state(&self, dir: &Path, state: &State) -> Result<(), OutboxError> {
        guard(dir, || self.db.insert(STATE, to_json(state))).map(drop)
    }

    /// Makes everything that was written durable.
    pub(super) fn sync(&self, dir: &Path) -> Result<(), OutboxError> {
        guard(dir, || self.db.flush())?;
        sync_blobs(dir).map_err(OutboxError::io(dir))?;
        self.log.sync_data().map_err(OutboxError::io(dir))
    }

    /// The lane's state; `None` in a generation that was never committed to.
    pub(super) fn state(&self, dir: &Path) -> Result<Option<State>, OutboxError> {
        guard(dir, || self.db.get(STATE))?.map(|bytes| from_json(dir, &bytes)).transpose()
    }

    /// Every entry of the caller's, with its stamp.
    pub(super) fn meta(&self, dir: &Path) -> Result<Vec<(String, u64, Vec<u8>)>, OutboxError> {
        let entries = guard(dir, || self.db.scan_prefix(META).collect::<Result<Vec<_>, _>>())?;
        let parse = |(key, value): (sled::IVec, sled::IVec)| {
            let name = String::from_utf8(key.get(1..)?.to_vec()).ok()?;
            let (stamp, bytes) = value.split_first_chunk::<8>()?;
            Some((name, u64::from_be_bytes(*stamp), bytes.to_vec()))
        };
        entries
            .into_iter()
            .map(|entry| parse(entry).ok_or_else(|| OutboxError::corrupt(dir, "malformed entry of metadata")))
            .collect()
    }

    /// Messages from index `range.start` on that lie within `range`, until `max` are found or `max_bytes` are
    /// passed. Without holes, or an error.
    pub(super) fn page(
        &self,
        dir: &Path,
        lane: Lane,
        range: Range<u64>,
        max: usize,
        max_bytes: usize,
    ) -> Result<Vec<Message>, OutboxError> {
        let mut found = Vec::new();
        let mut bytes = 0;
        for index in range {
            if found.len() == max || bytes > max_bytes {
                break;
            }
            let message = self.get(dir, lane, index)?.ok_or_else(|| {
                OutboxError::corrupt(dir, &format!("message {index} is missing or malformed"))
            })?;
            bytes += message.payload.len();
            found.push(message);
        }
        Ok(found)
    }

    /// A message, if it is there and whole.
    pub(super) fn get(&self, dir: &Path, lane: Lane, index: u64) -> Result<Option<Message>, OutboxError> {
        let Some(first) = self.trees.range(..=index).next_back() else { return Ok(None) };
        let value = guard(dir, || self.db.open_tree(tree_name(*first))?.get(index.to_be_bytes()))?;
        Ok(value.and_then(|value| decode_message(lane, index, &value)))
    }

    /// Index of the first message.
    pub(super) fn first(&self) -> Option<u64> {
        self.trees.first().copied()
    }

    /// Bytes on the disk.
    pub(super) fn disk_bytes(&self) -> u64 {
        self.log.metadata().map_or(0, |m| m.len())
    }
}

const MESSAGES: &[u8] = b"m";
const STATE: &[u8] = b"s";
const META: &[u8] = b"k";

/// Runs sled's code. Whatever it reports and a panic (sled asserts on some damaged files) mean the same to the
/// caller: this generation cannot be used.
fn guard<T>(dir: &Path, work: impl FnOnce() -> sled::Result<T>) -> Result<T, OutboxError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(sled::Error::Io(e))) if is_environment(&e) => Err(OutboxError::io(dir)(e)),
        Ok(Err(e)) => Err(OutboxError::corrupt(dir, &e.to_string())),
        Err(_) => Err(OutboxError::corrupt(dir, "sled panicked")),
    }
}

/// Whether an error is the machine's and not the file's: a full disk, a missing right, a dying disk.
fn is_environment(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    !matches!(error.kind(), InvalidData | InvalidInput | UnexpectedEof)
        && !error.to_string().contains("acquire lock")
}

fn tree_name(first: u64) -> Vec<u8> {
    [MESSAGES, &first.to_be_bytes()].concat()
}

/// Adds a message to a batch: 1 byte format, 16 epoch, then u64 LE seq, rows, rows_before, i64 LE sealed_at in
/// µs, 1 byte clock (1 synced, 0 not: the lane's state knows the boot), and the payload as it was sealed.
pub(super) fn encode_message(batch: &mut Batch, index: u64, identity: &Identity, payload: &[u8]) {
    let mut value = Vec::with_capacity(HEAD + payload.len());
    value.push(FORMAT);
    value.extend_from_slice(identity.epoch.as_bytes());
    for number in [identity.seq, identity.rows, identity.rows_before] {
        value.extend_from_slice(&number.to_le_bytes());
    }
    value.extend_from_slice(&identity.sealed_at.as_micros().to_le_bytes());
    value.push(u8::from(identity.clock == ClockState::Synced));
    value.extend_from_slice(payload);
    batch.messages.push((index, value));
}

fn decode_message(lane: Lane, index: u64, value: &[u8]) -> Option<Message> {
    let (format, rest) = value.split_first()?;
    if *format != FORMAT {
        return None;
    }
    let (epoch, mut rest) = rest.split_first_chunk::<16>()?;
    let mut numbers = [0u64; 4];
    for number in &mut numbers {
        let (bytes, tail) = rest.split_first_chunk::<8>()?;
        *number = u64::from_le_bytes(*bytes);
        rest = tail;
    }
    let [seq, rows, rows_before, sealed_at] = numbers;
    let (clock, payload) = rest.split_first()?;
    let clock = if *clock == 1 { ClockState::Synced } else { ClockState::Unsynced { boot: Uuid::nil() } };
    let identity = Identity {
        v: VERSION,
        epoch: Uuid::from_bytes(*epoch),
        lane,
        seq,
        rows,
        rows_before,
        oldest: seq,
        sealed_at: Timestamp::from_micros(sealed_at.cast_signed()),
        clock,
    };
    Some(Message { index, identity, payload: Bytes::copy_from_slice(payload) })
}

/// Adds the lane's state to a batch.
pub(super) fn encode_state(batch: &mut Batch, state: &State) {
    batch.rest.insert(STATE, to_json(state));
}

/// Adds an entry of the caller's to a batch.
pub(super) fn encode_meta(batch: &mut Batch, name: &str, stamp: u64, value: &[u8]) {
    let value = [&stamp.to_be_bytes()[..], value].concat();
    batch.rest.insert([META, name.as_bytes()].concat(), value);
}

fn to_json(state: &State) -> Vec<u8> {
    serde_json::to_vec(state).expect("a state is numbers and text")
}

fn from_json<T: DeserializeOwned>(dir: &Path, bytes: &[u8]) -> Result<T, OutboxError> {
    serde_json::from_slice(bytes).map_err(|e| OutboxError::corrupt(dir, &format!("state: {e}")))
}

/// The directory of a generation.
pub(super) fn dir_of(lane_dir: &Path, number: u64) -> PathBuf {
    lane_dir.join(format!("{number:08}"))
}
