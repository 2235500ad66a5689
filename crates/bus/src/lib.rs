//! How the parts reach each other: publish/subscribe with queue groups, request/reply, durable streams, key-value.
//!
//! One trait set, two implementations with the same meaning: [`local`] (embedded, one process) and
//! [`nats`]. The conformance suite in `tests/` runs against both.

pub mod dead_letter;
pub mod local;
pub mod nats;
pub mod streams;

use async_trait::async_trait;
use bytes::Bytes;
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

/// A cheap handle; clone it into whatever needs the bus.
pub type Bus = Arc<dyn BusApi>;

/// Header pairs, in order. Names are compared without regard to case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(Cow<'static, str>, String)>);

impl Headers {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Appends; does not replace.
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

/// One message as it travels.
#[derive(Debug, Clone, Default)]
pub struct Message {
    pub subject: Arc<str>,
    /// Where an answer is awaited.
    pub reply: Option<Arc<str>>,
    pub headers: Headers,
    pub payload: Bytes,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("nobody answers on {0}; is the part that serves it running?")]
    NoResponders(String),
    #[error("no answer on {0} before the deadline")]
    Timeout(String),
    #[error("the bus is not connected: {0}")]
    Disconnected(String),
    #[error("the message has {size} bytes, more than the bus takes ({max})")]
    TooLarge { size: usize, max: usize },
    #[error("subject {0:?} is not valid: tokens of printable characters between dots")]
    InvalidSubject(String),
    #[error("no stream takes subject {0}; declare it first")]
    NoStream(String),
    #[error("key {0:?} was changed by another writer")]
    WrongRevision(String),
    #[error("storage failed: {0}")]
    Storage(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[async_trait]
pub trait BusApi: Send + Sync + 'static {
    /// At most once, to every subscriber and to one member of each queue group. Appending to a stream that
    /// takes the subject is [`BusApi::append`]; `publish` reaches only live subscribers. What is published on one subject
    /// stays in order; between subjects, and between publishing and asking, there is none.
    async fn publish(&self, message: Message) -> Result<()>;

    /// Subject may hold the wildcards `*` (one token) and `>` (the rest). With `queue`, members of that group share.
    /// `capacity` bounds what waits; beyond it new messages are dropped and counted
    /// (`beamline_bus_dropped_total`), and a request dropped so is answered as no-responders.
    async fn subscribe(&self, subject: &str, queue: Option<&str>, capacity: usize) -> Result<Subscription>;

    /// Publishes with a reply inbox of its own and waits at most `deadline` for the first answer.
    async fn request(&self, subject: &str, headers: Headers, payload: Bytes, deadline: Duration) -> Result<Message>;

    /// Creates the stream or brings it to this configuration. Safe to repeat.
    async fn declare_stream(&self, stream: StreamConfig) -> Result<()>;

    /// Durable publish: returns once it is stored. `msg_id` makes a repeat within the dedup window a no-op that is
    /// acknowledged as `duplicate`. Live subscribers of the subject get it too (first time only).
    async fn append(&self, message: Message, msg_id: Option<&str>) -> Result<Appended>;

    /// A durable consumer; consumers of the same name share its messages.
    async fn consume(&self, config: ConsumerConfig) -> Result<Consumer>;

    /// Messages stored in a stream and, by consumer name, messages not yet acknowledged there.
    async fn stream_info(&self, stream: &str) -> Result<StreamInfo>;

    /// Creates a durable key-value bucket whose entries live `max_age` after their last write. Safe to repeat.
    async fn declare_kv(&self, bucket: &'static str, max_age: Duration) -> Result<()>;

    /// Stores a value and returns its revision. With `expected`, only if the entry is at that revision (0: does not
    /// exist), else [`Error::WrongRevision`].
    async fn kv_put(&self, bucket: &str, key: &str, value: Bytes, expected: Option<u64>) -> Result<u64>;
    /// Value and revision.
    async fn kv_get(&self, bucket: &str, key: &str) -> Result<Option<(Bytes, u64)>>;

    /// Whether messages get through now. For `/ready`.
    async fn health(&self) -> Result<()>;

    /// Reads certificates and credentials from their files again and connects anew with them, one connection after the
    /// other. Bad ones are an error, and what is connected stays so. The embedded bus has none.
    async fn reload(&self) -> Result<()> {
        Ok(())
    }

    /// Short description for `status` and logs, for example `local` or `nats 127.0.0.1:4222`.
    fn describe(&self) -> String;
}

/// Live messages of one subscription; dropping it unsubscribes.
pub struct Subscription {
    pub(crate) receiver: tokio::sync::mpsc::Receiver<Message>,
    pub(crate) _guard: Box<dyn Send + Sync>,
}

impl Subscription {
    /// The next message; `None` once the bus has closed.
    pub async fn next(&mut self) -> Option<Message> {
        self.receiver.recv().await
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retention {
    /// A message is gone once its consumer acknowledged it. A stream that holds `max_bytes` refuses new ones.
    WorkQueue,
    /// Messages live until `max_age`, whoever read them. Beyond `max_bytes` the oldest go.
    Limits,
}

#[derive(Debug, Clone)]
pub struct StreamConfig {
    pub name: &'static str,
    /// Subjects taken, wildcards allowed.
    pub subjects: Vec<String>,
    pub retention: Retention,
    pub max_age: Duration,
    pub max_bytes: u64,
    pub dedup_window: Duration,
}

#[derive(Debug, Clone)]
pub struct ConsumerConfig {
    pub stream: &'static str,
    /// The durable name; consumers of one name share.
    pub name: String,
    pub filter: Option<String>,
    /// Redelivered when neither acknowledged nor in progress for this long.
    pub ack_wait: Duration,
    /// Unacknowledged messages outstanding at most, over all consumers of the name.
    pub max_ack_pending: usize,
    /// Deliveries that this consumer takes at most and has not yet dropped. What is taken but waits for a place to be
    /// worked on runs out of its `ack_wait`: a consumer whose work is slow takes no more than it has places.
    pub max_in_hand: usize,
    /// Start with what is stored (`true`) or with what comes next. A work queue's consumers start with what is stored.
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
    /// Pending and unacknowledged, by consumer.
    pub consumers: Vec<(String, u64)>,
}

/// A durable consumer's end. Dropping it returns what it holds after `ack_wait`; [`Consumer::close`] does so at once.
pub struct Consumer {
    pub(crate) receiver: tokio::sync::mpsc::Receiver<Delivery>,
    pub(crate) _guard: Box<dyn Send + Sync>,
}

impl Consumer {
    /// The next delivery; `None` once the bus has closed.
    pub async fn next(&mut self) -> Option<Delivery> {
        self.receiver.recv().await
    }

    /// Takes no more, and gives back at once what has come and was not taken. What was taken can still be settled.
    pub async fn close(self) {
        let Self { mut receiver, _guard } = self;
        drop(_guard);
        // Until the other end is gone: one given back while it still pulls would come here again.
        let mut held = Vec::new();
        while let Some(delivery) = receiver.recv().await {
            held.push(delivery);
        }
        for delivery in &held {
            give_back(delivery).await;
        }
    }
}

/// A delivery that nobody takes any more is for another consumer.
async fn give_back(delivery: &Delivery) {
    if let Err(error) = delivery.nak(Duration::ZERO).await {
        tracing::debug!(%error, "a delivery was not given back; it comes again after its ack wait");
    }
}

/// One delivery of a durable message. Whoever takes it says how it ended; silence redelivers it after `ack_wait`.
///
/// The bus redelivers without end; the part that consumes compares [`Delivery::delivered`] with its `max_deliver`,
/// writes the dead letter itself and then [`Delivery::term`]s: so a crash between the two repeats, never loses.
pub struct Delivery {
    pub message: Message,
    /// 1 on the first delivery.
    pub delivered: u32,
    pub sequence: u64,
    /// When it was stored, milliseconds since the epoch.
    pub stored_ms: u64,
    pub(crate) acker: Arc<dyn Acker>,
    /// Of [`ConsumerConfig::max_in_hand`].
    pub(crate) _place: tokio::sync::OwnedSemaphorePermit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ack,
    /// Redeliver after this long.
    Nak(Duration),
    /// The redelivery clock starts anew.
    InProgress,
    /// Never deliver again.
    Term,
}

#[async_trait]
pub trait Acker: Send + Sync {
    async fn settle(&self, outcome: Outcome) -> Result<()>;
}

impl Delivery {
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
