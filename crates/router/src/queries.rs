//! Answers queries: a task's state, a cancellation, the router's load, and what operators ask ([`crate::admin`]).
//! Queries about tasks and about the router have separate bounds ([`crate::desk`]).

use crate::Router;
use crate::desk::{Desk, Turn};
use crate::intake::Contract;
use crate::services::Endpoint;
use bus::{Bus, Headers, Message, Subscription};
use std::sync::Arc;
use std::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::json::Json;
use wire::router::{
    CancelRun, Context, DEFAULT_TENANT, ErrorBody, ErrorResponse, IntakeCode, RouterCode, State, StatusReply,
    TaskAnswer, TaskQuery, TaskState,
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

const ABOUT_TASKS: [Endpoint; 2] = [Endpoint::GetDecision, Endpoint::Cancel];
const ABOUT_THE_ROUTER: [Endpoint; 6] = [
    Endpoint::Backpressure,
    Endpoint::BackpressureV2,
    Endpoint::Breakers,
    Endpoint::Extensions,
    Endpoint::DryRun,
    Endpoint::Complexity,
];

pub struct Queries(Vec<(Endpoint, Subscription)>);

impl Queries {
    pub async fn subscribe(bus: &Bus) -> bus::Result<Self> {
        let mut queries = Vec::new();
        for endpoint in ABOUT_TASKS.into_iter().chain(ABOUT_THE_ROUTER) {
            let subscription = bus.subscribe(endpoint.subject(), Some(subjects::DECIDE_GROUP), QUEUE_MAX);
            queries.push((endpoint, subscription.await?));
        }
        Ok(Self(queries))
    }
}

/// Answers until cancelled, then finishes what the bus has delivered.
pub async fn run(router: Arc<Router>, queries: Queries, stop: CancellationToken) {
    let (tasks, status) = (Desk::new(TASKS_CONCURRENT), Desk::new(STATUS_CONCURRENT));
    let serving = queries.0.into_iter().map(|(endpoint, subscription)| {
        let desk = if ABOUT_TASKS.contains(&endpoint) {
            &tasks
        } else {
            &status
        };
        let router = router.clone();
        desk.serve(subscription, &stop, move |query, turn| handle(router.clone(), endpoint, query, turn))
    });
    futures_util::future::join_all(serving).await;
    tokio::join!(router.drain(tasks.into_tasks()), router.drain(status.into_tasks()));
}

async fn handle(router: Arc<Router>, endpoint: Endpoint, query: Message, turn: Turn) {
    let started = Instant::now();
    let answered = match turn {
        Turn::Answer => answer(&router, endpoint, &query).await,
        Turn::Refuse => Err(Refusal::busy(endpoint, &query)),
    };

    let code = answered.as_ref().err().map(|refusal| refusal.code.clone());
    router.answered.add(endpoint, started.elapsed(), code.as_ref());
    // A query without an inbox gets no answer; only decide requests have a subject for that.
    if let Some(inbox) = query.reply {
        let answer = answered.unwrap_or_else(|refusal| refusal.answer);
        router.send(inbox, Headers::new(), &answer).await;
    }
}

/// An answer that is an error.
struct Refusal {
    code: RouterCode,
    answer: Json,
}

impl Refusal {
    fn new(error: ErrorBody, request_id: Option<String>) -> Self {
        let code = error.code.clone();
        let answer = Json::of(&ErrorResponse::new(error, Context { request_id, trace_id: None }));
        Self { code, answer }
    }

    /// The load is not known. Its form of errors is older than the other one.
    fn no_load(code: RouterCode, why: String) -> Self {
        Self { code, answer: Json::of(&StatusReply::<()>::from(Err(why))) }
    }

    /// The query gets no turn.
    fn busy(endpoint: Endpoint, query: &Message) -> Self {
        let text = "the router answers too many queries; try again";
        if matches!(endpoint, Endpoint::Backpressure | Endpoint::BackpressureV2) {
            return Self::no_load(RouterCode::Backpressure, text.into());
        }
        let asked = Asked::read(query).ok().filter(|_| ABOUT_TASKS.contains(&endpoint));
        let error = ErrorBody::new(RouterCode::Backpressure, text).retry_after(RETRY_AFTER_S);
        Self::new(error, asked.map(|asked| asked.request_id))
    }
}

async fn answer(router: &Router, endpoint: Endpoint, query: &Message) -> Result<Json, Refusal> {
    match endpoint {
        Endpoint::GetDecision => about_task(query, |asked| get(&router.bus, asked)).await,
        Endpoint::Cancel => about_task(query, |asked| cancel(&router.bus, asked)).await,
        Endpoint::Backpressure => load(router, Contract::V1).await,
        Endpoint::BackpressureV2 => load(router, Contract::V2).await,
        _ => crate::admin::answer(router, endpoint, query).map_err(|error| Refusal::new(error, None)),
    }
}

async fn load(router: &Router, contract: Contract) -> Result<Json, Refusal> {
    let load = crate::backpressure::load(router, contract.endpoint().subject()).await;
    let load = load.map_err(|error| Refusal::no_load(RouterCode::Unavailable, error.to_string()))?;
    Ok(Json::of(&StatusReply::from(Ok(load))))
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
async fn about_task<F, R>(message: &Message, find: F) -> Result<Json, Refusal>
where
    F: FnOnce(Asked) -> R,
    R: Future<Output = bus::Result<Option<TaskState>>>,
{
    let unfit = |text| Refusal::new(ErrorBody::invalid(IntakeCode::SchemaValidationFailed, text), None);
    let asked = Asked::read(message).map_err(unfit)?;

    let (id, result_subject) = (asked.request_id.clone(), asked.result_subject.clone());
    match find(asked).await {
        Ok(Some(task)) => {
            let result_subject = result_subject.filter(|subject| task.will_tell(subject));
            Ok(Json::of(&TaskAnswer { ok: true, task: task.public(), result_subject }))
        }
        Ok(None) => Err(Refusal::new(ErrorBody::unknown_task(&id), Some(id))),
        Err(error) => Err(Refusal::new(ErrorBody::new(RouterCode::Unavailable, error.to_string()), Some(id))),
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
