//! The subscribers of each channel on this node, and the delivery to them.
//!
//! A subscription begins by collecting: publications that arrive while its history is read are kept, and are sent after
//! the subscribe reply, except those that the history already contained. Live publications thus continue the recovered
//! ones without a gap or a duplicate.

use crate::client::{Client, frame};
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tokio::sync::oneshot;
use wire::channels::Position;
use wire::realtime::{Encoding, Publication, Push, Reply};

const SHARDS: usize = 64;
/// Publications that one subscription may collect. If more arrive, the subscription is lost and the client
/// resubscribes.
const COLLECTED_MAX: usize = 4096;
/// Prefix of the channels for readiness probes. Clients cannot use them, because no namespace is called `ready`.
const PROBE_PREFIX: &str = "$ready:";

type Shard = Mutex<HashMap<Arc<str>, Arc<Mutex<Channel>>>>;

pub struct Hub {
    shards: Vec<Shard>,
    hasher: RandomState,
    probes: Mutex<HashMap<String, Vec<oneshot::Sender<()>>>>,
    pub deliveries: AtomicU64,
}

#[derive(Default)]
struct Channel {
    /// Keyed by the number of the client.
    subscribers: HashMap<u64, Subscriber>,
    /// Offset of the newest publication seen; 0 if unknown. If the next one does not continue it, there is a gap.
    newest: u64,
    /// The epoch of `newest`; empty while it is unknown.
    epoch: String,
}

struct Subscriber {
    client: Arc<Client>,
    /// The client has received the publications up to this offset.
    position: u64,
    /// The client tracks its position and recovers, so it must be notified of a gap.
    positioned: bool,
    /// `None` once the subscription is live.
    collected: Option<Collected>,
    /// A publication may have been missed while the subscription collected, so it must not go live.
    lost: bool,
}

/// Publications that arrived while the history of a subscription was read.
#[derive(Default)]
struct Collected {
    publications: Vec<Publication>,
    /// The epoch of their offsets; empty while none has an offset.
    epoch: String,
}

impl Collected {
    /// Keeps a publication. Returns false if there is no room or its epoch differs from that of the earlier ones.
    fn take(&mut self, publication: &Publication, epoch: &str) -> bool {
        if publication.offset > 0 {
            if self.epoch.is_empty() {
                self.epoch = epoch.into();
            } else if self.epoch != epoch {
                return false;
            }
        }

        if self.publications.len() >= COLLECTED_MAX {
            return false;
        }
        self.publications.push(publication.clone());
        true
    }
}

impl Channel {
    /// Continues in a new epoch. The positions of live subscribers are reset, because they belong to the old one.
    fn begin_epoch(&mut self, epoch: &str, newest: u64) {
        self.epoch = epoch.into();
        self.newest = newest;
        self.subscribers
            .values_mut()
            .filter(|subscriber| subscriber.collected.is_none())
            .for_each(|subscriber| subscriber.position = 0);
    }

    /// Ends the subscriptions of positioned clients, which resubscribe and recover. A subscription that still collects
    /// is only marked as lost: its client is notified when it would go live.
    fn end_positioned(&mut self, channel: &str) {
        self.subscribers.retain(|_, subscriber| {
            if subscriber.collected.is_some() {
                subscriber.lost = true;
                return true;
            }
            if subscriber.positioned {
                subscriber.client.lose_subscription(channel);
            }
            !subscriber.positioned
        });
    }
}

impl Default for Hub {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
            probes: Mutex::default(),
            deliveries: AtomicU64::new(0),
        }
    }
}

/// The frames of one reply: each encoding is built for the first client that needs it and shared with the others.
struct Encoded<'a> {
    reply: &'a dyn Fn() -> Reply,
    json: Option<Bytes>,
    protobuf: Option<Bytes>,
}

impl<'a> Encoded<'a> {
    fn new(reply: &'a dyn Fn() -> Reply) -> Self {
        Self { reply, json: None, protobuf: None }
    }

    fn frame(&mut self, encoding: Encoding) -> Bytes {
        let slot = match encoding {
            Encoding::Json => &mut self.json,
            Encoding::Protobuf => &mut self.protobuf,
        };
        slot.get_or_insert_with(|| frame(encoding, &(self.reply)())).clone()
    }
}

impl Hub {
    /// The channel of this node's readiness probes.
    pub fn probe_channel(node: &str) -> String {
        format!("{PROBE_PREFIX}{node}")
    }

    fn shard(&self, channel: &str) -> &Shard {
        &self.shards[self.hasher.hash_one(channel) as usize % SHARDS]
    }

    fn find(&self, channel: &str) -> Option<Arc<Mutex<Channel>>> {
        self.shard(channel).lock().get(channel).cloned()
    }

    /// The number of channels with a subscriber on this node.
    pub fn channels(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    /// The channels with a subscriber on this node.
    pub fn followed(&self) -> Vec<Arc<str>> {
        self.shards
            .iter()
            .flat_map(|shard| shard.lock().keys().cloned().collect::<Vec<_>>())
            .collect()
    }

    /// Whether the channel has a subscriber on this node.
    pub fn is_followed(&self, channel: &str) -> bool {
        self.shard(channel).lock().contains_key(channel)
    }

    /// Subscribes a client. The subscription collects until [`Self::go_live`].
    pub fn join(&self, channel: &str, client: &Arc<Client>) {
        let subscriber = Subscriber {
            client: client.clone(),
            position: 0,
            positioned: false,
            collected: Some(Collected::default()),
            lost: false,
        };

        let mut shard = self.shard(channel).lock();
        let name = shard
            .get_key_value(channel)
            .map_or_else(|| Arc::from(channel), |(name, _)| name.clone());
        shard
            .entry(name)
            .or_default()
            .lock()
            .subscribers
            .insert(client.number, subscriber);
    }

    /// Removes a client from a channel. Returns whether it was the last subscriber there.
    pub fn leave(&self, channel: &str, client: u64) -> bool {
        let mut shard = self.shard(channel).lock();
        let Some(found) = shard.get(channel) else { return false };
        // The shard stays locked, so that no client joins a channel that is being removed.
        let empty = {
            let mut found = found.lock();
            found.subscribers.remove(&client);
            found.subscribers.is_empty()
        };
        if empty {
            shard.remove(channel);
        }
        empty
    }

    /// Makes a collecting subscription live: sends `reply`, if given, then the collected publications after `position`,
    /// the newest position of the history that was read. A `positioned` client that may have missed a publication is
    /// unsubscribed instead.
    pub fn go_live(&self, channel: &str, client: &Client, reply: Option<Bytes>, position: &Position, positioned: bool) {
        let Some(found) = self.find(channel) else { return };
        let mut found = found.lock();
        // Sent under the channel's lock, so that no live publication can precede the reply.
        if let Some(reply) = reply {
            client.outbox.push_reply(reply);
        }
        let Some(mut subscriber) = found.subscribers.remove(&client.number) else {
            return;
        };

        let collected = subscriber.collected.take().unwrap_or_default();
        // The epoch changed between the read of the history and the collected publications: they do not continue it.
        let epochs_differ =
            !collected.epoch.is_empty() && !position.epoch.is_empty() && collected.epoch != position.epoch;
        if positioned && (subscriber.lost || epochs_differ) {
            client.lose_subscription(channel);
            return;
        }

        // The history that this subscriber read also updates the channel's own position.
        if !position.epoch.is_empty() && !epochs_differ && !subscriber.lost {
            if found.epoch != position.epoch {
                // This history is newer than the other subscribers' positions, so the epoch of those has ended.
                if !found.epoch.is_empty() {
                    found.end_positioned(channel);
                }
                found.begin_epoch(&position.epoch, position.offset);
            }
            found.newest = found.newest.max(position.offset);
        }

        subscriber.position = position.offset;
        subscriber.positioned = positioned;
        for publication in collected.publications {
            // Publications up to the position were already in the history.
            if publication.offset == 0 || publication.offset > subscriber.position {
                subscriber.position = subscriber.position.max(publication.offset);
                let push = Push { r#pub: Some(publication), ..Push::default() };
                client.outbox.push(frame(client.encoding, &Reply::push(channel, push)));
                self.deliveries.fetch_add(1, Relaxed);
            }
        }
        found.subscribers.insert(client.number, subscriber);
    }

    /// Delivers a publication to the channel's subscribers on this node. Engines call it in the order of offsets;
    /// `epoch` is the epoch of the offset.
    pub fn publication(&self, channel: &str, publication: &Publication, epoch: &str) {
        if channel.starts_with(PROBE_PREFIX) {
            // Probes are not subscribers of a channel; they wait in a map of their own.
            for probe in self.probes.lock().remove(channel).into_iter().flatten() {
                let _ = probe.send(());
            }
        }
        let Some(found) = self.find(channel) else { return };
        let mut found = found.lock();

        let offset = publication.offset;
        if offset > 0 {
            let other_epoch = !found.epoch.is_empty() && found.epoch != epoch;
            let gap = found.newest > 0 && offset > found.newest + 1;
            // Ended before the delivery: for those clients this publication does not continue the previous one.
            if other_epoch || gap {
                found.end_positioned(channel);
            }
            if found.epoch != epoch {
                found.begin_epoch(epoch, offset);
            }
            found.newest = found.newest.max(offset);
        }

        // Encoded at most once per encoding, and only if a subscriber needs it.
        let reply = || {
            let push = Push { r#pub: Some(publication.clone()), ..Push::default() };
            Reply::push(channel, push)
        };
        let mut encoded = Encoded::new(&reply);
        let mut delivered = 0;
        for subscriber in found.subscribers.values_mut() {
            if let Some(collected) = &mut subscriber.collected {
                let taken = collected.take(publication, epoch);
                subscriber.lost |= !taken;
                continue;
            }
            // A publication without an offset is in no history, so positions do not apply to it.
            if offset > 0 {
                if offset <= subscriber.position {
                    continue;
                }
                subscriber.position = offset;
            }
            subscriber.client.outbox.push(encoded.frame(subscriber.client.encoding));
            delivered += 1;
        }
        self.deliveries.fetch_add(delivered, Relaxed);
    }

    /// Delivers a join or leave to the channel's live subscribers on this node.
    pub fn event(&self, channel: &str, push: &Push) {
        let Some(found) = self.find(channel) else { return };
        let reply = || Reply::push(channel, push.clone());
        let mut encoded = Encoded::new(&reply);
        for subscriber in found
            .lock()
            .subscribers
            .values()
            .filter(|subscriber| subscriber.collected.is_none())
        {
            subscriber.client.outbox.push(encoded.frame(subscriber.client.encoding));
        }
    }

    /// Ends the subscriptions of all positioned clients, because publications of any channel may have been missed. The
    /// clients resubscribe and recover.
    pub fn interrupted(&self) {
        for channel in self.followed() {
            if let Some(found) = self.find(&channel) {
                let mut found = found.lock();
                // The position is unknown until the next publication or subscription, so that this does not count as a
                // gap.
                found.newest = 0;
                found.epoch.clear();
                found.end_positioned(&channel);
            }
        }
    }

    /// Resolves when a publication on `channel` reaches this node.
    pub fn probe(&self, channel: &str) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        let mut probes = self.probes.lock();
        let waiting = probes.entry(channel.into()).or_default();
        // Probes that timed out would otherwise pile up while nothing is delivered.
        waiting.retain(|sender| !sender.is_closed());
        waiting.push(sender);
        receiver
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abandoned_probes_are_dropped() {
        let hub = Hub::default();
        (0..100).for_each(|_| drop(hub.probe("$ready:n")));
        let mut waiting = hub.probe("$ready:n");
        assert_eq!(hub.probes.lock()["$ready:n"].len(), 1);

        hub.publication("$ready:n", &Publication::default(), "");
        assert!(waiting.try_recv().is_ok() && hub.probes.lock().is_empty());
    }
}
