//! The recorded table: machines of eight sensors, with values that look like those of a pump in a water circuit.
//!
//! Row `n` of device `m`, which is sensor `s = m mod 8` of machine `k = m div 8`, has
//!
//! ```text
//! time  = start + n / hz
//! value = mean[s] (0.95 + 0.1 u(m)) + swing[s] (2 sin(2 pi t / (60 s + 60 s u(k))) + g(m, n)),  rounded to digits[s]
//! ```
//!
//! with `u` uniform in 0 to 1 and `g` normal (crate::noise): a load that goes up and down every one to two minutes, and
//! noise of half its size. Rows before the start have negative numbers. About 40 different values a sensor, so what is
//! sealed is as hard to compress as what a 12-bit converter shows of a machine that runs.

use std::{
    f64::consts::TAU,
    fs::File,
    io::{self, BufWriter, Write},
    ops::Range,
    path::Path,
    time::Duration,
};

use common::time::Timestamp;

use crate::noise::{gaussian, stream, uniform};

/// Sensors of a machine.
pub(super) const PER_MACHINE: usize = 8;
/// Of those, the ones that the model wants: a machine that lacks one is not scored.
const MODEL_INPUTS: [&str; 4] = ["vibration-1", "vibration-2", "pressure", "flow"];
/// Column of the instants.
pub(super) const TIME: &str = "time";
/// Time before the start on which the model is calibrated: long enough to tell a trend from the load's ups and downs.
const CALIBRATION: Duration = Duration::from_secs(1_200);
const SEED: u64 = 1;

/// One sensor of each machine.
#[derive(Debug)]
pub(super) struct Sensor {
    pub(super) name: &'static str,
    pub(super) device_type: &'static str,
    pub(super) unit: &'static str,
    mean: f64,
    /// Standard deviation of the noise.
    swing: f64,
    /// After the decimal point.
    digits: usize,
}

/// In the order of the columns.
pub(super) const SENSORS: [Sensor; PER_MACHINE] = [
    sensor("vibration-1", "vibration", "[g]", 0.2137, 0.0006, 4),
    sensor("vibration-2", "vibration", "[g]", 0.2683, 0.0006, 4),
    sensor("current", "current", "A", 2.47, 0.05, 2),
    sensor("pressure", "pressure", "bar", 3.82, 0.05, 2),
    sensor("motor-temperature", "temperature", "Cel", 68.4, 0.05, 2),
    sensor("fluid-temperature", "temperature", "Cel", 26.3, 0.05, 2),
    sensor("voltage", "voltage", "V", 229.5, 0.6, 1),
    sensor("flow", "flow", "L/min", 124.6, 0.6, 1),
];

const fn sensor(
    name: &'static str,
    device_type: &'static str,
    unit: &'static str,
    mean: f64,
    swing: f64,
    digits: usize,
) -> Sensor {
    Sensor { name, device_type, unit, mean, swing, digits }
}

impl Sensor {
    /// No value is as high as this, nor below zero.
    pub(super) const fn highest(&self) -> f64 {
        2.0 * self.mean
    }
}

/// What is written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    pub(super) start: Timestamp,
    pub(super) rows: u64,
    pub(super) devices: usize,
    /// Rows a second.
    pub(super) hz: u32,
}

impl Table {
    /// Values in it.
    pub(super) fn readings(&self) -> u64 {
        self.rows * self.devices as u64
    }

    /// Machine and sensor of every column.
    pub(super) fn columns(&self) -> impl Iterator<Item = (String, &'static Sensor)> {
        (0..self.devices).map(|m| (machine(m / PER_MACHINE), &SENSORS[m % PER_MACHINE]))
    }

    /// Machines that a model can score: those that have all of its inputs.
    pub(super) fn scored_machines(&self) -> u64 {
        let wanted = 1 + SENSORS.iter().rposition(|s| MODEL_INPUTS.contains(&s.name)).unwrap_or(0);
        let rest = self.devices % PER_MACHINE;
        (self.devices / PER_MACHINE) as u64 + u64::from(rest >= wanted)
    }

    /// Rows on which the model is calibrated; they lie before row 0.
    pub(super) fn calibration_rows(&self) -> i64 {
        CALIBRATION.as_secs() as i64 * i64::from(self.hz)
    }

    /// Instant of row `n`.
    pub(super) fn ts(&self, n: i64) -> Timestamp {
        self.start.shifted(n * 1_000_000 / i64::from(self.hz))
    }

    /// Writes a header and these rows.
    pub(super) fn write(&self, path: &Path, rows: Range<i64>) -> io::Result<()> {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        write!(file, "{TIME}")?;
        for (machine, sensor) in self.columns() {
            write!(file, ",{machine}/{}", sensor.name)?;
        }
        let columns: Vec<Column> = (0..self.devices).map(Column::new).collect();
        for n in rows {
            write!(file, "\n{}", self.ts(n))?;
            let seconds = n as f64 / f64::from(self.hz);
            for column in &columns {
                column.write(seconds, n, &mut file)?;
            }
        }
        file.write_all(b"\n")?;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
    }
}

/// Name of a machine.
pub(super) fn machine(k: usize) -> String {
    format!("m{k:02}")
}

/// A device as its values are made.
struct Column {
    stream: u64,
    mean: f64,
    swing: f64,
    /// Of the load, in radians a second.
    pace: f64,
    digits: usize,
    /// Ten to the power of `digits`.
    scale: u64,
}

impl Column {
    fn new(m: usize) -> Self {
        let sensor = &SENSORS[m % PER_MACHINE];
        let load = uniform(SEED, stream("load"), (m / PER_MACHINE) as i64);
        Self {
            stream: stream(sensor.name) ^ m as u64,
            mean: sensor.mean * (0.95 + 0.1 * uniform(SEED, stream("mean"), m as i64)),
            swing: sensor.swing,
            pace: TAU / (60.0 + 60.0 * load),
            digits: sensor.digits,
            scale: 10u64.pow(sensor.digits as u32),
        }
    }

    fn write(&self, seconds: f64, n: i64, to: &mut impl Write) -> io::Result<()> {
        let load = 2.0 * (self.pace * seconds).sin();
        let value = self.mean + self.swing * (load + gaussian(SEED, self.stream, n));
        // All means lie far above zero.
        let parts = (value * self.scale as f64).round() as u64;
        write!(to, ",{}.{:0digits$}", parts / self.scale, parts % self.scale, digits = self.digits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_at_their_times_and_the_same_whoever_asks() {
        let folder = tempfile::tempdir().unwrap();
        let table = Table { start: "2026-01-01T00:00:00Z".parse().unwrap(), rows: 30, devices: 20, hz: 10 };
        let read = |rows: Range<i64>| {
            let path = folder.path().join("rows.csv");
            table.write(&path, rows).unwrap();
            std::fs::read_to_string(path).unwrap()
        };
        let all = read(-10..30);
        let lines: Vec<Vec<&str>> = all.lines().map(|line| line.split(',').collect()).collect();
        assert_eq!((lines.len(), lines[0].len()), (41, 21));
        assert_eq!((lines[0][0], lines[0][1], lines[0][20]), (TIME, "m00/vibration-1", "m02/pressure"));
        assert_eq!((lines[1][0], lines[11][0]), ("2025-12-31T23:59:59Z", "2026-01-01T00:00:00Z"));
        assert_eq!(lines[12][0], "2026-01-01T00:00:00.100Z");
        for (row, m) in [(1, 0), (17, 7), (40, 19)] {
            let value: f64 = lines[row][m + 1].parse().unwrap();
            let Sensor { mean, swing, .. } = SENSORS[m % PER_MACHINE];
            assert!((value - mean).abs() < 0.05 * mean + 7.0 * swing, "{value} of {mean}");
        }
        assert!(all.ends_with(read(20..30).split_once('\n').unwrap().1));
        assert_eq!(table.scored_machines(), 2);
        assert_eq!(Table { devices: 200, ..table }.scored_machines(), 25);
    }
}
