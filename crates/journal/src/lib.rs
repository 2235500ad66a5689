//! The embedded store: a state in memory, and an append-only log in one SQLite file that it is restored from.
//!
//! [`Engine`] is the thread that owns both and commits many operations at once; [`Log`] is the file.

mod engine;
mod life;
mod log;

pub use engine::{Answer, Engine, Operation, State};
pub use life::Continuity;
pub use log::{Commit, Durability, Log, Part, Place};
pub use rusqlite;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::InUse(path.to_path_buf())),
        Err(std::fs::TryLockError::Error(error)) => Err(open_error(path, error)),
    }
}

fn open_error(path: &Path, error: std::io::Error) -> Error {
    Error::Open {
        path: path.with_extension("lock"),
        source: rusqlite::Error::ToSqlConversionFailure(Box::new(error)),
    }
}
