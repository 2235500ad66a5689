//! The database: SQLite in the data directory, or PostgreSQL; the same statements on both.

use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use sqlx::{AnyConnection, AnyPool, Connection, Executor, Transaction};
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open the database {url}: {source}; is it reachable, and may this user write there?")]
    Open { url: String, source: sqlx::Error },
    #[error("cannot bring the database to this version's tables: {0}; was it used by a newer version?")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    #[error("the database refused: {0}")]
    Refused(#[from] sqlx::Error),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A cheap handle.
#[derive(Clone)]
pub struct Db {
    /// SQLite has one writer: those who wait for it wait here rather than in a busy loop.
    writer: AnyPool,
    reader: AnyPool,
}

/// For the first connection.
const OPEN_MAX: Duration = Duration::from_secs(15);
/// Shorter than a page waits for the answer to its call: it is told what is wrong, not that nobody answers.
const ACQUIRE_MAX: Duration = Duration::from_secs(3);
/// `FULL`: what was acknowledged is on disk, also after a power cut.
const SQLITE_SETUP: &str = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; \
     PRAGMA busy_timeout = 5000; PRAGMA temp_store = MEMORY";
/// A web app that hangs in the middle of a transaction must not hold up the others on the database.
const POSTGRES_SETUP: &str =
    "SET statement_timeout = '10s'; SET lock_timeout = '3s'; SET idle_in_transaction_session_timeout = '5s'";

impl Db {
    /// `url` as `sqlite://path` or `postgres://…`; without one, `webapp.db` in `dir`.
    pub async fn open(url: Option<&str>, dir: &Path) -> Result<Self> {
        sqlx::any::install_default_drivers();
        let embedded = format!("sqlite://{}?mode=rwc", dir.join("webapp.db").display());
        let url = url.unwrap_or(&embedded);
        let sqlite = url.starts_with("sqlite:");
        let failed = |source| Error::Open { url: without_password(url), source };
        let options = AnyConnectOptions::from_str(url).map_err(failed)?;
        let pool = |size| {
            let pool = AnyPoolOptions::new().max_connections(size).acquire_timeout(ACQUIRE_MAX);
            pool.after_connect(move |connection, _| {
                Box::pin(async move {
                    connection.execute(if sqlite { SQLITE_SETUP } else { POSTGRES_SETUP }).await.map(|_| ())
                })
            })
        };
        // On a connection of its own, without the limits of the others.
        let connection = tokio::time::timeout(OPEN_MAX, AnyConnection::connect_with(&options)).await;
        let mut connection = connection.unwrap_or(Err(sqlx::Error::PoolTimedOut)).map_err(failed)?;
        sqlx::migrate!().run(&mut connection).await?;
        connection.close().await?;
        let writer = pool(if sqlite { 1 } else { 8 }).connect_with(options.clone()).await.map_err(failed)?;
        let reader = if sqlite { pool(4).connect_with(options).await.map_err(failed)? } else { writer.clone() };
        Ok(Self { writer, reader })
    }

    /// Of this database, for as long as it exists.
    pub async fn id(&self) -> Result<String> {
        let fresh = uuid::Uuid::new_v4().simple().to_string();
        let insert = "INSERT INTO deployment (one, id) VALUES (1, $1) ON CONFLICT (one) DO NOTHING";
        sqlx::query(insert).bind(fresh).execute(&self.writer).await?;
        let (id,): (String,) = sqlx::query_as("SELECT id FROM deployment").fetch_one(&self.writer).await?;
        Ok(id)
    }

    pub fn read(&self) -> &AnyPool {
        &self.reader
    }

    /// For single statements that write.
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

/// The next message's id, in the order of commits.
pub async fn next_message_id(connection: &mut AnyConnection) -> Result<i64> {
    let (id,): (i64,) =
        sqlx::query_as("UPDATE message_ids SET last = last + 1 RETURNING last").fetch_one(connection).await?;
    Ok(id)
}

/// Milliseconds since the epoch.
pub fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

fn without_password(url: &str) -> String {
    let Some((scheme @ ("postgres" | "postgresql"), rest)) = url.split_once("://") else { return url.to_string() };
    // A password may also be among the parameters.
    let rest = rest.split('?').next().unwrap_or_default();
    match rest.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://…@{host}"),
        None => format!("{scheme}://{rest}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_directory_that_is_not_there_is_named() {
        let error = Db::open(None, Path::new("/nowhere/at/all")).await.err().expect("refused").to_string();
        assert!(error.contains("/nowhere/at/all/webapp.db"), "{error}");
    }

    #[test]
    fn a_password_in_the_url_is_not_shown() {
        assert_eq!(without_password("postgres://me:secret@db/x"), "postgres://…@db/x");
        assert_eq!(without_password("postgres://db/x?user=me&password=secret"), "postgres://db/x");
        assert_eq!(without_password("sqlite:///tmp/x.db"), "sqlite:///tmp/x.db");
    }

    #[tokio::test]
    async fn ids_follow_each_other_and_survive() {
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
