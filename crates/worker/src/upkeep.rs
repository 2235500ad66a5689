//! What the worker sees to every few seconds: the stream's clock, and the subjects of its providers.

use crate::Worker;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use wire::subjects::STREAM_ASSIGN;

const INTERVAL: Duration = Duration::from_secs(5);

/// Runs until cancelled. An error is logged: the bus is away, or an older process has changed the stream.
pub async fn run(worker: Arc<Worker>, cancel: CancellationToken) {
    let mut ticks = tokio::time::interval(INTERVAL);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }

        if let Err(error) = worker.clock.sync().await {
            tracing::debug!(%error, "cannot read the clock of the stream");
        }
        // A process of an earlier version that declares the stream takes them away.
        if let Err(error) = worker.bus.add_subjects(STREAM_ASSIGN, &worker.subjects).await {
            tracing::warn!(%error, "cannot add the subjects of this worker's providers to the stream ASSIGN");
        }
    }
}
