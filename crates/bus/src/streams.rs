//! The product's streams and buckets. Every part that uses them declares them, because a declaration is idempotent.
//!
//! New work is all that a full store refuses: assignments and results stay until they are acknowledged, however old or
//! many they are. The routers stop accepting tasks before the results of accepted ones lack room.

use crate::{BucketConfig, Bus, ConsumerConfig, Result, Retention, StreamConfig};
use std::time::Duration;
use wire::subjects;

const DAY: Duration = Duration::from_secs(86_400);
/// How long an append, and a request with an idempotency key, is idempotent (contract: 3600 s).
const DEDUP: Duration = Duration::from_secs(3600);
/// The name of the routers' consumer of results.
pub const ROUTER: &str = "router";
/// A consumer that shares nothing more about its pace than an operator's program would need.
const ACK_WAIT: Duration = Duration::from_secs(30);
const MAX_ACK_PENDING: usize = 1000;
/// Share of [`Sizes::dead_letters`] for messages that cannot be used: one part of this many.
const UNREADABLE_SHARE: u64 = 8;

/// Sizes of the streams and buckets, in bytes.
#[derive(Debug, Clone)]
pub struct Sizes {
    pub assignments: u64,
    pub results: u64,
    pub usage: u64,
    /// When usage events expire that no named consumer waits for.
    pub usage_max_age: Duration,
    /// Names of the durable consumers of usage. If there are any, an event stays until each of them has acknowledged it,
    /// and is then deleted.
    pub usage_consumers: Vec<String>,
    /// An eighth of it is for unreadable messages.
    pub dead_letters: u64,
    /// Records of tasks.
    pub tasks: u64,
    /// Idempotency keys of the last hour; routers refuse new ones beyond it.
    pub keys: u64,
    /// Memory for the message ids of each stream, in the embedded bus.
    pub message_ids: u64,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            assignments: 512 << 20,
            results: 1 << 30,
            usage: 1 << 30,
            usage_max_age: 30 * DAY,
            usage_consumers: Vec::new(),
            dead_letters: 512 << 20,
            tasks: 1 << 30,
            keys: 256 << 20,
            message_ids: 64 << 20,
        }
    }
}

pub async fn declare(bus: &Bus) -> Result<()> {
    let sizes = bus.sizes();
    for stream in [assignments(sizes), results(sizes), usage(sizes)] {
        bus.declare_stream(stream).await?;
    }
    for stream in dead_letters(sizes) {
        bus.declare_stream(stream).await?;
    }

    let tasks = BucketConfig {
        name: subjects::BUCKET_TASKS,
        max_age: Some(DAY),
        max_bytes: Some(sizes.tasks),
    };
    bus.declare_bucket(tasks).await?;
    // Without a size of its own, so that no key is evicted before its time: routers refuse new keys instead.
    bus.declare_kv(subjects::BUCKET_KEYS, Some(DEDUP)).await?;
    bus.declare_kv(subjects::BUCKET_POLICIES, None).await
}

/// The stream of assignments. To let it take further subjects, declare it again with them.
pub fn assignments(sizes: &Sizes) -> StreamConfig {
    StreamConfig {
        max_bytes: sizes.assignments,
        ..stream(subjects::STREAM_ASSIGN, &[subjects::ASSIGN], Retention::WorkQueue, sizes)
    }
}

fn results(sizes: &Sizes) -> StreamConfig {
    StreamConfig {
        max_bytes: sizes.results,
        // Declared with the stream, so that no result is stored before the routers' consumer exists.
        consumers: vec![consumer(subjects::STREAM_RESULT, ROUTER, Some(subjects::RESULT))],
        retired: vec!["webapp-chat"],
        ..stream(subjects::STREAM_RESULT, &[subjects::RESULT], Retention::Interest, sizes)
    }
}

fn usage(sizes: &Sizes) -> StreamConfig {
    let named = sizes.usage_consumers.iter();
    let consumers: Vec<_> = named.map(|name| consumer(subjects::STREAM_USAGE, name, None)).collect();
    let (retention, max_age) = match consumers[..] {
        [] => (Retention::Limits, Some(sizes.usage_max_age)),
        _ => (Retention::Interest, None),
    };
    StreamConfig {
        max_age,
        max_bytes: sizes.usage,
        consumers,
        ..stream(subjects::STREAM_USAGE, &[subjects::USAGE], retention, sizes)
    }
}

/// The stream of dead letters that were read, and the stream of those that were not. Anybody who may publish on a
/// subject can send what nobody can read; a flood of it evicts only its like.
fn dead_letters(sizes: &Sizes) -> [StreamConfig; 2] {
    // Assignments may have a subject for each provider below the common one.
    let of_providers = format!("{}.*", subjects::ASSIGN);
    let originals = [subjects::ASSIGN, &of_providers, subjects::RESULT];
    let unreadable_bytes = (sizes.dead_letters / UNREADABLE_SHARE).max(1);

    let letters = |name, subject: fn(&str) -> String, also: &[&'static str], max_bytes| {
        let taken = originals.map(subject);
        let taken: Vec<_> = taken.iter().map(String::as_str).chain(also.iter().copied()).collect();
        StreamConfig {
            max_age: Some(30 * DAY),
            max_bytes,
            ..stream(name, &taken, Retention::Limits, sizes)
        }
    };
    let read_bytes = sizes.dead_letters - unreadable_bytes;
    [
        letters(subjects::STREAM_DLQ, subjects::dead_letter, &[subjects::DEAD_LETTER_V2], read_bytes),
        letters(subjects::STREAM_UNREADABLE, subjects::unreadable, &[], unreadable_bytes),
    ]
}

fn stream(name: &'static str, subjects: &[&str], retention: Retention, sizes: &Sizes) -> StreamConfig {
    StreamConfig {
        dedup_window: DEDUP,
        dedup_bytes: sizes.message_ids,
        ..StreamConfig::new(name, subjects.iter().map(ToString::to_string).collect(), retention)
    }
}

fn consumer(stream: &'static str, name: &str, filter: Option<&str>) -> ConsumerConfig {
    ConsumerConfig {
        stream,
        name: name.into(),
        filter: filter.map(String::from),
        ack_wait: ACK_WAIT,
        max_ack_pending: MAX_ACK_PENDING,
        max_in_hand: MAX_ACK_PENDING,
        from_start: true,
    }
}
