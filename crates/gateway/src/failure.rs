//! Maps failures to error frames on the socket and to error bodies over HTTP.

use crate::reply::RETRY_AFTER_MS;
use crate::upstream::Refused;
use serde_json::{Map, Value};
use std::time::Duration;
use wire::ipc::{ErrorCode, ErrorPayload};
use wire::router::{ErrorBody, IntakeCode, RouterCode};

/// An error on its way to the client.
#[derive(Debug)]
pub struct Failure {
    pub code: ErrorCode,
    /// The router's own error for [`ErrorCode::Rejected`], else the gateway's in the same form.
    body: Box<ErrorBody>,
    /// When to try again, if the gateway itself refuses.
    retry_after: Option<Duration>,
    /// Whether the failure ends a stream that has begun.
    pub in_stream: bool,
}

impl Failure {
    /// A failure that the gateway itself detected.
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        let body = match code {
            ErrorCode::FrameTooLarge => ErrorBody::invalid(IntakeCode::PayloadTooLarge, text),
            _ => ErrorBody::new(router_code(code), text),
        };
        Self::reported(code, body)
    }

    /// The router's error.
    pub fn rejected(error: ErrorBody) -> Self {
        Self::reported(ErrorCode::Rejected, error)
    }

    /// A failure with a more specific error body than the one [`Failure::new`] would build.
    pub fn reported(code: ErrorCode, body: ErrorBody) -> Self {
        Self { code, body: Box::new(body), retry_after: None, in_stream: false }
    }

    #[must_use]
    pub fn retry_after(self, pause: Duration) -> Self {
        Self { retry_after: Some(pause), ..self }
    }

    #[must_use]
    pub fn in_stream(self) -> Self {
        Self { in_stream: true, ..self }
    }

    /// The router's own error, or the gateway's in the same form.
    pub fn body(&self) -> &ErrorBody {
        &self.body
    }

    /// Whether the router knows no such task, policy or extension.
    pub fn is_not_found(&self) -> bool {
        self.body.status() == 404
    }

    /// The payload of an error frame.
    pub fn into_payload(self) -> ErrorPayload {
        let error = *self.body;
        let status = error.status();

        let mut payload = ErrorPayload::new(self.code, error.message);
        let detail = &mut payload.error;
        detail.retry_after_ms = match self.retry_after {
            // Rounded up: a client that retries too early would be refused again.
            Some(pause) => Some(
                u64::try_from(pause.as_nanos().div_ceil(1_000_000))
                    .unwrap_or(u64::MAX)
                    .max(1),
            ),
            None => error.retry_after_seconds.map(|seconds| seconds.saturating_mul(1000)),
        };
        if self.code == ErrorCode::Rejected {
            detail.status = Some(status);
            detail.reason = Some(error.code.to_string());
            detail.details = with_intake(error.details, error.intake_error_code);
        }
        payload
    }

    /// The body of an HTTP reply; its [`ErrorBody::status`] is the reply's status.
    pub fn into_body(self) -> ErrorBody {
        let mut body = *self.body;
        if let Some(pause) = self.retry_after {
            // Rounded up: a client that retries too early would be refused again.
            let seconds = pause.as_nanos().div_ceil(1_000_000_000);
            body.retry_after_seconds = Some(u64::try_from(seconds).unwrap_or(u64::MAX).max(1));
        }
        body
    }
}

/// The router code equivalent to a code of the gateway.
fn router_code(code: ErrorCode) -> RouterCode {
    match code {
        ErrorCode::InvalidVersion | ErrorCode::InvalidType | ErrorCode::InvalidPayload | ErrorCode::FrameTooLarge => {
            RouterCode::InvalidRequest
        }
        ErrorCode::Timeout => RouterCode::DeadlineExceeded,
        ErrorCode::ConnectionClosed | ErrorCode::Unavailable => RouterCode::Unavailable,
        ErrorCode::Overloaded => RouterCode::Backpressure,
        ErrorCode::Forbidden => RouterCode::Forbidden,
        ErrorCode::Rejected | ErrorCode::Internal => RouterCode::Internal,
    }
}

/// Adds the intake code to the details, because an error frame has no field for it.
fn with_intake(details: Option<Value>, intake: Option<IntakeCode>) -> Option<Value> {
    let Some(intake) = intake else { return details };
    let mut fields = match details {
        Some(Value::Object(fields)) => fields,
        None => Map::new(),
        // Details that are not an object cannot take another field.
        Some(other) => return Some(other),
    };
    fields.insert("intake_error_code".into(), intake.as_str().into());
    Some(Value::Object(fields))
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Router(error) => Self::rejected(*error),
            Refused::Open { retry_after } => {
                let text = "the router has not answered lately, so the gateway's circuit breaker is open; try again";
                Self::new(ErrorCode::Unavailable, text).retry_after(retry_after)
            }
            Refused::NoResponders { retry_after } => {
                Self::new(ErrorCode::Unavailable, "no router is running; start one or try again")
                    .retry_after(retry_after)
            }

            Refused::Bus(error) => error.into(),
            Refused::Unreadable(problem) => {
                Self::new(ErrorCode::Internal, format!("the router's answer cannot be read: {problem}"))
            }
        }
    }
}

impl From<bus::Error> for Failure {
    fn from(error: bus::Error) -> Self {
        let text = error.to_string();
        match error {
            // The bus error names a subject, which is internal to the gateway.
            bus::Error::Timeout(_) => Self::new(ErrorCode::Timeout, "no answer before the deadline"),
            bus::Error::TooLarge { .. } => Self::new(ErrorCode::FrameTooLarge, text),
            bus::Error::Disconnected(_) => {
                Self::new(ErrorCode::Unavailable, text).retry_after(Duration::from_millis(RETRY_AFTER_MS))
            }

            bus::Error::NoResponders(_)
            | bus::Error::InvalidSubject(_)
            | bus::Error::NoStream(_)
            | bus::Error::WrongRevision(_)
            | bus::Error::Full(_)
            | bus::Error::Storage(_) => Self::new(ErrorCode::Internal, text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a client receives: `code`, `retry_after_ms`, `status` and `reason` on the socket; status, `code` and
    /// `retry_after_seconds` over HTTP.
    type Reports = ((u16, Option<u64>, Option<u16>, Option<String>), (u16, String, Option<u64>));

    fn reports(refused: impl Fn() -> Refused) -> Reports {
        let frame = Failure::from(refused()).into_payload().error;
        let body = Failure::from(refused()).into_body();
        assert_eq!(frame.message, body.message);
        (
            (frame.code, frame.retry_after_ms, frame.status, frame.reason),
            (body.status(), body.code.to_string(), body.retry_after_seconds),
        )
    }

    #[test]
    fn socket_and_http_report_the_same_failure() {
        let check =
            |refused: fn() -> Refused, (code, ms): (u16, Option<u64>), (status, name, s): (u16, &str, Option<u64>)| {
                let expected = ((code, ms, None, None), (status, name.to_string(), s));
                assert_eq!(reports(refused), expected, "{:?}", refused());
            };
        let pause = Duration::from_micros(1_500_001);
        assert_eq!(pause.as_micros(), 1_500_001);

        check(
            || Refused::Open { retry_after: Duration::from_micros(1_500_001) },
            (11, Some(1501)),
            (503, "unavailable", Some(2)),
        );
        check(
            || Refused::NoResponders { retry_after: Duration::ZERO },
            (11, Some(1)),
            (503, "unavailable", Some(1)),
        );
        check(
            || Refused::Bus(bus::Error::Disconnected("no server".into())),
            (11, Some(100)),
            (503, "unavailable", Some(1)),
        );
        check(|| Refused::Bus(bus::Error::Timeout("s".into())), (5, None), (504, "deadline_exceeded", None));
        check(|| Refused::Bus(bus::Error::TooLarge { size: 9, max: 8 }), (3, None), (413, "invalid_request", None));
        check(|| Refused::Bus(bus::Error::Storage("full".into())), (99, None), (500, "internal", None));
        check(|| Refused::Unreadable("no JSON".into()), (99, None), (500, "internal", None));
    }

    #[test]
    fn router_error_keeps_its_code_and_retry_time() {
        let refused = || Refused::Router(Box::new(ErrorBody::new(RouterCode::Backpressure, "later").retry_after(0)));
        let expected = ((12, Some(0), Some(429), Some("backpressure".into())), (429, "backpressure".into(), Some(0)));
        assert_eq!(reports(refused), expected);

        let refused = || Refused::Router(Box::new(ErrorBody::new(RouterCode::Unknown("teapot".into()), "no coffee")));
        assert_eq!(reports(refused), ((12, None, Some(500), Some("teapot".into())), (500, "teapot".into(), None)));
    }

    #[test]
    fn intake_code_is_added_to_the_details() {
        let details = |error: ErrorBody| Failure::rejected(error).into_payload().error.details;
        let large = || ErrorBody::invalid(IntakeCode::PayloadTooLarge, "large");
        let expected = serde_json::json!({"intake_error_code": "PAYLOAD_TOO_LARGE"});
        assert_eq!(details(large()), Some(expected));

        let given = serde_json::json!({"field": "x"});
        let expected = serde_json::json!({"field": "x", "intake_error_code": "PAYLOAD_TOO_LARGE"});
        assert_eq!(details(ErrorBody { details: Some(given.clone()), ..large() }), Some(expected));
        assert_eq!(
            details(ErrorBody {
                details: Some(given.clone()),
                ..ErrorBody::new(RouterCode::Forbidden, "no")
            }),
            Some(given)
        );
        assert_eq!(details(ErrorBody { details: Some("text".into()), ..large() }), Some("text".into()));
    }
}
