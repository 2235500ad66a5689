//! Schedules requests at a fixed rate without bursts.

use std::time::Duration;
use tokio::time::Instant;

/// How far a schedule that fell behind catches up: enough for a coarse timer, but not for a slow gateway.
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

    /// Returns the time at which the next request is due.
    pub fn next(&mut self, now: Instant) -> Instant {
        // Older missed requests are skipped, so that a stall of the gateway does not end in a burst.
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
    fn late_schedule_catches_up_by_ten_milliseconds_at_most() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace::new(1000.0, start);
        // On time: requests are scheduled one step apart.
        assert_eq!([pace.next(at(0)), pace.next(at(0)), pace.next(at(0))], [at(0), at(1), at(2)]);

        // Three steps late: all three are caught up.
        assert_eq!([pace.next(at(6)), pace.next(at(6))], [at(3), at(4)]);

        // A second late: only the last ten steps are caught up, besides the current one.
        let now = at(1000);
        let at_once = (0..100).filter(|_| pace.next(now) <= now).count();
        assert_eq!(at_once, 11);
    }
}
