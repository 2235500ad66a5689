//! Replies to requests: their frames, and the gateway's own errors.

use bytes::Bytes;
use wire::ipc::{ErrorCode, ErrorPayload, FrameType, HEADER_V2};
use wire::limits::IPC_FRAME_MAX;

/// The largest payload that fits a frame of either version.
pub const PAYLOAD_MAX: usize = IPC_FRAME_MAX - HEADER_V2;
/// When clients should retry after a temporary overload or disconnection.
pub const RETRY_AFTER_MS: u64 = 100;
/// Error texts are cut to this many bytes: one that quotes a whole payload, escaped, would exceed a frame.
const TEXT_MAX: usize = 1024;

/// Identifies the request of a connection that a reply answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Slot {
    /// The request's position in the order of v1 requests.
    V1(u64),
    /// The request id.
    V2(u64),
}

/// One frame of an answer, without the id of its request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub kind: FrameType,
    pub payload: Bytes,
}

impl Reply {
    pub fn new(kind: FrameType, payload: impl Into<Bytes>) -> Self {
        Self { kind, payload: payload.into() }
    }

    pub fn ok(payload: impl Into<Bytes>) -> Self {
        Self::new(FrameType::ResponseOk, payload)
    }

    pub fn error(code: ErrorCode, text: &str) -> Self {
        Self::new(FrameType::ResponseError, ErrorPayload::new(code, text).encode())
    }

    pub fn overloaded(text: &str) -> Self {
        let mut error = ErrorPayload::new(ErrorCode::Overloaded, text);
        error.error.retry_after_ms = Some(RETRY_AFTER_MS);
        Self::new(FrameType::ResponseError, error.encode())
    }

    /// Encodes an error. If it would exceed a frame, the details are removed and the router's texts are cut.
    pub fn from_payload(payload: &mut ErrorPayload) -> Self {
        let mut bytes = payload.encode();
        if bytes.len() > PAYLOAD_MAX {
            // Code, status and reason matter most, so they stay.
            let error = &mut payload.error;
            error.details = None;
            error.message = shortened(std::mem::take(&mut error.message));
            error.reason = error.reason.take().map(shortened);
            bytes = payload.encode();
        }
        Self::new(FrameType::ResponseError, bytes)
    }

    /// The same error as the last frame of a stream.
    pub fn in_stream(self) -> Self {
        Self { kind: FrameType::StreamError, ..self }
    }

    pub fn ends_stream(&self) -> bool {
        matches!(self.kind, FrameType::StreamComplete | FrameType::StreamError)
    }
}

/// Cuts an error text to [`TEXT_MAX`] bytes.
pub fn shortened(mut text: String) -> String {
    if text.len() > TEXT_MAX {
        text.truncate(text.floor_char_boundary(TEXT_MAX));
        text.push('…');
    }
    text
}
