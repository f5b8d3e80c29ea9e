//! In real time, to a mosquitto by TLS.
use super::Options;
use std::{process::ExitCode, time::Duration};
pub(super) async fn run(_options: &Options, _lasting: Duration) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not yet")
}
