//! A recorded file, replayed at its own times: at once as far as they lie in the past, then as they come.
//!
//! CSV ([`csv`]), or Parquet ([`parquet`]) where the file's name ends in `.parquet`, ascending in time, in one of two
//! forms ([`ReplayForm`]):
//!
//! * **long**, a row a reading: columns `ts`, `device_id`, `value` and, if there is one, `quality` (0 good, 1 uncertain,
//!   2 bad);
//! * **wide**, a row an instant, with a column for each device.
//!
//! A missing value makes a bad reading without a value, a missing quality is good. Readings of one instant are one
//! batch. What cannot be read is rejected with its reason, in the hour of the row before it where it has no time of its
//! own. Nothing is skipped: a full pipe makes the replay wait.
//!
//! Memory holds about [`READ_AHEAD`] readings, whatever the size of the file.

mod csv;
mod parquet;

use std::{path::Path, sync::Arc};

use anyhow::Context as _;
use common::{
    reading::{DeviceIx, Quality, Reading, Registry},
    time::Timestamp,
};
use tokio::task::spawn_blocking;

use self::{csv::Csv, parquet::Parquet};
use super::{Context, Hardware, Polled, no_value};
use crate::{
    census::{Outcome, Reason},
    settings::ReplayForm,
};

/// Readings that are read at a time.
const READ_AHEAD: usize = 4_096;

/// A reading, or its time if it has one, and what is wrong with it.
type Cell = Result<Reading, (Option<Timestamp>, Reason)>;

/// Replays the file until its end or the stop signal.
pub(super) async fn run<H: Hardware>(
    path: &Path,
    form: &ReplayForm,
    registry: Arc<Registry>,
    mut context: Context<H>,
) -> anyhow::Result<()> {
    let mut pacer = context.clock.pacer();
    let (path, form, after) = (path.to_owned(), form.clone(), context.resume_after);
    let mut instants = spawn_blocking(move || Instants::open(&path, &form, &registry, after)).await??;
    loop {
        let read = spawn_blocking(move || instants.read().map(|polls| (instants, polls)));
        let polls;
        (instants, polls) = read.await??;
        if polls.is_empty() {
            return Ok(());
        }
        for polled in polls {
            tokio::select! {
                () = pacer.sleep_until(polled.at) => {}
                _ = context.stop.wait_for(|stop| *stop) => return Ok(()),
            }
            if context.out.send(polled).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// A file, instant by instant.
struct Instants {
    recording: Recording,
    cells: Vec<Cell>,
    /// The instant under way.
    batch: Polled,
    /// Nothing up to it is read again.
    after: Option<Timestamp>,
}

impl Instants {
    fn open(
        path: &Path,
        form: &ReplayForm,
        registry: &Registry,
        after: Option<Timestamp>,
    ) -> anyhow::Result<Self> {
        let recording = Recording::open(path, form, registry)?;
        Ok(Self { recording, cells: Vec::new(), batch: Polled::default(), after })
    }

    /// The next batches, about [`READ_AHEAD`] readings; none at the end of the file.
    fn read(&mut self) -> anyhow::Result<Vec<Polled>> {
        let (mut polls, mut readings) = (Vec::new(), 0);
        while readings < READ_AHEAD {
            let more = self.recording.next(&mut self.cells)?;
            let next = self.cells.iter().find_map(|cell| cell.as_ref().ok()).map(|reading| reading.ts);
            let another = next.is_some_and(|ts| !self.batch.readings.is_empty() && ts != self.batch.at);
            if !more || another {
                let Polled { at, readings: read, census } = std::mem::take(&mut self.batch);
                // The next one is most often as long.
                self.batch.readings.reserve(if more { read.len() } else { 0 });
                if !(read.is_empty() && census.is_empty()) {
                    readings += read.len();
                    polls.push(Polled::new(at, read, census));
                }
            }
            if !more {
                break;
            }
            for cell in self.cells.drain(..) {
                let ts = match &cell {
                    Ok(reading) => reading.ts,
                    Err((ts, _)) => ts.unwrap_or(self.batch.at),
                };
                if self.after.is_none_or(|sealed| ts > sealed) {
                    take(&mut self.batch, cell);
                }
            }
        }
        Ok(polls)
    }
}

/// A row of a recorded file, for those who read it at once instead of at its own times.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its instant, as it stands there; in RFC 3339 where it is no text.
    pub time: String,
    /// Its readings.
    pub polled: Polled,
}

/// Reads a recorded file row by row. Blocks.
///
/// # Errors
/// When the file cannot be read, or its columns do not fit.
pub fn rows(
    path: &Path,
    form: &ReplayForm,
    registry: &Registry,
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Row>>> {
    let mut recording = Recording::open(path, form, registry)?;
    let mut cells: Vec<Cell> = Vec::new();
    let mut at = Timestamp::default();
    Ok(std::iter::from_fn(move || match recording.next(&mut cells) {
        Err(error) => Some(Err(error)),
        Ok(false) => None,
        Ok(true) => {
            let mut polled = Polled { at, ..Polled::default() };
            for cell in cells.drain(..) {
                take(&mut polled, cell);
            }
            at = polled.at;
            let Polled { at, readings, census } = polled;
            Some(Ok(Row { time: recording.time(), polled: Polled::new(at, readings, census) }))
        }
    }))
}

/// Adds a cell to its batch.
fn take(batch: &mut Polled, cell: Cell) {
    match cell {
        Ok(reading) => {
            batch.at = reading.ts;
            batch.readings.push(reading);
        }
        Err((ts, reason)) => {
            let ts = ts.unwrap_or(batch.at);
            batch.at = batch.at.max(ts);
            batch.census.add(ts, Outcome::Polled, 1);
            batch.census.add(ts, Outcome::Rejected(reason), 1);
        }
    }
}

/// A file of either format.
enum Recording {
    Csv(Box<Csv>),
    Parquet(Box<Parquet>),
}

impl Recording {
    fn open(path: &Path, form: &ReplayForm, registry: &Registry) -> anyhow::Result<Self> {
        let named = || format!("reading {}", path.display());
        let is_parquet = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("parquet"));
        if is_parquet {
            Parquet::open(path, form, registry).map(Box::new).map(Self::Parquet).with_context(named)
        } else {
            Csv::open(path, form, registry).map(Box::new).map(Self::Csv).with_context(named)
        }
    }

    /// Replaces `cells` by those of the next row; false at the end of the file.
    fn next(&mut self, cells: &mut Vec<Cell>) -> anyhow::Result<bool> {
        cells.clear();
        match self {
            Self::Csv(csv) => csv.next(cells),
            Self::Parquet(parquet) => parquet.next(cells),
        }
    }

    /// The instant of the row.
    fn time(&self) -> String {
        match self {
            Self::Csv(csv) => csv.time().to_owned(),
            Self::Parquet(parquet) => parquet.time(),
        }
    }
}

/// The reading of a row of the long form.
fn long(
    ts: Timestamp,
    device: Option<DeviceIx>,
    quality: Result<Quality, Reason>,
    value: Result<Option<f64>, Reason>,
) -> Cell {
    let device = device.ok_or((Some(ts), Reason::UnknownDevice))?;
    let quality = quality.map_err(|reason| (Some(ts), reason))?;
    reading(ts, device, quality, value)
}

fn reading(ts: Timestamp, device: DeviceIx, quality: Quality, value: Result<Option<f64>, Reason>) -> Cell {
    match value {
        Ok(Some(value)) => Ok(Reading { ts, device, quality, value }),
        Ok(None) => Ok(no_value(ts, device)),
        Err(reason) => Err((Some(ts), reason)),
    }
}

#[cfg(test)]
mod tests;
