//! The cloud side of Tailrace: subscribe → bronze → silver → gold → serve.

pub mod bronze;
pub mod decode;
pub mod lake;
pub mod plan;
pub mod quality;
pub mod ranges;
pub mod silver;
pub mod store;
pub mod tables;
