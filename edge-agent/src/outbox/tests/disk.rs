//! Disks of their own, which only root can make: one that fills up, and one whose power is cut. `deploy/test.sh disk`
//! runs these.

use std::{
    fs,
    io::Write,
    process::{Command, Stdio},
    sync::atomic::AtomicBool,
};

use super::*;

/// Rows of the readings lane that gaps have declared.
pub(super) fn declared(outbox: &Outbox) -> i64 {
    let rows = control_rows(outbox);
    rows.iter().filter(|r| r.0 == "gap" && r.2.as_deref() == Some("readings")).map(|r| r.5).sum()
}

fn rows_held(outbox: &Outbox) -> i64 {
    held(outbox, Lane::Readings).iter().map(|m| m.identity.rows as i64).sum()
}

/// On a small disk of its own: `mount -t tmpfs -o size=64m none DIR`, and `TAILRACE_SMALL_DISK=DIR`.
#[test]
#[ignore = "wants a small disk in TAILRACE_SMALL_DISK"]
fn a_full_disk_costs_the_oldest_readings_and_nothing_else() {
    let disk = PathBuf::from(std::env::var("TAILRACE_SMALL_DISK").expect("a small disk of its own"));
    common::telemetry::init_logs("error");
    let (dir, filler) = (disk.join("outbox"), disk.join("filler"));
    let limits = Limits { generation_bytes: 2 << 20, min_free_disk: 12 << 20, ..limits() };
    let mut sealed = 0;
    let mut next = 0;
    let mut append = |outbox: &Outbox| {
        let appended = outbox.append(at(next), vec![draft(Lane::Readings, next * 2000, 2000)], &[]);
        next += 1;
        sealed += if appended.is_ok() { 2000 } else { 0 };
        (appended, sealed)
    };
    let balance = |outbox: &Outbox, sealed: i64| {
        assert_eq!(rows_held(outbox) + declared(outbox), sealed);
    };

    // Its own data fill it.
    let outbox = Outbox::open(&dir, limits.clone(), at(0)).unwrap();
    outbox.append(at(0), vec![draft(Lane::Anomalies, 0, 3)], &[]).unwrap();
    for _ in 0..6000 {
        append(&outbox).0.unwrap();
    }
    let (appended, sealed) = append(&outbox);
    appended.unwrap();
    balance(&outbox, sealed);
    assert!(declared(&outbox) > 0 && rows_held(&outbox) > 0);
    assert_eq!(held(&outbox, Lane::Anomalies).len(), 1, "other lanes give way later");
    let free = || fs2::available_space(&disk).unwrap();
    assert!(free() >= 8 << 20, "{} B are free", free());

    // Somebody else fills it to the last byte.
    let fill = |until: &dyn Fn() -> bool| {
        let mut file = fs::OpenOptions::new().create(true).append(true).open(&filler).unwrap();
        while !until() && file.write_all(&[0; 64 * 1024]).is_ok() {}
    };
    let mut appends = 0;
    let sealed = loop {
        fill(&|| false);
        match append(&outbox) {
            (Ok(()), _) => appends += 1,
            (Err(OutboxError::Full { .. }), sealed) => break sealed,
            (Err(e), _) => panic!("after {appends} appends on a full disk: {e}"),
        }
    };
    assert!((2..20).contains(&appends), "{appends}: not everything gives way at once");
    outbox.upkeep(at(1 << 20)).unwrap();
    balance(&outbox, sealed);
    drop(outbox);

    // A restart on the full disk has the reserve to write with.
    let outbox = Outbox::open(&dir, limits.clone(), at(1 << 20)).unwrap();
    assert!(matches!(append(&outbox).0, Err(OutboxError::Full { .. })));
    balance(&outbox, sealed);

    // There is room again.
    fs::remove_file(&filler).unwrap();
    let (appended, sealed) = append(&outbox);
    appended.unwrap();
    balance(&outbox, sealed);
    drop(outbox);

    // A disk that fills up and empties at any moment: errors are allowed, and a start after each; losses are not.
    let stop = AtomicBool::new(false);
    let mut failures = 0;
    let accepted = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                fill(&|| stop.load(Ordering::Relaxed));
                std::thread::sleep(Duration::from_millis(3));
                let _ = fs::remove_file(&filler);
            }
        });
        let mut accepted = sealed;
        for _ in 0..60 {
            let Ok(outbox) = Outbox::open(&dir, limits.clone(), at(1 << 21)) else {
                failures += 1;
                continue;
            };
            for _ in 0..40 {
                let (appended, sealed) = append(&outbox);
                accepted = sealed;
                if appended.is_err() {
                    failures += 1;
                    break;
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        accepted
    });
    let _ = fs::remove_file(&filler);
    let outbox = Outbox::open(&dir, limits, at(1 << 22)).unwrap();
    // What was refused may have come to stand all the same; what was accepted must.
    let there = rows_held(&outbox) + declared(&outbox);
    let quarantine: Vec<_> =
        fs::read_dir(dir.join("quarantine")).into_iter().flatten().map(|e| e.unwrap().path()).collect();
    assert!(there >= accepted, "{accepted} rows were accepted, {there} are there; {quarantine:?}");
    eprintln!("{failures} refusals, {accepted} rows accepted, {} declared", declared(&outbox));
}

fn sh(program: &str, arguments: &[&Path]) {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A file system in a file, mounted until it is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn at(image: &Path, folder: PathBuf) -> Self {
        fs::create_dir_all(&folder).unwrap();
        sh("mount", &[Path::new("-o"), Path::new("loop"), image, &folder]);
        Self(folder)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// The image of a mounted disk has what was synced and nothing that only the page cache knows: a copy of it is the
/// disk after a power cut.
#[test]
#[ignore = "mounts file systems, as root"]
fn a_power_cut_costs_nothing_that_was_accepted() {
    let home = TempDir::new().unwrap();
    let (image, copy) = (home.path().join("image"), home.path().join("copy"));
    fs::File::create(&image).unwrap().set_len(96 << 20).unwrap();
    sh("mkfs.ext4", &[Path::new("-q"), &image]);
    let disk = Mounted::at(&image, home.path().join("disk"));
    let dir = disk.0.join("outbox");
    let small = Limits { generation_bytes: 1 << 20, ..limits() };
    let outbox = Outbox::open(&dir, small.clone(), at(0)).unwrap();
    for i in 0..120 {
        let drafts = vec![draft(Lane::Readings, i * 2000, 2000), draft(Lane::Aggregates, i * 2000, 20)];
        outbox.append(at(i), drafts, &[("i", i.to_string().into_bytes())]).unwrap();
        if i % 30 == 20 {
            outbox.upkeep(at(i)).unwrap();
        }
        if i % 8 != 7 {
            continue;
        }
        fs::copy(&image, &copy).unwrap();
        let after = Mounted::at(&copy, home.path().join("after"));
        let survivor = Outbox::open(&after.0.join("outbox"), small.clone(), at(9000)).unwrap();
        for lane in [Lane::Readings, Lane::Aggregates] {
            let there: Vec<u64> = held(&survivor, lane).iter().map(|m| m.identity.seq).collect();
            assert_eq!(there, (0..=i as u64).collect::<Vec<_>>(), "{lane} after {i}");
        }
        assert_eq!(survivor.get_meta("i").unwrap(), Some(i.to_string().into_bytes()));
        let rows = control_rows(&survivor);
        assert_eq!(counted(&rows, "sealed"), (i + 1) * 2000);
        assert!(rows.iter().all(|r| r.0 != "gap"), "{rows:?}");
        drop(survivor);
    }
    drop(outbox);
}
