//! What to subscribe to, and as whom.

use std::{path::Path, time::Duration};

use anyhow::Context;
use common::wire::cloud_status_topic;
use rumqttc::{
    TlsConfiguration, Transport,
    v5::{MqttOptions, mqttbytes::QoS},
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use tokio::sync::watch;
use url::Url;
use uuid::Uuid;

use crate::settings::{DEFAULT_CLIENT_ID, MqttSettings};

/// What to subscribe to, and as whom.
#[derive(Clone)]
pub struct Subscription {
    /// Address, credentials and TLS.
    pub options: MqttOptions,
    /// Root of our topics.
    pub root: String,
    /// Everything to subscribe to.
    pub filters: Vec<(String, QoS)>,
    /// What the session may still be subscribed to and shall not be.
    pub former: Vec<String>,
    /// See [`MqttSettings`].
    pub heartbeat: Duration,
    /// See [`MqttSettings`].
    pub max_backoff: Duration,
    /// The writer, as it calls itself in the heartbeat.
    pub writer: Uuid,
    /// Told how the session stands, by one that is there to empty it.
    pub emptying: Option<watch::Sender<Emptying>>,
}

/// How far a session is emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emptying {
    /// Not known, or something may still come.
    UnderWay,
    /// The broker keeps no session of this client.
    NoSession,
    /// Everything that it held has come.
    Done,
    /// Another client has taken the session over.
    TakenOver,
}

/// Connection options without a session: address, limits, credentials, TLS.
///
/// # Errors
/// When a secret or a certificate cannot be read.
pub fn connection(settings: &MqttSettings) -> anyhow::Result<MqttOptions> {
    let url = Url::parse(&settings.url).with_context(|| format!("mqtt.url = {:?}", settings.url))?;
    let tls = url.scheme() == "mqtts";
    let host = url.host_str().with_context(|| format!("mqtt.url = {url} names no host"))?;
    let port = url.port().unwrap_or(if tls { 8883 } else { 1883 });
    let mut options = MqttOptions::new(&settings.client_id, host.trim_matches(['[', ']']), port);
    options
        .set_keep_alive(settings.keep_alive)
        .set_receive_maximum(Some(settings.inflight))
        .set_max_packet_size(Some(settings.max_packet));
    if !settings.username.is_empty() {
        let password = settings.password.resolve().context("mqtt.password")?.unwrap_or_default();
        options.set_credentials(&settings.username, password);
    }
    if tls {
        let configuration = if settings.ca.is_empty() {
            TlsConfiguration::default()
        } else {
            let roots =
                roots(Path::new(&settings.ca)).with_context(|| format!("mqtt.ca = {:?}", settings.ca))?;
            ClientConfig::builder().with_root_certificates(roots).with_no_client_auth().into()
        };
        options.set_transport(Transport::tls_with_config(configuration));
    }
    Ok(options)
}

/// The certificates of a PEM file, to trust in.
fn roots(file: &Path) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(file)? {
        roots.add(certificate?)?;
    }
    anyhow::ensure!(!roots.is_empty(), "the file holds no certificate; it is to hold the broker's CA as PEM");
    Ok(roots)
}

impl Subscription {
    /// Everything that the cloud stores: our streams, and the configured JSON topics.
    ///
    /// # Errors
    /// When replicas would share a client id; see also [`connection`].
    pub fn new(settings: &MqttSettings, json_filters: &[String], writer: Uuid) -> anyhow::Result<Self> {
        anyhow::ensure!(
            settings.share.is_empty() || settings.client_id != DEFAULT_CLIENT_ID,
            "mqtt.client_id = {DEFAULT_CLIENT_ID:?} is the default, and mqtt.share = {:?} is for several; give each \
             replica its own, such as {DEFAULT_CLIENT_ID}-1 (TAILRACE_CLOUD__MQTT__CLIENT_ID)",
            settings.share
        );
        let (plain, shared) = (data_filters(settings, json_filters), shared_filters(settings, json_filters));
        let mut filters = document_filters(settings);
        let mut former = Vec::new();
        if shared.is_empty() {
            filters.extend(plain);
        } else {
            filters.extend(shared);
            former = plain;
        }
        let mut filters: Vec<_> = filters.into_iter().map(|filter| (filter, QoS::AtLeastOnce)).collect();
        if !former.is_empty() {
            // Nothing of it is to wait for a replica that is away.
            filters.push((cloud_status_topic(&settings.root), QoS::AtMostOnce));
        }
        Self::of(settings, filters, former, writer)
    }

    /// Takes what the session holds and lets nothing new come: its own heartbeat, which the broker queues behind
    /// everything else, is the end.
    ///
    /// # Errors
    /// See [`connection`].
    pub fn emptying(
        settings: &MqttSettings,
        json_filters: &[String],
        writer: Uuid,
        told: watch::Sender<Emptying>,
    ) -> anyhow::Result<Self> {
        let filters = vec![(cloud_status_topic(&settings.root), QoS::AtLeastOnce)];
        let former = [
            data_filters(settings, json_filters),
            shared_filters(settings, json_filters),
            document_filters(settings),
        ];
        let subscription = Self::of(settings, filters, former.concat(), writer)?;
        Ok(Self { emptying: Some(told), ..subscription })
    }

    fn of(
        settings: &MqttSettings,
        filters: Vec<(String, QoS)>,
        former: Vec<String>,
        writer: Uuid,
    ) -> anyhow::Result<Self> {
        let mut options = connection(settings)?;
        let expiry = u32::try_from(settings.session_expiry.as_secs()).unwrap_or(u32::MAX);
        options.set_clean_start(false).set_manual_acks(true).set_session_expiry_interval(Some(expiry));
        let (heartbeat, max_backoff) = (settings.heartbeat, settings.max_backoff);
        let root = settings.root.clone();
        Ok(Self { options, root, filters, former, heartbeat, max_backoff, writer, emptying: None })
    }
}

/// Of lanes and JSON, as a single client subscribes to them.
pub(crate) fn data_filters(settings: &MqttSettings, json_filters: &[String]) -> Vec<String> {
    let streams = ["readings", "aggregates", "anomalies", "control", "json"];
    let ours = streams.iter().map(|stream| format!("{}/+/+/{stream}", settings.root));
    ours.chain(json_filters.iter().cloned()).collect()
}

/// The same, as one of several replicas does; empty when there is one.
fn shared_filters(settings: &MqttSettings, json_filters: &[String]) -> Vec<String> {
    let share = &settings.share;
    let shared = data_filters(settings, json_filters).into_iter().map(|f| format!("$share/{share}/{f}"));
    if share.is_empty() { Vec::new() } else { shared.collect() }
}

/// Of retained documents, which no shared subscription gets.
pub(crate) fn document_filters(settings: &MqttSettings) -> Vec<String> {
    ["status", "devices"].iter().map(|stream| format!("{}/+/+/{stream}", settings.root)).collect()
}
