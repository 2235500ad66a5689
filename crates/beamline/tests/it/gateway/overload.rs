//! Overloads a real router with a backlog of assignments and a slow NATS. The gateway sheds load until the router has
//! recovered.

use super::stage::{PATIENCE, Stage};
use super::{refused, submit};
use crate::process::Process;
use bus::{Headers, Message};
use bytes::Bytes;
use serde_json::json;
use std::time::Duration;
use testkit::eventually;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use wire::ipc::FrameType;
use wire::subjects;

/// The contract's thresholds: a backlog of this many assignments, and a 95th percentile of 5 s. A task makes the router
/// wait for NATS twice, so this delay of each wait exceeds the second threshold.
const ASSIGNMENTS: usize = 1000;
const FAR: Duration = Duration::from_millis(3200);
/// Enough slow decisions that the quick ones before the gateway's next poll do not outweigh them.
const SLOW: usize = 50;
const HASTE: Duration = Duration::from_millis(100);

#[tokio::test]
async fn gateway_sheds_load_until_an_overloaded_router_has_recovered() {
    let stage = Stage::start().await;
    let (delay, delayed) = watch::channel(Duration::ZERO);
    let (url, _way) = delaying_proxy(stage.nats.port(), delayed).await;
    let router = Process::start_with(&["--roles", "router", "--nats-url", &url]).await;
    let client = stage.client().await;
    let fine = submit("echo", json!({}));
    client.submit(&fine).await.unwrap();

    let assignment = || Message {
        subject: subjects::ASSIGN.into(),
        payload: "{}".into(),
        ..Message::default()
    };
    let appends = (0..ASSIGNMENTS).map(|_| stage.bus.append(assignment(), None));
    futures_util::future::try_join_all(appends).await.unwrap();

    // A single measure over its threshold is only a warning.
    client.submit(&fine).await.unwrap();
    delay.send_replace(FAR);

    // These decisions are too late for the client. Its short deadline does not count against the router, but the router
    // records how long they took.
    let pushed: Bytes = submit("echo", json!({"push_assignment": true})).to_string().into();
    let slow = (0..SLOW).map(|_| client.call(FrameType::TaskSubmit, pushed.clone(), Some(HASTE)));
    for outcome in futures_util::future::join_all(slow).await {
        assert!(outcome.is_err());
    }
    eventually(PATIENCE, async || stage.metric("beamline_bus_late_replies_total").await >= SLOW as f64).await;
    delay.send_replace(Duration::ZERO);

    let held_back = async || stage.metric("beamline_gateway_held_back_total").await;
    eventually(PATIENCE, async || {
        let _ = client.submit(&fine).await;
        held_back().await > 0.0
    })
    .await;
    let error = refused(client.submit(&fine).await);
    assert_eq!(
        (error.code, error.status, error.reason.as_deref()),
        (12, Some(429), Some("backpressure")),
        "{error:?}"
    );
    assert_eq!(error.retry_after_ms, Some(30_000));

    let request =
        json!({"version": "1", "request_id": "r", "tenant_id": "default", "task": {"type": "echo", "payload": {}}});
    let (status, retry_after, answer) = stage.post_decide(&stage.api_key().await, &request.to_string()).await;
    assert_eq!((status, retry_after, &answer["error"]["code"]), (429, Some(30), &json!("backpressure")));

    // Empty the backlog.
    let purged = stage
        .bus
        .request("$JS.API.STREAM.PURGE.ASSIGN", Headers::new(), Bytes::new(), PATIENCE)
        .await;
    assert!(
        purged
            .unwrap()
            .payload
            .windows(14)
            .any(|part| part == b"\"success\":true")
    );
    eventually(PATIENCE, async || client.submit(&fine).await.is_ok()).await;
    drop(router);
}

/// Starts a proxy in front of NATS that delays messages to NATS by `delay`. Returns its address.
async fn delaying_proxy(port: u16, delay: watch::Receiver<Duration>) -> (String, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    let mut way = JoinSet::new();
    way.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let ((mut from_near, mut to_near), (mut from_far, mut to_far)) = (near.into_split(), far.into_split());
            let (under_way, mut arriving) = mpsc::channel::<(Instant, Vec<u8>)>(4096);

            connections.spawn(async move {
                let _ = tokio::io::copy(&mut from_far, &mut to_near).await;
            });

            let delay = delay.clone();
            connections.spawn(async move {
                let mut buffer = vec![0; 64 * 1024];
                while let Ok(read @ 1..) = from_near.read(&mut buffer).await {
                    let due = Instant::now() + *delay.borrow();
                    if under_way.send((due, buffer[..read].to_vec())).await.is_err() {
                        return;
                    }
                }
            });
            connections.spawn(async move {
                while let Some((due, bytes)) = arriving.recv().await {
                    tokio::time::sleep_until(due).await;
                    if to_far.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (url, way)
}
