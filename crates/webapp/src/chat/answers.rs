//! The assistant's answers: asked for at the router, relayed to the room piece by piece, ended by the result.
//!
//! An answer's row is committed before it is asked for, and asking again with the same request changes nothing: after a
//! crash every answer that has not ended is asked for again.

use super::store::{ANSWER_MAX_MS, Answer, REQUEST_PREFIX, Store, TENANT};
use super::{channel, say};
use crate::channels::Channels;
use crate::db::{Result, now_ms};
use bus::{Bus, Consumer, ConsumerConfig, Delivery, Headers, Subscription};
use parking_lot::Mutex;
use serde_json::Value as Json;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::chat::{Event, Message, State};
use wire::router::{
    AnswerHead, Awaited, DecideRequest, ErrorResponse, ExecResult, OutputChunk, ResultStatus, RouterCode, TaskQuery,
};
use wire::subjects;

const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Pauses between tries while no router answers; then the answer fails and can be asked for again.
const ASK_PAUSES: [u64; 7] = [100, 200, 500, 1000, 2000, 5000, 10_000];
/// While no provider can take it, only after pauses up to this one.
const SHORT: u64 = 500;
/// An answer without a result for this long beyond its time has failed.
const GRACE_MS: i64 = 60_000;
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// An answer that nobody here has heard of for this long is asked for again: whoever took its message may be gone.
const ORPHAN_MS: i64 = 15_000;
/// A room is told how an answer ended for so many deliveries of its result.
const TELL_MAX: u32 = 20;
/// Of an answer, bytes; the rest is left out. As JSON six times as much at worst, which still fits a publication.
const TEXT_MAX: usize = 128 * 1024;
const OUTPUT_QUEUE: usize = 4096;

pub struct Answers {
    bus: Bus,
    store: Store,
    channels: Channels,
    /// Of those that have not ended, what has come, by request id.
    partial: Mutex<HashMap<String, Partial>>,
    asking: TaskTracker,
    stopping: CancellationToken,
}

#[derive(Clone)]
struct Partial {
    task: Awaited,
    id: i64,
    room: String,
    attempt: u32,
    seq: u64,
    text: String,
}

impl Partial {
    fn of(message: &Message) -> Self {
        let (task, room) = (task(None), message.room.clone());
        Self { task, id: message.id, room, attempt: 0, seq: 0, text: String::new() }
    }
}

fn task(assignment_id: Option<String>) -> Awaited {
    Awaited { tenant_id: TENANT.into(), assignment_id }
}

pub struct Inputs {
    output: Subscription,
    results: Consumer,
}

impl Answers {
    pub fn new(bus: Bus, store: Store, channels: Channels) -> Self {
        let stopping = CancellationToken::new();
        Self {
            bus,
            store,
            channels,
            partial: Mutex::default(),
            asking: TaskTracker::new(),
            stopping,
        }
    }

    pub async fn subscribe(&self) -> bus::Result<Inputs> {
        bus::streams::declare(&self.bus).await?;
        let all = format!("{}*", subjects::OUTPUT_PREFIX);
        let results = ConsumerConfig {
            stream: subjects::STREAM_RESULT,
            name: "webapp-chat".into(),
            filter: Some(subjects::RESULT.into()),
            ack_wait: Duration::from_secs(30),
            max_ack_pending: 1000,
            max_in_hand: 100,
            from_start: true,
        };
        Ok(Inputs {
            output: self.bus.subscribe(&all, None, OUTPUT_QUEUE).await?,
            results: self.bus.consume(results).await?,
        })
    }

    pub async fn run(self: &Arc<Self>, inputs: Inputs, cancel: CancellationToken) -> Result<(), crate::Error> {
        for answer in self.store.streaming().await? {
            self.ask(answer);
        }
        tokio::join!(
            self.relay(inputs.output, cancel.clone()),
            self.take_results(inputs.results, cancel.clone()),
            self.sweep(cancel.clone()),
        );
        self.stopping.cancel();
        self.asking.close();
        self.asking.wait().await;
        Ok(())
    }

    /// Has the router find somebody to answer, in the background.
    pub fn ask(self: &Arc<Self>, answer: Answer) {
        self.partial
            .lock()
            .entry(answer.request_id.clone())
            .or_insert_with(|| Partial::of(&answer.message));
        let answers = self.clone();
        self.asking.spawn(async move {
            let asked = tokio::select! {
                () = answers.stopping.cancelled() => return,
                asked = answers.try_to_ask(&answer) => asked,
            };
            if let Err(problem) = asked {
                answers.fail(&answer.request_id, &problem).await;
            }
        });
    }

    async fn try_to_ask(&self, answer: &Answer) -> Result<(), String> {
        let request: DecideRequest = serde_json::from_str(&answer.request).map_err(|e| e.to_string())?;
        let trace_id = request.trace_id.unwrap_or_default();
        let mut problem = String::new();
        for pause in [0].into_iter().chain(ASK_PAUSES) {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            if !self.partial.lock().contains_key(&answer.request_id) {
                return Ok(()); // stopped meanwhile
            }
            let headers = Headers::new()
                .with("trace_id", &trace_id)
                .with("tenant_id", &request.tenant_id)
                .with("version", &request.version);
            let reply = self
                .bus
                .request(subjects::DECIDE, headers, answer.request.clone().into(), ASK_TIMEOUT)
                .await;
            let reply = match reply {
                Ok(reply) => reply.payload,
                Err(error) => {
                    tracing::debug!(trace_id, request_id = answer.request_id, %error, "no router has answered");
                    problem = format!("no router can be reached; try again (trace {trace_id})");
                    continue;
                }
            };
            let Ok(refusal) = serde_json::from_slice::<ErrorResponse>(&reply) else {
                let head = serde_json::from_slice::<AnswerHead>(&reply).ok();
                if let Some(partial) = self.partial.lock().get_mut(&answer.request_id) {
                    partial.task = task(head.and_then(|head| head.assignment_id));
                }
                tracing::debug!(trace_id, request_id = answer.request_id, "an answer was asked for");
                return Ok(());
            };
            // What cannot pass by waiting fails now; a provider that is out is out for longer than a person waits.
            let passes = match &refusal.error.code {
                RouterCode::NoProviderAvailable => pause <= SHORT,
                _ => matches!(refusal.error.status(), 429 | 503),
            };
            problem = refusal.error.message;
            if !passes {
                break;
            }
        }
        tracing::warn!(trace_id, request_id = answer.request_id, problem, "an answer could not be asked for");
        Err(problem)
    }

    /// Adds what has come of a streaming answer.
    pub fn fill(&self, message: &mut Message) {
        let partial = self.partial.lock();
        if let Some(partial) = partial.values().find(|partial| partial.id == message.id) {
            message.text.clone_from(&partial.text);
            message.attempt = Some(partial.attempt);
            message.seq = Some(partial.seq);
        }
    }

    /// Forgets an answer whose room is deleted, and has the router end its task.
    pub async fn drop_one(&self, answer: &Answer) {
        self.partial.lock().remove(&answer.request_id);
        self.cancel(answer).await;
    }

    /// Asks the router to cancel; the result ends the message. A task it does not know ends here.
    pub async fn stop(&self, answer: &Answer) -> Result<()> {
        if !self.cancel(answer).await {
            self.end(&answer.request_id, State::Stopped, None, None).await?;
        }
        Ok(())
    }

    /// Whether a router knows the task and ends it.
    async fn cancel(&self, answer: &Answer) -> bool {
        let query =
            serde_json::to_vec(&TaskQuery { request_id: answer.request_id.clone(), tenant_id: Some(TENANT.into()) })
                .expect("a query is JSON");
        let reply = self
            .bus
            .request(subjects::CANCEL, Headers::new(), query.into(), ASK_TIMEOUT)
            .await;
        reply.is_ok_and(|reply| serde_json::from_slice::<ErrorResponse>(&reply.payload).is_err())
    }

    async fn relay(&self, mut output: Subscription, cancel: CancellationToken) {
        while let Some(message) = tokio::select! { () = cancel.cancelled() => None, message = output.next() => message }
        {
            // Most of the output on the bus is none of ours.
            if !message
                .subject
                .strip_prefix(subjects::OUTPUT_PREFIX)
                .is_some_and(|id| id.starts_with(REQUEST_PREFIX))
            {
                continue;
            }
            let Ok(chunk) = serde_json::from_slice::<OutputChunk>(&message.payload) else {
                continue;
            };
            if !self.is_open(&chunk.request_id).await {
                continue;
            }
            let Some((room, event)) = self.add(&chunk) else {
                continue;
            };
            // Not kept in the channel: a page that misses a piece sees the gap and reads the message again.
            if let Err(error) = self.channels.publish_passing(&channel(&room), &event).await {
                tracing::debug!(request_id = chunk.request_id, error, "a piece of an answer was not published");
            }
        }
    }

    /// Whether it is an answer that has not ended; another web app may have asked for it.
    async fn is_open(&self, request_id: &str) -> bool {
        if self.partial.lock().contains_key(request_id) {
            return true;
        }
        match self.store.answer_of(request_id).await {
            Ok(Some(answer)) if answer.message.state == State::Streaming => {
                self.partial
                    .lock()
                    .entry(request_id.into())
                    .or_insert_with(|| Partial::of(&answer.message));
                true
            }
            _ => false,
        }
    }

    fn add(&self, chunk: &OutputChunk) -> Option<(String, Event)> {
        let text = match &chunk.data {
            Json::String(text) => text.clone(),
            other => other.to_string(),
        };
        let mut partials = self.partial.lock();
        let partial = partials.get_mut(&chunk.request_id)?;
        if !is_of(&partial.task, &chunk.assignment_id, chunk.tenant_id.as_deref()) {
            return None;
        }
        let seq = chunk.seq + 1;
        if chunk.attempt > partial.attempt {
            (partial.attempt, partial.seq) = (chunk.attempt, 0);
            partial.text.clear();
        }
        if chunk.attempt < partial.attempt || seq <= partial.seq || partial.text.len() + text.len() > TEXT_MAX {
            return None;
        }
        if seq > partial.seq + 1 {
            // What is kept of an answer that is stopped must not read as if it were whole.
            partial.text.push('…');
        }
        partial.seq = seq;
        partial.text.push_str(&text);
        Some((partial.room.clone(), Event::Delta { id: partial.id, attempt: chunk.attempt, seq, text }))
    }

    async fn take_results(&self, mut results: Consumer, cancel: CancellationToken) {
        while let Some(delivery) =
            tokio::select! { () = cancel.cancelled() => None, delivery = results.next() => delivery }
        {
            let taken = self.take_result(&delivery).await;
            let settled = match &taken {
                Ok(()) => delivery.ack().await,
                Err(error) => {
                    tracing::warn!(error, "an answer could not be ended; trying again");
                    delivery.nak(Duration::from_secs(1)).await
                }
            };
            if let Err(error) = settled {
                tracing::debug!(%error, "a result was not settled; it comes again");
            }
        }
    }

    async fn take_result(&self, delivery: &Delivery) -> Result<(), String> {
        // What cannot be read is the router's to bury.
        let Ok(result) = ExecResult::decode(&delivery.message.payload) else {
            return Ok(());
        };
        if !result.request_id.starts_with(REQUEST_PREFIX) {
            return Ok(());
        }
        let known = self
            .partial
            .lock()
            .get(&result.request_id)
            .map(|partial| partial.task.clone());
        if !is_of(&known.unwrap_or_else(|| task(None)), &result.assignment_id, result.tenant_id.as_deref()) {
            return Ok(());
        }
        let error = result.error_message.clone().or(result.error_code.clone());
        let (state, error) = match result.status {
            ResultStatus::Success => (State::Done, None),
            ResultStatus::Cancelled => (State::Stopped, None),
            ResultStatus::Timeout => (State::Failed, Some(error.unwrap_or_else(|| "no answer in time".into()))),
            ResultStatus::Error => (State::Failed, Some(error.unwrap_or_else(|| "the answer failed".into()))),
        };
        let text = result.output.as_ref().map(text_of);
        let told = self
            .end(&result.request_id, state, text, error)
            .await
            .map_err(|e| e.to_string())?;
        if !told && delivery.delivered < TELL_MAX {
            return Err("the room was not told".into());
        }
        let trace_id = result.trace_id.as_deref().unwrap_or_default();
        tracing::info!(trace_id, request_id = result.request_id, state = state.as_str(), "an answer ended");
        Ok(())
    }

    /// Ends an answer in the database, then in the room; whether the room has been told. Without a text, what has come
    /// so far stays.
    async fn end(&self, request_id: &str, state: State, text: Option<String>, error: Option<String>) -> Result<bool> {
        let partial = self.partial.lock().get(request_id).cloned();
        let text = text
            .or_else(|| partial.as_ref().map(|partial| partial.text.clone()))
            .unwrap_or_default();
        let ended = self
            .store
            .finish(request_id, state, cut(&text), error.as_deref())
            .await?;
        self.partial.lock().remove(request_id);
        // Had it ended before, a crash may have come between that and the room: say again how it ended.
        let message = match ended {
            Some(message) => Some(message),
            None => self.store.answer_of(request_id).await?.map(|answer| answer.message),
        };
        if let Some(mut message) = message.filter(|message| message.state != State::Streaming) {
            message.attempt = partial.map(|partial| partial.attempt);
            if let Err(error) = say(&self.channels, &message).await {
                tracing::warn!(request_id, error, "a room was not told that an answer ended; it shows when read again");
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn fail(&self, request_id: &str, problem: &str) {
        if let Err(error) = self.end(request_id, State::Failed, None, Some(problem.into())).await {
            tracing::error!(request_id, %error, "an answer failed, and that could not be written; it is tried again later");
        }
    }

    async fn sweep(self: &Arc<Self>, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(SWEEP_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while tokio::select! { () = cancel.cancelled() => false, _ = ticks.tick() => true } {
            if let Err(error) = self.sweep_once(now_ms()).await {
                tracing::warn!(%error, "open answers cannot be read");
            }
            if let Err(error) = self.store.forget_spent(now_ms()).await {
                tracing::warn!(%error, "what was spent of old quotas was not removed");
            }
        }
    }

    /// Fails what nobody will answer any more, so that nothing streams for ever; asks again for what nobody may have
    /// asked for; forgets what another web app has ended.
    async fn sweep_once(self: &Arc<Self>, now: i64) -> Result<()> {
        let before: HashSet<String> = self.partial.lock().keys().cloned().collect();
        let open = self.store.streaming().await?;
        let ids: HashSet<&str> = open.iter().map(|answer| &*answer.request_id).collect();
        self.partial
            .lock()
            .retain(|id, _| ids.contains(&**id) || !before.contains(id));
        for answer in open {
            let age = now - answer.asked_at;
            if age > i64::try_from(ANSWER_MAX_MS).unwrap_or(i64::MAX) + GRACE_MS {
                self.fail(&answer.request_id, "no answer came in time; is a worker running?")
                    .await;
            } else if age > ORPHAN_MS && !before.contains(&answer.request_id) {
                self.ask(answer);
            }
        }
        Ok(())
    }
}

/// Whether output or a result is the answer's: another tenant's task may have the same request id. A v1 worker names no
/// tenant, and nobody else is told the request ids of answers.
fn is_of(task: &Awaited, assignment_id: &str, tenant_id: Option<&str>) -> bool {
    task.owns(assignment_id, tenant_id).unwrap_or(true)
}

/// An output as a message: its text, or its JSON.
fn text_of(output: &Json) -> String {
    match output {
        Json::String(text) => text.clone(),
        Json::Object(object) if object.get("text").is_some_and(Json::is_string) => {
            object["text"].as_str().unwrap_or_default().to_string()
        }
        other => format!("```json\n{}\n```", serde_json::to_string_pretty(other).unwrap_or_default()),
    }
}

fn cut(text: &str) -> &str {
    if text.len() <= TEXT_MAX {
        return text;
    }
    &text[..text.floor_char_boundary(TEXT_MAX)]
}

#[cfg(test)]
mod tests {
    use super::super::quotas::Quotas;
    use super::super::store::New;
    use super::*;
    use crate::db::Db;
    use serde_json::json;

    async fn answers(dir: &std::path::Path) -> Arc<Answers> {
        let bus = bus::local::Local::open(dir).await.unwrap();
        let store = Store::new(Db::open(None, dir).await.unwrap(), Quotas::default());
        Arc::new(Answers::new(bus.clone(), store, Channels::new(bus)))
    }

    async fn asked(answers: &Answers) -> Answer {
        let new = New {
            room: "general",
            user: "ann",
            name: "Ann",
            text: "@assistant hi",
            nonce: "n",
        };
        answers.store.send(&new).await.unwrap().1.unwrap()
    }

    #[tokio::test]
    async fn what_another_web_app_has_ended_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let answers = answers(dir.path()).await;
        let answer = asked(&answers).await;
        assert!(answers.is_open(&answer.request_id).await);
        answers.sweep_once(answer.asked_at).await.unwrap();
        assert_eq!(answers.partial.lock().len(), 1, "it has not ended");
        answers
            .store
            .finish(&answer.request_id, State::Done, "hello", None)
            .await
            .unwrap();
        answers.sweep_once(answer.asked_at).await.unwrap();
        assert_eq!(answers.partial.lock().len(), 0);
        assert!(!answers.is_open(&answer.request_id).await);
    }

    #[tokio::test]
    async fn pieces_are_taken_once_and_a_gap_shows() {
        let dir = tempfile::tempdir().unwrap();
        let answers = answers(dir.path()).await;
        let answer = asked(&answers).await;
        assert!(answers.is_open(&answer.request_id).await);
        let pieces = [(1, 0, "a"), (1, 0, "a"), (1, 3, "d"), (1, 2, "c"), (2, 0, "A"), (1, 4, "e"), (2, 1, "B")];
        let taken = pieces.map(|(attempt, seq, text)| {
            let chunk = json!({
                "request_id": answer.request_id, "assignment_id": "a", "attempt": attempt, "seq": seq, "data": text,
            });
            let taken = answers.add(&serde_json::from_value(chunk).unwrap()).is_some();
            (taken, answers.partial.lock()[&answer.request_id].text.clone())
        });
        let expected =
            [(true, "a"), (false, "a"), (true, "a…d"), (false, "a…d"), (true, "A"), (false, "A"), (true, "AB")];
        assert_eq!(taken, expected.map(|(taken, text)| (taken, text.to_string())));
    }

    #[tokio::test]
    async fn another_tenants_task_of_the_same_request_id_does_not_write_into_an_answer() {
        let dir = tempfile::tempdir().unwrap();
        let answers = answers(dir.path()).await;
        let answer = asked(&answers).await;
        assert!(answers.is_open(&answer.request_id).await);
        let add = |assignment: &str, tenant: Option<&str>, seq: u64| {
            let mut chunk = json!({"request_id": answer.request_id, "assignment_id": assignment, "attempt": 1,
                "seq": seq, "data": assignment});
            if let Some(tenant) = tenant {
                chunk["tenant_id"] = json!(tenant);
            }
            answers.add(&serde_json::from_value(chunk).unwrap()).is_some()
        };
        assert!(!add("b", Some("acme"), 0), "its tenant is another");
        assert!(add("a", Some(TENANT), 0));
        answers
            .partial
            .lock()
            .get_mut(&answer.request_id)
            .unwrap()
            .task
            .assignment_id = Some("a".into());
        assert!(!add("b", None, 1), "its assignment is another");
        assert!(add("a", None, 1), "a v1 worker names no tenant");
        assert_eq!(answers.partial.lock()[&answer.request_id].text, "aa");
    }

    #[tokio::test]
    async fn what_nobody_asked_for_is_asked_for_and_in_the_end_it_fails() {
        let dir = tempfile::tempdir().unwrap();
        let answers = answers(dir.path()).await;
        let mut routers = answers.bus.subscribe(subjects::DECIDE, None, 8).await.unwrap();
        let answer = asked(&answers).await;
        answers.sweep_once(answer.asked_at + ORPHAN_MS).await.unwrap();
        assert!(answers.partial.lock().is_empty(), "whoever took the message may still ask");
        answers.sweep_once(answer.asked_at + ORPHAN_MS + 1).await.unwrap();
        assert_eq!(routers.next().await.unwrap().payload, answer.request.clone());
        let late = answer.asked_at + i64::try_from(ANSWER_MAX_MS).unwrap() + GRACE_MS + 1;
        answers.sweep_once(late).await.unwrap();
        let failed = answers.store.answer(answer.message.id).await.unwrap().unwrap().message;
        assert_eq!(failed.state, State::Failed);
        answers.stopping.cancel();
        answers.asking.close();
        answers.asking.wait().await;
    }
}
