//! What a connection takes on its node, and gives back however its session ends.

use crate::client::Client;
use crate::{Node, commands};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};

/// A connection slot of the node, and the client that was authenticated on it. A session that ends gives both back
/// with [`Place::leave`]; dropping it does the same for one that panicked.
pub struct Place {
    node: Arc<Node>,
    client: Arc<OnceLock<Arc<Client>>>,
}

impl Place {
    /// `None`: the node is full.
    pub fn take(node: &Arc<Node>) -> Option<Self> {
        let before = node.connections.fetch_add(1, Relaxed);
        let place = Self { node: node.clone(), client: Arc::default() };
        (before < node.config.max_connections).then_some(place)
    }

    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Filled by the connect command.
    pub fn client(&self) -> &Arc<OnceLock<Arc<Client>>> {
        &self.client
    }

    /// Takes the client off its channels, then gives the place back. The connection counts until then, so that departures
    /// cannot pile up on a node whose engine is slow.
    pub async fn leave(mut self) {
        let client = std::mem::take(&mut self.client);
        if let Some(client) = client.get() {
            commands::disconnected(&self.node, client).await;
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

        // The session did not reach its end. The count moves to this task, which a drain waits for.
        let place = Self { node: self.node.clone(), client: Arc::default() };
        let departure = async move {
            tracing::error!(client = client.id, "a session panicked; its subscriptions and its place are given back");
            place.node.stats().panicked();
            commands::disconnected(&place.node, &client).await;
        };
        self.node.sessions.spawn_on(departure, &self.node.runtime);
    }
}
