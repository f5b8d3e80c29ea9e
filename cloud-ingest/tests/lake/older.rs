//! A lake that another build has made: its gold is made again, its silver is refused by name.

use cloud_ingest::{
    gold::{self, GoldSettings},
    pipeline,
    settings::{Role, Settings},
};
use deltalake::kernel::{Transaction, transaction::CommitProperties};

use super::*;

/// Gold's tables, and a column of each that an older build may have lacked; the first three are filled here.
const GOLD: [(Table, &str); 8] = [
    (Table::HourlyAggregates, "covered_ratio"),
    (Table::Timeseries1m, "last"),
    (Table::DailyAggregates, "good_ratio"),
    (Table::AssetHealth, "anomaly_minutes"),
    (Table::AnomalyEvents, "severity"),
    (Table::Assets, "path"),
    (Table::Devices, "unit"),
    (Table::MaintenanceSchedule, "basis"),
];

/// The table as a build made it that had other columns, with its rows and gold's progress.
async fn as_another_build(store: &Store, table: Table, columns: &str) {
    let tables = Tables::open(store).await.unwrap();
    let sql = format!("select {columns} from {}.{}", table.layer(), table.name());
    let rows = tables.session().await.unwrap().sql(&sql).await.unwrap();
    let schema = Arc::clone(rows.schema().inner());
    let mut rows = rows.collect().await.unwrap();
    if rows.is_empty() {
        rows.push(RecordBatch::new_empty(schema));
    }
    let snapshot = tables.snapshot(table).await.unwrap().unwrap();
    let progress = Tables::progress(&snapshot, "silver").await.unwrap();
    let folder = store.url().join(&table.path()).unwrap().to_file_path().unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    let txn = progress.map(|version| Transaction::new("silver", version));
    let of_build = CommitProperties::default().with_application_transactions(txn.into_iter().collect());
    store
        .delta(&table.path())
        .unwrap()
        .write(rows)
        .with_partition_columns(table.partitions().iter().copied())
        .with_commit_properties(of_build)
        .await
        .unwrap();
}

/// Rows of gold, without what says how they came to be.
async fn gold_of(tables: &Tables) -> String {
    let mut all = String::new();
    for (table, _) in GOLD {
        let stamps = ["revision", "updated_at", "computed_at"];
        let schema = table.schema();
        let columns =
            schema.fields().iter().map(|f| f.name()).filter(|name| !stamps.contains(&name.as_str()));
        let columns: Vec<String> = columns.map(|name| format!("\"{name}\"")).collect();
        let columns = columns.join(", ");
        let sql = format!("select {columns} from gold.{} order by {columns}", table.name());
        all += &format!("{}\n{}\n", table.path(), ask(tables, &sql).await);
    }
    all
}

async fn filled(folder: &std::path::Path) -> (Store, String) {
    let store = Store::open(folder.to_str().unwrap()).unwrap();
    let tables = Tables::open(&store).await.unwrap();
    tables.create_missing().await.unwrap();
    fill(&store).await;
    refine_all(&mut refiner(&store, &tables)).await;
    gold::step(&tables, &GoldSettings::default(), now()).await.unwrap();
    let gold = gold_of(&tables).await;
    (store, gold)
}

/// The start of the refiner, and gold's step that follows.
async fn started(store: &Store) -> Tables {
    let tables = Tables::open(store).await.unwrap();
    tables.settle_columns().await.unwrap();
    // Killed here, it begins again.
    let tables = Tables::open(&Store::open(tables.store().url().as_str()).unwrap()).await.unwrap();
    tables.settle_columns().await.unwrap();
    tables.create_missing().await.unwrap();
    gold::step(&tables, &GoldSettings::default(), now() + Duration::from_secs(60)).await.unwrap();
    tables
}

#[tokio::test]
async fn gold_of_another_build_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let (store, before) = filled(folder.path()).await;
    assert!(before.contains("| plant | a         |"), "{before}");
    for (table, column) in GOLD {
        as_another_build(&store, table, &format!("* except ({column})")).await;
        let tables = started(&store).await;
        assert_eq!(gold_of(&tables).await, before, "{} without {column}", table.path());
        let done = gold::step(&tables, &GoldSettings::default(), now() + Duration::from_secs(120)).await;
        assert!(done.unwrap().is_nothing(), "{}", table.path());
    }
    // Something more, and something else; all at once.
    for (table, column) in GOLD {
        as_another_build(&store, table, &format!("* except ({column}), 'x' as {column}, 1 as mood")).await;
    }
    let tables = started(&store).await;
    assert_eq!(gold_of(&tables).await, before);
    let columns = tables.session().await.unwrap().table("gold.hourly_aggregates").await.unwrap();
    assert!(columns.schema().field_with_unqualified_name("mood").is_err());
}

/// Hours that silver can no longer give stay, where that is possible; where it is not, nothing is lost unasked.
#[tokio::test]
async fn gold_whose_readings_are_gone_is_not_thrown_away() {
    let folder = tempfile::tempdir().unwrap();
    let (store, before) = filled(folder.path()).await;
    let tables = Tables::open(&store).await.unwrap();
    let all = tables.snapshot(Table::SensorReadings).await.unwrap();
    let cutoff = now() + Duration::from_secs(86_400);
    let removed = tables.remove_before(Table::SensorReadings, all.as_ref(), "ts", cutoff).await;
    assert!(removed.unwrap() > 0);
    let without = |column: &'static str| as_another_build(&store, Table::HourlyAggregates, column);
    without("* except (p50)").await;
    let tables = started(&store).await;
    let hours = "select count(*) n, count(mean) m, count(p50) p from gold.hourly_aggregates";
    let rows = ask(&tables, hours).await;
    assert!(rows.contains("| 3 | 3 | 0 |"), "{rows}\n{before}");

    without("* except (covered_ratio)").await;
    let tables = Tables::open(&store).await.unwrap();
    let error = tables.settle_columns().await.unwrap_err().to_string();
    for part in ["gold/hourly_aggregates in file:", "lacks covered_ratio", "2026-03-02", "move the folder"] {
        assert!(error.contains(part), "{part:?} not in {error}");
    }
    let rows = ask(&tables, "select count(*) n from gold.hourly_aggregates").await;
    assert!(rows.contains("| 3 "), "{rows}");
}

#[tokio::test]
async fn silver_of_another_build_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = filled(folder.path()).await;
    as_another_build(&store, Table::Messages, "* except (clock), 1 as mood").await;
    let mut settings = Settings::load(None).unwrap();
    settings.store.url = store.url().to_string();
    settings.roles = vec![Role::Refine];
    let (_stop, stopped) = watch::channel(false);
    let error = pipeline::run(settings, Arc::new(SystemClock), None, stopped).await.unwrap_err();
    let error = format!("{error:#}");
    for part in [
        "silver/messages in file:",
        "lacks clock; has mood, which this build",
        "cloud-ingest rebuild --into URL",
    ] {
        assert!(error.contains(part), "{part:?} not in {error}");
    }
}
