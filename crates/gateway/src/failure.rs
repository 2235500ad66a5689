//! What a request failed by, in the words of the socket.

use crate::router::Refused;
use serde_json::Value;
use std::time::Duration;
use wire::ipc::{ErrorCode, ErrorPayload};
use wire::router::ErrorBody;

/// An error on its way to the client.
pub struct Failure {
    pub code: ErrorCode,
    pub payload: ErrorPayload,
    /// It ends a stream.
    pub in_stream: bool,
}

impl Failure {
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        Self { code, payload: ErrorPayload::new(code, text), in_stream: false }
    }

    pub fn in_stream(self) -> Self {
        Self { in_stream: true, ..self }
    }

    /// The router knows no such task, policy or extension.
    pub fn is_not_found(&self) -> bool {
        self.payload.error.status == Some(404)
    }

    pub fn unavailable(text: &str, retry_after: Duration) -> Self {
        let mut failure = Self::new(ErrorCode::Unavailable, text);
        // Rounded up: a moment too early would be refused again.
        let ms = u64::try_from(retry_after.as_millis())
            .unwrap_or(u64::MAX)
            .saturating_add(1);
        failure.payload.error.retry_after_ms = Some(ms);
        failure
    }

    pub fn rejected(error: ErrorBody) -> Self {
        let mut failure = Self::new(ErrorCode::Rejected, error.message.clone());
        let detail = &mut failure.payload.error;
        detail.status = Some(error.status());
        detail.retry_after_ms = error.retry_after_seconds.map(|seconds| seconds.saturating_mul(1000));
        detail.details = match (error.details, error.intake_error_code) {
            (Some(Value::Object(mut details)), Some(intake)) => {
                details.insert("intake_error_code".into(), intake.into());
                Some(details.into())
            }
            (None, Some(intake)) => Some(serde_json::json!({"intake_error_code": intake})),
            (details, _) => details,
        };
        detail.reason = Some(error.code);
        failure
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Open { retry_after } => {
                let text = "The router has not answered lately and is left alone for a moment; try again";
                Self::unavailable(text, retry_after)
            }
            Refused::Nobody { retry_after } => {
                Self::unavailable("No router is running; start one or try again", retry_after)
            }
            Refused::Bus(error) => error.into(),
            Refused::Router(error) => Self::rejected(*error),
            Refused::Unreadable(what) => {
                Self::new(ErrorCode::Internal, format!("The router's answer cannot be read: {what}"))
            }
        }
    }
}

impl From<bus::Error> for Failure {
    fn from(error: bus::Error) -> Self {
        match error {
            bus::Error::Timeout(_) => Self::new(ErrorCode::Timeout, "No answer before the deadline"),
            bus::Error::TooLarge { .. } => Self::new(ErrorCode::FrameTooLarge, error.to_string()),
            bus::Error::Disconnected(_) => {
                let retry_after = Duration::from_millis(crate::session::RETRY_AFTER_MS);
                Self::unavailable(&error.to_string(), retry_after)
            }
            other => Self::new(ErrorCode::Internal, other.to_string()),
        }
    }
}
