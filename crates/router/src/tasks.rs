//! Pushed tasks: handed over once however often they are asked for, queried, cancelled.

use crate::Router;
use crate::breakers::Place;
use crate::decide::{Chosen, failure};
use bus::{Bus, Message, Subscription};
use serde_json::json;
use sha1::{Digest, Sha1};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use wire::router::{
    Context, Correlation, DecideRequest, Decision, ErrorBody, ErrorResponse, ExecAssignment, ExecOptions, Executor,
    State, TaskAnswer, TaskQuery, TaskState, VERSION,
};
use wire::subjects;

const QUEUE_MAX: usize = 1024;

/// Stores the task and appends its assignment; the decision that counts (the first one, for a repeated request).
///
/// The task's record is made first, with the assignment's id: whoever repeats the request after a crash appends the same
/// assignment, which the stream takes once.
/// A task that is known has its answer, whatever policies and breakers say by now.
pub async fn push(router: &Router, request: &DecideRequest) -> Result<Decision, ErrorBody> {
    let (task, place) = match known(router, request).await? {
        Some(task) => (task, None),
        None => begin(router, request).await?,
    };
    let decision = task.decision.clone().ok_or_else(|| failure("internal", "the task's record has no decision"))?;
    if !task.state.is_final() {
        let assignment = assignment(request, &task, decision.clone());
        let mut headers = bus::Headers::new().with("tenant_id", &request.tenant_id).with("version", VERSION);
        if let Some(trace) = &request.trace_id {
            headers.insert("trace_id", trace);
        }
        let payload = serde_json::to_vec(&assignment).expect("an assignment is JSON").into();
        let message = Message { subject: subjects::ASSIGN.into(), reply: None, headers, payload };
        let appended = router.bus.append(message, Some(&assignment.assignment_id)).await.map_err(unavailable)?;
        if let Some(place) = place.filter(|_| !appended.duplicate) {
            place.keep(assignment.options.deadline_ms, router.uptime_ms());
        }
    }
    Ok(decision)
}

fn unavailable(error: bus::Error) -> ErrorBody {
    failure("unavailable", format!("the assignment was not stored: {error}"))
}

/// The task of this request, if it was pushed before; a conflict if another request was.
async fn known(router: &Router, request: &DecideRequest) -> Result<Option<TaskState>, ErrorBody> {
    let Some((task, _)) = load(&router.bus, &request.request_id).await.map_err(unavailable)? else { return Ok(None) };
    if task.tenant_id != request.tenant_id || task.digest != digest(request) {
        let text = "a task of this request_id with another body exists; choose another request_id";
        return Err(failure("idempotency_conflict", text));
    }
    Ok(Some(task))
}

/// Decides and makes the task's record; of many at once the first one counts, and the others give their places back.
async fn begin<'a>(router: &'a Router, request: &DecideRequest) -> Result<(TaskState, Option<Place<'a>>), ErrorBody> {
    let assignment_id = uuid::Uuid::now_v7().to_string();
    let Chosen { decision, choice, place } = router.decide(request, &assignment_id)?;
    let fresh = TaskState {
        task_id: request.request_id.clone(),
        state: State::Assigned,
        decision: Some(decision),
        result: None,
        assignment_id: Some(assignment_id),
        tenant_id: request.tenant_id.clone(),
        digest: digest(request),
        choice: Some(choice),
    };
    let record = serde_json::to_vec(&fresh).expect("a task is JSON").into();
    match router.bus.kv_put(subjects::BUCKET_TASKS, &request.request_id, record, Some(0)).await {
        Ok(_) => Ok((fresh, Some(place))),
        Err(bus::Error::WrongRevision(_)) => {
            let task = known(router, request).await?;
            let task = task.ok_or_else(|| failure("unavailable", "the task expired just now; try again"))?;
            Ok((task, None))
        }
        Err(error) => Err(unavailable(error)),
    }
}

fn assignment(request: &DecideRequest, task: &TaskState, decision: Decision) -> ExecAssignment {
    let options = request.options.clone().unwrap_or_default();
    let expected = decision.expected_latency_ms.saturating_mul(5).clamp(5_000, 60_000);
    ExecAssignment {
        version: VERSION.into(),
        assignment_id: task.assignment_id.clone().unwrap_or_default(),
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

pub async fn load(bus: &Bus, request_id: &str) -> bus::Result<Option<(TaskState, u64)>> {
    let Some((bytes, revision)) = bus.kv_get(subjects::BUCKET_TASKS, request_id).await? else { return Ok(None) };
    let task = serde_json::from_slice(&bytes).map_err(|e| bus::Error::Storage(format!("task {request_id}: {e}")))?;
    Ok(Some((task, revision)))
}

/// Changes a task's record; tries again where another writer came between. `None`: there is no such task.
pub async fn update(bus: &Bus, request_id: &str, change: impl Fn(&mut TaskState)) -> bus::Result<Option<TaskState>> {
    for _ in 0..16 {
        let Some((mut task, revision)) = load(bus, request_id).await? else { return Ok(None) };
        change(&mut task);
        let record = serde_json::to_vec(&task).expect("a task is JSON").into();
        match bus.kv_put(subjects::BUCKET_TASKS, request_id, record, Some(revision)).await {
            Ok(_) => return Ok(Some(task)),
            Err(bus::Error::WrongRevision(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Err(bus::Error::WrongRevision(request_id.into()))
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
        let bus = router.bus.clone();
        tokio::select! {
            () = stop.cancelled() => return,
            Some(message) = queries.get.next() => {
                let found = ask(&message, |id| async move { Ok(load(&bus, &id).await?.map(|(task, _)| task)) }).await;
                answer_with(&router, &message, found).await;
            }
            Some(message) = queries.cancel.next() => {
                let cancelled = ask(&message, |id| cancel(&router, id)).await;
                answer_with(&router, &message, cancelled).await;
            }
            Some(message) = queries.backpressure.next() => answer(&router, &message, &crate::backpressure::measure(&router).await).await,
            Some(message) = queries.breakers.next() => {
                let breakers = json!({"success": true, "data": {"breakers": router.breakers.status(router.uptime_ms())}});
                answer(&router, &message, &breakers).await;
            }
            else => return,
        }
    }
}

async fn ask<F, R>(message: &Message, find: F) -> Result<TaskAnswer, ErrorResponse>
where
    F: FnOnce(String) -> R,
    R: Future<Output = bus::Result<Option<TaskState>>>,
{
    let refuse = |error: ErrorBody, request_id: Option<String>| ErrorResponse {
        ok: false,
        error,
        context: Context { request_id, trace_id: None },
    };
    let query: TaskQuery = serde_json::from_slice(&message.payload)
        .map_err(|e| refuse(failure("invalid_request", format!("the query does not fit: {e}")), None))?;
    let id = query.request_id;
    wire::id::check(&id).map_err(|e| refuse(failure("invalid_request", format!("request_id {e}")), None))?;
    match find(id.clone()).await {
        Ok(Some(mut task)) => {
            // Kept for the router itself.
            task.digest.clear();
            task.choice = None;
            Ok(TaskAnswer { ok: true, task })
        }
        Ok(None) => Err(refuse(failure("not_found", format!("no task {id:?} was pushed in the last day")), Some(id))),
        Err(error) => Err(refuse(failure("unavailable", error.to_string()), Some(id))),
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

async fn cancel(router: &Router, request_id: String) -> bus::Result<Option<TaskState>> {
    let cancelled = update(&router.bus, &request_id, |task| {
        if !task.state.is_final() {
            task.state = State::Cancelled;
        }
    })
    .await?;
    if cancelled.as_ref().is_some_and(|task| task.state == State::Cancelled) {
        let payload = serde_json::to_vec(&TaskQuery { request_id }).expect("a query is JSON").into();
        router.bus.publish(Message { subject: subjects::CONTROL_CANCEL.into(), payload, ..Message::default() }).await?;
    }
    Ok(cancelled)
}
