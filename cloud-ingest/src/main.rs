//! `cloud-ingest`: see `cloud-ingest --help` and `default.toml`.

use std::process::ExitCode;

use clap::Parser;

#[tokio::main]
async fn main() -> ExitCode {
    cloud_ingest::cli::main(cloud_ingest::cli::Cli::parse()).await
}
