//! `/health`, `/ready` and `/metrics`, on the HTTP port and (as `/healthz`, `/readyz`) on the operations port.

use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Value, json};
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

/// Whether one thing that readiness depends on works now, else what is wrong.
pub type Check = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send + Sync>;

/// What reverse proxies add.
const FORWARDED: [&str; 4] = ["forwarded", "x-forwarded-for", "x-real-ip", "via"];
/// A check that does not answer in this time has failed.
const CHECK_MAX: Duration = Duration::from_secs(2);

pub struct Health {
    pub checks: Vec<(&'static str, Check)>,
    pub metrics: PrometheusHandle,
    /// Serve `/metrics` on the HTTP port to anyone, not only to this machine.
    pub metrics_public: bool,
    pub draining: tokio_util::sync::CancellationToken,
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

/// Liveness only: the process answers.
async fn live() -> Json<Value> {
    Json(json!({"status": "ok", "version": env!("CARGO_PKG_VERSION")}))
}

/// What fails, with what is wrong with it.
async fn ready(State(health): State<Arc<Health>>) -> Response {
    report(&health, |wrong| wrong).await
}

/// What fails. What is wrong with it names servers and their users, and is for the log and the operations port.
async fn ready_on_http(State(health): State<Arc<Health>>) -> Response {
    report(&health, |_| "failed".into()).await
}

async fn report(health: &Health, tell: fn(String) -> String) -> Response {
    let mut failed = false;
    let mut report = serde_json::Map::new();
    for (name, check) in &health.checks {
        let outcome = match tokio::time::timeout(CHECK_MAX, check()).await {
            Ok(outcome) => outcome,
            Err(_) => Err(format!("no answer within {} s", CHECK_MAX.as_secs())),
        };
        if let Err(wrong) = &outcome {
            tracing::debug!(check = name, wrong, "not ready");
        }
        failed |= outcome.is_err();
        report.insert((*name).into(), outcome.map_or_else(|wrong| tell(wrong).into(), |()| json!("ok")));
    }
    if health.draining.is_cancelled() {
        failed = true;
        report.insert("process".into(), json!("draining"));
    }
    let status = if failed {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        StatusCode::OK
    };
    (status, Json(json!({"ready": !failed, "checks": report}))).into_response()
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
    // A reverse proxy on this machine hands on what comes from anywhere.
    let handed_on = FORWARDED.iter().any(|name| headers.contains_key(*name));
    if (peer.ip().to_canonical().is_loopback() && !handed_on) || health.metrics_public {
        return metrics(health).await;
    }
    (
        StatusCode::FORBIDDEN,
        "metrics are served to this machine only; ops.metrics_public = true serves them to all\n",
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
        let draining = tokio_util::sync::CancellationToken::new();
        let health = Health { checks: Vec::new(), metrics, metrics_public: false, draining };
        let mut request = Request::get("/metrics");
        if let Some(forwarded) = forwarded {
            request = request.header("x-forwarded-for", forwarded);
        }
        let peer = SocketAddr::new(peer.parse().unwrap(), 1);
        let request = request.extension(ConnectInfo(peer)).body(Body::empty()).unwrap();
        http_routes(Arc::new(health)).oneshot(request).await.unwrap().status()
    }

    #[tokio::test]
    async fn http_port_says_what_fails_and_the_operations_port_why() {
        let metrics = metrics_exporter_prometheus::PrometheusBuilder::new()
            .build_recorder()
            .handle();
        let draining = tokio_util::sync::CancellationToken::new();
        let away: Check = Box::new(|| Box::pin(async { Err("no route to db.internal".into()) }));
        let health = Arc::new(Health {
            checks: vec![("database", away)],
            metrics,
            metrics_public: false,
            draining,
        });
        for (routes, path, told) in [
            (http_routes(health.clone()), "/ready", "failed"),
            (ops_routes(health.clone()), "/readyz", "no route to db.internal"),
        ] {
            let answer = routes
                .oneshot(Request::get(path).body(Body::empty()).unwrap())
                .await
                .unwrap();
            assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
            let body = axum::body::to_bytes(answer.into_body(), 1 << 16).await.unwrap();
            let body: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body["checks"]["database"], told, "{path}");
        }
    }

    #[tokio::test]
    async fn metrics_are_for_this_machine_also_behind_a_proxy_on_it() {
        for peer in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(status(peer, None).await, StatusCode::OK, "{peer}");
            assert_eq!(status(peer, Some("203.0.113.7")).await, StatusCode::FORBIDDEN, "{peer}");
        }
        assert_eq!(status("203.0.113.7", None).await, StatusCode::FORBIDDEN);
    }
}
