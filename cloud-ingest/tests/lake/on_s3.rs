//! The lake on a server that speaks S3, with faults on the way to it: deploy/judges/judge_store.py starts both,
//! says in the environment where they are, and reads the tables afterwards.

use cloud_ingest::settings::Settings;

use super::*;

/// Errors in a row after which a test gives up: of those that the judge makes, far fewer come together.
const PATIENCE: usize = 100;

/// A client of its own for the lake in `folder`.
fn open(folder: &str) -> Store {
    let mut settings = Settings::load(None).unwrap().store;
    settings.url = format!("{}/{folder}", settings.url);
    Store::configured(&settings).unwrap()
}

/// The same lake by a line without faults, to see what stands in it.
async fn look(folder: &str) -> Tables {
    let mut settings = Settings::load(None).unwrap().store;
    settings.url = format!("{}/{folder}", settings.url);
    settings.s3.endpoint = std::env::var("TAILRACE_S3_WITHOUT_FAULTS").unwrap();
    Tables::open(&Store::configured(&settings).unwrap()).await.unwrap()
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
