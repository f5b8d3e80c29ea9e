//! What a child has cost, as the kernel counts it (proc(5)).
//!
//! CPU time is `utime` + `stime` of `/proc/PID/stat`, over all threads, also those that have ended; it can be read until
//! somebody waits for the child, so the last reading, of a zombie, is all of it. Peak RSS is `VmHWM`, which counts
//! from the exec: `ru_maxrss` would begin with the memory of the parent. It only grows, and is gone when the process
//! ends, so it is read often. PSS counts a page that n processes share as 1/n; it is sampled. RSS is anonymous memory,
//! which is the process's own, and pages of files, which are its program as far as it has been run: the kernel takes those
//! back when somebody needs the room.

use std::{fs, time::Duration};

use anyhow::Context as _;

/// Clock ticks a second in `/proc/PID/stat`: `sysconf(_SC_CLK_TCK)`, 100 on every Linux that is not built otherwise.
const TICKS: u64 = 100;

/// Of one process, so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    /// All threads, user and system.
    pub(super) cpu: Duration,
    /// Bytes, now; PSS when it was last looked at.
    pub(super) rss: u64,
    pub(super) pss: u64,
    /// Bytes of `rss` that are no file's.
    pub(super) anonymous: u64,
    /// Bytes.
    pub(super) peak_rss: u64,
    /// Bytes, highest sample.
    pub(super) peak_pss: u64,
    /// It has ended, and `cpu` will not grow any more.
    pub(super) ended: bool,
}

impl Usage {
    /// Looks at the process; with `pss`, also at that, which costs the kernel a walk through its memory.
    pub(super) fn look(&mut self, pid: u32, pss: bool) -> anyhow::Result<()> {
        let path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        (self.cpu, self.ended) = parse_stat(&stat).with_context(|| format!("{path} says {stat:?}"))?;
        let of = |file: &str, field: &str| {
            let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
            kib(&text, field).unwrap_or(0) * 1024
        };
        self.rss = of("status", "VmRSS:");
        self.anonymous = of("status", "RssAnon:");
        self.peak_rss = self.peak_rss.max(of("status", "VmHWM:"));
        if pss {
            self.pss = of("smaps_rollup", "Pss:");
            self.peak_pss = self.peak_pss.max(self.pss);
        }
        Ok(())
    }
}

/// CPU time of the calling thread.
pub(super) fn thread_cpu() -> anyhow::Result<Duration> {
    let path = "/proc/thread-self/schedstat";
    let text = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    let nanos = text.split(' ').next().and_then(|word| word.parse().ok());
    Ok(Duration::from_nanos(nanos.with_context(|| format!("{path} says {text:?}"))?))
}

/// Time, and whether it is a zombie. The name in brackets may hold anything, brackets too.
fn parse_stat(stat: &str) -> Option<(Duration, bool)> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some((Duration::from_millis(ticks * 1000 / TICKS), matches!(fields[0], "Z" | "X")))
}

/// The number after a field's name.
fn kib(text: &str, field: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(field))?;
    rest.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lines_are_understood() {
        let line = "7 (a) b) Z 1 1 1 0 -1 4194304 100 0 0 0 1234 66 0 0 20 0 1 0 100 0 0";
        assert_eq!(parse_stat(line), Some((Duration::from_secs(13), true)));
        assert_eq!(parse_stat("7 (a) R 1"), None);
        assert_eq!(kib("VmPeak:\t 9 kB\nVmHWM:\t   1472 kB\n", "VmHWM:"), Some(1472));
    }

    #[test]
    fn this_process_has_some_of_each() {
        let mut usage = Usage::default();
        usage.look(std::process::id(), true).unwrap();
        assert!(usage.peak_rss > 100_000 && usage.peak_pss > 10_000 && !usage.ended, "{usage:?}");
        assert!(usage.peak_rss >= usage.peak_pss, "{usage:?}");
        assert!(usage.anonymous > 10_000 && usage.anonymous < usage.rss, "{usage:?}");
        assert!(thread_cpu().unwrap() > Duration::ZERO);
    }
}
