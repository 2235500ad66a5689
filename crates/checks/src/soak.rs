//! A soak of the gateway: real requests for a long time, every one accounted for, and nothing that grows.

use crate::process::{self, Holds};
use crate::slope::{median, theil_sen};
use bytes::Bytes;
use client::Client;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::Instant;
use wire::ipc::FrameType;

/// Grown by less over the whole soak is not grown: what an allocator keeps or a table's next size explains it.
const NOISE_BYTES: f64 = 2.0 * 1024.0 * 1024.0;
const NOISE_SHARE: f64 = 0.02;
/// Descriptors that come and go by themselves (a status message, a log file).
const NOISE_DESCRIPTORS: u64 = 8;
/// Of the soak, not looked at: caches fill, pools reach their size.
const WARM_UP: f64 = 0.25;
/// An answer that has not come this long after its deadline never will.
const LATE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
pub struct Config {
    pub socket: PathBuf,
    pub duration: Duration,
    pub clients: usize,
    /// Requests in flight of each.
    pub in_flight: usize,
    /// Of each request; `None`: the gateway's own.
    pub deadline: Option<Duration>,
    pub task_type: String,
    /// Of the task's text, bytes.
    pub payload: usize,
}

#[derive(Debug, Serialize)]
pub struct Evidence {
    pub pid: u32,
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
    pub samples: Vec<Sample>,
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
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot connect to {path}: {problem}; is the gateway running?")]
    Connect { path: String, problem: std::io::Error },
    #[error(transparent)]
    Client(#[from] client::Error),
    #[error("cannot look at process {0}, which listens on the socket; run the soak as its user, on its machine")]
    Process(u32),
}

/// Counts of one lane.
#[derive(Default)]
struct Counts {
    sent: u64,
    answered: u64,
    errors: BTreeMap<u16, u64>,
    unanswered: u64,
    times: Vec<u32>,
}

/// Latencies kept of each lane.
const TIMES_MAX: usize = 100_000;

pub async fn gateway(config: &Config) -> Result<Evidence, Error> {
    let pid = listener(&config.socket).await?;
    process::look(pid).ok_or(Error::Process(pid))?;
    let began = Instant::now();
    let end = began + config.duration;
    let payload = request(config);
    let mut lanes = JoinSet::new();
    for _ in 0..config.clients {
        let client = Client::connect(&config.socket).await?;
        for _ in 0..config.in_flight {
            lanes.spawn(lane(client.clone(), payload.clone(), config.deadline, end));
        }
    }
    let mut samples = Vec::new();
    // A few hundred samples, whatever the length.
    let every = (config.duration / 500).clamp(Duration::from_millis(100), Duration::from_secs(30));
    let mut ticks = tokio::time::interval(every);
    let mut total = Counts::default();
    loop {
        tokio::select! {
            joined = lanes.join_next() => match joined {
                None => break,
                Some(Ok(counts)) => total.add(counts),
                // A lane that panicked is a request without an answer.
                Some(Err(_)) => { total.sent += 1; total.unanswered += 1; }
            },
            _ = ticks.tick() => {
                if let Some(holds) = process::look(pid) && Instant::now() < end {
                    samples.push(Sample { second: began.elapsed().as_secs_f64(), holds });
                }
            }
        }
    }
    Ok(judge(pid, began.elapsed().min(config.duration), total, samples, config))
}

async fn lane(client: Client, payload: Bytes, deadline: Option<Duration>, end: Instant) -> Counts {
    let mut counts = Counts::default();
    while Instant::now() < end {
        let began = Instant::now();
        counts.sent += 1;
        let patience = deadline.unwrap_or(Duration::from_secs(60)) + LATE;
        match tokio::time::timeout(patience, client.call(FrameType::TaskSubmit, payload.clone(), deadline)).await {
            Ok(Ok(_)) => counts.answered += 1,
            Ok(Err(client::Error::Refused(error))) => *counts.errors.entry(error.error.code).or_default() += 1,
            Ok(Err(_)) | Err(_) => {
                counts.unanswered += 1;
                // The connection is gone: this lane has nobody to ask.
                break;
            }
        }
        if counts.times.len() < TIMES_MAX {
            counts.times.push(u32::try_from(began.elapsed().as_micros()).unwrap_or(u32::MAX));
        }
    }
    counts
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.sent += other.sent;
        self.answered += other.answered;
        self.unanswered += other.unanswered;
        self.times.extend(other.times);
        for (code, count) in other.errors {
            *self.errors.entry(code).or_default() += count;
        }
    }
}

fn judge(pid: u32, took: Duration, mut total: Counts, samples: Vec<Sample>, config: &Config) -> Evidence {
    let mut problems = Vec::new();
    let accounted = total.answered + total.errors.values().sum::<u64>();
    if total.sent == 0 {
        problems.push("nothing was sent".into());
    }
    if accounted != total.sent {
        problems.push(format!(
            "{} of {} requests got neither an answer nor an error",
            total.sent - accounted,
            total.sent
        ));
    }
    if total.answered == 0 && config.deadline.is_none() {
        problems.push("no request was answered; is a router running?".into());
    }
    let from = took.as_secs_f64() * WARM_UP;
    let settled: Vec<Sample> = samples.iter().copied().filter(|sample| sample.second >= from).collect();
    let rss: Vec<(f64, f64)> = settled.iter().map(|s| (s.second, s.holds.rss_bytes as f64)).collect();
    let slope = theil_sen(&rss).unwrap_or(0.0);
    let typical = median(&mut rss.iter().map(|(_, bytes)| *bytes).collect::<Vec<_>>()).unwrap_or(0.0);
    let grown = slope * (took.as_secs_f64() - from);
    if grown > NOISE_BYTES.max(typical * NOISE_SHARE) {
        problems.push(format!("resident memory grew by {grown:.0} bytes after the warm-up"));
    }
    if settled.len() < 5 {
        problems.push(format!(
            "only {} samples after the warm-up: the process ended, or the soak is too short",
            settled.len()
        ));
    }
    if let (Some(first), Some(last)) = (settled.first(), settled.last()) {
        if last.holds.descriptors > first.holds.descriptors + NOISE_DESCRIPTORS {
            problems.push(format!("descriptors grew from {} to {}", first.holds.descriptors, last.holds.descriptors));
        }
        // The runtime starts threads for blocking work and ends them when they are idle.
        if last.holds.threads > first.holds.threads * 2 + 16 {
            problems.push(format!("threads grew from {} to {}", first.holds.threads, last.holds.threads));
        }
    }
    total.times.sort_unstable();
    let quantile = |q: f64| {
        let index = (total.times.len() as f64 * q) as usize;
        total.times.get(index.min(total.times.len().saturating_sub(1))).copied().map_or(0, u64::from)
    };
    Evidence {
        pid,
        seconds: took.as_secs_f64(),
        sent: total.sent,
        answered: total.answered,
        unanswered: total.sent - accounted,
        per_second: total.sent as f64 / took.as_secs_f64(),
        p50_us: quantile(0.5),
        p99_us: quantile(0.99),
        errors: total.errors,
        samples,
        rss_bytes_per_hour: slope * 3600.0,
        problems,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let (socket, task_type) = ("s".into(), "echo".into());
        let duration = Duration::from_secs(100);
        Config { socket, duration, clients: 1, in_flight: 1, deadline: None, task_type, payload: 256 }
    }

    fn samples(rss: impl Fn(u64) -> u64, descriptors: impl Fn(u64) -> u64) -> Vec<Sample> {
        let holds = |n| Holds { rss_bytes: rss(n), descriptors: descriptors(n), threads: 4 };
        (0..100).map(|n| Sample { second: n as f64, holds: holds(n) }).collect()
    }

    fn verdict(counts: Counts, samples: Vec<Sample>) -> Vec<String> {
        judge(1, Duration::from_secs(100), counts, samples, &config()).problems
    }

    fn counts(sent: u64, answered: u64) -> Counts {
        Counts { sent, answered, errors: [(10, 5)].into(), ..Counts::default() }
    }

    #[test]
    fn what_is_flat_and_accounted_for_passes() {
        let flat = samples(|n| 50_000_000 + n % 7 * 4096, |n| 20 + n % 3);
        assert_eq!(verdict(counts(105, 100), flat), Vec::<String>::new());
        // Growth that ends with the warm-up is none.
        let warm = samples(|n| 50_000_000 + n.min(25) * 1_000_000, |_| 20);
        assert_eq!(verdict(counts(105, 100), warm), Vec::<String>::new());
    }

    #[test]
    fn whatever_is_lost_or_grows_is_named() {
        let flat = || samples(|_| 50_000_000, |_| 20);
        for (counts, samples, expected) in [
            (counts(106, 100), flat(), "1 of 106 requests"),
            (counts(5, 0), flat(), "no request was answered"),
            (Counts::default(), flat(), "nothing was sent"),
            (counts(105, 100), samples(|n| 50_000_000 + n * 100_000, |_| 20), "resident memory grew"),
            (counts(105, 100), samples(|_| 50_000_000, |n| 20 + n), "descriptors grew"),
            (counts(105, 100), samples(|_| 50_000_000, |_| 20).split_off(98), "samples after the warm-up"),
        ] {
            let problems = verdict(counts, samples);
            assert!(problems.iter().any(|problem| problem.contains(expected)), "{expected}: {problems:?}");
        }
    }
}
