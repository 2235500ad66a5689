//! Conversion between the bus' messages and those of the NATS client.

use crate::{Headers, Message};
use async_nats::{HeaderMap, HeaderName, HeaderValue};
use std::borrow::Cow;

/// Headers whose name NATS cannot carry are dropped and counted; line breaks in a value become spaces.
pub fn to_nats(headers: &Headers) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in &headers.0 {
        let Some(name) = header_name(name.clone()) else {
            metrics::counter!("beamline_bus_bad_headers_total").increment(1);
            continue;
        };
        let has_breaks = value.contains(['\r', '\n']);
        map.append(
            name,
            if has_breaks {
                value.replace(['\r', '\n'], " ")
            } else {
                value.clone()
            },
        );
    }
    map
}

/// Size of the headers on the wire, in bytes. The server counts them against `max_payload`.
pub fn header_bytes(headers: &HeaderMap) -> usize {
    let line = |name: &HeaderName, value: &HeaderValue| AsRef::<str>::as_ref(name).len() + value.as_str().len() + 4;
    let lines = headers
        .iter()
        .flat_map(|(name, values)| values.iter().map(move |value| line(name, value)));
    if headers.is_empty() {
        0
    } else {
        "NATS/1.0\r\n\r\n".len() + lines.sum::<usize>()
    }
}

/// `None` if NATS cannot carry the name. Static names are not copied.
fn header_name(name: Cow<'static, str>) -> Option<HeaderName> {
    let valid = !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && b != b':');
    match name {
        _ if !valid => None,
        Cow::Borrowed(name) => Some(HeaderName::from_static(name)),
        Cow::Owned(name) => name.parse().ok(),
    }
}

pub fn from_nats(message: async_nats::Message) -> Message {
    let mut headers = Headers::new();
    for (name, values) in message.headers.iter().flat_map(HeaderMap::iter) {
        for value in values {
            headers.insert(name.to_string(), value.as_str());
        }
    }

    Message {
        subject: message.subject.as_str().into(),
        reply: message.reply.map(|reply| reply.as_str().into()),
        headers,
        payload: message.payload,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_headers_are_dropped_or_escaped() {
        let headers = Headers::new()
            .with("a", "1\r\nb: 2")
            .with("bad name", "x")
            .with("", "y")
            .with("a", "3");

        let map = to_nats(&headers);

        assert_eq!(map.len(), 1);
        let values: Vec<&str> = map.get_all("a").map(|value| value.as_str()).collect();
        assert_eq!(values, ["1  b: 2", "3"]);
    }
}
