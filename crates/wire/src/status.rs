//! Status messages that each running part publishes on the bus for the console and the `ops` provider.
//!
//! They are core messages, published every second (by workers every 5 s, as heartbeats). Totals count from the start of
//! the part, so readers compute differences. A part that is silent for three intervals is shown as gone.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// The status of a node, published on [`crate::subjects::NODE_STATUS`].
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct NodeStatus {
    pub node: String,
    pub version: String,
    /// The HTTP address that browsers connect to.
    pub address: String,
    pub engine: String,
    pub uptime_s: u64,
    pub connections: u64,
    pub users: u64,
    pub channels: u64,
    pub connects_total: u64,
    pub deliveries_total: u64,
    pub publications_total: u64,
    pub messages_in_total: u64,
    pub slow_disconnects_total: u64,
    pub rss_bytes: u64,
    /// CPU time since the last status as a share of one core; above 1.0 with several busy cores.
    pub cpu: f64,
    pub draining: bool,
}

/// The status of a router, published on [`crate::subjects::ROUTER_STATUS`].
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct RouterStatus {
    pub router: String,
    pub version: String,
    pub uptime_s: u64,
    pub decisions_total: u64,
    pub decisions_by_provider: BTreeMap<String, u64>,
    pub decisions_by_reason: BTreeMap<String, u64>,
    pub errors_by_code: BTreeMap<String, u64>,
    pub results_by_status: BTreeMap<String, u64>,
    pub in_flight: u64,
    /// Time of the decisions of the last minute, in µs.
    pub decide_us: Percentiles,
    /// The first 200 at most, those with a problem first; their texts are cut short.
    pub policies: Vec<PolicyStatus>,
    /// How many policies the router knows.
    pub policies_total: u64,
    pub breakers: Vec<BreakerStatus>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Percentiles {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
}

impl Percentiles {
    /// Computes the percentiles of values in any order; all are 0 if there are no values.
    pub fn of<T: Ord + Copy>(values: impl Iterator<Item = T>, number: impl Fn(T) -> f64) -> Self {
        let mut sorted: Vec<T> = values.collect();
        sorted.sort_unstable();
        let at = |share: f64| {
            let index = (sorted.len() as f64 * share) as usize;
            sorted
                .get(index.min(sorted.len().saturating_sub(1)))
                .map_or(0.0, |value| number(*value))
        };
        Self { p50: at(0.5), p95: at(0.95), p99: at(0.99) }
    }
}

/// The newest latencies of an operation, from which a status message takes its percentiles.
#[derive(Debug, Clone, Default)]
pub struct LatencyWindow {
    /// Microseconds, oldest first.
    us: VecDeque<u32>,
}

impl LatencyWindow {
    /// Latencies that the window holds; an older one is evicted.
    const LEN: usize = 4096;

    pub fn add(&mut self, took: Duration) {
        if self.us.len() == Self::LEN {
            self.us.pop_front();
        }
        self.us.push_back(u32::try_from(took.as_micros()).unwrap_or(u32::MAX));
    }

    /// In microseconds. Sorts the window: clone it out of a lock first.
    pub fn percentiles(self) -> Percentiles {
        Percentiles::of(self.us.into_iter(), f64::from)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct PolicyStatus {
    pub tenant: String,
    pub policy: String,
    pub version: String,
    /// What is wrong with the policy's file. `version` still serves; if it is empty, requests are refused.
    pub error: Option<String>,
    /// What is most likely a mistake, though it serves.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Of this version, since this router read it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rule_errors: Vec<RuleErrors>,
}

/// Evaluations of a rule's condition that failed; the rule did not match.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct RuleErrors {
    /// From 0 on.
    pub rule: usize,
    pub count: u64,
    /// Why the last one failed.
    pub last: String,
}

/// A circuit breaker as one router sees it. Routers adopt the newer state from each other.
#[derive(Debug, Clone, Serialize, Deserialize, Default, PartialEq)]
#[serde(default)]
pub struct BreakerStatus {
    pub provider: String,
    /// `closed`, `open`, `half_open`, or `cooling_down`: closed, but the provider's endpoint asked for a pause.
    pub state: String,
    /// Failures among the last `calls` calls, counted while the breaker is closed.
    pub failures: u64,
    pub calls: u64,
    /// The owner and, in `policy`, the name of the policy that has this breaker. Both are `None` for the breaker that
    /// all tenants share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// How often the breaker has tripped. The state with the higher generation is the newer one; within a generation, a
    /// breaker goes from open through half open to closed.
    pub generation: u64,
    /// How long the breaker still stays open, in ms.
    pub open_ms: u64,
    /// How often the endpoint asked for a cool-down and, in `cooling_down_ms`, the remaining time of the last one.
    pub cool_downs: u64,
    pub cooling_down_ms: u64,
}

/// The status of a gateway, published on [`crate::subjects::GATEWAY_STATUS`].
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct GatewayStatus {
    pub gateway: String,
    pub socket: String,
    pub uptime_s: u64,
    pub connections: u64,
    pub in_flight: u64,
    pub requests_total: u64,
    pub errors_by_code: BTreeMap<String, u64>,
    /// Time of the requests forwarded in the last minute, in µs.
    pub forward_us: Percentiles,
    /// State of the circuit breaker for the router: `closed`, `open` or `half_open`.
    pub breaker: String,
}

/// A worker's heartbeat, published on [`crate::subjects::HEARTBEAT`].
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Heartbeat {
    pub worker_id: String,
    /// RFC 3339.
    pub timestamp: String,
    /// `idle`, `busy`, `draining` or `stopped`.
    pub status: String,
    /// Share of the worker's slots in use, from 0.0 to 1.0.
    pub load: f64,
    pub running: u64,
    pub completed_total: u64,
    pub failed_total: u64,
    pub providers: Vec<ProviderStatus>,
    /// The subjects below [`crate::subjects::ASSIGN`] from which the worker takes assignments. Older workers name none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subjects: Vec<String>,
}

impl Heartbeat {
    /// Whether the worker takes no more assignments.
    pub fn is_leaving(&self) -> bool {
        ["draining", "stopped"].contains(&&*self.status)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct ProviderStatus {
    pub name: String,
    pub kind: String,
    pub running: u64,
    pub completed_total: u64,
    pub failed_total: u64,
    /// Latency of the most recent runs, in ms.
    pub latency_ms: Percentiles,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_many_one_and_no_values() {
        let of = |values: &[u32]| {
            let p = Percentiles::of(values.iter().copied(), f64::from);
            (p.p50, p.p95, p.p99)
        };
        let hundred: Vec<u32> = (0..100).rev().collect();
        assert_eq!(of(&hundred), (50.0, 95.0, 99.0));
        assert_eq!(of(&[7]), (7.0, 7.0, 7.0));
        assert_eq!(of(&[]), (0.0, 0.0, 0.0));
    }

    #[test]
    fn latency_window_forgets_the_oldest() {
        let mut window = LatencyWindow::default();
        window.add(Duration::from_secs(3600));
        for _ in 0..LatencyWindow::LEN {
            window.add(Duration::from_micros(20));
        }
        let p = window.percentiles();
        assert_eq!((p.p50, p.p99), (20.0, 20.0));
    }
}
