//! JetStream streams and buckets: declaring, appending, looking.

use super::convert;
use super::inbox::Awaited;
use super::link::Link;
use crate::{Appended, Error, Message, Result, Retention, StreamConfig, StreamInfo};
use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamByNameErrorKind, GetStreamErrorKind};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType, Stream};
use async_nats::jetstream::{ErrorCode, kv};
use futures_util::TryStreamExt;
use serde_json::Value;
use std::time::Duration;

pub async fn declare(link: &Link, stream: StreamConfig) -> Result<()> {
    link.connected()?;
    bring(link, stream.name, |config| {
        config.subjects = stream.subjects.clone();
        config.retention = match stream.retention {
            Retention::WorkQueue => RetentionPolicy::WorkQueue,
            Retention::Limits => RetentionPolicy::Limits,
        };
        // A work queue's messages are owed to somebody: new ones are refused rather than old ones dropped.
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

pub async fn declare_kv(link: &Link, bucket: &str, max_age: Duration) -> Result<()> {
    link.connected()?;
    let failed = |error: &dyn std::fmt::Display| Error::Storage(format!("cannot declare bucket {bucket}: {error}"));
    let stream = format!("KV_{bucket}");
    if get(link, &stream).await?.is_none() {
        let config = kv::Config { bucket: bucket.into(), max_age, storage: StorageType::File, ..Default::default() };
        // Another process may create it first, with other settings: then it is brought to ours below.
        if let Err(error) = link.jetstream.create_key_value(config).await
            && get(link, &stream).await?.is_none()
        {
            return Err(failed(&error));
        }
    }
    bring(link, &stream, |config| {
        config.max_age = max_age;
        config.duplicate_window = within(config.duplicate_window, max_age);
    })
    .await
}

/// A declared bucket, as seen over this connection.
pub async fn bucket(link: &Link, bucket: &str) -> Result<kv::Store> {
    let failed = |error| Error::Storage(format!("cannot open bucket {bucket}: {error}"));
    link.connected()?;
    link.jetstream.get_key_value(bucket).await.map_err(failed)
}

/// The server refuses a window that outlasts the messages.
fn within(window: Duration, max_age: Duration) -> Duration {
    if max_age.is_zero() { window } else { window.min(max_age) }
}

/// Creates the stream, or updates it if what we say differs; what an operator set beyond that (replicas, placement) stays.
async fn bring(link: &Link, name: &str, adjust: impl Fn(&mut Config)) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| Error::Storage(format!("cannot declare stream {name}: {error}"));
    let mut known = get(link, name).await?;
    if known.is_none() {
        let mut config = Config { name: name.into(), storage: StorageType::File, ..Default::default() };
        adjust(&mut config);
        match link.jetstream.create_stream(config).await {
            Ok(_) => return Ok(()),
            Err(error) => {
                // Created by another process in between, or refused.
                known = get(link, name).await?;
                if known.is_none() || matches!(error.kind(), CreateStreamErrorKind::JetStreamUnavailable) {
                    return Err(failed(&error));
                }
            }
        }
    }
    let Some(stream) = known else { return Ok(()) };
    let current = &stream.cached_info().config;
    let mut config = current.clone();
    adjust(&mut config);
    if config != *current {
        link.jetstream.update_stream(config).await.map_err(|error| failed(&error))?;
    }
    Ok(())
}

/// `None` when there is no such stream.
pub async fn get(link: &Link, name: &str) -> Result<Option<Stream>> {
    match link.jetstream.get_stream(name).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(inner) if inner.error_code() == ErrorCode::STREAM_NOT_FOUND => Ok(None),
            _ => Err(Error::Storage(format!("cannot look at stream {name}: {error}"))),
        },
    }
}

/// Live subscribers of the subject get the message by its nature, a repeat too: the server tells only us that it is one.
pub async fn append(link: &Link, message: Message, msg_id: Option<&str>, deadline: Duration) -> Result<Appended> {
    let mut headers = convert::to_nats(&message.headers);
    if let Some(id) = msg_id {
        headers.insert(NATS_MESSAGE_ID, id.replace(['\r', '\n'], " "));
    }
    let subject = &*message.subject;
    match link.ask(subject, headers, message.payload, Awaited::PubAck, deadline).await {
        Ok(ack) => stored(subject, &ack.payload),
        Err(Error::NoResponders(_)) => Err(Error::NoStream(subject.into())),
        // A live subscriber keeps the server from saying that no stream is there.
        Err(Error::Timeout(_)) => match link.jetstream.stream_by_subject(subject).await {
            Err(error) if error.kind() == GetStreamByNameErrorKind::NotFound => Err(Error::NoStream(subject.into())),
            _ => Err(Error::Timeout(subject.into())),
        },
        Err(error) => Err(error),
    }
}

fn stored(subject: &str, ack: &[u8]) -> Result<Appended> {
    let ack: Value = serde_json::from_slice(ack).unwrap_or_default();
    match ack["seq"].as_u64() {
        Some(sequence) if ack.get("error").is_none() => {
            Ok(Appended { sequence, duplicate: ack["duplicate"].as_bool().unwrap_or(false) })
        }
        _ => {
            let why = ack["error"]["description"].as_str().unwrap_or("an answer that is no acknowledgement");
            Err(Error::Storage(format!("cannot append to {subject}: {why}")))
        }
    }
}

pub async fn info(link: &Link, name: &str) -> Result<StreamInfo> {
    link.connected()?;
    let stream = get(link, name).await?.ok_or_else(|| Error::NoStream(name.into()))?;
    let state = &stream.cached_info().state;
    let failed = |error| Error::Storage(format!("cannot look at the consumers of stream {name}: {error}"));
    let consumers: Vec<_> = stream
        .consumers()
        .map_ok(|consumer| (consumer.name, consumer.num_pending + consumer.num_ack_pending as u64))
        .try_collect()
        .await
        .map_err(failed)?;
    Ok(StreamInfo { messages: state.messages, bytes: state.bytes, consumers })
}
