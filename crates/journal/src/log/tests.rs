use super::*;

fn open(dir: &Path) -> Result<Log> {
    Log::open(&dir.join("l.db"), Durability::Process)
}

fn commit(log: &mut Log, group: &str) {
    log.commit(&Commit { group: group.as_bytes(), ..Commit::default() })
        .unwrap();
}

fn replayed(log: &Log) -> Result<(Vec<String>, Vec<(u64, String)>)> {
    let (mut parts, mut groups) = (Vec::new(), Vec::new());
    log.replay(
        |part| {
            parts.push(String::from_utf8(part.into()).unwrap());
            Ok(())
        },
        |row, group| {
            groups.push((row, String::from_utf8(group.into()).unwrap()));
            Ok(())
        },
    )?;
    Ok((parts, groups))
}

fn snapshot(log: &mut Log, data: &str, last: bool) {
    let part = Some(Part { data: data.as_bytes(), last });
    log.commit(&Commit { part, ..Commit::default() }).unwrap();
}

#[test]
fn replay_returns_groups_in_order_and_read_returns_values() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path()).unwrap();
    for group in ["one", "two", "three"] {
        commit(&mut log, group);
    }
    assert_eq!(log.read(Place { row: 3, offset: 1, len: 3 }).unwrap(), "hre");
    assert!(matches!(open(dir.path()), Err(Error::InUse { .. })));
    drop(log);

    let log = open(dir.path()).unwrap();
    let (parts, groups) = replayed(&log).unwrap();
    assert_eq!(parts, Vec::<String>::new());
    assert_eq!(groups, [(1, "one".into()), (2, "two".into()), (3, "three".into())]);
}

#[test]
fn complete_snapshot_replaces_the_groups_before_its_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path()).unwrap();
    commit(&mut log, "one");
    log.begin_snapshot();
    snapshot(&mut log, "a", false);
    commit(&mut log, "two");

    // The snapshot is incomplete, so the replay uses the groups.
    drop(log);
    let mut log = open(dir.path()).unwrap();
    assert_eq!(replayed(&log).unwrap(), (vec![], vec![(1, "one".into()), (2, "two".into())]));

    log.begin_snapshot();
    snapshot(&mut log, "b", false);
    commit(&mut log, "three");
    snapshot(&mut log, "c", true);
    log.commit(&Commit { drop_rows: &[1, 2], ..Commit::default() }).unwrap();
    drop(log);

    let mut log = open(dir.path()).unwrap();
    assert_eq!(replayed(&log).unwrap(), (vec!["b".into(), "c".into()], vec![(3, "three".into())]));
    assert_eq!(log.rows().unwrap(), [(3, 5)]);

    // The numbering continues even if all rows are deleted.
    log.begin_snapshot();
    snapshot(&mut log, "d", true);
    log.commit(&Commit { drop_rows: &[3], ..Commit::default() }).unwrap();
    drop(log);

    let mut log = open(dir.path()).unwrap();
    commit(&mut log, "four");
    assert_eq!(replayed(&log).unwrap(), (vec!["d".into()], vec![(4, "four".into())]));
}

#[test]
fn replay_of_a_damaged_log_names_the_damage() {
    for (damage, named) in [
        ("UPDATE log SET data = x'00' WHERE id = 3", "group 3"),
        ("DELETE FROM log WHERE id = 3", "groups 3 to 3"),
        ("UPDATE snapshot SET data = x'00'", "part 1"),
        ("DELETE FROM snapshot", "snapshot is missing"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path()).unwrap();
        commit(&mut log, "one");
        log.begin_snapshot();
        snapshot(&mut log, "a", true);
        for group in ["two", "three", "four"] {
            commit(&mut log, group);
        }

        log.connection().execute_batch(damage).unwrap();
        let error = replayed(&log).unwrap_err();
        assert!(matches!(&error, Error::Damaged { what, .. } if what.contains(named)), "{damage}: {error}");
    }
}

#[test]
fn failed_commit_on_a_full_disk_stores_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path()).unwrap();
    log.connection().execute_batch("PRAGMA max_page_count = 64").unwrap();

    let mut stored = 0;
    let refused = loop {
        match log.commit(&Commit { group: &[b'x'; 10_000], ..Commit::default() }) {
            Ok(()) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored < 1000, "the page limit was never reached");
    };
    assert!(refused.to_string().contains("full"), "{refused}");

    drop(log);
    let (_, groups) = replayed(&open(dir.path()).unwrap()).unwrap();
    assert_eq!(groups.len(), stored);
}

#[test]
fn truncated_write_ahead_log_yields_only_complete_commits() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path()).unwrap();
    for n in 0..20 {
        commit(&mut log, &format!("{n}").repeat(1000));
    }

    let copy = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    let (database, wal) = (copy("l.db"), copy("l.db-wal"));
    let mut seen = std::collections::BTreeSet::new();
    for cut in (0..wal.len()).step_by(997) {
        let torn = tempfile::tempdir().unwrap();
        std::fs::write(torn.path().join("l.db"), &database).unwrap();
        // Truncated, with garbage appended.
        let mut bytes = wal[..cut].to_vec();
        bytes.extend([0xa5; 100]);
        std::fs::write(torn.path().join("l.db-wal"), bytes).unwrap();

        let Ok(log) = open(torn.path()) else { continue };
        let (_, groups) = replayed(&log).unwrap();
        for (n, (row, group)) in groups.iter().enumerate() {
            assert_eq!((*row, group), (n as u64 + 1, &format!("{n}").repeat(1000)));
        }
        seen.insert(groups.len());
    }
    assert!(seen.len() > 10, "the truncations must cover many commits: {seen:?}");
}

#[test]
fn continuity_is_certain_only_after_a_kill_or_a_clean_shutdown() {
    let dir = tempfile::tempdir().unwrap();
    let check = |boot: &str, expected: Continuity, end_in_order: bool, what: &str| {
        let mut log = open(dir.path()).unwrap();
        assert_eq!(log.continuity(boot).unwrap(), expected, "{what}");
        log.begin_use(boot).unwrap();
        if end_in_order {
            log.end_use().unwrap();
        }
    };
    use Continuity::{Certain, Doubtful};

    check("a", Doubtful, false, "a new file has no record");
    check("a", Certain, false, "only the process was killed");
    check("b", Doubtful, false, "the machine crashed while the process ran");
    check("b", Certain, true, "the process was killed again");
    check("c", Certain, false, "the machine restarted after a clean shutdown");
    check("d", Doubtful, false, "a clean shutdown counts only once");
    check("", Doubtful, false, "the boot is unknown");
    check("", Doubtful, false, "two unknown boots do not match");
}

#[test]
fn restored_copy_is_doubtful() {
    let dir = tempfile::tempdir().unwrap();
    let (path, copy) = (dir.path().join("l.db"), dir.path().join("copy"));
    for (in_place, copied_in_use) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut log = open(dir.path()).unwrap();
        log.begin_use("a").unwrap();
        commit(&mut log, "one");
        if copied_in_use {
            log.connection().execute("VACUUM INTO ?1", [copy.to_str()]).unwrap();
        }
        log.end_use().unwrap();
        drop(log);
        if !copied_in_use {
            std::fs::copy(&path, &copy).unwrap();
        }

        // A later use of the original makes the copy old.
        let mut log = open(dir.path()).unwrap();
        assert_eq!(log.continuity("a").unwrap(), Continuity::Certain);
        log.begin_use("a").unwrap();
        log.end_use().unwrap();
        drop(log);

        if !in_place {
            std::fs::remove_file(&path).unwrap();
        }
        std::fs::copy(&copy, &path).unwrap();
        std::fs::remove_file(&copy).unwrap();
        for log in ["l.db-wal", "l.db-shm"] {
            let _ = std::fs::remove_file(dir.path().join(log));
        }

        let continuity = open(dir.path()).unwrap().continuity("a").unwrap();
        assert_eq!(continuity, Continuity::Doubtful, "in place {in_place}, copied in use {copied_in_use}");
    }
}

#[test]
fn compressed_groups_are_read_and_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("l.db");
    let text = |n: u32| format!("group {n}, ").repeat(200);
    // The first groups are from before there was compression.
    let mut log = open(dir.path()).unwrap();
    commit(&mut log, &text(1));
    drop(log);
    let older = Connection::open(&path).unwrap();
    older
        .execute_batch("ALTER TABLE log DROP COLUMN size; ALTER TABLE snapshot DROP COLUMN size")
        .unwrap();
    drop(older);

    let options = Options { compress: true, ..Options::default() };
    let mut log = Log::open(&path, options).unwrap();
    commit(&mut log, &text(2));
    log.begin_snapshot();
    commit(&mut log, &text(3));
    snapshot(&mut log, &text(9), true);
    commit(&mut log, &text(4));
    assert_eq!(log.rows().unwrap(), (1..=4).map(|n| (n, 1800)).collect::<Vec<_>>());
    let stored: u64 = log
        .connection()
        .query_row("SELECT sum(length(data)) FROM log WHERE id > 1", [], |row| row.get(0))
        .unwrap();
    assert!(stored < 1000, "{stored} bytes for 5,400");
    drop(log);

    let log = Log::open(&path, options).unwrap();
    assert_eq!(replayed(&log).unwrap(), (vec![text(9)], vec![(3, text(3)), (4, text(4))]));
    assert_eq!((log.snapshot_bytes(), log.replay_bytes()), (1800, 3600));
    for row in [1, 2, 2, 4] {
        let place = Place { row, offset: 9, len: 9 };
        assert_eq!(log.read(place).unwrap(), format!("group {row}, "));
    }

    let thief = Connection::open(&path).unwrap();
    thief.execute("UPDATE log SET size = 1 WHERE id = 4", []).unwrap();
    let error = replayed(&log).unwrap_err().to_string();
    assert!(error.contains("group 4 cannot be decompressed"), "{error}");
}
