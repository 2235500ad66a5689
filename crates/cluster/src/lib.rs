//! WebSocket nodes: channels with history, recovery, presence and RPC, over the Centrifuge client protocol v2.
//!
//! A connection is one task ([`session`]). The [`hub`] knows which clients of this node follow which channel, and
//! delivers to them. An [`engine`] keeps the histories and carries publications between nodes.

mod bus_api;
mod client;
mod commands;
mod engine;
mod hub;
mod node;
mod operations;
mod permissions;
mod ready;
mod rules;
mod server_api;
mod session;
mod slot;
mod status;
mod token;
mod upgrade;

pub use journal::Durability;
pub use ready::Ready;
pub use rules::{Namespace, Overrides, Rules, namespaces};

use axum::routing::{get, post};
use bus::Bus;
use engine::Engine;
use node::Node;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

#[derive(Debug, Clone)]
pub struct Config {
    /// The name of this node, unique in the cluster.
    pub node: String,
    /// Where browsers reach the node; shown in the console.
    pub address: String,
    pub max_connections: usize,
    pub ping_interval: Duration,
    /// A client must answer a ping within this time.
    pub pong_timeout: Duration,
    /// A client must send its connect command within this time.
    pub connect_timeout: Duration,
    /// The HS256 secret of connection and subscription tokens.
    pub token_secret: Vec<u8>,
    /// The key of the server API; while it is empty, every request is refused.
    pub api_key: String,
    /// Origins, as `https://…`, whose pages may connect besides those of the node's own host; `*` allows all.
    pub origins: Vec<String>,
    /// Bytes that may be queued for a slow client before it is disconnected.
    pub client_queue: usize,
    /// How long a connection or subscription outlives its token, so that the client can refresh it.
    pub refresh_grace: Duration,
    /// A drain spreads its disconnects over this time.
    pub drain_period: Duration,
    pub namespaces: Vec<Namespace>,
    /// The rules of channels without a namespace.
    pub defaults: Rules,
    pub engine: EngineConfig,
}

#[derive(Debug, Clone)]
pub enum EngineConfig {
    /// A single node, which keeps its histories in a file in `dir`. `boot_id` identifies the boot of the machine (on
    /// Linux `/proc/sys/kernel/random/boot_id`) and distinguishes a power cut from a killed process. If it is empty,
    /// every unclean shutdown counts as a power cut, after which channels begin a new epoch. `durability` says what an
    /// acknowledged publication survives.
    Memory { dir: PathBuf, boot_id: String, durability: Durability },
    /// Any number of nodes that share a Redis. `url` is one server, or the comma-separated servers of a Redis Cluster.
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
            engine: EngineConfig::Memory {
                dir: "data".into(),
                boot_id: String::new(),
                durability: Durability::default(),
            },
        }
    }
}

/// Why a node cannot start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot subscribe on the bus: {0}")]
    Bus(#[from] bus::Error),
    #[error("cannot open the channel histories: {0}")]
    Journal(#[from] journal::Error),
    #[error("cannot use Redis at {url}: {problem}; is it running, and are the URL and password right?")]
    Redis { url: String, problem: String },
    #[error("the token secret is empty, so anybody could sign a token; set one")]
    NoSecret,
    #[error("a loop of the node panicked: {0}")]
    Panic(#[from] tokio::task::JoinError),
    #[error("{0} ended unexpectedly; channels do not work without it, so the node stops")]
    LoopEnded(&'static str),
}

/// A node whose engine is connected and whose bus subjects are subscribed, but which does not serve yet.
pub struct Bound {
    node: Arc<Node>,
    requests: bus_api::Subscriptions,
}

/// Connects the engine and subscribes to the node's bus subjects. Nothing is served before [`Bound::run`].
pub async fn bind(config: Config, bus: Bus) -> Result<Bound, Error> {
    if config.token_secret.is_empty() {
        return Err(Error::NoSecret);
    }

    let hub = Arc::new(hub::Hub::default());
    let engine: Arc<dyn Engine> = match &config.engine {
        EngineConfig::Memory { dir, boot_id, durability } => {
            let (namespaces, defaults) = (config.namespaces.clone(), config.defaults.clone());
            let rules = move |channel: &str| rules::of(channel, &namespaces, &defaults).cloned();
            engine::memory::Memory::open(dir, boot_id, *durability, hub.clone(), rules).await?
        }
        EngineConfig::Redis { url } => engine::redis::Redis::connect(url, hub.clone()).await?,
    };

    // Requests that arrive from here on are queued until the node runs.
    let requests = bus_api::Subscriptions::subscribe(&bus).await?;
    let node = Arc::new(Node::new(config, bus, hub, engine));
    Ok(Bound { node, requests })
}

impl Bound {
    /// `/connection/websocket` and `/api/<operation>`.
    pub fn routes(&self) -> axum::Router {
        axum::Router::new()
            .route("/connection/websocket", get(upgrade::handle))
            .route("/api/{operation}", post(server_api::handle))
            .with_state(self.node.clone())
    }

    /// The node's readiness check.
    pub fn ready(&self) -> Ready {
        let node = &self.node;
        Ready::new(&node.config.node, node.hub.clone(), node.engine.clone())
    }

    /// Serves until cancelled, then drains. If one of the node's loops ends unexpectedly, the node drains too and
    /// returns an error that names the loop.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), Error> {
        let Self { node, requests } = self;
        let stop = CancellationToken::new();
        let mut loops = JoinSet::new();
        loops.spawn(named("the loop of bus requests", bus_api::run(node.clone(), requests, stop.clone())));
        loops.spawn(named("the loop of status reports", status::run(node.clone(), stop.clone())));
        loops.spawn(named("the loop of the engine", engine::run(node.engine.clone(), stop.clone())));

        let mut outcome = tokio::select! {
            () = cancel.cancelled() => Ok(()),
            Some(early) = loops.join_next() => Err(early.map_or_else(Error::Panic, Error::LoopEnded)),
        };
        if let Err(error) = &outcome {
            tracing::error!(%error, "the node failed; draining its clients");
        }

        // The loops run until the last session has ended, because ending subscriptions still needs the engine.
        node.drain().await;
        stop.cancel();
        while let Some(ended) = loops.join_next().await {
            if let Err(panic) = ended {
                outcome = outcome.and(Err(panic.into()));
            }
        }

        // After a failure the engine is not closed, so that the next start treats the shutdown as unclean.
        if outcome.is_ok() {
            let closed = node.engine.close().await;
            if let Err(error) = closed {
                tracing::warn!(%error, "cannot close the engine; channels may begin a new epoch at the next start");
            }
        }
        outcome
    }
}

async fn named(name: &'static str, run: impl Future<Output = ()>) -> &'static str {
    run.await;
    name
}
