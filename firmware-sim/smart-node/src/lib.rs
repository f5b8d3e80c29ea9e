//! Firmware of a smart sensor node, as it runs on a microcontroller: `no_std`, no heap, no floating point, no unsafe.
//!
//! ```text
//! SHT4x ──I2C──► node::Node: one sample a second ──► window: mean, min, max, RMS ──► registers
//!                                                                                      ▲
//! RS-485 ──bytes──► rtu::Slave: silence, address, CRC ──► pdu::answer: functions 3, 4, 6, 16
//! ```
//!
//! Everything is a pure core. The board's main loop, or `firmware-sim node` on a pseudo-terminal, hands in bytes and
//! the time in µs since start, sleeps until [`node::Node::next_deadline`], and sends the bytes that it gets back.
//! [`pdu`] answers for the simulated PLC of `firmware-sim plc`, too.
//!
//! A node takes less than 1 KiB of RAM besides the stack: two frames of [`rtu::Slave`], two windows.

#![no_std]
#![forbid(unsafe_code)]

pub mod node;
pub mod pdu;
pub mod rtu;
pub mod window;

#[cfg(test)]
extern crate std;
