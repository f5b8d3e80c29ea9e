//! One process at a time: an advisory lock on `{dir}/lock`, which ends with the process, however that ends.

use std::{
    fs::{File, TryLockError},
    io,
    path::Path,
    thread,
    time::Duration,
};

use super::OutboxError;

/// How often a lock that another handle still holds is tried, 20 ms apart: an agent that was told to end.
const TRIES: u32 = 100;

/// Held until it is dropped.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "it is there to be dropped")] File);

impl Lock {
    /// Takes the outbox in `dir` for writing.
    pub(super) fn take(dir: &Path) -> Result<Self, OutboxError> {
        let path = dir.join("lock");
        let open = File::options().create(true).truncate(false).write(true).open(&path);
        let file = open.map_err(OutboxError::io(&path))?;
        for _ in 0..TRIES {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(20)),
                Err(TryLockError::Error(e)) => return Err(OutboxError::io(&path)(e)),
            }
        }
        Err(OutboxError::Locked(dir.to_owned()))
    }

    /// Keeps writers away while somebody looks. `None` where there is no lock and none can be made: on a disk that is
    /// mounted for reading there are no writers.
    pub(super) fn to_look(dir: &Path) -> Result<Option<Self>, OutboxError> {
        let path = dir.join("lock");
        let open = File::open(&path).or_else(|_| File::options().create(true).append(true).open(&path));
        let file = match open {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => return Ok(None),
            Err(e) => return Err(OutboxError::io(&path)(e)),
        };
        match file.try_lock() {
            Ok(()) => Ok(Some(Self(file))),
            Err(TryLockError::WouldBlock) => Err(OutboxError::Locked(dir.to_owned())),
            Err(TryLockError::Error(e)) => Err(OutboxError::io(&path)(e)),
        }
    }
}
