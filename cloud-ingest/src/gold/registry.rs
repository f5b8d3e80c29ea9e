//! `gold/assets` and `gold/devices`: the newest registry document of each gateway.
//!
//! A machine or device that two gateways of a site name is the one of the newer document. One that its gateway no
//! longer names is gone. `updated_at` is when the document was written, by the gateway's clock; one that claims to be
//! of the future is as new as its receipt, so that what follows it counts.
//!
//! A gateway sends its document at every connection, so silver has very many; the newest ones alone are read.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use arrow::{
    array::{ArrayRef, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray},
    error::ArrowError,
};
use common::{
    documents::Devices,
    reading::{Asset, Device},
    time::Timestamp,
};
use deltalake::DeltaTable;
use object_store::path::Path;
use parquet::arrow::arrow_reader::RowSelection;

use super::{
    changes,
    parts::Chosen,
    publish::{self, Keyed, Progress, SILVER},
    scan::{self, Scan},
    series::{Words, micros},
};
use crate::{lake::Table, tables::Tables};

const ASSETS: Keyed = Keyed { table: Table::Assets, time: None, closed: None, key: &["site", "asset_id"] };
const DEVICES: Keyed = Keyed { table: Table::Devices, time: None, closed: None, key: &["site", "device_id"] };

/// What gateways say of themselves, by (site, id).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plant {
    /// The machines.
    pub assets: BTreeMap<(String, String), Named<Asset>>,
    /// The measured quantities.
    pub devices: BTreeMap<(String, String), Named<Device>>,
}

/// Something that a gateway named.
#[derive(Clone, Debug, PartialEq)]
pub struct Named<T> {
    /// What.
    pub what: T,
    /// By which gateway.
    pub gateway: String,
    /// When its document was written.
    pub at: Timestamp,
}

/// A registry document as silver holds it.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "as the columns of silver/registry")]
pub struct Document {
    pub site: String,
    pub gateway: String,
    pub at: Timestamp,
    pub received_at: Timestamp,
    pub document: Devices,
}

/// What makes one document newer than another.
fn age(at: Timestamp, received_at: Timestamp) -> (Timestamp, Timestamp) {
    (at.min(received_at), received_at)
}

/// A row of silver: how old its document is, and where it lies.
type Place = ((Timestamp, Timestamp), Path, usize);

impl Plant {
    /// From the newest document of each gateway, in any order.
    pub fn of(documents: impl IntoIterator<Item = Document>) -> Plant {
        let mut documents: Vec<Document> = documents.into_iter().collect();
        let order = |d: &Document| (age(d.at, d.received_at), d.gateway.clone());
        documents.sort_by_cached_key(order);
        let mut plant = Plant::default();
        for Document { site, gateway, at, document, .. } in documents {
            for what in document.assets {
                let key = (site.clone(), what.id.clone());
                plant.assets.insert(key, Named { what, gateway: gateway.clone(), at });
            }
            for what in document.devices {
                let key = (site.clone(), what.id.clone());
                plant.devices.insert(key, Named { what, gateway: gateway.clone(), at });
            }
        }
        plant
    }

    /// As silver has it now.
    ///
    /// # Errors
    /// When silver cannot be read.
    pub async fn read(silver: &DeltaTable) -> anyhow::Result<Plant> {
        let all = Timestamp::default()..Timestamp::from_micros(i64::MAX);
        let whose = ["site", "gateway_id", "at", "received_at"];
        let rows = Scan { snapshot: silver, columns: &whose, time: "received_at", span: all, of: None };
        let of = Some(newest(&rows).await?);
        let columns = ["site", "gateway_id", "at", "received_at", "document"];
        let mut documents = Vec::new();
        scan::scan(&Scan { columns: &columns, of, ..rows }, |batch| {
            let [site, gateway, document] =
                [Words::of(batch, "site")?, Words::of(batch, "gateway_id")?, Words::of(batch, "document")?];
            let (at, received_at) = (micros(batch, "at")?, micros(batch, "received_at")?);
            for row in 0..batch.num_rows() {
                let text = |words: &Words| words.value(row).unwrap_or("").to_owned();
                match serde_json::from_str(document.value(row).unwrap_or("")) {
                    Ok(parsed) => documents.push(Document {
                        site: text(&site),
                        gateway: text(&gateway),
                        at: Timestamp::from_micros(at.value(row)),
                        received_at: Timestamp::from_micros(received_at.value(row)),
                        document: parsed,
                    }),
                    Err(error) => {
                        let (site, gateway) = (text(&site), text(&gateway));
                        tracing::warn!(site, gateway, %error, "a registry document cannot be read; skipped");
                    }
                }
            }
            Ok(())
        })
        .await?;
        Ok(Plant::of(documents))
    }
}

/// Where the newest document of each gateway lies.
async fn newest(rows: &Scan<'_>) -> anyhow::Result<Chosen> {
    let mut newest: HashMap<(String, String), Place> = HashMap::new();
    // Of each file, its rows until now.
    let mut seen: HashMap<Path, usize> = HashMap::new();
    scan::whole(rows, |file, batch| {
        let (site, gateway) = (Words::of(batch, "site")?, Words::of(batch, "gateway_id")?);
        let (at, received_at) = (micros(batch, "at")?, micros(batch, "received_at")?);
        let before = seen.entry(file.path.clone()).or_default();
        for row in 0..batch.num_rows() {
            let instant = |of: &TimestampMicrosecondArray| Timestamp::from_micros(of.value(row));
            let age = age(instant(&at), instant(&received_at));
            let text = |words: &Words| words.value(row).unwrap_or("").to_owned();
            let known = newest.entry((text(&site), text(&gateway)));
            let place = || (age, file.path.clone(), *before + row);
            let known = known.or_insert_with(place);
            if known.0 < age {
                *known = place();
            }
        }
        *before += batch.num_rows();
        Ok(())
    })
    .await?;
    let mut rows_of: BTreeMap<Path, BTreeSet<usize>> = BTreeMap::new();
    for (_, path, row) in newest.into_values() {
        rows_of.entry(path).or_default().insert(row);
    }
    let selection = |(path, rows): (Path, BTreeSet<usize>)| {
        let chosen = rows.into_iter().map(|row| row..row + 1);
        let all = seen.get(&path).copied().unwrap_or(0);
        (path, RowSelection::from_consecutive_ranges(chosen, all))
    };
    Ok(Arc::new(rows_of.into_iter().map(selection).collect()))
}

pub(super) async fn step(tables: &Tables, now: Timestamp) -> anyhow::Result<usize> {
    let Some(silver) = tables.snapshot(Table::Registry).await? else { return Ok(0) };
    let version = changes::version(&silver);
    let mut behind = false;
    for keyed in [ASSETS, DEVICES] {
        behind |= match tables.snapshot(keyed.table).await? {
            Some(gold) => Tables::progress(&gold, SILVER).await? != Some(version),
            None => true,
        };
    }
    if !behind {
        return Ok(0);
    }
    let plant = Plant::read(&silver).await?;
    let progress = Progress::Complete(version);
    let assets = publish::publish(tables, ASSETS, &[], assets(&plant)?, progress, now).await?;
    let devices = publish::publish(tables, DEVICES, &[], devices(&plant)?, progress, now).await?;
    Ok(assets + devices)
}

fn assets(plant: &Plant) -> Result<RecordBatch, ArrowError> {
    let rows = &plant.assets;
    let texts = |of: &dyn Fn(&Asset) -> Option<String>| -> ArrayRef {
        Arc::new(rows.values().map(|a| of(&a.what)).collect::<StringArray>())
    };
    let floats = |of: &dyn Fn(&Asset) -> Option<f64>| -> ArrayRef {
        Arc::new(rows.values().map(|a| of(&a.what)).collect::<Float64Array>())
    };
    RecordBatch::try_new(
        ASSETS.table.schema(),
        vec![
            sites(rows.keys()),
            texts(&|a| Some(a.id.clone())),
            texts(&|a| a.path.clone()),
            texts(&|a| a.class.clone()),
            texts(&|a| a.criticality.clone()),
            floats(&|a| a.rated_power_kw),
            floats(&|a| a.rated_speed_rpm),
            texts(&|a| a.support.clone()),
            texts(&|a| a.time_zone.clone()),
            Arc::new(StringArray::from_iter_values(rows.values().map(|a| &a.gateway))),
            times(rows.values().map(|a| a.at)),
        ],
    )
}

fn devices(plant: &Plant) -> Result<RecordBatch, ArrowError> {
    let rows = &plant.devices;
    let texts = |of: &dyn Fn(&Device) -> Option<String>| -> ArrayRef {
        Arc::new(rows.values().map(|d| of(&d.what)).collect::<StringArray>())
    };
    let floats = |of: &dyn Fn(&Device) -> Option<f64>| -> ArrayRef {
        Arc::new(rows.values().map(|d| of(&d.what)).collect::<Float64Array>())
    };
    let labels = |d: &Device| {
        (!d.labels.is_empty()).then(|| serde_json::to_string(&d.labels).expect("text to text is JSON"))
    };
    RecordBatch::try_new(
        DEVICES.table.schema(),
        vec![
            sites(rows.keys()),
            texts(&|d| Some(d.id.clone())),
            texts(&|d| Some(d.device_type.clone())),
            texts(&|d| Some(d.asset.clone())),
            texts(&|d| Some(d.unit.clone())),
            texts(&|d| Some(d.kind.as_str().to_owned())),
            floats(&|d| d.range.map(|[low, _]| low)),
            floats(&|d| d.range.map(|[_, high]| high)),
            floats(&|d| d.interval.map(|interval| interval.as_secs_f64())),
            texts(&labels),
            Arc::new(StringArray::from_iter_values(rows.values().map(|d| &d.gateway))),
            times(rows.values().map(|d| d.at)),
        ],
    )
}

fn sites<'a>(keys: impl Iterator<Item = &'a (String, String)>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(keys.map(|(site, _)| site)))
}

fn times(times: impl Iterator<Item = Timestamp>) -> ArrayRef {
    let times = TimestampMicrosecondArray::from_iter_values(times.map(Timestamp::as_micros));
    Arc::new(times.with_timezone("UTC"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    fn document(gateway: &str, at: i64, assets: &[&str]) -> Document {
        let asset =
            |id: &&str| Asset { id: (*id).to_owned(), class: Some(gateway.to_owned()), ..Asset::default() };
        let at = Timestamp::from_micros(at);
        let document = Devices { v: 1, at, assets: assets.iter().map(asset).collect(), devices: vec![] };
        Document { site: "s".into(), gateway: gateway.into(), at, received_at: at, document }
    }

    #[test]
    fn of_two_gateways_the_newer_document_names_a_machine() {
        let documents =
            [document("g1", 30, &["a"]), document("g2", 25, &["a", "d"]), document("g3", 10, &["d", "e"])];
        let plant = Plant::of(documents.clone());
        let named: Vec<(&str, &str)> =
            plant.assets.iter().map(|((_, id), a)| (id.as_str(), a.gateway.as_str())).collect();
        assert_eq!(named, [("a", "g1"), ("d", "g2"), ("e", "g3")]);
        assert_eq!(Plant::of(documents.into_iter().rev()), plant);
        assert_eq!(assets(&plant).unwrap().num_rows(), 3);
        assert_eq!(devices(&plant).unwrap().num_rows(), 0);
        // Of a clock in the future, as old as its receipt.
        let ahead = Document { at: Timestamp::from_micros(99), ..document("g4", 28, &["a"]) };
        let plant = Plant::of([ahead, document("g1", 30, &["a"])]);
        assert_eq!(plant.assets[&("s".into(), "a".into())].gateway, "g1");
    }

    #[tokio::test]
    async fn the_newest_document_of_each_gateway_is_read() {
        /// Gateway, when written, when received, machines.
        type Said<'a> = (&'a str, i64, i64, &'a [&'a str]);
        let tables = Tables::open(&Store::open("memory:///").unwrap()).await.unwrap();
        // In two files, in no order.
        let files: [&[Said<'_>]; 2] = [
            &[("g1", 10, 10, &["a"]), ("g2", 25, 25, &["d"]), ("g1", 30, 31, &["b"]), ("g1", 20, 20, &["c"])],
            // Two that came late, and one by a clock far ahead, with one behind it since that was mended.
            &[("g1", 5, 40, &["x"]), ("g2", 7, 41, &["x"]), ("g3", 900, 50, &["x"]), ("g3", 60, 60, &["e"])],
        ];
        for file in files {
            let of = |f: &dyn Fn(&Said<'_>) -> String| -> ArrayRef {
                Arc::new(StringArray::from_iter_values(file.iter().map(f)))
            };
            let instants = |f: fn(&Said<'_>) -> i64| -> ArrayRef {
                times(file.iter().map(|row| Timestamp::from_micros(f(row))))
            };
            let columns = vec![
                of(&|_| "s".to_owned()),
                of(&|row| row.0.to_owned()),
                instants(|row| row.1),
                instants(|row| row.2),
                of(&|row| serde_json::to_string(&document(row.0, row.1, row.3).document).unwrap()),
                of(&|_| "segment".to_owned()),
            ];
            let rows = RecordBatch::try_new(Table::Registry.schema(), columns).unwrap();
            let base = tables.snapshot(Table::Registry).await.unwrap();
            tables.append(Table::Registry, base, vec![rows], ("refine", 1)).await.unwrap();
        }
        let silver = tables.snapshot(Table::Registry).await.unwrap().unwrap();
        let plant = Plant::read(&silver).await.unwrap();
        let named: Vec<(&str, &str)> =
            plant.assets.iter().map(|((_, id), a)| (id.as_str(), a.gateway.as_str())).collect();
        assert_eq!(named, [("b", "g1"), ("d", "g2"), ("e", "g3")]);
    }
}
