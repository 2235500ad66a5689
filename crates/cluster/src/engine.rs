//! Where publications go: history, order and the way between nodes.

pub mod memory;
pub mod redis;

use crate::Rules;
use crate::authorize::Denied;
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
    /// What a client is told; the log has the rest.
    pub fn denied(&self) -> Denied {
        let text = match self {
            Self::Journal(_) => "the channel's history cannot be written or read now; try again",
            Self::Redis(_) => "channels cannot reach Redis now; try again",
        };
        (ErrorCode::Internal, text.into())
    }
}

/// A channel's history: oldest first, and its newest position.
#[derive(Debug, Default)]
pub struct Page {
    pub publications: Vec<Publication>,
    pub position: Position,
}

#[async_trait]
pub trait Engine: Send + Sync {
    /// Returns once the publication has its place in the channel's history (if it keeps one). It reaches every node
    /// that follows the channel, in the order of offsets. A repeat with the same key is acknowledged, not repeated.
    async fn publish(
        &self,
        channel: &str,
        publication: Publication,
        rules: &Rules,
        idempotency_key: Option<String>,
    ) -> Result<Position, Failed>;

    /// A join or leave, to every node that follows the channel; may be lost.
    async fn event(&self, channel: &str, push: Push);

    /// All of a channel's history, or what follows `since`.
    async fn history(&self, channel: &str, rules: &Rules, since: Option<&Position>) -> Result<Page, Failed>;

    /// Notes that a client is there, or (`None`) is not any more.
    async fn present(&self, channel: &str, client: &str, info: Option<ClientInfo>) -> Result<(), Failed>;

    async fn presence(&self, channel: &str) -> Result<BTreeMap<String, ClientInfo>, Failed>;

    /// This node has the channel's first subscriber, or lost its last.
    async fn follow(&self, channel: &str) -> Result<(), Failed>;
    async fn unfollow(&self, channel: &str);

    /// Runs the engine's own loop until cancelled. If it ends earlier, the node fails.
    async fn serve(&self, cancel: CancellationToken) {
        cancel.cancelled().await;
    }

    /// Housekeeping, now and then.
    async fn tidy(&self);

    /// Ends the engine in good order. It refuses publications afterwards.
    async fn close(&self) -> Result<(), Failed> {
        Ok(())
    }

    fn describe(&self) -> &'static str;
}

/// The name of a new life of a channel's history.
pub fn fresh_epoch() -> String {
    uuid::Uuid::new_v4().simple().to_string()[..8].to_string()
}

/// Runs the engine until cancelled, or until it ends by itself.
pub async fn run(engine: Arc<dyn Engine>, cancel: CancellationToken) {
    let cancel = cancel.child_token();
    let serving = async {
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
