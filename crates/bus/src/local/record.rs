//! The records that the embedded bus writes to its log. A record states a result, not a change, so replay is
//! idempotent.
//!
//! Each record of a group is encoded as `u32 length · record · u32 length · value`, with little-endian lengths. The
//! second length is that of the value plus 1; 0 means that the record has no value.

use crate::{Headers, Message};
use bytes::{Buf, BufMut, Bytes};
use journal::Place;
use prost::Message as _;

/// One record of a group or of a snapshot part.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Record {
    #[prost(oneof = "Kind", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12")]
    pub kind: Option<Kind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Kind {
    #[prost(message, tag = "1")]
    Stream(StreamRecord),
    /// A stored message. Its value is a [`Stored`].
    #[prost(message, tag = "2")]
    Message(MessageRecord),
    /// A consumer, with its cursor and its outstanding deliveries.
    #[prost(message, tag = "3")]
    Consumer(ConsumerRecord),
    /// All messages before `next` were delivered at least once, or did not match the filter.
    #[prost(message, tag = "4")]
    Cursor(CursorRecord),
    /// A message was redelivered.
    #[prost(message, tag = "5")]
    Delivered(DeliveredRecord),
    /// A consumer acknowledged or terminated a message.
    #[prost(message, tag = "6")]
    Settled(SettledRecord),
    /// A stream's messages up to this sequence were deleted.
    #[prost(message, tag = "7")]
    Dropped(DroppedRecord),
    /// The value of a key.
    #[prost(message, tag = "8")]
    Entry(EntryRecord),
    /// A key was removed.
    #[prost(message, tag = "9")]
    Removed(RemovedRecord),
    /// A message id, kept for deduplication.
    #[prost(message, tag = "10")]
    Seen(SeenRecord),
    /// The newest revision that any entry has had, removed entries included.
    #[prost(uint64, tag = "11")]
    Revision(u64),
    /// A consumer was deleted.
    #[prost(message, tag = "12")]
    Retired(RetiredRecord),
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct StreamRecord {
    #[prost(string, tag = "1")]
    pub stream: String,
    #[prost(uint64, tag = "2")]
    pub last: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct MessageRecord {
    #[prost(string, tag = "1")]
    pub stream: String,
    #[prost(uint64, tag = "2")]
    pub sequence: u64,
    #[prost(uint64, tag = "3")]
    pub stored_ms: u64,
    #[prost(string, tag = "4")]
    pub subject: String,
    /// Hash of the message id; empty without one.
    #[prost(bytes = "bytes", tag = "5")]
    pub id_hash: Bytes,
    /// In a snapshot: where the value lies.
    #[prost(message, tag = "6")]
    pub place: Option<PlaceRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ConsumerRecord {
    #[prost(string, tag = "1")]
    pub stream: String,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, optional, tag = "3")]
    pub filter: Option<String>,
    #[prost(uint64, tag = "4")]
    pub next: u64,
    /// Sequences of the outstanding deliveries.
    #[prost(uint64, repeated, tag = "5")]
    pub out: Vec<u64>,
    /// Delivery counts, in the order of `out`.
    #[prost(uint32, repeated, tag = "6")]
    pub delivered: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CursorRecord {
    #[prost(string, tag = "1")]
    pub stream: String,
    #[prost(string, tag = "2")]
    pub consumer: String,
    #[prost(uint64, tag = "3")]
    pub next: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct RetiredRecord {
    #[prost(string, tag = "1")]
    pub stream: String,
    #[prost(string, tag = "2")]
    pub consumer: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct DeliveredRecord {
    #[prost(string, tag = "1")]
    pub stream: String,
    #[prost(string, tag = "2")]
    pub consumer: String,
    #[prost(uint64, tag = "3")]
    pub sequence: u64,
    #[prost(uint32, tag = "4")]
    pub delivered: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct SettledRecord {
    #[prost(string, tag = "1")]
    pub stream: String,
    #[prost(string, tag = "2")]
    pub consumer: String,
    #[prost(uint64, tag = "3")]
    pub sequence: u64,
    /// Whether the message was deleted, because no other consumer needs it.
    #[prost(bool, tag = "4")]
    pub removes: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct DroppedRecord {
    #[prost(string, tag = "1")]
    pub stream: String,
    #[prost(uint64, tag = "2")]
    pub up_to: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct EntryRecord {
    #[prost(string, tag = "1")]
    pub bucket: String,
    #[prost(string, tag = "2")]
    pub key: String,
    #[prost(uint64, tag = "3")]
    pub revision: u64,
    #[prost(uint64, tag = "4")]
    pub at_ms: u64,
    /// In a snapshot: where the value lies.
    #[prost(message, tag = "5")]
    pub place: Option<PlaceRecord>,
    /// Whether a full bucket may evict the entry.
    #[prost(bool, tag = "6")]
    pub done: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct RemovedRecord {
    #[prost(string, tag = "1")]
    pub bucket: String,
    #[prost(string, tag = "2")]
    pub key: String,
    /// The revision of the removed entry.
    #[prost(uint64, tag = "3")]
    pub revision: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct SeenRecord {
    #[prost(string, tag = "1")]
    pub stream: String,
    #[prost(bytes = "bytes", tag = "2")]
    pub id_hash: Bytes,
    #[prost(uint64, tag = "3")]
    pub sequence: u64,
    #[prost(uint64, tag = "4")]
    pub at_ms: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct PlaceRecord {
    #[prost(uint64, tag = "1")]
    pub row: u64,
    #[prost(uint32, tag = "2")]
    pub offset: u32,
    #[prost(uint32, tag = "3")]
    pub len: u32,
}

/// The value of a message record.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Stored {
    #[prost(string, tag = "1")]
    pub subject: String,
    /// Header names and values, alternating.
    #[prost(string, repeated, tag = "2")]
    pub headers: Vec<String>,
    #[prost(bytes = "bytes", tag = "3")]
    pub payload: Bytes,
}

impl From<Place> for PlaceRecord {
    fn from(Place { row, offset, len }: Place) -> Self {
        Self { row, offset, len }
    }
}

impl From<PlaceRecord> for Place {
    fn from(PlaceRecord { row, offset, len }: PlaceRecord) -> Self {
        Self { row, offset, len }
    }
}

impl Stored {
    pub fn of(message: &Message) -> Self {
        let headers = message
            .headers
            .iter()
            .flat_map(|(name, value)| [name.to_string(), value.to_string()]);
        Self {
            subject: message.subject.to_string(),
            headers: headers.collect(),
            payload: message.payload.clone(),
        }
    }

    pub fn into_message(self) -> Message {
        let mut headers = Headers::new();
        let mut texts = self.headers.into_iter();
        while let (Some(name), Some(value)) = (texts.next(), texts.next()) {
            headers.insert(name, value);
        }
        Message {
            subject: self.subject.into(),
            reply: None,
            headers,
            payload: self.payload,
        }
    }
}

/// The records of one commit, and the number of its row in the log.
pub struct Group {
    row: u64,
    data: Vec<u8>,
}

impl Group {
    pub fn new(row: u64) -> Self {
        Self { row, data: Vec::new() }
    }

    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    pub fn len(&self) -> usize {
        self.data.len()
    }

    pub fn into_bytes(self) -> Bytes {
        self.data.into()
    }

    pub fn push(&mut self, kind: Kind) {
        self.header(kind);
        self.data.put_u32_le(0);
    }

    /// Appends a record with a value; returns the place of the value in the log.
    pub fn push_with(&mut self, kind: Kind, value: &impl prost::Message) -> Place {
        let len = value.encoded_len();
        self.begin_value(kind, len);
        value.encode_raw(&mut self.data);
        self.end_value(len)
    }

    /// As [`Group::push_with`], for a value that is already encoded.
    pub fn push_bytes(&mut self, kind: Kind, value: &[u8]) -> Place {
        self.begin_value(kind, value.len());
        self.data.put_slice(value);
        self.end_value(value.len())
    }

    fn begin_value(&mut self, kind: Kind, len: usize) {
        self.header(kind);
        // Plus 1, to distinguish an empty value from no value.
        self.data.put_u32_le(small(len) + 1);
    }

    fn end_value(&self, len: usize) -> Place {
        Place { row: self.row, offset: small(self.data.len() - len), len: small(len) }
    }

    fn header(&mut self, kind: Kind) {
        let record = Record { kind: Some(kind) };
        self.data.put_u32_le(small(record.encoded_len()));
        record.encode_raw(&mut self.data);
    }
}

/// Cannot overflow: a group is bounded far below 4 GiB.
fn small(len: usize) -> u32 {
    u32::try_from(len).expect("a group is smaller than 4 GiB")
}

/// Visits each record of a group or a snapshot part, with the place of its value in row `row`.
pub fn each(
    row: u64,
    data: &[u8],
    mut visit: impl FnMut(Kind, Option<Place>) -> Result<(), String>,
) -> Result<(), String> {
    let mut rest = data;
    let short = || "a record is truncated".to_string();

    while !rest.is_empty() {
        let len = rest.try_get_u32_le().map_err(|_| short())? as usize;
        let header = rest.get(..len).ok_or_else(short)?;
        let record = Record::decode(header).map_err(|error| error.to_string())?;
        rest.advance(len);

        let place = match rest.try_get_u32_le().map_err(|_| short())? {
            0 => None,
            len => {
                let offset = small(data.len() - rest.len());
                let len = len - 1;
                if rest.len() < len as usize {
                    return Err(short());
                }
                rest.advance(len as usize);
                Some(Place { row, offset, len })
            }
        };

        let unknown = "unknown kind of record; a newer version wrote this file, use that version";
        visit(record.kind.ok_or(unknown)?, place)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_visits_records_with_the_places_of_their_values() {
        let mut group = Group::new(7);
        let entry = |key: &str| {
            Kind::Entry(EntryRecord {
                bucket: "B".into(),
                key: key.into(),
                revision: 1,
                at_ms: 2,
                place: None,
                done: false,
            })
        };
        let first = group.push_bytes(entry("a"), b"value");
        group.push(Kind::Dropped(DroppedRecord { stream: "S".into(), up_to: 9 }));
        let empty = group.push_bytes(entry("b"), b"");
        let data = group.into_bytes();
        assert_eq!(&data[first.offset as usize..][..first.len as usize], b"value");

        let mut seen = Vec::new();
        each(7, &data, |kind, place| {
            seen.push((kind, place));
            Ok(())
        })
        .unwrap();
        assert_eq!(seen.len(), 3);
        assert_eq!(seen[0], (entry("a"), Some(first)));
        assert_eq!(seen[1].1, None);
        assert_eq!(seen[2], (entry("b"), Some(empty)));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = each(1, &data, |_, _| Ok(()));
        }
    }
}
