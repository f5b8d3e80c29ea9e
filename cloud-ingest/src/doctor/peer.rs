//! A client of the doctor: everything that comes is filed until somebody asks for it.

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use rumqttc::v5::{
    AsyncClient, Event, Incoming, MqttOptions,
    mqttbytes::{
        QoS,
        v5::{ConnAck, Filter, PubAckReason, Publish, PublishProperties, SubscribeReasonCode},
    },
};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, timeout_at},
};

/// A broker that says nothing for so long has nothing more to say.
const SILENCE: Duration = Duration::from_secs(5);
/// How long a farewell may take.
const FAREWELL: Duration = Duration::from_secs(2);

pub(super) struct Peer {
    pub(super) client: AsyncClient,
    /// In the order of arrival.
    pub(super) received: Vec<Publish>,
    pub(super) answers: Vec<PubAckReason>,
    granted: Vec<SubscribeReasonCode>,
    events: mpsc::Receiver<Result<Incoming, String>>,
    task: JoinHandle<()>,
}

impl Peer {
    /// Connects, with room for `room` packets that nobody has asked for yet.
    pub(super) async fn connect(options: MqttOptions, room: usize) -> anyhow::Result<(Peer, ConnAck)> {
        let (client, mut polled) = AsyncClient::new(options, 256);
        let (filed, mut events) = mpsc::channel(room + 64);
        let task = tokio::spawn(async move {
            loop {
                let event = match polled.poll().await {
                    Ok(Event::Outgoing(_) | Event::Incoming(Incoming::PingResp(_))) => continue,
                    Ok(Event::Incoming(incoming)) => Ok(incoming),
                    Err(e) => Err(e.to_string()),
                };
                let ended = event.is_err();
                if filed.send(event).await.is_err() || ended {
                    return;
                }
            }
        });
        let first = timeout_at(Instant::now() + 2 * SILENCE, events.recv()).await;
        match first.context("the broker does not answer")? {
            Some(Ok(Incoming::ConnAck(ack))) => {
                let (received, answers, granted) = Default::default();
                Ok((Peer { client, received, answers, granted, events, task }, ack))
            }
            Some(Ok(other)) => bail!("the broker begins with {other:?}"),
            Some(Err(e)) => bail!(e),
            None => bail!("the connection ended"),
        }
    }

    /// Files what comes until that is enough; false when nothing came for a while before.
    pub(super) async fn until(&mut self, enough: impl Fn(&Peer) -> bool) -> bool {
        self.within(SILENCE, enough).await
    }

    /// [`Self::until`], with another patience.
    pub(super) async fn within(&mut self, silence: Duration, enough: impl Fn(&Peer) -> bool) -> bool {
        while !enough(self) {
            match timeout_at(Instant::now() + silence, self.events.recv()).await {
                Ok(Some(Ok(Incoming::Publish(publish)))) => self.received.push(publish),
                Ok(Some(Ok(Incoming::PubAck(ack)))) => self.answers.push(ack.reason),
                Ok(Some(Ok(Incoming::SubAck(ack)))) => self.granted.extend(ack.return_codes),
                Ok(Some(Ok(_))) => {}
                Ok(Some(Err(e))) => {
                    tracing::debug!(reason = e, "the doctor's connection ended");
                    return false;
                }
                Ok(None) | Err(_) => return false,
            }
        }
        true
    }

    /// Those of `filters` that the broker refuses.
    pub(super) async fn subscribe(&mut self, filters: Vec<Filter>) -> anyhow::Result<Vec<String>> {
        self.granted.clear();
        self.client.subscribe_many(filters.clone()).await?;
        if !self.until(|peer| peer.granted.len() >= filters.len()).await {
            bail!("the broker does not answer a subscription");
        }
        let refused = filters.iter().zip(&self.granted);
        let refused =
            refused.filter(|(_, code)| !matches!(code, SubscribeReasonCode::Success(QoS::AtLeastOnce)));
        Ok(refused.map(|(filter, code)| format!("{} ({code:?})", filter.path)).collect())
    }

    /// What the broker says to a publish.
    pub(super) async fn publish(
        &mut self,
        topic: &str,
        retain: bool,
        payload: impl Into<Bytes>,
        properties: PublishProperties,
    ) -> anyhow::Result<PubAckReason> {
        let n = self.answers.len();
        let sent =
            self.client.publish_with_properties(topic, QoS::AtLeastOnce, retain, payload.into(), properties);
        sent.await?;
        if !self.until(|peer| peer.answers.len() > n).await {
            bail!("the broker ends the connection, or does not answer");
        }
        Ok(self.answers[n])
    }

    /// An orderly end.
    pub(super) async fn leave(mut self) {
        let _ = self.client.disconnect().await;
        let gone = async { while let Some(Ok(_)) = self.events.recv().await {} };
        let _ = timeout_at(Instant::now() + FAREWELL, gone).await;
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Whether the broker took a message.
pub(super) fn is_taken(answer: PubAckReason) -> bool {
    matches!(answer, PubAckReason::Success | PubAckReason::NoMatchingSubscribers)
}
