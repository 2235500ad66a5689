//! How loaded the router is: three measures, each with a threshold. One over it is a warning; two, and decide requests
//! are refused. A measure that was over counts until it has fallen to half its threshold.

use crate::Router;
use bus::clock::unix_ms;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use wire::router::{BackpressurePolicy, BackpressureStatus, LoadMetrics, LoadThresholds, StatusReply};
use wire::subjects;

/// When a refused client should try again.
pub const RETRY_AFTER_S: u64 = 30;

/// Contract: assignments that wait, the latency of decisions, pushes that wait for their acknowledgement.
const QUEUE_OVERLOAD: u64 = 1000;
const LATENCY_OVERLOAD_MS: u64 = 5000;
const IN_FLIGHT_OVERLOAD: u64 = 500;

#[derive(Default)]
pub struct Backpressure {
    over: Mutex<[bool; 3]>,
    refuses: AtomicBool,
}

struct Load {
    pending: u64,
    p95_ms: f64,
    in_flight: u64,
}

impl Backpressure {
    pub fn refuses(&self) -> bool {
        self.refuses.load(Relaxed)
    }

    /// Takes the newest measures in; how many of them are over.
    fn judge(&self, load: &Load) -> usize {
        let measures = [
            (load.pending as f64, QUEUE_OVERLOAD),
            (load.p95_ms, LATENCY_OVERLOAD_MS),
            (load.in_flight as f64, IN_FLIGHT_OVERLOAD),
        ];
        let mut over = self.over.lock();
        for (over, (value, threshold)) in over.iter_mut().zip(measures) {
            let threshold = threshold as f64;
            *over = if *over {
                value > threshold / 2.0
            } else {
                value >= threshold
            };
        }
        let count = over.iter().filter(|over| **over).count();
        self.refuses.store(count >= 2, Relaxed);
        count
    }
}

/// Measures now; the answer to a status request.
pub async fn measure(router: &Router) -> StatusReply<wire::router::Backpressure> {
    let pending = match router.bus.stream_info(subjects::STREAM_ASSIGN).await {
        Ok(info) => info.messages,
        Err(error) => return StatusReply::from(Err(error.to_string())),
    };
    let in_flight = router.stats.in_flight.load(Relaxed);
    let p95_ms = router.stats.decide_us().p95 / 1000.0;
    let over = router.backpressure.judge(&Load { pending, p95_ms, in_flight });
    let status = match over {
        0 => BackpressureStatus::Inactive,
        1 => BackpressureStatus::Warning,
        _ => BackpressureStatus::Active,
    };
    StatusReply::from(Ok(wire::router::Backpressure {
        metrics: LoadMetrics {
            pending_messages: pending,
            latency_p95_ms: p95_ms,
            inflight_messages: in_flight,
        },
        policy: BackpressurePolicy { max_retry_attempts: 3, retry_after_seconds: Some(RETRY_AFTER_S) },
        status,
        subject: subjects::DECIDE.into(),
        thresholds: LoadThresholds {
            queue_overload: QUEUE_OVERLOAD,
            latency_overload_ms: LATENCY_OVERLOAD_MS,
            inflight_overload: IN_FLIGHT_OVERLOAD,
        },
        timestamp: unix_ms(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_over_refuse_until_one_has_fallen_to_half() {
        let backpressure = Backpressure::default();
        for (pending, in_flight, over, refuses) in [
            (999, 499, 0, false),
            (1000, 499, 1, false),
            (1000, 500, 2, true),
            (501, 251, 2, true),
            (500, 251, 1, false),
            (999, 251, 1, false),
            (999, 250, 0, false),
        ] {
            let load = Load { pending, p95_ms: 1.0, in_flight };
            assert_eq!((backpressure.judge(&load), backpressure.refuses()), (over, refuses), "{pending} {in_flight}");
        }
    }
}
