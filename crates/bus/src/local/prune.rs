//! Prunes expired rows and streams over their byte limit, in small batches so that other writes run in between.

use super::store::millis;
use crate::{Retention, StreamConfig};
use rusqlite::{Connection, params};
use std::time::Duration;

/// Maximum rows deleted per stream or bucket and table in one batch.
const BATCH_MAX: usize = 1000;
/// Free pages that the file keeps for reuse (64 MiB of 4 KiB pages). Beyond that, each pass returns
/// [`PAGES_GIVEN_BACK`] to the file system.
const FREE_PAGES_KEPT: u64 = 16 * 1024;
const PAGES_GIVEN_BACK: u64 = 2 * 1024;

/// Deletes one batch; returns whether more may be left.
pub fn some(
    c: &Connection,
    streams: &[StreamConfig],
    buckets: &[(&str, Duration)],
    now: u64,
) -> rusqlite::Result<bool> {
    let mut more = false;
    for stream in streams {
        more |= messages(c, stream, now)?;
        let before = now.saturating_sub(millis(stream.dedup_window));
        let gone = c
            .prepare_cached(
                "DELETE FROM dedup WHERE (stream, msg_id) IN
                 (SELECT stream, msg_id FROM dedup WHERE stream = ?1 AND at_ms < ?2 LIMIT ?3)",
            )?
            .execute(params![stream.name, before, BATCH_MAX])?;
        more |= gone == BATCH_MAX;
    }

    for (bucket, max_age) in buckets {
        let before = now.saturating_sub(millis(*max_age));
        let gone = c
            .prepare_cached(
                "DELETE FROM kv WHERE (bucket, key) IN
                 (SELECT bucket, key FROM kv WHERE bucket = ?1 AND at_ms < ?2 LIMIT ?3)",
            )?
            .execute(params![bucket, before, BATCH_MAX])?;
        more |= gone == BATCH_MAX;
    }

    // Vacuuming waits until nothing is left to delete, so that a backlog of expired rows is worked off first.
    let free: u64 = c.query_row("PRAGMA freelist_count", [], |row| row.get(0))?;
    if !more && free > FREE_PAGES_KEPT {
        c.execute_batch(&format!("PRAGMA incremental_vacuum({PAGES_GIVEN_BACK})"))?;
    }
    Ok(more)
}

/// Deletes messages, oldest first, that exceed the stream's age or byte limit; returns whether more may be left.
///
/// The byte limit of a work queue is enforced by `append` instead, because every message that the queue holds still has
/// to be delivered.
fn messages(c: &Connection, stream: &StreamConfig, now: u64) -> rusqlite::Result<bool> {
    let bytes: u64 =
        c.prepare_cached("SELECT bytes FROM sizes WHERE stream = ?1")?.query_row([stream.name], |row| row.get(0))?;
    let mut over = match stream.retention {
        Retention::Limits => bytes.saturating_sub(stream.max_bytes),
        Retention::WorkQueue => 0,
    };
    let before = now.saturating_sub(millis(stream.max_age));

    // Walk from the oldest message until one is within both limits.
    let (mut gone, mut last) = (0, None);
    {
        let mut oldest = c.prepare_cached(
            "SELECT seq, stored_ms, length(payload) FROM messages WHERE stream = ?1 ORDER BY seq LIMIT ?2",
        )?;
        let mut rows = oldest.query(params![stream.name, BATCH_MAX])?;
        while let Some(row) = rows.next()? {
            if over == 0 && row.get::<_, u64>(1)? >= before {
                break;
            }
            over = over.saturating_sub(row.get(2)?);
            gone += 1;
            last = Some(row.get::<_, u64>(0)?);
        }
    }

    if let Some(last) = last {
        c.prepare_cached("DELETE FROM messages WHERE stream = ?1 AND seq <= ?2")?
            .execute(params![stream.name, last])?;
    }
    Ok(gone == BATCH_MAX)
}
