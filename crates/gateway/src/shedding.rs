//! Load shedding: polls the router and, while it reports `active`, rejects decide requests with the router's own
//! refusal.
//!
//! Each poll is answered by one router of the queue group, like each decide request. If some of several routers are
//! overloaded, the gateway therefore sheds load for about that share of the time. A failed poll changes nothing, and a
//! report that is not renewed expires: an unreachable router is left to the circuit breaker.

use bus::{Bus, Headers};
use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use wire::router::{Backpressure, BackpressureStatus, ErrorBody, RouterCode, StatusReply, VERSION};
use wire::subjects;

/// How often the router is polled while there are requests.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The shortest time between two polls, however many requests the router refuses.
const POLL_INTERVAL_MIN: Duration = Duration::from_millis(100);
const POLL_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a report is valid if it is not renewed.
const REPORT_TTL: Duration = Duration::from_secs(3);
/// When clients should retry if the router gives no time, seconds.
const RETRY_AFTER: u64 = 1;

/// State that the requests and the [`Poller`] share.
#[derive(Default)]
pub struct Pressure {
    report: Report,
    /// Whether a decide request has arrived since the last tick of the poller.
    wanted: AtomicBool,
    /// Notified when the router refuses a request because of its load.
    refused: Notify,
}

impl Pressure {
    /// Rejects a decide request while the router is overloaded.
    pub fn check(&self) -> Result<(), Box<ErrorBody>> {
        // Reading first keeps the cache line shared between the threads that send requests.
        if !self.wanted.load(Relaxed) {
            self.wanted.store(true, Relaxed);
        }

        let Some(retry_after) = self.report.overload(Instant::now()) else {
            return Ok(());
        };
        metrics::counter!("beamline_gateway_held_back_total").increment(1);
        let error = ErrorBody::new(RouterCode::Backpressure, "the router is overloaded; try again later");
        Err(Box::new(error.retry_after(retry_after)))
    }

    /// Triggers a poll: the router has refused a request because of its load, and may refuse the next ones too.
    pub fn refused(&self) {
        self.refused.notify_one();
    }
}

/// Polls the router while there are requests to decide.
pub struct Poller {
    pressure: Arc<Pressure>,
    bus: Bus,
}

impl Poller {
    pub fn new(pressure: Arc<Pressure>, bus: Bus) -> Self {
        Self { pressure, bus }
    }

    pub async fn run(self, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(POLL_INTERVAL);
        // A slow poll must not be followed by a burst of polls.
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let refused = tokio::select! {
                () = cancel.cancelled() => return,
                _ = ticks.tick() => false,
                () = self.pressure.refused.notified() => true,
            };

            let overloaded = self.pressure.report.overload(Instant::now()).is_some();
            metrics::gauge!("beamline_gateway_held_back").set(if overloaded { 1.0 } else { 0.0 });
            let wanted = self.pressure.wanted.swap(false, Relaxed);
            // An idle gateway does not poll.
            if !wanted && !refused {
                continue;
            }

            let poll = async {
                self.poll().await;
                tokio::time::sleep(POLL_INTERVAL_MIN).await;
            };
            tokio::select! {
                () = cancel.cancelled() => return,
                () = poll => {}
            }
        }
    }

    async fn poll(&self) {
        let headers = Headers::new().with("version", VERSION);
        let reply = self
            .bus
            .request(subjects::BACKPRESSURE, headers, Bytes::new(), POLL_TIMEOUT);
        let reply = reply.await.map_err(|e| e.to_string());
        match reply.and_then(|message| read(&message.payload)) {
            Ok(backpressure) => self.record(&backpressure, Instant::now()),
            Err(error) => {
                metrics::counter!("beamline_gateway_status_failures_total").increment(1);
                tracing::debug!(error, "the router did not report its load");
            }
        }
    }

    fn record(&self, data: &Backpressure, now: Instant) {
        let report = &self.pressure.report;
        let before = report.overload(now).is_some();
        let active = data.status == BackpressureStatus::Active;
        report.update(active.then(|| data.policy.retry_after_seconds.unwrap_or(RETRY_AFTER)), now);
        if before != active {
            tracing::warn!(status = data.status.as_str(), "the router's backpressure changed");
        }
    }
}

fn read(payload: &[u8]) -> Result<Backpressure, String> {
    let reply: StatusReply<Backpressure> = serde_json::from_slice(payload).map_err(|e| e.to_string())?;
    reply
        .data
        .ok_or_else(|| reply.error.unwrap_or_else(|| "the reply has no data".into()))
}

/// The router's latest report. Time is an argument.
#[derive(Default)]
struct Report {
    /// Fast path: avoids the lock when not overloaded.
    overloaded: AtomicBool,
    /// When clients should retry, in seconds, and when the report expires.
    overload: Mutex<Option<(u64, Instant)>>,
}

impl Report {
    /// `overload` is when clients should retry, in seconds; `None` if the router accepts requests.
    fn update(&self, overload: Option<u64>, now: Instant) {
        *self.overload.lock() = overload.map(|retry_after| (retry_after, now + REPORT_TTL));
        self.overloaded.store(overload.is_some(), Relaxed);
    }

    fn overload(&self, now: Instant) -> Option<u64> {
        if !self.overloaded.load(Relaxed) {
            return None;
        }
        let overload = self.overload.lock().filter(|(_, until)| now < *until);
        overload.map(|(retry_after, _)| retry_after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_is_valid_until_it_is_replaced_or_expires() {
        let report = Report::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(report.overload(at(0)), None);

        report.update(Some(30), at(0));
        for (ms, expected) in [(0, Some(30)), (2999, Some(30)), (3000, None)] {
            assert_eq!(report.overload(at(ms)), expected, "after {ms} ms");
        }

        report.update(Some(5), at(2999));
        assert_eq!(report.overload(at(5998)), Some(5));
        report.update(None, at(4000));
        assert_eq!(report.overload(at(4000)), None);
    }
}
