//! What `/metrics` says of the cloud side: `tailrace_cloud_…`.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::silver::Counts;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// Counters of all stages; clones count together.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    received: Counter,
    dropped: Counter,
    acknowledged: Counter,
    stale: Counter,
    connected: Gauge,
    segments: Counter,
    bronze_bytes: Counter,
    bronze_retries: Counter,
    plan: Gauge,
    refine_failures: Counter,
    redelivered: Counter,
    readings: Family<Outcome, Counter>,
}

impl Metrics {
    /// Registers all of them.
    pub fn new(registry: &mut Registry) -> Self {
        let m = Self::default();
        let r = registry.sub_registry_with_prefix("cloud");
        r.register("messages_received", "Messages taken from the broker", m.received.clone());
        r.register("messages_dropped", "Messages of QoS 0 that found no room", m.dropped.clone());
        r.register("messages_acknowledged", "Messages acknowledged after bronze", m.acknowledged.clone());
        r.register("acknowledgements_stale", "Not sent: the connection was another", m.stale.clone());
        r.register("mqtt_connected", "1 while connected to the broker", m.connected.clone());
        r.register("bronze_segments", "Segments put", m.segments.clone());
        r.register("bronze_payload_bytes", "Payloads in them", m.bronze_bytes.clone());
        r.register("bronze_put_retries", "Puts tried again", m.bronze_retries.clone());
        r.register("refine_plan", "Newest plan carried out", m.plan.clone());
        r.register("refine_failures", "Steps tried again", m.refine_failures.clone());
        r.register("messages_redelivered", "Messages that were refined before", m.redelivered.clone());
        r.register("readings", "Readings refined, by outcome", m.readings.clone());
        m
    }

    pub(crate) fn received(&self) {
        self.received.inc();
    }

    /// Messages taken from the broker so far.
    pub(crate) fn taken(&self) -> u64 {
        self.received.get()
    }

    pub(crate) fn dropped(&self) {
        self.dropped.inc();
    }

    pub(crate) fn acknowledged(&self, messages: usize) {
        self.acknowledged.inc_by(messages as u64);
    }

    pub(crate) fn stale(&self) {
        self.stale.inc();
    }

    pub(crate) fn connected(&self, connected: bool) {
        self.connected.set(i64::from(connected));
    }

    pub(crate) fn sealed(&self, bytes: usize) {
        self.segments.inc();
        self.bronze_bytes.inc_by(bytes as u64);
    }

    pub(crate) fn put_failed(&self) {
        self.bronze_retries.inc();
    }

    pub(crate) fn refined(&self, plan: u64, counts: Counts) {
        self.plan.set(i64::try_from(plan).unwrap_or(i64::MAX));
        self.redelivered.inc_by(counts.redelivered_messages);
        for (outcome, n) in
            [("stored", counts.stored), ("duplicate", counts.duplicates), ("quarantined", counts.quarantined)]
        {
            self.readings.get_or_create(&Outcome { outcome }).inc_by(n);
        }
    }

    pub(crate) fn refine_failed(&self) {
        self.refine_failures.inc();
    }
}
