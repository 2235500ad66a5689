//! Measures requests through the gateway, on the local bus and through NATS. The peers are a client that uses the bus
//! directly and the smallest program that could replace the gateway.

mod bare;
mod idle;
pub mod lanes;

use crate::Result;
use crate::report::{Figure, Report};
use async_nats::HeaderMap;
use bus::{Bus, Headers};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use gateway::Config;
use lanes::{Ask, measure, paced, raw};
use std::sync::Arc;
use std::time::Duration;
use testkit::NatsServer;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use wire::ipc::FrameType;
use wire::subjects;

const ROUND: Duration = Duration::from_secs(4);
const CLIENTS: usize = 64;
const TIMEOUT: Duration = Duration::from_secs(5);
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const ANSWER: &[u8] = concat!(
    r#"{"ok":true,"decision":{"provider_id":"echo","priority":50,"expected_latency_ms":0,"expected_cost":0.0,"#,
    r#""reason":"weighted","policy_id":"default","policy_version":"1"},"context":{"request_id":"r"}}"#
)
.as_bytes();

pub async fn run(report: &mut Report) -> Result {
    ping(report).await?;
    on_local_bus(report).await?;
    through_nats(report).await?;
    idle::run(report).await
}

async fn ping(report: &mut Report) -> Result {
    let dir = tempfile::tempdir()?;
    let bus = bus::local::Local::open(dir.path()).await?;
    let gateway = Gateway::start(bus).await?;
    let (echo, mut tasks) = (dir.path().join("echo"), JoinSet::new());
    bare::echo(&echo, &mut tasks)?;

    for (count, in_flight, goal) in [(1, 1, ""), (4, 1, "≥ 150,000/s"), (10, 10, "≥ 1,000,000/s")] {
        let ours = raw(&gateway.socket, count, FrameType::Ping, b"", in_flight).await?;
        let peer = raw(&echo, count, FrameType::Ping, b"", in_flight).await?;
        measure(count, ROUND / 8, &ours).await?;
        let ours = measure(count, ROUND, &ours).await?;
        let peer = measure(count, ROUND, &peer).await?;

        if count == 1 {
            let peer = ("a bare echo", Figure::Micros(peer.p50));
            report.row("gateway PING, one in flight, p50", Figure::Micros(ours.p50), Some(peer), goal);
            continue;
        }

        let rate = |seen: lanes::Seen| Figure::PerSecond(seen.per_second * in_flight as f64);
        let what = format!("gateway PING, {count} clients, {in_flight} in flight each");
        report.row(&what, rate(ours), Some(("a bare echo", rate(peer))), goal);
    }

    tasks.shutdown().await;
    gateway.stop().await;
    Ok(())
}

async fn on_local_bus(report: &mut Report) -> Result {
    let dir = tempfile::tempdir()?;
    let bus = bus::local::Local::open(dir.path()).await?;

    let mut tasks = JoinSet::new();
    let responder = bus.clone();
    let mut requests = bus
        .subscribe(subjects::DECIDE, Some(subjects::DECIDE_GROUP), 8192)
        .await?;
    tasks.spawn(async move {
        while let Some(request) = requests.next().await {
            let Some(subject) = request.reply else { continue };
            let answer = bus::Message { subject, payload: Bytes::from_static(ANSWER), ..Default::default() };
            if responder.publish(answer).await.is_err() {
                return;
            }
        }
    });

    let asker = bus.clone();
    let direct: Ask = Arc::new(move |_| {
        let bus = asker.clone();
        let answer = async move {
            bus.request(subjects::DECIDE, bus_headers(), decide_request(), TIMEOUT)
                .await
        };
        answer.map(|answer| answer.map(drop).map_err(|e| e.to_string())).boxed()
    });

    let gateway = Gateway::start(bus).await?;
    let through = raw(&gateway.socket, CLIENTS, FrameType::TaskSubmit, &submit(), 1).await?;
    warm(&[&through, &direct]).await?;

    let (ours_one, peer_one) = (measure(1, ROUND / 2, &through).await?, measure(1, ROUND / 2, &direct).await?);
    let (ours, peer) = (measure(CLIENTS, ROUND, &through).await?, measure(CLIENTS, ROUND, &direct).await?);

    let what = format!("gateway on the local bus, {CLIENTS} clients, 256 B");
    let rate = ("direct client", Figure::PerSecond(peer.per_second));
    report.row(&what, Figure::PerSecond(ours.per_second), Some(rate), "");
    let added = Figure::Micros(ours_one.p50 - peer_one.p50);
    report.row("gateway on the local bus, added to one in flight, p50", added, None, "≤ 25 µs");

    tasks.shutdown().await;
    gateway.stop().await;
    Ok(())
}

/// An echo responder stands in for the router, so that the gateway's own share shows.
async fn through_nats(report: &mut Report) -> Result {
    let server = NatsServer::start().await;
    let dir = tempfile::tempdir()?;
    let mut tasks = JoinSet::new();
    respond_over_nats(&server, &mut tasks).await?;

    let asker = async_nats::connect(server.url()).await?;
    let relay = dir.path().join("bare");
    bare::relay(&relay, asker.clone(), &mut tasks)?;
    let gateway = Gateway::over_nats(&server, None).await?;
    let narrow = Gateway::over_nats(&server, Some(1)).await?;

    let paths = Paths {
        gateway: raw(&gateway.socket, CLIENTS, FrameType::TaskSubmit, &submit(), 1).await?,
        over_one: raw(&narrow.socket, CLIENTS, FrameType::TaskSubmit, &submit(), 1).await?,
        four_clients: raw(&gateway.socket, 4, FrameType::TaskSubmit, &submit(), CLIENTS / 4).await?,
        relay: raw(&relay, CLIENTS, FrameType::TaskSubmit, &decide_request(), 1).await?,
        direct: direct_over_nats(asker),
    };
    warm(&[&paths.gateway, &paths.direct, &paths.relay, &paths.over_one]).await?;
    one_in_flight(report, &paths).await?;
    many_in_flight(report, &paths).await?;

    tasks.shutdown().await;
    narrow.stop().await;
    gateway.stop().await;
    Ok(())
}

/// The ways from a client to the responder on NATS.
struct Paths {
    gateway: Ask,
    /// Through a gateway with a single connection to NATS.
    over_one: Ask,
    /// Through the gateway with as many requests in flight, from four clients.
    four_clients: Ask,
    /// Through the smallest program that could replace the gateway.
    relay: Ask,
    /// From a NATS client, without a gateway.
    direct: Ask,
}

async fn respond_over_nats(server: &NatsServer, tasks: &mut JoinSet<()>) -> Result {
    let responder = async_nats::connect(server.url()).await?;
    let mut requests = responder
        .queue_subscribe(subjects::DECIDE, subjects::DECIDE_GROUP.into())
        .await?;
    responder.flush().await?;
    tasks.spawn(async move {
        while let Some(request) = requests.next().await {
            let Some(reply) = request.reply else { continue };
            if responder.publish(reply, Bytes::from_static(ANSWER)).await.is_err() {
                return;
            }
        }
    });
    Ok(())
}

fn direct_over_nats(asker: async_nats::Client) -> Ask {
    Arc::new(move |_| {
        let client = asker.clone();
        let answer = async move {
            client
                .request_with_headers(subjects::DECIDE, headers(), decide_request())
                .await
        };
        answer.map(|answer| answer.map(drop).map_err(|e| e.to_string())).boxed()
    })
}

async fn one_in_flight(report: &mut Report, paths: &Paths) -> Result {
    let ours = measure(1, ROUND / 2, &paths.gateway).await?.p50;
    let peer = measure(1, ROUND / 2, &paths.direct).await?.p50;
    let least = measure(1, ROUND / 2, &paths.relay).await?.p50;

    let row = "gateway through NATS, one in flight, p50";
    report.row(row, Figure::Micros(ours), Some(("direct client", Figure::Micros(peer))), "");
    report.row(row, Figure::Micros(ours), Some(("a bare relay", Figure::Micros(least))), "");
    report.row("gateway through NATS, added to one in flight, p50", Figure::Micros(ours - peer), None, "≤ 25 µs");
    Ok(())
}

async fn many_in_flight(report: &mut Report, paths: &Paths) -> Result {
    let ours = measure(CLIENTS, ROUND, &paths.gateway).await?.per_second;
    let peer = measure(CLIENTS, ROUND, &paths.direct).await?.per_second;
    let least = measure(CLIENTS, ROUND, &paths.relay).await?.per_second;
    let fewer = measure(4, ROUND, &paths.four_clients).await?.per_second * (CLIENTS / 4) as f64;

    let row = format!("gateway through NATS, {CLIENTS} clients, 256 B");
    let direct = ("direct client", Figure::PerSecond(peer));
    report.row(&row, Figure::PerSecond(ours), Some(direct), "≥ 40,000/s and ≥ 0.8 of the peer");
    report.row(&row, Figure::PerSecond(ours), Some(("a bare relay", Figure::PerSecond(least))), "");

    let one = Figure::PerSecond(measure(CLIENTS, ROUND, &paths.over_one).await?.per_second);
    report.row(&format!("gateway over one connection to NATS, {CLIENTS} clients"), one, Some(direct), "");

    let row = format!("gateway through NATS, 4 clients, {} in flight each", CLIENTS / 4);
    report.row(&row, Figure::PerSecond(fewer), Some(direct), "");

    let half = paced(CLIENTS, ROUND, ours / 2.0, &paths.gateway).await?;
    report.row("gateway through NATS, half of that load, p99", Figure::Micros(half.p99), None, "< 2,000 µs");
    Ok(())
}

/// Runs each lane for half a second, so that no measurement pays for its first requests.
async fn warm(asks: &[&Ask]) -> Result {
    for ask in asks {
        measure(1, Duration::from_millis(500), ask).await?;
    }
    Ok(())
}

/// A gateway that runs in this process.
struct Gateway {
    socket: std::path::PathBuf,
    cancel: CancellationToken,
    tasks: JoinSet<()>,
    _dir: tempfile::TempDir,
}

impl Gateway {
    async fn start(bus: Bus) -> Result<Self> {
        let (dir, cancel, mut tasks) = (tempfile::tempdir()?, CancellationToken::new(), JoinSet::new());
        let socket = dir.path().join("s");
        let gateway = gateway::bind(Config { socket: socket.clone(), ..Config::default() }, bus).await?;
        let stop = cancel.clone();
        tasks.spawn(async move {
            let _ = gateway.run(stop).await;
        });
        Ok(Self { socket, cancel, tasks, _dir: dir })
    }

    async fn over_nats(server: &NatsServer, connections: Option<usize>) -> Result<Self> {
        let config = bus::nats::NatsConfig { url: server.url(), connections, ..Default::default() };
        Self::start(bus::nats::Nats::connect(config).await?).await
    }

    async fn stop(mut self) {
        self.cancel.cancel();
        self.tasks.shutdown().await;
    }
}

fn submit() -> Bytes {
    let params = serde_json::json!({"text": "x".repeat(256)});
    let submit = serde_json::json!({
        "version": "1", "command": "task_submit", "request_id": "r", "task_type": "echo", "params": params,
        "traceparent": PARENT,
    });
    submit.to_string().into()
}

/// The decide request that the gateway makes of [`submit`].
fn decide_request() -> Bytes {
    let params = serde_json::json!({"text": "x".repeat(256)});
    let request = serde_json::json!({
        "version": "1", "request_id": "r", "tenant_id": "default", "trace_id": TRACE,
        "task": {"type": "echo", "payload": {"params": params}},
    });
    request.to_string().into()
}

/// The headers of a decide request, for `async_nats`.
fn headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in bus_headers().iter() {
        headers.insert(name, value);
    }
    headers
}

fn bus_headers() -> Headers {
    let headers = Headers::new().with("trace_id", TRACE).with("traceparent", PARENT);
    headers.with("tenant_id", "default").with("version", "1")
}
