//! Idempotency keys while a router is killed: every key is one task, however often and to whom its request is sent.

use crate::process::Process;
use bus::nats::{Nats, NatsConfig};
use bus::{Bus, Headers};
use futures_util::StreamExt;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use testkit::NatsServer;
use wire::router::ExecAssignment;
use wire::subjects;

const KEYS: u32 = 200;
const AT_ONCE: usize = 32;
/// The answer number after which a router is killed: others are under way then.
const KILL_AFTER: u32 = 60;
/// A request that a killed router took has no answer.
const DEADLINE: Duration = Duration::from_secs(2);
const TRIES: u32 = 20;

/// Sends the request with this key until it is answered, each time under another request id.
async fn answered(bus: &Bus, key: u32) -> Value {
    for n in 0..TRIES {
        let request = json!({"version": "1", "request_id": format!("{key}-{}", uuid::Uuid::now_v7()),
            "tenant_id": "acme", "task": {"type": "t", "payload": {"key": key}}, "push_assignment": true,
            "idempotency_key": format!("key {key}")});
        let payload = request.to_string().into();
        let Ok(reply) = bus.request(subjects::DECIDE, Headers::new(), payload, DEADLINE).await else {
            continue;
        };
        let answer: Value = serde_json::from_slice(&reply.payload).unwrap();
        if answer["ok"] == true {
            return answer;
        }
        assert_eq!(answer["error"]["code"], "unavailable", "try {n} of key {key}: {answer}");
    }
    panic!("no answer for key {key} after {TRIES} tries");
}

#[tokio::test]
async fn killed_router_leaves_each_key_one_task() {
    let nats = NatsServer::start().await;
    let mut killed = Process::start_with(&["--roles", "router", "--nats-url", &nats.url()]).await;
    let _other = Process::start_with(&["--roles", "router", "--nats-url", &nats.url()]).await;
    let config = NatsConfig { url: nats.url(), ..NatsConfig::default() };
    let bus = Nats::connect(config).await.unwrap();

    let mut first = futures_util::stream::iter(0..KEYS)
        .map(|key| {
            let bus = &bus;
            async move { (key, answered(bus, key).await) }
        })
        .buffer_unordered(AT_ONCE);
    let mut answers = Vec::new();
    while let Some(answer) = first.next().await {
        answers.push(answer);
        if answers.len() == KILL_AFTER as usize {
            killed.kill().await;
        }
    }
    drop(first);

    for (key, answer) in &answers {
        assert_eq!(answered(&bus, *key).await["assignment_id"], answer["assignment_id"], "key {key}");
    }
    let stored = bus.stream_info(subjects::STREAM_ASSIGN).await.unwrap().messages;
    assert_eq!(stored, u64::from(KEYS), "one assignment for each key");

    let mut assignments = bus
        .consume(bus::assignments::consumer(subjects::ASSIGN, 1000))
        .await
        .unwrap();
    let (mut in_stream, mut told) = (BTreeSet::new(), BTreeSet::new());
    for (_, answer) in &answers {
        let delivery = tokio::time::timeout(DEADLINE, assignments.next())
            .await
            .unwrap()
            .unwrap();
        let assignment: ExecAssignment = serde_json::from_slice(&delivery.message.payload).unwrap();
        delivery.ack().await.unwrap();
        in_stream.insert(assignment.assignment_id);
        told.insert(answer["assignment_id"].as_str().unwrap().to_string());
    }
    assert_eq!(in_stream, told);
}
