//! One lane: its generations in order, the newest of which is written.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::ErrorKind,
    ops::Range,
    path::{Path, PathBuf},
    time::Duration,
};

use arrow::{
    array::{Array, RecordBatch, TimestampMicrosecondArray},
    compute::{max, min},
};
use common::{
    time::Timestamp,
    wire::{ClockState, Identity, Lane, VERSION, encode},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Limits, OutboxError,
    boots::Boots,
    control::Gap,
    generation::{
        Batch, Generation, MAX_PAYLOAD, Manifest, Message, Span, dir_of, encode_message, encode_meta,
        encode_state, sync_dir,
    },
    ranges::RangeSet,
};
use crate::census::Census;

/// A generation that is written and holds nothing is given back once nothing was sealed for this long.
const IDLE: Duration = Duration::from_secs(300);
/// A generation covers at most this part of `max_age`, so that no message outlives it by more.
const AGES: u32 = 8;

/// What a lane must know after a restart. It is written by every batch, in the same transaction as the messages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    /// Index of the next message.
    pub(super) next: u64,
    /// Indices that are held no more.
    pub(super) forgotten: RangeSet,
    /// Epochs of which something is held, and the present one; ascending.
    pub(super) epochs: Vec<EpochState>,
    /// Counted with this lane's drafts and not yet declared.
    pub(super) census: Census,
    /// Number of `census`: it was declared when `declared` of the control lane's state has reached it.
    pub(super) census_no: u64,
    /// Highest event time in the drafts.
    pub(super) last_event: Option<Timestamp>,
    /// When the last batch was written.
    pub(super) at: Option<Timestamp>,
    /// Control lane only: highest census number that was declared, by lane. It is written in the transaction of
    /// the message that declares it, so nothing is declared twice or never.
    pub(super) declared: [u64; 4],
    /// Control lane only: the run of the agent that wrote last.
    pub(super) epoch: Option<Uuid>,
    /// Control lane only: that run ended with its closing records.
    pub(super) clean: bool,
}

/// A run of the agent in a lane. Message `seq` of it has index `base + seq`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct EpochState {
    pub(super) epoch: Uuid,
    pub(super) base: u64,
    /// Messages sealed.
    pub(super) head: u64,
    /// Rows sealed.
    pub(super) rows: u64,
    /// Its times are provisional: they count from this start of the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) boot: Option<Uuid>,
}

impl EpochState {
    /// The indices of its messages.
    pub(super) fn range(&self) -> Range<u64> {
        self.base..self.base + self.head
    }
}

/// What one commit adds to a lane.
#[derive(Default)]
pub(super) struct Write<'a> {
    pub(super) batches: Vec<&'a RecordBatch>,
    pub(super) census: Census,
    pub(super) last_event: Option<Timestamp>,
    /// Name, stamp and value.
    pub(super) meta: Vec<(&'a str, u64, &'a [u8])>,
    /// Control lane only.
    pub(super) declared: Option<[u64; 4]>,
    /// Control lane only.
    pub(super) clean: bool,
}

/// A generation that is written no more.
#[derive(Debug)]
struct Closed {
    number: u64,
    range: Range<u64>,
    disk: u64,
    sealed_from: Timestamp,
    sealed_to: Timestamp,
}

/// A lane's store.
#[derive(Debug)]
pub(super) struct LaneStore {
    lane: Lane,
    root: PathBuf,
    dir: PathBuf,
    closed: VecDeque<Closed>,
    number: u64,
    active: Generation,
    manifest: Manifest,
    /// The closed generation that was read last.
    reading: Option<(u64, Generation)>,
    /// The manifest on the disk is older than `state`.
    stale: bool,
    /// Nothing of the lane could be read: what it had sealed is not known.
    pub(super) unknown: bool,
    pub(super) state: State,
}

impl LaneStore {
    /// Opens the lane under `root`. The numbers are those of generations that cannot be opened: they are to be
    /// handed to [`Self::gaps`] and [`Self::quarantine`].
    pub(super) fn open(root: &Path, lane: Lane) -> Result<(Self, Vec<u64>), OutboxError> {
        let dir = root.join(lane.as_str());
        fs::create_dir_all(&dir).map_err(OutboxError::io(&dir))?;
        sync_dir(root).map_err(OutboxError::io(root))?;
        let mut known: Vec<(u64, Manifest)> = Vec::new();
        // The lowest number of a generation of which nothing can be read.
        let mut lost = None;
        for number in numbers(&dir)? {
            let path = dir_of(&dir, number);
            match Manifest::load(&path) {
                Ok(manifest) => known.push((number, manifest)),
                // The manifest is written last: without it the generation was never used.
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    fs::remove_dir_all(&path).map_err(OutboxError::io(&path))?;
                }
                Err(e) if e.kind() == ErrorKind::InvalidData => {
                    tracing::error!(%lane, number, error = %e, "a manifest of the outbox cannot be read");
                    match rebuild(&path, lane) {
                        Ok((_, manifest)) => {
                            manifest.store(&path).map_err(OutboxError::io(&path))?;
                            known.push((number, manifest));
                        }
                        Err(OutboxError::Corrupt { .. }) => {
                            lost = lost.or(Some(number));
                            move_dir(&path, &aside(root, lane, number))?;
                        }
                        Err(e) => return Err(e),
                    }
                }
                Err(e) => return Err(OutboxError::io(&path.join("manifest.json"))(e)),
            }
        }
        let mut damaged = Vec::new();
        let last = known.last().cloned();
        let active = match &last {
            Some((number, manifest)) if !manifest.closed => {
                let path = dir_of(&dir, *number);
                match recover(&path, lane, manifest) {
                    Ok((generation, manifest)) => Some((*number, generation, manifest)),
                    Err(OutboxError::Corrupt { problem, .. }) => {
                        tracing::error!(%lane, number, problem, "a generation of the outbox cannot be opened");
                        damaged.push(*number);
                        None
                    }
                    Err(e) => return Err(e),
                }
            }
            _ => None,
        };
        let closed_count = known.len() - usize::from(active.is_some());
        let closed: VecDeque<Closed> = known
            .iter()
            .take(closed_count)
            .map(|(n, m)| Closed::of(*n, m, disk_bytes(&dir_of(&dir, *n))))
            .collect();
        let (number, active, manifest) = match active {
            Some(found) => found,
            None => {
                // After a kill between the end of a generation and the next one's beginning, the caller's entries go on.
                let kept = match &last {
                    Some((number, manifest)) if manifest.closed => entries(&dir_of(&dir, *number)),
                    _ => Vec::new(),
                };
                let kept: Vec<_> =
                    kept.iter().map(|(name, at, value)| (name.as_str(), *at, &value[..])).collect();
                let number = last.as_ref().map_or(1, |(number, _)| number + 1);
                let mut state = last.map(|(_, m)| State { next: m.range().end.max(m.state.next), ..m.state });
                let state = state.take().unwrap_or_default();
                let (generation, manifest) = create(&dir, number, state, &kept)?;
                (number, generation, manifest)
            }
        };
        let mut state = manifest.state.clone();
        // What lies below the first generation was given back.
        if lost.is_none_or(|lost| known.first().is_some_and(|(number, _)| *number < lost)) {
            state.forgotten.insert(0..closed.front().map_or(manifest.range().start, |c| c.range.start));
        }
        let unknown = lost.is_some() && known.is_empty();
        let (root, reading, stale) = (root.to_owned(), None, true);
        let mut store =
            Self { lane, root, dir, closed, number, active, manifest, reading, stale, unknown, state };
        store.prune_epochs();
        Ok((store, damaged))
    }

    /// The caller's entries.
    pub(super) fn meta(&self) -> Result<Vec<(String, u64, Vec<u8>)>, OutboxError> {
        self.active.meta(&self.active_dir())
    }

    /// Begins an epoch, with a boot if its times are provisional; it is durable with the first write.
    pub(super) fn begin(&mut self, epoch: Uuid, now: Timestamp, boot: Option<Uuid>) {
        // The earliest time at which anything of it can be lost.
        let alike = self.state.at.filter(|at| at.is_provisional() == now.is_provisional());
        self.state.at = alike.max(Some(now));
        self.state.epochs.push(EpochState { epoch, base: self.state.next, head: 0, rows: 0, boot });
    }

    /// Index before which no message waits for the clock to be set.
    pub(super) fn released(&self, boots: &Boots) -> u64 {
        let waits = |e: &&EpochState| e.boot.is_some_and(|boot| boots.waits(boot));
        self.state.epochs.iter().find(waits).map_or(self.state.next, |e| e.base)
    }

    /// The boot from which the provisional times of an epoch count.
    pub(super) fn boot_of(&self, epoch: Uuid) -> Option<Uuid> {
        self.state.epochs.iter().find(|e| e.epoch == epoch)?.boot
    }

    /// The present epoch.
    pub(super) fn present(&self) -> EpochState {
        *self.state.epochs.last().expect("an epoch was begun at open")
    }

    /// Seals the batches and writes everything in one transaction; durable on return.
    pub(super) fn write(
        &mut self,
        now: Timestamp,
        w: &Write<'_>,
        limits: &Limits,
    ) -> Result<(), OutboxError> {
        if self.manifest.bytes >= limits.generation_bytes {
            self.roll()?;
        }
        let mut state = self.state.clone();
        let mut manifest = self.manifest.clone();
        let mut batch = Batch::default();
        for rows in &w.batches {
            self.seal(
                &mut state,
                &mut manifest,
                &mut batch,
                now,
                rows,
                limits.max_message_bytes.min(MAX_PAYLOAD),
            )?;
        }
        state.census.merge(&w.census);
        state.last_event = state.last_event.max(w.last_event);
        state.at = Some(now);
        state.declared = w.declared.unwrap_or(state.declared);
        state.clean = w.clean;
        if self.lane == Lane::Control {
            state.epoch = state.epochs.last().map(|e| e.epoch);
        }
        for (name, stamp, value) in &w.meta {
            encode_meta(&mut batch, name, *stamp, value);
        }
        encode_state(&mut batch, &state);
        let dir = self.active_dir();
        self.active.commit(&dir, batch)?;
        manifest.state = state.clone();
        (self.state, self.manifest, self.stale) = (state, manifest, true);
        Ok(())
    }

    /// Gives the rows a name and adds them to the batch; rows that are too long for one message become two.
    fn seal(
        &self,
        state: &mut State,
        manifest: &mut Manifest,
        batch: &mut Batch,
        now: Timestamp,
        rows: &RecordBatch,
        max_bytes: usize,
    ) -> Result<(), OutboxError> {
        let epoch = state.epochs.last_mut().expect("an epoch was begun at open");
        let clock = epoch.boot.map_or(ClockState::Synced, |boot| ClockState::Unsynced { boot });
        let identity = Identity {
            v: VERSION,
            epoch: epoch.epoch,
            lane: self.lane,
            seq: epoch.head,
            rows: rows.num_rows() as u64,
            rows_before: epoch.rows,
            oldest: oldest(&state.forgotten, epoch),
            sealed_at: now,
            clock,
        };
        let payload = encode(rows, &identity)?;
        // With true times it may compress a little less well.
        let max_bytes = if epoch.boot.is_some() { max_bytes - max_bytes / 16 } else { max_bytes };
        if payload.len() > max_bytes && rows.num_rows() > 1 {
            let half = rows.num_rows() / 2;
            for part in [rows.slice(0, half), rows.slice(half, rows.num_rows() - half)] {
                self.seal(state, manifest, batch, now, &part, max_bytes)?;
            }
            return Ok(());
        }
        encode_message(batch, state.next, &identity, &payload);
        let (from, to) = event_range(self.lane, rows).unwrap_or((now, now));
        manifest.add(state.next, &identity, from, to, payload.len() as u64);
        epoch.head += 1;
        epoch.rows += identity.rows;
        state.next += 1;
        Ok(())
    }

    /// Closes the active generation where that gives disk back, since nothing in it has been held for a while, or lets
    /// its older part give way for its age.
    pub(super) fn tidy(&mut self, now: Timestamp, limits: &Limits) -> Result<(), OutboxError> {
        let (Some(first), Some(last)) = (self.manifest.spans.first(), self.manifest.spans.last()) else {
            return Ok(());
        };
        let drained = self.state.forgotten.covers(self.manifest.range()) && last.sealed_to + IDLE <= now;
        if drained || first.sealed_from + limits.max_age / AGES <= now {
            self.roll()?;
        }
        Ok(())
    }

    /// Closes the active generation and begins the next one with the lane's state and what callers keep in it, as both are: what
    /// is new is durable with its messages, and no earlier.
    pub(super) fn roll(&mut self) -> Result<(), OutboxError> {
        self.prune_epochs();
        let dir = self.active_dir();
        let kept: Vec<_> = self.active.meta(&dir)?;
        let carried: Vec<(&str, u64, &[u8])> =
            kept.iter().map(|(name, stamp, value)| (name.as_str(), *stamp, value.as_slice())).collect();
        self.manifest.closed = true;
        self.manifest.state = self.state.clone();
        self.manifest.store(&dir).map_err(OutboxError::io(&dir))?;
        let (generation, manifest) = create(&self.dir, self.number + 1, self.state.clone(), &carried)?;
        self.closed.push_back(Closed::of(self.number, &self.manifest, self.active.disk_bytes()));
        self.number += 1;
        self.active = generation;
        self.manifest = manifest;
        self.sweep()
    }

    /// Held messages of `range`, ascending; `Err((number, error))` names the generation that failed.
    pub(super) fn page(
        &mut self,
        range: Range<u64>,
        max: usize,
        max_bytes: usize,
    ) -> Result<Vec<Message>, (u64, OutboxError)> {
        let mut messages: Vec<Message> = Vec::new();
        let mut bytes = 0;
        for held in self.state.forgotten.absent(range) {
            let mut at = held.start;
            while at < held.end {
                let found = self.read(at..held.end, max - messages.len(), max_bytes - bytes)?;
                at += found.len() as u64;
                bytes += found.iter().map(|m| m.payload.len()).sum::<usize>();
                messages.extend(found);
                if messages.len() >= max || bytes >= max_bytes {
                    return Ok(self.with_state(messages));
                }
            }
        }
        Ok(self.with_state(messages))
    }

    /// Messages from the generation that holds `range.start`; at least one.
    fn read(
        &mut self,
        range: Range<u64>,
        max: usize,
        max_bytes: usize,
    ) -> Result<Vec<Message>, (u64, OutboxError)> {
        let Some(closed) = self.closed.iter().find(|c| c.range.contains(&range.start)) else {
            let (number, dir) = (self.number, self.active_dir());
            return self.active.page(&dir, self.lane, range, max, max_bytes).map_err(|e| (number, e));
        };
        let (number, end) = (closed.number, closed.range.end.min(range.end));
        let dir = dir_of(&self.dir, number);
        if self.reading.as_ref().is_none_or(|(n, _)| *n != number) {
            self.reading = None;
            self.reading = Some((number, Generation::existing(&dir).map_err(|e| (number, e))?));
        }
        let (_, generation) = self.reading.as_ref().expect("it was opened above");
        generation.page(&dir, self.lane, range.start..end, max, max_bytes).map_err(|e| (number, e))
    }

    /// Adds what only the lane's state knows.
    fn with_state(&self, mut messages: Vec<Message>) -> Vec<Message> {
        for message in &mut messages {
            if let Some(epoch) = self.state.epochs.iter().find(|e| e.epoch == message.identity.epoch) {
                message.identity.oldest = oldest(&self.state.forgotten, epoch);
                if let Some(boot) = epoch.boot {
                    message.identity.clock = ClockState::Unsynced { boot };
                }
            }
        }
        messages
    }

    /// Forgets messages, and gives back generations that hold none any more. Durable with the next write.
    pub(super) fn forget(&mut self, range: Range<u64>) -> Result<(), OutboxError> {
        self.state.forgotten.insert(range.start..range.end.min(self.state.next));
        self.stale = true;
        self.sweep()
    }

    /// Writes down what was forgotten, without waiting for the disk, and renews the manifest.
    pub(super) fn note(&mut self) -> Result<(), OutboxError> {
        let dir = self.active_dir();
        self.prune_epochs();
        if !self.stale {
            return Ok(());
        }
        self.active.note_state(&dir, &self.state)?;
        self.manifest.state = self.state.clone();
        self.manifest.store(&dir).map_err(OutboxError::io(&dir))?;
        self.stale = false;
        Ok(())
    }

    /// What is still held of a generation, as gaps.
    pub(super) fn gaps(&self, number: u64, reason: &'static str) -> Result<Vec<Gap>, OutboxError> {
        let dir = dir_of(&self.dir, number);
        let manifest = Manifest::load(&dir).map_err(|e| match e.kind() {
            ErrorKind::NotFound | ErrorKind::InvalidData => {
                OutboxError::corrupt(&dir, &format!("its manifest cannot be read: {e}"))
            }
            _ => OutboxError::io(&dir)(e),
        })?;
        let gaps = manifest.spans.iter().flat_map(|span| {
            self.state.forgotten.absent(span.range()).into_iter().map(move |lost| {
                let at = |index: u64| usize::try_from(index - span.first).unwrap_or(usize::MAX);
                Gap {
                    epoch: span.epoch,
                    lane: self.lane,
                    first_seq: span.first_seq + (lost.start - span.first),
                    last_seq: span.first_seq + (lost.end - 1 - span.first),
                    readings: span.rows[at(lost.start)..at(lost.end)].iter().map(|r| u64::from(*r)).sum(),
                    from: Some(span.from),
                    to: Some(span.to),
                    reason,
                }
            })
        });
        Ok(gaps.collect())
    }

    /// What is held by the lane's state and in no generation, since a folder is gone or was damaged together with
    /// its manifest; forgotten from now on. Their gaps are to be declared. How many rows they had is told by their
    /// neighbours, where there are any.
    pub(super) fn take_holes(&mut self) -> Vec<Gap> {
        let mut there = self.state.forgotten.clone();
        self.closed.iter().for_each(|c| there.insert(c.range.clone()));
        there.insert(self.manifest.range());
        let mut gaps = Vec::new();
        for hole in there.absent(0..self.state.next) {
            for epoch in self.state.epochs.clone() {
                let (start, end) = (hole.start.max(epoch.base), hole.end.min(epoch.range().end));
                if start >= end {
                    continue;
                }
                let mut neighbour = |index: u64| {
                    let found = self.read(index..index + 1, 1, usize::MAX).ok()?.pop()?.identity;
                    (found.epoch == epoch.epoch).then_some(found)
                };
                let before = match start - epoch.base {
                    0 => Some(0),
                    _ => neighbour(start - 1).map(|m| m.rows_before + m.rows),
                };
                let until = match epoch.range().end - end {
                    0 => Some(epoch.rows),
                    _ => neighbour(end).map(|m| m.rows_before),
                };
                gaps.push(Gap {
                    epoch: epoch.epoch,
                    lane: self.lane,
                    first_seq: start - epoch.base,
                    last_seq: end - 1 - epoch.base,
                    readings: before.zip(until).map_or(0, |(before, until)| until.saturating_sub(before)),
                    from: None,
                    to: None,
                    reason: "corrupt",
                });
            }
            self.state.forgotten.insert(hole);
            self.stale = true;
        }
        gaps
    }

    /// The closed generations that hold something, oldest first, with their bytes on disk.
    pub(super) fn closed(&self) -> impl Iterator<Item = (u64, u64)> {
        self.closed.iter().map(|c| (c.number, c.disk))
    }

    /// Whether the active generation holds something.
    pub(super) fn is_active_held(&self) -> bool {
        !self.state.forgotten.covers(self.manifest.range())
    }

    /// The closed generations that were sealed before `limit` throughout. Provisional times do not tell.
    pub(super) fn older_than(&self, limit: Timestamp) -> impl Iterator<Item = u64> {
        let old = move |c: &&Closed| c.sealed_to < limit && !c.sealed_to.is_provisional();
        self.closed.iter().take_while(old).map(|c| c.number)
    }

    /// Forgets a whole generation and removes it. Its gaps must be durable.
    pub(super) fn discard(&mut self, number: u64) -> Result<(), OutboxError> {
        match self.closed.iter().find(|c| c.number == number).map(|c| c.range.clone()) {
            Some(range) => self.forget(range),
            None => Ok(()),
        }
    }

    /// Forgets a whole generation and sets it aside; where it lies now. Its gaps must be durable.
    pub(super) fn quarantine(&mut self, number: u64) -> Result<Option<PathBuf>, OutboxError> {
        self.reading = None;
        let Some(at) = self.closed.iter().position(|c| c.number == number) else { return Ok(None) };
        let path = aside(&self.root, self.lane, number);
        self.move_to(number, &path)?;
        if let Some(closed) = self.closed.remove(at) {
            self.state.forgotten.insert(closed.range);
            self.stale = true;
        }
        Ok(Some(path))
    }

    /// Closes the active generation without reading it again, its database being damaged. `meta` goes on in the next.
    pub(super) fn abandon_active(&mut self, meta: &[(&str, u64, &[u8])]) -> Result<(), OutboxError> {
        let dir = self.active_dir();
        self.manifest.closed = true;
        self.manifest.state = self.state.clone();
        self.manifest.store(&dir).map_err(OutboxError::io(&dir))?;
        let (generation, manifest) = create(&self.dir, self.number + 1, self.state.clone(), meta)?;
        self.closed.push_back(Closed::of(self.number, &self.manifest, self.active.disk_bytes()));
        self.number += 1;
        (self.active, self.manifest) = (generation, manifest);
        Ok(())
    }

    /// Whether `number` is the generation that is written.
    pub(super) fn is_active(&self, number: u64) -> bool {
        self.number == number
    }

    /// Whether there is a generation `number`.
    pub(super) fn has(&self, number: u64) -> bool {
        self.is_active(number) || self.closed.iter().any(|c| c.number == number)
    }

    /// Messages held.
    pub(super) fn held(&self) -> u64 {
        self.state.forgotten.absent(0..self.state.next).iter().map(|r| r.end - r.start).sum()
    }

    /// When the lane in `root` was last written to, as its newest manifest has it: not more than a minute old,
    /// and cheap, since no database is opened.
    pub(super) fn last_noted(root: &Path, lane: Lane) -> Option<Timestamp> {
        let dir = root.join(lane.as_str());
        let newest = *numbers(&dir).ok()?.last()?;
        Manifest::load(&dir_of(&dir, newest)).ok()?.state.at
    }

    /// Bytes on the disk.
    pub(super) fn disk_bytes(&self) -> u64 {
        self.active.disk_bytes() + self.closed.iter().map(|c| c.disk).sum::<u64>()
    }

    /// Whether a generation could be given up: something is held.
    pub(super) fn holds_messages(&self) -> bool {
        !self.state.forgotten.covers(0..self.state.next)
    }

    /// When the oldest generation that is still there was begun.
    pub(super) fn oldest_sealed(&self) -> Option<Timestamp> {
        let active = || self.manifest.spans.first().map(|s| s.sealed_from);
        self.holds_messages().then(|| self.closed.front().map(|c| c.sealed_from).or_else(active)).flatten()
    }

    /// Lowest seq of an epoch that is still held; its head when none is.
    pub(super) fn oldest(&self, epoch: &EpochState) -> u64 {
        oldest(&self.state.forgotten, epoch)
    }

    fn active_dir(&self) -> PathBuf {
        dir_of(&self.dir, self.number)
    }

    fn prune_epochs(&mut self) {
        let State { forgotten, epochs, .. } = &mut self.state;
        let present = epochs.last().map(|e| e.epoch);
        epochs.retain(|e| Some(e.epoch) == present || !forgotten.covers(e.range()));
    }

    /// Removes closed generations that hold nothing. A directory leaves its lane by a rename, so that a crash in
    /// the middle of the removal is not taken for corruption. One between others leaves once it is written down that
    /// it was forgotten, or it would be missed after a crash; what lies below the first is never missed.
    fn sweep(&mut self) -> Result<(), OutboxError> {
        while let Some(at) = self.closed.iter().position(|c| self.state.forgotten.covers(c.range.clone())) {
            if at > 0 {
                match self.note() {
                    Err(OutboxError::Io { source, .. }) if source.kind() == ErrorKind::StorageFull => {
                        return Ok(());
                    }
                    noted => noted?,
                }
            }
            let number = self.closed[at].number;
            if self.reading.as_ref().is_some_and(|(n, _)| *n == number) {
                self.reading = None;
            }
            let trash = self.root.join("trash").join(format!("{}-{number:08}", self.lane));
            self.move_to(number, &trash)?;
            // sled lets go of its file a little after the last handle is dropped; its blocks are wanted now.
            if let Ok(log) = File::options().write(true).open(trash.join("db")) {
                log.set_len(0).map_err(OutboxError::io(&trash))?;
            }
            fs::remove_dir_all(&trash).map_err(OutboxError::io(&trash))?;
            self.closed.remove(at);
        }
        Ok(())
    }

    fn move_to(&self, number: u64, target: &Path) -> Result<(), OutboxError> {
        move_dir(&dir_of(&self.dir, number), target)
    }
}

impl Closed {
    fn of(number: u64, manifest: &Manifest, disk: u64) -> Self {
        let sealed =
            |pick: fn(&Span) -> Timestamp, span: Option<&Span>| span.map_or_else(Timestamp::default, pick);
        Self {
            number,
            range: manifest.range(),
            disk,
            sealed_from: sealed(|s| s.sealed_from, manifest.spans.first()),
            sealed_to: sealed(|s| s.sealed_to, manifest.spans.last()),
        }
    }
}

impl Manifest {
    fn add(&mut self, index: u64, identity: &Identity, from: Timestamp, to: Timestamp, bytes: u64) {
        let rows = u32::try_from(identity.rows).unwrap_or(u32::MAX);
        self.bytes += bytes;
        match self.spans.last_mut() {
            Some(span) if span.epoch == identity.epoch && span.range().end == index => {
                span.rows.push(rows);
                span.from = span.from.min(from);
                span.to = span.to.max(to);
                span.sealed_to = identity.sealed_at;
            }
            _ => self.spans.push(Span {
                epoch: identity.epoch,
                first: index,
                first_seq: identity.seq,
                rows: vec![rows],
                from,
                to,
                sealed_from: identity.sealed_at,
                sealed_to: identity.sealed_at,
            }),
        }
    }
}

/// Opens the generation that was written last, and brings its manifest up to its database.
pub(super) fn recover(
    dir: &Path,
    lane: Lane,
    manifest: &Manifest,
) -> Result<(Generation, Manifest), OutboxError> {
    let generation = Generation::existing(dir)?;
    let mut state = generation.state(dir)?.ok_or_else(|| OutboxError::corrupt(dir, "it has no state"))?;
    // A log that was cut may have lost what the manifest still knows.
    state.at = state.at.max(manifest.state.at);
    manifest.state.forgotten.iter().for_each(|range| state.forgotten.insert(range));
    let mut recovered = manifest.clone();
    let known = manifest.range();
    if state.next < known.end {
        let lost = known.end - state.next;
        return Err(OutboxError::corrupt(dir, &format!("its last {lost} messages are missing")));
    }
    // The manifest is renewed once a minute: what came after it is read from the database, in small pages.
    let mut at = known.end;
    while at < state.next {
        let messages = generation.page(dir, lane, at..state.next, 64, 1 << 20)?;
        at += messages.len() as u64;
        for m in &messages {
            let sealed = m.identity.sealed_at;
            recovered.add(m.index, &m.identity, sealed, sealed, m.payload.len() as u64);
        }
    }
    recovered.state = state;
    Ok((generation, recovered))
}

/// Opens a generation whose manifest cannot be read, and makes one from its database.
pub(super) fn rebuild(dir: &Path, lane: Lane) -> Result<(Generation, Manifest), OutboxError> {
    let generation = Generation::existing(dir)?;
    let mut state = generation.state(dir)?.ok_or_else(|| OutboxError::corrupt(dir, "it has no state"))?;
    state.next = generation.first().map_or(state.next, |first| first.min(state.next));
    let empty = Manifest::empty(state);
    drop(generation);
    recover(dir, lane, &empty)
}

/// The caller's entries in a closed generation; none where it cannot be read, which is found when it is delivered.
fn entries(dir: &Path) -> Vec<(String, u64, Vec<u8>)> {
    Generation::open(dir).and_then(|generation| generation.meta(dir)).unwrap_or_default()
}

/// Makes a generation; its manifest, written last, makes it count.
fn create(
    lane_dir: &Path,
    number: u64,
    state: State,
    meta: &[(&str, u64, &[u8])],
) -> Result<(Generation, Manifest), OutboxError> {
    let dir = dir_of(lane_dir, number);
    let mut generation = Generation::open(&dir)?;
    let mut batch = Batch::default();
    encode_state(&mut batch, &state);
    for (name, stamp, value) in meta {
        encode_meta(&mut batch, name, *stamp, value);
    }
    generation.commit(&dir, batch)?;
    let manifest = Manifest::empty(state);
    manifest.store(&dir).map_err(OutboxError::io(&dir))?;
    sync_dir(lane_dir).map_err(OutboxError::io(lane_dir))?;
    Ok((generation, manifest))
}

/// Moves a directory away from its lane, durably.
fn move_dir(from: &Path, target: &Path) -> Result<(), OutboxError> {
    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder).map_err(OutboxError::io(folder))?;
    }
    fs::rename(from, target).map_err(OutboxError::io(from))?;
    from.parent().map_or(Ok(()), |lane_dir| sync_dir(lane_dir).map_err(OutboxError::io(lane_dir)))
}

/// Where a damaged generation goes; a free name, should an earlier one of its number lie there.
fn aside(root: &Path, lane: Lane, number: u64) -> PathBuf {
    let folder = root.join("quarantine");
    let first = folder.join(format!("{lane}-{number:08}"));
    let others = (1..).map(|n| folder.join(format!("{lane}-{number:08}.{n}")));
    std::iter::once(first).chain(others).find(|path| !path.exists()).expect("numbers do not end")
}

/// The generations of a lane, ascending.
pub(super) fn numbers(dir: &Path) -> Result<Vec<u64>, OutboxError> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir).map_err(OutboxError::io(dir))? {
        let name = entry.map_err(OutboxError::io(dir))?.file_name();
        numbers.extend(name.to_str().and_then(|n| n.parse::<u64>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn disk_bytes(dir: &Path) -> u64 {
    fs::metadata(dir.join("db")).map_or(0, |m| m.len())
}

fn oldest(forgotten: &RangeSet, epoch: &EpochState) -> u64 {
    forgotten.next_absent(epoch.base).min(epoch.range().end) - epoch.base
}

/// Earliest and latest time in the column that says when the rows' events were.
fn event_range(lane: Lane, rows: &RecordBatch) -> Option<(Timestamp, Timestamp)> {
    let name = match lane {
        Lane::Readings | Lane::Control => "ts",
        Lane::Aggregates => "window_start",
        Lane::Anomalies => "started_at",
    };
    let times = rows.column_by_name(name)?.as_any().downcast_ref::<TimestampMicrosecondArray>()?;
    Some((Timestamp::from_micros(min(times)?), Timestamp::from_micros(max(times)?)))
}
