//! Engines, which order publications, keep the histories and carry publications between nodes.

pub mod memory;
pub mod redis;

use crate::Rules;
use crate::permissions::Denied;
use async_trait::async_trait;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use wire::channels::Position;
use wire::realtime::{ClientInfo, ErrorCode, Publication, Push};

const TIDY_INTERVAL: Duration = Duration::from_secs(15);

/// Why an engine could not carry out an operation.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    #[error("{0}")]
    Journal(#[from] journal::Error),
    #[error("redis: {0}")]
    Redis(#[from] ::redis::RedisError),
}

impl Failed {
    /// The error reply for a client. The details are only logged.
    pub fn denied(&self) -> Denied {
        let text = match self {
            Self::Journal(_) => "the channel's history cannot be read or written now; try again",
            Self::Redis(_) => "channels cannot reach Redis now; try again",
        };
        (ErrorCode::Internal, text.into())
    }
}

/// Publications of a channel, oldest first, and its newest position.
#[derive(Debug, Default)]
pub struct Page {
    pub publications: Vec<Publication>,
    pub position: Position,
}

#[async_trait]
pub trait Engine: Send + Sync {
    /// Publishes to a channel. Returns once the publication is stored, if the channel keeps a history. Every node that
    /// follows the channel receives publications in the order of their offsets. A repeated idempotency key publishes
    /// nothing and returns the position of its first publication.
    async fn publish(
        &self,
        channel: &str,
        publication: Publication,
        rules: &Rules,
        idempotency_key: Option<String>,
    ) -> Result<Position, Failed>;

    /// Sends a join or leave to every node that follows the channel, at most once.
    async fn event(&self, channel: &str, push: Push);

    /// Reads the whole history of a channel, or the publications after `since`.
    async fn history(&self, channel: &str, rules: &Rules, since: Option<&Position>) -> Result<Page, Failed>;

    /// Adds a client to the channel's presence, or removes it (`None`).
    async fn present(&self, channel: &str, client: &str, info: Option<ClientInfo>) -> Result<(), Failed>;

    /// The clients present on a channel, by client id.
    async fn presence(&self, channel: &str) -> Result<BTreeMap<String, ClientInfo>, Failed>;

    /// Makes the channel's publications arrive on this node. Returns once they do.
    async fn follow(&self, channel: &str) -> Result<(), Failed>;
    /// Stops following a channel that has lost its last subscriber on this node.
    async fn unfollow(&self, channel: &str);

    /// Runs the engine's own loop until cancelled. If the loop ends earlier, the node fails.
    async fn serve(&self, cancel: CancellationToken) {
        cancel.cancelled().await;
    }

    /// Removes expired data and renews this node's presence entries. Called every 15 s.
    async fn tidy(&self);

    /// Closes the engine cleanly. Afterwards it refuses publications.
    async fn close(&self) -> Result<(), Failed> {
        Ok(())
    }

    /// The name of the engine, for the node's status.
    fn describe(&self) -> &'static str;
}

/// A new random epoch of 8 hex digits.
pub fn fresh_epoch() -> String {
    uuid::Uuid::new_v4().simple().to_string()[..8].to_string()
}

/// Runs the engine's loop and its housekeeping until cancelled, or until the loop ends unexpectedly.
pub async fn run(engine: Arc<dyn Engine>, cancel: CancellationToken) {
    let cancel = cancel.child_token();
    let serving = async {
        // If the engine's loop ends unexpectedly, this also ends the housekeeping.
        engine.serve(cancel.clone()).await;
        cancel.cancel();
    };

    let tidying = async {
        let mut ticks = tokio::time::interval(TIDY_INTERVAL);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = ticks.tick() => engine.tidy().await,
            }
        }
    };
    tokio::join!(tidying, serving);
}
