//! The cloud side of Tailrace: subscribe → bronze → silver → gold → serve.

pub mod bronze;
pub mod decode;
pub mod ingest;
pub mod lake;
pub mod metrics;
pub mod plan;
pub mod quality;
pub mod ranges;
pub mod refine;
pub mod settings;
pub mod silver;
pub mod store;
pub mod subscribe;
pub mod tables;
