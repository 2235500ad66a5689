//! Whether the router wants to be left alone: it is asked how loaded it is, and while it says that it refuses, decide
//! requests are refused here, in its words.
//!
//! Each answer is that of one router of the queue group, as each decision is. So of several routers, of which some are
//! overloaded, the gateway refuses for about that share of the time, and those refuse about that share of requests:
//! nobody needs to know how many there are. No answer changes nothing, and a word that is not repeated is soon forgotten:
//! a router that cannot be asked is the breaker's matter.

use crate::Gateway;
use bus::Headers;
use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use wire::router::{Backpressure, BackpressureStatus, ErrorBody, RouterCode, StatusReply, VERSION};
use wire::subjects;

/// Between two questions while there are requests; and the least, however many requests the router has just refused.
const ASK_EVERY: Duration = Duration::from_secs(1);
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// For an answer, and how long what it says holds.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
const HOLDS_FOR: Duration = Duration::from_secs(3);
/// When to try again where the router does not say it, seconds.
const RETRY_AFTER: u64 = 1;

#[derive(Default)]
pub struct Pressure {
    word: Word,
    /// There was a request since it was last asked.
    wanted: AtomicBool,
    /// The router has refused one for its load.
    refused: Notify,
}

impl Pressure {
    /// The refusal of a decide request, where the router would only be asked in vain.
    pub fn check(&self) -> Result<(), Box<ErrorBody>> {
        if !self.wanted.load(Relaxed) {
            self.wanted.store(true, Relaxed);
        }
        let Some(retry_after) = self.word.refuses(Instant::now()) else {
            return Ok(());
        };
        metrics::counter!("beamline_gateway_held_back_total").increment(1);
        let error = ErrorBody::new(RouterCode::Backpressure, "the router is overloaded; try again later");
        Err(Box::new(error.retry_after(retry_after)))
    }

    /// The router has refused a request for its load: is it more than that one?
    pub fn refused(&self) {
        self.refused.notify_one();
    }

    fn heard(&self, data: &Backpressure, now: Instant) {
        let before = self.word.refuses(now).is_some();
        let active = data.status == BackpressureStatus::Active;
        self.word
            .is(active.then(|| data.policy.retry_after_seconds.unwrap_or(RETRY_AFTER)), now);
        if before != active {
            tracing::warn!(status = data.status.as_str(), "the router's load");
        }
    }
}

/// Asks while there are requests to be decided.
pub async fn run(gateway: Arc<Gateway>, cancel: CancellationToken) {
    let pressure = gateway.router.pressure();
    let mut ticks = tokio::time::interval(ASK_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let refused = tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => false,
            () = pressure.refused.notified() => true,
        };
        let refuses = pressure.word.refuses(Instant::now()).is_some();
        metrics::gauge!("beamline_gateway_held_back").set(if refuses { 1.0 } else { 0.0 });
        if !pressure.wanted.swap(false, Relaxed) && !refused {
            continue;
        }
        let headers = Headers::new().with("version", VERSION);
        tokio::select! {
            () = cancel.cancelled() => return,
            answer = gateway.bus.request(subjects::BACKPRESSURE, headers, Bytes::new(), ANSWER_WITHIN) => {
                match answer.map_err(|e| e.to_string()).and_then(|message| load(&message.payload)) {
                    Ok(load) => pressure.heard(&load, Instant::now()),
                    Err(error) => {
                        metrics::counter!("beamline_gateway_status_failures_total").increment(1);
                        tracing::debug!(error, "the router did not say how loaded it is");
                    }
                }
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(ASK_AGAIN) => {}
        }
    }
}

fn load(payload: &[u8]) -> Result<Backpressure, String> {
    let reply: StatusReply<Backpressure> = serde_json::from_slice(payload).map_err(|e| e.to_string())?;
    reply
        .data
        .ok_or_else(|| reply.error.unwrap_or_else(|| "the reply has no data".into()))
}

/// The router's last word, as a state machine that is told the time.
#[derive(Default)]
struct Word {
    /// Spares the requests of all days the lock.
    any: AtomicBool,
    /// When to try again, and how long that holds.
    refusal: Mutex<Option<(u64, Instant)>>,
}

impl Word {
    fn is(&self, retry_after: Option<u64>, now: Instant) {
        *self.refusal.lock() = retry_after.map(|retry_after| (retry_after, now + HOLDS_FOR));
        self.any.store(retry_after.is_some(), Relaxed);
    }

    fn refuses(&self, now: Instant) -> Option<u64> {
        if !self.any.load(Relaxed) {
            return None;
        }
        self.refusal
            .lock()
            .filter(|(_, until)| now < *until)
            .map(|(retry_after, _)| retry_after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_holds_until_the_next_or_until_it_is_old() {
        let word = Word::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(word.refuses(at(0)), None);
        word.is(Some(30), at(0));
        assert_eq!((word.refuses(at(0)), word.refuses(at(2999)), word.refuses(at(3000))), (Some(30), Some(30), None));
        word.is(Some(5), at(2999));
        assert_eq!(word.refuses(at(5998)), Some(5));
        word.is(None, at(4000));
        assert_eq!(word.refuses(at(4000)), None);
    }
}
