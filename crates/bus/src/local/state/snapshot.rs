//! Snapshots of the state: written in parts while the state changes, and restored from these parts and the groups that
//! follow the snapshot.

use super::{Bucket, Entry, State, StoredAt, Stream};
use crate::local::record::{
    ConsumerRecord, EntryRecord, Group, Kind, MessageRecord, RemovedRecord, SeenRecord, StreamRecord, each,
};
use bytes::Bytes;
use journal::Place;
use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};

/// Where the next part of a snapshot begins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Cursor {
    #[default]
    Start,
    /// The messages of a stream, from this sequence on.
    Messages(String, u64),
    /// The message ids of a stream, from this position on.
    Seen(String, u64),
    /// The entries of a bucket, after this revision. An entry that is written meanwhile gets a later one.
    Entries(String, u64),
    Done,
}

impl State {
    /// Returns the next part, of about `size` bytes, and the cursor of the part after it.
    pub fn snapshot_part(&self, cursor: Cursor, size: usize) -> (Bytes, Cursor) {
        let mut part = Group::new(0);
        let mut cursor = cursor;
        while part.len() < size && cursor != Cursor::Done {
            cursor = self.snapshot_step(&mut part, cursor, size);
        }
        (part.into_bytes(), cursor)
    }

    fn snapshot_step(&self, part: &mut Group, cursor: Cursor, size: usize) -> Cursor {
        match cursor {
            Cursor::Start => {
                part.push(Kind::Revision(self.revision));
                self.begin_stream(part, None)
            }
            Cursor::Messages(name, from) => {
                let Some(stream) = self.streams.get(&name) else {
                    return self.begin_stream(part, Some(&name));
                };
                for (sequence, message) in stream.messages.range(from..) {
                    if part.len() >= size {
                        return Cursor::Messages(name, *sequence);
                    }
                    part.push(Kind::Message(message.record(&name, *sequence)));
                }
                Cursor::Seen(name, 0)
            }
            Cursor::Seen(name, from) => {
                let Some(stream) = self.streams.get(&name) else {
                    return self.begin_stream(part, Some(&name));
                };
                let mut reached = from;
                for (position, id, sequence, at_ms) in stream.seen.from(from) {
                    if part.len() >= size {
                        return Cursor::Seen(name, reached);
                    }
                    let (stream, id_hash) = (name.clone(), Bytes::copy_from_slice(&id.to_be_bytes()));
                    part.push(Kind::Seen(SeenRecord { stream, id_hash, sequence, at_ms }));
                    reached = position;
                }
                self.begin_stream(part, Some(&name))
            }
            Cursor::Entries(name, after) => {
                let Some(bucket) = self.buckets.get(&name) else {
                    return self.next_bucket(Some(&name));
                };
                let mut reached = after;
                for (revision, key) in bucket.order.range(after + 1..) {
                    if part.len() >= size {
                        return Cursor::Entries(name, reached);
                    }
                    if let Some(entry) = bucket.entries.get(key) {
                        part.push(Kind::Entry(entry.record(&name, key)));
                    }
                    reached = *revision;
                }
                self.next_bucket(Some(&name))
            }
            Cursor::Done => Cursor::Done,
        }
    }

    /// Writes the next stream and its consumers. They are few, so they are not split over parts.
    fn begin_stream(&self, part: &mut Group, after: Option<&str>) -> Cursor {
        let Some((name, stream)) = following(&self.streams, after) else {
            return self.next_bucket(None);
        };

        part.push(Kind::Stream(StreamRecord { stream: name.clone(), last: stream.last }));
        for (consumer, state) in &stream.consumers {
            let (out, delivered) = state.out().unzip();
            part.push(Kind::Consumer(ConsumerRecord {
                stream: name.clone(),
                name: consumer.clone(),
                filter: state.filter.clone(),
                next: state.next,
                out,
                delivered,
            }));
        }
        Cursor::Messages(name.clone(), 0)
    }

    fn next_bucket(&self, after: Option<&str>) -> Cursor {
        following(&self.buckets, after).map_or(Cursor::Done, |(name, _)| Cursor::Entries(name.clone(), 0))
    }

    /// Applies a part of a snapshot, or a group that was committed after the snapshot began; `row` is the group's row.
    pub fn apply(&mut self, row: u64, data: &[u8]) -> Result<(), String> {
        each(row, data, |kind, place| {
            self.apply_one(kind, place);
            Ok(())
        })
    }

    fn apply_one(&mut self, kind: Kind, place: Option<Place>) {
        match kind {
            Kind::Stream(record) => {
                let stream = self.stream(&record.stream);
                stream.last = stream.last.max(record.last);
            }
            Kind::Message(record) => {
                let place = place.or(record.place.map(Place::from));
                self.stream(&record.stream).apply_message(&record, place);
            }
            Kind::Seen(record) => {
                if let Some(id) = id_of(&record.id_hash) {
                    let stream = self.stream(&record.stream);
                    stream.seen.insert(id, record.sequence, record.at_ms);
                }
            }
            Kind::Dropped(record) => {
                let stream = self.stream(&record.stream);
                stream.messages = stream.messages.split_off(&(record.up_to + 1));
            }

            Kind::Consumer(record) => {
                let consumer = self.stream(&record.stream).consumers.entry(record.name).or_default();
                consumer.filter = record.filter;
                consumer.restore(record.next, record.out.into_iter().zip(record.delivered));
            }
            Kind::Cursor(record) => {
                let stream = self.stream(&record.stream);
                let consumer = stream.consumers.entry(record.consumer).or_default();
                consumer.replay_cursor(record.next, &stream.messages);
            }
            Kind::Retired(record) => {
                self.stream(&record.stream).consumers.remove(&record.consumer);
            }
            Kind::Delivered(record) => {
                let consumer = self
                    .stream(&record.stream)
                    .consumers
                    .entry(record.consumer)
                    .or_default();
                consumer.replay_delivered(record.sequence, record.delivered);
            }
            Kind::Settled(record) => {
                let stream = self.stream(&record.stream);
                let consumer = stream.consumers.entry(record.consumer).or_default();
                consumer.settled(record.sequence);
                if record.removes {
                    stream.messages.remove(&record.sequence);
                }
            }

            Kind::Entry(record) => {
                let place = place.or(record.place.map(Place::from));
                self.revision = self.revision.max(record.revision);
                self.bucket(&record.bucket).apply_entry(&record, place);
            }
            Kind::Removed(record) => {
                self.revision = self.revision.max(record.revision);
                self.bucket(&record.bucket).apply_removed(&record);
            }
            Kind::Revision(last) => self.revision = self.revision.max(last),
        }
    }

    fn stream(&mut self, name: &str) -> &mut Stream {
        if !self.streams.contains_key(name) {
            self.streams.insert(name.into(), Stream::default());
        }
        self.streams.get_mut(name).expect("inserted above")
    }

    fn bucket(&mut self, name: &str) -> &mut Bucket {
        if !self.buckets.contains_key(name) {
            self.buckets.insert(name.into(), Bucket::default());
        }
        self.buckets.get_mut(name).expect("inserted above")
    }

    /// Ends a replay: computes the counters. `rows` are the rows of the log with their sizes. Fails if the row of a
    /// live value is missing, because the log is then damaged.
    pub fn finish_replay(&mut self, rows: &[(u64, u64)]) -> Result<(), String> {
        rows.iter().for_each(|(row, size)| self.rows.add(*row, *size));
        let missing = |place: Place| format!("group {}, which holds a live value, is missing", place.row);

        for stream in self.streams.values_mut() {
            stream.bytes = stream
                .messages
                .values()
                .map(|message| u64::from(message.place.len))
                .sum();

            for message in stream.messages.values() {
                self.rows
                    .hold_known(message.place)
                    .ok_or_else(|| missing(message.place))?;
            }

            let Stream { consumers, messages, .. } = stream;
            consumers
                .values_mut()
                .for_each(|consumer| consumer.retain_stored(messages));
        }

        for entry in self.buckets.values().flat_map(|bucket| bucket.entries.values()) {
            self.rows.hold_known(entry.place).ok_or_else(|| missing(entry.place))?;
        }
        Ok(())
    }

    /// After the log was reopened within the process: takes over the declarations and the outstanding deliveries from
    /// the state before the outage, which lasted `outage_ms`.
    pub fn adopt(&mut self, before: &Self, outage_ms: u64) {
        for (name, old) in &before.streams {
            let stream = self.streams.entry(name.clone()).or_default();
            stream.config = old.config.clone();
            let Stream { messages, consumers, last, .. } = stream;
            for (name, consumer) in consumers {
                if let Some(old) = old.consumers.get(name) {
                    consumer.adopt(old, messages, *last, outage_ms);
                }
            }
        }

        for (name, old) in &before.buckets {
            self.buckets.entry(name.clone()).or_default().declared = old.declared;
        }
    }
}

impl StoredAt {
    fn record(&self, stream: &str, sequence: u64) -> MessageRecord {
        MessageRecord {
            stream: stream.into(),
            sequence,
            stored_ms: self.stored_ms,
            subject: self.subject.to_string(),
            id_hash: Bytes::new(),
            place: Some(self.place.into()),
        }
    }
}

impl Entry {
    fn record(&self, bucket: &str, key: &str) -> EntryRecord {
        EntryRecord {
            bucket: bucket.into(),
            key: key.into(),
            revision: self.revision,
            at_ms: self.at_ms,
            place: Some(self.place.into()),
            done: self.done,
        }
    }
}

impl Bucket {
    /// The revision of the key's entry; 0 if there is none.
    fn revision_of(&self, key: &str) -> u64 {
        self.entries.get(key).map_or(0, |entry| entry.revision)
    }
}

/// The first entry of the map after `after`.
fn following<'a, T>(map: &'a BTreeMap<String, T>, after: Option<&str>) -> Option<(&'a String, &'a T)> {
    let from = after.map_or(Unbounded, Excluded);
    map.range::<str, _>((from, Unbounded)).next()
}

impl Stream {
    /// Ignores a message without a place, because it has no value in the log.
    fn apply_message(&mut self, record: &MessageRecord, place: Option<Place>) {
        let Some(place) = place else { return };
        self.last = self.last.max(record.sequence);
        if let Some(id) = id_of(&record.id_hash) {
            self.seen.insert(id, record.sequence, record.stored_ms);
        }

        let subject = self.interned(&record.subject);
        let stored = StoredAt { place, stored_ms: record.stored_ms, subject };
        self.messages.insert(record.sequence, stored);
    }
}

impl Bucket {
    fn apply_entry(&mut self, record: &EntryRecord, place: Option<Place>) {
        let Some(place) = place else { return };
        // A snapshot may hold a newer entry than a group that is replayed after it.
        if self.revision_of(&record.key) <= record.revision {
            let (revision, at_ms, done) = (record.revision, record.at_ms, record.done);
            self.put(&record.key, Entry { place, revision, at_ms, done });
        }
    }

    fn apply_removed(&mut self, record: &RemovedRecord) {
        if self.revision_of(&record.key) <= record.revision {
            self.remove(&record.key);
        }
    }
}

fn id_of(bytes: &[u8]) -> Option<u128> {
    Some(u128::from_be_bytes(bytes.try_into().ok()?))
}
