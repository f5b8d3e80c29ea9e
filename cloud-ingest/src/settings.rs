//! Settings of the cloud side: `default.toml` documents every key.

use std::{collections::BTreeMap, net::IpAddr, path::Path, time::Duration};

use common::{
    config::{self, Layers, Mistakes, SecretRef},
    time::duration,
    topic_filter,
    units::Unit,
};
use serde::Deserialize;
use url::Url;

use crate::{
    decode::JsonSource,
    gold::calendar::{Calendars, SiteSettings},
    quality::{SoftRule, TypeRule},
    rules::{
        self,
        settings::{AlertsSettings, RuleSettings, RulesSettings},
    },
    serve, store,
};

/// The documented defaults.
pub const DEFAULTS: &str = include_str!("../default.toml");
/// `mqtt.client_id` in them.
pub const DEFAULT_CLIENT_ID: &str = "tailrace-cloud";

/// Everything that can be configured.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct Settings {
    pub roles: Vec<Role>,
    pub store: StoreSettings,
    pub mqtt: MqttSettings,
    pub json: Vec<JsonSource>,
    pub bronze: BronzeSettings,
    pub refine: RefineSettings,
    pub quality: QualitySettings,
    pub gold: GoldSettings,
    pub upkeep: UpkeepSettings,
    pub rule: Vec<RuleSettings>,
    pub rules: RulesSettings,
    pub alerts: AlertsSettings,
    pub serve: ServeSection,
}

/// What a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// From the broker into bronze.
    Ingest,
    /// From bronze into silver and gold.
    Refine,
    /// SQL, HTTP, dashboard.
    Serve,
}

/// `[store]`
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct StoreSettings {
    pub url: String,
    #[serde(with = "duration")]
    pub timeout: Duration,
    #[serde(with = "duration")]
    pub retry_for: Duration,
    pub ca: String,
    pub s3: S3Settings,
}

impl StoreSettings {
    /// The defaults, at `url`.
    pub fn at(url: &str) -> StoreSettings {
        let defaults: Settings = toml::from_str(DEFAULTS).expect("default.toml is valid (tested)");
        StoreSettings { url: url.to_owned(), ..defaults.store }
    }
}

/// `[store.s3]`
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct S3Settings {
    pub endpoint: String,
    pub region: String,
    pub virtual_host: bool,
    pub allow_http: bool,
    pub access_key_id: SecretRef,
    pub secret_access_key: SecretRef,
    pub session_token: SecretRef,
}

/// `[mqtt]`
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct MqttSettings {
    pub url: String,
    pub root: String,
    pub client_id: String,
    pub share: String,
    pub username: String,
    pub password: SecretRef,
    pub ca: String,
    #[serde(with = "duration")]
    pub keep_alive: Duration,
    #[serde(with = "duration")]
    pub session_expiry: Duration,
    #[serde(with = "duration")]
    pub max_backoff: Duration,
    #[serde(with = "duration")]
    pub heartbeat: Duration,
    pub inflight: u16,
    pub max_packet: u32,
}

/// `[bronze]`
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct BronzeSettings {
    #[serde(with = "duration")]
    pub max_age: Duration,
    pub max_bytes: usize,
}

/// `[refine]`
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct RefineSettings {
    #[serde(with = "duration")]
    pub interval: Duration,
    pub plan_segments: usize,
    pub plan_bytes: u64,
}

/// `[quality]`
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct QualitySettings {
    #[serde(with = "duration")]
    pub future_tolerance: Duration,
    pub types: BTreeMap<String, TypeRule>,
    pub devices: BTreeMap<String, [f64; 2]>,
    pub soft: BTreeMap<String, SoftRule>,
}

impl QualitySettings {
    fn check_soft(&self, m: &mut Mistakes) {
        for (name, soft) in &self.soft {
            let key = |key: &str| format!("quality.soft.{name}.{key}");
            if let Some([low, high]) = soft.range {
                m.require(low < high, &key("range"), format!("[{low}, {high}]"), "write [LOW, HIGH]");
            }
            if let Some(rate) = soft.rate {
                m.require(rate > 0.0, &key("rate"), rate, "write a change per second above 0");
            }
        }
    }
}

/// `[gold]`
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct GoldSettings {
    #[serde(with = "duration")]
    pub interval: Duration,
    #[serde(with = "duration")]
    pub hold: Duration,
    pub sites: BTreeMap<String, SiteSettings>,
}

/// `[upkeep]`
#[derive(Clone, Copy, Debug, Deserialize)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct UpkeepSettings {
    #[serde(with = "duration")]
    pub interval: Duration,
    #[serde(with = "duration")]
    pub pack_after: Duration,
    #[serde(with = "duration")]
    pub keep_versions: Duration,
    #[serde(with = "duration")]
    pub keep_bronze: Duration,
    #[serde(with = "duration")]
    pub keep_silver: Duration,
    #[serde(with = "duration")]
    pub keep_gold: Duration,
}

/// `[serve]`
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "default.toml documents every key")]
pub struct ServeSection {
    pub listen: IpAddr,
    pub pg_port: u16,
    pub http_port: u16,
    pub users: Vec<User>,
    pub tls_certificate: String,
    pub tls_key: String,
    #[serde(with = "duration")]
    pub statement_timeout: Duration,
    pub row_cap: u64,
    pub memory_limit: usize,
    pub max_connections: usize,
    #[serde(with = "duration")]
    pub heartbeat: Duration,
}

/// `[[serve.users]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// As it is given to log in.
    pub name: String,
    /// Where the password is.
    pub password: SecretRef,
}

impl Settings {
    /// Reads the layers and checks what they say.
    ///
    /// # Errors
    /// All mistakes, each with its fix.
    pub fn load(file: Option<&Path>) -> Result<Settings, Mistakes> {
        let layers = Layers { defaults: DEFAULTS, file, env_prefix: "TAILRACE_CLOUD" };
        let settings: Settings = config::load(&layers)?;
        let origin = file.map_or_else(|| "the environment".to_owned(), |path| path.display().to_string());
        let mut mistakes = Mistakes::of(origin);
        settings.check(&mut mistakes);
        mistakes.into_result(settings)
    }

    /// Whether the process has this role.
    pub fn has(&self, role: Role) -> bool {
        self.roles.contains(&role)
    }

    /// Topics of devices that are not ours.
    pub fn json_filters(&self) -> Vec<String> {
        self.json.iter().map(|source| source.filter.clone()).collect()
    }

    fn check(&self, m: &mut Mistakes) {
        m.require(!self.roles.is_empty(), "roles", "empty", "write ingest, refine, serve or some of them");
        store::check(&self.store, m);
        let url = Url::parse(&self.mqtt.url);
        let scheme = url.as_ref().map_or("", |url| url.scheme());
        m.require(
            matches!(scheme, "mqtt" | "mqtts") && url.as_ref().is_ok_and(|url| url.host_str().is_some()),
            "mqtt.url",
            format!("{:?} names no broker", self.mqtt.url),
            "write mqtt://HOST:PORT, or mqtts://HOST:PORT for TLS",
        );
        let root = &self.mqtt.root;
        let plain = !root.is_empty() && !root.starts_with('/') && !root.ends_with('/');
        m.require(
            plain && !root.contains(['+', '#']),
            "mqtt.root",
            format!("{root:?} cannot begin a topic"),
            "write words with / between them, without + and #",
        );
        m.require(!self.mqtt.client_id.is_empty(), "mqtt.client_id", "empty", "give each replica its own");
        m.require(
            !self.mqtt.share.contains(['/', '+', '#', '\0']),
            "mqtt.share",
            format!("{:?} cannot name a group", self.mqtt.share),
            "write a word without /, + and #",
        );
        for source in &self.json {
            m.require(
                topic_filter::is_valid(&source.filter),
                "json.filter",
                format!("{:?} is no topic filter", source.filter),
                "write topics with + and #; mqtt.share makes them shared",
            );
        }
        let millis = |d: Duration| format!("{} is too short", duration::format(d));
        let seconds = |n| Duration::from_secs(n);
        m.require(
            self.mqtt.keep_alive >= seconds(5),
            "mqtt.keep_alive",
            millis(self.mqtt.keep_alive),
            "write 5s or more",
        );
        m.require(
            self.mqtt.heartbeat >= seconds(1),
            "mqtt.heartbeat",
            millis(self.mqtt.heartbeat),
            "write 1s or more",
        );
        m.require(self.mqtt.inflight >= 2, "mqtt.inflight", self.mqtt.inflight, "write 2 or more");
        m.require(self.bronze.max_bytes > 0, "bronze.max_bytes", "0", "write 1048576 or more");
        m.require(self.refine.plan_segments > 0, "refine.plan_segments", "0", "write 1 or more");
        for (name, rule) in &self.quality.types {
            m.require(
                Unit::parse(&rule.unit).is_some(),
                &format!("quality.types.{name}"),
                format!("{:?} is no known UCUM unit", rule.unit),
                "see common/src/units.rs for those that convert",
            );
        }
        let ranges = self.quality.types.iter().map(|(name, rule)| (name, rule.range));
        for (name, [low, high]) in ranges.chain(self.quality.devices.iter().map(|(name, r)| (name, *r))) {
            m.require(
                low < high,
                &format!("quality: {name}"),
                format!("[{low}, {high}]"),
                "write [LOW, HIGH]",
            );
        }
        Calendars::parse(&self.gold.sites, m);
        let rests = self.gold.interval >= Duration::from_millis(100);
        m.require(rests, "gold.interval", "too short", "write 100ms or more");
        self.quality.check_soft(m);
        self.check_upkeep(m);
        rules::settings::check(&self.rule, root, &rules::subscribed(self), m);
        rules::settings::check_bounds(&self.rules, &self.alerts, m);
        m.require(
            self.serve.pg_port != self.serve.http_port,
            "serve.http_port",
            format!("{} is serve.pg_port, too", self.serve.http_port),
            "give one of them another port",
        );
        serve::check_listen("serve.listen", self.serve.listen, !self.serve.users.is_empty(), m);
        serve::check_connections(self.serve.max_connections, m);
        m.require(
            self.serve.tls_certificate.is_empty() == self.serve.tls_key.is_empty(),
            "serve.tls_certificate",
            "of certificate and key only one is given",
            "give both or neither",
        );
    }

    fn check_upkeep(&self, m: &mut Mistakes) {
        let upkeep = &self.upkeep;
        let within = |m: &mut Mistakes, key: &str, value: Duration, hours: std::ops::RangeInclusive<u64>| {
            let (least, most) = (hours.start(), hours.end());
            m.require(
                (Duration::from_secs(least * 3600)..=Duration::from_secs(most.saturating_mul(3600)))
                    .contains(&value),
                key,
                format!("{} is out of range", duration::format(value)),
                &format!("write {least}h to {most}h"),
            );
        };
        m.require(
            upkeep.interval >= Duration::from_secs(60),
            "upkeep.interval",
            "too short",
            "write 1min or more",
        );
        // The refiner looks for new segments in the hour that it is and in the one before.
        within(m, "upkeep.pack_after", upkeep.pack_after, 1..=24 * 365);
        // Every checkpoint names the files that were removed for so long.
        within(m, "upkeep.keep_versions", upkeep.keep_versions, 1..=24 * 7);
        for (key, keep) in [
            ("upkeep.keep_bronze", upkeep.keep_bronze),
            ("upkeep.keep_silver", upkeep.keep_silver),
            ("upkeep.keep_gold", upkeep.keep_gold),
        ] {
            m.require(
                // A day has up to 25 hours, and is open for all of them.
                keep.is_zero() || keep >= Duration::from_secs(2 * 86_400),
                key,
                format!("{} is too short", duration::format(keep)),
                "write 2d or more, or 0s to keep everything",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Settings, Mistakes> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cloud-ingest.toml");
        std::fs::write(&path, text).unwrap();
        Settings::load(Some(&path))
    }

    #[test]
    fn the_defaults_hold() {
        let settings = load("").unwrap();
        assert_eq!(settings.mqtt.client_id, DEFAULT_CLIENT_ID);
        assert!(settings.has(Role::Ingest) && settings.has(Role::Refine) && settings.has(Role::Serve));
        assert!(settings.serve.listen.is_loopback());
    }

    #[test]
    fn mistakes_come_together() {
        let text = load(
            "[mqtt]\nurl = \"http://x\"\nkeep_alive = \"1s\"\nshare = \"a/b\"\n[serve]\nlisten = \"0.0.0.0\"\npg_port = 8080\nhttp_port = 8080\nmax_connections = 0\n\
             [[json]]\nfilter = \"$share/g/x\"\nsite = \"s\"\ngateway = \"g\"\n\
             [upkeep]\nkeep_versions = \"30d\"\nkeep_silver = \"1h\"\n\
             [gold.sites.plant]\ntime_zone = \"Mars\"\n\
             [quality.devices]\nx = [2, 1]\n[quality.soft.temperature]\nrange = [20, 10]\nrate = 0.0\n\
             [quality.types.smell]\nunit = \"ou\"\nrange = [0, 1]\n",
        )
        .unwrap_err()
        .to_string();
        for part in [
            "mqtt.url",
            "mqtt.keep_alive",
            "mqtt.share",
            "json.filter",
            "serve.listen",
            "serve.http_port: 8080",
            "serve.max_connections: 0",
            "[2, 1]",
            "quality.types.smell",
            "quality.soft.temperature.range: [20, 10]",
            "quality.soft.temperature.rate",
            "upkeep.keep_versions",
            "upkeep.keep_silver",
            "gold.sites.plant.time_zone: \"Mars\"",
        ] {
            assert!(text.contains(part), "{part:?} not in {text}");
        }
    }

    #[test]
    fn lists_and_maps_of_ones_own() {
        let settings = load(
            "roles = [\"serve\"]\n[[json]]\nfilter = \"x/#\"\nsite = \"s\"\ngateway = \"g\"\n\
             [quality.types.smell]\nunit = \"1\"\nrange = [0, 1.5]\n\
             [quality.soft.smell]\nrange = [0, 1]\ninterval = \"1min\"\n\
             [[serve.users]]\nname = \"grafana\"\npassword = \"env:PW\"\n",
        )
        .unwrap();
        assert_eq!((settings.roles.len(), settings.json.len()), (1, 1));
        assert_eq!(settings.quality.types["smell"].range, [0.0, 1.5]);
        assert_eq!(settings.quality.soft["smell"].interval, Duration::from_secs(60));
        assert_eq!(settings.serve.users[0].name, "grafana");
    }
}
