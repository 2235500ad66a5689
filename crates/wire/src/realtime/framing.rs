//! Several protocol messages in one WebSocket message: lines of JSON, or length-delimited protobuf.

use super::{Command, Reply};
use bytes::{Buf, Bytes};
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    Json,
    Protobuf,
}

impl Encoding {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Protobuf => "protobuf",
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("the message is not JSON of the client protocol: {}", crate::unfit(.0))]
    Json(#[from] serde_json::Error),
    #[error("the message is not protobuf of the client protocol: {0}")]
    Protobuf(#[from] prost::DecodeError),
    #[error("a line of the message is not a JSON object")]
    NotAnObject,
    #[error("the message is not UTF-8")]
    Utf8,
}

/// A message of the protocol, in either direction.
pub trait Framed: Message + Default + Serialize + DeserializeOwned {}
impl Framed for Command {}
impl Framed for Reply {}

/// Decodes all commands of a WebSocket message.
pub fn decode_commands(encoding: Encoding, bytes: &Bytes) -> Result<Vec<Command>, FrameError> {
    decode(encoding, bytes)
}

/// Decodes all replies of a WebSocket message.
pub fn decode_replies(encoding: Encoding, bytes: &Bytes) -> Result<Vec<Reply>, FrameError> {
    decode(encoding, bytes)
}

fn decode<T: Framed>(encoding: Encoding, bytes: &Bytes) -> Result<Vec<T>, FrameError> {
    match encoding {
        Encoding::Json => {
            let text = std::str::from_utf8(bytes).map_err(|_| FrameError::Utf8)?;
            let lines = text.split('\n').filter(|line| !line.trim().is_empty());
            lines.map(object).collect()
        }
        Encoding::Protobuf => {
            let mut bytes = bytes.clone();
            let mut messages = Vec::new();
            while bytes.has_remaining() {
                messages.push(T::decode_length_delimited(&mut bytes)?);
            }
            Ok(messages)
        }
    }
}

fn object<T: DeserializeOwned>(line: &str) -> Result<T, FrameError> {
    // serde would accept an array for a struct too.
    if !line.trim_start().starts_with('{') {
        return Err(FrameError::NotAnObject);
    }
    Ok(serde_json::from_str(line)?)
}

/// Appends one command to `into`. In JSON, the caller separates commands with `\n`.
pub fn encode_command(encoding: Encoding, command: &Command, into: &mut Vec<u8>) {
    encode(encoding, command, into);
}

/// Appends one reply to `into`. In JSON, the caller separates replies with `\n`.
pub fn encode_reply(encoding: Encoding, reply: &Reply, into: &mut Vec<u8>) {
    encode(encoding, reply, into);
}

fn encode<T: Framed>(encoding: Encoding, message: &T, into: &mut Vec<u8>) {
    match encoding {
        Encoding::Json => serde_json::to_writer(into, message).expect("a protocol message serializes to JSON"),
        Encoding::Protobuf => message
            .encode_length_delimited(into)
            .expect("a vector has room for the message"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_messages_translate_between_the_encodings() {
        let fixtures: serde_json::Value =
            serde_json::from_str(include_str!("../../../../fixtures/wire/realtime.json")).unwrap();
        let check = |case: &serde_json::Value, decoded: Vec<u8>, again: Vec<u8>| {
            assert_eq!(hex::encode(decoded), case["protobuf"].as_str().unwrap(), "{case}");
            assert_eq!(String::from_utf8(again).unwrap(), case["json"].as_str().unwrap(), "{case}");
        };

        for case in fixtures["commands"].as_array().unwrap() {
            let json = Bytes::from(case["json"].as_str().unwrap().to_string());
            let binary = Bytes::from(hex::decode(case["protobuf"].as_str().unwrap()).unwrap());
            let (mut from_json, mut from_binary) = (Vec::new(), Vec::new());
            encode_command(Encoding::Protobuf, &decode_commands(Encoding::Json, &json).unwrap()[0], &mut from_json);
            encode_command(Encoding::Json, &decode_commands(Encoding::Protobuf, &binary).unwrap()[0], &mut from_binary);
            check(case, from_json, from_binary);
        }

        for case in fixtures["replies"].as_array().unwrap() {
            let json = Bytes::from(case["json"].as_str().unwrap().to_string());
            let binary = Bytes::from(hex::decode(case["protobuf"].as_str().unwrap()).unwrap());
            let (mut from_json, mut from_binary) = (Vec::new(), Vec::new());
            encode_reply(Encoding::Protobuf, &decode_replies(Encoding::Json, &json).unwrap()[0], &mut from_json);
            encode_reply(Encoding::Json, &decode_replies(Encoding::Protobuf, &binary).unwrap()[0], &mut from_binary);
            check(case, from_json, from_binary);
        }
    }

    #[test]
    fn embedded_json_passes_through_unchanged() {
        let line = r#"{"id":1,"publish":{"channel":"c","data":{"n":1.50,"big":123456789012345678901234567890}}}"#;
        let commands = decode_commands(Encoding::Json, &Bytes::from(line)).unwrap();
        let mut again = Vec::new();
        encode_command(Encoding::Json, &commands[0], &mut again);
        assert_eq!(String::from_utf8(again).unwrap(), line);
    }

    fn as_json(publication: Publication) -> String {
        let push = Push { r#pub: Some(publication), ..Push::default() };
        let mut out = Vec::new();
        encode_reply(Encoding::Json, &Reply::push("c", push), &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn binary_data_reaches_json_clients_as_base64() {
        let publication = Publication { data: Bytes::from_static(b"\xff\x00"), ..Publication::default() };
        assert_eq!(as_json(publication), r#"{"push":{"channel":"c","pub":{"data":"/wA="}}}"#);
    }

    #[test]
    fn only_line_breaks_between_tokens_become_spaces() {
        let fixtures: serde_json::Value =
            serde_json::from_str(include_str!("../../../../fixtures/wire/realtime.json")).unwrap();
        for case in fixtures["several_lines"].as_array().unwrap() {
            let binary = Bytes::from(hex::decode(case["protobuf"].as_str().unwrap()).unwrap());
            let reply = &decode_replies(Encoding::Protobuf, &binary).unwrap()[0];
            let mut json = Vec::new();
            encode_reply(Encoding::Json, reply, &mut json);
            assert_eq!(String::from_utf8(json).unwrap(), case["json"].as_str().unwrap());
        }
    }

    #[test]
    fn decodes_several_commands_and_pongs() {
        let commands = decode_commands(Encoding::Json, &Bytes::from("{\"id\":1,\"ping\":{}}\n{}\n")).unwrap();
        assert_eq!(commands.len(), 2);
        assert!(commands[0].ping.is_some());
        assert_eq!(commands[1], Command::default());

        let commands = decode_commands(Encoding::Protobuf, &Bytes::from_static(&[0, 2, 8, 5])).unwrap();
        assert_eq!((commands.len(), commands[1].id), (2, 5));

        for bad in ["{", "[1]", "{\"id\":-1}", "\"x\""] {
            assert!(decode_commands(Encoding::Json, &Bytes::from(bad)).is_err(), "{bad}");
        }
    }

    /// JSON that a parser would rewrite: long and odd numbers, unsorted and repeated keys, escapes, whitespace.
    fn json_text() -> impl Strategy<Value = String> {
        let number = "-?(0|[1-9][0-9]{0,30})(\\.[0-9]{1,9})?([eE][+-]?[0-9]{1,3})?";
        let string = r#""([ a-zäß☃]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4}){0,6}""#;
        let leaf = prop_oneof![number, string, Just("true".into()), Just("false".into()), Just("null".into())];
        leaf.prop_recursive(4, 24, 4, move |inner| {
            let gap = "[ \\t\\r\\n]{0,2}";
            let items = proptest::collection::vec((gap, inner.clone(), gap), 0..4);
            let members = proptest::collection::vec((gap, string, gap, gap, inner, gap), 0..4);
            let array = (items, gap).prop_map(|(items, gap)| {
                let items: Vec<String> = items.into_iter().map(|(a, item, b)| a + &item + &b).collect();
                format!("[{gap}{}]", items.join(","))
            });
            let object = (members, gap).prop_map(|(members, gap)| {
                let members: Vec<String> = members
                    .into_iter()
                    .map(|(a, key, b, c, value, d)| a + &key + &b + ":" + &c + &value + &d)
                    .collect();
                format!("{{{gap}{}}}", members.join(","))
            });
            prop_oneof![array, object]
        })
    }

    proptest! {
        #[test]
        fn json_passes_byte_for_byte_except_line_breaks(text in json_text()) {
            let one_line = text.replace(['\n', '\r'], " ");
            let publication = Publication { data: Bytes::from(text.clone()), ..Publication::default() };
            let push = Push { r#pub: Some(publication.clone()), ..Push::default() };

            // JSON clients receive one line with the same text.
            let json = as_json(publication);
            prop_assert!(!json.contains(['\n', '\r']));
            let read = decode_replies(Encoding::Json, &Bytes::from(json)).unwrap().remove(0);
            prop_assert_eq!(&read.push.unwrap().r#pub.unwrap().data[..], one_line.as_bytes());

            // Protobuf clients receive the same bytes.
            let mut binary = Vec::new();
            encode_reply(Encoding::Protobuf, &Reply::push("c", push), &mut binary);
            let read = decode_replies(Encoding::Protobuf, &Bytes::from(binary)).unwrap().remove(0);
            prop_assert_eq!(&read.push.unwrap().r#pub.unwrap().data[..], text.as_bytes());

            // Commands from JSON clients, which are one line each, keep their bytes.
            let line = format!(r#"{{"id":1,"rpc":{{"data":{one_line},"method":"m"}}}}"#);
            let command = decode_commands(Encoding::Json, &Bytes::from(line)).unwrap().remove(0);
            prop_assert_eq!(&command.rpc.unwrap().data[..], one_line.as_bytes());
        }

        #[test]
        fn arbitrary_bytes_are_messages_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let bytes = Bytes::from(bytes);
            for encoding in [Encoding::Json, Encoding::Protobuf] {
                let _ = decode_commands(encoding, &bytes);
                let _ = decode_replies(encoding, &bytes);
            }
        }
    }
}
