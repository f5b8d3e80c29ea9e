//! HTTP as both sides serve it: a bounded number of connections, and a bounded time for the head of a request.
//!
//! axum's own loop has neither: who opens connections and says nothing would keep a file descriptor each.

use std::{future::Future, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore};
use tracing::warn;

/// How long the head of a request may take to come, the first and those after it.
pub const HEAD_WITHIN: Duration = Duration::from_secs(5);

/// Answers on `listener` with at most `max_connections` at a time, further ones wait, until `stop`; then what has been
/// asked is answered still.
pub async fn serve<S>(listener: TcpListener, router: Router, max_connections: usize, stop: S)
where
    S: Future<Output = ()> + Clone + Send + 'static,
{
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN);
    let room = Arc::new(Semaphore::new(max_connections));
    let mut stopped = pin!(stop.clone());
    loop {
        let accepted = async {
            // Never closed.
            let permit = Arc::clone(&room).acquire_owned().await.ok();
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = stopped.as_mut() => break,
        };
        match accepted {
            Ok((socket, _)) => {
                let service = TowerToHyperService::new(router.clone());
                let connection = http.serve_connection(TokioIo::new(socket), service);
                let stop = stop.clone();
                tokio::spawn(async move {
                    let _permit = permit;
                    let mut connection = pin!(connection);
                    // Whoever goes away in the midst of it is none of our business.
                    tokio::select! {
                        _ = connection.as_mut() => return,
                        () = stop => {}
                    }
                    connection.as_mut().graceful_shutdown();
                    let _ = connection.await;
                });
            }
            Err(error) => {
                // Out of file descriptors, most likely: the next accept would fail at once, too.
                warn!(%error, "accepting an HTTP connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    let all = u32::try_from(max_connections).unwrap_or(u32::MAX);
    let _ = room.acquire_many(all).await;
}
