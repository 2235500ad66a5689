//! Decisions by policy, and the body of every refusal.

use crate::{Router, SOON, changed, request};
use bus::{Headers, Message};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use wire::subjects;

const TWO: &str = r#"{"version": "7", "providers": [
    {"name": "fast", "weight": 80, "cost": 0.002, "latency_ms": 40, "priority": 60},
    {"name": "big", "weight": 20, "cost": 0.02}],
    "sticky": {"session_key": "user_id"},
    "rules": [{"when": "task.type == 'code' && metadata.lang == 'rust'", "to": "big"}]}"#;
const DEFAULT: &str = r#"{"version": "default", "providers": [{"name": "echo", "weight": 1}]}"#;

pub async fn built_in_policy_serves_without_policies(router: Router) {
    for (task_type, provider) in [("chat", "ops"), ("ops", "ops"), ("anything", "echo")] {
        let answer = router
            .decide(&changed(request("r"), json!({"task": {"type": task_type, "payload": {}}})))
            .await;
        assert_eq!((&answer["ok"], &answer["decision"]["provider_id"]), (&json!(true), &json!(provider)), "{answer}");
        assert_eq!(answer["decision"]["policy_version"], "built-in");
    }
}

pub async fn answer_without_inbox_goes_to_the_reply_subject(router: Router) {
    let mut answers = router.bus.subscribe(subjects::DECIDE_REPLY, None, 8).await.unwrap();
    for (payload, ok) in [(request("r1").to_string(), true), ("{".to_string(), false)] {
        let message = Message {
            subject: subjects::DECIDE.into(),
            payload: payload.into(),
            ..Message::default()
        };
        router.bus.publish(message).await.unwrap();
        let answer = tokio::time::timeout(SOON, answers.next()).await.unwrap().unwrap();
        let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert_eq!(answer["ok"], ok, "{answer}");
    }

    // A query without an inbox is not answered on this subject either: the next message is the test's own empty one.
    let payload = json!({"request_id": "r1"}).to_string().into();
    let message = Message { subject: subjects::GET_DECISION.into(), payload, ..Message::default() };
    router.bus.publish(message).await.unwrap();
    router.task("r1").await;
    router
        .bus
        .publish(Message { subject: subjects::DECIDE_REPLY.into(), ..Message::default() })
        .await
        .unwrap();
    let next = tokio::time::timeout(SOON, answers.next()).await.unwrap().unwrap();
    assert!(next.payload.is_empty(), "{next:?}");
}

#[tokio::test]
async fn decision_has_every_field() {
    let router = Router::with_policies(&[("acme/default.json", TWO)]).await;
    let asked = changed(
        request("r1"),
        json!({"trace_id": "t1", "metadata": {"lang": "rust"}, "task": {"type": "code", "payload": {}}}),
    );
    let expected = json!({"ok": true, "context": {"request_id": "r1", "trace_id": "t1"}, "decision": {
        "provider_id": "big", "priority": 50, "expected_latency_ms": 1000, "expected_cost": 0.02,
        "reason": "best_score", "policy_id": "default", "policy_version": "7", "explanation": ["rule 0 names big"]}});
    assert_eq!(router.decide(&asked).await, expected);
}

#[tokio::test]
async fn weights_share_requests_and_a_session_keeps_its_provider() {
    let router = Router::with_policies(&[("default/default.json", TWO)]).await;
    let (mut drawn, mut pinned) = (BTreeMap::<String, u32>::new(), BTreeMap::<String, String>::new());
    for n in 0..2000 {
        let decision = router.decide(&request(&format!("r{n}"))).await["decision"].take();
        assert_eq!(decision["reason"], "weighted");
        *drawn
            .entry(decision["provider_id"].as_str().unwrap().into())
            .or_default() += 1;
    }
    assert!((1500..1700).contains(&drawn["fast"]), "`fast` has 80 of 100 weights: {drawn:?}");

    for n in 0..300 {
        let user = format!("u{}", n % 30);
        let asked = changed(request(&format!("s{n}")), json!({"metadata": {"user_id": user}}));
        let decision = router.decide(&asked).await["decision"].take();
        assert_eq!((&decision["reason"], &decision["sticky_key"]), (&json!("sticky"), &json!(user)));
        let provider = decision["provider_id"].as_str().unwrap();
        assert_eq!(pinned.entry(user).or_insert(provider.into()), provider);
    }
    assert!(pinned.values().any(|p| p == "fast") && pinned.values().any(|p| p == "big"), "{pinned:?}");
}

#[tokio::test]
async fn same_request_gets_the_same_decision_after_a_restart() {
    let mut router = Router::with_policies(&[("default/default.json", TWO)]).await;
    let mut before = Vec::new();
    for n in 0..50 {
        before.push(router.decide(&request(&format!("r{n}"))).await);
    }
    router = router.restart().await;
    for (n, expected) in before.iter().enumerate() {
        assert_eq!(router.decide(&request(&format!("r{n}"))).await, *expected);
    }
}

#[tokio::test]
async fn headers_beat_the_payload_and_invalid_ones_are_ignored() {
    let router = Router::with_policies(&[("acme/default.json", TWO), ("default/default.json", DEFAULT)]).await;
    let long = "x".repeat(129);
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let parent = format!("00-{trace}-b7ad6b7169203331-01");
    let payload = changed(request("r"), json!({"tenant_id": "other", "trace_id": "from-payload"}));
    for (name, value, version, trace_id) in [
        ("tenant_id", "acme", "7", "from-payload"),
        ("TENANT_ID", "acme", "7", "from-payload"),
        ("tenant_id", "a b", "default", "from-payload"),
        ("trace_id", "from-header", "default", "from-header"),
        ("trace_id", &long, "default", "from-payload"),
        ("traceparent", &parent, "default", "from-payload"),
        ("version", "9", "default", "from-payload"),
    ] {
        let headers = Headers::new().with(name, value);
        let answer = router
            .ask_bytes(subjects::DECIDE, headers, payload.to_string().into())
            .await;
        assert_eq!(answer["decision"]["policy_version"], version, "{name}: {value} → {answer}");
        assert_eq!(answer["context"]["trace_id"], trace_id, "{name}: {value}");
    }

    let (without_span, uppercase) = (format!("00-{trace}-01"), parent.to_uppercase());
    for (parent, expected) in [
        (parent.as_str(), json!(trace)),
        ("00-nonsense-01", Value::Null),
        (&without_span, Value::Null),
        (&uppercase, Value::Null),
    ] {
        let headers = Headers::new().with("traceparent", parent);
        let answer = router
            .ask_bytes(subjects::DECIDE, headers, request("r").to_string().into())
            .await;
        assert_eq!(answer["context"]["trace_id"], expected, "{parent}");
    }
}

fn invalid(intake: &str, message: &str) -> Value {
    json!({"code": "invalid_request", "message": message, "intake_error_code": intake})
}

fn with(fields: Value) -> Value {
    changed(request("r"), fields)
}

/// Checks the complete refusal of a request: its error, and the context with its request id and trace id.
async fn check_refusal(router: &Router, asked: Value, error: Value) {
    let mut context = json!({"request_id": "r"});
    if let Some(trace_id) = asked.get("trace_id") {
        context["trace_id"] = trace_id.clone();
    }

    let answer = router.decide(&asked).await;
    assert_eq!(answer, json!({"ok": false, "error": error, "context": context}), "{asked}");
}

#[tokio::test]
async fn invalid_request_is_refused_with_check_and_field() {
    let router = Router::local().await;
    let long = "x".repeat(129);
    let version = || invalid("VERSION_UNSUPPORTED", "version \"2\" is not served here; version \"1\" is");
    let alone = || invalid("CORRELATION_FIELDS_INVALID", "run_id, flow_id and step_id stand together or not at all");
    let schema = |message: &str| invalid("SCHEMA_VALIDATION_FAILED", message);
    let tenant = || schema("tenant_id must have 1 to 128 of the characters A-Z a-z 0-9 _ . -");

    for (asked, error) in [
        (with(json!({"version": "2"})), version()),
        (json!({"version": "2", "request_id": "r"}), version()),
        (with(json!({"run_id": "x"})), alone()),
        (with(json!({"run_id": "x", "step_id": "y"})), alone()),
        (
            with(json!({"run_id": "x", "flow_id": "", "step_id": "y"})),
            schema("flow_id has 0 bytes; 1 to 128 are taken"),
        ),
        (with(json!({"trace_id": long})), schema("trace_id has 129 bytes; 1 to 128 are taken")),
        (with(json!({"policy_id": ""})), schema("policy_id has 0 bytes; 1 to 128 are taken")),
        (with(json!({"idempotency_key": "k".repeat(257)})), schema("idempotency_key has more than 256 bytes")),
        (
            with(json!({"idempotency_key": "a\nb"})),
            schema("idempotency_key has a control character; ids have none"),
        ),
        (
            with(json!({"task": {"type": "", "payload": {}}})),
            schema("task.type has 0 bytes; 1 to 128 are taken"),
        ),
        (with(json!({"task": {"type": "t"}})), schema("the task has neither payload nor payload_ref")),
        (with(json!({"tenant_id": "a*"})), tenant()),
        (with(json!({"tenant_id": ""})), tenant()),
        (with(json!({"tenant_id": long})), tenant()),
    ] {
        check_refusal(&router, asked, error).await;
    }

    router
        .status(|status| status["errors_by_code"]["invalid_request"] == 14)
        .await;
}

#[tokio::test]
async fn request_that_cannot_be_decided_is_refused_with_the_reason() {
    let router = Router::with_policies(&[
        ("acme/unweighted.json", r#"{"providers": [{"name": "a"}]}"#),
        ("acme/dear.json", r#"{"providers": [{"name": "a", "weight": 1, "cost": 2}]}"#),
    ])
    .await;

    for (fields, code, message) in [
        (json!({"deadline": 1}), "deadline_exceeded", "the request's deadline passed before it was decided"),
        (
            json!({"policy_id": "none"}),
            "policy_not_found",
            "tenant \"acme\" has no policy \"none\", and neither has tenant \"default\"",
        ),
        (
            json!({"policy_id": "unweighted"}),
            "decision_failed",
            "the policy has no provider to draw from: all weights are 0",
        ),
        (
            json!({"policy_id": "dear", "constraints": {"max_cost": 1}}),
            "no_provider_available",
            "no provider can meet the constraints; relax max_latency_ms or max_cost",
        ),
    ] {
        check_refusal(&router, with(fields), json!({"code": code, "message": message})).await;
    }

    router
        .status(|status| status["errors_by_code"]["no_provider_available"] == 1)
        .await;
}

/// Only the codes are checked, because the message comes from the parser.
#[tokio::test]
async fn request_with_missing_or_mistyped_fields_fails_schema_validation() {
    let router = Router::local().await;
    let without = |field: &str| {
        let mut request = request("r");
        request.as_object_mut().unwrap().remove(field);
        request
    };

    for asked in [
        without("version"),
        without("tenant_id"),
        without("task"),
        with(json!({"version": 1})),
        with(json!({"task": "t"})),
        with(json!({"task": {"type": "t", "payload": []}})),
        with(json!({"metadata": []})),
        with(json!({"push_assignment": "yes"})),
        with(json!({"deadline": -1})),
        with(json!({"options": {"deadline_ms": 1.5}})),
    ] {
        let answer = router.decide(&asked).await;
        assert_eq!(answer["error"]["intake_error_code"], "SCHEMA_VALIDATION_FAILED", "{asked} → {answer}");
        assert_eq!(answer["context"]["request_id"], "r");
    }

    router
        .status(|status| status["errors_by_code"]["invalid_request"] == 10)
        .await;
}

/// Programs receive the ids as environment variables, which cannot contain a NUL, so such a task could only fail.
#[tokio::test]
async fn ids_with_control_characters_are_refused_with_their_field() {
    let router = Router::local().await;
    for (field, value) in [
        ("request_id", "a\0b"),
        ("trace_id", "a\nb"),
        ("policy_id", "a\u{7f}"),
        ("idempotency_key", "a\u{85}"),
        ("tenant_id", "a\0"),
    ] {
        let answer = router
            .decide(&changed(request("r"), json!({field: value, "push_assignment": true})))
            .await;
        let error = &answer["error"];
        assert_eq!(
            (&error["code"], &error["intake_error_code"]),
            (&json!("invalid_request"), &json!("SCHEMA_VALIDATION_FAILED")),
            "{field}: {answer}"
        );
        assert!(error["message"].as_str().unwrap().starts_with(field), "{answer}");
    }

    let flow = json!({"run_id": "a", "flow_id": "b", "step_id": "c\td"});
    let refused = router.decide(&changed(request("r"), flow)).await;
    assert_eq!(refused["error"]["message"], "step_id has a control character; ids have none");
    let kind = json!({"task": {"type": "a\0", "payload": {}}});
    let refused = router.decide(&changed(request("r"), kind)).await;
    assert_eq!(refused["error"]["message"], "task.type has a control character; ids have none");
    for subject in [subjects::GET_DECISION, subjects::CANCEL] {
        let refused = router.ask(subject, &json!({"request_id": "a\0b"})).await;
        let error = invalid("SCHEMA_VALIDATION_FAILED", "request_id has a control character; ids have none");
        assert_eq!(refused["error"], error, "{subject}");
    }
    assert_eq!(router.bus.stream_info(subjects::STREAM_ASSIGN).await.unwrap().messages, 0);
}
