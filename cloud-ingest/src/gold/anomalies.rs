//! `gold/anomaly_events`: one row an event, merged from what silver received of it in any order.
//!
//! An event has ended when any of its records says so, and the record with the highest score gives score,
//! threshold and severity. All else is the same in every record of an event; the one that was received last wins.

use std::{collections::BTreeMap, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray},
    error::ArrowError,
};
use common::time::{HOUR_MICROS, Timestamp};
use deltalake::DeltaTable;

use super::{
    changes,
    publish::{self, Keyed, Progress, SILVER},
    series::{floats, floor_hour, ints, micros, text},
};
use crate::{
    lake::{Table, year_month},
    tables::Tables,
};

const EVENTS: Keyed = Keyed {
    table: Table::AnomalyEvents,
    time: Some("started_at"),
    closed: None,
    key: &["event_id", "started_at"],
};

/// One record of silver/anomalies, and one row of gold when merged.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "as the columns of silver/anomalies")]
pub struct Event {
    pub event_id: String,
    pub asset_id: Option<String>,
    pub device_id: Option<String>,
    pub model: String,
    pub model_sha256: String,
    pub severity: String,
    pub score: f64,
    pub threshold: f64,
    pub started_at: Timestamp,
    pub ended_at: Option<Timestamp>,
    pub reason: Option<String>,
    pub site: String,
    pub gateway_id: String,
    /// Orders records of one event: `received_at` in µs, then seq.
    pub order: (i64, i64),
}

/// One event for each id, whatever the order of the records.
pub fn merge(records: impl IntoIterator<Item = Event>) -> Vec<Event> {
    let mut events: BTreeMap<String, Event> = BTreeMap::new();
    for record in records {
        match events.get_mut(&record.event_id) {
            Some(event) => *event = merged(event, &record),
            None => {
                events.insert(record.event_id.clone(), record);
            }
        }
    }
    let mut events: Vec<Event> = events.into_values().collect();
    events.sort_by(|a, b| a.started_at.cmp(&b.started_at).then_with(|| a.event_id.cmp(&b.event_id)));
    events
}

fn merged(a: &Event, b: &Event) -> Event {
    let (older, newer) = if a.order <= b.order { (a, b) } else { (b, a) };
    let worst = if older.score.total_cmp(&newer.score).is_gt() { older } else { newer };
    Event {
        severity: worst.severity.clone(),
        score: worst.score,
        threshold: worst.threshold,
        started_at: older.started_at.min(newer.started_at),
        ended_at: older.ended_at.max(newer.ended_at),
        // Why it ended, once it has; else why it was raised.
        reason: if older.ended_at > newer.ended_at { older.reason.clone() } else { newer.reason.clone() }
            .or_else(|| older.reason.clone()),
        ..newer.clone()
    }
}

pub(super) async fn step(tables: &Tables, now: Timestamp) -> anyhow::Result<usize> {
    let Some(silver) = tables.snapshot(Table::Anomalies).await? else { return Ok(0) };
    let version = changes::version(&silver);
    let gold = tables.snapshot(EVENTS.table).await?;
    if let Some(gold) = &gold
        && Tables::progress(gold, SILVER).await? == Some(version)
    {
        return Ok(0);
    }
    let events = events(&silver).await?;
    // All the time in which there is an event, here or in gold.
    let mut times: Vec<Timestamp> = events.iter().map(|e| e.started_at).collect();
    if let Some(gold) = &gold {
        times.extend(changes::hours_in(gold, None, "started_at", std::time::Duration::ZERO).await?);
    }
    let (Some(first), Some(last)) = (times.iter().min(), times.iter().max()) else { return Ok(0) };
    let end = Timestamp::from_micros(floor_hour(last.as_micros()) + HOUR_MICROS);
    let spans = std::slice::from_ref(&(first.hour()..end)).to_vec();
    publish::publish(tables, EVENTS, &spans, batch(&events)?, Progress::Complete(version), now).await
}

/// All events of silver/anomalies.
pub(super) async fn events(silver: &DeltaTable) -> anyhow::Result<Vec<Event>> {
    let context = changes::context(&[("t", Some(silver), None)]).await?;
    let mut records = Vec::new();
    for batch in context.sql("SELECT * FROM t").await?.collect().await? {
        records.extend(read(&batch)?);
    }
    Ok(merge(records))
}

fn read(batch: &RecordBatch) -> anyhow::Result<Vec<Event>> {
    let texts = |name: &str| text(batch, name);
    let (id, asset, device) = (texts("event_id")?, texts("asset_id")?, texts("device_id")?);
    let (model, sha256, severity) = (texts("model")?, texts("model_sha256")?, texts("severity")?);
    let (reason, site, gateway) = (texts("reason")?, texts("site")?, texts("gateway_id")?);
    let (score, threshold) = (floats(batch, "score")?, floats(batch, "threshold")?);
    let (started, ended) = (micros(batch, "started_at")?, micros(batch, "ended_at")?);
    let (received, seq) = (micros(batch, "received_at")?, ints(batch, "seq")?);
    let maybe = |array: &StringArray, row: usize| (!array.is_null(row)).then(|| array.value(row).to_owned());
    Ok((0..batch.num_rows())
        .map(|row| Event {
            event_id: id.value(row).to_owned(),
            asset_id: maybe(&asset, row),
            device_id: maybe(&device, row),
            model: model.value(row).to_owned(),
            model_sha256: sha256.value(row).to_owned(),
            severity: severity.value(row).to_owned(),
            score: score.value(row),
            threshold: threshold.value(row),
            started_at: Timestamp::from_micros(started.value(row)),
            ended_at: (!ended.is_null(row)).then(|| Timestamp::from_micros(ended.value(row))),
            reason: maybe(&reason, row),
            site: site.value(row).to_owned(),
            gateway_id: gateway.value(row).to_owned(),
            order: (received.value(row), seq.value(row)),
        })
        .collect())
}

fn batch(events: &[Event]) -> Result<RecordBatch, ArrowError> {
    let texts = |of: &dyn Fn(&Event) -> Option<String>| -> ArrayRef {
        Arc::new(events.iter().map(of).collect::<StringArray>())
    };
    let started =
        TimestampMicrosecondArray::from_iter_values(events.iter().map(|e| e.started_at.as_micros()));
    let ended: TimestampMicrosecondArray =
        events.iter().map(|e| e.ended_at.map(Timestamp::as_micros)).collect();
    RecordBatch::try_new(
        EVENTS.table.schema(),
        vec![
            texts(&|e| Some(e.event_id.clone())),
            texts(&|e| e.asset_id.clone()),
            texts(&|e| e.device_id.clone()),
            texts(&|e| Some(e.model.clone())),
            texts(&|e| Some(e.model_sha256.clone())),
            texts(&|e| Some(e.severity.clone())),
            Arc::new(Float64Array::from_iter_values(events.iter().map(|e| e.score))),
            Arc::new(Float64Array::from_iter_values(events.iter().map(|e| e.threshold))),
            Arc::new(started.with_timezone("UTC")),
            Arc::new(ended.with_timezone("UTC")),
            texts(&|e| e.reason.clone()),
            texts(&|e| Some(e.site.clone())),
            texts(&|e| Some(e.gateway_id.clone())),
            Arc::new(Int64Array::from_iter_values(events.iter().map(|e| year_month(e.started_at).0))),
            Arc::new(Int64Array::from_iter_values(events.iter().map(|e| year_month(e.started_at).1))),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_merge_in_any_order() {
        let at = Timestamp::from_micros;
        let raised = Event {
            event_id: "e".into(),
            severity: "warning".into(),
            score: 3.5,
            started_at: at(100),
            order: (1, 0),
            ..Event::default()
        };
        let worse = Event { severity: "critical".into(), score: 9.0, order: (2, 1), ..raised.clone() };
        let cleared = Event {
            score: 1.0,
            ended_at: Some(at(500)),
            reason: Some("cleared".into()),
            order: (3, 2),
            ..raised.clone()
        };
        let other = Event { event_id: "f".into(), started_at: at(50), ..raised.clone() };
        let records = [raised, worse, cleared, other];
        let expected = merge(records.clone());
        assert_eq!(expected.len(), 2);
        assert_eq!(expected[0].event_id, "f");
        let event = &expected[1];
        assert_eq!((event.score, event.severity.as_str()), (9.0, "critical"));
        assert_eq!((event.ended_at, event.reason.as_deref()), (Some(at(500)), Some("cleared")));
        for order in [[3, 2, 1, 0], [2, 0, 1, 3], [1, 3, 0, 2], [0, 2, 3, 1]] {
            assert_eq!(merge(order.map(|i| records[i].clone())), expected, "{order:?}");
        }
        // A record that came twice changes nothing.
        assert_eq!(merge(records.iter().chain(&records).cloned()), expected);
    }
}
