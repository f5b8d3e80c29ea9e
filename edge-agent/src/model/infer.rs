//! Runs `model.onnx` by tract: inputs `[1, n]` float32 → `score` `[1]`, `contributions` `[1, n]`.

use std::{
    io::Cursor,
    panic::{self, AssertUnwindSafe},
};

use anyhow::{Context as _, anyhow, ensure};
use tract_onnx::prelude::*;

/// A network that is ready to run.
pub struct Scorer {
    plan: Arc<TypedRunnableModel>,
    inputs: usize,
}

impl std::fmt::Debug for Scorer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scorer").field("inputs", &self.inputs).finish_non_exhaustive()
    }
}

impl Scorer {
    /// Parses and optimises a network with `inputs` inputs. No bytes make it panic.
    ///
    /// # Errors
    /// When the bytes are no such network.
    pub fn load(onnx: &[u8], inputs: usize) -> anyhow::Result<Self> {
        let plan = guarded(|| {
            tract_onnx::onnx()
                .model_for_read(&mut Cursor::new(onnx))?
                .with_input_fact(0, f32::fact([1, inputs]).into())?
                .with_outputs_by_name(["score", "contributions"])?
                .into_optimized()?
                .into_runnable()
        })?;
        Ok(Self { plan, inputs })
    }

    /// The score and each input's share in it.
    ///
    /// # Errors
    /// When the number of inputs is wrong, or the network fails or gives no finite score.
    pub fn score(&self, inputs: &[f32]) -> anyhow::Result<(f64, Vec<f32>)> {
        ensure!(inputs.len() == self.inputs, "{} inputs, the model takes {}", inputs.len(), self.inputs);
        let outputs = guarded(|| {
            let tensor = Tensor::from_shape(&[1, inputs.len()], inputs)?;
            self.plan.run(tvec!(tensor.into()))
        })?;
        let values = |n: usize| -> anyhow::Result<Vec<f32>> {
            let output: &TValue = outputs.get(n).context("an output is missing")?;
            Ok(output.to_plain_array_view::<f32>()?.iter().copied().collect())
        };
        let score = *values(0)?.first().context("the score is empty")?;
        ensure!(score.is_finite(), "the score is {score}");
        Ok((f64::from(score), values(1)?))
    }
}

/// tract reports most of what is wrong with a network, and asserts the rest.
fn guarded<T>(run: impl FnOnce() -> TractResult<T>) -> anyhow::Result<T> {
    match panic::catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|e| anyhow!("{e:#}")),
        Err(_) => Err(anyhow!("the network trips an assertion of the runtime")),
    }
}
