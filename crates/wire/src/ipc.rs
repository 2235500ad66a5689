//! The IPC protocol between local processes and the gateway: frames of v1 and v2, payloads and error codes.
//!
//! v1 is frozen; its replies come in the order of the requests. v2 multiplexes by request id.

mod decoder;
mod payload;

pub use decoder::{Decoder, Violation};
pub use payload::{
    Capabilities, ErrorDetail, ErrorPayload, ExchangeContext, Limits, StreamComplete, StreamData, TaskAnswer, TaskRef,
    TaskSubmit, Wait,
};

use bytes::{BufMut, Bytes, BytesMut};

/// Bytes of the v1 header: length (4), version (1), type (1).
pub const HEADER_V1: usize = 6;
/// Bytes of the v2 header: that of v1, then flags (2), request id (8), deadline (4).
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

    /// Whether a client may send a frame of this type.
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

/// The protocol version of a frame, with what identifies a request among others of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Identified by its place in the order.
    V1,
    V2 {
        request_id: u64,
        /// Time for the answer; 0 stands for the gateway's default.
        deadline_ms: u32,
    },
}

/// One frame. `kind` is the raw byte, because an unknown type gets an error reply and is not a framing error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub version: Version,
    pub kind: u8,
    /// Only in v2; no flags are defined, so 0.
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

    /// Length on the wire in bytes, header included.
    pub fn wire_len(&self) -> usize {
        let header = match self.version {
            Version::V1 => HEADER_V1,
            Version::V2 { .. } => HEADER_V2,
        };
        header + self.payload.len()
    }

    /// Appends the frame to `into`. The caller must keep it within [`crate::limits::IPC_FRAME_MAX`].
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

/// Codes of [`ErrorPayload`].
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
