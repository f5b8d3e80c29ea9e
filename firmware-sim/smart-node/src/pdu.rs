//! The application protocol, server's side: the PDU of a request in, the PDU of its answer out.
//!
//! After *MODBUS Application Protocol Specification V1.1b3* (in short, AP). A PDU is a function code and its data, all
//! numbers with the high byte first; serial line and TCP wrap it each in its own way.
//!
//! | code | function | AP | request after the code | answer after the code |
//! |---|---|---|---|---|
//! | 3 | read holding registers | 6.3 | first, count (1–125) | bytes, values |
//! | 4 | read input registers | 6.4 | first, count (1–125) | bytes, values |
//! | 6 | write single register | 6.6 | address, value | the same |
//! | 16 | write multiple registers | 6.12 | first, count (1–123), bytes, values | first, count |
//!
//! Refusals come in the order of the state diagrams there: the function (exception 1), quantity and length (3),
//! addresses beyond 65535 (2), and then what [`Registers`] says.

/// Most bytes of a PDU (AP 4.1).
pub const MAX_BYTES: usize = 253;
/// Most registers in one read (AP 6.3, 6.4).
pub const MAX_READ: usize = 125;
/// Most registers in one write (AP 6.12).
pub const MAX_WRITE: usize = 123;

/// Function codes.
const READ_HOLDING: u8 = 3;
const READ_INPUT: u8 = 4;
const WRITE_SINGLE: u8 = 6;
const WRITE_MULTIPLE: u8 = 16;
/// Set in the function code of a refusal.
const REFUSED: u8 = 0x80;

/// Why a request is refused: an exception code (AP 7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exception(pub u8);

impl Exception {
    /// The function is not served.
    pub const ILLEGAL_FUNCTION: Self = Self(1);
    /// There are no such registers.
    pub const ILLEGAL_ADDRESS: Self = Self(2);
    /// The quantity, the length or a value is not allowed.
    pub const ILLEGAL_VALUE: Self = Self(3);
    /// The device failed while it carried the request out.
    pub const DEVICE_FAILURE: Self = Self(4);
    /// The device is at work; ask again later.
    pub const DEVICE_BUSY: Self = Self(6);
    /// The gateway got no answer from the unit behind it.
    pub const GATEWAY_TARGET_FAILED: Self = Self(11);
}

/// The two tables of 16-bit registers (AP 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// Holding registers: read and written.
    Holding,
    /// Input registers: read.
    Input,
}

/// What a device keeps in its registers. The addresses from `first` on do not go beyond 65535.
pub trait Registers {
    /// Fills `values` with the registers from `first` on, all of one moment.
    ///
    /// # Errors
    /// The exception that refuses the whole read.
    fn read(&self, table: Table, first: u16, values: &mut [u16]) -> Result<(), Exception>;

    /// Sets the holding registers from `first` on: all of them, or none.
    ///
    /// # Errors
    /// The exception that refuses the whole write.
    fn write(&mut self, first: u16, values: &[u16]) -> Result<(), Exception>;
}

/// Answers `request` in `reply`. Nothing is answered to nothing.
pub fn answer<'r>(
    request: &[u8],
    registers: &mut impl Registers,
    reply: &'r mut [u8; MAX_BYTES],
) -> &'r [u8] {
    let Some((&function, body)) = request.split_first() else { return &[] };
    let done = match function {
        READ_HOLDING => read(Table::Holding, body, registers, reply),
        READ_INPUT => read(Table::Input, body, registers, reply),
        WRITE_SINGLE => write_single(body, registers, reply),
        WRITE_MULTIPLE => write_multiple(body, registers, reply),
        _ => Err(Exception::ILLEGAL_FUNCTION),
    };
    match done {
        Ok(length) => {
            reply[0] = function;
            &reply[..=length]
        }
        Err(exception) => refuse(function, exception, reply),
    }
}

/// Refuses a request for `function`.
pub fn refuse(function: u8, exception: Exception, reply: &mut [u8; MAX_BYTES]) -> &[u8] {
    reply[..2].copy_from_slice(&[function | REFUSED, exception.0]);
    &reply[..2]
}

/// Writes the answer behind its function code; so do the next two. Returns its length.
fn read(table: Table, body: &[u8], registers: &impl Registers, reply: &mut [u8]) -> Result<usize, Exception> {
    let &[a, b, c, d] = body else { return Err(Exception::ILLEGAL_VALUE) };
    let (first, count) = block([a, b], [c, d], MAX_READ)?;
    let mut values = [0; MAX_READ];
    registers.read(table, first, &mut values[..count])?;
    reply[1] = (2 * count) as u8;
    for (place, value) in reply[2..].chunks_exact_mut(2).zip(&values[..count]) {
        place.copy_from_slice(&value.to_be_bytes());
    }
    Ok(1 + 2 * count)
}

fn write_single(body: &[u8], registers: &mut impl Registers, reply: &mut [u8]) -> Result<usize, Exception> {
    let &[a, b, c, d] = body else { return Err(Exception::ILLEGAL_VALUE) };
    registers.write(u16::from_be_bytes([a, b]), &[u16::from_be_bytes([c, d])])?;
    reply[1..5].copy_from_slice(body);
    Ok(4)
}

fn write_multiple(body: &[u8], registers: &mut impl Registers, reply: &mut [u8]) -> Result<usize, Exception> {
    let &[a, b, c, d, bytes, ref data @ ..] = body else { return Err(Exception::ILLEGAL_VALUE) };
    let (first, count) = block([a, b], [c, d], MAX_WRITE)?;
    if usize::from(bytes) != 2 * count || data.len() != 2 * count {
        return Err(Exception::ILLEGAL_VALUE);
    }
    let mut values = [0; MAX_WRITE];
    for (value, pair) in values.iter_mut().zip(data.chunks_exact(2)) {
        *value = u16::from_be_bytes([pair[0], pair[1]]);
    }
    registers.write(first, &values[..count])?;
    reply[1..5].copy_from_slice(&body[..4]);
    Ok(4)
}

/// The registers that a request means, when there can be so many.
fn block(first: [u8; 2], count: [u8; 2], most: usize) -> Result<(u16, usize), Exception> {
    let (first, count) = (u16::from_be_bytes(first), usize::from(u16::from_be_bytes(count)));
    if !(1..=most).contains(&count) {
        return Err(Exception::ILLEGAL_VALUE);
    }
    if usize::from(first) + count > 1 << 16 {
        return Err(Exception::ILLEGAL_ADDRESS);
    }
    Ok((first, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The registers of the specification's examples, and a device that refuses.
    struct Example {
        written: [u16; 2],
    }

    impl Registers for Example {
        fn read(&self, table: Table, first: u16, values: &mut [u16]) -> Result<(), Exception> {
            let shown: &[u16] = match (table, first) {
                (Table::Holding, 0x006b) => &[0x022b, 0x0000, 0x0064],
                (Table::Input, 0x0008) => &[0x000a],
                (Table::Input, 0x0063) => return Err(Exception::DEVICE_FAILURE),
                (Table::Input, 0xff83..) => &[0x1234; MAX_READ],
                _ => return Err(Exception::ILLEGAL_ADDRESS),
            };
            let shown = shown.get(..values.len()).ok_or(Exception::ILLEGAL_ADDRESS)?;
            values.copy_from_slice(shown);
            Ok(())
        }

        fn write(&mut self, first: u16, values: &[u16]) -> Result<(), Exception> {
            if first != 1 || values.len() > 2 {
                return Err(Exception::ILLEGAL_ADDRESS);
            }
            self.written[..values.len()].copy_from_slice(values);
            Ok(())
        }
    }

    #[track_caller]
    fn check(request: &[u8], wanted: &[u8], written: [u16; 2]) {
        let mut registers = Example { written: [0; 2] };
        let mut reply = [0xee; MAX_BYTES];
        assert_eq!(answer(request, &mut registers, &mut reply), wanted);
        assert_eq!(registers.written, written);
    }

    #[test]
    fn answers_the_examples_of_the_specification() {
        // AP 6.3: registers 108–110.
        check(&[0x03, 0x00, 0x6b, 0x00, 0x03], &[0x03, 0x06, 0x02, 0x2b, 0x00, 0x00, 0x00, 0x64], [0, 0]);
        // AP 6.4: input register 9.
        check(&[0x04, 0x00, 0x08, 0x00, 0x01], &[0x04, 0x02, 0x00, 0x0a], [0, 0]);
        // AP 6.6: register 2 to 00 03.
        check(&[0x06, 0x00, 0x01, 0x00, 0x03], &[0x06, 0x00, 0x01, 0x00, 0x03], [3, 0]);
        // AP 6.12: two registers from 2 on to 00 0A and 01 02.
        check(
            &[0x10, 0x00, 0x01, 0x00, 0x02, 0x04, 0x00, 0x0a, 0x01, 0x02],
            &[0x10, 0x00, 0x01, 0x00, 0x02],
            [0x0a, 0x0102],
        );
    }

    #[test]
    fn refuses_in_the_order_of_the_state_diagrams() {
        let refused = |request: &[u8], exception: Exception| {
            check(request, &[request[0] | 0x80, exception.0], [0, 0]);
        };
        // AP 7: coils are not served, whatever the address.
        refused(&[0x01, 0x04, 0xa1, 0x00, 0x01], Exception::ILLEGAL_FUNCTION);
        refused(&[0x00], Exception::ILLEGAL_FUNCTION);
        refused(&[0xff, 0x00], Exception::ILLEGAL_FUNCTION);
        // Quantities, before the address is looked at.
        refused(&[0x03, 0xff, 0xff, 0x00, 0x00], Exception::ILLEGAL_VALUE);
        refused(&[0x03, 0xff, 0xff, 0x00, 0x7e], Exception::ILLEGAL_VALUE);
        refused(&[0x10, 0x00, 0x01, 0x00, 0x00, 0x00], Exception::ILLEGAL_VALUE);
        // Lengths.
        refused(&[0x03], Exception::ILLEGAL_VALUE);
        refused(&[0x03, 0x00, 0x6b, 0x00, 0x03, 0x00], Exception::ILLEGAL_VALUE);
        refused(&[0x06, 0x00, 0x01, 0x00], Exception::ILLEGAL_VALUE);
        refused(&[0x10, 0x00, 0x01, 0x00, 0x01, 0x02, 0x00], Exception::ILLEGAL_VALUE);
        refused(&[0x10, 0x00, 0x01, 0x00, 0x01, 0x02, 0x00, 0x0a, 0x00, 0x0b], Exception::ILLEGAL_VALUE);
        refused(&[0x10, 0x00, 0x01, 0x00, 0x01, 0x04, 0x00, 0x0a], Exception::ILLEGAL_VALUE);
        // Addresses: 125 registers fit from 0xFF83 on, not from 0xFF84 on.
        refused(&[0x04, 0xff, 0x84, 0x00, 0x7d], Exception::ILLEGAL_ADDRESS);
        refused(&[0x03, 0x00, 0x6b, 0x00, 0x04], Exception::ILLEGAL_ADDRESS);
        refused(&[0x06, 0x00, 0x02, 0x00, 0x03], Exception::ILLEGAL_ADDRESS);
        refused(&[0x04, 0x00, 0x63, 0x00, 0x01], Exception::DEVICE_FAILURE);
    }

    #[test]
    fn the_largest_read_fits_and_nothing_is_answered_to_nothing() {
        let mut reply = [0; MAX_BYTES];
        let mut registers = Example { written: [0; 2] };
        let full = answer(&[0x04, 0xff, 0x83, 0x00, 0x7d], &mut registers, &mut reply);
        assert_eq!((full.len(), full[1]), (252, 250));
        assert_eq!(answer(&[], &mut registers, &mut reply), &[] as &[u8]);
    }
}
