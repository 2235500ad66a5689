//! Pushes tasks: a task is assigned once, however often its request arrives and whatever ends between the steps.
//!
//! The task's record is created first, with the assignment's id. A client that repeats the request after a crash makes
//! a router append the same assignment again, and the stream drops it as a duplicate.

use crate::Router;
use crate::decide::Chosen;
use bus::tasks::Record;
use bus::{Incomplete, Message, Write};
use sha1::{Digest, Sha1};
use wire::json::JsonObject;
use wire::router::{
    Correlation, DecideRequest, Decision, ErrorBody, ExecAssignment, ExecOptions, Executor, RouterCode, State,
    TaskState, VERSION,
};
use wire::subjects;

/// The deadline of an assignment whose request sets none: this many times the expected latency, within these bounds
/// (contract).
const DEADLINE_FACTOR: u64 = 5;
const DEADLINE_MIN_MS: u64 = 5_000;
const DEADLINE_MAX_MS: u64 = 60_000;

/// Stores the task and appends its assignment. Returns the task as recorded, which for a repeated request is the first
/// one (also told where this client receives the result), and its decision: a known task keeps its decision, whatever policies and breakers say by now.
pub async fn push(router: &Router, request: &DecideRequest) -> Result<(TaskState, Decision), ErrorBody> {
    let task = match begin(router, request).await {
        Ok(Some(task)) => task,
        Ok(None) => known(router, request)
            .await?
            .ok_or_else(|| ErrorBody::new(RouterCode::Unavailable, "the task expired just now; try again"))?,
        // A repeated request has its answer even if a new one would be refused.
        Err(refusal) => known(router, request).await?.ok_or(refusal)?,
    };

    let decision = task.decision.clone();
    let decision = decision.ok_or_else(|| ErrorBody::new(RouterCode::Internal, "the task's record has no decision"))?;
    Ok((task, decision))
}

/// The task that this request pushed before. A conflict if a different request of the tenant has the same id.
async fn known(router: &Router, request: &DecideRequest) -> Result<Option<TaskState>, ErrorBody> {
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

    // The router that created the record may have ended before it appended the assignment. A task that runs has its
    // assignment; after the stream's dedup window a second append would store it again.
    let may_lack_assignment = matches!(task.state, State::Queued | State::Assigned);
    if let (true, Some(decision), Some(id)) = (may_lack_assignment, &task.decision, &task.assignment_id) {
        let assignment = assignment(request, id.clone(), decision.clone());
        let mut writes = Vec::from_iter(bus::tasks::note_assignment(&task));
        writes.push(append(request, &assignment));
        let written = router.bus.write(writes).await;
        written.map_err(|incomplete| unavailable(incomplete.error))?;
    }

    if let Some(subject) = &request.result_subject {
        let told = crate::results::tell(&router.bus, task, subject).await;
        task = told.map_err(unavailable)?;
    }
    Ok(Some(task))
}

/// Decides, then creates the task's record and appends its assignment in one batch. `None` if the task has a record
/// already.
async fn begin(router: &Router, request: &DecideRequest) -> Result<Option<TaskState>, ErrorBody> {
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
    };

    // The record comes first, because the result may arrive as soon as the assignment is appended.
    let mut writes = bus::tasks::create(&task);
    writes.push(append(request, &assignment));

    match router.bus.write(writes).await {
        Ok(_) => {
            place.keep(assignment.options.deadline_ms, router.uptime_ms());
            Ok(Some(task))
        }
        Err(Incomplete { error: bus::Error::WrongRevision(_), .. }) => Ok(None),
        Err(incomplete) => Err(unavailable(incomplete.error)),
    }
}

/// The write that appends the assignment to its stream.
fn append<'a>(request: &DecideRequest, assignment: &'a ExecAssignment) -> Write<'a> {
    let mut headers = bus::Headers::new()
        .with("tenant_id", &request.tenant_id)
        .with("version", VERSION);
    if let Some(trace_id) = &request.trace_id {
        headers.insert("trace_id", trace_id);
    }

    let payload = serde_json::to_vec(assignment)
        .expect("an assignment serializes to JSON")
        .into();
    Write::Append {
        message: Message { subject: subjects::ASSIGN.into(), reply: None, headers, payload },
        msg_id: Some(&assignment.assignment_id),
    }
}

fn unavailable(error: bus::Error) -> ErrorBody {
    ErrorBody::new(RouterCode::Unavailable, format!("the assignment was not stored: {error}"))
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
fn digest(request: &DecideRequest) -> String {
    let mut asked = DecideRequest { trace_id: None, deadline: None, result_subject: None, ..request.clone() };
    // The same body, however it was written: without spaces, and its keys in order.
    asked.task.payload = asked.task.payload.map(|payload| JsonObject::of(&payload.map()));
    let hash = Sha1::digest(serde_json::to_vec(&asked).expect("a request serializes to JSON"));
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}
