//! Fuzzes the real-time protocol in both directions and encodings: a decoded message encodes, and decodes to the same
//! message again.

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use wire::realtime::{Encoding, decode_commands, decode_replies, encode_command, encode_reply};

fuzz_target!(|data: &[u8]| {
    let bytes = Bytes::copy_from_slice(data);
    for encoding in [Encoding::Json, Encoding::Protobuf] {
        for command in decode_commands(encoding, &bytes).unwrap_or_default() {
            for into in [Encoding::Json, Encoding::Protobuf] {
                let mut out = Vec::new();
                encode_command(into, &command, &mut out);
                let again = decode_commands(into, &line(into, out)).expect("an encoded command must decode");
                if into == encoding {
                    assert_eq!(comparable(&again[0], encode_command), comparable(&command, encode_command));
                }
            }
        }

        for reply in decode_replies(encoding, &bytes).unwrap_or_default() {
            for into in [Encoding::Json, Encoding::Protobuf] {
                let mut out = Vec::new();
                encode_reply(into, &reply, &mut out);
                let again = decode_replies(into, &line(into, out)).expect("an encoded reply must decode");
                if into == encoding {
                    assert_eq!(comparable(&again[0], encode_reply), comparable(&reply, encode_reply));
                }
            }
        }
    }
});

/// Checks that a JSON message is a single line, since clients split a frame into messages at line breaks.
fn line(encoding: Encoding, out: Vec<u8>) -> Bytes {
    assert!(encoding != Encoding::Json || !out.contains(&b'\n'), "a JSON message contains a line break");
    Bytes::from(out)
}

/// The message as JSON, for comparison: a NaN does not equal itself, and embedded JSON is compared without its layout.
fn comparable<T>(message: &T, encode: fn(Encoding, &T, &mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    encode(Encoding::Json, message, &mut out);
    out
}
