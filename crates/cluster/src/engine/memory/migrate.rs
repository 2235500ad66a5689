//! Migrates the tables of the previous version to groups, within the same file.

use super::record::{self, Channel, Kind, Publication};
use bus::clock::unix_ms;
use journal::rusqlite::{self, Connection, params};
use journal::{Commit, Log};

/// Rows that are read at once.
const ROWS: usize = 1000;

/// Writes the tables' contents as groups, then drops the tables in one transaction. After a crash in between, the
/// migration starts over. The record of the file's life has the same format, so its epochs stay valid.
pub fn older_format(log: &mut Log) -> journal::Result<()> {
    let found = log
        .connection()
        .prepare("SELECT 1 FROM sqlite_master WHERE name = 'publications'")?
        .exists([])?;
    if !found {
        return Ok(());
    }

    tracing::info!("migrating the channel histories of an older version");
    log.clear()?;
    let mut after = String::new();
    while let Some(last) = copy(log, |db| channels(db, &after))? {
        after = last;
    }
    let mut after = (String::new(), 0);
    while let Some(last) = copy(log, |db| publications(db, &after))? {
        after = last;
    }

    log.connection()
        .execute_batch("BEGIN; DROP TABLE channels; DROP TABLE publications; COMMIT")?;
    Ok(())
}

/// Writes the records that `read` returns as one group. Returns the key of the last one.
fn copy<K>(
    log: &mut Log,
    read: impl Fn(&Connection) -> rusqlite::Result<Vec<(K, Kind)>>,
) -> journal::Result<Option<K>> {
    let mut group = Vec::new();
    let mut last = None;
    for (key, kind) in read(log.connection())? {
        record::push(&mut group, kind);
        last = Some(key);
    }
    log.commit(&Commit { group: &group, ..Commit::default() })?;
    Ok(last)
}

fn channels(db: &Connection, after: &str) -> rusqlite::Result<Vec<(String, Kind)>> {
    let mut rows =
        db.prepare_cached("SELECT channel, epoch, offset FROM channels WHERE channel > ?1 ORDER BY channel LIMIT ?2")?;
    let rows = rows.query_map(params![after, ROWS], |row| {
        let channel: String = row.get(0)?;
        let (epoch, offset) = (row.get(1)?, row.get(2)?);
        Ok((channel.clone(), Kind::Channel(Channel { channel, epoch, offset, touched_ms: unix_ms() })))
    })?;
    rows.collect()
}

fn publications(db: &Connection, after: &(String, u64)) -> rusqlite::Result<Vec<((String, u64), Kind)>> {
    let mut rows = db.prepare_cached(
        "SELECT channel, epoch, publications.offset, data, at_ms, key FROM publications JOIN channels USING (channel)
         WHERE (channel, publications.offset) > (?1, ?2) ORDER BY channel, publications.offset LIMIT ?3",
    )?;
    let rows = rows.query_map(params![after.0, after.1, ROWS], |row| {
        let record = Publication {
            channel: row.get(0)?,
            epoch: row.get(1)?,
            offset: row.get(2)?,
            publication: row.get::<_, Vec<u8>>(3)?.into(),
            at_ms: row.get(4)?,
            key: row.get(5)?,
        };
        Ok(((record.channel.clone(), record.offset), Kind::Publication(record)))
    })?;
    rows.collect()
}
