//! In real time, to a mosquitto by TLS.
use std::{process::ExitCode, time::Duration};
use super::Options;
pub(super) async fn run(_options: &Options, _lasting: Duration) -> anyhow::Result<ExitCode> { anyhow::bail!("not yet") }
