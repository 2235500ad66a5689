//! Our messages and NATS's.

use crate::{Headers, Message};
use async_nats::{HeaderMap, HeaderName};

/// Names that NATS cannot carry are counted and left out; line breaks in a value become spaces.
pub fn to_nats(headers: &Headers) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in headers.iter() {
        match name.parse::<HeaderName>() {
            Ok(valid) if !name.is_empty() && !name.contains(char::is_whitespace) => {
                map.append(valid, value.replace(['\r', '\n'], " "))
            }
            _ => metrics::counter!("beamline_bus_bad_headers_total").increment(1),
        }
    }
    map
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
    fn headers_cannot_break_the_protocol() {
        let headers = Headers::new().with("a", "1\r\nb: 2").with("bad name", "x").with("", "y").with("a", "3");
        let map = to_nats(&headers);
        assert_eq!(map.len(), 1);
        let values: Vec<&str> = map.get_all("a").map(|value| value.as_str()).collect();
        assert_eq!(values, ["1  b: 2", "3"]);
    }
}
