//! The edge agent: reads sensors, filters, aggregates, scores and delivers.

pub mod source;
