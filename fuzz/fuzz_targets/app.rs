//! App envelopes, both directions: what is read can be written, and reads the same again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use wire::app::{Back, Forward};

fuzz_target!(|data: &[u8]| {
    there_and_back::<Forward>(data);
    there_and_back::<Back>(data);
});

fn there_and_back<T: Message + Default>(data: &[u8]) {
    let Ok(message) = T::decode(data) else { return };
    let encoded = message.encode_to_vec();
    assert_eq!(encoded.len(), message.encoded_len());
    let again = T::decode(&*encoded).expect("what was written can be read");
    // By bytes: a NaN is not equal to itself.
    assert_eq!(again.encode_to_vec(), encoded);
}
