//! Modbus TCP and RTU: the slaves behind one connection or on one serial line.
//!
//! | part | what | |
//! |---|---|---|
//! | [`plan`] | registers to requests | pure |
//! | [`value`] | words to values | pure |
//! | `attendance` | who is away, and when to ask again | pure |
//! | `link` | one connection or line, a timeout on every call | shell |
//! | here | a poll of what is due | shell |
//!
//! Every request is a probe of the bus, with its own period. A slave that does not answer is away for its devices
//! alone; an exception is one request's; a connection that cannot be opened is everybody's. Whatever was due makes a
//! reading, without a value where there was no answer, or where the answer means that there is none.
//!
//! Modbus knows neither passwords nor encryption: it belongs on a plant's own network.

mod attendance;
mod link;
pub mod plan;
pub mod value;

use std::{
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use common::{
    reading::{DeviceIx, Quality, Reading},
    time::Timestamp,
};
use tokio::runtime::Handle;

pub use self::link::Address;
use self::{
    attendance::Attendance,
    link::{Fault, Link},
    plan::{Request, Table},
};
use super::{
    bus::{Bus, Poll},
    no_value,
};

/// A bus and what is read on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Where its slaves are.
    pub address: Address,
    /// How long a slave may take for an answer, besides its time on the wire.
    pub timeout: Duration,
    /// What is read, in this order.
    pub requests: Vec<Request>,
}

impl Settings {
    /// What no poll lasts: every request is sent twice, each time to a line opened for it, with a wait for silence
    /// between.
    pub fn longest_poll(&self) -> Duration {
        let each =
            |request: &Request| 5 * self.timeout + 2 * self.address.wire_time(request.table, request.count);
        self.requests.iter().map(each).sum()
    }
}

/// A bus that is opened at its first poll.
pub struct ModbusBus {
    settings: Settings,
    link: Link,
    attendance: Attendance,
    /// By request: it was answered by an exception the last time.
    refused: Vec<bool>,
}

impl Bus for ModbusBus {
    fn probes(&self) -> Vec<(Duration, Vec<DeviceIx>)> {
        let devices = |request: &Request| request.registers.iter().map(|register| register.device).collect();
        self.settings.requests.iter().map(|request| (request.period, devices(request))).collect()
    }

    /// On a blocking thread of a runtime: opening a serial port may block in its driver.
    fn poll(&mut self, at: Timestamp, due: &[usize]) -> Poll {
        Handle::current().block_on(self.read(at, due))
    }
}

impl ModbusBus {
    /// Nothing is opened yet.
    pub fn new(settings: Settings) -> Self {
        Self {
            link: Link::new(settings.address.clone(), settings.timeout),
            attendance: Attendance::new(settings.requests.iter().map(|request| request.unit)),
            refused: vec![false; settings.requests.len()],
            settings,
        }
    }

    /// Reads the requests that are due; every device of theirs gets one reading.
    pub(super) async fn read(&mut self, at: Timestamp, due: &[usize]) -> Poll {
        let units: Vec<u8> = self.settings.requests.iter().map(|request| request.unit).collect();
        let due_units: Vec<u8> = due.iter().map(|request| units[*request]).collect();
        let mut asked = self.attendance.to_ask(&due_units, Instant::now());
        // Those whom nobody asks come first, since that takes no time.
        let place = |request: &usize| asked.iter().position(|unit| *unit == units[*request]);
        let mut order = due.to_vec();
        order.sort_by_key(place);
        let mut poll = Poll::default();
        for request in order {
            let unit = units[request];
            let answer = match asked.contains(&unit) {
                true => self.ask(request, &mut asked).await,
                false => Err("away"),
            };
            // Without an answer there are no words, and so no values.
            let words = answer.unwrap_or_else(|reason| {
                poll.faults.push(reason);
                Vec::new()
            });
            for (device, value) in self.settings.requests[request].values(&words) {
                let good = |value| Reading { ts: at, device, quality: Quality::Good, value };
                poll.readings.push(value.map_or_else(|| no_value(at, device), good));
            }
        }
        poll
    }

    /// Sends a request, and takes those off `asked` who turn out to be away.
    async fn ask(&mut self, index: usize, asked: &mut Vec<u8>) -> Result<Vec<u16>, &'static str> {
        let Request { unit, table, start, count, .. } = self.settings.requests[index];
        let answer = self.link.read(unit, table, start, count).await;
        let bus = &self.settings.address;
        let fault = answer.as_ref().err();
        if let Some(fault @ Fault::Open(_)) = fault {
            asked.clear();
            if self.attendance.bus_failed(Instant::now()) {
                tracing::warn!(%bus, error = %fault, "bus is away; it is tried again after a pause");
            }
        } else if self.attendance.bus_opened() {
            tracing::info!(%bus, "bus is back");
        }
        match fault {
            Some(Fault::Open(_) | Fault::Damaged(_) | Fault::Stray(_)) => {}
            Some(fault) if fault.is_absence() => {
                asked.retain(|other| *other != unit);
                if self.attendance.failed(unit, Instant::now()) {
                    tracing::warn!(%bus, unit, error = %fault, "slave is away; it is tried again after a pause");
                }
            }
            _ if self.attendance.answered(unit) => tracing::info!(%bus, unit, "slave is back"),
            _ => {}
        }
        let refused = matches!(fault, Some(Fault::Exception(_)));
        if let Some(fault) = fault {
            let table = table.as_str();
            if refused && !self.refused[index] {
                tracing::warn!(%bus, unit, table, start, count, error = %fault, "slave refuses a request");
            }
            tracing::debug!(%bus, unit, table, start, count, error = %fault, "no value");
        }
        self.refused[index] = refused;
        answer.map_err(|fault| fault.reason())
    }
}

/// The unit ids among `units` at which something answers, be it with an exception. A gateway's word that it does not
/// reach a unit is no answer. Takes up to `timeout` for each unit that is not there.
///
/// # Errors
/// When the bus cannot be opened.
pub async fn probe(
    address: &Address,
    units: RangeInclusive<u8>,
    timeout: Duration,
) -> anyhow::Result<Vec<u8>> {
    let mut link = Link::new(address.clone(), timeout);
    let mut found = Vec::new();
    for unit in units {
        match link.read(unit, Table::Holding, 0, 1).await {
            Ok(_) | Err(Fault::Exception(_)) => found.push(unit),
            Err(Fault::Open(error)) => return Err(error).with_context(|| format!("opening {address}")),
            Err(_) => {}
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
