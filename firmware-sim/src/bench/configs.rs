//! The agent's configuration: an ordinary file, that differs from the defaults where the bench wants it to.

use std::{fmt::Write as _, net::SocketAddr, path::Path};

use super::table::{self, Table};
use crate::demo::configs::quoted;

/// The plant and its gateway.
pub(super) const SITE: &str = "bench";
pub(super) const GATEWAY: &str = "gw-1";

/// The model that ships for such machines.
pub(super) const BUNDLE: [(&str, &[u8]); 3] = [
    ("model.onnx", include_bytes!("../../../edge-agent/examples/models/level-shift/model.onnx")),
    ("model.toml", include_bytes!("../../../edge-agent/examples/models/level-shift/model.toml")),
    ("golden.json", include_bytes!("../../../edge-agent/examples/models/level-shift/golden.json")),
];

/// `edge-agent.toml` with its data in `home`; `delivery` is its tables `[mqtt]`, `[uplink]` and `[outbox]`.
pub(super) fn agent(
    home: &Path,
    rows: &Path,
    table: &Table,
    metrics: SocketAddr,
    delivery: &str,
) -> anyhow::Result<String> {
    let mut t = format!(
        "site = \"{SITE}\"\ngateway = \"{GATEWAY}\"\ndata_dir = {home}\n\n{delivery}\n\
         # A recorded file is in order: nothing is waited for.\n[window]\nlateness = \"0s\"\n\n\
         [models]\ndir = \"models\"\n\n\
         [metrics]\nlisten = \"{metrics}\"\n",
        home = quoted(home)?,
    );
    for k in 0..table.devices.div_ceil(table::PER_MACHINE) {
        let _ = write!(t, "\n[[asset]]\nid = \"{}\"\n", table::machine(k));
    }
    for (machine, sensor) in table.columns() {
        let (name, device_type, unit) = (sensor.name, sensor.device_type, sensor.unit);
        let _ = write!(
            t,
            "\n[[device]]\nid = \"{machine}/{name}\"\nasset = \"{machine}\"\ntype = \"{device_type}\"\n\
             unit = \"{unit}\"\nrange = [0.0, {highest:?}]\n",
            highest = sensor.highest()
        );
    }
    let _ =
        write!(t, "\n[[replay]]\nfile = {}\ntime = \"{}\"\n[replay.columns]\n", quoted(rows)?, table::TIME);
    for (machine, sensor) in table.columns() {
        let _ = writeln!(t, "\"{machine}/{name}\" = \"{machine}/{name}\"", name = sensor.name);
    }
    Ok(t)
}

#[cfg(test)]
mod tests {
    use edge_agent::settings::Settings;

    use super::*;

    #[test]
    fn the_agent_accepts_its_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let table = Table { start: "2026-01-01T00:00:00Z".parse().unwrap(), rows: 1, devices: 20, hz: 10 };
        let at = SocketAddr::from(([127, 0, 0, 1], 9));
        let delivery = "[uplink]\ndrain = \"2s\"\n";
        let text = agent(folder.path(), &folder.path().join("rows.csv"), &table, at, delivery).unwrap();
        let path = folder.path().join("edge-agent.toml");
        std::fs::write(&path, text).unwrap();
        let settings = Settings::load(Some(&path)).unwrap();
        assert_eq!((settings.registry.devices.len(), settings.sources.len()), (20, 1));
        assert_eq!(settings.registry.assets.len(), 3);
        assert!(settings.models.dir.unwrap().ends_with("models"));
    }
}
