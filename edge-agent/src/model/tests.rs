//! The shipped bundles on the gateways that they were made for, their exchange, and bundles that must not be used.

use std::{fs, path::Path};

use common::reading::{Device, DeviceIx, Quality};
use sha2::{Digest, Sha256};

use super::{folder::Folder, *};

const BUDGET: Duration = Duration::from_secs(60);

fn tep() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../firmware-sim/data/models/tep-process")
}

fn level_shift() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/level-shift")
}

fn registry(ids: impl IntoIterator<Item = String>) -> Arc<Registry> {
    let device = |id: String| {
        let asset = id.split('/').next().unwrap().to_owned();
        Device { id, asset, ..Device::default() }
    };
    Arc::new(Registry { assets: Vec::new(), devices: ids.into_iter().map(device).collect() })
}

/// The devices of tep-process.
fn plant() -> Arc<Registry> {
    let manifest: toml::Table = fs::read_to_string(tep().join("model.toml")).unwrap().parse().unwrap();
    registry(manifest["inputs"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()))
}

/// A models' folder with a copy of a bundle.
fn install(bundle: &Path) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy");
    fs::create_dir(&copy).unwrap();
    for name in ["model.onnx", "model.toml", "golden.json"] {
        fs::copy(bundle.join(name), copy.join(name)).unwrap();
    }
    (dir, copy)
}

fn edit(file: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(file).unwrap();
    assert!(text.contains(from), "{from:?} not in {}", file.display());
    fs::write(file, text.replacen(from, to, 1)).unwrap();
}

fn load(dir: &Path, registry: &Arc<Registry>, budget: Duration, purpose: Purpose) -> (Models, Folder) {
    let mut models = Models::new(Arc::clone(registry), Duration::ZERO, budget, purpose);
    let mut folder = Folder::new(dir.to_owned());
    for change in folder.load() {
        models.apply(change);
    }
    (models, folder)
}

fn state_of(models: &Models) -> String {
    models.status()[0].state.clone()
}

fn minute(n: i64) -> Timestamp {
    Timestamp::from_micros(n * 60_000_000)
}

/// The golden vector of tep-process whose name begins so, as readings of a minute.
fn readings(name: &str, at: i64) -> Vec<Reading> {
    let text = fs::read_to_string(tep().join("golden.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let vectors = golden["vectors"].as_array().unwrap();
    let vector = vectors.iter().find(|v| v["name"].as_str().unwrap().starts_with(name)).unwrap();
    let reading = |(ix, value): (usize, &serde_json::Value)| Reading {
        ts: minute(at),
        device: DeviceIx(ix as u32),
        quality: Quality::Good,
        value: value.as_f64().unwrap(),
    };
    vector["features"].as_array().unwrap().iter().enumerate().map(reading).collect()
}

/// One poll a minute.
fn run(models: &mut Models, name: &str, minutes: std::ops::Range<i64>) -> Vec<Event> {
    let metrics = Metrics::default();
    minutes.flat_map(|at| models.push(minute(at), &readings(name, at), &metrics)).collect()
}

#[test]
fn the_shipped_model_raises_on_a_fault_and_goes_on_after_a_restart() {
    let registry = plant();
    let dir = tep().parent().unwrap().to_owned();
    let (mut models, _) = load(&dir, &registry, BUDGET, Purpose::Score);
    assert_eq!(state_of(&models), "active");
    assert_eq!(run(&mut models, "normal, tep/d00.csv", 0..10), []);
    let events = run(&mut models, "d06, 115 min", 10..20);
    let [raised] = &events[..] else { panic!("{events:?}") };
    // Five windows in a row: the fifth ends at minute 15.
    assert_eq!((raised.ended, raised.started_at), (None, minute(15)));
    assert!(raised.place.device.starts_with(&raised.place.asset));
    assert!(models.anomaly() && models.score().unwrap() > 1.0);

    let kept = models.state();
    let (mut restarted, _) = load(&dir, &registry, BUDGET, Purpose::Score);
    assert_eq!(restarted.resume(&kept, minute(20)), []);
    let ended = restarted.stop(&Metrics::default());
    assert_eq!((ended.len(), ended[0].id), (1, raised.id));
    assert_eq!(restarted.state(), b"[]");

    let mut without = Models::new(registry, Duration::ZERO, BUDGET, Purpose::Score);
    let ended = without.resume(&kept, minute(90));
    assert_eq!((ended[0].id, ended[0].ended), (raised.id, Some((minute(90), Ended::Restart))));
}

#[test]
fn a_window_that_lacks_an_input_is_not_scored() {
    let (mut models, _) = load(tep().parent().unwrap(), &plant(), BUDGET, Purpose::Score);
    for at in 0..10 {
        let mut given = readings("d06, 115 min", at);
        given[3].quality = Quality::Bad;
        assert_eq!(models.push(minute(at), &given, &Metrics::default()), []);
    }
    assert_eq!(models.score(), None);
}

/// A copy of the shipped bundle with one file changed: the refusal names what is wrong.
#[test]
fn a_broken_bundle_is_refused_with_its_reason() {
    let registry = plant();
    let check = |file: &str, from: &str, to: &str, expected: &str| {
        let (dir, copy) = install(&tep());
        edit(&copy.join(file), from, to);
        let (models, _) = load(dir.path(), &registry, BUDGET, Purpose::Score);
        let state = state_of(&models);
        assert!(state.contains(expected), "{expected:?} not in {state:?}");
        assert_eq!(models.active().count(), 0);
    };
    check("model.toml", "schema = 2", "schema = 9", "schema = 9");
    check("model.toml", "schema = 2", "schema = 2\nwindow = \"60s\"", "unknown field `window`");
    check("model.toml", "span = \"60s\"", "span = \"61s\"", "span = 61s is not 1 to 3600 times hop = 1min");
    check("model.toml", "reactor/level", "reactor/lovel", "golden.json and model.toml differ");
    check("model.toml", "threshold = 1.0", "state = 3\nthreshold = 1.0", "state = 3 does not suit");
    check("golden.json", "\"score\": 0.", "\"score\": 7.", "golden vector");
    check("golden.json", "{", "", "golden.json");

    let (dir, copy) = install(&tep());
    let onnx = fs::read(copy.join("model.onnx")).unwrap();
    fs::write(copy.join("model.onnx"), &onnx[..100]).unwrap();
    assert!(state_of(&load(dir.path(), &registry, BUDGET, Purpose::Score).0).contains("sha256"));
    let nowhere = load(Path::new("/nowhere/models"), &registry, BUDGET, Purpose::Score).0;
    assert!(state_of(&nowhere).contains("cannot read"));
    let strange = load(tep().parent().unwrap(), &Arc::default(), BUDGET, Purpose::Score).0;
    assert!(state_of(&strange).contains("no [[device]]"));
    let rig = registry_of_rigs();
    let raw = load(level_shift().parent().unwrap(), &rig, BUDGET, Purpose::Score).0;
    assert!(state_of(&raw).contains("not calibrated for machine \"a\""), "{}", state_of(&raw));
}

#[test]
fn no_bytes_make_the_loader_panic() {
    for (bundle, inputs, state) in [(tep(), 24, 0), (level_shift(), 4, 5)] {
        let onnx = fs::read(bundle.join("model.onnx")).unwrap();
        infer::Network::load(&onnx, inputs, state).unwrap();
        for cut in (0..onnx.len()).step_by(97) {
            let mut broken = onnx.clone();
            broken[cut] ^= 0xff;
            let _ = infer::Network::load(&broken, inputs, state);
            let _ = infer::Network::load(&onnx[..cut], inputs, state);
        }
    }
}

/// Writes the network of the bundle in `folder` with its limit four times as high, which halves every score, and makes
/// the rest of the bundle suit it.
fn halve_the_scores(folder: &Path) {
    let mut onnx = fs::read(folder.join("model.onnx")).unwrap();
    // The tensor's name, then raw_data (field 9) of 4 bytes.
    let tag = [b"limit".as_slice(), &[0x4a, 4]].concat();
    let at = onnx.windows(tag.len()).position(|bytes| bytes == tag).unwrap() + tag.len();
    let limit = f32::from_le_bytes(onnx[at..at + 4].try_into().unwrap());
    onnx[at..at + 4].copy_from_slice(&(4.0 * limit).to_le_bytes());
    let before = format!("{:x}", Sha256::digest(fs::read(folder.join("model.onnx")).unwrap()));
    fs::write(folder.join("model.onnx"), &onnx).unwrap();
    edit(&folder.join("model.toml"), &before, &format!("{:x}", Sha256::digest(&onnx)));
    edit(&folder.join("model.toml"), "version = \"1.0.0\"", "version = \"1.1.0\"");
    assert!(format!("{:#}", Bundle::load(folder).unwrap_err()).contains("golden vector"));
    let text = fs::read_to_string(folder.join("golden.json")).unwrap();
    let mut golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    for vector in golden["vectors"].as_array_mut().unwrap() {
        vector["score"] = (vector["score"].as_f64().unwrap() / 2.0).into();
    }
    fs::write(folder.join("golden.json"), golden.to_string()).unwrap();
}

/// Nothing but model.onnx makes the scores; it is exchanged while the agent runs, and what is open then ends.
#[test]
fn another_network_gives_other_scores_without_a_restart() {
    let (dir, copy) = install(&tep());
    let (mut models, mut folder) = load(dir.path(), &plant(), BUDGET, Purpose::Score);
    let raised = run(&mut models, "d06, 115 min", 0..10);
    let (first, sha256) = (models.score().unwrap(), models.status()[0].sha256.clone());

    halve_the_scores(&copy);
    // Seen once, it may still be under way.
    assert!(folder.poll().is_empty());
    let [change] = <[Change; 1]>::try_from(folder.poll()).unwrap();
    let replaced = models.apply(change);
    assert_eq!((replaced.len(), replaced[0].id), (1, raised[0].id));
    assert_eq!(replaced[0].ended, Some((minute(9), Ended::Replaced)));
    assert_eq!(state_of(&models), "active");
    assert_ne!(models.status()[0].sha256, sha256);
    run(&mut models, "d06, 115 min", 10..12);
    assert!((models.score().unwrap() / first - 0.5).abs() < 1e-6);

    // One that cannot be used leaves it in use, and a bundle that is gone is gone.
    fs::write(copy.join("model.onnx"), "no network").unwrap();
    assert!(folder.poll().is_empty());
    for change in folder.poll() {
        models.apply(change);
    }
    assert!(state_of(&models).starts_with("active with version 1.1.0; the bundle in its folder is refused"));
    run(&mut models, "d06, 115 min", 12..14);
    assert!((models.score().unwrap() / first - 0.5).abs() < 1e-6);
    assert!(folder.poll().is_empty());
    fs::remove_dir_all(&copy).unwrap();
    for change in folder.poll() {
        models.apply(change);
    }
    assert!(models.status().is_empty());
    assert_eq!(run(&mut models, "d06, 115 min", 14..20), []);
}

#[test]
fn a_network_that_is_too_slow_is_rolled_back() {
    let (dir, copy) = install(&tep());
    let (mut models, mut folder) = load(dir.path(), &plant(), Duration::ZERO, Purpose::Score);
    let metrics = Metrics::default();
    assert!(models.news(&metrics).is_some() && models.news(&metrics).is_none());
    halve_the_scores(&copy);
    folder.poll();
    for change in folder.poll() {
        models.apply(change);
    }
    let sha256 = models.status()[0].sha256.clone();
    // The fifth window closes with the sixth poll.
    run(&mut models, "d06, 115 min", 0..5);
    assert_eq!(models.status()[0].sha256, sha256);
    run(&mut models, "d06, 115 min", 5..6);
    let status = &models.news(&metrics).unwrap()[0];
    assert_ne!(status.sha256, sha256);
    assert!(status.state.starts_with("active again with version 1.0.0; version 1.1.0"), "{}", status.state);
    assert!(status.state.contains("models.budget"), "{}", status.state);
    // There is nothing before that one.
    run(&mut models, "d06, 115 min", 6..12);
    assert_eq!(models.active().count(), 0);
    assert!(state_of(&models).contains("install another"), "{}", state_of(&models));
}

fn registry_of_rigs() -> Arc<Registry> {
    let of = |rig| ["vibration-1", "vibration-2", "pressure", "flow", "speed"].map(|d| format!("{rig}/{d}"));
    // b lacks an input, so it is no machine.
    registry(of("a").into_iter().chain(of("b").into_iter().skip(1)).chain(of("c")))
}

/// A second of rig a (devices 0 to 4) and rig c (9 to 13): noise, and `shift` in the flow of a.
fn rigs(second: i64, shift: f64, speed: f64) -> (Timestamp, Vec<Reading>) {
    let ts = Timestamp::from_micros(second * 1_000_000);
    let reading = |device: u32| {
        let column = if device < 5 { device } else { device - 9 };
        // Without period, so that no window sees it whole.
        let noise = ((second as f64 * 12.9898 + f64::from(device) * 78.233).sin() * 43_758.545).fract();
        let value = match column {
            4 => speed,
            3 if device == 3 => 100.0 + noise + shift,
            _ => 10.0 * f64::from(column + 1) + noise,
        };
        Reading { ts, device: DeviceIx(device), quality: Quality::Good, value }
    };
    (ts, (0..5).chain(9..14).map(reading).collect())
}

fn drive(models: &mut Models, seconds: std::ops::Range<i64>, shift: f64, speed: f64) -> Vec<Event> {
    let metrics = Metrics::default();
    let step = |second| {
        let (at, readings) = rigs(second, shift, speed);
        models.push(at, &readings, &metrics)
    };
    seconds.flat_map(step).collect()
}

#[test]
fn every_machine_is_calibrated_and_judged_by_itself() {
    let registry = registry_of_rigs();
    let (dir, copy) = install(&level_shift());
    let (mut models, _) = load(dir.path(), &registry, BUDGET, Purpose::Calibrate);
    assert_eq!(drive(&mut models, 0..600, 0.0, 0.0), []);
    let calibrated = models.calibrate().unwrap();
    let [Fitted { model: name, sha256, folder, machines }] = &calibrated[..] else {
        panic!("{calibrated:?}")
    };
    assert_eq!(machines.iter().map(|m| m.machine.as_str()).collect::<Vec<_>>(), ["a", "c"]);
    assert_eq!(machines.iter().flat_map(|m| &m.why).collect::<Vec<_>>(), [""; 0]);
    assert_eq!(machines[0].devices[3], "a/flow");
    assert!((machines[0].calibration.location[3] - 100.0).abs() < 0.2);

    // It goes on scoring, with the windows that it has.
    assert_eq!(drive(&mut models, 600..700, 0.0, 0.0), []);
    let raised = drive(&mut models, 700..760, 5.0, 0.0);
    assert_eq!((raised.len(), raised[0].place.device.as_str()), (1, "a/flow"));
    assert!(raised[0].started_at < Timestamp::from_micros(715_000_000), "{raised:?}");
    let cleared = drive(&mut models, 760..900, 0.0, 0.0);
    assert_eq!((cleared.len(), cleared[0].ended.unwrap().1), (1, Ended::Cleared));

    // Written and read again, by an agent that scores, it gives the same; for another network it is refused.
    let entries: Vec<_> = machines.iter().map(calibrate::Entry::from).collect();
    assert_eq!(*folder, copy);
    calibrate::write(&copy.join(calibrate::FILE), name, sha256, &entries).unwrap();
    let (mut scoring, _) = load(dir.path(), &registry, BUDGET, Purpose::Score);
    assert_eq!(state_of(&scoring), "active");
    assert_eq!(scoring.status()[0].calibration_sha256.len(), 64);
    assert_eq!(drive(&mut scoring, 0..100, 0.0, 0.0), []);
    assert_eq!(drive(&mut scoring, 100..200, 5.0, 0.0).len(), 1);
    // What the network has learnt outlives a restart.
    let kept = scoring.state();
    let (mut restarted, _) = load(dir.path(), &registry, BUDGET, Purpose::Score);
    assert!(restarted.stateful());
    restarted.resume(&kept, Timestamp::default());
    assert_eq!(restarted.state(), kept);

    calibrate::write(&copy.join(calibrate::FILE), name, "0123", &entries).unwrap();
    let (models, _) = load(dir.path(), &registry, BUDGET, Purpose::Score);
    assert!(state_of(&models).contains("made for the model with sha256 0123"), "{}", state_of(&models));
}

#[test]
fn a_slow_drift_is_followed_and_a_calibration_that_drifts_is_refused() {
    let (dir, _) = install(&level_shift());
    let (mut models, _) = load(dir.path(), &registry_of_rigs(), BUDGET, Purpose::Calibrate);
    drive(&mut models, 0..600, 0.0, 0.0);
    models.calibrate().unwrap();
    // Some five spreads in an hour and a half.
    for second in 600..6_000 {
        let events = drive(&mut models, second..second + 1, (second - 600) as f64 / 5_400.0 * 1.5, 0.0);
        assert_eq!(events, [], "at {second} s");
    }

    let (mut models, _) = load(dir.path(), &registry_of_rigs(), BUDGET, Purpose::Calibrate);
    for second in 0..600 {
        drive(&mut models, second..second + 1, second as f64 / 100.0, 0.0);
    }
    let calibrated = models.calibrate().unwrap();
    let why: Vec<_> = calibrated[0].machines.iter().map(|machine| machine.why.join("; ")).collect();
    assert!(why[0].starts_with("a/flow still drifts"), "{why:?}");
    assert_eq!(why[1], "");
}

#[test]
fn a_standing_machine_never_alarms() {
    let (dir, copy) = install(&level_shift());
    let gate = "\nactive_when = { device = \"*/speed\", above = 300.0 }\n\n[calibration]";
    edit(&copy.join("model.toml"), "\n[calibration]", gate);
    let (mut models, _) = load(dir.path(), &registry_of_rigs(), BUDGET, Purpose::Calibrate);
    // Windows in which it stands are no part of the calibration.
    drive(&mut models, 0..50, -90.0, 0.0);
    drive(&mut models, 50..650, 0.0, 1_500.0);
    let calibrated = models.calibrate().unwrap();
    assert_eq!(calibrated[0].machines[0].stretch.len(), 590);
    assert_eq!(drive(&mut models, 650..700, 0.0, 1_500.0), []);
    // It stops, with everything else about it changed, and starts again.
    assert_eq!(drive(&mut models, 700..900, -90.0, 0.0), []);
    assert_eq!(models.score(), None);
    assert_eq!(drive(&mut models, 900..960, 0.0, 1_500.0), []);
    // In trouble, then stopped: the anomaly ends, and not because the machine is well.
    assert_eq!(drive(&mut models, 960..1_000, 9.0, 1_500.0).len(), 1);
    let ended = drive(&mut models, 1_000..1_100, 9.0, 0.0);
    assert_eq!((ended.len(), ended[0].ended.unwrap().1), (1, Ended::Standing));
    // Whether it runs is unknown: as if it stood.
    let metrics = Metrics::default();
    for second in 1_100..1_200 {
        let (at, mut readings) = rigs(second, 9.0, 1_500.0);
        readings.retain(|reading| ![4, 13].contains(&reading.device.0));
        assert_eq!(models.push(at, &readings, &metrics), []);
    }
}

/// Without anybody's help, once it no longer drifts; the file then says what is used.
#[test]
fn the_agent_calibrates_a_model_on_what_it_reads() {
    let (dir, copy) = install(&level_shift());
    let mut models = Models::new(registry_of_rigs(), Duration::ZERO, BUDGET, Purpose::Score);
    models.calibrate_over(Some(Duration::from_secs(300)));
    let mut folder = Folder::new(dir.path().to_owned());
    for change in folder.load() {
        models.apply(change);
    }
    assert!(state_of(&models).starts_with("calibrating"), "{}", state_of(&models));
    for second in 0..400 {
        drive(&mut models, second..second + 1, (400 - second) as f64 / 20.0, 0.0);
    }
    assert!(state_of(&models).contains("a/flow still drifts"), "{}", state_of(&models));
    assert!(!copy.join(calibrate::FILE).exists());
    drive(&mut models, 400..1_100, 0.0, 0.0);
    assert_eq!(state_of(&models), "active");
    assert_eq!(drive(&mut models, 1_100..1_160, 5.0, 0.0).len(), 1);
    // The file is found like any other change.
    assert!(folder.poll().is_empty());
    for change in folder.poll() {
        models.apply(change);
    }
    assert_eq!(models.status()[0].calibration_sha256.len(), 64);
}
