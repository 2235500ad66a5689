use super::stream::{EVICT_AFTER, EVICT_EMPTY_AFTER};
use super::*;
use journal::rusqlite::Connection;
use prost::Message;
use std::time::{Duration, Instant};

async fn open(dir: &Path, rules: &Rules) -> Arc<Memory> {
    open_in("a boot", dir, rules).await
}

async fn open_in(boot: &str, dir: &Path, rules: &Rules) -> Arc<Memory> {
    // The previous engine closes its file a moment after its last handle is dropped.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let rules = rules.clone();
        let rules = move |_: &str| Some(rules.clone());
        match Memory::open(dir, boot, Durability::Process, Arc::default(), rules).await {
            Ok(memory) => return memory,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::task::yield_now().await;
    }
}

fn publication(text: &str) -> Publication {
    Publication { data: text.to_string().into(), ..Publication::default() }
}

async fn publish(memory: &Memory, channel: &str, rules: &Rules) -> Position {
    memory.publish(channel, publication("1"), rules, None).await.unwrap()
}

/// The texts and the position of a channel's history.
async fn read(memory: &Memory, channel: &str) -> (Vec<String>, Position) {
    let page = memory.history(channel, &Rules::default(), None).await.unwrap();
    let text = |publication: Publication| String::from_utf8(publication.data.to_vec()).unwrap();
    (page.publications.into_iter().map(text).collect(), page.position)
}

async fn bytes_in_file(memory: &Memory) -> u64 {
    let bytes = |(), _: &Histories, log: &Log| log.snapshot_bytes() + log.replay_bytes();
    memory.journal.run(|_, _| (), bytes).await.unwrap()
}

/// Backdates all publications and the last use of each channel by this much.
fn age(memory: &Memory, by: Duration) {
    let by = by.as_millis() as u64;
    for stream in memory.streams.all() {
        let mut history = stream.history.lock();
        history.touched_ms -= by;
        history.kept.iter_mut().for_each(|kept| kept.at_ms -= by);
    }
}

#[tokio::test]
async fn expired_publications_are_removed_from_memory_and_file() {
    let dir = tempfile::tempdir().unwrap();
    let rules = Rules { history_ttl: Duration::from_secs(60), ..Rules::default() };
    let memory = open(dir.path(), &rules).await;
    let large = publication(&"x".repeat(100_000));
    for _ in 0..30 {
        memory.publish("a", large.clone(), &rules, None).await.unwrap();
    }
    let kept = publish(&memory, "b", &rules).await;
    assert!(bytes_in_file(&memory).await > 3_000_000);

    age(&memory, Duration::from_secs(61));
    memory.tidy().await;
    assert!(read(&memory, "a").await.0.is_empty());
    assert!(bytes_in_file(&memory).await < 10_000, "the file was rewritten without the expired publications");

    drop(memory);
    let memory = open(dir.path(), &rules).await;
    let (texts, position) = read(&memory, "a").await;
    assert_eq!((texts.len(), position.offset), (0, 30), "the position stays");
    assert_eq!(read(&memory, "b").await.1, kept);

    drop(memory);
    let memory = open(dir.path(), &Rules { history_ttl: Duration::ZERO, ..rules.clone() }).await;
    assert_eq!(read(&memory, "b").await, (vec![], kept), "a restart drops what has expired");
}

#[tokio::test]
async fn power_cut_begins_new_epochs_and_a_killed_process_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let rules = Rules::default();
    let memory = open_in("first", dir.path(), &rules).await;
    let first = publish(&memory, "a", &rules).await;
    drop(memory);

    let memory = open_in("first", dir.path(), &rules).await;
    let after_a_kill = publish(&memory, "a", &rules).await;
    assert_eq!(after_a_kill, Position { offset: 2, epoch: first.epoch.clone() });
    drop(memory);

    let memory = open_in("second", dir.path(), &rules).await;
    let (texts, position) = read(&memory, "a").await;
    assert_ne!(position.epoch, first.epoch, "a power cut may have lost acknowledged publications");
    assert_eq!((position.offset, texts.len()), (2, 2), "the stored publications stay");
    assert_eq!(publish(&memory, "a", &rules).await.offset, 3);

    memory.close().await.unwrap();
    let late = memory.publish("a", Publication::default(), &rules, None).await;
    assert!(late.is_err(), "a closed engine acknowledges nothing");
    drop(memory);

    let memory = open_in("third", dir.path(), &rules).await;
    let after_a_reboot = read(&memory, "a").await;
    assert_eq!(after_a_reboot.1, Position { offset: 3, epoch: position.epoch });
    assert_eq!(after_a_reboot.0.len(), 3);
}

#[tokio::test]
async fn unused_channels_are_evicted() {
    let dir = tempfile::tempdir().unwrap();
    let rules = Rules::default();
    let memory = open(dir.path(), &rules).await;
    for n in 0..1000 {
        memory.history(&format!("asked for {n}"), &rules, None).await.unwrap();
    }
    let first = publish(&memory, "used", &rules).await;

    age(&memory, EVICT_EMPTY_AFTER);
    memory.tidy().await;
    assert_eq!(memory.streams.all().len(), 1);

    age(&memory, EVICT_AFTER);
    memory.tidy().await;
    assert!(memory.streams.all().is_empty());

    // The channel begins a new epoch between its eviction and the record of it.
    let second = publish(&memory, "used", &rules).await;
    assert_ne!(first.epoch, second.epoch);
    let remove = move |histories: &mut Histories, group: &mut Vec<u8>| {
        histories.remove(group, "used".into(), first.epoch);
    };
    memory.journal.run(remove, |(), _, _| ()).await.unwrap();

    age(&memory, EVICT_AFTER);
    publish(&memory, "gone", &rules).await;
    drop(memory);
    let memory = open(dir.path(), &rules).await;
    assert_eq!(read(&memory, "used").await.1, second, "the publication of the new epoch stays");

    age(&memory, EVICT_AFTER);
    memory.tidy().await;
    drop(memory);
    assert!(open(dir.path(), &rules).await.streams.all().is_empty(), "an eviction outlives a restart");
}

#[tokio::test]
async fn histories_and_keys_survive_snapshots_and_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let rules = Rules { history_size: 5, ..Rules::default() };
    let mut memory = open(dir.path(), &rules).await;
    let filling = "x".repeat(200_000);
    let mut offset = 0;
    for round in 0..4 {
        let quiet = format!("quiet {round}");
        let first = memory
            .publish(&quiet, publication(&quiet), &rules, Some("k".into()))
            .await;
        let first = first.unwrap();
        for _ in 0..100 {
            let large = publication(&format!("{offset}{filling}"));
            memory.publish("busy", large, &rules, None).await.unwrap();
            offset += 1;
        }
        let bytes = bytes_in_file(&memory).await;
        assert!(bytes < 40 << 20, "snapshots keep the log short: {bytes} bytes in round {round}");

        drop(memory);
        memory = open(dir.path(), &rules).await;
        let (texts, position) = read(&memory, "busy").await;
        let expected: Vec<String> = (offset - 5..offset).map(|n| format!("{n}{filling}")).collect();
        assert!(texts == expected, "round {round}: {} publications", texts.len());
        assert_eq!(position.offset, offset);

        for round in 0..=round {
            let quiet = format!("quiet {round}");
            assert_eq!(read(&memory, &quiet).await.0, [quiet]);
        }
        let again = memory
            .publish(&quiet, publication("other"), &rules, Some("k".into()))
            .await;
        assert_eq!(again.unwrap(), first, "the idempotency key is still known");
    }
}

/// Concurrent publishers of one channel share commits, and the channel keeps its order.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn publications_of_a_busy_channel_keep_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let rules = Rules { history_size: 10_000, ..Rules::default() };
    let memory = open(dir.path(), &rules).await;
    let mut tasks = Vec::new();
    for task in 0..100 {
        let (memory, rules) = (memory.clone(), rules.clone());
        tasks.push(tokio::spawn(async move {
            let mut offsets = Vec::new();
            for n in 0..20 {
                let text = publication(&format!("{task}-{n}"));
                offsets.push(memory.publish("busy", text, &rules, None).await.unwrap().offset);
            }
            assert!(offsets.is_sorted());
            offsets
        }));
    }
    let mut offsets = Vec::new();
    for task in tasks {
        offsets.extend(task.await.unwrap());
    }
    offsets.sort_unstable();
    assert_eq!(offsets, (1..=2000).collect::<Vec<u64>>());

    let (before, _) = read(&memory, "busy").await;
    drop(memory);
    let memory = open(dir.path(), &rules).await;
    assert!(read(&memory, "busy").await.0 == before, "a restart changed the order");
}

#[tokio::test]
async fn publication_of_a_publisher_that_left_is_delivered() {
    let dir = tempfile::tempdir().unwrap();
    let rules = Rules::default();
    let memory = open(dir.path(), &rules).await;
    for _ in 0..200 {
        let delivered = memory.hub.probe("$ready:n");
        let mut publishing = Box::pin(memory.publish("$ready:n", publication("1"), &rules, None));
        // Polled once: the publication is queued, and its publisher leaves before the commit or just after it.
        let _ = futures_util::poll!(&mut publishing);
        drop(publishing);
        let waited = tokio::time::timeout(Duration::from_secs(20), delivered).await;
        waited.expect("the publication was stored but not delivered").unwrap();
    }
    assert_eq!(read(&memory, "$ready:n").await.1.offset, 200);
}

#[tokio::test]
async fn refused_publications_are_not_visible_and_acknowledged_ones_stay() {
    let dir = tempfile::tempdir().unwrap();
    let rules = Rules::default();
    let memory = open(dir.path(), &rules).await;
    let acknowledged = publish(&memory, "a", &rules).await;
    let limit = |(), _: &Histories, log: &Log| log.connection().execute_batch("PRAGMA max_page_count = 1");
    memory.journal.run(|_, _| (), limit).await.unwrap().unwrap();

    let large = publication(&"x".repeat(1_000_000));
    let refused = memory.publish("a", large, &rules, None).await.unwrap_err();
    assert!(refused.to_string().contains("full"), "{refused}");
    assert!(memory.publish("a", publication("2"), &rules, None).await.is_err(), "refused until it is reopened");
    assert_eq!(read(&memory, "a").await, (vec!["1".into()], acknowledged.clone()));

    // The limit belongs to the connection, so the reopened log has none.
    let stored = Mutex::new(None);
    testkit::eventually(Duration::from_secs(20), || async {
        let published = memory.publish("a", publication("3"), &rules, None).await;
        *stored.lock() = published.ok();
        stored.lock().is_some()
    })
    .await;
    let offset = stored.lock().take().map(|position| position.offset);
    assert_eq!(offset, Some(2), "the refused publications used no offset");
    drop(memory);
    let memory = open(dir.path(), &rules).await;
    assert_eq!(read(&memory, "a").await, (vec!["1".into(), "3".into()], Position { offset: 2, ..acknowledged }));
}

/// A file of the previous version. It also has channels with a publication that cannot be read.
fn older(dir: &Path) {
    let db = Connection::open(dir.join("channels.db")).unwrap();
    db.execute_batch(
        "CREATE TABLE channels (channel TEXT PRIMARY KEY, epoch TEXT NOT NULL, offset INTEGER NOT NULL) WITHOUT ROWID;
         CREATE TABLE publications (channel TEXT NOT NULL, offset INTEGER NOT NULL, data BLOB NOT NULL,
             at_ms INTEGER NOT NULL, key TEXT, PRIMARY KEY (channel, offset)) WITHOUT ROWID;
         INSERT INTO channels VALUES ('whole', 'e1', 7), ('holed', 'e2', 4), ('cut', 'e3', 3), ('empty', 'e4', 9);",
    )
    .unwrap();

    let mut insert = db
        .prepare("INSERT INTO publications VALUES (?1, ?2, ?3, strftime('%s') * 1000, 'k' || ?2)")
        .unwrap();
    let readable = publication("x").encode_to_vec();
    for (channel, offset) in [
        ("whole", 5),
        ("whole", 6),
        ("whole", 7),
        ("holed", 1),
        ("holed", 3),
        ("holed", 4),
        ("cut", 1),
        ("cut", 2),
    ] {
        insert.execute((channel, offset, &readable)).unwrap();
    }
    for (channel, offset) in [("holed", 2), ("cut", 3)] {
        insert.execute((channel, offset, b"\xff")).unwrap();
    }
}

#[tokio::test]
async fn older_format_is_migrated_and_a_hole_ends_the_history_before_it() {
    let dir = tempfile::tempdir().unwrap();
    older(dir.path());
    let rules = Rules::default();
    let mut epochs = Vec::new();
    for _ in 0..2 {
        let memory = open(dir.path(), &rules).await;
        let offsets = async |channel: &str| {
            let page = memory.history(channel, &rules, None).await.unwrap();
            let offsets: Vec<u64> = page.publications.iter().map(|one| one.offset).collect();
            (offsets, page.position.offset)
        };
        assert_eq!(offsets("whole").await, (vec![5, 6, 7], 7));
        assert_eq!(offsets("holed").await, (vec![3, 4], 4), "publication 1 is followed by a hole");
        assert_eq!(offsets("cut").await, (vec![], 3), "the newest publication cannot be read");
        assert_eq!(offsets("empty").await, (vec![], 9));

        let known = memory
            .publish("whole", publication("y"), &rules, Some("k6".into()))
            .await
            .unwrap();
        assert_eq!(known.offset, 6);
        epochs.push(known.epoch);
    }
    assert_eq!(epochs[0], epochs[1]);
}
