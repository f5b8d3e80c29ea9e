//! The agent's own figures: what became of every reading, by its metrics and by the census that it declares.

use arrow::{
    array::{AsArray as _, RecordBatch, StringArray},
    datatypes::{Int32Type, Int64Type},
};
use serde::Serialize;

use crate::http;

/// What became of what was polled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Counted {
    pub(super) polled: u64,
    pub(super) sealed: u64,
    pub(super) held: u64,
    pub(super) rejected: u64,
    pub(super) skipped: u64,
}

impl Counted {
    pub(super) fn balances(&self) -> bool {
        self.polled == self.sealed + self.held + self.rejected + self.skipped
    }

    /// Adds the census records of a batch of the control lane (common::wire: columns `record`, `readings`, `reason`).
    pub(super) fn declare(&mut self, batch: &RecordBatch) {
        let records = batch.column(0).as_dictionary::<Int32Type>();
        let Some(records) = records.downcast_dict::<StringArray>() else { return };
        let (readings, reasons) =
            (batch.column(6).as_primitive::<Int64Type>(), batch.column(9).as_string::<i32>());
        for (row, record) in records.into_iter().enumerate() {
            if record == Some("census")
                && let Some(slot) = self.slot(reasons.value(row))
            {
                *slot += readings.value(row).unsigned_abs();
            }
        }
    }

    /// By the word of [`edge_agent::census::Outcome`].
    fn slot(&mut self, outcome: &str) -> Option<&mut u64> {
        Some(match outcome {
            "polled" => &mut self.polled,
            "sealed" => &mut self.sealed,
            "held" => &mut self.held,
            "skipped" => &mut self.skipped,
            rejected if rejected.starts_with("rejected:") => &mut self.rejected,
            _ => return None,
        })
    }
}

/// What the agent's metrics say.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    pub(super) counted: Counted,
    /// Windows that a model scored, and those that it did not.
    pub(super) scores: u64,
    pub(super) unscored: u64,
}

impl Seen {
    pub(super) fn of(metrics: &str) -> Self {
        let readings = |label: &str| http::metric(metrics, "tailrace_edge_readings_total", label) as u64;
        let windows = |label: &str| http::metric(metrics, "tailrace_edge_model_windows_total", label) as u64;
        let scores = windows("outcome=\"scored\"");
        let counted = Counted {
            polled: readings("outcome=\"polled\""),
            sealed: readings("outcome=\"sealed\""),
            held: readings("outcome=\"held\""),
            rejected: readings("outcome=\"rejected:"),
            skipped: readings("outcome=\"skipped\""),
        };
        Self { counted, scores, unscored: windows("") - scores }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_added_up() {
        let seen = Seen::of(
            "tailrace_edge_readings_total{stage=\"source\",outcome=\"polled\"} 10\n\
             tailrace_edge_readings_total{stage=\"source\",outcome=\"rejected:malformed\"} 1\n\
             tailrace_edge_readings_total{stage=\"source\",outcome=\"rejected:past\"} 2\n\
             tailrace_edge_readings_total{stage=\"filter\",outcome=\"held\"} 3\n\
             tailrace_edge_readings_total{stage=\"filter\",outcome=\"passed\"} 4\n\
             tailrace_edge_readings_total{stage=\"seal\",outcome=\"sealed\"} 4\n\
             tailrace_edge_model_windows_total{model=\"m\",outcome=\"scored\"} 7\n\
             tailrace_edge_model_windows_total{model=\"m\",outcome=\"standing\"} 5\n",
        );
        let expected = Counted { polled: 10, sealed: 4, held: 3, rejected: 3, skipped: 0 };
        assert!(seen.counted == expected && seen.counted.balances(), "{seen:?}");
        assert_eq!((seen.scores, seen.unscored), (7, 5));
    }
}
