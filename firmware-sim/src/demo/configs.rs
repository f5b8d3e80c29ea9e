//! The configurations that the demo gives to its children: ordinary files in the data folder, made from the
//! plant's layout, that `edge-agent check` and `cloud-ingest check` accept like anybody else's.

use std::{collections::BTreeMap, fmt::Write as _, net::SocketAddr, path::Path};

use anyhow::Context as _;

use crate::plant::{Channel, Layout};

/// Folder of the shipped model bundles, beside the configuration.
pub(super) const MODELS: &str = "models";

/// Between two status messages; three missed ones make a gateway `unknown`.
const STATUS_EVERY: &str = "5s";

/// What is known of the plant's machines beyond their instruments: for the maintenance schedule. The classes
/// are those of the Tennessee Eastman process; intervals and criticality are chosen for the demo.
const ASSETS: &str = r#"
[[asset]]
id = "reactor"
path = "process/reaction/reactor"
class = "stirred-tank-reactor"
criticality = "high"
service_every_days = 180.0
service_every_running_hours = 4000.0
running_when = { device = "reactor/feed-flow", above = 100000.0 }

[[asset]]
id = "separator"
path = "process/separation/separator"
class = "vapour-liquid-separator"
criticality = "medium"
service_every_days = 365.0

[[asset]]
id = "stripper"
path = "process/separation/stripper"
class = "stripping-column"
criticality = "medium"
service_every_days = 365.0

[[asset]]
id = "compressor"
path = "process/recycle/compressor"
class = "centrifugal-compressor"
criticality = "high"
rated_power_kw = 400.0
rated_speed_rpm = 1776.0
support = "rigid"
machine_group = 1
service_every_running_hours = 2000.0
running_when = { device = "compressor/work", above = 100.0 }

[[asset]]
id = "press"
path = "workshop/forming/press"
class = "hydraulic-press"
criticality = "low"
service_every_days = 90.0
"#;

/// `edge-agent.toml` of one gateway, whose data is kept in `home`.
pub(super) fn agent(
    layout: &Layout,
    gateway: usize,
    home: &Path,
    broker: SocketAddr,
    metrics: SocketAddr,
) -> anyhow::Result<String> {
    let mut t = format!(
        "# Written by the demo at every start.\n\
         site = \"plant-{n}\"\n\
         gateway = \"gw-1\"\n\
         data_dir = {home}\n\n\
         [mqtt]\nurl = \"mqtt://{broker}\"\nkeep_alive = \"5s\"\nmax_backoff = \"2s\"\n\n\
         [uplink]\nstatus_every = \"{STATUS_EVERY}\"\ndrain = \"30s\"\n\n\
         [outbox]\ncensus_every = \"5s\"\n\n\
         [models]\ndir = \"{MODELS}\"\n\n\
         [metrics]\nlisten = \"{metrics}\"\n{ASSETS}",
        n = gateway + 1,
        home = quoted(&home.join("data"))?,
    );
    for channel in &layout.channels {
        // The span of the transmitter, and as much beyond it as a healthy one can show.
        let margin = 0.04 * (channel.at_20ma - channel.at_4ma);
        let range = [channel.at_4ma - margin, channel.at_20ma + margin];
        device(
            &mut t,
            [&channel.device, &channel.asset, &channel.device_type, &channel.unit],
            channel.period_s,
            range,
        );
    }
    let press = &layout.press;
    let (temperature, humidity) = (&press.temperature, &press.humidity);
    device(
        &mut t,
        [&temperature.device, &press.asset, &temperature.device_type, &temperature.unit],
        press.period_s,
        [-40.0, 125.0],
    );
    device(
        &mut t,
        [&humidity.device, &press.asset, &humidity.device_type, &humidity.unit],
        press.period_s,
        [0.0, 100.0],
    );
    // Report by exception, to be seen in the ledger as `held`.
    t.push_str("deadband = 0.3\nheartbeat = \"10min\"\n");
    let vibration = &layout.vibration;
    for output in &vibration.outputs {
        let about = [output.device.as_str(), &vibration.asset, &output.device_type, &output.unit];
        device(&mut t, about, vibration.period_s, output.range);
        if !output.labels.is_empty() {
            let labels = toml::Value::try_from(&output.labels).context("writing labels")?;
            let _ = write!(t, "kind = \"state\"\nlabels = {labels}\n");
        }
    }
    buses(&mut t, layout);
    Ok(t)
}

fn device(t: &mut String, [id, asset, device_type, unit]: [&str; 4], period_s: u32, range: [f64; 2]) {
    let _ = write!(
        t,
        "\n[[device]]\nid = \"{id}\"\nasset = \"{asset}\"\ntype = \"{device_type}\"\nunit = \"{unit}\"\n\
         interval = \"{period_s}s\"\nrange = [{:?}, {:?}]\n",
        range[0], range[1]
    );
}

fn buses(t: &mut String, layout: &Layout) {
    let mut converters: BTreeMap<&str, BTreeMap<u8, Vec<&Channel>>> = BTreeMap::new();
    for channel in &layout.channels {
        converters.entry(&channel.bus).or_default().entry(channel.address).or_default().push(channel);
    }
    for (bus, converters) in converters {
        let _ = write!(t, "\n[[i2c]]\npath = \"/dev/{bus}\"\n");
        for (address, channels) in converters {
            let period = channels.iter().map(|c| c.period_s).min().unwrap_or(1);
            let _ = write!(
                t,
                "[[i2c.ads1115]]\naddress = {address:#04x}\nperiod = \"{period}s\"\nburden_ohm = {:?}\n",
                layout.adc.shunt_ohm
            );
            for c in channels {
                let _ = write!(
                    t,
                    "[[i2c.ads1115.loop]]\nchannel = {}\ndevice = \"{}\"\nlow = {:?}\nhigh = {:?}\nperiod = \"{}s\"\n",
                    c.input, c.device, c.at_4ma, c.at_20ma, c.period_s
                );
            }
        }
        let press = &layout.press;
        if press.bus == bus {
            let _ = write!(
                t,
                "[[i2c.sht4x]]\naddress = {:#04x}\nperiod = \"{}s\"\ntemperature = \"{}\"\nhumidity = \"{}\"\n",
                press.address, press.period_s, press.temperature.device, press.humidity.device
            );
        }
    }
    let vibration = &layout.vibration;
    let _ = write!(
        t,
        "\n[[spi]]\npath = \"/dev/{}\"\n[spi.ism330dhcx]\nperiod = \"{}s\"\nsamples = 8192\nrate_hz = 6667\n\
         range_g = 16\naxis = \"x\"\n",
        vibration.bus, vibration.period_s
    );
    for output in &vibration.outputs {
        let _ = writeln!(t, "{} = \"{}\"", output.feature, output.device);
    }
}

/// `cloud-ingest.toml` with its lake in `lake`.
pub(super) fn cloud(lake: &Path, mqtt_port: u16, pg_port: u16, http_port: u16) -> anyhow::Result<String> {
    Ok(format!(
        "# Written by the demo at every start.\n\
         [store]\nurl = \"{url}\"\n\n\
         [mqtt]\nurl = \"mqtt://127.0.0.1:{mqtt_port}\"\nkeep_alive = \"5s\"\n\n\
         [gold]\ninterval = \"5s\"\n\n\
         [serve]\npg_port = {pg_port}\nhttp_port = {http_port}\nheartbeat = \"{STATUS_EVERY}\"\n",
        url = store_url(lake)?,
    ))
}

/// The `file://` URL of the lake's folder, which is made where it does not exist.
pub(crate) fn store_url(lake: &Path) -> anyhow::Result<String> {
    std::fs::create_dir_all(lake).with_context(|| format!("cannot write to {}", lake.display()))?;
    let absolute = lake.canonicalize().with_context(|| format!("finding {}", lake.display()))?;
    Ok(format!("file://{}", absolute.to_str().context("the data folder's path is not UTF-8")?))
}

/// A path as a TOML string, absolute.
pub(crate) fn quoted(path: &Path) -> anyhow::Result<String> {
    let absolute = std::path::absolute(path).with_context(|| format!("finding {}", path.display()))?;
    let text = absolute.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(toml::Value::String(text.to_owned()).to_string())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use common::{reading::Quality, time::Timestamp};
    use edge_agent::{
        settings::{Settings, Source},
        source::read_once,
    };

    use super::*;
    use crate::{
        bus::SimHardware,
        chip::SimTime,
        faults::{Faults, Rates},
        plant::Plant,
    };

    /// A configuration as the agent checks it, and every sensor of it read by the agent's own drivers.
    #[test]
    fn every_device_of_the_agents_configuration_has_a_value() {
        let at: Timestamp = "2026-03-01T20:00:00Z".parse().unwrap();
        let plant = Arc::new(Plant::demo(at, 0).unwrap());
        let home = tempfile::tempdir().unwrap();
        let loopback = "127.0.0.1:1".parse().unwrap();
        let file = home.path().join("edge-agent.toml");
        std::fs::write(&file, agent(plant.layout(), 0, home.path(), loopback, loopback).unwrap()).unwrap();
        let settings = Settings::load(Some(&file)).unwrap();

        let time = SimTime::new(move || at);
        let hardware = Arc::new(SimHardware::of_plant(&plant, Faults::new(1, Rates::default()), time));
        let readings: Vec<_> =
            settings.sources.iter().flat_map(|source: &Source| read_once(source, &hardware, at)).collect();
        assert_eq!(readings.len(), settings.registry.devices.len());
        for reading in &readings {
            let id = &settings.registry.device(reading.device).id;
            assert!(reading.quality == Quality::Good && reading.value.is_finite(), "{id}: {reading:?}");
        }
        let value = |id: &str| {
            let ix = settings.registry.find(id).unwrap();
            readings.iter().find(|reading| reading.device == ix).unwrap().value
        };
        // Root of the sum of (A_k / (2π k f √2))² for the harmonics at k = 1, 2, 3, and some ringing at 1.1 kHz.
        let velocity = value("compressor/vibration-velocity");
        assert!((3.1..3.2).contains(&velocity), "{velocity} mm/s");
        assert_eq!(value("compressor/vibration-zone"), 2.0, "zone B of group 1 on a rigid support");
    }
}
