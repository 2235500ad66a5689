//! The task that owns the connection.

use crate::Error;
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{mpsc, oneshot};
use wire::ipc::{Decoder, ErrorPayload, Frame, FrameType, Version};

pub struct Call {
    pub kind: FrameType,
    pub payload: Bytes,
    pub deadline_ms: u32,
    pub reader: Reader,
}

/// Who gets what comes back.
pub enum Reader {
    One(oneshot::Sender<Result<Bytes, Error>>),
    Many(mpsc::Sender<Result<(FrameType, Bytes), Error>>),
}

pub async fn run(stream: UnixStream, mut calls: mpsc::Receiver<Call>) {
    let (mut reader, mut writer) = stream.into_split();
    let mut open: HashMap<u64, Reader> = HashMap::new();
    let mut last_id = 0;
    let mut input = BytesMut::new();
    let mut output = BytesMut::new();
    let mut done = false;
    // What the gateway takes no more; what it said before may still be read.
    let mut broken = false;
    loop {
        tokio::select! {
            call = calls.recv(), if !done => match call {
                Some(call) => {
                    let mut next = Some(call);
                    // Whatever else waits goes into the same write.
                    while let Some(call) = next.take() {
                        if broken {
                            break;
                        }
                        last_id += 1;
                        let version = Version::V2 { request_id: last_id, deadline_ms: call.deadline_ms };
                        Frame::new(version, call.kind, call.payload).encode(&mut output);
                        open.insert(last_id, call.reader);
                        next = calls.try_recv().ok();
                    }
                }
                None => done = true,
            },
            written = writer.write_buf(&mut output), if !output.is_empty() => {
                if written.is_err() {
                    broken = true;
                    output.clear();
                }
            }
            more = read(&mut reader, &mut input) => {
                match deliver(&mut input, &mut open).await {
                    Ok(()) if more => {}
                    Ok(()) => return,
                    Err(farewell) => return say_farewell(farewell, open, calls).await,
                }
            }
        }
        if done && open.is_empty() {
            return;
        }
    }
}

async fn read(reader: &mut OwnedReadHalf, input: &mut BytesMut) -> bool {
    input.reserve(16 * 1024);
    reader.read_buf(input).await.is_ok_and(|read| read > 0)
}

/// Every request that waits, and every one to come, gets the gateway's reason.
async fn say_farewell(farewell: Farewell, open: HashMap<u64, Reader>, mut calls: mpsc::Receiver<Call>) {
    calls.close();
    for reader in open.into_values() {
        answer(reader, Err(farewell.error())).await;
    }
    while let Some(call) = calls.recv().await {
        answer(call.reader, Err(farewell.error())).await;
    }
}

/// Why the connection is of no more use.
enum Farewell {
    Said(Box<ErrorPayload>),
    Nonsense(String),
}

impl Farewell {
    fn error(&self) -> Error {
        match self {
            Self::Said(payload) => Error::Refused(payload.clone()),
            Self::Nonsense(text) => Error::Protocol(text.clone()),
        }
    }
}

async fn deliver(input: &mut BytesMut, open: &mut HashMap<u64, Reader>) -> Result<(), Farewell> {
    while let Some(frame) = Decoder.decode(input).map_err(|e| Farewell::Nonsense(e.to_string()))? {
        let Some(kind) = frame.frame_type() else {
            return Err(Farewell::Nonsense(format!("frame type {:#04x}", frame.kind)));
        };
        let Version::V2 { request_id, .. } = frame.version else {
            // Of no request: the gateway says why it closes.
            let said = serde_json::from_slice(&frame.payload);
            return Err(said.map_or_else(|e| Farewell::Nonsense(e.to_string()), Farewell::Said));
        };
        if kind == FrameType::StreamData {
            if let Some(Reader::Many(sender)) = open.get(&request_id)
                && sender.send(Ok((kind, frame.payload))).await.is_err()
            {
                // Nobody reads it any more; its end is still to come.
            }
            continue;
        }
        let Some(reader) = open.remove(&request_id) else { continue };
        let outcome = match kind {
            FrameType::ResponseError | FrameType::StreamError => Err(refusal(&frame.payload)),
            _ => Ok((kind, frame.payload)),
        };
        answer(reader, outcome).await;
    }
    Ok(())
}

async fn answer(reader: Reader, outcome: Result<(FrameType, Bytes), Error>) {
    match reader {
        Reader::One(sender) => _ = sender.send(outcome.map(|(_, payload)| payload)),
        Reader::Many(sender) => _ = sender.send(outcome).await,
    }
}

fn refusal(payload: &[u8]) -> Error {
    match serde_json::from_slice::<ErrorPayload>(payload) {
        Ok(payload) => Error::Refused(Box::new(payload)),
        Err(error) => Error::Protocol(error.to_string()),
    }
}
