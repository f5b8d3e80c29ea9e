//! What must not cost anything that was accepted, or must at least be declared: kills, damaged files, clones, long
//! outages.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    io::{BufRead, BufReader, Read},
    process::Stdio,
};

use super::{child::again, disk::declared, *};
use crate::delivery::{Delivery, MessageRef, Mode, Rules};

/// splitmix64: the same run for the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

#[test]
fn nothing_that_append_accepted_is_lost_by_kill_9() {
    let dir = quick_dir();
    let small = Limits { generation_bytes: 64 * 1024, ..limits() };
    let mut dice = Dice(1);
    let mut accepted: BTreeMap<Uuid, u64> = BTreeMap::new();
    for round in 0..25 {
        let mut child = again("outbox::tests::faults::appends_until_it_is_killed", dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut text = String::new();
        // Every fifth dies while it starts, the others in the middle of their work, however slow this machine is.
        if round % 5 != 0 {
            let wanted = 1 + dice.below(20) as usize;
            while text.matches("accepted ").count() < wanted && out.read_line(&mut text).unwrap() > 0 {}
        }
        std::thread::sleep(Duration::from_millis(dice.below(60)));
        child.kill().unwrap();
        child.wait().unwrap();
        let mut rest = Vec::new();
        out.read_to_end(&mut rest).unwrap();
        text.push_str(&String::from_utf8_lossy(&rest));
        // The last line may have been cut.
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            // The test's own name stands before the first one.
            let said = line.trim().split_once("accepted ").and_then(|(_, said)| said.split_once(' '));
            if let Some((epoch, n)) = said {
                accepted.insert(epoch.parse().unwrap(), n.parse().unwrap());
            }
        }
        let outbox = Outbox::open(dir.path(), small.clone(), at(1 << 20)).unwrap();
        let mut there: BTreeMap<Uuid, u64> = BTreeMap::new();
        for message in held(&outbox, Lane::Readings) {
            let next = there.entry(message.identity.epoch).or_default();
            assert_eq!(message.identity.seq, *next, "no hole");
            assert_eq!(decode(Lane::Readings, &message.payload).unwrap().num_rows(), 50);
            *next += 1;
        }
        for (epoch, n) in &accepted {
            assert!(
                there.get(epoch) >= Some(n),
                "of {epoch}, {n} were accepted, {:?} are there",
                there.get(epoch)
            );
        }
        let rows = control_rows(&outbox);
        assert!(rows.iter().all(|r| r.0 != "gap"), "{rows:?}");
        assert_eq!(counted(&rows, "sealed"), there.values().map(|n| *n as i64 * 50).sum::<i64>());
        for (epoch, n) in &there {
            let closing =
                rows.iter().find(|r| r.0 == "closing" && r.1 == *epoch && r.2.as_deref() == Some("readings"));
            assert_eq!(closing.and_then(|r| r.4), Some(*n as i64 - 1));
        }
    }
    assert!(accepted.values().sum::<u64>() > 100 && accepted.len() >= 20, "{accepted:?}");
}

#[test]
#[ignore = "is started, and killed, by nothing_that_append_accepted_is_lost_by_kill_9"]
fn appends_until_it_is_killed() {
    let Some(dir) = super::child::dir() else { return };
    let small = Limits { generation_bytes: 64 * 1024, census_every: Duration::from_millis(20), ..limits() };
    let outbox = Outbox::open(&dir, small, at(0)).unwrap();
    for n in 1.. {
        outbox.append(at(n), vec![draft(Lane::Readings, n * 100, 50)], &[("n", vec![n as u8])]).unwrap();
        println!("accepted {} {n}", outbox.epoch());
        if n % 16 == 0 {
            outbox.upkeep(at(n)).unwrap();
        }
    }
}

type Name = (Uuid, Lane, u64);

/// Several generations of two lanes, some messages forgotten: the payloads of all, and the names of those held.
fn sound(dir: &Path) -> (HashMap<Name, bytes::Bytes>, BTreeSet<Name>) {
    let small = Limits { generation_bytes: 40 * 1024, ..limits() };
    let messages = |outbox: &Outbox| {
        let all = [Lane::Readings, Lane::Aggregates].map(|lane| held(outbox, lane));
        let name = |m: &Message| (m.identity.epoch, m.identity.lane, m.identity.seq);
        all.into_iter().flatten().map(|m| (name(&m), m.payload)).collect::<HashMap<_, _>>()
    };
    let mut everything = HashMap::new();
    for run in 0..2 {
        let outbox = Outbox::open(dir, small.clone(), at(run * 1000)).unwrap();
        for i in 0..12 {
            let second = run * 1000 + i * 50;
            let drafts = vec![draft(Lane::Readings, second, 900), draft(Lane::Aggregates, second, 60)];
            outbox.append(at(second), drafts, &[("key", b"value".to_vec())]).unwrap();
        }
        everything.extend(messages(&outbox));
        outbox.forget(Lane::Readings, 1..3).unwrap();
        outbox.forget(Lane::Aggregates, 15..16).unwrap();
        outbox.close(at(run * 1000 + 700)).unwrap();
    }
    let outbox = Outbox::open(dir, small, at(3000)).unwrap();
    outbox.close(at(3001)).unwrap();
    let names: BTreeSet<Name> = messages(&outbox).into_keys().collect();
    assert_eq!((everything.len(), names.len()), (48, 45));
    (everything, names)
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            files(&path, found);
        } else if !path.ends_with("lock") && !path.ends_with("reserve") {
            found.push(path);
        }
    }
}

fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    files(dir, &mut found);
    found.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// Damages one place of a file: a bit, a block of zeroes or of noise, or its end is gone.
fn damage_somewhere(path: &Path, dice: &mut Dice) {
    let mut bytes = fs::read(path).unwrap();
    if bytes.is_empty() {
        return;
    }
    let place = dice.below(bytes.len() as u64) as usize;
    let length = 1 << dice.below(14);
    let end = bytes.len().min(place + length);
    match dice.below(4) {
        0 => bytes[place] ^= 1 << dice.below(8),
        1 => bytes[place..end].fill(0),
        2 => bytes[place..end].iter_mut().for_each(|b| *b = dice.below(256) as u8),
        _ => bytes.truncate(place),
    }
    fs::write(path, bytes).unwrap();
}

#[test]
fn damage_at_random_places_is_set_aside_and_declared() {
    let original = quick_dir();
    let (everything, names) = sound(original.path());
    let mut hits = 0;
    for seed in 0..150 {
        let mut dice = Dice(seed);
        let dir = quick_dir();
        copy_dir(original.path(), dir.path());
        let mut candidates = Vec::new();
        files(dir.path(), &mut candidates);
        // Most of the damage in the databases; now and then in a manifest.
        let of_sled = |path: &&PathBuf| !path.ends_with("manifest.json");
        let databases: Vec<PathBuf> = candidates.iter().filter(of_sled).cloned().collect();
        let mut manifests = 0;
        for _ in 0..=dice.below(3) {
            let any = dice.below(8) == 0;
            let from = if any { &candidates } else { &databases };
            let path = &from[dice.below(from.len() as u64) as usize];
            manifests += usize::from(path.ends_with("manifest.json"));
            damage_somewhere(path, &mut dice);
        }
        let before = contents(dir.path());
        let findings = Inspection::open(dir.path()).unwrap().check().unwrap().findings;
        assert!(contents(dir.path()) == before, "seed {seed}: looking changes nothing");

        let outbox = Outbox::open(dir.path(), limits(), at(5000)).unwrap();
        let mut held_names = BTreeSet::new();
        for lane in [Lane::Readings, Lane::Aggregates] {
            // Until the damage is found, messages beside it are there; what becomes of them is declared then, and the
            // ledger counts those that had gone out as arrived.
            held(&outbox, lane);
            for message in held(&outbox, lane) {
                let name = (message.identity.epoch, lane, message.identity.seq);
                assert!(everything.get(&name) == Some(&message.payload), "seed {seed}: {name:?}");
                assert!(held_names.insert(name), "seed {seed}: {name:?} twice");
            }
        }
        outbox.append(at(5001), vec![draft(Lane::Readings, 9_000, 10)], &[]).unwrap();
        let mut gone = BTreeSet::new();
        for row in control_rows(&outbox).iter().filter(|r| r.0 == "gap" && r.2.as_deref() != Some("control"))
        {
            let lane: Lane = row.2.as_deref().unwrap().parse().unwrap();
            gone.extend((row.3.unwrap()..=row.4.unwrap()).map(|seq| (row.1, lane, seq as u64)));
            assert_eq!(row.6.as_deref(), Some("corrupt"));
        }
        let missing: Vec<_> = names.iter().filter(|n| !held_names.contains(n) && !gone.contains(n)).collect();
        assert!(missing.is_empty(), "seed {seed}: neither held nor declared: {missing:?}; {findings:?}");
        let both: Vec<_> = held_names.intersection(&gone).collect();
        assert!(both.is_empty(), "seed {seed}: held and declared: {both:?}; {findings:?}");
        if findings.is_empty() {
            // What was acknowledged may come again, when the lane no longer knows that it was.
            assert!(names.is_subset(&held_names), "seed {seed}: fsck found nothing");
        }
        if manifests == 0 && findings.is_empty() {
            assert_eq!(outbox.get_meta("key").unwrap().as_deref(), Some(&b"value"[..]), "seed {seed}");
        }
        hits += usize::from(!gone.is_empty());
    }
    assert!(hits > 40, "only {hits} of 150 cost a message: the damage misses");
}

#[test]
fn nothing_lies_in_files_that_nobody_syncs() {
    let dir = quick_dir();
    let large = Limits { generation_bytes: 2 << 20, ..limits() };
    for run in 0..3 {
        let outbox = Outbox::open(dir.path(), large.clone(), at(run * 1000)).unwrap();
        for i in 0..60 {
            // 3, 25 and 120 kB.
            let n = [50, 2000, 9800][i as usize % 3];
            outbox.append(at(i), vec![draft(Lane::Readings, i * 10_000, n)], &[]).unwrap();
            if i % 10 == 9 {
                outbox.upkeep(at(i)).unwrap();
            }
        }
        assert_eq!(held(&outbox, Lane::Readings).len() as i64, 60 * (run + 1));
        let mut found = Vec::new();
        files(dir.path(), &mut found);
        found.retain(|path| path.parent().unwrap().ends_with("blobs"));
        assert!(found.is_empty(), "{found:?}");
    }
}

#[test]
fn what_a_crash_left_behind_does_not_come_back() {
    use crate::outbox::generation::{Batch, Generation, encode_message};
    let dir = quick_dir();
    let commit = |indices: std::ops::Range<u64>, seq: u64| {
        let mut generation = Generation::open(dir.path()).unwrap();
        let mut batch = Batch::default();
        for index in indices {
            let identity = common::wire::Identity {
                v: 1,
                epoch: Uuid::nil(),
                lane: Lane::Readings,
                seq,
                rows: 1,
                rows_before: 0,
                oldest: 0,
                sealed_at: at(0),
                clock: common::wire::ClockState::Synced,
            };
            encode_message(&mut batch, index, &identity, &[7; 20_000]);
        }
        generation.commit(dir.path(), batch).unwrap();
    };
    // Written without the state that makes them count; then their places are taken, in other steps.
    commit(0..30, 1);
    commit(0..5, 2);
    commit(5..21, 2);
    let generation = Generation::open(dir.path()).unwrap();
    for index in 0..21 {
        let message = generation.get(dir.path(), Lane::Readings, index).unwrap().unwrap();
        assert_eq!(message.identity.seq, 2, "message {index}");
    }
    assert_eq!(generation.first(), Some(0));
}

#[test]
fn a_clone_never_reuses_a_name() {
    let (first, second) = (quick_dir(), quick_dir());
    let outbox = Outbox::open(first.path(), limits(), at(0)).unwrap();
    (0..5).for_each(|i| outbox.append(at(i), vec![draft(Lane::Readings, i * 10, 5)], &[]).unwrap());
    copy_dir(first.path(), second.path());
    drop(outbox);
    let all = |dir: &Path| -> HashMap<Name, bytes::Bytes> {
        let outbox = Outbox::open(dir, limits(), at(100)).unwrap();
        (0..9).for_each(|i| outbox.append(at(100 + i), vec![draft(Lane::Readings, i * 7, 3)], &[]).unwrap());
        let messages = Lane::ALL.into_iter().flat_map(|lane| held(&outbox, lane));
        messages.map(|m| ((m.identity.epoch, m.identity.lane, m.identity.seq), m.payload)).collect()
    };
    let (one, other) = (all(first.path()), all(second.path()));
    let shared: Vec<_> = one.keys().filter(|name| other.contains_key(name)).collect();
    assert!(shared.len() >= 5, "both still hold what was sealed before");
    assert!(shared.iter().all(|name| one[name] == other[name]), "under one name there is one content");
    assert!(one.len() - shared.len() >= 9 && other.len() - shared.len() >= 9);
}

#[test]
fn two_processes_cannot_have_it() {
    let dir = quick_dir();
    let outbox = Outbox::open(dir.path(), limits(), at(0)).unwrap();
    let error = Outbox::open(dir.path(), limits(), at(1)).unwrap_err();
    assert!(matches!(error, OutboxError::Locked(_)) && error.to_string().contains("stop that agent first"));
    assert!(matches!(Inspection::open(dir.path()), Err(OutboxError::Locked(_))));
    drop(outbox);
    let inspection = Inspection::open(dir.path()).unwrap();
    assert!(matches!(Outbox::open(dir.path(), limits(), at(1)), Err(OutboxError::Locked(_))));
    drop(inspection);
    Outbox::open(dir.path(), limits(), at(1)).unwrap();
}

#[test]
fn a_manifest_that_cannot_be_read_is_made_again() {
    for which in 0..3 {
        let dir = quick_dir();
        let (_, names) = sound(dir.path());
        let mut manifests = Vec::new();
        files(&dir.path().join("readings"), &mut manifests);
        manifests.retain(|path| path.ends_with("manifest.json"));
        assert!(manifests.len() >= 3);
        let path = &manifests[which * (manifests.len() - 1) / 2];
        fs::write(path, b"{ torn").unwrap();
        let outbox = Outbox::open(dir.path(), limits(), at(5000)).unwrap();
        let left = held(&outbox, Lane::Readings);
        let expected = names.iter().filter(|name| name.1 == Lane::Readings).count();
        assert_eq!(left.len(), expected, "{}", path.display());
        assert_eq!(declared(&outbox), 0);
    }
}

#[test]
fn what_lay_in_a_lost_folder_is_declared_by_its_neighbours() {
    let dir = quick_dir();
    let (_, names) = sound(dir.path());
    let mut folders = numbers_of(dir.path(), Lane::Readings);
    let middle = folders.remove(folders.len() / 2);
    fs::remove_dir_all(dir.path().join(format!("readings/{middle:08}"))).unwrap();
    let outbox = Outbox::open(dir.path(), limits(), at(5000)).unwrap();
    let left = held(&outbox, Lane::Readings);
    let sealed = names.iter().filter(|name| name.1 == Lane::Readings).count() as i64 * 900;
    assert!(declared(&outbox) > 0);
    assert_eq!(left.len() as i64 * 900 + declared(&outbox), sealed);
}

fn numbers_of(dir: &Path, lane: Lane) -> Vec<u64> {
    crate::outbox::lane::numbers(&dir.join(lane.as_str())).unwrap()
}

#[test]
fn what_is_drained_and_idle_is_given_back() {
    let dir = quick_dir();
    let outbox = Outbox::open(dir.path(), limits(), at(0)).unwrap();
    for i in 0..20 {
        outbox.append(at(i), vec![draft(Lane::Readings, i * 2000, 2000)], &[("key", vec![1])]).unwrap();
    }
    let full = outbox.lanes()[Lane::Readings as usize].bytes;
    outbox.forget(Lane::Readings, 0..20).unwrap();
    outbox.upkeep(at(100)).unwrap();
    assert_eq!(outbox.lanes()[Lane::Readings as usize].bytes, full, "not at once: more may come");
    outbox.upkeep(at(1000)).unwrap();
    let left = outbox.lanes()[Lane::Readings as usize].bytes;
    assert!(left * 4 < full, "{left} B of {full} B");
    let numbers = numbers_of(dir.path(), Lane::Readings);
    outbox.upkeep(at(9000)).unwrap();
    assert_eq!(numbers_of(dir.path(), Lane::Readings), numbers, "once");
    drop(outbox);
    let outbox = Outbox::open(dir.path(), limits(), at(9001)).unwrap();
    assert_eq!(outbox.get_meta("key").unwrap(), Some(vec![1]));
}

#[test]
fn an_outage_of_years_does_not_fill_the_control_lane() {
    let dir = quick_dir();
    let often = Limits { census_every: Duration::ZERO, ..limits() };
    let outbox = Outbox::open(dir.path(), often, at(0)).unwrap();
    for i in 0..200 {
        outbox.append(at(i * 60), vec![draft(Lane::Readings, i * 60, 2)], &[]).unwrap();
    }
    let waiting = held(&outbox, Lane::Control).len();
    assert!((64..=70).contains(&waiting), "{waiting}");
    // Once the cloud has caught up, counts come as before, and all of them.
    let mut rows = control_rows(&outbox);
    outbox.forget(Lane::Control, 0..waiting as u64).unwrap();
    outbox.upkeep(at(200 * 60)).unwrap();
    rows.extend(control_rows(&outbox));
    assert_eq!(counted(&rows, "sealed"), 400);
}

#[test]
fn counts_of_a_fast_replay_do_not_pile_up() {
    let dir = quick_dir();
    let outbox = Outbox::open(dir.path(), limits(), at(0)).unwrap();
    for hour in 0..400 {
        outbox.append(at(1), vec![draft(Lane::Readings, hour * 3600, 1)], &[]).unwrap();
    }
    // Every commit writes those that wait; an hour has two, polled and sealed.
    let rows = control_rows(&outbox);
    assert!(counted(&rows, "sealed") >= 400 - 128, "{} of 400", counted(&rows, "sealed"));
}

#[test]
fn an_interruption_covers_what_a_damaged_log_has_cost() {
    let dir = quick_dir();
    let outbox = Outbox::open(dir.path(), limits(), at(0)).unwrap();
    outbox.append(at(10), vec![draft(Lane::Readings, 0, 10)], &[]).unwrap();
    outbox.upkeep(at(20)).unwrap();
    outbox.append(at(110), vec![draft(Lane::Readings, 100, 10)], &[]).unwrap();
    outbox.append(at(200), vec![draft(Lane::Aggregates, 150, 1)], &[]).unwrap();
    drop(outbox);
    let db = dir.path().join("readings/00000001/db");
    fs::write(&db, b"nothing of what was there").unwrap();
    let outbox = Outbox::open(dir.path(), limits(), at(300)).unwrap();
    assert_eq!(declared(&outbox), 10, "what the manifest knew");
    let rows = control_rows(&outbox);
    let interruption = rows.iter().find(|r| r.0 == "interruption").unwrap();
    assert!(interruption.7 <= Some(at(100)), "{interruption:?}");
}

#[test]
fn three_days_without_a_network_on_virtual_time() {
    const MINUTES: i64 = 3 * 24 * 60;
    let dir = quick_dir();
    let limits = Limits { generation_bytes: 1 << 20, ..limits() };
    let outbox = Outbox::open(dir.path(), limits, at(0)).unwrap();
    let rules = Rules {
        mode: Mode::Cloud,
        window: 32,
        unacked: 256,
        backlog_share: 0.5,
        resend_after: Duration::from_secs(60),
        max_resend_after: Duration::from_secs(900),
        heartbeat_for: Duration::from_secs(180),
        seed: 1,
    };
    let mut delivery = Delivery::new(rules, outbox.heads().map(|_| (RangeSet::default(), 0)));
    let seal = |minute: i64, delivery: &mut Delivery| {
        let drafts = vec![draft(Lane::Readings, minute * 60, 60), draft(Lane::Aggregates, minute * 60, 1)];
        outbox.append(at(minute * 60), drafts, &[]).unwrap();
        Lane::ALL.into_iter().zip(outbox.heads()).for_each(|(lane, head)| delivery.appended(lane, head));
    };
    for minute in 0..MINUTES {
        seal(minute, &mut delivery);
        assert_eq!(delivery.next(Duration::from_secs(minute as u64 * 60)), None);
        if minute % 60 == 0 {
            outbox.upkeep(at(minute * 60)).unwrap();
        }
    }
    // The cable is back: 20 messages a second, whose acknowledgements take a second; life goes on.
    let mut now = Duration::from_secs(MINUTES as u64 * 60);
    let mut minute = MINUTES;
    delivery.connected(None);
    let live_from = outbox.heads();
    let (mut at_cloud, mut on_way): (BTreeSet<MessageRef>, Vec<(Duration, MessageRef)>) = Default::default();
    let mut longest_wait = Duration::ZERO;
    let mut published = 0;
    while !delivery.is_drained() || delivery.landed() > 0 {
        now += Duration::from_millis(50);
        delivery.heartbeat(true, now);
        if now.as_secs() as i64 / 60 > minute {
            minute = now.as_secs() as i64 / 60;
            seal(minute, &mut delivery);
        }
        if let Some(message) = delivery.next(now) {
            let page = outbox.page(message.lane, message.index, 1, 1, at(now.as_secs() as i64)).unwrap();
            assert_eq!(page[0].index, message.index);
            // One message a minute in both lanes, at its end, so the index says when it was sealed.
            if message.lane != Lane::Control && message.index >= live_from[message.lane as usize] {
                let waited = now.saturating_sub(Duration::from_secs((message.index + 1) * 60));
                longest_wait = longest_wait.max(waited);
            }
            delivery.published(message);
            published += 1;
            // One at a time here: its packet id is free again.
            delivery.sent(1);
            assert_eq!(delivery.acked(1, now), None);
            assert!(at_cloud.insert(message), "{message:?} was sent twice");
            on_way.push((now + Duration::from_secs(1), message));
        }
        assert!(delivery.landed() <= 256);
        while on_way.first().is_some_and(|(at, _)| *at <= now) {
            let (_, MessageRef { lane, index }) = on_way.remove(0);
            delivery.durable(lane, index..index + 1);
            outbox.forget(lane, index..index + 1).unwrap();
        }
    }
    let heads: u64 = outbox.heads().iter().sum();
    assert_eq!((published, at_cloud.len() as u64), (heads, heads));
    assert!(longest_wait < Duration::from_secs(5), "what is live waits for no backlog: {longest_wait:?}");
    assert!(outbox.lanes().iter().all(|lane| lane.messages == 0));
    outbox.upkeep(at(now.as_secs() as i64 + 600)).unwrap();
    let folders = Lane::ALL.map(|lane| numbers_of(dir.path(), lane).len());
    assert_eq!(folders, [1; 4]);
}
