//! The pump from a NATS subscription into its bounded queue. Messages that do not fit are dropped and counted, and
//! requests among them are refused.

use super::convert;
use super::inbox::DROPPED_HEADER;
use super::link::Link;
use super::pool::Pool;
use crate::{Error, Headers, Message, Result, Subscription};
use async_nats::Subscriber;
use futures_util::{FutureExt, StreamExt};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const SUBSCRIBE_DEADLINE: Duration = Duration::from_secs(5);
const UNSUBSCRIBE_DEADLINE: Duration = Duration::from_secs(5);

pub async fn start(
    pool: &Pool,
    subject: &str,
    queue: Option<&str>,
    capacity: usize,
    tasks: &TaskTracker,
    end: &CancellationToken,
) -> Result<Subscription> {
    let link = pool.next();
    link.connected()?;
    let subscriber = match queue {
        Some(queue) => link.client.queue_subscribe(subject.to_string(), queue.into()).await,
        None => link.client.subscribe(subject.to_string()).await,
    };
    let subscriber = subscriber.map_err(|error| Error::Disconnected(error.to_string()))?;
    // Messages published after this function returns, on any connection, must reach the subscription.
    pool.known(link, SUBSCRIBE_DEADLINE).await?;

    let (sender, receiver) = mpsc::channel(capacity.max(1));
    let cancel = end.child_token();
    let pump = Pump { link: link.clone(), subscriber, sender, shared: queue.is_some() };
    tasks.spawn(pump.run(cancel.clone()));
    Ok(Subscription { receiver, guard: Some(Box::new(cancel.drop_guard())) })
}

/// Unsubscribes at the server; what it sends before it has processed this still arrives. After a round trip on the same
/// connection, [`arrived`] returns all of it.
///
/// The client forgets a subscription, and drops what arrives for it, as soon as it sends the unsubscribe; its `drain`
/// waits for its next wake-up only. If the unsubscribe has a limit, the client keeps the subscription until that many
/// messages have arrived. The server reads at most nine digits of a limit (`parseSize`); one with more counts as none,
/// and the server unsubscribes at once.
pub async fn leave(subscriber: &mut Subscriber) -> Result<()> {
    const NO_LIMIT: u64 = 1_000_000_000_000;
    let sent = subscriber.unsubscribe_after(NO_LIMIT).await;
    sent.map_err(|error| Error::Disconnected(error.to_string()))
}

/// The next message that has arrived already.
pub fn arrived(subscriber: &mut Subscriber) -> Option<async_nats::Message> {
    // Unconstrained: a task that used up its scheduling budget would otherwise see an empty queue.
    tokio::task::unconstrained(subscriber.next()).now_or_never().flatten()
}

/// The receiver of the [`Subscription`] is gone.
struct Abandoned;

struct Pump {
    link: Arc<Link>,
    subscriber: Subscriber,
    sender: mpsc::Sender<Message>,
    /// Whether this is a member of a queue group.
    shared: bool,
}

impl Pump {
    /// Passes messages on until the subscription is closed or dropped.
    async fn run(mut self, close: CancellationToken) {
        let ended = tokio::select! {
            () = close.cancelled() => Ok(()),
            ended = self.pass_all() => ended,
        };
        if ended.is_ok() && !self.sender.is_closed() {
            self.drain().await;
        }

        // Fails only on a closed connection, which has no subscription left.
        let _ = self.subscriber.unsubscribe().await;
    }

    /// Passes on what the server sends. Returns `Ok` once the client is closed.
    async fn pass_all(&mut self) -> Result<(), Abandoned> {
        while let Some(message) = self.subscriber.next().await {
            self.pass(message).await?;
        }
        Ok(())
    }

    /// Unsubscribes, then passes on what the server had sent before.
    async fn drain(&mut self) {
        if leave(&mut self.subscriber).await.is_err() {
            return;
        }

        let link = self.link.clone();
        let mut confirmed = std::pin::pin!(link.round_trip(UNSUBSCRIBE_DEADLINE));
        let confirmed = loop {
            tokio::select! {
                biased;
                confirmed = &mut confirmed => break confirmed,
                Some(message) = self.subscriber.next() => if self.pass(message).await.is_err() { return },
                else => return,
            }
        };
        if let Err(error) = confirmed {
            tracing::warn!(%error, "NATS did not confirm an unsubscribe; messages still on their way are lost");
        }

        while let Some(message) = arrived(&mut self.subscriber) {
            if self.pass(message).await.is_err() {
                return;
            }
        }
    }

    async fn pass(&self, message: async_nats::Message) -> Result<(), Abandoned> {
        match self.sender.try_send(convert::from_nats(message)) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(Abandoned),
            Err(mpsc::error::TrySendError::Full(message)) => {
                drop_message(&self.link, message, self.shared).await;
                Ok(())
            }
        }
    }
}

/// Counts a message that does not fit the queue. In a queue group no other member received it, so a requester is told
/// at once that no reply will come. Without a group, other subscribers may still reply.
async fn drop_message(link: &Link, message: Message, shared: bool) {
    metrics::counter!("beamline_bus_dropped_total").increment(1);
    tracing::warn!(subject = %message.subject, "subscriber queue full; message dropped");

    if let (Some(reply), true) = (message.reply, shared) {
        // Header names of the NATS services protocol (ADR-32), so that other clients understand them.
        let headers = Headers::new()
            .with(DROPPED_HEADER, "1")
            .with("Nats-Service-Error-Code", "503")
            .with("Nats-Service-Error", "queue full");
        let refusal = Message { subject: reply, headers, ..Message::default() };
        if let Err(error) = link.publish(refusal).await {
            tracing::debug!(%error, "cannot send the refusal of a dropped request; the requester times out");
        }
    }
}
