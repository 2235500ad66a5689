//! A soak of the gateway: real requests for a long time, every one accounted for, and nothing that grows.

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
use wire::ipc::FrameType;

/// An answer that has not come this long after its deadline never will.
const LATE: Duration = Duration::from_secs(5);
/// A gateway's figures of itself are a second old at most; this long after the last answer they tell what is left.
const SETTLED: Duration = Duration::from_secs(15);
/// Samples begin this close together; whenever there are so many, every second one goes and the distance doubles.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);
const SAMPLES_MAX: usize = 1000;

#[derive(Debug, Clone)]
pub struct Config {
    pub socket: PathBuf,
    /// The gateway's `/metrics`, for what it says of itself.
    pub metrics: Option<String>,
    pub duration: Duration,
    /// Ends after so many, if that comes first.
    pub requests: Option<u64>,
    /// Of requests, all clients together; `None`: as fast as their answers come.
    pub per_second: Option<f64>,
    pub clients: usize,
    /// Requests in flight of each.
    pub in_flight: usize,
    /// Of each request; `None`: the gateway's own.
    pub deadline: Option<Duration>,
    /// NATS on which to take the router's place and answer too late.
    pub late_router: Option<String>,
    pub task_type: String,
    /// Of the task's text, bytes.
    pub payload: usize,
    /// Version and commit of this program, for the evidence.
    pub build: String,
}

#[derive(Debug, Serialize)]
pub struct Evidence {
    pub build: String,
    pub machine: Machine,
    /// Milliseconds since the epoch.
    pub began_ms: u64,
    pub settings: serde_json::Value,
    /// Of the gateway.
    pub pid: u32,
    /// Else it still ran when this was written.
    pub ended: bool,
    pub seconds: f64,
    pub sent: u64,
    pub answered: u64,
    /// Errors that the gateway gave, by their code.
    pub errors: BTreeMap<u16, u64>,
    /// Neither answered nor refused in time.
    pub unanswered: u64,
    pub per_second: f64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
    pub samples: Vec<Sample>,
    /// After the last answer, when the clients had gone.
    pub after: Option<Figures>,
    /// Replies that came to the gateway too late, of the process's whole life where it did not say before.
    pub late_replies: Option<u64>,
    /// Replies that the late router gave.
    pub late_router: Option<u64>,
    /// Of the resident memory after the warm-up.
    pub rss_bytes_per_hour: f64,
    /// Empty: passed.
    pub problems: Vec<String>,
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
    #[error("cannot look at process {0}, which listens on the socket; run the soak as its user, on its machine")]
    Process(u32),
    #[error("cannot read the gateway's figures at {url}: {problem}; is it the /metrics of its operations port?")]
    Metrics { url: String, problem: String },
    #[error("the late router's bus: {0}")]
    Bus(#[from] bus::Error),
    #[error(
        "a router answers on this NATS; stop it, or take another NATS: the late router would take its requests away"
    )]
    RouterThere,
    #[error("a late router needs a deadline that it can be later than")]
    NoDeadline,
}

/// Runs until the time or the requests are over or `stop`; `so_far` sees the evidence whenever a sample was taken.
pub async fn gateway(
    config: &Config,
    stop: CancellationToken,
    mut so_far: impl FnMut(&Evidence),
) -> Result<Evidence, Error> {
    let pid = listener(&config.socket).await?;
    process::look(pid).ok_or(Error::Process(pid))?;
    let source = config.metrics.as_deref().map(Source::new).transpose()?;
    let before = match &source {
        Some(source) => Some(source.read().await?),
        None => None,
    };
    let mut late_router = JoinSet::new();
    let late_end = CancellationToken::new();
    if let Some(url) = &config.late_router {
        let router = LateRouter::start(url, config.deadline.ok_or(Error::NoDeadline)?).await?;
        late_router.spawn(router.run(late_end.clone()));
    }
    let mut seen = Seen::new(pid, before);

    let began = Instant::now();
    let load = Arc::new(Load::new(config, began, stop));
    let mut lanes = JoinSet::new();
    for _ in 0..config.clients {
        let client = Client::connect(&config.socket).await?;
        for _ in 0..config.in_flight {
            lanes.spawn(lane(client.clone(), load.clone()));
        }
    }
    let mut every = SAMPLE_EVERY;
    let mut due = began;
    loop {
        tokio::select! {
            // One that panicked leaves its request without an answer: the tally shows it.
            joined = lanes.join_next() => if joined.is_none() {
                break;
            },
            () = tokio::time::sleep_until(due) => {
                let figures = match &source {
                    Some(source) => source.read().await.ok(),
                    None => None,
                };
                // Once the lanes have to end, the load is no longer the one that is judged.
                if let Some(holds) = process::look(pid) && !load.is_over() {
                    seen.samples.push(Sample { second: began.elapsed().as_secs_f64(), holds, figures });
                    so_far(&verdict::judge(config, &seen, &load.tally.lock(), began.elapsed()));
                }
                if seen.samples.len() >= SAMPLES_MAX {
                    every *= 2;
                    let mut number = 0;
                    seen.samples.retain(|_| { number += 1; number % 2 == 1 });
                }
                due = Instant::now() + every;
            }
        }
    }
    let took = began.elapsed();
    late_end.cancel();
    while let Some(answers) = late_router.join_next().await {
        seen.late_router = answers.ok();
    }
    seen.ended = true;
    let settled = Instant::now() + SETTLED;
    loop {
        if let Some(source) = &source {
            seen.after = source.read().await.ok();
        }
        let evidence = verdict::judge(config, &seen, &load.tally.lock(), took);
        if evidence.problems.is_empty() || source.is_none() || Instant::now() >= settled {
            return Ok(evidence);
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// What was seen besides the requests.
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
}

/// What the lanes share.
struct Load {
    payload: Bytes,
    deadline: Option<Duration>,
    end: Instant,
    stop: CancellationToken,
    pace: Option<Mutex<Pace>>,
    requests: u64,
    tally: Mutex<Tally>,
}

impl Load {
    fn new(config: &Config, began: Instant, stop: CancellationToken) -> Self {
        Self {
            payload: request(config),
            deadline: config.deadline,
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

    /// Waits until one more request is due; `false`: none is.
    async fn next(&self) -> bool {
        if let Some(pace) = &self.pace {
            let due = pace.lock().next(Instant::now());
            tokio::select! {
                () = tokio::time::sleep_until(due.min(self.end)) => {}
                () = self.stop.cancelled() => {}
            }
        }
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
            // The connection is gone: this lane has nobody to ask.
            Ok(Err(_)) | Err(_) => return,
        }
        tally.took(began.elapsed());
    }
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// The process at the other end of the socket.
async fn listener(socket: &Path) -> Result<u32, Error> {
    let failed = |problem| Error::Connect { path: socket.display().to_string(), problem };
    let stream = UnixStream::connect(socket).await.map_err(failed)?;
    let credentials = stream.peer_cred().map_err(failed)?;
    Ok(credentials.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0))
}

fn request(config: &Config) -> Bytes {
    let params = serde_json::json!({"text": "x".repeat(config.payload)});
    let submit = serde_json::json!({"command": "task_submit", "task_type": config.task_type, "params": params});
    submit.to_string().into()
}
