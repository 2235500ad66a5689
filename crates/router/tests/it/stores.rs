//! Full stores: new tasks are refused, accepted ones end, and everything goes on when there is room again.

use crate::{Router, SOON, connect_with, push, request, result};
use bus::local::{Durability, Local};
use bus::streams::Sizes;
use bus::{Bus, Consumer, ConsumerConfig};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tempfile::TempDir;
use testkit::NatsServer;
use wire::policy::CircuitBreaker;
use wire::subjects;

/// Runs the case on the local bus and on a real nats-server, with these sizes.
async fn on_both<F: Future<Output = ()>>(sizes: Sizes, case: impl Fn(Router) -> F) {
    let start = async |dir: TempDir, bus: Bus| Router::beside(dir, bus, CircuitBreaker::default()).await;
    let dir = TempDir::new().unwrap();
    let bus = Local::open_with(dir.path(), Durability::Process, sizes.clone())
        .await
        .unwrap();
    case(start(dir, bus).await).await;

    let server = NatsServer::start().await;
    let bus = connect_with(&server, sizes).await;
    case(start(TempDir::new().unwrap(), bus).await).await;
}

async fn consumer(router: &Router, stream: &'static str, name: &str) -> Consumer {
    let config = ConsumerConfig {
        stream,
        name: name.into(),
        filter: None,
        ack_wait: SOON,
        max_ack_pending: 10_000,
        max_in_hand: 10_000,
        from_start: true,
    };
    router.bus.consume(config).await.unwrap()
}

/// Pushes tasks until one is refused; returns the ids of those that were accepted, and the refusal.
async fn until_refused(router: &Router) -> (Vec<String>, Value) {
    let (accepted, count) = (parking_lot::Mutex::new(Vec::new()), AtomicU64::new(0));
    let refusal = parking_lot::Mutex::new(Value::Null);
    testkit::eventually(2 * SOON, || async {
        let id = format!("r{}", count.fetch_add(1, Relaxed));
        let answer = router.decide(&push(&id)).await;
        if answer["ok"] == true {
            accepted.lock().push(id);
            return false;
        }
        *refusal.lock() = answer["error"].clone();
        true
    })
    .await;
    (accepted.into_inner(), refusal.into_inner())
}

fn check_refusal(refusal: &Value, store: &str, advice: &str) {
    let text = refusal["message"].as_str().unwrap();
    assert_eq!(
        (&refusal["code"], &refusal["retry_after_seconds"]),
        (&json!("backpressure"), &json!(5)),
        "{refusal}"
    );
    assert!(text.contains(store) && text.contains(advice), "{refusal}");
}

async fn accepts_again(router: &Router) {
    testkit::eventually(SOON, || async { router.decide(&push("later")).await["ok"] == true }).await;
}

#[tokio::test]
async fn full_assignments_refuse_new_tasks_only() {
    on_both(Sizes { assignments: 20_000, ..Sizes::default() }, async |router| {
        let (accepted, refusal) = until_refused(&router).await;
        check_refusal(&refusal, "ASSIGN", "bus.assignments_size");
        assert!(accepted.len() > 5, "{accepted:?}");
        assert_eq!(router.decide(&request("decision")).await["ok"], true, "a decision stores nothing");
        assert_eq!(router.decide(&push("r0")).await["ok"], true, "an accepted task keeps its answer");

        let mut worker = consumer(&router, subjects::STREAM_ASSIGN, "worker").await;
        for _ in 0..accepted.len() {
            let delivery = tokio::time::timeout(SOON, worker.next()).await.unwrap().unwrap();
            delivery.ack().await.unwrap();
        }
        accepts_again(&router).await;
    })
    .await;
}

#[tokio::test]
async fn results_of_accepted_tasks_have_room_when_new_ones_are_refused() {
    on_both(Sizes { results: 40_000, ..Sizes::default() }, async |router| {
        // Keeps every result, as a reader that is behind does.
        let mut slow = consumer(&router, subjects::STREAM_RESULT, "slow").await;
        let (accepted, refusal) = until_refused(&router).await;
        check_refusal(&refusal, "RESULT", "bus.results_size");

        for id in &accepted {
            let task = router.task(id).await;
            let assignment = json!({"assignment_id": task["task"]["assignment_id"], "request_id": id,
                "executor": {"provider_id": task["task"]["decision"]["provider_id"]}, "job": {"type": "t"}});
            router
                .append(subjects::RESULT, result(&assignment, "success").to_string())
                .await;
        }
        for id in &accepted {
            testkit::eventually(SOON, || async { router.task(id).await["task"]["state"] == "completed" }).await;
        }

        let mut worker = consumer(&router, subjects::STREAM_ASSIGN, "worker").await;
        for _ in 0..accepted.len() {
            tokio::time::timeout(SOON, worker.next())
                .await
                .unwrap()
                .unwrap()
                .ack()
                .await
                .unwrap();
            tokio::time::timeout(SOON, slow.next())
                .await
                .unwrap()
                .unwrap()
                .ack()
                .await
                .unwrap();
        }
        accepts_again(&router).await;
    })
    .await;
}

#[tokio::test]
async fn usage_waits_for_its_named_consumers() {
    let sizes = Sizes {
        usage: 30_000,
        usage_consumers: vec!["billing".into()],
        ..Sizes::default()
    };
    on_both(sizes, async |router| {
        let (accepted, refusal) = until_refused(&router).await;
        check_refusal(&refusal, "USAGE", "bus.usage_consumers");
        for id in &accepted {
            let task = router.task(id).await;
            let assignment = json!({"assignment_id": task["task"]["assignment_id"], "request_id": id,
                "executor": {"provider_id": "echo"}, "job": {"type": "t"}});
            router
                .append(subjects::RESULT, result(&assignment, "success").to_string())
                .await;
        }

        // Nobody has opened the consumer of this name until now.
        let mut billing = consumer(&router, subjects::STREAM_USAGE, "billing").await;
        let mut worker = consumer(&router, subjects::STREAM_ASSIGN, "worker").await;
        for _ in 0..accepted.len() {
            tokio::time::timeout(SOON, billing.next())
                .await
                .unwrap()
                .unwrap()
                .ack()
                .await
                .unwrap();
            tokio::time::timeout(SOON, worker.next())
                .await
                .unwrap()
                .unwrap()
                .ack()
                .await
                .unwrap();
        }
        let count = || async { router.bus.stream_info(subjects::STREAM_USAGE).await.unwrap().messages };
        testkit::eventually(SOON, || async { count().await == 0 }).await;
        accepts_again(&router).await;
    })
    .await;
}

#[tokio::test]
async fn full_bucket_of_keys_refuses_new_keys_and_forgets_none() {
    on_both(Sizes { keys: 4096, ..Sizes::default() }, async |router| {
        let keyed = |asked: Value, key: &str| crate::changed(asked, json!({"idempotency_key": key}));
        let first = router.decide(&keyed(push("first"), "first")).await;
        assert_eq!(first["ok"], true, "{first}");

        let (count, refusal) = (AtomicU64::new(0), parking_lot::Mutex::new(Value::Null));
        testkit::eventually(2 * SOON, || async {
            let id = format!("r{}", count.fetch_add(1, Relaxed));
            let answer = router.decide(&keyed(request(&id), &id)).await;
            *refusal.lock() = answer["error"].clone();
            answer["ok"] == false
        })
        .await;
        let refusal = refusal.into_inner();
        assert_eq!((&refusal["code"], &refusal["retry_after_seconds"]), (&json!("backpressure"), &json!(5)));
        assert!(refusal["message"].as_str().unwrap().contains("bus.keys_size"), "{refusal}");

        assert_eq!(router.decide(&keyed(push("again"), "first")).await, first, "a known key has its answer");
        for asked in [request("r"), push("p")] {
            assert_eq!(router.decide(&asked).await["ok"], true, "requests without a key go on");
        }
    })
    .await;
}
