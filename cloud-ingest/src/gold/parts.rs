//! How much of silver is in memory at a time: of a few hours groups of gateways, and where one gateway has more, of
//! single hours.
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
use object_store::path::Path;
use parquet::arrow::arrow_reader::{RowSelection, RowSelector};

use super::{
    scan::{self, File, Scan},
    series::{Words, run},
    windows::Silver,
};

/// Hours whose readings are in memory together.
const HOURS: u32 = 6;
/// Readings in memory together, unless one gateway has more in an hour: 17 bytes each. Tests take all paths.
const READINGS: u64 = if cfg!(test) { 1_000 } else { 2_500_000 };

/// Rows of data files, and none of any other.
pub(super) type Chosen = Arc<HashMap<Path, RowSelection>>;

/// What is read together.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) within: Range<Timestamp>,
    /// Everything that some gateways sent; `None` for all of them.
    pub(super) of: Option<Chosen>,
}

impl Silver {
    /// Parts of a span, which are all of it.
    pub(super) async fn parts(&self, within: &Range<Timestamp>, hold: Duration) -> anyhow::Result<Vec<Part>> {
        self.parts_of(within, hold, READINGS).await
    }

    pub(super) async fn parts_of(
        &self,
        within: &Range<Timestamp>,
        hold: Duration,
        most: u64,
    ) -> anyhow::Result<Vec<Part>> {
        let (mut parts, mut left) = (Vec::new(), vec![within.clone()]);
        while let Some(within) = left.pop() {
            let scans = self.scans(&within, hold, None);
            if scans.first().map_or(Ok(0), scan::rows)? <= most {
                parts.push(Part { within, of: None });
                continue;
            }
            let mut seen = Seen::default();
            for of in scans {
                let of = Scan { columns: &["site", "gateway_id", "device_id"], ..of };
                scan::whole(&of, |file, batch| seen.add(file, batch)).await?;
            }
            let groups = seen.groups(most);
            let hours: Vec<_> = pieces(&within, 1).collect();
            if hours.len() > 1 && groups.iter().any(|group| group.rows > most as f64) {
                left.extend(hours.into_iter().rev());
            } else {
                let of = |group: Group| Some(seen.rows_of(&group.gateways));
                parts.extend(groups.into_iter().map(|group| Part { within: within.clone(), of: of(group) }));
            }
        }
        Ok(parts)
    }
}

/// Parts of a span, of few enough hours to be read together.
pub(super) fn chunks(span: &Range<Timestamp>) -> impl Iterator<Item = Range<Timestamp>> + use<> {
    pieces(span, HOURS)
}

/// Parts of a span, in whole hours.
fn pieces(span: &Range<Timestamp>, hours: u32) -> impl Iterator<Item = Range<Timestamp>> + use<> {
    let end = span.end;
    let width = Duration::from_micros(HOUR_MICROS.unsigned_abs()) * hours;
    std::iter::successors(Some(span.start), move |start| Some(*start + width))
        .take_while(move |start| *start < end)
        .map(move |start| start..(start + width).min(end))
}

/// Which gateways sent how much, where it is, and which of them carry a device together.
#[derive(Default)]
struct Seen {
    /// By [`named`]: its place in the next two.
    gateways: BTreeMap<String, usize>,
    /// Within the span, about.
    rows: Vec<f64>,
    /// A gateway in the same group; its own place for one that stands for its group.
    with: Vec<usize>,
    /// The first gateway of each device, by [`named`].
    devices: HashMap<String, usize>,
    /// Whose rows lie in each file, one after the other.
    files: Vec<(Path, Vec<(usize, usize)>)>,
    /// Room to put a name together.
    name: String,
}

/// Gateways that are read together.
#[derive(Debug, Default)]
struct Group {
    rows: f64,
    gateways: HashSet<usize>,
}

impl Seen {
    fn add(&mut self, file: &File, batch: &RecordBatch) -> anyhow::Result<()> {
        let columns =
            [Words::of(batch, "device_id")?, Words::of(batch, "gateway_id")?, Words::of(batch, "site")?];
        if self.files.last().is_none_or(|(path, _)| *path != file.path) {
            self.files.push((file.path.clone(), Vec::new()));
        }
        let mut row = 0;
        while row < batch.num_rows() {
            let rows = run(&columns, row);
            let [device, gateway, site] = columns.each_ref().map(|of| of.value(row).unwrap_or(""));
            let at = self.run(site, gateway, device, rows as f64 * file.share);
            if let Some((_, runs)) = self.files.last_mut() {
                match runs.last_mut() {
                    Some((last, before)) if *last == at => *before += rows,
                    _ => runs.push((at, rows)),
                }
            }
            row += rows;
        }
        Ok(())
    }

    /// Returns the gateway's place.
    fn run(&mut self, site: &str, gateway: &str, device: &str, rows: f64) -> usize {
        named(&mut self.name, site, gateway);
        let at = self.gateways.get(&self.name).copied().unwrap_or_else(|| {
            let new = self.rows.len();
            self.rows.push(0.0);
            self.with.push(new);
            self.gateways.insert(self.name.clone(), new);
            new
        });
        self.rows[at] += rows;
        named(&mut self.name, site, device);
        match self.devices.get(&self.name) {
            Some(first) => {
                let (a, b) = (self.root(*first), self.root(at));
                self.with[a.max(b)] = a.min(b);
            }
            None => _ = self.devices.insert(self.name.clone(), at),
        }
        at
    }

    fn root(&self, mut at: usize) -> usize {
        while self.with[at] != at {
            at = self.with[at];
        }
        at
    }

    /// Of at most so many rows each, unless those that belong together have more.
    fn groups(&self, most: u64) -> Vec<Group> {
        let mut together: BTreeMap<usize, Group> = BTreeMap::new();
        for at in self.gateways.values() {
            let group = together.entry(self.root(*at)).or_default();
            group.rows += self.rows[*at];
            group.gateways.insert(*at);
        }
        let mut groups: Vec<Group> = Vec::new();
        for next in together.into_values() {
            match groups.last_mut() {
                Some(group) if group.rows + next.rows <= most as f64 => {
                    group.rows += next.rows;
                    group.gateways.extend(next.gateways);
                }
                _ => groups.push(next),
            }
        }
        groups
    }

    /// Where the rows of these gateways are.
    fn rows_of(&self, gateways: &HashSet<usize>) -> Chosen {
        let chosen = self.files.iter().map(|(path, runs)| (path.clone(), selection(runs, gateways)));
        Arc::new(chosen.filter(|(_, rows)| rows.selects_any()).collect())
    }
}

/// The runs of these gateways. Neighbours are joined before there is a selection, which takes room for as many parts as it
/// is handed: all groups' selections of an hour would have room for all of its runs each.
fn selection(runs: &[(usize, usize)], gateways: &HashSet<usize>) -> RowSelection {
    let is_of = |(at, _): &(usize, usize)| gateways.contains(at);
    let joined = runs.chunk_by(|a, b| is_of(a) == is_of(b)).map(|chunk| {
        let rows = chunk.iter().map(|(_, rows)| rows).sum();
        if is_of(&chunk[0]) { RowSelector::select(rows) } else { RowSelector::skip(rows) }
    });
    joined.collect::<Vec<_>>().into()
}

/// What a site calls a gateway, or a device.
fn named(name: &mut String, site: &str, id: &str) {
    name.clear();
    name.extend([site, "\0", id]);
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
        for (gateway, device, rows) in [
            ("a", "1", 40),
            ("b", "2", 40),
            ("c", "3", 10),
            ("d", "2", 5),
            ("c", "1", 10),
            ("e", "4", 60),
            ("a", "1", 1),
        ] {
            seen.run("s", gateway, device, f64::from(rows));
        }
        let groups = |most: u64| -> Vec<Vec<String>> {
            let ids = |group: &Group| {
                let of_group = seen.gateways.iter().filter(|(_, at)| group.gateways.contains(*at));
                of_group.map(|(name, _)| name.replace("s\0", "")).collect()
            };
            seen.groups(most).iter().map(ids).collect()
        };
        assert_eq!(groups(1_000), [vec!["a", "b", "c", "d", "e"]]);
        assert_eq!(groups(106), [vec!["a", "b", "c", "d"], vec!["e"]]);
        assert_eq!(groups(1), [vec!["a", "c"], vec!["b", "d"], vec!["e"]]);
        // A site's gateways are no other site's.
        seen.run("t", "a", "1", 1.0);
        assert_eq!(seen.groups(1).len(), 4);
    }
}
