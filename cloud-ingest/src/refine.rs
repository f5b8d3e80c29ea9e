//! The refiner: carries out plans, and puts the next one when the last is done. The shell around
//! [`crate::plan`] and [`crate::silver`].
//!
//! A step at any moment of which the program may die:
//!
//! 1. Plan n is the newest. If `sensor_readings` lacks `txn("refine", n)`, plan n is carried out (again).
//! 2. Otherwise new segments are listed, plan n + 1 is put, and carried out.
//!
//! Carrying out commits table by table ([`COMMIT_ORDER`](crate::silver::COMMIT_ORDER)); a table that has n
//! skips it. What is read of silver to decide is what the plans before n committed: of `messages` those of n are
//! left out, and of `sensor_readings`, too, where another refiner was faster. So a second try gives the same rows,
//! and whoever was overtaken knows as much as if it had been first.
//!
//! [`replay`] carries out plans that judge quarantine again.

pub(crate) mod replay;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use arrow::{
    array::{Array, AsArray, RecordBatch},
    datatypes::{Float64Type, Int64Type, TimestampMicrosecondType},
};
use common::time::{Clock, HOUR_MICROS, Timestamp};
use datafusion::{
    common::TableReference,
    logical_expr::Expr,
    prelude::{ident, lit},
    scalar::ScalarValue,
};
use deltalake::DeltaTable;
use futures::TryStreamExt;
use object_store::{ObjectMeta, ObjectStoreExt, PutMode, PutOptions, path::Path};
use tokio::{sync::watch, time::Instant};
use uuid::Uuid;

use crate::{
    lake::{self, SegmentName, Table},
    metrics::Metrics,
    pack::Segments,
    plan::{Limits, Listed, Plan, Planned, REFINE},
    quality::Rules,
    silver::{Answers, Counts, Known, Name, Question, Segment, Step, names},
    store::Store,
    tables::{SMALL_FILES, TIERS, Tables, TablesError},
    upkeep::{Plans, plans},
};

/// Everything is listed at the start and then this often.
const FULL_LISTING: Duration = Duration::from_secs(86_400);
/// The last two hours are listed this often; between, the known writers are followed.
const LISTING: Duration = Duration::from_secs(10);
/// With more writers than this a listing costs less than asking for the next segment of each.
const FOLLOWED: usize = 8;
/// A step begins so long after the one before unless more waits than that one took: its commits cost the same, however
/// little is in them.
const PACE: Duration = Duration::from_secs(1);
/// Tables are looked at for small files after so many plans.
const COMPACT_EVERY: u64 = 16;
/// Devices that are remembered as warned about.
const WARNED: usize = 10_000;

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing new.
    Idle,
    /// A plan was carried out.
    Refined(Counts),
}

/// Another refiner has judged quarantine again by the plan: its readings are no longer told from others.
#[derive(Debug, thiserror::Error)]
#[error("another refiner has carried it out")]
struct Overtaken;

/// Called before each commit; an error ends the step there. Tests cut the power with it.
pub type BeforeCommit = Arc<dyn Fn(Table) -> anyhow::Result<()> + Send + Sync>;

/// One refiner.
pub struct Refiner {
    store: Store,
    segments: Segments,
    tables: Tables,
    rules: Arc<Rules>,
    rules_hash: String,
    limits: Limits,
    metrics: Metrics,
    before_commit: Option<BeforeCommit>,
    /// What the log and the lake said; `None` when they must be asked again.
    state: Option<State>,
    warned: HashSet<(String, String)>,
    /// Whether something new is in bronze, as far as anybody knows.
    expects: bool,
    /// Small files being packed, beside the steps.
    packing: Packing,
}

/// A task that ends with its owner; it may end at any moment.
#[derive(Default)]
struct Packing(Option<tokio::task::JoinHandle<()>>);

impl Drop for Packing {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// What a refiner knows of the lake.
struct State {
    /// The newest plan.
    newest: Option<Plan>,
    /// Whether `sensor_readings` has it.
    done: bool,
    planned: Planned,
    known: Known,
    /// Version of each table at which its progress is known, and that progress.
    progress: BTreeMap<Table, (Option<u64>, i64)>,
    listed_all: Option<Timestamp>,
    /// Unless something was listed that no plan has yet.
    recent: Option<Recent>,
}

/// Where new segments are looked for.
enum Place {
    /// After the newest of each writer.
    After(BTreeMap<Uuid, SegmentName>),
    /// In the last two hours.
    Lately,
    /// In all of bronze.
    Everywhere,
}

/// Of the last two hours.
struct Recent {
    listed_at: Timestamp,
    /// The newest segment of each writer; plans have them all.
    writers: BTreeMap<Uuid, SegmentName>,
}

impl Recent {
    /// After a listing that plans have all of.
    fn of(listed_at: Timestamp, listed: &[Listed]) -> Recent {
        let mut writers = BTreeMap::new();
        for Listed { name, .. } in listed {
            let newest = writers.entry(name.writer).or_insert(*name);
            *newest = (*newest).max(*name);
        }
        Recent { listed_at, writers }
    }
}

impl Refiner {
    /// A refiner that makes new plans with `rules`.
    pub fn new(store: &Store, tables: &Tables, rules: Rules, limits: Limits, metrics: Metrics) -> Self {
        Self {
            store: store.clone(),
            segments: Segments::new(store),
            tables: tables.clone(),
            rules_hash: rules.hash(),
            rules: Arc::new(rules),
            limits,
            metrics,
            before_commit: None,
            state: None,
            warned: HashSet::new(),
            expects: false,
            packing: Packing::default(),
        }
    }

    /// Has `hook` called before every commit.
    pub fn before_commit(&mut self, hook: BeforeCommit) {
        self.before_commit = Some(hook);
    }

    /// Reads segments there instead of in the lake that is written.
    pub fn read_from(&mut self, segments: Segments) {
        self.segments = segments;
    }

    /// Carries out a plan that is not to be put, with the rules that it names: a rebuild.
    ///
    /// # Errors
    /// As [`Self::step`]; the same plan may be carried out again.
    pub async fn replay(&mut self, plan: &Plan) -> anyhow::Result<Counts> {
        let mut state = match self.state.take() {
            Some(state) => state,
            None => self.load().await.context("reading what was rebuilt before")?,
        };
        self.rules = self.rules(&plan.rules).await?;
        self.rules_hash.clone_from(&plan.rules);
        let counts = self.carry_out(&mut state, plan).await.with_context(|| format!("plan {}", plan.n))?;
        if plan.n.is_multiple_of(COMPACT_EVERY) {
            compact(self.tables.clone()).await;
        }
        self.state = Some(state);
        Ok(counts)
    }

    /// Something new is in bronze: if no writer that is known has it, the next step lists.
    pub fn expect(&mut self) {
        self.expects = true;
    }

    /// Whether more is in bronze than the last step took.
    fn is_behind(&self) -> bool {
        self.state.as_ref().is_some_and(|state| state.recent.is_none())
    }

    /// Number of the newest plan that is known here; 0 for none.
    pub fn newest(&self) -> u64 {
        self.state.as_ref().and_then(|state| state.newest.as_ref()).map_or(0, |plan| plan.n)
    }

    /// Carries out the newest plan if it is not done; otherwise makes and carries out the next. `everything`
    /// lists all of bronze instead of looking for what is new in the last two hours.
    ///
    /// # Errors
    /// The store's or another refiner's doing; the next step begins by asking the lake again.
    pub async fn step(&mut self, now: Timestamp, everything: bool) -> anyhow::Result<Outcome> {
        loop {
            let mut state = match self.state.take() {
                Some(state) => state,
                None => self.load().await.context("reading the plans and what silver holds")?,
            };
            match self.advance(&mut state, now, everything).await {
                Err(error) if error.is::<Overtaken>() => {}
                // `state` is put back only when the step succeeds.
                outcome => {
                    let outcome = outcome?;
                    self.state = Some(state);
                    return Ok(outcome);
                }
            }
        }
    }

    async fn advance(
        &mut self,
        state: &mut State,
        now: Timestamp,
        everything: bool,
    ) -> anyhow::Result<Outcome> {
        if state.done {
            let all =
                everything || state.listed_all.is_none_or(|at| now.since(at) >= FULL_LISTING || now < at);
            let recent = state.recent.take().filter(|recent| {
                let lately = recent.listed_at <= now && now.since(recent.listed_at) < LISTING;
                lately && !all && recent.writers.len() <= FOLLOWED
            });
            let (listed, listed_at) = self.find(state, recent, now, all).await.context("listing bronze")?;
            let n = state.newest.as_ref().map_or(1, |plan| plan.n + 1);
            let Some(next) = state.planned.next(n, &self.rules_hash, &listed, self.limits, &state.known)
            else {
                if all {
                    state.listed_all = Some(now);
                }
                state.recent = Some(Recent::of(listed_at, &listed));
                return Ok(Outcome::Idle);
            };
            let plan = self.put(next).await?;
            state.planned.note(&plan);
            if listed.iter().all(|segment| state.planned.contains(segment.name)) {
                state.recent = Some(Recent::of(listed_at, &listed));
            }
            state.newest = Some(plan);
            state.done = false;
        }
        self.complete(state).await
    }

    /// Carries out the newest plan, if there is one.
    async fn complete(&mut self, state: &mut State) -> anyhow::Result<Outcome> {
        let Some(plan) = state.newest.clone() else { return Ok(Outcome::Idle) };
        let counts = self.carry_out(state, &plan).await.with_context(|| format!("plan {}", plan.n))?;
        state.done = true;
        // Large files take seconds, for which what comes should not have to wait.
        let idle = self.packing.0.as_ref().is_none_or(tokio::task::JoinHandle::is_finished);
        if plan.n.is_multiple_of(COMPACT_EVERY) && idle {
            self.packing = Packing(Some(tokio::spawn(compact(self.tables.clone()))));
        }
        Ok(Outcome::Refined(counts))
    }

    async fn load(&self) -> anyhow::Result<State> {
        let readings = self.tables.snapshot(Table::SensorReadings).await?;
        let messages = self.tables.snapshot(Table::Messages).await?;
        let Plans { mut planned, known, since, last, next } = plans(&self.store, readings.as_ref()).await?;
        next.iter().for_each(|plan| planned.note(plan));
        let (done, newest) = (next.is_none(), next.or(last));
        let known = match known {
            Some(before) => self.known(before.into(), since, readings, messages).await?,
            None => self.known(Known::default(), None, readings, messages).await?,
        };
        let progress = BTreeMap::new();
        Ok(State { newest, done, planned, known, progress, listed_all: None, recent: None })
    }

    /// `known`, and what silver holds that was received from `since` on.
    async fn known(
        &self,
        mut known: Known,
        since: Option<Timestamp>,
        readings: Option<DeltaTable>,
        messages: Option<DeltaTable>,
    ) -> anyhow::Result<Known> {
        let session = self
            .tables
            .session_of(vec![(Table::SensorReadings, readings), (Table::Messages, messages)])
            .await?;
        let received = since.map_or_else(String::new, |at| format!("and received_at >= timestamp '{at}'"));
        let sql = format!(
            "select site, device_id, min(ts) f, max(ts) t from silver.sensor_readings \
             where true {received} group by site, device_id"
        );
        for batch in session.sql(&sql).await?.collect().await? {
            let texts = [0, 1].map(|i| batch.column(i).as_string::<i32>());
            let [from, to] = [2, 3].map(|i| micros(&batch, i));
            let (from, to) = (from?, to?);
            for row in 0..batch.num_rows() {
                let [site, device] = texts.map(|column| column.value(row).to_owned());
                known.readings(site, device, from[row], to[row]);
            }
        }
        let sql = format!(
            "select site, gateway_id, epoch, lane, min(seq) f, max(seq) t from silver.messages \
             where epoch <> '' {received} group by site, gateway_id, epoch, lane"
        );
        for batch in session.sql(&sql).await?.collect().await? {
            let texts = [0, 1, 2, 3].map(|i| batch.column(i).as_string::<i32>());
            let seqs = [4, 5].map(|i| batch.column(i).as_primitive::<Int64Type>());
            for row in 0..batch.num_rows() {
                let [site, gateway, epoch, lane] = texts.map(|column| column.value(row).to_owned());
                known.messages(site, gateway, epoch, lane, (seqs[0].value(row), seqs[1].value(row)));
            }
        }
        Ok(known)
    }

    /// New segments, perhaps among others, and when they were last listed: looks further and further, but beyond
    /// the last two hours only for `all`, or for what is expected and was not found. With what is found comes all that
    /// was put before it.
    async fn find(
        &mut self,
        state: &State,
        recent: Option<Recent>,
        now: Timestamp,
        all: bool,
    ) -> anyhow::Result<(Vec<Listed>, Timestamp)> {
        let expects = std::mem::take(&mut self.expects);
        let followed = recent.map(|recent| (Place::After(recent.writers), recent.listed_at));
        let lately = !all && (expects || followed.is_none());
        let mut places: Vec<_> = followed.into_iter().collect();
        if lately {
            places.push((Place::Lately, now));
        }
        // What could not be put for hours stands in the hour in which it was received.
        if all || expects {
            places.push((Place::Everywhere, now));
        }
        let mut found = (Vec::new(), now);
        for (place, at) in places {
            found = (self.segments_in(&place, now).await?, at);
            let new = found.0.iter().filter(|segment| !state.planned.contains(segment.name));
            let Some(newest) = new.map(|segment| segment.put_at).max() else { continue };
            // Looking takes a while, in which a writer that was looked at first may put what another's segment that
            // was found later speaks of.
            let again = self.segments_in(&place, now).await?;
            found.0.extend(again.into_iter().filter(|segment| segment.put_at <= newest));
            break;
        }
        Ok(found)
    }

    async fn segments_in(&self, place: &Place, now: Timestamp) -> anyhow::Result<Vec<Listed>> {
        let hour = now.hour();
        let folders = match place {
            Place::After(writers) => return self.follow(now, writers).await,
            Place::Lately => {
                let before = Timestamp::from_micros(hour.as_micros() - HOUR_MICROS);
                vec![lake::bronze_hour(before), lake::bronze_hour(hour)]
            }
            Place::Everywhere => vec![lake::BRONZE.to_owned()],
        };
        let mut listed = Vec::new();
        for folder in folders {
            let objects = self.store.objects();
            let mut found = objects.list(Some(&Path::from(folder)));
            while let Some(object) = found.try_next().await? {
                if let Some(name) = SegmentName::parse(object.location.as_ref()) {
                    listed.push(found_as(name, &object));
                }
            }
        }
        Ok(listed)
    }

    /// The newest segment of each writer and those that follow it by number, in its hour or in this one.
    async fn follow(
        &self,
        now: Timestamp,
        writers: &BTreeMap<Uuid, SegmentName>,
    ) -> anyhow::Result<Vec<Listed>> {
        let mut found = Vec::new();
        for newest in writers.values() {
            let mut newest = Listed { put_at: Timestamp::default(), name: *newest, bytes: 0 };
            loop {
                let mut next = None;
                for hour in BTreeSet::from([newest.name.hour, now.hour().max(newest.name.hour)]) {
                    let name = SegmentName { hour, number: newest.name.number + 1, ..newest.name };
                    next = match self.store.objects().head(&Path::from(name.path())).await {
                        Ok(object) => Some(found_as(name, &object)),
                        Err(object_store::Error::NotFound { .. }) => next,
                        Err(e) => return Err(e.into()),
                    };
                }
                found.push(newest);
                match next {
                    Some(next) => newest = next,
                    None => break,
                }
            }
        }
        Ok(found)
    }

    /// Puts the plan, or takes the one that another refiner has put in its place.
    async fn put(&self, plan: Plan) -> anyhow::Result<Plan> {
        let objects = self.store.objects();
        let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let rules = Path::from(lake::rules(&plan.rules));
        match objects.put_opts(&rules, self.rules.to_toml().into(), create.clone()).await {
            Ok(_) | Err(object_store::Error::AlreadyExists { .. }) => {}
            Err(e) => return Err(e).context("keeping the quality rules"),
        }
        let path = Path::from(lake::plan(plan.n));
        let text = serde_json::to_vec(&plan)?;
        match objects.put_opts(&path, text.into(), create).await {
            Ok(_) => Ok(plan),
            Err(object_store::Error::AlreadyExists { .. }) => {
                tracing::info!(plan = plan.n, "another refiner has put this plan");
                Ok(serde_json::from_slice(&objects.get(&path).await?.bytes().await?)?)
            }
            Err(e) => Err(e).with_context(|| format!("putting {path}")),
        }
    }

    async fn rules(&self, hash: &str) -> anyhow::Result<Arc<Rules>> {
        if hash == self.rules_hash {
            return Ok(Arc::clone(&self.rules));
        }
        let path = Path::from(lake::rules(hash));
        let bytes = self.store.objects().get(&path).await?.bytes().await?;
        let text = std::str::from_utf8(&bytes).with_context(|| format!("reading {path}"))?;
        Ok(Arc::new(Rules::from_toml(text).with_context(|| format!("reading {path}"))?))
    }

    async fn carry_out(&mut self, state: &mut State, plan: &Plan) -> anyhow::Result<Counts> {
        if let Some(replay) = &plan.replay {
            return self.judge_again(state, plan, replay).await;
        }
        let n = i64::try_from(plan.n)?;
        let rules = self.rules(&plan.rules).await?;
        let segments = self.read(&plan.segments).await?;
        let mut doubtful = Vec::new();
        for segment in &segments {
            doubtful.extend(names(segment)?.into_iter().filter(|name| state.known.may_hold(name)));
        }
        let committed = self.committed_messages(n, &doubtful).await.context("looking messages up")?;
        // Decoding is work for the processor; the other tasks of this thread go on meanwhile.
        let known = std::mem::take(&mut state.known);
        let read = tokio::task::spawn_blocking(move || {
            let mut step = Step::read(&rules, n, &segments, &committed)?;
            let questions = step.questions(&known);
            anyhow::Ok((step, known, questions))
        });
        let (step, known, questions) = read.await??;
        state.known = known;
        let answers =
            self.committed_readings(state, plan, &questions).await.context("looking readings up")?;
        let refined = tokio::task::spawn_blocking(move || step.settle(&answers)).await??;
        for (table, rows) in refined.tables {
            self.commit(state, table, rows, n).await?;
        }
        state.known.extend(refined.news);
        self.warn(refined.offenders);
        let counts = refined.counts;
        self.metrics.refined(plan.n, counts);
        tracing::debug!(plan = n, segments = plan.segments.len(), ?counts, "refined");
        Ok(counts)
    }

    async fn read(&self, paths: &[String]) -> anyhow::Result<Vec<Segment>> {
        let rows = self.segments.read(paths).await?;
        let segments = paths.iter().zip(rows).map(|(path, rows)| {
            let rows = rows.with_context(|| format!("bronze does not hold {path}, which the plan names"))?;
            Ok(Segment { path: path.clone(), rows })
        });
        segments.collect()
    }

    /// Payload hashes of messages that plans before `n` have committed.
    async fn committed_messages(&self, n: i64, doubtful: &[Name]) -> anyhow::Result<HashMap<Name, String>> {
        let mut committed = HashMap::new();
        let Some(messages) = self.tables.snapshot(Table::Messages).await? else { return Ok(committed) };
        let wanted: HashSet<&Name> = doubtful.iter().collect();
        let (Some(first), Some(last)) =
            (doubtful.iter().map(|n| n.seq).min(), doubtful.iter().map(|n| n.seq).max())
        else {
            return Ok(committed);
        };
        let epochs: BTreeSet<&str> = doubtful.iter().map(|name| name.epoch.as_str()).collect();
        let session = self.tables.session_of(vec![(Table::Messages, Some(messages))]).await?;
        let predicate = ident("epoch")
            .in_list(epochs.into_iter().map(lit).collect(), false)
            .and(ident("seq").between(lit(first), lit(last)))
            .and(ident("plan").lt(lit(n)))
            .and(Expr::Not(Box::new(ident("redelivered"))));
        let rows = session
            .table(TableReference::partial("silver", Table::Messages.name()))
            .await?
            .filter(predicate)?
            .select_columns(&["site", "gateway_id", "epoch", "lane", "payload_sha256", "seq"])?
            .collect()
            .await?;
        for batch in rows {
            let texts = [0, 1, 2, 3, 4].map(|i| batch.column(i).as_string::<i32>());
            let seqs = batch.column(5).as_primitive::<Int64Type>();
            for row in 0..batch.num_rows() {
                let [site, gateway, epoch, lane, hash] = texts.map(|column| column.value(row).to_owned());
                let name = Name { site, gateway, epoch, lane, seq: seqs.value(row) };
                if wanted.contains(&name) {
                    committed.insert(name, hash);
                }
            }
        }
        Ok(committed)
    }

    /// Readings that plans before this one have committed. With its own, what is new would be taken for known, and what is
    /// known of their devices be less than there is.
    async fn committed_readings(
        &self,
        state: &mut State,
        plan: &Plan,
        questions: &[Question],
    ) -> anyhow::Result<Answers> {
        let mut answers = Answers::new();
        let Some(readings) = self.tables.snapshot(Table::SensorReadings).await? else { return Ok(answers) };
        let (Some(from), Some(to)) =
            (questions.iter().map(|q| q.from).min(), questions.iter().map(|q| q.to).max())
        else {
            return Ok(answers);
        };
        let done = has_step(state, Table::SensorReadings, Some(&readings), i64::try_from(plan.n)?).await?;
        if done && plan.replay.is_some() {
            return Err(Overtaken.into());
        }
        let wanted: HashMap<(&str, &str), &Question> =
            questions.iter().map(|q| ((q.site.as_str(), q.device.as_str()), q)).collect();
        let sites: BTreeSet<&str> = questions.iter().map(|q| q.site.as_str()).collect();
        let devices: BTreeSet<&str> = questions.iter().map(|q| q.device.as_str()).collect();
        let instant = |micros| lit(ScalarValue::TimestampMicrosecond(Some(micros), Some("UTC".into())));
        let predicate = ident("ts")
            .between(instant(from), instant(to))
            .and(ident("site").in_list(sites.into_iter().map(lit).collect(), false))
            .and(ident("device_id").in_list(devices.into_iter().map(lit).collect(), false));
        let predicate = if done {
            let own = plan.segments.iter().map(|path| lit(path.as_str())).collect();
            predicate.and(ident("segment").in_list(own, true))
        } else {
            predicate
        };
        let session = self.tables.session_of(vec![(Table::SensorReadings, Some(readings))]).await?;
        let mut rows = session
            .table(TableReference::partial("silver", Table::SensorReadings.name()))
            .await?
            .filter(predicate)?
            .select_columns(&["site", "device_id", "quality", "unit", "ts", "value"])?
            .execute_stream()
            .await?;
        while let Some(batch) = rows.try_next().await? {
            let texts = [0, 1, 2, 3].map(|i| batch.column(i).as_string::<i32>());
            let ts = micros(&batch, 4)?;
            let values = batch.column(5).as_primitive::<Float64Type>();
            for (row, ts) in ts.iter().enumerate() {
                let [site, device, quality, unit] = texts.map(|column| column.value(row));
                if wanted.get(&(site, device)).is_some_and(|q| (q.from..=q.to).contains(ts)) {
                    let value = values.is_valid(row).then(|| values.value(row));
                    let of_device = answers.entry((site.to_owned(), device.to_owned())).or_default();
                    of_device.insert(*ts, (value, quality.to_owned(), unit.to_owned()));
                }
            }
        }
        Ok(answers)
    }

    async fn commit(
        &self,
        state: &mut State,
        table: Table,
        rows: Vec<RecordBatch>,
        n: i64,
    ) -> anyhow::Result<()> {
        if let Some(hook) = &self.before_commit {
            hook(table)?;
        }
        let base = self.tables.snapshot(table).await?;
        if has_step(state, table, base.as_ref(), n).await? {
            return Ok(());
        }
        let version = self.tables.append(table, base, rows, (REFINE, n)).await?;
        state.progress.insert(table, (u64::try_from(version).ok(), n));
        Ok(())
    }

    fn warn(&mut self, offenders: BTreeMap<(String, String), String>) {
        for ((site, device), reason) in offenders {
            if self.warned.len() < WARNED && self.warned.insert((site.clone(), device.clone())) {
                tracing::warn!(site, device, reason, "readings quarantined");
            }
        }
    }
}

/// Packs the small files of every table that a plan writes.
async fn compact(tables: Tables) {
    for table in crate::silver::COMMIT_ORDER {
        match tables.compact(table, &TIERS, SMALL_FILES).await {
            Ok(_) => {}
            Err(TablesError::Conflict { table, reason }) => tracing::info!(table, reason, "not compacted"),
            Err(e) => tracing::warn!(error = %e, "not compacted"),
        }
    }
}

fn found_as(name: SegmentName, object: &ObjectMeta) -> Listed {
    let put_at = Timestamp::from_micros(object.last_modified.timestamp_micros());
    Listed { put_at, name, bytes: object.size }
}

/// Whether a table has step `n`.
async fn has_step(
    state: &mut State,
    table: Table,
    base: Option<&DeltaTable>,
    n: i64,
) -> anyhow::Result<bool> {
    let Some(base) = base else { return Ok(false) };
    let progress = match state.progress.get(&table) {
        Some((version, progress)) if *version == base.version() => *progress,
        _ => Tables::progress(base, REFINE).await?.unwrap_or(0),
    };
    if progress >= n {
        state.progress.insert(table, (base.version(), progress));
    }
    Ok(progress >= n)
}

/// Steps until `bronze` closes and everything in it is refined. `bronze` changes whenever a segment becomes
/// durable in this process, and is looked at within a second; segments of others are found every `interval`. `refined`
/// has the newest plan that is in silver, and closes at the end.
pub async fn run(
    mut refiner: Refiner,
    clock: Arc<dyn Clock>,
    mut bronze: watch::Receiver<u64>,
    interval: Duration,
    refined: watch::Sender<u64>,
) {
    const FIRST_RETRY: Duration = Duration::from_millis(500);
    let mut retry = FIRST_RETRY;
    let mut ended = false;
    loop {
        // What was put until now, the step finds.
        bronze.borrow_and_update();
        let began = Instant::now();
        match refiner.step(clock.now(), ended).await {
            Ok(Outcome::Refined(_)) => {
                retry = FIRST_RETRY;
                refined.send_replace(refiner.newest());
                if !refiner.is_behind() {
                    rest(&mut bronze, began + PACE).await;
                }
            }
            Ok(Outcome::Idle) if ended => return,
            Ok(Outcome::Idle) => {
                retry = FIRST_RETRY;
                tokio::select! {
                    changed = bronze.changed() => {
                        ended = changed.is_err();
                        refiner.expect();
                    }
                    () = tokio::time::sleep(interval) => {}
                }
            }
            Err(e) => {
                refiner.metrics.refine_failed();
                tracing::error!(error = format!("{e:#}"), retry_in = ?retry, "refinement stands still");
                tokio::time::sleep(retry).await;
                retry = (retry * 2).min(Duration::from_secs(30));
            }
        }
        ended = ended || bronze.has_changed().is_err();
    }
}

/// Waits until `at`, or until bronze closes.
async fn rest(bronze: &mut watch::Receiver<u64>, at: Instant) {
    let closed = async { while bronze.changed().await.is_ok() {} };
    tokio::select! {
        () = tokio::time::sleep_until(at) => {}
        () = closed => {}
    }
}

/// A column of instants in µs, whichever time zone it is labelled with.
pub(crate) fn micros(batch: &RecordBatch, column: usize) -> anyhow::Result<Vec<i64>> {
    let column = arrow::compute::cast(batch.column(column), &common::wire::instant())?;
    Ok(column.as_primitive::<TimestampMicrosecondType>().values().to_vec())
}
