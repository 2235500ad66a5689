//! Every row of the contract's table of bad input, edge cases, and misbehaving clients.

use crate::{Fixture, decision, task};
use bytes::BytesMut;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use wire::ipc::{Frame, FrameType, Version};
use wire::limits::IPC_FRAME_MAX;

const SOON: Duration = Duration::from_secs(20);

fn v1(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    Frame { version: Version::V1, kind, flags: 0, payload: payload.to_vec().into() }.encode(&mut bytes);
    bytes.to_vec()
}

fn v2(request_id: u64, deadline_ms: u32, payload: &str) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    let version = Version::V2 { request_id, deadline_ms };
    Frame::new(version, FrameType::TaskSubmit, payload.as_bytes().to_vec()).encode(&mut bytes);
    bytes.to_vec()
}

#[tokio::test]
async fn bad_lengths_and_versions_are_refused_first_and_close_the_connection() {
    let fixture = Fixture::start(|_| {}).await;
    for (name, hex, code) in [
        ("length 0", "000000000101", 4),
        ("length 5", "0000000501f0", 4),
        ("length 5 of an unknown version", "0000000509ff", 4),
        ("v2 shorter than its header", "0000001302f000000000000000000000000000", 4),
        ("one over the limit", "0040000101f0", 3),
        ("the largest length", "ffffffff01f0", 3),
        ("too large, of an unknown version", "ffffffff0000", 3),
        ("version 0", "0000000600f0", 1),
        ("version 3 and an unknown type", "00000006037f", 1),
        ("HTTP", "474554202f20485454502f312e310d0a", 3),
    ] {
        let mut raw = fixture.connect().await;
        raw.send(&hex::decode(hex).unwrap()).await;
        assert_eq!(raw.error_code().await, code, "{name}");
        assert!(raw.next().await.is_none(), "{name} closes");
    }

    // Requests before the bad frame are still answered, in order.
    let mut raw = fixture.connect().await;
    raw.send(&hex::decode("0000000601f00000000601f00000000609f0").unwrap())
        .await;
    for _ in 0..2 {
        assert_eq!(raw.answer().await.0, FrameType::Pong);
    }
    assert_eq!(raw.error_code().await, 1);
    assert!(raw.next().await.is_none());
}

#[tokio::test]
async fn types_that_clients_may_not_send_leave_the_connection_open() {
    let fixture = Fixture::start(|_| {}).await;

    let mut raw = fixture.connect().await;
    for kind in (0..=255_u8).filter(|kind| !matches!(kind, 1..=4 | 0xf0 | 0xf2)) {
        raw.send(&v1(kind, b"\xff not parsed")).await;
        assert_eq!(raw.error_code().await, 2, "{kind:#04x}");
    }
    raw.frame(Version::V1, FrameType::Ping, "").await;
    assert_eq!(raw.answer().await.0, FrameType::Pong);
}

#[tokio::test]
async fn error_names_the_field_of_the_payload_that_does_not_fit() {
    let fixture = Fixture::start(|_| {}).await;

    let mut raw = fixture.connect().await;
    let long = "x".repeat(129);
    let (open, close) = ("[".repeat(200), "]".repeat(200));
    let deep = format!(r#"{{"command":"task_submit","task_type":"t","context":{open}{close}}}"#);

    let submit = [
        (task(json!({"task_type": long})), "task_type"),
        (task(json!({"trace_id": long})), "trace_id"),
        (task(json!({"policy_id": long})), "policy_id"),
        (task(json!({"request_id": ""})), "request_id"),
        (task(json!({"request_id": "a\0b"})), "request_id has a control character"),
        (task(json!({"trace_id": "a\nb"})), "trace_id has a control character"),
        (task(json!({"policy_id": "a\u{7f}"})), "policy_id has a control character"),
        (task(json!({"task_type": "a\u{85}"})), "task_type has a control character"),
        (task(json!({"tenant_id": long})), "tenant_id"),
        (task(json!({"tenant_id": "a\r\nb"})), "tenant_id"),
        (task(json!({"task_type": 7})), "string"),
        (task(json!({"line": "7"})), "i64"),
        (task(json!({"line": 1.5})), "i64"),
        (task(json!({"params": []})), "map"),
        (task(json!({"timeout_ms": -1})), "u64"),
        (task(json!({"push_assignment": 1})), "boolean"),
        (r#"{"task_type":"t"}"#.into(), "command"),
        (r#"{"command":"task_submit"}"#.into(), "task_type"),
        (r#"{"command":"task_submit","task_type":"t"} {}"#.into(), "trailing"),
        (deep, "more than 120 levels"),
        (r#"["task_submit","t"]"#.into(), "object"),
        ("null".into(), "object"),
    ];
    for (payload, names) in submit {
        raw.frame(Version::V1, FrameType::TaskSubmit, &payload).await;
        let (_, value) = raw.answer().await;
        assert_eq!(value["error"]["code"], 4, "{payload:.80} → {value}");
        assert!(value["error"]["message"].as_str().unwrap().contains(names), "{payload:.80} → {value}");
    }

    let references = ["", "{}", "[\"t\"]", r#"{"task_id":7}"#, r#"{"task_id":""}"#, "{\"task_id\":\"t\""];
    for kind in [FrameType::TaskQuery, FrameType::TaskCancel, FrameType::StreamSubscribe] {
        let ids = [&*long, "a\0b"].map(|id| json!({"task_id": id}).to_string());
        for payload in references.map(String::from).into_iter().chain(ids) {
            raw.frame(Version::V1, kind, &payload).await;
            assert_eq!(raw.error_code().await, 4, "{kind:?} {payload}");
        }
    }
    raw.frame(Version::V1, FrameType::Ping, "").await;
    assert_eq!(raw.answer().await.0, FrameType::Pong);
}

#[tokio::test]
async fn hostile_fields_do_not_reach_the_router() {
    let fixture = Fixture::start(|_| {}).await;
    fixture
        .router(|request, headers| async move {
            let headers: Vec<_> = headers.iter().map(|(name, value)| json!([name, value])).collect();
            Some(json!({"ok": true, "request": request, "headers": headers}))
        })
        .await;

    let mut raw = fixture.connect().await;
    let hostile = json!({"params": {"tenant_id": "other", "a": "\",\"tenant_id\":\"evil"},
        "context": {"ok": true, "error": {"code": "none"}}, "file": "a\"}}", "metadata": {"x": 1}, "version": "9",
        "constraints": {"max_cost": 0}, "traceparent": "00-zz\r\nx: y", "request_id": "r tenant_id: evil"});
    raw.submit_v1(hostile).await;
    let (_, value) = raw.answer().await;
    let request = &value["request"];
    assert_eq!((&request["tenant_id"], &request["version"]), (&json!("default"), &json!("1")));
    assert_eq!((request.get("metadata"), request.get("constraints")), (None, None), "a submit has no such fields");
    assert_eq!(request["request_id"], "r tenant_id: evil", "ids are opaque");
    assert_eq!(request["task"]["payload"]["params"]["a"], "\",\"tenant_id\":\"evil");

    let tenants: Vec<&Value> = value["headers"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|pair| pair[0] == "tenant_id")
        .collect();
    assert_eq!(tenants, [&json!(["tenant_id", "default"])]);

    let parent = value["headers"]
        .as_array()
        .unwrap()
        .iter()
        .find(|pair| pair[0] == "traceparent")
        .unwrap();
    assert!(
        parent[1].as_str().unwrap().starts_with("00-") && !parent[1].as_str().unwrap().contains("zz"),
        "{parent}"
    );
}

#[tokio::test]
async fn shortest_and_longest_deadlines_are_honoured() {
    let fixture = Fixture::start(|config| config.request_timeout = Duration::from_millis(300)).await;
    fixture
        .router(|request, _| async move { (request["request_id"] != "never").then(|| decision(&request)) })
        .await;

    let mut raw = fixture.connect().await;
    for (n, (deadline_ms, fields)) in [
        (0, json!({})),
        (u32::MAX, json!({})),
        (0, json!({"timeout_ms": u64::MAX})),
        (u32::MAX, json!({"timeout_ms": u64::MAX})),
    ]
    .into_iter()
    .enumerate()
    {
        raw.send(&v2(n as u64, deadline_ms, &task(fields))).await;
        assert_eq!(raw.answer().await.0, FrameType::ResponseOk, "{n}");
    }
    // The request timeout applies even if the client's deadline is longer.
    for (n, deadline_ms) in [(7, 0), (8, u32::MAX), (9, 1)] {
        raw.send(&v2(n, deadline_ms, &task(json!({"request_id": "never"}))))
            .await;
        assert_eq!(raw.error_code().await, 5, "{deadline_ms}");
    }
}

#[tokio::test]
async fn answer_larger_than_a_frame_is_an_error() {
    let fixture = Fixture::start(|_| {}).await;
    fixture
        .router(|request, _| async move {
            let mut answer = decision(&request);
            answer["big"] = "x".repeat(IPC_FRAME_MAX).into();
            Some(answer)
        })
        .await;

    let mut raw = fixture.connect().await;
    raw.submit_v1(json!({"request_id": "r"})).await;
    let (_, value) = raw.answer().await;
    assert_eq!((&value["error"]["code"], &value["context"]["request_id"]), (&json!(3), &json!("r")));
    raw.frame(Version::V1, FrameType::Ping, "").await;
    assert_eq!(raw.answer().await.0, FrameType::Pong, "the connection stays open");
}

#[tokio::test]
async fn unreadable_answers_of_the_router_are_internal_errors() {
    let fixture = Fixture::start(|config| config.breaker.consecutive_failures = 1000).await;
    fixture
        .router(|request, _| async move { Some(request["task"]["payload"]["params"]["answer"].clone()) })
        .await;

    let mut raw = fixture.connect().await;
    for (answer, code) in [
        (json!("text"), 99),
        (json!([]), 99),
        (json!({}), 99),
        (json!({"ok": false}), 99),
        (json!({"ok": "yes"}), 99),
        (json!({"ok": false, "error": {"code": "brand_new", "message": "m"}}), 12),
        (json!({"ok": true, "error": {"code": "internal", "message": "m"}}), 12),
    ] {
        raw.submit_v1(json!({"params": {"answer": answer}})).await;
        assert_eq!(raw.error_code().await, code, "{answer}");
    }
}

#[tokio::test]
async fn thousands_of_early_disconnects_leave_nothing_in_flight() {
    let fixture = Fixture::start(|config| config.max_connections = 64).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let seen = asked.clone();
    fixture
        .router(move |request, _| {
            seen.fetch_add(1, SeqCst);
            async move {
                if request["task"]["type"] == "slow" {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Some(decision(&request))
            }
        })
        .await;

    for round in 0..2000 {
        let mut raw = loop {
            // Connections are refused at the limit until the slots of disconnected clients are released.
            let mut raw = fixture.connect().await;
            if round % 100 != 0 {
                break raw;
            }
            raw.frame(Version::V1, FrameType::Ping, "").await;
            if raw.answer().await.0 == FrameType::Pong {
                break raw;
            }
        };
        use tokio::io::AsyncWriteExt;
        // Some connections are refused or already closed, so errors do not matter.
        let slow = task(json!({"task_type": "slow", "wait": if round % 3 == 0 { "result" } else { "decision" }}));
        let _ = raw.stream.write_all(&v2(1, 0, &slow)).await;
        let _ = raw.stream.write_all(&v1(1, slow.as_bytes())).await;
    }

    assert!(asked.load(SeqCst) > 0);

    let mut statuses = fixture
        .bus
        .subscribe(wire::subjects::GATEWAY_STATUS, None, 64)
        .await
        .unwrap();

    let idle = async {
        loop {
            let status: Value = serde_json::from_slice(&statuses.next().await.unwrap().payload).unwrap();
            if status["connections"] == 0 && status["in_flight"] == 0 {
                return;
            }
        }
    };

    tokio::time::timeout(SOON, idle)
        .await
        .expect("no connection and no request is left");

    let mut raw = fixture.connect().await;
    raw.submit_v1(json!({})).await;
    assert_eq!(raw.answer().await.0, FrameType::ResponseOk);
}
