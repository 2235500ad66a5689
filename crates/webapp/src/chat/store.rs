//! Messages in the database. What is returned has been committed.

use super::quotas::{self, Quotas, Refused, Spent};
use crate::chat::ASSISTANT;
use crate::db::{Db, Result, next_message_id, now_ms};
use serde_json::json;
use sqlx::FromRow;
use wire::chat::{Message, State};
use wire::router::{DEFAULT_TENANT, DecideRequest, RequestOptions, Task, VERSION};

/// Answers' request ids begin with it, so that others' tasks are told apart at a glance.
pub const REQUEST_PREFIX: &str = "chat-";
/// Whose tasks the answers are.
pub const TENANT: &str = DEFAULT_TENANT;
/// An answer may take this long, milliseconds.
pub const ANSWER_MAX_MS: u64 = 120_000;
/// Of what was said before, an assistant is told this many messages and bytes.
const CONTEXT_MESSAGES: i64 = 20;
const CONTEXT_BYTES: usize = 16 * 1024;

#[derive(Clone)]
pub struct Store {
    db: Db,
    quotas: Quotas,
}

pub struct New<'a> {
    pub room: &'a str,
    pub user: &'a str,
    pub name: &'a str,
    pub text: &'a str,
    pub nonce: &'a str,
}

/// An assistant's message, and the task that fills it.
#[derive(Debug, Clone)]
pub struct Answer {
    pub message: Message,
    pub request_id: String,
    /// The decide request, as it was made first: a repeat is the same to the byte.
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

    /// Keeps a message, and in the same commit the answer that it asks for. Sent again, it is the one that is there.
    pub async fn send(&self, new: &New<'_>) -> Result<(Message, Option<Answer>), Refused> {
        let mut tx = self.db.begin().await?;
        // Takes the lock that orders messages, before looking whether this one is there.
        let id = next_message_id(&mut tx).await?;
        let known = format!("SELECT {COLUMNS} FROM messages WHERE user_id = $1 AND nonce = $2");
        let known: Option<Row> = sqlx::query_as(sqlx::AssertSqlSafe(known))
            .bind(new.user)
            .bind(new.nonce)
            .fetch_optional(&mut *tx)
            .await?;
        if let Some(known) = known {
            tx.rollback().await?;
            let message = known.message();
            let answer = self.answer_to(message.id).await?;
            return Ok((message, answer.filter(|answer| answer.message.state == State::Streaming)));
        }
        let there = sqlx::query("SELECT 1 FROM rooms WHERE id = $1 AND deleted_at IS NULL").bind(new.room);
        if there.fetch_optional(&mut *tx).await?.is_none() {
            return Err(Refused::NoRoom);
        }
        let prompt = asked(new.text);
        if prompt.is_some() {
            self.quotas.at_once(&mut tx, new.user).await?;
        }
        let spent = Spent { messages: 1, runs: i64::from(prompt.is_some()), ..Spent::default() };
        self.quotas.spend(&mut tx, new.user, spent, now_ms()).await?;

        let message = Message {
            id,
            room: new.room.into(),
            user: new.user.into(),
            name: new.name.into(),
            text: new.text.into(),
            at: now_ms(),
            nonce: Some(new.nonce.into()),
            state: State::Done,
            reply_to: None,
            asker: None,
            error: None,
            attempt: None,
            seq: None,
        };
        insert(&mut tx, &message, None).await?;
        let mut answer = None;
        if let Some(prompt) = prompt {
            let before =
                format!("SELECT {COLUMNS} FROM messages WHERE room = $1 AND id < $2 ORDER BY id DESC LIMIT $3");
            let before = sqlx::query_as(sqlx::AssertSqlSafe(before))
                .bind(new.room)
                .bind(id)
                .bind(CONTEXT_MESSAGES);
            let before: Vec<Row> = before.fetch_all(&mut *tx).await?;
            let made = Answer {
                message: Message {
                    id: next_message_id(&mut tx).await?,
                    user: ASSISTANT.into(),
                    name: ASSISTANT.into(),
                    text: String::new(),
                    nonce: None,
                    state: State::Streaming,
                    reply_to: Some(id),
                    asker: Some(new.user.into()),
                    ..message.clone()
                },
                request_id: new_request_id(),
                request: String::new(),
                asked_at: message.at,
            };
            let made = Answer { request: request(&made.request_id, &message, prompt, before), ..made };
            insert(&mut tx, &made.message, Some(&made)).await?;
            answer = Some(made);
        }
        tx.commit().await?;
        Ok((message, answer))
    }

    /// The last `limit` messages before one (or of all), oldest first.
    pub async fn page(&self, room: &str, before: Option<i64>, limit: i64) -> Result<Vec<Message>> {
        let select = format!("SELECT {COLUMNS} FROM messages WHERE room = $1 AND id < $2 ORDER BY id DESC LIMIT $3");
        let select = sqlx::query_as(sqlx::AssertSqlSafe(select))
            .bind(room)
            .bind(before.unwrap_or(i64::MAX))
            .bind(limit);
        let rows: Vec<Row> = select.fetch_all(self.db.read()).await?;
        Ok(rows.into_iter().rev().map(Row::message).collect())
    }

    pub async fn answer(&self, id: i64) -> Result<Option<Answer>> {
        self.one_answer("id = $1", |query| query.bind(id)).await
    }

    pub async fn answer_of(&self, request_id: &str) -> Result<Option<Answer>> {
        let request_id = request_id.to_string();
        self.one_answer("request_id = $1", |query| query.bind(request_id)).await
    }

    async fn answer_to(&self, id: i64) -> Result<Option<Answer>> {
        self.one_answer("reply_to = $1", |query| query.bind(id)).await
    }

    async fn one_answer<F>(&self, which: &str, bind: F) -> Result<Option<Answer>>
    where
        F: FnOnce(Query<Row>) -> Query<Row>,
    {
        let select = format!("SELECT {COLUMNS} FROM messages WHERE {which}");
        let row = bind(sqlx::query_as(sqlx::AssertSqlSafe(select)))
            .fetch_optional(self.db.read())
            .await?;
        Ok(row.and_then(Row::answer))
    }

    /// Answers that have not ended.
    pub async fn streaming(&self) -> Result<Vec<Answer>> {
        let select = format!("SELECT {COLUMNS} FROM messages WHERE state = 'streaming' ORDER BY id");
        let rows: Vec<Row> = sqlx::query_as(sqlx::AssertSqlSafe(select))
            .fetch_all(self.db.read())
            .await?;
        Ok(rows.into_iter().filter_map(Row::answer).collect())
    }

    /// Ends an answer; the message as it is now, unless it had ended before (what failed may still succeed).
    pub async fn finish(
        &self,
        request_id: &str,
        state: State,
        text: &str,
        error: Option<&str>,
    ) -> Result<Option<Message>> {
        // Whatever a provider says; PostgreSQL keeps no NUL.
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

    /// Asks for an ended answer anew, at the expense of `user`; nothing, if another has done so just now.
    pub async fn ask_again(&self, answer: &Answer, user: &str) -> Result<Option<Answer>, Refused> {
        let request_id = new_request_id();
        let mut request: DecideRequest = match serde_json::from_str(&answer.request) {
            Ok(request) => request,
            Err(_) => return Ok(None),
        };
        request.request_id.clone_from(&request_id);
        request.trace_id = Some(uuid::Uuid::new_v4().simple().to_string());
        let request = serde_json::to_string(&request).expect("a request is JSON");

        let mut tx = self.db.begin().await?;
        // Takes the lock that orders messages: two that are asked at once are counted one after the other.
        next_message_id(&mut tx).await?;
        self.quotas
            .at_once(&mut tx, answer.message.asker.as_deref().unwrap_or(user))
            .await?;
        self.quotas
            .spend(&mut tx, user, Spent { runs: 1, ..Spent::default() }, now_ms())
            .await?;
        let update = "UPDATE messages SET state = 'streaming', text = '', error = NULL, request_id = $1, request = $2, asked_at = $3
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

    /// Deletes a room with all its messages; the answers that were still coming.
    pub async fn delete_room(&self, room: &str) -> Result<Vec<Answer>> {
        let mut tx = self.db.begin().await?;
        // Takes the lock that orders messages: none is written behind it.
        next_message_id(&mut tx).await?;
        let coming = format!("SELECT {COLUMNS} FROM messages WHERE state = 'streaming' AND room = $1");
        let coming: Vec<Row> = sqlx::query_as(sqlx::AssertSqlSafe(coming))
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
        Ok(coming.into_iter().filter_map(Row::answer).collect())
    }

    /// Forgets what no quota counts any more.
    pub async fn forget_spent(&self, now_ms: i64) -> Result<()> {
        quotas::forget(&self.db, now_ms).await
    }
}

type Query<T> = sqlx::query::QueryAs<'static, sqlx::Any, T, sqlx::any::AnyArguments>;

async fn insert(connection: &mut sqlx::AnyConnection, message: &Message, answer: Option<&Answer>) -> Result<()> {
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

fn new_request_id() -> String {
    format!("{REQUEST_PREFIX}{}", uuid::Uuid::now_v7().simple())
}

/// What an assistant is asked by this text; none if it is not addressed.
pub fn asked(text: &str) -> Option<&str> {
    let (at, rest) = text.split_at_checked(1 + ASSISTANT.len())?;
    let addressed = at.strip_prefix('@')?.eq_ignore_ascii_case(ASSISTANT);
    let ends = !rest.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.'));
    let prompt = rest.trim_start_matches([',', ':']).trim();
    (addressed && ends).then_some(if prompt.is_empty() { "help" } else { prompt })
}

fn request(request_id: &str, message: &Message, prompt: &str, before: Vec<Row>) -> String {
    // Newest first until it is enough, then in the order it was said.
    let mut room_left = CONTEXT_BYTES;
    let mut turns = vec![json!({"role": "user", "content": prompt})];
    for row in before {
        let assistant = row.user_id == ASSISTANT;
        let content = if assistant {
            row.text
        } else {
            format!("{}: {}", row.name, row.text)
        };
        if content.len() > room_left {
            break;
        }
        room_left -= content.len();
        if !content.is_empty() {
            turns.push(json!({"role": if assistant { "assistant" } else { "user" }, "content": content}));
        }
    }
    turns.reverse();
    let payload = json!({"prompt": prompt, "room": message.room, "user": message.user, "messages": turns});
    let metadata = json!({"room": message.room, "user": message.user});
    let object = |value: serde_json::Value| value.as_object().cloned();
    let request = DecideRequest {
        version: VERSION.into(),
        request_id: request_id.into(),
        tenant_id: TENANT.into(),
        task: Task { task_type: "chat".into(), payload: object(payload), payload_ref: None },
        policy_id: None,
        trace_id: Some(uuid::Uuid::new_v4().simple().to_string()),
        constraints: None,
        metadata: object(metadata),
        push_assignment: true,
        assignment_subject: None,
        options: Some(RequestOptions { deadline_ms: Some(ANSWER_MAX_MS), ..RequestOptions::default() }),
        run_id: None,
        flow_id: None,
        step_id: None,
        idempotency_key: None,
        deadline: None,
    };
    serde_json::to_string(&request).expect("a request is JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_assistant_is_addressed_at_the_beginning() {
        assert_eq!(asked("@assistant status"), Some("status"));
        assert_eq!(asked("@Assistant, who is here?"), Some("who is here?"));
        assert_eq!(asked("@assistant"), Some("help"));
        for other in ["assistant", "hi @assistant", "@assistants", "@assistant-2 x", "@", "é"] {
            assert_eq!(asked(other), None, "{other}");
        }
    }

    async fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(Db::open(None, dir.path()).await.unwrap(), Quotas::default());
        (dir, store)
    }

    fn new<'a>(text: &'a str, nonce: &'a str) -> New<'a> {
        New { room: "general", user: "ann", name: "Ann", text, nonce }
    }

    #[tokio::test]
    async fn a_message_sent_again_is_the_same_message() {
        let (_dir, store) = store().await;
        let (first, answer) = store.send(&new("@assistant status", "n")).await.unwrap();
        let (again, same) = store.send(&new("@assistant status", "n")).await.unwrap();
        assert_eq!(first, again);
        assert_eq!(answer.unwrap().request, same.unwrap().request, "the repeat asks the same to the byte");
        let page = store.page("general", None, 10).await.unwrap();
        assert_eq!(page.iter().map(|m| (m.id, &*m.user)).collect::<Vec<_>>(), [(1, "ann"), (2, "assistant")]);
    }

    #[tokio::test]
    async fn an_answer_ends_once_and_can_be_asked_for_again() {
        let (_dir, store) = store().await;
        let (_, answer) = store.send(&new("@assistant hi", "n")).await.unwrap();
        let answer = answer.unwrap();
        assert_eq!(store.streaming().await.unwrap().len(), 1);
        let failed = store
            .finish(&answer.request_id, State::Failed, "", Some("no worker"))
            .await
            .unwrap()
            .unwrap();
        assert_eq!((failed.state, failed.error.as_deref()), (State::Failed, Some("no worker")));
        assert_eq!(
            store
                .finish(&answer.request_id, State::Stopped, "", None)
                .await
                .unwrap(),
            None
        );
        let late = store
            .finish(&answer.request_id, State::Done, "text", None)
            .await
            .unwrap()
            .unwrap();
        assert_eq!((late.state, &*late.text, late.error), (State::Done, "text", None));
        assert!(store.ask_again(&answer, "ann").await.unwrap().is_none(), "what is there is not wiped");

        let (_, answer) = store.send(&new("@assistant hi", "n2")).await.unwrap();
        let answer = answer.unwrap();
        store
            .finish(&answer.request_id, State::Stopped, "", None)
            .await
            .unwrap()
            .unwrap();
        let again = store.ask_again(&answer, "ann").await.unwrap().unwrap();
        assert_eq!((again.message.state, &*again.message.text), (State::Streaming, ""));
        assert_ne!(again.request_id, answer.request_id);
        assert!(store.ask_again(&answer, "ann").await.unwrap().is_none(), "asked again already");
        let request: DecideRequest = serde_json::from_str(&again.request).unwrap();
        assert_eq!(request.request_id, again.request_id);
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
