//! What a connection takes on its node, and gives back however its session ends.

use crate::Node;
use crate::client::Client;
use crate::commands;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};

/// A connection slot of the node, and the client that connected on it. A session gives both back with [`Place::leave`]
/// when it ends; if it panics, dropping the place does the same.
pub struct Place {
    node: Arc<Node>,
    client: Arc<OnceLock<Arc<Client>>>,
}

impl Place {
    /// Takes a slot; `None` if the node has `max_connections`.
    pub fn take(node: &Arc<Node>) -> Option<Self> {
        let before = node.connections.fetch_add(1, Relaxed);
        // Counted first: dropping the place of a refused connection gives the slot back.
        let place = Self { node: node.clone(), client: Arc::default() };
        (before < node.config.max_connections).then_some(place)
    }

    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Set by the connect command.
    pub fn client(&self) -> &Arc<OnceLock<Arc<Client>>> {
        &self.client
    }

    /// Ends the client's subscriptions, then gives the slot back. The connection counts until then, so that departures
    /// cannot pile up on a node whose engine is slow.
    pub async fn leave(mut self) {
        let client = std::mem::take(&mut self.client);
        if let Some(client) = client.get() {
            commands::leave_all(&self.node, client).await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let client = std::mem::take(&mut self.client);
        let Some(client) = client.get().cloned() else {
            self.node.connections.fetch_sub(1, Relaxed);
            return;
        };

        // The session panicked before `leave`. The slot moves to a task, which a drain waits for.
        let place = Self { node: self.node.clone(), client: Arc::default() };
        let departure = async move {
            tracing::error!(client = client.id, "a session panicked; ending its subscriptions and freeing its slot");
            place.node.stats().panicked();
            commands::leave_all(&place.node, &client).await;
        };
        self.node.sessions.spawn_on(departure, &self.node.runtime);
    }
}
