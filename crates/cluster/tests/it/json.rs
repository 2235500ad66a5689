//! Embedded JSON passes byte for byte through every entry and every encoding.

use crate::client::{Client, ENCODINGS, to};
use crate::node::{API_KEY, DEADLINE, Node, token};
use bus::{Headers, Message};
use bytes::Bytes;
use serde::Serialize;
use serde_json::value::RawValue;
use wire::realtime::{Command, Encoding, HistoryRequest, RpcRequest};
use wire::subjects;

/// JSON with unsorted and repeated keys, numbers that no float can represent, and line breaks.
const TEXT: &str = "{\"z\":1.10,\r\n \"a\": 12345678901234567890,\n\"z\":[1e400, null]}";

/// [`TEXT`] as it reaches JSON clients, whose messages are single lines.
fn one_line() -> String {
    TEXT.replace(['\r', '\n'], " ")
}

fn expected(encoding: Encoding) -> String {
    match encoding {
        Encoding::Json => one_line(),
        Encoding::Protobuf => TEXT.into(),
    }
}

#[tokio::test]
async fn service_publications_pass_byte_for_byte() {
    let node = Node::start().await;
    for encoding in ENCODINGS {
        let channel = format!("news-{}", encoding.as_str());
        let mut ann = Client::connect_in(&node, encoding, "ann").await;
        ann.subscribe(to(&channel)).await;
        let expected = expected(encoding);

        let publish = format!(r#"{{"channel":"{channel}","data":{TEXT}}}"#);
        let (status, answer) = node.call_for_text(API_KEY, "publish", &publish).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(ann.publication().await.data, expected, "from the server API");

        let bus = |subject, payload: String| node.bus.request(subject, Headers::new(), payload.into(), DEADLINE);
        bus(subjects::CHANNELS_PUBLISH, publish).await.unwrap();
        assert_eq!(ann.publication().await.data, expected, "from the bus");
        let broadcast = format!(r#"{{"channels":["{channel}"],"data":{TEXT}}}"#);
        bus(subjects::CHANNELS_BROADCAST, broadcast).await.unwrap();
        assert_eq!(ann.publication().await.data, expected, "from a broadcast");

        let ask = HistoryRequest { channel: channel.clone(), limit: -1, ..HistoryRequest::default() };
        let history = ann.history(ask).await.publications;
        assert!(history.len() == 3 && history.iter().all(|one| one.data == expected), "{history:?}");

        let ask = format!(r#"{{"channel":"{channel}","limit":-1}}"#);
        let (_, by_api) = node.call_for_text(API_KEY, "history", &ask).await;
        let by_bus = bus(subjects::CHANNELS_HISTORY, ask).await.unwrap().payload;
        for answer in [by_api, String::from_utf8(by_bus.to_vec()).unwrap()] {
            assert_eq!(answer.matches(&format!(r#""data":{}"#, one_line())).count(), 3, "{answer}");
        }
    }
}

#[tokio::test]
async fn null_is_data_and_invalid_json_is_refused() {
    let node = Node::start().await;
    let mut ann = Client::connect(&node, "ann").await;
    ann.subscribe(to("news")).await;
    let publish = async |data: &str| {
        let body = format!(r#"{{"channel":"news",{data}}}"#);
        node.call_with_key(API_KEY, "publish", &body).await.1["error"]["code"]
            .as_u64()
            .unwrap_or(0)
    };

    assert_eq!(publish(r#""data":null"#).await, 0);
    assert_eq!(ann.publication().await.data, "null");
    assert_eq!(publish(r#""data":null,"b64":"MQ==""#).await, 0);
    assert_eq!(ann.publication().await.data, "1");

    for invalid in [r#""data":1.}"#, r#""data":"a\nb""#.replace("\\n", "\n").as_str(), r#""data":[1,]"#, r#""data":01"#]
    {
        assert_eq!(publish(invalid).await, 107, "{invalid}");
    }
    ann.nothing_pushed().await;
}

#[tokio::test]
async fn rpcs_pass_byte_for_byte() {
    let node = Node::start().await;
    let mut calls = node
        .bus
        .subscribe(&subjects::rpc("odd").unwrap(), None, 8)
        .await
        .unwrap();
    for encoding in ENCODINGS {
        let mut ann = Client::connect_in(&node, encoding, "ann").await;
        let asked = expected(encoding);
        let rpc = Some(RpcRequest { method: "odd".into(), data: Bytes::from(asked.clone()) });
        let answering = async {
            let call = calls.next().await.unwrap();
            let answer = Message { subject: call.reply.unwrap(), payload: TEXT.into(), ..Message::default() };
            node.bus.publish(answer).await.unwrap();
            call.payload
        };
        let (payload, reply) = tokio::join!(answering, ann.ask(Command { rpc, ..Command::default() }));
        assert_eq!(payload, asked);
        assert_eq!(reply.rpc.unwrap().data, expected(encoding));
    }
}

#[derive(Serialize)]
struct Claims {
    sub: &'static str,
    info: Box<RawValue>,
}

#[tokio::test]
async fn info_of_a_token_passes_byte_for_byte() {
    let node = Node::start().await;
    let token = token(&Claims { sub: "ann", info: RawValue::from_string(TEXT.into()).unwrap() });
    for encoding in ENCODINGS {
        let channel = format!("news-{}", encoding.as_str());
        let mut ann = Client::connect_with(&node, encoding, &token).await;
        ann.subscribe(to(&channel)).await;
        let there = ann.presence(&channel).await.presence.unwrap().presence;
        assert_eq!(there[&ann.connected.client].conn_info, expected(encoding));
        ann.publish(&channel, "1").await;
        assert_eq!(ann.publication().await.info.unwrap().conn_info, expected(encoding));
    }
}
