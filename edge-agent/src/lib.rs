//! The edge agent: reads sensors, filters, aggregates, scores, and delivers every reading over MQTT.
//!
//! Start reading at `pipeline.rs`, which names the stages in the order in which data flows.

mod backoff;
pub mod census;
pub mod cli;
pub mod clock;
mod connection;
pub mod delivery;
pub mod discover;
pub mod filter;
pub mod metrics;
pub mod model;
pub mod outbox;
pub mod page;
pub mod pipeline;
pub mod seal;
pub mod settings;
pub mod source;
pub mod trial;
pub mod uplink;
pub mod vibration;
pub mod window;
