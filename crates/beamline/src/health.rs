//! The endpoints `/health`, `/ready` and `/metrics` of the HTTP port, and `/healthz`, `/readyz` and `/metrics` of the
//! operations port.

use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Checks one condition of readiness; the error says what is wrong.
pub type Check = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send + Sync>;

/// Says what operators should know although the process is ready; `None` if there is nothing to say.
pub type Notice = Box<dyn Fn() -> Option<String> + Send + Sync>;

/// Headers that reverse proxies add.
const FORWARDED: [&str; 4] = ["forwarded", "x-forwarded-for", "x-real-ip", "via"];
/// A check that takes longer counts as failed.
const CHECK_MAX: Duration = Duration::from_secs(2);

pub struct Health {
    pub checks: Vec<(&'static str, Check)>,
    pub notices: Vec<(&'static str, Notice)>,
    pub metrics: PrometheusHandle,
    /// Serves `/metrics` on the HTTP port to every machine, not only to this one.
    pub metrics_public: bool,
    pub draining: CancellationToken,
}

/// The body of `/health`.
#[derive(Serialize)]
struct Live {
    status: &'static str,
    version: &'static str,
}

/// The body of `/ready`: `ok`, a problem or a notice for each check.
#[derive(Serialize)]
struct Ready {
    checks: BTreeMap<&'static str, String>,
    ready: bool,
}

pub fn http_routes(health: Arc<Health>) -> Router {
    Router::new()
        .route("/health", get(live))
        .route("/ready", get(ready_on_http))
        .route("/metrics", get(metrics_on_http))
        .with_state(health)
}

pub fn ops_routes(health: Arc<Health>) -> Router {
    Router::new()
        .route("/healthz", get(live))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(health)
}

/// Liveness: the process answers.
async fn live() -> Json<Live> {
    Json(Live { status: "ok", version: env!("CARGO_PKG_VERSION") })
}

/// Reports which checks fail, and why.
async fn ready(State(health): State<Arc<Health>>) -> Response {
    report(&health, |problem| problem, |notice| notice).await
}

/// Reports which checks fail, but not why: the reasons may name servers and users.
async fn ready_on_http(State(health): State<Arc<Health>>) -> Response {
    report(&health, |_| "failed".into(), |_| "warning".into()).await
}

async fn report(health: &Health, shown: fn(String) -> String, noticed: fn(String) -> String) -> Response {
    let mut ready = true;
    let mut checks = BTreeMap::new();
    for (name, check) in &health.checks {
        let outcome = tokio::time::timeout(CHECK_MAX, check())
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {} s", CHECK_MAX.as_secs())));
        let text = match outcome {
            Ok(()) => "ok".into(),
            Err(problem) => {
                tracing::debug!(check = name, problem, "not ready");
                ready = false;
                shown(problem)
            }
        };
        checks.insert(*name, text);
    }

    for (name, notice) in &health.notices {
        checks.insert(*name, notice().map_or_else(|| "ok".into(), noticed));
    }
    if health.draining.is_cancelled() {
        ready = false;
        checks.insert("process", "draining".into());
    }

    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(Ready { checks, ready })).into_response()
}

async fn metrics(State(health): State<Arc<Health>>) -> Response {
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    ::metrics::gauge!("beamline_runtime_tasks").set(tasks as f64);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], health.metrics.render()).into_response()
}

async fn metrics_on_http(
    health: State<Arc<Health>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    // A reverse proxy on this machine forwards requests from other machines.
    let forwarded = FORWARDED.iter().any(|name| headers.contains_key(*name));
    if (peer.ip().to_canonical().is_loopback() && !forwarded) || health.metrics_public {
        return metrics(health).await;
    }
    (
        StatusCode::FORBIDDEN,
        "metrics are served to this machine only; set ops.metrics_public = true to serve them to all\n",
    )
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use axum::http::Request;
    use tower::ServiceExt;

    async fn status(peer: &str, forwarded: Option<&str>) -> StatusCode {
        let metrics = metrics_exporter_prometheus::PrometheusBuilder::new()
            .build_recorder()
            .handle();
        let draining = CancellationToken::new();
        let health = Health {
            checks: Vec::new(),
            notices: Vec::new(),
            metrics,
            metrics_public: false,
            draining,
        };

        let mut request = Request::get("/metrics");
        if let Some(forwarded) = forwarded {
            request = request.header("x-forwarded-for", forwarded);
        }
        let peer = SocketAddr::new(peer.parse().unwrap(), 1);
        let request = request.extension(ConnectInfo(peer)).body(Body::empty()).unwrap();
        http_routes(Arc::new(health)).oneshot(request).await.unwrap().status()
    }

    #[tokio::test]
    async fn http_port_says_which_check_fails_and_the_operations_port_why() {
        let metrics = metrics_exporter_prometheus::PrometheusBuilder::new()
            .build_recorder()
            .handle();
        let draining = CancellationToken::new();
        let unreachable: Check = Box::new(|| Box::pin(async { Err("no route to db.internal".into()) }));
        let health = Arc::new(Health {
            checks: vec![("database", unreachable)],
            notices: vec![("stores", Box::new(|| Some("RESULT is full".into())))],
            metrics,
            metrics_public: false,
            draining,
        });

        for (routes, path, expected, noticed) in [
            (http_routes(health.clone()), "/ready", "failed", "warning"),
            (ops_routes(health.clone()), "/readyz", "no route to db.internal", "RESULT is full"),
        ] {
            let answer = routes
                .oneshot(Request::get(path).body(Body::empty()).unwrap())
                .await
                .unwrap();
            assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
            let body = axum::body::to_bytes(answer.into_body(), 1 << 16).await.unwrap();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body["checks"]["database"], expected, "{path}");
            assert_eq!(body["checks"]["stores"], noticed, "{path}");
            assert_eq!(body["ready"], false, "{path}");
        }
    }

    #[tokio::test]
    async fn metrics_are_refused_to_other_machines_even_through_a_local_proxy() {
        for peer in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(status(peer, None).await, StatusCode::OK, "{peer}");
            assert_eq!(status(peer, Some("203.0.113.7")).await, StatusCode::FORBIDDEN, "{peer}");
        }
        assert_eq!(status("203.0.113.7", None).await, StatusCode::FORBIDDEN);
    }
}
