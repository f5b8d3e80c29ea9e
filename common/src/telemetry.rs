//! Logs and metrics, set up the same way in every program.
//!
//! Logs go to standard error: text for people, or one JSON object a line with `TAILRACE_LOG_FORMAT=json`.
//! `TAILRACE_LOG` filters them (`info`, `edge_agent=debug`). Metrics are OpenMetrics text, named
//! `tailrace_…` with base units, labels from enumerations.

use std::io::Write as _;

use prometheus_client::{encoding::text, registry::Registry};
use tracing_subscriber::EnvFilter;

/// Starts logging; a second call in one process does nothing. `default_filter` holds where `TAILRACE_LOG` is
/// not set.
pub fn init_logs(default_filter: &str) {
    let filter = EnvFilter::try_from_env("TAILRACE_LOG").unwrap_or_else(|_| EnvFilter::new(default_filter));
    let json = std::env::var("TAILRACE_LOG_FORMAT").is_ok_and(|v| v == "json");
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi);
    // Another subscriber is there already only in tests; theirs is as good.
    let _ = if json { builder.json().try_init() } else { builder.try_init() };
}

/// Prints a line of a command's output. A reader that has left (`… | head`) is no error.
pub fn print_line(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

/// An empty registry of metrics; a program has one and hands it to its stages.
pub fn registry() -> Registry {
    Registry::with_prefix("tailrace")
}

/// The exposition that `/metrics` answers.
pub fn exposition(registry: &Registry) -> String {
    let mut out = String::new();
    text::encode(&mut out, registry).expect("writing to a String cannot fail");
    out
}

/// Content type of [`exposition`].
pub const EXPOSITION_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
