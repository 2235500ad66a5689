//! Key-value buckets over the connection's own inbox: a call that times out leaves nothing behind, and a lost
//! connection fails the calls in flight at once.
//!
//! A bucket is the stream `KV_<bucket>` with one subject for each key; an entry's revision is its sequence.

use super::inbox::Awaited;
use super::link::Link;
use super::streams;
use crate::{Error, Result};
use async_nats::header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE;
use async_nats::jetstream::ErrorCode;
use async_nats::{HeaderMap, StatusCode};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(5);
/// Bytes on the wire of the headers of a put, and more.
const HEADERS_MAX: usize = 128;
/// How servers refuse a put with another expected revision.
const WRONG_REVISION: [ErrorCode; 2] =
    [ErrorCode::STREAM_WRONG_LAST_SEQUENCE, ErrorCode::STREAM_WRONG_LAST_SEQUENCE_CONSTANT];

/// Stores a value and returns its revision. With `expected`, only if the entry is at that revision (0: does not exist).
pub async fn put(link: &Link, bucket: &str, key: &str, value: Bytes, expected: Option<u64>) -> Result<u64> {
    link.check_size(value.len() + HEADERS_MAX)?;
    let mut headers = HeaderMap::new();
    if let Some(expected) = expected {
        headers.insert(NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, expected.to_string());
    }

    let subject = format!("$KV.{bucket}.{}", encode(key));
    let ack = link
        .ask(&subject, headers, value, Awaited::PubAck, DEADLINE)
        .await
        .map_err(|error| unavailable(bucket, error))?;
    match streams::stored(&ack.payload) {
        Ok(appended) => Ok(appended.sequence),
        Err(refused) if refused.code.is_some_and(|code| WRONG_REVISION.contains(&code)) => {
            Err(Error::WrongRevision(key.into()))
        }
        Err(refused) => Err(Error::Storage(format!("cannot write to bucket {bucket}: {}", refused.why))),
    }
}

/// The value and its revision; `None` if there is no such entry.
pub async fn get(link: &Link, bucket: &str, key: &str) -> Result<Option<(Bytes, u64)>> {
    let subject = format!("$JS.API.DIRECT.GET.KV_{bucket}.$KV.{bucket}.{}", encode(key));
    let entry = link
        .ask(&subject, HeaderMap::new(), Bytes::new(), Awaited::Reply, DEADLINE)
        .await
        .map_err(|error| unavailable(bucket, error))?;

    let failed = |why: &str| Error::Storage(format!("cannot read from bucket {bucket}: {why}"));
    match entry.status {
        None | Some(StatusCode::OK) => {}
        Some(StatusCode::NOT_FOUND) => return Ok(None),
        Some(status) => return Err(failed(&format!("{status} {}", entry.description.unwrap_or_default()))),
    }
    let headers = entry.headers.unwrap_or_default();
    // Other clients mark a deleted key with a message that has this header.
    if headers.get("KV-Operation").is_some() {
        return Ok(None);
    }
    let revision = headers
        .get("Nats-Sequence")
        .and_then(|sequence| sequence.as_str().parse().ok());
    let revision = revision.ok_or_else(|| failed("the reply has no sequence"))?;
    Ok(Some((entry.payload, revision)))
}

/// The server answers for a bucket only while its stream is there.
fn unavailable(bucket: &str, error: Error) -> Error {
    match error {
        Error::NoResponders(_) => {
            Error::Storage(format!("bucket {bucket} is not there; was JetStream's data removed?"))
        }
        other => other,
    }
}

/// Encodes a key. Keys of the bus are arbitrary strings; NATS allows few characters and no empty key.
fn encode(key: &str) -> String {
    format!("k{}", URL_SAFE_NO_PAD.encode(key))
}
