//! Reads what the ledger is made of. Status first: what it lets go of is in the messages that are read after it.

use std::collections::{BTreeMap, HashMap};

use arrow::array::{Array, AsArray, Int64Array, RecordBatch, StringArray};
use common::time::Timestamp;
use datafusion::prelude::SessionContext;
use futures::TryStreamExt;

use super::account::{Gap, GatewayInput, Inputs, LaneInput, LaneKey, LaneState, Refined};
use crate::{
    gold::{
        changes::context,
        series::{column, ints, micros, text},
    },
    lake::Table,
    silver::NAMELESS,
    tables::Tables,
};

pub(super) async fn inputs(tables: &Tables) -> anyhow::Result<Inputs> {
    let status = tables.snapshot(Table::Status).await?;
    let control = tables.snapshot(Table::Control).await?;
    let messages = tables.snapshot(Table::Messages).await?;
    let context = context(&[
        ("status", status.as_ref(), None),
        ("control", control.as_ref(), None),
        ("messages", messages.as_ref(), None),
    ])
    .await?;
    let mut inputs = Inputs::default();
    if messages.is_some() {
        read_messages(&context, &mut inputs).await?;
    }
    if control.is_some() {
        read_control(&context, &mut inputs).await?;
        read_census(&context, &mut inputs).await?;
    }
    if status.is_some() {
        read_gateways(&context, &mut inputs).await?;
        read_lanes(&context, &mut inputs).await?;
    }
    Ok(inputs)
}

/// The present epoch of each gateway: the one whose first status came last. Only within an epoch does a gateway's
/// clock never go back, so only there does its own time say what is newest; a retained document may come again. A last
/// will, which names no lanes, is no beginning: of the epochs before it is known what they hold.
const NEWEST: &str = "WITH begun AS (SELECT site, gateway_id, current_epoch, min(received_at) AS began FROM status \
                      WHERE online OR lane IS NOT NULL GROUP BY site, gateway_id, current_epoch), \
                      newest AS (SELECT site, gateway_id, last_value(current_epoch ORDER BY began) AS epoch \
                      FROM begun GROUP BY site, gateway_id)";

async fn rows(context: &SessionContext, sql: &str) -> anyhow::Result<Vec<RecordBatch>> {
    Ok(context.sql(sql).await?.collect().await?)
}

fn gateway<'a>(inputs: &'a mut Inputs, site: &str, gateway: &str) -> &'a mut GatewayInput {
    inputs.gateways.entry((site.to_owned(), gateway.to_owned())).or_default()
}

async fn read_messages(context: &SessionContext, inputs: &mut Inputs) -> anyhow::Result<()> {
    let sql = "SELECT site, gateway_id, epoch, lane, seq, rows, rows_before, oldest, sealed_at, readings, stored, \
               duplicates, quarantined, redelivered, received_at FROM messages";
    let mut stream = context.sql(sql).await?.execute_stream().await?;
    // Rows by lane, found by one look at their texts.
    let mut known: HashMap<String, usize> = HashMap::new();
    let mut lanes: Vec<(LaneKey, LaneInput, i64)> = Vec::new();
    let mut name = String::new();
    while let Some(batch) = stream.try_next().await? {
        let keys = Keys::of(&batch)?;
        let [seq, count, before, oldest] =
            ["seq", "rows", "rows_before", "oldest"].map(|column| ints(&batch, column));
        let (seq, count, before, oldest) = (seq?, count?, before?, oldest?);
        let [readings, stored, duplicates, quarantined] =
            ["readings", "stored", "duplicates", "quarantined"].map(|column| ints(&batch, column));
        let (readings, stored) = (readings?, stored?);
        let (duplicates, quarantined) = (duplicates?, quarantined?);
        let (sealed_at, received_at) = (micros(&batch, "sealed_at")?, micros(&batch, "received_at")?);
        let redelivered = column(&batch, "redelivered")?.as_boolean();
        for row in 0..batch.num_rows() {
            keys.name(row, &mut name);
            let at = match known.get(&name) {
                Some(at) => *at,
                None => {
                    lanes.push((keys.key(row), LaneInput::default(), i64::MIN));
                    known.insert(name.clone(), lanes.len() - 1);
                    lanes.len() - 1
                }
            };
            let (key, lane, heard) = &mut lanes[at];
            *heard = (*heard).max(received_at.value(row));
            let message = Refined {
                seq: seq.value(row),
                rows: count.value(row),
                rows_before: before.value(row),
                oldest: oldest.value(row),
                sealed_at: Timestamp::from_micros(sealed_at.value(row)),
                readings: readings.value(row),
                stored: stored.value(row),
                duplicates: duplicates.value(row),
                quarantined: quarantined.value(row),
                redelivered: redelivered.value(row),
            };
            if key.lane == NAMELESS {
                lane.received.add_unnumbered(&message);
            } else {
                lane.received.add(&message);
            }
        }
    }
    for (key, lane, heard) in lanes {
        let gateway = gateway(inputs, &key.site, &key.gateway);
        gateway.heard_at = gateway.heard_at.max(Some(Timestamp::from_micros(heard)));
        inputs.lanes.insert(key, lane);
    }
    Ok(())
}

/// Gaps, closings and interruptions.
async fn read_control(context: &SessionContext, inputs: &mut Inputs) -> anyhow::Result<()> {
    let sql = "SELECT DISTINCT site, gateway_id, epoch, lane, record, ts, first_seq, last_seq, readings, \
               \"from\", \"to\" FROM control WHERE record <> 'census'";
    for batch in rows(context, sql).await? {
        let (keys, record) = (Keys::of(&batch)?, text(&batch, "record")?);
        let (first, last, readings) =
            (ints(&batch, "first_seq")?, ints(&batch, "last_seq")?, ints(&batch, "readings")?);
        let (ts, from, to) = (micros(&batch, "ts")?, micros(&batch, "from")?, micros(&batch, "to")?);
        for row in 0..batch.num_rows() {
            let key = keys.key(row);
            let readings = readings.value(row);
            let at = Timestamp::from_micros(ts.value(row));
            match (record.value(row), maybe(&first, row), maybe(&last, row)) {
                ("gap", Some(first_seq), Some(last_seq)) => {
                    // What was dropped was sealed about when its readings were taken.
                    let ts = if to.is_null(row) { at } else { Timestamp::from_micros(to.value(row)) };
                    let lane = inputs.lanes.entry(key).or_default();
                    lane.gaps.push(Gap { first_seq, last_seq, readings, ts });
                }
                ("closing", _, Some(last_seq)) => {
                    let head = last_seq + 1;
                    let lane = inputs.lanes.entry(key).or_default();
                    lane.closing = Some(LaneState { head, rows: readings, oldest: head, at });
                }
                ("interruption", _, _) if !from.is_null(row) && !to.is_null(row) => {
                    let span =
                        (Timestamp::from_micros(from.value(row)), Timestamp::from_micros(to.value(row)));
                    gateway(inputs, &key.site, &key.gateway).interruptions.push(span);
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn maybe(array: &Int64Array, row: usize) -> Option<i64> {
    (!array.is_null(row)).then(|| array.value(row))
}

async fn read_census(context: &SessionContext, inputs: &mut Inputs) -> anyhow::Result<()> {
    let sql = "SELECT site, gateway_id, epoch, reason, sum(readings) AS readings FROM control \
               WHERE record = 'census' GROUP BY site, gateway_id, epoch, reason";
    for batch in rows(context, sql).await? {
        let (site, name, epoch) =
            (text(&batch, "site")?, text(&batch, "gateway_id")?, text(&batch, "epoch")?);
        let (reason, readings) = (text(&batch, "reason")?, ints(&batch, "readings")?);
        for row in 0..batch.num_rows() {
            let gateway = gateway(inputs, site.value(row), name.value(row));
            let census = gateway.census.entry(epoch.value(row).to_owned()).or_default();
            let n = readings.value(row);
            match reason.value(row) {
                "polled" => census.polled += n,
                "sealed" => census.sealed += n,
                "held" => census.held += n,
                "skipped" => census.skipped += n,
                rejected if rejected.starts_with("rejected") => census.rejected += n,
                // A newer agent's outcome: without it the equation shows that something is not understood.
                other => tracing::warn!(outcome = other, "a census names an unknown outcome"),
            }
        }
    }
    Ok(())
}

async fn read_gateways(context: &SessionContext, inputs: &mut Inputs) -> anyhow::Result<()> {
    // A document counts as it came first: every replica stores it, one that was away much later. What a join is
    // built of stands left of it: a few rows a gateway.
    let sql = format!(
        "{NEWEST}, latest AS (SELECT n.site, n.gateway_id, n.epoch, max(s.at) FILTER (WHERE s.online) AS online_at, \
         max(s.at) FILTER (WHERE NOT s.online) AS offline_at FROM newest n JOIN status s ON s.site = n.site \
         AND s.gateway_id = n.gateway_id AND s.current_epoch = n.epoch GROUP BY n.site, n.gateway_id, n.epoch) \
         SELECT l.site, l.gateway_id, l.epoch, l.online_at, l.offline_at, \
         min(s.received_at) FILTER (WHERE s.online AND s.at = l.online_at) AS heard_at \
         FROM latest l JOIN status s ON s.site = l.site AND s.gateway_id = l.gateway_id \
         AND s.current_epoch = l.epoch GROUP BY l.site, l.gateway_id, l.epoch, l.online_at, l.offline_at"
    );
    for batch in rows(context, &sql).await? {
        let (site, name) = (text(&batch, "site")?, text(&batch, "gateway_id")?);
        let (online, offline) = (micros(&batch, "online_at")?, micros(&batch, "offline_at")?);
        let (heard, epoch) = (micros(&batch, "heard_at")?, text(&batch, "epoch")?);
        let at = |array: &arrow::array::TimestampMicrosecondArray, row: usize| {
            (!array.is_null(row)).then(|| Timestamp::from_micros(array.value(row)))
        };
        for row in 0..batch.num_rows() {
            let gateway = gateway(inputs, site.value(row), name.value(row));
            gateway.heard_at = gateway.heard_at.max(at(&heard, row));
            gateway.current_epoch = Some(epoch.value(row).to_owned());
            // A last will was written at the start, before every heartbeat; a farewell after all of them.
            gateway.stopped = at(&offline, row) > at(&online, row);
        }
    }
    Ok(())
}

/// The lanes that each gateway's newest status names.
async fn read_lanes(context: &SessionContext, inputs: &mut Inputs) -> anyhow::Result<()> {
    let sql = format!(
        "{NEWEST}, latest AS (SELECT n.site, n.gateway_id, n.epoch, max(s.at) AS at FROM newest n \
         JOIN status s ON s.site = n.site AND s.gateway_id = n.gateway_id AND s.current_epoch = n.epoch \
         WHERE s.lane IS NOT NULL GROUP BY n.site, n.gateway_id, n.epoch) \
         SELECT s.site, s.gateway_id, s.epoch, s.lane, max(s.at) AS at, max(s.head) AS head, \
         max(s.rows) AS rows, max(s.oldest) AS oldest FROM latest l JOIN status s ON s.site = l.site \
         AND s.gateway_id = l.gateway_id AND s.current_epoch = l.epoch AND s.at = l.at \
         WHERE s.lane IS NOT NULL GROUP BY s.site, s.gateway_id, s.epoch, s.lane"
    );
    let mut states: BTreeMap<LaneKey, LaneState> = BTreeMap::new();
    for batch in rows(context, &sql).await? {
        let (keys, at) = (Keys::of(&batch)?, micros(&batch, "at")?);
        let (head, count, oldest) = (ints(&batch, "head")?, ints(&batch, "rows")?, ints(&batch, "oldest")?);
        for row in 0..batch.num_rows() {
            states.insert(
                keys.key(row),
                LaneState {
                    head: head.value(row),
                    rows: count.value(row),
                    oldest: oldest.value(row),
                    at: Timestamp::from_micros(at.value(row)),
                },
            );
        }
    }
    for (key, state) in states {
        inputs.lanes.entry(key).or_default().status = Some(state);
    }
    Ok(())
}

/// The columns that name an epoch and lane.
struct Keys([StringArray; 4]);

impl Keys {
    fn of(batch: &RecordBatch) -> anyhow::Result<Self> {
        Ok(Self([
            text(batch, "site")?,
            text(batch, "gateway_id")?,
            text(batch, "epoch")?,
            text(batch, "lane")?,
        ]))
    }

    fn name(&self, row: usize, name: &mut String) {
        name.clear();
        for column in &self.0 {
            name.push_str(column.value(row));
            name.push('\0');
        }
    }

    fn key(&self, row: usize) -> LaneKey {
        let at =
            |i: usize| if self.0[i].is_null(row) { String::new() } else { self.0[i].value(row).to_owned() };
        LaneKey { site: at(0), gateway: at(1), epoch: at(2), lane: at(3) }
    }
}
