//! The embedded bus's engine: one thread owns the state of all streams, consumers and buckets, and the log that stores
//! it.
//!
//! Operations that arrive while a commit runs share the next one. An operation is answered after its commit. Reads are
//! operations too, so no caller sees a write that a crash could still undo.

use super::migrate;
use super::record::{Group, Stored};
use super::state::{Cursor, State};
use crate::{Error, Message, Result};
use bytes::Bytes;
use journal::{Commit, Durability, Log, Part, Place};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Maximum operations in one commit.
const BATCH_MAX: usize = 512;
/// A group of at least this size, in bytes, is committed before the next operation runs.
const GROUP_BYTES: usize = 4 * 1024 * 1024;
/// Size of the newest groups that are cached in memory: most values are read soon after they are written.
const CACHE_BYTES: usize = 64 * 1024 * 1024;
/// A snapshot begins after this many bytes of groups, or after twice the size of the last snapshot, if that is more.
const SNAPSHOT_BYTES_MIN: u64 = 16 * 1024 * 1024;
/// Bytes that one commit adds to a snapshot.
const PART_BYTES: usize = 64 * 1024;
/// Maximum dead rows that one commit deletes.
const DROPPED_ROWS_MAX: usize = 256;
/// Dead bytes that the log may hold, in addition to as many as are live, before rows are compacted.
const COMPACT_SLACK: u64 = 64 * 1024 * 1024;
/// Free pages (4 KiB) that the file keeps for later groups.
const FREE_PAGES_KEPT: u64 = 16 * 1024;
/// Maximum free pages that one call returns to the file system.
const PAGES_GIVEN_BACK: u64 = 2 * 1024;
/// After a failed commit, the engine tries to reopen the log at most this often.
const REOPEN_INTERVAL: Duration = Duration::from_secs(1);

/// Changes the state and records the change in the group. The returned [`Answer`] runs after the commit.
pub type Operation = Box<dyn FnOnce(&mut State, &mut Group) -> Answer + Send>;
/// Runs only if the commit succeeded. Otherwise it is dropped, which closes the caller's channel.
pub type Answer = Box<dyn FnOnce(&Values) + Send>;

#[derive(Default)]
pub struct Shared {
    /// Why the bus refuses operations; `None` while it accepts them.
    pub failure: Mutex<Option<String>>,
    /// Whether a consumer's cursor has advanced beyond the one in the log.
    pub unflushed: AtomicBool,
}

/// Reads values, from memory if their group is one of the newest, otherwise from the log.
pub struct Values {
    pub log: Log,
    /// The cached groups: consecutive rows, oldest first.
    recent: VecDeque<Bytes>,
    /// Row of the oldest cached group.
    first: u64,
    /// Size of the cached groups.
    bytes: usize,
}

impl Values {
    /// Returns free pages of the file to the file system, but keeps some for later groups.
    pub fn give_back(&self) -> Result<()> {
        Ok(self.log.give_back(FREE_PAGES_KEPT, PAGES_GIVEN_BACK)?)
    }

    fn new(log: Log) -> Self {
        Self { first: log.last() + 1, log, recent: VecDeque::new(), bytes: 0 }
    }

    fn committed(&mut self, group: Bytes) {
        self.bytes += group.len();
        self.recent.push_back(group);
        while self.bytes > CACHE_BYTES
            && let Some(oldest) = self.recent.pop_front()
        {
            self.bytes -= oldest.len();
            self.first += 1;
        }
    }

    pub fn get(&self, place: Place) -> Result<Bytes> {
        let index = place
            .row
            .checked_sub(self.first)
            .and_then(|index| usize::try_from(index).ok());
        if let Some(group) = index.and_then(|index| self.recent.get(index)) {
            let start = place.offset as usize;
            return Ok(group.slice(start..start + place.len as usize));
        }
        Ok(self.log.read(place)?)
    }

    pub fn message(&self, place: Place) -> Result<Message> {
        let unreadable =
            |error: prost::DecodeError| Error::Storage(format!("a stored message cannot be read: {error}"));
        let stored: Stored = prost::Message::decode(self.get(place)?).map_err(unreadable)?;
        Ok(stored.into_message())
    }
}

/// Owns the state and the log.
pub struct Engine {
    path: PathBuf,
    durability: Durability,
    state: State,
    /// `None` after a failed commit, until the log is open again.
    values: Option<Values>,
    /// Where the snapshot in progress continues; `None` if there is none.
    snapshot: Option<Cursor>,
    /// Bytes of the snapshot in progress.
    snapshot_bytes: u64,
    /// Bytes of the last complete snapshot.
    last_snapshot_bytes: u64,
    /// Bytes of groups since the last snapshot began.
    since_snapshot: u64,
    /// When the last commit failed.
    failed: Instant,
    next_reopen: Instant,
    shared: Arc<Shared>,
}

impl Engine {
    pub fn open(path: &Path, durability: Durability, shared: Arc<Shared>) -> Result<Self> {
        let (values, state) = load(path, durability)?;
        Ok(Self {
            path: path.to_path_buf(),
            durability,
            state,
            values: Some(values),
            snapshot: None,
            snapshot_bytes: 0,
            last_snapshot_bytes: 0,
            since_snapshot: 0,
            failed: Instant::now(),
            next_reopen: Instant::now(),
            shared,
        })
    }

    pub fn run(mut self, mut queue: mpsc::Receiver<Operation>) {
        let mut batch = Vec::with_capacity(BATCH_MAX);
        while queue.blocking_recv_many(&mut batch, BATCH_MAX) > 0 {
            if self.values.is_none() {
                self.reopen();
            }

            let mut operations = batch.drain(..);
            while operations.len() > 0 {
                self.commit_some(&mut operations);
            }
        }

        // All handles are dropped: store the cursors, so that a restart knows what was delivered.
        self.commit_some(&mut std::iter::once::<Operation>(Box::new(|state, group| {
            state.flush_cursors(group);
            Box::new(|_| {})
        })));
    }

    /// Runs operations until their group is full, commits the group and sends the answers.
    fn commit_some(&mut self, operations: &mut dyn Iterator<Item = Operation>) {
        let Some(values) = &mut self.values else {
            // A dropped operation closes its caller's channel; the caller then reads the failure.
            operations.for_each(drop);
            return;
        };

        let mut group = Group::new(values.log.last() + 1);
        let mut answers = Vec::new();
        while group.len() < GROUP_BYTES
            && let Some(operation) = operations.next()
        {
            answers.push(operation(&mut self.state, &mut group));
        }

        if !group.is_empty()
            && let Err(error) = self.write(group)
        {
            self.fail(&error);
            return;
        }

        if let Some(values) = &self.values {
            answers.into_iter().for_each(|answer| answer(values));
        }
    }

    /// Commits the group together with some maintenance: the next part of a snapshot, the deletion of dead rows, and
    /// the compaction of a sparse row.
    fn write(&mut self, mut group: Group) -> Result<()> {
        let Some(values) = &mut self.values else { return Ok(()) };
        self.state.flush_cursors(&mut group);

        // Rows after the last snapshot are needed for the replay, so only older ones are compacted or deleted.
        let newest = values.log.snapshot_since();
        compact(&mut self.state, values, &mut group, newest)?;
        let drop_rows = self.state.take_dead_rows(newest, DROPPED_ROWS_MAX);
        let part = self
            .snapshot
            .take()
            .map(|cursor| self.state.snapshot_part(cursor, PART_BYTES));

        let (row, bytes) = (group.row(), group.into_bytes());
        let last = part.as_ref().is_some_and(|(_, cursor)| *cursor == Cursor::Done);
        values.log.commit(&Commit {
            group: &bytes,
            part: part.as_ref().map(|(data, _)| Part { data, last }),
            drop_rows: &drop_rows,
        })?;

        let size = bytes.len() as u64;
        self.state.row_added(row, size);
        values.committed(bytes);

        self.since_snapshot += size;
        if let Some((data, cursor)) = part {
            self.snapshot_bytes += data.len() as u64;
            match cursor {
                Cursor::Done => self.last_snapshot_bytes = self.snapshot_bytes,
                unfinished => self.snapshot = Some(unfinished),
            }
        } else if self.since_snapshot > SNAPSHOT_BYTES_MIN.max(2 * self.last_snapshot_bytes) {
            values.log.begin_snapshot();
            self.snapshot = Some(Cursor::Start);
            (self.snapshot_bytes, self.since_snapshot) = (0, 0);
        }
        Ok(())
    }

    /// Stops serving: the state is now ahead of the log, so no operation may be answered from it.
    fn fail(&mut self, error: &Error) {
        let path = self.path.display();
        tracing::error!(%error, %path, "the bus cannot write and refuses every operation; check the disk");
        *self.shared.failure.lock() = Some(format!("the bus cannot write to {}: {error}", self.path.display()));

        self.values = None;
        self.snapshot = None;
        self.failed = Instant::now();
        self.next_reopen = self.failed + REOPEN_INTERVAL;
    }

    /// Reloads the state from the log on disk, at most once per [`REOPEN_INTERVAL`].
    fn reopen(&mut self) {
        if Instant::now() < self.next_reopen {
            return;
        }
        self.next_reopen = Instant::now() + REOPEN_INTERVAL;

        match load(&self.path, self.durability) {
            Ok((values, mut state)) => {
                state.adopt(&self.state, super::state::millis(self.failed.elapsed()));
                self.state = state;
                self.values = Some(values);
                self.shared.failure.lock().take();
                tracing::warn!(path = %self.path.display(), "the bus reopened its log and accepts operations again");
            }
            Err(error) => tracing::error!(%error, "cannot reopen the bus's log; retrying"),
        }
    }
}

fn load(path: &Path, durability: Durability) -> Result<(Values, State)> {
    let mut log = Log::open(path, durability)?;
    migrate::older_format(&mut log)?;

    let state = std::cell::RefCell::new(State::default());
    log.replay(|part| state.borrow_mut().apply(0, part), |row, group| state.borrow_mut().apply(row, group))?;

    let mut state = state.into_inner();
    let damaged = |what| journal::Error::Damaged { path: path.to_path_buf(), what };
    state.finish_replay(&log.rows()?).map_err(damaged)?;
    Ok((Values::new(log), state))
}

/// Moves the live values of one sparse row to the group, so that the row becomes dead.
fn compact(state: &mut State, values: &Values, group: &mut Group, newest: u64) -> Result<()> {
    let Some(row) = state.row_to_compact(newest, COMPACT_SLACK) else {
        return Ok(());
    };

    let data = values.log.read_row(row)?;
    let moved = super::record::each(row, &data, |kind, place| {
        if let Some(place) = place {
            let start = place.offset as usize;
            state.relocate(group, kind, place, &data[start..start + place.len as usize]);
        }
        Ok(())
    });
    moved.map_err(Error::Storage)
}
