//! The example for SKAB, on made-up rows in its columns.

use std::fmt::Write as _;

use super::*;

fn settings() -> Settings {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/skab.toml");
    Settings::load(Some(&path)).unwrap()
}

/// Rows a second apart: noise, a flow that drifts by `drift` a second and is `shift` lower from row 700 to 799.
fn record(path: &Path, rows: usize, drift: f64, shift: f64) {
    let mut text = String::from(
        "datetime;Accelerometer1RMS;Accelerometer2RMS;Current;Pressure;Temperature;Thermocouple;Voltage;\
         Volume Flow RateRMS;anomaly;changepoint\n",
    );
    for row in 0..rows {
        let noise = |column: usize| ((row * 12 + column) as f64 * 78.233).sin() * 43_758.545 % 1.0;
        let (hour, minute, second) = (row / 3600, row / 60 % 60, row % 60);
        let at = format!("2020-03-01 {hour:02}:{minute:02}:{second:02}");
        let flow = 76.0 + noise(8) + drift * row as f64 - if (700..800).contains(&row) { shift } else { 0.0 };
        let [a, b, c, d, e, f, g] = [1, 2, 3, 4, 5, 6, 7].map(noise);
        let _ = writeln!(text, "{at};{a};{b};{c};{d};{e};{f};{g};{flow};0.0;0.0");
    }
    std::fs::write(path, text).unwrap();
}

/// (time, anomaly, score) by row.
fn predicted(input: &Path) -> Vec<(String, bool, Option<f64>)> {
    let out = input.with_extension("predicted");
    predict(&settings(), input, &out, Some(600)).unwrap();
    let text = std::fs::read_to_string(out).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("datetime,anomaly,score"));
    let row = |line: &str| {
        let cells: Vec<&str> = line.split(',').collect();
        (cells[0].to_owned(), cells[1] == "1", cells[2].parse().ok())
    };
    lines.map(row).collect()
}

#[test]
fn a_shift_is_found_with_nothing_but_the_past() {
    let home = tempfile::tempdir().unwrap();
    let whole = home.path().join("whole.csv");
    record(&whole, 1_000, 0.0, 5.0);
    let rows = predicted(&whole);
    assert_eq!(rows.len(), 1_000);
    assert_eq!(rows[59].0, "2020-03-01 00:00:59");
    assert!(rows[..600].iter().all(|(_, anomaly, score)| !anomaly && score.is_none()));
    let first = rows.iter().position(|(_, anomaly, _)| *anomaly).unwrap();
    let last = rows.iter().rposition(|(_, anomaly, _)| *anomaly).unwrap();
    assert!((700..712).contains(&first), "{first}");
    // The window empties of it within 10 s, and 20 calm windows clear it.
    assert!((815..835).contains(&last), "{last}");
    assert!(rows[750].2.unwrap() > 1.0 && rows[690].2.unwrap() < 1.0);

    // Cut off anywhere, what stands beside a row is the same.
    for cut in [650, 703, 777] {
        let part = home.path().join("part.csv");
        record(&part, cut, 0.0, 5.0);
        assert_eq!(predicted(&part)[..], rows[..cut]);
    }
}

#[test]
fn a_calibration_is_written_or_refused_with_its_reason() {
    let home = tempfile::tempdir().unwrap();
    let (input, out) = (home.path().join("rows.csv"), home.path().join("calibration.toml"));
    let fit = |rows| calibrate(&settings(), Some("level-shift"), &input, rows, Some(&out));
    record(&input, 650, 0.0, 0.0);
    fit(600).unwrap();
    assert!(std::fs::read_to_string(&out).unwrap().contains("device = \"rig/flow\""));
    std::fs::remove_file(&out).unwrap();
    let error = format!("{:#}", fit(651).unwrap_err());
    assert!(error.contains("has 650 rows, --rows says 651"), "{error}");
    let error = format!("{:#}", calibrate(&settings(), Some("other"), &input, 600, Some(&out)).unwrap_err());
    assert!(error.contains("--model"), "{error}");

    record(&input, 650, 0.01, 0.0);
    let error = format!("{:#}", fit(600).unwrap_err());
    assert!(error.contains("refused") && error.contains("rig/flow still drifts"), "{error}");
    assert!(!out.exists());
    // `try` goes on with it.
    assert_eq!(predicted(&input).len(), 650);
}
