//! The delivery ledger: what must have come, and what did.
//!
//! Counted in rows of a lane (readings, for the lane `readings`), per site, gateway, epoch, lane and hour of
//! `sealed_at`:
//!
//! `expected = stored + duplicates + quarantined + erased + declared + pending + missing`
//!
//! Of every seq of an epoch and lane, from 0 to the highest that anything speaks of, the first that applies:
//!
//! | a seq is | when |
//! |---|---|
//! | refined | `silver/messages` has it: its rows are stored, duplicates or quarantined, and missing if none of these |
//! | declared | a gap record names it: the outbox had to drop it |
//! | pending | the edge may still hold it: it is not below the lowest seq that the edge last said it held |
//! | missing | none of these |
//!
//! What the edge holds is in its newest status; an epoch that this status no longer lists is held no more. Without
//! a status the messages' own `oldest` says it, and an epoch that was closed is held no more.
//!
//! How many rows a seq that never came had is known from its neighbours: each message says how many rows were
//! sealed before it. Where a run of absent seqs is in part declared and in part missing or pending, its rows are
//! shared out by the gap's own count, the rest by the number of messages. A run stands in the hour of the message
//! before it (of the one after it, at the start).
//!
//! Nothing is called missing too early: a message leaves the edge's hold when bronze has it, `silver/status` is
//! committed after `silver/messages` of the same plan, and is read before it.
//!
//! At the edge, by the census: `polled = sealed + held + rejected + skipped`. The census of an hour that is still
//! open may lag behind the readings that have come; these count as polled as well ([`GatewayTotals::uncounted`]).
//!
//! A gateway that was not heard for [`SILENCE`] is `unknown since` then, unless it said farewell.

mod account;
mod read;
mod table;
#[cfg(test)]
mod tests;

use std::{fmt, time::Duration};

use common::time::Timestamp;
use serde::Serialize;

pub use self::{
    account::{Census, Gap, GatewayInput, Inputs, LaneInput, LaneKey, LaneState, Received, Refined, account},
    table::{LedgerTable, delivery_ledger},
};
use crate::{store::Store, tables::Tables};

/// A gateway that is not heard for three heartbeats of a minute is unknown.
pub const SILENCE: Duration = Duration::from_secs(180);

/// One line of the ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LedgerRow {
    /// The plant.
    pub site: String,
    /// The edge agent.
    pub gateway_id: String,
    /// Its run; empty for senders without seq.
    pub epoch: String,
    /// The queue; `json` for senders without seq.
    pub lane: String,
    /// Hour of `sealed_at`.
    pub hour: Timestamp,
    /// Rows that were sealed.
    pub expected: i64,
    /// In silver.
    pub stored: i64,
    /// Came again, under another name.
    pub duplicates: i64,
    /// In quarantine.
    pub quarantined: i64,
    /// Removed on demand.
    pub erased: i64,
    /// Dropped by the outbox, which said so.
    pub declared: i64,
    /// On the edge or on the way.
    pub pending: i64,
    /// Lost without a word.
    pub missing: i64,
    /// Rows of messages that were delivered more than once; no part of the sum.
    pub redelivered: i64,
    /// Seqs that are missing: `3, 7-9`.
    pub missing_seqs: String,
    /// The gateway is silent since then.
    pub unknown_since: Option<Timestamp>,
}

impl LedgerRow {
    fn add(&mut self, other: &LedgerRow) {
        self.expected += other.expected;
        self.stored += other.stored;
        self.duplicates += other.duplicates;
        self.quarantined += other.quarantined;
        self.erased += other.erased;
        self.declared += other.declared;
        self.pending += other.pending;
        self.missing += other.missing;
        self.redelivered += other.redelivered;
        if !other.missing_seqs.is_empty() {
            let comma = if self.missing_seqs.is_empty() { "" } else { ", " };
            self.missing_seqs = format!("{}{comma}{}", self.missing_seqs, other.missing_seqs);
        }
    }

    /// Whether the parts make up what was expected and nothing is missing.
    pub fn balances(&self) -> bool {
        let parts =
            self.stored + self.duplicates + self.quarantined + self.erased + self.declared + self.pending;
        self.missing == 0 && self.missing_seqs.is_empty() && self.expected == parts
    }
}

/// Readings from the sensor to the lake.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Read by sources.
    pub polled: i64,
    /// Sealed into messages.
    pub sealed: i64,
    /// In silver.
    pub stored: i64,
    /// Held back by the deadband.
    pub held: i64,
    /// Rejected at the edge.
    pub rejected: i64,
    /// Not read, under pressure.
    pub skipped: i64,
    /// In quarantine.
    pub quarantined: i64,
    /// Dropped by an outbox, which said so.
    pub declared: i64,
    /// Came again, under another name.
    pub duplicates: i64,
    /// Removed on demand.
    pub erased: i64,
    /// On the edge or on the way.
    pub pending: i64,
    /// Lost without a word.
    pub missing: i64,
    /// Readings of messages that were delivered more than once; no part of the sum.
    pub redelivered: i64,
    /// Readings from senders without seq: received = stored + duplicates + quarantined, and no part of the sum.
    pub unnumbered: i64,
}

impl Totals {
    fn add(&mut self, other: &Totals) {
        self.polled += other.polled;
        self.sealed += other.sealed;
        self.stored += other.stored;
        self.held += other.held;
        self.rejected += other.rejected;
        self.skipped += other.skipped;
        self.quarantined += other.quarantined;
        self.declared += other.declared;
        self.duplicates += other.duplicates;
        self.erased += other.erased;
        self.pending += other.pending;
        self.missing += other.missing;
        self.redelivered += other.redelivered;
        self.unnumbered += other.unnumbered;
    }

    /// Whether the equation holds and nothing is missing.
    pub fn balances(&self) -> bool {
        let arrived = self.stored + self.quarantined + self.duplicates + self.erased;
        let sealed = arrived + self.declared + self.pending + self.missing;
        self.missing == 0
            && self.sealed == sealed
            && self.polled == self.sealed + self.held + self.rejected + self.skipped
    }
}

/// `polled … = stored … + held … + rejected … + skipped … + quarantined … + declared … · missing 0`, with
/// duplicates, erased and pending where they are not zero.
impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Totals { polled, stored, held, rejected, skipped, quarantined, declared, missing, .. } = self;
        write!(
            f,
            "polled {polled} = stored {stored} + held {held} + rejected {rejected} + skipped {skipped}"
        )?;
        write!(f, " + quarantined {quarantined} + declared {declared}")?;
        for (name, n) in [("duplicates", self.duplicates), ("erased", self.erased), ("pending", self.pending)]
        {
            if n != 0 {
                write!(f, " + {name} {n}")?;
            }
        }
        write!(f, " · missing {missing}")
    }
}

/// One gateway.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GatewayTotals {
    /// The plant.
    pub site: String,
    /// The edge agent.
    pub gateway_id: String,
    /// Its readings.
    #[serde(flatten)]
    pub totals: Totals,
    /// Readings that have come and whose census has not, counted as polled and sealed.
    pub uncounted: i64,
    /// Runs that did not stop cleanly.
    pub interruptions: i64,
    /// For how long in all their readings may not have been sealed, in seconds.
    pub interrupted_seconds: i64,
    /// Silent since then.
    pub unknown_since: Option<Timestamp>,
    /// Two runs sealed messages at the same time: the gateway's id is in use twice.
    pub two_epochs_at_once: bool,
}

/// The whole ledger at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Audit {
    /// When.
    pub at: Timestamp,
    /// Whether nothing is missing and every equation holds.
    pub balanced: bool,
    /// All gateways together.
    pub totals: Totals,
    /// Each gateway.
    pub gateways: Vec<GatewayTotals>,
    /// Per site, gateway, epoch, lane and hour.
    pub lanes: Vec<LedgerRow>,
}

impl Audit {
    /// Whether every lane balances, the edges' equations hold and nothing is missing.
    pub fn balances(&self) -> bool {
        self.lanes.iter().all(LedgerRow::balances)
            && self.gateways.iter().all(|gateway| gateway.totals.balances())
            && self.totals.balances()
    }

    /// Lines of one epoch and lane together, whatever the hour.
    fn by_lane(&self) -> Vec<LedgerRow> {
        let mut rows: Vec<LedgerRow> = Vec::new();
        for line in &self.lanes {
            let same = |r: &LedgerRow| {
                (&r.site, &r.gateway_id, &r.epoch, &r.lane)
                    == (&line.site, &line.gateway_id, &line.epoch, &line.lane)
            };
            match rows.last_mut().filter(|r| same(r)) {
                Some(row) => row.add(line),
                None => rows.push(line.clone()),
            }
        }
        rows
    }
}

/// A table of epochs and lanes, what is to be said of gateways, and the equation as the last line.
impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.by_lane();
        let name = |r: &LedgerRow| format!("{}/{}", r.site, r.gateway_id);
        let width = rows.iter().map(|r| name(r).len()).max().unwrap_or(0).max("gateway".len());
        writeln!(
            f,
            "{:width$}  {:8}  {:10}  {:>10}  {:>10}  {:>8}  {:>8}  {:>8}  {:>8}  {:>8}  {:>8}",
            "gateway",
            "epoch",
            "lane",
            "expected",
            "stored",
            "duplic.",
            "quarant.",
            "declared",
            "pending",
            "missing",
            "redeliv."
        )?;
        for r in &rows {
            // The last digits of a UUIDv7 are its random ones.
            let epoch = r.epoch.get(r.epoch.len().saturating_sub(8)..).unwrap_or("");
            writeln!(
                f,
                "{:width$}  {epoch:8}  {:10}  {:>10}  {:>10}  {:>8}  {:>8}  {:>8}  {:>8}  {:>8}  {:>8}",
                name(r),
                r.lane,
                r.expected,
                r.stored,
                r.duplicates,
                r.quarantined,
                r.declared,
                r.pending,
                r.missing,
                r.redelivered
            )?;
        }
        for row in rows.iter().filter(|r| !r.missing_seqs.is_empty()) {
            let (gateway, epoch, lane) = (name(row), &row.epoch, &row.lane);
            writeln!(f, "missing: {gateway} {lane} of {epoch}, seq {}", row.missing_seqs)?;
        }
        for gateway in &self.gateways {
            let name = format!("{}/{}", gateway.site, gateway.gateway_id);
            if let Some(since) = gateway.unknown_since {
                writeln!(f, "{name}: unknown since {since}")?;
            }
            if gateway.interruptions > 0 {
                let (n, s) = (gateway.interruptions, gateway.interrupted_seconds);
                writeln!(f, "{name}: interrupted {n} times; readings of {s} s at most were not sealed")?;
            }
            if gateway.two_epochs_at_once {
                writeln!(f, "{name}: two runs sealed messages at once; is this gateway id in use twice?")?;
            }
            if !gateway.totals.balances() {
                writeln!(f, "{name}: does not balance: {}", gateway.totals)?;
            }
        }
        if self.totals.unnumbered > 0 {
            writeln!(f, "from senders without seq: received {}", self.totals.unnumbered)?;
        }
        write!(f, "{}", self.totals)
    }
}

/// The ledger of what silver holds now.
///
/// # Errors
/// When silver cannot be read.
pub async fn audit(tables: &Tables, now: Timestamp) -> anyhow::Result<Audit> {
    Ok(account(&read::inputs(tables).await?, now))
}

/// [`audit`] of the lake at `url`.
///
/// # Errors
/// When there is no lake, or it cannot be read.
pub async fn audit_lake(url: &str, now: Timestamp) -> anyhow::Result<Audit> {
    let store = Store::open(url)?;
    audit(&Tables::open(&store).await?, now).await
}
