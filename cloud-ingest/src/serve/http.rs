//! HTTP: the dashboard, SQL as JSON, audit, maintenance records, metrics and health.
//!
//! | request | answer |
//! |---|---|
//! | `GET /` | the dashboard; it loads nothing from elsewhere |
//! | `POST /api/v1/sql` `{"sql"}` | `{"columns": [{"name", "type"}], "rows": [[…]]}`, at most [`MAX_JSON_ROWS`] rows |
//! | `GET /api/v1/audit` | the delivery ledger |
//! | `GET /api/v1/overview` | what the dashboard shows, in one answer |
//! | `POST /api/v1/maintenance` `{"asset", "site"?, "done_at"?, "action"?, "note"?}` | 202 and the record |
//! | `GET`, `POST /api/v1/demo` `{"key"}` | the demo's buttons, where there is a demo |
//! | `GET /metrics`, `/healthz`, `/readyz` | OpenMetrics text; 200 or 503 |
//!
//! Errors are `{"error": {"message", "sqlstate"?}}`. A page of another origin can do nothing here: there is no
//! CORS, what changes something must be `application/json` and of this very origin, and on a loopback address the
//! `Host` must be one, so that no other name can be pointed at it (DNS rebinding). Where users are configured,
//! everything but `/healthz` and `/readyz` needs one of them (HTTP Basic).
//!
//! At most `serve.max_connections` at a time, and one that sends no request is closed ([`common::http`]); further ones
//! wait.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, Request, State, rejection::JsonRejection},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use common::time::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{
    Control, Maintenance, Sources, json as rows_as_json,
    live::Live,
    overview::Overview,
    sql::{Queries, SqlError},
};

/// Rows in one JSON answer; more belong on the PostgreSQL wire, which streams.
pub(super) const MAX_JSON_ROWS: u64 = 50_000;
/// Bytes in a request's body.
const MAX_BODY: usize = 64 * 1024;
/// `/readyz` waits so long for the lake.
const READY_WITHIN: Duration = Duration::from_secs(3);

const PAGE: &str = include_str!("dashboard/index.html");
const STYLE: &str = include_str!("dashboard/style.css");
const SCRIPT: &str = include_str!("dashboard/app.js");
const CHARTS: &str = include_str!("dashboard/charts.js");
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What the handlers share.
#[derive(Clone)]
pub(super) struct App {
    pub(super) queries: Arc<Queries>,
    pub(super) live: Live,
    pub(super) overview: Arc<Overview>,
    pub(super) sources: Sources,
    pub(super) control: Option<Arc<Control>>,
    /// Digests of `name:password`; empty where nobody needs one.
    pub(super) users: Arc<Vec<[u8; 32]>>,
    /// Only names of this machine are accepted as `Host`.
    pub(super) loopback: bool,
}

/// The digest that [`App::users`] holds.
pub(super) fn digest(name: &str, password: &str) -> [u8; 32] {
    Sha256::new().chain_update(name).chain_update(":").chain_update(password).finalize().into()
}

/// All that is answered.
pub(super) fn router(app: App) -> Router {
    Router::new()
        .route("/", get(|| async { asset("text/html; charset=utf-8", PAGE) }))
        .route("/style.css", get(|| async { asset("text/css; charset=utf-8", STYLE) }))
        .route("/app.js", get(|| async { asset("text/javascript; charset=utf-8", SCRIPT) }))
        .route("/charts.js", get(|| async { asset("text/javascript; charset=utf-8", CHARTS) }))
        .route("/api/v1/sql", post(sql))
        .route("/api/v1/audit", get(audit))
        .route("/api/v1/overview", get(overview))
        .route("/api/v1/maintenance", post(maintenance))
        .route("/api/v1/demo", get(demo).post(press))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .fallback(|| async { Problem::new(StatusCode::NOT_FOUND, "there is nothing here; see /") })
        .method_not_allowed_fallback(|| async {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "this path does not take that method")
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn_with_state(app.clone(), guard))
        .with_state(app)
}

fn asset(content_type: &'static str, text: &'static str) -> Response {
    ([(header::CONTENT_TYPE, content_type), (header::CACHE_CONTROL, "no-cache")], text).into_response()
}

/// An error as JSON.
struct Problem {
    status: StatusCode,
    message: String,
    sqlstate: Option<&'static str>,
}

impl Problem {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), sqlstate: None }
    }

    fn failed(error: &anyhow::Error) -> Self {
        tracing::warn!(error = format!("{error:#}"), "request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}"))
    }
}

impl From<SqlError> for Problem {
    fn from(error: SqlError) -> Self {
        let status = match &error {
            SqlError::ReadOnly(_) => StatusCode::FORBIDDEN,
            SqlError::Unsupported(_) | SqlError::Invalid { .. } => StatusCode::BAD_REQUEST,
            SqlError::TooManyRows(_) => StatusCode::UNPROCESSABLE_ENTITY,
            SqlError::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
            SqlError::OutOfMemory(_) => StatusCode::SERVICE_UNAVAILABLE,
            SqlError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status, message: error.to_string(), sqlstate: Some(error.sqlstate()) }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut error = json!({ "message": self.message });
        if let Some(state) = self.sqlstate {
            error["sqlstate"] = state.into();
        }
        (self.status, Json(json!({ "error": error }))).into_response()
    }
}

/// Who may ask, and what every answer carries.
async fn guard(State(app): State<App>, request: Request, next: Next) -> Response {
    let mut response = match refuse(&app, &request) {
        Some(problem) => {
            let unauthorized = problem.status == StatusCode::UNAUTHORIZED;
            let mut response = problem.into_response();
            if unauthorized {
                let challenge = HeaderValue::from_static("Basic realm=\"tailrace\", charset=\"UTF-8\"");
                response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
            }
            response
        }
        None => next.run(request).await,
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if !headers.contains_key(header::CACHE_CONTROL) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    response
}

fn refuse(app: &App, request: &Request) -> Option<Problem> {
    let headers = request.headers();
    let text = |name: header::HeaderName| headers.get(name).and_then(|v| v.to_str().ok());
    let host = text(header::HOST).unwrap_or_default();
    if app.loopback && !is_loopback(host) {
        let message = format!("host {host:?} is not this machine; use 127.0.0.1 or localhost");
        return Some(Problem::new(StatusCode::MISDIRECTED_REQUEST, message));
    }
    let open = ["/healthz", "/readyz"].contains(&request.uri().path());
    if !open && !app.users.is_empty() && !is_known(&app.users, headers) {
        return Some(Problem::new(StatusCode::UNAUTHORIZED, "a user of serve.users is needed"));
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let origin = text(header::ORIGIN);
        let foreign = origin.is_some_and(|o| o.split_once("://").is_none_or(|(_, from)| from != host))
            || headers.get("sec-fetch-site").is_some_and(|site| site != "same-origin" && site != "none");
        if foreign {
            return Some(Problem::new(StatusCode::FORBIDDEN, "requests of other origins are refused"));
        }
        let content_type = text(header::CONTENT_TYPE).unwrap_or_default();
        if content_type.split(';').next().is_none_or(|t| !t.trim().eq_ignore_ascii_case("application/json")) {
            let message = "the content type must be application/json";
            return Some(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
    }
    None
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Compares digests, so that the time taken says nothing of the password.
fn is_known(users: &[[u8; 32]], headers: &HeaderMap) -> bool {
    let given = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    let Some(decoded) = given.and_then(|v| v.strip_prefix("Basic ")).and_then(base64) else {
        return false;
    };
    let given: [u8; 32] = Sha256::digest(&decoded).into();
    users.contains(&given)
}

/// Standard alphabet with padding, RFC 4648 section 4.
fn base64(text: &str) -> Option<Vec<u8>> {
    let (mut out, mut bits, mut held) = (Vec::new(), 0u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let six = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(six);
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    Some(out)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SqlRequest {
    sql: String,
}

async fn sql(
    State(app): State<App>,
    request: Result<Json<SqlRequest>, JsonRejection>,
) -> Result<Json<Value>, Problem> {
    let request = body(request)?;
    let answer = app.queries.run(&request.sql, MAX_JSON_ROWS).await?;
    let columns = rows_as_json::columns(&answer.schema);
    Ok(Json(json!({ "columns": columns, "rows": rows_as_json::rows(&answer.batches) })))
}

fn body<T>(request: Result<Json<T>, JsonRejection>) -> Result<T, Problem> {
    request.map(|Json(body)| body).map_err(|e| Problem::new(e.status(), e.body_text()))
}

async fn audit(State(app): State<App>) -> Result<Json<Value>, Problem> {
    let audit = app.sources.ledger.audit().await.map_err(|e| Problem::failed(&e))?;
    Ok(Json(json!(*audit)))
}

async fn overview(State(app): State<App>) -> Json<Value> {
    Json(app.overview.now(&app).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MaintenanceRequest {
    asset: String,
    site: Option<String>,
    done_at: Option<Timestamp>,
    action: Option<String>,
    note: Option<String>,
}

/// Takes down what was done to a machine; the record goes the way of everything else, through bronze.
async fn maintenance(
    State(app): State<App>,
    request: Result<Json<MaintenanceRequest>, JsonRejection>,
) -> Result<(StatusCode, Json<Maintenance>), Problem> {
    let request = body(request)?;
    let site = app.overview.site_of(&app, &request.asset, request.site.as_deref()).await;
    let site = site.map_err(|e| Problem::new(StatusCode::NOT_FOUND, e))?;
    let now = app.sources.clock.now();
    let done_at = request.done_at.unwrap_or(now);
    if done_at > now + Duration::from_secs(60) {
        let message = format!("done_at {done_at} is in the future");
        return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, message));
    }
    for (name, text) in [("action", &request.action), ("note", &request.note)] {
        if text.as_ref().is_some_and(|t| t.len() > 2_000) {
            let message = format!("{name} is longer than 2000 bytes");
            return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, message));
        }
    }
    let record = Maintenance {
        id: uuid::Uuid::now_v7(),
        site,
        asset_id: request.asset,
        done_at,
        action: request.action,
        note: request.note,
    };
    (app.sources.maintenance)(record.clone()).await.map_err(|e| Problem::failed(&e))?;
    Ok((StatusCode::ACCEPTED, Json(record)))
}

#[derive(Serialize)]
struct Button<'a> {
    key: char,
    label: &'a str,
}

async fn demo(State(app): State<App>) -> Json<Value> {
    let buttons: Vec<Button> =
        app.control.iter().flat_map(|c| c.buttons()).map(|(key, label)| Button { key, label }).collect();
    Json(json!({ "available": app.control.is_some(), "buttons": buttons }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Press {
    key: char,
}

async fn press(
    State(app): State<App>,
    request: Result<Json<Press>, JsonRejection>,
) -> Result<StatusCode, Problem> {
    let Press { key } = body(request)?;
    let control = app
        .control
        .as_ref()
        .ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, "this is no demo; there is nothing to break"))?;
    if control.buttons().all(|(known, _)| known != key) {
        return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, format!("there is no button {key:?}")));
    }
    let sent = control.keys.try_send(key);
    sent.map_err(|_| Problem::new(StatusCode::SERVICE_UNAVAILABLE, "the demo is busy; try again"))?;
    Ok(StatusCode::ACCEPTED)
}

async fn metrics(State(app): State<App>) -> Response {
    let text = (app.sources.metrics)();
    ([(header::CONTENT_TYPE, common::telemetry::EXPOSITION_TYPE)], Body::from(text)).into_response()
}

/// Ready when the lake can be read. Says no before who asks has lost patience.
async fn ready(State(app): State<App>) -> Response {
    match app.queries.catalog().refresh_within(READY_WITHIN).await {
        Ok(()) => "ready\n".into_response(),
        Err(e) => Problem::new(StatusCode::SERVICE_UNAVAILABLE, format!("{e:#}")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_this_machine() {
        for host in ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.1.2.3", "[::1]:8080"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in
            ["", "evil.example", "127.0.0.1.evil.example:80", "10.0.0.1", "[::2]:80", "localhost.evil"]
        {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn base64_as_the_rfc_has_it() {
        for (text, bytes) in
            [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9vYmE=", "fooba"), ("Zm9vYmFy", "foobar")]
        {
            assert_eq!(base64(text).as_deref(), Some(bytes.as_bytes()), "{text}");
        }
        assert_eq!(base64("Zm9v!"), None);
    }
}
