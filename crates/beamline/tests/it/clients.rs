//! Clients that do not give up: they repeat a request until a router has accepted it, or until they have its result.

use crate::ledger::Ledger;
use bus::{Bus, Headers};
use client::Client;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::subjects;

/// How long one attempt may take.
const ATTEMPT_MAX: Duration = Duration::from_secs(3);
/// Longer than the 30 s after which a stream delivers again what a dead process had taken, twice over.
const PATIENCE: Duration = Duration::from_secs(90);
const PAUSE: Duration = Duration::from_millis(20);
/// The deadline of each task, longer than any outage here.
const DEADLINE_MS: u64 = 300_000;

/// Pushes tasks over the bus, one after another, until cancelled; every one is accepted in the end.
pub async fn decide(bus: Bus, name: String, kinds: &[&str], ledger: &Ledger, cancel: CancellationToken) {
    for n in 0_usize.. {
        if cancel.is_cancelled() {
            return;
        }
        let request_id = format!("{name}-{n}");
        let request = json!({
            "version": "1", "request_id": request_id, "tenant_id": "default", "push_assignment": true,
            "task": {"type": kinds[n % kinds.len()], "payload": {"prompt": request_id}}, "options": {"deadline_ms": DEADLINE_MS},
        });
        let end = Instant::now() + PATIENCE;
        while !is_accepted(&bus, &request).await {
            assert!(Instant::now() < end, "{request_id} was not accepted");
            tokio::time::sleep(PAUSE).await;
        }
        ledger.accepted(&request_id);
        tokio::time::sleep(PAUSE).await;
    }
}

async fn is_accepted(bus: &Bus, request: &Value) -> bool {
    let payload = request.to_string().into();
    let Ok(answer) = bus
        .request(subjects::DECIDE, Headers::new(), payload, ATTEMPT_MAX)
        .await
    else {
        return false;
    };
    let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
    let code = answer["error"]["code"].as_str().unwrap_or_default();
    assert!(answer["ok"] == true || ["backpressure", "unavailable"].contains(&code), "{answer}");
    answer["ok"] == true
}

/// Submits tasks to gateways, one after another, until cancelled; every one gets its result in the end.
pub async fn submit(sockets: Vec<PathBuf>, name: String, kinds: &[&str], ledger: &Ledger, cancel: CancellationToken) {
    let (mut connection, mut attempts) = (None, 0);
    for n in 0_usize.. {
        if cancel.is_cancelled() {
            return;
        }
        let request_id = format!("{name}-{n}");
        let submit = json!({
            "command": "task_submit", "task_type": kinds[n % kinds.len()], "request_id": request_id, "wait": "result",
            "timeout_ms": DEADLINE_MS, "params": {"prompt": request_id},
        });
        let end = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < end, "{request_id} got no result");
            if connection.is_none() {
                attempts += 1;
                connection = Client::connect(&sockets[attempts % sockets.len()]).await.ok();
            }
            if let Some(client) = &connection {
                match client.submit(&submit).await {
                    Ok(answer) => break ledger.answered(&request_id, answer),
                    Err(client::Error::Closed) => connection = None,
                    Err(client::Error::Refused(refusal)) if is_passing(&refusal) => {}
                    Err(error) => panic!("{request_id}: {error}"),
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Whether a later attempt may be accepted: the router is away, busy or late.
fn is_passing(refusal: &wire::ipc::ErrorPayload) -> bool {
    let error = &refusal.error;
    [5, 6, 10, 11].contains(&error.code) || (error.code == 12 && matches!(error.status, Some(429 | 503 | 504)))
}
