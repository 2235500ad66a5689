//! The IPC protocol between local processes and the gateway: frames v1 and v2, payloads, error codes.
//!
//! v1 is frozen: replies come in the order of the requests. v2 multiplexes by request id.

mod decoder;
mod payload;

pub use decoder::{Decoder, Violation};
pub use payload::{
    Capabilities, ErrorDetail, ErrorPayload, ExchangeContext, Limits, StreamComplete, StreamData, TaskAnswer, TaskRef,
    TaskSubmit, Wait,
};

use bytes::{BufMut, Bytes, BytesMut};

/// Length, version, type.
pub const HEADER_V1: usize = 6;
/// The v1 header, then flags, request id, deadline.
pub const HEADER_V2: usize = 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameType {
    TaskSubmit = 0x01,
    TaskQuery = 0x02,
    TaskCancel = 0x03,
    StreamSubscribe = 0x04,
    StreamData = 0x05,
    StreamComplete = 0x06,
    StreamError = 0x07,
    ResponseOk = 0x10,
    ResponseError = 0x11,
    Ping = 0xF0,
    Pong = 0xF1,
    Capabilities = 0xF2,
}

impl FrameType {
    pub const ALL: [Self; 12] = [
        Self::TaskSubmit,
        Self::TaskQuery,
        Self::TaskCancel,
        Self::StreamSubscribe,
        Self::StreamData,
        Self::StreamComplete,
        Self::StreamError,
        Self::ResponseOk,
        Self::ResponseError,
        Self::Ping,
        Self::Pong,
        Self::Capabilities,
    ];

    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|known| *known as u8 == byte)
    }

    /// A client may send it.
    pub fn is_request(self) -> bool {
        matches!(
            self,
            Self::TaskSubmit
                | Self::TaskQuery
                | Self::TaskCancel
                | Self::StreamSubscribe
                | Self::Ping
                | Self::Capabilities
        )
    }
}

/// How a request is told apart from others of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// By its place in the order.
    V1,
    V2 {
        request_id: u64,
        /// 0: the gateway's default.
        deadline_ms: u32,
    },
}

/// One frame. `kind` is the raw byte: a type that is not known is answered, not a framing error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub version: Version,
    pub kind: u8,
    /// v2; 0 for now.
    pub flags: u16,
    pub payload: Bytes,
}

impl Frame {
    pub fn new(version: Version, kind: FrameType, payload: impl Into<Bytes>) -> Self {
        Self { version, kind: kind as u8, flags: 0, payload: payload.into() }
    }

    pub fn frame_type(&self) -> Option<FrameType> {
        FrameType::from_byte(self.kind)
    }

    /// Bytes on the wire.
    pub fn wire_len(&self) -> usize {
        let header = match self.version {
            Version::V1 => HEADER_V1,
            Version::V2 { .. } => HEADER_V2,
        };
        header + self.payload.len()
    }

    /// Appends the frame. The caller has made sure that it is not over [`crate::limits::IPC_FRAME_MAX`].
    pub fn encode(&self, into: &mut BytesMut) {
        let length = u32::try_from(self.wire_len()).expect("frames are at most 4 MiB");
        into.reserve(self.wire_len());
        into.put_u32(length);
        match self.version {
            Version::V1 => {
                into.put_u8(1);
                into.put_u8(self.kind);
            }
            Version::V2 { request_id, deadline_ms } => {
                into.put_u8(2);
                into.put_u8(self.kind);
                into.put_u16(self.flags);
                into.put_u64(request_id);
                into.put_u32(deadline_ms);
            }
        }
        into.put_slice(&self.payload);
    }
}

/// Codes of error payloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
pub enum ErrorCode {
    InvalidVersion = 1,
    InvalidType = 2,
    FrameTooLarge = 3,
    InvalidPayload = 4,
    Timeout = 5,
    ConnectionClosed = 6,
    Overloaded = 10,
    Unavailable = 11,
    Rejected = 12,
    Forbidden = 13,
    Internal = 99,
}

impl ErrorCode {
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidVersion => "INVALID_VERSION",
            Self::InvalidType => "INVALID_TYPE",
            Self::FrameTooLarge => "FRAME_TOO_LARGE",
            Self::InvalidPayload => "INVALID_PAYLOAD",
            Self::Timeout => "TIMEOUT",
            Self::ConnectionClosed => "CONNECTION_CLOSED",
            Self::Overloaded => "OVERLOADED",
            Self::Unavailable => "UNAVAILABLE",
            Self::Rejected => "REJECTED",
            Self::Forbidden => "FORBIDDEN",
            Self::Internal => "INTERNAL",
        }
    }
}
