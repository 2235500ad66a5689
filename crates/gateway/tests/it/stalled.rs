//! Clients with long deadlines or that do not read: their resources are bounded, and other clients are served.

use crate::{Fixture, Raw, decision};
use serde_json::{Value, json};
use std::time::Duration;
use testkit::eventually;
use wire::ipc::{ErrorCode, FrameType, Version};
use wire::subjects;

const PATIENCE: Duration = Duration::from_secs(20);
const NEVER: Duration = Duration::from_secs(600);
/// Enough requests that their answers, several megabytes, exceed the socket's buffers.
const FLOOD: usize = 10_000;

/// A gateway that allows two requests in flight. Its router never answers requests called `held…`; it decides all
/// others, but no worker runs them.
async fn with_limit_of_two(change: impl FnOnce(&mut gateway::Config)) -> Fixture {
    let fixture = Fixture::start(|config| {
        (config.max_in_flight, config.write_timeout) = (2, NEVER);
        change(config);
    })
    .await;
    let answer = |request: Value, _| async move {
        let held = request["request_id"].as_str().unwrap().starts_with("held");
        (!held).then(|| decision(&request))
    };
    fixture.router(answer).await;
    fixture
}

impl Raw {
    /// Sends more requests than the client reads answers.
    async fn flood(&mut self) {
        self.send(&hex::decode("0000000601f2").unwrap().repeat(FLOOD)).await;
    }
}

/// Waits until another client's request is answered by the router.
async fn another_is_served(fixture: &Fixture) {
    eventually(PATIENCE, async || {
        let mut raw = fixture.connect().await;
        raw.submit_v1(json!({})).await;
        raw.answer().await.0 == FrameType::ResponseOk
    })
    .await;
}

#[tokio::test]
async fn no_request_is_in_flight_longer_than_the_maximum_deadline() {
    let fixture = with_limit_of_two(|config| config.max_deadline = Duration::from_millis(300)).await;
    let mut raw = fixture.connect().await;
    let day = json!({"wait": "result", "timeout_ms": 86_400_000});
    raw.submit_v1(day.clone()).await;
    let version = Version::V2 { request_id: 1, deadline_ms: u32::MAX };
    raw.frame(version, FrameType::TaskSubmit, &crate::task(json!({"wait": "stream"})))
        .await;
    for _ in 0..2 {
        let (_, answer) = raw.answer().await;
        assert_eq!(answer["error"]["code"], ErrorCode::Timeout as u64, "{answer}");
    }

    another_is_served(&fixture).await;

    raw.frame(Version::V1, FrameType::Capabilities, "").await;
    assert_eq!(raw.answer().await.1["limits"]["max_deadline_ms"], 300);
    fixture.control.reload(gateway::Config {
        max_deadline: Duration::from_millis(200),
        socket: fixture.dir.path().join("s"),
        ..gateway::Config::default()
    });
    raw.submit_v1(day).await;
    assert_eq!(raw.error_code().await, ErrorCode::Timeout as u64);
}

#[tokio::test]
async fn requests_of_a_client_that_does_not_read_end_at_their_deadlines() {
    let fixture = with_limit_of_two(|_| {}).await;
    let mut raw = fixture.connect().await;
    let version = |request_id| Version::V2 { request_id, deadline_ms: 500 };
    raw.frame(version(1), FrameType::TaskSubmit, &crate::task(json!({"request_id": "held"})))
        .await;
    raw.frame(version(2), FrameType::TaskSubmit, &crate::task(json!({"wait": "result"})))
        .await;

    raw.flood().await;
    // The permits are released although the client has not read a byte.
    another_is_served(&fixture).await;
    // The answers are still delivered once the client reads.
    let mut late = 0;
    for _ in 0..FLOOD + 2 {
        let frame = raw.next().await.expect("the connection is open");
        if frame.version != Version::V1 {
            let answer: Value = serde_json::from_slice(&frame.payload).unwrap();
            assert_eq!(answer["error"]["code"], ErrorCode::Timeout as u64, "{answer}");
            late += 1;
        }
    }

    assert_eq!(late, 2);
}

#[tokio::test]
async fn stream_that_is_not_read_ends_at_its_deadline() {
    let fixture = with_limit_of_two(|config| config.max_in_flight = 1).await;
    let mut output = fixture.bus.subscribe(subjects::DECIDE, None, 8).await.unwrap();
    let mut raw = fixture.connect().await;
    let asked = json!({"request_id": "s", "wait": "stream", "timeout_ms": 700});
    raw.submit_v2(1, asked).await;
    output.next().await.unwrap();

    let large = "x".repeat(64 * 1024);
    for seq in 0..64 {
        let chunk = json!({"request_id": "s", "assignment_id": "a", "attempt": 1, "seq": seq, "data": large});
        let subject = subjects::output("s").into();
        let message = bus::Message { subject, payload: chunk.to_string().into(), ..bus::Message::default() };
        fixture.bus.publish(message).await.unwrap();
    }

    another_is_served(&fixture).await;

    let last = loop {
        match raw.answer().await {
            (FrameType::StreamData, _) => {}
            last => break last,
        }
    };
    assert_eq!((last.0, &last.1["error"]["code"]), (FrameType::StreamError, &json!(5)));
}

#[tokio::test]
async fn stream_that_waits_for_its_turn_ends_at_its_deadline() {
    let fixture = with_limit_of_two(|config| config.request_timeout = NEVER).await;
    let mut raw = fixture.connect().await;
    raw.submit_v1(json!({"request_id": "held", "wait": "decision", "timeout_ms": 600_000}))
        .await;
    raw.submit_v1(json!({"wait": "stream", "timeout_ms": 100})).await;

    another_is_served(&fixture).await;
}

#[tokio::test]
async fn probe_of_a_client_that_does_not_read_is_settled() {
    let open_for = Duration::from_millis(100);
    let breaker = gateway::BreakerConfig { probes: 1, successes: 1, open_for, ..gateway::BreakerConfig::default() };
    let fixture = Fixture::start(|config| (config.breaker, config.write_timeout) = (breaker, NEVER)).await;
    let mut raw = fixture.connect().await;
    raw.submit_v1(json!({})).await;
    assert_eq!(
        raw.error_code().await,
        ErrorCode::Unavailable as u64,
        "no router is running, which opens the breaker"
    );

    let answer = |request: Value, _| async move { (request["request_id"] != "held").then(|| decision(&request)) };
    fixture.router(answer).await;

    eventually(PATIENCE, async || {
        let mut other = fixture.connect().await;
        other.frame(Version::V1, FrameType::Capabilities, "").await;
        other.answer().await.1["breaker"] == "half_open"
    })
    .await;
    let mut asked = fixture.bus.subscribe(subjects::DECIDE, None, 8).await.unwrap();
    // This request takes the only probe.
    let version = Version::V2 { request_id: 1, deadline_ms: 600 };
    raw.frame(version, FrameType::TaskSubmit, &crate::task(json!({"request_id": "held"})))
        .await;
    asked.next().await.unwrap();

    raw.flood().await;

    another_is_served(&fixture).await;
}

#[tokio::test]
async fn client_that_keeps_reading_gets_all_its_large_answers() {
    let fixture = Fixture::start(|config| config.write_timeout = Duration::from_secs(2)).await;
    let answer = |request: Value, _| async move {
        let mut answer = decision(&request);
        answer["decision"]["metadata"] = json!({"large": "x".repeat(512 * 1024)});
        Some(answer)
    };
    fixture.router(answer).await;
    let mut raw = fixture.connect().await;

    for id in 0..64 {
        raw.submit_v2(id, json!({})).await;
    }

    for _ in 0..64 {
        assert_eq!(raw.answer().await.0, FrameType::ResponseOk);
    }
}
