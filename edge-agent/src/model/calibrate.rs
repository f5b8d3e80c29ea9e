//! Calibration: what is normal on this machine, from a stretch of its own clean windows (pure, but for the file).
//!
//! Of the windows' values of an input, the first `settle` of them left out since machines settle:
//!
//! - `location` is their mean, `scale` their standard deviation,
//! - `drift` is the root mean square of how far the value moves within `drift_lag` of the stretch,
//! - `threshold` is the model's own, or the highest score that the stretch itself kept up for `raise_after` windows
//!   where that is higher.
//!
//! `scale` alone makes a false alarm of every drift, and a stretch that is too short does not show how far a machine
//! drifts. So a calibration is **refused** where an input's trend over the stretch (least squares, less twice its
//! standard error, for which only one window a span counts), going on at its pace, would by itself reach the model's
//! threshold within `horizon`, in units of the root of scale² + drift². Also refused: an input that did not change at
//! all, and fewer windows than ten spans.
//!
//! `calibration.toml` names the model by the hash of its `model.onnx` and is refused for another.

use std::{fmt::Write as _, fs, io::Write as _, path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use common::time::{Timestamp, duration};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::machine::Calibrated;

/// The file in a bundle's folder.
pub const FILE: &str = "calibration.toml";
/// Spans that a calibration needs at least, once settled.
const MIN_SPANS: usize = 10;

/// How a model is calibrated: `[calibration]` in its `model.toml`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// Share of the stretch that is left out at its start.
    pub settle: f64,
    /// Share of the rest over which drift is measured.
    pub drift_lag: f64,
    /// For how long a trend must not reach the threshold.
    #[serde(with = "duration")]
    pub horizon: Duration,
}

/// What is normal for the inputs of one machine, in the order of the tensor.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Calibration {
    /// Mean, in the unit of the device.
    pub location: Vec<f32>,
    /// Standard deviation.
    pub scale: Vec<f32>,
    /// How far the mean moves.
    pub drift: Vec<f32>,
    /// The score above which an anomaly is raised.
    pub threshold: f64,
}

/// A stretch of windows of one machine.
#[derive(Clone, Debug, Default)]
pub struct Stretch {
    /// Inputs of a window.
    pub inputs: usize,
    /// Window by window.
    pub values: Vec<f32>,
    /// Ends of the first and the last window.
    pub between: Option<(Timestamp, Timestamp)>,
}

/// `calibration.toml`.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibrations {
    /// Name of the model.
    pub model: String,
    /// SHA-256 of its `model.onnx` in hex.
    pub model_sha256: String,
    /// SHA-256 of the file in hex.
    pub sha256: String,
    /// By the name of the machine; the name is empty where the model's inputs have no pattern.
    pub machines: Vec<(String, Calibration)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    model: String,
    sha256: String,
    machine: Vec<Machine>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Machine {
    name: String,
    #[serde(rename = "from")]
    _from: Timestamp,
    #[serde(rename = "to")]
    _to: Timestamp,
    #[serde(rename = "windows")]
    _windows: u64,
    threshold: f64,
    input: Vec<Input>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Input {
    #[serde(rename = "device")]
    _device: String,
    location: f32,
    scale: f32,
    drift: f32,
}

impl Rules {
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let Self { settle, drift_lag, horizon } = self;
        ensure!(
            (0.0..=0.9).contains(settle),
            "model.toml: calibration.settle = {settle} is outside of 0 to 0.9"
        );
        ensure!(
            (0.01..=0.9).contains(drift_lag),
            "model.toml: calibration.drift_lag = {drift_lag} is outside of 0.01 to 0.9"
        );
        ensure!(!horizon.is_zero(), "model.toml: calibration.horizon is 0");
        Ok(())
    }
}

impl Stretch {
    /// Adds a window.
    pub fn push(&mut self, end: Timestamp, values: &[f32]) {
        self.inputs = values.len();
        self.values.extend_from_slice(values);
        self.between = Some((self.between.map_or(end, |(first, _)| first), end));
    }

    /// Windows in it.
    pub fn len(&self) -> usize {
        self.values.len().checked_div(self.inputs).unwrap_or(0)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Without the earlier half of its windows.
    pub fn later_half(mut self) -> Self {
        let earlier = self.len() / 2;
        self.values.drain(..earlier * self.inputs);
        // From here on approximate: windows that were not watched or stood still are not in it.
        self.between = self.between.map(|(first, last)| (first + last.since(first) / 2, last));
        self
    }

    /// The windows after those in which the machine settles.
    pub fn settled(&self, rules: &Rules) -> impl Iterator<Item = &[f32]> + Clone {
        let skip = (self.len() as f64 * rules.settle) as usize;
        self.values.chunks_exact(self.inputs.max(1)).skip(skip)
    }
}

/// Fits everything but the threshold, which is taken as it is, and says why the result must not be relied on. `names`
/// are the inputs'; `hops` are those in a span.
pub fn fit(
    rules: &Rules,
    threshold: f64,
    (hop, hops): (Duration, usize),
    stretch: &Stretch,
    names: &[&str],
) -> (Calibration, Vec<String>) {
    let mut why = Vec::new();
    let windows = stretch.settled(rules).count();
    if windows < MIN_SPANS * hops {
        why.push(format!(
            "{} windows, {windows} of them once settled, are too few; {} are needed after settling",
            stretch.len(),
            MIN_SPANS * hops
        ));
    }
    let mut fitted = Calibration { location: vec![], scale: vec![], drift: vec![], threshold };
    for (column, name) in names.iter().enumerate() {
        let values: Vec<f64> = stretch.settled(rules).map(|window| f64::from(window[column])).collect();
        let Spread { location, scale, drift, trend } = Spread::of(&values, rules.drift_lag, hops);
        let spread = scale.hypot(drift);
        let moves = trend * rules.horizon.as_secs_f64() / hop.as_secs_f64() / spread;
        if spread == 0.0 {
            why.push(format!("{name} did not change; look at the sensor, or leave it out of the model"));
        } else if moves >= threshold {
            why.push(format!(
                "{name} still drifts: at its pace it moves by at least {moves:.1} of its spreads within {}, and \
                 {threshold} raise an alarm",
                duration::format(rules.horizon)
            ));
        }
        fitted.location.push(location as f32);
        // An input that has shown no spread cannot be judged: infinite, so that it weighs nothing.
        fitted.scale.push(if spread > 0.0 { scale as f32 } else { f32::INFINITY });
        fitted.drift.push(drift as f32);
    }
    (fitted, why)
}

struct Spread {
    location: f64,
    scale: f64,
    drift: f64,
    /// How far it surely moves a window, up or down.
    trend: f64,
}

impl Spread {
    /// `hops` neighbouring values are of overlapping windows.
    fn of(values: &[f64], drift_lag: f64, hops: usize) -> Self {
        let n = values.len() as f64;
        if values.len() < 3 {
            let location = values.first().copied().unwrap_or_default();
            return Self { location, scale: 0.0, drift: 0.0, trend: 0.0 };
        }
        // About the first value, so that nothing is lost far from zero.
        let offset = values[0];
        let location = values.iter().map(|v| v - offset).sum::<f64>() / n;
        let middle = (n - 1.0) / 2.0;
        let (mut squares, mut product, mut times) = (0.0, 0.0, 0.0);
        for (i, value) in values.iter().enumerate() {
            let (t, v) = (i as f64 - middle, value - offset - location);
            squares += v * v;
            product += t * v;
            times += t * t;
        }
        let lag = ((n * drift_lag) as usize).clamp(1, values.len() - 1);
        let slope = product / times;
        let residual = (squares - slope * product).max(0.0) / (n - 2.0);
        let error = (residual * hops as f64 / times).sqrt();
        let moved = values.iter().zip(&values[lag..]).map(|(before, after)| (after - before).powi(2));
        Self {
            location: location + offset,
            scale: (squares / (n - 1.0)).sqrt(),
            drift: (moved.sum::<f64>() / (values.len() - lag) as f64).sqrt(),
            trend: (slope.abs() - 2.0 * error).max(0.0),
        }
    }
}

impl Calibrations {
    /// What stands in a bundle's folder, if anything.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn read(folder: &Path) -> anyhow::Result<Option<Self>> {
        let path = folder.join(FILE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        let file: File = toml::from_slice(&bytes).context(FILE)?;
        let machines = file.machine.into_iter().map(|machine| {
            let column = |of: fn(&Input) -> f32| machine.input.iter().map(of).collect();
            let calibration = Calibration {
                location: column(|input| input.location),
                scale: column(|input| input.scale),
                drift: column(|input| input.drift),
                threshold: machine.threshold,
            };
            (machine.name, calibration)
        });
        Ok(Some(Self {
            model: file.model,
            model_sha256: file.sha256,
            sha256: format!("{:x}", Sha256::digest(&bytes)),
            machines: machines.collect(),
        }))
    }

    /// The calibration of a machine with so many inputs.
    pub fn of(&self, machine: &str, inputs: usize) -> Option<&Calibration> {
        let (_, found) = self.machines.iter().find(|(name, _)| name == machine)?;
        (found.location.len() == inputs).then_some(found)
    }
}

/// One machine's part of a `calibration.toml`.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    /// Its name.
    pub machine: &'a str,
    /// Ids of its inputs.
    pub devices: Vec<&'a str>,
    /// What was fitted.
    pub calibration: &'a Calibration,
    /// From which windows.
    pub stretch: &'a Stretch,
}

impl<'a> From<&'a Calibrated> for Entry<'a> {
    fn from(of: &'a Calibrated) -> Self {
        let devices = of.devices.iter().map(String::as_str).collect();
        Self { machine: &of.machine, devices, calibration: &of.calibration, stretch: &of.stretch }
    }
}

/// Writes a `calibration.toml` for the model of that name and hash, durably and in one step.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, model: &str, sha256: &str, entries: &[Entry<'_>]) -> anyhow::Result<()> {
    let text = to_toml(model, sha256, entries);
    let draft = path.with_extension("toml.new");
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(&draft)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    write().with_context(|| format!("writing {}", path.display()))
}

fn to_toml(model: &str, sha256: &str, entries: &[Entry<'_>]) -> String {
    let mut text = String::from(
        "# Written by edge-agent calibrate: what is normal for this machine, in its devices' units.\n\
         # It belongs into the bundle's folder and suits the model of this hash only.\n\n",
    );
    let quoted = |text: &str| toml::Value::from(text).to_string();
    let _ = writeln!(text, "model = {}\nsha256 = \"{sha256}\"", quoted(model));
    for Entry { machine, devices, calibration, stretch } in entries {
        let Some((from, to)) = stretch.between else { continue };
        let _ = writeln!(
            text,
            "\n[[machine]]\nname = {}\nfrom = \"{from}\"\nto = \"{to}\"\nwindows = {}\nthreshold = {:?}",
            quoted(machine),
            stretch.len(),
            calibration.threshold,
        );
        for (i, device) in devices.iter().enumerate() {
            let Calibration { location, scale, drift, .. } = calibration;
            let _ = writeln!(
                text,
                "[[machine.input]]\ndevice = {}\nlocation = {:?}\nscale = {:?}\ndrift = {:?}",
                quoted(device),
                location[i],
                scale[i],
                drift[i],
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { settle: 0.5, drift_lag: 0.25, horizon: Duration::from_secs(600) };

    fn stretch(values: impl IntoIterator<Item = f32>) -> Stretch {
        let mut stretch = Stretch::default();
        for (i, value) in values.into_iter().enumerate() {
            stretch.push(Timestamp::from_micros(i as i64 * 1_000_000), &[value]);
        }
        stretch
    }

    fn fitted(stretch: &Stretch) -> (Calibration, Vec<String>) {
        fit(&RULES, 3.0, (Duration::from_secs(1), 5), stretch, &["p/t"])
    }

    #[test]
    fn the_settled_half_is_fitted() {
        // Falls from 100, then goes to and fro with a period that the lag divides: no drift is seen.
        let settling = (0..100).map(|i| 100.0 - i as f32);
        let steady = (0..100).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 });
        let (calibration, why) = fitted(&stretch(settling.chain(steady)));
        assert_eq!(why, [""; 0]);
        assert!(calibration.location[0].abs() < 1e-6);
        assert!((calibration.scale[0] - (100.0f32 / 99.0).sqrt()).abs() < 1e-6);
        // 25 windows on, the sign has changed.
        assert!((calibration.drift[0] - 2.0).abs() < 1e-6);
        assert_eq!(calibration.threshold, 3.0);
    }

    #[test]
    fn what_cannot_be_relied_on_is_refused_with_its_reason() {
        let noise = |i: i32| if i % 2 == 0 { 0.5 } else { -0.5 };
        let drifts = stretch((0..200).map(|i| 0.05 * i as f32 + noise(i)));
        let (_, why) = fitted(&drifts);
        assert!(why.len() == 1 && why[0].starts_with("p/t still drifts: at its pace it moves by"), "{why:?}");
        // The same pace in noise that hides it is no finding.
        let (_, why) = fitted(&stretch((0..200).map(|i| 0.05 * i as f32 + 9.0 * noise(i))));
        assert_eq!(why, [""; 0]);
        let (_, why) = fitted(&stretch((0..98).map(noise)));
        assert!(why[0].contains("too few"), "{why:?}");
        let (constant, why) = fitted(&stretch([7.0; 200]));
        assert!(why[0].contains("did not change"), "{why:?}");
        assert_eq!((constant.location[0], constant.scale[0]), (7.0, f32::INFINITY));
        let (_, why) = fitted(&Stretch::default());
        assert_eq!(why.len(), 2, "{why:?}");
    }

    #[test]
    fn a_file_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Calibrations::read(folder.path()).unwrap(), None);
        let stretch = stretch((0..200).map(|i| (i % 7) as f32 / 3.0));
        let (calibration, _) = fitted(&stretch);
        let entry =
            Entry { machine: "p \"1\"", devices: vec!["p/t"], calibration: &calibration, stretch: &stretch };
        write(&folder.path().join(FILE), "m", "abc", &[entry]).unwrap();
        let read = Calibrations::read(folder.path()).unwrap().unwrap();
        assert_eq!((read.model.as_str(), read.model_sha256.as_str()), ("m", "abc"));
        assert_eq!(read.of("p \"1\"", 1), Some(&calibration));
        assert_eq!(read.of("p \"1\"", 2), None);
        assert_eq!(read.of("other", 1), None);
        fs::write(folder.path().join(FILE), "model = 1").unwrap();
        assert!(format!("{:#}", Calibrations::read(folder.path()).unwrap_err()).contains(FILE));
    }
}
