//! Splits a byte stream into frames. Sans-IO: the caller reads the bytes.

use super::{ErrorCode, Frame, HEADER_V1, HEADER_V2, Version};
use crate::limits::IPC_FRAME_MAX;
use bytes::{Buf, Bytes, BytesMut};

/// A framing error. The stream cannot be resynchronised, so the client gets an error and the connection closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("Frame length {0} is shorter than the header")]
    TooShort(u32),
    #[error("Frame of {0} bytes exceeds the limit of 4194304 bytes")]
    TooLarge(u32),
    #[error("Unsupported protocol version")]
    Version(u8),
}

impl Violation {
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::TooShort(_) => ErrorCode::InvalidPayload,
            Self::TooLarge(_) => ErrorCode::FrameTooLarge,
            Self::Version(_) => ErrorCode::InvalidVersion,
        }
    }
}

/// Decodes frames. It checks the length and then the version, each as soon as its bytes have arrived.
#[derive(Debug, Default)]
pub struct Decoder;

impl Decoder {
    /// Removes and returns the first frame of `bytes`; `None` while it is incomplete.
    pub fn decode(&mut self, bytes: &mut BytesMut) -> Result<Option<Frame>, Violation> {
        let Some(length) = Self::peek_length(bytes)? else {
            return Ok(None);
        };

        if bytes.len() < 5 {
            return Ok(None);
        }
        let header = match bytes[4] {
            1 => HEADER_V1,
            2 => HEADER_V2,
            other => return Err(Violation::Version(other)),
        };
        if length < header {
            return Err(Violation::TooShort(length as u32));
        }
        if bytes.len() < length {
            return Ok(None);
        }

        // Splitting shares the buffer, so the payload is not copied.

        let mut frame: Bytes = bytes.split_to(length).freeze();
        frame.advance(4);
        let version = frame.get_u8();
        let kind = frame.get_u8();
        let (version, flags) = if version == 1 {
            (Version::V1, 0)
        } else {
            let flags = frame.get_u16();
            (Version::V2 { request_id: frame.get_u64(), deadline_ms: frame.get_u32() }, flags)
        };
        Ok(Some(Frame { version, kind, flags, payload: frame }))
    }

    /// The announced length of the first frame; `None` while `bytes` is shorter than the length field.
    pub fn peek_length(bytes: &[u8]) -> Result<Option<usize>, Violation> {
        let Some(length) = bytes.first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length);
        match length as usize {
            0..HEADER_V1 => Err(Violation::TooShort(length)),
            HEADER_V1..=IPC_FRAME_MAX => Ok(Some(length as usize)),
            _ => Err(Violation::TooLarge(length)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipc::FrameType;
    use proptest::prelude::*;

    fn frames() -> impl Strategy<Value = Vec<Frame>> {
        let version = prop_oneof![
            Just(Version::V1),
            (any::<u64>(), any::<u32>()).prop_map(|(request_id, deadline_ms)| Version::V2 { request_id, deadline_ms }),
        ];
        let frame = (version, any::<u8>(), any::<u16>(), proptest::collection::vec(any::<u8>(), 0..200));
        let frame = frame.prop_map(|(version, kind, flags, payload)| Frame {
            version,
            kind,
            flags: if version == Version::V1 { 0 } else { flags },
            payload: payload.into(),
        });
        proptest::collection::vec(frame, 1..8)
    }

    proptest! {
        #[test]
        fn frames_do_not_depend_on_how_the_bytes_are_split(frames in frames(), cut in 1_usize..40) {
            let mut wire = BytesMut::new();
            frames.iter().for_each(|frame| frame.encode(&mut wire));

            let mut received = BytesMut::new();
            let mut seen = Vec::new();
            for piece in wire.chunks(cut) {
                received.extend_from_slice(piece);
                while let Some(frame) = Decoder.decode(&mut received).unwrap() {
                    seen.push(frame);
                }
            }
            prop_assert_eq!(seen, frames);
        }

        #[test]
        fn arbitrary_bytes_are_a_frame_an_error_or_incomplete(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut bytes = BytesMut::from(&bytes[..]);
            let before = bytes.len();
            match Decoder.decode(&mut bytes) {
                Ok(Some(frame)) => prop_assert_eq!(frame.wire_len() + bytes.len(), before),
                Ok(None) | Err(_) => prop_assert_eq!(bytes.len(), before),
            }
        }
    }

    #[test]
    fn violations_are_found_as_soon_as_their_bytes_arrive() {
        for (hex, expected) in [
            ("00000000", Violation::TooShort(0)),
            ("00000005", Violation::TooShort(5)),
            ("00400001", Violation::TooLarge(4_194_305)),
            ("ffffffff", Violation::TooLarge(u32::MAX)),
            ("0000000603", Violation::Version(3)),
            ("00000013020100", Violation::TooShort(19)),
        ] {
            let mut bytes = BytesMut::from(&hex::decode(hex).unwrap()[..]);
            assert_eq!(Decoder.decode(&mut bytes), Err(expected), "{hex}");
        }
    }

    #[test]
    fn golden_frames_decode_and_encode() {
        let fixtures = include_str!("../../../../fixtures/wire/ipc.json");
        let fixtures: Vec<serde_json::Value> = serde_json::from_str(fixtures).unwrap();
        assert!(fixtures.len() >= 6);
        for case in fixtures {
            let bytes = hex::decode(case["hex"].as_str().unwrap()).unwrap();
            let frame = Decoder.decode(&mut BytesMut::from(&bytes[..])).unwrap().unwrap();
            assert_eq!(u64::from(frame.kind), case["type"].as_u64().unwrap(), "{case}");
            assert_eq!(frame.payload, case["payload"].as_str().unwrap(), "{case}");

            let version = case.get("request_id").map_or(Version::V1, |id| Version::V2 {
                request_id: id.as_u64().unwrap(),
                deadline_ms: case["deadline_ms"].as_u64().unwrap() as u32,
            });
            assert_eq!(frame.version, version);

            let mut again = BytesMut::new();
            Frame::new(version, FrameType::from_byte(frame.kind).unwrap(), frame.payload).encode(&mut again);
            assert_eq!(hex::encode(again), case["hex"].as_str().unwrap());
        }
    }
}
