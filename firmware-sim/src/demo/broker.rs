//! The demo's MQTT broker: rumqttd, embedded, so that nothing needs to be installed.
//!
//! It keeps nothing on disk. That is what makes key `b` worth pressing: a killed broker forgets
//! everything, and still nothing is lost, because gateways keep every message until the cloud says that it
//! is durable. For a plant, use the broker and the configuration in `deploy/mosquitto/`.

use std::{collections::HashMap, net::SocketAddr};

use common::wire::MAX_MESSAGE;
use rumqttd::{Broker, Config, ConnectionSettings, RouterConfig, ServerSettings};

/// Serves MQTT 5 at `listen` until the process ends.
///
/// # Errors
/// When the broker cannot start or stops.
pub(super) fn serve(listen: SocketAddr) -> anyhow::Result<()> {
    let config = Config {
        router: RouterConfig {
            max_connections: 64,
            max_outgoing_packet_count: 200,
            // The broker's memory: segments of 16 MiB, eight of them for each topic filter.
            max_segment_size: 16 * 1024 * 1024,
            max_segment_count: 8,
            ..RouterConfig::default()
        },
        v5: Some(HashMap::from([("v5".to_owned(), server(listen))])),
        ..Config::default()
    };
    Broker::new(config).start().map_err(|e| anyhow::anyhow!("the demo's broker at {listen}: {e}"))
}

fn server(listen: SocketAddr) -> ServerSettings {
    ServerSettings {
        name: "demo".into(),
        listen,
        tls: None,
        next_connection_delay_ms: 1,
        connections: ConnectionSettings {
            connection_timeout_ms: 10_000,
            // The payload, and as much again for topic and properties as they can need.
            max_payload_size: MAX_MESSAGE + 16 * 1024,
            max_inflight_count: 500,
            auth: None,
            external_auth: None,
            dynamic_filters: true,
        },
    }
}
