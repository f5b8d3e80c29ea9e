//! Inference: closed windows → scores → anomalies.
//!
//! A model scores a window when all of its inputs have a mean in it, once: neither partial windows nor revisions are
//! scored. A bundle that is missing or broken scores nothing and says why in the status and in a metric; readings
//! flow on in every case.

pub mod bundle;
pub mod episode;
pub mod infer;

use std::{fs, path::Path, sync::Arc, time::Duration};

use common::{
    documents::ModelStatus,
    reading::{DeviceIx, Registry},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use self::{
    bundle::Bundle,
    episode::{Ended, Episodes, Event, Open, Place, Score},
};
use crate::{metrics::Metrics, window::Aggregate};

/// The models of a gateway.
#[derive(Debug, Default)]
pub struct Models {
    active: Vec<Model>,
    status: Vec<ModelStatus>,
}

#[derive(Debug)]
struct Model {
    bundle: Bundle,
    inputs: Vec<(DeviceIx, Place)>,
    episodes: Episodes,
    /// Reused from window to window.
    means: Vec<f32>,
}

/// An open episode in the outbox's meta store.
#[derive(Serialize, Deserialize)]
struct Kept {
    model: String,
    sha256: String,
    open: Open,
}

impl Models {
    /// Loads every bundle in `folder` that suits the gateway. Blocks.
    pub fn load(folder: Option<&Path>, registry: &Registry, window: Duration) -> Self {
        let mut models = Self::default();
        let Some(folder) = folder else { return models };
        let mut bundles: Vec<_> = match fs::read_dir(folder) {
            Ok(entries) => entries.flatten().map(|e| e.path()).filter(|path| path.is_dir()).collect(),
            Err(error) => {
                let name = folder.display().to_string();
                models.refuse(name, format!("cannot read the folder of models: {error}"));
                return models;
            }
        };
        bundles.sort();
        for path in bundles {
            match Bundle::load(&path).and_then(|bundle| Model::bind(bundle, registry, window)) {
                Ok(model) => models.accept(model),
                Err(error) => {
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    models.refuse(name, format!("{error:#}"));
                }
            }
        }
        models
    }

    fn accept(&mut self, model: Model) {
        let Bundle { name, version, sha256, verified, .. } = &model.bundle;
        tracing::info!(model = %name, version, %sha256, golden_vectors = verified, "model is active");
        self.status.push(ModelStatus {
            name: name.to_string(),
            sha256: sha256.to_string(),
            state: "active".into(),
        });
        self.active.push(model);
    }

    fn refuse(&mut self, name: String, why: String) {
        tracing::warn!(model = name, error = why, "model cannot be used; readings flow on unscored");
        self.status.push(ModelStatus { name, sha256: String::new(), state: why });
    }

    /// All bundles that were found, with what became of them.
    pub fn status(&self) -> &[ModelStatus] {
        &self.status
    }

    /// Says in the metrics which models are in use.
    pub fn report(&self, metrics: &Metrics) {
        for status in &self.status {
            metrics.model(&status.name, status.state == "active");
        }
    }

    /// Goes on with the episodes that [`Models::state`] of an earlier run has kept; those whose model is gone or
    /// another one end at `now`.
    pub fn resume(&mut self, kept: &[u8], now: Timestamp) -> Vec<Event> {
        let kept: Vec<Kept> = serde_json::from_slice(kept).unwrap_or_else(|error| {
            tracing::warn!(%error, "open episodes cannot be read; they stay open in the cloud");
            Vec::new()
        });
        let mut ended = Vec::new();
        for Kept { model, sha256, open } in kept {
            let same = |m: &&mut Model| *m.bundle.name == *model && *m.bundle.sha256 == *sha256;
            match self.active.iter_mut().find(same) {
                Some(found) => found.episodes.resume(open),
                None => {
                    let end = Some((now.max(open.started_at), Ended::Restart));
                    ended.push(episode::event(&open, model.into(), sha256.into(), end));
                }
            }
        }
        ended
    }

    /// Gives open episodes other times, where their clock was set since they were raised.
    pub fn settle(&mut self, settle: impl Fn(Timestamp) -> Timestamp) {
        self.active.iter_mut().for_each(|model| model.episodes.settle(&settle));
    }

    /// The open episodes, for [`Models::resume`].
    pub fn state(&self) -> Vec<u8> {
        let kept = |model: &Model| {
            Some(Kept {
                model: model.bundle.name.to_string(),
                sha256: model.bundle.sha256.to_string(),
                open: model.episodes.open()?.clone(),
            })
        };
        let kept: Vec<Kept> = self.active.iter().filter_map(kept).collect();
        serde_json::to_vec(&kept).expect("ids, numbers and words are JSON")
    }

    /// Scores the windows that closed; `aggregates` are ordered by window.
    pub fn score(&mut self, aggregates: &[Aggregate], metrics: &Metrics) -> Vec<Event> {
        let mut events = Vec::new();
        for window in aggregates.chunk_by(|a, b| a.start == b.start) {
            // A revision, or the end of the input: not a window that has just closed.
            if window.iter().any(|a| a.partial || a.revision > 0) {
                continue;
            }
            for model in &mut self.active {
                events.extend(model.score(window, metrics));
            }
        }
        metrics.events(events.len() as u64);
        events
    }

    /// Ends what is open, since the agent stops.
    pub fn stop(&mut self, at: Timestamp) -> Vec<Event> {
        self.active.iter_mut().filter_map(|model| model.episodes.end(at, Ended::Stop)).collect()
    }
}

impl Model {
    fn bind(bundle: Bundle, registry: &Registry, window: Duration) -> anyhow::Result<Self> {
        anyhow::ensure!(
            bundle.window == window,
            "it scores windows of {} s, window.width is {} s; configure the model's width",
            bundle.window.as_secs_f64(),
            window.as_secs_f64()
        );
        let mut inputs = Vec::with_capacity(bundle.inputs.len());
        for id in &bundle.inputs {
            let Some(ix) = registry.find(id) else {
                anyhow::bail!("its input {id:?} is no [[device]] of this gateway");
            };
            let asset = registry.device(ix).asset.clone();
            inputs.push((ix, Place { asset, device: id.clone() }));
        }
        let (name, sha256) = (Arc::clone(&bundle.name), Arc::clone(&bundle.sha256));
        let episodes = Episodes::new(name, sha256, bundle.rules.clone());
        Ok(Self { means: Vec::with_capacity(inputs.len()), inputs, episodes, bundle })
    }

    fn score(&mut self, window: &[Aggregate], metrics: &Metrics) -> Option<Event> {
        self.means.clear();
        for (device, _) in &self.inputs {
            let found = window.binary_search_by_key(device, |aggregate| aggregate.device);
            let mean = found.ok().and_then(|at| window[at].stats.mean());
            self.means.extend(mean.map(|mean| mean as f32));
        }
        let scored = if self.means.len() == self.inputs.len() {
            let scored = self.bundle.scorer.score(&self.means);
            scored
                .inspect_err(
                    |error| tracing::warn!(model = %self.bundle.name, %error, "window is not scored"),
                )
                .ok()
        } else {
            None
        };
        metrics.scored(&self.bundle.name, scored.as_ref().map(|(score, _)| *score));
        let (score, contributions) = scored?;
        let largest = contributions.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1))?.0;
        let place = &self.inputs.get(largest)?.1;
        let at = window[0].end;
        let event = self.episodes.push(Score { at, score, place }, Uuid::now_v7)?;
        let state = event.ended.map_or("raised", |(_, why)| why.as_str());
        tracing::info!(model = %event.model, device = event.place.device, score, %at, state, "anomaly");
        Some(event)
    }
}

#[cfg(test)]
mod tests;
