//! The body of a request to the endpoint: what the task says, and what the provider's settings add and replace.

use super::{Job, Outcome};
use crate::Model;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use wire::json::Json;
use wire::openai::CHAT;

/// Parameters of the API that tasks of other types than [`CHAT`] may have. Their payloads also have fields that are not
/// for the endpoint.
const PARAMETERS: &[&str] = &[
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "parallel_tool_calls",
    "presence_penalty",
    "reasoning_effort",
    "response_format",
    "seed",
    "stop",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
];
/// Fields of a task that the request does not repeat.
const REPLACED: &[&str] = &["messages", "model", "prompt", "stream", "stream_options"];

type Fields<'a> = BTreeMap<String, &'a RawValue>;

pub struct Body<'a> {
    model: &'a str,
    /// Passed on unchanged.
    fields: Fields<'a>,
    messages: Option<Messages<'a>>,
    stream: Option<Stream>,
}

/// How a chat completion is streamed; `None` in [`Body`] for an answer as a whole.
struct Stream {
    include_usage: bool,
}

struct Messages<'a> {
    system: Option<&'a str>,
    given: Given<'a>,
}

enum Given<'a> {
    List(Vec<&'a RawValue>),
    Prompt(String),
}

impl<'a> Body<'a> {
    /// A chat completion. That of a task of type [`CHAT`] is streamed if the task says so, or if the first token has a
    /// time limit; all others are.
    pub fn of_chat(job: &'a Job<'_>, config: &'a Model) -> Result<Self, Outcome> {
        let mut fields = fields_of(job);
        let given = given(&fields)?;
        if fields.get("n").is_some_and(|n| !["1", "null"].contains(&n.get())) {
            return Err(Outcome::failed("invalid_task", "n is not 1; a task has one answer"));
        }

        let is_whole = job.task.task_type == CHAT
            && fields.get("stream").is_none_or(|stream| stream.get() != "true")
            && config.first_token_timeout.is_none();
        fields.retain(|name, _| {
            let name = name.as_str();
            !REPLACED.contains(&name) && (job.task.task_type == CHAT || PARAMETERS.contains(&name))
        });

        Ok(Self {
            model: &config.model,
            fields,
            messages: Some(Messages { system: config.system.as_deref(), given }),
            stream: (!is_whole).then_some(Stream { include_usage: config.include_usage }),
        })
    }

    pub fn of_embeddings(job: &'a Job<'_>, config: &'a Model) -> Result<Self, Outcome> {
        let mut fields = fields_of(job);
        fields.remove("model");
        if !fields.contains_key("input") {
            return Err(Outcome::failed("invalid_task", "the task has no input"));
        }
        Ok(Self { model: &config.model, fields, messages: None, stream: None })
    }

    pub fn is_streamed(&self) -> bool {
        self.stream.is_some()
    }
}

/// The fields of the payload or, for a task that came over IPC or HTTP, of `payload.params`.
fn fields_of<'a>(job: &'a Job<'_>) -> Fields<'a> {
    let object = |text: &'a str| serde_json::from_str::<Fields<'a>>(text).unwrap_or_default();
    let Some(payload) = &job.task.payload else {
        return Fields::new();
    };
    let mut fields = object(payload.text());
    if let Some(params) = fields.remove("params") {
        for (name, value) in object(params.get()) {
            fields.entry(name).or_insert(value);
        }
    }
    fields
}

/// The task's `messages`, or its `prompt` if it has none.
fn given<'a>(fields: &Fields<'a>) -> Result<Given<'a>, Outcome> {
    let messages = fields.get("messages");
    let messages = messages.and_then(|messages| serde_json::from_str::<Vec<&'a RawValue>>(messages.get()).ok());
    if let Some(messages) = messages.filter(|messages| !messages.is_empty()) {
        return Ok(Given::List(messages));
    }
    let prompt = fields
        .get("prompt")
        .and_then(|prompt| serde_json::from_str(prompt.get()).ok());
    prompt
        .map(Given::Prompt)
        .ok_or_else(|| Outcome::failed("invalid_task", "the task has neither prompt nor messages"))
}

impl Serialize for Body<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("model", self.model)?;
        if let Some(messages) = &self.messages {
            map.serialize_entry("messages", messages)?;
        }
        for (name, value) in &self.fields {
            map.serialize_entry(name, value)?;
        }
        if let Some(stream) = &self.stream {
            map.serialize_entry("stream", &true)?;
            if stream.include_usage {
                map.serialize_entry("stream_options", &StreamOptions { include_usage: true })?;
            }
        }
        map.end()
    }
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
}

impl Serialize for Messages<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let message = |role, content| Json::of(&Message { role, content });
        let system = self.system.map(|content| message("system", content));
        match &self.given {
            Given::List(given) => {
                let system = system.iter().map(Item::Made);
                serializer.collect_seq(system.chain(given.iter().map(|message| Item::Given(message))))
            }
            Given::Prompt(prompt) => serializer.collect_seq(system.into_iter().chain([message("user", prompt)])),
        }
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum Item<'a> {
    Made(&'a Json),
    Given(&'a RawValue),
}
