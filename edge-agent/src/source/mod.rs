//! Where readings come from: one task a bus, one file a chip.
//!
//! A bus task sleeps until its next tick, reads what is due on a blocking thread, and sends one [`Polled`], also
//! when nothing could be read: time travels with the data, so no later stage needs a timer. The event time of a
//! reading is its tick. Whatever was due makes a reading: a chip that does not answer makes one of quality bad,
//! without a value.
//!
//! A poll that takes too long leaves its thread behind with the bus; the bus is opened again at the next tick, and
//! no other bus notices. At most [`MAX_ABANDONED`] threads are left behind at a time.

mod bus;
pub mod chip;
pub mod i2c;
mod linux;
pub mod replay;
mod schedule;
pub mod spi;

use std::sync::Arc;

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
        for reading in &readings {
            census.add(reading.ts, Outcome::Polled, 1);
        }
        Self { at, readings, census }
    }
}

/// A reading that says that there is no value.
pub fn no_value(ts: Timestamp, device: DeviceIx) -> Reading {
    Reading { ts, device, quality: Quality::Bad, value: f64::NAN }
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

/// Runs one source until it is told to stop, its file ends, or nobody listens any more. A source takes one pacer
/// of the clock.
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
        Source::Replay { file, form } => {
            replay::run(&file, &form, Arc::clone(&settings.registry), context).await?;
        }
    }
    Ok(())
}

/// Reads everything on a bus once, now; for `edge-agent sensors`. Blocks.
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
        Source::Replay { .. } => Vec::new(),
    }
}
