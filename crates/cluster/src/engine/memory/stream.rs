//! The history of one channel in memory.
//!
//! A publication first gets its offset, is then stored, and is delivered last. Readers see it once it is stored, so a
//! subscriber that reads the history before its delivery does not get it twice, and one that reads it later does not
//! miss it.

use crate::Rules;
use crate::engine::fresh_epoch;
use crate::hub::Hub;
use bus::clock::unix_ms;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use wire::channels::Position;
use wire::realtime::Publication;

/// A channel without subscribers or publications for this long is evicted. If it is used again, it begins a new epoch.
pub const EVICT_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);
/// The same for a channel whose history is not kept across restarts.
const EVICT_VOLATILE_AFTER: Duration = Duration::from_secs(3600);
/// The same for a channel without any publication, because clients can create any number of these by reading them.
pub const EVICT_EMPTY_AFTER: Duration = Duration::from_secs(300);

pub struct Stream {
    pub channel: String,
    pub history: Mutex<History>,
}

pub struct History {
    pub epoch: String,
    /// The newest offset that was given to a publication.
    pub assigned: u64,
    /// The newest publication that is stored.
    pub stored: u64,
    /// The newest publication that was passed to the hub.
    delivered: u64,
    /// A thread is delivering. It continues with what is stored meanwhile.
    delivering: bool,
    /// Consecutive offsets up to `assigned`, oldest first.
    pub kept: VecDeque<Kept>,
    /// The rules of the newest publication.
    pub size: usize,
    pub ttl: Duration,
    pub durable: bool,
    pub touched_ms: u64,
}

pub struct Kept {
    pub publication: Arc<Publication>,
    pub at_ms: u64,
    pub key: Option<String>,
}

impl Stream {
    pub fn new(channel: &str) -> Self {
        Self { channel: channel.into(), history: Mutex::new(History::new()) }
    }

    /// Passes what is stored and not delivered yet to the hub, in the order of offsets. Has no effect while another
    /// thread does that for this channel.
    pub fn deliver(&self, hub: &Hub) {
        loop {
            let (epoch, publications) = {
                let mut history = self.history.lock();
                let publications = history.undelivered();
                if history.delivering || publications.is_empty() {
                    return;
                }
                history.delivering = true;
                (history.epoch.clone(), publications)
            };

            // Without the lock: a large fan-out must not hold up the thread of the journal.
            let _delivering = Delivering { stream: self, up_to: publications.last().map_or(0, |last| last.offset) };
            for publication in &publications {
                hub.publication(&self.channel, publication, &epoch);
            }
        }
    }
}

/// Ends a delivery, also if the hub panics.
struct Delivering<'a> {
    stream: &'a Stream,
    up_to: u64,
}

impl Drop for Delivering<'_> {
    fn drop(&mut self) {
        let mut history = self.stream.history.lock();
        history.delivering = false;
        history.delivered = self.up_to;
        history.shrink();
    }
}

impl History {
    pub fn new() -> Self {
        Self {
            epoch: fresh_epoch(),
            assigned: 0,
            stored: 0,
            delivered: 0,
            delivering: false,
            kept: VecDeque::new(),
            size: usize::MAX,
            ttl: Duration::MAX,
            durable: false,
            touched_ms: unix_ms(),
        }
    }

    /// The position of the publication with this idempotency key, which is known as long as it is in the history.
    pub fn known(&self, key: Option<&String>) -> Option<Position> {
        let key = key?;
        let known = self.kept.iter().find(|kept| kept.key.as_ref() == Some(key))?;
        Some(Position { offset: known.publication.offset, epoch: self.epoch.clone() })
    }

    /// Gives the publication the next offset and keeps it. It is not visible before [`History::all_stored`].
    pub fn assign(&mut self, mut publication: Publication, key: Option<String>, rules: &Rules, at_ms: u64) -> Position {
        self.assigned += 1;
        publication.offset = self.assigned;
        self.kept
            .push_back(Kept { publication: Arc::new(publication), at_ms, key });
        (self.size, self.ttl) = (rules.history_size, rules.history_ttl);
        (self.durable, self.touched_ms) = (rules.durable, at_ms);
        Position { offset: self.assigned, epoch: self.epoch.clone() }
    }

    pub fn all_stored(&mut self) {
        self.stored = self.assigned;
    }

    /// Forgets the publications that could not be stored. Their offsets are given to later ones.
    pub fn forget_unstored(&mut self) {
        while self
            .kept
            .back()
            .is_some_and(|kept| kept.publication.offset > self.stored)
        {
            self.kept.pop_back();
        }
        self.assigned = self.stored;
    }

    /// Drops publications that are older than `ttl`.
    pub fn expire(&mut self, ttl: Duration, now_ms: u64) {
        let oldest = now_ms.saturating_sub(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX));
        while self.kept.front().is_some_and(|kept| kept.at_ms < oldest) && self.drop_oldest() {}
    }

    /// Drops the oldest publications beyond the size of the history.
    pub fn shrink(&mut self) {
        let unstored = usize::try_from(self.assigned - self.stored).unwrap_or(usize::MAX);
        while self.kept.len().saturating_sub(unstored) > self.size && self.drop_oldest() {}
    }

    /// Keeps a publication that is not delivered yet; returns whether one was dropped.
    fn drop_oldest(&mut self) -> bool {
        let delivered = self
            .kept
            .front()
            .is_some_and(|kept| kept.publication.offset <= self.delivered);
        if delivered {
            self.kept.pop_front();
        }
        delivered
    }

    fn undelivered(&self) -> Vec<Arc<Publication>> {
        let newest = self.kept.iter().rev();
        let mut publications: Vec<_> = newest
            .take_while(|kept| kept.publication.offset > self.delivered)
            .filter(|kept| kept.publication.offset <= self.stored)
            .map(|kept| kept.publication.clone())
            .collect();
        publications.reverse();
        publications
    }

    /// The stored publications after `offset`, and the newest position.
    pub fn after(&self, offset: u64) -> (Vec<Arc<Publication>>, Position) {
        let publications = self
            .kept
            .iter()
            .map(|kept| &kept.publication)
            .filter(|publication| publication.offset > offset && publication.offset <= self.stored)
            .cloned()
            .collect();
        (publications, Position { offset: self.stored, epoch: self.epoch.clone() })
    }

    pub fn evict_after(&self) -> Duration {
        match (self.assigned, self.durable) {
            (0, _) => EVICT_EMPTY_AFTER,
            (_, true) => EVICT_AFTER,
            (_, false) => EVICT_VOLATILE_AFTER,
        }
    }

    /// Applies a stored publication when the log is replayed; `None` for one that cannot be read. A history is
    /// contiguous, so a hole ends what is kept before it: a client that was there cannot recover.
    pub fn restore(&mut self, epoch: String, offset: u64, kept: Option<Kept>) {
        while self.kept.back().is_some_and(|last| last.publication.offset >= offset) {
            self.kept.pop_back();
        }
        if self
            .kept
            .back()
            .is_some_and(|last| last.publication.offset + 1 != offset)
            || kept.is_none()
        {
            self.kept.clear();
        }

        self.assigned = if epoch == self.epoch {
            self.assigned.max(offset)
        } else {
            offset
        };
        self.epoch = epoch;
        self.touched_ms = kept.as_ref().map_or(self.touched_ms, |kept| kept.at_ms);
        self.kept.extend(kept);
        self.everything_delivered();
        self.shrink();
    }

    /// Ends a replay.
    pub fn restored(&mut self, now_ms: u64) {
        self.everything_delivered();
        let newest = self.kept.back().map(|kept| kept.publication.offset);
        if newest.is_some_and(|newest| newest != self.assigned) {
            self.kept.clear();
        }
        self.expire(self.ttl, now_ms);
    }

    /// No client that was connected before a restart is waiting for a delivery.
    fn everything_delivered(&mut self) {
        (self.stored, self.delivered, self.durable) = (self.assigned, self.assigned, true);
    }
}
