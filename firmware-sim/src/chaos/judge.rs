//! What silver holds against what the file says: every value once, nothing else.

use std::collections::HashMap;

use anyhow::Context as _;
use arrow::{
    array::{Array, AsArray as _, RecordBatch},
    datatypes::{Float64Type, TimestampMicrosecondType},
};
use cloud_ingest::tables::Tables;
use common::time::Timestamp;
use futures::TryStreamExt as _;

use super::{
    configs::SITE,
    load::{self, Truth},
};

/// Columns in this order.
const SQL: &str = "SELECT site, device_id, ts, value, quality FROM silver.sensor_readings";
/// So many examples of a mistake are told.
const EXAMPLES: usize = 5;

/// How silver differs from the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Values of the file that silver has not.
    pub(super) absent: u64,
    /// Rows of silver beyond the first one of each value: the same again, or what the file does not say.
    pub(super) doubled: u64,
    /// Some of them, for people.
    pub(super) examples: Vec<String>,
}

/// Reads the lake's silver.
///
/// # Errors
/// When it cannot be read.
pub(super) async fn judge(tables: &Tables, truth: Truth) -> anyhow::Result<Verdict> {
    let mut rows = tables.session().await?.sql(SQL).await?.execute_stream().await?;
    let mut tally = Tally::new(truth);
    while let Some(batch) = rows.try_next().await? {
        tally.add(&batch)?;
    }
    Ok(tally.verdict())
}

/// Counts rows against the file.
struct Tally {
    truth: Truth,
    devices: HashMap<String, usize>,
    /// By row and device: whether silver has it.
    seen: Vec<bool>,
    verdict: Verdict,
}

impl Tally {
    fn new(truth: Truth) -> Tally {
        let sensors = load::sensors().into_iter().enumerate();
        Tally {
            truth,
            devices: sensors.map(|(m, sensor)| (sensor.id, m)).collect(),
            seen: vec![false; truth.readings()],
            verdict: Verdict::default(),
        }
    }

    fn add(&mut self, batch: &RecordBatch) -> anyhow::Result<()> {
        let text = |i: usize| batch.column(i).as_string_opt::<i32>().context("silver has other columns");
        let (site, device, quality) = (text(0)?, text(1)?, text(4)?);
        let ts =
            batch.column(2).as_primitive_opt::<TimestampMicrosecondType>().context("ts is no instant")?;
        let value = batch.column(3).as_primitive_opt::<Float64Type>().context("value is no number")?;
        for i in 0..batch.num_rows() {
            let ts = Timestamp::from_micros(ts.value(i));
            let value = value.is_valid(i).then(|| value.value(i));
            let place = self.devices.get(device.value(i)).zip(self.truth.row(ts));
            let told = place.filter(|(m, n)| {
                site.value(i) == SITE
                    && quality.value(i) == "good"
                    && value == Some(self.truth.value(**m, *n))
            });
            match told.map(|(m, n)| n * load::DEVICES + m) {
                Some(at) if !self.seen[at] => self.seen[at] = true,
                Some(_) => self.note(format!("{} at {ts} is there twice", device.value(i)), true),
                None => {
                    let (device, quality) = (device.value(i), quality.value(i));
                    self.note(format!("{device} at {ts} is {value:?}, {quality}: not in the file"), true);
                }
            }
        }
        Ok(())
    }

    fn verdict(mut self) -> Verdict {
        let sensors = load::sensors();
        for at in (0..self.seen.len()).filter(|at| !self.seen[*at]).collect::<Vec<_>>() {
            let (n, m) = (at / load::DEVICES, at % load::DEVICES);
            self.note(format!("{} at {} is not in silver", sensors[m].id, self.truth.ts(n)), false);
        }
        self.verdict
    }

    fn note(&mut self, example: String, beyond: bool) {
        let Verdict { absent, doubled, examples } = &mut self.verdict;
        let count = if beyond { doubled } else { absent };
        *count += 1;
        if *count <= EXAMPLES as u64 {
            examples.push(example);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Float64Array, StringArray, TimestampMicrosecondArray};

    use super::*;

    const ROWS: usize = 3;

    fn truth() -> Truth {
        Truth { seed: 7, start: "2026-11-21T06:00:00Z".parse().unwrap(), rows: ROWS }
    }

    /// (site, device, row, value, quality) of everything that the file says.
    fn everything() -> Vec<(&'static str, usize, usize, f64, &'static str)> {
        let cells = (0..ROWS).flat_map(|n| (0..load::DEVICES).map(move |m| (m, n)));
        cells.map(|(m, n)| (SITE, m, n, truth().value(m, n), "good")).collect()
    }

    fn verdict_of(rows: &[(&str, usize, usize, f64, &str)]) -> Verdict {
        let (sensors, truth) = (load::sensors(), truth());
        let ts: Vec<i64> = rows.iter().map(|r| truth.ts(r.2).as_micros()).collect();
        let batch = RecordBatch::try_from_iter([
            ("site", Arc::new(rows.iter().map(|r| Some(r.0)).collect::<StringArray>()) as _),
            (
                "device_id",
                Arc::new(rows.iter().map(|r| Some(&sensors[r.1].id)).collect::<StringArray>()) as _,
            ),
            ("ts", Arc::new(TimestampMicrosecondArray::from(ts).with_timezone("UTC")) as _),
            ("value", Arc::new(rows.iter().map(|r| Some(r.3)).collect::<Float64Array>()) as _),
            ("quality", Arc::new(rows.iter().map(|r| Some(r.4)).collect::<StringArray>()) as _),
        ]);
        let mut tally = Tally::new(truth);
        tally.add(&batch.unwrap()).unwrap();
        tally.verdict()
    }

    #[test]
    fn everything_once_is_right() {
        let mut rows = everything();
        rows.reverse();
        assert_eq!(verdict_of(&rows), Verdict::default());
    }

    #[test]
    fn what_is_absent_twice_or_otherwise_is_counted_and_told() {
        type Change = fn(&mut Vec<(&'static str, usize, usize, f64, &'static str)>);
        let cases: [(&str, Change, u64, u64, &str); 6] = [
            (
                "absent",
                |rows| rows.truncate(rows.len() - 1),
                1,
                0,
                "machine-19/flow-199 at 2026-11-21T06:00:00.200Z is not in",
            ),
            ("twice", |rows| rows.push(rows[0]), 0, 1, "is there twice"),
            ("another value", |rows| rows[0].3 += 0.01, 1, 1, "not in the file"),
            ("another site", |rows| rows[0].0 = "plant", 1, 1, "not in the file"),
            ("marked", |rows| rows[0].4 = "uncertain", 1, 1, "uncertain: not in the file"),
            ("after the end", |rows| rows.push((SITE, 0, ROWS, 0.0, "good")), 0, 1, "not in the file"),
        ];
        for (what, change, absent, doubled, example) in cases {
            let mut rows = everything();
            change(&mut rows);
            let verdict = verdict_of(&rows);
            assert_eq!((verdict.absent, verdict.doubled), (absent, doubled), "{what}");
            assert!(verdict.examples.iter().any(|e| e.contains(example)), "{what}: {:?}", verdict.examples);
        }
    }
}
