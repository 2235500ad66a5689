//! One request on its way: to the router, and for `wait` result and stream on to its end.

use crate::deadline::Deadline;
use crate::failure::Failure;
use crate::output::OutputReader;
use crate::session::Pieces;
use crate::waiters::{Finished, Waiter};
use crate::{Gateway, Peer};
use bus::Headers;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::{Duration, Instant};
use wire::ipc::{ErrorCode, ExchangeContext, FrameType, StreamComplete, TaskAnswer, TaskRef, TaskSubmit, Wait};
use wire::limits::IPC_FRAME_MAX;
use wire::router::{
    AnswerHead, Awaited, DEFAULT_TENANT, DecideRequest, ErrorBody, RequestOptions, Task, TaskQuery, TaskState, VERSION,
};
use wire::{subjects, trace};

/// Between looks at a task's record while its result is awaited: a result message that was missed (a reconnect, a full
/// queue, a task that had ended before) is found there.
const LOOK_FIRST: Duration = Duration::from_millis(250);
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// Output that the result announces but that has not come within this time was lost on the way.
const OUTPUT_GRACE: Duration = Duration::from_millis(500);
/// Output chunks that may wait for one reader.
const OUTPUT_QUEUE: usize = 4096;
/// What a frame of either version holds.
const PAYLOAD_MAX: usize = IPC_FRAME_MAX - wire::ipc::HEADER_V2;
/// Of the text of an error, where that quotes what it is about.
const TEXT_MAX: usize = 1024;

/// The frame that answers a request.
pub type Reply = (FrameType, Bytes);

/// What a client asked for.
pub enum Request {
    Submit(Box<TaskSubmit>),
    Query(TaskRef),
    Cancel(TaskRef),
    Subscribe(TaskRef),
}

impl Request {
    /// The request in a payload; the error names what does not fit.
    pub fn parse(kind: FrameType, payload: &[u8]) -> Result<Self, String> {
        Self::read(kind, payload).map_err(shortened)
    }

    fn read(kind: FrameType, payload: &[u8]) -> Result<Self, String> {
        let request = match kind {
            FrameType::TaskSubmit => Self::Submit(Box::new(object(payload)?)),
            FrameType::TaskQuery => Self::Query(object(payload)?),
            FrameType::TaskCancel => Self::Cancel(object(payload)?),
            FrameType::StreamSubscribe => Self::Subscribe(object(payload)?),
            other => unreachable!("{other:?} has no request in it"),
        };
        match &request {
            Self::Submit(submit) => check(submit)?,
            Self::Query(task) | Self::Cancel(task) | Self::Subscribe(task) => {
                id("task_id", &task.task_id)?;
                tenant(task.tenant_id.as_deref())?;
            }
        }
        Ok(request)
    }

    /// Answered by more than one frame.
    pub fn is_stream(&self) -> bool {
        matches!(self, Self::Subscribe(_)) || matches!(self, Self::Submit(submit) if submit.wait == Wait::Stream)
    }
}

fn object<T: DeserializeOwned>(payload: &[u8]) -> Result<T, String> {
    let text = std::str::from_utf8(payload).map_err(|e| format!("Payload is not UTF-8: {e}"))?;
    // An array would fit a struct too.
    if !text.trim_start().starts_with('{') {
        return Err("Payload is not a JSON object".into());
    }
    serde_json::from_str(text).map_err(|error| unfit::<T>(text, &error))
}

/// Read once more for the field's name, which serde_json alone does not tell.
fn unfit<T: DeserializeOwned>(text: &str, error: &serde_json::Error) -> String {
    let json = &mut serde_json::Deserializer::from_str(text);
    match serde_path_to_error::deserialize::<_, T>(json) {
        Err(at) if at.path().iter().next().is_some() && error.is_data() => {
            format!("Payload does not fit: {}: {error}", at.path())
        }
        _ => format!("Payload does not fit: {error}"),
    }
}

/// An error that repeated a whole payload, escaped, would be larger than a frame.
fn shortened(mut text: String) -> String {
    if text.len() > TEXT_MAX {
        text.truncate(text.floor_char_boundary(TEXT_MAX));
        text.push('…');
    }
    text
}

fn id(field: &str, value: &str) -> Result<(), String> {
    wire::id::check(value).map_err(|error| format!("{field} {error}"))
}

fn check(submit: &TaskSubmit) -> Result<(), String> {
    if submit.command != "task_submit" {
        return Err(format!("command is {:?}; TASK_SUBMIT carries \"task_submit\"", submit.command));
    }
    id("task_type", &submit.task_type)?;
    let optional =
        [("request_id", &submit.request_id), ("trace_id", &submit.trace_id), ("policy_id", &submit.policy_id)];
    for (field, value) in optional {
        if let Some(value) = value {
            id(field, value)?;
        }
    }
    tenant(submit.tenant_id.as_deref())
}

fn tenant(tenant_id: Option<&str>) -> Result<(), String> {
    match tenant_id {
        Some(tenant) => wire::id::check_tenant(tenant).map_err(|error| format!("tenant_id {error}")),
        None => Ok(()),
    }
}

/// A request in flight: what its errors name.
struct Exchange {
    gateway: Arc<Gateway>,
    peer: Peer,
    request_id: String,
    trace_id: String,
    /// W3C trace context, where the trace id has a form that fits it.
    traceparent: Option<String>,
    tenant_id: String,
    deadline: Deadline,
}

/// Carries the request out; the last frame of its answer.
pub async fn run(gateway: Arc<Gateway>, peer: Peer, request: Request, deadline: Deadline, pieces: Pieces) -> Reply {
    let started = Instant::now();
    let about = |task: &TaskRef| {
        let trace_id = new_trace_id();
        Exchange {
            gateway: gateway.clone(),
            peer,
            request_id: task.task_id.clone(),
            traceparent: trace::traceparent(&trace_id, rand::random()),
            trace_id,
            tenant_id: task.tenant_id.clone().unwrap_or_else(|| DEFAULT_TENANT.into()),
            deadline,
        }
    };
    let (exchange, outcome) = match request {
        Request::Submit(submit) => {
            let trace_id = trace_of(&submit);
            let given = submit
                .traceparent
                .clone()
                .filter(|parent| trace::trace_id_of(parent).is_some());
            let exchange = Exchange {
                gateway: gateway.clone(),
                peer,
                request_id: submit
                    .request_id
                    .clone()
                    .unwrap_or_else(|| uuid::Uuid::now_v7().to_string()),
                traceparent: given.or_else(|| trace::traceparent(&trace_id, rand::random())),
                trace_id,
                tenant_id: submit.tenant_id.clone().unwrap_or_else(|| DEFAULT_TENANT.into()),
                deadline,
            };
            let outcome = exchange.submit(submit, &pieces).await;
            (exchange, outcome)
        }
        Request::Query(task) => {
            let mut exchange = about(&task);
            let found = exchange.find(task.tenant_id).await;
            let outcome = found.and_then(|task| exchange.ok(task));
            (exchange, outcome)
        }
        Request::Cancel(task) => {
            let mut exchange = about(&task);
            let cancelled = Box::pin(exchange.cancel(task.tenant_id)).await;
            let outcome = cancelled.and_then(|task| exchange.ok(task));
            (exchange, outcome)
        }
        Request::Subscribe(task) => {
            let mut exchange = about(&task);
            let outcome = Box::pin(exchange.subscribe(task.tenant_id, &pieces)).await;
            (exchange, outcome)
        }
    };
    exchange.end(outcome, started)
}

impl Exchange {
    fn end(&self, outcome: Result<Reply, Failure>, started: Instant) -> Reply {
        let took = started.elapsed();
        self.gateway.stats.forwarded(took);
        let (request_id, trace_id, tenant_id) = (&self.request_id, &self.trace_id, &self.tenant_id);
        let took_us = took.as_micros() as u64;
        match outcome {
            Ok((kind, payload)) if payload.len() <= PAYLOAD_MAX => {
                tracing::debug!(trace_id, request_id, tenant_id, took_us, "answered");
                (kind, payload)
            }
            Ok((kind, payload)) => {
                let text = format!("The answer has {} bytes, more than a frame holds", payload.len());
                let failure = Failure::new(ErrorCode::FrameTooLarge, text);
                let in_stream = kind == FrameType::StreamComplete;
                self.failed(if in_stream { failure.in_stream() } else { failure }, took_us)
            }
            Err(failure) => self.failed(failure, took_us),
        }
    }

    fn failed(&self, failure: Failure, took_us: u64) -> Reply {
        let (code, in_stream) = (failure.code, failure.in_stream);
        let mut payload = failure.into_payload();
        self.gateway.stats.failed(code);
        let (request_id, trace_id, tenant_id) = (&self.request_id, &self.trace_id, &self.tenant_id);
        let error_code = code.name();
        payload.context = Some(ExchangeContext {
            request_id: Some(self.request_id.clone()),
            trace_id: Some(self.trace_id.clone()),
        });
        let mut bytes = payload.encode();
        if bytes.len() > PAYLOAD_MAX {
            // The router's: what it is called matters more than what it says.
            let error = &mut payload.error;
            error.details = None;
            error.message = shortened(std::mem::take(&mut error.message));
            error.reason = error.reason.take().map(shortened);
            bytes = payload.encode();
        }
        // What is wrong with a request repeats parts of it: that is for whoever sent it, not for the log.
        let reason = payload.error.reason.as_deref();
        let why = if reason == Some("invalid_request") {
            "the request is not valid"
        } else {
            &payload.error.message
        };
        tracing::info!(trace_id, request_id, tenant_id, error_code, reason, took_us, "refused: {why}");
        (
            if in_stream {
                FrameType::StreamError
            } else {
                FrameType::ResponseError
            },
            bytes.into(),
        )
    }

    async fn submit(&self, submit: Box<TaskSubmit>, pieces: &Pieces) -> Result<Reply, Failure> {
        self.permit(&self.tenant_id)?;
        self.is_in_time()?;
        let wait = submit.wait;
        tracing::info!(
            trace_id = self.trace_id,
            request_id = self.request_id,
            tenant_id = self.tenant_id,
            task_type = submit.task_type,
            ?wait,
            "taken"
        );
        // Both before the router hears of it, so that nothing comes too early.
        let waiter =
            (wait != Wait::Decision).then(|| Waiter::register(&self.gateway, &self.request_id, &self.tenant_id));
        let output = match wait {
            Wait::Stream => Some(self.output().await?),
            Wait::Decision | Wait::Result => None,
        };
        let decided = self.decide(submit).await?;
        let Some(waiter) = waiter else {
            return Ok((FrameType::ResponseOk, decided));
        };
        let assignment_id = serde_json::from_slice::<AnswerHead>(&decided)
            .ok()
            .and_then(|head| head.assignment_id);
        // Boxed: most requests wait for the decision alone and need no room for this.
        Box::pin(self.follow(waiter, assignment_id, output, pieces)).await
    }

    /// The router's answer, byte for byte, if it is a decision.
    async fn decide(&self, submit: Box<TaskSubmit>) -> Result<Bytes, Failure> {
        let headers = headers(Some(&self.trace_id), self.traceparent.as_deref(), Some(&self.tenant_id));
        let request = self.request(*submit)?;
        self.request_router(subjects::DECIDE, headers, request).await
    }

    fn request(&self, submit: TaskSubmit) -> Result<Vec<u8>, Failure> {
        let waits = submit.wait != Wait::Decision;
        let mut payload = Map::new();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                payload.insert(name.into(), value);
            }
        };
        put("file", submit.file.map(Value::from));
        put("line", submit.line.map(Value::from));
        put("context", submit.context);
        put("params", submit.params.map(Value::from));
        let request = DecideRequest {
            version: VERSION.into(),
            request_id: self.request_id.clone(),
            tenant_id: self.tenant_id.clone(),
            task: Task { task_type: submit.task_type, payload: Some(payload), payload_ref: None },
            policy_id: submit.policy_id,
            trace_id: Some(self.trace_id.clone()),
            constraints: None,
            metadata: None,
            push_assignment: waits || submit.push_assignment,
            assignment_subject: None,
            // Nobody waits longer, so nobody should work longer.
            options: self.deadline.own.filter(|_| waits).map(|own| RequestOptions {
                deadline_ms: Some(u64::try_from(own.as_millis()).unwrap_or(u64::MAX)),
                ..RequestOptions::default()
            }),
            run_id: None,
            flow_id: None,
            step_id: None,
            idempotency_key: submit.idempotency_key,
            deadline: None,
        };
        serde_json::to_vec(&request).map_err(|e| Failure::new(ErrorCode::Internal, e.to_string()))
    }

    async fn request_router(&self, subject: &str, headers: Headers, payload: Vec<u8>) -> Result<Bytes, Failure> {
        let gateway = &self.gateway;
        let due = self.deadline.at.min(Instant::now() + gateway.config().request_timeout);
        Ok(gateway
            .router
            .ask(&gateway.bus, subject, headers, payload.into(), due)
            .await?)
    }

    /// What waited for its turn for too long is not begun.
    fn is_in_time(&self) -> Result<(), Failure> {
        if Instant::now() < self.deadline.at {
            return Ok(());
        }
        Err(Failure::new(ErrorCode::Timeout, "The deadline passed before the request could begin"))
    }

    fn permit(&self, tenant_id: &str) -> Result<(), Failure> {
        if self.gateway.config().may_speak_for(self.peer.uid, tenant_id) {
            return Ok(());
        }
        let text =
            format!("User {} may not speak for tenant {tenant_id:?}; gateway.tenants says who may", self.peer.uid);
        Err(Failure::new(ErrorCode::Forbidden, text))
    }

    /// The task is looked for first: a router of the previous version stops a task by its id alone, whoever's it is.
    async fn cancel(&mut self, tenant: Option<String>) -> Result<TaskState, Failure> {
        self.find(tenant).await?;
        self.ask(subjects::CANCEL).await
    }

    /// The task of the tenant that the client names, else of the first one it speaks for that has a task of this id.
    async fn find(&mut self, named: Option<String>) -> Result<TaskState, Failure> {
        let tenants = match named {
            Some(tenant) => vec![tenant],
            None => self.gateway.config().tenants_of(self.peer.uid),
        };
        // Who speaks for nobody is told so, like whoever submits a task.
        self.permit(tenants.first().map_or(DEFAULT_TENANT, String::as_str))?;

        let mut found = Err(Failure::rejected(ErrorBody::unknown_task(&self.request_id)));
        for tenant in tenants {
            self.tenant_id = tenant;
            found = self.ask(subjects::GET_DECISION).await;
            if !found.as_ref().is_err_and(Failure::is_not_found) {
                break;
            }
        }
        found
    }

    /// The router's answer about this tenant's task.
    async fn ask(&self, subject: &str) -> Result<TaskState, Failure> {
        let query = TaskQuery { request_id: self.request_id.clone(), tenant_id: None };
        let query = serde_json::to_vec(&query).expect("a query is JSON");
        let headers = headers(Some(&self.trace_id), self.traceparent.as_deref(), Some(&self.tenant_id));
        let reply = self.request_router(subject, headers, query).await?;
        let answer: wire::router::TaskAnswer = serde_json::from_slice(&reply).map_err(|e| {
            Failure::new(ErrorCode::Internal, format!("The router's answer cannot be read: {}", wire::unfit(&e)))
        })?;
        // A router of the previous version answers for any tenant.
        if answer.task.tenant() != self.tenant_id {
            return Err(Failure::rejected(ErrorBody::unknown_task(&self.request_id)));
        }
        Ok(answer.task)
    }

    fn ok(&self, task: TaskState) -> Result<Reply, Failure> {
        let answer = TaskAnswer {
            task_id: task.task_id,
            state: task.state,
            decision: task.decision,
            result: task.result,
        };
        Ok((FrameType::ResponseOk, serde_json::to_vec(&answer).expect("an answer is JSON").into()))
    }

    async fn subscribe(&mut self, tenant: Option<String>, pieces: &Pieces) -> Result<Reply, Failure> {
        self.is_in_time()?;
        let waiter = Waiter::register(&self.gateway, &self.request_id, &self.tenant_id);
        let output = self.output().await?;
        let known = self.find(tenant).await?;
        match &known.result {
            Some(result) => self.complete(&Finished::from_result(result)),
            None => self.follow(waiter, known.assignment_id, Some(output), pieces).await,
        }
    }

    async fn output(&self) -> Result<bus::Subscription, Failure> {
        Ok(self
            .gateway
            .bus
            .subscribe(&subjects::output(&self.request_id), None, OUTPUT_QUEUE)
            .await?)
    }

    /// Passes the output on, if it is wanted, until the result is there.
    async fn follow(
        &self,
        mut waiter: Waiter,
        assignment_id: Option<String>,
        mut output: Option<bus::Subscription>,
        pieces: &Pieces,
    ) -> Result<Reply, Failure> {
        let task = Awaited { tenant_id: self.tenant_id.clone(), assignment_id };
        waiter.decided(&task);
        let mut reader = OutputReader::new(task);
        let mut look = Instant::now() + LOOK_FIRST;
        let streams = output.is_some();
        let fail = |failure: Failure| if streams { failure.in_stream() } else { failure };
        let finished = loop {
            tokio::select! {
                biased;
                Some(message) = next(&mut output) => {
                    if let Some(piece) = reader.take(&message.payload) {
                        self.pass(piece, pieces).await.map_err(fail)?;
                    }
                }
                finished = &mut waiter.finished => match finished {
                    Ok(finished) => break finished,
                    Err(_) => return Err(fail(Failure::new(ErrorCode::Internal, "The result went to nobody"))),
                },
                () = tokio::time::sleep_until(look.into()) => {
                    look += LOOK_AGAIN;
                    // An error here is no answer: the next look or the deadline decides.
                    match self.ask(subjects::GET_DECISION).await {
                        Ok(TaskState { result: Some(result), .. }) => break Finished::from_result(&result),
                        // A router of the previous version does not say it with the decision.
                        Ok(TaskState { assignment_id, .. }) if reader.task.assignment_id.is_none() => {
                            reader.task.assignment_id = assignment_id;
                            waiter.decided(&reader.task);
                        }
                        Ok(_) | Err(_) => {}
                    }
                }
                () = tokio::time::sleep_until(self.deadline.at.into()) => {
                    let text = "The deadline passed before the result; the task goes on and can be queried";
                    return Err(fail(Failure::new(ErrorCode::Timeout, text)));
                }
            }
        };
        if !streams {
            return Ok((FrameType::ResponseOk, finished.result));
        }
        let grace = tokio::time::sleep(OUTPUT_GRACE);
        let mut grace = std::pin::pin!(grace);
        while finished.chunks.is_some_and(|all| reader.next < all) {
            tokio::select! {
                // What has come is passed on, however long the client takes to read what came before it.
                biased;
                Some(message) = next(&mut output) => {
                    if let Some(piece) = reader.take(&message.payload) {
                        self.pass(piece, pieces).await.map_err(fail)?;
                    }
                }
                () = &mut grace => break,
            }
        }
        self.complete(&finished)
    }

    /// To the session, which takes pieces as fast as its client reads them.
    async fn pass(&self, piece: Reply, pieces: &Pieces) -> Result<(), Failure> {
        if piece.1.len() > PAYLOAD_MAX {
            let size = piece.1.len();
            let text = format!("A piece of output has {size} bytes, more than a frame holds; the task goes on");
            return Err(Failure::new(ErrorCode::FrameTooLarge, text));
        }
        let passed = tokio::time::timeout_at(self.deadline.at.into(), pieces.send(piece)).await;
        passed
            .map_err(|_| Failure::new(ErrorCode::Timeout, "The deadline passed before the client had read the output"))
    }

    fn complete(&self, finished: &Finished) -> Result<Reply, Failure> {
        let result = std::str::from_utf8(&finished.result).ok();
        let result = result.and_then(|text| serde_json::value::RawValue::from_string(text.into()).ok());
        let result = result.ok_or_else(|| Failure::new(ErrorCode::Internal, "The result is not JSON"))?;
        let complete = StreamComplete { task_id: self.request_id.clone(), result };
        Ok((FrameType::StreamComplete, serde_json::to_vec(&complete).expect("JSON").into()))
    }
}

async fn next(output: &mut Option<bus::Subscription>) -> Option<bus::Message> {
    match output {
        Some(output) => output.next().await,
        None => std::future::pending().await,
    }
}

/// What every message to the router says beside its payload.
pub fn headers(trace_id: Option<&str>, traceparent: Option<&str>, tenant_id: Option<&str>) -> Headers {
    let mut headers = Headers::new().with("version", VERSION);
    for (name, value) in [("trace_id", trace_id), ("tenant_id", tenant_id), ("traceparent", traceparent)] {
        if let Some(value) = value {
            headers.insert(name, value);
        }
    }
    headers
}

/// 32 hex digits.
pub fn new_trace_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// That of a well-formed `traceparent`, else `trace_id`, else a new one.
fn trace_of(submit: &TaskSubmit) -> String {
    let from_parent = submit.traceparent.as_deref().and_then(trace::trace_id_of);
    from_parent
        .map(String::from)
        .or_else(|| submit.trace_id.clone())
        .unwrap_or_else(new_trace_id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use bus::Message;

    #[test]
    fn what_does_not_fit_is_named() {
        for (field, payload) in [
            ("task_type", r#"{"command":"task_submit","task_type":5}"#),
            ("line", r#"{"command":"task_submit","task_type":"t","line":"a"}"#),
            ("params", r#"{"command":"task_submit","task_type":"t","params":[]}"#),
            ("wait", r#"{"command":"task_submit","task_type":"t","wait":"never"}"#),
            ("timeout_ms", r#"{"command":"task_submit","task_type":"t","timeout_ms":-1}"#),
            ("`task_type`", r#"{"command":"task_submit"}"#),
            ("`tenant_id`", r#"{"command":"task_submit","task_type":"t","tenant_id":"a","tenant_id":"b"}"#),
        ] {
            let error = Request::parse(FrameType::TaskSubmit, payload.as_bytes()).err().unwrap();
            assert!(error.starts_with("Payload does not fit: ") && error.contains(field), "{payload}: {error}");
        }
    }

    #[test]
    fn a_user_speaks_for_the_tenants_that_are_its_own() {
        let mut config = Config::default();
        let may = |config: &Config, uid, tenant| config.may_speak_for(uid, tenant);
        assert!(may(&config, 0, "acme") && may(&config, 1000, "default") && !may(&config, 1000, "acme"));
        config.tenants = [(1000, vec!["acme".into(), "beta".into()]), (1001, vec!["*".into()])].into();
        assert!(may(&config, 1000, "acme") && may(&config, 1000, "beta") && !may(&config, 1000, "default"));
        assert!(may(&config, 1001, "anything") && !may(&config, 1002, "default") && may(&config, 0, "acme"));
    }

    /// Tests run as root, who speaks for every tenant; so the peer is made up here.
    #[tokio::test]
    async fn a_task_of_another_tenant_is_answered_as_if_it_were_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let config = Config { socket: dir.path().join("s"), ..Config::default() };
        let gateway = crate::bind(config, bus.clone()).await.unwrap().gateway;
        let mut queries = bus.subscribe(subjects::GET_DECISION, None, 8).await.unwrap();
        let mut cancels = bus.subscribe(subjects::CANCEL, None, 8).await.unwrap();
        tokio::spawn(async move {
            loop {
                let (message, state) = tokio::select! {
                    Some(message) = queries.next() => (message, "assigned"),
                    Some(message) = cancels.next() => (message, "cancelled"),
                };
                let query: TaskQuery = serde_json::from_slice(&message.payload).unwrap();
                // As a router of the previous version answers: by the id, whoever asks.
                let task =
                    serde_json::json!({"task_id": query.request_id, "state": state, "tenant_id": query.request_id});
                let payload = serde_json::json!({"ok": true, "task": task}).to_string().into();
                bus.publish(Message { subject: message.reply.unwrap(), payload, ..Message::default() })
                    .await
                    .unwrap();
            }
        });
        let answer = async |uid: u32, named: Option<&str>, owner: &str, name: &str| {
            let task = TaskRef { command: None, task_id: owner.into(), tenant_id: named.map(String::from) };
            let request = match name {
                "query" => Request::Query(task),
                "cancel" => Request::Cancel(task),
                _ => Request::Subscribe(task),
            };
            let deadline = Deadline::of(&request, 0, &gateway.config());
            let (_, payload) = run(gateway.clone(), Peer { uid }, request, deadline, Pieces::nowhere()).await;
            let mut answer: Value = serde_json::from_slice(&payload).unwrap();
            answer["context"] = Value::Null;
            answer
        };
        for (uid, named, owner) in [(0, Some("acme"), "acme"), (0, None, "default"), (1000, None, "default")] {
            assert_eq!(answer(uid, named, owner, "query").await["state"], "assigned", "{uid} {named:?}");
            assert_eq!(answer(uid, named, owner, "cancel").await["state"], "cancelled", "{uid} {named:?}");
        }
        for name in ["query", "cancel", "subscribe"] {
            for (uid, named) in [(1000, None), (0, None), (0, Some("beta"))] {
                let unknown = serde_json::json!({"ok": false, "context": null, "error": {"code": 12, "status": 404,
                    "reason": "not_found", "message": "no task \"acme\" was pushed in the last day"}});
                assert_eq!(answer(uid, named, "acme", name).await, unknown, "{name} by {uid} for {named:?}");
            }
            let forbidden = answer(1000, Some("acme"), "acme", name).await;
            assert_eq!(
                forbidden["error"]["code"], 13,
                "{name}: what the settings say, not whether there is such a task"
            );
        }
    }

    #[test]
    fn who_names_no_tenant_asks_for_those_that_are_its_own() {
        let mut config = Config::default();
        assert_eq!((config.tenants_of(0), config.tenants_of(1000)), (vec!["default".into()], vec!["default".into()]));
        config.tenants = [(1000, vec!["acme".into(), "beta".into()]), (1001, vec!["acme".into(), "*".into()])].into();
        assert_eq!(config.tenants_of(0), ["default"]);
        assert_eq!(config.tenants_of(1000), ["acme", "beta"]);
        assert_eq!(config.tenants_of(1001), ["default", "acme"]);
        assert_eq!(config.tenants_of(1002), [""; 0]);
        config.tenants.insert(1003, vec!["acme".into(), "default".into()]);
        assert_eq!(config.tenants_of(1003), ["default", "acme"], "where its submits go");
    }
}
