//! The upgrade of an HTTP request to a WebSocket connection.

use crate::Node;
use crate::commands::Transport;
use crate::session;
use crate::slot::ConnectionSlot;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use std::sync::Arc;
use tokio::net::TcpStream;
use wire::realtime::Encoding;
use wire::websocket::accept_key;

/// The subprotocol with which a client requests protobuf.
const PROTOBUF: &str = "centrifuge-protobuf";

pub async fn handle(State(node): State<Arc<Node>>, mut request: Request) -> Response {
    let headers = request.headers();
    let Some(key) = upgrade_key(headers) else {
        let text = "this is a WebSocket endpoint: connect with a Centrifuge client";
        return refuse(StatusCode::UPGRADE_REQUIRED, text);
    };
    if !origin_allowed(headers, &node.config.origins) {
        return refuse(StatusCode::FORBIDDEN, "this origin may not connect; add it to http.origins");
    }
    if node.stopping.is_cancelled() {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the node is shutting down");
    }

    let subprotocol = offers_protobuf(headers);
    let transport = transport(subprotocol, request.uri());
    let Some(slot) = ConnectionSlot::take(&node) else {
        metrics::counter!("beamline_cluster_refused_total").increment(1);
        let text = "the node is full; cluster.max_connections is the limit";
        return refuse(StatusCode::SERVICE_UNAVAILABLE, text);
    };

    // The upgrade resolves only after hyper has sent the response, so the session runs in a task of its own.
    let upgrade = hyper::upgrade::on(&mut request);
    node.sessions.spawn(serve(upgrade, slot, transport));
    switching_protocols(&key, subprotocol)
}

fn refuse(status: StatusCode, text: &str) -> Response {
    (status, format!("{text}\n")).into_response()
}

/// Runs the session once hyper has written the response and released the socket.
async fn serve(upgrade: OnUpgrade, slot: ConnectionSlot, transport: Transport) {
    match upgrade.await {
        Ok(upgraded) => match tcp_stream(upgraded) {
            Some((stream, early)) => Box::pin(session::run(slot, stream, early, transport)).await,
            None => {
                tracing::error!("cannot serve a WebSocket: its connection is not plain TCP; terminate TLS in a proxy")
            }
        },
        Err(error) => tracing::debug!(%error, "a connection ended before its upgrade"),
    }
}

/// The underlying socket, and the bytes that were already read from it. Serving it through hyper's wrapper would cost
/// memory and copies for every connection.
fn tcp_stream(upgraded: Upgraded) -> Option<(TcpStream, Bytes)> {
    // axum serves through hyper-util's `auto`, which adds a wrapper around the stream.
    match auto::upgrade::downcast::<TokioIo<TcpStream>>(upgraded) {
        Ok(parts) => Some((parts.io.into_inner(), parts.read_buf)),
        Err(upgraded) => upgraded
            .downcast::<TokioIo<TcpStream>>()
            .ok()
            .map(|parts| (parts.io.into_inner(), parts.read_buf)),
    }
}

fn switching_protocols(key: &str, subprotocol: bool) -> Response {
    let mut response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::UPGRADE, "websocket")
        .header(header::CONNECTION, "Upgrade")
        .header(header::SEC_WEBSOCKET_ACCEPT, accept_key(key));
    if subprotocol {
        response = response.header(header::SEC_WEBSOCKET_PROTOCOL, PROTOBUF);
    }
    response
        .body(Body::empty())
        .unwrap_or_else(|_| StatusCode::BAD_REQUEST.into_response())
}

fn offers_protobuf(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|name| name.trim() == PROTOBUF)
}

fn transport(subprotocol: bool, uri: &Uri) -> Transport {
    let asks = |wanted: &str| uri.query().unwrap_or("").split('&').any(|pair| pair == wanted);
    let protobuf = subprotocol || asks("cf_protocol=protobuf");
    Transport {
        encoding: if protobuf { Encoding::Protobuf } else { Encoding::Json },
        frame_pings: asks("cf_ws_frame_ping_pong=true"),
    }
}

/// The key of a WebSocket upgrade; `None` if the request is not one.
fn upgrade_key(headers: &HeaderMap) -> Option<String> {
    let has = |name: header::HeaderName, token: &str| {
        headers
            .get_all(name)
            .into_iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|part| part.trim().eq_ignore_ascii_case(token))
    };

    let is_upgrade = has(header::UPGRADE, "websocket")
        && has(header::CONNECTION, "upgrade")
        && headers
            .get(header::SEC_WEBSOCKET_VERSION)
            .is_some_and(|version| version == "13");

    let key = headers.get(header::SEC_WEBSOCKET_KEY)?.to_str().ok()?;
    (is_upgrade && !key.is_empty()).then(|| key.to_string())
}

/// Requests without an origin are allowed: only browsers send one. A page's origin must be the node's own host or one
/// of `http.origins`.
fn origin_allowed(headers: &HeaderMap, origins: &[String]) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else {
        return true;
    };
    let Ok(origin) = origin.to_str() else { return false };

    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let own = origin.split_once("://").is_some_and(|(_, name)| Some(name) == host);
    own || origins.iter().any(|allowed| allowed == origin || allowed == "*")
}
