//! Fuzzes the WebSocket decoder: the events do not depend on how the bytes are split, and buffered data stays bounded.

#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use wire::websocket::{Decoder, Event, Opcode, Violation, encode, encode_close};

const MESSAGE_MAX: usize = 4096;

fuzz_target!(|input: (u8, &[u8])| {
    let (cut, data) = input;
    let whole = decode(data, data.len().max(1));
    assert_eq!(decode(data, usize::from(cut).max(1)), whole, "the events depend on how the bytes were split");
    for event in &whole.0 {
        answer(event);
    }
});

fn decode(data: &[u8], cut: usize) -> (Vec<Event>, Option<Violation>) {
    let mut decoder = Decoder::new(MESSAGE_MAX);
    let (mut received, mut events) = (BytesMut::new(), Vec::new());
    for piece in data.chunks(cut) {
        received.extend_from_slice(piece);
        loop {
            match decoder.decode(&mut received) {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(violation) => {
                    assert!(matches!(violation.close_code(), 1002 | 1007 | 1009));
                    return (events, Some(violation));
                }
            }
        }
        // The decoder refuses an oversized frame by its header, so it never buffers more than one frame.
        assert!(received.len() <= MESSAGE_MAX + 14 + cut);
    }
    (events, None)
}

/// Encodes the server's answer to an event and checks the frame's length and contents.
fn answer(event: &Event) {
    let mut out = BytesMut::new();
    match event {
        Event::Text(text) => {
            let text = std::str::from_utf8(text).expect("a text event must be UTF-8");
            assert!(text.len() <= MESSAGE_MAX);
            encode(Opcode::Text, text.as_bytes(), &mut out);
            assert!(out.ends_with(text.as_bytes()));
            out.clear();
            encode_close(1000, text, &mut out);
            assert!(out.len() <= 127 && out[1] as usize == out.len() - 2);
            std::str::from_utf8(&out[4..]).expect("a reason must be cut at a character boundary");
        }
        Event::Binary(data) => {
            assert!(data.len() <= MESSAGE_MAX);
            encode(Opcode::Binary, data, &mut out);
            assert!(out.ends_with(data));
        }
        Event::Ping(data) => {
            assert!(data.len() <= 125);
            encode(Opcode::Pong, data, &mut out);
            assert_eq!(out.len(), 2 + data.len());
        }
        Event::Close(Some(code)) => assert!((1000..5000).contains(code)),
        Event::Close(None) | Event::Pong => {}
    }
}
