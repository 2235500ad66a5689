//! The answer of an endpoint, put together from its pieces or read as a whole.

use super::Outcome;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::fmt;
use wire::json::{Json, JsonObject};
use wire::openai::{Completion, Delta, Tokens};

/// An answer's text, tool calls and the like, in bytes.
const ANSWER_MAX: usize = 1024 * 1024;
/// Strings of a message that a later piece does not continue.
const NOT_CONTINUED: [&str; 4] = ["id", "type", "name", "role"];

/// What has been received of an answer.
#[derive(Default)]
pub struct Answer {
    text: String,
    finish_reason: Option<String>,
    /// Fields of the message besides role and text.
    message: Map<String, Value>,
    logprobs: Option<Value>,
    usage: Option<Json>,
    model: Option<String>,
    size: usize,
}

/// What a piece of the answer adds for those who read it as it arrives.
pub enum Added {
    Text(String),
    More { text: String, delta: Delta },
    Nothing,
}

/// A piece of a streamed answer, or a whole one.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
pub struct Received<'a> {
    #[serde(borrow, default)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(borrow, default)]
    usage: Option<&'a RawValue>,
    #[serde(default)]
    model: Option<String>,
    /// Some endpoints send `"error": null` with every piece.
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    /// Of a piece.
    #[serde(borrow, default)]
    delta: Option<&'a RawValue>,
    /// Of a whole answer.
    #[serde(borrow, default)]
    message: Option<&'a RawValue>,
    #[serde(borrow, default)]
    logprobs: Option<&'a RawValue>,
    #[serde(default)]
    finish_reason: Option<String>,
}

/// The fields of a message or of a piece of one.
#[derive(Default)]
struct Fields<'a> {
    text: Option<String>,
    more: Vec<(String, &'a RawValue)>,
}

impl Received<'_> {
    /// The endpoint's error, if it sent one.
    pub fn error(&self) -> Option<String> {
        let error: Value = serde_json::from_str(self.error?.get()).ok()?;
        let message = error["message"].as_str().map(String::from);
        Some(message.unwrap_or_else(|| error.to_string()))
    }
}

impl Answer {
    /// Reads an answer that is not streamed.
    pub fn of_whole(body: &[u8]) -> Result<Self, Outcome> {
        let broken = |what: &str| Outcome::failed("broken_stream", format!("the answer is no chat completion: {what}"));
        let received: Received<'_> = serde_json::from_slice(body).map_err(|error| broken(&wire::unfit(&error)))?;
        if let Some(error) = received.error() {
            return Err(Outcome::failed("refused", error));
        }
        let choices = received.choices.as_ref();
        if choices.is_none_or(|choices| choices.first().is_none_or(|choice| choice.message.is_none())) {
            return Err(broken("it has no message"));
        }

        let mut answer = Self::default();
        answer.take(received)?;
        // An endpoint that names no reason has finished all the same.
        answer.finish_reason.get_or_insert_with(|| "stop".into());
        Ok(answer)
    }

    /// Takes a piece of the answer, or all of it.
    pub fn take(&mut self, received: Received<'_>) -> Result<Added, Outcome> {
        self.model = self.model.take().or(received.model);
        if let Some(usage) = received.usage.and_then(checked) {
            self.usage = Some(usage);
        }
        let Some(choice) = received.choices.and_then(|choices| choices.into_iter().next()) else {
            return Ok(Added::Nothing);
        };
        self.finish_reason = choice.finish_reason.or(self.finish_reason.take());

        let given = choice.delta.or(choice.message);
        let Fields { text, more } = given
            .and_then(|given| serde_json::from_str(given.get()).ok())
            .unwrap_or_default();
        let text = text.unwrap_or_default();
        let more_size: usize = more.iter().map(|(_, value)| value.get().len()).sum();
        self.size += text.len() + more_size + choice.logprobs.map_or(0, |logprobs| logprobs.get().len());
        if self.size > ANSWER_MAX {
            return Err(Outcome::failed("output", format!("the answer is longer than {ANSWER_MAX} bytes")));
        }

        self.text.push_str(&text);
        if more.is_empty() && choice.logprobs.is_none() {
            return Ok(Added::Text(text));
        }
        for (name, value) in more {
            if let Some(value) = checked(value) {
                let known = self.message.entry(name).or_insert(Value::Null);
                merge(known, value.value());
            }
        }
        let logprobs = choice.logprobs.and_then(checked);
        if let Some(logprobs) = &logprobs {
            merge(self.logprobs.get_or_insert(Value::Null), logprobs.value());
        }

        let delta = given
            .and_then(checked)
            .and_then(|delta| JsonObject::try_from(delta).ok());
        Ok(delta.map_or(Added::Nothing, |delta| Added::More { text, delta: Delta { delta, logprobs } }))
    }

    /// Whether the endpoint has named a reason for the end.
    pub fn has_finished(&self) -> bool {
        self.finish_reason.is_some()
    }

    pub fn tokens(&self) -> Option<Tokens> {
        serde_json::from_str(self.usage.as_ref()?.text()).ok()
    }

    pub fn into_completion(mut self) -> Completion {
        // The position is for putting the pieces together only.
        if let Some(Value::Array(calls)) = self.message.get_mut("tool_calls") {
            for call in calls.iter_mut().filter_map(Value::as_object_mut) {
                call.remove("index");
            }
        }
        Completion {
            text: self.text,
            finish_reason: self.finish_reason,
            message: (!self.message.is_empty()).then(|| JsonObject::of(&self.message)),
            logprobs: self.logprobs.map(|logprobs| Json::of(&logprobs)),
            usage: self.usage,
            model: self.model,
        }
    }
}

fn checked(raw: &RawValue) -> Option<Json> {
    serde_json::from_str(raw.get()).ok()
}

/// Adds a piece to what is known of a value, as the API's own clients do: strings are continued, objects are merged, and
/// the items of a list with an `index` belong to the item with the same one.
fn merge(known: &mut Value, piece: Value) {
    match (known, piece) {
        (_, Value::Null) => {}
        (Value::String(known), Value::String(piece)) => known.push_str(&piece),
        (Value::Object(known), Value::Object(piece)) => {
            for (name, value) in piece {
                let is_set = known.get(&name).is_some_and(|value| !value.is_null());
                if !(is_set && NOT_CONTINUED.contains(&name.as_str())) {
                    merge(known.entry(name).or_insert(Value::Null), value);
                }
            }
        }
        (Value::Array(known), Value::Array(piece)) => {
            for item in piece {
                let place = item.get("index").cloned();
                let same = known
                    .iter_mut()
                    .find(|item| place.is_some() && item.get("index") == place.as_ref());
                match same {
                    Some(same) => merge(same, item),
                    None => known.push(item),
                }
            }
        }
        (known, piece) => *known = piece,
    }
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Message;

        impl<'de> Visitor<'de> for Message {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a message")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Fields::default();
                while let Some(Key(name)) = map.next_key()? {
                    let value: &'de RawValue = map.next_value()?;
                    let text = value.get();
                    match &*name {
                        "role" => {}
                        _ if text == "null" => {}
                        "content" if text.starts_with('"') => fields.text = serde_json::from_str(text).ok(),
                        _ => fields.more.push((name.into_owned(), value)),
                    }
                }
                Ok(fields)
            }
        }

        deserializer.deserialize_map(Message)
    }
}

/// A field's name; borrowed, unless it has escapes.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn together(pieces: &[Value]) -> Value {
        let mut answer = Answer::default();
        for piece in pieces {
            let text = piece.to_string();
            assert!(answer.take(serde_json::from_str(&text).unwrap()).is_ok());
        }
        serde_json::to_value(answer.into_completion()).unwrap()
    }

    #[test]
    fn pieces_of_tool_calls_and_other_fields_are_put_together() {
        let delta = |delta: Value| json!({"model": "m-1", "choices": [{"index": 0, "delta": delta}]});
        let call = |call: Value| delta(json!({"tool_calls": [call]}));
        let answer = together(&[
            delta(json!({"role": "assistant", "content": null})),
            call(json!({"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}})),
            call(json!({"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "{"}})),
            call(json!({"index": 0, "id": "a", "function": {"arguments": "{\"x\":"}})),
            call(json!({"index": 0, "function": {"arguments": "1}"}})),
            call(json!({"index": 1, "function": {"name": "g", "arguments": "}"}})),
            delta(json!({"content": "so", "reasoning_content": "because"})),
            delta(json!({"content": " it is", "reasoning_content": " of that"})),
            json!({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}),
            json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}),
        ]);
        assert_eq!(
            answer,
            json!({"text": "so it is", "finish_reason": "tool_calls", "model": "m-1",
            "usage": {"prompt_tokens": 3, "completion_tokens": 4},
            "message": {"reasoning_content": "because of that", "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1}"}},
                {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ]}})
        );
    }

    #[test]
    fn whole_answer_keeps_what_is_not_text() {
        let read = |answer: Value| match Answer::of_whole(answer.to_string().as_bytes()) {
            Ok(answer) => serde_json::to_value(answer.into_completion()).unwrap(),
            Err(outcome) => json!(outcome.error_code),
        };
        let message = json!({"role": "assistant", "content": "hi", "refusal": null, "annotations": []});
        assert_eq!(
            read(json!({"choices": [{"message": message, "finish_reason": "length", "logprobs": {"content": [1]}}]})),
            json!({"text": "hi", "finish_reason": "length", "message": {"annotations": []},
                "logprobs": {"content": [1]}})
        );
        assert_eq!(read(json!({"error": {"message": "no"}})), json!("refused"));
        for bad in [json!({}), json!([]), json!({"choices": []}), json!({"choices": [{}]}), json!("x")] {
            assert_eq!(read(bad.clone()), json!("broken_stream"), "{bad}");
        }
    }
}
