//! The records that the memory engine writes to its log. A record states a result, not a change, so replay is
//! idempotent. Groups and parts of snapshots are length-delimited records.

use prost::Message;

#[derive(Clone, PartialEq, Message)]
pub struct Record {
    #[prost(oneof = "Kind", tags = "1, 2, 3")]
    pub kind: Option<Kind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Kind {
    #[prost(message, tag = "1")]
    Publication(Publication),
    /// A channel with its newest position: at the beginning of its part of a snapshot, or because it begins a new epoch.
    #[prost(message, tag = "2")]
    Channel(Channel),
    /// The channel was evicted in this epoch.
    #[prost(message, tag = "3")]
    Removed(Removed),
}

#[derive(Clone, PartialEq, Message)]
pub struct Publication {
    #[prost(string, tag = "1")]
    pub channel: String,
    #[prost(string, tag = "2")]
    pub epoch: String,
    #[prost(uint64, tag = "3")]
    pub offset: u64,
    #[prost(uint64, tag = "4")]
    pub at_ms: u64,
    /// The idempotency key.
    #[prost(string, optional, tag = "5")]
    pub key: Option<String>,
    /// An encoded [`wire::realtime::Publication`]; its offset is not set.
    #[prost(bytes = "bytes", tag = "6")]
    pub publication: bytes::Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub struct Channel {
    #[prost(string, tag = "1")]
    pub channel: String,
    #[prost(string, tag = "2")]
    pub epoch: String,
    #[prost(uint64, tag = "3")]
    pub offset: u64,
    #[prost(uint64, tag = "4")]
    pub touched_ms: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Removed {
    #[prost(string, tag = "1")]
    pub channel: String,
    #[prost(string, tag = "2")]
    pub epoch: String,
}

/// Appends a record to a group.
pub fn push(group: &mut Vec<u8>, kind: Kind) {
    Record { kind: Some(kind) }
        .encode_length_delimited(group)
        .expect("a vector has room");
}

/// Visits each record of a group or of a part of a snapshot.
pub fn each(mut data: &[u8], mut visit: impl FnMut(Kind)) -> Result<(), String> {
    while !data.is_empty() {
        let record = Record::decode_length_delimited(&mut data).map_err(|error| error.to_string())?;
        let unknown = "unknown kind of record; a newer version wrote this file, use that version";
        visit(record.kind.ok_or(unknown)?);
    }
    Ok(())
}
