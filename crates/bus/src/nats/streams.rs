//! JetStream streams and buckets: declaring them, appending, querying their state.

use super::convert;
use super::inbox::Awaited;
use super::link::Link;
use crate::pattern::union;
use crate::{Appended, Error, Message, Result, Retention, StreamConfig, StreamInfo};
use async_nats::HeaderMap;
use async_nats::header::{NATS_EXPECTED_LAST_MESSAGE_ID, NATS_MESSAGE_ID};
use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamByNameErrorKind, GetStreamErrorKind};
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType, Stream};
use async_nats::jetstream::{ErrorCode, kv};
use bytes::Bytes;
use futures_util::TryStreamExt;
use std::time::Duration;

/// A message id that no message has.
const ID_OF_NONE: &str = "beamline: the id of no message";

pub async fn declare(link: &Link, stream: StreamConfig) -> Result<()> {
    link.connected()?;
    create_or_update(link, stream.name, |config| {
        config.subjects = union(&config.subjects, &stream.subjects);
        config.retention = match stream.retention {
            Retention::WorkQueue => RetentionPolicy::WorkQueue,
            Retention::Limits => RetentionPolicy::Limits,
        };
        // Every message in a work queue still has to be delivered, so a full one refuses new messages and drops none.
        config.discard = match stream.retention {
            Retention::WorkQueue => DiscardPolicy::New,
            Retention::Limits => DiscardPolicy::Old,
        };
        config.max_age = stream.max_age;
        config.max_bytes = i64::try_from(stream.max_bytes).unwrap_or(i64::MAX);
        config.duplicate_window = within(stream.dedup_window, stream.max_age);
    })
    .await
}

pub async fn declare_kv(link: &Link, bucket: &str, max_age: Option<Duration>) -> Result<()> {
    link.connected()?;
    // To the server, an age of zero is none.
    let max_age = max_age.unwrap_or_default();
    let failed = |error: &dyn std::fmt::Display| Error::Storage(format!("cannot declare bucket {bucket}: {error}"));
    let stream = format!("KV_{bucket}");

    if get(link, &stream).await?.is_none() {
        let config = kv::Config {
            bucket: bucket.into(),
            max_age,
            storage: StorageType::File,
            ..Default::default()
        };
        // Another process may create the bucket first, with other settings; it is updated to ours below.
        if let Err(error) = link.jetstream.create_key_value(config).await
            && get(link, &stream).await?.is_none()
        {
            return Err(failed(&error));
        }
    }

    create_or_update(link, &stream, |config| {
        config.max_age = max_age;
        config.duplicate_window = within(config.duplicate_window, max_age);
        // Reads depend on it.
        config.allow_direct = true;
    })
    .await
}

/// The dedup window, shortened to `max_age`, because the server refuses a longer one. A `max_age` of zero is unlimited.
fn within(window: Duration, max_age: Duration) -> Duration {
    if max_age.is_zero() { window } else { window.min(max_age) }
}

/// Creates the stream, or updates it if `adjust` changes its configuration. Settings that `adjust` does not touch, such
/// as replicas and placement, stay as an operator set them.
async fn create_or_update(link: &Link, name: &str, adjust: impl Fn(&mut Config)) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| Error::Storage(format!("cannot declare stream {name}: {error}"));
    let mut existing = get(link, name).await?;

    if existing.is_none() {
        let mut config = Config { name: name.into(), storage: StorageType::File, ..Default::default() };
        adjust(&mut config);
        match link.jetstream.create_stream(config).await {
            Ok(_) => return Ok(()),
            Err(error) => {
                // Either another process has just created the stream, or the server refused.
                existing = get(link, name).await?;
                if existing.is_none() || matches!(error.kind(), CreateStreamErrorKind::JetStreamUnavailable) {
                    return Err(failed(&error));
                }
            }
        }
    }

    let Some(stream) = existing else { return Ok(()) };
    let current = &stream.cached_info().config;
    let mut config = current.clone();
    adjust(&mut config);
    if config != *current {
        link.jetstream
            .update_stream(config)
            .await
            .map_err(|error| failed(&error))?;
    }
    Ok(())
}

/// The stream, or `None` if it does not exist.
pub async fn get(link: &Link, name: &str) -> Result<Option<Stream>> {
    match link.jetstream.get_stream(name).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(inner) if inner.error_code() == ErrorCode::STREAM_NOT_FOUND => Ok(None),
            _ => Err(Error::Storage(format!("cannot query stream {name}: {error}"))),
        },
    }
}

/// Appends a message. Live subscribers receive every publish on the subject, duplicates included, because only the
/// acknowledgement tells that a message is a duplicate.
pub async fn append(link: &Link, message: Message, msg_id: Option<&str>, deadline: Duration) -> Result<Appended> {
    let mut headers = convert::to_nats(&message.headers);
    if let Some(id) = msg_id {
        headers.insert(NATS_MESSAGE_ID, id.replace(['\r', '\n'], " "));
    }

    let subject = &*message.subject;
    match link
        .ask(subject, headers, message.payload, Awaited::PubAck, deadline)
        .await
    {
        Ok(ack) => stored(&ack.payload)
            .map_err(|refused| Error::Storage(format!("cannot append to {subject}: {}", refused.why))),
        Err(Error::NoResponders(_)) => Err(Error::NoStream(subject.into())),
        Err(error) => Err(error),
    }
}

/// Whether a stream takes the subject. Fails if the server does not answer.
pub async fn takes(link: &Link, subject: &str) -> Result<bool> {
    match link.jetstream.stream_by_subject(subject).await {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == GetStreamByNameErrorKind::NotFound => Ok(false),
        Err(_) => Err(Error::Timeout(subject.into())),
    }
}

/// Whether the stream remembers the message id. This appends a message that cannot be stored, because it expects that
/// the last message has an id that none has: the server looks for duplicates first, and refuses the rest. (Servers check
/// an expected sequence before that.) It goes to a subject of its own, because live subscribers receive what is refused,
/// too.
pub async fn seen(link: &Link, stream: &str, msg_id: &str, deadline: Duration) -> Result<bool> {
    let subject = wire::subjects::seen(stream);
    let ask = || {
        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, msg_id.replace(['\r', '\n'], " "));
        headers.insert(NATS_EXPECTED_LAST_MESSAGE_ID, ID_OF_NONE);
        link.ask(&subject, headers, Bytes::new(), Awaited::PubAck, deadline)
    };

    let ack = match ask().await {
        // Nobody has asked this stream before. With a subscriber to everything, the request times out instead.
        Err(Error::NoResponders(_) | Error::Timeout(_)) => {
            add_subjects(link, stream, std::slice::from_ref(&subject)).await?;
            ask().await
        }
        answered => answered,
    }?;
    match stored(&ack.payload) {
        Ok(appended) => Ok(appended.duplicate),
        Err(refused) if refused.code == Some(ErrorCode::STREAM_WRONG_LAST_MESSAGE_ID) => Ok(false),
        Err(refused) => {
            Err(Error::Storage(format!("cannot look for message id {msg_id} in {stream}: {}", refused.why)))
        }
    }
}

/// Adds subjects to those that an existing stream takes.
pub async fn add_subjects(link: &Link, stream: &str, subjects: &[String]) -> Result<()> {
    link.connected()?;
    if get(link, stream).await?.is_none() {
        return Err(Error::NoStream(stream.into()));
    }
    create_or_update(link, stream, |config| config.subjects = union(&config.subjects, subjects)).await
}

/// The server's clock, as it answers a query about the stream.
pub async fn time_ms(link: &Link, stream: &str, deadline: Duration) -> Result<u64> {
    let subject = format!("$JS.API.STREAM.INFO.{stream}");
    let reply = link
        .ask(&subject, HeaderMap::new(), Bytes::new(), Awaited::Reply, deadline)
        .await?;
    let answer = serde_json::from_slice::<serde_json::Value>(&reply.payload).unwrap_or_default();
    let time = answer["ts"]
        .as_str()
        .and_then(|text| async_nats::datetime::parse_rfc3339(text).ok());
    // Servers before 2.10 do not say.
    Ok(time
        .map_or_else(crate::clock::unix_ms, |time| u64::try_from(time.unix_timestamp_nanos() / 1_000_000).unwrap_or(0)))
}

/// Parses the server's acknowledgement of a publish.
pub fn stored(ack: &[u8]) -> Result<Appended, Refused> {
    match serde_json::from_slice(ack) {
        Ok(Response::Ok(PublishAck { sequence, duplicate, .. })) => Ok(Appended { sequence, duplicate }),
        Ok(Response::Err { error }) => Err(Refused { code: Some(error.error_code()), why: error.to_string() }),
        Err(_) => Err(Refused { code: None, why: "the reply is not an acknowledgement".into() }),
    }
}

/// Why a publish was not stored.
pub struct Refused {
    /// The server's error code.
    pub code: Option<ErrorCode>,
    pub why: String,
}

pub async fn info(link: &Link, name: &str) -> Result<StreamInfo> {
    link.connected()?;
    let stream = get(link, name).await?.ok_or_else(|| Error::NoStream(name.into()))?;
    let state = &stream.cached_info().state;

    let failed = |error| Error::Storage(format!("cannot list the consumers of stream {name}: {error}"));
    let consumers: Vec<_> = stream
        .consumers()
        .map_ok(|consumer| (consumer.name, consumer.num_pending + consumer.num_ack_pending as u64))
        .try_collect()
        .await
        .map_err(failed)?;
    Ok(StreamInfo { messages: state.messages, bytes: state.bytes, consumers })
}
