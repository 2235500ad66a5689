//! Parts that stop under load, with others of their kind beside them on NATS: nothing that they had taken is lost.

use crate::process::Process;
use bus::nats::{Nats, NatsConfig};
use bus::{Bus, Headers};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use testkit::NatsServer;
use tokio::task::JoinSet;
use wire::subjects;

/// A request that was lost waits longer: until its deadline, or until a redelivery.
const PROMPT: Duration = Duration::from_secs(2);
const DEADLINE: Duration = Duration::from_secs(20);

async fn part(nats: &NatsServer, settings: &str) -> Process {
    Process::start_with_settings(&format!("{settings}\n[nats]\nurl = {:?}\n", nats.url())).await
}

async fn connect(nats: &NatsServer) -> Bus {
    Nats::connect(NatsConfig { url: nats.url(), ..NatsConfig::default() })
        .await
        .unwrap()
}

/// Sends a decide request to the routers without a gateway.
async fn decide(bus: &Bus, push: bool) {
    let request = json!({"version": "1", "request_id": uuid::Uuid::now_v7().to_string(), "tenant_id": "default",
        "task": {"type": "echo", "payload": {"prompt": "hi"}}, "push_assignment": push});
    let payload = request.to_string().into();
    let reply = bus.request(subjects::DECIDE, Headers::new(), payload, DEADLINE).await;
    let reply: Value = serde_json::from_slice(&reply.unwrap().payload).unwrap();
    assert_eq!((&reply["ok"], reply["assignment_id"].is_string()), (&json!(true), push), "{reply}");
}

/// Two hundred requests a second of four kinds; `at` is called once a third of them has been sent.
async fn load(bus: &Bus, gateway: &client::Client, requests: u32, at: impl FnOnce()) {
    let mut ticks = tokio::time::interval(Duration::from_millis(5));
    let mut under_way = JoinSet::new();
    let mut at = Some(at);
    for n in 0..requests {
        ticks.tick().await;
        if n > requests / 3
            && let Some(at) = at.take()
        {
            at();
        }

        let (bus, gateway) = (bus.clone(), gateway.clone());
        under_way.spawn(async move {
            let began = Instant::now();
            match n % 4 {
                0 => decide(&bus, false).await,
                1 => decide(&bus, true).await,
                2 => {
                    _ = gateway
                        .submit(&json!({"command": "task_submit", "task_type": "echo"}))
                        .await
                        .unwrap()
                }
                _ => {
                    let submit = json!({"command": "task_submit", "task_type": "echo", "wait": "result"});
                    assert_eq!(gateway.submit(&submit).await.unwrap()["status"], "success");
                }
            }
            (n, began.elapsed())
        });
    }
    while let Some(answered) = under_way.join_next().await {
        let (n, took) = answered.unwrap();
        assert!(took < PROMPT, "request {n} took {took:?}");
    }
}

#[tokio::test]
async fn no_request_notices_that_one_of_two_routers_stops() {
    let nats = NatsServer::start().await;
    let mut leaving = part(&nats, "roles = [\"router\"]").await;
    let _staying = part(&nats, "roles = [\"router\"]").await;
    let _worker = part(&nats, "roles = [\"worker\"]").await;
    let gateway = part(&nats, "roles = [\"gateway\"]").await;
    let client = client::Client::connect(&gateway.socket()).await.unwrap();

    load(&connect(&nats).await, &client, 600, || leaving.signal(Signal::SIGTERM)).await;
    assert_eq!(leaving.ended().await, Some(0), "{}", leaving.log());
}

/// Fifty tasks whose results a client waits for, all of them under way.
async fn slow_tasks(nats: &NatsServer, gateway: &Process) -> JoinSet<Value> {
    let bus = connect(nats).await;
    let mut requests = bus.subscribe(subjects::DECIDE, None, 64).await.unwrap();
    let client = client::Client::connect(&gateway.socket()).await.unwrap();
    let mut under_way = JoinSet::new();
    for _ in 0..50 {
        let client = client.clone();
        let submit = json!({"command": "task_submit", "task_type": "echo", "wait": "result"});
        under_way.spawn(async move { client.submit(&submit).await.unwrap() });
    }
    for _ in 0..50 {
        requests.next().await.unwrap();
    }
    under_way
}

async fn all_succeed(mut under_way: JoinSet<Value>) {
    while let Some(result) = under_way.join_next().await {
        assert_eq!(result.unwrap()["status"], "success");
    }
}

const SLOW_WORKER: &str = "roles = [\"worker\"]\n[worker]\nslots = 8\n[[worker.providers]]\nname = \"echo\"\n\
                           kind = \"command\"\nprogram = \"/bin/sh\"\nargs = [\"-c\", \"sleep 0.1; cat\"]";

#[tokio::test]
async fn stopping_worker_returns_what_it_has_not_begun() {
    let nats = NatsServer::start().await;
    let mut leaving = part(&nats, SLOW_WORKER).await;
    let _router = part(&nats, "roles = [\"router\"]").await;
    let gateway = part(&nats, "roles = [\"gateway\"]").await;

    let under_way = slow_tasks(&nats, &gateway).await;
    let _staying = part(&nats, SLOW_WORKER).await;
    leaving.signal(Signal::SIGTERM);
    let began = Instant::now();
    all_succeed(under_way).await;
    // What is not returned is redelivered after thirty seconds.
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
    assert_eq!(leaving.ended().await, Some(0), "{}", leaving.log());
}

#[tokio::test]
async fn stopping_gateway_answers_what_it_has_accepted() {
    let nats = NatsServer::start().await;
    let _worker = part(&nats, SLOW_WORKER).await;
    let _router = part(&nats, "roles = [\"router\"]").await;
    let mut gateway = part(&nats, "roles = [\"gateway\"]").await;

    let under_way = slow_tasks(&nats, &gateway).await;
    gateway.signal(Signal::SIGTERM);
    all_succeed(under_way).await;
    assert_eq!(gateway.ended().await, Some(0), "{}", gateway.log());
}
