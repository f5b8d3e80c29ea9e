//! Serving: PostgreSQL's wire, HTTP with the dashboard, and the last minutes in memory.

pub mod catalog;
pub mod functions;
pub mod live;
pub mod pg;
pub mod sql;
