//! Takes assignments from the common subject and from the subjects of this worker's providers, and decides what becomes
//! of each: it is run, moved to its provider's subject, returned, or failed.

#[cfg(test)]
mod tests;

use crate::provider::Outcome;
use crate::results::{finish, msg_id, result, store};
use crate::run::run;
use crate::{ACK_WAIT, Worker};
use bus::assignments::{is_moved, made_a_day_before, made_ms, move_to, sent_ms, was_moved};
use bus::{Consumer, Delivery};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::router::{ExecAssignment, State};
use wire::subjects;

/// Deliveries of one assignment (contract: assign 5). The next one becomes a dead letter and an error result.
const MAX_DELIVER: u32 = 5;

/// An assignment that was stored within this time of its making, in milliseconds, was stored for the first time: the
/// stream drops repeats within its dedup window, which is longer. The clocks of router and stream may differ.
const NEW_MS: u64 = 60_000;
/// A delivery within this time of the storing, in milliseconds, is the first one even if a server of a cluster died and
/// forgot deliveries: electing another takes longer.
const FRESH_MS: u64 = 1000;
/// What an outage of the bus interrupted has this long to reach the bus, before it runs again.
const AFTER_OUTAGE: Duration = Duration::from_secs(1);

/// Takes assignments until cancelled, then drains: runs may continue for the drain timeout, then they are stopped and
/// returned to the stream.
pub async fn assignments(worker: Arc<Worker>, consumers: Vec<Consumer>, cancel: CancellationToken) {
    let jobs = TaskTracker::new();
    let give_up = CancellationToken::new();

    let taking = consumers
        .into_iter()
        .map(|consumer| take(&worker, consumer, &jobs, &give_up, &cancel));
    futures_util::future::join_all(taking).await;

    jobs.close();
    if tokio::time::timeout(worker.drain_timeout, jobs.wait()).await.is_err() {
        give_up.cancel();
        jobs.wait().await;
    }
}

/// Takes from one subject until cancelled. The consumers share the worker's slots, so a delivery arrives only when there
/// is a slot for it.
async fn take(
    worker: &Arc<Worker>,
    mut consumer: Consumer,
    jobs: &TaskTracker,
    give_up: &CancellationToken,
    cancel: &CancellationToken,
) {
    loop {
        let delivery = tokio::select! {
            () = cancel.cancelled() => break,
            delivery = consumer.next() => delivery,
        };
        let Some(delivery) = delivery else { break };

        let (worker, give_up) = (worker.clone(), give_up.clone());
        jobs.spawn(async move {
            if let Err(error) = handle(&worker, delivery, &give_up).await {
                tracing::warn!(%error, "an assignment could not be settled; the stream redelivers it");
            }
        });
    }

    // Closed before the runs end, so that other workers get the deliveries queued here and the runs returned later.
    consumer.close().await;
}

/// The futures of what is rare are boxed: every assignment's future has room for the largest of those that are not.
async fn handle(worker: &Worker, delivery: Delivery, give_up: &CancellationToken) -> bus::Result<()> {
    let assignment = match read(&delivery.message.payload) {
        Ok(assignment) => assignment,
        Err(reason) => {
            return Box::pin(bus::dead_letter::bury_unreadable(&worker.bus, &delivery, &reason)).await;
        }
    };

    let left = time_left(worker, &delivery, &assignment).await;
    let provider = worker.providers.get(&assignment.executor.provider_id);
    if let (None, Some(left)) = (provider, left) {
        return Box::pin(pass_on(worker, &delivery, &assignment, left)).await;
    }

    // Registered before the record is read, so a cancellation is seen in one of the two.
    let run_here = match worker.running.start(&assignment) {
        Ok(run_here) => run_here,
        Err(other) => return Box::pin(wait_for(worker, delivery, &assignment, other, give_up)).await,
    };
    match begin(worker, &delivery, &assignment, true).await? {
        Begin::Run => {}
        Begin::Elsewhere(patience) => return delivery.nak(patience).await,
        Begin::Cancelled => {
            let result = result(&assignment, Outcome::cancelled(), None);
            return Box::pin(finish(worker, delivery, &assignment, &result, give_up)).await;
        }
        Begin::Done => return delivery.ack().await,
    }

    let Some(provider) = provider else {
        let name = &assignment.executor.provider_id;
        let text = format!("no worker has a provider named {name:?}; add it to [[worker.providers]]");
        return Box::pin(fail(worker, &delivery, &assignment, "unknown_provider", text)).await;
    };
    let Some(left) = left else {
        let result = result(&assignment, Outcome::expired(assignment.options.deadline_ms), None);
        return Box::pin(finish(worker, delivery, &assignment, &result, give_up)).await;
    };
    if delivery.delivered > MAX_DELIVER {
        return Box::pin(give_up_on(worker, &delivery, &assignment)).await;
    }

    match run(worker, provider, left, &delivery, &assignment, &run_here, give_up).await? {
        Some(result) => {
            run_here.ended();
            finish(worker, delivery, &assignment, &result, give_up).await
        }
        None => Ok(()),
    }
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

/// The time until the task's deadline, which counts from when its assignment was first stored; `None` if it has passed.
async fn time_left(worker: &Worker, delivery: &Delivery, assignment: &ExecAssignment) -> Option<Duration> {
    // A replay of an old assignment was stored just now.
    if made_a_day_before(&assignment.assignment_id, delivery.stored_ms) {
        return None;
    }
    let left = || {
        let waited_ms = worker.clock.now_ms().saturating_sub(sent_ms(delivery));
        let left_ms = assignment.options.deadline_ms.max(1).saturating_sub(waited_ms);
        (left_ms > 0).then_some(Duration::from_millis(left_ms))
    };
    if let Some(left) = left() {
        return Some(left);
    }
    // To a clock that was set back after it was read here, what it has stamped since looks old.
    Box::pin(worker.clock.sync()).await.ok()?;
    left()
}

/// Passes on an assignment whose provider this worker does not have: moves it to the provider's subject if a live worker
/// takes from it, otherwise returns it to the stream, until its deadline. Neither counts as a try to run it.
async fn pass_on(worker: &Worker, delivery: &Delivery, assignment: &ExecAssignment, left: Duration) -> bus::Result<()> {
    let (request_id, provider) = (&assignment.request_id, &assignment.executor.provider_id);
    // On a subject of its own, the assignment is where its sender wants it.
    let common = *delivery.message.subject == *subjects::ASSIGN;
    let target = subjects::assign_to(provider).filter(|target| common && worker.fleet.listens(target, Instant::now()));
    if let Some(target) = target {
        match move_to(&worker.bus, delivery, assignment, &target).await {
            // The stream lost the subject to an older process; the workers that take from it add it again.
            Err(bus::Error::NoStream(_)) => {}
            moved => return moved,
        }
    }

    if delivery.delivered == 1 {
        tracing::warn!(
            request_id,
            provider,
            "no live worker is known to have this provider; the assignment is returned until its deadline"
        );
    }
    let tries = (delivery.delivered as usize - 1).min(worker.backoff.len() - 1);
    delivery.nak(worker.backoff[tries].min(left)).await
}

enum Begin {
    Run,
    /// Cancelled before it ran.
    Cancelled,
    /// It has run, or was moved; only the acknowledgement was lost.
    Done,
    /// Another worker may have it, or may have died with it: this one waits as long as the other may be silent.
    Elsewhere(Duration),
}

/// Whether the assignment still has to run. `is_first` if this worker has no other delivery of it.
async fn begin(
    worker: &Worker,
    delivery: &Delivery,
    assignment: &ExecAssignment,
    is_first: bool,
) -> bus::Result<Begin> {
    let bus = &worker.bus;
    let counts_as_new = is_first && delivery.delivered == 1 && !is_moved(delivery);
    let (stored_ms, now_ms) = (delivery.stored_ms, worker.clock.now_ms());
    let may_be_repeated = worker.outages.may_have_delivered(stored_ms, now_ms);
    if counts_as_new
        && !may_be_repeated
        && is_new(assignment, stored_ms, now_ms)
        && !worker.cancels.may_include(&assignment.request_id, stored_ms)
    {
        return Ok(Begin::Run);
    }

    match bus::tasks::head(bus, assignment).await? {
        Some(head) if head.has_result() => return Ok(Begin::Done),
        Some(head) if head.state == State::Cancelled => return Ok(Begin::Cancelled),
        // Only a bus that forgot a delivery calls this the first one.
        Some(head) if head.state == State::Running && counts_as_new => return Ok(Begin::Elsewhere(ACK_WAIT)),
        _ => {}
    }

    if counts_as_new {
        return Ok(if may_be_repeated {
            Begin::Elsewhere(AFTER_OUTAGE)
        } else {
            Begin::Run
        });
    }
    // No router may have recorded the result yet.
    let has_result = bus
        .seen(subjects::STREAM_RESULT, &msg_id(&assignment.assignment_id))
        .await?;
    let done = has_result || was_moved(bus, delivery, &assignment.assignment_id).await?;
    Ok(if done { Begin::Done } else { Begin::Run })
}

/// Whether nobody else can have had this assignment: it was made and stored just now.
fn is_new(assignment: &ExecAssignment, stored_ms: u64, now_ms: u64) -> bool {
    let made_ms = made_ms(&assignment.assignment_id);
    made_ms.is_some_and(|made_ms| made_ms.abs_diff(stored_ms) < NEW_MS) && now_ms.saturating_sub(stored_ms) < FRESH_MS
}

/// Waits until the other delivery of the same assignment is done in this worker. It was delivered again although its run
/// says that it is in progress, because the bus was away; or it was moved.
async fn wait_for(
    worker: &Worker,
    mut delivery: Delivery,
    assignment: &ExecAssignment,
    other: CancellationToken,
    give_up: &CancellationToken,
) -> bus::Result<()> {
    delivery.release();
    tokio::select! {
        () = other.cancelled() => {}
        () = give_up.cancelled() => return delivery.nak(Duration::ZERO).await,
    }
    match begin(worker, &delivery, assignment, false).await? {
        Begin::Done => delivery.ack().await,
        // The other one did not end with a result here.
        Begin::Run | Begin::Cancelled | Begin::Elsewhere(_) => delivery.nak(Duration::ZERO).await,
    }
}

/// Ends an assignment that was delivered too often. On the common subject, deliveries to workers without the provider
/// count, too, so it gets another chance on the provider's own.
async fn give_up_on(worker: &Worker, delivery: &Delivery, assignment: &ExecAssignment) -> bus::Result<()> {
    let own = subjects::assign_to(&assignment.executor.provider_id).filter(|own| worker.subjects.contains(own));
    let common = *delivery.message.subject == *subjects::ASSIGN;
    if let Some(own) = own.filter(|_| common && !is_moved(delivery)) {
        return move_to(&worker.bus, delivery, assignment, &own).await;
    }
    let text = format!("given up after {MAX_DELIVER} deliveries");
    fail(worker, delivery, assignment, "max_deliver", text).await
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
