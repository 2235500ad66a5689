//! Streams, consumers and buckets in memory. Values (messages and entries) are in the log; the state has their places.
//!
//! Sans-IO: time is an argument, and every change is recorded in a [`Group`] for the log. [`State::apply`] replays
//! these records when the log is opened.

mod bucket;
mod consumer;
mod rows;
mod seen;
mod snapshot;
#[cfg(test)]
mod tests;

pub use consumer::Claimed;
pub use seen::hash as hash_id;
pub use snapshot::Cursor;

use super::record::{
    ConsumerRecord, DroppedRecord, EntryRecord, Group, Kind, MessageRecord, RetiredRecord, SeenRecord, Stored,
    StreamRecord,
};
use crate::{
    Appended, BucketConfig, ConsumerConfig, Error, Fill, Message, Outcome, Result, Retention, StreamConfig, StreamInfo,
};
use bucket::{Bucket, Declared, Entry, removed};
use bytes::Bytes;
use consumer::Consumer;
use journal::Place;
use rows::Rows;
use seen::Seen;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Maximum messages or entries that one call of [`State::prune`] removes from each stream or bucket.
const PRUNE_MAX: usize = 1000;
/// Maximum entries that one write evicts from a bucket, which is more than it adds.
const EVICTED_MAX: usize = 8;

/// A message to store. Callers create it, so that the engine's thread does not spend time on encoding.
pub struct NewMessage {
    subject: Arc<str>,
    stored: Stored,
    /// Encoded size of `stored`, in bytes.
    size: u64,
    /// Hash of the message id.
    id: Option<u128>,
}

impl NewMessage {
    pub fn new(message: &Message, msg_id: Option<&str>) -> Self {
        let stored = Stored::of(message);
        let size = prost::Message::encoded_len(&stored) as u64;
        Self {
            subject: message.subject.clone(),
            stored,
            size,
            id: msg_id.map(seen::hash),
        }
    }
}

/// A value to store in a bucket. See [`crate::Write::Put`].
pub struct Put {
    pub bucket: String,
    pub key: String,
    pub value: Bytes,
    pub expected: Option<u64>,
    /// `None`: as the entry before, if there is one.
    pub done: Option<bool>,
}

/// One step of [`State::write`].
pub enum Step {
    Put(Put),
    Append { stream: &'static str, message: NewMessage },
    Ack { consumer: Arc<ConsumerConfig>, sequence: u64 },
}

/// The result of a step.
pub enum Taken {
    Put {
        revision: u64,
    },
    Appended(Appended),
    /// `wakes` as returned by [`State::settle`].
    Acked {
        wakes: bool,
    },
}

impl Step {
    /// Whether both steps put the same key.
    fn puts_what(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Put(put), Self::Put(other)) => (&put.bucket, &put.key) == (&other.bucket, &other.key),
            _ => false,
        }
    }
}

#[derive(Default)]
pub struct State {
    streams: BTreeMap<String, Stream>,
    buckets: BTreeMap<String, Bucket>,
    /// The newest revision of any entry.
    revision: u64,
    rows: Rows,
}

#[derive(Default)]
struct Stream {
    /// `None` until this process has declared it.
    config: Option<StreamConfig>,
    /// The newest sequence.
    last: u64,
    messages: BTreeMap<u64, StoredAt>,
    /// Size of the messages' values.
    bytes: u64,
    seen: Seen,
    consumers: BTreeMap<String, Consumer>,
}

/// A stored message; its value is in the log.
struct StoredAt {
    place: Place,
    stored_ms: u64,
    subject: Arc<str>,
}

impl State {
    pub fn declare_stream(&mut self, group: &mut Group, config: StreamConfig) {
        let name = config.name.to_string();
        let stream = self.streams.entry(name.clone()).or_insert_with(|| {
            group.push(Kind::Stream(StreamRecord { stream: name.clone(), last: 0 }));
            Stream::default()
        });
        let (consumers, retired) = (config.consumers.clone(), config.retired.clone());
        stream.config = Some(config);
        for consumer in consumers {
            if !stream.consumers.contains_key(&consumer.name) {
                stream.add_consumer(group, &consumer);
            }
        }

        // An opened consumer is read by this process. The next prune deletes what only the deleted ones needed.
        for consumer in retired {
            if stream.consumers.get(consumer).is_some_and(|known| !known.opened) {
                stream.remove_consumer(group, &name, consumer);
            }
        }
    }

    /// Deletes a consumer that this process has not opened and that has no backlog. Returns its filter; the outer `None`
    /// means that it stays.
    pub fn retire(&mut self, group: &mut Group, stream: &str, consumer: &str) -> Result<Option<Option<String>>> {
        let (known, _) = self.declared(stream)?;
        let idle = known.consumers.get(consumer);
        let idle = idle.is_some_and(|consumer| !consumer.opened && consumer.pending == 0);
        Ok(idle.then(|| known.remove_consumer(group, stream, consumer)))
    }

    /// Stores the message, unless the stream has seen its id within the dedup window. Fails if the stream is full, and
    /// not one that evicts.
    pub fn append(&mut self, group: &mut Group, name: &str, new: &NewMessage, now_ms: u64) -> Result<Appended> {
        let (stream, config) = self.declared(name)?;
        if let Some(sequence) = stream.duplicate_of(new, &config, now_ms) {
            return Ok(Appended { sequence, duplicate: true });
        }
        stream.ensure_room(&config, new.size)?;

        stream.last += 1;
        let sequence = stream.last;
        let id_hash = new.id.map(|id| Bytes::copy_from_slice(&id.to_be_bytes()));
        if let Some(id) = new.id {
            stream.seen.insert(id, sequence, now_ms);
            stream.seen.bound(config.dedup_bytes);
        }
        if config.retention == Retention::Interest && !stream.is_needed(sequence, &new.subject) {
            stream.record_unwanted(group, name, sequence, id_hash, now_ms);
            return Ok(Appended { sequence, duplicate: false });
        }

        let record = MessageRecord {
            stream: name.into(),
            sequence,
            stored_ms: now_ms,
            subject: new.subject.to_string(),
            id_hash: id_hash.unwrap_or_default(),
            place: None,
        };
        let place = group.push_with(Kind::Message(record), &new.stored);
        for consumer in stream.consumers.values_mut() {
            consumer.pending += u64::from(consumer.wants(&new.subject));
        }

        let subject = stream.interned(&new.subject);
        stream.bytes += u64::from(place.len);
        stream
            .messages
            .insert(sequence, StoredAt { place, stored_ms: now_ms, subject });
        self.rows.hold(place);
        Ok(Appended { sequence, duplicate: false })
    }

    /// Whether the stream has stored a message under the id with this hash within its dedup window.
    pub fn seen(&mut self, name: &str, id: u128, now_ms: u64) -> Result<bool> {
        let (stream, config) = self.declared(name)?;
        Ok(stream.seen.get(id, now_ms, config.dedup_window).is_some())
    }

    /// Carries out all steps in order, or none: every step is checked before the first one changes the state.
    pub fn write(&mut self, group: &mut Group, steps: &[Step], now_ms: u64, clock_ms: u64) -> Result<Vec<Taken>> {
        for (index, step) in steps.iter().enumerate() {
            let earlier = &steps[..index];
            self.check(step, earlier, now_ms)?;
            // Puts are checked against the state before the batch, so a second put of the same key would be checked
            // against an outdated revision.
            if earlier.iter().any(|earlier| earlier.puts_what(step)) {
                return Err(Error::Storage("a batch must not put one key twice".into()));
            }
        }

        let taken = steps.iter().map(|step| match step {
            Step::Put(put) => self.put(group, put, now_ms).map(|revision| Taken::Put { revision }),
            Step::Append { stream, message } => self.append(group, stream, message, now_ms).map(Taken::Appended),
            Step::Ack { consumer, sequence } => self
                .settle(group, consumer, *sequence, Outcome::Ack, clock_ms)
                .map(|wakes| Taken::Acked { wakes }),
        });
        let taken = taken.map(|taken| taken.expect("the step was checked")).collect();

        // Last, so that no step finds an entry gone that the check has seen.
        for step in steps {
            if let Step::Put(put) = step {
                self.evict(group, &put.bucket);
            }
        }
        Ok(taken)
    }

    /// Fails if the step could fail after the earlier steps of its batch.
    fn check(&mut self, step: &Step, earlier: &[Step], now_ms: u64) -> Result<()> {
        match step {
            Step::Put(put) => self.check_revision(&put.bucket, &put.key, put.expected, now_ms),
            Step::Append { stream, message } => {
                let (stream, config) = self.declared(stream)?;
                match stream.duplicate_of(message, &config, now_ms) {
                    Some(_) => Ok(()),
                    None => stream.ensure_room(&config, message.size + appended_bytes(earlier, config.name)),
                }
            }
            Step::Ack { consumer, .. } => {
                let (stream, _) = self.declared(consumer.stream)?;
                let known = stream.consumers.contains_key(&consumer.name);
                known.then_some(()).ok_or_else(|| unknown(consumer))
            }
        }
    }

    /// Creates the consumer, or changes the filter of an existing one.
    pub fn consumer(&mut self, group: &mut Group, config: &ConsumerConfig) -> Result<()> {
        let (stream, _) = self.declared(config.stream)?;
        stream.add_consumer(group, config);
        if let Some(consumer) = stream.consumers.get_mut(&config.name) {
            consumer.opened = true;
        }
        Ok(())
    }

    /// Claims up to `max` messages for `ack_wait`: first those due for redelivery, then new ones. Also returns the time
    /// at which the next redelivery is due. `clock_ms` is monotonic.
    pub fn claim(
        &mut self,
        group: &mut Group,
        config: &ConsumerConfig,
        max: usize,
        clock_ms: u64,
    ) -> Result<(Vec<Claimed>, Option<u64>)> {
        let stream = self
            .streams
            .get_mut(config.stream)
            .ok_or_else(|| Error::NoStream(config.stream.into()))?;
        let consumer = stream.consumers.get_mut(&config.name).ok_or_else(|| unknown(config))?;
        let claimed = consumer.claim(group, config, &stream.messages, stream.last, max, clock_ms);
        Ok((claimed, consumer.next_due(clock_ms)))
    }

    /// Settles a delivery. Returns whether a claim may now return more messages.
    pub fn settle(
        &mut self,
        group: &mut Group,
        config: &ConsumerConfig,
        sequence: u64,
        outcome: Outcome,
        clock_ms: u64,
    ) -> Result<bool> {
        let (stream, declared) = self.declared(config.stream)?;
        let removes = match declared.retention {
            Retention::WorkQueue => true,
            Retention::Interest => !stream.is_needed_by_others(sequence, &config.name),
            Retention::Limits => false,
        };
        let consumer = stream.consumers.get_mut(&config.name).ok_or_else(|| unknown(config))?;

        let settled = consumer.settle(group, config, sequence, outcome, removes, clock_ms);
        if settled.done
            && removes
            && let Some(message) = stream.messages.remove(&sequence)
        {
            stream.bytes -= u64::from(message.place.len);
            self.rows.release(message.place);
        }
        Ok(settled.wakes)
    }

    pub fn info(&self, name: &str) -> Result<StreamInfo> {
        let stream = self.streams.get(name).ok_or_else(|| Error::NoStream(name.into()))?;
        Ok(StreamInfo {
            messages: stream.messages.len() as u64,
            bytes: stream.bytes,
            consumers: stream
                .consumers
                .iter()
                .map(|(name, consumer)| (name.clone(), consumer.pending))
                .collect(),
        })
    }

    /// How full each declared stream and bucket is.
    pub fn fills(&self) -> Vec<Fill> {
        let streams = self.streams.values().filter_map(|stream| {
            let config = stream.config.as_ref()?;
            let oldest = stream.messages.first_key_value();
            Some(Fill {
                store: config.name,
                messages: stream.messages.len() as u64,
                bytes: stream.bytes,
                max_bytes: Some(config.max_bytes),
                oldest_ms: oldest.map(|(_, message)| message.stored_ms),
                first: oldest.map_or(stream.last + 1, |(sequence, _)| *sequence),
            })
        });
        let buckets = self.buckets.values().filter_map(|bucket| {
            let declared = bucket.declared?;
            let oldest = bucket.oldest();
            Some(Fill {
                store: declared.name,
                messages: bucket.entries.len() as u64,
                bytes: bucket.bytes,
                max_bytes: declared.max_bytes,
                oldest_ms: oldest.map(|entry| entry.at_ms),
                first: oldest.map_or(self.revision + 1, |entry| entry.revision),
            })
        });
        streams.chain(buckets).collect()
    }

    pub fn declare_bucket(&mut self, config: &BucketConfig) {
        let BucketConfig { name, max_age, max_bytes } = *config;
        self.buckets.entry(name.into()).or_default().declared = Some(Declared { name, max_age, max_bytes });
    }

    /// Returns the place and the revision of a value.
    pub fn kv_get(&self, bucket: &str, key: &str, now_ms: u64) -> Result<Option<(Place, u64)>> {
        let known = self.buckets.get(bucket).filter(|bucket| bucket.declared.is_some());
        let known = known.ok_or_else(|| Error::Storage(format!("bucket {bucket} is not declared")))?;
        Ok(known.current(key, now_ms).map(|entry| (entry.place, entry.revision)))
    }

    /// Stores a value and returns its revision.
    fn put(&mut self, group: &mut Group, put: &Put, now_ms: u64) -> Result<u64> {
        let Put { bucket, key, value, expected, done } = put;
        self.check_revision(bucket, key, *expected, now_ms)?;
        let was_done = || {
            let before = self.buckets.get(bucket).and_then(|bucket| bucket.current(key, now_ms));
            before.is_some_and(|entry| entry.done)
        };
        let done = done.unwrap_or_else(was_done);

        self.revision += 1;
        let revision = self.revision;
        let record = EntryRecord {
            bucket: bucket.clone(),
            key: key.clone(),
            revision,
            at_ms: now_ms,
            place: None,
            done,
        };
        let place = group.push_bytes(Kind::Entry(record), value);
        self.rows.hold(place);

        let entry = Entry { place, revision, at_ms: now_ms, done };
        if let Some(old) = self.buckets.entry(bucket.clone()).or_default().put(key, entry) {
            self.rows.release(old.place);
        }
        Ok(revision)
    }

    /// Makes room in a bucket that holds more than its `max_bytes`: removes entries that are done, the oldest first.
    fn evict(&mut self, group: &mut Group, name: &str) {
        let Some(bucket) = self.buckets.get_mut(name) else {
            return;
        };
        let max_bytes = bucket
            .declared
            .and_then(|declared| declared.max_bytes)
            .unwrap_or(u64::MAX);
        for _ in 0..EVICTED_MAX {
            let oldest = bucket.done.first().filter(|_| bucket.bytes > max_bytes);
            let Some(key) = oldest.and_then(|revision| bucket.order.get(revision)).cloned() else {
                return;
            };
            if let Some(entry) = bucket.remove(&key) {
                group.push(removed(name, &key, &entry));
                self.rows.release(entry.place);
            }
        }
    }

    fn check_revision(&self, bucket: &str, key: &str, expected: Option<u64>, now_ms: u64) -> Result<()> {
        let current = self.kv_get(bucket, key, now_ms)?.map_or(0, |(_, revision)| revision);
        if expected.is_some_and(|expected| expected != current) {
            return Err(Error::WrongRevision(key.into()));
        }
        Ok(())
    }

    /// Removes expired messages, ids and entries, and messages beyond `max_bytes`, up to [`PRUNE_MAX`] each. Returns
    /// whether there may be more.
    pub fn prune(&mut self, group: &mut Group, now_ms: u64) -> bool {
        let mut more = false;
        for (name, stream) in &mut self.streams {
            let Some(config) = &stream.config else { continue };
            stream.seen.forget(now_ms, config.dedup_window);

            let dropped = stream.drop_old(now_ms);
            if let Some((last, _)) = dropped.last() {
                group.push(Kind::Dropped(DroppedRecord { stream: name.clone(), up_to: *last }));
            }
            more |= dropped.len() == PRUNE_MAX;
            dropped.into_iter().for_each(|(_, place)| self.rows.release(place));
        }

        for (name, bucket) in &mut self.buckets {
            let expired = bucket.drop_old(now_ms);
            more |= expired.len() == PRUNE_MAX;
            for (key, entry) in expired {
                group.push(removed(name, &key, &entry));
                self.rows.release(entry.place);
            }
        }

        self.flush_cursors(group);
        more
    }

    /// Records the cursors that have advanced since they were last recorded.
    pub fn flush_cursors(&mut self, group: &mut Group) {
        for (name, stream) in &mut self.streams {
            stream
                .consumers
                .iter_mut()
                .for_each(|(consumer, state)| state.flush_cursor(group, name, consumer));
        }
    }

    /// Accounts for a committed row.
    pub fn row_added(&mut self, row: u64, size: u64) {
        self.rows.add(row, size);
    }

    /// Returns up to `max` rows that hold no live value, up to row `newest`, and removes them from the state.
    pub fn take_dead_rows(&mut self, newest: u64, max: usize) -> Vec<u64> {
        let rows: Vec<u64> = self.rows.dead.range(..=newest).take(max).copied().collect();
        rows.iter().for_each(|row| self.rows.remove(*row));
        rows
    }

    /// Returns the oldest row, up to row `newest`, that is more than half dead. Returns `None` while the dead bytes of
    /// the log exceed its live bytes by no more than `slack`.
    pub fn row_to_compact(&self, newest: u64, slack: u64) -> Option<u64> {
        if self.rows.total_bytes <= 2 * self.rows.live_bytes + slack {
            return None;
        }
        let half_dead = |(_, (live, size)): &(&u64, &(u64, u64))| *live > 0 && 2 * live < *size;
        self.rows.live.range(..=newest).find(half_dead).map(|(row, _)| *row)
    }

    /// Moves a value to the group if it is live at `place`.
    pub fn relocate(&mut self, group: &mut Group, kind: Kind, place: Place, value: &[u8]) {
        let moved = match kind {
            Kind::Message(record) => {
                let stream = self.streams.get_mut(&record.stream);
                let held = stream.and_then(|stream| stream.messages.get_mut(&record.sequence));
                held.filter(|held| held.place == place).map(|held| {
                    // The id was recorded with the original message.
                    let record = MessageRecord { id_hash: Bytes::new(), ..record };
                    held.place = group.push_bytes(Kind::Message(record), value);
                    held.place
                })
            }
            Kind::Entry(record) => {
                let bucket = self.buckets.get_mut(&record.bucket);
                let held = bucket.and_then(|bucket| bucket.entries.get_mut(&*record.key));
                held.filter(|held| held.place == place).map(|held| {
                    held.place = group.push_bytes(Kind::Entry(record), value);
                    held.place
                })
            }
            _ => None,
        };

        if let Some(moved) = moved {
            self.rows.hold(moved);
            self.rows.release(place);
        }
    }

    fn declared(&mut self, name: &str) -> Result<(&mut Stream, StreamConfig)> {
        let stream = self.streams.get_mut(name);
        let found = stream.and_then(|stream| stream.config.clone().map(|config| (stream, config)));
        found.ok_or_else(|| Error::NoStream(name.into()))
    }
}

impl Stream {
    /// Returns the sequence of the message that was stored under the same id within the dedup window.
    fn duplicate_of(&self, new: &NewMessage, config: &StreamConfig, now_ms: u64) -> Option<u64> {
        self.seen.get(new.id?, now_ms, config.dedup_window)
    }

    /// Fails if the message would take the stream over its `max_bytes`. A stream that evicts is pruned instead.
    fn ensure_room(&self, config: &StreamConfig, size: u64) -> Result<()> {
        let (name, max) = (config.name, config.max_bytes);
        if config.retention != Retention::Limits && self.bytes + size > max {
            let text = format!(
                "stream {name} has reached its limit of {max} bytes; its consumers are behind, try again later"
            );
            return Err(Error::Full(text));
        }
        Ok(())
    }

    /// Creates the consumer, or changes the filter of an existing one.
    fn add_consumer(&mut self, group: &mut Group, config: &ConsumerConfig) {
        // A work queue has only messages that are not settled, so its consumers start with the stored ones.
        let work_queue = self
            .config
            .as_ref()
            .is_some_and(|stream| stream.retention == Retention::WorkQueue);
        let next = if config.from_start || work_queue {
            0
        } else {
            self.last + 1
        };

        let known = self.consumers.get(&config.name);
        if known.is_none_or(|known| known.filter != config.filter) {
            group.push(Kind::Consumer(ConsumerRecord {
                stream: config.stream.into(),
                name: config.name.clone(),
                filter: config.filter.clone(),
                next: if known.is_none() { next } else { 0 },
                out: Vec::new(),
                delivered: Vec::new(),
            }));
        }

        let consumer = self
            .consumers
            .entry(config.name.clone())
            .or_insert_with(|| Consumer::new(next));
        consumer.filter = config.filter.clone();
        consumer.count_pending(&self.messages);
    }

    /// Deletes a consumer; returns its filter.
    fn remove_consumer(&mut self, group: &mut Group, stream: &str, consumer: &str) -> Option<String> {
        let removed = self.consumers.remove(consumer)?;
        let (stream, consumer) = (stream.to_string(), consumer.to_string());
        group.push(Kind::Retired(RetiredRecord { stream, consumer }));
        removed.filter
    }

    /// Whether a consumer has yet to receive or to settle the message.
    fn is_needed(&self, sequence: u64, subject: &str) -> bool {
        self.consumers
            .values()
            .any(|consumer| consumer.needs(sequence, subject))
    }

    /// As [`Stream::is_needed`], for all consumers but one.
    fn is_needed_by_others(&self, sequence: u64, name: &str) -> bool {
        let Some(message) = self.messages.get(&sequence) else {
            return false;
        };
        let mut others = self.consumers.iter().filter(|(other, _)| *other != name);
        others.any(|(_, consumer)| consumer.needs(sequence, &message.subject))
    }

    /// Records that a message was taken and not stored, because no consumer needs it.
    fn record_unwanted(&self, group: &mut Group, name: &str, sequence: u64, id_hash: Option<Bytes>, at_ms: u64) {
        group.push(Kind::Stream(StreamRecord { stream: name.into(), last: sequence }));
        if let Some(id_hash) = id_hash {
            group.push(Kind::Seen(SeenRecord { stream: name.into(), id_hash, sequence, at_ms }));
        }
    }

    /// Returns the newest message's subject if it is equal, to share memory: streams have few subjects.
    fn interned(&self, subject: &str) -> Arc<str> {
        let newest = self.messages.last_key_value().map(|(_, message)| &message.subject);
        newest
            .filter(|newest| ***newest == *subject)
            .map_or_else(|| subject.into(), Arc::clone)
    }

    /// Removes the oldest messages that have expired, that exceed the `max_bytes` of a stream that evicts, or that no
    /// consumer of an interest stream needs any more, because a consumer was deleted or the stream has changed.
    fn drop_old(&mut self, now_ms: u64) -> Vec<(u64, Place)> {
        let Some(config) = &self.config else { return Vec::new() };
        let oldest_ms = config
            .max_age
            .map_or(0, |max_age| now_ms.saturating_sub(millis(max_age)));
        let (retention, max_bytes) = (config.retention, config.max_bytes);

        let mut dropped = Vec::new();
        while let Some((sequence, message)) = self.messages.first_key_value()
            && (message.stored_ms < oldest_ms
                || (retention == Retention::Limits && self.bytes > max_bytes)
                || (retention == Retention::Interest && !self.is_needed(*sequence, &message.subject)))
            && dropped.len() < PRUNE_MAX
        {
            let (sequence, place) = (*sequence, message.place);
            for consumer in self.consumers.values_mut() {
                consumer.dropped(sequence, &message.subject);
            }
            self.messages.remove(&sequence);
            self.bytes -= u64::from(place.len);
            dropped.push((sequence, place));
        }
        dropped
    }
}

/// Bytes that these steps append to the stream, if no message is a duplicate.
fn appended_bytes(steps: &[Step], name: &str) -> u64 {
    let bytes = steps.iter().map(|step| match step {
        Step::Append { stream, message } if *stream == name => message.size,
        Step::Append { .. } | Step::Put(_) | Step::Ack { .. } => 0,
    });
    bytes.sum()
}

fn unknown(config: &ConsumerConfig) -> Error {
    Error::Storage(format!("stream {} has no consumer {}", config.stream, config.name))
}

pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX / 4)
}
