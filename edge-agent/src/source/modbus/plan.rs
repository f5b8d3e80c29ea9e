//! Which registers are read together (pure).
//!
//! Registers of one slave, one table and one period are read in as few requests as its limits allow: a request goes
//! on as long as the next register begins within `max_gap` of its end and the whole stays within `max_registers`.
//! Every register is read by exactly one request, whole.

use std::time::Duration;

use common::reading::DeviceIx;

use super::value::Encoding;

/// Most registers in a request (Modbus application protocol V1.1b3, 6.3 and 6.4).
pub const MAX_REGISTERS: u16 = 125;
/// Most coils or discrete inputs in a request (6.1 and 6.2).
pub const MAX_BITS: u16 = 2_000;

/// The four tables of a slave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Bits that can be written; function 1.
    Coil,
    /// Bits; function 2.
    Discrete,
    /// Registers that can be written; function 3.
    Holding,
    /// Registers; function 4.
    Input,
}

impl Table {
    /// The table with this name in the configuration.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "coil" => Self::Coil,
            "discrete" => Self::Discrete,
            "holding" => Self::Holding,
            "input" => Self::Input,
            _ => return None,
        })
    }

    /// Its name in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Coil => "coil",
            Self::Discrete => "discrete",
            Self::Holding => "holding",
            Self::Input => "input",
        }
    }

    /// Whether it holds bits instead of registers.
    pub const fn is_bits(self) -> bool {
        matches!(self, Self::Coil | Self::Discrete)
    }
}

/// A value in a slave, and the device that it is a value of.
#[derive(Clone, Debug, PartialEq)]
pub struct Register {
    /// Where it stands.
    pub table: Table,
    /// Of its first word, from 0 as on the wire.
    pub address: u16,
    /// How often it is read.
    pub period: Duration,
    /// From its words to the device's unit.
    pub encoding: Encoding,
    /// The device.
    pub device: DeviceIx,
}

impl Register {
    /// One past its last word.
    fn end(&self) -> u32 {
        u32::from(self.address) + u32::from(self.encoding.form.words())
    }
}

/// What a slave takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most registers in a request, at least 4 and at most [`MAX_REGISTERS`]; bits have [`MAX_BITS`].
    pub max_registers: u16,
    /// Most registers or bits that are read though nobody asked for them, between two that are wanted.
    pub max_gap: u16,
}

/// One read of neighbouring registers of one slave.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The slave.
    pub unit: u8,
    /// The table.
    pub table: Table,
    /// The first register or bit.
    pub start: u16,
    /// How many.
    pub count: u16,
    /// How often.
    pub period: Duration,
    /// What is in it; never empty.
    pub registers: Vec<Register>,
}

impl Request {
    /// Every device of the request with its value in the answer `words`; for bits, a word a bit.
    pub fn values<'a>(&'a self, words: &'a [u16]) -> impl Iterator<Item = (DeviceIx, Option<f64>)> + 'a {
        self.registers.iter().map(|register| {
            let from = usize::from(register.address - self.start);
            let own = words.get(from..from + usize::from(register.encoding.form.words()));
            (register.device, own.and_then(|own| register.encoding.decode(own)))
        })
    }
}

/// The requests that read `registers` of the slave `unit`.
pub fn plan(unit: u8, limits: Limits, mut registers: Vec<Register>) -> Vec<Request> {
    registers.sort_by_key(|register| (register.period, register.table, register.address));
    let mut requests: Vec<Request> = Vec::new();
    for register in registers {
        let most = if register.table.is_bits() { MAX_BITS } else { limits.max_registers };
        if let Some(last) = requests.last_mut()
            && (last.period, last.table) == (register.period, register.table)
        {
            let end = u32::from(last.start) + u32::from(last.count);
            let count = end.max(register.end()) - u32::from(last.start);
            if u32::from(register.address) <= end + u32::from(limits.max_gap) && count <= u32::from(most) {
                last.count = u16::try_from(count).unwrap_or(most);
                last.registers.push(register);
                continue;
            }
        }
        requests.push(Request {
            unit,
            table: register.table,
            start: register.address,
            count: register.encoding.form.words(),
            period: register.period,
            registers: vec![register],
        });
    }
    requests
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::value::Form, *};

    fn register(table: Table, address: u16, form: Form, period_s: u64, device: u32) -> Register {
        let encoding = Encoding {
            form,
            little_words: false,
            little_bytes: false,
            no_value: Vec::new(),
            scale: 1.0,
            offset: 0.0,
        };
        let (period, device) = (Duration::from_secs(period_s), DeviceIx(device));
        Register { table, address, period, encoding, device }
    }

    /// (table, address, form) to (table, start, count).
    #[track_caller]
    fn check(limits: (u16, u16), given: &[(Table, u16, Form)], wanted: &[(Table, u16, u16)]) {
        let (max_registers, max_gap) = limits;
        let registers =
            given.iter().zip(0..).map(|((table, at, form), n)| register(*table, *at, *form, 1, n));
        let requests = plan(1, Limits { max_registers, max_gap }, registers.collect());
        let got: Vec<_> = requests.iter().map(|r| (r.table, r.start, r.count)).collect();
        assert_eq!(got, wanted);
    }

    #[test]
    fn neighbours_are_read_together() {
        use {Form::*, Table::*};
        check((125, 0), &[(Input, 2, F32), (Input, 0, F32), (Input, 4, U16)], &[(Input, 0, 5)]);
        check((125, 0), &[(Input, 0, F32), (Input, 3, U16)], &[(Input, 0, 2), (Input, 3, 1)]);
        check((125, 1), &[(Input, 0, F32), (Input, 3, U16)], &[(Input, 0, 4)]);
        check((125, 9), &[(Input, 0, U16), (Holding, 1, U16)], &[(Holding, 1, 1), (Input, 0, 1)]);
        check(
            (125, 0),
            &[(Coil, 0, Bit(0)), (Coil, 1, Bit(0)), (Coil, 3, Bit(0))],
            &[(Coil, 0, 2), (Coil, 3, 1)],
        );
        // Bits of one register, and a register read twice.
        check((125, 0), &[(Holding, 7, Bit(0)), (Holding, 7, Bit(9)), (Holding, 7, U16)], &[(Holding, 7, 1)]);
        // A short register inside a long one.
        check((125, 0), &[(Holding, 0, U64), (Holding, 1, U16), (Holding, 4, U16)], &[(Holding, 0, 5)]);
    }

    #[test]
    fn requests_stay_within_the_limits() {
        use {Form::*, Table::*};
        let floats = |n: u16| (0..n).map(|i| (Input, 2 * i, F32)).collect::<Vec<_>>();
        check((125, 0), &floats(70), &[(Input, 0, 124), (Input, 124, 16)]);
        check((60, 0), &floats(31), &[(Input, 0, 60), (Input, 60, 2)]);
        let bits: Vec<_> = (0..2_001).map(|i| (Discrete, i, Bit(0))).collect();
        check((60, 0), &bits, &[(Discrete, 0, 2_000), (Discrete, 2_000, 1)]);
        check((125, 0), &[(Holding, 65_532, F64)], &[(Holding, 65_532, 4)]);
        check(
            (125, u16::MAX),
            &[(Holding, 0, U16), (Holding, 65_535, U16)],
            &[(Holding, 0, 1), (Holding, 65_535, 1)],
        );
    }

    #[test]
    fn periods_are_apart() {
        let fast = register(Table::Input, 0, Form::U16, 1, 0);
        let slow = register(Table::Input, 1, Form::U16, 60, 1);
        let requests = plan(9, Limits { max_registers: 125, max_gap: 0 }, vec![slow, fast]);
        let got: Vec<_> = requests.iter().map(|r| (r.unit, r.period.as_secs(), r.start)).collect();
        assert_eq!(got, [(9, 1, 0), (9, 60, 1)]);
    }

    #[test]
    fn every_device_gets_its_own_words() {
        let registers =
            vec![register(Table::Input, 10, Form::U16, 1, 3), register(Table::Input, 12, Form::U32, 1, 4)];
        let requests = plan(1, Limits { max_registers: 125, max_gap: 1 }, registers);
        let values: Vec<_> = requests[0].values(&[7, 99, 1, 2]).collect();
        assert_eq!(values, [(DeviceIx(3), Some(7.0)), (DeviceIx(4), Some(65_538.0))]);
        // An answer that is too short gives no value, and no panic.
        let short: Vec<_> = requests[0].values(&[7, 99]).collect();
        assert_eq!(short, [(DeviceIx(3), Some(7.0)), (DeviceIx(4), None)]);
    }

    fn any_register() -> impl Strategy<Value = Register> {
        let forms = [Form::Bit(3), Form::U16, Form::I32, Form::F64];
        let registers = (0u16..400, 0..forms.len(), any::<bool>(), 1u64..3).prop_map(
            move |(address, form, input, period)| {
                let table = if input { Table::Input } else { Table::Holding };
                register(table, address, forms[form], period, 0)
            },
        );
        let bits = (0u16..5_000, 1u64..3)
            .prop_map(|(address, period)| register(Table::Coil, address, Form::Bit(0), period, 0));
        prop_oneof![3 => registers, 1 => bits]
    }

    proptest! {
        #[test]
        fn every_register_is_read_once_and_whole(
            mut registers in proptest::collection::vec(any_register(), 1..200),
            max_registers in 4u16..=125,
            max_gap in 0u16..30,
        ) {
            for (device, register) in (0..).zip(&mut registers) {
                register.device = DeviceIx(device);
            }
            let requests = plan(1, Limits { max_registers, max_gap }, registers.clone());
            let mut read: Vec<DeviceIx> = Vec::new();
            for request in &requests {
                let most = if request.table.is_bits() { MAX_BITS } else { max_registers };
                prop_assert!((1..=most).contains(&request.count));
                let (first, end) = (u32::from(request.start), u32::from(request.start) + u32::from(request.count));
                let mut wanted = vec![false; usize::from(request.count)];
                for register in &request.registers {
                    prop_assert_eq!((register.table, register.period), (request.table, request.period));
                    prop_assert!(first <= u32::from(register.address) && register.end() <= end);
                    wanted[usize::from(register.address - request.start)..]
                        [..usize::from(register.encoding.form.words())].fill(true);
                    read.push(register.device);
                }
                // Both ends are wanted, and no gap is wider than allowed.
                prop_assert!(wanted[0] && wanted[wanted.len() - 1]);
                let gaps = wanted.split(|wanted| *wanted).map(<[bool]>::len);
                prop_assert!(gaps.max().unwrap_or(0) <= usize::from(max_gap));
            }
            read.sort();
            prop_assert_eq!(read, (0..registers.len() as u32).map(DeviceIx).collect::<Vec<_>>());
        }
    }
}
