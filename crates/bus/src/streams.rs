//! The product's streams and buckets. Every part that uses them declares them, because a declaration is idempotent.

use crate::{Bus, Result, Retention, StreamConfig};
use std::time::Duration;
use wire::subjects;

const DAY: Duration = Duration::from_secs(86_400);
/// How long an append is idempotent (contract: 3600 s).
const DEDUP: Duration = Duration::from_secs(3600);

pub async fn declare(bus: &Bus) -> Result<()> {
    let limits = |name, subjects: Vec<String>, max_age, max_bytes| StreamConfig {
        name,
        subjects,
        retention: Retention::Limits,
        max_age,
        max_bytes,
        dedup_window: DEDUP,
    };

    let assign = limits(subjects::STREAM_ASSIGN, vec![subjects::ASSIGN.into()], 7 * DAY, 1 << 30);
    bus.declare_stream(StreamConfig { retention: Retention::WorkQueue, ..assign })
        .await?;
    bus.declare_stream(limits(subjects::STREAM_RESULT, vec![subjects::RESULT.into()], DAY, 1 << 30))
        .await?;
    bus.declare_stream(limits(subjects::STREAM_USAGE, vec![subjects::USAGE.into()], 30 * DAY, 1 << 30))
        .await?;
    // Assignments may have a subject for each provider below the common one.
    let of_providers = format!("{}.*", subjects::ASSIGN);
    let dead = [subjects::ASSIGN, &of_providers, subjects::RESULT].map(subjects::dead_letter);
    bus.declare_stream(limits(subjects::STREAM_DLQ, dead.into(), 30 * DAY, 1 << 30))
        .await?;
    bus.declare_kv(subjects::BUCKET_TASKS, Some(DAY)).await?;
    bus.declare_kv(subjects::BUCKET_POLICIES, None).await
}
