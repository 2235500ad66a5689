//! Durable streams: appending, deduplication, retention.

use crate::{SOON, consumer, message, soon, stream, text};
use bus::{Bus, Error, Retention, StreamConfig};
use std::time::Duration;
use testkit::eventually;

pub async fn append_without_stream_is_refused(bus: Bus) {
    let appended = soon(bus.append(message("nowhere", "x"), None)).await;
    assert!(matches!(appended, Err(Error::NoStream(_))), "{appended:?}");

    // A live subscriber of the subject must not hide that there is no stream.
    let _live = bus.subscribe("nowhere", None, 4).await.unwrap();
    let appended = soon(bus.append(message("nowhere", "x"), None)).await;
    assert!(matches!(appended, Err(Error::NoStream(_))), "{appended:?}");

    assert!(matches!(bus.stream_info("S").await, Err(Error::NoStream(_))));
    assert!(matches!(bus.consume(consumer("c")).await.err(), Some(Error::NoStream(_))));
}

pub async fn repeated_message_id_is_stored_once(bus: Bus) {
    bus.declare_stream(stream(Retention::Limits)).await.unwrap();
    let first = bus.append(message("s.a", "1"), Some("id")).await.unwrap();
    let again = bus.append(message("s.a", "1"), Some("id")).await.unwrap();
    let other = bus.append(message("s.a", "2"), Some("other id")).await.unwrap();

    assert_eq!((first.sequence, first.duplicate), (1, false));
    assert_eq!((again.sequence, again.duplicate), (1, true));
    assert_eq!((other.sequence, other.duplicate), (2, false));
    assert_eq!(bus.stream_info("S").await.unwrap().messages, 2);
}

pub async fn live_subscribers_receive_appended_messages(bus: Bus) {
    bus.declare_stream(stream(Retention::Limits)).await.unwrap();
    let mut live = bus.subscribe("s.*", None, 4).await.unwrap();
    bus.append(message("s.a", "1"), Some("id")).await.unwrap();
    bus.append(message("s.a", "2"), None).await.unwrap();

    assert_eq!(text(&soon(live.next()).await.unwrap()), "1");
    assert_eq!(text(&soon(live.next()).await.unwrap()), "2");
}

pub async fn redeclaring_a_stream_updates_it(bus: Bus) {
    bus.declare_stream(stream(Retention::Limits)).await.unwrap();
    bus.append(message("s.a", "1"), None).await.unwrap();
    bus.declare_stream(stream(Retention::Limits)).await.unwrap();

    let wider = StreamConfig {
        subjects: vec!["s.>".into(), "t".into()],
        max_age: Some(Duration::from_secs(30)),
        ..stream(Retention::Limits)
    };
    bus.declare_stream(wider).await.unwrap();
    assert_eq!(bus.append(message("t", "2"), None).await.unwrap().sequence, 2);
    assert_eq!(bus.stream_info("S").await.unwrap().messages, 2);
}

pub async fn redeclaring_a_stream_keeps_its_other_subjects(bus: Bus) {
    let with = |subjects: &[&str]| StreamConfig {
        subjects: subjects.iter().map(ToString::to_string).collect(),
        ..stream(Retention::WorkQueue)
    };
    bus.declare_stream(with(&["s.a"])).await.unwrap();
    bus.declare_stream(with(&["s.a", "s.a.one"])).await.unwrap();
    bus.declare_stream(with(&["s.a", "s.a.two"])).await.unwrap();
    for subject in ["s.a", "s.a.one", "s.a.two"] {
        bus.append(message(subject, "x"), None).await.unwrap();
    }

    // A pattern replaces the subjects that it covers.
    bus.declare_stream(with(&["s.a.*", "s.a"])).await.unwrap();
    for subject in ["s.a", "s.a.one", "s.a.three"] {
        bus.append(message(subject, "x"), None).await.unwrap();
    }
    assert_eq!(bus.stream_info("S").await.unwrap().messages, 6);
}

pub async fn overlapping_streams_are_refused(bus: Bus) {
    bus.declare_stream(stream(Retention::Limits)).await.unwrap();
    let other = StreamConfig {
        name: "O",
        subjects: vec!["o".into(), "*.a".into()],
        ..stream(Retention::Limits)
    };
    let refused = bus.declare_stream(other.clone()).await.unwrap_err();
    assert!(refused.to_string().contains("overlap"), "{refused}");
    bus.declare_stream(StreamConfig { subjects: vec!["o".into()], ..other })
        .await
        .unwrap();
}

pub async fn work_queue_deletes_settled_messages(bus: Bus) {
    settle_two(&bus, Retention::WorkQueue, 1).await;
}

pub async fn full_work_queue_refuses_and_full_limits_stream_drops_oldest(bus: Bus) {
    let small = |retention| StreamConfig { max_bytes: 4096, ..stream(retention) };
    bus.declare_stream(small(Retention::WorkQueue)).await.unwrap();
    let text = "x".repeat(1000);

    let mut stored = Vec::new();
    let refused = loop {
        match bus.append(message("s.a", &text), None).await {
            Ok(appended) => stored.push(appended.sequence),
            Err(error) => break error,
        }
        assert!(stored.len() <= 4, "the stream must refuse a fifth message");
    };
    assert!(matches!(refused, Error::Full(_)), "{refused}");
    assert_eq!(bus.stream_info("S").await.unwrap().messages, stored.len() as u64, "a work queue drops nothing");

    // Acknowledgements make room again.
    let mut consumer = bus.consume(consumer("c")).await.unwrap();
    for sequence in &stored {
        let delivery = soon(consumer.next()).await.unwrap();
        assert_eq!(delivery.sequence, *sequence);
        delivery.ack().await.unwrap();
    }
    bus.append(message("s.a", &text), None).await.unwrap();

    let logs = StreamConfig { name: "L", subjects: vec!["l".into()], ..small(Retention::Limits) };
    bus.declare_stream(logs).await.unwrap();
    for _ in 0..10 {
        bus.append(message("l", &text), None).await.unwrap();
    }
    eventually(SOON, || async { bus.stream_info("L").await.unwrap().bytes <= 4096 }).await;
    assert!(bus.stream_info("L").await.unwrap().messages > 0);
}

pub async fn limits_stream_keeps_settled_messages(bus: Bus) {
    settle_two(&bus, Retention::Limits, 3).await;
}

/// Appends three messages, acknowledges one, terminates one and holds one; `left` messages must remain in the stream.
async fn settle_two(bus: &Bus, retention: Retention, left: u64) {
    bus.declare_stream(stream(retention)).await.unwrap();
    let mut consumer = bus.consume(consumer("c")).await.unwrap();
    for n in 0..3 {
        bus.append(message("s.a", &n.to_string()), None).await.unwrap();
    }

    soon(consumer.next()).await.unwrap().ack().await.unwrap();
    soon(consumer.next()).await.unwrap().term().await.unwrap();
    let _held = soon(consumer.next()).await.unwrap();

    eventually(SOON, || async {
        let info = bus.stream_info("S").await.unwrap();
        info.messages == left && info.consumers == [("c".to_string(), 1)]
    })
    .await;
}

pub async fn seen_message_id_is_known_and_nothing_is_stored(bus: Bus) {
    bus.declare_stream(stream(Retention::Limits)).await.unwrap();
    let mut live = bus.subscribe("s.>", None, 16).await.unwrap();
    assert!(!bus.seen("S", "id").await.unwrap());
    bus.append(message("s.a", "x"), Some("id")).await.unwrap();
    assert_eq!(text(&soon(live.next()).await.unwrap()), "x");

    for _ in 0..2 {
        assert!(bus.seen("S", "id").await.unwrap());
        assert!(!bus.seen("S", "another id").await.unwrap());
    }
    // To ask is not to append: the same id can still be stored once.
    assert!(
        !bus.append(message("s.a", "y"), Some("another id"))
            .await
            .unwrap()
            .duplicate
    );
    assert_eq!(text(&soon(live.next()).await.unwrap()), "y", "live subscribers see no question");
    assert_eq!(bus.stream_info("S").await.unwrap().messages, 2);

    // A declaration by a process that has never asked changes nothing.
    bus.declare_stream(stream(Retention::Limits)).await.unwrap();
    assert!(bus.seen("S", "another id").await.unwrap());
    assert!(matches!(bus.seen("NONE", "id").await, Err(Error::NoStream(_))));
}

pub async fn time_is_that_of_the_clock_that_stamps_messages(bus: Bus) {
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    let before = bus.time_ms("S").await.unwrap();
    bus.append(message("s.a", "x"), None).await.unwrap();
    let after = bus.time_ms("S").await.unwrap();

    let mut reader = bus.consume(consumer("c")).await.unwrap();
    let stored = soon(reader.next()).await.unwrap().stored_ms;
    assert!((before..=after).contains(&stored), "{before} {stored} {after}");
}
