//! Streams, consumers and buckets in SQLite. All state is in rows, so a crash at any point leaves it consistent.
//!
//! The table `queue` holds one row per consumer and unsettled message, with the time when the message is next
//! available. A delivery moves that time ahead by `ack_wait`, and an ack deletes the row. A message that is not settled
//! becomes available again when its time comes. These times come from the process's monotonic clock, so changes of the
//! system time do not affect redelivery.

use super::prune;
use super::subjects::matches;
use crate::{Appended, ConsumerConfig, Error, Headers, Message, Outcome, Result, Retention, StreamConfig, StreamInfo};
use bytes::Bytes;
use journal::Journal;
use parking_lot::RwLock;
use rusqlite::{Connection, OptionalExtension, params};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS messages (
    stream TEXT NOT NULL, seq INTEGER NOT NULL, subject TEXT NOT NULL, headers TEXT NOT NULL, payload BLOB NOT NULL,
    stored_ms INTEGER NOT NULL, PRIMARY KEY (stream, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sequences (stream TEXT PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dedup (
    stream TEXT NOT NULL, msg_id TEXT NOT NULL, seq INTEGER NOT NULL, at_ms INTEGER NOT NULL,
    PRIMARY KEY (stream, msg_id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS dedup_age ON dedup (stream, at_ms);
CREATE TABLE IF NOT EXISTS consumers (
    id INTEGER PRIMARY KEY, stream TEXT NOT NULL, name TEXT NOT NULL, filter TEXT, UNIQUE (stream, name));
CREATE TABLE IF NOT EXISTS queue (
    consumer INTEGER NOT NULL, seq INTEGER NOT NULL, available_ms INTEGER NOT NULL, delivered INTEGER NOT NULL,
    PRIMARY KEY (consumer, seq)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS queue_available ON queue (consumer, available_ms);
CREATE TABLE IF NOT EXISTS kv (
    bucket TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, revision INTEGER NOT NULL, at_ms INTEGER NOT NULL,
    PRIMARY KEY (bucket, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS kv_age ON kv (bucket, at_ms);
CREATE TABLE IF NOT EXISTS sizes (stream TEXT PRIMARY KEY, messages INTEGER NOT NULL, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS message_came AFTER INSERT ON messages BEGIN
    UPDATE sizes SET messages = messages + 1, bytes = bytes + length(NEW.payload) WHERE stream = NEW.stream;
END;
CREATE TRIGGER IF NOT EXISTS message_left AFTER DELETE ON messages BEGIN
    UPDATE sizes SET messages = messages - 1, bytes = bytes - length(OLD.payload) WHERE stream = OLD.stream;
    DELETE FROM queue WHERE consumer IN (SELECT id FROM consumers WHERE stream = OLD.stream) AND seq = OLD.seq;
END;
CREATE TABLE IF NOT EXISTS revisions (one INTEGER PRIMARY KEY CHECK (one = 1), last INTEGER NOT NULL);
INSERT OR IGNORE INTO revisions VALUES (1, 0);
";

pub struct Store {
    journal: Journal,
    streams: RwLock<HashMap<&'static str, Arc<Stream>>>,
    /// And how long their entries live, if not for ever.
    buckets: RwLock<HashMap<&'static str, Option<Duration>>>,
    opened: Instant,
}

struct Stream {
    config: StreamConfig,
    /// Notified when a message may have become available.
    work: Arc<Notify>,
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
    /// How long until the next outstanding delivery becomes available again; `None` if there is none.
    pub next: Option<Duration>,
}

impl From<journal::Error> for Error {
    fn from(error: journal::Error) -> Self {
        Error::Storage(error.to_string())
    }
}

impl Store {
    pub fn open(path: &Path) -> Result<Self> {
        let journal = Journal::open(path, SCHEMA)?;
        Ok(Self { journal, streams: RwLock::default(), buckets: RwLock::default(), opened: Instant::now() })
    }

    /// Milliseconds since the store was opened, starting at 1. A row at 0 is available at any time.
    fn clock_ms(&self) -> u64 {
        millis(self.opened.elapsed()) + 1
    }

    /// Makes all unsettled messages available again, because the process that held their deliveries has ended.
    pub async fn recover(&self) -> Result<()> {
        self.journal.write(|c| c.execute("UPDATE queue SET available_ms = 0", [])).await?;
        Ok(())
    }

    pub async fn declare_stream(&self, config: StreamConfig) -> Result<()> {
        let name = config.name;
        self.journal
            .write(move |c| {
                c.execute("INSERT OR IGNORE INTO sequences VALUES (?1, 0)", [name])?;
                let counted = c.prepare("SELECT 1 FROM sizes WHERE stream = ?1")?.exists([name])?;
                if !counted {
                    c.execute(
                        "INSERT INTO sizes SELECT ?1, count(*), coalesce(sum(length(payload)), 0) FROM messages
                         WHERE stream = ?1",
                        [name],
                    )?;
                }
                Ok(())
            })
            .await?;

        let mut streams = self.streams.write();
        // Consumers of an earlier declaration wait on its notification, so it is kept.
        let work = streams.get(name).map_or_else(Default::default, |earlier| earlier.work.clone());
        streams.insert(name, Arc::new(Stream { config, work }));
        Ok(())
    }

    /// The stream that takes the subject.
    fn stream_of(&self, subject: &str) -> Result<Arc<Stream>> {
        let streams = self.streams.read();
        let takes = |stream: &&Arc<Stream>| stream.config.subjects.iter().any(|pattern| matches(pattern, subject));
        streams.values().find(takes).cloned().ok_or_else(|| Error::NoStream(subject.into()))
    }

    pub async fn append(&self, message: &Message, msg_id: Option<&str>) -> Result<Appended> {
        let stream = self.stream_of(&message.subject)?;
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
                        return Ok(Some(Appended { sequence, duplicate: true }));
                    }
                }

                if config.retention == Retention::WorkQueue && is_full(c, &config, message.payload.len() as u64)? {
                    return Ok(None);
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

                // Consumers are read within the write. A consumer that is created concurrently receives the message
                // either from here or from its own start.
                let mut consumers = c.prepare_cached("SELECT id, filter FROM consumers WHERE stream = ?1")?;
                let mut consumers = consumers.query([config.name])?;
                while let Some(row) = consumers.next()? {
                    let (consumer, filter): (i64, Option<String>) = (row.get(0)?, row.get(1)?);
                    if filter.is_none_or(|filter| matches(&filter, &message.subject)) {
                        c.prepare_cached("INSERT INTO queue VALUES (?1, ?2, 0, 0)")?
                            .execute(params![consumer, sequence])?;
                    }
                }
                Ok(Some(Appended { sequence, duplicate: false }))
            })
            .await?;

        let (name, max) = (stream.config.name, stream.config.max_bytes);
        let appended = appended.ok_or_else(|| {
            Error::Storage(format!("stream {name} is full ({max} bytes); its consumers are behind, retry later"))
        })?;
        stream.work.notify_waiters();
        Ok(appended)
    }

    pub async fn consumer(&self, config: &ConsumerConfig) -> Result<ConsumerHandle> {
        let missing = || Error::NoStream(config.stream.into());
        let stream = self.streams.read().get(config.stream).cloned().ok_or_else(missing)?;
        let (name, filter) = (config.name.clone(), config.filter.clone());
        // A work queue holds only messages that are still to be delivered, so its consumers start with all of them.
        let from_start = config.from_start || stream.config.retention == Retention::WorkQueue;
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
                    c.execute("UPDATE consumers SET filter = ?2 WHERE id = ?1", params![id, filter])?;
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

        Ok(ConsumerHandle {
            id,
            stream: config.stream,
            ack_wait: config.ack_wait,
            max_ack_pending: config.max_ack_pending,
            work: stream.work.clone(),
            retention: stream.config.retention,
        })
    }

    /// Claims up to `max` available messages for `ack_wait`. Their delivery counts are stored before the delivery.
    pub async fn claim(&self, consumer: &ConsumerHandle, max: usize) -> Result<Claim> {
        let consumer = consumer.clone();
        let now = self.clock_ms();
        let claim = self
            .journal
            .write(move |c| {
                // Outstanding deliveries count against `max_ack_pending`.
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

                // Only outstanding deliveries count: available messages beyond the limit wait until one is settled.
                let next: Option<u64> = c
                    .prepare_cached("SELECT min(available_ms) FROM queue WHERE consumer = ?1 AND available_ms > ?2")?
                    .query_row(params![consumer.id, now], |row| row.get(0))?;
                Ok((messages, next))
            })
            .await?;

        let (messages, next) = claim;
        Ok(Claim { messages, next: next.map(|at| Duration::from_millis(at.saturating_sub(self.clock_ms()).max(1))) })
    }

    /// Settles a delivery: deletes its row or sets the time of its redelivery.
    pub async fn settle(&self, consumer: &ConsumerHandle, sequence: u64, outcome: Outcome) -> Result<()> {
        let handle = consumer.clone();
        let now = self.clock_ms();
        self.journal
            .write(move |c| {
                let move_to = |at: u64| -> rusqlite::Result<()> {
                    c.prepare_cached("UPDATE queue SET available_ms = ?3 WHERE consumer = ?1 AND seq = ?2")?
                        .execute(params![handle.id, sequence, at])?;
                    Ok(())
                };

                match outcome {
                    Outcome::Nak(delay) => move_to(now.saturating_add(millis(delay))),
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

        // A nak without delay is available now, and any settlement may make room under `max_ack_pending`.
        consumer.work.notify_waiters();
        Ok(())
    }

    pub async fn stream_info(&self, stream: &str) -> Result<StreamInfo> {
        if !self.streams.read().contains_key(stream) {
            return Err(Error::NoStream(stream.into()));
        }

        let name = stream.to_string();
        let info = self
            .journal
            .read(move |c| {
                let (messages, bytes) = c
                    .prepare_cached("SELECT messages, bytes FROM sizes WHERE stream = ?1")?
                    .query_row([&name], |row| Ok((row.get(0)?, row.get(1)?)))?;
                let mut consumers = c.prepare_cached(
                    "SELECT name, (SELECT count(*) FROM queue WHERE consumer = id) FROM consumers WHERE stream = ?1",
                )?;
                let consumers = consumers.query_map([&name], |row| Ok((row.get(0)?, row.get(1)?)))?;
                Ok(StreamInfo { messages, bytes, consumers: consumers.collect::<rusqlite::Result<_>>()? })
            })
            .await?;
        Ok(info)
    }

    pub async fn declare_kv(&self, bucket: &'static str, max_age: Option<Duration>) -> Result<()> {
        self.buckets.write().insert(bucket, max_age);
        Ok(())
    }

    /// Entries of the bucket that were written before this time have gone.
    fn live_since(&self, bucket: &str) -> Result<u64> {
        let missing = || Error::Storage(format!("bucket {bucket} is not declared"));
        let max_age = self.buckets.read().get(bucket).copied().ok_or_else(missing)?;
        Ok(max_age.map_or(0, |max_age| now_ms().saturating_sub(millis(max_age))))
    }

    pub async fn kv_put(&self, bucket: &str, key: &str, value: Bytes, expected: Option<u64>) -> Result<u64> {
        let since = self.live_since(bucket)?;
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
        let since = self.live_since(bucket)?;
        let (bucket, key) = (bucket.to_string(), key.to_string());
        Ok(self.journal.read(move |c| kv_read(c, &bucket, &key, since)).await?)
    }

    /// Runs an empty write through a full commit.
    pub async fn health(&self) -> Result<()> {
        self.journal.write(|c| c.prepare_cached("UPDATE revisions SET last = last")?.execute([])).await?;
        Ok(())
    }

    /// Deletes what has expired, in batches, so that other writes run in between.
    pub async fn prune(&self) -> Result<()> {
        let now = now_ms();
        loop {
            let streams: Vec<_> = self.streams.read().values().map(|stream| stream.config.clone()).collect();
            let buckets: Vec<_> = self.buckets.read().iter().filter_map(|(name, age)| Some((*name, (*age)?))).collect();
            if !self.journal.write(move |c| prune::some(c, &streams, &buckets, now)).await? {
                return Ok(());
            }
        }
    }
}

/// Whether `more` bytes would take the stream over its limit.
fn is_full(c: &Connection, stream: &StreamConfig, more: u64) -> rusqlite::Result<bool> {
    let bytes: u64 =
        c.prepare_cached("SELECT bytes FROM sizes WHERE stream = ?1")?.query_row([stream.name], |row| row.get(0))?;
    Ok(bytes.saturating_add(more) > stream.max_bytes)
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

/// Whole milliseconds. A duration out of range becomes `u64::MAX / 4`, which leaves room for additions.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX / 4)
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(retention: Retention) -> StreamConfig {
        StreamConfig {
            name: "S",
            subjects: vec!["s.>".into()],
            retention,
            max_age: Duration::from_secs(3600),
            max_bytes: 50_000,
            dedup_window: Duration::from_secs(3600),
        }
    }

    fn reader(name: &str, max_ack_pending: usize) -> ConsumerConfig {
        ConsumerConfig {
            stream: "S",
            name: name.into(),
            filter: None,
            ack_wait: Duration::from_secs(30),
            max_ack_pending,
            max_in_hand: 100,
            from_start: true,
        }
    }

    fn message(payload: &str) -> Message {
        Message { subject: "s.a".into(), payload: payload.to_string().into(), ..Message::default() }
    }

    async fn open(retention: Retention) -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("bus.db")).unwrap();
        store.declare_stream(config(retention)).await.unwrap();
        (dir, store)
    }

    async fn count(store: &Store, table: &'static str) -> u64 {
        let sql = format!("SELECT count(*) FROM {table}");
        store.journal.read(move |c| c.query_row(&sql, [], |row| row.get(0))).await.unwrap()
    }

    #[tokio::test]
    async fn expired_and_excess_rows_are_pruned_from_every_table() {
        let (_dir, store) = open(Retention::Limits).await;
        store.declare_kv("B", Some(Duration::from_secs(3600))).await.unwrap();
        store.consumer(&reader("c", 10)).await.unwrap();
        for n in 0..3000_u32 {
            store.append(&message(&"x".repeat(100)), Some(&n.to_string())).await.unwrap();
        }
        store.declare_kv("F", None).await.unwrap();
        store.kv_put("B", "key", "value".into(), None).await.unwrap();
        store.kv_put("F", "key", "value".into(), None).await.unwrap();
        store.prune().await.unwrap();
        let info = store.stream_info("S").await.unwrap();
        assert_eq!((info.messages, info.bytes), (500, 50_000));
        assert_eq!(info.consumers, [("c".to_string(), 500)], "deleted messages leave the backlog");
        assert_eq!(count(&store, "dedup").await, 3000, "ids of deleted messages still deduplicate");

        let aged = |c: &Connection| {
            c.execute_batch("UPDATE messages SET stored_ms = 1; UPDATE dedup SET at_ms = 1; UPDATE kv SET at_ms = 1")
        };
        store.journal.write(aged).await.unwrap();
        store.prune().await.unwrap();
        let info = store.stream_info("S").await.unwrap();
        assert_eq!((info.messages, info.bytes), (0, 0));
        for table in ["messages", "queue", "dedup"] {
            assert_eq!(count(&store, table).await, 0, "{table}");
        }
        assert_eq!(count(&store, "kv").await, 1, "a bucket without an age keeps its entries");
        assert!(store.kv_get("F", "key").await.unwrap().is_some());
    }

    #[tokio::test]
    async fn consumer_at_max_ack_pending_waits_for_a_settlement() {
        let (_dir, store) = open(Retention::WorkQueue).await;
        let handle = store.consumer(&reader("c", 2)).await.unwrap();
        for n in 0..5 {
            store.append(&message(&n.to_string()), None).await.unwrap();
        }

        assert_eq!(store.claim(&handle, 10).await.unwrap().messages.len(), 2);
        let nothing = store.claim(&handle, 10).await.unwrap();
        assert!(nothing.messages.is_empty());
        assert!(
            nothing.next.unwrap() > Duration::from_secs(25),
            "the consumer does not poll again at once: {:?}",
            nothing.next
        );
    }

    #[tokio::test]
    async fn redeclared_stream_keeps_its_consumers() {
        let (_dir, store) = open(Retention::WorkQueue).await;
        let handle = store.consumer(&reader("c", 10)).await.unwrap();
        store.declare_stream(config(Retention::WorkQueue)).await.unwrap();
        store.append(&message("1"), None).await.unwrap();
        assert_eq!(store.claim(&handle, 10).await.unwrap().messages.len(), 1);
    }

    #[tokio::test]
    async fn consumer_created_during_appends_misses_no_message() {
        let (_dir, store) = open(Retention::WorkQueue).await;
        let store = Arc::new(store);
        let appends = (0..400).map(|n: u32| {
            let store = store.clone();
            tokio::spawn(async move { store.append(&message(&n.to_string()), None).await.unwrap() })
        });
        let appends: Vec<_> = appends.collect();
        store.consumer(&reader("c", 1000)).await.unwrap();

        for append in appends {
            append.await.unwrap();
        }
        assert_eq!(store.stream_info("S").await.unwrap().consumers, [("c".to_string(), 400)]);
    }
}
