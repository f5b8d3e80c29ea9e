//! `edge-agent discover`.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use common::{config::Mistakes, telemetry};
use tokio::runtime::Runtime;

use crate::{
    discover::{self, Findings, PATIENCE, UNITS},
    settings::{file::ModbusBus, modbus},
    source::{LinuxHardware, modbus::Address},
};

/// Where to look, and where to write what was found.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("where").required(true).multiple(true))]
pub(super) struct Where {
    /// I2C bus to scan, such as /dev/i2c-1; may be given again
    #[arg(long, value_name = "PATH", group = "where")]
    i2c: Vec<String>,
    /// Modbus to ask for units, such as tcp://192.168.7.20:502 or rtu:///dev/ttyUSB0; may be given again
    #[arg(long, value_name = "URL", group = "where")]
    modbus: Vec<String>,
    /// Bits a second on the serial lines; 19200 where absent
    #[arg(long)]
    baud: Option<u32>,
    /// Parity on the serial lines: even, odd or none; even where absent
    #[arg(long)]
    parity: Option<String>,
    /// Stop bits on the serial lines: 1 or 2; 1 where absent
    #[arg(long)]
    stop_bits: Option<u8>,
    /// New file for the configuration; standard output where absent
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl Where {
    fn addresses(&self) -> Result<Vec<Address>, Mistakes> {
        let of = |url: &String| {
            let serial = url.starts_with("rtu://");
            let bus = ModbusBus {
                url: url.clone(),
                baud: self.baud.filter(|_| serial),
                parity: self.parity.clone().filter(|_| serial),
                stop_bits: self.stop_bits.filter(|_| serial),
                timeout: None,
                slave: Vec::new(),
            };
            modbus::address(&format!("--modbus {url}"), &bus)
        };
        self.modbus.iter().map(of).collect()
    }
}

/// Fails when nothing could be asked.
pub(super) fn execute(places: &Where) -> anyhow::Result<ExitCode> {
    let addresses = places.addresses()?;
    // Before the search, which may take a while.
    let out = places.out.as_deref().map(create).transpose()?;
    let progress = |line: &str| eprintln!("{line}");
    let i2c = discover::scan_i2c(&LinuxHardware, &places.i2c, progress);
    let runtime = Runtime::new().context("starting the runtime")?;
    let modbus = runtime.block_on(discover::scan_modbus(&addresses, &UNITS, PATIENCE, progress));
    let findings = Findings { i2c, modbus };
    let text = discover::configuration(&findings);
    match (out, &places.out) {
        (Some(mut file), Some(path)) => {
            file.write_all(text.as_bytes()).with_context(|| format!("writing {}", path.display()))?;
            eprintln!("{} is written; fill in its first three keys", path.display());
        }
        _ => telemetry::print_line(format_args!("{}", text.trim_end())),
    }
    Ok(if findings.scanned() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn create(path: &Path) -> anyhow::Result<File> {
    let created = OpenOptions::new().write(true).create_new(true).open(path);
    created.with_context(|| format!("creating {}; discover overwrites nothing", path.display()))
}
