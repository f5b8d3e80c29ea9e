//! Room on the disk: what gives way when there is too little of it, and what is kept for the control lane.
//!
//! | free bytes | what gives way, oldest first, until there is enough |
//! |---|---|
//! | more than `max_bytes` used | generations in quarantine; then readings, aggregates, anomalies |
//! | below `min_free_disk` | the same, but not the generations that are being written: somebody else fills the disk, and messages a few seconds old should have their chance |
//! | below [`LEAST_FREE`] | those too |
//! | still below | nothing is accepted ([`OutboxError::Full`]): sources skip and count until there is room |
//!
//! `{dir}/reserve` holds [`RESERVE`] bytes of the disk. They are let go when even declaring what gives way could
//! find no room, or a start, and taken again when there is enough. Elsewhere they count as used.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use common::{time::Timestamp, wire::Lane};
use fs2::FileExt;

use super::{
    OutboxError,
    control::{Gap, Record, merge_gaps},
    core::Core,
};

/// The order in which lanes give way; `control` never does.
pub(super) const GIVE_WAY: [Lane; 3] = [Lane::Readings, Lane::Aggregates, Lane::Anomalies];
/// Bytes that an append may take: new generations of every lane, and a cut.
const LEAST_FREE: u64 = 8 << 20;
/// Bytes kept for the control lane: the gap records of what gives way, and closing records.
const RESERVE: u64 = 4 << 20;

/// A part of the disk that is kept.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
    is_held: bool,
}

impl Reserve {
    /// The reserve of the outbox in `dir`: let go at once where the disk is short, since a start writes too.
    pub(super) fn open(dir: &Path) -> Result<Self, OutboxError> {
        let path = dir.join("reserve");
        let is_held = path.metadata().is_ok_and(|m| m.len() == RESERVE);
        let mut reserve = Self { path, is_held };
        if available(dir)? < LEAST_FREE {
            reserve.let_go()?;
        }
        Ok(reserve)
    }

    fn let_go(&mut self) -> Result<(), OutboxError> {
        self.is_held = false;
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(OutboxError::io(&self.path)(e)),
            _ => Ok(()),
        }
    }

    /// Takes it again; without it the outbox works as well, until the disk is full.
    fn take(&mut self) {
        let taken = File::create(&self.path).and_then(|file| file.allocate(RESERVE));
        self.is_held = taken.is_ok();
        if let Err(error) = taken {
            tracing::warn!(%error, "the outbox cannot keep a reserve on the disk");
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Too little room, and for what.
struct Shortage {
    bytes: u64,
    reason: &'static str,
    /// Generations that are being written give way too.
    all: bool,
}

impl Core {
    /// Drops generations that are too old, and the oldest ones while there are too many bytes.
    ///
    /// # Errors
    /// [`OutboxError::Full`] when that is not enough for an append.
    pub(super) fn make_room(&mut self, now: Timestamp) -> Result<(), OutboxError> {
        let limit = now - self.limits.max_age;
        let old: Vec<_> = GIVE_WAY
            .into_iter()
            .flat_map(|lane| self.lanes[lane as usize].older_than(limit).map(move |number| (lane, number)))
            .collect();
        self.give_way(&old, "age", now)?;
        while let Some(shortage) = self.shortage()? {
            if let Some((path, _)) = self.aside.pop_front() {
                // What it held was declared when it was set aside.
                tracing::warn!(path = %path.display(), "a generation in quarantine gives way");
                fs::remove_dir_all(&path).map_err(OutboxError::io(&path))?;
                continue;
            }
            self.ease()?;
            let victims = self.victims(&shortage)?;
            if victims.is_empty() {
                break;
            }
            self.give_way(&victims, shortage.reason, now)?;
        }
        let free = self.free()?;
        if free < LEAST_FREE {
            return Err(OutboxError::Full { path: self.dir.clone(), free, needed: LEAST_FREE });
        }
        if !self.reserve.is_held {
            self.reserve.take();
        }
        Ok(())
    }

    /// Lets the reserve go where declaring, or closing what is being written, might find no room.
    fn ease(&mut self) -> Result<(), OutboxError> {
        if available(&self.dir)? < LEAST_FREE { self.reserve.let_go() } else { Ok(()) }
    }

    /// Free bytes besides the reserve.
    fn free(&self) -> Result<u64, OutboxError> {
        let kept = if self.reserve.is_held { 0 } else { RESERVE };
        Ok(available(&self.dir)?.saturating_sub(kept))
    }

    fn shortage(&self) -> Result<Option<Shortage>, OutboxError> {
        let lanes: u64 = GIVE_WAY.iter().map(|lane| self.lanes[*lane as usize].disk_bytes()).sum();
        let used = lanes + self.aside.iter().map(|(_, bytes)| bytes).sum::<u64>();
        let free = self.free()?;
        let shortage = |bytes, reason, all| Ok(Some(Shortage { bytes, reason, all }));
        if used > self.limits.max_bytes {
            shortage(used - self.limits.max_bytes, "full", true)
        } else if free < LEAST_FREE {
            shortage(LEAST_FREE - free, "disk", true)
        } else if free < self.limits.min_free_disk {
            shortage(self.limits.min_free_disk - free, "disk", false)
        } else {
            Ok(None)
        }
    }

    /// The oldest generations, as many as are needed.
    fn victims(&mut self, shortage: &Shortage) -> Result<Vec<(Lane, u64)>, OutboxError> {
        let mut victims = Vec::new();
        let mut bytes = 0;
        for lane in GIVE_WAY {
            let store = &mut self.lanes[lane as usize];
            for (number, disk) in store.closed() {
                if bytes >= shortage.bytes {
                    return Ok(victims);
                }
                victims.push((lane, number));
                bytes += disk;
            }
            if shortage.all && bytes < shortage.bytes && store.is_active_held() {
                // Alone, so that its room is given back before another lane is asked.
                if victims.is_empty() {
                    store.roll()?;
                    victims.extend(store.closed().map(|(number, _)| (lane, number)));
                }
                return Ok(victims);
            }
        }
        Ok(victims)
    }

    /// Declares generations, neighbouring ones in one record, and then removes them.
    fn give_way(
        &mut self,
        generations: &[(Lane, u64)],
        reason: &'static str,
        now: Timestamp,
    ) -> Result<(), OutboxError> {
        if generations.is_empty() {
            return Ok(());
        }
        self.ease()?;
        let mut gaps = Vec::new();
        for (lane, number) in generations {
            gaps.extend(self.lanes[*lane as usize].gaps(*number, reason)?);
        }
        let readings = self.declare_gaps(gaps, now)?;
        tracing::warn!(
            generations = generations.len(), lane = %generations[0].0, reason, readings,
            "the outbox dropped its oldest messages and declared them"
        );
        generations.iter().try_for_each(|(lane, number)| self.lane(*lane).discard(*number))
    }

    /// Makes gaps durable in the control lane; how many readings they have.
    pub(super) fn declare_gaps(&mut self, gaps: Vec<Gap>, now: Timestamp) -> Result<u64, OutboxError> {
        let mut gaps = merge_gaps(gaps);
        for gap in &mut gaps {
            let boot = self.lanes[gap.lane as usize].boot_of(gap.epoch);
            let settle = |at: Option<Timestamp>| at.and_then(|at| self.times.settle(at, boot));
            (gap.from, gap.to) = (settle(gap.from), settle(gap.to));
        }
        let readings = gaps.iter().map(|g| g.readings).sum();
        let records: Vec<Record> = gaps.into_iter().map(Record::from).collect();
        if !records.is_empty() {
            let clean = self.lane(Lane::Control).state.clean;
            self.write_control(now, &records, None, clean)?;
        }
        Ok(readings)
    }
}

/// Generations in `quarantine/` with their bytes, oldest first.
pub(super) fn quarantined(dir: &Path) -> VecDeque<(PathBuf, u64)> {
    let mut found: Vec<_> = fs::read_dir(dir.join("quarantine"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| (entry.metadata().and_then(|m| m.modified()).ok(), entry.path()))
        .collect();
    found.sort();
    found.into_iter().map(|(_, path)| with_bytes(path)).collect()
}

/// A folder and the bytes of its files.
pub(super) fn with_bytes(dir: PathBuf) -> (PathBuf, u64) {
    let bytes = disk_bytes(&dir);
    (dir, bytes)
}

/// Bytes of a folder's files.
pub(super) fn disk_bytes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(m) if m.is_dir() => disk_bytes(&entry.path()),
        Ok(m) => m.len(),
        Err(_) => 0,
    };
    entries.map(bytes).sum()
}

fn available(dir: &Path) -> Result<u64, OutboxError> {
    fs2::available_space(dir).map_err(OutboxError::io(dir))
}
