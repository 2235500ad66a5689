//! The channels API: over HTTP with the API key, and over the bus.

use crate::client::{Client, ENCODINGS, number, numbers, to};
use crate::node::{DEADLINE, Node};
use base64::Engine;
use bus::{Headers, Message};
use serde_json::{Value, json};
use std::time::Duration;
use testkit::eventually;
use wire::realtime::Encoding;
use wire::status::NodeStatus;
use wire::subjects;

#[tokio::test]
async fn server_api_needs_the_key_and_names_each_error() {
    let node = Node::start().await;
    for key in ["", "wrong", "the-kez", "the-key2"] {
        let (status, answer) = node.call_with_key(key, "info", "{}").await;
        assert_eq!((status, &answer["error"]["code"]), (401, &json!(101)), "{key:?}");
    }
    assert_eq!(node.call("info", &json!({})).await["result"]["nodes"][0]["name"], "n1");

    for (method, body, code) in [
        ("no-such-method", "{}", 104),
        ("publish", "{", 107),
        ("publish", r#"{"data":1}"#, 107),
        ("publish", r#"{"channel":"news"}"#, 107),
        ("publish", r#"{"channel":"news","data":1,"b64":"AA=="}"#, 107),
        ("publish", r#"{"channel":"news","b64":"*"}"#, 107),
        ("publish", r#"{"channel":"nowhere:x","data":1}"#, 102),
        ("publish", r#"{"channel":"","data":1}"#, 107),
        ("history", r#"{"channel":"nowhere:x"}"#, 102),
    ] {
        let (_, answer) = node.call_with_key(crate::node::API_KEY, method, body).await;
        assert_eq!(answer["error"]["code"], code, "{method} {body}: {answer}");
    }

    let without = Node::start_with(|config| config.api_key = String::new()).await;
    assert_eq!(
        without.call_with_key("", "info", "{}").await.0,
        401,
        "an empty key in the settings matches no request"
    );

    let huge = format!(r#"{{"channel":"news","data":"{}"}}"#, "x".repeat(2 * 1024 * 1024));
    let over = format!(r#"{{"channel":"news","data":"{}"}}"#, "x".repeat(1024 * 1024));
    assert_eq!(node.call_with_key(crate::node::API_KEY, "publish", &over).await.1["error"]["code"], 106);
    assert_eq!(node.call_with_key(crate::node::API_KEY, "publish", &huge).await.0, 413);
}

#[tokio::test]
async fn server_api_publishes_reads_and_disconnects() {
    let node = Node::start().await;
    let mut clients = Vec::new();
    for encoding in ENCODINGS {
        let mut client = Client::connect_in(&node, encoding, "ann").await;
        client.subscribe(to("news")).await;
        client.subscribe(to("chat:lobby")).await;
        while client.push().await.join.unwrap().info.unwrap().client != client.connected.client {}
        clients.push(client);
    }
    // Skips the join of the second client.
    clients[0].push().await;

    let first = node
        .call("publish", &json!({"channel": "news", "data": 1, "tags": {"k": "v"}}))
        .await;
    assert_eq!(first["result"]["offset"], 1);
    let keyed = json!({"channel": "news", "data": 2, "idempotency_key": "once"});
    assert_eq!(node.call("publish", &keyed).await["result"]["offset"], 2);
    assert_eq!(
        node.call("publish", &keyed).await["result"]["offset"],
        2,
        "a repeated key is acknowledged and not published again"
    );
    node.call("publish", &json!({"channel": "news", "data": 3, "skip_history": true}))
        .await;
    let positions = node
        .call("broadcast", &json!({"channels": ["news", "chat:lobby"], "data": 4}))
        .await;
    assert_eq!(positions["result"]["positions"][0]["offset"], 3);

    for client in &mut clients {
        let got = client.publication().await;
        assert_eq!((number(&got), got.offset, got.tags["k"].as_str()), (1, 1, "v"));
        for expected in [(2, 2), (3, 0), (4, 3), (4, 1)] {
            let got = client.publication().await;
            assert_eq!((number(&got), got.offset), expected);
        }
        client.nothing_pushed().await;
    }

    let history = node.call("history", &json!({"channel": "news", "limit": -1})).await;
    let data: Vec<&Value> = history["result"]["publications"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| &p["data"])
        .collect();
    assert_eq!(data, [1, 2, 4]);
    let presence = node.call("presence", &json!({"channel": "chat:lobby"})).await;
    assert_eq!(presence["result"]["presence"].as_object().unwrap().len(), 2);
    let channels = node.call("channels", &json!({})).await;
    assert_eq!(channels["result"]["channels"].as_array().unwrap().len(), 2);

    let mut bob = Client::connect(&node, "bob").await;
    assert_eq!(node.call("disconnect", &json!({"user": "ann"})).await, json!({"result": {}}));
    for client in &mut clients {
        assert_eq!(client.closed().await, 3503);
    }
    bob.nothing_pushed().await;
}

async fn ask(node: &Node, subject: &str, request: Value) -> Value {
    let payload = serde_json::to_vec(&request).unwrap().into();
    let answer = node
        .bus
        .request(subject, Headers::new(), payload, DEADLINE)
        .await
        .unwrap();
    serde_json::from_slice(&answer.payload).unwrap()
}

#[tokio::test]
async fn bus_api_publishes_reads_and_disconnects() {
    let node = Node::start().await;
    let mut ann = Client::connect_in(&node, Encoding::Protobuf, "ann").await;
    ann.subscribe(to("app:home#ann")).await;

    let b64 = base64::engine::general_purpose::STANDARD.encode(b"\x00\x01");
    let published = ask(&node, subjects::CHANNELS_PUBLISH, json!({"channel": "app:home#ann", "b64": b64})).await;
    assert_eq!((&published["ok"], &published["result"]["offset"]), (&json!(true), &json!(1)));
    assert_eq!(&ann.publication().await.data[..], b"\x00\x01");

    let channels = json!({"channels": ["app:home#ann", "news"], "data": {"n": 1}});
    assert_eq!(ask(&node, subjects::CHANNELS_BROADCAST, channels).await["ok"], true);
    assert_eq!(&ann.publication().await.data[..], br#"{"n":1}"#);

    let history = ask(&node, subjects::CHANNELS_HISTORY, json!({"channel": "news", "limit": -1})).await;
    assert_eq!(history["result"]["publications"][0]["data"], json!({"n": 1}));
    ann.subscribe(to("news")).await;
    let presence = ask(&node, subjects::CHANNELS_PRESENCE, json!({"channel": "news"})).await;
    assert_eq!(presence["result"]["presence"][&ann.connected.client]["user"], "ann");

    let refused = ask(&node, subjects::CHANNELS_PUBLISH, json!({"channel": "nowhere:x", "data": 1})).await;
    assert_eq!((&refused["ok"], &refused["error"]["code"]), (&json!(false), &json!(102)));
    assert_eq!(ask(&node, subjects::CHANNELS_PUBLISH, json!([])).await["error"]["code"], 107);
    assert_eq!(ask(&node, subjects::CHANNELS_DISCONNECT, json!({"user": "ann"})).await["ok"], true);
    assert_eq!(ann.closed().await, 3503);
}

#[tokio::test]
async fn node_publishes_its_status() {
    let node = Node::start().await;
    let mut statuses = node.bus.subscribe(subjects::NODE_STATUS, None, 100).await.unwrap();
    let mut ann = Client::connect(&node, "ann").await;
    ann.subscribe(to("news")).await;
    node.publish("news", json!(1)).await;
    assert_eq!(numbers(&[ann.publication().await]), [1]);

    let seen = async {
        loop {
            let status: NodeStatus = serde_json::from_slice(&statuses.next().await.unwrap().payload).unwrap();
            if status.connections == 1 && status.deliveries_total == 1 {
                return status;
            }
        }
    };
    let status = tokio::time::timeout(DEADLINE, seen).await.unwrap();
    assert_eq!((status.node.as_str(), status.engine.as_str(), status.users), ("n1", "memory", 1));
    assert_eq!((status.channels, status.publications_total, status.connects_total), (1, 1, 1));

    ann.cut();
    let gone = || async { node.call("info", &json!({})).await["result"]["nodes"][0]["num_clients"] == 0 };
    eventually(Duration::from_secs(5), gone).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn publications_of_one_publisher_keep_their_order() {
    keeps_order(&Node::start_with(|config| config.client_queue = 16 * 1024 * 1024).await).await;
}

/// Publications sent without waiting for their answers are delivered in the order in which they were sent.
pub async fn keeps_order(node: &Node) {
    let mut ann = Client::connect(node, "ann").await;
    ann.subscribe(to("news")).await;
    for number in 0..2000 {
        let payload = json!({"channel": "news", "data": number}).to_string().into();
        let subject = subjects::CHANNELS_PUBLISH.into();
        node.bus
            .publish(Message { subject, payload, ..Message::default() })
            .await
            .unwrap();
    }
    for expected in 0..2000 {
        assert_eq!(number(&ann.publication().await), expected);
    }
}
