//! The engine of a single node: histories are kept in memory, and in a log so that they survive a restart.
//!
//! The journal's thread gives each publication its offset and stores many with one commit. The publisher then delivers
//! it, together with the others that are due in its channel.

#[cfg(test)]
mod crashes;
mod histories;
mod migrate;
mod record;
mod stream;
#[cfg(test)]
mod tests;

use super::{Engine, Failed, Page};
use crate::Rules;
use crate::hub::Hub;
use async_trait::async_trait;
use bus::clock::unix_ms;
use histories::{Histories, Incoming, Streams};
use journal::{Durability, Log};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use stream::Stream;
use tokio::sync::oneshot;
use wire::channels::Position;
use wire::realtime::{ClientInfo, Publication, Push};

/// Bytes of expired publications that the file may have, in addition to as many as are live, before it is rewritten.
const EXPIRED_BYTES_MAX: u64 = 1024 * 1024;
/// Free bytes that the file keeps for later groups.
const FREE_BYTES_KEPT: u64 = 16 * 1024 * 1024;
/// Maximum free bytes that one call returns to the file system.
const BYTES_GIVEN_BACK: u64 = 8 * 1024 * 1024;
/// Bytes of a stored publication besides its data, about.
const PUBLICATION_BYTES: usize = 100;

pub struct Memory {
    hub: Arc<Hub>,
    journal: journal::Engine<Histories>,
    streams: Arc<Streams>,
    presence: Mutex<HashMap<String, BTreeMap<String, ClientInfo>>>,
}

/// A publication that waits for its commit. However the wait ends, the publication is delivered if it is stored: by
/// this, or by the journal's thread if this is dropped before.
struct Publishing<'a> {
    hub: &'a Hub,
    stream: Arc<Stream>,
    stored: oneshot::Receiver<Result<Position, journal::Error>>,
}

impl Drop for Publishing<'_> {
    fn drop(&mut self) {
        // Closed first: the journal's thread then either has stored the publication already or finds this closed.
        self.stored.close();
        self.stream.deliver(self.hub);
    }
}

impl Memory {
    /// Opens `channels.db` in `dir`. `boot_id` identifies the boot of the machine, which distinguishes a power cut from
    /// a killed process. `rules` has the rules of a channel.
    pub async fn open(
        dir: &Path,
        boot_id: &str,
        durability: Durability,
        hub: Arc<Hub>,
        rules: impl Fn(&str) -> Option<Rules> + Send + 'static,
    ) -> Result<Arc<Self>, journal::Error> {
        let (path, boot_id) = (dir.join("channels.db"), boot_id.to_string());
        let opening = tokio::task::spawn_blocking(move || {
            let mut log = Log::open(&path, durability)?;
            let histories = Histories::load(&mut log, &boot_id, rules)?;
            let streams = histories.streams();
            Ok::<_, journal::Error>((journal::Engine::start(log, histories)?, streams))
        });
        let ended = |_| journal::Error::Refused("the thread that opens the channel histories panicked".into());
        let (journal, streams) = opening.await.map_err(ended)??;
        Ok(Arc::new(Self { hub, journal, streams, presence: Mutex::default() }))
    }

    /// Stores a publication in a channel whose history is kept across restarts, and delivers it.
    async fn store(&self, stream: Arc<Stream>, incoming: Incoming) -> Result<Position, journal::Error> {
        let (answer, stored) = oneshot::channel();
        let (hub, publishing) = (self.hub.clone(), stream.clone());
        let operation = move |histories: &mut Histories, group: &mut Vec<u8>| -> journal::Answer<Histories> {
            let position = histories.publish(group, &publishing, incoming);
            Box::new(move |_, _| {
                if answer.send(position).is_err() {
                    publishing.deliver(&hub);
                }
            })
        };

        self.journal.queue(Box::new(operation)).await?;
        let mut publishing = Publishing { hub: &self.hub, stream, stored };
        (&mut publishing.stored).await.map_err(|_| self.journal.refusal())?
    }

    /// Keeps a publication in memory only, and delivers it.
    fn keep(&self, stream: &Stream, publication: Publication, key: Option<String>, rules: &Rules) -> Position {
        let at_ms = unix_ms();
        let position = {
            let mut history = stream.history.lock();
            history.expire(rules.history_ttl, at_ms);
            if let Some(known) = history.known(key.as_ref()) {
                return known;
            }
            let position = history.assign(publication, key, rules, at_ms);
            history.all_stored();
            position
        };
        stream.deliver(&self.hub);
        position
    }

    /// Rewrites the file if much of it is expired, and returns free bytes to the file system.
    async fn tidy_file(&self, live_bytes: u64) -> Result<(), journal::Error> {
        let stored = |(), _: &Histories, log: &Log| log.snapshot_bytes() + log.replay_bytes();
        let stored = self.journal.run(|_, _| (), stored).await?;
        if stored > 2 * live_bytes + EXPIRED_BYTES_MAX {
            self.journal
                .run(|histories, _| histories.rewrite(), |(), _, _| ())
                .await?;
            while self
                .journal
                .run(|_, _| (), |(), histories, _| histories.is_rewriting())
                .await?
            {}
        }

        let give_back = |(), _: &Histories, log: &Log| log.give_back(FREE_BYTES_KEPT, BYTES_GIVEN_BACK);
        self.journal.run(|_, _| (), give_back).await?
    }

    /// Evicts a channel that is not in use, also from the file.
    async fn evict(&self, stream: Arc<Stream>) {
        let (durable, epoch) = {
            let history = stream.history.lock();
            (history.durable, history.epoch.clone())
        };
        if !(self.streams.evict(&stream) && durable) {
            return;
        }

        let channel = stream.channel.clone();
        let remove = move |histories: &mut Histories, group: &mut Vec<u8>| histories.remove(group, channel, epoch);
        if let Err(error) = self.journal.run(remove, |(), _, _| ()).await {
            tracing::warn!(%error, "cannot remove an evicted channel; it will reappear at the next start");
        }
    }
}

#[async_trait]
impl Engine for Memory {
    async fn publish(
        &self,
        channel: &str,
        publication: Publication,
        rules: &Rules,
        idempotency_key: Option<String>,
    ) -> Result<Position, Failed> {
        if !rules.keeps_history() {
            // Without offsets there is no order to keep, so no lock.
            self.hub.publication(channel, &publication, "");
            return Ok(Position::default());
        }

        let stream = self.streams.get(channel);
        if !rules.durable {
            return Ok(self.keep(&stream, publication, idempotency_key, rules));
        }
        let incoming = Incoming::new(publication, idempotency_key, rules.clone());
        Ok(self.store(stream, incoming).await?)
    }

    async fn event(&self, channel: &str, push: Push) {
        self.hub.event(channel, &push);
    }

    async fn history(&self, channel: &str, rules: &Rules, since: Option<&Position>) -> Result<Page, Failed> {
        let stream = self.streams.get(channel);
        let (publications, position) = {
            let mut history = stream.history.lock();
            history.expire(rules.history_ttl, unix_ms());
            history.after(since.map_or(0, |since| since.offset))
        };
        let publications = publications
            .iter()
            .map(|publication| Publication::clone(publication))
            .collect();
        Ok(Page { publications, position })
    }

    async fn present(&self, channel: &str, client: &str, info: Option<ClientInfo>) -> Result<(), Failed> {
        let mut presence = self.presence.lock();
        match info {
            Some(info) => _ = presence.entry(channel.into()).or_default().insert(client.into(), info),
            None => {
                if let Some(clients) = presence.get_mut(channel) {
                    clients.remove(client);
                    if clients.is_empty() {
                        presence.remove(channel);
                    }
                }
            }
        }
        Ok(())
    }

    async fn presence(&self, channel: &str) -> Result<BTreeMap<String, ClientInfo>, Failed> {
        Ok(self.presence.lock().get(channel).cloned().unwrap_or_default())
    }

    async fn follow(&self, _channel: &str) -> Result<(), Failed> {
        Ok(())
    }

    async fn unfollow(&self, _channel: &str) {}

    async fn tidy(&self) {
        let now = unix_ms();
        let mut live_bytes = 0;
        for stream in self.streams.all() {
            let idle = {
                let mut history = stream.history.lock();
                let ttl = history.ttl;
                history.expire(ttl, now);
                if history.durable {
                    let bytes = history
                        .kept
                        .iter()
                        .map(|kept| kept.publication.data.len() + PUBLICATION_BYTES);
                    live_bytes += bytes.sum::<usize>() as u64;
                }
                now.saturating_sub(history.touched_ms) >= history.evict_after().as_millis() as u64
            };
            if idle && !self.hub.is_followed(&stream.channel) {
                self.evict(stream).await;
            }
        }

        if let Err(error) = self.tidy_file(live_bytes).await {
            tracing::warn!(%error, "cannot remove expired publications from the file; trying again in 15 s");
        }
    }

    async fn close(&self) -> Result<(), Failed> {
        let closed = self
            .journal
            .run(|histories, _| histories.close(), |(), _, log| log.end_use());
        Ok(closed.await??)
    }

    fn describe(&self) -> &'static str {
        "memory"
    }
}
