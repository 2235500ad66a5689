//! Messages in the database. A method returns only committed data.

use super::prompt::{self, CONTEXT_MESSAGES_MAX};
use super::quotas::{self, Quotas, Refused, Spent};
use crate::accounts::ASSISTANT;
use crate::db::{Db, Result, next_message_id, now_ms};
use sqlx::{AnyConnection, FromRow};
use wire::chat::{Message, State};

#[derive(Clone)]
pub struct Store {
    db: Db,
    quotas: Quotas,
}

/// A message to be stored.
pub struct New<'a> {
    pub room: &'a str,
    pub user: &'a str,
    pub name: &'a str,
    pub text: &'a str,
    pub nonce: &'a str,
}

/// A message of the assistant, and the task that fills it.
#[derive(Debug, Clone)]
pub struct Answer {
    pub message: Message,
    pub request_id: String,
    /// The original decide request. A repeat asks for the same.
    pub request: String,
    pub asked_at: i64,
}

#[derive(FromRow)]
struct Row {
    id: i64,
    room: String,
    user_id: String,
    name: String,
    text: String,
    at: i64,
    nonce: Option<String>,
    state: String,
    error: Option<String>,
    reply_to: Option<i64>,
    request_id: Option<String>,
    request: Option<String>,
    asked_at: Option<i64>,
    asker: Option<String>,
}

const COLUMNS: &str =
    "id, room, user_id, name, text, at, nonce, state, error, reply_to, request_id, request, asked_at, asker";

impl Row {
    fn message(self) -> Message {
        Message {
            id: self.id,
            room: self.room,
            user: self.user_id,
            name: self.name,
            text: self.text,
            at: self.at,
            nonce: self.nonce,
            state: State::parse(&self.state),
            reply_to: self.reply_to,
            asker: self.asker,
            error: self.error,
            attempt: None,
            seq: None,
        }
    }

    fn answer(mut self) -> Option<Answer> {
        let (request_id, request) = (self.request_id.take()?, self.request.take()?);
        let asked_at = self.asked_at.unwrap_or(self.at);
        Some(Answer { message: self.message(), request_id, request, asked_at })
    }
}

impl New<'_> {
    fn message(&self, id: i64) -> Message {
        Message {
            id,
            room: self.room.into(),
            user: self.user.into(),
            name: self.name.into(),
            text: self.text.into(),
            at: now_ms(),
            nonce: Some(self.nonce.into()),
            state: State::Done,
            reply_to: None,
            asker: None,
            error: None,
            attempt: None,
            seq: None,
        }
    }
}

impl Store {
    pub fn new(db: Db, quotas: Quotas) -> Self {
        Self { db, quotas }
    }

    /// Whether a user's message with this nonce is stored.
    pub async fn has(&self, user: &str, nonce: &str) -> Result<bool> {
        let select = sqlx::query("SELECT 1 FROM messages WHERE user_id = $1 AND nonce = $2")
            .bind(user)
            .bind(nonce);
        Ok(select.fetch_optional(self.db.read()).await?.is_some())
    }

    /// Stores a message, and in the same commit the answer that it asks for. For a repeat, returns the stored message,
    /// with its answer if that is still streaming.
    pub async fn send(&self, new: &New<'_>) -> Result<(Message, Option<Answer>), Refused> {
        let mut tx = self.db.begin().await?;
        // Taking an id locks the order of messages, so a concurrent repeat waits here for the commit of the first.
        let id = next_message_id(&mut tx).await?;
        if let Some(message) = sent_before(&mut tx, new).await? {
            tx.rollback().await?;
            let answer = self.streaming_answer_to(message.id).await?;
            return Ok((message, answer));
        }

        let prompt = prompt::prompt_in(new.text);
        require_room(&mut tx, new.room).await?;
        self.charge(&mut tx, new.user, prompt.is_some()).await?;

        let message = new.message(id);
        insert(&mut tx, &message, None).await?;
        let answer = match prompt {
            Some(prompt) => Some(insert_answer(&mut tx, &message, prompt).await?),
            None => None,
        };
        tx.commit().await?;
        Ok((message, answer))
    }

    /// Charges a message to the user's quotas, and a run if it asks for an answer.
    async fn charge(&self, tx: &mut AnyConnection, user: &str, asks: bool) -> Result<(), Refused> {
        if asks {
            self.quotas.at_once(tx, user).await?;
        }
        let spent = Spent { messages: 1, runs: i64::from(asks), ..Spent::default() };
        self.quotas.spend(tx, user, spent, now_ms()).await
    }

    /// The last `limit` messages before the one with id `before` (or of all), oldest first.
    pub async fn page(&self, room: &str, before: Option<i64>, limit: i64) -> Result<Vec<Message>> {
        let select = select("WHERE room = $1 AND id < $2 ORDER BY id DESC LIMIT $3")
            .bind(room)
            .bind(before.unwrap_or(i64::MAX))
            .bind(limit);
        let rows = select.fetch_all(self.db.read()).await?;
        Ok(rows.into_iter().rev().map(Row::message).collect())
    }

    pub async fn answer(&self, id: i64) -> Result<Option<Answer>> {
        self.one_answer(select("WHERE id = $1").bind(id)).await
    }

    pub async fn answer_of(&self, request_id: &str) -> Result<Option<Answer>> {
        self.one_answer(select("WHERE request_id = $1").bind(request_id)).await
    }

    async fn streaming_answer_to(&self, id: i64) -> Result<Option<Answer>> {
        let answer = self.one_answer(select("WHERE reply_to = $1").bind(id)).await?;
        Ok(answer.filter(|answer| answer.message.state == State::Streaming))
    }

    async fn one_answer(&self, select: Select<'_>) -> Result<Option<Answer>> {
        // A person's message has no request, so it is not an answer.
        let row = select.fetch_optional(self.db.read()).await?;
        Ok(row.and_then(Row::answer))
    }

    /// All answers that have not ended.
    pub async fn streaming(&self) -> Result<Vec<Answer>> {
        let rows = select("WHERE state = 'streaming' ORDER BY id")
            .fetch_all(self.db.read())
            .await?;
        Ok(rows.into_iter().filter_map(Row::answer).collect())
    }

    /// The request ids of answers that were asked for since this time and have ended.
    pub async fn ended_since(&self, asked_at: i64) -> Result<Vec<String>> {
        let rows = select("WHERE asked_at >= $1 AND state <> 'streaming' ORDER BY id DESC LIMIT 1000")
            .bind(asked_at)
            .fetch_all(self.db.read())
            .await?;
        Ok(rows.into_iter().filter_map(|row| row.request_id).collect())
    }

    /// Ends an answer and returns its message, or `None` if it had already ended. A failed answer may still succeed.
    pub async fn finish(
        &self,
        request_id: &str,
        state: State,
        text: &str,
        error: Option<&str>,
    ) -> Result<Option<Message>> {
        // A provider may return NUL, which PostgreSQL cannot store.
        let (text, error) = (text.replace('\0', "\u{fffd}"), error.map(|error| error.replace('\0', "\u{fffd}")));
        let update = "UPDATE messages SET state = $1, text = $2, error = $3
            WHERE request_id = $4 AND (state = 'streaming' OR (state = 'failed' AND $1 = 'done'))";
        let update = sqlx::query(update)
            .bind(state.as_str())
            .bind(text)
            .bind(error)
            .bind(request_id);
        if update.execute(self.db.write()).await?.rows_affected() == 0 {
            return Ok(None);
        }
        Ok(self.answer_of(request_id).await?.map(|answer| answer.message))
    }

    /// Asks for an ended answer again and charges it to `user`. Returns `None` if it was asked for again meanwhile.
    pub async fn ask_again(&self, answer: &Answer, user: &str) -> Result<Option<Answer>, Refused> {
        let request_id = prompt::new_request_id();
        let Some(request) = prompt::renew(&answer.request, &request_id) else {
            return Ok(None);
        };

        let mut tx = self.db.begin().await?;
        // Taking an id locks the order of messages, so concurrent requests are counted one after the other.
        next_message_id(&mut tx).await?;
        let asker = answer.message.asker.as_deref().unwrap_or(user);
        self.quotas.at_once(&mut tx, asker).await?;
        let spent = Spent { runs: 1, ..Spent::default() };
        self.quotas.spend(&mut tx, user, spent, now_ms()).await?;

        let update = "UPDATE messages SET state = 'streaming', text = '', error = NULL,
            request_id = $1, request = $2, asked_at = $3
            WHERE request_id = $4 AND state IN ('failed', 'stopped')";
        let update = sqlx::query(update)
            .bind(&request_id)
            .bind(&request)
            .bind(now_ms())
            .bind(&answer.request_id);
        if update.execute(&mut *tx).await?.rows_affected() == 0 {
            tx.rollback().await?;
            return Ok(None);
        }
        tx.commit().await?;
        Ok(self.answer_of(&request_id).await?)
    }

    /// Deletes a room and all its messages. Returns the answers that were still streaming.
    pub async fn delete_room(&self, room: &str) -> Result<Vec<Answer>> {
        let mut tx = self.db.begin().await?;
        // Taking an id locks the order of messages, so none is inserted after the delete.
        next_message_id(&mut tx).await?;
        let streaming = select("WHERE state = 'streaming' AND room = $1")
            .bind(room)
            .fetch_all(&mut *tx)
            .await?;

        sqlx::query("DELETE FROM messages WHERE room = $1")
            .bind(room)
            .execute(&mut *tx)
            .await?;
        let update = sqlx::query("UPDATE rooms SET deleted_at = $1 WHERE id = $2 AND deleted_at IS NULL");
        update.bind(now_ms()).bind(room).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(streaming.into_iter().filter_map(Row::answer).collect())
    }

    /// Deletes records of spent quotas that no longer count.
    pub async fn forget_spent(&self, now_ms: i64) -> Result<()> {
        quotas::forget(&self.db, now_ms).await
    }
}

type Select<'q> = sqlx::query::QueryAs<'q, sqlx::Any, Row, sqlx::any::AnyArguments>;

/// Selects messages. `clauses` follows the table's name.
fn select<'q>(clauses: &str) -> Select<'q> {
    sqlx::query_as(sqlx::AssertSqlSafe(format!("SELECT {COLUMNS} FROM messages {clauses}")))
}

async fn sent_before(tx: &mut AnyConnection, new: &New<'_>) -> Result<Option<Message>> {
    let select = select("WHERE user_id = $1 AND nonce = $2")
        .bind(new.user)
        .bind(new.nonce);
    Ok(select.fetch_optional(tx).await?.map(Row::message))
}

async fn require_room(tx: &mut AnyConnection, room: &str) -> Result<(), Refused> {
    let select = sqlx::query("SELECT 1 FROM rooms WHERE id = $1 AND deleted_at IS NULL").bind(room);
    match select.fetch_optional(tx).await? {
        Some(_) => Ok(()),
        None => Err(Refused::NoRoom),
    }
}

/// Inserts the answer to a message, empty and streaming, with the request for it.
async fn insert_answer(tx: &mut AnyConnection, message: &Message, prompt: &str) -> Result<Answer> {
    let before = select("WHERE room = $1 AND id < $2 ORDER BY id DESC LIMIT $3")
        .bind(&message.room)
        .bind(message.id)
        .bind(CONTEXT_MESSAGES_MAX);
    let before: Vec<Row> = before.fetch_all(&mut *tx).await?;
    let before = before.into_iter().map(Row::message).collect();

    let request_id = prompt::new_request_id();
    let answer = Answer {
        request: prompt::request(&request_id, message, prompt, before),
        request_id,
        asked_at: message.at,
        message: Message {
            id: next_message_id(&mut *tx).await?,
            user: ASSISTANT.into(),
            name: ASSISTANT.into(),
            text: String::new(),
            nonce: None,
            state: State::Streaming,
            reply_to: Some(message.id),
            asker: Some(message.user.clone()),
            ..message.clone()
        },
    };
    insert(tx, &answer.message, Some(&answer)).await?;
    Ok(answer)
}

async fn insert(connection: &mut AnyConnection, message: &Message, answer: Option<&Answer>) -> Result<()> {
    let insert = format!(
        "INSERT INTO messages ({COLUMNS}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)"
    );
    sqlx::query(sqlx::AssertSqlSafe(insert))
        .bind(message.id)
        .bind(&message.room)
        .bind(&message.user)
        .bind(&message.name)
        .bind(&message.text)
        .bind(message.at)
        .bind(message.nonce.as_deref())
        .bind(message.state.as_str())
        .bind(message.error.as_deref())
        .bind(message.reply_to)
        .bind(answer.map(|answer| answer.request_id.as_str()))
        .bind(answer.map(|answer| answer.request.as_str()))
        .bind(answer.map(|answer| answer.asked_at))
        .bind(message.asker.as_deref())
        .execute(connection)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::router::DecideRequest;

    async fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(Db::open(None, dir.path()).await.unwrap(), Quotas::default());
        (dir, store)
    }

    fn new<'a>(text: &'a str, nonce: &'a str) -> New<'a> {
        New { room: "general", user: "ann", name: "Ann", text, nonce }
    }

    #[tokio::test]
    async fn repeated_message_is_stored_once() {
        let (_dir, store) = store().await;
        let (first, answer) = store.send(&new("@assistant status", "n")).await.unwrap();
        let (again, same) = store.send(&new("@assistant status", "n")).await.unwrap();
        assert_eq!(first, again);
        assert_eq!(answer.unwrap().request, same.unwrap().request, "the repeat sends the same bytes");

        let page = store.page("general", None, 10).await.unwrap();
        assert_eq!(page.iter().map(|m| (m.id, &*m.user)).collect::<Vec<_>>(), [(1, "ann"), (2, "assistant")]);
    }

    #[tokio::test]
    async fn failed_answer_may_still_succeed_but_a_done_one_is_final() {
        let (_dir, store) = store().await;
        let (_, answer) = store.send(&new("@assistant hi", "n")).await.unwrap();
        let id = answer.as_ref().unwrap().request_id.as_str();
        assert_eq!(store.streaming().await.unwrap().len(), 1);

        let failed = store.finish(id, State::Failed, "", Some("no worker")).await.unwrap();
        let failed = failed.unwrap();
        assert_eq!((failed.state, failed.error.as_deref()), (State::Failed, Some("no worker")));
        assert_eq!(store.finish(id, State::Stopped, "", None).await.unwrap(), None);

        let late = store.finish(id, State::Done, "text", None).await.unwrap().unwrap();
        assert_eq!((late.state, &*late.text, late.error), (State::Done, "text", None));
        let again = store.ask_again(answer.as_ref().unwrap(), "ann").await.unwrap();
        assert!(again.is_none(), "a done answer is kept");
    }

    #[tokio::test]
    async fn stopped_answer_can_be_asked_for_again_once() {
        let (_dir, store) = store().await;
        let (_, answer) = store.send(&new("@assistant hi", "n")).await.unwrap();
        let answer = answer.unwrap();
        let stopped = store
            .finish(&answer.request_id, State::Stopped, "", None)
            .await
            .unwrap();
        assert!(stopped.is_some());

        let again = store.ask_again(&answer, "ann").await.unwrap().unwrap();
        assert_eq!((again.message.state, &*again.message.text), (State::Streaming, ""));
        assert_ne!(again.request_id, answer.request_id);
        let request: DecideRequest = serde_json::from_str(&again.request).unwrap();
        assert_eq!(request.request_id, again.request_id);

        let third = store.ask_again(&answer, "ann").await.unwrap();
        assert!(third.is_none(), "the answer has already been asked for again");
    }

    #[tokio::test]
    async fn pages_go_back_in_order() {
        let (_dir, store) = store().await;
        for n in 0..7 {
            store.send(&new(&format!("m{n}"), &n.to_string())).await.unwrap();
        }
        let texts = |page: Vec<Message>| page.into_iter().map(|m| m.text).collect::<Vec<_>>();
        assert_eq!(texts(store.page("general", None, 3).await.unwrap()), ["m4", "m5", "m6"]);
        assert_eq!(texts(store.page("general", Some(5), 3).await.unwrap()), ["m1", "m2", "m3"]);
        assert!(store.page("random", None, 3).await.unwrap().is_empty());
    }
}
