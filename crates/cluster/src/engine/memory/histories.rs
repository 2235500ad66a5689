//! The channels of the memory engine, and how they are stored: publications are appended to a log, and a snapshot of all
//! histories replaces what came before it. Publications that a history's size or time to live has dropped need no
//! record, because a replay drops them too.

use super::migrate;
use super::record::{self, Kind};
use super::stream::{History, Kept, Stream};
use crate::Rules;
use crate::engine::fresh_epoch;
use bus::clock::unix_ms;
use bytes::Bytes;
use journal::{Commit, Continuity, Log};
use parking_lot::Mutex;
use prost::Message;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use wire::channels::Position;
use wire::realtime::Publication;

/// Maximum dead rows that one commit deletes.
const DROPPED_ROWS_MAX: u64 = 256;
/// Size of the groups that a start writes, in bytes.
const GROUP_BYTES: usize = 1024 * 1024;

/// The channels in memory.
#[derive(Default)]
pub struct Streams(Mutex<HashMap<String, Arc<Stream>>>);

impl Streams {
    pub fn get(&self, channel: &str) -> Arc<Stream> {
        let mut streams = self.0.lock();
        if let Some(found) = streams.get(channel) {
            return found.clone();
        }
        let stream = Arc::new(Stream::new(channel));
        streams.insert(channel.into(), stream.clone());
        stream
    }

    pub fn all(&self) -> Vec<Arc<Stream>> {
        self.0.lock().values().cloned().collect()
    }

    /// Removes a stream from memory unless another task uses it. Returns whether it was removed.
    pub fn evict(&self, stream: &Arc<Stream>) -> bool {
        let mut streams = self.0.lock();
        // The map has one handle and the caller another.
        let idle =
            Arc::strong_count(stream) <= 2 && streams.get(&stream.channel).is_some_and(|s| Arc::ptr_eq(s, stream));
        if idle {
            streams.remove(&stream.channel);
        }
        idle
    }
}

/// A publication to store. The publisher's task encodes it, not the journal's thread.
pub struct Incoming {
    publication: Publication,
    encoded: Bytes,
    key: Option<String>,
    rules: Rules,
}

impl Incoming {
    pub fn new(publication: Publication, key: Option<String>, rules: Rules) -> Self {
        let encoded = publication.encode_to_vec().into();
        Self { publication, encoded, key, rules }
    }
}

/// The state that the journal's thread owns.
pub struct Histories {
    streams: Arc<Streams>,
    /// The channels with publications in the group that is being committed.
    writing: Vec<Arc<Stream>>,
    /// The oldest row of the log; `None` if it has none.
    oldest_row: Option<u64>,
    /// A snapshot is due or in progress, to drop expired publications from the file.
    rewriting: bool,
    closed: bool,
}

impl Histories {
    /// Restores the histories from the log. `rules` has the rules of a channel. If acknowledged publications may be
    /// missing, every channel begins a new epoch, because the offsets of lost publications are assigned again, which
    /// must not happen within one epoch. The histories stay readable and their offsets continue.
    pub fn load(log: &mut Log, boot_id: &str, rules: impl Fn(&str) -> Option<Rules>) -> journal::Result<Self> {
        migrate::older_format(log)?;
        let histories = std::cell::RefCell::new(Replay { histories: HashMap::new(), rules });
        let apply = |data: &[u8]| record::each(data, |kind| histories.borrow_mut().apply(kind));
        log.replay(apply, |_, group| apply(group))?;

        let mut histories = histories.into_inner().histories;
        let now = unix_ms();
        histories.values_mut().for_each(|history| history.restored(now));
        if log.continuity(boot_id)? == Continuity::Doubtful && !histories.is_empty() {
            renew_epochs(log, &mut histories)?;
            tracing::warn!(
                channels = histories.len(),
                "the newest publications may be missing from the channel histories (after a power cut, or because an \
                 older channels.db was restored): the channels begin a new epoch"
            );
        }
        // After the new epochs, so that a crash in between leads to new ones again.
        log.begin_use(boot_id)?;

        let shared = |(channel, history): (String, _)| {
            (channel.clone(), Arc::new(Stream { channel, history: Mutex::new(history) }))
        };
        let streams = Streams(Mutex::new(histories.into_iter().map(shared).collect()));
        Ok(Self {
            streams: Arc::new(streams),
            writing: Vec::new(),
            oldest_row: log.oldest()?,
            rewriting: false,
            closed: false,
        })
    }

    pub fn streams(&self) -> Arc<Streams> {
        self.streams.clone()
    }

    /// Assigns an offset and records the publication. Returns its position, or that of the publication with its key.
    pub fn publish(
        &mut self,
        group: &mut Vec<u8>,
        stream: &Arc<Stream>,
        incoming: Incoming,
    ) -> journal::Result<Position> {
        if self.closed {
            return Err(journal::Error::Refused("the channel histories are closed".into()));
        }

        let at_ms = unix_ms();
        let mut history = stream.history.lock();
        history.expire(incoming.rules.history_ttl, at_ms);
        if let Some(known) = history.known(incoming.key.as_ref()) {
            return Ok(known);
        }
        let position = history.assign(incoming.publication, incoming.key.clone(), &incoming.rules, at_ms);
        drop(history);

        let record = record::Publication {
            channel: stream.channel.clone(),
            epoch: position.epoch.clone(),
            offset: position.offset,
            at_ms,
            key: incoming.key,
            publication: incoming.encoded,
        };
        record::push(group, Kind::Publication(record));
        self.writing.push(stream.clone());
        Ok(position)
    }

    /// Records that a channel was evicted.
    pub fn remove(&mut self, group: &mut Vec<u8>, channel: String, epoch: String) {
        record::push(group, Kind::Removed(record::Removed { channel, epoch }));
    }

    /// Makes this and the next operations write a snapshot, which drops expired publications from the file.
    pub fn rewrite(&mut self) {
        self.rewriting = true;
    }

    pub fn is_rewriting(&self) -> bool {
        self.rewriting
    }

    /// No publication is accepted after this.
    pub fn close(&mut self) {
        self.closed = true;
    }
}

impl journal::State for Histories {
    type Group = Vec<u8>;
    type Cursor = Cursor;

    fn group(&mut self, _row: u64) -> Vec<u8> {
        Vec::new()
    }

    fn size(group: &Vec<u8>) -> usize {
        group.len()
    }

    fn complete(&mut self, group: Vec<u8>, _log: &Log) -> journal::Result<Bytes> {
        Ok(group.into())
    }

    /// A snapshot has everything that is live, so no older row is needed.
    fn dead_rows(&mut self, newest: u64) -> Vec<u64> {
        let Some(oldest) = self.oldest_row else {
            return Vec::new();
        };
        let end = (newest + 1).min(oldest + DROPPED_ROWS_MAX).max(oldest);
        self.oldest_row = Some(end);
        (oldest..end).collect()
    }

    fn committed(&mut self, row: u64, _group: Bytes) {
        self.oldest_row.get_or_insert(row);
        for stream in self.writing.drain(..) {
            stream.history.lock().all_stored();
        }
    }

    fn refused(&mut self) {
        for stream in self.writing.drain(..) {
            stream.history.lock().forget_unstored();
        }
        self.rewriting = false;
    }

    /// The state has exactly the acknowledged publications. The log may also have refused ones: a later record with the
    /// same offset replaces such a publication.
    fn reopened(&mut self, log: &mut Log, _outage: Duration) -> journal::Result<()> {
        self.oldest_row = log.oldest()?;
        Ok(())
    }

    fn wants_snapshot(&self) -> bool {
        self.rewriting
    }

    /// A channel that is created later is in the groups that are replayed after the snapshot.
    fn snapshot(&mut self) -> Cursor {
        Cursor { streams: self.streams.all(), from: 0 }
    }

    fn snapshot_part(&mut self, mut cursor: Cursor, size: usize) -> (Bytes, Option<Cursor>) {
        let mut part = Vec::new();
        while let Some(stream) = cursor.streams.last() {
            match add_to_snapshot(&mut part, stream, cursor.from, size) {
                Some(next) => {
                    cursor.from = next;
                    return (part.into(), Some(cursor));
                }
                None => {
                    cursor.from = 0;
                    cursor.streams.pop();
                }
            }
        }
        self.rewriting = false;
        (part.into(), None)
    }
}

/// The channels that a snapshot does not have yet. The last one continues at the offset `from`.
pub struct Cursor {
    streams: Vec<Arc<Stream>>,
    from: u64,
}

/// Adds a channel's history from an offset on. Returns where to continue if the part reaches `size` bytes before.
fn add_to_snapshot(part: &mut Vec<u8>, stream: &Stream, from: u64, size: usize) -> Option<u64> {
    let history = stream.history.lock();
    if !history.durable {
        return None;
    }
    if part.len() >= size {
        return Some(from);
    }
    if from == 0 {
        record::push(part, head(&stream.channel, &history));
    }

    for kept in history.kept.iter().filter(|kept| kept.publication.offset >= from) {
        if part.len() >= size {
            return Some(kept.publication.offset);
        }
        let record = record::Publication {
            channel: stream.channel.clone(),
            epoch: history.epoch.clone(),
            offset: kept.publication.offset,
            at_ms: kept.at_ms,
            key: kept.key.clone(),
            publication: kept.publication.encode_to_vec().into(),
        };
        record::push(part, Kind::Publication(record));
    }
    None
}

fn head(channel: &str, history: &History) -> Kind {
    Kind::Channel(record::Channel {
        channel: channel.into(),
        epoch: history.epoch.clone(),
        offset: history.assigned,
        touched_ms: history.touched_ms,
    })
}

fn renew_epochs(log: &mut Log, histories: &mut HashMap<String, History>) -> journal::Result<()> {
    let mut group = Vec::new();
    for (channel, history) in histories {
        history.epoch = fresh_epoch();
        record::push(&mut group, head(channel, history));
        if group.len() > GROUP_BYTES {
            log.commit(&Commit { group: &group, ..Commit::default() })?;
            group.clear();
        }
    }
    log.commit(&Commit { group: &group, ..Commit::default() })
}

/// The histories while the log is replayed.
struct Replay<R> {
    histories: HashMap<String, History>,
    rules: R,
}

impl<R: Fn(&str) -> Option<Rules>> Replay<R> {
    fn apply(&mut self, kind: Kind) {
        match kind {
            Kind::Publication(record) => {
                let history = self.history(record.channel);
                let kept = Publication::decode(record.publication).ok().map(|mut publication| {
                    publication.offset = record.offset;
                    Kept { publication: Arc::new(publication), at_ms: record.at_ms, key: record.key }
                });
                history.restore(record.epoch, record.offset, kept);
            }
            Kind::Channel(record) => {
                let history = self.history(record.channel);
                (history.epoch, history.assigned) = (record.epoch, record.offset);
                history.touched_ms = record.touched_ms;
            }
            Kind::Removed(record) => {
                let evicted = |history: &History| history.epoch == record.epoch;
                if self.histories.get(&record.channel).is_some_and(evicted) {
                    self.histories.remove(&record.channel);
                }
            }
        }
    }

    fn history(&mut self, channel: String) -> &mut History {
        let rules = &self.rules;
        self.histories.entry(channel).or_insert_with_key(|channel| {
            let mut history = History::new();
            let rules = rules(channel);
            history.size = rules.as_ref().map_or(0, |rules| rules.history_size);
            history.ttl = rules.map_or(Duration::ZERO, |rules| rules.history_ttl);
            history
        })
    }
}
