//! The agent's program; see `cli.rs`.

use std::process::ExitCode;

fn main() -> ExitCode {
    edge_agent::cli::main()
}
