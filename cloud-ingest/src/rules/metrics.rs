//! What `/metrics` says of rules: `tailrace_cloud_rule_…` and `tailrace_cloud_alert_…`.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::deliver::Kind;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    rule: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Failed {
    rule: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Notified {
    target: &'static str,
    outcome: &'static str,
}

/// Counters of all rules; clones count together. Names of rules come from the configuration, so they are few.
#[derive(Clone, Debug, Default)]
pub struct RuleMetrics {
    batches: Family<Of, Counter>,
    rows: Family<Of, Counter>,
    failures: Family<Failed, Counter>,
    behind: Family<Of, Gauge>,
    active: Family<Of, Gauge>,
    notifications: Family<Notified, Counter>,
}

impl RuleMetrics {
    /// Registers all of them.
    pub fn new(registry: &mut Registry) -> Self {
        let m = Self::default();
        let r = registry.sub_registry_with_prefix("cloud");
        r.register("rule_batches", "Plans whose rows a rule has seen", m.batches.clone());
        r.register("rule_rows", "Rows that a rule handed to its sink", m.rows.clone());
        r.register(
            "rule_failures",
            "Batches or rows that a rule failed on, tries of its sink",
            m.failures.clone(),
        );
        r.register("rule_behind_plans", "Plans in silver that a rule has not seen yet", m.behind.clone());
        r.register("rule_alerts_active", "Alerts of a rule that have not ended", m.active.clone());
        r.register("alert_notifications", "Alerts told to receivers", m.notifications.clone());
        m
    }

    pub(super) fn ran(&self, rule: &str, rows: usize) {
        let of = Of { rule: rule.to_owned() };
        self.batches.get_or_create(&of).inc();
        self.rows.get_or_create(&of).inc_by(rows as u64);
    }

    /// `reason` is `sql`, `timeout`, `rows`, `memory`, `alerts`, `topic`, or `sink` for what is tried again.
    pub(super) fn failed(&self, rule: &str, reason: &'static str, times: u64) {
        self.failures.get_or_create(&Failed { rule: rule.to_owned(), reason }).inc_by(times);
    }

    pub(super) fn behind(&self, rule: &str, plans: i64) {
        self.behind.get_or_create(&Of { rule: rule.to_owned() }).set(plans);
    }

    pub(super) fn active(&self, rule: &str, alerts: usize) {
        self.active
            .get_or_create(&Of { rule: rule.to_owned() })
            .set(i64::try_from(alerts).unwrap_or(i64::MAX));
    }

    pub(super) fn told(&self, kind: Kind, alerts: usize) {
        self.notifications
            .get_or_create(&Notified { target: kind.as_str(), outcome: "delivered" })
            .inc_by(alerts as u64);
    }

    pub(super) fn not_told(&self, kind: Kind) {
        self.notifications.get_or_create(&Notified { target: kind.as_str(), outcome: "failed" }).inc();
    }
}
