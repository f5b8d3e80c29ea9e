//! The whole agent on a recorded file, without a broker: what is sealed waits in the outbox.

use std::{fmt::Write as _, path::Path};

use arrow::{array::AsArray, datatypes::Int64Type};
use common::{
    time::{HOUR_MICROS, SystemClock},
    wire::{self, Lane},
};

use super::*;
use crate::{
    census::{Census, Reason},
    source::LinuxHardware,
};

/// Rows a second apart from 2026-03-01T00:59:00Z on, so that they lie in two hours.
fn record(path: &Path, rows: i64) {
    let begin: Timestamp = "2026-03-01T00:59:00Z".parse().unwrap();
    let mut text = "ts,device_id,value\n".to_owned();
    for second in 0..rows {
        let ts = begin + std::time::Duration::from_secs(second as u64);
        let _ = writeln!(text, "{ts},p/steady,1.0\n{ts},p/busy,{second}");
        if second % 10 == 0 {
            let _ = writeln!(text, "{ts},p/unknown,1.0");
        }
    }
    std::fs::write(path, text).unwrap();
}

async fn run_agent(home: &Path) -> anyhow::Result<()> {
    let config = format!(
        r#"
        site = "plant"
        gateway = "gw-1"
        data_dir = "{home}/data"
        [[asset]]
        id = "p"
        [[device]]
        id = "p/steady"
        type = "temperature"
        asset = "p"
        unit = "Cel"
        deadband = 0.5
        heartbeat = "1min"
        [[device]]
        id = "p/busy"
        type = "temperature"
        asset = "p"
        unit = "Cel"
        range = [0.0, 100.0]
        [[replay]]
        file = "{home}/rows.csv"
        [mqtt]
        url = "mqtt://127.0.0.1:9"
        [uplink]
        drain = "0s"
        [metrics]
        listen = ""
        "#,
        home = home.display()
    );
    let path = home.join("edge-agent.toml");
    std::fs::write(&path, config)?;
    let (_stop, stopped) = watch::channel(false);
    run(Settings::load(Some(&path))?, LinuxHardware, Arc::new(SystemClock), stopped).await
}

/// Everything that the outbox holds: rows by lane, and the census that it declares, with `sealed`.
fn audit(home: &Path) -> (Vec<(Lane, usize)>, Census) {
    let settings = Settings::load(Some(&home.join("edge-agent.toml"))).unwrap();
    let outbox =
        Outbox::open(&settings.outbox.dir, Limits::from(&settings.outbox), SystemClock.now()).unwrap();
    let mut census = Census::default();
    let mut rows = Vec::new();
    for lane in Lane::ALL {
        let mut sum = 0;
        for message in outbox.page(lane, 0, 10_000, usize::MAX, SystemClock.now()).unwrap() {
            let batch = wire::decode(lane, &message.payload).unwrap();
            sum += batch.num_rows();
            if lane != Lane::Control {
                continue;
            }
            let records = batch.column(0).as_dictionary::<arrow::datatypes::Int32Type>();
            let records = records.downcast_dict::<arrow::array::StringArray>().unwrap();
            for (row, record) in records.into_iter().enumerate() {
                if record == Some("census") {
                    let n = batch.column(6).as_primitive::<Int64Type>().value(row) as u64;
                    let from = batch.column(7).as_primitive::<arrow::datatypes::TimestampMicrosecondType>();
                    let outcome = batch.column(9).as_string::<i32>().value(row).parse().unwrap();
                    census.add(Timestamp::from_micros(from.value(row)), outcome, n);
                }
            }
        }
        rows.push((lane, sum));
    }
    (rows, census)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_reading_is_accounted_for_over_two_runs() {
    let home = tempfile::tempdir().unwrap();
    record(&home.path().join("rows.csv"), 100);
    run_agent(home.path()).await.unwrap();
    // The recording has grown; what was sealed is not read again.
    record(&home.path().join("rows.csv"), 150);
    run_agent(home.path()).await.unwrap();

    let (rows, census) = audit(home.path());
    assert!(census.balances(), "{census:?}");
    assert_eq!(census.total(Outcome::Polled), 150 * 2 + 15);
    assert_eq!(census.total(Outcome::Rejected(Reason::UnknownDevice)), 15);
    // Of the steady device, the first of each run and one heartbeat are sent.
    let held = census.total(Outcome::Held);
    assert_eq!(held, 150 - 3, "{census:?}");
    assert_eq!(census.total(Outcome::Sealed), 300 - held);
    assert_eq!(rows[3], (Lane::Readings, 300 - held as usize));
    // Windows 0:59, 1:00 and, in the second run, the rest of 1:00 and 1:01, for two devices.
    assert_eq!(rows[2], (Lane::Aggregates, 8));
    let hours: std::collections::BTreeSet<_> =
        census.iter().map(|(hour, ..)| hour.as_micros() / HOUR_MICROS).collect();
    assert_eq!(hours.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_recording_ends_the_agent_with_its_name() {
    let home = tempfile::tempdir().unwrap();
    let error = run_agent(home.path()).await.unwrap_err();
    assert!(format!("{error:#}").contains("rows.csv"), "{error:#}");
}
