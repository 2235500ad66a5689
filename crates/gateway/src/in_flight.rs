//! Counts requests in flight and connections against a global limit and a share of it for each user.
//!
//! The limits are arguments, because a reload can change them between two calls.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;

#[derive(Debug, Default)]
pub struct Places(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    all: usize,
    /// Only users who hold at least one place.
    by_user: HashMap<u32, usize>,
}

/// Counts as one request in flight, or one connection, until it is dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    uid: u32,
}

/// Which limit is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    All,
    User,
}

impl Places {
    /// Gives a place if fewer than `limit` are held, and fewer than `share` by this user. Lowering a limit keeps
    /// existing holders; new places wait until the count drops below it.
    pub fn take(self: &Arc<Self>, uid: u32, limit: usize, share: usize) -> Result<Place, Full> {
        let mut held = self.0.lock();
        if held.all >= limit {
            return Err(Full::All);
        }
        if held.by_user.get(&uid).is_some_and(|theirs| *theirs >= share) {
            return Err(Full::User);
        }

        held.all += 1;
        *held.by_user.entry(uid).or_default() += 1;
        Ok(Place { places: self.clone(), uid })
    }

    pub fn held(&self) -> u64 {
        self.0.lock().all as u64
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.places.0.lock();
        held.all -= 1;
        if let Some(theirs) = held.by_user.get_mut(&self.uid) {
            *theirs -= 1;
            if *theirs == 0 {
                held.by_user.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_at_its_share_leaves_the_rest_to_others() {
        let places = Arc::new(Places::default());
        let take = |uid| places.take(uid, 6, 4);
        let mut of_one: Vec<Place> = (0..4).map(|_| take(1).unwrap()).collect();
        assert_eq!(take(1).unwrap_err(), Full::User);

        let of_two: Vec<Place> = (0..2).map(|_| take(2).unwrap()).collect();
        assert_eq!(take(2).unwrap_err(), Full::All);

        of_one.pop();
        drop(take(2).unwrap());
        of_one.push(take(1).unwrap());
        assert_eq!(places.held(), 6);

        drop((of_one, of_two));
        assert_eq!((places.held(), places.0.lock().by_user.len()), (0, 0));
    }

    #[test]
    fn concurrent_takers_get_exactly_the_limit() {
        let places = Arc::new(Places::default());
        let start = std::sync::Barrier::new(8);
        let burst = |uid: u32| {
            start.wait();
            (0..100)
                .filter_map(|_| places.take(uid % 2, 123, 100).ok())
                .collect::<Vec<_>>()
        };

        let taken: Vec<Place> = std::thread::scope(|scope| {
            let burst = &burst;
            let threads: Vec<_> = (0..8).map(|uid| scope.spawn(move || burst(uid))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });

        assert_eq!(taken.len(), 123);
        assert!(
            [0, 1]
                .iter()
                .all(|uid| taken.iter().filter(|place| place.uid == *uid).count() <= 100)
        );
    }

    #[test]
    fn lowering_the_limits_keeps_existing_holders() {
        let places = Arc::new(Places::default());
        let mut held: Vec<Place> = (0..4).map(|_| places.take(1, 4, 4).unwrap()).collect();
        for expected in [Full::All, Full::All] {
            held.pop();
            assert_eq!(places.take(1, 2, 2).unwrap_err(), expected);
        }

        assert_eq!(places.take(1, 4, 2).unwrap_err(), Full::User);
        held.pop();
        held.push(places.take(1, 2, 2).unwrap());
    }
}
