use std::time::Duration;

use super::*;

fn anchor() -> Timestamp {
    "2026-03-01T00:00:00Z".parse().unwrap()
}

/// A plant without noise, whose loop begins at its anchor.
fn quiet() -> Plant {
    let mut layout = Layout::parse(record::PLANT).unwrap();
    layout.cycles.start_s = 0;
    layout.press.temperature.sigma = 0.0;
    layout.press.humidity.sigma = 0.0;
    for channel in &mut layout.channels {
        channel.sigma = 0.0;
    }
    Plant::new(layout, anchor(), 0).unwrap()
}

fn at(minutes: u64) -> Timestamp {
    anchor() + Duration::from_secs(60 * minutes)
}

fn signal(plant: &Plant, device: &str) -> Signal {
    Signal::Channel(plant.layout().channels.iter().position(|channel| channel.device == device).unwrap())
}

#[track_caller]
fn assert_near(got: f64, wanted: f64) {
    assert!((got - wanted).abs() <= 1e-9 * wanted.abs(), "{got} is not {wanted}");
}

#[test]
fn replays_rows_and_interpolates() {
    let plant = quiet();
    let pressure = signal(&plant, "reactor/pressure");
    let d01 = record::column("tep/d01_te.csv", "xmeas_7").unwrap();
    // 60 min into the cycle is row 39 + 20; half a row later lies half-way.
    assert_near(plant.value(pressure, at(60)), d01[59]);
    let half = plant.value(pressure, at(60) + Duration::from_secs(90));
    assert_near(half, (d01[59] + d01[60]) / 2.0);
    // The second cycle replays d02, and after a day the first comes again.
    let d02 = record::column("tep/d02_te.csv", "xmeas_7").unwrap();
    assert_near(plant.value(pressure, at(480 + 60)), d02[59]);
    assert_near(plant.value(pressure, at(1_440 + 60)), d01[59]);
}

#[test]
fn a_cycle_fades_into_the_next() {
    let plant = quiet();
    let pressure = signal(&plant, "reactor/pressure");
    let d01 = record::column("tep/d01_te.csv", "xmeas_7").unwrap();
    let d02 = record::column("tep/d02_te.csv", "xmeas_7").unwrap();
    assert_near(plant.value(pressure, at(480)), d01[199]);
    assert_near(plant.value(pressure, at(480 + 15)), (d01[204] + d02[44]) / 2.0);
    assert_near(plant.value(pressure, at(480 + 30)), d02[49]);
}

#[test]
fn an_analyser_shows_one_analysis_until_the_next() {
    let plant = quiet();
    let product = signal(&plant, "stripper/product-g");
    let d01 = record::column("tep/d01_te.csv", "xmeas_40").unwrap();
    let d02 = record::column("tep/d02_te.csv", "xmeas_40").unwrap();
    // Rows 40, 45, … of the second cycle, which began with row 39, after 480 min; w is 0.1 at row 40.
    assert_near(plant.value(product, at(482)), d01[195]);
    assert_near(plant.value(product, at(483)), 0.9 * d01[200] + 0.1 * d02[40]);
    assert_near(plant.value(product, at(497)), 0.9 * d01[200] + 0.1 * d02[40]);
    assert_near(plant.value(product, at(483 + 60)), d02[60]);

    let noisy = Plant::demo(anchor(), 0).unwrap();
    let values: Vec<f64> = (0..24 * 60).map(|minute| noisy.value(product, at(minute))).collect();
    let changes = values.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert_eq!(changes, 24 * 4, "a new analysis every 15 min, the noise with it");
}

#[test]
fn the_phase_follows_the_loop() {
    let plant = quiet();
    let fault = |name: &str| Phase::Fault(name.to_owned());
    let table = [
        (0, Phase::Recovery),
        (29, Phase::Recovery),
        (30, Phase::Normal),
        (359, Phase::Normal),
        (360, fault("d01")),
        (479, fault("d01")),
        (480, Phase::Recovery),
        (480 + 360, fault("d02")),
        (960 + 360, fault("d06")),
        (1_440, Phase::Recovery),
    ];
    for (minute, wanted) in table {
        assert_eq!(plant.phase(at(minute)), wanted, "minute {minute}");
    }
    assert_eq!(
        Plant::demo(anchor(), 0).unwrap().phase(anchor()),
        Phase::Normal,
        "start_s skips the recovery"
    );
}

#[test]
fn break_and_repair_move_the_loop_without_a_jump() {
    let plant = quiet();
    let feed = signal(&plant, "reactor/a-feed-flow");
    let d06: Vec<f64> =
        record::column("tep/d06_te.csv", "xmeas_1").unwrap().iter().map(|flow| flow * 1e3).collect();
    let before = plant.value(feed, at(100));
    plant.intervene(at(100), &Intervention::Break { fault: "d06".into() }).unwrap();

    assert_near(plant.value(feed, at(100)), before);
    assert_eq!(plant.phase(at(99)), Phase::Normal);
    assert_eq!(plant.phase(at(100)), Phase::Fault("d06".into()));
    assert_near(plant.value(feed, at(103)), d06[160]);
    let broken = plant.value(feed, at(130));
    assert!(broken < 0.1 * before, "the A feed is lost: {broken} of {before}");

    plant.intervene(at(130), &Intervention::Repair).unwrap();
    assert_near(plant.value(feed, at(130)), broken);
    assert_eq!(plant.phase(at(130)), Phase::Recovery);
    let d01: Vec<f64> =
        record::column("tep/d01_te.csv", "xmeas_1").unwrap().iter().map(|flow| flow * 1e3).collect();
    // Row 39 + 10 at the start of the fade, so row 59 at its end.
    assert_near(plant.value(feed, at(160)), d01[59]);
    assert_eq!(plant.phase(at(160)), Phase::Normal);

    assert!(plant.intervene(at(129), &Intervention::Repair).is_err(), "before an earlier one");
    let unknown = plant.intervene(at(200), &Intervention::Break { fault: "d99".into() });
    assert_eq!(unknown.unwrap_err().to_string(), r#"no fault "d99"; there are d01, d02, d06"#);
}

#[test]
fn a_replay_is_the_same_to_the_bit() {
    let [one, other] = [0, 0].map(|gateway| Plant::demo(anchor(), gateway).unwrap());
    let neighbour = Plant::demo(anchor(), 1).unwrap();
    for index in 0..one.layout().channels.len() {
        let signal = Signal::Channel(index);
        let values = |plant: &Plant| [7, 400, 485, 9_999].map(|m| plant.value(signal, at(m)).to_bits());
        assert_eq!(values(&one), values(&other));
        assert_ne!(values(&one), values(&neighbour), "another gateway has noise of its own");
    }
}

#[test]
fn noise_has_the_sigma_of_the_layout() {
    let (noisy, quiet) = (Plant::demo(anchor(), 0).unwrap(), quiet());
    let pressure = signal(&quiet, "reactor/pressure");
    let start = Duration::from_secs(u64::from(noisy.layout().cycles.start_s));
    let squares = (0..10_000u32).map(|n| {
        let t = anchor() + Duration::from_secs(5) * n;
        (noisy.value(pressure, t) - quiet.value(pressure, t + start)).powi(2)
    });
    let sigma = (squares.sum::<f64>() / 1e4).sqrt();
    assert!((sigma / 1.5 - 1.0).abs() < 0.03, "{sigma}");
}

#[test]
fn the_press_is_replayed_round_and_round_in_celsius() {
    let plant = quiet();
    let rows = record::column("nab/machine_temperature.csv", "value").unwrap();
    assert_near(plant.value(Signal::PressTemperature, anchor()), (rows[0] - 32.0) / 1.8);
    let round = at(5 * rows.len() as u64);
    assert_near(plant.value(Signal::PressTemperature, round), (rows[0] - 32.0) / 1.8);
    assert_near(plant.value(Signal::PressHumidity, at(6 * 60)), 50.0);
}

#[test]
fn transmitters_saturate_by_ne_43() {
    let plant = quiet();
    let channel = &plant.layout().channels[0];
    let table = [(0.0, 4.0), (1_200.0, 20.0), (600.0, 12.0), (-1e9, 3.8), (1e9, 20.5)];
    for (value, milliampere) in table {
        assert_near(plant.current(channel, value) * 1e3, milliampere);
    }
}

#[test]
fn a_layout_is_refused_with_its_reason() {
    let check = |from: &str, to: &str, wanted: &str| {
        let error = format!("{:#}", Layout::parse(&record::PLANT.replacen(from, to, 1)).unwrap_err());
        assert!(error.contains(wanted), "{error}");
    };
    check("schema = 1", "schema = 2", "schema = 2 is not 1");
    check("seed = ", "sede = ", "unknown field `sede`");
    check("input = 3", "input = 4", "input = 4 is not 0 to 3");
    check("onset_row = 159", "onset_row = 299", "not in order");
}
