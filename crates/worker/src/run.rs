//! The life of an assignment in the worker: delivered, run, its result stored, acknowledged.

use crate::provider::{Job, Limit, Outcome, Output, Provider};
use crate::{ACK_WAIT, Worker};
use bus::tasks::Record;
use bus::{Bus, Consumer, Delivery, Message, Subscription, Write};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::router::{CancelRun, ExecAssignment, ExecResult, JobType, ResultStatus, State, VERSION};
use wire::subjects;

/// Deliveries of one assignment (contract: assign 5). The next one becomes a dead letter and an error result.
const MAX_DELIVER: u32 = 5;

/// The task's record becomes `running` after the work has taken this long. Most tasks end sooner, which saves a write.
const RUNNING_AFTER: Duration = Duration::from_millis(20);

/// How long the worker keeps trying to store a result. After that the assignment is redelivered and runs again.
const STORE_DEADLINE: Duration = Duration::from_secs(120);
/// Pauses between attempts to store a result: the first and the longest.
const STORE_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The assignments that run now, for counting and cancelling. One request may run twice at the same time if the stream
/// redelivered it because the in-progress acks of its first run were late.
#[derive(Default)]
pub struct Running(Mutex<Table>);

#[derive(Default)]
struct Table {
    next: u64,
    runs: HashMap<u64, Entry>,
}

struct Entry {
    tenant_id: String,
    request_id: String,
    assignment_id: String,
    stop: CancellationToken,
}

/// One run in the table; dropping it removes it.
struct Run<'a> {
    running: &'a Running,
    number: u64,
    stop: CancellationToken,
}

impl Running {
    pub fn count(&self) -> usize {
        self.0.lock().runs.len()
    }

    fn start(&self, assignment: &ExecAssignment) -> Run<'_> {
        let stop = CancellationToken::new();
        let entry = Entry {
            tenant_id: assignment.tenant_id.clone(),
            request_id: assignment.request_id.clone(),
            assignment_id: assignment.assignment_id.clone(),
            stop: stop.clone(),
        };

        let mut table = self.0.lock();
        table.next += 1;
        let number = table.next;
        table.runs.insert(number, entry);
        Run { running: self, number, stop }
    }

    fn cancel(&self, cancel: &CancelRun) {
        let table = self.0.lock();
        for run in table.runs.values() {
            if cancel.is_for(&run.tenant_id, &run.request_id, &run.assignment_id) {
                run.stop.cancel();
            }
        }
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.running.0.lock().runs.remove(&self.number);
    }
}

/// Runs assignments until cancelled, then drains: runs may continue for the drain timeout, then they are stopped and
/// returned to the stream.
pub async fn assignments(worker: Arc<Worker>, mut assignments: Consumer, cancel: CancellationToken) {
    let slots = Arc::new(Semaphore::new(worker.slots));
    let jobs = TaskTracker::new();
    let give_up = CancellationToken::new();

    loop {
        // The slot comes first: a delivery that waited for one would lose part of its ack wait.
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
                tracing::warn!(%error, "an assignment could not be settled; the stream redelivers it");
            }
            drop(slot);
        });
    }

    // Closed before the runs end, so that other workers get the deliveries queued here and the runs returned below.
    assignments.close().await;
    jobs.close();
    if tokio::time::timeout(worker.drain_timeout, jobs.wait()).await.is_err() {
        give_up.cancel();
        jobs.wait().await;
    }
}

/// Applies cancellations to the runs of this worker.
pub async fn cancels(worker: Arc<Worker>, mut cancels: Subscription, cancel: CancellationToken) {
    loop {
        let message = tokio::select! {
            () = cancel.cancelled() => return,
            message = cancels.next() => message,
        };
        let Some(message) = message else { return };
        if let Ok(cancel) = serde_json::from_slice(&message.payload) {
            worker.running.cancel(&cancel);
        }
    }
}

async fn handle(worker: &Worker, delivery: &Delivery, give_up: &CancellationToken) -> bus::Result<()> {
    let assignment = match read(&delivery.message.payload) {
        Ok(assignment) => assignment,
        Err(reason) => return bus::dead_letter::bury(&worker.bus, delivery, &reason).await,
    };
    if delivery.delivered > MAX_DELIVER {
        let text = format!("given up after {MAX_DELIVER} deliveries");
        return fail(worker, delivery, &assignment, "max_deliver", text).await;
    }

    let Some(provider) = worker.providers.get(&assignment.executor.provider_id) else {
        return pass_on(worker, delivery, &assignment).await;
    };

    // Registered before the record is read, so a cancellation is seen in one of the two.
    let run = worker.running.start(&assignment);
    match begin(&worker.bus, &assignment).await? {
        Begin::Run => {}
        Begin::Cancelled => {
            let result = result(&assignment, Outcome::cancelled(), None);
            return finish(worker, delivery, &assignment, &result, give_up).await;
        }
        Begin::Done => return delivery.ack().await,
    }

    let (trace_id, tenant_id) = (assignment.correlation.trace_id.as_deref(), &assignment.tenant_id);
    let (request_id, attempt) = (&assignment.request_id, delivery.delivered);
    tracing::debug!(trace_id, tenant_id, request_id, provider = provider.name, attempt, "running");

    let limit = Limit::of(provider.timeout, Duration::from_millis(assignment.options.deadline_ms.max(1)));
    let job = Job { task: &assignment.job, request_id, tenant_id, trace_id };
    let output = Output::new(worker.bus.clone(), &assignment, attempt);
    provider.running.fetch_add(1, Relaxed);
    let started = Instant::now();
    let (outcome, given_up) = {
        let mut work = Box::pin(provider.run(&job, &output, limit, &run.stop));
        tokio::select! {
            outcome = &mut work => (outcome, false),
            never = attend(&worker.bus, delivery, &assignment, &run.stop) => match never {},
            () = give_up.cancelled() => {
                run.stop.cancel();
                (work.await, true)
            }
        }
    };
    let took = started.elapsed();

    provider.running.fetch_sub(1, Relaxed);
    drop(run);

    if given_up && outcome.status == ResultStatus::Cancelled {
        tracing::warn!(trace_id, request_id, "the run was stopped at the drain timeout; returned to the stream");
        return delivery.nak(Duration::ZERO).await;
    }

    count(provider, &outcome, took);
    let (status, error_code) = (outcome.status.as_str(), outcome.error_code);
    // The error's text may repeat the prompt, so only its length is logged.
    let error_bytes = outcome.error.as_ref().map(String::len);
    let result = result(&assignment, outcome, Some(Ran { took, chunks: output.count() }));
    finish(worker, delivery, &assignment, &result, give_up).await?;
    let took_ms = took.as_millis() as u64;
    tracing::debug!(trace_id, tenant_id, request_id, status, error_code, error_bytes, took_ms, "ran");
    Ok(())
}

fn count(provider: &Provider, outcome: &Outcome, took: Duration) {
    provider.ended(outcome.status == ResultStatus::Success, took);
    let (name, status) = (provider.name.clone(), outcome.status.as_str());
    metrics::counter!("beamline_worker_runs_total", "provider" => name.clone(), "status" => status).increment(1);
    metrics::histogram!("beamline_worker_run_duration_seconds", "provider" => name).record(took.as_secs_f64());
}

/// The assignment in a payload, or the reason why it becomes a dead letter.
fn read(payload: &[u8]) -> Result<ExecAssignment, String> {
    let assignment: ExecAssignment = serde_json::from_slice(payload)
        .map_err(|error| format!("the assignment cannot be read: {}", wire::unfit(&error)))?;

    // An empty trace id counts as none.
    let trace_id = assignment.correlation.trace_id.as_ref().filter(|id| !id.is_empty());
    let ids = [("assignment_id", &assignment.assignment_id), ("request_id", &assignment.request_id)];
    for (name, id) in ids.into_iter().chain(trace_id.map(|id| ("trace_id", id))) {
        wire::id::check(id).map_err(|error| format!("the assignment's {name} {error}"))?;
    }
    wire::id::check_tenant(&assignment.tenant_id).map_err(|error| format!("the assignment's tenant_id {error}"))?;
    Ok(assignment)
}

/// Returns an assignment whose provider this worker does not have to the stream, for another worker.
async fn pass_on(worker: &Worker, delivery: &Delivery, assignment: &ExecAssignment) -> bus::Result<()> {
    let (request_id, provider) = (&assignment.request_id, &assignment.executor.provider_id);
    if delivery.delivered == MAX_DELIVER {
        let text = format!("no worker has a provider named {provider:?}; add it to [[worker.providers]]");
        return fail(worker, delivery, assignment, "unknown_provider", text).await;
    }

    tracing::warn!(request_id, provider, "this worker has no provider of this name; returned for another worker");
    let tries = (delivery.delivered as usize - 1).min(worker.backoff.len() - 1);
    delivery.nak(worker.backoff[tries]).await
}

/// Ends an assignment that never ran: an error result for the waiting client, a dead letter for the operator.
async fn fail(
    worker: &Worker,
    delivery: &Delivery,
    assignment: &ExecAssignment,
    code: &'static str,
    text: String,
) -> bus::Result<()> {
    let result = result(assignment, Outcome::failed(code, text.clone()), None);
    store(&worker.bus, assignment, &result, None).await?;
    bus::dead_letter::bury(&worker.bus, delivery, &text).await
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

async fn keep_in_progress(delivery: &Delivery) -> Infallible {
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

enum Begin {
    Run,
    /// Cancelled before it ran.
    Cancelled,
    /// Its result is recorded already; only the acknowledgement was lost.
    Done,
}

/// Whether the assignment still has to run.
async fn begin(bus: &Bus, assignment: &ExecAssignment) -> bus::Result<Begin> {
    Ok(match record_of(bus, assignment).await? {
        Some(record) if record.task.result.is_some() => Begin::Done,
        Some(record) if record.task.state == State::Cancelled => Begin::Cancelled,
        _ => Begin::Run,
    })
}

/// What a run used. An assignment that never ran took no time and costs nothing.
struct Ran {
    took: Duration,
    chunks: u64,
}

/// Stores the result of a run and acknowledges its assignment. While the bus is away, this tries again and keeps the
/// assignment in progress, because a second run would repeat its effects.
async fn finish(
    worker: &Worker,
    delivery: &Delivery,
    assignment: &ExecAssignment,
    result: &ExecResult,
    give_up: &CancellationToken,
) -> bus::Result<()> {
    let deadline = Instant::now() + STORE_DEADLINE;
    let (mut pause, longest) = STORE_PAUSE;
    loop {
        let error = match store(&worker.bus, assignment, result, Some(delivery)).await {
            Err(error) if error.is_transient() && Instant::now() < deadline => error,
            stored => return stored,
        };
        let request_id = &result.request_id;
        tracing::warn!(%error, request_id, "storing the result failed; trying again");

        tokio::select! {
            () = give_up.cancelled() => return Err(error),
            () = tokio::time::sleep(pause) => pause = longest.min(2 * pause),
        }
        // If this fails, the bus is still away, which is logged above.
        let _ = delivery.in_progress().await;
    }
}

/// The result of an assignment; `ran` is `None` if it never ran.
fn result(assignment: &ExecAssignment, outcome: Outcome, ran: Option<Ran>) -> ExecResult {
    ExecResult {
        version: VERSION.into(),
        assignment_id: assignment.assignment_id.clone(),
        request_id: assignment.request_id.clone(),
        status: outcome.status,
        provider_id: assignment.executor.provider_id.clone(),
        job: JobType { job_type: assignment.job.task_type.clone() },
        latency_ms: ran.as_ref().map_or(0, |ran| ran.took.as_millis() as u64),
        cost: ran.as_ref().map_or(0.0, |_| assignment.decision.expected_cost),
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

/// Stores the result, and acknowledges `delivery` if there is one.
async fn store(
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
    let payload = bytes::Bytes::from(serde_json::to_vec(result).expect("a result serializes to JSON"));
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
    let msg_id = format!("result-{}", result.assignment_id);

    let mut writes = vec![Write::Append { message, msg_id: Some(&msg_id) }];
    writes.extend(copy);
    writes.extend(delivery.map(Write::Ack));
    bus.write(writes).await?;
    Ok(())
}
