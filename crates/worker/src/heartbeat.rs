//! Publishes the worker's heartbeat every five seconds, and when its state changes.

use crate::Worker;
use bus::Message;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use wire::status::{Heartbeat, ProviderStatus};

const INTERVAL: Duration = Duration::from_secs(5);

/// Runs until `ended`, with a last heartbeat `stopped`. From `cancel` on, the worker is `draining`.
pub async fn run(worker: Arc<Worker>, cancel: CancellationToken, ended: CancellationToken) {
    let mut ticks = tokio::time::interval(INTERVAL);
    let mut draining = false;
    loop {
        tokio::select! {
            () = ended.cancelled() => return beat(&worker, Some("stopped")).await,
            () = cancel.cancelled(), if !draining => draining = true,
            _ = ticks.tick() => {}
        }
        beat(&worker, draining.then_some("draining")).await;
    }
}

async fn beat(worker: &Worker, leaving: Option<&str>) {
    let running = worker.running.count() as u64;
    let providers: Vec<ProviderStatus> = worker
        .providers
        .values()
        .map(|provider| ProviderStatus {
            name: provider.name.clone(),
            kind: provider.kind_name().into(),
            running: provider.running.load(Relaxed),
            completed_total: provider.completed.load(Relaxed),
            failed_total: provider.failed.load(Relaxed),
            latency_ms: provider.latency_ms(),
        })
        .collect();

    let status = leaving.unwrap_or(if running == 0 { "idle" } else { "busy" });
    let heartbeat = Heartbeat {
        worker_id: worker.id.clone(),
        timestamp: timestamp(),
        status: status.into(),
        load: running as f64 / worker.slots as f64,
        running,
        completed_total: providers.iter().map(|p| p.completed_total).sum(),
        failed_total: providers.iter().map(|p| p.failed_total).sum(),
        providers,
        subjects: worker.subjects.clone(),
    };

    let payload = serde_json::to_vec(&heartbeat)
        .expect("a heartbeat serializes to JSON")
        .into();
    let message = Message { subject: wire::subjects::HEARTBEAT.into(), payload, ..Message::default() };
    if let Err(error) = worker.bus.publish(message).await {
        tracing::debug!(%error, "publishing the heartbeat failed");
    }
}

fn timestamp() -> String {
    wire::time::rfc3339(bus::clock::unix_seconds())
}
