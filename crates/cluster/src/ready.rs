//! The readiness check of a node.

use crate::Rules;
use crate::engine::Engine;
use crate::hub::Hub;
use std::sync::Arc;
use std::time::Duration;

const DELIVERY_TIMEOUT: Duration = Duration::from_secs(5);
const HISTORY_TTL: Duration = Duration::from_secs(10);

/// Checks whether channels work on this node.
#[derive(Clone)]
pub struct Ready {
    hub: Arc<Hub>,
    engine: Arc<dyn Engine>,
    channel: String,
}

impl Ready {
    pub(crate) fn new(node: &str, hub: Arc<Hub>, engine: Arc<dyn Engine>) -> Self {
        Self { hub, engine, channel: Hub::probe_channel(node) }
    }

    /// Publishes through the engine and waits for the delivery on this node. The error says what failed. The probe
    /// channel keeps a history, because a Redis server that has become a read-only replica still delivers publications
    /// that need not be stored.
    pub async fn check(&self) -> Result<(), String> {
        let delivered = self.hub.probe(&self.channel);
        self.engine.follow(&self.channel).await.map_err(|e| e.to_string())?;

        let rules = Rules {
            history_size: 1,
            history_ttl: HISTORY_TTL,
            durable: false,
            ..Rules::default()
        };
        self.engine
            .publish(&self.channel, Default::default(), &rules, None)
            .await
            .map_err(|e| e.to_string())?;

        match tokio::time::timeout(DELIVERY_TIMEOUT, delivered).await {
            Ok(Ok(())) => Ok(()),
            _ => Err("a publication was not delivered within 5 s".into()),
        }
    }
}
