//! The message bus between the parts: publish/subscribe with queue groups, request/reply, durable streams, key-value.
//!
//! One trait has two implementations with the same semantics: [`local`] (embedded, one process) and [`nats`]. The
//! conformance suite in `tests/` runs against both.

pub mod assignments;
pub mod clock;
pub mod dead_letter;
pub mod fleet;
pub mod local;
pub mod nats;
mod pattern;
mod places;
pub mod streams;
pub mod tasks;

use async_trait::async_trait;
use bytes::Bytes;
pub use places::Places;
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A cheap handle; clone it for every user of the bus.
pub type Bus = Arc<dyn BusApi>;

/// Header pairs in order. Names are case-insensitive.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(Cow<'static, str>, String)>);

impl Headers {
    pub fn new() -> Self {
        Self::default()
    }

    /// The first value of the header.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    /// Appends a pair; existing pairs of the same name stay.
    pub fn insert(&mut self, name: impl Into<Cow<'static, str>>, value: impl Into<String>) {
        self.0.push((name.into(), value.into()));
    }

    #[must_use]
    pub fn with(mut self, name: impl Into<Cow<'static, str>>, value: impl Into<String>) -> Self {
        self.insert(name, value);
        self
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, value.as_str()))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// One message on the bus.
#[derive(Debug, Clone, Default)]
pub struct Message {
    pub subject: Arc<str>,
    /// The subject to publish the reply to, if this is a request.
    pub reply: Option<Arc<str>>,
    pub headers: Headers,
    pub payload: Bytes,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no responders on {0}; is the part that serves it running?")]
    NoResponders(String),
    #[error("no reply on {0} before the deadline")]
    Timeout(String),
    #[error("the bus is not connected: {0}")]
    Disconnected(String),
    #[error("the message has {size} bytes; the bus accepts at most {max}")]
    TooLarge { size: usize, max: usize },
    #[error("invalid subject {0:?}: it must consist of tokens of printable characters separated by dots")]
    InvalidSubject(String),
    #[error("no stream takes {0}; it is not declared, or JetStream does not serve it")]
    NoStream(String),
    #[error("key {0:?} is at another revision; read it again and retry")]
    WrongRevision(String),
    #[error("storage failed: {0}")]
    Storage(String),
    /// The stream holds its `max_bytes`, or the server has no room for it.
    #[error("{0}")]
    Full(String),
}

impl Error {
    /// Whether the same call may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::NoResponders(_)
            | Self::Timeout(_)
            | Self::Disconnected(_)
            | Self::NoStream(_)
            | Self::WrongRevision(_)
            | Self::Storage(_)
            | Self::Full(_) => true,
            Self::TooLarge { .. } | Self::InvalidSubject(_) => false,
        }
    }
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[async_trait]
pub trait BusApi: Send + Sync + 'static {
    /// Delivers the message at most once to every live subscriber and to one member of each queue group. It is not
    /// stored; use [`BusApi::append`] for a stream.
    ///
    /// Messages published on one subject stay in order. There is no order between subjects, nor between publishes and
    /// requests.
    async fn publish(&self, message: Message) -> Result<()>;

    /// Subscribes to live messages. `subject` may hold the wildcards `*` (one token) and `>` (the rest). With `queue`,
    /// the members of that queue group share the messages.
    ///
    /// `capacity` bounds the queue of undelivered messages. Beyond it, new messages are dropped and counted in
    /// `beamline_bus_dropped_total`; a request that the queue group drops fails with [`Error::NoResponders`].
    async fn subscribe(&self, subject: &str, queue: Option<&str>, capacity: usize) -> Result<Subscription>;

    /// Publishes a request and waits at most `deadline` for the first reply.
    async fn request(&self, subject: &str, headers: Headers, payload: Bytes, deadline: Duration) -> Result<Message>;

    /// Creates the stream or updates it to this configuration. Idempotent. An existing stream keeps the subjects that
    /// it takes beyond these. Fails if another stream takes one of the subjects.
    async fn declare_stream(&self, stream: StreamConfig) -> Result<()>;

    /// Adds subjects to those that a declared stream takes. Idempotent. Fails if another stream takes one of them.
    async fn add_subjects(&self, stream: &'static str, subjects: &[String]) -> Result<()>;

    /// Deletes a consumer without a backlog that nobody reads, and takes the subject of its filter from the stream.
    /// Returns whether it did. On the embedded bus, somebody reads every consumer that this process has opened.
    async fn retire(&self, stream: &'static str, consumer: &str) -> Result<bool>;

    /// Appends the message to the stream that takes its subject; returns once it is stored.
    ///
    /// Another append with the same `msg_id` within the dedup window stores nothing and is acknowledged as `duplicate`.
    /// Live subscribers of the subject receive the message, too. With [`nats`], they also receive duplicates.
    async fn append(&self, message: Message, msg_id: Option<&str>) -> Result<Appended>;

    /// Makes several writes, in order.
    ///
    /// The embedded bus commits all of them, or none. Over [`nats`], each write starts after the previous one is
    /// acknowledged, except that adjacent puts run concurrently; the batch ends at the first failure. Choose an order
    /// in which an incomplete batch is safe to repeat. A batch must not put one key twice. A message that is too large
    /// refuses the whole batch on both.
    ///
    /// Dropping the future does not cancel writes that have begun. Live subscribers may then miss the appended
    /// messages, and consumers receive them up to five seconds late.
    async fn write(&self, writes: Vec<Write<'_>>) -> Result<Vec<Written>, Incomplete>;

    /// Opens a durable consumer. Consumers with the same name share its messages.
    async fn consume(&self, config: ConsumerConfig) -> Result<Consumer> {
        let places = Places::alone(config.max_in_hand);
        self.consume_within(config, &places).await
    }

    /// As [`BusApi::consume`], but the consumer's deliveries take their places in `places`, which it may share with
    /// other consumers; [`ConsumerConfig::max_in_hand`] does not apply. No consumer starves another one: each free
    /// place goes to the consumer that has waited longest.
    async fn consume_within(&self, config: ConsumerConfig, places: &Places) -> Result<Consumer>;

    /// Whether the stream has stored a message under this id within its dedup window. Stores nothing.
    async fn seen(&self, stream: &'static str, msg_id: &str) -> Result<bool>;

    /// The time of the clock that stamps the stream's messages ([`Delivery::stored_ms`]), in milliseconds since the Unix
    /// epoch. Over [`nats`], it is the server's.
    async fn time_ms(&self, stream: &str) -> Result<u64>;

    /// Whether [`BusApi::write`] makes all writes of a batch or none.
    fn is_atomic(&self) -> bool;

    /// The size of a stream and the backlog of each of its consumers.
    async fn stream_info(&self, stream: &str) -> Result<StreamInfo>;

    /// Creates a durable key-value bucket or updates it to this configuration. Idempotent.
    async fn declare_bucket(&self, bucket: BucketConfig) -> Result<()>;

    /// As [`BusApi::declare_bucket`], without a limit of bytes.
    async fn declare_kv(&self, bucket: &'static str, max_age: Option<Duration>) -> Result<()> {
        self.declare_bucket(BucketConfig { name: bucket, max_age, max_bytes: None })
            .await
    }

    /// How full each stream and bucket is that was declared on this handle.
    async fn fills(&self) -> Result<Vec<Fill>>;

    /// The sizes that [`streams::declare`] gives to the product's streams and buckets.
    fn sizes(&self) -> &streams::Sizes;

    /// Stores a value and returns its revision. With `expected`, only if the entry is at that revision (0: does not
    /// exist), else [`Error::WrongRevision`]. A value has the size limit of a message, else [`Error::TooLarge`]. An entry
    /// that is `done` ([`Write::Put`]) stays so.
    async fn kv_put(&self, bucket: &str, key: &str, value: Bytes, expected: Option<u64>) -> Result<u64>;
    /// The value and its revision; `None` if there is no such entry.
    async fn kv_get(&self, bucket: &str, key: &str) -> Result<Option<(Bytes, u64)>>;

    /// Counts the times that the bus was away and is back: subscriptions may have missed messages in between. The
    /// embedded bus is never away.
    fn interruptions(&self) -> watch::Receiver<u64>;

    /// Checks that the bus delivers messages now, and that the declared streams and buckets exist. Used by `/ready`.
    async fn health(&self) -> Result<()>;

    /// Reads certificates and credentials from their files again and reconnects with them, one connection after the
    /// other. If they do not work, this returns an error and keeps the existing connections. The embedded bus has none
    /// and does nothing.
    async fn reload(&self) -> Result<()> {
        Ok(())
    }

    /// A short description for `status` and logs, for example `local` or `nats 127.0.0.1:4222`.
    fn describe(&self) -> String;
}

/// One step of [`BusApi::write`].
pub enum Write<'a> {
    /// See [`BusApi::kv_put`]. `done` says that no further change is expected: a full bucket of the embedded bus evicts
    /// such entries only. (Over [`nats`], the server evicts the entries that were written first.)
    Put {
        bucket: &'a str,
        key: String,
        value: Bytes,
        expected: Option<u64>,
        done: bool,
    },
    /// See [`BusApi::append`].
    Append { message: Message, msg_id: Option<&'a str> },
    /// See [`BusApi::publish`]: live subscribers receive the message once the writes before it are stored (embedded: once
    /// the batch is). A failure is logged and does not end the batch.
    Publish { message: Message },
    /// See [`Delivery::ack`]. The delivery must come from the same bus.
    Ack(&'a Delivery),
}

/// The result of one step of [`BusApi::write`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    Put { revision: u64 },
    Appended(Appended),
    Published,
    Acked,
}

/// A failed batch: the error, and the results of the steps before it. The embedded bus rolls these steps back, so there
/// are none. Over [`nats`], the failed step itself and puts adjacent to it may have been stored, if only their
/// acknowledgement was lost.
#[derive(Debug, thiserror::Error)]
#[error("the batch failed after {} steps", .written.len())]
pub struct Incomplete {
    #[source]
    pub error: Error,
    pub written: Vec<Written>,
}

impl From<Error> for Incomplete {
    fn from(error: Error) -> Self {
        Self { error, written: Vec::new() }
    }
}

impl From<Incomplete> for Error {
    fn from(incomplete: Incomplete) -> Self {
        incomplete.error
    }
}

/// The live messages of one subscription. Dropping it unsubscribes, and loses what has not been taken.
pub struct Subscription {
    pub(crate) receiver: tokio::sync::mpsc::Receiver<Message>,
    /// Unsubscribes when it is dropped; `None` once the subscription is closed.
    pub(crate) guard: Option<Box<dyn Send + Sync>>,
}

impl Subscription {
    /// The next message; `None` once the bus is closed, or the subscription is closed and all of its messages are
    /// taken.
    pub async fn next(&mut self) -> Option<Message> {
        self.receiver.recv().await
    }

    /// Unsubscribes without losing a message: [`Self::next`] still returns everything that the bus has delivered to
    /// this subscription, then `None`. From then on, requests go to other members of the queue group, or fail with
    /// [`Error::NoResponders`] at once.
    ///
    /// If a NATS server does not confirm within five seconds, the subscription ends with what has arrived.
    pub fn close(&mut self) {
        self.guard = None;
    }

    /// The next message, as [`Self::next`]. When `cancel` is cancelled, the subscription is closed first, so a loop
    /// over this handles everything that was delivered to it before it ends.
    pub async fn next_until(&mut self, cancel: &CancellationToken) -> Option<Message> {
        if self.guard.is_some() {
            tokio::select! {
                message = self.receiver.recv() => return message,
                () = cancel.cancelled() => self.close(),
            }
        }
        self.next().await
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retention {
    /// A message is deleted once a consumer has acknowledged or terminated it. A stream that holds `max_bytes` refuses
    /// new messages.
    WorkQueue,
    /// A message is deleted once every consumer has acknowledged or terminated it; without consumers nothing is stored.
    /// A stream that holds `max_bytes` refuses new messages.
    Interest,
    /// Messages stay until `max_age`, whether or not they are acknowledged. Beyond `max_bytes` the oldest are deleted.
    Limits,
}

#[derive(Debug, Clone)]
pub struct StreamConfig {
    pub name: &'static str,
    /// The subjects that the stream stores; wildcards are allowed.
    pub subjects: Vec<String>,
    pub retention: Retention,
    /// When messages expire, read or not; `None`: never.
    pub max_age: Option<Duration>,
    pub max_bytes: u64,
    /// How long a message id is remembered for deduplication.
    pub dedup_window: Duration,
    /// Memory for message ids in the embedded bus, at 100 bytes each; beyond it the oldest are forgotten early. Over
    /// [`nats`], ids are in the server's memory, which has no such limit.
    pub dedup_bytes: u64,
    /// Consumers that the stream has from the start, before it stores a message. Existing ones stay as they are.
    pub consumers: Vec<ConsumerConfig>,
    /// Names of consumers of earlier versions. They are deleted unless something still reads them, because a message
    /// waits for every consumer.
    pub retired: Vec<&'static str>,
}

impl StreamConfig {
    /// A stream without a maximum age, of 1 GiB, with a dedup window of an hour.
    pub fn new(name: &'static str, subjects: Vec<String>, retention: Retention) -> Self {
        Self {
            name,
            subjects,
            retention,
            max_age: None,
            max_bytes: 1 << 30,
            dedup_window: Duration::from_secs(3600),
            dedup_bytes: 64 << 20,
            consumers: Vec::new(),
            retired: Vec::new(),
        }
    }
}

#[derive(Debug, Clone)]
pub struct BucketConfig {
    pub name: &'static str,
    /// Entries expire this long after their last write; `None`: never.
    pub max_age: Option<Duration>,
    /// Size at which entries are evicted to make room for new ones; see [`Write::Put`]. `None`: no limit.
    pub max_bytes: Option<u64>,
}

/// How full a stream or a bucket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fill {
    pub store: &'static str,
    /// Messages or entries.
    pub messages: u64,
    pub bytes: u64,
    pub max_bytes: Option<u64>,
    /// When the oldest message or entry was stored, in milliseconds since the Unix epoch; `None` if there is none.
    pub oldest_ms: Option<u64>,
    /// Number of the oldest message or entry that is left. It grows when the oldest are deleted.
    pub first: u64,
}

#[derive(Debug, Clone)]
pub struct ConsumerConfig {
    pub stream: &'static str,
    /// The durable name; consumers with the same name share its messages.
    pub name: String,
    /// Receive only messages whose subject matches this pattern.
    pub filter: Option<String>,
    /// A delivery that is neither settled nor reported in progress for this long is redelivered.
    pub ack_wait: Duration,
    /// Maximum unacknowledged deliveries, over all consumers of this name.
    pub max_ack_pending: usize,
    /// Maximum [`Delivery`] values of this consumer that are not yet dropped. The `ack_wait` of a delivery that waits
    /// for a worker is already running, so a slow consumer sets this to its number of workers.
    pub max_in_hand: usize,
    /// Start with the stored messages (`true`) or with new ones. Consumers of a work queue always start with the stored
    /// ones. Ignored if the consumer exists already.
    pub from_start: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    pub sequence: u64,
    pub duplicate: bool,
}

#[derive(Debug, Clone, Default)]
pub struct StreamInfo {
    pub messages: u64,
    pub bytes: u64,
    /// Consumer name and its backlog: pending plus unacknowledged messages.
    pub consumers: Vec<(String, u64)>,
}

/// A handle to a durable consumer. Undelivered messages of a dropped handle are redelivered after `ack_wait`;
/// [`Consumer::close`] returns them at once.
pub struct Consumer {
    pub(crate) receiver: tokio::sync::mpsc::Receiver<Delivery>,
    pub(crate) _guard: Box<dyn Send + Sync>,
}

impl Consumer {
    /// The next delivery; `None` once the bus is closed.
    pub async fn next(&mut self) -> Option<Delivery> {
        self.receiver.recv().await
    }

    /// Stops the consumer and naks deliveries that have arrived but were not taken. Those already taken can still be
    /// settled.
    pub async fn close(self) {
        let Self { mut receiver, _guard } = self;
        drop(_guard);

        // Collect until the pump has ended. A delivery returned earlier could be pulled here again.
        let mut held = Vec::new();
        while let Some(delivery) = receiver.recv().await {
            held.push(delivery);
        }

        for delivery in &held {
            give_back(delivery).await;
        }
    }
}

/// Naks a delivery without delay, so that another consumer receives it.
async fn give_back(delivery: &Delivery) {
    if let Err(error) = delivery.nak(Duration::ZERO).await {
        tracing::debug!(%error, "cannot nak a delivery; it is redelivered after its ack wait");
    }
}

/// One delivery of a durable message. The receiver must settle it; otherwise it is redelivered after `ack_wait`.
///
/// The bus redelivers without limit. The receiver compares [`Delivery::delivered`] with its own `max_deliver`, stores a
/// dead letter and then calls [`Delivery::term`] (see [`dead_letter::bury`]). A crash in between repeats these steps
/// and loses nothing.
pub struct Delivery {
    pub message: Message,
    /// 1 on the first delivery.
    pub delivered: u32,
    pub sequence: u64,
    /// When the message was stored, in milliseconds since the Unix epoch.
    pub stored_ms: u64,
    pub(crate) acker: Acker,
    /// Free when the delivery is dropped or released.
    pub(crate) place: Option<places::Place>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The message is done.
    Ack,
    /// Redeliver after this delay.
    Nak(Duration),
    /// The receiver is still working: restart `ack_wait`.
    InProgress,
    /// Never redeliver.
    Term,
}

/// Settles a delivery on the bus that it came from.
pub(crate) enum Acker {
    Local(local::Settle),
    Nats(nats::Settle),
}

impl Acker {
    async fn settle(&self, outcome: Outcome) -> Result<()> {
        match self {
            Self::Local(settle) => settle.settle(outcome).await,
            Self::Nats(settle) => settle.settle(outcome).await,
        }
    }
}

impl Delivery {
    /// Gives up the delivery's place ([`ConsumerConfig::max_in_hand`], [`Places`]), so that the consumer may take another
    /// message before this one is settled.
    pub fn release(&mut self) {
        self.place = None;
    }

    pub async fn ack(&self) -> Result<()> {
        self.acker.settle(Outcome::Ack).await
    }
    pub async fn nak(&self, delay: Duration) -> Result<()> {
        self.acker.settle(Outcome::Nak(delay)).await
    }
    pub async fn in_progress(&self) -> Result<()> {
        self.acker.settle(Outcome::InProgress).await
    }
    pub async fn term(&self) -> Result<()> {
        self.acker.settle(Outcome::Term).await
    }
}
