//! What a router says about its load when asked ([`crate::subjects::BACKPRESSURE`]).

use serde::{Deserialize, Serialize};

/// A reply about the router itself: `data` if `success`, else `error`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StatusReply<T> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    pub success: bool,
}

impl<T> From<Result<T, String>> for StatusReply<T> {
    fn from(outcome: Result<T, String>) -> Self {
        match outcome {
            Ok(data) => Self { data: Some(data), error: None, success: true },
            Err(error) => Self { data: None, error: Some(error), success: false },
        }
    }
}

/// The data of the reply on [`crate::subjects::BACKPRESSURE`]. A reader needs the status alone; a field that is missing
/// reads as 0.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Backpressure {
    #[serde(default)]
    pub metrics: LoadMetrics,
    #[serde(default)]
    pub policy: BackpressurePolicy,
    pub status: BackpressureStatus,
    /// The subject whose requests are refused.
    #[serde(default)]
    pub subject: String,
    #[serde(default)]
    pub thresholds: LoadThresholds,
    /// Milliseconds since the epoch.
    #[serde(default)]
    pub timestamp: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackpressureStatus {
    Inactive,
    /// One metric is over its threshold; the router still serves.
    Warning,
    /// The router refuses decide requests.
    Active,
    #[serde(other)]
    Unknown,
}

impl BackpressureStatus {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inactive => "inactive",
            Self::Warning => "warning",
            Self::Active => "active",
            Self::Unknown => "unknown",
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadMetrics {
    /// Pushes whose append is not acknowledged yet.
    pub inflight_messages: u64,
    /// Of the router's latest decisions.
    pub latency_p95_ms: f64,
    /// Assignments in the stream.
    pub pending_messages: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadThresholds {
    pub inflight_overload: u64,
    pub latency_overload_ms: u64,
    pub queue_overload: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BackpressurePolicy {
    pub max_retry_attempts: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u64>,
}
