//! Seals rows into messages (pure): when a batch is cut and what is in it.

use arrow::array::RecordBatch;
use common::{time::Timestamp, wire::Lane};

use crate::census::Census;

/// One message before it has a name: the outbox gives it epoch, seq and `rows_before`, encodes it, and makes it
/// durable together with its census.
#[derive(Clone, Debug)]
pub struct Draft {
    /// Its queue; never `control`, which is the outbox's own.
    pub lane: Lane,
    /// Columns as [`common::wire::schema`] has them. Without rows it makes no message and takes no seq: it only
    /// carries its census.
    pub batch: RecordBatch,
    /// Highest event time of the readings that this draft and those before it were made of.
    pub last_event: Timestamp,
    /// What was counted since the draft before.
    pub census: Census,
}
