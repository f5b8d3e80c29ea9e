//! Starts of the machine whose clock was not set, and what became of their messages: `{dir}/clock.json`.
//!
//! A run of the agent whose clock is not set seals with provisional times, and its epoch notes the boot id
//! (`EpochState` in lane.rs). What these times are is decided once for each boot, for ever, and is on the disk
//! before the first of its messages can be published, so that a message has the same bytes whenever it is sent:
//!
//! | fate | its messages |
//! |---|---|
//! | none, and it is the present boot | wait |
//! | `offset` | go with this many µs added to their provisional times, as `clock=synced` |
//! | `unsynced`, or none of an earlier boot | go as they are, as `clock=unsynced` |
//!
//! A fate is kept as long as messages of its boot are held. [`crate::clock`] decides, before the outbox is opened.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use common::{
    time::Timestamp,
    wire::{ClockState, set_clock},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    OutboxError,
    generation::{Message, sync_dir},
    lane::LaneStore,
};

/// Version of the file.
const FORMAT: u8 = 1;

/// The contents of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boots {
    /// Format, 1.
    v: u8,
    /// The start of the machine in which the agent ran last.
    pub present: Uuid,
    /// From the time since that start to true time, in µs, once the clock was set in it.
    pub offset: Option<i64>,
    /// Latest true time that an earlier run has written to the outbox.
    pub last: Option<Timestamp>,
    /// What was decided for ever.
    fates: BTreeMap<Uuid, Fate>,
}

/// What the provisional times of a boot are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// True times less this many µs.
    Offset(i64),
    /// Not known.
    Unsynced,
}

impl Default for Boots {
    fn default() -> Self {
        Self { v: FORMAT, present: Uuid::nil(), offset: None, last: None, fates: BTreeMap::new() }
    }
}

impl Boots {
    /// Reads the file in the outbox's folder; there need not be one, and what cannot be understood counts as none:
    /// then messages of earlier boots go as unsynced.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn load(dir: &Path) -> io::Result<Self> {
        match fs::read(dir.join("clock.json")) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::error!(%error, "clock.json of the outbox is damaged; what it knew of clocks is lost");
                Self::default()
            })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(e),
        }
    }

    /// Writes the file; it is on the disk when this returns.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn store(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let (tmp, path) = (dir.join("clock.tmp"), dir.join("clock.json"));
        let mut file = File::create(&tmp)?;
        file.write_all(&serde_json::to_vec(self).map_err(io::Error::other)?)?;
        file.sync_all()?;
        fs::rename(&tmp, &path)?;
        sync_dir(dir)
    }

    /// The agent runs in this boot, whose offset is known or not.
    pub fn run_in(&mut self, boot: Uuid, offset: Option<i64>) {
        self.present = boot;
        self.offset = offset;
        if let Some(offset) = offset {
            self.fates.entry(boot).or_insert(Fate::Offset(offset));
        }
    }

    /// Messages of the present boot wait no longer.
    pub fn give_up(&mut self) {
        self.fates.entry(self.present).or_insert(Fate::Unsynced);
    }

    /// Whether messages of the boot wait for its clock to be set.
    pub fn waits(&self, boot: Uuid) -> bool {
        boot == self.present && !self.fates.contains_key(&boot)
    }

    /// What is to be added to provisional times of the boot, in µs, where that is known.
    pub fn offset_of(&self, boot: Uuid) -> Option<i64> {
        match self.fates.get(&boot) {
            Some(Fate::Offset(offset)) => Some(*offset),
            Some(Fate::Unsynced) | None => None,
        }
    }

    /// A message as it goes out: with true times, where its boot's clock was set later on.
    pub(super) fn set(&self, mut message: Message) -> Message {
        let ClockState::Unsynced { boot } = message.identity.clock else { return message };
        let Some(offset) = self.offset_of(boot) else { return message };
        match set_clock(message.identity.lane, &message.payload, offset) {
            Ok(payload) => {
                message.payload = payload.into();
                message.identity.sealed_at = message.identity.sealed_at.shifted(offset);
                message.identity.clock = ClockState::Synced;
            }
            Err(error) => {
                let (lane, index) = (message.identity.lane, message.index);
                tracing::error!(%lane, index, %error, "a message cannot be given its time; it goes as it was sealed");
            }
        }
        message
    }

    /// Drops fates of boots that are neither the present one nor among those of which messages are held; says
    /// whether there were any.
    fn keep(&mut self, held: &BTreeSet<Uuid>) -> bool {
        let before = self.fates.len();
        self.fates.retain(|boot, _| *boot == self.present || held.contains(boot));
        self.fates.len() < before
    }
}

/// What times mean in the present run.
#[derive(Debug)]
pub(super) struct Times {
    dir: PathBuf,
    pub(super) boots: Boots,
    /// The boot from which the times of the present epoch count, if they are provisional.
    pub(super) boot: Option<Uuid>,
    /// Likewise of the epoch before.
    pub(super) boot_before: Option<Uuid>,
}

impl Times {
    /// For the run that begins at `now`.
    pub(super) fn load(dir: &Path, now: Timestamp) -> Result<Self, OutboxError> {
        let boots = Boots::load(dir).map_err(OutboxError::io(dir))?;
        let boot = now.is_provisional().then_some(boots.present);
        Ok(Self { dir: dir.to_owned(), boots, boot, boot_before: None })
    }

    /// Drops what is known of boots of which nothing is held.
    pub(super) fn keep(&mut self, lanes: &[LaneStore]) -> Result<(), OutboxError> {
        let held = lanes.iter().flat_map(|store| &store.state.epochs).filter_map(|e| e.boot).collect();
        if self.boots.keep(&held) {
            self.boots.store(&self.dir).map_err(OutboxError::io(&self.dir))?;
        }
        Ok(())
    }

    /// An instant of an epoch whose provisional times count from `boot`, as the present epoch says it: as it is
    /// where its own count alike, else the true one, or none where that is not known.
    pub(super) fn settle(&self, at: Timestamp, boot: Option<Uuid>) -> Option<Timestamp> {
        if !at.is_provisional() || boot == self.boot {
            return Some(at);
        }
        Some(at.shifted(self.boots.offset_of(boot?)?))
    }

    /// [`Self::settle`] for an instant of the epoch before.
    pub(super) fn settle_kept(&self, at: Timestamp) -> Option<Timestamp> {
        self.settle(at, self.boot_before)
    }
}

#[cfg(test)]
mod tests;
