//! Pushed tasks: each is assigned once, however often it is requested.

use crate::{Router, SOON, changed, push};
use bus::Headers;
use serde_json::{Value, json};
use wire::subjects;

pub async fn repeated_push_stores_one_task(router: Router) {
    let asked = changed(
        push("r1"),
        json!({"trace_id": "t1", "metadata": {"k": 1}, "options": {"priority": "high", "retry": {"max_attempts": 5, "backoff_ms": 10}}}),
    );
    let at_once = (0..8).map(|_| router.decide(&asked));
    let answers = futures_util::future::join_all(at_once).await;
    for answer in &answers {
        assert_eq!(answer, &answers[0]);
        assert_eq!(answer["ok"], true, "{answer}");
    }

    let again = changed(asked, json!({"trace_id": "another try", "deadline": 99_999_999_999_999_u64}));
    let repeated = router.decide(&again).await;
    assert_eq!(repeated["decision"], answers[0]["decision"]);

    let router = router.restart().await;
    assert_eq!(router.decide(&again).await["decision"], answers[0]["decision"], "same after a restart");
    let stored = router.stored(subjects::STREAM_ASSIGN).await;
    let [assignment] = stored.as_slice() else {
        panic!("{} assignments", stored.len())
    };
    let id = assignment["assignment_id"].as_str().unwrap();
    assert_eq!(id.len(), 36, "a UUID");
    let expected = json!({"version": "1", "assignment_id": id, "request_id": "r1", "tenant_id": "acme",
        "executor": {"provider_id": "echo", "channel": "nats"}, "job": {"type": "t", "payload": {"prompt": "hi"}},
        "options": {"priority": "high", "deadline_ms": 5000, "retry": {"max_attempts": 5, "backoff_ms": 10}},
        "correlation": assignment["correlation"], "decision": answers[0]["decision"], "metadata": {"k": 1}});
    assert_eq!(*assignment, expected);

    let task = json!({"ok": true, "task": {"task_id": "r1", "state": "assigned", "decision": answers[0]["decision"],
        "assignment_id": id, "tenant_id": "acme"}});
    assert_eq!(router.task("r1").await, task);
}

pub async fn same_id_with_another_body_is_a_conflict(router: Router) {
    let first = router.decide(&push("r1")).await;
    let message = "a task of this request_id with another body exists; choose another request_id";
    let conflict = json!({"ok": false, "error": {"code": "idempotency_conflict", "message": message},
        "context": {"request_id": "r1"}});
    let other = json!({"task": {"type": "t", "payload": {"prompt": "ho"}}});
    assert_eq!(router.decide(&changed(push("r1"), other)).await, conflict);
    assert_eq!(router.task("r1").await["task"]["decision"], first["decision"]);
    assert_eq!(router.bus.stream_info(subjects::STREAM_ASSIGN).await.unwrap().messages, 1);
}

pub async fn same_id_of_two_tenants_is_two_tasks(router: Router) {
    let mut cancels = router.bus.subscribe(subjects::CONTROL_CANCEL, None, 8).await.unwrap();
    let of_beta = json!({"tenant_id": "beta", "task": {"type": "t", "payload": {"prompt": "ho"}}});
    let (acme, beta) = (router.decide(&push("r1")).await, router.decide(&changed(push("r1"), of_beta)).await);
    assert_eq!((&acme["ok"], &beta["ok"]), (&json!(true), &json!(true)), "{beta}");
    assert_ne!(acme["assignment_id"], beta["assignment_id"]);
    for (tenant, answer) in [("acme", &acme), ("beta", &beta)] {
        let task = router.task_of(tenant, "r1").await["task"].clone();
        assert_eq!((&task["tenant_id"], &task["assignment_id"]), (&json!(tenant), &answer["assignment_id"]));
    }

    // The header takes precedence over the payload. Without either, the tenant is `default`, which has no such task.
    let asked = br#"{"request_id":"r1","tenant_id":"beta"}"#.to_vec();
    let headers = Headers::new().with("tenant_id", "acme");
    let answer = router.ask_bytes(subjects::GET_DECISION, headers, asked).await;
    assert_eq!(answer["task"]["tenant_id"], "acme");
    for subject in [subjects::GET_DECISION, subjects::CANCEL] {
        let unnamed = router.ask(subject, &json!({"request_id": "r1"})).await;
        let stranger = router
            .ask(subject, &json!({"request_id": "r1", "tenant_id": "stranger"}))
            .await;
        let error = json!({"code": "not_found", "message": "no task \"r1\" was pushed in the last day"});
        let unknown = json!({"ok": false, "error": error, "context": {"request_id": "r1"}});
        assert_eq!((&unnamed, &stranger), (&unknown, &unknown), "{subject}");
        let unfit = router
            .ask(subject, &json!({"request_id": "r1", "tenant_id": "a/b"}))
            .await;
        assert_eq!(unfit["error"]["code"], "invalid_request", "{unfit}");
    }

    // A cancel stops only the task of its own tenant.
    assert_eq!(router.cancel_of("beta", "r1").await["task"]["state"], "cancelled");
    assert_eq!(router.task_of("acme", "r1").await["task"]["state"], "assigned");
    let told = tokio::time::timeout(SOON, cancels.next()).await.unwrap().unwrap();
    let told: Value = serde_json::from_slice(&told.payload).unwrap();
    assert_eq!(told["assignment_id"], beta["assignment_id"], "the cancel message names the task of `beta`");
}

pub async fn record_of_the_previous_version_is_found_by_its_own_tenant(router: Router) {
    let answer = router.decide(&push("new")).await;
    let (bytes, _) = router
        .bus
        .kv_get("TASKS", "acme/new")
        .await
        .unwrap()
        .expect("a record by tenant and id");
    let mut record: Value = serde_json::from_slice(&bytes).unwrap();
    (record["task_id"], record["assignment_id"]) = (json!("old"), json!("a-old"));
    router
        .bus
        .kv_put("TASKS", "old", record.to_string().into(), Some(0))
        .await
        .unwrap();

    assert_eq!(router.task_of("acme", "old").await["task"]["decision"], answer["decision"]);
    for tenant in ["beta", "default"] {
        assert_eq!(router.task_of(tenant, "old").await["error"]["code"], "not_found");
        assert_eq!(router.cancel_of(tenant, "old").await["error"]["code"], "not_found");
    }

    // A key in the current format is not accepted as a request id of the previous version.
    assert_eq!(router.task_of("acme", "acme/new").await["error"]["code"], "not_found");

    // The result of such a record need not name the tenant.
    let mut told = crate::result(
        &json!({"assignment_id": "a-old", "request_id": "old",
        "executor": {"provider_id": "echo"}, "job": {"type": "t"}}),
        "success",
    );
    told.as_object_mut().unwrap().remove("tenant_id");
    router.append(subjects::RESULT, told.to_string()).await;
    testkit::eventually(SOON, || async { router.task("old").await["task"]["state"] == "completed" }).await;
}

pub async fn cancelled_task_stays_cancelled(router: Router) {
    let mut cancels = router.bus.subscribe(subjects::CONTROL_CANCEL, None, 8).await.unwrap();
    router.decide(&push("r1")).await;
    for _ in 0..2 {
        let answer = router.cancel_of("acme", "r1").await;
        assert_eq!((&answer["ok"], &answer["task"]["state"]), (&json!(true), &json!("cancelled")), "{answer}");
        let told = tokio::time::timeout(SOON, cancels.next()).await.unwrap().unwrap();
        let told: Value = serde_json::from_slice(&told.payload).unwrap();
        let assignment_id = &answer["task"]["assignment_id"];
        assert_eq!(told, json!({"request_id": "r1", "tenant_id": "acme", "assignment_id": assignment_id}));
    }

    // A worker finished before the cancel reached it: its result is kept and the task stays cancelled.
    let assignment = router.stored(subjects::STREAM_ASSIGN).await.remove(0);
    router
        .append(subjects::RESULT, crate::result(&assignment, "success").to_string())
        .await;
    testkit::eventually(SOON, || async { router.task("r1").await["task"]["result"]["status"] == "success" }).await;
    assert_eq!(router.task("r1").await["task"]["state"], "cancelled");
}

#[tokio::test]
async fn ended_task_cannot_be_cancelled() {
    let router = Router::local().await;
    let mut cancels = router.bus.subscribe(subjects::CONTROL_CANCEL, None, 8).await.unwrap();
    router.decide(&push("r1")).await;
    let assignment = router.stored(subjects::STREAM_ASSIGN).await.remove(0);
    router
        .append(subjects::RESULT, crate::result(&assignment, "success").to_string())
        .await;
    testkit::eventually(SOON, || async { router.task("r1").await["task"]["state"] == "completed" }).await;

    let answer = router.cancel_of("acme", "r1").await;
    assert_eq!(answer["task"]["state"], "completed");
    router.decide(&push("r2")).await;
    router.cancel_of("acme", "r2").await;
    let told = tokio::time::timeout(SOON, cancels.next()).await.unwrap().unwrap();
    let told: Value = serde_json::from_slice(&told.payload).unwrap();
    assert_eq!(told["request_id"], "r2", "no cancel message was sent for r1");
}

#[tokio::test]
async fn default_deadline_follows_the_expected_latency() {
    let policy = |ms: u64| json!({"providers": [{"name": "p", "weight": 1, "latency_ms": ms}]}).to_string();
    let router = Router::with_policies(&[
        ("default/quick.json", &policy(10)),
        ("default/slow.json", &policy(3000)),
        ("default/endless.json", &policy(1_000_000)),
    ])
    .await;
    for (n, (name, options, expected)) in [
        ("quick", json!({}), 5000),
        ("slow", json!({}), 15_000),
        ("endless", json!({}), 60_000),
        ("quick", json!({"deadline_ms": 77}), 77),
    ]
    .into_iter()
    .enumerate()
    {
        let mut live = router.bus.subscribe(subjects::ASSIGN, None, 8).await.unwrap();
        router
            .decide(&changed(push(&format!("r{n}")), json!({"policy_id": name, "options": options})))
            .await;
        let assignment = tokio::time::timeout(SOON, live.next()).await.unwrap().unwrap();
        let assignment: Value = serde_json::from_slice(&assignment.payload).unwrap();
        assert_eq!(assignment["options"]["deadline_ms"], expected, "{name}");
    }
}

#[tokio::test]
async fn concurrent_pushes_of_one_id_are_one_task() {
    let router = Router::local().await;
    let asked = (0..40).map(|n| {
        let asked = changed(push("r1"), json!({"task": {"type": "t", "payload": {"prompt": n % 4}}}));
        router.ask_bytes(subjects::DECIDE, Headers::new(), asked.to_string().into_bytes())
    });
    let answers = futures_util::future::join_all(asked).await;

    let served = answers.iter().filter(|answer| answer["ok"] == true).count();
    assert_eq!(served, 10, "one of the four bodies won");
    assert!(
        answers
            .iter()
            .filter(|a| a["ok"] == false)
            .all(|a| a["error"]["code"] == "idempotency_conflict")
    );
    assert_eq!(router.bus.stream_info(subjects::STREAM_ASSIGN).await.unwrap().messages, 1);
}
