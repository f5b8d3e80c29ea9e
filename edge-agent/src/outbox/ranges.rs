//! A set of numbers kept as disjoint ranges (pure).

use std::{collections::BTreeMap, ops::Range};

use serde::{Deserialize, Serialize};

/// Numbers kept as disjoint, non-adjacent ranges: what was forgotten is one long range and a few short ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    /// Adds every number of `range`.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        // Whatever touches the new range becomes part of it.
        while let Some((&s, &e)) = self.0.range(..=end).next_back() {
            if e < start {
                break;
            }
            self.0.remove(&s);
            start = start.min(s);
            end = end.max(e);
        }
        self.0.insert(start, end);
    }

    /// Whether `n` is in the set.
    pub fn contains(&self, n: u64) -> bool {
        self.next_absent(n) != n
    }

    /// The lowest number from `n` on that is not in the set.
    pub fn next_absent(&self, n: u64) -> u64 {
        match self.0.range(..=n).next_back() {
            Some((_, &end)) if end > n => end,
            _ => n,
        }
    }

    /// The parts of `range` that are not in the set, ascending.
    pub fn absent(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut parts = Vec::new();
        let mut at = self.next_absent(range.start);
        while at < range.end {
            let end = self.0.range(at..range.end).next().map_or(range.end, |(&start, _)| start);
            parts.push(at..end);
            at = self.next_absent(end);
        }
        parts
    }

    /// Whether every number of `range` is in the set.
    pub fn covers(&self, range: Range<u64>) -> bool {
        range.is_empty() || self.next_absent(range.start) >= range.end
    }

    /// The ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().map(|(&start, &end)| start..end)
    }

    /// Empties the set and returns what was in it.
    pub fn take(&mut self) -> Vec<Range<u64>> {
        std::mem::take(&mut self.0).into_iter().map(|(start, end)| start..end).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_set_of_numbers(
            ranges in proptest::collection::vec((0u64..60, 0u64..12), 0..24), probe in 0u64..72, length in 0u64..20
        ) {
            let mut set = RangeSet::default();
            let mut model = BTreeSet::new();
            for (start, length) in ranges {
                set.insert(start..start + length);
                model.extend(start..start + length);
            }
            let next = (probe..).find(|n| !model.contains(n)).unwrap();
            prop_assert_eq!(set.next_absent(probe), next);
            prop_assert_eq!(set.contains(probe), model.contains(&probe));
            let absent: Vec<u64> = set.absent(probe..probe + length).into_iter().flatten().collect();
            let expected: Vec<u64> = (probe..probe + length).filter(|n| !model.contains(n)).collect();
            prop_assert_eq!(&absent, &expected);
            prop_assert_eq!(set.covers(probe..probe + length), expected.is_empty());
            // Disjoint and not adjacent.
            let parts: Vec<_> = set.iter().collect();
            prop_assert!(parts.windows(2).all(|w| w[0].end < w[1].start));
            prop_assert_eq!(serde_json::from_str::<RangeSet>(&serde_json::to_string(&set).unwrap()).unwrap(), set);
        }
    }
}
