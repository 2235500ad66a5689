//! When the next request is due, for a load of so many a second without bursts.

use std::time::Duration;
use tokio::time::Instant;

/// So much of what was missed is made up for: what a coarse timer costs, and not what a slow gateway does.
const BEHIND_MAX: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub struct Pace {
    step: Duration,
    next: Instant,
}

impl Pace {
    pub fn new(per_second: f64, start: Instant) -> Self {
        Self { step: Duration::from_secs_f64(1.0 / per_second), next: start }
    }

    /// The moment of one more request.
    pub fn next(&mut self, now: Instant) -> Instant {
        let earliest = now.checked_sub(BEHIND_MAX).unwrap_or(now);
        let due = self.next.max(earliest);
        self.next = due + self.step;
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_late_catches_up_a_little_and_no_more() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace::new(1000.0, start);
        // Asked early, requests lie ahead a step apart.
        assert_eq!([pace.next(at(0)), pace.next(at(0)), pace.next(at(0))], [at(0), at(1), at(2)]);
        // Three steps late: all are made up for.
        assert_eq!([pace.next(at(6)), pace.next(at(6))], [at(3), at(4)]);
        // A second late: ten are.
        let now = at(1000);
        let at_once = (0..100).filter(|_| pace.next(now) <= now).count();
        assert_eq!(at_once, 11);
    }
}
