//! WebSocket frames (RFC 6455), the server's side. Sans-IO: the caller reads and writes the bytes.
//!
//! A server frame is encoded once into [`Bytes`] and shared by all its receivers.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use sha1::{Digest, Sha1};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Opcode {
    Continuation = 0x0,
    Text = 0x1,
    Binary = 0x2,
    Close = 0x8,
    Ping = 0x9,
    Pong = 0xA,
}

/// A complete message or control frame from a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Text(Bytes),
    Binary(Bytes),
    Ping(Bytes),
    Pong,
    /// With the close code, if the client sent one.
    Close(Option<u16>),
}

/// A violation of the protocol, which closes the connection with [`Violation::close_code`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("a reserved bit is set, but no extension was negotiated")]
    ReservedBits,
    #[error("unknown opcode")]
    Opcode,
    #[error("a frame from a client is not masked")]
    Unmasked,
    #[error("a control frame is fragmented or longer than 125 bytes")]
    Control,
    #[error("a continuation frame without a first frame, or a first frame within a message")]
    Sequence,
    #[error("a close frame has an invalid payload")]
    Close,
    #[error("a text message is not UTF-8")]
    Utf8,
    #[error("a message is longer than {0} bytes")]
    TooLarge(usize),
}

impl Violation {
    pub fn close_code(self) -> u16 {
        match self {
            Self::Utf8 => 1007,
            Self::TooLarge(_) => 1009,
            _ => 1002,
        }
    }
}

/// Decodes a client's bytes into messages and control frames.
#[derive(Debug)]
pub struct Decoder {
    message_max: usize,
    /// The fragments received so far of an incomplete message.
    partial: Option<(Opcode, BytesMut)>,
}

struct Header {
    fin: bool,
    opcode: Opcode,
    mask: [u8; 4],
    header: usize,
    payload: usize,
}

impl Decoder {
    pub fn new(message_max: usize) -> Self {
        Self { message_max, partial: None }
    }

    /// Whether a fragmented message is incomplete.
    pub fn is_partial(&self) -> bool {
        self.partial.is_some()
    }

    /// Returns the next event and removes its bytes from the front; `None` while it is incomplete.
    pub fn decode(&mut self, bytes: &mut BytesMut) -> Result<Option<Event>, Violation> {
        loop {
            let Some(head) = self.header(bytes)? else {
                return Ok(None);
            };
            if bytes.len() < head.header + head.payload {
                return Ok(None);
            }

            bytes.advance(head.header);
            let mut payload = bytes.split_to(head.payload);
            unmask(&mut payload, head.mask);

            match head.opcode {
                Opcode::Ping => return Ok(Some(Event::Ping(payload.freeze()))),
                Opcode::Pong => return Ok(Some(Event::Pong)),
                Opcode::Close => return close(&payload).map(Some),
                Opcode::Continuation => {
                    let (_, message) = self.partial.as_mut().ok_or(Violation::Sequence)?;
                    message.extend_from_slice(&payload);
                }
                Opcode::Text | Opcode::Binary => {
                    if self.partial.is_some() {
                        return Err(Violation::Sequence);
                    }
                    self.partial = Some((head.opcode, payload));
                }
            }

            // Control frames have returned above, so a final frame completes the message in `partial`.
            if head.fin
                && let Some((opcode, message)) = self.partial.take()
            {
                return Ok(Some(match opcode {
                    Opcode::Text if std::str::from_utf8(&message).is_err() => return Err(Violation::Utf8),
                    Opcode::Text => Event::Text(message.freeze()),
                    _ => Event::Binary(message.freeze()),
                }));
            }
        }
    }

    /// Parses the frame's header and refuses a violation as soon as its bytes have arrived.
    fn header(&self, bytes: &[u8]) -> Result<Option<Header>, Violation> {
        let Some(&[first, second]) = bytes.first_chunk::<2>() else {
            return Ok(None);
        };
        if first & 0x70 != 0 {
            return Err(Violation::ReservedBits);
        }

        let fin = first & 0x80 != 0;
        let opcode = match first & 0x0F {
            0x0 => Opcode::Continuation,
            0x1 => Opcode::Text,
            0x2 => Opcode::Binary,
            0x8 => Opcode::Close,
            0x9 => Opcode::Ping,
            0xA => Opcode::Pong,
            _ => return Err(Violation::Opcode),
        };

        if second & 0x80 == 0 {
            return Err(Violation::Unmasked);
        }
        let short = second & 0x7F;
        // Opcodes from 8 on are control frames, which may come between the fragments of a message.
        if opcode as u8 >= 0x8 && (!fin || short > 125) {
            return Err(Violation::Control);
        }

        let (length, at): (u64, usize) = match short {
            126 => match bytes[2..].first_chunk::<2>() {
                Some(length) => (u16::from_be_bytes(*length).into(), 4),
                None => return Ok(None),
            },
            127 => match bytes[2..].first_chunk::<8>() {
                Some(length) => (u64::from_be_bytes(*length), 10),
                None => return Ok(None),
            },
            short => (short.into(), 2),
        };

        // The limit applies to the whole message, including the fragments received before.
        let begun = self.partial.as_ref().map_or(0, |(_, message)| message.len());
        let payload = usize::try_from(length)
            .ok()
            .filter(|payload| begun.saturating_add(*payload) <= self.message_max);
        let payload = payload.ok_or(Violation::TooLarge(self.message_max))?;
        let Some(mask) = bytes[at..].first_chunk::<4>() else {
            return Ok(None);
        };
        Ok(Some(Header { fin, opcode, mask: *mask, header: at + 4, payload }))
    }
}

fn close(payload: &[u8]) -> Result<Event, Violation> {
    match payload {
        [] => Ok(Event::Close(None)),
        [high, low, reason @ ..] => {
            let code = u16::from_be_bytes([*high, *low]);
            let known = matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999);
            if !known || std::str::from_utf8(reason).is_err() {
                return Err(Violation::Close);
            }
            Ok(Event::Close(Some(code)))
        }
        [_] => Err(Violation::Close),
    }
}

/// Applies the mask, eight bytes at a time.
fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    let wide = u64::from_ne_bytes([mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3]]);
    // Chunks of eight keep the mask aligned, and the remainder starts at its first byte again.
    let mut chunks = payload.chunks_exact_mut(8);
    for chunk in &mut chunks {
        let word = u64::from_ne_bytes((&*chunk).try_into().expect("a chunk has eight bytes")) ^ wide;
        chunk.copy_from_slice(&word.to_ne_bytes());
    }

    for (byte, mask) in chunks.into_remainder().iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

/// Appends an unfragmented, unmasked frame to `into`, as a server sends it.
pub fn encode(opcode: Opcode, payload: &[u8], into: &mut BytesMut) {
    into.reserve(10 + payload.len());
    // FIN is set: a server never fragments.
    into.put_u8(0x80 | opcode as u8);
    match payload.len() {
        length @ 0..=125 => into.put_u8(length as u8),
        length @ 126..=0xFFFF => {
            into.put_u8(126);
            into.put_u16(length as u16);
        }
        length => {
            into.put_u8(127);
            into.put_u64(length as u64);
        }
    }

    into.put_slice(payload);
}

/// Appends a close frame to `into`. The reason is truncated to the 123 bytes that a control frame leaves for it.
pub fn encode_close(code: u16, reason: &str, into: &mut BytesMut) {
    let mut end = reason.len().min(123);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }

    let mut payload = Vec::with_capacity(2 + end);
    payload.put_u16(code);
    payload.put_slice(&reason.as_bytes()[..end]);
    encode(Opcode::Close, &payload, into);
}

/// Computes `Sec-WebSocket-Accept` from a client's `Sec-WebSocket-Key`.
pub fn accept_key(key: &str) -> String {
    let mut hash = Sha1::new();
    hash.update(key.as_bytes());
    hash.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    STANDARD.encode(hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [7, 99, 250, 3];
        let mut out = BytesMut::new();
        encode(Opcode::Text, payload, &mut out);
        out[0] = first;
        out[1] |= 0x80;
        let head = out.len() - payload.len();
        let mut bytes = out[..head].to_vec();
        bytes.extend(mask);
        bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        bytes
    }

    fn decode_all(bytes: &[u8]) -> Result<Vec<Event>, Violation> {
        let mut decoder = Decoder::new(1000);
        let mut bytes = BytesMut::from(bytes);
        let mut events = Vec::new();
        while let Some(event) = decoder.decode(&mut bytes)? {
            events.push(event);
        }
        Ok(events)
    }

    #[test]
    fn ping_between_fragments_is_delivered_first() {
        let bytes = [masked(0x01, b"Hel"), masked(0x89, b"?"), masked(0x80, b"lo")].concat();
        let expected = [Event::Ping(Bytes::from_static(b"?")), Event::Text(Bytes::from_static(b"Hello"))];
        assert_eq!(decode_all(&bytes).unwrap(), expected);
    }

    #[test]
    fn each_violation_is_recognized() {
        for (name, bytes, expected) in [
            ("reserved", masked(0xC1, b"x"), Violation::ReservedBits),
            ("opcode", masked(0x83, b"x"), Violation::Opcode),
            ("unmasked", vec![0x81, 0x01, b'x'], Violation::Unmasked),
            ("fragmented ping", masked(0x09, b"x"), Violation::Control),
            ("long ping", masked(0x89, &[0; 126]), Violation::Control),
            ("continuation first", masked(0x80, b"x"), Violation::Sequence),
            ("two beginnings", [masked(0x01, b"x"), masked(0x81, b"y")].concat(), Violation::Sequence),
            ("utf-8", masked(0x81, b"\xff"), Violation::Utf8),
            ("too large", masked(0x82, &[0; 1001]), Violation::TooLarge(1000)),
            (
                "too large in parts",
                [masked(0x02, &[0; 600]), masked(0x80, &[0; 600])].concat(),
                Violation::TooLarge(1000),
            ),
            ("close of one byte", masked(0x88, b"x"), Violation::Close),
            ("close code 1005", masked(0x88, &1005_u16.to_be_bytes()), Violation::Close),
        ] {
            assert_eq!(decode_all(&bytes), Err(expected), "{name}");
        }

        // An oversized frame is refused by its header, before its payload arrives.
        assert_eq!(decode_all(&masked(0x82, &[0; 1001])[..4]), Err(Violation::TooLarge(1000)));
    }

    #[test]
    fn accept_key_matches_the_example_of_the_rfc() {
        assert_eq!(accept_key("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    proptest! {
        #[test]
        fn events_do_not_depend_on_how_the_bytes_are_split(
            messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..6),
            cut in 1_usize..50,
        ) {
            let wire: Vec<u8> = messages.iter().flat_map(|message| masked(0x82, message)).collect();
            let mut decoder = Decoder::new(1000);
            let mut received = BytesMut::new();
            let mut seen = Vec::new();
            for piece in wire.chunks(cut) {
                received.extend_from_slice(piece);
                while let Some(event) = decoder.decode(&mut received).unwrap() {
                    seen.push(event);
                }
            }
            let expected: Vec<Event> = messages.into_iter().map(|m| Event::Binary(m.into())).collect();
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn arbitrary_bytes_are_events_or_a_violation(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_all(&bytes);
        }
    }
}
