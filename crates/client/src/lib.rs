//! A client of the gateway's Unix socket (IPC protocol v2), for programs on the same host.
//!
//! A [`Client`] is a cheap handle. One task owns the connection and ends when the last handle is dropped. Any number of
//! requests may be in flight at once.

mod connection;

use bytes::Bytes;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use wire::ipc::{Capabilities, ErrorPayload, FrameType, StreamComplete, StreamData, TaskAnswer, TaskRef};

/// Maximum requests queued for the connection task; beyond it, callers wait.
const QUEUE: usize = 256;
/// Maximum frames of one stream queued for its reader. Beyond it, the whole connection is not read until the reader
/// catches up.
const STREAM_QUEUE: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot connect to {path}: {problem}; {}", advice(.problem))]
    Connect { path: String, problem: std::io::Error },
    #[error("the gateway closed the connection before it answered")]
    Closed,
    /// The gateway answered with an error; the payload holds its code.
    #[error("{}", describe(.0))]
    Refused(Box<ErrorPayload>),
    #[error("the request has {0} bytes and does not fit in a frame")]
    TooLarge(usize),
    #[error("the gateway's answer does not fit the protocol: {0}")]
    Protocol(String),
}

fn advice(problem: &std::io::Error) -> &'static str {
    match problem.kind() {
        std::io::ErrorKind::PermissionDenied => "add this user to gateway.allowed_uids",
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

/// A handle to one connection; clones share it.
#[derive(Clone)]
pub struct Client {
    requests: mpsc::Sender<connection::Call>,
    /// The tenant that [`Client::query`], [`Client::cancel`] and [`Client::subscribe`] name.
    tenant: Option<Arc<str>>,
}

impl Client {
    /// Connects to the socket at `path`.
    pub async fn connect(path: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|problem| Error::Connect { path: path.display().to_string(), problem })?;
        let (requests, queue) = mpsc::channel(QUEUE);
        tokio::spawn(connection::run(stream, queue));
        Ok(Self { requests, tenant: None })
    }

    /// A handle to the same connection for the tasks of this tenant. Without a tenant, the gateway searches the tenants
    /// that its settings allow the user.
    #[must_use]
    pub fn of_tenant(&self, tenant: &str) -> Self {
        Self { requests: self.requests.clone(), tenant: Some(tenant.into()) }
    }

    /// Checks that the gateway answers.
    pub async fn ping(&self) -> Result<(), Error> {
        self.call(FrameType::Ping, Bytes::new(), None).await.map(drop)
    }

    /// The gateway's protocol versions, features and limits.
    pub async fn capabilities(&self) -> Result<Capabilities, Error> {
        decode(&self.call(FrameType::Capabilities, Bytes::new(), None).await?)
    }

    /// Sends a TASK_SUBMIT payload whose `wait` is `decision` or `result`; returns the gateway's response unchanged.
    pub async fn submit(&self, submit: &Value) -> Result<Value, Error> {
        decode(&self.call(FrameType::TaskSubmit, json(submit), None).await?)
    }

    /// Sends a TASK_SUBMIT payload whose `wait` is `stream`; returns the task's output as it is produced.
    pub async fn stream(&self, submit: &Value) -> Result<TaskStream, Error> {
        self.open(FrameType::TaskSubmit, json(submit)).await
    }

    /// Subscribes to the output that a running task produces from now on.
    pub async fn subscribe(&self, task_id: &str) -> Result<TaskStream, Error> {
        self.open(FrameType::StreamSubscribe, self.reference(task_id)).await
    }

    /// The task's state, decision and, once it has ended, result.
    pub async fn query(&self, task_id: &str) -> Result<TaskAnswer, Error> {
        decode(&self.call(FrameType::TaskQuery, self.reference(task_id), None).await?)
    }

    /// Cancels the task; returns its state.
    pub async fn cancel(&self, task_id: &str) -> Result<TaskAnswer, Error> {
        decode(&self.call(FrameType::TaskCancel, self.reference(task_id), None).await?)
    }

    fn reference(&self, task_id: &str) -> Bytes {
        let tenant_id = self.tenant.as_deref().map(String::from);
        let task = TaskRef { command: None, task_id: task_id.into(), tenant_id };
        serde_json::to_vec(&task).expect("a task reference is JSON").into()
    }

    /// Sends one request and waits for its single response. The gateway enforces `deadline` in whole milliseconds;
    /// `None` means the gateway's default.
    pub async fn call(&self, kind: FrameType, payload: Bytes, deadline: Option<Duration>) -> Result<Bytes, Error> {
        let (answer, answered) = oneshot::channel();
        self.send(kind, payload, deadline, connection::Reader::One(answer))
            .await?;
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
    /// The last event: the ExecResult.
    Complete(StreamComplete),
}

/// The output of one task, as frames arrive.
pub struct TaskStream {
    frames: mpsc::Receiver<Result<(FrameType, Bytes), Error>>,
    /// Set once [`TaskStream::next`] has returned the last event or an error.
    ended: bool,
}

impl TaskStream {
    /// The next event; `None` after the last one. [`Error::Closed`] means that the connection ended before it.
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
            Some(Ok((kind, _))) => Err(Error::Protocol(format!("unexpected frame {kind:?} in a stream"))),
        };
        self.ended = true;
        event
    }
}

fn json(value: &Value) -> Bytes {
    serde_json::to_vec(value).expect("a JSON value serializes").into()
}

fn decode<T: serde::de::DeserializeOwned>(payload: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(payload).map_err(|e| Error::Protocol(e.to_string()))
}
