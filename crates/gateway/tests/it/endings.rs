//! How connections and their requests in flight end: by lost framing, by a timeout, by a drain.

use crate::{Fixture, Raw, decision, task};
use bytes::BytesMut;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use wire::ipc::{Frame, FrameType, Version};

/// A router that answers once the gate opens, and never answers a request called `never`.
async fn held(change: impl FnOnce(&mut gateway::Config)) -> (Fixture, Arc<Semaphore>) {
    let fixture = Fixture::start(change).await;
    let gate = Arc::new(Semaphore::new(0));
    let held = gate.clone();
    let answer = move |request: Value, _| {
        let gate = held.clone();
        async move {
            if request["request_id"] == "never" {
                std::future::pending::<()>().await;
            }
            let _open = gate.acquire().await.unwrap();
            Some(decision(&request))
        }
    };
    fixture.router(answer).await;
    (fixture, gate)
}

/// Waits until the gateway has read everything sent before.
async fn seen(raw: &mut Raw) {
    raw.frame(Version::V2 { request_id: 99, deadline_ms: 0 }, FrameType::Ping, "")
        .await;
    assert_eq!(raw.answer().await.0, FrameType::Pong);
}

/// Waits until the read timeout has passed for every frame that had begun before.
async fn read_timeout_passes(fixture: &Fixture) {
    let mut slow = fixture.connect().await;
    slow.send(&[0, 0, 0]).await;
    assert_eq!(slow.error_code().await, 5);
}

fn large(kib: usize) -> Vec<u8> {
    let payload = task(json!({"context": "x".repeat(kib * 1024)}));
    let mut bytes = BytesMut::new();
    Frame::new(Version::V1, FrameType::TaskSubmit, payload.into_bytes()).encode(&mut bytes);
    bytes.to_vec()
}

#[tokio::test]
async fn requests_before_lost_framing_are_answered() {
    let framing = |hex: &str| hex::decode(hex).unwrap();
    for (name, rest, code) in [
        ("version", framing("0000000609f0"), 1),
        ("length", framing("00000001"), 4),
        ("too large", framing("00400001"), 3),
        ("never complete", framing("000000ff01"), 5),
    ] {
        let (fixture, gate) = held(|config| config.read_timeout = Duration::from_millis(50)).await;

        let mut raw = fixture.connect().await;
        raw.submit_v2(1, json!({"request_id": "v2"})).await;
        raw.submit_v1(json!({"request_id": "first"})).await;
        raw.submit_v1(json!({"request_id": "second"})).await;
        seen(&mut raw).await;
        raw.send(&rest).await;
        read_timeout_passes(&fixture).await;
        // The gateway no longer reads this request.
        raw.submit_v2(2, json!({})).await;
        gate.add_permits(1);

        let (mut v1, mut v2) = (Vec::new(), Vec::new());
        while let Some(frame) = raw.next().await {
            let value: Value = serde_json::from_slice(&frame.payload).unwrap();
            let answers = if frame.version == Version::V1 { &mut v1 } else { &mut v2 };
            answers.push([value["context"]["request_id"].clone(), value["error"]["code"].clone()]);
        }

        assert_eq!(v2, [[json!("v2"), Value::Null]], "{name}");
        let expected = [[json!("first"), Value::Null], [json!("second"), Value::Null], [Value::Null, json!(code)]];
        assert_eq!(v1, expected, "{name}");
    }
}

#[tokio::test]
async fn frame_behind_a_v1_stream_is_not_late() {
    let (fixture, gate) = held(|config| config.read_timeout = Duration::from_millis(50)).await;
    let mut raw = fixture.connect().await;
    seen(&mut raw).await;
    raw.submit_v1(json!({"wait": "stream", "timeout_ms": 1000})).await;
    raw.frame(Version::V1, FrameType::Ping, "").await;

    raw.send(&large(20)[..19_000]).await;
    read_timeout_passes(&fixture).await;

    gate.add_permits(1);
    assert_eq!(
        raw.answer().await.0,
        FrameType::StreamError,
        "no worker runs the task, so its deadline ends the stream"
    );
    assert_eq!(raw.answer().await.0, FrameType::Pong);
    raw.send(&large(20)[19_000..]).await;
    assert_eq!(raw.answer().await.0, FrameType::ResponseOk);
}

#[tokio::test]
async fn drain_timeout_answers_every_request_that_waits() {
    let (fixture, _gate) = held(|config| config.drain_timeout = Duration::from_millis(50)).await;
    let mut raw = fixture.connect().await;

    let submit = |version, fields: Value| {
        let mut bytes = BytesMut::new();
        Frame::new(version, FrameType::TaskSubmit, task(fields).into_bytes()).encode(&mut bytes);
        bytes.to_vec()
    };
    let v2 = |request_id| Version::V2 { request_id, deadline_ms: 0 };
    let ping = hex::decode("0000000601f0").unwrap();

    raw.send(&submit(v2(1), json!({"request_id": "never"}))).await;
    raw.send(&submit(Version::V1, json!({"request_id": "never"}))).await;
    raw.send(&ping).await;
    // The PONG shows that all frames have arrived. The stream and the requests behind it wait for their turn.
    let mut rest = hex::decode("0000001402f00000000000000000006300000000").unwrap();
    rest.extend(submit(Version::V1, json!({"wait": "stream"})));
    rest.extend(submit(Version::V1, json!({"request_id": "behind"})));
    rest.extend(submit(v2(2), json!({"request_id": "behind"})));
    raw.send(&rest).await;
    assert_eq!(raw.next().await.unwrap().version, v2(99));

    fixture.cancel.cancel();
    let (mut in_order, mut others) = (Vec::new(), Vec::new());
    while let Some(frame) = raw.next().await {
        let code = serde_json::from_slice::<Value>(&frame.payload).map_or(0, |v| v["error"]["code"].as_u64().unwrap());
        if frame.version == Version::V1 {
            in_order.push(code)
        } else {
            others.push((frame.version, code))
        }
    }

    assert_eq!(in_order, [6, 0, 6, 6]);
    others.sort_by_key(|(version, _)| format!("{version:?}"));
    assert_eq!(others, [(v2(1), 6), (v2(2), 6)]);
    fixture.running.await.unwrap().unwrap();
}

#[tokio::test]
async fn client_that_waits_for_the_receive_budget_is_not_timed_out_as_slow() {
    let (fixture, gate) = held(|config| {
        config.receive_budget = 256 * 1024;
        config.read_timeout = Duration::from_millis(200);
    })
    .await;

    gate.add_permits(1);
    let bytes = large(200);
    // The PONG shows that the partial frame behind the PING has been read too.
    let ping = hex::decode("0000000601f0").unwrap();
    let begin = async |part: &[u8]| {
        let mut raw = fixture.connect().await;
        raw.send(&[&ping, part].concat()).await;
        assert_eq!(raw.answer().await.0, FrameType::Pong);
        raw
    };
    // The other frame waits until the one that holds the budget is complete.
    let mut holder = begin(&bytes[..20_000]).await;
    let mut waits = begin(&bytes[..20_000]).await;
    holder.send(&bytes[20_000..]).await;
    assert_eq!(holder.answer().await.0, FrameType::ResponseOk);
    waits.send(&bytes[20_000..]).await;
    assert_eq!(waits.answer().await.0, FrameType::ResponseOk);

    // No frame is completed: the holder of the budget is slow, and the budget is exhausted for the third client.
    let mut first = begin(&bytes[..20_000]).await;
    let mut second = begin(&bytes[..20_000]).await;
    let mut third = begin(&bytes[..20_000]).await;

    let (mut reader, mut writer) = third.stream.split();
    let answered = async {
        let mut input = BytesMut::new();
        loop {
            if let Some(frame) = wire::ipc::Decoder.decode(&mut input).unwrap() {
                break frame;
            }
            assert!(
                tokio::io::AsyncReadExt::read_buf(&mut reader, &mut input)
                    .await
                    .unwrap()
                    > 0,
                "the connection closed without an answer"
            );
        }
    };
    // The third client sends its whole frame, but the gateway may read only a part.
    let (_, answered) = tokio::join!(writer.write_all(&bytes[20_000..]), answered);

    assert_eq!(first.error_code().await, 5);
    // The second either took over the budget, or timed out waiting for it.
    let second = second.error_code().await;
    assert!(matches!(second, 5 | 10), "{second}");
    // The third timed out waiting, unless both had returned the budget before.
    if answered.frame_type() != Some(FrameType::ResponseOk) {
        let answer: Value = serde_json::from_slice(&answered.payload).unwrap();
        assert_eq!(answer["error"]["code"], 10, "{answer}");
        assert!(answer["error"]["retry_after_ms"].as_u64().unwrap() > 0, "{answer}");
    }
}

#[tokio::test]
async fn frame_larger_than_the_whole_receive_budget_is_served() {
    let (fixture, gate) = held(|config| config.receive_budget = 64 * 1024).await;

    gate.add_permits(1);
    for _ in 0..2 {
        let mut raw = fixture.connect().await;
        raw.send(&large(500)).await;
        assert_eq!(raw.answer().await.0, FrameType::ResponseOk);
    }
}

#[tokio::test]
async fn requests_are_answered_once_the_client_reads_again() {
    const ASKED: usize = 30_000;
    let fixture = Fixture::start(|_| {}).await;
    let mut raw = fixture.connect().await;
    let (reader, mut writer) = raw.stream.into_split();
    let bytes = hex::decode("0000000601f2").unwrap().repeat(ASKED);

    let writing = tokio::spawn(async move {
        writer.write_all(&bytes).await.unwrap();
        writer
    });
    // The answers total 13 MB, more than the gateway buffers for a client that does not read.
    raw.stream = reader.reunite(writing.await.unwrap()).unwrap();

    for asked in 0..ASKED {
        assert_eq!(raw.answer().await.0, FrameType::ResponseOk, "{asked}");
    }
}
