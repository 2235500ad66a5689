//! `bytes` fields in JSON: embedded as they are. What is not JSON (a binary publication that a JSON client sees) stands
//! there as a string of base64.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

pub fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
    // Both checks look at each byte once; a publication is encoded once for all its readers.
    let raw: Option<&RawValue> = std::str::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\n'))
        .and_then(|text| serde_json::from_str(text).ok());
    match raw {
        Some(raw) => raw.serialize(serializer),
        // A line break would end the message: JSON that holds some is written without them.
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
