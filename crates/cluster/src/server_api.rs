//! `POST /api/<method>` with `X-API-Key`: the same operations for programs that speak HTTP.

use crate::Node;
use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;
use subtle::ConstantTimeEq;
use wire::channels::{ApiAnswer, Failure};
use wire::realtime::ErrorCode;

pub async fn handle(State(node): State<Arc<Node>>, Path(method): Path<String>, request: Request) -> Response {
    let expected = node.config.api_key.as_bytes();
    let given = request.headers().get("x-api-key").map_or(&[][..], |key| key.as_bytes());
    // Compared in constant time, so that timing does not reveal how much of the key is right.
    if expected.is_empty() || !bool::from(given.ct_eq(expected)) {
        let error = failure(ErrorCode::Unauthorized, "X-API-Key is missing or wrong; `beamline api-key` prints it");
        return (StatusCode::UNAUTHORIZED, Json(error)).into_response();
    }
    let body = match crate::http::body(request).await {
        Ok(body) => body,
        Err(response) => return response,
    };
    let body = if body.is_empty() {
        bytes::Bytes::from_static(b"{}")
    } else {
        body
    };
    match node.operate(&method, &body).await {
        Ok(result) => Json(ApiAnswer::Result(result)).into_response(),
        Err((code, message)) => Json(failure(code, message)).into_response(),
    }
}

fn failure(code: ErrorCode, message: impl Into<String>) -> ApiAnswer<()> {
    ApiAnswer::Error(Failure { code: code as u32, message: message.into() })
}
