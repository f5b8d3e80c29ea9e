//! A subscriber that acknowledges and does nothing else: what a broker delivers, at most.

use std::{net::SocketAddr, time::Duration};

use anyhow::Context as _;
use rumqttc::v5::{AsyncClient, Event, EventLoop, Incoming, MqttOptions, mqttbytes::QoS};
use tokio::time::{Instant, timeout};

/// As large as it gets, so that the broker never waits.
const WINDOW: u16 = u16::MAX;
/// Without a message for so long, it gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// Somebody for whom the broker queues the JSON of all gateways.
pub(super) struct Null {
    broker: SocketAddr,
}

impl Null {
    /// Subscribes, and leaves.
    pub(super) async fn subscribe(broker: SocketAddr, root: &str) -> anyhow::Result<Null> {
        let null = Null { broker };
        let (client, mut events) = null.connection();
        client.subscribe(format!("{root}/+/+/json"), QoS::AtLeastOnce).await?;
        loop {
            let event = timeout(PATIENCE, events.poll()).await.context("the broker does not answer")??;
            match event {
                Event::Incoming(Incoming::SubAck(_)) => client.disconnect().await?,
                Event::Outgoing(rumqttc::Outgoing::Disconnect) => return Ok(null),
                _ => {}
            }
        }
    }

    /// Takes so many messages; how long that took.
    pub(super) async fn take(self, messages: u64) -> anyhow::Result<Duration> {
        let (_client, mut events) = self.connection();
        let began = Instant::now();
        let mut taken = 0;
        while taken < messages {
            let event = timeout(PATIENCE, events.poll()).await;
            let event = event.with_context(|| format!("{taken} of {messages} messages came"))??;
            taken += u64::from(matches!(event, Event::Incoming(Incoming::Publish(_))));
        }
        Ok(began.elapsed())
    }

    fn connection(&self) -> (AsyncClient, EventLoop) {
        let mut options = MqttOptions::new("bench-null", self.broker.ip().to_string(), self.broker.port());
        options
            .set_clean_start(false)
            .set_session_expiry_interval(Some(3600))
            .set_receive_maximum(Some(WINDOW));
        AsyncClient::new(options, 16)
    }
}
