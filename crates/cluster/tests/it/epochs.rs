//! A store that is restored to older data begins a new epoch: no client gets `recovered` despite a gap, and no position
//! is assigned twice.

use crate::client::{Client, again, number, numbers, to};
use crate::node::{DEADLINE, Node};
use crate::redis::{start, unsubscribed};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use testkit::{Forwarder, RedisServer, eventually};
use wire::realtime::{Encoding, Publication, SubscribeRequest};

const CHANNEL: &str = "news";

/// Publications by position.
type Publications = BTreeMap<(String, u64), u64>;

/// Publishes numbers and keeps their acknowledged positions.
struct Publisher<'a> {
    node: &'a Node,
    last: u64,
    acknowledged: Publications,
}

impl Publisher<'_> {
    /// Publishes until `count` more are acknowledged. Returns the position of the last.
    async fn publish(&mut self, count: u64) -> (String, u64) {
        let mut position = Value::Null;
        for _ in 0..count {
            self.last += 1;
            let request = json!({"channel": CHANNEL, "data": self.last});
            // Retried while the store is down: publications are refused then.
            while !position["result"].is_object() {
                position = self.node.call("publish", &request).await;
            }
            let (epoch, offset) = read(&position);
            let before = self.acknowledged.insert((epoch.clone(), offset), self.last);
            assert_eq!(before, None, "position {offset} of epoch {epoch} was assigned twice");
            position = Value::Null;
        }
        let ((epoch, offset), _) = self.acknowledged.iter().find(|(_, n)| **n == self.last).unwrap();
        (epoch.clone(), *offset)
    }
}

fn read(answer: &Value) -> (String, u64) {
    let position = &answer["result"];
    (position["epoch"].as_str().unwrap().into(), position["offset"].as_u64().unwrap())
}

/// A client that recovers after every interruption and keeps what it received.
struct Reader<'a> {
    node: &'a Node,
    encoding: Encoding,
    client: Client,
    epoch: String,
    at: u64,
    got: Publications,
    /// The ranges that the node reported as complete: (epoch, from, to), `from` excluded.
    complete: Vec<(String, u64, u64)>,
}

impl<'a> Reader<'a> {
    async fn start(node: &'a Node, encoding: Encoding) -> Self {
        let client = Client::connect_in(node, encoding, "reader").await;
        let (epoch, got, complete) = (String::new(), Publications::new(), Vec::new());
        let mut reader = Self { node, encoding, client, epoch, at: 0, got, complete };
        reader.subscribe().await;
        reader
    }

    async fn reconnect(&mut self) {
        self.client = Client::connect_in(self.node, self.encoding, "reader").await;
        self.subscribe().await;
    }

    async fn subscribe(&mut self) {
        let position = SubscribeRequest { recover: true, epoch: self.epoch.clone(), offset: self.at, ..to(CHANNEL) };
        let request = if self.epoch.is_empty() { to(CHANNEL) } else { position };

        let result = loop {
            let reply = self.client.try_subscribe(request.clone()).await;
            match reply.subscribe {
                Some(result) => break result,
                None => assert!(reply.error.as_ref().is_some_and(|error| error.temporary), "{reply:?}"),
            }
        };

        if result.recovered {
            assert_eq!(result.epoch, self.epoch);
        } else {
            (self.epoch, self.at) = (result.epoch, result.offset);
            self.complete.push((self.epoch.clone(), self.at, self.at));
        }
        for publication in &result.publications {
            self.take(publication);
        }
        assert_eq!(self.at, result.offset, "the recovered publications reach the position of the reply");
    }

    fn take(&mut self, publication: &Publication) {
        assert_eq!(publication.offset, self.at + 1, "a gap in epoch {}", self.epoch);
        self.at = publication.offset;
        self.got.insert((self.epoch.clone(), self.at), number(publication));
        self.complete.last_mut().unwrap().2 = self.at;
    }

    async fn read_to(&mut self, position: &(String, u64)) {
        while (&self.epoch, self.at) != (&position.0, position.1) {
            let push = self.client.push().await;
            match push.r#pub {
                Some(publication) => self.take(&publication),
                None if push.unsubscribe.is_some() => self.subscribe().await,
                None => {}
            }
        }
    }

    /// Asserts that the client received every acknowledged publication of the ranges reported as complete.
    fn missed_nothing(&self, acknowledged: &Publications) {
        for (epoch, from, to) in &self.complete {
            for offset in from + 1..=*to {
                let position = (epoch.clone(), offset);
                if let Some(expected) = acknowledged.get(&position) {
                    assert_eq!(self.got.get(&position), Some(expected), "{position:?}");
                }
            }
        }
    }
}

/// Runs two readers through a rollback of the store: `keep` saves the store after publication 3, `go_back` restores
/// that state after publication 6.
async fn recovers_from_rollback(node: &Node, keep: impl AsyncFnOnce(), go_back: impl AsyncFnOnce()) {
    let mut publisher = Publisher { node, last: 0, acknowledged: BTreeMap::new() };
    let mut stays = Reader::start(node, Encoding::Json).await;
    let mut goes = Reader::start(node, Encoding::Protobuf).await;
    let kept = publisher.publish(3).await;
    keep().await;
    let lost = publisher.publish(3).await;
    stays.read_to(&lost).await;
    goes.read_to(&lost).await;

    go_back().await;
    // Past the readers' offset: without a new epoch they would appear to have the first of these already.
    let last = publisher.publish(8).await;
    assert_ne!(last.0, kept.0, "a new epoch");
    assert_eq!(last.1, kept.1 + 8, "offsets continue from the restored history");
    goes.reconnect().await;
    assert!(
        goes.complete.last().is_some_and(|range| range.0 == last.0),
        "the client is notified that it missed some"
    );
    stays.read_to(&last).await;
    let last = publisher.publish(2).await;
    for reader in [&mut stays, &mut goes] {
        reader.read_to(&last).await;
        reader.missed_nothing(&publisher.acknowledged);
    }

    let history = node.call("history", &json!({"channel": CHANNEL, "limit": -1})).await;
    let kept: Vec<u64> = history["result"]["publications"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["data"].as_u64().unwrap())
        .collect();
    assert_eq!(kept, [1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], "new subscribers see the whole history");
}

#[tokio::test]
async fn redis_restored_from_an_older_dump_begins_a_new_epoch() {
    let redis = tokio::sync::Mutex::new(RedisServer::start().await);
    let node = start(&redis.lock().await.url(), "n1").await;
    let keep = async || assert_eq!(redis.lock().await.command("SAVE").await.unwrap(), "+OK");
    let go_back = async || {
        let mut redis = redis.lock().await;
        redis.kill();
        redis.restart().await;
    };
    recovers_from_rollback(&node, keep, go_back).await;
}

/// Starts a primary and a replica that is in sync with it.
async fn pair() -> (RedisServer, RedisServer) {
    let at_once = ["--repl-diskless-sync-delay", "0"];
    let primary = RedisServer::start_with(&at_once).await;
    let replica = RedisServer::start_with(&at_once).await;
    follow(&replica, &primary).await;
    (primary, replica)
}

async fn follow(replica: &RedisServer, primary: &RedisServer) {
    replica
        .command(&format!("REPLICAOF 127.0.0.1 {}", primary.port()))
        .await
        .unwrap();
    eventually(DEADLINE, || async {
        replica
            .command("INFO replication")
            .await
            .is_ok_and(|text| text.contains("master_link_status:up"))
    })
    .await;
}

/// Promotes the replica once it has all writes of the primary.
async fn promote_in_sync(primary: &RedisServer, replica: &RedisServer) {
    eventually(DEADLINE, || async {
        let offset = |text: String, name: &str| {
            text.lines()
                .find_map(|line| line.trim().strip_prefix(name)?.parse::<u64>().ok())
        };
        let [sent, taken] = [primary, replica].map(|server| server.command("INFO replication"));
        let (sent, taken) = (sent.await.unwrap(), taken.await.unwrap());
        let sent = offset(sent, "master_repl_offset:");
        sent.is_some() && sent == offset(taken, "slave_repl_offset:")
    })
    .await;
    assert_eq!(replica.command("REPLICAOF NO ONE").await.unwrap(), "+OK");
}

#[tokio::test]
async fn replica_promoted_without_the_last_writes_begins_a_new_epoch() {
    let (primary, replica) = pair().await;
    let address = Forwarder::start(primary.port()).await;
    let node = start(&format!("redis://127.0.0.1:{}", address.port()), "n1").await;
    let keep = async || promote_in_sync(&primary, &replica).await;
    let go_back = async || address.switch(replica.port());
    recovers_from_rollback(&node, keep, go_back).await;
}

/// The primary stays the same process, and the connections to it stay open.
#[tokio::test]
async fn primary_that_takes_older_data_back_from_its_replica_begins_a_new_epoch() {
    let (primary, replica) = pair().await;
    let node = start(&primary.url(), "n1").await;
    let keep = async || promote_in_sync(&primary, &replica).await;
    let go_back = async || {
        follow(&primary, &replica).await;
        promote_in_sync(&replica, &primary).await;
    };
    recovers_from_rollback(&node, keep, go_back).await;
}

#[tokio::test]
async fn cut_connection_keeps_the_epoch_and_loses_nothing() {
    let redis = RedisServer::start().await;
    let address = Forwarder::start(redis.port()).await;
    let node = start(&format!("redis://127.0.0.1:{}", address.port()), "n1").await;
    let mut ann = Client::connect(&node, "ann").await;
    let before = ann.subscribe(to(CHANNEL)).await;
    node.publish(CHANNEL, json!(1)).await;
    assert_eq!(number(&ann.publication().await), 1);

    address.switch(redis.port());
    assert_eq!(unsubscribed(&mut ann).await, (CHANNEL.into(), 2500));
    eventually(DEADLINE, || async { node.ready.check().await.is_ok() }).await;
    node.publish(CHANNEL, json!(2)).await;
    let after = ann.subscribe(again(CHANNEL, &before, 1)).await;
    assert!(after.recovered && after.epoch == before.epoch, "{after:?}");
    assert_eq!(numbers(&after.publications), [2]);
}

#[tokio::test]
async fn repeated_key_in_a_new_epoch_returns_its_first_position() {
    let redis = RedisServer::start_with(&["--appendonly", "yes", "--appendfsync", "always"]).await;
    let redis = tokio::sync::Mutex::new(redis);
    let node = start(&redis.lock().await.url(), "n1").await;
    let keyed = json!({"channel": CHANNEL, "data": 1, "idempotency_key": "k"});
    let given = read(&node.call("publish", &keyed).await);
    {
        let mut redis = redis.lock().await;
        redis.kill();
        redis.restart().await;
    }

    eventually(DEADLINE, || async { node.ready.check().await.is_ok() }).await;
    let next = read(&node.call("publish", &json!({"channel": CHANNEL, "data": 2})).await);
    assert!(next.0 != given.0 && next.1 == 2, "{next:?}");
    assert_eq!(read(&node.call("publish", &keyed).await), given);
}

/// The new subscriber learns of the epoch from the history, before any publication. No client resubscribes in a loop.
#[tokio::test]
async fn new_subscriber_in_a_new_epoch_ends_the_subscriptions_of_the_old_one() {
    let redis = RedisServer::start().await;
    let node = start(&redis.url(), "n1").await;
    let mut ann = Client::connect(&node, "ann").await;
    let before = ann.subscribe(to(CHANNEL)).await;
    node.publish(CHANNEL, json!(1)).await;
    ann.publication().await;
    redis.command("FLUSHALL").await.unwrap();

    let mut bob = Client::connect(&node, "bob").await;
    let there = bob.subscribe(to(CHANNEL)).await;
    assert_ne!(there.epoch, before.epoch);
    bob.nothing_pushed().await;
    assert_eq!(unsubscribed(&mut ann).await, (CHANNEL.into(), 2500));
    assert!(!ann.subscribe(again(CHANNEL, &before, 1)).await.recovered);
    node.publish(CHANNEL, json!(2)).await;
    for client in [&mut ann, &mut bob] {
        assert_eq!(number(&client.publication().await), 2);
    }
}

/// Without recovery, subscribers have no position to compare with, even if the channel has a history.
#[tokio::test]
async fn subscribers_without_recovery_get_the_first_publication_of_a_new_epoch() {
    let redis = RedisServer::start().await;
    let node = Node::start_with(|config| {
        config.engine = cluster::EngineConfig::Redis { url: redis.url() };
        config.defaults.recovery = false;
    })
    .await;
    let mut ann = Client::connect(&node, "ann").await;
    ann.subscribe(to(CHANNEL)).await;
    for n in 1..=3 {
        node.publish(CHANNEL, json!(n)).await;
        assert_eq!(number(&ann.publication().await), n);
    }
    redis.command("FLUSHALL").await.unwrap();
    node.publish(CHANNEL, json!(4)).await;
    assert_eq!(number(&ann.publication().await), 4);
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[tokio::test]
async fn restored_older_channels_db_begins_a_new_epoch() {
    let (dir, backup, restored) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let node = Node::start_in(dir.path(), |_| {}).await;
    let mut publisher = Publisher { node: &node, last: 0, acknowledged: BTreeMap::new() };
    let kept = publisher.publish(3).await;
    node.stop().await;
    crate::recovery::released(dir.path()).await;
    copy(dir.path(), backup.path());

    let node = Node::start_in(dir.path(), |_| {}).await;
    let mut publisher = Publisher { node: &node, last: 3, acknowledged: BTreeMap::new() };
    let lost = publisher.publish(3).await;
    assert_eq!(lost, (kept.0.clone(), 6), "an orderly restart keeps the epoch");
    node.stop().await;
    crate::recovery::released(dir.path()).await;

    // Restored into an empty directory, as documented, and over the newer file.
    copy(backup.path(), restored.path());
    for log in ["channels.db-wal", "channels.db-shm"] {
        let _ = std::fs::remove_file(dir.path().join(log));
    }
    copy(backup.path(), dir.path());
    for dir in [restored.path(), dir.path()] {
        let node = Node::start_in(dir, |_| {}).await;
        let mut publisher = Publisher { node: &node, last: 6, acknowledged: BTreeMap::new() };
        let last = publisher.publish(8).await;
        assert!(last.0 != kept.0 && last.1 == 11, "{last:?}");
        let mut ann = Client::connect(&node, "ann").await;
        let position = SubscribeRequest { recover: true, epoch: lost.0.clone(), offset: lost.1, ..to(CHANNEL) };
        let after = ann.subscribe(position).await;
        assert!(!after.recovered && after.epoch == last.0, "{after:?}");
        let history = node.call("history", &json!({"channel": CHANNEL, "limit": -1})).await;
        assert_eq!(history["result"]["publications"].as_array().unwrap().len(), 11, "the restored history stays");
        node.stop().await;
    }
}
