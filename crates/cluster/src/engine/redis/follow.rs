//! This node's subscriptions on Redis: one loop follows and unfollows channels, passes messages to the hub, and
//! reconnects.

use super::server::{Commands, Pushes, Received, Server, Subscriber, io};
use crate::hub::Hub;
use prost::Message;
use redis::RedisError;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use wire::realtime::{Publication, Push};

/// The channel is in braces, as in its keys, so that a cluster keeps topic and keys on one server.
const TOPIC: &str = "beamline:topic:{.";
const QUEUE_MAX: usize = 1024;
/// How often the connection is pinged.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// The first and the longest pause between attempts to reconnect.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

pub fn topic(channel: &str) -> String {
    format!("{TOPIC}{channel}}}")
}

fn channel(topic: &[u8]) -> Option<&str> {
    std::str::from_utf8(topic).ok()?.strip_prefix(TOPIC)?.strip_suffix('}')
}

/// A handle to the loop.
pub struct Follows(mpsc::Sender<Follow>);

struct Follow {
    channel: String,
    on: bool,
    done: oneshot::Sender<Result<(), RedisError>>,
}

impl Follows {
    /// Follows or unfollows a channel. Returns once the change has taken effect.
    pub async fn set(&self, channel: &str, on: bool) -> Result<(), RedisError> {
        let gone = || io("the node is stopping");
        let (done, answer) = oneshot::channel();

        self.0
            .send(Follow { channel: channel.into(), on, done })
            .await
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

pub struct Follower {
    server: Server,
    /// Reconnects on its own when it is used.
    commands: Commands,
    hub: Arc<Hub>,
    subscriber: Subscriber,
    pushes: Pushes,
    inbox: mpsc::Receiver<Follow>,
    followed: HashSet<String>,
    /// Unfollowed channels of a cluster, with the number of outstanding confirmations. A confirmation looks like a
    /// dropped topic, and the channel may have been followed again by then.
    leaving: HashMap<String, usize>,
}

/// Why listening stopped.
enum Exit {
    /// The connection is lost.
    Lost,
    /// The node stops.
    Stopped,
}

impl Follower {
    pub async fn connect(server: Server, commands: Commands, hub: Arc<Hub>) -> Result<(Follows, Self), RedisError> {
        let (subscriber, pushes) = server.subscribe(&[]).await?;
        let (sender, inbox) = mpsc::channel(QUEUE_MAX);
        let (followed, leaving) = (HashSet::new(), HashMap::new());
        Ok((Follows(sender), Self { server, commands, hub, subscriber, pushes, inbox, followed, leaving }))
    }

    pub async fn run(mut self, cancel: CancellationToken) {
        loop {
            match self.listen(&cancel).await {
                Exit::Stopped => return,
                Exit::Lost => {
                    tracing::warn!("lost the connection to Redis; reconnecting");
                    if self.reconnect(&cancel).await.is_none() {
                        return;
                    }
                    tracing::info!(
                        channels = self.followed.len(),
                        "reconnected to Redis; positioned subscribers recover"
                    );
                    self.hub.interrupted();
                }
            }
        }
    }

    async fn listen(&mut self, cancel: &CancellationToken) -> Exit {
        let mut pings = tokio::time::interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);

        loop {
            tokio::select! {
                () = cancel.cancelled() => return Exit::Stopped,
                received = self.pushes.next() => match received {
                    Received::Message { topic, payload } => {
                        if let Some(channel) = channel(&topic) {
                            deliver(&self.hub, channel, &payload);
                        }
                    }
                    Received::Dropped(topic) if self.confirms_unfollow(&topic) => {}
                    Received::Dropped(_) | Received::Lost => return Exit::Lost,
                },
                follow = self.inbox.recv() => {
                    let Some(follow) = follow else { return Exit::Stopped };
                    if self.set(follow).await.is_err() {
                        return Exit::Lost;
                    }
                }
                // A crashed host does not close its connections; only a ping detects that.
                _ = pings.tick() => {
                    if self.subscriber.ping().await.is_err() {
                        return Exit::Lost;
                    }
                }
            }
        }
    }

    /// Whether a topic that the server dropped was unfollowed by this node.
    fn confirms_unfollow(&mut self, topic: &[u8]) -> bool {
        let Some(name) = channel(topic) else { return true };
        let Some(times) = self.leaving.get_mut(name) else {
            return !self.followed.contains(name);
        };

        *times -= 1;
        if *times == 0 {
            self.leaving.remove(name);
        }
        true
    }

    /// Follows or unfollows a channel. Requests for one channel may arrive out of order, so an unfollow takes effect
    /// only if the hub has no subscriber left. An error means that the connection is lost.
    async fn set(&mut self, Follow { channel, on, done }: Follow) -> Result<(), ()> {
        let changes = if on {
            !self.followed.contains(&channel)
        } else {
            !self.hub.is_followed(&channel)
        };
        if !changes {
            let _ = done.send(Ok(()));
            return Ok(());
        }

        let topic = topic(&channel);
        let outcome = if on {
            self.subscriber.add(&[topic]).await
        } else {
            self.subscriber.remove(&topic).await
        };

        // Also if the unsubscribe failed: the connection is then replaced by one without this topic.
        if !on {
            self.followed.remove(&channel);
            if self.subscriber.confirms_by_push() {
                *self.leaving.entry(channel).or_default() += 1;
            }
        } else if outcome.is_ok() {
            self.followed.insert(channel);
        }

        let ended = outcome.as_ref().map(|_| ()).map_err(|_| ());
        let _ = done.send(outcome);
        ended
    }

    /// Retries until a new connection has all followed topics; `None` when the node stops.
    async fn reconnect(&mut self, cancel: &CancellationToken) -> Option<()> {
        let mut wait = RETRY.0;
        loop {
            // Channels that lost their last subscriber meanwhile need no topic.
            self.followed.retain(|channel| self.hub.is_followed(channel));
            let topics: Vec<String> = self.followed.iter().map(|channel| topic(channel)).collect();
            let attempt = async {
                // Clients recover through the command connection, so it must work too before they are notified.
                redis::cmd("PING").query_async::<()>(&mut self.commands).await?;
                self.server.subscribe(&topics).await
            };
            match refusing(&mut self.inbox, cancel, attempt).await? {
                Ok(connection) => {
                    // The old connection's outstanding confirmations will never arrive.
                    (self.subscriber, self.pushes) = connection;
                    self.leaving.clear();
                    return Some(());
                }
                Err(error) => tracing::debug!(%error, "cannot reconnect to Redis yet"),
            }

            // Full jitter, so that nodes that lost Redis at the same time do not all reconnect at the same time.
            let share = f64::from(uuid::Uuid::new_v4().as_u128() as u16) / f64::from(u16::MAX);
            let pause = tokio::time::sleep(wait.mul_f64(share));
            wait = (wait * 2).min(RETRY.1);
            refusing(&mut self.inbox, cancel, pause).await?;
        }
    }
}

/// Awaits `future` and answers requests with an error meanwhile; `None` when the node stops.
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

/// Delivers a message: `p<offset>:<epoch>:<publication>` or `e<push>`.
fn deliver(hub: &Hub, channel: &str, payload: &[u8]) {
    let decoded = match payload.split_first() {
        Some((b'p', rest)) => {
            publication(rest).map(|(publication, epoch)| hub.publication(channel, &publication, epoch))
        }
        Some((b'e', rest)) => Push::decode(rest).ok().map(|push| hub.event(channel, &push)),
        _ => None,
    };
    if decoded.is_none() {
        tracing::warn!(channel, "cannot decode a message from Redis; does another program publish to these topics?");
    }
}

fn publication(bytes: &[u8]) -> Option<(Publication, &str)> {
    let mut parts = bytes.splitn(3, |byte| *byte == b':');
    // The publication is the rest, which may contain colons.
    let offset = std::str::from_utf8(parts.next()?).ok()?.parse().ok()?;
    let epoch = std::str::from_utf8(parts.next()?).ok()?;
    let publication = Publication::decode(parts.next()?).ok()?;
    Some((Publication { offset, ..publication }, epoch))
}
