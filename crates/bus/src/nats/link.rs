//! One connection: publishing, asking, and the task that hands replies out.

use super::access::Access;
use super::convert;
use super::inbox::{Awaited, DROPPED_HEADER, Handed, Inbox};
use super::outbox::{Outbox, Outgoing};
use crate::{Error, Message, Result};
use async_nats::connection::State;
use async_nats::jetstream::{self, Context};
use async_nats::{Client, Event, HeaderMap, StatusCode, Subject};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures_util::StreamExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A publish waits only when the client's own queue is full: the server takes nothing.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(5);
/// Before a connection is made anew, what is in flight on it has this long to be answered.
const ANSWERS_DEADLINE: Duration = Duration::from_secs(2);
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// The client says how it is only when asked.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

pub struct Link {
    /// Its place in the pool.
    pub number: usize,
    pub client: Client,
    pub jetstream: Context,
    inbox: Arc<Inbox>,
    connects: watch::Receiver<u64>,
    outbox: Outbox,
    leaving: Arc<AtomicBool>,
}

impl Link {
    pub async fn open(
        number: usize,
        access: &Arc<Access>,
        tasks: &TaskTracker,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let inbox = Arc::new(Inbox::new(format!("_INBOX.{}", URL_SAFE_NO_PAD.encode(uuid::Uuid::new_v4()))));
        let (connected, mut connects) = watch::channel(0);
        let told = inbox.clone();
        let leaving = Arc::new(AtomicBool::new(false));
        let meant = leaving.clone();
        let client = access.connect(move |event| observe(number, &event, &told, &meant, &connected)).await?;
        connects.wait_for(|count| *count > 0).await.map_err(|_| closed())?;
        let replies = client.subscribe(inbox.pattern()).await.map_err(|e| Error::Disconnected(e.to_string()))?;
        tasks.spawn(hand_out(replies, inbox.clone(), cancel.clone()));
        let jetstream = jetstream::new(client.clone());
        let outbox = Outbox::open(client.clone(), tasks, cancel);
        Ok(Self { number, client, jetstream, inbox, outbox, connects, leaving })
    }

    /// About to be made anew: better not asked.
    pub fn leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// How often it has connected: with each time, the server has forgotten what was asked before.
    pub fn connects(&self) -> watch::Receiver<u64> {
        self.connects.clone()
    }

    /// Of the server, in a cluster of them.
    pub fn server(&self) -> String {
        self.client.server_info().server_id
    }

    pub fn connected(&self) -> Result<()> {
        match self.client.connection_state() {
            State::Connected => Ok(()),
            State::Pending | State::Disconnected => {
                Err(Error::Disconnected("the connection to NATS is lost and sought again".into()))
            }
        }
    }

    pub async fn publish(&self, message: Message) -> Result<()> {
        self.connected()?;
        let headers = convert::to_nats(&message.headers);
        let reply = message.reply.map(|reply| Subject::from(&*reply));
        let sent = self.send(&message.subject, reply, headers, message.payload);
        let full = |_| Error::Disconnected("NATS takes no messages".into());
        tokio::time::timeout(PUBLISH_DEADLINE, sent).await.map_err(full)?
    }

    /// Publishes with a reply slot and waits for the answer.
    pub async fn ask(
        &self,
        subject: &str,
        headers: HeaderMap,
        payload: Bytes,
        awaited: Awaited,
        deadline: Duration,
    ) -> Result<async_nats::Message> {
        self.connected()?;
        let (slot, answered) = self.inbox.reserve(awaited).ok_or_else(closed)?;
        let exchange = async {
            self.send(subject, Some(slot.subject().into()), headers, payload).await?;
            answered.await.map_err(|_| lost())
        };
        let late = |_| Error::Timeout(subject.into());
        let reply = tokio::time::timeout(deadline, exchange).await.map_err(late)??;
        let refused = reply.status == Some(StatusCode::NO_RESPONDERS)
            || reply.headers.as_ref().is_some_and(|headers| headers.get(DROPPED_HEADER).is_some());
        if refused { Err(Error::NoResponders(subject.into())) } else { Ok(reply) }
    }

    /// Returns once the server has taken everything sent before.
    pub async fn round_trip(&self, deadline: Duration) -> Result<()> {
        self.reach(self, deadline).await
    }

    /// Returns once a message sent here has come out of `other`.
    pub async fn reach(&self, other: &Self, deadline: Duration) -> Result<()> {
        self.connected()?;
        let (slot, answered) = other.inbox.reserve(Awaited::Reply).ok_or_else(closed)?;
        let exchange = async {
            self.send(&slot.subject(), None, HeaderMap::new(), Bytes::new()).await?;
            answered.await.map_err(|_| lost())
        };
        let late = |_| Error::Disconnected("NATS does not answer".into());
        tokio::time::timeout(deadline, exchange).await.map_err(late)??;
        Ok(())
    }

    /// Waits for a lost connection to be there again.
    pub async fn returned(&self, deadline: Duration) -> Result<()> {
        self.until(deadline, || self.connected().is_ok()).await
    }

    /// Connects anew, with what its files now say.
    pub async fn renew(&self) -> Result<()> {
        let _leaving = Leaving::new(&self.leaving);
        let answered = self.until(ANSWERS_DEADLINE, || self.inbox.waiting() == 0).await;
        // What is published has left; on a connection that is lost just now it would not, and that one comes anew by itself.
        let sent = self.round_trip(ANSWERS_DEADLINE).await;
        if let Some(error) = answered.and(sent).err() {
            tracing::debug!(%error, connection = self.number, "connecting to NATS anew while something is in flight");
        }
        let connects = || self.client.statistics().connects.load(Ordering::Relaxed);
        let before = connects();
        self.client.force_reconnect().await.map_err(|_| closed())?;
        self.until(RENEW_DEADLINE, || connects() > before && self.connected().is_ok()).await?;
        self.round_trip(RENEW_DEADLINE).await
    }

    async fn until(&self, deadline: Duration, done: impl Fn() -> bool) -> Result<()> {
        let end = Instant::now() + deadline;
        while !done() {
            if Instant::now() >= end {
                self.connected()?;
                return Err(Error::Disconnected("requests in flight are not answered".into()));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        Ok(())
    }

    async fn send(&self, subject: &str, reply: Option<Subject>, headers: HeaderMap, payload: Bytes) -> Result<()> {
        let max = self.client.max_payload().min(wire::limits::BUS_MESSAGE_MAX);
        // The headers count too.
        let size = payload.len() + convert::header_bytes(&headers);
        if size > max {
            return Err(Error::TooLarge { size, max });
        }
        let message = Outgoing { subject: subject.into(), reply, headers, payload };
        if self.outbox.put(message).await { Ok(()) } else { Err(closed()) }
    }
}

/// Says so for as long as it lives.
struct Leaving<'a>(&'a AtomicBool);

impl<'a> Leaving<'a> {
    fn new(leaving: &'a AtomicBool) -> Self {
        leaving.store(true, Ordering::Relaxed);
        Self(leaving)
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

fn closed() -> Error {
    Error::Disconnected("the bus is closed".into())
}

fn lost() -> Error {
    Error::Disconnected("the connection to NATS was lost before the answer came; it may have been handled".into())
}

fn observe(connection: usize, event: &Event, inbox: &Inbox, meant: &AtomicBool, connected: &watch::Sender<u64>) {
    match event {
        Event::Connected => {
            tracing::info!(connection, "connected to NATS");
            connected.send_modify(|count| *count += 1);
        }
        Event::Disconnected => {
            // Answers to this connection's inbox that are under way reach nobody.
            inbox.lose();
            if meant.load(Ordering::Relaxed) {
                tracing::info!(connection, "connecting to NATS anew");
            } else {
                tracing::warn!(connection, "lost the connection to NATS; connecting again");
            }
        }
        Event::SlowConsumer(_) => {
            metrics::counter!("beamline_bus_dropped_total").increment(1);
            tracing::warn!(connection, "the client's queue of a subscription is full; a message was dropped");
        }
        Event::ServerError(error) => tracing::error!(%error, connection, "NATS refused something"),
        // Also each attempt in vain to connect again: no more than the loss that was said.
        Event::ClientError(error) => tracing::warn!(%error, connection, "the NATS connection has a problem"),
        Event::LameDuckMode | Event::Draining | Event::Closed => tracing::info!(%event, connection, "NATS connection"),
    }
}

async fn hand_out(mut replies: async_nats::Subscriber, inbox: Arc<Inbox>, cancel: CancellationToken) {
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            reply = replies.next() => match reply {
                Some(reply) => {
                    if inbox.answer(reply) == Handed::Late {
                        metrics::counter!("beamline_bus_late_replies_total").increment(1);
                    }
                }
                None => break,
            }
        }
    }
    inbox.close();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nats::NatsConfig;
    use futures_util::future::join_all;

    #[tokio::test]
    async fn a_hundred_thousand_requests_that_time_out_leave_nothing() {
        let server = testkit::NatsServer::start().await;
        let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
        let access = Arc::new(Access::new(NatsConfig { url: server.url(), ..NatsConfig::default() }).unwrap());
        let link = Link::open(0, &access, &tasks, &cancel).await.unwrap();
        // Somebody is there, who never answers.
        let _silent = link.client.subscribe("silent").await.unwrap();
        link.round_trip(Duration::from_secs(10)).await.unwrap();
        for _ in 0..20 {
            let ask = || {
                let (headers, deadline) = (HeaderMap::new(), Duration::from_millis(50));
                link.ask("silent", headers, Bytes::new(), Awaited::Reply, deadline)
            };
            let asked = join_all((0..5_000).map(|_| ask())).await;
            assert!(asked.iter().all(|outcome| matches!(outcome, Err(Error::Timeout(_)))));
            assert_eq!(link.inbox.waiting(), 0);
        }
        cancel.cancel();
        tasks.close();
        tasks.wait().await;
    }
}
