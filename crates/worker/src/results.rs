//! Results of assignments: stored in the stream RESULT, and only then acknowledged.

use crate::Worker;
use crate::provider::Outcome;
use crate::run::keep_in_progress;
use bus::{Bus, Delivery, Message, Write};
use bytes::Bytes;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use wire::router::{ExecAssignment, ExecResult, JobType, VERSION};
use wire::subjects;

/// How long the worker keeps trying to store a result. After that the assignment is redelivered and runs again.
const STORE_DEADLINE: Duration = Duration::from_secs(120);
/// Pauses between attempts to store a result: the first and the longest.
const STORE_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Memory for results that are being stored, in KiB. Beyond it, a run keeps its slot until there is room.
pub const STORING_KIB: usize = 64 * 1024;
/// What a result counts for at least, in KiB: it holds its assignment, too.
const RESULT_KIB_MIN: usize = 16;
const _: () = assert!(wire::limits::BUS_MESSAGE_MAX / 1024 + RESULT_KIB_MIN < STORING_KIB);

/// The message id of an assignment's result.
pub fn msg_id(assignment_id: &str) -> String {
    format!("result-{assignment_id}")
}

/// What a run used. An assignment that never ran took no time and costs nothing.
pub struct Ran {
    pub took: Duration,
    pub chunks: u64,
}

/// Stores a result and acknowledges its assignment, which gives up its slot for that. The assignment stays in progress
/// meanwhile, because a second run would repeat its effects.
pub async fn finish(
    worker: &Worker,
    mut delivery: Delivery,
    assignment: &ExecAssignment,
    result: &ExecResult,
    give_up: &CancellationToken,
) -> bus::Result<()> {
    let payload = encode(result);
    let kib = u32::try_from(RESULT_KIB_MIN + payload.len().min(wire::limits::BUS_MESSAGE_MAX) / 1024);
    let room = worker
        .storing
        .acquire_many(kib.expect("the limit of a message is below 4 TiB"));
    let _room = tokio::select! {
        room = room => room.expect("the semaphore is never closed"),
        never = keep_in_progress(&delivery) => match never {},
    };

    delivery.release();
    tokio::select! {
        stored = store_until(worker, &delivery, assignment, result, give_up) => stored,
        never = keep_in_progress(&delivery) => match never {},
    }
}

/// Tries again while the bus is away.
async fn store_until(
    worker: &Worker,
    delivery: &Delivery,
    assignment: &ExecAssignment,
    result: &ExecResult,
    give_up: &CancellationToken,
) -> bus::Result<()> {
    let deadline = Instant::now() + STORE_DEADLINE;
    let (mut pause, longest) = STORE_PAUSE;
    let mut interruptions = worker.bus.interruptions();
    loop {
        let error = match store(&worker.bus, assignment, result, Some(delivery)).await {
            Err(error) if error.is_transient() && Instant::now() < deadline => error,
            stored => return stored,
        };
        let request_id = &result.request_id;
        tracing::warn!(%error, request_id, "storing the result failed; trying again");

        tokio::select! {
            () = give_up.cancelled() => return Err(error),
            // At once when the bus is back, before another worker asks for the result.
            Ok(()) = interruptions.changed() => {}
            () = tokio::time::sleep(pause) => pause = longest.min(2 * pause),
        }
        // If this fails, the bus is still away, which is logged above.
        let _ = delivery.in_progress().await;
    }
}

/// The result of an assignment; `ran` is `None` if it never ran.
pub fn result(assignment: &ExecAssignment, outcome: Outcome, ran: Option<Ran>) -> ExecResult {
    ExecResult {
        version: VERSION.into(),
        assignment_id: assignment.assignment_id.clone(),
        request_id: assignment.request_id.clone(),
        status: outcome.status,
        provider_id: assignment.executor.provider_id.clone(),
        job: JobType { job_type: assignment.job.task_type.clone() },
        latency_ms: ran.as_ref().map_or(0, |ran| ran.took.as_millis() as u64),
        cost: ran.as_ref().map_or(0.0, |_| cost(assignment, &outcome)),
        output: outcome.output,
        trace_id: assignment.correlation.trace_id.clone(),
        tenant_id: Some(assignment.tenant_id.clone()),
        timestamp: Some(bus::clock::unix_ms().into()),
        error_code: outcome.error_code.map(String::from),
        error_message: outcome.error,
        retry_after_seconds: outcome.retry_after_seconds,
        chunks: Some(ran.map_or(0, |ran| ran.chunks)),
    }
}

/// What the tokens cost if they and their price are known, else what the policy says that a task costs.
fn cost(assignment: &ExecAssignment, outcome: &Outcome) -> f64 {
    let of_tokens = assignment.decision.price.zip(outcome.tokens);
    of_tokens.map_or(assignment.decision.expected_cost, |(price, tokens)| price.cost(&tokens))
}

/// Stores the result, and acknowledges `delivery` if there is one.
pub async fn store(
    bus: &Bus,
    assignment: &ExecAssignment,
    result: &ExecResult,
    delivery: Option<&Delivery>,
) -> bus::Result<()> {
    match append(bus, assignment, result, delivery).await {
        // Running again would not make the result smaller, so the task ends with an error instead.
        Err(bus::Error::TooLarge { size, max }) => {
            let text = format!("the output makes a result of {size} bytes; the bus accepts at most {max}");
            append(bus, assignment, &result.without_output(text), delivery).await
        }
        stored => stored,
    }
}

/// Appends the result, then sends a copy to the one who waits for it. The header tells the router about the copy, which
/// sends those that others wait for.
async fn append(
    bus: &Bus,
    assignment: &ExecAssignment,
    result: &ExecResult,
    delivery: Option<&Delivery>,
) -> bus::Result<()> {
    let payload = encode(result);
    let mut headers = bus::Headers::new();
    if let Some(trace_id) = &result.trace_id {
        headers.insert("trace_id", trace_id);
    }

    let copy_to = assignment.correlation.result_subject.as_deref();
    let copy_to = copy_to.filter(|subject| subjects::is_result_copy(subject));
    let copy = copy_to.map(|subject| {
        headers.insert(subjects::RESULT_COPY_HEADER, subject);
        let (subject, payload) = (subject.into(), payload.clone());
        Write::Publish { message: Message { subject, payload, ..Message::default() } }
    });

    let message = Message { subject: subjects::RESULT.into(), reply: None, headers, payload };
    let msg_id = msg_id(&result.assignment_id);

    let mut writes = vec![Write::Append { message, msg_id: Some(&msg_id) }];
    writes.extend(copy);
    writes.extend(delivery.map(Write::Ack));
    bus.write(writes).await?;
    Ok(())
}

fn encode(result: &ExecResult) -> Bytes {
    serde_json::to_vec(result).expect("a result serializes to JSON").into()
}
