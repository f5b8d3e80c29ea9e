//! What the agent tells Prometheus, and where: `/metrics` and `/healthz`, beside the gateway's own [page](crate::page).
//!
//! `tailrace_edge_readings_total{stage, outcome}` shows conservation: for every stage, in = the sum of its outcomes.
//! Labels come from enumerations and configuration, never from data.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
};

use anyhow::Context as _;
use axum::{Router, http::header::CONTENT_TYPE, routing::get};
use common::{http, telemetry};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::net::TcpListener;

use crate::{
    census::{Census, Outcome},
    filter::Mark,
    window::Missed,
};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Readings {
    stage: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Marked {
    mark: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Why {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Model {
    model: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelWindow {
    model: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Machine {
    model: String,
    machine: String,
}

/// Counts of the stages up to the outbox; delivery has its own.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    readings: Family<Readings, Counter>,
    marks: Family<Marked, Counter>,
    faults: Family<Why, Counter>,
    aggregates: Counter,
    model_windows: Family<ModelWindow, Counter>,
    models: Family<Model, Gauge>,
    scores: Family<Machine, Gauge<f64, AtomicU64>>,
    events: Counter,
    seals: Counter,
    clock_set: Gauge,
}

impl Metrics {
    /// Metrics that stand in `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let own = Self::default();
        registry.register(
            "edge_readings",
            "Readings by stage and what became of them there",
            own.readings.clone(),
        );
        registry.register("edge_marks", "Findings of the filter", own.marks.clone());
        registry.register(
            "edge_source_faults",
            "Polls that gave no value, connections to a plant's broker that broke, filters that it refused",
            own.faults.clone(),
        );
        registry.register(
            "edge_aggregates",
            "Aggregates emitted, revisions included",
            own.aggregates.clone(),
        );
        registry.register(
            "edge_model_windows",
            "Windows of the models by what became of them: scored, failed, incomplete, standing",
            own.model_windows.clone(),
        );
        registry.register(
            "edge_model_active",
            "1 where a model scores, 0 where it cannot be used",
            own.models.clone(),
        );
        registry.register("edge_model_score", "Score of the latest window", own.scores.clone());
        registry.register("edge_anomaly_records", "Anomalies raised and cleared", own.events.clone());
        registry.register("edge_seals", "Batches made durable in the outbox", own.seals.clone());
        registry.register(
            "edge_clock_set",
            "1 while the gateway's time is true, 0 while it counts from the machine's start",
            own.clock_set.clone(),
        );
        own
    }

    /// Whether the gateway's time is true.
    pub fn clock_set(&self, set: bool) {
        self.clock_set.set(i64::from(set));
    }

    /// A chip gave no value, or a broker is away or refuses.
    pub fn source_fault(&self, reason: &'static str) {
        self.faults.get_or_create(&Why { reason }).inc();
    }

    /// What a source sent.
    pub fn polled(&self, census: &Census) {
        self.count("source", census);
    }

    /// Findings of the filter, by [`Mark::ALL`], and what it held and passed on.
    pub fn filtered(&self, marks: [u64; Mark::ALL.len()], held: u64, passed: u64) {
        for (mark, n) in Mark::ALL.into_iter().zip(marks).filter(|(_, n)| *n > 0) {
            self.marks.get_or_create(&Marked { mark: mark.as_str() }).inc_by(n);
        }
        self.add("filter", "held", held);
        self.add("filter", "passed", passed);
    }

    /// Readings that joined a window and those that did not, and the aggregates that came of it.
    pub fn windowed(&self, readings: u64, missed: Missed, aggregates: u64) {
        self.add("window", "joined", readings - missed.late - missed.early);
        self.add("window", "late", missed.late);
        self.add("window", "early", missed.early);
        self.aggregates.inc_by(aggregates);
    }

    /// Whether a model is in use.
    pub fn model(&self, name: &str, active: bool) {
        self.models.get_or_create(&Model { model: name.to_owned() }).set(active.into());
    }

    /// What became of a model's window.
    pub fn window(&self, model: &str, outcome: &'static str) {
        self.model_windows.get_or_create(&ModelWindow { model: model.to_owned(), outcome }).inc();
    }

    /// The score of a machine's window.
    pub fn score(&self, model: &str, machine: &str, score: f64) {
        let label = Machine { model: model.to_owned(), machine: machine.to_owned() };
        self.scores.get_or_create(&label).set(score);
    }

    /// Readings that came too late or too early for the windows of a model.
    pub fn missed_by_models(&self, missed: Missed) {
        self.add("model", "late", missed.late);
        self.add("model", "early", missed.early);
    }

    /// Anomalies raised or cleared.
    pub fn events(&self, n: u64) {
        self.events.inc_by(n);
    }

    /// A seal, with the readings that it made durable.
    pub fn sealed(&self, readings: u64) {
        self.seals.inc();
        self.add("seal", "sealed", readings);
    }

    fn count(&self, stage: &'static str, census: &Census) {
        for outcome in Outcome::ALL {
            self.add(stage, outcome.as_str(), census.total(outcome));
        }
    }

    fn add(&self, stage: &'static str, outcome: &'static str, n: u64) {
        if n > 0 {
            self.readings.get_or_create(&Readings { stage, outcome }).inc_by(n);
        }
    }
}

/// A registry that stages fill and the server reads.
pub type Shared = Arc<Mutex<Registry>>;

/// Listens at `address`.
///
/// # Errors
/// When the port is taken.
pub async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!(
            "metrics.listen = {address} cannot be used; free the port or choose another, or \"\" for none"
        )
    })
}

/// Connections at a time: a page in a browser has a few, whoever reads the metrics one.
pub const MAX_CONNECTIONS: usize = 16;

/// Answers, `page` included, until the task is dropped.
pub async fn serve(listener: TcpListener, registry: Shared, page: Router) {
    let metrics = move || {
        let registry = Arc::clone(&registry);
        async move {
            let text = telemetry::exposition(&registry.lock().unwrap_or_else(PoisonError::into_inner));
            ([(CONTENT_TYPE, telemetry::EXPOSITION_TYPE)], text)
        }
    };
    let app = page.route("/metrics", get(metrics)).route("/healthz", get(|| async { "ok\n" }));
    http::serve(listener, app, MAX_CONNECTIONS, std::future::pending()).await;
}
