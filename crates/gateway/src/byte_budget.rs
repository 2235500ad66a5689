//! Budgets of bytes that all connections share.

use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of one permit: a semaphore cannot count the bytes of every budget.
const UNIT: usize = 1024;

#[derive(Debug, Clone)]
pub struct Budget {
    bytes: usize,
    left: Arc<Semaphore>,
}

/// A part of a budget; returned when it is dropped.
#[derive(Debug)]
pub struct Share {
    _permits: OwnedSemaphorePermit,
}

/// A request for a part of a budget.
#[derive(Debug)]
pub struct Claim {
    left: Arc<Semaphore>,
    permits: u32,
}

impl Budget {
    pub fn new(bytes: usize) -> Self {
        Self { bytes, left: Arc::new(Semaphore::new(bytes / UNIT)) }
    }

    /// The budget after a reload: this one, with what is taken from it, unless its size changes.
    pub fn resized(&self, bytes: usize) -> Self {
        if bytes == self.bytes {
            self.clone()
        } else {
            Self::new(bytes)
        }
    }

    /// Claims that many bytes; a claim larger than the budget is one for the whole budget.
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
    /// Takes the share if the budget has it now.
    pub fn try_take(&self) -> Option<Share> {
        let permits = self.left.clone().try_acquire_many_owned(self.permits).ok()?;
        Some(Share { _permits: permits })
    }

    /// Takes the share as soon as the budget has it; claims are served in order.
    pub async fn take(self) -> Share {
        let permits = self.left.acquire_many_owned(self.permits).await;
        Share { _permits: permits.expect("nobody closes a budget") }
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
