//! The task that owns the connection: it writes requests and routes responses to their callers by request id.

use crate::Error;
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{mpsc, oneshot};
use wire::ipc::{Decoder, ErrorPayload, Frame, FrameType, Version};

/// One request, before it has an id.
pub struct Call {
    pub kind: FrameType,
    pub payload: Bytes,
    /// 0 means the gateway's default.
    pub deadline_ms: u32,
    pub reader: Reader,
}

/// The receiver of a request's response frames.
pub enum Reader {
    /// A single response.
    One(oneshot::Sender<Result<Bytes, Error>>),
    /// A stream of frames up to the last one or an error.
    Many(mpsc::Sender<Result<(FrameType, Bytes), Error>>),
}

/// Runs until the gateway closes the connection, or until all handles are dropped and every request has its response.
pub async fn run(stream: UnixStream, mut calls: mpsc::Receiver<Call>) {
    let (mut reader, mut writer) = stream.into_split();
    let mut open: HashMap<u64, Reader> = HashMap::new();
    let mut last_id = 0;
    let mut input = BytesMut::new();
    let mut output = BytesMut::new();
    // All handles are dropped; no more calls will come.
    let mut done = false;
    // Set once a write has failed. The gateway may have sent a reason before it closed, so reading continues.
    let mut broken = false;

    loop {
        tokio::select! {
            call = calls.recv(), if !done => match call {
                Some(call) => {
                    let mut next = Some(call);
                    // All queued calls go into the same write.
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
                    // Dropping `open` and `calls` fails all requests as closed.
                    Ok(()) => return,
                    Err(cause) => return fail_all(cause, open, calls).await,
                }
            }
        }

        if done && open.is_empty() {
            return;
        }
    }
}

/// Reads more input; `false` once the connection has ended.
async fn read(reader: &mut OwnedReadHalf, input: &mut BytesMut) -> bool {
    input.reserve(16 * 1024);
    reader.read_buf(input).await.is_ok_and(|read| read > 0)
}

/// Fails every request in flight and every queued call with the reason why the connection ended.
async fn fail_all(cause: Cause, open: HashMap<u64, Reader>, mut calls: mpsc::Receiver<Call>) {
    calls.close();
    for reader in open.into_values() {
        answer(reader, Err(cause.error())).await;
    }

    while let Some(call) = calls.recv().await {
        answer(call.reader, Err(cause.error())).await;
    }
}

/// Why the connection can no longer be used.
enum Cause {
    /// The error that the gateway sent before it closed.
    Refused(Box<ErrorPayload>),
    /// The gateway violated the protocol.
    Protocol(String),
}

impl Cause {
    fn error(&self) -> Error {
        match self {
            Self::Refused(payload) => Error::Refused(payload.clone()),
            Self::Protocol(text) => Error::Protocol(text.clone()),
        }
    }
}

/// Routes all complete frames in `input`. An error means that the connection can no longer be used.
async fn deliver(input: &mut BytesMut, open: &mut HashMap<u64, Reader>) -> Result<(), Cause> {
    while let Some(frame) = Decoder.decode(input).map_err(|e| Cause::Protocol(e.to_string()))? {
        let Some(kind) = frame.frame_type() else {
            return Err(Cause::Protocol(format!("unknown frame type {:#04x}", frame.kind)));
        };
        let Version::V2 { request_id, .. } = frame.version else {
            // A frame without a request id is the gateway's reason for closing the connection.
            let error = serde_json::from_slice(&frame.payload);
            return Err(error.map_or_else(|e| Cause::Protocol(e.to_string()), Cause::Refused));
        };

        if kind == FrameType::StreamData {
            if let Some(Reader::Many(sender)) = open.get(&request_id)
                && sender.send(Ok((kind, frame.payload))).await.is_err()
            {
                // The reader was dropped. The entry stays until the last frame of the stream removes it.
            }
            continue;
        }

        let Some(reader) = open.remove(&request_id) else {
            continue;
        };
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
