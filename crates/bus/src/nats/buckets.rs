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
use async_nats::jetstream::response::Response;
use async_nats::{HeaderMap, StatusCode};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(5);
/// Upper bound of a put's headers, in bytes on the wire.
const HEADERS_MAX: usize = 128;
/// Other clients mark a deleted key with a message that has this header.
const DELETED_HEADER: &str = "KV-Operation";
/// Error codes of a put whose expected revision does not match.
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
        Err(refused) => Err(refused.error(&format!("cannot write to bucket {bucket}"))),
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
        // Any replica may answer, even one that lacks the newest entries.
        Some(StatusCode::NOT_FOUND) => return get_from_leader(link, bucket, key).await,
        Some(status) => return Err(failed(&format!("{status} {}", entry.description.unwrap_or_default()))),
    }

    let headers = entry.headers.unwrap_or_default();
    if headers.get(DELETED_HEADER).is_some() {
        return Ok(None);
    }
    let revision = headers
        .get("Nats-Sequence")
        .and_then(|sequence| sequence.as_str().parse().ok());
    let revision = revision.ok_or_else(|| failed("the reply has no sequence"))?;
    Ok(Some((entry.payload, revision)))
}

/// As [`get`], but from the leader of the stream, which has every acknowledged write.
async fn get_from_leader(link: &Link, bucket: &str, key: &str) -> Result<Option<(Bytes, u64)>> {
    let failed = |why: &str| Error::Storage(format!("cannot read from bucket {bucket}: {why}"));
    let subject = format!("$JS.API.STREAM.MSG.GET.KV_{bucket}");
    let query = BTreeMap::from([("last_by_subj", format!("$KV.{bucket}.{}", encode(key)))]);
    let query = serde_json::to_vec(&query).expect("a map of texts is JSON");
    let reply = link
        .ask(&subject, HeaderMap::new(), query.into(), Awaited::Reply, DEADLINE)
        .await
        .map_err(|error| unavailable(bucket, error))?;

    let stored = match serde_json::from_slice::<Response<Value>>(&reply.payload) {
        Ok(Response::Ok(found)) => found["message"].clone(),
        Ok(Response::Err { error }) if error.error_code() == ErrorCode::NO_MESSAGE_FOUND => return Ok(None),
        Ok(Response::Err { error }) => return Err(failed(&error.to_string())),
        Err(error) => return Err(failed(&error.to_string())),
    };

    // Headers and data are in base64, and left out if they are empty.
    let decoded = |field: &str| {
        let text = stored[field].as_str().unwrap_or_default();
        STANDARD.decode(text).map_err(|error| failed(&error.to_string()))
    };
    if String::from_utf8_lossy(&decoded("hdrs")?).contains(DELETED_HEADER) {
        return Ok(None);
    }

    let revision = stored["seq"].as_u64();
    let revision = revision.ok_or_else(|| failed("the reply has no sequence"))?;
    Ok(Some((decoded("data")?.into(), revision)))
}

/// No responders means that nobody serves the bucket's stream now.
fn unavailable(bucket: &str, error: Error) -> Error {
    match error {
        Error::NoResponders(_) => Error::Storage(format!(
            "NATS does not serve bucket {bucket}: its stream has no leader yet (try again), or JetStream's data was \
                 removed (restart to create it)"
        )),
        other => other,
    }
}

/// Encodes a key. Keys of the bus are arbitrary strings; NATS allows few characters and no empty key.
fn encode(key: &str) -> String {
    format!("k{}", URL_SAFE_NO_PAD.encode(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nats::{NatsConfig, access::Access};
    use std::sync::Arc;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::TcpStream;
    use tokio_util::sync::CancellationToken;
    use tokio_util::task::TaskTracker;

    /// Answers direct gets of the bucket as a replica that has nothing yet.
    async fn empty_replica(port: u16) {
        let mut stream = BufReader::new(TcpStream::connect(("127.0.0.1", port)).await.unwrap());
        let hello = "CONNECT {\"verbose\":false,\"headers\":true}\r\nSUB $JS.API.DIRECT.GET.KV_B.> 1\r\nPING\r\n";
        stream.write_all(hello.as_bytes()).await.unwrap();
        let mut line = String::new();
        while !line.starts_with("PONG") {
            line.clear();
            stream.read_line(&mut line).await.unwrap();
        }
        tokio::spawn(async move {
            let status = "NATS/1.0 404 Message Not Found\r\n\r\n";
            let mut line = String::new();
            while stream.read_line(&mut line).await.unwrap_or(0) > 0 {
                if let ["MSG", _, _, reply, _] = line.split_whitespace().collect::<Vec<_>>()[..] {
                    let answer = format!("HPUB {reply} {0} {0}\r\n{status}\r\n", status.len());
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
                line.clear();
            }
        });
    }

    #[tokio::test]
    async fn an_entry_that_a_replica_does_not_have_yet_is_read_from_the_leader() {
        let server = testkit::NatsServer::start().await;
        let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
        let access = Arc::new(Access::new(NatsConfig { url: server.url(), ..NatsConfig::default() }).unwrap());
        let link = Link::open(0, &access, &Arc::default(), &tasks, &cancel).await.unwrap();
        // Without direct gets of its own, the server leaves them to the replica below.
        let config = async_nats::jetstream::stream::Config {
            name: "KV_B".into(),
            subjects: vec!["$KV.B.>".into()],
            ..Default::default()
        };
        link.jetstream.create_stream(config).await.unwrap();
        empty_replica(server.port()).await;

        assert_eq!(get(&link, "B", "key").await.unwrap(), None);
        let first = put(&link, "B", "key", "value".into(), Some(0)).await.unwrap();
        assert_eq!(get(&link, "B", "key").await.unwrap(), Some(("value".into(), first)));
        let second = put(&link, "B", "key", "".into(), None).await.unwrap();
        assert_eq!(get(&link, "B", "key").await.unwrap(), Some(("".into(), second)));

        let mut deleted = HeaderMap::new();
        deleted.insert(DELETED_HEADER, "DEL");
        let subject = format!("$KV.B.{}", encode("key"));
        link.ask(&subject, deleted, Bytes::new(), Awaited::PubAck, DEADLINE)
            .await
            .unwrap();
        assert_eq!(get(&link, "B", "key").await.unwrap(), None);
        cancel.cancel();
    }
}
