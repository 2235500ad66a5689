//! A provider for endpoints of OpenAI's chat completions API: one streamed request for each task.

use super::{Job, Outcome, Output};
use futures_util::StreamExt;
use reqwest::header::{self, HeaderMap};
use reqwest::{Response, StatusCode};
use serde::Serialize;
use serde_json::Value;
use std::borrow::Cow;
use std::time::{Duration, SystemTime};
use wire::json::Json;
use wire::limits::{COOL_DOWN_DEFAULT_S, COOL_DOWN_MAX_S};

/// A line of the event stream, in bytes.
const LINE_MAX: usize = 256 * 1024;
/// An answer, in bytes.
const ANSWER_MAX: usize = 1024 * 1024;
/// Bytes of an error's body that are read.
const ERROR_TEXT_MAX: usize = 16 * 1024;
/// Characters of an error's message that the task's result quotes.
const ERROR_SHOWN_MAX: usize = 300;
/// An error's name in the log, in bytes.
const ERROR_NAME_MAX: usize = 48;
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
        // By default, reqwest would take a proxy from the environment; settings come from the configuration only.
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .no_proxy()
            .build()?;

        let url = format!("{}/chat/completions", base_url.trim_end_matches('/'));
        Ok(Self { client, url, api_key, model, system })
    }

    /// Sends the task's messages in one streamed request and relays the answer to `output`.
    pub async fn run(&self, job: &Job<'_>, output: &Output) -> Outcome {
        match self.complete(job, output).await {
            Ok(text) => Outcome::text(text),
            Err(outcome) => outcome,
        }
    }

    async fn complete(&self, job: &Job<'_>, output: &Output) -> Result<String, Outcome> {
        let messages = self.messages(job)?;
        let response = self.send(&messages).await?;
        let response = self.accepted(job, response).await?;
        relay(response, output).await
    }

    /// The system prompt, then the task's `messages`, or its `prompt` if it has none.
    fn messages(&self, job: &Job<'_>) -> Result<Vec<ChatMessage<'_>>, Outcome> {
        let system = self.system.as_deref();
        let mut messages: Vec<_> = system
            .map(|content| ChatMessage::New { role: "system", content: content.into() })
            .into_iter()
            .collect();

        let given = job.field("messages").and_then(|given| given.list());
        match (given, job.text("prompt")) {
            (Some(given), _) if !given.is_empty() => messages.extend(given.into_iter().map(ChatMessage::Given)),
            (_, Some(prompt)) => messages.push(ChatMessage::New { role: "user", content: prompt.into() }),
            _ => return Err(Outcome::failed("invalid_task", "the task has neither prompt nor messages")),
        }
        Ok(messages)
    }

    async fn send(&self, messages: &[ChatMessage<'_>]) -> Result<Response, Outcome> {
        let mut request = self.client.post(&self.url);
        if let Some(key) = &self.api_key {
            request = request.bearer_auth(key);
        }

        let body = ChatRequest { model: &self.model, messages, stream: true };
        request.json(&body).send().await.map_err(|error| {
            // The URL and the error's cause go to the log only, because the answer may be read by any user.
            tracing::warn!(url = self.url, "the model's endpoint cannot be reached: {error:?}");
            Outcome::failed("unreachable", "the model's endpoint cannot be reached")
        })
    }

    /// The response if its status is a success, else what it means for the task.
    async fn accepted(&self, job: &Job<'_>, response: Response) -> Result<Response, Outcome> {
        let status = response.status();
        let (trace_id, request_id, url) = (job.trace_id, job.request_id, &self.url);
        let status_code = status.as_u16();

        if let Some(seconds) = cool_down(status, response.headers(), SystemTime::now()) {
            tracing::warn!(trace_id, request_id, url, status = status_code, seconds, "the model's endpoint is busy");
            let text = format!("the model's endpoint answered {status}; it may be asked again in {seconds} s");
            return Err(Outcome::rate_limited(seconds, text));
        }
        if status.is_success() {
            return Ok(response);
        }

        // The log gets the error's name and length only: its message may repeat the prompt.
        let text = start_of(response).await;
        let (error, bytes) = (name_of(&text), text.len());
        tracing::warn!(trace_id, request_id, url, status = status_code, error, bytes, "the model's endpoint refused");
        let code = if is_of_the_task(status) {
            "invalid_task"
        } else {
            "refused"
        };
        Err(Outcome::failed(code, format!("the model's endpoint answered {status}: {}", message_of(&text))))
    }
}

/// The request body of the chat completions API.
#[derive(Serialize)]
struct ChatRequest<'a> {
    model: &'a str,
    messages: &'a [ChatMessage<'a>],
    stream: bool,
}

#[derive(Serialize)]
#[serde(untagged)]
enum ChatMessage<'a> {
    New {
        role: &'static str,
        content: Cow<'a, str>,
    },
    /// A message of the task, passed on unchanged.
    Given(Json),
}

/// Relays the text of an event stream to `output` as it arrives; returns the whole text.
async fn relay(response: Response, output: &Output) -> Result<String, Outcome> {
    let mut answer = Answer::default();
    let mut buffer: Vec<u8> = Vec::new();
    let mut pieces = response.bytes_stream();

    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|e| Outcome::failed("broken_stream", format!("the answer broke off: {e}")))?;
        buffer.extend_from_slice(&piece);

        while let Some(end) = buffer.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            if answer.take(&line, output).await? {
                return Ok(answer.text);
            }
        }
        if buffer.len() > LINE_MAX {
            let text = format!("a line of the answer is longer than {LINE_MAX} bytes");
            return Err(Outcome::failed("broken_stream", text));
        }
    }

    // Some endpoints send a finish reason and close the stream without [DONE].
    if answer.finished {
        Ok(answer.text)
    } else {
        Err(Outcome::failed("broken_stream", "the answer ended without [DONE]"))
    }
}

/// What has been received of an answer.
#[derive(Default)]
struct Answer {
    text: String,
    /// A finish reason was received.
    finished: bool,
}

impl Answer {
    /// Takes one line of the event stream; returns whether it was the last.
    async fn take(&mut self, line: &[u8], output: &Output) -> Result<bool, Outcome> {
        match event(line) {
            Event::Text { text, last } => {
                self.finished |= last;
                if self.text.len() + text.len() > ANSWER_MAX {
                    return Err(Outcome::failed("output", format!("the answer is longer than {ANSWER_MAX} bytes")));
                }
                output.push(&text).await;
                self.text.push_str(&text);
                Ok(false)
            }
            Event::Done => Ok(true),
            Event::Failed(text) => Err(Outcome::failed("refused", text)),
            Event::Garbage => Err(Outcome::failed("broken_stream", "a piece of the answer is not JSON")),
            Event::Nothing => Ok(false),
        }
    }
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

/// The message of an error in one of the API's usual forms; the start of the body if it has another form.
fn message_of(text: &str) -> String {
    let body: Value = serde_json::from_str(text).unwrap_or_default();
    let message = body["error"]["message"]
        .as_str()
        .or(body["error"].as_str())
        .unwrap_or(text);
    message.chars().take(ERROR_SHOWN_MAX).collect()
}

/// The cool-down that a busy endpoint asks for, in seconds; `None` if it is not busy. 429 always means busy, 503 only
/// with `Retry-After`, which is a number of seconds or a date (RFC 9110, 10.2.3).
fn cool_down(status: StatusCode, headers: &HeaderMap, now: SystemTime) -> Option<u64> {
    let given = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let seconds = given.map(str::trim).and_then(|text| {
        let until = |date: SystemTime| {
            date.duration_since(now)
                .map_or(0, |left| left.as_millis().div_ceil(1000) as u64)
        };
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // A number that does not fit is a long time, too.
        let number = digits.then(|| text.parse().unwrap_or(u64::MAX));
        number.or_else(|| httpdate::parse_http_date(text).ok().map(until))
    });

    let seconds = match status {
        StatusCode::TOO_MANY_REQUESTS => seconds.unwrap_or(COOL_DOWN_DEFAULT_S),
        StatusCode::SERVICE_UNAVAILABLE => seconds?,
        _ => return None,
    };
    Some(seconds.clamp(1, COOL_DOWN_MAX_S))
}

/// The code or type of an error, for the log; `None` unless it has the form of a name, so that no part of a prompt gets
/// through.
fn name_of(text: &str) -> Option<String> {
    let body: Value = serde_json::from_str(text).unwrap_or_default();
    let names = [&body["error"]["code"], &body["error"]["type"]];
    let is_name = |name: &&str| {
        (1..=ERROR_NAME_MAX).contains(&name.len())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
    };

    names
        .into_iter()
        .filter_map(Value::as_str)
        .find(is_name)
        .map(String::from)
}

/// Whether the status blames the request. The endpoint works, and other tasks may succeed.
fn is_of_the_task(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::BAD_REQUEST
            | StatusCode::PAYLOAD_TOO_LARGE
            | StatusCode::UNPROCESSABLE_ENTITY
            | StatusCode::URI_TOO_LONG
    )
}

/// One line of the event stream.
enum Event {
    Text {
        text: String,
        /// The line carries a finish reason.
        last: bool,
    },
    Done,
    Garbage,
    Failed(String),
    Nothing,
}

fn event(line: &[u8]) -> Event {
    let line = String::from_utf8_lossy(line);
    let Some(data) = line.trim().strip_prefix("data:").map(str::trim) else {
        return Event::Nothing;
    };
    if data == "[DONE]" {
        return Event::Done;
    }
    let Ok(value) = serde_json::from_str::<Value>(data) else {
        return Event::Garbage;
    };

    // Some endpoints send `"error": null` with every piece.
    if let Some(error) = value.get("error").filter(|error| !error.is_null()) {
        let text = error["message"]
            .as_str()
            .map_or_else(|| error.to_string(), String::from);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cool_down_follows_status_and_retry_after() {
        let check = |status: u16, retry_after: Option<&str>, expected: Option<u64>| {
            let mut headers = HeaderMap::new();
            if let Some(text) = retry_after {
                headers.insert(header::RETRY_AFTER, text.parse().unwrap());
            }
            // Sun, 06 Nov 1994 08:49:37 GMT, the example of RFC 9110.
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
            let found = cool_down(StatusCode::from_u16(status).unwrap(), &headers, now);
            assert_eq!(found, expected, "{status} {retry_after:?}");
        };
        check(429, Some("7"), Some(7));
        check(429, Some(" 7 "), Some(7));
        check(503, Some("120"), Some(120));
        check(429, Some("Sun, 06 Nov 1994 08:50:07 GMT"), Some(30));
        check(429, Some("Sunday, 06-Nov-94 08:50:07 GMT"), Some(30));
        check(429, Some("Sun, 06 Nov 1994 08:00:00 GMT"), Some(1));
        check(429, Some("0"), Some(1));
        check(429, Some("999999999"), Some(COOL_DOWN_MAX_S));
        check(429, Some("99999999999999999999999"), Some(COOL_DOWN_MAX_S));
        check(503, Some("Fri, 31 Dec 2100 00:00:00 GMT"), Some(COOL_DOWN_MAX_S));
        check(429, None, Some(COOL_DOWN_DEFAULT_S));
        check(429, Some("soon"), Some(COOL_DOWN_DEFAULT_S));
        check(503, None, None);
        check(503, Some("soon"), None);
        check(500, Some("7"), None);
        check(200, Some("7"), None);
    }
}
