//! `edge-agent discover`.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use common::telemetry;

use crate::{discover, source::LinuxHardware};

/// Where to look, and where to write what was found.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("where").required(true).multiple(true))]
pub(super) struct Where {
    /// I2C bus to scan, such as /dev/i2c-1; may be given again
    #[arg(long, value_name = "PATH", group = "where")]
    i2c: Vec<String>,
    /// New file for the configuration; standard output where absent
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Fails when nothing could be looked at.
pub(super) fn execute(places: &Where) -> anyhow::Result<ExitCode> {
    // Before the search, which may take a while.
    let out = places.out.as_deref().map(create).transpose()?;
    let findings = discover::discover(&LinuxHardware, &places.i2c, |line| eprintln!("{line}"));
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
