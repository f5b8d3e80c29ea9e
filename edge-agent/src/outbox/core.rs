//! What the outbox decides over all lanes: what is written together, what is declared, what gives way.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Instant,
};

use arrow::array::{Array, RecordBatch, TimestampMicrosecondArray};
use common::{time::Timestamp, wire::Lane};
use uuid::Uuid;

use super::{
    Limits, OutboxError,
    control::{self, Record, closing_record, interruption_record, merge_gaps},
    generation::Message,
    lane::{LaneStore, Write},
};
use crate::{
    census::{Census, Outcome},
    seal::Draft,
};

/// The order in which lanes give way when the outbox is full; `control` never does.
pub(super) const GIVE_WAY: [Lane; 3] = [Lane::Readings, Lane::Aggregates, Lane::Anomalies];

#[derive(Debug)]
pub(super) struct Core {
    dir: PathBuf,
    limits: Limits,
    pub(super) epoch: Uuid,
    /// In the order of [`Lane::ALL`].
    pub(super) lanes: Vec<LaneStore>,
    pub(super) meta: BTreeMap<String, (u64, Vec<u8>)>,
    stamp: u64,
    declared_at: Instant,
    closed: bool,
}

impl Core {
    pub(super) fn open(dir: &Path, limits: Limits, now: Timestamp) -> Result<Self, OutboxError> {
        fs::create_dir_all(dir).map_err(OutboxError::io(dir))?;
        let trash = dir.join("trash");
        match fs::remove_dir_all(&trash) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(OutboxError::io(&trash)(e)),
            _ => {}
        }
        let epoch = Uuid::now_v7();
        let (mut lanes, mut damaged) = (Vec::new(), Vec::new());
        for lane in Lane::ALL {
            let (mut store, numbers) = LaneStore::open(dir, lane)?;
            store.begin(epoch);
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
        let dir = dir.to_owned();
        let mut core =
            Core { dir, limits, epoch, lanes, meta, stamp, declared_at: Instant::now(), closed: false };
        core.end_previous(now)?;
        for (lane, number) in damaged {
            core.set_aside(lane, number, now)?;
        }
        core.upkeep(now)?;
        Ok(core)
    }

    /// Closes the epoch before, and makes the present one durable.
    fn end_previous(&mut self, now: Timestamp) -> Result<(), OutboxError> {
        let declared = self.lane(Lane::Control).state.declared;
        for (lane, declared) in self.lanes.iter_mut().zip(declared) {
            if declared > lane.state.census_no {
                lane.state.census = Census::default();
                lane.state.census_no = declared;
            }
        }
        let control = &self.lane(Lane::Control).state;
        let previous = control.epoch.filter(|_| !control.clean);
        let mut records = Vec::new();
        if let Some(previous) = previous {
            let ended = |store: &LaneStore| {
                let state = store.state.epochs.iter().find(|e| e.epoch == previous);
                state.map_or((0, 0), |e| (e.head, e.rows))
            };
            for (lane, store) in Lane::ALL.iter().zip(&self.lanes) {
                let (head, rows) = ended(store);
                records.push(closing_record(previous, *lane, head, rows));
            }
            let last = |pick: fn(&LaneStore) -> Option<Timestamp>| self.lanes.iter().filter_map(pick).max();
            let from = last(|l| l.state.last_event).or(last(|l| l.state.at)).unwrap_or(now);
            records.push(interruption_record(previous, from.min(now), now));
        }
        self.declare(now, previous.unwrap_or(self.epoch), records, true)
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
        // last: after a crash between two lanes, sources go on before the readings that were not written.
        let home = [Lane::Readings, Lane::Aggregates, Lane::Anomalies]
            .into_iter()
            .find(|lane| carries(*lane))
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
        if self.declared_at.elapsed() >= self.limits.census_every {
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
        let records: Vec<Record> = control::census_records(counted_in, &census).chain(records).collect();
        if records.is_empty() && !always {
            return Ok(());
        }
        self.write_control(now, &records, Some(declared), false)?;
        for (store, declared) in self.lanes.iter_mut().zip(declared) {
            store.state.census = Census::default();
            store.state.census_no = declared;
        }
        Ok(())
    }

    fn write_control(
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
        if !self.closed {
            if self.declared_at.elapsed() >= self.limits.census_every {
                self.declare(now, self.epoch, Vec::new(), false)?;
            }
            self.make_room(now)?;
        }
        self.lanes.iter_mut().try_for_each(LaneStore::note)
    }

    /// Drops generations that are too old, and the oldest ones while there are too many bytes.
    fn make_room(&mut self, now: Timestamp) -> Result<(), OutboxError> {
        let limit = now - self.limits.max_age;
        for lane in GIVE_WAY {
            while let Some(number) = self.lane(lane).older_than(limit) {
                self.drop_generation(lane, number, "age", now)?;
            }
        }
        while let Some(reason) = self.shortage()? {
            let mut oldest = None;
            for lane in GIVE_WAY {
                if oldest.is_none() && self.lane(lane).holds_messages() {
                    oldest = self.lane(lane).oldest_generation()?.map(|number| (lane, number));
                }
            }
            let Some((lane, number)) = oldest else { break };
            self.drop_generation(lane, number, reason, now)?;
        }
        Ok(())
    }

    fn shortage(&self) -> Result<Option<&'static str>, OutboxError> {
        let used: u64 = GIVE_WAY.iter().map(|lane| self.lanes[*lane as usize].disk_bytes()).sum();
        if used > self.limits.max_bytes {
            return Ok(Some("full"));
        }
        let free = fs2::available_space(&self.dir).map_err(OutboxError::io(&self.dir))?;
        Ok((free < self.limits.min_free_disk).then_some("disk"))
    }

    fn drop_generation(
        &mut self,
        lane: Lane,
        number: u64,
        reason: &'static str,
        now: Timestamp,
    ) -> Result<(), OutboxError> {
        let readings = self.declare_gaps(lane, number, reason, now)?;
        tracing::warn!(%lane, number, reason, readings, "the outbox dropped its oldest messages and declared them");
        self.lane(lane).discard(number)
    }

    /// Declares what is held of a generation that cannot be read, and moves it to `quarantine/`.
    fn set_aside(&mut self, lane: Lane, number: u64, now: Timestamp) -> Result<(), OutboxError> {
        if self.lane(lane).is_active(number) {
            self.lane(lane).abandon_active()?;
        }
        let readings = self.declare_gaps(lane, number, "corrupt", now)?;
        tracing::error!(%lane, number, readings, "a damaged generation of the outbox was set aside and declared");
        self.lane(lane).quarantine(number)
    }

    fn declare_gaps(
        &mut self,
        lane: Lane,
        number: u64,
        reason: &'static str,
        now: Timestamp,
    ) -> Result<u64, OutboxError> {
        let gaps = merge_gaps(self.lane(lane).gaps(number, reason)?);
        let readings = gaps.iter().map(|g| g.readings).sum();
        let records: Vec<Record> = gaps.into_iter().map(Record::from).collect();
        if !records.is_empty() {
            let clean = self.lane(Lane::Control).state.clean;
            self.write_control(now, &records, None, clean)?;
        }
        Ok(readings)
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
            match self.lane(lane).page(from, max, max_bytes) {
                Ok(messages) => return Ok(messages),
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
