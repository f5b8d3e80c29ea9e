//! The ledger's arithmetic: pure, over everything that silver says of messages.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use common::{time::Timestamp, wire::Lane};

use super::{Audit, GatewayTotals, LedgerRow, SILENCE, Totals};
use crate::silver::NAMELESS;

/// Clocks that are set back make an epoch seem to begin before the earlier one's end.
const CLOCK_SLACK: Duration = Duration::from_secs(120);

/// A message that was refined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "as the columns of silver/messages")]
pub struct Refined {
    pub seq: i64,
    pub rows: i64,
    pub rows_before: i64,
    pub oldest: i64,
    pub sealed_at: Timestamp,
    pub readings: i64,
    pub stored: i64,
    pub duplicates: i64,
    pub quarantined: i64,
    pub redelivered: bool,
}

/// Seqs that an outbox dropped and declared, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "as the columns of silver/control")]
pub struct Gap {
    pub first_seq: i64,
    pub last_seq: i64,
    pub readings: i64,
    pub ts: Timestamp,
}

/// What a status or a closing says of an epoch and lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneState {
    /// Messages sealed.
    pub head: i64,
    /// Rows sealed.
    pub rows: i64,
    /// Lowest seq that the edge holds; in a closing equal to `head`.
    pub oldest: i64,
    /// When it was written.
    pub at: Timestamp,
}

/// One epoch and lane of a gateway.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "as the columns of silver/messages")]
pub struct LaneKey {
    pub site: String,
    pub gateway: String,
    pub epoch: String,
    pub lane: String,
}

/// The messages of an epoch and lane, as much of them as the ledger needs. There are millions; what is kept is a
/// record for each run of seqs and for each hour, and it is the same in whichever order they are added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Runs of seqs that came, by their first.
    runs: BTreeMap<i64, Run>,
    /// What became of the rows.
    lines: Lines,
    /// How far they go.
    ends: Option<(i64, Option<i64>)>,
    /// Highest of the lowest seqs that the edge held when it sealed them.
    oldest: i64,
    /// First and last `sealed_at` by a clock that was set.
    active: Option<(Timestamp, Timestamp)>,
}

/// Seqs without a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    last: i64,
    /// Rows sealed before its first message, and up to the end of its last.
    rows: (i64, i64),
    /// `sealed_at` of its first message and of its last.
    sealed_at: (Timestamp, Timestamp),
}

impl Received {
    /// Adds one of the messages.
    pub fn add(&mut self, message: &Refined) {
        let seq = message.seq;
        self.oldest = self.oldest.max(message.oldest);
        self.ends = self.ends.max(Some((seq + 1, Some(message.rows_before + message.rows))));
        let at = message.sealed_at;
        // By a clock that was never set, nobody knows when that was.
        if !at.is_provisional() {
            self.active = Some(self.active.map_or((at, at), |(from, to)| (from.min(at), to.max(at))));
        }
        let before = self.runs.range(..=seq).next_back().map(|(first, run)| (*first, *run));
        // A further row of a seq that is there already was delivered again, whatever it says of itself. The first
        // delivery of one that says so is always there too, unless silver was tampered with; then the seq stays absent.
        let again = message.redelivered || before.is_some_and(|(_, run)| run.last >= seq);
        self.lines.refined(&Refined { redelivered: again, ..*message }, message.rows);
        if again {
            return;
        }
        let rows = (message.rows_before, message.rows_before + message.rows);
        let (mut first, mut run) = (seq, Run { last: seq, rows, sealed_at: (at, at) });
        if let Some((earlier, before)) = before.filter(|(_, run)| run.last + 1 == seq) {
            first = earlier;
            run.rows.0 = before.rows.0;
            run.sealed_at.0 = before.sealed_at.0;
        }
        if let Some(after) = self.runs.remove(&(seq + 1)) {
            run.last = after.last;
            run.rows.1 = after.rows.1;
            run.sealed_at.1 = after.sealed_at.1;
        }
        self.runs.insert(first, run);
    }

    /// Adds a message of a sender without seq: what was received is accounted for, and no more can be said.
    pub fn add_unnumbered(&mut self, message: &Refined) {
        self.lines.refined(message, message.readings);
    }
}

/// Everything that silver says of an epoch and lane, in any order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LaneInput {
    /// Its messages.
    pub received: Received,
    /// Its gaps; some may have been declared twice.
    pub gaps: Vec<Gap>,
    /// Its end.
    pub closing: Option<LaneState>,
    /// Its entry in the gateway's newest status.
    pub status: Option<LaneState>,
}

/// What an agent counted in one epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "as the outcomes of a census")]
pub struct Census {
    pub polled: i64,
    pub sealed: i64,
    pub held: i64,
    pub rejected: i64,
    pub skipped: i64,
}

/// What silver says of a gateway as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GatewayInput {
    /// By epoch.
    pub census: BTreeMap<String, Census>,
    /// From when to when readings may not have been sealed, once for each epoch that ended uncleanly.
    pub interruptions: Vec<(Timestamp, Timestamp)>,
    /// Epoch of its newest status; `None` when it never sent one.
    pub current_epoch: Option<String>,
    /// When it was last heard.
    pub heard_at: Option<Timestamp>,
    /// Its newest status is a farewell.
    pub stopped: bool,
}

/// Everything that the ledger is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inputs {
    /// Epochs and lanes.
    pub lanes: BTreeMap<LaneKey, LaneInput>,
    /// By (site, gateway).
    pub gateways: BTreeMap<(String, String), GatewayInput>,
}

/// Makes the ledger.
pub fn account(inputs: &Inputs, now: Timestamp) -> Audit {
    let mut lanes = Vec::new();
    let mut gateways: BTreeMap<(&str, &str), Books> = BTreeMap::new();
    for (site, gateway) in inputs.gateways.keys() {
        gateways.entry((site, gateway)).or_default();
    }
    let nobody = GatewayInput::default();
    for (key, input) in &inputs.lanes {
        let gateway = inputs.gateways.get(&(key.site.clone(), key.gateway.clone())).unwrap_or(&nobody);
        let rows = if key.lane == NAMELESS {
            input.received.lines.clone().into_rows()
        } else {
            numbered(key, input, gateway)
        };
        let unknown_since = gateway.unknown_since(now);
        let books = gateways.entry((&key.site, &key.gateway)).or_default();
        books.enter(key, input, &rows, settled(key, input, gateway));
        lanes.extend(rows.into_iter().map(|row| LedgerRow {
            site: key.site.clone(),
            gateway_id: key.gateway.clone(),
            epoch: key.epoch.clone(),
            lane: key.lane.clone(),
            unknown_since,
            ..row
        }));
    }
    let gateways: Vec<GatewayTotals> = gateways
        .into_iter()
        .map(|((site, name), books)| {
            let input = inputs.gateways.get(&(site.to_owned(), name.to_owned())).unwrap_or(&nobody);
            books.close(site, name, input, now)
        })
        .collect();
    let mut totals = Totals::default();
    gateways.iter().for_each(|gateway| totals.add(&gateway.totals));
    let mut audit = Audit { at: now, balanced: false, totals, gateways, lanes };
    audit.balanced = audit.balances();
    audit
}

impl GatewayInput {
    fn unknown_since(&self, now: Timestamp) -> Option<Timestamp> {
        self.heard_at.filter(|heard| !self.stopped && now.since(*heard) > SILENCE)
    }
}

/// The lowest seq that the edge may still hold.
fn oldest(key: &LaneKey, input: &LaneInput, gateway: &GatewayInput, head: i64) -> i64 {
    let said = input.received.oldest;
    match (&input.status, &gateway.current_epoch) {
        (Some(status), _) => status.oldest.max(said),
        // The newest status lists everything that is held, so this is not.
        (None, Some(current)) if *current != key.epoch => head,
        (None, _) if input.closing.is_some() => head,
        (None, _) => said,
    }
}

/// Whether nothing more of this epoch and lane is to come.
fn settled(key: &LaneKey, input: &LaneInput, gateway: &GatewayInput) -> bool {
    let head = Ends::of(input).head;
    let over = input.closing.is_some() || gateway.current_epoch.as_ref().is_some_and(|e| *e != key.epoch);
    over && oldest(key, input, gateway, head) >= head
}

/// How far an epoch and lane goes.
struct Ends {
    /// One more than the highest seq that anything speaks of.
    head: i64,
    /// Rows sealed before `head`, where somebody says so.
    rows: Option<i64>,
}

impl Ends {
    fn of(input: &LaneInput) -> Ends {
        let states = input.status.iter().chain(&input.closing).map(|s| (s.head, Some(s.rows)));
        let gaps = input.gaps.iter().map(|g| (g.last_seq + 1, None));
        let (head, rows) = states.chain(input.received.ends).chain(gaps).max().unwrap_or((0, None));
        Ends { head, rows }
    }
}

/// Lines by hour.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Lines(BTreeMap<Timestamp, Line>);

/// A line, and the seqs that are missing from it, both ends included.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Line {
    row: LedgerRow,
    missing: BTreeSet<(i64, i64)>,
}

impl Lines {
    fn at(&mut self, at: Timestamp) -> &mut Line {
        self.0.entry(at.hour()).or_default()
    }

    fn refined(&mut self, message: &Refined, expected: i64) {
        let Line { row, missing } = self.at(message.sealed_at);
        if message.redelivered {
            row.redelivered += message.readings;
            return;
        }
        let found = message.stored + message.duplicates + message.quarantined;
        row.expected += expected.max(found);
        row.stored += message.stored;
        row.duplicates += message.duplicates;
        row.quarantined += message.quarantined;
        if found < expected {
            row.missing += expected - found;
            missing.insert((message.seq, message.seq));
        }
    }

    fn into_rows(self) -> Vec<LedgerRow> {
        let rows = self.0.into_iter();
        rows.map(|(hour, Line { row, missing })| LedgerRow { hour, missing_seqs: ranges(&missing), ..row })
            .collect()
    }
}

fn numbered(key: &LaneKey, input: &LaneInput, gateway: &GatewayInput) -> Vec<LedgerRow> {
    let ends = Ends::of(input);
    let gaps = disjoint(&input.gaps);
    let oldest = oldest(key, input, gateway, ends.head);
    let mut lines = input.received.lines.clone();
    let mut before: Option<&Run> = None;
    for (first, run) in &input.received.runs {
        let from = before.map_or(0, |b| b.last + 1);
        if from < *first {
            let rows = run.rows.0 - before.map_or(0, |b| b.rows.1);
            let at = before.map_or(run.sealed_at.0, |b| b.sealed_at.1);
            Hole { from, to: first - 1, rows: Some(rows.max(0)), at }.enter(&gaps, oldest, &mut lines);
        }
        before = Some(run);
    }
    let from = before.map_or(0, |b| b.last + 1);
    if from < ends.head {
        let rows = ends.rows.map(|rows| (rows - before.map_or(0, |b| b.rows.1)).max(0));
        let states = input.status.iter().chain(&input.closing).map(|s| s.at);
        let at =
            before.map(|b| b.sealed_at.1).or_else(|| gaps.first().map(|g| g.ts)).or_else(|| states.min());
        let hole = Hole { from, to: ends.head - 1, rows, at: at.unwrap_or_default() };
        hole.enter(&gaps, oldest, &mut lines);
    }
    lines.into_rows()
}

/// A run of seqs that were not refined, both ends included.
struct Hole {
    from: i64,
    to: i64,
    /// Rows in all of them, where that can be told.
    rows: Option<i64>,
    /// When it is put down.
    at: Timestamp,
}

impl Hole {
    fn enter(&self, gaps: &[Gap], oldest: i64, lines: &mut Lines) {
        let mut declared_rows = 0;
        // Parts that no gap names.
        let mut silent: Vec<(i64, i64)> = Vec::new();
        let mut next = self.from;
        for gap in gaps.iter().filter(|g| g.last_seq >= self.from && g.first_seq <= self.to) {
            let (first, last) = (gap.first_seq.max(self.from), gap.last_seq.min(self.to));
            if next < first {
                silent.push((next, first - 1));
            }
            declared_rows += share(gap.readings, last - first + 1, gap.last_seq - gap.first_seq + 1);
            next = last + 1;
        }
        if next <= self.to {
            silent.push((next, self.to));
        }
        let (mut missing, mut pending) = (Vec::new(), 0);
        for (first, last) in silent {
            if first < oldest {
                missing.push((first, last.min(oldest - 1)));
            }
            pending += (last + 1 - first.max(oldest)).max(0);
        }
        let lost: i64 = missing.iter().map(|(first, last)| last - first + 1).sum();
        // A message has one row at least.
        let rows = self.rows.unwrap_or(declared_rows + lost + pending);
        // What a gap declares of a message is its even share: no more than leaves each that it does not name its row.
        let left = (rows - lost - pending).max(0);
        let declared_rows = if lost + pending == 0 { rows } else { declared_rows.min(left) };
        let missing_rows = share(rows - declared_rows, lost, lost + pending);
        let line = lines.at(self.at);
        line.row.expected += rows;
        line.row.declared += declared_rows;
        line.row.missing += missing_rows;
        line.row.pending += rows - declared_rows - missing_rows;
        line.missing.extend(missing);
    }
}

/// `part` of `whole` of `rows`, rounded up, so that what is lost is never called nothing.
fn share(rows: i64, part: i64, whole: i64) -> i64 {
    if part <= 0 || whole <= 0 {
        return 0;
    }
    let exact = (i128::from(rows) * i128::from(part)).div_euclid(i128::from(whole));
    let rest = (i128::from(rows) * i128::from(part)).rem_euclid(i128::from(whole));
    i64::try_from(exact + i128::from(rest > 0)).unwrap_or(rows).min(rows)
}

/// `3, 7-9`
fn ranges(spans: &BTreeSet<(i64, i64)>) -> String {
    let text = |(first, last): &(i64, i64)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    spans.iter().map(text).collect::<Vec<_>>().join(", ")
}

/// Gaps in order without overlaps: neighbouring gaps merge on the edge, so a wider one may repeat a narrower.
fn disjoint(gaps: &[Gap]) -> Vec<Gap> {
    let mut gaps = gaps.to_vec();
    // The wider of two that begin together comes first.
    gaps.sort_unstable_by_key(|g| (g.first_seq, -g.last_seq));
    let mut apart: Vec<Gap> = Vec::with_capacity(gaps.len());
    for gap in gaps {
        match apart.last() {
            Some(last) if gap.last_seq <= last.last_seq => {}
            Some(last) if gap.first_seq <= last.last_seq => {
                let first_seq = last.last_seq + 1;
                let (part, whole) = (gap.last_seq - first_seq + 1, gap.last_seq - gap.first_seq + 1);
                apart.push(Gap { first_seq, readings: share(gap.readings, part, whole), ..gap });
            }
            _ => apart.push(gap),
        }
    }
    apart
}

/// What is gathered of a gateway over its lanes.
#[derive(Default)]
struct Books {
    totals: Totals,
    /// Readings that the lane `readings` of each epoch is known to have, and whether it is settled.
    sealed: BTreeMap<String, (i64, bool)>,
    /// First and last `sealed_at` of each epoch.
    active: BTreeMap<String, (Timestamp, Timestamp)>,
}

impl Books {
    fn enter(&mut self, key: &LaneKey, input: &LaneInput, rows: &[LedgerRow], settled: bool) {
        let sum = |of: fn(&LedgerRow) -> i64| rows.iter().map(of).sum::<i64>();
        if key.lane == NAMELESS {
            self.totals.unnumbered += sum(|r| r.expected);
            return;
        }
        if let Some((from, to)) = input.received.active {
            let span = self.active.entry(key.epoch.clone()).or_insert((from, to));
            *span = (span.0.min(from), span.1.max(to));
        }
        if key.lane == Lane::Readings.as_str() {
            self.sealed.insert(key.epoch.clone(), (sum(|r| r.expected), settled));
            self.totals.add(&Totals {
                stored: sum(|r| r.stored),
                quarantined: sum(|r| r.quarantined),
                declared: sum(|r| r.declared),
                duplicates: sum(|r| r.duplicates),
                erased: sum(|r| r.erased),
                pending: sum(|r| r.pending),
                missing: sum(|r| r.missing),
                redelivered: sum(|r| r.redelivered),
                ..Totals::default()
            });
        }
    }

    fn close(mut self, site: &str, name: &str, input: &GatewayInput, now: Timestamp) -> GatewayTotals {
        let mut uncounted = 0;
        let epochs: BTreeSet<&String> = self.sealed.keys().chain(input.census.keys()).collect();
        for epoch in epochs {
            let (come, settled) = self.sealed.get(epoch).copied().unwrap_or_default();
            let census = input.census.get(epoch).copied().unwrap_or_default();
            let ahead = (come - census.sealed).max(0);
            uncounted += ahead;
            self.totals.polled += census.polled + ahead;
            self.totals.sealed += census.sealed + ahead;
            self.totals.held += census.held;
            self.totals.rejected += census.rejected;
            self.totals.skipped += census.skipped;
            // The census travels ahead of the readings: what it counted as sealed is still to come.
            let behind = (census.sealed - come).max(0);
            if settled {
                self.totals.missing += behind;
            } else {
                self.totals.pending += behind;
            }
        }
        let interrupted = input.interruptions.iter().map(|(from, to)| to.since(*from)).sum::<Duration>();
        GatewayTotals {
            site: site.to_owned(),
            gateway_id: name.to_owned(),
            totals: self.totals,
            uncounted,
            interruptions: i64::try_from(input.interruptions.len()).unwrap_or(i64::MAX),
            interrupted_seconds: i64::try_from(interrupted.as_millis().div_ceil(1000)).unwrap_or(i64::MAX),
            unknown_since: input.unknown_since(now),
            two_epochs_at_once: overlap(self.active.into_values().collect()),
        }
    }
}

/// Whether two of these spans overlap by more than clocks may err.
fn overlap(mut spans: Vec<(Timestamp, Timestamp)>) -> bool {
    spans.sort_unstable();
    let mut end: Option<Timestamp> = None;
    for (from, to) in spans {
        // Both must have gone on for longer than the slack, else a clock that was set explains it.
        let within = end.is_some_and(|end| end.min(to).since(from) > CLOCK_SLACK);
        if within {
            return true;
        }
        end = end.max(Some(to));
    }
    false
}
