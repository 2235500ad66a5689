//! Chat rooms: what a page asks by RPC (`chat.*`, JSON) and what channel `chat:<room>` says.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Room {
    pub id: String,
    pub name: String,
}

/// One message; `id` grows in the order of a room's history.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Message {
    pub id: i64,
    pub room: String,
    pub user: String,
    pub name: String,
    pub text: String,
    /// Milliseconds since the epoch.
    pub at: i64,
    /// The sender's own id of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nonce: Option<String>,
    pub state: State,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<i64>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Of an answer: up to which [`Event::Delta`] `text` goes.
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
    /// New, or in place of the one with its id.
    Message {
        message: Message,
    },
    /// A piece of message `id`. `seq` counts from 1 within an attempt; a larger attempt begins the text anew.
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
    /// On `chat:lobby`: there is a new room.
    Room {
        room: Room,
    },
}

/// `chat.create_room`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreateRoom {
    pub name: String,
}

/// `chat.history`: the messages before one, or the newest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct History {
    pub room: String,
    #[serde(default)]
    pub before: Option<i64>,
    #[serde(default)]
    pub limit: Option<i64>,
}

/// `chat.send`: with the same nonce again, the same message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Send {
    pub room: String,
    pub text: String,
    pub nonce: String,
}

/// `chat.typing`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InRoom {
    pub room: String,
}

/// `chat.stop`, `chat.retry`.
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

/// Oldest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Messages {
    pub messages: Vec<Message>,
    /// There are older ones.
    pub more: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sent {
    pub message: Message,
}
