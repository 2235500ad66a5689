//! Which subject an assignment goes to.

use crate::{Router, SOON, changed, push};
use bus::{Message, Subscription};
use serde_json::{Value, json};
use std::time::Duration;
use wire::subjects::{self, ASSIGN, STREAM_ASSIGN, assign_to};

/// A router notices within this that a provider has no worker: it must have heard nothing for 15 s, and looks every 5 s.
const GONE: Duration = Duration::from_secs(60);

async fn beat(router: &Router, worker: &str, status: &str, subjects: &[&str]) {
    let heartbeat =
        json!({"worker_id": worker, "status": status, "providers": [{"name": "echo"}], "subjects": subjects});
    let message = Message {
        subject: subjects::HEARTBEAT.into(),
        payload: heartbeat.to_string().into(),
        ..Message::default()
    };
    router.bus.publish(message).await.unwrap();
}

async fn add_subject(router: &Router, subject: &str) {
    router.bus.add_subjects(STREAM_ASSIGN, &[subject.into()]).await.unwrap();
}

/// Pushes tasks until one is assigned on this subject.
async fn assigned_on(router: &Router, live: &mut Subscription, prefix: &str, subject: &str) {
    for n in 0..1000 {
        let id = format!("{prefix}{n}");
        let answer = router.decide(&push(&id)).await;
        assert_eq!(answer["ok"], true, "{answer}");
        if *assigned(live, &id).await == *subject {
            return;
        }
    }
    panic!("{prefix}: no assignment on {subject}");
}

/// The subject of the task's assignment.
async fn assigned(live: &mut Subscription, id: &str) -> std::sync::Arc<str> {
    loop {
        let message = tokio::time::timeout(SOON, live.next()).await.unwrap().unwrap();
        let assignment: Value = serde_json::from_slice(&message.payload).unwrap();
        if assignment["request_id"] == id {
            return message.subject;
        }
    }
}

pub async fn assignments_go_where_a_live_worker_takes_them(router: Router) {
    let subject = assign_to("echo").unwrap();
    add_subject(&router, &subject).await;
    let mut live = router.bus.subscribe("caf.exec.assign.>", None, 4096).await.unwrap();

    // A worker of an older version takes from the common subject only.
    beat(&router, "older", "idle", &[]).await;
    assigned_on(&router, &mut live, "older", ASSIGN).await;
    beat(&router, "a", "idle", &[&subject]).await;
    beat(&router, "b", "busy", &[&subject]).await;
    assigned_on(&router, &mut live, "both", &subject).await;
    beat(&router, "a", "draining", &[&subject]).await;
    assigned_on(&router, &mut live, "one", &subject).await;
    beat(&router, "b", "stopped", &[&subject]).await;
    assigned_on(&router, &mut live, "none", ASSIGN).await;
}

pub async fn assignment_goes_to_the_common_subject_while_the_stream_lacks_the_providers(router: Router) {
    let subject = assign_to("echo").unwrap();
    let mut common = router.bus.subscribe(ASSIGN, None, 64).await.unwrap();
    for n in 0..5 {
        beat(&router, "a", "idle", &[&subject]).await;
        let id = format!("r{n}");
        let answer = router.decide(&push(&id)).await;
        assert_eq!(answer["ok"], true, "{answer}");
        assert_eq!(&*assigned(&mut common, &id).await, ASSIGN);
    }
    assert_eq!(router.bus.stream_info(STREAM_ASSIGN).await.unwrap().messages, 5);
}

pub async fn assignment_subject_of_a_request_is_honoured(router: Router) {
    let (own, named) = (assign_to("echo").unwrap(), assign_to("gpu").unwrap());
    for subject in [&own, &named] {
        add_subject(&router, subject).await;
    }
    let mut live = router.bus.subscribe("caf.exec.assign.v1.*", None, 64).await.unwrap();
    let mut common = router.bus.subscribe(ASSIGN, None, 64).await.unwrap();
    beat(&router, "a", "idle", &[&own]).await;

    let asked = |id: &str, subject: &str| changed(push(id), json!({"assignment_subject": subject}));
    assert_eq!(router.decide(&asked("r1", &named)).await["ok"], true);
    assert_eq!(*assigned(&mut live, "r1").await, *named);
    assert_eq!(router.decide(&asked("r2", ASSIGN)).await["ok"], true);
    assert_eq!(&*assigned(&mut common, "r2").await, ASSIGN);

    for bad in [
        "",
        "x",
        "caf.exec.result.v1",
        "caf.exec.assign.v1.dlq",
        "caf.exec.assign.v1.ack",
        "caf.exec.assign.v1.a.b",
        "caf.exec.assign.v1.*",
    ] {
        let answer = router.decide(&asked("bad", bad)).await;
        let message = answer["error"]["message"].as_str().unwrap();
        assert_eq!(answer["error"]["code"], "invalid_request", "{answer}");
        assert!(message.starts_with("assignment_subject must be caf.exec.assign.v1 or"), "{message}");
    }

    let nowhere = router.decide(&asked("r3", "caf.exec.assign.v1.nowhere")).await;
    assert_eq!(nowhere["error"]["code"], "no_provider_available", "{nowhere}");
}

pub async fn assignments_of_a_provider_without_workers_are_moved_to_the_common_subject(router: Router) {
    let subject = assign_to("gone").unwrap();
    add_subject(&router, &subject).await;
    let consumer = router
        .bus
        .consume(bus::assignments::consumer(&subject, 1))
        .await
        .unwrap();
    consumer.close().await;
    let assignment = json!({"version": "1", "assignment_id": "a-r", "request_id": "r", "tenant_id": "acme",
        "executor": {"provider_id": "gone", "channel": "nats"}, "job": {"type": "t", "payload": {}},
        "options": {"deadline_ms": 60_000, "retry": {"max_attempts": 2, "backoff_ms": 200}}, "correlation": {},
        "decision": {"provider_id": "gone", "priority": 50, "expected_latency_ms": 10, "expected_cost": 0.25,
        "reason": "weighted", "policy_id": "default", "policy_version": "1"}});
    router.append(&subject, assignment.to_string()).await;

    let mut common = router.bus.consume(bus::assignments::consumer(ASSIGN, 1)).await.unwrap();
    let moved = tokio::time::timeout(GONE, common.next()).await.unwrap().unwrap();
    assert_eq!(moved.message.payload, assignment.to_string());
    assert!(moved.message.headers.get("x_sent_at_ms").is_some());
    testkit::eventually(SOON, || async { router.bus.stream_info(STREAM_ASSIGN).await.unwrap().messages == 1 }).await;
}

pub async fn subject_of_a_provider_that_is_gone_is_deleted(router: Router) {
    let (gone, live) = (assign_to("gone").unwrap(), assign_to("live").unwrap());
    for subject in [&gone, &live] {
        add_subject(&router, subject).await;
    }
    // As another process has left them: nobody has opened them here.
    let assignments = bus::streams::assignments(router.bus.sizes());
    let consumers = [&gone, &live]
        .map(|subject| bus::assignments::consumer(subject, 1))
        .into();
    router
        .bus
        .declare_stream(bus::StreamConfig { consumers, ..assignments })
        .await
        .unwrap();

    testkit::eventually(GONE, || async {
        beat(&router, "a", "idle", &[&live]).await;
        let info = router.bus.stream_info(STREAM_ASSIGN).await.unwrap();
        let names: Vec<&str> = info.consumers.iter().map(|(name, _)| name.as_str()).collect();
        assert!(names.contains(&"worker-live"), "{names:?}");
        !names.contains(&"worker-gone")
    })
    .await;
    let message = |subject: &str| Message { subject: subject.into(), ..Message::default() };
    let refused = router.bus.append(message(&gone), None).await;
    assert!(matches!(refused, Err(bus::Error::NoStream(_))), "{refused:?}");
    router.bus.append(message(&live), None).await.unwrap();
}
