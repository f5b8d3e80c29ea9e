//! `cloud-ingest`: see `cloud-ingest --help` and `default.toml`.

use std::process::ExitCode;

use clap::Parser;
use cloud_ingest::cli::{self, Cli};

fn main() -> ExitCode {
    // Before there are threads.
    common::memory::steady();
    run()
}

#[tokio::main]
async fn run() -> ExitCode {
    cli::main(Cli::parse()).await
}
