//! A drain ends in time, whatever the connected clients do or fail to do.

use crate::process::Process;
use nix::sys::signal::Signal;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// A write that takes longer is blocked: the buffers are full.
const QUIET: Duration = Duration::from_millis(200);

async fn tcp(address: &str, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream
}

async fn ends_in_time(mut process: Process) {
    assert_eq!(process.ended().await, Some(0), "{}", process.log());
    assert!(!process.log().contains("did not drain within"), "{}", process.log());
}

#[tokio::test]
async fn health_watch_reports_the_drain_and_does_not_delay_it() {
    let process = Process::start().await;
    let address = format!("http://{}", process.ready["grpc"].as_str().unwrap());
    let channel = tonic::transport::Endpoint::from_shared(address)
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut watch = HealthClient::new(channel)
        .watch(HealthCheckRequest::default())
        .await
        .unwrap()
        .into_inner();
    let mut next = async || watch.message().await.unwrap().map(|message| message.status());
    assert_eq!(next().await, Some(ServingStatus::Serving));

    process.signal(Signal::SIGTERM);
    assert_eq!(next().await, Some(ServingStatus::NotServing));
    assert_eq!(next().await, None, "the stream ends");
    ends_in_time(process).await;
}

#[tokio::test]
async fn clients_that_neither_send_nor_read_do_not_delay_the_drain() {
    let process = Process::start().await;
    let (http, ops, grpc) = (process.http(), process.ops(), process.ready["grpc"].as_str().unwrap());
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: {http}\r\n\r\n");

    let mut kept_alive = tcp(http, get("/health").as_bytes()).await;
    kept_alive.read_exact(&mut [0; 12]).await.unwrap();
    let mut again = tcp(http, get("/health").as_bytes()).await;
    again.read_exact(&mut [0; 12]).await.unwrap();
    again.write_all(b"GET /health HTTP/1.1\r\nHo").await.unwrap();
    let half_head = tcp(http, b"GET /health HTT").await;
    let half_head_ops = tcp(ops, b"GET /metr").await;
    let silent = tcp(grpc, b"").await;
    let half_preface = tcp(grpc, b"PRI * HTT").await;
    let idle = tcp(grpc, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    let mut half_frame = UnixStream::connect(process.socket()).await.unwrap();
    half_frame.write_all(&[0, 0, 0]).await.unwrap();

    // Ask for more answers than the buffers of both ends hold, so that the server waits for a reader.
    let mut deaf = tcp(ops, b"").await;
    let questions = get("/metrics").repeat(1000);
    while tokio::time::timeout(QUIET, deaf.write_all(questions.as_bytes()))
        .await
        .is_ok()
    {}

    process.signal(Signal::SIGTERM);
    ends_in_time(process).await;
    drop((kept_alive, again, half_head, half_head_ops, silent, half_preface, idle, half_frame, deaf));
}

/// The drain answers requests that have begun.
#[tokio::test]
async fn request_in_progress_is_answered_during_the_drain() {
    let process = Process::start().await;
    let body = serde_json::json!({"name": "admin", "password": "wrong"}).to_string();
    let (first, rest) = body.split_at(5);
    let head = format!(
        "POST /auth/login HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{first}",
        process.http(),
        body.len()
    );
    let mut login = tcp(process.http(), head.as_bytes()).await;
    let ready = format!("http://{}/healthz", process.ops());
    // Connections are accepted in order: once a later one is answered, the earlier ones are accepted.
    assert_eq!(crate::journey::get(&ready).await.0, 200);
    assert_eq!(
        crate::journey::get(&format!("http://{}/health", process.http()))
            .await
            .0,
        200
    );

    process.signal(Signal::SIGTERM);
    testkit::eventually(Duration::from_secs(10), async || TcpStream::connect(process.http()).await.is_err()).await;
    login.write_all(rest.as_bytes()).await.unwrap();
    let mut answer = String::new();
    login.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 ") && answer.ends_with('}'), "{answer}");
    assert!(!process.log().contains("its connection is cut"), "{}", process.log());
    ends_in_time(process).await;
}
