//! The database: SQLite in the data directory, or PostgreSQL. The same statements run on both.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use sqlx::{AnyConnection, AnyPool, Connection, Executor, Transaction};
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::{Error as IoError, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open the database {url}: {source}; is it reachable, and may this user write there?")]
    Open { url: String, source: sqlx::Error },
    #[error(
        "cannot create the database {}: {source}; its directory must exist, and this user must be able to write there",
        path.display()
    )]
    Create { path: PathBuf, source: IoError },
    #[error("cannot migrate the database: {0}; was it used by a newer version?")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    #[error("the database refused: {0}")]
    Refused(#[from] sqlx::Error),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A cheap handle on the connection pools.
#[derive(Clone)]
pub struct Db {
    /// With SQLite, this pool has one connection, since SQLite has one writer. Writers wait for the connection instead
    /// of polling the database's lock.
    writer: AnyPool,
    reader: AnyPool,
}

/// How long to wait for the first connection.
const OPEN_MAX: Duration = Duration::from_secs(15);
/// Shorter than a page's RPC timeout, so that the page receives the reason.
const ACQUIRE_MAX: Duration = Duration::from_secs(3);
/// With `FULL`, acknowledged writes survive a power failure.
const SQLITE_SETUP: &str = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; \
     PRAGMA busy_timeout = 5000; PRAGMA temp_store = MEMORY";
/// A web app that hangs inside a transaction must not block the other ones.
const POSTGRES_SETUP: &str =
    "SET statement_timeout = '10s'; SET lock_timeout = '3s'; SET idle_in_transaction_session_timeout = '5s'";

impl Db {
    /// Opens `url`, which is `sqlite://path` or `postgres://…`, or without it `webapp.db` in `dir`, and migrates the
    /// database. Creates a missing SQLite file unless the `mode` in the URL forbids it, but not its directory.
    pub async fn open(url: Option<&str>, dir: &Path) -> Result<Self> {
        sqlx::any::install_default_drivers();
        let file = match url {
            None => Some((dir.join("webapp.db"), "")),
            Some(url) => sqlite_file(url),
        };
        let sqlite = file.is_some();
        let url = match file {
            Some((path, parameters)) => prepare(&path, parameters).map_err(|source| Error::Create { path, source })?,
            None => url.unwrap_or_default().to_string(),
        };

        let failed = |source| Error::Open { url: without_password(&url), source };
        let options = AnyConnectOptions::from_str(&url).map_err(failed)?;
        let pool = |size| {
            let pool = AnyPoolOptions::new().max_connections(size).acquire_timeout(ACQUIRE_MAX);
            pool.after_connect(move |connection, _| {
                Box::pin(async move {
                    connection
                        .execute(if sqlite { SQLITE_SETUP } else { POSTGRES_SETUP })
                        .await
                        .map(|_| ())
                })
            })
        };

        // Migrations may take long: they use a connection without the timeouts of the pools.
        let connection = tokio::time::timeout(OPEN_MAX, AnyConnection::connect_with(&options)).await;
        let mut connection = connection.unwrap_or(Err(sqlx::Error::PoolTimedOut)).map_err(failed)?;
        sqlx::migrate!().run(&mut connection).await?;
        connection.close().await?;

        let writer = pool(if sqlite { 1 } else { 8 })
            .connect_with(options.clone())
            .await
            .map_err(failed)?;
        // PostgreSQL needs no separate writer: one pool serves both.
        let reader = if sqlite {
            pool(4).connect_with(options).await.map_err(failed)?
        } else {
            writer.clone()
        };
        Ok(Self { writer, reader })
    }

    /// Returns the id of this database, which never changes.
    pub async fn id(&self) -> Result<String> {
        let fresh = uuid::Uuid::new_v4().simple().to_string();
        // The first web app on the database chooses the id.
        let insert = "INSERT INTO deployment (one, id) VALUES (1, $1) ON CONFLICT (one) DO NOTHING";
        sqlx::query(insert).bind(fresh).execute(&self.writer).await?;
        let (id,): (String,) = sqlx::query_as("SELECT id FROM deployment")
            .fetch_one(&self.writer)
            .await?;
        Ok(id)
    }

    pub fn read(&self) -> &AnyPool {
        &self.reader
    }

    /// The pool for single statements that write. For several, use [`Self::begin`].
    pub fn write(&self) -> &AnyPool {
        &self.writer
    }

    pub async fn begin(&self) -> Result<Transaction<'static, sqlx::Any>> {
        Ok(self.writer.begin().await?)
    }

    pub async fn close(&self) {
        self.reader.close().await;
        self.writer.close().await;
    }
}

/// The path and the parameters of a SQLite URL, `sqlite://path?parameters`.
fn sqlite_file(url: &str) -> Option<(PathBuf, &str)> {
    let rest = url.strip_prefix("sqlite:")?;
    let rest = rest.strip_prefix("//").unwrap_or(rest);
    let (path, parameters) = rest.split_once('?').unwrap_or((rest, ""));
    Some((percent_decode_str(path).decode_utf8_lossy().as_ref().into(), parameters))
}

/// Creates the file if it is missing, readable for its owner only, since it holds messages and password hashes. Returns
/// its URL, with any special characters of the path encoded.
fn prepare(path: &Path, parameters: &str) -> std::io::Result<String> {
    const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'_').remove(b'-');
    // The path of a URL must not contain `..`, so resolve the directory.
    let name = path.file_name().ok_or(ErrorKind::InvalidFilename)?;
    let parent = path
        .parent()
        .filter(|parent| *parent != OsStr::new(""))
        .unwrap_or(Path::new("."));
    let path = std::fs::canonicalize(parent)?.join(name);

    let given = parameters
        .split('&')
        .find_map(|parameter| parameter.strip_prefix("mode="));
    // Append mode never truncates an existing file.
    if given.is_none_or(|mode| mode == "rwc") {
        OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?;
    }
    let path = path
        .to_str()
        .ok_or_else(|| IoError::new(ErrorKind::InvalidFilename, "its path is not valid UTF-8"))?;

    let path = utf8_percent_encode(path, KEPT);
    Ok(if parameters.is_empty() {
        format!("sqlite://{path}")
    } else {
        format!("sqlite://{path}?{parameters}")
    })
}

/// Takes the next id of a message. It locks a row until the transaction ends, so messages commit in the order of ids.
pub async fn next_message_id(connection: &mut AnyConnection) -> Result<i64> {
    let (id,): (i64,) = sqlx::query_as("UPDATE message_ids SET last = last + 1 RETURNING last")
        .fetch_one(connection)
        .await?;
    Ok(id)
}

/// Milliseconds since the epoch.
pub fn now_ms() -> i64 {
    i64::try_from(bus::clock::unix_ms()).unwrap_or(i64::MAX)
}

fn without_password(url: &str) -> String {
    let Some((scheme @ ("postgres" | "postgresql"), rest)) = url.split_once("://") else {
        return url.to_string();
    };
    // The parameters may contain a password as well.
    let rest = rest.split('?').next().unwrap_or_default();
    match rest.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://…@{host}"),
        None => format!("{scheme}://{rest}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn error_names_the_missing_directory() {
        let error = Db::open(None, Path::new("/nowhere/at/all"))
            .await
            .err()
            .expect("refused")
            .to_string();
        assert!(error.contains("/nowhere/at/all/webapp.db"), "{error}");
    }

    #[tokio::test]
    async fn sqlite_url_creates_the_file_but_no_directory() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["plain.db", "with space.db", "100%.db", "what?.db", "a#b.db", "up/../é.db"] {
            std::fs::create_dir_all(dir.path().join("up")).unwrap();
            let path = dir.path().join(name);
            let encoded = name.replace('%', "%25").replace('?', "%3F");
            for url in ["sqlite://", "sqlite:"].map(|scheme| format!("{scheme}{}/{encoded}", dir.path().display())) {
                let db = Db::open(Some(&url), Path::new("/nowhere"))
                    .await
                    .unwrap_or_else(|e| panic!("{url}: {e}"));
                db.id().await.unwrap();
                db.close().await;
                let mode = std::fs::metadata(&path)
                    .unwrap_or_else(|e| panic!("{url}: {e}"))
                    .permissions()
                    .mode();
                assert_eq!(mode & 0o777, 0o600, "{url}");
            }
        }

        let missing = format!("sqlite://{}/missing/x.db", dir.path().display());
        let error = Db::open(Some(&missing), dir.path())
            .await
            .err()
            .expect("refused")
            .to_string();
        assert!(error.contains("missing/x.db") && error.contains("its directory must exist"), "{error}");

        let only_there = format!("sqlite://{}/other.db?mode=rw", dir.path().display());
        assert!(Db::open(Some(&only_there), dir.path()).await.is_err());
        assert!(!dir.path().join("other.db").exists() && !dir.path().join("missing").exists());
    }

    #[tokio::test]
    async fn data_directory_may_have_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("my data? 100% #1");
        std::fs::create_dir(&odd).unwrap();
        Db::open(None, &odd).await.unwrap().close().await;
        assert!(odd.join("webapp.db").exists());
    }

    #[test]
    fn password_in_the_url_is_hidden() {
        assert_eq!(without_password("postgres://me:secret@db/x"), "postgres://…@db/x");
        assert_eq!(without_password("postgres://db/x?user=me&password=secret"), "postgres://db/x");
        assert_eq!(without_password("sqlite:///tmp/x.db"), "sqlite:///tmp/x.db");
    }

    #[tokio::test]
    async fn ids_are_consecutive_and_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        for expected in [[1, 2], [3, 4]] {
            let db = Db::open(None, dir.path()).await.unwrap();
            for id in expected {
                let mut tx = db.begin().await.unwrap();
                assert_eq!(next_message_id(&mut tx).await.unwrap(), id);
                tx.commit().await.unwrap();
            }

            let mut lost = db.begin().await.unwrap();
            next_message_id(&mut lost).await.unwrap();
            lost.rollback().await.unwrap();
            db.close().await;
        }
    }
}
