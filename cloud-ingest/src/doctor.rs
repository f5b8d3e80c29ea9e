//! `cloud-ingest doctor`: proves by trying that the configured broker will not lose data, and says what to change.
//!
//! It publishes below `{root}/_cloud/doctor/{id}`, with client ids of its own, and leaves neither retained documents
//! nor sessions behind; replicas may run meanwhile. To try its rights it sends empty messages as if to a gateway
//! `_cloud/doctor-{id}`, which there cannot be, and to the heartbeat's topic, where agents ignore them.

mod peer;
mod report;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::Context;
use common::{
    time::Timestamp,
    wire::{ARROW_STREAM, ClockState, Identity, Lane, MAX_MESSAGE, VERSION, cloud_status_topic},
};
use rumqttc::v5::{
    MqttOptions,
    mqttbytes::{
        QoS,
        v5::{ConnAck, ConnAckProperties, Filter, PublishProperties, RetainForwardRule},
    },
};
use tokio::process::Command;
use uuid::Uuid;

use self::peer::{Peer, is_taken};
pub use self::report::{Check, Outcome, Report};
use crate::{
    settings::{MqttSettings, Settings},
    subscribe::{connection, data_filters, document_filters},
};

/// Room that a packet needs beyond its payload: topic, properties, header.
const OVERHEAD: u32 = 16 * 1024;
/// Sessions of the doctor's, should it be killed, end after so many seconds.
const EXPIRY: u32 = 600;
/// Messages through a shared subscription, and over a restart.
const FEW: usize = 200;
/// A broker that saves now and then is given so long before it is restarted.
const SETTLE: Duration = Duration::from_secs(3);
/// How long a broker may take to start again.
const RESTART: Duration = Duration::from_secs(60);
/// mosquitto renews `$SYS` every 10 s.
const SYS_INTERVAL: Duration = Duration::from_secs(15);
const DROPPED: &str = "$SYS/broker/publish/messages/dropped";

/// How hard to try.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many messages wait for a subscriber. As it is delivered, mosquitto drops what is beyond 1,000 and those
    /// that are in flight.
    pub messages: usize,
    /// Restarts the broker; without it, persistence is not tried.
    pub restart_command: Option<String>,
}

/// Examines the broker that `settings` name.
pub async fn doctor(settings: &Settings, options: &Options) -> Report {
    let id = format!("{:08x}", Uuid::now_v7().as_u128() as u32);
    let mqtt = settings.mqtt.clone();
    let json = settings.json_filters();
    let mut doctor = Doctor {
        scratch: format!("{}/_cloud/doctor/{id}", mqtt.root),
        subscriptions: [data_filters(&mqtt, &json), document_filters(&mqtt)].concat(),
        sessions: BTreeSet::new(),
        report: Report::new(&mqtt.url),
        mqtt,
        id,
    };
    doctor.examine(options).await;
    doctor.clean_up().await;
    doctor.report
}

struct Doctor {
    mqtt: MqttSettings,
    /// Names this visit.
    id: String,
    scratch: String,
    /// What `run` subscribes to.
    subscriptions: Vec<String>,
    /// Roles whose sessions the broker keeps.
    sessions: BTreeSet<&'static str>,
    report: Report,
}

impl Doctor {
    async fn examine(&mut self, options: &Options) {
        let (mut sender, ack) = match self.enter("sender", options.messages).await {
            Ok(entered) => entered,
            Err(e) => {
                let change =
                    "mqtt.url, mqtt.username, mqtt.password, mqtt.ca; the broker's listener and users";
                return self.report.note("connection", Check::loses(self.entry(), format!("{e:#}"), change));
            }
        };
        let broker = ack.properties.as_ref();
        let connected = self.connected(broker);
        self.report.note("connection", connected);
        let before = self.counters().await;
        let checks = [
            ("rights to publish", self.rights(&mut sender).await),
            ("rights to subscribe", self.subscriptions().await),
            ("largest message", self.largest(&mut sender).await),
            ("retained documents", self.retained(&mut sender).await),
        ];
        checks.into_iter().for_each(|(name, check)| self.report.record(name, check));
        match self.queues(&mut sender, options.messages).await {
            Ok(checks) => checks.into_iter().for_each(|(name, check)| self.report.note(name, check)),
            Err(e) => self.report.record("queues", Err(e)),
        }
        let available = broker.and_then(|broker| broker.shared_subscription_available);
        let shared = self.shared(&mut sender, available).await;
        self.report.record("shared subscription", shared);
        let counters = self.dropped(before).await;
        self.report.note("counters", counters);
        let restart = self.restart(sender, options.restart_command.as_deref()).await;
        self.report.record("restart", restart);
    }

    /// A connection without a session.
    async fn enter(&self, role: &str, room: usize) -> anyhow::Result<(Peer, ConnAck)> {
        let mut options = self.options(role)?;
        options.set_clean_start(true);
        Peer::connect(options, room).await
    }

    /// A connection with a session that stays, which acknowledges nothing by itself.
    async fn resume(&mut self, role: &'static str, room: usize) -> anyhow::Result<(Peer, ConnAck)> {
        let mut options = self.options(role)?;
        options.set_clean_start(false).set_session_expiry_interval(Some(EXPIRY)).set_manual_acks(true);
        self.sessions.insert(role);
        Peer::connect(options, room).await
    }

    fn options(&self, role: &str) -> anyhow::Result<MqttOptions> {
        let mut options = connection(&self.mqtt)?;
        options.set_client_id(format!("{}-doctor-{}-{role}", self.mqtt.client_id, self.id));
        Ok(options)
    }

    fn entry(&self) -> String {
        let name = if self.mqtt.username.is_empty() { "without a name" } else { &self.mqtt.username };
        format!("dialled {} with MQTT 5, {name}", self.mqtt.url)
    }

    fn connected(&self, broker: Option<&ConnAckProperties>) -> Check {
        let needed = MAX_MESSAGE as u32 + OVERHEAD;
        let receive_maximum = broker.and_then(|b| b.receive_max).unwrap_or(u16::MAX);
        let packet = broker.and_then(|b| b.max_packet_size);
        let denies = |stated: fn(&ConnAckProperties) -> Option<u8>| broker.and_then(stated) == Some(0);
        let shown = packet.map_or("any size".to_owned(), |bytes| format!("{bytes} B"));
        let saw = format!("receive maximum {receive_maximum}, packets of {shown}");
        let lacks = [
            (packet.is_some_and(|bytes| bytes < needed), "larger packets (mosquitto: max_packet_size 0)"),
            (denies(|b| b.max_qos), "QoS 1 (mosquitto: max_qos 2)"),
            (denies(|b| b.retain_available), "retained messages (mosquitto: retain_available true)"),
            (denies(|b| b.wildcard_subscription_available), "subscriptions with wildcards"),
        ];
        let lacks: Vec<&str> = lacks.into_iter().filter(|(lacks, _)| *lacks).map(|(_, what)| what).collect();
        if lacks.is_empty() {
            Check::ok(self.entry(), saw)
        } else {
            Check::loses(self.entry(), saw, format!("the broker must allow {}", lacks.join(", ")))
        }
    }

    async fn rights(&self, sender: &mut Peer) -> anyhow::Result<Check> {
        let (root, id) = (&self.mqtt.root, &self.id);
        let topics = [
            format!("{root}/_cloud/doctor-{id}/ack"),
            format!("{root}/_cloud/doctor-{id}/cmd/doctor"),
            format!("{}/try", self.scratch),
            cloud_status_topic(root),
        ];
        let mut refused = Vec::new();
        for topic in &topics {
            let answer = sender.publish(topic, false, "", PublishProperties::default()).await?;
            if !is_taken(answer) {
                refused.push(format!("{topic} ({answer:?})"));
            }
        }
        let did = format!("published to {}", topics.join(", "));
        Ok(if refused.is_empty() {
            Check::ok(did, "all are taken".into())
        } else {
            let change = format!(
                "let this user write {root}/+/+/ack, {root}/+/+/cmd/# and {root}/_cloud/# (mosquitto: \
                 deploy/mosquitto/acl)"
            );
            Check::loses(did, format!("refused: {}", refused.join(", ")), change)
        })
    }

    async fn subscriptions(&self) -> anyhow::Result<Check> {
        let (mut peer, _) = self.enter("reader", 1024).await?;
        let filters = self.subscriptions.iter().map(|path| Filter {
            retain_forward_rule: RetainForwardRule::Never,
            ..Filter::new(path, QoS::AtLeastOnce)
        });
        let refused = peer.subscribe(filters.collect()).await?;
        peer.leave().await;
        let did = format!("subscribed to {}", self.subscriptions.join(", "));
        Ok(if refused.is_empty() {
            Check::ok(did, "all are granted with QoS 1".into())
        } else {
            let change = format!("let this user read {}/# (mosquitto: deploy/mosquitto/acl)", self.mqtt.root);
            Check::loses(did, format!("refused: {}", refused.join(", ")), change)
        })
    }

    /// 128 KiB that do not compress, with the properties of a message.
    async fn largest(&self, sender: &mut Peer) -> anyhow::Result<Check> {
        let topic = format!("{}/large", self.scratch);
        let (mut peer, _) = self.enter("reader", 16).await?;
        peer.subscribe(vec![Filter::new(&topic, QoS::AtLeastOnce)]).await?;
        let payload: Vec<u8> =
            (0..MAX_MESSAGE as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let identity = Identity {
            v: VERSION,
            epoch: Uuid::nil(),
            lane: Lane::Readings,
            seq: 0,
            rows: 0,
            rows_before: 0,
            oldest: 0,
            sealed_at: Timestamp::default(),
            clock: ClockState::Synced,
        };
        let properties = PublishProperties {
            content_type: Some(ARROW_STREAM.to_owned()),
            user_properties: identity.to_properties(),
            ..PublishProperties::default()
        };
        let did = format!("published {MAX_MESSAGE} B with a content type and user properties");
        let change = "raise the largest message (mosquitto: message_size_limit 1048576, max_packet_size 0)";
        let answer = sender.publish(&topic, false, payload.clone(), properties.clone()).await;
        match &answer {
            Ok(answer) if is_taken(*answer) => {}
            Ok(answer) => return Ok(Check::loses(did, format!("refused: {answer:?}"), change)),
            Err(e) => return Ok(Check::loses(did, format!("{e:#}"), change)),
        }
        if !peer.until(|peer| !peer.received.is_empty()).await {
            return Ok(Check::loses(did, "it is taken and does not come".into(), change));
        }
        let came = peer.received.swap_remove(0);
        peer.leave().await;
        let passed = came.properties.unwrap_or_default();
        let same = (passed.content_type, passed.user_properties)
            == (properties.content_type, properties.user_properties);
        Ok(if came.payload != payload {
            Check::loses(did, format!("{} B come that differ", came.payload.len()), change)
        } else if same {
            Check::ok(did, "it comes as it was sent".into())
        } else {
            let change = "the broker, or a bridge on the way, must speak MQTT 5 throughout";
            Check::loses(did, "it comes without its properties".into(), change)
        })
    }

    async fn retained(&self, sender: &mut Peer) -> anyhow::Result<Check> {
        let topic = format!("{}/retained", self.scratch);
        let did = "published a retained document, then subscribed".to_owned();
        sender.publish(&topic, true, "kept", PublishProperties::default()).await?;
        Ok(if self.is_retained(&topic).await? {
            Check::ok(did, "it comes".into())
        } else {
            let change = "status and devices of gateways must be retained (mosquitto: retain_available true)";
            Check::loses(did, "it does not come".into(), change)
        })
    }

    async fn is_retained(&self, topic: &str) -> anyhow::Result<bool> {
        let (mut peer, _) = self.enter("reader", 16).await?;
        peer.subscribe(vec![Filter::new(topic, QoS::AtLeastOnce)]).await?;
        Ok(peer.until(|peer| peer.received.iter().any(|p| p.retain && p.payload == "kept")).await)
    }

    /// A subscriber that is away, and one that is there and acknowledges nothing.
    async fn queues(&mut self, sender: &mut Peer, n: usize) -> anyhow::Result<Vec<(&'static str, Check)>> {
        let topic = format!("{}/flood", self.scratch);
        for role in ["absent", "slow"] {
            let (mut peer, _) = self.resume(role, 16).await?;
            peer.subscribe(vec![Filter::new(&topic, QoS::AtLeastOnce)]).await?;
            peer.leave().await;
        }
        let (mut slow, _) = self.resume("slow", n).await?;
        let taken = flood(sender, &topic, n).await?;
        let window = usize::from(self.mqtt.inflight).min(n);
        slow.within(Duration::from_secs(2), |peer| peer.received.len() >= window).await;
        let ahead = slow.received.len();
        let came_slowly = drain(&mut slow, &taken).await?;
        let (mut absent, ack) = self.resume("absent", n).await?;
        let came_late = drain(&mut absent, &taken).await?;
        absent.leave().await;
        slow.leave().await;

        let change = format!(
            "let more messages wait for a subscriber than all gateways together may have unacknowledged (mosquitto: \
             max_queued_messages {}, max_queued_bytes 1073741824)",
            (40 * n).max(200_000)
        );
        let lost = |did: String, came: usize| match taken.len() - came {
            0 if taken.len() == n => Check::ok(did, format!("all {n} come")),
            0 => {
                let saw = format!("{} of {n} are refused, the others come", n - taken.len());
                Check::warns(did, saw, &change)
            }
            lost => Check::loses(did, format!("{lost} of {} that it took never come", taken.len()), &change),
        };
        let session = "a session that outlives its connection";
        Ok(vec![
            (
                "persistent session",
                if ack.session_present {
                    Check::ok(
                        "left and came back with the same client id".into(),
                        format!("there is {session}"),
                    )
                } else {
                    let change = format!("allow {session} (mosquitto: persistent_client_expiration 14d)");
                    Check::loses("left and came back".into(), "the session is gone".into(), change)
                },
            ),
            (
                "window",
                if ahead >= window {
                    let saw = format!("{ahead} messages ahead of their acknowledgement");
                    Check::ok(format!("acknowledged nothing; mqtt.inflight = {}", self.mqtt.inflight), saw)
                } else {
                    Check::warns(
                        format!("acknowledged nothing; mqtt.inflight = {}", self.mqtt.inflight),
                        format!("only {ahead} messages ahead of their acknowledgement: small segments, slow"),
                        format!("mosquitto: max_inflight_messages {}", self.mqtt.inflight),
                    )
                },
            ),
            (
                "slow subscriber",
                lost(format!("published {n} messages to one that acknowledges none"), came_slowly),
            ),
            ("absent subscriber", lost(format!("published {n} messages to one that is away"), came_late)),
        ])
    }

    async fn shared(&self, sender: &mut Peer, available: Option<u8>) -> anyhow::Result<Check> {
        let share = &self.mqtt.share;
        if share.is_empty() {
            return Ok(Check::not_tried("mqtt.share is empty"));
        }
        let did = format!("published {FEW} messages to two members of one group");
        let change = "several replicas need a broker with MQTT 5's shared subscriptions";
        if available == Some(0) {
            return Ok(Check::loses(did, "the broker has no shared subscriptions".into(), change));
        }
        let topic = format!("{}/shared", self.scratch);
        let filter = Filter::new(format!("$share/{share}-doctor/{topic}"), QoS::AtLeastOnce);
        let (mut one, _) = self.enter("member-1", FEW).await?;
        let (mut two, _) = self.enter("member-2", FEW).await?;
        one.subscribe(vec![filter.clone()]).await?;
        two.subscribe(vec![filter]).await?;
        let taken = flood(sender, &topic, FEW).await?;
        one.within(Duration::from_secs(1), |peer| peer.received.len() >= FEW).await;
        two.within(Duration::from_secs(1), |peer| peer.received.len() >= FEW).await;
        let parts = [one.received.len(), two.received.len()];
        let came: BTreeSet<_> = one.received.iter().chain(&two.received).map(|p| p.payload.clone()).collect();
        one.leave().await;
        two.leave().await;
        let saw = format!("{} and {} come, {} different ones", parts[0], parts[1], came.len());
        Ok(if came.len() < taken.len() {
            Check::loses(did, saw, change)
        } else if parts[0] + parts[1] > taken.len() || parts.contains(&0) {
            Check::warns(did, saw, change)
        } else {
            Check::ok(did, saw)
        })
    }

    /// Counts of dropped messages, and the broker's name; `None` where it does not show them.
    async fn counters(&mut self) -> Option<(Peer, u64)> {
        let (mut peer, _) = self.enter("counters", 256).await.ok()?;
        let topics = ["$SYS/broker/version", DROPPED, "$SYS/broker/uptime"];
        let filters = topics.iter().map(|topic| Filter::new(*topic, QoS::AtLeastOnce));
        peer.subscribe(filters.collect()).await.ok()?;
        peer.within(Duration::from_secs(1), |peer| peer.received.len() >= topics.len()).await;
        let version = peer.received.iter().find(|p| p.topic == topics[0]);
        self.report.version = version.map(|p| String::from_utf8_lossy(&p.payload).into_owned());
        let dropped = count(&peer)?;
        peer.received.clear();
        Some((peer, dropped))
    }

    async fn dropped(&self, before: Option<(Peer, u64)>) -> Check {
        let Some((mut peer, before)) = before else {
            return Check::not_tried(format!("the broker does not show {DROPPED} to this user"));
        };
        // Uptime is published with every renewal, the other counters only when they have changed.
        let began = Instant::now();
        let now =
            |peer: &Peer| peer.received.iter().filter(|p| p.topic.starts_with(b"$SYS/broker/uptime")).count();
        peer.within(Duration::from_millis(10), |_| false).await;
        let seen = now(&peer);
        if !peer.within(SYS_INTERVAL, |peer| now(peer) > seen || began.elapsed() > SYS_INTERVAL).await {
            return Check::not_tried("$SYS is not renewed (mosquitto: sys_interval 10)");
        }
        peer.within(Duration::from_millis(200), |_| false).await;
        let dropped = count(&peer).unwrap_or(before).saturating_sub(before);
        peer.leave().await;
        let did = format!("read {DROPPED} before and after");
        match dropped {
            0 => Check::ok(did, format!("{before} then and now")),
            n => Check::warns(
                did,
                format!("{n} messages were dropped meanwhile, of whichever client"),
                "find out whose (mosquitto: its log; max_queued_messages, max_queued_bytes)",
            ),
        }
    }

    async fn restart(&mut self, mut sender: Peer, command: Option<&str>) -> anyhow::Result<Check> {
        let Some(command) = command else {
            return Ok(Check::not_tried(
                "give --restart-command, such as \"systemctl restart mosquitto\", to try persistence",
            ));
        };
        let topic = format!("{}/restart", self.scratch);
        let kept = format!("{}/retained", self.scratch);
        let (mut peer, _) = self.resume("restart", FEW).await?;
        peer.subscribe(vec![Filter::new(&topic, QoS::AtLeastOnce)]).await?;
        peer.leave().await;
        let taken = flood(&mut sender, &topic, FEW).await?;
        tokio::time::sleep(SETTLE).await;
        let ran = Command::new("sh").args(["-c", command]).kill_on_drop(true).output();
        let ran = tokio::time::timeout(RESTART, ran).await.context("--restart-command does not end")??;
        let said = String::from_utf8_lossy(&ran.stderr);
        anyhow::ensure!(ran.status.success(), "--restart-command failed: {}: {}", ran.status, said.trim());
        drop(sender);
        let deadline = Instant::now() + RESTART;
        let (mut peer, ack) = loop {
            match self.resume("restart", FEW).await {
                Ok(entered) => break entered,
                Err(e) if Instant::now() > deadline => return Err(e.context("after the restart")),
                Err(_) => tokio::time::sleep(Duration::from_millis(500)).await,
            }
        };
        let came = drain(&mut peer, &taken).await?;
        peer.leave().await;
        let is_retained = self.is_retained(&kept).await?;
        let did = format!(
            "published {} messages to one that is away, waited {SETTLE:?}, ran {command:?}",
            taken.len()
        );
        let lost = taken.len() - came;
        let saw = format!(
            "session {}, {lost} messages lost, the retained document {}",
            if ack.session_present { "kept" } else { "lost" },
            if is_retained { "kept" } else { "lost" }
        );
        Ok(if ack.session_present && lost == 0 && is_retained {
            Check::ok(did, saw)
        } else {
            Check::loses(
                did,
                saw,
                "keep sessions, queues and retained documents on disk (mosquitto: persistence true, \
                 persistence_location, autosave_interval 1)",
            )
        })
    }

    /// Leaves the broker as it was.
    async fn clean_up(&mut self) {
        if let Ok((mut peer, _)) = self.enter("sender", 16).await {
            let topic = format!("{}/retained", self.scratch);
            let _ = peer.publish(&topic, true, "", PublishProperties::default()).await;
            peer.leave().await;
        }
        for role in std::mem::take(&mut self.sessions) {
            // A clean start forgets the session, and this one ends with its connection.
            if let Ok((peer, _)) = self.enter(role, 16).await {
                peer.leave().await;
            }
        }
    }
}

/// Publishes `n` numbered messages; those that the broker took.
async fn flood(sender: &mut Peer, topic: &str, n: usize) -> anyhow::Result<BTreeSet<Vec<u8>>> {
    sender.answers.clear();
    for i in 0..n {
        let payload = format!("{i:064}");
        sender.client.publish(topic, QoS::AtLeastOnce, false, payload).await?;
    }
    let answered = sender.until(|peer| peer.answers.len() >= n).await;
    anyhow::ensure!(answered, "the broker answered {} of {n} messages", sender.answers.len());
    // Packet ids go round in order, and so do their acknowledgements.
    let taken = sender.answers.iter().enumerate().filter(|(_, answer)| is_taken(**answer));
    Ok(taken.map(|(i, _)| format!("{i:064}").into_bytes()).collect())
}

/// Acknowledges everything as it comes; how many of `wanted` came.
async fn drain(peer: &mut Peer, wanted: &BTreeSet<Vec<u8>>) -> anyhow::Result<usize> {
    let mut came = BTreeSet::new();
    loop {
        for publish in std::mem::take(&mut peer.received) {
            peer.client.ack(&publish).await?;
            came.insert(publish.payload.to_vec());
        }
        let all = came.intersection(wanted).count();
        if all == wanted.len() || !peer.until(|peer| !peer.received.is_empty()).await {
            return Ok(all);
        }
    }
}

fn count(peer: &Peer) -> Option<u64> {
    let newest = peer.received.iter().rfind(|p| p.topic == DROPPED)?;
    std::str::from_utf8(&newest.payload).ok()?.trim().parse().ok()
}
