//! Decides by policy which provider handles a task, assigns the task to a worker, and records its result.
//!
//! A decide request passes through `serve` (the loop), `intake` (validation), `decide` (policy and breakers) and, if it
//! has an idempotency key, `keys`, and if the task is pushed, `assign`. Results return through `results` and become the outcomes that all routers learn from in
//! `outcomes`. [`policy`] is pure; the loops around it own the clock and the bus.

mod admin;
mod assign;
mod backpressure;
mod breaker;
mod breakers;
mod decide;
mod desk;
mod fresh;
mod intake;
mod keys;
mod open;
mod operators;
mod orphans;
mod outcomes;
mod policies;
pub mod policy;
mod queries;
mod results;
mod serve;
mod services;
mod stats;
mod status;
mod stores;

use bus::fleet::Fleet;
use bus::{Bus, Headers, Message};
use intake::Contract;
pub use operators::{AUDIENCE as OPERATOR_AUDIENCE, Claims as OperatorClaims, Operators, Role};
pub use policies::files::{Name as PolicyName, delete as delete_policy, names as policy_names};
pub use policies::lint::{Findings, lint};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
pub use stores::Stores;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::policy::CircuitBreaker;

#[derive(Clone)]
pub struct Config {
    /// Directory of `<tenant>/<policy>.{json,yaml,toml}`; may be missing.
    pub policies: PathBuf,
    /// Assignments whose append may await its acknowledgement at the same time.
    pub max_in_flight: usize,
    pub drain_timeout: Duration,
    /// Signs the tokens of operators. Empty: nobody is one.
    pub operator_secret: Vec<u8>,
    /// The consumer and the subject of a provider without assignments and workers are deleted after this long. A worker
    /// that comes back makes them again.
    pub retire_after: Duration,
    /// Rules of the breakers that all tenants share. A policy can only be stricter, and only for its own tasks.
    pub circuit_breaker: CircuitBreaker,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            policies: "policies".into(),
            max_in_flight: 10_000,
            drain_timeout: Duration::from_secs(10),
            operator_secret: Vec::new(),
            retire_after: Duration::from_secs(3600),
            circuit_breaker: CircuitBreaker::default(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot set up the router on the bus: {0}")]
    Bus(#[from] bus::Error),
    #[error("a loop of the router panicked: {0}")]
    Panic(#[from] tokio::task::JoinError),
    #[error("{0} ended unexpectedly; the router cannot work without it, so it stops")]
    LoopEnded(&'static str),
}

/// A router whose streams are declared and whose subjects are subscribed, but which does not answer yet.
pub struct Bound {
    router: Arc<Router>,
    decide: [serve::Requests; 2],
    queries: queries::Queries,
    discovery: services::Discovery,
    results: bus::Consumer,
    outcomes: outcomes::Inputs,
    policies: policies::Watcher,
    heartbeats: bus::Subscription,
}

struct Router {
    /// The router's name in its status.
    id: String,
    bus: Bus,
    config: Config,
    policies: Arc<policies::Policies>,
    stats: stats::Stats,
    /// By endpoint, for discovery.
    answered: services::Answered,
    operators: Operators,
    breakers: breakers::Breakers,
    backpressure: backpressure::Backpressure,
    /// Which workers are live, and what they take.
    fleet: Fleet,
    fresh: fresh::Fresh,
    open: open::Open,
    stores: Arc<Stores>,
    started: Instant,
}

impl Router {
    /// The breakers' clock; it is monotonic.
    fn uptime_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Publishes an answer. A failure is logged: the client's deadline tells it.
    async fn send(&self, subject: Arc<str>, headers: Headers, answer: &impl serde::Serialize) {
        let payload = serde_json::to_vec(answer).expect("an answer serializes to JSON").into();
        let message = Message { subject, reply: None, headers, payload };
        if let Err(error) = self.bus.publish(message).await {
            tracing::warn!(%error, "publishing an answer failed");
        }
    }

    /// The rules of a policy's own breakers; `None` if it has none.
    fn rules_of(&self, policy: &policy::Compiled) -> Option<CircuitBreaker> {
        policy.circuit_breaker.map(|own| own.over(&self.config.circuit_breaker))
    }

    /// Waits for the tasks to end, at most for the drain timeout. Unfinished work is redelivered, or the client repeats
    /// its request.
    async fn drain(&self, tasks: TaskTracker) {
        tasks.close();
        let ended = tokio::time::timeout(self.config.drain_timeout, tasks.wait()).await;
        if ended.is_err() {
            tracing::warn!(left = tasks.len(), "the drain timeout passed before all requests and results were done");
        }
    }
}

pub async fn bind(config: Config, bus: Bus) -> Result<Bound, Error> {
    bus::streams::declare(&bus).await?;

    let (heartbeats, fleet) = (Fleet::subscribe(&bus).await?, Fleet::new(Instant::now()));
    let (policies, watcher) = policies::load(&config.policies, bus.clone()).await?;
    let results = bus
        .consume(bus::ConsumerConfig {
            stream: wire::subjects::STREAM_RESULT,
            name: bus::streams::ROUTER.into(),
            filter: Some(wire::subjects::RESULT.into()),
            ack_wait: Duration::from_secs(30),
            max_ack_pending: 1000,
            max_in_hand: 1000,
            from_start: true,
        })
        .await?;
    let slots = Arc::new(Semaphore::new(config.max_in_flight));
    let decide = [
        serve::Requests::subscribe(&bus, Contract::V1, &slots).await?,
        serve::Requests::subscribe(&bus, Contract::V2, &slots).await?,
    ];
    let queries = queries::Queries::subscribe(&bus).await?;
    let outcomes = outcomes::Inputs::subscribe(&bus).await?;

    let id = format!("router-{}", &uuid::Uuid::now_v7().simple().to_string()[20..]);
    let discovery = services::Discovery::subscribe(&bus, &id).await?;

    let operators = Operators::new(&config.operator_secret);
    let router = Router {
        id,
        bus,
        breakers: breakers::Breakers::new(config.circuit_breaker),
        config,
        policies,
        stats: stats::Stats::default(),
        answered: services::Answered::default(),
        operators,
        backpressure: backpressure::Backpressure::default(),
        fleet,
        fresh: fresh::Fresh::default(),
        open: open::Open::default(),
        stores: Arc::default(),
        started: Instant::now(),
    };

    Ok(Bound {
        router: Arc::new(router),
        decide,
        queries,
        discovery,
        results,
        outcomes,
        policies: watcher,
        heartbeats,
    })
}

impl Bound {
    /// How full the stores of the bus are, for a readiness report.
    pub fn stores(&self) -> Arc<Stores> {
        self.router.stores.clone()
    }

    /// Answers until cancelled, then finishes what it has taken. If one of its loops ends unexpectedly, the router stops
    /// too and returns an error that names the loop.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), Error> {
        let Self {
            router,
            decide,
            queries,
            discovery,
            results,
            outcomes,
            policies,
            heartbeats,
        } = self;
        let stop = cancel.child_token();
        let mut loops = JoinSet::new();
        let [v1, v2] = decide;
        loops.spawn(named("the loop of decide requests", serve::run(router.clone(), v1, stop.clone())));
        loops.spawn(named("the loop of decide requests of v2", serve::run(router.clone(), v2, stop.clone())));
        loops.spawn(named("the loop of queries", queries::run(router.clone(), queries, stop.clone())));
        loops.spawn(named("the loop of discovery", services::run(router.clone(), discovery, stop.clone())));
        loops.spawn(named("the loop of results", results::run(router.clone(), results, stop.clone())));
        loops.spawn(named("the loop of outcomes", outcomes::run(router.clone(), outcomes, stop.clone())));
        loops.spawn(named("the measurement of the load", backpressure::run(router.clone(), stop.clone())));
        loops.spawn(named("the loop of open tasks", open::run(router.clone(), stop.clone())));
        loops.spawn(named("the loop of orphaned assignments", orphans::run(router.clone(), stop.clone())));
        loops.spawn(named("the loop of heartbeats", fleet(router.clone(), heartbeats, stop.clone())));
        loops.spawn(named("the watch over the stores", stores::run(router.clone(), stop.clone())));
        loops.spawn(named("the loop of status reports", status::run(router, stop.clone())));
        loops.spawn(named("the loop of policies", policies.run(stop.clone())));
        all_ended(loops, stop).await
    }
}

async fn fleet(router: Arc<Router>, heartbeats: bus::Subscription, stop: CancellationToken) {
    router.fleet.listen(heartbeats, stop).await;
}

async fn named(name: &'static str, run: impl Future<Output = ()>) -> &'static str {
    run.await;
    name
}

/// Waits until all loops have ended. When the first one ends, the others are told to stop.
async fn all_ended(mut loops: JoinSet<&'static str>, stop: CancellationToken) -> Result<(), Error> {
    let mut outcome = Ok(());
    while let Some(ended) = loops.join_next().await {
        let ended = match ended {
            Err(panic) => Err(panic.into()),
            Ok(name) if !stop.is_cancelled() => Err(Error::LoopEnded(name)),
            Ok(_) => Ok(()),
        };
        outcome = outcome.and(ended);
        stop.cancel();
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn loop_that_ends_by_itself_stops_the_others_and_is_named() {
        let stop = CancellationToken::new();
        let mut loops = JoinSet::new();
        loops.spawn(named("first", std::future::ready(())));
        loops.spawn(named("second", stop.clone().cancelled_owned()));
        let ended = all_ended(loops, stop).await;
        assert!(matches!(ended, Err(Error::LoopEnded("first"))), "{ended:?}");

        let stop = CancellationToken::new();
        let loops = JoinSet::from_iter([named("only", stop.clone().cancelled_owned())]);
        stop.cancel();
        all_ended(loops, stop).await.unwrap();
    }
}
