//! The shell around [`crate::bronze`]: receive, put, then acknowledge.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use common::time::Clock;
use tokio::sync::{mpsc, watch};

use crate::{
    bronze::{self, Bronze, Sealed, ack_ranges},
    metrics::Metrics,
    store::Store,
    subscribe::{AckToken, Durable, Inbound},
};

/// Longest wait between two tries of a put.
const MAX_RETRY: Duration = Duration::from_secs(30);

/// Writes until `inbound` closes, flushes, and closes `durable`. `progress` counts the segments.
///
/// A put is tried until it succeeds: what waits behind it waits at the broker, and on the edges.
pub async fn run(
    mut bronze: Bronze<AckToken>,
    store: Store,
    clock: Arc<dyn Clock>,
    mut inbound: mpsc::Receiver<Vec<Inbound>>,
    durable: mpsc::Sender<Durable>,
    progress: watch::Sender<u64>,
    metrics: Metrics,
) {
    loop {
        let deadline = bronze.next_deadline();
        let overdue = async {
            match deadline {
                Some(at) => tokio::time::sleep(at.since(clock.now())).await,
                None => std::future::pending().await,
            }
        };
        let sealed = tokio::select! {
            received = inbound.recv() => match received {
                Some(messages) => {
                    let now = clock.now();
                    let messages = messages.into_iter();
                    messages.flat_map(|Inbound { message, token }| bronze.push(now, message, token)).collect()
                }
                None => break,
            },
            () = overdue => bronze.tick(clock.now()).into_iter().collect::<Vec<_>>(),
        };
        for segment in sealed {
            put(segment, &store, &durable, &progress, &metrics).await;
        }
    }
    if let Some(segment) = bronze.flush() {
        put(segment, &store, &durable, &progress, &metrics).await;
    }
}

async fn put(
    segment: Sealed<AckToken>,
    store: &Store,
    durable: &mpsc::Sender<Durable>,
    progress: &watch::Sender<u64>,
    metrics: &Metrics,
) {
    let Sealed { name, messages, tokens } = segment;
    let ranges = ack_ranges(&messages);
    let payloads = messages.iter().map(|m| m.payload.len()).sum();
    let messages = Arc::new(messages);
    let mut retry = Duration::from_millis(200);
    loop {
        let rows = Arc::clone(&messages);
        let encoded =
            tokio::task::spawn_blocking(move || anyhow::Ok(bronze::encode(&bronze::rows(&rows)?)?)).await;
        let written = match encoded {
            Ok(Ok(bytes)) => {
                let put = bronze::put(store.objects().as_ref(), &name, Bytes::from(bytes)).await;
                put.map_err(|e| store.explain(e))
            }
            Ok(Err(e)) => Err(e),
            Err(e) => Err(e.into()),
        };
        match written {
            Ok(()) => break,
            Err(e) => {
                metrics.put_failed();
                let (segment, error) = (name.path(), format!("{e:#}"));
                tracing::error!(segment, error, retry_in = ?retry, "bronze cannot be written");
                tokio::time::sleep(retry).await;
                retry = (retry * 2).min(MAX_RETRY);
            }
        }
    }
    metrics.sealed(payloads);
    progress.send_modify(|segments| *segments += 1);
    // The acknowledger ends after this stage; without it the messages are delivered again.
    let _ = durable.send(Durable { tokens, ranges }).await;
}
