//! The HTTP port of the real process: allowed hosts, trusted proxies and sign-outs.

use crate::process::{Process, run_in};
use crate::realtime::Client;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const UPGRADE: &str = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

struct Answer {
    status: u16,
    head: String,
    body: String,
}

/// Sends one request and returns its answer.
async fn send(address: &str, head: &str, body: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "{head}Connection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_ascii_lowercase(), body: body.into() }
}

fn account(name: &str) -> String {
    json!({"name": name, "password": "correct horse"}).to_string()
}

#[tokio::test]
async fn requests_under_a_rebound_name_are_refused() {
    let process = Process::start().await;
    let (http, ops) = (process.http(), process.ops());
    let rebound = "Host: evil.example:8000\r\nOrigin: http://evil.example:8000\r\n";
    for request in ["GET / ", "GET /auth/token ", "POST /auth/signup ", "POST /api/info ", "GET /assets/x.js "] {
        let answer = send(http, &format!("{request}HTTP/1.1\r\n{rebound}"), &account("mallory")).await;
        assert_eq!(answer.status, 421, "{request}");
        assert!(answer.body.contains("http.hosts"), "{}", answer.body);
    }
    let answer = send(http, &format!("GET /connection/websocket HTTP/1.1\r\n{rebound}{UPGRADE}"), "").await;
    assert_eq!(answer.status, 421);
    let metrics = send(ops, &format!("GET /metrics HTTP/1.1\r\n{rebound}"), "").await;
    assert_eq!(metrics.status, 421, "the operations port refuses it too");

    for (request, status) in [
        ("GET / HTTP/1.1\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n", 400),
        ("GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n", 421),
        ("GET /health HTTP/1.1\r\nHost: balancer.internal\r\n", 200),
        ("GET /auth/token HTTP/1.1\r\nHost: LOCALHOST.:1\r\n", 401),
        ("GET /auth/token HTTP/1.1\r\nHost: [::1]:8000\r\n", 401),
    ] {
        assert_eq!(send(http, request, "").await.status, status, "{request}");
    }
}

#[tokio::test]
async fn listed_hosts_are_answered_and_a_missing_list_is_a_warning() {
    let settings = "[http]\nhosts = [\"chat.example\"]\norigins = [\"https://app.example\"]\n";
    let process = Process::start_with_settings(settings).await;
    for host in ["chat.example", "Chat.Example:8443", "app.example"] {
        let answer = send(process.http(), &format!("GET /auth/token HTTP/1.1\r\nHost: {host}\r\n"), "").await;
        assert_eq!(answer.status, 401, "{host}");
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("beamline.toml"), "[http]\nlisten = \"0.0.0.0:8000\"\n").unwrap();
    let checked = run_in(dir.path(), &["config", "check"]).await;
    assert!(checked.code == Some(0) && checked.stderr.contains("http.hosts"), "{}", checked.stderr);
}

/// Sends a wrong password with a forged `X-Forwarded-For` through a proxy that appends the address `client`.
async fn guess(process: &Process, client: &str) {
    let head = format!("POST /auth/login HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 6.6.6.6, {client}\r\n");
    assert_eq!(send(process.http(), &head, &account("nobody")).await.status, 401);
}

#[tokio::test]
async fn client_behind_a_trusted_proxy_is_limited_by_its_own_address() {
    let trusting = Process::start_with_settings("[http]\ntrusted_proxies = [\"127.0.0.0/8\"]\n").await;
    guess(&trusting, "198.51.100.1").await;
    trusting.logged("198.51.100.1").await;

    let plain = Process::start().await;
    guess(&plain, "198.51.100.1").await;
    let log = plain.logged("sign-in refused").await;
    assert!(!log.contains("198.51.100.1"), "{log}");
    assert!(
        !trusting.log().contains("6.6.6.6") && !log.contains("6.6.6.6"),
        "a client cannot choose its own address"
    );
}

async fn enter(process: &Process, how: &str) -> (String, String) {
    let head = format!("POST /auth/{how} HTTP/1.1\r\nHost: localhost\r\n");
    let answer = send(process.http(), &head, &account("ann")).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let cookie = answer
        .head
        .lines()
        .find_map(|line| line.strip_prefix("set-cookie: beamline="))
        .unwrap();
    let token: Value = serde_json::from_str(&answer.body).unwrap();
    let cookie = cookie.split(';').next().unwrap();
    (format!("beamline={cookie}"), token["token"].as_str().unwrap().to_string())
}

#[tokio::test]
async fn sign_out_ends_the_connections_and_tokens_of_that_browser_only() {
    let process = Process::start().await;
    let (_, phone) = enter(&process, "signup").await;
    let (cookie, laptop) = enter(&process, "login").await;
    let mut stays = Client::connect(process.http(), &phone).await.unwrap();
    let mut leaves = Client::connect(process.http(), &laptop).await.unwrap();

    let head = format!("POST /auth/logout HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\n");
    assert_eq!(send(process.http(), &head, "").await.status, 200);
    let end = leaves.push(|_| false).await.unwrap_err();
    assert!(end.0.contains("3503"), "a code that forbids clients to reconnect: {end:?}");
    let again = Client::connect(process.http(), &laptop)
        .await
        .err()
        .expect("the token is revoked");
    assert!(again.0.contains("3500"), "{again:?}");
    stays.rpc("chat.rooms", json!({})).await.unwrap();
}
