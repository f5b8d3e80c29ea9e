//! This test binary again, for one test alone: to be killed, or to be measured.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

const DIR: &str = "TAILRACE_TEST_CHILD_DIR";

/// Runs the ignored test `name` in a process of its own, with `dir` for [`dir`].
pub(super) fn again(name: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture", "--test-threads", "1"]).env(DIR, dir);
    command
}

/// What the parent gave; `None` when there is no parent.
pub(super) fn dir() -> Option<PathBuf> {
    std::env::var_os(DIR).map(PathBuf::from)
}
