//! Simulated chips, plants and fleets, and the one-command demo.

pub mod bus;
pub mod chip;
pub mod clock;
pub mod faults;
pub mod noise;
pub mod plant;
pub mod waveform;
