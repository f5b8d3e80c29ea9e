use std::collections::{BTreeMap, BTreeSet};

use smart_node::pdu::MAX_READ;

use super::*;
use crate::register_map;

fn anchor() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn units() -> Units {
    Units::demo(anchor()).unwrap()
}

/// Reads `count` registers of a unit by the protocol, or the exception.
fn read(units: &Units, unit: u8, table: Table, count: u16, at: Timestamp) -> Result<Vec<u16>, u8> {
    let function = if table == Table::Holding { 3 } else { 4 };
    let [high, low] = count.to_be_bytes();
    let mut reply = [0; MAX_BYTES];
    match units.answer(unit, &[function, 0, 0, high, low], at, &mut reply) {
        [code, exception] => {
            assert_eq!(*code, function | 0x80);
            Err(*exception)
        }
        reply => Ok(reply[2..].chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect()),
    }
}

/// The value of a row in the registers of its unit, and how much of it one step of the register is.
fn decode(row: &Row, words: &[u16]) -> (f64, f64) {
    let at = usize::from(row.address);
    let [first, second] = [words[at], words.get(at + 1).copied().unwrap_or(0)].map(u32::from);
    match row.form {
        Form::I16 => (f64::from(words[at].cast_signed()) * row.scale + row.offset, row.scale),
        Form::I32 => panic!("no unit of the PLC shows an i32"),
        Form::F32 | Form::F32LowFirst => {
            let bits = if row.form == Form::F32 { first << 16 | second } else { second << 16 | first };
            let value = f64::from(f32::from_bits(bits));
            (value, value.abs() * f64::from(f32::EPSILON))
        }
    }
}

#[test]
fn every_instrument_of_the_plant_stands_once_in_one_readable_block() {
    let units = units();
    let columns = |line: &str| line.split_whitespace().count();
    let mut ends = BTreeMap::new();
    let mut devices = BTreeSet::new();
    for row in units.rows() {
        assert!(devices.insert(&row.device), "{} stands twice", row.device);
        let end = ends.entry(row.slave).or_insert((row.table, FIRST_VALUE));
        assert_eq!(*end, (row.table, row.address), "{} follows its neighbour", row.device);
        end.1 += row.form.words();
        assert_eq!(columns(&row.to_string()), columns(register_map::HEADER), "{row}");
    }
    assert_eq!(devices.len(), units.plant.layout().channels.len() + 2);
    assert_eq!(ends.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    for (unit, (table, end)) in ends {
        assert!(usize::from(end) <= MAX_READ);
        assert!(read(&units, unit, table, end, anchor()).is_ok());
        assert_eq!(read(&units, unit, table, end + 1, anchor()), Err(2), "unit {unit} ends there");
    }
}

#[test]
fn registers_show_what_the_plant_says() {
    let units = units();
    // Normal operation, and all three faults: among them values at the end of their transmitters.
    for minutes in [10, 5 * 60, 13 * 60, 21 * 60] {
        let at = anchor() + Duration::from_micros(60_000_000 * minutes + 123_456);
        let sampled = anchor() + Duration::from_micros(60_000_000 * minutes + 100_000);
        for (row, signal) in &units.values {
            let words = read(&units, row.slave, row.table, row.address + row.form.words(), at).unwrap();
            let millis = words[..4].iter().fold(0, |millis, word| millis << 16 | i64::from(*word));
            assert_eq!(millis * 1_000, sampled.as_micros());
            let [low, high] = match signal {
                Signal::Channel(_) => {
                    let margins = [0.2 / 16.0, 0.5 / 16.0];
                    let span = (row.range[1] - row.range[0]) / 1.08;
                    [row.range[0] + (0.04 - margins[0]) * span, row.range[1] - (0.04 - margins[1]) * span]
                }
                _ => row.range,
            };
            let wanted = units.plant.value(*signal, sampled).clamp(low, high);
            let (got, step) = decode(row, &words);
            let rounding = 1e-9 * (high - low);
            assert!((got - wanted).abs() <= step / 2.0 + rounding, "{}: {got} is not {wanted}", row.device);
        }
    }
}

#[test]
fn what_is_not_there_is_refused() {
    let units = units();
    assert_eq!(read(&units, 0, Table::Input, 1, anchor()), Err(11));
    assert_eq!(read(&units, 6, Table::Input, 1, anchor()), Err(11));
    assert_eq!(read(&units, 1, Table::Holding, 1, anchor()), Err(2), "unit 1 has input registers");
    assert_eq!(read(&units, 2, Table::Input, 1, anchor()), Err(2), "unit 2 has holding registers");
    let mut reply = [0; MAX_BYTES];
    for request in [&[6, 0, 4, 0, 0][..], &[16, 0, 4, 0, 1, 2, 0, 0], &[1, 0, 0, 0, 1]] {
        assert_eq!(units.answer(2, request, anchor(), &mut reply), [request[0] | 0x80, 1]);
    }
}
