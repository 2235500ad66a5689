//! Limits on what one user may do in the chat: concurrently, per minute and per day.
//!
//! Quotas per minute are counted in memory, by each web app for itself. Quotas per day are counted in the database, in
//! the transaction that spends them, so that they hold across restarts and web apps.

use crate::db::{Error, Result};
use crate::rate_limits::{Rate, Wait};
use crate::rpc::Refusal;
use parking_lot::Mutex;
use sqlx::AnyConnection;
use std::time::{Duration, Instant};
use wire::realtime::ErrorCode;

/// Typing notices: a burst of this many, then one per pause. More are dropped.
const TYPING: u32 = 10;
const TYPING_PAUSE: Duration = Duration::from_secs(1);
const HOUR_MS: i64 = 3_600_000;
const HOURS: i64 = 24;

/// Quotas of each user.
#[derive(Debug, Clone, Copy)]
pub struct Quotas {
    /// Answers of the assistant that stream at the same time.
    pub runs_at_once: u32,
    pub runs_per_minute: u32,
    pub runs_per_day: u32,
    pub messages_per_minute: u32,
    pub messages_per_day: u32,
    pub rooms_per_day: u32,
}

impl Default for Quotas {
    fn default() -> Self {
        Self {
            runs_at_once: 3,
            runs_per_minute: 10,
            runs_per_day: 300,
            messages_per_minute: 60,
            messages_per_day: 3000,
            rooms_per_day: 20,
        }
    }
}

/// A quota that is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Over {
    #[error("you have {0} answers streaming, which is the limit; wait for one to end, or stop it")]
    AtOnce(u32),
    #[error("you may {what} {most} times a minute; try again in {wait_s} s")]
    Minute { what: &'static str, most: u32, wait_s: u64 },
    #[error("you may {what} {most} times a day; try again later")]
    Day { what: &'static str, most: u32 },
}

impl From<Over> for Refusal {
    fn from(over: Over) -> Self {
        let code = match over {
            Over::AtOnce(_) | Over::Minute { .. } => ErrorCode::TooManyRequests,
            Over::Day { .. } => ErrorCode::LimitExceeded,
        };
        Self(code, over.to_string())
    }
}

/// Why the store refused to write.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error(transparent)]
    Database(#[from] Error),
    #[error(transparent)]
    Over(#[from] Over),
    #[error("there is no such room")]
    NoRoom,
}

impl From<sqlx::Error> for Refused {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error.into())
    }
}

/// Amounts that are charged to quotas.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spent {
    pub messages: i64,
    pub runs: i64,
    pub rooms: i64,
}

const ASK: &str = "ask the assistant";
const SEND: &str = "send a message";

impl Quotas {
    /// Charges `more` to the user's daily quota in the caller's transaction. Fails if that exceeds the quota; the
    /// caller must then roll back.
    pub async fn spend(&self, tx: &mut AnyConnection, user: &str, more: Spent, now_ms: i64) -> Result<(), Refused> {
        let hour = now_ms / HOUR_MS;
        // Insert before the sum: the lock on the row serializes concurrent transactions of a user.
        let insert = "INSERT INTO quota_spent (user_id, hour, messages, runs, rooms) VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT (user_id, hour) DO UPDATE SET messages = quota_spent.messages + excluded.messages,
            runs = quota_spent.runs + excluded.runs, rooms = quota_spent.rooms + excluded.rooms";
        let insert = sqlx::query(insert).bind(user).bind(hour);
        insert
            .bind(more.messages)
            .bind(more.runs)
            .bind(more.rooms)
            .execute(&mut *tx)
            .await?;

        // PostgreSQL sums BIGINT as NUMERIC, which sqlx::Any cannot read.
        let select = "SELECT CAST(COALESCE(SUM(messages), 0) AS BIGINT), CAST(COALESCE(SUM(runs), 0) AS BIGINT),
            CAST(COALESCE(SUM(rooms), 0) AS BIGINT) FROM quota_spent WHERE user_id = $1 AND hour > $2";
        let select = sqlx::query_as(select).bind(user).bind(hour - HOURS);
        let (messages, runs, rooms): (i64, i64, i64) = select.fetch_one(tx).await?;
        for (spent, more, most, what) in [
            (messages, more.messages, self.messages_per_day, SEND),
            (runs, more.runs, self.runs_per_day, ASK),
            (rooms, more.rooms, self.rooms_per_day, "create a room"),
        ] {
            // Only the charged quotas are checked, so a quota that is used up does not block other actions.
            if more > 0 && spent > i64::from(most) {
                return Err(Over::Day { what, most }.into());
            }
        }
        Ok(())
    }

    /// Fails if the user has as many streaming answers as allowed.
    pub async fn at_once(&self, tx: &mut AnyConnection, user: &str) -> Result<(), Refused> {
        let count = "SELECT COUNT(*) FROM messages WHERE state = 'streaming' AND asker = $1";
        let (streaming,): (i64,) = sqlx::query_as(count).bind(user).fetch_one(tx).await?;
        if streaming >= i64::from(self.runs_at_once) {
            return Err(Over::AtOnce(self.runs_at_once).into());
        }
        Ok(())
    }
}

/// Deletes records of quotas spent more than a day ago.
pub async fn forget(db: &crate::db::Db, now_ms: i64) -> Result<()> {
    let delete = sqlx::query("DELETE FROM quota_spent WHERE hour <= $1").bind(now_ms / HOUR_MS - HOURS);
    delete.execute(db.write()).await?;
    Ok(())
}

/// The quotas per minute, counted in memory.
pub struct Minute {
    quotas: Quotas,
    rates: Mutex<Rates>,
}

struct Rates {
    messages: Rate<String>,
    runs: Rate<String>,
    typing: Rate<String>,
}

impl Minute {
    pub fn new(quotas: Quotas) -> Self {
        let rates = Rates {
            messages: Rate::per_minute(quotas.messages_per_minute),
            runs: Rate::per_minute(quotas.runs_per_minute),
            typing: Rate::new(TYPING, TYPING_PAUSE),
        };
        Self { quotas, rates: Mutex::new(rates) }
    }

    pub fn message(&self, user: &str, now: Instant) -> Result<(), Over> {
        let taken = self.rates.lock().messages.take(&user.to_string(), now);
        taken.map_err(|wait| over(SEND, self.quotas.messages_per_minute, wait))
    }

    pub fn run(&self, user: &str, now: Instant) -> Result<(), Over> {
        let taken = self.rates.lock().runs.take(&user.to_string(), now);
        taken.map_err(|wait| over(ASK, self.quotas.runs_per_minute, wait))
    }

    /// Whether a typing notice may be published now.
    pub fn typing(&self, user: &str, now: Instant) -> bool {
        self.rates.lock().typing.take(&user.to_string(), now).is_ok()
    }
}

fn over(what: &'static str, most: u32, wait: Wait) -> Over {
    Over::Minute { what, most, wait_s: wait.seconds() }
}
