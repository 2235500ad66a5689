//! The strict contract: required headers, its own reply subject and load report, and its dead letters.

use crate::{Router, SOON, changed, push, request};
use bus::{Headers, Message};
use serde_json::{Value, json};
use wire::subjects;

fn headers() -> Headers {
    Headers::new()
        .with("x_trace_id", "t-1")
        .with("x_tenant_id", "acme")
        .with("x_contract_version", "v2")
}

fn without(name: &str) -> Headers {
    let mut kept = Headers::new();
    for (other, value) in headers().iter().filter(|(other, _)| *other != name) {
        kept.insert(other.to_string(), value);
    }
    kept
}

fn keyed(mut request: Value, key: &str) -> Value {
    request["idempotency_key"] = key.into();
    request
}

async fn ask(router: &Router, headers: Headers, request: &Value) -> Value {
    router
        .ask_bytes(subjects::DECIDE_V2, headers, request.to_string().into())
        .await
}

pub async fn strict_request_is_decided_and_its_answer_repeats_its_headers(router: Router) {
    let asked = keyed(changed(request("r1"), json!({"tenant_id": "other", "trace_id": "payload"})), "k");
    let payload = || asked.to_string().into();
    let answer = router
        .bus
        .request(subjects::DECIDE_V2, headers(), payload(), SOON)
        .await
        .unwrap();
    let body: Value = serde_json::from_slice(&answer.payload).unwrap();
    assert_eq!((&body["ok"], &body["decision"]["provider_id"]), (&json!(true), &json!("echo")), "{body}");
    assert_eq!(body["context"], json!({"request_id": "r1", "trace_id": "t-1"}), "headers beat the payload");
    for (name, value) in headers().iter() {
        assert_eq!(answer.headers.get(name), Some(value));
    }

    // The same request by v1 is the same request: the tenant's key is one.
    let other = keyed(changed(request("r1"), json!({"task": {"type": "t", "payload": {"prompt": "ho"}}})), "k");
    assert_eq!(router.decide(&other).await["error"]["code"], "idempotency_conflict");

    let mut answers = router.bus.subscribe(subjects::DECIDE_V2_REPLY, None, 8).await.unwrap();
    let message = Message {
        subject: subjects::DECIDE_V2.into(),
        reply: None,
        headers: headers(),
        payload: payload(),
    };
    router.bus.publish(message).await.unwrap();
    let answer = tokio::time::timeout(SOON, answers.next()).await.unwrap().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&answer.payload).unwrap(), body);

    let load = router.ask(subjects::BACKPRESSURE_V2, &json!({})).await;
    assert_eq!(
        (&load["data"]["subject"], &load["data"]["status"]),
        (&json!(subjects::DECIDE_V2), &json!("inactive"))
    );
}

#[tokio::test]
async fn request_without_a_required_header_is_refused_with_its_name() {
    let router = Router::local().await;
    let asked = keyed(request("r"), "k");
    let huge = "x".repeat(1 << 20);
    let unfit = |name: &str, what: &str| (format!("the header {name} {what}"), "SCHEMA_VALIDATION_FAILED");
    let missing = |name| unfit(name, "is missing; every request of v2 has it");

    for (name, headers, (message, intake)) in [
        ("x_trace_id", without("x_trace_id"), missing("x_trace_id")),
        ("x_tenant_id", without("x_tenant_id"), missing("x_tenant_id")),
        ("x_contract_version", without("x_contract_version"), missing("x_contract_version")),
        ("x_contract_version", Headers::new(), missing("x_contract_version")),
        ("x_trace_id", without("x_trace_id").with("x_trace_id", ""), missing("x_trace_id")),
        (
            "x_contract_version",
            without("x_contract_version").with("x_contract_version", "v1"),
            ("the header x_contract_version must be \"v2\" here".into(), "VERSION_UNSUPPORTED"),
        ),
        (
            "x_trace_id",
            without("x_trace_id").with("x_trace_id", huge.as_str()),
            unfit("x_trace_id", "has 1048576 bytes; 1 to 128 are taken"),
        ),
        (
            "x_tenant_id",
            without("x_tenant_id").with("x_tenant_id", "a/b"),
            unfit("x_tenant_id", "must have 1 to 128 of the characters A-Z a-z 0-9 _ . -"),
        ),
        (
            "x_sent_at_ms",
            headers().with("x_sent_at_ms", "-1"),
            unfit("x_sent_at_ms", "must be a whole number"),
        ),
        (
            "x_retry_count",
            headers().with("x_retry_count", "1.5"),
            unfit("x_retry_count", "must be a whole number"),
        ),
        (
            "x_producer",
            headers().with("x_producer", ""),
            unfit("x_producer", "has 0 bytes; 1 to 128 are taken"),
        ),
    ] {
        let answer = ask(&router, headers, &asked).await;
        let error = json!({"code": "invalid_request", "message": message, "details": {"header": name},
            "intake_error_code": intake});
        assert_eq!(answer["error"], error, "{name}");
        assert_eq!(answer["context"]["request_id"], "r", "{name}");
    }

    let unknown = headers()
        .with("x_own", "anything")
        .with("x_retry_count", "3")
        .with("x_sent_at_ms", "1");
    assert_eq!(ask(&router, unknown, &asked).await["ok"], true);
}

#[tokio::test]
async fn request_needs_an_idempotency_key_and_a_version_of_v2() {
    let router = Router::local().await;
    for empty in [request("r"), keyed(request("r"), "")] {
        let answer = ask(&router, headers(), &empty).await;
        let message = "idempotency_key is missing; every request of v2 has one";
        assert_eq!(answer["error"]["message"], message, "{answer}");
        assert_eq!(answer["error"]["intake_error_code"], "SCHEMA_VALIDATION_FAILED");
        assert_eq!(router.decide(&empty).await["ok"], true, "v1 needs none");
    }

    for (version, ok) in [("1", true), ("2", true), ("3", false)] {
        let asked = keyed(changed(request("r"), json!({"version": version})), "k");
        let answer = ask(&router, headers(), &asked).await;
        assert_eq!(answer["ok"], ok, "{version}: {answer}");
    }
}

/// A task that came by v2 becomes a dead letter of v2, and only that.
pub async fn dead_letter_of_a_strict_request_goes_to_the_subject_of_v2(router: Router) {
    let mut letters = router.bus.subscribe(subjects::DEAD_LETTER_V2, None, 8).await.unwrap();
    let pushed = ask(&router, headers(), &keyed(push("r1"), "k")).await;
    assert_eq!(pushed["ok"], true, "{pushed}");

    let mut consumer = router
        .bus
        .consume(bus::assignments::consumer(subjects::ASSIGN, 1))
        .await
        .unwrap();
    let delivery = tokio::time::timeout(SOON, consumer.next()).await.unwrap().unwrap();
    let assignment_id = pushed["assignment_id"].as_str().unwrap();
    for (name, value) in headers()
        .with("x_msg_id", assignment_id)
        .with("x_assignment_id", assignment_id)
        .iter()
    {
        assert_eq!(delivery.message.headers.get(name), Some(value), "of the assignment: {name}");
    }

    bus::dead_letter::bury(&router.bus, &delivery, "no more tries")
        .await
        .unwrap();
    let letter = tokio::time::timeout(SOON, letters.next()).await.unwrap().unwrap();
    let expected = headers()
        .with("x_request_id", "r1")
        .with("x_dlq_reason", "no more tries")
        .with("x_original_subject", subjects::ASSIGN);
    for (name, value) in expected.iter() {
        assert_eq!(letter.headers.get(name), Some(value), "of the dead letter: {name}");
    }
    assert!(letter.headers.get("x_msg_id").is_some());

    let stored = router.stored(subjects::STREAM_DLQ).await;
    let [letter] = stored.as_slice() else {
        panic!("{} dead letters", stored.len())
    };
    assert_eq!(
        (&letter["reason"], &letter["original_subject"]),
        (&json!("no more tries"), &json!(subjects::ASSIGN))
    );
}
