//! Backpressure: three loads are measured, each against a threshold. With one over its threshold the status is a
//! warning; with two over, the router refuses decide requests.
//!
//! A load that was over its threshold counts as over until it falls to half of it, so the status does not flap.

use crate::Router;
use bus::clock::unix_ms;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use wire::router::{Backpressure as Report, BackpressurePolicy, BackpressureStatus, LoadMetrics, LoadThresholds};
use wire::subjects;

/// When a refused client should try again.
pub const RETRY_AFTER_S: u64 = 30;
const MAX_RETRY_ATTEMPTS: u32 = 3;

const MEASURE_EVERY: Duration = Duration::from_secs(1);

/// Thresholds of the contract: assignments in the stream, latency of decisions, pushes that await their
/// acknowledgement.
const QUEUE_OVERLOAD: u64 = 1000;
const LATENCY_OVERLOAD_MS: u64 = 5000;
const IN_FLIGHT_OVERLOAD: u64 = 500;

/// The state that [`run`] judges; everything else only reads it.
#[derive(Default)]
pub struct Backpressure {
    over: Mutex<Over>,
}

impl Backpressure {
    pub fn refuses(&self) -> bool {
        self.over.lock().status() == BackpressureStatus::Active
    }
}

/// Measures and judges the load every second until cancelled.
pub async fn run(router: Arc<Router>, cancel: CancellationToken) {
    let mut ticks = tokio::time::interval(MEASURE_EVERY);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }

        // A load that cannot be measured changes nothing: the bus is away, and requests fail for that reason.
        if let Ok(load) = measure(&router).await {
            let mut over = router.backpressure.over.lock();
            *over = over.after(&load);
        }
    }
}

/// The load right now, judged without changing what [`run`] keeps. `subject` is the one whose requests are refused.
pub async fn load(router: &Router, subject: &str) -> bus::Result<Report> {
    let load = measure(router).await?;
    let over = *router.backpressure.over.lock();
    Ok(Report {
        metrics: load,
        policy: BackpressurePolicy {
            max_retry_attempts: MAX_RETRY_ATTEMPTS,
            retry_after_seconds: Some(RETRY_AFTER_S),
        },
        status: over.after(&load).status(),
        subject: subject.into(),
        thresholds: LoadThresholds {
            inflight_overload: IN_FLIGHT_OVERLOAD,
            latency_overload_ms: LATENCY_OVERLOAD_MS,
            queue_overload: QUEUE_OVERLOAD,
        },
        timestamp: unix_ms(),
    })
}

async fn measure(router: &Router) -> bus::Result<LoadMetrics> {
    let assignments = router.bus.stream_info(subjects::STREAM_ASSIGN).await?;
    Ok(LoadMetrics {
        inflight_messages: router.stats.in_flight.load(Relaxed),
        latency_p95_ms: router.stats.decide_us().p95 / 1000.0,
        pending_messages: assignments.messages,
    })
}

/// Which of the three loads are over their thresholds.
#[derive(Clone, Copy, Default)]
struct Over([bool; 3]);

impl Over {
    fn after(self, load: &LoadMetrics) -> Self {
        let measured = [
            (load.pending_messages as f64, QUEUE_OVERLOAD),
            (load.latency_p95_ms, LATENCY_OVERLOAD_MS),
            (load.inflight_messages as f64, IN_FLIGHT_OVERLOAD),
        ];

        let mut next = self;
        for (over, (value, threshold)) in next.0.iter_mut().zip(measured) {
            let threshold = threshold as f64;
            *over = if *over {
                value > threshold / 2.0
            } else {
                value >= threshold
            };
        }
        next
    }

    fn status(self) -> BackpressureStatus {
        match self.0.iter().filter(|over| **over).count() {
            0 => BackpressureStatus::Inactive,
            1 => BackpressureStatus::Warning,
            _ => BackpressureStatus::Active,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_loads_over_refuse_until_one_falls_to_half_its_threshold() {
        use BackpressureStatus::{Active, Inactive, Warning};
        let mut over = Over::default();
        for (pending_messages, inflight_messages, expected) in [
            (999, 499, Inactive),
            (1000, 499, Warning),
            (1000, 500, Active),
            (501, 251, Active),
            (500, 251, Warning),
            (999, 251, Warning),
            (999, 250, Inactive),
        ] {
            over = over.after(&LoadMetrics { pending_messages, latency_p95_ms: 1.0, inflight_messages });
            assert_eq!(over.status(), expected, "{pending_messages} {inflight_messages}");
        }
    }
}
