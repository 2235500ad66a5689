//! One run of an assignment: the provider works, the assignment stays in progress, the task's record says so.

use crate::provider::{Job, Limit, Outcome, Output, Provider};
use crate::results::{Ran, result};
use crate::running::Run;
use crate::{ACK_WAIT, Worker};
use bus::tasks::Record;
use bus::{Bus, Delivery, Subscription};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use wire::router::{ExecAssignment, ExecResult, ResultStatus, State};

/// The task's record becomes `running` after the work has taken this long. Most tasks end sooner, which saves a write.
const RUNNING_AFTER: Duration = Duration::from_millis(20);

/// Applies cancellations to the runs of this worker.
pub async fn cancels(worker: Arc<Worker>, mut cancels: Subscription, cancel: CancellationToken) {
    loop {
        let message = tokio::select! {
            () = cancel.cancelled() => return,
            message = cancels.next() => message,
        };
        let Some(message) = message else { return };
        if let Ok(cancel) = serde_json::from_slice(&message.payload) {
            worker.cancels.hear(&cancel, worker.clock.now_ms());
            worker.running.cancel(&cancel);
        }
    }
}

/// Runs the assignment on the provider, at most until its deadline, which is `left` from now. Returns its result, or
/// `None` if the run was returned to the stream.
pub async fn run(
    worker: &Worker,
    provider: &Provider,
    left: Duration,
    delivery: &Delivery,
    assignment: &ExecAssignment,
    run: &Run<'_>,
    give_up: &CancellationToken,
) -> bus::Result<Option<ExecResult>> {
    let (trace_id, tenant_id) = (assignment.correlation.trace_id.as_deref(), &assignment.tenant_id);
    let (request_id, attempt) = (&assignment.request_id, bus::assignments::attempt(delivery));
    tracing::debug!(trace_id, tenant_id, request_id, provider = provider.name, attempt, "running");

    let limit = Limit::of(provider.timeout, Duration::from_millis(assignment.options.deadline_ms), left);
    let job = Job { task: &assignment.job, request_id, tenant_id, trace_id };
    let output = Output::new(worker.bus.clone(), assignment, attempt);
    provider.running.fetch_add(1, Relaxed);
    let started = Instant::now();
    let (outcome, given_up) = {
        let mut work = Box::pin(provider.run(&job, &output, limit, &run.stop));
        tokio::select! {
            outcome = &mut work => (outcome, false),
            never = attend(&worker.bus, delivery, assignment, &run.stop) => match never {},
            () = give_up.cancelled() => {
                run.stop.cancel();
                (work.await, true)
            }
        }
    };
    let took = started.elapsed();

    provider.running.fetch_sub(1, Relaxed);

    if given_up && outcome.status == ResultStatus::Cancelled {
        tracing::warn!(trace_id, request_id, "the run was stopped at the drain timeout; returned to the stream");
        return delivery.nak(Duration::ZERO).await.map(|()| None);
    }

    count(provider, &outcome, took);
    let (status, error_code) = (outcome.status.as_str(), outcome.error_code);
    // The error's text may repeat the prompt, so only its length is logged.
    let error_bytes = outcome.error.as_ref().map(String::len);
    let took_ms = took.as_millis() as u64;
    tracing::debug!(trace_id, tenant_id, request_id, status, error_code, error_bytes, took_ms, "ran");
    Ok(Some(result(assignment, outcome, Some(Ran { took, chunks: output.count() }))))
}

fn count(provider: &Provider, outcome: &Outcome, took: Duration) {
    provider.ended(outcome.status == ResultStatus::Success, took);
    let (name, status) = (provider.name.clone(), outcome.status.as_str());
    metrics::counter!("beamline_worker_runs_total", "provider" => name.clone(), "status" => status).increment(1);
    metrics::histogram!("beamline_worker_run_duration_seconds", "provider" => name).record(took.as_secs_f64());
}

/// Attends to an assignment while it runs: makes its record `running` and sends an in-progress ack at every third of
/// the ack wait, so that the stream does not redeliver it. While the bus is away the run continues: at worst the
/// assignment runs twice and leaves one result.
async fn attend(bus: &Bus, delivery: &Delivery, assignment: &ExecAssignment, stop: &CancellationToken) -> Infallible {
    let mark = async {
        tokio::time::sleep(RUNNING_AFTER).await;
        if let Err(error) = mark_running(bus, assignment, stop).await {
            let request_id = &assignment.request_id;
            tracing::warn!(%error, request_id, "cannot record that the task runs; its record still says assigned");
        }
    };
    // Beside each other, because a slow bus must not hold up the first in-progress ack.
    let ((), never) = tokio::join!(mark, keep_in_progress(delivery));
    never
}

/// Sends an in-progress ack at every third of the ack wait.
pub async fn keep_in_progress(delivery: &Delivery) -> Infallible {
    loop {
        tokio::time::sleep(ACK_WAIT / 3).await;
        if let Err(error) = delivery.in_progress().await {
            tracing::warn!(%error, "an in-progress ack failed; the stream may redeliver the assignment while it runs");
        }
    }
}

/// Makes the task's record `running`. Stops the run if the task was cancelled in the meantime.
async fn mark_running(bus: &Bus, assignment: &ExecAssignment, stop: &CancellationToken) -> bus::Result<()> {
    loop {
        let Some(mut record) = record_of(bus, assignment).await? else {
            return Ok(());
        };
        match record.task.state {
            State::Queued | State::Assigned => record.task.state = State::Running,
            State::Cancelled => {
                stop.cancel();
                return Ok(());
            }
            State::Running | State::Completed | State::Failed => return Ok(()),
        }
        match record.save(bus).await {
            // It changed after it was read: read it again.
            Err(bus::Error::WrongRevision(_)) => {}
            saved => return saved,
        }
    }
}

/// The task's record, if it has one for this assignment: an assignment need not have a record, and the record of
/// another assignment does not concern this one.
async fn record_of(bus: &Bus, assignment: &ExecAssignment) -> bus::Result<Option<Record>> {
    let record = bus::tasks::load(bus, &assignment.tenant_id, &assignment.request_id).await?;
    Ok(record.filter(|record| record.task.assignment_id.as_ref() == Some(&assignment.assignment_id)))
}
