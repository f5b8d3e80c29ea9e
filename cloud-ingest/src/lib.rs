//! The cloud side of Tailrace: subscribe → bronze → silver → gold → serve.

pub mod bronze;
pub mod decode;
pub mod gold;
pub mod lake;
pub mod ledger;
pub mod quality;
pub mod serve;
pub mod store;
pub mod tables;
