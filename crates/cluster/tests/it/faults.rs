//! Panics: a session that panics leaks nothing, and a loop that panics ends the node.

use crate::client::{Client, to};
use crate::node::{DEADLINE, Node};
use serde_json::json;
use testkit::RedisServer;
use tokio_tungstenite::tungstenite::Message;
use tracing::field::Field;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata};
use wire::realtime::Encoding;

/// A subscriber that panics on the test's thread when an event with this text is logged, to simulate a bug there.
struct PanicAt(&'static str);

impl tracing::Subscriber for PanicAt {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = String::new();
        event.record(&mut |field: &Field, value: &dyn std::fmt::Debug| {
            if field.name() == "message" {
                text = format!("{value:?}");
            }
        });
        assert!(!text.contains(self.0), "a deliberate panic at {text:?}");
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[tokio::test]
async fn panic_before_connect_frees_the_slot() {
    let node = Node::start_with(|config| config.max_connections = 1).await;
    let mut ann = Client::open(&node, Encoding::Json).await;
    let _fault = tracing::subscriber::set_default(PanicAt("cannot decode a client's message"));
    futures_util::SinkExt::send(&mut ann.socket, Message::text("{"))
        .await
        .unwrap();
    assert_eq!(ann.closed().await, 1006, "the session ends without a close frame");

    // A full node would refuse the upgrade. The close above shows that the panic has unwound and freed the slot.
    let _bob = Client::connect(&node, "bob").await;
    node.stop().await;
}

#[tokio::test]
async fn panicked_session_leaves_its_channels_and_frees_its_slot() {
    let node = Node::start_with(|config| config.max_connections = 2).await;
    let mut bob = Client::connect(&node, "bob").await;
    bob.subscribe(to("chat:lobby")).await;
    bob.push().await;
    let mut ann = Client::connect(&node, "ann").await;
    ann.subscribe(to("chat:lobby")).await;
    ann.subscribe(to("news")).await;
    assert_eq!(bob.push().await.join.unwrap().info.unwrap().user, "ann");

    let _fault = tracing::subscriber::set_default(PanicAt("cannot decode a client's message"));
    futures_util::SinkExt::send(&mut ann.socket, Message::text("{"))
        .await
        .unwrap();
    assert_eq!(ann.closed().await, 1006, "the session ends without a close frame");

    assert_eq!(bob.push().await.leave.unwrap().info.unwrap().user, "ann", "the others receive the leave");

    let mut statuses = node.bus.subscribe(wire::subjects::NODE_STATUS, None, 16).await.unwrap();
    let empty = async {
        loop {
            let status = statuses.next().await.unwrap().payload;
            let status: wire::status::NodeStatus = serde_json::from_slice(&status).unwrap();
            if (status.connections, status.users, status.channels) == (1, 1, 1) {
                return;
            }
        }
    };
    tokio::time::timeout(DEADLINE, empty)
        .await
        .expect("only bob is left in the hub and among the clients");

    let there = node.call("presence", &json!({"channel": "news"})).await;
    assert_eq!(there["result"]["presence"], json!({}));
    let there = bob.presence("chat:lobby").await.presence.unwrap().presence;
    assert_eq!(there.into_values().map(|info| info.user).collect::<Vec<_>>(), ["bob"]);
    let _carol = Client::open(&node, Encoding::Json).await;
    node.stop().await;
}

#[tokio::test]
async fn panicked_redis_follower_ends_the_node() {
    let redis = RedisServer::start().await;
    let node = crate::redis::start(&redis.url(), "n1").await;
    let mut ann = Client::connect(&node, "ann").await;
    ann.subscribe(to("news")).await;

    let _fault = tracing::subscriber::set_default(PanicAt("cannot decode a message from Redis"));
    redis.command("PUBLISH beamline:topic:{.news} x").await.unwrap();
    assert_eq!(ann.closed().await, 3001, "its clients are drained");
    let error = node.failed().await;
    assert!(matches!(error, cluster::Error::Panic(_)), "{error}");
}
