//! Requests through the gateway, on the local bus and through NATS, beside a client that asks the bus itself.

use crate::Result;
use crate::report::{Figure, Report};
use bus::{Bus, Headers};
use bytes::Bytes;
use futures_util::future::join_all;
use gateway::Config;
use std::time::{Duration, Instant};
use testkit::NatsServer;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use wire::ipc::FrameType;
use wire::subjects;

const ROUND: Duration = Duration::from_secs(4);
const CLIENTS: usize = 64;
const ANSWER: &[u8] = br#"{"ok":true,"decision":{"provider_id":"echo","priority":50,"expected_latency_ms":0,"expected_cost":0.0,"reason":"weighted","policy_id":"default","policy_version":"1"},"context":{"request_id":"r"}}"#;
const TIMEOUT: Duration = Duration::from_secs(5);

pub async fn run(report: &mut Report) -> Result {
    let dir = tempfile::tempdir()?;
    ping(report, bus::local::Local::open(dir.path()).await?).await?;
    let dir = tempfile::tempdir()?;
    let local = bus::local::Local::open(dir.path()).await?;
    decide(report, "local bus", local.clone(), local, "").await?;

    let server = NatsServer::start().await;
    let connect = || bus::nats::Nats::connect(bus::nats::NatsConfig { url: server.url(), ..Default::default() });
    decide(report, "NATS", connect().await?, connect().await?, "≥ 40,000/s and ≥ 0.8 of the peer").await
}

/// An echo responder stands in for the router: the gateway's share is what is measured.
async fn decide(report: &mut Report, name: &str, bus: Bus, responder: Bus, goal: &str) -> Result {
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
    let gateway = gateway::bind(Config { socket: socket.clone(), ..Config::default() }, bus.clone()).await?;
    let stop = cancel.clone();
    tasks.spawn(async move {
        let _ = gateway.run(stop).await;
    });

    let payload = submit();
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(client::Client::connect(&socket).await?);
    }
    let through = |client: client::Client| {
        let payload = payload.clone();
        async move { client.call(FrameType::TaskSubmit, payload, None).await.map(drop).map_err(|e| e.to_string()) }
    };
    // What the gateway sends for that payload, about.
    let direct_payload = direct();
    let direct = || {
        let (bus, payload) = (bus.clone(), direct_payload.clone());
        async move {
            bus.request(subjects::DECIDE, Headers::new(), payload, TIMEOUT).await.map(drop).map_err(|e| e.to_string())
        }
    };
    // Warm, then in turns: neither has the quieter machine.
    measure(1, Duration::from_millis(500), |_| through(clients[0].clone())).await?;
    measure(1, Duration::from_millis(500), |_| direct()).await?;
    let (ours_one, _) = measure(1, ROUND / 2, |_| through(clients[0].clone())).await?;
    let (peer_one, _) = measure(1, ROUND / 2, |_| direct()).await?;
    let (_, ours) = measure(CLIENTS, ROUND, |n| through(clients[n].clone())).await?;
    let (_, peer) = measure(CLIENTS, ROUND, |_| direct()).await?;
    let what = format!("gateway through the {name}, {CLIENTS} clients, 256 B");
    report.row(&what, Figure::PerSecond(ours), Some(("direct client", Figure::PerSecond(peer))), goal);
    let what = format!("gateway through the {name}, one in flight, p50");
    report.row(&what, Figure::Micros(ours_one), Some(("direct client", Figure::Micros(peer_one))), "");
    report.row(
        &format!("gateway, added to a request on the {name}, p50"),
        Figure::Micros(ours_one - peer_one),
        None,
        "≤ 25 µs",
    );
    cancel.cancel();
    drop(clients);
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
    for (clients, in_flight, goal) in [(4, 1, "≥ 150,000/s"), (10, 10, "≥ 1,000,000/s")] {
        let mut connected = Vec::new();
        for _ in 0..clients {
            connected.push(client::Client::connect(&socket).await?);
        }
        let ping = |n: usize| {
            let client = connected[n % clients].clone();
            async move { client.ping().await.map_err(|e| e.to_string()) }
        };
        let (_, rate) = measure(clients * in_flight, ROUND, ping).await?;
        let what = format!("gateway PING, {clients} clients, {in_flight} in flight each");
        report.row(&what, Figure::PerSecond(rate), None, goal);
    }
    cancel.cancel();
    tasks.shutdown().await;
    Ok(())
}

/// `lanes` requests in flight for this long: the p50 in µs, and requests a second.
async fn measure<F, R>(lanes: usize, round: Duration, request: F) -> Result<(f64, f64)>
where
    F: Fn(usize) -> R,
    R: Future<Output = Result<(), String>> + Send + 'static,
{
    let began = Instant::now();
    let lane = |n| {
        let request = &request;
        async move {
            let mut times = hdrhistogram::Histogram::<u64>::new(3).map_err(|e| e.to_string())?;
            while began.elapsed() < round {
                let start = Instant::now();
                request(n).await?;
                times.saturating_record(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
            }
            Ok::<_, String>(times)
        }
    };
    let lanes = join_all((0..lanes).map(lane)).await;
    let took = began.elapsed().as_secs_f64();
    let mut all = hdrhistogram::Histogram::<u64>::new(3)?;
    for times in lanes {
        all.add(times?)?;
    }
    Ok((all.value_at_quantile(0.5) as f64 / 1000.0, all.len() as f64 / took))
}

fn submit() -> Bytes {
    let text = "x".repeat(256);
    let submit = serde_json::json!({"version": "1", "command": "task_submit", "request_id": "r", "task_type": "echo", "params": {"text": text}});
    submit.to_string().into()
}

fn direct() -> Bytes {
    let text = "x".repeat(256);
    let request = serde_json::json!({
        "version": "1", "request_id": "r", "tenant_id": "default", "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "task": {"type": "echo", "payload": {"params": {"text": text}}},
    });
    request.to_string().into()
}
