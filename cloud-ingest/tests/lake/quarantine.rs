//! Quarantine after a rule was changed: as if the rule had been so from the start. And soft rules, which only count.

use cloud_ingest::{
    gold::{self, GoldSettings},
    ledger,
    plan::Selection,
    quality::SoftRule,
    quarantine::{self, Done},
    rebuild::{Options, Report, rebuild},
};

use super::{
    arrivals::{arrow, gold_is_not_silver, hours, row, rows_of},
    upkeep::gold_rows,
    *,
};

fn old_rules() -> Rules {
    Rules::new(ROOT, &[], Duration::from_secs(300), &BTreeMap::new(), &BTreeMap::new())
}

/// The kiln is as hot as it says, and the shop floor's devices are listened to.
fn new_rules() -> Rules {
    let source =
        serde_json::json!({ "filter": "shopfloor/#", "site": "plant", "gateway": "floor", "coerce": true });
    let devices = [("kiln".to_owned(), [0.0, 1_500.0])].into();
    let json = [serde_json::from_value(source).unwrap()];
    Rules::new(ROOT, &json, Duration::from_secs(300), &BTreeMap::new(), &devices)
}

/// A message of lane `readings`: (second, device, value in °C).
fn celsius(seq: u64, rows: &[(u64, &'static str, f64)]) -> Message {
    let rows: Vec<_> =
        rows.iter().map(|(s, device, value)| row(device, at(*s).as_micros(), *value)).collect();
    arrow("gw", seq, &rows)
}

pub(crate) fn judge(store: &Store, tables: &Tables) -> Refiner {
    Refiner::new(store, tables, new_rules(), LIMITS, Metrics::default())
}

pub(crate) const ALL: Selection = Selection { rule: None, site: None, device: None };

/// What the old rules hold of it is: of the kiln 4 readings (one of them twice, as another message), 2 of `oven`, and
/// three messages of the shop floor.
pub(crate) async fn held_lake(store: &Store) -> Tables {
    let floor = |text: &str| {
        let message = message("x", text.to_owned(), None);
        Message { origin: Origin::of(ROOT, "shopfloor/7".into()).into(), ..message }
    };
    let one = celsius(0, &[(0, "kiln", 900.0), (0, "a", 20.0), (1, "kiln", 100.0), (1, "oven", 900.0)]);
    let segments = [
        vec![one.clone(), celsius(1, &[(2, "kiln", 950.0), (2, "a", 21.0)])],
        // Delivered again; and a part of it in another message.
        vec![one, celsius(2, &[(0, "kiln", 900.0), (3, "kiln", 990.0), (3, "a", 22.0)])],
        vec![
            floor(r#"{"device_id":"s","timestamp":1772346000,"value":"20.5"}"#),
            floor(
                r#"[{"device_id":"s","timestamp":1772346001,"value":21},{"device_id":"s","timestamp":1772346001,"value":21},
                      {"device_id":"s","timestamp":1772346002,"value":"warm"}]"#,
            ),
            floor("nothing"),
            celsius(3, &[(4, "oven", 910.0), (900, "a", 23.0)]),
        ],
    ];
    for (number, messages) in (0..).zip(segments) {
        put(store, number, &messages).await;
    }
    let tables = Tables::open(store).await.unwrap();
    // Plans of one segment.
    let limits = plan::Limits { segments: 1, ..LIMITS };
    refine_all(&mut Refiner::new(store, &tables, old_rules(), limits, Metrics::default())).await;
    tables
}

async fn replay(store: &Store, tables: &Tables, of: &Selection, now: Timestamp) -> Done {
    quarantine::replay(&mut judge(store, tables), tables, of, &GoldSettings::default(), now).await.unwrap()
}

async fn verified(store: &Store, from: Option<Timestamp>, to: Option<Timestamp>) -> Report {
    let options = Options { verify: true, from, to, into: None };
    rebuild(store, &options, &GoldSettings::default(), now(), |_| {}).await.unwrap()
}

/// Silver as far as it does not say how it came to be.
async fn in_the_end(tables: &Tables) -> String {
    let readings = "select * from silver.sensor_readings order by site, device_id, ts";
    let messages = "select * except (plan) from silver.messages order by segment, lane, seq, redelivered";
    let held = "select * except (resolved_at) from silver.quarantine where resolved_at is null \
                order by segment, \"offset\", \"row\"";
    let mut all = String::new();
    for sql in [readings, messages, held] {
        all += &ask(tables, sql).await;
    }
    all
}

/// What silver holds of [`held_lake`] when nothing fails while it is judged again.
pub(crate) async fn judged_straight() -> String {
    let store = Store::open("memory:///").unwrap();
    let tables = held_lake(&store).await;
    judge(&store, &tables).replay_quarantine(&ALL, now()).await.unwrap();
    everything(&tables).await
}

#[tokio::test(flavor = "multi_thread")]
async fn judged_again_it_is_as_if_the_rules_had_been_so_from_the_start() {
    let later = now() + Duration::from_secs(7_200);
    let store = Store::open("memory:///").unwrap();
    let tables = held_lake(&store).await;
    gold::step(&tables, &GoldSettings::default(), later).await.unwrap();
    let before = hours(&tables).await;
    let held = quarantine::held(&tables, &ALL).await.unwrap();
    assert_eq!(held.readings, 6, "{held}");
    let text = held.to_string();
    for part in [
        "        4  range        plant: kiln, received 2026-03-01T06:30:00Z",
        "900 Cel is not within -100 … 500",
        "to let it pass: [quality.devices] \"kiln\" = [LOW, HIGH]",
        "        0  topic        ?: whole messages",
        "to let it pass: [[json]] filter = ",
        "6 readings in quarantine",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    let rows = rows_of(&tables, "select 1 from silver.quarantine").await.len();

    let done = replay(&store, &tables, &ALL, later).await;
    // The kiln's 4, one of them a duplicate; of the shop floor 3 readings, one a duplicate; its other two are held.
    // Of gold an hour of the kiln and one of the shop floor, and a minute each.
    let expected = Done { plans: vec![4], resolved: 7, held_anew: 2, held: 4, gold: Some(4) };
    assert_eq!(done, expected, "{done}");
    let marked = rows_of(
        &tables,
        "select rule, count(*), sum(readings) from silver.quarantine \
                                   where resolved_at is not null group by rule order by rule",
    )
    .await;
    assert_eq!(marked, [["range", "4", "4"], ["topic", "3", "0"]]);
    let kept = rows_of(&tables, "select 1 from silver.quarantine").await.len();
    assert_eq!(kept, rows + 2, "no row goes");
    let audit = ledger::audit(&tables, now()).await.unwrap();
    assert!(audit.balances(), "{audit}");
    assert_eq!(audit.totals.unnumbered, 5, "{audit}");

    let other = Store::open("memory:///").unwrap();
    let from_the_start = {
        let tables = Tables::open(&other).await.unwrap();
        for number in 0..3 {
            let name = SegmentName { hour: now().hour(), writer: Uuid::from_u128(1), number };
            let path = object_store::path::Path::from(name.path());
            use object_store::ObjectStoreExt;
            let bytes = store.objects().get(&path).await.unwrap().bytes().await.unwrap();
            other.objects().put(&path, bytes.into()).await.unwrap();
        }
        refine_all(&mut judge(&other, &tables)).await;
        in_the_end(&tables).await
    };
    assert_eq!(in_the_end(&tables).await, from_the_start);

    // Gold has changed where it must.
    assert!(gold::step(&tables, &GoldSettings::default(), later).await.unwrap().is_nothing());
    assert_eq!(gold_is_not_silver(&tables).await, Vec::<Vec<String>>::new());
    for (key, (revision, values)) in &hours(&tables).await {
        let device = key.0.as_str();
        match before.get(key) {
            Some((_, known)) if device == "a" => assert_eq!((revision.as_str(), known), ("0", values)),
            Some((_, known)) => assert!(device == "kiln" && revision == "1" && known != values, "{key:?}"),
            None => assert_eq!(device, "s"),
        }
    }
    let report = verified(&store, None, None).await;
    assert_eq!((report.identical, report.plans, report.replayed), (Some(true), 4, 4), "{report}");

    // Once more, and what is held stays as it is.
    let (silver, gold) = (in_the_end(&tables).await, gold_rows(&tables).await);
    let again = replay(&store, &tables, &ALL, later).await;
    assert_eq!(again, Done { plans: vec![5], resolved: 0, held_anew: 0, held: 4, gold: Some(0) });
    assert_eq!((in_the_end(&tables).await, gold_rows(&tables).await), (silver, gold));

    // A refiner goes on behind it, with what it knows.
    put(&store, 9, &[celsius(9, &[(0, "kiln", 900.0), (9, "kiln", 100.0)])]).await;
    let counts = refine_all(&mut judge(&store, &tables)).await;
    assert_eq!((counts.stored, counts.duplicates), (1, 1));
}

#[tokio::test]
async fn only_what_was_selected_is_judged() {
    let store = Store::open("memory:///").unwrap();
    let tables = held_lake(&store).await;
    let of = |rule: Option<&str>, device: Option<&str>| Selection {
        rule: rule.map(str::to_owned),
        site: None,
        device: device.map(str::to_owned),
    };
    for (of, resolved) in [
        (of(Some("finite"), None), 0),
        (of(None, Some("oven")), 0),
        (of(Some("range"), Some("kiln")), 4),
        (of(Some("topic"), None), 3),
    ] {
        let done = replay(&store, &tables, &of, now()).await;
        assert_eq!(done.resolved, resolved, "{of:?}: {done}");
    }
    let marks = rows_of(&tables, "select count(distinct resolved_at) from silver.quarantine").await;
    assert_eq!(marks, [["2"]], "each plan has its own mark, at the same time of day too");
    assert!(ledger::audit(&tables, now()).await.unwrap().balances());
}

#[tokio::test]
async fn any_refiner_finishes_what_another_began() {
    let straight = judged_straight().await;
    for cut in COMMIT_ORDER {
        let store = Store::open("memory:///").unwrap();
        let tables = held_lake(&store).await;
        let mut dying = judge(&store, &tables);
        let died = Arc::new(tokio::sync::Notify::new());
        let dies = Arc::clone(&died);
        dying.before_commit(Arc::new(move |table| {
            if table == cut {
                dies.notify_one();
                anyhow::bail!("the power is gone");
            }
            Ok(())
        }));
        tokio::select! {
            _ = dying.replay_quarantine(&ALL, now()) => {}
            () = died.notified() => {}
        }
        // It has the old rules, and does not need the new ones.
        let tables = Tables::open(&store).await.unwrap();
        refine_all(&mut refiner(&store, &tables)).await;
        assert_eq!(everything(&tables).await, straight, "cut before {}", cut.path());
    }
}

#[tokio::test]
async fn two_that_judge_and_one_that_refines_do_no_harm() {
    let store = Store::open("memory:///").unwrap();
    let tables = held_lake(&store).await;
    put(&store, 3, &[celsius(7, &[(5, "a", 22.0), (6, "kiln", 960.0)])]).await;
    let others = [Tables::open(&store).await.unwrap(), Tables::open(&store).await.unwrap()];
    let (mut a, mut b) = (judge(&store, &tables), judge(&store, &others[0]));
    let mut c = judge(&store, &others[1]);
    let refining = async {
        // Whoever loses begins anew from what the others have done.
        for _ in 0..1_000 {
            if matches!(c.step(now(), true).await, Ok(Outcome::Idle)) {
                break;
            }
        }
    };
    let (a, b, ()) =
        tokio::join!(a.replay_quarantine(&ALL, now()), b.replay_quarantine(&ALL, now()), refining);
    assert!(!a.unwrap().is_empty() && !b.unwrap().is_empty());
    let doubles = "select 1 from silver.sensor_readings group by site, device_id, ts having count(*) > 1";
    assert!(rows_of(&tables, doubles).await.is_empty());
    let kiln = rows_of(&tables, "select ts from silver.sensor_readings where device_id = 'kiln'").await;
    assert_eq!(kiln.len(), 5);
    assert!(ledger::audit(&tables, now()).await.unwrap().balances());
    let (open, counted) = (
        "select sum(readings) from silver.quarantine where resolved_at is null",
        "select sum(quarantined) from silver.messages",
    );
    assert_eq!(rows_of(&tables, open).await, rows_of(&tables, counted).await);
}

/// What bronze no longer holds stays in quarantine, and keeps nothing else from leaving it.
#[tokio::test(flavor = "multi_thread")]
async fn without_bronze_it_stays() {
    use object_store::{ObjectStoreExt, path::Path};
    let store = Store::open("memory:///").unwrap();
    let tables = held_lake(&store).await;
    let gone = SegmentName { hour: now().hour(), writer: Uuid::from_u128(1), number: 0 };
    store.objects().delete(&Path::from(gone.path())).await.unwrap();
    let done = replay(&store, &tables, &ALL, now()).await;
    assert_eq!((done.resolved, done.held), (5, 6), "{done}");
    let report = verified(&store, None, None).await;
    assert_eq!((report.identical, report.missing), (Some(true), 1), "{report}");
}

/// A rebuild of a period in which, before which and after which quarantine was judged again.
#[tokio::test(flavor = "multi_thread")]
async fn periods_are_rebuilt_with_what_was_judged_again() {
    let next = now() + Duration::from_secs(3_600);
    for judged_first in [true, false] {
        let store = Store::open("memory:///").unwrap();
        let tables = held_lake(&store).await;
        if judged_first {
            replay(&store, &tables, &ALL, now()).await;
        }
        let message = Message { received_at: next, ..celsius(7, &[(700, "a", 24.0), (701, "kiln", 970.0)]) };
        let name = SegmentName { hour: next.hour(), writer: Uuid::from_u128(2), number: 0 };
        let bytes = bronze::encode(&bronze::rows(&[message]).unwrap()).unwrap();
        bronze::put(store.objects().as_ref(), &name, bytes.into()).await.unwrap();
        refine_all(&mut refiner(&store, &tables)).await;
        let done = replay(&store, &tables, &ALL, next).await;
        assert_eq!(done.resolved, if judged_first { 1 } else { 8 }, "{done}");
        for (from, to) in [(None, None), (Some(next), None), (None, Some(next))] {
            let report = verified(&store, from, to).await;
            assert_eq!(report.identical, Some(true), "{from:?} to {to:?}: {report}");
            assert!(report.replayed > 0, "{report}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn soft_rules_count_the_same_whoever_counts() {
    let soft = SoftRule { range: Some([0.0, 50.0]), rate: Some(1.0), interval: Duration::from_secs(10) };
    let rules = Rules { soft: [("temperature".to_owned(), soft)].into(), ..old_rules() };
    let sql = "select rule, sum(passed), sum(failed), min(sample) from ops.quality_results \
               where rule like 'soft%' group by rule order by rule";
    let mut counted = Vec::new();
    // Plans of one segment and of all, by one refiner, and by a new one for each plan.
    for (segments, lives) in [(1, 1), (1, 9), (9, 1)] {
        let store = Store::open("memory:///").unwrap();
        let tables = Tables::open(&store).await.unwrap();
        for (number, rows) in (0..).zip([
            &[(0, "a", 20.0), (5, "a", 25.0), (0, "b", 60.0)][..],
            &[(6, "a", 30.0), (30, "a", 30.0), (1, "b", 9_999.0)],
            &[(40, "a", 30.5), (2, "b", 60.5)],
        ]) {
            put(&store, number, &[celsius(number, rows)]).await;
        }
        let limits = plan::Limits { segments, ..LIMITS };
        for _ in 0..lives {
            let mut refiner = Refiner::new(&store, &tables, rules.clone(), limits, Metrics::default());
            let plans = if lives == 1 { 9 } else { 1 };
            for _ in 0..plans {
                refiner.step(now(), true).await.unwrap();
            }
        }
        let stored = rows_of(&tables, "select 1 from silver.sensor_readings").await;
        assert_eq!(stored.len(), 7, "only the hard rule keeps a reading out");
        counted.push(rows_of(&tables, sql).await);
        gold::step(&tables, &GoldSettings::default(), now()).await.unwrap();
        let report = verified(&store, None, None).await;
        assert_eq!(report.identical, Some(true), "{report}");
    }
    let rows: Vec<Vec<&str>> =
        counted[0].iter().map(|row| row.iter().map(String::as_str).collect()).collect();
    assert_eq!(
        rows,
        [
            ["soft_interval", "4", "1", "a: 24 s apart, more than 10s"],
            ["soft_range", "5", "2", "b: 60 is not within 0 … 50"],
            ["soft_rate", "4", "1", "a: from 25 to 30 in 1 s, more than 1 per second"],
        ]
    );
    assert!(
        counted.iter().all(|other| other[0] == counted[0][0] && other[2] == counted[0][2]),
        "{counted:?}"
    );
    assert!(counted.iter().all(|other| other[1][..3] == counted[0][1][..3]), "{counted:?}");
}
