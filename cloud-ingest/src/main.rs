//! `cloud-ingest`: see `cloud-ingest --help` and `default.toml`.

use std::process::ExitCode;

use clap::Parser;
use cloud_ingest::cli::{self, Cli};
use tikv_jemallocator::Jemalloc;

/// Batches of every stage come and go between what stays. By a profile after ten minutes of a live load glibc's malloc took
/// 30 % of the samples, jemalloc 9 % (BENCHMARKS.md); what was free had to be given back to the kernel by hand.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// What jemalloc reads at its start, as it does the environment's `MALLOC_CONF`, where `stats_print:true` has it say at the
/// end what was in use and what lay free. What is free goes back to the kernel within ten seconds also when nobody asks for
/// memory; large batches of all threads come from the same few arenas, and not from one of their own that gives back at
/// once.
#[expect(unsafe_code, reason = "jemalloc knows it by its name")]
#[unsafe(export_name = "malloc_conf")]
pub static MALLOC_CONF: &[u8; 54] = b"background_thread:true,narenas:2,oversize_threshold:0\0";

#[tokio::main]
async fn main() -> ExitCode {
    cli::main(Cli::parse()).await
}
