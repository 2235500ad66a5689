//! Measures whole tasks: submitted to the gateway, decided, assigned, run, their result stored and answered. The peers
//! store less for each job: they keep no record of it and no usage.

mod bullmq;
mod jetstream;

use crate::Result;
use crate::beamline::Beamline;
use crate::gateway::lanes::{Ask, Seen, measure};
use crate::report::{Figure, Report};
use client::Client;
use futures_util::FutureExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use testkit::{NatsServer, RedisServer};
use wire::ipc::FrameType;

const ROUND: Duration = Duration::from_secs(5);
const WARM: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_secs(60);
/// Requests in flight in the two measurements of throughput, and the number of connections that share them.
const LOADS: [(usize, usize); 2] = [(64, 8), (500, 10)];
/// Size of the payload of a task, in bytes.
const PAYLOAD: usize = 256;

pub async fn run(report: &mut Report) -> Result {
    embedded(report).await?;
    through_nats(report).await
}

async fn embedded(report: &mut Report) -> Result {
    let redis = RedisServer::start_with(&["--appendonly", "yes", "--appendfsync", "everysec"]).await;
    let beamline = Beamline::start("")?;

    one_at_a_time(report, "embedded", &beamline, "< 1,000 µs").await?;
    for (lanes, connections) in LOADS {
        let ours = many(&beamline, lanes, connections).await?;
        let peer = bullmq::measure(redis.port(), lanes).await?;
        let peer = peer.map(|rate| ("BullMQ on Redis", Figure::PerSecond(rate)));

        let what = format!("whole tasks, embedded, {lanes} in flight, {PAYLOAD} B");
        report.row(&what, Figure::PerSecond(ours.seen.per_second), peer, "≥ 20,000/s and ≥ 3 × the peer");
        let what = format!("written to disk for each task, embedded, {lanes} in flight");
        report.row(&what, Figure::Bytes(ours.written), None, "≤ 8,192 B");
    }
    Ok(())
}

async fn through_nats(report: &mut Report) -> Result {
    let server = NatsServer::start().await;
    let settings = format!("[nats]\nurl = \"{}\"\n", server.url());
    let beamline = Beamline::start(&settings)?;
    // A server of its own, so that neither finds the other's messages in its way.
    let other = NatsServer::start().await;
    let bare = jetstream::Loop::start(&other.url()).await?;

    one_at_a_time(report, "through NATS", &beamline, "< 1,500 µs").await?;
    for (lanes, connections) in LOADS {
        let ours = many(&beamline, lanes, connections).await?;
        let ask = bare.ask();
        measure(lanes, WARM, &ask).await?;
        let peer = measure(lanes, ROUND, &ask).await?.per_second;

        let what = format!("whole tasks through NATS, {lanes} in flight, {PAYLOAD} B");
        let peer = Some(("a bare JetStream loop", Figure::PerSecond(peer)));
        report.row(&what, Figure::PerSecond(ours.seen.per_second), peer, "≥ 10,000/s and ≥ 0.5 × the peer");
    }
    bare.stop().await;
    Ok(())
}

async fn one_at_a_time(report: &mut Report, bus: &str, beamline: &Beamline, goal: &str) -> Result {
    let ours = many(beamline, 1, 1).await?;
    report.row(&format!("one task at a time, {bus}, p50"), Figure::Micros(ours.seen.p50), None, goal);
    Ok(())
}

struct Measured {
    seen: Seen,
    /// Bytes that the process wrote to disk for each task.
    written: f64,
}

async fn many(beamline: &Beamline, lanes: usize, connections: usize) -> Result<Measured> {
    let ask = submit(&beamline.socket(), connections).await?;
    measure(lanes, WARM, &ask).await?;

    let before = beamline.written();
    let seen = measure(lanes, ROUND, &ask).await?;
    let written = beamline.written() - before;
    let tasks = seen.per_second * seen.took.as_secs_f64();
    Ok(Measured { written: written as f64 / tasks, seen })
}

/// Submits a task and waits for its result. The lanes share the connections.
async fn submit(socket: &Path, connections: usize) -> Result<Ask> {
    let mut clients = Vec::new();
    for _ in 0..connections {
        clients.push(Client::connect(socket).await?);
    }

    let params = serde_json::json!({"text": "x".repeat(PAYLOAD)});
    let submit = serde_json::json!({"command": "task_submit", "task_type": "echo", "wait": "result", "params": params});
    let submit = bytes::Bytes::from(submit.to_string());

    Ok(Arc::new(move |lane| {
        let (client, submit) = (clients[lane % clients.len()].clone(), submit.clone());
        async move { client.call(FrameType::TaskSubmit, submit, Some(DEADLINE)).await }
            .map(|answer| answer.map(drop).map_err(|error| error.to_string()))
            .boxed()
    }))
}
