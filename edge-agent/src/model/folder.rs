//! The folder of models: one bundle a sub-folder, looked at again and again while the agent runs.
//!
//! A bundle is read when its files have changed (inode, size, time of change) and have then stood still from one look
//! to the next, so that one that is being copied is left alone. Reading and verifying it takes up to a second and is
//! done off the hot path.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use tokio::{sync::mpsc, task};

use super::{bundle::Bundle, calibrate};

/// What stands in a bundle.
const FILES: [&str; 4] = ["model.onnx", "model.toml", "golden.json", calibrate::FILE];

/// A bundle that is new, changed or gone.
#[derive(Debug)]
pub struct Change {
    /// Its folder.
    pub folder: PathBuf,
    /// What it holds now; none when it is gone.
    pub bundle: Option<anyhow::Result<Bundle>>,
}

/// What the folder of models held when it was last looked at.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    seen: BTreeMap<PathBuf, Seen>,
    /// Whether it could not be read.
    broken: bool,
}

#[derive(Debug)]
struct Seen {
    print: Print,
    loaded: bool,
}

/// Inode, size and time of change in s and ns, by [`FILES`]; none where there is no file.
type Print = [Option<(u64, u64, i64, i64)>; FILES.len()];

impl Folder {
    /// A folder that has not been looked at.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, seen: BTreeMap::new(), broken: false }
    }

    /// Every bundle as it stands. Blocks.
    pub fn load(&mut self) -> Vec<Change> {
        self.look(true)
    }

    /// What has changed since, and has come to rest. Blocks.
    pub fn poll(&mut self) -> Vec<Change> {
        self.look(false)
    }

    fn look(&mut self, at_once: bool) -> Vec<Change> {
        let mut changes = Vec::new();
        let bundles = match self.list() {
            Ok(bundles) => bundles,
            // Reported once; the models that are in use go on.
            Err(_) if self.broken => return changes,
            Err(error) => {
                self.broken = true;
                changes.push(Change { folder: self.dir.clone(), bundle: Some(Err(error)) });
                return changes;
            }
        };
        if std::mem::take(&mut self.broken) {
            changes.push(Change { folder: self.dir.clone(), bundle: None });
        }
        self.seen.retain(|folder, _| {
            let there = bundles.contains_key(folder);
            if !there {
                changes.push(Change { folder: folder.clone(), bundle: None });
            }
            there
        });
        for (folder, print) in bundles {
            let rests = self.seen.get(&folder).is_some_and(|seen| seen.print == print);
            let loaded = rests && self.seen[&folder].loaded;
            let load = !loaded && (rests || at_once);
            self.seen.insert(folder.clone(), Seen { print, loaded: loaded || load });
            if load {
                changes.push(Change { bundle: Some(Bundle::load(&folder)), folder });
            }
        }
        changes
    }

    fn list(&self) -> anyhow::Result<BTreeMap<PathBuf, Print>> {
        let entries = fs::read_dir(&self.dir)
            .map_err(|error| anyhow!("cannot read the folder of models {}: {error}", self.dir.display()))?;
        let folders = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
        Ok(folders.map(|folder| (folder.clone(), print(&folder))).collect())
    }
}

fn print(folder: &Path) -> Print {
    FILES.map(|file| {
        let found = fs::metadata(folder.join(file)).ok()?;
        Some((found.ino(), found.size(), found.ctime(), found.ctime_nsec()))
    })
}

/// Polls the folder and passes on what changes, until nobody listens any more.
///
/// # Errors
/// When the looking itself fails.
pub async fn watch(mut folder: Folder, every: Duration, changes: mpsc::Sender<Change>) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            () = changes.closed() => return Ok(()),
        }
        let looked = task::spawn_blocking(move || {
            let changed = folder.poll();
            (folder, changed)
        });
        let changed;
        (folder, changed) = looked.await.context("looking at the folder of models")?;
        for change in changed {
            if changes.send(change).await.is_err() {
                return Ok(());
            }
        }
    }
}
