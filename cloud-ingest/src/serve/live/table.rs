//! The last minutes as SQL sees them: the tables of the schema `live`, as they are when a scan is planned.
//!
//! A million readings as rows are more than a query may hold, and most queries want few of them. So a scan makes the
//! columns that are asked for, of the devices that the filters leave, in batches.

use std::sync::Arc;

use arrow::{
    array::{
        ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, RecordBatch, RecordBatchOptions,
        StringArray, TimestampMicrosecondArray,
    },
    datatypes::{DataType, Field, Schema, SchemaRef},
    error::ArrowError,
};
use async_trait::async_trait;
use common::{time::Timestamp, wire::instant};
use datafusion::{
    catalog::{MemTable, Session, TableProvider},
    common::DFSchema,
    datasource::TableType,
    error::{DataFusionError, Result as PlanResult},
    logical_expr::{Expr, TableProviderFilterPushDown},
    physical_expr::PhysicalExpr,
    physical_plan::ExecutionPlan,
};

use super::{Live, Point, Ring};

/// Rows of one batch.
const BATCH: usize = 8_192;
/// Columns of `live.readings` that are one value for each device, by position.
const OF_DEVICE: [usize; 5] = [1, 2, 3, 4, 6];

/// Columns of `live.readings`.
pub fn readings_schema() -> SchemaRef {
    let text = |name: &str| Field::new(name, DataType::Utf8, false);
    Arc::new(Schema::new(vec![
        Field::new("ts", instant(), false),
        text("site"),
        text("device_id"),
        text("device_type"),
        text("asset_id"),
        Field::new("value", DataType::Float64, true),
        text("unit"),
        text("quality"),
        Field::new("received_at", instant(), false),
    ]))
}

/// Columns of `live.status`.
pub fn status_schema() -> SchemaRef {
    let text = |name: &str| Field::new(name, DataType::Utf8, false);
    Arc::new(Schema::new(vec![
        text("site"),
        text("gateway_id"),
        Field::new("online", DataType::Boolean, false),
        Field::new("last_heard", instant(), false),
        Field::new("unknown_since", instant(), true),
        text("version"),
        text("epoch"),
        Field::new("outbox", DataType::Int64, true),
    ]))
}

/// A reading, and whose it is.
#[derive(Clone, Copy)]
struct Row<'a> {
    site: &'a str,
    device: &'a str,
    ring: &'a Ring,
    point: &'a Point,
}

impl Live {
    /// `live.readings` as it is now: the columns at these positions, of the devices for which `wanted` is true. It is
    /// asked once, with one row a device and the columns that are the same in all readings of a device.
    ///
    /// # Errors
    /// Never, as long as the columns are those of [`readings_schema`].
    pub fn readings(
        &self,
        columns: &[usize],
        wanted: impl FnOnce(&RecordBatch) -> BooleanArray,
    ) -> Result<Vec<RecordBatch>, ArrowError> {
        let state = self.read();
        let devices = state.devices.iter().filter_map(|((site, device), ring)| {
            let point = ring.points.back()?;
            Some(Row { site, device, ring, point })
        });
        let devices: Vec<Row<'_>> = devices.collect();
        let wanted = wanted(&batch(&OF_DEVICE, &devices)?);
        let devices = devices.iter().zip(&wanted).filter(|(_, wanted)| *wanted == Some(true));
        let mut rows = devices.flat_map(|(row, _)| row.ring.points.iter().map(|point| Row { point, ..*row }));
        let mut batches = Vec::new();
        loop {
            let next: Vec<Row<'_>> = rows.by_ref().take(BATCH).collect();
            if next.is_empty() {
                return Ok(batches);
            }
            batches.push(batch(columns, &next)?);
        }
    }

    /// `live.status` as it is now.
    ///
    /// # Errors
    /// Never, as long as the columns are those of [`status_schema`].
    pub fn status(&self) -> Result<RecordBatch, ArrowError> {
        let all = self.gateways();
        let columns: Vec<ArrayRef> = vec![
            texts(all.iter().map(|gateway| gateway.site.as_str())),
            texts(all.iter().map(|gateway| gateway.gateway_id.as_str())),
            Arc::new(BooleanArray::from_iter(all.iter().map(|gateway| Some(gateway.online)))),
            instants(all.iter().map(|gateway| Some(gateway.last_heard))),
            instants(all.iter().map(|gateway| gateway.unknown_since)),
            texts(all.iter().map(|gateway| gateway.version.as_str())),
            texts(all.iter().map(|gateway| gateway.epoch.as_str())),
            Arc::new(Int64Array::from_iter(
                all.iter().map(|gateway| gateway.outbox.and_then(|n| i64::try_from(n).ok())),
            )),
        ];
        RecordBatch::try_new(status_schema(), columns)
    }
}

/// Columns of `live.readings` by their positions.
fn batch(columns: &[usize], rows: &[Row<'_>]) -> Result<RecordBatch, ArrowError> {
    let column = |position: &usize| match position {
        0 => instants(rows.iter().map(|row| Some(row.point.ts))),
        1 => texts(rows.iter().map(|row| row.site)),
        2 => texts(rows.iter().map(|row| row.device)),
        3 => texts(rows.iter().map(|row| row.ring.device_type.as_ref())),
        4 => texts(rows.iter().map(|row| row.ring.asset.as_ref())),
        5 => Arc::new(Float64Array::from_iter(rows.iter().map(|row| row.point.value))),
        6 => texts(rows.iter().map(|row| row.ring.unit.as_ref())),
        7 => texts(rows.iter().map(|row| row.point.quality.as_str())),
        _ => instants(rows.iter().map(|row| Some(row.point.received_at))),
    };
    let schema = Arc::new(readings_schema().project(columns)?);
    let count = RecordBatchOptions::new().with_row_count(Some(rows.len()));
    RecordBatch::try_new_with_options(schema, columns.iter().map(column).collect(), &count)
}

fn texts<'a>(values: impl Iterator<Item = &'a str>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

fn instants(values: impl Iterator<Item = Option<Timestamp>>) -> ArrayRef {
    let micros = values.map(|ts| ts.map(Timestamp::as_micros));
    Arc::new(TimestampMicrosecondArray::from_iter(micros).with_timezone("UTC"))
}

/// The tables of the schema `live`.
pub(crate) fn tables(live: &Live) -> [(&'static str, Arc<dyn TableProvider>); 2] {
    let (readings, status) = (LiveTable::Readings(live.clone()), LiveTable::Status(live.clone()));
    [("readings", Arc::new(readings)), ("status", Arc::new(status))]
}

#[derive(Debug)]
enum LiveTable {
    Readings(Live),
    Status(Live),
}

#[async_trait]
impl TableProvider for LiveTable {
    fn schema(&self) -> SchemaRef {
        match self {
            Self::Readings(_) => readings_schema(),
            Self::Status(_) => status_schema(),
        }
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    /// Those that tell devices apart. They are applied once more to what is left.
    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> PlanResult<Vec<TableProviderFilterPushDown>> {
        let schema = self.schema();
        let of_device =
            |name: &str| schema.index_of(name).is_ok_and(|position| OF_DEVICE.contains(&position));
        let support = |filter: &&Expr| {
            let columns = filter.column_refs();
            let of_device = !columns.is_empty() && columns.iter().all(|column| of_device(&column.name));
            match self {
                Self::Readings(_) if of_device && !filter.is_volatile() => {
                    TableProviderFilterPushDown::Inexact
                }
                _ => TableProviderFilterPushDown::Unsupported,
            }
        };
        Ok(filters.iter().map(support).collect())
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> PlanResult<Arc<dyn ExecutionPlan>> {
        let Self::Readings(live) = self else { return self.scan_status(state, projection, limit).await };
        let columns: Vec<usize> = projection.cloned().unwrap_or_else(|| (0..9).collect());
        let schema = Arc::new(readings_schema().project(&columns)?);
        let devices = DFSchema::try_from(readings_schema().project(&OF_DEVICE)?)?;
        // One that cannot be made leaves all devices.
        let filters: Vec<Arc<dyn PhysicalExpr>> = filters
            .iter()
            .filter_map(|filter| state.create_physical_expr(filter.clone(), &devices).ok())
            .collect();
        let live = live.clone();
        // A million rows take their time, in which the other tasks of this thread go on.
        let made =
            tokio::task::spawn_blocking(move || live.readings(&columns, |devices| all(&filters, devices)));
        let batches = made.await.map_err(|e| DataFusionError::External(e.into()))??;
        MemTable::try_new(schema, vec![batches])?.scan(state, None, &[], limit).await
    }
}

impl LiveTable {
    async fn scan_status(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        limit: Option<usize>,
    ) -> PlanResult<Arc<dyn ExecutionPlan>> {
        let (Self::Readings(live) | Self::Status(live)) = self;
        let table = MemTable::try_new(status_schema(), vec![vec![live.status()?]])?;
        table.scan(state, projection, &[], limit).await
    }
}

/// The devices that all filters leave; one that fails will fail on the rows too, and say so there.
fn all(filters: &[Arc<dyn PhysicalExpr>], devices: &RecordBatch) -> BooleanArray {
    let mut left = vec![true; devices.num_rows()];
    for filter in filters {
        let Ok(passed) = filter.evaluate(devices).and_then(|value| value.into_array(devices.num_rows()))
        else {
            continue;
        };
        let Some(passed) = passed.as_boolean_opt() else { continue };
        left.iter_mut().zip(passed).for_each(|(left, passed)| *left &= passed == Some(true));
    }
    left.into()
}
