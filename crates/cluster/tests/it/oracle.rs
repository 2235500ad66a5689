//! Checks the WebSocket codec against tungstenite: each side reads the frames that the other writes.

use bytes::{Bytes, BytesMut};
use proptest::collection::vec;
use proptest::prelude::*;
use std::io::{self, Read, Write};
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocket};
use tokio_tungstenite::tungstenite::{Error, Message};
use wire::websocket::{Decoder, Event, Opcode, encode};

/// Two buffers in place of a socket.
#[derive(Default)]
struct Pipe {
    read: BytesMut,
    written: BytesMut,
}

impl Read for Pipe {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let size = into.len().min(self.read.len());
        if size == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        into[..size].copy_from_slice(&self.read.split_to(size));
        Ok(size)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.written.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn messages() -> impl Strategy<Value = Vec<Message>> {
    let message = prop_oneof![
        ".{0,300}".prop_map(Message::text),
        vec(any::<u8>(), 0..300).prop_map(Message::binary),
        // Sizes that need the two longer encodings of the length.
        (126_usize..70_000).prop_map(|size| Message::binary(vec![7; size])),
        vec(any::<u8>(), 0..125).prop_map(|bytes| Message::Ping(bytes.into())),
    ];
    vec(message, 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn decoder_reads_frames_of_tungstenite(messages in messages(), cut in 1_usize..5000) {
        let mut theirs = WebSocket::from_raw_socket(Pipe::default(), Role::Client, None);
        for message in &messages {
            theirs.send(message.clone()).unwrap();
        }

        let mut decoder = Decoder::new(100_000);
        let (mut received, mut decoded) = (BytesMut::new(), Vec::new());
        for piece in theirs.get_ref().written.chunks(cut) {
            received.extend_from_slice(piece);
            while let Some(event) = decoder.decode(&mut received).unwrap() {
                decoded.push(match event {
                    Event::Text(bytes) => Message::text(String::from_utf8(bytes.to_vec()).unwrap()),
                    Event::Binary(bytes) => Message::Binary(bytes),
                    Event::Ping(bytes) => Message::Ping(bytes),
                    other => panic!("{other:?}"),
                });
            }
        }
        prop_assert_eq!(decoded, messages);
    }

    #[test]
    fn tungstenite_reads_frames_of_the_encoder(messages in messages()) {
        let mut theirs = WebSocket::from_raw_socket(Pipe::default(), Role::Client, None);
        for message in &messages {
            let (opcode, payload) = match message {
                Message::Text(text) => (Opcode::Text, Bytes::from(text.clone())),
                Message::Binary(bytes) => (Opcode::Binary, bytes.clone()),
                Message::Ping(bytes) => (Opcode::Ping, bytes.clone()),
                other => panic!("{other:?}"),
            };
            encode(opcode, &payload, &mut theirs.get_mut().read);
        }

        for message in messages {
            prop_assert_eq!(theirs.read().unwrap(), message);
        }
        prop_assert!(matches!(theirs.read(), Err(Error::Io(e)) if e.kind() == io::ErrorKind::WouldBlock));
    }
}
