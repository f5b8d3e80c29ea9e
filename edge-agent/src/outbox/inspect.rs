//! A look at an outbox that no agent has open, for `edge-agent outbox`. Nothing in it is changed.
//!
//! sled writes when it opens a database, so databases are read from copies in the temporary folder, one at a time.
//! What counts is what the next start would find: the state of the generation that was written last.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use arrow::ipc::reader::StreamReader;
use common::{
    time::Timestamp,
    wire::{ClockState, Identity, Lane, decode},
};
use serde::Serialize;
use tempfile::TempDir;
use uuid::Uuid;

use super::{
    OutboxError,
    boots::Boots,
    generation::{Generation, Manifest, Message, Span, dir_of},
    lane::{State, numbers, rebuild, recover},
    lock::Lock,
    ranges::RangeSet,
    room::disk_bytes,
};

/// What a generation is to its lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// It is written.
    Open,
    /// It is full.
    Closed,
    /// It was damaged; what it held is declared.
    Quarantined,
}

impl Standing {
    /// The word that people and machines see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Closed => "closed",
            Self::Quarantined => "quarantined",
        }
    }
}

/// Messages of one epoch in a generation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SpanView {
    /// The run of the agent that sealed them.
    pub epoch: Uuid,
    /// Seq of the first one.
    pub first_seq: u64,
    /// Seq of the last one.
    pub last_seq: u64,
    /// How many.
    pub messages: u64,
    /// Not forgotten, and not declared as lost.
    pub held: u64,
    /// Rows in all of them.
    pub rows: u64,
    /// Rows in those held.
    pub held_rows: u64,
    /// Earliest event time.
    pub from: Timestamp,
    /// Latest event time.
    pub to: Timestamp,
    /// When the first one was sealed.
    pub sealed_from: Timestamp,
    /// When the last one was sealed.
    pub sealed_to: Timestamp,
}

/// One generation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GenerationView {
    /// The queue.
    pub lane: Lane,
    /// Its number in the lane.
    pub number: u64,
    /// What it is to its lane.
    pub standing: Standing,
    /// Bytes of its files.
    pub disk_bytes: u64,
    /// Bytes of its messages, without what sled adds.
    pub payload_bytes: u64,
    /// Its messages in order, one entry per epoch.
    pub spans: Vec<SpanView>,
    /// Why it cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    #[serde(skip)]
    dir: PathBuf,
    #[serde(skip)]
    manifest: Option<Manifest>,
}

impl GenerationView {
    /// Messages and rows that are held.
    pub fn held(&self) -> (u64, u64) {
        self.spans.iter().fold((0, 0), |(messages, rows), s| (messages + s.held, rows + s.held_rows))
    }
}

/// What is wrong with a generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The queue.
    pub lane: Lane,
    /// The generation.
    pub number: u64,
    /// What is wrong.
    pub problem: String,
}

/// What a check has read, and found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// Generations, those in quarantine not counted.
    pub generations: u64,
    /// Sound messages, forgotten ones included.
    pub messages: u64,
    /// Their rows.
    pub rows: u64,
    /// Everything that is wrong.
    pub findings: Vec<Finding>,
}

/// An outbox that nobody else can open while this is there.
#[derive(Debug)]
pub struct Inspection {
    /// By lane and number; those in quarantine at the end.
    pub generations: Vec<GenerationView>,
    forgotten: [RangeSet; 4],
    boots: Boots,
    /// From which start of the machine the times of an epoch count.
    boot_of: BTreeMap<Uuid, Uuid>,
    last_sealed: Option<Timestamp>,
    _lock: Option<Lock>,
}

impl Inspection {
    /// Looks at the outbox in `dir`.
    ///
    /// # Errors
    /// When there is none, an agent has it, or the folder or the temporary folder cannot be used.
    pub fn open(dir: &Path) -> Result<Self, OutboxError> {
        fs::read_dir(dir).map_err(OutboxError::io(dir))?;
        let mut inspection = Self {
            _lock: Lock::to_look(dir)?,
            generations: Vec::new(),
            forgotten: Default::default(),
            boots: Boots::load(dir).map_err(OutboxError::io(dir))?,
            boot_of: BTreeMap::new(),
            last_sealed: None,
        };
        for lane in Lane::ALL {
            inspection.look_at(dir, lane)?;
        }
        inspection.look_at_quarantine(&dir.join("quarantine"))?;
        Ok(inspection)
    }

    /// When it was last written to, by the clock of that run.
    pub fn last_sealed(&self) -> Option<Timestamp> {
        self.last_sealed
    }

    fn look_at(&mut self, dir: &Path, lane: Lane) -> Result<(), OutboxError> {
        let lane_dir = dir.join(lane.as_str());
        if !lane_dir.exists() {
            return Ok(());
        }
        let mut found = Vec::new();
        let mut state: Option<State> = None;
        let numbers = numbers(&lane_dir)?;
        for number in &numbers {
            let dir = dir_of(&lane_dir, *number);
            let (mut problem, mut manifest) = match Manifest::load(&dir) {
                Ok(manifest) => (None, Some(manifest)),
                // It was never used; the next start removes it.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => (Some(format!("its manifest cannot be read: {e}")), None),
            };
            // Closed ones are as their manifest says until somebody reads them.
            let is_last = Some(number) == numbers.last();
            let is_open = manifest.as_ref().is_none_or(|m| !m.closed);
            if is_open {
                match copied(&dir, |copy| present(copy, lane, manifest.as_ref()))? {
                    Ok(recovered) => manifest = Some(recovered),
                    Err(OutboxError::Corrupt { problem: why, .. }) => {
                        problem = Some(problem.map_or_else(String::new, |p| p + "; ") + &why);
                    }
                    Err(e) => return Err(e),
                }
            }
            state = manifest.as_ref().map(|m| m.state.clone()).or(state);
            let standing = if is_last && is_open { Standing::Open } else { Standing::Closed };
            found.push((standing, *number, dir, manifest, problem));
        }
        let state = state.unwrap_or_default();
        self.last_sealed = self.last_sealed.max(state.at);
        self.boot_of.extend(state.epochs.iter().filter_map(|e| Some((e.epoch, e.boot?))));
        self.forgotten[lane as usize] = state.forgotten;
        for (standing, number, dir, manifest, problem) in found {
            let forgotten = &self.forgotten[lane as usize];
            self.generations.push(view(lane, number, standing, dir, manifest, problem, forgotten));
        }
        Ok(())
    }

    fn look_at_quarantine(&mut self, folder: &Path) -> Result<(), OutboxError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let name = entry.map_err(OutboxError::io(folder))?.file_name();
            let Some((lane, number)) = name.to_str().and_then(|n| n.split_once('-')) else { continue };
            let number = number.split('.').next().unwrap_or(number);
            if let (Ok(lane), Ok(number)) = (lane.parse::<Lane>(), number.parse::<u64>()) {
                found.push((lane, number, folder.join(&name)));
            }
        }
        found.sort();
        // Whatever it held is declared.
        let mut declared = RangeSet::default();
        declared.insert(0..u64::MAX);
        for (lane, number, dir) in found {
            let manifest = Manifest::load(&dir).ok();
            self.generations.push(view(lane, number, Standing::Quarantined, dir, manifest, None, &declared));
        }
        Ok(())
    }

    /// Reads every message of a generation in order, each as it would go out or with what is wrong with it, and
    /// whether it is held. The generation's own problem where it cannot be read at all.
    ///
    /// # Errors
    /// When the disk refuses, or `each` does.
    pub fn read(
        &self,
        generation: &GenerationView,
        mut each: impl FnMut(bool, Result<Message, String>) -> io::Result<()>,
    ) -> Result<Option<String>, OutboxError> {
        let (lane, dir) = (generation.lane, &generation.dir);
        let opened = copied(dir, |copy| {
            let (database, manifest) = match &generation.manifest {
                Some(manifest) => (Generation::existing(copy)?, manifest.clone()),
                None => rebuild(copy, lane)?,
            };
            let forgotten = &self.forgotten[lane as usize];
            let mut bytes = 0;
            for span in &manifest.spans {
                let mut rows_before = None;
                for index in span.range() {
                    let found = database.get(copy, lane, index).map_err(|e| match e {
                        OutboxError::Corrupt { problem, .. } => problem,
                        e => e.to_string(),
                    });
                    let message = found.and_then(|m| compare(span, index, m, rows_before));
                    let name =
                        format!("message {}/{lane}/{}", span.epoch, span.first_seq + (index - span.first));
                    rows_before = message.as_ref().ok().map(|m| m.identity.rows_before + m.identity.rows);
                    bytes += message.as_ref().map_or(0, |m| m.payload.len() as u64);
                    let message = message.map(|m| self.boots.set(self.with_boot(m)));
                    let message = message.map_err(|problem| format!("{name} {problem}"));
                    each(!forgotten.contains(index), message).map_err(OutboxError::io(copy))?;
                }
            }
            Ok((manifest.bytes, bytes))
        })?;
        Ok(match opened {
            Ok((written, read)) if written == read => None,
            Ok((written, read)) => {
                Some(format!("{read} B of messages can be read, its manifest says {written} B"))
            }
            Err(OutboxError::Corrupt { problem, .. }) => Some(problem),
            Err(e) => return Err(e),
        })
    }

    /// Adds what only the lane's state knows.
    fn with_boot(&self, mut message: Message) -> Message {
        if let Some(boot) = self.boot_of.get(&message.identity.epoch) {
            message.identity.clock = ClockState::Unsynced { boot: *boot };
        }
        message
    }

    /// Reads everything outside the quarantine and compares it with the manifests.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn check(&self) -> Result<Checked, OutboxError> {
        let mut checked = Checked::default();
        let mut next: [Option<u64>; 4] = [None; 4];
        for generation in self.generations.iter().filter(|g| g.standing != Standing::Quarantined) {
            checked.generations += 1;
            let GenerationView { lane, number, .. } = *generation;
            let mut problems: Vec<String> = generation.problem.iter().cloned().collect();
            if let Some(manifest) = &generation.manifest {
                let range = manifest.range();
                let expected = next[lane as usize].replace(range.end).unwrap_or(range.start);
                let between = self.forgotten[lane as usize].absent(expected..range.start);
                problems
                    .extend(between.iter().map(|r| format!("messages {r:?} before it are in no generation")));
            }
            let (mut messages, mut rows) = (0, 0);
            let mut broken = Vec::new();
            let unreadable = self.read(generation, |_, message| {
                match message {
                    Ok(m) => (messages, rows) = (messages + 1, rows + m.identity.rows),
                    Err(problem) => broken.push(problem),
                }
                Ok(())
            })?;
            problems.extend(broken);
            // A file that cannot be opened was found out already when it was looked at.
            problems.extend(unreadable.filter(|_| problems.is_empty()));
            checked.messages += messages;
            checked.rows += rows;
            checked.findings.extend(problems.into_iter().map(|problem| Finding { lane, number, problem }));
        }
        Ok(checked)
    }
}

fn view(
    lane: Lane,
    number: u64,
    standing: Standing,
    dir: PathBuf,
    manifest: Option<Manifest>,
    problem: Option<String>,
    forgotten: &RangeSet,
) -> GenerationView {
    let span_view = |span: &Span| {
        let sum = |rows: &[u32]| rows.iter().map(|r| u64::from(*r)).sum::<u64>();
        let at = |index: u64| usize::try_from(index - span.first).unwrap_or(usize::MAX);
        let held = forgotten.absent(span.range());
        SpanView {
            epoch: span.epoch,
            first_seq: span.first_seq,
            last_seq: span.first_seq + (span.rows.len() as u64).saturating_sub(1),
            messages: span.rows.len() as u64,
            held: held.iter().map(|r| r.end - r.start).sum(),
            rows: sum(&span.rows),
            held_rows: held.iter().map(|r| sum(&span.rows[at(r.start)..at(r.end)])).sum(),
            from: span.from,
            to: span.to,
            sealed_from: span.sealed_from,
            sealed_to: span.sealed_to,
        }
    };
    GenerationView {
        lane,
        number,
        standing,
        disk_bytes: disk_bytes(&dir),
        payload_bytes: manifest.as_ref().map_or(0, |m| m.bytes),
        spans: manifest.iter().flat_map(|m| &m.spans).map(span_view).collect(),
        problem,
        dir,
        manifest,
    }
}

/// The manifest of the generation that was written last, as the next start would have it.
fn present(copy: &Path, lane: Lane, manifest: Option<&Manifest>) -> Result<Manifest, OutboxError> {
    let (_, manifest) = match manifest {
        Some(manifest) => recover(copy, lane, manifest)?,
        None => rebuild(copy, lane)?,
    };
    Ok(manifest)
}

/// The message, if it is what its span says, and its payload what its head says.
fn compare(
    span: &Span,
    index: u64,
    message: Option<Message>,
    rows_before: Option<u64>,
) -> Result<Message, String> {
    let message = message.ok_or("is missing or malformed")?;
    let Identity { epoch, seq, rows, .. } = message.identity;
    let offset = index - span.first;
    if (epoch, seq) != (span.epoch, span.first_seq + offset) {
        return Err(format!("is called {epoch}, seq {seq}"));
    }
    let expected = span.rows[usize::try_from(offset).unwrap_or(usize::MAX)];
    if rows != u64::from(expected) {
        return Err(format!("has {rows} rows, its manifest says {expected}"));
    }
    if let Some(before) = rows_before
        && before != message.identity.rows_before
    {
        return Err(format!("comes after {} rows, not {before}", message.identity.rows_before));
    }
    let lane = message.identity.lane;
    let batch = decode(lane, &message.payload).map_err(|e| format!("cannot be decoded: {e}"))?;
    if batch.num_rows() as u64 != rows {
        return Err(format!("holds {} rows, its name says {rows}", batch.num_rows()));
    }
    let named = StreamReader::try_new(io::Cursor::new(&message.payload), None).map_err(|e| e.to_string())?;
    let metadata: Vec<_> = named.schema().metadata().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    // What may have become known since it was sealed, `oldest` and the clock, is not compared.
    let name = |i: &Identity| (i.epoch, i.lane, i.seq, i.rows, i.rows_before, i.sealed_at);
    match Identity::from_properties(&metadata) {
        Ok(within) if name(&within) == name(&message.identity) => Ok(message),
        Ok(within) => Err(format!("is called seq {} of {} by its own payload", within.seq, within.epoch)),
        Err(e) => Err(format!("has no name in its payload: {e}")),
    }
}

/// Works on a copy of a generation's database. The outer error is the machine's, the inner one the work's.
fn copied<T>(
    dir: &Path,
    work: impl FnOnce(&Path) -> Result<T, OutboxError>,
) -> Result<Result<T, OutboxError>, OutboxError> {
    let copy = TempDir::with_prefix("tailrace-outbox-").map_err(OutboxError::io(&std::env::temp_dir()))?;
    copy_files(dir, copy.path()).map_err(OutboxError::io(dir))?;
    Ok(work(copy.path()).map_err(|e| match e {
        // What people see is the original.
        OutboxError::Corrupt { problem, .. } => OutboxError::corrupt(dir, &problem),
        e => e,
    }))
}

fn copy_files(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            fs::create_dir(&target)?;
            copy_files(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}
