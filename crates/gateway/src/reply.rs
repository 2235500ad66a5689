//! Replies to requests: their frames, and the errors that the gateway makes itself.

use bytes::Bytes;
use wire::ipc::{ErrorCode, ErrorPayload, FrameType, HEADER_V2};
use wire::limits::IPC_FRAME_MAX;

/// The largest payload that fits a frame of either version.
pub const PAYLOAD_MAX: usize = IPC_FRAME_MAX - HEADER_V2;
/// When to retry after an overload or a disconnection that ends by itself.
pub const RETRY_AFTER_MS: u64 = 100;
/// Longer texts of errors are cut: one that quotes a whole payload, escaped, would exceed a frame.
const TEXT_MAX: usize = 1024;

/// Which request of its connection a reply answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Slot {
    /// Its place in the order of v1 requests.
    V1(u64),
    /// Its request id.
    V2(u64),
}

/// One frame of an answer, without what identifies its request.
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

    /// Encodes an error. Texts that the router sent are cut if the frame would be too large otherwise.
    pub fn from_payload(payload: &mut ErrorPayload) -> Self {
        let mut bytes = payload.encode();
        if bytes.len() > PAYLOAD_MAX {
            // Code, status and reason say more than what is cut.
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

/// The text of an error, cut to what a reply may carry.
pub fn shortened(mut text: String) -> String {
    if text.len() > TEXT_MAX {
        text.truncate(text.floor_char_boundary(TEXT_MAX));
        text.push('…');
    }
    text
}
