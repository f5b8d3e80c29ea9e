//! The recorded runs, built into the program, so that the demo needs no file beside it.

use anyhow::Context;

/// `data/plant.toml`.
pub(super) const PLANT: &str = include_str!("../../data/plant.toml");

const FILES: [(&str, &str); 4] = [
    ("tep/d01_te.csv", include_str!("../../data/tep/d01_te.csv")),
    ("tep/d02_te.csv", include_str!("../../data/tep/d02_te.csv")),
    ("tep/d06_te.csv", include_str!("../../data/tep/d06_te.csv")),
    ("nab/machine_temperature.csv", include_str!("../../data/nab/machine_temperature.csv")),
];

/// A column of a recorded file, row 0 first.
pub(super) fn column(file: &str, column: &str) -> anyhow::Result<Vec<f64>> {
    let (_, text) = FILES.iter().find(|(name, _)| *name == file).with_context(|| {
        let known = FILES.map(|(name, _)| name).join(", ");
        format!("data/{file} is not built in; known are {known}")
    })?;
    let mut lines = text.lines();
    let mut header = lines.next().unwrap_or_default().split(',');
    let at =
        header.position(|name| name == column).with_context(|| format!("data/{file} has no {column}"))?;
    lines
        .zip(2..)
        .map(|(line, number)| {
            let cell = line.split(',').nth(at).unwrap_or_default();
            cell.parse().with_context(|| format!("data/{file}, line {number}: {column} = {cell:?}"))
        })
        .collect()
}
