//! What a worker decides about one delivery.

use super::*;
use crate::outages::Outages;
use crate::{Bound, Config};
use bus::local::Local;
use bus::{Bus, Message};
use serde_json::json;
use tokio::sync::watch;

const HOUR_MS: u64 = 3_600_000;

/// A worker on the embedded bus that takes nothing by itself.
struct Place {
    worker: Arc<Worker>,
    bus: Bus,
    _dir: tempfile::TempDir,
}

impl Place {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bus = Local::open(dir.path()).await.unwrap();
        let Bound { worker, assignments, .. } = crate::bind(Config::default(), bus.clone()).await.unwrap();
        for consumer in assignments {
            consumer.close().await;
        }
        Self { worker, bus, _dir: dir }
    }

    /// The first delivery of an assignment of a minute whose task has this state.
    async fn deliver(&self, id: &str, state: &str) -> (Delivery, ExecAssignment) {
        let assignment_id = format!("a-{id}");
        let result = (state == "completed").then(|| {
            json!({"version": "1", "assignment_id": assignment_id, "request_id": id, "status": "success",
                "provider_id": "echo", "job": {"type": "t"}})
        });
        let mut task = json!({"task_id": id, "tenant_id": "acme", "state": state, "assignment_id": assignment_id});
        if let Some(result) = result {
            task["result"] = result;
        }
        let task = serde_json::from_value(task).unwrap();
        self.bus.write(vec![bus::tasks::create(&task)]).await.unwrap();

        let assignment = json!({"version": "1", "assignment_id": assignment_id, "request_id": id, "tenant_id": "acme",
            "executor": {"provider_id": "echo", "channel": "nats"}, "job": {"type": "t", "payload": {}},
            "options": {"deadline_ms": 60_000, "retry": {"max_attempts": 2, "backoff_ms": 200}}, "correlation": {},
            "decision": {"provider_id": "echo", "priority": 50, "expected_latency_ms": 10, "expected_cost": 0.25,
            "reason": "weighted", "policy_id": "default", "policy_version": "1"}});
        let message = Message {
            subject: subjects::ASSIGN.into(),
            payload: assignment.to_string().into(),
            ..Message::default()
        };
        self.bus.append(message, None).await.unwrap();
        let config = bus::assignments::consumer(subjects::ASSIGN, 1);
        let delivery = self.bus.consume(config).await.unwrap().next().await.unwrap();
        assert_eq!(delivery.delivered, 1);
        let assignment = read(&delivery.message.payload).unwrap();
        (delivery, assignment)
    }

    async fn count(&self, stream: &str) -> u64 {
        self.bus.stream_info(stream).await.unwrap().messages
    }
}

fn name(begin: &Begin) -> &'static str {
    match begin {
        Begin::Run => "run",
        Begin::Cancelled => "cancelled",
        Begin::Done => "done",
        Begin::Elsewhere(ACK_WAIT) => "elsewhere, until its ack wait is over",
        Begin::Elsewhere(AFTER_OUTAGE) => "elsewhere, for a moment",
        Begin::Elsewhere(_) => "elsewhere",
    }
}

#[tokio::test]
async fn first_delivery_of_a_running_task_is_left_to_the_worker_that_has_it() {
    let place = Place::new().await;
    for (state, is_first, expected) in [
        ("assigned", true, "run"),
        ("running", true, "elsewhere, until its ack wait is over"),
        // It is this worker that has it.
        ("running", false, "run"),
        ("cancelled", true, "cancelled"),
        ("completed", true, "done"),
    ] {
        let (delivery, assignment) = place.deliver(&format!("{state}-{is_first}"), state).await;
        let begin = begin(&place.worker, &delivery, &assignment, is_first).await.unwrap();
        assert_eq!(name(&begin), expected, "{state} {is_first}");
        delivery.ack().await.unwrap();
    }

    let (delivery, _) = place.deliver("r", "running").await;
    handle(&place.worker, delivery, &CancellationToken::new())
        .await
        .unwrap();
    assert_eq!((place.count(subjects::STREAM_ASSIGN).await, place.count(subjects::STREAM_RESULT).await), (1, 0));
}

#[tokio::test]
async fn delivery_from_before_an_outage_is_not_run_at_once() {
    let mut place = Place::new().await;
    let interruptions = watch::Sender::new(0);
    let worker = Arc::get_mut(&mut place.worker).expect("nobody else has the worker");
    worker.outages = Outages::new(interruptions.subscribe());

    let (before, assignment) = place.deliver("before", "assigned").await;
    interruptions.send_replace(1);
    place.worker.clock.set(before.stored_ms);
    let begun = begin(&place.worker, &before, &assignment, true).await.unwrap();
    assert_eq!(name(&begun), "elsewhere, for a moment");
    before.ack().await.unwrap();

    testkit::eventually(Duration::from_secs(15), async || bus::clock::unix_ms() > before.stored_ms + 5).await;
    let (after, assignment) = place.deliver("after", "assigned").await;
    let begun = begin(&place.worker, &after, &assignment, true).await.unwrap();
    assert_eq!(name(&begun), "run");
}

/// The worker has read the stream's clock, which has been set since: back, so that new assignments look an hour old, or
/// forward, so that they come from the future.
#[tokio::test]
async fn assignment_runs_although_the_clock_of_its_stream_was_set() {
    let place = Place::new().await;
    let now = bus::clock::unix_ms();
    for (n, read_ms) in [now + HOUR_MS, now - HOUR_MS].into_iter().enumerate() {
        place.worker.clock.set(read_ms);
        let (delivery, _) = place.deliver(&format!("r{n}"), "assigned").await;
        handle(&place.worker, delivery, &CancellationToken::new())
            .await
            .unwrap();
        assert_eq!(place.count(subjects::STREAM_ASSIGN).await, 0);
    }
    let config = bus::ConsumerConfig {
        stream: subjects::STREAM_RESULT,
        name: "router".into(),
        filter: None,
        ..bus::assignments::consumer(subjects::ASSIGN, 10)
    };
    let mut results = place.bus.consume(config).await.unwrap();
    for _ in 0..2 {
        let result = results.next().await.unwrap();
        let result = wire::router::ExecResult::decode(&result.message.payload).unwrap();
        assert_eq!(result.status, wire::router::ResultStatus::Success, "{result:?}");
    }
}
