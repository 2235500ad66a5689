//! The HTTP entry: `POST /api/v1/routes/decide` with `X-API-Key`. The router's answer is returned byte for byte, an
//! error with the HTTP status of its code.

use crate::failure::Failure;
use crate::{Gateway, Shared, upstream};
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::post;
use bus::Headers;
use bytes::Bytes;
use std::sync::Arc;
use std::time::{Duration, Instant};
use subtle::ConstantTimeEq;
use wire::id;
use wire::ipc::ErrorCode;
use wire::limits::DECIDE_MAX;
use wire::router::{Context, ErrorBody, ErrorResponse, IntakeCode, RequestHead, RouterCode};
use wire::trace;

/// When clients should retry after a refusal because too many requests are in flight.
const RETRY_AFTER: Duration = Duration::from_secs(1);

pub fn routes(gateway: Arc<Gateway>) -> axum::Router {
    axum::Router::new()
        .route("/api/v1/routes/decide", post(decide))
        .with_state(gateway)
}

async fn decide(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    let mut head = RequestHead::default();
    match answer(&gateway, request, &mut head).await {
        Ok(answer) => respond(StatusCode::OK, answer.into(), None),
        Err(failure) => {
            gateway.shared.stats.failed(failure.code);
            refuse(failure.into_body(), head)
        }
    }
}

async fn answer(gateway: &Gateway, request: Request, head: &mut RequestHead) -> Result<Bytes, Failure> {
    let started = Instant::now();
    let Shared { admission, upstream, stats } = &*gateway.shared;
    let (parts, body) = request.into_parts();
    if !authorized(&parts.headers, &admission.settings().api_key) {
        let text = "X-API-Key is missing or wrong; `beamline api-key` prints it";
        return Err(Failure::reported(ErrorCode::Forbidden, ErrorBody::new(RouterCode::Unauthorized, text)));
    }

    let Ok(body) = to_bytes(body, DECIDE_MAX).await else {
        let text = format!("a decide request has at most {DECIDE_MAX} bytes");
        let large = ErrorBody::invalid(IntakeCode::PayloadTooLarge, text);
        return Err(Failure::reported(ErrorCode::InvalidPayload, large));
    };

    // Taken only once the body is complete, so that a client that sends slowly holds no permit.
    let Ok(_permit) = admission.request(admission.uid()) else {
        let busy = Failure::new(ErrorCode::Overloaded, "too many requests in flight");
        return Err(busy.retry_after(RETRY_AFTER));
    };
    stats.admitted();

    // Parsed only for the headers and for the gateway's own errors: the router validates the request.
    *head = serde_json::from_slice(&body).unwrap_or_default();
    let headers = headers(&parts.headers, head);
    let due = started + admission.settings().request_timeout;

    let answer = upstream.decide(&gateway.bus, headers, body, due).await;
    stats.completed(started.elapsed());
    Ok(answer?.payload)
}

/// The headers of the request to the router. The trace id is that of `traceparent`, else that of the body, else a new
/// one. An id that is not valid as a header is omitted: the router then reports what is wrong with the body.
fn headers(given: &HeaderMap, head: &mut RequestHead) -> Headers {
    let text = |name: &str| given.get(name).and_then(|value| value.to_str().ok());
    let parent = text("traceparent").filter(|parent| trace::trace_id_of(parent).is_some());
    let trace_id = match (parent.and_then(trace::trace_id_of), head.trace_id.take()) {
        (Some(trace), _) => Some(trace.to_string()),
        (None, Some(trace)) => Some(trace).filter(|trace| id::is_valid(trace)),
        (None, None) => Some(upstream::new_trace_id()),
    };

    let parent = parent
        .map(String::from)
        .or_else(|| trace::traceparent(trace_id.as_deref()?, rand::random()));

    let tenant_id = head.tenant_id.as_deref().filter(|tenant| id::is_tenant(tenant));
    let headers = upstream::headers(trace_id.as_deref(), parent.as_deref(), tenant_id);
    head.trace_id = trace_id;
    headers
}

fn refuse(error: ErrorBody, head: RequestHead) -> Response {
    let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let retry_after = error.retry_after_seconds;
    let context = Context { request_id: head.request_id, trace_id: head.trace_id };
    let body = serde_json::to_vec(&ErrorResponse::new(error, context)).expect("an error body serializes to JSON");
    respond(status, body.into(), retry_after)
}

fn respond(status: StatusCode, body: Body, retry_after: Option<u64>) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(seconds) = retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

/// Compares in constant time, so that timing does not reveal how much of the key is right.
fn authorized(headers: &HeaderMap, key: &str) -> bool {
    let given = headers.get("x-api-key").map_or(&[][..], HeaderValue::as_bytes);
    !key.is_empty() && bool::from(given.ct_eq(key.as_bytes()))
}
