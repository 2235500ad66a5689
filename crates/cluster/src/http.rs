//! The upgrade to a WebSocket connection, and the server API's routes.

use crate::place::Place;
use crate::session::{self, Transport};
use crate::{Node, server_api};
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use std::sync::Arc;
use tokio::net::TcpStream;
use wire::realtime::Encoding;
use wire::websocket::accept_key;

pub fn routes(node: Arc<Node>) -> axum::Router {
    axum::Router::new()
        .route("/connection/websocket", get(websocket))
        .route("/api/{method}", post(server_api::handle))
        .with_state(node)
}

async fn websocket(State(node): State<Arc<Node>>, mut request: Request) -> Response {
    let refuse = |status: StatusCode, text: &str| (status, format!("{text}\n")).into_response();
    let headers = request.headers();
    let Some(key) = upgrade_key(headers) else {
        return refuse(StatusCode::UPGRADE_REQUIRED, "this is a WebSocket endpoint: connect with a Centrifuge client");
    };
    if !node.origin_allowed(headers) {
        let text = "this origin may not connect; add it to http.origins";
        return refuse(StatusCode::FORBIDDEN, text);
    }
    if node.stopping.is_cancelled() {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the node is shutting down");
    }
    let offered = headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let subprotocol = offered
        .flat_map(|value| value.split(','))
        .any(|name| name.trim() == "centrifuge-protobuf");
    let asks = |wanted: &str| {
        request
            .uri()
            .query()
            .unwrap_or("")
            .split('&')
            .any(|pair| pair == wanted)
    };
    let protobuf = subprotocol || asks("cf_protocol=protobuf");
    let transport = Transport {
        encoding: if protobuf { Encoding::Protobuf } else { Encoding::Json },
        frame_pings: asks("cf_ws_frame_ping_pong=true"),
    };
    let accept = accept_key(&key);

    let Some(place) = Place::take(&node) else {
        metrics::counter!("beamline_cluster_refused_total").increment(1);
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the node is full; cluster.max_connections is the limit");
    };
    let upgrade = hyper::upgrade::on(&mut request);
    node.sessions.spawn(async move {
        match upgrade.await {
            Ok(upgraded) => match tcp_stream(upgraded) {
                Some((stream, early)) => Box::pin(session::run(place, stream, early, transport)).await,
                None => tracing::error!("a connection is not a plain TCP stream; the routes are to be served on one"),
            },
            Err(error) => tracing::debug!(%error, "a connection ended before its upgrade"),
        }
    });
    let mut response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::UPGRADE, "websocket")
        .header(header::CONNECTION, "Upgrade")
        .header(header::SEC_WEBSOCKET_ACCEPT, accept);
    if subprotocol {
        response = response.header(header::SEC_WEBSOCKET_PROTOCOL, "centrifuge-protobuf");
    }
    response
        .body(Body::empty())
        .unwrap_or_else(|_| StatusCode::BAD_REQUEST.into_response())
}

/// The socket itself and what was read from it already: behind hyper's own reader each connection would cost more.
fn tcp_stream(upgraded: Upgraded) -> Option<(TcpStream, Bytes)> {
    // axum serves through hyper-util's `auto`, which wraps the stream once more.
    match auto::upgrade::downcast::<TokioIo<TcpStream>>(upgraded) {
        Ok(parts) => Some((parts.io.into_inner(), parts.read_buf)),
        Err(upgraded) => upgraded
            .downcast::<TokioIo<TcpStream>>()
            .ok()
            .map(|parts| (parts.io.into_inner(), parts.read_buf)),
    }
}

fn upgrade_key(headers: &HeaderMap) -> Option<String> {
    let has = |name: header::HeaderName, token: &str| {
        let values = headers
            .get_all(name)
            .into_iter()
            .filter_map(|value| value.to_str().ok());
        values
            .flat_map(|value| value.split(','))
            .any(|part| part.trim().eq_ignore_ascii_case(token))
    };
    let fits = has(header::UPGRADE, "websocket")
        && has(header::CONNECTION, "upgrade")
        && headers
            .get(header::SEC_WEBSOCKET_VERSION)
            .is_some_and(|version| version == "13");
    let key = headers.get(header::SEC_WEBSOCKET_KEY)?.to_str().ok()?;
    (fits && !key.is_empty()).then(|| key.to_string())
}

impl Node {
    /// Programs send no origin. A page's must be our own host or one of the settings.
    fn origin_allowed(&self, headers: &HeaderMap) -> bool {
        let Some(origin) = headers.get(header::ORIGIN) else {
            return true;
        };
        let Ok(origin) = origin.to_str() else { return false };
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let own = origin.split_once("://").is_some_and(|(_, of)| Some(of) == host);
        own || self
            .config
            .origins
            .iter()
            .any(|allowed| allowed == origin || allowed == "*")
    }
}

/// The whole body, as long as it is not over a publication's size.
pub async fn body(request: Request) -> Result<Bytes, Response> {
    let limit = wire::limits::PUBLICATION_MAX + 64 * 1024;
    axum::body::to_bytes(request.into_body(), limit)
        .await
        .map_err(|_| (StatusCode::PAYLOAD_TOO_LARGE, format!("at most {limit} bytes\n")).into_response())
}
