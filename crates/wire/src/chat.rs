//! Chat rooms: the JSON of the RPCs `chat.*` and of the publications on channel `chat:<room>`.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Room {
    pub id: String,
    pub name: String,
}

/// One message; ids ascend in the order of a room's history.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Message {
    pub id: i64,
    pub room: String,
    pub user: String,
    pub name: String,
    pub text: String,
    /// Milliseconds since the epoch.
    pub at: i64,
    /// The id that the sender chose, which makes `chat.send` idempotent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nonce: Option<String>,
    pub state: State,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<i64>,
    /// For an answer: who asked for it. That user may stop it and ask again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asker: Option<String>,
    /// Why the answer failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// For an answer: the attempt and, in `seq`, the last [`Event::Delta`] that `text` includes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Done,
    Streaming,
    Failed,
    Stopped,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Streaming => "streaming",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        }
    }

    pub fn parse(text: &str) -> Self {
        match text {
            "streaming" => Self::Streaming,
            "failed" => Self::Failed,
            "stopped" => Self::Stopped,
            _ => Self::Done,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// A new message, or a new version of the one with its id.
    Message {
        message: Message,
    },
    /// A piece of message `id`. `seq` counts from 1 within an attempt; a higher attempt starts the text over.
    Delta {
        id: i64,
        attempt: u32,
        seq: u64,
        text: String,
    },
    Typing {
        user: String,
        name: String,
    },
    /// A new room, published on `chat:lobby`.
    Room {
        room: Room,
    },
    /// On `chat:lobby` and in the room: the room of this id is deleted, with all its messages.
    Gone {
        room: String,
    },
}

/// The payload of the task that answers a message to the assistant.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Prompt {
    pub prompt: String,
    pub room: String,
    pub user: String,
    /// The conversation so far, oldest first. The last turn is the prompt.
    pub messages: Vec<Turn>,
}

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Turn {
    pub role: Role,
    pub content: String,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    User,
    Assistant,
}

/// The metadata of the task that answers a message to the assistant.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct PromptMetadata {
    pub room: String,
    pub user: String,
}

/// The request of `chat.create_room`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreateRoom {
    pub name: String,
}

/// The request of `chat.history`: the messages before the one with id `before`, or the newest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct History {
    pub room: String,
    #[serde(default)]
    pub before: Option<i64>,
    #[serde(default)]
    pub limit: Option<i64>,
}

/// The request of `chat.send`. A repeated nonce returns the message that was already sent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Send {
    pub room: String,
    pub text: String,
    pub nonce: String,
}

/// The request of `chat.typing` and `chat.delete_room`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InRoom {
    pub room: String,
}

/// The request of `chat.stop` and `chat.retry`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OfMessage {
    pub message: i64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rooms {
    pub rooms: Vec<Room>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RoomCreated {
    pub room: Room,
}

/// A page of a room's history, oldest message first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Messages {
    pub messages: Vec<Message>,
    /// Whether older messages exist.
    pub more: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sent {
    pub message: Message,
}
