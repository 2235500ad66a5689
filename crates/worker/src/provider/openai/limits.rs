//! Limits of the requests and tokens that this worker sends to an endpoint in a minute. Time is an argument.

use parking_lot::Mutex;
use std::time::Duration;
use tokio::time::Instant;
use wire::limits::COOL_DOWN_MAX_S;

/// English text has about four bytes a token; the endpoint's own count replaces the estimate.
const BYTES_PER_TOKEN: usize = 4;

/// Tokens of a request with a body of this size.
pub fn estimate(bytes: usize) -> u64 {
    bytes.div_ceil(BYTES_PER_TOKEN) as u64
}

pub struct Limits(Mutex<Buckets>);

struct Buckets {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

/// Holds a minute's worth, and fills evenly. It may be overdrawn, because the tokens of an answer are known at its end.
struct Bucket {
    per_minute: f64,
    level: f64,
    filled: Option<Instant>,
}

impl Limits {
    pub fn new(requests: Option<u64>, tokens: Option<u64>) -> Self {
        let bucket = |per_minute: u64| Bucket { per_minute: per_minute as f64, level: per_minute as f64, filled: None };
        Self(Mutex::new(Buckets { requests: requests.map(bucket), tokens: tokens.map(bucket) }))
    }

    /// Takes one request with these tokens, or returns the seconds after which there will be room for it.
    pub fn take(&self, tokens: u64, now: Instant) -> Result<(), u64> {
        let mut buckets = self.0.lock();
        let Buckets { requests, tokens: of_tokens } = &mut *buckets;
        let mut wanted = [(requests, 1.0), (of_tokens, tokens as f64)];

        let waits = wanted
            .iter_mut()
            .filter_map(|(bucket, amount)| bucket.as_mut()?.wait(*amount, now));
        if let Some(wait) = waits.max() {
            return Err((wait.as_secs_f64().ceil() as u64).clamp(1, COOL_DOWN_MAX_S));
        }
        for (bucket, amount) in wanted {
            if let Some(bucket) = bucket {
                bucket.level -= amount;
            }
        }
        Ok(())
    }

    /// Replaces an estimate of tokens by what was used.
    pub fn correct(&self, estimate: u64, used: u64) {
        if let Some(bucket) = &mut self.0.lock().tokens {
            bucket.level += estimate as f64 - used as f64;
        }
    }
}

impl Bucket {
    /// How long until there is room for `amount`; `None` if there is. An amount above the limit needs a full bucket.
    fn wait(&mut self, amount: f64, now: Instant) -> Option<Duration> {
        let a_second = self.per_minute / 60.0;
        let past = self
            .filled
            .map_or(Duration::ZERO, |filled| now.saturating_duration_since(filled));
        self.level = self.per_minute.min(self.level + past.as_secs_f64() * a_second);
        self.filled = Some(now);

        let lacking = amount.min(self.per_minute) - self.level;
        // A rounding error is no reason to wait.
        (lacking > 1e-6).then(|| Duration::from_secs_f64(lacking / a_second))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_a_minute_hold_and_say_when_there_is_room() {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);

        let limits = Limits::new(Some(2), None);
        assert_eq!([(); 3].map(|()| limits.take(1_000_000, at(0))), [Ok(()), Ok(()), Err(30)]);
        assert_eq!((limits.take(1, at(29)), limits.take(1, at(30)), limits.take(1, at(30))), (Err(1), Ok(()), Err(30)));

        let limits = Limits::new(None, Some(600));
        assert_eq!(limits.take(400, at(0)), Ok(()));
        assert_eq!(limits.take(400, at(0)), Err(20), "a refused request takes nothing");
        limits.correct(400, 100);
        assert_eq!((limits.take(400, at(0)), limits.take(400, at(0))), (Ok(()), Err(30)));

        let limits = Limits::new(None, Some(600));
        assert_eq!(limits.take(100, at(0)), Ok(()));
        limits.correct(100, 1200);
        assert_eq!((limits.take(10, at(0)), limits.take(10, at(61))), (Err(61), Ok(())), "overdrawn by an answer");
        assert_eq!(limits.take(5000, at(200)), Ok(()), "a request above the limit runs when nothing else did");
        assert_eq!(limits.take(1, at(200)), Err(441));

        let unlimited = Limits::new(None, None);
        assert_eq!(unlimited.take(u64::MAX, at(0)), Ok(()));
        assert_eq!(Limits::new(Some(1), Some(1)).take(u64::MAX, at(0)), Ok(()));
    }
}
