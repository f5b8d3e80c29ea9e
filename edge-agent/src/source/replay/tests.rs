//! Recorded files and what becomes of their rows.

use ::parquet::{arrow::ArrowWriter, basic::Compression, file::properties::WriterProperties};
use arrow::{
    array::{ArrayRef, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray, UInt8Array},
    compute::cast,
    datatypes::{DataType, TimeUnit},
};
use common::{
    reading::Device,
    time::SystemClock,
    wire::{self, Lane},
};
use tokio::sync::{mpsc, watch};

use super::*;
use crate::{metrics::Metrics, source::LinuxHardware};

/// Replays a file of the devices `p/t` and `p/s`, of which nothing before 00:00:01 is new.
async fn replay(rows: &str, form: ReplayForm) -> anyhow::Result<mpsc::Receiver<Polled>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.csv");
    std::fs::write(&path, rows).unwrap();
    replay_file(&path, form).await
}

async fn replay_file(path: &Path, form: ReplayForm) -> anyhow::Result<mpsc::Receiver<Polled>> {
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
    run(path, &form, Arc::new(registry), context).await?;
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
async fn empty_cells_at_the_end_of_a_row_are_no_value_whatever_separates_them() {
    for separator in [';', ',', '\t'] {
        let rows = ["datetime|T|S 2", "2026-03-01 00:00:01|4.5|", "2026-03-01 00:00:02|| "];
        let rows = rows.join("\r\n").replace('|', &separator.to_string());
        let ReplayForm::Wide { time, columns, .. } = wide() else { unreachable!() };
        let mut polled = replay(&rows, ReplayForm::Wide { separator, time, columns }).await.unwrap();
        for good in [1, 0] {
            let read = polled.recv().await.unwrap();
            let of_quality = read.readings.iter().filter(|r| r.quality == Quality::Good).count();
            assert_eq!((read.readings.len(), of_quality), (2, good), "{separator:?}");
        }
    }
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

/// Writes columns as a Parquet file, a few rows to a row group.
fn parquet(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let batch =
        RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, c)| (name, c, true)));
    let batch = batch.unwrap();
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_max_row_group_row_count(Some(3))
        .build();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

/// Seconds of 2026-03-01 in UTC, as microseconds or as whatever type.
fn seconds(of: &[Option<i64>], data_type: DataType) -> ArrayRef {
    let micros = of.iter().map(|second| second.map(|second| 1_772_323_200_000_000 + second * 1_000_000));
    let micros: TimestampMicrosecondArray = micros.collect();
    cast(&micros.with_timezone("UTC"), &data_type).unwrap()
}

async fn all(mut polled: mpsc::Receiver<Polled>) -> String {
    let mut text = String::new();
    while let Some(Polled { at, readings, census }) = polled.recv().await {
        let readings: Vec<_> =
            readings.iter().map(|r| (r.ts.to_string(), r.device.0, r.quality, r.value.to_string())).collect();
        text += &format!("{at} {readings:?} {census:?}\n");
    }
    text
}

#[tokio::test]
async fn parquet_means_what_csv_means() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.Parquet");
    let long = "ts,device_id,value,quality\n\
                2026-03-01T00:00:00Z,p/t,0.5,0\n\
                2026-03-01T00:00:01Z,p/t,1.5,0\n\
                2026-03-01T00:00:01Z,p/s,2.5,1\n\
                2026-03-01T00:00:01Z,p/x,2.5,0\n\
                ,p/t,9,0\n\
                2026-03-01T00:00:02Z,p/t,,2\n\
                2026-03-01T00:00:02Z,p/s,3,\n\
                2026-03-01T00:00:03Z,p/s,3,7\n\
                2026-03-01T00:00:04Z,,3,0\n";
    let instants = [Some(0), Some(1), Some(1), Some(1), None, Some(2), Some(2), Some(3), Some(4)];
    let ids = [
        Some("p/t"),
        Some("p/t"),
        Some("p/s"),
        Some("p/x"),
        Some("p/t"),
        Some("p/t"),
        Some("p/s"),
        Some("p/s"),
        None,
    ];
    let values =
        [Some(0.5), Some(1.5), Some(2.5), Some(2.5), Some(9.0), None, Some(3.0), Some(3.0), Some(3.0)];
    let quality = [Some(0), Some(0), Some(1), Some(0), Some(0), Some(2), None, Some(7), Some(0)];
    let expected = all(replay(long, ReplayForm::Long).await.unwrap()).await;
    assert_eq!(expected.lines().count(), 2, "{expected}");
    for (ts, id) in [
        (wire::instant(), DataType::Utf8),
        (DataType::Timestamp(TimeUnit::Millisecond, Some("Europe/Berlin".into())), DataType::LargeUtf8),
        (
            DataType::Timestamp(TimeUnit::Nanosecond, None),
            wire::schema(Lane::Readings).field(1).data_type().clone(),
        ),
    ] {
        parquet(
            &path,
            vec![
                ("ts", seconds(&instants, ts)),
                ("device_id", cast(&StringArray::from(ids.to_vec()), &id).unwrap()),
                ("value", Arc::new(Float64Array::from(values.to_vec()))),
                ("quality", Arc::new(UInt8Array::from(quality.to_vec()))),
                ("more", Arc::new(UInt8Array::from(quality.to_vec()))),
            ],
        );
        assert_eq!(all(replay_file(&path, ReplayForm::Long).await.unwrap()).await, expected);
    }

    let table = "datetime;S 2;unused;T\n\
                 2026-03-01 00:00:00;1;x;2\n\
                 2026-03-01 00:00:01;3;x;4.5\n\
                 never;3;x;4.5\n\
                 2026-03-01 00:00:02;;x;-7\n";
    parquet(
        &path,
        vec![
            ("S 2", Arc::new(UInt8Array::from(vec![Some(1), Some(3), Some(3), None]))),
            ("T", Arc::new(Float64Array::from(vec![2.0, 4.5, 4.5, -7.0]))),
            ("datetime", seconds(&[Some(0), Some(1), None, Some(2)], wire::instant())),
        ],
    );
    let expected = all(replay(table, wide()).await.unwrap()).await;
    assert_eq!(all(replay_file(&path, wide()).await.unwrap()).await, expected);
    let device = |id: &str| Device { id: id.into(), ..Device::default() };
    let registry = Registry { devices: vec![device("p/t"), device("p/s")], ..Registry::default() };
    let times: Vec<_> = rows(&path, &wide(), &registry).unwrap().map(|row| row.unwrap().time).collect();
    assert_eq!(times, ["2026-03-01T00:00:00Z", "2026-03-01T00:00:01Z", "", "2026-03-01T00:00:02Z"]);
}

#[tokio::test]
async fn parquet_columns_that_do_not_fit_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    let text: ArrayRef = Arc::new(StringArray::from(vec!["2026-03-01 00:00:01"]));
    let number: ArrayRef = Arc::new(Float64Array::from(vec![1.0]));
    for (columns, part) in [
        (vec![("T", &number), ("S 2", &number)], "no column \"datetime\" among its columns T, S 2"),
        (
            vec![("datetime", &text), ("T", &number), ("S 2", &number)],
            "its column \"datetime\" is Utf8; write a timestamp",
        ),
        (vec![("datetime", &text)], "its column \"datetime\" is Utf8"),
    ] {
        parquet(&path, columns.into_iter().map(|(name, c)| (name, Arc::clone(c))).collect());
        let error = format!("{:#}", replay_file(&path, wide()).await.unwrap_err());
        assert!(error.contains(part) && error.contains("rows.parquet"), "{error}");
    }
    std::fs::write(&path, "datetime;T\n").unwrap();
    let error = format!("{:#}", replay_file(&path, wide()).await.unwrap_err());
    assert!(error.contains("rows.parquet"), "{error}");
}

#[tokio::test]
async fn a_long_file_comes_whole_and_in_order() {
    let mut rows = String::from("ts,device_id,value\n");
    let begin: Timestamp = "2026-03-01T00:00:01Z".parse().unwrap();
    for n in 0..3 * READ_AHEAD as u64 {
        // Two of each instant.
        let ts = begin + std::time::Duration::from_millis(1 + n / 2);
        rows += &format!("{ts},{},{n}\n", ["p/t", "p/s"][n as usize % 2]);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.csv");
    std::fs::write(&path, rows).unwrap();
    let device = |id: &str| Device { id: id.into(), ..Device::default() };
    let registry = Registry { devices: vec![device("p/t"), device("p/s")], ..Registry::default() };
    let mut instants = Instants::open(&path, &ReplayForm::Long, &registry, None).unwrap();
    let mut values = Vec::new();
    loop {
        let polls = instants.read().unwrap();
        if polls.is_empty() {
            break;
        }
        assert!(polls.iter().all(|polled| polled.readings.len() == 2), "an instant is cut");
        values.extend(polls.iter().flat_map(|polled| &polled.readings).map(|reading| reading.value));
    }
    assert_eq!(values, (0..3 * READ_AHEAD).map(|n| n as f64).collect::<Vec<_>>());
}
