//! The demo's child processes: how the parent starts, tells, hears and kills them.
//!
//! Every child is this same program with the hidden subcommand `child`. The parent tells it things by lines
//! on its standard input ([`Order`]) and hears from it by JSON lines on its standard output ([`Event`]); its
//! log goes to a file. Standard input is also the leash: when it ends, because the parent ended in whatever
//! way, also by SIGKILL, the child ends at once.

use std::{
    fs::OpenOptions,
    io::{BufRead as _, Write as _},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use common::time::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child as Process, ChildStdin, Command},
    sync::mpsc,
};

/// What the parent tells a child; one JSON object a line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    /// Finish what is under way and end.
    Stop,
    /// The plant's manual fault begins.
    Break,
    /// It ends.
    Repair,
}

/// What a child tells the parent; one JSON object a line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Event {
    /// An agent's clock shows `at`; `live` once it has caught up with the present. `phase` is the plant's.
    Position {
        /// Time of the plant.
        at: Timestamp,
        /// Whether that is the present.
        live: bool,
        /// What the plant goes through, for people.
        phase: String,
    },
    /// Somebody pressed one of the demo's buttons on the page.
    Key(char),
}

/// A child as the parent holds it.
pub(super) struct Child {
    name: String,
    log: PathBuf,
    process: Process,
    stdin: ChildStdin,
}

impl Child {
    /// Starts `child args…`, its log at `{logs}/{name}.log`, its events to `events` under its name.
    ///
    /// # Errors
    /// When the log or the process cannot be started.
    pub(super) fn spawn(
        name: &str,
        args: &[String],
        logs: &Path,
        events: &mpsc::Sender<(String, Event)>,
    ) -> anyhow::Result<Child> {
        let log = logs.join(format!("{name}.log"));
        let stderr = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening the log {}", log.display()))?;
        let exe = std::env::current_exe().context("finding this program's own file")?;
        let mut process = Command::new(exe)
            .arg("child")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            // Ctrl-C on the terminal is the parent's to handle: children have a group of their own.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let stdin = process.stdin.take().context("the child has no standard input")?;
        let stdout = process.stdout.take().context("the child has no standard output")?;
        let (tx, name_of_events) = (events.clone(), name.to_owned());
        tokio::spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if let Ok(event) = serde_json::from_str(&line)
                    && tx.send((name_of_events.clone(), event)).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(Child { name: name.to_owned(), log, process, stdin })
    }

    /// Gives an order. A child that is gone does not hear it, which [`Self::exited`] will tell.
    pub(super) async fn tell(&mut self, order: &Order) {
        let line = serde_json::to_string(order).expect("an order is plain data") + "\n";
        let _ = self.stdin.write_all(line.as_bytes()).await;
    }

    /// SIGKILL: no chance to finish anything.
    pub(super) async fn kill(mut self) {
        let _ = self.process.kill().await;
    }

    /// Says whether the child has ended by itself, and if so, why, with the end of its log.
    pub(super) fn exited(&mut self) -> Option<String> {
        let status = self.process.try_wait().ok().flatten()?;
        Some(obituary(&self.name, &self.log, status))
    }

    /// Tells the child to stop and waits for it.
    ///
    /// # Errors
    /// When it takes longer than `patience` (then it is killed) or fails.
    pub(super) async fn stop(mut self, patience: Duration) -> anyhow::Result<()> {
        self.tell(&Order::Stop).await;
        match tokio::time::timeout(patience, self.process.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => anyhow::bail!(obituary(&self.name, &self.log, status)),
            Ok(Err(e)) => Err(e).with_context(|| format!("waiting for {}", self.name)),
            Err(_) => {
                let name = self.name.clone();
                self.kill().await;
                anyhow::bail!("{name} did not stop within {patience:?} and was killed")
            }
        }
    }
}

/// What ended how, with the end of its log: from the last error on, which others may follow on the way out.
pub(crate) fn obituary(name: &str, log: &Path, status: ExitStatus) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines.len().saturating_sub(40);
    let cause =
        lines[tail..].iter().rposition(|line| line.starts_with("error: ") || line.contains("panicked at"));
    let from = cause.map_or(lines.len().saturating_sub(8), |at| tail + at);
    let said = lines[from..].iter().take(8).copied().collect::<Vec<_>>().join("\n  ");
    format!("{name} ended with {status}; the end of {}:\n  {said}", log.display())
}

/// The child's side of its standard input. The process exits when the input ends.
pub(super) fn orders() -> mpsc::Receiver<Order> {
    let (tx, rx) = mpsc::channel(16);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if let Ok(order) = serde_json::from_str(&line) {
                // A child that no longer listens is on its way out.
                let _ = tx.blocking_send(order);
            }
        }
        // The leash is gone: as sudden as the parent's own end.
        std::process::exit(3);
    });
    rx
}

/// The child's side of its standard output.
pub(super) fn tell_parent(event: &Event) {
    let line = serde_json::to_string(event).expect("an event is plain data");
    // Without a parent there is nobody to tell; the leash ends this process.
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}
