//! Which rows of the log hold live values, and how many bytes are dead.

use journal::Place;
use std::collections::{BTreeMap, BTreeSet};

/// Which rows of the log hold live values.
#[derive(Default)]
pub struct Rows {
    /// By row: the bytes of live values in it, and its size.
    pub live: BTreeMap<u64, (u64, u64)>,
    /// Rows without live values.
    pub dead: BTreeSet<u64>,
    pub live_bytes: u64,
    pub total_bytes: u64,
}

impl Rows {
    pub fn add(&mut self, row: u64, size: u64) {
        self.total_bytes += size;
        if self.live.entry(row).or_insert((0, 0)).0 == 0 {
            self.dead.insert(row);
        }
        self.live.entry(row).or_default().1 += size;
    }

    /// As [`Rows::hold`], if the row is in the log.
    pub fn hold_known(&mut self, place: Place) -> Option<()> {
        let len = u64::from(place.len).max(1);
        let row = self.live.get_mut(&place.row)?;
        if row.0 == 0 {
            self.dead.remove(&place.row);
        }
        row.0 += len;
        self.live_bytes += len;
        Some(())
    }

    pub fn hold(&mut self, place: Place) {
        let len = u64::from(place.len).max(1);
        self.live.entry(place.row).or_default().0 += len;
        self.live_bytes += len;
        self.dead.remove(&place.row);
    }

    pub fn release(&mut self, place: Place) {
        let len = u64::from(place.len).max(1);
        self.live_bytes -= len;
        let row = self.live.entry(place.row).or_default();
        row.0 -= len;
        if row.0 == 0 {
            self.dead.insert(place.row);
        }
    }

    pub fn remove(&mut self, row: u64) {
        self.dead.remove(&row);
        if let Some((_, size)) = self.live.remove(&row) {
            self.total_bytes -= size;
        }
    }
}
