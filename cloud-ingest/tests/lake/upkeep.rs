//! Upkeep: killed anywhere, beside writers, and what retention leaves alone.

use std::{fmt, sync::atomic::AtomicI64};

use async_trait::async_trait;
use cloud_ingest::{
    gold::{self, GoldSettings},
    pack::{Hour, Segments},
    settings::UpkeepSettings,
    upkeep::{Done, maintain},
};
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart, memory::InMemory, path::Path,
};
use url::Url;

use super::*;

/// A store that is cut off at its nth write: that one and everything after it fail. Between two writes a cut leaves
/// what the next write finds.
#[derive(Debug)]
struct Cut {
    inner: Arc<dyn ObjectStore>,
    power: Power,
}

/// Writes that succeed yet; below zero, the power is gone.
#[derive(Clone, Debug)]
struct Power(Arc<AtomicI64>);

impl Power {
    fn gone(&self) -> bool {
        self.0.load(Ordering::Relaxed) < 0
    }

    fn use_it(&self, write: bool) -> Result<()> {
        if self.gone() || (write && self.0.fetch_sub(1, Ordering::Relaxed) <= 0) {
            return Err(object_store::Error::Generic { store: "cut", source: "the power is gone".into() });
        }
        Ok(())
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cut({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Cut {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.power.use_it(true)?;
        self.inner.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.power.use_it(true)?;
        let upload = self.inner.put_multipart_opts(location, opts).await?;
        Ok(Box::new(CutUpload { upload, power: self.power.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.power.use_it(false)?;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (inner, power) = (Arc::clone(&self.inner), self.power.clone());
        locations
            .then(move |location| {
                let (inner, power) = (Arc::clone(&inner), power.clone());
                async move {
                    let location = location?;
                    power.use_it(true)?;
                    inner.delete(&location).await?;
                    Ok(location)
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.power.use_it(false) {
            Ok(()) => self.inner.list(prefix),
            Err(e) => futures::stream::once(async { Err(e) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.power.use_it(false)?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.power.use_it(true)?;
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct CutUpload {
    upload: Box<dyn MultipartUpload>,
    power: Power,
}

#[async_trait]
impl MultipartUpload for CutUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        match self.power.use_it(true) {
            Ok(()) => self.upload.put_part(data),
            Err(e) => Box::pin(async { Err(e) }),
        }
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.power.use_it(true)?;
        self.upload.complete().await
    }

    async fn abort(&mut self) -> Result<()> {
        self.upload.abort().await
    }
}

pub(crate) fn settings() -> UpkeepSettings {
    let hours = |n: u64| Duration::from_secs(n * 3600);
    UpkeepSettings {
        interval: hours(1),
        pack_after: hours(2),
        keep_versions: hours(1),
        keep_bronze: Duration::ZERO,
        keep_silver: Duration::ZERO,
        keep_gold: Duration::ZERO,
    }
}

/// So late that every version but the newest is old, whatever the clock says.
pub(crate) fn late() -> Timestamp {
    "2099-01-01T00:00:00Z".parse().unwrap()
}

/// What [`fill`] puts and some more, in plans of a segment each, with gold.
pub(crate) async fn refined_lake(store: &Store) -> Tables {
    let tables = Tables::open(store).await.unwrap();
    fill(store).await;
    for n in 5..9 {
        let second = n * 100;
        put(store, n, &[readings(n + 5, &[(second, "a", 100.0), (second, "b", 50.0)])]).await;
    }
    refine_with(store, &tables, 1).await;
    gold::step(&tables, &GoldSettings::default(), now()).await.unwrap();
    tables
}

async fn refine_with(store: &Store, tables: &Tables, segments: usize) {
    let rules = Rules::new(ROOT, &[], Duration::from_secs(300), &BTreeMap::new(), &BTreeMap::new());
    let limits = plan::Limits { segments, ..LIMITS };
    refine_all(&mut Refiner::new(store, tables, rules, limits, Metrics::default())).await;
}

/// Every row of gold that does not hang on the time.
pub(crate) async fn gold_rows(tables: &Tables) -> String {
    let hours = ask(tables, "select * from gold.hourly_aggregates order by site, device_id, hour").await;
    let days = ask(tables, "select * from gold.daily_aggregates order by site, device_id, starts_at").await;
    let health = ask(tables, "select * from gold.asset_health order by site, asset_id, hour").await;
    let minutes = ask(tables, "select * from gold.timeseries_1m order by site, device_id, time").await;
    hours + &minutes + &days + &health
}

/// The rows of the first segments of the one writer, wherever they are.
async fn messages(store: &Store, segments: u64) -> Vec<Option<RecordBatch>> {
    let path = |number| SegmentName { hour: now().hour(), writer: Uuid::from_u128(1), number }.path();
    let paths: Vec<String> = (0..segments).map(path).collect();
    Segments::new(store).read(&paths).await.unwrap()
}

pub(super) async fn files(tables: &Tables, table: Table) -> usize {
    tables.snapshot(table).await.unwrap().unwrap().snapshot().unwrap().log_data().num_files()
}

async fn objects(store: &Store) -> Vec<(Path, bytes::Bytes)> {
    let listed: Vec<ObjectMeta> = store.objects().list(None).try_collect().await.unwrap();
    let mut all = Vec::new();
    for object in listed {
        let bytes = store.objects().get(&object.location).await.unwrap().bytes().await.unwrap();
        all.push((object.location, bytes));
    }
    all
}

async fn copy_of(objects: &[(Path, bytes::Bytes)]) -> Arc<dyn ObjectStore> {
    let copy = InMemory::new();
    for (path, bytes) in objects {
        copy.put(path, bytes.clone().into()).await.unwrap();
    }
    Arc::new(copy)
}

fn over(objects: Arc<dyn ObjectStore>) -> Store {
    Store::over(objects, Url::parse("memory:///").unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn hours_are_packed_and_late_segments_too() {
    let store = Store::open("memory:///").unwrap();
    let tables = refined_lake(&store).await;
    let (silver, before) = (everything(&tables).await, messages(&store, 9).await);
    let soon = now() + Duration::from_secs(3600 * 2);
    let done = maintain(&tables, &settings(), &GoldSettings::default(), soon).await;
    assert_eq!((done.packs, done.failed.len()), (0, 0), "the hour has not ended for long enough: {done:?}");
    assert!(done.compacted_tables > 0, "{done:?}");

    let done = maintain(&tables, &settings(), &GoldSettings::default(), late()).await;
    assert_eq!((done.packs, done.packed_segments, done.failed.len()), (1, 9, 0), "{done:?}");
    assert!(done.vacuumed_files > 0 && done.log_entries > 0, "{done:?}");
    let hour = Hour::list(&store, now().hour()).await.unwrap();
    assert_eq!((hour.segments.len(), hour.packs.len()), (0, 1));
    assert_eq!(messages(&store, 9).await, before);
    assert_eq!(everything(&tables).await, silver);
    assert_eq!(files(&tables, Table::SensorReadings).await, 1);
    assert_eq!(
        maintain(&tables, &settings(), &GoldSettings::default(), late()).await,
        Done::default(),
        "nothing is left to do"
    );

    // A pack is bronze to any reader.
    let path = Path::from(hour.packs.keys().next().unwrap().path());
    let bytes = store.objects().get(&path).await.unwrap().bytes().await.unwrap();
    let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap();
    assert_eq!(reader.schema().fields(), cloud_ingest::lake::bronze_schema().fields());
    let rows: usize = before.iter().flatten().map(RecordBatch::num_rows).sum();
    assert_eq!(usize::try_from(reader.metadata().file_metadata().num_rows()).unwrap(), rows);

    // One that is in no plan keeps its hour as it is; then it goes into a pack of its own.
    put(&store, 9, &[readings(40, &[(800, "c", 70.0)])]).await;
    assert_eq!(maintain(&tables, &settings(), &GoldSettings::default(), late()).await.packs, 0);
    refine_with(&store, &tables, 4).await;
    assert_eq!(maintain(&tables, &settings(), &GoldSettings::default(), late()).await.packs, 1);
    let hour = Hour::list(&store, now().hour()).await.unwrap();
    assert_eq!((hour.segments.len(), hour.packs.len()), (0, 2));
    let after = messages(&store, 11).await;
    assert_eq!((&after[..9], after[9].is_some(), &after[10]), (&before[..], true, &None));
}

/// More than one row group, and more than one part of an upload.
#[tokio::test(flavor = "multi_thread")]
async fn large_hours_are_packed_too() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap()).unwrap();
    let tables = Tables::open(&store).await.unwrap();
    let mut state = 1u64;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    for number in 0..9 {
        let payloads = (0..30).map(|_| (0..16_000).flat_map(|_| noise()).collect::<Vec<u8>>());
        let messages: Vec<Message> = payloads.map(|payload| message("elsewhere", payload, None)).collect();
        put(&store, number, &messages).await;
    }
    refine_with(&store, &tables, 1).await;
    let before = messages(&store, 9).await;
    let done = maintain(&tables, &settings(), &GoldSettings::default(), late()).await;
    assert_eq!((done.packs, done.packed_segments, done.failed), (1, 9, vec![]));
    let hour = Hour::list(&store, now().hour()).await.unwrap();
    assert!(hour.packs.values().all(|bytes| *bytes > 32 << 20), "{hour:?}");
    assert_eq!(messages(&store, 9).await, before);
    // Some of them, in another order.
    let path = |number| SegmentName { hour: now().hour(), writer: Uuid::from_u128(1), number }.path();
    let some = Segments::new(&store).read(&[path(7), path(2), path(3)]).await.unwrap();
    assert_eq!(some, [before[7].clone(), before[2].clone(), before[3].clone()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_that_is_not_whole_replaces_nothing() {
    let store = Store::open("memory:///").unwrap();
    let tables = refined_lake(&store).await;
    let all = objects(&store).await;
    assert_eq!(maintain(&tables, &settings(), &GoldSettings::default(), late()).await.packs, 1);
    // Back to before, but for one segment with other rows than the pack's.
    for (path, bytes) in all.iter().filter(|(path, _)| path.as_ref().starts_with("bronze/")) {
        store.objects().put(path, bytes.clone().into()).await.unwrap();
    }
    let name = SegmentName { hour: now().hour(), writer: Uuid::from_u128(1), number: 3 };
    let other = bronze::encode(&bronze::rows(&[message("elsewhere", "!", None)]).unwrap()).unwrap();
    store.objects().put(&Path::from(name.path()), other.into()).await.unwrap();
    let done = maintain(&tables, &settings(), &GoldSettings::default(), late()).await;
    assert!(done.failed.iter().any(|failed| failed.contains("does not hold the rows")), "{done:?}");
    assert_eq!(Hour::list(&store, now().hour()).await.unwrap().segments.len(), 9);
}

/// Cut off at every write; then the next run gets where an undisturbed one does.
#[tokio::test(flavor = "multi_thread")]
async fn upkeep_may_be_killed_at_every_write() {
    let (all, silver, before) = {
        let store = Store::open("memory:///").unwrap();
        let tables = refined_lake(&store).await;
        (objects(&store).await, everything(&tables).await, messages(&store, 9).await)
    };
    for n in 0.. {
        let inner = copy_of(&all).await;
        let power = Power(Arc::new(AtomicI64::new(n)));
        let cut = over(Arc::new(Cut { inner: Arc::clone(&inner), power: power.clone() }));
        if let Ok(tables) = Tables::open(&cut).await {
            let done = maintain(&tables, &settings(), &GoldSettings::default(), late()).await;
            if !power.gone() {
                assert_eq!(done.failed, [""; 0]);
                // A pack, nine segments, and at least a compaction, a vacuum and a log.
                assert!(n > 30, "{n} writes");
                break;
            }
        }
        let store = over(inner);
        assert_eq!(messages(&store, 9).await, before, "cut at {n}");
        let tables = Tables::open(&store).await.unwrap();
        let done = maintain(&tables, &settings(), &GoldSettings::default(), late()).await;
        assert_eq!(done.failed, [""; 0], "cut at {n}");
        assert_eq!(messages(&store, 9).await, before, "cut at {n}, then whole");
        assert_eq!(everything(&tables).await, silver, "cut at {n}, then whole");
        let hour = Hour::list(&store, now().hour()).await.unwrap();
        assert_eq!((hour.segments.len(), hour.packs.len()), (0, 1), "cut at {n}, then whole");
        assert_eq!(files(&tables, Table::SensorReadings).await, 1, "cut at {n}, then whole");
        if n % 8 == 0 {
            let again = maintain(&tables, &settings(), &GoldSettings::default(), late()).await;
            assert_eq!(again, Done::default(), "cut at {n}, whole, and once more");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_leaves_gold_and_what_is_not_refined() {
    let store = Store::open("memory:///").unwrap();
    let tables = refined_lake(&store).await;
    let gold = gold_rows(&tables).await;
    let day = Duration::from_secs(86_400);
    let keep = UpkeepSettings { keep_bronze: day, keep_silver: day, ..settings() };
    let much_later = now() + 10 * day;

    // A segment that nobody has refined stays, whatever its age; so does what gold has not seen.
    put(&store, 9, &[readings(40, &[(800, "c", 70.0)])]).await;
    let done = maintain(&tables, &keep, &GoldSettings::default(), much_later).await;
    assert_eq!((done.expired_objects, done.failed.len()), (9, 0), "{done:?}");
    assert_eq!(Hour::list(&store, now().hour()).await.unwrap().segments.len(), 1);
    assert!(done.expired_files > 0);
    assert!(ask(&tables, "select count(*) n from silver.sensor_readings").await.contains("| 0 |"));
    assert!(!ask(&tables, "select count(*) n from silver.messages").await.contains("| 0 |"));
    let step = gold::step(&tables, &GoldSettings::default(), much_later).await.unwrap();
    assert_eq!((step.windows.hours, gold_rows(&tables).await), (0, gold.clone()));

    // What comes late for an hour that is final changes it no more, and goes again.
    refine_with(&store, &tables, 4).await;
    assert!(ask(&tables, "select count(*) n from silver.sensor_readings").await.contains("| 1 |"));
    gold::step(&tables, &GoldSettings::default(), much_later).await.unwrap();
    assert_eq!(gold_rows(&tables).await, gold);
    let done = maintain(&tables, &keep, &GoldSettings::default(), much_later).await;
    assert_eq!((done.expired_objects, done.expired_files, done.failed.len()), (1, 1, 0), "{done:?}");

    // Readings that are young enough are computed as ever.
    let name = SegmentName { hour: much_later.hour(), writer: Uuid::from_u128(2), number: 0 };
    let json =
        format!(r#"{{"device_id":"j","timestamp":"{much_later}","value":20.5,"device_type":"temperature"}}"#);
    let json = Message { received_at: much_later, ..message("plant/gw/json", json, None) };
    let bytes = bronze::encode(&bronze::rows(&[json]).unwrap()).unwrap();
    bronze::put(store.objects().as_ref(), &name, bytes.into()).await.unwrap();
    refine_with(&store, &tables, 4).await;
    let pending = maintain(
        &tables,
        &UpkeepSettings { keep_silver: day, ..keep },
        &GoldSettings::default(),
        much_later + 5 * day,
    )
    .await;
    assert!(pending.failed.iter().any(|failed| failed.contains("gold has yet to compute")), "{pending:?}");
    let step = gold::step(&tables, &GoldSettings::default(), much_later).await.unwrap();
    assert_eq!(step.windows.hourly, 1, "{step:?}");
    let done = maintain(
        &tables,
        &UpkeepSettings { keep_gold: 2 * day, ..keep },
        &GoldSettings::default(),
        much_later,
    )
    .await;
    assert_eq!(done.failed, [""; 0]);
    assert!(ask(&tables, "select count(*) n from gold.hourly_aggregates").await.contains("| 1 |"));
    assert!(gold::step(&tables, &GoldSettings::default(), much_later).await.unwrap().windows.hours <= 1);
    assert!(ask(&tables, "select count(*) n from gold.hourly_aggregates").await.contains("| 1 |"));
}

/// The issue's figures: `cargo nextest run --workspace --cargo-profile demo --run-ignored only -E 'test(commits_later)' --no-capture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "prints figures"]
async fn a_thousand_commits_later() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap()).unwrap();
    let tables = Tables::open(&store).await.unwrap();
    tables.create_missing().await.unwrap();
    let rules = Rules::new(ROOT, &[], Duration::from_secs(300), &BTreeMap::new(), &BTreeMap::new());
    let limits = plan::Limits { segments: 1, ..LIMITS };
    let mut refiner = Refiner::new(&store, &tables, rules, limits, Metrics::default());
    let mut took = Vec::new();
    for n in 0..1_000u64 {
        let rows: Vec<(u64, &str, f64)> = (0..100).map(|row| (n * 100 + row, "a", 100.0)).collect();
        put(&store, n, &[readings(n, &rows)]).await;
        let began = std::time::Instant::now();
        refiner.step(at(n * 100), false).await.unwrap();
        took.push(began.elapsed().as_secs_f64() * 1_000.0);
    }
    let percentiles = |plans: std::ops::Range<usize>| {
        let mut of = took[plans].to_vec();
        of.sort_by(f64::total_cmp);
        (of[of.len() / 2], of[of.len() * 99 / 100])
    };
    for from in [0, 100, 450, 900] {
        let (p50, p99) = percentiles(from..from + 100);
        println!("plans {from} to {}: p50 {p50:.1} ms, p99 {p99:.1} ms a plan", from + 100);
    }
    let opened = |name: &'static str| {
        let url = store.url().to_string();
        async move {
            let store = Store::open(&url).unwrap();
            let mut times = Vec::new();
            for _ in 0..5 {
                let mut table = store.delta("silver/sensor_readings").unwrap();
                let began = std::time::Instant::now();
                table.load().await.unwrap();
                times.push(began.elapsed().as_secs_f64() * 1_000.0);
            }
            println!("{name}: opening silver/sensor_readings {:.1} ms, first {:.1} ms", times[4], times[0]);
        }
    };
    opened("after 1,000 plans").await;
    let began = std::time::Instant::now();
    let done = maintain(&tables, &settings(), &GoldSettings::default(), late()).await;
    println!("upkeep in {:.1} s: {done}", began.elapsed().as_secs_f64());
    opened("after upkeep").await;
}
