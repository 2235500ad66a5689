//! The embedded store: a state in memory, and an append-only log in one SQLite file that it is restored from.
//!
//! [`Engine`] is the thread that owns both and commits many operations at once; [`Log`] is the file.

mod engine;
mod life;
mod log;
mod packed;

pub use engine::{Answer, Engine, Operation, State};
pub use life::Continuity;
pub use log::{Commit, Durability, Log, Options, Part, Place};
pub use rusqlite;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open {path}: {source}", path = path.display())]
    Open { path: PathBuf, source: rusqlite::Error },
    #[error(
        "{path} is in use by {}; stop it or use another data directory",
        process(*.holder),
        path = path.display()
    )]
    InUse { path: PathBuf, holder: Option<u32> },
    #[error(
        "{path} is damaged: {what}; restore it from a backup, or move it away to start empty \
         (its contents are then lost)",
        path = path.display()
    )]
    Damaged { path: PathBuf, what: String },
    #[error("{0}")]
    Sqlite(#[from] rusqlite::Error),
    /// An operation was refused; holds why.
    #[error("{0}")]
    Refused(String),
}

pub type Result<T> = std::result::Result<T, Error>;

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
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::InUse { path: path.into(), holder: holder(&lock) }),
        Err(std::fs::TryLockError::Error(error)) => Err(open_error(path, error)),
    }
}

/// The process that holds the lock, as the kernel tells. The lock file itself must not: its marks are part of a
/// database's life.
fn holder(lock: &File) -> Option<u32> {
    let file = lock.metadata().ok()?;
    let is_it = |entry: std::fs::DirEntry| {
        let open = std::fs::metadata(entry.path()).ok();
        open.is_some_and(|open| (open.dev(), open.ino()) == (file.dev(), file.ino()))
    };

    // A line is `1: FLOCK ADVISORY WRITE 4711 fe:01:1234 0 EOF`; inodes are unique within a device only.
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let mut holders = locks.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let inode: u64 = fields.get(5)?.rsplit(':').next()?.parse().ok()?;
        (inode == file.ino()).then(|| fields[4].parse::<u32>().ok())?
    });
    holders.find(|pid| {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd"));
        open.is_ok_and(|mut open| open.any(|entry| entry.is_ok_and(is_it)))
    })
}

/// Names the process that holds a lock, if it could say who it is.
fn process(holder: Option<u32>) -> String {
    holder.map_or("another process".into(), |pid| format!("process {pid}"))
}

fn open_error(path: &Path, error: std::io::Error) -> Error {
    Error::Open {
        path: path.with_extension("lock"),
        source: rusqlite::Error::ToSqlConversionFailure(Box::new(error)),
    }
}
