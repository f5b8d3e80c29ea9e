//! A recorded file, replayed at its own times: at once as far as they lie in the past, then as they come.
//!
//! CSV with the header `ts,device_id,value` or `ts,device_id,value,quality`, ascending in `ts`. Rows of one instant
//! are one batch. A row that cannot be read is rejected with its reason, in the hour of the row before it where it
//! has no time of its own. Nothing is skipped: a full pipe makes the replay wait.

use std::{path::Path, sync::Arc};

use anyhow::Context as _;
use common::{
    reading::{Quality, Reading, Registry},
    time::Timestamp,
};
use tokio::{
    fs::File,
    io::{AsyncBufReadExt, BufReader},
};

use super::{Context, Hardware, Polled, no_value};
use crate::census::{Outcome, Reason};

/// Replays the file until its end or the stop signal.
pub(super) async fn run<H: Hardware>(
    path: &Path,
    registry: Arc<Registry>,
    mut context: Context<H>,
) -> anyhow::Result<()> {
    let mut pacer = context.clock.pacer();
    let named = || format!("replaying {}", path.display());
    let mut lines = BufReader::new(File::open(path).await.with_context(named)?).lines();
    let header = lines.next_line().await.with_context(named)?.unwrap_or_default();
    anyhow::ensure!(
        header.trim_end().starts_with("ts,device_id,value"),
        "replaying {}: its header is {header:?}; write ts,device_id,value,quality",
        path.display()
    );
    let mut batch = Polled::default();
    loop {
        let line = lines.next_line().await.with_context(named)?;
        let row = line.as_deref().map(|line| parse(line, &registry));
        let ends_batch = match &row {
            Some(Ok(reading)) => !batch.readings.is_empty() && reading.ts != batch.at,
            Some(Err(_)) => false,
            None => true,
        };
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
        match row {
            None => return Ok(()),
            Some(Ok(reading)) if context.resume_after.is_some_and(|sealed| reading.ts <= sealed) => {}
            Some(Ok(reading)) => {
                batch.at = reading.ts;
                batch.readings.push(reading);
            }
            Some(Err((ts, reason))) => {
                let ts = ts.unwrap_or(batch.at);
                if context.resume_after.is_none_or(|sealed| ts > sealed) {
                    batch.at = batch.at.max(ts);
                    batch.census.add(ts, Outcome::Polled, 1);
                    batch.census.add(ts, Outcome::Rejected(reason), 1);
                }
            }
        }
    }
}

/// A row's reading, or its time if it has one, and what is wrong with it.
fn parse(line: &str, registry: &Registry) -> Result<Reading, (Option<Timestamp>, Reason)> {
    let mut cells = line.trim_end().split(',');
    let mut cell = || cells.next().ok_or((None, Reason::Malformed));
    let (ts, device, value) = (cell()?, cell()?, cell()?);
    let ts: Timestamp = ts.parse().map_err(|_| (None, Reason::Malformed))?;
    let malformed = (Some(ts), Reason::Malformed);
    let device = registry.find(device).ok_or((Some(ts), Reason::UnknownDevice))?;
    let quality = match cells.next() {
        None | Some("") => Quality::Good,
        Some(code) => code.parse().ok().and_then(Quality::from_code).ok_or(malformed)?,
    };
    if value.is_empty() {
        return Ok(no_value(ts, device));
    }
    let value: f64 = value.parse().map_err(|_| malformed)?;
    Ok(Reading { ts, device, quality, value })
}

#[cfg(test)]
mod tests {
    use common::{
        reading::{Device, DeviceIx},
        time::SystemClock,
    };
    use tokio::sync::{mpsc, watch};

    use super::*;
    use crate::{metrics::Metrics, source::LinuxHardware};

    #[tokio::test]
    async fn rows_of_an_instant_are_a_batch_and_bad_rows_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.csv");
        let rows = "ts,device_id,value,quality\n\
                    2026-03-01T00:00:00Z,p/t,0.5,0\n\
                    2026-03-01T00:00:01Z,p/t,1.5,0\n\
                    2026-03-01T00:00:01Z,p/s,2.5,1\n\
                    2026-03-01T00:00:01Z,p/x,2.5,0\n\
                    what is this\n\
                    2026-03-01T00:00:02Z,p/t,,2\n";
        std::fs::write(&path, rows).unwrap();
        let device = |id: &str| Device { id: id.into(), ..Device::default() };
        let registry = Registry { devices: vec![device("p/t"), device("p/s")], ..Registry::default() };
        let (out, mut polled) = mpsc::channel(8);
        let (_stop, stopped) = watch::channel(false);
        let context = Context {
            hardware: Arc::new(LinuxHardware),
            clock: Arc::new(SystemClock),
            resume_after: Some("2026-03-01T00:00:00Z".parse().unwrap()),
            out,
            stop: stopped,
            metrics: Arc::new(Metrics::default()),
        };
        run(&path, Arc::new(registry), context).await.unwrap();

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
