//! The retry budget: bounds the load that retries add to a router in trouble.

use std::time::Instant;

/// Retries that each request adds to the budget.
const PER_REQUEST: f64 = 0.2;
/// Retries that each second adds to the budget.
const PER_SECOND: f64 = 10.0;
const SAVED_MAX: f64 = 100.0;

#[derive(Debug)]
pub struct Budget {
    saved: f64,
    at: Option<Instant>,
}

impl Budget {
    pub fn new() -> Self {
        Self { saved: PER_SECOND, at: None }
    }

    /// Adds the share of one request to the budget.
    pub fn request(&mut self, now: Instant) {
        self.refill(now);
        self.saved = (self.saved + PER_REQUEST).min(SAVED_MAX);
    }

    /// Takes one retry from the budget. Returns false if there is none.
    pub fn take(&mut self, now: Instant) -> bool {
        self.refill(now);
        let enough = self.saved >= 1.0;
        if enough {
            self.saved -= 1.0;
        }
        enough
    }

    fn refill(&mut self, now: Instant) {
        let passed = self
            .at
            .map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        self.saved = (self.saved + passed * PER_SECOND).min(SAVED_MAX);
        self.at = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn retries_are_a_fifth_of_the_requests_plus_ten_a_second() {
        let mut budget = Budget::new();
        let start = Instant::now();
        let mut tries = 0;
        for n in 0..10_000u32 {
            let now = start + Duration::from_millis(1) * n;
            budget.request(now);
            tries += u32::from(budget.take(now));
        }
        // 20 % of 10,000 requests, ten a second for ten seconds, and the ten of a new budget.
        assert!((2090..=2120).contains(&tries), "{tries}");
    }

    #[test]
    fn budget_is_capped_at_a_hundred_retries() {
        let mut budget = Budget::new();
        let start = Instant::now();
        budget.request(start);
        let later = start + Duration::from_secs(3600);
        assert_eq!((0..1000).filter(|_| budget.take(later)).count(), 100);
    }
}
