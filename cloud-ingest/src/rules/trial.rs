//! `cloud-ingest rule try`: what a rule would have done with what came in a period. Nothing is written and nobody is
//! told.
//!
//! On silver the batches are the plans, as they were for the rules that ran. On bronze they are [`SEGMENTS`] segments
//! each, decoded and judged with the quality rules that are configured now, so a redelivered message may be seen
//! twice. Joined history is as it is now, not as it was then, and nothing is in `live`.

use std::{collections::BTreeMap, fmt, sync::Arc};

use anyhow::{Context, ensure};
use arrow::{
    array::{AsArray, BooleanArray, RecordBatch},
    compute::filter_record_batch,
    datatypes::TimestampMicrosecondType,
};
use common::time::{Clock, HOUR_MICROS, Timestamp};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    Failure, Rule, Sink,
    alerts::Alerts,
    batch::{self, Batch, Span},
    publish, rows, subscribed,
};
use crate::{
    lake::{SegmentName, Table},
    pack::{Hour, Pack, Segments},
    pipeline,
    plan::{Plan, REFINE},
    serve::{
        live::{Keep, Live},
        sql::Limits,
    },
    settings::Settings,
    silver::{Answers, Segment, Step},
    tables::Tables,
    upkeep::read_plan,
};

/// Segments of a batch that is read from bronze.
const SEGMENTS: usize = 16;
/// Plans of later days may hold segments of this one that were found late.
const LATE: i64 = 24 * HOUR_MICROS;

/// Where a rule is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum On {
    /// What came, decoded anew.
    Bronze,
    /// What was made of it.
    Silver,
}

/// What is tried on.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Which layer.
    pub on: On,
    /// What was received from then on ...
    pub from: Timestamp,
    /// ... up to and without then.
    pub to: Timestamp,
    /// Most payloads that are shown.
    pub show: usize,
}

/// What a rule would have done.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the names are those of the JSON")]
pub struct Report {
    pub rule: String,
    pub on: On,
    pub from: Timestamp,
    pub to: Timestamp,
    pub batches: u64,
    pub rows: u64,
    /// Batches that it failed on, and rows that fit no topic.
    pub failed: u64,
    pub first_failure: Option<String>,
    /// Alerts begun or changed, and ended; still active at the end.
    pub alerts: u64,
    pub alerts_resolved: u64,
    pub alerts_active: u64,
    /// MQTT messages.
    pub messages: u64,
    /// Rows of its table.
    pub table_rows: u64,
    /// What the sink would have got: the first ones.
    pub payloads: Vec<Value>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for payload in &self.payloads {
            writeln!(f, "{payload}")?;
        }
        let Report { rule, from, to, batches, rows, failed, alerts, .. } = self;
        let Report { alerts_resolved, alerts_active, messages, table_rows, .. } = self;
        let told = alerts + alerts_resolved + messages + table_rows;
        let shown = self.payloads.len() as u64;
        if shown < told {
            writeln!(f, "… and {} more (--show)", told - shown)?;
        }
        writeln!(f, "{rule}, received from {from} to {to}: {batches} batches, {rows} rows found")?;
        write!(
            f,
            "it would have begun or changed {alerts} alerts and resolved {alerts_resolved} ({alerts_active} active at \
             the end), published {messages} messages, stored {table_rows} rows"
        )?;
        match &self.first_failure {
            Some(why) => write!(f, "\nfailed {failed} times, first: {why}"),
            None => Ok(()),
        }
    }
}

/// Runs the rule over the period.
///
/// # Errors
/// When the lake cannot be read.
pub async fn run(
    settings: &Settings,
    tables: &Tables,
    clock: Arc<dyn Clock>,
    rule: &Rule,
    options: &Options,
) -> anyhow::Result<Report> {
    let Options { on, from, to, .. } = *options;
    ensure!(from < to, "--from {from} is not before --to {to}");
    let tables = tables.bounded(settings.rules.memory_limit)?;
    let mut trial = Trial {
        rule,
        limits: Limits { timeout: settings.rules.timeout, rows: settings.rules.rows },
        own: subscribed(settings),
        show: options.show,
        live: Live::new(Keep::default(), clock),
        alerts: Alerts::default(),
        report: Report {
            rule: rule.settings.name.clone(),
            on,
            from,
            to,
            batches: 0,
            rows: 0,
            failed: 0,
            first_failure: None,
            alerts: 0,
            alerts_resolved: 0,
            alerts_active: 0,
            messages: 0,
            table_rows: 0,
            payloads: Vec::new(),
        },
    };
    match on {
        On::Silver => silver(&tables, &mut trial, from, to).await?,
        On::Bronze => bronze(settings, &tables, &mut trial, from, to).await?,
    }
    trial.report.alerts_active = trial.alerts.active() as u64;
    Ok(trial.report)
}

async fn silver(
    tables: &Tables,
    trial: &mut Trial<'_>,
    from: Timestamp,
    to: Timestamp,
) -> anyhow::Result<()> {
    let readings = tables.snapshot(Table::SensorReadings).await?.context("silver holds nothing yet")?;
    let newest = Tables::progress(&readings, REFINE).await?.and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
    // The first plan that reaches into the period; hours of plans rise, but for what was found late.
    let (mut low, mut high) = (1, newest + 1);
    while low < high {
        let middle = low + (high - low) / 2;
        let reaches =
            hours(&read_plan(tables.store(), middle).await?).is_some_and(|(_, last)| last >= from.hour());
        (low, high) = if reaches { (low, middle) } else { (middle + 1, high) };
    }
    for n in low..=newest {
        let plan = read_plan(tables.store(), n).await?;
        let Some((first, last)) = hours(&plan) else { continue };
        if first.as_micros() > to.as_micros() + LATE {
            break;
        }
        if last < from.hour() || first >= to {
            continue;
        }
        let span = Span::of(tables, &plan, (from.as_micros(), to.as_micros() - 1)).await?;
        let at = span.at;
        trial.batch(tables, i64::try_from(n)?, &Batch::Plan(span), at).await?;
    }
    Ok(())
}

/// The first and the last hour of a plan's segments.
fn hours(plan: &Plan) -> Option<(Timestamp, Timestamp)> {
    let hours = || plan.segments.iter().filter_map(|path| SegmentName::parse(path)).map(|name| name.hour);
    Some((hours().min()?, hours().max()?))
}

async fn bronze(
    settings: &Settings,
    tables: &Tables,
    trial: &mut Trial<'_>,
    from: Timestamp,
    to: Timestamp,
) -> anyhow::Result<()> {
    let (store, rules) = (tables.store(), Arc::new(pipeline::rules(settings)));
    let segments = Segments::new(store);
    let mut hour = from.hour();
    let mut batches = 0;
    while hour < to {
        let found = Hour::list(store, hour).await.context("listing bronze")?;
        let mut names: std::collections::BTreeSet<SegmentName> = found.segments.into_keys().collect();
        for (name, size) in found.packs {
            names.extend(Pack::open(store, &name, size).await?.segments());
        }
        let names: Vec<String> = names.iter().map(SegmentName::path).collect();
        for paths in names.chunks(SEGMENTS) {
            let read = segments.read(paths).await?;
            let read = paths.iter().zip(read).filter_map(|(path, rows)| {
                let rows = received(&rows?, from, to);
                Some(rows.map(|rows| Segment { path: path.clone(), rows }))
            });
            let read = read.collect::<anyhow::Result<Vec<_>>>()?;
            let last = read.iter().filter_map(|segment| newest(&segment.rows)).max();
            let Some(at) = last else { continue };
            batches += 1;
            let rules = Arc::clone(&rules);
            let refined = tokio::task::spawn_blocking(move || {
                Step::read(&rules, batches, &read, &Default::default())?.settle(&Answers::new())
            });
            let rows: BTreeMap<Table, Vec<RecordBatch>> = refined.await??.tables.into_iter().collect();
            trial.batch(tables, batches, &Batch::Rows(rows), at).await?;
        }
        hour = Timestamp::from_micros(hour.as_micros() + HOUR_MICROS);
    }
    Ok(())
}

/// The messages of a segment that came in the period.
fn received(rows: &RecordBatch, from: Timestamp, to: Timestamp) -> anyhow::Result<RecordBatch> {
    let at = rows.column_by_name("received_at").context("column received_at")?;
    let at = at.as_primitive::<TimestampMicrosecondType>();
    let mask: BooleanArray =
        at.values().iter().map(|at| Some((from.as_micros()..to.as_micros()).contains(at))).collect();
    Ok(filter_record_batch(rows, &mask)?)
}

fn newest(rows: &RecordBatch) -> Option<Timestamp> {
    let at = rows.column_by_name("received_at")?.as_primitive::<TimestampMicrosecondType>();
    at.values().iter().max().copied().map(Timestamp::from_micros)
}

struct Trial<'a> {
    rule: &'a Rule,
    limits: Limits,
    own: Vec<String>,
    show: usize,
    live: Live,
    alerts: Alerts,
    report: Report,
}

impl Trial<'_> {
    /// One batch, at the time when the last of it came.
    async fn batch(&mut self, tables: &Tables, n: i64, batch: &Batch, at: Timestamp) -> anyhow::Result<()> {
        let context = batch::session(tables, &self.rule.needs, batch, &self.live).await?;
        self.report.batches += 1;
        if let Sink::Alert(sink) = &self.rule.sink {
            for ended in self.alerts.tick(sink.resolve_after, at) {
                self.report.alerts_resolved += 1;
                self.show(json!({ "plan": n, "alert": ended.for_webhook() }));
            }
        }
        let found = match self.rule.run(&context, self.limits).await {
            Ok(found) => rows(&found),
            Err(e) => {
                self.failed(1, format!("plan {n}: {}", Failure::of(&e).text));
                return Ok(());
            }
        };
        self.report.rows += found.len() as u64;
        let name = &self.rule.settings.name;
        match &self.rule.sink {
            Sink::Alert(sink) => match self.alerts.apply(name, sink, &found, at) {
                Ok(changed) => {
                    for alert in changed {
                        let count = if alert.ended_at.is_some() {
                            &mut self.report.alerts_resolved
                        } else {
                            &mut self.report.alerts
                        };
                        *count += 1;
                        self.show(json!({ "plan": n, "alert": alert.for_webhook() }));
                    }
                }
                Err(e) => self.failed(1, format!("plan {n}: {e}")),
            },
            Sink::Mqtt(topic) => {
                let (messages, refused) = publish::outgoing(name, topic, &self.own, n, found);
                self.report.messages += messages.len() as u64;
                for message in messages {
                    let publish::Outgoing { topic, id, payload } = message;
                    self.show(json!({ "plan": n, "topic": topic, "id": id, "payload": payload }));
                }
                if let Some(why) = refused.first() {
                    self.failed(refused.len() as u64, format!("plan {n}: {why}"));
                }
            }
            Sink::Table(table) => {
                self.report.table_rows += found.len() as u64;
                for row in found {
                    self.show(json!({ "plan": n, "table": table.name(), "row": row }));
                }
            }
        }
        Ok(())
    }

    fn failed(&mut self, times: u64, why: String) {
        self.report.failed += times;
        self.report.first_failure.get_or_insert(why);
    }

    fn show(&mut self, payload: Value) {
        if self.report.payloads.len() < self.show {
            self.report.payloads.push(payload);
        }
    }
}
