//! The assistant's answers: asked for at the router, relayed to the room piece by piece, ended by the result.
//!
//! An answer's row is committed before it is asked for, and asking again with the same request changes nothing: after a
//! crash every answer that has not ended is asked for again.

use super::store::{ANSWER_MAX_MS, Answer, REQUEST_PREFIX, Store};
use super::{channel, say};
use crate::channels::Channels;
use crate::db::{Result, now_ms};
use bus::{Bus, Consumer, ConsumerConfig, Delivery, Headers, Subscription};
use parking_lot::Mutex;
use serde_json::Value as Json;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::chat::{Event, Message, State};
use wire::router::{DecideRequest, ErrorResponse, ExecResult, OutputChunk, ResultStatus, TaskQuery};
use wire::subjects;

const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Pauses between tries while no router answers; then the answer fails and can be asked for again.
const ASK_PAUSES: [u64; 7] = [100, 200, 500, 1000, 2000, 5000, 10_000];
/// An answer without a result for this long beyond its time has failed.
const GRACE_MS: i64 = 60_000;
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// Of an answer, bytes; the rest is left out.
const TEXT_MAX: usize = 256 * 1024;
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
    id: i64,
    room: String,
    attempt: u32,
    seq: u64,
    text: String,
}

pub struct Inputs {
    output: Subscription,
    results: Consumer,
}

impl Answers {
    pub fn new(bus: Bus, store: Store, channels: Channels) -> Self {
        let stopping = CancellationToken::new();
        Self { bus, store, channels, partial: Mutex::default(), asking: TaskTracker::new(), stopping }
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
        let partial = Partial {
            id: answer.message.id,
            room: answer.message.room.clone(),
            attempt: 0,
            seq: 0,
            text: String::new(),
        };
        self.partial.lock().entry(answer.request_id.clone()).or_insert(partial);
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
            let reply = self.bus.request(subjects::DECIDE, headers, answer.request.clone().into(), ASK_TIMEOUT).await;
            let reply = match reply {
                Ok(reply) => reply.payload,
                Err(error) => {
                    problem = error.to_string();
                    continue;
                }
            };
            let Ok(refusal) = serde_json::from_slice::<ErrorResponse>(&reply) else {
                tracing::debug!(trace_id, request_id = answer.request_id, "an answer was asked for");
                return Ok(());
            };
            // What cannot pass by waiting fails now.
            let passes = matches!(refusal.error.status(), 429 | 503);
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

    /// Asks the router to cancel; the result ends the message. A task it does not know ends here.
    pub async fn stop(&self, answer: &Answer) -> Result<()> {
        let query = serde_json::to_vec(&TaskQuery { request_id: answer.request_id.clone() }).expect("a query is JSON");
        let reply = self.bus.request(subjects::CANCEL, Headers::new(), query.into(), ASK_TIMEOUT).await;
        let cancelled = reply.is_ok_and(|reply| serde_json::from_slice::<ErrorResponse>(&reply.payload).is_err());
        if !cancelled {
            self.end(&answer.request_id, State::Stopped, None, None).await?;
        }
        Ok(())
    }

    async fn relay(&self, mut output: Subscription, cancel: CancellationToken) {
        while let Some(message) = tokio::select! { () = cancel.cancelled() => None, message = output.next() => message }
        {
            let Ok(chunk) = serde_json::from_slice::<OutputChunk>(&message.payload) else { continue };
            if !chunk.request_id.starts_with(REQUEST_PREFIX) || !self.is_open(&chunk.request_id).await {
                continue;
            }
            let Some((room, event)) = self.add(&chunk) else { continue };
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
                let partial = Partial {
                    id: answer.message.id,
                    room: answer.message.room,
                    attempt: 0,
                    seq: 0,
                    text: String::new(),
                };
                self.partial.lock().entry(request_id.into()).or_insert(partial);
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
        let seq = chunk.seq + 1;
        if chunk.attempt > partial.attempt {
            (partial.attempt, partial.seq) = (chunk.attempt, 0);
            partial.text.clear();
        }
        if chunk.attempt < partial.attempt || seq <= partial.seq || partial.text.len() + text.len() > TEXT_MAX {
            return None;
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
        let Ok(result) = ExecResult::decode(&delivery.message.payload) else { return Ok(()) };
        if !result.request_id.starts_with(REQUEST_PREFIX) {
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
        self.end(&result.request_id, state, text, error).await.map_err(|e| e.to_string())?;
        let trace_id = result.trace_id.as_deref().unwrap_or_default();
        tracing::info!(trace_id, request_id = result.request_id, state = state.as_str(), "an answer ended");
        Ok(())
    }

    /// Ends an answer in the database, then in the room. Without a text, what has come so far stays.
    async fn end(&self, request_id: &str, state: State, text: Option<String>, error: Option<String>) -> Result<()> {
        let partial = self.partial.lock().get(request_id).cloned();
        let text = text.or_else(|| partial.as_ref().map(|partial| partial.text.clone())).unwrap_or_default();
        let ended = self.store.finish(request_id, state, cut(&text), error.as_deref()).await?;
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
            }
        }
        Ok(())
    }

    async fn fail(&self, request_id: &str, problem: &str) {
        if let Err(error) = self.end(request_id, State::Failed, None, Some(problem.into())).await {
            tracing::error!(request_id, %error, "an answer failed, and that could not be written; it is tried again later");
        }
    }

    /// Fails what nobody will answer any more, so that nothing streams for ever.
    async fn sweep(&self, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(SWEEP_EVERY);
        while tokio::select! { () = cancel.cancelled() => false, _ = ticks.tick() => true } {
            let open = match self.store.streaming().await {
                Ok(open) => open,
                Err(error) => {
                    tracing::warn!(%error, "open answers cannot be read");
                    continue;
                }
            };
            let before = now_ms() - i64::try_from(ANSWER_MAX_MS).unwrap_or(i64::MAX) - GRACE_MS;
            for answer in open.into_iter().filter(|answer| answer.asked_at < before) {
                self.fail(&answer.request_id, "no answer came in time; is a worker running?").await;
            }
        }
    }
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
