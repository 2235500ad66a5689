//! This node's subscriptions on Redis: one loop that follows and unfollows, hands messages to the hub, and comes back
//! after a loss.

use super::server::{Commands, Heard, Pushes, Server, Subscriber, io};
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

/// In braces as the channel's keys are, so that a cluster has them on one server.
const TOPIC: &str = "beamline:topic:{.";
const QUEUE_MAX: usize = 1024;
/// A connection that is silent for this long is asked whether it lives.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// First and longest wait between attempts to come back.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

pub fn topic(channel: &str) -> String {
    format!("{TOPIC}{channel}}}")
}

fn channel(topic: &[u8]) -> Option<&str> {
    std::str::from_utf8(topic).ok()?.strip_prefix(TOPIC)?.strip_suffix('}')
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
        self.0
            .send(Follow { channel: channel.into(), on, done })
            .await
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

pub struct Follower {
    server: Server,
    /// It comes back by itself, once somebody uses it.
    commands: Commands,
    hub: Arc<Hub>,
    subscriber: Subscriber,
    pushes: Pushes,
    inbox: mpsc::Receiver<Follow>,
    followed: HashSet<String>,
    /// Topics of a cluster that were left, as often as the server has yet to confirm it: it does so in the words by which
    /// it drops one, and the topic may be followed again by then.
    leaving: HashMap<String, usize>,
}

enum Lost {
    Connection,
    /// Nobody is left to ask, or the node stops.
    End,
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
                heard = self.pushes.next() => match heard {
                    Heard::Message { topic, payload } => {
                        if let Some(channel) = channel(&topic) {
                            deliver(&self.hub, channel, &payload);
                        }
                    }
                    Heard::Dropped(topic) if self.has_left(&topic) => {}
                    Heard::Dropped(_) | Heard::Lost => return Lost::Connection,
                },
                follow = self.inbox.recv() => {
                    let Some(follow) = follow else { return Lost::End };
                    if self.set(follow).await.is_err() {
                        return Lost::Connection;
                    }
                }
                // A host that vanished closes no connection.
                _ = pings.tick() => {
                    if self.subscriber.ping().await.is_err() {
                        return Lost::Connection;
                    }
                }
            }
        }
    }

    /// Whether a topic that the server dropped was left by us.
    fn has_left(&mut self, topic: &[u8]) -> bool {
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

    /// Requests of one channel may have overtaken each other on their way here: what the hub holds decides.
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

    async fn come_back(&mut self, cancel: &CancellationToken) -> Lost {
        let mut wait = RETRY.0;
        loop {
            self.followed.retain(|channel| self.hub.is_followed(channel));
            let topics: Vec<String> = self.followed.iter().map(|channel| topic(channel)).collect();
            let attempt = async {
                // Both ways work again before anybody is told to come and read.
                redis::cmd("PING").query_async::<()>(&mut self.commands).await?;
                self.server.subscribe(&topics).await
            };
            match refusing(&mut self.inbox, cancel, attempt).await {
                None => return Lost::End,
                Some(Ok(again)) => {
                    (self.subscriber, self.pushes) = again;
                    self.leaving.clear();
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
