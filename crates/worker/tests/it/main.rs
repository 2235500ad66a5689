//! The worker on a bus: real programs, a scripted chat endpoint, crashes and drains. What must hold on every bus also
//! runs on a real nats-server.

mod command;
mod delivery;
mod kinds;
mod once;
mod openai;
mod ops;

use bus::{Bus, ConsumerConfig, Message, Subscription};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;
use testkit::NatsServer;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use wire::router::{ExecResult, OutputChunk};
use wire::subjects;
use worker::{Config, Kind, ProviderConfig};

/// The time limit of each single wait in a test.
const SOON: Duration = Duration::from_secs(15);

macro_rules! on_both {
    ($($module:ident::$case:ident),* $(,)?) => {
        mod local {
            $(#[tokio::test]
            async fn $case() {
                let place = crate::Place::local().await;
                crate::$module::$case(place).await;
            })*
        }
        mod nats {
            $(#[tokio::test]
            async fn $case() {
                let place = crate::Place::nats().await;
                crate::$module::$case(place).await;
            })*
        }
    };
}

on_both! {
    command::output_is_published_while_the_program_runs,
    command::cancel_ends_a_running_program,
    delivery::echo_returns_the_payload,
    delivery::assignments_beyond_the_slots_go_to_another_worker,
    kinds::assignments_reach_the_worker_that_has_their_provider,
    kinds::assignment_whose_provider_nobody_has_fails_at_its_deadline,
    kinds::busy_provider_does_not_starve_another,
    kinds::moved_assignment_keeps_its_time_and_counts_its_deliveries_anew,
    kinds::assignment_that_others_passed_on_is_not_given_up,
    kinds::assignment_whose_deadline_has_passed_is_not_run,
    kinds::run_ends_at_the_deadline_that_counts_from_the_queue,
    once::assignment_with_a_stored_result_is_only_acknowledged,
    once::assignment_whose_move_was_not_acknowledged_runs_once,
    once::second_delivery_waits_for_the_run_in_this_worker,
    once::run_that_outlasts_the_ack_wait_is_not_delivered_again,
}

/// A temporary directory and a bus, which is either a local one in this directory or a nats-server.
struct Place {
    dir: TempDir,
    bus: Bus,
    server: Option<NatsServer>,
}

impl Place {
    async fn local() -> Self {
        let dir = TempDir::new().unwrap();
        let bus = open(dir.path()).await;
        Self::with(dir, bus, None).await
    }

    async fn nats() -> Self {
        let server = NatsServer::start().await;
        let config = bus::nats::NatsConfig { url: server.url(), name: "test".into(), ..Default::default() };
        let bus = bus::nats::Nats::connect(config).await.unwrap();
        Self::with(TempDir::new().unwrap(), bus, Some(server)).await
    }

    async fn with(dir: TempDir, bus: Bus, server: Option<NatsServer>) -> Self {
        bus::streams::declare(&bus).await.unwrap();
        Self { dir, bus, server }
    }

    async fn worker(&self, config: Config) -> Worker {
        Worker::start(self.bus.clone(), config).await
    }

    /// A worker whose provider `sh` runs this script; `$DIR` is the test's directory.
    async fn shell(&self, script: &str, change: impl FnOnce(&mut Config)) -> Worker {
        let mut config = Config { providers: vec![shell(&self.path(script))], ..Config::default() };
        change(&mut config);
        self.worker(config).await
    }

    fn path(&self, script: &str) -> String {
        script.replace("$DIR", self.dir.path().to_str().unwrap())
    }

    fn file(&self, name: &str) {
        std::fs::write(self.dir.path().join(name), "").unwrap();
    }

    async fn results(&self) -> Results {
        Results(self.bus.subscribe(subjects::RESULT, None, 64).await.unwrap())
    }

    async fn output(&self, request_id: &str) -> Subscription {
        self.bus
            .subscribe(&subjects::output(request_id), None, 4096)
            .await
            .unwrap()
    }

    async fn assign(&self, request_id: &str, provider: &str, payload: Value) {
        self.append(subjects::ASSIGN, assignment(request_id, provider, payload).to_string())
            .await;
    }

    async fn append(&self, subject: &str, payload: impl Into<bytes::Bytes>) {
        append(&self.bus, subject, payload).await;
    }

    /// The next delivery of the workers' consumer of this subject.
    async fn take(&self, subject: &str) -> bus::Delivery {
        let mut consumer = self.bus.consume(bus::assignments::consumer(subject, 1)).await.unwrap();
        tokio::time::timeout(SOON, consumer.next()).await.unwrap().unwrap()
    }

    /// Returns what the next delivery brings as if its worker had ended.
    async fn lose_delivery(&self, subject: &str) {
        self.take(subject).await.nak(Duration::ZERO).await.unwrap();
    }

    /// The lines of a file in the test's directory.
    fn lines(&self, name: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
        text.lines().map(String::from).collect()
    }

    async fn cancel(&self, request_id: &str) {
        self.cancel_run(json!({"request_id": request_id, "tenant_id": "acme"}))
            .await;
    }

    async fn cancel_run(&self, cancel: Value) {
        let payload = cancel.to_string().into();
        let message = Message { subject: subjects::CONTROL_CANCEL.into(), payload, ..Message::default() };
        self.bus.publish(message).await.unwrap();
    }

    async fn count(&self, stream: &str) -> u64 {
        self.bus.stream_info(stream).await.unwrap().messages
    }

    async fn dead_letter(&self, stream: &'static str) -> Value {
        testkit::eventually(SOON, || async { self.count(stream).await > 0 }).await;
        let mut consumer = self.bus.consume(consumer(stream, "test")).await.unwrap();
        let delivery = tokio::time::timeout(SOON, consumer.next()).await.unwrap().unwrap();
        serde_json::from_slice(&delivery.message.payload).unwrap()
    }
}

struct Worker {
    cancel: CancellationToken,
    running: JoinHandle<Result<(), worker::Error>>,
}

impl Worker {
    async fn start(bus: Bus, config: Config) -> Self {
        let bound = worker::bind(config, bus).await.unwrap();
        let cancel = CancellationToken::new();
        let running = tokio::spawn(bound.run(cancel.clone()));
        Self { cancel, running }
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.ended().await;
    }

    async fn ended(self) {
        tokio::time::timeout(SOON, self.running)
            .await
            .expect("the worker ends")
            .unwrap()
            .unwrap();
    }
}

struct Results(Subscription);

impl Results {
    async fn next(&mut self) -> ExecResult {
        let message = tokio::time::timeout(SOON, self.0.next())
            .await
            .expect("a result in time")
            .unwrap();
        ExecResult::decode(&message.payload).unwrap()
    }
}

async fn chunk(output: &mut Subscription) -> OutputChunk {
    let message = tokio::time::timeout(SOON, output.next())
        .await
        .expect("output in time")
        .unwrap();
    serde_json::from_slice(&message.payload).unwrap()
}

async fn append(bus: &Bus, subject: &str, payload: impl Into<bytes::Bytes>) {
    let message = Message { subject: subject.into(), payload: payload.into(), ..Message::default() };
    bus.append(message, None).await.unwrap();
}

/// Opens the local bus in this directory. Retries, because a bus that was just dropped may still be shutting down.
async fn open(dir: &Path) -> Bus {
    let opened = std::sync::OnceLock::new();
    testkit::eventually(SOON, || async {
        bus::local::Local::open(dir)
            .await
            .is_ok_and(|bus| opened.set(bus).is_ok())
    })
    .await;
    opened.into_inner().unwrap()
}

fn consumer(stream: &'static str, name: &str) -> ConsumerConfig {
    ConsumerConfig {
        stream,
        name: name.into(),
        filter: None,
        ack_wait: Duration::from_secs(30),
        max_ack_pending: 100,
        max_in_hand: 100,
        from_start: true,
    }
}

fn provider(name: &str, kind: Kind) -> ProviderConfig {
    ProviderConfig { name: name.into(), kind, timeout: Duration::from_secs(60) }
}

fn shell(script: &str) -> ProviderConfig {
    let args = vec!["-c".into(), script.into()];
    provider("sh", Kind::Command { program: "sh".into(), args, env: variables(&[]), output_max: 64 * 1024 })
}

fn variables(variables: &[(&str, &str)]) -> BTreeMap<String, String> {
    variables
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .collect()
}

fn assignment(request_id: &str, provider: &str, payload: Value) -> Value {
    json!({"version": "1", "assignment_id": format!("a-{request_id}"), "request_id": request_id, "tenant_id": "acme",
        "executor": {"provider_id": provider, "channel": "nats"}, "job": {"type": "t", "payload": payload},
        "options": {"deadline_ms": 60_000, "retry": {"max_attempts": 2, "backoff_ms": 200}},
        "correlation": {"trace_id": "t1"}, "decision": {"provider_id": provider, "priority": 50,
        "expected_latency_ms": 10, "expected_cost": 0.25, "reason": "weighted", "policy_id": "default",
        "policy_version": "1"}})
}

/// The assignment with another deadline.
fn within(mut assignment: Value, deadline_ms: u64) -> Value {
    assignment["options"]["deadline_ms"] = json!(deadline_ms);
    assignment
}

/// Whether the process has ended; a process that is only waiting to be reaped counts as ended.
fn is_gone(pid: &str) -> bool {
    let pid = pid.trim();
    assert!(!pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit()), "{pid:?} is not a process id");
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat
            .rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X'])),
        Err(_) => true,
    }
}
