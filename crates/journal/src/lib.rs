//! One SQLite file behind one writer thread with group commit: what was acknowledged survives `kill -9`.
//!
//! Writes that wait while a commit runs share the next one, so the rate rises with the load. WAL with
//! `synchronous=NORMAL` keeps every commit through the death of the process (a power cut may cost the last ones).

pub use rusqlite;

use rusqlite::{Connection, OpenFlags};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Writes that share one commit at most.
const BATCH_MAX: usize = 512;
/// Writes that wait at most; more make their callers wait.
const QUEUE_MAX: usize = 4096;
/// The write-ahead log shrinks to this after a burst.
const LOG_BYTES_KEPT: i64 = 64 * 1024 * 1024;
/// Reads that wait at most.
const READ_QUEUE_MAX: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open {path}: {source}", path = path.display())]
    Open { path: PathBuf, source: rusqlite::Error },
    #[error("{path} is in use by another process; stop it or use another data directory", path = .0.display())]
    InUse(PathBuf),
    #[error("{0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error("the journal is closed")]
    Closed,
}

pub type Result<T> = std::result::Result<T, Error>;

/// Runs inside the batch's transaction; its answer leaves only after the commit.
type Write = Box<dyn FnOnce(&Connection) -> Answer + Send>;
/// Tells the caller how its write ended: with its own error, else with the commit's.
type Answer = Box<dyn FnOnce(std::result::Result<(), rusqlite::Error>) + Send>;
type Read = Box<dyn FnOnce(&Connection) + Send>;

/// A cheap handle; the threads end when the last one is dropped.
#[derive(Clone)]
pub struct Journal {
    writes: mpsc::Sender<Write>,
    reads: mpsc::Sender<Read>,
    _lock: Arc<std::fs::File>,
}

impl Journal {
    /// Opens or creates the file and runs `schema` (idempotent statements) on it. Blocks for the time that takes.
    pub fn open(path: &Path, schema: &str) -> Result<Self> {
        let lock_path = path.with_extension("lock");
        let open_error = |e: std::io::Error| Error::Open {
            path: lock_path.clone(),
            source: rusqlite::Error::ToSqlConversionFailure(Box::new(e)),
        };
        let lock = std::fs::File::options().write(true).create(true).truncate(false).open(&lock_path);
        let lock = lock.map_err(open_error)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(Error::InUse(path.to_path_buf())),
            Err(std::fs::TryLockError::Error(e)) => return Err(open_error(e)),
        }
        let failed = |source| Error::Open { path: path.to_path_buf(), source };
        let writer = Connection::open(path).map_err(failed)?;
        // Of a new file: what is deleted can be given back to the disk, by `PRAGMA incremental_vacuum`.
        writer.pragma_update(None, "auto_vacuum", "INCREMENTAL").map_err(failed)?;
        writer.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
        writer.pragma_update(None, "synchronous", "NORMAL").map_err(failed)?;
        writer.pragma_update(None, "journal_size_limit", LOG_BYTES_KEPT).map_err(failed)?;
        writer.busy_timeout(Duration::from_secs(5)).map_err(failed)?;
        writer.set_prepared_statement_cache_capacity(64);
        writer.execute_batch(schema).map_err(failed)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let reader = Connection::open_with_flags(path, flags).map_err(failed)?;
        reader.busy_timeout(Duration::from_secs(5)).map_err(failed)?;

        let (writes, write_queue) = mpsc::channel(QUEUE_MAX);
        let (reads, read_queue) = mpsc::channel(READ_QUEUE_MAX);
        let name = path.file_stem().unwrap_or_default().to_string_lossy().to_string();
        let spawn = |name: String, run: Box<dyn FnOnce() + Send>| std::thread::Builder::new().name(name).spawn(run);
        let spawned = spawn(format!("{name}-write"), Box::new(move || write_loop(writer, write_queue)))
            .and_then(|_| spawn(format!("{name}-read"), Box::new(move || read_loop(&reader, read_queue))));
        spawned.map_err(open_error)?;
        Ok(Self { writes, reads, _lock: Arc::new(lock) })
    }

    /// Runs `write` in the next batch and returns its result once the batch is committed. A failing write undoes only
    /// itself. Dropping the future does not undo a write that was queued.
    pub async fn write<T, F>(&self, write: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let write: Write = Box::new(move |connection| {
            let outcome = in_savepoint(connection, write);
            Box::new(move |committed| {
                // The caller may have gone: nobody to tell then.
                let _ = answer.send(outcome.and_then(|value| committed.map(|()| value)));
            })
        });
        self.writes.send(write).await.map_err(|_| Error::Closed)?;
        Ok(answered.await.map_err(|_| Error::Closed)??)
    }

    /// Runs `read` on a read-only connection that sees all that is committed.
    pub async fn read<T, F>(&self, read: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let read: Read = Box::new(move |connection| {
            let _ = answer.send(read(connection));
        });
        self.reads.send(read).await.map_err(|_| Error::Closed)?;
        Ok(answered.await.map_err(|_| Error::Closed)??)
    }
}

/// A failing write rolls back to where it began; the batch goes on. But a full disk ends the whole transaction: then what
/// follows must not run, for it would be committed by itself.
fn in_savepoint<T>(
    connection: &Connection,
    write: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    if connection.is_autocommit() {
        return Err(not_stored("its transaction did not begin or was rolled back"));
    }
    connection.prepare_cached("SAVEPOINT one_write")?.execute([])?;
    let outcome = write(connection);
    if connection.is_autocommit() {
        return outcome.and_then(|_| Err(not_stored("its transaction was rolled back")));
    }
    if outcome.is_err() {
        connection.prepare_cached("ROLLBACK TO one_write")?.execute([])?;
    }
    connection.prepare_cached("RELEASE one_write")?.execute([])?;
    outcome
}

fn not_stored(why: &str) -> rusqlite::Error {
    rusqlite::Error::ToSqlConversionFailure(format!("not stored: {why}").into())
}

fn write_loop(connection: Connection, mut queue: mpsc::Receiver<Write>) {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    while queue.blocking_recv_many(&mut batch, BATCH_MAX) > 0 {
        if let Err(error) = connection.execute_batch("BEGIN IMMEDIATE") {
            tracing::error!(%error, "the journal cannot begin a transaction; its writes are refused");
        }
        let answers: Vec<Answer> = batch.drain(..).map(|write| write(&connection)).collect();
        let committed = connection.execute_batch("COMMIT").map_err(|error| error.to_string());
        if let Err(error) = &committed {
            tracing::error!(error, "the journal cannot commit; its writes are refused");
        }
        if !connection.is_autocommit()
            && let Err(error) = connection.execute_batch("ROLLBACK")
        {
            tracing::error!(%error, "the journal cannot roll back");
        }
        for answer in answers {
            answer(committed.clone().map_err(|error| not_stored(&error)));
        }
    }
}

fn read_loop(connection: &Connection, mut queue: mpsc::Receiver<Read>) {
    while let Some(read) = queue.blocking_recv() {
        read(connection);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY)";

    #[tokio::test]
    async fn what_was_acknowledged_is_there_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j.db");
        let journal = Journal::open(&path, SCHEMA).unwrap();
        let writes = (0..100).map(|n| {
            let journal = journal.clone();
            tokio::spawn(async move { journal.write(move |c| c.execute("INSERT INTO t VALUES (?1)", [n])).await })
        });
        for write in writes.collect::<Vec<_>>() {
            write.await.unwrap().unwrap();
        }
        assert!(matches!(Journal::open(&path, SCHEMA), Err(Error::InUse(_))));
        drop(journal);
        // A fresh process would find the lock free; here the last handle's drop freed it.
        let journal = Journal::open(&path, SCHEMA).unwrap();
        let count: i64 = journal.read(|c| c.query_row("SELECT count(*) FROM t", [], |row| row.get(0))).await.unwrap();
        assert_eq!(count, 100);
    }

    #[tokio::test]
    async fn a_failing_write_undoes_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("j.db"), SCHEMA).unwrap();
        let insert = |n: i64, again: bool| {
            let journal = journal.clone();
            tokio::spawn(async move {
                journal
                    .write(move |c| {
                        c.execute("INSERT INTO t VALUES (?1)", [n])?;
                        if again { c.execute("INSERT INTO t VALUES (?1)", [n]) } else { Ok(1) }
                    })
                    .await
            })
        };
        let (good, bad, other) = (insert(1, false), insert(2, true), insert(3, false));
        good.await.unwrap().unwrap();
        assert!(matches!(bad.await.unwrap(), Err(Error::Sqlite(_))));
        other.await.unwrap().unwrap();
        let sum: i64 = journal.read(|c| c.query_row("SELECT sum(n) FROM t", [], |row| row.get(0))).await.unwrap();
        assert_eq!(sum, 4);
    }

    #[tokio::test]
    async fn nothing_is_acknowledged_that_a_full_disk_did_not_take() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j.db");
        // Few pages in the cache: the limit is met by a write of the batch, not by its commit.
        let schema = "PRAGMA cache_size = 2; PRAGMA max_page_count = 40;
            CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, filling BLOB)";
        let journal = Journal::open(&path, schema).unwrap();
        let insert = |n: u32, bytes: usize| {
            let journal = journal.clone();
            tokio::spawn(async move {
                let write = move |c: &Connection| c.execute("INSERT INTO t VALUES (?1, zeroblob(?2))", (n, bytes));
                (n, journal.write(write).await)
            })
        };
        let mut acknowledged = Vec::new();
        let mut refusals = Vec::new();
        for round in 0..20 {
            let writes: Vec<_> =
                (0..50).map(|n| insert(round * 50 + n, if n % 7 == 3 { 60_000 } else { 10 })).collect();
            for write in writes {
                match write.await.unwrap() {
                    (n, Ok(_)) => acknowledged.push(n),
                    (_, Err(error)) => refusals.push(error.to_string()),
                }
            }
        }
        assert!(refusals.iter().any(|text| text.contains("full")), "{refusals:?}");
        assert!(!refusals.iter().any(|text| text.contains("savepoint")), "{refusals:?}");
        drop(journal);
        let journal = Journal::open(&path, schema).unwrap();
        let stored: Vec<u32> = journal
            .read(|c| c.prepare("SELECT n FROM t ORDER BY n")?.query_map([], |row| row.get(0))?.collect())
            .await
            .unwrap();
        acknowledged.sort_unstable();
        assert!(!acknowledged.is_empty());
        assert_eq!(stored, acknowledged, "refused writes are not stored, acknowledged ones are");
    }
}
