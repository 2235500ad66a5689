//! `/health`, `/ready` and `/metrics`, on the HTTP port and (as `/healthz`, `/readyz`) on the operations port.

use axum::extract::{ConnectInfo, State};
use axum::http::{StatusCode, header};
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
        .route("/ready", get(ready))
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

async fn ready(State(health): State<Arc<Health>>) -> Response {
    let mut failed = false;
    let mut report = serde_json::Map::new();
    for (name, check) in &health.checks {
        let outcome = match tokio::time::timeout(CHECK_MAX, check()).await {
            Ok(outcome) => outcome,
            Err(_) => Err(format!("no answer within {} s", CHECK_MAX.as_secs())),
        };
        failed |= outcome.is_err();
        report.insert((*name).into(), outcome.map_or_else(Value::String, |()| json!("ok")));
    }
    if health.draining.is_cancelled() {
        failed = true;
        report.insert("process".into(), json!("draining"));
    }
    let status = if failed { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (status, Json(json!({"ready": !failed, "checks": report}))).into_response()
}

async fn metrics(State(health): State<Arc<Health>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], health.metrics.render()).into_response()
}

async fn metrics_on_http(health: State<Arc<Health>>, ConnectInfo(peer): ConnectInfo<SocketAddr>) -> Response {
    if peer.ip().is_loopback() || health.metrics_public {
        return metrics(health).await;
    }
    (StatusCode::FORBIDDEN, "metrics are served to this machine only; ops.metrics_public = true serves them to all\n")
        .into_response()
}
