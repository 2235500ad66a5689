//! The HTTP listener: accepts, bounds, serves one `axum::Router`, drains.

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

/// A request must have come whole and been answered within; what a WebSocket does after its upgrade is no part of it.
const REQUEST_MAX: Duration = Duration::from_secs(30);

/// At the end, a client has this long to finish a request that it has begun, or to read its answer.
const GOODBYE: Duration = Duration::from_secs(1);

/// What every request passes before a route sees it.
#[derive(Debug, Clone)]
pub struct Front {
    pub hosts: Hosts,
    pub proxies: Proxies,
}

impl Front {
    /// Answers a request from `peer` that came in on the address `local`. Routes find the client, which a trusted proxy
    /// names, in [`ConnectInfo`].
    async fn answer(&self, mut request: Request<Body>, routes: Router, peer: SocketAddr, local: IpAddr) -> Response {
        let (parts, body) = request.into_parts();
        if let Err(refusal) = self.hosts.check(&parts, local) {
            tracing::debug!(%peer, ?refusal, "a request was refused for its host");
            return refusal.into_response();
        }
        let client = self.proxies.client(peer, &parts.headers);
        request = Request::from_parts(parts, body);
        request.extensions_mut().insert(ConnectInfo(client));
        match tokio::time::timeout(REQUEST_MAX, routes.oneshot(request)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(never)) => match never {},
            Err(_) => StatusCode::REQUEST_TIMEOUT.into_response(),
        }
    }
}

/// Serves until cancelled, then lets requests in progress end, within `drain`. WebSockets leave with their upgrade: the
/// cluster ends them.
pub async fn serve(
    listener: TcpListener,
    routes: Router,
    front: Front,
    max_connections: usize,
    drain: Duration,
    cancel: CancellationToken,
) {
    let front = Arc::new(front);
    let places = Arc::new(Semaphore::new(max_connections));
    let tracker = TaskTracker::new();
    loop {
        let place = tokio::select! {
            () = cancel.cancelled() => break,
            place = places.clone().acquire_owned() => place.expect("the semaphore is never closed"),
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
                    drop(place);
                });
            }
            Err(error) => {
                // Out of descriptors: wait for some to come back rather than spin.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
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
                _ = tokio::time::timeout(drain, left_alone(&handled)) => {
                    if !handled.is_empty() {
                        tracing::warn!(%peer, "an HTTP request was not answered within the drain; its connection is cut");
                    }
                    return;
                }
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "HTTP connection ended early");
    }
}

/// Ends when we have owed the client nothing for a while: a connection that is still open then waits for the client.
async fn left_alone(handled: &TaskTracker) {
    loop {
        handled.wait().await;
        tokio::time::sleep(GOODBYE).await;
        if handled.is_empty() {
            return;
        }
    }
}
