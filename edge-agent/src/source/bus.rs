//! The task of one bus: tick, blocking poll with a timeout, send.

use std::time::Duration;

use common::{
    reading::{DeviceIx, Reading},
    time::Timestamp,
};
use tokio::task::{self, JoinHandle};

use super::{Context, Hardware, MAX_ABANDONED, Polled, Start, no_value, schedule::Schedule};
use crate::census::{Census, Outcome};

/// A bus that is read by blocking calls.
pub trait Bus: Send + 'static {
    /// What is read on it: period and devices, by probe.
    fn probes(&self) -> Vec<(Duration, Vec<DeviceIx>)>;

    /// Reads the probes that are due; every device of theirs gets one reading. Blocks.
    fn poll(&mut self, at: Timestamp, due: &[usize]) -> Poll;
}

/// What a poll brought.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Poll {
    /// One for every device that was due.
    pub readings: Vec<Reading>,
    /// Why probes gave no value, as [`super::chip::ChipError::reason`] has it, or `open`.
    pub faults: Vec<&'static str>,
}

/// Polls the bus that `make` describes until the stop signal, or until nobody listens.
pub(super) async fn run<H: Hardware, B: Bus>(
    make: impl Fn() -> B,
    timeout: Duration,
    mut context: Context<H>,
) {
    let mut pacer = context.clock.pacer();
    let mut bus = Some(make());
    let probes = make().probes();
    let start = Start::of(context.clock.began(), context.resume_after);
    let mut schedule = Schedule::new(probes.iter().map(|(period, _)| *period), start);
    // What was due while nobody could read it.
    let mut census = skipped(&mut schedule, context.clock.now(), &probes);
    let mut abandoned: Vec<JoinHandle<(B, Poll)>> = Vec::new();
    while let Some(tick) = schedule.next() {
        tokio::select! {
            () = pacer.sleep_until(tick) => {}
            // A dropped sender means that the program is going down.
            _ = context.stop.wait_for(|stop| *stop) => return,
        }
        let due = schedule.take_due(tick);
        let unread = || due.iter().flat_map(|probe| &probes[*probe].1).map(|device| no_value(tick, *device));
        abandoned.retain(|call| !call.is_finished());
        if bus.is_none() && abandoned.len() < MAX_ABANDONED {
            bus = Some(make());
        }
        let poll = match bus.take() {
            None => Poll { readings: unread().collect(), faults: vec!["hung"] },
            Some(mut open) => {
                let now_due = due.clone();
                let mut call = task::spawn_blocking(move || {
                    let poll = open.poll(tick, &now_due);
                    (open, poll)
                });
                match tokio::time::timeout(timeout, &mut call).await {
                    Ok(Ok((open, poll))) => {
                        bus = Some(open);
                        poll
                    }
                    // The driver panicked; the bus went with it.
                    Ok(Err(_)) => Poll { readings: unread().collect(), faults: vec!["panic"] },
                    Err(_) => {
                        abandoned.push(call);
                        Poll { readings: unread().collect(), faults: vec!["timeout"] }
                    }
                }
            }
        };
        for fault in poll.faults {
            context.metrics.source_fault(fault);
        }
        census.merge(&skipped(&mut schedule, context.clock.now(), &probes));
        let polled = Polled::new(tick, poll.readings, std::mem::take(&mut census));
        if context.out.send(polled).await.is_err() {
            return;
        }
    }
}

/// What was due and is no longer waited for.
fn skipped(schedule: &mut Schedule, now: Timestamp, probes: &[(Duration, Vec<DeviceIx>)]) -> Census {
    let mut census = Census::default();
    for (probe, tick, ticks) in schedule.skip_missed(now) {
        let readings = ticks * probes[probe].1.len() as u64;
        census.add(tick, Outcome::Polled, readings);
        census.add(tick, Outcome::Skipped, readings);
    }
    census
}

/// Opens a bus where it is not open; a failure is logged once until it opens again.
pub(super) fn open<'a, T>(
    bus: &'a mut Option<T>,
    failing: &mut bool,
    path: &str,
    open: impl FnOnce() -> anyhow::Result<T>,
) -> Option<&'a mut T> {
    if bus.is_none() {
        match open() {
            Ok(opened) => {
                *bus = Some(opened);
                if std::mem::take(failing) {
                    tracing::info!(path, "bus is open again");
                }
            }
            Err(error) if !*failing => {
                *failing = true;
                tracing::warn!(
                    path,
                    error = format!("{error:#}"),
                    "bus cannot be opened; trying at every tick"
                );
            }
            Err(_) => {}
        }
    }
    bus.as_mut()
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use common::time::{Clock, SystemClock};
    use tokio::sync::{mpsc, watch};

    use super::*;
    use crate::{metrics::Metrics, source::LinuxHardware};

    /// Answers with the number of the poll; the first one hangs for a while.
    struct Slow {
        polls: Arc<AtomicUsize>,
    }

    impl Bus for Slow {
        fn probes(&self) -> Vec<(Duration, Vec<DeviceIx>)> {
            vec![(Duration::from_millis(20), vec![DeviceIx(0), DeviceIx(1)])]
        }

        fn poll(&mut self, at: Timestamp, due: &[usize]) -> Poll {
            assert_eq!(due, [0]);
            if self.polls.fetch_add(1, Ordering::SeqCst) == 0 {
                std::thread::sleep(Duration::from_millis(300));
            }
            let good = |device| Reading { value: 1.0, quality: Default::default(), ..no_value(at, device) };
            Poll { readings: [DeviceIx(0), DeviceIx(1)].map(good).to_vec(), faults: Vec::new() }
        }
    }

    #[tokio::test]
    async fn a_poll_that_hangs_is_given_up_and_what_was_missed_is_counted() {
        let (out, mut polled) = mpsc::channel(1);
        let (stop, stopped) = watch::channel(false);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let context = Context {
            hardware: Arc::new(LinuxHardware),
            clock,
            resume_after: None,
            out,
            stop: stopped,
            metrics: Arc::new(Metrics::default()),
        };
        let polls = Arc::new(AtomicUsize::new(0));
        let make = move || Slow { polls: Arc::clone(&polls) };
        let task = tokio::spawn(run(make, Duration::from_millis(100), context));
        let first = polled.recv().await.unwrap();
        assert!(first.readings.iter().all(|r| r.value.is_nan()));
        // It took five periods, so ticks were missed.
        assert!(first.census.total(Outcome::Skipped) >= 4, "{:?}", first.census);
        let second = polled.recv().await.unwrap();
        assert!(second.at > first.at);
        assert!(second.readings.iter().all(|r| r.value == 1.0));
        for batch in [&first, &second] {
            let accounted = batch.readings.len() as u64 + batch.census.total(Outcome::Skipped);
            assert_eq!(batch.census.total(Outcome::Polled), accounted);
        }
        stop.send_replace(true);
        // One more batch may be on its way.
        while polled.recv().await.is_some() {}
        task.await.unwrap();
    }
}
