//! What has outlived its age or its stream's bytes leaves, a little at a time: the writer thread serves others in between.

use super::store::millis;
use crate::{Retention, StreamConfig};
use rusqlite::{Connection, params};
use std::time::Duration;

/// Rows of a kind that leave in one go.
const AT_ONCE: usize = 1000;
/// Free pages that the file keeps for what comes next (64 MiB); of more, some go back to the disk with each look.
const FREE_PAGES_KEPT: u64 = 16 * 1024;
const PAGES_GIVEN_BACK: u64 = 2 * 1024;

/// Drops some of what is over; whether there may be more.
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
            .execute(params![stream.name, before, AT_ONCE])?;
        more |= gone == AT_ONCE;
    }
    for (bucket, max_age) in buckets {
        let before = now.saturating_sub(millis(*max_age));
        let gone = c
            .prepare_cached(
                "DELETE FROM kv WHERE (bucket, key) IN
                 (SELECT bucket, key FROM kv WHERE bucket = ?1 AND at_ms < ?2 LIMIT ?3)",
            )?
            .execute(params![bucket, before, AT_ONCE])?;
        more |= gone == AT_ONCE;
    }
    let free: u64 = c.query_row("PRAGMA freelist_count", [], |row| row.get(0))?;
    if !more && free > FREE_PAGES_KEPT {
        c.execute_batch(&format!("PRAGMA incremental_vacuum({PAGES_GIVEN_BACK})"))?;
    }
    Ok(more)
}

/// From the oldest on. A work queue's messages are owed to somebody: its bytes are kept by refusing new ones.
fn messages(c: &Connection, stream: &StreamConfig, now: u64) -> rusqlite::Result<bool> {
    let bytes: u64 =
        c.prepare_cached("SELECT bytes FROM sizes WHERE stream = ?1")?.query_row([stream.name], |row| row.get(0))?;
    let mut over = match stream.retention {
        Retention::Limits => bytes.saturating_sub(stream.max_bytes),
        Retention::WorkQueue => 0,
    };
    let before = now.saturating_sub(millis(stream.max_age));
    let (mut gone, mut last) = (0, None);
    {
        let mut oldest = c.prepare_cached(
            "SELECT seq, stored_ms, length(payload) FROM messages WHERE stream = ?1 ORDER BY seq LIMIT ?2",
        )?;
        let mut rows = oldest.query(params![stream.name, AT_ONCE])?;
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
    Ok(gone == AT_ONCE)
}
