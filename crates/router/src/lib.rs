//! Decides by policy who handles a task, hands it over, and follows it to its result.
//!
//! [`policy`] is pure; the loops around it own the clock and the bus.

mod backpressure;
mod breaker;
mod breakers;
mod decide;
mod outcomes;
mod policies;
pub mod policy;
mod results;
mod stats;
mod tasks;

use bus::Bus;
pub use policies::files::{Name as PolicyName, delete as delete_policy, names as policy_names};
pub use policies::lint::{Findings, lint};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::policy::CircuitBreaker;

/// Decide requests that wait at most; beyond it the bus answers that nobody does.
const QUEUE_MAX: usize = 8192;

#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of `<tenant>/<policy>.{json,yaml,toml}`; may be missing.
    pub policies: PathBuf,
    /// Assignments whose publish is awaited at once.
    pub max_in_flight: usize,
    pub drain_timeout: Duration,
    /// When a provider is taken from everybody; a policy can only be stricter, and only for its own tasks.
    pub circuit_breaker: CircuitBreaker,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            policies: "policies".into(),
            max_in_flight: 10_000,
            drain_timeout: Duration::from_secs(10),
            circuit_breaker: CircuitBreaker::default(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the bus refused: {0}")]
    Bus(#[from] bus::Error),
    #[error("a loop of the router panicked: {0}")]
    Panic(#[from] tokio::task::JoinError),
}

/// Streams declared, subjects subscribed; nothing is answered yet.
pub struct Bound {
    router: Arc<Router>,
    decide: bus::Subscription,
    queries: tasks::Queries,
    results: bus::Consumer,
    outcomes: outcomes::Inputs,
    policies: policies::Watcher,
}

struct Router {
    /// What it calls itself in its status.
    id: String,
    bus: Bus,
    config: Config,
    policies: Arc<policies::Policies>,
    stats: stats::Stats,
    breakers: breakers::Breakers,
    backpressure: backpressure::Backpressure,
    started: Instant,
}

impl Router {
    /// The breakers' clock, which nobody can set back.
    fn uptime_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// The rules of the breakers that a policy has for itself, if it has any.
    fn rules_of(&self, policy: &policy::Compiled) -> Option<CircuitBreaker> {
        policy.circuit_breaker.map(|own| own.over(&self.config.circuit_breaker))
    }

    /// Lets what was taken end, for as long as a drain may last; what the bus holds up longer comes again.
    async fn drain(&self, taken: TaskTracker) {
        taken.close();
        if tokio::time::timeout(self.config.drain_timeout, taken.wait())
            .await
            .is_err()
        {
            tracing::warn!(left = taken.len(), "not all that was taken ended in time");
        }
    }
}

pub async fn bind(config: Config, bus: Bus) -> Result<Bound, Error> {
    bus::streams::declare(&bus).await?;
    let (policies, watcher) = policies::load(&config.policies, bus.clone()).await?;
    let results = bus
        .consume(bus::ConsumerConfig {
            stream: wire::subjects::STREAM_RESULT,
            name: "router".into(),
            filter: Some(wire::subjects::RESULT.into()),
            ack_wait: Duration::from_secs(30),
            max_ack_pending: 1000,
            max_in_hand: 1000,
            from_start: true,
        })
        .await?;
    let decide = bus
        .subscribe(wire::subjects::DECIDE, Some(wire::subjects::DECIDE_GROUP), QUEUE_MAX)
        .await?;
    let queries = tasks::Queries::subscribe(&bus).await?;
    let outcomes = outcomes::Inputs::subscribe(&bus).await?;
    let router = Router {
        id: format!("router-{}", &uuid::Uuid::now_v7().simple().to_string()[20..]),
        bus,
        breakers: breakers::Breakers::new(config.circuit_breaker),
        config,
        policies,
        stats: stats::Stats::default(),
        backpressure: backpressure::Backpressure::default(),
        started: Instant::now(),
    };
    Ok(Bound {
        router: Arc::new(router),
        decide,
        queries,
        results,
        outcomes,
        policies: watcher,
    })
}

impl Bound {
    /// Answers until cancelled, then finishes what it has taken.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), Error> {
        let Self { router, decide, queries, results, outcomes, policies } = self;
        let mut loops = JoinSet::new();
        loops.spawn(decide::run(router.clone(), decide, cancel.clone()));
        loops.spawn(tasks::run(router.clone(), queries, cancel.clone()));
        loops.spawn(results::run(router.clone(), results, cancel.clone()));
        loops.spawn(outcomes::run(router.clone(), outcomes, cancel.clone()));
        loops.spawn(stats::run(router, cancel.clone()));
        loops.spawn(policies.run(cancel));
        while let Some(ended) = loops.join_next().await {
            ended?;
        }
        Ok(())
    }
}
