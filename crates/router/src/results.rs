//! Records results: one usage event for each assignment, the task's final record, the outcome for all routers; then
//! acknowledges. Those who wait for the result get a copy, unless the worker sends it.

use crate::Router;
use bus::assignments::{made_a_day_before, made_ms};
use bus::clock::unix_ms;
use bus::tasks::Record;
use bus::{Bus, Consumer, Delivery, Message, Write, Written};
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::router::{DEFAULT_TENANT, ExecResult, ResultStatus, State, TaskState, Usage, VERSION};
use wire::subjects;

/// Results that are recorded at the same time.
const CONCURRENT: usize = 64;
/// Deliveries after which a result becomes a dead letter (contract: result 10).
const MAX_DELIVER: u32 = 10;
/// Delays between deliveries.
const BACKOFF: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)];
/// Attempts to write a task's record while others change it.
const ATTEMPTS_MAX: usize = 16;

pub async fn run(router: Arc<Router>, mut results: Consumer, cancel: CancellationToken) {
    let slots = Arc::new(Semaphore::new(CONCURRENT));
    let handlers = TaskTracker::new();

    loop {
        let delivery = tokio::select! {
            () = cancel.cancelled() => break,
            delivery = results.next() => delivery,
        };
        let Some(delivery) = delivery else { break };
        let Ok(slot) = slots.clone().acquire_owned().await else {
            break;
        };

        let router = router.clone();
        handlers.spawn(async move {
            handle(&router, &delivery).await;
            drop(slot);
        });
    }

    // Closed before the drain, so that other routers get the deliveries queued here.
    results.close().await;
    router.drain(handlers).await;
}

async fn handle(router: &Router, delivery: &Delivery) {
    let decoded = ExecResult::decode(&delivery.message.payload).and_then(|result| check(&result).map(|()| result));
    let done = match decoded {
        Err(poison) => bus::dead_letter::bury_unreadable(&router.bus, delivery, &poison).await,
        Ok(_) if delivery.delivered > MAX_DELIVER => {
            bus::dead_letter::bury(&router.bus, delivery, "the result could not be recorded").await
        }
        Ok(result) => match record(router, &result, delivery).await {
            Ok(()) => Ok(()),
            Err(error) => {
                let request_id = &result.request_id;
                tracing::warn!(%error, request_id, "a result was not recorded; the stream redelivers it");
                let tries = (delivery.delivered as usize - 1).min(BACKOFF.len() - 1);
                delivery.nak(BACKOFF[tries]).await
            }
        },
    };
    if let Err(error) = done {
        tracing::warn!(%error, "a result was not acknowledged; the stream redelivers it");
    }
}

/// Notes in the record of a task where a copy of its result goes. Returns the task as recorded. If the result was
/// recorded meanwhile, nothing is noted, and the task has it.
pub async fn tell(bus: &Bus, task: TaskState, subject: &str) -> bus::Result<TaskState> {
    let mut told = task.clone();
    told.tell(subject);
    if told.result_subjects == task.result_subjects {
        return Ok(task);
    }
    let noted = bus::tasks::update(bus, task.tenant(), &task.task_id, |task| task.tell(subject)).await?;
    Ok(noted.unwrap_or(task))
}

/// Publishes copies of the result to those who wait for it, except for the one that the worker says it sends itself.
async fn send_copies(router: &Router, task: &TaskState, delivery: &Delivery) {
    let message = &delivery.message;
    let sent = message.headers.get(subjects::RESULT_COPY_HEADER);
    for subject in task
        .result_subjects
        .iter()
        .filter(|subject| Some(subject.as_str()) != sent)
    {
        let copy = Message {
            subject: subject.as_str().into(),
            payload: message.payload.clone(),
            ..Message::default()
        };
        if let Err(error) = router.bus.publish(copy).await {
            let request_id = &task.task_id;
            tracing::debug!(%error, request_id, "cannot send a copy of a result; it is found in the task's record");
        }
    }
}

fn check(result: &ExecResult) -> Result<(), String> {
    let needed = [("assignment_id", &result.assignment_id), ("request_id", &result.request_id)];
    let others = [
        ("provider_id", Some(&result.provider_id)),
        ("trace_id", result.trace_id.as_ref()),
        ("tenant_id", result.tenant_id.as_ref()),
    ];

    // An optional id that is empty counts as none.
    let others = others
        .into_iter()
        .filter_map(|(name, id)| Some((name, id.filter(|id| !id.is_empty())?)));

    for (name, id) in needed.into_iter().chain(others) {
        wire::id::check(id).map_err(|error| format!("the result's {name} {error}"))?;
    }
    Ok(())
}

/// Records the result and acknowledges it: the usage event, then the task's record, then the acknowledgement. Safe to
/// repeat: the usage event has the assignment's id, and the record is final once.
async fn record(router: &Router, result: &ExecResult, delivery: &Delivery) -> bus::Result<()> {
    let msg_id = format!("usage-{}", result.assignment_id);
    let mut kept = Cow::Borrowed(result);
    let mut fresh = router.fresh.take(result);
    for _ in 0..ATTEMPTS_MAX {
        let record = match fresh.take() {
            Some(record) => Some(record),
            None => bus::tasks::of_result(&router.bus, result).await?,
        };
        if let Some(record) = record.as_ref().filter(|record| record.task.result.is_some()) {
            return recorded_before(router, &record.task, delivery).await;
        }
        if record.is_none() {
            if made_a_day_before(&result.assignment_id, delivery.stored_ms) {
                let reason =
                    "the assignment of this result was made more than a day before; its task is not known any more";
                return bus::dead_letter::bury_unreadable(&router.bus, delivery, reason).await;
            }
            if bus::tasks::was_billed(&router.bus, result, delivery.sequence).await? {
                return delivery.ack().await;
            }
        }
        let record = record.map(|record| finished(record, &kept));
        let task = record.as_ref().map(|record| &record.task);

        let payload = serde_json::to_vec(&usage(task, result))
            .expect("a usage event serializes to JSON")
            .into();
        let message = Message { subject: subjects::USAGE.into(), payload, ..Message::default() };
        let mut writes = vec![Write::Append { message, msg_id: Some(&msg_id) }];
        writes.push(match &record {
            Some(record) => record.write(),
            None => bus::tasks::note_billed(result, delivery.sequence),
        });
        writes.push(Write::Ack(delivery));

        let (written, error) = match router.bus.write(writes).await {
            Ok(written) => (written, None),
            Err(bus::Incomplete { error, written }) => (written, Some(error)),
        };

        // Counted even if the record could not be written, because the next attempt finds the usage event there.
        if matches!(written.first(), Some(Written::Appended(usage)) if !usage.duplicate) {
            router.stats.ended(result);
            if let Some(task) = task {
                crate::outcomes::publish(router, task, result).await;
            }
        }

        match error {
            None => {
                if let Some(task) = task {
                    send_copies(router, task, delivery).await;
                }
                log(result, task);
                return Ok(());
            }
            // The record changed after it was read: read it again.
            Some(bus::Error::WrongRevision(_)) => {}
            // A record holds more than the result, so a result that fits a message may not fit its record.
            Some(bus::Error::TooLarge { size, max }) if kept.output.is_some() => {
                let text = format!("the output makes a record of {size} bytes; the bus accepts at most {max}");
                kept = Cow::Owned(result.without_output(text));
            }
            Some(error) => return Err(error),
        }
    }
    Err(bus::Error::WrongRevision(result.request_id.clone()))
}

/// Acknowledges a result that its task's record has. The record is written last, so everything else was done before; only
/// the router that did it may have ended before it sent the copies.
async fn recorded_before(router: &Router, task: &TaskState, delivery: &Delivery) -> bus::Result<()> {
    if delivery.delivered > 1 {
        send_copies(router, task, delivery).await;
    }
    delivery.ack().await
}

/// The tenant that pays. The task's record says who asked; a result need not name a tenant.
fn payer<'a>(task: Option<&'a TaskState>, result: &'a ExecResult) -> Option<&'a str> {
    task.map(TaskState::tenant).or(result.tenant_id.as_deref())
}

fn usage(task: Option<&TaskState>, result: &ExecResult) -> Usage {
    Usage {
        version: VERSION.into(),
        tenant_id: payer(task, result).unwrap_or(DEFAULT_TENANT).into(),
        provider_id: result.provider_id.clone(),
        event_type: result.job.job_type.clone(),
        latency_ms: result.latency_ms,
        cost: result.cost,
        status: result.status,
        trace_id: result.trace_id.clone(),
        timestamp: unix_ms(),
        assignment_id: result.assignment_id.clone(),
        request_id: result.request_id.clone(),
    }
}

/// The task's record with its result. A cancelled task stays cancelled.
fn finished(mut record: Record, result: &ExecResult) -> Record {
    record.task.state = match (record.task.state, result.status) {
        (State::Cancelled, _) | (_, ResultStatus::Cancelled) => State::Cancelled,
        (_, ResultStatus::Success) => State::Completed,
        (_, ResultStatus::Error | ResultStatus::Timeout) => State::Failed,
    };
    record.task.result = Some(result.clone());
    record
}

/// The task's line in the access log. A worker may have put anything into its texts, so the log has an error's code only
/// if that is an id, and of its message the length.
fn log(result: &ExecResult, task: Option<&TaskState>) {
    let error_code = result.error_code.as_deref();
    tracing::info!(
        target: "access",
        trace_id = result.trace_id,
        tenant_id = payer(task, result),
        request_id = result.request_id,
        provider_id = result.provider_id,
        status = result.status.as_str(),
        error_code = error_code.filter(|code| wire::id::check(code).is_ok()),
        error_bytes = result.error_message.as_ref().map(String::len),
        run_ms = result.latency_ms,
        total_ms = made_ms(&result.assignment_id).map(|made| unix_ms().saturating_sub(made)),
        "task ended"
    );
}
