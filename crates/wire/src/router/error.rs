//! The router's error replies.

use super::Context;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorResponse {
    pub ok: bool,
    pub error: ErrorBody,
    pub context: Context,
}

impl ErrorResponse {
    pub fn new(error: ErrorBody, context: Context) -> Self {
        Self { ok: false, error, context }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorBody {
    pub code: RouterCode,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intake_error_code: Option<IntakeCode>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u64>,
}

impl ErrorBody {
    pub fn new(code: RouterCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: None,
            intake_error_code: None,
            retry_after_seconds: None,
        }
    }

    /// An `invalid_request`; `intake` is the check that the request failed.
    pub fn invalid(intake: IntakeCode, message: impl Into<String>) -> Self {
        Self {
            intake_error_code: Some(intake),
            ..Self::new(RouterCode::InvalidRequest, message)
        }
    }

    #[must_use]
    pub fn retry_after(self, seconds: u64) -> Self {
        Self { retry_after_seconds: Some(seconds), ..self }
    }

    /// The answer for a task that does not exist, and for another tenant's, which must look the same.
    pub fn unknown_task(request_id: &str) -> Self {
        Self::new(RouterCode::NotFound, format!("no task {request_id:?} was pushed in the last day"))
    }

    /// The HTTP status of the error: that of its code, except 413 if the request was too large.
    pub fn status(&self) -> u16 {
        match self.intake_error_code {
            Some(IntakeCode::PayloadTooLarge) => 413,
            _ => self.code.status(),
        }
    }
}

/// Why the router refused a request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterCode {
    InvalidRequest,
    Unauthorized,
    Forbidden,
    PolicyNotFound,
    ExtensionNotFound,
    NotFound,
    IdempotencyConflict,
    RateLimited,
    QuotaExceeded,
    BudgetExceeded,
    Backpressure,
    DecisionFailed,
    PostProcessorFailed,
    ExtensionError,
    Internal,
    NoProviderAvailable,
    ExtensionUnavailable,
    Unavailable,
    ExtensionTimeout,
    DeadlineExceeded,
    /// A code that this version does not know, as it was received.
    #[serde(untagged)]
    Unknown(String),
}

impl RouterCode {
    /// Every code but [`Self::Unknown`].
    pub const KNOWN: &[Self] = &[
        Self::InvalidRequest,
        Self::Unauthorized,
        Self::Forbidden,
        Self::PolicyNotFound,
        Self::ExtensionNotFound,
        Self::NotFound,
        Self::IdempotencyConflict,
        Self::RateLimited,
        Self::QuotaExceeded,
        Self::BudgetExceeded,
        Self::Backpressure,
        Self::DecisionFailed,
        Self::PostProcessorFailed,
        Self::ExtensionError,
        Self::Internal,
        Self::NoProviderAvailable,
        Self::ExtensionUnavailable,
        Self::Unavailable,
        Self::ExtensionTimeout,
        Self::DeadlineExceeded,
    ];

    /// The code's name on the wire.
    pub fn as_str(&self) -> &str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::PolicyNotFound => "policy_not_found",
            Self::ExtensionNotFound => "extension_not_found",
            Self::NotFound => "not_found",
            Self::IdempotencyConflict => "idempotency_conflict",
            Self::RateLimited => "rate_limited",
            Self::QuotaExceeded => "quota_exceeded",
            Self::BudgetExceeded => "budget_exceeded",
            Self::Backpressure => "backpressure",
            Self::DecisionFailed => "decision_failed",
            Self::PostProcessorFailed => "post_processor_failed",
            Self::ExtensionError => "extension_error",
            Self::Internal => "internal",
            Self::NoProviderAvailable => "no_provider_available",
            Self::ExtensionUnavailable => "extension_unavailable",
            Self::Unavailable => "unavailable",
            Self::ExtensionTimeout => "extension_timeout",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Unknown(name) => name,
        }
    }

    /// The HTTP status of the code; 500 if the code is unknown.
    pub fn status(&self) -> u16 {
        match self {
            Self::InvalidRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::PolicyNotFound | Self::ExtensionNotFound | Self::NotFound => 404,
            Self::IdempotencyConflict => 409,
            Self::RateLimited | Self::QuotaExceeded | Self::BudgetExceeded | Self::Backpressure => 429,
            Self::DecisionFailed | Self::PostProcessorFailed | Self::ExtensionError | Self::Internal => 500,
            Self::Unknown(_) => 500,
            Self::NoProviderAvailable | Self::ExtensionUnavailable | Self::Unavailable => 503,
            Self::ExtensionTimeout | Self::DeadlineExceeded => 504,
        }
    }
}

impl fmt::Display for RouterCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The check that an `invalid_request` failed, or why a request is `forbidden`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum IntakeCode {
    SchemaValidationFailed,
    VersionUnsupported,
    CorrelationFieldsInvalid,
    PayloadTooLarge,
    TenantForbidden,
    /// A code that this version does not know, as it was received.
    #[serde(untagged)]
    Unknown(String),
}

impl IntakeCode {
    /// The code's name on the wire.
    pub fn as_str(&self) -> &str {
        match self {
            Self::SchemaValidationFailed => "SCHEMA_VALIDATION_FAILED",
            Self::VersionUnsupported => "VERSION_UNSUPPORTED",
            Self::CorrelationFieldsInvalid => "CORRELATION_FIELDS_INVALID",
            Self::PayloadTooLarge => "PAYLOAD_TOO_LARGE",
            Self::TenantForbidden => "TENANT_FORBIDDEN",
            Self::Unknown(name) => name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_code_is_written_under_its_name_and_read_back() {
        for code in RouterCode::KNOWN {
            let text = serde_json::to_string(code).unwrap();
            assert_eq!(text, format!("{:?}", code.as_str()));
            assert_eq!(&serde_json::from_str::<RouterCode>(&text).unwrap(), code);
        }

        use IntakeCode::*;
        for code in [
            SchemaValidationFailed,
            VersionUnsupported,
            CorrelationFieldsInvalid,
            PayloadTooLarge,
            TenantForbidden,
        ] {
            let text = serde_json::to_string(&code).unwrap();
            assert_eq!(text, format!("{:?}", code.as_str()));
            assert_eq!(serde_json::from_str::<IntakeCode>(&text).unwrap(), code);
        }
    }

    #[test]
    fn unknown_code_is_kept_as_it_came_and_counts_as_an_internal_error() {
        for name in ["", "teapot", "INTERNAL", "Unknown", "unknown", "ü\n"] {
            let text = serde_json::to_string(name).unwrap();
            let code: RouterCode = serde_json::from_str(&text).unwrap();
            assert_eq!((&code, code.as_str(), code.status()), (&RouterCode::Unknown(name.into()), name, 500));
            assert_eq!(serde_json::to_string(&code).unwrap(), text);

            let intake: IntakeCode = serde_json::from_str(&text).unwrap();
            assert_eq!((&intake, intake.as_str()), (&IntakeCode::Unknown(name.into()), name));
            assert_eq!(serde_json::to_string(&intake).unwrap(), text);
        }
    }
}
