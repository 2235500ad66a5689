//! One request on its way: to the router, and for `wait` result and stream on to its end.

use crate::failure::Failure;
use crate::session::Pieces;
use crate::waiters::{Finished, Waiter};
use crate::{Gateway, Peer};
use bus::Headers;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::{Duration, Instant};
use wire::ipc::{
    ErrorCode, ExchangeContext, FrameType, StreamComplete, StreamData, TaskAnswer, TaskRef, TaskSubmit, Wait,
};
use wire::limits::{ID_MAX, IPC_FRAME_MAX};
use wire::router::{DecideRequest, OutputChunk, RequestOptions, Task, TaskQuery, TaskState, VERSION};
use wire::subjects;

pub const DEFAULT_TENANT: &str = "default";

/// An assignment may take this long at most (contract: its deadline is clamped to 60 s).
const RESULT_MAX: Duration = Duration::from_secs(60);
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
            Self::Query(task) | Self::Cancel(task) | Self::Subscribe(task) => id("task_id", &task.task_id)?,
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
    match &submit.tenant_id {
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
    deadline: Instant,
}

/// Carries the request out; the last frame of its answer.
pub async fn run(gateway: Arc<Gateway>, peer: Peer, request: Request, deadline_ms: u32, pieces: Pieces) -> Reply {
    let started = Instant::now();
    let own = (deadline_ms > 0).then(|| Duration::from_millis(deadline_ms.into()));
    let request_timeout = gateway.config().request_timeout;
    let new = |task: TaskRef, timeout: Duration| {
        let trace_id = new_trace_id();
        Exchange {
            gateway: gateway.clone(),
            peer,
            request_id: task.task_id,
            traceparent: traceparent(&trace_id),
            trace_id,
            tenant_id: DEFAULT_TENANT.into(),
            deadline: started + own.unwrap_or(timeout),
        }
    };
    let (exchange, outcome) = match request {
        Request::Submit(submit) => {
            let own = own.or(submit.timeout_ms.map(Duration::from_millis));
            let default = if submit.wait == Wait::Decision { request_timeout } else { request_timeout + RESULT_MAX };
            let trace_id = trace_of(&submit);
            let given = submit.traceparent.clone().filter(|parent| trace_of_parent(parent).is_some());
            let exchange = Exchange {
                gateway: gateway.clone(),
                peer,
                request_id: submit.request_id.clone().unwrap_or_else(|| uuid::Uuid::now_v7().to_string()),
                traceparent: given.or_else(|| traceparent(&trace_id)),
                trace_id,
                tenant_id: submit.tenant_id.clone().unwrap_or_else(|| DEFAULT_TENANT.into()),
                deadline: started + own.unwrap_or(default),
            };
            let outcome = exchange.submit(submit, own, &pieces).await;
            (exchange, outcome)
        }
        Request::Query(task) => {
            let exchange = new(task, request_timeout);
            let outcome = exchange.ask(subjects::GET_DECISION, None).await.and_then(|task| exchange.ok(task));
            (exchange, outcome)
        }
        Request::Cancel(task) => {
            let exchange = new(task, request_timeout);
            let outcome = Box::pin(exchange.cancel()).await.and_then(|task| exchange.ok(task));
            (exchange, outcome)
        }
        Request::Subscribe(task) => {
            let exchange = new(task, request_timeout + RESULT_MAX);
            let outcome = Box::pin(exchange.subscribe(&pieces)).await;
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
        let Failure { mut payload, code, in_stream } = failure;
        self.gateway.stats.failed(code);
        let (request_id, trace_id, tenant_id) = (&self.request_id, &self.trace_id, &self.tenant_id);
        let error_code = code.name();
        payload.context =
            Some(ExchangeContext { request_id: Some(self.request_id.clone()), trace_id: Some(self.trace_id.clone()) });
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
        let why = if reason == Some("invalid_request") { "the request is not valid" } else { &payload.error.message };
        tracing::info!(trace_id, request_id, tenant_id, error_code, reason, took_us, "refused: {why}");
        (if in_stream { FrameType::StreamError } else { FrameType::ResponseError }, bytes.into())
    }

    async fn submit(
        &self,
        submit: Box<TaskSubmit>,
        own_deadline: Option<Duration>,
        pieces: &Pieces,
    ) -> Result<Reply, Failure> {
        self.permit(&self.tenant_id)?;
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
        let waiter = (wait != Wait::Decision).then(|| Waiter::register(&self.gateway, &self.request_id));
        let output = match wait {
            Wait::Stream => Some(self.output().await?),
            Wait::Decision | Wait::Result => None,
        };
        let decided = self.decide(submit, own_deadline).await?;
        match waiter {
            None => Ok((FrameType::ResponseOk, decided)),
            // Boxed: most requests wait for the decision alone and need no room for this.
            Some(waiter) => Box::pin(self.follow(waiter, &self.tenant_id, output, pieces)).await,
        }
    }

    /// The router's answer, byte for byte, if it is a decision.
    async fn decide(&self, submit: Box<TaskSubmit>, own_deadline: Option<Duration>) -> Result<Bytes, Failure> {
        let headers = headers(Some(&self.trace_id), self.traceparent.as_deref(), Some(&self.tenant_id));
        let request = self.request(*submit, own_deadline)?;
        self.request_router(subjects::DECIDE, headers, request).await
    }

    fn request(&self, submit: TaskSubmit, own_deadline: Option<Duration>) -> Result<Vec<u8>, Failure> {
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
            options: own_deadline.filter(|_| waits).map(|own| RequestOptions {
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
        let due = self.deadline.min(Instant::now() + gateway.config().request_timeout);
        Ok(gateway.router.ask(&gateway.bus, subject, headers, payload.into(), due).await?)
    }

    fn permit(&self, tenant_id: &str) -> Result<(), Failure> {
        if self.gateway.config().may_speak_for(self.peer.uid, tenant_id) {
            return Ok(());
        }
        let text =
            format!("User {} may not speak for tenant {tenant_id:?}; gateway.tenants says who may", self.peer.uid);
        Err(Failure::new(ErrorCode::Forbidden, text))
    }

    /// Whose task it is must be known before it is stopped.
    async fn cancel(&self) -> Result<TaskState, Failure> {
        let task = self.ask(subjects::GET_DECISION, None).await?;
        self.ask(subjects::CANCEL, Some(tenant_of(&task))).await
    }

    /// Where the task stands, if the peer may know it; `tenant` where it is known already whose it is.
    async fn ask(&self, subject: &str, tenant: Option<&str>) -> Result<TaskState, Failure> {
        let query = TaskQuery { request_id: self.request_id.clone() };
        let query = serde_json::to_vec(&query).expect("a query is JSON");
        let headers = headers(Some(&self.trace_id), self.traceparent.as_deref(), tenant);
        let reply = self.request_router(subject, headers, query).await?;
        let answer: wire::router::TaskAnswer = serde_json::from_slice(&reply).map_err(|e| {
            Failure::new(ErrorCode::Internal, format!("The router's answer cannot be read: {}", wire::unfit(&e)))
        })?;
        self.permit(tenant_of(&answer.task))?;
        Ok(answer.task)
    }

    fn ok(&self, task: TaskState) -> Result<Reply, Failure> {
        let answer =
            TaskAnswer { task_id: task.task_id, state: task.state, decision: task.decision, result: task.result };
        Ok((FrameType::ResponseOk, serde_json::to_vec(&answer).expect("an answer is JSON").into()))
    }

    async fn subscribe(&self, pieces: &Pieces) -> Result<Reply, Failure> {
        let waiter = Waiter::register(&self.gateway, &self.request_id);
        let output = self.output().await?;
        let known = self.ask(subjects::GET_DECISION, None).await?;
        match &known.result {
            Some(result) => self.complete(&Finished::from_result(result)),
            None => self.follow(waiter, tenant_of(&known), Some(output), pieces).await,
        }
    }

    async fn output(&self) -> Result<bus::Subscription, Failure> {
        Ok(self.gateway.bus.subscribe(&subjects::output(&self.request_id), None, OUTPUT_QUEUE).await?)
    }

    /// Passes the output on, if it is wanted, until the result is there.
    async fn follow(
        &self,
        mut waiter: Waiter,
        tenant: &str,
        mut output: Option<bus::Subscription>,
        pieces: &Pieces,
    ) -> Result<Reply, Failure> {
        let mut reader = OutputReader::default();
        let mut look = Instant::now() + LOOK_FIRST;
        let streams = output.is_some();
        let fail = |failure: Failure| if streams { failure.in_stream() } else { failure };
        let finished = loop {
            tokio::select! {
                biased;
                Some(message) = next(&mut output) => {
                    if let Some(piece) = reader.take(&message.payload) {
                        pass(piece, pieces).await.map_err(fail)?;
                    }
                }
                finished = &mut waiter.finished => match finished {
                    Ok(finished) => break finished,
                    Err(_) => return Err(fail(Failure::new(ErrorCode::Internal, "The result went to nobody"))),
                },
                () = tokio::time::sleep_until(look.into()) => {
                    look += LOOK_AGAIN;
                    // An error here is no answer: the next look or the deadline decides.
                    let task = self.ask(subjects::GET_DECISION, Some(tenant)).await;
                    if let Ok(TaskState { result: Some(result), .. }) = task {
                        break Finished::from_result(&result);
                    }
                }
                () = tokio::time::sleep_until(self.deadline.into()) => {
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
                        pass(piece, pieces).await.map_err(fail)?;
                    }
                }
                () = &mut grace => break,
            }
        }
        self.complete(&finished)
    }

    fn complete(&self, finished: &Finished) -> Result<Reply, Failure> {
        let result = std::str::from_utf8(&finished.result).ok();
        let result = result.and_then(|text| serde_json::value::RawValue::from_string(text.into()).ok());
        let result = result.ok_or_else(|| Failure::new(ErrorCode::Internal, "The result is not JSON"))?;
        let complete = StreamComplete { task_id: self.request_id.clone(), result };
        Ok((FrameType::StreamComplete, serde_json::to_vec(&complete).expect("JSON").into()))
    }
}

/// To the session, which takes pieces as fast as its client does.
async fn pass(piece: Reply, pieces: &Pieces) -> Result<(), Failure> {
    if piece.1.len() > PAYLOAD_MAX {
        let text = format!("A piece of output has {} bytes, more than a frame holds; the task goes on", piece.1.len());
        return Err(Failure::new(ErrorCode::FrameTooLarge, text));
    }
    pieces.send(piece).await;
    Ok(())
}

async fn next(output: &mut Option<bus::Subscription>) -> Option<bus::Message> {
    match output {
        Some(output) => output.next().await,
        None => std::future::pending().await,
    }
}

/// Output in order, of the newest attempt: when a worker starts again, `seq` starts at 0 again.
#[derive(Default)]
struct OutputReader {
    attempt: u32,
    next: u64,
}

impl OutputReader {
    fn take(&mut self, payload: &[u8]) -> Option<Reply> {
        let chunk: OutputChunk = serde_json::from_slice(payload).ok()?;
        if chunk.attempt < self.attempt || (chunk.attempt == self.attempt && chunk.seq < self.next) {
            return None;
        }
        (self.attempt, self.next) = (chunk.attempt, chunk.seq + 1);
        let data = StreamData { task_id: chunk.request_id, seq: chunk.seq, data: chunk.data };
        Some((FrameType::StreamData, serde_json::to_vec(&data).expect("JSON").into()))
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

fn tenant_of(task: &TaskState) -> &str {
    if task.tenant_id.is_empty() { DEFAULT_TENANT } else { &task.tenant_id }
}

/// 32 hex digits.
pub fn new_trace_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// That of a well-formed `traceparent`, else `trace_id`, else a new one.
fn trace_of(submit: &TaskSubmit) -> String {
    let from_parent = submit.traceparent.as_deref().and_then(trace_of_parent);
    from_parent.map(String::from).or_else(|| submit.trace_id.clone()).unwrap_or_else(new_trace_id)
}

/// W3C: `version-trace-span-flags`, in hex; later versions may add fields. Any other is as good as none.
pub fn trace_of_parent(parent: &str) -> Option<&str> {
    let fields: Vec<&str> = parent.splitn(5, '-').collect();
    let hex = |field: &str, length| field.len() == length && field.bytes().all(|b| b.is_ascii_hexdigit());
    // Ids of zeros and version ff are reserved for what is not valid.
    let id = |field: &str, length| hex(field, length) && field.bytes().any(|b| b != b'0');
    match fields[..] {
        [version, trace, span, flags, ..]
            if parent.len() <= ID_MAX
                && hex(version, 2)
                && version != "ff"
                && id(trace, 32)
                && id(span, 16)
                && hex(flags, 2) =>
        {
            Some(trace)
        }
        _ => None,
    }
}

/// W3C trace context, where the trace id has a form that fits it.
pub fn traceparent(trace_id: &str) -> Option<String> {
    let trace = uuid::Uuid::try_parse(trace_id).ok()?.simple().to_string();
    let span = &uuid::Uuid::new_v4().simple().to_string()[..16];
    Some(format!("00-{trace}-{span}-01"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bus::Message;

    #[test]
    fn only_a_whole_traceparent_counts() {
        let trace = "0af7651916cd43dd8448eb211c80319c";
        for (parent, expected) in [
            (format!("00-{trace}-b7ad6b7169203331-01"), Some(trace)),
            (format!("01-{trace}-b7ad6b7169203331-01-more"), Some(trace)),
            (format!("00-{trace}-b7ad6b7169203331-01\r\nx: y"), None),
            (format!("00-{trace}"), None),
            (format!("ff-{trace}-b7ad6b7169203331-01"), None),
            (format!("00-{trace}-0000000000000000-01"), None),
            (format!("00-{}-b7ad6b7169203331-01", "0".repeat(32)), None),
            (format!("00-{}-b7ad6b7169203331-01", &trace[1..]), None),
            (format!("01-{trace}-b7ad6b7169203331-01-{}", "x".repeat(128)), None),
            (String::new(), None),
        ] {
            assert_eq!(trace_of_parent(&parent), expected, "{parent}");
        }
    }

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
        let mut config = crate::Config::default();
        let may = |config: &crate::Config, uid, tenant| config.may_speak_for(uid, tenant);
        assert!(may(&config, 0, "acme") && may(&config, 1000, "default") && !may(&config, 1000, "acme"));
        config.tenants = [(1000, vec!["acme".into(), "beta".into()]), (1001, vec!["*".into()])].into();
        assert!(may(&config, 1000, "acme") && may(&config, 1000, "beta") && !may(&config, 1000, "default"));
        assert!(may(&config, 1001, "anything") && !may(&config, 1002, "default") && may(&config, 0, "acme"));
    }

    /// Tests run as root, who speaks for every tenant; so the peer is made up here.
    #[tokio::test]
    async fn a_task_of_another_tenant_is_neither_shown_nor_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let config = crate::Config { socket: dir.path().join("s"), ..crate::Config::default() };
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
                let task =
                    serde_json::json!({"task_id": query.request_id, "state": state, "tenant_id": query.request_id});
                let payload = serde_json::json!({"ok": true, "task": task}).to_string().into();
                bus.publish(Message { subject: message.reply.unwrap(), payload, ..Message::default() }).await.unwrap();
            }
        });
        let task = |id: &str| TaskRef { command: None, task_id: id.into() };
        for (uid, tenant, allowed) in [(0, "acme", true), (1000, "default", true), (1000, "acme", false)] {
            for (name, request) in [
                ("query", Request::Query(task(tenant))),
                ("cancel", Request::Cancel(task(tenant))),
                ("subscribe", Request::Subscribe(task(tenant))),
            ] {
                if allowed && name == "subscribe" {
                    continue;
                }
                let pieces = Pieces::nowhere();
                let (kind, payload) = run(gateway.clone(), Peer { uid }, request, 0, pieces).await;
                let answer: Value = serde_json::from_slice(&payload).unwrap();
                match (allowed, name) {
                    (true, "query") => assert_eq!(answer["state"], "assigned"),
                    (true, _) => assert_eq!(answer["state"], "cancelled"),
                    (false, _) => assert_eq!(
                        (kind, &answer["error"]["code"]),
                        (FrameType::ResponseError, &13.into()),
                        "{name}: {answer}"
                    ),
                }
            }
        }
    }
}
