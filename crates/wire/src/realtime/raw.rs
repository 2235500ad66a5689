//! Serializes `bytes` fields as embedded JSON, byte for byte except that line breaks become spaces. Data that is not
//! JSON, such as a binary publication that reaches a JSON client, becomes a base64 string.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

pub fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
    // The checks read every byte, which is affordable: a publication is encoded once for all its subscribers.
    let text = std::str::from_utf8(bytes).ok();
    let Some(raw) = text.and_then(|text| serde_json::from_str::<&RawValue>(text).ok()) else {
        return STANDARD.encode(bytes).serialize(serializer);
    };

    // A line break would end the message.
    match crate::json::one_line(raw) {
        Some(one_line) => one_line.serialize(serializer),
        None => raw.serialize(serializer),
    }
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    let raw = Box::<RawValue>::deserialize(deserializer)?;
    Ok(Bytes::from(String::from(Box::<str>::from(raw))))
}
