//! The channels API on the bus: requests from other parts, and disconnects for all nodes.

use crate::Node;
use crate::operations::{NODE_DISCONNECT, Operation};
use bus::{Bus, Message, Subscription};
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio::task::unconstrained;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::channels::{Answer, Disconnect};
use wire::subjects;

const QUEUE_MAX: usize = 8192;
/// Operations in progress at once.
const CONCURRENT_MAX: usize = 256;

pub struct Requests {
    publish: Subscription,
    broadcast: Subscription,
    history: Subscription,
    presence: Subscription,
    disconnect: Subscription,
    node_disconnect: Subscription,
}

impl Requests {
    pub async fn subscribe(bus: &Bus) -> bus::Result<Self> {
        let group = Some(subjects::NODES_GROUP);
        Ok(Self {
            publish: bus.subscribe(subjects::CHANNELS_PUBLISH, group, QUEUE_MAX).await?,
            broadcast: bus.subscribe(subjects::CHANNELS_BROADCAST, group, QUEUE_MAX).await?,
            history: bus.subscribe(subjects::CHANNELS_HISTORY, group, QUEUE_MAX).await?,
            presence: bus.subscribe(subjects::CHANNELS_PRESENCE, group, QUEUE_MAX).await?,
            disconnect: bus.subscribe(subjects::CHANNELS_DISCONNECT, group, QUEUE_MAX).await?,
            node_disconnect: bus.subscribe(NODE_DISCONNECT, None, QUEUE_MAX).await?,
        })
    }
}

/// Answers requests until cancelled, then finishes those in progress.
pub async fn run(node: Arc<Node>, mut requests: Requests, cancel: CancellationToken) {
    let permits = Arc::new(Semaphore::new(CONCURRENT_MAX));
    let tracker = TaskTracker::new();
    loop {
        let permit = permits
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let (operation, message) = tokio::select! {
            () = cancel.cancelled() => break,
            Some(message) = requests.publish.next() => (Operation::Publish, message),
            Some(message) = requests.broadcast.next() => (Operation::Broadcast, message),
            Some(message) = requests.history.next() => (Operation::History, message),
            Some(message) = requests.presence.next() => (Operation::Presence, message),
            Some(message) = requests.disconnect.next() => (Operation::Disconnect, message),
            // Handled inline: a disconnect is quick and has no answer.
            Some(message) = requests.node_disconnect.next() => {
                if let Ok(Disconnect { user, session }) = serde_json::from_slice(&message.payload) {
                    node.disconnect(&user, session.as_deref(), wire::realtime::Disconnect::ForceDisconnect);
                }
                continue;
            }
            else => break,
        };

        let node = node.clone();
        let mut work = Box::pin(async move {
            answer(&node, operation, message).await;
            drop(permit);
        });
        // Polled once here, in the order of arrival, so that publications to a channel queue for its lock in that
        // order. `unconstrained`, because an exhausted coop budget would make one of them queue later.
        if futures_util::poll!(unconstrained(&mut work)).is_pending() {
            tracker.spawn(work);
        }
    }

    tracker.close();
    tracker.wait().await;
}

async fn answer(node: &Node, operation: Operation, message: Message) {
    let result = node.operate(operation, &message.payload).await;
    let Some(subject) = message.reply else { return };

    let answer = match result {
        Ok(result) => Answer::success(result),
        Err((code, text)) => Answer::failure(code as u32, text),
    };
    let payload = serde_json::to_vec(&answer)
        .expect("an answer serializes to JSON")
        .into();
    let reply = Message { subject, payload, ..Message::default() };
    if let Err(error) = node.bus.publish(reply).await {
        tracing::debug!(?operation, %error, "cannot publish the answer to an operation");
    }
}
