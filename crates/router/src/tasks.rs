//! Pushed tasks: handed over once however often they are asked for, queried, cancelled.

use crate::Router;
use crate::decide::failure;
use crate::stats::now_ms;
use bus::{Bus, Message, Subscription};
use serde_json::json;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
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
pub async fn push(router: &Router, request: &DecideRequest, decision: Decision) -> Result<Decision, ErrorBody> {
    let unavailable = |e: bus::Error| failure("unavailable", format!("the assignment was not stored: {e}"));
    let fresh = TaskState {
        task_id: request.request_id.clone(),
        state: State::Assigned,
        decision: Some(decision),
        result: None,
        assignment_id: Some(uuid::Uuid::now_v7().to_string()),
        tenant_id: request.tenant_id.clone(),
        digest: digest(request),
    };
    let record = serde_json::to_vec(&fresh).expect("a task is JSON").into();
    let task = match router.bus.kv_put(subjects::BUCKET_TASKS, &request.request_id, record, Some(0)).await {
        Ok(_) => fresh,
        Err(bus::Error::WrongRevision(_)) => {
            let known = load(&router.bus, &request.request_id).await.map_err(unavailable)?;
            let (known, _) = known.ok_or_else(|| failure("unavailable", "the task expired just now; try again"))?;
            if known.tenant_id != fresh.tenant_id || known.digest != fresh.digest {
                let text = "a task of this request_id with another body exists; choose another request_id";
                return Err(failure("idempotency_conflict", text));
            }
            known
        }
        Err(error) => return Err(unavailable(error)),
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
        if !appended.duplicate {
            router.breakers.assigned(&decision.provider_id, now_ms());
        }
    }
    Ok(decision)
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

/// Of what the caller asked for; ids that differ between tries are left out.
fn digest(request: &DecideRequest) -> String {
    let asked = DecideRequest { trace_id: None, deadline: None, ..request.clone() };
    let mut hasher = DefaultHasher::new();
    serde_json::to_vec(&asked).unwrap_or_default().hash(&mut hasher);
    format!("{:016x}", hasher.finish())
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
                let answer = ask(&message, |id| async move { Ok(load(&bus, &id).await?.map(|(task, _)| task)) }).await;
                answer_with(&router, &message, answer).await;
            }
            Some(message) = queries.cancel.next() => {
                let answer = ask(&message, |id| cancel(&router, id)).await;
                answer_with(&router, &message, answer).await;
            }
            Some(message) = queries.backpressure.next() => router.reply(&message, &backpressure(&router).await).await,
            Some(message) = queries.breakers.next() => {
                router.reply(&message, &json!({"success": true, "data": {"breakers": router.breakers.status()}})).await;
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
    match find(id.clone()).await {
        Ok(Some(mut task)) => {
            // Kept for the router itself.
            task.digest.clear();
            Ok(TaskAnswer { ok: true, task })
        }
        Ok(None) => Err(refuse(failure("not_found", format!("no task {id:?} was pushed in the last day")), Some(id))),
        Err(error) => Err(refuse(failure("unavailable", error.to_string()), Some(id))),
    }
}

async fn answer_with(router: &Router, message: &Message, answer: Result<TaskAnswer, ErrorResponse>) {
    match answer {
        Ok(answer) => router.reply(message, &answer).await,
        Err(error) => router.reply(message, &error).await,
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

async fn backpressure(router: &Router) -> serde_json::Value {
    let pending = match router.bus.stream_info(subjects::STREAM_ASSIGN).await {
        Ok(info) => info.messages,
        Err(error) => return json!({"success": false, "error": error.to_string()}),
    };
    let in_flight = router.stats.in_flight.load(Relaxed);
    let p95_ms = router.stats.decide_us().p95 / 1000.0;
    let over = [pending >= 1000, p95_ms >= 5000.0, in_flight >= 500].into_iter().filter(|over| *over).count();
    let status = ["inactive", "warning", "active", "active"][over];
    json!({"success": true, "data": {
        "subject": subjects::DECIDE, "status": status,
        "metrics": {"pending_messages": pending, "latency_p95_ms": p95_ms, "inflight_messages": in_flight},
        "thresholds": {"queue_overload": 1000, "latency_overload_ms": 5000, "inflight_overload": 500},
        "policy": {"retry_after_seconds": 30, "max_retry_attempts": 3},
        "timestamp": now_ms(),
    }})
}
