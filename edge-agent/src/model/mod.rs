//! Inference: readings → windows → scores → anomalies.
//!
//! A bundle ([`bundle`]) says what it reads; its network alone makes the scores. Readings that are bad are left out.
//! A bundle that is missing or broken scores nothing and says why in the status and in a metric; readings flow on in
//! every case.
//!
//! Bundles are exchanged while the agent runs ([`folder`]): a new one is verified first and takes over between two
//! batches; where it cannot be used, the one before goes on. A network that fails or is too slow
//! [`machine::MAX_FAULTS`] windows in a row is rolled back to the one that it had replaced. What is open at an
//! exchange ends with the reason `replaced`.
//!
//! A network that takes a calibration ([`calibrate`]) scores once it has one: written by `edge-agent calibrate`, or by the
//! running agent where `models.calibrate_over` says so.

pub mod bundle;
pub mod calibrate;
pub mod episode;
pub mod folder;
pub mod infer;
pub mod machine;
pub mod window;

use std::{path::PathBuf, sync::Arc, time::Duration};

use common::{
    documents::ModelStatus,
    reading::{Reading, Registry},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

use self::{
    bundle::Bundle,
    episode::{Ended, Event, Open},
    folder::Change,
    machine::{Calibrated, Model, Purpose},
};
use crate::{metrics::Metrics, window::Missed};

/// The models of a gateway.
#[derive(Debug)]
pub struct Models {
    registry: Arc<Registry>,
    lateness: Duration,
    budget: Duration,
    purpose: Purpose,
    /// How long a model is calibrated on what is read, where it wants to be.
    calibrate_over: Option<Duration>,
    /// By the name of their folder.
    slots: Vec<Slot>,
    /// The gateway's time.
    now: Timestamp,
    /// Whether the status is another one since it was last asked for.
    changed: bool,
}

/// What is used of a sub-folder of the models' folder.
#[derive(Debug)]
struct Slot {
    folder: PathBuf,
    model: Option<Model>,
    /// What the present one has replaced.
    before: Option<Bundle>,
    /// `active`, or what is the matter.
    state: String,
}

/// What calibrating a model came to.
#[derive(Clone, Debug)]
pub struct Fitted {
    /// Its name.
    pub model: Arc<str>,
    /// SHA-256 of its `model.onnx` in hex.
    pub sha256: Arc<str>,
    /// Its folder.
    pub folder: PathBuf,
    /// Machine by machine; none where the model takes no calibration.
    pub machines: Vec<Calibrated>,
}

/// What outlives the agent of a machine, in the outbox's meta store.
#[derive(Serialize, Deserialize)]
struct Kept {
    model: String,
    sha256: String,
    #[serde(default)]
    calibration_sha256: String,
    #[serde(default)]
    machine: String,
    #[serde(default)]
    state: Vec<f32>,
    open: Option<Open>,
}

impl Models {
    /// None yet. A model that takes longer than `budget` for a window is too slow; `lateness` is that of the windows.
    pub fn new(registry: Arc<Registry>, lateness: Duration, budget: Duration, purpose: Purpose) -> Self {
        Self {
            registry,
            lateness,
            budget,
            purpose,
            calibrate_over: None,
            slots: Vec::new(),
            now: Timestamp::default(),
            changed: false,
        }
    }

    /// From now on, models that want to be calibrated and are not are so on what is read within that time.
    pub fn calibrate_over(&mut self, over: Option<Duration>) {
        self.calibrate_over = over;
    }

    /// Takes over what has changed in the models' folder; returns the episodes that this ends.
    pub fn apply(&mut self, change: Change) -> Vec<Event> {
        let Change { folder, bundle } = change;
        self.changed = true;
        let known = self.slots.iter().position(|slot| slot.folder == folder);
        let Some(bundle) = bundle else {
            let removed = known.map(|at| self.slots.remove(at));
            let ended =
                removed.and_then(|slot| slot.model).map(|mut model| model.end(self.now, Ended::Replaced));
            tracing::info!(folder = %folder.display(), "model is removed");
            return ended.unwrap_or_default();
        };
        let at = known.unwrap_or_else(|| {
            self.slots.push(Slot { folder, model: None, before: None, state: String::new() });
            self.slots.len() - 1
        });
        match bundle.and_then(|bundle| self.bind(bundle)) {
            Ok(model) => {
                let Bundle { name, version, sha256, verified, .. } = &model.bundle;
                tracing::info!(model = %name, version, %sha256, golden_vectors = verified, "model is in use");
                let collects = self.calibrate_over.is_some() && model.collected().is_some();
                let ended = self.slots[at].replace(model, self.now);
                if collects {
                    self.slots[at].state = "calibrating on what is read".into();
                }
                ended
            }
            Err(error) => {
                self.slots[at].refuse(format!("{error:#}"));
                Vec::new()
            }
        }
    }

    fn bind(&self, bundle: Bundle) -> anyhow::Result<Model> {
        let calibrates = self.calibrate_over.is_some() && bundle.calibrated.is_none();
        let purpose = if calibrates { Purpose::Calibrate } else { self.purpose };
        Model::new(bundle, &self.registry, (self.lateness, self.budget), purpose)
    }

    /// All bundles that were found, with what became of them.
    pub fn status(&self) -> Vec<ModelStatus> {
        self.slots.iter().map(Slot::status).collect()
    }

    /// The status where it has changed since the last call; says in the metrics which models are in use.
    pub fn news(&mut self, metrics: &Metrics) -> Option<Vec<ModelStatus>> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        for slot in &self.slots {
            metrics.model(&slot.status().name, slot.model.is_some());
        }
        Some(self.status())
    }

    /// Goes on with what [`Models::state`] of an earlier run has kept; episodes whose model is gone or another one
    /// end at `now`.
    pub fn resume(&mut self, kept: &[u8], now: Timestamp) -> Vec<Event> {
        let kept: Vec<Kept> = serde_json::from_slice(kept).unwrap_or_else(|error| {
            tracing::warn!(%error, "the models' state cannot be read; open episodes stay open in the cloud");
            Vec::new()
        });
        let mut ended = Vec::new();
        for Kept { model, sha256, calibration_sha256, machine, state, open } in kept {
            let same = |m: &&mut Model| {
                *m.bundle.name == *model
                    && *m.bundle.sha256 == *sha256
                    && m.bundle.calibration_sha256() == calibration_sha256
            };
            let found = self.slots.iter_mut().filter_map(|slot| slot.model.as_mut()).find(same);
            match (found.and_then(|found| found.machine(&machine)), open) {
                (Some(found), open) => found.resume(state, open),
                (None, Some(open)) => {
                    let end = Some((now.max(open.started_at), Ended::Restart));
                    ended.push(episode::event(&open, model.into(), sha256.into(), end));
                }
                (None, None) => {}
            }
        }
        ended
    }

    /// Gives open episodes other times, where their clock was set since they were raised.
    pub fn settle(&mut self, settle: impl Fn(Timestamp) -> Timestamp) {
        for model in self.slots.iter_mut().filter_map(|slot| slot.model.as_mut()) {
            model.settle(&settle);
        }
    }

    /// Open episodes and the networks' states, for [`Models::resume`].
    pub fn state(&self) -> Vec<u8> {
        let mut kept = Vec::new();
        for model in self.active() {
            let of = |machine: &machine::Machine| Kept {
                model: model.bundle.name.to_string(),
                sha256: model.bundle.sha256.to_string(),
                calibration_sha256: model.bundle.calibration_sha256().to_owned(),
                machine: machine.name.clone(),
                state: machine.state().to_vec(),
                open: machine.open().cloned(),
            };
            kept.extend(
                model.machines().map(of).filter(|kept| kept.open.is_some() || !kept.state.is_empty()),
            );
        }
        serde_json::to_vec(&kept).expect("ids, finite numbers and words are JSON")
    }

    /// Whether some network carries a state, so that [`Models::state`] changes without events.
    pub fn stateful(&self) -> bool {
        self.active().flat_map(Model::machines).any(|machine| !machine.state().is_empty())
    }

    /// Takes in what was read by the gateway's time `at`, and scores the windows that close.
    pub fn push(&mut self, at: Timestamp, readings: &[Reading], metrics: &Metrics) -> Vec<Event> {
        self.now = self.now.max(at);
        let mut events = Vec::new();
        let mut missed = Missed::default();
        for slot in 0..self.slots.len() {
            let Some(model) = &mut self.slots[slot].model else { continue };
            events.extend(model.push(self.now, readings, &mut missed, metrics));
            if model.given_up().is_some() {
                events.extend(self.roll_back(slot));
            } else if let Some(over) = self.calibrate_over
                && model.collected().is_some_and(|windows| model.bundle.hop * windows as u32 >= over)
            {
                self.slots[slot].calibrate();
                self.changed = true;
            }
        }
        metrics.missed_by_models(missed);
        metrics.events(events.len() as u64);
        events
    }

    /// Ends what is open, since the agent stops.
    pub fn stop(&mut self, metrics: &Metrics) -> Vec<Event> {
        let now = self.now;
        let mut events = Vec::new();
        for model in self.slots.iter_mut().filter_map(|slot| slot.model.as_mut()) {
            events.extend(model.flush(now, metrics));
            events.extend(model.end(now, Ended::Stop));
        }
        metrics.events(events.len() as u64);
        events
    }

    /// Calibrates what has been collecting windows; from now on it scores.
    ///
    /// # Errors
    /// When a network fails on its windows.
    pub fn calibrate(&mut self) -> anyhow::Result<Vec<Fitted>> {
        let mut all = Vec::new();
        for slot in &mut self.slots {
            let Some(model) = &mut slot.model else { continue };
            let machines = model.calibrate()?;
            let Bundle { name, sha256, .. } = &model.bundle;
            let (model, sha256) = (Arc::clone(name), Arc::clone(sha256));
            all.push(Fitted { model, sha256, folder: slot.folder.clone(), machines });
        }
        Ok(all)
    }

    /// Whether some episode is open.
    pub fn anomaly(&self) -> bool {
        self.active().flat_map(Model::machines).any(|machine| machine.open().is_some())
    }

    /// The highest of the machines' latest scores, each over its threshold.
    pub fn score(&self) -> Option<f64> {
        self.active().flat_map(Model::machines).filter_map(machine::Machine::severity).max_by(f64::total_cmp)
    }

    fn active(&self) -> impl Iterator<Item = &Model> {
        self.slots.iter().filter_map(|slot| slot.model.as_ref())
    }

    fn roll_back(&mut self, at: usize) -> Vec<Event> {
        self.changed = true;
        let before = self.slots[at].before.take().map(|bundle| self.bind(bundle));
        let now = self.now;
        let slot = &mut self.slots[at];
        let Some(mut model) = slot.model.take() else { return Vec::new() };
        let why = model.given_up().unwrap_or_default().to_owned();
        let Bundle { name, version, sha256, .. } = &model.bundle;
        let given_up = format!("version {version} ({sha256}) was given up: {why}");
        tracing::error!(model = %name, version, %sha256, why, "model is given up");
        match before {
            Some(Ok(earlier)) => {
                slot.state = format!("active again with version {}; {given_up}", earlier.bundle.version);
                slot.model = Some(earlier);
            }
            _ => slot.state = format!("{given_up}; install another"),
        }
        model.end(now, Ended::Replaced)
    }
}

impl Slot {
    fn replace(&mut self, model: Model, now: Timestamp) -> Vec<Event> {
        self.state = "active".into();
        let Some(mut before) = self.model.replace(model) else { return Vec::new() };
        let ended = before.end(now, Ended::Replaced);
        self.before = Some(before.bundle);
        ended
    }

    /// Calibrates on what was collected, and writes the file for the next start, or goes on collecting.
    fn calibrate(&mut self) {
        let Some(model) = &mut self.model else { return };
        let Bundle { name, sha256, .. } = model.bundle.clone();
        let calibrated = match model.calibrate() {
            Ok(calibrated) => calibrated,
            Err(error) => return self.state = format!("calibrating has failed: {error:#}"),
        };
        let why: Vec<&str> = calibrated.iter().flat_map(|machine| &machine.why).map(String::as_str).collect();
        if !why.is_empty() {
            self.state = format!("calibrating goes on: {}", why.join("; "));
            tracing::warn!(model = %name, why = self.state, "calibration is refused");
            return model.collect_on(calibrated);
        }
        let entries: Vec<_> = calibrated.iter().map(calibrate::Entry::from).collect();
        self.state = "active".into();
        match calibrate::write(&self.folder.join(calibrate::FILE), &name, &sha256, &entries) {
            Ok(()) => tracing::info!(model = %name, "model is calibrated and active"),
            Err(error) => {
                self.state = format!("active until the next start: {error:#}");
                tracing::error!(model = %name, error = format!("{error:#}"), "calibration is not kept");
            }
        }
    }

    fn refuse(&mut self, why: String) {
        let name = self.status().name;
        match &self.model {
            Some(model) => {
                let version = &model.bundle.version;
                tracing::warn!(
                    model = name,
                    error = why,
                    version,
                    "new bundle cannot be used; the one before goes on"
                );
                self.state =
                    format!("active with version {version}; the bundle in its folder is refused: {why}");
            }
            None => {
                tracing::warn!(model = name, error = why, "model cannot be used; readings flow on unscored");
                self.state = why;
            }
        }
    }

    fn status(&self) -> ModelStatus {
        let folder =
            || self.folder.file_name().unwrap_or(self.folder.as_os_str()).to_string_lossy().into_owned();
        let bundle = self.model.as_ref().map(|model| &model.bundle);
        ModelStatus {
            name: bundle.map_or_else(folder, |bundle| bundle.name.to_string()),
            sha256: bundle.map_or_else(String::new, |bundle| bundle.sha256.to_string()),
            calibration_sha256: bundle.map_or("", Bundle::calibration_sha256).to_owned(),
            state: self.state.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
