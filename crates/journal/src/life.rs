//! Detects whether a database file still holds every write that was acknowledged.
//!
//! A commit reaches the kernel but not necessarily the disk: a crash of the process loses nothing, a crash of the
//! machine may. A file may also be an older copy that was restored over a newer one. The file therefore records the
//! boot of the machine, whether its last user closed it, and file system marks that a copy cannot preserve.

use rusqlite::{Connection, OptionalExtension};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS life (
    one INTEGER PRIMARY KEY CHECK (one = 1), boot TEXT NOT NULL, marks TEXT NOT NULL, ended INTEGER NOT NULL)";
/// The content of the lock file, which explains it to people.
const NOTE: &[u8] = b"locks the database beside it, and distinguishes it from a copy\n";

/// Whether a file is complete when it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Continuity {
    /// The file holds every write that was ever acknowledged.
    Certain,
    /// Some acknowledged writes may be missing: after a power failure, in a restored copy, or in a file without a
    /// record.
    Doubtful,
}

/// The database and its lock file, whose marks are recorded.
#[derive(Debug, Clone)]
pub struct Life {
    database: PathBuf,
    lock: Arc<File>,
}

impl Life {
    pub fn new(database: &Path, lock: Arc<File>) -> Self {
        Self { database: database.into(), lock }
    }

    /// Records the start of use. `boot` identifies the boot of the machine; an empty string means unknown.
    pub fn begin(&self, db: &Connection, boot: &str) -> rusqlite::Result<()> {
        db.execute_batch(SCHEMA)?;
        let marks = self.renew_marks().map_err(failed)?;
        db.execute("INSERT OR REPLACE INTO life VALUES (1, ?1, ?2, 0)", [boot, &marks])?;
        Ok(())
    }

    /// Records a clean shutdown: all writes up to now are complete.
    pub fn end(&self, db: &Connection) -> rusqlite::Result<()> {
        // New marks: a copy that was made while the file was in use has the old ones.
        let marks = self.renew_marks().map_err(failed)?;
        db.execute("UPDATE life SET marks = ?1, ended = 1", [marks])?;
        Ok(())
    }

    /// Compares the record in the file with the current boot and marks.
    pub fn continuity(&self, db: &Connection, boot: &str) -> rusqlite::Result<Continuity> {
        db.execute_batch(SCHEMA)?;
        let recorded = db
            .query_row("SELECT boot, marks, ended FROM life", [], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, row.get::<_, bool>(2)?))
            })
            .optional()?;

        let marks = self.marks().map_err(failed)?;
        let certain = recorded.is_some_and(|(recorded_boot, recorded_marks, ended)| {
            let same_boot = !boot.is_empty() && recorded_boot == boot;
            recorded_marks == marks && (same_boot || ended)
        });
        Ok(if certain {
            Continuity::Certain
        } else {
            Continuity::Doubtful
        })
    }

    /// Inode and creation time of the database, inode and change time of the lock file. No program can set these two
    /// times, so a copy gets new ones. Device numbers are left out because they may differ after a reboot.
    fn marks(&self) -> io::Result<String> {
        let (database, lock) = (std::fs::metadata(&self.database)?, self.lock.metadata()?);
        Ok(format!(
            "{}-{}-{}-{}.{:09}",
            database.ino(),
            born(&database),
            lock.ino(),
            lock.ctime(),
            lock.ctime_nsec()
        ))
    }

    /// Rewrites the lock file, which changes its change time, and returns the new marks.
    fn renew_marks(&self) -> io::Result<String> {
        self.lock.set_len(0)?;
        self.lock.write_all_at(NOTE, 0)?;
        self.marks()
    }
}

/// Creation time in nanoseconds since the Unix epoch; 0 on file systems that do not record it.
fn born(file: &Metadata) -> u128 {
    let born = file.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    born.map_or(0, |at| at.as_nanos())
}

fn failed(error: io::Error) -> rusqlite::Error {
    rusqlite::Error::ToSqlConversionFailure(Box::new(error))
}
