//! Budgets of bytes that all connections share.

use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes per permit. A semaphore bounds its permits, so a large budget may not have one for every byte.
const UNIT: usize = 1024;

#[derive(Debug, Clone)]
pub struct Budget {
    bytes: usize,
    left: Arc<Semaphore>,
}

/// A part of a budget. Dropping it returns the bytes.
#[derive(Debug)]
pub struct Share {
    _permits: OwnedSemaphorePermit,
}

/// A claim on a part of a budget, not yet granted.
#[derive(Debug)]
pub struct Claim {
    left: Arc<Semaphore>,
    permits: u32,
}

impl Budget {
    pub fn new(bytes: usize) -> Self {
        Self { bytes, left: Arc::new(Semaphore::new(bytes / UNIT)) }
    }

    /// The budget after a reload: a new one if the size changes, otherwise this one with the shares taken from it.
    pub fn resized(&self, bytes: usize) -> Self {
        if bytes == self.bytes {
            self.clone()
        } else {
            Self::new(bytes)
        }
    }

    /// Claims that many bytes. A claim larger than the budget is reduced to the whole budget.
    pub fn claim(&self, bytes: usize) -> Claim {
        let permits = bytes.div_ceil(UNIT).min(self.bytes / UNIT);
        Claim {
            left: self.left.clone(),
            permits: u32::try_from(permits).expect("frames are at most 4 MiB"),
        }
    }

    /// Bytes that are free.
    pub fn left(&self) -> usize {
        self.left.available_permits() * UNIT
    }
}

impl Claim {
    /// Takes the share if enough of the budget is free.
    pub fn try_take(&self) -> Option<Share> {
        let permits = self.left.clone().try_acquire_many_owned(self.permits).ok()?;
        Some(Share { _permits: permits })
    }

    /// Waits until enough of the budget is free, and takes the share. Claims are served in order.
    pub async fn take(self) -> Share {
        let permits = self.left.acquire_many_owned(self.permits).await;
        Share { _permits: permits.expect("the semaphore is never closed") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claim_larger_than_the_budget_takes_all_of_it() {
        let budget = Budget::new(2048);
        let share = budget.claim(1 << 20).try_take().unwrap();
        assert_eq!(budget.left(), 0);
        assert!(budget.claim(1024).try_take().is_none());

        drop(share);
        assert_eq!(budget.left(), 2048);
    }

    #[test]
    fn resizing_keeps_shares_only_if_the_size_stays() {
        let budget = Budget::new(2048);
        let _share = budget.claim(1024).try_take().unwrap();
        assert_eq!(budget.resized(2048).left(), 1024);
        assert_eq!(budget.resized(4096).left(), 4096);
    }
}
