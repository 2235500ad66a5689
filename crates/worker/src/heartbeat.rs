//! What the worker says of itself every five seconds.

use crate::Worker;
use bus::Message;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use wire::status::{Heartbeat, ProviderStatus};

const INTERVAL: Duration = Duration::from_secs(5);

/// Until `ended`; from `cancel` on the worker is draining.
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
    };
    let payload = serde_json::to_vec(&heartbeat).expect("a heartbeat is JSON").into();
    let message = Message { subject: wire::subjects::HEARTBEAT.into(), payload, ..Message::default() };
    if let Err(error) = worker.bus.publish(message).await {
        tracing::debug!(%error, "the heartbeat was not published");
    }
}

fn timestamp() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    rfc3339(now.as_secs())
}

/// Days to date by Howard Hinnant's `civil_from_days`.
fn rfc3339(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
        ] {
            assert_eq!(super::rfc3339(seconds), expected);
        }
    }
}
