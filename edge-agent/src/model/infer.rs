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
//!
//! A network whose inputs all leave the first dimension open takes the windows of all machines in one call, a row a
//! machine ([`Network::of_machines`]): most of a call of a small network goes into its making.

use std::{
    io::Cursor,
    panic::{self, AssertUnwindSafe},
};

use anyhow::{Context as _, anyhow, ensure};
use tract_onnx::{prelude::*, tract_hir::infer::Factoid as _};

use super::calibrate::Calibration;

/// A network that is ready to run; clones share it.
#[derive(Clone)]
pub struct Network {
    /// For one window.
    plan: Arc<TypedRunnableModel>,
    /// For so many.
    of_machines: Option<(usize, Arc<TypedRunnableModel>)>,
    /// As parsed, where its first dimension is open.
    open: Option<Arc<InferenceModel>>,
    takes: Vec<Take>,
    inputs: usize,
    state: usize,
}

/// What a network is given of a window.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    /// In the order of the bundle's inputs.
    pub features: &'a [f32],
    /// Of the machine.
    pub calibration: Option<&'a Calibration>,
    /// What the network made of the machine's window before.
    pub state: &'a [f32],
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
        let open = guarded(|| {
            let outlets = parsed.input_outlets()?.to_vec();
            let fixed = |outlet: &OutletId| -> TractResult<bool> {
                let first = parsed.outlet_fact(*outlet)?.shape.dim(0);
                Ok(first.and_then(|dim| dim.concretize()).is_none_or(|dim| dim.to_i64().is_ok()))
            };
            outlets.iter().try_fold(true, |open, outlet| Ok(open && !fixed(outlet)?))
        })?;
        let plan = plan(parsed.clone(), &takes, 1, (inputs, state))?;
        let open = open.then(|| Arc::new(parsed));
        Ok(Self { plan, of_machines: None, open, takes, inputs, state })
    }

    /// The same, ready to take the windows of so many machines in one call where it can.
    #[must_use]
    pub fn of_machines(&self, machines: usize) -> Self {
        let open = self.open.as_ref().filter(|_| machines > 1);
        let plan =
            open.map(|model| plan(model.as_ref().clone(), &self.takes, machines, (self.inputs, self.state)));
        let of_machines = match plan {
            Some(Ok(plan)) => Some((machines, plan)),
            Some(Err(error)) => {
                tracing::info!(error = format!("{error:#}"), machines, "the network takes a window a call");
                None
            }
            None => None,
        };
        Self { of_machines, ..self.clone() }
    }

    /// Whether it needs a calibration.
    pub fn takes_calibration(&self) -> bool {
        self.takes.iter().any(|take| !matches!(take, Take::Features | Take::State))
    }

    /// The state before the first window.
    pub fn first_state(&self) -> Vec<f32> {
        vec![0.0; self.state]
    }

    /// Scores windows, each of another machine; in one call where there are as many as [`Self::of_machines`] was told.
    ///
    /// # Errors
    /// Of each window: see [`Self::score`].
    pub fn score_all(&self, windows: &[Window<'_>]) -> Vec<anyhow::Result<Scored>> {
        if let Some((_, plan)) = self.of_machines.as_ref().filter(|(machines, _)| *machines == windows.len())
            && let Ok(rows) = self.run(plan, windows)
        {
            return rows;
        }
        // A call that fails as a whole does not say whose fault it is.
        windows.iter().map(|window| self.score(window)).collect()
    }

    /// Scores a window.
    ///
    /// # Errors
    /// When the number of values is wrong, or the network fails or gives no finite score.
    pub fn score(&self, window: &Window<'_>) -> anyhow::Result<Scored> {
        let [scored] = <[_; 1]>::try_from(self.run(&self.plan, std::slice::from_ref(window))?)
            .map_err(|rows| anyhow!("{} scores of one window", rows.len()))?;
        scored
    }

    /// One call; a row a window.
    fn run(
        &self,
        plan: &Arc<TypedRunnableModel>,
        windows: &[Window<'_>],
    ) -> anyhow::Result<Vec<anyhow::Result<Scored>>> {
        let Self { takes, inputs, state, .. } = self;
        let rows = windows.len();
        for window in windows {
            let (features, held) = (window.features.len(), window.state.len());
            ensure!(features == *inputs, "{features} inputs, the model takes {inputs}");
            ensure!(held == *state, "{held} values of state, the model takes {state}");
        }
        let mut given: TVec<TValue> = tvec!();
        let mut values = Vec::with_capacity(rows * inputs.max(state));
        for take in takes {
            values.clear();
            for window in windows {
                let calibrated = || window.calibration.context("the model is not calibrated");
                match take {
                    Take::Features => values.extend_from_slice(window.features),
                    Take::State => values.extend_from_slice(window.state),
                    Take::Location => values.extend_from_slice(&calibrated()?.location),
                    Take::Scale => values.extend_from_slice(&calibrated()?.scale),
                    Take::Drift => values.extend_from_slice(&calibrated()?.drift),
                    Take::Threshold => values.push(calibrated()?.threshold as f32),
                }
            }
            let shape = [rows, values.len() / rows.max(1)];
            given.push(guarded(|| Tensor::from_shape(&shape, &values))?.into());
        }
        let outputs = guarded(|| plan.run(given))?;
        let values = |n: usize, what: &str, width: usize| -> anyhow::Result<Vec<f32>> {
            let output: &TValue = outputs.get(n).with_context(|| format!("{what} is missing"))?;
            let values: Vec<f32> = output.to_plain_array_view::<f32>()?.iter().copied().collect();
            let found = values.len();
            ensure!(found == rows * width, "{what} has {found} values, {} are expected", rows * width);
            Ok(values)
        };
        let (scores, contributions) = (values(0, "score", 1)?, values(1, "contributions", *inputs)?);
        let states = if *state > 0 { values(2, "state_out", *state)? } else { Vec::new() };
        let row = |(row, score): (usize, f32)| {
            ensure!(score.is_finite(), "the score is {score}");
            let state = states[row * state..][..*state].to_vec();
            ensure!(state.iter().all(|value| value.is_finite()), "state_out is not finite");
            let contributions = contributions[row * inputs..][..*inputs].to_vec();
            Ok(Scored { score: f64::from(score), contributions, state })
        };
        Ok(scores.into_iter().enumerate().map(row).collect())
    }
}

/// Optimises a network for so many windows a call.
fn plan(
    mut model: InferenceModel,
    takes: &[Take],
    windows: usize,
    (inputs, state): (usize, usize),
) -> anyhow::Result<Arc<TypedRunnableModel>> {
    guarded(|| {
        for (at, take) in takes.iter().enumerate() {
            let width = match take {
                Take::State => state,
                Take::Threshold => 1,
                _ => inputs,
            };
            model.set_input_fact(at, f32::fact([windows, width]).into())?;
        }
        let outputs: &[&str] =
            if state > 0 { &["score", "contributions", "state_out"] } else { &["score", "contributions"] };
        model.with_outputs_by_name(outputs)?.into_optimized()?.into_runnable()
    })
}

/// tract reports most of what is wrong with a network, and asserts the rest.
fn guarded<T>(run: impl FnOnce() -> TractResult<T>) -> anyhow::Result<T> {
    match panic::catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|e| anyhow!("{e:#}")),
        Err(_) => Err(anyhow!("the network trips an assertion of the runtime")),
    }
}
