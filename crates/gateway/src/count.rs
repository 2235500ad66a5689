//! Counts what is held of something that has a limit. The limit is an argument, as it may be another each time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

#[derive(Debug, Default)]
pub struct Count(AtomicUsize);

/// One of those counted, until it is dropped.
#[derive(Debug)]
pub struct Place(Arc<Count>);

impl Count {
    /// A place if fewer than `limit` are held. Those above a limit that has come down keep theirs, and come back first.
    pub fn take(self: &Arc<Self>, limit: usize) -> Option<Place> {
        let one_more = |held| (held < limit).then_some(held + 1);
        // It guards no other memory, so no ordering but its own is needed.
        self.0.fetch_update(Relaxed, Relaxed, one_more).ok().map(|_| Place(self.clone()))
    }

    pub fn held(&self) -> u64 {
        self.0.load(Relaxed) as u64
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_may_come_down_below_what_is_held() {
        let count = Arc::new(Count::default());
        let mut held: Vec<Place> = (0..4).map(|_| count.take(4).unwrap()).collect();
        assert!(count.take(4).is_none());
        for _ in 0..2 {
            held.pop();
            assert!(count.take(2).is_none());
        }
        held.pop();
        held.push(count.take(2).unwrap());
        assert!(count.take(2).is_none() && count.take(3).is_some());
    }

    #[test]
    fn of_many_at_once_exactly_the_limit_is_taken() {
        let count = Arc::new(Count::default());
        let start = std::sync::Barrier::new(8);
        let burst = || {
            start.wait();
            (0..100).filter_map(|_| count.take(123)).collect::<Vec<_>>()
        };
        let taken: Vec<Place> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(burst)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(taken.len(), 123);
        drop(taken);
        assert_eq!((0..200).filter_map(|_| count.take(123)).collect::<Vec<_>>().len(), 123);
    }
}
