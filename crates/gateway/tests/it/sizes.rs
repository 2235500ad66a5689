//! Answers that do not fit a frame: no frame exceeds the limit, and the connection stays open.

use crate::{Fixture, Raw, decision, task};
use bus::{Bus, Message};
use serde_json::{Value, json};
use wire::ipc::{FrameType, Version};
use wire::limits::IPC_FRAME_MAX;
use wire::subjects;

/// More than a frame can hold, less than the limit of a bus message.
const LARGE: usize = IPC_FRAME_MAX + IPC_FRAME_MAX / 2;

async fn alive(raw: &mut Raw) {
    raw.frame(Version::V1, FrameType::Ping, "").await;
    assert_eq!(raw.answer().await.0, FrameType::Pong);
}

#[tokio::test]
async fn error_quotes_only_a_part_of_a_large_payload() {
    let fixture = Fixture::start(|_| {}).await;

    let mut raw = fixture.connect().await;
    // Escaping doubles the length of the quotes.
    let quotes = "\"".repeat(IPC_FRAME_MAX / 2 - 100);
    let long = "ü".repeat(IPC_FRAME_MAX / 2 - 100);
    for payload in [
        json!({"command": quotes, "task_type": "t"}).to_string(),
        task(json!({"wait": quotes})),
        task(json!({"wait": long})),
    ] {
        raw.frame(Version::V1, FrameType::TaskSubmit, &payload).await;
        let frame = raw.next().await.expect("an answer");
        let value: Value = serde_json::from_slice(&frame.payload).unwrap();
        assert_eq!(value["error"]["code"], 4);
        assert!(frame.payload.len() < 16 * 1024, "{} bytes", frame.payload.len());
    }

    alive(&mut raw).await;
}

#[tokio::test]
async fn router_error_that_is_too_large_keeps_its_code_and_reason() {
    let fixture = Fixture::start(|_| {}).await;
    fixture
        .router(|request, _| async move {
            let large = "x".repeat(LARGE);
            let mut error = json!({"code": "quota_exceeded", "message": "no", "retry_after_seconds": 3});
            error[request["request_id"].as_str().unwrap()] = json!({"details": large});
            if request["request_id"] == "message" {
                error["message"] = large.into();
            }
            Some(json!({"ok": false, "error": error, "context": {}}))
        })
        .await;

    let mut raw = fixture.connect().await;
    for large in ["details", "message"] {
        raw.submit_v1(json!({"request_id": large})).await;
        let (kind, value) = raw.answer().await;
        let error = &value["error"];
        assert_eq!((kind, &error["code"], &error["status"]), (FrameType::ResponseError, &json!(12), &json!(429)));
        assert_eq!((&error["reason"], &error["retry_after_ms"]), (&json!("quota_exceeded"), &json!(3000)));
        assert_eq!(value["context"]["request_id"], large);
    }

    alive(&mut raw).await;
}

async fn say(bus: &Bus, subject: &str, payload: Value) {
    let message = Message {
        subject: subject.into(),
        payload: payload.to_string().into(),
        ..Message::default()
    };
    bus.publish(message).await.unwrap();
}

#[tokio::test]
async fn output_and_results_that_are_too_large_end_in_an_error() {
    let fixture = Fixture::start(|_| {}).await;
    let bus = fixture.bus.clone();
    fixture
        .router(move |request, _| {
            let bus = bus.clone();
            async move {
                let id = request["request_id"].as_str().unwrap();
                let size = |large| if id.starts_with(large) { LARGE } else { 1 };
                let chunk =
                    json!({"request_id": id, "assignment_id": "a", "seq": 0, "data": "x".repeat(size("output"))});
                say(&bus, &subjects::output(id), chunk).await;
                let result = json!({"version": "1", "assignment_id": "a", "request_id": id, "status": "success",
                    "provider_id": "p", "job": {"type": "t"}, "chunks": 1, "output": "x".repeat(size("result"))});
                say(&bus, request["result_subject"].as_str().unwrap(), result).await;
                Some(decision(&request))
            }
        })
        .await;

    let mut raw = fixture.connect().await;
    for (id, wait, expected) in [
        ("output", "stream", &[FrameType::StreamError][..]),
        ("result", "stream", &[FrameType::StreamData, FrameType::StreamError]),
        ("result", "result", &[FrameType::ResponseError]),
        ("small", "stream", &[FrameType::StreamData, FrameType::StreamComplete]),
    ] {
        raw.submit_v1(json!({"request_id": id, "wait": wait})).await;
        for expected in expected {
            let (kind, value) = raw.answer().await;
            assert_eq!(kind, *expected, "{id}, {wait}");
            if matches!(kind, FrameType::StreamError | FrameType::ResponseError) {
                assert_eq!(value["error"]["code"], 3, "{id}, {wait}: {value}");
            }
        }
    }

    alive(&mut raw).await;
}
