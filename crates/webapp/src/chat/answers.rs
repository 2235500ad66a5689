//! The assistant's answers. An answer is a task: it is requested from the router, its output is relayed to the room
//! piece by piece, and its result completes it.
//!
//! An answer is committed to the database before it is requested, and a repeated request is idempotent. So after a
//! crash every answer that has not ended is requested again.

mod results;

use super::prompt::{ANSWER_MAX_MS, REQUEST_PREFIX, TENANT};
use super::publish::publish_ended;
use super::store::{Answer, Store};
use crate::channels::{self, Channels};
use crate::db::{Result, now_ms};
use bus::{Bus, Headers, Subscription};
use parking_lot::Mutex;
use results::{Looks, Unnotified};
use serde_json::Value as Json;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::chat::{Event, Message, State};
use wire::router::{AnswerHead, Awaited, DecideRequest, ErrorBody, ErrorResponse, OutputChunk, RouterCode, TaskQuery};
use wire::subjects;

const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Pauses in ms between attempts to reach a router. After the last one the answer fails.
const ASK_PAUSES: [u64; 7] = [100, 200, 500, 1000, 2000, 5000, 10_000];
/// While no provider is available, attempts stop after a pause of this many ms, because such an outage usually lasts
/// longer than people wait.
const NO_PROVIDER_PAUSE_MAX: u64 = 500;
/// An answer fails if its result is this much later than its deadline, in ms.
const GRACE_MS: i64 = 60_000;
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// Age in ms after which a streaming answer that this web app does not know is requested again, because the web app
/// that received the message may have died before the request.
const ORPHAN_MS: i64 = 15_000;
/// Largest text of an answer in bytes; the rest is cut off. JSON escapes make it six times as long at worst, which
/// still fits a publication.
const TEXT_MAX: usize = 128 * 1024;
const OUTPUT_QUEUE: usize = 4096;
/// Results that wait to be taken; one that does not fit is found in the task's record.
const RESULT_QUEUE: usize = 1024;

pub struct Answers {
    bus: Bus,
    store: Store,
    channels: Channels,
    /// The output so far of answers that have not ended, by request id.
    partial: Mutex<HashMap<String, Partial>>,
    unnotified: Mutex<Unnotified>,
    /// Where this web app receives the results of the answers that it asked for.
    result_subject: String,
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
    looks: Looks,
}

impl Partial {
    fn of(message: &Message, looks: Looks) -> Self {
        let (task, room) = (task(None), message.room.clone());
        Self {
            task,
            id: message.id,
            room,
            attempt: 0,
            seq: 0,
            text: String::new(),
            looks,
        }
    }
}

fn task(assignment_id: Option<String>) -> Awaited {
    Awaited { tenant_id: TENANT.into(), assignment_id }
}

enum Decision {
    /// Has the id of the assignment, if the router returned it, and whether a copy of the result will come.
    Accepted {
        assignment_id: Option<String>,
        is_told: bool,
    },
    Refused(ErrorBody),
}

/// The subscriptions that [`Answers::run`] consumes.
pub struct Inputs {
    output: Subscription,
    results: Subscription,
}

impl Answers {
    pub fn new(bus: Bus, store: Store, channels: Channels) -> Self {
        let stopping = CancellationToken::new();
        Self {
            bus,
            store,
            channels,
            partial: Mutex::default(),
            unnotified: Mutex::default(),
            result_subject: subjects::result_copy(rand::random()),
            asking: TaskTracker::new(),
            stopping,
        }
    }

    pub async fn subscribe(&self) -> bus::Result<Inputs> {
        let output = format!("{}*", subjects::OUTPUT_PREFIX);
        Ok(Inputs {
            output: self.bus.subscribe(&output, None, OUTPUT_QUEUE).await?,
            results: self.bus.subscribe(&self.result_subject, None, RESULT_QUEUE).await?,
        })
    }

    pub async fn run(self: &Arc<Self>, inputs: Inputs, cancel: CancellationToken) -> Result<(), crate::Error> {
        // A crash may have lost their requests.
        for answer in self.store.streaming().await? {
            self.ask(answer);
        }
        self.notify_of_recent().await?;

        tokio::join!(
            self.relay(inputs.output, cancel.clone()),
            self.take_results(inputs.results, cancel.clone()),
            self.look_for_results(cancel.clone()),
            self.sweep(cancel.clone()),
        );

        // Stops the background requests; the next start repeats them.
        self.stopping.cancel();
        self.asking.close();
        self.asking.wait().await;
        Ok(())
    }

    /// Requests an answer from the router, in the background.
    pub fn ask(self: &Arc<Self>, answer: Answer) {
        // A repeated request keeps the output so far.
        self.partial
            .lock()
            .entry(answer.request_id.clone())
            .or_insert_with(|| Partial::of(&answer.message, Looks::of_ours(false)));

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

    /// Requests an answer, with retries. An error is a text for the room.
    async fn try_to_ask(&self, answer: &Answer) -> Result<(), String> {
        let mut request: DecideRequest = serde_json::from_str(&answer.request).map_err(|e| e.to_string())?;
        request.result_subject = Some(self.result_subject.clone());
        let trace_id = request.trace_id.as_deref().unwrap_or_default();
        let request_id = &answer.request_id;

        let mut problem = String::new();
        for pause in [0].into_iter().chain(ASK_PAUSES) {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            if !self.partial.lock().contains_key(request_id) {
                return Ok(()); // stopped meanwhile
            }

            let refusal = match self.decide(&request, trace_id).await {
                Ok(Decision::Accepted { assignment_id, is_told }) => {
                    if let Some(partial) = self.partial.lock().get_mut(request_id) {
                        partial.task = task(assignment_id);
                        partial.looks = Looks::of_ours(is_told);
                    }
                    tracing::debug!(trace_id, request_id, "the router accepted the request for an answer");
                    return Ok(());
                }
                Ok(Decision::Refused(refusal)) => refusal,
                Err(error) => {
                    tracing::debug!(trace_id, request_id, %error, "no router has answered");
                    problem = format!("no router can be reached; try again (trace {trace_id})");
                    continue;
                }
            };

            let temporary = match &refusal.code {
                RouterCode::NoProviderAvailable => pause <= NO_PROVIDER_PAUSE_MAX,
                _ => matches!(refusal.status(), 429 | 503),
            };
            problem = refusal.message;
            if !temporary {
                break;
            }
        }

        tracing::warn!(trace_id, request_id, problem, "cannot request an answer");
        Err(problem)
    }

    /// Sends the request once. An error means that no router has answered.
    async fn decide(&self, request: &DecideRequest, trace_id: &str) -> bus::Result<Decision> {
        let payload = serde_json::to_vec(request).expect("a request serializes to JSON");
        let headers = Headers::new()
            .with("trace_id", trace_id)
            .with("tenant_id", &request.tenant_id)
            .with("version", &request.version);
        let reply = self
            .bus
            .request(subjects::DECIDE, headers, payload.into(), ASK_TIMEOUT)
            .await?;

        if let Ok(refusal) = serde_json::from_slice::<ErrorResponse>(&reply.payload) {
            return Ok(Decision::Refused(refusal.error));
        }
        // The assignment id distinguishes its output from that of another task with the same request id.
        let head = serde_json::from_slice::<AnswerHead>(&reply.payload).ok();
        let (assignment_id, copied_to) = head
            .map(|head| (head.assignment_id, head.result_subject))
            .unwrap_or_default();
        Ok(Decision::Accepted { assignment_id, is_told: copied_to.as_ref() == Some(&self.result_subject) })
    }

    /// Adds the output so far to the message of a streaming answer.
    pub fn fill(&self, message: &mut Message) {
        let partial = self.partial.lock();
        if let Some(partial) = partial.values().find(|partial| partial.id == message.id) {
            message.text.clone_from(&partial.text);
            message.attempt = Some(partial.attempt);
            message.seq = Some(partial.seq);
        }
    }

    /// Drops an answer whose room was deleted, and cancels its task.
    pub async fn abandon(&self, answer: &Answer) {
        self.partial.lock().remove(&answer.request_id);
        self.cancel(answer).await;
    }

    /// Cancels the task of an answer; its result then ends the answer. If no router knows the task, there will be no
    /// result, so the answer ends immediately.
    pub async fn stop(&self, answer: &Answer) -> Result<()> {
        if !self.cancel(answer).await {
            self.end(&answer.request_id, State::Stopped, None, None).await?;
        }
        Ok(())
    }

    /// Returns whether a router knew the task and cancels it.
    async fn cancel(&self, answer: &Answer) -> bool {
        let query = TaskQuery {
            request_id: answer.request_id.clone(),
            tenant_id: Some(TENANT.into()),
            result_subject: None,
        };
        let query = serde_json::to_vec(&query).expect("a query serializes to JSON");
        let reply = self
            .bus
            .request(subjects::CANCEL, Headers::new(), query.into(), ASK_TIMEOUT)
            .await;
        reply.is_ok_and(|reply| serde_json::from_slice::<ErrorResponse>(&reply.payload).is_err())
    }

    /// Relays the output of answers to their rooms.
    async fn relay(&self, mut output: Subscription, cancel: CancellationToken) {
        while let Some(message) = tokio::select! { () = cancel.cancelled() => None, message = output.next() => message }
        {
            // The subscription also receives the output of all other tasks.
            let request_id = message.subject.strip_prefix(subjects::OUTPUT_PREFIX);
            if !request_id.is_some_and(|id| id.starts_with(REQUEST_PREFIX)) {
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
            // Pieces need no history: a page that misses one detects the gap and reloads the message.
            let channel = channels::of_room(&room);
            if let Err(error) = self.channels.publish_passing(&channel, &event).await {
                tracing::debug!(request_id = chunk.request_id, error, "cannot publish a piece of an answer");
            }
        }
    }

    /// Whether the answer has not ended. An answer that another web app requested is read from the database and cached.
    async fn is_open(&self, request_id: &str) -> bool {
        if self.partial.lock().contains_key(request_id) {
            return true;
        }
        match self.store.answer_of(request_id).await {
            Ok(Some(answer)) if answer.message.state == State::Streaming => {
                self.partial
                    .lock()
                    .entry(request_id.into())
                    .or_insert_with(|| Partial::of(&answer.message, Looks::of_others()));
                true
            }
            _ => false,
        }
    }

    /// Appends a piece of output. Returns the room and its event, or `None` if the piece belongs to another task, is
    /// repeated or late, or does not fit.
    fn add(&self, chunk: &OutputChunk) -> Option<(String, Event)> {
        let text = chunk.data.string().unwrap_or_else(|| chunk.data.text().into());

        let mut partials = self.partial.lock();
        let partial = partials.get_mut(&chunk.request_id)?;
        if !is_of(&partial.task, &chunk.assignment_id, chunk.tenant_id.as_deref()) {
            return None;
        }

        let seq = chunk.seq + 1;
        if chunk.attempt > partial.attempt {
            // A new attempt starts the answer over.
            (partial.attempt, partial.seq) = (chunk.attempt, 0);
            partial.text.clear();
        }
        if chunk.attempt < partial.attempt || seq <= partial.seq || partial.text.len() + text.len() > TEXT_MAX {
            return None;
        }
        if seq > partial.seq + 1 {
            // Marks the gap, because this text is kept if the answer is stopped.
            partial.text.push('…');
        }

        partial.seq = seq;
        partial.text.push_str(&text);
        Some((partial.room.clone(), Event::Delta { id: partial.id, attempt: chunk.attempt, seq, text }))
    }

    /// Ends an answer in the database, then in the room. Without a text, the output so far becomes the text.
    async fn end(&self, request_id: &str, state: State, text: Option<String>, error: Option<String>) -> Result<()> {
        let partial = self.partial.lock().get(request_id).cloned();
        let text = text
            .or_else(|| partial.as_ref().map(|partial| partial.text.clone()))
            .unwrap_or_default();

        let ended = self
            .store
            .finish(request_id, state, cut(&text), error.as_deref())
            .await?;
        self.partial.lock().remove(request_id);

        // If it had ended before, its room was notified then, or will be.
        let Some(mut message) = ended else { return Ok(()) };
        message.attempt = partial.map(|partial| partial.attempt);
        if let Err(error) = publish_ended(&self.channels, request_id, &message).await {
            tracing::warn!(request_id, error, "cannot notify a room that an answer ended; retrying");
            self.notify_later(request_id.into());
        }
        Ok(())
    }

    async fn fail(&self, request_id: &str, problem: &str) {
        if let Err(error) = self.end(request_id, State::Failed, None, Some(problem.into())).await {
            tracing::error!(request_id, %error, "cannot store that an answer failed; the next sweep retries");
        }
    }

    async fn sweep(self: &Arc<Self>, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(SWEEP_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while tokio::select! { () = cancel.cancelled() => false, _ = ticks.tick() => true } {
            if let Err(error) = self.sweep_once(now_ms()).await {
                tracing::warn!(%error, "cannot sweep the streaming answers");
            }
            // This cleanup does not need its own loop.
            if let Err(error) = self.store.forget_spent(now_ms()).await {
                tracing::warn!(%error, "cannot delete old records of spent quotas");
            }
        }
    }

    /// Fails answers whose deadline has passed, requests orphans again, and evicts answers that another web app ended.
    async fn sweep_once(self: &Arc<Self>, now: i64) -> Result<()> {
        // Read before the query: an answer that is added in between may be missing from `open`.
        let before: HashSet<String> = self.partial.lock().keys().cloned().collect();
        let open = self.store.streaming().await?;

        let ids: HashSet<&str> = open.iter().map(|answer| &*answer.request_id).collect();
        let is_open = |id: &String| ids.contains(&**id) || !before.contains(id);
        let ended: Vec<String> = self
            .partial
            .lock()
            .extract_if(|id, _| !is_open(id))
            .map(|(id, _)| id)
            .collect();
        // The web app that ended them may have died before it notified their rooms.
        ended.into_iter().for_each(|id| self.notify_later(id));

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

/// Whether output or a result belongs to the answer: another tenant's task may have the same request id. A v1 worker
/// does not name the tenant, which is safe because nobody else knows the request ids of answers.
fn is_of(task: &Awaited, assignment_id: &str, tenant_id: Option<&str>) -> bool {
    task.owns(assignment_id, tenant_id).unwrap_or(true)
}

/// Returns the text that the room shows for an output: its text, or its JSON as a code block.
fn text_of(output: &wire::json::Json) -> String {
    match output.value() {
        Json::String(text) => text,
        Json::Object(object) if object.get("text").is_some_and(Json::is_string) => {
            object["text"].as_str().unwrap_or_default().to_string()
        }
        other => format!("```json\n{}\n```", serde_json::to_string_pretty(&other).unwrap_or_default()),
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
    async fn answer_ended_by_another_web_app_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let answers = answers(dir.path()).await;
        let answer = asked(&answers).await;
        assert!(answers.is_open(&answer.request_id).await);
        answers.sweep_once(answer.asked_at).await.unwrap();
        assert_eq!(answers.partial.lock().len(), 1, "the answer has not ended yet");

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
    async fn pieces_are_appended_once_and_a_gap_is_marked() {
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
    async fn task_of_another_tenant_with_the_same_request_id_is_ignored() {
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

        assert!(!add("b", Some("acme"), 0), "another tenant");
        assert!(add("a", Some(TENANT), 0));
        answers
            .partial
            .lock()
            .get_mut(&answer.request_id)
            .unwrap()
            .task
            .assignment_id = Some("a".into());

        assert!(!add("b", None, 1), "another assignment");
        assert!(add("a", None, 1), "a v1 worker does not name the tenant");
        assert_eq!(answers.partial.lock()[&answer.request_id].text, "aa");
    }

    #[tokio::test]
    async fn orphaned_answer_is_requested_again_and_finally_fails() {
        let dir = tempfile::tempdir().unwrap();
        let answers = answers(dir.path()).await;
        let mut routers = answers.bus.subscribe(subjects::DECIDE, None, 8).await.unwrap();
        let answer = asked(&answers).await;
        answers.sweep_once(answer.asked_at + ORPHAN_MS).await.unwrap();
        assert!(
            answers.partial.lock().is_empty(),
            "the web app that received the message may still request the answer"
        );

        answers.sweep_once(answer.asked_at + ORPHAN_MS + 1).await.unwrap();
        let mut asked: DecideRequest = serde_json::from_slice(&routers.next().await.unwrap().payload).unwrap();
        assert_eq!(asked.result_subject.take(), Some(answers.result_subject.clone()));
        assert_eq!(serde_json::to_string(&asked).unwrap(), answer.request);

        let late = answer.asked_at + i64::try_from(ANSWER_MAX_MS).unwrap() + GRACE_MS + 1;
        answers.sweep_once(late).await.unwrap();
        let failed = answers.store.answer(answer.message.id).await.unwrap().unwrap().message;
        assert_eq!(failed.state, State::Failed);
        answers.stopping.cancel();
        answers.asking.close();
        answers.asking.wait().await;
    }
}
