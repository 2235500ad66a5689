//! Sessions over a real socket: their answers, the order of the answers, and the limits.

use crate::{Fixture, decision, task};
use bus::{Bus, Message};
use bytes::BytesMut;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use wire::ipc::{Frame, FrameType, Version};
use wire::subjects;

#[tokio::test]
async fn golden_frames_get_golden_answers() {
    let fixture = Fixture::start(|_| {}).await;
    for (sent, expected) in [
        ("0000000601f0", "0000000601f1"),
        (
            "0000000609f0",
            "0000004e01117b226f6b223a66616c73652c226572726f72223a7b22636f6465223a312c226d657373616765223a22556e73757070\
             6f727465642070726f746f636f6c2076657273696f6e227d7d",
        ),
    ] {
        let mut raw = fixture.connect().await;
        raw.send(&hex::decode(sent).unwrap()).await;
        let mut answer = vec![0; expected.len() / 2];
        raw.stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(hex::encode(answer), expected);
    }
}

#[tokio::test]
async fn bad_input_gets_its_code_and_only_lost_framing_closes_the_connection() {
    let fixture = Fixture::start(|_| {}).await;
    let frame = |kind: u8, payload: &[u8]| {
        let mut bytes = BytesMut::new();
        let payload = payload.to_vec().into();
        Frame { version: Version::V1, kind, flags: 0, payload }.encode(&mut bytes);
        bytes.to_vec()
    };
    let v2 = |flags: u16| {
        let mut bytes = BytesMut::new();
        let version = Version::V2 { request_id: 7, deadline_ms: u32::MAX };
        Frame {
            version,
            kind: 0x01,
            flags,
            payload: task(json!({"task_type": ""})).into(),
        }
        .encode(&mut bytes);
        bytes.to_vec()
    };
    let long = "x".repeat(129);

    let open = [
        ("unknown type", frame(0x7f, b""), 2),
        ("server-only type", frame(0x10, b"{}"), 2),
        ("not JSON", frame(0x01, b"{"), 4),
        ("an array", frame(0x01, b"[]"), 4),
        ("empty", frame(0x02, b""), 4),
        ("not UTF-8", frame(0x01, b"{\"command\":\"task_submit\",\"task_type\":\"\xff\"}"), 4),
        (
            "a field twice",
            frame(0x01, br#"{"command":"task_submit","task_type":"t","tenant_id":"a","tenant_id":"b"}"#),
            4,
        ),
        ("other command", frame(0x01, br#"{"command":"task_query","task_type":"t"}"#), 4),
        ("long id", frame(0x01, task(json!({"request_id": long})).as_bytes()), 4),
        ("tenant with a dot and a star", frame(0x01, task(json!({"tenant_id": "a.*"})).as_bytes()), 4),
        ("unknown wait", frame(0x01, task(json!({"wait": "forever"})).as_bytes()), 4),
        ("unknown flags", v2(0x8000), 4),
        ("empty task type in v2", v2(0), 4),
        ("no router", frame(0x01, task(json!({})).as_bytes()), 11),
    ];

    let mut raw = fixture.connect().await;
    for (name, bytes, code) in open {
        raw.send(&bytes).await;
        assert_eq!(raw.error_code().await, code, "{name}");
    }
    raw.frame(Version::V1, FrameType::Ping, "any payload").await;
    assert_eq!(raw.answer().await.0, FrameType::Pong, "the connection stays open");

    for (name, hex, code) in [("short", "00000005", 4), ("huge", "00400001", 3), ("version", "0000000609f0", 1)] {
        let mut raw = fixture.connect().await;
        raw.send(&hex::decode(hex).unwrap()).await;
        assert_eq!(raw.error_code().await, code, "{name}");
        assert!(raw.next().await.is_none(), "{name} closes");
    }
}

#[tokio::test]
async fn request_goes_out_with_headers_and_the_decision_comes_back_unchanged() {
    let fixture = Fixture::start(|_| {}).await;
    fixture
        .router(|request, headers| async move {
            assert_eq!(headers.get("tenant_id"), Some("acme"));
            assert_eq!(headers.get("version"), Some("1"));
            assert_eq!(headers.get("trace_id"), Some("0af7651916cd43dd8448eb211c80319c"));
            assert!(
                headers
                    .get("traceparent")
                    .unwrap()
                    .starts_with("00-0af7651916cd43dd8448eb211c80319c-")
            );
            assert_eq!(request["task"], json!({"type": "t", "payload": {"line": 3, "params": {"a": 1.50}}}));
            assert_eq!(request.get("push_assignment"), None);
            Some(decision(&request))
        })
        .await;

    let mut raw = fixture.connect().await;
    let trace = "0af76519-16cd-43dd-8448-eb211c80319c";
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let fields = json!({"request_id": "r1", "tenant_id": "acme", "trace_id": trace, "traceparent": parent,
        "line": 3, "params": {"a": 1.50}});
    raw.submit_v1(fields).await;

    let frame = raw.next().await.unwrap();
    let expected = r#"{"context":{"request_id":"r1"},"decision":{"provider_id":"t"},"ok":true}"#;
    let value: Value = serde_json::from_slice(&frame.payload).unwrap();
    assert_eq!(value, serde_json::from_str::<Value>(expected).unwrap());
}

#[tokio::test]
async fn v1_replies_come_in_order_and_v2_replies_at_once() {
    let fixture = Fixture::start(|_| {}).await;
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let held = gate.clone();
    fixture
        .router(move |request, _| {
            let gate = held.clone();
            async move {
                if request["request_id"] == "slow" {
                    let _opened = gate.acquire().await.unwrap();
                }
                Some(decision(&request))
            }
        })
        .await;

    let mut raw = fixture.connect().await;
    raw.submit_v1(json!({"request_id": "slow"})).await;
    raw.submit_v1(json!({"request_id": "fast"})).await;
    raw.frame(Version::V1, FrameType::Ping, "").await;
    raw.submit_v2(1, json!({"request_id": "other"})).await;

    let first = raw.next().await.unwrap();
    assert_eq!(
        first.version,
        Version::V2 { request_id: 1, deadline_ms: 0 },
        "a v2 reply does not wait for v1 replies"
    );

    gate.add_permits(1);
    for expected in ["slow", "fast"] {
        assert_eq!(raw.answer().await.1["context"]["request_id"], expected);
    }
    assert_eq!(raw.answer().await.0, FrameType::Pong);
}

#[tokio::test]
async fn request_id_in_flight_cannot_be_reused() {
    let fixture = Fixture::start(|_| {}).await;
    fixture.router(|_, _| std::future::pending()).await;

    let mut raw = fixture.connect().await;
    raw.submit_v2(9, json!({})).await;
    raw.submit_v2(9, json!({})).await;
    assert_eq!(raw.error_code().await, 4);
}

#[tokio::test]
async fn deadlines_and_router_errors_reach_the_client() {
    let fixture = Fixture::start(|_| {}).await;
    fixture
        .router(|request, _| async move {
            (request["request_id"] != "late").then(|| {
                let error = json!({"code": "backpressure", "message": "busy", "retry_after_seconds": 3,
                    "details": {"queue": 7}});
                json!({"ok": false, "context": {}, "error": error})
            })
        })
        .await;

    let mut raw = fixture.connect().await;
    raw.submit_v1(json!({"request_id": "late", "timeout_ms": 20})).await;
    let (_, value) = raw.answer().await;
    assert_eq!((&value["error"]["code"], &value["context"]["request_id"]), (&json!(5), &json!("late")));

    raw.submit_v1(json!({"request_id": "r"})).await;
    let (_, value) = raw.answer().await;
    let error = json!({"code": 12, "message": "busy", "status": 429, "reason": "backpressure", "retry_after_ms": 3000,
        "details": {"queue": 7}});
    assert_eq!(value["error"], error);
}

#[tokio::test]
async fn slow_client_is_disconnected_and_the_connection_limit_is_reported() {
    let fixture = Fixture::start(|config| {
        config.read_timeout = Duration::from_millis(50);
        config.max_connections = 1;
    })
    .await;

    let mut slow = fixture.connect().await;
    slow.send(&[0, 0, 0, 50, 1]).await;
    assert_eq!(slow.error_code().await, 5);
    assert!(slow.next().await.is_none());
    // The connection slot is released as soon as the session has ended.
    let mut first = loop {
        let mut raw = fixture.connect().await;
        raw.frame(Version::V1, FrameType::Ping, "").await;
        if raw.answer().await.0 == FrameType::Pong {
            break raw;
        }
    };
    assert_eq!(fixture.connect().await.error_code().await, 10);
    first.frame(Version::V1, FrameType::Ping, "").await;
    assert_eq!(first.answer().await.0, FrameType::Pong);
}

#[tokio::test]
async fn early_disconnects_leave_nothing_in_flight() {
    let fixture = Fixture::start(|_| {}).await;
    fixture.router(|_, _| std::future::pending()).await;
    for _ in 0..300 {
        let mut raw = fixture.connect().await;
        raw.submit_v2(1, json!({})).await;
        raw.submit_v1(json!({"wait": "stream"})).await;
    }

    let mut status = fixture.bus.subscribe(subjects::GATEWAY_STATUS, None, 16).await.unwrap();
    let settled = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            let message = status.next().await.unwrap();
            let status: wire::status::GatewayStatus = serde_json::from_slice(&message.payload).unwrap();
            if status.in_flight == 0 && status.connections == 0 {
                return;
            }
        }
    });

    settled.await.expect("no request and no connection is left");
}

#[tokio::test]
async fn half_closed_client_still_gets_its_answers() {
    let fixture = Fixture::start(|_| {}).await;
    fixture.echo_router().await;

    let mut raw = fixture.connect().await;
    raw.submit_v1(json!({})).await;
    raw.stream.shutdown().await.unwrap();
    assert_eq!(raw.answer().await.0, FrameType::ResponseOk);
    assert!(raw.next().await.is_none());
}

#[tokio::test]
async fn drain_answers_requests_in_flight_or_refuses_them_at_its_end() {
    let fixture = Fixture::start(|config| config.drain_timeout = Duration::from_millis(200)).await;
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let held = gate.clone();
    let (seen, mut arrived) = tokio::sync::mpsc::channel(8);
    fixture
        .router(move |request, _| {
            let (gate, seen) = (held.clone(), seen.clone());
            async move {
                seen.send(()).await.unwrap();
                if request["request_id"] == "never" {
                    std::future::pending::<()>().await;
                }
                let _opened = gate.acquire().await.unwrap();
                Some(decision(&request))
            }
        })
        .await;

    let mut raw = fixture.connect().await;
    raw.submit_v2(1, json!({})).await;
    raw.submit_v2(2, json!({"request_id": "never"})).await;
    for _ in 0..2 {
        arrived.recv().await.unwrap();
    }

    fixture.cancel.cancel();

    gate.add_permits(1);

    let first = raw.next().await.unwrap();
    assert_eq!(
        (first.version, first.frame_type()),
        (Version::V2 { request_id: 1, deadline_ms: 0 }, Some(FrameType::ResponseOk))
    );

    let second = raw.next().await.unwrap();
    let value: Value = serde_json::from_slice(&second.payload).unwrap();
    assert_eq!(value["error"]["code"], 6, "{value}");
    assert!(raw.next().await.is_none());

    fixture.running.await.unwrap().unwrap();
    assert!(!fixture.dir.path().join("s").exists());
}

#[tokio::test]
async fn v1_stream_has_the_connection_to_itself_and_ends_with_the_result() {
    let fixture = Fixture::start(|_| {}).await;
    let bus = fixture.bus.clone();
    fixture
        .router(move |request, _| {
            let bus = bus.clone();
            async move {
                let id = request["request_id"].as_str().unwrap().to_string();
                if request["push_assignment"] == true {
                    // The result overtakes the last piece, so the gateway must wait for all announced pieces.
                    for seq in 0..2 {
                        publish_chunk(&bus, &id, seq).await;
                    }
                    let result = json!({"version": "1", "assignment_id": "a", "request_id": id, "status": "success",
                        "provider_id": "p", "job": {"type": "t"}, "chunks": 3, "big": 12345678901234567890123_f64});
                    let subject = request["result_subject"].as_str().unwrap().into();
                    let message = Message { subject, payload: result.to_string().into(), ..Message::default() };
                    bus.publish(message).await.unwrap();
                    publish_chunk(&bus, &id, 2).await;
                }
                Some(decision(&request))
            }
        })
        .await;

    let mut raw = fixture.connect().await;
    raw.submit_v1(json!({"request_id": "before"})).await;
    raw.submit_v1(json!({"request_id": "s", "wait": "stream"})).await;
    raw.submit_v1(json!({"request_id": "after"})).await;
    raw.submit_v1(json!({"request_id": "r", "wait": "result"})).await;
    assert_eq!(raw.answer().await.1["context"]["request_id"], "before");

    for seq in 0..3 {
        let (kind, value) = raw.answer().await;
        assert_eq!(
            (kind, &value),
            (FrameType::StreamData, &json!({"task_id": "s", "seq": seq, "data": format!("c{seq}")}))
        );
    }

    let (kind, value) = raw.answer().await;
    assert_eq!((kind, &value["result"]["status"]), (FrameType::StreamComplete, &json!("success")));
    assert!(value["result"]["big"].is_number(), "the result is passed on as it was published");
    assert_eq!(raw.answer().await.1["context"]["request_id"], "after");
    assert_eq!(raw.answer().await.1["request_id"], "r");
}

#[tokio::test]
async fn router_that_does_not_read_a_record_delays_neither_output_nor_result() {
    // Longer than the test waits for an answer.
    let fixture = Fixture::start(|config| config.request_timeout = Duration::from_secs(60)).await;
    let mut requests = fixture.bus.subscribe(subjects::DECIDE, None, 16).await.unwrap();
    fixture.echo_router().await;
    let mut looks = fixture.bus.subscribe(subjects::GET_DECISION, None, 16).await.unwrap();

    let mut raw = fixture.connect().await;
    raw.submit_v1(json!({"request_id": "s", "wait": "stream"})).await;
    let request: Value = serde_json::from_slice(&requests.next().await.unwrap().payload).unwrap();
    let _unanswered = looks.next().await.unwrap();

    publish_chunk(&fixture.bus, "s", 0).await;
    let (kind, value) = raw.answer().await;
    assert_eq!((kind, &value["data"]), (FrameType::StreamData, &json!("c0")));

    let result = json!({"version": "1", "assignment_id": "a", "request_id": "s", "status": "success",
        "provider_id": "p", "job": {"type": "t"}, "chunks": 1});
    let payload = result.to_string().into();
    let subject = request["result_subject"].as_str().unwrap().into();
    fixture
        .bus
        .publish(Message { subject, payload, ..Message::default() })
        .await
        .unwrap();
    assert_eq!(raw.answer().await.0, FrameType::StreamComplete);
}

#[tokio::test]
async fn subscriber_of_a_running_task_names_where_its_result_goes() {
    let fixture = Fixture::start(|_| {}).await;
    let mut queries = fixture.bus.subscribe(subjects::GET_DECISION, None, 16).await.unwrap();
    let mut raw = fixture.connect().await;
    raw.frame(Version::V1, FrameType::StreamSubscribe, r#"{"task_id":"s"}"#)
        .await;

    let query = queries.next().await.unwrap();
    let asked: Value = serde_json::from_slice(&query.payload).unwrap();
    let task = json!({"task_id": "s", "state": "running", "tenant_id": "default", "assignment_id": "a"});
    let to = &asked["result_subject"];
    let payload = json!({"ok": true, "task": task, "result_subject": to})
        .to_string()
        .into();
    let subject = query.reply.unwrap();
    fixture
        .bus
        .publish(Message { subject, payload, ..Message::default() })
        .await
        .unwrap();

    let result = json!({"version": "1", "assignment_id": "a", "request_id": "s", "status": "success",
        "provider_id": "p", "job": {"type": "t"}});
    let (subject, payload): (Arc<str>, bytes::Bytes) = (to.as_str().unwrap().into(), result.to_string().into());
    // The gateway follows the task once it has the router's answer.
    testkit::eventually(Duration::from_secs(10), async || {
        let copy = Message { subject: subject.clone(), payload: payload.clone(), ..Message::default() };
        fixture.bus.publish(copy).await.unwrap();
        tokio::time::timeout(Duration::from_millis(100), raw.stream.readable())
            .await
            .is_ok()
    })
    .await;
    assert_eq!(raw.answer().await.0, FrameType::StreamComplete);
}

#[tokio::test]
async fn waiting_requests_share_a_bound_on_their_looks() {
    let fixture = Fixture::start(|config| config.request_timeout = Duration::from_secs(60)).await;
    fixture.echo_router().await;
    let mut looks = fixture.bus.subscribe(subjects::GET_DECISION, None, 1000).await.unwrap();

    let mut raw = fixture.connect().await;
    for id in 0..100 {
        raw.submit_v2(id, json!({"wait": "result"})).await;
    }
    let mut unanswered = Vec::new();
    for _ in 0..32 {
        unanswered.push(looks.next().await.unwrap());
    }
    // The first looks are due after at most 375 ms; a second is enough for more than 32 of them.
    let more = tokio::time::timeout(Duration::from_secs(1), looks.next()).await;
    assert!(more.is_err(), "a 33rd look before another is answered");

    let unknown = json!({"ok": false, "error": {"code": "not_found", "message": "no"}, "context": {}});
    let (subject, payload) = (unanswered.pop().unwrap().reply.unwrap(), unknown.to_string().into());
    fixture
        .bus
        .publish(Message { subject, payload, ..Message::default() })
        .await
        .unwrap();
    looks.next().await.unwrap();
}

#[tokio::test]
async fn waiting_request_looks_soon_after_the_bus_was_away() {
    let mut server = testkit::NatsServer::start().await;
    let nats = || bus::nats::Nats::connect(bus::nats::NatsConfig { url: server.url(), ..Default::default() });
    let (ours, theirs) = (nats().await.unwrap(), nats().await.unwrap());
    let fixture = Fixture::on(ours, |_| {}).await;
    let mut requests = theirs.subscribe(subjects::DECIDE, None, 8).await.unwrap();
    let mut looks = theirs.subscribe(subjects::GET_DECISION, None, 8).await.unwrap();

    let mut raw = fixture.connect().await;
    raw.submit_v2(1, json!({"request_id": "r", "wait": "result"})).await;
    let request = requests.next().await.unwrap();
    let asked: Value = serde_json::from_slice(&request.payload).unwrap();
    let mut decided = decision(&asked);
    // A copy will come, so the looks become rare.
    decided["result_subject"] = asked["result_subject"].clone();
    let (subject, payload) = (request.reply.unwrap(), decided.to_string().into());
    theirs
        .publish(Message { subject, payload, ..Message::default() })
        .await
        .unwrap();
    // The pause after the fifth look is eight seconds or longer.
    for _ in 0..5 {
        let (subject, payload) = (looks.next().await.unwrap().reply.unwrap(), "{}".into());
        theirs
            .publish(Message { subject, payload, ..Message::default() })
            .await
            .unwrap();
    }

    server.kill();
    server.restart().await;
    tokio::time::timeout(Duration::from_secs(5), looks.next())
        .await
        .expect("a look soon after the reconnect");
}

async fn publish_chunk(bus: &Bus, id: &str, seq: u64) {
    let chunk = json!({"request_id": id, "assignment_id": "a", "attempt": 1, "seq": seq, "data": format!("c{seq}")});
    let subject = subjects::output(id).into();
    bus.publish(Message { subject, payload: chunk.to_string().into(), ..Message::default() })
        .await
        .unwrap();
}

#[tokio::test]
async fn client_crate_works_against_the_gateway() {
    let fixture = Fixture::start(|_| {}).await;
    fixture.echo_router().await;
    let client = client::Client::connect(&fixture.dir.path().join("s")).await.unwrap();
    client.ping().await.unwrap();
    assert_eq!(client.capabilities().await.unwrap().protocol_versions, [1, 2]);

    let many = (0..200).map(|n| {
        let client = client.clone();
        async move {
            let submit = json!({"command": "task_submit", "task_type": format!("t{n}")});
            let answer = client.submit(&submit).await.unwrap();
            assert_eq!(answer["decision"]["provider_id"], format!("t{n}"));
        }
    });
    futures_util::future::join_all(many).await;

    let refused = client.query("unknown").await.unwrap_err();
    assert!(matches!(refused, client::Error::Refused(ref e) if e.error.code == 11), "{refused}");

    let missing = client::Client::connect(&fixture.dir.path().join("nowhere"))
        .await
        .err()
        .unwrap();
    assert!(missing.to_string().contains("is the gateway running?"), "{missing}");
}
