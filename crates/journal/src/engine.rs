//! A thread that owns a state in memory and the log that stores it.
//!
//! Operations that arrive while a commit runs share the next one. An operation is answered after its commit. Reads that
//! are operations too therefore never see a write that a crash could still undo.

use crate::{Commit, Error, Log, Part, Result};
use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// Maximum operations queued; beyond it, callers wait.
const QUEUE_MAX: usize = 4096;
/// Maximum operations in one commit.
const BATCH_MAX: usize = 512;
/// A group of at least this size, in bytes, is committed before the next operation runs.
const GROUP_BYTES: usize = 4 * 1024 * 1024;
/// Bytes that one commit adds to a snapshot, in addition to twice those of its group: a snapshot must grow faster than
/// the state that it describes.
const PART_BYTES: usize = 64 * 1024;
/// After a failed commit, the thread tries to reopen the log at most this often.
const REOPEN_INTERVAL: Duration = Duration::from_secs(1);

/// What the thread keeps in memory.
pub trait State: Sized + Send + 'static {
    /// The encoded changes of one commit.
    type Group;
    /// Where the next part of a snapshot begins.
    type Cursor: Send;

    /// Begins the group that will be row `row` of the log.
    fn group(&mut self, row: u64) -> Self::Group;
    /// Size of the group in bytes. An empty group is not committed.
    fn size(group: &Self::Group) -> usize;
    /// Adds the changes that were not recorded yet, before the last commit of this thread.
    fn flush(&mut self, _group: &mut Self::Group) {}
    /// Completes a group that is about to be committed. It may add maintenance of its own.
    fn complete(&mut self, group: Self::Group, log: &Log) -> Result<Bytes>;
    /// Rows up to `newest` that are no longer needed. They are deleted with the next commit.
    fn dead_rows(&mut self, newest: u64) -> Vec<u64>;
    fn committed(&mut self, row: u64, group: Bytes);
    /// The commit failed: the changes of its operations must become invisible now, or be undone in `reopened`.
    fn refused(&mut self) {}
    /// The log was opened again after a failed commit, `outage` ago.
    fn reopened(&mut self, log: &mut Log, outage: Duration) -> Result<()>;

    /// Whether the next operations shall write a snapshot, even if they change nothing. The log itself asks for a
    /// snapshot when its replay grows long.
    fn wants_snapshot(&self) -> bool {
        false
    }
    fn snapshot(&mut self) -> Self::Cursor;
    /// The next part of a snapshot, of about `size` bytes, and where the next one begins; `None` after the last.
    fn snapshot_part(&mut self, cursor: Self::Cursor, size: usize) -> (Bytes, Option<Self::Cursor>);
}

/// Changes the state and records the change in the group. The returned [`Answer`] runs after the commit.
pub type Operation<S> = Box<dyn FnOnce(&mut S, &mut <S as State>::Group) -> Answer<S> + Send>;
/// Runs only if the commit succeeded. Otherwise it is dropped, which closes the caller's channel.
pub type Answer<S> = Box<dyn FnOnce(&S, &Log) + Send>;

/// A handle to the thread, which ends when the handle is dropped.
pub struct Engine<S: State> {
    operations: mpsc::Sender<Operation<S>>,
    /// Why operations are refused; `None` while they are accepted.
    failure: Arc<Mutex<Option<String>>>,
}

impl<S: State> Engine<S> {
    /// Starts the thread. `state` is what the log holds.
    pub fn start(log: Log, state: S) -> Result<Self> {
        let (operations, queue) = mpsc::channel(QUEUE_MAX);
        let failure = Arc::<Mutex<Option<String>>>::default();
        let name = log.path().file_stem().unwrap_or_default().to_string_lossy().to_string();
        let owner = Owner {
            state,
            path: log.path().to_path_buf(),
            last: log.last(),
            options: log.options(),
            log: Some(log),
            snapshot: None,
            failed: Instant::now(),
            next_reopen: Instant::now(),
            failure: failure.clone(),
        };

        let spawned = std::thread::Builder::new().name(name).spawn(move || owner.run(queue));
        spawned.map_err(|error| Error::Refused(format!("cannot start the thread of the journal: {error}")))?;
        Ok(Self { operations, failure })
    }

    /// Runs `operation` in the next commit. After the commit, `read` completes its answer. Dropping the future does not
    /// cancel a queued operation.
    pub async fn run<T: Send + 'static, R: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut S, &mut S::Group) -> T + Send + 'static,
        read: impl FnOnce(T, &S, &Log) -> R + Send + 'static,
    ) -> Result<R> {
        let (answer, answered) = oneshot::channel();
        self.queue(Box::new(move |state, group| {
            let outcome = operation(state, group);
            Box::new(move |state, log| {
                // Fails only if the caller has stopped waiting.
                let _ = answer.send(read(outcome, state, log));
            })
        }))
        .await?;
        answered.await.map_err(|_| self.refusal())
    }

    /// Queues an operation. If it is refused, it or its answer is dropped.
    pub async fn queue(&self, operation: Operation<S>) -> Result<()> {
        self.operations.send(operation).await.map_err(|_| self.refusal())
    }

    /// Why an operation was dropped.
    pub fn refusal(&self) -> Error {
        let failure = self.failure.lock().clone();
        Error::Refused(failure.unwrap_or_else(|| "the thread of the journal has ended; see the log".into()))
    }
}

struct Owner<S: State> {
    state: S,
    path: std::path::PathBuf,
    options: crate::Options,
    /// `None` after a failed commit, until the log is open again.
    log: Option<Log>,
    /// The newest committed row.
    last: u64,
    /// Where the snapshot in progress continues; `None` if there is none.
    snapshot: Option<S::Cursor>,
    /// When the last commit failed.
    failed: Instant,
    next_reopen: Instant,
    failure: Arc<Mutex<Option<String>>>,
}

impl<S: State> Owner<S> {
    fn run(mut self, mut queue: mpsc::Receiver<Operation<S>>) {
        // Processes that never live until the end of a snapshot must not let the replay grow without bound.
        if self.log.as_ref().is_some_and(Log::is_overdue)
            && let Err(error) = self.write_snapshot()
        {
            self.fail(&error);
        }

        let mut batch = Vec::with_capacity(BATCH_MAX);
        while queue.blocking_recv_many(&mut batch, BATCH_MAX) > 0 {
            if self.log.is_none() {
                self.reopen();
            }

            let mut operations = batch.drain(..);
            while operations.len() > 0 {
                self.commit_some(&mut operations);
            }
        }

        self.commit_some(&mut std::iter::once::<Operation<S>>(Box::new(|state, group| {
            state.flush(group);
            Box::new(|_, _| {})
        })));
    }

    /// Runs operations until their group is full, commits the group and sends the answers.
    fn commit_some(&mut self, operations: &mut dyn Iterator<Item = Operation<S>>) {
        if self.log.is_none() {
            // A dropped operation closes its caller's channel; the caller then reads the failure.
            operations.for_each(drop);
            return;
        }

        let mut group = self.state.group(self.last + 1);
        let mut answers = Vec::new();
        while S::size(&group) < GROUP_BYTES
            && let Some(operation) = operations.next()
        {
            answers.push(operation(&mut self.state, &mut group));
        }

        if (S::size(&group) > 0 || self.state.wants_snapshot())
            && let Err(error) = self.write(group)
        {
            self.fail(&error);
            return;
        }

        if let Some(log) = &self.log {
            answers.into_iter().for_each(|answer| answer(&self.state, log));
        }
    }

    /// Commits the group together with some maintenance: the next part of a snapshot and the deletion of dead rows.
    fn write(&mut self, group: S::Group) -> Result<()> {
        let Some(log) = &mut self.log else { return Ok(()) };
        let group = self.state.complete(group, log)?;
        // Rows after the last snapshot are needed for the replay, so only older ones are deleted.
        let drop_rows = self.state.dead_rows(log.snapshot_since());
        if self.snapshot.is_none() && (log.wants_snapshot() || self.state.wants_snapshot()) {
            log.begin_snapshot();
            self.snapshot = Some(self.state.snapshot());
        }
        let size = PART_BYTES + 2 * group.len();
        let part = self
            .snapshot
            .take()
            .map(|cursor| self.state.snapshot_part(cursor, size));

        log.commit(&Commit {
            group: &group,
            part: part.as_ref().map(|(data, next)| Part { data, last: next.is_none() }),
            drop_rows: &drop_rows,
        })?;

        self.last = log.last();
        self.snapshot = part.and_then(|(_, next)| next);
        if !group.is_empty() {
            self.state.committed(self.last, group);
        }
        Ok(())
    }

    /// Writes a whole snapshot.
    fn write_snapshot(&mut self) -> Result<()> {
        loop {
            let nothing = self.state.group(self.last + 1);
            self.write(nothing)?;
            if self.snapshot.is_none() {
                return Ok(());
            }
        }
    }

    /// Stops serving: the state may be ahead of the log, so no operation may be answered from it.
    fn fail(&mut self, error: &Error) {
        let path = self.path.display();
        tracing::error!(%error, %path, "cannot write to the journal; refusing every operation; check the disk");
        self.refuse(error);

        self.log = None;
        self.snapshot = None;
        self.state.refused();
        self.failed = Instant::now();
        self.next_reopen = self.failed + REOPEN_INTERVAL;
    }

    /// Says why operations are refused from now on.
    fn refuse(&self, error: &Error) {
        *self.failure.lock() = Some(format!("cannot write to {}: {error}", self.path.display()));
    }

    /// Opens the log again, at most once per [`REOPEN_INTERVAL`].
    fn reopen(&mut self) {
        if Instant::now() < self.next_reopen {
            return;
        }
        self.next_reopen = Instant::now() + REOPEN_INTERVAL;

        match self.reopened() {
            Ok(log) => {
                self.last = log.last();
                self.log = Some(log);
                self.failure.lock().take();
                tracing::warn!(path = %self.path.display(), "reopened the journal; accepting operations again");
            }
            Err(error) => {
                tracing::error!(%error, "cannot reopen the journal; retrying");
                self.refuse(&error);
            }
        }
    }

    fn reopened(&mut self) -> Result<Log> {
        let mut log = Log::open(&self.path, self.options)?;
        if log.last() < self.last {
            let what = format!("it ends with group {}, but group {} was acknowledged", log.last(), self.last);
            return Err(log.damaged(what));
        }
        log.ensure_writable()?;
        self.state.reopened(&mut log, self.failed.elapsed())?;
        Ok(log)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Durability;
    use std::path::Path;

    /// Slots with a value each. A record is the number of the slot, the length of the value and the value.
    #[derive(Default)]
    struct Slots {
        values: Vec<Vec<u8>>,
        oldest_row: u64,
    }

    impl Slots {
        fn load(log: &Log) -> Result<Self> {
            let slots = std::cell::RefCell::new(Self { values: vec![Vec::new(); 100], oldest_row: 1 });
            let apply = |data: &[u8]| {
                slots.borrow_mut().apply(data);
                Ok(())
            };
            log.replay(apply, |_, group| apply(group))?;
            Ok(Self {
                oldest_row: log.oldest()?.unwrap_or(log.last() + 1),
                ..slots.into_inner()
            })
        }

        fn apply(&mut self, mut data: &[u8]) {
            while let Some((head, rest)) = data.split_at_checked(8) {
                let [slot, len] =
                    [&head[..4], &head[4..]].map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap()) as usize);
                let (value, rest) = rest.split_at(len);
                self.values[slot] = value.to_vec();
                data = rest;
            }
        }

        fn record(group: &mut Vec<u8>, slot: usize, value: &[u8]) {
            group.extend((slot as u32).to_le_bytes());
            group.extend((value.len() as u32).to_le_bytes());
            group.extend(value);
        }
    }

    impl State for Slots {
        type Group = Vec<u8>;
        type Cursor = usize;

        fn group(&mut self, _row: u64) -> Vec<u8> {
            Vec::new()
        }

        fn size(group: &Vec<u8>) -> usize {
            group.len()
        }

        fn complete(&mut self, group: Vec<u8>, _log: &Log) -> Result<Bytes> {
            Ok(group.into())
        }

        fn dead_rows(&mut self, newest: u64) -> Vec<u64> {
            let oldest = self.oldest_row;
            self.oldest_row = oldest.max(newest + 1);
            (oldest..=newest).collect()
        }

        fn committed(&mut self, _row: u64, _group: Bytes) {}

        fn reopened(&mut self, log: &mut Log, _outage: Duration) -> Result<()> {
            *self = Self::load(log)?;
            Ok(())
        }

        fn snapshot(&mut self) -> usize {
            0
        }

        fn snapshot_part(&mut self, mut slot: usize, size: usize) -> (Bytes, Option<usize>) {
            let mut part = Vec::new();
            while part.len() < size && slot < self.values.len() {
                Self::record(&mut part, slot, &self.values[slot]);
                slot += 1;
            }
            (part.into(), (slot < self.values.len()).then_some(slot))
        }
    }

    /// Opens the log as soon as its last user has released it.
    async fn open(path: &Path) -> Engine<Slots> {
        let end = Instant::now() + Duration::from_secs(20);
        let log = loop {
            match Log::open(path, Durability::Process) {
                Err(Error::InUse { .. }) if Instant::now() < end => tokio::task::yield_now().await,
                log => break log.unwrap(),
            }
        };
        let slots = Slots::load(&log).unwrap();
        Engine::start(log, slots).unwrap()
    }

    async fn put(engine: &Engine<Slots>, slot: usize, value: Vec<u8>) -> Result<()> {
        let put = move |slots: &mut Slots, group: &mut Vec<u8>| {
            Slots::record(group, slot, &value);
            slots.values[slot] = value;
        };
        engine.run(put, |(), _, _| ()).await
    }

    async fn values(engine: &Engine<Slots>) -> Vec<Vec<u8>> {
        engine
            .run(|_, _| (), |(), slots, _| slots.values.clone())
            .await
            .unwrap()
    }

    /// The bytes that opening replays are bounded, also if the process never lives until a snapshot is due.
    #[tokio::test]
    async fn replay_stays_short_over_many_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slots.db");
        let mut expected = vec![Vec::new(); 100];
        let mut largest = 0;
        for n in 0..60_u64 {
            let engine = open(&path).await;
            assert!(values(&engine).await == expected, "restart {n}");
            for m in 0..10 {
                let (slot, len) = ((n * 37 + m * 11) as usize % 100, (n * 7919 + m * 104_729) as usize % 300_000);
                expected[slot] = vec![(n + m) as u8; len];
                put(&engine, slot, expected[slot].clone()).await.unwrap();
            }

            let sizes = |(), _: &Slots, log: &Log| (log.replay_bytes(), log.snapshot_bytes());
            let (replay, snapshot) = engine.run(|_, _| (), sizes).await.unwrap();
            // Twice the bytes after which a snapshot is due, and what one process writes.
            let bound = 2 * (16 << 20).max(2 * snapshot) + 3_000_000;
            assert!(replay <= bound, "restart {n}: {replay} bytes after a snapshot of {snapshot}");
            largest = largest.max(snapshot);
        }
        assert!(largest > 0, "no snapshot was completed");
    }

    #[tokio::test]
    async fn log_that_lost_acknowledged_groups_stays_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slots.db");
        let engine = open(&path).await;
        put(&engine, 1, b"one".to_vec()).await.unwrap();
        put(&engine, 1, b"two".to_vec()).await.unwrap();

        let full = |(), _: &Slots, log: &Log| log.connection().execute_batch("PRAGMA max_page_count = 1");
        engine.run(|_, _| (), full).await.unwrap().unwrap();
        let refused = put(&engine, 2, vec![0; 1_000_000]).await.unwrap_err();
        assert!(refused.to_string().contains("full"), "{refused}");

        let thief = rusqlite::Connection::open(&path).unwrap();
        thief.execute("DELETE FROM log WHERE id = 2", []).unwrap();
        // Longer than the pause between two attempts to reopen the log.
        let end = Instant::now() + 2 * REOPEN_INTERVAL;
        while Instant::now() < end {
            assert!(put(&engine, 3, Vec::new()).await.is_err(), "the log lacks what was acknowledged");
            tokio::task::yield_now().await;
        }

        // Once the log is whole again, operations are accepted.
        let group = [&1_u32.to_le_bytes()[..], &3_u32.to_le_bytes(), b"two"].concat();
        let insert = "INSERT INTO log (id, crc, data) VALUES (2, ?1, ?2)";
        thief.execute(insert, (crc32fast::hash(&group), &group)).unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while put(&engine, 4, b"four".to_vec()).await.is_err() {
            assert!(Instant::now() < end, "the log was not reopened");
            tokio::task::yield_now().await;
        }
        let values = values(&engine).await;
        assert_eq!((&values[1][..], &values[2][..], &values[4][..]), (&b"two"[..], &b""[..], &b"four"[..]));
    }
}
