//! The commands on outboxes that the library has written.

use arrow::{
    array::{Array, AsArray, Float64Array},
    ipc::reader::StreamReader,
};
use common::reading::{Device, DeviceIx, Quality, Reading, Registry};

use super::*;
use crate::{
    census::{Census, Outcome},
    outbox::OutboxError,
    seal::{Processed, Sealer},
    settings::Settings,
};

fn settings(home: &Path) -> OutboxSettings {
    let path = home.join("agent.toml");
    let text = format!("site = \"s\"\ngateway = \"g\"\ndata_dir = \"{}\"\n", home.join("data").display());
    // What is wrong with the rest does not matter here; the outbox's part has defaults.
    fs::write(&path, text).unwrap();
    Settings::load(Some(&path)).unwrap().outbox
}

fn fill(settings: &OutboxSettings, seconds: std::ops::Range<i64>) {
    let device = Device {
        id: "p/a".into(),
        device_type: "flow".into(),
        asset: "p".into(),
        unit: "1".into(),
        ..Device::default()
    };
    let registry = Registry { assets: Vec::new(), devices: vec![device] };
    let mut sealer = Sealer::new(settings.clone(), &registry);
    let at = |second: i64| Timestamp::from_micros(1_700_000_000_000_000 + second * 1_000_000);
    let outbox = Outbox::open(&settings.dir, Limits::from(settings), at(seconds.start)).unwrap();
    for second in seconds.clone() {
        let reading =
            Reading { ts: at(second), device: DeviceIx(0), quality: Quality::Good, value: second as f64 };
        let mut census = Census::default();
        census.add(at(second), Outcome::Polled, 1);
        let batch = Processed {
            readings: vec![reading],
            census,
            last_event: Some(at(second)),
            ..Processed::default()
        };
        let _ = sealer.push(std::time::Instant::now(), batch);
        if let Some(cut) = sealer.cut() {
            outbox.append(at(second), cut.drafts, &[]).unwrap();
        }
    }
    outbox.close(at(seconds.end)).unwrap();
}

fn values(path: &Path) -> Vec<f64> {
    let reader = StreamReader::try_new(File::open(path).unwrap(), None).unwrap();
    let mut values = Vec::new();
    for batch in reader {
        let batch = batch.unwrap();
        assert_eq!(batch.column_by_name("device_id").unwrap().as_string::<i32>().value(0), "p/a");
        assert!(batch.column_by_name("message_seq").unwrap().null_count() == 0);
        let column: &Float64Array = batch.column_by_name("value").unwrap().as_primitive();
        values.extend(column.values());
    }
    values
}

#[test]
fn everything_that_is_held_is_exported() {
    let home = tempfile::tempdir().unwrap();
    let settings = settings(home.path());
    fill(&settings, 0..5);
    fill(&settings, 5..9);
    let outbox = Outbox::open(&settings.dir, Limits::from(&settings), Timestamp::from_micros(1)).unwrap();
    outbox.forget(Lane::Readings, 0..2).unwrap();
    outbox.close(Timestamp::from_micros(2)).unwrap();
    drop(outbox);

    let out = home.path().join("out");
    let inspection = Inspection::open(&settings.dir).unwrap();
    let code = export(&inspection, &out, None, false).unwrap();
    assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::SUCCESS));
    assert_eq!(values(&out.join("readings.arrows")), [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    assert!(out.join("control.arrows").exists() && !out.join("anomalies.arrows").exists());
    let error = format!("{:#}", export(&inspection, &out, Some(Lane::Readings), false).unwrap_err());
    assert!(error.contains("choose an empty folder"), "{error}");
}

#[test]
fn fsck_finds_repairs_and_what_was_set_aside_can_be_exported() {
    let home = tempfile::tempdir().unwrap();
    let settings = settings(home.path());
    fill(&settings, 0..40);
    let success = |code: ExitCode| format!("{code:?}") == format!("{:?}", ExitCode::SUCCESS);
    let run =
        |repair| success(fsck(Inspection::open(&settings.dir).unwrap(), &settings, repair, true).unwrap());
    assert!(run(false), "sound");
    // The end of the log is gone.
    let db = settings.dir.join("readings/00000001/db");
    let length = fs::metadata(&db).unwrap().len();
    File::options().write(true).open(&db).unwrap().set_len(length / 2).unwrap();
    assert!(!run(false) && !run(false), "found, and left as it is");
    assert!(run(true), "repaired");
    assert!(run(false), "sound again");
    let inspection = Inspection::open(&settings.dir).unwrap();
    let aside = inspection.generations.iter().find(|g| g.standing == Standing::Quarantined).unwrap();
    assert_eq!((aside.lane, aside.held()), (Lane::Readings, (0, 0)));
    let out = home.path().join("out");
    assert!(!success(export(&inspection, &out, Some(Lane::Readings), true).unwrap()), "not everything");
    let saved = values(&out.join("readings.arrows"));
    assert!(!saved.is_empty() && saved.len() < 40, "{saved:?}");
    list(&inspection.generations);
}

#[test]
fn an_agent_that_runs_is_not_disturbed() {
    let home = tempfile::tempdir().unwrap();
    let settings = settings(home.path());
    let missing = execute(&OutboxCommand::Ls { json: false }, &settings).unwrap_err();
    assert!(format!("{missing:#}").contains("data_dir"), "{missing:#}");
    let _outbox = Outbox::open(&settings.dir, Limits::from(&settings), Timestamp::from_micros(1)).unwrap();
    for command in [OutboxCommand::Ls { json: false }, OutboxCommand::Fsck { repair: true, json: false }] {
        let error = execute(&command, &settings).unwrap_err();
        assert!(format!("{error:#}").contains("the agent must be stopped"), "{error:#}");
        assert!(matches!(error.downcast_ref(), Some(OutboxError::Locked(_))));
    }
}

#[test]
fn tables_and_sizes() {
    for (n, text) in
        [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (16 << 20, "16.0 MiB"), (3 << 40, "3.0 TiB")]
    {
        assert_eq!(bytes(n), text);
    }
}
