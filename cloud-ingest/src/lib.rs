//! The cloud side of Tailrace: subscribe → bronze → silver → gold → serve.

pub mod lake;
pub mod serve;
pub mod store;
pub mod tables;
