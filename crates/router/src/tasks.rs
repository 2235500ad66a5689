//! Pushed tasks: handed over once however often they are asked for, queried, cancelled.

use crate::Router;
use crate::decide::{Chosen, tenant_header};
use bus::tasks::Record;
use bus::{Bus, Incomplete, Message, Subscription, Write};
use sha1::{Digest, Sha1};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use wire::router::{
    Breakers, CancelRun, Context, Correlation, DEFAULT_TENANT, DecideRequest, Decision, ErrorBody, ErrorResponse,
    ExecAssignment, ExecOptions, Executor, RouterCode, State, StatusReply, TaskAnswer, TaskQuery, TaskState, VERSION,
};
use wire::subjects;

const QUEUE_MAX: usize = 1024;

/// Stores the task and appends its assignment. Returns the task that counts, which for a repeated request is the first
/// one, and its decision.
///
/// A known task keeps its decision, whatever policies and breakers say by now.
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

/// The task of this request, if it was pushed before; a conflict if another request of its tenant has its id.
async fn known(router: &Router, request: &DecideRequest) -> Result<Option<TaskState>, ErrorBody> {
    let found = bus::tasks::load(&router.bus, &request.tenant_id, &request.request_id)
        .await
        .map_err(unavailable)?;
    let Some(Record { task, .. }) = found else {
        return Ok(None);
    };
    if task.digest != digest(request) {
        let text = "a task of this request_id with another body exists; choose another request_id";
        return Err(ErrorBody::new(RouterCode::IdempotencyConflict, text));
    }

    // Whoever made the record may have ended before its assignment was appended.
    if let (false, Some(decision), Some(id)) = (task.state.is_final(), &task.decision, &task.assignment_id) {
        let assignment = assignment(request, id.clone(), decision.clone());
        let mut writes = Vec::from_iter(bus::tasks::note_assignment(&task));
        writes.push(append(request, &assignment));
        let written = router.bus.write(writes).await;
        written.map_err(|incomplete| unavailable(incomplete.error))?;
    }
    Ok(Some(task))
}

/// Decides, then makes the task's record and appends its assignment. `None`: the task has a record already.
///
/// The record holds the assignment's id. So if a router ends between the two writes, whoever repeats the request appends
/// the same assignment, which the stream takes once.
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
    };

    // The record comes first, because the result may come as soon as the assignment is there.
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

fn append<'a>(request: &DecideRequest, assignment: &'a ExecAssignment) -> Write<'a> {
    let mut headers = bus::Headers::new()
        .with("tenant_id", &request.tenant_id)
        .with("version", VERSION);
    if let Some(trace) = &request.trace_id {
        headers.insert("trace_id", trace);
    }
    let payload = serde_json::to_vec(assignment).expect("an assignment is JSON").into();
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
    let expected = decision.expected_latency_ms.saturating_mul(5).clamp(5_000, 60_000);
    ExecAssignment {
        version: VERSION.into(),
        assignment_id,
        request_id: request.request_id.clone(),
        tenant_id: request.tenant_id.clone(),
        executor: Executor { provider_id: decision.provider_id.clone(), channel: "nats".into() },
        job: request.task.clone(),
        options: ExecOptions {
            priority: options.priority,
            deadline_ms: options.deadline_ms.unwrap_or(expected),
            retry: options.retry.unwrap_or_default(),
        },
        correlation: Correlation { trace_id: request.trace_id.clone() },
        decision,
        metadata: request.metadata.clone(),
    }
}

/// Of what the caller asked for; ids that differ between tries are left out. Any build of the router makes the same one.
fn digest(request: &DecideRequest) -> String {
    let asked = DecideRequest { trace_id: None, deadline: None, ..request.clone() };
    let hash = Sha1::digest(serde_json::to_vec(&asked).expect("a request is JSON"));
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The subjects that ask about tasks and the router itself.
pub struct Queries {
    get: Subscription,
    cancel: Subscription,
    backpressure: Subscription,
    breakers: Subscription,
}

impl Queries {
    pub async fn subscribe(bus: &Bus) -> bus::Result<Self> {
        let group = Some(subjects::DECIDE_GROUP);
        Ok(Self {
            get: bus.subscribe(subjects::GET_DECISION, group, QUEUE_MAX).await?,
            cancel: bus.subscribe(subjects::CANCEL, group, QUEUE_MAX).await?,
            backpressure: bus.subscribe(subjects::BACKPRESSURE, group, QUEUE_MAX).await?,
            breakers: bus.subscribe(subjects::ADMIN_BREAKERS, group, QUEUE_MAX).await?,
        })
    }
}

pub async fn run(router: Arc<Router>, mut queries: Queries, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(message) = queries.get.next() => {
                let found = ask(&message, |asked| get(&router.bus, asked)).await;
                answer_with(&router, &message, found).await;
            }
            Some(message) = queries.cancel.next() => {
                let cancelled = ask(&message, |asked| cancel(&router.bus, asked)).await;
                answer_with(&router, &message, cancelled).await;
            }
            Some(message) = queries.backpressure.next() => answer(&router, &message, &crate::backpressure::measure(&router).await).await,
            Some(message) = queries.breakers.next() => {
                let breakers = Breakers { breakers: router.breakers.status(router.uptime_ms()) };
                answer(&router, &message, &StatusReply::from(Ok(breakers))).await;
            }
            else => return,
        }
    }
}

/// The task that a query is about.
struct Asked {
    tenant_id: String,
    request_id: String,
}

impl Asked {
    /// The header's tenant beats the payload's, as for a decide request.
    fn read(message: &Message) -> Result<Self, String> {
        let query: TaskQuery =
            serde_json::from_slice(&message.payload).map_err(|e| format!("the query does not fit: {e}"))?;
        let tenant_id = match tenant_header(&message.headers) {
            Some(tenant) => tenant.into(),
            None => query.tenant_id.unwrap_or_else(|| DEFAULT_TENANT.into()),
        };
        wire::id::check_tenant(&tenant_id).map_err(|e| format!("tenant_id {e}"))?;
        wire::id::check(&query.request_id).map_err(|e| format!("request_id {e}"))?;
        Ok(Self { tenant_id, request_id: query.request_id })
    }
}

async fn ask<F, R>(message: &Message, find: F) -> Result<TaskAnswer, ErrorResponse>
where
    F: FnOnce(Asked) -> R,
    R: Future<Output = bus::Result<Option<TaskState>>>,
{
    let refuse = |error: ErrorBody, request_id: Option<String>| {
        ErrorResponse::new(error, Context { request_id, trace_id: None })
    };
    let asked = Asked::read(message).map_err(|text| refuse(ErrorBody::new(RouterCode::InvalidRequest, text), None))?;
    let id = asked.request_id.clone();
    match find(asked).await {
        Ok(Some(mut task)) => {
            // Kept for the router itself.
            task.digest.clear();
            task.choice = None;
            Ok(TaskAnswer { ok: true, task })
        }
        Ok(None) => Err(refuse(ErrorBody::unknown_task(&id), Some(id))),
        Err(error) => Err(refuse(ErrorBody::new(RouterCode::Unavailable, error.to_string()), Some(id))),
    }
}

async fn answer_with(router: &Router, message: &Message, outcome: Result<TaskAnswer, ErrorResponse>) {
    match outcome {
        Ok(task) => answer(router, message, &task).await,
        Err(error) => answer(router, message, &error).await,
    }
}

/// Who names no inbox wants no answer; only decisions have a subject for that.
async fn answer(router: &Router, message: &Message, what: &impl serde::Serialize) {
    if let Some(inbox) = &message.reply {
        router.send(inbox.clone(), what).await;
    }
}

async fn get(bus: &Bus, asked: Asked) -> bus::Result<Option<TaskState>> {
    let record = bus::tasks::load(bus, &asked.tenant_id, &asked.request_id).await?;
    Ok(record.map(|record| record.task))
}

async fn cancel(bus: &Bus, asked: Asked) -> bus::Result<Option<TaskState>> {
    let Asked { tenant_id, request_id } = asked;
    let cancelled = bus::tasks::update(bus, &tenant_id, &request_id, |task| {
        if !task.state.is_final() {
            task.state = State::Cancelled;
        }
    })
    .await?;
    if let Some(task) = cancelled.as_ref().filter(|task| task.state == State::Cancelled) {
        let assignment_id = task.assignment_id.clone();
        let run = CancelRun { request_id, tenant_id: Some(tenant_id), assignment_id };
        let payload = serde_json::to_vec(&run).expect("a cancel is JSON").into();
        bus.publish(Message { subject: subjects::CONTROL_CANCEL.into(), payload, ..Message::default() })
            .await?;
    }
    Ok(cancelled)
}
