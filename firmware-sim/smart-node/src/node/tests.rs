use std::{collections::VecDeque, vec::Vec};

use embedded_hal::i2c::{self, Operation};

use super::*;
use crate::rtu::crc16;

const ADDRESS: u8 = 7;

/// A SHT4x that measures what its script says, word by word as in the data sheet; None is a chip that is away.
struct Chip {
    script: VecDeque<Option<(u16, u16)>>,
    answer: Option<[u8; 6]>,
}

impl i2c::ErrorType for Chip {
    type Error = i2c::ErrorKind;
}

impl I2c for Chip {
    fn transaction(&mut self, address: u8, operations: &mut [Operation<'_>]) -> Result<(), i2c::ErrorKind> {
        assert_eq!(address, 0x44);
        for operation in operations {
            match operation {
                Operation::Write(bytes) => {
                    assert_eq!(bytes, &[0xfd], "measure at high precision");
                    let nack = i2c::ErrorKind::NoAcknowledge(i2c::NoAcknowledgeSource::Address);
                    let (temperature, humidity) = self.script.pop_front().flatten().ok_or(nack)?;
                    let [[a, b], [c, d]] = [temperature, humidity].map(u16::to_be_bytes);
                    self.answer = Some([a, b, crc8([a, b]), c, d, crc8([c, d])]);
                }
                Operation::Read(buffer) => buffer.copy_from_slice(&self.answer.take().unwrap()),
            }
        }
        Ok(())
    }
}

/// CRC-8 of the data sheet.
fn crc8(word: [u8; 2]) -> u8 {
    word.iter().fold(0xff, |crc, byte| {
        (0..8).fold(crc ^ byte, |crc, _| crc << 1 ^ if crc & 0x80 != 0 { 0x31 } else { 0 })
    })
}

struct NoDelay;

impl DelayNs for NoDelay {
    fn delay_ns(&mut self, _: u32) {}
}

fn node(script: &[Option<(u16, u16)>]) -> Node<Chip, NoDelay> {
    let chip = Chip { script: script.iter().copied().collect(), answer: None };
    Node::new(chip, NoDelay, Address::Address0x44, Slave::new(ADDRESS, 19_200).unwrap(), 0)
}

/// Runs the node to `until`, second by second.
fn run(node: &mut Node<Chip, NoDelay>, until: u64) {
    while node.next_deadline() < until {
        let now = node.next_deadline();
        assert!(node.poll(now).is_empty());
    }
}

/// Sends a PDU at `now`; the PDU of the answer.
fn ask(node: &mut Node<Chip, NoDelay>, now: u64, pdu: &[u8]) -> Vec<u8> {
    let frame = [&[ADDRESS], pdu].concat();
    node.receive(now, &[&frame[..], &crc16(&frame).to_le_bytes()].concat());
    let reply = node.poll(now + 3_000);
    assert_eq!((reply[0], crc16(reply)), (ADDRESS, 0));
    reply[1..reply.len() - 2].to_vec()
}

/// Reads `count` numbers of 32 bits from input register `first` on.
fn read(node: &mut Node<Chip, NoDelay>, now: u64, first: u16, count: u8) -> Vec<i32> {
    let pdu = ask(node, now, &[4, 0, first as u8, 0, 2 * count]);
    assert_eq!(pdu[..2], [4, 4 * count]);
    pdu[2..].chunks(4).map(|bytes| i32::from_be_bytes(bytes.try_into().unwrap())).collect()
}

#[test]
fn converts_by_the_data_sheet() {
    // −45 °C and 130 °C at the ends of the word; −6 % and 119 %, cropped; 0xBEEF is the data sheet's example.
    let table = [
        ((0, 0), (-45_000, 0)),
        ((0xffff, 0xffff), (130_000, 100_000)),
        ((26_214, 29_360), (25_000, 50_001)),
        ((0xbeef, 0xbeef), (85_523, 87_231)),
    ];
    for ((temperature, humidity), wanted) in table {
        assert_eq!(thousandths(&SensorData { temperature, humidity }), wanted);
    }
}

#[test]
fn shows_the_features_of_the_last_whole_window() {
    // Words around 25 °C and 50 %: one step of temperature is 2.67 thousandths.
    let mut node = node(&[
        Some((26_214, 29_360)),
        Some((26_214 + 375, 29_360)),
        Some((26_214, 29_360)),
        Some((26_214 + 375, 29_360)),
        Some((0, 0)),
    ]);
    assert_eq!(ask(&mut node, 100_000, &[6, 0, 0, 0, 4]), [6, 0, 0, 0, 4], "a window of 4 s");
    // The sample of second 0 was taken while the request waited; the window began anew after it.
    run(&mut node, 3_500_000);
    assert_eq!(ask(&mut node, 3_500_000, &[4, 0, 4, 0, 16]), [0x84, 6], "busy: no window yet");
    assert_eq!(read(&mut node, 3_600_000, UPTIME, 1), [3]);
    run(&mut node, 4_500_000);
    assert_eq!(ask(&mut node, 4_500_000, &[4, 0, 2, 0, 2]), [4, 4, 0, 1, 0, 4], "one window of 4 samples");
    let temperature = read(&mut node, 4_600_000, TEMPERATURE, 4);
    assert_eq!(temperature, [8_001, -45_000, 26_001, 30_602]);
    assert_eq!(read(&mut node, 4_700_000, HUMIDITY, 4), [37_501, 0, 50_001, 21_651]);
    assert_eq!(ask(&mut node, 4_800_000, &[4, 0, 0, 0, 20])[1], 40, "the whole block");
    assert_eq!(ask(&mut node, 4_900_000, &[4, 0, 1, 0, 20]), [0x84, 2], "one too many");
}

#[test]
fn a_sensor_that_is_away_leaves_samples_out_and_then_fails_the_window() {
    let good = Some((26_214, 29_360));
    let mut node = node(&[good, None, None, None, good, good]);
    // Window of 2 s, set before the first sample is due again.
    assert_eq!(ask(&mut node, 0, &[16, 0, 0, 0, 1, 2, 0, 2]), [16, 0, 0, 0, 1]);
    run(&mut node, 2_500_000);
    assert_eq!(ask(&mut node, 2_500_000, &[4, 0, 4, 0, 2]), [0x84, 4], "none in the window");
    assert_eq!(ask(&mut node, 2_600_000, &[4, 0, 2, 0, 2]), [4, 4, 0, 1, 0, 0]);
    run(&mut node, 4_500_000);
    assert_eq!(ask(&mut node, 4_500_000, &[4, 0, 2, 0, 2]), [4, 4, 0, 2, 0, 1], "one of two");
    assert_eq!(read(&mut node, 4_600_000, TEMPERATURE, 4), [25_000, 25_000, 25_000, 0]);
}

#[test]
fn a_board_that_was_busy_leaves_samples_out_and_keeps_the_time() {
    let mut node = node(&[Some((26_214, 29_360)); 9]);
    assert_eq!(ask(&mut node, 0, &[6, 0, 0, 0, 5]), [6, 0, 0, 0, 5]);
    run(&mut node, 1_500_000);
    node.poll(5_200_000);
    assert_eq!(node.next_deadline(), 6_000_000);
    assert_eq!(
        ask(&mut node, 5_300_000, &[4, 0, 2, 0, 2]),
        [4, 4, 0, 1, 0, 2],
        "two samples in five seconds"
    );
}

#[test]
fn fits_into_a_kibibyte() {
    assert!(size_of::<Node<(), ()>>() < 1_024, "{} bytes", size_of::<Node<(), ()>>());
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let mut node = node(&[Some((0, 0))]);
    for (pdu, wanted) in [
        (&[6, 0, 0, 0, 0][..], &[0x86, 3][..]),
        (&[6, 0, 0, 0x0e, 0x11], &[0x86, 3]),
        (&[6, 0, 1, 0, 9], &[0x86, 2]),
        (&[16, 0, 0, 0, 2, 4, 0, 9, 0, 9], &[0x90, 2]),
        (&[3, 0, 0, 0, 1], &[3, 2, 0, DEFAULT_WINDOW_S as u8]),
        (&[6, 0, 0, 0x0e, 0x10], &[6, 0, 0, 0x0e, 0x10]),
        (&[3, 0, 0, 0, 1], &[3, 2, 0x0e, 0x10]),
    ] {
        assert_eq!(ask(&mut node, 10_000, pdu), wanted, "{pdu:?}");
    }
}
