//! The pump from a NATS subscription into its bounded queue. Messages that do not fit are dropped and counted, and
//! requests among them are refused.

use super::convert;
use super::inbox::DROPPED_HEADER;
use super::link::Link;
use super::pool::Pool;
use crate::{Error, Headers, Message, Result, Subscription};
use futures_util::StreamExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const SUBSCRIBE_DEADLINE: Duration = Duration::from_secs(5);

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
    tasks.spawn(pump(link.clone(), subscriber, sender, queue.is_some(), cancel.clone()));
    Ok(Subscription { receiver, _guard: Box::new(cancel.drop_guard()) })
}

async fn pump(
    link: Arc<Link>,
    mut subscriber: async_nats::Subscriber,
    sender: mpsc::Sender<Message>,
    shared: bool,
    cancel: CancellationToken,
) {
    loop {
        let message = tokio::select! {
            () = cancel.cancelled() => break,
            message = subscriber.next() => match message {
                Some(message) => message,
                None => return,
            }
        };

        match sender.try_send(convert::from_nats(message)) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Closed(_)) => break,
            Err(mpsc::error::TrySendError::Full(message)) => drop_message(&link, message, shared).await,
        }
    }

    // Fails only on a closed connection, which has no subscription left.
    let _ = subscriber.unsubscribe().await;
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
