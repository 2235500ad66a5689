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

pub struct Subscriptions {
    requests: Requests,
    node_disconnect: Subscription,
}

struct Requests {
    publish: Subscription,
    broadcast: Subscription,
    history: Subscription,
    presence: Subscription,
    disconnect: Subscription,
}

impl Subscriptions {
    pub async fn subscribe(bus: &Bus) -> bus::Result<Self> {
        let group = Some(subjects::NODES_GROUP);
        let requests = Requests {
            publish: bus.subscribe(subjects::CHANNELS_PUBLISH, group, QUEUE_MAX).await?,
            broadcast: bus.subscribe(subjects::CHANNELS_BROADCAST, group, QUEUE_MAX).await?,
            history: bus.subscribe(subjects::CHANNELS_HISTORY, group, QUEUE_MAX).await?,
            presence: bus.subscribe(subjects::CHANNELS_PRESENCE, group, QUEUE_MAX).await?,
            disconnect: bus.subscribe(subjects::CHANNELS_DISCONNECT, group, QUEUE_MAX).await?,
        };
        let node_disconnect = bus.subscribe(NODE_DISCONNECT, None, QUEUE_MAX).await?;
        Ok(Self { requests, node_disconnect })
    }
}

impl Requests {
    /// The next request, in no order between the kinds. `None` once all subscriptions have ended.
    async fn next(&mut self) -> Option<(Operation, Message)> {
        tokio::select! {
            Some(message) = self.publish.next() => Some((Operation::Publish, message)),
            Some(message) = self.broadcast.next() => Some((Operation::Broadcast, message)),
            Some(message) = self.history.next() => Some((Operation::History, message)),
            Some(message) = self.presence.next() => Some((Operation::Presence, message)),
            Some(message) = self.disconnect.next() => Some((Operation::Disconnect, message)),
            else => None,
        }
    }

    fn close(&mut self) {
        let Self { publish, broadcast, history, presence, disconnect } = self;
        for subscription in [publish, broadcast, history, presence, disconnect] {
            subscription.close();
        }
    }
}

/// Answers requests until cancelled, then those that the bus has delivered to this node.
pub async fn run(node: Arc<Node>, subscriptions: Subscriptions, cancel: CancellationToken) {
    let Subscriptions { requests, node_disconnect } = subscriptions;
    tokio::join!(operations(&node, requests, &cancel), disconnects(&node, node_disconnect, &cancel));
}

async fn operations(node: &Arc<Node>, mut requests: Requests, cancel: &CancellationToken) {
    let permits = Arc::new(Semaphore::new(CONCURRENT_MAX));
    let tracker = TaskTracker::new();
    let mut closing = false;
    loop {
        // The permit comes first: while there is none, requests wait in their subscriptions, which are bounded.
        let next = async {
            let permit = permits.clone().acquire_owned().await;
            let permit = permit.expect("the semaphore is never closed");
            Some((permit, requests.next().await?))
        };
        let next = tokio::select! {
            next = next => next,
            () = cancel.cancelled(), if !closing => {
                closing = true;
                requests.close();
                continue;
            }
        };
        let Some((permit, (operation, message))) = next else {
            break;
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

/// Disconnects clients of this node. Separate from the operations, so that these never hold a disconnect back.
async fn disconnects(node: &Node, mut messages: Subscription, cancel: &CancellationToken) {
    while let Some(message) = messages.next_until(cancel).await {
        if let Ok(Disconnect { user, session }) = serde_json::from_slice(&message.payload) {
            node.disconnect(&user, session.as_deref(), wire::realtime::Disconnect::ForceDisconnect);
        }
    }
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
