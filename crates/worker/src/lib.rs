//! Runs assignments: takes them from the stream, runs each on its provider, publishes the output and stores the result.
//!
//! The result is stored under the assignment's id before the assignment is acknowledged. A crash in between runs the
//! assignment again and still leaves one result.

mod cancels;
mod heartbeat;
mod outages;
pub mod provider;
mod results;
mod run;
mod running;
mod take;
mod upkeep;

use bus::clock::StreamClock;
use bus::fleet::Fleet;
use bus::{Bus, Places};
use cancels::Cancels;
use outages::Outages;
use provider::Provider;
use provider::command::processes;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use wire::subjects::{ASSIGN, STREAM_ASSIGN, assign_to};

pub(crate) use bus::assignments::ACK_WAIT;

/// Attempts to open a consumer. Each fails only if another process has just taken its subject from the stream.
const CONSUME_ATTEMPTS: usize = 5;

#[derive(Debug, Clone)]
pub struct Config {
    /// Assignments that run at the same time.
    pub slots: usize,
    pub providers: Vec<ProviderConfig>,
    /// How long runs may continue after a drain begins; then they are stopped and returned to the stream.
    pub drain_timeout: Duration,
    /// Delays between deliveries of an assignment whose provider no live worker has.
    pub backoff: [Duration; 3],
}

impl Default for Config {
    fn default() -> Self {
        let provider = |name: &str, kind| ProviderConfig { name: name.into(), kind, timeout: Duration::from_secs(60) };
        Self {
            slots: 16,
            providers: vec![provider("echo", Kind::Echo), provider("ops", Kind::Ops)],
            drain_timeout: Duration::from_secs(10),
            backoff: [1, 5, 15].map(Duration::from_secs),
        }
    }
}

#[derive(Debug, Clone)]
pub struct ProviderConfig {
    /// The name that policies use.
    pub name: String,
    pub kind: Kind,
    /// The limit of one run; an assignment's deadline may be shorter.
    pub timeout: Duration,
}

#[derive(Debug, Clone)]
pub enum Kind {
    /// Returns the task's payload.
    Echo,
    /// Runs a program with the task on its standard input and streams its standard output. Its environment is `env` and
    /// the ids of the task; it inherits nothing from this process. `output_max` is in bytes.
    Command {
        program: PathBuf,
        args: Vec<String>,
        env: BTreeMap<String, String>,
        output_max: usize,
    },
    /// Asks an endpoint of OpenAI's API, for chat completions and embeddings.
    OpenAi(Model),
    /// Answers questions about this deployment.
    Ops,
}

/// A model behind an endpoint of OpenAI's API.
#[derive(Clone)]
pub struct Model {
    pub base_url: String,
    pub api_key: Option<String>,
    pub model: String,
    /// The system prompt, before the messages of every task.
    pub system: Option<String>,
    /// Asks for the token usage of streamed answers, with `stream_options`.
    pub include_usage: bool,
    /// How long a chat completion may take until its first token.
    pub first_token_timeout: Option<Duration>,
    /// What this worker may send to the endpoint in a minute.
    pub requests_per_minute: Option<u64>,
    pub tokens_per_minute: Option<u64>,
}

impl Model {
    /// A model without key, system prompt and limits.
    pub fn new(base_url: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            base_url: base_url.into(),
            api_key: None,
            model: model.into(),
            system: None,
            include_usage: true,
            first_token_timeout: None,
            requests_per_minute: None,
            tokens_per_minute: None,
        }
    }
}

/// Prints no key.
impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { base_url, model, .. } = self;
        f.debug_struct("Model")
            .field("base_url", base_url)
            .field("model", model)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot set up the worker on the bus: {0}")]
    Bus(#[from] bus::Error),
    #[error("two providers are named {0:?}; policies select by name, so rename one in worker.providers")]
    Duplicate(String),
    #[error("cannot create the HTTP client of provider {name:?}: {source}")]
    Http { name: String, source: reqwest::Error },
    #[error("a loop of the worker panicked: {0}")]
    Panic(#[from] tokio::task::JoinError),
}

/// A worker that is subscribed to its streams but runs nothing yet.
pub struct Bound {
    worker: Arc<Worker>,
    assignments: Vec<bus::Consumer>,
    heartbeats: bus::Subscription,
    cancels: bus::Subscription,
    live: provider::ops::Subscriptions,
}

pub(crate) struct Worker {
    bus: Bus,
    id: String,
    slots: usize,
    drain_timeout: Duration,
    backoff: [Duration; 3],
    providers: BTreeMap<String, Arc<Provider>>,
    running: running::Running,
    cancels: Cancels,
    /// The subjects of the providers.
    subjects: Vec<String>,
    fleet: Fleet,
    clock: StreamClock,
    outages: Outages,
    /// Bounds the results that are being stored, in KiB.
    storing: Semaphore,
    live: Arc<provider::ops::Live>,
}

pub async fn bind(config: Config, bus: Bus) -> Result<Bound, Error> {
    bus::streams::declare(&bus).await?;

    let live = Arc::new(provider::ops::Live::default());
    let mut providers = BTreeMap::new();
    for each in config.providers {
        let name = each.name.clone();
        let provider = Arc::new(Provider::new(each, &bus, &live)?);
        if providers.insert(name.clone(), provider).is_some() {
            return Err(Error::Duplicate(name));
        }
    }

    // Heard before the first assignment comes.
    let (heartbeats, fleet) = (Fleet::subscribe(&bus).await?, Fleet::new(Instant::now()));
    let subjects: Vec<String> = providers.keys().filter_map(|name| assign_to(name)).collect();
    let places = Places::new(config.slots);
    let mut assignments = Vec::new();
    for subject in std::iter::once(ASSIGN).chain(subjects.iter().map(String::as_str)) {
        assignments.push(consume(&bus, &subjects, subject, &places).await?);
    }
    let cancels = bus.subscribe(wire::subjects::CONTROL_CANCEL, None, 1024).await?;
    let subscriptions = provider::ops::Subscriptions::subscribe(&bus).await?;

    let clock = StreamClock::start(bus.clone(), STREAM_ASSIGN).await?;
    let worker = Worker {
        id: format!("worker-{}", &uuid::Uuid::now_v7().simple().to_string()[20..]),
        slots: config.slots,
        drain_timeout: config.drain_timeout,
        backoff: config.backoff,
        running: running::Running::default(),
        cancels: Cancels::since(clock.now_ms()),
        outages: Outages::new(bus.interruptions()),
        clock,
        storing: Semaphore::new(results::STORING_KIB),
        subjects,
        fleet,
        bus,
        providers,
        live,
    };
    Ok(Bound {
        worker: Arc::new(worker),
        assignments,
        heartbeats,
        cancels,
        live: subscriptions,
    })
}

/// Opens the consumer of one of the subjects.
async fn consume(bus: &Bus, subjects: &[String], subject: &str, places: &Places) -> bus::Result<bus::Consumer> {
    let mut attempt = 1;
    loop {
        bus.add_subjects(STREAM_ASSIGN, subjects).await?;
        let config = bus::assignments::consumer(subject, places.size());
        match bus.consume_within(config, places).await {
            Err(error) if error.is_transient() && attempt < CONSUME_ATTEMPTS => attempt += 1,
            opened => return opened,
        }
    }
}

impl Bound {
    /// Runs assignments until cancelled, then waits for those that run.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), Error> {
        let Self { worker, assignments, heartbeats, cancels, live } = self;
        let mut loops = JoinSet::new();
        // Cancels and heartbeats outlast the drain: a run can be cancelled until it ends.
        let ended = CancellationToken::new();
        loops.spawn(run::cancels(worker.clone(), cancels, ended.clone()));
        if worker.providers.values().any(|provider| provider.starts_processes()) {
            processes::adopt_orphans();
            loops.spawn(processes::reap(ended.clone()));
        }
        loops.spawn(provider::ops::listen(worker.live.clone(), live, ended.clone()));
        loops.spawn(heartbeat::run(worker.clone(), cancel.clone(), ended.clone()));
        loops.spawn(upkeep::run(worker.clone(), ended.clone()));
        loops.spawn({
            let (worker, ended) = (worker.clone(), ended.clone());
            async move { worker.fleet.listen(heartbeats, ended).await }
        });
        loops.spawn(async move {
            let _ended = ended.drop_guard();
            take::assignments(worker, assignments, cancel).await;
        });

        while let Some(ended) = loops.join_next().await {
            ended?;
        }
        Ok(())
    }
}
