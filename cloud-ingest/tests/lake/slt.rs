//! The files of `slt/`: every table of gold against SQL over silver, on a lake that the refiner made of messages.
//!
//! A file holds records with empty lines between: `query`, with the name of what it shows, SQL, `----`, and the rows
//! that are expected, values with a space between; none when SQL looks for what is wrong. Lines with `#` are comments.

use arrow::{
    array::{Array, StringArray},
    util::display::array_value_to_string,
};
use cloud_ingest::gold::{self, Calendars, GoldSettings, calendar::SiteSettings};
use common::config::Mistakes;

use super::*;

/// An hour before the clocks are put forward in Vienna, a day of 23 hours.
const FROM: &str = "2026-03-28T21:10:00Z";
const HOURS: i64 = 30;

/// (second since FROM, device, kind, value, quality)
type Row = (i64, &'static str, &'static str, Option<f64>, u8);

fn instant(second: i64) -> i64 {
    FROM.parse::<Timestamp>().unwrap().as_micros() + second * 1_000_000
}

/// What looks random and is not, below `below`.
fn mixed(n: i64, below: u64) -> u64 {
    (n.unsigned_abs().wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 17) % below
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let quality = |n| [0, 0, 0, 0, 0, 0, 0, 1, 2, 0][usize::try_from(mixed(n, 10)).unwrap()];
    let value = |n, value: f64| (quality(n) != 2).then_some(value);
    for n in 0..HOURS * 3_600 / 20 {
        rows.push((n * 20, "fast", "gauge", value(n, 20.0 + mixed(n * 7, 1_000) as f64 / 64.0), quality(n)));
    }
    // Longer than values hold, and with a gap of some hours.
    for n in (0..80).filter(|n| !(20..33).contains(n)) {
        let at = n * 1_307 + n * n % 50;
        rows.push((at, "slow", "gauge", value(n, mixed(n, 90) as f64), quality(n)));
    }
    for n in 0..HOURS * 6 {
        // Rises, and is reset now and then.
        let count = (n % 70) as f64 * 3.0;
        rows.push((n * 600 + 7, "meter", "counter", Some(count), 0));
        rows.push((n * 600 + 11, "valve", "state", value(n, mixed(n, 3) as f64), quality(n)));
    }
    rows
}

fn words(words: impl Iterator<Item = &'static str>) -> ArrayRef {
    Arc::new(words.collect::<DictionaryArray<Int32Type>>())
}

fn encoded(site: &str, lane: Lane, seq: u64, columns: Vec<ArrayRef>) -> Message {
    let batch = RecordBatch::try_new(wire::schema(lane), columns).unwrap();
    let rows = batch.num_rows() as u64;
    let epoch = Uuid::from_u128(site.len() as u128);
    let received_at = "2026-04-01T00:00:00Z".parse().unwrap();
    let (clock, sealed_at) = (ClockState::Synced, received_at);
    let identity = Identity { v: 1, epoch, lane, seq, rows, rows_before: 0, oldest: 0, sealed_at, clock };
    let payload = wire::encode(&batch, &identity).unwrap();
    Message { received_at, ..message(&format!("{site}/gw/{lane}"), payload, Some(identity)) }
}

fn of_readings(site: &str, seq: u64, rows: &[Row]) -> Message {
    let times = TimestampMicrosecondArray::from_iter_values(rows.iter().map(|r| instant(r.0)));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(times.with_timezone("UTC")),
        words(rows.iter().map(|r| r.1)),
        words(rows.iter().map(|_| "temperature")),
        words(rows.iter().map(|r| if r.1 == "slow" { "pump" } else { "fan" })),
        words(rows.iter().map(|_| "Cel")),
        words(rows.iter().map(|r| r.2)),
        Arc::new(rows.iter().map(|r| r.3).collect::<Float64Array>()),
        Arc::new(UInt8Array::from_iter_values(rows.iter().map(|r| r.4))),
    ];
    encoded(site, Lane::Readings, seq, columns)
}

/// (event, asset, device, severity, score, start, end)
type Event = (&'static str, &'static str, &'static str, &'static str, f64, i64, Option<i64>);

fn of_events(site: &str, seq: u64, events: &[Event]) -> Message {
    let instants = |of: &dyn Fn(&Event) -> Option<i64>| -> ArrayRef {
        let micros = events.iter().map(|e| of(e).map(instant));
        Arc::new(micros.collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
    };
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(events.iter().map(|e| e.0))),
        words(events.iter().map(|e| if e.6.is_some() { "cleared" } else { "raised" })),
        words(events.iter().map(|e| e.1)),
        words(events.iter().map(|e| e.2)),
        words(events.iter().map(|_| "model")),
        words(events.iter().map(|_| "sha")),
        words(events.iter().map(|e| e.3)),
        Arc::new(Float64Array::from_iter_values(events.iter().map(|e| e.4))),
        Arc::new(Float64Array::from_iter_values(events.iter().map(|_| 1.0))),
        instants(&|e| Some(e.5)),
        instants(&|e| e.6),
        Arc::new(StringArray::from_iter(events.iter().map(|e| e.6.map(|_| "cleared")))),
    ];
    encoded(site, Lane::Anomalies, seq, columns)
}

/// The events as they are raised, and as they end, if they do.
const EVENTS: [[Event; 5]; 2] = [
    [
        ("e1", "fan", "fast", "warning", 1.5, 5_000, None),
        ("e2", "fan", "meter", "critical", 4.0, 6_000, None),
        ("e3", "pump", "slow", "warning", 1.2, 30_000, None),
        ("e4", "fan", "fast", "warning", 1.1, 90_000, None),
        ("e5", "pump", "slow", "critical", 9.0, 100_000, None),
    ],
    [
        ("e1", "fan", "fast", "warning", 3.0, 5_000, Some(16_000)),
        ("e2", "fan", "meter", "warning", 0.5, 6_000, Some(8_500)),
        ("e3", "pump", "slow", "warning", 1.2, 30_000, Some(60_000)),
        ("e1", "fan", "fast", "warning", 1.5, 5_000, None),
        ("e2", "fan", "meter", "critical", 4.0, 6_000, None),
    ],
];

/// Two sites; a part of the rows comes late, with a step of gold before; some come twice, and some cannot be used.
async fn lake() -> Tables {
    let store = Store::open("memory:///").unwrap();
    let tables = Tables::open(&store).await.unwrap();
    let shifts = [("early", "06:30"), ("late", "14:00"), ("night", "22:15")];
    let shifts = shifts.map(|(name, start)| (name.to_owned(), start.to_owned())).into();
    let plant = SiteSettings { time_zone: "Europe/Vienna".into(), shifts };
    let calendars = Calendars::parse(&[("plant".to_owned(), plant)].into(), &mut Mistakes::default());
    let settings = GoldSettings { calendars: Arc::new(calendars), ..GoldSettings::default() };
    let rows = rows();
    let late = |row: &Row| mixed(row.0, 17) == 0 || (40_000..43_000).contains(&row.0);
    let (late, timely): (Vec<Row>, Vec<Row>) = rows.iter().partition(|row| late(row));
    let unusable = [(50, "fast", "gauge", Some(9_999.0), 0), (60, "fast", "gauge", None, 0)];
    let last = "2026-04-02T00:00:00Z".parse().unwrap();
    for (n, (rows, events)) in (0..).zip([timely, late].iter().zip(EVENTS)) {
        let mut messages = Vec::new();
        for site in ["plant", "mill"] {
            let of = |rows: &[Row], seq: u64| of_readings(site, 100 * n + seq, rows);
            messages.extend((0..).zip(rows.chunks(700)).map(|(seq, rows)| of(rows, seq)));
            // The same readings under another name, and a message that is delivered again.
            messages.push(of(&rows[10..50], 90));
            messages.push(messages[messages.len() / 2].clone());
            messages.push(of(&unusable, 91));
        }
        messages.push(of_events("plant", n, &events));
        put(&store, n, &messages).await;
        refine_all(&mut refiner(&store, &tables)).await;
        gold::step(&tables, &settings, last).await.unwrap();
    }
    assert!(gold::step(&tables, &settings, last).await.unwrap().is_nothing());
    tables
}

/// The rows of an answer, values with a space between.
async fn answer(tables: &Tables, sql: &str) -> Result<Vec<String>, String> {
    let session = tables.session().await.unwrap();
    let found = session.sql(sql).await.map_err(|e| e.to_string())?;
    let mut lines = Vec::new();
    for batch in found.collect().await.map_err(|e| e.to_string())? {
        for row in 0..batch.num_rows() {
            let values = batch.columns().iter().map(|column| {
                let text = || array_value_to_string(column, row).unwrap();
                if column.is_null(row) { "NULL".to_owned() } else { text() }
            });
            lines.push(values.collect::<Vec<_>>().join(" "));
        }
    }
    Ok(lines)
}

#[tokio::test(flavor = "multi_thread")]
async fn gold_is_what_sql_says_of_silver() {
    let tables = lake().await;
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lake/slt");
    let (mut files, mut wrong) = (0, String::new());
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let mut records = 0;
        for record in lines.collect::<Vec<_>>().split(|line| line.trim().is_empty()).filter(|r| !r.is_empty())
        {
            let name = record[0].strip_prefix("query ").expect("a record begins with query");
            let end = record.iter().position(|line| *line == "----").expect("rows come after ----");
            let (sql, expected) = (record[1..end].join("\n"), &record[end + 1..]);
            let found = answer(&tables, &sql).await;
            if found.as_ref().is_ok_and(|found| found == expected) {
                records += 1;
            } else {
                let found = found.map(|lines| lines.iter().take(10).cloned().collect::<Vec<_>>().join("\n"));
                wrong += &format!("\n{}: {name}\nexpected {expected:#?}\nfound {found:#?}\n", path.display());
            }
        }
        assert!(records > 0 || !wrong.is_empty(), "{} holds nothing", path.display());
        files += 1;
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert_eq!(files, 5);
}
