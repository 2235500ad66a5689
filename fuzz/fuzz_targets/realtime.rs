//! The real-time protocol, JSON and protobuf, both directions: what is read can be written, and reads the same again.

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
                let again = decode_commands(into, &line(into, out)).expect("what was written can be read");
                if into == encoding {
                    assert_eq!(settled(&again[0], encode_command), settled(&command, encode_command));
                }
            }
        }
        for reply in decode_replies(encoding, &bytes).unwrap_or_default() {
            for into in [Encoding::Json, Encoding::Protobuf] {
                let mut out = Vec::new();
                encode_reply(into, &reply, &mut out);
                let again = decode_replies(into, &line(into, out)).expect("what was written can be read");
                if into == encoding {
                    assert_eq!(settled(&again[0], encode_reply), settled(&reply, encode_reply));
                }
            }
        }
    }
});

/// One message is one line: what a client splits at line breaks must not be split within.
fn line(encoding: Encoding, out: Vec<u8>) -> Bytes {
    assert!(encoding != Encoding::Json || !out.contains(&b'\n'), "a line break within a message");
    Bytes::from(out)
}

/// As protobuf: equal where NaN is not, and JSON that was laid out over lines is compared by what it says.
fn settled<T>(message: &T, encode: fn(Encoding, &T, &mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    encode(Encoding::Json, message, &mut out);
    out
}
