//! As much of an HTTP client as a parent needs to ask its own children.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// Longest wait for an answer; a child that is busy is asked again at the next tick.
const PATIENCE: Duration = Duration::from_secs(5);

/// The body of a 2xx answer to `GET path`.
///
/// # Errors
/// When nobody answers in time, or with another status.
pub(crate) async fn get(server: SocketAddr, path: &str) -> anyhow::Result<String> {
    exchange(server, &format!("GET {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n")).await
}

/// The body of a 2xx answer to a `POST` of JSON.
///
/// # Errors
/// When nobody answers in time, or with another status.
pub(crate) async fn post(server: SocketAddr, path: &str, json: &serde_json::Value) -> anyhow::Result<String> {
    let body = json.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    exchange(server, &head).await
}

async fn exchange(server: SocketAddr, request: &str) -> anyhow::Result<String> {
    let answer = timeout(PATIENCE, async {
        let mut socket = TcpStream::connect(server).await?;
        socket.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer)
    });
    let answer =
        answer.await.with_context(|| format!("http://{server} did not answer in {PATIENCE:?}"))??;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a head")?;
    let status = head.split(' ').nth(1).unwrap_or("");
    if !status.starts_with('2') {
        bail!("http://{server} answered {status}: {body}");
    }
    Ok(if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        unchunk(body)
    } else {
        body.to_owned()
    })
}

/// Joins the chunks of RFC 9112, section 7.1.
fn unchunk(mut body: &str) -> String {
    let mut joined = String::with_capacity(body.len());
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.split(';').next().unwrap_or("").trim(), 16).unwrap_or(0);
        match rest.get(..size) {
            Some(chunk) if size > 0 => joined.push_str(chunk),
            _ => break,
        }
        body = rest.get(size + 2..).unwrap_or("");
    }
    joined
}

/// Sum of a metric's samples whose labels contain `label`.
pub(crate) fn metric(exposition: &str, name: &str, label: &str) -> f64 {
    let samples = exposition.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = rest.rsplit_once(' ')?;
        ((labels.is_empty() || labels.starts_with('{')) && labels.contains(label))
            .then(|| value.parse::<f64>().ok())?
    });
    samples.sum()
}

#[cfg(test)]
mod tests {
    use super::metric;

    #[test]
    fn metrics_are_summed_by_label() {
        let text = "# TYPE x counter\nx_total{stage=\"source\",outcome=\"polled\"} 3\n\
                    x_total{stage=\"filter\",outcome=\"held\"} 5\nx_total_more 100\ny 7\n# EOF\n";
        assert_eq!(metric(text, "x_total", "outcome=\"polled\""), 3.0);
        assert_eq!(metric(text, "x_total", ""), 8.0);
        assert_eq!(metric(text, "y", ""), 7.0);
    }

    #[test]
    fn chunks_are_joined() {
        assert_eq!(super::unchunk("4\r\nWiki\r\n6;x=y\r\npedia \r\n0\r\n\r\n"), "Wikipedia ");
        assert_eq!(super::unchunk("0\r\n\r\n"), "");
    }
}
