//! Clients on channels: publish, presence, joins and leaves, private channels, history.

use crate::client::{Client, ENCODINGS, code, numbers, to};
use crate::node::{DEADLINE, Node, now_s, token};
use serde_json::json;
use testkit::eventually;
use wire::realtime::{
    Command, Encoding, HistoryRequest, PresenceStatsRequest, PublishRequest, StreamPosition, SubRefreshRequest,
    SubscribeRequest,
};

#[tokio::test]
async fn publications_cross_encodings_byte_for_byte() {
    let node = Node::start().await;
    let mut json = Client::connect_in(&node, Encoding::Json, "ann").await;
    let mut protobuf = Client::connect_in(&node, Encoding::Protobuf, "bob").await;
    for client in [&mut json, &mut protobuf] {
        assert!(client.subscribe(to("news")).await.recoverable);
    }

    let text = r#"{"b":1.50,"a":123456789012345678901234567890,"é":"\u00e9"}"#;
    assert!(json.publish("news", text).await.publish.is_some());
    assert!(protobuf.publish("news", &b"\xff\x00"[..]).await.publish.is_some());

    let got = protobuf.publication().await;
    assert_eq!((&got.data[..], got.offset), (text.as_bytes(), 1));
    assert_eq!(got.info.unwrap().user, "ann");
    assert_eq!(&json.publication().await.data[..], text.as_bytes());
    let got = json.publication().await;
    assert_eq!((&got.data[..], got.offset), (&b"\"/wA=\""[..], 2), "binary data reaches JSON clients as base64");
    assert_eq!(&protobuf.publication().await.data[..], b"\xff\x00");
}

#[tokio::test]
async fn presence_lists_current_subscribers() {
    let node = Node::start().await;
    let named = token(&json!({"sub": "ann", "info": {"name": "Ann"}}));
    for encoding in ENCODINGS {
        let channel = format!("room-{}", encoding.as_str());
        let mut ann = Client::connect_with(&node, encoding, &named).await;
        let mut bob = Client::connect_in(&node, encoding, "bob").await;
        let mut bob_again = Client::connect_in(&node, encoding, "bob").await;
        for client in [&mut ann, &mut bob, &mut bob_again] {
            client.subscribe(to(&channel)).await;
        }

        let there = bob.presence(&channel).await.presence.unwrap().presence;
        assert_eq!(there.len(), 3);
        let info = &there[&ann.connected.client];
        assert_eq!((info.user.as_str(), &info.conn_info[..]), ("ann", &br#"{"name":"Ann"}"#[..]));

        let presence_stats = Some(PresenceStatsRequest { channel: channel.clone() });
        let stats = ann
            .ask(Command { presence_stats, ..Command::default() })
            .await
            .presence_stats
            .unwrap();
        assert_eq!((stats.num_clients, stats.num_users), (3, 2));

        bob_again.cut();
        let mut left = 3;
        while left != 2 {
            left = bob.presence(&channel).await.presence.unwrap().presence.len();
        }
        bob.unsubscribe(&channel).await;
        assert_eq!(ann.presence(&channel).await.presence.unwrap().presence.len(), 1);
        assert_eq!(code(&bob.presence(&channel).await), 103, "only subscribers may read presence");
    }
}

#[tokio::test]
async fn subscribers_receive_joins_and_leaves() {
    let node = Node::start().await;
    for encoding in ENCODINGS {
        let channel = format!("chat:{}", encoding.as_str());
        let mut ann = Client::connect_in(&node, encoding, "ann").await;
        ann.subscribe(to(&channel)).await;
        assert_eq!(ann.push().await.join.unwrap().info.unwrap().client, ann.connected.client, "its own join");

        let mut bob = Client::connect_in(&node, encoding, "bob").await;
        bob.subscribe(to(&channel)).await;
        assert_eq!(ann.push().await.join.unwrap().info.unwrap().user, "bob");
        bob.unsubscribe(&channel).await;
        assert_eq!(ann.push().await.leave.unwrap().info.unwrap().user, "bob");
        bob.subscribe(to(&channel)).await;
        assert!(ann.push().await.join.is_some());
        bob.cut();
        let push = ann.push().await;
        assert_eq!((push.channel, push.leave.unwrap().info.unwrap().user), (channel, "bob".into()));
    }
}

#[tokio::test]
async fn subscription_token_opens_a_private_channel_until_it_expires() {
    let node = Node::start_with(|config| {
        config.defaults.join_leave = true;
        config.ping_interval = std::time::Duration::from_millis(100);
        config.refresh_grace = std::time::Duration::ZERO;
    })
    .await;
    let opens = |exp: u64| {
        let claims = json!({"sub": "ann", "channel": "$vip", "info": {"role": "host"}, "exp": exp});
        SubscribeRequest { token: token(&claims), ..to("$vip") }
    };

    let mut ann = Client::connect(&node, "ann").await;
    let subscribed = ann.subscribe(opens(now_s() + 100)).await;
    assert!(subscribed.expires && (95..=100).contains(&subscribed.ttl), "{subscribed:?}");
    let joined = ann.push().await.join.unwrap().info.unwrap();
    assert_eq!(&joined.chan_info[..], br#"{"role":"host"}"#);
    let there = ann.presence("$vip").await.presence.unwrap().presence;
    assert_eq!(&there[&ann.connected.client].chan_info[..], br#"{"role":"host"}"#);
    assert!(ann.publish("$vip", "1").await.publish.is_some());
    assert_eq!(&ann.publication().await.info.unwrap().chan_info[..], br#"{"role":"host"}"#);
    ann.unsubscribe("$vip").await;

    // The subscription ends with its token unless the token is refreshed.
    let mut bob = Client::connect(&node, "ann").await;
    assert!(ann.subscribe(opens(now_s() + 1)).await.expires);
    assert!(bob.subscribe(opens(now_s() + 1)).await.expires);
    let fresh = SubRefreshRequest { channel: "$vip".into(), token: opens(now_s() + 500).token };
    let refreshed = bob
        .ask(Command { sub_refresh: Some(fresh), ..Command::default() })
        .await
        .sub_refresh
        .unwrap();
    assert!(refreshed.expires && refreshed.ttl > 400);

    let ended = loop {
        if let Some(unsubscribe) = ann.push().await.unsubscribe {
            break unsubscribe;
        }
    };
    assert_eq!(ended.code, 2501);
    assert!(bob.presence("$vip").await.presence.unwrap().presence.len() == 1);

    let expired = ann.try_subscribe(opens(now_s() - 1)).await;
    assert_eq!(code(&expired), 109);
}

#[tokio::test]
async fn history_is_read_in_pages() {
    let node = Node::start().await;
    for encoding in ENCODINGS {
        let channel = format!("log-{}", encoding.as_str());
        let mut client = Client::connect_in(&node, encoding, "ann").await;
        client.subscribe(to(&channel)).await;
        for number in 1..=5 {
            client.publish(&channel, number.to_string()).await;
        }

        let ask = |limit, offset: Option<u64>, epoch: &str, reverse| HistoryRequest {
            channel: channel.clone(),
            limit,
            since: offset.map(|offset| StreamPosition { offset, epoch: epoch.into() }),
            reverse,
        };
        let position = client.history(ask(0, None, "", false)).await;
        assert_eq!((position.offset, position.publications.len()), (5, 0));
        let epoch = position.epoch;

        for (request, expected) in [
            (ask(-1, None, "", false), &[1, 2, 3, 4, 5][..]),
            (ask(2, None, "", false), &[1, 2]),
            (ask(2, Some(2), &epoch, false), &[3, 4]),
            (ask(-1, Some(5), &epoch, false), &[]),
            (ask(2, None, "", true), &[5, 4]),
            (ask(-1, Some(3), &epoch, true), &[2, 1]),
        ] {
            assert_eq!(numbers(&client.history(request.clone()).await.publications), expected, "{request:?}");
        }
        assert_eq!(code(&client.try_history(ask(-1, Some(2), "other", false)).await), 112);
    }
}

#[tokio::test]
async fn unsubscribed_client_receives_nothing() {
    let node = Node::start().await;
    let mut ann = Client::connect(&node, "ann").await;
    let mut bob = Client::connect(&node, "bob").await;
    ann.subscribe(to("news")).await;
    assert_eq!(code(&ann.try_subscribe(to("news")).await), 105);
    assert!(ann.unsubscribe("news").await.unsubscribe.is_some());
    assert!(bob.publish("news", "1").await.publish.is_some());
    ann.nothing_pushed().await;
    let ask = HistoryRequest { channel: "news".into(), limit: -1, ..HistoryRequest::default() };
    assert_eq!(code(&ann.try_history(ask).await), 103);

    // The client may subscribe again. A channel without subscribers is removed.
    ann.subscribe(to("news")).await;
    ann.cut();
    eventually(DEADLINE, || async { node.call("channels", &json!({})).await["result"]["channels"] == json!([]) }).await;
}

/// A slow commit must not be waited for once for each command.
#[tokio::test]
async fn publications_of_one_message_share_commits_and_keep_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start_in(dir.path(), |_| {}).await;
    let mut ann = Client::connect(&node, "ann").await;
    let publish = |id: u32, channel: &str| {
        let data = id.to_string().into();
        let publish = PublishRequest { channel: channel.into(), data };
        Command { id, publish: Some(publish), ..Command::default() }
    };
    let mut commands: Vec<Command> = (100..160)
        .map(|id| publish(id, if id % 3 == 0 { "a" } else { "b" }))
        .collect();
    commands[30] = publish(130, "unknown:x");
    ann.send(&commands).await;

    for id in 100..160 {
        let reply = ann.reply(id).await;
        assert_eq!(reply.publish.is_some(), id != 130, "{reply:?}");
    }
    for (channel, rest) in [("a", 0..1), ("b", 1..3)] {
        let history = node.call("history", &json!({"channel": channel, "limit": -1})).await;
        let numbers: Vec<u64> = history["result"]["publications"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["data"].as_u64().unwrap())
            .collect();
        let expected: Vec<u64> = (100..160).filter(|id| rest.contains(&(id % 3)) && *id != 130).collect();
        assert_eq!(numbers, expected);
    }
    node.stop().await;
    crate::recovery::released(dir.path()).await;

    let log = journal::Log::open(&dir.path().join("channels.db"), cluster::Durability::Process).unwrap();
    let commits = log.rows().unwrap().len();
    assert!(commits < 59, "59 publications took {commits} commits");
}
