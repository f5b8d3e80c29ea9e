//! The load: a table that the agent replays in real time, and whose every value is known.
//!
//! `load.csv` has a column for each of [`DEVICES`] devices and a row every [`PERIOD`]; row `n` of device `m` is
//!
//! ```text
//! ts    = start + n * PERIOD
//! value = h / 100,   h = bits(seed, m, n) mod 10,000   (crate::noise)
//! ```
//!
//! so that an outside reader can take the file, or the function, for the truth. The file is written ahead of the
//! agent and cut off at the end; an agent that was killed goes on behind the last event time that it has sealed, so in
//! the end every value of the file must have been sealed, once.

use std::{
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::Path,
    time::Duration,
};

use common::time::Timestamp;

use crate::noise::bits;

/// Columns.
pub(super) const DEVICES: usize = 200;
/// Between two rows: with [`DEVICES`], 2,000 readings a second.
pub(super) const PERIOD: Duration = Duration::from_millis(100);
/// How far the file is ahead of the agent's clock, at least; an agent that comes to its end stops.
const AHEAD: Duration = Duration::from_secs(60);
/// How much is written at a time.
const PIECE: Duration = Duration::from_secs(15);
/// Column of the instants.
pub(super) const TIME: &str = "time";

/// Type and canonical unit of the device `m`, by `m mod 4`; 0 to 100 lies in the range of each.
const KINDS: [(&str, &str); 4] =
    [("temperature", "Cel"), ("pressure", "bar"), ("vibration", "m/s2"), ("flow", "L/min")];

/// One column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sensor {
    pub(super) id: String,
    pub(super) asset: String,
    pub(super) device_type: &'static str,
    pub(super) unit: &'static str,
}

/// The columns, in their order.
pub(super) fn sensors() -> Vec<Sensor> {
    let sensor = |m: usize| {
        let asset = format!("machine-{:02}", m / 10);
        let (device_type, unit) = KINDS[m % KINDS.len()];
        Sensor { id: format!("{asset}/{device_type}-{m:03}"), asset, device_type, unit }
    };
    (0..DEVICES).map(sensor).collect()
}

/// What the file says, whether it was written or not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Truth {
    pub(super) seed: u64,
    pub(super) start: Timestamp,
    /// Rows.
    pub(super) rows: usize,
}

impl Truth {
    /// Instant of row `n`.
    pub(super) fn ts(&self, n: usize) -> Timestamp {
        self.start + PERIOD * u32::try_from(n).unwrap_or(u32::MAX)
    }

    /// Value of row `n` of device `m`.
    pub(super) fn value(&self, m: usize, n: usize) -> f64 {
        (bits(self.seed, m as u64, n as i64) % 10_000) as f64 / 100.0
    }

    /// The row of this instant, if there is one.
    pub(super) fn row(&self, ts: Timestamp) -> Option<usize> {
        let since = ts.as_micros().checked_sub(self.start.as_micros())?;
        let period = PERIOD.as_micros() as i64;
        usize::try_from(since / period).ok().filter(|n| since % period == 0 && *n < self.rows)
    }

    /// Values in all.
    pub(super) fn readings(&self) -> usize {
        self.rows * DEVICES
    }
}

/// The file under way.
pub(super) struct Load {
    pub(super) truth: Truth,
    file: File,
    /// Where each row ends, in bytes; the header's end is the first.
    ends: Vec<u64>,
}

impl Load {
    /// Writes the header and the first rows.
    pub(super) fn create(path: &Path, seed: u64, start: Timestamp) -> io::Result<Load> {
        let mut file = OpenOptions::new().append(true).create_new(true).open(path)?;
        let names: Vec<String> = sensors().into_iter().map(|sensor| sensor.id).collect();
        let header = format!("{TIME},{}\n", names.join(","));
        file.write_all(header.as_bytes())?;
        let mut load = Load { truth: Truth { seed, start, rows: 0 }, file, ends: vec![header.len() as u64] };
        load.keep_ahead(start)?;
        Ok(load)
    }

    /// Writes on, if the end is near.
    pub(super) fn keep_ahead(&mut self, now: Timestamp) -> io::Result<()> {
        while self.truth.ts(self.truth.rows) < now + AHEAD {
            let mut text = String::new();
            let mut end = self.ends.last().copied().unwrap_or(0);
            for _ in 0..PIECE.as_millis() / PERIOD.as_millis() {
                let (n, begin) = (self.truth.rows, text.len());
                // Writing to a String cannot fail.
                let _ = write!(text, "{}", self.truth.ts(n));
                for m in 0..DEVICES {
                    let _ = write!(text, ",{}", self.truth.value(m, n));
                }
                text.push('\n');
                end += (text.len() - begin) as u64;
                self.ends.push(end);
                self.truth.rows += 1;
            }
            // The agent is AHEAD behind, so it does not read what is being written.
            self.file.write_all(text.as_bytes())?;
        }
        Ok(())
    }

    /// Cuts off what lies after `now`. Nobody may be reading.
    pub(super) fn end_at(&mut self, now: Timestamp) -> io::Result<()> {
        while self.truth.rows > 0 && self.truth.ts(self.truth.rows - 1) > now {
            self.truth.rows -= 1;
        }
        self.ends.truncate(self.truth.rows + 1);
        self.file.set_len(self.ends[self.truth.rows])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_says_what_the_truth_says_and_ends_where_it_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("load.csv");
        let start: Timestamp = "2026-11-21T06:00:00Z".parse().unwrap();
        let mut load = Load::create(&path, 7, start).unwrap();
        assert!(load.truth.ts(load.truth.rows) >= start + AHEAD);
        load.keep_ahead(start + Duration::from_secs(40)).unwrap();
        load.end_at(start + Duration::from_millis(90_050)).unwrap();
        assert_eq!(load.truth.rows, 901);
        let text = std::fs::read_to_string(&path).unwrap();
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split(',').collect()).collect();
        assert_eq!(rows.len(), 902);
        assert_eq!(rows[0][0], TIME);
        assert_eq!((rows[0][13], rows[901][0]), ("machine-01/temperature-012", "2026-11-21T06:01:30Z"));
        for (n, m) in [(0, 0), (17, 3), (900, 199)] {
            let row = &rows[n + 1];
            assert_eq!(row.len(), DEVICES + 1);
            assert_eq!(load.truth.row(row[0].parse().unwrap()), Some(n));
            assert_eq!(row[m + 1].parse::<f64>().unwrap(), load.truth.value(m, n));
        }
        // It goes on where it was cut.
        load.keep_ahead(start + Duration::from_secs(90)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.lines().nth(902).unwrap().starts_with("2026-11-21T06:01:30.100Z,"));
    }

    #[test]
    fn instants_between_and_beyond_the_rows_are_none() {
        let start: Timestamp = "2026-11-21T06:00:00Z".parse().unwrap();
        let truth = Truth { seed: 1, start, rows: 10 };
        for (micros, row) in
            [(0, Some(0)), (900_000, Some(9)), (1_000_000, None), (50_000, None), (-100_000, None)]
        {
            let ts = Timestamp::from_micros(start.as_micros() + micros);
            assert_eq!(truth.row(ts), row, "{micros} µs");
        }
    }

    #[test]
    fn every_device_has_a_name_and_a_unit_of_its_own_type() {
        let sensors = sensors();
        let names: std::collections::BTreeSet<&str> = sensors.iter().map(|s| s.id.as_str()).collect();
        assert_eq!(names.len(), DEVICES);
        for sensor in &sensors {
            let known = common::units::DeviceType::parse(sensor.device_type).unwrap();
            // So that silver stores the value bit for bit.
            assert_eq!(known.unit, sensor.unit);
            assert!(known.range.contains(&0.0) && known.range.contains(&100.0), "{}", sensor.id);
        }
    }
}
