//! Counts of decisions, errors and results, and the latencies of decisions and providers.

use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use wire::router::{Decision, ErrorBody, ExecResult};
use wire::status::{LatencyWindow, Percentiles, RouterStatus};

/// Weight of the newest latency in a provider's average.
const EWMA: f64 = 0.2;

#[derive(Default)]
pub struct Stats {
    inner: Mutex<Inner>,
    /// Requests whose task, or whose answer by their idempotency key, is not stored yet.
    pub in_flight: AtomicU64,
}

#[derive(Default)]
struct Inner {
    decisions: u64,
    by_provider: BTreeMap<String, u64>,
    by_reason: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
    results: BTreeMap<String, u64>,
    latency_ms: HashMap<String, f64>,
    decide_us: LatencyWindow,
}

impl Stats {
    pub fn decided(&self, decision: &Decision, took: Duration) {
        let mut inner = self.inner.lock();
        inner.decisions += 1;
        bump(&mut inner.by_provider, &decision.provider_id);
        bump(&mut inner.by_reason, decision.reason.as_str());
        inner.decide_us.add(took);
        drop(inner);

        metrics::counter!("beamline_router_decisions_total", "reason" => decision.reason.as_str()).increment(1);
        metrics::histogram!("beamline_router_decide_duration_seconds").record(took.as_secs_f64());
    }

    pub fn refused(&self, error: &ErrorBody) {
        bump(&mut self.inner.lock().errors, error.code.as_str());
        metrics::counter!("beamline_router_errors_total", "code" => error.code.as_str().to_string()).increment(1);
    }

    pub fn ended(&self, result: &ExecResult) {
        bump(&mut self.inner.lock().results, result.status.as_str());
        metrics::counter!("beamline_router_results_total", "status" => result.status.as_str()).increment(1);
    }

    /// Updates the moving average of the provider's latency.
    pub fn took(&self, provider: &str, latency_ms: u64) {
        let (mut inner, latest) = (self.inner.lock(), latency_ms as f64);
        let average = inner.latency_ms.entry(provider.into()).or_insert(latest);
        *average += EWMA * (latest - *average);
    }

    pub fn latency_ms(&self, provider: &str) -> Option<f64> {
        self.inner.lock().latency_ms.get(provider).copied()
    }

    pub fn totals(&self) -> RouterStatus {
        let inner = self.inner.lock();
        RouterStatus {
            decisions_total: inner.decisions,
            decisions_by_provider: inner.by_provider.clone(),
            decisions_by_reason: inner.by_reason.clone(),
            errors_by_code: inner.errors.clone(),
            results_by_status: inner.results.clone(),
            in_flight: self.in_flight.load(Relaxed),
            ..RouterStatus::default()
        }
    }

    pub fn decide_us(&self) -> Percentiles {
        // Cloned, so that no decision waits for the lock while the window is sorted.
        let window = self.inner.lock().decide_us.clone();
        window.percentiles()
    }
}

/// Adds one to the count of a name. Names are codes and the providers of policies, so their number is bounded.
fn bump(counts: &mut BTreeMap<String, u64>, name: &str) {
    match counts.get_mut(name) {
        Some(count) => *count += 1,
        None => _ = counts.insert(name.into(), 1),
    }
}
