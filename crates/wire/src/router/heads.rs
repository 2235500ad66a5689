//! The parts of messages that must be decoded where the rest is only passed on.

use super::{Context, ErrorBody, ResultStatus, State, tenant_or_default};
use serde::Deserialize;
use serde::de::IgnoredAny;

/// The part of a reply that must be decoded to forward it: whether it is an error, and the assignment of a pushed task.
#[derive(Debug, Deserialize)]
pub struct AnswerHead {
    pub ok: bool,
    pub error: Option<Box<ErrorBody>>,
    pub assignment_id: Option<String>,
    pub result_subject: Option<String>,
}

/// The part of a reply that says whose answer it is.
#[derive(Debug, Deserialize)]
pub struct AnswerContext {
    pub context: Context,
}

/// The part of a request that must be decoded to answer it without the router.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct RequestHead {
    pub request_id: Option<String>,
    pub tenant_id: Option<String>,
    pub trace_id: Option<String>,
}

/// The part of a [`TaskState`] that must be decoded to know whether its task still has to run.
#[derive(Debug, Deserialize)]
pub struct TaskHead {
    pub task_id: String,
    pub state: State,
    #[serde(default)]
    pub assignment_id: Option<String>,
    #[serde(default)]
    tenant_id: String,
    #[serde(default)]
    result: Option<IgnoredAny>,
}

impl TaskHead {
    /// As [`TaskState::tenant`].
    pub fn tenant(&self) -> &str {
        tenant_or_default(&self.tenant_id)
    }

    pub fn has_result(&self) -> bool {
        self.result.is_some()
    }
}

/// The part of a result in the current format that must be decoded to forward it.
#[derive(Debug, Deserialize)]
pub struct ResultHead {
    pub assignment_id: String,
    pub request_id: String,
    pub status: ResultStatus,
    #[serde(default)]
    pub tenant_id: Option<String>,
    #[serde(default)]
    pub chunks: Option<u64>,
    /// Present if this is an envelope and not a result.
    #[serde(default)]
    kind: Option<IgnoredAny>,
}

impl ResultHead {
    pub fn is_envelope(&self) -> bool {
        self.kind.is_some()
    }
}
