//! What the gateway counts, and says of itself every second.

use crate::Gateway;
use crate::breaker::State;
use bus::Message;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use wire::ipc::ErrorCode;
use wire::status::{GatewayStatus, LatencyWindow, Percentiles};

#[derive(Default)]
pub struct Stats {
    requests: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    errors: BTreeMap<String, u64>,
    forward_us: LatencyWindow,
}

impl Stats {
    pub fn taken(&self) {
        self.requests.fetch_add(1, Relaxed);
    }

    pub fn failed(&self, code: ErrorCode) {
        *self.inner.lock().errors.entry(code.name().into()).or_default() += 1;
        metrics::counter!("beamline_gateway_errors_total", "code" => code.name()).increment(1);
    }

    pub fn forwarded(&self, took: Duration) {
        self.inner.lock().forward_us.add(took);
        metrics::histogram!("beamline_gateway_request_duration_seconds").record(took.as_secs_f64());
    }

    fn forward_us(&self) -> Percentiles {
        // Cloned, so that no request waits for the lock while the window is sorted.
        let window = self.inner.lock().forward_us.clone();
        window.percentiles()
    }
}

pub async fn run(gateway: Arc<Gateway>, cancel: CancellationToken) {
    let id = format!("gateway-{}", &uuid::Uuid::now_v7().simple().to_string()[20..]);
    let started = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let stats = &gateway.stats;
        let errors_by_code = stats.inner.lock().errors.clone();
        let status = GatewayStatus {
            gateway: id.clone(),
            socket: gateway.config().socket.display().to_string(),
            uptime_s: started.elapsed().as_secs(),
            connections: gateway.connections.held(),
            in_flight: gateway.in_flight.held(),
            requests_total: stats.requests.load(Relaxed),
            errors_by_code,
            forward_us: stats.forward_us(),
            breaker: gateway.router.state().as_str().into(),
        };
        let open = gateway.router.state() == State::Open;
        metrics::gauge!("beamline_gateway_breaker_open").set(if open { 1.0 } else { 0.0 });
        metrics::gauge!("beamline_gateway_connections").set(status.connections as f64);
        metrics::gauge!("beamline_gateway_in_flight").set(status.in_flight as f64);
        metrics::counter!("beamline_gateway_requests_total").absolute(status.requests_total);
        let payload = serde_json::to_vec(&status).expect("a status is JSON").into();
        let message = Message {
            subject: wire::subjects::GATEWAY_STATUS.into(),
            payload,
            ..Message::default()
        };
        if let Err(error) = gateway.bus.publish(message).await {
            tracing::debug!(%error, "the gateway's status was not published");
        }
    }
}
