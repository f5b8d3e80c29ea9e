//! `rebuild`: the same again, or what is not.

use arrow::array::{AsArray, Int64Array, StringArray};
use cloud_ingest::{
    gold::{self, GoldSettings},
    rebuild::{Options, Report, rebuild},
    upkeep::maintain,
};
use object_store::{ObjectStoreExt, path::Path};

use super::{
    upkeep::{gold_rows, late, refined_lake, settings},
    *,
};

async fn run(store: &Store, options: Options) -> Report {
    rebuild(store, &options, &GoldSettings::default(), now(), |_| {}).await.unwrap()
}

async fn verify(store: &Store) -> Report {
    run(store, Options { verify: true, ..Options::default() }).await
}

/// Rows of a table as they stand.
async fn rows(tables: &Tables, table: Table, condition: &str) -> RecordBatch {
    let columns: Vec<String> = table.schema().fields().iter().map(|f| format!("\"{}\"", f.name())).collect();
    let sql =
        format!("select {} from {}.{} where {condition}", columns.join(", "), table.layer(), table.name());
    let batches = tables.session().await.unwrap().sql(&sql).await.unwrap().collect().await.unwrap();
    let columns = arrow::compute::concat_batches(&batches[0].schema(), &batches).unwrap();
    let schema = table.schema();
    let cast = columns.columns().iter().zip(schema.fields()).map(|(c, f)| cast(c, f.data_type()).unwrap());
    RecordBatch::try_new(Arc::clone(&schema), cast.collect()).unwrap()
}

/// Puts rows in the place of those that match.
async fn tamper(tables: &Tables, table: Table, condition: &str, rows: Vec<RecordBatch>) {
    let base = tables.snapshot(table).await.unwrap();
    tables.replace(table, base, Some(condition), rows, ("by-hand", 1)).await.unwrap();
}

fn with(batch: &RecordBatch, column: &str, values: ArrayRef) -> RecordBatch {
    let mut columns = batch.columns().to_vec();
    columns[batch.schema().index_of(column).unwrap()] = values;
    RecordBatch::try_new(batch.schema(), columns).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lake_is_rebuilt_identically_packed_or_not() {
    let store = Store::open("memory:///").unwrap();
    let tables = refined_lake(&store).await;
    let report = verify(&store).await;
    assert_eq!(report.identical, Some(true), "{report}");
    assert_eq!((report.plans, report.replayed, report.readings, report.missing), (9, 9, 32, 0), "{report}");
    let of = |table: Table| report.tables.iter().find(|t| t.table == table.path()).unwrap().rows;
    assert_eq!((of(Table::SensorReadings), of(Table::Messages)), (16, 13), "{report}");
    assert!(of(Table::HourlyAggregates) > 0 && of(Table::Quarantine) > 0 && of(Table::Timeseries1m) > 0);

    maintain(&tables, &settings(), &GoldSettings::default(), late()).await;
    let packed = verify(&store).await;
    assert_eq!((packed.identical, packed.replayed, packed.missing), (Some(true), 9, 0), "{packed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_changed_by_hand_is_found() {
    let a = "site = 'plant' and device_id = 'a' and ts = '2026-03-01T06:13:20Z'";
    let hour = "device_id = 'a' and hour = '2026-03-01T06:00:00Z'";
    let minute = "device_id = 'b' and time = '2026-03-01T06:13:00Z'";
    let halved = |batch: &RecordBatch, column: &str| -> ArrayRef {
        let values = batch.column_by_name(column).unwrap().as_primitive::<arrow::datatypes::Float64Type>();
        Arc::new(values.unary::<_, arrow::datatypes::Float64Type>(|v| v / 2.0))
    };
    let nearly = |batch: &RecordBatch, column: &str| -> ArrayRef {
        let values = batch.column_by_name(column).unwrap().as_primitive::<arrow::datatypes::Float64Type>();
        Arc::new(values.unary::<_, arrow::datatypes::Float64Type>(|v| v * (1.0 + 1e-12)))
    };
    // Table, rows that are replaced, by what: table, key and words of what is to be found.
    for (table, condition, change, found) in [
        (Table::SensorReadings, a, "changed", Some(["device_id=a", "value: 50.0"])),
        (Table::SensorReadings, a, "removed", Some(["device_id=a", "only in the rebuild"])),
        (Table::SensorReadings, a, "added", Some(["device_id=zz", "only in the lake"])),
        (Table::SensorReadings, a, "nearly", None),
        (Table::HourlyAggregates, hour, "revised", None),
        (Table::HourlyAggregates, hour, "changed", Some(["device_id=a", "mean: "])),
        (Table::DailyAggregates, "device_id = 'a'", "changed", Some(["device_id=a", "mean: "])),
        (Table::AssetHealth, "true", "removed", Some(["asset_id=pump-01", "only in the rebuild"])),
        (Table::Timeseries1m, minute, "removed", Some(["device_id=b", "only in the rebuild"])),
        (Table::Messages, "seq = 1 and lane = 'readings'", "removed", Some(["seq=1", "only in the rebuild"])),
    ] {
        let store = Store::open("memory:///").unwrap();
        let tables = refined_lake(&store).await;
        let rows = rows(&tables, table, condition).await;
        assert!(rows.num_rows() > 0, "{condition}");
        let value = if table == Table::SensorReadings { "value" } else { "mean" };
        match change {
            "removed" => tamper(&tables, table, condition, vec![]).await,
            "changed" => {
                tamper(&tables, table, condition, vec![with(&rows, value, halved(&rows, value))]).await;
            }
            "nearly" => {
                tamper(&tables, table, condition, vec![with(&rows, value, nearly(&rows, value))]).await;
            }
            "revised" => {
                let revision: ArrayRef = Arc::new(Int64Array::from(vec![77; rows.num_rows()]));
                tamper(&tables, table, condition, vec![with(&rows, "revision", revision)]).await;
            }
            _ => {
                let device: ArrayRef = Arc::new(StringArray::from(vec!["zz"; rows.num_rows()]));
                let base = tables.snapshot(table).await.unwrap();
                let added = vec![with(&rows, "device_id", device)];
                tables.append(table, base, added, ("by-hand", 1)).await.unwrap();
            }
        }
        // Gold that was computed of silver as it was before stays as it is.
        let report = verify(&store).await;
        let of_table = report.tables.iter().find(|t| t.table == table.path()).unwrap();
        match found {
            None => assert_eq!(report.identical, Some(true), "{change} {condition}: {report}"),
            Some(words) => {
                assert_eq!(report.identical, Some(false), "{change} {condition}: {report}");
                let text = format!("{:?}", of_table.differences);
                assert!(words.iter().all(|word| text.contains(word)), "{change} {condition}: {report}");
                let other = report.tables.iter().filter(|t| t.table != table.path());
                assert!(other.clone().all(|t| t.identical()), "{change} {condition}: {report}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_bronze_lacks_is_listed_and_taken_over() {
    for number in 0..9 {
        let store = Store::open("memory:///").unwrap();
        refined_lake(&store).await;
        let gone = SegmentName { hour: now().hour(), writer: Uuid::from_u128(1), number };
        store.objects().delete(&Path::from(gone.path())).await.unwrap();
        let report = verify(&store).await;
        assert_eq!(report.missing_segments, [gone.path()]);
        assert_eq!((report.identical, report.missing), (Some(true), 1), "without {number}: {report}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_lake_can_take_the_place_of_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("lake").to_str().unwrap()).unwrap();
    let tables = refined_lake(&store).await;
    let new = Store::open(folder.path().join("new").to_str().unwrap()).unwrap();
    let into = Options { into: Some(new.clone()), ..Options::default() };
    let report = run(&store, into.clone()).await;
    assert_eq!((report.identical, report.replayed), (None, 9));
    // Once more: everything is there.
    let again = run(&store, Options { verify: true, ..into }).await;
    assert_eq!((again.identical, again.replayed), (Some(true), 0), "{again}");
    let rebuilt = Tables::open(&new).await.unwrap();
    assert_eq!(everything(&rebuilt).await, everything(&tables).await);

    // In the old one's place it goes on with the next plan.
    for layer in ["silver", "gold", "ops"] {
        std::fs::remove_dir_all(folder.path().join("lake").join(layer)).unwrap();
        std::fs::rename(folder.path().join("new").join(layer), folder.path().join("lake").join(layer))
            .unwrap();
    }
    let moved = Tables::open(&store).await.unwrap();
    put(&store, 9, &[readings(40, &[(800, "c", 70.0), (0, "a", 212.0)])]).await;
    let counts = refine_all(&mut refiner(&store, &moved)).await;
    assert_eq!((counts.messages, counts.stored, counts.duplicates), (1, 1, 1));
    gold::step(&moved, &GoldSettings::default(), now()).await.unwrap();
    assert_eq!(verify(&store).await.identical, Some(true));

    // Another lake is not mixed with it.
    let other = Store::open("memory:///").unwrap();
    fill(&other).await;
    let tables = Tables::open(&other).await.unwrap();
    refine_all(&mut refiner(&other, &tables)).await;
    let into = Options { into: Some(store.clone()), ..Options::default() };
    let refused = rebuild(&other, &into, &GoldSettings::default(), now(), |_| {}).await.unwrap_err();
    assert!(format!("{refused:#}").contains("holds another lake"), "{refused:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_period_and_a_lake_that_goes_on() {
    let store = Store::open("memory:///").unwrap();
    let tables = refined_lake(&store).await;
    let next = now() + Duration::from_secs(3600);
    for number in 0..3 {
        let of_next = |message: Message| Message { received_at: next, ..message };
        let messages = [
            // A redelivery, a conflict, and something new that touches the hour before.
            of_next(readings(1, &[(2, "a", 214.0), (3, "a", 9_999.0)])),
            of_next(readings(50 + number, &[(1, "a", 80.0), (700 + number, "a", 81.0)])),
        ];
        let name = SegmentName { hour: next.hour(), writer: Uuid::from_u128(2), number };
        let bytes = bronze::encode(&bronze::rows(&messages).unwrap()).unwrap();
        bronze::put(store.objects().as_ref(), &name, bytes.into()).await.unwrap();
    }
    refine_all(&mut refiner(&store, &tables)).await;
    // Gold has not seen these yet.
    let behind = verify(&store).await;
    assert_eq!(behind.identical, Some(true), "{behind}");
    assert!(behind.left_out.iter().any(|text| text.contains("hours of gold")), "{behind}");
    gold::step(&tables, &GoldSettings::default(), now()).await.unwrap();
    assert_eq!(verify(&store).await.identical, Some(true));
    let of = |from, to| run(&store, Options { verify: true, from, to, into: None });
    let first = of(None, Some(next)).await;
    assert_eq!((first.identical, first.replayed), (Some(true), 9), "{first}");
    let second = of(Some(next), None).await;
    assert_eq!((second.identical, second.replayed, second.missing), (Some(true), 1, 0), "{second}");
    assert!(second.left_out.iter().all(|text| !text.contains("hours of gold")), "{second}");
    let text = gold_rows(&tables).await;
    assert!(text.contains("2026-03-01T06:00:00"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_retention_the_rest_is_compared() {
    let store = Store::open("memory:///").unwrap();
    let tables = refined_lake(&store).await;
    let day = Duration::from_secs(86_400);
    let keep = cloud_ingest::settings::UpkeepSettings { keep_bronze: day, keep_silver: day, ..settings() };
    let done = maintain(&tables, &keep, &GoldSettings::default(), now() + 10 * day).await;
    assert!(done.expired_files > 0 && done.failed.is_empty(), "{done}");
    let report = verify(&store).await;
    assert_eq!((report.identical, report.missing), (Some(true), 9), "{report}");
    assert!(report.left_out.iter().any(|text| text.contains("retention")), "{report}");
    // A new lake keeps gold's final hours.
    let folder = tempfile::tempdir().unwrap();
    let new = Store::open(folder.path().to_str().unwrap()).unwrap();
    run(&store, Options { into: Some(new.clone()), ..Options::default() }).await;
    let rebuilt = Tables::open(&new).await.unwrap();
    assert_eq!(gold_rows(&rebuilt).await, gold_rows(&tables).await);
}

/// The figure, of a smaller lake:
/// `cargo nextest run --workspace --cargo-profile demo --run-ignored only -E 'test(rebuild_takes)' --no-capture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "prints figures"]
async fn how_long_a_rebuild_takes() {
    const MESSAGES: u64 = 2_000;
    const ROWS: u64 = 1_000;
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap()).unwrap();
    let tables = Tables::open(&store).await.unwrap();
    let devices: Vec<String> = (0..100).map(|n| format!("device-{n}")).collect();
    for segment in 0..MESSAGES / 100 {
        let messages: Vec<Message> = (0..100)
            .map(|n| {
                let seq = segment * 100 + n;
                let rows: Vec<(u64, &str, f64)> = (0..ROWS)
                    .map(|row| {
                        (
                            seq * ROWS / 100 + row / 100,
                            devices[(row % 100) as usize].as_str(),
                            row as f64 / 7.0,
                        )
                    })
                    .collect();
                Message { received_at: at(seq * ROWS / 100 + ROWS), ..readings(seq, &rows) }
            })
            .collect();
        let name =
            SegmentName { hour: messages[0].received_at.hour(), writer: Uuid::from_u128(1), number: segment };
        let bytes = bronze::encode(&bronze::rows(&messages).unwrap()).unwrap();
        bronze::put(store.objects().as_ref(), &name, bytes.into()).await.unwrap();
    }
    let began = std::time::Instant::now();
    let counts = refine_all(&mut refiner(&store, &tables)).await;
    gold::step(&tables, &GoldSettings::default(), now()).await.unwrap();
    println!("{counts:?} refined and in gold in {:.1} s", began.elapsed().as_secs_f64());
    println!("{}", verify(&store).await);
    println!("{}", maintain(&tables, &settings(), &GoldSettings::default(), late()).await);
    let packed = verify(&store).await;
    println!("packed: {packed}\nreplay alone {:.1} s", packed.replay_seconds);
}
