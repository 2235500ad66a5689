//! Any endpoint that speaks OpenAI's chat completions: one streamed request a task.

use super::{Job, Outcome, Output};
use futures_util::StreamExt;
use reqwest::StatusCode;
use serde_json::{Value, json};
use std::time::Duration;

/// A line of the event stream is not longer.
const LINE_MAX: usize = 256 * 1024;
/// An answer is not longer.
const ANSWER_MAX: usize = 1024 * 1024;
/// Of an error's body, this many bytes are read, and this many characters shown.
const ERROR_TEXT_MAX: usize = 16 * 1024;
const ERROR_SHOWN_MAX: usize = 300;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

pub struct OpenAi {
    client: reqwest::Client,
    url: String,
    api_key: Option<String>,
    model: String,
    system: Option<String>,
}

impl OpenAi {
    pub fn new(
        base_url: String,
        api_key: Option<String>,
        model: String,
        system: Option<String>,
    ) -> reqwest::Result<Self> {
        // No proxy from the environment: settings come from the configuration only.
        let client = reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).no_proxy().build()?;
        let url = format!("{}/chat/completions", base_url.trim_end_matches('/'));
        Ok(Self { client, url, api_key, model, system })
    }

    pub async fn run(&self, job: &Job<'_>, output: &Output) -> Outcome {
        match self.ask(job, output).await {
            Ok(text) => Outcome::text(text),
            Err(outcome) => outcome,
        }
    }

    async fn ask(&self, job: &Job<'_>, output: &Output) -> Result<String, Outcome> {
        let mut messages = Vec::new();
        if let Some(system) = &self.system {
            messages.push(json!({"role": "system", "content": system}));
        }
        match (job.field("messages").and_then(Value::as_array), job.text("prompt")) {
            (Some(given), _) if !given.is_empty() => messages.extend(given.iter().cloned()),
            (_, Some(prompt)) => messages.push(json!({"role": "user", "content": prompt})),
            _ => return Err(Outcome::failed("invalid_task", "the task has neither prompt nor messages")),
        }
        let mut request = self.client.post(&self.url);
        if let Some(key) = &self.api_key {
            request = request.bearer_auth(key);
        }
        let body = json!({"model": self.model, "messages": messages, "stream": true});
        let response = request.json(&body).send().await;
        // Where it is and how it fails is for the log; the answer may be read by anybody.
        let response = response.map_err(|error| {
            tracing::warn!(url = self.url, "the model's endpoint cannot be reached: {error:?}");
            Outcome::failed("unreachable", "the model's endpoint cannot be reached")
        })?;
        let status = response.status();
        if !status.is_success() {
            let text = start(response).await;
            tracing::warn!(url = self.url, %status, "the model's endpoint refused: {text}");
            let code = if is_of_the_task(status) { "invalid_task" } else { "refused" };
            return Err(Outcome::failed(
                code,
                format!("the model's endpoint answered {status}: {}", message_of(&text)),
            ));
        }
        let mut answer = String::new();
        let mut finished = false;
        let mut buffer: Vec<u8> = Vec::new();
        let mut pieces = response.bytes_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|e| Outcome::failed("broken_stream", format!("the answer broke off: {e}")))?;
            buffer.extend_from_slice(&piece);
            while let Some(end) = buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                match event(&line) {
                    Event::Text { text, last } => {
                        finished |= last;
                        if answer.len() + text.len() > ANSWER_MAX {
                            return Err(Outcome::failed(
                                "output",
                                format!("the answer is longer than {ANSWER_MAX} bytes"),
                            ));
                        }
                        output.push(&text).await;
                        answer.push_str(&text);
                    }
                    Event::Done => return Ok(answer),
                    Event::Failed(text) => return Err(Outcome::failed("refused", text)),
                    Event::Garbage => {
                        return Err(Outcome::failed("broken_stream", "a piece of the answer is not JSON"));
                    }
                    Event::Nothing => {}
                }
            }
            if buffer.len() > LINE_MAX {
                return Err(Outcome::failed(
                    "broken_stream",
                    format!("a line of the answer is longer than {LINE_MAX} bytes"),
                ));
            }
        }
        // Some endpoints say why they stopped and then just end.
        if finished { Ok(answer) } else { Err(Outcome::failed("broken_stream", "the answer ended without [DONE]")) }
    }
}

/// The start of an error's body, which may be of any size.
async fn start(response: reqwest::Response) -> String {
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

/// What the endpoint says in the usual form of its errors, else the beginning of what it says.
fn message_of(text: &str) -> String {
    let body: Value = serde_json::from_str(text).unwrap_or_default();
    let message = body["error"]["message"].as_str().or(body["error"].as_str()).unwrap_or(text);
    message.chars().take(ERROR_SHOWN_MAX).collect()
}

/// Another task may well be taken: it is not the endpoint that fails.
fn is_of_the_task(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::BAD_REQUEST
            | StatusCode::PAYLOAD_TOO_LARGE
            | StatusCode::UNPROCESSABLE_ENTITY
            | StatusCode::URI_TOO_LONG
    )
}

enum Event {
    /// `last`: it came with a reason to stop.
    Text {
        text: String,
        last: bool,
    },
    Done,
    Garbage,
    Failed(String),
    Nothing,
}

fn event(line: &[u8]) -> Event {
    let line = String::from_utf8_lossy(line);
    let Some(data) = line.trim().strip_prefix("data:").map(str::trim) else { return Event::Nothing };
    if data == "[DONE]" {
        return Event::Done;
    }
    let Ok(value) = serde_json::from_str::<Value>(data) else {
        return Event::Garbage;
    };
    // Some endpoints say in every piece that there is none.
    if let Some(error) = value.get("error").filter(|error| !error.is_null()) {
        let text = error["message"].as_str().map_or_else(|| error.to_string(), String::from);
        return Event::Failed(text);
    }
    let choice = &value["choices"][0];
    let last = choice["finish_reason"].is_string();
    match choice["delta"]["content"].as_str() {
        Some(text) => Event::Text { text: text.into(), last },
        None if last => Event::Text { text: String::new(), last },
        None => Event::Nothing,
    }
}
