//! A model's bundle: a folder with `model.onnx`, `model.toml` and `golden.json`.
//!
//! `model.toml` says what the model reads and when it raises; `sha256` is that of `model.onnx`. `golden.json` holds
//! inputs and what the model made of them where it was fitted. A bundle is used only when the hash is right and the
//! model gives every golden score and contribution within the stated tolerance (absolute) on this machine.

use std::{fs, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use common::time::duration;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{episode::Hysteresis, infer::Scorer};

/// The version of `model.toml` that this build reads.
const SCHEMA: u32 = 1;
/// The only feature: the mean of a device's readings in the window that are not bad.
const MEAN: &str = "mean";

/// A model that has been verified.
#[derive(Debug)]
pub struct Bundle {
    /// Its name.
    pub name: Arc<str>,
    /// Version in the words of whoever made it.
    pub version: String,
    /// SHA-256 of `model.onnx` in hex.
    pub sha256: Arc<str>,
    /// Width of the windows that it scores.
    pub window: Duration,
    /// Device ids, in the order of the tensor.
    pub inputs: Vec<String>,
    /// When it raises and clears.
    pub rules: Hysteresis,
    /// The network.
    pub scorer: Scorer,
    /// Golden vectors that it reproduced.
    pub verified: usize,
}

#[derive(Deserialize)]
struct Manifest {
    schema: u32,
    name: String,
    version: String,
    sha256: String,
    #[serde(with = "duration")]
    window: Duration,
    features: Vec<String>,
    inputs: Vec<String>,
    threshold: f64,
    clear_threshold: f64,
    raise_after: u32,
    clear_after: u32,
    severity: Vec<Severity>,
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
    vectors: Vec<Vector>,
}

#[derive(Deserialize)]
struct Vector {
    name: String,
    inputs: Vec<f32>,
    score: f64,
    contributions: Vec<f64>,
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
        let manifest: Manifest = toml::from_slice(&manifest).context("model.toml")?;
        let golden: Golden = serde_json::from_slice(&golden).context("golden.json")?;
        manifest.check()?;
        let sha256 = format!("{:x}", Sha256::digest(&onnx));
        ensure!(
            sha256 == manifest.sha256,
            "model.onnx has sha256 {sha256}, model.toml says {}; install the bundle again",
            manifest.sha256
        );
        let scorer = Scorer::load(&onnx, manifest.inputs.len()).context("model.onnx")?;
        ensure!(golden.inputs == manifest.inputs, "golden.json and model.toml differ in their inputs");
        ensure!(!golden.vectors.is_empty(), "golden.json has no vectors to verify the model with");
        for vector in &golden.vectors {
            verify(&scorer, vector, golden.tolerance)
                .with_context(|| format!("golden vector {:?}", vector.name))?;
        }
        let severities = manifest.severity.into_iter().map(|s| (s.score, s.name)).collect();
        Ok(Self {
            name: manifest.name.into(),
            version: manifest.version,
            sha256: sha256.into(),
            window: manifest.window,
            inputs: manifest.inputs,
            rules: Hysteresis {
                threshold: manifest.threshold,
                clear_threshold: manifest.clear_threshold,
                raise_after: manifest.raise_after,
                clear_after: manifest.clear_after,
                severities,
            },
            scorer,
            verified: golden.vectors.len(),
        })
    }
}

impl Manifest {
    fn check(&self) -> anyhow::Result<()> {
        let Self { schema, features, inputs, threshold, clear_threshold, severity, .. } = self;
        ensure!(*schema == SCHEMA, "model.toml: schema = {schema}, this build reads {SCHEMA}");
        ensure!(features[..] == [MEAN], "model.toml: features = {features:?}, this build knows [\"mean\"]");
        ensure!(!inputs.is_empty(), "model.toml: inputs are empty");
        ensure!(
            clear_threshold <= threshold,
            "model.toml: clear_threshold = {clear_threshold} is above threshold = {threshold}"
        );
        ensure!(
            self.raise_after > 0 && self.clear_after > 0,
            "model.toml: raise_after and clear_after are 1 at least"
        );
        ensure!(severity.is_sorted_by(|a, b| a.score < b.score), "model.toml: severities do not ascend");
        Ok(())
    }
}

fn verify(scorer: &Scorer, vector: &Vector, tolerance: f64) -> anyhow::Result<()> {
    let (score, contributions) = scorer.score(&vector.inputs)?;
    let close = |got: f64, wanted: f64| (got - wanted).abs() <= tolerance;
    ensure!(close(score, vector.score), "score is {score}, expected {} ± {tolerance}", vector.score);
    ensure!(
        contributions.len() == vector.contributions.len(),
        "it has {} contributions",
        contributions.len()
    );
    for (i, (got, wanted)) in contributions.iter().zip(&vector.contributions).enumerate() {
        ensure!(
            close(f64::from(*got), *wanted),
            "contribution {i} is {got}, expected {wanted} ± {tolerance}"
        );
    }
    Ok(())
}
