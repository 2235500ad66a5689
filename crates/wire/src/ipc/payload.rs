//! The JSON payloads of frames.

use super::ErrorCode;
use crate::json::{Json, JsonObject};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

/// What the client of a TASK_SUBMIT waits for.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq, Default)]
#[serde(rename_all = "snake_case")]
pub enum Wait {
    #[default]
    Decision,
    Result,
    Stream,
}

/// TASK_SUBMIT. `file`, `line`, `context` and `params` become the payload of the task.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskSubmit {
    pub command: String,
    pub task_type: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<Json>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub params: Option<JsonObject>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    #[serde(default)]
    pub wait: Wait,
    /// Assign the task to a worker even if the client waits for the decision only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub push_assignment: bool,
}

impl TaskSubmit {
    /// A submit of this type that sets nothing else and waits for the decision.
    pub fn new(task_type: &str) -> Self {
        Self {
            command: "task_submit".into(),
            task_type: task_type.into(),
            file: None,
            line: None,
            context: None,
            params: None,
            tenant_id: None,
            policy_id: None,
            request_id: None,
            trace_id: None,
            traceparent: None,
            idempotency_key: None,
            timeout_ms: None,
            wait: Wait::default(),
            push_assignment: false,
        }
    }

    /// The payload of the task that this submits.
    pub fn payload(&self) -> JsonObject {
        let Self { context, file, line, params, .. } = self;
        JsonObject::of(&TaskPayload { context, file, line: *line, params })
    }
}

/// The payload of a task that came over IPC.
#[derive(Serialize)]
struct TaskPayload<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    context: &'a Option<Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: &'a Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    params: &'a Option<JsonObject>,
}

/// TASK_QUERY, TASK_CANCEL and STREAM_SUBSCRIBE. `task_id` is the request id of the task's submit.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskRef {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    pub task_id: String,
    /// Whose task it is; absent: what the gateway's settings say of the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
}

/// The reply to TASK_QUERY and TASK_CANCEL.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskAnswer {
    pub task_id: String,
    pub state: crate::router::State,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<crate::router::Decision>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<crate::router::ExecResult>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StreamData {
    pub task_id: String,
    pub seq: u64,
    pub data: Json,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct StreamComplete {
    pub task_id: String,
    /// The ExecResult exactly as the worker published it.
    pub result: Box<RawValue>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Capabilities {
    pub protocol_versions: Vec<u8>,
    pub message_types: Vec<u8>,
    pub max_frame_size: usize,
    pub features: Vec<String>,
    /// State of the gateway's circuit breaker for the router: `closed`, `open` or `half_open`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub breaker: String,
    pub limits: Limits,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    pub max_connections: usize,
    pub max_in_flight: usize,
    pub max_in_flight_v1: usize,
    pub max_in_flight_v2: usize,
    /// Of one user, over all of its connections; 0 from gateways that do not say it.
    #[serde(default)]
    pub max_in_flight_per_user: usize,
    pub request_timeout_ms: u64,
    /// A longer deadline counts as this; 0 from gateways that do not say it.
    #[serde(default)]
    pub max_deadline_ms: u64,
}

/// RESPONSE_ERROR and STREAM_ERROR.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorPayload {
    pub ok: bool,
    pub error: ErrorDetail,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<ExchangeContext>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorDetail {
    pub code: u16,
    pub message: String,
    /// The router's HTTP status and, in `reason`, its error code; only for REJECTED.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Value>,
}

#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct ExchangeContext {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
}

impl ErrorPayload {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let error = ErrorDetail {
            code: code as u16,
            message: message.into(),
            status: None,
            reason: None,
            retry_after_ms: None,
            details: None,
        };
        Self { ok: false, error, context: None }
    }

    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("an error payload serializes to JSON")
    }
}
