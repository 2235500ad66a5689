//! Who on this node follows which channel, and the delivery to them.
//!
//! A subscription begins by collecting: what arrives while its history is read waits, and goes out behind the reply, less
//! what the history held already. So live publications join recovered ones with no gap and no double.

use crate::client::Client;
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
/// Publications that wait for one subscription to become live; what comes beyond is missed, and that is told.
const COLLECTED_MAX: usize = 4096;

/// Clients do not reach these channels, since no namespace has the name `ready`.
const PROBE_PREFIX: &str = "$ready:";

pub struct Hub {
    shards: Vec<Mutex<HashMap<Arc<str>, Arc<Mutex<Channel>>>>>,
    hasher: RandomState,
    probes: Mutex<HashMap<String, Vec<oneshot::Sender<()>>>>,
    pub deliveries: AtomicU64,
}

#[derive(Default)]
struct Channel {
    subscribers: HashMap<u64, Subscriber>,
    /// Offset of the newest publication that came by; a jump beyond the next one is a gap.
    newest: u64,
    /// The life of the history that `newest` counts in; empty while unknown.
    epoch: String,
}

struct Subscriber {
    client: Arc<Client>,
    /// Publications up to this offset are not for it: it has them.
    position: u64,
    /// Has it been told its position: then a gap is told too.
    positioned: bool,
    /// Until it is live.
    collected: Option<Collected>,
    /// Something may have been missed while it collected: it is told so once it is live.
    lost: bool,
}

/// Publications that arrived while the history of a subscription was read.
#[derive(Default)]
struct Collected {
    publications: Vec<Publication>,
    /// The life that their offsets count in; empty while none counts.
    epoch: String,
}

impl Collected {
    /// Returns false if there is no room, or if the publication belongs to another life than those before it.
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
    /// Offsets count in another life from here on, so positions in the previous one no longer mean anything.
    fn begin(&mut self, epoch: &str, newest: u64) {
        self.epoch = epoch.into();
        self.newest = newest;
        for subscriber in self
            .subscribers
            .values_mut()
            .filter(|subscriber| subscriber.collected.is_none())
        {
            subscriber.position = 0;
        }
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

/// Frames of one reply, made when the first reader of an encoding needs it, then shared.
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
        slot.get_or_insert_with(|| crate::client::frame(encoding, &(self.reply)()))
            .clone()
    }
}

impl Hub {
    /// The channel on which this node checks that it is ready.
    pub fn probe_channel(node: &str) -> String {
        format!("{PROBE_PREFIX}{node}")
    }

    fn shard(&self, channel: &str) -> &Mutex<HashMap<Arc<str>, Arc<Mutex<Channel>>>> {
        &self.shards[self.hasher.hash_one(channel) as usize % SHARDS]
    }

    pub fn channels(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    /// The followed channels now.
    pub fn followed(&self) -> Vec<Arc<str>> {
        self.shards
            .iter()
            .flat_map(|shard| shard.lock().keys().cloned().collect::<Vec<_>>())
            .collect()
    }

    /// Whether anybody here is on the channel.
    pub fn is_followed(&self, channel: &str) -> bool {
        self.shard(channel).lock().contains_key(channel)
    }

    /// Puts a client on a channel, collecting.
    pub fn join(&self, channel: &str, client: &Arc<Client>) {
        let mut shard = self.shard(channel).lock();
        let name = shard
            .get_key_value(channel)
            .map_or_else(|| Arc::from(channel), |(name, _)| name.clone());
        let subscriber = Subscriber {
            client: client.clone(),
            position: 0,
            positioned: false,
            collected: Some(Collected::default()),
            lost: false,
        };
        shard
            .entry(name)
            .or_default()
            .lock()
            .subscribers
            .insert(client.number, subscriber);
    }

    /// Takes a client off a channel; whether it was the last one there.
    pub fn leave(&self, channel: &str, client: u64) -> bool {
        let mut shard = self.shard(channel).lock();
        let Some(found) = shard.get(channel) else { return false };
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

    /// Ends the collecting: the subscribe reply (if it goes by itself), then what was collected behind `position`.
    /// `positioned` says whether the client counts offsets.
    pub fn go_live(&self, channel: &str, client: &Client, reply: Option<Bytes>, position: &Position, positioned: bool) {
        let found = self.shard(channel).lock().get(channel).cloned();
        let Some(found) = found else { return };
        let mut found = found.lock();
        if let Some(reply) = reply {
            client.outbox.push_reply(reply);
        }
        let Some(mut subscriber) = found.subscribers.remove(&client.number) else {
            return;
        };
        let collected = subscriber.collected.take().unwrap_or_default();
        let two_lives = !collected.epoch.is_empty() && !position.epoch.is_empty() && collected.epoch != position.epoch;
        if positioned && (subscriber.lost || two_lives) {
            client.lose(channel);
            return;
        }

        if !position.epoch.is_empty() && !two_lives && !subscriber.lost {
            if found.epoch != position.epoch {
                // This history was read after the others got their positions: they belong to a life that is over.
                if !found.epoch.is_empty() {
                    lost(channel, &mut found);
                }
                found.begin(&position.epoch, position.offset);
            }
            found.newest = found.newest.max(position.offset);
        }

        subscriber.position = position.offset;
        subscriber.positioned = positioned;
        for publication in collected.publications {
            if publication.offset == 0 || publication.offset > subscriber.position {
                subscriber.position = subscriber.position.max(publication.offset);
                let push = Push { r#pub: Some(publication), ..Push::default() };
                client
                    .outbox
                    .push(crate::client::frame(client.encoding, &Reply::push(channel, push)));
                self.deliveries.fetch_add(1, Relaxed);
            }
        }
        found.subscribers.insert(client.number, subscriber);
    }

    /// A publication to everybody on the channel here. Engines call it in the order of offsets; `epoch` is the life of
    /// the history that the offset counts in.
    pub fn publication(&self, channel: &str, publication: &Publication, epoch: &str) {
        if channel.starts_with(PROBE_PREFIX) {
            for probe in self.probes.lock().remove(channel).into_iter().flatten() {
                let _ = probe.send(());
            }
        }
        let found = self.shard(channel).lock().get(channel).cloned();
        let Some(found) = found else { return };
        let mut found = found.lock();
        let offset = publication.offset;
        if offset > 0 {
            let other_life = !found.epoch.is_empty() && found.epoch != epoch;
            let gap = found.newest > 0 && offset > found.newest + 1;
            if other_life || gap {
                lost(channel, &mut found);
            }
            if found.epoch != epoch {
                found.begin(epoch, offset);
            }
            found.newest = found.newest.max(offset);
        }
        let reply = || {
            let push = Push { r#pub: Some(publication.clone()), ..Push::default() };
            Reply::push(channel, push)
        };
        let mut encoded = Encoded::new(&reply);
        let mut delivered = 0;
        for subscriber in found.subscribers.values_mut() {
            if let Some(collected) = &mut subscriber.collected {
                subscriber.lost |= !collected.take(publication, epoch);
                continue;
            }
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

    /// A join or leave to everybody on the channel here.
    pub fn event(&self, channel: &str, push: &Push) {
        let found = self.shard(channel).lock().get(channel).cloned();
        let Some(found) = found else { return };
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

    /// Publications may have been missed on every channel: those who count offsets subscribe again and recover.
    pub fn interrupted(&self) {
        for channel in self.followed() {
            let found = self.shard(&channel).lock().get(&channel).cloned();
            if let Some(found) = found {
                let mut found = found.lock();
                found.newest = 0;
                found.epoch.clear();
                lost(&channel, &mut found);
            }
        }
    }

    /// Resolves when a publication on `channel` reaches this node.
    pub fn probe(&self, channel: &str) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        let mut probes = self.probes.lock();
        let waiting = probes.entry(channel.into()).or_default();
        // While nothing is delivered, those before it have given up.
        waiting.retain(|sender| !sender.is_closed());
        waiting.push(sender);
        receiver
    }
}

/// Ends the subscriptions that count offsets; the client comes again and recovers. One that collects hears of it when
/// it is live.
fn lost(channel: &str, found: &mut Channel) {
    found.subscribers.retain(|_, subscriber| {
        if subscriber.collected.is_some() {
            subscriber.lost = true;
            return true;
        }
        if subscriber.positioned {
            subscriber.client.lose(channel);
        }
        !subscriber.positioned
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_that_gave_up_are_dropped() {
        let hub = Hub::default();
        (0..100).for_each(|_| drop(hub.probe("$ready:n")));
        let mut waiting = hub.probe("$ready:n");
        assert_eq!(hub.probes.lock()["$ready:n"].len(), 1);
        hub.publication("$ready:n", &Publication::default(), "");
        assert!(waiting.try_recv().is_ok() && hub.probes.lock().is_empty());
    }
}
