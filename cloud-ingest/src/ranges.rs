//! Sets of integers as a few spans: times that are committed, seqs that were seen, numbers that are planned.

use std::collections::BTreeMap;

/// Inclusive spans. With a limit, a set may grow **wider** than what was put in, never narrower: spans that
/// lie close together become one, and when there are too many the closest two do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranges {
    /// End by start; they neither overlap nor touch.
    spans: BTreeMap<i64, i64>,
    /// Spans with at most this many integers between them become one.
    slack: i64,
    /// Most spans.
    limit: usize,
}

impl Ranges {
    /// Holds exactly what is put in.
    pub const fn exact() -> Self {
        Self { spans: BTreeMap::new(), slack: 0, limit: usize::MAX }
    }

    /// At most `limit` spans, none closer together than `slack`.
    pub const fn coarse(slack: i64, limit: usize) -> Self {
        Self { spans: BTreeMap::new(), slack, limit }
    }

    /// Puts `from..=to` in.
    pub fn insert(&mut self, mut from: i64, mut to: i64) {
        let reach = to.saturating_add(self.slack).saturating_add(1);
        let low = from.saturating_sub(self.slack).saturating_sub(1);
        while let Some((&start, &end)) = self.spans.range(..=reach).next_back() {
            if end < low {
                break;
            }
            self.spans.remove(&start);
            from = from.min(start);
            to = to.max(end);
        }
        self.spans.insert(from, to);
        while self.spans.len() > self.limit {
            self.close_narrowest_gap();
        }
    }

    /// Whether `n` may have been put in; surely so when the set is exact.
    pub fn contains(&self, n: i64) -> bool {
        self.overlap(n, n)
    }

    /// Whether anything of `from..=to` may have been put in; surely so when the set is exact.
    pub fn overlap(&self, from: i64, to: i64) -> bool {
        self.spans.range(..=to).next_back().is_some_and(|(_, end)| from <= *end)
    }

    /// The greatest that was put in, exactly.
    pub fn last(&self) -> Option<i64> {
        self.spans.values().next_back().copied()
    }

    /// The spans, in order.
    pub fn iter(&self) -> impl Iterator<Item = (i64, i64)> + '_ {
        self.spans.iter().map(|(from, to)| (*from, *to))
    }

    fn close_narrowest_gap(&mut self) {
        let gaps = self.spans.iter().zip(self.spans.iter().skip(1));
        let narrowest = gaps.min_by_key(|((_, end), (start, _))| start.saturating_sub(**end));
        if let Some(((&first, _), (&second, &end))) = narrowest {
            self.spans.remove(&second);
            self.spans.insert(first, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn exact_is_exact_and_coarse_never_narrower(inserts in prop::collection::vec((-60i64..60, 0i64..6), 0..30)) {
            let mut truth = BTreeSet::new();
            let (mut exact, mut coarse) = (Ranges::exact(), Ranges::coarse(3, 4));
            for (from, length) in inserts {
                truth.extend(from..=from + length);
                exact.insert(from, from + length);
                coarse.insert(from, from + length);
            }
            for n in -70..70 {
                prop_assert_eq!(exact.contains(n), truth.contains(&n), "{}", n);
                prop_assert!(coarse.contains(n) || !truth.contains(&n), "{}", n);
                prop_assert_eq!(exact.overlap(n, n + 4), truth.range(n..=n + 4).next().is_some(), "{}", n);
            }
            prop_assert!(coarse.iter().count() <= 4);
            let exact: Vec<_> = exact.iter().collect();
            prop_assert!(exact.windows(2).all(|w| w[0].1 + 1 < w[1].0), "{:?}", exact);
            prop_assert_eq!(coarse.last(), truth.last().copied());
            let last = truth.last().copied().unwrap_or(0);
            prop_assert!(!coarse.contains(last + 1), "what follows in order needs no look-up");
        }
    }
}
