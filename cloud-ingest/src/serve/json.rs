//! Rows as JSON: `null`, booleans, numbers and text; instants are RFC 3339 in UTC, numbers that JSON does not
//! have (NaN, infinities) are `null`.

use arrow::{
    array::{Array, AsArray, RecordBatch},
    datatypes::{DataType, Float64Type, Int32Type, Int64Type, SchemaRef, TimeUnit, TimestampMicrosecondType},
    util::display::{ArrayFormatter, FormatOptions},
};
use common::time::Timestamp;
use datafusion_postgres::arrow_pg::datatypes::into_pg_type;
use serde_json::{Map, Value, json};

/// `[{"name", "type"}]` with the types' PostgreSQL names.
pub fn columns(schema: &SchemaRef) -> Value {
    let column = |field: &std::sync::Arc<arrow::datatypes::Field>| {
        let name =
            into_pg_type(field.data_type()).map_or_else(|_| "text".to_owned(), |t| t.name().to_owned());
        json!({ "name": field.name(), "type": name })
    };
    schema.fields().iter().map(column).collect()
}

/// One array of values for each row.
pub fn rows(batches: &[RecordBatch]) -> Vec<Value> {
    let arrays = |batch: &RecordBatch| {
        let columns: Vec<Vec<Value>> = batch.columns().iter().map(|column| values(column)).collect();
        (0..batch.num_rows())
            .map(|row| columns.iter().map(|column| column[row].clone()).collect::<Value>())
            .collect::<Vec<_>>()
    };
    batches.iter().flat_map(arrays).collect()
}

/// One object for each row.
pub fn objects(batches: &[RecordBatch]) -> Vec<Map<String, Value>> {
    let mut out = Vec::new();
    for batch in batches {
        let start = out.len();
        out.resize_with(start + batch.num_rows(), Map::new);
        for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
            for (object, value) in out[start..].iter_mut().zip(values(column)) {
                object.insert(field.name().clone(), value);
            }
        }
    }
    out
}

fn values(column: &dyn Array) -> Vec<Value> {
    let each = |value: &dyn Fn(usize) -> Value| -> Vec<Value> {
        (0..column.len()).map(|row| if column.is_valid(row) { value(row) } else { Value::Null }).collect()
    };
    match column.data_type() {
        DataType::Boolean => each(&|row| column.as_boolean().value(row).into()),
        DataType::Int32 => each(&|row| column.as_primitive::<Int32Type>().value(row).into()),
        DataType::Int64 => each(&|row| column.as_primitive::<Int64Type>().value(row).into()),
        // `From<f64>` makes NaN and infinities null.
        DataType::Float64 => each(&|row| column.as_primitive::<Float64Type>().value(row).into()),
        DataType::Utf8 => each(&|row| column.as_string::<i32>().value(row).into()),
        DataType::Timestamp(TimeUnit::Microsecond, Some(_)) => each(&|row| {
            let micros = column.as_primitive::<TimestampMicrosecondType>().value(row);
            Timestamp::from_micros(micros).to_string().into()
        }),
        _ => match ArrayFormatter::try_new(column, &FormatOptions::default()) {
            Ok(formatter) => each(&|row| formatter.value(row).to_string().into()),
            Err(_) => each(&|_| Value::Null),
        },
    }
}
