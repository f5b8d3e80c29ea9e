//! Simulated chips, Modbus devices and a simulated plant, the one-command demo, the proof by kill -9, and the benchmark.

pub mod bench;
pub mod bus;
pub mod chaos;
pub mod chip;
pub mod chips;
pub mod clock;
pub mod demo;
pub mod faults;
pub mod fleet;
mod http;
pub mod node;
pub mod noise;
pub mod plant;
pub mod plc;
mod program;
pub mod register_map;
pub mod waveform;
