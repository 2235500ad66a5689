//! The counters of a node, and the status that it publishes every second.

use crate::Node;
use crate::session::Exit;
use bus::Message;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use wire::realtime::Disconnect;
use wire::status::NodeStatus;

#[derive(Default)]
pub struct Stats {
    connects: AtomicU64,
    publications: AtomicU64,
    messages_in: AtomicU64,
    slow_disconnects: AtomicU64,
}

impl Stats {
    pub fn connected(&self) {
        self.connects.fetch_add(1, Relaxed);
    }

    pub fn message_in(&self, commands: usize) {
        self.messages_in.fetch_add(commands as u64, Relaxed);
    }

    pub fn published(&self, took: Duration) {
        self.publications.fetch_add(1, Relaxed);
        metrics::histogram!("beamline_cluster_publish_duration_seconds").record(took.as_secs_f64());
    }

    pub fn panicked(&self) {
        metrics::counter!("beamline_cluster_disconnects_total", "code" => "panic").increment(1);
    }

    pub fn ended(&self, exit: Exit) {
        if exit == Exit::Closed(Disconnect::Slow) {
            self.slow_disconnects.fetch_add(1, Relaxed);
        }

        let code = match exit {
            Exit::Gone => "gone".to_string(),
            Exit::Closed(disconnect) => (disconnect as u16).to_string(),
            // A client may send any of 2,000 close codes. They share one label, so that clients cannot create metrics.
            Exit::Violation(1000 | 1001) => "left".to_string(),
            Exit::Violation(_) => "violation".to_string(),
        };
        metrics::counter!("beamline_cluster_disconnects_total", "code" => code).increment(1);
    }
}

/// Publishes the node's status every second, until cancelled.
pub async fn run(node: Arc<Node>, cancel: CancellationToken) {
    let started = Instant::now();
    let mut cpu = CpuMeter::new();
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }

        let status = status(&node, started.elapsed(), cpu.share());
        record(&status);
        let payload = serde_json::to_vec(&status).expect("a status serializes to JSON").into();
        let message = Message {
            subject: wire::subjects::NODE_STATUS.into(),
            payload,
            ..Message::default()
        };
        if let Err(error) = node.bus.publish(message).await {
            tracing::debug!(%error, "cannot publish the node's status");
        }
    }
}

fn status(node: &Node, uptime: Duration, cpu: f64) -> NodeStatus {
    let users = {
        let clients = node.clients.lock();
        let users: HashSet<&str> = clients.values().map(|client| &*client.user).collect();
        users.len()
    };
    let stats = node.stats();
    NodeStatus {
        node: node.config.node.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        address: node.config.address.clone(),
        engine: node.engine.describe().into(),
        uptime_s: uptime.as_secs(),
        connections: node.connections.load(Relaxed) as u64,
        users: users as u64,
        channels: node.hub.channels() as u64,
        connects_total: stats.connects.load(Relaxed),
        deliveries_total: node.hub.deliveries.load(Relaxed),
        publications_total: stats.publications.load(Relaxed),
        messages_in_total: stats.messages_in.load(Relaxed),
        slow_disconnects_total: stats.slow_disconnects.load(Relaxed),
        rss_bytes: rss_bytes(),
        cpu,
        draining: node.stopping.is_cancelled(),
    }
}

/// Exports the status as metrics.
fn record(status: &NodeStatus) {
    // The counters are set to the status' totals, so that status and metrics show the same figures.
    metrics::gauge!("beamline_cluster_connections").set(status.connections as f64);
    metrics::gauge!("beamline_cluster_channels").set(status.channels as f64);
    metrics::counter!("beamline_cluster_connects_total").absolute(status.connects_total);
    metrics::counter!("beamline_cluster_deliveries_total").absolute(status.deliveries_total);
    metrics::counter!("beamline_cluster_publications_total").absolute(status.publications_total);
    metrics::counter!("beamline_cluster_messages_in_total").absolute(status.messages_in_total);
    metrics::gauge!("beamline_process_resident_bytes").set(status.rss_bytes as f64);
}

/// The resident memory in bytes: the second field of statm, in pages of 4 KiB.
fn rss_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok())
        .unwrap_or(0)
        * 4096
}

/// Measures the CPU time of this process, as a share of one core.
struct CpuMeter {
    ticks: u64,
    at: Instant,
}

impl CpuMeter {
    fn new() -> Self {
        Self { ticks: Self::now(), at: Instant::now() }
    }

    /// The time in user and kernel mode since the start, in hundredths of a second.
    fn now() -> u64 {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The process name in parentheses may contain spaces, so fields are counted after it: utime is the 12th, stime
        // the 13th.
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |index: usize| fields.get(index).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        field(11) + field(12)
    }

    /// The CPU time since the last call, as a share of one core.
    fn share(&mut self) -> f64 {
        let (ticks, at) = (Self::now(), Instant::now());
        let seconds = at.duration_since(self.at).as_secs_f64().max(0.001);
        let share = ticks.saturating_sub(self.ticks) as f64 / 100.0 / seconds;
        (self.ticks, self.at) = (ticks, at);
        share
    }
}
