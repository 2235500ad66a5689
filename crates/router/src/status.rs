//! Publishes the router's status once a second. The console shows it, and other routers adopt newer breaker states from
//! it.

use crate::Router;
use bus::Message;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use wire::status::RouterStatus;
use wire::subjects;

const PUBLISH_EVERY: Duration = Duration::from_secs(1);

pub async fn run(router: Arc<Router>, cancel: CancellationToken) {
    let mut ticks = tokio::time::interval(PUBLISH_EVERY);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }

        crate::outcomes::forget(&router);
        let payload = serde_json::to_vec(&status(&router))
            .expect("a status serializes to JSON")
            .into();
        let message = Message { subject: subjects::ROUTER_STATUS.into(), payload, ..Message::default() };
        if let Err(error) = router.bus.publish(message).await {
            tracing::warn!(%error, "publishing the router's status failed; other routers do not learn its breakers");
        }
    }
}

fn status(router: &Router) -> RouterStatus {
    let (policies, policies_total) = router.policies.status();
    RouterStatus {
        router: router.id.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        uptime_s: router.started.elapsed().as_secs(),
        decide_us: router.stats.decide_us(),
        policies,
        policies_total,
        breakers: router.breakers.status(router.uptime_ms()),
        ..router.stats.totals()
    }
}
