//! Messages between clients, routers and workers. v1 is frozen: fields may only be added.

use crate::json::{Json, JsonObject};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub mod admin;
mod error;
#[cfg(test)]
mod golden;
pub mod headers;
mod heads;
mod keys;
mod load;
mod result;
pub mod services;

pub use admin::{Breakers, Complexity, DryRun, ExtensionsHealth, PolicyQuery};
pub use error::{ErrorBody, ErrorResponse, IntakeCode, RouterCode};
pub use heads::{AnswerContext, AnswerHead, RequestHead, ResultHead, TaskHead};
pub use keys::{KeyAnswer, KeyRecord};
pub use load::{Backpressure, BackpressurePolicy, BackpressureStatus, LoadMetrics, LoadThresholds, StatusReply};
pub use result::{ExecResult, JobType, ResultStatus, TextOutput};

pub const VERSION: &str = "1";
/// The tenant of requests that name none.
pub const DEFAULT_TENANT: &str = "default";

/// Asks the router which provider handles a task.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DecideRequest {
    pub version: String,
    pub request_id: String,
    pub tenant_id: String,
    pub task: Task,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub constraints: Option<Constraints>,
    /// Policy conditions can refer to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Map<String, Value>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub push_assignment: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment_subject: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<RequestOptions>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flow_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
    /// Milliseconds since the epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<u64>,
    /// Where the client receives a copy of the result of a pushed task (see [`crate::subjects::result_copy`]). Not part
    /// of what identifies a repeated request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_subject: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Task {
    #[serde(rename = "type")]
    pub task_type: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<JsonObject>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload_ref: Option<String>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, Default)]
pub struct Constraints {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_latency_ms: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cost: Option<f64>,
}

#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct RequestOptions {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Retry {
    pub max_attempts: u32,
    pub backoff_ms: u64,
}

impl Default for Retry {
    fn default() -> Self {
        Self { max_attempts: 2, backoff_ms: 200 }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DecideResponse {
    pub ok: bool,
    pub decision: Decision,
    pub context: Context,
    /// The assignment of a pushed task, which distinguishes its output and result from those of other tasks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment_id: Option<String>,
    /// The request's, if the router sees to it that a copy of the result goes there. Without it, the client looks for
    /// the result in the task's record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_subject: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct Decision {
    pub provider_id: String,
    /// From 0 to 100.
    pub priority: u32,
    pub expected_latency_ms: u64,
    pub expected_cost: f64,
    pub reason: Reason,
    pub policy_id: String,
    pub policy_version: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback_used: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sticky_key: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub explanation: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Map<String, Value>>,
    /// The price of the provider's tokens, if the policy names one: a task whose tokens are known costs that much instead
    /// of `expected_cost`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price: Option<crate::openai::Price>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq, Hash)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    Sticky,
    Weighted,
    BestScore,
    Fallback,
    Retry,
    CircuitBreakerFallback,
}

impl Reason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sticky => "sticky",
            Self::Weighted => "weighted",
            Self::BestScore => "best_score",
            Self::Fallback => "fallback",
            Self::Retry => "retry",
            Self::CircuitBreakerFallback => "circuit_breaker_fallback",
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Context {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
}

/// The assignment of a task to a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecAssignment {
    pub version: String,
    pub assignment_id: String,
    pub request_id: String,
    pub tenant_id: String,
    pub executor: Executor,
    pub job: Task,
    pub options: ExecOptions,
    pub correlation: Correlation,
    pub decision: Decision,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Map<String, Value>>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Executor {
    pub provider_id: String,
    /// The transport to the worker; always `nats`, even on the embedded bus.
    pub channel: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecOptions {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<Value>,
    pub deadline_ms: u64,
    pub retry: Retry,
}

#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Correlation {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    /// Where the worker publishes a copy of the result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_subject: Option<String>,
}

/// One piece of a running task's output. `seq` counts from 0 within each attempt, `attempt` from 1.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OutputChunk {
    pub request_id: String,
    /// A v1 worker need not name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    pub assignment_id: String,
    #[serde(default)]
    pub attempt: u32,
    pub seq: u64,
    pub data: Json,
}

/// What the outcome of an assignment means for its provider's circuit breaker.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    Success,
    /// The failure counts against the provider.
    Failed,
    /// The provider's endpoint asks for a pause of this length.
    CoolDown {
        retry_after_seconds: u64,
    },
    /// The outcome says nothing about the provider.
    Neutral,
}

/// The outcome of an assignment. The router that recorded the result publishes it once to all routers, on
/// [`crate::subjects::OUTCOMES`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProviderOutcome {
    pub version: String,
    pub assignment_id: String,
    pub provider_id: String,
    #[serde(flatten)]
    pub verdict: Verdict,
    pub latency_ms: u64,
    pub choice: Choice,
}

/// The state in which an assignment's provider was chosen.
#[derive(Debug, Clone, Serialize, Deserialize, Default, PartialEq, Eq)]
#[serde(default)]
pub struct Choice {
    /// The [`crate::status::BreakerStatus::generation`] of the breaker that all tenants share.
    pub generation: u64,
    /// The tenant that owns the deciding policy (the task's tenant or `default`) and, in `policy_id`, its name.
    pub policy_tenant: String,
    pub policy_id: String,
    /// The generation of the policy's own breaker, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy_generation: Option<u64>,
    /// Whether the client set the deadline of the task.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub client_deadline: bool,
}

/// Metered usage of one assignment, from the router to billing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Usage {
    pub version: String,
    pub tenant_id: String,
    pub provider_id: String,
    pub event_type: String,
    pub latency_ms: u64,
    pub cost: f64,
    pub status: ResultStatus,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    /// Milliseconds since the epoch.
    pub timestamp: u64,
    pub assignment_id: String,
    pub request_id: String,
}

/// What `get_decision` and `cancel` ask about. The header `tenant_id` beats the field; without either it is a task of
/// [`DEFAULT_TENANT`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskQuery {
    pub request_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    /// With `get_decision`: where the client receives a copy of the result, once there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_subject: Option<String>,
}

/// Tells every worker to stop the runs of a task. Older routers name the request only.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CancelRun {
    pub request_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment_id: Option<String>,
}

impl CancelRun {
    /// Whether the message is for this run. Without a tenant it is for a task of [`DEFAULT_TENANT`].
    pub fn is_for(&self, tenant_id: &str, request_id: &str, assignment_id: &str) -> bool {
        self.request_id == request_id
            && self.tenant_id.as_deref().unwrap_or(DEFAULT_TENANT) == tenant_id
            && self.assignment_id.as_deref().is_none_or(|named| named == assignment_id)
    }
}

/// What a waiting client knows about its task. Output and results travel under the request id, which tasks of several
/// tenants may share; this distinguishes them.
#[derive(Debug, Clone)]
pub struct Awaited {
    pub tenant_id: String,
    /// Known once the router has answered.
    pub assignment_id: Option<String>,
}

impl Awaited {
    /// Whether output or a result belongs to this task. `None` if that is not known yet: the assignment is not known,
    /// and a v1 worker need not name the tenant.
    pub fn owns(&self, assignment_id: &str, tenant_id: Option<&str>) -> Option<bool> {
        match (&self.assignment_id, tenant_id) {
            (Some(ours), _) => Some(ours == assignment_id),
            (None, Some(tenant)) => Some(tenant == self.tenant_id),
            (None, None) => None,
        }
    }
}

/// Where a pushed task stands; kept in bucket [`crate::subjects::BUCKET_TASKS`] under
/// [`task_key`](crate::subjects::task_key).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskState {
    pub task_id: String,
    pub state: State,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<Decision>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<ExecResult>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment_id: Option<String>,
    /// The requesting tenant and, in `digest`, a hash of the request: another request with the same id is a conflict.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tenant_id: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub digest: String,
    /// For the routers only; never part of a reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choice: Option<Choice>,
    /// Where copies of the result go, at most [`Self::RESULT_SUBJECTS_MAX`]; for the routers only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub result_subjects: Vec<String>,
    /// When a router created the record, in milliseconds since the epoch, if it appended the assignment after that; for
    /// the routers only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserved_ms: Option<u64>,
    /// Whether the assignment is known to be stored, so that it is not appended again; for the routers only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub committed: bool,
}

impl TaskState {
    pub const RESULT_SUBJECTS_MAX: usize = 8;

    /// Notes where a copy of the result goes, unless it is there already or too many wait for it. See
    /// [`Self::will_tell`].
    pub fn tell(&mut self, result_subject: &str) {
        let is_new = !self.result_subjects.iter().any(|subject| subject == result_subject);
        if is_new && self.result.is_none() && self.result_subjects.len() < Self::RESULT_SUBJECTS_MAX {
            self.result_subjects.push(result_subject.into());
        }
    }

    /// Whether a copy of the result will go to this subject.
    pub fn will_tell(&self, result_subject: &str) -> bool {
        self.result.is_none() && self.result_subjects.iter().any(|subject| subject == result_subject)
    }

    /// Clears what is for the routers only.
    #[must_use]
    pub fn public(self) -> Self {
        Self {
            digest: String::new(),
            choice: None,
            result_subjects: Vec::new(),
            reserved_ms: None,
            committed: false,
            ..self
        }
    }

    /// The tenant that owns the task.
    pub fn tenant(&self) -> &str {
        tenant_or_default(&self.tenant_id)
    }
}

fn tenant_or_default(tenant_id: &str) -> &str {
    if tenant_id.is_empty() {
        DEFAULT_TENANT
    } else {
        tenant_id
    }
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Queued,
    Assigned,
    Running,
    Completed,
    Failed,
    Cancelled,
}

impl State {
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskAnswer {
    pub ok: bool,
    pub task: TaskState,
    /// As in [`DecideResponse::result_subject`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_subject: Option<String>,
}

/// A message that could not be processed, as stored in the stream DLQ.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeadLetter {
    pub original_subject: String,
    pub reason: String,
    pub delivered: u32,
    pub first_seen_ms: u64,
    pub last_seen_ms: u64,
    pub headers: Vec<(String, String)>,
    /// The payload as text, or as base64 (with `base64` set) if it is not UTF-8.
    pub payload: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub base64: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assignment_identifies_a_task_before_its_tenant_does() {
        for (known, told, tenant, expected) in [
            (Some("a-1"), "a-1", None, Some(true)),
            (Some("a-1"), "a-1", Some("another"), Some(true)),
            (Some("a-1"), "a-2", Some("acme"), Some(false)),
            (None, "a-1", Some("acme"), Some(true)),
            (None, "a-1", Some("beta"), Some(false)),
            (None, "a-1", None, None),
        ] {
            let awaited = Awaited { tenant_id: "acme".into(), assignment_id: known.map(String::from) };
            assert_eq!(awaited.owns(told, tenant), expected, "{known:?} {told} {tenant:?}");
        }
    }

    #[test]
    fn cancel_is_for_the_run_that_it_names_only() {
        for (tenant, assignment, expected) in [
            (Some("acme"), Some("a-1"), true),
            (Some("acme"), None, true),
            (Some("acme"), Some("a-2"), false),
            (Some("beta"), Some("a-1"), false),
            (None, None, false),
        ] {
            let (tenant_id, assignment_id) = (tenant.map(String::from), assignment.map(String::from));
            let cancel = CancelRun { request_id: "r".into(), tenant_id, assignment_id };
            assert_eq!(cancel.is_for("acme", "r", "a-1"), expected, "{cancel:?}");
            assert!(!cancel.is_for("acme", "other", "a-1"));
        }
        let bare = CancelRun { request_id: "r".into(), tenant_id: None, assignment_id: None };
        assert!(bare.is_for(DEFAULT_TENANT, "r", "a-1"), "older routers name the request only");
    }
}
