//! Reads a decide request from a message and validates it in the order of the contract: size, JSON, headers (v2),
//! version, correlation, fields, tenant.

mod strict;

use crate::services::Endpoint;
use bus::{Headers, Message};
use std::ops::Deref;
use wire::router::{Context, DecideRequest, ErrorBody, IntakeCode, VERSION, headers as x};
use wire::{id, limits, subjects, trace};

/// Why a result subject is refused.
pub const RESULT_SUBJECT: &str =
    "result_subject must be one token of letters, digits, - and _ after beamline.result.v1.";

/// By which subject a request came, which decides how strictly it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contract {
    V1,
    V2,
}

impl Contract {
    /// Where its decide requests are answered.
    pub fn endpoint(self) -> Endpoint {
        match self {
            Self::V1 => Endpoint::Decide,
            Self::V2 => Endpoint::DecideV2,
        }
    }

    /// Where the answer goes if the request names no inbox.
    pub fn reply_subject(self) -> &'static str {
        match self {
            Self::V1 => subjects::DECIDE_REPLY,
            Self::V2 => subjects::DECIDE_V2_REPLY,
        }
    }

    fn serves(self, version: &str) -> bool {
        version == VERSION || (self == Self::V2 && version == "2")
    }
}

/// A valid request.
#[derive(Debug, Clone)]
pub struct Request {
    pub asked: DecideRequest,
    pub contract: Contract,
}

impl Deref for Request {
    type Target = DecideRequest;

    fn deref(&self) -> &DecideRequest {
        &self.asked
    }
}

impl Request {
    /// The idempotency key; an empty one is none. (It stays in the request, because it always was in the digest.)
    pub fn key(&self) -> Option<&str> {
        self.idempotency_key.as_deref().filter(|key| !key.is_empty())
    }

    /// The headers of a v2 message about this request; none in v1.
    pub fn v2_headers(&self) -> Headers {
        match self.contract {
            Contract::V1 => Headers::new(),
            Contract::V2 => Headers::new()
                .with(x::TRACE_ID, self.trace_id.as_deref().unwrap_or_default())
                .with(x::TENANT_ID, &self.tenant_id)
                .with(x::CONTRACT_VERSION, x::CONTRACT_V2)
                .with(x::REQUEST_ID, &self.request_id),
        }
    }
}

/// The request, or why it is invalid; with the ids that any answer repeats.
pub fn read(message: &Message, contract: Contract) -> (Context, Result<Request, ErrorBody>) {
    if let Err(error) = check_form(&message.payload) {
        return (Context::default(), Err(error));
    }

    let mut request: DecideRequest = match serde_json::from_slice(&message.payload) {
        Ok(request) => request,
        Err(error) => return undecodable(&message.payload, &error, contract),
    };
    let headers = match contract {
        Contract::V1 => {
            apply_headers(&mut request, &message.headers);
            Ok(())
        }
        Contract::V2 => strict::apply(&mut request, &message.headers),
    };

    let context = Context {
        request_id: Some(request.request_id.clone()),
        trace_id: request.trace_id.clone(),
    };
    let outcome = headers.and_then(|()| check(&request, contract)).map(|()| {
        if request.version != VERSION {
            request.version = VERSION.into();
        }
        Request { asked: request, contract }
    });
    (context, outcome)
}

/// The tenant that the header names, if it names a valid one.
pub fn tenant_header(headers: &Headers) -> Option<&str> {
    header(headers, "tenant_id", id::is_tenant)
}

fn check_form(payload: &[u8]) -> Result<(), ErrorBody> {
    let size = payload.len();
    if size > limits::DECIDE_MAX {
        let text = format!("the request has {size} bytes; at most {} are taken", limits::DECIDE_MAX);
        return Err(ErrorBody::invalid(IntakeCode::PayloadTooLarge, text));
    }

    // serde would read a struct from an array, too. What is no JSON at all is reported with its position later.
    let first = payload.trim_ascii_start().first();
    if first.is_some_and(|byte| *byte != b'{') {
        return Err(unfit("the request is not a JSON object"));
    }
    Ok(())
}

/// The error for a payload that is not a DecideRequest, with as much of its context as can be read.
fn undecodable<T>(payload: &[u8], error: &serde_json::Error, contract: Contract) -> (Context, Result<T, ErrorBody>) {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(payload) else {
        return (Context::default(), Err(unfit(format!("the request is not JSON: {error}"))));
    };

    let text = |key: &str| value.get(key).and_then(|v| v.as_str()).map(String::from);
    let context = Context { request_id: text("request_id"), trace_id: text("trace_id") };

    // Another version may have other fields, so its version is the error to report.
    let wrong_version = text("version").filter(|version| !contract.serves(version));
    let error = match wrong_version {
        Some(version) => unsupported(&version),
        None => unfit(format!("the request does not fit: {error}")),
    };
    (context, Err(error))
}

fn unsupported(version: &str) -> ErrorBody {
    let text = format!("version {version:?} is not served here; version \"1\" is");
    ErrorBody::invalid(IntakeCode::VersionUnsupported, text)
}

fn unfit(text: impl Into<String>) -> ErrorBody {
    ErrorBody::invalid(IntakeCode::SchemaValidationFailed, text)
}

/// Headers beat the payload, except that `traceparent` only fills in a missing trace id. An invalid header is counted
/// and ignored.
fn apply_headers(request: &mut DecideRequest, headers: &Headers) {
    let _counted = header(headers, "version", |version| version == VERSION);
    if let Some(tenant) = tenant_header(headers) {
        request.tenant_id = tenant.into();
    }

    let parent = header(headers, "traceparent", |parent| trace::trace_id_of(parent).is_some());
    if let Some(trace_id) = header(headers, "trace_id", id::is_valid) {
        request.trace_id = Some(trace_id.into());
    } else if request.trace_id.is_none() {
        request.trace_id = parent.and_then(trace::trace_id_of).map(String::from);
    }
}

/// The header's value if it is valid; an invalid one is counted.
fn header<'a>(headers: &'a Headers, name: &'static str, is_valid: impl Fn(&str) -> bool) -> Option<&'a str> {
    let value = headers.get(name)?;
    if !is_valid(value) {
        metrics::counter!("beamline_router_contract_violations_total", "header" => name).increment(1);
        return None;
    }
    Some(value)
}

/// Checks version, correlation, fields and tenant, in this order.
fn check(request: &DecideRequest, contract: Contract) -> Result<(), ErrorBody> {
    if !contract.serves(&request.version) {
        return Err(unsupported(&request.version));
    }

    let flow = [&request.run_id, &request.flow_id, &request.step_id];
    if flow.iter().any(|id| id.is_some()) && !flow.iter().all(|id| id.is_some()) {
        let text = "run_id, flow_id and step_id stand together or not at all";
        return Err(ErrorBody::invalid(IntakeCode::CorrelationFieldsInvalid, text));
    }

    let ids = [
        ("request_id", Some(&request.request_id)),
        ("trace_id", request.trace_id.as_ref()),
        ("run_id", request.run_id.as_ref()),
        ("flow_id", request.flow_id.as_ref()),
        ("step_id", request.step_id.as_ref()),
        ("policy_id", request.policy_id.as_ref()),
        ("task.type", Some(&request.task.task_type)),
    ];
    for (field, id) in ids {
        if let Some(id) = id {
            id::check(id).map_err(|error| unfit(format!("{field} {error}")))?;
        }
    }
    if contract == Contract::V2 && request.idempotency_key.as_ref().is_none_or(String::is_empty) {
        return Err(unfit("idempotency_key is missing; every request of v2 has one"));
    }
    if let Some(key) = &request.idempotency_key {
        id::check_idempotency_key(key).map_err(|error| unfit(format!("idempotency_key {error}")))?;
    }

    if let Some(subject) = &request.result_subject
        && !subjects::is_result_copy(subject)
    {
        return Err(unfit(RESULT_SUBJECT));
    }

    if let Some(subject) = request.assignment_subject.as_deref()
        && !subjects::is_assign(subject)
    {
        let text = format!(
            "assignment_subject must be {0} or, for the workers of one provider, {0}.<provider>; it is not",
            subjects::ASSIGN
        );
        return Err(unfit(text));
    }
    if request.task.payload.is_none() && request.task.payload_ref.is_none() {
        return Err(unfit("the task has neither payload nor payload_ref"));
    }
    id::check_tenant(&request.tenant_id).map_err(|error| unfit(format!("tenant_id {error}")))
}
