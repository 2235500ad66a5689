//! Requests through the gateway, on the local bus and through NATS, beside a client that asks the bus itself.

use crate::Result;
use crate::report::{Figure, Report};
use bus::{Bus, Headers};
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use gateway::Config;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use testkit::NatsServer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use wire::ipc::{Frame, FrameType, Version};
use wire::subjects;

const ROUND: Duration = Duration::from_secs(4);
const CLIENTS: usize = 64;
const TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER: &[u8] = br#"{"ok":true,"decision":{"provider_id":"echo","priority":50,"expected_latency_ms":0,"expected_cost":0.0,"reason":"weighted","policy_id":"default","policy_version":"1"},"context":{"request_id":"r"}}"#;

/// One request of a lane, by the lane's number.
type Ask = Arc<dyn Fn(usize) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

pub async fn run(report: &mut Report) -> Result {
    let dir = tempfile::tempdir()?;
    ping(report, bus::local::Local::open(dir.path()).await?).await?;

    let dir = tempfile::tempdir()?;
    let local = bus::local::Local::open(dir.path()).await?;
    let asker = local.clone();
    let direct: Ask = Arc::new(move |_| {
        let bus = asker.clone();
        let answer = async move { bus.request(subjects::DECIDE, Headers::new(), decide_request(), TIMEOUT).await };
        answer.map(|answer| answer.map(drop).map_err(|e| e.to_string())).boxed()
    });
    decide(report, "local bus", local.clone(), local, direct, "").await?;

    let server = NatsServer::start().await;
    let connect = || bus::nats::Nats::connect(bus::nats::NatsConfig { url: server.url(), ..Default::default() });
    let asker = async_nats::connect(server.url()).await?;
    let direct: Ask = Arc::new(move |_| {
        let client = asker.clone();
        #[expect(clippy::disallowed_methods, reason = "it is what its users use")]
        let answer = async move { client.request(subjects::DECIDE, decide_request()).await };
        answer.map(|answer| answer.map(drop).map_err(|e| e.to_string())).boxed()
    });
    let goal = "≥ 40,000/s and ≥ 0.8 of the peer";
    decide(report, "NATS", connect().await?, connect().await?, direct, goal).await
}

/// An echo responder stands in for the router: the gateway's share is what is measured.
async fn decide(report: &mut Report, name: &str, bus: Bus, responder: Bus, direct: Ask, goal: &str) -> Result {
    let mut tasks = JoinSet::new();
    let cancel = CancellationToken::new();
    let mut requests = responder.subscribe(subjects::DECIDE, Some(subjects::DECIDE_GROUP), 8192).await?;
    tasks.spawn(async move {
        while let Some(request) = requests.next().await {
            if let Some(subject) = request.reply {
                let answer = bus::Message { subject, payload: Bytes::from_static(ANSWER), ..Default::default() };
                if responder.publish(answer).await.is_err() {
                    return;
                }
            }
        }
    });
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("s");
    let gateway = gateway::bind(Config { socket: socket.clone(), ..Config::default() }, bus).await?;
    let stop = cancel.clone();
    tasks.spawn(async move {
        let _ = gateway.run(stop).await;
    });
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(Arc::new(Mutex::new(Raw::connect(&socket, FrameType::TaskSubmit, &submit(), 1).await?)));
    }
    let through: Ask = Arc::new(move |n| {
        let client = clients[n].clone();
        async move { client.lock().await.round().await }.boxed()
    });
    // Warm, then in turns: neither has the quieter machine.
    measure(1, Duration::from_millis(500), &through).await?;
    measure(1, Duration::from_millis(500), &direct).await?;
    let (ours_one, _) = measure(1, ROUND / 2, &through).await?;
    let (peer_one, _) = measure(1, ROUND / 2, &direct).await?;
    let (_, ours) = measure(CLIENTS, ROUND, &through).await?;
    let (_, peer) = measure(CLIENTS, ROUND, &direct).await?;
    let what = format!("gateway through {name}, {CLIENTS} clients, 256 B");
    report.row(&what, Figure::PerSecond(ours), Some(("direct client", Figure::PerSecond(peer))), goal);
    let what = format!("gateway through {name}, one in flight, p50");
    report.row(&what, Figure::Micros(ours_one), Some(("direct client", Figure::Micros(peer_one))), "");
    let what = format!("gateway, added to a request on {name}, p50");
    report.row(&what, Figure::Micros(ours_one - peer_one), None, "≤ 25 µs");
    cancel.cancel();
    tasks.shutdown().await;
    Ok(())
}

async fn ping(report: &mut Report, bus: Bus) -> Result {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("s");
    let gateway = gateway::bind(Config { socket: socket.clone(), ..Config::default() }, bus).await?;
    let cancel = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let stop = cancel.clone();
    tasks.spawn(async move {
        let _ = gateway.run(stop).await;
    });
    for (count, in_flight, goal) in [(4, 1, "≥ 150,000/s"), (10, 10, "≥ 1,000,000/s")] {
        let mut clients = Vec::new();
        for _ in 0..count {
            clients.push(Arc::new(Mutex::new(Raw::connect(&socket, FrameType::Ping, b"", in_flight).await?)));
        }
        let ping: Ask = Arc::new(move |n| {
            let client: Arc<Mutex<Raw>> = clients[n].clone();
            async move { client.lock().await.round().await }.boxed()
        });
        let (_, rounds) = measure(count, ROUND, &ping).await?;
        let what = format!("gateway PING, {count} clients, {in_flight} in flight each");
        report.row(&what, Figure::PerSecond(rounds * in_flight as f64), None, goal);
    }
    cancel.cancel();
    tasks.shutdown().await;
    Ok(())
}

/// Sends the same bytes again and again and counts the answers: a client that costs next to nothing.
struct Raw {
    stream: UnixStream,
    requests: BytesMut,
    in_flight: usize,
    buffer: BytesMut,
}

impl Raw {
    async fn connect(socket: &Path, kind: FrameType, payload: &[u8], in_flight: usize) -> Result<Self> {
        let stream = UnixStream::connect(socket).await?;
        let mut requests = BytesMut::new();
        for request_id in 1..=in_flight as u64 {
            let version = Version::V2 { request_id, deadline_ms: 0 };
            Frame::new(version, kind, payload.to_vec()).encode(&mut requests);
        }
        Ok(Self { stream, requests, in_flight, buffer: BytesMut::with_capacity(64 * 1024) })
    }

    async fn round(&mut self) -> Result<(), String> {
        self.stream.write_all(&self.requests).await.map_err(|e| e.to_string())?;
        for _ in 0..self.in_flight {
            let length = loop {
                let length = self.buffer.first_chunk::<4>().map_or(4, |head| u32::from_be_bytes(*head) as usize);
                if length > 4 && self.buffer.len() >= length {
                    break length;
                }
                if self.stream.read_buf(&mut self.buffer).await.map_err(|e| e.to_string())? == 0 {
                    return Err("the gateway closed the connection".into());
                }
            };
            let frame = self.buffer.split_to(length);
            if frame[5] == FrameType::ResponseError as u8 {
                return Err(String::from_utf8_lossy(&frame[20..]).into_owned());
            }
        }
        Ok(())
    }
}

/// `lanes` at once for this long: the p50 in µs, and answers a second.
async fn measure(lanes: usize, round: Duration, ask: &Ask) -> Result<(f64, f64)> {
    let began = Instant::now();
    let mut running = JoinSet::new();
    for n in 0..lanes {
        let ask = ask.clone();
        running.spawn(async move {
            let mut times = hdrhistogram::Histogram::<u64>::new(3).map_err(|e| e.to_string())?;
            while began.elapsed() < round {
                let start = Instant::now();
                ask(n).await?;
                times
                    .record(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX))
                    .map_err(|e| e.to_string())?;
            }
            Ok::<_, String>(times)
        });
    }
    let mut all = hdrhistogram::Histogram::<u64>::new(3)?;
    while let Some(times) = running.join_next().await {
        all.add(times??)?;
    }
    Ok((all.value_at_quantile(0.5) as f64 / 1000.0, all.len() as f64 / began.elapsed().as_secs_f64()))
}

fn submit() -> Bytes {
    let params = serde_json::json!({"text": "x".repeat(256)});
    let submit = serde_json::json!({
        "version": "1", "command": "task_submit", "request_id": "r", "task_type": "echo", "params": params,
    });
    submit.to_string().into()
}

/// What the gateway makes of it, about.
fn decide_request() -> Bytes {
    let params = serde_json::json!({"text": "x".repeat(256)});
    let request = serde_json::json!({
        "version": "1", "request_id": "r", "tenant_id": "default", "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "task": {"type": "echo", "payload": {"params": params}},
    });
    request.to_string().into()
}
