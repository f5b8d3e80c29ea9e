//! The sink `mqtt`: a row becomes a message, a JSON object of its columns, with QoS 1 and not retained.
//!
//! User properties: `rule`, `plan`, and `id`, which is the same whenever the same row of the same plan is published
//! again, as it is after a crash: whoever must not count twice remembers ids.
//!
//! The broker has a message when it has acknowledged it. A connection that fails is dropped, with everything in it,
//! and the rows of the plan are published anew.

use std::{collections::HashMap, fmt, time::Duration};

use anyhow::{Context, bail, ensure};
use common::{topic_filter, wire};
use rumqttc::v5::{
    AsyncClient, Event, EventLoop, Incoming, MqttOptions,
    mqttbytes::{
        QoS,
        v5::{PubAckReason, PublishProperties},
    },
};
use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::time::{Instant, timeout_at};

use super::settings::RuleSettings;
use crate::quality::hex;

/// Messages that wait for their acknowledgement: few enough for every broker.
const WINDOW: usize = 20;
/// How long the broker may take until it acknowledges another message.
const PATIENCE: Duration = Duration::from_secs(30);
/// A connection that nobody has looked after for so long is not used again; brokers wait 7.5 s at least.
const IDLE: Duration = Duration::from_secs(5);

/// A row as it comes from a query.
pub type Row = Map<String, Value>;

/// A topic with columns in it: `alarms/{site}/{asset_id}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Column(String),
}

impl Template {
    /// The rule's topic, or `{root}/_cloud/rules/NAME`.
    pub(super) fn of(rule: &RuleSettings, root: &str) -> Result<Template, String> {
        if rule.topic.is_empty() {
            return Ok(Template(vec![Part::Text(format!("{root}/_cloud/rules/{}", rule.name))]));
        }
        let bad = |why: &str| Err(format!("{:?} is no topic: {why}", rule.topic));
        let (mut parts, mut rest) = (Vec::new(), rule.topic.as_str());
        while let Some((text, tail)) = rest.split_once('{') {
            let Some((column, tail)) = tail.split_once('}') else { return bad("{ without }") };
            parts.extend((!text.is_empty()).then(|| Part::Text(text.to_owned())));
            parts.push(Part::Column(column.to_owned()));
            rest = tail;
        }
        parts.extend((!rest.is_empty()).then(|| Part::Text(rest.to_owned())));
        let texts = parts.iter().filter_map(|part| match part {
            Part::Text(text) => Some(text),
            Part::Column(_) => None,
        });
        if texts.clone().any(|text| text.contains(['+', '#', '}', '\0'])) || rule.topic.starts_with('$') {
            return bad("it holds +, # or a stray brace, or begins with $");
        }
        Ok(Template(parts))
    }

    /// The columns in it.
    pub(super) fn columns(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|part| match part {
            Part::Column(name) => Some(name.as_str()),
            Part::Text(_) => None,
        })
    }

    /// A filter that matches what the template may become, as long as values hold no `/`.
    pub(super) fn as_filter(&self) -> String {
        let levels = self.to_string();
        let level = |level: &str| if level.contains('{') { "+".to_owned() } else { level.to_owned() };
        levels.split('/').map(level).collect::<Vec<_>>().join("/")
    }

    /// The topic of a row.
    fn fill(&self, row: &Row) -> Result<String, String> {
        let mut topic = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => topic.push_str(text),
                Part::Column(name) => {
                    let value = row.get(name).map(super::text).unwrap_or_default();
                    if value.is_empty() || value.contains(['+', '#', '\0']) {
                        return Err(format!("{name} = {value:?} cannot stand in a topic"));
                    }
                    topic.push_str(&value);
                }
            }
        }
        Ok(topic)
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|part| match part {
            Part::Text(text) => f.write_str(text),
            Part::Column(name) => write!(f, "{{{name}}}"),
        })
    }
}

/// What is to be published.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outgoing {
    /// Where to.
    pub topic: String,
    /// Of the row and its plan.
    pub id: String,
    /// The row.
    pub payload: Row,
}

/// The messages of a plan's rows, and why some rows become none. `own` is what the pipeline subscribes to: nothing may
/// come back.
pub fn outgoing(
    rule: &str,
    topic: &Template,
    own: &[String],
    plan: i64,
    rows: Vec<Row>,
) -> (Vec<Outgoing>, Vec<String>) {
    let (mut messages, mut refused) = (Vec::with_capacity(rows.len()), Vec::new());
    // Of rows that are equal the second is another message.
    let mut seen: HashMap<String, u64> = HashMap::new();
    for payload in rows {
        let filled = topic.fill(&payload).and_then(|topic| {
            match own.iter().find(|filter| topic_filter::matches(filter, &topic)) {
                Some(filter) => Err(format!("{topic} would come back: the pipeline subscribes to {filter}")),
                None => Ok(topic),
            }
        });
        match filled {
            Ok(topic) => {
                let text = serde_json::to_string(&payload).unwrap_or_default();
                let nth = seen.entry(format!("{topic}\n{text}")).and_modify(|n| *n += 1).or_insert(0);
                let digest = Sha256::digest(format!("{rule}\n{plan}\n{nth}\n{topic}\n{text}"));
                messages.push(Outgoing { topic, id: hex(&digest)[..32].to_owned(), payload });
            }
            Err(why) => refused.push(why),
        }
    }
    (messages, refused)
}

/// A connection to the broker, made when there is something to publish.
pub struct Publisher {
    options: MqttOptions,
    open: Option<(AsyncClient, EventLoop, Instant)>,
}

impl Publisher {
    /// With the pipeline's own address, credentials and TLS.
    pub fn new(mut options: MqttOptions) -> Self {
        options.set_client_id(format!("tailrace-rule-{}", uuid::Uuid::now_v7().simple()));
        options.set_clean_start(true);
        Self { options, open: None }
    }

    /// Returns when the broker has acknowledged all of them.
    ///
    /// # Errors
    /// When it has not; some of them may have been published.
    pub async fn publish(&mut self, rule: &str, plan: i64, messages: &[Outgoing]) -> anyhow::Result<()> {
        let open = self.open.take().filter(|(_, _, used)| used.elapsed() < IDLE);
        let (client, mut events) = match open {
            Some((client, events, _)) => (client, events),
            None => AsyncClient::new(self.options.clone(), WINDOW),
        };
        send(&client, &mut events, rule, plan, messages).await?;
        self.open = Some((client, events, Instant::now()));
        Ok(())
    }
}

async fn send(
    client: &AsyncClient,
    events: &mut EventLoop,
    rule: &str,
    plan: i64,
    messages: &[Outgoing],
) -> anyhow::Result<()> {
    let (mut sent, mut acknowledged) = (0, 0);
    let mut deadline = Instant::now() + PATIENCE;
    while acknowledged < messages.len() {
        while sent < messages.len() && sent - acknowledged < WINDOW {
            let message = &messages[sent];
            let properties = PublishProperties {
                content_type: Some(wire::JSON.to_owned()),
                user_properties: vec![
                    ("rule".to_owned(), rule.to_owned()),
                    ("plan".to_owned(), plan.to_string()),
                    ("id".to_owned(), message.id.clone()),
                ],
                ..PublishProperties::default()
            };
            let payload = serde_json::to_vec(&message.payload)?;
            client
                .try_publish_with_properties(&message.topic, QoS::AtLeastOnce, false, payload, properties)
                .map_err(|e| anyhow::anyhow!("{}: {e}", message.topic))?;
            sent += 1;
        }
        let event = timeout_at(deadline, events.poll()).await.context("the broker does not acknowledge")?;
        if let Event::Incoming(incoming) = event.context("publishing")? {
            match incoming {
                Incoming::PubAck(ack) => {
                    let taken =
                        matches!(ack.reason, PubAckReason::Success | PubAckReason::NoMatchingSubscribers);
                    ensure!(taken, "the broker refuses a message: {:?}; see its ACL", ack.reason);
                    acknowledged += 1;
                    deadline = Instant::now() + PATIENCE;
                }
                Incoming::Disconnect(reason) => bail!("the broker hangs up: {:?}", reason.reason_code),
                _ => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(topic: &str) -> Result<Template, String> {
        let text = format!("name = \"r\"\ntopic = {topic:?}");
        Template::of(&toml::from_str(&text).unwrap(), "tailrace/v1")
    }

    fn row(site: &str, value: f64) -> Row {
        json!({ "site": site, "value": value }).as_object().unwrap().clone()
    }

    #[test]
    fn topics() {
        assert_eq!(template("").unwrap().to_string(), "tailrace/v1/_cloud/rules/r");
        let alarms = template("alarms/{site}/x{value}").unwrap();
        assert_eq!(alarms.columns().collect::<Vec<_>>(), ["site", "value"]);
        assert_eq!(alarms.as_filter(), "alarms/+/+");
        assert_eq!(alarms.fill(&row("plant", 1.5)).unwrap(), "alarms/plant/x1.5");
        for wrong in ["a/#", "a/{b", "a/b}", "$SYS/x", "+"] {
            assert!(template(wrong).is_err(), "{wrong}");
        }
        assert!(alarms.fill(&row("a+b", 1.0)).unwrap_err().contains("cannot stand in a topic"));
        assert!(alarms.fill(&Row::new()).is_err());
    }

    #[test]
    fn a_message_keeps_its_id_and_none_comes_back() {
        let topic = template("t/{site}/json").unwrap();
        let rows = vec![row("a", 1.0), row("a", 1.0), row("b", 1.0)];
        let own = ["t/b/+".to_owned()];
        let (messages, refused) = outgoing("r", &topic, &own, 7, rows.clone());
        assert_eq!(messages.iter().map(|m| m.topic.as_str()).collect::<Vec<_>>(), ["t/a/json", "t/a/json"]);
        assert_ne!(messages[0].id, messages[1].id, "two equal rows are two messages");
        assert_eq!(refused, ["t/b/json would come back: the pipeline subscribes to t/b/+"]);
        assert_eq!(outgoing("r", &topic, &own, 7, rows.clone()).0, messages);
        assert_ne!(outgoing("r", &topic, &own, 8, rows).0[0].id, messages[0].id);
    }
}
