//! Batches of writes: [`bus::BusApi::write`].

use crate::{SOON, consumer, message, soon, stream, text};
use bus::{Appended, Bus, Consumer, Delivery, Error, Retention, Write, Written};
use std::time::Duration;
use testkit::eventually;

const HOUR: Duration = Duration::from_secs(3600);

fn append(payload: &str) -> Write<'static> {
    Write::Append { message: message("s.a", payload), msg_id: None }
}

fn put(key: &str, expected: Option<u64>) -> Write<'static> {
    Write::Put {
        bucket: "B",
        key: key.into(),
        value: key.to_string().into(),
        expected,
        done: false,
    }
}

/// A work queue with one message that was delivered, and an empty bucket.
async fn with_delivery(bus: &Bus) -> (Consumer, Delivery) {
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    bus.declare_kv("B", Some(HOUR)).await.unwrap();
    bus.append(message("s.a", "first"), None).await.unwrap();
    let mut consumer = bus.consume(consumer("c")).await.unwrap();
    let delivery = soon(consumer.next()).await.unwrap();
    (consumer, delivery)
}

pub async fn batch_puts_appends_and_acknowledges(bus: Bus) {
    let (mut consumer, delivery) = with_delivery(&bus).await;
    let mut live = bus.subscribe("s.>", None, 8).await.unwrap();

    let writes = vec![put("one", Some(0)), put("two", None), append("second"), Write::Ack(&delivery)];
    let written = bus.write(writes).await.unwrap();
    assert!(matches!(
        written[..],
        [
            Written::Put { .. },
            Written::Put { .. },
            Written::Appended(Appended { sequence: 2, duplicate: false }),
            Written::Acked,
        ]
    ));

    for (index, key) in ["one", "two"].into_iter().enumerate() {
        let (value, revision) = bus.kv_get("B", key).await.unwrap().unwrap();
        assert_eq!((value, Written::Put { revision }), (key.into(), written[index]));
    }
    assert_eq!(text(&soon(live.next()).await.unwrap()), "second");
    let next = soon(consumer.next()).await.unwrap();
    assert_eq!((text(&next.message), next.delivered), ("second", 1));
    eventually(SOON, || async { bus.stream_info("S").await.unwrap().messages == 1 }).await;
}

pub async fn batch_publishes_after_its_writes(bus: Bus) {
    let (_consumer, delivery) = with_delivery(&bus).await;
    let mut live = bus.subscribe("live.*", None, 8).await.unwrap();
    let publish = |payload: &str| Write::Publish { message: message("live.a", payload) };

    let refused = bus.write(vec![put("one", Some(7)), publish("refused")]).await;
    assert!(matches!(refused.unwrap_err().error, Error::WrongRevision(_)));

    let writes = vec![append("second"), publish("stored"), Write::Ack(&delivery)];
    let written = bus.write(writes).await.unwrap();
    assert!(matches!(written[..], [Written::Appended(_), Written::Published, Written::Acked]), "{written:?}");
    assert_eq!(text(&soon(live.next()).await.unwrap()), "stored", "the refused batch publishes nothing");
}

pub async fn failed_step_ends_a_batch(bus: Bus) {
    let (_consumer, delivery) = with_delivery(&bus).await;
    let revision = bus.kv_put("B", "one", "before".into(), None).await.unwrap();

    let writes = vec![put("one", Some(revision + 1)), append("second"), Write::Ack(&delivery)];
    let refused = bus.write(writes).await.unwrap_err();
    assert!(matches!(&refused.error, Error::WrongRevision(key) if key == "one"), "{refused:?}");
    assert_eq!(refused.written, []);

    let info = bus.stream_info("S").await.unwrap();
    assert_eq!(
        (info.messages, info.consumers),
        (1, vec![("c".to_string(), 1)]),
        "neither appended nor acknowledged"
    );
    bus.write(vec![put("one", Some(revision)), append("second"), Write::Ack(&delivery)])
        .await
        .unwrap();
}

pub async fn duplicate_append_does_not_fail_a_batch(bus: Bus) {
    let (_consumer, delivery) = with_delivery(&bus).await;
    let again = || Write::Append { message: message("s.a", "second"), msg_id: Some("id") };
    for duplicate in [false, true] {
        let written = bus.write(vec![again(), put("one", None)]).await.unwrap();
        assert_eq!(written[0], Written::Appended(Appended { sequence: 2, duplicate }));
    }
    bus.write(vec![again(), Write::Ack(&delivery)]).await.unwrap();
    eventually(SOON, || async { bus.stream_info("S").await.unwrap().messages == 1 }).await;
}

pub async fn large_message_refuses_a_batch(bus: Bus) {
    let (_consumer, delivery) = with_delivery(&bus).await;
    let large = message("s.a", &"x".repeat(wire::limits::BUS_MESSAGE_MAX + 1));
    let writes = vec![put("one", None), Write::Append { message: large, msg_id: Some("id") }, Write::Ack(&delivery)];
    assert!(matches!(bus.write(writes).await.unwrap_err().error, Error::TooLarge { .. }));
    assert_eq!(bus.kv_get("B", "one").await.unwrap(), None, "a write before the large one was made");
}
