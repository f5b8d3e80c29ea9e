//! The demo plant: what its instruments measure, as a pure function of (signal, time).
//!
//! The process is replayed from recorded runs of the Tennessee Eastman **simulator**, the press temperature from a
//! **real** machine (NAB), humidity and vibration are **synthetic**; `data/plant.toml` says which is which and maps
//! them to instruments; `data/README.md` has the formulas.
//!
//! # The loop
//! Cycles follow each other for ever: recovery, normal operation, fault. Between two rows a value is interpolated;
//! an analyser shows one analysis until the next. At the start of a cycle the earlier one's rows go on and fade into
//! its own, linearly. Position in the loop = (time − anchor + start) modulo its length.
//!
//! # Interventions
//! [`Plant::intervene`] breaks or repairs the plant by moving the loop: to the onset of a fault, faded in over one
//! row, or to the normal operation of the next cycle, faded in like any recovery. From there the loop goes on. With the
//! same anchor and interventions, all values are the same again.
//!
//! # Noise
//! Gaussian with the sigma of each instrument, by [`crate::noise`], numbered by the instant (for an analyser: by its
//! last analysis).

mod layout;
mod record;

use std::{
    f64::consts::TAU,
    sync::{PoisonError, RwLock},
};

use anyhow::{Context, ensure};
use common::time::Timestamp;

pub use self::layout::{
    Adc, Channel, Cycles, Humidity, Layout, Output, Press, Segment, Temperature, Vibration,
};
use crate::{
    noise,
    waveform::{Waveform, bpfo_per_turn},
};

const SECOND: i64 = 1_000_000;

/// Something that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Signal {
    /// The transmitter with this index in [`Layout::channels`].
    Channel(usize),
    /// Temperature at the press, °C.
    PressTemperature,
    /// Relative humidity at the press, %.
    PressHumidity,
}

/// What the process is going through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// As it should be.
    Normal,
    /// Under the fault of this name.
    Fault(String),
    /// After a fault.
    Recovery,
}

/// What a user does to the plant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intervention {
    /// The fault of this name sets in.
    Break {
        /// Name of a fault of the layout.
        fault: String,
    },
    /// The plant recovers.
    Repair,
}

/// The plant.
pub struct Plant {
    layout: Layout,
    anchor: Timestamp,
    seed: u64,
    /// For each channel and segment: the recorded column, scaled.
    series: Vec<Vec<Vec<f64>>>,
    /// °C.
    press: Vec<f64>,
    /// Where the loop was moved to, in order of time; the first is where it began.
    jumps: RwLock<Vec<Jump>>,
}

/// From `at` on, the loop stands at `position` and moves with time. All in µs.
#[derive(Debug, Clone, Copy)]
struct Jump {
    at: i64,
    position: i64,
    fade: i64,
    recovery: bool,
}

/// A place in the loop.
struct Place<'a> {
    segment: usize,
    spec: &'a Segment,
    /// µs since the start of the segment.
    elapsed: i64,
}

impl Plant {
    /// The plant that is built in, at the start of its loop at `anchor`. Each gateway shows its own noise.
    pub fn demo(anchor: Timestamp, gateway: u64) -> anyhow::Result<Self> {
        Self::new(Layout::demo()?, anchor, gateway)
    }

    fn new(layout: Layout, anchor: Timestamp, gateway: u64) -> anyhow::Result<Self> {
        let series = layout.channels.iter().map(|channel| channel_series(&layout.cycles, channel));
        let series = series.collect::<anyhow::Result<_>>()?;
        let press = record::column(&layout.press.temperature.file, "value")?;
        ensure!(!press.is_empty(), "data/{} has no rows", layout.press.temperature.file);
        let press = press.into_iter().map(|fahrenheit| (fahrenheit - 32.0) / 1.8).collect();
        let start = i64::from(layout.cycles.start_s) * SECOND;
        let begun = Jump { at: anchor.as_micros(), position: start, fade: 0, recovery: false };
        Ok(Self {
            seed: layout.seed.wrapping_add(gateway),
            jumps: RwLock::new(vec![begun]),
            layout,
            anchor,
            series,
            press,
        })
    }

    /// The instruments and where they hang.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The value of `signal` at `t` in its unit, noise included.
    pub fn value(&self, signal: Signal, t: Timestamp) -> f64 {
        match signal {
            Signal::Channel(index) => self.channel(index, t.as_micros()),
            Signal::PressTemperature => self.press_temperature(t),
            Signal::PressHumidity => self.press_humidity(t),
        }
    }

    /// The current of a healthy transmitter that shows `value`, in A.
    pub fn current(&self, channel: &Channel, value: f64) -> f64 {
        let part = (value - channel.at_4ma) / (channel.at_20ma - channel.at_4ma);
        let adc = &self.layout.adc;
        (4.0 + 16.0 * part).clamp(adc.saturate_low_ma, adc.saturate_high_ma) * 1e-3
    }

    /// The radial acceleration from `t` on.
    pub fn vibration(&self, t: Timestamp) -> Waveform {
        let machine = &self.layout.vibration;
        let wear = self.part_of_loop(t);
        let turns = bpfo_per_turn(f64::from(machine.balls), machine.ball_mm, machine.pitch_mm);
        Waveform {
            origin_s: seconds(self.since_anchor(t)),
            shaft_hz: machine.shaft_hz,
            harmonics: machine.harmonics.clone(),
            impacts_hz: machine.shaft_hz * turns,
            impact: machine.impact_start + (machine.impact_end - machine.impact_start) * wear,
            resonance_hz: machine.resonance_hz,
            decay_s: machine.decay_s,
            sigma: machine.sigma,
            seed: self.seed,
        }
    }

    /// What the process goes through at `t`.
    pub fn phase(&self, t: Timestamp) -> Phase {
        let t = t.as_micros();
        let jumps = self.jumps.read().unwrap_or_else(PoisonError::into_inner);
        let jump = &jumps[current(&jumps, t)];
        let place = self.place(jump, t);
        let fading = jump.recovery && t - jump.at < jump.fade;
        if fading || place.elapsed < self.crossfade() {
            Phase::Recovery
        } else if place.elapsed >= self.onset(place.spec) {
            Phase::Fault(place.spec.fault.clone())
        } else {
            Phase::Normal
        }
    }

    /// The faults that the layout knows, in the order of the loop.
    pub fn faults(&self) -> impl Iterator<Item = &str> {
        self.layout.cycles.segments.iter().map(|segment| segment.fault.as_str())
    }

    /// Breaks or repairs the plant from `at` on. Interventions come in the order of time; after a restart, the same
    /// ones are to be made again.
    pub fn intervene(&self, at: Timestamp, what: &Intervention) -> anyhow::Result<()> {
        let mut jumps = self.jumps.write().unwrap_or_else(PoisonError::into_inner);
        let last = jumps[jumps.len() - 1];
        let at = at.as_micros();
        ensure!(at >= last.at, "intervention at {at} µs lies before an earlier one at {} µs", last.at);
        let (segment, into, fade) = match what {
            Intervention::Break { fault } => {
                let known = self.faults().collect::<Vec<_>>().join(", ");
                let segment = self.faults().position(|name| name == fault);
                let segment = segment.with_context(|| format!("no fault {fault:?}; there are {known}"))?;
                (segment, self.onset(&self.layout.cycles.segments[segment]), self.row())
            }
            Intervention::Repair => {
                let next = (self.place(&last, at).segment + 1) % self.layout.cycles.segments.len();
                (next, self.crossfade(), self.crossfade())
            }
        };
        let before = &self.layout.cycles.segments[..segment];
        let position = before.iter().map(|segment| self.segment_length(segment)).sum::<i64>() + into;
        jumps.push(Jump { at, position, fade, recovery: *what == Intervention::Repair });
        Ok(())
    }

    fn channel(&self, index: usize, t: i64) -> f64 {
        let channel = &self.layout.channels[index];
        let jumps = self.jumps.read().unwrap_or_else(PoisonError::into_inner);
        let jump = current(&jumps, t);
        let shown = match channel.hold_rows {
            None => t,
            // An intervention makes the analysers start anew.
            Some(rows) if jump > 0 => self.last_analysis(&jumps[jump], t, rows).max(jumps[jump].at),
            Some(rows) => self.last_analysis(&jumps[jump], t, rows),
        };
        let noise = noise::gaussian(self.seed, noise::stream(&channel.device), shown);
        self.faded(&jumps[..=jump], index, shown) + channel.sigma * noise
    }

    /// When the analysis that is shown at `t` was made: at a row whose number is a multiple of `hold`.
    fn last_analysis(&self, jump: &Jump, t: i64, hold: u32) -> i64 {
        let place = self.place(jump, t);
        let first = i64::from(place.spec.first_row) * self.row();
        t - (first + place.elapsed).rem_euclid(i64::from(hold) * self.row())
    }

    /// The value on the loop as last moved, fading in from where it was before.
    fn faded(&self, jumps: &[Jump], index: usize, t: i64) -> f64 {
        let Some((jump, earlier)) = jumps.split_last() else { return f64::NAN };
        let value = self.cycle_value(index, &self.place(jump, t));
        if earlier.is_empty() || t - jump.at >= jump.fade {
            return value;
        }
        fade(self.faded(earlier, index, t), value, t - jump.at, jump.fade)
    }

    /// The value at a place of the loop, fading in from the earlier cycle.
    fn cycle_value(&self, index: usize, place: &Place<'_>) -> f64 {
        let value = self.row_value(index, place.segment, place.spec.first_row, place.elapsed);
        if place.elapsed >= self.crossfade() {
            return value;
        }
        let segments = &self.layout.cycles.segments;
        let earlier = (place.segment + segments.len() - 1) % segments.len();
        let old = self.row_value(index, earlier, segments[earlier].end_row, place.elapsed);
        fade(old, value, place.elapsed, self.crossfade())
    }

    /// The recorded value `elapsed` µs after row `row`.
    fn row_value(&self, index: usize, segment: usize, row: u32, elapsed: i64) -> f64 {
        interpolated(&self.series[index][segment], f64::from(row) + elapsed as f64 / self.row() as f64)
    }

    fn press_temperature(&self, t: Timestamp) -> f64 {
        let spec = &self.layout.press.temperature;
        let rows = self.press.len() as f64;
        let at = self.since_anchor(t) as f64 / (f64::from(spec.row_s) * SECOND as f64);
        let at = (at + f64::from(spec.first_row)).rem_euclid(rows);
        // From the last row back to the first the record is interpolated, too.
        let (row, part) = (at as usize, at.fract());
        let [from, to] = [row, row + 1].map(|row| self.press[row % self.press.len()]);
        from + (to - from) * part + spec.sigma * self.noise(&spec.device, t)
    }

    fn press_humidity(&self, t: Timestamp) -> f64 {
        let spec = &self.layout.press.humidity;
        spec.mean + spec.swing * (TAU * self.part_of_loop(t)).sin() + spec.sigma * self.noise(&spec.device, t)
    }

    fn noise(&self, device: &str, t: Timestamp) -> f64 {
        noise::gaussian(self.seed, noise::stream(device), t.as_micros())
    }

    /// Where the loop stands at `t`, when nothing but `jump` moved it.
    fn place(&self, jump: &Jump, t: i64) -> Place<'_> {
        let mut elapsed = (jump.position + t - jump.at).rem_euclid(self.length());
        let mut segments = self.layout.cycles.segments.iter().enumerate().cycle();
        loop {
            let (segment, spec) = segments.next().expect("the layout has segments, and they are cycled");
            let length = self.segment_length(spec);
            if elapsed < length {
                return Place { segment, spec, elapsed };
            }
            elapsed -= length;
        }
    }

    fn since_anchor(&self, t: Timestamp) -> i64 {
        t.as_micros() - self.anchor.as_micros()
    }

    /// How much of the loop has passed at `t`, 0 to 1, were there no interventions.
    fn part_of_loop(&self, t: Timestamp) -> f64 {
        let position = self.since_anchor(t) + i64::from(self.layout.cycles.start_s) * SECOND;
        seconds(position.rem_euclid(self.length())) / seconds(self.length())
    }

    fn length(&self) -> i64 {
        self.layout.cycles.segments.iter().map(|segment| self.segment_length(segment)).sum()
    }

    fn segment_length(&self, segment: &Segment) -> i64 {
        i64::from(segment.end_row - segment.first_row) * self.row()
    }

    /// From the start of a segment to its fault.
    fn onset(&self, segment: &Segment) -> i64 {
        i64::from(segment.onset_row - segment.first_row) * self.row()
    }

    fn row(&self) -> i64 {
        i64::from(self.layout.cycles.row_s) * SECOND
    }

    fn crossfade(&self) -> i64 {
        i64::from(self.layout.cycles.crossfade_s) * SECOND
    }
}

/// The recorded column of `channel` in each segment; every segment is long enough for its cycle and the fade after it.
fn channel_series(cycles: &Cycles, channel: &Channel) -> anyhow::Result<Vec<Vec<f64>>> {
    let of_segment = |segment: &Segment| {
        let rows = record::column(&segment.file, &channel.column)?;
        let needed = segment.end_row + cycles.crossfade_s.div_ceil(cycles.row_s) + 1;
        ensure!(
            rows.len() >= needed as usize,
            "data/{} has {} rows; segment {} needs {needed}",
            segment.file,
            rows.len(),
            segment.fault
        );
        Ok(rows.into_iter().map(|value| value * channel.scale).collect())
    };
    cycles.segments.iter().map(of_segment).collect()
}

/// The last jump that is not after `t`; before all of them, the first.
fn current(jumps: &[Jump], t: i64) -> usize {
    jumps.partition_point(|jump| jump.at <= t).saturating_sub(1)
}

fn interpolated(series: &[f64], at: f64) -> f64 {
    let last = series.len() - 1;
    let row = (at as usize).min(last);
    let (from, to) = (series[row], series[(row + 1).min(last)]);
    from + (to - from) * (at - row as f64).min(1.0)
}

fn fade(from: f64, to: f64, elapsed: i64, over: i64) -> f64 {
    from + (to - from) * (elapsed as f64 / over as f64)
}

fn seconds(micros: i64) -> f64 {
    micros as f64 / SECOND as f64
}

#[cfg(test)]
mod tests;
