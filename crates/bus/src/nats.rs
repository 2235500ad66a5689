//! The bus over NATS: core subjects, JetStream streams and buckets, replies through an inbox of our own.
//!
//! The server's user must be allowed to publish and subscribe on `_INBOX.>`. Its `max_payload` bounds a message here
//! (the server's default is 1 MiB; the product's largest message needs 8 MB).

mod consumer;
mod convert;
mod inbox;
mod link;
mod streams;
mod subscription;

use crate::local::subjects::{check_pattern, check_subject};
use crate::{
    Appended, Bus, BusApi, Consumer, ConsumerConfig, Error, Headers, Message, Result, StreamConfig, StreamInfo,
    Subscription,
};
use async_nats::jetstream::kv;
use async_nats::{ConnectOptions, Event, ServerAddr};
use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use inbox::Awaited;
use link::Link;
use parking_lot::RwLock;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// What waits in the client for one of our subscriptions; our pumps empty it at once, so it fills only when the
/// process has no time. Then the server's messages are dropped and counted.
const CLIENT_QUEUE: usize = 128 * 1024;
/// A silent connection is found out after two of these.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const RECONNECT_DELAY_BASE: Duration = Duration::from_millis(50);
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(5);
const API_DEADLINE: Duration = Duration::from_secs(5);
const APPEND_DEADLINE: Duration = Duration::from_secs(5);
const HEALTH_DEADLINE: Duration = Duration::from_secs(2);

/// Where the servers are and who we are.
#[derive(Clone, Default)]
pub struct NatsConfig {
    /// `nats://host:port`, or several with commas between; `tls://` for TLS.
    pub url: String,
    /// Shown in the server's list of connections.
    pub name: String,
    pub user: Option<String>,
    pub password: Option<String>,
    pub token: Option<String>,
    /// A `.creds` file.
    pub credentials: Option<PathBuf>,
}

/// One connection.
pub struct Nats {
    link: Arc<Link>,
    buckets: RwLock<HashMap<String, kv::Store>>,
    servers: String,
    tasks: TaskTracker,
    cancel: CancellationToken,
    /// Ends the pumps with the last handle.
    _end: DropGuard,
}

impl Nats {
    /// Connects now or fails; from then on a lost connection is sought again without end.
    pub async fn connect(config: NatsConfig) -> Result<Bus> {
        let servers = servers(&config.url)?;
        let shown = describe(&servers);
        let options = options(config).await?;
        let client = options.connect(&servers).await.map_err(|error| {
            Error::Disconnected(format!(
                "cannot reach NATS at {shown}: {error}; is it running, and are its url and credentials right"
            ))
        })?;
        let cancel = CancellationToken::new();
        let tasks = TaskTracker::new();
        let link = Link::open(client, &tasks, &cancel).await?;
        Ok(Arc::new(Self {
            link: Arc::new(link),
            buckets: RwLock::default(),
            servers: shown,
            tasks,
            _end: cancel.clone().drop_guard(),
            cancel,
        }))
    }

    fn bucket(&self, bucket: &str) -> Result<kv::Store> {
        self.link.connected()?;
        let missing = || Error::Storage(format!("bucket {bucket} is not declared"));
        self.buckets.read().get(bucket).cloned().ok_or_else(missing)
    }
}

async fn options(config: NatsConfig) -> Result<ConnectOptions> {
    let mut options = ConnectOptions::new()
        .name(config.name)
        .subscription_capacity(CLIENT_QUEUE)
        .ping_interval(PING_INTERVAL)
        .request_timeout(Some(API_DEADLINE))
        .max_reconnects(None)
        .reconnect_delay_callback(reconnect_delay)
        .event_callback(|event| async move { observe(&event) });
    if let Some(user) = config.user {
        options = options.user_and_password(user, config.password.unwrap_or_default());
    }
    if let Some(token) = config.token {
        options = options.token(token);
    }
    if let Some(path) = config.credentials {
        options = options.credentials_file(&path).await.map_err(|error| {
            Error::Disconnected(format!("cannot read the NATS credentials {}: {error}", path.display()))
        })?;
    }
    Ok(options)
}

fn servers(urls: &str) -> Result<Vec<ServerAddr>> {
    let parse =
        |url: &str| url.trim().parse().map_err(|error| Error::Disconnected(format!("NATS url is not valid: {error}")));
    urls.split(',').map(parse).collect()
}

/// Hosts and ports only: a url may hold a password.
fn describe(servers: &[ServerAddr]) -> String {
    let shown: Vec<String> = servers.iter().map(|server| format!("{}:{}", server.host(), server.port())).collect();
    shown.join(", ")
}

/// Full jitter: many clients of a server that comes back do not all come at once.
fn reconnect_delay(attempts: usize) -> Duration {
    let doublings = u32::try_from(attempts).unwrap_or(u32::MAX).min(10);
    let ceiling = (RECONNECT_DELAY_BASE * 2_u32.pow(doublings)).min(RECONNECT_DELAY_MAX);
    ceiling.mul_f64(rand::random::<f64>())
}

fn observe(event: &Event) {
    match event {
        Event::Connected => tracing::info!("connected to NATS"),
        Event::Disconnected => tracing::warn!("lost the connection to NATS; connecting again"),
        Event::SlowConsumer(_) => {
            metrics::counter!("beamline_bus_dropped_total").increment(1);
            tracing::warn!("the client's queue of a subscription is full; a message was dropped");
        }
        Event::ServerError(error) => tracing::error!(%error, "NATS refused something"),
        Event::ClientError(error) => tracing::error!(%error, "the NATS connection has a problem"),
        Event::LameDuckMode | Event::Draining | Event::Closed => tracing::info!(%event, "NATS connection"),
    }
}

/// Bucket keys are opaque; NATS takes few characters in them and no empty one.
fn encode_key(key: &str) -> String {
    format!("k{}", URL_SAFE_NO_PAD.encode(key))
}

#[async_trait]
impl BusApi for Nats {
    async fn publish(&self, message: Message) -> Result<()> {
        check_subject(&message.subject)?;
        self.link.publish(message).await
    }

    async fn subscribe(&self, subject: &str, queue: Option<&str>, capacity: usize) -> Result<Subscription> {
        check_pattern(subject)?;
        subscription::start(&self.link, subject, queue, capacity, &self.tasks, &self.cancel).await
    }

    async fn request(&self, subject: &str, headers: Headers, payload: Bytes, deadline: Duration) -> Result<Message> {
        check_subject(subject)?;
        let headers = convert::to_nats(&headers);
        let reply = self.link.ask(subject, headers, payload, Awaited::Reply, deadline).await?;
        Ok(convert::from_nats(reply))
    }

    async fn declare_stream(&self, stream: StreamConfig) -> Result<()> {
        streams::declare(&self.link, stream).await
    }

    async fn append(&self, message: Message, msg_id: Option<&str>) -> Result<Appended> {
        check_subject(&message.subject)?;
        streams::append(&self.link, message, msg_id, APPEND_DEADLINE).await
    }

    async fn consume(&self, config: ConsumerConfig) -> Result<Consumer> {
        consumer::start(&self.link, config, &self.tasks, &self.cancel).await
    }

    async fn stream_info(&self, stream: &str) -> Result<StreamInfo> {
        streams::info(&self.link, stream).await
    }

    async fn declare_kv(&self, bucket: &'static str, max_age: Duration) -> Result<()> {
        let store = streams::declare_kv(&self.link, bucket, max_age).await?;
        self.buckets.write().insert(bucket.into(), store);
        Ok(())
    }

    async fn kv_put(&self, bucket: &str, key: &str, value: Bytes, expected: Option<u64>) -> Result<u64> {
        let store = self.bucket(bucket)?;
        let name = encode_key(key);
        let Some(expected) = expected else {
            return store.put(name, value).await.map_err(|e| Error::Storage(e.to_string()));
        };
        // The last sequence of a key that does not exist is 0, so this creates too.
        store.update(name, value, expected).await.map_err(|error| match error.kind() {
            kv::UpdateErrorKind::WrongLastRevision => Error::WrongRevision(key.into()),
            _ => Error::Storage(error.to_string()),
        })
    }

    async fn kv_get(&self, bucket: &str, key: &str) -> Result<Option<(Bytes, u64)>> {
        let entry = self.bucket(bucket)?.entry(encode_key(key)).await.map_err(|e| Error::Storage(e.to_string()))?;
        let held = entry.filter(|entry| entry.operation == kv::Operation::Put);
        Ok(held.map(|entry| (entry.value, entry.revision)))
    }

    /// A round trip through the server; what was published before it has reached the server.
    async fn health(&self) -> Result<()> {
        self.link.round_trip(HEALTH_DEADLINE).await
    }

    fn describe(&self) -> String {
        format!("nats {}", self.servers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reconnects_are_spread_and_bounded() {
        for attempts in [0, 1, 5, 100, usize::MAX] {
            assert!((0..100).all(|_| reconnect_delay(attempts) <= RECONNECT_DELAY_MAX));
        }
        assert!((0..100).all(|_| reconnect_delay(0) <= RECONNECT_DELAY_BASE));
    }

    #[test]
    fn a_password_in_the_url_is_not_shown() {
        let servers = servers("nats://me:secret@one:4222, tls://two:4443").unwrap();
        assert_eq!(describe(&servers), "one:4222, two:4443");
        assert!(super::servers("nats://").is_err() || super::servers("::").is_err());
    }
}
