//! Black-box tests of the router. Cases that must hold on every bus run on the local bus and on a real nats-server.

mod admin;
mod breakers;
mod copies;
mod decide;
mod faults;
mod keys;
mod kinds;
mod once;
mod policies;
mod results;
mod services;
mod stores;
mod tasks;
mod v2;

use bus::{Bus, ConsumerConfig, Headers, Message};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tempfile::TempDir;
use testkit::NatsServer;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use wire::policy::CircuitBreaker;

/// The time limit of each wait in these tests.
const SOON: Duration = Duration::from_secs(15);

macro_rules! on_both {
    ($($module:ident::$case:ident),* $(,)?) => {
        mod local {
            $(#[tokio::test]
            async fn $case() {
                crate::$module::$case(crate::Router::local().await).await;
            })*
        }
        mod nats {
            $(#[tokio::test]
            async fn $case() {
                crate::$module::$case(crate::Router::nats().await).await;
            })*
        }
    };
}

on_both! {
    decide::built_in_policy_serves_without_policies,
    decide::answer_without_inbox_goes_to_the_reply_subject,
    v2::strict_request_is_decided_and_its_answer_repeats_its_headers,
    v2::dead_letter_of_a_strict_request_goes_to_the_subject_of_v2,
    keys::repeat_gets_the_first_answer_after_a_restart_with_another_policy,
    keys::key_with_another_body_is_a_conflict_for_its_tenant_only,
    keys::refused_request_takes_no_key,
    keys::many_at_once_are_one_task,
    keys::reserved_key_leads_to_the_task_of_the_first_request,
    keys::task_whose_record_was_evicted_is_not_run_again,
    services::tools_find_every_router_and_its_counts,
    admin::operators_only,
    tasks::repeated_push_stores_one_task,
    tasks::same_id_with_another_body_is_a_conflict,
    tasks::cancelled_task_stays_cancelled,
    tasks::same_id_of_two_tenants_is_two_tasks,
    tasks::record_of_the_previous_version_is_found_by_its_own_tenant,
    copies::copies_go_to_all_who_wait_except_the_one_that_the_worker_told,
    kinds::assignments_go_where_a_live_worker_takes_them,
    kinds::assignment_goes_to_the_common_subject_while_the_stream_lacks_the_providers,
    kinds::assignment_subject_of_a_request_is_honoured,
    kinds::assignments_of_a_provider_without_workers_are_moved_to_the_common_subject,
    kinds::subject_of_a_provider_that_is_gone_is_deleted,
    once::only_a_reserved_task_is_assigned_again_and_only_in_time,
    once::result_of_an_unknown_task_is_billed_once,
    once::result_that_is_replayed_after_a_day_is_a_dead_letter,
    results::result_is_billed_once_and_ends_the_task,
    results::restart_bills_nothing_twice,
    results::result_settles_the_task_of_its_assignment_only,
    results::bad_results_become_dead_letters,
    results::result_too_large_for_its_record_is_billed_and_ends_the_task,
    breakers::all_routers_follow_the_same_outcomes_and_a_late_one_adopts_them,
    policies::broken_policy_serves_its_last_good_version_after_a_restart,
    policies::policies_of_a_vanished_directory_serve_after_a_restart,
    policies::deleted_policy_stays_deleted_until_its_file_returns,
}

/// A running router, its bus and its policy directory.
struct Router {
    dir: TempDir,
    server: Option<NatsServer>,
    bus: Bus,
    cancel: CancellationToken,
    running: JoinHandle<Result<(), router::Error>>,
}

impl Router {
    async fn local() -> Self {
        Self::with(TempDir::new().unwrap(), None).await
    }

    async fn nats() -> Self {
        Self::with(TempDir::new().unwrap(), Some(NatsServer::start().await)).await
    }

    /// Starts a router on the local bus with these policy files.
    async fn with_policies(files: &[(&str, &str)]) -> Self {
        let dir = TempDir::new().unwrap();
        for (name, text) in files {
            write(dir.path(), name, text);
        }
        Self::with(dir, None).await
    }

    async fn with(dir: TempDir, server: Option<NatsServer>) -> Self {
        Self::ruled(dir, server, CircuitBreaker::default()).await
    }

    /// Starts a router with these circuit-breaker rules as the operator's.
    async fn ruled(dir: TempDir, server: Option<NatsServer>, circuit_breaker: CircuitBreaker) -> Self {
        let bus = match &server {
            None => open(dir.path()).await,
            Some(server) => connect(server).await,
        };
        Self { server, ..Self::beside(dir, bus, circuit_breaker).await }
    }

    /// Starts a router on an existing bus, with a directory of its own.
    async fn beside(dir: TempDir, bus: Bus, circuit_breaker: CircuitBreaker) -> Self {
        let config = router::Config {
            policies: dir.path().join("policies"),
            operator_secret: OPERATOR_SECRET.into(),
            circuit_breaker,
            retire_after: Duration::from_secs(1),
            ..router::Config::default()
        };
        let bound = router::bind(config, bus.clone()).await.unwrap();
        let cancel = CancellationToken::new();
        let running = tokio::spawn(bound.run(cancel.clone()));
        Self { dir, server: None, bus, cancel, running }
    }

    /// Stops the router cleanly and starts a new one with the same directory and server.
    async fn restart(self) -> Self {
        let (dir, server) = self.stop().await;
        Self::with(dir, server).await
    }

    async fn stop(self) -> (TempDir, Option<NatsServer>) {
        let Self { dir, server, bus, cancel, running } = self;
        cancel.cancel();
        running.await.unwrap().unwrap();
        drop(bus);
        (dir, server)
    }

    fn policy(&self, name: &str, text: &str) {
        write(self.dir.path(), name, text);
    }

    async fn ask(&self, subject: &str, request: &Value) -> Value {
        self.ask_bytes(subject, Headers::new(), request.to_string().into_bytes())
            .await
    }

    async fn ask_bytes(&self, subject: &str, headers: Headers, payload: Vec<u8>) -> Value {
        let answer = self.bus.request(subject, headers, payload.into(), SOON).await.unwrap();
        serde_json::from_slice(&answer.payload).unwrap()
    }

    /// Asks as an operator of this role.
    async fn ask_as(&self, role: &str, subject: &str, query: &Value) -> Value {
        let headers = Headers::new().with("authorization", format!("Bearer {}", operator(role)));
        self.ask_bytes(subject, headers, query.to_string().into_bytes()).await
    }

    async fn decide(&self, request: &Value) -> Value {
        self.ask(wire::subjects::DECIDE, request).await
    }

    async fn task(&self, request_id: &str) -> Value {
        self.task_of("acme", request_id).await
    }

    async fn task_of(&self, tenant: &str, request_id: &str) -> Value {
        self.ask(wire::subjects::GET_DECISION, &json!({"request_id": request_id, "tenant_id": tenant}))
            .await
    }

    async fn cancel_of(&self, tenant: &str, request_id: &str) -> Value {
        self.ask(wire::subjects::CANCEL, &json!({"request_id": request_id, "tenant_id": tenant}))
            .await
    }

    async fn append(&self, subject: &str, payload: impl Into<bytes::Bytes>) {
        let message = Message { subject: subject.into(), payload: payload.into(), ..Message::default() };
        self.bus.append(message, None).await.unwrap();
    }

    /// Everything a stream holds, oldest first.
    async fn stored(&self, stream: &'static str) -> Vec<Value> {
        static READERS: AtomicU64 = AtomicU64::new(0);
        let count = self.bus.stream_info(stream).await.unwrap().messages;

        // A work queue allows only one consumer, so every reader of it uses the same name.
        let name = match stream {
            wire::subjects::STREAM_ASSIGN => "worker".into(),
            _ => format!("reader-{}", READERS.fetch_add(1, Relaxed)),
        };
        let config = ConsumerConfig {
            stream,
            name,
            filter: None,
            ack_wait: Duration::from_secs(30),
            max_ack_pending: 10_000,
            max_in_hand: 10_000,
            from_start: true,
        };

        let mut consumer = self.bus.consume(config).await.unwrap();
        let mut found = Vec::new();
        for _ in 0..count {
            let delivery = tokio::time::timeout(SOON, consumer.next())
                .await
                .expect("a stored message")
                .unwrap();
            found.push(serde_json::from_slice(&delivery.message.payload).unwrap());
        }
        found
    }

    /// Waits until the provider's breaker of all tenants, or that of `policy` (`tenant/name`), satisfies `fits`.
    async fn breaker(&self, provider: &str, policy: Option<&str>, fits: impl Fn(&Value) -> bool) {
        testkit::eventually(SOON, || async {
            let all = self.ask_as("viewer", wire::subjects::ADMIN_BREAKERS, &json!({})).await;
            let found = all["data"]["breakers"].as_array().unwrap().iter().find(|breaker| {
                let owner = breaker["tenant"]
                    .as_str()
                    .map(|t| format!("{t}/{}", breaker["policy"].as_str().unwrap()));
                breaker["provider"] == provider && owner.as_deref() == policy
            });
            found.is_some_and(&fits)
        })
        .await;
    }

    /// Waits for the next published router status that satisfies `fits`.
    async fn status(&self, fits: impl Fn(&Value) -> bool) -> Value {
        let mut statuses = self
            .bus
            .subscribe(wire::subjects::ROUTER_STATUS, None, 64)
            .await
            .unwrap();
        let found = async {
            loop {
                let status = statuses.next().await.unwrap();
                let status: Value = serde_json::from_slice(&status.payload).unwrap();
                if fits(&status) {
                    return status;
                }
            }
        };

        tokio::time::timeout(SOON, found).await.expect("a status that fits")
    }
}

const OPERATOR_SECRET: &str = "a secret of at least 32 characters";

/// A token of an operator.
fn operator(role: &str) -> String {
    let now = bus::clock::unix_seconds();
    token(
        OPERATOR_SECRET,
        &json!({"sub": "ann", "aud": "beamline-operator", "role": role, "iat": now, "exp": now + 60}),
    )
}

fn token(secret: &str, claims: &Value) -> String {
    let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
    let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), claims, &key).unwrap()
}

async fn connect(server: &NatsServer) -> Bus {
    connect_with(server, bus::streams::Sizes::default()).await
}

async fn connect_with(server: &NatsServer, sizes: bus::streams::Sizes) -> Bus {
    let config = bus::nats::NatsConfig { url: server.url(), name: "test".into(), sizes, ..Default::default() };
    bus::nats::Nats::connect(config).await.unwrap()
}

/// Opens the local bus, retrying because a bus dropped just before may still be shutting down.
async fn open(dir: &Path) -> Bus {
    let opened = std::cell::OnceCell::new();
    testkit::eventually(SOON, || async {
        bus::local::Local::open(dir)
            .await
            .is_ok_and(|bus| opened.set(bus).is_ok())
    })
    .await;
    opened.into_inner().unwrap()
}

fn write(dir: &Path, name: &str, text: &str) {
    let path = dir.join("policies").join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn request(id: &str) -> Value {
    json!({"version": "1", "request_id": id, "tenant_id": "acme", "task": {"type": "t", "payload": {"prompt": "hi"}}})
}

/// A request that also pushes its task as an assignment.
fn push(id: &str) -> Value {
    changed(request(id), json!({"push_assignment": true}))
}

fn changed(mut request: Value, fields: Value) -> Value {
    for (key, value) in fields.as_object().unwrap() {
        request[key] = value.clone();
    }
    request
}

/// The result that a worker reports for the assignment.
fn result(assignment: &Value, status: &str) -> Value {
    json!({"version": "1", "assignment_id": assignment["assignment_id"], "request_id": assignment["request_id"],
        "status": status, "provider_id": assignment["executor"]["provider_id"],
        "job": {"type": assignment["job"]["type"]}, "latency_ms": 12, "cost": 0.5, "tenant_id": "acme"})
}
