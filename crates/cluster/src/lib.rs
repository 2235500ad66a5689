//! WebSocket nodes: channels with history, recovery, presence and RPC, over the Centrifuge client protocol v2.
//!
//! A connection is one task ([`session`]); the [`hub`] knows who on this node follows which channel; an [`engine`] keeps
//! history and carries publications between nodes.

mod authorize;
mod bus_api;
mod client;
mod commands;
mod engine;
mod http;
mod hub;
mod place;
mod rules;
mod server_api;
mod session;
mod status;
mod token;

pub use rules::{Namespace, Overrides, Rules, namespaces};

use bus::Bus;
use engine::Engine;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::realtime::Disconnect;

#[derive(Debug, Clone)]
pub struct Config {
    /// Name of this node; unique in the cluster.
    pub node: String,
    /// Where browsers reach it, for the console.
    pub address: String,
    pub max_connections: usize,
    pub ping_interval: Duration,
    /// A client must answer a ping within.
    pub pong_timeout: Duration,
    /// A client must send its connect command within.
    pub connect_timeout: Duration,
    /// Connection and subscription tokens are JWTs signed with it (HS256).
    pub token_secret: Vec<u8>,
    /// Opens the server API.
    pub api_key: String,
    /// Origins besides our own that pages may connect from, as `https://…`.
    pub origins: Vec<String>,
    /// Bytes that may wait for one slow client.
    pub client_queue: usize,
    /// A client whose token has expired may bring a new one within.
    pub refresh_grace: Duration,
    /// Clients are moved over this long at a shutdown.
    pub drain_period: Duration,
    pub namespaces: Vec<Namespace>,
    /// Of channels without a namespace.
    pub defaults: Rules,
    pub engine: EngineConfig,
}

#[derive(Debug, Clone)]
pub enum EngineConfig {
    /// One node; histories are kept in a file of this directory. `boot_id` is the boot of the machine (on Linux
    /// `/proc/sys/kernel/random/boot_id`), by which a power cut is told from the death of a process; empty: unknown, and
    /// after an unclean end channels begin a new epoch.
    Memory { dir: PathBuf, boot_id: String },
    /// Any number of nodes. One URL, or those of a Redis Cluster with commas between.
    Redis { url: String },
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node: format!("node-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]),
            address: String::new(),
            max_connections: 10_000,
            ping_interval: Duration::from_secs(25),
            pong_timeout: Duration::from_secs(8),
            connect_timeout: Duration::from_secs(10),
            token_secret: Vec::new(),
            api_key: String::new(),
            origins: Vec::new(),
            client_queue: 1024 * 1024,
            refresh_grace: Duration::from_secs(25),
            drain_period: Duration::from_secs(2),
            namespaces: rules::built_in(),
            defaults: Rules::default(),
            engine: EngineConfig::Memory { dir: "data".into(), boot_id: String::new() },
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the bus refused: {0}")]
    Bus(#[from] bus::Error),
    #[error("channel history: {0}")]
    Journal(#[from] journal::Error),
    #[error("cannot use Redis at {url}: {problem}; is it running, and are the URL and password right?")]
    Redis { url: String, problem: String },
    #[error("the token secret is empty; tokens would be worthless")]
    NoSecret,
    #[error("a loop of the node panicked: {0}")]
    Panic(#[from] tokio::task::JoinError),
    #[error("{0} ended before the node was stopped; without it channels do not work, so the node ends too")]
    LoopEnded(&'static str),
}

/// Engine connected, subjects subscribed; nothing is served yet.
pub struct Bound {
    node: Arc<Node>,
    operations: bus_api::Operations,
}

pub(crate) struct Node {
    config: Config,
    bus: Bus,
    hub: Arc<hub::Hub>,
    engine: Arc<dyn Engine>,
    tokens: token::Tokens,
    clients: Mutex<HashMap<u64, Arc<client::Client>>>,
    next_client: AtomicU64,
    /// Sockets, those included that have not said who they are.
    connections: AtomicUsize,
    stats: status::Stats,
    sessions: TaskTracker,
    /// Where those of `sessions` run that are started when a session panics.
    runtime: tokio::runtime::Handle,
    stopping: CancellationToken,
}

pub async fn bind(config: Config, bus: Bus) -> Result<Bound, Error> {
    if config.token_secret.is_empty() {
        return Err(Error::NoSecret);
    }
    let hub = Arc::new(hub::Hub::default());
    let engine: Arc<dyn Engine> = match &config.engine {
        EngineConfig::Memory { dir, boot_id } => {
            let rules = |channel: &str| rules::of(channel, &config.namespaces, &config.defaults);
            engine::memory::Memory::open(dir, boot_id, hub.clone(), rules).await?
        }
        EngineConfig::Redis { url } => engine::redis::Redis::connect(url, hub.clone()).await?,
    };
    let operations = bus_api::Operations::subscribe(&bus).await?;
    let node = Node {
        tokens: token::Tokens::new(&config.token_secret),
        hub,
        engine,
        clients: Mutex::default(),
        next_client: AtomicU64::new(1),
        connections: AtomicUsize::new(0),
        stats: status::Stats::default(),
        sessions: TaskTracker::new(),
        runtime: tokio::runtime::Handle::current(),
        stopping: CancellationToken::new(),
        bus,
        config,
    };
    Ok(Bound { node: Arc::new(node), operations })
}

impl Bound {
    /// `/connection/websocket` and `/api/<method>`.
    pub fn routes(&self) -> axum::Router {
        http::routes(self.node.clone())
    }

    pub fn ready(&self) -> Ready {
        Ready { node: self.node.clone() }
    }

    /// Serves until cancelled, then moves the clients away, paced. A loop that ends by itself ends the node: its clients
    /// are moved away as well, and the error says what happened.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), Error> {
        let Self { node, operations } = self;
        let ended = CancellationToken::new();
        let mut loops = tokio::task::JoinSet::new();
        loops.spawn(named("the loop of bus requests", bus_api::run(node.clone(), operations, ended.clone())));
        loops.spawn(named("the loop of status reports", status::run(node.clone(), ended.clone())));
        loops.spawn(named("the loop of the engine", engine::run(node.engine.clone(), ended.clone())));

        let mut outcome = tokio::select! {
            () = cancel.cancelled() => Ok(()),
            Some(early) = loops.join_next() => Err(early.map_or_else(Error::Panic, Error::LoopEnded)),
        };
        if let Err(error) = &outcome {
            tracing::error!(%error, "the node cannot go on; its clients are moved away");
        }

        node.drain().await;
        ended.cancel();
        while let Some(done) = loops.join_next().await {
            if let Err(panic) = done {
                outcome = outcome.and(Err(panic.into()));
            }
        }
        // After a failure the end was not orderly, and is not noted as one.
        if outcome.is_ok()
            && let Err(error) = node.engine.close().await
        {
            tracing::warn!(%error, "the engine was not closed; channels may begin a new epoch at the next start");
        }
        outcome
    }
}

async fn named(name: &'static str, run: impl Future<Output = ()>) -> &'static str {
    run.await;
    name
}

/// How long the publication of a readiness check stays in its history.
const READY_HISTORY_TTL: Duration = Duration::from_secs(10);

/// Whether channels work now.
#[derive(Clone)]
pub struct Ready {
    node: Arc<Node>,
}

impl Ready {
    /// Publishes through the engine and waits for the delivery on this node. The publication goes into a history, because a
    /// Redis that has become a read-only replica still delivers publications that it need not store.
    pub async fn check(&self) -> Result<(), String> {
        let channel = format!("$ready:{}", self.node.config.node);
        let arrived = self.node.hub.probe(&channel);
        let engine = &self.node.engine;
        engine.follow(&channel).await.map_err(|e| e.to_string())?;
        let rules = Rules {
            history_size: 1,
            history_ttl: READY_HISTORY_TTL,
            durable: false,
            ..Rules::default()
        };
        engine
            .publish(&channel, Default::default(), &rules, None)
            .await
            .map_err(|e| e.to_string())?;
        let arrived = tokio::time::timeout(Duration::from_secs(5), arrived).await;
        match arrived {
            Ok(Ok(())) => Ok(()),
            _ => Err("a publication was not delivered within 5 s".into()),
        }
    }
}

impl Node {
    fn stats(&self) -> &status::Stats {
        &self.stats
    }

    async fn drain(&self) {
        self.stopping.cancel();
        let clients: Vec<_> = self.clients.lock().values().cloned().collect();
        let pause = self.config.drain_period / u32::try_from(clients.len().max(1)).unwrap_or(u32::MAX);
        let mut due = tokio::time::Instant::now();
        for client in clients {
            client.outbox.close(Disconnect::Shutdown);
            due += pause;
            // Timers have millisecond steps: many short pauses are taken together.
            if due > tokio::time::Instant::now() + Duration::from_millis(2) {
                tokio::time::sleep_until(due).await;
            }
        }
        self.sessions.close();
        if tokio::time::timeout(Duration::from_secs(5), self.sessions.wait())
            .await
            .is_err()
        {
            tracing::warn!("some clients did not take their goodbye; their sockets are closed");
        }
    }

    /// Ends the connections of a user on this node: all of them, or those of one sign-in.
    fn disconnect(&self, user: &str, login: Option<&str>, code: Disconnect) {
        // First, so that a connection that is being opened with such a token is either refused or among the clients.
        if let Some(login) = login {
            self.tokens.end(login);
        }
        let clients = self.clients.lock();
        let meant = clients
            .values()
            .filter(|client| client.user == user && login.is_none_or(|login| client.is_of_login(login)));
        meant.for_each(|client| client.outbox.close(code));
    }
}
