//! RPCs: a client's call is answered by a service on the bus.

use crate::client::{Client, ENCODINGS, code};
use crate::node::Node;
use bus::{Bus, Headers, Message, Subscription};
use bytes::Bytes;
use wire::channels::{RPC_CLIENT, RPC_ENCODING, RPC_ERROR_CODE, RPC_USER};
use wire::realtime::{Command, Encoding, Reply, RpcRequest};

async fn serve(bus: &Bus, method: &str) -> Subscription {
    bus.subscribe(&wire::subjects::rpc(method).unwrap(), None, 100)
        .await
        .unwrap()
}

async fn answer(bus: &Bus, to: &Message, headers: Headers, payload: impl Into<Bytes>) {
    let message = Message {
        subject: to.reply.clone().unwrap(),
        headers,
        payload: payload.into(),
        ..Message::default()
    };
    bus.publish(message).await.unwrap();
}

fn call(id: u32, method: &str, data: impl Into<Bytes>) -> Command {
    Command {
        id,
        rpc: Some(RpcRequest { method: method.into(), data: data.into() }),
        ..Command::default()
    }
}

#[tokio::test]
async fn rpc_reaches_the_service_and_its_answer_the_client() {
    let node = Node::start().await;
    let mut calls = serve(&node.bus, "greet").await;
    for (encoding, data) in [(Encoding::Json, &br#"{"n":1.0}"#[..]), (Encoding::Protobuf, &b"\xff\x00"[..])] {
        let mut ann = Client::connect_in(&node, encoding, "ann").await;
        ann.send(&[call(7, "greet", data)]).await;
        let asked = calls.next().await.unwrap();
        assert_eq!(&asked.payload[..], data);
        assert_eq!(asked.headers.get(RPC_USER), Some("ann"));
        assert_eq!(asked.headers.get(RPC_CLIENT), Some(ann.connected.client.as_str()));
        assert_eq!(asked.headers.get(RPC_ENCODING), Some(encoding.as_str()));

        answer(&node.bus, &asked, Headers::new(), data).await;
        assert_eq!(&ann.reply(7).await.rpc.unwrap().data[..], data);

        ann.send(&[call(8, "greet", "1")]).await;
        let asked = calls.next().await.unwrap();
        answer(&node.bus, &asked, Headers::new().with(RPC_ERROR_CODE, "403"), "not today").await;
        let error = ann.reply(8).await.error.unwrap();
        assert_eq!((error.code, error.message.as_str(), error.temporary), (403, "not today", false));
    }
}

#[tokio::test]
async fn unserved_methods_are_not_found() {
    let node = Node::start().await;
    for encoding in ENCODINGS {
        let mut ann = Client::connect_in(&node, encoding, "ann").await;
        for method in ["nobody", "", "a.*", ">", "with space", "über"] {
            assert_eq!(code(&ann.ask(call(0, method, "1")).await), 104, "{method:?}");
        }
    }
}

/// A slow RPC delays neither other RPCs nor other commands. RPCs beyond the limit are refused.
#[tokio::test]
async fn rpcs_run_concurrently_up_to_a_limit() {
    let node = Node::start().await;
    let mut calls = serve(&node.bus, "slow").await;
    let mut ann = Client::connect(&node, "ann").await;
    let many: Vec<Command> = (100..140).map(|id| call(id, "slow", id.to_string())).collect();
    ann.send(&many).await;

    let mut refused = 0;
    for _ in 0..40 - 32 {
        let Reply { error: Some(error), .. } = ann.next().await.unwrap() else {
            panic!("expected an error")
        };
        assert_eq!((error.code, error.temporary), (111, true));
        refused += 1;
    }
    ann.nothing_pushed().await;

    let mut waiting = Vec::new();
    for _ in 0..40 - refused {
        waiting.push(calls.next().await.unwrap());
    }
    for asked in waiting.iter().rev() {
        answer(&node.bus, asked, Headers::new(), asked.payload.clone()).await;
        let id: u32 = String::from_utf8_lossy(&asked.payload).parse().unwrap();
        assert_eq!(&ann.reply(id).await.rpc.unwrap().data[..], &asked.payload[..]);
    }
}
