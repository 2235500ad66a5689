//! A pump from the server's subscription into one bounded queue: what does not fit is dropped, counted and refused.

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
    // Whoever publishes after this returns, on whatever connection, is heard.
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
            Err(mpsc::error::TrySendError::Full(message)) => dropped(&link, message, shared).await,
        }
    }
    // Fails only on a closed connection, where nothing is left to unsubscribe.
    let _ = subscriber.unsubscribe().await;
}

/// A requester that reached only this member of a group learns at once that it will get no answer. Without a group
/// others may have the request too, so nothing is said for them.
async fn dropped(link: &Link, message: Message, shared: bool) {
    metrics::counter!("beamline_bus_dropped_total").increment(1);
    tracing::warn!(subject = %message.subject, "a subscriber's queue is full; a message was dropped");
    if let (Some(reply), true) = (message.reply, shared) {
        // The names of the NATS services protocol (ADR-32), so that other clients understand too.
        let headers = Headers::new()
            .with(DROPPED_HEADER, "1")
            .with("Nats-Service-Error-Code", "503")
            .with("Nats-Service-Error", "queue full");
        let refusal = Message { subject: reply, headers, ..Message::default() };
        if let Err(error) = link.publish(refusal).await {
            tracing::debug!(%error, "cannot tell a requester that its request was dropped");
        }
    }
}
