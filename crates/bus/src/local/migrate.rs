//! Migrates the tables of the previous version to groups, within the same file.

use super::record::{ConsumerRecord, EntryRecord, Group, Kind, MessageRecord, SeenRecord, Stored, StreamRecord};
use super::state::hash_id;
use bytes::Bytes;
use journal::rusqlite::{Connection, Result as Sqlite};
use journal::{Commit, Log};

const GROUP_BYTES: usize = 1024 * 1024;
const TABLES: [&str; 9] =
    ["messages", "sequences", "dedup", "consumers", "queue", "kv", "sizes", "revisions", "taken_over"];

/// Writes the tables' contents as groups, then drops the tables in one transaction. After a crash in between, the
/// migration starts over.
pub fn older_format(log: &mut Log) -> journal::Result<()> {
    let found = log
        .connection()
        .prepare("SELECT 1 FROM sqlite_master WHERE name = 'queue'")?
        .exists([])?;
    if !found {
        return Ok(());
    }

    tracing::info!("migrating the streams and buckets of an older version");
    log.clear()?;
    for read in [streams, messages, seen, consumers, entries] {
        let records = read(log.connection())?;
        let mut group = Group::new(log.last() + 1);

        for (kind, value) in records {
            match value {
                Some(value) => _ = group.push_bytes(kind, &value),
                None => group.push(kind),
            }
            if group.len() > GROUP_BYTES {
                let full = std::mem::replace(&mut group, Group::new(log.last() + 2));
                log.commit(&Commit { group: &full.into_bytes(), ..Commit::default() })?;
            }
        }

        if !group.is_empty() {
            log.commit(&Commit { group: &group.into_bytes(), ..Commit::default() })?;
        }
    }

    let drops: String = TABLES
        .iter()
        .map(|table| format!("DROP TABLE IF EXISTS {table};"))
        .collect();
    log.connection().execute_batch(&format!("BEGIN; {drops} COMMIT"))?;
    Ok(())
}

type Records = Vec<(Kind, Option<Vec<u8>>)>;

fn streams(db: &Connection) -> Sqlite<Records> {
    let mut rows = db.prepare("SELECT stream, last FROM sequences")?;
    let rows =
        rows.query_map([], |row| Ok((Kind::Stream(StreamRecord { stream: row.get(0)?, last: row.get(1)? }), None)))?;
    let revision: u64 = db.query_row("SELECT last FROM revisions", [], |row| row.get(0))?;
    rows.chain(std::iter::once(Ok((Kind::Revision(revision), None))))
        .collect()
}

fn messages(db: &Connection) -> Sqlite<Records> {
    let mut rows = db.prepare("SELECT stream, seq, subject, headers, payload, stored_ms FROM messages")?;
    let rows = rows.query_map([], |row| {
        let subject: String = row.get(2)?;
        let headers: Vec<(String, String)> = serde_json::from_str(&row.get::<_, String>(3)?).unwrap_or_default();
        let stored = Stored {
            subject: subject.clone(),
            headers: headers.into_iter().flat_map(|(name, value)| [name, value]).collect(),
            payload: row.get::<_, Vec<u8>>(4)?.into(),
        };
        let record = MessageRecord {
            stream: row.get(0)?,
            sequence: row.get(1)?,
            stored_ms: row.get(5)?,
            subject,
            id_hash: Bytes::new(),
            place: None,
        };
        Ok((Kind::Message(record), Some(prost::Message::encode_to_vec(&stored))))
    })?;
    rows.collect()
}

fn seen(db: &Connection) -> Sqlite<Records> {
    let mut rows = db.prepare("SELECT stream, msg_id, seq, at_ms FROM dedup ORDER BY at_ms")?;
    let rows = rows.query_map([], |row| {
        let id = hash_id(&row.get::<_, String>(1)?);
        let id_hash = Bytes::copy_from_slice(&id.to_be_bytes());
        Ok((
            Kind::Seen(SeenRecord { stream: row.get(0)?, id_hash, sequence: row.get(2)?, at_ms: row.get(3)? }),
            None,
        ))
    })?;
    rows.collect()
}

fn consumers(db: &Connection) -> Sqlite<Records> {
    let mut consumers = db.prepare("SELECT id, stream, name, filter FROM consumers")?;
    let mut owed = db.prepare("SELECT seq, delivered FROM queue WHERE consumer = ?1 ORDER BY seq")?;
    let mut records = Records::new();
    let mut rows = consumers.query([])?;
    while let Some(row) = rows.next()? {
        let (id, stream): (i64, String) = (row.get(0)?, row.get(1)?);
        let last: u64 = db.query_row("SELECT last FROM sequences WHERE stream = ?1", [&stream], |row| row.get(0))?;
        // The older format put each stored message into the queue, so no message is beyond the cursor.
        let out = owed.query_map([id], |row| Ok((row.get::<_, u64>(0)?, row.get::<_, u32>(1)?)))?;
        let (out, delivered) = out.collect::<Sqlite<Vec<_>>>()?.into_iter().unzip();
        let (name, filter) = (row.get(2)?, row.get(3)?);
        records.push((Kind::Consumer(ConsumerRecord { stream, name, filter, next: last + 1, out, delivered }), None));
    }
    Ok(records)
}

fn entries(db: &Connection) -> Sqlite<Records> {
    let mut rows = db.prepare("SELECT bucket, key, revision, at_ms, value FROM kv ORDER BY revision")?;
    let rows = rows.query_map([], |row| {
        let record = EntryRecord {
            bucket: row.get(0)?,
            key: row.get(1)?,
            revision: row.get(2)?,
            at_ms: row.get(3)?,
            place: None,
            done: false,
        };
        Ok((Kind::Entry(record), Some(row.get(4)?)))
    })?;
    rows.collect()
}
