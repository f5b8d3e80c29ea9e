//! What the demo shows on the terminal: one screen, redrawn each second, or a line now and then when the
//! output is not a terminal.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    io::{IsTerminal as _, Write as _, stdout},
    net::SocketAddr,
    time::Duration,
};

use common::{
    telemetry::print_line,
    time::{Timestamp, duration},
};
use crossterm::{
    cursor::{Hide, MoveTo, Show},
    event::{self, KeyCode, KeyModifiers},
    execute,
    style::Stylize as _,
    terminal::{self, Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen},
};
use serde_json::Value;
use tokio::{sync::mpsc, time::Instant};

use super::Options;
use crate::http;

/// The keys and what they do; the page has a button for each but the last.
pub(super) const KEYS: [(char, &str); 6] = [
    ('f', "break the reactor"),
    ('c', "cut the cable"),
    ('b', "kill the broker"),
    ('k', "kill the agent"),
    ('r', "repair everything"),
    ('q', "stop"),
];

/// Between two lines when the output is not a terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Keys pressed on the terminal; never any when there is none.
pub(super) fn keys() -> mpsc::Receiver<char> {
    let (tx, rx) = mpsc::channel(8);
    if !std::io::stdin().is_terminal() || !stdout().is_terminal() {
        // Held for ever, so that the receiver stays open.
        std::mem::forget(tx);
        return rx;
    }
    std::thread::spawn(move || {
        while let Ok(event) = event::read() {
            let event::Event::Key(key) = event else { continue };
            let KeyCode::Char(c) = key.code else { continue };
            let interrupt = c == 'c' && key.modifiers.contains(KeyModifiers::CONTROL);
            if tx.blocking_send(if interrupt { 'q' } else { c.to_ascii_lowercase() }).is_err() {
                return;
            }
        }
    });
    rx
}

/// What is known of the running pipeline.
#[derive(Debug, Default)]
pub(super) struct Summary {
    /// Whether all of the history is in silver.
    pub(super) history_done: bool,
    agents: BTreeMap<String, (Timestamp, bool, String)>,
    totals: Value,
    overview: Value,
    outbox_messages: f64,
    outbox_bytes: f64,
    polled: Rate,
    stored: Rate,
}

impl Summary {
    pub(super) fn position(&mut self, agent: &str, at: Timestamp, live: bool, phase: String) {
        self.agents.insert(agent.to_owned(), (at, live, phase));
    }

    pub(super) fn all_live(&self, agents: usize) -> bool {
        self.agents.len() == agents && self.agents.values().all(|(_, live, _)| *live)
    }

    /// Asks the children. What does not answer keeps its last figures.
    pub(super) async fn refresh(&mut self, cloud: SocketAddr, agents: &[SocketAddr]) {
        if let Some(audit) = json(http::get(cloud, "/api/v1/audit").await) {
            self.totals = audit["totals"].clone();
        }
        if let Some(overview) = json(http::get(cloud, "/api/v1/overview").await) {
            self.overview = overview;
        }
        let mut polled = 0.0;
        (self.outbox_messages, self.outbox_bytes) = (0.0, 0.0);
        for agent in agents {
            let Ok(metrics) = http::get(*agent, "/metrics").await else { continue };
            polled += http::metric(&metrics, "tailrace_edge_readings_total", "outcome=\"polled\"");
            self.outbox_messages += http::metric(&metrics, "tailrace_edge_outbox_messages", "");
            self.outbox_bytes += http::metric(&metrics, "tailrace_edge_outbox_bytes", "");
        }
        self.polled.update(polled);
        self.stored.update(self.total("stored") as f64);
    }

    /// Whether silver holds what the agents read when they went live.
    pub(super) async fn silver_has_caught_up(&self, cloud: SocketAddr) -> bool {
        let sql = "SELECT count(*) AS n FROM silver.sensor_readings WHERE ts > now() - INTERVAL '30 seconds'";
        let answer = json(http::post(cloud, "/api/v1/sql", &serde_json::json!({ "sql": sql })).await);
        answer.and_then(|a| a["rows"][0][0].as_i64()).is_some_and(|n| n > 0) && self.outbox_messages < 50.0
    }

    fn total(&self, name: &str) -> i64 {
        self.totals[name].as_i64().unwrap_or(0)
    }
}

fn json(answer: anyhow::Result<String>) -> Option<Value> {
    serde_json::from_str(&answer.ok()?).ok()
}

/// How far back a rate looks: sensors are polled every few seconds, so a single second tells little.
const RATE_OVER: Duration = Duration::from_secs(10);

/// A growing count and how fast it grew lately.
#[derive(Debug, Default)]
struct Rate {
    seen: VecDeque<(Instant, f64)>,
    per_second: f64,
}

impl Rate {
    fn update(&mut self, count: f64) {
        let now = Instant::now();
        // A restarted process counts from zero again.
        if self.seen.back().is_some_and(|(_, last)| *last > count) {
            self.seen.clear();
        }
        self.seen.push_back((now, count));
        while self.seen.len() > 2 && now - self.seen[1].0 >= RATE_OVER {
            self.seen.pop_front();
        }
        let (then, before) = self.seen[0];
        let seconds = (now - then).as_secs_f64();
        self.per_second = if seconds > 0.0 { (count - before) / seconds } else { 0.0 };
    }
}

/// The terminal.
pub(super) struct Screen {
    full: bool,
    heading: String,
    notes: Vec<String>,
    last_line: Option<Instant>,
}

impl Screen {
    pub(super) fn new(options: &Options) -> Screen {
        let full = stdout().is_terminal() && std::io::stdin().is_terminal();
        let heading = format!(
            "dashboard  http://127.0.0.1:{}\nSQL        psql -h 127.0.0.1 -p {} -d tailrace\nMQTT       mqtt://127.0.0.1:{}\nlake       {}",
            options.http_port,
            options.pg_port,
            options.mqtt_port,
            options.data_dir.join("lake").display()
        );
        let mut screen = Screen { full, heading, notes: Vec::new(), last_line: None };
        if full && terminal::enable_raw_mode().is_ok() {
            let _ = execute!(stdout(), EnterAlternateScreen, Hide);
        } else {
            screen.full = false;
            print_line(&screen.heading);
        }
        screen.note(&format!("making up for {} of history", duration::format(options.backfill)));
        screen
    }

    /// Tells of something that happened.
    pub(super) fn note(&mut self, text: &str) {
        if self.full {
            self.notes.push(text.to_owned());
            let excess = self.notes.len().saturating_sub(5);
            self.notes.drain(..excess);
        } else {
            print_line(text);
        }
    }

    pub(super) fn show(&mut self, summary: &Summary, troubles: &[&str]) {
        if self.full {
            let text = self.page(summary, troubles).replace('\n', "\r\n");
            let mut out = stdout().lock();
            let _ = execute!(out, MoveTo(0, 0), Clear(ClearType::All));
            let _ = out.write_all(text.as_bytes());
            let _ = out.flush();
        } else if self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
            self.last_line = Some(Instant::now());
            print_line(line(summary, troubles));
        }
    }

    fn page(&self, s: &Summary, troubles: &[&str]) -> String {
        let mut p = format!("{}\n{}\n\n", "Tailrace: every reading is accounted for".bold(), self.heading);
        for (agent, (at, live, phase)) in &s.agents {
            let mode = if *live { "live".green() } else { "catching up".yellow() };
            let _ = writeln!(p, "{agent:<10} {mode}  {at}  plant: {phase}");
        }
        let _ = writeln!(p, "\n{:<10} {:>10.0} readings/s", "polled", s.polled.per_second);
        let _ = writeln!(p, "{:<10} {:>10.0} readings/s", "silver", s.stored.per_second);
        let _ = writeln!(
            p,
            "{:<10} {:>10.0} messages, {:.1} MiB of disk",
            "outbox",
            s.outbox_messages,
            s.outbox_bytes / 1_048_576.0
        );
        for layer in s.overview["layers"].as_array().into_iter().flatten() {
            let text = |key: &str| layer[key].as_str().unwrap_or("?").to_owned();
            let number = |key: &str| layer[key].as_i64().unwrap_or(0);
            let _ =
                writeln!(p, "{:<30} {:>6} files {:>10} rows", text("name"), number("files"), number("rows"));
        }
        // Short enough for a terminal of 80 columns.
        let _ = writeln!(p, "\n{}", equation(s).replacen(" + rejected", "\n    + rejected", 1));
        for anomaly in s.overview["anomalies"].as_array().into_iter().flatten().take(3) {
            let text = |key: &str| anomaly[key].as_str().unwrap_or("…").to_owned();
            let _ =
                writeln!(p, "anomaly    {} {} – {}", text("asset_id"), text("started_at"), text("ended_at"));
        }
        if !troubles.is_empty() {
            let _ = writeln!(p, "\n{}", troubles.join(", ").red());
        }
        p.push('\n');
        for note in &self.notes {
            let _ = writeln!(p, "{note}");
        }
        let keys: Vec<String> = KEYS.iter().map(|(key, does)| format!("{} {does}", key.bold())).collect();
        let _ = write!(p, "\n{}", keys.join("   "));
        p
    }

    /// Gives the terminal back.
    pub(super) fn close(&mut self) {
        if std::mem::take(&mut self.full) {
            let _ = execute!(stdout(), Show, LeaveAlternateScreen);
            let _ = terminal::disable_raw_mode();
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.close();
    }
}

fn line(s: &Summary, troubles: &[&str]) -> String {
    let at = s
        .agents
        .values()
        .map(|(at, ..)| *at)
        .min()
        .map_or_else(|| "starting".to_owned(), |at| at.to_string());
    let mut line = format!(
        "{at}  polled {:.0}/s  silver {:.0}/s  outbox {:.0} messages  {}",
        s.polled.per_second,
        s.stored.per_second,
        s.outbox_messages,
        equation(s)
    );
    if !troubles.is_empty() {
        let _ = write!(line, "  [{}]", troubles.join(", "));
    }
    line
}

fn equation(s: &Summary) -> String {
    let term = |name: &str| format!("{name} {}", s.total(name));
    let right = ["stored", "held", "rejected", "skipped", "quarantined", "declared", "pending"].map(term);
    format!("{} = {} · {}", term("polled"), right.join(" + "), term("missing"))
}
