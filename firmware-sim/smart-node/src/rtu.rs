//! Modbus on a serial line, RTU mode, slave's side: bytes and the time in, bytes out.
//!
//! After *MODBUS over Serial Line, Specification and Implementation Guide V1.02* (in short, SL).
//!
//! ```text
//! ≥ 3.5 characters of silence │ address │ PDU, 1 to 253 bytes │ CRC low, high │ ≥ 3.5 characters of silence
//! ```
//!
//! - Silence alone ends a frame (SL 2.5.1.1), so a slave that has lost the thread finds it again at the next pause,
//!   and passes by what the other slaves on the line answer. A character is 11 bits; above 19,200 Bd the silence is
//!   1.75 ms.
//! - The specification also discards a frame with a pause of more than 1.5 characters in it. No operating system or
//!   USB adapter keeps that on the sending side, and the CRC finds what is missing: it is not asked for here.
//! - A frame that is too short or long, damaged, or for another slave is not answered (SL 2.4.1). One for address 0
//!   is for all: it is carried out and not answered (SL 2.2).
//! - CRC-16, polynomial 0xA001 mirrored, start 0xFFFF (SL 6.2.2), bit by bit: a table would take 512 bytes of flash.

use crate::pdu::{self, Registers};

/// Most bytes of a frame (SL 2.5.1).
pub const MAX_FRAME: usize = 256;
/// Address, function code and CRC.
const MIN_FRAME: usize = 4;
/// The address of everybody.
const BROADCAST: u8 = 0;

/// The slave with one address on a line.
#[derive(Debug, Clone)]
pub struct Slave {
    address: u8,
    /// So much silence ends a frame, in µs.
    silence_us: u64,
    /// When the last byte came, in µs.
    last_us: u64,
    /// Bytes since the last silence; those beyond [`MAX_FRAME`] are counted only.
    length: usize,
    frame: [u8; MAX_FRAME],
    reply: [u8; MAX_FRAME],
}

impl Slave {
    /// A slave at `address`, 1 to 247 (SL 2.2), on a line of `baud` Bd; none at another address or at 0 Bd.
    pub fn new(address: u8, baud: u32) -> Option<Self> {
        let valid = (1..=247).contains(&address) && baud > 0;
        valid.then(|| Self {
            address,
            silence_us: silence_us(baud),
            last_us: 0,
            length: 0,
            frame: [0; MAX_FRAME],
            reply: [0; MAX_FRAME],
        })
    }

    /// Takes bytes that came at `now_us`.
    pub fn receive(&mut self, now_us: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        // After a silence a frame begins; if nobody polled in it, the master has gone on without our answer.
        if self.frame_end().is_some_and(|end| now_us >= end) {
            self.length = 0;
        }
        let free = self.frame.get_mut(self.length..).unwrap_or_default();
        for (place, byte) in free.iter_mut().zip(bytes) {
            *place = *byte;
        }
        self.length = self.length.saturating_add(bytes.len());
        self.last_us = now_us;
    }

    /// When to [`poll`](Self::poll), in µs: once the frame under way has ended. None while the line is silent.
    pub fn next_deadline(&self) -> Option<u64> {
        self.frame_end()
    }

    /// The answer to a frame that has ended by `now_us`; empty when there is none to give.
    pub fn poll(&mut self, now_us: u64, registers: &mut impl Registers) -> &[u8] {
        if self.frame_end().is_none_or(|end| now_us < end) {
            return &[];
        }
        let length = core::mem::take(&mut self.length);
        match self.frame.get(..length) {
            Some(frame) => answer(self.address, frame, registers, &mut self.reply),
            None => &[],
        }
    }

    fn frame_end(&self) -> Option<u64> {
        (self.length > 0).then(|| self.last_us.saturating_add(self.silence_us))
    }
}

/// The silence that ends a frame, in µs.
fn silence_us(baud: u32) -> u64 {
    const BITS_OF_3_5_CHARACTERS_TIMES_2: u64 = 77;
    if baud > 19_200 { 1_750 } else { (BITS_OF_3_5_CHARACTERS_TIMES_2 * 500_000).div_ceil(baud.into()) }
}

/// Answers one frame as the slave at `address`.
fn answer<'r>(
    address: u8,
    frame: &[u8],
    registers: &mut impl Registers,
    reply: &'r mut [u8; MAX_FRAME],
) -> &'r [u8] {
    // The CRC over a frame and its CRC is 0.
    if frame.len() < MIN_FRAME || crc16(frame) != 0 || ![address, BROADCAST].contains(&frame[0]) {
        return &[];
    }
    let mut pdu = [0; pdu::MAX_BYTES];
    let pdu = pdu::answer(&frame[1..frame.len() - 2], registers, &mut pdu);
    if frame[0] == BROADCAST {
        return &[];
    }
    let end = 1 + pdu.len();
    reply[0] = address;
    reply[1..end].copy_from_slice(pdu);
    let crc = crc16(&reply[..end]);
    reply[end..end + 2].copy_from_slice(&crc.to_le_bytes());
    &reply[..end + 2]
}

/// The checksum of a frame; it is sent with the low byte first.
pub fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0xffff, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 != 0 { 0xa001 } else { 0 })
    })
}

#[cfg(test)]
mod tests;
