//! The HTTP listener: accepts a bounded number of connections, serves one `axum::Router`, and drains.

use crate::hosts::Hosts;
use crate::proxies::Proxies;
use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

/// How long a request may take to arrive and be answered; a WebSocket is not covered after its upgrade, and the
/// OpenAI-compatible entry has limits of its own.
const REQUEST_MAX: Duration = Duration::from_secs(30);

/// In a drain, how long a client may take to finish sending a request or to read its answer.
const GOODBYE: Duration = Duration::from_secs(1);

/// The checks that every request passes before a route sees it.
#[derive(Debug, Clone)]
pub struct Front {
    pub hosts: Hosts,
    pub proxies: Proxies,
}

impl Front {
    /// Answers a request from `peer` that came in on the address `local`. Routes find the client's address, which a
    /// trusted proxy may have forwarded, in [`ConnectInfo`].
    async fn answer(&self, mut request: Request<Body>, routes: Router, peer: SocketAddr, local: IpAddr) -> Response {
        let (parts, body) = request.into_parts();
        if let Err(refusal) = self.hosts.check(&parts, local) {
            tracing::debug!(%peer, ?refusal, "refused a request by its Host header; http.hosts lists the accepted names");
            return refusal.into_response();
        }

        let client = self.proxies.client(peer, &parts.headers);
        request = Request::from_parts(parts, body);
        request.extensions_mut().insert(ConnectInfo(client));

        // A model may take longer; the gateway bounds these requests itself.
        let is_bounded = !request.uri().path().starts_with(gateway::OPENAI_PREFIX);
        let answer = routes.oneshot(request);
        let answer = if is_bounded {
            tokio::time::timeout(REQUEST_MAX, answer).await
        } else {
            Ok(answer.await)
        };
        match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(never)) => match never {},
            Err(_) => StatusCode::REQUEST_TIMEOUT.into_response(),
        }
    }
}

/// Serves until cancelled, then gives the requests in progress `drain` to finish. WebSockets do not count: after the
/// upgrade they belong to the cluster node.
pub async fn serve(
    listener: TcpListener,
    routes: Router,
    front: Front,
    max_connections: usize,
    drain: Duration,
    cancel: CancellationToken,
) {
    let front = Arc::new(front);
    let permits = Arc::new(Semaphore::new(max_connections));
    let tracker = TaskTracker::new();
    loop {
        let permit = tokio::select! {
            () = cancel.cancelled() => break,
            permit = permits.clone().acquire_owned() => permit.expect("the semaphore is never closed"),
        };
        let stream = tokio::select! {
            () = cancel.cancelled() => break,
            accepted = listener.accept() => accepted,
        };

        match stream {
            Ok((stream, peer)) => {
                let connection = connection(stream, peer, routes.clone(), front.clone(), drain, cancel.clone());
                tracker.spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Usually out of file descriptors: pause until some are closed, rather than spin.
                tracing::warn!(%error, "cannot accept an HTTP connection; trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    // Closed before the drain, so that new clients connect to another server.
    drop(listener);
    tracker.close();
    tracker.wait().await;
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    routes: Router,
    front: Arc<Front>,
    drain: Duration,
    cancel: CancellationToken,
) {
    let _ = stream.set_nodelay(true);
    let Ok(local) = stream.local_addr() else { return };

    // Counts the requests in progress. Closed, so that `wait` returns whenever there are none.
    let handled = TaskTracker::new();
    handled.close();
    let handlers = handled.clone();
    let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let (front, routes) = (front.clone(), routes.clone());
        handlers.track_future(async move {
            let answer = front.answer(request.map(Body::new), routes, peer, local.ip()).await;
            Ok::<_, std::convert::Infallible>(answer)
        })
    });

    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(15))
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);

    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = cancel.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection => ended,
                _ = tokio::time::timeout(drain, idle(&handled)) => {
                    if !handled.is_empty() {
                        tracing::warn!(%peer, "an HTTP request outlasted the drain; closing its connection");
                    }
                    return;
                }
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "an HTTP connection broke off");
    }
}

/// Resolves when no request has been in progress for a while. A connection that is still open then is waiting for its
/// client.
async fn idle(handled: &TaskTracker) {
    loop {
        handled.wait().await;
        tokio::time::sleep(GOODBYE).await;
        if handled.is_empty() {
            return;
        }
    }
}
