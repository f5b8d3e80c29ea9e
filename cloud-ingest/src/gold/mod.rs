//! Gold: every table is a pure function of silver.
//!
//! A [`step`] learns from silver's log which hours were touched ([`changes`]), computes those from silver's
//! snapshot ([`hourly`], [`minutes`]), and publishes only what differs from what stands there, with its progress
//! in the same commit ([`publish`]). So a rerun changes nothing, late data corrects exactly what it must, and a
//! crash at any point costs work only.
//!
//! | table | made of | progress: version of |
//! |---|---|---|
//! | `hourly_aggregates`, `timeseries_1m` | `silver/sensor_readings`, `silver/aggregates` | `silver/sensor_readings` |
//! | `daily_aggregates` | `hourly_aggregates`; what is less than an hour, as that | `silver/sensor_readings` |
//! | `asset_health` | `silver/anomalies`, gold's hours and minutes | `silver/sensor_readings` |
//! | `anomaly_events` | `silver/anomalies` | `silver/anomalies` |
//! | `assets`, `devices` | `silver/registry` | `silver/registry` |
//! | `maintenance_schedule` | `silver/registry`, `silver/maintenance`, gold's hours and minutes | – (the hour and what was said by then) |

pub mod anomalies;
pub mod calendar;
pub(crate) mod changes;
pub(crate) mod daily;
mod health;
pub mod hourly;
pub mod maintenance;
pub mod minutes;
mod parts;
pub(crate) mod publish;
pub mod registry;
mod scan;
pub mod series;
#[cfg(test)]
mod tests;
pub(crate) mod windows;

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use common::time::{Clock, Timestamp};
use tokio::sync::watch;

pub(crate) use self::publish::{NONE, SILVER};
pub use self::{calendar::Calendars, windows::WindowsDone};
use crate::tables::Tables;

/// A step is followed by a rest of so many times its length: however much comes into the open hours, which are read
/// again at each step, gold takes no more than a fifth of the time.
const REST: u32 = 4;
/// Of the last step, a second apart.
const LAST_TRIES: u32 = 5;

/// How gold is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GoldSettings {
    /// Least time between two steps: a touched hour is computed at most once in it.
    pub interval: Duration,
    /// A value holds until the device's next reading, but not longer than this; at most one hour.
    pub hold: Duration,
    /// The days and shifts of each site.
    pub calendars: Arc<Calendars>,
}

impl Default for GoldSettings {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(60),
            hold: Duration::from_secs(15 * 60),
            calendars: Arc::default(),
        }
    }
}

/// What a step changed, in rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepDone {
    /// Hours, minutes, days and health.
    pub windows: WindowsDone,
    /// Rows of `gold/anomaly_events`.
    pub anomaly_events: usize,
    /// Rows of `gold/assets` and `gold/devices`.
    pub registry: usize,
    /// Rows of `gold/maintenance_schedule`.
    pub maintenance: usize,
}

impl StepDone {
    /// Whether every table stood as it should.
    pub fn is_nothing(&self) -> bool {
        let StepDone { windows, anomaly_events, registry, maintenance } = self;
        let windows = windows.hourly + windows.minutes + windows.days + windows.health;
        windows + anomaly_events + registry + maintenance == 0
    }
}

/// Brings every gold table up to silver's newest version.
///
/// # Errors
/// When silver cannot be read or gold not be written. Nothing is half done: the next step goes on.
pub async fn step(tables: &Tables, settings: &GoldSettings, now: Timestamp) -> anyhow::Result<StepDone> {
    Ok(StepDone {
        windows: windows::step(tables, settings, now).await.context("hours and what is made of them")?,
        anomaly_events: anomalies::step(tables, now).await.context("anomaly events")?,
        registry: registry::step(tables, now).await.context("assets and devices")?,
        maintenance: maintenance::step(tables, now).await.context("maintenance schedule")?,
    })
}

/// Makes gold until silver ends: a step at once, for what an earlier run left; one after each change of `silver` (its
/// newest plan), at most one in `settings.interval` and after a rest; one all the same when nothing has come for as
/// long again, since others refine, too, and hours close; and a last one when the sender is gone. A step that fails is
/// taken again after the rest.
///
/// # Errors
/// When the last step fails, time and again.
pub async fn run(
    tables: Tables,
    settings: GoldSettings,
    clock: Arc<dyn Clock>,
    mut silver: watch::Receiver<u64>,
) -> anyhow::Result<()> {
    // To wait for the end by another one leaves what comes meanwhile unseen by `silver`.
    let mut ending = silver.clone();
    let (mut last_tries, mut new) = (0, true);
    loop {
        // What came until now, the step finds.
        silver.borrow_and_update();
        let open = silver.has_changed().is_ok();
        last_tries += u32::from(!open);
        let began = tokio::time::Instant::now();
        let done = step(&tables, &settings, clock.now()).await;
        let behind = done.is_err();
        // In a new lake the first reading need not wait for a rest after nothing.
        new = new && done.as_ref().is_ok_and(StepDone::is_nothing);
        match done {
            Ok(done) => tracing::debug!(?done, "gold is up to date"),
            Err(error) if last_tries < LAST_TRIES => {
                tracing::warn!(error = format!("{error:#}"), "gold stays behind; trying again");
            }
            Err(error) => return Err(error.context("last step of gold")),
        }
        if open {
            // Ends early when the sender is gone.
            let pause = settings.interval.max(began.elapsed() * REST);
            if !new {
                let _ = tokio::time::timeout(pause, ending.wait_for(|_| false)).await;
            }
            if !behind {
                let _ = tokio::time::timeout(settings.interval, silver.changed()).await;
            }
        } else if behind {
            tokio::time::sleep(Duration::from_secs(1)).await;
        } else {
            return Ok(());
        }
    }
}
