//! Soaks the gateway: sends real requests for a long time, accounts for every one and watches for growth.

mod figures;
mod late;
mod pace;
mod tally;
mod verdict;

use crate::machine::Machine;
use crate::process::{self, Holds};
use bytes::Bytes;
use client::Client;
use figures::{Figures, Source};
use late::LateRouter;
use pace::Pace;
use parking_lot::Mutex;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tally::Tally;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::ipc::{FrameType, TaskSubmit};
use wire::json::JsonObject;

/// How long past its deadline a request may stay open before it counts as unanswered.
const LATE: Duration = Duration::from_secs(5);
/// How long after the last answer the gateway's metrics, which lag by up to a second, may take to show a clean end.
const SETTLED: Duration = Duration::from_secs(15);
/// The initial sampling interval. At `SAMPLES_MAX` samples, every second one is dropped and the interval doubles.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);
const SAMPLES_MAX: usize = 1000;

#[derive(Debug, Clone)]
pub struct Config {
    pub socket: PathBuf,
    /// URL of the gateway's `/metrics`; `None` skips every check that needs them.
    pub metrics: Option<String>,
    pub duration: Duration,
    /// Ends the soak after this many requests, if that comes before `duration`.
    pub requests: Option<u64>,
    /// Target rate of all clients together; `None` sends as fast as answers arrive.
    pub per_second: Option<f64>,
    pub clients: usize,
    /// Requests that each client keeps in flight.
    pub in_flight: usize,
    /// Deadline of each request; `None` uses the gateway's default.
    pub deadline: Option<Duration>,
    /// URL of the NATS server on which to stand in for the router and answer too late.
    pub late_router: Option<String>,
    pub task_type: String,
    /// Length of the task's text, in bytes.
    pub payload: usize,
    /// Version and commit of this program, recorded in the evidence.
    pub build: String,
}

#[derive(Debug, Serialize)]
pub struct Evidence {
    pub build: String,
    pub machine: Machine,
    /// Milliseconds since the epoch.
    pub began_ms: u64,
    pub settings: SettingsUsed,
    /// Process id of the gateway.
    pub pid: u32,
    /// Whether the soak was over when this evidence was written.
    pub ended: bool,
    pub seconds: f64,
    pub sent: u64,
    pub answered: u64,
    /// Errors that the gateway returned, by IPC error code.
    pub errors: BTreeMap<u16, u64>,
    /// Requests that got neither an answer nor an error in time.
    pub unanswered: u64,
    pub per_second: f64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
    pub samples: Vec<Sample>,
    /// The gateway's metrics after the last answer, with all clients gone.
    pub after: Option<Figures>,
    /// Late replies that the gateway counted during the soak.
    pub late_replies: Option<u64>,
    /// Replies that the late router published.
    pub late_router: Option<u64>,
    /// Growth rate of the resident memory after the warm-up.
    pub rss_bytes_per_hour: f64,
    /// The reasons for which the soak failed; empty when it passed.
    pub problems: Vec<String>,
}

/// The settings of the soak, without what identifies this machine.
#[derive(Debug, Serialize)]
pub struct SettingsUsed {
    pub seconds: f64,
    pub requests: Option<u64>,
    pub per_second: Option<f64>,
    pub clients: usize,
    pub in_flight_each: usize,
    pub deadline_ms: Option<f64>,
    /// Whether a late router answered the requests.
    pub late_router: bool,
    pub task_type: String,
    pub payload_bytes: usize,
}

impl From<&Config> for SettingsUsed {
    fn from(config: &Config) -> Self {
        Self {
            seconds: config.duration.as_secs_f64(),
            requests: config.requests,
            per_second: config.per_second,
            clients: config.clients,
            in_flight_each: config.in_flight,
            deadline_ms: config.deadline.map(|deadline| deadline.as_secs_f64() * 1000.0),
            late_router: config.late_router.is_some(),
            task_type: config.task_type.clone(),
            payload_bytes: config.payload,
        }
    }
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sample {
    pub second: f64,
    #[serde(flatten)]
    pub holds: Holds,
    #[serde(flatten)]
    pub figures: Option<Figures>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot connect to {path}: {problem}; is the gateway running?")]
    Connect { path: String, problem: std::io::Error },
    #[error(transparent)]
    Client(#[from] client::Error),
    #[error(
        "cannot inspect process {0}, which listens on the socket; run the soak on its machine, as its user or root"
    )]
    Process(u32),
    #[error("cannot read the gateway's metrics at {url}: {problem}; give the /metrics URL of its operations port")]
    Metrics { url: String, problem: String },
    #[error("the late router's bus failed: {0}")]
    Bus(#[from] bus::Error),
    #[error(
        "a router answers on this NATS server; stop it or use another server: the late router would take its requests"
    )]
    RouterThere,
    #[error("a late router needs a request deadline to miss; set a deadline")]
    NoDeadline,
}

/// Runs until `duration`, `requests` or `stop` ends the load. Calls `so_far` with the evidence after every sample.
pub async fn gateway(
    config: &Config,
    stop: CancellationToken,
    so_far: impl FnMut(&Evidence),
) -> Result<Evidence, Error> {
    let pid = listener(&config.socket).await?;
    process::look(pid).ok_or(Error::Process(pid))?;
    let source = config.metrics.as_deref().map(Source::new).transpose()?;
    let before = match &source {
        Some(source) => Some(source.read().await?),
        None => None,
    };

    // Subscribe the late router before the first request is sent.
    let late_end = CancellationToken::new();
    let late_router = start_late_router(config, &late_end).await?;

    let mut seen = Seen::new(pid, before);
    let load = Arc::new(Load::new(config, stop));
    let lanes = start_lanes(config, &load).await?;
    sample(config, &load, lanes, source.as_ref(), &mut seen, so_far).await;
    let took = load.began.elapsed();

    late_end.cancel();
    seen.late_router = replies_of(late_router).await;
    seen.ended = true;
    Ok(settle(config, seen, &load, source.as_ref(), took).await)
}

/// Runs the late router, if the soak has one, until `end`; its task returns the number of replies that it published.
async fn start_late_router(config: &Config, end: &CancellationToken) -> Result<JoinSet<u64>, Error> {
    let mut running = JoinSet::new();
    if let Some(url) = &config.late_router {
        let router = LateRouter::start(url, config.deadline.ok_or(Error::NoDeadline)?).await?;
        running.spawn(router.run(end.clone()));
    }
    Ok(running)
}

async fn replies_of(mut late_router: JoinSet<u64>) -> Option<u64> {
    late_router.join_next().await?.ok()
}

/// Connects the clients. Each of them has one lane for every request that it keeps in flight.
async fn start_lanes(config: &Config, load: &Arc<Load>) -> Result<JoinSet<()>, Error> {
    let mut lanes = JoinSet::new();
    for _ in 0..config.clients {
        let client = Client::connect(&config.socket).await?;
        for _ in 0..config.in_flight {
            lanes.spawn(lane(client.clone(), load.clone()));
        }
    }
    Ok(lanes)
}

/// Samples the gateway's process until all lanes have ended.
async fn sample(
    config: &Config,
    load: &Load,
    mut lanes: JoinSet<()>,
    source: Option<&Source>,
    seen: &mut Seen,
    mut so_far: impl FnMut(&Evidence),
) {
    let mut every = SAMPLE_EVERY;
    let mut due = load.began;
    loop {
        tokio::select! {
            // A lane that panicked leaves its request unanswered, which the tally shows.
            joined = lanes.join_next() => if joined.is_none() {
                return;
            },
            () = tokio::time::sleep_until(due) => {
                let figures = match source {
                    Some(source) => source.read().await.ok(),
                    None => None,
                };
                // Samples taken while the lanes end would not show the process under load.
                if let Some(holds) = process::look(seen.pid) && !load.is_over() {
                    let took = load.began.elapsed();
                    seen.samples.push(Sample { second: took.as_secs_f64(), holds, figures });
                    so_far(&verdict::judge(config, seen, &load.tally.lock(), took));
                }

                if seen.samples.len() >= SAMPLES_MAX {
                    every *= 2;
                    seen.drop_every_second_sample();
                }
                due = Instant::now() + every;
            }
        }
    }
}

/// Judges the soak repeatedly until it passes or the gateway's metrics have had time to settle.
async fn settle(config: &Config, mut seen: Seen, load: &Load, source: Option<&Source>, took: Duration) -> Evidence {
    let deadline = Instant::now() + SETTLED;
    loop {
        if let Some(source) = source {
            seen.after = source.read().await.ok();
        }
        let evidence = verdict::judge(config, &seen, &load.tally.lock(), took);
        if evidence.problems.is_empty() || source.is_none() || Instant::now() >= deadline {
            return evidence;
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// Observations of the gateway's process, besides the outcomes of requests.
struct Seen {
    machine: Machine,
    began_at: SystemTime,
    pid: u32,
    ended: bool,
    samples: Vec<Sample>,
    before: Option<Figures>,
    after: Option<Figures>,
    late_router: Option<u64>,
}

impl Seen {
    fn new(pid: u32, before: Option<Figures>) -> Self {
        Self {
            machine: Machine::now(),
            began_at: SystemTime::now(),
            pid,
            ended: false,
            samples: Vec::new(),
            before,
            after: None,
            late_router: None,
        }
    }

    fn drop_every_second_sample(&mut self) {
        let mut number = 0;
        self.samples.retain(|_| {
            number += 1;
            number % 2 == 1
        });
    }
}

/// The state that all lanes share. A lane sends one request after another.
struct Load {
    payload: Bytes,
    deadline: Option<Duration>,
    began: Instant,
    end: Instant,
    stop: CancellationToken,
    pace: Option<Mutex<Pace>>,
    requests: u64,
    tally: Mutex<Tally>,
}

impl Load {
    fn new(config: &Config, stop: CancellationToken) -> Self {
        let began = Instant::now();
        Self {
            payload: request(config),
            deadline: config.deadline,
            began,
            end: began + config.duration,
            stop,
            pace: config.per_second.map(|rate| Mutex::new(Pace::new(rate, began))),
            requests: config.requests.unwrap_or(u64::MAX),
            tally: Mutex::default(),
        }
    }

    fn is_over(&self) -> bool {
        self.stop.is_cancelled() || Instant::now() >= self.end || self.tally.lock().sent >= self.requests
    }

    /// Waits until the next request is due; returns `false` once the load is over.
    async fn next(&self) -> bool {
        if let Some(pace) = &self.pace {
            let due = pace.lock().next(Instant::now());
            tokio::select! {
                () = tokio::time::sleep_until(due.min(self.end)) => {}
                () = self.stop.cancelled() => {}
            }
        }

        // Counted under the lock, so that all lanes together send no more than `requests`.
        let over = self.is_over();
        let mut tally = self.tally.lock();
        let more = !over && tally.sent < self.requests;
        tally.sent += u64::from(more);
        more
    }
}

async fn lane(client: Client, load: Arc<Load>) {
    let patience = load.deadline.unwrap_or(Duration::from_secs(60)) + LATE;
    while load.next().await {
        let began = Instant::now();
        let call = client.call(FrameType::TaskSubmit, load.payload.clone(), load.deadline);
        let outcome = tokio::time::timeout(patience, call).await;

        let mut tally = load.tally.lock();
        match outcome {
            Ok(Ok(_)) => tally.answered += 1,
            Ok(Err(client::Error::Refused(error))) => *tally.errors.entry(error.error.code).or_default() += 1,
            // The connection is lost or the answer overdue: this lane ends, and its request counts as unanswered.
            Ok(Err(_)) | Err(_) => return,
        }
        tally.took(began.elapsed());
    }
}

/// Sleeps until `due`, forever if there is none.
async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Returns the id of the process that listens on `socket`.
async fn listener(socket: &Path) -> Result<u32, Error> {
    let failed = |problem| Error::Connect { path: socket.display().to_string(), problem };
    let stream = UnixStream::connect(socket).await.map_err(failed)?;
    let credentials = stream.peer_cred().map_err(failed)?;
    Ok(credentials.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0))
}

fn request(config: &Config) -> Bytes {
    let text = "x".repeat(config.payload);
    let submit = TaskSubmit {
        params: Some(JsonObject::of(&BTreeMap::from([("text", text)]))),
        ..TaskSubmit::new(&config.task_type)
    };
    serde_json::to_vec(&submit).expect("a submit is always JSON").into()
}
