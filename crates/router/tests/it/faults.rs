//! Payloads that are invalid or too large, shutdown with requests still queued, and the load report.

use crate::{Router, SOON, changed, push, request};
use bus::Headers;
use serde_json::json;
use std::time::Duration;
use wire::subjects;

#[tokio::test]
async fn bytes_that_are_not_a_request_are_refused() {
    let router = Router::local().await;
    let deep = format!("{{\"metadata\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let nested = changed(request("r"), json!({"metadata": {"a": json!([[[[[[[[1]]]]]]]])}}));
    let twice = request("r").to_string().replacen('{', r#"{"tenant_id":"other","#, 1);
    let huge = changed(request("r"), json!({"metadata": {"a": "x".repeat(wire::limits::DECIDE_MAX)}})).to_string();
    let largest = {
        let empty = changed(request("r"), json!({"metadata": {"a": ""}})).to_string().len();
        changed(request("r"), json!({"metadata": {"a": "x".repeat(wire::limits::DECIDE_MAX - empty)}})).to_string()
    };

    for (name, payload, code) in [
        ("nothing", vec![], Some("SCHEMA_VALIDATION_FAILED")),
        ("half", b"{\"version\":".to_vec(), Some("SCHEMA_VALIDATION_FAILED")),
        ("an array", br#"["1","r","t",{"type":"t","payload":{}}]"#.to_vec(), Some("SCHEMA_VALIDATION_FAILED")),
        ("null", b"null".to_vec(), Some("SCHEMA_VALIDATION_FAILED")),
        ("invalid UTF-8", b"{\"version\":\"\xff\"}".to_vec(), Some("SCHEMA_VALIDATION_FAILED")),
        ("too deep", deep.into_bytes(), Some("SCHEMA_VALIDATION_FAILED")),
        ("a field twice", twice.into_bytes(), Some("SCHEMA_VALIDATION_FAILED")),
        ("a number out of range", b"{\"deadline\":1e999}".to_vec(), Some("SCHEMA_VALIDATION_FAILED")),
        ("trailing bytes", format!("{} x", request("r")).into_bytes(), Some("SCHEMA_VALIDATION_FAILED")),
        ("one byte too many", format!("{largest} ").into_bytes(), Some("PAYLOAD_TOO_LARGE")),
        ("huge", huge.into_bytes(), Some("PAYLOAD_TOO_LARGE")),
        ("the largest", largest.into_bytes(), None),
        ("nested", nested.to_string().into_bytes(), None),
    ] {
        let answer = router.ask_bytes(subjects::DECIDE, Headers::new(), payload).await;
        assert_eq!(answer["error"]["intake_error_code"].as_str(), code, "{name}: {answer}");
        assert_eq!(answer["ok"], code.is_none(), "{name}");
    }

    for subject in [subjects::GET_DECISION, subjects::CANCEL] {
        for payload in ["", "[]", "{}", r#"{"request_id":7}"#] {
            let answer = router.ask_bytes(subject, Headers::new(), payload.into()).await;
            assert_eq!(answer["error"]["code"], "invalid_request", "{subject} {payload}: {answer}");
        }
        let unknown = router.ask(subject, &json!({"request_id": "no such"})).await;
        let error = json!({"code": "not_found", "message": "no task \"no such\" was pushed in the last day"});
        assert_eq!(unknown, json!({"ok": false, "error": error, "context": {"request_id": "no such"}}));
    }
}

/// The request fits the bus, and the assignment, which has the decision, too, does not.
#[tokio::test]
async fn task_that_the_bus_cannot_hold_is_refused_and_leaves_nothing() {
    const PAYLOAD_MAX: usize = 65_536;
    let server = testkit::NatsServer::start_with("max_payload: 64KB").await;
    let router = Router::with(tempfile::TempDir::new().unwrap(), Some(server)).await;
    let empty = changed(push("large"), json!({"metadata": {"a": ""}})).to_string().len();
    let request = changed(push("large"), json!({"metadata": {"a": "x".repeat(PAYLOAD_MAX - empty)}}));

    for _ in 0..2 {
        let answer = router.decide(&request).await;
        assert_eq!(answer["error"]["code"], "invalid_request", "{answer}");
        assert_eq!(answer["error"]["intake_error_code"], "PAYLOAD_TOO_LARGE", "{answer}");
    }
    let task = router.task("large").await;
    assert_eq!(task["error"]["code"], "not_found", "{task}");
    assert_eq!(router.bus.stream_info(subjects::STREAM_ASSIGN).await.unwrap().messages, 0);
    assert_eq!(router.decide(&push("small")).await["ok"], true);
}

#[tokio::test]
async fn queued_requests_are_answered_before_the_router_ends() {
    let router = Router::local().await;
    let asked = (0..200).map(|n| {
        let asked = if n % 2 == 0 {
            push(&format!("r{n}"))
        } else {
            request(&format!("r{n}"))
        };
        router
            .bus
            .request(subjects::DECIDE, Headers::new(), asked.to_string().into(), SOON)
    });
    let mut asked = Box::pin(futures_util::future::join_all(asked));

    // One poll sends the requests; the router, a task on the same single-threaded runtime, has not run yet.
    assert!(futures_util::FutureExt::now_or_never(asked.as_mut()).is_none());
    router.cancel.cancel();
    for answer in asked.await {
        let answer: serde_json::Value = serde_json::from_slice(&answer.unwrap().payload).unwrap();
        assert_eq!(answer["ok"], true, "{answer}");
    }
    tokio::time::timeout(SOON, router.running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();

    let gone = router
        .bus
        .request(subjects::DECIDE, Headers::new(), "{}".into(), Duration::from_secs(1))
        .await;
    assert!(matches!(gone, Err(bus::Error::NoResponders(_))), "{gone:?}");
}

#[tokio::test]
async fn backpressure_status_reports_live_numbers() {
    let router = Router::local().await;
    let load = router.ask(subjects::BACKPRESSURE, &json!({})).await;
    assert_eq!((&load["success"], &load["data"]["status"]), (&json!(true), &json!("inactive")), "{load}");
    assert_eq!(
        load["data"]["thresholds"],
        json!({"queue_overload": 1000, "latency_overload_ms": 5000, "inflight_overload": 500})
    );
    assert_eq!(load["data"]["policy"], json!({"retry_after_seconds": 30, "max_retry_attempts": 3}));

    // Few at a time: as many pushes in flight as the second threshold would refuse further ones.
    for first in (0..1000).step_by(100) {
        let pushes = (first..first + 100).map(|n| {
            let payload = push(&format!("r{n}")).to_string().into();
            router.bus.request(subjects::DECIDE, Headers::new(), payload, SOON)
        });
        for answer in futures_util::future::join_all(pushes).await {
            let answer: serde_json::Value = serde_json::from_slice(&answer.unwrap().payload).unwrap();
            assert_eq!(answer["ok"], true, "{answer}");
        }
    }

    let load = router.ask(subjects::BACKPRESSURE, &json!({})).await;
    assert_eq!(
        (&load["data"]["status"], &load["data"]["metrics"]["pending_messages"]),
        (&json!("warning"), &json!(1000))
    );
    assert_eq!(router.decide(&request("served")).await["ok"], true, "served despite the warning");
}
