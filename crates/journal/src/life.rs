//! Whether a file is the one that the last process left, with everything that it had acknowledged.
//!
//! A commit is in the kernel's hands, not on the disk: the death of the process loses nothing, the death of the machine
//! may. And a file may be a copy, put back in place of a newer one. So the file notes under which boot of the machine it
//! is written, whether its last user ended in good order, and marks of the file system that a copy cannot carry along.

use rusqlite::{Connection, OptionalExtension};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS life (
    one INTEGER PRIMARY KEY CHECK (one = 1), boot TEXT NOT NULL, marks TEXT NOT NULL, ended INTEGER NOT NULL)";
/// What a person finds in the lock file.
const NOTE: &[u8] = b"locks the database beside it, and tells it from a copy\n";

/// What is known of a file when it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Continuity {
    /// Every write that was ever acknowledged is there.
    Certain,
    /// Some acknowledged writes may be missing: a power cut, an older copy, or nothing is known.
    Doubtful,
}

/// The files whose marks are noted.
#[derive(Debug, Clone)]
pub struct Life {
    database: PathBuf,
    lock: Arc<File>,
}

impl Life {
    pub fn new(database: &Path, lock: Arc<File>) -> Self {
        Self { database: database.into(), lock }
    }

    /// Begins a new life of the file in one transaction with what `begin` writes, on the disk when this returns.
    /// `boot` is the boot of the machine; empty: unknown.
    pub fn begin<T>(
        &self,
        db: &mut Connection,
        boot: &str,
        begin: impl FnOnce(&Connection, Continuity) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        db.execute_batch(SCHEMA)?;
        let continuity = self.continuity(db, boot)?;
        let marks = self.renew_marks().map_err(failed)?;

        // Synced: an orderly end that was noted before must not come back with a power cut, without what follows now.
        db.pragma_update(None, "synchronous", "FULL")?;
        let transaction = db.transaction()?;
        let begun = begin(&transaction, continuity)?;
        transaction.execute("INSERT OR REPLACE INTO life VALUES (1, ?1, ?2, 0)", [boot, &marks])?;
        transaction.commit()?;
        db.pragma_update(None, "synchronous", "NORMAL")?;
        Ok(begun)
    }

    /// Notes an orderly end. Later writes are not covered by it.
    pub fn end(&self, db: &Connection) -> rusqlite::Result<()> {
        // Copies that were made while the file was in use carry the marks of before.
        let marks = self.renew_marks().map_err(failed)?;
        db.execute("UPDATE life SET marks = ?1, ended = 1", [marks])?;
        Ok(())
    }

    fn continuity(&self, db: &Connection, boot: &str) -> rusqlite::Result<Continuity> {
        let noted = db
            .query_row("SELECT boot, marks, ended FROM life", [], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, row.get::<_, bool>(2)?))
            })
            .optional()?;
        let marks = self.marks().map_err(failed)?;
        let certain = noted.is_some_and(|(noted_boot, noted_marks, ended)| {
            let same_boot = !boot.is_empty() && noted_boot == boot;
            noted_marks == marks && (same_boot || ended)
        });
        Ok(if certain { Continuity::Certain } else { Continuity::Doubtful })
    }

    /// Inode and birth of the database, inode and last change of the lock file. Nobody can set the two times: a copy is
    /// born and changed when it is made. Device numbers are left out, since they may differ after a reboot.
    fn marks(&self) -> io::Result<String> {
        let (database, lock) = (std::fs::metadata(&self.database)?, self.lock.metadata()?);
        Ok(format!("{}-{}-{}-{}.{:09}", database.ino(), born(&database), lock.ino(), lock.ctime(), lock.ctime_nsec()))
    }

    fn renew_marks(&self) -> io::Result<String> {
        self.lock.set_len(0)?;
        self.lock.write_all_at(NOTE, 0)?;
        self.marks()
    }
}

/// Nanoseconds since the epoch; 0 on file systems that do not keep it.
fn born(file: &Metadata) -> u128 {
    let born = file.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    born.map_or(0, |at| at.as_nanos())
}

fn failed(error: io::Error) -> rusqlite::Error {
    rusqlite::Error::ToSqlConversionFailure(Box::new(error))
}
