//! The message ids that a stream remembers for deduplication.

use super::millis;
use sha1::{Digest, Sha1};
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

/// Memory of one id, at most: an entry of the map and one of the queue, both with the slack of their growth.
const ID_BYTES: u64 = 100;

/// Ids are stored as 128 bits of a cryptographic hash: clients choose them and must not be able to cause collisions.
#[derive(Default)]
pub struct Seen {
    /// Sequence and time of the append, by id.
    known: HashMap<u128, (u64, u64)>,
    /// Oldest first.
    order: VecDeque<u128>,
    /// Number of ids removed from the front of `order`. Added to an index in `order`, it gives a position that stays
    /// valid while ids are removed.
    gone: u64,
}

/// Hashes a message id.
pub fn hash(msg_id: &str) -> u128 {
    let digest = Sha1::digest(msg_id.as_bytes());
    let (half, _) = digest.split_first_chunk::<16>().expect("SHA-1 has 20 bytes");
    u128::from_be_bytes(*half)
}

impl Seen {
    /// The sequence appended under this id within the window.
    pub fn get(&self, id: u128, now_ms: u64, window: Duration) -> Option<u64> {
        let since = now_ms.saturating_sub(millis(window));
        self.known
            .get(&id)
            .filter(|(_, at_ms)| *at_ms >= since)
            .map(|(sequence, _)| *sequence)
    }

    pub fn insert(&mut self, id: u128, sequence: u64, at_ms: u64) {
        if self.known.insert(id, (sequence, at_ms)).is_none() {
            self.order.push_back(id);
        }
    }

    /// Evicts the oldest ids beyond this much memory.
    pub fn bound(&mut self, max_bytes: u64) {
        while self.order.len() as u64 * ID_BYTES > max_bytes {
            metrics::counter!("beamline_bus_message_ids_forgotten_total").increment(1);
            self.forget_first();
        }
    }

    /// Evicts the ids that are older than the window.
    pub fn forget(&mut self, now_ms: u64, window: Duration) {
        let since = now_ms.saturating_sub(millis(window));
        while let Some(id) = self.order.front()
            && self.known.get(id).is_none_or(|(_, at_ms)| *at_ms < since)
        {
            self.forget_first();
        }
    }

    /// Returns the ids from `position` on: the position after the id, the id, its sequence and its time.
    pub fn from(&self, position: u64) -> impl Iterator<Item = (u64, u128, u64, u64)> {
        let skip = usize::try_from(position.saturating_sub(self.gone)).unwrap_or(usize::MAX);
        self.order.iter().enumerate().skip(skip).filter_map(|(n, id)| {
            let (sequence, at_ms) = self.known.get(id)?;
            Some((self.gone + n as u64 + 1, *id, *sequence, *at_ms))
        })
    }

    fn forget_first(&mut self) {
        if let Some(id) = self.order.pop_front() {
            self.known.remove(&id);
            self.gone += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_takes_no_more_memory_than_it_counts_for() {
        let mut seen = Seen::default();
        for n in 1..200_000_u64 {
            seen.insert(u128::from(n), n, 0);
            // A hash table keeps an eighth of its places free, and a byte for each place.
            let known = seen.known.capacity() * 8 / 7 * (size_of::<(u128, (u64, u64))>() + 1);
            let order = seen.order.capacity() * size_of::<u128>();
            // Small tables are not worth a bound.
            assert!(n < 64 || (known + order) as u64 <= n * ID_BYTES, "{n} ids take {known} and {order} bytes");
        }
    }
}
