//! The bus over NATS: core subjects, JetStream streams and buckets, and its own reply inbox.
//!
//! The NATS user needs permission to publish and subscribe on `_INBOX.>`. The server's `max_payload` bounds messages:
//! its default is 1 MiB, and the product's largest message needs 8 MB.

mod access;
mod buckets;
mod consumer;
mod convert;
mod credentials;
mod inbox;
mod keeper;
mod link;
mod outbox;
mod pool;
mod streams;
mod subscription;

use crate::local::subjects::{check_pattern, check_subject};
use crate::streams::Sizes;
use crate::{
    Appended, BucketConfig, Bus, BusApi, Consumer, ConsumerConfig, Error, Fill, Headers, Incomplete, Message, Places,
    Result, StreamConfig, StreamInfo, Subscription, Write, Written,
};
use access::Access;
use async_trait::async_trait;
use bytes::Bytes;
pub(crate) use consumer::Settle;
use futures_util::future::try_join_all;
use inbox::Awaited;
use keeper::Keeper;
use pool::Pool;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

const APPEND_DEADLINE: Duration = Duration::from_secs(5);
const HEALTH_DEADLINE: Duration = Duration::from_secs(2);

/// Prefix of reply subjects. Each gets one message, so there is no order to keep.
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
    /// Replicas of every stream and bucket; unset: one for new ones, and as many as the others have.
    pub replicas: Option<usize>,
    pub sizes: Sizes,
}

pub struct Nats {
    access: Arc<Access>,
    pool: Arc<Pool>,
    keeper: Arc<Keeper>,
    sizes: Sizes,
    tasks: TaskTracker,
    cancel: CancellationToken,
    interruptions: Arc<watch::Sender<u64>>,
    /// Ends the background tasks when the last handle is dropped.
    _end: DropGuard,
}

impl Nats {
    /// Connects once or fails. After that the bus reconnects without limit whenever a connection is lost.
    pub async fn connect(config: NatsConfig) -> Result<Bus> {
        let (cancel, tasks) = (CancellationToken::new(), TaskTracker::new());
        let end = cancel.clone().drop_guard();
        let size = config.connections;
        let (sizes, keeper) = (config.sizes.clone(), Arc::new(Keeper::new(config.replicas)));
        let access = Arc::new(Access::new(config)?);
        let interruptions = Arc::new(watch::Sender::default());
        let pool = Arc::new(Pool::open(&access, size, &interruptions, &tasks, &cancel).await?);
        tasks.spawn(keeper.clone().run(pool.clone(), cancel.clone()));
        Ok(Arc::new(Self { access, pool, keeper, sizes, tasks, cancel, interruptions, _end: end }))
    }

    /// Lets the keeper look after what this call found missing.
    fn noted<T>(&self, outcome: Result<T>) -> Result<T> {
        match outcome {
            Err(Error::NoStream(_) | Error::Storage(_)) => self.keeper.missed(),
            // The connection stands, and the server says nothing: it does so when it cannot write to its disk.
            Err(Error::Timeout(_)) => self.keeper.doubt(),
            Ok(_) | Err(_) => {}
        }
        outcome
    }

    fn declared(&self, bucket: &str) -> Result<()> {
        let declared = self.keeper.has_bucket(bucket);
        declared
            .then_some(())
            .ok_or_else(|| Error::Storage(format!("bucket {bucket} is not declared")))
    }

    /// Makes the puts of a batch concurrently and ignores its other writes.
    async fn put_all(&self, writes: Vec<Write<'_>>) -> Result<Vec<Written>> {
        let puts = writes.into_iter().filter_map(|write| match write {
            Write::Put { bucket, key, value, expected, done: _ } => Some(async move {
                let revision = self.kv_put(bucket, &key, value, expected).await?;
                Ok(Written::Put { revision })
            }),
            Write::Append { .. } | Write::Publish { .. } | Write::Ack(_) => None,
        });
        try_join_all(puts).await
    }
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
        self.keeper.declare_stream(self.pool.mine(), stream).await
    }

    async fn add_subjects(&self, stream: &'static str, subjects: &[String]) -> Result<()> {
        streams::add_subjects(self.pool.mine(), stream, subjects).await?;
        self.keeper.added(stream, subjects);
        Ok(())
    }

    async fn retire(&self, stream: &'static str, consumer: &str) -> Result<bool> {
        let link = self.pool.mine();
        let Some(filter) = consumer::idle_filter(link, stream, consumer).await? else {
            return Ok(false);
        };

        // First the subject: a message that comes later is refused, and not stored for nobody.
        self.keeper.removed(stream, &filter);
        streams::remove_subject(link, stream, &filter).await?;
        if consumer::idle_filter(link, stream, consumer).await?.is_none() {
            self.add_subjects(stream, &[filter]).await?;
            return Ok(false);
        }
        consumer::delete(link, stream, consumer).await?;
        Ok(true)
    }

    async fn append(&self, message: Message, msg_id: Option<&str>) -> Result<Appended> {
        check_subject(&message.subject)?;
        self.keeper.stores()?;
        let link = self.pool.of(&message.subject).await?;
        let subject = message.subject.clone();
        let appended = match streams::append(link, message, msg_id, APPEND_DEADLINE).await {
            // With a live subscriber on the subject, the server does not report a missing stream: look for it. A slow
            // server is asked nothing more: the keeper looks after the streams that were declared.
            Err(Error::Timeout(_)) if !self.keeper.takes(&subject) && !streams::takes(link, &subject).await? => {
                Err(Error::NoStream(subject.to_string()))
            }
            appended => appended,
        };
        self.noted(appended)
    }

    async fn write(&self, writes: Vec<Write<'_>>) -> Result<Vec<Written>, Incomplete> {
        // A repeat would not make it smaller, so nothing must be left of what comes before it.
        for write in &writes {
            if let Write::Append { message, msg_id } = write {
                self.pool.mine().check_size(streams::appended_bytes(message, *msg_id))?;
            }
        }

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
                Write::Publish { message } => {
                    let subject = message.subject.clone();
                    // Not on the subject's own connection: there is no order to keep, and that one may be away.
                    if let Err(error) = self.pool.mine().publish(message).await {
                        tracing::debug!(%error, %subject, "cannot publish a message of a batch");
                    }
                    Ok(vec![Written::Published])
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

    async fn consume_within(&self, config: ConsumerConfig, places: &Places) -> Result<Consumer> {
        consumer::start(self.pool.next(), config, places, &self.tasks, &self.cancel).await
    }

    async fn seen(&self, stream: &'static str, msg_id: &str) -> Result<bool> {
        streams::seen(self.pool.mine(), stream, msg_id, APPEND_DEADLINE).await
    }

    async fn time_ms(&self, stream: &str) -> Result<u64> {
        streams::time_ms(self.pool.mine(), stream, HEALTH_DEADLINE).await
    }

    fn is_atomic(&self) -> bool {
        false
    }

    async fn stream_info(&self, stream: &str) -> Result<StreamInfo> {
        streams::info(self.pool.mine(), stream).await
    }

    async fn declare_bucket(&self, bucket: BucketConfig) -> Result<()> {
        self.keeper.declare_bucket(self.pool.mine(), bucket).await
    }

    async fn fills(&self) -> Result<Vec<Fill>> {
        self.keeper.fills(self.pool.mine()).await
    }

    fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    async fn kv_put(&self, bucket: &str, key: &str, value: Bytes, expected: Option<u64>) -> Result<u64> {
        self.declared(bucket)?;
        self.keeper.stores()?;
        self.noted(buckets::put(self.pool.mine(), bucket, key, value, expected).await)
    }

    async fn kv_get(&self, bucket: &str, key: &str) -> Result<Option<(Bytes, u64)>> {
        self.declared(bucket)?;
        self.noted(buckets::get(self.pool.mine(), bucket, key).await)
    }

    fn interruptions(&self) -> watch::Receiver<u64> {
        self.interruptions.subscribe()
    }

    async fn health(&self) -> Result<()> {
        self.pool.health(HEALTH_DEADLINE).await?;
        self.keeper.health(&self.pool).await
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
