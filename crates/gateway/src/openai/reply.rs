//! Answers in the form of OpenAI's API.

use super::refusal::Refusal;
use crate::reply::Reply;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use wire::ipc::FrameType;
use wire::json::Json;
use wire::openai::{Completion, Embeddings};
use wire::router::{ExecResult, ResultStatus};

/// What all parts of an answer repeat.
pub struct Head {
    pub id: String,
    pub model: String,
    /// Seconds since the epoch.
    pub created: u64,
}

/// The end of a stream, as its last frame has it.
#[derive(Deserialize)]
struct Complete<'a> {
    #[serde(borrow)]
    result: &'a RawValue,
}

/// The result in the last frame of an answer, if the task succeeded.
pub fn result(reply: &Reply) -> Result<ExecResult, Refusal> {
    let unreadable = |problem: String| Refusal::internal(format!("the result cannot be read: {problem}"));
    let payload = &reply.payload[..];
    let bytes = if reply.kind == FrameType::StreamComplete {
        let complete: Complete<'_> =
            serde_json::from_slice(payload).map_err(|error| unreadable(wire::unfit(&error)))?;
        complete.result.get().as_bytes()
    } else {
        payload
    };

    let result = ExecResult::decode(bytes).map_err(unreadable)?;
    if result.status == ResultStatus::Success {
        Ok(result)
    } else {
        Err(Refusal::of_result(&result))
    }
}

/// The completion in a result. The output of a provider that is not a model may have any form; its text is then its JSON.
pub fn completion(result: &ExecResult) -> Completion {
    let output = result.output.as_ref().map_or("null", Json::text);
    serde_json::from_str(output).unwrap_or_else(|_| Completion { text: output.into(), ..Completion::default() })
}

#[derive(Serialize)]
struct ChatCompletion<'a> {
    id: String,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: [Choice<'a>; 1],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<&'a Json>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    message: Message<'a>,
    logprobs: Option<&'a Json>,
    finish_reason: &'a str,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<Option<&'a str>>,
    #[serde(flatten)]
    more: BTreeMap<String, &'a RawValue>,
}

#[derive(Serialize)]
struct EmbeddingsList<'a> {
    object: &'static str,
    data: Json,
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Json>,
}

impl Head {
    pub fn new(request_id: &str, model: &str) -> Self {
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            id: request_id.into(),
            model: model.into(),
            created: since_1970.map_or(0, |time| time.as_secs()),
        }
    }

    /// The answer to a request for a chat completion.
    pub fn completion(&self, result: &ExecResult) -> Vec<u8> {
        let completion = completion(result);
        let more = completion.message.as_ref().map_or("{}", |message| message.text());
        let mut more: BTreeMap<String, &RawValue> = serde_json::from_str(more).unwrap_or_default();
        more.remove("role");

        // A message of tool calls alone has no text. Content that is not text is among the other fields.
        let text = Some(completion.text.as_str()).filter(|text| !text.is_empty() || more.is_empty());
        let content = (!more.contains_key("content")).then_some(text);
        let choice = Choice {
            index: 0,
            message: Message { role: "assistant", content, more },
            logprobs: completion.logprobs.as_ref(),
            finish_reason: completion.finish_reason.as_deref().unwrap_or("stop"),
        };
        let answer = ChatCompletion {
            id: self.chat_id(),
            object: "chat.completion",
            created: self.created,
            model: &self.model,
            choices: [choice],
            usage: completion.usage.as_ref(),
        };
        serde_json::to_vec(&answer).expect("a completion serializes to JSON")
    }

    /// The answer to a request for embeddings.
    pub fn embeddings(&self, result: &ExecResult) -> Result<Vec<u8>, Refusal> {
        let output = result.output.as_ref().map_or("null", Json::text);
        let Ok(Embeddings { data, usage, .. }) = serde_json::from_str(output) else {
            let text =
                format!("model {:?} has no embeddings: its provider {:?} makes none", self.model, result.provider_id);
            return Err(Refusal::new(StatusCode::BAD_REQUEST, "unsupported_model", text));
        };
        let answer = EmbeddingsList { object: "list", data, model: &self.model, usage };
        Ok(serde_json::to_vec(&answer).expect("embeddings serialize to JSON"))
    }

    pub fn chat_id(&self) -> String {
        format!("chatcmpl-{}", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn with_output(output: &Value) -> ExecResult {
        let result = json!({"version": "1", "assignment_id": "a", "request_id": "r", "status": "success",
            "provider_id": "p", "job": {"type": "t"}, "output": output});
        ExecResult::decode(result.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn completion_has_what_the_model_said() {
        let head = Head::new("r", "m");
        let check = |output: Value, expected: Value, finish_reason: &str| {
            let answer: Value = serde_json::from_slice(&head.completion(&with_output(&output))).unwrap();
            assert_eq!((&answer["id"], &answer["model"]), (&json!("chatcmpl-r"), &json!("m")));
            let choice = &answer["choices"][0];
            assert_eq!((&choice["message"], &choice["finish_reason"]), (&expected, &json!(finish_reason)), "{output}");
            assert_eq!(answer.get("usage"), output.get("usage"));
        };
        check(json!({"text": "hi"}), json!({"role": "assistant", "content": "hi"}), "stop");
        check(
            json!({"text": "", "finish_reason": "length"}),
            json!({"role": "assistant", "content": ""}),
            "length",
        );
        let usage = json!({"prompt_tokens": 1});
        check(
            json!({"text": "", "finish_reason": "tool_calls", "message": {"tool_calls": [1]}, "usage": usage}),
            json!({"role": "assistant", "content": null, "tool_calls": [1]}),
            "tool_calls",
        );
        check(
            json!({"text": "so", "message": {"reasoning_content": "because", "role": "x"}}),
            json!({"role": "assistant", "content": "so", "reasoning_content": "because"}),
            "stop",
        );
        check(
            json!({"text": "", "message": {"content": [1]}}),
            json!({"role": "assistant", "content": [1]}),
            "stop",
        );
        check(json!({"rows": 3}), json!({"role": "assistant", "content": "{\"rows\":3}"}), "stop");
    }

    #[test]
    fn provider_without_embeddings_is_named() {
        let head = Head::new("r", "m");
        let answer = head
            .embeddings(&with_output(&json!({"data": [{"embedding": "AAAA"}], "model": "x"})))
            .unwrap();
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!(answer, json!({"object": "list", "data": [{"embedding": "AAAA"}], "model": "m"}));
        let error = head
            .embeddings(&with_output(&json!({"text": "hi"})))
            .unwrap_err()
            .into_reply()
            .error;
        assert!(error.message.contains("\"p\"") && error.code.as_deref() == Some("unsupported_model"), "{error:?}");
    }
}
