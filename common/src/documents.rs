//! The JSON documents on the wire: status, registry, acknowledgement, heartbeat.
//!
//! Every document carries `v`, ignores keys that it does not know, and is small enough for one message.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    reading::{Asset, Device, Registry},
    time::Timestamp,
    wire::{Lane, VERSION},
};

/// A gateway's document as it is published, with its sender at the top: see [`crate::wire`].
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Signed<'a, T> {
    /// The plant.
    pub site: &'a str,
    /// The edge agent.
    pub gateway: &'a str,
    /// What it says.
    #[serde(flatten)]
    pub document: &'a T,
}

/// `status`, retained: birth, last will, and every minute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Wire version.
    pub v: u32,
    /// False in the last will and in the farewell.
    pub online: bool,
    /// When it was written, by the gateway's clock.
    pub at: Timestamp,
    /// The present run of the agent.
    pub epoch: Uuid,
    /// Version of the agent.
    pub version: String,
    /// SHA-256 of the effective configuration, secrets left out, in hex.
    #[serde(default)]
    pub config_sha256: String,
    /// Models and their state.
    #[serde(default)]
    pub models: Vec<ModelStatus>,
    /// One entry for every epoch and lane of which the edge may still hold something, and for every lane of
    /// the present epoch.
    #[serde(default)]
    pub lanes: Vec<LaneStatus>,
}

/// A model as the agent sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// Name in its bundle.
    pub name: String,
    /// SHA-256 of its `model.onnx` in hex.
    pub sha256: String,
    /// SHA-256 of its `calibration.toml` in hex; empty where it has none.
    #[serde(default)]
    pub calibration_sha256: String,
    /// `active`, or why it is not.
    pub state: String,
}

/// Where a lane stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneStatus {
    /// The run of the agent that sealed the messages.
    pub epoch: Uuid,
    /// The queue.
    pub lane: Lane,
    /// Seq that the next message of this epoch and lane gets: the number of messages sealed.
    pub head: u64,
    /// Rows sealed in this epoch and lane.
    pub rows: u64,
    /// Lowest seq still held; equal to `head` when none is.
    pub oldest: u64,
}

/// `devices`, retained: the registry of a gateway.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Devices {
    /// Wire version.
    pub v: u32,
    /// When it was written.
    pub at: Timestamp,
    /// The machines.
    pub assets: Vec<Asset>,
    /// The measured quantities.
    pub devices: Vec<Device>,
}

impl Devices {
    /// The document of a registry.
    pub fn new(at: Timestamp, registry: &Registry) -> Self {
        Self { v: VERSION, at, assets: registry.assets.clone(), devices: registry.devices.clone() }
    }
}

/// `ack`, cloud to edge: these messages are durable in bronze and may be forgotten.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// Wire version.
    pub v: u32,
    /// Any order, may overlap, may name what was acknowledged before.
    pub ranges: Vec<AckRange>,
}

/// Seqs `from..=to` of an epoch and lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AckRange {
    /// The run of the agent.
    pub epoch: Uuid,
    /// The queue.
    pub lane: Lane,
    /// First seq.
    pub from: u64,
    /// Last seq, included.
    pub to: u64,
}

/// `{root}/_cloud/status`, retained: the cloud is there, so sending again makes sense.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CloudStatus {
    /// Wire version.
    pub v: u32,
    /// False in the last will and in the farewell.
    pub online: bool,
    /// When it was written, by the cloud's clock.
    pub at: Timestamp,
    /// The writer that wrote it.
    pub writer: Uuid,
    /// Its MQTT client id; empty where it does not say.
    #[serde(default)]
    pub client_id: String,
}
