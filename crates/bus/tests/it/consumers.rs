//! Durable consumers: delivery, redelivery and sharing.

use crate::{QUIET, SOON, consumer, message, soon, stream, text};
use bus::{Bus, Consumer, ConsumerConfig, Delivery, Headers, Message, Retention};
use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::time::timeout;

async fn next(consumer: &mut Consumer) -> Delivery {
    soon(consumer.next()).await.expect("the bus is open")
}

async fn with_stream(bus: &Bus, retention: Retention, messages: usize) {
    bus.declare_stream(stream(retention)).await.unwrap();
    for n in 0..messages {
        bus.append(message("s.a", &n.to_string()), None).await.unwrap();
    }
}

pub async fn delivery_carries_the_appended_message(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 0).await;
    let headers = Headers::new().with("trace_id", "t");
    let sent = Message { headers, ..message("s.a.b", "{}") };
    let appended = bus.append(sent, Some("id")).await.unwrap();

    let mut consumer = bus.consume(consumer("c")).await.unwrap();
    let delivery = next(&mut consumer).await;
    assert_eq!((&*delivery.message.subject, text(&delivery.message)), ("s.a.b", "{}"));
    assert_eq!(delivery.message.headers.get("Trace_Id"), Some("t"));
    assert_eq!(delivery.message.reply, None);
    assert_eq!((delivery.sequence, delivery.delivered), (appended.sequence, 1));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    assert!(now.abs_diff(delivery.stored_ms) < 60_000);
    delivery.ack().await.unwrap();
}

pub async fn unsettled_message_is_redelivered(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 1).await;
    let short_wait = ConsumerConfig { ack_wait: Duration::from_millis(300), ..consumer("c") };
    let mut consumer = bus.consume(short_wait).await.unwrap();
    for delivered in 1..=3 {
        let delivery = next(&mut consumer).await;
        assert_eq!((delivery.delivered, delivery.sequence), (delivered, 1));
        if delivered == 3 {
            delivery.ack().await.unwrap();
        }
    }
    assert!(timeout(3 * QUIET, consumer.next()).await.is_err(), "an acknowledged message is not redelivered");
}

pub async fn nak_redelivers_after_its_delay(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 1).await;
    let mut consumer = bus.consume(consumer("c")).await.unwrap();

    let delay = Duration::from_millis(400);
    let refused = Instant::now();
    next(&mut consumer).await.nak(delay).await.unwrap();
    let again = next(&mut consumer).await;
    assert!(refused.elapsed() >= delay, "redelivered after {:?}", refused.elapsed());
    assert_eq!(again.delivered, 2);

    again.nak(Duration::ZERO).await.unwrap();
    let again = next(&mut consumer).await;
    assert_eq!(again.delivered, 3);
    again.ack().await.unwrap();
}

pub async fn progress_postpones_redelivery(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 1).await;
    let short_wait = ConsumerConfig { ack_wait: 3 * QUIET, ..consumer("c") };
    let mut consumer = bus.consume(short_wait).await.unwrap();
    let delivery = next(&mut consumer).await;
    for _ in 0..6 {
        delivery.in_progress().await.unwrap();
        assert!(timeout(QUIET, consumer.next()).await.is_err(), "work in progress is not redelivered");
    }
    assert_eq!(next(&mut consumer).await.delivered, 2, "redelivered once progress reports stop");
}

pub async fn terminated_message_is_not_redelivered(bus: Bus) {
    with_stream(&bus, Retention::Limits, 1).await;
    let short_wait = ConsumerConfig { ack_wait: QUIET, ..consumer("c") };
    let mut consumer = bus.consume(short_wait).await.unwrap();
    next(&mut consumer).await.term().await.unwrap();
    assert!(timeout(4 * QUIET, consumer.next()).await.is_err());
}

pub async fn consumers_with_one_name_share_messages(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 0).await;
    let sharing = ConsumerConfig { ack_wait: Duration::from_secs(3), ..consumer("c") };
    let mut first = bus.consume(sharing.clone()).await.unwrap();
    let mut second = bus.consume(sharing).await.unwrap();
    for n in 0..200 {
        bus.append(message("s.a", &n.to_string()), None).await.unwrap();
    }

    let mut seen = BTreeSet::new();
    while seen.len() < 200 {
        let delivery = soon(async {
            tokio::select! { d = first.next() => d.unwrap(), d = second.next() => d.unwrap() }
        })
        .await;
        assert_eq!(delivery.delivered, 1);
        assert!(seen.insert(delivery.sequence), "each message goes to one of the two");
        delivery.ack().await.unwrap();
    }

    // When one is dropped, the messages it may have claimed go to the other.
    drop(first);
    bus.append(message("s.a", "more"), None).await.unwrap();
    assert_eq!(text(&next(&mut second).await.message), "more");
}

pub async fn consumers_with_different_names_each_receive_everything(bus: Bus) {
    with_stream(&bus, Retention::Limits, 3).await;
    for name in ["one", "two"] {
        let mut consumer = bus.consume(consumer(name)).await.unwrap();
        for n in 0..3 {
            let delivery = next(&mut consumer).await;
            assert_eq!(text(&delivery.message), n.to_string(), "{name}");
            delivery.ack().await.unwrap();
        }
    }
}

pub async fn filter_selects_subjects(bus: Bus) {
    with_stream(&bus, Retention::Limits, 1).await;
    bus.append(message("s.b.1", "chosen"), None).await.unwrap();

    let filtered = ConsumerConfig { filter: Some("s.b.*".into()), ..consumer("c") };
    let mut consumer = bus.consume(filtered).await.unwrap();
    bus.append(message("s.a", "not"), None).await.unwrap();
    bus.append(message("s.b.2", "chosen too"), None).await.unwrap();

    for expected in ["chosen", "chosen too"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery.message), expected);
        delivery.ack().await.unwrap();
    }
}

pub async fn consumer_can_start_with_new_messages(bus: Bus) {
    with_stream(&bus, Retention::Limits, 2).await;
    let late = ConsumerConfig { from_start: false, ..consumer("c") };
    let mut first = bus.consume(late.clone()).await.unwrap();
    bus.append(message("s.a", "next"), None).await.unwrap();
    let delivery = next(&mut first).await;
    assert_eq!(text(&delivery.message), "next");
    delivery.ack().await.unwrap();
    drop(first);

    // The start position is set when the consumer is created: the second handle receives what was appended meanwhile,
    // whatever its own `from_start` says.
    bus.append(message("s.a", "meanwhile"), None).await.unwrap();
    let mut second = bus
        .consume(ConsumerConfig { from_start: true, ack_wait: QUIET, ..late })
        .await
        .unwrap();
    assert_eq!(text(&next(&mut second).await.message), "meanwhile");
}

pub async fn max_ack_pending_bounds_outstanding_messages(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 3).await;
    let one = ConsumerConfig { max_ack_pending: 1, ..consumer("c") };
    let mut consumer = bus.consume(one).await.unwrap();
    for n in 0..3 {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery.message), n.to_string());
        assert!(timeout(QUIET, consumer.next()).await.is_err(), "the next message waits for this acknowledgement");
        delivery.ack().await.unwrap();
    }
}

pub async fn burst_arrives_complete_and_in_order(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 500).await;
    let mut consumer = bus.consume(consumer("c")).await.unwrap();
    for n in 0..500 {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery.message), n.to_string());
        delivery.ack().await.unwrap();
    }
    testkit::eventually(SOON, || async { bus.stream_info("S").await.unwrap().messages == 0 }).await;
}

pub async fn max_in_hand_bounds_what_a_consumer_takes(bus: Bus) {
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    let narrow = ConsumerConfig { max_in_hand: 2, ..consumer("c") };
    let mut slow = bus.consume(narrow.clone()).await.unwrap();
    for n in 0..5 {
        bus.append(message("s.a", &n.to_string()), None).await.unwrap();
    }

    let first = soon(slow.next()).await.unwrap();
    let _second = soon(slow.next()).await.unwrap();
    assert!(timeout(QUIET, slow.next()).await.is_err(), "two deliveries are outstanding");

    // Another consumer takes what the first has no room for.
    let mut other = bus.consume(ConsumerConfig { max_in_hand: 1, ..narrow }).await.unwrap();
    let third = soon(other.next()).await.unwrap();
    third.ack().await.unwrap();
    drop(third);
    let fourth = soon(other.next()).await.unwrap();

    // Settling and dropping a delivery makes room for the next one.
    first.ack().await.unwrap();
    drop(first);
    let fifth = soon(slow.next()).await.unwrap();
    assert_eq!((text(&fourth.message), text(&fifth.message)), ("3", "4"));
    assert_eq!((fourth.delivered, fifth.delivered), (1, 1));
}

pub async fn closed_consumer_returns_undelivered_messages(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 5).await;
    let mut first = bus.consume(consumer("c")).await.unwrap();
    let taken = next(&mut first).await;
    soon(first.close()).await;

    let mut second = bus.consume(consumer("c")).await.unwrap();
    let mut others = BTreeSet::new();
    soon(async {
        while others.len() < 4 {
            // On a starved machine the close gives up on its naks, and the messages come after their ack wait: in that
            // time the one that was taken must not come, too.
            taken.in_progress().await.unwrap();
            let Ok(delivery) = timeout(Duration::from_secs(2), second.next()).await else {
                continue;
            };
            let delivery = delivery.expect("the bus is open");
            others.insert(text(&delivery.message).to_string());
            delivery.ack().await.unwrap();
        }
    })
    .await;

    assert!(!others.contains(text(&taken.message)), "a delivery taken before the close is still outstanding");
    taken.ack().await.unwrap();
    testkit::eventually(SOON, || async { bus.stream_info("S").await.unwrap().messages == 0 }).await;
}
