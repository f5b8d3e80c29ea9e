//! The wire against its own past (golden bytes) and against bytes that nobody sends on purpose.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::{path::PathBuf, sync::Arc};

use arrow::{
    array::{
        Array, ArrayRef, AsArray, BooleanArray, DictionaryArray, Float64Array, Int32Array, Int64Array,
        RecordBatch, StringArray, TimestampMicrosecondArray, UInt8Array,
    },
    datatypes::{Float64Type, Int32Type, TimestampMicrosecondType},
    ipc::{
        reader::StreamReader,
        writer::{IpcWriteOptions, StreamWriter},
    },
};
use common::{
    documents::Devices,
    wire::{self, ClockState, Identity, Lane, Stream, Topic},
};
use proptest::prelude::*;

fn dict(values: &[&str]) -> ArrayRef {
    Arc::new(values.iter().copied().collect::<DictionaryArray<Int32Type>>())
}

fn instants(values: impl IntoIterator<Item = Option<i64>>) -> ArrayRef {
    Arc::new(values.into_iter().collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
}

fn floats(values: &[Option<f64>]) -> ArrayRef {
    Arc::new(values.iter().copied().collect::<Float64Array>())
}

const T0: i64 = 1_772_344_800_000_000; // 2026-03-01T06:00:00Z

/// One small batch of every lane.
fn sample(lane: Lane) -> RecordBatch {
    let device = || {
        [
            dict(&["reactor/temp", "reactor/pressure"]),
            dict(&["temperature", "pressure"]),
            dict(&["reactor"; 2]),
        ]
    };
    let two = |v: i64| Arc::new(Int64Array::from(vec![v, v])) as ArrayRef;
    let columns: Vec<ArrayRef> = match lane {
        Lane::Readings => [
            vec![instants([Some(T0), Some(T0 + 5_000_000)])],
            device().to_vec(),
            vec![
                dict(&["Cel", "kPa"]),
                dict(&["gauge"; 2]),
                floats(&[Some(120.4), None]),
                Arc::new(UInt8Array::from(vec![0, 2])),
            ],
        ]
        .concat(),
        Lane::Aggregates => [
            vec![instants([Some(T0); 2]), instants([Some(T0 + 60_000_000); 2])],
            device().to_vec(),
            vec![dict(&["Cel", "kPa"]), dict(&["gauge"; 2]), two(12), two(0)],
            vec![floats(&[Some(1.5), None]); 6],
            vec![
                instants([Some(T0); 2]),
                instants([Some(T0 + 60_000_000); 2]),
                Arc::new(BooleanArray::from(vec![false, true])),
                Arc::new(Int32Array::from(vec![0, 1])),
            ],
        ]
        .concat(),
        Lane::Anomalies => vec![
            Arc::new(StringArray::from(vec!["0197a000-0000-7000-8000-000000000001"; 2])),
            dict(&["raised", "cleared"]),
            dict(&["reactor"; 2]),
            dict(&["reactor/temp"; 2]),
            dict(&["tep-process"; 2]),
            dict(&["00ff"; 2]),
            dict(&["warning"; 2]),
            floats(&[Some(2.5), Some(0.5)]),
            floats(&[Some(1.0); 2]),
            instants([Some(T0); 2]),
            instants([None, Some(T0 + 60_000_000)]),
            Arc::new(StringArray::from(vec![None, Some("recovered")])),
        ],
        Lane::Control => vec![
            dict(&["gap", "census"]),
            instants([Some(T0); 2]),
            Arc::new(StringArray::from(vec!["0197a000-0000-7000-8000-00000000000e"; 2])),
            Arc::new(vec![Some("readings"), None].into_iter().collect::<DictionaryArray<Int32Type>>()),
            Arc::new(Int64Array::from(vec![Some(3), None])),
            Arc::new(Int64Array::from(vec![Some(9), None])),
            two(700),
            instants([Some(T0); 2]),
            instants([Some(T0 + 3_600_000_000); 2]),
            Arc::new(StringArray::from(vec!["full", "polled"])),
        ],
    };
    RecordBatch::try_new(wire::schema(lane), columns).unwrap()
}

fn identity(lane: Lane) -> Identity {
    Identity {
        v: 1,
        epoch: "0197a000-0000-7000-8000-00000000000e".parse().unwrap(),
        lane,
        seq: 41,
        rows: 2,
        rows_before: 82,
        oldest: 40,
        sealed_at: "2026-03-01T06:00:06.5Z".parse().unwrap(),
        clock: ClockState::Synced,
    }
}

/// `TAILRACE_WRITE_GOLDEN=1 cargo test -p tailrace-common` writes the files of a new wire version.
#[test]
fn golden_bytes_of_version_1_still_decode() {
    for lane in Lane::ALL {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/v1-{lane}.arrow"));
        if std::env::var_os("TAILRACE_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, wire::encode(&sample(lane), &identity(lane)).unwrap()).unwrap();
        }
        let decoded = wire::decode(lane, &std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(decoded, sample(lane), "{lane}");
        let signed = path.with_file_name(format!("v1-{lane}-signed.arrow"));
        if std::env::var_os("TAILRACE_WRITE_GOLDEN").is_some() {
            let payload = wire::with_sender(&std::fs::read(&path).unwrap(), "plant", "gw-1").unwrap();
            std::fs::write(&signed, payload).unwrap();
        }
        let decoded = wire::decode(lane, &std::fs::read(&signed).unwrap()).unwrap();
        assert_eq!(decoded, sample(lane), "{lane}, signed");
    }
}

#[test]
fn identity_travels_as_properties_and_in_the_schema() {
    let identity = identity(Lane::Readings);
    assert_eq!(Identity::from_properties(&identity.to_properties()).unwrap(), identity);
    let bytes = wire::encode(&sample(Lane::Readings), &identity).unwrap();
    let reader = arrow::ipc::reader::StreamReader::try_new(bytes.as_slice(), None).unwrap();
    let metadata: Vec<_> = reader.schema().metadata().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    assert_eq!(Identity::from_properties(&metadata).unwrap(), identity);
}

fn metadata_of(payload: &[u8]) -> Vec<(String, String)> {
    let reader = arrow::ipc::reader::StreamReader::try_new(payload, None).unwrap();
    reader.schema().metadata().iter().map(|(k, v)| (k.clone(), v.clone())).collect()
}

#[test]
fn a_payload_says_whose_it_is_beside_what_it_is() {
    let longest = "x".repeat(64);
    for lane in Lane::ALL {
        let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/v1-{lane}.arrow"));
        let encoded = wire::encode(&sample(lane), &identity(lane)).unwrap();
        for payload in [encoded, std::fs::read(golden).unwrap()] {
            let signed = wire::with_sender(&payload, "plant", "gw-1").unwrap();
            assert_eq!(wire::with_sender(&payload, "plant", "gw-1").unwrap(), signed, "the same bytes again");
            let (rows, metadata) = wire::Decoder::default().decode(lane, &signed).unwrap();
            assert_eq!(rows, sample(lane), "{lane}");
            assert_eq!((metadata["site"].as_str(), metadata["gateway"].as_str()), ("plant", "gw-1"));
            assert_eq!(Identity::from_properties(&metadata_of(&signed)).unwrap(), identity(lane));
            // Another's name takes its place.
            let again = wire::with_sender(&signed, "plant", "gw-2").unwrap();
            assert_eq!(again, wire::with_sender(&payload, "plant", "gw-2").unwrap());
            let long = wire::with_sender(&payload, &longest, &longest).unwrap();
            assert!(long.len() <= payload.len() + wire::SENDER_BYTES, "{}", long.len() - payload.len());
        }
    }
}

proptest! {
    #[test]
    fn what_is_no_payload_gets_no_sender(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        // No panic; and an error, since nothing like a schema comes about by chance.
        prop_assert!(wire::with_sender(&bytes, "plant", "gw").is_err());
    }

    #[test]
    fn no_damage_panics_the_signer(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = wire::encode(&sample(Lane::Readings), &identity(Lane::Readings)).unwrap();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = wire::with_sender(&bytes, "plant", "gw");
    }
}

#[test]
fn a_broken_property_is_named() {
    let good = identity(Lane::Readings).to_properties();
    for (key, wrong, part) in [
        ("seq", "-1", "seq = \"-1\" is not an integer"),
        ("seq", "9223372036854775808", "0 to 2^63 - 1"),
        ("epoch", "today", "epoch = \"today\" is not a UUID"),
        ("lane", "left", "lane = \"left\" is not readings"),
        ("sealed_at", "noon", "RFC 3339"),
        ("clock", "slow", "synced or unsynced"),
    ] {
        let changed: Vec<_> = good
            .iter()
            .map(|(k, v)| (k.clone(), if k == key { wrong.to_owned() } else { v.clone() }))
            .collect();
        let error = Identity::from_properties(&changed).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        let without: Vec<_> = good.iter().filter(|(k, _)| k != key).cloned().collect();
        let error = Identity::from_properties(&without).unwrap_err().to_string();
        assert_eq!(error, format!("user property {key} is missing"));
    }
}

#[test]
fn what_was_sealed_before_the_clock_was_set_gets_its_time() {
    let boot: uuid::Uuid = "37278d59-67a9-4366-b93f-8a3acc7014fe".parse().unwrap();
    let at = |text: &str| text.parse::<common::time::Timestamp>().unwrap();
    for lane in Lane::ALL {
        let sealed = Identity {
            sealed_at: at("1970-01-01T00:10:00Z"),
            clock: ClockState::Unsynced { boot },
            ..identity(lane)
        };
        assert_eq!(Identity::from_properties(&sealed.to_properties()).unwrap(), sealed);
        // One instant of the first column of instants counts from the machine's start; the others are true.
        let rows = sample(lane);
        let place = rows.columns().iter().position(|c| *c.data_type() == wire::instant()).unwrap();
        let with_first = |first: &str| {
            let mut columns = rows.columns().to_vec();
            let instants = columns[place].as_primitive::<TimestampMicrosecondType>();
            let mut micros: Vec<i64> = instants.values().to_vec();
            micros[0] = at(first).as_micros();
            columns[place] = Arc::new(TimestampMicrosecondArray::from(micros).with_timezone("UTC"));
            RecordBatch::try_new(wire::schema(lane), columns).unwrap()
        };
        let payload = wire::encode(&with_first("1970-01-01T00:09:59.5Z"), &sealed).unwrap();
        let offset = at("2026-03-01T06:00:00Z").as_micros() - 600_000_000;
        let set = wire::set_clock(lane, &payload, offset).unwrap();
        assert_eq!(wire::decode(lane, &set).unwrap(), with_first("2026-03-01T05:59:59.5Z"), "{lane}");
        assert_eq!(wire::set_clock(lane, &payload, offset).unwrap(), set, "the same bytes again");
        let expected = Identity { sealed_at: at("2026-03-01T06:00:00Z"), ..identity(lane) };
        let reader = arrow::ipc::reader::StreamReader::try_new(set.as_slice(), None).unwrap();
        let metadata: Vec<_> =
            reader.schema().metadata().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        assert_eq!(Identity::from_properties(&metadata).unwrap(), expected);
    }
}

#[test]
fn another_lane_is_refused_by_its_columns() {
    let bytes = wire::encode(&sample(Lane::Control), &identity(Lane::Control)).unwrap();
    let error = wire::decode(Lane::Readings, &bytes).unwrap_err().to_string();
    assert_eq!(error, "column device_id: is missing");
}

#[test]
fn a_buffer_that_claims_to_decode_to_terabytes_is_refused() {
    let thousand =
        arrow::compute::concat_batches(&wire::schema(Lane::Readings), &vec![sample(Lane::Readings); 500]);
    let mut bytes = wire::encode(&thousand.unwrap(), &identity(Lane::Readings)).unwrap();
    // A compressed buffer begins with its decoded length: 8,000 for a thousand timestamps.
    let at = bytes.windows(8).rposition(|w| w == 8_000i64.to_le_bytes()).unwrap();
    bytes[at..at + 8].copy_from_slice(&(1i64 << 42).to_le_bytes());
    let error = wire::decode(Lane::Readings, &bytes).unwrap_err().to_string();
    assert!(error.contains("it decodes to"), "{error}");
}

#[test]
fn a_batch_of_more_rows_than_a_message_may_have_is_refused() {
    let rows = usize::try_from(wire::MAX_ROWS).unwrap();
    let every = arrow::array::UInt32Array::from(vec![0; rows + 1]);
    let many = arrow::compute::take_record_batch(&sample(Lane::Readings), &every).unwrap();
    let bytes = wire::encode(&many, &identity(Lane::Readings)).unwrap();
    assert!(bytes.len() < 100_000, "{} B", bytes.len());
    let error = wire::decode(Lane::Readings, &bytes).unwrap_err().to_string();
    assert!(error.contains("it holds 1000001 rows, more than 1000000"), "{error}");
    let bytes = wire::encode(&many.slice(0, rows), &identity(Lane::Readings)).unwrap();
    assert_eq!(wire::decode(Lane::Readings, &bytes).unwrap().num_rows(), rows);
}

#[test]
fn topics() {
    let root = "tailrace/v1";
    for (text, stream) in [
        ("tailrace/v1/plant-1/gw-1/readings", Stream::Lane(Lane::Readings)),
        ("tailrace/v1/plant-1/gw-1/json", Stream::Json),
        ("tailrace/v1/plant-1/gw-1/ack", Stream::Ack),
        ("tailrace/v1/plant-1/gw-1/cmd/model", Stream::Cmd("model".into())),
    ] {
        let topic = Topic::parse(root, text).unwrap();
        assert_eq!(topic.stream, stream);
        assert_eq!(topic.under(root), text);
    }
    for other in [
        "tailrace/v1/_cloud/status",
        "tailrace/v1/plant-1/gw-1",
        "tailrace/v1/plant-1/gw-1/rumours",
        "tailrace/v1/plant 1/gw-1/readings",
        "tailrace/v2/plant-1/gw-1/readings",
        "tailrace/v1x/plant-1/gw-1/readings",
        "tailrace/v1//gw-1/readings",
    ] {
        assert_eq!(Topic::parse(root, other), None, "{other}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// One decoder for many payloads reads each as arrow's own reader does, compressed or not, with nulls or without.
    #[test]
    fn a_decoder_reads_what_arrow_reads(
        payloads in prop::collection::vec((0usize..4, 1usize..300, any::<u64>(), any::<[bool; 3]>()), 1..6),
    ) {
        let mut decoder = wire::Decoder::default();
        for (lane, times, noise, [compressed, dented, empty]) in payloads {
            let lane = Lane::ALL[lane];
            let rows = arrow::compute::concat_batches(&wire::schema(lane), &vec![sample(lane); times]).unwrap();
            let rows = if empty { rows.slice(0, 0) } else { noisy(&rows, noise) };
            let codec = compressed.then_some(arrow::ipc::CompressionType::ZSTD);
            let options = IpcWriteOptions::default().try_with_compression(codec).unwrap();
            let mut writer = StreamWriter::try_new_with_options(Vec::new(), &rows.schema(), options).unwrap();
            writer.write(&rows).unwrap();
            let mut bytes = writer.into_inner().unwrap();
            let read = StreamReader::try_new(&bytes[..], None).unwrap().next().unwrap().unwrap();
            prop_assert_eq!(&decoder.decode(lane, &bytes).unwrap().0, &read);
            if dented {
                let at = (noise % bytes.len() as u64) as usize;
                bytes[at] ^= 1 << (noise % 8);
                let _ = decoder.decode(lane, &bytes);
            }
        }
    }
}

/// The same rows with other numbers, which compress worse or not at all.
fn noisy(rows: &RecordBatch, seed: u64) -> RecordBatch {
    let mut state = seed | 1;
    let columns = rows.columns().iter().map(|column| -> ArrayRef {
        match column.as_primitive_opt::<Float64Type>() {
            Some(values) => {
                let noise = values.iter().map(|value| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    value.map(|value| value + state as f64)
                });
                Arc::new(noise.collect::<Float64Array>())
            }
            None => Arc::clone(column),
        }
    });
    RecordBatch::try_new(rows.schema(), columns.collect()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn no_bytes_panic_the_decoder(bytes in prop::collection::vec(any::<u8>(), 0..600), lane in 0usize..4) {
        let _ = wire::decode(Lane::ALL[lane], &bytes);
    }

    #[test]
    fn no_damage_panics_the_decoder(
        lane in 0usize..4,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<Option<prop::sample::Index>>(),
    ) {
        let lane = Lane::ALL[lane];
        let mut bytes = wire::encode(&sample(lane), &identity(lane)).unwrap();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        // Whatever still decodes has the stream's columns and can be read to the last row.
        if let Ok(batch) = wire::decode(lane, &bytes) {
            prop_assert_eq!(batch.schema(), wire::schema(lane));
            let _ = format!("{batch:?}");
        }
    }
}

#[test]
fn a_registry_with_keys_of_a_later_version_is_read() {
    let text = r#"{"v":1,"at":"2026-03-01T00:00:00Z","colour":"red",
        "assets":[{"id":"p","foundation":"stiff"}],
        "devices":[{"id":"p/t","type":"temperature","asset":"p","unit":"Cel","depth_mm":3}]}"#;
    let devices: Devices = serde_json::from_str(text).unwrap();
    assert_eq!((devices.assets[0].id.as_str(), devices.devices[0].unit.as_str()), ("p", "Cel"));
}
