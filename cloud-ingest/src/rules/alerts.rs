//! Alerts as rules see them: which are active, when they end, what is told of them. Pure.
//!
//! An alert is named by its rule and the values of the columns in `key`, its labels. Of a row:
//!
//! | column | is |
//! |---|---|
//! | those in `key` | labels, as text; null is as if it were not there |
//! | those in `labels` | further labels, which may change while the alert lasts |
//! | `resolved` boolean | true: the alert has ended |
//! | `severity` text | in place of the rule's |
//! | `started_at`, `ended_at` | since when, until when; without them the time at which the rule ran |
//! | any other | an annotation, as text; `summary` and `description` are what people read first |
//!
//! With `resolve_after` an alert also ends when no row has confirmed it for so long. Of several rows of one alert the
//! last counts. Where a label changes, Alertmanager takes the alert for another, and the former lapses. A row about
//! an event (one with `started_at`) that has ended already is recorded and not told.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    time::Duration,
};

use anyhow::ensure;
use common::time::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{publish::Row, text};
use crate::quality::hex;

/// How long an alert that has ended is still told to whoever has not heard of it.
pub const REMEMBER: Duration = Duration::from_secs(3600);
/// Alerts of one rule, active and remembered.
pub const MAX_ALERTS: usize = 10_000;

/// How a rule makes alerts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlertSink {
    /// Columns that are labels and name the alert.
    pub key: Vec<String>,
    /// Columns that are labels, too.
    pub labels: Vec<String>,
    /// Unless the row says another.
    pub severity: String,
    /// Zero: only a row ends it.
    pub resolve_after: Duration,
}

/// One alert.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[expect(missing_docs, reason = "the names are those of rules/alerts")]
pub struct Alert {
    pub rule: String,
    pub alert_id: String,
    pub severity: String,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub started_at: Timestamp,
    pub ended_at: Option<Timestamp>,
    /// When a row last confirmed it, or it ended.
    #[serde(skip)]
    pub seen_at: Timestamp,
    /// Known from what an earlier process recorded: nobody knows whom that one told.
    #[serde(skip)]
    pub restored: bool,
}

impl Alert {
    /// `firing` or `resolved`.
    pub fn state(&self) -> &'static str {
        if self.ended_at.is_some() { "resolved" } else { "firing" }
    }

    /// Whether its labels are those of another alert.
    fn is_told_like(&self, other: &Alert) -> bool {
        (&self.severity, &self.labels) == (&other.severity, &other.labels)
    }

    /// Labels as Alertmanager has them.
    pub fn all_labels(&self) -> BTreeMap<&str, &str> {
        let own = self.labels.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        own.chain([("alertname", self.rule.as_str()), ("severity", self.severity.as_str())]).collect()
    }

    /// An element of `POST /api/v2/alerts`; active ones end at `until` unless they are sent again.
    pub fn for_alertmanager(&self, until: Timestamp) -> Value {
        json!({
            "labels": self.all_labels(),
            "annotations": self.annotations,
            "startsAt": self.started_at.to_string(),
            // One that ends before it starts, by a device's clock that is ahead, is refused.
            "endsAt": self.ended_at.unwrap_or(until).max(self.started_at).to_string(),
        })
    }

    /// An element of what webhooks get. `key` is the same whenever the same is told again.
    pub fn for_webhook(&self) -> Value {
        json!({
            "key": format!("{}:{}:{}:{}", self.alert_id, self.started_at, self.state(), self.severity),
            "status": self.state(),
            "labels": self.all_labels(),
            "annotations": self.annotations,
            "startsAt": self.started_at.to_string(),
            "endsAt": self.ended_at.map(|at| at.to_string()),
        })
    }
}

/// The alerts of one rule.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Alerts {
    /// By id: the active ones, and those that ended lately.
    known: BTreeMap<String, Alert>,
}

impl Alerts {
    /// What an earlier process recorded: the last state of each alert.
    pub fn restored(alerts: impl IntoIterator<Item = Alert>, now: Timestamp) -> Self {
        let fresh = |alert: &Alert| alert.ended_at.is_none() || now.since(alert.seen_at) < REMEMBER;
        let known = alerts.into_iter().filter(fresh).map(|alert| {
            // Whoever still is active has had no chance to be confirmed meanwhile.
            let seen_at = if alert.ended_at.is_none() { now } else { alert.seen_at };
            (alert.alert_id.clone(), Alert { seen_at, restored: true, ..alert })
        });
        Self { known: known.collect() }
    }

    /// The active ones and those that ended lately.
    pub fn all(&self) -> impl Iterator<Item = &Alert> {
        self.known.values()
    }

    /// How many are active.
    pub fn active(&self) -> usize {
        self.known.values().filter(|alert| alert.ended_at.is_none()).count()
    }

    /// Takes in the rows of a batch; what has begun, changed or ended.
    ///
    /// # Errors
    /// When there would be too many alerts; nothing has changed then.
    pub fn apply(
        &mut self,
        rule: &str,
        sink: &AlertSink,
        rows: &[Row],
        now: Timestamp,
    ) -> anyhow::Result<Vec<Alert>> {
        let mut next = self.clone();
        let mut changed = BTreeMap::new();
        for row in rows {
            let alert = alert(rule, sink, row, now);
            let id = alert.alert_id.clone();
            if let Some(news) = next.take(alert, row.contains_key("started_at")) {
                changed.insert(id, news);
            }
        }
        ensure!(
            next.known.len() <= MAX_ALERTS,
            "{} alerts are more than {MAX_ALERTS}; group by fewer columns, or let the rule say resolved",
            next.known.len()
        );
        *self = next;
        Ok(changed.into_values().collect())
    }

    /// What is to be recorded of a row.
    fn take(&mut self, alert: Alert, own_start: bool) -> Option<Alert> {
        match self.known.entry(alert.alert_id.clone()) {
            Entry::Vacant(entry) => {
                // That something ended which was never there is no news, unless it is an event of its own.
                (alert.ended_at.is_none() || own_start).then(|| entry.insert(alert).clone())
            }
            Entry::Occupied(mut entry) => {
                let known = entry.get_mut();
                let same_event = own_start && known.started_at == alert.started_at;
                match (known.ended_at, alert.ended_at) {
                    (None, _) => {
                        let started_at = known.started_at.min(alert.started_at);
                        let former = std::mem::replace(known, alert);
                        (known.started_at, known.restored) = (started_at, former.restored);
                        let changed = former.ended_at != known.ended_at || !former.is_told_like(known);
                        changed.then(|| known.clone())
                    }
                    (Some(_), None) if !same_event => {
                        *known = alert;
                        Some(known.clone())
                    }
                    (Some(_), Some(_)) if own_start && !same_event => {
                        *known = alert;
                        Some(known.clone())
                    }
                    _ => None,
                }
            }
        }
    }

    /// Ends what nothing has confirmed for `resolve_after`, and forgets what ended long ago.
    pub fn tick(&mut self, resolve_after: Duration, now: Timestamp) -> Vec<Alert> {
        let mut ended = Vec::new();
        for alert in self.known.values_mut() {
            let silent = now.since(alert.seen_at);
            if alert.ended_at.is_none() && !resolve_after.is_zero() && silent >= resolve_after {
                (alert.ended_at, alert.seen_at) = (Some(now), now);
                ended.push(alert.clone());
            }
        }
        self.known.retain(|_, alert| alert.ended_at.is_none() || now.since(alert.seen_at) < REMEMBER);
        ended
    }
}

fn alert(rule: &str, sink: &AlertSink, row: &Row, now: Timestamp) -> Alert {
    let given = |name: &str| row.get(name).map(text).filter(|text| !text.is_empty());
    let instant = |name: &str| given(name).and_then(|text| text.parse::<Timestamp>().ok());
    let labels = |of: &[String]| -> BTreeMap<String, String> {
        of.iter().filter_map(|name| Some((name.clone(), given(name)?))).collect()
    };
    let (key, mut all) = (labels(&sink.key), labels(&sink.labels));
    let named = json!([rule, key]).to_string();
    all.extend(key);
    let own = |name: &str| {
        matches!(name, "resolved" | "severity" | "started_at" | "ended_at")
            || sink.key.iter().chain(&sink.labels).any(|label| label == name)
    };
    let annotations = row.keys().filter(|name| !own(name));
    let annotations = annotations.filter_map(|name| Some((name.clone(), given(name)?))).collect();
    let resolved = row.get("resolved") == Some(&Value::Bool(true));
    Alert {
        rule: rule.to_owned(),
        alert_id: hex(&Sha256::digest(named))[..32].to_owned(),
        severity: given("severity").unwrap_or_else(|| sink.severity.clone()),
        labels: all,
        annotations,
        started_at: instant("started_at").unwrap_or(now),
        ended_at: resolved.then(|| instant("ended_at").unwrap_or(now)),
        seen_at: now,
        restored: false,
    }
}

/// What one receiver has been told: levels, not edges. It is brought up to what is true now, whatever it missed.
#[derive(Clone, Debug)]
pub struct Course {
    /// Alertmanager forgets what is not sent again; a webhook does not.
    resend: Option<Duration>,
    told: BTreeMap<String, Told>,
}

#[derive(Clone, Debug, PartialEq)]
struct Told {
    alert: Alert,
    at: Timestamp,
}

impl Course {
    /// Of a receiver that has been told nothing.
    pub fn new(resend: Option<Duration>) -> Self {
        Self { resend, told: BTreeMap::new() }
    }

    /// What it must be told now.
    pub fn due(&self, alerts: &[Alert], now: Timestamp) -> Vec<Alert> {
        let due = |alert: &&Alert| {
            let told =
                self.told.get(&alert.alert_id).filter(|told| told.alert.started_at == alert.started_at);
            match (told, alert.ended_at) {
                (None, None) => true,
                // What it never heard of need not be called off, unless an earlier process may have told.
                (None, Some(_)) => alert.restored,
                (Some(told), None) => {
                    let again = self.resend.is_some_and(|every| now < told.at || now.since(told.at) >= every);
                    told.alert.ended_at.is_some() || !told.alert.is_told_like(alert) || again
                }
                (Some(told), Some(_)) => told.alert.ended_at.is_none(),
            }
        };
        alerts.iter().filter(due).cloned().collect()
    }

    /// It was told.
    pub fn told(&mut self, alerts: &[Alert], now: Timestamp) {
        for alert in alerts {
            self.told.insert(alert.alert_id.clone(), Told { alert: alert.clone(), at: now });
        }
    }

    /// Forgets what is no longer known.
    pub fn keep(&mut self, alerts: &[Alert]) {
        let known: std::collections::BTreeSet<&str> = alerts.iter().map(|a| a.alert_id.as_str()).collect();
        self.told.retain(|id, _| known.contains(id.as_str()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(1_772_000_000_000_000 + seconds * 1_000_000)
    }

    fn sink(resolve_after: u64) -> AlertSink {
        AlertSink {
            key: vec!["site".into(), "device_id".into()],
            labels: vec!["asset_id".into()],
            severity: "warning".into(),
            resolve_after: Duration::from_secs(resolve_after),
        }
    }

    fn row(value: Value) -> Row {
        value.as_object().unwrap().clone()
    }

    fn states(alerts: &[Alert]) -> Vec<(&str, &str)> {
        alerts.iter().map(|a| (a.labels["device_id"].as_str(), a.state())).collect()
    }

    #[test]
    fn an_alert_begins_once_and_ends_when_nothing_confirms_it() {
        let (mut alerts, sink) = (Alerts::default(), sink(60));
        let hot = row(json!({ "site": "p", "device_id": "a", "value": 93.5, "note": null }));
        let begun = alerts.apply("hot", &sink, &[hot.clone(), hot.clone()], at(0)).unwrap();
        assert_eq!(states(&begun), [("a", "firing")]);
        assert_eq!(begun[0].annotations, BTreeMap::from([("value".into(), "93.5".into())]));
        let labels = begun[0].all_labels();
        assert_eq!((labels["alertname"], labels["severity"], labels["site"]), ("hot", "warning", "p"));
        assert_eq!(alerts.apply("hot", &sink, std::slice::from_ref(&hot), at(50)).unwrap(), []);
        assert_eq!(alerts.tick(sink.resolve_after, at(109)), []);
        let ended = alerts.tick(sink.resolve_after, at(110));
        assert_eq!((states(&ended), ended[0].started_at), (vec![("a", "resolved")], at(0)));
        assert_eq!(alerts.active(), 0);
        // It comes back as a new one.
        let again = alerts.apply("hot", &sink, &[hot], at(120)).unwrap();
        assert_eq!((states(&again), again[0].started_at), (vec![("a", "firing")], at(120)));
        assert_eq!(again[0].alert_id, begun[0].alert_id);
    }

    #[test]
    fn events_have_times_of_their_own_and_are_told_once() {
        let (mut alerts, sink) = (Alerts::default(), sink(0));
        let event = |ended: Option<i64>, severity: &str| {
            row(json!({ "site": "p", "device_id": "a", "severity": severity, "resolved": ended.is_some(),
                "started_at": at(-100).to_string(), "ended_at": ended.map(|s| at(s).to_string()) }))
        };
        let begun = alerts.apply("e", &sink, &[event(None, "warning")], at(0)).unwrap();
        assert_eq!((begun[0].started_at, begun[0].state()), (at(-100), "firing"));
        let worse = alerts.apply("e", &sink, &[event(None, "critical")], at(1)).unwrap();
        assert_eq!(worse[0].severity, "critical");
        let mut moved = event(None, "critical");
        moved.insert("asset_id".into(), "pump-02".into());
        let moved = alerts.apply("e", &sink, &[moved], at(2)).unwrap();
        assert_eq!(
            (moved[0].labels["asset_id"].as_str(), &moved[0].alert_id),
            ("pump-02", &begun[0].alert_id)
        );
        assert_eq!(alerts.tick(sink.resolve_after, at(99_999)), [], "only a row ends it");
        let ended = alerts.apply("e", &sink, &[event(Some(5), "critical")], at(6)).unwrap();
        assert_eq!((ended[0].ended_at, alerts.active()), (Some(at(5)), 0));
        // The same event once more, and a record of it that was overtaken.
        assert_eq!(alerts.apply("e", &sink, &[event(Some(5), "critical")], at(7)).unwrap(), []);
        assert_eq!(alerts.apply("e", &sink, &[event(None, "critical")], at(8)).unwrap(), []);
        // One that was over before anybody saw it is recorded.
        let mut past = event(Some(5), "warning");
        past.insert("device_id".into(), "b".into());
        assert_eq!(states(&alerts.apply("e", &sink, &[past], at(9)).unwrap()), [("b", "resolved")]);
        // A plain row that says resolved of nothing is no news.
        let nothing = row(json!({ "site": "p", "device_id": "c", "resolved": true }));
        assert_eq!(alerts.apply("e", &sink, &[nothing], at(10)).unwrap(), []);
        assert_eq!(alerts.tick(sink.resolve_after, at(10) + REMEMBER), []);
        assert_eq!(alerts.all().count(), 0, "forgotten");
    }

    #[test]
    fn receivers_are_brought_up_to_what_is_true() {
        let (mut alerts, sink) = (Alerts::default(), sink(60));
        let of = |device: &str| row(json!({ "site": "p", "device_id": device }));
        alerts.apply("r", &sink, &[of("a"), of("b")], at(0)).unwrap();
        let all = |alerts: &Alerts| alerts.all().cloned().collect::<Vec<_>>();
        let mut manager = Course::new(Some(Duration::from_secs(30)));
        let mut webhook = Course::new(None);
        let due = manager.due(&all(&alerts), at(0));
        assert_eq!(due.len(), 2);
        manager.told(&due, at(0));
        // The webhook gets the first alert only; of the other it will never have heard.
        let a: Vec<Alert> = all(&alerts).into_iter().filter(|x| x.labels["device_id"] == "a").collect();
        webhook.told(&a, at(0));
        assert_eq!(manager.due(&all(&alerts), at(29)), []);
        assert_eq!(manager.due(&all(&alerts), at(30)).len(), 2, "sent again while active");
        assert_eq!(manager.due(&all(&alerts), at(-9)).len(), 2, "also when the clock is set back");
        assert_eq!(webhook.due(&all(&alerts), at(59)).len(), 1);
        alerts.tick(sink.resolve_after, at(60));
        assert_eq!(states(&webhook.due(&all(&alerts), at(60))), [("a", "resolved")]);
        assert_eq!(manager.due(&all(&alerts), at(60)).len(), 2);
        manager.told(&all(&alerts), at(60));
        assert_eq!(manager.due(&all(&alerts), at(999)), [], "called off once");
        // Another process: it does not know whom this one has told.
        let restored = Alerts::restored(all(&alerts), at(70));
        assert_eq!(Course::new(None).due(&all(&restored), at(70)).len(), 2);
        assert_eq!(Alerts::restored(all(&alerts), at(60) + REMEMBER).all().count(), 0);
        manager.keep(&[]);
        assert!(manager.told.is_empty());
    }

    #[test]
    fn too_many_alerts_are_refused_as_a_whole() {
        let (mut alerts, sink) = (Alerts::default(), sink(0));
        let rows: Vec<Row> =
            (0..=MAX_ALERTS).map(|n| row(json!({ "site": "p", "device_id": n.to_string() }))).collect();
        let error = alerts.apply("r", &sink, &rows, at(0)).unwrap_err().to_string();
        assert!(error.contains("group by fewer columns"), "{error}");
        assert_eq!(alerts.all().count(), 0);
        alerts.apply("r", &sink, &rows[1..], at(0)).unwrap();
    }

    #[test]
    fn bodies() {
        let mut alerts = Alerts::default();
        let hot = row(json!({ "site": "p", "device_id": "a", "summary": "hot" }));
        let begun = alerts.apply("hot", &sink(60), &[hot], at(0)).unwrap();
        let manager = begun[0].for_alertmanager(at(240));
        assert_eq!(
            (&manager["labels"]["alertname"], &manager["endsAt"], &manager["annotations"]["summary"]),
            (&json!("hot"), &json!(at(240).to_string()), &json!("hot"))
        );
        let ended = alerts.tick(Duration::from_secs(60), at(60));
        assert_eq!(ended[0].for_alertmanager(at(240))["endsAt"], json!(at(60).to_string()));
        let (firing, resolved) = (begun[0].for_webhook(), ended[0].for_webhook());
        assert_eq!((&firing["status"], &resolved["status"]), (&json!("firing"), &json!("resolved")));
        assert_ne!(firing["key"], resolved["key"]);
    }
}
