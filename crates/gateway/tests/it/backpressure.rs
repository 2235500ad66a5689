//! Limits on requests in flight, per connection and in total, and the refusal of requests beyond them.

use crate::{Fixture, Raw, decision};
use axum::body::{Body, to_bytes};
use axum::http::Request;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use testkit::eventually;
use tokio::sync::Semaphore;
use tower::ServiceExt;
use wire::ipc::{FrameType, Version};

const PATIENCE: Duration = Duration::from_secs(20);
const V2: fn(u64) -> Version = |request_id| Version::V2 { request_id, deadline_ms: 60_000 };

/// A router that holds every reply until the gate opens for it.
struct Held {
    fixture: Fixture,
    gate: Arc<Semaphore>,
    arrived: Arc<AtomicUsize>,
}

impl Held {
    async fn start(change: impl FnOnce(&mut gateway::Config)) -> Self {
        let fixture = Fixture::start(|config| {
            config.request_timeout = Duration::from_secs(60);
            change(config);
        })
        .await;
        let held = Self { fixture, gate: Arc::new(Semaphore::new(0)), arrived: Arc::default() };
        let (gate, arrived) = (held.gate.clone(), held.arrived.clone());
        let answer = move |request: Value, _| {
            let (gate, arrived) = (gate.clone(), arrived.clone());
            arrived.fetch_add(1, SeqCst);
            async move {
                gate.acquire().await.unwrap().forget();
                Some(decision(&request))
            }
        };
        held.fixture.router(answer).await;
        held
    }

    /// Waits until `requests` requests have reached the router, and checks that no more have.
    async fn arrived(&self, requests: usize) {
        eventually(PATIENCE, async || self.arrived.load(SeqCst) >= requests).await;
        assert_eq!(self.arrived.load(SeqCst), requests, "more requests than the limit were let through");
    }
}

async fn submit(raw: &mut Raw, version: Version) {
    raw.frame(version, FrameType::TaskSubmit, &crate::task(json!({}))).await;
}

type Answer = (FrameType, Value);

/// Waits until the gateway has read everything sent on this connection. Returns the answers up to then.
async fn seen(raw: &mut Raw) -> Vec<Answer> {
    raw.frame(V2(u64::MAX), FrameType::Ping, "").await;
    let mut before = Vec::new();
    loop {
        match raw.answer().await {
            (FrameType::Pong, _) => return before,
            answer => before.push(answer),
        }
    }
}

#[track_caller]
fn is_overloaded((kind, answer): Answer) {
    assert_eq!((kind, &answer["error"]["code"]), (FrameType::ResponseError, &json!(10)), "{answer}");
    assert!(answer["error"]["retry_after_ms"].as_u64().is_some_and(|ms| ms > 0), "{answer}");
}

#[track_caller]
fn is_ok((kind, answer): Answer) {
    assert_eq!(kind, FrameType::ResponseOk, "{answer}");
}

#[tokio::test]
async fn backpressure_defaults() {
    let held = Held::start(|_| {}).await;

    let mut v1 = held.fixture.connect().await;
    v1.frame(Version::V1, FrameType::Capabilities, "").await;
    let limits = v1.answer().await.1["limits"].clone();
    for (name, limit) in [("max_in_flight", 1000), ("max_in_flight_v1", 10), ("max_in_flight_v2", 256)] {
        assert_eq!(limits[name], limit, "{name}");
    }
    // The limits are enforced: 10 on a v1 connection, 256 on a v2 connection, 1000 in total.
    for _ in 0..11 {
        submit(&mut v1, Version::V1).await;
    }
    assert_eq!(seen(&mut v1).await, [], "in v1 the refusal waits for its turn");
    held.arrived(10).await;
    let mut taken = 10;

    let mut others = Vec::new();
    for expected in [256, 256, 256, 222] {
        let mut raw = held.fixture.connect().await;
        for id in 0..=256 {
            submit(&mut raw, V2(id)).await;
        }
        for _ in expected..257 {
            is_overloaded(raw.answer().await);
        }
        taken += expected;
        held.arrived(taken).await;
        others.push(raw);
    }
    assert_eq!(taken, 1000);

    held.gate.add_permits(1000);
    for _ in 0..10 {
        is_ok(v1.answer().await);
    }
    is_overloaded(v1.answer().await);
}

#[tokio::test]
async fn backpressure_refuses_the_limit_plus_first_and_accepts_again() {
    for one in [false, true] {
        // In v1 a refusal waits for its turn; in v2 it comes at once.
        let version = |id| if one { Version::V1 } else { V2(id) };
        let held = Held::start(|config| (config.max_in_flight_v1, config.max_in_flight_v2) = (3, 3)).await;
        let mut raw = held.fixture.connect().await;
        let mut answers = Vec::new();

        for id in 0..4 {
            submit(&mut raw, version(id)).await;
        }
        answers.extend(seen(&mut raw).await);
        held.arrived(3).await;
        held.gate.add_permits(1);
        answers.push(raw.answer().await);

        submit(&mut raw, version(4)).await;
        answers.extend(seen(&mut raw).await);
        held.arrived(4).await;

        submit(&mut raw, version(5)).await;
        answers.extend(seen(&mut raw).await);
        held.gate.add_permits(3);
        while answers.len() < 6 {
            answers.push(raw.answer().await);
        }
        // The fourth and the sixth request are refused.
        let refused = if one { [3, 5] } else { [0, 2] };
        for (position, answer) in answers.into_iter().enumerate() {
            if refused.contains(&position) {
                is_overloaded(answer)
            } else {
                is_ok(answer)
            }
        }
        held.arrived(4).await;
    }
}

#[tokio::test]
async fn backpressure_global_limit_over_several_connections() {
    let held = Held::start(|config| {
        config.max_in_flight = 6;
        config.api_key = "key".into();
    })
    .await;
    let mut connections = Vec::new();
    for n in 0..3 {
        let mut raw = held.fixture.connect().await;
        let version = |id| if n == 0 { Version::V1 } else { V2(id) };
        for id in 0..2 {
            submit(&mut raw, version(id)).await;
        }
        held.arrived(2 * (n + 1)).await;
        connections.push(raw);
    }
    // Further requests are refused on a connection that has some, on a new one, and over HTTP with 429.
    submit(&mut connections[2], V2(7)).await;
    is_overloaded(connections[2].answer().await);
    for version in [Version::V1, V2(1)] {
        let mut raw = held.fixture.connect().await;
        submit(&mut raw, version).await;
        is_overloaded(raw.answer().await);
    }

    let request = Request::post("/api/v1/routes/decide")
        .header("x-api-key", "key")
        .body(Body::from("{}"))
        .unwrap();
    let response = held.fixture.routes.clone().oneshot(request).await.unwrap();
    assert_eq!((response.status().as_u16(), &response.headers()["retry-after"]), (429, &"1".parse().unwrap()));
    let body = to_bytes(response.into_body(), 4096).await.unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((&body["error"]["code"], &body["error"]["retry_after_seconds"]), (&json!("backpressure"), &json!(1)));

    held.gate.add_permits(1);
    is_ok(connections[0].answer().await);
    submit(&mut connections[2], V2(8)).await;
    held.arrived(7).await;
    held.gate.add_permits(6);
    for (raw, answers) in connections.iter_mut().zip([1, 2, 3]) {
        for _ in 0..answers {
            is_ok(raw.answer().await);
        }
    }
    held.arrived(7).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backpressure_burst_accepts_exactly_n() {
    const N: usize = 50;
    const CLIENTS: usize = 16;
    const EACH: usize = 8;
    for one in [false, true] {
        let held = Held::start(|config| (config.max_in_flight, config.max_in_flight_v1) = (N, EACH)).await;

        let mut burst = tokio::task::JoinSet::new();
        let start = Arc::new(tokio::sync::Barrier::new(CLIENTS));
        for _ in 0..CLIENTS {
            let (mut raw, start) = (held.fixture.connect().await, start.clone());
            burst.spawn(async move {
                start.wait().await;
                for id in 0..EACH {
                    submit(&mut raw, if one { Version::V1 } else { V2(id as u64) }).await;
                }
                let before = seen(&mut raw).await;
                (raw, before)
            });
        }

        let connections = burst.join_all().await;
        held.arrived(N).await;
        held.gate.add_permits(CLIENTS * EACH);

        let (mut ok, mut refused) = (0, 0);
        for (mut raw, mut answers) in connections {
            while answers.len() < EACH {
                answers.push(raw.answer().await);
            }
            for answer in answers {
                if answer.0 == FrameType::ResponseOk {
                    ok += 1;
                } else {
                    is_overloaded(answer);
                    refused += 1;
                }
            }
        }

        assert_eq!((ok, refused), (N, CLIENTS * EACH - N));
        held.arrived(N).await;
    }
}
