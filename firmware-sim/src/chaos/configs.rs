//! The configurations of the three programs: ordinary files in the data folder.
//!
//! What differs from the shipped defaults makes a short run meet more: many small messages, small generations of the
//! outbox, windows of a second that close at once (so that also an agent that lives for a second writes two lanes),
//! early repetition, short pauses.

use std::{fmt::Write as _, net::SocketAddr, path::Path};

use super::load::{self, Sensor};
use crate::demo::configs::quoted;

/// The plant and its gateway.
pub(super) const SITE: &str = "chaos";
pub(super) const GATEWAY: &str = "gw-1";

/// The broker's configuration as it ships.
const SHIPPED_BROKER: &str = include_str!("../../../deploy/mosquitto/mosquitto.conf");
/// What of it says who may enter, and from where; all else is taken as it is.
const ENTRY: [&str; 9] = [
    "allow_anonymous",
    "password_file",
    "acl_file",
    "listener",
    "tls_version",
    "certfile",
    "keyfile",
    "cafile",
    "persistence_location",
];

/// `edge-agent.toml`, whose data is kept in `home`.
pub(super) fn agent(
    home: &Path,
    rows: &Path,
    broker: SocketAddr,
    metrics: SocketAddr,
) -> anyhow::Result<String> {
    let mut t = format!(
        "site = \"{SITE}\"\ngateway = \"{GATEWAY}\"\ndata_dir = {home}\n\n\
         [mqtt]\nurl = \"mqtt://{broker}\"\nkeep_alive = \"5s\"\nbackoff = \"100ms\"\nmax_backoff = \"1s\"\n\n\
         [uplink]\nmode = \"cloud\"\nresend_after = \"5s\"\nmax_resend_after = \"20s\"\nstatus_every = \"2s\"\n\
         drain = \"15min\"\n\n\
         [outbox]\nlinger = \"100ms\"\ngeneration_bytes = 1048576\ncensus_every = \"2s\"\n\n\
         [window]\nwidth = \"1s\"\nlateness = \"100ms\"\n\n\
         [metrics]\nlisten = \"{metrics}\"\n",
        home = quoted(home)?,
    );
    let sensors = load::sensors();
    let mut assets: Vec<&str> = sensors.iter().map(|sensor| sensor.asset.as_str()).collect();
    assets.dedup();
    for asset in assets {
        let _ = write!(t, "\n[[asset]]\nid = \"{asset}\"\n");
    }
    for Sensor { id, asset, device_type, unit } in &sensors {
        let _ = write!(
            t,
            "\n[[device]]\nid = \"{id}\"\nasset = \"{asset}\"\ntype = \"{device_type}\"\nunit = \"{unit}\"\n"
        );
    }
    let time = load::TIME;
    let _ = write!(t, "\n[[replay]]\nfile = {}\ntime = \"{time}\"\n[replay.columns]\n", quoted(rows)?);
    for Sensor { id, .. } in &sensors {
        let _ = writeln!(t, "\"{id}\" = \"{id}\"");
    }
    Ok(t)
}

/// `cloud-ingest.toml`, of whose `[store]` is `store`; one of several that share the messages out, or alone.
pub(super) fn cloud(
    store: &str,
    broker: SocketAddr,
    pg_port: u16,
    http_port: u16,
    shared: bool,
    client_id: &str,
) -> String {
    let share = if shared { "share = \"ingest\"\n" } else { "" };
    format!(
        "[store]\n{store}\n\
         [mqtt]\nurl = \"mqtt://{broker}\"\nkeep_alive = \"5s\"\nmax_backoff = \"1s\"\nheartbeat = \"2s\"\n\
         client_id = \"{client_id}\"\n{share}\n\
         [serve]\npg_port = {pg_port}\nhttp_port = {http_port}\n"
    )
}

/// `mosquitto.conf`: the shipped one, open to everybody on loopback, with its data in `home`.
pub(crate) fn broker(home: &Path, listen: SocketAddr) -> String {
    let kept = SHIPPED_BROKER.lines().filter(|line| {
        let word = line.split(' ').next().unwrap_or("");
        !word.is_empty() && !word.starts_with('#') && !ENTRY.contains(&word)
    });
    let mut text = kept.fold(String::new(), |text, line| text + line + "\n");
    let _ = write!(
        text,
        "listener {} {}\nallow_anonymous true\npersistence_location {}/\n\
         # Started by root it would otherwise become a user who may not write there.\nuser root\n",
        listen.port(),
        listen.ip(),
        home.display()
    );
    text
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_programs_accept_their_configurations() {
        let folder = tempfile::tempdir().unwrap();
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let path = folder.path().join("edge-agent.toml");
        fs::write(&path, agent(folder.path(), &folder.path().join("load.csv"), at(1), at(2)).unwrap())
            .unwrap();
        let settings = edge_agent::settings::Settings::load(Some(&path)).unwrap();
        assert_eq!((settings.registry.devices.len(), settings.sources.len()), (load::DEVICES, 1));
        assert_eq!(settings.uplink.mode, edge_agent::settings::UplinkMode::Cloud);
        let path = folder.path().join("cloud-ingest.toml");
        for (shared, share) in [(false, ""), (true, "ingest")] {
            fs::write(&path, cloud("url = \"memory:///\"\n", at(1), 3, 4, shared, "cloud-2")).unwrap();
            let settings = cloud_ingest::settings::Settings::load(Some(&path)).unwrap();
            assert_eq!((settings.serve.pg_port, settings.mqtt.url.as_str()), (3, "mqtt://127.0.0.1:1"));
            assert_eq!((settings.mqtt.share.as_str(), settings.mqtt.client_id.as_str()), (share, "cloud-2"));
        }
    }

    #[test]
    fn the_broker_is_as_durable_and_as_bounded_as_the_shipped_one() {
        let text = broker("/data/broker".as_ref(), SocketAddr::from(([127, 0, 0, 1], 1884)));
        let lines: Vec<&str> = text.lines().collect();
        for line in [
            "persistence true",
            "autosave_interval 1",
            "max_inflight_messages 8000",
            "max_queued_messages 200000",
            "listener 1884 127.0.0.1",
            "persistence_location /data/broker/",
        ] {
            assert_eq!(lines.iter().filter(|l| **l == line).count(), 1, "{line} in\n{text}");
        }
        assert!(!text.contains("certfile") && !text.contains("acl_file"), "{text}");
    }
}
