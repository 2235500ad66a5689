//! Places: the bound of the deliveries that a reader holds at once, shared by as many of its consumers as it likes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// How many deliveries a reader may hold. Consumers that share places share the bound: each free place goes to the
/// consumer that has waited longest for one.
#[derive(Clone)]
pub struct Places(Arc<Shared>);

struct Shared {
    size: usize,
    /// Whether only one consumer takes them.
    alone: bool,
    free: Arc<Semaphore>,
    /// Consumers that take places.
    consumers: AtomicUsize,
    /// Places taken by deliveries. Others may be reserved for a request to the stream.
    in_hand: watch::Sender<usize>,
}

impl Places {
    /// Places for consumers that share them.
    pub fn new(size: usize) -> Self {
        Self::with(size, false)
    }

    /// Places for one consumer.
    pub(crate) fn alone(size: usize) -> Self {
        Self::with(size, true)
    }

    fn with(size: usize, alone: bool) -> Self {
        let size = size.clamp(1, Semaphore::MAX_PERMITS);
        Self(Arc::new(Shared {
            size,
            alone,
            free: Arc::new(Semaphore::new(size)),
            consumers: AtomicUsize::new(0),
            in_hand: watch::Sender::new(0),
        }))
    }

    /// The number of places, free or not.
    pub fn size(&self) -> usize {
        self.0.size
    }

    /// Adds a consumer, until the returned value is dropped.
    pub(crate) fn join(&self) -> Member {
        self.0.consumers.fetch_add(1, Relaxed);
        Member(self.clone())
    }
}

/// A consumer that takes places.
pub(crate) struct Member(Places);

impl Drop for Member {
    fn drop(&mut self) {
        self.0.0.consumers.fetch_sub(1, Relaxed);
    }
}

impl Member {
    fn shared(&self) -> &Shared {
        &self.0.0
    }

    /// Whether no other consumer may ever take one of the places.
    pub fn is_alone(&self) -> bool {
        self.shared().alone
    }

    /// Other consumers that share the places.
    fn others(&self) -> usize {
        self.shared().consumers.load(Relaxed) - 1
    }

    pub fn size(&self) -> usize {
        self.0.size()
    }

    /// Waits for `least` places, then takes as many more as are free, up to `most`, but leaves one for each other
    /// consumer.
    pub async fn reserve(&self, least: usize, most: usize) -> Reserved {
        let count = |places: usize| u32::try_from(places).unwrap_or(u32::MAX);
        let free = &self.shared().free;
        let acquired = free.clone().acquire_many_owned(count(least)).await;
        let mut permits = acquired.expect("the semaphore is never closed");

        let spare = free.available_permits().saturating_sub(self.others());
        let more = spare.min(most.saturating_sub(least));
        if let Ok(rest) = free.clone().try_acquire_many_owned(count(more)) {
            permits.merge(rest);
        }
        Reserved { permits, places: self.0.clone() }
    }

    /// Returns once every place is taken by a delivery.
    pub async fn full(&self) {
        let mut in_hand = self.shared().in_hand.subscribe();
        let full = in_hand.wait_for(|taken| *taken >= self.size()).await;
        full.expect("the sender lives as long as these places");
    }
}

/// Places for deliveries that may come; those that are not used become free when this is dropped.
pub(crate) struct Reserved {
    permits: OwnedSemaphorePermit,
    places: Places,
}

impl Reserved {
    pub fn len(&self) -> usize {
        self.permits.num_permits()
    }

    /// Takes one of the places for a delivery; `None` if none is left.
    pub fn take(&mut self) -> Option<Place> {
        let permit = self.permits.split(1)?;
        self.places.0.in_hand.send_modify(|taken| *taken += 1);
        Some(Place { _permit: permit, places: self.places.clone() })
    }
}

/// The place of one delivery; dropping it makes the place free.
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
    places: Places,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.0.in_hand.send_modify(|taken| *taken -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn reservation_leaves_a_place_for_each_other_consumer() {
        let places = Places::new(5);
        let [a, b, c] = [places.join(), places.join(), places.join()];

        let first = a.reserve(1, 64).await;
        assert_eq!(first.len(), 3);
        let (second, third) = (b.reserve(1, 64).await, c.reserve(1, 64).await);
        assert_eq!((second.len(), third.len()), (1, 1));
        assert!(a.reserve(1, 64).now_or_never().is_none());
    }

    #[tokio::test]
    async fn places_are_full_when_deliveries_take_them_all() {
        let places = Places::new(2).join();
        let mut reserved = places.reserve(2, 2).await;
        assert!(places.full().now_or_never().is_none(), "reserved places are not taken");

        let (first, second) = (reserved.take().unwrap(), reserved.take().unwrap());
        places.full().await;
        assert!(reserved.take().is_none());

        drop(first);
        assert!(places.full().now_or_never().is_none());
        assert_eq!(places.reserve(1, 64).await.len(), 1);
        drop(second);
    }
}
