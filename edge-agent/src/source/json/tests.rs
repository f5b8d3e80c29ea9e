use proptest::prelude::*;

use super::*;

const TEMPERATURE: DeviceIx = DeviceIx(0);
const STATE: DeviceIx = DeviceIx(1);
/// 2026-03-01T06:00:00Z.
const NOW: Timestamp = Timestamp::from_micros(1_772_344_800_000_000);

fn one(device: DeviceIx) -> Whose {
    Whose::One(Target { device, scale: 1.0, shift: 0.0 })
}

fn topic(filter: &str, value: &str, whose: Whose) -> JsonTopic {
    JsonTopic {
        filter: filter.to_owned(),
        value: value.to_owned(),
        whose,
        time: None,
        quality: None,
        words: BTreeMap::new(),
        max_age: Duration::from_secs(30 * 86_400),
    }
}

fn timed(device: DeviceIx) -> JsonTopic {
    JsonTopic {
        time: Some("/t".to_owned()),
        quality: Some("/q".to_owned()),
        ..topic("shop/+/state", "/v", one(device))
    }
}

fn read(topics: &mut Topics, topic: &str, payload: &[u8]) -> Heard {
    let mut heard = Heard::default();
    topics.read(&Message { topic: topic.as_bytes(), retained: false, payload }, NOW, &mut heard);
    heard
}

/// The readings as (device, seconds from now, value, quality), and the rejections as (reason, count).
type Expected<'a> = (&'a [(DeviceIx, i64, f64, Quality)], &'a [(Reason, u64)]);

fn check(topics: &[JsonTopic], topic: &str, payload: &str, (readings, rejected): Expected<'_>) {
    let heard = read(&mut Topics::new(topics.to_vec()), topic, payload.as_bytes());
    let of = |r: &Reading| (r.device, (r.ts.as_micros() - NOW.as_micros()) / 1_000_000, r.quality);
    let got: Vec<_> = heard.readings.iter().map(of).collect();
    let wanted: Vec<_> =
        readings.iter().map(|(device, after, _, quality)| (*device, *after, *quality)).collect();
    assert_eq!(got, wanted, "{payload}: {:?}", heard.rejected);
    for (got, (_, _, wanted, _)) in heard.readings.iter().zip(readings) {
        assert!(
            (got.value - wanted).abs() < 1e-9 || (got.value.is_nan() && wanted.is_nan()),
            "{payload}: {got:?}"
        );
    }
    let got: Vec<_> = heard.rejected.iter().map(|(reason, (n, _))| (*reason, *n)).collect();
    assert_eq!(got, rejected, "{payload}: {:?}", heard.rejected);
}

#[test]
fn values_times_and_qualities() {
    use Quality::{Bad, Good, Uncertain};
    use Reason::{Future, Malformed, NoValue, NotFinite, Past};
    const D: DeviceIx = TEMPERATURE;
    let cases: &[(&str, Expected<'_>)] = &[
        (r#"{"v":21.5,"t":1772344800}"#, (&[(D, 0, 21.5, Good)], &[])),
        (r#"{"v":"21.5","t":"2026-03-01T05:59:00Z","q":"uncertain"}"#, (&[(D, -60, 21.5, Uncertain)], &[])),
        (r#"{"v":true,"t":1772344800000,"q":null}"#, (&[(D, 0, 1.0, Good)], &[])),
        (r#"{"v":null,"t":1772344800000000}"#, (&[(D, 0, f64::NAN, Bad)], &[])),
        (r#"{"v":7,"t":1772344800,"q":2}"#, (&[(D, 0, 7.0, Bad)], &[])),
        // Not later than 5 min ahead, not older than 30 d.
        (r#"{"v":1,"t":1772345100}"#, (&[(D, 300, 1.0, Good)], &[])),
        (r#"{"v":1,"t":1772345101}"#, (&[], &[(Future, 1)])),
        (r#"{"v":1,"t":1769752800}"#, (&[(D, -2_592_000, 1.0, Good)], &[])),
        (r#"{"v":1,"t":1769752799}"#, (&[], &[(Past, 1)])),
        (r#"{"v":1,"t":0}"#, (&[], &[(Past, 1)])),
        (r#"{"v":1,"t":-90000000000000000}"#, (&[], &[(Past, 1)])),
        (r#"{"v":1,"t":90000000000000000}"#, (&[], &[(Future, 1)])),
        // Nanoseconds.
        (r#"{"v":1,"t":1772344800123456789}"#, (&[], &[(Malformed, 1)])),
        (r#"{"v":1,"t":"soon"}"#, (&[], &[(Malformed, 1)])),
        (r#"{"v":1}"#, (&[], &[(Malformed, 1)])),
        (r#"{"v":"NaN","t":1772344800}"#, (&[], &[(NotFinite, 1)])),
        (r#"{"v":"-inf","t":1772344800}"#, (&[], &[(NotFinite, 1)])),
        (r#"{"v":1e999,"t":1772344800}"#, (&[], &[(Malformed, 1)])),
        (r#"{"v":"warm","t":1772344800}"#, (&[], &[(Malformed, 1)])),
        (r#"{"v":{"x":1},"t":1772344800}"#, (&[], &[(Malformed, 1)])),
        (r#"{"v":1,"t":1772344800,"q":"fair"}"#, (&[], &[(Malformed, 1)])),
        (r#"{"t":1772344800}"#, (&[], &[(NoValue, 1)])),
        ("[]", (&[], &[(NoValue, 1)])),
        ("7", (&[], &[(NoValue, 1)])),
        ("", (&[], &[(Malformed, 1)])),
        ("21,5", (&[], &[(Malformed, 1)])),
        // Every element is accounted for.
        (
            r#"[{"v":1,"t":1772344800},{"v":2,"t":1772344801},{},{"v":[],"t":1772344800}]"#,
            (&[(D, 0, 1.0, Good), (D, 1, 2.0, Good)], &[(Malformed, 1), (NoValue, 1)]),
        ),
    ];
    for (payload, expected) in cases {
        check(&[timed(D)], "shop/7/state", payload, *expected);
    }
}

#[test]
fn devices_by_topic_and_by_pointer() {
    use Quality::Good;
    let names = |name: &str, scale, shift| {
        BTreeMap::from([(name.to_owned(), Target { device: TEMPERATURE, scale, shift })])
    };
    let by = |at, names| [topic("shop/+/state", "/temp", Whose::Named { at, names })];
    let level = by(NameAt::Level(1), names("press", 5.0 / 9.0, -160.0 / 9.0));
    let pointer = by(NameAt::Pointer("/sensor/id".to_owned()), names("17", 0.1, 0.0));
    let reading = |value| [(TEMPERATURE, 0, value, Good)];
    let unknown = [(Reason::UnknownDevice, 1)];
    check(&level, "shop/press/state", r#"{"temp":212}"#, (&reading(100.0), &[]));
    check(&level, "shop/oven/state", r#"{"temp":212}"#, (&[], &unknown));
    check(&pointer, "shop/x/state", r#"{"temp":215,"sensor":{"id":17}}"#, (&reading(21.5), &[]));
    check(&pointer, "shop/x/state", r#"{"temp":215,"sensor":{"id":"17"}}"#, (&reading(21.5), &[]));
    check(&pointer, "shop/x/state", r#"{"temp":215,"sensor":{"id":["17"]}}"#, (&[], &unknown));
    check(&pointer, "shop/x/state", r#"{"temp":215}"#, (&[], &unknown));
    // What is beyond a double in the device's unit.
    let huge = by(NameAt::Level(1), names("press", 1e300, 0.0));
    check(&huge, "shop/press/state", r#"{"temp":1e300}"#, (&[], &[(Reason::NotFinite, 1)]));
}

#[test]
fn several_quantities_of_one_message() {
    let words = BTreeMap::from([("RUNNING".to_owned(), 1.0), ("IDLE".to_owned(), 0.0)]);
    let topics = [
        topic("shop/press/state", "/temp", one(TEMPERATURE)),
        JsonTopic { words, ..topic("shop/press/state", "/state", one(STATE)) },
    ];
    let (t, s) = ((TEMPERATURE, 0, 21.5, Quality::Good), (STATE, 0, 1.0, Quality::Good));
    let of = "shop/press/state";
    check(&topics, of, r#"{"temp":21.5,"state":"RUNNING"}"#, (&[t, s], &[]));
    // A device that sends what has changed.
    check(&topics, of, r#"{"temp":21.5}"#, (&[t], &[]));
    check(&topics, of, r#"{"state":"RUNNING"}"#, (&[s], &[]));
    check(&topics, of, r#"{"temp":21.5,"state":"BROKEN"}"#, (&[t], &[(Reason::Malformed, 1)]));
    check(&topics, of, r#"{"uptime":5}"#, (&[], &[(Reason::NoValue, 1)]));
    check(&topics, "shop/oven/state", r#"{"temp":21.5}"#, (&[], &[(Reason::NoValue, 1)]));
    // The whole message is the value.
    check(&[topic("shop/press/temp", "", one(TEMPERATURE))], "shop/press/temp", "21.5", (&[t], &[]));
}

#[test]
fn what_a_broker_kept_needs_a_time_of_its_own() {
    let mut topics = Topics::new(vec![topic("a", "", one(TEMPERATURE)), timed(STATE)]);
    assert_eq!(topics.filters(), BTreeMap::from([("a", false), ("shop/+/state", true)]));
    for (topic, payload, expected) in [
        (&b"a"[..], &b"1"[..], Some(Reason::Retained)),
        (b"shop/x/state", br#"{"v":1,"t":1772344800}"#, None),
        (b"\xff", b"1", Some(Reason::Malformed)),
    ] {
        let mut heard = Heard::default();
        topics.read(&Message { topic, retained: true, payload }, NOW, &mut heard);
        assert_eq!(heard.readings.len(), usize::from(expected.is_none()));
        assert_eq!(heard.rejected.into_keys().next(), expected);
    }
}

#[test]
fn a_gateway_without_a_clock_takes_the_time_of_arrival() {
    let mut topics = Topics::new(vec![timed(TEMPERATURE)]);
    let booted = Timestamp::from_micros(60_000_000);
    let payload = br#"{"v":1,"t":1772344800}"#;
    for (retained, expected) in [(false, None), (true, Some(Reason::Retained))] {
        let mut heard = Heard::default();
        topics.read(&Message { topic: b"shop/x/state", retained, payload }, booted, &mut heard);
        assert!(heard.readings.iter().all(|reading| reading.ts == booted));
        assert_eq!(heard.readings.len(), usize::from(expected.is_none()));
        assert_eq!(heard.rejected.into_keys().next(), expected);
    }
}

#[test]
fn the_latest_reading_counts_once() {
    let mut topics = Topics::new(vec![timed(TEMPERATURE)]);
    let mut send = |payload: &str| {
        let heard = read(&mut topics, "shop/x/state", payload.as_bytes());
        (heard.readings.len(), heard.rejected.into_keys().next())
    };
    assert_eq!(send(r#"{"v":1,"t":1772344800}"#), (1, None));
    assert_eq!(send(r#"{"v":1,"t":1772344800}"#), (0, Some(Reason::Repeated)));
    // Another value at the same time contradicts the first: silver must see both.
    assert_eq!(send(r#"{"v":2,"t":1772344800}"#), (1, None));
    assert_eq!(send(r#"{"v":2,"t":1772344801}"#), (1, None));
    assert_eq!(send(r#"{"v":null,"t":1772344802}"#), (1, None));
    assert_eq!(send(r#"{"v":null,"t":1772344802}"#), (0, Some(Reason::Repeated)));
}

/// JSON that often has what a topic looks for, and often something else there.
fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-5_000_000_000i64..5_000_000_000).prop_map(|off| Value::from(NOW.as_micros() + off)),
        prop_oneof!["NaN", "inf", "ON", "s-1", "good", "-?[0-9]{1,19}", ".{0,8}"].prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        let key = prop_oneof!["v", "t", "q", "n", ".{0,3}"];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key, inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Whatever arrives, something is accounted for, and what is taken for a reading is one.
    #[test]
    fn nothing_panics_and_nothing_is_silent(
        payload in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..64),
            json().prop_map(|value| value.to_string().into_bytes()),
        ],
        topic_bytes in prop_oneof![Just(b"shop/s-1/state".to_vec()), prop::collection::vec(any::<u8>(), 0..12)],
        retained: bool,
        now in prop_oneof![Just(NOW.as_micros()), any::<i64>()],
    ) {
        let now = Timestamp::from_micros(now);
        let names = BTreeMap::from([("s-1".to_owned(), Target { device: STATE, scale: 1e300, shift: -1.0 })]);
        let by_name = |at| topic("#", "/v", Whose::Named { at, names: names.clone() });
        let mut topics = Topics::new(vec![
            timed(TEMPERATURE),
            JsonTopic { words: BTreeMap::from([("ON".to_owned(), 1.0)]), ..topic("shop/#", "", one(STATE)) },
            by_name(NameAt::Level(1)),
            by_name(NameAt::Pointer("/n".to_owned())),
        ]);
        let mut heard = Heard::default();
        topics.read(&Message { topic: &topic_bytes, retained, payload: &payload }, now, &mut heard);
        let rejected: u64 = heard.rejected.values().map(|(n, _)| n).sum();
        prop_assert!(heard.readings.len() as u64 + rejected >= 1);
        for reading in &heard.readings {
            prop_assert!(reading.value.is_finite() || reading.quality == Quality::Bad);
            prop_assert!(reading.ts <= now + AHEAD && now.since(reading.ts) <= topics.topics[0].max_age);
        }
        for (_, example) in heard.rejected.values() {
            prop_assert!(!example.contains(char::is_control), "{example:?}");
        }
    }
}
