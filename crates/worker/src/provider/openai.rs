//! A provider for endpoints of OpenAI's API: one request for each task, for a chat completion or for embeddings.

mod answer;
mod body;
mod limits;
mod refusal;
mod stream;

use super::{Job, Outcome, Output};
use crate::Model;
use answer::Answer;
use body::Body;
use futures_util::StreamExt;
use limits::Limits;
use reqwest::{Response, StatusCode};
use serde::Serialize;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;
use wire::json::Json;
use wire::openai::{CHAT, EMBEDDINGS, Embeddings, Tokens};

/// An answer that is not streamed, in bytes. With its envelopes it fits a frame of the gateway.
const WHOLE_MAX: usize = 3 * 1024 * 1024;
/// Bytes of an error's body that are read.
const ERROR_TEXT_MAX: usize = 16 * 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

pub struct OpenAi {
    client: reqwest::Client,
    base_url: String,
    config: Model,
    limits: Limits,
}

impl OpenAi {
    pub fn new(config: Model) -> reqwest::Result<Self> {
        // By default, reqwest would take a proxy from the environment; settings come from the configuration only.
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .no_proxy()
            .build()?;

        Ok(Self {
            client,
            base_url: config.base_url.trim_end_matches('/').into(),
            limits: Limits::new(config.requests_per_minute, config.tokens_per_minute),
            config,
        })
    }

    /// Sends the task's request, and relays the answer to `output` if it is streamed.
    pub async fn run(&self, job: &Job<'_>, output: &Output) -> Outcome {
        let ran = if job.task.task_type == EMBEDDINGS {
            self.embed(job).await
        } else {
            self.complete(job, output).await
        };
        ran.unwrap_or_else(|outcome| outcome)
    }

    async fn complete(&self, job: &Job<'_>, output: &Output) -> Result<Outcome, Outcome> {
        let body = Body::of_chat(job, &self.config)?;
        let first_token = self.config.first_token_timeout;
        let waits = FirstToken { until: first_token.map(|limit| (Instant::now() + limit, limit)) };

        let sent = self.send(job, "/chat/completions", &body);
        let (response, estimate) = waits.for_it(sent).await??;
        let answer = if body.is_streamed() {
            stream::relay(response, output, &waits, job.task.task_type == CHAT).await?
        } else {
            Answer::of_whole(&whole(response).await?)?
        };

        let tokens = answer.tokens();
        self.note_used(estimate, tokens);
        Ok(Outcome { tokens, ..Outcome::success(Json::of(&answer.into_completion())) })
    }

    async fn embed(&self, job: &Job<'_>) -> Result<Outcome, Outcome> {
        let body = Body::of_embeddings(job, &self.config)?;
        let (response, estimate) = self.send(job, "/embeddings", &body).await?;
        let embeddings: Embeddings = serde_json::from_slice(&whole(response).await?).map_err(|error| {
            Outcome::failed("broken_stream", format!("the answer has no embeddings: {}", wire::unfit(&error)))
        })?;

        let usage = embeddings.usage.as_ref();
        let tokens = usage.and_then(|usage| serde_json::from_str::<Tokens>(usage.text()).ok());
        self.note_used(estimate, tokens);
        Ok(Outcome { tokens, ..Outcome::success(Json::of(&embeddings)) })
    }

    /// Sends a request within the limits of the provider. Returns the response, if its status is a success, and the
    /// tokens that the request was estimated to have.
    async fn send(&self, job: &Job<'_>, path: &str, body: &impl Serialize) -> Result<(Response, u64), Outcome> {
        let body = serde_json::to_vec(body).expect("a request serializes to JSON");
        let estimate = limits::estimate(body.len());
        self.limits.take(estimate, Instant::now()).map_err(|seconds| {
            let text = format!("the provider's limit for a minute is reached; it may be asked again in {seconds} s");
            Outcome::rate_limited(seconds, text)
        })?;

        let url = format!("{}{path}", self.base_url);
        let mut request = self
            .client
            .post(&url)
            .header("content-type", "application/json")
            .body(body);
        if let Some(key) = &self.config.api_key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await.map_err(|error| {
            // The URL and the error's cause go to the log only, because the answer may be read by any user.
            tracing::warn!(url, "the model's endpoint cannot be reached: {error:?}");
            Outcome::failed("unreachable", "the model's endpoint cannot be reached")
        })?;
        Ok((self.accepted(job, &url, response).await?, estimate))
    }

    /// The response if its status is a success, else what it means for the task.
    async fn accepted(&self, job: &Job<'_>, url: &str, response: Response) -> Result<Response, Outcome> {
        let status = response.status();
        let (trace_id, request_id) = (job.trace_id, job.request_id);
        let status_code = status.as_u16();

        if let Some(seconds) = refusal::cool_down(status, response.headers(), SystemTime::now()) {
            tracing::warn!(trace_id, request_id, url, status = status_code, seconds, "the model's endpoint is busy");
            let text = format!("the model's endpoint answered {status}; it may be asked again in {seconds} s");
            return Err(Outcome::rate_limited(seconds, text));
        }
        if status.is_success() {
            return Ok(response);
        }

        // The log gets the error's name and length only: its message may repeat the prompt.
        let text = start_of(response).await;
        let (error, bytes) = (refusal::name_of(&text), text.len());
        tracing::warn!(trace_id, request_id, url, status = status_code, error, bytes, "the model's endpoint refused");
        let message = format!("the model's endpoint answered {status}: {}", refusal::message_of(&text));
        if refusal::is_of_the_task(status) || (job.task.task_type == EMBEDDINGS && lacks_path(status)) {
            return Err(Outcome::failed("invalid_task", message));
        }
        Err(Outcome::failed("refused", message))
    }

    fn note_used(&self, estimate: u64, tokens: Option<Tokens>) {
        if let Some(tokens) = tokens {
            self.limits.correct(estimate, tokens.total());
        }
    }
}

/// Whether an endpoint has no such path. A chat endpoint without embeddings works; whoever asks it for them must not
/// make others believe that it fails.
fn lacks_path(status: StatusCode) -> bool {
    matches!(status, StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED)
}

/// The limit of the time until the first token of an answer.
struct FirstToken {
    until: Option<(Instant, Duration)>,
}

impl FirstToken {
    /// Waits for `step`, at most until the limit passes.
    async fn for_it<T>(&self, step: impl Future<Output = T>) -> Result<T, Outcome> {
        let Some((until, limit)) = self.until else {
            return Ok(step.await);
        };
        tokio::time::timeout_at(until, step)
            .await
            .map_err(|_| Outcome::without_first_token(limit))
    }
}

/// The body of a response that is not streamed.
async fn whole(response: Response) -> Result<Vec<u8>, Outcome> {
    let mut body = Vec::new();
    let mut pieces = response.bytes_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|e| Outcome::failed("broken_stream", format!("the answer broke off: {e}")))?;
        if body.len() + piece.len() > WHOLE_MAX {
            return Err(Outcome::failed("output", format!("the answer is longer than {WHOLE_MAX} bytes")));
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

/// The start of an error's body, which may be of any size.
async fn start_of(response: Response) -> String {
    let mut body = Vec::new();
    let mut pieces = response.bytes_stream();
    while let Some(Ok(piece)) = pieces.next().await
        && body.len() < ERROR_TEXT_MAX
    {
        body.extend_from_slice(&piece);
    }

    body.truncate(ERROR_TEXT_MAX);
    String::from_utf8_lossy(&body).trim().to_string()
}
