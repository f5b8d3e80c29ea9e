//! How much of silver is in memory at a time: spans of hours and, where a single hour has more, groups of gateways.
//!
//! An hour of a device is made of all that came of it, and whether edge aggregates count depends on what else its gateway
//! sent. So a group holds whole gateways, and those that carry a device together are in one.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use arrow::array::RecordBatch;
use common::time::{HOUR_MICROS, Timestamp};

use super::{
    scan::{self, Scan},
    series::{Words, run},
    windows::Silver,
};

/// Hours whose readings are in memory together.
const HOURS: u32 = 6;
/// Readings in memory together, unless one gateway has more: 17 bytes each. Tests take all paths.
const READINGS: u64 = if cfg!(test) { 1_000 } else { 10_000_000 };

/// Site and id of gateways.
pub(super) type Gateways = Arc<HashSet<(String, String)>>;

impl Silver {
    /// Spans of a few hours each; of one hour where those hold too much.
    pub(super) fn chunks(
        &self,
        span: &Range<Timestamp>,
        hold: Duration,
    ) -> anyhow::Result<Vec<Range<Timestamp>>> {
        let mut chunks = Vec::new();
        for chunk in pieces(span, HOURS) {
            if self.rows(&chunk, hold)? > READINGS {
                chunks.extend(pieces(&chunk, 1));
            } else {
                chunks.push(chunk);
            }
        }
        Ok(chunks)
    }

    /// Whose rows are read together; `None` for everybody's.
    pub(super) async fn groups(
        &self,
        within: &Range<Timestamp>,
        hold: Duration,
    ) -> anyhow::Result<Vec<Option<Gateways>>> {
        self.groups_of(within, hold, READINGS).await
    }

    pub(super) async fn groups_of(
        &self,
        within: &Range<Timestamp>,
        hold: Duration,
        most: u64,
    ) -> anyhow::Result<Vec<Option<Gateways>>> {
        if self.rows(within, hold)? <= most {
            return Ok(vec![None]);
        }
        let mut seen = Seen::default();
        for of in self.scans(within, hold, None) {
            let of = Scan { columns: &["site", "gateway_id", "device_id"], ..of };
            scan::scan(&of, |batch| seen.add(batch)).await?;
        }
        Ok(seen.groups(most).into_iter().map(Some).collect())
    }

    /// At most; of the readings, by what the log says.
    fn rows(&self, within: &Range<Timestamp>, hold: Duration) -> anyhow::Result<u64> {
        self.scans(within, hold, None).first().map_or(Ok(0), scan::rows)
    }
}

/// Parts of a span, in whole hours.
fn pieces(span: &Range<Timestamp>, hours: u32) -> impl Iterator<Item = Range<Timestamp>> + use<> {
    let end = span.end;
    let width = Duration::from_micros(HOUR_MICROS.unsigned_abs()) * hours;
    std::iter::successors(Some(span.start), move |start| Some(*start + width))
        .take_while(move |start| *start < end)
        .map(move |start| start..(start + width).min(end))
}

/// Which gateways sent how much, and which of them carry a device together.
#[derive(Default)]
struct Seen {
    /// By site and id: its place in the next two.
    gateways: BTreeMap<(String, String), usize>,
    rows: Vec<u64>,
    /// A gateway in the same group; its own place for one that stands for its group.
    with: Vec<usize>,
    /// The first gateway of each device, by site and id.
    devices: HashMap<(String, String), usize>,
}

impl Seen {
    fn add(&mut self, batch: &RecordBatch) -> anyhow::Result<()> {
        let columns =
            [Words::of(batch, "device_id")?, Words::of(batch, "gateway_id")?, Words::of(batch, "site")?];
        let mut row = 0;
        while row < batch.num_rows() {
            let rows = run(&columns, row);
            let [device, gateway, site] = columns.each_ref().map(|of| of.value(row).unwrap_or("").to_owned());
            self.run((site.clone(), gateway), (site, device), rows as u64);
            row += rows;
        }
        Ok(())
    }

    fn run(&mut self, gateway: (String, String), device: (String, String), rows: u64) {
        let new = self.rows.len();
        let at = *self.gateways.entry(gateway).or_insert(new);
        if at == new {
            self.rows.push(0);
            self.with.push(new);
        }
        self.rows[at] += rows;
        let first = *self.devices.entry(device).or_insert(at);
        let (a, b) = (self.root(first), self.root(at));
        self.with[a.max(b)] = a.min(b);
    }

    fn root(&self, mut at: usize) -> usize {
        while self.with[at] != at {
            at = self.with[at];
        }
        at
    }

    /// Of at most so many rows each, unless those that belong together have more.
    fn groups(&self, most: u64) -> Vec<Gateways> {
        let mut together: BTreeMap<usize, (u64, HashSet<(String, String)>)> = BTreeMap::new();
        for (gateway, at) in &self.gateways {
            let (rows, of) = together.entry(self.root(*at)).or_default();
            *rows += self.rows[*at];
            of.insert(gateway.clone());
        }
        let mut groups: Vec<(u64, HashSet<(String, String)>)> = Vec::new();
        for (rows, gateways) in together.into_values() {
            match groups.last_mut() {
                Some((held, of)) if *held + rows <= most => {
                    *held += rows;
                    of.extend(gateways);
                }
                _ => groups.push((rows, gateways)),
            }
        }
        groups.into_iter().map(|(_, gateways)| Arc::new(gateways)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hour(n: i64) -> Timestamp {
        Timestamp::from_micros(n * HOUR_MICROS)
    }

    #[test]
    fn a_span_is_read_in_pieces() {
        let parts: Vec<_> = pieces(&(hour(0)..hour(14)), 6).collect();
        assert_eq!(parts, [hour(0)..hour(6), hour(6)..hour(12), hour(12)..hour(14)]);
    }

    #[test]
    fn gateways_that_carry_a_device_together_stay_together() {
        let mut seen = Seen::default();
        let named = |id: &str| ("s".to_owned(), id.to_owned());
        for (gateway, device, rows) in [
            ("a", "1", 40),
            ("b", "2", 40),
            ("c", "3", 10),
            ("d", "2", 5),
            ("c", "1", 10),
            ("e", "4", 60),
            ("a", "1", 1),
        ] {
            seen.run(named(gateway), named(device), rows);
        }
        let groups = |most: u64| -> Vec<Vec<String>> {
            let sorted = |group: &Gateways| {
                let mut ids: Vec<String> = group.iter().map(|(_, id)| id.clone()).collect();
                ids.sort();
                ids
            };
            seen.groups(most).iter().map(sorted).collect()
        };
        assert_eq!(groups(1_000), [vec!["a", "b", "c", "d", "e"]]);
        assert_eq!(groups(106), [vec!["a", "b", "c", "d"], vec!["e"]]);
        assert_eq!(groups(1), [vec!["a", "c"], vec!["b", "d"], vec!["e"]]);
        // A site's gateways are no other site's.
        seen.run(("t".to_owned(), "a".to_owned()), ("t".to_owned(), "1".to_owned()), 1);
        assert_eq!(seen.groups(1).len(), 4);
    }
}
