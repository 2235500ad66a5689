//! One SQLite file behind one writer thread with group commit: acknowledged writes survive `kill -9`.
//!
//! Writes that arrive while a commit runs share the next one, so throughput rises with the load. WAL mode with
//! `synchronous=NORMAL` keeps every commit when the process dies; a power failure may lose the last ones.

mod life;
mod log;

pub use life::Continuity;
pub use log::{Commit, Durability, Log, Part, Place};
pub use rusqlite;

use life::Life;
use rusqlite::{Connection, OpenFlags};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Maximum writes in one commit.
const BATCH_MAX: usize = 512;
/// Maximum writes queued; beyond it, callers wait.
const QUEUE_MAX: usize = 4096;
/// Size to which the write-ahead log shrinks after a burst, in bytes.
const LOG_BYTES_KEPT: i64 = 64 * 1024 * 1024;
/// Maximum reads queued; beyond it, callers wait.
const READ_QUEUE_MAX: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open {path}: {source}", path = path.display())]
    Open { path: PathBuf, source: rusqlite::Error },
    #[error("{path} is in use by another process; stop it or use another data directory", path = .0.display())]
    InUse(PathBuf),
    #[error(
        "{path} is damaged: {what}; restore it from a backup, or move it away to start empty \
         (its contents are then lost)",
        path = path.display()
    )]
    Damaged { path: PathBuf, what: String },
    #[error("{0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error("the journal is closed")]
    Closed,
}

pub type Result<T> = std::result::Result<T, Error>;

/// Runs inside the batch's transaction. The returned [`Answer`] is called only after the commit.
type Write = Box<dyn FnOnce(&Connection) -> Answer + Send>;
/// Reports the outcome of a write to its caller: the write's own error, or else the outcome of the commit.
type Answer = Box<dyn FnOnce(std::result::Result<(), rusqlite::Error>) + Send>;
type Read = Box<dyn FnOnce(&Connection) + Send>;

/// A cheap handle. The writer and reader threads end when the last handle is dropped.
#[derive(Clone)]
pub struct Journal {
    writes: mpsc::Sender<Write>,
    reads: mpsc::Sender<Read>,
    /// Set by the writer thread itself, so that no write can follow the record of the clean shutdown.
    closed: Arc<AtomicBool>,
    life: Option<Life>,
    _lock: Arc<File>,
}

impl Journal {
    /// Opens or creates the file, runs `schema` (idempotent statements) on it and starts the two threads. Blocks.
    ///
    /// [`Error::InUse`] means that another handle or process holds the lock file next to it.
    pub fn open(path: &Path, schema: &str) -> Result<Self> {
        let lock = lock(path)?;
        let writer = connect(path, schema)?;
        Self::start(path, lock, writer, None)
    }

    /// Like [`Journal::open`], for data whose users must know whether acknowledged writes may be missing. `begin`
    /// receives that answer and runs its own writes before any other. `boot` identifies the boot of the machine (on
    /// Linux `/proc/sys/kernel/random/boot_id`); an empty string means unknown.
    pub fn resume<T>(
        path: &Path,
        schema: &str,
        boot: &str,
        begin: impl FnOnce(&Connection, Continuity) -> rusqlite::Result<T>,
    ) -> Result<(Self, T)> {
        let lock = lock(path)?;
        let mut writer = connect(path, schema)?;

        let life = Life::new(path, lock.clone());
        let begun = life.begin(&mut writer, boot, begin);
        let begun = begun.map_err(|source| Error::Open { path: path.to_path_buf(), source })?;
        Ok((Self::start(path, lock, writer, Some(life))?, begun))
    }

    /// Opens the reader and starts the two threads.
    fn start(path: &Path, lock: Arc<File>, writer: Connection, life: Option<Life>) -> Result<Self> {
        // Only the reader thread uses this connection, so it needs no mutex.
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let failed = |source| Error::Open { path: path.to_path_buf(), source };
        let reader = Connection::open_with_flags(path, flags).map_err(failed)?;
        reader.busy_timeout(Duration::from_secs(5)).map_err(failed)?;

        let (writes, write_queue) = mpsc::channel(QUEUE_MAX);
        let (reads, read_queue) = mpsc::channel(READ_QUEUE_MAX);
        let name = path.file_stem().unwrap_or_default().to_string_lossy().to_string();
        let spawn = |name: String, run: Box<dyn FnOnce() + Send>| std::thread::Builder::new().name(name).spawn(run);
        let spawned = spawn(format!("{name}-write"), Box::new(move || write_loop(writer, write_queue)))
            .and_then(|_| spawn(format!("{name}-read"), Box::new(move || read_loop(&reader, read_queue))));
        spawned.map_err(|error| open_error(path, error))?;
        Ok(Self { writes, reads, closed: Arc::default(), life, _lock: lock })
    }

    /// Refuses further writes. A file that was opened with [`Journal::resume`] also records a clean shutdown.
    pub async fn close(&self) -> Result<()> {
        let (closed, life) = (self.closed.clone(), self.life.clone());
        self.write(move |db| {
            closed.store(true, SeqCst);
            life.map_or(Ok(()), |life| life.end(db))
        })
        .await
    }

    /// Runs `write` in the next batch and returns its result once the batch is committed. A failing write rolls back
    /// only itself. Dropping the future does not cancel a write that is already queued.
    pub async fn write<T, F>(&self, write: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let closed = self.closed.clone();
        let write: Write = Box::new(move |connection| {
            let outcome = match closed.load(SeqCst) {
                true => Err(not_stored("the journal is closed")),
                false => in_savepoint(connection, write),
            };
            Box::new(move |committed| {
                // Fails only if the caller has stopped waiting.
                let _ = answer.send(outcome.and_then(|value| committed.map(|()| value)));
            })
        });

        self.writes.send(write).await.map_err(|_| Error::Closed)?;
        Ok(answered.await.map_err(|_| Error::Closed)??)
    }

    /// Runs `read` on a read-only connection that sees everything committed so far.
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

/// Locks the file beside the database, which only one journal can hold. The lock ends with the process.
fn lock(path: &Path) -> Result<Arc<File>> {
    let lock = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path.with_extension("lock"));
    let lock = lock.map_err(|error| open_error(path, error))?;
    match lock.try_lock() {
        Ok(()) => Ok(Arc::new(lock)),
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::InUse(path.to_path_buf())),
        Err(std::fs::TryLockError::Error(error)) => Err(open_error(path, error)),
    }
}

/// Opens the writer's connection and runs `schema` on it.
fn connect(path: &Path, schema: &str) -> Result<Connection> {
    let failed = |source| Error::Open { path: path.to_path_buf(), source };
    let writer = Connection::open(path).map_err(failed)?;
    // Lets `PRAGMA incremental_vacuum` return free pages to the file system. It takes effect only in a new file.
    writer
        .pragma_update(None, "auto_vacuum", "INCREMENTAL")
        .map_err(failed)?;
    writer.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
    writer.pragma_update(None, "synchronous", "NORMAL").map_err(failed)?;
    writer
        .pragma_update(None, "journal_size_limit", LOG_BYTES_KEPT)
        .map_err(failed)?;
    writer.busy_timeout(Duration::from_secs(5)).map_err(failed)?;
    writer.set_prepared_statement_cache_capacity(64);
    writer.execute_batch(schema).map_err(failed)?;
    Ok(writer)
}

fn open_error(path: &Path, error: std::io::Error) -> Error {
    Error::Open {
        path: path.with_extension("lock"),
        source: rusqlite::Error::ToSqlConversionFailure(Box::new(error)),
    }
}

/// Runs one write of the batch in a savepoint, so that a failing write does not fail the others.
///
/// Some errors, such as a full disk, make SQLite roll back the whole transaction. The remaining writes of the batch are
/// then refused, because outside a transaction each would commit by itself.
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

/// Commits queued writes in batches until all handles are dropped.
fn write_loop(connection: Connection, mut queue: mpsc::Receiver<Write>) {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    while queue.blocking_recv_many(&mut batch, BATCH_MAX) > 0 {
        if let Err(error) = connection.execute_batch("BEGIN IMMEDIATE") {
            tracing::error!(%error, "cannot begin a journal transaction; refusing the writes of this batch");
        }

        // Without a transaction, `in_savepoint` refuses every write.
        let answers: Vec<Answer> = batch.drain(..).map(|write| write(&connection)).collect();

        let committed = connection.execute_batch("COMMIT").map_err(|error| error.to_string());
        if let Err(error) = &committed {
            tracing::error!(error, "cannot commit a journal transaction; refusing the writes of this batch");
        }
        // A failed commit can leave the transaction open, and the next batch could not begin.
        if !connection.is_autocommit()
            && let Err(error) = connection.execute_batch("ROLLBACK")
        {
            tracing::error!(%error, "cannot roll back a journal transaction");
        }

        for answer in answers {
            answer(committed.clone().map_err(|error| not_stored(&error)));
        }
    }
}

/// Runs queued reads one at a time until all handles are dropped.
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
    async fn acknowledged_writes_survive_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j.db");
        let journal = Journal::open(&path, SCHEMA).unwrap();

        let writes = (0..100).map(|n| {
            let journal = journal.clone();
            tokio::spawn(async move {
                journal
                    .write(move |c| c.execute("INSERT INTO t VALUES (?1)", [n]))
                    .await
            })
        });
        for write in writes.collect::<Vec<_>>() {
            write.await.unwrap().unwrap();
        }
        assert!(matches!(Journal::open(&path, SCHEMA), Err(Error::InUse(_))));
        drop(journal);

        // Dropping the last handle has released the lock, as the end of a process would.
        let journal = Journal::open(&path, SCHEMA).unwrap();
        let count: i64 = journal
            .read(|c| c.query_row("SELECT count(*) FROM t", [], |row| row.get(0)))
            .await
            .unwrap();
        assert_eq!(count, 100);
    }

    /// Resumes the file as soon as its last user has released it.
    async fn resumed(path: &Path, boot: &str) -> (Journal, Continuity) {
        let end = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            match Journal::resume(path, SCHEMA, boot, |_, continuity| Ok(continuity)) {
                Err(Error::InUse(_)) if std::time::Instant::now() < end => tokio::task::yield_now().await,
                resumed => return resumed.unwrap(),
            }
        }
    }

    #[tokio::test]
    async fn continuity_is_certain_only_after_a_kill_or_a_clean_shutdown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j.db");
        let check = async |boot: &str, expected: Continuity, end_in_order: bool, what: &str| {
            let (journal, continuity) = resumed(&path, boot).await;
            assert_eq!(continuity, expected, "{what}");
            if end_in_order {
                journal.close().await.unwrap();
                let late = journal.write(|db| db.execute("INSERT INTO t VALUES (1)", [])).await;
                assert!(late.is_err(), "no write is acknowledged after the record of the shutdown");
            }
        };

        check("a", Continuity::Doubtful, false, "a new file has no record").await;
        check("a", Continuity::Certain, false, "only the process was killed").await;
        check("b", Continuity::Doubtful, false, "the machine crashed while the process ran").await;
        check("b", Continuity::Certain, true, "the process was killed again").await;
        check("c", Continuity::Certain, false, "the machine restarted after a clean shutdown").await;
        check("d", Continuity::Doubtful, false, "a clean shutdown counts only once").await;
        check("", Continuity::Doubtful, false, "the boot is unknown").await;
        check("", Continuity::Doubtful, false, "two unknown boots do not match").await;
    }

    /// Drops the handle and waits until its threads have closed their files.
    async fn released(journal: Journal, path: &Path) {
        drop(journal);
        let open = || {
            let files = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            files
                .filter_map(|file| std::fs::read_link(file.path()).ok())
                .any(|file| file == path)
        };
        let end = std::time::Instant::now() + Duration::from_secs(10);
        while open() {
            assert!(std::time::Instant::now() < end, "the journal's threads did not end");
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn restored_copy_is_doubtful() {
        let dir = tempfile::tempdir().unwrap();
        let (path, copy) = (dir.path().join("j.db"), dir.path().join("copy"));
        for (in_place, copied_in_use) in [(false, false), (true, false), (false, true), (true, true)] {
            let (journal, _) = resumed(&path, "a").await;
            journal
                .write(|db| db.execute("INSERT INTO t DEFAULT VALUES", []))
                .await
                .unwrap();
            if copied_in_use {
                let to = copy.clone();
                journal
                    .read(move |db| db.execute("VACUUM INTO ?1", [to.to_str()]))
                    .await
                    .unwrap();
            }
            journal.close().await.unwrap();
            released(journal, &path).await;
            if !copied_in_use {
                std::fs::copy(&path, &copy).unwrap();
            }

            // A later use of the original makes the copy old.
            let (journal, continuity) = resumed(&path, "a").await;
            assert_eq!(continuity, Continuity::Certain);
            journal.close().await.unwrap();
            released(journal, &path).await;

            if !in_place {
                std::fs::remove_file(&path).unwrap();
            }
            std::fs::copy(&copy, &path).unwrap();
            std::fs::remove_file(&copy).unwrap();
            for log in ["j.db-wal", "j.db-shm"] {
                let _ = std::fs::remove_file(dir.path().join(log));
            }

            let (journal, continuity) = resumed(&path, "a").await;
            released(journal, &path).await;
            assert_eq!(continuity, Continuity::Doubtful, "in place {in_place}, copied in use {copied_in_use}");
        }
    }

    #[tokio::test]
    async fn failing_write_rolls_back_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("j.db"), SCHEMA).unwrap();
        let insert = |n: i64, twice: bool| {
            let journal = journal.clone();
            tokio::spawn(async move {
                journal
                    .write(move |c| {
                        c.execute("INSERT INTO t VALUES (?1)", [n])?;
                        if twice {
                            c.execute("INSERT INTO t VALUES (?1)", [n])
                        } else {
                            Ok(1)
                        }
                    })
                    .await
            })
        };

        let (good, bad, other) = (insert(1, false), insert(2, true), insert(3, false));
        good.await.unwrap().unwrap();
        assert!(matches!(bad.await.unwrap(), Err(Error::Sqlite(_))));
        other.await.unwrap().unwrap();

        let sum: i64 = journal
            .read(|c| c.query_row("SELECT sum(n) FROM t", [], |row| row.get(0)))
            .await
            .unwrap();
        assert_eq!(sum, 4);
    }

    #[tokio::test]
    async fn full_disk_never_acknowledges_unstored_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j.db");
        // With a small page cache, a write of the batch hits the page limit rather than its commit.
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
        // Alone in its batch, so that something fits: a batch is refused whole, and all others may hold a large row.
        let (first, stored) = insert(1000, 10).await.unwrap();
        stored.unwrap();
        acknowledged.push(first);
        for round in 0..20 {
            let writes: Vec<_> = (0..50)
                .map(|n| insert(round * 50 + n, if n % 7 == 3 { 60_000 } else { 10 }))
                .collect();
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
            .read(|c| {
                c.prepare("SELECT n FROM t ORDER BY n")?
                    .query_map([], |row| row.get(0))?
                    .collect()
            })
            .await
            .unwrap();
        acknowledged.sort_unstable();
        assert!(!acknowledged.is_empty());
        assert_eq!(stored, acknowledged, "acknowledged writes are stored and refused ones are not");
    }
}
