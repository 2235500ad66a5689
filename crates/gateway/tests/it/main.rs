//! Tests of a bound gateway with raw bytes, on the embedded bus with a scripted router.

mod backpressure;
mod bad_input;
mod endings;
mod http;
mod injection;
mod namesakes;
mod old_clients;
mod openai;
mod paths;
mod reload;
mod router;
mod script;
mod sequence;
mod sequences;
mod session;
mod shedding;
mod simulation;
mod simulations;
mod sizes;
mod stalled;

use bus::{Bus, Headers, Message};
use bytes::BytesMut;
use serde_json::{Value, json};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use wire::ipc::{Decoder, Frame, FrameType, Version};
use wire::subjects;

struct Fixture {
    dir: tempfile::TempDir,
    bus: Bus,
    routes: axum::Router,
    control: gateway::Control,
    cancel: CancellationToken,
    running: tokio::task::JoinHandle<Result<(), gateway::Error>>,
}

impl Fixture {
    async fn start(change: impl FnOnce(&mut gateway::Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        Self::in_dir(dir, bus, change).await
    }

    async fn on(bus: Bus, change: impl FnOnce(&mut gateway::Config)) -> Self {
        Self::in_dir(tempfile::tempdir().unwrap(), bus, change).await
    }

    async fn in_dir(dir: tempfile::TempDir, bus: Bus, change: impl FnOnce(&mut gateway::Config)) -> Self {
        let mut config = gateway::Config { socket: dir.path().join("s"), ..gateway::Config::default() };
        change(&mut config);
        let bound = gateway::bind(config, bus.clone()).await.unwrap();
        let (cancel, routes) = (CancellationToken::new(), bound.routes());
        let control = bound.control();
        let running = tokio::spawn(bound.run(cancel.clone()));
        Self { dir, bus, routes, control, cancel, running }
    }

    async fn connect(&self) -> Raw {
        let stream = UnixStream::connect(self.dir.path().join("s")).await.unwrap();
        Raw { stream, input: BytesMut::new() }
    }

    /// Answers each decide request with the result of `answer`, concurrently. `None` leaves it unanswered.
    async fn router<F>(&self, answer: impl Fn(Value, Headers) -> F + Send + Sync + 'static)
    where
        F: Future<Output = Option<Value>> + Send + 'static,
    {
        let mut requests = self.bus.subscribe(subjects::DECIDE, None, 4096).await.unwrap();
        let (bus, answer) = (self.bus.clone(), Arc::new(answer));
        tokio::spawn(async move {
            while let Some(message) = requests.next().await {
                let (bus, answer) = (bus.clone(), answer.clone());
                tokio::spawn(async move {
                    let request = serde_json::from_slice(&message.payload).unwrap();
                    if let Some(reply) = answer(request, message.headers).await {
                        let payload = reply.to_string().into();
                        let subject = message.reply.unwrap();
                        bus.publish(Message { subject, payload, ..Message::default() })
                            .await
                            .unwrap();
                    }
                });
            }
        });
    }

    async fn echo_router(&self) {
        self.router(|request, _| async move { Some(decision(&request)) }).await;
    }
}

fn decision(request: &Value) -> Value {
    let context = json!({"request_id": request["request_id"]});
    json!({"ok": true, "decision": {"provider_id": request["task"]["type"]}, "context": context})
}

struct Raw {
    stream: UnixStream,
    input: BytesMut,
}

impl Raw {
    async fn send(&mut self, bytes: &[u8]) {
        // A gateway that refuses this connection may already have closed it. The error frame can still be read.
        if let Err(error) = self.stream.write_all(bytes).await {
            assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
        }
    }

    async fn submit_v1(&mut self, fields: Value) {
        self.frame(Version::V1, FrameType::TaskSubmit, &task(fields)).await;
    }

    async fn submit_v2(&mut self, request_id: u64, fields: Value) {
        self.frame(Version::V2 { request_id, deadline_ms: 0 }, FrameType::TaskSubmit, &task(fields))
            .await;
    }

    async fn frame(&mut self, version: Version, kind: FrameType, payload: &str) {
        let mut bytes = BytesMut::new();
        Frame::new(version, kind, payload.as_bytes().to_vec()).encode(&mut bytes);
        self.send(&bytes).await;
    }

    /// The next frame; `None` once the gateway has closed the connection.
    async fn next(&mut self) -> Option<Frame> {
        tokio::time::timeout(Duration::from_secs(20), async {
            loop {
                if let Some(frame) = Decoder.decode(&mut self.input).unwrap() {
                    return Some(frame);
                }
                if self.stream.read_buf(&mut self.input).await.unwrap_or(0) == 0 {
                    return None;
                }
            }
        })
        .await
        .expect("a frame arrives in time")
    }

    async fn answer(&mut self) -> (FrameType, Value) {
        let frame = self.next().await.expect("an answer");
        let value = if frame.payload.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&frame.payload).unwrap()
        };
        (frame.frame_type().unwrap(), value)
    }

    async fn error_code(&mut self) -> u64 {
        let (kind, value) = self.answer().await;
        assert_eq!(kind, FrameType::ResponseError, "{value}");
        value["error"]["code"].as_u64().unwrap()
    }
}

fn task(fields: Value) -> String {
    let mut task = json!({"command": "task_submit", "task_type": "t"});
    for (key, value) in fields.as_object().unwrap() {
        task[key] = value.clone();
    }
    task.to_string()
}
