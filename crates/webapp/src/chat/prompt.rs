//! Finds the prompt in a message, and builds the decide request for the assistant's answer.

use crate::accounts::ASSISTANT;
use serde::Serialize;
use serde_json::{Map, Value as Json};
use wire::chat::{Message, Prompt, PromptMetadata, Role, Turn};
use wire::json::JsonObject;
use wire::router::{DEFAULT_TENANT, DecideRequest, RequestOptions, Task, VERSION};

/// The prefix of the request ids of answers. It distinguishes them from other tasks without a database query.
pub const REQUEST_PREFIX: &str = "chat-";
/// The tenant that the answers' tasks belong to.
pub const TENANT: &str = DEFAULT_TENANT;
/// How long an answer may take, in ms.
pub const ANSWER_MAX_MS: u64 = 120_000;
/// Maximum number of earlier messages in a request.
pub const CONTEXT_MESSAGES_MAX: i64 = 20;
/// Maximum total size of these messages, in bytes.
const CONTEXT_BYTES_MAX: usize = 16 * 1024;

/// Returns the prompt in a message to the assistant; `None` if the message does not start with a mention of it.
pub fn prompt_in(text: &str) -> Option<&str> {
    let (mention, rest) = text.split_at_checked(1 + ASSISTANT.len())?;
    let is_mention = mention.strip_prefix('@')?.eq_ignore_ascii_case(ASSISTANT);
    let name_continues = rest.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if !is_mention || name_continues {
        return None;
    }
    match rest.trim_start_matches([',', ':']).trim() {
        "" => Some("help"),
        prompt => Some(prompt),
    }
}

pub fn new_request_id() -> String {
    format!("{REQUEST_PREFIX}{}", uuid::Uuid::now_v7().simple())
}

/// Builds the decide request for the answer to `message`. `before` are the room's earlier messages, newest first.
pub fn request(request_id: &str, message: &Message, prompt: &str, before: Vec<Message>) -> String {
    let payload = Prompt {
        prompt: prompt.into(),
        room: message.room.clone(),
        user: message.user.clone(),
        messages: conversation(prompt, before),
    };
    let metadata = PromptMetadata { room: message.room.clone(), user: message.user.clone() };

    to_json(&DecideRequest {
        version: VERSION.into(),
        request_id: request_id.into(),
        tenant_id: TENANT.into(),
        task: Task {
            task_type: "chat".into(),
            payload: Some(JsonObject::of(&payload)),
            payload_ref: None,
        },
        policy_id: None,
        trace_id: Some(new_trace_id()),
        constraints: None,
        metadata: Some(to_map(&metadata)),
        push_assignment: true,
        assignment_subject: None,
        options: Some(RequestOptions { deadline_ms: Some(ANSWER_MAX_MS), ..RequestOptions::default() }),
        run_id: None,
        flow_id: None,
        step_id: None,
        idempotency_key: None,
        deadline: None,
        result_subject: None,
    })
}

/// Creates a new request from a stored one. Returns `None` if the stored one cannot be read.
pub fn renew(request: &str, request_id: &str) -> Option<String> {
    let mut request: DecideRequest = serde_json::from_str(request).ok()?;
    request.request_id = request_id.into();
    request.trace_id = Some(new_trace_id());
    Some(to_json(&request))
}

/// Returns the prompt and as many earlier messages as fit, oldest first.
fn conversation(prompt: &str, before: Vec<Message>) -> Vec<Turn> {
    let mut turns = vec![Turn { role: Role::User, content: prompt.into() }];
    let mut bytes_left = CONTEXT_BYTES_MAX;
    for message in before {
        // Several people talk in a room, so their turns carry names.
        let turn = if message.user == ASSISTANT {
            Turn { role: Role::Assistant, content: message.text }
        } else {
            let content = format!("{}: {}", message.name, message.text);
            Turn { role: Role::User, content }
        };

        let Some(left) = bytes_left.checked_sub(turn.content.len()) else {
            break;
        };
        bytes_left = left;
        // An answer without text has failed or has not arrived yet.
        if !turn.content.is_empty() {
            turns.push(turn);
        }
    }
    turns.reverse();
    turns
}

fn new_trace_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

fn to_json(request: &DecideRequest) -> String {
    serde_json::to_string(request).expect("a request serializes to JSON")
}

fn to_map(value: &impl Serialize) -> Map<String, Json> {
    match serde_json::to_value(value) {
        Ok(Json::Object(map)) => map,
        _ => unreachable!("a struct with named fields serializes to an object"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assistant_is_addressed_at_the_start_only() {
        assert_eq!(prompt_in("@assistant status"), Some("status"));
        assert_eq!(prompt_in("@Assistant, who is here?"), Some("who is here?"));
        assert_eq!(prompt_in("@assistant"), Some("help"));
        for other in ["assistant", "hi @assistant", "@assistants", "@assistant-2 x", "@", "é"] {
            assert_eq!(prompt_in(other), None, "{other}");
        }
    }
}
