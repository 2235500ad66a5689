//! Page sessions in the database: their owners and their snapshots.

use crate::db::{Db, Result, now_ms};
use std::time::Duration;

/// How long a session can be resumed after its last change.
const KEPT: Duration = Duration::from_secs(7 * 86_400);
/// Maximum sessions of each user; beyond it, the oldest are deleted.
pub const KEPT_PER_USER: i64 = 100;

pub struct Stored {
    db: Db,
    /// This web app's unique name as an owner.
    pub name: String,
}

#[derive(sqlx::FromRow)]
pub struct Row {
    #[sqlx(rename = "user_id")]
    pub user: String,
    /// Empty if no web app has the session in memory.
    pub owner: String,
    pub snapshot: String,
}

impl Stored {
    pub fn new(db: Db) -> Self {
        Self { db, name: uuid::Uuid::new_v4().simple().to_string() }
    }

    /// Reads a session; creates it, owned by this web app, if there is none.
    pub async fn find_or_create(&self, id: &str, user: &str) -> Result<Row> {
        let select = || sqlx::query_as("SELECT user_id, owner, snapshot FROM app_sessions WHERE id = $1").bind(id);
        if let Some(row) = select().fetch_optional(self.db.read()).await? {
            return Ok(row);
        }

        // Another web app may insert the session between the two statements. The first one becomes the owner.
        let insert = "INSERT INTO app_sessions (id, user_id, owner, snapshot, updated_at) VALUES ($1, $2, $3, '', $4)
            ON CONFLICT (id) DO NOTHING";
        let insert = sqlx::query(insert).bind(id).bind(user).bind(&self.name).bind(now_ms());
        insert.execute(self.db.write()).await?;
        Ok(select().fetch_one(self.db.read()).await?)
    }

    /// Returns whether this web app owns the session. A session without an owner is claimed.
    pub async fn claim(&self, id: &str, owner: &str) -> Result<bool> {
        if owner == self.name {
            return Ok(true);
        }
        if owner.is_empty() {
            return self.take_from(id, "").await;
        }
        Ok(false)
    }

    /// Makes this web app the owner. Returns false if `owner` no longer owns the session.
    pub async fn take_from(&self, id: &str, owner: &str) -> Result<bool> {
        let update = sqlx::query("UPDATE app_sessions SET owner = $1 WHERE id = $2 AND owner = $3");
        let update = update.bind(&self.name).bind(id).bind(owner);
        Ok(update.execute(self.db.write()).await?.rows_affected() == 1)
    }

    /// Writes the snapshots of sessions, given by id, in one transaction. Returns the ids that this web app no
    /// longer owns, because another one took them over or they were deleted.
    pub async fn save(&self, snapshots: &[(&str, String)]) -> Result<Vec<String>> {
        let mut lost = Vec::new();
        let mut tx = self.db.begin().await?;
        for (id, snapshot) in snapshots {
            let update = "UPDATE app_sessions SET snapshot = $1, updated_at = $2 WHERE id = $3 AND owner = $4";
            let update = sqlx::query(update)
                .bind(snapshot)
                .bind(now_ms())
                .bind(*id)
                .bind(&self.name);
            if update.execute(&mut *tx).await?.rows_affected() == 0 {
                lost.push((*id).to_string());
            }
        }
        tx.commit().await?;
        Ok(lost)
    }

    /// Releases all sessions of this web app, so that others do not wait for it.
    pub async fn release(&self) -> Result<()> {
        let release = sqlx::query("UPDATE app_sessions SET owner = '' WHERE owner = $1").bind(&self.name);
        release.execute(self.db.write()).await?;
        Ok(())
    }

    /// Deletes old sessions, and those beyond [`KEPT_PER_USER`], because every user can start any number.
    pub async fn delete_old(&self) -> Result<()> {
        let before = now_ms() - i64::try_from(KEPT.as_millis()).unwrap_or(i64::MAX);
        let delete = "DELETE FROM app_sessions WHERE updated_at < $1 OR id IN (SELECT id FROM (
            SELECT id, ROW_NUMBER() OVER (PARTITION BY user_id ORDER BY updated_at DESC) AS place FROM app_sessions
            ) ranked WHERE place > $2)";
        let delete = sqlx::query(delete).bind(before).bind(KEPT_PER_USER);
        delete.execute(self.db.write()).await?;
        Ok(())
    }
}
