//! `[[rule]]`, `[rules]` and `[alerts]`: what can be said of them without the lake.

use std::{collections::BTreeSet, path::Path, time::Duration};

use anyhow::Context;
use common::{
    config::{Mistakes, SecretRef},
    time::duration,
    topic_filter,
};
use serde::{Deserialize, Serialize};
use url::{Host, Url};

use super::publish::Template;
use crate::lake::RuleTable;

/// The rules that come with the program.
const SHIPPED: &str = include_str!("shipped.toml");
/// An alert that is active is sent again at most this often: Alertmanager takes an alert for ended once `endsAt`,
/// four times this, has passed.
const RESEND: std::ops::RangeInclusive<Duration> = Duration::from_secs(5)..=Duration::from_secs(300);

/// One `[[rule]]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct RuleSettings {
    pub name: String,
    #[serde(default = "yes")]
    pub enabled: bool,
    #[serde(default)]
    pub select: String,
    #[serde(default)]
    pub sink: Option<SinkKind>,
    #[serde(default)]
    pub key: Vec<String>,
    #[serde(default)]
    pub labels: Vec<String>,
    #[serde(default)]
    pub severity: String,
    #[serde(default, with = "duration")]
    pub resolve_after: Duration,
    #[serde(default)]
    pub topic: String,
    #[serde(default)]
    pub table: String,
}

fn yes() -> bool {
    true
}

/// Where a rule's rows go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SinkKind {
    /// To Alertmanager and webhooks.
    Alert,
    /// To a topic of the broker.
    Mqtt,
    /// To a Delta table.
    Table,
}

/// `[rules]`
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct RulesSettings {
    #[serde(with = "duration")]
    pub timeout: Duration,
    pub rows: u64,
    pub memory_limit: usize,
}

/// `[alerts]`
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct AlertsSettings {
    pub alertmanager: Vec<TargetSettings>,
    pub webhook: Vec<TargetSettings>,
    #[serde(with = "duration")]
    pub resend: Duration,
    #[serde(with = "duration")]
    pub timeout: Duration,
    pub ca: String,
    pub allow_http: bool,
}

/// `[[alerts.alertmanager]]` and `[[alerts.webhook]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct TargetSettings {
    pub url: String,
    #[serde(default)]
    pub token: SecretRef,
}

impl TargetSettings {
    /// The address, which may itself be a secret.
    ///
    /// # Errors
    /// Says which reference cannot be resolved.
    pub(super) fn address(&self) -> anyhow::Result<Url> {
        let reference = self.url.starts_with("file:") || self.url.starts_with("env:");
        let text = if reference {
            SecretRef::from(self.url.as_str()).resolve()?.unwrap_or_default()
        } else {
            self.url.clone()
        };
        let url = Url::parse(text.trim()).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
        url.filter(Url::has_host).context("it is no http:// or https:// URL")
    }
}

/// The rules that are configured: the shipped ones, in whose place one of the same name stands, then the others.
pub fn effective(own: &[RuleSettings]) -> Vec<RuleSettings> {
    #[derive(Deserialize)]
    struct Shipped {
        rule: Vec<RuleSettings>,
    }
    let shipped = toml::from_str::<Shipped>(SHIPPED).expect("shipped.toml is valid (tested)").rule;
    let named = |name: &str| own.iter().find(|rule| rule.name == name);
    let mut rules: Vec<RuleSettings> = shipped
        .iter()
        .map(|rule| match named(&rule.name) {
            // To switch a shipped rule off takes no more than its name.
            Some(own) if own.select.is_empty() => RuleSettings { enabled: own.enabled, ..rule.clone() },
            Some(own) => own.clone(),
            None => rule.clone(),
        })
        .collect();
    let is_shipped = |name: &str| shipped.iter().any(|rule| rule.name == name);
    rules.extend(own.iter().filter(|rule| !is_shipped(&rule.name)).cloned());
    rules
}

/// The table that a rule with the sink `table` writes.
pub(super) fn table_name(rule: &RuleSettings) -> String {
    if rule.table.is_empty() { rule.name.replace('-', "_") } else { rule.table.clone() }
}

/// Notes what is wrong with the rules, as far as it shows without planning their SQL. `filters` is what the pipeline
/// itself subscribes to.
pub(crate) fn check(own: &[RuleSettings], root: &str, filters: &[String], m: &mut Mistakes) {
    let (mut names, mut tables) = (BTreeSet::new(), BTreeSet::new());
    for rule in own {
        m.require(
            names.insert(rule.name.as_str()),
            "rule",
            format!("two are named {:?}", rule.name),
            "rename one of them",
        );
    }
    for rule in effective(own) {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let named = (1..=64).contains(&rule.name.len()) && rule.name.chars().all(plain);
        let begins = rule.name.starts_with(|c: char| c.is_ascii_lowercase());
        m.require(
            named && begins,
            "rule.name",
            format!("{:?} cannot name a rule", rule.name),
            "write up to 64 of a-z, 0-9 and -, a letter first",
        );
        let key = |part: &str| format!("rule.{}.{part}", rule.name);
        m.require(
            !rule.select.trim().is_empty(),
            &key("select"),
            "empty",
            "write a query over batch.readings or another table of the batch; see default.toml",
        );
        let Some(sink) = rule.sink else {
            m.add(key("sink"), "not given", "write \"alert\", \"mqtt\" or \"table\"");
            continue;
        };
        let foreign = [
            ("key", !rule.key.is_empty(), SinkKind::Alert),
            ("labels", !rule.labels.is_empty(), SinkKind::Alert),
            ("severity", !rule.severity.is_empty(), SinkKind::Alert),
            ("resolve_after", !rule.resolve_after.is_zero(), SinkKind::Alert),
            ("topic", !rule.topic.is_empty(), SinkKind::Mqtt),
            ("table", !rule.table.is_empty(), SinkKind::Table),
        ];
        for (part, given, of) in foreign {
            let of = format!("{of:?}").to_lowercase();
            m.require(
                !given || format!("{sink:?}").to_lowercase() == of,
                &key(part),
                format!("means nothing to this sink; it belongs to sink = {of:?}"),
                "take it out, or change the sink",
            );
        }
        match sink {
            SinkKind::Alert => m.require(
                !rule.key.is_empty(),
                &key("key"),
                "empty",
                "name the columns that tell one alert from another, such as [\"site\", \"device_id\"]",
            ),
            SinkKind::Mqtt => check_topic(&rule, root, filters, m),
            SinkKind::Table => {
                let name = table_name(&rule);
                let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
                let good = name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(word);
                m.require(
                    good && name.len() <= 64
                        && ![RuleTable::ALERTS, RuleTable::PUBLISHED].contains(&name.as_str()),
                    &key("table"),
                    format!("{name:?} cannot name a table of a rule"),
                    "write up to 64 of a-z, 0-9 and _, a letter first, and neither alerts nor published",
                );
                m.require(
                    tables.insert(name.clone()),
                    &key("table"),
                    format!("rules.{name} is another rule's, too"),
                    "give each rule a table of its own",
                );
            }
        }
    }
}

fn check_topic(rule: &RuleSettings, root: &str, filters: &[String], m: &mut Mistakes) {
    let key = format!("rule.{}.topic", rule.name);
    let topic = Template::of(rule, root);
    match topic {
        Err(why) => m.add(key, why, "write words with / between them; {column} stands for a column's value"),
        Ok(topic) => {
            let own = filters.iter().find(|filter| topic_filter::overlap(&topic.as_filter(), filter));
            if let Some(own) = own {
                let problem = format!("{topic} would come back: the pipeline itself subscribes to {own}");
                m.add(key, problem, "write another topic, such as tailrace/v1/_cloud/rules/NAME");
            }
        }
    }
}

/// Notes what is wrong with `[rules]` and `[alerts]`.
pub(crate) fn check_bounds(rules: &RulesSettings, alerts: &AlertsSettings, m: &mut Mistakes) {
    let short = |d: Duration| format!("{} is too short", duration::format(d));
    m.require(
        rules.timeout >= Duration::from_millis(100),
        "rules.timeout",
        short(rules.timeout),
        "write 100ms or more",
    );
    m.require(
        (1..=1_000_000).contains(&rules.rows),
        "rules.rows",
        format!("{} is out of range", rules.rows),
        "write 1 to 1000000",
    );
    m.require(
        rules.memory_limit >= 1 << 20,
        "rules.memory_limit",
        format!("{} bytes are too few", rules.memory_limit),
        "write 1048576 or more",
    );
    m.require(
        RESEND.contains(&alerts.resend),
        "alerts.resend",
        format!("{} is out of range", duration::format(alerts.resend)),
        "write 5s to 5min",
    );
    m.require(
        alerts.timeout >= Duration::from_secs(1),
        "alerts.timeout",
        short(alerts.timeout),
        "write 1s or more",
    );
    if !alerts.ca.is_empty() {
        let readable = std::fs::metadata(Path::new(&alerts.ca)).is_ok();
        m.require(readable, "alerts.ca", format!("cannot read {:?}", alerts.ca), "name a PEM file");
    }
    let all = [("alerts.alertmanager", &alerts.alertmanager), ("alerts.webhook", &alerts.webhook)];
    for (key, targets) in all {
        for target in targets {
            match target.address() {
                Err(e) => m.add(
                    format!("{key}.url"),
                    format!("{e:#}"),
                    "write https://HOST/PATH, or file:PATH or env:NAME of a secret that holds it",
                ),
                Ok(url) => m.require(
                    url.scheme() == "https" || alerts.allow_http || is_loopback(&url),
                    &format!("{key}.url"),
                    format!("{} would be told in plain text", url.host_str().unwrap_or_default()),
                    "write https://, or set alerts.allow_http = true",
                ),
            }
            if let Err(e) = target.token.resolve() {
                m.add(format!("{key}.token"), format!("{e:#}"), "write file:PATH or env:NAME");
            }
        }
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use crate::settings::Settings;

    fn load(text: &str) -> Result<Settings, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cloud-ingest.toml");
        std::fs::write(&path, text).unwrap();
        Settings::load(Some(&path)).map_err(|mistakes| mistakes.to_string())
    }

    #[test]
    fn shipped_rules_stand_unless_one_of_their_name_takes_their_place() {
        let names = |settings: &Settings| -> Vec<(String, bool)> {
            super::effective(&settings.rule).into_iter().map(|rule| (rule.name, rule.enabled)).collect()
        };
        let shipped = load("").unwrap();
        assert_eq!(names(&shipped), [("anomalies".to_owned(), true), ("declared-losses".to_owned(), true)]);
        let own = load(
            "[[rule]]\nname = \"anomalies\"\nenabled = false\n[[rule]]\nname = \"hot\"\n\
             select = \"select 1 from batch.readings\"\nsink = \"table\"\n",
        )
        .unwrap();
        let all = names(&own);
        assert_eq!(all[0], ("anomalies".to_owned(), false));
        assert_eq!(all[2], ("hot".to_owned(), true));
        assert!(super::effective(&own.rule)[0].select.contains("event_id"), "it can be tried still");
    }

    #[test]
    fn every_mistake_is_named_with_its_fix() {
        let text = load(
            "[[rule]]\nname = \"Hot!\"\nselect = \"\"\n\
             [[rule]]\nname = \"a\"\nselect = \"select 1\"\nsink = \"alert\"\ntopic = \"x\"\n\
             [[rule]]\nname = \"loop\"\nselect = \"select 1\"\nsink = \"mqtt\"\n\
             topic = \"tailrace/v1/{site}/gw/json\"\n\
             [[rule]]\nname = \"b\"\nselect = \"select 1\"\nsink = \"table\"\ntable = \"alerts\"\n\
             [[rule]]\nname = \"c-d\"\nselect = \"select 1\"\nsink = \"table\"\n\
             [[rule]]\nname = \"e\"\nselect = \"select 1\"\nsink = \"table\"\ntable = \"c_d\"\n\
             [[rule]]\nname = \"e\"\nselect = \"select 1\"\nsink = \"table\"\ntable = \"f\"\n\
             [rules]\nrows = 0\n\
             [alerts]\nresend = \"1h\"\nca = \"/does/not/exist\"\n\
             [[alerts.webhook]]\nurl = \"http://192.0.2.7/hook\"\n\
             [[alerts.alertmanager]]\nurl = \"env:TAILRACE_NO_SUCH_SECRET\"\ntoken = \"hunter2\"\n",
        )
        .unwrap_err();
        for part in [
            "rule.name: \"Hot!\" cannot name a rule",
            "rule.Hot!.select: empty",
            "rule.Hot!.sink: not given",
            "rule.a.key: empty",
            "rule.a.topic: means nothing to this sink; it belongs to sink = \"mqtt\"",
            "rule.loop.topic: tailrace/v1/{site}/gw/json would come back",
            "rule.b.table: \"alerts\" cannot name",
            "rule.e.table: rules.c_d is another rule's, too",
            "two are named \"e\"",
            "rules.rows: 0 is out of range",
            "alerts.resend: 1h is out of range",
            "alerts.ca: cannot read",
            "alerts.webhook.url: 192.0.2.7 would be told in plain text",
            "alerts.alertmanager.url: environment variable TAILRACE_NO_SUCH_SECRET",
            "alerts.alertmanager.token: a secret stands in the configuration itself",
        ] {
            assert!(text.contains(part), "{part:?} not in {text}");
        }
        assert!(!text.contains("hunter2"), "{text}");
    }
}
