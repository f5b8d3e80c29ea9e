//! Stores behind a server: S3 and what speaks it; Azure and Google in builds with those features.
//!
//! * Credentials are `store.s3`'s references or, without them, what AWS's own tools would use: `AWS_*` in the
//!   environment, a web identity, a container's or a machine's role.
//! * A request that a server answers with 5xx or 429, or whose connection fails, is tried again with backoff
//!   for `store.retry_for`. One try ends after `store.timeout`, so a server that hangs stalls nothing for
//!   ever. What fails after that is the caller's to repeat.
//! * A put-if-absent whose answer was lost may be repeated here, and then says `AlreadyExists` of its own
//!   object.
//! * Plain HTTP is for loopback, and for whoever sets `store.s3.allow_http`.

use std::{error::Error as _, fmt::Write as _, sync::Arc, time::Duration};

use anyhow::Context;
use common::{config::Mistakes, time::duration};
use object_store::{
    BackoffConfig, Certificate, ClientOptions, Error, ObjectStore, RetryConfig, StaticCredentialProvider,
    aws::{AmazonS3Builder, AmazonS3ConfigKey, AwsCredential, S3ConditionalPut, S3CopyIfNotExists},
};
use url::{Host, Url};

use crate::settings::StoreSettings;

/// Opens the bucket of `url`; also says which one and where, for people.
///
/// # Errors
/// Names the setting that does not fit.
pub(super) fn connect(url: &Url, settings: &StoreSettings) -> anyhow::Result<(Arc<dyn ObjectStore>, String)> {
    // Such a URL would show up in logs: it is not printed.
    anyhow::ensure!(
        url.username().is_empty() && url.password().is_none() && url.query().is_none(),
        "store.url holds more than a bucket and a prefix; credentials belong into store.s3 or the environment"
    );
    let bucket = url.host_str().unwrap_or("");
    anyhow::ensure!(
        !bucket.is_empty(),
        "store.url = {url} names no bucket; write {}://BUCKET/PREFIX",
        url.scheme()
    );
    // Delta's readers do not agree on how anything else is escaped.
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=".contains(c);
    anyhow::ensure!(
        url.path().chars().all(plain) && !url.path().contains("//"),
        "store.url = {url}: write the prefix with letters, digits, - _ . = and single slashes"
    );
    match url.scheme() {
        "s3" => s3(bucket, settings),
        "az" => azure(bucket, settings),
        _ => google(bucket, settings),
    }
}

/// The URL with a slash at its end.
pub(super) fn folder(mut url: Url) -> Url {
    let path = format!("{}/", url.path().trim_end_matches('/'));
    url.set_path(&path);
    url
}

fn s3(bucket: &str, settings: &StoreSettings) -> anyhow::Result<(Arc<dyn ObjectStore>, String)> {
    let s3 = &settings.s3;
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_copy_if_not_exists(S3CopyIfNotExists::Multipart)
        .with_virtual_hosted_style_request(s3.virtual_host)
        .with_retry(retry(settings));
    if !s3.region.is_empty() {
        builder = builder.with_region(&s3.region);
    }
    let endpoint = [AmazonS3ConfigKey::S3Endpoint, AmazonS3ConfigKey::Endpoint]
        .iter()
        .filter(|_| s3.endpoint.is_empty())
        .find_map(|key| builder.get_config_value(key))
        .unwrap_or_else(|| s3.endpoint.clone());
    let mut options = client(settings)?;
    let place = if endpoint.is_empty() {
        format!("bucket {bucket}")
    } else {
        if let Some((problem, fix)) = unfit(&endpoint, s3.allow_http) {
            anyhow::bail!("the S3 endpoint {problem}; {fix}");
        }
        options = options.with_allow_http(endpoint.starts_with("http:"));
        let mut at = Url::parse(&endpoint)?;
        if s3.virtual_host {
            let host = format!("{bucket}.{}", at.host_str().unwrap_or(""));
            at.set_host(Some(&host)).with_context(|| format!("store.url: bucket {bucket} as a host name"))?;
        }
        builder =
            builder.with_config(AmazonS3ConfigKey::S3Endpoint, at.as_str().trim_end_matches('/').to_owned());
        format!("bucket {bucket} at {endpoint}")
    };
    let resolved = (s3.access_key_id.resolve()?, s3.secret_access_key.resolve()?);
    if let (Some(key_id), Some(secret_key)) = resolved {
        let credential = AwsCredential { key_id, secret_key, token: s3.session_token.resolve()? };
        builder = builder.with_credentials(Arc::new(StaticCredentialProvider::new(credential)));
    }
    let store = builder.with_client_options(options).build().with_context(|| place.clone())?;
    Ok((Arc::new(store), place))
}

#[cfg(feature = "azure")]
fn azure(container: &str, settings: &StoreSettings) -> anyhow::Result<(Arc<dyn ObjectStore>, String)> {
    let place = format!("Azure container {container}");
    let store = object_store::azure::MicrosoftAzureBuilder::from_env()
        .with_container_name(container)
        .with_retry(retry(settings))
        .with_client_options(client(settings)?)
        .build()
        .with_context(|| format!("{place}; AZURE_STORAGE_ACCOUNT_NAME and its credentials say whose"))?;
    Ok((Arc::new(store), place))
}

#[cfg(not(feature = "azure"))]
fn azure(_: &str, _: &StoreSettings) -> anyhow::Result<(Arc<dyn ObjectStore>, String)> {
    anyhow::bail!("store.url: this build has no az store; build cloud-ingest with --features azure")
}

#[cfg(feature = "gcp")]
fn google(bucket: &str, settings: &StoreSettings) -> anyhow::Result<(Arc<dyn ObjectStore>, String)> {
    let place = format!("Google bucket {bucket}");
    let store = object_store::gcp::GoogleCloudStorageBuilder::from_env()
        .with_bucket_name(bucket)
        .with_retry(retry(settings))
        .with_client_options(client(settings)?)
        .build()
        .with_context(|| place.clone())?;
    Ok((Arc::new(store), place))
}

#[cfg(not(feature = "gcp"))]
fn google(_: &str, _: &StoreSettings) -> anyhow::Result<(Arc<dyn ObjectStore>, String)> {
    anyhow::bail!("store.url: this build has no gs store; build cloud-ingest with --features gcp")
}

fn retry(settings: &StoreSettings) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig { max_backoff: Duration::from_secs(5), ..BackoffConfig::default() },
        // In practice time alone is the bound.
        max_retries: 1_000,
        retry_timeout: settings.retry_for,
    }
}

fn client(settings: &StoreSettings) -> anyhow::Result<ClientOptions> {
    let mut options = ClientOptions::new()
        .with_timeout(settings.timeout)
        .with_connect_timeout(settings.timeout.min(Duration::from_secs(5)));
    if !settings.ca.is_empty() {
        let what = || format!("store.ca = {}", settings.ca);
        let pem = std::fs::read(&settings.ca).with_context(what)?;
        for certificate in Certificate::from_pem_bundle(&pem).with_context(what)? {
            options = options.with_root_certificate(certificate);
        }
    }
    Ok(options)
}

/// Notes what is wrong with `[store]`.
pub(crate) fn check(settings: &StoreSettings, m: &mut Mistakes) {
    for (key, value) in [("store.timeout", settings.timeout), ("store.retry_for", settings.retry_for)] {
        let short = format!("{} is too short", duration::format(value));
        m.require(value >= Duration::from_secs(1), key, short, "write 1s or more");
    }
    let s3 = &settings.s3;
    if let Some((problem, fix)) = unfit(&s3.endpoint, s3.allow_http).filter(|_| !s3.endpoint.is_empty()) {
        m.add("store.s3.endpoint", problem, fix);
    }
    m.require(
        s3.access_key_id.is_set() == s3.secret_access_key.is_set(),
        "store.s3.access_key_id",
        "of key id and secret key only one is given",
        "give both, or neither and let the environment say",
    );
}

/// What is wrong with an endpoint, and the fix.
fn unfit(endpoint: &str, allow_http: bool) -> Option<(String, &'static str)> {
    let url = Url::parse(endpoint).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let Some(url) = url.filter(|url| url.has_host() && url.username().is_empty()) else {
        return Some(("is not the URL of a server".to_owned(), "write https://HOST or https://HOST:PORT"));
    };
    let loopback = match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    };
    (url.scheme() == "http" && !loopback && !allow_http).then(|| {
        let problem = format!("{endpoint:?} would carry the lake over the network in plain text");
        (problem, "write https://, or set store.s3.allow_http = true")
    })
}

/// Whether a bucket answered that it has no such object.
pub(super) fn is_absent(error: &Error) -> bool {
    matches!(error, Error::NotFound { .. }) && !chain(error).contains("NoSuchBucket")
}

/// What a server's refusal means and what to check; the server's own words follow.
pub(super) fn explain(error: Error, place: &str) -> anyhow::Error {
    let text = chain(&error);
    let has = |parts: &[&str]| parts.iter().any(|part| text.contains(part));
    let advice = if has(&["169.254.169.254", "169.254.170.2"]) {
        "there are no credentials: set store.s3.access_key_id and store.s3.secret_access_key, or AWS_ACCESS_KEY_ID \
         and AWS_SECRET_ACCESS_KEY"
    } else if has(&["NoSuchBucket"]) {
        "there is no such bucket: create it, or correct store.url"
    } else if has(&["InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"]) {
        "the server does not accept the keys: check store.s3.access_key_id and store.s3.secret_access_key, or \
         AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    } else if has(&["AuthorizationHeaderMalformed", "LOCATION", "PermanentRedirect"]) {
        "check store.s3.region"
    } else if matches!(error, Error::PermissionDenied { .. } | Error::Unauthenticated { .. }) {
        "access is refused: the credentials must be allowed to list, read, write and delete there"
    } else {
        "check store.s3.endpoint, and that the server can be reached"
    };
    anyhow::anyhow!(text).context(format!("{place}: {advice}"))
}

fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            let _ = write!(text, ": {more}");
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{settings::Settings, store::Store};

    #[track_caller]
    fn refused(url: &str, change: impl FnOnce(&mut StoreSettings), part: &str) {
        let mut settings = StoreSettings::at(url);
        change(&mut settings);
        let error = format!("{:#}", Store::configured(&settings).unwrap_err());
        assert!(error.contains(part), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        refused("ftp://host/lake", |_| {}, "no ftp store");
        refused("file://host/x", |_| {}, "file:///PATH");
        refused("s3:///lake", |_| {}, "s3://BUCKET/PREFIX");
        refused("s3://bucket/a%20lake", |_| {}, "prefix");
        refused("s3://key:hunter2@bucket/lake", |_| {}, "credentials");
        refused("s3://bucket?secret=hunter2", |_| {}, "credentials");
        refused("s3://b/x", |s| s.s3.endpoint = "http://192.0.2.1:9000".into(), "store.s3.allow_http");
        refused("s3://b/x", |s| s.s3.endpoint = "minio:9000".into(), "https://HOST:PORT");
        refused("s3://b/x", |s| s.ca = "/no/such.pem".into(), "/no/such.pem");
        if cfg!(not(feature = "azure")) {
            refused("az://container/lake", |_| {}, "--features azure");
        }
        if cfg!(not(feature = "gcp")) {
            refused("gs://bucket/lake", |_| {}, "--features gcp");
        }
    }

    #[test]
    fn the_configuration_says_what_is_wrong_before_a_server_does() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cloud-ingest.toml");
        let text = "[store]\ntimeout = \"1ms\"\n[store.s3]\nendpoint = \"http://192.0.2.1:9000\"\n\
                    access_key_id = \"env:X\"\n";
        std::fs::write(&file, text).unwrap();
        let mistakes = Settings::load(Some(&file)).unwrap_err().to_string();
        for part in ["store.timeout", "store.s3.endpoint", "store.s3.access_key_id"] {
            assert!(mistakes.contains(part), "{part:?} not in {mistakes}");
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("secret");
        std::fs::write(&secret, "hunter2\n").unwrap();
        let text = format!(
            "url = \"s3://bucket/lake\"\ntimeout = \"5s\"\nretry_for = \"5s\"\nca = \"\"\n[s3]\n\
             endpoint = \"http://127.0.0.1:1\"\nregion = \"\"\nvirtual_host = true\nallow_http = false\n\
             access_key_id = \"file:{0}\"\nsecret_access_key = \"file:{0}\"\nsession_token = \"file:{0}\"\n",
            secret.display()
        );
        let settings: StoreSettings = toml::from_str(&text).unwrap();
        let store = Store::configured(&settings);
        // The bucket cannot go before an address.
        assert!(format!("{:#}", store.unwrap_err()).contains("host name"));
        let mut settings = settings;
        settings.s3.endpoint = "http://localhost:1".into();
        let store = Store::configured(&settings).unwrap();
        let objects = store.objects();
        let printed = format!("{settings:?} {store:?} {objects}");
        assert!(printed.contains("bucket bucket at http://localhost:1"), "{printed}");
        assert!(!printed.contains("hunter2"), "{printed}");
        assert!(format!("{objects:?}").contains("http://bucket.localhost:1"));
        assert_eq!(store.url().as_str(), "s3://bucket/lake/");
    }

    #[test]
    fn refusals_are_explained() {
        let body = |code: &str| Error::PermissionDenied {
            path: "ops/x".into(),
            source: format!("403 Forbidden: <Error><Code>{code}</Code></Error>").into(),
        };
        let place = "bucket lake at https://minio";
        for (code, advice) in [
            ("SignatureDoesNotMatch", "store.s3.secret_access_key"),
            ("AccessDenied", "must be allowed"),
            ("AuthorizationHeaderMalformed", "store.s3.region"),
        ] {
            let text = format!("{:#}", explain(body(code), place));
            assert!(text.contains(place) && text.contains(advice) && text.contains(code), "{text}");
        }
        let none = Error::NotFound { path: "x".into(), source: "<Code>NoSuchBucket</Code>".into() };
        assert!(!is_absent(&none) && explain(none, place).to_string().contains("no such bucket"));
        assert!(is_absent(&Error::NotFound { path: "x".into(), source: "<Code>NoSuchKey</Code>".into() }));
    }
}
