//! The setup of the gateway's scenarios: parts in separate processes, raw frames, a scripted responder.

use crate::process::Process;
use bus::nats::{Nats, NatsConfig};
use bus::{Bus, Message};
use bytes::BytesMut;
use serde_json::Value;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use testkit::{NatsServer, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinSet;
use wire::ipc::{Decoder, Frame, FrameType, Version};

pub const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holds {
    descriptors: u64,
    /// All connections to the NATS of the stage, as NATS counts them.
    nats_connections: u64,
    tasks: u64,
    in_flight: u64,
}

/// A gateway alone in its process, on its own NATS.
pub struct Stage {
    pub nats: NatsServer,
    /// The port on which NATS reports its connections.
    monitoring: u16,
    pub bus: Bus,
    pub gateway: Process,
}

impl Stage {
    pub async fn start() -> Self {
        let monitoring = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let nats = NatsServer::start_with(&format!("http: \"127.0.0.1:{monitoring}\"")).await;
        let bus = Nats::connect(NatsConfig { url: nats.url(), ..NatsConfig::default() })
            .await
            .unwrap();
        let gateway = Process::start_with(&["--roles", "gateway", "--nats-url", &nats.url()]).await;
        Self { nats, monitoring, bus, gateway }
    }

    /// Starts further parts in a process of their own.
    pub async fn part(&self, roles: &str) -> Process {
        Process::start_with(&["--roles", roles, "--nats-url", &self.nats.url()]).await
    }

    pub async fn client(&self) -> client::Client {
        client::Client::connect(&self.gateway.socket()).await.unwrap()
    }

    /// Returns a metric of the gateway; one with labels is summed over them.
    pub async fn metric(&self, name: &str) -> f64 {
        let (status, metrics) = crate::journey::get(&format!("http://{}/metrics", self.gateway.ops())).await;
        assert_eq!(status, 200);

        let lines = metrics
            .lines()
            .filter(|line| line.split([' ', '{']).next() == Some(name));
        let values: Vec<f64> = lines
            .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
            .collect();
        assert!(!values.is_empty(), "no {name} in {metrics}");
        values.iter().sum()
    }

    /// Returns the resources that the gateway's process holds.
    pub async fn holds(&self) -> Holds {
        // Count descriptors first: reading the metrics opens a connection for a moment.
        let pid = self.gateway.ready["pid"].as_u64().unwrap();
        let descriptors = checks::process::look(u32::try_from(pid).unwrap()).unwrap().descriptors;
        Holds {
            descriptors,
            nats_connections: self.nats_connections().await,
            tasks: self.metric("beamline_runtime_tasks").await as u64,
            in_flight: self.metric("beamline_gateway_in_flight").await as u64,
        }
    }

    async fn nats_connections(&self) -> u64 {
        let mut stream = TcpStream::connect(("127.0.0.1", self.monitoring)).await.unwrap();
        // HTTP 1.0 avoids a chunked response.
        stream.write_all(b"GET /connz HTTP/1.0\r\n\r\n").await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        let (_, body) = response.split_once("\r\n\r\n").unwrap();
        serde_json::from_str::<Value>(body).unwrap()["num_connections"]
            .as_u64()
            .unwrap()
    }

    /// Waits until the gateway holds the same resources as `before`.
    pub async fn settles_to(&self, before: Holds) {
        let seen = Cell::new(before);
        eventually(PATIENCE, async || {
            let now = self.holds().await;
            if now != seen.replace(now) {
                eprintln!("the gateway held {before:?}, and holds {now:?}");
            }
            now == before
        })
        .await;
    }

    /// Posts a decide request with `key`; returns status, Retry-After and body.
    pub async fn post_decide(&self, key: &str, body: &str) -> (u16, Option<u64>, Value) {
        let mut stream = TcpStream::connect(self.gateway.http()).await.unwrap();
        let request = format!(
            "POST /api/v1/routes/decide HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-API-Key: {key}\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();

        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let retry_after = head
            .lines()
            .find_map(|line| line.to_lowercase().strip_prefix("retry-after: ")?.parse().ok());
        (status, retry_after, serde_json::from_str(body).unwrap())
    }

    pub async fn api_key(&self) -> String {
        self.gateway.run(&["api-key"]).await.success().trim().to_string()
    }

    /// Replaces the router: replies to each decide request with the value of `answer`, once that returns.
    pub async fn responder<F>(&self, answer: impl Fn(Value) -> F + Send + Sync + 'static) -> JoinSet<()>
    where
        F: Future<Output = Value> + Send + 'static,
    {
        let group = Some(wire::subjects::DECIDE_GROUP);
        let mut requests = self.bus.subscribe(wire::subjects::DECIDE, group, 4096).await.unwrap();
        // Once the server answers this, it has processed the subscription.
        self.bus.health().await.unwrap();

        let (bus, answer) = (self.bus.clone(), Arc::new(answer));

        let mut running = JoinSet::new();
        running.spawn(async move {
            let mut answers = JoinSet::new();
            while let Some(message) = requests.next().await {
                while answers.try_join_next().is_some() {}
                let (bus, answer) = (bus.clone(), answer.clone());
                answers.spawn(async move {
                    let payload = answer(serde_json::from_slice(&message.payload).unwrap())
                        .await
                        .to_string()
                        .into();
                    bus.publish(Message { subject: message.reply.unwrap(), payload, ..Message::default() })
                        .await
                        .unwrap();
                });
            }
        });
        running
    }
}

/// Every frame that arrived for each request id.
pub type Outcomes = BTreeMap<u64, Vec<(FrameType, Value)>>;

/// A connection that shows every frame that the gateway sends, even a second answer to a request.
pub struct Raw {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    input: BytesMut,
}

impl Raw {
    /// Returns when the gateway has accepted the connection.
    pub async fn connect(stage: &Stage) -> Self {
        let (reader, writer) = UnixStream::connect(stage.gateway.socket()).await.unwrap().into_split();
        let mut raw = Self { reader, writer, input: BytesMut::new() };
        let mut ping = BytesMut::new();
        Frame::new(Version::V1, FrameType::Ping, Vec::new()).encode(&mut ping);
        raw.send(&ping).await;
        assert_eq!(raw.next().await.frame_type(), Some(FrameType::Pong));
        raw
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.writer.write_all(bytes).await.unwrap();
    }

    pub async fn submit(&mut self, request_id: u64, deadline: Duration, submit: &Value) {
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap();
        let mut bytes = BytesMut::new();
        let version = Version::V2 { request_id, deadline_ms };
        Frame::new(version, FrameType::TaskSubmit, submit.to_string()).encode(&mut bytes);
        self.send(&bytes).await;
    }

    pub async fn next(&mut self) -> Frame {
        let frame = async {
            loop {
                if let Some(frame) = Decoder.decode(&mut self.input).unwrap() {
                    return frame;
                }
                assert_ne!(self.reader.read_buf(&mut self.input).await.unwrap(), 0, "the gateway closed");
            }
        };
        tokio::time::timeout(PATIENCE, frame).await.expect("a frame in time")
    }

    /// Receives one frame.
    pub async fn take(&mut self, outcomes: &mut Outcomes) {
        let frame = self.next().await;
        let Version::V2 { request_id, .. } = frame.version else {
            panic!("{frame:?} answers no request")
        };
        let answer = serde_json::from_slice(&frame.payload).unwrap_or_default();
        outcomes
            .entry(request_id)
            .or_default()
            .push((frame.frame_type().unwrap(), answer));
    }

    /// Receives frames until each of `ids` has an answer and the gateway has sent everything that it owes.
    pub async fn outcomes(&mut self, ids: std::ops::Range<u64>) -> Outcomes {
        let mut outcomes = Outcomes::new();
        while !ids.clone().all(|id| outcomes.contains_key(&id)) {
            self.take(&mut outcomes).await;
        }

        let last = ids.end;
        let mut ping = BytesMut::new();
        Frame::new(Version::V2 { request_id: last, deadline_ms: 0 }, FrameType::Ping, Vec::new()).encode(&mut ping);
        self.send(&ping).await;

        while !outcomes.contains_key(&last) {
            self.take(&mut outcomes).await;
        }
        outcomes.remove(&last);
        outcomes
    }
}
