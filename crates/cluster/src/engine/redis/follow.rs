//! This node's subscriptions on Redis: one loop that follows and unfollows, hands messages to the hub, and comes back
//! after a loss.

use super::{CONNECT_TIMEOUT, RESPONSE_TIMEOUT};
use crate::hub::Hub;
use futures_util::StreamExt;
use prost::Message;
use redis::aio::{ConnectionManager, PubSubSink, PubSubStream};
use redis::{Client, ErrorKind, RedisError};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;
use wire::realtime::{Publication, Push};

const TOPIC: &str = "beamline:topic:";
const QUEUE_MAX: usize = 1024;
/// Topics in one SUBSCRIBE.
const TOPICS_MAX: usize = 1000;
/// A connection that is silent for this long is asked whether it lives.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// First and longest wait between attempts to come back.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

pub fn topic(channel: &str) -> String {
    format!("{TOPIC}{channel}")
}

/// Asks the loop.
pub struct Follows(mpsc::Sender<Follow>);

struct Follow {
    channel: String,
    on: bool,
    done: oneshot::Sender<Result<(), RedisError>>,
}

impl Follows {
    /// Returns once publications to the channel arrive (or none need to any more).
    pub async fn set(&self, channel: &str, on: bool) -> Result<(), RedisError> {
        let gone = || io("the node is stopping");
        let (done, answer) = oneshot::channel();
        self.0.send(Follow { channel: channel.into(), on, done }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

pub struct Follower {
    client: Client,
    /// What commands go over; it comes back by itself, once somebody uses it.
    commands: ConnectionManager,
    hub: Arc<Hub>,
    sink: PubSubSink,
    stream: PubSubStream,
    inbox: mpsc::Receiver<Follow>,
    followed: HashSet<String>,
}

enum Lost {
    Connection,
    /// Nobody is left to ask, or the node stops.
    End,
}

impl Follower {
    pub async fn connect(
        client: Client,
        commands: ConnectionManager,
        hub: Arc<Hub>,
    ) -> Result<(Follows, Self), RedisError> {
        let (sink, stream) = subscribe(&client, &[]).await?;
        let (sender, inbox) = mpsc::channel(QUEUE_MAX);
        Ok((Follows(sender), Self { client, commands, hub, sink, stream, inbox, followed: HashSet::new() }))
    }

    pub async fn run(mut self, cancel: CancellationToken) {
        loop {
            match self.listen(&cancel).await {
                Lost::End => return,
                Lost::Connection => {
                    tracing::warn!("the connection to Redis is lost; coming back");
                    if let Lost::End = self.come_back(&cancel).await {
                        return;
                    }
                    tracing::info!(channels = self.followed.len(), "back on Redis; positioned subscribers recover");
                    self.hub.interrupted();
                }
            }
        }
    }

    async fn listen(&mut self, cancel: &CancellationToken) -> Lost {
        let mut pings = tokio::time::interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return Lost::End,
                message = self.stream.next() => {
                    let Some(message) = message else { return Lost::Connection };
                    if let Some(channel) = message.get_channel_name().strip_prefix(TOPIC) {
                        deliver(&self.hub, channel, message.get_payload_bytes());
                    }
                }
                follow = self.inbox.recv() => {
                    let Some(follow) = follow else { return Lost::End };
                    if self.set(follow).await.is_err() {
                        return Lost::Connection;
                    }
                }
                // A host that vanished closes no connection.
                _ = pings.tick() => {
                    if !matches!(timeout(RESPONSE_TIMEOUT, self.sink.ping::<redis::Value>()).await, Ok(Ok(_))) {
                        return Lost::Connection;
                    }
                }
            }
        }
    }

    /// Requests of one channel may have overtaken each other on their way here: what the hub holds decides.
    async fn set(&mut self, Follow { channel, on, done }: Follow) -> Result<(), ()> {
        let changes = if on { !self.followed.contains(&channel) } else { !self.hub.is_followed(&channel) };
        if !changes {
            let _ = done.send(Ok(()));
            return Ok(());
        }
        let topic = topic(&channel);
        let change = async { if on { self.sink.subscribe(topic).await } else { self.sink.unsubscribe(topic).await } };
        let outcome = timeout(RESPONSE_TIMEOUT, change).await.unwrap_or_else(|_| Err(io("no answer in time")));
        if !on {
            self.followed.remove(&channel);
        } else if outcome.is_ok() {
            self.followed.insert(channel);
        }
        let ended = outcome.as_ref().map(|_| ()).map_err(|_| ());
        let _ = done.send(outcome);
        ended
    }

    async fn come_back(&mut self, cancel: &CancellationToken) -> Lost {
        let mut wait = RETRY.0;
        loop {
            self.followed.retain(|channel| self.hub.is_followed(channel));
            let channels: Vec<String> = self.followed.iter().cloned().collect();
            let attempt = async {
                // Both ways work again before anybody is told to come and read.
                redis::cmd("PING").query_async::<()>(&mut self.commands).await?;
                subscribe(&self.client, &channels).await
            };
            match refusing(&mut self.inbox, cancel, attempt).await {
                None => return Lost::End,
                Some(Ok(again)) => {
                    (self.sink, self.stream) = again;
                    return Lost::Connection;
                }
                Some(Err(error)) => tracing::debug!(%error, "Redis is not back"),
            }
            // Full jitter: nodes that lost Redis together do not come back together.
            let share = f64::from(uuid::Uuid::new_v4().as_u128() as u16) / f64::from(u16::MAX);
            let pause = tokio::time::sleep(wait.mul_f64(share));
            wait = (wait * 2).min(RETRY.1);
            if refusing(&mut self.inbox, cancel, pause).await.is_none() {
                return Lost::End;
            }
        }
    }
}

/// Waits for `future` and tells whoever asks meanwhile that Redis is down; `None` when the node stops.
async fn refusing<T>(
    inbox: &mut mpsc::Receiver<Follow>,
    cancel: &CancellationToken,
    future: impl Future<Output = T>,
) -> Option<T> {
    let mut future = std::pin::pin!(future);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return None,
            done = &mut future => return Some(done),
            follow = inbox.recv() => {
                let _ = follow?.done.send(Err(io("Redis is down")));
            }
        }
    }
}

fn io(text: &'static str) -> RedisError {
    RedisError::from((ErrorKind::Io, text))
}

async fn subscribe(client: &Client, channels: &[String]) -> Result<(PubSubSink, PubSubStream), RedisError> {
    let late = |_| io("no connection in time");
    let (mut sink, stream) = timeout(CONNECT_TIMEOUT, client.get_async_pubsub()).await.map_err(late)??.split();
    for channels in channels.chunks(TOPICS_MAX) {
        let topics: Vec<String> = channels.iter().map(|channel| topic(channel)).collect();
        timeout(RESPONSE_TIMEOUT, sink.subscribe(topics)).await.map_err(late)??;
    }
    Ok((sink, stream))
}

/// `p<offset>:<epoch>:<publication>` or `e<push>`.
fn deliver(hub: &Hub, channel: &str, payload: &[u8]) {
    let decoded = match payload.split_first() {
        Some((b'p', rest)) => {
            publication(rest).map(|(publication, epoch)| hub.publication(channel, &publication, epoch))
        }
        Some((b'e', rest)) => Push::decode(rest).ok().map(|push| hub.event(channel, &push)),
        _ => None,
    };
    if decoded.is_none() {
        tracing::warn!(channel, "a message on Redis cannot be read; is another program using these topics?");
    }
}

fn publication(bytes: &[u8]) -> Option<(Publication, &str)> {
    let mut parts = bytes.splitn(3, |byte| *byte == b':');
    let offset = std::str::from_utf8(parts.next()?).ok()?.parse().ok()?;
    let epoch = std::str::from_utf8(parts.next()?).ok()?;
    let publication = Publication::decode(parts.next()?).ok()?;
    Some((Publication { offset, ..publication }, epoch))
}
