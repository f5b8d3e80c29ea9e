//! What there is to rebuild: the lake as it stood when it began, and which of its plans.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context;
use arrow::array::RecordBatch;
use common::time::Timestamp;
use datafusion::prelude::SessionContext;
use deltalake::DeltaTable;
use futures::{Stream, StreamExt, TryStreamExt};
use object_store::{ObjectStore, path::Path};

use super::Options;
use crate::{
    gold::{GoldSettings, windows},
    lake::{self, PackName, SegmentName, Table},
    pack::Pack,
    plan::{Plan, Planned, REFINE},
    ranges::Ranges,
    store::Store,
    tables::{Tables, conform},
    upkeep::{is_not_found, read_plan},
};

/// Missing segments that are listed; all are counted.
const LISTED: usize = 100;
/// Plans that are read ahead.
const READ_AHEAD: usize = 16;

/// The lake as it stood at one moment.
pub(super) struct Standing {
    pub(super) snapshots: BTreeMap<Table, DeltaTable>,
    pub(super) session: SessionContext,
    /// The newest plan that is done.
    pub(super) plan: u64,
    /// Hours that gold had yet to compute.
    pub(super) pending: BTreeSet<Timestamp>,
    /// The first hour of gold that is not final.
    pub(super) floor: Option<Timestamp>,
}

impl Standing {
    pub(super) async fn pin(lake: &Store, gold: &GoldSettings) -> anyhow::Result<Standing> {
        const TRIES: usize = 100;
        let tables = Tables::open(lake).await?;
        for _ in 0..TRIES {
            let snapshots = snapshots(&tables).await?;
            let pending = windows::pending(&tables, &gold.calendars, gold.hold).await?;
            let readings =
                snapshots.get(&Table::SensorReadings).context("there is no silver/sensor_readings")?;
            let aggregates = snapshots.get(&Table::Aggregates);
            let floor = windows::floor(&tables, readings, aggregates, gold.hold).await?;
            let versions =
                |of: &BTreeMap<Table, DeltaTable>| of.values().map(DeltaTable::version).collect::<Vec<_>>();
            // Silver and gold of one moment: nothing came while they were looked at.
            if versions(&snapshots) == versions(&self::snapshots(&tables).await?) {
                let plan = Tables::progress(readings, REFINE)
                    .await?
                    .and_then(|n| u64::try_from(n).ok())
                    .unwrap_or(0);
                let of_all = Table::ALL.into_iter().map(|table| (table, snapshots.get(&table).cloned()));
                let session = tables.session_of(of_all.collect()).await?;
                return Ok(Standing { snapshots, session, plan, pending, floor });
            }
        }
        anyhow::bail!("the lake changes all the time; raise refine.interval for as long as it takes to begin")
    }

    pub(super) async fn retained(&self, table: Table) -> anyhow::Result<Option<Timestamp>> {
        match self.snapshots.get(&table) {
            Some(snapshot) => Tables::retained(snapshot).await,
            None => Ok(None),
        }
    }

    /// The rows of a table, in its types.
    pub(super) async fn rows(
        &self,
        table: Table,
        condition: &str,
    ) -> anyhow::Result<impl Stream<Item = anyhow::Result<RecordBatch>> + use<>> {
        let sql = format!("select * from {}.{} where {condition}", table.layer(), table.name());
        let rows = self.session.sql(&sql).await?.execute_stream().await?;
        Ok(rows.map(move |batch| conform(&batch?, table)))
    }
}

async fn snapshots(tables: &Tables) -> anyhow::Result<BTreeMap<Table, DeltaTable>> {
    let mut snapshots = BTreeMap::new();
    for table in Table::ALL {
        if let Some(snapshot) = tables.snapshot(table).await? {
            snapshots.insert(table, snapshot);
        }
    }
    Ok(snapshots)
}

/// Which plans are replayed, and what is taken over.
pub(super) struct Chosen {
    /// The last plan that is replayed.
    pub(super) last: u64,
    /// Segments whose rows are taken over.
    pub(super) taken: Planned,
    /// Plans with such segments; those that have no other ones.
    pub(super) touched: Ranges,
    pub(super) whole: Ranges,
    /// Segments of later plans.
    pub(super) later: Planned,
    pub(super) missing: u64,
    pub(super) listed: Vec<String>,
}

impl Chosen {
    pub(super) async fn of(lake: &Store, standing: &Standing, options: &Options) -> anyhow::Result<Chosen> {
        let present = present(lake).await.context("listing bronze")?;
        let mut chosen = Chosen {
            last: standing.plan,
            taken: Planned::default(),
            touched: Ranges::exact(),
            whole: Ranges::exact(),
            later: Planned::default(),
            missing: 0,
            listed: Vec::new(),
        };
        let mut before = options.from.is_some();
        let mut plans = std::pin::pin!(plans(lake, 1, standing.plan));
        while let Some(plan) = plans.try_next().await? {
            let names: Vec<SegmentName> = plan.reads().collect();
            if chosen.last < plan.n
                || options.to.is_some_and(|to| names.iter().any(|name| name.hour >= to.hour()))
            {
                chosen.last = chosen.last.min(plan.n - 1);
                names.iter().for_each(|name| chosen.later.insert(*name));
                continue;
            }
            // What judges quarantine again reads nothing new: its rows are taken with those of their first plan.
            if plan.replay.is_some() {
                let taken = names.iter().filter(|name| chosen.taken.contains(**name)).count();
                chosen.note(plan.n, taken, names.len())?;
                continue;
            }
            if before && options.from.is_some_and(|from| names.iter().any(|name| name.hour >= from.hour())) {
                before = false;
            }
            let mut taken = 0;
            for name in &names {
                let missing = !before && !present.contains(*name);
                if missing {
                    chosen.missing += 1;
                    if chosen.listed.len() < LISTED {
                        chosen.listed.push(name.path());
                    }
                }
                if before || missing {
                    chosen.taken.insert(*name);
                    taken += 1;
                }
            }
            chosen.note(plan.n, taken, names.len())?;
        }
        // A refiner may be in the midst of the next one.
        match read_plan(lake, standing.plan + 1).await {
            Ok(next) => next.reads().for_each(|name| chosen.later.insert(name)),
            Err(e) if is_not_found(&e) => {}
            Err(e) => return Err(e),
        }
        Ok(chosen)
    }

    /// Notes how many of a plan's segments are taken over.
    fn note(&mut self, n: u64, taken: usize, of: usize) -> anyhow::Result<()> {
        let n = i64::try_from(n)?;
        if taken > 0 {
            self.touched.insert(n, n);
        }
        if taken == of {
            self.whole.insert(n, n);
        }
        Ok(())
    }

    pub(super) fn is_taken(&self, n: u64) -> bool {
        i64::try_from(n).is_ok_and(|n| self.whole.contains(n))
    }
}

/// Plans `first` to `last`, in order.
pub(super) fn plans(lake: &Store, first: u64, last: u64) -> impl Stream<Item = anyhow::Result<Plan>> + use<> {
    let lake = lake.clone();
    futures::stream::iter(first..=last)
        .map(move |n| {
            let lake = lake.clone();
            async move { read_plan(&lake, n).await.with_context(|| format!("plan {n}")) }
        })
        .buffered(READ_AHEAD)
}

/// The segments that bronze holds, packed or not.
async fn present(lake: &Store) -> anyhow::Result<Planned> {
    let objects = lake.objects();
    let mut present = Planned::default();
    let mut listed = objects.list(Some(&Path::from(lake::BRONZE)));
    while let Some(object) = listed.try_next().await? {
        let path = object.location.as_ref();
        if let Some(name) = SegmentName::parse(path) {
            present.insert(name);
        } else if let Some(name) = PackName::parse(path) {
            Pack::open(lake, &name, object.size).await?.segments().for_each(|name| present.insert(name));
        }
    }
    Ok(present)
}
