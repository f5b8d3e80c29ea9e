//! A recorded file, replayed at its own times: at once as far as they lie in the past, then as they come.
//!
//! CSV, ascending in time, in one of two forms ([`ReplayForm`]): a row a reading, with the header
//! `ts,device_id,value` or `ts,device_id,value,quality`; or a row an instant, with a column for each device. Instants
//! are RFC 3339, or `2020-03-09 10:14:33` without a zone, which is taken for UTC. Readings of one instant are one
//! batch. What cannot be read is rejected with its reason, in the hour of the row before it where it has no time of
//! its own. Nothing is skipped: a full pipe makes the replay wait.

use std::{
    io::{self, BufRead as _},
    path::Path,
    sync::Arc,
};

use anyhow::Context as _;
use common::{
    reading::{DeviceIx, Quality, Reading, Registry},
    time::Timestamp,
};
use tokio::{
    fs::File,
    io::{AsyncBufReadExt, BufReader},
};

use super::{Context, Hardware, Polled, no_value};
use crate::{
    census::{Outcome, Reason},
    settings::ReplayForm,
};

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
    let named = || format!("replaying {}", path.display());
    let mut lines = BufReader::new(File::open(path).await.with_context(named)?).lines();
    let header = lines.next_line().await.with_context(named)?.unwrap_or_default();
    let rows = Rows::of(form, header.trim_end()).with_context(named)?;
    let mut batch = Polled::default();
    let mut cells: Vec<Cell> = Vec::new();
    loop {
        let line = lines.next_line().await.with_context(named)?;
        match &line {
            Some(line) => rows.parse(line.trim_end(), &registry, &mut cells),
            None => cells.clear(),
        }
        let next = cells.iter().find_map(|cell| cell.as_ref().ok()).map(|reading| reading.ts);
        let ends_batch =
            line.is_none() || next.is_some_and(|ts| !batch.readings.is_empty() && ts != batch.at);
        if ends_batch && !(batch.readings.is_empty() && batch.census.is_empty()) {
            let Polled { at, readings, census } = std::mem::take(&mut batch);
            tokio::select! {
                () = pacer.sleep_until(at) => {}
                _ = context.stop.wait_for(|stop| *stop) => return Ok(()),
            }
            if context.out.send(Polled::new(at, readings, census)).await.is_err() {
                return Ok(());
            }
        }
        if line.is_none() {
            return Ok(());
        }
        for cell in cells.drain(..) {
            let ts = match &cell {
                Ok(reading) => reading.ts,
                Err((ts, _)) => ts.unwrap_or(batch.at),
            };
            if context.resume_after.is_none_or(|sealed| ts > sealed) {
                take(&mut batch, cell);
            }
        }
    }
}

/// A line of a recorded file, for those who read it at once instead of at its own times.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its instant, as it stands there.
    pub time: String,
    /// Its readings.
    pub polled: Polled,
}

/// Reads a recorded file line by line. Blocks.
///
/// # Errors
/// When the file cannot be read, or its header does not fit.
pub fn rows(
    path: &Path,
    form: &ReplayForm,
    registry: Arc<Registry>,
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Row>>> {
    let name = path.display().to_string();
    let named = move || format!("reading {name}");
    let file = std::fs::File::open(path).with_context(&named)?;
    let mut lines = io::BufReader::new(file).lines();
    let header = lines.next().transpose().with_context(&named)?.unwrap_or_default();
    let rows = Rows::of(form, header.trim_end()).with_context(&named)?;
    let mut cells: Vec<Cell> = Vec::new();
    let mut at = Timestamp::default();
    Ok(lines.map(move |line| {
        let line = line.with_context(&named)?;
        let line = line.trim_end();
        rows.parse(line, &registry, &mut cells);
        let mut polled = Polled { at, ..Polled::default() };
        for cell in cells.drain(..) {
            take(&mut polled, cell);
        }
        at = polled.at;
        let Polled { at, readings, census } = polled;
        Ok(Row { time: rows.time(line).to_owned(), polled: Polled::new(at, readings, census) })
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

/// How a line is read, once the header is known.
enum Rows {
    Long,
    Wide { separator: char, time: usize, columns: Vec<(usize, DeviceIx)> },
}

impl Rows {
    fn of(form: &ReplayForm, header: &str) -> anyhow::Result<Rows> {
        let ReplayForm::Wide { separator, time, columns } = form else {
            let is_long = header.starts_with("ts,device_id,value");
            anyhow::ensure!(
                is_long,
                "its header is {header:?}; write ts,device_id,value,quality, or say in [[replay]] what the columns are"
            );
            return Ok(Rows::Long);
        };
        let place = |name: &str| {
            let at = header.split(*separator).position(|cell| cell == name);
            at.with_context(|| format!("no column {name:?} in its header {header:?}, split at {separator:?}"))
        };
        let columns = columns.iter().map(|(name, device)| Ok((place(name)?, *device)));
        let columns = columns.collect::<anyhow::Result<_>>()?;
        Ok(Rows::Wide { separator: *separator, time: place(time)?, columns })
    }

    /// The cell with the instant.
    fn time<'a>(&self, line: &'a str) -> &'a str {
        match self {
            Rows::Long => line.split(',').next(),
            Rows::Wide { separator, time, .. } => line.split(*separator).nth(*time),
        }
        .unwrap_or_default()
    }

    /// Replaces `cells` by those of a line.
    fn parse(&self, line: &str, registry: &Registry, cells: &mut Vec<Cell>) {
        cells.clear();
        match self {
            Rows::Long => cells.push(long(line, registry)),
            Rows::Wide { separator, time, columns } => {
                let texts: Vec<&str> = line.split(*separator).collect();
                let ts = texts.get(*time).and_then(|text| instant(text));
                cells.extend(columns.iter().map(|(at, device)| {
                    let ts = ts.ok_or((None, Reason::Malformed))?;
                    let text = texts.get(*at).ok_or((Some(ts), Reason::Malformed))?;
                    reading(ts, *device, Quality::Good, text)
                }));
            }
        }
    }
}

fn long(line: &str, registry: &Registry) -> Cell {
    let mut cells = line.split(',');
    let mut cell = || cells.next().ok_or((None, Reason::Malformed));
    let (ts, device, value) = (cell()?, cell()?, cell()?);
    let ts = instant(ts).ok_or((None, Reason::Malformed))?;
    let device = registry.find(device).ok_or((Some(ts), Reason::UnknownDevice))?;
    let quality = match cells.next() {
        None | Some("") => Quality::Good,
        Some(code) => code.parse().ok().and_then(Quality::from_code).ok_or((Some(ts), Reason::Malformed))?,
    };
    reading(ts, device, quality, value)
}

fn reading(ts: Timestamp, device: DeviceIx, quality: Quality, value: &str) -> Cell {
    if value.is_empty() {
        return Ok(no_value(ts, device));
    }
    let value: f64 = value.parse().map_err(|_| (Some(ts), Reason::Malformed))?;
    Ok(Reading { ts, device, quality, value })
}

fn instant(text: &str) -> Option<Timestamp> {
    text.parse().ok().or_else(|| format!("{}Z", text.replacen(' ', "T", 1)).parse().ok())
}

#[cfg(test)]
mod tests {
    use common::{reading::Device, time::SystemClock};
    use tokio::sync::{mpsc, watch};

    use super::*;
    use crate::{metrics::Metrics, source::LinuxHardware};

    /// Replays a file of the devices `p/t` and `p/s`, of which nothing before 00:00:01 is new.
    async fn replay(rows: &str, form: ReplayForm) -> anyhow::Result<mpsc::Receiver<Polled>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.csv");
        std::fs::write(&path, rows).unwrap();
        let device = |id: &str| Device { id: id.into(), ..Device::default() };
        let registry = Registry { devices: vec![device("p/t"), device("p/s")], ..Registry::default() };
        let (out, polled) = mpsc::channel(8);
        let (_stop, stopped) = watch::channel(false);
        let context = Context {
            hardware: Arc::new(LinuxHardware),
            clock: Arc::new(SystemClock),
            resume_after: Some("2026-03-01T00:00:00Z".parse().unwrap()),
            out,
            stop: stopped,
            metrics: Arc::new(Metrics::default()),
        };
        run(&path, &form, Arc::new(registry), context).await?;
        Ok(polled)
    }

    fn wide() -> ReplayForm {
        let columns = vec![("T".to_owned(), DeviceIx(0)), ("S 2".to_owned(), DeviceIx(1))];
        ReplayForm::Wide { separator: ';', time: "datetime".into(), columns }
    }

    #[tokio::test]
    async fn a_row_is_an_instant_in_the_wide_form() {
        let rows = "datetime;S 2;unused;T\n\
                    2026-03-01 00:00:00;1;x;2\n\
                    2026-03-01 00:00:01;3;x;4.5\n\
                    never;3;x;4.5\n\
                    2026-03-01 00:00:02;;x;what\n";
        let mut polled = replay(rows, wide()).await.unwrap();
        let first = polled.recv().await.unwrap();
        let got: Vec<_> = first.readings.iter().map(|r| (r.device, r.value)).collect();
        assert_eq!(got, [(DeviceIx(0), 4.5), (DeviceIx(1), 3.0)]);
        assert_eq!(first.at, "2026-03-01T00:00:01Z".parse().unwrap());
        assert_eq!(first.census.total(Outcome::Rejected(Reason::Malformed)), 2);
        let second = polled.recv().await.unwrap();
        assert_eq!((second.readings.len(), second.readings[0].quality), (1, Quality::Bad));
        assert_eq!(second.census.total(Outcome::Rejected(Reason::Malformed)), 1);
        assert!(polled.recv().await.is_none());
    }

    #[tokio::test]
    async fn a_header_that_does_not_fit_is_named() {
        for (header, form, part) in [
            ("a;b", wide(), "no column \"T\" in its header \"a;b\", split at ';'"),
            ("a;b", ReplayForm::Long, "its header is \"a;b\"; write ts,device_id,value,quality"),
        ] {
            let error = format!("{:#}", replay(header, form).await.unwrap_err());
            assert!(error.contains(part), "{error}");
        }
    }

    #[tokio::test]
    async fn rows_of_an_instant_are_a_batch_and_bad_rows_are_counted() {
        let rows = "ts,device_id,value,quality\n\
                    2026-03-01T00:00:00Z,p/t,0.5,0\n\
                    2026-03-01T00:00:01Z,p/t,1.5,0\n\
                    2026-03-01T00:00:01Z,p/s,2.5,1\n\
                    2026-03-01T00:00:01Z,p/x,2.5,0\n\
                    what is this\n\
                    2026-03-01T00:00:02Z,p/t,,2\n";
        let mut polled = replay(rows, ReplayForm::Long).await.unwrap();
        let first = polled.recv().await.unwrap();
        let got: Vec<_> = first.readings.iter().map(|r| (r.device, r.value, r.quality)).collect();
        assert_eq!(got, [(DeviceIx(0), 1.5, Quality::Good), (DeviceIx(1), 2.5, Quality::Uncertain)]);
        let census = &first.census;
        assert_eq!(census.total(Outcome::Polled), 4);
        assert_eq!(census.total(Outcome::Rejected(Reason::UnknownDevice)), 1);
        assert_eq!(census.total(Outcome::Rejected(Reason::Malformed)), 1);
        let second = polled.recv().await.unwrap();
        assert_eq!((second.readings.len(), second.readings[0].quality), (1, Quality::Bad));
        assert!(polled.recv().await.is_none());
    }
}
