//! The shipped bundle on the gateway that it was made for, and bundles that must not be used.

use std::path::PathBuf;

use common::reading::{Device, Quality, Reading};

use super::*;
use crate::window::Stats;

const WIDTH: Duration = Duration::from_secs(60);

fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../firmware-sim/data/models")
}

fn registry() -> Registry {
    let text = fs::read_to_string(shipped().join("tep-process/model.toml")).unwrap();
    let manifest: toml::Table = text.parse().unwrap();
    let device = |id: &toml::Value| {
        let id = id.as_str().unwrap();
        let asset = id.split('/').next().unwrap();
        Device { id: id.into(), asset: asset.into(), ..Device::default() }
    };
    let devices = manifest["inputs"].as_array().unwrap().iter().map(device).collect();
    Registry { assets: Vec::new(), devices }
}

/// The golden vector whose name begins so, as a window that ends at `minute`.
fn window(name: &str, minute: i64) -> Vec<Aggregate> {
    let text = fs::read_to_string(shipped().join("tep-process/golden.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let vectors = golden["vectors"].as_array().unwrap();
    let vector = vectors.iter().find(|v| v["name"].as_str().unwrap().starts_with(name)).unwrap();
    let end = Timestamp::from_micros(minute * 60_000_000);
    let start = end - WIDTH;
    let aggregate = |(ix, value): (usize, &serde_json::Value)| {
        let device = DeviceIx(ix as u32);
        let mut stats = Stats::default();
        stats.push(&Reading { ts: start, device, quality: Quality::Good, value: value.as_f64().unwrap() });
        let (covered_from, covered_to) = (start, end);
        Aggregate { start, end, device, stats, covered_from, covered_to, partial: false, revision: 0 }
    };
    vector["inputs"].as_array().unwrap().iter().enumerate().map(aggregate).collect()
}

#[test]
fn the_shipped_model_raises_on_a_fault_and_goes_on_after_a_restart() {
    let metrics = Metrics::default();
    let mut models = Models::load(Some(&shipped()), &registry(), WIDTH);
    assert_eq!(models.status()[0].state, "active", "{:?}", models.status());
    for minute in 0..10 {
        assert_eq!(models.score(&window("normal, tep/d00.csv", minute), &metrics), []);
    }
    let mut events = Vec::new();
    for minute in 10..20 {
        events.extend(models.score(&window("d06, 115 min", minute), &metrics));
    }
    let [raised] = &events[..] else { panic!("{events:?}") };
    assert_eq!((raised.ended, raised.started_at.as_micros() / 60_000_000), (None, 14));
    assert!(raised.place.device.starts_with(&raised.place.asset));

    let kept = models.state();
    let mut restarted = Models::load(Some(&shipped()), &registry(), WIDTH);
    assert_eq!(restarted.resume(&kept, Timestamp::from_micros(0)), []);
    let ended = restarted.stop(Timestamp::from_micros(i64::MAX));
    assert_eq!((ended.len(), ended[0].id), (1, raised.id));
    assert_eq!(restarted.state(), b"[]");

    let mut without = Models::default();
    let ended = without.resume(&kept, Timestamp::from_micros(i64::MAX));
    assert_eq!((ended[0].id, ended[0].ended.unwrap().1), (raised.id, Ended::Restart));
}

#[test]
fn a_window_that_lacks_an_input_is_not_scored() {
    let mut models = Models::load(Some(&shipped()), &registry(), WIDTH);
    for minute in 0..10 {
        let mut short = window("d06, 115 min", minute);
        short.remove(3);
        assert_eq!(models.score(&short, &Metrics::default()), []);
    }
    for minute in 0..10 {
        let mut partial = window("d06, 115 min", minute);
        partial[0].partial = true;
        assert_eq!(models.score(&partial, &Metrics::default()), []);
    }
}

/// A copy of the shipped bundle with one file changed: the refusal names what is wrong.
#[test]
fn a_broken_bundle_is_refused_with_its_reason() {
    let registry = registry();
    let check = |file: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>, expected: &str| {
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("copy");
        fs::create_dir(&copy).unwrap();
        for name in ["model.onnx", "model.toml", "golden.json"] {
            let bytes = fs::read(shipped().join("tep-process").join(name)).unwrap();
            fs::write(copy.join(name), if name == file { change(bytes) } else { bytes }).unwrap();
        }
        let models = Models::load(Some(folder.path()), &registry, WIDTH);
        let state = &models.status()[0].state;
        assert!(state.contains(expected), "{expected:?} not in {state:?}");
        assert!(models.active.is_empty());
    };
    let replace = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replacen(from, to, 1).into_bytes()
    };
    check("model.onnx", &|bytes| bytes[..100].to_vec(), "sha256");
    check("model.toml", &replace("schema = 1", "schema = 9"), "schema = 9");
    check("model.toml", &replace("\"60s\"", "\"30s\""), "window.width");
    check("model.toml", &replace("reactor/level", "reactor/lovel"), "golden.json and model.toml differ");
    check("golden.json", &replace("\"score\": 0.", "\"score\": 7."), "golden vector");
    check("golden.json", &|_| b"{".to_vec(), "golden.json");

    let missing = Models::load(Some(Path::new("/nowhere/models")), &registry, WIDTH);
    assert!(missing.status()[0].state.contains("cannot read"), "{:?}", missing.status());
    let strange = Models::load(Some(&shipped()), &Registry::default(), WIDTH);
    assert!(strange.status()[0].state.contains("no [[device]]"), "{:?}", strange.status());
}

#[test]
fn no_bytes_make_the_loader_panic() {
    let onnx = fs::read(shipped().join("tep-process/model.onnx")).unwrap();
    for cut in (0..onnx.len()).step_by(97) {
        let mut broken = onnx.clone();
        broken[cut] ^= 0xff;
        let _ = infer::Scorer::load(&broken, 24);
        let _ = infer::Scorer::load(&onnx[..cut], 24);
    }
}
