//! The embedded bus: subjects in memory, streams and buckets in one SQLite file under the data directory.

mod consumer;
mod engine;
mod migrate;
mod record;
mod state;
mod store;
pub(crate) mod subjects;

use crate::streams::Sizes;
use crate::{
    Acker, Appended, BucketConfig, Bus, BusApi, Consumer, ConsumerConfig, Delivery, Error, Fill, Headers, Incomplete,
    Message, Places, Result, StreamConfig, StreamInfo, Subscription, Write, Written,
};
use async_trait::async_trait;
use bytes::Bytes;
pub(crate) use consumer::Settle;
pub use journal::Durability;
use state::{NewMessage, Put, Step, Taken};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use store::Store;
use subjects::Subjects;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// How often expired messages, message ids and bucket entries are deleted.
const PRUNE_INTERVAL: Duration = Duration::from_secs(10);
/// How often the consumers' cursors are recorded. A delivery within the last interval may not count after a crash.
const FLUSH_INTERVAL: Duration = Duration::from_millis(100);

pub struct Local {
    subjects: Arc<Subjects>,
    store: Arc<Store>,
    sizes: Sizes,
    tasks: TaskTracker,
    cancel: CancellationToken,
    /// Never changes, because this bus cannot be away.
    interruptions: watch::Sender<u64>,
    /// Ends the background tasks when the last handle is dropped.
    _end: DropGuard,
}

impl Local {
    /// Opens the bus in the directory `dir`. Only one process may use it at a time. Acknowledged writes survive a
    /// crash of the process.
    pub async fn open(dir: &Path) -> Result<Bus> {
        Self::open_with(dir, Durability::Process, Sizes::default()).await
    }

    pub async fn open_with(dir: &Path, durability: Durability, sizes: Sizes) -> Result<Bus> {
        let path = dir.join("bus.db");
        let store = tokio::task::spawn_blocking(move || Store::open(&path, durability))
            .await
            .map_err(|e| Error::Storage(e.to_string()))??;
        let store = Arc::new(store);

        let cancel = CancellationToken::new();
        let tasks = TaskTracker::new();
        tasks.spawn(tend(store.clone(), cancel.clone()));
        Ok(Arc::new(Self {
            subjects: Arc::new(Subjects::default()),
            store,
            sizes,
            tasks,
            _end: cancel.clone().drop_guard(),
            cancel,
            interruptions: watch::Sender::default(),
        }))
    }
}

/// Prunes the store and records cursors, periodically, until cancelled.
async fn tend(store: Arc<Store>, cancel: CancellationToken) {
    let mut prune = tokio::time::interval(PRUNE_INTERVAL);
    let mut flush = tokio::time::interval(FLUSH_INTERVAL);
    loop {
        let tended = tokio::select! {
            () = cancel.cancelled() => return,
            _ = prune.tick() => store.prune().await,
            _ = flush.tick() => store.flush_cursors().await,
        };
        if let Err(error) = tended {
            tracing::warn!(%error, "cannot prune the streams or record cursors; retrying later");
        }
    }
}

#[async_trait]
impl BusApi for Local {
    async fn publish(&self, message: Message) -> Result<()> {
        check(&message)?;
        self.subjects.publish(message);
        Ok(())
    }

    async fn subscribe(&self, subject: &str, queue: Option<&str>, capacity: usize) -> Result<Subscription> {
        subjects::check_pattern(subject)?;
        Ok(self.subjects.subscribe(subject, queue, capacity))
    }

    async fn request(&self, subject: &str, headers: Headers, payload: Bytes, deadline: Duration) -> Result<Message> {
        let message = Message { subject: subject.into(), reply: None, headers, payload };
        check(&message)?;
        self.subjects.request(message, deadline).await
    }

    async fn declare_stream(&self, stream: StreamConfig) -> Result<()> {
        self.store.declare_stream(stream).await
    }

    async fn add_subjects(&self, stream: &'static str, subjects: &[String]) -> Result<()> {
        self.store.add_subjects(stream, subjects)
    }

    async fn retire(&self, stream: &'static str, consumer: &str) -> Result<bool> {
        self.store.retire(stream, consumer).await
    }

    async fn append(&self, message: Message, msg_id: Option<&str>) -> Result<Appended> {
        check(&message)?;
        let appended = self.store.append(&message, msg_id).await?;
        if !appended.duplicate {
            self.subjects.publish(message);
        }
        Ok(appended)
    }

    async fn write(&self, writes: Vec<Write<'_>>) -> Result<Vec<Written>, Incomplete> {
        let steps: Vec<Step> = writes
            .iter()
            .filter_map(|write| self.step(write).transpose())
            .collect::<Result<_>>()?;
        let mut taken = self.store.write(steps).await?.into_iter();

        let written = writes.into_iter().map(|write| {
            if let Write::Publish { message } = write {
                self.subjects.publish(message);
                return Written::Published;
            }
            match taken.next().expect("every other write is a step") {
                Taken::Put { revision } => Written::Put { revision },
                Taken::Appended(appended) => {
                    if let (Write::Append { message, .. }, false) = (write, appended.duplicate) {
                        self.store.wake(&message.subject);
                        self.subjects.publish(message);
                    }
                    Written::Appended(appended)
                }
                Taken::Acked { wakes } => {
                    if let (Write::Ack(Delivery { acker: Acker::Local(settle), .. }), true) = (write, wakes) {
                        settle.wake_consumers();
                    }
                    Written::Acked
                }
            }
        });
        Ok(written.collect())
    }

    async fn consume_within(&self, config: ConsumerConfig, places: &Places) -> Result<Consumer> {
        consumer::start(self.store.clone(), config, places, &self.tasks, &self.cancel).await
    }

    async fn seen(&self, stream: &'static str, msg_id: &str) -> Result<bool> {
        self.store.seen(stream, msg_id).await
    }

    async fn time_ms(&self, _stream: &str) -> Result<u64> {
        Ok(crate::clock::unix_ms())
    }

    fn is_atomic(&self) -> bool {
        true
    }

    async fn stream_info(&self, stream: &str) -> Result<StreamInfo> {
        self.store.stream_info(stream).await
    }

    async fn declare_bucket(&self, bucket: BucketConfig) -> Result<()> {
        self.store.declare_bucket(bucket).await
    }

    async fn fills(&self) -> Result<Vec<Fill>> {
        self.store.fills().await
    }

    fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    async fn kv_put(&self, bucket: &str, key: &str, value: Bytes, expected: Option<u64>) -> Result<u64> {
        check_size(value.len())?;
        self.store.kv_put(bucket, key, value, expected).await
    }

    async fn kv_get(&self, bucket: &str, key: &str) -> Result<Option<(Bytes, u64)>> {
        self.store.kv_get(bucket, key).await
    }

    fn interruptions(&self) -> watch::Receiver<u64> {
        self.interruptions.subscribe()
    }

    async fn health(&self) -> Result<()> {
        self.store.health().await
    }

    fn describe(&self) -> String {
        "local".into()
    }
}

impl Local {
    /// The store's step for this write; `None` if it stores nothing.
    fn step(&self, write: &Write<'_>) -> Result<Option<Step>> {
        match write {
            Write::Put { bucket, key, value, expected, done } => {
                check_size(value.len())?;
                let (bucket, key) = (bucket.to_string(), key.clone());
                let value = value.clone();
                Ok(Some(Step::Put(Put { bucket, key, value, expected: *expected, done: Some(*done) })))
            }
            Write::Append { message, msg_id } => {
                check(message)?;
                let stream = self.store.stream_name(&message.subject)?;
                Ok(Some(Step::Append { stream, message: NewMessage::new(message, *msg_id) }))
            }
            Write::Publish { message } => check(message).map(|()| None),
            Write::Ack(delivery) => match &delivery.acker {
                Acker::Local(settle) => Ok(Some(settle.step())),
                Acker::Nats(_) => Err(Error::Storage("the delivery belongs to another bus".into())),
            },
        }
    }
}

fn check(message: &Message) -> Result<()> {
    check_size(message.payload.len())?;
    subjects::check_subject(&message.subject)
}

fn check_size(size: usize) -> Result<()> {
    let max = wire::limits::BUS_MESSAGE_MAX;
    if size > max {
        Err(Error::TooLarge { size, max })
    } else {
        Ok(())
    }
}
