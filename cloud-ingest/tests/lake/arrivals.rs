//! Readings that should not be, or not now, or not again: where each lands, and what gold makes of it.

use std::collections::BTreeSet;

use arrow::{
    array::{Array, AsArray},
    datatypes::{Field, Schema},
    ipc::writer::StreamWriter,
    util::display::array_value_to_string,
};
use cloud_ingest::{
    gold::{self, GoldSettings},
    ledger,
    rebuild::{Options, rebuild},
};

use super::{upkeep::gold_rows, *};

const MINUTE: i64 = 60;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;
const MONTH: i64 = 31 * DAY;

/// Where a reading lands.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lands {
    /// With this value in °C.
    Silver(Option<f64>),
    Duplicate,
    /// By this rule, with these words in its reason.
    Quarantine(&'static str, &'static str),
}
use Lands::{Duplicate, Quarantine, Silver};

/// One reading, told apart from the others by its device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    device: Option<&'static str>,
    /// µs since 1970.
    ts: i64,
    value: Option<f64>,
    unit: &'static str,
    quality: u8,
}

/// Seconds from the moment of reception.
fn then(seconds: i64) -> i64 {
    now().as_micros() + seconds * 1_000_000
}

pub(crate) const fn row(device: &'static str, ts: i64, value: f64) -> Row {
    Row { device: Some(device), ts, value: Some(value), unit: "Cel", quality: 0 }
}

/// Every device has readings of 20 °C at these times, in seconds before the others are received.
const BEFORE: [i64; 4] = [MONTH, DAY, HOUR, 10 * MINUTE];

fn matrix() -> Vec<(Row, Lands)> {
    let ago = |device, seconds: i64, value| row(device, then(-seconds), value);
    let at_10 = |device| ago(device, 10 * MINUTE, 20.0);
    let new = |device| ago(device, 5 * MINUTE, 20.0);
    vec![
        (ago("on time", 1, 21.0), Silver(Some(21.0))),
        (ago("late by a minute", MINUTE, 22.0), Silver(Some(22.0))),
        (ago("late by an hour", HOUR + 1, 23.0), Silver(Some(23.0))),
        (ago("late by a day", DAY + 1, 24.0), Silver(Some(24.0))),
        (ago("late by a month", MONTH + 1, 25.0), Silver(Some(25.0))),
        (ago("fast by a minute", -MINUTE, 26.0), Silver(Some(26.0))),
        (ago("fast by six minutes", -6 * MINUTE, 20.0), Quarantine("future", "was received at")),
        (ago("fast by a day", -DAY, 20.0), Quarantine("future", "2026-03-02T06:30:00Z was received")),
        (row("of the year 5000", 95_617_584_000_000_000, 20.0), Quarantine("future", "5000-01-01")),
        (row("of 1970", 600_000_000, 20.0), Quarantine("past", "lies before 2015-01-01")),
        (row("of 2014", 1_400_000_000_000_000, 20.0), Quarantine("past", "2014-05-13")),
        (at_10("again"), Duplicate),
        (ago("again after a month", MONTH, 20.0), Duplicate),
        (ago("another value", 10 * MINUTE, 20.5), Quarantine("conflict", "20 Cel good is stored")),
        (ago("another value of a month ago", MONTH, 20.5), Quarantine("conflict", "20 Cel good is stored")),
        (Row { quality: 1, ..at_10("another quality") }, Quarantine("conflict", "20 Cel good is stored")),
        (Row { value: Some(f64::NAN), ..new("NaN") }, Quarantine("finite", "NaN is not a finite number")),
        (Row { value: Some(f64::INFINITY), ..new("infinite") }, Quarantine("finite", "inf is not a finite")),
        (Row { value: Some(f64::NAN), quality: 2, ..new("NaN, bad") }, Quarantine("finite", "NaN")),
        (ago("out of range", MINUTE, 500.5), Quarantine("range", "500.5 Cel is not within -100 … 500")),
        (ago("at the limit", MINUTE, 500.0), Silver(Some(500.0))),
        (Row { value: Some(212.0), unit: "[degF]", ..new("degF") }, Silver(Some(100.0))),
        (Row { unit: "bar", ..new("bar") }, Quarantine("unit", "\"bar\" does not convert into \"Cel\"")),
        (Row { value: None, ..new("null") }, Quarantine("null", "no value")),
        (Row { value: None, quality: 2, ..new("null, bad") }, Silver(None)),
        (Row { quality: 3, ..new("no such quality") }, Quarantine("quality", "is none of")),
        (Row { device: None, ..new("") }, Quarantine("device_id", "names no device")),
        (Row { device: Some(""), ..new("") }, Quarantine("device_id", "names no device")),
    ]
}

/// As a message of a gateway, whose sender writes null where there is nothing.
pub(crate) fn arrow(gateway: &str, seq: u64, rows: &[Row]) -> Message {
    let identity = Identity { rows: rows.len() as u64, ..*readings(seq, &[]).identity.unwrap() };
    let word = |word: &'static str| -> ArrayRef {
        Arc::new(rows.iter().map(|_| word).collect::<DictionaryArray<Int32Type>>())
    };
    let columns: Vec<ArrayRef> = vec![
        Arc::new(TimestampMicrosecondArray::from_iter_values(rows.iter().map(|r| r.ts)).with_timezone("UTC")),
        Arc::new(rows.iter().map(|r| r.device).collect::<DictionaryArray<Int32Type>>()),
        word("temperature"),
        word("pump-01"),
        Arc::new(rows.iter().map(|r| r.unit).collect::<DictionaryArray<Int32Type>>()),
        word("gauge"),
        Arc::new(rows.iter().map(|r| r.value).collect::<Float64Array>()),
        Arc::new(UInt8Array::from_iter_values(rows.iter().map(|r| r.quality))),
    ];
    let fields = wire::schema(Lane::Readings);
    let fields: Vec<Field> = fields.fields().iter().map(|f| f.as_ref().clone().with_nullable(true)).collect();
    let schema = Arc::new(Schema::new(fields));
    let mut writer = StreamWriter::try_new(Vec::new(), &schema).unwrap();
    writer.write(&RecordBatch::try_new(schema, columns).unwrap()).unwrap();
    let payload = writer.into_inner().unwrap();
    message(&format!("plant/{gateway}/readings"), payload, Some(identity))
}

/// As other people's devices send it.
fn json(gateway: &str, rows: &[Row]) -> Message {
    let number = |value: f64| match value {
        v if v.is_nan() => "NaN".to_owned(),
        v if v.is_infinite() => "Infinity".to_owned(),
        v => v.to_string(),
    };
    let objects: Vec<String> = rows
        .iter()
        .map(|r| {
            let device = r.device.map_or("null".to_owned(), |device| format!("{device:?}"));
            let value = r.value.map_or("null".to_owned(), number);
            format!(
                r#"{{"device_id":{device},"timestamp":{},"value":{value},"unit":"{}","quality":{},"device_type":"temperature"}}"#,
                r.ts, r.unit, r.quality
            )
        })
        .collect();
    message(&format!("plant/{gateway}/json"), format!("[{}]", objects.join(",")), None)
}

/// Column by column as text, without those left out.
pub(crate) async fn rows_of(tables: &Tables, sql: &str) -> Vec<Vec<String>> {
    let batches = tables.session().await.unwrap().sql(sql).await.unwrap().collect().await.unwrap();
    let mut rows = Vec::new();
    for batch in batches {
        for row in 0..batch.num_rows() {
            let text = |column: &ArrayRef| match column.is_null(row) {
                true => "null".to_owned(),
                false => array_value_to_string(column, row).unwrap(),
            };
            rows.push(batch.columns().iter().map(text).collect());
        }
    }
    rows
}

/// Hours of gold by (device, hour): their revision, and everything else.
pub(crate) async fn hours(tables: &Tables) -> BTreeMap<(String, String), (String, String)> {
    let sql = "select device_id d, hour h, revision r, * except (revision) from gold.hourly_aggregates";
    let rows = rows_of(tables, sql).await;
    rows.into_iter().map(|r| ((r[0].clone(), r[1].clone()), (r[2].clone(), r[3..].join("|")))).collect()
}

/// What differs between gold's hours and those computed of silver by SQL.
pub(crate) async fn gold_is_not_silver(tables: &Tables) -> Vec<Vec<String>> {
    let good = "filter (where quality <> 'bad')";
    let sql = format!(
        "with s as (select site, device_id, date_trunc('hour', ts) h, count(*) {good} n, \
         count(*) filter (where quality = 'bad') bad, min(value) {good} lo, max(value) {good} hi, \
         avg(value) {good} mid, stddev_samp(value) {good} dev, first_value(value order by ts) {good} f, \
         last_value(value order by ts) {good} l, median(value) {good} p50 \
         from silver.sensor_readings group by 1, 2, 3) \
         select coalesce(g.device_id, s.device_id), coalesce(g.hour, s.h), g.count, s.n, g.mean, s.mid \
         from gold.hourly_aggregates g full join s on g.site = s.site and g.device_id = s.device_id and g.hour = s.h \
         where (g.count is distinct from s.n) or (g.bad_count is distinct from s.bad) or {}",
        [
            ("min", "lo"),
            ("max", "hi"),
            ("mean", "mid"),
            ("stddev", "dev"),
            ("first", "f"),
            ("last", "l"),
            ("p50", "p50")
        ]
        .map(|(g, s)| format!("coalesce(abs(g.{g} - s.{s}) > 1e-9, (g.{g} is null) <> (s.{s} is null))"))
        .join(" or ")
    );
    rows_of(tables, &sql).await
}

async fn check_matrix(sent: impl Fn(u64, &[Row]) -> Message) {
    let store = Store::open("memory:///").unwrap();
    let tables = Tables::open(&store).await.unwrap();
    let mut refiner = refiner(&store, &tables);
    let matrix = matrix();
    let devices: BTreeSet<&str> =
        matrix.iter().filter_map(|(r, _)| r.device).filter(|d| !d.is_empty()).collect();
    let base: Vec<Row> =
        BEFORE.iter().flat_map(|ago| devices.iter().map(move |d| row(d, then(-ago), 20.0))).collect();
    put(&store, 0, &[sent(0, &base)]).await;
    let counts = refine_all(&mut refiner).await;
    assert_eq!(counts.stored, base.len() as u64);
    gold::step(&tables, &GoldSettings::default(), now()).await.unwrap();
    let before = hours(&tables).await;
    assert_eq!(before.len(), base.len(), "four hours of each device");

    let rows: Vec<Row> = matrix.iter().map(|(row, _)| *row).collect();
    put(&store, 1, &[sent(1, &rows)]).await;
    let counts = refine_all(&mut refiner).await;
    let expected = |is: fn(&Lands) -> bool| matrix.iter().filter(|(_, lands)| is(lands)).count() as u64;
    assert_eq!(counts.readings, matrix.len() as u64, "every reading is accounted for");
    assert_eq!(counts.stored, expected(|l| matches!(l, Silver(_))));
    assert_eq!(counts.duplicates, expected(|l| matches!(l, Duplicate)));
    assert_eq!(counts.quarantined, expected(|l| matches!(l, Quarantine(..))));

    for (at, (row, lands)) in matrix.iter().enumerate() {
        let device = row.device.unwrap_or("");
        let sql = format!(
            "select cast(ts as bigint), value, unit, quality from silver.sensor_readings where device_id = '{device}' \
             and segment = (select max(segment) from silver.messages)"
        );
        let stored = rows_of(&tables, &sql).await;
        let sql =
            format!("select rule, reason, readings, resolved_at from silver.quarantine where \"row\" = {at}");
        let held = rows_of(&tables, &sql).await;
        match lands {
            Silver(value) => {
                assert_eq!((stored.len(), held.len()), (1, 0), "{device}");
                let quality = ["good", "uncertain", "bad"][usize::from(row.quality)];
                let [ts, got, unit, got_quality] = [0, 1, 2, 3].map(|column| stored[0][column].as_str());
                assert_eq!(
                    (ts, unit, got_quality),
                    (row.ts.to_string().as_str(), "Cel", quality),
                    "{device}"
                );
                match value {
                    Some(value) => {
                        assert!((got.parse::<f64>().unwrap() - value).abs() < 1e-9, "{device}: {got}");
                    }
                    None => assert_eq!(got, "null"),
                }
            }
            Duplicate => assert_eq!((stored.len(), held.len()), (0, 0), "{device}"),
            Quarantine(rule, reason) => {
                assert_eq!((stored.len(), held.len()), (0, 1), "{device}");
                assert_eq!(
                    (held[0][0].as_str(), &held[0][2..]),
                    (*rule, &["1".to_owned(), "null".to_owned()][..])
                );
                assert!(held[0][1].contains(reason), "{device}: {}", held[0][1]);
            }
        }
    }
    let audit = ledger::audit(&tables, now()).await.unwrap();
    assert!(audit.balances(), "{audit}");

    // Gold: the hours that were touched, and no other.
    gold::step(&tables, &GoldSettings::default(), now()).await.unwrap();
    let after = hours(&tables).await;
    for (key @ (device, hour), (revision, values)) in &after {
        let of_device = matrix.iter().find(|(r, l)| r.device == Some(device) && matches!(l, Silver(_)));
        let touched = of_device.is_some_and(|(r, _)| {
            let ts = Timestamp::from_micros(r.ts).hour().to_string();
            ts.trim_end_matches('Z') == hour.trim_end_matches('Z')
        });
        let closed = !hour.starts_with("2026-03-01T06");
        let unchanged = before.get(key).is_some_and(|(_, known)| known == values);
        assert_eq!(unchanged, !touched, "{device} {hour}");
        assert_eq!(revision, if touched && closed { "1" } else { "0" }, "{device} {hour}");
    }
    assert_eq!(after.len(), before.len(), "every touched hour stood there");
    assert_eq!(gold_is_not_silver(&tables).await, Vec::<Vec<String>>::new());
    let all = Options { verify: true, ..Options::default() };
    let rebuilt = rebuild(&store, &all, &GoldSettings::default(), now(), |_| {}).await.unwrap();
    assert_eq!(rebuilt.identical, Some(true), "{rebuilt}");

    // All of it once more changes nothing.
    let (silver, gold) =
        (rows_of(&tables, "select * from silver.sensor_readings").await.len(), gold_rows(&tables).await);
    put(&store, 2, &[sent(1, &rows)]).await;
    let counts = refine_all(&mut refiner).await;
    assert_eq!(counts.stored, 0);
    gold::step(&tables, &GoldSettings::default(), now()).await.unwrap();
    assert_eq!(gold_rows(&tables).await, gold);
    assert_eq!(rows_of(&tables, "select * from silver.sensor_readings").await.len(), silver);
    assert!(ledger::audit(&tables, now()).await.unwrap().balances());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_arrow_reading_lands_where_it_should() {
    check_matrix(|seq, rows| arrow("gw", seq, rows)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_json_reading_lands_where_it_should() {
    check_matrix(|_, rows| json("other", rows)).await;
}

/// What the lake says of the gateway `gw`.
async fn of_gw(tables: &Tables) -> String {
    let mut all = String::new();
    for sql in [
        "select * except (segment) from silver.sensor_readings where gateway_id = 'gw' order by device_id, ts",
        "select * except (segment, plan) from silver.messages where gateway_id = 'gw' order by seq",
        "select * except (updated_at) from gold.hourly_aggregates where device_id = 'a' order by hour",
        "select * from gold.timeseries_1m where device_id = 'a' order by time",
    ] {
        all += &ask(tables, sql).await;
    }
    let audit = ledger::audit(tables, now()).await.unwrap();
    assert!(audit.balances(), "{audit}");
    let lanes: Vec<_> = audit.lanes.into_iter().filter(|lane| lane.gateway_id == "gw").collect();
    format!("{all}{lanes:?}")
}

#[tokio::test]
async fn a_clock_that_is_wrong_harms_no_other_gateway() {
    let of_a = |minutes: std::ops::Range<i64>| -> Vec<Row> {
        minutes.map(|m| row("a", then(m * MINUTE - HOUR), m as f64)).collect()
    };
    // Readings and seals of the other gateway lie so far from now; how many of its ten are stored.
    let boot = ClockState::Unsynced { boot: Uuid::from_u128(3) };
    let mut alone = None;
    for (wrong, clock, stored) in [
        (None, ClockState::Synced, 0),
        (Some(4 * MINUTE), ClockState::Synced, 10),
        (Some(DAY), ClockState::Synced, 0),
        (Some(-100 * 365 * DAY), ClockState::Synced, 0),
        (Some(-now().as_micros() / 1_000_000 + HOUR), boot, 0),
    ] {
        let store = Store::open("memory:///").unwrap();
        let tables = Tables::open(&store).await.unwrap();
        for n in 0..2u64 {
            let other = wrong.map(|wrong| {
                let at = |s: i64| Timestamp::from_micros(then(s + wrong));
                let rows: Vec<Row> =
                    (0..5).map(|s| row("b", at(s + 10 * n as i64 - 20).as_micros(), 20.0)).collect();
                let sent = arrow("other", n, &rows);
                let sealed = Identity { sealed_at: at(0), clock, ..*sent.identity.unwrap() };
                Message { identity: Some(Box::new(sealed)), ..sent }
            });
            let first = 30 * n as i64;
            let ours = [
                arrow("gw", 2 * n, &of_a(first..first + 20)),
                arrow("gw", 2 * n + 1, &of_a(first + 10..first + 30)),
            ];
            let messages: Vec<Message> = other.into_iter().chain(ours).collect();
            put(&store, n, &messages).await;
            refine_all(&mut refiner(&store, &tables)).await;
            gold::step(&tables, &GoldSettings::default(), now()).await.unwrap();
        }
        let of_other = rows_of(&tables, "select 1 from silver.sensor_readings where device_id = 'b'").await;
        assert_eq!(of_other.len(), stored, "{wrong:?}");
        let of_gw = of_gw(&tables).await;
        assert_eq!(&of_gw, alone.get_or_insert_with(|| of_gw.clone()), "{wrong:?}");
        assert!(gold_is_not_silver(&tables).await.is_empty());
    }
    assert!(alone.unwrap().contains("59.0"));
}

/// A device whose firmware was changed: what it sends now is kept, exactly, and told by rule and reason.
#[tokio::test]
async fn changed_types_are_quarantined_and_unknown_fields_kept() {
    let store = Store::open("memory:///").unwrap();
    let tables = Tables::open(&store).await.unwrap();
    let t = now().as_micros() / 1_000_000;
    let items = [
        (format!(r#"{{"device_id":"d","timestamp":{t},"value":20.5,"rssi":-71,"fw":{{"v":[1,2]}}}}"#), None),
        (format!(r#"{{"device_id":"d","timestamp":{t}000,"value":20.5}}"#), None),
        (r#"{"device_id":"d","timestamp":"2026-03-01T06:29:00Z","value":20.5}"#.to_owned(), None),
        (
            format!(r#"{{"device_id":"d","timestamp":{t},"value":"20.5"}}"#),
            Some(("type", "/value = \"20.5\" is text, not a number")),
        ),
        (
            format!(r#"{{"device_id":"d","timestamp":{t},"value":{{"c":20.5}}}}"#),
            Some(("type", "/value = {\"c\":20.5} is an object")),
        ),
        (format!(r#"{{"device_id":"d","timestamp":{t},"value":[20.5]}}"#), Some(("type", "is an array"))),
        (
            format!(r#"{{"device_id":"d","timestamp":{t},"value":true}}"#),
            Some(("type", "/value = true is a boolean")),
        ),
        (
            format!(r#"{{"device_id":"d","timestamp":{t}000000000,"value":1}}"#),
            Some(("timestamp", "000000000 is not RFC 3339, nor s, ms or µs")),
        ),
        (format!(r#"{{"device_id":"d","timestamp":{},"value":1}}"#, t / 60), Some(("past", "1970-"))),
        (
            r#"{"device_id":"d","timestamp":"01.03.2026 06:29","value":1}"#.to_owned(),
            Some(("timestamp", "01.03.2026")),
        ),
        (
            r#"{"device_id":"d","timestamp":{"s":1},"value":1}"#.to_owned(),
            Some(("type", "/timestamp = {\"s\":1} is an object")),
        ),
        (
            format!(r#"{{"device_id":7,"timestamp":{t},"value":1}}"#),
            Some(("type", "/device_id = 7 is a number, not text")),
        ),
        (
            format!(r#"{{"device_id":"d","timestamp":{t},"value":1,"unit":{{}}}}"#),
            Some(("type", "/unit = {} is an object")),
        ),
        (format!(r#"{{"device_id":"d","timestamp":{t},"val":1}}"#), Some(("value", "/value is missing"))),
        (format!("[{t}, 1]"), Some(("timestamp", "/timestamp = null"))),
        ("7".to_owned(), Some(("type", "the reading = 7 is a number, not an object"))),
    ];
    let texts: Vec<&str> = items.iter().map(|(text, _)| text.as_str()).collect();
    let payload = format!("[{}]", texts.join(", "));
    let single = message(
        "plant/other/json",
        format!(r#"{{"device_id":"e","timestamp":{t},"value":1,"x":null}}"#),
        None,
    );
    let broken = message("plant/other/json", r#"{"device_id":"d","#, None);
    let sent = [message("plant/other/json", payload, None), single, broken];
    put(&store, 0, &sent).await;
    let counts = refine_all(&mut refiner(&store, &tables)).await;
    let bad = items.iter().filter(|(_, held)| held.is_some()).count() as u64;
    // The second is the first, in milliseconds; what is no JSON at all counts as one.
    let expected = Counts {
        messages: 3,
        redelivered_messages: 0,
        readings: items.len() as u64 + 2,
        stored: 3,
        duplicates: 1,
        quarantined: bad + 1,
    };
    assert_eq!(counts, expected);
    for (at, (text, held)) in items.iter().enumerate() {
        let sql =
            format!("select rule, reason from silver.quarantine where \"offset\" = 0 and \"row\" = {at}");
        let found = rows_of(&tables, &sql).await;
        match held {
            None => assert!(found.is_empty(), "{text}: {found:?}"),
            Some((rule, reason)) => {
                assert_eq!((found.len(), found[0][0].as_str()), (1, *rule), "{text}: {found:?}");
                assert!(found[0][1].contains(reason), "{text}: {}", found[0][1]);
            }
        }
    }
    // Bronze has every byte.
    let name = SegmentName { hour: now().hour(), writer: Uuid::from_u128(1), number: 0 };
    let rows =
        cloud_ingest::pack::Segments::new(&store).read(&[name.path()]).await.unwrap().remove(0).unwrap();
    let payloads = rows.column_by_name("payload").unwrap().as_binary::<i32>();
    let kept: Vec<&[u8]> = payloads.iter().flatten().collect();
    assert_eq!(kept, sent.iter().map(|m| m.payload.as_ref()).collect::<Vec<_>>());
}
