//! The connection slot of a session, which is released however the session ends.

use crate::Node;
use crate::client::Client;
use crate::commands;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};

/// One of the node's `max_connections` slots, and the client that connected on it. A session that ends calls
/// [`ConnectionSlot::release`]; if it panics, dropping the slot has the same effect.
pub struct ConnectionSlot {
    node: Arc<Node>,
    client: Arc<OnceLock<Arc<Client>>>,
}

impl ConnectionSlot {
    /// Takes a slot; `None` if the node has `max_connections`.
    pub fn take(node: &Arc<Node>) -> Option<Self> {
        let before = node.connections.fetch_add(1, Relaxed);
        // Counted first: if the connection is refused, dropping the slot uncounts it.
        let slot = Self { node: node.clone(), client: Arc::default() };
        (before < node.config.max_connections).then_some(slot)
    }

    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Set by the connect command.
    pub fn client(&self) -> &Arc<OnceLock<Arc<Client>>> {
        &self.client
    }

    /// Ends the client's subscriptions, then frees the slot. The connection counts until then, so that unfinished
    /// departures cannot pile up on a node whose engine is slow.
    pub async fn release(mut self) {
        let client = std::mem::take(&mut self.client);
        if let Some(client) = client.get() {
            commands::leave_all(&self.node, client).await;
        }
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        let client = std::mem::take(&mut self.client);
        let Some(client) = client.get().cloned() else {
            self.node.connections.fetch_sub(1, Relaxed);
            return;
        };

        // The session panicked before `release`. A task, which a drain waits for, cleans up and frees the slot.
        let slot = Self { node: self.node.clone(), client: Arc::default() };
        let departure = async move {
            tracing::error!(client = client.id, "a session panicked; ending its subscriptions and freeing its slot");
            slot.node.stats().panicked();
            commands::leave_all(&slot.node, &client).await;
        };
        self.node.sessions.spawn_on(departure, &self.node.runtime);
    }
}
