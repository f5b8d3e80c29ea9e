//! Recorded files and what becomes of their rows.

use common::{reading::Device, time::SystemClock};
use tokio::sync::{mpsc, watch};

use super::*;
use crate::{metrics::Metrics, source::LinuxHardware};

/// Replays a file of the devices `p/t` and `p/s`, of which nothing before 00:00:01 is new.
async fn replay(rows: &str, form: ReplayForm) -> anyhow::Result<mpsc::Receiver<Polled>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.csv");
    std::fs::write(&path, rows).unwrap();
    let device = |id: &str| Device { id: id.into(), ..Device::default() };
    let registry = Registry { devices: vec![device("p/t"), device("p/s")], ..Registry::default() };
    let (out, polled) = mpsc::channel(8);
    let (_stop, stopped) = watch::channel(false);
    let context = Context {
        hardware: Arc::new(LinuxHardware),
        clock: Arc::new(SystemClock),
        resume_after: Some("2026-03-01T00:00:00Z".parse().unwrap()),
        out,
        stop: stopped,
        metrics: Arc::new(Metrics::default()),
    };
    run(&path, &form, Arc::new(registry), context).await?;
    Ok(polled)
}

fn wide() -> ReplayForm {
    let columns = vec![("T".to_owned(), DeviceIx(0)), ("S 2".to_owned(), DeviceIx(1))];
    ReplayForm::Wide { separator: ';', time: "datetime".into(), columns }
}

#[tokio::test]
async fn a_row_is_an_instant_in_the_wide_form() {
    let rows = "datetime;S 2;unused;T\n\
                2026-03-01 00:00:00;1;x;2\n\
                2026-03-01 00:00:01;3;x;4.5\n\
                never;3;x;4.5\n\
                2026-03-01 00:00:02;;x;what\n";
    let mut polled = replay(rows, wide()).await.unwrap();
    let first = polled.recv().await.unwrap();
    let got: Vec<_> = first.readings.iter().map(|r| (r.device, r.value)).collect();
    assert_eq!(got, [(DeviceIx(0), 4.5), (DeviceIx(1), 3.0)]);
    assert_eq!(first.at, "2026-03-01T00:00:01Z".parse().unwrap());
    assert_eq!(first.census.total(Outcome::Rejected(Reason::Malformed)), 2);
    let second = polled.recv().await.unwrap();
    assert_eq!((second.readings.len(), second.readings[0].quality), (1, Quality::Bad));
    assert_eq!(second.census.total(Outcome::Rejected(Reason::Malformed)), 1);
    assert!(polled.recv().await.is_none());
}

#[tokio::test]
async fn a_header_that_does_not_fit_is_named() {
    for (header, form, part) in [
        ("a;b", wide(), "no column \"T\" in its header \"a;b\", split at ';'"),
        ("a;b", ReplayForm::Long, "its header is \"a;b\"; write ts,device_id,value,quality"),
    ] {
        let error = format!("{:#}", replay(header, form).await.unwrap_err());
        assert!(error.contains(part), "{error}");
    }
}

#[tokio::test]
async fn rows_of_an_instant_are_a_batch_and_bad_rows_are_counted() {
    let rows = "ts,device_id,value,quality\n\
                2026-03-01T00:00:00Z,p/t,0.5,0\n\
                2026-03-01T00:00:01Z,p/t,1.5,0\n\
                2026-03-01T00:00:01Z,p/s,2.5,1\n\
                2026-03-01T00:00:01Z,p/x,2.5,0\n\
                what is this\n\
                2026-03-01T00:00:02Z,p/t,,2\n";
    let mut polled = replay(rows, ReplayForm::Long).await.unwrap();
    let first = polled.recv().await.unwrap();
    let got: Vec<_> = first.readings.iter().map(|r| (r.device, r.value, r.quality)).collect();
    assert_eq!(got, [(DeviceIx(0), 1.5, Quality::Good), (DeviceIx(1), 2.5, Quality::Uncertain)]);
    let census = &first.census;
    assert_eq!(census.total(Outcome::Polled), 4);
    assert_eq!(census.total(Outcome::Rejected(Reason::UnknownDevice)), 1);
    assert_eq!(census.total(Outcome::Rejected(Reason::Malformed)), 1);
    let second = polled.recv().await.unwrap();
    assert_eq!((second.readings.len(), second.readings[0].quality), (1, Quality::Bad));
    assert!(polled.recv().await.is_none());
}
