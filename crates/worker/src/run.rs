//! The life of an assignment in the worker: taken, run, its result stored, acknowledged.

use crate::provider::{Job, Outcome, Output};
use crate::{ACK_WAIT, Worker};
use bus::{Consumer, Delivery, Message, Subscription};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::router::{ExecAssignment, ExecResult, JobType, ResultStatus, State, TaskQuery, TaskState, VERSION};
use wire::subjects;

/// Deliveries of one assignment (contract: assign 5); the next one becomes a dead letter and an error result.
const MAX_DELIVER: u32 = 5;
/// Between deliveries: 1, 5, then 15 s.
const BACKOFF: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(15)];

/// What runs now, by request id, so that it can be cancelled.
#[derive(Default)]
pub struct Running(Mutex<HashMap<String, CancellationToken>>);

impl Running {
    pub fn count(&self) -> usize {
        self.0.lock().len()
    }

    fn start(&self, request_id: &str) -> CancellationToken {
        self.0.lock().entry(request_id.into()).or_default().clone()
    }

    fn end(&self, request_id: &str) {
        self.0.lock().remove(request_id);
    }

    fn cancel(&self, request_id: &str) {
        if let Some(token) = self.0.lock().get(request_id) {
            token.cancel();
        }
    }
}

pub async fn assignments(worker: Arc<Worker>, mut assignments: Consumer, cancel: CancellationToken) {
    let slots = Arc::new(Semaphore::new(worker.slots));
    let jobs = TaskTracker::new();
    // Ends what still runs when the drain has lasted too long.
    let give_up = CancellationToken::new();
    loop {
        let slot = tokio::select! {
            () = cancel.cancelled() => break,
            slot = slots.clone().acquire_owned() => slot.expect("the semaphore is never closed"),
        };
        let delivery = tokio::select! {
            () = cancel.cancelled() => break,
            delivery = assignments.next() => delivery,
        };
        let Some(delivery) = delivery else { break };
        let (worker, give_up) = (worker.clone(), give_up.clone());
        jobs.spawn(async move {
            if let Err(error) = handle(&worker, &delivery, &give_up).await {
                tracing::warn!(%error, "an assignment was not settled; it comes again");
            }
            drop(slot);
        });
    }
    jobs.close();
    if tokio::time::timeout(worker.drain_timeout, jobs.wait()).await.is_err() {
        give_up.cancel();
        jobs.wait().await;
    }
}

pub async fn cancels(worker: Arc<Worker>, mut cancels: Subscription, cancel: CancellationToken) {
    loop {
        let message = tokio::select! {
            () = cancel.cancelled() => return,
            message = cancels.next() => message,
        };
        let Some(message) = message else { return };
        if let Ok(query) = serde_json::from_slice::<TaskQuery>(&message.payload) {
            worker.running.cancel(&query.request_id);
        }
    }
}

async fn handle(worker: &Worker, delivery: &Delivery, give_up: &CancellationToken) -> bus::Result<()> {
    let assignment: ExecAssignment = match serde_json::from_slice(&delivery.message.payload) {
        Ok(assignment) => assignment,
        Err(error) => {
            let reason = format!("the assignment cannot be read: {error}");
            return bus::dead_letter::bury(&worker.bus, delivery, &reason).await;
        }
    };
    if delivery.delivered > MAX_DELIVER {
        let text = format!("given up after {MAX_DELIVER} deliveries");
        let failed = Outcome::failed("max_deliver", text.clone());
        store(worker, &assignment, failed, Duration::ZERO, 0).await?;
        return bus::dead_letter::bury(&worker.bus, delivery, &text).await;
    }
    let Some(provider) = worker.providers.get(&assignment.executor.provider_id) else {
        // Another worker may have it.
        let tries = (delivery.delivered as usize - 1).min(BACKOFF.len() - 1);
        let (request_id, provider) = (&assignment.request_id, &assignment.executor.provider_id);
        tracing::warn!(request_id, provider, "no provider of this name here; returned for another worker");
        if delivery.delivered == MAX_DELIVER {
            let text = format!("no worker has a provider named {provider:?}; add it to [[worker.providers]]");
            store(worker, &assignment, Outcome::failed("unknown_provider", text), Duration::ZERO, 0).await?;
            return delivery.ack().await;
        }
        return delivery.nak(BACKOFF[tries]).await;
    };
    if cancelled_before(worker, &assignment).await? {
        store(worker, &assignment, Outcome::cancelled(), Duration::ZERO, 0).await?;
        return delivery.ack().await;
    }

    let (trace_id, tenant_id) = (assignment.correlation.trace_id.as_deref(), &assignment.tenant_id);
    let (request_id, attempt) = (&assignment.request_id, delivery.delivered);
    tracing::info!(trace_id, tenant_id, request_id, provider = provider.name, attempt, "running");
    let stop = worker.running.start(request_id);
    let deadline = provider.timeout.min(Duration::from_millis(assignment.options.deadline_ms.max(1)));
    let job = Job { task: &assignment.job, request_id, tenant_id };
    let output = Output::new(worker.bus.clone(), request_id, &assignment.assignment_id, attempt);
    provider.running.fetch_add(1, Relaxed);
    let started = Instant::now();
    let outcome = {
        let run = provider.run(&job, &output, deadline, &stop);
        tokio::select! {
            outcome = run => Some(outcome),
            error = keep(delivery) => return Err(error),
            () = give_up.cancelled() => None,
        }
    };
    let took = started.elapsed();
    provider.running.fetch_sub(1, Relaxed);
    worker.running.end(request_id);
    let Some(outcome) = outcome else {
        tracing::warn!(trace_id, request_id, "not finished when the drain ended; returned to the stream");
        return delivery.nak(Duration::ZERO).await;
    };
    provider.ended(outcome.status == ResultStatus::Success, took);
    metrics::counter!("beamline_worker_runs_total", "provider" => provider.name.clone(), "status" => outcome.status.as_str())
        .increment(1);
    metrics::histogram!("beamline_worker_run_duration_seconds", "provider" => provider.name.clone())
        .record(took.as_secs_f64());
    let (status, error) = (outcome.status.as_str(), outcome.error.clone());
    store(worker, &assignment, outcome, took, output.count()).await?;
    tracing::info!(trace_id, tenant_id, request_id, status, error, took_ms = took.as_millis() as u64, "ran");
    delivery.ack().await
}

/// Says "in progress" at a third of the time after which the stream would deliver again; returns only on an error.
async fn keep(delivery: &Delivery) -> bus::Error {
    loop {
        tokio::time::sleep(ACK_WAIT / 3).await;
        if let Err(error) = delivery.in_progress().await {
            return error;
        }
    }
}

/// A task that was cancelled while it waited is not begun.
async fn cancelled_before(worker: &Worker, assignment: &ExecAssignment) -> bus::Result<bool> {
    let record = worker.bus.kv_get(subjects::BUCKET_TASKS, &assignment.request_id).await?;
    let task = record.and_then(|(bytes, _)| serde_json::from_slice::<TaskState>(&bytes).ok());
    Ok(task.is_some_and(|task| task.state == State::Cancelled))
}

async fn store(
    worker: &Worker,
    assignment: &ExecAssignment,
    outcome: Outcome,
    took: Duration,
    chunks: u64,
) -> bus::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
    let result = ExecResult {
        version: VERSION.into(),
        assignment_id: assignment.assignment_id.clone(),
        request_id: assignment.request_id.clone(),
        status: outcome.status,
        provider_id: assignment.executor.provider_id.clone(),
        job: JobType { job_type: assignment.job.task_type.clone() },
        latency_ms: took.as_millis() as u64,
        cost: assignment.decision.expected_cost,
        output: outcome.output,
        trace_id: assignment.correlation.trace_id.clone(),
        tenant_id: Some(assignment.tenant_id.clone()),
        timestamp: Some(now.into()),
        error_code: outcome.error_code.map(String::from),
        error_message: outcome.error,
        chunks: Some(chunks),
    };
    let payload = serde_json::to_vec(&result).expect("a result is JSON").into();
    let mut headers = bus::Headers::new();
    if let Some(trace) = &result.trace_id {
        headers.insert("trace_id", trace);
    }
    let message = Message { subject: subjects::RESULT.into(), reply: None, headers, payload };
    worker.bus.append(message, Some(&format!("result-{}", result.assignment_id))).await?;
    Ok(())
}
