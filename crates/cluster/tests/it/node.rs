//! A node that runs in the test's process, served on a free port.

use bus::Bus;
use cluster::{Config, EngineConfig, Ready};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Once;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

pub const SECRET: &[u8] = b"a secret of the tests";
pub const API_KEY: &str = "the-key";
/// A step that takes this long is stuck.
pub const DEADLINE: Duration = Duration::from_secs(20);

pub struct Node {
    pub address: SocketAddr,
    pub bus: Bus,
    pub ready: Ready,
    cancel: CancellationToken,
    node: JoinHandle<Result<(), cluster::Error>>,
    server: JoinHandle<()>,
    /// The directory of the bus, and that of the node unless the test gave it one.
    _dirs: [Option<TempDir>; 2],
}

impl Node {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// Starts a node whose settings `change` has edited.
    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = TempDir::new().unwrap();
        let mut node = Self::start_in(dir.path(), change).await;
        node._dirs[1] = Some(dir);
        node
    }

    pub async fn start_in(dir: &Path, change: impl FnOnce(&mut Config)) -> Self {
        let bus_dir = TempDir::new().unwrap();
        let bus = bus::local::Local::open(bus_dir.path()).await.unwrap();
        let mut config = Config {
            node: "n1".into(),
            token_secret: SECRET.into(),
            api_key: API_KEY.into(),
            drain_period: Duration::from_millis(100),
            engine: EngineConfig::Memory {
                dir: dir.into(),
                boot_id: "a boot".into(),
                durability: cluster::Durability::Process,
            },
            ..Config::default()
        };
        change(&mut config);

        install_crypto();
        let bound = cluster::bind(config, bus.clone()).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (routes, ready) = (bound.routes(), bound.ready());

        let cancel = CancellationToken::new();
        let node = tokio::spawn(bound.run(cancel.clone()));
        let stop = cancel.clone().cancelled_owned();
        let server = tokio::spawn(async move {
            axum::serve(listener, routes)
                .with_graceful_shutdown(stop)
                .await
                .unwrap();
        });
        Self { address, bus, ready, cancel, node, server, _dirs: [Some(bus_dir), None] }
    }

    /// Asks the node to stop; [`Self::stopped`] waits for the end.
    pub fn begin_stop(&self) {
        self.cancel.cancel();
    }

    pub async fn stopped(self) {
        timeout(DEADLINE, self.node)
            .await
            .expect("the node stops in time")
            .unwrap()
            .unwrap();
        timeout(DEADLINE, self.server)
            .await
            .expect("the server stops in time")
            .unwrap();
    }

    pub async fn stop(self) {
        self.begin_stop();
        self.stopped().await;
    }

    /// Waits until the node fails. Returns its error.
    pub async fn failed(self) -> cluster::Error {
        let ended = timeout(DEADLINE, self.node).await.expect("the node fails in time");
        self.cancel.cancel();
        ended.unwrap().expect_err("the node returns an error")
    }

    /// Calls the server API. Returns the HTTP status and the answer.
    pub async fn call_with_key(&self, key: &str, method: &str, body: &str) -> (u16, Value) {
        let (status, text) = self.call_for_text(key, method, body).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// The same, with the answer as text.
    pub async fn call_for_text(&self, key: &str, method: &str, body: &str) -> (u16, String) {
        let request = format!(
            "POST /api/{method} HTTP/1.1\r\nhost: {}\r\nx-api-key: {key}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n{body}",
            self.address,
            body.len()
        );
        let answer = exchange(self.address, request.as_bytes()).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (status(head), body.to_string())
    }

    pub async fn call(&self, method: &str, body: &Value) -> Value {
        self.call_with_key(API_KEY, method, &body.to_string()).await.1
    }

    pub async fn publish(&self, channel: &str, data: Value) {
        let answer = self.call("publish", &json!({"channel": channel, "data": data})).await;
        assert!(answer["result"].is_object(), "{answer}");
    }
}

/// Sends a request and reads until the server closes the connection.
pub async fn exchange(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    timeout(DEADLINE, stream.read_to_end(&mut answer))
        .await
        .expect("the server answers in time")
        .unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

/// The status of an HTTP response.
pub fn status(head: &str) -> u16 {
    head.split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .unwrap_or_else(|| panic!("no status in {head:?}"))
}

fn install_crypto() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
    });
}

pub fn sign(secret: &[u8], claims: &impl serde::Serialize) -> String {
    install_crypto();
    jsonwebtoken::encode(&Header::new(Algorithm::HS256), claims, &EncodingKey::from_secret(secret)).unwrap()
}

pub fn token(claims: &impl serde::Serialize) -> String {
    sign(SECRET, claims)
}

/// A connection token of a user, for an hour.
pub fn user(name: &str) -> String {
    token(&json!({"sub": name, "exp": now_s() + 3600}))
}

pub fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}
