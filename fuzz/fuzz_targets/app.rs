//! Fuzzes app envelopes in both directions: a decoded message encodes, and decodes to the same message again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use wire::app::{Back, Forward};

fuzz_target!(|data: &[u8]| {
    round_trip::<Forward>(data);
    round_trip::<Back>(data);
});

fn round_trip<T: Message + Default>(data: &[u8]) {
    let Ok(message) = T::decode(data) else { return };
    let encoded = message.encode_to_vec();
    assert_eq!(encoded.len(), message.encoded_len());
    let again = T::decode(&*encoded).expect("an encoded message must decode");
    // Compare the bytes: a NaN in a message does not equal itself.
    assert_eq!(again.encode_to_vec(), encoded);
}
