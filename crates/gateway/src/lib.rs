//! Takes tasks from local processes on a Unix socket and carries them over the bus to the router and back.
//!
//! A connection is one task ([`session`]); its requests run inside it, so whatever a client left behind ends with it.

mod breaker;
mod deadline;
mod failure;
mod forward;
mod http;
mod in_flight;
mod output;
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
use in_flight::{Full, Place};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::ipc::{ErrorCode, ErrorPayload, Frame, FrameType, Version};
use wire::router::DEFAULT_TENANT;

#[derive(Debug, Clone)]
pub struct Config {
    /// At most 107 bytes.
    pub socket: PathBuf,
    pub max_connections: usize,
    /// Of these, what one user may have. `None`: an equal part, as of [`Self::max_in_flight`].
    pub max_connections_per_user: Option<usize>,
    /// Requests in flight over all connections.
    pub max_in_flight: usize,
    /// Of these, what one user may have over all of its connections; HTTP counts as our own user. `None`: an equal part
    /// for each user who may connect, root aside, so that none of them can keep out another.
    pub max_in_flight_per_user: Option<usize>,
    /// Requests in flight on one connection, by the version of their frames.
    pub max_in_flight_v1: usize,
    pub max_in_flight_v2: usize,
    /// A frame that has begun must be complete within.
    pub read_timeout: Duration,
    /// A client must take some of its answers within.
    pub write_timeout: Duration,
    /// A request without a deadline of its own; waiting for a result lasts as long as an assignment may, on top.
    pub request_timeout: Duration,
    /// A longer deadline of a request counts as this.
    pub max_deadline: Duration,
    /// Bytes of unfinished frames, all connections together.
    pub receive_budget: usize,
    /// Bytes of finished answers that wait for their readers, all connections together.
    pub reply_budget: usize,
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
            max_connections_per_user: None,
            max_in_flight: 1000,
            max_in_flight_per_user: None,
            max_in_flight_v1: 10,
            max_in_flight_v2: 256,
            read_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(5),
            max_deadline: Duration::from_secs(600),
            receive_budget: 64 * 1024 * 1024,
            reply_budget: 64 * 1024 * 1024,
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
    connections: Arc<in_flight::Places>,
    in_flight: Arc<in_flight::Places>,
    router: router::Access,
}

/// What a reload replaces, together.
struct Live {
    config: Config,
    /// Requests in flight that one user may have.
    share: usize,
    /// Connections that one user may have.
    connection_share: usize,
    /// What is left of [`Config::receive_budget`]; permits are KiB.
    receive: Arc<Semaphore>,
    /// What is left of [`Config::reply_budget`]; permits are KiB.
    replies: Arc<Semaphore>,
}

impl Live {
    /// `own` is the user that we run as.
    /// `before` keeps the budgets that stay as they are.
    fn new(config: Config, before: Option<&Self>, own: u32) -> Self {
        let budget = |bytes, kept: Option<(usize, &Arc<Semaphore>)>| match kept {
            Some((before, semaphore)) if before == bytes => semaphore.clone(),
            _ => Arc::new(Semaphore::new(bytes / 1024)),
        };
        Self {
            share: config.share(config.max_in_flight, config.max_in_flight_per_user, own),
            connection_share: config.share(config.max_connections, config.max_connections_per_user, own),
            receive: budget(config.receive_budget, before.map(|live| (live.receive_budget, &live.receive))),
            replies: budget(config.reply_budget, before.map(|live| (live.reply_budget, &live.replies))),
            config,
        }
    }
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
    let uid = nix::unistd::geteuid().as_raw();
    let gateway = Gateway {
        connections: Arc::default(),
        in_flight: Arc::default(),
        router: router::Access::new(config.breaker, config.request_timeout),
        waiters: waiters::Waiters::default(),
        stats: stats::Stats::default(),
        bus,
        live: ArcSwap::from_pointee(Live::new(config.clone(), None, uid)),
        uid,
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
            let place = match gateway.take_connection(peer.uid) {
                Ok(place) => place,
                Err(full) => {
                    let limit = match full {
                        Full::All => "gateway.max_connections",
                        Full::User => "gateway.max_connections_per_user",
                    };
                    gateway.stats.failed(ErrorCode::Overloaded);
                    let text = format!("Too many connections; {limit} is the limit");
                    refuse(&stream, ErrorCode::Overloaded, &text);
                    continue;
                }
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
    /// Root speaks for any tenant, others for those that are theirs.
    fn may_speak_for(&self, uid: u32, tenant: &str) -> bool {
        let of_all = || tenant == DEFAULT_TENANT;
        let theirs = |tenants: &Vec<String>| tenants.iter().any(|theirs| theirs == "*" || theirs == tenant);
        uid == 0
            || if self.tenants.is_empty() {
                of_all()
            } else {
                self.tenants.get(&uid).is_some_and(theirs)
            }
    }

    /// Whose tasks a user means who names no tenant: those of `default` first if it may speak for it, as its submits
    /// without a tenant go there; then those of its own tenants, in the order of the settings.
    fn tenants_of(&self, uid: u32) -> Vec<String> {
        if uid == 0 || self.tenants.is_empty() {
            return vec![DEFAULT_TENANT.into()];
        }
        let theirs = self.tenants.get(&uid).into_iter().flatten();
        let named = theirs
            .filter(|tenant| !["*", DEFAULT_TENANT].contains(&tenant.as_str()))
            .cloned();
        let default = self
            .may_speak_for(uid, DEFAULT_TENANT)
            .then(|| DEFAULT_TENANT.to_string());
        default.into_iter().chain(named).collect()
    }

    /// What one user may have of `all`, where we run as `own`.
    fn share(&self, all: usize, set: Option<usize>, own: u32) -> usize {
        let others: BTreeSet<u32> = self
            .allowed_uids
            .iter()
            .copied()
            .filter(|uid| ![0, own].contains(uid))
            .collect();
        let equal = (all / (1 + others.len())).max(1);
        set.unwrap_or(equal).min(all)
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

    /// A place for one more request of this user.
    fn take_place(&self, uid: u32) -> Result<Place, Full> {
        let config = self.config();
        self.in_flight.take(uid, config.max_in_flight, config.share)
    }

    /// A place for one more connection of this user.
    fn take_connection(&self, uid: u32) -> Result<Place, Full> {
        let config = self.config();
        self.connections
            .take(uid, config.max_connections, config.connection_share)
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
        error.error.retry_after_ms = Some(failure::RETRY_AFTER_MS);
    }
    let mut bytes = bytes::BytesMut::new();
    Frame::new(Version::V1, FrameType::ResponseError, error.encode()).encode(&mut bytes);
    let _ = stream.try_write(&bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_user_who_may_connect_has_an_equal_share() {
        let share = |all, allowed_uids: &[u32], set| {
            Config { allowed_uids: allowed_uids.to_vec(), ..Config::default() }.share(all, set, 999)
        };
        assert_eq!(share(1000, &[], None), 1000, "alone");
        assert_eq!(share(1000, &[0, 999], None), 1000, "root and ourselves are let in anyway");
        assert_eq!(share(1000, &[1000], None), 500);
        assert_eq!(share(1000, &[1000, 1001, 1000], None), 333);
        assert_eq!(share(2, &[1000, 1001, 1002], None), 1);
        assert_eq!((share(1000, &[1000], Some(700)), share(10, &[], Some(700))), (700, 10));
    }

    #[tokio::test]
    async fn a_user_at_its_share_of_connections_leaves_the_rest_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let config = Config { socket: dir.path().join("s"), max_connections: 4, ..Config::default() };
        let config = Config { allowed_uids: vec![70_001], ..config };
        let bound = bind(config.clone(), bus).await.unwrap();
        let gateway = &bound.gateway;
        let greedy = [(); 2].map(|()| gateway.take_connection(70_001).unwrap());
        assert_eq!(gateway.take_connection(70_001).unwrap_err(), Full::User);
        let ours = [(); 2].map(|()| gateway.take_connection(gateway.uid).unwrap());
        assert_eq!(gateway.take_connection(70_001).unwrap_err(), Full::All);
        drop((greedy, ours));
        bound
            .control()
            .reload(Config { max_connections_per_user: Some(1), ..config });
        let _one = gateway.take_connection(70_001).unwrap();
        assert_eq!(gateway.take_connection(70_001).unwrap_err(), Full::User);
    }

    /// A session of a made-up user, since tests run as one user.
    fn connect(gateway: &Arc<Gateway>, uid: u32) -> UnixStream {
        let (client, stream) = UnixStream::pair().unwrap();
        tokio::spawn(session::run(gateway.clone(), stream, Peer { uid }, CancellationToken::new()));
        client
    }

    async fn submit(client: &mut UnixStream, request_id: u64) {
        let mut bytes = bytes::BytesMut::new();
        let version = Version::V2 { request_id, deadline_ms: 60_000 };
        let submit = r#"{"command":"task_submit","task_type":"t"}"#;
        Frame::new(version, FrameType::TaskSubmit, submit).encode(&mut bytes);
        tokio::io::AsyncWriteExt::write_all(client, &bytes).await.unwrap();
    }

    #[tokio::test]
    async fn a_cancel_without_a_tenant_stops_the_task_that_a_submit_without_one_began() {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let config = Config {
            socket: dir.path().join("s"),
            allowed_uids: vec![70_001],
            ..Config::default()
        };
        let tenants = [(70_001, vec!["acme".into(), "default".into()])].into();
        let gateway = bind(Config { tenants, ..config }, bus.clone()).await.unwrap().gateway;
        let mut submits = bus.subscribe(wire::subjects::DECIDE, None, 8).await.unwrap();
        let mut queries = bus.subscribe(wire::subjects::GET_DECISION, None, 8).await.unwrap();
        let mut cancels = bus.subscribe(wire::subjects::CANCEL, None, 8).await.unwrap();
        let mut client = connect(&gateway, 70_001);
        submit(&mut client, 1).await;
        let submitted_to = submits
            .next()
            .await
            .unwrap()
            .headers
            .get("tenant_id")
            .unwrap()
            .to_string();

        let mut bytes = bytes::BytesMut::new();
        let version = Version::V2 { request_id: 2, deadline_ms: 60_000 };
        Frame::new(version, FrameType::TaskCancel, r#"{"task_id":"same"}"#).encode(&mut bytes);
        tokio::io::AsyncWriteExt::write_all(&mut client, &bytes).await.unwrap();
        // Each tenant has a task of this id.
        let asked = queries.next().await.unwrap();
        let tenant = asked.headers.get("tenant_id").unwrap();
        let task = serde_json::json!({"task_id": "same", "state": "queued", "tenant_id": tenant});
        let payload = serde_json::json!({"ok": true, "task": task}).to_string().into();
        let subject = asked.reply.unwrap();
        bus.publish(bus::Message { subject, payload, ..bus::Message::default() })
            .await
            .unwrap();
        assert_eq!(cancels.next().await.unwrap().headers.get("tenant_id"), Some(submitted_to.as_str()));
    }

    #[tokio::test]
    async fn others_are_served_while_one_user_holds_all_of_its_share() {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let allowed_uids = vec![70_001, 70_002];
        let config = Config {
            socket: dir.path().join("s"),
            max_in_flight: 6,
            allowed_uids,
            ..Config::default()
        };
        let request_timeout = Duration::from_secs(60);
        let gateway = bind(Config { request_timeout, ..config }, bus.clone())
            .await
            .unwrap()
            .gateway;
        // A router that never answers.
        let mut router = bus.subscribe(wire::subjects::DECIDE, None, 64).await.unwrap();

        // Over two connections: the share is the user's.
        let mut greedy = [connect(&gateway, 70_001), connect(&gateway, 70_001)];
        submit(&mut greedy[0], 1).await;
        submit(&mut greedy[1], 1).await;
        for _ in 0..2 {
            router.next().await.unwrap();
        }
        submit(&mut greedy[1], 2).await;
        let mut input = bytes::BytesMut::new();
        let refused = loop {
            if let Some(frame) = wire::ipc::Decoder.decode(&mut input).unwrap() {
                break serde_json::from_slice::<serde_json::Value>(&frame.payload).unwrap();
            }
            let read = tokio::io::AsyncReadExt::read_buf(&mut greedy[1], &mut input);
            let read = tokio::time::timeout(Duration::from_secs(20), read)
                .await
                .expect("a refusal in time");
            assert_ne!(read.unwrap(), 0);
        };
        assert_eq!(refused["error"]["code"], ErrorCode::Overloaded as u64);
        let text = refused["error"]["message"].as_str().unwrap();
        assert!(text.contains("70001") && text.contains("gateway.max_in_flight_per_user"), "{text}");
        assert!(refused["error"]["retry_after_ms"].as_u64().is_some_and(|ms| ms > 0));

        // All others have theirs, also when each takes all of it.
        for uid in [70_002, gateway.uid] {
            let mut other = connect(&gateway, uid);
            for id in 0..2 {
                submit(&mut other, id).await;
                router.next().await.unwrap();
            }
            drop(other);
        }
    }
}
