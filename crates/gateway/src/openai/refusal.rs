//! Errors in the form that OpenAI's clients expect, with the status that they act on.

use crate::failure::Failure;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::Response;
use std::borrow::Cow;
use wire::ipc::ErrorCode;
use wire::openai::{ErrorDetail, ErrorReply};
use wire::router::{ExecResult, ResultStatus, RouterCode};

/// When clients should retry after a refusal because of the gateway's own limits, in seconds.
const RETRY_AFTER_S: u64 = 1;
/// Tells OpenAI's clients whether to repeat a request, whatever its status.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    code: Cow<'static, str>,
    param: Option<&'static str>,
    message: String,
    /// In seconds.
    retry_after: Option<u64>,
    /// A repetition would end in the same way, although the status suggests one.
    is_final: bool,
}

impl Refusal {
    pub fn new(status: StatusCode, code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self {
            status,
            code: code.into(),
            param: None,
            message: message.into(),
            retry_after: None,
            is_final: false,
        }
    }

    /// The request is wrong, in this field.
    pub fn invalid(param: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, "invalid_request", message) }
    }

    pub fn unknown_model(model: &str) -> Self {
        let text =
            format!("there is no model {model:?} for this key; a model is a policy of that name, see /v1/models");
        Self {
            param: Some("model"),
            ..Self::new(StatusCode::NOT_FOUND, "model_not_found", text)
        }
    }

    pub fn busy(message: impl Into<String>) -> Self {
        Self {
            retry_after: Some(RETRY_AFTER_S),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", message)
        }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    /// The refusal for a task that did not succeed.
    pub fn of_result(result: &ExecResult) -> Self {
        let code = result.error_code.clone().unwrap_or_else(|| "error".into());
        let text = result
            .error_message
            .clone()
            .unwrap_or_else(|| format!("the task ended with {code:?}"));
        let new = |status, code: String| Self::new(status, code, text.clone());
        match (result.status, code.as_str()) {
            (ResultStatus::Cancelled, _) => Self { is_final: true, ..new(StatusCode::CONFLICT, "cancelled".into()) },
            (ResultStatus::Timeout, _) => new(StatusCode::GATEWAY_TIMEOUT, code),
            (_, "invalid_task") => Self::invalid(None, text),
            (_, "rate_limited") => Self {
                retry_after: Some(result.retry_after_seconds.unwrap_or(RETRY_AFTER_S)),
                ..new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded".into())
            },
            _ => new(StatusCode::BAD_GATEWAY, code),
        }
    }

    /// The code under which a refusal of the gateway's own is counted.
    pub fn counted_as(&self) -> ErrorCode {
        match self.status {
            StatusCode::UNAUTHORIZED => ErrorCode::Forbidden,
            StatusCode::TOO_MANY_REQUESTS => ErrorCode::Overloaded,
            StatusCode::PAYLOAD_TOO_LARGE => ErrorCode::FrameTooLarge,
            _ => ErrorCode::InvalidPayload,
        }
    }

    /// As OpenAI's API names its errors.
    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            429 if self.code == "insufficient_quota" => "insufficient_quota",
            429 => "requests",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        }
    }

    pub fn into_reply(self) -> ErrorReply {
        let kind = self.kind().into();
        ErrorReply {
            error: ErrorDetail {
                message: self.message,
                kind,
                param: self.param.map(String::from),
                code: Some(self.code.into_owned()),
            },
        }
    }

    pub fn respond(self) -> Response {
        let (status, retry_after, is_final) = (self.status, self.retry_after, self.is_final);
        let body = serde_json::to_vec(&self.into_reply()).expect("an error serializes to JSON");
        let mut response = super::json(body);
        *response.status_mut() = status;

        let headers = response.headers_mut();
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if is_final {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A refusal of the router or the gateway.
impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        let error = failure.into_body();
        let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let (code, param) = match &error.code {
            RouterCode::PolicyNotFound => ("model_not_found".into(), Some("model")),
            RouterCode::QuotaExceeded | RouterCode::BudgetExceeded => ("insufficient_quota".into(), None),
            code if code.status() == 429 => ("rate_limit_exceeded".into(), None),
            code => (code.to_string(), None),
        };
        let retry_after = error.retry_after_seconds;
        Self { param, retry_after, ..Self::new(status, Cow::Owned(code), error.message) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::router::ErrorBody;

    #[test]
    fn error_of_the_router_is_one_of_openai() {
        for code in RouterCode::KNOWN {
            let error = ErrorBody::new(code.clone(), "m").retry_after(7);
            let refusal = Refusal::from(Failure::rejected(error));
            assert_eq!((refusal.status.as_u16(), refusal.retry_after), (code.status(), Some(7)), "{code}");

            let (kind, reply) = (refusal.kind(), refusal.into_reply().error);
            let expected = match (code, code.status()) {
                (RouterCode::PolicyNotFound, _) => ("invalid_request_error", "model_not_found"),
                (RouterCode::QuotaExceeded | RouterCode::BudgetExceeded, _) => {
                    ("insufficient_quota", "insufficient_quota")
                }
                (_, 429) => ("requests", "rate_limit_exceeded"),
                (_, 400..=499) => ("invalid_request_error", code.as_str()),
                _ => ("server_error", code.as_str()),
            };
            assert_eq!((kind, reply.code.as_deref()), (expected.0, Some(expected.1)), "{code}");
            assert_eq!(reply.param.as_deref(), (*code == RouterCode::PolicyNotFound).then_some("model"));
        }
    }

    #[test]
    fn task_that_did_not_succeed_has_a_status_of_its_own() {
        let check = |status: &str, code: &str, expected: (u16, &str, Option<u64>)| {
            let result = serde_json::json!({"assignment_id": "a", "request_id": "r", "status": status,
                "provider_id": "p", "job": {"type": "t"}, "error_code": code, "error_message": "m",
                "retry_after_seconds": (code == "rate_limited").then_some(20)});
            let refusal = Refusal::of_result(&ExecResult::decode(result.to_string().as_bytes()).unwrap());
            assert_eq!((refusal.status.as_u16(), &*refusal.code, refusal.retry_after), expected, "{status} {code}");
            assert_eq!(refusal.is_final, status == "cancelled");
        };
        check("error", "invalid_task", (400, "invalid_request", None));
        check("error", "rate_limited", (429, "rate_limit_exceeded", Some(20)));
        check("error", "refused", (502, "refused", None));
        check("error", "unknown_provider", (502, "unknown_provider", None));
        check("timeout", "timeout", (504, "timeout", None));
        check("timeout", "first_token_timeout", (504, "first_token_timeout", None));
        check("cancelled", "cancelled", (409, "cancelled", None));
    }
}
