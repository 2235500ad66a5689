//! The bus over NATS: core subjects, JetStream streams and buckets, and its own reply inbox.
//!
//! The NATS user needs permission to publish and subscribe on `_INBOX.>`. The server's `max_payload` bounds messages:
//! its default is 1 MiB, and the product's largest message needs 8 MB.

mod access;
mod consumer;
mod convert;
mod credentials;
mod inbox;
mod link;
mod outbox;
mod pool;
mod streams;
mod subscription;

use crate::local::subjects::{check_pattern, check_subject};
use crate::{
    Appended, Bus, BusApi, Consumer, ConsumerConfig, Error, Headers, Incomplete, Message, Result, StreamConfig,
    StreamInfo, Subscription, Write, Written,
};
use access::Access;
use async_nats::jetstream::kv;
use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
pub(crate) use consumer::Settle;
use futures_util::future::try_join_all;
use inbox::Awaited;
use parking_lot::RwLock;
use pool::Pool;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

const APPEND_DEADLINE: Duration = Duration::from_secs(5);
const HEALTH_DEADLINE: Duration = Duration::from_secs(2);

/// Bytes of the headers that a bucket's entry travels with, and more.
const KV_HEADERS_MAX: usize = 128;

/// Replies go here, one message a subject: no order is theirs to keep.
const INBOXES: &str = "_INBOX.";

/// The servers and the credentials. Files are read again at every connect.
#[derive(Clone, Default)]
pub struct NatsConfig {
    /// `nats://host:port`, or several with commas between; `tls://` for TLS.
    pub url: String,
    /// The client name that the server shows in its list of connections.
    pub name: String,
    /// Number of connections. Default: one per core, at most eight.
    pub connections: Option<usize>,
    pub user: Option<String>,
    pub password: Option<String>,
    pub token: Option<String>,
    /// A file that holds an nkey seed.
    pub nkey: Option<PathBuf>,
    /// A `.creds` file.
    pub credentials: Option<PathBuf>,
    /// PEM file with the authorities trusted to sign the server's certificate. Default: those that the system trusts.
    pub tls_ca: Option<PathBuf>,
    /// PEM file with the client certificate, for a server that requires one. Needs `tls_key`.
    pub tls_certificate: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    /// Start with the TLS handshake, for a server with `handshake_first`.
    pub tls_first: bool,
}

pub struct Nats {
    access: Arc<Access>,
    pool: Pool,
    /// By bucket name; one store per connection, in the order of the pool.
    buckets: RwLock<HashMap<String, Vec<kv::Store>>>,
    tasks: TaskTracker,
    cancel: CancellationToken,
    /// Ends the background tasks when the last handle is dropped.
    _end: DropGuard,
}

impl Nats {
    /// Connects once or fails. After that the bus reconnects without limit whenever a connection is lost.
    pub async fn connect(config: NatsConfig) -> Result<Bus> {
        let (cancel, tasks) = (CancellationToken::new(), TaskTracker::new());
        let end = cancel.clone().drop_guard();
        let size = config.connections;
        let access = Arc::new(Access::new(config)?);
        let pool = Pool::open(&access, size, &tasks, &cancel).await?;
        Ok(Arc::new(Self { access, pool, buckets: RwLock::default(), tasks, cancel, _end: end }))
    }

    /// The bucket, over the calling thread's connection.
    fn bucket(&self, bucket: &str) -> Result<kv::Store> {
        let link = self.pool.mine();
        link.connected()?;
        let missing = || Error::Storage(format!("bucket {bucket} is not declared"));
        self.buckets
            .read()
            .get(bucket)
            .map(|stores| stores[link.number].clone())
            .ok_or_else(missing)
    }
}

impl Nats {
    /// Makes puts at the same time; other steps of a batch are not its business.
    async fn put_all(&self, writes: Vec<Write<'_>>) -> Result<Vec<Written>> {
        let puts = writes.into_iter().filter_map(|write| match write {
            Write::Put { bucket, key, value, expected } => Some(async move {
                let revision = self.kv_put(bucket, &key, value, expected).await?;
                Ok(Written::Put { revision })
            }),
            Write::Append { .. } | Write::Ack(_) => None,
        });
        try_join_all(puts).await
    }
}

/// Encodes a bucket key. Keys of the bus are arbitrary strings; NATS allows few characters and no empty key.
fn encode_key(key: &str) -> String {
    format!("k{}", URL_SAFE_NO_PAD.encode(key))
}

#[async_trait]
impl BusApi for Nats {
    async fn publish(&self, message: Message) -> Result<()> {
        check_subject(&message.subject)?;
        let link = match message.subject.starts_with(INBOXES) {
            true => self.pool.mine(),
            false => self.pool.of(&message.subject).await?,
        };
        link.publish(message).await
    }

    async fn subscribe(&self, subject: &str, queue: Option<&str>, capacity: usize) -> Result<Subscription> {
        check_pattern(subject)?;
        subscription::start(&self.pool, subject, queue, capacity, &self.tasks, &self.cancel).await
    }

    async fn request(&self, subject: &str, headers: Headers, payload: Bytes, deadline: Duration) -> Result<Message> {
        check_subject(subject)?;
        let headers = convert::to_nats(&headers);
        let reply = self
            .pool
            .mine()
            .ask(subject, headers, payload, Awaited::Reply, deadline)
            .await?;
        Ok(convert::from_nats(reply))
    }

    async fn declare_stream(&self, stream: StreamConfig) -> Result<()> {
        streams::declare(self.pool.mine(), stream).await
    }

    async fn append(&self, message: Message, msg_id: Option<&str>) -> Result<Appended> {
        check_subject(&message.subject)?;
        streams::append(self.pool.of(&message.subject).await?, message, msg_id, APPEND_DEADLINE).await
    }

    async fn write(&self, writes: Vec<Write<'_>>) -> Result<Vec<Written>, Incomplete> {
        let mut written = Vec::with_capacity(writes.len());
        let mut rest = writes.into_iter().peekable();
        while let Some(first) = rest.next() {
            let step = match first {
                Write::Put { .. } => {
                    let mut puts = vec![first];
                    puts.extend(std::iter::from_fn(|| rest.next_if(|next| matches!(next, Write::Put { .. }))));
                    self.put_all(puts).await
                }
                Write::Append { message, msg_id } => {
                    let appended = self.append(message, msg_id).await;
                    appended.map(|appended| vec![Written::Appended(appended)])
                }
                Write::Ack(delivery) => delivery.ack().await.map(|()| vec![Written::Acked]),
            };
            match step {
                Ok(done) => written.extend(done),
                Err(error) => return Err(Incomplete { error, written }),
            }
        }
        Ok(written)
    }

    async fn consume(&self, config: ConsumerConfig) -> Result<Consumer> {
        consumer::start(self.pool.next(), config, &self.tasks, &self.cancel).await
    }

    async fn stream_info(&self, stream: &str) -> Result<StreamInfo> {
        streams::info(self.pool.mine(), stream).await
    }

    async fn declare_kv(&self, bucket: &'static str, max_age: Option<Duration>) -> Result<()> {
        streams::declare_kv(self.pool.mine(), bucket, max_age).await?;
        let stores = try_join_all(self.pool.links().iter().map(|link| streams::bucket(link, bucket))).await?;
        self.buckets.write().insert(bucket.into(), stores);
        Ok(())
    }

    async fn kv_put(&self, bucket: &str, key: &str, value: Bytes, expected: Option<u64>) -> Result<u64> {
        self.pool.mine().check_size(value.len() + KV_HEADERS_MAX)?;
        let store = self.bucket(bucket)?;
        let name = encode_key(key);
        let Some(expected) = expected else {
            return store.put(name, value).await.map_err(|e| Error::Storage(e.to_string()));
        };
        // The last sequence of a missing key is 0, so `update` with 0 creates it.
        store
            .update(name, value, expected)
            .await
            .map_err(|error| match error.kind() {
                kv::UpdateErrorKind::WrongLastRevision => Error::WrongRevision(key.into()),
                _ => Error::Storage(error.to_string()),
            })
    }

    async fn kv_get(&self, bucket: &str, key: &str) -> Result<Option<(Bytes, u64)>> {
        let entry = self
            .bucket(bucket)?
            .entry(encode_key(key))
            .await
            .map_err(|e| Error::Storage(e.to_string()))?;
        let held = entry.filter(|entry| entry.operation == kv::Operation::Put);
        Ok(held.map(|entry| (entry.value, entry.revision)))
    }

    /// A round trip through the server on each connection. Everything published before it has reached the server.
    async fn health(&self) -> Result<()> {
        self.pool.health(HEALTH_DEADLINE).await
    }

    async fn reload(&self) -> Result<()> {
        // A trial connection first: if it fails, the existing connections stay as they are.
        let trial = self.access.connect(drop).await?;
        trial
            .flush()
            .await
            .map_err(|error| Error::Disconnected(error.to_string()))?;
        self.pool.renew().await
    }

    fn describe(&self) -> String {
        format!("nats {}", self.access.describe())
    }
}
