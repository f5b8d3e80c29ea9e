//! The demo's clock: the past as fast as the machine allows, then the present.
//!
//! A discrete-event clock. It starts in the past; its participants are the [`Pacer`]s it hands out. When every live
//! participant sleeps, time jumps to the earliest instant any of them wants, as long as that instant lies before the
//! machine's clock; so nobody ever sees an instant before the others have done their work of the instants before it.
//! From the first wanted instant that lies in the future, the clock has caught up for good: it shows the machine's
//! time and sleeps really.
//!
//! Invariants: time never goes back; it stands still until the expected number of participants has joined; a
//! participant that is dropped, or drops its sleep, is not waited for.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use common::time::{Clock, Pacer, Sleep, SystemClock, Timestamp};
use tokio::sync::Notify;

/// A clock that begins in the past and catches up with the machine's.
#[derive(Clone)]
pub struct SimClock {
    shared: Arc<Shared>,
}

struct Shared {
    real: SystemClock,
    state: Mutex<State>,
    moved: Notify,
}

struct State {
    now: Timestamp,
    caught_up: bool,
    /// Participants that were promised and have not joined yet.
    awaited: usize,
    live: usize,
    next_id: u64,
    /// The sleeping participants and what they wait for.
    wanted: BTreeMap<u64, Timestamp>,
}

impl SimClock {
    /// A clock that shows `start` until `participants` pacers were handed out.
    pub fn new(start: Timestamp, participants: usize) -> Self {
        let state = State {
            now: start,
            caught_up: false,
            awaited: participants,
            live: 0,
            next_id: 0,
            wanted: BTreeMap::new(),
        };
        Self {
            shared: Arc::new(Shared { real: SystemClock, state: Mutex::new(state), moved: Notify::new() }),
        }
    }

    /// Whether this clock shows the machine's time.
    pub fn caught_up(&self) -> bool {
        self.shared.lock().caught_up
    }
}

impl Clock for SimClock {
    fn now(&self) -> Timestamp {
        self.shared.lock().present(self.shared.real.now())
    }

    fn pacer(&self) -> Box<dyn Pacer> {
        let mut state = self.shared.lock();
        state.awaited = state.awaited.saturating_sub(1);
        state.live += 1;
        state.next_id += 1;
        Box::new(Participant { id: state.next_id, shared: Arc::clone(&self.shared) })
    }
}

struct Participant {
    id: u64,
    shared: Arc<Shared>,
}

impl Pacer for Participant {
    fn sleep_until(&mut self, until: Timestamp) -> Sleep<'_> {
        Box::pin(async move {
            // Entered when polled, and left again when this future is dropped half-way.
            let _entry = Entry::new(self, until);
            loop {
                let mut moved = pin!(self.shared.moved.notified());
                moved.as_mut().enable();
                match self.shared.step(self.id) {
                    Step::Due => return,
                    Step::Wait => moved.await,
                    Step::Sleep(until) => {
                        let nap = tokio::time::sleep(until.since(self.shared.real.now()));
                        tokio::select! { () = nap => {}, () = moved => {} }
                    }
                }
            }
        })
    }
}

impl Drop for Participant {
    fn drop(&mut self) {
        self.shared.lock().live -= 1;
        // The others may have waited for this one alone.
        self.shared.moved.notify_waiters();
    }
}

struct Entry<'a>(&'a Participant);

impl<'a> Entry<'a> {
    fn new(participant: &'a Participant, until: Timestamp) -> Self {
        participant.shared.lock().wanted.insert(participant.id, until);
        Self(participant)
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.0.shared.lock().wanted.remove(&self.0.id);
    }
}

enum Step {
    /// The clock shows what this participant wanted.
    Due,
    /// Others still work.
    Wait,
    /// All sleep, and this is the earliest instant that any wants.
    Sleep(Timestamp),
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn step(&self, id: u64) -> Step {
        let (step, moved) = self.lock().step(id, self.real.now());
        if moved {
            self.moved.notify_waiters();
        }
        step
    }
}

impl State {
    /// The present, given the machine's time.
    fn present(&mut self, real: Timestamp) -> Timestamp {
        if self.caught_up {
            self.now = self.now.max(real);
        }
        self.now
    }

    /// Moves the clock if all sleep, and says what participant `id` does next, and whether others became due.
    fn step(&mut self, id: u64, real: Timestamp) -> (Step, bool) {
        let mut moved = false;
        let all_sleep = self.awaited == 0 && self.wanted.len() == self.live;
        let earliest = self.wanted.values().min().copied().filter(|_| all_sleep);
        if let Some(earliest) = earliest {
            self.caught_up |= earliest > real;
            if self.caught_up {
                self.present(real);
            } else {
                self.now = self.now.max(earliest);
            }
            let sleeping = self.wanted.len();
            self.wanted.retain(|_, until| *until > self.now);
            moved = self.wanted.len() < sleeping;
        }
        let step = match (self.wanted.contains_key(&id), earliest) {
            (false, _) => Step::Due,
            (true, Some(earliest)) if !moved => Step::Sleep(earliest),
            (true, _) => Step::Wait,
        };
        (step, moved)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn start() -> Timestamp {
        SystemClock.now() - HOUR
    }

    /// Sleeps `n` periods and notes the time of each waking, its own and the common order.
    fn ticker(
        clock: &SimClock,
        name: &'static str,
        period: Duration,
        n: u32,
        log: &Arc<Mutex<Vec<(Timestamp, &'static str)>>>,
    ) -> tokio::task::JoinHandle<()> {
        let (clock, log, mut pacer) = (clock.clone(), Arc::clone(log), clock.pacer());
        let start = clock.now();
        tokio::spawn(async move {
            for tick in 1..=n {
                pacer.sleep_until(start + period * tick).await;
                log.lock().unwrap().push((clock.now(), name));
                tokio::task::yield_now().await;
            }
        })
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn two_periods_interleave_in_order_and_at_once() {
        let start = start();
        let clock = SimClock::new(start, 2);
        let log = Arc::default();
        let tasks = [
            ticker(&clock, "5 s", Duration::from_secs(5), 600, &log),
            ticker(&clock, "7 s", Duration::from_secs(7), 300, &log),
        ];
        let began = tokio::time::Instant::now();
        for task in tasks {
            task.await.unwrap();
        }
        assert!(began.elapsed() < Duration::from_secs(20), "an hour of history ran in real time");

        let mut wanted: Vec<_> = (1..=600u32).map(|n| (start + Duration::from_secs(5) * n, "5 s")).collect();
        wanted.extend((1..=300u32).map(|n| (start + Duration::from_secs(7) * n, "7 s")));
        wanted.sort_unstable();
        let mut log = log.lock().unwrap().clone();
        assert!(log.is_sorted_by_key(|(at, _)| *at), "time went back");
        log.sort_unstable();
        assert_eq!(log, wanted);
        assert!(!clock.caught_up());
    }

    #[tokio::test]
    async fn a_dropped_pacer_is_not_waited_for() {
        let clock = SimClock::new(start(), 2);
        let (idle, log) = (clock.pacer(), Arc::default());
        let running = ticker(&clock, "runs", Duration::from_secs(1), 3, &log);
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert!(log.lock().unwrap().is_empty(), "ran ahead of a participant that works");
        drop(idle);
        running.await.unwrap();
        assert_eq!(log.lock().unwrap().len(), 3);
    }

    #[tokio::test]
    async fn a_dropped_sleep_counts_as_work() {
        let start = start();
        let clock = SimClock::new(start, 2);
        let (mut first, mut second) = (clock.pacer(), clock.pacer());
        let cut = tokio::time::timeout(Duration::from_millis(10), first.sleep_until(start + HOUR / 2)).await;
        assert!(cut.is_err());
        let alone =
            tokio::time::timeout(Duration::from_millis(10), second.sleep_until(start + HOUR / 4)).await;
        assert!(alone.is_err(), "the first works, so time stands still");
        assert_eq!(clock.now(), start);
    }

    #[tokio::test]
    async fn time_stands_still_until_all_have_joined() {
        let start = start();
        let clock = SimClock::new(start, 2);
        let mut first = clock.pacer();
        let early =
            tokio::time::timeout(Duration::from_millis(30), first.sleep_until(start + HOUR / 2)).await;
        assert!(early.is_err());
        assert_eq!(clock.now(), start);
        let mut second = clock.pacer();
        tokio::join!(first.sleep_until(start + HOUR / 2), async {
            second.sleep_until(start + HOUR / 4).await;
            drop(second);
        });
        assert_eq!(clock.now(), start + HOUR / 2);
    }

    #[tokio::test]
    async fn catches_up_and_then_sleeps_really() {
        let clock = SimClock::new(start(), 1);
        let mut pacer = clock.pacer();
        let mut last = clock.now();
        let soon = SystemClock.now() + Duration::from_millis(60);
        for until in [last + HOUR / 2, last + HOUR / 4, soon, soon + Duration::from_millis(20)] {
            pacer.sleep_until(until).await;
            let now = clock.now();
            assert!(now >= until && now >= last, "{now} after {last}, wanted {until}");
            last = now;
        }
        assert!(clock.caught_up());
        assert!(SystemClock.now() >= soon, "slept too short");
    }
}
