//! The time that simulated chips live in.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, ThreadId},
    time::Duration,
};

use common::time::Timestamp;
use embedded_hal::delay::DelayNs;

/// How fine the plant is sampled. A poll that is a little late for its tick still sees the tick's instant, so values
/// do not depend on the load of the machine.
const SAMPLE_GRID: Duration = Duration::from_millis(100);

/// A clock, and ahead of it what drivers have waited since it last moved.
///
/// The wait is kept by thread: a driver's poll begins and ends on one thread, so two buses that are polled at once do
/// not push each other's chips forward.
#[derive(Clone)]
pub struct SimTime {
    shared: Arc<Shared>,
}

struct Shared {
    clock: Box<dyn Fn() -> Timestamp + Send + Sync>,
    /// Nanoseconds since the epoch that a thread has waited to; entries that the clock has passed are dropped.
    waited_to: Mutex<HashMap<ThreadId, i64>>,
}

impl SimTime {
    /// Time that follows `clock`.
    pub fn new(clock: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self { shared: Arc::new(Shared { clock: Box::new(clock), waited_to: Mutex::default() }) }
    }

    /// The instant that the plant is sampled at: the clock's, on a grid of 100 ms, whatever drivers wait.
    pub fn instant(&self) -> Timestamp {
        (self.shared.clock)().floor(SAMPLE_GRID)
    }

    /// What a delay of this time is made of.
    pub fn delay(&self) -> SimDelay {
        SimDelay { time: self.clone() }
    }

    /// The chips' own time: nanoseconds since the epoch, waits of this thread's drivers included.
    pub(crate) fn nanos(&self) -> i64 {
        let clock = self.clock_nanos();
        let waited_to = self.shared.waited_to.lock().unwrap_or_else(PoisonError::into_inner);
        waited_to.get(&thread::current().id()).map_or(clock, |waited| clock.max(*waited))
    }

    fn wait(&self, ns: u32) {
        let until = self.nanos() + i64::from(ns);
        let clock = self.clock_nanos();
        let mut waited_to = self.shared.waited_to.lock().unwrap_or_else(PoisonError::into_inner);
        waited_to.retain(|_, waited| *waited > clock);
        waited_to.insert(thread::current().id(), until);
    }

    fn clock_nanos(&self) -> i64 {
        (self.shared.clock)().as_micros().saturating_mul(1_000)
    }
}

/// A driver's delay: moves [`SimTime`] and returns at once.
#[derive(Clone)]
pub struct SimDelay {
    time: SimTime,
}

impl DelayNs for SimDelay {
    fn delay_ns(&mut self, ns: u32) {
        self.time.wait(ns);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;

    #[test]
    fn waits_run_ahead_of_the_clock_until_it_catches_up() {
        let clock = Arc::new(AtomicI64::new(5_000_123));
        let time = SimTime::new({
            let clock = Arc::clone(&clock);
            move || Timestamp::from_micros(clock.load(Ordering::Relaxed))
        });
        assert_eq!(time.nanos(), 5_000_123_000);
        time.delay().delay_us(500);
        time.delay().delay_ns(1);
        assert_eq!(time.nanos(), 5_000_623_001);
        assert_eq!(time.instant(), Timestamp::from_micros(5_000_000), "the plant is sampled at the tick");
        let other = thread::spawn({
            let time = time.clone();
            move || time.nanos()
        });
        assert_eq!(other.join().unwrap(), 5_000_123_000, "another bus is not pushed forward");
        clock.store(6_000_000, Ordering::Relaxed);
        assert_eq!(time.nanos(), 6_000_000_000);
    }
}
