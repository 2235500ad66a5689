//! The engine of a single node: histories are kept in memory, and in a journal so that they survive a restart.
//!
//! A channel's stream stays locked while a publication gets its offset, is written and is delivered, so all readers see
//! publications in the order of offsets.

use super::{Engine, Failed, Page, fresh_epoch};
use crate::Rules;
use crate::hub::Hub;
use async_trait::async_trait;
use bus::clock::unix_ms;
use journal::rusqlite::{Connection, params};
use journal::{Continuity, Journal};
use parking_lot::Mutex;
use prost::Message;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use wire::channels::Position;
use wire::realtime::{ClientInfo, Publication, Push};

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS channels (
    channel TEXT PRIMARY KEY, epoch TEXT NOT NULL, offset INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS publications (
    channel TEXT NOT NULL, offset INTEGER NOT NULL, data BLOB NOT NULL, at_ms INTEGER NOT NULL, key TEXT,
    PRIMARY KEY (channel, offset)) WITHOUT ROWID;
";

/// A channel without subscribers or publications for this long is evicted. If it is used again, it begins a new epoch.
const EVICT_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);
/// The same for a channel whose history is not kept across restarts.
const EVICT_VOLATILE_AFTER: Duration = Duration::from_secs(3600);
/// The same for a channel without any publication, because clients can create any number of these by reading them.
const EVICT_EMPTY_AFTER: Duration = Duration::from_secs(300);

pub struct Memory {
    hub: Arc<Hub>,
    journal: Journal,
    streams: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Stream>>>>,
    presence: Mutex<HashMap<String, BTreeMap<String, ClientInfo>>>,
}

struct Stream {
    position: Position,
    history: VecDeque<Kept>,
    /// The history ttl of the newest publication.
    ttl: Duration,
    durable: bool,
    touched_ms: u64,
    /// The journal has no publications before this offset.
    stored_from: u64,
}

struct Kept {
    publication: Publication,
    at_ms: u64,
    key: Option<String>,
}

impl Stream {
    fn new() -> Self {
        Self {
            position: Position { offset: 0, epoch: fresh_epoch() },
            history: VecDeque::new(),
            ttl: Duration::ZERO,
            durable: false,
            touched_ms: unix_ms(),
            stored_from: 0,
        }
    }

    /// Drops publications that are older than `ttl`.
    fn expire(&mut self, ttl: Duration, now_ms: u64) {
        let oldest = now_ms.saturating_sub(ttl.as_millis() as u64);
        while self.history.front().is_some_and(|kept| kept.at_ms < oldest) {
            self.history.pop_front();
        }
    }

    /// The offset of the oldest publication kept, or of the next one if none is kept.
    fn oldest(&self) -> u64 {
        self.history
            .front()
            .map_or(self.position.offset + 1, |kept| kept.publication.offset)
    }

    fn evict_after(&self) -> Duration {
        match (self.position.offset, self.durable) {
            (0, _) => EVICT_EMPTY_AFTER,
            (_, true) => EVICT_AFTER,
            (_, false) => EVICT_VOLATILE_AFTER,
        }
    }
}

impl Memory {
    /// Opens `channels.db` in `dir`. `boot_id` identifies the boot of the machine, which distinguishes a power cut from
    /// a killed process.
    pub async fn open<'a>(
        dir: &Path,
        boot_id: &str,
        hub: Arc<Hub>,
        rules: impl Fn(&str) -> Option<&'a Rules>,
    ) -> Result<Arc<Self>, journal::Error> {
        let (path, boot_id) = (dir.join("channels.db"), boot_id.to_string());
        let opening = tokio::task::spawn_blocking(move || Journal::resume(&path, SCHEMA, &boot_id, renew_epochs));
        let (journal, renewed) = opening.await.map_err(|_| journal::Error::Closed)??;
        if renewed > 0 {
            tracing::warn!(
                channels = renewed,
                "the newest publications may be missing from the channel histories (after a power cut, or because an \
                 older channels.db was restored): the channels begin a new epoch"
            );
        }

        let mut streams = load(&journal).await?;
        for (channel, stream) in &mut streams {
            stream.ttl = rules(channel).map_or(Duration::ZERO, |rules| rules.history_ttl);
            stream.expire(stream.ttl, unix_ms());
        }

        let shared = |(channel, stream)| (channel, Arc::new(tokio::sync::Mutex::new(stream)));
        let streams = Mutex::new(streams.into_iter().map(shared).collect());
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

    /// Removes a stream from memory unless another task uses it. Returns whether it was removed.
    fn evict(&self, channel: &str) -> bool {
        let mut streams = self.streams.lock();
        // The map has one handle and the caller another.
        let idle = streams
            .get(channel)
            .is_some_and(|stream| Arc::strong_count(stream) <= 2);
        if idle {
            streams.remove(channel);
        }
        idle
    }

    /// Writes a publication and removes those before `oldest`, in one transaction.
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
                // Higher offsets belong to an earlier epoch: the channel was evicted and is used again.
                db.prepare_cached("DELETE FROM publications WHERE channel = ?1 AND (offset < ?2 OR offset > ?3)")?
                    .execute(params![channel, oldest, offset])?;
                Ok(())
            })
            .await
    }

    /// Removes expired publications from the journal.
    async fn unstore(&self, channel: &str, stream: &mut Stream) -> Result<(), journal::Error> {
        let oldest = stream.oldest();
        if !stream.durable || stream.stored_from >= oldest {
            return Ok(());
        }

        let channel = channel.to_string();
        self.journal
            .write(move |db| {
                db.prepare_cached("DELETE FROM publications WHERE channel = ?1 AND offset < ?2")?
                    .execute(params![channel, oldest])
            })
            .await?;
        stream.stored_from = oldest;
        Ok(())
    }

    /// Removes an evicted channel from the journal, unless it has begun a new epoch meanwhile.
    async fn remove(&self, channel: String, epoch: String) -> Result<(), journal::Error> {
        self.journal
            .write(move |db| {
                let gone = db.execute("DELETE FROM channels WHERE channel = ?1 AND epoch = ?2", [&channel, &epoch])?;
                if gone > 0 {
                    db.execute("DELETE FROM publications WHERE channel = ?1", [&channel])?;
                }
                Ok(())
            })
            .await
    }
}

/// Begins a new epoch in every stored channel, unless the file is certain to hold every acknowledged publication: the
/// offsets of lost publications are assigned again, which must not happen within one epoch. The histories stay readable
/// and their offsets continue. Returns the number of channels.
fn renew_epochs(db: &Connection, continuity: Continuity) -> journal::rusqlite::Result<usize> {
    if continuity == Continuity::Certain {
        return Ok(0);
    }

    let mut statement = db.prepare("SELECT channel FROM channels")?;
    let channels = statement
        .query_map([], |row| row.get(0))?
        .collect::<Result<Vec<String>, _>>()?;

    let mut update = db.prepare("UPDATE channels SET epoch = ?2 WHERE channel = ?1")?;
    for channel in &channels {
        update.execute([channel, &fresh_epoch()])?;
    }
    Ok(channels.len())
}

async fn load(journal: &Journal) -> Result<HashMap<String, Stream>, journal::Error> {
    let streams = journal.read(|db| {
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
            // An unreadable row is skipped, so that it cannot prevent the start.
            if let (Some(stream), Ok(publication)) = (streams.get_mut(&channel), Publication::decode(&data[..])) {
                stream.touched_ms = row.get(2)?;
                stream
                    .history
                    .push_back(Kept { publication, at_ms: row.get(2)?, key: row.get(3)? });
            }
        }
        Ok(streams)
    });
    streams.await
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
            // Without offsets there is no order to keep, so no lock.
            self.hub.publication(channel, &publication, "");
            return Ok(Position::default());
        }

        let stream = self.stream(channel);
        let mut stream = stream.lock().await;
        let at_ms = unix_ms();
        stream.expire(rules.history_ttl, at_ms);
        // An idempotency key is known as long as its publication is in the history.
        if idempotency_key.is_some()
            && let Some(known) = stream.history.iter().find(|kept| kept.key == idempotency_key)
        {
            let epoch = stream.position.epoch.clone();
            return Ok(Position { offset: known.publication.offset, epoch });
        }

        // The offset is assigned here, under the lock of the stream.
        let offset = stream.position.offset + 1;
        publication.offset = offset;
        let kept = Kept { publication, at_ms, key: idempotency_key };
        // Written before it is acknowledged or delivered. If the write fails, the offset is not used.
        if rules.durable {
            let oldest = (offset + 1)
                .saturating_sub(rules.history_size as u64)
                .max(stream.oldest());
            self.store(channel, &kept, &stream.position.epoch, oldest).await?;
            stream.stored_from = oldest;
        }

        // From here on nothing can fail, so memory and journal agree.
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
        stream.expire(rules.history_ttl, unix_ms());

        let after = since.map_or(0, |since| since.offset);
        let publications = stream
            .history
            .iter()
            .map(|kept| &kept.publication)
            .filter(|publication| publication.offset > after)
            .cloned()
            .collect();
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
        let now = unix_ms();
        // Copied, so that publishers do not wait for the map's lock while the streams are tidied.
        let streams: Vec<_> = self
            .streams
            .lock()
            .iter()
            .map(|(name, stream)| (name.clone(), stream.clone()))
            .collect();

        for (channel, stream) in streams {
            let mut stream = stream.lock().await;
            let ttl = stream.ttl;
            stream.expire(ttl, now);
            if let Err(error) = self.unstore(&channel, &mut stream).await {
                tracing::warn!(channel, %error, "cannot remove expired publications; trying again in 15 s");
            }

            let used = self.hub.is_followed(&channel);
            if used || now.saturating_sub(stream.touched_ms) < stream.evict_after().as_millis() as u64 {
                continue;
            }

            let (durable, epoch) = (stream.durable, stream.position.epoch.clone());
            drop(stream);
            let evicted = self.evict(&channel);
            if !(evicted && durable) {
                continue;
            }
            if let Err(error) = self.remove(channel, epoch).await {
                tracing::warn!(%error, "cannot remove an evicted channel; it will reappear at the next start");
            }
        }
    }

    async fn close(&self) -> Result<(), Failed> {
        Ok(self.journal.close().await?)
    }

    fn describe(&self) -> &'static str {
        "memory"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn open(dir: &Path, rules: &Rules) -> Arc<Memory> {
        open_in("a boot", dir, rules).await
    }

    async fn open_in(boot: &str, dir: &Path, rules: &Rules) -> Arc<Memory> {
        // The previous engine closes its file a moment after its last handle is dropped.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            match Memory::open(dir, boot, Arc::default(), |_| Some(rules)).await {
                Ok(memory) => return memory,
                Err(error) => assert!(std::time::Instant::now() < deadline, "{error}"),
            }
            tokio::task::yield_now().await;
        }
    }

    async fn publish(memory: &Memory, channel: &str, rules: &Rules) -> Position {
        let publication = Publication { data: "1".into(), ..Publication::default() };
        memory.publish(channel, publication, rules, None).await.unwrap()
    }

    async fn stored(memory: &Memory) -> u64 {
        let count = |db: &Connection| db.query_row("SELECT count(*) FROM publications", [], |row| row.get(0));
        memory.journal.read(count).await.unwrap()
    }

    /// Backdates all publications and the last use of each channel by this much.
    async fn age(memory: &Memory, by: Duration) {
        let by = by.as_millis() as u64;
        let streams: Vec<_> = memory.streams.lock().values().cloned().collect();
        for stream in streams {
            let mut stream = stream.lock().await;
            stream.touched_ms -= by;
            stream.history.iter_mut().for_each(|kept| kept.at_ms -= by);
        }

        let sql = format!("UPDATE publications SET at_ms = at_ms - {by}");
        memory.journal.write(move |db| db.execute(&sql, [])).await.unwrap();
    }

    #[tokio::test]
    async fn expired_publications_are_removed_from_memory_and_file() {
        let dir = tempfile::tempdir().unwrap();
        let rules = Rules { history_ttl: Duration::from_secs(60), ..Rules::default() };
        let memory = open(dir.path(), &rules).await;
        let position = publish(&memory, "a", &rules).await;
        publish(&memory, "a", &rules).await;

        age(&memory, Duration::from_secs(61)).await;
        publish(&memory, "a", &rules).await;
        assert_eq!(stored(&memory).await, 1, "storing a publication removes the expired ones");

        age(&memory, Duration::from_secs(61)).await;
        publish(&memory, "b", &rules).await;
        memory.tidy().await;
        assert_eq!(stored(&memory).await, 1, "publications other than the one to b are left");

        age(&memory, Duration::from_secs(61)).await;
        drop(memory);
        let memory = open(dir.path(), &rules).await;
        let kept: usize = memory
            .streams
            .lock()
            .values()
            .map(|stream| stream.try_lock().unwrap().history.len())
            .sum();
        assert_eq!(kept, 0, "a restart restored expired publications");
        let page = memory.history("a", &rules, None).await.unwrap();
        assert_eq!(page.position, Position { offset: 3, ..position }, "the position stays");
    }

    #[tokio::test]
    async fn power_cut_begins_new_epochs_and_a_killed_process_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let rules = Rules::default();
        let memory = open_in("first", dir.path(), &rules).await;
        let first = publish(&memory, "a", &rules).await;
        drop(memory);

        let memory = open_in("first", dir.path(), &rules).await;
        let after_a_kill = publish(&memory, "a", &rules).await;
        assert_eq!(after_a_kill, Position { offset: 2, epoch: first.epoch.clone() });
        drop(memory);

        let memory = open_in("second", dir.path(), &rules).await;
        let page = memory.history("a", &rules, None).await.unwrap();
        assert_ne!(page.position.epoch, first.epoch, "a power cut may have lost acknowledged publications");
        assert_eq!((page.position.offset, page.publications.len()), (2, 2), "the stored publications stay");
        assert_eq!(publish(&memory, "a", &rules).await.offset, 3);

        memory.close().await.unwrap();
        let late = memory.publish("a", Publication::default(), &rules, None).await;
        assert!(late.is_err(), "a closed engine acknowledges nothing");
        drop(memory);

        let memory = open_in("third", dir.path(), &rules).await;
        let after_a_reboot = memory.history("a", &rules, None).await.unwrap();
        assert_eq!(after_a_reboot.position, Position { offset: 3, epoch: page.position.epoch });
    }

    #[tokio::test]
    async fn unused_channels_are_evicted() {
        let dir = tempfile::tempdir().unwrap();
        let rules = Rules::default();
        let memory = open(dir.path(), &rules).await;
        for n in 0..1000 {
            memory.history(&format!("asked for {n}"), &rules, None).await.unwrap();
        }
        let first = publish(&memory, "used", &rules).await;

        age(&memory, EVICT_EMPTY_AFTER).await;
        memory.tidy().await;
        assert_eq!(memory.streams.lock().len(), 1);

        age(&memory, EVICT_AFTER).await;
        memory.tidy().await;
        assert!(memory.streams.lock().is_empty());
        assert_eq!(stored(&memory).await, 0);

        // The channel begins a new epoch between its eviction and its removal from the journal.
        let second = publish(&memory, "used", &rules).await;
        assert_ne!(first.epoch, second.epoch);
        memory.remove("used".into(), first.epoch).await.unwrap();
        assert_eq!(stored(&memory).await, 1, "the publication of the new epoch stays");
    }
}
