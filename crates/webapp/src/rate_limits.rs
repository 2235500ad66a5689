//! Rate limits and backoff for each key. Time is an argument.
//!
//! Memory is bounded. Expired keys are evicted first, then those with the smallest count, so an attacker cannot
//! evict the entry that delays them by inventing keys.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Maximum keys of each counter.
const KEYS_MAX: usize = 50_000;

/// Wait this long, then try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait(pub Duration);

impl Wait {
    /// Whole seconds, at least one.
    pub fn seconds(self) -> u64 {
        self.0.as_millis().div_ceil(1000).max(1).try_into().unwrap_or(u64::MAX)
    }
}

/// Allows a burst, then one event each `every` (the generic cell rate algorithm).
pub struct Rate<K> {
    burst: u32,
    every: Duration,
    /// The time at which each key's count returns to zero.
    keys: HashMap<K, Instant>,
}

impl<K: Eq + Hash + Clone> Rate<K> {
    pub fn new(burst: u32, every: Duration) -> Self {
        Self { burst, every, keys: HashMap::new() }
    }

    /// Allows `n` events per minute, in one burst if needed.
    pub fn per_minute(n: u32) -> Self {
        Self::new(n, Duration::from_secs(60) / n.max(1))
    }

    /// Counts one event, or returns how long to wait.
    pub fn take(&mut self, key: &K, now: Instant) -> Result<(), Wait> {
        // The theoretical arrival time of the algorithm. Each event moves it by one interval.
        let free_at = self.keys.get(key).copied().unwrap_or(now).max(now);
        let ahead = free_at - now;
        let most = self.every * self.burst.saturating_sub(1);
        if ahead > most {
            return Err(Wait(ahead - most));
        }
        if self.keys.len() >= KEYS_MAX && !self.keys.contains_key(key) {
            evict(&mut self.keys, |free_at| (*free_at > now).then_some(*free_at));
        }
        self.keys.insert(key.clone(), free_at + self.every);
        Ok(())
    }
}

/// The first `free` failures cause no wait. Each further one causes a wait, twice as long as the previous one, up to
/// `longest`.
pub struct Backoff<K> {
    free: u32,
    first: Duration,
    longest: Duration,
    /// After this long without a failure, a key's failures are forgotten.
    forget: Duration,
    keys: HashMap<K, Failures>,
}

#[derive(Clone, Copy)]
struct Failures {
    count: u32,
    last: Instant,
    until: Instant,
}

impl<K: Eq + Hash + Clone> Backoff<K> {
    pub fn new(free: u32, first: Duration, longest: Duration, forget: Duration) -> Self {
        Self { free, first, longest, forget, keys: HashMap::new() }
    }

    pub fn check(&self, key: &K, now: Instant) -> Result<(), Wait> {
        match self.keys.get(key) {
            Some(failures) if failures.until > now => Err(Wait(failures.until - now)),
            _ => Ok(()),
        }
    }

    pub fn failed(&mut self, key: &K, now: Instant) {
        let forget = self.forget;
        let lives = |failures: &Failures| now.saturating_duration_since(failures.last) < forget;
        if self.keys.len() >= KEYS_MAX && !self.keys.contains_key(key) {
            evict(&mut self.keys, |failures| lives(failures).then_some((failures.count, failures.last)));
        }

        let count = self
            .keys
            .get(key)
            .filter(|failures| lives(failures))
            .map_or(0, |failures| failures.count)
            + 1;
        let wait = match count.checked_sub(self.free + 1) {
            None => Duration::ZERO,
            // The shift is bounded because it would overflow after 32 failures.
            Some(doublings) => self.longest.min(self.first.saturating_mul(1 << doublings.min(20))),
        };
        self.keys
            .insert(key.clone(), Failures { count, last: now, until: now + wait });
    }

    /// Undoes a failure that was counted by mistake.
    pub fn give_back(&mut self, key: &K) {
        if let Some(failures) = self.keys.get_mut(key) {
            failures.count = failures.count.saturating_sub(1);
            failures.until = failures.last;
        }
    }

    pub fn forget(&mut self, key: &K) {
        self.keys.remove(key);
    }
}

/// Evicts keys without weight. If almost all keys have some, also evicts the tenth with the smallest weight.
fn evict<K: Eq + Hash + Clone, V, O: Ord + Copy>(keys: &mut HashMap<K, V>, weight: impl Fn(&V) -> Option<O>) {
    keys.retain(|_, value| weight(value).is_some());
    if keys.len() < KEYS_MAX / 10 * 9 {
        return;
    }

    // A tenth at a time, so that a full table is not scanned for each new key.
    let mut weights: Vec<O> = keys.values().filter_map(&weight).collect();
    let (_, limit, _) = weights.select_nth_unstable(KEYS_MAX / 10);
    let limit = *limit;
    let mut left = KEYS_MAX / 10;
    // Many keys may have exactly the weight of the limit, so count them; otherwise all of them would be evicted.
    keys.retain(|_, value| {
        let goes = left > 0 && weight(value).is_some_and(|weight| weight <= limit);
        left -= usize::from(goes);
        !goes
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn burst_then_one_per_interval_for_each_key() {
        let start = Instant::now();
        let mut rate = Rate::new(3, 10 * SECOND);
        assert!((0..3).all(|_| rate.take(&"a", start).is_ok()));
        assert_eq!(rate.take(&"a", start), Err(Wait(10 * SECOND)));
        assert_eq!(rate.take(&"b", start), Ok(()));
        assert_eq!(rate.take(&"a", start + 4 * SECOND), Err(Wait(6 * SECOND)));
        assert_eq!(rate.take(&"a", start + 10 * SECOND), Ok(()));
        assert!(rate.take(&"a", start + 10 * SECOND).is_err());
        assert!((0..3).all(|_| rate.take(&"a", start + 100 * SECOND).is_ok()), "a quiet key has its burst again");
    }

    #[test]
    fn wait_doubles_with_each_failure_up_to_the_longest() {
        let mut now = Instant::now();
        let mut backoff = Backoff::new(2, SECOND, 5 * SECOND, 60 * SECOND);
        let mut waits = Vec::new();
        for _ in 0..7 {
            backoff.failed(&"a", now);
            let wait = backoff.check(&"a", now).err().map_or(0, |wait| wait.0.as_secs());
            waits.push(wait);
            now += Duration::from_secs(wait);
            assert_eq!(backoff.check(&"a", now), Ok(()));
        }
        assert_eq!(waits, [0, 0, 1, 2, 4, 5, 5]);

        assert_eq!(backoff.check(&"b", now), Ok(()));
        now += 60 * SECOND;
        backoff.failed(&"a", now);
        assert_eq!(backoff.check(&"a", now), Ok(()), "forgotten after a quiet minute");

        backoff.failed(&"a", now);
        backoff.failed(&"a", now);
        assert!(backoff.check(&"a", now).is_err());
        backoff.give_back(&"a");
        assert_eq!(backoff.check(&"a", now), Ok(()));
    }

    #[test]
    fn full_table_keeps_the_keys_with_most_failures() {
        let now = Instant::now();
        let mut backoff = Backoff::new(1, SECOND, 60 * SECOND, 600 * SECOND);
        let mut rate = Rate::new(2, SECOND);
        for _ in 0..3 {
            backoff.failed(&0, now);
            let _ = rate.take(&0, now);
        }
        for key in 1..2 * KEYS_MAX {
            backoff.failed(&key, now);
            rate.take(&key, now).unwrap();
        }
        assert!(backoff.keys.len() <= KEYS_MAX && rate.keys.len() <= KEYS_MAX);
        assert!(backoff.check(&0, now).is_err() && rate.take(&0, now).is_err());
    }
}
