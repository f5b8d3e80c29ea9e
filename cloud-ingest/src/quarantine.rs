//! `cloud-ingest quarantine`: what is held and why, and what comes of it when it is judged again.

use std::{fmt, time::Duration};

use arrow::{
    array::{Array, AsArray, Int64Array, RecordBatch},
    datatypes::Int64Type,
};
use common::time::Timestamp;
use datafusion::{
    common::TableReference,
    functions_aggregate::expr_fn::{first_value, max, min, sum},
    logical_expr::Expr,
    prelude::{DataFrame, ident, lit},
};
use serde::Serialize;

use crate::{
    gold::{self, GoldSettings},
    lake::Table,
    plan::Selection,
    quality::mend,
    refine::{Refiner, micros, replay::selected},
    tables::Tables,
};

/// Lines that are listed as text; as JSON all are.
const LISTED: usize = 50;

/// Readings of one device that one rule holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// The rule.
    pub rule: String,
    /// The plant, where it is known.
    pub site: Option<String>,
    /// The device; `None` for whole messages.
    pub device_id: Option<String>,
    /// Its type, as it was sent.
    pub device_type: Option<String>,
    /// How many.
    pub readings: i64,
    /// When the first and the last of them were received.
    pub first: Timestamp,
    /// See `first`.
    pub last: Timestamp,
    /// The first reason.
    pub sample: String,
    /// The line of configuration that lets them pass, where there is one.
    pub mend: Option<String>,
}

/// What is in quarantine and not resolved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Holdings {
    /// In all.
    pub readings: i64,
    /// The most readings first.
    pub lines: Vec<Line>,
}

impl fmt::Display for Holdings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in self.lines.iter().take(LISTED) {
            let Line { rule, site, device_id, readings, first, last, sample, mend, .. } = line;
            let device = device_id.as_deref().unwrap_or("whole messages");
            let site = site.as_deref().unwrap_or("?");
            writeln!(f, "{readings:>9}  {rule:<11}  {site}: {device}, received {first} to {last}")?;
            writeln!(f, "           {sample}")?;
            mend.iter().try_for_each(|mend| writeln!(f, "           to let it pass: {mend}"))?;
        }
        if let Some(more) = self.lines.len().checked_sub(LISTED).filter(|more| *more > 0) {
            writeln!(f, "… and {more} more; --json lists all")?;
        }
        write!(f, "{} readings in quarantine", self.readings)
    }
}

/// What came of a replay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Done {
    /// The plans that did it.
    pub plans: Vec<u64>,
    /// Readings that left quarantine: into silver, or found to be there already.
    pub resolved: i64,
    /// Readings that are held for another reason now.
    pub held_anew: i64,
    /// Readings that are held, of those that were to be judged.
    pub held: i64,
    /// Rows of gold that this changed; `None` when it is left to the role refine.
    pub gold: Option<usize>,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Done { plans, resolved, held_anew, held, gold } = self;
        let n = plans.len();
        write!(
            f,
            "{resolved} readings have left quarantine in {n} plans, {held_anew} are held for another reason; "
        )?;
        write!(f, "{held} of what was to be judged are still held")?;
        match gold {
            Some(rows) => write!(f, "; {rows} rows of gold were corrected"),
            None => write!(f, "; gold is left to the role refine"),
        }
    }
}

/// What is held of `of`.
///
/// # Errors
/// When the lake cannot be read.
pub async fn held(tables: &Tables, of: &Selection) -> anyhow::Result<Holdings> {
    let keys = ["rule", "site", "device_id", "device_type"].map(ident);
    let by_time = vec![ident("received_at").sort(true, false), ident("offset").sort(true, false)];
    let found = vec![
        sum(ident("readings")).alias("readings"),
        min(ident("received_at")).alias("first"),
        max(ident("received_at")).alias("last"),
        first_value(ident("reason"), by_time).alias("sample"),
    ];
    let rows = quarantine(tables, of).await?.aggregate(keys.to_vec(), found)?;
    let mut holdings = Holdings::default();
    for batch in rows.collect().await? {
        lines(&batch, &mut holdings.lines)?;
    }
    let order = |line: &Line| (-line.readings, line.rule.clone(), line.site.clone(), line.device_id.clone());
    holdings.lines.sort_by_key(order);
    holdings.readings = holdings.lines.iter().map(|line| line.readings).sum();
    Ok(holdings)
}

fn lines(batch: &RecordBatch, lines: &mut Vec<Line>) -> anyhow::Result<()> {
    let text = |column: usize, row: usize| {
        let column = batch.column(column).as_string::<i32>();
        column.is_valid(row).then(|| column.value(row).to_owned())
    };
    let readings: &Int64Array = batch.column(4).as_primitive::<Int64Type>();
    let (first, last) = (micros(batch, 5)?, micros(batch, 6)?);
    for row in 0..batch.num_rows() {
        let rule = text(0, row).unwrap_or_default();
        let (device_id, device_type) = (text(2, row), text(3, row));
        let mend = mend(
            &rule,
            device_id.as_deref().unwrap_or("DEVICE"),
            device_type.as_deref().filter(|t| !t.is_empty()).unwrap_or("TYPE"),
        );
        lines.push(Line {
            site: text(1, row),
            readings: readings.value(row),
            first: Timestamp::from_micros(first[row]),
            last: Timestamp::from_micros(last[row]),
            sample: text(7, row).unwrap_or_default(),
            rule,
            device_id,
            device_type,
            mend,
        });
    }
    Ok(())
}

/// Judges what is held of `of` again, by the refiner's rules, and brings gold up to date.
///
/// # Errors
/// See [`Refiner::replay_quarantine`].
pub async fn replay(
    refiner: &mut Refiner,
    tables: &Tables,
    of: &Selection,
    gold: &GoldSettings,
    now: Timestamp,
) -> anyhow::Result<Done> {
    let plans = refiner.replay_quarantine(of, now).await?;
    let mut done =
        Done { plans, held: total(quarantine(tables, of).await?, "readings").await?, ..Done::default() };
    if done.plans.is_empty() {
        return Ok(done);
    }
    let results = tables.snapshot(Table::QualityResults).await?;
    let session = tables.session_of(vec![(Table::QualityResults, results)]).await?;
    let plans = done.plans.iter().map(|n| lit(*n)).collect::<Vec<Expr>>();
    let all = ident("rule").eq(lit("all"));
    let results = session
        .table(TableReference::partial("ops", Table::QualityResults.name()))
        .await?
        .filter(all.and(ident("plan").in_list(plans, false)))?;
    done.resolved = total(results.clone(), "passed").await?;
    done.held_anew = total(results, "failed").await?;
    for pause in [50, 500, 5_000] {
        match gold::step(tables, gold, now).await {
            Ok(step) => {
                done.gold = Some(step.windows.hourly + step.windows.minutes);
                break;
            }
            // A running gold step is at the same hours.
            Err(error) => tracing::info!(error = format!("{error:#}"), "gold once more"),
        }
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    Ok(done)
}

/// The rows that are not resolved and match.
async fn quarantine(tables: &Tables, of: &Selection) -> anyhow::Result<DataFrame> {
    let snapshot = tables.snapshot(Table::Quarantine).await?;
    let session = tables.session_of(vec![(Table::Quarantine, snapshot)]).await?;
    let rows = session.table(TableReference::partial("silver", Table::Quarantine.name())).await?;
    Ok(selected(rows, of)?)
}

async fn total(rows: DataFrame, column: &str) -> anyhow::Result<i64> {
    let batches = rows.aggregate(Vec::new(), vec![sum(ident(column))])?.collect().await?;
    Ok(batches
        .iter()
        .map(|batch| batch.column(0).as_primitive::<Int64Type>())
        .flat_map(|n| n.iter().flatten())
        .sum())
}
