//! CSV: cells without quotes, the first line a header.
//!
//! Instants are RFC 3339, or `2020-03-09 10:14:33` without a zone, which is taken for UTC. The long form's header is
//! `ts,device_id,value` or `ts,device_id,value,quality`; the wide form's names its columns, at any place.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use common::{
    reading::{DeviceIx, Quality, Registry},
    time::Timestamp,
};

use super::{Cell, long, reading};
use crate::{census::Reason, settings::ReplayForm};

/// Bytes that are read at a time.
const BUFFER: usize = 64 * 1024;

/// An open file, at a row.
pub(super) struct Csv {
    path: PathBuf,
    file: BufReader<File>,
    /// The row, without the end of the line.
    line: String,
    /// Where its cells end, in bytes.
    ends: Vec<usize>,
    /// Between two cells.
    separator: char,
    time: usize,
    columns: Columns,
}

/// Where the readings stand.
enum Columns {
    Long { devices: HashMap<String, DeviceIx>, last: (String, Option<Timestamp>) },
    Wide(Vec<(usize, DeviceIx)>),
}

impl Csv {
    pub(super) fn open(path: &Path, form: &ReplayForm, registry: &Registry) -> anyhow::Result<Self> {
        let file = BufReader::with_capacity(BUFFER, File::open(path)?);
        let mut csv = Self {
            path: path.to_owned(),
            file,
            line: String::new(),
            ends: Vec::new(),
            separator: ',',
            time: 0,
            columns: Columns::Wide(Vec::new()),
        };
        csv.read_line()?;
        let header = &csv.line;
        match form {
            ReplayForm::Long => {
                let is_long = header.starts_with("ts,device_id,value");
                ensure!(
                    is_long,
                    "its header is {header:?}; write ts,device_id,value,quality, or say in [[replay]] what the \
                     columns are"
                );
                let devices = (0..).map(DeviceIx).zip(&registry.devices);
                let devices = devices.map(|(ix, device)| (device.id.clone(), ix)).collect();
                csv.columns = Columns::Long { devices, last: (String::new(), None) };
            }
            ReplayForm::Wide { separator, time, columns } => {
                let place = |name: &str| {
                    let at = header.split(*separator).position(|cell| cell == name);
                    at.with_context(|| {
                        format!("no column {name:?} in its header {header:?}, split at {separator:?}")
                    })
                };
                let found = columns.iter().map(|(name, device)| Ok((place(name)?, *device)));
                let found = found.collect::<anyhow::Result<_>>()?;
                (csv.time, csv.separator) = (place(time)?, *separator);
                csv.columns = Columns::Wide(found);
            }
        }
        Ok(csv)
    }

    /// Adds the cells of the next row; false at the end of the file.
    pub(super) fn next(&mut self, cells: &mut Vec<Cell>) -> anyhow::Result<bool> {
        if !self.read_line().with_context(|| format!("reading {}", self.path.display()))? {
            return Ok(false);
        }
        let mut columns = std::mem::replace(&mut self.columns, Columns::Wide(Vec::new()));
        match &mut columns {
            Columns::Long { devices, last } => cells.push(self.long(devices, last)),
            Columns::Wide(columns) => {
                let ts = self.cell(self.time).and_then(instant);
                cells.extend(columns.iter().map(|(at, device)| {
                    let ts = ts.ok_or((None, Reason::Malformed))?;
                    let text = self.cell(*at).ok_or((Some(ts), Reason::Malformed))?;
                    reading(ts, *device, Quality::Good, value(text))
                }));
            }
        }
        self.columns = columns;
        Ok(true)
    }

    /// The cell with the instant of the row.
    pub(super) fn time(&self) -> &str {
        self.cell(self.time).unwrap_or_default()
    }

    /// `last` is the instant of the row before: neighbours often share one.
    fn long(&self, devices: &HashMap<String, DeviceIx>, last: &mut (String, Option<Timestamp>)) -> Cell {
        let cell = |at| self.cell(at).ok_or((None, Reason::Malformed));
        let (ts, device, text) = (cell(0)?, cell(1)?, cell(2)?);
        if last.1.is_none() || last.0 != ts {
            *last = (ts.to_owned(), instant(ts));
        }
        let ts = last.1.ok_or((None, Reason::Malformed))?;
        let quality = match self.cell(3) {
            None | Some("") => Ok(Quality::Good),
            Some(code) => code.parse().ok().and_then(Quality::from_code).ok_or(Reason::Malformed),
        };
        long(ts, devices.get(device).copied(), quality, value(text))
    }

    fn cell(&self, at: usize) -> Option<&str> {
        let begin = match at {
            0 => 0,
            _ => self.ends.get(at - 1)? + self.separator.len_utf8(),
        };
        self.line.get(begin..*self.ends.get(at)?)
    }

    /// False at the end of the file.
    fn read_line(&mut self) -> std::io::Result<bool> {
        self.line.clear();
        let there = self.file.read_line(&mut self.line)? > 0;
        // A separator at the end stands before an empty cell.
        let separator = self.separator;
        let end = self.line.trim_end_matches(|c: char| c.is_whitespace() && c != separator).len();
        self.line.truncate(end);
        self.ends.clear();
        self.ends.extend(self.line.match_indices(self.separator).map(|(at, _)| at));
        self.ends.push(self.line.len());
        Ok(there)
    }
}

/// The number in a cell; none in an empty one.
fn value(text: &str) -> Result<Option<f64>, Reason> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| Reason::Malformed)
}

fn instant(text: &str) -> Option<Timestamp> {
    text.parse().ok().or_else(|| format!("{}Z", text.replacen(' ', "T", 1)).parse().ok())
}
