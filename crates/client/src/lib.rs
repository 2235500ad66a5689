//! What a program on the host uses: a client of the gateway's Unix socket, protocol v2.
//!
//! A [`Client`] is a cheap handle; one task owns the connection and ends when the last handle is gone.
//! Any number of requests run at once.

mod connection;

use bytes::Bytes;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use wire::ipc::{Capabilities, ErrorPayload, FrameType, StreamComplete, StreamData, TaskAnswer, TaskRef};

/// Requests that wait for the connection to take them.
const QUEUE: usize = 256;
/// Frames of one stream that wait for its reader; beyond it the connection is not read.
const STREAM_QUEUE: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot connect to {path}: {problem}; {}", advice(.problem))]
    Connect { path: String, problem: std::io::Error },
    #[error("the gateway closed the connection before it answered")]
    Closed,
    /// The gateway's answer, with its code.
    #[error("{}", describe(.0))]
    Refused(Box<ErrorPayload>),
    #[error("the request has {0} bytes, more than a frame holds")]
    TooLarge(usize),
    #[error("the gateway's answer does not fit the protocol: {0}")]
    Protocol(String),
}

fn advice(problem: &std::io::Error) -> &'static str {
    match problem.kind() {
        std::io::ErrorKind::PermissionDenied => "gateway.allowed_uids lets other users in than the gateway's own",
        _ => "is the gateway running?",
    }
}

fn describe(payload: &ErrorPayload) -> String {
    let error = &payload.error;
    let mut text = format!("{} (code {}", error.message, error.code);
    if let (Some(reason), Some(status)) = (&error.reason, error.status) {
        text += &format!(", {reason}, status {status}");
    }
    if let Some(ms) = error.retry_after_ms {
        text += &format!(", try again in {ms} ms");
    }
    text + ")"
}

#[derive(Clone)]
pub struct Client {
    requests: mpsc::Sender<connection::Call>,
}

impl Client {
    pub async fn connect(path: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|problem| Error::Connect { path: path.display().to_string(), problem })?;
        let (requests, inbox) = mpsc::channel(QUEUE);
        tokio::spawn(connection::run(stream, inbox));
        Ok(Self { requests })
    }

    pub async fn ping(&self) -> Result<(), Error> {
        self.call(FrameType::Ping, Bytes::new(), None).await.map(drop)
    }

    pub async fn capabilities(&self) -> Result<Capabilities, Error> {
        decode(&self.call(FrameType::Capabilities, Bytes::new(), None).await?)
    }

    /// Hands in a TASK_SUBMIT payload with `wait` decision or result; the answer as the gateway gave it.
    pub async fn submit(&self, submit: &Value) -> Result<Value, Error> {
        decode(&self.call(FrameType::TaskSubmit, json(submit), None).await?)
    }

    /// Hands in a TASK_SUBMIT payload with `wait` stream.
    pub async fn stream(&self, submit: &Value) -> Result<TaskStream, Error> {
        self.open(FrameType::TaskSubmit, json(submit)).await
    }

    /// What a running task puts out from now on.
    pub async fn subscribe(&self, task_id: &str) -> Result<TaskStream, Error> {
        self.open(FrameType::StreamSubscribe, reference(task_id)).await
    }

    pub async fn query(&self, task_id: &str) -> Result<TaskAnswer, Error> {
        decode(&self.call(FrameType::TaskQuery, reference(task_id), None).await?)
    }

    pub async fn cancel(&self, task_id: &str) -> Result<TaskAnswer, Error> {
        decode(&self.call(FrameType::TaskCancel, reference(task_id), None).await?)
    }

    /// One request with a single answer; `deadline` (the gateway's default if `None`) has millisecond steps.
    pub async fn call(&self, kind: FrameType, payload: Bytes, deadline: Option<Duration>) -> Result<Bytes, Error> {
        let (answer, answered) = oneshot::channel();
        self.send(kind, payload, deadline, connection::Reader::One(answer)).await?;
        answered.await.map_err(|_| Error::Closed)?
    }

    async fn open(&self, kind: FrameType, payload: Bytes) -> Result<TaskStream, Error> {
        let (sender, frames) = mpsc::channel(STREAM_QUEUE);
        self.send(kind, payload, None, connection::Reader::Many(sender)).await?;
        Ok(TaskStream { frames, ended: false })
    }

    async fn send(
        &self,
        kind: FrameType,
        payload: Bytes,
        deadline: Option<Duration>,
        reader: connection::Reader,
    ) -> Result<(), Error> {
        if payload.len() + wire::ipc::HEADER_V2 > wire::limits::IPC_FRAME_MAX {
            return Err(Error::TooLarge(payload.len()));
        }
        let deadline_ms = deadline.map_or(0, |d| u32::try_from(d.as_millis()).unwrap_or(u32::MAX));
        let call = connection::Call { kind, payload, deadline_ms, reader };
        self.requests.send(call).await.map_err(|_| Error::Closed)
    }
}

/// One event of a streamed task.
#[derive(Debug)]
pub enum StreamEvent {
    Data(StreamData),
    /// The last one: the ExecResult.
    Complete(StreamComplete),
}

pub struct TaskStream {
    frames: mpsc::Receiver<Result<(FrameType, Bytes), Error>>,
    /// The last event or an error has been given out.
    ended: bool,
}

impl TaskStream {
    /// The next event; `None` after the last. A connection that ends before it is [`Error::Closed`].
    pub async fn next(&mut self) -> Result<Option<StreamEvent>, Error> {
        if self.ended {
            return Ok(None);
        }
        let event = match self.frames.recv().await {
            None => Err(Error::Closed),
            Some(Err(error)) => Err(error),
            Some(Ok((FrameType::StreamData, payload))) => return Ok(Some(StreamEvent::Data(decode(&payload)?))),
            Some(Ok((FrameType::StreamComplete, payload))) => {
                decode(&payload).map(|last| Some(StreamEvent::Complete(last)))
            }
            Some(Ok((kind, _))) => Err(Error::Protocol(format!("{kind:?} within a stream"))),
        };
        self.ended = true;
        event
    }
}

fn json(value: &Value) -> Bytes {
    serde_json::to_vec(value).expect("a value is JSON").into()
}

fn reference(task_id: &str) -> Bytes {
    let task = TaskRef { command: None, task_id: task_id.into() };
    serde_json::to_vec(&task).expect("a reference is JSON").into()
}

fn decode<T: serde::de::DeserializeOwned>(payload: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(payload).map_err(|e| Error::Protocol(e.to_string()))
}
