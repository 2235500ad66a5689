//! Any endpoint that speaks OpenAI's chat completions: one streamed request a task.

use super::{Job, Outcome, Output};
use futures_util::StreamExt;
use reqwest::StatusCode;
use reqwest::header::{self, HeaderMap};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime};
use wire::limits::{COOL_DOWN_DEFAULT_S, COOL_DOWN_MAX_S};

/// A line of the event stream is not longer.
const LINE_MAX: usize = 256 * 1024;
/// An answer is not longer.
const ANSWER_MAX: usize = 1024 * 1024;
/// Of an error's body, this many bytes are read, and this many characters shown.
const ERROR_TEXT_MAX: usize = 16 * 1024;
const ERROR_SHOWN_MAX: usize = 300;
/// The name of an error is not longer, in bytes.
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
        // No proxy from the environment: settings come from the configuration only.
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .no_proxy()
            .build()?;
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
        if let Some(seconds) = cool_down(status, response.headers(), SystemTime::now()) {
            let (trace_id, request_id, status_code) = (job.trace_id, job.request_id, status.as_u16());
            tracing::warn!(
                trace_id,
                request_id,
                url = self.url,
                status = status_code,
                seconds,
                "the model's endpoint is busy"
            );
            let text = format!("the model's endpoint answered {status}; it may be asked again in {seconds} s");
            return Err(Outcome::rate_limited(seconds, text));
        }
        if !status.is_success() {
            let text = start(response).await;
            let (trace_id, request_id, bytes) = (job.trace_id, job.request_id, text.len());
            let error = kind_of(&text);
            let status_code = status.as_u16();
            tracing::warn!(
                trace_id,
                request_id,
                url = self.url,
                status = status_code,
                error,
                bytes,
                "the model's endpoint refused"
            );
            let code = if is_of_the_task(status) {
                "invalid_task"
            } else {
                "refused"
            };
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
        if finished {
            Ok(answer)
        } else {
            Err(Outcome::failed("broken_stream", "the answer ended without [DONE]"))
        }
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
    let message = body["error"]["message"]
        .as_str()
        .or(body["error"].as_str())
        .unwrap_or(text);
    message.chars().take(ERROR_SHOWN_MAX).collect()
}

/// How long a busy endpoint is to be left alone, seconds; `None` where it is not busy. 429 says so by itself, 503 only with
/// `Retry-After`, which is a number of seconds or a date (RFC 9110, 10.2.3).
fn cool_down(status: StatusCode, headers: &HeaderMap, now: SystemTime) -> Option<u64> {
    let given = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let seconds = given.map(str::trim).and_then(|text| {
        let until = |date: SystemTime| {
            date.duration_since(now)
                .map_or(0, |left| left.as_millis().div_ceil(1000) as u64)
        };
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // More digits than a number has is a long time, too.
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

/// What the endpoint calls its error: for the log, as the message may repeat the prompt. A name, or nothing.
fn kind_of(text: &str) -> Option<String> {
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
    let Some(data) = line.trim().strip_prefix("data:").map(str::trim) else {
        return Event::Nothing;
    };
    if data == "[DONE]" {
        return Event::Done;
    }
    let Ok(value) = serde_json::from_str::<Value>(data) else {
        return Event::Garbage;
    };
    // Some endpoints say in every piece that there is none.
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
    fn a_busy_endpoint_says_when_to_come_back() {
        let check = |status: u16, retry_after: Option<&str>, expected: Option<u64>| {
            let mut headers = HeaderMap::new();
            if let Some(text) = retry_after {
                headers.insert(header::RETRY_AFTER, text.parse().unwrap());
            }
            // Sun, 06 Nov 1994 08:49:37 GMT, as RFC 9110 has it.
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
