//! Compares the state with the one that is recovered from the log, over random operations with snapshots, maintenance
//! and crashes.

mod clocks;
mod memory;

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

const HOUR: Duration = Duration::from_secs(3600);

fn stream(name: &'static str, retention: Retention) -> StreamConfig {
    StreamConfig {
        max_age: (retention == Retention::Limits).then_some(HOUR),
        max_bytes: 4_000,
        ..StreamConfig::new(name, vec![format!("{name}.>")], retention)
    }
}

fn consumer(stream: &'static str, name: &str, filter: Option<&str>) -> ConsumerConfig {
    ConsumerConfig {
        stream,
        name: name.into(),
        filter: filter.map(String::from),
        ack_wait: Duration::from_secs(30),
        max_ack_pending: 10,
        max_in_hand: 10,
        from_start: true,
    }
}

/// A log in memory: everything that survives a crash.
#[derive(Default, Clone)]
struct Disk {
    groups: BTreeMap<u64, Bytes>,
    parts: Vec<Bytes>,
    since: u64,
    last: u64,
    open: Option<(u64, Vec<Bytes>, Cursor)>,
}

impl Disk {
    /// Commits as the engine does: with a snapshot part, the deletion of dead rows and a compaction.
    fn commit(&mut self, state: &mut State, mut group: Group) {
        state.flush_cursors(&mut group);
        if let Some(row) = state.row_to_compact(self.since, 0) {
            let data = self.groups[&row].clone();
            crate::local::record::each(row, &data, |kind, place| {
                if let Some(place) = place {
                    state.relocate(&mut group, kind, place, &value(&data, place));
                }
                Ok(())
            })
            .unwrap();
        }

        for row in state.take_dead_rows(self.since, 3) {
            self.groups.remove(&row);
        }
        if group.is_empty() {
            return;
        }

        self.last += 1;
        let bytes = group.into_bytes();
        state.row_added(self.last, bytes.len() as u64);
        self.groups.insert(self.last, bytes);

        if let Some((since, mut parts, cursor)) = self.open.take() {
            let (part, cursor) = state.snapshot_part(cursor, 200);
            parts.push(part);
            if cursor == Cursor::Done {
                (self.since, self.parts) = (since, parts);
            } else {
                self.open = Some((since, parts, cursor));
            }
        }
    }

    fn recover(&self) -> State {
        let mut state = State::default();
        self.parts.iter().for_each(|part| state.apply(0, part).unwrap());
        for (row, group) in self.groups.range(self.since + 1..) {
            state.apply(*row, group).unwrap();
        }
        let rows: Vec<_> = self
            .groups
            .iter()
            .map(|(row, group)| (*row, group.len() as u64))
            .collect();
        state.finish_replay(&rows).unwrap();
        state
    }
}

fn value(group: &Bytes, place: Place) -> Bytes {
    group.slice(place.offset as usize..(place.offset + place.len) as usize)
}

/// Everything that users of the bus can observe of a state.
fn seen_by_users(state: &State, disk: &Disk, now: u64) -> impl PartialEq + std::fmt::Debug + use<> {
    let read = |place: Place| value(&disk.groups[&place.row], place);
    let mut streams = Vec::new();

    for (name, stream) in &state.streams {
        let messages: Vec<_> = stream
            .messages
            .iter()
            .map(|(n, at)| (*n, at.stored_ms, read(at.place)))
            .collect();

        let owed = |consumer: &Consumer| {
            let unread = stream
                .messages
                .range(consumer.next..)
                .filter(|(_, at)| consumer.wants(&at.subject));
            let owed: Vec<u64> = consumer.out().map(|(n, _)| n).chain(unread.map(|(n, _)| *n)).collect();
            assert_eq!(owed.len() as u64, consumer.pending, "pending counts all unsettled messages");
            (consumer.filter.clone(), owed)
        };
        let consumers: Vec<_> = stream
            .consumers
            .iter()
            .map(|(name, consumer)| (name.clone(), owed(consumer)))
            .collect();

        let current = stream
            .seen
            .from(0)
            .filter(|(_, _, _, at_ms)| at_ms + millis(HOUR) >= now);
        let ids: BTreeMap<u128, u64> = current.map(|(_, id, sequence, _)| (id, sequence)).collect();
        streams.push((name.clone(), stream.last, stream.bytes, messages, consumers, ids));
    }

    let mut entries = Vec::new();
    for (name, bucket) in &state.buckets {
        assert_eq!(bucket.entries.len(), bucket.order.len());
        let bytes = bucket.entries.iter().map(|(key, entry)| entry.size(key)).sum::<u64>();
        assert_eq!(bucket.bytes, bytes);
        entries.extend(
            bucket
                .entries
                .iter()
                .map(|(key, e)| (name.clone(), key.clone(), e.revision, read(e.place))),
        );
    }
    entries.sort();
    (streams, entries, state.revision)
}

fn declare(state: &mut State, group: &mut Group) {
    state.declare_stream(group, stream("work", Retention::WorkQueue));
    state.declare_stream(group, stream("log", Retention::Limits));
    state.declare_stream(
        group,
        StreamConfig {
            consumers: vec![consumer("both", "one", Some("both.b")), consumer("both", "two", Some("both.a"))],
            retired: vec!["gone"],
            ..stream("both", Retention::Interest)
        },
    );
    state.declare_bucket(&BucketConfig { name: "B", max_age: Some(HOUR), max_bytes: Some(1500) });
    state.consumer(group, &consumer("work", "w", None)).unwrap();
    state.consumer(group, &consumer("log", "all", None)).unwrap();
    state.consumer(group, &consumer("log", "some", Some("log.a"))).unwrap();
}

/// Writes a batch and checks that it is atomic: it has all of its results, or it fails and changes nothing.
fn write_batch(
    state: &mut State,
    group: &mut Group,
    disk: &Disk,
    consumer: ConsumerConfig,
    which: u8,
    settled: Option<u64>,
    now: u64,
) -> Result<(), TestCaseError> {
    // The group may have the consumer, which was made just before.
    let (before, bytes) = (seen_by_users(state, disk, now), group.len());
    let message = Message { subject: format!("{}.a", consumer.stream).into(), ..Message::default() };
    let mut batch = vec![
        Step::Append { stream: consumer.stream, message: NewMessage::new(&message, None) },
        Step::Put(Put {
            bucket: "B".into(),
            key: (which % 7).to_string(),
            value: "b".into(),
            expected: which.is_multiple_of(3).then_some(0),
            done: [None, Some(false), Some(true)][usize::from(which) % 3],
        }),
    ];
    batch.extend(settled.map(|sequence| Step::Ack { consumer: consumer.into(), sequence }));

    match state.write(group, &batch, now, now) {
        Ok(taken) => prop_assert_eq!(taken.len(), batch.len()),
        Err(_) => {
            prop_assert_eq!(group.len(), bytes);
            prop_assert_eq!(before, seen_by_users(state, disk, now));
        }
    }
    Ok(())
}

/// A crash now would recover what users observe.
fn check_recovery(state: &State, disk: &Disk, now: u64) -> Result<(), TestCaseError> {
    let recovered = disk.recover();
    prop_assert_eq!(seen_by_users(&recovered, disk, now), seen_by_users(state, disk, now));
    prop_assert_eq!(recovered.rows.live_bytes, state.rows.live_bytes);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn crash_after_any_commit_recovers_all_commits(
        steps in proptest::collection::vec((0_u8..14, 0_u8..60, 0_u64..600_000), 1..250),
    ) {
        let (mut disk, mut state, mut now) = (Disk::default(), State::default(), 10_000_000);
        let mut group = Group::new(1);
        declare(&mut state, &mut group);
        disk.commit(&mut state, group);
        let mut taken: HashMap<&str, Vec<u64>> = HashMap::new();

        for (action, which, ms) in steps {
            now += ms;
            let mut group = Group::new(disk.last + 1);
            let consumers = [
                ("work", "w", None),
                ("log", "all", None),
                ("log", "some", Some("log.a")),
                ("both", "one", Some("both.b")),
                ("both", "two", Some("both.a")),
                ("both", "gone", None),
            ];
            // The retired consumer exists from its first use until the next declaration, which is after a crash.
            let of = consumers[usize::from(which) % 6];
            let config = consumer(of.0, of.1, of.2);
            if of.1 == "gone" {
                state.consumer(&mut group, &config).unwrap();
            }
            match action {
                0..=3 => {
                    // Nobody reads the last one in the interest stream, unless the retired consumer exists.
                    let subject = format!("{}.{}", of.0, ["a", "b", "c"][usize::from(which / 6) % 3]);
                    let payload = Bytes::from(vec![which; usize::from(which) * 3]);
                    let message = Message { subject: subject.into(), payload, ..Message::default() };
                    let id = which.to_string();
                    let new = NewMessage::new(&message, (which > 20).then_some(id.as_str()));
                    // Fails if the work queue is full.
                    let _ = state.append(&mut group, of.0, &new, now);
                }
                4 | 5 => {
                    let (claimed, _) = state.claim(&mut group, &config, usize::from(which) % 5 + 1, now).unwrap();
                    taken.entry(of.1).or_default().extend(claimed.iter().map(|claimed| claimed.sequence));
                }
                6 | 7 => {
                    let taken = taken.entry(of.1).or_default();
                    if !taken.is_empty() {
                        let sequence = taken.swap_remove(usize::from(which) % taken.len());
                        let outcome = if which % 4 == 0 { Outcome::Nak(Duration::ZERO) } else { Outcome::Ack };
                        state.settle(&mut group, &config, sequence, outcome, now).unwrap();
                    }
                }
                8 | 9 => {
                    let (key, value) = ((which % 7).to_string(), vec![which; usize::from(which)].into());
                    let put = Put { bucket: "B".into(), key, value, expected: None, done: None };
                    state.write(&mut group, &[Step::Put(put)], now, now).unwrap();
                }
                10 | 11 => {
                    let taken = taken.entry(of.1).or_default();
                    write_batch(&mut state, &mut group, &disk, config, which, taken.pop(), now)?;
                }
                12 => while state.prune(&mut group, now) {},
                _ if disk.open.is_none() => disk.open = Some((disk.last, Vec::new(), Cursor::Start)),
                _ => {
                    // A crash: continue with the state that the disk has. Outstanding deliveries are due at once.
                    state = disk.recover();
                    group = Group::new(disk.last + 1);
                    declare(&mut state, &mut group);
                    disk.open = None;
                }
            }

            disk.commit(&mut state, group);
            // A crash after any commit; a recovery of each takes long, and a wrong one stays wrong.
            if which % 4 == 0 {
                check_recovery(&state, &disk, now)?;
            }
        }
        check_recovery(&state, &disk, now)?;
    }
}

#[test]
fn max_bytes_and_max_age_bound_a_stream_and_its_ids() {
    let mut state = State::default();
    let mut group = Group::new(1);
    declare(&mut state, &mut group);
    let message = Message {
        subject: "log.a".into(),
        payload: vec![b'x'; 100].into(),
        ..Message::default()
    };

    for n in 0..3000 {
        state
            .append(&mut group, "log", &NewMessage::new(&message, Some(&n.to_string())), 1000)
            .unwrap();
    }

    while state.prune(&mut group, 1000) {}
    let info = state.info("log").unwrap();
    assert!(info.bytes <= 4_000 && info.messages > 30, "{info:?}");
    let owed = |name: &str| info.consumers.iter().find(|(known, _)| known == name).unwrap().1;
    assert_eq!((owed("all"), owed("some")), (info.messages, info.messages), "pruned messages are not pending");
    assert!(
        state
            .append(&mut group, "log", &NewMessage::new(&message, Some("0")), 1000)
            .unwrap()
            .duplicate,
        "the id of a pruned message is still remembered"
    );

    let later = 1000 + 2 * 3_600_000;
    while state.prune(&mut group, later) {}
    assert_eq!(state.info("log").unwrap().messages, 0);
    assert!(
        !state
            .append(&mut group, "log", &NewMessage::new(&message, Some("0")), later)
            .unwrap()
            .duplicate
    );
}

#[test]
fn full_work_queue_refuses_appends_and_drops_nothing() {
    let mut state = State::default();
    let mut group = Group::new(1);
    declare(&mut state, &mut group);
    let message = Message {
        subject: "work.a".into(),
        payload: vec![b'x'; 100].into(),
        ..Message::default()
    };

    let stored = (0..100)
        .take_while(|_| {
            state
                .append(&mut group, "work", &NewMessage::new(&message, None), 0)
                .is_ok()
        })
        .count();
    assert!((30..40).contains(&stored), "{stored}");
    assert_eq!(state.info("work").unwrap().messages, stored as u64);
}

#[test]
fn batch_that_overfills_a_work_queue_is_refused_whole() {
    let mut state = State::default();
    let mut group = Group::new(1);
    declare(&mut state, &mut group);
    let append = || {
        let message = Message {
            subject: "work.a".into(),
            payload: vec![b'x'; 1500].into(),
            ..Message::default()
        };
        Step::Append { stream: "work", message: NewMessage::new(&message, None) }
    };

    let refused = state.write(&mut group, &[append(), append(), append()], 0, 0);
    assert!(refused.err().unwrap().to_string().contains("has reached its limit"));
    assert_eq!(state.info("work").unwrap().messages, 0);
    assert_eq!(state.write(&mut group, &[append(), append()], 0, 0).unwrap().len(), 2);
}

#[test]
fn full_bucket_evicts_no_entry_that_is_not_done() {
    let mut state = State::default();
    let mut group = Group::new(1);
    declare(&mut state, &mut group);
    let put = |key: &str, done| {
        Step::Put(Put {
            bucket: "B".into(),
            key: key.into(),
            value: vec![b'x'; 100].into(),
            expected: Some(0),
            done: Some(done),
        })
    };
    let has = |state: &State, key: &str| state.kv_get("B", key, 0).unwrap().is_some();

    // Three entries of 357 bytes fit.
    for (key, done) in [("a", false), ("b", true), ("c", false), ("d", true), ("e", false), ("f", false)] {
        state.write(&mut group, &[put(key, done)], 0, 0).unwrap();
    }
    let kept: Vec<&str> = ["a", "b", "c", "d", "e", "f"]
        .into_iter()
        .filter(|key| has(&state, key))
        .collect();
    assert_eq!(kept, ["a", "c", "e", "f"]);

    // A batch that expects an entry finds it, although the batch itself makes the bucket overflow.
    state.write(&mut group, &[put("g", true)], 0, 0).unwrap();
    assert!(!has(&state, "g"), "an entry that is done has no room beside those that are not");
    let (_, revision) = state.kv_get("B", "a", 0).unwrap().unwrap();
    let change = Put {
        bucket: "B".into(),
        key: "a".into(),
        value: "done".into(),
        expected: Some(revision),
        done: Some(true),
    };
    state
        .write(&mut group, &[put("h", false), Step::Put(change)], 0, 0)
        .unwrap();
    assert!(!has(&state, "a") && has(&state, "h"));
}

#[test]
fn entry_that_is_done_stays_done_when_its_value_changes() {
    let mut state = State::default();
    let mut group = Group::new(1);
    declare(&mut state, &mut group);
    let put = |key: &str, len: usize, done| {
        let value = vec![b'x'; len].into();
        Step::Put(Put { bucket: "B".into(), key: key.into(), value, expected: None, done })
    };
    let has = |state: &State, key: &str| state.kv_get("B", key, 0).unwrap().is_some();

    for (key, done) in [("ended", Some(true)), ("open", Some(false)), ("ended", None), ("open", None)] {
        state.write(&mut group, &[put(key, 100, done)], 0, 0).unwrap();
    }
    state
        .write(&mut group, &[put("large", 1000, Some(false))], 0, 0)
        .unwrap();
    assert!(!has(&state, "ended") && has(&state, "open") && has(&state, "large"));

    // A record that says otherwise is believed.
    state.write(&mut group, &[put("open", 100, Some(true))], 0, 0).unwrap();
    assert!(!has(&state, "open"), "1,500 bytes do not hold both");
}

#[test]
fn consumer_that_this_process_has_opened_is_not_retired() {
    let mut state = State::default();
    let mut group = Group::new(1);
    declare(&mut state, &mut group);
    assert_eq!(state.retire(&mut group, "work", "w").unwrap(), None);
    // This one is only declared.
    assert_eq!(state.retire(&mut group, "both", "one").unwrap(), Some(Some("both.b".into())));
    assert_eq!(state.retire(&mut group, "both", "one").unwrap(), None);
}

#[test]
fn message_ids_are_bounded_in_bytes() {
    let mut state = State::default();
    let mut group = Group::new(1);
    let config = StreamConfig { dedup_bytes: 1000, ..stream("log", Retention::Limits) };
    state.declare_stream(&mut group, config);
    let message = Message { subject: "log.a".into(), ..Message::default() };
    let mut append = |id: u32| {
        let new = NewMessage::new(&message, Some(&id.to_string()));
        state.append(&mut group, "log", &new, 0).unwrap().duplicate
    };

    assert!((0..20).all(|id| !append(id)));
    assert!((10..20).all(&mut append), "the newest ten are remembered");
    assert!(!append(0), "the oldest ones are forgotten");
}
