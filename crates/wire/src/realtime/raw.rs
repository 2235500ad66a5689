//! `bytes` fields in JSON: embedded as they are, byte for byte, except that line breaks become spaces. What is not JSON (a
//! binary publication for a JSON client) is written as a string of base64.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::ser::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

pub fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
    // Every check reads the bytes once; a publication is encoded once for all its readers.
    let text = std::str::from_utf8(bytes).ok();
    let Some(raw) = text.and_then(|text| serde_json::from_str::<&RawValue>(text).ok()) else {
        return STANDARD.encode(bytes).serialize(serializer);
    };
    // A line break would end the message. Two searches, since one for a single byte is several times faster than one for
    // either of two.
    if !raw.get().contains('\n') && !raw.get().contains('\r') {
        return raw.serialize(serializer);
    }

    // The text is valid JSON, so its line breaks are between tokens (in a string they are escaped): a space is the same.
    let one_line = RawValue::from_string(raw.get().replace(['\n', '\r'], " ")).map_err(S::Error::custom)?;
    one_line.serialize(serializer)
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    let raw = Box::<RawValue>::deserialize(deserializer)?;
    Ok(Bytes::from(String::from(Box::<str>::from(raw))))
}
