//! An append-only log of groups in one SQLite file, with a snapshot that keeps its replay short.
//!
//! The owner keeps its state in memory and encodes each change as bytes. A *group* holds the changes of one commit: one
//! row, with a checksum, numbered without gaps. A *snapshot* is the encoded state, written in parts, one with each of
//! many commits, while changes continue. It is therefore not the state of one moment: the owner also replays every
//! group since the snapshot *began*. So changes must be absolute ("key k is now v") and idempotent.
//!
//! Values stay in the rows: the owner keeps the [`Place`] of a value, reads the value when needed, and names the rows
//! that it no longer needs.
//!
//! SQLite makes commits atomic, also in a crash. Checksums and the numbering detect rows that were damaged or lost
//! later; [`Log::replay`] then fails.

#[cfg(test)]
mod tests;

use crate::life::{Continuity, Life};
use crate::{Error, Result, lock, packed};
use bytes::Bytes;
use rusqlite::{Connection, MAIN_DB, OpenFlags, OptionalExtension, params};
use std::cell::RefCell;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Page size of a new file in bytes. A commit writes whole pages: with groups of 8 KB, SQLite's default of 4 KiB wrote
/// 4.2 times the bytes of the groups, checkpoints included, and this with [`CHECKPOINT_BYTES`] 2.5 times.
const PAGE_BYTES: u64 = 1024;
/// After this many bytes, the background thread checkpoints the write-ahead log. By then most groups of a busy log are
/// covered by a snapshot and their pages used again, so that they are copied to the database only once.
const CHECKPOINT_BYTES: usize = 32 * 1024 * 1024;
/// If the write-ahead log has more bytes, the writer itself checkpoints it, because the background thread does not catch
/// up under constant load.
const WAL_BYTES_MAX: u64 = 128 * 1024 * 1024;
/// Size to which the file of the write-ahead log shrinks when it is restarted, in bytes.
const WAL_BYTES_KEPT: i64 = 32 * 1024 * 1024;
/// A snapshot is due after this many bytes of groups, or after twice the size of the last snapshot, if that is more.
const SNAPSHOT_BYTES_MIN: u64 = 16 * 1024 * 1024;
/// After a failed write, there must be room for at least this many bytes, so that the next operations do not fail again.
const ROOM_BYTES: u64 = 1024 * 1024;
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS log (id INTEGER PRIMARY KEY, crc INTEGER NOT NULL, data BLOB NOT NULL, size INTEGER);
CREATE TABLE IF NOT EXISTS snapshot (
    generation INTEGER NOT NULL, part INTEGER NOT NULL, crc INTEGER NOT NULL, data BLOB NOT NULL, size INTEGER,
    PRIMARY KEY (generation, part)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
";

/// What an acknowledged commit survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// A crash of the process: the kernel has the commit. A power failure may lose the last commits, but never part of
    /// one.
    #[default]
    Process,
    /// A power failure: the commit waits until it is on disk.
    Power,
}

/// How a log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    pub durability: Durability,
    /// Compresses groups. Reading a value that is not in the owner's memory then reads its whole group.
    pub compress: bool,
}

impl From<Durability> for Options {
    fn from(durability: Durability) -> Self {
        Self { durability, ..Self::default() }
    }
}

/// The place of a value: a range of bytes in one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub row: u64,
    pub offset: u32,
    pub len: u32,
}

/// The contents of one commit, which is atomic.
#[derive(Debug, Default)]
pub struct Commit<'a> {
    /// The group; if it is empty, no row is added.
    pub group: &'a [u8],
    /// The next part of the snapshot in progress.
    pub part: Option<Part<'a>>,
    /// Rows to delete, which the owner no longer needs. None may be newer than [`Log::snapshot_since`].
    pub drop_rows: &'a [u64],
}

#[derive(Debug)]
pub struct Part<'a> {
    pub data: &'a [u8],
    /// Whether this part completes the snapshot, which then replaces the previous one.
    pub last: bool,
}

pub struct Log {
    writer: Connection,
    path: PathBuf,
    page_bytes: u64,
    options: Options,
    /// The compressed group that was read last, for the reads of its other values.
    unpacked: RefCell<Option<(u64, Bytes)>>,
    life: Life,
    last: u64,
    /// Groups up to this one are covered by the complete snapshot.
    snapshot_since: u64,
    generation: u64,
    /// Bytes of the complete snapshot.
    snapshot_bytes: u64,
    /// Bytes of the groups that are not covered by the complete snapshot.
    replay_bytes: u64,
    open_snapshot: Option<OpenSnapshot>,
    wal_bytes: Arc<AtomicU64>,
    /// Bytes written since the background thread was last woken.
    since_checkpoint: usize,
    /// `None` only during the drop of the log.
    checkpointer: Option<Checkpointer>,
    _lock: Arc<File>,
}

/// A snapshot in progress.
#[derive(Clone, Copy)]
struct OpenSnapshot {
    /// The group at which it began.
    since: u64,
    /// [`Log::replay_bytes`] when it began: the bytes that it will cover.
    covers: u64,
    parts: u64,
    bytes: u64,
}

impl Log {
    /// Opens or creates the log. Blocks. Fails with [`Error::InUse`] if another handle or process holds the file.
    pub fn open(path: &Path, options: impl Into<Options>) -> Result<Self> {
        let options = options.into();
        let lock = lock(path)?;
        let failed = |source| Error::Open { path: path.to_path_buf(), source };

        let writer = Connection::open(path).map_err(failed)?;
        prepare(&writer, options.durability).map_err(failed)?;

        let meta = |name: &str| -> rusqlite::Result<u64> {
            let found = writer.query_row("SELECT value FROM meta WHERE name = ?1", [name], |row| row.get(0));
            Ok(found.optional()?.unwrap_or(0))
        };
        let (generation, snapshot_since) =
            (meta("generation").map_err(failed)?, meta("snapshot_since").map_err(failed)?);
        let newest: Option<u64> = writer
            .query_row("SELECT max(id) FROM log", [], |row| row.get(0))
            .map_err(failed)?;
        // The snapshot may cover all groups, and their rows may be deleted.
        let last = newest.unwrap_or(0).max(snapshot_since);

        let bytes = |sql: &str, parameter: u64| -> rusqlite::Result<u64> {
            let sum = writer.query_row(sql, [parameter], |row| row.get::<_, Option<u64>>(0));
            Ok(sum?.unwrap_or(0))
        };
        let snapshot_bytes =
            bytes("SELECT sum(coalesce(size, length(data))) FROM snapshot WHERE generation = ?1", generation);
        let replay_bytes = bytes("SELECT sum(coalesce(size, length(data))) FROM log WHERE id > ?1", snapshot_since);
        let (snapshot_bytes, replay_bytes) = (snapshot_bytes.map_err(failed)?, replay_bytes.map_err(failed)?);

        // An existing file keeps its page size.
        let page_bytes: u64 = writer
            .query_row("PRAGMA page_size", [], |row| row.get(0))
            .map_err(failed)?;
        let wal_bytes = Arc::new(AtomicU64::new(0));
        let checkpointer = checkpointer(path, page_bytes, wal_bytes.clone()).map_err(failed)?;
        Ok(Self {
            writer,
            path: path.to_path_buf(),
            options,
            unpacked: RefCell::default(),
            life: Life::new(path, lock.clone()),
            last,
            snapshot_since,
            generation,
            snapshot_bytes,
            replay_bytes,
            open_snapshot: None,
            page_bytes,
            wal_bytes,
            since_checkpoint: 0,
            checkpointer: Some(checkpointer),
            _lock: lock,
        })
    }

    /// Number of the newest group. The group of the next commit gets this number plus one.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Number of the oldest row; `None` if there is none.
    pub fn oldest(&self) -> Result<Option<u64>> {
        Ok(self.writer.query_row("SELECT min(id) FROM log", [], |row| row.get(0))?)
    }

    /// The group at which the complete snapshot began. Rows up to it may be deleted.
    pub fn snapshot_since(&self) -> u64 {
        self.snapshot_since
    }

    /// Bytes of the groups that a replay reads after the snapshot.
    pub fn replay_bytes(&self) -> u64 {
        self.replay_bytes
    }

    /// Bytes of the complete snapshot.
    pub fn snapshot_bytes(&self) -> u64 {
        self.snapshot_bytes
    }

    /// Whether a snapshot is due, which keeps the replay short.
    pub fn wants_snapshot(&self) -> bool {
        self.open_snapshot.is_none() && self.replay_bytes > self.replay_bytes_max()
    }

    /// Whether a snapshot has been due for so long that earlier ones cannot have been completed.
    pub fn is_overdue(&self) -> bool {
        self.replay_bytes > 2 * self.replay_bytes_max()
    }

    fn replay_bytes_max(&self) -> u64 {
        SNAPSHOT_BYTES_MIN.max(2 * self.snapshot_bytes)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn options(&self) -> Options {
        self.options
    }

    /// The error for contents that cannot be right.
    pub fn damaged(&self, what: String) -> Error {
        Error::Damaged { path: self.path.clone(), what }
    }

    /// Whether the file holds everything that its last user acknowledged. `boot` identifies the boot of the machine (on
    /// Linux `/proc/sys/kernel/random/boot_id`); an empty string means unknown.
    pub fn continuity(&self, boot: &str) -> Result<Continuity> {
        Ok(self.life.continuity(&self.writer, boot)?)
    }

    /// Records that the file is in use. The record, and every commit before it, is on disk when this returns.
    pub fn begin_use(&mut self, boot: &str) -> Result<()> {
        // Synced to disk. Otherwise a power failure could restore the record of an earlier clean shutdown, and the lost
        // writes would go unnoticed.
        self.writer.pragma_update(None, "synchronous", "FULL")?;
        self.life.begin(&self.writer, boot)?;
        self.writer
            .pragma_update(None, "synchronous", synchronous(self.options.durability))?;
        Ok(())
    }

    /// Records a clean shutdown: all commits up to now are complete.
    pub fn end_use(&self) -> Result<()> {
        Ok(self.life.end(&self.writer)?)
    }

    /// The writer's connection, for reading and dropping the tables of an older format.
    pub fn connection(&self) -> &Connection {
        &self.writer
    }

    /// Checks after a failed write that the disk takes writes again, and makes sure that everything in the log is on it.
    ///
    /// The kernel drops what it failed to sync from the pages that it still has to write: later syncs succeed, and the
    /// write-ahead log has a hole on the disk, behind which a power failure loses everything. So its contents are written
    /// to the database, and it begins anew.
    pub fn ensure_writable(&mut self) -> Result<()> {
        let checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)";
        let is_busy: bool = self.writer.query_row(checkpoint, [], |row| row.get(0))?;
        if is_busy {
            let text = format!("another program reads {}; its write-ahead log cannot begin anew", self.path.display());
            return Err(Error::Refused(text));
        }

        let occupy = "INSERT OR REPLACE INTO meta VALUES ('room', zeroblob(?1))";
        self.writer.execute(occupy, [ROOM_BYTES])?;
        self.writer.execute("DELETE FROM meta WHERE name = 'room'", [])?;
        Ok(())
    }

    /// Deletes all groups and snapshots.
    pub fn clear(&mut self) -> Result<()> {
        self.writer
            .execute_batch("BEGIN; DELETE FROM log; DELETE FROM snapshot; DELETE FROM meta; COMMIT")?;
        (self.last, self.snapshot_since, self.generation, self.open_snapshot) = (0, 0, 0, None);
        (self.snapshot_bytes, self.replay_bytes) = (0, 0);
        // The numbers of rows begin again.
        self.unpacked.take();
        Ok(())
    }

    /// Reads a whole row.
    pub fn read_row(&self, row: u64) -> Result<Bytes> {
        let mut select = self.writer.prepare_cached("SELECT data, size FROM log WHERE id = ?1")?;
        let mut rows = select.query([row])?;
        let found = rows.next()?.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
        let data = found
            .get_ref(0)?
            .as_blob()
            .map_err(|error| self.damaged(format!("group {row}: {error}")))?;
        let group = packed::unpack(data, found.get(1)?);
        let group = group.map_err(|what| self.damaged(format!("group {row} {what}")))?;
        Ok(group.into_owned().into())
    }

    /// Passes the parts of the snapshot to `part`, then every group since it began to `group`, oldest first. Fails if a
    /// part or a group is missing or damaged.
    pub fn replay(
        &self,
        mut part: impl FnMut(&[u8]) -> std::result::Result<(), String>,
        mut group: impl FnMut(u64, &[u8]) -> std::result::Result<(), String>,
    ) -> Result<()> {
        let damaged = |what: String| self.damaged(what);

        let mut parts = self
            .writer
            .prepare("SELECT part, crc, data, size FROM snapshot WHERE generation = ?1 ORDER BY part")?;
        let mut rows = parts.query([self.generation])?;
        let mut expected = 1;
        while let Some(row) = rows.next()? {
            let (number, crc): (u64, u32) = (row.get(0)?, row.get(1)?);
            let data = row.get_ref(2)?.as_blob().map_err(|error| damaged(error.to_string()))?;
            if number != expected || crc != crc32fast::hash(data) {
                return Err(damaged(format!("part {number} of the snapshot is damaged or out of order")));
            }
            let data = packed::unpack(data, row.get(3)?);
            let data = data.map_err(|what| damaged(format!("part {number} of the snapshot {what}")))?;
            part(&data).map_err(damaged)?;
            expected += 1;
        }
        if self.generation > 0 && expected == 1 {
            return Err(damaged("the snapshot is missing".into()));
        }

        let mut groups = self
            .writer
            .prepare("SELECT id, crc, data, size FROM log WHERE id > ?1 ORDER BY id")?;
        let mut rows = groups.query([self.snapshot_since])?;
        let mut expected = self.snapshot_since + 1;
        while let Some(row) = rows.next()? {
            let (id, crc): (u64, u32) = (row.get(0)?, row.get(1)?);
            let data = row.get_ref(2)?.as_blob().map_err(|error| damaged(error.to_string()))?;
            if id != expected {
                return Err(damaged(format!("groups {expected} to {} are missing", id - 1)));
            }
            if crc != crc32fast::hash(data) {
                return Err(damaged(format!("group {id} does not match its checksum")));
            }
            let data = packed::unpack(data, row.get(3)?).map_err(|what| damaged(format!("group {id} {what}")))?;
            group(id, &data).map_err(damaged)?;
            expected += 1;
        }
        Ok(())
    }

    /// Returns every row with the size of its group in bytes.
    pub fn rows(&self) -> Result<Vec<(u64, u64)>> {
        let mut rows = self
            .writer
            .prepare("SELECT id, coalesce(size, length(data)) FROM log ORDER BY id")?;
        let rows = rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// Begins a snapshot: groups committed from now on are replayed after it. Abandons a snapshot in progress.
    pub fn begin_snapshot(&mut self) {
        self.open_snapshot = Some(OpenSnapshot { since: self.last, covers: self.replay_bytes, parts: 0, bytes: 0 });
    }

    /// Commits everything or nothing. After an error the file is unchanged, but the caller's state may be ahead of it,
    /// so the caller must reopen the log.
    pub fn commit(&mut self, commit: &Commit<'_>) -> Result<()> {
        let written = self.write(commit);
        if written.is_err() && !self.writer.is_autocommit() {
            // A failed rollback needs no handling: the transaction ends at the latest when the connection is closed.
            let _ = self.writer.execute_batch("ROLLBACK");
        }
        let written = written?;

        if !commit.group.is_empty() {
            self.last += 1;
            self.replay_bytes += commit.group.len() as u64;
        }

        if let (Some(part), Some(open)) = (&commit.part, &mut self.open_snapshot) {
            open.parts += 1;
            open.bytes += part.data.len() as u64;
            if part.last {
                self.snapshot_since = open.since;
                self.snapshot_bytes = open.bytes;
                self.replay_bytes -= open.covers;
                self.generation += 1;
                self.open_snapshot = None;
            }
        }

        self.keep_wal_short(written);
        Ok(())
    }

    /// Returns the bytes of data that were written.
    fn write(&mut self, commit: &Commit<'_>) -> Result<usize> {
        let db = &self.writer;
        let mut written = 0;
        db.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        if !commit.group.is_empty() {
            let (data, size) = packed::pack(commit.group, self.options.compress);
            db.prepare_cached("INSERT INTO log VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![self.last + 1, crc32fast::hash(&data), data, size])?;
            written += data.len();
        }

        if let (Some(part), Some(OpenSnapshot { since, parts, .. })) = (&commit.part, self.open_snapshot) {
            let generation = self.generation + 1;
            if parts == 0 {
                // Removes the parts of a snapshot that was not completed.
                db.execute("DELETE FROM snapshot WHERE generation >= ?1", [generation])?;
            }
            let (data, size) = packed::pack(part.data, self.options.compress);
            db.prepare_cached("INSERT INTO snapshot VALUES (?1, ?2, ?3, ?4, ?5)")?
                .execute(params![generation, parts + 1, crc32fast::hash(&data), data, size])?;
            written += data.len();
            if part.last {
                db.execute("INSERT OR REPLACE INTO meta VALUES ('generation', ?1)", [generation])?;
                db.execute("INSERT OR REPLACE INTO meta VALUES ('snapshot_since', ?1)", [since])?;
                db.execute("DELETE FROM snapshot WHERE generation < ?1", [generation])?;
            }
        }

        for row in commit.drop_rows {
            debug_assert!(*row <= self.snapshot_since, "the replay needs this row");
            db.prepare_cached("DELETE FROM log WHERE id = ?1")?.execute([row])?;
        }
        db.prepare_cached("COMMIT")?.execute([])?;
        Ok(written)
    }

    /// Reads the value at a place.
    pub fn read(&self, place: Place) -> Result<Bytes> {
        if self.options.compress {
            let group = self.read_packed(place.row)?;
            let range = place.offset as usize..place.offset as usize + place.len as usize;
            if range.end > group.len() {
                let what = format!("group {} has {} bytes, and a value at {range:?}", place.row, group.len());
                return Err(self.damaged(what));
            }
            return Ok(group.slice(range));
        }
        // Reads only the pages that hold it.
        let mut value = vec![0; place.len as usize];
        let row = i64::try_from(place.row).expect("rows are counted from 1");
        let blob = self.writer.blob_open(MAIN_DB, "log", "data", row, true)?;
        blob.read_at_exact(&mut value, place.offset as usize)?;
        Ok(value.into())
    }

    /// A whole row; the one that was read last is kept, because values are often read in order.
    fn read_packed(&self, row: u64) -> Result<Bytes> {
        let mut unpacked = self.unpacked.borrow_mut();
        match &*unpacked {
            Some((known, group)) if *known == row => Ok(group.clone()),
            _ => {
                let group = self.read_row(row)?;
                *unpacked = Some((row, group.clone()));
                Ok(group)
            }
        }
    }

    /// If the file has more than `keep` free bytes, returns up to `bytes` of them to the file system.
    pub fn give_back(&self, keep: u64, bytes: u64) -> Result<()> {
        let free: u64 = self.writer.query_row("PRAGMA freelist_count", [], |row| row.get(0))?;
        if free > keep / self.page_bytes {
            let pages = bytes / self.page_bytes;
            self.writer
                .execute_batch(&format!("PRAGMA incremental_vacuum({pages})"))?;
        }
        Ok(())
    }

    /// Wakes the background thread to checkpoint the write-ahead log. If that thread cannot keep up, checkpoints here,
    /// which blocks the writer.
    fn keep_wal_short(&mut self, written: usize) {
        self.since_checkpoint += written;
        if self.wal_bytes.load(Relaxed) > WAL_BYTES_MAX {
            let restarted = self
                .writer
                .query_row("PRAGMA wal_checkpoint(RESTART)", [], |row| row.get::<_, i64>(0));
            if let Err(error) = restarted {
                let path = self.path.display();
                tracing::warn!(%error, %path, "cannot restart the write-ahead log; retrying later");
            }
            self.wal_bytes.store(0, Relaxed);
        } else if self.since_checkpoint > CHECKPOINT_BYTES
            && let Some((wake, _)) = &self.checkpointer
        {
            self.since_checkpoint = 0;
            // A full channel means that the thread is already woken.
            let _ = wake.try_send(());
        }
    }
}

/// Sets up the writer's connection, and creates the tables or adds what they lack.
fn prepare(writer: &Connection, durability: Durability) -> rusqlite::Result<()> {
    writer.pragma_update(None, "page_size", PAGE_BYTES)?;
    writer.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    writer.pragma_update(None, "journal_mode", "WAL")?;
    writer.pragma_update(None, "synchronous", synchronous(durability))?;
    // The background thread checkpoints, so that commits do not wait for it.
    writer.pragma_update(None, "wal_autocheckpoint", 0)?;
    writer.pragma_update(None, "journal_size_limit", WAL_BYTES_KEPT)?;

    writer.busy_timeout(BUSY_TIMEOUT)?;
    writer.execute_batch(SCHEMA)?;
    for table in ["log", "snapshot"] {
        packed::add_column(writer, table)?;
    }
    Ok(())
}

/// The level of `PRAGMA synchronous`: in WAL mode, FULL syncs each commit and NORMAL only checkpoints.
fn synchronous(durability: Durability) -> &'static str {
    match durability {
        Durability::Process => "NORMAL",
        Durability::Power => "FULL",
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if let Some((wake, thread)) = self.checkpointer.take() {
            drop(wake);
            // The thread only checkpoints, so a panic there loses no data.
            let _ = thread.join();
        }
    }
}

type Checkpointer = (mpsc::SyncSender<()>, JoinHandle<()>);

/// Starts the thread that checkpoints when woken, over its own connection and without blocking the writer.
fn checkpointer(path: &Path, page_bytes: u64, wal_bytes: Arc<AtomicU64>) -> rusqlite::Result<Checkpointer> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    let (wake, woken) = mpsc::sync_channel(1);

    let run = move || {
        while woken.recv().is_ok() {
            match connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| row.get::<_, i64>(1)) {
                Ok(pages) => wal_bytes.store(u64::try_from(pages).unwrap_or(0) * page_bytes, Relaxed),
                Err(error) => tracing::warn!(%error, "cannot checkpoint the write-ahead log; retrying later"),
            }
        }
    };

    let name = format!("{}-checkpoint", path.file_stem().unwrap_or_default().to_string_lossy());
    let thread = std::thread::Builder::new().name(name).spawn(run);
    Ok((wake, thread.map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))?))
}
