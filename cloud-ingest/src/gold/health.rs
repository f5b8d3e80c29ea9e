//! `gold/asset_health`: how much of an hour a machine spent in anomalies, and how bad they were.
//!
//! A row for each asset and hour in which one of its devices has a row in `gold/hourly_aggregates`; anomalies of
//! assets that send nothing have none. Events are those of `gold/anomaly_events` that name the asset.
//!
//! * An event lasts from `started_at` to `ended_at`. One that has not ended lasts, within each hour, until the last
//!   minute in which the asset has a value ends, and `hold` longer (15 min by default): for so long something is known.
//! * `anomaly_minutes`: how long at least one event lasted within the hour.
//! * At each moment an event weighs 1 when its severity is `critical`, else 0.5; of several of one device the heaviest
//!   counts. A device's weight is that over the hour, from 0 to 1 (critical for the whole hour).
//! * `device_id`: the device with the greatest weight, the first by name of equal ones; null when no event lasted, or
//!   the heaviest name no device.
//! * `health_index` = 100 · (1 − the greatest weight). The weakest part decides, as in condition monitoring's
//!   worst-case roll-up (ISO 13374's health assessment, MIMOSA OSA-CBM), since a mean over devices would hide a bearing
//!   that fails behind twenty sensors that are well. 100 says that no model raised an alarm, not that one watched.
//! * `health_index` is null when none of the asset's devices has a reading that is not bad in the hour
//!   (`count` = 0): then nothing is known.
//!
//! A row hangs on its hour of readings and on the events that last within it; a record of an event touches all hours
//! from the event's start on. Hours that are final ([`super::windows`]) are final here, too.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use arrow::{
    array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray},
    error::ArrowError,
};
use common::time::{HOUR_MICROS, Timestamp};
use deltalake::DeltaTable;

use super::{
    GoldSettings,
    anomalies::{self, Event},
    changes,
    publish::{self, Keyed, Progress},
    series::{ints, micros, text},
    windows::{self, Due, Silver},
};
use crate::{
    lake::{Table, year_month},
    tables::Tables,
};

pub(super) const HEALTH: Keyed =
    Keyed { table: Table::AssetHealth, time: Some("hour"), closed: None, key: &["hour", "site", "asset_id"] };
const MINUTE_MICROS: i64 = 60_000_000;

/// What an hour was like.
#[derive(Clone, Debug, PartialEq)]
struct Health {
    index: f64,
    anomaly_minutes: f64,
    device: Option<String>,
}

/// Of one asset's events. `hour` is in µs; until `known` lasts what has not ended.
fn health(events: &[&Event], hour: &Range<i64>, known: i64) -> Health {
    let mut all = Vec::new();
    let mut devices: BTreeMap<Option<&str>, Vec<(Range<i64>, f64)>> = BTreeMap::new();
    for event in events {
        let end = event.ended_at.map_or(known, Timestamp::as_micros).min(hour.end);
        let lasts = event.started_at.as_micros().max(hour.start)..end;
        if lasts.start < lasts.end {
            let weight = if event.severity == "critical" { 1.0 } else { 0.5 };
            all.push((lasts.clone(), 1.0));
            devices.entry(event.device_id.as_deref()).or_default().push((lasts, weight));
        }
    }
    let (mut heaviest, mut device) = (0.0, None);
    for (name, events) in &devices {
        let weight = weight(events) / (hour.end - hour.start) as f64;
        // Of equal ones the first by name; none comes before all names.
        if weight > heaviest || (weight >= heaviest && device.is_none()) {
            (heaviest, device) = (weight, *name);
        }
    }
    Health {
        index: 100.0 * (1.0 - heaviest),
        anomaly_minutes: weight(&all) / MINUTE_MICROS as f64,
        device: device.map(str::to_owned),
    }
}

/// The greatest weight at each moment, added up over time (µs).
fn weight(events: &[(Range<i64>, f64)]) -> f64 {
    let ends: BTreeSet<i64> = events.iter().flat_map(|(lasts, _)| [lasts.start, lasts.end]).collect();
    let ends: Vec<i64> = ends.into_iter().collect();
    let pieces = ends.windows(2).map(|piece| {
        let lasting = events.iter().filter(|(lasts, _)| lasts.contains(&piece[0]));
        lasting.map(|(_, weight)| *weight).fold(0.0, f64::max) * (piece[1] - piece[0]) as f64
    });
    pieces.fold(0.0, |sum, piece| sum + piece)
}

/// Makes the hours of `due`; all of them with `None`. Hours and minutes must be up to date with `silver`. Returns how
/// many rows came, changed or went.
pub(super) async fn step(
    tables: &Tables,
    silver: &Silver,
    settings: &GoldSettings,
    due: Option<&Due>,
    now: Timestamp,
) -> anyhow::Result<usize> {
    let Some(hours) = tables.snapshot(Table::HourlyAggregates).await? else { return Ok(0) };
    let minutes = tables.snapshot(Table::Timeseries1m).await?;
    let mut touched = match due {
        Some(due) => due.hours.clone(),
        None => changes::hours_in(&hours, None, "hour", Duration::ZERO).await?,
    };
    if let Some(from) = due.and_then(|due| due.events_from) {
        touched.extend(hours_from(&hours, from).await?);
    }
    let floor = windows::floor(tables, &silver.readings, silver.aggregates.as_ref(), settings.hold).await?;
    if let Some(floor) = floor {
        touched = touched.split_off(&floor);
    }
    let events = match &silver.anomalies {
        Some(anomalies) if !touched.is_empty() => anomalies::events(anomalies).await?,
        _ => Vec::new(),
    };
    let mut of_asset: HashMap<(&str, &str), Vec<&Event>> = HashMap::new();
    for event in &events {
        if let Some(asset) = &event.asset_id {
            of_asset.entry((&event.site, asset)).or_default().push(event);
        }
    }
    let (blocks, version) = (windows::blocks(&touched), silver.version());
    let mut changed = 0;
    for (n, block) in blocks.iter().enumerate() {
        let spans = publish::spans(block);
        let rows = rows(&hours, minutes.as_ref(), &of_asset, &spans, settings.hold).await?;
        let progress = Progress::of(version, n + 1 == blocks.len());
        changed += publish::publish(tables, HEALTH, &spans, batch(&rows, now)?, progress, now).await?;
    }
    if blocks.is_empty() {
        publish::nothing(tables, HEALTH, version, now).await?;
    }
    Ok(changed)
}

/// The hours of gold from one on: those that a record of an event touches.
pub(super) async fn hours_from(hours: &DeltaTable, from: Timestamp) -> anyhow::Result<BTreeSet<Timestamp>> {
    let context = changes::context(&[("t", Some(hours), None)]).await?;
    let sql = format!("SELECT DISTINCT hour FROM t WHERE hour >= '{}'", from.hour());
    let mut found = BTreeSet::new();
    for batch in context.sql(&sql).await?.collect().await? {
        found.extend(micros(&batch, "hour")?.values().iter().map(|hour| Timestamp::from_micros(*hour)));
    }
    Ok(found)
}

struct Row {
    hour: Timestamp,
    site: String,
    asset: String,
    index: Option<f64>,
    health: Health,
}

async fn rows(
    hours: &DeltaTable,
    minutes: Option<&DeltaTable>,
    events: &HashMap<(&str, &str), Vec<&Event>>,
    spans: &[Range<Timestamp>],
    hold: Duration,
) -> anyhow::Result<Vec<Row>> {
    let context = changes::context(&[("hours", Some(hours), None), ("minutes", minutes, None)]).await?;
    let end = spans.last().map_or(Timestamp::default(), |span| span.end);
    let open = events.values().flatten().any(|e| e.ended_at.is_none() && e.started_at < end);
    // By site, asset and hour: the last minute with a value.
    let mut last: HashMap<(String, String, i64), i64> = HashMap::new();
    if open && minutes.is_some() {
        let sql = format!(
            "SELECT site, asset_id, date_trunc('hour', time) AS hour, max(time) AS last FROM minutes \
             WHERE asset_id IS NOT NULL AND ({}) GROUP BY 1, 2, 3",
            publish::predicate("time", spans)
        );
        for batch in context.sql(&sql).await?.collect().await? {
            let (site, asset) = (text(&batch, "site")?, text(&batch, "asset_id")?);
            let (hour, minute) = (micros(&batch, "hour")?, micros(&batch, "last")?);
            for row in 0..batch.num_rows() {
                let key = (site.value(row).to_owned(), asset.value(row).to_owned(), hour.value(row));
                last.insert(key, minute.value(row));
            }
        }
    }
    let sql = format!(
        "SELECT site, asset_id, hour, sum(count) AS count FROM hours \
         WHERE asset_id IS NOT NULL AND ({}) GROUP BY 1, 2, 3 ORDER BY hour, site, asset_id",
        publish::predicate("hour", spans)
    );
    let mut rows = Vec::new();
    for batch in context.sql(&sql).await?.collect().await? {
        let (site, asset) = (text(&batch, "site")?, text(&batch, "asset_id")?);
        let (hour, count) = (micros(&batch, "hour")?, ints(&batch, "count")?);
        for row in 0..batch.num_rows() {
            let key = (site.value(row).to_owned(), asset.value(row).to_owned(), hour.value(row));
            let hour = hour.value(row)..hour.value(row) + HOUR_MICROS;
            let events = events.get(&(site.value(row), asset.value(row))).map_or(&[][..], Vec::as_slice);
            let held = |minute: &i64| (Timestamp::from_micros(minute + MINUTE_MICROS) + hold).as_micros();
            let health = health(events, &hour, last.get(&key).map_or(hour.start, held));
            let (site, asset, _) = key;
            let index = (count.value(row) > 0).then_some(health.index);
            rows.push(Row { hour: Timestamp::from_micros(hour.start), site, asset, index, health });
        }
    }
    Ok(rows)
}

fn batch(rows: &[Row], now: Timestamp) -> Result<RecordBatch, ArrowError> {
    let instants = |of: &dyn Fn(&Row) -> Timestamp| -> ArrayRef {
        let instants = rows.iter().map(|r| of(r).as_micros());
        Arc::new(TimestampMicrosecondArray::from_iter_values(instants).with_timezone("UTC"))
    };
    let texts = |of: &dyn Fn(&Row) -> Option<String>| -> ArrayRef {
        Arc::new(rows.iter().map(of).collect::<StringArray>())
    };
    let ints = |of: &dyn Fn(&Row) -> i64| -> ArrayRef {
        Arc::new(Int64Array::from_iter_values(rows.iter().map(of)))
    };
    RecordBatch::try_new(
        HEALTH.table.schema(),
        vec![
            instants(&|r| r.hour),
            texts(&|r| Some(r.site.clone())),
            texts(&|r| Some(r.asset.clone())),
            Arc::new(rows.iter().map(|r| r.index).collect::<Float64Array>()),
            Arc::new(Float64Array::from_iter_values(rows.iter().map(|r| r.health.anomaly_minutes))),
            texts(&|r| r.health.device.clone()),
            ints(&|_| 0),
            instants(&|_| now),
            ints(&|r| year_month(r.hour).0),
            ints(&|r| year_month(r.hour).1),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weakest_part_decides() {
        // Events (device, severity, minutes from and to the hour's start; no end while it lasts); known for 40 minutes.
        // Index, anomaly minutes, device.
        type Lasting = (&'static str, &'static str, i64, Option<i64>);
        let check = |events: &[Lasting], index: f64, minutes: f64, device: Option<&str>| {
            let at = |minute: i64| Timestamp::from_micros(HOUR_MICROS + minute * MINUTE_MICROS);
            let events: Vec<Event> = events
                .iter()
                .map(|(device, severity, from, to)| Event {
                    device_id: (!device.is_empty()).then(|| (*device).to_owned()),
                    severity: (*severity).to_owned(),
                    started_at: at(*from),
                    ended_at: to.map(at),
                    ..Event::default()
                })
                .collect();
            let mut refs: Vec<&Event> = events.iter().collect();
            for _ in 0..2 {
                let got = health(&refs, &(HOUR_MICROS..2 * HOUR_MICROS), at(40).as_micros());
                assert!((got.index - index).abs() < 1e-9, "{got:?} of {events:?}");
                assert!((got.anomaly_minutes - minutes).abs() < 1e-9, "{got:?} of {events:?}");
                assert_eq!(got.device.as_deref(), device, "{events:?}");
                refs.reverse();
            }
        };
        check(&[], 100.0, 0.0, None);
        check(&[("a", "warning", -100, Some(100))], 50.0, 60.0, Some("a"));
        check(&[("a", "critical", -100, Some(100))], 0.0, 60.0, Some("a"));
        check(&[("a", "critical", 54, Some(100))], 90.0, 6.0, Some("a"));
        // Not in this hour.
        check(&[("a", "critical", -9, Some(0)), ("a", "critical", 60, None)], 100.0, 0.0, None);
        // Still lasting: as long as something is known.
        check(&[("a", "critical", -100, None)], 100.0 - 100.0 * 40.0 / 60.0, 40.0, Some("a"));
        check(&[("a", "critical", 50, None)], 100.0, 0.0, None);
        // The heavier of what overlaps, of one device; the heavier of two.
        let overlapping = [("a", "warning", 0, Some(30)), ("a", "critical", 24, Some(36))];
        check(&overlapping, 100.0 - 100.0 * (12.0 + 12.0) / 60.0, 36.0, Some("a"));
        check(&[("a", "warning", 0, Some(12)), ("b", "critical", 6, Some(18))], 80.0, 18.0, Some("b"));
        check(&[("b", "warning", 0, Some(12)), ("a", "critical", 20, Some(26))], 90.0, 18.0, Some("a"));
        // An event that names no device.
        check(&[("", "warning", 0, Some(12)), ("a", "warning", 0, Some(6))], 90.0, 12.0, None);
        check(&[("", "warning", 0, Some(12)), ("a", "warning", 0, Some(12))], 90.0, 12.0, Some("a"));
    }
}
