//! Connections to Redis: to one server, or to a Redis Cluster with sharded pub/sub.

use super::{CONNECT_TIMEOUT, RESPONSE_TIMEOUT};
use futures_util::TryStreamExt;
use redis::aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig, MultiplexedConnection};
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ErrorKind, IntoConnectionInfo, Pipeline, ProtocolVersion, PushInfo, PushKind,
    RedisError, RedisFuture, Value,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// How many attempts to reconnect a command waits for while Redis is disconnected.
const RETRIES: usize = 2;
const RETRY_DELAY_MAX: Duration = Duration::from_millis(500);
/// Messages that may be queued for the node. If more arrive, the connection counts as lost, and clients recover.
const MESSAGES_MAX: usize = 64 * 1024;
/// Topics in one SUBSCRIBE.
const TOPICS_MAX: usize = 1000;
/// SSUBSCRIBE commands in flight: the topics of a cluster are on many servers, so each needs a command of its own.
const SUBSCRIBES_MAX: usize = 64;

#[derive(Clone)]
pub enum Server {
    Single(Client),
    Cluster(Vec<String>),
}

impl Server {
    pub fn new(urls: &str) -> Result<Self, RedisError> {
        let urls: Vec<String> = urls.split(',').map(|url| url.trim().to_string()).collect();
        match &urls[..] {
            [url] => {
                let info = url.as_str().into_connection_info()?;
                // Publications arrive as pushes, which RESP2 does not have.
                let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
                Ok(Self::Single(Client::open(info.set_redis_settings(settings))?))
            }
            _ => {
                ClusterClient::new(urls.clone())?;
                Ok(Self::Cluster(urls))
            }
        }
    }

    /// The command that publishes to a topic.
    pub fn publish_command(&self) -> &'static str {
        match self {
            Self::Single(_) => "PUBLISH",
            Self::Cluster(_) => "SPUBLISH",
        }
    }

    /// Opens a connection for commands.
    pub async fn commands(&self) -> Result<Commands, RedisError> {
        match self {
            Self::Single(client) => {
                let config = ConnectionManagerConfig::new()
                    .set_connection_timeout(Some(CONNECT_TIMEOUT))
                    .set_response_timeout(Some(RESPONSE_TIMEOUT))
                    .set_number_of_retries(RETRIES)
                    .set_max_delay(RETRY_DELAY_MAX);
                client
                    .get_connection_manager_with_config(config)
                    .await
                    .map(Commands::Single)
            }
            Self::Cluster(urls) => Self::cluster(urls)?.get_async_connection().await.map(Commands::Cluster),
        }
    }

    fn cluster(urls: &[String]) -> Result<ClusterClient, RedisError> {
        Self::builder(urls).build()
    }

    fn builder(urls: &[String]) -> redis::cluster::ClusterClientBuilder {
        ClusterClient::builder(urls.to_vec())
            .use_protocol(ProtocolVersion::RESP3)
            .connection_timeout(CONNECT_TIMEOUT)
            .response_timeout(RESPONSE_TIMEOUT)
            .overall_response_timeout(Some(RESPONSE_TIMEOUT))
            .retries(RETRIES as u32)
            .max_retry_wait(RETRY_DELAY_MAX.as_millis() as u64)
    }

    /// Opens a connection for subscriptions and subscribes to the topics.
    pub async fn subscribe(&self, topics: &[String]) -> Result<(Subscriber, Pushes), RedisError> {
        let (sender, receiver) = mpsc::channel(MESSAGES_MAX);
        let overflowed = Arc::new(AtomicBool::new(false));
        let pushes = Pushes { receiver, overflowed: overflowed.clone() };

        let send = move |push: PushInfo| {
            // Runs in the connection's task, which must not wait for the node.
            let sent = sender.try_send(push);
            if matches!(sent, Err(mpsc::error::TrySendError::Full(_))) {
                overflowed.store(true, Relaxed);
            }
            sent.map_err(|_| redis::aio::SendError)
        };

        let connecting = async {
            Ok::<_, RedisError>(match self {
                Self::Single(client) => {
                    let config = AsyncConnectionConfig::new().set_push_sender(send);
                    Subscriber::Single(client.get_multiplexed_async_connection_with_config(&config).await?)
                }
                Self::Cluster(urls) => Subscriber::Cluster(
                    Self::builder(urls)
                        .push_sender(send)
                        .build()?
                        .get_async_connection()
                        .await?,
                ),
            })
        };
        let subscriber = timeout(CONNECT_TIMEOUT * 2, connecting)
            .await
            .map_err(|_| io("no connection in time"))??;
        subscriber.add(topics).await?;
        Ok((subscriber, pushes))
    }
}

/// A connection for commands, which reconnects by itself.
#[derive(Clone)]
pub enum Commands {
    Single(ConnectionManager),
    Cluster(ClusterConnection),
}

impl ConnectionLike for Commands {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::Single(connection) => connection.req_packed_command(command),
            Self::Cluster(connection) => connection.req_packed_command(command),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::Single(connection) => connection.req_packed_commands(pipeline, offset, count),
            Self::Cluster(connection) => connection.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        0
    }
}

/// A connection for subscriptions, which is replaced once it is broken.
pub enum Subscriber {
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Subscriber {
    pub async fn add(&self, topics: &[String]) -> Result<(), RedisError> {
        match self {
            Self::Single(connection) => {
                for topics in topics.chunks(TOPICS_MAX) {
                    in_time(connection.clone().subscribe(topics)).await?;
                }
                Ok(())
            }
            Self::Cluster(connection) => {
                let subscribes = topics.iter().map(|topic| {
                    let mut connection = connection.clone();
                    Ok(async move { in_time(connection.ssubscribe(topic)).await })
                });
                futures_util::stream::iter(subscribes)
                    .try_for_each_concurrent(SUBSCRIBES_MAX, |one| one)
                    .await
            }
        }
    }

    pub async fn remove(&self, topic: &str) -> Result<(), RedisError> {
        match self {
            Self::Single(connection) => in_time(connection.clone().unsubscribe(topic)).await,
            Self::Cluster(connection) => in_time(connection.clone().sunsubscribe(topic)).await,
        }
    }

    /// Whether an unsubscribe is confirmed by [`Received::Dropped`].
    pub fn confirms_by_push(&self) -> bool {
        matches!(self, Self::Cluster(_))
    }

    pub async fn ping(&self) -> Result<(), RedisError> {
        match self {
            Self::Single(connection) => in_time(redis::cmd("PING").query_async(&mut connection.clone())).await,
            Self::Cluster(connection) => in_time(redis::cmd("PING").query_async(&mut connection.clone())).await,
        }
    }
}

/// The messages of a [`Subscriber`].
pub struct Pushes {
    receiver: mpsc::Receiver<PushInfo>,
    overflowed: Arc<AtomicBool>,
}

/// An event on a subscription.
pub enum Received {
    Message {
        topic: Vec<u8>,
        payload: Vec<u8>,
    },
    /// The server no longer delivers this topic: its shard moved, or it was unsubscribed.
    Dropped(Vec<u8>),
    /// The connection broke, or messages were lost.
    Lost,
}

impl Pushes {
    pub async fn next(&mut self) -> Received {
        loop {
            let Some(push) = self.receiver.recv().await else {
                return Received::Lost;
            };
            if self.overflowed.load(Relaxed) {
                tracing::warn!("messages from Redis were dropped because the node cannot keep up; its clients recover");
                return Received::Lost;
            }

            let mut data = push.data.into_iter().map(|value| match value {
                Value::BulkString(bytes) => bytes,
                Value::SimpleString(text) => text.into_bytes(),
                _ => Vec::new(),
            });

            match (push.kind, data.next(), data.next()) {
                (PushKind::Message | PushKind::SMessage, Some(topic), Some(payload)) => {
                    return Received::Message { topic, payload };
                }
                (PushKind::SUnsubscribe, Some(topic), _) => return Received::Dropped(topic),
                (PushKind::Disconnection, ..) => return Received::Lost,
                _ => {}
            }
        }
    }
}

pub fn io(text: &'static str) -> RedisError {
    RedisError::from((ErrorKind::Io, text))
}

async fn in_time<T>(answer: impl Future<Output = Result<T, RedisError>>) -> Result<T, RedisError> {
    timeout(RESPONSE_TIMEOUT, answer)
        .await
        .unwrap_or_else(|_| Err(io("no reply in time")))
}
