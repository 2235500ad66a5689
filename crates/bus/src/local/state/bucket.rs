//! A bucket: its entries, and the order in which they expire or are evicted.

use super::{PRUNE_MAX, millis};
use crate::local::record::{Kind, RemovedRecord};
use journal::Place;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

/// Memory of an entry besides its key and value, counted against the bucket's `max_bytes`.
const ENTRY_OVERHEAD: u64 = 256;

#[derive(Default)]
pub struct Bucket {
    /// `None` until this process has declared it.
    pub declared: Option<Declared>,
    pub entries: HashMap<Arc<str>, Entry>,
    /// Keys by revision, so that the oldest write comes first.
    pub order: BTreeMap<u64, Arc<str>>,
    /// Revisions of the entries that are done.
    pub done: BTreeSet<u64>,
    /// Size of the entries, with their overhead.
    pub bytes: u64,
}

#[derive(Clone, Copy)]
pub struct Declared {
    pub name: &'static str,
    pub max_age: Option<Duration>,
    pub max_bytes: Option<u64>,
}

pub struct Entry {
    pub place: Place,
    pub revision: u64,
    pub at_ms: u64,
    /// Whether a full bucket may evict the entry.
    pub done: bool,
}

impl Entry {
    pub fn size(&self, key: &str) -> u64 {
        key.len() as u64 + u64::from(self.place.len) + ENTRY_OVERHEAD
    }
}

impl Bucket {
    /// Entries written before this time have expired.
    pub fn oldest_ms(&self, now_ms: u64) -> u64 {
        let max_age = self.declared.and_then(|declared| declared.max_age);
        max_age.map_or(0, |max_age| now_ms.saturating_sub(millis(max_age)))
    }

    pub fn current(&self, key: &str, now_ms: u64) -> Option<&Entry> {
        let since = self.oldest_ms(now_ms);
        self.entries.get(key).filter(|entry| entry.at_ms >= since)
    }

    /// Stores an entry; returns the previous one.
    pub fn put(&mut self, key: &str, entry: Entry) -> Option<Entry> {
        let old = self.remove(key);
        let name: Arc<str> = key.into();
        self.bytes += entry.size(key);
        self.order.insert(entry.revision, name.clone());
        if entry.done {
            self.done.insert(entry.revision);
        }
        self.entries.insert(name, entry);
        old
    }

    pub fn remove(&mut self, key: &str) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        self.order.remove(&entry.revision);
        self.done.remove(&entry.revision);
        self.bytes -= entry.size(key);
        Some(entry)
    }

    /// The entry that was written first.
    pub fn oldest(&self) -> Option<&Entry> {
        let (_, key) = self.order.first_key_value()?;
        self.entries.get(key)
    }

    pub fn drop_old(&mut self, now_ms: u64) -> Vec<(Arc<str>, Entry)> {
        let since = self.oldest_ms(now_ms);
        let mut dropped = Vec::new();
        while dropped.len() < PRUNE_MAX {
            let Some((_, key)) = self.order.first_key_value() else {
                break;
            };
            let key = key.clone();
            if self.entries.get(&key).is_some_and(|entry| entry.at_ms >= since) {
                break;
            }
            dropped.extend(self.remove(&key).map(|entry| (key, entry)));
        }
        dropped
    }
}

/// The record of an entry's removal.
pub fn removed(bucket: &str, key: &str, entry: &Entry) -> Kind {
    Kind::Removed(RemovedRecord { bucket: bucket.into(), key: key.into(), revision: entry.revision })
}
