//! Simulated chips, Modbus devices and a simulated plant, and the one-command demo.

pub mod bus;
pub mod chip;
pub mod chips;
pub mod clock;
pub mod demo;
pub mod faults;
pub mod fleet;
pub mod node;
pub mod noise;
pub mod plant;
pub mod plc;
pub mod register_map;
pub mod waveform;
