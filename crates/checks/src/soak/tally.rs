//! Counts the outcomes of requests.

use hdrhistogram::Histogram;
use std::collections::BTreeMap;
use std::time::Duration;

/// Longer times are recorded as this maximum.
const LONGEST: Duration = Duration::from_secs(3600);

pub struct Tally {
    pub sent: u64,
    pub answered: u64,
    pub errors: BTreeMap<u16, u64>,
    /// Times of all outcomes, in µs.
    times: Histogram<u64>,
}

impl Default for Tally {
    fn default() -> Self {
        let times =
            Histogram::new_with_bounds(1, LONGEST.as_micros() as u64, 3).expect("bounds and digits are in range");
        Self { sent: 0, answered: 0, errors: BTreeMap::new(), times }
    }
}

impl Tally {
    pub fn took(&mut self, time: Duration) {
        self.times.saturating_record(time.as_micros() as u64);
    }

    pub fn refused(&self) -> u64 {
        self.errors.values().sum()
    }

    /// The time in µs within which this share (0 to 1) of the outcomes arrived.
    pub fn within_us(&self, share: f64) -> u64 {
        self.times.value_at_quantile(share)
    }
}
