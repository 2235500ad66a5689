//! Nodes that share a Redis: each delivers the other's publications, and clients are notified if Redis loses any.

use crate::client::{Client, ENCODINGS, again, code, number, numbers, to};
use crate::node::{DEADLINE, Node};
use crate::recovery::publish_and_recover;
use cluster::EngineConfig;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use testkit::{RedisCluster, RedisServer, eventually};
use wire::realtime::{Encoding, HistoryRequest, Push};

pub async fn start(url: &str, name: &str) -> Node {
    Node::start_with(|config| {
        config.node = name.into();
        config.engine = EngineConfig::Redis { url: url.into() };
        config.defaults.history_size = 100_000;
    })
    .await
}

#[tokio::test]
async fn two_nodes_share_channels() {
    let redis = RedisServer::start().await;
    two_nodes_share(&redis.url()).await;
}

pub async fn two_nodes_share(url: &str) {
    let (one, two) = (start(url, "n1").await, start(url, "n2").await);
    one.ready.check().await.unwrap();
    for encoding in ENCODINGS {
        let channel = format!("chat:{}", encoding.as_str());
        let mut ann = Client::connect_in(&one, encoding, "ann").await;
        let mut bob = Client::connect_in(&two, encoding, "bob").await;
        assert_eq!(ann.connected.node, "n1");
        let before = ann.subscribe(to(&channel)).await;
        assert_eq!(ann.push().await.join.unwrap().info.unwrap().user, "ann");
        let there = bob.subscribe(to(&channel)).await;
        assert_eq!(before.epoch, there.epoch);
        assert_eq!(ann.push().await.join.unwrap().info.unwrap().user, "bob");
        assert_eq!(bob.push().await.join.unwrap().info.unwrap().user, "bob");

        let keyed = json!({"channel": channel, "data": 1, "idempotency_key": "k"});
        for node in [&one, &two] {
            assert_eq!(node.call("publish", &keyed).await["result"]["offset"], 1);
        }
        for client in [&mut ann, &mut bob] {
            let publication = client.publication().await;
            assert_eq!((publication.offset, number(&publication)), (1, 1));
            let users: Vec<String> = client
                .presence(&channel)
                .await
                .presence
                .unwrap()
                .presence
                .into_values()
                .map(|info| info.user)
                .collect();
            assert!(users.len() == 2 && users.contains(&"ann".into()) && users.contains(&"bob".into()));
        }

        // A client recovers on the other node.
        ann.cut();
        assert_eq!(bob.push().await.leave.unwrap().info.unwrap().user, "ann");
        for number in 2..=4 {
            two.publish(&channel, json!(number)).await;
        }
        let mut ann = Client::connect_in(&two, encoding, "ann").await;
        let after = ann.subscribe(again(&channel, &before, 1)).await;
        assert!(after.recovered);
        assert_eq!(numbers(&after.publications), [2, 3, 4]);
        let ask = HistoryRequest {
            channel: channel.clone(),
            limit: 2,
            reverse: true,
            ..HistoryRequest::default()
        };
        assert_eq!(numbers(&ann.history(ask).await.publications), [4, 3]);

        // Publications without history reach the other node too.
        let unkept = json!({"channel": channel, "data": 5, "skip_history": true});
        one.call("publish", &unkept).await;
        assert!(ann.push().await.join.is_some());
        let publication = ann.publication().await;
        assert_eq!((publication.offset, number(&publication)), (0, 5));
    }
    one.stop().await;
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn recovery_across_nodes_has_no_gap_and_no_duplicate() {
    let redis = RedisServer::start().await;
    meet_across(&redis.url()).await;
}

pub async fn meet_across(url: &str) {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64
        | 1;
    println!("seed {seed}");
    let (one, two) = (Arc::new(start(url, "n1").await), Arc::new(start(url, "n2").await));
    publish_and_recover(&one, &two, seed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn publications_of_one_publisher_keep_their_order() {
    let redis = RedisServer::start().await;
    crate::api::keeps_order(&start(&redis.url(), "n1").await).await;
}

/// Waits for the end of a subscription. Returns the channel and the code; other pushes are skipped.
pub async fn unsubscribed(client: &mut Client) -> (String, u32) {
    loop {
        if let Push { channel, unsubscribe: Some(unsubscribe), .. } = client.push().await {
            return (channel, unsubscribe.code);
        }
    }
}

#[tokio::test]
async fn restarted_redis_keeps_publications_and_begins_a_new_epoch() {
    let mut redis = RedisServer::start_with(&["--appendonly", "yes", "--appendfsync", "always"]).await;
    let (one, two) = (start(&redis.url(), "n1").await, start(&redis.url(), "n2").await);
    let mut ann = Client::connect_in(&one, Encoding::Protobuf, "ann").await;
    let mut bob = Client::connect(&two, "bob").await;
    let before = ann.subscribe(to("news")).await;
    assert!(bob.publish("news", "1").await.publish.is_some());
    assert_eq!(number(&ann.publication().await), 1);

    redis.kill();
    let reply = bob.publish("news", "2").await;
    assert_eq!(code(&reply), 100);
    let error = reply.error.unwrap();
    assert!(error.temporary && error.message.contains("Redis"), "{error:?}");
    eventually(DEADLINE, || async { two.ready.check().await.is_err() }).await;
    assert_eq!(code(&bob.try_subscribe(to("other")).await), 100);
    let reading = one.call("history", &json!({"channel": "news", "limit": -1})).await;
    assert_eq!(reading["error"]["code"], 100, "{reading}");

    redis.restart().await;
    assert_eq!(unsubscribed(&mut ann).await, ("news".into(), 2500));
    eventually(DEADLINE, || async { two.ready.check().await.is_ok() }).await;
    assert!(bob.publish("news", "3").await.publish.is_some());

    // The node cannot know that nothing was lost, so the client resubscribes; its history is complete.
    let after = ann.subscribe(again("news", &before, 1)).await;
    assert!(!after.recovered && after.epoch != before.epoch && after.offset == 2, "{after:?}");
    let ask = HistoryRequest { channel: "news".into(), limit: -1, ..HistoryRequest::default() };
    assert_eq!(numbers(&ann.history(ask).await.publications), [1, 3]);
    assert!(bob.publish("news", "4").await.publish.is_some());
    assert_eq!(number(&ann.publication().await), 4);
    ann.nothing_pushed().await;
    assert!(bob.try_subscribe(to("other")).await.subscribe.is_some());

    // Clients that left while Redis was down are not present.
    let mut presence = ann.presence("news").await.presence.unwrap().presence;
    presence.remove(&ann.connected.client);
    assert!(presence.is_empty(), "{presence:?}");
}

#[tokio::test]
async fn flushed_redis_begins_a_new_epoch() {
    let mut redis = RedisServer::start().await;
    let node = start(&redis.url(), "n1").await;
    let mut ann = Client::connect(&node, "ann").await;
    let before = ann.subscribe(to("news")).await;
    for number in 1..=3 {
        node.publish("news", json!(number)).await;
        ann.publication().await;
    }

    // The connection stays open, and the next publication has a new epoch.
    redis.command("FLUSHALL").await.unwrap();
    node.publish("news", json!(4)).await;
    assert_eq!(unsubscribed(&mut ann).await, ("news".into(), 2500));
    let after = ann.subscribe(again("news", &before, 3)).await;
    assert!(!after.recovered && after.epoch != before.epoch && after.offset == 1, "{after:?}");

    redis.kill();
    redis.restart().await;
    assert_eq!(unsubscribed(&mut ann).await.1, 2500);
    let again = ann.subscribe(again("news", &after, 1)).await;
    assert!(!again.recovered && again.epoch != after.epoch && again.offset == 0, "{again:?}");
    eventually(DEADLINE, || async { node.ready.check().await.is_ok() }).await;
    node.publish("news", json!(5)).await;
    assert_eq!(number(&ann.publication().await), 5);
}

#[tokio::test]
async fn node_is_not_ready_while_its_redis_is_a_replica() {
    let redis = RedisServer::start().await;
    let node = start(&redis.url(), "n1").await;
    node.ready.check().await.unwrap();
    // A replica of a primary that does not exist is read-only, but still delivers publications.
    redis.command("REPLICAOF 127.0.0.1 1").await.unwrap();
    assert!(node.ready.check().await.is_err());
    redis.command("REPLICAOF NO ONE").await.unwrap();
    eventually(DEADLINE, || async { node.ready.check().await.is_ok() }).await;
}

#[tokio::test]
async fn hanging_redis_fails_commands_before_clients_give_up() {
    let redis = RedisServer::start().await;
    let node = start(&redis.url(), "n1").await;
    let mut ann = Client::connect(&node, "ann").await;
    ann.subscribe(to("news")).await;
    redis.pause();
    let asked = tokio::time::Instant::now();
    assert_eq!(code(&ann.publish("news", "1").await), 100);
    assert!(asked.elapsed() < Duration::from_secs(5), "clients wait 5 s at most: {:?}", asked.elapsed());
    assert!(node.ready.check().await.is_err());

    let asked = tokio::time::Instant::now();
    let data = json!({"channel": "news", "data": 3});
    let answers = futures_util::future::join_all((0..20).map(|_| node.call("publish", &data))).await;
    assert!(answers.iter().all(|answer| answer["error"]["code"] == 100), "{answers:?}");
    assert!(
        asked.elapsed() < Duration::from_secs(8),
        "publications do not wait for each other: {:?}",
        asked.elapsed()
    );

    redis.resume();
    eventually(DEADLINE, || async { node.ready.check().await.is_ok() }).await;
    assert!(ann.publish("news", "2").await.publish.is_some());
}

#[tokio::test]
async fn error_names_an_unreachable_redis_without_its_password() {
    let dir = tempfile::TempDir::new().unwrap();
    let bus = bus::local::Local::open(dir.path()).await.unwrap();
    let url = "redis://user:hunter2@127.0.0.1:1/".to_string();
    let config = cluster::Config {
        token_secret: vec![1],
        engine: EngineConfig::Redis { url },
        ..cluster::Config::default()
    };
    let error = cluster::bind(config, bus).await.err().unwrap().to_string();
    assert!(error.contains("127.0.0.1:1") && !error.contains("hunter2"), "{error}");
}

#[tokio::test]
async fn redis_user_without_info_fails_the_start() {
    let redis = RedisServer::start().await;
    redis.command("ACL SETUSER default -info").await.unwrap();
    let dir = tempfile::TempDir::new().unwrap();
    let bus = bus::local::Local::open(dir.path()).await.unwrap();
    let engine = EngineConfig::Redis { url: redis.url() };
    let config = cluster::Config { token_secret: vec![1], engine, ..cluster::Config::default() };
    let error = cluster::bind(config, bus).await.err().unwrap().to_string();
    assert!(error.contains("INFO replication"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn redis_cluster_carries_channels() {
    let redis = RedisCluster::start().await;
    let urls = redis.urls().join(",");
    two_nodes_share(&urls).await;
    meet_across(&urls).await;

    // Channel names that could spread a channel's keys over several servers.
    let (one, two) = (start(&urls, "n1").await, start(&urls, "n2").await);
    let mut ann = Client::connect(&one, "ann").await;
    for channel in ["}x{", "a}b{c}", "{", "{}", "chat:{x}"] {
        let before = ann.subscribe(to(channel)).await;
        two.publish(channel, json!(1)).await;
        let publication = loop {
            if let Some(publication) = ann.push().await.r#pub {
                break publication;
            }
        };
        assert_eq!((publication.offset, before.offset), (1, 0), "{channel}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn channels_recover_when_a_primary_of_the_cluster_dies() {
    let mut redis = RedisCluster::start().await;
    let urls = redis.urls().join(",");
    let (one, two) = (start(&urls, "n1").await, start(&urls, "n2").await);
    let mut ann = Client::connect(&one, "ann").await;
    let channels: Vec<String> = (0..12).map(|number| format!("c{number}")).collect();
    for channel in &channels {
        ann.subscribe(to(channel)).await;
        two.publish(channel, json!(1)).await;
        assert_eq!(number(&ann.publication().await), 1);
    }

    redis.kill_primary().await;
    // Every subscription ends, because the node cannot know what was missed.
    let mut ended = std::collections::HashSet::new();
    while ended.len() < channels.len() {
        ended.insert(unsubscribed(&mut ann).await.0);
    }

    // Every channel works again on the promoted server.
    redis.wait_until_whole().await;
    for channel in &channels {
        eventually(DEADLINE, || async {
            two.call("publish", &json!({"channel": channel, "data": 2})).await["result"].is_object()
        })
        .await;
    }
    for channel in &channels {
        let mut subscribed = ann.try_subscribe(to(channel)).await;
        while subscribed.error.as_ref().is_some_and(|error| error.temporary) {
            subscribed = ann.try_subscribe(to(channel)).await;
        }
        assert!(subscribed.subscribe.is_some(), "{subscribed:?}");
    }
    for channel in &channels {
        two.publish(channel, json!(3)).await;
        loop {
            let push = ann.push().await;
            match push.r#pub {
                Some(publication) if push.channel == *channel && number(&publication) == 3 => break,
                // Subscriptions may end again until the failover is complete.
                _ if push.unsubscribe.is_some() => {
                    ann.subscribe(to(&push.channel)).await;
                    two.publish(&push.channel, json!(3)).await;
                }
                _ => {}
            }
        }
    }
}
