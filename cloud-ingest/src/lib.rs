//! The cloud side of Tailrace: subscribe → bronze → silver → gold → serve.

pub mod bronze;
pub mod cli;
pub mod decode;
pub mod doctor;
pub mod drain;
pub mod gold;
pub mod ingest;
pub mod lake;
pub mod ledger;
pub mod metrics;
mod mqtt;
pub mod pack;
pub mod pipeline;
pub mod plan;
pub mod quality;
pub mod quarantine;
pub mod ranges;
pub mod rebuild;
pub mod refine;
pub mod rules;
pub mod serve;
pub mod settings;
pub mod silver;
pub mod store;
pub mod subscribe;
pub mod tables;
pub mod upkeep;
