//! One node: histories in memory, and in a journal so that they outlive a restart.
//!
//! A channel's stream is locked while a publication gets its offset, is written and is handed to the hub: that is the
//! order all readers see.

use super::{Engine, Failed, Page};
use crate::Rules;
use crate::hub::Hub;
use async_trait::async_trait;
use journal::Journal;
use journal::rusqlite::params;
use parking_lot::Mutex;
use prost::Message;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use wire::channels::Position;
use wire::realtime::{ClientInfo, Publication, Push};

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS channels (channel TEXT PRIMARY KEY, epoch TEXT NOT NULL, offset INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS publications (
    channel TEXT NOT NULL, offset INTEGER NOT NULL, data BLOB NOT NULL, at_ms INTEGER NOT NULL, key TEXT,
    PRIMARY KEY (channel, offset)) WITHOUT ROWID;
";

/// A channel that nobody published to for this long is forgotten; who comes back to it starts a new epoch.
const FORGET_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);
/// The same for a channel whose history is not kept through a restart.
const FORGET_VOLATILE_AFTER: Duration = Duration::from_secs(3600);

pub struct Memory {
    hub: Arc<Hub>,
    journal: Journal,
    streams: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Stream>>>>,
    presence: Mutex<HashMap<String, BTreeMap<String, ClientInfo>>>,
}

struct Stream {
    position: Position,
    history: VecDeque<Kept>,
    /// How long the newest publication asked to be kept.
    ttl: Duration,
    durable: bool,
    touched_ms: u64,
}

struct Kept {
    publication: Publication,
    at_ms: u64,
    key: Option<String>,
}

impl Stream {
    fn new() -> Self {
        let epoch = uuid::Uuid::new_v4().simple().to_string()[..8].to_string();
        Self {
            position: Position { offset: 0, epoch },
            history: VecDeque::new(),
            ttl: Duration::ZERO,
            durable: false,
            touched_ms: now_ms(),
        }
    }

    fn expire(&mut self, ttl: Duration, now_ms: u64) {
        let oldest = now_ms.saturating_sub(ttl.as_millis() as u64);
        while self.history.front().is_some_and(|kept| kept.at_ms < oldest) {
            self.history.pop_front();
        }
    }
}

impl Memory {
    pub async fn open(dir: &Path, hub: Arc<Hub>) -> Result<Arc<Self>, journal::Error> {
        let path = dir.join("channels.db");
        let journal = tokio::task::spawn_blocking(move || Journal::open(&path, SCHEMA));
        let journal = journal.await.map_err(|_| journal::Error::Closed)??;
        let streams = Mutex::new(load(&journal).await?);
        Ok(Arc::new(Self { hub, journal, streams, presence: Mutex::default() }))
    }

    fn stream(&self, channel: &str) -> Arc<tokio::sync::Mutex<Stream>> {
        let mut streams = self.streams.lock();
        if let Some(found) = streams.get(channel) {
            return found.clone();
        }
        let stream = Arc::new(tokio::sync::Mutex::new(Stream::new()));
        streams.insert(channel.into(), stream.clone());
        stream
    }

    /// Drops the stream, unless somebody has taken hold of it: the map's handle and the caller's are not counted.
    fn forget(&self, channel: &str) -> bool {
        let mut streams = self.streams.lock();
        let idle = streams.get(channel).is_some_and(|stream| Arc::strong_count(stream) <= 2);
        if idle {
            streams.remove(channel);
        }
        idle
    }

    async fn store(&self, channel: &str, kept: &Kept, epoch: &str, oldest: u64) -> Result<(), journal::Error> {
        let (channel, epoch) = (channel.to_string(), epoch.to_string());
        let (offset, at_ms, key) = (kept.publication.offset, kept.at_ms, kept.key.clone());
        let data = kept.publication.encode_to_vec();
        self.journal
            .write(move |db| {
                db.prepare_cached(
                    "INSERT INTO channels VALUES (?1, ?2, ?3)
                     ON CONFLICT (channel) DO UPDATE SET epoch = excluded.epoch, offset = excluded.offset",
                )?
                .execute(params![channel, epoch, offset])?;
                db.prepare_cached("INSERT OR REPLACE INTO publications VALUES (?1, ?2, ?3, ?4, ?5)")?
                    .execute(params![channel, offset, data, at_ms, key])?;
                db.prepare_cached("DELETE FROM publications WHERE channel = ?1 AND offset < ?2")?
                    .execute(params![channel, oldest])?;
                Ok(())
            })
            .await
    }
}

async fn load(journal: &Journal) -> Result<HashMap<String, Arc<tokio::sync::Mutex<Stream>>>, journal::Error> {
    let rows = journal.read(|db| {
        let mut streams: HashMap<String, Stream> = HashMap::new();
        let mut statement = db.prepare("SELECT channel, epoch, offset FROM channels")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let mut stream = Stream::new();
            stream.position = Position { epoch: row.get(1)?, offset: row.get(2)? };
            stream.durable = true;
            streams.insert(row.get(0)?, stream);
        }
        let mut statement =
            db.prepare("SELECT channel, data, at_ms, key FROM publications ORDER BY channel, offset")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let channel: String = row.get(0)?;
            let data: Vec<u8> = row.get(1)?;
            if let (Some(stream), Ok(publication)) = (streams.get_mut(&channel), Publication::decode(&data[..])) {
                stream.touched_ms = row.get(2)?;
                stream.history.push_back(Kept { publication, at_ms: row.get(2)?, key: row.get(3)? });
            }
        }
        Ok(streams)
    });
    let shared = |(channel, stream)| (channel, Arc::new(tokio::sync::Mutex::new(stream)));
    Ok(rows.await?.into_iter().map(shared).collect())
}

#[async_trait]
impl Engine for Memory {
    async fn publish(
        &self,
        channel: &str,
        mut publication: Publication,
        rules: &Rules,
        idempotency_key: Option<String>,
    ) -> Result<Position, Failed> {
        if !rules.keeps_history() {
            self.hub.publication(channel, &publication, "");
            return Ok(Position::default());
        }
        let stream = self.stream(channel);
        let mut stream = stream.lock().await;
        let at_ms = now_ms();
        stream.expire(rules.history_ttl, at_ms);
        if idempotency_key.is_some()
            && let Some(known) = stream.history.iter().find(|kept| kept.key == idempotency_key)
        {
            let epoch = stream.position.epoch.clone();
            return Ok(Position { offset: known.publication.offset, epoch });
        }
        let offset = stream.position.offset + 1;
        publication.offset = offset;
        let kept = Kept { publication, at_ms, key: idempotency_key };
        if rules.durable {
            let oldest = (offset + 1).saturating_sub(rules.history_size as u64);
            self.store(channel, &kept, &stream.position.epoch, oldest).await?;
        }
        stream.position.offset = offset;
        (stream.ttl, stream.durable, stream.touched_ms) = (rules.history_ttl, rules.durable, at_ms);
        self.hub.publication(channel, &kept.publication, &stream.position.epoch);
        stream.history.push_back(kept);
        while stream.history.len() > rules.history_size {
            stream.history.pop_front();
        }
        Ok(stream.position.clone())
    }

    async fn event(&self, channel: &str, push: Push) {
        self.hub.event(channel, &push);
    }

    async fn history(&self, channel: &str, rules: &Rules, since: Option<&Position>) -> Result<Page, Failed> {
        let stream = self.stream(channel);
        let mut stream = stream.lock().await;
        stream.expire(rules.history_ttl, now_ms());
        let after = since.map_or(0, |since| since.offset);
        let publications = stream.history.iter().map(|kept| &kept.publication);
        let publications = publications.filter(|publication| publication.offset > after).cloned().collect();
        Ok(Page { publications, position: stream.position.clone() })
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
        let now = now_ms();
        let streams: Vec<_> = self.streams.lock().iter().map(|(name, stream)| (name.clone(), stream.clone())).collect();
        for (channel, stream) in streams {
            let mut stream = stream.lock().await;
            let ttl = stream.ttl;
            // Zero: loaded and not used since; how long it is kept is known with its first use.
            if !ttl.is_zero() {
                stream.expire(ttl, now);
            }
            let forget = if stream.durable { FORGET_AFTER } else { FORGET_VOLATILE_AFTER };
            let used = self.hub.is_followed(&channel);
            if used || now.saturating_sub(stream.touched_ms) < forget.as_millis() as u64 {
                continue;
            }
            let durable = stream.durable;
            drop(stream);
            let idle = self.forget(&channel);
            if idle && durable {
                let removed = self.journal.write(move |db| {
                    db.execute("DELETE FROM publications WHERE channel = ?1", [&channel])?;
                    db.execute("DELETE FROM channels WHERE channel = ?1", [&channel])
                });
                if let Err(error) = removed.await {
                    tracing::warn!(%error, "an old channel was not removed from the journal");
                }
            }
        }
    }

    fn describe(&self) -> &'static str {
        "memory"
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
