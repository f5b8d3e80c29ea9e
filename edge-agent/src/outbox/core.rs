//! What the outbox decides over all lanes: what is written together and what is declared. What gives way is decided
//! in room.rs.

use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use arrow::array::{Array, RecordBatch, TimestampMicrosecondArray};
use common::{time::Timestamp, wire::Lane};
use uuid::Uuid;

use super::{
    Limits, OutboxError,
    boots::Times,
    control::{self, Record, closing_record, interruption_record},
    generation::Message,
    lane::{LaneStore, Write},
    lock::Lock,
    room::{GIVE_WAY, Reserve, quarantined, with_bytes},
};
use crate::{
    census::{Census, Outcome},
    seal::Draft,
};

/// While so many messages of the control lane wait, nobody compares counts: they are declared once an hour only, so
/// that a long outage does not fill a lane that never gives way.
const CONTROL_BACKLOG: u64 = 64;
const CENSUS_EVERY_IN_OUTAGE: Duration = Duration::from_secs(3600);
/// Counts are declared at once when they are of so many hours and outcomes, as in a fast replay: every commit writes
/// those that wait.
const MOST_COUNTS: usize = 256;

#[derive(Debug)]
pub(super) struct Core {
    pub(super) dir: PathBuf,
    pub(super) limits: Limits,
    pub(super) epoch: Uuid,
    /// In the order of [`Lane::ALL`].
    pub(super) lanes: Vec<LaneStore>,
    pub(super) meta: BTreeMap<String, (u64, Vec<u8>)>,
    /// Generations in quarantine with their bytes, oldest first.
    pub(super) aside: VecDeque<(PathBuf, u64)>,
    pub(super) reserve: Reserve,
    pub(super) times: Times,
    stamp: u64,
    declared_at: Instant,
    closed: bool,
    _lock: Lock,
}

impl Core {
    pub(super) fn open(dir: &Path, limits: Limits, now: Timestamp) -> Result<Self, OutboxError> {
        fs::create_dir_all(dir).map_err(OutboxError::io(dir))?;
        let lock = Lock::take(dir)?;
        let trash = dir.join("trash");
        match fs::remove_dir_all(&trash) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(OutboxError::io(&trash)(e)),
            _ => {}
        }
        let mut times = Times::load(dir, now)?;
        let reserve = Reserve::open(dir)?;
        let epoch = Uuid::now_v7();
        let (mut lanes, mut damaged, mut sealed_until) = (Vec::new(), Vec::new(), None);
        for lane in Lane::ALL {
            let (mut store, numbers) = LaneStore::open(dir, lane)?;
            if lane == Lane::Readings {
                // Another lane may know of a later event, but a damaged log may have cost the readings before that.
                sealed_until = store.state.last_event.or(store.state.at);
            }
            store.begin(epoch, now, times.boot);
            damaged.extend(numbers.into_iter().map(|number| (lane, number)));
            lanes.push(store);
        }
        let mut meta = BTreeMap::<String, (u64, Vec<u8>)>::new();
        for store in &lanes {
            for (name, stamp, value) in store.meta()? {
                if meta.get(&name).is_none_or(|(known, _)| *known < stamp) {
                    meta.insert(name, (stamp, value));
                }
            }
        }
        let stamp = meta.values().map(|(stamp, _)| *stamp).max().unwrap_or(0);
        times.keep(&lanes)?;
        let mut core = Core {
            dir: dir.to_owned(),
            limits,
            epoch,
            lanes,
            meta,
            aside: quarantined(dir),
            reserve,
            times,
            stamp,
            declared_at: Instant::now(),
            closed: false,
            _lock: lock,
        };
        core.end_previous(now, sealed_until)?;
        for (lane, number) in damaged {
            core.set_aside(lane, number, now)?;
        }
        for lane in Lane::ALL {
            let gaps = core.lane(lane).take_holes();
            if !gaps.is_empty() {
                tracing::error!(%lane, ?gaps, "generations of the outbox are gone; what they held is declared");
            }
            core.declare_gaps(gaps, now)?;
        }
        core.upkeep(now)?;
        Ok(core)
    }

    /// Closes the epoch before, which has sealed all readings up to `sealed_until`, and makes the present one durable.
    fn end_previous(&mut self, now: Timestamp, sealed_until: Option<Timestamp>) -> Result<(), OutboxError> {
        let declared = self.lane(Lane::Control).state.declared;
        for (lane, declared) in self.lanes.iter_mut().zip(declared) {
            if declared > lane.state.census_no {
                lane.state.census = Census::default();
                lane.state.census_no = declared;
            }
        }
        let control = &self.lane(Lane::Control).state;
        let (last, clean) = (control.epoch, control.clean);
        self.times.boot_before =
            last.and_then(|epoch| self.lanes.iter().find_map(|lane| lane.boot_of(epoch)));
        let previous = last.filter(|_| !clean);
        let mut records = Vec::new();
        if let Some(previous) = previous {
            let ended = |store: &LaneStore| {
                let state = store.state.epochs.iter().find(|e| e.epoch == previous);
                state.map_or((0, 0), |e| (e.head, e.rows))
            };
            for (lane, store) in Lane::ALL.iter().zip(&self.lanes).filter(|(_, store)| !store.unknown) {
                let (head, rows) = ended(store);
                records.push(closing_record(previous, *lane, head, rows));
            }
            let from = sealed_until.and_then(|from| self.times.settle_kept(from)).unwrap_or(now);
            let from = if from.is_provisional() == now.is_provisional() { from.min(now) } else { from };
            records.push(interruption_record(previous, from, now));
        }
        self.declare(now, previous.unwrap_or(self.epoch), records, true)
    }

    /// Index before which no message of the lane waits for the clock to be set.
    pub(super) fn released(&self, lane: Lane) -> u64 {
        self.lanes[lane as usize].released(&self.times.boots)
    }

    pub(super) fn lane(&mut self, lane: Lane) -> &mut LaneStore {
        &mut self.lanes[lane as usize]
    }

    pub(super) fn append(
        &mut self,
        now: Timestamp,
        drafts: &[Draft],
        meta: &[(&str, Vec<u8>)],
    ) -> Result<(), OutboxError> {
        if self.closed {
            return Err(OutboxError::Closed);
        }
        self.make_room(now)?;
        let carries = |lane: Lane| drafts.iter().any(|d| d.lane == lane && d.batch.num_rows() > 0);
        // Metadata, the census of empty drafts, and how far the readings have come go with the lane that is written
        // last: after a crash between two lanes, sources go on before the readings that were not written. That of
        // readings is theirs, also when all were held back.
        let home = GIVE_WAY
            .into_iter()
            .find(|lane| carries(*lane) || *lane == Lane::Readings && drafts.iter().any(|d| d.lane == *lane))
            .unwrap_or(Lane::Readings);
        let order = GIVE_WAY.into_iter().rev().filter(|lane| *lane != home && carries(*lane)).chain([home]);
        for lane in order.collect::<Vec<_>>() {
            let mut write = Write::default();
            for draft in drafts {
                let has_rows = draft.batch.num_rows() > 0;
                if !(draft.lane == lane && has_rows || lane == home && !has_rows) {
                    continue;
                }
                count(&mut write.census, draft);
                if has_rows {
                    write.batches.push(&draft.batch);
                }
            }
            if lane == home {
                write.last_event = drafts.iter().map(|draft| draft.last_event).max();
                write.meta =
                    meta.iter().map(|(name, value)| (*name, self.stamp + 1, value.as_slice())).collect();
            }
            self.lanes[lane as usize].write(now, &write, &self.limits)?;
        }
        self.stamp += 1;
        for (name, value) in meta {
            self.meta.insert((*name).to_owned(), (self.stamp, value.clone()));
        }
        self.declare_when_due(now)
    }

    fn declare_when_due(&mut self, now: Timestamp) -> Result<(), OutboxError> {
        let in_outage = self.lane(Lane::Control).held() > CONTROL_BACKLOG;
        let every = self.limits.census_every;
        let every = if in_outage { every.max(CENSUS_EVERY_IN_OUTAGE) } else { every };
        let counts: usize = self.lanes.iter().map(|lane| lane.state.census.len()).sum();
        if self.declared_at.elapsed() >= every || counts > MOST_COUNTS {
            self.declare(now, self.epoch, Vec::new(), false)?;
        }
        Ok(())
    }

    /// Writes `records` and all counts that wait into the control lane; with `always` also when there are none.
    fn declare(
        &mut self,
        now: Timestamp,
        counted_in: Uuid,
        records: Vec<Record>,
        always: bool,
    ) -> Result<(), OutboxError> {
        self.declared_at = Instant::now();
        let mut census = Census::default();
        let mut declared = [0; 4];
        for (store, declared) in self.lanes.iter().zip(&mut declared) {
            census.merge(&store.state.census);
            *declared = store.state.census_no + 1;
        }
        let of_this = counted_in == self.epoch;
        let hours = |hour| if of_this { Some(hour) } else { self.times.settle_kept(hour) };
        let records: Vec<Record> =
            control::census_records(counted_in, &census, hours).chain(records).collect();
        if records.is_empty() && !always {
            return Ok(());
        }
        // What is declared as sealed must be in a manifest first, which can still declare it when its database is
        // damaged; and the control lane's must say what was declared.
        for lane in GIVE_WAY {
            self.lane(lane).note()?;
        }
        self.write_control(now, &records, Some(declared), false)?;
        for (store, declared) in self.lanes.iter_mut().zip(declared) {
            store.state.census = Census::default();
            store.state.census_no = declared;
        }
        self.lane(Lane::Control).note()
    }

    pub(super) fn write_control(
        &mut self,
        now: Timestamp,
        records: &[Record],
        declared: Option<[u64; 4]>,
        clean: bool,
    ) -> Result<(), OutboxError> {
        let batch = control::batch(records, now)?;
        let batches: Vec<&RecordBatch> = if records.is_empty() { Vec::new() } else { vec![&batch] };
        let write = Write { batches, declared, clean, ..Write::default() };
        self.lanes[Lane::Control as usize].write(now, &write, &self.limits)
    }

    pub(super) fn close(&mut self, now: Timestamp) -> Result<(), OutboxError> {
        if self.closed {
            return Ok(());
        }
        self.declare(now, self.epoch, Vec::new(), false)?;
        let epoch = self.epoch;
        let ends = Lane::ALL.iter().zip(&self.lanes).map(|(lane, store)| {
            let end = store.present();
            match lane {
                // The message that says so is the control lane's last one.
                Lane::Control => {
                    closing_record(epoch, *lane, end.head + 1, end.rows + Lane::ALL.len() as u64)
                }
                _ => closing_record(epoch, *lane, end.head, end.rows),
            }
        });
        let records: Vec<Record> = ends.collect();
        self.write_control(now, &records, None, true)?;
        self.closed = true;
        self.lanes.iter_mut().try_for_each(LaneStore::note)
    }

    pub(super) fn upkeep(&mut self, now: Timestamp) -> Result<(), OutboxError> {
        if self.closed {
            return self.lanes.iter_mut().try_for_each(LaneStore::note);
        }
        match self.make_room(now) {
            // What waits to be written down waits for room.
            Err(error @ OutboxError::Full { .. }) => {
                tracing::error!(%error, "nothing is accepted until there is room");
                return Ok(());
            }
            made => made?,
        }
        self.declare_when_due(now)?;
        for store in &mut self.lanes {
            store.tidy(now, &self.limits)?;
            store.note()?;
        }
        Ok(())
    }

    /// Declares what is held of a generation that cannot be read, and moves it to `quarantine/`.
    pub(super) fn set_aside(&mut self, lane: Lane, number: u64, now: Timestamp) -> Result<(), OutboxError> {
        if !self.lane(lane).has(number) {
            return Ok(());
        }
        if self.lane(lane).is_active(number) {
            let Self { lanes, meta, .. } = self;
            let meta: Vec<_> =
                meta.iter().map(|(k, (stamp, v))| (k.as_str(), *stamp, v.as_slice())).collect();
            lanes[lane as usize].abandon_active(&meta)?;
        }
        let gaps = self.lane(lane).gaps(number, "corrupt")?;
        let readings = self.declare_gaps(gaps, now)?;
        tracing::error!(%lane, number, readings, "a damaged generation of the outbox was set aside and declared");
        if let Some(path) = self.lane(lane).quarantine(number)? {
            self.aside.push_back(with_bytes(path));
        }
        // A kill must not make it declared again.
        self.lane(lane).note()
    }

    pub(super) fn page(
        &mut self,
        lane: Lane,
        from: u64,
        max: usize,
        max_bytes: usize,
        now: Timestamp,
    ) -> Result<Vec<Message>, OutboxError> {
        loop {
            let released = self.released(lane);
            match self.lane(lane).page(from..released.max(from), max, max_bytes) {
                Ok(messages) => return Ok(messages.into_iter().map(|m| self.times.boots.set(m)).collect()),
                Err((number, OutboxError::Corrupt { problem, .. })) => {
                    tracing::error!(%lane, number, problem, "a generation of the outbox cannot be read");
                    self.set_aside(lane, number, now)?;
                }
                Err((_, e)) => return Err(e),
            }
        }
    }
}

/// Adds a draft's counts; `sealed` is counted from its rows.
fn count(census: &mut Census, draft: &Draft) {
    for (hour, outcome, n) in draft.census.iter() {
        if outcome != Outcome::Sealed {
            census.add(hour, outcome, n);
        }
    }
    if draft.lane != Lane::Readings || draft.batch.num_rows() == 0 {
        return;
    }
    let times = draft.batch.column_by_name("ts");
    if let Some(times) = times.and_then(|c| c.as_any().downcast_ref::<TimestampMicrosecondArray>()) {
        for micros in times.values() {
            census.add(Timestamp::from_micros(*micros), Outcome::Sealed, 1);
        }
    }
}
