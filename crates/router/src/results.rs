//! Takes results: one usage event an assignment, the task's final state, the provider's statistics; then acknowledges.

use crate::Router;
use bus::clock::unix_ms;
use bus::{Consumer, Delivery, Message};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::router::{DEFAULT_TENANT, ExecResult, ResultStatus, State, Usage, VERSION};
use wire::subjects;

/// Results handled at once.
const CONCURRENT: usize = 64;
/// After this many tries a result is a dead letter (contract: result 10).
const MAX_DELIVER: u32 = 10;
/// Between tries: 1, 2, then 4 s.
const BACKOFF: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)];

pub async fn run(router: Arc<Router>, mut results: Consumer, cancel: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONCURRENT));
    let handlers = TaskTracker::new();
    loop {
        let delivery = tokio::select! {
            () = cancel.cancelled() => break,
            delivery = results.next() => delivery,
        };
        let Some(delivery) = delivery else { break };
        let Ok(place) = places.clone().acquire_owned().await else {
            break;
        };
        let router = router.clone();
        handlers.spawn(async move {
            handle(&router, &delivery).await;
            drop(place);
        });
    }
    results.close().await;
    router.drain(handlers).await;
}

async fn handle(router: &Router, delivery: &Delivery) {
    let decoded = ExecResult::decode(&delivery.message.payload).and_then(|result| check(&result).map(|()| result));
    let done = match decoded {
        Err(poison) => bus::dead_letter::bury(&router.bus, delivery, &poison).await,
        Ok(_) if delivery.delivered > MAX_DELIVER => {
            bus::dead_letter::bury(&router.bus, delivery, "the result could not be recorded").await
        }
        Ok(result) => match record(router, &result).await {
            Ok(()) => delivery.ack().await,
            Err(error) => {
                tracing::warn!(%error, request_id = result.request_id, "a result was not recorded; it comes again");
                let tries = (delivery.delivered as usize - 1).min(BACKOFF.len() - 1);
                delivery.nak(BACKOFF[tries]).await
            }
        },
    };
    if let Err(error) = done {
        tracing::warn!(%error, "a result was not acknowledged; it comes again");
    }
}

fn check(result: &ExecResult) -> Result<(), String> {
    let needed = [("assignment_id", &result.assignment_id), ("request_id", &result.request_id)];
    let others = [
        ("provider_id", Some(&result.provider_id)),
        ("trace_id", result.trace_id.as_ref()),
        ("tenant_id", result.tenant_id.as_ref()),
    ];
    // An empty one is as good as none where none is needed.
    let others = others
        .into_iter()
        .filter_map(|(name, id)| Some((name, id.filter(|id| !id.is_empty())?)));
    for (name, id) in needed.into_iter().chain(others) {
        wire::id::check(id).map_err(|error| format!("the result's {name} {error}"))?;
    }
    Ok(())
}

/// Safe to repeat: the usage has the assignment's id, the task's record is final once.
async fn record(router: &Router, result: &ExecResult) -> bus::Result<()> {
    let task = bus::tasks::of_result(&router.bus, result)
        .await?
        .map(|record| record.task);
    // The record is written last: an assignment that has its result is done, however long ago that was.
    if task.as_ref().is_some_and(|task| task.result.is_some()) {
        return Ok(());
    }
    // Who pays was settled when the task was taken; a result need not name anybody.
    let tenant_id = task
        .as_ref()
        .map(|task| task.tenant().to_string())
        .or_else(|| result.tenant_id.clone());
    let usage = Usage {
        version: VERSION.into(),
        tenant_id: tenant_id.clone().unwrap_or_else(|| DEFAULT_TENANT.into()),
        provider_id: result.provider_id.clone(),
        event_type: result.job.job_type.clone(),
        latency_ms: result.latency_ms,
        cost: result.cost,
        status: result.status,
        trace_id: result.trace_id.clone(),
        timestamp: unix_ms(),
        assignment_id: result.assignment_id.clone(),
        request_id: result.request_id.clone(),
    };
    let payload = serde_json::to_vec(&usage).expect("usage is JSON").into();
    let message = Message { subject: subjects::USAGE.into(), payload, ..Message::default() };
    let usage = router
        .bus
        .append(message, Some(&format!("usage-{}", result.assignment_id)))
        .await?;
    // Here, not at the end: should the record fail, the next try finds the usage there already.
    if !usage.duplicate {
        router.stats.ended(result);
        if let Some(task) = &task {
            crate::outcomes::publish(router, task, result).await;
        }
    }

    let state = match result.status {
        ResultStatus::Success => State::Completed,
        ResultStatus::Cancelled => State::Cancelled,
        ResultStatus::Error | ResultStatus::Timeout => State::Failed,
    };
    if let Some(task) = &task {
        bus::tasks::update(&router.bus, task.tenant(), &task.task_id, |task| {
            if task.result.is_none() && task.assignment_id.as_deref() == Some(&result.assignment_id) {
                task.state = if task.state == State::Cancelled {
                    State::Cancelled
                } else {
                    state
                };
                task.result = Some(result.clone());
            }
        })
        .await?;
    }
    let (trace_id, request_id) = (&result.trace_id, &result.request_id);
    tracing::info!(
        trace_id,
        tenant_id,
        request_id,
        status = result.status.as_str(),
        latency_ms = result.latency_ms,
        "ended"
    );
    Ok(())
}
