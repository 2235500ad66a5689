//! The handle to the embedded bus's streams, consumers and buckets: it turns calls into operations of the engine.

use super::engine::{Engine, Stores, Values};
use super::record::Group;
use super::state::{NewMessage, Put, State, Step, Taken, millis};
use super::subjects::matches;
use crate::clock::unix_ms;
use crate::pattern::{overlap, union};
use crate::{Appended, BucketConfig, ConsumerConfig, Error, Fill, Message, Outcome, Result, StreamConfig, StreamInfo};
use bytes::Bytes;
use journal::{Durability, Log, Options};
use parking_lot::RwLock;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A cheap handle to the engine. The engine's thread ends when the last handle is dropped.
pub struct Store {
    engine: Engine,
    streams: RwLock<HashMap<&'static str, Arc<Stream>>>,
    /// Whether a consumer's cursor has advanced beyond the one in the log.
    unflushed: AtomicBool,
    opened: Instant,
}

struct Stream {
    subjects: Vec<String>,
    readers: Arc<Readers>,
}

/// The consumers of a stream, by name: their filters, and what is notified when messages become available.
#[derive(Default)]
struct Readers(RwLock<HashMap<String, (Option<String>, Arc<Notify>)>>);

impl Readers {
    fn add(&self, config: &ConsumerConfig) -> Arc<Notify> {
        let mut readers = self.0.write();
        let (filter, work) = readers.entry(config.name.clone()).or_default();
        filter.clone_from(&config.filter);
        work.clone()
    }

    /// Wakes those that read the subject.
    fn wake(&self, subject: &str) {
        for (filter, work) in self.0.read().values() {
            if filter.as_deref().is_none_or(|filter| matches(filter, subject)) {
                work.notify_waiters();
            }
        }
    }
}

/// A handle to a consumer, for its pump and its deliveries.
#[derive(Clone)]
pub struct ConsumerHandle {
    pub config: Arc<ConsumerConfig>,
    pub work: Arc<Notify>,
}

pub struct Claimed {
    pub message: Message,
    pub sequence: u64,
    pub delivered: u32,
    pub stored_ms: u64,
}

pub struct Claim {
    pub messages: Vec<Claimed>,
    /// When to claim again, unless notified earlier: the time until the next redelivery is due.
    pub next: Option<Duration>,
}

impl From<journal::Error> for Error {
    fn from(error: journal::Error) -> Self {
        Error::Storage(error.to_string())
    }
}

impl Store {
    /// Opens or creates the store. Blocks while the log is replayed.
    pub fn open(path: &Path, durability: Durability) -> Result<Self> {
        // Most values are read from memory. Of a backlog, which is read in order, a group is read once.
        let mut log = Log::open(path, Options { durability, compress: true })?;
        let stores = Stores::load(&mut log)?;
        Ok(Self {
            engine: Engine::start(log, stores)?,
            streams: RwLock::default(),
            unflushed: AtomicBool::new(false),
            opened: Instant::now(),
        })
    }

    /// Milliseconds of a monotonic clock, counted from 1.
    fn clock_ms(&self) -> u64 {
        millis(self.opened.elapsed()) + 1
    }

    /// Runs `operation` in the next commit and returns its answer after the commit. Dropping the future does not cancel
    /// a queued operation.
    async fn run<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut State, &mut Group) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.run_then(operation, |answer, _| Ok(answer)).await
    }

    /// As [`Store::run`]. After the commit, `read` completes the answer with values from the log.
    async fn run_then<T: Send + 'static, R: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut State, &mut Group) -> Result<T> + Send + 'static,
        read: impl FnOnce(T, &Values<'_>) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        let operation = move |stores: &mut Stores, group: &mut Group| operation(&mut stores.state, group);
        let read = move |outcome: Result<T>, stores: &Stores, log: &Log| {
            outcome.and_then(|done| read(done, &stores.values(log)))
        };
        self.engine.run(operation, read).await?
    }

    pub async fn declare_stream(&self, config: StreamConfig) -> Result<()> {
        let (name, subjects) = (config.name, config.subjects.clone());
        self.check_overlap(name, &subjects)?;
        self.run(move |state, group| {
            state.declare_stream(group, config);
            Ok(())
        })
        .await?;

        self.take_subjects(name, &subjects);
        Ok(())
    }

    pub fn add_subjects(&self, stream: &'static str, subjects: &[String]) -> Result<()> {
        if !self.streams.read().contains_key(stream) {
            return Err(Error::NoStream(stream.into()));
        }
        self.check_overlap(stream, subjects)?;
        self.take_subjects(stream, subjects);
        Ok(())
    }

    /// Deletes a consumer; see [`State::retire`].
    pub async fn retire(&self, stream: &'static str, consumer: &str) -> Result<bool> {
        let name = consumer.to_string();
        let retired = self.run(move |state, group| state.retire(group, stream, &name)).await?;
        let Some(filter) = retired else { return Ok(false) };

        let mut streams = self.streams.write();
        if let (Some(known), Some(filter)) = (streams.get(stream), filter) {
            let subjects = known.subjects.iter().filter(|subject| **subject != filter);
            let (subjects, readers) = (subjects.cloned().collect(), known.readers.clone());
            streams.insert(stream, Arc::new(Stream { subjects, readers }));
        }
        Ok(true)
    }

    /// Unites a stream's subjects with these. A known stream keeps its readers.
    fn take_subjects(&self, name: &'static str, subjects: &[String]) {
        let mut streams = self.streams.write();
        let (known, readers) = streams
            .get(name)
            .map_or_else(Default::default, |known| (known.subjects.clone(), known.readers.clone()));
        let subjects = union(&known, subjects);
        streams.insert(name, Arc::new(Stream { subjects, readers }));
    }

    /// Fails if another stream takes a subject of this one.
    fn check_overlap(&self, stream: &str, subjects: &[String]) -> Result<()> {
        let streams = self.streams.read();
        for (name, other) in streams.iter().filter(|(name, _)| **name != stream) {
            for (own, taken) in subjects
                .iter()
                .flat_map(|own| other.subjects.iter().map(move |taken| (own, taken)))
            {
                if overlap(own, taken) {
                    let text =
                        format!("cannot declare stream {stream}: its subject {own} overlaps {taken} of stream {name}");
                    return Err(Error::Storage(text));
                }
            }
        }
        Ok(())
    }

    pub async fn append(&self, message: &Message, msg_id: Option<&str>) -> Result<Appended> {
        let (name, readers) = self.stream_of(&message.subject)?;
        let new = NewMessage::new(message, msg_id);
        let now = unix_ms();
        let appended = self
            .run(move |state, group| state.append(group, name, &new, now))
            .await?;
        readers.wake(&message.subject);
        Ok(appended)
    }

    /// Whether the stream remembers the message id.
    pub async fn seen(&self, stream: &'static str, msg_id: &str) -> Result<bool> {
        let (id, now) = (super::state::hash_id(msg_id), unix_ms());
        self.run(move |state, _| state.seen(stream, id, now)).await
    }

    /// Carries out all steps in one commit, or none; see [`State::write`]. The caller notifies consumers with
    /// [`Store::wake`].
    pub async fn write(&self, steps: Vec<Step>) -> Result<Vec<Taken>> {
        let (now, clock) = (unix_ms(), self.clock_ms());
        self.run(move |state, group| state.write(group, &steps, now, clock))
            .await
    }

    /// Wakes the consumers that read `subject`.
    pub fn wake(&self, subject: &str) {
        if let Ok((_, readers)) = self.stream_of(subject) {
            readers.wake(subject);
        }
    }

    /// The name of the stream that stores `subject`.
    pub fn stream_name(&self, subject: &str) -> Result<&'static str> {
        self.stream_of(subject).map(|(name, _)| name)
    }

    fn stream_of(&self, subject: &str) -> Result<(&'static str, Arc<Readers>)> {
        let streams = self.streams.read();
        let takes = |stream: &Stream| stream.subjects.iter().any(|pattern| matches(pattern, subject));
        let found = streams.iter().find(|(_, stream)| takes(stream));
        found
            .map(|(name, stream)| (*name, stream.readers.clone()))
            .ok_or_else(|| Error::NoStream(subject.into()))
    }

    pub async fn consumer(&self, config: &ConsumerConfig) -> Result<ConsumerHandle> {
        let missing = || Error::NoStream(config.stream.into());
        let readers = self
            .streams
            .read()
            .get(config.stream)
            .map(|stream| stream.readers.clone())
            .ok_or_else(missing)?;

        let config = Arc::new(config.clone());
        let made = config.clone();
        self.run(move |state, group| state.consumer(group, &made)).await?;
        Ok(ConsumerHandle { work: readers.add(&config), config })
    }

    /// Claims up to `max` available messages for `ack_wait`.
    pub async fn claim(&self, consumer: &ConsumerHandle, max: usize) -> Result<Claim> {
        let config = consumer.config.clone();
        let now = self.clock_ms();
        let claim = move |state: &mut State, group: &mut Group| state.claim(group, &config, max, now);

        let (messages, next) = self
            .run_then(claim, |(claimed, next), values| {
                let messages = claimed.into_iter().map(|claimed| {
                    Ok(Claimed {
                        message: values.message(claimed.place)?,
                        sequence: claimed.sequence,
                        delivered: claimed.delivered,
                        stored_ms: claimed.stored_ms,
                    })
                });
                Ok((messages.collect::<Result<Vec<_>>>()?, next))
            })
            .await?;

        self.unflushed.fetch_or(!messages.is_empty(), Relaxed);
        Ok(Claim {
            messages,
            next: next.map(|at| Duration::from_millis(at.saturating_sub(self.clock_ms()).max(1))),
        })
    }

    pub async fn settle(&self, consumer: &ConsumerHandle, sequence: u64, outcome: Outcome) -> Result<()> {
        let config = consumer.config.clone();
        let now = self.clock_ms();
        let wakes = self
            .run(move |state, group| state.settle(group, &config, sequence, outcome, now))
            .await?;
        if wakes {
            consumer.work.notify_waiters();
        }
        Ok(())
    }

    pub async fn stream_info(&self, stream: &str) -> Result<StreamInfo> {
        if !self.streams.read().contains_key(stream) {
            return Err(Error::NoStream(stream.into()));
        }
        let name = stream.to_string();
        self.run(move |state, _| state.info(&name)).await
    }

    pub async fn declare_bucket(&self, bucket: BucketConfig) -> Result<()> {
        self.run(move |state, _| {
            state.declare_bucket(&bucket);
            Ok(())
        })
        .await
    }

    pub async fn fills(&self) -> Result<Vec<Fill>> {
        self.run(|state, _| Ok(state.fills())).await
    }

    pub async fn kv_put(&self, bucket: &str, key: &str, value: Bytes, expected: Option<u64>) -> Result<u64> {
        let put = Put { bucket: bucket.into(), key: key.into(), value, expected, done: None };
        match self.write(vec![Step::Put(put)]).await?[..] {
            [Taken::Put { revision }] => Ok(revision),
            _ => unreachable!("a put is taken as one"),
        }
    }

    pub async fn kv_get(&self, bucket: &str, key: &str) -> Result<Option<(Bytes, u64)>> {
        let (bucket, key) = (bucket.to_string(), key.to_string());
        let now = unix_ms();
        self.run_then(
            move |state, _| state.kv_get(&bucket, &key, now),
            |found, values| {
                found
                    .map(|(place, revision)| Ok((values.get(place)?, revision)))
                    .transpose()
            },
        )
        .await
    }

    /// Fails while the engine refuses operations: from a failed commit until the log is reopened. Only the next write
    /// notices a full disk.
    pub async fn health(&self) -> Result<()> {
        self.run(|_, _| Ok(())).await
    }

    /// Removes everything that has expired, and returns free pages to the file system.
    pub async fn prune(&self) -> Result<()> {
        let now = unix_ms();
        while self.run(move |state, group| Ok(state.prune(group, now))).await? {}
        self.run_then(|_, _| Ok(()), |(), values| values.give_back()).await
    }

    /// Records the consumers' cursors if they have advanced, so that messages that were delivered before a crash count
    /// as delivered.
    pub async fn flush_cursors(&self) -> Result<()> {
        if !self.unflushed.swap(false, Relaxed) {
            return Ok(());
        }
        self.run(|state, group| {
            state.flush_cursors(group);
            Ok(())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Retention;
    use journal::rusqlite::Connection;
    use parking_lot::Mutex;

    fn stream(retention: Retention) -> StreamConfig {
        StreamConfig::new("S", vec!["s.>".into()], retention)
    }

    fn reader(max_ack_pending: usize) -> ConsumerConfig {
        ConsumerConfig {
            stream: "S",
            name: "c".into(),
            filter: None,
            ack_wait: Duration::from_secs(30),
            max_ack_pending,
            max_in_hand: 100,
            from_start: true,
        }
    }

    fn message(payload: &str) -> Message {
        Message {
            subject: "s.a".into(),
            payload: payload.to_string().into(),
            ..Message::default()
        }
    }

    /// Opens a store; retries while the thread of a dropped store still holds the file.
    async fn open(dir: &Path) -> Store {
        let opened = Mutex::new(None);
        testkit::eventually(Duration::from_secs(20), || async {
            let store = Store::open(&dir.join("bus.db"), Durability::Process).ok();
            let done = store.is_some();
            *opened.lock() = store;
            done
        })
        .await;
        let store = opened.into_inner().expect("the store was opened");

        store.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
        let max_age = Some(Duration::from_secs(3600));
        store
            .declare_bucket(BucketConfig { name: "B", max_age, max_bytes: None })
            .await
            .unwrap();
        store
    }

    #[tokio::test]
    async fn consumer_at_its_pending_limit_waits_for_a_settlement() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).await;
        let handle = store.consumer(&reader(2)).await.unwrap();
        for n in 0..5 {
            store.append(&message(&n.to_string()), None).await.unwrap();
        }

        assert_eq!(store.claim(&handle, 10).await.unwrap().messages.len(), 2);
        let nothing = store.claim(&handle, 10).await.unwrap();
        assert!(nothing.messages.is_empty());
        assert!(nothing.next.unwrap() > Duration::from_secs(25), "next claim in {:?}", nothing.next);
    }

    #[tokio::test]
    async fn redeclared_stream_keeps_its_consumers() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).await;
        let handle = store.consumer(&reader(10)).await.unwrap();

        store.declare_stream(stream(Retention::WorkQueue)).await.unwrap();

        store.append(&message("1"), None).await.unwrap();
        assert_eq!(store.claim(&handle, 10).await.unwrap().messages.len(), 1);
    }

    #[tokio::test]
    async fn consumer_created_during_appends_misses_no_message() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(open(dir.path()).await);
        let appends = (0..400).map(|n: u32| {
            let store = store.clone();
            tokio::spawn(async move { store.append(&message(&n.to_string()), None).await.unwrap() })
        });
        let appends: Vec<_> = appends.collect();
        store.consumer(&reader(1000)).await.unwrap();

        for append in appends {
            append.await.unwrap();
        }
        assert_eq!(store.stream_info("S").await.unwrap().consumers, [("c".to_string(), 400)]);
    }

    /// The traffic is enough to begin snapshots, delete rows and evict values from the cache.
    #[tokio::test]
    async fn heavy_traffic_keeps_the_file_small_and_old_values_readable() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).await;
        let handle = store.consumer(&reader(100)).await.unwrap();
        store.kv_put("B", "old", "kept".into(), None).await.unwrap();
        store.append(&message("unsettled"), None).await.unwrap();
        let first = store.claim(&handle, 1).await.unwrap().messages.remove(0);

        let large = "x".repeat(100_000);
        for n in 0..1500 {
            store.append(&message(&large), Some(&n.to_string())).await.unwrap();
            let claimed = store.claim(&handle, 10).await.unwrap().messages;
            assert_eq!(claimed.len(), 1);
            store.settle(&handle, claimed[0].sequence, Outcome::Ack).await.unwrap();
        }

        let pages = std::fs::metadata(dir.path().join("bus.db")).unwrap().len();
        assert!(pages < 100 << 20, "the file has {pages} bytes after 150 MB of traffic");
        assert_eq!(store.kv_get("B", "old").await.unwrap().unwrap().0, "kept");

        drop(store);
        let store = open(dir.path()).await;
        assert_eq!(store.kv_get("B", "old").await.unwrap().unwrap().0, "kept");
        let info = store.stream_info("S").await.unwrap();
        assert_eq!((info.messages, info.consumers), (1, vec![("c".to_string(), 1)]));

        let handle = store.consumer(&reader(100)).await.unwrap();
        let again = store.claim(&handle, 10).await.unwrap().messages.remove(0);
        assert_eq!((again.sequence, again.delivered), (first.sequence, 2));
        assert_eq!(again.message.payload, "unsettled");
    }

    #[tokio::test]
    async fn full_disk_refuses_appends_and_keeps_acknowledged_messages() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).await;
        let limit = |pages: u32| {
            let pragma = format!("PRAGMA max_page_count = {pages}");
            store.run_then(
                |_, _| Ok(()),
                move |(), values| {
                    Ok(values
                        .log
                        .connection()
                        .execute_batch(&pragma)
                        .map_err(journal::Error::from)?)
                },
            )
        };

        limit(200).await.unwrap();
        let mut acknowledged = 0;
        // Does not become smaller by compression.
        let payload: String = (0..300).map(|_| uuid::Uuid::new_v4().to_string()).collect();
        let refused = loop {
            match store.append(&message(&payload), None).await {
                Ok(_) => acknowledged += 1,
                Err(error) => break error,
            }
            assert!(acknowledged < 1000, "the page limit was never reached");
        };
        assert!(refused.to_string().contains("full"), "{refused}");

        // The limit belongs to the connection, so the reopened log has none. No refused message is visible.
        testkit::eventually(Duration::from_secs(20), || async { store.health().await.is_ok() }).await;
        assert_eq!(store.stream_info("S").await.unwrap().messages, acknowledged);
        store.append(&message("more"), None).await.unwrap();

        drop(store);
        assert_eq!(open(dir.path()).await.stream_info("S").await.unwrap().messages, acknowledged + 1);
    }

    #[tokio::test]
    async fn outage_of_the_log_redelivers_no_outstanding_message() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).await;
        let ack_wait = Duration::from_secs(3);
        let config = ConsumerConfig { ack_wait, ..reader(10) };
        let handle = store.consumer(&config).await.unwrap();
        store.append(&message("held"), None).await.unwrap();

        // The file cannot grow, so the next commit fails before the log has the cursor of this delivery.
        let full = |(), values: &Values<'_>| {
            let limited = values.log.connection().execute_batch("PRAGMA max_page_count = 1");
            Ok(limited.map_err(journal::Error::from)?)
        };
        store.run_then(|_, _| Ok(()), full).await.unwrap();
        let held = store.claim(&handle, 1).await.unwrap().messages.remove(0);
        let large = message(&"x".repeat(1_000_000));
        assert!(store.append(&large, None).await.is_err());

        tokio::time::sleep(ack_wait + Duration::from_millis(500)).await;
        testkit::eventually(Duration::from_secs(20), || async { store.health().await.is_ok() }).await;
        let again = store.claim(&handle, 10).await.unwrap();
        assert!(
            again.messages.is_empty(),
            "the delivery is outstanding, and its deadline is postponed by the outage"
        );
        assert!(again.next.unwrap() <= ack_wait);

        store.settle(&handle, held.sequence, Outcome::Ack).await.unwrap();
        assert_eq!(store.stream_info("S").await.unwrap().messages, 0);

        // The sequence of the refused message is assigned again, and this message is delivered.
        store.append(&message("next"), None).await.unwrap();
        assert_eq!(store.claim(&handle, 10).await.unwrap().messages.len(), 1);
    }

    const OLDER: &str = r#"
        CREATE TABLE messages (stream TEXT, seq INTEGER, subject TEXT, headers TEXT, payload BLOB, stored_ms INTEGER);
        CREATE TABLE sequences (stream TEXT PRIMARY KEY, last INTEGER);
        CREATE TABLE dedup (stream TEXT, msg_id TEXT, seq INTEGER, at_ms INTEGER);
        CREATE TABLE consumers (id INTEGER PRIMARY KEY, stream TEXT, name TEXT, filter TEXT);
        CREATE TABLE queue (consumer INTEGER, seq INTEGER, available_ms INTEGER, delivered INTEGER);
        CREATE TABLE kv (bucket TEXT, key TEXT, value BLOB, revision INTEGER, at_ms INTEGER);
        CREATE TABLE sizes (stream TEXT PRIMARY KEY, messages INTEGER, bytes INTEGER);
        CREATE TABLE revisions (one INTEGER PRIMARY KEY, last INTEGER);
        INSERT INTO sequences VALUES ('S', 7);
        INSERT INTO messages VALUES ('S', 5, 's.a', '[["trace_id","t"]]', x'35', strftime('%s') * 1000),
            ('S', 7, 's.a', '[]', x'37', strftime('%s') * 1000);
        INSERT INTO dedup VALUES ('S', 'id-7', 7, strftime('%s') * 1000);
        INSERT INTO consumers VALUES (1, 'S', 'c', NULL);
        INSERT INTO queue VALUES (1, 5, 0, 2), (1, 7, 0, 0);
        INSERT INTO revisions VALUES (1, 41);
        INSERT INTO kv VALUES ('B', 'k', x'76', 41, strftime('%s') * 1000);
    "#;

    #[tokio::test]
    async fn older_format_is_migrated() {
        let dir = tempfile::tempdir().unwrap();
        Connection::open(dir.path().join("bus.db"))
            .unwrap()
            .execute_batch(OLDER)
            .unwrap();

        for opened in 1..=2 {
            let store = open(dir.path()).await;
            assert_eq!(store.kv_get("B", "k").await.unwrap(), Some(("v".into(), 41)), "{opened}");
            assert!(store.append(&message("7"), Some("id-7")).await.unwrap().duplicate);

            let handle = store.consumer(&reader(10)).await.unwrap();
            let claimed = store.claim(&handle, 10).await.unwrap().messages;
            let seen: Vec<_> = claimed
                .iter()
                .map(|c| (c.sequence, c.delivered, c.message.payload.clone()))
                .collect();

            let (first, second) = if opened == 1 { (3, 1) } else { (4, 2) };
            assert_eq!(seen, [(5, first, "5".into()), (7, second, "7".into())]);
            assert_eq!(claimed[0].message.headers.get("trace_id"), Some("t"));
        }

        let store = open(dir.path()).await;
        assert_eq!(store.append(&message("8"), None).await.unwrap().sequence, 8);
        assert_eq!(store.kv_put("B", "k", "w".into(), Some(41)).await.unwrap(), 42);
    }
}
