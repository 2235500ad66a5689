//! The gateway's counters, and the status that it publishes every second.

use crate::Shared;
use crate::breaker::State;
use bus::{Bus, Message};
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
    /// Counts an admitted request.
    pub fn admitted(&self) {
        self.requests.fetch_add(1, Relaxed);
    }

    /// Counts an error that is sent to a client.
    pub fn failed(&self, code: ErrorCode) {
        *self.inner.lock().errors.entry(code.name().into()).or_default() += 1;
        metrics::counter!("beamline_gateway_errors_total", "code" => code.name()).increment(1);
    }

    /// Records how long a request took from its arrival to its answer.
    pub fn completed(&self, took: Duration) {
        self.inner.lock().forward_us.add(took);
        metrics::histogram!("beamline_gateway_request_duration_seconds").record(took.as_secs_f64());
    }

    fn forward_us(&self) -> Percentiles {
        // Cloned, so that no request waits for the lock while the percentiles are computed.
        let window = self.inner.lock().forward_us.clone();
        window.percentiles()
    }
}

/// Publishes the gateway's status every second, until cancelled.
pub async fn run(shared: Arc<Shared>, bus: Bus, cancel: CancellationToken) {
    let id = format!("gateway-{}", &uuid::Uuid::now_v7().simple().to_string()[20..]);
    let started = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }

        let status = status(&shared, id.clone(), started.elapsed());
        let open = status.breaker == State::Open.as_str();
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
        if let Err(error) = bus.publish(message).await {
            tracing::debug!(%error, "cannot publish the gateway's status");
        }
    }
}

fn status(shared: &Shared, gateway: String, uptime: Duration) -> GatewayStatus {
    let Shared { admission, upstream, stats } = shared;
    let errors_by_code = stats.inner.lock().errors.clone();
    GatewayStatus {
        gateway,
        socket: admission.settings().socket.display().to_string(),
        uptime_s: uptime.as_secs(),
        connections: admission.connections_held(),
        in_flight: admission.requests_held(),
        requests_total: stats.requests.load(Relaxed),
        errors_by_code,
        forward_us: stats.forward_us(),
        breaker: upstream.state().as_str().into(),
    }
}
