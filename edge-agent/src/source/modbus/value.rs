//! From registers to a value (pure).
//!
//! Modbus carries 16-bit registers, high byte first; how a device lays wider numbers over them is its own affair.
//! The words of a number are put in the order of significance, then read as two's complement or IEEE 754.
//!
//! | layout of 0x0A0B0C0D | word order | byte order | also called |
//! |---|---|---|---|
//! | 0A0B 0C0D | big | big | ABCD, most devices |
//! | 0C0D 0A0B | little | big | CDAB, "word swap" |
//! | 0B0A 0D0C | big | little | BADC, "byte swap" |
//! | 0D0C 0B0A | little | little | DCBA |
//!
//! Integers of 64 bits beyond 2⁵³ lose their last digits in an `f64`.

/// What the bits mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum Form {
    /// One bit of a register, 0 to 15 from the least significant; a coil or discrete input is bit 0.
    Bit(u8),
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F32,
    F64,
}

impl Form {
    /// The form with this name in the configuration; `bit` is asked for by its number instead.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "u16" => Self::U16,
            "i16" => Self::I16,
            "u32" => Self::U32,
            "i32" => Self::I32,
            "u64" => Self::U64,
            "i64" => Self::I64,
            "f32" => Self::F32,
            "f64" => Self::F64,
            _ => return None,
        })
    }

    /// How many registers it takes.
    pub const fn words(self) -> u16 {
        match self {
            Self::Bit(_) | Self::U16 | Self::I16 => 1,
            Self::U32 | Self::I32 | Self::F32 => 2,
            Self::U64 | Self::I64 | Self::F64 => 4,
        }
    }

    /// The bit pattern of `code`, written as a signed or as an unsigned number; none where it does not fit.
    pub fn pattern(self, code: i64) -> Option<u64> {
        let bits = u32::from(self.words()) * 16;
        let mask = u64::MAX >> (64 - bits);
        let fits = bits == 64 || (-(1i64 << (bits - 1))..1i64 << bits).contains(&code);
        fits.then_some(code.cast_unsigned() & mask)
    }
}

/// How a value is laid out in its registers, and what it is worth.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoding {
    /// What the bits mean.
    pub form: Form,
    /// The word with the lowest address is the least significant one.
    pub little_words: bool,
    /// The low byte of each word comes first.
    pub little_bytes: bool,
    /// Bit patterns by which the device says that it has no value.
    pub no_value: Vec<u64>,
    /// The value is `raw * scale + offset`.
    pub scale: f64,
    /// See `scale`.
    pub offset: f64,
}

impl Encoding {
    /// The value in `words`, as many as the form takes; none where the device says so, or shows no finite number.
    pub fn decode(&self, words: &[u16]) -> Option<f64> {
        let bits = self.bits(words);
        if self.no_value.contains(&bits) {
            return None;
        }
        let raw = match self.form {
            Form::Bit(n) => f64::from((bits >> n & 1) as u8),
            Form::U16 | Form::U32 | Form::U64 => bits as f64,
            Form::I16 => f64::from(bits as i16),
            Form::I32 => f64::from(bits as i32),
            Form::I64 => bits.cast_signed() as f64,
            Form::F32 => f64::from(f32::from_bits(bits as u32)),
            Form::F64 => f64::from_bits(bits),
        };
        Some(raw * self.scale + self.offset).filter(|value| value.is_finite())
    }

    fn bits(&self, words: &[u16]) -> u64 {
        let join = |bits: u64, word: &u16| {
            let word = if self.little_bytes { word.swap_bytes() } else { *word };
            bits << 16 | u64::from(word)
        };
        if self.little_words { words.iter().rev().fold(0, join) } else { words.iter().fold(0, join) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(form: Form) -> Encoding {
        Encoding {
            form,
            little_words: false,
            little_bytes: false,
            no_value: Vec::new(),
            scale: 1.0,
            offset: 0.0,
        }
    }

    #[test]
    fn layouts() {
        let check = |words: &[u16], little_words, little_bytes, wanted: f64| {
            let encoding = Encoding { little_words, little_bytes, ..plain(Form::U32) };
            assert_eq!(encoding.decode(words), Some(wanted), "{words:04x?}");
        };
        let wanted = f64::from(0x0A0B_0C0D);
        check(&[0x0A0B, 0x0C0D], false, false, wanted);
        check(&[0x0C0D, 0x0A0B], true, false, wanted);
        check(&[0x0B0A, 0x0D0C], false, true, wanted);
        check(&[0x0D0C, 0x0B0A], true, true, wanted);
    }

    #[test]
    fn forms() {
        for (form, words, wanted) in [
            (Form::U16, &[0xFFFF][..], 65_535.0),
            (Form::I16, &[0xFFFF], -1.0),
            (Form::I16, &[0x8000], -32_768.0),
            (Form::I32, &[0xFFFF, 0xFFFE], -2.0),
            (Form::I64, &[0xFFFF, 0xFFFF, 0xFFFF, 0xFF00], -256.0),
            (Form::U64, &[0, 0, 1, 0], 65_536.0),
            // Eastron's protocol description: 230.2 V.
            (Form::F32, &[0x4366, 0x3334], 230.200_012_207_031_25),
            (Form::F64, &[0x4009, 0x21FB, 0x5444, 0x2D18], std::f64::consts::PI),
            (Form::Bit(0), &[0b1000_0000_0000_0101], 1.0),
            (Form::Bit(1), &[0b1000_0000_0000_0101], 0.0),
            (Form::Bit(15), &[0b1000_0000_0000_0101], 1.0),
        ] {
            assert_eq!(plain(form).decode(words), Some(wanted), "{form:?} {words:04x?}");
        }
    }

    #[test]
    fn scale_and_offset() {
        let tenths = Encoding { scale: 0.1, offset: -40.0, ..plain(Form::U16) };
        assert_eq!(tenths.decode(&[653]), Some(25.299_999_999_999_997));
    }

    #[test]
    fn what_means_no_value() {
        let check = |form: Form, code: i64, words: &[u16]| {
            let encoding = Encoding { no_value: vec![form.pattern(code).unwrap()], ..plain(form) };
            assert_eq!(encoding.decode(words), None, "{form:?} {code}");
        };
        check(Form::I16, 0x8000, &[0x8000]);
        check(Form::I16, -32_768, &[0x8000]);
        check(Form::U16, 0xFFFF, &[0xFFFF]);
        check(Form::U16, -1, &[0xFFFF]);
        check(Form::I32, 0x8000_0000, &[0x8000, 0]);
        check(Form::U64, -1, &[0xFFFF; 4]);
        check(Form::F32, 0x7F7F_FFFF, &[0x7F7F, 0xFFFF]);
        for not_finite in [&[0x7FC0, 0][..], &[0x7F80, 0], &[0xFF80, 0], &[0xFFFF, 0xFFFF]] {
            assert_eq!(plain(Form::F32).decode(not_finite), None);
        }
        assert_eq!(Encoding { no_value: vec![0x8000], ..plain(Form::U16) }.decode(&[0x8001]), Some(32_769.0));
    }

    #[test]
    fn a_code_must_fit() {
        for (form, code) in [(Form::U16, 65_536), (Form::I16, -32_769), (Form::F32, 1 << 32)] {
            assert_eq!(form.pattern(code), None, "{form:?} {code}");
        }
    }

    /// The registers that a device with this layout would show, by way of its memory.
    fn encode(big_endian: &[u8], encoding: &Encoding) -> Vec<u16> {
        let mut words: Vec<u16> =
            big_endian.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
        if encoding.little_bytes {
            words.iter_mut().for_each(|word| *word = u16::from_le_bytes(word.to_be_bytes()));
        }
        if encoding.little_words {
            words.reverse();
        }
        words
    }

    proptest! {
        #[test]
        fn decoding_undoes_encoding(bits: u64, little_words: bool, little_bytes: bool) {
            let check = |form: Form, big_endian: &[u8], wanted: f64| {
                let encoding = Encoding { little_words, little_bytes, ..plain(form) };
                let words = encode(big_endian, &encoding);
                prop_assert_eq!(words.len(), usize::from(form.words()));
                prop_assert_eq!(encoding.decode(&words), Some(wanted).filter(|v| v.is_finite()));
                Ok(())
            };
            // Narrower forms take the low bits.
            let (b16, b32) = (bits as u16, bits as u32);
            check(Form::U16, &b16.to_be_bytes(), f64::from(b16))?;
            check(Form::I16, &b16.to_be_bytes(), f64::from(b16.cast_signed()))?;
            check(Form::U32, &b32.to_be_bytes(), f64::from(b32))?;
            check(Form::I32, &b32.to_be_bytes(), f64::from(b32.cast_signed()))?;
            check(Form::F32, &b32.to_be_bytes(), f64::from(f32::from_bits(b32)))?;
            check(Form::U64, &bits.to_be_bytes(), bits as f64)?;
            check(Form::I64, &bits.to_be_bytes(), bits.cast_signed() as f64)?;
            check(Form::F64, &bits.to_be_bytes(), f64::from_bits(bits))?;
        }
    }
}
