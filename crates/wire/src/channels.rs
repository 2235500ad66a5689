//! How parts reach channels: requests on `beamline.channels.v1.*` and `beamline.rpc.v1.*`, JSON.
//!
//! Every answer is an [`Answer`]: `{"ok":true,"result":…}` once the engine has acknowledged, or
//! `{"ok":false,"error":{code,message}}` with the codes of [`crate::realtime::ErrorCode`].

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::BTreeMap;

/// Publish to one channel. Exactly one of `data` (JSON, passed through byte for byte) and `b64` (binary) is set.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Publish {
    pub channel: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Box<RawValue>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub b64: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skip_history: bool,
    /// A second publish with the same key within the history's life is acknowledged, not repeated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
}

/// Publish the same data to many channels.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Broadcast {
    pub channels: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Box<RawValue>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub b64: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skip_history: bool,
}

/// Where a publication landed; both are zero values when the channel keeps no history.
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
    /// 0: position only; -1: all, up to [`crate::limits::HISTORY_PAGE_MAX`].
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
    /// By client id.
    pub presence: BTreeMap<String, PresenceInfo>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PresenceInfo {
    pub user: String,
    pub client: String,
}

#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Disconnect {
    pub user: String,
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
        Self { ok: false, result: None, error: Some(Failure { code, message: message.into() }) }
    }

    /// The result, or the failure that stands in its place.
    pub fn into_result(self) -> Result<T, Failure> {
        match (self.result, self.error) {
            (Some(result), None) if self.ok => Ok(result),
            (_, Some(failure)) => Err(failure),
            _ => Err(Failure { code: 100, message: "the answer has neither result nor error".into() }),
        }
    }
}

/// What a browser called, as the node hands it to `beamline.rpc.v1.<method>`.
///
/// The call's data is the payload of the bus message, byte for byte; who called is in these headers.
/// The reply's payload goes back the same way; a reply with the header [`RPC_ERROR_CODE`] is an error
/// whose payload is its message.
pub const RPC_USER: &str = "beamline-user";
pub const RPC_CLIENT: &str = "beamline-client";
/// `json` or `protobuf`: how the payload is encoded.
pub const RPC_ENCODING: &str = "beamline-encoding";
pub const RPC_ERROR_CODE: &str = "beamline-error-code";
