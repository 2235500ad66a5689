//! What streams and buckets keep, what they delete, and when they refuse.

use crate::{SOON, consumer, message, soon, stream, text};
use bus::{BucketConfig, Bus, Consumer, ConsumerConfig, Error, Fill, Retention, StreamConfig, Write};
use std::time::Duration;
use testkit::eventually;
use wire::subjects;

/// An interest stream that two consumers must read.
fn for_two() -> StreamConfig {
    StreamConfig {
        consumers: vec![consumer("one"), consumer("two")],
        ..stream(Retention::Interest)
    }
}

async fn count(bus: &Bus) -> u64 {
    bus.stream_info("S").await.unwrap().messages
}

async fn ack(consumer: &mut Consumer, payload: &str) {
    let delivery = soon(consumer.next()).await.unwrap();
    assert_eq!(text(&delivery.message), payload);
    delivery.ack().await.unwrap();
}

pub async fn interest_keeps_a_message_until_every_consumer_has_it(bus: Bus) {
    bus.declare_stream(for_two()).await.unwrap();
    for n in ["0", "1", "2"] {
        bus.append(message("s.a", n), None).await.unwrap();
    }

    // Nobody has opened the consumers yet; both exist since the declaration.
    let mut one = bus.consume(consumer("one")).await.unwrap();
    for n in ["0", "1", "2"] {
        ack(&mut one, n).await;
    }
    assert_eq!(count(&bus).await, 3);

    let mut two = bus.consume(consumer("two")).await.unwrap();
    ack(&mut two, "0").await;
    soon(two.next()).await.unwrap().term().await.unwrap();
    let last = soon(two.next()).await.unwrap();
    eventually(SOON, || async { count(&bus).await == 1 }).await;
    last.ack().await.unwrap();
    eventually(SOON, || async { count(&bus).await == 0 }).await;
}

pub async fn interest_without_consumers_stores_nothing(bus: Bus) {
    bus.declare_stream(stream(Retention::Interest)).await.unwrap();
    let first = bus.append(message("s.a", "1"), Some("id")).await.unwrap();
    let again = bus.append(message("s.a", "1"), Some("id")).await.unwrap();
    assert_eq!((first.sequence, first.duplicate, again.duplicate), (1, false, true));
    assert_eq!(count(&bus).await, 0);

    let mut late = bus.consume(consumer("late")).await.unwrap();
    assert_eq!(bus.append(message("s.a", "2"), None).await.unwrap().sequence, 2);
    ack(&mut late, "2").await;
}

pub async fn full_interest_stream_refuses_and_drops_nothing(bus: Bus) {
    let small = StreamConfig { max_bytes: 4096, ..for_two() };
    bus.declare_stream(small).await.unwrap();
    let payload = "x".repeat(1000);
    let mut stored = 0;
    let refused = loop {
        match bus.append(message("s.a", &payload), None).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored <= 4, "the stream must refuse a fifth message");
    };
    assert!(matches!(refused, Error::Full(_)), "{refused}");
    assert_eq!(count(&bus).await, stored);

    // Room comes from what both have acknowledged.
    let mut one = bus.consume(consumer("one")).await.unwrap();
    ack(&mut one, &payload).await;
    assert!(matches!(bus.append(message("s.a", &payload), None).await, Err(Error::Full(_))));
    let mut two = bus.consume(consumer("two")).await.unwrap();
    ack(&mut two, &payload).await;
    eventually(SOON, || async { bus.append(message("s.a", &payload), None).await.is_ok() }).await;
}

/// A provider's consumer and subject, when the provider is gone for good.
pub async fn idle_consumer_is_retired_with_its_subject(bus: Bus) {
    let reads = |name: &str, subject: &str| ConsumerConfig { filter: Some(subject.into()), ..consumer(name) };
    let declared = |subjects: &[&str]| StreamConfig {
        subjects: subjects.iter().map(ToString::to_string).collect(),
        consumers: vec![reads("behind", "s.b"), reads("gone", "s.gone")],
        ..stream(Retention::WorkQueue)
    };
    bus.declare_stream(StreamConfig { consumers: Vec::new(), ..declared(&["s.b"]) })
        .await
        .unwrap();
    bus.add_subjects("S", &["s.gone".into()]).await.unwrap();
    bus.declare_stream(declared(&["s.b"])).await.unwrap();
    bus.append(message("s.b", "unread"), None).await.unwrap();

    for (name, retired) in [("behind", false), ("gone", true), ("gone", false), ("unknown", false)] {
        assert_eq!(bus.retire("S", name).await.unwrap(), retired, "{name}");
    }
    let refused = bus.append(message("s.gone", "1"), None).await;
    assert!(matches!(refused, Err(Error::NoStream(_))), "{refused:?}");
    let info = bus.stream_info("S").await.unwrap();
    assert_eq!((info.messages, info.consumers), (1, vec![("behind".to_string(), 1)]));

    // The provider comes back.
    bus.add_subjects("S", &["s.gone".into()]).await.unwrap();
    let mut back = bus.consume(reads("gone", "s.gone")).await.unwrap();
    bus.append(message("s.gone", "1"), None).await.unwrap();
    ack(&mut back, "1").await;
}

/// The version before kept results by age; what its consumers had acknowledged goes, and the rest stays.
pub async fn limits_stream_becomes_one_of_interest(bus: Bus) {
    bus.declare_stream(stream(Retention::Limits)).await.unwrap();
    let mut one = bus.consume(consumer("one")).await.unwrap();
    for n in ["0", "1", "2", "3"] {
        bus.append(message("s.a", n), None).await.unwrap();
    }
    ack(&mut one, "0").await;
    ack(&mut one, "1").await;

    let declared = StreamConfig { consumers: vec![consumer("one")], ..stream(Retention::Interest) };
    bus.declare_stream(declared).await.unwrap();
    eventually(SOON, || async { count(&bus).await == 2 }).await;
    ack(&mut one, "2").await;
    ack(&mut one, "3").await;
    eventually(SOON, || async { count(&bus).await == 0 }).await;
}

pub async fn retired_consumer_is_deleted_once_nobody_reads_it(bus: Bus) {
    let before = StreamConfig {
        consumers: vec![consumer("one"), consumer("old")],
        ..stream(Retention::Interest)
    };
    bus.declare_stream(before).await.unwrap();
    bus.append(message("s.a", "0"), None).await.unwrap();
    let mut one = bus.consume(consumer("one")).await.unwrap();
    ack(&mut one, "0").await;
    assert_eq!(count(&bus).await, 1, "the other consumer has not read it");

    let after = || StreamConfig {
        consumers: vec![consumer("one")],
        retired: vec!["old"],
        ..stream(Retention::Interest)
    };
    eventually(Duration::from_secs(60), || async {
        bus.declare_stream(after()).await.unwrap();
        count(&bus).await == 0
    })
    .await;
    let names = bus.stream_info("S").await.unwrap().consumers;
    assert_eq!(names, [("one".to_string(), 0)]);

    // A consumer that somebody reads stays.
    let _read = bus.consume(consumer("old")).await.unwrap();
    bus.declare_stream(after()).await.unwrap();
    assert_eq!(bus.stream_info("S").await.unwrap().consumers.len(), 2);
}

pub async fn age_evicts_nothing_from_a_stream_without_a_maximum(bus: Bus) {
    let aging = StreamConfig {
        max_age: Some(Duration::from_millis(500)),
        ..stream(Retention::WorkQueue)
    };
    bus.declare_stream(aging).await.unwrap();
    bus.append(message("s.a", "expires"), None).await.unwrap();
    eventually(Duration::from_secs(30), || async { count(&bus).await == 0 }).await;

    // Over NATS, the server compares in intervals, too: the other stream has had its turn when this one has.
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    bus.append(message("s.a", "stays"), None).await.unwrap();
    let other = StreamConfig {
        name: "O",
        subjects: vec!["o".into()],
        max_age: Some(Duration::from_millis(500)),
        ..stream(Retention::Limits)
    };
    bus.declare_stream(other).await.unwrap();
    bus.append(message("o", "expires"), None).await.unwrap();
    eventually(Duration::from_secs(30), || async { bus.stream_info("O").await.unwrap().messages == 0 }).await;
    assert_eq!(count(&bus).await, 1);
}

pub async fn fills_say_how_full_streams_and_buckets_are(bus: Bus) {
    assert_eq!(bus.fills().await.unwrap(), []);
    bus.declare_stream(StreamConfig { max_bytes: 10_000, ..stream(Retention::Limits) })
        .await
        .unwrap();
    let bucket = BucketConfig { name: "B", max_age: None, max_bytes: Some(20_000) };
    bus.declare_bucket(bucket).await.unwrap();
    bus.declare_kv("F", None).await.unwrap();
    bus.append(message("s.a", &"x".repeat(1000)), None).await.unwrap();
    bus.kv_put("B", "key", "x".repeat(2000).into(), None).await.unwrap();

    let fill = |name: &'static str| {
        let bus = bus.clone();
        async move {
            let fills: Vec<Fill> = bus.fills().await.unwrap();
            assert_eq!(fills.len(), 3);
            fills.into_iter().find(|fill| fill.store == name).unwrap()
        }
    };
    let now = bus::clock::unix_ms();
    for (name, least, max_bytes) in [("S", 1000, 10_000), ("B", 2000, 20_000)] {
        let fill = fill(name).await;
        assert_eq!((fill.messages, fill.max_bytes), (1, Some(max_bytes)), "{fill:?}");
        assert!((least..least + 500).contains(&fill.bytes), "{fill:?}");
        assert!(fill.oldest_ms.unwrap().abs_diff(now) < 60_000, "{fill:?}");
    }
    let empty = fill("F").await;
    assert_eq!((empty.messages, empty.max_bytes, empty.oldest_ms), (0, None, None));

    // The oldest messages are evicted, which the number of the first one shows.
    for _ in 0..30 {
        bus.append(message("s.a", &"x".repeat(1000)), None).await.unwrap();
    }
    eventually(SOON, || async { fill("S").await.bytes <= 10_000 }).await;
    assert!(fill("S").await.first > 20);
}

pub async fn full_bucket_evicts_what_is_done(bus: Bus) {
    bus.declare_bucket(BucketConfig { name: "B", max_age: None, max_bytes: Some(50_000) })
        .await
        .unwrap();
    let put = |key: String, done| Write::Put {
        bucket: "B",
        key,
        value: "x".repeat(1000).into(),
        expected: Some(0),
        done,
    };
    for n in 0..200 {
        bus.write(vec![put(n.to_string(), true)]).await.unwrap();
    }

    let fills = bus.fills().await.unwrap();
    assert!(fills[0].bytes <= 50_000 && fills[0].messages > 10, "{fills:?}");
    assert_eq!(bus.kv_get("B", "0").await.unwrap(), None);
    assert!(bus.kv_get("B", "199").await.unwrap().is_some());
}

pub async fn readable_dead_letters_survive_a_flood_of_unreadable_messages(bus: Bus) {
    bus::streams::declare(&bus).await.unwrap();
    // A flood needs many bytes with the product's sizes, so the stream for it is declared again with few.
    let unreadable = StreamConfig {
        max_bytes: 100_000,
        ..StreamConfig::new(
            subjects::STREAM_UNREADABLE,
            vec![subjects::unreadable(subjects::RESULT)],
            Retention::Limits,
        )
    };
    bus.declare_stream(unreadable).await.unwrap();
    let config = ConsumerConfig {
        stream: subjects::STREAM_RESULT,
        filter: Some(subjects::RESULT.into()),
        ..consumer(bus::streams::ROUTER)
    };
    let mut results = bus.consume(config).await.unwrap();

    bus.append(message(subjects::RESULT, "readable"), None).await.unwrap();
    let delivery = soon(results.next()).await.unwrap();
    bus::dead_letter::bury(&bus, &delivery, "it could not be recorded")
        .await
        .unwrap();
    for _ in 0..60 {
        bus.append(message(subjects::RESULT, &"junk".repeat(1000)), None)
            .await
            .unwrap();
        let delivery = soon(results.next()).await.unwrap();
        bus::dead_letter::bury_unreadable(&bus, &delivery, "it cannot be read")
            .await
            .unwrap();
    }

    let messages = |stream: &'static str| {
        let bus = bus.clone();
        async move { bus.stream_info(stream).await.unwrap() }
    };
    eventually(SOON, || async { messages(subjects::STREAM_UNREADABLE).await.bytes <= 100_000 }).await;
    assert!(messages(subjects::STREAM_UNREADABLE).await.messages > 10);
    assert_eq!(messages(subjects::STREAM_DLQ).await.messages, 1);
    eventually(SOON, || async { messages(subjects::STREAM_RESULT).await.messages == 0 }).await;
}
