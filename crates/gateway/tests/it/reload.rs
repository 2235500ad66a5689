//! Settings that change while connections are open and requests are in flight.

use crate::{Fixture, decision};
use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use testkit::eventually;
use tokio::sync::Semaphore;
use tower::ServiceExt;
use wire::ipc::{ErrorCode, FrameType, Version};

const PATIENCE: Duration = Duration::from_secs(20);
const OVERLOADED: u64 = ErrorCode::Overloaded as u64;

fn config(fixture: &Fixture) -> gateway::Config {
    let request_timeout = Duration::from_secs(60);
    gateway::Config {
        socket: fixture.dir.path().join("s"),
        request_timeout,
        ..gateway::Config::default()
    }
}

/// Requests above a lowered limit continue; new ones are refused until the count drops below the limit.
#[tokio::test]
async fn request_limit_can_be_lowered_below_the_number_in_flight_and_raised_again() {
    type Set = fn(&mut gateway::Config, usize);
    let limits: [(&str, Set); 2] = [
        ("over all", |config, limit| config.max_in_flight = limit),
        ("of v2", |config, limit| config.max_in_flight_v2 = limit),
    ];
    for (name, set) in limits {
        let fixture = Fixture::start(|config| config.request_timeout = Duration::from_secs(60)).await;
        let gate = Arc::new(Semaphore::new(0));
        let held = gate.clone();
        fixture
            .router(move |request, _| {
                let held = held.clone();
                async move {
                    held.acquire().await.unwrap().forget();
                    Some(decision(&request))
                }
            })
            .await;

        let limit = |limit: usize| {
            let mut config = config(&fixture);
            set(&mut config, limit);
            fixture.control.reload(config);
        };

        let mut raw = fixture.connect().await;
        for id in 1..=4 {
            raw.submit_v2(id, json!({})).await;
        }
        // The PONG shows that all four are in flight.
        raw.frame(Version::V2 { request_id: 9, deadline_ms: 0 }, FrameType::Ping, "")
            .await;
        assert_eq!(raw.answer().await.0, FrameType::Pong);

        limit(2);
        for id in 5..=6 {
            // With three, then two in flight, the limit is still reached.
            gate.add_permits(1);
            assert_eq!(raw.answer().await.0, FrameType::ResponseOk, "{name}");
            raw.submit_v2(id, json!({})).await;
            assert_eq!(raw.error_code().await, OVERLOADED, "{name}");
        }

        gate.add_permits(1);
        assert_eq!(raw.answer().await.0, FrameType::ResponseOk, "{name}");
        raw.submit_v2(7, json!({})).await;
        raw.submit_v2(8, json!({})).await;
        assert_eq!(raw.error_code().await, OVERLOADED, "{name}: only one slot is free");

        limit(3);
        raw.submit_v2(8, json!({})).await;
        gate.add_permits(3);
        for _ in 0..3 {
            assert_eq!(raw.answer().await.0, FrameType::ResponseOk, "{name}");
        }
    }
}

#[tokio::test]
async fn connections_above_a_lowered_limit_stay_and_new_ones_are_refused() {
    let fixture = Fixture::start(|_| {}).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut raw = fixture.connect().await;
        raw.frame(Version::V1, FrameType::Ping, "").await;
        assert_eq!(raw.answer().await.0, FrameType::Pong);
        open.push(raw);
    }
    fixture
        .control
        .reload(gateway::Config { max_connections: 2, ..config(&fixture) });

    assert_eq!(fixture.connect().await.error_code().await, OVERLOADED);

    for raw in &mut open {
        raw.frame(Version::V1, FrameType::Ping, "").await;
        assert_eq!(raw.answer().await.0, FrameType::Pong);
    }

    open.truncate(1);
    eventually(PATIENCE, async || {
        let mut raw = fixture.connect().await;
        raw.frame(Version::V1, FrameType::Ping, "").await;
        raw.answer().await.0 == FrameType::Pong
    })
    .await;
}

#[tokio::test]
async fn new_timeouts_apply_to_open_connections() {
    let fixture = Fixture::start(|config| config.read_timeout = Duration::from_secs(600)).await;
    let mut raw = fixture.connect().await;
    raw.frame(Version::V1, FrameType::Ping, "").await;
    assert_eq!(raw.answer().await.0, FrameType::Pong);
    fixture
        .control
        .reload(gateway::Config { read_timeout: Duration::from_millis(20), ..config(&fixture) });
    raw.send(&[0]).await;
    assert_eq!(raw.error_code().await, ErrorCode::Timeout as u64, "the frame is incomplete");
}

#[tokio::test]
async fn larger_receive_budget_has_room_for_more_frames() {
    let fixture = Fixture::start(|config| config.receive_budget = 64 * 1024).await;
    fixture.echo_router().await;
    let payload = crate::task(json!({"params": {"long": "x".repeat(60 * 1024)}}));
    let mut bytes = bytes::BytesMut::new();
    wire::ipc::Frame::new(Version::V1, FrameType::TaskSubmit, payload.into_bytes()).encode(&mut bytes);
    // This frame takes most of the budget and is not complete.
    let mut first = fixture.connect().await;
    first.send(&bytes[..40 * 1024]).await;
    fixture
        .control
        .reload(gateway::Config { receive_budget: 128 * 1024, ..config(&fixture) });

    let mut second = fixture.connect().await;
    second.send(&bytes).await;
    assert_eq!(second.answer().await.0, FrameType::ResponseOk);

    first.send(&bytes[40 * 1024..]).await;
    assert_eq!(first.answer().await.0, FrameType::ResponseOk, "the first frame keeps its share of the old budget");
}

#[tokio::test]
async fn new_api_key_replaces_the_old_one() {
    let fixture = Fixture::start(|config| config.api_key = "old".into()).await;
    fixture.echo_router().await;
    fixture
        .control
        .reload(gateway::Config { api_key: "new".into(), ..config(&fixture) });
    for (key, status) in [("old", StatusCode::UNAUTHORIZED), ("new", StatusCode::OK)] {
        let body = json!({"version": "1", "request_id": "r", "tenant_id": "default", "task": {"type": "t"}});
        let request = Request::post("/api/v1/routes/decide")
            .header("x-api-key", key)
            .body(Body::from(body.to_string()));
        assert_eq!(fixture.routes.clone().oneshot(request.unwrap()).await.unwrap().status(), status, "{key}");
    }
}
