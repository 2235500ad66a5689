//! Authorization: which channels exist, and which clients may use them.

use crate::client::{Client, ENCODINGS, code, to};
use crate::node::{Node, now_s, sign, token};
use cluster::{Namespace, Overrides, Rules};
use serde_json::json;
use wire::limits::{CHANNEL_MAX, CHANNELS_PER_CLIENT_MAX};
use wire::realtime::{Encoding, SubscribeRequest};

/// Subscribes and expects this error code; 0 means success.
async fn check(client: &mut Client, channel: &str, token: &str, expected: u32) {
    let reply = client
        .try_subscribe(SubscribeRequest { token: token.into(), ..to(channel) })
        .await;
    let got = reply.error.as_ref().map_or(0, |error| error.code);
    assert_eq!(got, expected, "{channel:?}: {reply:?}");
}

#[tokio::test]
async fn subscribing_follows_the_rules_of_the_channel() {
    let node = Node::start().await;
    let claims = |sub: &str, channel: &str| json!({"sub": sub, "channel": channel, "exp": now_s() + 60});
    for encoding in ENCODINGS {
        let mut ann = Client::connect_in(&node, encoding, "ann").await;
        let long = "x".repeat(CHANNEL_MAX + 1);
        for (channel, expected) in [
            ("news", 0),
            ("app:home#ann", 0),
            ("app:home#bob,ann", 0),
            ("app:home#bob", 103),
            ("app:home#annette", 103),
            ("app:home", 103),
            ("app:home#", 103),
            ("news#bob", 103),
            ("chat:lobby", 0),
            ("ops:nodes", 0),
            ("nowhere:x", 102),
            (":x", 102),
            ("", 107),
            (&long, 107),
            (&long[1..], 0),
            ("a\nb", 107),
            ("$vip", 103),
            ("$app:home#ann", 103),
        ] {
            check(&mut ann, channel, "", expected).await;
        }

        check(&mut ann, "$vip", &token(&claims("ann", "$vip")), 0).await;
        check(&mut ann, "$app:x#ann", &token(&claims("ann", "$app:x#ann")), 0).await;
        check(&mut ann, "$v2", &token(&claims("bob", "$v2")), 103).await;
        check(&mut ann, "$v2", &token(&claims("ann", "$vip")), 103).await;
        check(&mut ann, "$v2", &sign(b"other", &claims("ann", "$v2")), 103).await;
        check(&mut ann, "$v2", "x", 103).await;
        check(&mut ann, "$v2", &token(&json!({"sub": "ann", "channel": "$v2", "exp": 1})), 109).await;
        check(&mut ann, "$app:x#bob", &token(&claims("ann", "$app:x#bob")), 103).await;
    }

    let mut nobody = Client::connect_with(&node, Encoding::Json, &token(&json!({"sub": ""}))).await;
    check(&mut nobody, "news", "", 103).await;
}

#[tokio::test]
async fn publishing_follows_the_rules_of_the_channel() {
    let node = Node::start().await;
    for encoding in ENCODINGS {
        let mut ann = Client::connect_in(&node, encoding, "ann").await;
        for channel in ["chat:lobby", "app:home#ann", "ops:nodes", "$vip", "news#bob"] {
            assert_eq!(code(&ann.publish(channel, "1").await), 103, "{channel}");
        }
        assert_eq!(code(&ann.publish("nowhere:x", "1").await), 102);
        assert_eq!(code(&ann.publish("news", "").await), 107, "a publication must have data");
        assert!(ann.publish("news", "1").await.publish.is_some());
    }
}

#[tokio::test]
async fn overriding_one_rule_of_a_built_in_namespace_keeps_the_others() {
    let node = Node::start_with(|config| {
        let entry = |name: &str| (name.to_string(), Overrides { history_size: Some(5), ..Overrides::default() });
        config.namespaces = cluster::namespaces(&["app", "chat", "ops"].map(entry), &config.defaults);
    })
    .await;
    let mut ann = Client::connect(&node, "ann").await;
    for channel in ["chat:lobby", "app:home#ann", "ops:nodes"] {
        assert_eq!(code(&ann.publish(channel, "1").await), 103, "{channel}");
        check(&mut ann, channel, "", 0).await;
    }
    for channel in ["app:home", "app:home#bob"] {
        check(&mut ann, channel, "", 103).await;
    }
}

#[tokio::test]
async fn error_names_the_setting_that_would_allow_it() {
    let node = Node::start_with(|config| {
        let rules = Rules { history_size: 0, presence: false, ..Rules::default() };
        config.namespaces.push(Namespace { name: "bare".into(), rules });
    })
    .await;
    let mut ann = Client::connect(&node, "ann").await;
    let subscribed = ann.subscribe(to("bare:x")).await;
    assert!(!subscribed.recoverable && !subscribed.positioned);
    assert!(ann.publish("bare:x", "1").await.publish.is_some());
    assert_eq!(ann.publication().await.offset, 0);

    let reply = ann.presence("bare:x").await;
    assert_eq!(code(&reply), 108);
    assert!(reply.error.unwrap().message.contains("presence = true"));
    let ask = wire::realtime::HistoryRequest { channel: "bare:x".into(), limit: -1, ..Default::default() };
    let reply = ann.try_history(ask).await;
    assert_eq!(code(&reply), 108);
    assert!(reply.error.unwrap().message.contains("history_size"));
}

#[tokio::test]
async fn subscriptions_of_a_connection_are_limited() {
    let node = Node::start().await;
    let mut ann = Client::connect(&node, "ann").await;
    for number in 0..CHANNELS_PER_CLIENT_MAX {
        ann.subscribe(to(&format!("c{number}"))).await;
    }
    assert_eq!(code(&ann.try_subscribe(to("one-more")).await), 106);
    ann.unsubscribe("c0").await;
    ann.subscribe(to("one-more")).await;
}
