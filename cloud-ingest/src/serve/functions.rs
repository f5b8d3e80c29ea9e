//! Functions of PostgreSQL and TimescaleDB that clients expect and DataFusion lacks.
//!
//! `time_bucket(width, t)` is what Grafana writes for `$__timeGroup` with TimescaleDB switched on; it becomes
//! `date_bin` from TimescaleDB's origin, Monday 2000-01-03, while the plan is made. The others tell clients what
//! they ask for when they connect.

use std::sync::Arc;

use arrow::{
    array::{AsArray, StringArray, StringBuilder},
    compute::kernels::cast_utils::parse_interval_month_day_nano,
    datatypes::{DataType, TimeUnit},
};
use datafusion::{
    common::{exec_err, plan_err},
    error::Result,
    functions::expr_fn::date_bin,
    logical_expr::{
        ColumnarValue, Expr, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, TypeSignature,
        Volatility, cast, create_udf, lit,
        simplify::{ExprSimplifyResult, SimplifyContext},
    },
    prelude::SessionContext,
    scalar::ScalarValue,
};

use super::catalog::DEFAULT_SCHEMA;

/// The version of PostgreSQL that clients may take this for.
pub(super) const POSTGRES_VERSION: &str = "16.6";
/// [`POSTGRES_VERSION`] as `server_version_num` has it.
const POSTGRES_VERSION_NUM: &str = "160006";
/// 2000-01-03T00:00:00Z in nanoseconds, which `date_bin` insists on: TimescaleDB's origin of buckets.
const BUCKET_ORIGIN: i64 = 946_857_600_000_000_000;

/// Makes the functions known to a session.
pub(crate) fn register(context: &SessionContext) {
    context.register_udf(ScalarUDF::from(TimeBucket::new()));
    context.register_udf(ScalarUDF::from(CurrentSetting::new()));
    context.register_udf(constant("version", || {
        let version = env!("CARGO_PKG_VERSION");
        format!("PostgreSQL {POSTGRES_VERSION} (Tailrace {version})")
    }));
    // As the session's default, whatever the catalogue's own function says.
    context.register_udf(constant("current_schema", || DEFAULT_SCHEMA.to_owned()));
    context.register_udf(create_udf(
        "pg_is_in_recovery",
        vec![],
        DataType::Boolean,
        Volatility::Immutable,
        Arc::new(|_| Ok(ColumnarValue::Scalar(ScalarValue::Boolean(Some(false))))),
    ));
    // Comments on objects, of which there are none.
    for (name, arguments) in [("obj_description", 2), ("shobj_description", 2), ("col_description", 2)] {
        context.register_udf(ScalarUDF::from(NoText { name, signature: any_arguments(1..=arguments) }));
    }
}

fn constant(name: &'static str, text: impl Fn() -> String) -> ScalarUDF {
    let value = ScalarValue::Utf8(Some(text()));
    let answer = move |_: &[ColumnarValue]| Ok(ColumnarValue::Scalar(value.clone()));
    create_udf(name, vec![], DataType::Utf8, Volatility::Immutable, Arc::new(answer))
}

fn any_arguments(counts: std::ops::RangeInclusive<usize>) -> Signature {
    Signature::one_of(counts.map(TypeSignature::Any).collect(), Volatility::Stable)
}

/// `time_bucket('60.000s', t)`.
#[derive(Debug, PartialEq, Eq, Hash)]
struct TimeBucket {
    signature: Signature,
}

impl TimeBucket {
    fn new() -> Self {
        Self { signature: any_arguments(2..=2) }
    }
}

impl ScalarUDFImpl for TimeBucket {
    fn name(&self) -> &str {
        "time_bucket"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, arguments: &[DataType]) -> Result<DataType> {
        match &arguments[1] {
            DataType::Timestamp(_, zone) => Ok(DataType::Timestamp(TimeUnit::Microsecond, zone.clone())),
            other => plan_err!("time_bucket needs a timestamp, not {other}"),
        }
    }

    fn simplify(&self, mut arguments: Vec<Expr>, info: &SimplifyContext) -> Result<ExprSimplifyResult> {
        let (Some(time), Some(width)) = (arguments.pop(), arguments.pop()) else {
            return plan_err!("time_bucket needs a width and a timestamp");
        };
        let width = match &width {
            Expr::Literal(ScalarValue::IntervalMonthDayNano(Some(_)), _) => width,
            Expr::Literal(value, _) => match value.try_as_str() {
                Some(Some(text)) => lit(ScalarValue::IntervalMonthDayNano(Some(
                    parse_interval_month_day_nano(&spaced(text))
                        .map_err(|e| datafusion::error::DataFusionError::Plan(format!("time_bucket: {e}")))?,
                ))),
                _ => return plan_err!("time_bucket needs a width such as '5 minutes', not {value}"),
            },
            // Casts of literals are folded in a later round.
            _ => return Ok(ExprSimplifyResult::Original(vec![width, time])),
        };
        let micros = self.return_type(&[DataType::Null, info.get_data_type(&time)?])?;
        let DataType::Timestamp(_, zone) = &micros else {
            return plan_err!("time_bucket needs a timestamp");
        };
        let origin = lit(ScalarValue::TimestampNanosecond(Some(BUCKET_ORIGIN), zone.clone()));
        let time = if info.get_data_type(&time)? == micros { time } else { cast(time, micros.clone()) };
        Ok(ExprSimplifyResult::Simplified(date_bin(width, time, origin)))
    }

    fn invoke_with_args(&self, _: ScalarFunctionArgs) -> Result<ColumnarValue> {
        exec_err!("time_bucket needs a width that is a constant, such as '5 minutes'")
    }
}

/// Grafana writes `60.000s`, arrow reads `60.000 s`.
fn spaced(width: &str) -> String {
    let mut out = String::with_capacity(width.len() + 2);
    let mut digit_before = false;
    for c in width.chars() {
        if digit_before && c.is_ascii_alphabetic() {
            out.push(' ');
        }
        digit_before = c.is_ascii_digit() || c == '.';
        out.push(c);
    }
    out
}

/// `current_setting(name [, missing_ok])`.
#[derive(Debug, PartialEq, Eq, Hash)]
struct CurrentSetting {
    signature: Signature,
}

impl CurrentSetting {
    fn new() -> Self {
        Self { signature: any_arguments(1..=2) }
    }
}

/// What PostgreSQL's parameter of this name is here, when it is always the same.
pub(super) fn setting(name: &str) -> Option<&'static str> {
    Some(match name.to_ascii_lowercase().as_str() {
        "server_version" => POSTGRES_VERSION,
        "server_version_num" => POSTGRES_VERSION_NUM,
        "search_path" => DEFAULT_SCHEMA,
        "timezone" => "UTC",
        "server_encoding" | "client_encoding" => "UTF8",
        "standard_conforming_strings"
        | "transaction_read_only"
        | "default_transaction_read_only"
        | "integer_datetimes" => "on",
        "is_superuser" => "off",
        "max_identifier_length" => "63",
        "block_size" => "8192",
        _ => return None,
    })
}

impl ScalarUDFImpl for CurrentSetting {
    fn name(&self) -> &str {
        "current_setting"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Utf8)
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let missing_ok = arguments
            .args
            .get(1)
            .is_some_and(|flag| matches!(flag, ColumnarValue::Scalar(ScalarValue::Boolean(Some(true)))));
        let names = arguments.args[0].to_array(arguments.number_rows)?;
        let names = arrow::compute::cast(&names, &DataType::Utf8)?;
        let names: &StringArray = names.as_string();
        let mut out = StringBuilder::new();
        for name in names {
            match name.map(|n| (n, setting(n))) {
                Some((_, Some(value))) => out.append_value(value),
                Some((unknown, None)) if !missing_ok => {
                    return exec_err!("unrecognized configuration parameter {unknown:?}");
                }
                _ => out.append_null(),
            }
        }
        Ok(ColumnarValue::Array(Arc::new(out.finish())))
    }
}

/// A function whose answer is always null.
#[derive(Debug, PartialEq, Eq, Hash)]
struct NoText {
    name: &'static str,
    signature: Signature,
}

impl ScalarUDFImpl for NoText {
    fn name(&self) -> &str {
        self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Utf8)
    }

    fn invoke_with_args(&self, _: ScalarFunctionArgs) -> Result<ColumnarValue> {
        Ok(ColumnarValue::Scalar(ScalarValue::Utf8(None)))
    }
}
