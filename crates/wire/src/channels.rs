//! The bus API of channels: JSON requests on `beamline.channels.v1.*`, and RPCs on `beamline.rpc.v1.*`.
//!
//! Every reply to a channel operation is an [`Answer`]: `{"ok":true,"result":…}` once the engine has acknowledged, or
//! `{"ok":false,"error":{code,message}}` with the codes of [`crate::realtime::ErrorCode`].

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use std::collections::BTreeMap;

/// Publishes to one channel. Exactly one of `data` (JSON, passed through byte for byte) and `b64` (binary) is set.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Publish {
    pub channel: String,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub data: Option<Box<RawValue>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub b64: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skip_history: bool,
    /// A repeated publish with the same key is acknowledged but not delivered again, for as long as the history lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
}

/// Publishes the same data to many channels.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Broadcast {
    pub channels: Vec<String>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub data: Option<Box<RawValue>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub b64: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skip_history: bool,
}

/// Reads a present key as a value even if it is `null`, which is valid JSON data.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Box<RawValue>>, D::Error> {
    Box::<RawValue>::deserialize(deserializer).map(Some)
}

/// The position of a publication in a channel's history; 0 and empty when the channel keeps no history.
#[derive(Debug, Clone, Serialize, Deserialize, Default, PartialEq, Eq)]
pub struct Position {
    #[serde(default)]
    pub offset: u64,
    #[serde(default)]
    pub epoch: String,
}

#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct History {
    pub channel: String,
    /// Number of publications; 0 returns only the position, -1 all up to [`crate::limits::HISTORY_PAGE_MAX`].
    #[serde(default)]
    pub limit: i32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Position>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reverse: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Presence {
    pub channel: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PresenceResult {
    /// Keyed by client id.
    pub presence: BTreeMap<String, PresenceInfo>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PresenceInfo {
    pub user: String,
    pub client: String,
}

/// Ends the connections of a user.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Disconnect {
    pub user: String,
    /// Only those whose token has this `sid`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
}

/// The answer to a [`Broadcast`], in the order of its channels.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Positions {
    pub positions: Vec<Position>,
}

/// The channels that have subscribers on this node.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Channels {
    pub channels: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Info {
    pub nodes: Vec<NodeInfo>,
}

#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct NodeInfo {
    pub name: String,
    pub version: String,
    pub engine: String,
    pub num_clients: usize,
    pub num_channels: usize,
}

/// The empty result of an operation: `{}`.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Done {}

/// An answer of the HTTP server API: `{"result":…}` or `{"error":{code,message}}`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ApiAnswer<T> {
    Result(T),
    Error(Failure),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answer<T> {
    pub ok: bool,
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    pub result: Option<T>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    pub code: u32,
    pub message: String,
}

impl<T> Answer<T> {
    pub fn success(result: T) -> Self {
        Self { ok: true, result: Some(result), error: None }
    }

    pub fn failure(code: u32, message: impl Into<String>) -> Self {
        Self {
            ok: false,
            result: None,
            error: Some(Failure { code, message: message.into() }),
        }
    }

    /// Returns the result or the failure. An answer with neither counts as a failure with code 100.
    pub fn into_result(self) -> Result<T, Failure> {
        match (self.result, self.error) {
            (Some(result), None) if self.ok => Ok(result),
            (_, Some(failure)) => Err(failure),
            _ => Err(Failure {
                code: 100,
                message: "the answer has neither a result nor an error".into(),
            }),
        }
    }
}

// A node forwards a client's RPC to `beamline.rpc.v1.<method>`. The payload of the bus message is the call's data, byte
// for byte; the headers below name the caller. The reply's payload returns to the client in the same way.

/// Header with the caller's user id.
pub const RPC_USER: &str = "beamline-user";
/// Header with the id of the caller's connection.
pub const RPC_CLIENT: &str = "beamline-client";
/// Header with the encoding of the payload, `json` or `protobuf`.
pub const RPC_ENCODING: &str = "beamline-encoding";
/// Header that marks a reply as an error with this code; the payload is the error message.
pub const RPC_ERROR_CODE: &str = "beamline-error-code";
