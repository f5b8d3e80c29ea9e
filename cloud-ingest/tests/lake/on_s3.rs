//! The lake on a server that speaks S3, with faults on the way to it: deploy/judges/judge_store.py starts both,
//! says in the environment where they are, and reads the tables afterwards.

use std::collections::BTreeSet;

use cloud_ingest::{
    gold::{self, GoldSettings},
    pack::Hour,
    settings::{Settings, StoreSettings, UpkeepSettings},
    upkeep::{Done, maintain},
};

use futures::TryStreamExt;
use object_store::{ObjectMeta, path::Path};

use super::{
    upkeep::{files, gold_rows, late, refined_lake, settings},
    *,
};

/// Errors in a row after which a test gives up: of those that the judge makes, far fewer come together.
const PATIENCE: usize = 100;

/// Where the lake in `folder` is.
fn settings_of(folder: &str) -> StoreSettings {
    let mut settings = Settings::load(None).unwrap().store;
    settings.url = format!("{}/{folder}", settings.url);
    settings
}

/// A client of its own for the lake in `folder`.
fn open(folder: &str) -> Store {
    Store::configured(&settings_of(folder)).unwrap()
}

/// The same lake by a line without faults.
fn without_faults(folder: &str) -> Store {
    let mut settings = settings_of(folder);
    settings.s3.endpoint = std::env::var("TAILRACE_S3_WITHOUT_FAULTS").unwrap();
    Store::configured(&settings).unwrap()
}

/// What stands in a lake.
async fn look(folder: &str) -> Tables {
    Tables::open(&without_faults(folder)).await.unwrap()
}

/// Repeats `$call` until it succeeds.
macro_rules! insist {
    ($call:expr) => {{
        let mut errors = Vec::new();
        loop {
            match $call {
                Ok(value) => break value,
                Err(e) => errors.push(e.to_string()),
            }
            assert!(errors.len() < PATIENCE, "{errors:#?}");
        }
    }};
}

async fn insist_on_refining(refiner: &mut Refiner) {
    while insist!(refiner.step(now(), true).await) != Outcome::Idle {}
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a server that speaks S3: deploy/test.sh s3"]
async fn one_of_each_on_s3() {
    let store = open("one");
    let tables = insist!(Tables::open(&store).await);
    insist!(tables.create_missing().await);
    for (number, messages) in (0..).zip(segments()) {
        insist!(try_put(&store, 1, number, &messages).await);
    }
    insist_on_refining(&mut refiner(&store, &tables)).await;
    assert_eq!(everything(&look("one").await).await, straight().await);
}

/// The messages of segment `number` of either of two writers, to which the broker has delivered much the same.
fn shared(writer: u128, number: u64) -> Vec<Message> {
    let seqs = (number * 4..number * 4 + 8).filter(|seq| !(seq + writer as u64).is_multiple_of(3));
    let rows = |seq: u64| [(seq * 3, "a", 212.0), (seq * 3 + 1, "a", 50.0), (seq * 3, "b", seq as f64)];
    seqs.map(|seq| readings(seq, &rows(seq))).collect()
}

/// Two writers, and two refiners beside them. Each has its own client, as in two processes.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a server that speaks S3: deploy/test.sh s3"]
async fn two_of_each_on_s3() {
    const SEGMENTS: u64 = 12;
    let write = |writer: u128| async move {
        let store = open("two");
        for number in 0..SEGMENTS {
            insist!(try_put(&store, writer, number, &shared(writer, number)).await);
            // A segment that both put, as after a takeover; only one of them creates it.
            insist!(try_put(&store, 3, number, &shared(1, number)).await);
        }
    };
    let refine = |writers: [Arc<AtomicBool>; 2]| async move {
        let store = open("two");
        let tables = insist!(Tables::open(&store).await);
        // Makes the tables itself: so do both at once.
        let mut refiner = refiner(&store, &tables);
        while !writers.iter().all(|done| done.load(Ordering::Acquire)) {
            insist_on_refining(&mut refiner).await;
        }
        insist_on_refining(&mut refiner).await;
    };
    let done = [1u128, 2].map(|writer| {
        let done = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&done);
        let writing = tokio::spawn(async move {
            write(writer).await;
            told.store(true, Ordering::Release);
        });
        (done, writing)
    });
    let flags = [0, 1].map(|i| Arc::clone(&done[i].0));
    let refining = [tokio::spawn(refine(flags.clone())), tokio::spawn(refine(flags))];
    for (_, writing) in done {
        writing.await.unwrap();
    }
    for refining in refining {
        refining.await.unwrap();
    }

    let alone = Store::open("memory:///").unwrap();
    for number in 0..SEGMENTS {
        for (writer, of) in [(1, 1), (2, 2), (3, 1)] {
            try_put(&alone, writer, number, &shared(of, number)).await.unwrap();
        }
    }
    let memory = Tables::open(&alone).await.unwrap();
    refine_all(&mut refiner(&alone, &memory)).await;
    let tables = look("two").await;
    // Which delivery is the first is for the plans to say; what is stored, and how often, is not.
    for sql in [
        "select site, device_id, ts, value, unit, quality, epoch, seq from silver.sensor_readings \
         order by site, device_id, ts",
        "select count(*) n, sum(readings) r, sum(stored) s, sum(duplicates) d, sum(quarantined) q, \
         sum(cast(redelivered as bigint)) again from silver.messages",
    ] {
        assert_eq!(ask(&tables, sql).await, ask(&memory, sql).await);
    }
}

/// Until there is nothing left to do. What was done is for the lake to say: work whose answer was lost, and a pack that
/// the other was quicker to use, nobody counts.
async fn insist_on_upkeep(settings: &UpkeepSettings, now: Timestamp) {
    let tables = insist!(Tables::open(&open("upkeep")).await);
    let mut failed = Vec::new();
    loop {
        let done = maintain(&tables, settings, &GoldSettings::default(), now).await;
        if done == Done::default() {
            return;
        }
        failed.extend(done.failed);
        assert!(failed.len() < PATIENCE, "{failed:#?}");
    }
}

/// Two at once pack and compact; then one deletes what nobody needs; then retention.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a server that speaks S3: deploy/test.sh s3"]
async fn upkeep_on_s3() {
    let lake = without_faults("upkeep");
    let tables = refined_lake(&lake).await;
    let (silver, gold) = (everything(&tables).await, gold_rows(&tables).await);
    let many = files(&tables, Table::SensorReadings).await;
    let soon = now() + Duration::from_secs(3600 * 4);
    let both = [0, 1].map(|_| tokio::spawn(async move { insist_on_upkeep(&settings(), soon).await }));
    for done in both {
        done.await.unwrap();
    }
    let hour = Hour::list(&lake, now().hour()).await.unwrap();
    assert_eq!((hour.segments.len(), hour.packs.len()), (0, 1), "packs are the same whoever writes them");
    let compacted = look("upkeep").await;
    assert!(files(&compacted, Table::SensorReadings).await < many, "{many} files before");
    assert_eq!(everything(&compacted).await, silver);
    // Beside upkeep gold goes on, so it knows what the log says before that is gone.
    gold::step(&compacted, &GoldSettings::default(), now()).await.unwrap();

    insist_on_upkeep(&settings(), late()).await;
    let log = Path::from("silver/sensor_readings/_delta_log");
    let listed: Vec<ObjectMeta> = lake.objects().list(Some(&log)).try_collect().await.unwrap();
    // A run of which another's commit came after has its checkpoint before that; names are in the order of versions.
    let names: BTreeSet<&str> = listed.iter().filter_map(|object| object.location.filename()).collect();
    let checkpoint = names.iter().rfind(|name| name.contains(".checkpoint."));
    let oldest = names.iter().find(|name| name.ends_with(".json"));
    assert!(
        checkpoint.is_some() && oldest.is_none_or(|oldest| Some(oldest) > checkpoint),
        "{names:?}: log entries before the checkpoint are gone"
    );
    assert_eq!(everything(&look("upkeep").await).await, silver);
    assert_eq!(gold_rows(&look("upkeep").await).await, gold);

    let two_days = Duration::from_secs(2 * 86_400);
    let keep = UpkeepSettings { keep_bronze: two_days, keep_silver: two_days, ..settings() };
    insist_on_upkeep(&keep, late()).await;
    let bronze: Vec<ObjectMeta> =
        lake.objects().list(Some(&Path::from("bronze"))).try_collect().await.unwrap();
    assert!(bronze.is_empty(), "{bronze:?}");
    let left = look("upkeep").await;
    assert!(
        ask(&left, "select count(*) n from silver.sensor_readings").await.contains("| 0 "),
        "readings are gone"
    );
    assert_eq!(gold_rows(&left).await, gold, "gold stays");
}
