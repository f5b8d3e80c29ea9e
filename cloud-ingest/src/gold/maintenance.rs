//! `gold/maintenance_schedule`: when each asset is due for service, and why.
//!
//! * An asset has a row when its registry says `service_every_days`, `service_every_running_hours` or both.
//! * Both count from the last maintenance that was recorded; before any, from the asset's first reading.
//! * An hour's running share is that of its minutes in which the mean of the `running_when` device is above its
//!   limit; hours whose minimum is above count wholly, whose maximum is not above not at all. The share weighs
//!   by `good_ratio`: time without a good value is not running time. Only closed hours count, so the schedule
//!   changes once an hour.
//! * Running hours are projected at the mean rate since the last service, of the last [`RECENT`] at most.
//! * `due_by` is the earlier of the two; `rul_*` are null without a model for that class of asset.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use arrow::{
    array::{ArrayRef, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray},
    error::ArrowError,
};
use common::{
    reading::{Asset, RunningWhen},
    time::{HOUR_MICROS, Timestamp},
};
use datafusion::prelude::SessionContext;

use super::{
    changes,
    publish::{self, Keyed, Progress, SILVER},
    registry::Plant,
    series::{floats, micros, text},
};
use crate::{lake::Table, tables::Tables};

/// How far back the rate of running is measured.
pub const RECENT: Duration = Duration::from_secs(30 * 86_400);
const SCHEDULE: Keyed =
    Keyed { table: Table::MaintenanceSchedule, time: None, closed: None, key: &["site", "asset_id"] };

/// One row.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "as the columns of gold/maintenance_schedule")]
pub struct Due {
    pub site: String,
    pub asset_id: String,
    pub due_by: Option<Timestamp>,
    pub basis: &'static str,
    pub running_hours: Option<f64>,
    pub last_done_at: Option<Timestamp>,
    pub action: String,
    pub reason: String,
}

/// What is known of an asset.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// The last recorded maintenance.
    pub last_done_at: Option<Timestamp>,
    /// The asset's first reading.
    pub first_seen: Option<Timestamp>,
    /// Closed hours in which the `running_when` device has readings, with the hours (0 to 1) that it ran.
    pub running: Vec<(Timestamp, f64)>,
}

/// The asset's row; `None` when it has no service interval. Pure: `now` is the start of the present hour.
pub fn schedule(site: &str, asset: &Asset, history: &History, now: Timestamp) -> Option<Due> {
    if asset.service_every_days.is_none() && asset.service_every_running_hours.is_none() {
        return None;
    }
    let since = history.last_done_at.or(history.first_seen);
    let calendar = asset.service_every_days.zip(since).map(|(every, since)| since + days(every));
    let counted = since.filter(|_| asset.running_when.is_some()).map(|since| running_hours(history, since));
    let by_running =
        asset.service_every_running_hours.zip(counted).zip(since).and_then(|((every, hours), since)| {
            let left = every - hours;
            if left <= 0.0 {
                return Some(now);
            }
            let rate = recent_rate(history, since, now)?;
            Some(now + days(left / rate / 24.0))
        });
    let by_running_first = match (calendar, by_running) {
        (Some(calendar), Some(running)) => running < calendar,
        (None, None) => asset.service_every_days.is_none(),
        (calendar, _) => calendar.is_none(),
    };
    let (basis, due_by) =
        if by_running_first { ("running_hours", by_running) } else { ("calendar", calendar) };
    let from = match (history.last_done_at, history.first_seen) {
        (Some(at), _) => format!("the service of {}", date(at)),
        (None, Some(at)) => format!("the first reading on {}", date(at)),
        (None, None) => "the first reading, which has not come yet".to_owned(),
    };
    let interval = match (basis, asset.service_every_days, asset.service_every_running_hours) {
        ("calendar", Some(every), _) => format!("every {every} days"),
        (_, _, Some(every)) => match counted {
            Some(hours) => format!("every {every} running hours, {hours:.1} so far"),
            None => format!("every {every} running hours, not counted for want of running_when"),
        },
        _ => "no interval".to_owned(),
    };
    let overdue = due_by.is_some_and(|due| due <= now);
    Some(Due {
        site: site.to_owned(),
        asset_id: asset.id.clone(),
        due_by,
        basis,
        running_hours: counted,
        last_done_at: history.last_done_at,
        action: if overdue { "service now" } else { "plan service" }.to_owned(),
        reason: format!("{interval}, counted from {from}"),
    })
}

fn running_hours(history: &History, since: Timestamp) -> f64 {
    // The hour in which the service was done counts in part.
    let part = |hour: Timestamp| {
        let end = hour.as_micros() + HOUR_MICROS;
        ((end - since.as_micros()) as f64 / HOUR_MICROS as f64).clamp(0.0, 1.0)
    };
    history.running.iter().map(|(hour, ran)| ran * part(*hour)).sum()
}

/// Running hours in an hour; `None` when it did not run at all.
fn recent_rate(history: &History, since: Timestamp, now: Timestamp) -> Option<f64> {
    let from = since.max(now - RECENT);
    let hours = now.since(from).as_secs_f64() / 3600.0;
    let rate = running_hours(history, from) / hours.max(1.0);
    (rate > 0.0).then_some(rate)
}

fn days(days: f64) -> Duration {
    // A century is far enough for anybody's plan.
    Duration::from_secs_f64((days * 86_400.0).clamp(0.0, 36_525.0 * 86_400.0))
}

fn date(at: Timestamp) -> String {
    at.to_utc().format("%Y-%m-%d").to_string()
}

pub(super) async fn step(tables: &Tables, now: Timestamp) -> anyhow::Result<usize> {
    let Some(registry) = tables.snapshot(Table::Registry).await? else { return Ok(0) };
    let gold = tables.snapshot(SCHEDULE.table).await?;
    let maintenance = tables.snapshot(Table::Maintenance).await?;
    // What the schedule hangs on: what people and gateways said, and the closed hours.
    let stamp = now.hour().as_micros() / HOUR_MICROS * 1_000_000
        + (changes::version(&registry) + maintenance.as_ref().map_or(0, |m| changes::version(m) + 1))
            % 1_000_000;
    if let Some(gold) = &gold
        && Tables::progress(gold, SILVER).await? == Some(stamp)
    {
        return Ok(0);
    }
    let plant = Plant::read(&registry).await?;
    let serviced: Vec<_> = plant
        .assets
        .iter()
        .filter(|(_, a)| a.what.service_every_days.is_some() || a.what.service_every_running_hours.is_some())
        .collect();
    if serviced.is_empty() && gold.is_none() {
        return Ok(0);
    }
    let context = tables.session().await?;
    let done = last_done(&context).await?;
    let seen = first_seen(&context).await?;
    let mut rows = Vec::new();
    for ((site, id), asset) in serviced {
        let key = (site.clone(), id.clone());
        let (last_done_at, first_seen) = (done.get(&key).copied(), seen.get(&key).copied());
        let running = match (&asset.what.running_when, last_done_at.or(first_seen)) {
            (Some(when), Some(since)) => running(&context, site, when, since, now.hour()).await?,
            _ => Vec::new(),
        };
        let history = History { last_done_at, first_seen, running };
        rows.extend(schedule(site, &asset.what, &history, now.hour()));
    }
    publish::publish(tables, SCHEDULE, &[], batch(&rows, now)?, Progress::Complete(stamp), now).await
}

type ByAsset = BTreeMap<(String, String), Timestamp>;

async fn last_done(context: &SessionContext) -> anyhow::Result<ByAsset> {
    by_asset(context, "SELECT site, asset_id, max(done_at) AS at FROM silver.maintenance GROUP BY 1, 2").await
}

async fn first_seen(context: &SessionContext) -> anyhow::Result<ByAsset> {
    let sql = "SELECT site, asset_id, min(hour) AS at FROM gold.hourly_aggregates \
               WHERE asset_id IS NOT NULL GROUP BY 1, 2";
    by_asset(context, sql).await
}

async fn by_asset(context: &SessionContext, sql: &str) -> anyhow::Result<ByAsset> {
    let mut times = BTreeMap::new();
    for batch in context.sql(sql).await?.collect().await? {
        let (site, asset, at) = (text(&batch, "site")?, text(&batch, "asset_id")?, micros(&batch, "at")?);
        for row in 0..batch.num_rows() {
            let key = (site.value(row).to_owned(), asset.value(row).to_owned());
            times.insert(key, Timestamp::from_micros(at.value(row)));
        }
    }
    Ok(times)
}

/// The closed hours of a `running_when` device, and how much of each it ran.
async fn running(
    context: &SessionContext,
    site: &str,
    when: &RunningWhen,
    since: Timestamp,
    now: Timestamp,
) -> anyhow::Result<Vec<(Timestamp, f64)>> {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let (site, device, above) = (quoted(site), quoted(&when.device), when.above);
    let of = format!("site = {site} AND device_id = {device}");
    let from = since.hour();
    let sql = format!(
        "SELECT hour, min, max, good_ratio FROM gold.hourly_aggregates \
         WHERE {of} AND hour >= '{from}' AND hour < '{now}' AND count > 0 ORDER BY hour"
    );
    let mut hours = Vec::new();
    for batch in context.sql(&sql).await?.collect().await? {
        let hour = micros(&batch, "hour")?;
        let (min, max, good) =
            (floats(&batch, "min")?, floats(&batch, "max")?, floats(&batch, "good_ratio")?);
        for row in 0..batch.num_rows() {
            let share = match (min.value(row) > above, max.value(row) > above) {
                (true, _) => Some(1.0),
                (_, false) => Some(0.0),
                _ => None,
            };
            hours.push((hour.value(row), share, good.value(row)));
        }
    }
    let mut shares = HashMap::new();
    if hours.iter().any(|(_, share, _)| share.is_none()) {
        let sql = format!(
            "SELECT date_trunc('hour', time) AS hour, \
             avg(CASE WHEN mean > {above} THEN 1.0 ELSE 0.0 END) AS share FROM gold.timeseries_1m \
             WHERE {of} AND time >= '{from}' AND time < '{now}' GROUP BY 1"
        );
        for batch in context.sql(&sql).await?.collect().await? {
            let (hour, share) = (micros(&batch, "hour")?, floats(&batch, "share")?);
            shares.extend((0..batch.num_rows()).map(|row| (hour.value(row), share.value(row))));
        }
    }
    let share = |hour: i64, known: Option<f64>| known.or_else(|| shares.get(&hour).copied()).unwrap_or(0.0);
    let ran = hours
        .into_iter()
        .map(|(hour, known, good)| (Timestamp::from_micros(hour), good * share(hour, known)));
    Ok(ran.collect())
}

fn batch(rows: &[Due], now: Timestamp) -> Result<RecordBatch, ArrowError> {
    let texts = |of: &dyn Fn(&Due) -> String| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(of)))
    };
    let times = |of: &dyn Fn(&Due) -> Option<Timestamp>| -> ArrayRef {
        let times = rows.iter().map(|r| of(r).map(Timestamp::as_micros));
        Arc::new(times.collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
    };
    let unknown = || -> ArrayRef { Arc::new(Float64Array::new_null(rows.len())) };
    RecordBatch::try_new(
        SCHEDULE.table.schema(),
        vec![
            texts(&|r| r.site.clone()),
            texts(&|r| r.asset_id.clone()),
            times(&|r| r.due_by),
            texts(&|r| r.basis.to_owned()),
            Arc::new(rows.iter().map(|r| r.running_hours).collect::<Float64Array>()),
            times(&|r| r.last_done_at),
            texts(&|r| r.action.clone()),
            texts(&|r| r.reason.clone()),
            times(&|_| Some(now)),
            unknown(),
            unknown(),
            unknown(),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hour(n: i64) -> Timestamp {
        Timestamp::from_micros(n * HOUR_MICROS)
    }

    fn pump(days: Option<f64>, hours: Option<f64>) -> Asset {
        Asset {
            id: "pump".into(),
            service_every_days: days,
            service_every_running_hours: hours,
            running_when: Some(RunningWhen { device: "pump/speed".into(), above: 300.0 }),
            ..Asset::default()
        }
    }

    /// Runs half of every hour from hour 0 to 99; now is hour 100.
    fn history(last_done: Option<i64>) -> History {
        History {
            last_done_at: last_done.map(hour),
            first_seen: Some(hour(0)),
            running: (0..100).map(|n| (hour(n), 0.5)).collect(),
        }
    }

    #[test]
    fn the_earlier_basis_says_when() {
        // Service interval in days and in running hours, last done, expected: basis, hour due, running hours.
        for (every_days, every_hours, last_done, basis, due, ran) in [
            (Some(10.0), None, None, "calendar", 240, 50.0),
            (None, Some(60.0), None, "running_hours", 120, 50.0),
            (Some(10.0), Some(60.0), None, "running_hours", 120, 50.0),
            (Some(4.5), Some(60.0), None, "calendar", 108, 50.0),
            (Some(10.0), Some(60.0), Some(90), "running_hours", 210, 5.0),
            (None, Some(40.0), None, "running_hours", 100, 50.0),
        ] {
            let asset = pump(every_days, every_hours);
            let row = schedule("s", &asset, &history(last_done), hour(100)).unwrap();
            assert_eq!((row.basis, row.due_by), (basis, Some(hour(due))), "{row:?}");
            assert!((row.running_hours.unwrap() - ran).abs() < 1e-9, "{row:?}");
            assert_eq!(row.last_done_at, last_done.map(hour));
        }
    }

    #[test]
    fn what_cannot_be_known_stays_open() {
        assert_eq!(schedule("s", &pump(None, None), &history(None), hour(100)), None);
        let standing = History { running: vec![], ..history(None) };
        let row = schedule("s", &pump(None, Some(10.0)), &standing, hour(100)).unwrap();
        assert_eq!((row.due_by, row.basis, row.running_hours), (None, "running_hours", Some(0.0)));
        let row = schedule("s", &pump(Some(1.0), None), &History::default(), hour(100)).unwrap();
        assert_eq!((row.due_by, row.basis), (None, "calendar"));
        let uncounted = Asset { running_when: None, ..pump(None, Some(10.0)) };
        let row = schedule("s", &uncounted, &history(None), hour(100)).unwrap();
        assert_eq!((row.due_by, row.running_hours), (None, None));
        assert!(row.reason.contains("running_when"), "{}", row.reason);
    }
}
