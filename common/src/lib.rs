//! What both sides of Tailrace must agree on.
//!
//! The edge and the cloud meet only here: in the words, the units, the clock, the wire format and the
//! shape of configuration. Nothing in this crate does IO except [`time`] (the clock), [`config`]
//! (files and environment), [`telemetry`] (logs) and [`http`] (connections).
//!
//! # Words
//!
//! | word | meaning |
//! |---|---|
//! | site, gateway | a plant; one edge agent in it |
//! | asset, device | a machine that is maintained; one measured quantity at one place on it |
//! | reading | (event time, device, value, quality) |
//! | window, aggregate | a tumbling event-time window of one device, and its statistics |
//! | epoch, seq | one run of an agent, and the number of a message in its lane |
//! | lane | `control`, `anomalies`, `aggregates`, `readings`: in this order when the uplink is short |
//! | gap | a record that declares what an outbox had to drop |
//! | census | what the agent counted in an hour: polled, held, rejected, skipped, sealed |

pub mod config;
pub mod documents;
pub mod http;
pub mod json;
pub mod memory;
pub mod reading;
pub mod telemetry;
pub mod time;
pub mod topic_filter;
pub mod units;
pub mod wire;
