//! Answers queries: a task's state, a cancellation, the router's load and its breakers.
//! Queries about tasks and about the router have separate bounds ([`crate::desk`]).

use crate::Router;
use crate::desk::{Desk, Turn};
use bus::{Bus, Message, Subscription};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use wire::router::{
    Breakers, CancelRun, Context, DEFAULT_TENANT, ErrorBody, ErrorResponse, RouterCode, State, StatusReply, TaskAnswer,
    TaskQuery, TaskState,
};
use wire::{id, subjects};

/// Queries of one kind that wait in the subscription; the bus refuses more.
const QUEUE_MAX: usize = 1024;
/// Queries about tasks that read or write a record at the same time. A record may have several megabytes.
const TASKS_CONCURRENT: usize = 64;
/// Queries about the router itself that are answered at the same time.
const STATUS_CONCURRENT: usize = 16;
/// When to try again after a query got no turn.
const RETRY_AFTER_S: u64 = 1;

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

#[derive(Debug, Clone, Copy)]
enum Kind {
    Get,
    Cancel,
    Backpressure,
    Breakers,
}

/// Answers until cancelled, then finishes what the bus has delivered.
pub async fn run(router: Arc<Router>, queries: Queries, stop: CancellationToken) {
    let Queries { get, cancel, backpressure, breakers } = queries;
    let (tasks, status) = (Desk::new(TASKS_CONCURRENT), Desk::new(STATUS_CONCURRENT));
    let handler = |kind| {
        let router = router.clone();
        move |query, turn| handle(router.clone(), kind, query, turn)
    };
    tokio::join!(
        tasks.serve(get, &stop, handler(Kind::Get)),
        tasks.serve(cancel, &stop, handler(Kind::Cancel)),
        status.serve(backpressure, &stop, handler(Kind::Backpressure)),
        status.serve(breakers, &stop, handler(Kind::Breakers)),
    );
    tokio::join!(router.drain(tasks.into_tasks()), router.drain(status.into_tasks()));
}

async fn handle(router: Arc<Router>, kind: Kind, query: Message, turn: Turn) {
    match turn {
        Turn::Answer => answer(&router, kind, &query).await,
        Turn::Refuse => refuse(&router, kind, &query).await,
    }
}

async fn answer(router: &Router, kind: Kind, query: &Message) {
    match kind {
        Kind::Get => {
            let found = about_task(query, |asked| get(&router.bus, asked)).await;
            reply_about_task(router, query, found).await;
        }
        Kind::Cancel => {
            let cancelled = about_task(query, |asked| cancel(&router.bus, asked)).await;
            reply_about_task(router, query, cancelled).await;
        }
        Kind::Backpressure => {
            let status = crate::backpressure::status(router).await;
            reply(router, query, &status).await;
        }
        Kind::Breakers => {
            let breakers = Breakers { breakers: router.breakers.status(router.uptime_ms()) };
            reply(router, query, &StatusReply::from(Ok(breakers))).await;
        }
    }
}

/// Answers a query that gets no turn.
async fn refuse(router: &Router, kind: Kind, query: &Message) {
    let text = "the router answers too many queries; try again";
    match kind {
        Kind::Get | Kind::Cancel => {
            let request_id = Asked::read(query).ok().map(|asked| asked.request_id);
            let error = ErrorBody::new(RouterCode::Backpressure, text).retry_after(RETRY_AFTER_S);
            reply(router, query, &ErrorResponse::new(error, Context { request_id, trace_id: None })).await;
        }
        Kind::Backpressure | Kind::Breakers => reply(router, query, &StatusReply::<()>::from(Err(text.into()))).await,
    }
}

/// The task that a query is about.
struct Asked {
    tenant_id: String,
    request_id: String,
    result_subject: Option<String>,
}

impl Asked {
    /// The tenant of the header beats the payload's, as for a decide request.
    fn read(message: &Message) -> Result<Self, String> {
        let query: TaskQuery =
            serde_json::from_slice(&message.payload).map_err(|e| format!("the query does not fit: {e}"))?;
        let tenant_id = match crate::intake::tenant_header(&message.headers) {
            Some(tenant) => tenant.into(),
            None => query.tenant_id.unwrap_or_else(|| DEFAULT_TENANT.into()),
        };

        id::check_tenant(&tenant_id).map_err(|e| format!("tenant_id {e}"))?;
        id::check(&query.request_id).map_err(|e| format!("request_id {e}"))?;
        let result_subject = query.result_subject;
        if result_subject
            .as_ref()
            .is_some_and(|subject| !subjects::is_result_copy(subject))
        {
            return Err(crate::intake::RESULT_SUBJECT.into());
        }
        Ok(Self { tenant_id, request_id: query.request_id, result_subject })
    }
}

/// Reads the query in `message` and answers it with the task that `find` returns.
async fn about_task<F, R>(message: &Message, find: F) -> Result<TaskAnswer, ErrorResponse>
where
    F: FnOnce(Asked) -> R,
    R: Future<Output = bus::Result<Option<TaskState>>>,
{
    let refuse = |error: ErrorBody, request_id: Option<String>| {
        ErrorResponse::new(error, Context { request_id, trace_id: None })
    };
    let asked = Asked::read(message).map_err(|text| refuse(ErrorBody::new(RouterCode::InvalidRequest, text), None))?;

    let (id, result_subject) = (asked.request_id.clone(), asked.result_subject.clone());
    match find(asked).await {
        Ok(Some(task)) => {
            let result_subject = result_subject.filter(|subject| task.will_tell(subject));
            Ok(TaskAnswer { ok: true, task: task.public(), result_subject })
        }
        Ok(None) => Err(refuse(ErrorBody::unknown_task(&id), Some(id))),
        Err(error) => Err(refuse(ErrorBody::new(RouterCode::Unavailable, error.to_string()), Some(id))),
    }
}

async fn get(bus: &Bus, asked: Asked) -> bus::Result<Option<TaskState>> {
    let record = bus::tasks::load(bus, &asked.tenant_id, &asked.request_id).await?;
    let task = record.map(|record| record.task);
    match (task, asked.result_subject) {
        (Some(task), Some(subject)) => crate::results::tell(bus, task, &subject).await.map(Some),
        (task, _) => Ok(task),
    }
}

/// Makes the task's record `cancelled` unless it is final, then tells the workers to stop the run.
async fn cancel(bus: &Bus, asked: Asked) -> bus::Result<Option<TaskState>> {
    let Asked { tenant_id, request_id, .. } = asked;
    let cancelled = bus::tasks::update(bus, &tenant_id, &request_id, |task| {
        if !task.state.is_final() {
            task.state = State::Cancelled;
        }
    })
    .await?;

    // Also when it was cancelled before: the worker may have missed the first message.
    if let Some(task) = cancelled.as_ref().filter(|task| task.state == State::Cancelled) {
        let assignment_id = task.assignment_id.clone();
        let run = CancelRun { request_id, tenant_id: Some(tenant_id), assignment_id };
        let payload = serde_json::to_vec(&run)
            .expect("a cancellation serializes to JSON")
            .into();
        let message = Message { subject: subjects::CONTROL_CANCEL.into(), payload, ..Message::default() };
        bus.publish(message).await?;
    }
    Ok(cancelled)
}

async fn reply_about_task(router: &Router, message: &Message, outcome: Result<TaskAnswer, ErrorResponse>) {
    match outcome {
        Ok(task) => reply(router, message, &task).await,
        Err(error) => reply(router, message, &error).await,
    }
}

/// A query without an inbox gets no answer; only decide requests have a subject for that.
async fn reply(router: &Router, message: &Message, answer: &impl serde::Serialize) {
    if let Some(inbox) = &message.reply {
        router.send(inbox.clone(), answer).await;
    }
}
