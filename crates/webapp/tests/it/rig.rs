//! A running web app, with a fake node that records what it publishes.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bus::{Bus, Headers, Message};
use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message as _;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use tempfile::TempDir;
use testkit::PostgresServer;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use wire::app::{Back, Body, Forward, Said};
use wire::channels::{self, Answer, Disconnect, Position, Publish};
use wire::subjects;

pub const PATIENCE: Duration = Duration::from_secs(10);
pub const ADMIN_PASSWORD: &str = "abcd-efgh";
const SECRET: &[u8] = b"a secret of at least thirty-two bytes";

/// The database of a test.
#[derive(Clone, Copy)]
pub enum Kind {
    Sqlite,
    Postgres,
}

/// A data directory and a database that outlive the web apps of a test.
pub struct Home {
    pub dir: TempDir,
    pub postgres: Option<PostgresServer>,
}

impl Home {
    pub async fn new(kind: Kind) -> Self {
        let postgres = match kind {
            Kind::Sqlite => None,
            Kind::Postgres => Some(PostgresServer::start().await),
        };
        Self { dir: tempfile::tempdir().unwrap(), postgres }
    }

    pub async fn start(&self) -> Rig {
        self.start_as(self.config()).await
    }

    pub async fn start_as(&self, config: webapp::Config) -> Rig {
        Rig::on(open_bus(self.dir.path()).await, config).await
    }

    pub fn config(&self) -> webapp::Config {
        let database_url = self.postgres.as_ref().map(PostgresServer::url);
        webapp::Config { database_url, ..config(self.dir.path()) }
    }
}

pub struct Rig {
    pub bus: Bus,
    pub routes: axum::Router,
    /// Whether the database had no accounts at the start.
    pub is_new: bool,
    published: Arc<Mutex<Vec<Publish>>>,
    disconnected: Arc<Mutex<Vec<Disconnect>>>,
    refusing: Arc<AtomicBool>,
    tasks: JoinSet<()>,
    cancel: CancellationToken,
}

impl Rig {
    pub async fn start(dir: &TempDir) -> Self {
        Self::on(open_bus(dir.path()).await, config(dir.path())).await
    }

    pub async fn on(bus: Bus, config: webapp::Config) -> Self {
        let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
        let mut tasks = JoinSet::new();
        let published = Arc::new(Mutex::new(Vec::new()));
        let refusing = Arc::new(AtomicBool::new(false));
        tasks.spawn(node(bus.clone(), published.clone(), refusing.clone()).await);
        let disconnected = Arc::new(Mutex::new(Vec::new()));
        tasks.spawn(disconnects(bus.clone(), disconnected.clone()).await);
        Self {
            disconnected,
            ..Self::with(bus, config, published, refusing, tasks).await
        }
    }

    /// Starts another web app on the same bus.
    pub async fn beside(&self, config: webapp::Config) -> Self {
        Self::with(self.bus.clone(), config, self.published.clone(), self.refusing.clone(), JoinSet::new()).await
    }

    async fn with(
        bus: Bus,
        config: webapp::Config,
        published: Arc<Mutex<Vec<Publish>>>,
        refusing: Arc<AtomicBool>,
        mut tasks: JoinSet<()>,
    ) -> Self {
        let bound = webapp::bind(config, bus.clone()).await.unwrap();
        let is_new = bound.is_new().await.unwrap();
        if is_new {
            assert!(bound.create_admin(ADMIN_PASSWORD).await.unwrap());
        }

        let routes = bound.routes();
        let cancel = CancellationToken::new();
        let stop = cancel.clone();
        tasks.spawn(async move { bound.run(stop).await.unwrap() });
        Self {
            bus,
            routes,
            is_new,
            published,
            disconnected: Arc::default(),
            refusing,
            tasks,
            cancel,
        }
    }

    /// Drains the web app. The directory can then be used again.
    pub async fn stop(mut self) {
        self.cancel.cancel();
        // The fake node does not end by itself, so the first task to end is the web app.
        tokio::time::timeout(PATIENCE, self.tasks.join_next())
            .await
            .expect("the web app drains in time")
            .unwrap()
            .unwrap();
        self.tasks.shutdown().await;
    }

    /// Drops all tasks at any point, as SIGKILL would.
    pub async fn die(mut self) {
        self.tasks.shutdown().await;
    }

    /// Makes the fake node refuse publications, as if its engine were down.
    pub fn refuse_publications(&self, refuse: bool) {
        self.refusing.store(refuse, Relaxed);
    }

    /// Makes an RPC as a node would. An error has its code and text.
    pub async fn rpc(&self, user: &str, method: &str, payload: impl Into<Bytes>) -> Result<Bytes, (u32, String)> {
        let headers = Headers::new().with(channels::RPC_USER, user);
        let subject = subjects::rpc(method).unwrap();
        let reply = self
            .bus
            .request(&subject, headers, payload.into(), PATIENCE)
            .await
            .unwrap();
        match reply.headers.get(channels::RPC_ERROR_CODE) {
            None => Ok(reply.payload),
            Some(code) => Err((code.parse().unwrap(), String::from_utf8(reply.payload.to_vec()).unwrap())),
        }
    }

    pub async fn chat(&self, user: &str, method: &str, request: Value) -> Result<Value, (u32, String)> {
        let reply = self.rpc(user, method, request.to_string()).await?;
        Ok(serde_json::from_slice(&reply).unwrap())
    }

    pub async fn say(&self, user: &str, session: &str, said: Said) -> Result<Bytes, (u32, String)> {
        let back = Back { version: 1, session: session.into(), body: Some(said) };
        self.rpc(user, "app.event", back.encode_to_vec()).await
    }

    /// All JSON published on a channel so far.
    pub fn events(&self, channel: &str) -> Vec<Value> {
        let published = self.published.lock();
        let data = published
            .iter()
            .filter(|p| p.channel == channel)
            .filter_map(|p| p.data.as_ref());
        data.map(|data| serde_json::from_str(data.get()).unwrap()).collect()
    }

    /// Removes and returns what was published to a session.
    pub fn told(&self, session: &str, user: &str) -> Vec<Body> {
        let channel = format!("app:{session}#{user}");
        let mut published = self.published.lock();
        let (ours, others) = std::mem::take(&mut *published)
            .into_iter()
            .partition(|p: &Publish| p.channel == channel);
        *published = others;
        let bytes = |publish: Publish| STANDARD.decode(publish.b64.unwrap()).unwrap();
        ours.into_iter()
            .map(|publish| Forward::decode(&*bytes(publish)).unwrap().body.unwrap())
            .collect()
    }

    /// The disconnects that nodes were asked for, as user and sign-in.
    pub fn disconnected(&self) -> Vec<(String, String)> {
        let disconnected = self.disconnected.lock();
        disconnected
            .iter()
            .map(|asked| (asked.user.clone(), asked.session.clone().unwrap_or_default()))
            .collect()
    }

    /// Waits for an event on a channel that satisfies `fits`.
    pub async fn event(&self, channel: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let mut found = None;
        testkit::eventually(PATIENCE, || {
            found = self.events(channel).into_iter().find(|event| fits(event));
            let is_there = found.is_some();
            async move { is_there }
        })
        .await;
        found.unwrap()
    }
}

pub fn config(dir: &Path) -> webapp::Config {
    webapp::Config {
        data_dir: dir.into(),
        token_secret: SECRET.into(),
        ..webapp::Config::default()
    }
}

async fn open_bus(dir: &Path) -> Bus {
    // The previous web app of the test may still be closing its files.
    let bus = Mutex::new(None);
    testkit::eventually(PATIENCE, async || {
        let opened = bus::local::Local::open(dir).await.ok();
        let is_open = opened.is_some();
        *bus.lock() = opened;
        is_open
    })
    .await;
    bus.into_inner().expect("eventually returns once it is open")
}

/// Accepts publications and records them, once for each idempotency key.
async fn node(
    bus: Bus,
    published: Arc<Mutex<Vec<Publish>>>,
    refusing: Arc<AtomicBool>,
) -> impl Future<Output = ()> + Send + 'static {
    let mut requests = bus
        .subscribe(subjects::CHANNELS_PUBLISH, Some(subjects::NODES_GROUP), 1024)
        .await
        .unwrap();
    async move {
        while let Some(request) = requests.next().await {
            let publish: Publish = serde_json::from_slice(&request.payload).unwrap();
            // Nodes apply a publication with a known idempotency key once.
            let known = |p: &Publish| publish.idempotency_key.is_some() && p.idempotency_key == publish.idempotency_key;
            let answer = if refusing.load(Relaxed) {
                Answer::failure(100, "the engine is down")
            } else {
                let mut published = published.lock();
                if !published.iter().any(known) {
                    published.push(publish);
                }
                Answer::success(Position::default())
            };

            let payload = serde_json::to_vec(&answer).unwrap().into();
            bus.publish(Message { subject: request.reply.unwrap(), payload, ..Message::default() })
                .await
                .unwrap();
        }
    }
}

/// Accepts requests to end connections and records them.
async fn disconnects(bus: Bus, asked: Arc<Mutex<Vec<Disconnect>>>) -> impl Future<Output = ()> + Send + 'static {
    let mut requests = bus
        .subscribe(subjects::CHANNELS_DISCONNECT, Some(subjects::NODES_GROUP), 64)
        .await
        .unwrap();
    async move {
        while let Some(request) = requests.next().await {
            asked.lock().push(serde_json::from_slice(&request.payload).unwrap());
            let payload = serde_json::to_vec(&Answer::success(json!({}))).unwrap().into();
            bus.publish(Message { subject: request.reply.unwrap(), payload, ..Message::default() })
                .await
                .unwrap();
        }
    }
}

/// A fake router: answers decide requests with `answer`, and records them.
pub async fn router(bus: &Bus, answer: fn(&Value) -> Value) -> (JoinSet<()>, Arc<Mutex<Vec<Bytes>>>) {
    let mut requests = bus
        .subscribe(subjects::DECIDE, Some(subjects::DECIDE_GROUP), 64)
        .await
        .unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));

    let (bus, kept) = (bus.clone(), seen.clone());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Some(request) = requests.next().await {
            kept.lock().push(request.payload.clone());
            let payload = answer(&serde_json::from_slice(&request.payload).unwrap())
                .to_string()
                .into();
            bus.publish(Message { subject: request.reply.unwrap(), payload, ..Message::default() })
                .await
                .unwrap();
        }
    });
    (tasks, seen)
}

pub fn decided(request: &Value) -> Value {
    json!({
        "ok": true,
        "decision": {
            "provider_id": "ops", "priority": 50, "expected_latency_ms": 1, "expected_cost": 0.0,
            "reason": "weighted", "policy_id": "default", "policy_version": "1",
        },
        "context": {"request_id": request["request_id"]},
    })
}
