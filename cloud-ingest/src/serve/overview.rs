//! What the dashboard shows, in one answer.
//!
//! ```text
//! {"now", "site": […], "ledger": {totals of the audit} | null,
//!  "assets": [{"site", "asset_id", "path", "class", "criticality",
//!              "devices": [{"device_id", "device_type", "unit", "kind", "value", "ts", "quality", "course", …}]}],
//!  "gateways": [live.status], "anomalies": [gold.anomaly_events with what is newer in memory],
//!  "layers": [{"name", "files", "rows", "bytes"}], "maintenance": [gold.maintenance_schedule],
//!  "problems": [what could not be read]}
//! ```
//!
//! Whoever asks, it is made at most once in [`FRESH_FOR`], and the audit and the layers once in [`SLOW_FRESH_FOR`]; of a
//! large lake less often, so that a page that somebody leaves open takes no more than a tenth of a core.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Map, Value, json};
use tokio::{sync::Mutex, time::Instant};

use super::{
    http::App,
    json::objects,
    live::{DeviceView, EventView},
};

/// An answer younger than this is given again.
const FRESH_FOR: Duration = Duration::from_millis(1_500);
/// The same for what costs more to find out.
const SLOW_FRESH_FOR: Duration = Duration::from_secs(4);
/// And for so many times what finding out took.
const RESTS: u32 = 9;
/// Points of a sparkline.
const COURSE: usize = 48;

const ASSETS: &str =
    "SELECT site, asset_id, path, class, criticality FROM gold.assets ORDER BY site, asset_id";
const DEVICES: &str = "SELECT site, device_id, device_type, asset_id, unit, kind, range_low, range_high, \"interval\" \
                       FROM gold.devices ORDER BY site, device_id";
const LAST_VALUES: &str = "SELECT site, device_id, max(time) AS ts, last_value(last ORDER BY time) AS value \
                           FROM gold.timeseries_1m GROUP BY site, device_id";
/// Anomalies that are shown.
const ANOMALIES: usize = 40;
const MAINTENANCE: &str = "SELECT site, asset_id, due_by, basis, running_hours, last_done_at, action, reason \
                           FROM gold.maintenance_schedule ORDER BY due_by NULLS LAST, asset_id";

type Rows = Vec<Map<String, Value>>;

/// The last answer, and what it was made from.
#[derive(Debug, Default)]
pub(super) struct Overview {
    last: Mutex<Option<(Instant, Value)>>,
    /// Until when it is good, the ledger's totals, and the layers.
    slow: Mutex<Option<(Instant, Value, Value)>>,
}

impl Overview {
    /// The present state of the plant and of its data.
    pub(super) async fn now(&self, app: &App) -> Value {
        let mut last = self.last.lock().await;
        match &*last {
            Some((at, value)) if at.elapsed() < FRESH_FOR => value.clone(),
            _ => {
                let value = self.make(app).await;
                *last = Some((Instant::now(), value.clone()));
                value
            }
        }
    }

    /// The site of an asset of the registry.
    ///
    /// # Errors
    /// When there is no such asset, or several and no site was given.
    pub(super) async fn site_of(&self, app: &App, asset: &str, site: Option<&str>) -> Result<String, String> {
        let assets = rows(app, ASSETS).await?;
        let text = |row: &Map<String, Value>, key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let mut sites: Vec<String> = assets
            .iter()
            .filter(|row| text(row, "asset_id") == asset && site.is_none_or(|s| text(row, "site") == s))
            .map(|row| text(row, "site"))
            .collect();
        match (sites.pop(), sites.len()) {
            (Some(site), 0) => Ok(site),
            (None, _) => Err(format!("there is no asset {asset:?} in gold.assets")),
            (Some(_), more) => Err(format!("{} sites have an asset {asset:?}; name the site", more + 1)),
        }
    }

    async fn make(&self, app: &App) -> Value {
        let mut problems = Vec::new();
        let (ledger, layers) = self.slow(app, &mut problems).await;
        let mut read = Vec::new();
        let anomalies = anomalies(&app.live.events());
        for sql in [ASSETS, DEVICES, &anomalies, MAINTENANCE] {
            read.push(rows(app, sql).await.unwrap_or_else(|problem| {
                problems.push(problem);
                Rows::new()
            }));
        }
        let [assets, devices, anomalies, maintenance] = read.try_into().unwrap_or_default();
        let live = app.live.devices(COURSE);
        let unheard = devices.iter().any(|d| !live.iter().any(|l| is(d, &l.site, &l.device_id)));
        let last_values =
            if unheard { rows(app, LAST_VALUES).await.unwrap_or_default() } else { Rows::new() };
        json!({
            "now": app.sources.clock.now(),
            "ledger": ledger,
            "assets": plant(assets, devices, live, last_values),
            "gateways": app.live.gateways(),
            "anomalies": merged(anomalies, app),
            "layers": layers,
            "maintenance": maintenance,
            "problems": problems,
        })
    }

    async fn slow(&self, app: &App, problems: &mut Vec<String>) -> (Value, Value) {
        let mut slow = self.slow.lock().await;
        let began = Instant::now();
        if let Some((until, ledger, layers)) = &*slow
            && began < *until
        {
            return (ledger.clone(), layers.clone());
        }
        let ledger = match app.sources.ledger.audit().await {
            Ok(audit) => json!(audit.totals),
            Err(e) => {
                problems.push(format!("audit: {e:#}"));
                Value::Null
            }
        };
        let layers = match (app.sources.layers)().await {
            Ok(layers) => json!(layers),
            Err(e) => {
                problems.push(format!("layers: {e:#}"));
                Value::Null
            }
        };
        let until = Instant::now() + SLOW_FRESH_FOR.max(began.elapsed() * RESTS);
        *slow = Some((until, ledger.clone(), layers.clone()));
        (ledger, layers)
    }
}

async fn rows(app: &App, sql: &str) -> Result<Rows, String> {
    let answer = app.queries.run(sql, super::http::MAX_JSON_ROWS).await.map_err(|e| e.to_string())?;
    Ok(objects(&answer.batches))
}

fn is(row: &Map<String, Value>, site: &str, device: &str) -> bool {
    row["site"] == *site && row["device_id"] == *device
}

/// Assets of the registry with their devices; devices that were only heard stand under the asset they named.
fn plant(assets: Rows, devices: Rows, live: Vec<DeviceView>, last_values: Rows) -> Value {
    let key = |site: &Value, id: &Value| {
        (site.as_str().unwrap_or_default().to_owned(), id.as_str().unwrap_or_default().to_owned())
    };
    let mut known: BTreeMap<(String, String), Map<String, Value>> =
        devices.into_iter().map(|d| (key(&d["site"], &d["device_id"]), d)).collect();
    for last in last_values {
        if let Some(device) = known.get_mut(&key(&last["site"], &last["device_id"])) {
            device.insert("value".into(), last["value"].clone());
            device.insert("ts".into(), last["ts"].clone());
        }
    }
    for heard in live {
        let device = known.entry((heard.site.clone(), heard.device_id.clone())).or_default();
        if let Value::Object(heard) = json!(heard) {
            // The registry's unit is what the sender said, too; what was measured last wins.
            device.extend(heard);
        }
    }
    let mut plant: BTreeMap<(String, String), Map<String, Value>> =
        assets.into_iter().map(|a| (key(&a["site"], &a["asset_id"]), a)).collect();
    for device in known.into_values() {
        let asset_key = key(&device["site"], &device["asset_id"]);
        let asset = plant.entry(asset_key.clone()).or_insert_with(|| {
            let mut asset = Map::new();
            asset.insert("site".into(), asset_key.0.into());
            asset.insert("asset_id".into(), asset_key.1.into());
            asset
        });
        let list = asset.entry("devices").or_insert_with(|| Value::Array(Vec::new()));
        if let Value::Array(list) = list {
            list.push(Value::Object(device));
        }
    }
    plant.into_values().map(Value::Object).collect()
}

/// The events of gold that are shown, and whatever it has of those that are open in memory: what ended while nobody
/// listened stays open there.
fn anomalies(heard: &[EventView]) -> String {
    let open: Vec<String> = heard
        .iter()
        .filter(|event| event.ended_at.is_none())
        .map(|event| format!("'{}'", event.event_id.replace('\'', "''")))
        .collect();
    let heard =
        if open.is_empty() { "false".to_owned() } else { format!("event_id IN ({})", open.join(", ")) };
    format!(
        "SELECT event_id, site, asset_id, device_id, model, severity, score, threshold, started_at, ended_at \
         FROM gold.anomaly_events ORDER BY {heard} DESC, ended_at IS NULL DESC, started_at DESC LIMIT {}",
        ANOMALIES + open.len()
    )
}

/// Events of gold, with those in memory that are newer; open ones first, then by their beginning.
fn merged(gold: Rows, app: &App) -> Value {
    let mut events: BTreeMap<String, Map<String, Value>> = gold
        .into_iter()
        .map(|event| (event["event_id"].as_str().unwrap_or_default().to_owned(), event))
        .collect();
    for event in app.live.events() {
        let known_end = events.get(&event.event_id).is_some_and(|known| !known["ended_at"].is_null());
        if let Value::Object(newer) = json!(event)
            && !known_end
        {
            events.insert(event.event_id, newer);
        }
    }
    let mut events: Vec<_> = events.into_values().collect();
    let began = |event: &Map<String, Value>| event["started_at"].as_str().unwrap_or_default().to_owned();
    events.sort_by(|a, b| {
        let open = |e: &Map<String, Value>| e["ended_at"].is_null();
        open(b).cmp(&open(a)).then_with(|| began(b).cmp(&began(a)))
    });
    events.truncate(ANOMALIES);
    events.into_iter().map(Value::Object).collect()
}
