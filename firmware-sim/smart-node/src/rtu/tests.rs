use std::{vec, vec::Vec};

use proptest::prelude::*;

use super::*;
use crate::pdu::{Exception, Table};

const ADDRESS: u8 = 0x11;
const BAUD: u32 = 19_200;
const NOTHING: &[u8] = &[];

/// Holding registers 0 to 199, each of which holds its address until it is written.
struct Bank([u16; 200]);

impl Bank {
    fn new() -> Self {
        Self(core::array::from_fn(|address| address as u16))
    }
}

impl Registers for Bank {
    fn read(&self, table: Table, first: u16, values: &mut [u16]) -> Result<(), Exception> {
        let first = usize::from(first);
        let held = self.0.get(first..first + values.len()).filter(|_| table == Table::Holding);
        values.copy_from_slice(held.ok_or(Exception::ILLEGAL_ADDRESS)?);
        Ok(())
    }

    fn write(&mut self, first: u16, values: &[u16]) -> Result<(), Exception> {
        let first = usize::from(first);
        let held = self.0.get_mut(first..first + values.len());
        held.ok_or(Exception::ILLEGAL_ADDRESS)?.copy_from_slice(values);
        Ok(())
    }
}

fn slave() -> Slave {
    Slave::new(ADDRESS, BAUD).unwrap()
}

/// `bytes` with their CRC.
fn framed(bytes: &[u8]) -> Vec<u8> {
    [bytes, &crc16(bytes).to_le_bytes()].concat()
}

/// What a fresh slave answers to `frame` and does to the registers.
fn exchange(frame: &[u8]) -> (Vec<u8>, Bank) {
    let (mut slave, mut bank) = (slave(), Bank::new());
    slave.receive(0, frame);
    let reply = slave.poll(1_000_000, &mut bank).to_vec();
    (reply, bank)
}

#[test]
fn checksums_are_those_of_the_specification() {
    // SL 6.2.2: the frame 02 07 is followed by 41 12.
    assert_eq!(crc16(&[0x02, 0x07]).to_le_bytes(), [0x41, 0x12]);
    // The check value by which catalogues of CRCs name this one.
    assert_eq!(crc16(b"123456789"), 0x4b37);
    assert_eq!(crc16(&[]), 0xffff);
}

#[test]
fn silence_is_three_and_a_half_characters() {
    // SL 2.5.1.1: 11 bits a character; 1.75 ms above 19,200 Bd.
    for (baud, wanted) in
        [(1_200, 32_084), (9_600, 4_011), (19_200, 2_006), (38_400, 1_750), (115_200, 1_750)]
    {
        assert_eq!(silence_us(baud), wanted, "{baud} Bd");
    }
    for (address, valid) in [(0, false), (1, true), (247, true), (248, false)] {
        assert_eq!(Slave::new(address, BAUD).is_some(), valid, "address {address}");
    }
    assert!(Slave::new(1, 0).is_none());
}

#[test]
fn answers_golden_frames() {
    // The request of AP 6.3 to slave 17, as in Modicon's PI-MBUS-300, where its CRC stands too.
    assert_eq!(framed(&[0x11, 0x03, 0x00, 0x6b, 0x00, 0x03])[6..], [0x76, 0x87]);
    let (reply, _) = exchange(&[0x11, 0x03, 0x00, 0x6b, 0x00, 0x03, 0x76, 0x87]);
    assert_eq!(reply, framed(&[0x11, 0x03, 0x06, 0x00, 0x6b, 0x00, 0x6c, 0x00, 0x6d]));
    // The write of AP 6.6 and PI-MBUS-300 comes back as it went.
    let write = [0x11, 0x06, 0x00, 0x01, 0x00, 0x03, 0x9a, 0x9b];
    let (reply, bank) = exchange(&write);
    assert_eq!((&reply[..], bank.0[1]), (&write[..], 3));
    // AP 7: function 1 is refused.
    assert_eq!(exchange(&framed(&[0x11, 0x01, 0x04, 0xa1, 0x00, 0x01])).0, framed(&[0x11, 0x81, 0x01]));
}

#[test]
fn what_is_not_meant_for_it_is_not_answered() {
    let request = [0x11, 0x03, 0x00, 0x6b, 0x00, 0x03, 0x76, 0x87];
    for at in 0..request.len() {
        let mut damaged = request;
        damaged[at] ^= 0x10;
        assert_eq!(exchange(&damaged).0, NOTHING, "byte {at} damaged");
        assert_eq!(exchange(&request[..at]).0, NOTHING, "cut to {at} bytes");
    }
    assert_eq!(exchange(&framed(&[0x12, 0x03, 0x00, 0x6b, 0x00, 0x03])).0, NOTHING, "another slave");
    assert_eq!(exchange(&framed(&[0x11])).0, NOTHING, "no function");
    assert_eq!(exchange(&[0x11; 300]).0, NOTHING, "too long");
    // SL 2.2: everybody carries a broadcast out, nobody answers.
    let (reply, bank) = exchange(&framed(&[0x00, 0x06, 0x00, 0x01, 0x00, 0x03]));
    assert_eq!((reply.len(), bank.0[1]), (0, 3));
}

#[test]
fn a_frame_ends_by_silence_alone() {
    let (mut slave, mut bank) = (slave(), Bank::new());
    let request = [0x11, 0x03, 0x00, 0x6b, 0x00, 0x03, 0x76, 0x87];
    assert_eq!(slave.next_deadline(), None);
    slave.receive(100, &request[..3]);
    slave.receive(2_100, &request[3..]);
    assert_eq!(slave.next_deadline(), Some(4_106));
    assert_eq!(slave.poll(4_105, &mut bank), NOTHING);
    assert_eq!(slave.poll(4_106, &mut bank).len(), 11);
    assert_eq!(slave.next_deadline(), None);
    assert_eq!(slave.poll(9_999, &mut bank), NOTHING, "answered already");

    // A pause in the middle: two broken frames, and the next whole one is answered.
    slave.receive(10_000, &request[..3]);
    slave.receive(12_006, &request[3..]);
    assert_eq!(slave.poll(20_000, &mut bank), NOTHING);
    slave.receive(30_000, &request);
    assert_eq!(slave.poll(40_000, &mut bank).len(), 11);
}

/// Requests for the slave, most of them valid.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let read = (3..=4u8, 0..220u16, 0..130u16).prop_map(|(function, first, count)| {
        [&[ADDRESS, function][..], &first.to_be_bytes(), &count.to_be_bytes()].concat()
    });
    let single = (0..220u16, any::<u16>()).prop_map(|(address, value)| {
        [&[ADDRESS, 6][..], &address.to_be_bytes(), &value.to_be_bytes()].concat()
    });
    let multiple =
        (0..220u16, prop::collection::vec(any::<[u8; 2]>(), 0..124)).prop_map(|(first, values)| {
            let count = (values.len() as u16).to_be_bytes();
            let bytes = [2 * values.len() as u8];
            [&[ADDRESS, 16][..], &first.to_be_bytes(), &count, &bytes, &values.concat()].concat()
        });
    prop_oneof![read, single, multiple].prop_map(|bytes| framed(&bytes))
}

proptest! {
    #[test]
    fn no_bytes_can_make_it_panic(
        frames in prop::collection::vec(
            (0..5_000u64, prop::collection::vec(any::<u8>(), 0..300), any::<bool>()), 1..20
        ),
    ) {
        let (mut slave, mut bank, mut now) = (slave(), Bank::new(), 0);
        for (pause, bytes, ours) in frames {
            now += pause;
            // Bytes alone hardly ever pass the CRC: half of the frames do.
            let bytes = if ours { framed(&[&[ADDRESS], &bytes[..]].concat()) } else { bytes };
            slave.receive(now, &bytes);
            let reply = slave.poll(now + pause, &mut bank);
            prop_assert!(reply.is_empty() || crc16(reply) == 0 && reply[0] == ADDRESS);
        }
    }

    #[test]
    fn a_request_in_pieces_is_answered_like_a_whole_one(
        request in request(),
        cuts in prop::collection::vec((any::<prop::sample::Index>(), 0..2_006u64), 0..6),
    ) {
        let (wanted, after) = exchange(&request);
        prop_assert!(!wanted.is_empty());
        let mut ends: Vec<(usize, u64)> =
            cuts.iter().map(|(index, pause)| (index.index(request.len()), *pause)).collect();
        ends.sort_unstable();
        ends.push((request.len(), 0));
        let (mut slave, mut bank, mut now, mut begin) = (slave(), Bank::new(), 0, 0);
        for (end, pause) in ends {
            slave.receive(now, &request[begin..end]);
            prop_assert_eq!(slave.poll(now, &mut bank), NOTHING);
            now += if end > begin { pause } else { 0 };
            begin = end;
        }
        prop_assert_eq!(slave.poll(now + 2_006, &mut bank), wanted);
        prop_assert_eq!(bank.0, after.0);
    }

    #[test]
    fn the_next_frame_is_answered_whatever_came_before(
        noise in prop::collection::vec(any::<u8>(), 0..600),
        request in request(),
    ) {
        let (mut slave, mut bank) = (slave(), Bank::new());
        slave.receive(0, &noise);
        slave.poll(3_000, &mut bank);
        slave.receive(6_000, &request);
        prop_assert!(!slave.poll(9_000, &mut bank).is_empty());
    }
}

#[test]
fn a_frame_of_256_bytes_is_taken_and_one_of_257_is_not() {
    let longest = framed(&[&[ADDRESS, 0x41][..], &vec![0; 252]].concat());
    assert_eq!((longest.len(), exchange(&longest).0), (256, framed(&[ADDRESS, 0xc1, 0x01])));
    assert_eq!(exchange(&[&longest[..], &[0]].concat()).0, NOTHING);
    let longer = framed(&[&[ADDRESS, 0x41][..], &vec![0; 253]].concat());
    assert_eq!((longer.len(), exchange(&longer).0), (257, NOTHING.to_vec()));
}
