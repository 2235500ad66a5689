//! Load shedding: how the gateway responds to the load that the router reports.

use crate::{Fixture, decision};
use axum::body::{Body, to_bytes};
use axum::http::Request;
use bus::Message;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use testkit::eventually;
use tokio::sync::watch;
use tower::ServiceExt;
use wire::ipc::FrameType;
use wire::subjects;

const PATIENCE: Duration = Duration::from_secs(20);

/// A router that reports the given load status (nothing if it is empty) and counts its decisions.
struct Loaded {
    fixture: Fixture,
    status: watch::Sender<&'static str>,
    decided: Arc<AtomicUsize>,
}

impl Loaded {
    async fn start(first: &'static str) -> Self {
        let fixture = Fixture::start(|config| config.api_key = "k".into()).await;
        let (status, reported) = watch::channel(first);
        let decided = Arc::new(AtomicUsize::new(0));
        let count = decided.clone();
        fixture
            .router(move |request, _| {
                count.fetch_add(1, Relaxed);
                async move { Some(decision(&request)) }
            })
            .await;

        let mut questions = fixture.bus.subscribe(subjects::BACKPRESSURE, None, 64).await.unwrap();
        let mut queries = fixture.bus.subscribe(subjects::GET_DECISION, None, 64).await.unwrap();
        let bus = fixture.bus.clone();
        tokio::spawn(async move {
            loop {
                let (message, answer) = tokio::select! {
                    Some(message) = questions.next() => {
                        let data = json!({"status": *reported.borrow(), "policy": {"retry_after_seconds": 30}});
                        let silent = reported.borrow().is_empty();
                        (message, (!silent).then(|| json!({"success": true, "data": data})))
                    }
                    Some(message) = queries.next() => {
                        let task = json!({"task_id": "t", "state": "running", "tenant_id": ""});
                        (message, Some(json!({"ok": true, "task": task})))
                    }
                };
                if let Some(answer) = answer {
                    let (subject, payload) = (message.reply.unwrap(), answer.to_string().into());
                    bus.publish(Message { subject, payload, ..Message::default() })
                        .await
                        .unwrap();
                }
            }
        });

        Self { fixture, status, decided }
    }

    async fn submit(&self) -> (FrameType, Value) {
        let mut raw = self.fixture.connect().await;
        raw.submit_v1(json!({})).await;
        raw.answer().await
    }

    async fn is_served(&self) -> bool {
        self.submit().await.0 == FrameType::ResponseOk
    }
}

#[tokio::test]
async fn requests_are_shed_until_an_overloaded_router_recovers() {
    let router = Loaded::start("inactive").await;
    for _ in 0..3 {
        assert!(router.is_served().await);
    }

    router.status.send_replace("active");
    eventually(PATIENCE, async || !router.is_served().await).await;

    let before = router.decided.load(Relaxed);
    let (kind, answer) = router.submit().await;
    let error = &answer["error"];
    assert_eq!((kind, &error["code"]), (FrameType::ResponseError, &json!(12)), "{answer}");
    assert_eq!((&error["status"], &error["reason"]), (&json!(429), &json!("backpressure")), "{answer}");
    assert_eq!(error["retry_after_ms"], 30_000, "{answer}");
    assert!(answer["context"]["trace_id"].is_string(), "{answer}");

    let request =
        json!({"version": "1", "request_id": "r", "tenant_id": "default", "task": {"type": "t", "payload": {}}});
    let post = Request::post("/api/v1/routes/decide")
        .header("x-api-key", "k")
        .body(Body::from(request.to_string()));

    let (head, body) = router
        .fixture
        .routes
        .clone()
        .oneshot(post.unwrap())
        .await
        .unwrap()
        .into_parts();
    let body: Value = serde_json::from_slice(&to_bytes(body, 1 << 20).await.unwrap()).unwrap();
    assert_eq!((head.status.as_u16(), head.headers["retry-after"].to_str().unwrap()), (429, "30"));
    assert_eq!((&body["error"]["code"], &body["context"]["request_id"]), (&json!("backpressure"), &json!("r")));
    assert_eq!(router.decided.load(Relaxed), before, "a request reached the overloaded router");

    // Queries are not shed.
    let mut raw = router.fixture.connect().await;
    raw.frame(wire::ipc::Version::V1, FrameType::TaskQuery, r#"{"command":"task_query","task_id":"t"}"#)
        .await;
    assert_eq!(raw.answer().await.0, FrameType::ResponseOk);

    router.status.send_replace("warning");
    eventually(PATIENCE, async || router.is_served().await).await;
}

/// A report that is not renewed expires; an unreachable router is left to the circuit breaker.
#[tokio::test]
async fn requests_are_served_while_the_router_reports_nothing() {
    let router = Loaded::start("").await;
    assert!(router.is_served().await);

    router.status.send_replace("active");
    eventually(PATIENCE, async || !router.is_served().await).await;

    router.status.send_replace("");
    eventually(PATIENCE, async || router.is_served().await).await;

    router.status.send_replace("something new");
    for _ in 0..3 {
        assert!(router.is_served().await);
    }
}
