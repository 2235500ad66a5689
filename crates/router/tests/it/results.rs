//! Results: each is billed once, ends its task and is reported to the circuit breaker.

use crate::{Router, SOON, push, result};
use serde_json::{Value, json};
use wire::subjects;

/// Pushes a task and returns the fields of its assignment that a result needs.
async fn assigned(router: &Router, id: &str) -> Value {
    router.decide(&push(id)).await;
    let task = router.task(id).await;
    json!({"assignment_id": task["task"]["assignment_id"], "request_id": id,
        "executor": {"provider_id": task["task"]["decision"]["provider_id"]}, "job": {"type": "t"}})
}

async fn ended(router: &Router, id: &str, state: &str) {
    testkit::eventually(SOON, || async { router.task(id).await["task"]["state"] == state }).await;
}

/// Waits until the router has consumed every appended result.
async fn settled(router: &Router) {
    testkit::eventually(SOON, || async {
        let info = router.bus.stream_info(subjects::STREAM_RESULT).await.unwrap();
        info.consumers
            .iter()
            .all(|(name, pending)| name != "router" || *pending == 0)
    })
    .await;
}

pub async fn result_is_billed_once_and_ends_the_task(router: Router) {
    let assignment = assigned(&router, "r1").await;
    let mut told = result(&assignment, "success");
    told["trace_id"] = json!("t1");
    told["output"] = json!({"text": "done"});
    // The tenant of the request is billed, whatever tenant the result names.
    told["tenant_id"] = json!("somebody else");
    for _ in 0..3 {
        router.append(subjects::RESULT, told.to_string()).await;
    }

    // The same assignment is reported again in another format with another outcome: only the first result counts.
    let envelope = json!({"version": "v1", "kind": "exec_result", "data": {
        "assignment_id": assignment["assignment_id"], "request_id": "r1", "status": "error", "provider_id": "echo",
        "job_type": "t"}});
    settled(&router).await;
    router.append(subjects::RESULT, envelope.to_string()).await;
    settled(&router).await;
    ended(&router, "r1", "completed").await;

    let task = router.task("r1").await;
    assert_eq!(task["task"]["result"]["output"], json!({"text": "done"}));
    let usage = router.stored(subjects::STREAM_USAGE).await;
    let expected = json!([{"version": "1", "tenant_id": "acme", "provider_id": "echo", "event_type": "t",
        "latency_ms": 12, "cost": 0.5, "status": "success", "trace_id": "t1", "timestamp": usage[0]["timestamp"],
        "assignment_id": assignment["assignment_id"], "request_id": "r1"}]);
    assert_eq!(Value::from(usage), expected);
    let status = router.status(|_| true).await;
    assert_eq!(status["results_by_status"], json!({"success": 1}), "counted once");
}

pub async fn restart_bills_nothing_twice(router: Router) {
    let assignment = assigned(&router, "r1").await;
    let told = result(&assignment, "timeout").to_string();
    router.append(subjects::RESULT, told.clone()).await;
    ended(&router, "r1", "failed").await;
    let router = router.restart().await;
    router.append(subjects::RESULT, told).await;
    settled(&router).await;
    assert_eq!(router.stored(subjects::STREAM_USAGE).await.len(), 1);
    assert_eq!(router.task("r1").await["task"]["state"], "failed");
}

pub async fn result_settles_the_task_of_its_assignment_only(router: Router) {
    router.decide(&push("r1")).await;
    router
        .decide(&crate::changed(push("r1"), json!({"tenant_id": "beta"})))
        .await;
    let of_beta = router.task_of("beta", "r1").await["task"].clone();
    let assignment = json!({"assignment_id": of_beta["assignment_id"], "request_id": "r1",
        "executor": {"provider_id": "echo"}, "job": {"type": "t"}});

    // A v1 worker names no tenant; a result with an unknown assignment id settles no task.
    let mut told = result(&assignment, "success");
    told.as_object_mut().unwrap().remove("tenant_id");
    let mut made_up = result(&assignment, "error");
    made_up["assignment_id"] = json!("made up");
    router.append(subjects::RESULT, made_up.to_string()).await;
    router.append(subjects::RESULT, told.to_string()).await;
    settled(&router).await;

    assert_eq!(router.task_of("beta", "r1").await["task"]["state"], "completed");
    assert_eq!(router.task_of("acme", "r1").await["task"]["state"], "assigned");
    let usage = router.stored(subjects::STREAM_USAGE).await;
    let payer = usage
        .iter()
        .find(|usage| usage["assignment_id"] == of_beta["assignment_id"])
        .unwrap();
    assert_eq!(payer["tenant_id"], "beta");
}

/// The result fits a bus message, but not the task's record, which has further fields.
pub async fn result_too_large_for_its_record_is_billed_and_ends_the_task(router: Router) {
    let assignment = assigned(&router, "r1").await;
    let mut told = result(&assignment, "success");
    told["output"] = json!("");
    let rest = wire::limits::BUS_MESSAGE_MAX - told.to_string().len() - 100;
    told["output"] = json!("x".repeat(rest));
    router.append(subjects::RESULT, told.to_string()).await;

    ended(&router, "r1", "failed").await;
    settled(&router).await;
    let task = router.task("r1").await["task"].clone();
    assert_eq!((&task["result"]["error_code"], &task["result"]["output"]), (&json!("output"), &Value::Null));
    let usage = router.stored(subjects::STREAM_USAGE).await;
    assert_eq!((usage.len(), &usage[0]["status"]), (1, &json!("success")));
}

#[tokio::test]
async fn results_that_arrived_while_no_router_ran_are_recorded_at_the_start() {
    let router = Router::local().await;
    let assignment = assigned(&router, "r1").await;
    router.cancel.cancel();
    router.running.await.unwrap().unwrap();
    let told = result(&assignment, "cancelled").to_string();
    let message = bus::Message {
        subject: subjects::RESULT.into(),
        payload: told.into(),
        ..Default::default()
    };
    for _ in 0..2 {
        router.bus.append(message.clone(), None).await.unwrap();
    }

    drop(router.bus);
    let router = Router::with(router.dir, None).await;
    ended(&router, "r1", "cancelled").await;
    settled(&router).await;
    assert_eq!(router.stored(subjects::STREAM_USAGE).await.len(), 1);
}

pub async fn bad_results_become_dead_letters(router: Router) {
    let good = result(
        &json!({"assignment_id": "a", "request_id": "r", "executor": {"provider_id": "p"}, "job": {"type": "t"}}),
        "success",
    );
    let with = |field: &str, value: Value| {
        let mut bad = good.clone();
        bad[field] = value;
        bad.to_string().into_bytes()
    };
    let bad: Vec<(Vec<u8>, &str)> = vec![
        (b"not json".to_vec(), "not JSON"),
        (b"\xff\xfe".to_vec(), "not JSON"),
        (b"[]".to_vec(), "not an object"),
        (b"{}".to_vec(), "missing field `assignment_id`"),
        (br#"{"kind":"exec_ack","data":{}}"#.to_vec(), "another kind"),
        (with("version", json!("9")), "version is unknown"),
        (with("status", json!("perhaps")), "a value does not fit, expected one of"),
        (with("assignment_id", json!("")), "assignment_id has 0 bytes"),
        (with("request_id", json!("x".repeat(129))), "request_id has 129 bytes"),
        (with("assignment_id", json!("a\0b")), "assignment_id has a control character"),
        (with("trace_id", json!("a\nb")), "trace_id has a control character"),
        (with("tenant_id", json!("a\rb")), "tenant_id has a control character"),
        (with("latency_ms", json!(-1)), "a value does not fit, expected u64"),
    ];

    for (payload, _) in &bad {
        router.append(subjects::RESULT, payload.clone()).await;
    }
    router.append(subjects::RESULT, good.to_string()).await;
    settled(&router).await;
    testkit::eventually(SOON, || async {
        router
            .bus
            .stream_info(subjects::STREAM_UNREADABLE)
            .await
            .unwrap()
            .messages
            == bad.len() as u64
    })
    .await;

    let mut letters = router.stored(subjects::STREAM_UNREADABLE).await;
    for (payload, reason) in &bad {
        let text = String::from_utf8(payload.clone()).unwrap_or("//4=".into());
        let at = letters
            .iter()
            .position(|letter| letter["payload"] == text)
            .expect("its dead letter");
        let letter = letters.remove(at);
        assert!(letter["reason"].as_str().unwrap().contains(reason), "{letter}");
        assert_eq!((&letter["original_subject"], &letter["delivered"]), (&json!(subjects::RESULT), &json!(1)));
        assert_eq!(letter.get("base64").is_some(), text == "//4=");
    }

    let usage = router.stored(subjects::STREAM_USAGE).await;
    assert_eq!(usage.len(), 1, "the valid result after them was billed");
}

#[tokio::test]
async fn failures_open_the_breaker_and_no_provider_is_available() {
    let policy = r#"{"providers": [{"name": "p", "weight": 1}, {"name": "spare", "weight": 0}],
        "circuit_breaker": {"failure_threshold": 3, "timeout_ms": 600000}}"#;
    let router = Router::with_policies(&[("default/default.json", policy)]).await;
    for n in 0..3 {
        let id = format!("r{n}");
        let assignment = assigned(&router, &id).await;
        // The result is sent twice and counts as one failure.
        for _ in 0..2 {
            router
                .append(subjects::RESULT, result(&assignment, "error").to_string())
                .await;
        }
        ended(&router, &id, "failed").await;
        settled(&router).await;
        let (state, failures) = if n < 2 { ("closed", n + 1) } else { ("open", 0) };
        router
            .breaker("p", Some("default/default"), |breaker| {
                breaker["state"] == state && breaker["failures"] == failures
            })
            .await;
    }

    let refused = router.decide(&push("r9")).await;
    let error = json!({"code": "no_provider_available",
        "message": "out of service for now, after failures: p"});
    assert_eq!(refused, json!({"ok": false, "error": error, "context": {"request_id": "r9"}}));
    let known = router.decide(&push("r0")).await;
    assert_eq!(known["ok"], true, "a task pushed earlier still has its answer: {known}");
}

#[tokio::test]
async fn errors_that_the_task_caused_do_not_count_against_the_provider() {
    let policy = r#"{"providers": [{"name": "p", "weight": 1}], "circuit_breaker": {"failure_threshold": 2}}"#;
    let router = Router::with_policies(&[("default/default.json", policy)]).await;
    let codes = ["invalid_task", "exit_status", "output", "spawn_failed", "unknown_provider", "max_deliver"];
    for (n, code) in codes.into_iter().chain(codes).enumerate() {
        let id = format!("r{n}");
        let mut failed = result(&assigned(&router, &id).await, "error");
        failed["error_code"] = json!(code);
        router.append(subjects::RESULT, failed.to_string()).await;
        ended(&router, &id, "failed").await;
    }

    // Outcomes are processed in order: once this one is counted, all earlier ones have been handled.
    let last = result(&assigned(&router, "last").await, "success");
    router.append(subjects::RESULT, last.to_string()).await;
    router
        .breaker("p", None, |breaker| breaker["state"] == "closed" && breaker["calls"] == 1)
        .await;
    assert_eq!(router.decide(&push("r99")).await["ok"], true, "errors caused by tasks do not open the breaker");
}

/// Escaped inside a dead letter, the payload exceeds the message limit of the bus.
#[tokio::test]
async fn dead_letter_that_is_too_large_omits_its_payload() {
    let router = Router::local().await;
    let payload = "\"".repeat(wire::limits::BUS_MESSAGE_MAX - 100);
    router.append(subjects::RESULT, payload.into_bytes()).await;
    testkit::eventually(SOON, || async {
        router
            .bus
            .stream_info(subjects::STREAM_UNREADABLE)
            .await
            .unwrap()
            .messages
            == 1
    })
    .await;

    let letter = router.stored(subjects::STREAM_UNREADABLE).await.remove(0);
    assert_eq!(letter["payload"], "");
    assert!(
        letter["reason"]
            .as_str()
            .unwrap()
            .contains("does not fit a dead letter"),
        "{letter}"
    );
}
