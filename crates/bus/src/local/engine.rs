//! The state of the embedded bus as its journal keeps it: streams, consumers and buckets with their places in memory,
//! values in the log, and the newest groups in a cache.

use super::migrate;
use super::record::{Group, Stored, each};
use super::state::{Cursor, State, millis};
use crate::{Error, Message, Result};
use bytes::Bytes;
use journal::{Log, Place};
use std::collections::VecDeque;
use std::time::Duration;

/// Size of the newest groups that are cached in memory: most values are read soon after they are written.
const CACHE_BYTES: usize = 64 * 1024 * 1024;
/// Maximum dead rows that one commit deletes.
const DROPPED_ROWS_MAX: usize = 256;
/// Dead bytes that the log may hold, in addition to as many as are live, before rows are compacted.
const COMPACT_SLACK: u64 = 64 * 1024 * 1024;
/// Free bytes that the file keeps for later groups.
const FREE_BYTES_KEPT: u64 = 64 * 1024 * 1024;
/// Maximum free bytes that one call returns to the file system.
const BYTES_GIVEN_BACK: u64 = 8 * 1024 * 1024;

pub type Engine = journal::Engine<Stores>;

/// The state and the cache of its values.
pub struct Stores {
    pub state: State,
    cache: Cache,
}

impl Stores {
    /// Restores the state from the log.
    pub fn load(log: &mut Log) -> journal::Result<Self> {
        migrate::older_format(log)?;

        let state = std::cell::RefCell::new(State::default());
        log.replay(|part| state.borrow_mut().apply(0, part), |row, group| state.borrow_mut().apply(row, group))?;

        let mut state = state.into_inner();
        state.finish_replay(&log.rows()?).map_err(|what| log.damaged(what))?;
        Ok(Self { state, cache: Cache::new(log.last() + 1) })
    }

    pub fn values<'a>(&'a self, log: &'a Log) -> Values<'a> {
        Values { log, cache: &self.cache }
    }

    /// Moves the live values of one sparse row to the group, so that the row becomes dead.
    fn compact(&mut self, log: &Log, group: &mut Group) -> journal::Result<()> {
        let Some(row) = self.state.row_to_compact(log.snapshot_since(), COMPACT_SLACK) else {
            return Ok(());
        };

        let data = log.read_row(row)?;
        let moved = each(row, &data, |kind, place| {
            if let Some(place) = place {
                let start = place.offset as usize;
                self.state
                    .relocate(group, kind, place, &data[start..start + place.len as usize]);
            }
            Ok(())
        });
        moved.map_err(|what| log.damaged(what))
    }
}

impl journal::State for Stores {
    type Group = Group;
    type Cursor = Cursor;

    fn group(&mut self, row: u64) -> Group {
        Group::new(row)
    }

    fn size(group: &Group) -> usize {
        group.len()
    }

    /// Records the cursors, so that a restart knows what was delivered.
    fn flush(&mut self, group: &mut Group) {
        self.state.flush_cursors(group);
    }

    fn complete(&mut self, mut group: Group, log: &Log) -> journal::Result<Bytes> {
        self.state.flush_cursors(&mut group);
        self.compact(log, &mut group)?;
        Ok(group.into_bytes())
    }

    fn dead_rows(&mut self, newest: u64) -> Vec<u64> {
        self.state.take_dead_rows(newest, DROPPED_ROWS_MAX)
    }

    fn committed(&mut self, row: u64, group: Bytes) {
        self.state.row_added(row, group.len() as u64);
        self.cache.add(group);
    }

    /// Reloads the state, which was ahead of the log.
    fn reopened(&mut self, log: &mut Log, outage: Duration) -> journal::Result<()> {
        let mut loaded = Self::load(log)?;
        loaded.state.adopt(&self.state, millis(outage));
        *self = loaded;
        Ok(())
    }

    fn snapshot(&mut self) -> Cursor {
        Cursor::Start
    }

    fn snapshot_part(&mut self, cursor: Cursor, size: usize) -> (Bytes, Option<Cursor>) {
        let (part, next) = self.state.snapshot_part(cursor, size);
        (part, (next != Cursor::Done).then_some(next))
    }
}

/// The newest groups: consecutive rows, oldest first.
struct Cache {
    groups: VecDeque<Bytes>,
    /// Row of the oldest group.
    first: u64,
    bytes: usize,
}

impl Cache {
    fn new(first: u64) -> Self {
        Self { groups: VecDeque::new(), first, bytes: 0 }
    }

    fn add(&mut self, group: Bytes) {
        self.bytes += group.len();
        self.groups.push_back(group);
        while self.bytes > CACHE_BYTES
            && let Some(oldest) = self.groups.pop_front()
        {
            self.bytes -= oldest.len();
            self.first += 1;
        }
    }

    fn get(&self, place: Place) -> Option<Bytes> {
        let index = usize::try_from(place.row.checked_sub(self.first)?).ok()?;
        let start = place.offset as usize;
        Some(self.groups.get(index)?.slice(start..start + place.len as usize))
    }
}

/// Reads values, from memory if their group is one of the newest, otherwise from the log.
pub struct Values<'a> {
    pub log: &'a Log,
    cache: &'a Cache,
}

impl Values<'_> {
    pub fn get(&self, place: Place) -> Result<Bytes> {
        match self.cache.get(place) {
            Some(value) => Ok(value),
            None => Ok(self.log.read(place)?),
        }
    }

    pub fn message(&self, place: Place) -> Result<Message> {
        let unreadable =
            |error: prost::DecodeError| Error::Storage(format!("a stored message cannot be read: {error}"));
        let stored: Stored = prost::Message::decode(self.get(place)?).map_err(unreadable)?;
        Ok(stored.into_message())
    }

    /// Returns free bytes of the file to the file system, but keeps some for later groups.
    pub fn give_back(&self) -> Result<()> {
        Ok(self.log.give_back(FREE_BYTES_KEPT, BYTES_GIVEN_BACK)?)
    }
}
