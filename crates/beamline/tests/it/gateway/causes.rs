//! Causes of errors that need more than a request: operators' subjects, a broken store, a provider's own limit. Each
//! returns the codes that were seen.

use super::stage::{PATIENCE, Stage};
use super::{refused, submit};
use crate::process::Process;
use bus::{Headers, Message};
use client::Client;
use serde_json::{Value, json};
use testkit::eventually;
use wire::router::{ErrorResponse, ExecAssignment};
use wire::subjects;

/// Asks the router's admin subjects without a token, and with one of too low a role.
pub async fn to_operators(stage: &Stage, router: &Process) -> Vec<String> {
    let printed = router
        .run(&["operator-token", "--name", "ann", "--role", "viewer"])
        .await;
    assert_eq!(printed.code, Some(0), "{}", printed.stderr);
    let bearer = format!("Bearer {}", printed.stdout.trim());

    let mut seen = Vec::new();
    for (headers, code, status) in [
        (Headers::new(), "unauthorized", 401),
        (Headers::new().with("authorization", bearer.as_str()), "forbidden", 403),
    ] {
        let asked = stage
            .bus
            .request(subjects::ADMIN_DRY_RUN, headers, "{}".into(), PATIENCE);
        let refused: ErrorResponse = serde_json::from_slice(&asked.await.unwrap().payload).unwrap();
        assert_eq!((refused.error.code.as_str(), refused.error.status()), (code, status));
        seen.push(code.to_string());
    }

    let headers = Headers::new().with("authorization", bearer);
    let asked = stage
        .bus
        .request(subjects::ADMIN_BREAKERS, headers, "{}".into(), PATIENCE);
    let answer: Value = serde_json::from_slice(&asked.await.unwrap().payload).unwrap();
    assert_eq!(answer["success"], true, "{answer}");
    seen
}

/// Breaks the entry of an idempotency key on NATS.
pub async fn broken_key(stage: &Stage, client: &Client) -> String {
    bus::streams::declare(&stage.bus).await.unwrap();
    let entry = subjects::idempotency_key("default", "broken");
    let broken = stage.bus.kv_put(subjects::BUCKET_KEYS, &entry, "{".into(), None);
    broken.await.unwrap();
    let error = refused(
        client
            .submit(&submit("echo", json!({"idempotency_key": "broken"})))
            .await,
    );
    assert_eq!((error.code, error.status), (12, Some(500)), "{error:?}");
    error.reason.unwrap()
}

/// Runs a task as a worker whose provider's endpoint asks for a pause.
pub async fn limited_provider(stage: &Stage, client: &Client) -> String {
    let limited = submit("echo", json!({"policy_id": "limited", "push_assignment": true}));
    eventually(PATIENCE, async || client.submit(&limited).await.is_ok()).await;

    let consumer = bus::assignments::consumer(subjects::ASSIGN, 1);
    let mut assignments = stage.bus.consume(consumer).await.unwrap();
    loop {
        let delivery = tokio::time::timeout(PATIENCE, assignments.next())
            .await
            .unwrap()
            .unwrap();
        let assignment: ExecAssignment = serde_json::from_slice(&delivery.message.payload).unwrap();
        delivery.ack().await.unwrap();
        if assignment.executor.provider_id != "limited" {
            continue;
        }
        let result = json!({"version": "1", "assignment_id": assignment.assignment_id,
            "request_id": assignment.request_id, "tenant_id": assignment.tenant_id, "provider_id": "limited",
            "job": {"type": "echo"}, "status": "error", "error_code": "rate_limited", "retry_after_seconds": 600});
        let payload = result.to_string().into();
        let message = Message { subject: subjects::RESULT.into(), payload, ..Message::default() };
        stage.bus.append(message, None).await.unwrap();
        break;
    }

    let error = std::cell::OnceCell::new();
    eventually(PATIENCE, async || {
        let outcome = client.submit(&submit("echo", json!({"policy_id": "limited"}))).await;
        outcome.is_err_and(|refusal| error.set(refused(Err(refusal))).is_ok())
    })
    .await;
    let error = error.into_inner().unwrap();
    assert_eq!((error.code, error.status), (12, Some(429)), "{error:?}");
    assert!(error.retry_after_ms.is_some_and(|ms| (500_000..=600_000).contains(&ms)), "{error:?}");
    error.reason.unwrap()
}
