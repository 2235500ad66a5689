//! Recovery: a client gets everything that it missed, once, or is notified that recovery failed.

use crate::client::{Client, ENCODINGS, again, number, numbers, to};
use crate::node::Node;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use tempfile::TempDir;
use wire::realtime::{Command, SubscribeRequest};

#[tokio::test]
async fn missed_publications_are_recovered_in_order() {
    let node = Node::start().await;
    for encoding in ENCODINGS {
        let channel = format!("news-{}", encoding.as_str());
        let mut ann = Client::connect_in(&node, encoding, "ann").await;
        let before = ann.subscribe(to(&channel)).await;
        assert!(!before.was_recovering && !before.recovered && before.offset == 0);
        node.publish(&channel, json!(1)).await;
        assert_eq!(ann.publication().await.offset, 1);
        ann.cut();
        for number in 2..=4 {
            node.publish(&channel, json!(number)).await;
        }

        let mut ann = Client::connect_in(&node, encoding, "ann").await;
        let after = ann.subscribe(again(&channel, &before, 1)).await;
        assert!(after.was_recovering && after.recovered);
        assert_eq!((after.offset, after.epoch.as_str()), (4, before.epoch.as_str()));
        assert_eq!(numbers(&after.publications), [2, 3, 4]);
        assert_eq!(after.publications.iter().map(|p| p.offset).collect::<Vec<_>>(), [2, 3, 4]);
        node.publish(&channel, json!(5)).await;
        assert_eq!(number(&ann.publication().await), 5);
        ann.nothing_pushed().await;

        // A client that missed nothing also recovers.
        ann.unsubscribe(&channel).await;
        let after = ann.subscribe(again(&channel, &before, 5)).await;
        assert!(after.recovered && after.publications.is_empty());
    }
}

#[tokio::test]
async fn recovery_is_never_partial() {
    let node = Node::start_with(|config| config.defaults.history_size = 5).await;
    let mut ann = Client::connect(&node, "ann").await;
    let before = ann.subscribe(to("news")).await;
    ann.unsubscribe("news").await;
    for number in 1..=7 {
        node.publish("news", json!(number)).await;
    }

    let other_epoch = SubscribeRequest { epoch: "other".into(), ..again("news", &before, 4) };
    for (request, expected) in [
        (again("news", &before, 0), None),
        (again("news", &before, 1), None),
        (again("news", &before, 2), Some(&[3, 4, 5, 6, 7][..])),
        (again("news", &before, 7), Some(&[])),
        (again("news", &before, 8), None),
        (other_epoch, None),
        (to("news"), None),
    ] {
        let result = ann.subscribe(request.clone()).await;
        assert_eq!(result.recovered, expected.is_some(), "{request:?}");
        assert_eq!(result.was_recovering, request.recover);
        assert_eq!(numbers(&result.publications), expected.unwrap_or(&[]), "{request:?}");
        assert_eq!((result.offset, &result.epoch), (7, &before.epoch));
        ann.unsubscribe("news").await;
    }
}

#[tokio::test]
async fn expired_history_prevents_recovery() {
    let ttl = std::time::Duration::from_millis(50);
    let node = Node::start_with(|config| config.defaults.history_ttl = ttl).await;
    let mut ann = Client::connect(&node, "ann").await;
    let before = ann.subscribe(to("news")).await;
    ann.unsubscribe("news").await;
    node.publish("news", json!(1)).await;

    testkit::eventually(crate::node::DEADLINE, || async {
        node.call("history", &json!({"channel": "news", "limit": -1})).await["result"]["publications"].is_null()
    })
    .await;
    let after = ann.subscribe(again("news", &before, 0)).await;
    assert!(!after.recovered && after.offset == 1, "{after:?}");
}

#[tokio::test]
async fn restart_keeps_durable_channels_only() {
    let dir = TempDir::new().unwrap();
    let node = Node::start_in(dir.path(), |_| {}).await;
    let mut ann = Client::connect(&node, "ann").await;
    let (chat, app) = ("chat:lobby", "app:home#ann");
    node.publish(chat, json!(0)).await;
    let before = (ann.subscribe(to(chat)).await, ann.subscribe(to(app)).await);
    ann.cut();
    for number in 1..=3 {
        node.publish(chat, json!(number)).await;
        node.publish(app, json!(number)).await;
    }
    let keyed = json!({"channel": chat, "data": 4, "idempotency_key": "k"});
    assert_eq!(node.call("publish", &keyed).await["result"]["offset"], 5);
    node.stop().await;

    let node = reopened(dir.path()).await;
    let mut ann = Client::connect(&node, "ann").await;
    let after = ann.subscribe(again(chat, &before.0, 1)).await;
    assert!(after.recovered, "{after:?}");
    assert_eq!(numbers(&after.publications), [1, 2, 3, 4]);
    assert_eq!(node.call("publish", &keyed).await["result"]["offset"], 5, "idempotency keys are kept, too");

    node.publish(chat, json!(5)).await;
    let publication = loop {
        if let Some(publication) = ann.push().await.r#pub {
            break publication;
        }
    };
    assert_eq!((publication.offset, number(&publication)), (6, 5));

    let after = ann.subscribe(again(app, &before.1, 0)).await;
    assert!(!after.recovered && after.epoch != before.1.epoch, "page sessions are not durable: {after:?}");
}

/// Replies do not count as a backlog: a client that recovers a long history is not disconnected as slow.
#[tokio::test]
async fn recovery_may_exceed_the_client_queue() {
    let node = Node::start_with(|config| config.client_queue = 64 * 1024).await;
    let text = "x".repeat(30_000);
    for encoding in ENCODINGS {
        let mut ann = Client::connect_in(&node, encoding, "ann").await;
        let channels: Vec<String> = (0..4).map(|number| format!("{}-{number}", encoding.as_str())).collect();
        let mut commands = Vec::new();
        for (channel, id) in channels.iter().zip(100..) {
            let before = ann.subscribe(to(channel)).await;
            ann.unsubscribe(channel).await;
            let subscribe = Some(again(channel, &before, 0));
            commands.push(Command { id, subscribe, ..Command::default() });
        }

        for _ in 0..50 {
            node.call("broadcast", &json!({"channels": channels, "data": text}))
                .await;
        }
        ann.send(&commands).await;
        // These publications arrive while the replies are being written.
        node.call("broadcast", &json!({"channels": channels, "data": "live"}))
            .await;
        for command in commands {
            let result = ann.reply(command.id).await.subscribe.unwrap();
            assert!(result.recovered && result.publications.len() >= 50, "{}", result.publications.len());
        }
        ann.kept();
        ann.nothing_pushed().await;
    }
}

/// Waits until the stopped node has closed its files, a moment after its last handle is dropped.
pub async fn released(dir: &std::path::Path) {
    let is_ours = |file: std::fs::DirEntry| std::fs::read_link(file.path()).is_ok_and(|path| path.starts_with(dir));
    testkit::eventually(crate::node::DEADLINE, || async {
        !std::fs::read_dir("/proc/self/fd").unwrap().flatten().any(is_ours)
    })
    .await;
}

async fn reopened(dir: &std::path::Path) -> Node {
    released(dir).await;
    Node::start_in(dir, |_| {}).await
}

/// A xorshift generator, so that a seed reproduces a test.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Clients subscribe, unsubscribe, disconnect and recover under constant publishing. Each sees every publication once.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn recovering_clients_see_no_gap_and_no_duplicate() {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64
        | 1;
    println!("seed {seed}");
    let node = Arc::new(Node::start_with(|config| config.defaults.history_size = 100_000).await);
    publish_and_recover(&node, &node, seed).await;
}

/// Publishes on node `writing` while clients of node `reading` recover.
pub async fn publish_and_recover(writing: &Arc<Node>, reading: &Arc<Node>, seed: u64) {
    const PUBLISHERS: usize = 3;
    const PUBLICATIONS: u64 = 1500;
    let (channel, stop) = ("stream", Arc::new(AtomicBool::new(false)));
    let published = Arc::new(AtomicU64::new(0));
    let mut publishers = tokio::task::JoinSet::new();
    for _ in 0..PUBLISHERS {
        let (node, published) = (writing.clone(), published.clone());
        publishers.spawn(async move {
            let mut client = Client::connect(&node, "publisher").await;
            while published.fetch_add(1, SeqCst) < PUBLICATIONS {
                assert!(client.publish(channel, "1").await.publish.is_some());
            }
        });
    }

    let mut readers = tokio::task::JoinSet::new();
    for reader in 0..6_u64 {
        let (node, stop) = (reading.clone(), stop.clone());
        readers.spawn(read(node, channel, stop, seed.wrapping_add(reader * 7919), ENCODINGS[reader as usize % 2]));
    }

    while let Some(done) = publishers.join_next().await {
        done.unwrap();
    }
    stop.store(true, SeqCst);
    let last = writing.call("history", &json!({"channel": channel})).await["result"]["offset"]
        .as_u64()
        .unwrap();
    assert_eq!(last, PUBLICATIONS);

    while let Some(seen) = readers.join_next().await {
        let (first, offsets) = seen.unwrap();
        let expected: Vec<u64> = (first + 1..=last).collect();
        assert_eq!(offsets, expected, "seed {seed}");
    }
}

/// Leaves and recovers until `stop`, then once more. Returns the offset at which the client began, and the offsets that
/// it received.
async fn read(
    node: Arc<Node>,
    channel: &'static str,
    stop: Arc<AtomicBool>,
    seed: u64,
    encoding: wire::realtime::Encoding,
) -> (u64, Vec<u64>) {
    let mut random = Random(seed | 1);
    let mut client = Client::connect_in(&node, encoding, "reader").await;
    let mut position = client.subscribe(to(channel)).await;
    let first = position.offset;
    let mut seen = Vec::new();
    loop {
        let last_round = stop.load(SeqCst);
        for _ in 0..random.below(30) {
            // Short, because nothing more arrives once the publishers are done.
            let push = tokio::time::timeout(std::time::Duration::from_millis(20), client.push());
            match push.await {
                // The client must resubscribe: a server of the Redis Cluster may close its connection at any time.
                Ok(push) if push.unsubscribe.is_some() => break,
                Ok(push) => seen.push(push.r#pub.unwrap().offset),
                Err(_) => {}
            }
        }

        let at = seen.last().copied().unwrap_or(first);
        match random.below(3) {
            0 => {
                client.unsubscribe(channel).await;
                // Publications pushed before the unsubscribe took effect also count.
                seen.extend(
                    client
                        .kept()
                        .iter()
                        .filter_map(|push| Some(push.r#pub.as_ref()?.offset)),
                );
            }
            _ => {
                client.cut();
                client = Client::connect_in(&node, encoding, "reader").await;
            }
        }

        let at = seen.last().copied().unwrap_or(at);
        position = loop {
            let reply = client.try_subscribe(again(channel, &position, at)).await;
            match reply.subscribe {
                Some(subscribed) => break subscribed,
                None => assert!(reply.error.as_ref().is_some_and(|error| error.temporary), "seed {seed}: {reply:?}"),
            }
        };

        assert!(position.recovered, "seed {seed}: {position:?} from {at}");
        seen.extend(position.publications.iter().map(|publication| publication.offset));
        if last_round {
            return (first, seen);
        }
    }
}
