//! Tells Alertmanager and webhooks what alerts there are. The shell around [`Course`].
//!
//! Each receiver is told by a task of its own, so that one that hangs holds up no other. What it could not be told it
//! is told later, as things stand then: nothing queues up. HTTP is object_store's client, with its TLS.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context;
use axum::http::{HeaderValue, Method, Uri, header};
use common::time::{Clock, Timestamp};
use object_store::{
    Certificate, ClientOptions,
    client::{HttpClient, HttpConnector, HttpError, HttpRequest, ReqwestConnector},
};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{
    Told,
    alerts::{Alert, Course},
    metrics::RuleMetrics,
    settings::{AlertsSettings, TargetSettings},
};

/// Alerts in one request.
const AT_ONCE: usize = 64;
/// Waits between two tries: the first, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// At least so often a receiver's course is looked at.
const LOOK: Duration = Duration::from_secs(5);

/// The alerts of all rules, as the rules last left them.
#[derive(Clone, Default)]
pub struct Board {
    rules: Arc<Mutex<BTreeMap<String, Vec<Alert>>>>,
}

impl Board {
    /// Puts up the alerts of a rule.
    pub(super) fn post(&self, rule: &str, alerts: Vec<Alert>) {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).insert(rule.to_owned(), alerts);
    }

    fn all(&self) -> Vec<Alert> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).values().flatten().cloned().collect()
    }
}

/// Who is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Sent again while active, and called off.
    Alertmanager,
    /// Once when it begins or its severity changes, once when it ends.
    Webhook,
}

impl Kind {
    /// As it stands in metrics.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Kind::Alertmanager => "alertmanager",
            Kind::Webhook => "webhook",
        }
    }
}

/// One receiver.
pub struct Target {
    kind: Kind,
    /// Shown to people; the path of a webhook is often a secret.
    name: String,
    address: Uri,
    token: Option<HeaderValue>,
    client: HttpClient,
    resend: Duration,
    course: Course,
}

impl Target {
    /// Every receiver that is configured.
    ///
    /// # Errors
    /// When a secret or a certificate cannot be read.
    pub fn all(settings: &AlertsSettings) -> anyhow::Result<Vec<Target>> {
        let client = client(settings)?;
        let target = |kind: Kind, of: &TargetSettings| {
            let what = || format!("alerts.{}", kind.as_str());
            let url = of.address().with_context(what)?;
            let name = format!("{} {}", kind.as_str(), url.host_str().unwrap_or_default());
            let mut address = url.as_str().trim_end_matches('/').to_owned();
            if kind == Kind::Alertmanager && !address.ends_with("/api/v2/alerts") {
                address.push_str("/api/v2/alerts");
            }
            let token = of.token.resolve().with_context(what)?;
            let token = token.map(|token| {
                let mut value = HeaderValue::try_from(format!("Bearer {token}"))?;
                value.set_sensitive(true);
                anyhow::Ok(value)
            });
            Ok(Target {
                kind,
                name,
                address: Uri::try_from(address).ok().with_context(what)?,
                token: token.transpose().with_context(what)?,
                client: client.clone(),
                resend: settings.resend,
                course: Course::new((kind == Kind::Alertmanager).then_some(settings.resend)),
            })
        };
        let managers = settings.alertmanager.iter().map(|of| target(Kind::Alertmanager, of));
        managers.chain(settings.webhook.iter().map(|of| target(Kind::Webhook, of))).collect()
    }

    /// Brings the receiver up to what stands on the board.
    ///
    /// # Errors
    /// What the receiver says, or why it cannot be reached.
    pub async fn tell(&mut self, board: &Board, now: Timestamp) -> anyhow::Result<usize> {
        let alerts = board.all();
        self.course.keep(&alerts);
        let due = self.course.due(&alerts, now);
        let mut refused = Ok(());
        for part in due.chunks(AT_ONCE) {
            let body: Value = match self.kind {
                Kind::Alertmanager => {
                    part.iter().map(|alert| alert.for_alertmanager(now + self.resend * 4)).collect()
                }
                Kind::Webhook => {
                    json!({ "version": 1, "alerts": part.iter().map(Alert::for_webhook).collect::<Vec<_>>() })
                }
            };
            // What the receiver refuses of one part is no reason to keep the others from it.
            match self.post(&body).await? {
                Ok(()) => self.course.told(part, now),
                Err(said) => refused = Err(anyhow::anyhow!(said)),
            }
        }
        refused.map(|()| due.len())
    }

    /// The inner error is the receiver's answer.
    async fn post(&self, body: &Value) -> anyhow::Result<Result<(), String>> {
        let mut request = HttpRequest::new(serde_json::to_vec(body)?.into());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.address.clone();
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(common::wire::JSON));
        if let Some(token) = &self.token {
            headers.insert(header::AUTHORIZATION, token.clone());
        }
        let answer = self.client.execute(request).await.map_err(|e| anyhow::anyhow!("{}", cause(&e)))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(Ok(()));
        }
        let body = answer.into_body().bytes().await.unwrap_or_default();
        let said: String = String::from_utf8_lossy(&body).chars().take(200).collect();
        let said = format!("it answers {status}: {said}");
        if status.is_client_error() { Ok(Err(said)) } else { Err(anyhow::anyhow!(said)) }
    }
}

/// What is at the bottom of an error, which names no address: a webhook's may be a secret.
fn cause(error: &HttpError) -> String {
    let mut root: &dyn std::error::Error = error;
    while let Some(source) = root.source() {
        root = source;
    }
    format!("{:?}: {root}", error.kind())
}

fn client(settings: &AlertsSettings) -> anyhow::Result<HttpClient> {
    let mut options = ClientOptions::new()
        // Which addresses may be plain was checked one by one.
        .with_allow_http(true)
        .with_timeout(settings.timeout)
        .with_connect_timeout(settings.timeout.min(Duration::from_secs(5)));
    if !settings.ca.is_empty() {
        let what = || format!("alerts.ca = {}", settings.ca);
        let pem = std::fs::read(&settings.ca).with_context(what)?;
        for certificate in Certificate::from_pem_bundle(&pem).with_context(what)? {
            options = options.with_root_certificate(certificate);
        }
    }
    Ok(ReqwestConnector::default().connect(&options)?)
}

/// Tells one receiver whatever changes, until `told` closes; then once more.
pub async fn run(
    mut target: Target,
    board: Board,
    clock: Arc<dyn Clock>,
    mut told: watch::Receiver<Told>,
    metrics: RuleMetrics,
) {
    let (mut retry, mut warned): (Duration, Option<Timestamp>) = (RETRY.0, None);
    let mut open = true;
    loop {
        let now = clock.now();
        let wait = match target.tell(&board, now).await {
            Ok(alerts) => {
                metrics.told(target.kind, alerts);
                retry = RETRY.0;
                LOOK
            }
            Err(e) => {
                metrics.not_told(target.kind);
                if super::once_a_minute(&mut warned, now) {
                    let (target, error) = (&target.name, format!("{e:#}"));
                    tracing::warn!(target, error, retry_in = ?retry, "alerts are not taken");
                }
                let wait = retry;
                retry = (retry * 2).min(RETRY.1);
                wait
            }
        };
        if !open {
            return;
        }
        // A receiver that fails is left alone for a while, whatever changes.
        if wait == LOOK {
            tokio::select! {
                changed = told.changed() => open = changed.is_ok(),
                () = tokio::time::sleep(wait) => {}
            }
        } else {
            let ended = async { while told.changed().await.is_ok() {} };
            open = tokio::time::timeout(wait, ended).await.is_err();
        }
    }
}
