//! The event stream of an answer, as OpenAI's clients read it.

use super::answers::Event;
use super::refusal::Refusal;
use super::reply::{self, Head};
use axum::body::Bytes;
use futures_util::Stream;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::mpsc::Receiver;
use wire::json::Json;
use wire::openai::{Completion, Delta};
use wire::router::{ExecResult, OutputChunk};

/// While a model says nothing, a comment this often keeps proxies and clients from giving up.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const COMMENT: &[u8] = b": keep-alive\n\n";
const DONE: &[u8] = b"data: [DONE]\n\n";

pub struct Events {
    events: Receiver<Event>,
    writer: Writer,
}

/// Turns the events of a request into those of the stream. Does no IO.
struct Writer {
    /// The beginning of every event.
    prefix: String,
    include_usage: bool,
    /// The attempt that the pieces so far belong to, and the number of the next one.
    attempt: u32,
    next: u64,
    has_role: bool,
}

impl Events {
    pub fn new(head: Head, events: Receiver<Event>, include_usage: bool) -> Self {
        Self { events, writer: Writer::new(&head, include_usage) }
    }

    /// The bytes of the stream. `first` is the first event, if it has arrived.
    pub fn stream(self, first: Option<Event>) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
        let first = first.map_or(Step::Comment, Step::Event);
        futures_util::stream::unfold(Some((self, Some(first))), |state| async {
            let (mut events, first) = state?;
            let step = match first {
                Some(step) => step,
                None => events.step().await,
            };

            let mut bytes = Vec::new();
            let is_last = match step {
                Step::Comment => {
                    bytes.extend_from_slice(COMMENT);
                    false
                }
                Step::Event(event) => events.write_ready(event, &mut bytes),
                // The request ended without a last event: its client had not read for too long.
                Step::Lost => return None,
            };
            Some((Ok(bytes.into()), (!is_last).then_some((events, None))))
        })
    }

    async fn step(&mut self) -> Step {
        match tokio::time::timeout(KEEP_ALIVE, self.events.recv()).await {
            Ok(Some(event)) => Step::Event(event),
            Ok(None) => Step::Lost,
            Err(_) => Step::Comment,
        }
    }

    /// Writes this event and all others that have arrived. Returns whether the stream has ended.
    fn write_ready(&mut self, event: Event, out: &mut Vec<u8>) -> bool {
        let mut is_last = self.writer.write(event, out);
        while !is_last && let Ok(event) = self.events.try_recv() {
            is_last = self.writer.write(event, out);
        }
        is_last
    }
}

enum Step {
    Event(Event),
    Comment,
    Lost,
}

impl Writer {
    fn new(head: &Head, include_usage: bool) -> Self {
        let prefix = format!(
            r#"data: {{"id":"{}","object":"chat.completion.chunk","created":{},"model":{},"choices":["#,
            head.chat_id(),
            head.created,
            Json::of(&head.model).text()
        );
        Self { prefix, include_usage, attempt: 0, next: 0, has_role: false }
    }

    /// Writes one event; returns whether it was the last.
    fn write(&mut self, event: Event, out: &mut Vec<u8>) -> bool {
        let written = match event {
            Event::Piece(chunk) => self.piece(&chunk, out).map(|()| false),
            Event::Ended(ended) => ended
                .map_err(Refusal::from)
                .and_then(|reply| reply::result(&reply))
                .and_then(|result| self.end(&result, out))
                .map(|()| true),
        };
        written.unwrap_or_else(|refusal| {
            let error = Json::of(&refusal.into_reply());
            out.extend_from_slice(b"data: ");
            out.extend_from_slice(error.text().as_bytes());
            out.extend_from_slice(b"\n\n");
            true
        })
    }

    fn piece(&mut self, chunk: &OutputChunk, out: &mut Vec<u8>) -> Result<(), Refusal> {
        if self.next == 0 {
            self.attempt = chunk.attempt;
        }
        if chunk.attempt != self.attempt {
            // What has been sent cannot be taken back, and the model may now say something else.
            return Err(Refusal::internal("the answer began again after a failure; send the request once more"));
        }
        if chunk.seq != self.next {
            return Err(Refusal::internal("a part of the answer was lost; send the request once more"));
        }
        self.next = chunk.seq + 1;

        let delta = chunk.data.text();
        if delta.starts_with('"') {
            self.role(out);
            self.text(delta, out);
            return Ok(());
        }
        let Ok(Delta { delta, logprobs }) = serde_json::from_str(delta) else {
            // The output of a provider that is not a model.
            self.role(out);
            self.text(Json::of(&delta).text(), out);
            return Ok(());
        };
        if delta.get("role").is_none() {
            self.role(out);
        }
        self.has_role = true;
        let logprobs = logprobs.as_ref().map_or("null", Json::text);
        self.event(&[r#"{"index":0,"delta":"#, delta.text(), r#","logprobs":"#, logprobs, NOT_FINISHED], out);
        Ok(())
    }

    fn end(&mut self, result: &ExecResult, out: &mut Vec<u8>) -> Result<(), Refusal> {
        if self.next > 0 && result.chunks.is_some_and(|chunks| chunks > self.next) {
            return Err(Refusal::internal("the end of the answer was lost; send the request once more"));
        }
        let Completion { text, finish_reason, usage, .. } = reply::completion(result);
        self.role(out);
        // A provider need not send its output in pieces.
        if self.next == 0 && !text.is_empty() {
            self.text(Json::of(&text).text(), out);
        }

        let finish_reason = Json::of(&finish_reason.as_deref().unwrap_or("stop"));
        let choice = [r#"{"index":0,"delta":{},"logprobs":null,"finish_reason":"#, finish_reason.text(), "}"];
        self.event(&choice, out);
        if let Some(usage) = usage.filter(|_| self.include_usage) {
            out.extend_from_slice(self.prefix.as_bytes());
            out.extend_from_slice(br#"],"usage":"#);
            out.extend_from_slice(usage.text().as_bytes());
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(DONE);
        Ok(())
    }

    /// Says whose message it is, once.
    fn role(&mut self, out: &mut Vec<u8>) {
        if !std::mem::replace(&mut self.has_role, true) {
            let delta = r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null"#;
            self.event(&[delta, r#","finish_reason":null}"#], out);
        }
    }

    /// A piece of text, as a JSON string.
    fn text(&self, text: &str, out: &mut Vec<u8>) {
        self.event(&[r#"{"index":0,"delta":{"content":"#, text, r#"},"logprobs":null"#, NOT_FINISHED], out);
    }

    fn event(&self, choice: &[&str], out: &mut Vec<u8>) {
        out.extend_from_slice(self.prefix.as_bytes());
        for part in choice {
            out.extend_from_slice(part.as_bytes());
        }
        let end = if self.include_usage {
            "],\"usage\":null}\n\n"
        } else {
            "]}\n\n"
        };
        out.extend_from_slice(end.as_bytes());
    }
}

const NOT_FINISHED: &str = r#","finish_reason":null}"#;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reply::Reply;
    use serde_json::{Value, json};

    fn chunk(attempt: u32, seq: u64, data: &Value) -> Event {
        let chunk = json!({"request_id": "r", "assignment_id": "a", "attempt": attempt, "seq": seq, "data": data});
        Event::Piece(serde_json::from_value(chunk).unwrap())
    }

    fn ended(output: &Value, chunks: u64) -> Event {
        let result = json!({"version": "1", "assignment_id": "a", "request_id": "r", "status": "success",
            "provider_id": "p", "job": {"type": "t"}, "output": output, "chunks": chunks});
        Event::Ended(Ok(Reply::ok(result.to_string().into_bytes())))
    }

    /// The events of a stream, and whether it has ended.
    fn written(include_usage: bool, events: Vec<Event>) -> (Vec<Value>, bool) {
        let mut writer = Writer::new(&Head { id: "r".into(), model: "a \"model\"".into(), created: 7 }, include_usage);
        let (mut out, mut is_last) = (Vec::new(), false);
        for event in events {
            assert!(!is_last, "nothing follows the last event");
            is_last = writer.write(event, &mut out);
        }
        let text = String::from_utf8(out).unwrap();
        let events = text.strip_suffix("\n\n").unwrap().split("\n\n").map(|event| {
            let data = event.strip_prefix("data: ").unwrap();
            assert!(!data.contains('\n'));
            if data == "[DONE]" {
                json!("done")
            } else {
                serde_json::from_str(data).unwrap()
            }
        });
        (events.collect(), is_last)
    }

    fn deltas(events: &[Value]) -> Vec<Value> {
        events
            .iter()
            .map(|event| event["choices"][0]["delta"].clone())
            .collect()
    }

    #[test]
    fn pieces_become_chunks_and_the_result_ends_them() {
        let output = json!({"text": "a\nb", "finish_reason": "length", "usage": {"prompt_tokens": 1}});
        let events = || vec![chunk(1, 0, &json!("a\n")), chunk(1, 1, &json!("b")), ended(&output, 2)];
        let (plain, is_last) = written(false, events());
        assert!(is_last);
        let role = json!({"role": "assistant", "content": ""});
        assert_eq!(deltas(&plain), [role, json!({"content": "a\n"}), json!({"content": "b"}), json!({}), json!(null)]);
        assert_eq!((&plain[0]["id"], &plain[0]["model"]), (&json!("chatcmpl-r"), &json!("a \"model\"")));
        assert_eq!((&plain[3]["choices"][0]["finish_reason"], &plain[4]), (&json!("length"), &json!("done")));
        assert!(plain.iter().all(|event| event.get("usage").is_none()));

        let (with_usage, _) = written(true, events());
        assert_eq!((&with_usage[4]["choices"], &with_usage[4]["usage"]), (&json!([]), &json!({"prompt_tokens": 1})));
        assert!(
            with_usage[..4]
                .iter()
                .all(|event| event["usage"].is_null() && event.get("usage").is_some())
        );
    }

    #[test]
    fn tool_calls_reach_the_client_as_the_model_sent_them() {
        let first = json!({"role": "assistant", "content": null, "tool_calls": [{"index": 0, "id": "c"}]});
        let second = json!({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]});
        let output = json!({"text": "", "finish_reason": "tool_calls", "message": {"tool_calls": []}});
        let (events, _) = written(
            false,
            vec![
                chunk(1, 0, &json!({"delta": first, "logprobs": {"content": []}})),
                chunk(1, 1, &json!({"delta": second})),
                ended(&output, 2),
            ],
        );
        assert_eq!(deltas(&events)[..2], [first, second]);
        assert_eq!(events[0]["choices"][0]["logprobs"], json!({"content": []}));
        assert_eq!(events[2]["choices"][0]["finish_reason"], "tool_calls");
    }

    #[test]
    fn answer_without_pieces_is_sent_at_its_end() {
        let (events, _) = written(false, vec![ended(&json!({"text": "all"}), 0)]);
        assert_eq!(deltas(&events)[1..3], [json!({"content": "all"}), json!({})]);
    }

    #[test]
    fn answer_with_a_hole_ends_with_an_error() {
        let text = json!("t");
        let output = json!({"text": "tt"});
        for events in [
            vec![chunk(1, 0, &text), chunk(1, 2, &text)],
            vec![chunk(1, 1, &text)],
            vec![chunk(1, 0, &text), chunk(2, 0, &text)],
            vec![chunk(1, 0, &text), ended(&output, 2)],
        ] {
            let (events, is_last) = written(false, events);
            let error = &events.last().unwrap()["error"];
            assert!(is_last && error["type"] == "server_error", "{events:?}");
            assert!(!events.contains(&json!("done")), "{events:?}");
        }
    }
}
