//! Pushes tasks: a task is assigned once, however often its request arrives and whatever ends between the steps.
//!
//! The task's record is created first, with the assignment's id: it reserves the id. It is committed once the assignment
//! is known to be stored: at once on a bus whose batches are atomic, otherwise by the worker, by the result, or by the
//! router for tasks that stay open ([`crate::open`]). A client that repeats the request of a reserved task makes a router
//! append the same assignment again, and the stream drops it as a duplicate; it does so only while the stream surely
//! remembers the first one.

use crate::Router;
use crate::breakers::Place;
use crate::decide::Chosen;
use crate::intake::{Contract, Request};
use crate::keys::Reserved;
use bus::clock::unix_ms;
use bus::tasks::Record;
use bus::{Incomplete, Message, Write, Written};
use sha1::{Digest, Sha1};
use std::time::Instant;
use wire::json::JsonObject;
use wire::router::{
    Correlation, DecideRequest, Decision, ErrorBody, ExecAssignment, ExecOptions, Executor, IntakeCode, RouterCode,
    State, TaskState, VERSION, headers as x,
};
use wire::subjects;

/// The deadline of an assignment whose request sets none: this many times the expected latency, within these bounds
/// (contract).
const DEADLINE_FACTOR: u64 = 5;
const DEADLINE_MIN_MS: u64 = 5_000;
const DEADLINE_MAX_MS: u64 = 60_000;

/// A reserved task's assignment is appended again for this long: half of the stream's dedup window, so that clocks may
/// differ by the other half.
const REPEAT_MAX_MS: u64 = 1_800_000;

/// Stores the task and appends its assignment. Returns the task as recorded. For a repeated request that is the first
/// task with its first decision, whatever policies and breakers say by now; its record then also names where this client
/// receives the result. If the request's idempotency key is reserved, the task's answer is committed to it.
pub async fn push(router: &Router, request: &Request, key: Option<&Reserved>) -> Result<TaskState, ErrorBody> {
    match prepare(router, request) {
        Ok(prepared) => store(router, request, prepared, key).await,
        // A repeated request has its answer even if a new one would be refused.
        Err(refusal) => known(router, request).await?.ok_or(refusal),
    }
}

/// As [`push`], for a decision that was made before.
pub async fn store(
    router: &Router,
    request: &Request,
    prepared: Prepared<'_>,
    key: Option<&Reserved>,
) -> Result<TaskState, ErrorBody> {
    match begin(router, request, prepared, key).await {
        Ok(Some(task)) => Ok(task),
        Ok(None) => {
            let expired = || ErrorBody::new(RouterCode::Unavailable, "the task expired just now; try again");
            known(router, request).await?.ok_or_else(expired)
        }
        Err(refusal) => known(router, request).await?.ok_or(refusal),
    }
}

/// The task that this request pushed before. A conflict if a different request of the tenant has the same id.
async fn known(router: &Router, request: &Request) -> Result<Option<TaskState>, ErrorBody> {
    let found = bus::tasks::load(&router.bus, &request.tenant_id, &request.request_id)
        .await
        .map_err(unavailable)?;
    let Some(Record { mut task, .. }) = found else {
        return Ok(None);
    };

    if task.digest != digest(request) {
        let text = "a task of this request_id with another body exists; choose another request_id";
        return Err(ErrorBody::new(RouterCode::IdempotencyConflict, text));
    }

    if let (true, Some(decision), Some(id)) = (is_reserved(&task), &task.decision, &task.assignment_id) {
        repeat(router, request, &task, assignment(request, id.clone(), decision.clone())).await?;
    }

    if let Some(subject) = &request.result_subject {
        let told = crate::results::tell(&router.bus, task, subject).await;
        task = told.map_err(unavailable)?;
    }
    Ok(Some(task))
}

/// Whether the router that created the record may have ended before it appended the assignment. Records of the previous
/// version do not say when they were created, and count as committed.
fn is_reserved(task: &TaskState) -> bool {
    matches!(task.state, State::Queued | State::Assigned) && !task.committed && task.reserved_ms.is_some()
}

/// Appends the assignment of a reserved task again, unless it is too late for that.
async fn repeat(
    router: &Router,
    request: &Request,
    task: &TaskState,
    assignment: ExecAssignment,
) -> Result<(), ErrorBody> {
    // A record from the future was written under another clock, and may be of any age.
    let since = task.reserved_ms.unwrap_or_default();
    if unix_ms().abs_diff(since) > REPEAT_MAX_MS {
        let text = "it is not known whether the task's assignment was stored, and too late to store it again; \
            choose another request_id";
        return Err(ErrorBody::new(RouterCode::DeadlineExceeded, text));
    }

    write(router, request, None, &assignment, || None)
        .await
        .map_err(not_stored)?;
    router.open.add(task, Instant::now());
    Ok(())
}

/// A decision for a new task, with permission to call its provider. Nothing is stored yet.
pub struct Prepared<'a> {
    task: TaskState,
    assignment: ExecAssignment,
    place: Place<'a>,
}

/// Decides who runs a new task.
pub fn prepare<'a>(router: &'a Router, request: &Request) -> Result<Prepared<'a>, ErrorBody> {
    if let Some(refusal) = router.stores.refusal() {
        return Err(refusal);
    }

    let assignment_id = uuid::Uuid::now_v7().to_string();
    let Chosen { decision, choice, place } = router.decide(request, &assignment_id)?;
    let assignment = assignment(request, assignment_id.clone(), decision.clone());
    let task = TaskState {
        task_id: request.request_id.clone(),
        state: State::Assigned,
        decision: Some(decision),
        result: None,
        assignment_id: Some(assignment_id),
        tenant_id: request.tenant_id.clone(),
        digest: digest(request),
        choice: Some(choice),
        result_subjects: request.result_subject.iter().cloned().collect(),
        reserved_ms: (!router.bus.is_atomic()).then(unix_ms),
        committed: router.bus.is_atomic(),
    };
    Ok(Prepared { task, assignment, place })
}

/// Creates the task's record, appends its assignment and commits its key, in one batch. `None` if the task has a record
/// already, or the key an answer.
async fn begin(
    router: &Router,
    request: &Request,
    prepared: Prepared<'_>,
    key: Option<&Reserved>,
) -> Result<Option<TaskState>, ErrorBody> {
    let Prepared { task, assignment, place } = prepared;

    // The record comes first, because the result may arrive as soon as the assignment is appended. The key comes last:
    // until it is committed, its repeats look for the record.
    let commit = || key.and_then(|key| key.commit(&task));
    match write(router, request, Some(&task), &assignment, commit).await {
        Ok(revision) => {
            place.keep(assignment.options.deadline_ms, router.uptime_ms());
            if !task.committed {
                router.open.add(&task, Instant::now());
            }
            if let Some(revision) = revision {
                router.fresh.add(Record::written(task.clone(), revision));
            }
            Ok(Some(task))
        }
        Err(bus::Error::WrongRevision(_)) => Ok(None),
        Err(error) => Err(not_stored(error)),
    }
}

/// Creates the record of a new task and appends the assignment: to the subject that the request names, else to the
/// provider's if a live worker takes from it, else to the common one. Returns the revision of the record, if it was
/// created here.
async fn write(
    router: &Router,
    request: &Request,
    new: Option<&TaskState>,
    assignment: &ExecAssignment,
    commit: impl Fn() -> Option<Write<'static>>,
) -> bus::Result<Option<u64>> {
    let named = request.assignment_subject.as_deref();
    let own = subjects::assign_to(&assignment.executor.provider_id);
    let own = own.filter(|own| named.is_none() && router.fleet.listens(own, Instant::now()));
    let subject = own.as_deref().or(named).unwrap_or(subjects::ASSIGN);

    let create = || new.map(bus::tasks::create);
    let note = || bus::tasks::note_assignment(assignment);

    let mut writes = Vec::from_iter(create());
    // Only Beamline's own workers take from a provider's subject, and their results name the tenant.
    writes.extend(own.is_none().then(note));
    writes.push(append(request, assignment, subject));
    writes.extend(commit());
    let Incomplete { error, written } = match router.bus.write(writes).await {
        Ok(written) => return Ok(created(new, &written)),
        Err(incomplete) => incomplete,
    };
    if own.is_none() || !matches!(error, bus::Error::NoStream(_)) {
        return Err(error);
    }

    // An older process that declared the stream took the provider's subject away; its workers add it again. The record
    // is created again if that was undone.
    let mut writes = Vec::from_iter(written.is_empty().then(create).flatten());
    writes.push(note());
    writes.push(append(request, assignment, subjects::ASSIGN));
    writes.extend(commit());
    let written = [written, router.bus.write(writes).await?].concat();
    Ok(created(new, &written))
}

/// The revision of the new task's record, which is written first.
fn created(new: Option<&TaskState>, written: &[Written]) -> Option<u64> {
    match written.first() {
        Some(Written::Put { revision }) if new.is_some() => Some(*revision),
        _ => None,
    }
}

/// The write that appends the assignment to its stream.
fn append<'a>(request: &Request, assignment: &'a ExecAssignment, subject: &str) -> Write<'a> {
    let mut headers = request
        .v2_headers()
        .with("tenant_id", &request.tenant_id)
        .with("version", VERSION);
    if request.contract == Contract::V2 {
        headers.insert(x::MSG_ID, &assignment.assignment_id);
        headers.insert(x::ASSIGNMENT_ID, &assignment.assignment_id);
    }
    if let Some(trace_id) = &request.trace_id {
        headers.insert("trace_id", trace_id);
    }

    let payload = serde_json::to_vec(assignment)
        .expect("an assignment serializes to JSON")
        .into();
    Write::Append {
        message: Message { subject: subject.into(), reply: None, headers, payload },
        msg_id: Some(&assignment.assignment_id),
    }
}

pub fn unavailable(error: bus::Error) -> ErrorBody {
    if let bus::Error::Full(_) = error {
        return crate::stores::no_room(&error);
    }
    ErrorBody::new(RouterCode::Unavailable, format!("the assignment was not stored: {error}"))
}

fn not_stored(error: bus::Error) -> ErrorBody {
    match error {
        // A repeat would not make it smaller.
        bus::Error::TooLarge { size, max } => {
            let text = format!("the assignment has {size} bytes; the bus accepts at most {max}");
            ErrorBody::invalid(IntakeCode::PayloadTooLarge, text)
        }
        bus::Error::NoStream(subject) if subject != subjects::ASSIGN => {
            let text = format!("no worker has ever taken assignments from {subject}; correct assignment_subject");
            ErrorBody::new(RouterCode::NoProviderAvailable, text)
        }
        error => unavailable(error),
    }
}

fn assignment(request: &DecideRequest, assignment_id: String, decision: Decision) -> ExecAssignment {
    let options = request.options.clone().unwrap_or_default();
    let default_ms = decision
        .expected_latency_ms
        .saturating_mul(DEADLINE_FACTOR)
        .clamp(DEADLINE_MIN_MS, DEADLINE_MAX_MS);

    ExecAssignment {
        version: VERSION.into(),
        assignment_id,
        request_id: request.request_id.clone(),
        tenant_id: request.tenant_id.clone(),
        executor: Executor { provider_id: decision.provider_id.clone(), channel: "nats".into() },
        job: request.task.clone(),
        options: ExecOptions {
            priority: options.priority,
            deadline_ms: options.deadline_ms.unwrap_or(default_ms),
            retry: options.retry.unwrap_or_default(),
        },
        correlation: Correlation {
            trace_id: request.trace_id.clone(),
            result_subject: request.result_subject.clone(),
        },
        decision,
        metadata: request.metadata.clone(),
    }
}

/// A hash of what the client asked for. Fields that differ between repeats are left out. Every build of the router must
/// compute the same digest, because records outlive builds.
pub fn digest(request: &DecideRequest) -> String {
    let mut asked = DecideRequest { trace_id: None, deadline: None, result_subject: None, ..request.clone() };
    // The same body, however it was written: without spaces, and its keys in order.
    asked.task.payload = asked.task.payload.map(|payload| JsonObject::of(&payload.map()));
    let hash = Sha1::digest(serde_json::to_vec(&asked).expect("a request serializes to JSON"));
    hex::encode(hash)
}
