//! Reads a decide request from a message and validates it in the order of the contract: size, JSON, version,
//! correlation, fields, tenant.

use bus::{Headers, Message};
use wire::router::{Context, DecideRequest, ErrorBody, IntakeCode, VERSION};
use wire::{id, limits, subjects, trace};

/// Why a result subject is refused.
pub const RESULT_SUBJECT: &str =
    "result_subject must be one token of letters, digits, - and _ after beamline.result.v1.";

/// The request, or why it is invalid; with the ids that any answer repeats.
pub fn read(message: &Message) -> (Context, Result<DecideRequest, ErrorBody>) {
    if let Err(error) = check_form(&message.payload) {
        return (Context::default(), Err(error));
    }

    let mut request: DecideRequest = match serde_json::from_slice(&message.payload) {
        Ok(request) => request,
        Err(error) => return undecodable(&message.payload, &error),
    };
    apply_headers(&mut request, &message.headers);

    let context = Context {
        request_id: Some(request.request_id.clone()),
        trace_id: request.trace_id.clone(),
    };
    let outcome = check(&request).map(|()| request);
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
fn undecodable<T>(payload: &[u8], error: &serde_json::Error) -> (Context, Result<T, ErrorBody>) {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(payload) else {
        return (Context::default(), Err(unfit(format!("the request is not JSON: {error}"))));
    };

    let text = |key: &str| value.get(key).and_then(|v| v.as_str()).map(String::from);
    let context = Context { request_id: text("request_id"), trace_id: text("trace_id") };

    // Another version may have other fields, so its version is the error to report.
    let wrong_version = text("version").filter(|version| version != VERSION);
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
fn check(request: &DecideRequest) -> Result<(), ErrorBody> {
    if request.version != VERSION {
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
