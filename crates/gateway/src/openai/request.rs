//! Reads a request's body. Only what the gateway acts on is interpreted; the rest reaches the model as it was.

use super::refusal::Refusal;
use serde::Deserialize;
use serde_json::value::RawValue;
use wire::json::JsonObject;
use wire::openai::{CHAT, EMBEDDINGS};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Chat,
    Embeddings,
}

impl Kind {
    pub fn task_type(self) -> &'static str {
        match self {
            Self::Chat => CHAT,
            Self::Embeddings => EMBEDDINGS,
        }
    }
}

/// What a client asks for.
#[derive(Debug)]
pub struct Asks {
    pub kind: Kind,
    pub model: String,
    pub streams: bool,
    /// A stream ends with its token usage.
    pub include_usage: bool,
    pub body: JsonObject,
}

/// The fields that the gateway acts on, as text; a field that is null counts as missing.
#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow, default)]
    model: Option<&'a RawValue>,
    #[serde(borrow, default)]
    messages: Option<&'a RawValue>,
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
    #[serde(borrow, default)]
    stream: Option<&'a RawValue>,
    #[serde(borrow, default)]
    stream_options: Option<&'a RawValue>,
    #[serde(borrow, default)]
    n: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: Option<bool>,
}

impl Asks {
    pub fn read(kind: Kind, body: &[u8]) -> Result<Self, Refusal> {
        let unfit = |error: serde_json::Error| Refusal::invalid(None, format!("the body does not fit: {error}"));
        let body: JsonObject = serde_json::from_slice(body).map_err(unfit)?;
        let fields: Fields<'_> = serde_json::from_str(body.text()).map_err(unfit)?;

        let model = fields
            .model
            .and_then(|model| serde_json::from_str::<String>(model.get()).ok());
        let model = model
            .filter(|model| !model.is_empty())
            .ok_or_else(|| Refusal::invalid(Some("model"), "model must be the name of a model; see /v1/models"))?;
        // No policy can have such a name, and the router would call the field by its own.
        if !wire::id::is_valid(&model) {
            return Err(Refusal::unknown_model(&model.chars().take(64).collect::<String>()));
        }

        let (streams, include_usage) = match kind {
            Kind::Chat => fields.check_chat()?,
            Kind::Embeddings => {
                fields
                    .input
                    .ok_or_else(|| Refusal::invalid(Some("input"), "input must be text or a list of texts"))?;
                (false, false)
            }
        };
        Ok(Self { kind, model, streams, include_usage, body })
    }
}

impl Fields<'_> {
    /// Whether the answer is streamed, and whether its stream ends with the usage.
    fn check_chat(&self) -> Result<(bool, bool), Refusal> {
        let messages = self.messages.map_or("", RawValue::get);
        let is_list = messages
            .strip_prefix('[')
            .is_some_and(|rest| !rest.trim_start().starts_with(']'));
        if !is_list {
            return Err(Refusal::invalid(Some("messages"), "messages must be a list with at least one message"));
        }
        if self.n.is_some_and(|n| n.get() != "1") {
            return Err(Refusal::invalid(Some("n"), "n must be 1: a request has one answer; send it several times"));
        }

        let streams = self.stream.map_or("false", RawValue::get);
        if !["true", "false"].contains(&streams) {
            return Err(Refusal::invalid(Some("stream"), "stream must be true or false"));
        }
        let options = self
            .stream_options
            .map(|options| serde_json::from_str::<StreamOptions>(options.get()));
        let options = options
            .transpose()
            .map_err(|error| Refusal::invalid(Some("stream_options"), format!("stream_options: {error}")))?;
        let include_usage = options.and_then(|options| options.include_usage).unwrap_or_default();
        Ok((streams == "true", include_usage))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_is_checked_as_far_as_the_gateway_acts_on_it() {
        let check = |kind: Kind, body: &str, expected: Result<(bool, bool), Option<&str>>| {
            let read = Asks::read(kind, body.as_bytes());
            let found = match &read {
                Ok(asks) => Ok((asks.streams, asks.include_usage)),
                Err(_) => Err(read.unwrap_err().into_reply().error.param),
            };
            assert_eq!(found, expected.map_err(|param| param.map(String::from)), "{body}");
        };
        let chat = |fields: &str, expected| {
            check(Kind::Chat, &format!(r#"{{"model":"m","messages":[{{}}]{fields}}}"#), expected);
        };
        chat("", Ok((false, false)));
        chat(r#","stream":null,"n":null,"stream_options":null"#, Ok((false, false)));
        chat(r#","stream":true,"n":1,"temperature":[]"#, Ok((true, false)));
        chat(r#","stream":true,"stream_options":{"include_usage":true}"#, Ok((true, true)));
        chat(r#","stream":"yes""#, Err(Some("stream")));
        chat(r#","stream_options":{"include_usage":7}"#, Err(Some("stream_options")));
        for n in ["2", "0", "1.5", "\"1\"", "[1]"] {
            chat(&format!(r#","n":{n}"#), Err(Some("n")));
        }
        chat(r#","model":"other""#, Err(None));
        chat(&format!(r#","x":{}{}"#, "[".repeat(5000), "]".repeat(5000)), Err(None));

        for messages in ["", r#","messages":null"#, r#","messages":[ ]"#, r#","messages":"hi""#, r#","messages":{}"#] {
            check(Kind::Chat, &format!(r#"{{"model":"m"{messages}}}"#), Err(Some("messages")));
        }
        for model in ["", r#""model":7,"#, r#""model":"","#, r#""model":null,"#, "\"model\":\"a\\u0000\","] {
            check(Kind::Chat, &format!(r#"{{{model}"messages":[1]}}"#), Err(Some("model")));
        }
        for body in ["", "[]", "\"x\"", "{", "{}x", "\u{feff}{}"] {
            check(Kind::Chat, body, Err(None));
        }
        check(Kind::Embeddings, r#"{"model":"m","input":["a"],"stream":7}"#, Ok((false, false)));
        check(Kind::Embeddings, r#"{"model":"m"}"#, Err(Some("input")));
    }
}
