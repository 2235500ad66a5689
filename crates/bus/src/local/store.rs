//! Streams, consumers and buckets in SQLite. All their state is rows, so a crash at any point leaves them whole.
//!
//! A consumer's work is the table `queue`: one row a message it still owes an answer for, with the time it is next
//! available. Delivering moves that time ahead by `ack_wait`; an ack deletes the row; silence lets the time come.

use super::subjects::matches;
use crate::{Appended, ConsumerConfig, Error, Headers, Message, Outcome, Result, Retention, StreamConfig, StreamInfo};
use bytes::Bytes;
use journal::Journal;
use parking_lot::RwLock;
use rusqlite::{Connection, OptionalExtension, params};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS messages (
    stream TEXT NOT NULL, seq INTEGER NOT NULL, subject TEXT NOT NULL, headers TEXT NOT NULL, payload BLOB NOT NULL,
    stored_ms INTEGER NOT NULL, PRIMARY KEY (stream, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sequences (stream TEXT PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dedup (
    stream TEXT NOT NULL, msg_id TEXT NOT NULL, seq INTEGER NOT NULL, at_ms INTEGER NOT NULL,
    PRIMARY KEY (stream, msg_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS consumers (
    id INTEGER PRIMARY KEY, stream TEXT NOT NULL, name TEXT NOT NULL, filter TEXT, UNIQUE (stream, name));
CREATE TABLE IF NOT EXISTS queue (
    consumer INTEGER NOT NULL, seq INTEGER NOT NULL, available_ms INTEGER NOT NULL, delivered INTEGER NOT NULL,
    PRIMARY KEY (consumer, seq)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS queue_available ON queue (consumer, available_ms);
CREATE TABLE IF NOT EXISTS kv (
    bucket TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, revision INTEGER NOT NULL, at_ms INTEGER NOT NULL,
    PRIMARY KEY (bucket, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS revisions (one INTEGER PRIMARY KEY CHECK (one = 1), last INTEGER NOT NULL);
INSERT OR IGNORE INTO revisions VALUES (1, 0);
";

pub struct Store {
    journal: Journal,
    streams: RwLock<HashMap<&'static str, Arc<Stream>>>,
    buckets: RwLock<HashMap<&'static str, Duration>>,
}

struct Stream {
    config: StreamConfig,
    consumers: RwLock<Vec<ConsumerRow>>,
    /// Something became available.
    work: Arc<Notify>,
}

#[derive(Clone)]
struct ConsumerRow {
    id: i64,
    name: String,
    filter: Option<String>,
}

/// What a pump needs to claim and settle.
#[derive(Clone)]
pub struct ConsumerHandle {
    pub id: i64,
    pub stream: &'static str,
    pub ack_wait: Duration,
    pub max_ack_pending: usize,
    pub work: Arc<Notify>,
    retention: Retention,
}

pub struct Claimed {
    pub message: Message,
    pub sequence: u64,
    pub delivered: u32,
    pub stored_ms: u64,
}

pub struct Claim {
    pub messages: Vec<Claimed>,
    /// When to look again, if nothing is told before: the earliest time a row becomes available.
    pub next: Option<Duration>,
}

impl From<journal::Error> for Error {
    fn from(error: journal::Error) -> Self {
        Error::Storage(error.to_string())
    }
}

impl Store {
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { journal: Journal::open(path, SCHEMA)?, streams: RwLock::default(), buckets: RwLock::default() })
    }

    /// No delivery outlives the process that held it: all of them are available again.
    pub async fn recover(&self) -> Result<()> {
        self.journal.write(|c| c.execute("UPDATE queue SET available_ms = 0", [])).await?;
        Ok(())
    }

    pub async fn declare_stream(&self, config: StreamConfig) -> Result<()> {
        let name = config.name;
        let consumers = self
            .journal
            .write(move |c| {
                c.execute("INSERT OR IGNORE INTO sequences VALUES (?1, 0)", [name])?;
                let mut rows = c.prepare_cached("SELECT id, name, filter FROM consumers WHERE stream = ?1")?;
                let rows = rows.query_map([name], |row| {
                    Ok(ConsumerRow { id: row.get(0)?, name: row.get(1)?, filter: row.get(2)? })
                })?;
                rows.collect::<rusqlite::Result<Vec<_>>>()
            })
            .await?;
        let mut streams = self.streams.write();
        let work = streams.get(name).map_or_else(Default::default, |known| known.work.clone());
        streams.insert(name, Arc::new(Stream { config, consumers: RwLock::new(consumers), work }));
        Ok(())
    }

    fn stream_of(&self, subject: &str) -> Result<Arc<Stream>> {
        let streams = self.streams.read();
        let takes = |stream: &&Arc<Stream>| stream.config.subjects.iter().any(|pattern| matches(pattern, subject));
        streams.values().find(takes).cloned().ok_or_else(|| Error::NoStream(subject.into()))
    }

    pub async fn append(&self, message: &Message, msg_id: Option<&str>) -> Result<Appended> {
        let stream = self.stream_of(&message.subject)?;
        let owed: Vec<i64> = {
            let consumers = stream.consumers.read();
            let takes = |row: &&ConsumerRow| row.filter.as_deref().is_none_or(|f| matches(f, &message.subject));
            consumers.iter().filter(takes).map(|row| row.id).collect()
        };
        let (message, msg_id, config) = (message.clone(), msg_id.map(String::from), stream.config.clone());
        let now = now_ms();
        let appended = self
            .journal
            .write(move |c| {
                if let Some(msg_id) = &msg_id {
                    let since = now.saturating_sub(millis(config.dedup_window));
                    let known: Option<u64> = c
                        .prepare_cached("SELECT seq FROM dedup WHERE stream = ?1 AND msg_id = ?2 AND at_ms >= ?3")?
                        .query_row(params![config.name, msg_id, since], |row| row.get(0))
                        .optional()?;
                    if let Some(sequence) = known {
                        return Ok(Appended { sequence, duplicate: true });
                    }
                }
                let sequence: u64 = c
                    .prepare_cached("UPDATE sequences SET last = last + 1 WHERE stream = ?1 RETURNING last")?
                    .query_row([config.name], |row| row.get(0))?;
                if let Some(msg_id) = &msg_id {
                    c.prepare_cached("INSERT OR REPLACE INTO dedup VALUES (?1, ?2, ?3, ?4)")?.execute(params![
                        config.name,
                        msg_id,
                        sequence,
                        now
                    ])?;
                }
                c.prepare_cached("INSERT INTO messages VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?.execute(params![
                    config.name,
                    sequence,
                    &*message.subject,
                    render_headers(&message.headers),
                    &message.payload[..],
                    now
                ])?;
                for consumer in owed {
                    c.prepare_cached("INSERT INTO queue VALUES (?1, ?2, 0, 0)")?
                        .execute(params![consumer, sequence])?;
                }
                Ok(Appended { sequence, duplicate: false })
            })
            .await?;
        stream.work.notify_waiters();
        Ok(appended)
    }

    pub async fn consumer(&self, config: &ConsumerConfig) -> Result<ConsumerHandle> {
        let missing = || Error::NoStream(config.stream.into());
        let stream = self.streams.read().get(config.stream).cloned().ok_or_else(missing)?;
        let (name, filter, from_start) = (config.name.clone(), config.filter.clone(), config.from_start);
        let stream_name = config.stream;
        let id = self
            .journal
            .write(move |c| {
                let known = c
                    .query_row(
                        "SELECT id FROM consumers WHERE stream = ?1 AND name = ?2",
                        params![stream_name, name],
                        |row| row.get::<_, i64>(0),
                    )
                    .optional()?;
                if let Some(id) = known {
                    return Ok(id);
                }
                c.execute(
                    "INSERT INTO consumers (stream, name, filter) VALUES (?1, ?2, ?3)",
                    params![stream_name, name, filter],
                )?;
                let id = c.last_insert_rowid();
                if from_start {
                    let mut stored = c.prepare("SELECT seq, subject FROM messages WHERE stream = ?1")?;
                    let mut rows = stored.query([stream_name])?;
                    while let Some(row) = rows.next()? {
                        let (seq, subject): (u64, String) = (row.get(0)?, row.get(1)?);
                        if filter.as_deref().is_none_or(|f| matches(f, &subject)) {
                            c.execute("INSERT INTO queue VALUES (?1, ?2, 0, 0)", params![id, seq])?;
                        }
                    }
                }
                Ok(id)
            })
            .await?;
        let mut consumers = stream.consumers.write();
        if !consumers.iter().any(|row| row.id == id) {
            consumers.push(ConsumerRow { id, name: config.name.clone(), filter: config.filter.clone() });
        }
        Ok(ConsumerHandle {
            id,
            stream: config.stream,
            ack_wait: config.ack_wait,
            max_ack_pending: config.max_ack_pending,
            work: stream.work.clone(),
            retention: stream.config.retention,
        })
    }

    /// Takes up to `max` available messages for `ack_wait`; their delivery counts are stored before they are handed out.
    pub async fn claim(&self, consumer: &ConsumerHandle, max: usize) -> Result<Claim> {
        let consumer = consumer.clone();
        let now = now_ms();
        let claim = self
            .journal
            .write(move |c| {
                let held: usize = c
                    .prepare_cached("SELECT count(*) FROM queue WHERE consumer = ?1 AND available_ms > ?2")?
                    .query_row(params![consumer.id, now], |row| row.get(0))?;
                let max = max.min(consumer.max_ack_pending.saturating_sub(held));
                let mut messages = Vec::new();
                {
                    let mut available = c.prepare_cached(
                        "SELECT q.seq, q.delivered, m.subject, m.headers, m.payload, m.stored_ms
                         FROM queue q JOIN messages m ON m.stream = ?1 AND m.seq = q.seq
                         WHERE q.consumer = ?2 AND q.available_ms <= ?3 ORDER BY q.seq LIMIT ?4",
                    )?;
                    let mut rows = available.query(params![consumer.stream, consumer.id, now, max])?;
                    while let Some(row) = rows.next()? {
                        messages.push(Claimed {
                            sequence: row.get(0)?,
                            delivered: row.get::<_, u32>(1)? + 1,
                            message: Message {
                                subject: row.get::<_, String>(2)?.into(),
                                reply: None,
                                headers: parse_headers(&row.get::<_, String>(3)?),
                                payload: row.get::<_, Vec<u8>>(4)?.into(),
                            },
                            stored_ms: row.get(5)?,
                        });
                    }
                }
                let until = now + millis(consumer.ack_wait);
                for claimed in &messages {
                    c.prepare_cached(
                        "UPDATE queue SET available_ms = ?3, delivered = ?4 WHERE consumer = ?1 AND seq = ?2",
                    )?
                    .execute(params![consumer.id, claimed.sequence, until, claimed.delivered])?;
                }
                let next: Option<u64> = c
                    .prepare_cached("SELECT min(available_ms) FROM queue WHERE consumer = ?1")?
                    .query_row([consumer.id], |row| row.get(0))?;
                Ok((messages, next))
            })
            .await?;
        let (messages, next) = claim;
        Ok(Claim { messages, next: next.map(|at| Duration::from_millis(at.saturating_sub(now_ms()).max(1))) })
    }

    pub async fn settle(&self, consumer: &ConsumerHandle, sequence: u64, outcome: Outcome) -> Result<()> {
        let handle = consumer.clone();
        let now = now_ms();
        self.journal
            .write(move |c| {
                let move_to = |at: u64| -> rusqlite::Result<()> {
                    c.prepare_cached("UPDATE queue SET available_ms = ?3 WHERE consumer = ?1 AND seq = ?2")?
                        .execute(params![handle.id, sequence, at])?;
                    Ok(())
                };
                match outcome {
                    Outcome::Nak(delay) => move_to(now + millis(delay)),
                    Outcome::InProgress => move_to(now + millis(handle.ack_wait)),
                    Outcome::Ack | Outcome::Term => {
                        c.prepare_cached("DELETE FROM queue WHERE consumer = ?1 AND seq = ?2")?
                            .execute(params![handle.id, sequence])?;
                        if handle.retention == Retention::WorkQueue {
                            c.prepare_cached("DELETE FROM messages WHERE stream = ?1 AND seq = ?2")?
                                .execute(params![handle.stream, sequence])?;
                        }
                        Ok(())
                    }
                }
            })
            .await?;
        consumer.work.notify_waiters();
        Ok(())
    }

    pub async fn stream_info(&self, stream: &str) -> Result<StreamInfo> {
        let name = stream.to_string();
        let known = self.streams.read().get(stream).cloned().ok_or_else(|| Error::NoStream(name.clone()))?;
        let consumers = known.consumers.read().clone();
        let info = self
            .journal
            .read(move |c| {
                let (messages, bytes) = c
                    .prepare_cached(
                        "SELECT count(*), coalesce(sum(length(payload)), 0) FROM messages WHERE stream = ?1",
                    )?
                    .query_row([name], |row| Ok((row.get(0)?, row.get(1)?)))?;
                let mut info = StreamInfo { messages, bytes, consumers: Vec::new() };
                for consumer in consumers {
                    let pending = c
                        .prepare_cached("SELECT count(*) FROM queue WHERE consumer = ?1")?
                        .query_row([consumer.id], |row| row.get(0))?;
                    info.consumers.push((consumer.name, pending));
                }
                Ok(info)
            })
            .await?;
        Ok(info)
    }

    pub async fn declare_kv(&self, bucket: &'static str, max_age: Duration) -> Result<()> {
        self.buckets.write().insert(bucket, max_age);
        Ok(())
    }

    fn bucket(&self, bucket: &str) -> Result<Duration> {
        let missing = || Error::Storage(format!("bucket {bucket} is not declared"));
        self.buckets.read().get(bucket).copied().ok_or_else(missing)
    }

    pub async fn kv_put(&self, bucket: &str, key: &str, value: Bytes, expected: Option<u64>) -> Result<u64> {
        let since = now_ms().saturating_sub(millis(self.bucket(bucket)?));
        let (bucket, name) = (bucket.to_string(), key.to_string());
        let revision = self
            .journal
            .write(move |c| {
                if let Some(expected) = expected {
                    let current = kv_read(c, &bucket, &name, since)?.map_or(0, |(_, revision)| revision);
                    if current != expected {
                        return Ok(None);
                    }
                }
                let revision: u64 = c
                    .prepare_cached("UPDATE revisions SET last = last + 1 RETURNING last")?
                    .query_row([], |row| row.get(0))?;
                c.prepare_cached("INSERT OR REPLACE INTO kv VALUES (?1, ?2, ?3, ?4, ?5)")?.execute(params![
                    bucket,
                    name,
                    &value[..],
                    revision,
                    now_ms()
                ])?;
                Ok(Some(revision))
            })
            .await?;
        revision.ok_or_else(|| Error::WrongRevision(key.into()))
    }

    pub async fn kv_get(&self, bucket: &str, key: &str) -> Result<Option<(Bytes, u64)>> {
        let since = now_ms().saturating_sub(millis(self.bucket(bucket)?));
        let (bucket, key) = (bucket.to_string(), key.to_string());
        Ok(self.journal.read(move |c| kv_read(c, &bucket, &key, since)).await?)
    }

    pub async fn health(&self) -> Result<()> {
        self.journal.write(|c| c.prepare_cached("UPDATE revisions SET last = last")?.execute([])).await?;
        Ok(())
    }

    pub async fn prune(&self) -> Result<()> {
        let now = now_ms();
        let streams: Vec<StreamConfig> = self.streams.read().values().map(|stream| stream.config.clone()).collect();
        let buckets: Vec<(&str, Duration)> = self.buckets.read().iter().map(|(name, age)| (*name, *age)).collect();
        self.journal
            .write(move |c| {
                for stream in streams {
                    let before = now.saturating_sub(millis(stream.max_age));
                    let old = c.execute(
                        "DELETE FROM messages WHERE stream = ?1 AND stored_ms < ?2",
                        params![stream.name, before],
                    )?;
                    let over = if stream.retention == Retention::Limits { prune_bytes(c, &stream)? } else { 0 };
                    if old + over > 0 {
                        c.execute(
                            "DELETE FROM queue WHERE consumer IN (SELECT id FROM consumers WHERE stream = ?1)
                             AND seq NOT IN (SELECT seq FROM messages WHERE stream = ?1)",
                            [stream.name],
                        )?;
                    }
                    let before = now.saturating_sub(millis(stream.dedup_window));
                    c.execute("DELETE FROM dedup WHERE stream = ?1 AND at_ms < ?2", params![stream.name, before])?;
                }
                for (bucket, max_age) in buckets {
                    let before = now.saturating_sub(millis(max_age));
                    c.execute("DELETE FROM kv WHERE bucket = ?1 AND at_ms < ?2", params![bucket, before])?;
                }
                Ok(())
            })
            .await?;
        Ok(())
    }
}

/// Drops the oldest messages of a stream that holds more than its bytes.
fn prune_bytes(c: &Connection, stream: &StreamConfig) -> rusqlite::Result<usize> {
    let keep_from: Option<u64> = c
        .query_row(
            "SELECT seq FROM (SELECT seq, sum(length(payload)) OVER (ORDER BY seq DESC) AS newer FROM messages
             WHERE stream = ?1) WHERE newer > ?2 ORDER BY seq DESC LIMIT 1",
            params![stream.name, stream.max_bytes],
            |row| row.get(0),
        )
        .optional()?;
    match keep_from {
        Some(seq) => c.execute("DELETE FROM messages WHERE stream = ?1 AND seq <= ?2", params![stream.name, seq]),
        None => Ok(0),
    }
}

fn kv_read(c: &Connection, bucket: &str, key: &str, since: u64) -> rusqlite::Result<Option<(Bytes, u64)>> {
    c.prepare_cached("SELECT value, revision FROM kv WHERE bucket = ?1 AND key = ?2 AND at_ms >= ?3")?
        .query_row(params![bucket, key, since], |row| Ok((row.get::<_, Vec<u8>>(0)?.into(), row.get(1)?)))
        .optional()
}

fn render_headers(headers: &Headers) -> String {
    let pairs: Vec<(&str, &str)> = headers.iter().collect();
    serde_json::to_string(&pairs).expect("strings are JSON")
}

fn parse_headers(text: &str) -> Headers {
    let pairs: Vec<(String, String)> = serde_json::from_str(text).unwrap_or_default();
    pairs.into_iter().fold(Headers::new(), |headers, (name, value)| headers.with(name, value))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX / 4)
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis)
}
