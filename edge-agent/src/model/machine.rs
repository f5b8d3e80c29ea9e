//! A model on the machines of a gateway: readings → windows → scores → anomalies.
//!
//! Every machine that has the bundle's inputs has windows, state, calibration and episodes of its own. While it
//! stands, by the bundle's `active_when`, its windows are not scored and its state rests; an open episode ends once
//! it has been standing for `clear_after` windows.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use common::{
    reading::{Quality, Reading, Registry},
    time::Timestamp,
};
use uuid::Uuid;

use super::{
    bundle::{Bound, Bundle},
    calibrate::{self, Calibration, Stretch},
    episode::{Ended, Episodes, Event, Open, Place, Score},
    infer::{Scored, Window},
    window::Hops,
};
use crate::{metrics::Metrics, window::Missed};

/// Windows in a row that a network may fail, or be too slow for, before it is given up.
pub const MAX_FAULTS: u32 = 5;

/// A bundle in use.
#[derive(Debug)]
pub struct Model {
    /// What it is.
    pub bundle: Bundle,
    machines: Vec<Machine>,
    /// Where the readings of a device go, by its index.
    routes: Vec<Vec<Route>>,
    /// Most time for a window.
    budget: Duration,
    /// Windows in a row that failed, and why the last one did.
    faults: (u32, String),
    /// Windows that have closed and are not scored yet, and what they hold.
    due: Vec<Due>,
    means: Vec<f64>,
}

/// A window that has closed.
#[derive(Clone, Copy, Debug)]
struct Due {
    end: Timestamp,
    machine: usize,
    /// Where its means begin.
    at: usize,
}

#[derive(Clone, Copy, Debug)]
struct Route {
    machine: usize,
    column: usize,
    /// For the device of `active_when`: the window is given 1 for a reading above it and 0 for another.
    above: Option<f64>,
}

/// A model on one machine.
#[derive(Debug)]
pub struct Machine {
    /// What `*` stands for in the bundle's inputs.
    pub name: String,
    places: Vec<Place>,
    gated: bool,
    hops: Hops,
    features: Vec<f32>,
    state: Vec<f32>,
    calibration: Option<Calibration>,
    episodes: Episodes,
    /// Windows in a row in which the machine stood.
    standing: u32,
    /// Collected instead of scored, while it is being calibrated.
    stretch: Option<Stretch>,
    score: Option<f64>,
}

/// What calibrating a machine came to.
#[derive(Clone, Debug)]
pub struct Calibrated {
    /// The machine.
    pub machine: String,
    /// Ids of its inputs.
    pub devices: Vec<String>,
    /// What was fitted.
    pub calibration: Calibration,
    /// On what.
    pub stretch: Stretch,
    /// Why it must not be relied on; empty when it may.
    pub why: Vec<String>,
}

/// What [`Model::new`] is to do with a bundle that wants to be calibrated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Score, by the calibration that lies beside it; without one the model is refused.
    Score,
    /// Collect windows until [`Model::calibrate`].
    Calibrate,
}

impl Model {
    /// Binds a bundle to the machines of a gateway.
    ///
    /// # Errors
    /// When no machine has its inputs, or one is not calibrated.
    pub fn new(
        bundle: Bundle,
        registry: &Registry,
        (lateness, budget): (Duration, Duration),
        purpose: Purpose,
    ) -> anyhow::Result<Self> {
        let mut routes = vec![Vec::new(); registry.devices.len()];
        let mut machines = Vec::new();
        for Bound { machine: name, inputs, gate } in bundle.bind(registry)? {
            let machine = machines.len();
            for (column, device) in inputs.iter().enumerate() {
                routes[device.index()].push(Route { machine, column, above: None });
            }
            if let (Some(device), Some(when)) = (gate, &bundle.active_when) {
                routes[device.index()].push(Route { machine, column: inputs.len(), above: Some(when.above) });
            }
            let collects = purpose == Purpose::Calibrate && bundle.calibration.is_some();
            let found = bundle.calibrated.as_ref().and_then(|all| all.of(&name, inputs.len())).cloned();
            let calibration = match (&bundle.calibration, found) {
                (Some(_), None) if !collects => anyhow::bail!(
                    "it is not calibrated for machine {name:?}; run edge-agent calibrate, and put calibration.toml \
                     beside model.onnx"
                ),
                (_, found) => found,
            };
            let places = inputs.iter().map(|ix| {
                let device = registry.device(*ix);
                Place { asset: device.asset.clone(), device: device.id.clone() }
            });
            let (model, sha256) = (Arc::clone(&bundle.name), Arc::clone(&bundle.sha256));
            let threshold = calibration.as_ref().map_or(bundle.rules.threshold, |found| found.threshold);
            machines.push(Machine {
                name,
                places: places.collect(),
                gated: gate.is_some(),
                hops: Hops::new(
                    bundle.span,
                    bundle.hop,
                    lateness,
                    inputs.len() + usize::from(gate.is_some()),
                ),
                features: Vec::with_capacity(inputs.len()),
                state: bundle.network.first_state(),
                calibration,
                episodes: Episodes::new(model, sha256, bundle.rules.at(threshold)),
                standing: 0,
                stretch: collects.then(Stretch::default),
                score: None,
            });
        }
        let bundle = Bundle { network: bundle.network.of_machines(machines.len()), ..bundle };
        let faults = (0, String::new());
        Ok(Self { bundle, machines, routes, budget, faults, due: Vec::new(), means: Vec::new() })
    }

    /// Takes in what was read by the gateway's time `now`, and scores the windows that close.
    pub fn push(
        &mut self,
        now: Timestamp,
        readings: &[Reading],
        missed: &mut Missed,
        metrics: &Metrics,
    ) -> Vec<Event> {
        for machine in &mut self.machines {
            machine.hops.begin(now);
        }
        for reading in readings.iter().filter(|reading| reading.quality != Quality::Bad) {
            // No more than one step through the routes for most: a device is an input of one machine.
            for at in 0..self.routes[reading.device.index()].len() {
                let Route { machine, column, above } = self.routes[reading.device.index()][at];
                let value = above.map_or(reading.value, |above| f64::from(u8::from(reading.value > above)));
                if !self.machines[machine].hops.fits(reading.ts) {
                    self.close(machine, now, false);
                }
                self.machines[machine].hops.join(reading.ts, column, value, missed);
            }
        }
        for machine in 0..self.machines.len() {
            self.close(machine, now, false);
        }
        self.judge(metrics)
    }

    /// Scores what has ended by `now`, at the end of the input.
    pub fn flush(&mut self, now: Timestamp, metrics: &Metrics) -> Vec<Event> {
        for machine in 0..self.machines.len() {
            self.close(machine, now, true);
        }
        self.judge(metrics)
    }

    /// Why the model must be given up, if so.
    pub fn given_up(&self) -> Option<&str> {
        let (faults, why) = &self.faults;
        (*faults >= MAX_FAULTS).then_some(why.as_str())
    }

    /// Gives open episodes other times.
    pub fn settle(&mut self, settle: &impl Fn(Timestamp) -> Timestamp) {
        for machine in &mut self.machines {
            machine.episodes.settle(settle);
        }
    }

    /// The machines.
    pub fn machines(&self) -> impl Iterator<Item = &Machine> {
        self.machines.iter()
    }

    /// The machine of that name.
    pub fn machine(&mut self, name: &str) -> Option<&mut Machine> {
        self.machines.iter_mut().find(|machine| machine.name == name)
    }

    /// Ends what is open.
    pub fn end(&mut self, at: Timestamp, why: Ended) -> Vec<Event> {
        self.machines.iter_mut().filter_map(|machine| machine.episodes.end(at, why)).collect()
    }

    /// Calibrates what has been collecting windows; from now on it scores.
    ///
    /// # Errors
    /// When the network fails on them.
    pub fn calibrate(&mut self) -> anyhow::Result<Vec<Calibrated>> {
        let bundle = &self.bundle;
        let collecting = self.machines.iter_mut().filter(|machine| machine.stretch.is_some());
        collecting.map(|machine| machine.calibrate(bundle)).collect()
    }

    /// Windows that every machine which is being calibrated has collected; none when there is no such machine.
    pub fn collected(&self) -> Option<usize> {
        self.machines.iter().filter_map(|machine| machine.stretch.as_ref()).map(Stretch::len).min()
    }

    /// Goes on collecting after a calibration that is not to be used: the earlier half of its windows gives way.
    pub fn collect_on(&mut self, refused: Vec<Calibrated>) {
        for Calibrated { machine, stretch, .. } in refused {
            if let Some(machine) = self.machine(&machine) {
                machine.stretch = Some(stretch.later_half());
            }
        }
    }

    fn close(&mut self, machine: usize, now: Timestamp, ends: bool) {
        let hops = &mut self.machines[machine].hops;
        while let Some(end) = if ends { hops.flush(now) } else { hops.close(now) } {
            self.due.push(Due { end, machine, at: self.means.len() });
            self.means.extend_from_slice(hops.means());
        }
    }

    /// Scores what has closed: by time, and all machines' windows of a time together.
    fn judge(&mut self, metrics: &Metrics) -> Vec<Event> {
        let mut events = Vec::new();
        self.due.sort_by_key(|due| due.end);
        let mut ready = Vec::with_capacity(self.machines.len());
        for together in self.due.chunk_by(|a, b| a.end == b.end) {
            ready.clear();
            for Due { end, machine, at } in together.iter().copied() {
                match self.machines[machine].take(end, &self.means[at..], &self.bundle, metrics) {
                    Taken::ToScore => ready.push(machine),
                    Taken::Done(event) => events.extend(event),
                }
            }
            let windows: Vec<Window<'_>> =
                ready.iter().map(|machine| self.machines[*machine].as_given()).collect();
            let begun = Instant::now();
            let scored = self.bundle.network.score_all(&windows);
            let took = begun.elapsed() / ready.len().max(1) as u32;
            for (machine, scored) in ready.iter().zip(scored) {
                match self.machines[*machine].judge(together[0].end, scored, &self.bundle, metrics) {
                    Err(error) => self.faults = (self.faults.0 + 1, format!("{error:#}")),
                    Ok(event) => {
                        events.extend(event);
                        if took > self.budget {
                            let why = format!("a window took {took:.1?}, models.budget is {:?}", self.budget);
                            self.faults = (self.faults.0 + 1, why);
                        } else {
                            self.faults.0 = 0;
                        }
                    }
                }
            }
        }
        self.due.clear();
        self.means.clear();
        events
    }
}

/// What a window is for.
enum Taken {
    /// Its features lie ready for the network.
    ToScore,
    /// Nothing that the network is asked about.
    Done(Option<Event>),
}

impl Machine {
    /// The open episode.
    pub fn open(&self) -> Option<&Open> {
        self.episodes.open()
    }

    /// What the network carries from window to window.
    pub fn state(&self) -> &[f32] {
        &self.state
    }

    /// The latest score over the threshold.
    pub fn severity(&self) -> Option<f64> {
        Some(self.score? / self.episodes.rules().threshold)
    }

    /// Goes on where an earlier run ended.
    pub fn resume(&mut self, state: Vec<f32>, open: Option<Open>) {
        if state.len() == self.state.len() {
            self.state = state;
        }
        if let Some(open) = open {
            self.episodes.resume(open);
        }
    }

    /// Takes in the means of a window, which `means` begins with.
    fn take(&mut self, end: Timestamp, means: &[f64], bundle: &Bundle, metrics: &Metrics) -> Taken {
        let (inputs, gate) = means.split_at(self.places.len());
        // Of ones and zeros: 1 exactly when every reading was above.
        if self.gated && gate[0] != 1.0 {
            self.score = None;
            self.standing += 1;
            metrics.window(&bundle.name, "standing");
            let rests = self.standing >= self.episodes.rules().clear_after;
            return Taken::Done(if rests { self.episodes.end(end, Ended::Standing) } else { None });
        }
        self.standing = 0;
        if inputs.iter().any(|mean| mean.is_nan()) {
            metrics.window(&bundle.name, "incomplete");
            return Taken::Done(None);
        }
        self.features.clear();
        self.features.extend(inputs.iter().map(|mean| *mean as f32));
        if let Some(stretch) = &mut self.stretch {
            stretch.push(end, &self.features);
            return Taken::Done(None);
        }
        Taken::ToScore
    }

    fn as_given(&self) -> Window<'_> {
        let Self { features, calibration, state, .. } = self;
        Window { features, calibration: calibration.as_ref(), state }
    }

    /// Takes in what the network made of the window that ended at `end`.
    fn judge(
        &mut self,
        end: Timestamp,
        scored: anyhow::Result<Scored>,
        bundle: &Bundle,
        metrics: &Metrics,
    ) -> anyhow::Result<Option<Event>> {
        metrics.window(&bundle.name, if scored.is_ok() { "scored" } else { "failed" });
        let scored = scored?;
        metrics.score(&bundle.name, &self.name, scored.score);
        self.state = scored.state;
        self.score = Some(scored.score);
        let largest = scored.contributions.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        let place = &self.places[largest.context("it has no contributions")?.0];
        let score = Score { at: end, score: scored.score, place };
        let event = self.episodes.push(score, Uuid::now_v7);
        if let Some(event) = &event {
            let state = event.ended.map_or("raised", |(_, why)| why.as_str());
            let score = scored.score;
            tracing::info!(model = %event.model, device = event.place.device, score, at = %end, state, "anomaly");
        }
        Ok(event)
    }

    fn calibrate(&mut self, bundle: &Bundle) -> anyhow::Result<Calibrated> {
        let rules = bundle.calibration.as_ref().context("the model is not calibrated on machines")?;
        let stretch = self.stretch.take().unwrap_or_default();
        let devices: Vec<String> = self.places.iter().map(|place| place.device.clone()).collect();
        let names: Vec<&str> = devices.iter().map(String::as_str).collect();
        let hops = (bundle.span.as_micros() / bundle.hop.as_micros()) as usize;
        let threshold = bundle.rules.threshold;
        let (mut calibration, why) = calibrate::fit(rules, threshold, (bundle.hop, hops), &stretch, &names);
        let mut state = bundle.network.first_state();
        let mut scores = Vec::new();
        for window in stretch.settled(rules) {
            let window = Window { features: window, calibration: Some(&calibration), state: &state };
            let scored = bundle.network.score(&window)?;
            state = scored.state;
            scores.push(scored.score);
        }
        let kept_up = scores
            .windows(bundle.rules.raise_after as usize)
            .map(|run| run.iter().copied().fold(f64::INFINITY, f64::min));
        calibration.threshold = kept_up.fold(threshold, f64::max);
        self.episodes.set_rules(bundle.rules.at(calibration.threshold));
        self.calibration = Some(calibration.clone());
        Ok(Calibrated { machine: self.name.clone(), devices, calibration, stretch, why })
    }
}
