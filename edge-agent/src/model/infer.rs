//! Runs `model.onnx` by tract.
//!
//! All tensors are float32. The network takes `features` `[1, n]`, the windows' values in the order of the bundle's
//! inputs, and as many of these as it names among its inputs:
//!
//! | tensor | shape | what |
//! |---|---|---|
//! | `location`, `scale`, `drift` | `[1, n]` | the calibration of every input ([`super::calibrate`]) |
//! | `threshold` | `[1, 1]` | the score above which an anomaly is raised |
//! | `state` | `[1, m]` | what it returned as `state_out` for the window before; zeros at first |
//!
//! It gives `score` `[1]`, `contributions` `[1, n]` and, when it takes `state`, `state_out` `[1, m]`. What a state
//! means is known to the network alone.

use std::{
    io::Cursor,
    panic::{self, AssertUnwindSafe},
};

use anyhow::{Context as _, anyhow, ensure};
use tract_onnx::prelude::*;

use super::calibrate::Calibration;

/// A network that is ready to run; clones share it.
#[derive(Clone)]
pub struct Network {
    plan: Arc<TypedRunnableModel>,
    takes: Vec<Take>,
    inputs: usize,
    state: usize,
}

/// What a network makes of a window.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// The score; finite.
    pub score: f64,
    /// How much each input weighs in it.
    pub contributions: Vec<f32>,
    /// To be given with the next window.
    pub state: Vec<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Take {
    Features,
    Location,
    Scale,
    Drift,
    Threshold,
    State,
}

impl Take {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "features" => Self::Features,
            "location" => Self::Location,
            "scale" => Self::Scale,
            "drift" => Self::Drift,
            "threshold" => Self::Threshold,
            "state" => Self::State,
            _ => return None,
        })
    }
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Network")
            .field("takes", &self.takes)
            .field("inputs", &self.inputs)
            .finish_non_exhaustive()
    }
}

impl Network {
    /// Parses and optimises a network with `inputs` inputs and `state` values of state. No bytes make it panic.
    ///
    /// # Errors
    /// When the bytes are no such network.
    pub fn load(onnx: &[u8], inputs: usize, state: usize) -> anyhow::Result<Self> {
        let parsed = guarded(|| tract_onnx::onnx().model_for_read(&mut Cursor::new(onnx)))?;
        let mut takes = Vec::new();
        for outlet in guarded(|| parsed.input_outlets().map(<[_]>::to_vec))? {
            let name = &parsed.node(outlet.node).name;
            let take = Take::parse(name).with_context(|| {
                format!(
                    "it takes {name:?}; a network takes features, location, scale, drift, threshold, state"
                )
            })?;
            takes.push(take);
        }
        ensure!(takes.contains(&Take::Features), "it does not take features");
        let stateful = takes.contains(&Take::State);
        ensure!(
            stateful == (state > 0),
            "model.toml: state = {state} does not suit a network that takes {takes:?}"
        );
        let plan = guarded(|| {
            let mut model = parsed;
            for (at, take) in takes.iter().enumerate() {
                let width = match take {
                    Take::State => state,
                    Take::Threshold => 1,
                    _ => inputs,
                };
                model.set_input_fact(at, f32::fact([1, width]).into())?;
            }
            let outputs: &[&str] =
                if stateful { &["score", "contributions", "state_out"] } else { &["score", "contributions"] };
            model.with_outputs_by_name(outputs)?.into_optimized()?.into_runnable()
        })?;
        Ok(Self { plan, takes, inputs, state })
    }

    /// Whether it needs a calibration.
    pub fn takes_calibration(&self) -> bool {
        self.takes.iter().any(|take| !matches!(take, Take::Features | Take::State))
    }

    /// The state before the first window.
    pub fn first_state(&self) -> Vec<f32> {
        vec![0.0; self.state]
    }

    /// Scores a window.
    ///
    /// # Errors
    /// When the number of values is wrong, or the network fails or gives no finite score.
    pub fn score(
        &self,
        features: &[f32],
        calibration: Option<&Calibration>,
        state: &[f32],
    ) -> anyhow::Result<Scored> {
        ensure!(features.len() == self.inputs, "{} inputs, the model takes {}", features.len(), self.inputs);
        ensure!(state.len() == self.state, "{} values of state, the model takes {}", state.len(), self.state);
        let mut given: TVec<TValue> = tvec!();
        for take in &self.takes {
            let calibrated = || calibration.context("the model is not calibrated");
            let values: &[f32] = match take {
                Take::Features => features,
                Take::State => state,
                Take::Location => &calibrated()?.location,
                Take::Scale => &calibrated()?.scale,
                Take::Drift => &calibrated()?.drift,
                Take::Threshold => &[calibrated()?.threshold as f32],
            };
            given.push(guarded(|| Tensor::from_shape(&[1, values.len()], values))?.into());
        }
        let outputs = guarded(|| self.plan.run(given))?;
        let values = |n: usize| -> anyhow::Result<Vec<f32>> {
            let output: &TValue = outputs.get(n).context("an output is missing")?;
            Ok(output.to_plain_array_view::<f32>()?.iter().copied().collect())
        };
        let score = *values(0)?.first().context("the score is empty")?;
        ensure!(score.is_finite(), "the score is {score}");
        let contributions = values(1)?;
        ensure!(contributions.len() == self.inputs, "it has {} contributions", contributions.len());
        let state = if self.state > 0 { values(2)? } else { Vec::new() };
        ensure!(state.len() == self.state, "state_out has {} values, state has {}", state.len(), self.state);
        ensure!(state.iter().all(|value| value.is_finite()), "state_out is not finite");
        Ok(Scored { score: f64::from(score), contributions, state })
    }
}

/// tract reports most of what is wrong with a network, and asserts the rest.
fn guarded<T>(run: impl FnOnce() -> TractResult<T>) -> anyhow::Result<T> {
    match panic::catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|e| anyhow!("{e:#}")),
        Err(_) => Err(anyhow!("the network trips an assertion of the runtime")),
    }
}
