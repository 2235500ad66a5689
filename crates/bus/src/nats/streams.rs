//! JetStream streams and buckets: declaring them, appending, querying their state.

use super::convert;
use super::inbox::Awaited;
use super::link::Link;
use crate::pattern::union;
use crate::{Appended, BucketConfig, Error, Fill, Message, Result, Retention, StreamConfig, StreamInfo};
use async_nats::HeaderMap;
use async_nats::header::{NATS_EXPECTED_LAST_MESSAGE_ID, NATS_MESSAGE_ID};
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{
    CreateStreamError, CreateStreamErrorKind, GetStreamByNameErrorKind, GetStreamErrorKind,
};
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{Config, DiscardPolicy, Info, RetentionPolicy, StorageType, Stream};
use bytes::Bytes;
use futures_util::TryStreamExt;
use std::time::Duration;

/// A message id that no message has.
const ID_OF_NONE: &str = "beamline: the id of no message";

const API_DEADLINE: Duration = Duration::from_secs(5);
/// The server's errors for a lack of room, besides a full stream.
const NO_ROOM: [ErrorCode; 3] = [
    ErrorCode::ACCOUNT_RESOURCES_EXCEEDED,
    ErrorCode::INSUFFICIENT_RESOURCES,
    ErrorCode::STORAGE_RESOURCES_EXCEEDED,
];

/// What a declaration did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declared {
    Created,
    Existed,
}

pub async fn declare(link: &Link, stream: &StreamConfig, replicas: Option<usize>) -> Result<Declared> {
    link.connected()?;
    let config = |retention| move |config: &mut Config, held: u64| adjust(config, stream, retention, held);
    let target = policy(stream.retention);

    // Without consumers, an interest stream would store nothing, so it gets them first.
    let known = info_of(link, stream.name).await?;
    if known.is_none() && stream.retention == Retention::Interest {
        create_or_update(link, stream.name, replicas, config(RetentionPolicy::Limits)).await?;
    }
    if known.is_some() || stream.retention == Retention::Interest {
        for consumer in &stream.consumers {
            super::consumer::create(link, consumer).await?;
        }
    }

    create_or_update(link, stream.name, replicas, config(target)).await?;
    for consumer in &stream.consumers {
        super::consumer::create(link, consumer).await?;
    }
    for consumer in &stream.retired {
        super::consumer::retire(link, stream.name, consumer).await?;
    }
    Ok(if known.is_some() {
        Declared::Existed
    } else {
        Declared::Created
    })
}

fn policy(retention: Retention) -> RetentionPolicy {
    match retention {
        Retention::WorkQueue => RetentionPolicy::WorkQueue,
        Retention::Interest => RetentionPolicy::Interest,
        Retention::Limits => RetentionPolicy::Limits,
    }
}

/// Changes the stream's configuration as declared. `held` is the number of bytes that it holds.
fn adjust(config: &mut Config, stream: &StreamConfig, retention: RetentionPolicy, held: u64) {
    config.subjects = union(&config.subjects, &stream.subjects);
    config.retention = retention;
    // Unless the stream may evict, every message in it still has to be read: a full one refuses new messages.
    let evicts = stream.retention == Retention::Limits;
    config.discard = if evicts { DiscardPolicy::Old } else { DiscardPolicy::New };

    // A smaller size than before would evict at once. It applies when the messages beyond it have expired.
    let max_bytes = if evicts {
        stream.max_bytes.max(held)
    } else {
        stream.max_bytes
    };
    config.max_bytes = i64::try_from(max_bytes).unwrap_or(i64::MAX);
    // To the server, an age of zero is none.
    config.max_age = stream.max_age.unwrap_or_default();
    config.duplicate_window = within(stream.dedup_window, config.max_age);
}

pub async fn declare_bucket(link: &Link, bucket: &BucketConfig, replicas: Option<usize>) -> Result<Declared> {
    link.connected()?;
    let stream = bucket_stream(bucket.name);
    let known = info_of(link, &stream).await?;

    create_or_update(link, &stream, replicas, |config, held| {
        // What other clients of NATS expect of a bucket.
        if config.subjects.is_empty() {
            config.subjects = vec![format!("$KV.{}.>", bucket.name)];
            config.max_messages_per_subject = 1;
            config.discard = DiscardPolicy::New;
            config.allow_rollup = true;
            config.deny_delete = true;
        }

        config.max_age = bucket.max_age.unwrap_or_default();
        config.duplicate_window = within(config.duplicate_window, config.max_age);
        // Reads depend on it.
        config.allow_direct = true;
        if let Some(max) = bucket.max_bytes {
            config.max_bytes = i64::try_from(max.max(held)).unwrap_or(i64::MAX);
            config.discard = DiscardPolicy::Old;
        }
    })
    .await?;
    Ok(if known.is_some() {
        Declared::Existed
    } else {
        Declared::Created
    })
}

/// The stream that holds a bucket.
pub fn bucket_stream(bucket: &str) -> String {
    format!("KV_{bucket}")
}

/// The dedup window, shortened to `max_age`, because the server refuses a longer one. A `max_age` of zero is unlimited.
fn within(window: Duration, max_age: Duration) -> Duration {
    if max_age.is_zero() { window } else { window.min(max_age) }
}

/// Creates the stream, or updates it if `adjust` changes its configuration. Settings that `adjust` does not touch, such
/// as placement, stay as an operator set them; so does the number of replicas unless `replicas` is set.
async fn create_or_update(
    link: &Link,
    name: &str,
    replicas: Option<usize>,
    adjust: impl Fn(&mut Config, u64),
) -> Result<()> {
    let adjust = |config: &mut Config, held| {
        adjust(config, held);
        config.num_replicas = replicas.unwrap_or(config.num_replicas);
    };
    let mut existing = info_of(link, name).await?;

    if existing.is_none() {
        let mut config = Config { name: name.into(), storage: StorageType::File, ..Default::default() };
        adjust(&mut config, 0);
        match link.jetstream.create_stream(config).await {
            Ok(_) => return Ok(()),
            Err(error) => {
                // Either another process has just created the stream, or the server refused.
                existing = info_of(link, name).await?;
                if existing.is_none() {
                    return Err(refused(name, replicas, &error));
                }
            }
        }
    }

    let Some(Info { config: current, state, .. }) = existing else {
        return Ok(());
    };
    let mut config = current.clone();
    adjust(&mut config, state.bytes);
    if config != current {
        link.jetstream
            .update_stream(config)
            .await
            .map_err(|error| refused(name, replicas, &error))?;
    }
    Ok(())
}

/// The error for a declaration that the server refused: what to do about it, where that can be told.
fn refused(name: &str, replicas: Option<usize>, error: &CreateStreamError) -> Error {
    let what = format!("cannot declare {name} on NATS");
    let CreateStreamErrorKind::JetStream(inner) = error.kind() else {
        return Error::Storage(format!("{what}: {error}"));
    };
    let advice = match (replicas, inner.error_code()) {
        (Some(replicas), ErrorCode::CLUSTER_NO_PEERS | ErrorCode::STREAM_REPLICAS_NOT_SUPPORTED) => {
            format!("; nats.replicas = {replicas} needs a cluster of at least as many servers with JetStream")
        }
        (_, code) if NO_ROOM.contains(&code) => {
            "; the server reserves the sizes in bus.*_size: lower them, or raise its max_file_store".into()
        }
        _ => return unavailable(&what, &inner),
    };
    Error::Storage(format!("{what}: {inner}{advice}"))
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

/// The configuration and state of a stream; `None` if it does not exist.
pub async fn info_of(link: &Link, name: &str) -> Result<Option<Info>> {
    let what = format!("cannot query stream {name}");
    match api::<Info>(link, &format!("STREAM.INFO.{name}"), &what).await? {
        Ok(info) => Ok(Some(info)),
        Err(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => Ok(None),
        Err(error) => Err(unavailable(&what, &error)),
    }
}

/// Calls JetStream's API over the connection's own inbox. The inner error is what the server answered.
pub async fn api<T: serde::de::DeserializeOwned>(
    link: &Link,
    call: &str,
    what: &str,
) -> Result<std::result::Result<T, async_nats::jetstream::Error>> {
    let subject = format!("$JS.API.{call}");
    let reply = link
        .ask(&subject, HeaderMap::new(), Bytes::new(), Awaited::Reply, API_DEADLINE)
        .await
        .map_err(|error| match error {
            Error::NoResponders(_) => Error::Storage(format!(
                "{what}: JetStream does not answer; is it enabled on the NATS server, and is there room on its disk?"
            )),
            error => error,
        })?;
    match serde_json::from_slice(&reply.payload) {
        Ok(Response::Ok(answer)) => Ok(Ok(answer)),
        Ok(Response::Err { error }) => Ok(Err(error)),
        Err(error) => Err(Error::Storage(format!("{what}: the answer cannot be read: {error}"))),
    }
}

/// The error for a call that the server refused.
pub fn unavailable(what: &str, error: &async_nats::jetstream::Error) -> Error {
    let advice = match error.error_code() {
        ErrorCode::CLUSTER_NOT_AVAILABLE => {
            "; the server has taken JetStream out of service, perhaps because its disk is full or read-only: see its log"
        }
        ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT => {
            "; enable JetStream on the NATS server for this account"
        }
        _ => "",
    };
    Error::Storage(format!("{what}: {error}{advice}"))
}

/// How full a stream is; `None` if it does not exist.
pub async fn fill(link: &Link, store: &'static str, stream: &str) -> Result<Option<Fill>> {
    let Some(Info { config, state, .. }) = info_of(link, stream).await? else {
        return Ok(None);
    };
    let oldest_ms = u64::try_from(state.first_timestamp.unix_timestamp_nanos() / 1_000_000).ok();
    Ok(Some(Fill {
        store,
        messages: state.messages,
        bytes: state.bytes,
        max_bytes: u64::try_from(config.max_bytes).ok().filter(|max| *max > 0),
        oldest_ms: oldest_ms.filter(|_| state.messages > 0),
        first: state.first_sequence,
    }))
}

/// Bytes of an append that the server counts against its `max_payload`.
pub fn appended_bytes(message: &Message, msg_id: Option<&str>) -> usize {
    let line = |name: &str, value: &str| name.len() + value.len() + ": \r\n".len();
    let id = msg_id.map_or(0, |id| line("Nats-Msg-Id", id));
    let headers: usize = message.headers.iter().map(|(name, value)| line(name, value)).sum();
    let frame = if id + headers == 0 { 0 } else { "NATS/1.0\r\n\r\n".len() };
    message.payload.len() + frame + id + headers
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
        Ok(ack) => stored(&ack.payload).map_err(|refused| refused.error(&format!("cannot append to {subject}"))),
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
    create_or_update(link, stream, None, |config, _| config.subjects = union(&config.subjects, subjects)).await
}

/// Takes a subject from those that an existing stream takes.
pub async fn remove_subject(link: &Link, stream: &str, subject: &str) -> Result<()> {
    if info_of(link, stream).await?.is_none() {
        return Err(Error::NoStream(stream.into()));
    }
    create_or_update(link, stream, None, |config, _| config.subjects.retain(|known| known != subject)).await
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

impl Refused {
    pub fn error(&self, what: &str) -> Error {
        let text = format!("{what}: {}", self.why);
        if is_full(self.code, &self.why) {
            Error::Full(text)
        } else {
            Error::Storage(text)
        }
    }
}

/// Whether the server has no room: in the stream, in the account, or on the server.
fn is_full(code: Option<ErrorCode>, why: &str) -> bool {
    // One code stands for all failures to store.
    code.is_some_and(|code| NO_ROOM.contains(&code)) || why.contains("maximum bytes exceeded")
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
