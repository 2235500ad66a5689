//! Serializes `bytes` fields as embedded JSON. Data that is not JSON, such as a binary publication that reaches a JSON
//! client, becomes a base64 string.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

pub fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
    // The checks read every byte, which is affordable: a publication is encoded once for all its subscribers.
    let raw: Option<&RawValue> = std::str::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\n'))
        .and_then(|text| serde_json::from_str(text).ok());
    match raw {
        Some(raw) => raw.serialize(serializer),
        // A line break would end the message, so JSON that contains one is rewritten without.
        None => match serde_json::from_slice::<serde_json::Value>(bytes) {
            Ok(value) => value.serialize(serializer),
            Err(_) => STANDARD.encode(bytes).serialize(serializer),
        },
    }
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    let raw = Box::<RawValue>::deserialize(deserializer)?;
    Ok(Bytes::from(String::from(Box::<str>::from(raw))))
}
