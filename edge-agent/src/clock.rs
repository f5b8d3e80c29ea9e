//! The gateway's own time: it counts from the machine's start, and does not follow every whim of the wall clock.
//!
//! # What can happen to a wall clock
//!
//! A gateway without a battery-backed clock begins in 1970, at the date of its image, or where `fake-hwclock` saw it
//! last; some minutes later NTP sets it. People set clocks by hand, rightly and wrongly; a receiver's week rolls over.
//! None of it may lose a reading, reorder any, close a window wrongly, stop the polls, or give two readings one key.
//!
//! # The timeline
//!
//! The agent's time is the time since the machine's start ([`machine::up`]) plus an offset. On one timeline time never
//! goes back and never jumps, so no stage behind it knows of clocks: schedule, windows, filter, seal and outbox just
//! see time go on. Once a second the wall clock is looked at:
//!
//! | the wall clock differs by | then |
//! |---|---|
//! | up to 10 s | it is followed without a jump: time runs a hundredth faster or slower until it agrees |
//! | more, while the kernel calls it synchronised | it is followed once it has stayed there for 60 s |
//! | more, while the kernel does not | … for 10 min: every step by hand takes the kernel's word away, and NTP gives it back |
//! | anything that cannot be right (below) | it is not followed |
//!
//! So a step that is taken back in time has no effect at all. Suspend moves both clocks alike and is no step; what was
//! due meanwhile is counted as skipped.
//!
//! # Beginning anew
//!
//! To follow a step is to end the timeline ([`Clock::ended`]): the pipeline stops as at any clean stop (windows are
//! emitted as `partial`, episodes end with `stop`, everything is sealed, the epoch is closed) and [`run`] starts it
//! again in the same process, on a new timeline and in a new epoch, well within two seconds. What was due meanwhile is
//! counted as skipped ([`Clock::began`]). So **event times of one epoch ascend**, and a step is nothing but a restart.
//! After a step back the new epoch lives through times that were sealed before: its ticks are displaced by a fraction
//! of a millisecond, so that no key (site, device, ts) comes twice ([`crate::source`]).
//!
//! # Whether the clock was set
//!
//! It cannot be right before this software was written (2025). Otherwise it counts as set if the kernel calls it
//! synchronised; or `clock.trust` says so; or the machine keeps time without power ([`machine::keeps_time`]) and it is
//! not more than a week behind what the outbox holds (an RTC that lost its battery); or it was set earlier since this
//! start of the machine, whatever the kernel says now. At the start of the agent it is taken as it is: there is
//! nothing to compare it with.
//!
//! While it is not set, the offset is 0: **provisional** time, which counts from the machine's start and lies in 1970
//! ([`common::time::EARLIEST`]). Sealed messages carry it with the boot id, and wait in the outbox. Then
//!
//! * the clock is set: the offset is written to `clock.json` ([`crate::outbox::boots`]) and synced, the timeline ends,
//!   and the messages of all epochs of this boot leave with true times, as `clock=synced`, with the same bytes every
//!   time. Their windows stay aligned to the machine's start;
//! * or `clock.wait` (24 h) has passed since the machine's start: they, and those that follow, leave as they are, as
//!   `clock=unsynced`; that too is written down, for ever. The cloud keeps them in quarantine;
//! * or the machine starts again first: their time cannot be known any more, and they leave as `clock=unsynced`.
//!
//! A recorded file ([`crate::source::replay`]) has times of its own and waits until the clock is set.

mod timeline;

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use common::time::{
    Clock, Pacer, Sleep, Timestamp,
    machine::{self, Shown},
};
use tokio::sync::watch;
use uuid::Uuid;

use self::timeline::{End, Known, Timeline};
use crate::{
    outbox::{Outbox, boots::Boots},
    pipeline,
    settings::{ClockSettings, Settings},
    source::Hardware,
};

/// How often the wall clock is looked at.
const OBSERVE_EVERY: Duration = Duration::from_secs(1);

/// The machine as far as its clocks go.
#[derive(Clone)]
pub struct Machine {
    /// The id of its present start.
    pub boot: Uuid,
    /// Its clock goes on without power.
    pub keeps_time: bool,
    /// Longest sleep before its clocks are asked again: they may not run as the runtime's timers do.
    pub nap: Duration,
    /// Reads its clocks.
    pub show: Arc<dyn Fn() -> Shown + Send + Sync>,
}

impl Machine {
    /// This machine.
    pub fn this() -> Self {
        let (keeps_time, nap) = (machine::keeps_time(), Duration::from_secs(10));
        let boot = machine::boot_id().unwrap_or_else(|error| {
            tracing::warn!(
                %error,
                "the boot id cannot be read; what is sealed before the clock was set loses its time with a restart of \
                 the agent. Let it read /proc/sys (systemd: no ProcSubset)"
            );
            Uuid::now_v7()
        });
        if let Err(error) = machine::synced() {
            tracing::warn!(
                %error, keeps_time,
                "the kernel does not say whether the clock is synchronised; allow adjtimex (systemd: no ProtectClock) \
                 or write clock.trust = true"
            );
        }
        Self { boot, keeps_time, nap, show: Arc::new(machine::show) }
    }
}

/// Runs the agent by this machine's clock until `stop` turns true, or until it ends by itself.
///
/// # Errors
/// As [`pipeline::run`], and when `clock.json` cannot be read or written.
pub async fn run<H: Hardware + Clone>(
    settings: Settings,
    hardware: H,
    machine: Machine,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut ended = None;
    loop {
        let clock = GatewayClock::open(&settings.outbox.dir, settings.clock, machine.clone(), ended)?;
        let clock = Arc::new(clock);
        pipeline::run(settings.clone(), hardware.clone(), clock.clone(), stop.clone()).await?;
        ended = clock.ended_at();
        if ended.is_none() || *stop.borrow() {
            return Ok(());
        }
    }
}

/// The clock of one timeline; a cheap handle.
#[derive(Clone)]
struct GatewayClock(Arc<Shared>);

struct Shared {
    machine: Machine,
    /// Where it goes on for a timeline that has ended.
    began: Option<Timestamp>,
    state: Mutex<State>,
}

struct State {
    timeline: Timeline,
    /// When the timeline ended, in time since the machine's start: nothing later was taken on it.
    ended: Option<Timestamp>,
}

impl GatewayClock {
    /// Begins a timeline, and writes to `clock.json` in `dir` what is known of the machine's start. It goes on for
    /// one that ended at `ended`.
    fn open(
        dir: &Path,
        settings: ClockSettings,
        machine: Machine,
        ended: Option<Timestamp>,
    ) -> anyhow::Result<Self> {
        let named = || format!("{}/clock.json", dir.display());
        let shown = (machine.show)();
        let before = Boots::load(dir).with_context(named)?;
        let last = Outbox::last_noted(dir).or(before.last);
        let waited = shown.up.since(Timestamp::default()) >= settings.wait;
        let known = Known {
            trust: settings.trust,
            keeps_time: machine.keeps_time,
            last,
            offset: before.offset.filter(|_| before.present == machine.boot),
            wait_until: (!waited).then(|| Timestamp::default() + settings.wait),
        };
        let timeline = Timeline::begin(&shown, known);
        let mut boots = before.clone();
        boots.last = last;
        boots.run_in(machine.boot, timeline.offset());
        if timeline.offset().is_none() {
            tracing::warn!(
                wall = %shown.wall, up_s = shown.up.as_micros() / 1_000_000, gave_up = waited,
                "the machine's clock was not set; messages wait for it, or go as unsynced. If it is right, write \
                 clock.trust = true"
            );
            if waited {
                boots.give_up();
            }
        }
        if boots != before {
            boots.store(dir).with_context(named)?;
        }
        let began = ended.map(|up| timeline.at(up));
        Ok(Self(Arc::new(Shared { machine, began, state: Mutex::new(State { timeline, ended: None }) })))
    }

    /// When the timeline ended, in time since the machine's start.
    fn ended_at(&self) -> Option<Timestamp> {
        self.0.state().ended
    }

    fn observe(&self) -> bool {
        let shown = (self.0.machine.show)();
        let mut state = self.0.state();
        let Some(end) = state.timeline.observe(&shown) else { return false };
        state.ended = Some(shown.up);
        let why = match end {
            End::Set => "the machine's clock was set".to_owned(),
            End::GaveUp => {
                "the machine's clock was not set in time; what waited for it goes as unsynced".to_owned()
            }
            End::Stepped(by) => {
                format!("the machine's clock was moved by {} s and stayed there", by / 1_000_000)
            }
        };
        tracing::warn!(wall = %shown.wall, "{why}; the agent begins anew");
        true
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long to go until this instant.
    fn left(&self, until: Timestamp) -> Duration {
        let up = (self.machine.show)().up;
        let mut state = self.state();
        let left = until.since(state.timeline.at(up));
        if left.is_zero() {
            // A tick that is taken before its source heard of the end belongs to this timeline.
            state.ended = state.ended.map(|ended| ended.max(up));
        }
        left
    }
}

impl Clock for GatewayClock {
    fn now(&self) -> Timestamp {
        let up = (self.0.machine.show)().up;
        self.0.state().timeline.at(up)
    }

    fn pacer(&self) -> Box<dyn Pacer> {
        Box::new(self.clone())
    }

    fn began(&self) -> Timestamp {
        self.0.began.unwrap_or_else(|| self.now())
    }

    fn ended(&self) -> Sleep<'_> {
        Box::pin(async move {
            while !self.observe() {
                tokio::time::sleep(OBSERVE_EVERY.min(self.0.machine.nap)).await;
            }
        })
    }
}

impl Pacer for GatewayClock {
    fn sleep_until(&mut self, until: Timestamp) -> Sleep<'_> {
        Box::pin(async move {
            loop {
                let left = self.0.left(until);
                if left.is_zero() {
                    return;
                }
                tokio::time::sleep(left.min(self.0.machine.nap)).await;
            }
        })
    }
}

#[cfg(test)]
mod tests;
