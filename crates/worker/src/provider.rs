//! Providers do the work of a task: `echo`, a program, a model's endpoint, or `ops`.

pub(crate) mod command;
mod echo;
mod openai;
pub(crate) mod ops;

use crate::{Error, Kind, ProviderConfig};
use bus::{Bus, Message};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use wire::json::{Json, JsonObject};
use wire::openai::{Delta, Tokens};
use wire::router::{ExecAssignment, OutputChunk, ResultStatus, Task, TextOutput};
use wire::status::Percentiles;

/// Runs that the latency percentiles look back on.
const WINDOW: usize = 256;

pub(crate) struct Provider {
    pub name: String,
    pub timeout: Duration,
    pub running: AtomicU64,
    pub completed: AtomicU64,
    pub failed: AtomicU64,
    latencies_ms: Mutex<VecDeque<u64>>,
    work: Work,
}

enum Work {
    Echo,
    Command(command::Command),
    OpenAi(openai::OpenAi),
    Ops(ops::Ops),
}

/// One task for a provider.
pub(crate) struct Job<'a> {
    pub task: &'a Task,
    pub request_id: &'a str,
    pub tenant_id: &'a str,
    pub trace_id: Option<&'a str>,
}

impl Job<'_> {
    /// A field of the payload or, for a task that came over IPC, of `payload.params`.
    pub fn field(&self, name: &str) -> Option<Json> {
        let payload = self.task.payload.as_ref()?;
        payload.get(name).or_else(|| {
            let params: JsonObject = payload.get("params")?.try_into().ok()?;
            params.get(name)
        })
    }

    pub fn text(&self, name: &str) -> Option<String> {
        self.field(name)?.string()
    }

    /// The task's `prompt`, or the text of the last of its `messages`.
    pub fn prompt(&self) -> Option<String> {
        let last = || {
            let messages = self.field("messages")?.list()?;
            let last: JsonObject = messages.into_iter().next_back()?.try_into().ok()?;
            last.get("content")?.string()
        };
        self.text("prompt").or_else(last)
    }
}

/// How long a run may take, and whose limit that is. A provider that exceeds its own limit has failed; one that runs
/// into a shorter deadline of the assignment has not.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Limit {
    /// The provider's own limit ([`ProviderConfig::timeout`]).
    Provider(Duration),
    /// The time that the assignment's deadline leaves, which is shorter.
    Assignment(Duration),
}

impl Limit {
    /// The limit of a run on a provider whose own limit is `provider`, for an assignment whose deadline of `deadline`
    /// leaves `left`.
    pub fn of(provider: Duration, deadline: Duration, left: Duration) -> Self {
        // A moment in the queue does not excuse a provider that uses up its own limit.
        let nearly_whole = deadline >= provider && 10 * left >= 9 * provider;
        if left < provider && !nearly_whole {
            Self::Assignment(left)
        } else {
            Self::Provider(provider.min(left))
        }
    }

    pub fn duration(self) -> Duration {
        match self {
            Self::Provider(duration) | Self::Assignment(duration) => duration,
        }
    }
}

/// How a run ended.
pub(crate) struct Outcome {
    pub status: ResultStatus,
    pub output: Option<Json>,
    pub error_code: Option<&'static str>,
    pub error: Option<String>,
    /// The cool-down that a busy provider asks for, in seconds.
    pub retry_after_seconds: Option<u64>,
    /// The tokens that a model's endpoint reported.
    pub tokens: Option<Tokens>,
}

impl Outcome {
    pub fn success(output: Json) -> Self {
        Self {
            status: ResultStatus::Success,
            output: Some(output),
            error_code: None,
            error: None,
            retry_after_seconds: None,
            tokens: None,
        }
    }

    pub fn text(text: impl Into<String>) -> Self {
        Self::success(TextOutput { text: text.into() }.into())
    }

    pub fn failed(code: &'static str, message: impl Into<String>) -> Self {
        Self::ended(ResultStatus::Error, code, message)
    }

    pub fn cancelled() -> Self {
        Self::ended(ResultStatus::Cancelled, "cancelled", "cancelled by request")
    }

    /// The task's deadline passed before there was a slot for it.
    pub fn expired(deadline_ms: u64) -> Self {
        let text = format!("the task's deadline of {deadline_ms} ms passed before a worker could run it");
        Self::ended(ResultStatus::Timeout, "deadline_exceeded", text)
    }

    /// The provider's endpoint is busy and asks for a cool-down.
    pub fn rate_limited(seconds: u64, message: impl Into<String>) -> Self {
        Self {
            retry_after_seconds: Some(seconds),
            ..Self::failed("rate_limited", message)
        }
    }

    /// The provider's limit of the time until the first token has passed.
    fn without_first_token(limit: Duration) -> Self {
        let text = format!("no token within {limit:?}, the provider's limit for the first one");
        Self::ended(ResultStatus::Timeout, "first_token_timeout", text)
    }

    fn timed_out(limit: Limit) -> Self {
        let (code, text) = match limit {
            Limit::Provider(limit) => ("timeout", format!("not finished within {limit:?}, the provider's limit")),
            Limit::Assignment(left) => {
                ("deadline_exceeded", format!("not finished by the task's deadline, {left:?} after the start"))
            }
        };
        Self::ended(ResultStatus::Timeout, code, text)
    }

    fn ended(status: ResultStatus, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            output: None,
            error_code: Some(code),
            error: Some(message.into()),
            retry_after_seconds: None,
            tokens: None,
        }
    }
}

/// Publishes a run's output in order, as it is produced.
pub(crate) struct Output {
    bus: Bus,
    subject: Arc<str>,
    request_id: String,
    tenant_id: String,
    assignment_id: String,
    attempt: u32,
    next: AtomicU64,
    /// The text published so far: a cancelled or failed run keeps it as its output.
    text: Mutex<String>,
}

impl Output {
    pub fn new(bus: Bus, assignment: &ExecAssignment, attempt: u32) -> Self {
        Self {
            bus,
            subject: wire::subjects::output(&assignment.request_id).into(),
            request_id: assignment.request_id.clone(),
            tenant_id: assignment.tenant_id.clone(),
            assignment_id: assignment.assignment_id.clone(),
            attempt,
            next: AtomicU64::new(0),
            text: Mutex::default(),
        }
    }

    /// The number of chunks published.
    pub fn count(&self) -> u64 {
        self.next.load(Relaxed)
    }

    pub async fn push(&self, text: &str) {
        if !text.is_empty() {
            self.publish(text, Json::of(&text)).await;
        }
    }

    /// Publishes a piece that is more than its text.
    pub async fn push_delta(&self, text: &str, delta: &Delta) {
        self.publish(text, Json::of(delta)).await;
    }

    async fn publish(&self, text: &str, data: Json) {
        self.text.lock().push_str(text);

        let chunk = OutputChunk {
            request_id: self.request_id.clone(),
            tenant_id: Some(self.tenant_id.clone()),
            assignment_id: self.assignment_id.clone(),
            attempt: self.attempt,
            seq: self.next.fetch_add(1, Relaxed),
            data,
        };
        let payload = serde_json::to_vec(&chunk)
            .expect("an output chunk serializes to JSON")
            .into();
        let message = Message { subject: self.subject.clone(), payload, ..Message::default() };
        if let Err(error) = self.bus.publish(message).await {
            tracing::debug!(%error, request_id = self.request_id, "publishing a chunk of output failed");
        }
    }

    pub fn text(&self) -> String {
        self.text.lock().clone()
    }

    /// The output of a run that ended early; `None` if it published nothing.
    fn so_far(&self) -> Option<Json> {
        let text = self.text();
        (!text.is_empty()).then(|| TextOutput { text }.into())
    }
}

impl Provider {
    pub fn new(config: ProviderConfig, bus: &Bus, live: &Arc<ops::Live>) -> Result<Self, Error> {
        let work = match config.kind {
            Kind::Echo => Work::Echo,
            Kind::Command { program, args, env, output_max } => {
                Work::Command(command::Command { program, args, env, output_max })
            }
            Kind::OpenAi(model) => {
                let made = openai::OpenAi::new(model);
                Work::OpenAi(made.map_err(|source| Error::Http { name: config.name.clone(), source })?)
            }
            Kind::Ops => Work::Ops(ops::Ops { bus: bus.clone(), live: live.clone() }),
        };
        Ok(Self {
            name: config.name,
            timeout: config.timeout,
            running: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            latencies_ms: Mutex::default(),
            work,
        })
    }

    pub fn starts_processes(&self) -> bool {
        matches!(self.work, Work::Command(_))
    }

    pub fn kind_name(&self) -> &'static str {
        match self.work {
            Work::Echo => "echo",
            Work::Command(_) => "command",
            Work::OpenAi(_) => "openai",
            Work::Ops(_) => "ops",
        }
    }

    /// Runs the job until it ends, `limit` passes or `stop` is cancelled. Processes that it started have ended when
    /// this returns.
    pub async fn run(&self, job: &Job<'_>, output: &Output, limit: Limit, stop: &CancellationToken) -> Outcome {
        // A command watches the limit and the stop itself: it must end its child process before it returns.
        let mut outcome = if let Work::Command(command) = &self.work {
            command.run(job, output, limit, stop).await
        } else {
            let work = async {
                match &self.work {
                    Work::Echo => echo::run(job, output).await,
                    Work::OpenAi(openai) => openai.run(job, output).await,
                    Work::Ops(ops) => ops.run(job, output).await,
                    Work::Command(_) => unreachable!("handled above"),
                }
            };
            tokio::select! {
                outcome = work => outcome,
                () = stop.cancelled() => Outcome::cancelled(),
                () = tokio::time::sleep(limit.duration()) => Outcome::timed_out(limit),
            }
        };

        if outcome.output.is_none() {
            outcome.output = output.so_far();
        }
        outcome
    }

    pub fn ended(&self, success: bool, took: Duration) {
        if success { &self.completed } else { &self.failed }.fetch_add(1, Relaxed);
        let mut latencies = self.latencies_ms.lock();
        if latencies.len() == WINDOW {
            latencies.pop_front();
        }
        latencies.push_back(took.as_millis() as u64);
    }

    pub fn latency_ms(&self) -> Percentiles {
        // Copied, so that nobody waits while it is sorted.
        let window = self.latencies_ms.lock().clone();
        Percentiles::of(window.into_iter(), |ms| ms as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_is_whose_time_runs_out() {
        let seconds = Duration::from_secs;
        for (provider, deadline, left, expected, is_providers) in [
            (60, 600, 600, 60, true),
            (60, 60, 60, 60, true),
            (60, 60, 55, 55, true),
            (60, 60, 50, 50, false),
            (60, 600, 50, 50, false),
            (60, 59, 59, 59, false),
        ] {
            let limit = Limit::of(seconds(provider), seconds(deadline), seconds(left));
            let case = format!("{provider} {deadline} {left}");
            assert_eq!(limit.duration(), seconds(expected), "{case}");
            assert_eq!(matches!(limit, Limit::Provider(_)), is_providers, "{case}");
        }
    }
}
