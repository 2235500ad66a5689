//! v1 clients get the same bytes in the same order, however their input is split.

use crate::{Fixture, task};
use bytes::BytesMut;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use wire::ipc::{Frame, FrameType, Version};

/// Valid and invalid frames on one connection. The last one breaks the framing, so the gateway closes the connection.
fn conversation() -> Vec<Vec<u8>> {
    let frame = |kind: FrameType, payload: &str| {
        let mut bytes = BytesMut::new();
        Frame::new(Version::V1, kind, payload.as_bytes().to_vec()).encode(&mut bytes);
        bytes.to_vec()
    };
    let submit = |id: &str, task_type: &str| {
        task(json!({"request_id": id, "trace_id": "0af7651916cd43dd8448eb211c80319c", "task_type": task_type}))
    };
    vec![
        hex::decode("0000000601f0").unwrap(),
        frame(FrameType::Capabilities, ""),
        frame(FrameType::TaskSubmit, &submit("one", "slow")),
        frame(FrameType::TaskSubmit, &submit("two", "fast")),
        frame(FrameType::Ping, "with a payload"),
        frame(FrameType::TaskSubmit, &submit("three", "refused")),
        frame(FrameType::TaskSubmit, "{"),
        frame(FrameType::ResponseOk, "{}"),
        hex::decode("00000008017f0000").unwrap(),
        frame(FrameType::TaskSubmit, &submit("four", "")),
        frame(
            FrameType::TaskSubmit,
            &task(json!({"request_id": "five", "context": "x".repeat(18_000), "trace_id": "t"})),
        ),
        frame(FrameType::TaskQuery, r#"{"command":"task_query"}"#),
        frame(FrameType::TaskSubmit, &submit("six", "slow")),
        frame(FrameType::Ping, ""),
        hex::decode("0000000609f0").unwrap(),
    ]
}

/// Sends `pieces` one by one and returns everything that comes back.
async fn answers(fixture: &Fixture, pieces: impl IntoIterator<Item = &[u8]>) -> Vec<u8> {
    let stream = UnixStream::connect(fixture.dir.path().join("s")).await.unwrap();
    let (mut reader, mut writer) = stream.into_split();
    let send = async {
        for piece in pieces {
            writer.write_all(piece).await.unwrap();
            // Lets the gateway read this piece before the next one.
            tokio::task::yield_now().await;
        }
    };

    let receive = async {
        let mut received = Vec::new();
        let _ = reader.read_to_end(&mut received).await;
        received
    };
    tokio::join!(send, receive).1
}

#[tokio::test]
async fn answers_do_not_depend_on_how_the_bytes_were_split() {
    // Some frames are sent byte by byte, and the machine may be slow.
    let fixture = Fixture::start(|config| config.read_timeout = std::time::Duration::from_secs(600)).await;
    fixture
        .router(|request: Value, _| async move {
            let ids = json!({"request_id": request["request_id"], "trace_id": request["trace_id"]});
            match request["task"]["type"].as_str().unwrap() {
                "refused" => {
                    let error = json!({"code": "policy_not_found", "message": "none", "details": {"policy": "p"}});
                    return Some(json!({"ok": false, "error": error, "context": ids}));
                }
                "slow" => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
                _ => {}
            }
            Some(json!({"ok": true, "decision": {"provider_id": "p"}, "context": ids}))
        })
        .await;

    let frames = conversation();
    let whole: Vec<u8> = frames.concat();
    let expected = answers(&fixture, [&whole[..]]).await;

    let mut kinds = Vec::new();
    let mut rest = BytesMut::from(&expected[..]);
    while let Some(frame) = wire::ipc::Decoder.decode(&mut rest).unwrap() {
        assert_eq!(frame.version, Version::V1);
        kinds.push((frame.frame_type().unwrap(), frame.payload));
    }
    assert!(rest.is_empty());

    use FrameType::{Pong, ResponseError as Error, ResponseOk as Ok};
    let types: Vec<FrameType> = kinds.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(types, [Pong, Ok, Ok, Ok, Pong, Error, Error, Error, Error, Error, Ok, Error, Ok, Pong, Error]);

    let ids: Vec<String> = kinds
        .iter()
        .filter_map(|(_, payload)| {
            serde_json::from_slice::<Value>(payload).ok()?["context"]["request_id"]
                .as_str()
                .map(String::from)
        })
        .collect();
    assert_eq!(ids, ["one", "two", "three", "five", "six"]);

    assert_eq!(answers(&fixture, frames.iter().map(|frame| &frame[..])).await, expected, "frame by frame");
    for length in [1, 2, 3, 5, 7, 64, 1000, 16_384] {
        assert!(answers(&fixture, whole.chunks(length)).await == expected, "split into {length} bytes");
    }
}
