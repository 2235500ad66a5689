//! Random choices of a test, which the printed seed repeats.

use std::ops::Range;
use std::time::Duration;

pub struct Random {
    pub seed: u64,
    state: u64,
}

impl Random {
    /// Prints the seed; `BEAMLINE_SEED` sets it.
    pub fn start() -> Self {
        #[expect(clippy::disallowed_methods, reason = "a test's seed is no setting")]
        let seed: u64 = std::env::var("BEAMLINE_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
        println!("seed {seed} (BEAMLINE_SEED={seed} repeats it)");
        Self { seed, state: seed }
    }

    /// splitmix64
    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn index(&mut self, count: usize) -> usize {
        (self.next() % count as u64) as usize
    }

    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for n in (1..list.len()).rev() {
            list.swap(n, self.index(n + 1));
        }
    }

    pub fn milliseconds(&mut self, range: Range<u64>) -> Duration {
        Duration::from_millis(range.start + self.next() % (range.end - range.start))
    }
}
