//! How soon SQL has what was published: one asker for each table, as a dashboard would ask.
//!
//! Of each message of the first [`GATEWAYS`] gateways its last reading counts: from the moment at which the gateway gave
//! the message to its MQTT client, until an answer of `POST /api/v1/sql` has come that holds the reading. An answer is
//! followed by the next question after [`PAUSE`], so that this, and the time that a question takes, is in the figures.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, ensure};
use common::time::Timestamp;
use serde::Serialize;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::{
    fleet::{Published, Watch},
    http,
};

/// So many are asked about.
const GATEWAYS: u64 = 20;
/// Between an answer and the next question.
const PAUSE: Duration = Duration::from_millis(200);
/// Something that was published is waited for so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// What nobody has seen yet: last readings by device, in the order of their times.
type Waiting = BTreeMap<String, VecDeque<(Timestamp, Instant)>>;

/// Of one table, in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Latency {
    /// Messages that were waited for.
    pub(super) messages: u64,
    pub(super) p50_ms: f64,
    pub(super) p95_ms: f64,
    pub(super) p99_ms: f64,
    pub(super) max_ms: f64,
    /// Questions, those that failed, and how long an answer took.
    pub(super) queries: u64,
    pub(super) queries_failed: u64,
    pub(super) query_p50_ms: f64,
    pub(super) query_p99_ms: f64,
}

/// Asks one table until told to end.
pub(super) struct Asker {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    server: SocketAddr,
    table: &'static str,
    state: Mutex<State>,
    /// Nothing will be published any more.
    over: AtomicBool,
}

#[derive(Default)]
struct State {
    waiting: Waiting,
    seen: Vec<Duration>,
    answered: Vec<Duration>,
    failed: u64,
}

impl Asker {
    pub(super) fn begin(server: SocketAddr, table: &'static str) -> Asker {
        let over = AtomicBool::new(false);
        let shared = Arc::new(Shared { server, table, state: Mutex::default(), over });
        let task = tokio::spawn(Arc::clone(&shared).ask());
        Asker { shared, task }
    }

    /// So far.
    pub(super) fn latency(&self) -> Latency {
        self.shared.lock().latency()
    }

    /// Waits for what is still to be seen.
    pub(super) async fn end(self) -> anyhow::Result<Latency> {
        self.shared.over.store(true, Ordering::Relaxed);
        let table = self.shared.table;
        if timeout(PATIENCE, self.task).await.is_err() {
            let missing = self.shared.lock().waiting.values().map(VecDeque::len).sum::<usize>();
            ensure!(missing == 0, "{missing} messages were not to be found in {table} after {PATIENCE:?}");
        }
        Ok(self.shared.lock().latency())
    }
}

/// Tells all of them.
pub(super) fn told(askers: &[Asker]) -> Watch {
    let all: Vec<Arc<Shared>> = askers.iter().map(|asker| Arc::clone(&asker.shared)).collect();
    Arc::new(move |published: Published| {
        for one in all.iter().filter(|_| published.gateway < GATEWAYS) {
            let mut state = one.lock();
            let of_device = state.waiting.entry(published.device.clone()).or_default();
            of_device.push_back((published.ts, published.at));
        }
    })
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(self: Arc<Self>) {
        loop {
            let question = question(self.table, &self.lock().waiting);
            if let Some(sql) = question {
                let asked = Instant::now();
                let answer = http::post(self.server, "/api/v1/sql", &serde_json::json!({ "sql": sql })).await;
                let now = Instant::now();
                let mut state = self.lock();
                match answer.and_then(|text| newest(&text)) {
                    Ok(newest) => {
                        state.answered.push(now - asked);
                        state.answered_with(&newest, now);
                    }
                    Err(e) => {
                        state.failed += 1;
                        eprintln!("asking {}: {e:#}", self.table);
                    }
                }
            } else if self.over.load(Ordering::Relaxed) {
                return;
            }
            sleep(PAUSE).await;
        }
    }
}

/// For the newest reading of each device that is waited for; `None` when nothing is.
fn question(table: &str, waiting: &Waiting) -> Option<String> {
    let open: Vec<_> = waiting.iter().filter_map(|(device, of)| Some((device, of.front()?.0))).collect();
    let oldest = open.iter().map(|(_, ts)| *ts).min()?;
    let devices: Vec<String> = open.iter().map(|(device, _)| format!("'{device}'")).collect();
    let devices = devices.join(", ");
    Some(format!(
        "SELECT device_id, max(ts) FROM {table} WHERE device_id IN ({devices}) AND ts >= '{oldest}' GROUP BY device_id"
    ))
}

/// By device.
fn newest(answer: &str) -> anyhow::Result<Vec<(String, Timestamp)>> {
    let answer: serde_json::Value = serde_json::from_str(answer)?;
    let rows = answer["rows"].as_array().context("an answer without rows")?;
    let row = |row: &serde_json::Value| {
        let (device, ts) = (row[0].as_str()?, row[1].as_str()?);
        Some((device.to_owned(), ts.parse().ok()?))
    };
    rows.iter().map(|r| row(r).with_context(|| format!("{r} is no device and time"))).collect()
}

impl State {
    fn answered_with(&mut self, newest: &[(String, Timestamp)], now: Instant) {
        for (device, newest) in newest {
            let Some(waiting) = self.waiting.get_mut(device) else { continue };
            while let Some((_, published)) = waiting.pop_front_if(|(ts, _)| *ts <= *newest) {
                self.seen.push(now - published);
            }
        }
    }

    fn latency(&self) -> Latency {
        let (mut seen, mut answered) = (self.seen.clone(), self.answered.clone());
        seen.sort_unstable();
        answered.sort_unstable();
        Latency {
            messages: seen.len() as u64,
            p50_ms: percentile(&seen, 0.5),
            p95_ms: percentile(&seen, 0.95),
            p99_ms: percentile(&seen, 0.99),
            max_ms: percentile(&seen, 1.0),
            queries: answered.len() as u64,
            queries_failed: self.failed,
            query_p50_ms: percentile(&answered, 0.5),
            query_p99_ms: percentile(&answered, 0.99),
        }
    }
}

/// Nearest rank, in milliseconds; 0 of nothing.
fn percentile(sorted: &[Duration], part: f64) -> f64 {
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).map_or(0.0, |duration| duration.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_answer_holds_is_no_longer_waited_for() {
        let at = |micros| Timestamp::from_micros(micros);
        let published = Instant::now();
        let mut state = State::default();
        assert_eq!(question("live.readings", &state.waiting), None);
        for ts in [10, 20, 30] {
            state.waiting.entry("a".into()).or_default().push_back((at(ts), published));
        }
        state.waiting.entry("b".into()).or_default().push_back((at(25), published));
        let sql = question("live.readings", &state.waiting).unwrap();
        assert!(sql.contains("FROM live.readings WHERE device_id IN ('a', 'b')"), "{sql}");
        assert!(sql.contains("ts >= '1970-01-01T00:00:00.000010Z'"), "{sql}");
        let answer = r#"{"columns": [], "rows": [["a", "1970-01-01T00:00:00.000020Z"]]}"#;
        state.answered_with(&newest(answer).unwrap(), published + Duration::from_millis(40));
        assert_eq!((state.waiting["a"].len(), state.waiting["b"].len()), (1, 1));
        let Latency { messages, p50_ms, max_ms, .. } = state.latency();
        assert_eq!((messages, p50_ms, max_ms), (2, 40.0, 40.0));
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let sorted: Vec<Duration> = (1..=200).map(Duration::from_millis).collect();
        let of = |part| percentile(&sorted, part);
        assert_eq!((of(0.5), of(0.99), of(1.0), percentile(&[], 0.5)), (100.0, 198.0, 200.0, 0.0));
    }
}
