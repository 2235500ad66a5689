//! Takes tasks from local processes on a Unix socket and carries them over the bus to the router and back.
//!
//! A connection is one task ([`session`]); its requests run inside it, so whatever a client left behind ends with it.

mod breaker;
mod count;
mod failure;
mod forward;
mod http;
mod pressure;
mod reload;
mod retry;
mod router;
mod session;
mod socket;
mod stats;
mod waiters;

pub use breaker::Config as BreakerConfig;
pub use reload::Control;

use arc_swap::{ArcSwap, Guard};
use bus::Bus;
use count::Count;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::ipc::{ErrorCode, ErrorPayload, Frame, FrameType, Version};

#[derive(Debug, Clone)]
pub struct Config {
    /// At most 107 bytes.
    pub socket: PathBuf,
    pub max_connections: usize,
    /// Requests in flight over all connections.
    pub max_in_flight: usize,
    /// Requests in flight on one connection, by the version of their frames.
    pub max_in_flight_v1: usize,
    pub max_in_flight_v2: usize,
    /// A frame that has begun must be complete within.
    pub read_timeout: Duration,
    /// A client must take some of its answers within.
    pub write_timeout: Duration,
    /// A request without a deadline of its own; waiting for a result lasts as long as an assignment may, on top.
    pub request_timeout: Duration,
    /// Bytes of unfinished frames, all connections together.
    pub receive_budget: usize,
    /// Requests in flight when a drain begins may take this long; a quarter of it more, and whoever does not read is left.
    pub drain_timeout: Duration,
    /// Who may connect besides our own user and root. Others can only reach the socket if this is not empty.
    pub allowed_uids: Vec<u32>,
    /// Tenants that a uid may speak for, `*` for any. Empty: everybody speaks for `default` alone.
    pub tenants: BTreeMap<u32, Vec<String>>,
    /// Opens the HTTP way in; empty: nobody.
    pub api_key: String,
    /// When the router is not asked for a while.
    pub breaker: breaker::Config,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: "/tmp/beamline-gateway.sock".into(),
            max_connections: 1024,
            max_in_flight: 1000,
            max_in_flight_v1: 10,
            max_in_flight_v2: 256,
            read_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(5),
            receive_budget: 64 * 1024 * 1024,
            drain_timeout: Duration::from_secs(10),
            allowed_uids: Vec::new(),
            tenants: BTreeMap::new(),
            api_key: String::new(),
            breaker: breaker::Config::default(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("socket {path}: {problem}")]
    Socket { path: String, problem: String },
    #[error("the bus refused: {0}")]
    Bus(#[from] bus::Error),
}

/// Listening; nothing is accepted yet.
pub struct Bound {
    gateway: Arc<Gateway>,
    listener: socket::Listener,
    results: bus::Subscription,
}

/// What all sessions share.
struct Gateway {
    live: ArcSwap<Live>,
    /// Our own.
    uid: u32,
    bus: Bus,
    waiters: waiters::Waiters,
    stats: stats::Stats,
    connections: Arc<Count>,
    in_flight: Arc<Count>,
    router: router::Access,
}

/// What a reload replaces, together.
struct Live {
    config: Config,
    /// What is left of [`Config::receive_budget`]; permits are KiB.
    receive: Arc<Semaphore>,
}

impl std::ops::Deref for Live {
    type Target = Config;

    fn deref(&self) -> &Config {
        &self.config
    }
}

pub async fn bind(config: Config, bus: Bus) -> Result<Bound, Error> {
    let listener = socket::Listener::bind(&config.socket, !config.allowed_uids.is_empty()).await?;
    prepare(config, listener, bus).await
}

/// On a socket that somebody else has bound, whatever [`Config::socket`] says; nor is its file removed.
pub async fn adopt(mut config: Config, given: std::os::unix::net::UnixListener, bus: Bus) -> Result<Bound, Error> {
    let listener = socket::Listener::adopt(given)?;
    config.socket = listener.path().into();
    prepare(config, listener, bus).await
}

async fn prepare(config: Config, listener: socket::Listener, bus: Bus) -> Result<Bound, Error> {
    bus::streams::declare(&bus).await?;
    let results = bus.subscribe(wire::subjects::RESULT, None, waiters::QUEUE_MAX).await?;
    let gateway = Gateway {
        connections: Arc::default(),
        in_flight: Arc::default(),
        router: router::Access::new(config.breaker, config.request_timeout),
        waiters: waiters::Waiters::default(),
        stats: stats::Stats::default(),
        bus,
        live: ArcSwap::from_pointee(Live { receive: Arc::new(config.budget()), config }),
        uid: nix::unistd::geteuid().as_raw(),
    };
    Ok(Bound { gateway: Arc::new(gateway), listener, results })
}

impl Bound {
    pub fn socket(&self) -> &Path {
        self.listener.path()
    }

    /// The HTTP way in.
    pub fn routes(&self) -> axum::Router {
        http::routes(self.gateway.clone())
    }

    pub fn control(&self) -> Control {
        Control::new(self.gateway.clone(), self.listener.file().cloned())
    }

    /// Serves until cancelled; then answers what is in flight and closes.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), Error> {
        let Self { gateway, listener, results } = self;
        let ended = CancellationToken::new();
        let loops = TaskTracker::new();
        loops.spawn(waiters::run(gateway.clone(), results, ended.clone()));
        loops.spawn(stats::run(gateway.clone(), ended.clone()));
        loops.spawn(pressure::run(gateway.clone(), ended.clone()));

        let sessions = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = cancel.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    // Out of descriptors: wait for some to come back rather than spin.
                    tracing::warn!(%error, "cannot accept an IPC connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Some(peer) = gateway.peer(&stream) else {
                refuse(&stream, ErrorCode::Forbidden, NOT_ADMITTED);
                continue;
            };
            let Some(place) = gateway.connections.take(gateway.config().max_connections) else {
                gateway.stats.failed(ErrorCode::Overloaded);
                refuse(&stream, ErrorCode::Overloaded, "Too many connections; gateway.max_connections is the limit");
                continue;
            };
            let session = session::run(gateway.clone(), stream, peer, cancel.clone());
            sessions.spawn(async move {
                session.await;
                drop(place);
            });
        }
        drop(listener);
        sessions.close();
        sessions.wait().await;
        ended.cancel();
        loops.close();
        loops.wait().await;
        Ok(())
    }
}

const NOT_ADMITTED: &str = "This user may not connect; gateway.allowed_uids says who may";

/// Who is at the other end.
#[derive(Debug, Clone, Copy)]
struct Peer {
    uid: u32,
}

impl Config {
    fn budget(&self) -> Semaphore {
        Semaphore::new(self.receive_budget / 1024)
    }

    /// Root speaks for any tenant, others for those that are theirs.
    fn may_speak_for(&self, uid: u32, tenant: &str) -> bool {
        let of_all = || tenant == forward::DEFAULT_TENANT;
        let theirs = |tenants: &Vec<String>| tenants.iter().any(|theirs| theirs == "*" || theirs == tenant);
        uid == 0 || if self.tenants.is_empty() { of_all() } else { self.tenants.get(&uid).is_some_and(theirs) }
    }
}

impl Gateway {
    /// The settings of this moment: for a look, not to be kept.
    fn config(&self) -> Guard<Arc<Live>> {
        self.live.load()
    }

    /// Whether this user may use the gateway.
    fn admits(&self, uid: u32) -> bool {
        uid == 0 || uid == self.uid || self.config().allowed_uids.contains(&uid)
    }

    fn peer(&self, stream: &UnixStream) -> Option<Peer> {
        let uid = stream.peer_cred().ok()?.uid();
        let admitted = self.admits(uid);
        if !admitted {
            tracing::warn!(uid, "refused an IPC connection; gateway.allowed_uids says who may");
            self.stats.failed(ErrorCode::Forbidden);
        }
        admitted.then_some(Peer { uid })
    }
}

/// One error frame into the empty buffer of a new connection, which is then closed.
fn refuse(stream: &UnixStream, code: ErrorCode, text: &str) {
    let mut error = ErrorPayload::new(code, text);
    if code == ErrorCode::Overloaded {
        error.error.retry_after_ms = Some(session::RETRY_AFTER_MS);
    }
    let mut bytes = bytes::BytesMut::new();
    Frame::new(Version::V1, FrameType::ResponseError, error.encode()).encode(&mut bytes);
    let _ = stream.try_write(&bytes);
}
