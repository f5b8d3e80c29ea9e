//! Where readings come from: one task a bus, one file a chip.
//!
//! A bus task sleeps until its next tick, reads what is due on a blocking thread, and sends one [`Polled`], also
//! when nothing could be read: time travels with the data, so no later stage needs a timer. The event time of a
//! reading is its tick. A bus goes on right after what earlier runs have sealed; where that lies more than a minute
//! ahead, a clock was set back, and it polls at once, at displaced ticks ([`Start`]). Whatever was due makes a reading: a chip that does not answer makes one of quality bad,
//! without a value.
//!
//! A broker in the plant ([`mqtt`]) is no bus: its devices speak when they want to, and nothing of theirs is ever due.
//!
//! A poll that takes too long leaves its thread behind with the bus; the bus is opened again at the next tick, and
//! no other bus notices. At most [`MAX_ABANDONED`] threads are left behind at a time.

mod bus;
pub mod chip;
pub mod i2c;
pub mod json;
mod linux;
pub mod modbus;
pub mod mqtt;
pub mod replay;
pub(crate) mod schedule;
pub mod spi;

use std::{sync::Arc, time::Duration};

use common::{
    reading::{DeviceIx, Quality, Reading},
    time::{Clock, Timestamp},
};
use tokio::sync::{mpsc, watch};

pub use self::{bus::Bus, linux::LinuxHardware};
use crate::{
    census::{Census, Outcome},
    metrics::Metrics,
    settings::{Settings, Source},
};

/// Most threads that a bus leaves behind in calls that do not return; then it is not opened again until one does.
pub const MAX_ABANDONED: usize = 3;

/// What opens the buses of a gateway: Linux in the field, simulated chips in the demo.
pub trait Hardware: Send + Sync + 'static {
    /// An I2C bus.
    type I2c: embedded_hal::i2c::I2c + Send + 'static;
    /// A device on an SPI bus, with its chip select.
    type Spi: embedded_hal::spi::SpiDevice + Send + 'static;
    /// How drivers wait for their chips.
    type Delay: embedded_hal::delay::DelayNs + Send + Clone + 'static;

    /// Opens the I2C bus at `path`.
    ///
    /// # Errors
    /// When there is no such bus, or it may not be opened.
    fn i2c(&self, path: &str) -> anyhow::Result<Self::I2c>;

    /// Opens the SPI device at `path`.
    ///
    /// # Errors
    /// When there is no such device, or it may not be opened.
    fn spi(&self, path: &str) -> anyhow::Result<Self::Spi>;

    /// A delay for the drivers of one bus.
    fn delay(&self) -> Self::Delay;
}

/// What one tick of one source brought.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Polled {
    /// The tick.
    pub at: Timestamp,
    /// In the order of reading.
    pub readings: Vec<Reading>,
    /// What was due since the tick before: polled, and skipped or rejected.
    pub census: Census,
}

impl Polled {
    /// A batch in which every reading has been polled.
    pub fn new(at: Timestamp, readings: Vec<Reading>, mut census: Census) -> Self {
        census.count(Outcome::Polled, readings.iter().map(|reading| reading.ts));
        Self { at, readings, census }
    }
}

/// A reading that says that there is no value.
pub fn no_value(ts: Timestamp, device: DeviceIx) -> Reading {
    Reading { ts, device, quality: Quality::Bad, value: f64::NAN }
}

/// From when on a bus is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// The first tick comes after this.
    pub at: Timestamp,
    /// What is added to every tick, below a millisecond: not zero where earlier runs have sealed readings of the
    /// time to come, so that no two of them have one key (site, device, ts).
    pub displaced: Duration,
}

impl Start {
    /// Waits for at most this long until the time is there that earlier runs have come to.
    const WAITS: Duration = Duration::from_secs(60);

    /// The start of a run that begins at `began`, after others that have sealed readings up to `sealed`.
    pub(crate) fn of(began: Timestamp, sealed: Option<Timestamp>) -> Self {
        let ahead = match sealed {
            // Provisional times do not compare with true ones.
            Some(sealed) if !began.is_provisional() => sealed.since(began),
            _ => Duration::ZERO,
        };
        if ahead <= Self::WAITS {
            return Self { at: began + ahead, displaced: Duration::ZERO };
        }
        // Another one for every run, since the start of a run is not on a beat.
        let micros = 1 + began.as_micros().rem_euclid(999).unsigned_abs();
        Self { at: began, displaced: Duration::from_micros(micros) }
    }
}

/// What every source task is given.
pub struct Context<H> {
    /// Opens buses.
    pub hardware: Arc<H>,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// Highest event time sealed by earlier runs: nothing up to it is read again.
    pub resume_after: Option<Timestamp>,
    /// Where batches go.
    pub out: mpsc::Sender<Polled>,
    /// Turns true when sources shall end.
    pub stop: watch::Receiver<bool>,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

impl<H> Clone for Context<H> {
    fn clone(&self) -> Self {
        Self {
            hardware: Arc::clone(&self.hardware),
            clock: Arc::clone(&self.clock),
            resume_after: self.resume_after,
            out: self.out.clone(),
            stop: self.stop.clone(),
            metrics: Arc::clone(&self.metrics),
        }
    }
}

/// Runs one source until it is told to stop, its file ends, or nobody listens any more. A bus or a file takes one
/// pacer of the clock.
///
/// # Errors
/// When a recorded file cannot be read; a bus that fails is tried again for ever.
pub async fn run<H: Hardware>(
    source: Source,
    settings: Arc<Settings>,
    context: Context<H>,
) -> anyhow::Result<()> {
    let timeout = settings.source_timeout;
    match source {
        Source::I2c { path, probes } => {
            let hardware = Arc::clone(&context.hardware);
            let make = move || i2c::I2cBus::new(Arc::clone(&hardware), path.clone(), probes.clone());
            bus::run(make, timeout, context).await;
        }
        Source::Spi { path, period, burst, outputs } => {
            let hardware = Arc::clone(&context.hardware);
            let timeout = timeout + spi::duration(&burst);
            let make = move || {
                spi::Accelerometer::new(Arc::clone(&hardware), path.clone(), period, burst, outputs.clone())
            };
            bus::run(make, timeout, context).await;
        }
        Source::Modbus(bus) => {
            let timeout = timeout + bus.longest_poll();
            bus::run(move || modbus::ModbusBus::new(bus.clone()), timeout, context).await;
        }
        Source::Mqtt { broker, client_id, topics, .. } => {
            mqtt::run(broker, client_id, topics, context).await;
        }
        Source::Replay { file, form } => {
            replay::run(&file, &form, Arc::clone(&settings.registry), context).await?;
        }
    }
    Ok(())
}

/// Reads everything on a bus once, now; for `edge-agent sensors`. Blocks, in the context of a runtime.
pub fn read_once<H: Hardware>(source: &Source, hardware: &Arc<H>, at: Timestamp) -> Vec<Reading> {
    let hardware = Arc::clone(hardware);
    let poll = |mut bus: Box<dyn Bus>| {
        let all: Vec<usize> = (0..bus.probes().len()).collect();
        bus.poll(at, &all).readings
    };
    match source.clone() {
        Source::I2c { path, probes } => poll(Box::new(i2c::I2cBus::new(hardware, path, probes))),
        Source::Spi { path, period, burst, outputs } => {
            poll(Box::new(spi::Accelerometer::new(hardware, path, period, burst, outputs)))
        }
        Source::Modbus(bus) => poll(Box::new(modbus::ModbusBus::new(bus))),
        // Neither can be asked for a value.
        Source::Mqtt { .. } | Source::Replay { .. } => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_goes_on_where_the_last_one_came_to() {
        let at = |second: i64| Timestamp::from_micros(1_795_249_000_000_000 + second * 1_000_000);
        let day = 86_400;
        let in_1970 = Timestamp::from_micros(40_000_000);
        for (began, sealed, start) in [
            (at(0), None, at(0)),
            (at(0), Some(at(-day)), at(0)),
            (at(0), Some(at(59)), at(59)),
            (at(0), Some(at(day)), at(0)),
            (in_1970, Some(at(0)), in_1970),
        ] {
            let displaced = sealed == Some(at(day));
            let got = Start::of(began, sealed);
            assert_eq!((got.at, !got.displaced.is_zero()), (start, displaced), "{began} {sealed:?}");
            assert!(got.displaced < Duration::from_millis(1));
        }
    }
}
