//! One connection to NATS: publishing, requests, and the task that dispatches replies.

use super::access::Access;
use super::convert;
use super::inbox::{Awaited, DROPPED_HEADER, Disposition, Inbox};
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

/// A publish blocks only while the client's queue is full, because the server does not read.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(5);
/// Before a deliberate reconnect, requests in flight on the connection have this long to be answered.
const ANSWERS_DEADLINE: Duration = Duration::from_secs(2);
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// The client does not notify of its state, so [`Link::until`] polls it.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

pub struct Link {
    /// Index in the pool.
    pub number: usize,
    pub client: Client,
    pub jetstream: Context,
    inbox: Arc<Inbox>,
    connects: watch::Receiver<u64>,
    outbox: Outbox,
    /// Set during a deliberate reconnect.
    renewing: Arc<AtomicBool>,
}

impl Link {
    pub async fn open(
        number: usize,
        access: &Arc<Access>,
        interruptions: &Arc<watch::Sender<u64>>,
        tasks: &TaskTracker,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let inbox = Arc::new(Inbox::new(format!("_INBOX.{}", URL_SAFE_NO_PAD.encode(uuid::Uuid::new_v4()))));
        let (connected, mut connects) = watch::channel(0);
        let renewing = Arc::new(AtomicBool::new(false));
        let client = access
            .connect({
                let (inbox, renewing) = (inbox.clone(), renewing.clone());
                let interruptions = interruptions.clone();
                move |event| {
                    observe(number, &event, &inbox, &renewing, &connected);
                    if matches!(event, Event::Connected) && *connected.borrow() > 1 {
                        interruptions.send_modify(|count| *count += 1);
                    }
                }
            })
            .await?;
        // The first `Connected` event may arrive after the client is returned. Consumers would take it for a reconnect.
        connects.wait_for(|count| *count > 0).await.map_err(|_| closed())?;

        let replies = client
            .subscribe(inbox.pattern())
            .await
            .map_err(|e| Error::Disconnected(e.to_string()))?;
        tasks.spawn(dispatch_replies(replies, inbox.clone(), cancel.clone()));
        let jetstream = jetstream::new(client.clone());
        let outbox = Outbox::open(client.clone(), tasks, cancel);
        Ok(Self { number, client, jetstream, inbox, outbox, connects, renewing })
    }

    /// Whether a deliberate reconnect is under way; new requests should prefer another connection.
    pub fn renewing(&self) -> bool {
        self.renewing.load(Ordering::Relaxed)
    }

    /// The number of connects so far. After each one, requests and pulls sent before it are lost.
    pub fn connects(&self) -> watch::Receiver<u64> {
        self.connects.clone()
    }

    /// Id of the server that this connection is attached to; the servers of a cluster have different ids.
    pub fn server(&self) -> String {
        self.client.server_info().server_id
    }

    pub fn connected(&self) -> Result<()> {
        match self.client.connection_state() {
            State::Connected => Ok(()),
            State::Pending | State::Disconnected => {
                Err(Error::Disconnected("the connection to NATS is lost; reconnecting".into()))
            }
        }
    }

    pub async fn publish(&self, message: Message) -> Result<()> {
        self.connected()?;
        let headers = convert::to_nats(&message.headers);
        let reply = message.reply.map(|reply| Subject::from(&*reply));
        let sent = self.send(&message.subject, reply, headers, message.payload);
        let full = |_| Error::Disconnected("NATS accepts no messages".into());
        tokio::time::timeout(PUBLISH_DEADLINE, sent).await.map_err(full)?
    }

    /// Publishes with a reply slot of its own and waits at most `deadline` for the reply.
    pub async fn ask(
        &self,
        subject: &str,
        headers: HeaderMap,
        payload: Bytes,
        awaited: Awaited,
        deadline: Duration,
    ) -> Result<async_nats::Message> {
        // Fail at once while disconnected; the client would hold the request back until it has reconnected.
        self.connected()?;
        let (slot, answered) = self.inbox.reserve(awaited).ok_or_else(closed)?;
        let exchange = async {
            self.send(subject, Some(slot.subject().into()), headers, payload)
                .await?;
            answered.await.map_err(|_| lost())
        };
        let late = |_| Error::Timeout(subject.into());
        let reply = tokio::time::timeout(deadline, exchange).await.map_err(late)??;

        let refused = reply.status == Some(StatusCode::NO_RESPONDERS)
            || reply
                .headers
                .as_ref()
                .is_some_and(|headers| headers.get(DROPPED_HEADER).is_some());
        if refused {
            Err(Error::NoResponders(subject.into()))
        } else {
            Ok(reply)
        }
    }

    /// Returns once the server has processed everything sent before.
    pub async fn round_trip(&self, deadline: Duration) -> Result<()> {
        self.reach(self, deadline).await
    }

    /// Returns once a message sent over this connection has arrived on `other`.
    pub async fn reach(&self, other: &Self, deadline: Duration) -> Result<()> {
        self.connected()?;
        let (slot, answered) = other.inbox.reserve(Awaited::Reply).ok_or_else(closed)?;
        let exchange = async {
            self.send(&slot.subject(), None, HeaderMap::new(), Bytes::new()).await?;
            answered.await.map_err(|_| lost())
        };
        let late = |_| Error::Disconnected("NATS does not respond".into());
        tokio::time::timeout(deadline, exchange).await.map_err(late)??;
        Ok(())
    }

    /// Waits until a lost connection is up again.
    pub async fn returned(&self, deadline: Duration) -> Result<()> {
        self.until(deadline, || self.connected().is_ok()).await
    }

    /// Reconnects deliberately, so that the current credentials and certificates take effect.
    ///
    /// Requests in flight get [`ANSWERS_DEADLINE`] to be answered; after that they fail as disconnected.
    pub async fn renew(&self) -> Result<()> {
        let _renewing = Renewing::new(&self.renewing);

        let answered = self.until(ANSWERS_DEADLINE, || self.inbox.waiting() == 0).await;
        // Flushes what was published. A connection that just dropped cannot flush; it reconnects on its own.
        let sent = self.round_trip(ANSWERS_DEADLINE).await;
        if let Some(error) = answered.and(sent).err() {
            tracing::debug!(%error, connection = self.number, "reconnecting to NATS with messages in flight");
        }

        let connects = || self.client.statistics().connects.load(Ordering::Relaxed);
        let before = connects();
        self.client.force_reconnect().await.map_err(|_| closed())?;
        self.until(RENEW_DEADLINE, || connects() > before && self.connected().is_ok())
            .await?;
        self.round_trip(RENEW_DEADLINE).await
    }

    /// Polls until `done` holds.
    async fn until(&self, deadline: Duration, done: impl Fn() -> bool) -> Result<()> {
        let end = Instant::now() + deadline;
        while !done() {
            if Instant::now() >= end {
                self.connected()?;
                return Err(Error::Disconnected("NATS did not respond in time".into()));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Fails if the server does not accept a message of `size` bytes, including headers.
    pub fn check_size(&self, size: usize) -> Result<()> {
        let max = self.client.max_payload().min(wire::limits::BUS_MESSAGE_MAX);
        if size > max {
            Err(Error::TooLarge { size, max })
        } else {
            Ok(())
        }
    }

    async fn send(&self, subject: &str, reply: Option<Subject>, headers: HeaderMap, payload: Bytes) -> Result<()> {
        // The server counts the headers against `max_payload`, too.
        self.check_size(payload.len() + convert::header_bytes(&headers))?;
        let message = Outgoing { subject: subject.into(), reply, headers, payload };
        if self.outbox.put(message).await {
            Ok(())
        } else {
            Err(closed())
        }
    }
}

/// Keeps the `renewing` flag set until dropped.
struct Renewing<'a>(&'a AtomicBool);

impl<'a> Renewing<'a> {
    fn new(renewing: &'a AtomicBool) -> Self {
        renewing.store(true, Ordering::Relaxed);
        Self(renewing)
    }
}

impl Drop for Renewing<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

fn closed() -> Error {
    Error::Disconnected("the bus is closed".into())
}

fn lost() -> Error {
    Error::Disconnected(
        "the connection to NATS was lost before the reply arrived; the request may have been handled".into(),
    )
}

/// Logs and counts the client's events, and fails requests in flight when the connection is lost.
fn observe(connection: usize, event: &Event, inbox: &Inbox, renewing: &AtomicBool, connected: &watch::Sender<u64>) {
    match event {
        Event::Connected => {
            tracing::info!(connection, "connected to NATS");
            connected.send_modify(|count| *count += 1);
        }
        Event::Disconnected => {
            // Replies still on their way to this connection's inbox are lost.
            inbox.fail_all();
            if renewing.load(Ordering::Relaxed) {
                tracing::info!(connection, "reconnecting to NATS after a reload");
            } else {
                tracing::warn!(connection, "lost the connection to NATS; reconnecting");
            }
        }
        Event::SlowConsumer(_) => {
            metrics::counter!("beamline_bus_dropped_total").increment(1);
            tracing::warn!(connection, "client-side subscription queue full; message dropped");
        }
        Event::ServerError(error) => tracing::error!(%error, connection, "NATS reported an error"),
        // Includes every failed attempt to reconnect, so it is not logged above the level of the loss itself.
        Event::ClientError(error) => tracing::warn!(%error, connection, "NATS client error"),
        Event::LameDuckMode | Event::Draining | Event::Closed => {
            tracing::info!(%event, connection, "NATS connection changed state")
        }
    }
}

/// Routes replies to the requests in flight until the client closes or the task is cancelled.
async fn dispatch_replies(mut replies: async_nats::Subscriber, inbox: Arc<Inbox>, cancel: CancellationToken) {
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            reply = replies.next() => match reply {
                Some(reply) => {
                    if inbox.answer(reply) == Disposition::Late {
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
    async fn timed_out_requests_free_their_slots() {
        let server = testkit::NatsServer::start().await;
        let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
        let access = Arc::new(Access::new(NatsConfig { url: server.url(), ..NatsConfig::default() }).unwrap());
        let link = Link::open(0, &access, &Arc::default(), &tasks, &cancel).await.unwrap();
        // A responder that never answers.
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
