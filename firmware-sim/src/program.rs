//! A real program as a child: started, killed, asked to end.
//!
//! `setpriv --pdeathsig KILL` becomes the program, under the same pid, after it has asked the kernel to kill it when its
//! parent ends in whatever way: neither mosquitto nor our own programs need to know that they are watched. (std has no
//! safe way to ask for that, or to send SIGTERM, which a shell's `kill` does here.)

use std::{
    env,
    fs::OpenOptions,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    time::{Instant, sleep},
};

use crate::{
    demo::{child::obituary, loopback},
    noise::{bits, stream},
};

/// How often a program is asked whether it listens.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Where Debian keeps daemons, which is not in everybody's PATH.
const SBIN: [&str; 3] = ["/usr/sbin", "/usr/local/sbin", "/sbin"];

/// The program of ours with this name, which stands beside this one.
pub(crate) fn ours(name: &str) -> anyhow::Result<PathBuf> {
    let here = env::current_exe().context("finding this program's own file")?;
    let path = here.with_file_name(name);
    if !path.is_file() {
        let profile = match here.parent().and_then(Path::file_name).and_then(|name| name.to_str()) {
            Some("release") => " --release",
            Some("demo") => " --profile demo",
            _ => "",
        };
        bail!("{} is not there; build all programs: cargo build --workspace{profile}", path.display());
    }
    Ok(path)
}

/// A program of somebody else, and the package that brings it on Debian.
pub(crate) fn theirs(name: &str, package: &str) -> anyhow::Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(SBIN.into_iter().map(PathBuf::from));
    let found = folders.map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("no {name} in PATH or /usr/sbin; install the package {package}"))
}

/// A program that is killed and started again.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    command: Vec<PathBuf>,
    env: Vec<(&'static str, String)>,
    log: PathBuf,
    running: Option<Child>,
}

impl Program {
    /// `path args…`, not yet started; what it says goes to the end of `log`.
    pub(crate) fn new(
        name: &'static str,
        path: PathBuf,
        args: &[&Path],
        log: PathBuf,
    ) -> anyhow::Result<Program> {
        let leash = theirs("setpriv", "util-linux")?;
        let mut command = vec![leash, "--pdeathsig".into(), "KILL".into(), "--".into(), path];
        command.extend(args.iter().map(|arg| arg.to_path_buf()));
        Ok(Program { name, command, env: Vec::new(), log, running: None })
    }

    /// The same, with these variables in its environment: where a secret may stand, and no command line.
    #[must_use]
    pub(crate) fn with_env(mut self, env: impl IntoIterator<Item = (&'static str, String)>) -> Program {
        self.env.extend(env);
        self
    }

    /// Starts it, unless it runs. To be called from the main thread: the kernel takes that for the parent.
    pub(crate) fn start(&mut self) -> anyhow::Result<()> {
        if self.running.is_some() {
            return Ok(());
        }
        let opened = || OpenOptions::new().create(true).append(true).open(&self.log);
        let opening = || format!("opening the log {}", self.log.display());
        let child = Command::new(&self.command[0])
            .args(&self.command[1..])
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(opened().with_context(opening)?)
            .stderr(opened().with_context(opening)?)
            // Ctrl-C on the terminal is the parent's to handle.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", self.name))?;
        self.running = Some(child);
        Ok(())
    }

    /// Its pid, while it runs or nobody has asked how it ended.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.running.as_ref().and_then(Child::id)
    }

    /// SIGKILL; it is gone when this returns.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        match self.running.take() {
            Some(mut child) => child.kill().await.with_context(|| format!("killing {}", self.name)),
            None => Ok(()),
        }
    }

    /// SIGTERM.
    pub(crate) async fn terminate(&self) -> anyhow::Result<()> {
        let Some(pid) = self.running.as_ref().and_then(Child::id) else { return Ok(()) };
        let command = format!("kill -TERM {pid}");
        let sent = Command::new("sh").args(["-c", &command]).status().await;
        let sent = sent.with_context(|| format!("running {command}"))?;
        anyhow::ensure!(sent.success(), "{command} ended with {sent}");
        Ok(())
    }

    /// Waits until it has ended by itself and well; whether it did so in time.
    pub(crate) async fn ended_within(&mut self, patience: Duration) -> anyhow::Result<bool> {
        let Some(child) = &mut self.running else { return Ok(true) };
        let Ok(status) = tokio::time::timeout(patience, child.wait()).await else { return Ok(false) };
        let status = status.with_context(|| format!("waiting for {}", self.name))?;
        self.running = None;
        if !status.success() {
            bail!(obituary(self.name, &self.log, status));
        }
        Ok(true)
    }

    /// Waits until something accepts connections at `server`.
    pub(crate) async fn listens(&mut self, server: SocketAddr, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        while TcpStream::connect(server).await.is_err() {
            self.check()?;
            ensure!(Instant::now() < deadline, "{} does not listen after {patience:?}", self.name);
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// Fails if it has ended though nobody killed it.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        let ended = self.running.as_mut().and_then(|child| child.try_wait().transpose());
        let ended = ended.transpose().with_context(|| format!("waiting for {}", self.name))?;
        let Some(status) = ended else { return Ok(()) };
        self.running = None;
        bail!("nobody killed it: {}", obituary(self.name, &self.log, status))
    }
}

/// Free ports below those that systems give to outgoing connections (32,768 and up on Linux), so that nobody takes one
/// while its program is dead.
pub(crate) fn quiet_ports<const N: usize>() -> anyhow::Result<[u16; N]> {
    let seed = u64::from(std::process::id());
    let candidates = (0..1000).map(|n| 20_000 + (bits(seed, stream("ports"), n) % 10_000) as u16);
    let mut found: Vec<(u16, TcpListener)> = Vec::new();
    for port in candidates {
        if found.len() < N
            && let Ok(listener) = TcpListener::bind(loopback(port))
        {
            found.push((port, listener));
        }
    }
    let ports: Vec<u16> = found.iter().map(|(port, _)| *port).collect();
    ports.try_into().ok().context("no free ports between 20000 and 29999")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_is_killed_asked_to_end_and_missed() {
        let folder = tempfile::tempdir().unwrap();
        let shell = theirs("sh", "dash").unwrap();
        let program = |script: &str| {
            let args = ["-c".as_ref(), Path::new(script)];
            Program::new("sleeper", shell.clone(), &args, folder.path().join("log")).unwrap()
        };
        let mut sleeper = program("echo awake; exec sleep 60");
        sleeper.start().unwrap();
        sleeper.check().unwrap();
        assert!(!sleeper.ended_within(Duration::from_millis(200)).await.unwrap());
        sleeper.kill().await.unwrap();
        sleeper.check().unwrap();

        let mut polite = program("trap 'exit 0' TERM; echo awake; while :; do sleep 0.05; done");
        polite.start().unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        polite.terminate().await.unwrap();
        assert!(polite.ended_within(Duration::from_secs(10)).await.unwrap());

        let mut weak = program("echo I am not well; exit 3");
        weak.start().unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let error = weak.check().unwrap_err().to_string();
        assert!(error.contains("nobody killed it: sleeper ended with exit status: 3"), "{error}");
        assert!(error.contains("I am not well"), "{error}");
        weak.check().unwrap();
    }

    #[test]
    fn what_is_not_there_is_named_with_its_fix() {
        let error = theirs("no-such-broker", "mosquitto").unwrap_err().to_string();
        assert_eq!(error, "no no-such-broker in PATH or /usr/sbin; install the package mosquitto");
        let error = ours("no-such-program").unwrap_err().to_string();
        assert!(error.contains("no-such-program is not there; build all programs: cargo build"), "{error}");
    }
}
