//! What routers know of an idempotency key ([`crate::subjects::BUCKET_KEYS`]).

use super::Decision;
use serde::{Deserialize, Serialize};

/// The first request with the key. Without an `answer` the key is reserved: the task of `request_id` has the answer, if
/// its record exists.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeyRecord {
    pub request_id: String,
    /// A hash of what the request asks for, without its ids: another request with the key is a conflict.
    pub digest: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<KeyAnswer>,
}

/// What every request with the key is answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeyAnswer {
    pub decision: Decision,
    /// The assignment of a pushed task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment_id: Option<String>,
}
