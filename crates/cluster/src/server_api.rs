//! The server API: `POST /api/<operation>` with `X-API-Key`, for other programs.

use crate::Node;
use crate::operations::Operation;
use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use std::sync::Arc;
use subtle::ConstantTimeEq;
use wire::channels::{ApiAnswer, Failure};
use wire::limits::PUBLICATION_MAX;
use wire::realtime::ErrorCode;

/// A publication of the maximum size and the request's other fields.
const BODY_MAX: usize = PUBLICATION_MAX + 64 * 1024;

pub async fn handle(State(node): State<Arc<Node>>, Path(name): Path<String>, request: Request) -> Response {
    let expected = node.config.api_key.as_bytes();
    let given = request.headers().get("x-api-key").map_or(&[][..], |key| key.as_bytes());
    // Compared in constant time, so that timing does not reveal how much of the key is right.
    if expected.is_empty() || !bool::from(given.ct_eq(expected)) {
        let error = failure(ErrorCode::Unauthorized, "X-API-Key is missing or wrong; `beamline api-key` prints it");
        return (StatusCode::UNAUTHORIZED, Json(error)).into_response();
    }

    let body = match body(request).await {
        Ok(body) => body,
        Err(response) => return response,
    };

    let Some(operation) = Operation::from_name(&name) else {
        return Json(failure(ErrorCode::MethodNotFound, format!("no operation {name:?}"))).into_response();
    };

    // An error of the operation is an answer too, with status 200.
    match node.operate(operation, &body).await {
        Ok(result) => Json(ApiAnswer::Result(result)).into_response(),
        Err((code, message)) => Json(failure(code, message)).into_response(),
    }
}

/// Reads the whole body. An empty body counts as an empty request.
async fn body(request: Request) -> Result<Bytes, Response> {
    match axum::body::to_bytes(request.into_body(), BODY_MAX).await {
        Ok(body) if body.is_empty() => Ok(Bytes::from_static(b"{}")),
        Ok(body) => Ok(body),
        Err(_) => {
            let text = format!("the body is longer than {BODY_MAX} bytes, or was cut off\n");
            Err((StatusCode::PAYLOAD_TOO_LARGE, text).into_response())
        }
    }
}

fn failure(code: ErrorCode, message: impl Into<String>) -> ApiAnswer<()> {
    ApiAnswer::Error(Failure { code: code as u32, message: message.into() })
}
