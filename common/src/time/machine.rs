//! What this Linux machine's clocks show, and whether anybody has set them.
//!
//! | what | from where |
//! |---|---|
//! | time since the start | `CLOCK_BOOTTIME`: never set, suspend counts (clock_gettime(2)); a slewing NTP daemon moves it exactly as it moves the wall clock, so their difference changes by steps only |
//! | wall clock | `CLOCK_REALTIME` |
//! | synchronised | `STA_UNSYNC` of adjtimex(2): set at the start and by every step by hand (`ntp_clear` in the kernel's `timekeeping.c`), cleared by an NTP or PTP daemon, set again some nine hours after the daemon's last word; reading needs no privilege, also in containers |
//! | keeps time without power | on x86 the kernel begins with the CMOS or the hypervisor's clock (`read_persistent_clock64`); elsewhere with an RTC driver that says so in `/sys/class/rtc/*/hctosys` |
//! | boot id | `/proc/sys/kernel/random/boot_id`, another one at every start (random(4)) |

use std::{fs, io};

use uuid::Uuid;

use super::{Clock as _, SystemClock, Timestamp};

/// What the machine's clocks show at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Time since the machine's start, as a provisional instant.
    pub up: Timestamp,
    /// The wall clock, right or wrong.
    pub wall: Timestamp,
    /// Whether the kernel takes the wall clock for synchronised.
    pub synced: bool,
}

impl Shown {
    /// From the time since the start to the wall clock, in µs.
    pub const fn offset(&self) -> i64 {
        self.wall.as_micros().saturating_sub(self.up.as_micros())
    }
}

/// Reads the clocks. The wall clock is read between two readings of the other, which must lie close together.
pub fn show() -> Shown {
    let synced = synced().unwrap_or(false);
    let mut shown = Shown { up: Timestamp::default(), wall: Timestamp::default(), synced };
    // A preempted try is repeated; the last one counts, whatever it was.
    for _ in 0..4 {
        let (before, wall, after) = (up(), SystemClock.now(), up());
        let took = after.since(before);
        (shown.up, shown.wall) = (before + took / 2, wall);
        if took.as_micros() < 50 {
            break;
        }
    }
    shown
}

/// Time since the machine's start.
#[expect(
    unsafe_code,
    reason = "std has no CLOCK_BOOTTIME, and no dependency of ours wraps it as it is built"
)]
pub fn up() -> Timestamp {
    let mut at = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `at` is a timespec that lives through the call. The clock exists since Linux 2.6.39, so the call
    // cannot fail; if it did, zero would be a valid answer.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut at) };
    #[allow(clippy::useless_conversion, reason = "32-bit machines have shorter fields")]
    Timestamp::from_micros(i64::from(at.tv_sec) * 1_000_000 + i64::from(at.tv_nsec) / 1_000)
}

/// Whether the kernel takes the wall clock for synchronised.
///
/// # Errors
/// When a sandbox denies the question.
#[expect(unsafe_code, reason = "there is no safe wrapper of adjtimex")]
pub fn synced() -> io::Result<bool> {
    // SAFETY: timex is plain integers, for which all bits zero is a value. With `modes` 0 the call only fills in
    // the struct, which lives through it.
    let (state, status) = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        (libc::adjtimex(&raw mut timex), timex.status)
    };
    if state < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(status & libc::STA_UNSYNC == 0)
}

/// Whether the wall clock went on while the machine had no power, so that it need not be set at every start.
pub fn keeps_time() -> bool {
    if cfg!(any(target_arch = "x86", target_arch = "x86_64")) {
        return true;
    }
    let clocks = fs::read_dir("/sys/class/rtc").into_iter().flatten().flatten();
    clocks
        .filter_map(|clock| fs::read_to_string(clock.path().join("hctosys")).ok())
        .any(|hctosys| hctosys.trim() == "1")
}

/// The id of this start of the machine.
///
/// # Errors
/// When `/proc` is not mounted.
pub fn boot_id() -> io::Result<Uuid> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    text.trim().parse().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_shows_its_clocks() {
        let (first, wall, second) = (show(), SystemClock.now(), show());
        assert!(first.up <= second.up && first.up > Timestamp::default() && first.up.is_provisional());
        assert!(wall.since(first.wall).as_secs() < 5 && !wall.is_provisional());
        assert!((first.offset() - second.offset()).abs() < 50_000, "{first:?} {second:?}");
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
    }
}
