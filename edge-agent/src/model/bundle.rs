//! A model's bundle: a folder with `model.onnx`, `model.toml`, `golden.json` and, once calibrated, `calibration.toml`.
//!
//! `model.onnx` alone makes the scores; [`super::infer`] says what it takes and gives. `model.toml` says which windows
//! it is given and when a score raises an anomaly:
//!
//! | key | what |
//! |---|---|
//! | `schema` | 2 |
//! | `name`, `version`, `description` | in the words of whoever made it |
//! | `sha256` | of `model.onnx`, in hex |
//! | `span`, `hop` | every `hop` (100 ms at least) a window of the last `span` (a multiple) is scored, in event time |
//! | `features` | `["mean"]`: of each input's readings in the window that are not bad; a window that lacks one is not scored |
//! | `inputs` | device ids in the order of the tensor, see below |
//! | `state` | length of the state that the network keeps from window to window; absent where it keeps none |
//! | `threshold`, `raise_after`, `clear_threshold`, `clear_after` | see [`super::episode`] |
//! | `active_when` | `{ device, above }`: only windows are scored in which all readings of `device` are above `above`; without one it is unknown whether the machine runs, and it counts as standing |
//! | `[calibration]` | `settle`, `drift_lag`, `horizon`, see [`super::calibrate`]; absent where the network takes no calibration |
//! | `[[severity]]` | `score` from which on an anomaly has the `name`, ascending |
//! | `[training]` | whatever is to be said about its making |
//!
//! An input is the id of a device, or a pattern with one `*`: the same text in all of them, and each text for which
//! every input exists names a **machine** with windows, state, calibration and anomalies of its own.
//!
//! `golden.json` holds windows and what the network made of them where it was fitted. A bundle is used only when the
//! hash is right and the network gives every golden score, contribution and state within the stated tolerance
//! (absolute) on this machine.

use std::{fs, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use common::{
    reading::{DeviceIx, Registry},
    time::duration,
};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{
    calibrate::{self, Calibration, Calibrations},
    episode::Hysteresis,
    infer::{Network, Scored, Window},
};

/// The version of `model.toml` that this build reads.
const SCHEMA: u32 = 2;
/// The only feature: the mean of a device's readings in the window that are not bad.
const MEAN: &str = "mean";
/// Most hops in a span: a window adds up so many sums an input.
const MAX_HOPS: u128 = 3_600;

/// A model that has been verified; clones share the network.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// Its name.
    pub name: Arc<str>,
    /// Version in the words of whoever made it.
    pub version: String,
    /// SHA-256 of `model.onnx` in hex.
    pub sha256: Arc<str>,
    /// Length of a window.
    pub span: Duration,
    /// From the end of a window to the end of the next.
    pub hop: Duration,
    /// Ids or patterns of devices, in the order of the tensor.
    pub inputs: Vec<String>,
    /// When the machine runs.
    pub active_when: Option<ActiveWhen>,
    /// When it raises and clears.
    pub rules: Hysteresis,
    /// How it is calibrated.
    pub calibration: Option<calibrate::Rules>,
    /// The network.
    pub network: Network,
    /// Golden vectors that it reproduced.
    pub verified: usize,
    /// What `calibration.toml` says.
    pub calibrated: Option<Calibrations>,
}

/// A machine runs while `device` reads above `above`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActiveWhen {
    /// Id or pattern.
    pub device: String,
    /// In the device's unit.
    pub above: f64,
}

/// The devices that a bundle's inputs are on one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// What `*` stands for; empty without.
    pub machine: String,
    /// In the order of the tensor.
    pub inputs: Vec<DeviceIx>,
    /// The device of `active_when`.
    pub gate: Option<DeviceIx>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    #[serde(rename = "schema")]
    _schema: u32,
    name: String,
    version: String,
    #[serde(rename = "description")]
    _description: Option<String>,
    sha256: String,
    #[serde(with = "duration")]
    span: Duration,
    #[serde(with = "duration")]
    hop: Duration,
    features: Vec<String>,
    inputs: Vec<String>,
    #[serde(default)]
    state: usize,
    active_when: Option<ActiveWhen>,
    threshold: f64,
    clear_threshold: f64,
    raise_after: u32,
    clear_after: u32,
    calibration: Option<calibrate::Rules>,
    severity: Vec<Severity>,
    #[serde(rename = "training")]
    _training: Option<toml::Table>,
}

/// What is read first, since the rest depends on it.
#[derive(Deserialize)]
struct Version {
    schema: u32,
}

#[derive(Deserialize)]
struct Severity {
    name: String,
    score: f64,
}

#[derive(Deserialize)]
struct Golden {
    tolerance: f64,
    inputs: Vec<String>,
    calibration: Option<Calibration>,
    vectors: Vec<Vector>,
}

#[derive(Deserialize)]
struct Vector {
    name: String,
    features: Vec<f32>,
    #[serde(default)]
    state: Vec<f32>,
    score: f64,
    contributions: Vec<f32>,
    #[serde(default)]
    state_out: Vec<f32>,
}

impl Bundle {
    /// Reads and verifies the bundle in `folder`. Blocks, and may take a second.
    ///
    /// # Errors
    /// Says what is missing or wrong; the model must not be used.
    pub fn load(folder: &Path) -> anyhow::Result<Self> {
        let read = |file: &str| {
            let path = folder.join(file);
            fs::read(&path).with_context(|| format!("reading {}", path.display()))
        };
        let (onnx, manifest, golden) = (read("model.onnx")?, read("model.toml")?, read("golden.json")?);
        let Version { schema } = toml::from_slice(&manifest).context("model.toml")?;
        ensure!(schema == SCHEMA, "model.toml: schema = {schema}, this build reads {SCHEMA}");
        let manifest: Manifest = toml::from_slice(&manifest).context("model.toml")?;
        let golden: Golden = serde_json::from_slice(&golden).context("golden.json")?;
        manifest.check()?;
        let sha256 = format!("{:x}", Sha256::digest(&onnx));
        ensure!(
            sha256 == manifest.sha256,
            "model.onnx has sha256 {sha256}, model.toml says {}; install the bundle again",
            manifest.sha256
        );
        let network = Network::load(&onnx, manifest.inputs.len(), manifest.state).context("model.onnx")?;
        ensure!(
            network.takes_calibration() == manifest.calibration.is_some(),
            "model.toml has [calibration] exactly when the network takes location, scale, drift or threshold"
        );
        ensure!(golden.inputs == manifest.inputs, "golden.json and model.toml differ in their inputs");
        ensure!(!golden.vectors.is_empty(), "golden.json has no vectors to verify the model with");
        verify(&network, &golden)?;
        let calibrated = Calibrations::read(folder)?;
        if let Some(calibrated) = &calibrated {
            ensure!(
                calibrated.model_sha256 == sha256,
                "calibration.toml was made for the model with sha256 {}, this one has {sha256}; calibrate again",
                calibrated.model_sha256
            );
            ensure!(manifest.calibration.is_some(), "calibration.toml: this network takes none; remove it");
        }
        let severities = manifest.severity.into_iter().map(|s| (s.score, s.name)).collect();
        Ok(Self {
            name: manifest.name.into(),
            version: manifest.version,
            sha256: sha256.into(),
            span: manifest.span,
            hop: manifest.hop,
            inputs: manifest.inputs,
            active_when: manifest.active_when,
            rules: Hysteresis {
                threshold: manifest.threshold,
                clear_threshold: manifest.clear_threshold,
                raise_after: manifest.raise_after,
                clear_after: manifest.clear_after,
                severities,
            },
            calibration: manifest.calibration,
            network,
            verified: golden.vectors.len(),
            calibrated,
        })
    }

    /// SHA-256 of `calibration.toml` in hex; empty where it has none.
    pub fn calibration_sha256(&self) -> &str {
        self.calibrated.as_ref().map_or("", |calibrated| &calibrated.sha256)
    }

    /// The machines of a gateway that have all inputs.
    ///
    /// # Errors
    /// When there is none, or the device of `active_when` is missing.
    pub fn bind(&self, registry: &Registry) -> anyhow::Result<Vec<Bound>> {
        let mut bound = Vec::new();
        for machine in machines(&self.inputs, registry) {
            let find = |input: &str| registry.find(&input.replacen('*', &machine, 1));
            let Some(inputs) = self.inputs.iter().map(|input| find(input)).collect() else { continue };
            let gate = match &self.active_when {
                Some(when) => {
                    let missing =
                        || format!("active_when: {:?} is no [[device]] of machine {machine:?}", when.device);
                    Some(find(&when.device).with_context(missing)?)
                }
                None => None,
            };
            bound.push(Bound { machine, inputs, gate });
        }
        let unknown = self.inputs.iter().find(|id| !id.contains('*') && registry.find(id).is_none());
        if let Some(id) = unknown {
            anyhow::bail!("its input {id:?} is no [[device]] of this gateway");
        }
        ensure!(!bound.is_empty(), "no machine of this gateway has all of its inputs {:?}", self.inputs);
        Ok(bound)
    }
}

/// What `*` may stand for, by the first pattern.
fn machines(inputs: &[String], registry: &Registry) -> Vec<String> {
    let Some((before, after)) = inputs.iter().find_map(|input| input.split_once('*')) else {
        return vec![String::new()];
    };
    let text = |id: &str| Some(id.strip_prefix(before)?.strip_suffix(after)?.to_owned());
    registry.devices.iter().filter_map(|device| text(&device.id)).collect()
}

impl Manifest {
    fn check(&self) -> anyhow::Result<()> {
        let Self { span, hop, features, inputs, threshold, clear_threshold, severity, .. } = self;
        ensure!(features[..] == [MEAN], "model.toml: features = {features:?}, this build knows [\"mean\"]");
        ensure!(!inputs.is_empty(), "model.toml: inputs are empty");
        let twice = inputs.iter().enumerate().find(|(at, input)| inputs[..*at].contains(input));
        ensure!(twice.is_none(), "model.toml: an input stands twice");
        ensure!(*hop >= Duration::from_millis(100), "model.toml: hop is below 100 ms");
        let hops = span.as_micros() / hop.as_micros();
        ensure!(
            hops > 0 && span.as_micros() % hop.as_micros() == 0 && hops <= MAX_HOPS,
            "model.toml: span = {} is not 1 to {MAX_HOPS} times hop = {}",
            duration::format(*span),
            duration::format(*hop)
        );
        ensure!(*threshold > 0.0, "model.toml: threshold = {threshold} is not above 0");
        ensure!(
            clear_threshold <= threshold,
            "model.toml: clear_threshold = {clear_threshold} is above threshold = {threshold}"
        );
        ensure!(
            self.raise_after > 0 && self.clear_after > 0,
            "model.toml: raise_after and clear_after are 1 at least"
        );
        ensure!(severity.is_sorted_by(|a, b| a.score < b.score), "model.toml: severities do not ascend");
        self.calibration.as_ref().map_or(Ok(()), calibrate::Rules::check)
    }
}

/// Every vector alone, and all of them in one call where the network takes several windows: a row must not depend on
/// its neighbours.
fn verify(network: &Network, golden: &Golden) -> anyhow::Result<()> {
    let calibration = golden.calibration.as_ref();
    let windows =
        golden.vectors.iter().map(|Vector { features, state, .. }| Window { features, calibration, state });
    let windows: Vec<Window<'_>> = windows.collect();
    let together = network.of_machines(windows.len()).score_all(&windows);
    let alone = windows.iter().map(|window| network.score(window));
    for ((vector, together), alone) in golden.vectors.iter().zip(together).zip(alone) {
        let check = |scored: &Scored| compare(scored, vector, golden.tolerance);
        let said = || format!("golden vector {:?}", vector.name);
        alone.and_then(|scored| check(&scored)).with_context(said)?;
        together.and_then(|scored| check(&scored)).with_context(|| {
            format!(
                "{}, with the others in one call, which an open first dimension allows; fix it to 1",
                said()
            )
        })?;
    }
    Ok(())
}

fn compare(scored: &Scored, vector: &Vector, tolerance: f64) -> anyhow::Result<()> {
    let close = |got: f64, wanted: f64| (got - wanted).abs() <= tolerance;
    let score = scored.score;
    ensure!(close(score, vector.score), "score is {score}, expected {} ± {tolerance}", vector.score);
    for (what, got, wanted) in [
        ("contributions", &scored.contributions, &vector.contributions),
        ("state_out", &scored.state, &vector.state_out),
    ] {
        ensure!(got.len() == wanted.len(), "{what}: {} values, expected {}", got.len(), wanted.len());
        for (i, (got, wanted)) in got.iter().zip(wanted).enumerate() {
            ensure!(
                close(f64::from(*got), f64::from(*wanted)),
                "{what} {i} is {got}, expected {wanted} ± {tolerance}"
            );
        }
    }
    Ok(())
}
