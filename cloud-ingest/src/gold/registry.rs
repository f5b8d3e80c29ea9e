//! `gold/assets` and `gold/devices`: the newest registry document of each gateway.
//!
//! A machine or device that two gateways of a site name is the one of the newer document. One that its gateway no
//! longer names is gone. `updated_at` is when the document was written, by the gateway's clock.

use std::{
    collections::{BTreeMap, HashMap},
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

use super::{
    changes,
    publish::{self, Keyed, Progress, SILVER},
    series::{micros, text},
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

impl Plant {
    /// From documents in any order.
    pub fn of(documents: impl IntoIterator<Item = Document>) -> Plant {
        let mut newest: HashMap<(String, String), Document> = HashMap::new();
        for document in documents {
            let order = |d: &Document| (d.at, d.received_at);
            match newest.get_mut(&(document.site.clone(), document.gateway.clone())) {
                Some(known) if order(known) >= order(&document) => {}
                Some(known) => *known = document,
                None => {
                    newest.insert((document.site.clone(), document.gateway.clone()), document);
                }
            }
        }
        let mut documents: Vec<Document> = newest.into_values().collect();
        documents.sort_by(|a, b| (a.at, &a.gateway).cmp(&(b.at, &b.gateway)));
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
        let context = changes::context(&[("t", Some(silver), None)]).await?;
        // A gateway says the same again at every start: one row for each thing said.
        let sql = "SELECT site, gateway_id, document, max(at) AS at, max(received_at) AS received_at \
                   FROM t GROUP BY site, gateway_id, document";
        let mut documents = Vec::new();
        for batch in context.sql(sql).await?.collect().await? {
            let (site, gateway) = (text(&batch, "site")?, text(&batch, "gateway_id")?);
            let (document, at) = (text(&batch, "document")?, micros(&batch, "at")?);
            let received_at = micros(&batch, "received_at")?;
            for row in 0..batch.num_rows() {
                match serde_json::from_str(document.value(row)) {
                    Ok(parsed) => documents.push(Document {
                        site: site.value(row).to_owned(),
                        gateway: gateway.value(row).to_owned(),
                        at: Timestamp::from_micros(at.value(row)),
                        received_at: Timestamp::from_micros(received_at.value(row)),
                        document: parsed,
                    }),
                    Err(error) => {
                        let (site, gateway) = (site.value(row), gateway.value(row));
                        tracing::warn!(site, gateway, %error, "a registry document cannot be read; skipped");
                    }
                }
            }
        }
        Ok(Plant::of(documents))
    }
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
    let progress = Progress::Always(version);
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

    fn document(gateway: &str, at: i64, assets: &[&str]) -> Document {
        let asset =
            |id: &&str| Asset { id: (*id).to_owned(), class: Some(gateway.to_owned()), ..Asset::default() };
        let at = Timestamp::from_micros(at);
        let document = Devices { v: 1, at, assets: assets.iter().map(asset).collect(), devices: vec![] };
        Document { site: "s".into(), gateway: gateway.into(), at, received_at: at, document }
    }

    #[test]
    fn the_newest_document_of_each_gateway_counts() {
        let documents = [
            document("g1", 10, &["a", "b"]),
            document("g1", 30, &["a"]),
            document("g1", 20, &["a", "c"]),
            document("g2", 25, &["a", "d"]),
        ];
        let plant = Plant::of(documents.clone());
        let names: Vec<&str> = plant.assets.keys().map(|(_, id)| id.as_str()).collect();
        assert_eq!(names, ["a", "d"]);
        assert_eq!(plant.assets[&("s".into(), "a".into())].gateway, "g1");
        assert_eq!(Plant::of(documents.into_iter().rev()), plant);
        assert_eq!(assets(&plant).unwrap().num_rows(), 2);
        assert_eq!(devices(&plant).unwrap().num_rows(), 0);
    }
}
