//! Access to the router: every error that the router may return, and the circuit breaker.

use crate::{Fixture, decision};
use bus::Message;
use gateway::BreakerConfig;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use testkit::eventually;
use wire::ipc::{FrameType, Version};
use wire::router::RouterCode;
use wire::subjects;

const PATIENCE: Duration = Duration::from_secs(10);

async fn submit(fixture: &Fixture, fields: Value) -> (FrameType, Value) {
    let mut raw = fixture.connect().await;
    raw.submit_v1(fields).await;
    raw.answer().await
}

async fn breaker(fixture: &Fixture) -> String {
    let mut raw = fixture.connect().await;
    raw.frame(Version::V1, FrameType::Capabilities, "").await;
    raw.answer().await.1["breaker"].as_str().unwrap().to_string()
}

fn refusal(code: &str) -> Value {
    let mut error = json!({"code": code, "message": format!("this is {code}"), "details": {"field": "x"}});
    if code == "backpressure" {
        error["retry_after_seconds"] = json!(30);
    }
    json!({"ok": false, "error": error, "context": {"request_id": "r"}})
}

/// A scripted router returns every row of the error table; some rows cannot be provoked in a real router.
#[tokio::test]
async fn every_router_error_reaches_the_client_unchanged() {
    let fixture = Fixture::start(|config| config.request_timeout = Duration::from_secs(2)).await;
    fixture
        .router(|request, _| async move { Some(refusal(request["task"]["type"].as_str().unwrap())) })
        .await;
    for known in RouterCode::KNOWN {
        // These two count against the breaker, which has its own tests.
        if matches!(known, RouterCode::Internal | RouterCode::Unavailable) {
            continue;
        }

        let (code, status) = (known.as_str(), known.status());
        let (kind, answer) = submit(&fixture, json!({"task_type": code})).await;
        assert_eq!(kind, FrameType::ResponseError);
        let error = &answer["error"];
        assert_eq!((&error["code"], &error["status"], &error["reason"]), (&json!(12), &json!(status), &json!(code)));
        assert_eq!((&error["message"], &error["details"]), (&json!(format!("this is {code}")), &json!({"field": "x"})));
        let retry = if code == "backpressure" {
            json!(30_000)
        } else {
            Value::Null
        };
        assert_eq!(error["retry_after_ms"], retry, "{code}");
        assert!(answer["context"]["trace_id"].is_string(), "{answer}");
    }
}

#[tokio::test]
async fn missing_router_is_reported_at_once_and_a_started_one_is_used() {
    let fixture = Fixture::start(|_| {}).await;
    let (_, answer) = submit(&fixture, json!({"timeout_ms": 60_000})).await;
    assert_eq!(answer["error"]["code"], 11, "the refusal does not wait for the deadline: {answer}");

    // The breaker reports half open once its open time has passed, even without requests.
    eventually(PATIENCE, async || breaker(&fixture).await == "half_open").await;

    let (_, answer) = submit(&fixture, json!({})).await;
    assert_eq!(answer["error"]["code"], 11);
    assert!(answer["error"]["retry_after_ms"].as_u64().unwrap() > 0, "{answer}");

    fixture
        .router(|request, _| async move { Some(decision(&request)) })
        .await;
    eventually(PATIENCE, async || submit(&fixture, json!({})).await.0 == FrameType::ResponseOk).await;
    eventually(PATIENCE, async || {
        submit(&fixture, json!({})).await;
        breaker(&fixture).await == "closed"
    })
    .await;
}

#[tokio::test]
async fn refusal_without_a_router_carries_the_breakers_retry_time() {
    let fixture = Fixture::start(|config| config.breaker.open_for = Duration::from_secs(3600)).await;
    for _ in 0..2 {
        let (_, answer) = submit(&fixture, json!({})).await;
        let retry_after_ms = answer["error"]["retry_after_ms"].as_u64().unwrap();
        assert!(retry_after_ms > 1_000_000, "{answer}");
    }
}

#[tokio::test]
async fn silent_router_opens_the_breaker() {
    let asked = Arc::new(AtomicUsize::new(0));
    let fixture = Fixture::start(|config| {
        config.request_timeout = Duration::from_millis(500);
        config.breaker = BreakerConfig { open_for: Duration::from_secs(60), ..BreakerConfig::default() };
    })
    .await;

    let count = asked.clone();
    fixture
        .router(move |_, _| {
            count.fetch_add(1, Relaxed);
            async { None }
        })
        .await;

    for _ in 0..5 {
        assert_eq!(submit(&fixture, json!({})).await.1["error"]["code"], 5);
    }
    for _ in 0..20 {
        assert_eq!(submit(&fixture, json!({})).await.1["error"]["code"], 11);
    }

    assert_eq!(asked.load(Relaxed), 5, "an open breaker lets no request through");
    assert_eq!(breaker(&fixture).await, "open");
}

#[tokio::test]
async fn timeouts_of_very_short_deadlines_do_not_open_the_breaker() {
    let fixture = Fixture::start(|_| {}).await;
    fixture
        .router(|request, _| async move {
            if request["task"]["type"] == "slow" {
                None
            } else {
                Some(decision(&request))
            }
        })
        .await;

    for _ in 0..30 {
        assert_eq!(submit(&fixture, json!({"task_type": "slow", "timeout_ms": 1})).await.1["error"]["code"], 5);
    }
    assert_eq!(breaker(&fixture).await, "closed");
}

#[tokio::test]
async fn backpressure_of_the_router_does_not_open_the_breaker() {
    let fixture = Fixture::start(|_| {}).await;
    fixture.router(|_, _| async { Some(refusal("backpressure")) }).await;

    for _ in 0..30 {
        assert_eq!(submit(&fixture, json!({})).await.1["error"]["status"], 429);
    }
    assert_eq!(breaker(&fixture).await, "closed");
}

#[tokio::test]
async fn request_is_retried_after_the_router_was_unavailable() {
    let fixture = Fixture::start(|_| {}).await;
    let asked = Arc::new(AtomicUsize::new(0));

    let count = asked.clone();
    fixture
        .router(move |request, _| {
            let first = count.fetch_add(1, Relaxed) == 0;
            async move {
                Some(if first {
                    refusal("unavailable")
                } else {
                    decision(&request)
                })
            }
        })
        .await;
    assert_eq!(submit(&fixture, json!({})).await.0, FrameType::ResponseOk);
    assert_eq!(asked.load(Relaxed), 2);
}

#[tokio::test]
async fn failing_queries_open_no_breaker_and_leave_the_retries_to_decisions() {
    let fixture = Fixture::start(|config| {
        config.request_timeout = Duration::from_millis(600);
        config.breaker = BreakerConfig { consecutive_failures: 2, ..BreakerConfig::default() };
    })
    .await;
    fixture.echo_router().await;
    // Every second query gets no answer, the others an error that is worth a retry.
    let mut queries = fixture.bus.subscribe(subjects::GET_DECISION, None, 4096).await.unwrap();
    let bus = fixture.bus.clone();
    tokio::spawn(async move {
        let error = json!({"ok": false, "error": {"code": "unavailable", "message": "no"}, "context": {}});
        for n in 0.. {
            let Some(query) = queries.next().await else { return };
            if n % 2 == 0 {
                let (subject, payload) = (query.reply.unwrap(), error.to_string().into());
                bus.publish(Message { subject, payload, ..Message::default() })
                    .await
                    .unwrap();
            }
        }
    });

    let mut raw = fixture.connect().await;
    for request_id in 0..50 {
        let version = Version::V2 { request_id, deadline_ms: 0 };
        raw.frame(version, FrameType::TaskQuery, r#"{"command":"task_query","task_id":"t"}"#)
            .await;
    }
    for _ in 0..50 {
        assert_eq!(raw.answer().await.0, FrameType::ResponseError);
    }
    assert_eq!(breaker(&fixture).await, "closed");
    raw.submit_v1(json!({})).await;
    assert_eq!(raw.answer().await.0, FrameType::ResponseOk);
}
