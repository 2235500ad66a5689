//! Engines: where publications get their order, are kept and travel between nodes.

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

#[derive(Debug, thiserror::Error)]
pub enum Failed {
    #[error("{0}")]
    Journal(#[from] journal::Error),
    #[error("redis: {0}")]
    Redis(#[from] ::redis::RedisError),
}

impl Failed {
    /// The error that a client gets; the details are in the log.
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
    /// Returns once the publication is stored in the channel's history, if it keeps one. Every node that follows the
    /// channel receives publications in the order of offsets. A repeated idempotency key is acknowledged with the
    /// position of its first publication, and nothing is published.
    async fn publish(
        &self,
        channel: &str,
        publication: Publication,
        rules: &Rules,
        idempotency_key: Option<String>,
    ) -> Result<Position, Failed>;

    /// Sends a join or leave to every node that follows the channel. It may be lost.
    async fn event(&self, channel: &str, push: Push);

    /// The history of a channel: all of it, or the publications after `since`.
    async fn history(&self, channel: &str, rules: &Rules, since: Option<&Position>) -> Result<Page, Failed>;

    /// Adds a client to the channel's presence, or removes it (`None`).
    async fn present(&self, channel: &str, client: &str, info: Option<ClientInfo>) -> Result<(), Failed>;

    async fn presence(&self, channel: &str) -> Result<BTreeMap<String, ClientInfo>, Failed>;

    /// Makes publications to the channel arrive on this node. Returns once they do.
    async fn follow(&self, channel: &str) -> Result<(), Failed>;
    /// Called when the channel has lost its last subscriber on this node.
    async fn unfollow(&self, channel: &str);

    /// Runs the engine's own loop until cancelled. If it ends earlier, the node fails.
    async fn serve(&self, cancel: CancellationToken) {
        cancel.cancelled().await;
    }

    /// Removes what has expired and renews what must not; called every 15 s.
    async fn tidy(&self);

    /// Closes the engine in good order. It refuses publications afterwards.
    async fn close(&self) -> Result<(), Failed> {
        Ok(())
    }

    /// The name of the engine, for the node's status.
    fn describe(&self) -> &'static str;
}

/// A new epoch.
pub fn fresh_epoch() -> String {
    uuid::Uuid::new_v4().simple().to_string()[..8].to_string()
}

/// Runs the engine until cancelled, or until it ends by itself.
pub async fn run(engine: Arc<dyn Engine>, cancel: CancellationToken) {
    let cancel = cancel.child_token();
    let serving = async {
        // Ends the housekeeping as well if the engine ends by itself.
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
