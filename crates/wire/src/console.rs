//! The samples of the operations console, published as JSON on [`CHANNEL`] once a second.

use crate::status::{BreakerStatus, GatewayStatus, Heartbeat, NodeStatus, Percentiles, RouterStatus};
use serde::Serialize;
use std::collections::BTreeMap;

pub const CHANNEL: &str = "ops:live";

/// The latest status of every part, and what the console derives from it. It borrows the status messages.
#[derive(Debug, Clone, Serialize)]
pub struct Sample<'a> {
    /// Milliseconds since the epoch.
    pub t: i64,
    pub nodes: Vec<&'a NodeStatus>,
    pub routers: Vec<&'a RouterStatus>,
    pub gateways: Vec<&'a GatewayStatus>,
    pub workers: Vec<&'a Heartbeat>,
    pub providers: Vec<Provider<'a>>,
    pub breakers: Vec<&'a BreakerStatus>,
    pub policies: Vec<Policy<'a>>,
    pub totals: Totals,
    pub decisions_by_provider: BTreeMap<&'a str, u64>,
    /// The highest percentiles that any router reports, in µs.
    pub decide_us: Percentiles,
    /// The highest percentiles that any gateway reports, in µs.
    pub forward_us: Percentiles,
    /// Messages that wait in each stream.
    pub streams: BTreeMap<&'static str, u64>,
}

/// A provider of one worker.
#[derive(Debug, Clone, Serialize)]
pub struct Provider<'a> {
    pub name: &'a str,
    pub kind: &'a str,
    pub worker: &'a str,
    pub running: u64,
    pub completed_total: u64,
    pub failed_total: u64,
    /// Latency in ms.
    pub p50: f64,
    pub p95: f64,
}

/// A policy that an operator has to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Policy<'a> {
    /// `tenant/policy`.
    pub policy: String,
    pub version: &'a str,
    /// Conditions that failed, over all routers.
    pub failed: u64,
    pub problem: String,
}

/// Sums over all parts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    pub connections: u64,
    pub users: u64,
    pub channels: u64,
    pub deliveries: u64,
    pub publications: u64,
    pub decisions: u64,
    pub requests: u64,
    pub errors: u64,
}
