//! `edge-agent try` and `edge-agent calibrate`: a recorded file through the agent's own filter, windows and models.
//!
//! Row by row, as the agent would have seen it: what stands beside a row is what was known after it and no later row.
//! Neither the number of a row nor the time of day is an input of anything.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail, ensure};
use common::telemetry;
use tokio::sync::watch;

use crate::{
    metrics::Metrics,
    model::{
        Fitted,
        calibrate::{self, Entry},
        machine::Purpose,
    },
    page::Latest,
    pipeline::{Refine, load_models},
    settings::{ReplayForm, Settings, Source},
    source::replay::{self, Row},
};

/// Writes `datetime,anomaly,score`, a line a row: whether an anomaly is open after it, and the highest of the latest
/// scores over their thresholds (empty while there is none). With `calibrate_rows`, models that can be are calibrated
/// on so many rows first, in which nothing is scored; what would be refused is a warning here.
///
/// # Errors
/// When the file cannot be read, a model cannot be used, or `out` cannot be written.
pub fn predict(
    settings: &Settings,
    input: &Path,
    out: &Path,
    calibrate_rows: Option<usize>,
) -> anyhow::Result<()> {
    let purpose = if calibrate_rows.is_some() { Purpose::Calibrate } else { Purpose::Score };
    let mut stages = stages(settings, purpose)?;
    let named = || format!("writing {}", out.display());
    let mut to = BufWriter::new(File::create(out).with_context(named)?);
    writeln!(to, "datetime,anomaly,score").with_context(named)?;
    let (mut rows, mut anomalies) = (0, 0);
    for row in recording(settings, input)? {
        let Row { time, polled } = row?;
        stages.process(polled);
        rows += 1;
        if calibrate_rows == Some(rows) {
            for (model, machine, why) in refusals(&stages.models.calibrate()?) {
                tracing::warn!(
                    model,
                    machine,
                    why,
                    "calibrated all the same; edge-agent calibrate refuses this"
                );
            }
        }
        let anomaly = stages.models.anomaly();
        anomalies += usize::from(anomaly);
        let score = stages.models.score().map(|score| format!("{score:.4}")).unwrap_or_default();
        writeln!(to, "{time},{},{score}", u8::from(anomaly)).with_context(named)?;
    }
    to.into_inner()
        .map_err(|error| error.into_error())
        .and_then(|file| file.sync_all())
        .with_context(named)?;
    if let Some(wanted) = calibrate_rows {
        ensure!(rows >= wanted, "{} has {rows} rows, --calibrate-rows says {wanted}", input.display());
    }
    telemetry::print_line(format_args!("{rows} rows, {anomalies} of them in an anomaly: {}", out.display()));
    Ok(())
}

/// Fits the calibration of the model of that name, or of the only one that has any, on the first `rows` rows and writes
/// it to `out`, or beside the model.
///
/// # Errors
/// When it is refused, with each reason; and when a file cannot be read or written.
pub fn calibrate(
    settings: &Settings,
    model: Option<&str>,
    input: &Path,
    rows: usize,
    out: Option<&Path>,
) -> anyhow::Result<()> {
    let mut stages = stages(settings, Purpose::Calibrate)?;
    let mut read = 0;
    for row in recording(settings, input)?.take(rows) {
        stages.process(row?.polled);
        read += 1;
    }
    ensure!(read == rows, "{} has {read} rows, --rows says {rows}", input.display());
    let mut all = stages.models.calibrate()?;
    all.retain(|fitted| !fitted.machines.is_empty() && model.is_none_or(|wanted| *wanted == *fitted.model));
    let [Fitted { model: name, sha256, folder, machines }] = &all[..] else {
        let names: Vec<_> = all.iter().map(|fitted| &*fitted.model).collect();
        bail!("of the models that are calibrated, {names:?} are meant; name one of models.dir with --model");
    };
    let why: Vec<String> =
        refusals(&all).map(|(_, machine, why)| format!("\n  machine {machine:?}: {why}")).collect();
    ensure!(
        why.is_empty(),
        "calibration of {name} is refused; take a longer stretch of the recording, or a later one:{}",
        why.concat()
    );
    let path = out.map_or_else(|| folder.join(calibrate::FILE), PathBuf::from);
    let entries: Vec<Entry<'_>> = machines.iter().map(Entry::from).collect();
    calibrate::write(&path, name, sha256, &entries)?;
    let (windows, machines) = (entries.iter().map(|entry| entry.stretch.len()).sum::<usize>(), entries.len());
    telemetry::print_line(format_args!(
        "{name}: {windows} windows of {machines} machines, written to {}",
        path.display()
    ));
    Ok(())
}

/// The agent's own stages, with all models of its folder.
fn stages(settings: &Settings, purpose: Purpose) -> anyhow::Result<Refine> {
    ensure!(settings.models.dir.is_some(), "models.dir is empty; name the folder of the models");
    let (models, _) = load_models(settings, purpose);
    for status in models.status() {
        ensure!(status.state == "active", "model {}: {}", status.name, status.state);
    }
    ensure!(!models.status().is_empty(), "there is no model in models.dir");
    let (status, _) = watch::channel(Vec::new());
    let latest = Arc::new(Latest::new(settings.registry.devices.len()));
    Ok(Refine::new(settings, models, Arc::new(Metrics::default()), status, latest))
}

/// `input`, read as the configuration says of its one recorded file.
fn recording(settings: &Settings, input: &Path) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Row>>> {
    let mut forms: Vec<&ReplayForm> = Vec::new();
    for source in &settings.sources {
        if let Source::Replay { form, .. } = source {
            forms.push(form);
        }
    }
    let [form] = forms[..] else {
        bail!("there are {} [[replay]] tables; write one, to say how the input is read", forms.len());
    };
    replay::rows(input, form, &settings.registry)
}

/// (model, machine, reason)
fn refusals(all: &[Fitted]) -> impl Iterator<Item = (&str, &str, &str)> {
    all.iter().flat_map(|Fitted { model, machines, .. }| {
        machines.iter().flat_map(move |machine| {
            machine.why.iter().map(move |why| (&**model, machine.machine.as_str(), why.as_str()))
        })
    })
}

#[cfg(test)]
mod tests;
