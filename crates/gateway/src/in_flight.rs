//! Counts requests in flight and connections against a global limit and a share of it for each user.
//!
//! Limits are arguments, because a reload can change them between two calls.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

/// Permits held by users, who are known by their uid or, as tenants, by their name.
#[derive(Debug)]
pub struct Permits<U: Eq + Hash = u32>(Mutex<Held<U>>);

#[derive(Debug)]
struct Held<U> {
    all: usize,
    /// Permits held by each user; users without any have no entry.
    by_user: HashMap<U, usize>,
}

/// Counts as one request in flight or one connection until it is dropped.
#[derive(Debug)]
pub struct Permit<U: Eq + Hash = u32> {
    permits: Arc<Permits<U>>,
    user: U,
}

impl<U: Eq + Hash> Default for Permits<U> {
    fn default() -> Self {
        Self(Mutex::new(Held { all: 0, by_user: HashMap::new() }))
    }
}

/// The limit that is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    All,
    User,
}

impl<U: Eq + Hash + Clone> Permits<U> {
    /// Takes a permit if fewer than `limit` are held, and fewer than `share` by this user. Lowering a limit keeps
    /// existing holders; new permits are refused until the count drops below it.
    pub fn take(self: &Arc<Self>, user: U, limit: usize, share: usize) -> Result<Permit<U>, Full> {
        let mut held = self.0.lock();
        if held.all >= limit {
            return Err(Full::All);
        }
        if held.by_user.get(&user).is_some_and(|count| *count >= share) {
            return Err(Full::User);
        }

        held.all += 1;
        *held.by_user.entry(user.clone()).or_default() += 1;
        Ok(Permit { permits: self.clone(), user })
    }

    /// Permits held by all users together.
    pub fn held(&self) -> u64 {
        self.0.lock().all as u64
    }
}

impl<U: Eq + Hash> Drop for Permit<U> {
    fn drop(&mut self) {
        let mut held = self.permits.0.lock();
        held.all -= 1;
        if let Some(count) = held.by_user.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                held.by_user.remove(&self.user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_at_its_share_leaves_the_rest_to_others() {
        let permits = Arc::new(Permits::default());
        let take = |uid| permits.take(uid, 6, 4);
        let mut of_one: Vec<Permit> = (0..4).map(|_| take(1).unwrap()).collect();
        assert_eq!(take(1).unwrap_err(), Full::User);

        let of_two: Vec<Permit> = (0..2).map(|_| take(2).unwrap()).collect();
        assert_eq!(take(2).unwrap_err(), Full::All);

        of_one.pop();
        drop(take(2).unwrap());
        of_one.push(take(1).unwrap());
        assert_eq!(permits.held(), 6);

        drop((of_one, of_two));
        assert_eq!((permits.held(), permits.0.lock().by_user.len()), (0, 0));
    }

    #[test]
    fn concurrent_takers_get_exactly_the_limit() {
        let permits = Arc::new(Permits::default());
        let start = std::sync::Barrier::new(8);
        let burst = |uid: u32| {
            start.wait();
            (0..100)
                .filter_map(|_| permits.take(uid % 2, 123, 100).ok())
                .collect::<Vec<_>>()
        };

        let taken: Vec<Permit> = std::thread::scope(|scope| {
            let burst = &burst;
            let threads: Vec<_> = (0..8).map(|uid| scope.spawn(move || burst(uid))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });

        assert_eq!(taken.len(), 123);
        assert!(
            [0, 1]
                .iter()
                .all(|uid| taken.iter().filter(|permit| permit.user == *uid).count() <= 100)
        );
    }

    #[test]
    fn lowering_the_limits_keeps_existing_holders() {
        let permits = Arc::new(Permits::default());
        let mut held: Vec<Permit> = (0..4).map(|_| permits.take(1, 4, 4).unwrap()).collect();
        for expected in [Full::All, Full::All] {
            held.pop();
            assert_eq!(permits.take(1, 2, 2).unwrap_err(), expected);
        }

        assert_eq!(permits.take(1, 4, 2).unwrap_err(), Full::User);
        held.pop();
        held.push(permits.take(1, 2, 2).unwrap());
    }
}
