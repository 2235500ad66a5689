//! The wall clock jumps by an hour, as when an operator corrects it: nothing is lost, delivered twice or kept forever.

use super::*;

const NOON: u64 = 1_700_000_000_000;
const HOUR_MS: u64 = 3_600_000;
const MINUTE_MS: u64 = 60_000;
/// The times that the clock shows after a jump at noon.
const JUMPS: [u64; 2] = [NOON - HOUR_MS, NOON + HOUR_MS];

fn declared() -> (State, Group) {
    let (mut state, mut group) = (State::default(), Group::new(1));
    declare(&mut state, &mut group);
    (state, group)
}

fn append(state: &mut State, group: &mut Group, stream: &str, id: &str, now: u64) -> Appended {
    let message = Message { subject: format!("{stream}.a").into(), ..Message::default() };
    let new = NewMessage::new(&message, Some(id));
    state.append(group, stream, &new, now).unwrap()
}

fn put(state: &mut State, group: &mut Group, key: &str, now: u64) {
    let put = Put {
        bucket: "B".into(),
        key: key.into(),
        value: "v".into(),
        expected: None,
        done: None,
    };
    state.write(group, &[Step::Put(put)], now, 0).unwrap();
}

#[test]
fn message_ids_are_remembered_for_the_window_that_the_clock_shows() {
    for jumped in JUMPS {
        let (mut state, mut group) = declared();
        append(&mut state, &mut group, "work", "before", NOON);
        append(&mut state, &mut group, "work", "after", jumped);
        for id in ["before", "after"] {
            assert!(append(&mut state, &mut group, "work", id, jumped).duplicate, "{id}, {jumped}");
        }
        while state.prune(&mut group, jumped) {}
        assert!(append(&mut state, &mut group, "work", "after", jumped + 59 * MINUTE_MS).duplicate);

        // An id from the future is not kept forever, and keeps no other.
        let later = NOON.max(jumped) + HOUR_MS + 1;
        while state.prune(&mut group, later) {}
        assert_eq!(state.streams["work"].seen.from(0).count(), 0, "{jumped}");
    }
}

#[test]
fn deliveries_and_ack_waits_follow_the_monotonic_clock() {
    for jumped in JUMPS {
        let (mut state, mut group) = declared();
        let worker = consumer("work", "w", None);
        let claim = |state: &mut State, group: &mut Group, clock: u64| -> Vec<(u64, u32)> {
            let (claimed, _) = state.claim(group, &worker, 10, clock).unwrap();
            claimed
                .iter()
                .map(|claimed| (claimed.sequence, claimed.delivered))
                .collect()
        };
        append(&mut state, &mut group, "work", "a", NOON);
        assert_eq!(claim(&mut state, &mut group, 1000), [(1, 1)]);

        append(&mut state, &mut group, "work", "b", jumped);
        while state.prune(&mut group, jumped) {}
        assert_eq!(claim(&mut state, &mut group, 30_999), [(2, 1)], "the first is not due");
        assert_eq!(claim(&mut state, &mut group, 31_000), [(1, 2)]);
        assert_eq!(claim(&mut state, &mut group, 60_999), [(2, 2)]);
    }
}

#[test]
fn unread_messages_outlive_every_jump() {
    for jumped in JUMPS {
        let (mut state, mut group) = declared();
        for stream in ["work", "both"] {
            append(&mut state, &mut group, stream, "a", NOON);
            append(&mut state, &mut group, stream, "b", jumped);
        }
        for now in [jumped, NOON, jumped + 100 * HOUR_MS] {
            while state.prune(&mut group, now) {}
            assert_eq!(state.info("work").unwrap().messages, 2, "{jumped}");
            assert_eq!(state.info("both").unwrap().messages, 2, "{jumped}");
        }
    }
}

#[test]
fn entries_and_messages_with_an_age_expire_once_the_clock_shows_it() {
    for jumped in JUMPS {
        let (mut state, mut group) = declared();
        put(&mut state, &mut group, "before", NOON);
        put(&mut state, &mut group, "after", jumped);
        append(&mut state, &mut group, "log", "a", NOON);
        append(&mut state, &mut group, "log", "b", jumped);
        let has = |state: &State, key: &str, now| state.kv_get("B", key, now).unwrap().is_some();
        for key in ["before", "after"] {
            assert!(has(&state, key, jumped), "{key}, {jumped}");
        }
        while state.prune(&mut group, jumped) {}
        assert_eq!(state.info("log").unwrap().messages, 2, "{jumped}");

        let later = NOON.max(jumped) + HOUR_MS + 1;
        while state.prune(&mut group, later) {}
        assert!(state.buckets["B"].entries.is_empty(), "{jumped}");
        assert_eq!(state.info("log").unwrap().messages, 0, "{jumped}");
    }
}

/// A revision counts writes, not time.
#[test]
fn revisions_and_sequences_grow_through_every_jump() {
    for jumped in JUMPS {
        let (mut state, mut group) = declared();
        put(&mut state, &mut group, "k", NOON);
        let (_, first) = state.kv_get("B", "k", NOON).unwrap().unwrap();
        put(&mut state, &mut group, "k", jumped);
        let (_, second) = state.kv_get("B", "k", jumped).unwrap().unwrap();
        assert!(second > first, "{jumped}");

        let sequences = ["a", "b"].map(|id| append(&mut state, &mut group, "work", id, jumped).sequence);
        assert_eq!(sequences, [1, 2]);
    }
}
