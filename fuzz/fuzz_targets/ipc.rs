//! Fuzzes the IPC decoder: the frames do not depend on how the bytes are split, a frame encodes back to its bytes, and
//! payloads decode or are refused.

#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use wire::ipc::{Decoder, ErrorPayload, Frame, StreamData, TaskAnswer, TaskRef, TaskSubmit};
use wire::router::{DecideRequest, ExecResult};

fuzz_target!(|input: (u8, &[u8])| {
    let (cut, data) = input;
    let whole = decode(data, data.len().max(1));
    assert_eq!(decode(data, usize::from(cut).max(1)), whole, "the frames depend on how the bytes were split");

    let mut again = BytesMut::new();
    for frame in &whole {
        frame.encode(&mut again);
        payload(frame);
    }
    assert_eq!(again, data[..again.len()], "a frame does not encode back to its bytes");
});

fn decode(data: &[u8], cut: usize) -> Vec<Frame> {
    let (mut received, mut frames) = (BytesMut::new(), Vec::new());
    for piece in data.chunks(cut) {
        received.extend_from_slice(piece);
        loop {
            let before = received.len();
            match Decoder.decode(&mut received) {
                Ok(Some(frame)) => {
                    assert_eq!(frame.wire_len() + received.len(), before);
                    frames.push(frame);
                }
                Ok(None) => break,
                Err(violation) => {
                    assert!(!violation.to_string().is_empty() && violation.code() as u16 <= 4);
                    return frames;
                }
            }
        }
    }
    frames
}

fn payload(frame: &Frame) {
    let bytes = &frame.payload;
    if let Ok(submit) = serde_json::from_slice::<TaskSubmit>(bytes) {
        let encoded = serde_json::to_vec(&submit).expect("a decoded submit must encode");
        serde_json::from_slice::<TaskSubmit>(&encoded).expect("an encoded submit must decode");
    }

    let _ = serde_json::from_slice::<TaskRef>(bytes);
    let _ = serde_json::from_slice::<TaskAnswer>(bytes);
    let _ = serde_json::from_slice::<StreamData>(bytes);
    let _ = serde_json::from_slice::<ErrorPayload>(bytes);
    let _ = serde_json::from_slice::<DecideRequest>(bytes);

    if let Ok(result) = ExecResult::decode(bytes) {
        let encoded = serde_json::to_vec(&result).expect("a decoded result must encode");
        ExecResult::decode(&encoded).expect("an encoded result must decode");
    }
}
