//! The gateway: takes tasks from local processes on a Unix socket, sends them to the router over the bus, and returns
//! the answers.
//!
//! One task serves each connection (`connection`). Its requests run inside that task, so they end with the connection.
//! The decisions of a connection are made by [`session`], which does no IO.

mod admission;
mod breaker;
mod byte_budget;
mod connection;
mod deadline;
mod exchange;
mod failure;
mod follow;
mod forward;
mod http;
mod in_flight;
mod keys;
mod openai;
mod output;
mod reload;
mod reply;
mod request;
mod retry;
mod shedding;
mod upstream;
// Public for the simulation in tests/it and for the fuzz target, which drive a session without a gateway.
pub mod session;
mod socket;
mod stats;
mod waiters;

pub use breaker::Config as BreakerConfig;
pub use openai::PREFIX as OPENAI_PREFIX;
pub use reload::Control;

use admission::Admission;
use bus::Bus;
use in_flight::Full;
use reply::Reply;
use shedding::Poller;
use stats::Stats;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use waiters::Waiters;
use wire::ipc::{ErrorCode, Frame, Version};

#[derive(Debug, Clone)]
pub struct Config {
    /// At most 107 bytes.
    pub socket: PathBuf,
    pub max_connections: usize,
    /// Connections that one user may have. `None`: an equal part, as for [`Self::max_in_flight_per_user`].
    pub max_connections_per_user: Option<usize>,
    /// Requests in flight on all connections together.
    pub max_in_flight: usize,
    /// Requests in flight that one user may have on all of its connections; HTTP counts as the user that this process
    /// runs as. `None`: an equal part for each user who may connect, root aside, so that no user can keep out another.
    pub max_in_flight_per_user: Option<usize>,
    /// Requests in flight on one connection, by the protocol version of their frames.
    pub max_in_flight_v1: usize,
    pub max_in_flight_v2: usize,
    /// How long a frame may take to arrive once its first byte has.
    pub read_timeout: Duration,
    /// How long a client may read nothing while replies are queued for it.
    pub write_timeout: Duration,
    /// The deadline of a request that sets none. Waiting for a result adds the time that an assignment may take.
    pub request_timeout: Duration,
    /// The longest deadline; longer ones are shortened to it.
    pub max_deadline: Duration,
    /// Bytes of unfinished frames on all connections together.
    pub receive_budget: usize,
    /// Bytes of finished replies that their clients have not read, on all connections together.
    pub reply_budget: usize,
    /// How long requests in flight may take when a drain begins. After a further quarter, clients that are not reading
    /// are disconnected.
    pub drain_timeout: Duration,
    /// Users who may connect besides root and the user that this process runs as. While the list is empty, the mode
    /// of the socket keeps other users out.
    pub allowed_uids: Vec<u32>,
    /// Tenants that each uid may act for; `*` stands for any. Empty: every user acts for `default` only.
    pub tenants: BTreeMap<u32, Vec<String>>,
    /// The API key of the HTTP entry; while it is empty, every HTTP request is refused. For the OpenAI-compatible entry
    /// it is a key of the tenant `default`.
    pub api_key: String,
    /// Further keys of the OpenAI-compatible entry, and the tenant of each.
    pub tenant_keys: BTreeMap<String, String>,
    /// Requests of the OpenAI-compatible entry that one tenant may have in flight. `None`: an equal part for each tenant
    /// with a key.
    pub max_in_flight_per_tenant: Option<usize>,
    /// When the circuit breaker refuses requests because the router does not answer.
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
            tenant_keys: BTreeMap::new(),
            max_in_flight_per_tenant: None,
            breaker: breaker::Config::default(),
        }
    }
}

/// Why the gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("socket {path}: {problem}")]
    Socket { path: String, problem: String },
    #[error("the bus refused: {0}")]
    Bus(#[from] bus::Error),
}

/// A gateway that listens but accepts nothing yet.
pub struct Bound {
    gateway: Arc<Gateway>,
    listener: socket::Listener,
    results: bus::Subscription,
}

/// State that the sessions and the HTTP entry share.
struct Gateway {
    shared: Arc<Shared>,
    waiters: Waiters,
    /// Where this gateway receives the results that its requests wait for.
    result_subject: String,
    /// Bounds the looks at tasks' records; see [`follow`].
    looks: Semaphore,
    bus: Bus,
    answers: openai::Answers,
}

/// State that all sessions share. It does no IO.
pub struct Shared {
    pub admission: Admission,
    pub upstream: upstream::Access,
    pub stats: Stats,
}

impl Shared {
    /// `uid` is the user that this process runs as.
    pub fn new(config: Config, uid: u32) -> Self {
        Self {
            upstream: upstream::Access::new(config.breaker, config.request_timeout),
            stats: Stats::default(),
            admission: Admission::new(config, uid),
        }
    }
}

/// Opens the socket and subscribes to results. Nothing is accepted before [`Bound::run`].
pub async fn bind(config: Config, bus: Bus) -> Result<Bound, Error> {
    let listener = socket::Listener::bind(&config.socket, !config.allowed_uids.is_empty()).await?;
    prepare(config, listener, bus).await
}

/// Like [`bind`], on an inherited socket: [`Config::socket`] is ignored, and the socket's file is not removed at the
/// end.
pub async fn adopt(mut config: Config, given: std::os::unix::net::UnixListener, bus: Bus) -> Result<Bound, Error> {
    let listener = socket::Listener::adopt(given)?;
    config.socket = listener.path().into();
    prepare(config, listener, bus).await
}

async fn prepare(config: Config, listener: socket::Listener, bus: Bus) -> Result<Bound, Error> {
    // Declaring is idempotent: whichever part starts first creates the streams.
    bus::streams::declare(&bus).await?;
    let result_subject = wire::subjects::result_copy(rand::random());
    let results = bus.subscribe(&result_subject, None, waiters::QUEUE_MAX).await?;
    let uid = nix::unistd::geteuid().as_raw();
    let gateway = Gateway {
        shared: Arc::new(Shared::new(config, uid)),
        waiters: Waiters::default(),
        result_subject,
        looks: Semaphore::new(follow::LOOKS_MAX),
        bus,
        answers: openai::Answers::default(),
    };
    Ok(Bound { gateway: Arc::new(gateway), listener, results })
}

impl Bound {
    pub fn socket(&self) -> &Path {
        self.listener.path()
    }

    /// The routes of the HTTP entry.
    pub fn routes(&self) -> axum::Router {
        http::routes(self.gateway.clone()).merge(openai::routes(self.gateway.clone()))
    }

    pub fn control(&self) -> Control {
        Control::new(self.gateway.shared.clone(), self.listener.file().cloned())
    }

    /// Serves until cancelled, then drains: answers the requests in flight and closes all connections.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), Error> {
        let Self { gateway, listener, results } = self;
        let Gateway { shared, waiters, bus, .. } = &*gateway;

        // The background tasks outlive the sessions, which need them while they drain.
        let ended = CancellationToken::new();
        let background = TaskTracker::new();
        background.spawn(waiters.clone().run(results, ended.clone()));
        background.spawn(stats::run(shared.clone(), bus.clone(), ended.clone()));
        background.spawn(Poller::new(shared.upstream.pressure(), bus.clone()).run(ended.clone()));

        let sessions = TaskTracker::new();
        while let Some(accepted) = cancel.run_until_cancelled(listener.accept()).await {
            match accepted {
                Ok(stream) => accept(&gateway, stream, &sessions, &cancel),
                Err(error) => {
                    // Usually out of file descriptors: pausing until some are closed avoids a busy loop.
                    tracing::warn!(%error, "cannot accept an IPC connection; retrying");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }

        // Removes the socket's file before the drain, so that clients do not connect to a gateway that is shutting
        // down.
        drop(listener);
        sessions.close();
        let drain_timeout = shared.admission.settings().drain_timeout;
        tokio::join!(sessions.wait(), gateway.answers.drain(drain_timeout));

        ended.cancel();
        background.close();
        background.wait().await;
        Ok(())
    }
}

/// Starts a session, unless the user may not connect or a limit is reached.
fn accept(gateway: &Arc<Gateway>, stream: UnixStream, sessions: &TaskTracker, cancel: &CancellationToken) {
    let Shared { admission, stats, .. } = &*gateway.shared;
    let uid = stream.peer_cred().ok().map(|peer| peer.uid());
    let Some(uid) = uid.filter(|uid| admission.admits(*uid)) else {
        tracing::warn!(uid, "refused an IPC connection; gateway.allowed_uids says who may connect");
        stats.failed(ErrorCode::Forbidden);
        return refuse(&stream, Reply::error(ErrorCode::Forbidden, NOT_ADMITTED));
    };

    let permit = match admission.connection(uid) {
        Ok(permit) => permit,
        Err(full) => {
            let limit = match full {
                Full::All => "gateway.max_connections",
                Full::User => "gateway.max_connections_per_user",
            };
            stats.failed(ErrorCode::Overloaded);
            let text = format!("Too many connections; {limit} is the limit");
            return refuse(&stream, Reply::overloaded(&text));
        }
    };

    let connection = connection::run(gateway.clone(), stream, uid, cancel.clone());
    sessions.spawn(async move {
        connection.await;
        drop(permit);
    });
}

const NOT_ADMITTED: &str = "This user may not connect; gateway.allowed_uids says who may";

/// Writes one error frame into the empty buffer of a new connection, which is then closed.
fn refuse(stream: &UnixStream, reply: Reply) {
    let mut bytes = bytes::BytesMut::new();
    Frame::new(Version::V1, reply.kind, reply.payload).encode(&mut bytes);
    // The frame fits the empty buffer. A client that has disconnected needs no answer.
    let _ = stream.try_write(&bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::ipc::FrameType;

    /// Starts a session for `uid`. The uid is made up, because all tests run as the same user.
    fn connect(gateway: &Arc<Gateway>, uid: u32) -> UnixStream {
        let (client, stream) = UnixStream::pair().unwrap();
        tokio::spawn(connection::run(gateway.clone(), stream, uid, CancellationToken::new()));
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
    async fn cancel_without_a_tenant_cancels_the_task_of_a_submit_without_one() {
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
    async fn others_are_served_while_one_user_holds_its_whole_share() {
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
        // This router never answers.
        let mut router = bus.subscribe(wire::subjects::DECIDE, None, 64).await.unwrap();

        // The share is the user's, on all of its connections together.
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
                .expect("the refusal arrives in time");
            assert_ne!(read.unwrap(), 0);
        };

        assert_eq!(refused["error"]["code"], ErrorCode::Overloaded as u64);
        let text = refused["error"]["message"].as_str().unwrap();
        assert!(text.contains("70001") && text.contains("gateway.max_in_flight_per_user"), "{text}");
        assert!(refused["error"]["retry_after_ms"].as_u64().is_some_and(|ms| ms > 0));

        // Every other user has its whole share, even if all of them use it.
        for uid in [70_002, gateway.shared.admission.uid()] {
            let mut other = connect(&gateway, uid);
            for id in 0..2 {
                submit(&mut other, id).await;
                router.next().await.unwrap();
            }
            drop(other);
        }
    }
}
