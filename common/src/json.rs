//! JSON of other people's devices: what is taken for an instant, a number, a quality.
//!
//! | | taken | read as |
//! |---|---|---|
//! | instant | text | RFC 3339, or one of the numbers below as text |
//! | | number | since 1970: below 10¹¹ seconds, below 10¹⁴ milliseconds, below 10¹⁷ microseconds |
//! | number | number, number as text, boolean | itself, false as 0, true as 1 |
//! | quality | `good`, `uncertain`, `bad` in any case, or 0, 1, 2 | the severity of that name or code |
//! | | null | good: nothing was said against it |
//!
//! Ten digits are seconds until the year 5138, thirteen are milliseconds and sixteen microseconds until then, so the
//! three do not meet; nanoseconds, with nineteen, are none of them.

use serde_json::Value;

use crate::{reading::Quality, time::Timestamp};

/// An instant; none for anything else.
pub fn instant(value: &Value) -> Option<Timestamp> {
    match value {
        Value::String(text) => text.parse().ok().or_else(|| {
            let text = text.trim();
            match text.parse::<i64>() {
                Ok(number) => whole(number),
                Err(_) => fractional(text.parse().ok()?),
            }
        }),
        Value::Number(number) => match number.as_i64() {
            Some(number) => whole(number),
            None => fractional(number.as_f64()?),
        },
        _ => None,
    }
}

fn whole(number: i64) -> Option<Timestamp> {
    let scale = match number.unsigned_abs() {
        0..100_000_000_000 => 1_000_000,
        100_000_000_000..100_000_000_000_000 => 1_000,
        100_000_000_000_000..100_000_000_000_000_000 => 1,
        _ => return None,
    };
    number.checked_mul(scale).map(Timestamp::from_micros)
}

fn fractional(number: f64) -> Option<Timestamp> {
    let scale = match number.abs() {
        size if size < 1e11 => 1e6,
        size if size < 1e14 => 1e3,
        size if size < 1e17 => 1.0,
        // Not a number is among them.
        _ => return None,
    };
    Some(Timestamp::from_micros((number * scale).round() as i64))
}

/// A number; none for anything else. Text may say `NaN` or `inf`: the caller judges that.
pub fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Bool(on) => Some(f64::from(u8::from(*on))),
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// A quality; none for a word or code that is none of the three.
pub fn quality(value: &Value) -> Option<Quality> {
    match value {
        Value::Null => Some(Quality::Good),
        Value::String(word) => {
            let all = [Quality::Good, Quality::Uncertain, Quality::Bad];
            all.into_iter().find(|quality| word.eq_ignore_ascii_case(quality.as_str()))
        }
        Value::Number(code) => code.as_u64().and_then(|code| Quality::from_code(code.try_into().ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn instants() {
        for (value, micros) in [
            (json!("2026-03-01T06:00:00Z"), Some(1_772_344_800_000_000)),
            (json!("2026-03-01T07:00:00.25+01:00"), Some(1_772_344_800_250_000)),
            (json!(1_772_344_800), Some(1_772_344_800_000_000)),
            (json!(1_772_344_800.25), Some(1_772_344_800_250_000)),
            (json!(1_772_344_800_123i64), Some(1_772_344_800_123_000)),
            (json!("1772344800123456"), Some(1_772_344_800_123_456)),
            (json!(" 1772344800.5 "), Some(1_772_344_800_500_000)),
            (json!(-1), Some(-1_000_000)),
            (json!(99_999_999_999i64), Some(99_999_999_999_000_000)),
            (json!(100_000_000_000i64), Some(100_000_000_000_000)),
            (json!(99_999_999_999_999_999i64), Some(99_999_999_999_999_999)),
            (json!(1_772_344_800_123_456_789i64), None),
            (json!(u64::MAX), None),
            (json!(1e300), None),
            (json!("NaN"), None),
            (json!("yesterday"), None),
            (json!(true), None),
            (json!(null), None),
        ] {
            assert_eq!(instant(&value).map(Timestamp::as_micros), micros, "{value}");
        }
    }

    #[test]
    fn numbers() {
        for (value, expected) in [
            (json!(21.5), Some(21.5)),
            (json!(" -1e3 "), Some(-1000.0)),
            (json!(true), Some(1.0)),
            (json!("warm"), None),
            (json!(""), None),
            (json!([1]), None),
            (json!(null), None),
        ] {
            assert_eq!(number(&value), expected, "{value}");
        }
        assert!(number(&json!("NaN")).is_some_and(f64::is_nan));
    }

    #[test]
    fn qualities() {
        for (value, expected) in [
            (json!(null), Some(Quality::Good)),
            (json!("Good"), Some(Quality::Good)),
            (json!("UNCERTAIN"), Some(Quality::Uncertain)),
            (json!(2), Some(Quality::Bad)),
            (json!(3), None),
            (json!(-1), None),
            (json!(300), None),
            (json!(1.0), None),
            (json!("fair"), None),
            (json!({}), None),
        ] {
            assert_eq!(quality(&value), expected, "{value}");
        }
    }
}
